//! Both ends of the protocol against each other.

// Clippy takes helpers of integration tests for product code.
#![allow(clippy::unwrap_used, clippy::panic)]

mod envoy;
mod histories;
mod names;
mod ordering;
mod scripted;
mod storm;
mod support;
mod transport;
