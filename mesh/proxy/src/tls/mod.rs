//! TLS: secrets, contexts, verification, and what is known of a connection's peer.
//!
//! rustls with aws-lc-rs does the protocol. What is ours: secrets that rotate under running listeners and clusters
//! without touching a connection ([`secret`]), peers verified by SPIFFE identity and by Envoy's other rules
//! ([`validation`], [`verify`]), Envoy's two contexts made into configurations of rustls ([`downstream`], [`upstream`]),
//! and what a connection was negotiated to, for policies, headers and metrics ([`info::ConnectionTls`]).
//!
//! A context refers to its secrets through slots. A configuration of rustls is built from them at the first handshake
//! after one of them has changed; connections that exist keep what they were made with, and sessions made under older
//! secrets are not resumed, since a resumed session is not verified again.
//!
//! # Decisions
//! - TLS 1.2 and 1.3 on both sides unless narrowed; older versions are refused. X25519MLKEM768 is offered first.
//! - Cipher suites and curves that rustls does not have (CBC, static RSA, P-521) are passed over as long as one of the
//!   list remains; names that nobody knows are refused.
//! - A certificate that has expired, or does not belong to its key, is refused when it arrives, and the last good one
//!   stays. Envoy takes an expired one and lets every handshake fail.
//! - A client without any validation context accepts any server, as Envoy does.
//! - A server whose ALPN has nothing in common with the client's goes on without, as Envoy does.

#![allow(deprecated)] // fields that control planes still send must be refused or honoured, not overlooked

pub mod certificate;
pub mod context;
pub mod downstream;
pub mod info;
mod rebuilt;
pub mod rewind;
pub mod secret;
pub mod stats;
pub mod table;
pub mod tickets;
pub mod upstream;
pub mod validation;
pub mod verify;
