//! Message bodies on their way through the proxy: counted, bounded in time, and kept for retries where asked.

use std::cell::RefCell;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::HeaderMap;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use tokio::time::Sleep;

/// The error of a body: what went wrong, for hyper to break the message off.
pub type BodyError = Box<dyn std::error::Error + Send + Sync>;

/// Frames of a request as they come from the client, shared by the attempts to send it on.
#[derive(Debug)]
pub struct RequestSource {
    incoming: Incoming,
    kept: Vec<Kept>,
    kept_bytes: usize,
    limit: usize,
    overflowed: bool,
    ended: bool,
    /// Bytes received from the client.
    pub received: u64,
    /// The client broke off, or broke the protocol, or sent nothing for too long.
    pub client_failed: bool,
    /// The client sent nothing for too long.
    pub timed_out: bool,
    /// The response has begun: what follows is bounded by its limits.
    pub answered: bool,
    /// When the client sent something last.
    pub last_frame: Option<Instant>,
    idle: Option<Duration>,
    timer: Option<Pin<Box<Sleep>>>,
}

#[derive(Clone, Debug)]
enum Kept {
    Data(Bytes),
    Trailers(HeaderMap),
}

impl RequestSource {
    /// Of `incoming`, keeping up to `limit` bytes for retries, and waiting up to `idle` for more as long as there is no
    /// response.
    pub fn new(incoming: Incoming, limit: usize, idle: Option<Duration>) -> Rc<RefCell<Self>> {
        Rc::new(RefCell::new(Self {
            incoming,
            kept: Vec::new(),
            kept_bytes: 0,
            limit,
            overflowed: limit == 0,
            ended: false,
            received: 0,
            client_failed: false,
            timed_out: false,
            answered: false,
            last_frame: None,
            idle,
            timer: None,
        }))
    }

    /// Whether the client has been silent for too long; called when there is nothing to read.
    fn stalled(&mut self, cx: &mut Context<'_>) -> bool {
        let Some(idle) = self.idle.filter(|_| !self.answered) else {
            return false;
        };
        let timer = self
            .timer
            .get_or_insert_with(|| Box::pin(tokio::time::sleep(idle)));
        while timer.as_mut().poll(cx).is_ready() {
            let quiet = self.last_frame.map_or(idle, |at| at.elapsed());
            if quiet >= idle {
                return true;
            }
            timer
                .as_mut()
                .reset(tokio::time::Instant::now() + idle.saturating_sub(quiet));
        }
        false
    }

    /// Whether everything that was read can be sent again.
    pub fn can_replay(&self) -> bool {
        !self.overflowed || self.received == 0
    }

    /// Whether the whole request has been read.
    pub fn ended(&self) -> bool {
        self.ended
    }

    /// A copy of the whole body, if it has all been read and kept.
    pub fn copy(&self) -> Option<Bytes> {
        if !self.ended || self.overflowed {
            return None;
        }
        let mut out = bytes::BytesMut::with_capacity(self.kept_bytes);
        for frame in &self.kept {
            if let Kept::Data(bytes) = frame {
                out.extend_from_slice(bytes);
            }
        }
        Some(out.freeze())
    }

    /// Nothing will be sent again: what was kept is given back.
    pub fn stop_keeping(&mut self) {
        self.overflowed = true;
        self.kept = Vec::new();
    }

    fn keep(&mut self, frame: Kept, bytes: usize) {
        if self.overflowed {
            return;
        }
        self.kept_bytes += bytes;
        if self.kept_bytes > self.limit {
            self.overflowed = true;
            self.kept = Vec::new();
        } else {
            self.kept.push(frame);
        }
    }
}

/// The body of one attempt.
#[derive(Debug)]
pub enum UpstreamBody {
    /// None.
    Empty,
    /// A copy, for mirrors.
    Full(Option<Bytes>),
    /// What the client sends.
    Stream {
        /// Shared with other attempts.
        source: Rc<RefCell<RequestSource>>,
        /// Kept frames that this attempt has sent.
        position: usize,
    },
}

impl UpstreamBody {
    /// A body that starts over from the first byte.
    pub fn stream(source: &Rc<RefCell<RequestSource>>) -> Self {
        Self::Stream {
            source: source.clone(),
            position: 0,
        }
    }
}

impl Body for UpstreamBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match self.get_mut() {
            Self::Empty => Poll::Ready(None),
            Self::Full(bytes) => Poll::Ready(bytes.take().map(|bytes| Ok(Frame::data(bytes)))),
            Self::Stream { source, position } => {
                let mut source = source.borrow_mut();
                if let Some(kept) = source.kept.get(*position) {
                    *position += 1;
                    return Poll::Ready(Some(Ok(match kept.clone() {
                        Kept::Data(bytes) => Frame::data(bytes),
                        Kept::Trailers(trailers) => Frame::trailers(trailers),
                    })));
                }
                if source.ended {
                    return Poll::Ready(None);
                }
                let polled = Pin::new(&mut source.incoming).poll_frame(cx);
                if polled.is_pending() && source.stalled(cx) {
                    source.client_failed = true;
                    source.timed_out = true;
                    return Poll::Ready(Some(Err("stream_idle_timeout".into())));
                }
                match ready!(polled) {
                    None => {
                        source.ended = true;
                        Poll::Ready(None)
                    }
                    Some(Err(error)) => {
                        source.client_failed = true;
                        Poll::Ready(Some(Err(error.into())))
                    }
                    Some(Ok(frame)) => {
                        source.last_frame = Some(Instant::now());
                        if let Some(data) = frame.data_ref() {
                            let bytes = data.len();
                            source.received += bytes as u64;
                            let data = data.clone();
                            source.keep(Kept::Data(data), bytes);
                        } else if let Some(trailers) = frame.trailers_ref() {
                            let trailers = trailers.clone();
                            source.keep(Kept::Trailers(trailers), 0);
                        }
                        if !source.overflowed {
                            *position += 1;
                        }
                        if source.incoming.is_end_stream() {
                            source.ended = true;
                        }
                        Poll::Ready(Some(Ok(frame)))
                    }
                }
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Empty => true,
            Self::Full(bytes) => bytes.is_none(),
            Self::Stream { source, position } => {
                let source = source.borrow();
                source.ended && *position >= source.kept.len()
            }
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Empty => SizeHint::with_exact(0),
            Self::Full(bytes) => SizeHint::with_exact(bytes.as_ref().map_or(0, |bytes| bytes.len() as u64)),
            // Exact sizes travel in `content-length`, which hyper goes by; after frames were read the hint is short.
            Self::Stream { source, .. } => {
                let source = source.borrow();
                if source.received == 0 {
                    source.incoming.size_hint()
                } else {
                    SizeHint::default()
                }
            }
        }
    }
}

/// What happens to a response body from the upstream.
pub trait Observer {
    /// A frame passes. An error breaks the response off.
    fn frame(&mut self, frame: &Frame<Bytes>);
    /// Called before waiting for the next frame; may end the response with an error (a timeout).
    fn poll_limits(&mut self, cx: &mut Context<'_>) -> Poll<BodyError>;
    /// The upstream has sent everything.
    fn ended(&mut self);
    /// The upstream broke off.
    fn failed(&mut self);
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
    },
}

impl<O: Observer> ResponseBody<O> {
    /// The upstream's body. One without content is over at once: hyper will not ask for it.
    pub fn upstream(incoming: Incoming, mut observer: O) -> Self {
        let done = incoming.is_end_stream();
        if done {
            observer.ended();
        }
        Self::Upstream {
            incoming,
            observer,
            done,
        }
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
            Self::Upstream {
                incoming,
                observer,
                done,
            } => match Pin::new(&mut *incoming).poll_frame(cx) {
                Poll::Pending => observer.poll_limits(cx).map(|error| Some(Err(error))),
                Poll::Ready(None) => {
                    if !*done {
                        *done = true;
                        observer.ended();
                    }
                    Poll::Ready(None)
                }
                Poll::Ready(Some(Err(error))) => {
                    *done = true;
                    observer.failed();
                    Poll::Ready(Some(Err(error.into())))
                }
                Poll::Ready(Some(Ok(frame))) => {
                    observer.frame(&frame);
                    // hyper does not poll again after the last byte of a sized body.
                    if !*done && incoming.is_end_stream() {
                        *done = true;
                        observer.ended();
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
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Full(bytes) => SizeHint::with_exact(bytes.as_ref().map_or(0, |bytes| bytes.len() as u64)),
            Self::Upstream { incoming, .. } => incoming.size_hint(),
        }
    }
}
