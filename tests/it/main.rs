//! What no single crate can show: rules of the house, promises of the documents, and the programs run as users run
//! them.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that fails panics")]

mod api;
mod bad_input;
mod cluster;
mod delivery;
mod dependency_rules;
mod documents;
mod failures;
mod http;
mod kills;
mod mounts;
mod programs;
mod releases;
mod repository;
mod routes;
mod samples;
mod standalone;
mod story;
mod traffic;
