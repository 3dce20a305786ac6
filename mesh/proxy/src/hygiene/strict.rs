//! The scanner as a layer of IO between the socket and hyper.
//!
//! A head that breaks the rules never reaches hyper: in its place hyper reads a request that the service recognises by
//! the connection's [`Gate`] and answers with the violation's status and `connection: close`. So refusals are answered
//! in order, logged and counted like every other request. So is a head that is not whole in time.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use futures::task::AtomicWaker;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Sleep;

use super::interim::Interims;
use super::scan::{HeadLimits, Scanner, Violation};
use crate::bell::Ear;
use crate::policy::stats::Bytes;
use crate::stream::linger::Linger;

/// What stands in for a refused head.
const SUBSTITUTE: &[u8] = b"GET / HTTP/1.1\r\nhost: refused\r\n\r\n";
/// Bytes after a violation that are read and thrown away, so that the answer is not lost to a connection reset.
const MAX_DISCARDED: usize = 256 * 1024;

/// What the IO layer and the service tell each other.
#[derive(Debug, Default)]
pub struct Gate {
    violation: AtomicU8,
    /// Which request of the connection the violation is in, counted from 1: good ones before it may still be waiting.
    violation_at: AtomicU32,
    upgrade: AtomicU8,
    waker: AtomicWaker,
    /// The reader waits for the first byte of a head and holds nothing.
    between: AtomicBool,
    /// The socket did not take everything that hyper wrote.
    unflushed: AtomicBool,
    /// Interim answers, which hyper does not write.
    pub interims: Interims,
    /// The client has said that it is over, or its connection broke.
    ended: AtomicBool,
    /// Where bytes are counted.
    bytes: Option<Bytes>,
}

impl Gate {
    /// One whose connection's bytes are counted there.
    pub fn counting(bytes: Option<Bytes>) -> Self {
        Self {
            bytes,
            ..Self::default()
        }
    }

    /// Whether the client has said that it is over, or its connection broke.
    pub fn ended_by_client(&self) -> bool {
        self.ended.load(Ordering::Relaxed)
    }

    /// Notes the outcome of a read from the socket, which had `before` bytes in its buffer.
    fn read(&self, outcome: &Poll<io::Result<()>>, buf: &ReadBuf<'_>, before: usize) {
        match outcome {
            Poll::Pending => {}
            Poll::Ready(Ok(())) if buf.filled().len() > before => {
                if let Some(bytes) = &self.bytes {
                    bytes.received(buf.filled().len() - before);
                }
            }
            Poll::Ready(Ok(())) if buf.remaining() == 0 => {}
            Poll::Ready(_) => self.ended.store(true, Ordering::Relaxed),
        }
    }

    /// The violation of the request that is the connection's `number`th, if that is the substitute.
    pub fn violation(&self, number: u32) -> Option<Violation> {
        let violation = Violation::from_code(self.violation.load(Ordering::Acquire))?;
        (self.violation_at.load(Ordering::Relaxed) == number).then_some(violation)
    }

    fn refuse(&self, violation: Violation, number: u32) {
        self.violation_at.store(number, Ordering::Relaxed);
        self.violation.store(violation as u8, Ordering::Release);
    }

    /// Whether nothing of the connection is under way below the service: no part of a request read, no part of a
    /// response waiting to be written.
    pub fn at_rest(&self) -> bool {
        self.between.load(Ordering::Relaxed) && !self.unflushed.load(Ordering::Relaxed)
    }

    /// Says whether a request to upgrade was granted.
    pub fn decide_upgrade(&self, granted: bool) {
        self.upgrade.store(if granted { 1 } else { 2 }, Ordering::Release);
        self.waker.wake();
    }
}

/// IO with the scanner on its read side. Bytes that were read before (protocol detection) come first.
#[derive(Debug)]
pub struct StrictIo<S> {
    inner: S,
    /// Through which `inner` is read, always: hyper and h2 ask for bytes whenever they are woken, for whatever it was.
    ear: Ear,
    /// `None` for protocols that frame themselves (HTTP/2).
    scanner: Option<Scanner>,
    gate: Arc<Gate>,
    /// Read but not yet scanned to an end (a partial head).
    held: Vec<u8>,
    /// Scanned, waiting for room.
    ready: Vec<u8>,
    ready_at: usize,
    refused: bool,
    /// The violation is in a body whose head has been passed on: all that is left is to break the request off.
    broken: Option<&'static str>,
    discarded: usize,
    /// hyper has flushed since it wrote last: the stream is between two messages, or within a body.
    flushed: bool,
    /// The rest of interim answers that the socket did not take at once.
    interim: Vec<u8>,
    /// For the end of a connection in the middle of a request.
    linger: Linger,
    /// How long a head may take from its first byte on.
    head_limit: Option<Duration>,
    /// When the head of which a part is held must be whole.
    head_deadline: Option<Pin<Box<Sleep>>>,
}

impl<S> StrictIo<S> {
    /// Wraps `inner`, from which `prefix` has been read already.
    pub fn new(inner: S, prefix: Vec<u8>, limits: Option<HeadLimits>, gate: Arc<Gate>) -> Self {
        Self::with(inner, prefix, limits.map(Scanner::new), gate)
    }

    /// The same with a scanner of the caller's; none for bytes that are not HTTP/1.
    pub fn with(inner: S, prefix: Vec<u8>, scanner: Option<Scanner>, gate: Arc<Gate>) -> Self {
        let mut io = Self {
            inner,
            ear: Ear::default(),
            scanner,
            gate,
            held: Vec::new(),
            ready: Vec::new(),
            ready_at: 0,
            refused: false,
            broken: None,
            discarded: 0,
            flushed: true,
            interim: Vec::new(),
            linger: Linger::default(),
            head_limit: None,
            head_deadline: None,
        };
        if let Some(bytes) = &io.gate.bytes {
            bytes.received(prefix.len());
        }
        if io.scanner.is_none() {
            io.ready = prefix;
        } else {
            io.held = prefix;
            io.scan_held();
        }
        io
    }

    /// Heads must be whole this long after their first byte: another one is refused. What was read before now has just come.
    pub fn limit_heads(&mut self, limit: Option<Duration>) {
        self.head_limit = limit;
    }

    /// Scans what is held and moves what is fine to `ready`.
    fn scan_held(&mut self) {
        let Some(scanner) = &mut self.scanner else { return };
        match scanner.advance(&self.held) {
            Ok(fine) => {
                if scanner.undecided() {
                    self.gate.upgrade.store(0, Ordering::Release);
                }
                if fine == self.held.len() {
                    self.ready = std::mem::take(&mut self.held);
                } else {
                    self.ready.extend(self.held.drain(..fine));
                }
            }
            Err((fine, violation)) => {
                self.ready.extend_from_slice(&self.held[..fine]);
                self.held = Vec::new();
                self.refuse(violation);
            }
        }
    }

    fn refuse(&mut self, violation: Violation) {
        let Some(scanner) = &self.scanner else { return };
        self.refused = true;
        if scanner.in_head() {
            self.gate.refuse(violation, scanner.heads().wrapping_add(1));
            self.ready.extend_from_slice(SUBSTITUTE);
        } else {
            self.broken = Some(violation.details());
        }
    }

    fn take_ready(&mut self, buf: &mut ReadBuf<'_>) -> bool {
        if self.ready_at == self.ready.len() {
            return false;
        }
        let count = buf.remaining().min(self.ready.len() - self.ready_at);
        buf.put_slice(&self.ready[self.ready_at..self.ready_at + count]);
        self.ready_at += count;
        if self.ready_at == self.ready.len() {
            // Given back, so that an idle connection holds no buffer of ours.
            self.ready = Vec::new();
            self.ready_at = 0;
        }
        true
    }
}

impl<S> StrictIo<S> {
    /// Takes back what was read but not used.
    pub fn unread(&mut self, bytes: &[u8]) {
        if !bytes.is_empty() {
            self.ready.splice(..self.ready_at, bytes.iter().copied());
            self.ready_at = 0;
        }
    }

    /// Notes the outcome of a write of bytes.
    fn sent(&self, outcome: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        match &outcome {
            Poll::Ready(Ok(count)) => {
                if let Some(bytes) = &self.gate.bytes {
                    bytes.sent(*count);
                }
            }
            Poll::Ready(Err(_)) => self.gate.ended.store(true, Ordering::Relaxed),
            Poll::Pending => {}
        }
        self.wrote(outcome)
    }

    /// Notes the outcome of a write.
    fn wrote<T>(&self, outcome: Poll<T>) -> Poll<T> {
        let blocked = outcome.is_pending();
        if self.gate.unflushed.load(Ordering::Relaxed) != blocked {
            self.gate.unflushed.store(blocked, Ordering::Relaxed);
        }
        outcome
    }

    /// Whether the client is in the middle of something that nobody will read.
    fn is_owed(&self) -> bool {
        self.scanner.as_ref().is_some_and(|scanner| !scanner.opaque()) && !self.between_requests()
    }

    fn between_requests(&self) -> bool {
        self.held.is_empty()
            && self.ready.is_empty()
            && !self.refused
            && self.broken.is_none()
            && self.scanner.as_ref().is_some_and(Scanner::in_head)
    }
}

impl<S: AsyncRead + Unpin> StrictIo<S> {
    fn poll_inner(&mut self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let Self { inner, ear, gate, .. } = self;
        let before = buf.filled().len();
        let outcome = ear.poll(cx, |cx| Pin::new(inner).poll_read(cx, buf));
        gate.read(&outcome, buf, before);
        outcome
    }

    /// Waits until something arrives, a whole head or not; false at the end of the stream. Only while nothing else reads.
    pub fn poll_arrival(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<bool>> {
        if !self.ready.is_empty() {
            return Poll::Ready(Ok(true));
        }
        // On the stack: a connection that waits holds no buffer.
        let mut scratch = [0u8; 2048];
        let mut buf = ReadBuf::new(&mut scratch);
        std::task::ready!(self.poll_inner(cx, &mut buf))?;
        if buf.filled().is_empty() {
            return Poll::Ready(Ok(false));
        }
        self.held.extend_from_slice(buf.filled());
        self.scan_held();
        Poll::Ready(Ok(true))
    }

    /// Whether the head that has begun is out of time. Nothing but a head that arrives in several pieces costs a timer.
    fn is_head_late(&mut self, cx: &mut Context<'_>) -> bool {
        let Some(limit) = self.head_limit else {
            return false;
        };
        if self.held.is_empty() || !self.scanner.as_ref().is_some_and(Scanner::in_head) {
            self.head_deadline = None;
            return false;
        }
        let deadline = self
            .head_deadline
            .get_or_insert_with(|| Box::pin(tokio::time::sleep(limit)));
        if deadline.as_mut().poll(cx).is_pending() {
            return false;
        }
        self.head_deadline = None;
        self.held = Vec::new();
        self.refuse(Violation::Unfinished);
        true
    }

    fn poll_discard(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut scratch = [0u8; 4096];
        while self.discarded < MAX_DISCARDED {
            let mut buf = ReadBuf::new(&mut scratch);
            match self.poll_inner(cx, &mut buf) {
                Poll::Ready(Ok(())) if !buf.filled().is_empty() => self.discarded += buf.filled().len(),
                // Even when the client has closed its side, the answer is still to be written; hyper closes after it.
                Poll::Ready(_) | Poll::Pending => break,
            }
        }
        Poll::Pending
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for StrictIo<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        loop {
            if this.take_ready(buf) {
                return Poll::Ready(Ok(()));
            }
            if let Some(details) = this.broken {
                return Poll::Ready(Err(io::Error::new(io::ErrorKind::InvalidData, details)));
            }
            if this.refused {
                return this.poll_discard(cx);
            }
            let Some(scanner) = &mut this.scanner else {
                return this.poll_inner(cx, buf);
            };
            if scanner.undecided() {
                this.gate.waker.register(cx.waker());
                match this.gate.upgrade.swap(0, Ordering::AcqRel) {
                    0 => return Poll::Pending,
                    decision => scanner.decide(decision == 1),
                }
                this.scan_held();
                continue;
            }
            if scanner.opaque() && this.held.is_empty() {
                this.scanner = None;
                continue;
            }
            let before = buf.filled().len();
            match this.poll_inner(cx, buf) {
                Poll::Ready(Ok(())) => {}
                Poll::Pending if this.is_head_late(cx) => continue,
                other => {
                    this.gate
                        .between
                        .store(this.between_requests(), Ordering::Relaxed);
                    return other;
                }
            }
            let read = &buf.filled()[before..];
            if read.is_empty() {
                return Poll::Ready(Ok(()));
            }
            // The usual case: nothing held, everything read is whole and fine, nothing is copied.
            if this.held.is_empty()
                && let Some(scanner) = &mut this.scanner
            {
                match scanner.advance(read) {
                    Ok(fine) => {
                        if scanner.undecided() {
                            this.gate.upgrade.store(0, Ordering::Release);
                        }
                        this.held.extend_from_slice(&read[fine..]);
                        buf.set_filled(before + fine);
                        if fine > 0 {
                            this.head_deadline = None;
                            return Poll::Ready(Ok(()));
                        }
                        continue;
                    }
                    Err((fine, violation)) => {
                        buf.set_filled(before + fine);
                        this.refuse(violation);
                        if fine > 0 {
                            return Poll::Ready(Ok(()));
                        }
                        continue;
                    }
                }
            }
            this.held.extend_from_slice(read);
            buf.set_filled(before);
            this.scan_held();
            if !this.ready.is_empty() {
                this.head_deadline = None;
            }
        }
    }
}

impl<S: AsyncWrite + Unpin> StrictIo<S> {
    /// Writes interim answers, if there are any. `between` says that everything before them has been written.
    fn poll_interims(&mut self, cx: &mut Context<'_>, between: bool) -> Poll<io::Result<()>> {
        if self.interim.is_empty() {
            if !self.gate.interims.waiting() {
                return Poll::Ready(Ok(()));
            }
            self.interim = self.gate.interims.take(between);
        }
        while !self.interim.is_empty() {
            let outcome = Pin::new(&mut self.inner).poll_write(cx, &self.interim);
            let count = std::task::ready!(self.sent(outcome))?;
            if count == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.interim.drain(..count);
        }
        self.interim = Vec::new();
        Poll::Ready(Ok(()))
    }

    /// What comes before bytes of hyper's.
    fn poll_before_write(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let between = std::mem::replace(&mut self.flushed, false);
        let outcome = self.poll_interims(cx, between);
        if outcome.is_pending() {
            self.flushed = between;
        }
        outcome
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for StrictIo<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        std::task::ready!(this.poll_before_write(cx))?;
        let outcome = Pin::new(&mut this.inner).poll_write(cx, buf);
        this.sent(outcome)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        std::task::ready!(this.poll_before_write(cx))?;
        let outcome = Pin::new(&mut this.inner).poll_write_vectored(cx, bufs);
        this.sent(outcome)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        // hyper flushes when it has written everything that it holds.
        std::task::ready!(this.poll_interims(cx, true))?;
        let outcome = Pin::new(&mut this.inner).poll_flush(cx);
        this.flushed = outcome.is_ready();
        this.wrote(outcome)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if !this.linger.has_begun() {
            std::task::ready!(Pin::new(&mut this.inner).poll_shutdown(cx))?;
            if !this.is_owed() {
                return Poll::Ready(Ok(()));
            }
        }
        let Self {
            inner, ear, linger, ..
        } = this;
        linger.poll(cx, |cx, buf| {
            ear.poll(cx, |cx| Pin::new(&mut *inner).poll_read(cx, buf))
        })
    }
}
