//! Message bodies on their way through the proxy: counted, bounded in time, and kept for retries where asked.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker, ready};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::HeaderMap;
use http_body::{Body, Frame, SizeHint};
use tokio::time::Sleep;

use super::incoming::Incoming;
use super::tap::Capture;
use crate::policy::grpc_stats::Messages;

mod response;

pub use response::{Encoded, Observer, ResponseBody};

/// The error of a body: what went wrong, for hyper to break the message off.
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
            if let Some(error) = error.downcast_ref::<std::io::Error>() {
                use std::io::ErrorKind::{InvalidData, InvalidInput};
                // The latter are hyper's and our own readers'.
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

/// The body of a request on its way in. What filters read of it before it is sent on is kept here.
#[derive(Debug)]
pub struct Inbound {
    incoming: Incoming,
    ahead: VecDeque<Frame<Bytes>>,
    ahead_bytes: usize,
    ended: bool,
    /// gRPC messages, where somebody counts them.
    messages: Option<Box<Messages>>,
    /// What somebody sees of it.
    captured: Option<Box<Capture>>,
}

/// How far a body was read ahead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ahead {
    /// To its end.
    Whole,
    /// Up to the limit, and there is more.
    Part,
}

impl Inbound {
    /// Nothing has been read yet.
    pub fn new(incoming: Incoming) -> Self {
        Self {
            incoming,
            ahead: VecDeque::new(),
            ahead_bytes: 0,
            ended: false,
            messages: None,
            captured: None,
        }
    }

    /// Reads until the end, or until more than `limit` bytes are held. A client that sends nothing for `idle` has failed.
    pub async fn read_ahead(&mut self, limit: usize, idle: Option<Duration>) -> Result<Ahead, BodyError> {
        while self.ahead_bytes <= limit {
            if self.ended || self.incoming.is_end_stream() {
                self.ended = true;
                return Ok(Ahead::Whole);
            }
            let frame = http_body_util::BodyExt::frame(&mut self.incoming);
            let frame = match idle {
                None => frame.await,
                Some(idle) => tokio::time::timeout(idle, frame)
                    .await
                    .map_err(|_| BodyError::from(Fault::Silent))?,
            };
            match frame {
                None => self.ended = true,
                Some(Err(error)) => return Err(error),
                Some(Ok(frame)) => {
                    self.ahead_bytes += frame.data_ref().map_or(0, Bytes::len);
                    self.ahead.push_back(frame);
                }
            }
        }
        Ok(Ahead::Part)
    }

    /// The first bytes of what was read ahead, `limit` at most.
    pub fn first_bytes(&self, limit: usize) -> Bytes {
        let mut out = bytes::BytesMut::with_capacity(self.ahead_bytes.min(limit));
        for data in self.ahead.iter().filter_map(Frame::data_ref) {
            let room = limit - out.len();
            out.extend_from_slice(&data[..data.len().min(room)]);
        }
        out.freeze()
    }

    /// Whether the client has sent all of it, as far as it was looked at.
    pub fn is_whole(&self) -> bool {
        self.ended || self.incoming.is_end_stream()
    }

    /// Whether nobody has asked for any of it.
    fn untouched(&self) -> bool {
        self.ahead.is_empty() && !self.ended
    }

    /// Counts the gRPC messages that go on.
    pub fn count_messages(&mut self) {
        self.messages.get_or_insert_default();
    }

    /// Bytes that were read ahead.
    pub fn held(&self) -> usize {
        self.ahead_bytes
    }

    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match self.ahead.pop_front() {
            Some(frame) => Poll::Ready(Some(Ok(frame))),
            None if self.ended => Poll::Ready(None),
            None => Pin::new(&mut self.incoming).poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.ahead.is_empty() && (self.ended || self.incoming.is_end_stream())
    }

    fn size_hint(&self) -> SizeHint {
        if self.ahead.is_empty() {
            return self.incoming.size_hint();
        }
        let held = self.ahead_bytes as u64;
        match self.incoming.size_hint().exact() {
            _ if self.ended => SizeHint::with_exact(held),
            Some(rest) => SizeHint::with_exact(held + rest),
            None => SizeHint::default(),
        }
    }
}

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

#[derive(Clone, Debug)]
enum Kept {
    Data(Bytes),
    Trailers(HeaderMap),
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
            self.incoming.incoming = Incoming::Empty;
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
        self.incoming.captured = Some(capture);
    }

    /// What somebody has seen.
    pub fn captured(&self) -> Option<&Capture> {
        self.incoming.captured.as_deref()
    }

    /// gRPC messages so far, where somebody counts them.
    pub fn messages(&self) -> u64 {
        self.incoming
            .messages
            .as_ref()
            .map_or(0, |messages| messages.count)
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
            Self::Stream { source, position } => {
                let mut source = source.borrow_mut();
                if let Some(kept) = source.kept.get(*position) {
                    let frame = match kept.clone() {
                        Kept::Data(bytes) => Frame::data(bytes),
                        Kept::Trailers(trailers) => Frame::trailers(trailers),
                    };
                    *position += 1;
                    source.replayed = *position;
                    return Poll::Ready(Some(Ok(frame)));
                }
                if source.overflowed && !source.kept.is_empty() {
                    source.kept = Vec::new();
                }
                if source.ended {
                    return Poll::Ready(None);
                }
                if source.left {
                    return Poll::Ready(Some(Err("its exchange has ended".into())));
                }
                if source.is_held() {
                    source.wait(cx);
                    return Poll::Pending;
                }
                let polled = source.incoming.poll_frame(cx);
                if polled.is_pending() {
                    source.wait(cx);
                    if source.stalled(cx) {
                        source.fault = Some(Fault::Silent);
                        return Poll::Ready(Some(Err(Fault::Silent.into())));
                    }
                }
                match ready!(polled) {
                    None => {
                        source.end();
                        Poll::Ready(None)
                    }
                    Some(Err(error)) => {
                        source.fault = Fault::of(&error).or(Some(Fault::Broken));
                        Poll::Ready(Some(Err(error)))
                    }
                    Some(Ok(frame)) => {
                        source.last_frame = Some(Instant::now());
                        if let Some(data) = frame.data_ref() {
                            let bytes = data.len();
                            source.received += bytes as u64;
                            if let Some(messages) = &mut source.incoming.messages {
                                messages.feed(data);
                            }
                            if let Some(captured) = &mut source.incoming.captured {
                                captured.data(data);
                            }
                            let data = data.clone();
                            source.keep(Kept::Data(data), bytes);
                        } else if let Some(trailers) = frame.trailers_ref() {
                            let trailers = trailers.clone();
                            if let Some(captured) = &mut source.incoming.captured {
                                captured.trailers(&trailers);
                            }
                            source.keep(Kept::Trailers(trailers), 0);
                        }
                        if !source.overflowed {
                            *position += 1;
                            source.replayed = *position;
                        }
                        if source.incoming.is_end_stream() {
                            source.end();
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
            Self::Messages(_) => false,
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
            Self::Messages(_) => SizeHint::default(),
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

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use http_body_util::BodyExt;
    use hyper_util::rt::TokioIo;
    use tokio::io::AsyncWriteExt;

    use super::*;

    /// A request's body, as only hyper can make it.
    async fn incoming() -> Incoming {
        let (mut client, server) = tokio::io::duplex(1024);
        let (sender, mut received) = tokio::sync::mpsc::channel(1);
        let service = hyper::service::service_fn(move |request: http::Request<hyper::body::Incoming>| {
            let sender = sender.clone();
            async move {
                sender.send(request.into_body()).await.unwrap();
                std::future::pending::<Result<http::Response<String>, Infallible>>().await
            }
        });
        let connection = hyper::server::conn::http1::Builder::new();
        tokio::spawn(async move { connection.serve_connection(TokioIo::new(server), service).await });
        client
            .write_all(b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\n\r\n")
            .await
            .unwrap();
        Incoming::Http1(received.recv().await.unwrap())
    }

    async fn next(body: &mut UpstreamBody) -> Option<Bytes> {
        let frame = body.frame().await?.unwrap();
        Some(frame.into_data().unwrap())
    }

    #[tokio::test]
    async fn an_answer_that_comes_before_a_repeated_body_was_sent_cuts_nothing_out_of_it() {
        let mut inbound = Inbound::new(incoming().await);
        inbound.ahead = ["a", "b", "c", "d"]
            .map(|text| Frame::data(Bytes::from(text)))
            .into();
        inbound.ended = true;
        let source = RequestSource::new(inbound, 100, None);
        let mut first = UpstreamBody::stream(&source);
        for expected in ["a", "b", "c"] {
            assert_eq!(next(&mut first).await.unwrap(), expected);
        }
        drop(first);
        let mut second = UpstreamBody::stream(&source);
        assert_eq!(next(&mut second).await.unwrap(), "a");
        source.borrow_mut().stop_keeping();
        for expected in ["b", "c", "d"] {
            assert_eq!(next(&mut second).await.unwrap(), expected);
        }
        assert_eq!(next(&mut second).await, None);
        assert!(source.borrow().kept.is_empty(), "and nothing is held any longer");
    }
}
