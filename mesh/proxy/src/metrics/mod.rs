//! What is counted: Istio's standard metrics, and Envoy's statistics.
//!
//! # The way of a number
//! ```text
//! worker ─▶ cell of its own: series (Istio), clusters, hosts, events (Envoy), policy::stats (filters)
//! control thread ─▶ collect, names ─▶ baseline ─▶ select ─┬▶ text: /stats/prometheus    push: to the control plane
//!                                                         └▶ names: /stats
//! ```
//! A cell is written by one worker and read by anybody; nothing is summed before somebody asks. What happens with each
//! request has a cell from the start ([`series`], [`clusters`]), what is rare gets one with its first event ([`events`]).

pub mod baseline;
pub mod buckets;
pub mod clusters;
pub mod collect;
pub mod events;
pub mod expiry;
pub mod flags;
pub mod histogram;
pub mod hosts;
pub mod names;
pub mod peer;
pub mod push;
pub mod select;
pub mod series;
pub mod tags;
pub mod text;
