//! `serin-proxy`: the data plane, an L4/L7 proxy driven by xDS.
//!
//! # What it is for
//! One of these stands beside every application (sidecar) and in front of the mesh (gateway). It takes its configuration
//! from any standard xDS server, or from a file, and does what the configuration says: routing, weights, retries,
//! timeouts, faults, mirroring, balancing, outlier detection, protocol translation; it counts with Istio's names and
//! streams the counts back.
//!
//! # What it is not
//! It knows no Kubernetes and no Istio object; what it cannot honour it refuses, per resource, with the path of the
//! field, and the last good version stays. What is honoured and what is not is listed in
//! `docs/supported/proxy.md`.
//!
//! # How data flows
//! ```text
//! control thread   xDS ─▶ config::store ── compile one resource ─▶ slot (swap)     admin, metrics push, DNS, log
//!                                                                  │ read, never locked
//! worker threads   accept ─▶ sniff ─▶ filter chain ─▶ http | tcp ──┴▶ route ─▶ cluster ─▶ endpoint ─▶ pool ─▶ socket
//!                                                     hygiene                  balance, retry, outlier
//! ```
//! Where a line belongs: the way of a request is told in [`worker`], of a resource in [`config`], of a statistic in
//! [`metrics`], of the process in [`control`]; what is decided about traffic is in [`policy`] (filters), [`upstream`]
//! (endpoints) and [`hygiene`] (messages), which wait for nothing.
//!
//! Each worker is a thread with a `current_thread` runtime, its own `SO_REUSEPORT` sockets, connection pools and metric
//! cells. Routes refer to clusters, listeners to routes, routes to virtual hosts through [`config::slot`]s, atomic cells
//! that are swapped one by one: a weight change costs one swap whatever the size of the mesh, is live on all workers
//! before it is acknowledged, and disturbs no request that is on its way.
//!
//! # Decisions worth knowing
//! - [`config::weighted`]: weights are exact over any window, per worker.
//! - [`mod@http1`]: HTTP/1 has a codec of its own, which reads clients strictly; what is ambiguous is answered 4xx/5xx with flag `DPE`
//!   and never forwarded.
//! - Requests that were provably not processed (refused connection, idle connection closed under us, `REFUSED_STREAM`, a
//!   mesh peer's `x-serin-unprocessed`) are sent again even if not idempotent; others only as the retry policy says.
//! - Where a listener switches protocol detection's time limit off, a silent client's connection is opened towards the
//!   TCP upstream after half a second and whoever speaks first decides, so server-first protocols never hang.
//! - Istio's metrics are kept for every listener with a traffic direction, unless the configuration holds Istio's own
//!   filters and leaves `istio.stats` out.
//! - [`policy`]: HTTP filters are an ordered chain of enum variants, compiled once; overrides are found by filter name on
//!   four levels. An empty chain costs the test of an empty slice.
//! - [`observe`]: access logs and traces keep of a request only what their configuration names. Without configured access
//!   logs errors are told all the same, as JSON lines.
//! - The route timeout starts with the request's head, not its last byte (Envoy), and covers retries and the response.
//! - An HTTP/1 connection holds buffers only while something waits in them: small messages are read on the stack;
//!   memory that was freed is given back to the kernel at once while the proxy starts and every five seconds later; huge
//!   pages are off. So an idle connection costs some 7 KB, a cluster with its virtual host 4 KB and an empty proxy less than 8 MB.
//! - [`tls`]: secrets rotate under connections; sessions from before a change are not resumed; a host that the chain of a
//!   TLS connection does not name is answered 421.
//! - A filter chain is found as Envoy finds it, without going back ([`config::chain_match`]).
//! - A bootstrap file becomes Envoy's own message by Envoy's own schema ([`bootstrap`]), so static resources may hold
//!   whatever the same resources may hold over xDS; what the proxy does not do is refused once, by the compiler.
//! - Balancing is a balancer per group of hosts ([`upstream::balance`]): a subset is one more group, a zone a range of one,
//!   so what is not configured costs a request nothing. A priority panics only where all together cannot carry the load.
//! - Retries have a budget (20 % of the active requests, at least 3) unless a cluster gives a number.
//! - Within the proxy an upgrade is a GET that asks for a protocol, whichever HTTP version it came in; CONNECT, upgrades
//!   and extended CONNECT differ at the two ends of a tunnel only. Nothing follows a CONNECT that was refused.
//! - Overload is one flag that requests look at ([`mod@overload`]); what is measured is measured on the control thread.
//! - HTTP/1 is ours on both sides (`worker::http1`, [`upstream::http1`]), HTTP/2 is `h2` itself (`worker::http2`,
//!   [`upstream::http2`]): a request has one task, that of its stream or of its HTTP/1 connection, and wakes no other one.
//! - Interim answers (1xx) pass from and to HTTP/1.1 and HTTP/2 ([`worker::interim`]); a client that expects `100 Continue` gets its endpoint's.
//! - Who looks at requests ([`policy::tap`]) gets copies over a bounded queue; while nobody looks, a request reads a flag.
//! - Statistics of a cluster begin with its first use on a worker ([`metrics::clusters`]); what of it is rare is counted by
//!   its slot, with the first event ([`metrics::events`]). Clusters that nobody uses are shown by what the configuration says,
//!   and answers about thousands of them are written piece by piece ([`control::scrape`]). Counters only grow, and what is
//!   shown is them with a [`metrics::baseline`]: what processes before this one counted, or what they were reset by.
//! - What this proxy has no meaning for (HTTP/3, watchdogs, flow-control pauses) has no statistic: a zero would say that all
//!   is well with it.
//! - The messages of resources are kept as they came, encoded, for `/config_dump`; they are some hundred bytes each.
//! - Responses that the proxy makes itself carry `x-serin-response-flags` when a flag is set.
//! - What a request may wait for is asked for beside everything (`*`), as Envoy does, so that a server may send ahead what it
//!   likes; unlike Envoy, names that nobody uses are given up ([`config::on_demand`]), and only a host without a virtual host
//!   waits, not one whose routes do not fit.
//! - A filter by ECDS, of HTTP, of the network or of the listener, is taken by every listener that names it or by none
//!   ([`config::extension`]).
//! - Shares of requests with a runtime key hold a cell that a change of a layer writes ([`config::runtime`]): a request pays
//!   one relaxed load.
//! - What a change costs does not grow with what is loaded beside it: names to ask for are counted as resources come and go
//!   ([`config::store`]), a table of domains shares what it has in common with the one before ([`config::shared_map`]), virtual
//!   hosts of a route configuration are compared as bytes, and clusters that nobody uses are looked after by nobody.
//! - The control thread asks the scheduler for short turns, so that a change does not wait behind busy workers.
//! - A sidecar finds the Service that it belongs to by its own address among the endpoints that it is told.
//!
//! # Limits
//! 60 KiB and 100 fields per request head; 1 MiB of a request body kept for retries and mirrors (larger bodies are not
//! retried once sent, nor mirrored); 256 idle HTTP/1 connections per endpoint and worker; 4,096 destinations per
//! ORIGINAL_DST cluster and worker; 10,000 metric series per worker, further ones are counted as `unknown`, unused ones
//! end ([`metrics::expiry`]); circuit
//! breakers count over all workers, pools and balancing are per worker.

mod bell;
pub mod bootstrap;
mod calendar;
mod clock;
pub mod config;
pub mod control;
pub mod error;
#[cfg(test)]
mod given;
pub mod http1;
pub mod hygiene;
pub mod intercept;
pub mod metrics;
pub mod observe;
pub mod overload;
pub mod policy;
mod random;
pub mod stream;
mod sys;
pub mod tls;
pub mod upstream;
pub mod worker;

pub use sys::Allocator;
