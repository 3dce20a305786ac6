//! What reading and writing a client's connection tells about it: bytes, and whether the client has ended it.

use std::cell::Cell;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, ReadBuf};

use super::{Hooks, Layer};
use crate::policy::stats::Bytes;

/// A client's connection, watched.
pub type Traced<S> = Layer<S, Rc<Traces>>;

/// See the module.
#[derive(Debug, Default)]
pub struct Traces {
    /// The client has said that it is over, or its connection broke.
    ended: Cell<bool>,
    /// Where bytes are counted.
    bytes: Option<Bytes>,
}

impl Traces {
    /// Of a connection whose bytes are counted there, of which so many were read before.
    pub fn counting(bytes: Option<Bytes>, read: usize) -> Rc<Self> {
        if let Some(bytes) = &bytes {
            bytes.received(read);
        }
        Rc::new(Self {
            ended: Cell::new(false),
            bytes,
        })
    }

    /// Whether the client has said that it is over, or its connection broke.
    pub fn ended_by_client(&self) -> bool {
        self.ended.get()
    }
}

impl<S> Hooks<S> for Rc<Traces> {
    fn poll_read(
        &mut self,
        below: Pin<&mut S>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>>
    where
        S: AsyncRead,
    {
        let before = buf.remaining();
        let outcome = below.poll_read(cx, buf);
        match &outcome {
            Poll::Ready(Ok(())) if buf.remaining() < before => {
                if let Some(bytes) = &self.bytes {
                    bytes.received(before - buf.remaining());
                }
            }
            Poll::Ready(Ok(())) if before == 0 => {}
            Poll::Ready(_) => self.ended.set(true),
            Poll::Pending => {}
        }
        outcome
    }

    fn sent(&mut self, count: usize) {
        if let Some(bytes) = &self.bytes {
            bytes.sent(count);
        }
    }

    fn unwritten(&mut self) {
        self.ended.set(true);
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    #[tokio::test]
    async fn a_client_that_says_that_it_is_over_has_ended_its_connection() {
        let (near, mut far) = tokio::io::duplex(64);
        let traces = Traces::counting(None, 0);
        let mut near = Traced::over(near, traces.clone());
        far.write_all(b"ab").await.unwrap();
        let mut read = [0; 2];
        near.read_exact(&mut read).await.unwrap();
        near.write_all(b"c").await.unwrap();
        assert!(!traces.ended_by_client());
        far.shutdown().await.unwrap();
        assert_eq!(near.read(&mut read).await.unwrap(), 0);
        assert!(traces.ended_by_client());
    }

    #[tokio::test]
    async fn a_client_that_takes_nothing_more_has_ended_its_connection() {
        let (near, far) = tokio::io::duplex(64);
        let traces = Traces::counting(None, 0);
        let mut near = Traced::over(near, traces.clone());
        drop(far);
        near.write_all(b"c").await.unwrap_err();
        assert!(traces.ended_by_client());
    }
}
