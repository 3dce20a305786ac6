//! Accepting connections: original destination, protocol detection, filter chain.

use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use socket2::SockRef;
use tokio::net::{TcpListener, TcpStream};
use tokio::time::Instant;

mod first_bytes;

use first_bytes::{read_preface, read_proxy_header, read_until_detected};

use super::connection_log::ConnectionLog;
use super::io::{Io, Socket};
use super::sniff::{Detected, Http};
use super::{Command, Worker, http, tcp};
use crate::clock;
use crate::config::hcm::{Codec, HttpManager};
use crate::config::listener::{ConnectionFacts, Direction, FilterChain, Handler, Listener, NetworkFilters};
use crate::config::listener_filters::Taken;
use crate::config::slot::ListenerSlot;
use crate::metrics::events::ListenerEvent;
use crate::metrics::flags::Flags;
use crate::overload::Action;
use crate::policy::facts::{Facts, PeerIdentity};
use crate::policy::filter_state::FilterState;
use crate::policy::network::NetworkFilter;
use crate::policy::stats::OpenCount;
use crate::random;
use crate::stream::{Layer, Together};
use crate::tls::info::ConnectionTls;
use crate::tls::rewind::Rewind;

/// Pause after an accept that failed for lack of descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// Limit for the first bytes of an HTTP connection, when nothing else bounds them.
const FIRST_BYTES: Duration = Duration::from_secs(3600);

/// Accepts until aborted.
pub(super) async fn run(worker: Rc<Worker>, slot: Arc<ListenerSlot>, socket: TcpListener) {
    let overload = worker.shared.overload.clone();
    loop {
        overload.while_saturated(Action::StopAcceptingConnections).await;
        match socket.accept().await {
            Ok(_) if overload.hits(Action::RejectIncomingConnections, random::next) => {
                worker.recorder.counters().refused_connections.add(1);
                slot.load()
                    .traffic
                    .note_listener(ListenerEvent::OverloadReject, worker.id);
            }
            Ok((stream, remote)) => balance(&worker, &slot, stream, remote),
            Err(error) => match error.kind() {
                // The client gave up before it was accepted.
                io::ErrorKind::ConnectionAborted | io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock => {
                }
                _ => {
                    tracing::warn!(listener = %slot.load().name, %error, "cannot accept");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            },
        }
    }
}

/// A connection's share in its worker's number, for exact balance.
#[derive(Debug)]
pub struct Share {
    slot: Arc<ListenerSlot>,
    worker: usize,
}

impl Share {
    fn of(slot: &Arc<ListenerSlot>, worker: usize) -> Self {
        slot.connections[worker].fetch_add(1, Ordering::Relaxed);
        Self {
            slot: slot.clone(),
            worker,
        }
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.slot.connections[self.worker].fetch_sub(1, Ordering::Relaxed);
    }
}

/// Serves an accepted connection here, or where the listener wants the numbers exactly even, on the worker with the
/// fewest connections of it.
fn balance(worker: &Rc<Worker>, slot: &Arc<ListenerSlot>, stream: TcpStream, remote: SocketAddr) {
    if !slot.load().exact_balance {
        return serve(worker.clone(), slot.clone(), stream, remote, None);
    }
    let count = |index: usize| slot.connections[index].load(Ordering::Relaxed);
    let least = (0..slot.connections.len())
        .min_by_key(|index| (count(*index), *index != worker.id))
        .unwrap_or(worker.id);
    let share = Share::of(slot, least);
    if least == worker.id {
        return serve(worker.clone(), slot.clone(), stream, remote, Some(share));
    }
    let neighbours = worker.shared.neighbours.load();
    let Some(neighbour) = neighbours.get(least) else {
        return;
    };
    match stream.into_std() {
        Ok(stream) => {
            let command = Command::Serve(slot.clone(), stream, remote, share);
            // A neighbour that has no room is busy beyond help, or has ended: the connection is closed, as when the
            // kernel's queue is full.
            if neighbour.try_send(command).is_err() {
                tracing::warn!(worker = least, "a connection could not be handed over");
            }
        }
        Err(error) => tracing::warn!(%error, "a connection could not be handed over"),
    }
}

/// Serves a connection on this worker.
pub(super) fn serve(
    worker: Rc<Worker>,
    slot: Arc<ListenerSlot>,
    stream: TcpStream,
    remote: SocketAddr,
    share: Option<Share>,
) {
    // Beyond the limit of all listeners a connection is closed at once, as in Envoy.
    let Some(counted) = worker.shared.overload.count_connection() else {
        worker.recorder.counters().refused_connections.add(1);
        slot.load()
            .traffic
            .note_listener(ListenerEvent::GlobalOverflow, worker.id);
        return;
    };
    let open = worker.open_connection();
    worker.tasks.clone().spawn_local(async move {
        let listener = slot.load();
        drop(slot);
        let mut place = Entrance::new(listener.clone(), worker.id);
        // Boxed, so that what detection and handshakes need is given back while requests are served.
        if let Some(http) = Box::pin(connection(worker, listener, stream, remote, &mut place)).await {
            http.serve().await;
        }
        drop((open, share, counted, place));
    });
}

/// A connection in its listener's statistics: as Envoy counts, it is one once its filter chain is known, and waits before.
struct Entrance {
    listener: Option<Arc<Listener>>,
    worker: usize,
    _open: Option<OpenCount>,
}

impl Entrance {
    fn new(listener: Arc<Listener>, worker: usize) -> Self {
        listener.traffic.note_listener(ListenerEvent::Accepted, worker);
        Self {
            listener: Some(listener),
            worker,
            _open: None,
        }
    }

    fn note(&self, event: ListenerEvent) {
        if let Some(listener) = &self.listener {
            listener.traffic.note_listener(event, self.worker);
        }
    }

    /// Its filter chain is known.
    fn enter(&mut self) {
        if let Some(listener) = self.listener.take() {
            listener
                .traffic
                .note_listener(ListenerEvent::Classified, self.worker);
            self._open = Some(listener.traffic.open(self.worker));
        }
    }
}

impl Drop for Entrance {
    fn drop(&mut self) {
        self.note(ListenerEvent::Classified);
    }
}

/// Where the client wanted to go before interception changed it.
fn original_destination(stream: &TcpStream, local: SocketAddr) -> SocketAddr {
    let socket = SockRef::from(stream);
    // A dual-stack socket with an IPv4 peer must be asked in IPv4's way.
    let canonical = SocketAddr::new(local.ip().to_canonical(), local.port());
    let answer = if canonical.is_ipv4() {
        socket.original_dst_v4()
    } else {
        socket.original_dst_v6()
    };
    // Without connection tracking there is no answer, and the destination is the local address.
    answer
        .ok()
        .and_then(|address| address.as_socket())
        .unwrap_or(canonical)
}

/// Finds out what a connection is, and serves it unless it is HTTP.
async fn connection(
    worker: Rc<Worker>,
    bound: Arc<Listener>,
    stream: TcpStream,
    remote: SocketAddr,
    entrance: &mut Entrance,
) -> Option<HttpConnection> {
    // Small messages both ways; failures do no harm.
    let _ = stream.set_nodelay(true);
    let local = stream.local_addr().ok()?;
    let mut destination = SocketAddr::new(local.ip().to_canonical(), local.port());
    let Some(mut before) = bound.before() else {
        bound.without_filter.add(worker.id);
        return None;
    };
    if bound.use_original_dst || before.original_dst {
        destination = original_destination(&stream, local);
    }
    let direct = SocketAddr::new(remote.ip().to_canonical(), remote.port());
    let mut addresses = http::Addresses {
        remote: direct,
        direct,
        local: destination,
        connection: http::next_connection(),
    };
    let mut log = ConnectionLog::new(worker.clone(), bound.logs.clone(), addresses);
    let mut prefix = Vec::new();
    if let Some(rules) = &before.proxy_protocol {
        let deadline = Instant::now() + bound.detection_timeout;
        match read_proxy_header(&stream, &mut prefix, rules, &mut log.metadata, deadline).await {
            Ok(Some((source, told))) => (addresses.remote, addresses.local) = (source, told),
            Ok(None) => {}
            Err(error) => {
                entrance.note(match error.kind() {
                    io::ErrorKind::TimedOut => ListenerEvent::FilterTimeout,
                    io::ErrorKind::UnexpectedEof => ListenerEvent::FilterRemoteClose,
                    _ => ListenerEvent::FilterError,
                });
                log_handshake(&worker, &bound, &mut log, &error);
                return None;
            }
        }
        log.addresses = addresses;
    }
    let destination = addresses.local;
    let mut listener = bound;
    if listener.use_original_dst {
        let virtuals = worker.shared.virtual_listeners.load();
        if let Some(found) = virtuals.find(destination) {
            listener = found.clone();
            log.follow(listener.logs.clone());
            match listener.before() {
                Some(own) => before = own,
                None => {
                    listener.without_filter.add(worker.id);
                    return None;
                }
            }
        }
    }
    let mut detected = Detected::default();
    let port = destination.port();
    let inspect = before.inspect_tls.applies(port) || before.inspect_http.applies(port);
    drop(before);
    let mut timed_out = false;
    if inspect {
        let deadline = Instant::now() + listener.detection_timeout;
        match read_until_detected(&stream, &mut prefix, deadline).await {
            Ok(Some(found)) => detected = found,
            Ok(None) if listener.continue_on_timeout => {
                entrance.note(ListenerEvent::FilterTimeout);
                timed_out = true;
            }
            Ok(None) => {
                entrance.note(ListenerEvent::FilterTimeout);
                log.local_close.set("listener_filter_timeout");
                return None;
            }
            Err(error) => {
                entrance.note(match error.kind() {
                    io::ErrorKind::UnexpectedEof => ListenerEvent::FilterRemoteClose,
                    _ => ListenerEvent::FilterError,
                });
                return None;
            }
        }
    }
    let (chain, filters) = choose(&worker, &listener, &detected, &mut log, entrance)?;
    entrance.enter();
    if timed_out
        && prefix.is_empty()
        && chain.tls.is_none()
        && let Handler::Tcp(proxy) = &filters.handler
    {
        // Nobody has spoken. The TCP chain's upstream is asked now, and whoever speaks first decides: a server that
        // greets gets its TCP connection, a client that was merely slow still gets HTTP, also where nobody answers.
        let client = tcp::Client {
            source: addresses.remote,
            destination,
            tls: None,
            server_name: None,
            by_server_name: false,
            state: &FilterState::EMPTY,
        };
        let greeting = async {
            match tcp::open(&worker, proxy, &listener, &client, None).await {
                Ok(upstream) => match upstream.readable().await {
                    Ok(upstream) => upstream,
                    Err(_) => std::future::pending().await,
                },
                Err(tcp::NoUpstream) => std::future::pending().await,
            }
        };
        let upstream = tokio::select! {
            biased;
            result = read_until_detected(&stream, &mut prefix, Instant::now() + FIRST_BYTES) => match result {
                Ok(Some(found)) => {
                    detected = found;
                    None
                }
                Ok(None) | Err(_) => return None,
            },
            upstream = greeting => Some(upstream),
            () = worker.closing() => return None,
        };
        if let Some(upstream) = upstream {
            // What the server has said so far has reached nobody.
            let place = match &filters.limit {
                None => None,
                Some(limit) => match limit.take() {
                    Some(place) => Some(place),
                    None => {
                        let error = io::Error::other("connection_limit");
                        log_handshake(&worker, &listener, &mut log, &error);
                        return None;
                    }
                },
            };
            if !filters.policies.is_empty()
                && !Box::pin(admitted(&worker, &listener, &filters, &mut log)).await
            {
                return None;
            }
            log.enter(proxy);
            let _open = tcp::Open::of(proxy, worker.id);
            let stream = Io::Plain(Socket::over(stream, Together));
            tcp::join(worker, proxy.clone(), stream, prefix, upstream, log).await;
            drop(place);
            return None;
        }
        let chosen = choose(&worker, &listener, &detected, &mut log, entrance)?;
        return handle(worker, listener, chosen, stream, prefix, detected, log).await;
    }
    handle(worker, listener, (chain, filters), stream, prefix, detected, log).await
}

/// Whether the chain's network filters let the connection through; a denial is logged, and may take its time.
async fn admitted(
    worker: &Worker,
    listener: &Listener,
    filters: &NetworkFilters,
    log: &mut ConnectionLog,
) -> bool {
    match judge(worker, listener, filters, log) {
        Ok(()) => true,
        Err(delay) => {
            if let Some(delay) = delay {
                tokio::select! {
                    () = tokio::time::sleep(delay) => {}
                    () = worker.closing() => {}
                }
            }
            false
        }
    }
}

/// The verdict of the chain's network filters; an error is how long to wait until the connection is closed.
fn judge(
    worker: &Worker,
    listener: &Listener,
    filters: &NetworkFilters,
    log: &mut ConnectionLog,
) -> Result<(), Option<Duration>> {
    let addresses = log.addresses;
    for policy in &filters.policies {
        if let NetworkFilter::SetFilterState(state) = &**policy {
            log.set_state(&state.connected);
            if log.tls.is_some() {
                log.set_state(&state.handshaken);
            }
            continue;
        }
        let facts = Facts {
            direct_remote: addresses.direct,
            source: addresses.remote,
            local: addresses.local,
            server_name: log.server_name.as_deref(),
            peer: log.tls.as_deref().and_then(PeerIdentity::of),
            request: None,
            forwarded: false,
            metadata: &log.metadata,
        };
        let (denied, noted) = policy.judge(&facts, clock::now_ms(), worker.id);
        if let Some(denied) = denied {
            let flags = if denied.limited {
                Flags::RATE_LIMITED
            } else {
                Flags::default()
            };
            log.flag(flags);
            log.termination = denied.details.into();
            if !log.is_wanted() {
                worker.log(
                    serde_json::json!({
                        "listener": &*listener.name,
                        "response_flags": flags.to_string(),
                        "connection_termination_details": &*log.termination,
                        "requested_server_name": log.server_name,
                        "downstream_remote_address": addresses.remote.to_string(),
                        "downstream_local_address": addresses.local.to_string(),
                    })
                    .to_string(),
                );
            }
            return Err(denied.delay);
        }
        if let Some(noted) = noted {
            log.metadata = noted;
        }
    }
    Ok(())
}

/// The chain for a connection and its filters as they are now; `None` closes it.
fn choose(
    worker: &Worker,
    listener: &Listener,
    detected: &Detected,
    log: &mut ConnectionLog,
    entrance: &Entrance,
) -> Option<(Arc<FilterChain>, Arc<NetworkFilters>)> {
    let addresses = log.addresses;
    log.server_name = detected.server_name.as_deref().map(Box::from);
    let alpn: Vec<&str> = match detected.http {
        Some(Http::One) => vec!["http/1.1"],
        Some(Http::Two) => vec!["h2c"],
        None => detected.alpn.iter().map(String::as_str).collect(),
    };
    let facts = ConnectionFacts {
        destination: addresses.local,
        source: addresses.remote,
        direct_source: addresses.direct,
        transport: if detected.tls { "tls" } else { "raw_buffer" },
        server_name: detected.server_name.as_deref(),
        application: &alpn,
    };
    let chain = listener.select(&facts).cloned();
    if chain.is_none() {
        entrance.note(ListenerEvent::NoFilterChain);
        log.flag(Flags::NO_ROUTE);
        if !log.is_wanted() {
            worker.log(
                serde_json::json!({
                    "listener": &*listener.name,
                    "response_flags": Flags::NO_ROUTE.to_string(),
                    "response_code_details": "filter_chain_not_found",
                    "requested_server_name": detected.server_name,
                    "downstream_remote_address": addresses.remote.to_string(),
                    "downstream_local_address": addresses.local.to_string(),
                })
                .to_string(),
            );
        }
    }
    let chain = chain?;
    match chain.filters() {
        Some(filters) => Some((chain, filters)),
        None => {
            listener.without_network_filter.add(worker.id);
            log.local_close.set("no_filters");
            None
        }
    }
}

async fn handle(
    worker: Rc<Worker>,
    listener: Arc<Listener>,
    (chain, filters): (Arc<FilterChain>, Arc<NetworkFilters>),
    stream: TcpStream,
    mut prefix: Vec<u8>,
    detected: Detected,
    mut log: Box<ConnectionLog>,
) -> Option<HttpConnection> {
    let direction = listener.direction;
    let addresses = log.addresses;
    let place = match &filters.limit {
        None => None,
        Some(limit) => match limit.take() {
            Some(place) => Some(place),
            None => {
                let error = io::Error::other("connection_limit");
                log_handshake(&worker, &listener, &mut log, &error);
                tokio::time::sleep(limit.delay).await;
                return None;
            }
        },
    };
    let mut server_name = detected.server_name.map(Box::from);
    let (mut io, tls) = match &chain.tls {
        None => (Io::Plain(Socket::over(stream, Together)), None),
        Some(context) => {
            let stream = Rewind::new(std::mem::take(&mut prefix), Socket::over(stream, Together));
            match context.accept(stream, chain.handshake_timeout).await {
                Ok((stream, facts)) => {
                    server_name.clone_from(&facts.server_name);
                    let stream = Layer::over(stream, Together);
                    (Io::Tls(Box::new(stream)), Some(Arc::new(facts)))
                }
                Err(error) => {
                    if error.kind() == io::ErrorKind::TimedOut {
                        let traffic = &listener.traffic;
                        traffic.note_listener(ListenerEvent::HandshakeTimeout, worker.id);
                    }
                    log_handshake(&worker, &listener, &mut log, &error);
                    return None;
                }
            }
        }
    };
    log.server_name.clone_from(&server_name);
    log.tls.clone_from(&tls);
    if !filters.policies.is_empty() && !Box::pin(admitted(&worker, &listener, &filters, &mut log)).await {
        return None;
    }
    match &filters.handler {
        Handler::Tcp(proxy) => {
            let proxy = proxy.clone();
            log.enter(&proxy);
            let _open = tcp::Open::of(&proxy, worker.id);
            let client = tcp::Client {
                source: addresses.remote,
                destination: addresses.local,
                tls: tls.as_deref(),
                server_name: server_name.as_deref(),
                by_server_name: filters.by_server_name,
                state: &log.metadata.state.clone(),
            };
            // A failure has been recorded where it happened; the client sees the connection close.
            if let Ok(upstream) = tcp::open(&worker, &proxy, &listener, &client, Some(&mut log)).await {
                tcp::join(worker, proxy, io, prefix, upstream, log).await;
            }
            None
        }
        Handler::Http(manager) => {
            let manager = manager.clone();
            // Not kept over the life of the connection: the listener may be replaced meanwhile.
            drop(listener);
            let state = log.metadata.state.clone();
            // Lines of requests are the manager's; those of connections only where the listener wants them.
            let log = log.is_wanted().then_some(log);
            let agreed = tls.as_ref().and_then(|tls| tls.alpn.as_deref());
            let http2 = match (manager.codec, agreed) {
                (Codec::Http1, _) => false,
                (Codec::Http2, _) | (Codec::Auto, Some("h2")) => true,
                (Codec::Auto, Some("http/1.1" | "http/1.0")) => false,
                (Codec::Auto, _) => {
                    if prefix.is_empty() {
                        let wait = manager.idle_timeout.unwrap_or(FIRST_BYTES);
                        let limit = manager.headers_timeout;
                        let read = read_preface(&mut io, &mut prefix, &worker, limit);
                        match tokio::time::timeout(wait, read).await {
                            Ok(Ok(())) => {}
                            Ok(Err(_)) | Err(_) => return None,
                        }
                    }
                    prefix.starts_with(b"PRI * HTTP/2")
                }
            };
            Some(HttpConnection {
                worker,
                io,
                prefix,
                http2,
                chain,
                manager,
                direction,
                addresses,
                tls,
                server_name,
                state,
                log,
                place,
            })
        }
    }
}

/// A connection that turned out to be HTTP, about to be served.
struct HttpConnection {
    worker: Rc<Worker>,
    io: Io,
    prefix: Vec<u8>,
    http2: bool,
    chain: Arc<FilterChain>,
    manager: Arc<HttpManager>,
    direction: Direction,
    addresses: http::Addresses,
    tls: Option<Arc<ConnectionTls>>,
    server_name: Option<Box<str>>,
    /// What network filters have set.
    state: FilterState,
    /// Written when the connection ends, where the listener wants that.
    log: Option<Box<ConnectionLog>>,
    /// Given back when the connection ends.
    place: Option<Taken>,
}

impl HttpConnection {
    async fn serve(self) {
        let _ended = (self.log, self.place);
        http::serve(
            self.worker,
            self.io,
            self.prefix,
            self.http2,
            self.chain,
            self.manager,
            self.direction,
            self.addresses,
            self.tls,
            self.server_name,
            self.state,
        )
        .await;
    }
}

fn log_handshake(worker: &Worker, listener: &Listener, log: &mut ConnectionLog, error: &io::Error) {
    log.downstream_failure = Some(error.to_string());
    if log.is_wanted() {
        return;
    }
    let addresses = log.addresses;
    worker.log(
        serde_json::json!({
            "listener": &*listener.name,
            "response_flags": "-",
            "downstream_transport_failure_reason": error.to_string(),
            "downstream_direct_remote_address": addresses.direct.to_string(),
            "requested_server_name": log.server_name,
            "downstream_remote_address": addresses.remote.to_string(),
            "downstream_local_address": addresses.local.to_string(),
        })
        .to_string(),
    );
}
