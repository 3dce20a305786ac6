//! The bodies of responses to clients.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http::HeaderMap;
use http_body::{Body, Frame, SizeHint};

use super::super::incoming::Incoming;
use super::{BodyError, Throttled};
use crate::policy::compressor::Encoder;

/// What happens to a response body from the upstream.
pub trait Observer {
    /// A frame comes from the upstream; trailers may be changed.
    fn frame(&mut self, frame: &mut Frame<Bytes>);
    /// So much content goes to the client in the place of what came.
    fn encoded(&mut self, bytes: usize);
    /// Content is encoded from here on: what comes is not what the client gets.
    fn encodes(&mut self);
    /// Called before waiting for the next frame; may end the response with an error (a timeout).
    fn poll_limits(&mut self, cx: &mut Context<'_>) -> Poll<BodyError>;
    /// The upstream has sent everything.
    fn ended(&mut self);
    /// The upstream broke off.
    fn failed(&mut self, error: &BodyError);
}

/// The body of a response to the client.
#[derive(Debug)]
pub enum ResponseBody<O> {
    /// Ours; recorded when it was made.
    Full(Option<Bytes>),
    /// The upstream's.
    Upstream {
        /// Frames.
        incoming: Incoming,
        /// Who watches.
        observer: O,
        /// Whether all was seen.
        done: bool,
        /// Whether it is encoded on its way: then it has ended when what encodes it has.
        encoded: bool,
    },
    /// Encoded on its way.
    Encoded(Box<Encoded<O>>),
    /// No faster than a fault says.
    Throttled(Box<Throttled<O>>),
}

/// A body that is encoded on its way.
#[derive(Debug)]
pub struct Encoded<O> {
    inner: ResponseBody<O>,
    /// Gone once the end was written.
    encoder: Option<Encoder>,
    trailers: Option<HeaderMap>,
}

impl<O: Observer + Unpin> Encoded<O> {
    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        loop {
            let Some(encoder) = &mut self.encoder else {
                return Poll::Ready(self.trailers.take().map(|trailers| Ok(Frame::trailers(trailers))));
            };
            let end = match ready!(Pin::new(&mut self.inner).poll_frame(cx)) {
                Some(Err(error)) => return Poll::Ready(Some(Err(error))),
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) if data.is_empty() => continue,
                    Ok(data) => match encoder.push(&data) {
                        Ok(out) if out.is_empty() => continue,
                        Ok(out) => {
                            self.inner.sends(out.len());
                            return Poll::Ready(Some(Ok(Frame::data(out))));
                        }
                        Err(error) => return Poll::Ready(Some(Err(error.into()))),
                    },
                    Err(frame) => {
                        self.trailers = frame.into_trailers().ok();
                        true
                    }
                },
                None => true,
            };
            if end && let Some(encoder) = self.encoder.take() {
                let rest = encoder.finish();
                if let Ok(out) = &rest {
                    self.inner.sends(out.len());
                }
                self.inner.over();
                match rest {
                    Ok(out) if out.is_empty() => {}
                    Ok(out) => return Poll::Ready(Some(Ok(Frame::data(out)))),
                    Err(error) => return Poll::Ready(Some(Err(error.into()))),
                }
            }
        }
    }
}

impl<O: Observer> ResponseBody<O> {
    /// The upstream's body. One without content is over at once: nobody will ask for it.
    pub fn upstream(incoming: Incoming, mut observer: O) -> Self {
        let done = incoming.is_end_stream();
        if done {
            observer.ended();
        }
        Self::Upstream {
            incoming,
            observer,
            done,
            encoded: false,
        }
    }

    /// So much goes to the client of what is encoded.
    fn sends(&mut self, bytes: usize) {
        if let Self::Upstream { observer, .. } = self {
            observer.encoded(bytes);
        }
    }

    /// What encodes the body has ended.
    fn over(&mut self) {
        if let Self::Upstream { observer, .. } = self {
            observer.ended();
        }
    }

    /// The same body, at so many KiB a second.
    pub fn throttled(self, kib_per_second: u64) -> Self {
        Self::Throttled(Box::new(Throttled::new(self, kib_per_second)))
    }

    /// The same body, encoded.
    pub fn encoded(mut self, encoder: Encoder) -> Self {
        if let Self::Upstream {
            observer, encoded, ..
        } = &mut self
        {
            *encoded = true;
            observer.encodes();
        }
        Self::Encoded(Box::new(Encoded {
            inner: self,
            encoder: Some(encoder),
            trailers: None,
        }))
    }
}

impl<O: Observer + Unpin> Body for ResponseBody<O> {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match self.get_mut() {
            Self::Full(bytes) => Poll::Ready(bytes.take().map(|bytes| Ok(Frame::data(bytes)))),
            Self::Encoded(encoded) => encoded.poll_frame(cx),
            Self::Throttled(throttled) => throttled.poll_frame(cx),
            Self::Upstream {
                incoming,
                observer,
                done,
                encoded,
            } => match Pin::new(&mut *incoming).poll_frame(cx) {
                Poll::Pending => observer.poll_limits(cx).map(|error| Some(Err(error))),
                Poll::Ready(None) => {
                    if !std::mem::replace(done, true) && !*encoded {
                        observer.ended();
                    }
                    Poll::Ready(None)
                }
                Poll::Ready(Some(Err(error))) => {
                    *done = true;
                    observer.failed(&error);
                    Poll::Ready(Some(Err(error)))
                }
                Poll::Ready(Some(Ok(mut frame))) => {
                    observer.frame(&mut frame);
                    // Nobody asks again after the last byte of a sized body.
                    if !*done && incoming.is_end_stream() {
                        *done = true;
                        if !*encoded {
                            observer.ended();
                        }
                    }
                    Poll::Ready(Some(Ok(frame)))
                }
            },
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Full(bytes) => bytes.is_none(),
            Self::Upstream { incoming, done, .. } => *done || incoming.is_end_stream(),
            Self::Encoded(encoded) => encoded.encoder.is_none() && encoded.trailers.is_none(),
            Self::Throttled(throttled) => throttled.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Full(bytes) => SizeHint::with_exact(bytes.as_ref().map_or(0, |bytes| bytes.len() as u64)),
            Self::Upstream { incoming, .. } => incoming.size_hint(),
            Self::Encoded(_) => SizeHint::default(),
            Self::Throttled(throttled) => throttled.size_hint(),
        }
    }
}
