//! A downstream connection: plain, or with TLS that we end.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::server::TlsStream;

use crate::tls::rewind::Rewind;

/// See the module.
#[derive(Debug)]
pub enum Io {
    /// The socket itself.
    Plain(TcpStream),
    /// What is inside of TLS. Boxed: plain connections should not pay for its size.
    Tls(Box<TlsStream<Rewind<TcpStream>>>),
}

/// Pieces that together are no longer than this are copied together and written as one.
const TOGETHER: usize = 1024;

/// Writes pieces. To send one piece is cheaper for the kernel than to gather several, and to copy a few hundred bytes here
/// is cheaper than to have it look at a list of them.
pub(crate) fn write_pieces<S: AsyncWrite>(
    stream: Pin<&mut S>,
    cx: &mut Context<'_>,
    pieces: &[io::IoSlice<'_>],
) -> Poll<io::Result<usize>> {
    let mut filled = pieces.iter().filter(|piece| !piece.is_empty());
    let Some(first) = filled.next() else {
        return stream.poll_write(cx, &[]);
    };
    if filled.next().is_none() {
        return stream.poll_write(cx, first);
    }
    if pieces.iter().map(|piece| piece.len()).sum::<usize>() > TOGETHER {
        return stream.poll_write_vectored(cx, pieces);
    }
    let mut together = [0; TOGETHER];
    let mut end = 0;
    for piece in pieces {
        together[end..end + piece.len()].copy_from_slice(piece);
        end += piece.len();
    }
    stream.poll_write(cx, &together[..end])
}

impl AsyncRead for Io {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_read(cx, buf),
            Self::Tls(stream) => Pin::new(stream).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Io {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_write(cx, buf),
            Self::Tls(stream) => Pin::new(stream).poll_write(cx, buf),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(stream) => write_pieces(Pin::new(stream), cx, bufs),
            Self::Tls(stream) => write_pieces(Pin::new(stream), cx, bufs),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            Self::Plain(stream) => stream.is_write_vectored(),
            Self::Tls(stream) => stream.is_write_vectored(),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_flush(cx),
            Self::Tls(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

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
                let Poll::Ready(Ok(count)) = write_pieces(Pin::new(&mut sink), &mut cx, &slices) else {
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
