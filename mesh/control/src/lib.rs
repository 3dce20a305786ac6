//! The mesh's control plane: from user objects to what proxies run with, and back to what the user sees.
//!
//! ```text
//! API server ─▶ index ─▶ world (model + translate) ─▶ ads ─▶ proxies
//!     ▲                                                │        │ acks, refusals, metrics
//!     └──────── status ◀──────── ledger ◀──────────────┘        ▼
//!                                                           telemetry ─▶ whoever measures
//! ```
//!
//! * [`index`]: watches → changes of the model.
//! * [`translate`]: the model → xDS resources, each translated once and shared by all proxies that need it.
//! * [`WARMING`]: a rule that came before what it refers to waits a moment, and what was in effect stays.
//! * Lingering: what is taken away before the last rule that names it stays as long.
//! * [`ads`]: what changed → the proxies that need it, with adaptive debounce.
//! * [`ledger`]: which proxies need, were sent, acknowledged or refused each generation of each object.
//! * [`telemetry`]: what the proxies measure → samples per workload.
//! * [`inject`]: a pod → the pod with its proxy. Pure.
//! * [`proxy_identity`]: who a connected proxy is.
//! * [`Control`] puts them together; one of it runs per process.
//!
//! Not here: certificates and mTLS (they come with the security issue), Gateway API, authorization of clients beyond
//! what may reach the socket.

pub mod ads;
mod control;
pub mod index;
pub mod inject;
pub mod ledger;
mod lingering;
pub mod proxy_identity;
pub mod status;
pub mod telemetry;
pub mod translate;
mod warming;
mod world;

pub use control::{Control, ControlError, ControlOptions};
pub use warming::WARMING;
pub use world::MeshWorld;
