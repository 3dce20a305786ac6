//! Why there is no connection, and why a request on one has no answer.

use std::io;
use std::sync::Arc;

use crate::upstream::http1;

/// Why there is no connection.
#[derive(Clone, Debug)]
pub enum ConnectError {
    /// It took too long.
    Timeout,
    /// The system or the peer said no.
    Io(io::ErrorKind, Arc<str>),
    /// A circuit breaker is open.
    Overflow,
}

impl std::fmt::Display for ConnectError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Timeout => f.write_str("connection timeout"),
            Self::Io(_, text) => f.write_str(text),
            Self::Overflow => f.write_str("too many connections"),
        }
    }
}

impl From<io::Error> for ConnectError {
    fn from(error: io::Error) -> Self {
        Self::Io(error.kind(), error.to_string().into())
    }
}

impl From<h2::Error> for ConnectError {
    fn from(error: h2::Error) -> Self {
        Self::Io(io::ErrorKind::Other, error.to_string().into())
    }
}

/// Why a request has no answer.
#[derive(Debug, thiserror::Error)]
pub enum SendError {
    /// Over HTTP/1.
    #[error(transparent)]
    Http1(http1::Error),
    /// Over HTTP/2.
    #[error("http2 error")]
    Http2(#[source] h2::Error),
}

/// A request that was not answered.
#[derive(Debug)]
pub struct Unanswered {
    /// Why.
    pub error: SendError,
    /// Nothing of it was sent.
    pub unsent: bool,
}

/// Of a request whose head was sent.
impl From<h2::Error> for Unanswered {
    fn from(error: h2::Error) -> Self {
        Self {
            unsent: false,
            error: SendError::Http2(error),
        }
    }
}
