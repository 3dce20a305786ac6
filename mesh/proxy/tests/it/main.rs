//! The proxy as its neighbours see it: real sockets, real worker threads, in one process.

#![allow(clippy::unwrap_used, clippy::panic)] // a test that fails says so by panicking, helpers included
#![allow(deprecated)] // what control planes still send is tested as well

mod fixture;
mod forwarding;
mod hygiene;
mod interception;
mod lifecycle;
mod metrics;
mod policies;
mod tcp;
mod upstream_health;
mod xds;
