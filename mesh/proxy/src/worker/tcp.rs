//! TCP: bytes joined both ways, counted, with an idle limit. An idle connection holds no buffer: each thread has one.

use std::cell::{Cell, RefCell};
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Poll, ready};
use std::time::{Duration, Instant};

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadBuf};
use tokio::net::TcpStream;
use tokio_util::either::Either;

use super::Worker;
use super::connection_log::{ConnectionLog, periodically};
use super::filters::on_demand;
use super::io::Io;
use super::seldom::Seldom;
use super::tcp_tunnel::{self, Granted};
use crate::config::hash::hash_of_source;
use crate::config::listener::{Direction, Listener, TcpProxy, TcpTargets};
use crate::config::slot::{ClusterSlot, Directory};
use crate::metrics::clusters::Connection;
use crate::metrics::events::{ClusterEvent, TcpEvent, WorkerEvents};
use crate::metrics::flags::Flags;
use crate::metrics::peer::{ServiceIdentity, Workload};
use crate::metrics::series::{Reporter, TcpLabels, TcpSeries};
use crate::observe::record::LogType;
use crate::policy::filter_state::{Factory, FilterState};
use crate::tls::info::ConnectionTls;
use crate::upstream::balance::Wish;
use crate::upstream::cluster::{Active, Host, WorkerCluster};
use crate::upstream::connect::{self, Connected, Socket, Speaking, Stream};
use crate::upstream::outlier::Event;

/// Bytes of a greeting that are read at most before it is known who speaks first.
const EARLY: usize = 1024;
/// Bytes moved at a time.
const BUFFER: usize = 64 * 1024;

thread_local! {
    static SCRATCH: RefCell<Vec<u8>> = RefCell::new(vec![0; BUFFER]);
}

/// Who wants to be connected.
#[derive(Clone, Copy)]
pub(super) struct Client<'a> {
    /// Itself.
    pub source: SocketAddr,
    /// Where it wants to go.
    pub destination: SocketAddr,
    /// TLS, where we end it.
    pub tls: Option<&'a ConnectionTls>,
    /// The name in its TLS handshake.
    pub server_name: Option<&'a str>,
    /// Whether that names its cluster.
    pub by_server_name: bool,
    /// What network filters have set.
    pub state: &'a FilterState,
}

/// There is no connection to join with; why has been recorded.
#[derive(Debug)]
pub struct NoUpstream;

/// A connection towards an endpoint, ready to be joined.
pub struct Upstream {
    stream: End,
    /// Read already: what a server inside of TLS said first.
    early: Vec<u8>,
    labels: TcpLabels,
    cluster: Arc<str>,
    host: Rc<Host>,
    attempts: u32,
    _active: Active,
    /// Where its bytes are counted, if the pool does not.
    connection: Option<Connection>,
    local: Option<SocketAddr>,
    tls: Option<Arc<ConnectionTls>>,
}

/// What joins the client with its endpoint.
enum End {
    /// A connection of its own.
    Direct(Stream),
    /// What is inside of a CONNECT.
    Tunnel(Granted),
}

impl Upstream {
    /// Waits until the endpoint has said something (or gone).
    pub async fn readable(mut self) -> io::Result<Self> {
        match &mut self.stream {
            End::Direct(Stream::Plain(socket)) => match socket.below() {
                Either::Left(socket) => socket.readable().await?,
                Either::Right(socket) => socket.readable().await?,
            },
            // Only what is inside counts; the socket is readable for session tickets as well.
            End::Direct(Stream::Tls(stream)) => {
                self.early.reserve(EARLY);
                stream.read_buf(&mut self.early).await?;
            }
            End::Tunnel(tunnel) => {
                self.early.reserve(EARLY);
                tunnel.stream.read_buf(&mut self.early).await?;
            }
        }
        Ok(self)
    }
}

/// Connects to where `proxy` sends connections. A failure is recorded in `log`; without one it means nothing: somebody
/// wanted to see whether the server speaks first.
pub(super) async fn open(
    worker: &Rc<Worker>,
    proxy: &TcpProxy,
    listener: &Listener,
    client: &Client<'_>,
    mut log: Option<&mut ConnectionLog>,
) -> Result<Upstream, NoUpstream> {
    let (source, destination) = (client.source, client.destination);
    // A name that comes with the connection may only choose among clusters that exist.
    let named = client
        .server_name
        .filter(|_| client.by_server_name)
        .and_then(|name| proxy.directory.find(name));
    let wanted = client.state.known(Factory::TcpCluster);
    let unknown;
    let named = match wanted {
        None => named,
        Some(name) => match find(worker, proxy, &proxy.directory, name).await {
            Some(slot) => Some(slot),
            // What was asked for by name is not replaced by something else.
            None => {
                unknown = name;
                if let Some(log) = &mut log {
                    let labels = TcpLabels {
                        reporter: Reporter::Source,
                        peer: Workload::unknown(),
                        service: ServiceIdentity::unknown(),
                        flags: Flags::NO_CLUSTER,
                        principals: None,
                    };
                    log.flag(Flags::NO_CLUSTER);
                    log.cluster = Some(unknown.into());
                    proxy.counted.note(TcpEvent::NoRoute, worker.id);
                    record_failure(worker, proxy, &labels, listener, log);
                }
                return Err(NoUpstream);
            }
        },
    };
    let (slot, own_criteria) = match (&named, &proxy.targets) {
        (Some(slot), _) | (None, TcpTargets::One(slot)) => (slot, None),
        (None, TcpTargets::Weighted(slots, weights, turn)) => {
            let index = weights.pick(turn.next(worker.id));
            let own = proxy.target_criteria.get(index).and_then(Option::as_deref);
            (&slots[index], own)
        }
    };
    let reporter = match listener.direction {
        Direction::Inbound => Reporter::Destination,
        Direction::Outbound | Direction::Unspecified => Reporter::Source,
    };
    // Who only wanted to see whether the server speaks first comes again.
    let counts = log.is_some();
    let mut no_upstream =
        |mut labels: TcpLabels, flags, failure: String, attempts, host: Option<Rc<Host>>| {
            if let Some(log) = &mut log {
                labels.flags = flags;
                log.flag(flags);
                log.cluster = Some(slot.name.clone());
                log.failure = failure;
                log.attempts = attempts;
                log.host = host;
                record_failure(worker, proxy, &labels, listener, log);
            }
            Err(NoUpstream)
        };
    let mut labels = TcpLabels {
        reporter,
        peer: Workload::unknown(),
        service: ServiceIdentity::unknown(),
        flags: Flags::default(),
        principals: match reporter {
            Reporter::Destination => client.tls.and_then(|tls| tls.principals.clone()),
            Reporter::Source => None,
        },
    };
    if let Some(rules) = &proxy.on_demand {
        if slot.exists() {
            slot.mark_used();
        } else {
            // Boxed: few connections wait.
            Box::pin(on_demand::cluster_named(worker, rules, &slot.name)).await;
        }
    }
    let Some(cluster) = worker.cluster(slot) else {
        if counts {
            proxy.counted.note(TcpEvent::NoRoute, worker.id);
        }
        return no_upstream(labels, Flags::NO_CLUSTER, String::new(), 0, None);
    };
    labels.service = cluster
        .config
        .service
        .clone()
        .unwrap_or_else(|| ServiceIdentity::new(&cluster.slot.name, &cluster.slot.name, ""));
    let mut tried: Vec<Rc<Host>> = Vec::new();
    let mut failure = String::new();
    for attempt in 1..=proxy.max_connect_attempts {
        let wish = Wish {
            hash: proxy.hash_by_source.then(|| hash_of_source(source.ip())),
            criteria: own_criteria.or(proxy.criteria.as_deref()),
            tried: &tried,
            attempts: 5,
            ..Default::default()
        };
        let Some(host) = cluster.pick(&wish, Some(destination)) else {
            slot.counted.note(ClusterEvent::CxNoneHealthy);
            return no_upstream(
                labels,
                Flags::NO_HEALTHY_UPSTREAM,
                failure,
                attempt - 1,
                tried.pop(),
            );
        };
        if reporter == Reporter::Source
            && let Some(workload) = &host.endpoint.workload
        {
            labels.peer = workload.clone();
        }
        let tunneling = proxy
            .tunneling
            .as_ref()
            .filter(|_| client.state.known(Factory::NoTunneling) != Some("true"));
        let reached = match tunneling {
            None => connect_to(worker, &cluster, &host, client)
                .await
                .map(|(connected, connection)| {
                    let stream = End::Direct(connected.stream);
                    (stream, connected.tls, connected.local, Some(connection))
                }),
            // Boxed: few connections are tunnelled, and each connection's future would carry its state.
            Some(tunneling) => Box::pin(tcp_tunnel::open(worker, &cluster, &host, tunneling, client))
                .await
                .map(|granted| {
                    let (tls, local) = (granted.lease.tls().cloned(), granted.lease.local());
                    (End::Tunnel(granted), tls, local, None)
                }),
        };
        match reached {
            Ok((stream, tls, local, connection)) => {
                if reporter == Reporter::Source {
                    labels.principals = tls.as_ref().and_then(|tls| tls.principals.clone());
                }
                return Ok(Upstream {
                    local,
                    tls,
                    stream,
                    early: Vec::new(),
                    labels,
                    cluster: slot.name.clone(),
                    attempts: attempt,
                    _active: Active::on(&host),
                    connection,
                    host,
                });
            }
            Err(text) => failure = text,
        }
        tried.push(host);
    }
    slot.counted.note(ClusterEvent::CxConnectAttemptsExceeded);
    let mut flags = Flags::UPSTREAM_CONNECTION_FAILURE;
    if proxy.max_connect_attempts > 1 {
        flags.add(Flags::RETRY_LIMIT);
    }
    no_upstream(labels, flags, failure, proxy.max_connect_attempts, tried.pop())
}

/// The cluster of that name; where the proxy says so, one that does not exist is waited for.
async fn find(
    worker: &Worker,
    proxy: &TcpProxy,
    directory: &Directory,
    name: &str,
) -> Option<Arc<ClusterSlot>> {
    match (directory.find(name), &proxy.on_demand) {
        (None, Some(rules)) => {
            Box::pin(on_demand::cluster_named(worker, rules, name)).await;
            directory.find(name)
        }
        (found, _) => found,
    }
}

async fn connect_to(
    worker: &Worker,
    cluster: &WorkerCluster,
    host: &Host,
    client: &Client<'_>,
) -> Result<(Connected, Connection), String> {
    let config = &cluster.config;
    let options = config.connect_options(None, client.state, client.source, client.destination);
    // As in Envoy a connection is a request as well.
    let cells = cluster.cells(&worker.recorder);
    cells.pending.add(1);
    let mut connection = cells.clone().connecting(&host.endpoint.state);
    let work = connect::connect(config, &host.endpoint, Speaking::Bytes, &options);
    let result = tokio::time::timeout(config.connect_timeout, work).await;
    let counters = worker.recorder.counters();
    match result {
        Ok(Ok(connected)) => {
            counters.upstream_connections.add(1);
            // A connection is a success as TCP goes.
            cluster.record(host, Event::Status(200));
            connection.made();
            connection.shared().begin();
            cells.total.add(1);
            Ok((connected, connection))
        }
        failed => {
            counters.upstream_connect_failures.add(1);
            match &failed {
                Ok(Err(error)) if connect::is_unbound(error) => connection.unbound(),
                failed => connection.failed(failed.is_err()),
            }
            cluster.slot.counted.note(ClusterEvent::RqPendingFailure);
            if cluster.record(host, Event::LocalFailure) {
                counters.ejections.add(1);
            }
            Err(match failed {
                Ok(Err(error)) => error.to_string(),
                _ => "connection timeout".to_owned(),
            })
        }
    }
}

fn record_failure(
    worker: &Worker,
    proxy: &TcpProxy,
    labels: &TcpLabels,
    listener: &Listener,
    log: &ConnectionLog,
) {
    if proxy.stats {
        let series = worker.recorder.tcp(labels);
        series.opened.add(1);
        series.closed.add(1);
    }
    if log.is_wanted() {
        return;
    }
    worker.log(
        serde_json::json!({
            "listener": &*listener.name,
            "upstream_cluster": log.cluster.as_deref(),
            "response_flags": labels.flags.to_string(),
            "upstream_transport_failure_reason": log.failure,
            "downstream_local_address": log.addresses.local.to_string(),
        })
        .to_string(),
    );
}

/// Counts a connection of a TCP proxy for as long as it lives.
pub(super) struct Open {
    counted: Arc<WorkerEvents<TcpEvent>>,
    worker: usize,
}

impl Open {
    pub(super) fn of(proxy: &TcpProxy, worker: usize) -> Self {
        proxy.counted.note(TcpEvent::Opened, worker);
        Self {
            counted: proxy.counted.clone(),
            worker,
        }
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.counted.note(TcpEvent::Closed, self.worker);
    }
}

/// Counts a connection in its series until dropped.
struct Counted(Option<Arc<TcpSeries>>);

impl Drop for Counted {
    fn drop(&mut self) {
        if let Some(series) = &self.0 {
            series.closed.add(1);
        }
    }
}

/// Joins the two until both are done, one breaks, or nothing moves for too long. `prefix` goes upstream first.
pub(super) async fn join(
    worker: Rc<Worker>,
    proxy: Arc<TcpProxy>,
    downstream: Io,
    prefix: Vec<u8>,
    upstream: Upstream,
    mut log: Box<ConnectionLog>,
) {
    log.cluster = Some(upstream.cluster);
    log.attempts = upstream.attempts;
    log.host = Some(upstream.host);
    log.upstream_tls.clone_from(&upstream.tls);
    log.upstream_local = upstream.local;
    if proxy.log_connected {
        log.write_meanwhile(LogType::TcpUpstreamConnected);
    }
    let log = &*log;
    let series = proxy.stats.then(|| worker.recorder.tcp(&upstream.labels));
    if let Some(series) = &series {
        series.opened.add(1);
    }
    let counted = Counted(series);
    let cells = upstream.connection.as_ref().map(|own| own.cells().clone());
    let shared = upstream.connection.as_ref().map(|own| own.shared().clone());
    let last = Cell::new(Instant::now());
    let received = |count: usize| {
        last.set(Instant::now());
        log.received.set(log.received.get() + count as u64);
        if let Some(series) = &counted.0 {
            series.received.add(count as u64);
        }
        if let Some(cells) = &cells {
            cells.sent.add(count as u64);
        }
        proxy.bytes[0].add_many(worker.id, count as u64);
    };
    let sent = |count: usize| {
        last.set(Instant::now());
        log.sent.set(log.sent.get() + count as u64);
        if let Some(series) = &counted.0 {
            series.sent.add(count as u64);
        }
        if let Some(cells) = &cells {
            cells.received.add(count as u64);
        }
        proxy.bytes[1].add_many(worker.id, count as u64);
    };
    let both = async {
        // The first error ends both; a mere end of stream is passed on and leaves the other direction open.
        let _ = match (downstream, upstream.stream) {
            (Io::Plain(downstream), End::Direct(Stream::Plain(upstream))) => {
                join_sockets(downstream.into_below(), upstream, &prefix, received, sent).await
            }
            (downstream, End::Direct(stream)) => {
                relay(downstream, stream, &prefix, &upstream.early, received, sent).await
            }
            (downstream, End::Tunnel(tunnel)) => {
                relay(
                    downstream,
                    tunnel.stream,
                    &prefix,
                    &upstream.early,
                    received,
                    sent,
                )
                .await
            }
        };
    };
    let limits = async {
        tokio::select! {
            () = quiet(&last, proxy.idle_timeout) => {
                proxy.counted.note(TcpEvent::IdleTimeout, worker.id);
                log.local_close.set("tcp_session_idle_timeout");
            }
            () = worker.closing() => log.local_close.set("draining"),
            () = lasting(proxy.max_duration) => {
                proxy.counted.note(TcpEvent::MaxDuration, worker.id);
                log.flag(Flags::DURATION_TIMEOUT);
                log.local_close.set("max_connection_duration_reached");
            }
            () = periodically(log, proxy.log_interval) => {}
        }
    };
    tokio::select! {
        biased;
        // Each side has said that it is over, or one has broken.
        () = both => {
            if let Some(shared) = &shared {
                shared.ended_by_peer();
            }
        }
        () = Seldom::new(limits) => {}
    }
}

/// Ends after the longest time that a connection may last.
async fn lasting(limit: Option<Duration>) {
    match limit {
        Some(limit) => tokio::time::sleep(limit).await,
        None => std::future::pending().await,
    }
}

/// Ends when nothing has moved for `limit`.
async fn quiet(last: &Cell<Instant>, limit: Option<Duration>) {
    let Some(limit) = limit else {
        return std::future::pending().await;
    };
    loop {
        let passed = last.get().elapsed();
        if passed >= limit {
            return;
        }
        tokio::time::sleep(limit.saturating_sub(passed)).await;
    }
}

/// Both directions between sockets. The halves are tokio's, whose reads know that a short one has emptied the socket: a
/// message costs one read and one write, and no read that only finds nothing.
async fn join_sockets(
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
async fn relay(
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
