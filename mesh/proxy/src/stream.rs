//! What streams of bytes that lie above one another have in common.
//!
//! A connection is a stack: the socket, perhaps TLS, and above or between them something that counts, remembers or puts
//! back. Each of those is a [`Layer`], which passes everything on, and says in its [`Hooks`] the one thing that it does
//! otherwise. What a connection may be (with TLS or without) is [`MaybeTls`]. All of it is resolved at compile time: a layer
//! costs what its hooks do.
//!
//! Not here: what makes bytes of its own (`http1`, tunnels inside of HTTP/2).

pub mod frames;
pub mod keepalive;
pub mod last_words;
pub mod linger;
pub mod traces;

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// What a layer does otherwise than the stream below it.
pub trait Hooks<S> {
    /// So many bytes have been read; none is the end of the stream.
    fn received(&mut self, _count: usize) {}

    /// So many bytes have been written.
    fn sent(&mut self, _count: usize) {}

    /// Writing has failed.
    fn unwritten(&mut self) {}

    /// See [`AsyncRead::poll_read`].
    fn poll_read(
        &mut self,
        below: Pin<&mut S>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>>
    where
        S: AsyncRead,
    {
        below.poll_read(cx, buf)
    }

    /// See [`AsyncWrite::poll_write_vectored`].
    fn poll_write_vectored(
        &mut self,
        below: Pin<&mut S>,
        cx: &mut Context<'_>,
        pieces: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>>
    where
        S: AsyncWrite,
    {
        below.poll_write_vectored(cx, pieces)
    }

    /// See [`AsyncWrite::poll_shutdown`].
    fn poll_shutdown(&mut self, below: Pin<&mut S>, cx: &mut Context<'_>) -> Poll<io::Result<()>>
    where
        S: AsyncWrite,
    {
        below.poll_shutdown(cx)
    }
}

/// A stream above another one; see the module.
#[derive(Debug)]
pub struct Layer<S, H> {
    below: S,
    hooks: H,
}

impl<S, H> Layer<S, H> {
    /// `hooks` above `below`.
    pub fn over(below: S, hooks: H) -> Self {
        Self { below, hooks }
    }

    /// The stream below.
    pub fn below(&self) -> &S {
        &self.below
    }

    /// The stream below, alone.
    pub fn into_below(self) -> S {
        self.below
    }
}

impl<S: AsyncRead + Unpin, H: Hooks<S> + Unpin> AsyncRead for Layer<S, H> {
    #[inline]
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let Self { below, hooks } = self.get_mut();
        let before = buf.filled().len();
        let outcome = hooks.poll_read(Pin::new(below), cx, buf);
        if matches!(outcome, Poll::Ready(Ok(()))) {
            hooks.received(buf.filled().len() - before);
        }
        outcome
    }
}

impl<S: AsyncWrite + Unpin, H: Hooks<S> + Unpin> AsyncWrite for Layer<S, H> {
    #[inline]
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let Self { below, hooks } = self.get_mut();
        let outcome = Pin::new(below).poll_write(cx, buf);
        note_written(hooks, &outcome);
        outcome
    }

    #[inline]
    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        pieces: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let Self { below, hooks } = self.get_mut();
        let outcome = hooks.poll_write_vectored(Pin::new(below), cx, pieces);
        note_written(hooks, &outcome);
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
        let Self { below, hooks } = self.get_mut();
        hooks.poll_shutdown(Pin::new(below), cx)
    }
}

#[inline]
fn note_written<S, H: Hooks<S>>(hooks: &mut H, outcome: &Poll<io::Result<usize>>) {
    match outcome {
        Poll::Ready(Ok(count)) => hooks.sent(*count),
        Poll::Ready(Err(_)) => hooks.unwritten(),
        Poll::Pending => {}
    }
}

/// Pieces that together are no longer than this are copied together and written as one.
const TOGETHER: usize = 1024;

/// Writes short pieces as one. To send one piece is cheaper for the kernel than to gather several, and to copy a few hundred
/// bytes here is cheaper than to have it look at a list of them.
#[derive(Debug)]
pub struct Together;

impl<S> Hooks<S> for Together {
    fn poll_write_vectored(
        &mut self,
        below: Pin<&mut S>,
        cx: &mut Context<'_>,
        pieces: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>>
    where
        S: AsyncWrite,
    {
        let mut filled = pieces.iter().filter(|piece| !piece.is_empty());
        let Some(first) = filled.next() else {
            return below.poll_write(cx, &[]);
        };
        if filled.next().is_none() {
            return below.poll_write(cx, first);
        }
        if pieces.iter().map(|piece| piece.len()).sum::<usize>() > TOGETHER {
            return below.poll_write_vectored(cx, pieces);
        }
        let mut together = [0; TOGETHER];
        let mut end = 0;
        for piece in pieces {
            together[end..end + piece.len()].copy_from_slice(piece);
            end += piece.len();
        }
        below.poll_write(cx, &together[..end])
    }
}

/// A connection without TLS, or with TLS that ends here.
#[derive(Debug)]
pub enum MaybeTls<P, T> {
    /// The socket itself.
    Plain(P),
    /// What is inside of TLS. Boxed: plain connections should not pay for its size.
    Tls(Box<T>),
}

impl<P: AsyncRead + Unpin, T: AsyncRead + Unpin> AsyncRead for MaybeTls<P, T> {
    #[inline]
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_read(cx, buf),
            Self::Tls(stream) => Pin::new(stream).poll_read(cx, buf),
        }
    }
}

impl<P: AsyncWrite + Unpin, T: AsyncWrite + Unpin> AsyncWrite for MaybeTls<P, T> {
    #[inline]
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_write(cx, buf),
            Self::Tls(stream) => Pin::new(stream).poll_write(cx, buf),
        }
    }

    #[inline]
    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        pieces: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_write_vectored(cx, pieces),
            Self::Tls(stream) => Pin::new(stream).poll_write_vectored(cx, pieces),
        }
    }

    #[inline]
    fn is_write_vectored(&self) -> bool {
        match self {
            Self::Plain(stream) => stream.is_write_vectored(),
            Self::Tls(stream) => stream.is_write_vectored(),
        }
    }

    #[inline]
    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_flush(cx),
            Self::Tls(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    #[inline]
    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Tls(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Takes a few bytes at a time and notes how it was asked.
    #[derive(Default)]
    struct Sink {
        bytes: Vec<u8>,
        single: usize,
        gathered: usize,
        most: usize,
    }

    impl AsyncWrite for Sink {
        fn poll_write(mut self: Pin<&mut Self>, _: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
            let count = buf.len().min(self.most);
            self.bytes.extend_from_slice(&buf[..count]);
            self.single += 1;
            Poll::Ready(Ok(count))
        }

        fn poll_write_vectored(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
            bufs: &[io::IoSlice<'_>],
        ) -> Poll<io::Result<usize>> {
            self.gathered += 1;
            let mut count = 0;
            for buf in bufs {
                let part = buf.len().min(self.most - count);
                self.bytes.extend_from_slice(&buf[..part]);
                count += part;
            }
            Poll::Ready(Ok(count))
        }

        fn is_write_vectored(&self) -> bool {
            true
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    #[test]
    fn pieces_arrive_in_order_however_they_are_written() {
        let long = vec![b'x'; TOGETHER];
        for (pieces, single, gathered) in [
            (vec![&b"head"[..]], 1, 0),
            (vec![&b"head"[..], b"", b"body"], 1, 0),
            (vec![b"", b"body"], 1, 0),
            (vec![b"", b""], 1, 0),
            (vec![&b"head"[..], &long], 0, 1),
        ] {
            for most in [3, usize::MAX] {
                let mut sink = Sink {
                    most,
                    ..Default::default()
                };
                let slices: Vec<_> = pieces.iter().map(|piece| io::IoSlice::new(piece)).collect();
                let mut cx = Context::from_waker(std::task::Waker::noop());
                let Poll::Ready(Ok(count)) =
                    Together.poll_write_vectored(Pin::new(&mut sink), &mut cx, &slices)
                else {
                    panic!("the sink takes what it is given");
                };
                let whole = pieces.concat();
                assert_eq!(count, whole.len().min(most));
                assert_eq!(sink.bytes, whole[..count]);
                assert_eq!((sink.single, sink.gathered), (single, gathered));
            }
        }
    }
}
