//! Bytes that were read from a connection and are not understood yet.
//!
//! Most messages are a few hundred bytes. They are read to the stack, which is warm and costs a connection that waits nothing, and
//! copied from there to a buffer of their size. Where more comes than fits there, what follows is read to the buffer itself.

use std::io;
use std::mem::MaybeUninit;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncRead, ReadBuf};

/// What is read to the stack at a time: most messages come whole.
const SMALL: usize = 16 * 1024;
/// What is read at a time once that was not enough.
const LARGE: usize = 32 * 1024;

/// See the module.
#[derive(Debug, Default)]
pub struct Input {
    /// What was read and is not understood yet.
    pub buf: BytesMut,
    /// The last read was full.
    more: bool,
}

impl Input {
    /// One from which that was read before.
    pub fn with(bytes: &[u8]) -> Self {
        Self {
            buf: BytesMut::from(bytes),
            more: false,
        }
    }

    /// Reads once; how many bytes, 0 at the end of the stream.
    pub fn poll_read<S: AsyncRead + Unpin>(
        &mut self,
        from: &mut S,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<usize>> {
        if self.more {
            self.buf.reserve(LARGE);
            let count = ready!(tokio_util::io::poll_read_buf(Pin::new(from), cx, &mut self.buf))?;
            self.more = count >= SMALL;
            return Poll::Ready(Ok(count));
        }
        let mut small = [MaybeUninit::uninit(); SMALL];
        let mut read = ReadBuf::uninit(&mut small);
        ready!(Pin::new(from).poll_read(cx, &mut read))?;
        let filled = read.filled();
        self.buf.extend_from_slice(filled);
        self.more = filled.len() == SMALL;
        Poll::Ready(Ok(filled.len()))
    }

    /// Takes the first `length` bytes.
    pub fn take(&mut self, length: usize) -> Bytes {
        if length == self.buf.len() {
            // Not split: what is left would hold on to the memory of what goes.
            return std::mem::take(&mut self.buf).freeze();
        }
        self.buf.split_to(length).freeze()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_of_any_length_come_whole_and_in_order() {
        for length in [0, 1, 300, SMALL - 1, SMALL, SMALL + 1, 3 * LARGE] {
            let sent: Vec<u8> = (0..length).map(|at| (at % 251) as u8).collect();
            let mut from = &sent[..];
            let mut input = Input::default();
            let mut cx = Context::from_waker(std::task::Waker::noop());
            let mut reads = 0;
            while let Poll::Ready(Ok(count)) = input.poll_read(&mut from, &mut cx)
                && count > 0
            {
                reads += 1;
            }
            assert_eq!(input.buf, sent);
            assert!(reads <= 2 + length / LARGE, "{reads} reads for {length} bytes");
            let first = input.take(length / 3);
            assert_eq!([first, input.take(length - length / 3)].concat(), sent);
            assert!(input.buf.is_empty());
        }
    }
}
