//! Whole pods: a real API server, the controllers, a real node process with real namespaces. Needs root or
//! unprivileged user namespaces; skips loudly without.

// Helpers outside of `#[test]` functions are tests all the same.
#![allow(clippy::unwrap_used, clippy::panic, unreachable_pub)]

mod cluster;
mod network;
mod pods;
mod recorded;
mod survival;
