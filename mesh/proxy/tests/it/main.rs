//! The proxy as its neighbours see it: real sockets, real worker threads, in one process.

#![allow(clippy::unwrap_used, clippy::panic)] // a test that fails says so by panicking, helpers included
#![allow(deprecated)] // what control planes still send is tested as well

mod admin;
mod ads;
mod authz;
mod balancing;
mod bootstrap;
mod breaking;
mod certificates;
mod clock_jumps;
mod differential;
mod envoy;
mod exhaustion;
mod extensions;
mod failure;
mod failure_http2;
mod fixture;
mod forwarding;
mod frames;
mod fuzz;
mod fuzz_crate;
mod golden;
mod h2spec;
mod harness;
mod hygiene;
mod interception;
mod interim;
mod interop;
mod interop_ads;
mod interop_wire;
mod lifecycle;
mod listener;
mod matrix1;
mod matrix2;
mod metrics;
mod mutations;
mod on_demand;
mod policies;
mod reference;
mod resilience;
mod restart;
mod rogue;
mod routing;
mod scripted;
mod secret_services;
mod soak;
mod tap;
mod tcp;
mod tls;
mod tls_secrets;
mod tls_upstream;
mod tunnels;
mod upstream_health;
mod wall_clock;
mod xds;
