//! The body of a request as the attempts to send it on share it: bounded in time, and kept for further attempts.

use std::cell::RefCell;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker, ready};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::HeaderMap;
use http_body::{Body, Frame, SizeHint};
use tokio::time::Sleep;

use super::{BodyError, Fault, Inbound};
use crate::worker::tap::Capture;

/// Frames of a request as they come from the client, shared by the attempts to send it on.
#[derive(Debug)]
pub struct RequestSource {
    incoming: Inbound,
    kept: Vec<Kept>,
    kept_bytes: usize,
    /// Kept frames that the latest attempt has sent.
    replayed: usize,
    limit: usize,
    overflowed: bool,
    ended: bool,
    /// When its end was read.
    pub ended_at: Option<Instant>,
    /// Bytes received from the client.
    pub received: u64,
    /// What the client did wrong, if its body did not come to its end.
    pub fault: Option<Fault>,
    /// The response has begun: what follows is bounded by its limits.
    pub answered: bool,
    /// When the client sent something last.
    pub last_frame: Option<Instant>,
    idle: Option<Duration>,
    timer: Option<Pin<Box<Sleep>>>,
    hold: Hold,
    /// The exchange has ended before the request.
    left: bool,
    /// Who waits for more of it.
    waiting: Option<Waker>,
}

/// Whether a body is asked for, where its client waits to be told that it is wanted (`Expect: 100-continue`).
#[derive(Debug, Default)]
enum Hold {
    /// Nobody has said that it is not.
    #[default]
    Never,
    /// Not yet.
    Held,
    /// It was held, and then asked for.
    Over,
}

#[derive(Debug)]
enum Kept {
    Data(Bytes),
    Trailers(HeaderMap),
}

impl Kept {
    fn to_frame(&self) -> Frame<Bytes> {
        match self {
            Self::Data(bytes) => Frame::data(bytes.clone()),
            Self::Trailers(trailers) => Frame::trailers(trailers.clone()),
        }
    }
}

impl RequestSource {
    /// Of `incoming`, keeping up to `limit` bytes for retries, and waiting up to `idle` for more as long as there is no
    /// response.
    pub fn new(incoming: Inbound, limit: usize, idle: Option<Duration>) -> Rc<RefCell<Self>> {
        Rc::new(RefCell::new(Self {
            incoming,
            kept: Vec::new(),
            kept_bytes: 0,
            replayed: 0,
            limit,
            overflowed: limit == 0,
            ended: false,
            ended_at: None,
            received: 0,
            fault: None,
            answered: false,
            last_frame: None,
            idle,
            timer: None,
            hold: Hold::Never,
            left: false,
            waiting: None,
        }))
    }

    /// Holds the body back until [`Self::go_on`]; `false` if it has been asked for already.
    pub fn hold(&mut self) -> bool {
        if matches!(self.hold, Hold::Never) && self.received == 0 && self.incoming.untouched() {
            self.hold = Hold::Held;
        }
        self.is_held()
    }

    /// Whether the body is held back.
    pub fn is_held(&self) -> bool {
        matches!(self.hold, Hold::Held)
    }

    /// The body is wanted.
    pub fn go_on(&mut self) {
        if self.is_held() {
            self.hold = Hold::Over;
            self.wake();
        }
    }

    /// The exchange is over. What the client has not sent by now nobody waits for: neither the endpoint's connection, nor the
    /// client's, which ends once it has its answer.
    pub fn let_go(&mut self) {
        if !self.is_whole() {
            self.left = true;
            self.incoming.forget();
            self.wake();
        }
    }

    fn wake(&mut self) {
        if let Some(waker) = self.waiting.take() {
            waker.wake();
        }
    }

    /// Remembers who waits.
    fn wait(&mut self, cx: &Context<'_>) {
        if !self
            .waiting
            .as_ref()
            .is_some_and(|waker| waker.will_wake(cx.waker()))
        {
            self.waiting = Some(cx.waker().clone());
        }
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

    /// What comes is seen by somebody.
    pub fn capture(&mut self, capture: Box<Capture>) {
        self.incoming.capture(capture);
    }

    /// What somebody has seen.
    pub fn captured(&self) -> Option<&Capture> {
        self.incoming.captured()
    }

    /// gRPC messages so far, where somebody counts them.
    pub fn messages(&self) -> u64 {
        self.incoming.message_count()
    }

    /// Whether everything that was read can be sent again.
    pub fn can_replay(&self) -> bool {
        !self.overflowed || self.received == 0
    }

    fn end(&mut self) {
        self.ended = true;
        self.ended_at.get_or_insert_with(Instant::now);
    }

    /// Whether the client has sent the whole request, as far as it was looked at.
    pub fn is_whole(&self) -> bool {
        self.ended || (!self.left && self.incoming.is_whole())
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

    /// No further attempt follows: what was kept is given back once the latest one has sent it. An answer may come
    /// before that.
    pub fn stop_keeping(&mut self) {
        self.overflowed = true;
        if self.replayed >= self.kept.len() {
            self.kept = Vec::new();
        }
    }

    fn keep(&mut self, bytes: usize, frame: impl FnOnce() -> Kept) {
        if self.overflowed {
            return;
        }
        self.kept_bytes += bytes;
        if self.kept_bytes > self.limit {
            self.overflowed = true;
            self.kept = Vec::new();
        } else {
            self.kept.push(frame());
        }
    }

    /// The next frame for an attempt that has sent `position` kept ones: what was kept, then what comes.
    fn poll_from(
        &mut self,
        position: &mut usize,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        if let Some(kept) = self.kept.get(*position) {
            let frame = kept.to_frame();
            *position += 1;
            self.replayed = *position;
            return Poll::Ready(Some(Ok(frame)));
        }
        if self.overflowed && !self.kept.is_empty() {
            self.kept = Vec::new();
        }
        if self.ended {
            return Poll::Ready(None);
        }
        if self.left {
            return Poll::Ready(Some(Err("its exchange has ended".into())));
        }
        if self.is_held() {
            self.wait(cx);
            return Poll::Pending;
        }
        let polled = self.incoming.poll_frame(cx);
        if polled.is_pending() {
            self.wait(cx);
            if self.stalled(cx) {
                self.fault = Some(Fault::Silent);
                return Poll::Ready(Some(Err(Fault::Silent.into())));
            }
        }
        match ready!(polled) {
            None => {
                self.end();
                Poll::Ready(None)
            }
            Some(Err(error)) => {
                self.fault = Fault::of(&error).or(Some(Fault::Broken));
                Poll::Ready(Some(Err(error)))
            }
            Some(Ok(frame)) => {
                self.take(&frame);
                if !self.overflowed {
                    *position += 1;
                    self.replayed = *position;
                }
                if self.incoming.is_end_stream() {
                    self.end();
                }
                Poll::Ready(Some(Ok(frame)))
            }
        }
    }

    /// Counts a frame that has come, and keeps it for further attempts.
    fn take(&mut self, frame: &Frame<Bytes>) {
        self.last_frame = Some(Instant::now());
        self.incoming.show(frame);
        if let Some(data) = frame.data_ref() {
            self.received += data.len() as u64;
            self.keep(data.len(), || Kept::Data(data.clone()));
        } else if let Some(trailers) = frame.trailers_ref() {
            self.keep(0, || Kept::Trailers(trailers.clone()));
        }
    }

    /// Whether everything has been read, and everything kept was sent by an attempt at `position`.
    fn is_sent(&self, position: usize) -> bool {
        self.ended && position >= self.kept.len()
    }

    /// Exact only before anything was read: sizes travel in `content-length`, which goes before them.
    fn size_hint(&self) -> SizeHint {
        if self.received == 0 {
            self.incoming.size_hint()
        } else {
            SizeHint::default()
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
    /// Messages to a service, as they come.
    Messages(tokio::sync::mpsc::Receiver<Bytes>),
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
        source.borrow_mut().replayed = 0;
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
            Self::Messages(messages) => messages
                .poll_recv(cx)
                .map(|message| message.map(|bytes| Ok(Frame::data(bytes)))),
            Self::Stream { source, position } => source.borrow_mut().poll_from(position, cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Empty => true,
            Self::Full(bytes) => bytes.is_none(),
            Self::Messages(_) => false,
            Self::Stream { source, position } => source.borrow().is_sent(*position),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Empty => SizeHint::with_exact(0),
            Self::Full(bytes) => SizeHint::with_exact(bytes.as_ref().map_or(0, |bytes| bytes.len() as u64)),
            Self::Messages(_) => SizeHint::default(),
            Self::Stream { source, .. } => source.borrow().size_hint(),
        }
    }
}

#[cfg(test)]
mod tests;
