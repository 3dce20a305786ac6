//! Configuration: from xDS messages to what the request path reads.
//!
//! [`store::Store`] takes resources one by one, compiles each ([`route`], [`cluster`], [`endpoint`], [`listener`]) and
//! swaps it into its [`slot`]. A resource that cannot be honoured is refused with the path of the offending field and
//! the last good one stays.
//!
//! # The way of a resource
//! ```text
//! control::xds ─▶ control::changes ─▶ store::apply ─▶ decode ─▶ compile ─▶ slot (swap) ─▶ read by workers
//!                                          │             └ a field that cannot be honoured: Refusal, with its path
//!                                          └▶ names to ask for next; listeners to open or close; /config_dump
//! ```
//! A message has one compiler, in the file of its name; what compilers have in common is in `convert`. HTTP and network
//! filters are compiled in [`crate::policy`], access logs and tracing in [`crate::observe`], TLS in [`crate::tls`].
//!
//! | a line about | is in |
//! |---|---|
//! | what is held, what is missing, what refers to what | [`store`], [`slot`], [`on_demand`], [`extension`] |
//! | listeners: before the chain, which chain, what is in it | [`listener_filters`], [`chain_match`], [`listener`] |
//! | the connection manager and its virtual hosts and routes | [`hcm`], [`table`], [`route`], [`retry`], [`virtual_cluster`], `equal` |
//! | parts of requests: matchers, header mutations, hashes, weights | [`matchers`], [`headers`], [`hash`], [`weighted`] |
//! | clusters: endpoints, policy, subsets, health, protocols | [`cluster`], [`discovery`], [`endpoint`], [`balancing`], [`subset`], [`health_check`], [`outlier`], [`upstream_http`] |
//! | TLS and what else is between TCP and HTTP | [`transport_socket`], [`alpn`], [`client_cert`], [`tunneling`] |
//! | values that change without a resource | [`runtime`] |

#![allow(deprecated)] // control planes, istiod among them, still send fields that Envoy calls deprecated

pub mod alpn;
pub mod balancing;
pub mod chain_match;
pub mod client_cert;
pub mod cluster;
pub mod convert;
pub mod discovery;
pub mod endpoint;
mod equal;
pub mod extension;
pub mod hash;
pub mod hcm;
pub mod headers;
pub mod health_check;
pub mod http2;
pub mod listener;
pub mod listener_filters;
pub mod matchers;
pub mod on_demand;
pub mod origin;
pub mod outlier;
pub mod retry;
pub mod route;
pub mod router;
pub mod runtime;
pub mod shared_map;
pub mod slot;
pub mod store;
pub mod subset;
pub mod table;
pub mod transport_socket;
pub mod tunneling;
pub mod upstream_http;
pub mod virtual_cluster;
pub mod weighted;
