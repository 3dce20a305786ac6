//! TLS: certificates, who a peer is, and what a connection was negotiated to.
//!
//! rustls with aws-lc-rs does the protocol. What is ours: secrets that rotate under running listeners and clusters
//! without touching a connection, peers verified by SPIFFE identity and by Envoy's other rules, and what is known of a
//! connection's peer kept for policies, headers and metrics ([`info::ConnectionTls`]).

pub mod certificate;
pub mod info;
