//! Policies: the HTTP and network filters that judge, limit and change traffic, compiled once per resource.
//!
//! # What it is for
//! [`chain::Chain`] is the ordered list of an HTTP connection manager's `http_filters`, [`per_route::PerRoute`] what
//! route configurations, virtual hosts, routes and weighted clusters say about them. Each filter is a variant of
//! [`chain::Kind`] with a module of its own here; these modules hold the compiled configuration and the decisions, which
//! are pure (time, randomness and keys are arguments). Running a chain on a request, and everything that waits, is in
//! `worker::filters`.
//!
//! # How data flows
//! ```text
//! HttpFilter ──compile──▶ Kind ─┐
//! typed_per_filter_config ─▶ Override ─┴─▶ decode in order ─▶ router ─▶ encode in reverse order
//! ```
//! What one filter says to the next is dynamic [`metadata`] and [`filter_state`]; who asks is in [`facts`].
//!
//! # Decisions worth knowing
//! - A filter is known by the type of its configuration, as in Envoy, and by its name where it has none; overrides find
//!   it by the name that it has in the chain.
//! - A chain without filters costs a request the test of an empty slice; nothing is allocated before a filter has
//!   something to remember.
//! - What the proxy cannot honour is refused by name when the resource arrives: a policy that would be weaker than it
//!   reads is never live.
//! - Shares of requests that name a runtime key follow the runtime; flags and numbers that do are their default values.

#![allow(deprecated)] // control planes still send fields that Envoy calls deprecated

pub mod adaptive_concurrency;
pub mod bucket;
pub mod buffer;
pub mod cel;
pub mod chain;
pub mod compressor;
pub mod cors;
pub mod descriptors;
pub mod ext_authz;
pub mod ext_proc;
pub mod facts;
pub mod fault;
pub mod filter_state;
pub mod grpc_stats;
pub mod header_mutation;
pub mod jwt;
pub mod local_rate_limit;
pub mod metadata;
pub mod mutation_rules;
pub mod network;
pub mod on_demand;
pub mod per_route;
pub mod rate_limit;
pub mod rbac;
pub mod service;
pub mod set_metadata;
pub mod stats;
pub mod tap;
pub mod uri_template;
