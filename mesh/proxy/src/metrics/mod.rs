//! Istio's standard metrics: recorded per worker ([`series`]), read as families ([`collect`]), written for Prometheus
//! ([`text`]) with the labels that the bootstrap asks for ([`tags`]), and streamed to the control plane ([`push`]).

pub mod baseline;
pub mod clusters;
pub mod collect;
pub mod events;
pub mod expiry;
pub mod flags;
pub mod hosts;
pub mod names;
pub mod peer;
pub mod push;
pub mod select;
pub mod series;
pub mod tags;
pub mod text;
