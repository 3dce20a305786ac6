//! Tests of the translation as a whole.

mod incremental;
mod json;
mod parity;
mod world;
