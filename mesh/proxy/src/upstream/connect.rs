//! Making connections to endpoints.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures::StreamExt as _;
use futures::stream::FuturesUnordered;
use socket2::{Domain, Protocol, SockRef, TcpKeepalive, Type};
use tokio::io::AsyncWriteExt as _;
use tokio::net::{TcpSocket, TcpStream, UnixStream};
use tokio_rustls::client::TlsStream;
use tokio_util::either::Either;

use super::proxy_header::{self, Tlvs};
use crate::config::alpn::Alpn;
use crate::config::cluster::{Cluster, Priority};
use crate::config::convert::Address;
use crate::config::endpoint::Endpoint;
use crate::intercept::{MARK_IN, MARK_OUT};
use crate::policy::filter_state::Shared;
use crate::stream::{Layer, MaybeTls, Together};
use crate::tls::info::ConnectionTls;
pub use crate::tls::upstream::Speaking;

/// Whether marking sockets is allowed; found out once, since without CAP_NET_ADMIN every attempt fails.
static MARK_ALLOWED: AtomicBool = AtomicBool::new(true);
/// RFC 8305's delay before the next address is tried, as Envoy has it.
const ATTEMPT_DELAY: Duration = Duration::from_millis(300);

/// A socket to an endpoint: TCP on the left, Unix on the right.
pub type Socket = Layer<Either<TcpStream, UnixStream>, Together>;

/// A connection to an endpoint.
pub type Stream = MaybeTls<Socket, Layer<TlsStream<Socket>, Together>>;

fn tcp(stream: TcpStream) -> Socket {
    Socket::over(Either::Left(stream), Together)
}

/// What one connection has of its own, beside what the cluster says. Connections that differ in it are not shared.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ConnectOptions {
    /// Server name, where it follows the request.
    pub server_name: Option<Box<str>>,
    /// Client and its destination, where the endpoint is told by PROXY protocol.
    pub between: Option<(SocketAddr, SocketAddr)>,
    /// What else the endpoint is told by it, from what the client's PROXY protocol header has said.
    pub tlvs: Option<Tlvs>,
    /// Names of which the peer's certificate must have one, separated by commas.
    pub peer_names: Option<Box<str>>,
    /// Objects of the filter state that requests on one connection have in common.
    pub shared: Shared,
    /// What TLS offers instead of what the context says.
    pub alpn: Option<Alpn>,
    /// Whose circuit breaker it counts for.
    pub priority: Priority,
}

impl ConnectOptions {
    /// Whether it says nothing.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// A connection that is ready to be used.
#[derive(Debug)]
pub struct Connected {
    /// The connection.
    pub stream: Stream,
    /// What TLS was negotiated to.
    pub tls: Option<Arc<ConnectionTls>>,
    /// Our own end.
    pub local: Option<SocketAddr>,
}

/// Connects to `endpoint` as the cluster says, PROXY protocol and TLS included. The caller bounds the time.
pub async fn connect(
    cluster: &Cluster,
    endpoint: &Endpoint,
    speaking: Speaking,
    options: &ConnectOptions,
) -> io::Result<Connected> {
    let mut socket = match &endpoint.address {
        Address::Tcp(address) => connect_any(cluster, *address, endpoint.more_addresses()).await?,
        Address::Pipe(path) => Socket::over(Either::Right(UnixStream::connect(&**path).await?), Together),
        Address::Name(name, _) => return Err(io::Error::other(format!("{name} has not been resolved"))),
    };
    let dress = cluster.socket_for(endpoint);
    if let Some(told) = &dress.proxy_protocol {
        let tlvs = told.tlvs(endpoint.tlvs(), options.tlvs.as_ref());
        let header = proxy_header::write(told.version, options.between, &tlvs);
        socket.write_all(&header).await?;
    }
    let local = match socket.below() {
        Either::Left(socket) => socket.local_addr().ok(),
        Either::Right(_) => None,
    };
    let Some(tls) = &dress.tls else {
        return Ok(Connected {
            stream: Stream::Plain(socket),
            tls: None,
            local,
        });
    };
    let hostname = (tls.auto_host_sni && !endpoint.hostname().is_empty()).then_some(endpoint.hostname());
    let server_name = options.server_name.as_deref().or(hostname);
    let address = match &endpoint.address {
        Address::Tcp(address) => address.ip(),
        Address::Pipe(_) | Address::Name(..) => IpAddr::from([127, 0, 0, 1]),
    };
    let (stream, facts) = tls
        .connect(socket, server_name, address, speaking, options.alpn.as_deref())
        .await?;
    if let Some(names) = &options.peer_names {
        tls.must_be(&facts, names)?;
    }
    Ok(Connected {
        stream: Stream::Tls(Box::new(Layer::over(stream, Together))),
        tls: Some(Arc::new(facts)),
        local,
    })
}

/// Connects to the first of several addresses of one endpoint that answers (RFC 8305): families in turn, each started
/// when the one before has failed or has not answered for a while.
async fn connect_any(cluster: &Cluster, first: SocketAddr, more: &[SocketAddr]) -> io::Result<Socket> {
    if more.is_empty() {
        return connect_tcp(cluster, first).await.map(tcp);
    }
    let mut waiting = in_turn(first, more).into_iter();
    let mut running = FuturesUnordered::new();
    let mut failure = None;
    loop {
        if let Some(address) = waiting.next() {
            running.push(connect_tcp(cluster, address));
        }
        let next = async {
            if waiting.len() == 0 {
                std::future::pending().await
            } else {
                tokio::time::sleep(ATTEMPT_DELAY).await
            }
        };
        tokio::select! {
            result = running.next() => match result {
                Some(Ok(stream)) => return Ok(tcp(stream)),
                Some(Err(error)) => {
                    failure.get_or_insert(error);
                    if running.is_empty() && waiting.len() == 0 {
                        break;
                    }
                }
                None => break,
            },
            () = next => {}
        }
    }
    Err(failure.unwrap_or_else(|| io::ErrorKind::NotConnected.into()))
}

/// The addresses with their families in turn, starting with that of the first.
fn in_turn(first: SocketAddr, more: &[SocketAddr]) -> Vec<SocketAddr> {
    let all = std::iter::once(first).chain(more.iter().copied());
    let (same, other): (Vec<_>, Vec<_>) = all.partition(|address| address.is_ipv4() == first.is_ipv4());
    let mut out = Vec::with_capacity(more.len() + 1);
    let (mut same, mut other) = (same.into_iter(), other.into_iter());
    loop {
        let next = [same.next(), other.next()];
        if next == [None, None] {
            return out;
        }
        out.extend(next.into_iter().flatten());
    }
}

async fn connect_tcp(cluster: &Cluster, address: SocketAddr) -> io::Result<TcpStream> {
    let socket = socket2::Socket::new(
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

fn bind(socket: &socket2::Socket, source: IpAddr, target: SocketAddr) -> io::Result<()> {
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
        Err(error) => Err(io::Error::new(
            error.kind(),
            Unbound {
                address: source,
                source: error,
            },
        )),
        Ok(()) => Ok(()),
    }
}

/// A connection's own end could not be bound to what `upstream_bind_config` says.
#[derive(Debug, thiserror::Error)]
#[error("binding the connection to {address}: {source}; use an address of this host")]
struct Unbound {
    address: IpAddr,
    source: io::Error,
}

/// Whether a connection was not even begun, because its own end could not be bound.
pub fn is_unbound(error: &io::Error) -> bool {
    error.get_ref().is_some_and(|inner| inner.is::<Unbound>())
}

/// Marks a socket as the proxy's own, so that interception lets it pass.
fn mark(socket: &socket2::Socket, mark: u32) {
    if MARK_ALLOWED.load(Ordering::Relaxed) && SockRef::from(socket).set_mark(mark).is_err() {
        MARK_ALLOWED.store(false, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_both_families_are_tried_in_turn() {
        let at = |text: &str| text.parse::<SocketAddr>().unwrap();
        let more = [at("10.0.0.2:1"), at("[::1]:1"), at("10.0.0.3:1"), at("[::2]:1")];
        assert_eq!(
            in_turn(at("10.0.0.1:1"), &more),
            [more[1], more[3]]
                .into_iter()
                .zip([at("10.0.0.1:1"), more[0]])
                .flat_map(|(v6, v4)| [v4, v6])
                .chain([more[2]])
                .collect::<Vec<_>>()
        );
    }
}
