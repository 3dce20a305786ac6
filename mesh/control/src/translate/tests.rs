//! Tests of the translation as a whole.

mod envoy;
mod incremental;
mod json;
mod parity;
mod taken;
mod world;
