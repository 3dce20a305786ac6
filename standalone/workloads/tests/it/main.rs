//! Whole pods: a real API server, the controllers, a real node process with real namespaces. Needs root or
//! unprivileged user namespaces; skips loudly without.

mod cluster;
mod network;
mod pods;
mod survival;
