//! Connections with times on them: when something was handed to the kernel, and when the kernel had what came back. The control
//! plane's, for changes and their acknowledgements; the open loop's, for requests and their answers.
//!
//! On a machine with two busy processors a measuring process waits for one of them as everybody does. The kernel stamps what
//! arrives in the sender's context (`SO_TIMESTAMPNS`), so that wait is not part of what is measured; the time of writing is
//! read right before the system call.

use std::io::IoSliceMut;
use std::os::fd::{AsFd, AsRawFd};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg, setsockopt, sockopt};
use nix::sys::time::TimeSpec;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tonic::transport::server::Connected;

/// Times of a connection, in nanoseconds of the wall clock; 0 is never.
#[derive(Debug, Default)]
pub(crate) struct Stamps {
    written: AtomicU64,
    read: AtomicU64,
}

impl Stamps {
    /// The next write is the one that counts.
    pub(crate) fn arm(&self) {
        self.written.store(0, Ordering::Relaxed);
    }

    /// From that write to the arrival of what was read last.
    pub(crate) fn between(&self) -> Option<Duration> {
        let (written, read) = (
            self.written.load(Ordering::Relaxed),
            self.read.load(Ordering::Relaxed),
        );
        (written > 0).then(|| Duration::from_nanos(read.saturating_sub(written)))
    }
}

/// Asks the kernel to stamp what arrives.
pub(crate) fn stamp(stream: &impl AsFd) -> std::io::Result<()> {
    Ok(setsockopt(stream, sockopt::ReceiveTimestampns, &true)?)
}

/// Reads once; how much, and when the last of it arrived, in nanoseconds of the wall clock.
pub(crate) fn receive(stream: &impl AsRawFd, into: &mut [u8]) -> std::io::Result<(usize, Option<u64>)> {
    let mut space = nix::cmsg_space!(TimeSpec);
    let mut parts = [IoSliceMut::new(into)];
    let message = recvmsg::<()>(
        stream.as_raw_fd(),
        &mut parts,
        Some(&mut space),
        MsgFlags::empty(),
    )?;
    let at = message.cmsgs()?.find_map(|control| match control {
        ControlMessageOwned::ScmTimestampns(at) => {
            Some(at.tv_sec() as u64 * 1_000_000_000 + at.tv_nsec() as u64)
        }
        _ => None,
    });
    Ok((message.bytes, at))
}

/// Nanoseconds of the wall clock, which is the stamps' own.
pub(crate) fn now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_nanos() as u64)
}

/// See the module.
pub(crate) struct Stamped {
    stream: TcpStream,
    stamps: Arc<Stamps>,
}

impl Stamped {
    /// What is accepted, stamped.
    pub(crate) fn incoming(
        listener: TcpListener,
        stamps: Arc<Stamps>,
    ) -> impl futures::Stream<Item = std::io::Result<Self>> {
        futures::stream::poll_fn(move |cx| {
            let (stream, _) = ready!(listener.poll_accept(cx))?;
            stream.set_nodelay(true)?;
            stamp(&stream)?;
            Poll::Ready(Some(Ok(Self {
                stream,
                stamps: stamps.clone(),
            })))
        })
    }

    fn receive(&self, into: &mut [u8]) -> std::io::Result<usize> {
        let (count, at) = receive(&self.stream, into)?;
        if let Some(at) = at {
            self.stamps.read.store(at, Ordering::Relaxed);
        }
        Ok(count)
    }
}

impl AsyncRead for Stamped {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        loop {
            ready!(self.stream.poll_read_ready(cx))?;
            let into = buf.initialize_unfilled();
            match self.stream.try_io(Interest::READABLE, || self.receive(into)) {
                Ok(count) => {
                    buf.advance(count);
                    return Poll::Ready(Ok(()));
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }
}

impl AsyncWrite for Stamped {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        if self.stamps.written.load(Ordering::Relaxed) == 0 {
            self.stamps.written.store(now(), Ordering::Relaxed);
        }
        Pin::new(&mut self.stream).poll_write(cx, data)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

impl Connected for Stamped {
    type ConnectInfo = ();

    fn connect_info(&self) -> Self::ConnectInfo {}
}
