//! What a client said before it was gone is heard first.
//!
//! `h2` reads until there is nothing more to read, and only then hands out the requests that it found; where it comes upon the
//! end of the connection meanwhile, or cannot write an acknowledgement to a client that is gone already, it hands out none of
//! them. They would be acted on, counted and logged, or not, as the packets happened to come. So the end of what is read is
//! held back until the requests before it have been taken, and where writing fails there is still something to read: what is
//! written after that goes nowhere, and the failure is told at the end of what is read.
//!
//! Not for the handshake, which waits for bytes of its own: the end is held back from [`Ending::hold`] on.

use std::cell::Cell;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum State {
    /// The end is told as it comes.
    #[default]
    Free,
    /// The end is to be held back.
    Holding,
    /// The end has come and waits.
    Held,
}

/// What the stream and who takes the requests tell each other.
#[derive(Clone, Debug, Default)]
pub struct Ending(Rc<Cell<State>>);

impl Ending {
    /// From now on the end is held back.
    pub fn hold(&self) {
        self.0.set(State::Holding);
    }

    /// Every request has been taken. True if the end waited for that: it will be told now, and nobody else wakes the reader.
    pub fn release(&self) -> bool {
        let waited = self.0.get() == State::Held;
        if waited {
            self.0.set(State::Free);
        }
        waited
    }
}

/// See the module.
#[derive(Debug)]
pub struct LastWords<S> {
    below: S,
    ending: Ending,
    /// How writing failed.
    unwritten: Option<io::Error>,
    broken: bool,
    /// How reading failed, while that is held back.
    unread: Option<io::Error>,
}

impl<S> LastWords<S> {
    /// Above `below`.
    pub fn new(below: S, ending: Ending) -> Self {
        Self {
            below,
            ending,
            unwritten: None,
            broken: false,
            unread: None,
        }
    }

    /// Writes, as long as there is somebody to write to; what counts as written where there is not is `gone`.
    fn write<T>(
        &mut self,
        gone: T,
        write: impl FnOnce(Pin<&mut S>) -> Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>>
    where
        S: Unpin,
    {
        if self.broken {
            return Poll::Ready(Ok(gone));
        }
        match write(Pin::new(&mut self.below)) {
            Poll::Ready(Err(error)) if is_gone(&error) => {
                self.unwritten = Some(error);
                self.broken = true;
                Poll::Ready(Ok(gone))
            }
            outcome => outcome,
        }
    }
}

/// Whether the peer is gone, so that reading comes to an end as well.
fn is_gone(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::BrokenPipe
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionAborted
            | io::ErrorKind::NotConnected
    )
}

impl<S: AsyncRead + Unpin> AsyncRead for LastWords<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.ending.0.get() != State::Held
            && let Some(error) = this.unread.take()
        {
            return Poll::Ready(Err(error));
        }
        let (before, room) = (buf.filled().len(), buf.remaining() > 0);
        let outcome = Pin::new(&mut this.below).poll_read(cx, buf);
        let failure = match outcome {
            Poll::Ready(Ok(())) if room && buf.filled().len() == before => this.unwritten.take(),
            Poll::Ready(Err(error)) => Some(error),
            outcome => return outcome,
        };
        if this.ending.0.get() == State::Holding {
            this.ending.0.set(State::Held);
        }
        if this.ending.0.get() == State::Held {
            let failure = failure.or(this.unread.take());
            // Whoever takes the requests comes back without being woken: see `Ending::release`.
            this.unread = failure;
            return Poll::Pending;
        }
        Poll::Ready(failure.map_or(Ok(()), Err))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for LastWords<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.get_mut().write(buf.len(), |below| below.poll_write(cx, buf))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        pieces: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let whole = pieces.iter().map(|piece| piece.len()).sum();
        self.get_mut()
            .write(whole, |below| below.poll_write_vectored(cx, pieces))
    }

    fn is_write_vectored(&self) -> bool {
        self.below.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.get_mut().write((), |below| below.poll_flush(cx))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.get_mut().write((), |below| below.poll_shutdown(cx))
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    /// Reads once; `None` while nothing comes.
    fn read<S: AsyncRead + Unpin>(stream: &mut LastWords<S>) -> Option<io::Result<Vec<u8>>> {
        let mut chunk = [0; 16];
        let mut buf = ReadBuf::new(&mut chunk);
        let mut cx = Context::from_waker(std::task::Waker::noop());
        match Pin::new(stream).poll_read(&mut cx, &mut buf) {
            Poll::Pending => None,
            Poll::Ready(outcome) => Some(outcome.map(|()| buf.filled().to_vec())),
        }
    }

    #[tokio::test]
    async fn the_end_is_told_once_everything_before_it_has_been_taken() {
        for broken in [false, true] {
            let (near, mut far) = tokio::io::duplex(64);
            far.write_all(b"words").await.unwrap();
            drop(far);
            let ending = Ending::default();
            let mut stream = LastWords::new(near, ending.clone());
            ending.hold();
            if broken {
                stream.write_all(b"lost").await.unwrap();
            }
            assert_eq!(read(&mut stream).unwrap().unwrap(), b"words");
            assert!(!ending.release(), "the end has not come");
            for _ in 0..2 {
                assert!(read(&mut stream).is_none());
            }
            assert!(ending.release());
            match read(&mut stream).unwrap() {
                Ok(end) => assert!(end.is_empty() && !broken),
                Err(error) => assert!(broken && error.kind() == io::ErrorKind::BrokenPipe),
            }
            assert!(read(&mut stream).unwrap().unwrap().is_empty());
            assert!(!ending.release());
        }
    }

    #[tokio::test]
    async fn a_write_that_fails_because_the_peer_is_gone_is_told_behind_its_last_words() {
        let (near, mut far) = tokio::io::duplex(64);
        far.write_all(b"words").await.unwrap();
        drop(far);
        let mut stream = LastWords::new(near, Ending::default());
        stream.write_all(b"lost").await.unwrap();
        stream.write_all(b"lost as well").await.unwrap();
        stream.flush().await.unwrap();
        let mut words = Vec::new();
        let error = stream.read_to_end(&mut words).await.unwrap_err();
        assert_eq!(
            (&*words, error.kind()),
            (&b"words"[..], io::ErrorKind::BrokenPipe)
        );
    }

    #[tokio::test]
    async fn any_other_failure_to_write_is_told_at_once() {
        struct Full;

        impl AsyncWrite for Full {
            fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, _: &[u8]) -> Poll<io::Result<usize>> {
                Poll::Ready(Err(io::ErrorKind::InvalidData.into()))
            }

            fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
                Poll::Ready(Ok(()))
            }

            fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
                Poll::Ready(Ok(()))
            }
        }

        let mut stream = LastWords::new(Full, Ending::default());
        let error = stream.write_all(b"lost").await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }
}
