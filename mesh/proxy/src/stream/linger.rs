//! The end of a connection that still has something to say to us.
//!
//! A socket that is closed while bytes of its peer are unread resets the connection, and the peer may lose what it has not
//! read yet: the answers before a GOAWAY, as its window updates cross them; the answer to a request of which not all was waited
//! for. So the writing side is closed first, and what the peer sends is read and dropped until it closes as well, for a second at
//! most (Envoy's `delayed_close_timeout`).

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Sleep;

use super::{Hooks, Layer};

/// How long the peer has to close.
const LINGER: Duration = Duration::from_secs(1);

/// See the module.
pub type Lingering<S> = Layer<S, Linger>;

/// Until when, once the writing side is closed.
#[derive(Debug, Default)]
pub struct Linger(Option<Pin<Box<Sleep>>>);

impl Linger {
    /// Whether the writing side has been closed.
    pub fn has_begun(&self) -> bool {
        self.0.is_some()
    }

    /// Reads and drops what comes until the peer closes or its time is over. The writing side has been closed.
    pub fn poll(
        &mut self,
        cx: &mut Context<'_>,
        mut read: impl FnMut(&mut Context<'_>, &mut ReadBuf<'_>) -> Poll<io::Result<()>>,
    ) -> Poll<io::Result<()>> {
        let timer = self.0.get_or_insert_with(|| Box::pin(tokio::time::sleep(LINGER)));
        let mut chunk = [0; 4096];
        loop {
            if timer.as_mut().poll(cx).is_ready() {
                return Poll::Ready(Ok(()));
            }
            let mut dropped = ReadBuf::new(&mut chunk);
            match ready!(read(cx, &mut dropped)) {
                Ok(()) if !dropped.filled().is_empty() => {}
                // The peer has closed, or is gone.
                Ok(()) | Err(_) => return Poll::Ready(Ok(())),
            }
        }
    }
}

impl<S> Lingering<S> {
    /// Above `below`.
    pub fn new(below: S) -> Self {
        Self::over(below, Linger::default())
    }
}

impl<S: AsyncRead> Hooks<S> for Linger {
    fn poll_shutdown(&mut self, mut below: Pin<&mut S>, cx: &mut Context<'_>) -> Poll<io::Result<()>>
    where
        S: AsyncWrite,
    {
        if !self.has_begun() {
            ready!(below.as_mut().poll_shutdown(cx))?;
        }
        self.poll(cx, |cx, buf| below.as_mut().poll_read(cx, buf))
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn what_the_peer_still_sends_is_read_until_it_closes_or_its_time_is_over() {
        for closes in [true, false] {
            let (near, mut far) = tokio::io::duplex(64);
            let began = tokio::time::Instant::now();
            let ending = tokio::spawn(async move {
                let mut near = Lingering::new(near);
                near.write_all(b"answer").await.unwrap();
                near.shutdown().await.unwrap();
            });
            // More than the pipe holds, so that it is written only if it is read.
            far.write_all(&[0; 1000]).await.unwrap();
            let mut answer = Vec::new();
            far.read_to_end(&mut answer).await.unwrap();
            assert_eq!(answer, b"answer");
            assert!(!ending.is_finished());
            if closes {
                drop(far);
                ending.await.unwrap();
                assert_eq!(began.elapsed(), Duration::ZERO);
            } else {
                ending.await.unwrap();
                assert_eq!(began.elapsed(), LINGER);
                drop(far);
            }
        }
    }
}
