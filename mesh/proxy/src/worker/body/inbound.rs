//! The body of a request on its way in.

use std::collections::VecDeque;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http_body::{Body as _, Frame, SizeHint};

use super::{BodyError, Fault};
use crate::policy::grpc_stats::Messages;
use crate::policy::header_mutation::TrailerChanges;
use crate::worker::incoming::Incoming;
use crate::worker::tap::Capture;

/// What filters read of it before it is sent on is kept here.
#[derive(Debug)]
pub struct Inbound {
    incoming: Incoming,
    pub(super) ahead: VecDeque<Frame<Bytes>>,
    ahead_bytes: usize,
    pub(super) ended: bool,
    /// gRPC messages, where somebody counts them.
    messages: Option<Box<Messages>>,
    /// What is done to the trailers.
    changes: Vec<TrailerChanges>,
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
            changes: Vec::new(),
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
    pub(super) fn untouched(&self) -> bool {
        self.ahead.is_empty() && !self.ended
    }

    /// Counts the gRPC messages that go on.
    pub fn count_messages(&mut self) {
        self.messages.get_or_insert_default();
    }

    /// Changes the trailers when they come.
    pub fn change_trailers(&mut self, changes: Vec<TrailerChanges>) {
        self.changes.extend(changes);
    }

    /// How many gRPC messages went on, where somebody counts them.
    pub(super) fn message_count(&self) -> u64 {
        self.messages.as_ref().map_or(0, |messages| messages.count)
    }

    /// What comes is seen by somebody.
    pub(super) fn capture(&mut self, capture: Box<Capture>) {
        self.captured = Some(capture);
    }

    /// What somebody has seen.
    pub(super) fn captured(&self) -> Option<&Capture> {
        self.captured.as_deref()
    }

    /// Shows a frame that goes on to who counts and sees.
    pub(super) fn show(&mut self, frame: &Frame<Bytes>) {
        if let Some(data) = frame.data_ref() {
            if let Some(messages) = &mut self.messages {
                messages.feed(data);
            }
            if let Some(captured) = &mut self.captured {
                captured.data(data);
            }
        } else if let Some(trailers) = frame.trailers_ref()
            && let Some(captured) = &mut self.captured
        {
            captured.trailers(trailers);
        }
    }

    /// What the client has not sent by now is not read any more.
    pub(super) fn forget(&mut self) {
        self.incoming = Incoming::Empty;
    }

    /// Bytes that were read ahead.
    pub fn held(&self) -> usize {
        self.ahead_bytes
    }

    pub(super) fn poll_frame(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let mut polled = match self.ahead.pop_front() {
            Some(frame) => Poll::Ready(Some(Ok(frame))),
            None if self.ended => Poll::Ready(None),
            None => Pin::new(&mut self.incoming).poll_frame(cx),
        };
        if !self.changes.is_empty()
            && let Poll::Ready(Some(Ok(frame))) = &mut polled
            && let Some(trailers) = frame.trailers_mut()
        {
            for change in &self.changes {
                change.apply(trailers);
            }
        }
        polled
    }

    pub(super) fn is_end_stream(&self) -> bool {
        self.ahead.is_empty() && (self.ended || self.incoming.is_end_stream())
    }

    pub(super) fn size_hint(&self) -> SizeHint {
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
