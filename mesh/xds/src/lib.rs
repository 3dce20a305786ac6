//! The xDS transport protocol, both ends, free of Kubernetes: subscriptions, versions, nonces, acknowledgements.
//!
//! This is the only crate of the workspace that imports the generated Envoy types; everyone else reaches them
//! through [`pb`].

pub mod resource;

pub use envoy_types::pb;
