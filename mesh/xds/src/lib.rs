//! The xDS transport protocol, both ends, free of Kubernetes: subscriptions, versions, nonces, acknowledgements.
//!
//! # What it is for
//! The control plane serves per-client *views* (sets of named, versioned [`Resource`]s) through [`server`]; a
//! proxy follows its view through [`client`]. Both ends keep an exact account of what was taken and what was refused,
//! per resource, because progressive delivery waits for precisely that.
//!
//! # What it is not
//! It knows nothing of what is inside a resource, of Kubernetes, or of routing. This is the only crate of the
//! workspace that imports the generated Envoy types; everyone else reaches them through [`pb`].
//!
//! # How data flows
//! ```text
//! view ─▶ server::connection (pure) ─▶ gRPC ─▶ client::state (pure) ─▶ consumer
//!  events ◀─ acked, refused, held ◀─ ACK/NACK naming resources ◀─ verdict per resource
//! ```
//!
//! # Limits
//! One outstanding response per type and connection; responses of at most about 2 MiB; additions wait for what they
//! depend on for at most two seconds; eight resource types (SDS, CDS, EDS, ECDS, LDS, RDS, VHDS, RTDS).

pub mod client;
mod digest;
pub mod refusal;
pub mod resource;
pub mod server;

pub use envoy_types::pb;
pub use refusal::Refusal;
pub use resource::{Change, Origin, Resource, ResourceType};

/// Client feature of proxies that take virtual hosts as resources of their own (VHDS) on the aggregated stream.
pub const FEATURE_VHDS: &str = "serin.vhds";
