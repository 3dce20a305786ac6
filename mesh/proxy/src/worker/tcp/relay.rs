//! Bytes both ways until both ends are done. An idle connection holds no buffer: each thread has one.

use std::cell::RefCell;
use std::io;
use std::pin::Pin;
use std::task::{Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt as _, ReadBuf};
use tokio::net::TcpStream;
use tokio_util::either::Either;

use crate::upstream::connect::Socket;
use crate::worker::io::Io;

/// Bytes moved at a time: with what the system keeps of them, they stay in the cache next to a processor, which 64 KiB do not (each byte then
/// costs nearly twice as much). A pipe between the sockets (`splice`) halves what this side costs and makes both others dearer.
const BUFFER: usize = 32 * 1024;

thread_local! {
    static SCRATCH: RefCell<Vec<u8>> = RefCell::new(vec![0; BUFFER]);
}

/// Both directions between sockets. The halves are tokio's, whose reads know that a short one has emptied the socket: a
/// message costs one read and one write, and no read that only finds nothing.
pub(super) async fn join_sockets(
    mut downstream: TcpStream,
    upstream: Socket,
    prefix: &[u8],
    received: impl Fn(usize),
    sent: impl Fn(usize),
) -> io::Result<()> {
    let (from_client, to_client) = downstream.split();
    match upstream.into_below() {
        Either::Left(mut upstream) => {
            let (from_server, to_server) = upstream.split();
            let up = relay_one(from_client, to_server, prefix, received);
            let down = relay_one(from_server, to_client, &[], sent);
            futures::future::try_join(up, down).await.map(drop)
        }
        Either::Right(mut upstream) => {
            let (from_server, to_server) = upstream.split();
            let up = relay_one(from_client, to_server, prefix, received);
            let down = relay_one(from_server, to_client, &[], sent);
            futures::future::try_join(up, down).await.map(drop)
        }
    }
}

/// Both directions where TLS is on one side at least.
pub(super) async fn relay(
    downstream: Io,
    upstream: impl AsyncRead + AsyncWrite,
    prefix: &[u8],
    early: &[u8],
    received: impl Fn(usize),
    sent: impl Fn(usize),
) -> io::Result<()> {
    let (from_client, to_client) = tokio::io::split(downstream);
    let (from_server, to_server) = tokio::io::split(upstream);
    let up = relay_one(from_client, to_server, prefix, received);
    let down = relay_one(from_server, to_client, early, sent);
    futures::future::try_join(up, down).await.map(drop)
}

/// One direction, to its end. What the peer does not take at once is copied out of the shared buffer, so that a silent
/// or slow direction holds no more than what it owes.
async fn relay_one(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    first: &[u8],
    moved: impl Fn(usize),
) -> io::Result<()> {
    if !first.is_empty() {
        moved(first.len());
        to.write_all(first).await?;
        to.flush().await?;
    }
    loop {
        let step = std::future::poll_fn(|cx| {
            SCRATCH.with_borrow_mut(|buffer| {
                let mut buffer = ReadBuf::new(buffer);
                match ready!(Pin::new(&mut from).poll_read(cx, &mut buffer)) {
                    Ok(()) => {}
                    // Closed without TLS's own goodbye: an end like any other, as the bytes have their own framing.
                    Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                        return Poll::Ready(Ok(None));
                    }
                    Err(error) => return Poll::Ready(Err(error)),
                }
                let filled = buffer.filled();
                if filled.is_empty() {
                    return Poll::Ready(Ok(None));
                }
                moved(filled.len());
                let written = match Pin::new(&mut to).poll_write(cx, filled) {
                    Poll::Ready(result) => result?,
                    Poll::Pending => 0,
                };
                Poll::Ready(Ok(Some(filled[written..].to_vec())))
            })
        });
        match step.await? {
            None => {
                return match to.shutdown().await {
                    // The peer has closed already.
                    Err(error) if error.kind() == io::ErrorKind::NotConnected => Ok(()),
                    other => other,
                };
            }
            Some(rest) if rest.is_empty() => to.flush().await?,
            Some(rest) => {
                to.write_all(&rest).await?;
                to.flush().await?;
            }
        }
    }
}
