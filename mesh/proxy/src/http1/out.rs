//! Bytes to be written to a connection: what is short is copied together, so that a message is one write; what is long goes as it
//! is.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf as _, Bytes};
use tokio::io::AsyncWrite;

/// Pieces of bodies up to this are copied behind what waits.
const SHORT: usize = 4 * 1024;
/// Bytes that may wait before no more are asked for.
const MOST: usize = 32 * 1024;

/// See the module.
#[derive(Debug, Default)]
pub struct Out {
    flat: Vec<u8>,
    /// How much of `flat` has been written.
    at: usize,
    /// Behind `flat`.
    large: Bytes,
    /// Behind `large`.
    tail: &'static [u8],
}

impl Out {
    /// Whether everything has been written.
    pub fn is_empty(&self) -> bool {
        self.at == self.flat.len() && self.large.is_empty() && self.tail.is_empty()
    }

    /// Whether more should be added before it is written.
    pub fn has_room(&self) -> bool {
        self.large.is_empty() && self.tail.is_empty() && self.flat.len() - self.at < MOST
    }

    /// What is copied together. There must be [room](Self::has_room).
    pub fn flat(&mut self) -> &mut Vec<u8> {
        debug_assert!(self.large.is_empty() && self.tail.is_empty());
        &mut self.flat
    }

    /// Adds a piece of a body, and what comes behind it. There must be [room](Self::has_room).
    pub(super) fn piece(&mut self, data: Bytes, behind: &'static [u8]) {
        debug_assert!(self.large.is_empty() && self.tail.is_empty());
        if data.len() <= SHORT {
            self.flat.extend_from_slice(&data);
            self.flat.extend_from_slice(behind);
        } else {
            (self.large, self.tail) = (data, behind);
        }
    }

    fn wrote(&mut self, count: usize) {
        let flat = count.min(self.flat.len() - self.at);
        self.at += flat;
        let large = (count - flat).min(self.large.len());
        self.large.advance(large);
        self.tail = &self.tail[count - flat - large..];
        if self.is_empty() {
            // Given back, so that a connection that waits holds none.
            *self = Self::default();
        }
    }

    /// Writes what waits; how much was written this time is told to `sent`.
    pub fn poll_write<S: AsyncWrite + Unpin>(
        &mut self,
        to: &mut S,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<()>> {
        while !self.is_empty() {
            let flat = &self.flat[self.at..];
            let count = if self.large.is_empty() && self.tail.is_empty() {
                ready!(Pin::new(&mut *to).poll_write(cx, flat))?
            } else {
                let pieces = [flat, &self.large, self.tail].map(IoSlice::new);
                let from = usize::from(flat.is_empty());
                ready!(Pin::new(&mut *to).poll_write_vectored(cx, &pieces[from..]))?
            };
            if count == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.wrote(count);
        }
        Poll::Ready(Ok(()))
    }

    /// Writes what waits, and lets nothing wait below.
    pub fn poll_flush<S: AsyncWrite + Unpin>(
        &mut self,
        to: &mut S,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<()>> {
        ready!(self.poll_write(to, cx))?;
        Pin::new(to).poll_flush(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Takes so many bytes at a time.
    struct Sink(Vec<u8>, usize);

    impl AsyncWrite for Sink {
        fn poll_write(mut self: Pin<&mut Self>, _: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
            let count = buf.len().min(self.1);
            self.0.extend_from_slice(&buf[..count]);
            Poll::Ready(Ok(count))
        }

        fn poll_write_vectored(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
            bufs: &[IoSlice<'_>],
        ) -> Poll<io::Result<usize>> {
            let all: Vec<u8> = bufs.iter().flat_map(|buf| buf.iter().copied()).collect();
            let count = all.len().min(self.1);
            self.0.extend_from_slice(&all[..count]);
            Poll::Ready(Ok(count))
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    #[test]
    fn what_waits_is_written_in_order_however_little_is_taken_at_a_time() {
        for (length, most) in [
            (3, 1),
            (3, 100),
            (SHORT, 7),
            (SHORT + 1, 1),
            (SHORT + 1, 4097),
            (SHORT + 1, 1 << 20),
        ] {
            let mut out = Out::default();
            out.flat().extend_from_slice(b"head:");
            let body = vec![b'x'; length];
            out.piece(body.clone().into(), b"\r\n");
            assert_eq!(out.has_room(), length <= SHORT);
            let mut sink = Sink(Vec::new(), most);
            let mut cx = Context::from_waker(std::task::Waker::noop());
            assert!(matches!(out.poll_flush(&mut sink, &mut cx), Poll::Ready(Ok(()))));
            assert_eq!(sink.0, [&b"head:"[..], &body, b"\r\n"].concat());
            assert!(out.is_empty() && out.has_room());
        }
    }
}
