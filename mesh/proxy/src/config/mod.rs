//! Configuration: from xDS messages to what the request path reads.
//!
//! [`store::Store`] takes resources one by one, compiles each ([`route`], [`cluster`], [`endpoint`], [`listener`]) and
//! swaps it into its [`slot`]. A resource that cannot be honoured is refused with the path of the offending field and
//! the last good one stays.

#![allow(deprecated)] // control planes, istiod among them, still send fields that Envoy calls deprecated

pub mod alpn;
pub mod balancing;
pub mod chain_match;
pub mod client_cert;
pub mod cluster;
pub mod convert;
pub mod discovery;
pub mod endpoint;
pub mod extension;
pub mod filters;
pub mod hash;
pub mod hcm;
pub mod headers;
pub mod health_check;
pub mod listener;
pub mod listener_filters;
pub mod matchers;
pub mod on_demand;
pub mod outlier;
pub mod retry;
pub mod route;
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
