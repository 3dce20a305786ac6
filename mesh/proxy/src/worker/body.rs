//! Message bodies on their way through the proxy: counted, bounded in time, and kept for retries where asked.
//!
//! `inbound` is what comes from the client, `request` what attempts make of it, `response` what goes back.

mod inbound;
mod request;
mod response;
mod throttled;

pub use inbound::{Ahead, Inbound};
pub use request::{RequestSource, UpstreamBody};
pub use response::{Encoded, Observer, ResponseBody};
pub use throttled::Throttled;

use crate::upstream::http1;

/// The error of a body: what went wrong, for which the message is broken off.
pub type BodyError = Box<dyn std::error::Error + Send + Sync>;

/// What was wrong with a body, or with who sends it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// The sender is gone.
    #[error("the connection has ended")]
    Gone,
    /// It sent nothing for too long.
    #[error("stream_idle_timeout")]
    Silent,
    /// It broke the protocol.
    #[error("the protocol was broken")]
    Broken,
}

impl Fault {
    /// What an error of a body says, as far as it is known.
    pub fn of(error: &BodyError) -> Option<Self> {
        let mut inner: Option<&(dyn std::error::Error + 'static)> = Some(&**error);
        while let Some(error) = inner {
            if let Some(fault) = error.downcast_ref() {
                return Some(*fault);
            }
            if let Some(error) = error.downcast_ref::<http1::Error>() {
                return Some(error.fault());
            }
            if let Some(error) = error.downcast_ref::<std::io::Error>() {
                use std::io::ErrorKind::{InvalidData, InvalidInput};
                // The latter are our own readers'.
                return Some(match error.kind() {
                    InvalidData | InvalidInput => Self::Broken,
                    _ => Self::Gone,
                });
            }
            if let Some(error) = error.downcast_ref::<h2::Error>() {
                let ended = error.is_io() || error.is_go_away() || (error.is_reset() && error.is_remote());
                return Some(if ended { Self::Gone } else { Self::Broken });
            }
            inner = error.source();
        }
        None
    }
}
