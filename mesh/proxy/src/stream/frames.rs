//! What an HTTP/2 peer sends, counted before `h2` reads it.
//!
//! `h2` bounds what it holds, but not how many frames without use it reads: empty ones, `PRIORITY`, `WINDOW_UPDATE`, resets.
//! Nor does it know a time within which a header block must come to its end, since a stream begins for it only then. This
//! layer walks over the heads of frames (nine bytes each) in both directions and judges by Envoy's rules
//! (`Http2ProtocolOptions`). Payloads are passed over, not looked at. What it finds is a [`Verdict`]; from then on nothing
//! more is read, and whoever drives the connection ends it.
//!
//! It costs a few instructions a frame, and a timer only for a header block that comes in pieces.

#[cfg(test)]
mod tests;

use std::cell::Cell;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Sleep;

use crate::config::http2::FrameLimits;

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const PRIORITY: u8 = 2;
const RST_STREAM: u8 = 3;
const WINDOW_UPDATE: u8 = 8;
const CONTINUATION: u8 = 9;

const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;
const PADDED: u8 = 8;

/// What a client says before its first frame.
const PREFACE: u32 = 24;

/// What a client is told whose header block does not come to its end, as `h2` cannot: it knows no such stream. A head that
/// touches no table of HPACK (RFC 7541 section 6.2.2): `:status: 408`, `content-length: 22`, `content-type: text/plain`.
const LATE_HEAD: &[u8] = b"\x08\x03408\x0f\x0d\x0222\x0f\x10\x0atext/plain";
/// And the content.
pub const LATE_BODY: &[u8] = b"request header timeout";

/// Why a connection is to be ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Too many empty frames in a row (`http2.inbound_empty_frames_flood`).
    EmptyFrames,
    /// Too many `PRIORITY` frames (`http2.inbound_priority_frames_flood`).
    Priority,
    /// Too many `WINDOW_UPDATE` frames (`http2.inbound_window_update_frames_flood`).
    WindowUpdates,
    /// Too many resets in too short a time.
    Resets,
    /// A header block did not come to its end in time.
    LateHeaders,
}

impl Verdict {
    /// As Envoy calls it in response code details.
    pub fn details(self) -> &'static str {
        match self {
            Self::EmptyFrames => "http2.inbound_empty_frames_flood",
            Self::Priority => "http2.inbound_priority_frames_flood",
            Self::WindowUpdates => "http2.inbound_window_update_frames_flood",
            Self::Resets => "http2.too_many_resets",
            Self::LateHeaders => "request_header_timeout",
        }
    }
}

/// What the layer and whoever drives the connection tell each other.
#[derive(Debug, Default)]
pub struct Watched {
    verdict: Cell<Option<Verdict>>,
    heard: Cell<bool>,
    /// When something was read last, where somebody wants to know.
    last: Cell<Option<Instant>>,
}

impl Watched {
    /// One that knows when something was read last.
    pub fn timed() -> Self {
        let watched = Self::default();
        watched.last.set(Some(Instant::now()));
        watched
    }

    /// Why the connection is to be ended, if it is.
    pub fn verdict(&self) -> Option<Verdict> {
        self.verdict.get()
    }

    /// Whether something was read since this was last asked.
    pub fn take_heard(&self) -> bool {
        self.heard.take()
    }

    /// How long nothing has been read, where that is known.
    pub fn quiet(&self) -> Option<Duration> {
        self.last.get().map(|last| last.elapsed())
    }
}

/// The head of a frame.
#[derive(Clone, Copy, Debug)]
struct Head {
    kind: u8,
    flags: u8,
    length: u32,
    stream: u32,
    /// Bytes of the payload that are padding.
    padding: u32,
}

/// Walks over frames that come in pieces of any size.
#[derive(Debug, Default)]
struct Walk {
    /// Of the payload, or of what comes before the first frame.
    left: u32,
    /// The head, and the length of the padding where there is some.
    head: [u8; 10],
    filled: u8,
}

impl Walk {
    fn after(preface: u32) -> Self {
        Self {
            left: preface,
            ..Self::default()
        }
    }

    /// The next head in `bytes`, which then begin behind it; none where they end before.
    fn next(&mut self, bytes: &mut &[u8]) -> Option<Head> {
        let skipped = (self.left as usize).min(bytes.len());
        self.left -= skipped as u32;
        *bytes = &bytes[skipped..];
        if self.left > 0 {
            return None;
        }
        loop {
            let filled = usize::from(self.filled);
            // Bytes of the head come before those that say whether there is padding.
            let wanted = match (filled >= 9, self.is_padded()) {
                (true, true) => 10,
                _ => 9,
            };
            if filled == wanted {
                break;
            }
            let (first, rest) = bytes.split_first()?;
            self.head[filled] = *first;
            self.filled += 1;
            *bytes = rest;
        }
        let [a, b, c, kind, flags, s, t, u, v, _] = self.head;
        let length = u32::from_be_bytes([0, a, b, c]);
        let padded = self.filled == 10;
        self.filled = 0;
        self.left = length - u32::from(padded);
        Some(Head {
            kind,
            flags,
            length,
            stream: u32::from_be_bytes([s & 0x7f, t, u, v]),
            padding: if padded { u32::from(self.head[9]) + 1 } else { 0 },
        })
    }

    fn is_padded(&self) -> bool {
        let [a, b, c, kind, flags, ..] = self.head;
        matches!(kind, DATA | HEADERS) && flags & PADDED != 0 && (a, b, c) != (0, 0, 0)
    }

    /// Whether all of the frame whose head was found last has passed, and nothing of the next one.
    fn is_between(&self) -> bool {
        self.left == 0 && self.filled == 0
    }
}

/// Resets that may come, a bucket that fills again.
#[derive(Debug)]
struct Resets {
    burst: u64,
    rate: u64,
    tokens: f64,
    filled: Option<Instant>,
}

impl Resets {
    fn new((burst, rate): (u64, u64)) -> Self {
        Self {
            burst,
            rate,
            tokens: burst as f64,
            filled: None,
        }
    }

    /// One has come; whether that was one too many.
    fn take(&mut self, now: Instant) -> bool {
        if let Some(filled) = self.filled {
            let more = now.saturating_duration_since(filled).as_secs_f64() * self.rate as f64;
            self.tokens = (self.tokens + more).min(self.burst as f64);
        }
        self.filled = Some(now);
        if self.tokens < 1.0 {
            return true;
        }
        self.tokens -= 1.0;
        false
    }
}

/// Counts of what came and what went, and the rules.
#[derive(Debug)]
struct Counts {
    limits: FrameLimits,
    empty: u32,
    priority: u64,
    window_updates: u64,
    /// Heads that were sent.
    opened: u64,
    /// `DATA` frames that were sent.
    data: u64,
    resets: Option<Resets>,
    /// A header block has begun; whether its last frame has.
    block: Option<bool>,
    /// The stream of the last one.
    stream: u32,
}

impl Counts {
    fn new(limits: FrameLimits) -> Self {
        Self {
            limits,
            empty: 0,
            priority: 0,
            window_updates: 0,
            opened: 0,
            data: 0,
            resets: limits.resets.map(Resets::new),
            block: None,
            stream: 0,
        }
    }

    /// A frame has begun to come.
    fn inbound(&mut self, head: &Head, now: impl Fn() -> Instant) -> Option<Verdict> {
        let ends = head.kind != CONTINUATION && head.flags & END_STREAM != 0;
        match head.kind {
            DATA | HEADERS | CONTINUATION => {
                if head.kind != DATA {
                    self.block = Some(head.flags & END_HEADERS != 0);
                    self.stream = head.stream;
                }
                if head.length > head.padding || ends {
                    self.empty = 0;
                    return None;
                }
                self.empty += 1;
                (self.empty > self.limits.empty).then_some(Verdict::EmptyFrames)
            }
            PRIORITY => {
                self.priority += 1;
                let most = u64::from(self.limits.priority).saturating_mul(1 + self.opened);
                (self.priority > most).then_some(Verdict::Priority)
            }
            WINDOW_UPDATE => {
                self.window_updates += 1;
                let answered = u64::from(self.limits.window_updates).saturating_mul(self.data);
                let most = self
                    .opened
                    .saturating_add(answered)
                    .saturating_mul(2)
                    .saturating_add(5);
                (self.window_updates > most).then_some(Verdict::WindowUpdates)
            }
            RST_STREAM => {
                let resets = self.resets.as_mut()?;
                resets.take(now()).then_some(Verdict::Resets)
            }
            _ => None,
        }
    }

    fn outbound(&mut self, head: &Head) {
        match head.kind {
            DATA => self.data += 1,
            HEADERS => self.opened += 1,
            _ => {}
        }
    }
}

/// See the module.
#[derive(Debug)]
pub struct Frames<S> {
    below: S,
    watched: Rc<Watched>,
    inbound: Walk,
    outbound: Walk,
    counts: Counts,
    /// How long a header block may take from its first frame on.
    block_limit: Option<Duration>,
    block_deadline: Option<Pin<Box<Sleep>>>,
    /// What is to be written beside what is written above, between two frames.
    own: Vec<u8>,
}

impl<S> Frames<S> {
    /// Above the bytes of a client.
    pub fn of_client(below: S, limits: FrameLimits, blocks: Option<Duration>, watched: Rc<Watched>) -> Self {
        Self {
            inbound: Walk::after(PREFACE),
            outbound: Walk::default(),
            ..Self::new(below, limits, blocks, watched)
        }
    }

    /// Above the bytes of a server.
    pub fn of_server(below: S, limits: FrameLimits, watched: Rc<Watched>) -> Self {
        Self {
            inbound: Walk::default(),
            outbound: Walk::after(PREFACE),
            ..Self::new(below, limits, None, watched)
        }
    }

    fn new(below: S, limits: FrameLimits, block_limit: Option<Duration>, watched: Rc<Watched>) -> Self {
        Self {
            below,
            watched,
            inbound: Walk::default(),
            outbound: Walk::default(),
            counts: Counts::new(limits),
            block_limit,
            block_deadline: None,
            own: Vec::new(),
        }
    }

    fn received(&mut self, mut bytes: &[u8]) -> Option<Verdict> {
        self.watched.heard.set(true);
        if self.watched.last.get().is_some() {
            self.watched.last.set(Some(Instant::now()));
        }
        while let Some(head) = self.inbound.next(&mut bytes) {
            // Whatever came before it has passed.
            if self.counts.block == Some(true) {
                self.counts.block = None;
                self.block_deadline = None;
            }
            if let Some(verdict) = self.counts.inbound(&head, Instant::now) {
                return Some(verdict);
            }
        }
        if self.inbound.left == 0 && self.counts.block == Some(true) {
            self.counts.block = None;
        }
        if self.counts.block.is_none() {
            self.block_deadline = None;
        }
        None
    }

    fn sent(&mut self, mut bytes: &[u8]) {
        while let Some(head) = self.outbound.next(&mut bytes) {
            self.counts.outbound(&head);
        }
    }

    /// Whether a header block that has begun is out of time.
    fn is_block_late(&mut self, cx: &mut Context<'_>) -> bool {
        let (Some(limit), Some(_)) = (self.block_limit, self.counts.block) else {
            return false;
        };
        let deadline = self
            .block_deadline
            .get_or_insert_with(|| Box::pin(tokio::time::sleep(limit)));
        deadline.as_mut().poll(cx).is_ready()
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Frames<S> {
    #[inline]
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.watched.verdict.get().is_some() {
            return Poll::Pending;
        }
        let before = buf.filled().len();
        let outcome = Pin::new(&mut this.below).poll_read(cx, buf);
        let verdict = match &outcome {
            Poll::Ready(Ok(())) => this.received(&buf.filled()[before..]),
            Poll::Ready(Err(_)) => None,
            Poll::Pending => this.is_block_late(cx).then_some(Verdict::LateHeaders),
        };
        if verdict.is_none() {
            return outcome;
        }
        this.watched.verdict.set(verdict);
        if verdict == Some(Verdict::LateHeaders) {
            this.own = late_answer(this.counts.stream);
        }
        // Whoever drives the connection looks at the verdict whenever nothing more is to be read.
        buf.set_filled(before);
        Poll::Pending
    }
}

/// 408 on that stream, which ends with it.
fn late_answer(stream: u32) -> Vec<u8> {
    let frame = |kind: u8, flags: u8, payload: &[u8]| {
        // Payloads of a few bytes.
        let mut out = vec![0, 0, payload.len() as u8, kind, flags];
        out.extend(stream.to_be_bytes());
        out.extend(payload);
        out
    };
    [
        frame(HEADERS, END_HEADERS, LATE_HEAD),
        frame(DATA, END_STREAM, LATE_BODY),
        frame(RST_STREAM, 0, &[0; 4]),
    ]
    .concat()
}

impl<S: AsyncWrite + Unpin> Frames<S> {
    /// Writes what is this layer's own, where it may stand.
    fn poll_own(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.own.is_empty() && self.outbound.is_between() {
            let written = Pin::new(&mut self.below).poll_write(cx, &self.own);
            let count = std::task::ready!(written)?;
            if count == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.own.drain(..count);
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Frames<S> {
    #[inline]
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        if !this.own.is_empty() {
            std::task::ready!(this.poll_own(cx))?;
        }
        let outcome = Pin::new(&mut this.below).poll_write(cx, buf);
        if let Poll::Ready(Ok(count)) = &outcome {
            this.sent(&buf[..*count]);
        }
        outcome
    }

    #[inline]
    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        pieces: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        if !this.own.is_empty() {
            std::task::ready!(this.poll_own(cx))?;
        }
        let outcome = Pin::new(&mut this.below).poll_write_vectored(cx, pieces);
        if let Poll::Ready(Ok(count)) = &outcome {
            let mut left = *count;
            for piece in pieces {
                let part = piece.len().min(left);
                this.sent(&piece[..part]);
                left -= part;
            }
        }
        outcome
    }

    #[inline]
    fn is_write_vectored(&self) -> bool {
        self.below.is_write_vectored()
    }

    #[inline]
    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().below).poll_flush(cx)
    }

    #[inline]
    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().below).poll_shutdown(cx)
    }
}
