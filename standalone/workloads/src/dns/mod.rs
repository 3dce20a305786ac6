//! DNS for pods, as CoreDNS's `kubernetes` plugin answers it.
//!
//! [`zone`] is the pure half: question in, answer out, from Services and EndpointSlices. [`server`] is the sockets,
//! and forwarding of names that are not the cluster's to the host's resolver.

mod server;
mod zone;

pub(crate) use server::serve;
pub(crate) use zone::Zone;
