//! The end of a connection that still has something to say to us.
//!
//! A socket that is closed while bytes of its peer are unread resets the connection, and the peer may lose what it has not
//! read yet: the answers before a GOAWAY, as its window updates cross them. So the writing side is closed first, and what
//! the peer sends is read and dropped until it closes as well, for [`LINGER`] at most (Envoy's `delayed_close_timeout`).

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Sleep;

use crate::stream::{Hooks, Layer};

/// How long the peer has to close.
const LINGER: Duration = Duration::from_secs(1);

/// See the module.
pub(super) type Lingering<S> = Layer<S, Linger>;

/// Until when, once the writing side is closed.
#[derive(Debug, Default)]
pub(super) struct Linger(Option<Pin<Box<Sleep>>>);

impl<S> Lingering<S> {
    pub(super) fn new(below: S) -> Self {
        Self::over(below, Linger::default())
    }
}

impl<S: AsyncRead> Hooks<S> for Linger {
    fn poll_shutdown(&mut self, mut below: Pin<&mut S>, cx: &mut Context<'_>) -> Poll<io::Result<()>>
    where
        S: AsyncWrite,
    {
        if self.0.is_none() {
            ready!(below.as_mut().poll_shutdown(cx))?;
        }
        let timer = self.0.get_or_insert_with(|| Box::pin(tokio::time::sleep(LINGER)));
        let mut chunk = [0; 512];
        loop {
            if timer.as_mut().poll(cx).is_ready() {
                return Poll::Ready(Ok(()));
            }
            let mut read = ReadBuf::new(&mut chunk);
            match ready!(below.as_mut().poll_read(cx, &mut read)) {
                Ok(()) if !read.filled().is_empty() => {}
                // The peer has closed, or is gone.
                Ok(()) | Err(_) => return Poll::Ready(Ok(())),
            }
        }
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
