//! Bodies as they come, whichever protocol they come over.

use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};

use super::body::BodyError;
use super::http1;
use super::streams::{Received, TunnelIo};
use crate::upstream::http1 as upstream;

/// See the module.
#[derive(Debug)]
pub enum Incoming {
    /// None.
    Empty,
    /// A client's, over HTTP/1.
    Http1(http1::Received),
    /// An endpoint's, over HTTP/1.
    Answer(upstream::Body),
    /// Not a body: what an endpoint has granted over HTTP/1.
    Upgraded(Box<upstream::Tunnel>),
    /// Over HTTP/2.
    Http2(Received),
    /// Not a body: a tunnel that an endpoint has granted over HTTP/2.
    Tunnel(Box<TunnelIo>),
}

impl Body for Incoming {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match self.get_mut() {
            Self::Empty | Self::Tunnel(_) | Self::Upgraded(_) => Poll::Ready(None),
            Self::Http1(body) => body.poll_frame(cx),
            Self::Answer(body) => body.poll_frame(cx).map_err(Into::into),
            Self::Http2(body) => body.poll_frame(cx).map_err(Into::into),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Empty | Self::Tunnel(_) | Self::Upgraded(_) => true,
            Self::Http1(body) => body.is_end_stream(),
            Self::Answer(body) => body.is_end_stream(),
            Self::Http2(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Empty | Self::Tunnel(_) | Self::Upgraded(_) => SizeHint::with_exact(0),
            Self::Http1(body) => body.size_hint(),
            Self::Answer(body) => body.size_hint(),
            Self::Http2(body) => body.size_hint(),
        }
    }
}
