//! The shell on a real API server (ours, in this process), with a stand-in for the kubelet, the mesh and the traffic.
#![allow(clippy::unwrap_used, clippy::panic)] // helpers of tests may fail like tests

mod cluster;
mod rollouts;
mod takeover;
mod templates;
mod watch;
