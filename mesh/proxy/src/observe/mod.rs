//! Observation of single requests: access logs in Envoy's format language, and traces.
//!
//! # How data flows
//! ```text
//! access_log ──compile──▶ filter + format + sink          request ends ─▶ Record ─▶ filter ─▶ line ─▶ sink (bounded)
//!                                    └─▶ Wants: the fields that must be kept until then                 └─▶ writer thread
//! ```
//! A connection manager without access logs keeps nothing and costs nothing. With them, a request keeps the few fields
//! that its formats name; a line is made once, at the end, and appended to the sink's buffer under a short lock. One
//! thread writes all sinks; a sink that cannot keep up loses lines, which are counted, and never holds a request up.
//! Entries for log services ([`als`], [`otlp`]) are encoded at once and wait in [`batch`]es, which a task of the worker
//! sends; these are bounded and counted alike.

#![allow(deprecated)] // control planes still send fields that Envoy calls deprecated

pub mod access_log;
pub mod als;
pub mod batch;
pub mod export;
pub mod filter;
pub mod format;
pub mod otlp;
pub mod record;
pub mod sink;
pub mod time;
pub mod trace;
pub mod tracer;
