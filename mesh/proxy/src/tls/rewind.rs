//! A stream some of whose bytes have been read already.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, ReadBuf};

use crate::stream::{Hooks, Layer};

/// Gives the bytes read before first, then the stream's.
pub type Rewind<S> = Layer<S, Prefix>;

/// What was read before and not given yet.
#[derive(Debug)]
pub struct Prefix {
    bytes: Vec<u8>,
    at: usize,
}

impl<S> Rewind<S> {
    /// `prefix` was read from `below`.
    pub fn new(prefix: Vec<u8>, below: S) -> Self {
        Self::over(below, Prefix { bytes: prefix, at: 0 })
    }
}

impl<S> Hooks<S> for Prefix {
    fn poll_read(
        &mut self,
        below: Pin<&mut S>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>>
    where
        S: AsyncRead,
    {
        if self.at == self.bytes.len() {
            return below.poll_read(cx, buf);
        }
        let count = buf.remaining().min(self.bytes.len() - self.at);
        buf.put_slice(&self.bytes[self.at..self.at + count]);
        self.at += count;
        if self.at == self.bytes.len() {
            *self = Self {
                bytes: Vec::new(),
                at: 0,
            };
        }
        Poll::Ready(Ok(()))
    }
}
