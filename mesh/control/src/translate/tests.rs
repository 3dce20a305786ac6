//! Tests of the translation as a whole.

mod json;
mod parity;
mod world;
