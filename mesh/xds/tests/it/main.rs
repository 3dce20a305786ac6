//! Both ends of the protocol against each other.

mod envoy;
mod histories;
mod ordering;
mod support;
mod transport;
