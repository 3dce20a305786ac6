//! The controllers against an API server in this process and git repositories on disk.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test stops at the first surprise"
)]

mod cluster;
mod delivery;
mod failures;
mod remotes;
mod replicas;
mod sources;
mod ssh;
