//! The controllers against an API server in this process and git repositories on disk.

mod cluster;
mod delivery;
mod failures;
mod remotes;
mod sources;
