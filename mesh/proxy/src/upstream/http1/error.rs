//! Why a request over HTTP/1 has no answer, or not a whole one.

use std::io;

use crate::http1::encode::WrongLength;
use crate::http1::violation::Violation;
use crate::worker::body::{BodyError, Fault};

/// See the module.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The endpoint has closed the connection, or we have.
    #[error("the connection was closed before the answer was whole")]
    Closed,
    /// Something came before the request was sent.
    #[error("bytes came that nobody had asked for")]
    Unasked,
    /// What came is no answer.
    #[error("the answer is malformed: {}", .0.details())]
    Malformed(Violation),
    /// Reading or writing has failed.
    #[error("the connection broke")]
    Io(#[source] io::Error),
    /// The request's body broke off.
    #[error("the body of the request broke off")]
    Body(#[source] BodyError),
    /// The request's body is not as long as its head says.
    #[error(transparent)]
    Length(#[from] WrongLength),
}

impl Error {
    /// Whether what came is no answer.
    pub fn is_malformed(&self) -> bool {
        matches!(self, Self::Malformed(_))
    }

    /// What was wrong with the endpoint.
    pub fn fault(&self) -> Fault {
        match self {
            Self::Malformed(_) | Self::Unasked => Fault::Broken,
            Self::Closed | Self::Io(_) | Self::Body(_) | Self::Length(_) => Fault::Gone,
        }
    }
}
