//! The client end: what a proxy uses to get its configuration and to say what it took.
//!
//! [`AdsClient`] keeps one aggregated stream open for ever, reconnects with jittered back-off, states what it holds so
//! that only differences are sent, and hands [`Delivery`]s to its consumer, who answers each with what it could not
//! accept. The protocol itself is [`state::ClientState`], a pure state machine; the incremental ("delta") variant is
//! spoken first and the state-of-the-world variant with servers that know no other.
//!
//! With no control plane in reach nothing is delivered and nothing is removed: the consumer keeps the last good
//! configuration for as long as it lives.

mod ads;
mod backoff;
mod delta;
mod sotw;
pub mod state;
mod transport;

pub use ads::{
    AdsClient, AdsClientConfig, ConnectionState, Deliveries, Delivery, MAX_UNIX_WAIT, STABLE_AFTER, Service,
};
pub use backoff::BackoffRange;
pub use state::{Interest, NameChanges, ProtocolError, Received};
pub use transport::{Dialer, Dialing, Endpoint, EndpointError, Io, channel};
