//! What no single crate can show: rules of the house, promises of the documents, and the programs run as users run
//! them.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that fails panics")]

mod cluster;
mod dependency_rules;
mod documents;
mod programs;
mod standalone;
mod story;
