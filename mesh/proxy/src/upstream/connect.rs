//! Making connections to endpoints.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpSocket, TcpStream, UnixStream};

use crate::config::cluster::Cluster;
use crate::config::convert::Address;
use crate::intercept::{MARK_IN, MARK_OUT};

/// Whether marking sockets is allowed; found out once, since without CAP_NET_ADMIN every attempt fails.
static MARK_ALLOWED: AtomicBool = AtomicBool::new(true);

/// A connection to an endpoint.
#[derive(Debug)]
pub enum Stream {
    /// TCP.
    Tcp(TcpStream),
    /// Unix socket.
    Unix(UnixStream),
}

/// Connects to `address` as the cluster says. The caller bounds the time.
pub async fn connect(cluster: &Cluster, address: &Address) -> io::Result<Stream> {
    match address {
        Address::Tcp(address) => connect_tcp(cluster, *address).await.map(Stream::Tcp),
        Address::Pipe(path) => UnixStream::connect(&**path).await.map(Stream::Unix),
        Address::Name(name, _) => Err(io::Error::other(format!("{name} has not been resolved"))),
    }
}

async fn connect_tcp(cluster: &Cluster, address: SocketAddr) -> io::Result<TcpStream> {
    let socket = Socket::new(
        Domain::for_address(address),
        Type::STREAM.nonblocking().cloexec(),
        Some(Protocol::TCP),
    )?;
    socket.set_tcp_nodelay(true)?;
    // A cluster that binds its source leads to the local application.
    mark(&socket, if cluster.bind.is_some() { MARK_IN } else { MARK_OUT });
    if let Some((idle, interval, probes)) = cluster.keepalive {
        let keepalive = TcpKeepalive::new()
            .with_time(idle.max(Duration::from_secs(1)))
            .with_interval(interval.max(Duration::from_secs(1)))
            .with_retries(probes);
        socket.set_tcp_keepalive(&keepalive)?;
    }
    if let Some(source) = cluster.bind {
        bind(&socket, source, address)?;
    }
    TcpSocket::from_std_stream(socket.into()).connect(address).await
}

fn bind(socket: &Socket, source: IpAddr, target: SocketAddr) -> io::Result<()> {
    // Istio binds to 127.0.0.6 and means ::6 for IPv6 targets.
    let source = match (source, target) {
        (IpAddr::V4(v4), SocketAddr::V6(_)) if v4.is_loopback() => {
            let last = u16::from(v4.octets()[3]);
            IpAddr::V6(std::net::Ipv6Addr::new(0, 0, 0, 0, 0, 0, 0, last))
        }
        (source, _) => source,
    };
    if source.is_ipv4() != target.is_ipv4() {
        return Ok(());
    }
    match socket.bind(&SocketAddr::new(source, 0).into()) {
        // ::6 exists only where interception has put it; without it the connection still works.
        Err(error) if source.is_ipv6() && error.kind() == io::ErrorKind::AddrNotAvailable => Ok(()),
        other => other,
    }
}

/// Marks a socket as the proxy's own, so that interception lets it pass.
fn mark(socket: &Socket, mark: u32) {
    if MARK_ALLOWED.load(Ordering::Relaxed) && SockRef::from(socket).set_mark(mark).is_err() {
        MARK_ALLOWED.store(false, Ordering::Relaxed);
    }
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_read(cx, buf),
            Self::Unix(stream) => Pin::new(stream).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_write(cx, buf),
            Self::Unix(stream) => Pin::new(stream).poll_write(cx, buf),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
            Self::Unix(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Unix(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}
