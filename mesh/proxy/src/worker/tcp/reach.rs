//! Connecting a TCP connection to where its proxy sends it: which cluster, which host, directly or through a tunnel.

use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;

use tokio::io::AsyncReadExt as _;
use tokio_util::either::Either;

use super::Client;
use crate::config::hash::hash_of_source;
use crate::config::listener::{Direction, Listener, TcpProxy, TcpTargets};
use crate::config::slot::ClusterSlot;
use crate::config::subset::Criteria;
use crate::metrics::clusters::Connection;
use crate::metrics::events::{ClusterEvent, TcpEvent};
use crate::metrics::flags::Flags;
use crate::metrics::peer::{ServiceIdentity, Workload};
use crate::metrics::series::{Reporter, TcpLabels};
use crate::policy::filter_state::Factory;
use crate::tls::info::ConnectionTls;
use crate::upstream::balance::Wish;
use crate::upstream::cluster::{Active, Host, WorkerCluster};
use crate::upstream::connect::{self, Connected, Speaking, Stream};
use crate::upstream::outlier::Event;
use crate::worker::Worker;
use crate::worker::connection_log::ConnectionLog;
use crate::worker::filters::on_demand;
use crate::worker::tcp_tunnel::{self, Granted};

/// Bytes of a greeting that are read at most before it is known who speaks first.
const EARLY: usize = 1024;
/// A connection towards an endpoint, ready to be joined.
pub(in crate::worker) struct Upstream {
    pub(super) stream: End,
    /// Read already: what a server inside of TLS said first.
    pub(super) early: Vec<u8>,
    pub(super) labels: TcpLabels,
    pub(super) cluster: Arc<str>,
    pub(super) host: Rc<Host>,
    pub(super) attempts: u32,
    _active: Active,
    /// Where its bytes are counted, if the pool does not.
    pub(super) connection: Option<Connection>,
    pub(super) local: Option<SocketAddr>,
    pub(super) tls: Option<Arc<ConnectionTls>>,
}

/// What joins the client with its endpoint.
pub(super) enum End {
    /// A connection of its own.
    Direct(Stream),
    /// What is inside of a CONNECT.
    Tunnel(Granted),
}

impl Upstream {
    /// Waits until the endpoint has said something (or gone).
    pub(in crate::worker) async fn readable(mut self) -> io::Result<Self> {
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

/// There is no connection to join with; why has been recorded.
#[derive(Debug)]
pub(in crate::worker) struct NoUpstream;

/// Why there is no connection, as logs and metrics tell it.
struct Failed {
    /// With the flag that says it.
    labels: TcpLabels,
    /// Also of one that does not exist.
    cluster: Arc<str>,
    /// What the last attempt said.
    reason: String,
    attempts: u32,
    /// Where the last attempt went.
    host: Option<Rc<Host>>,
}

/// Where connections go.
struct Target<'a> {
    slot: Arc<ClusterSlot>,
    /// Metadata that its endpoints must have, where it differs from the proxy's.
    criteria: Option<&'a Criteria>,
}

/// Connects to where `proxy` sends connections. A failure is recorded in `log`; without one it means nothing: somebody
/// wanted to see whether the server speaks first, and comes again.
pub(in crate::worker) async fn open(
    worker: &Rc<Worker>,
    proxy: &TcpProxy,
    listener: &Listener,
    client: &Client<'_>,
    log: Option<&mut ConnectionLog>,
) -> Result<Upstream, NoUpstream> {
    let reporter = match listener.direction {
        Direction::Inbound => Reporter::Destination,
        Direction::Outbound | Direction::Unspecified => Reporter::Source,
    };
    let labels = TcpLabels {
        reporter,
        peer: Workload::unknown(),
        service: ServiceIdentity::unknown(),
        flags: Flags::default(),
        principals: match reporter {
            Reporter::Destination => client.tls.and_then(|tls| tls.principals.clone()),
            Reporter::Source => None,
        },
    };
    let failed = match reach(worker, proxy, client, labels).await {
        Ok(upstream) => return Ok(upstream),
        Err(failed) => failed,
    };
    if let Some(log) = log {
        let flags = failed.labels.flags;
        if flags.has(Flags::NO_CLUSTER) {
            proxy.counted.note(TcpEvent::NoRoute, worker.id);
        }
        log.flag(flags);
        log.cluster = Some(failed.cluster);
        log.failure = failed.reason;
        log.attempts = failed.attempts;
        log.host = failed.host;
        record_failure(worker, proxy, &failed.labels, listener, log);
    }
    Err(NoUpstream)
}

/// Connects to one of the target's hosts, as often as the proxy says.
async fn reach(
    worker: &Rc<Worker>,
    proxy: &TcpProxy,
    client: &Client<'_>,
    mut labels: TcpLabels,
) -> Result<Upstream, Box<Failed>> {
    let Target { slot, criteria } = match target(worker, proxy, client).await {
        Ok(target) => target,
        // What was asked for by name is not replaced by something else.
        Err(unknown) => return Err(Box::new(Failed::at(labels, Flags::NO_CLUSTER, unknown.into()))),
    };
    let Some(cluster) = worker.cluster(&slot) else {
        return Err(Box::new(Failed::at(labels, Flags::NO_CLUSTER, slot.name.clone())));
    };
    labels.service = cluster
        .config
        .service
        .clone()
        .unwrap_or_else(|| ServiceIdentity::new(&slot.name, &slot.name, ""));
    let mut tried: Vec<Rc<Host>> = Vec::new();
    let mut reason = String::new();
    for attempt in 1..=proxy.max_connect_attempts {
        let wish = Wish {
            hash: proxy.hash_by_source.then(|| hash_of_source(client.source.ip())),
            criteria: criteria.or(proxy.criteria.as_deref()),
            tried: &tried,
            attempts: 5,
            ..Default::default()
        };
        let Some(host) = cluster.pick(&wish, Some(client.destination)) else {
            slot.counted.note(ClusterEvent::CxNoneHealthy);
            return Err(Box::new(Failed {
                reason,
                attempts: attempt - 1,
                host: tried.pop(),
                ..Failed::at(labels, Flags::NO_HEALTHY_UPSTREAM, slot.name.clone())
            }));
        };
        if labels.reporter == Reporter::Source
            && let Some(workload) = &host.endpoint.workload
        {
            labels.peer = workload.clone();
        }
        match connect_or_tunnel(worker, proxy, &cluster, &host, client).await {
            Ok(reached) => {
                if labels.reporter == Reporter::Source {
                    labels.principals = reached.tls.as_ref().and_then(|tls| tls.principals.clone());
                }
                return Ok(Upstream {
                    stream: reached.stream,
                    local: reached.local,
                    tls: reached.tls,
                    connection: reached.connection,
                    early: Vec::new(),
                    labels,
                    cluster: slot.name.clone(),
                    attempts: attempt,
                    _active: Active::on(&host),
                    host,
                });
            }
            Err(text) => reason = text,
        }
        tried.push(host);
    }
    slot.counted.note(ClusterEvent::CxConnectAttemptsExceeded);
    let mut flags = Flags::UPSTREAM_CONNECTION_FAILURE;
    if proxy.max_connect_attempts > 1 {
        flags.add(Flags::RETRY_LIMIT);
    }
    Err(Box::new(Failed {
        reason,
        attempts: proxy.max_connect_attempts,
        host: tried.pop(),
        ..Failed::at(labels, flags, slot.name.clone())
    }))
}

impl Failed {
    /// Before any attempt.
    fn at(labels: TcpLabels, flags: Flags, cluster: Arc<str>) -> Self {
        Self {
            labels: TcpLabels { flags, ..labels },
            cluster,
            reason: String::new(),
            attempts: 0,
            host: None,
        }
    }
}

/// Where the connection goes: to what a filter has set, to what its server name says, or to what the proxy says. An error is
/// the name of a cluster that does not exist.
async fn target<'a>(
    worker: &Rc<Worker>,
    proxy: &'a TcpProxy,
    client: &Client<'a>,
) -> Result<Target<'a>, &'a str> {
    let named = match client.state.known(Factory::TcpCluster) {
        Some(name) => Some(find(worker, proxy, name).await.ok_or(name)?),
        // A name that comes with the connection may only choose among clusters that exist.
        None => client
            .server_name
            .filter(|_| client.by_server_name)
            .and_then(|name| proxy.directory.find(name)),
    };
    let (slot, criteria) = match (named, &proxy.targets) {
        (Some(slot), _) => (slot, None),
        (None, TcpTargets::One(slot)) => (slot.clone(), None),
        (None, TcpTargets::Weighted(slots, weights, turn)) => {
            let index = weights.pick(turn.next(worker.id));
            let own = proxy.target_criteria.get(index).and_then(Option::as_deref);
            (slots[index].clone(), own)
        }
    };
    if let Some(rules) = &proxy.on_demand {
        if slot.is_live() {
            slot.mark_used();
        } else {
            // Boxed: few connections wait.
            Box::pin(on_demand::cluster_named(worker, rules, &slot.name)).await;
        }
    }
    Ok(Target { slot, criteria })
}

/// The cluster of that name; where the proxy says so, one that does not exist is waited for.
async fn find(worker: &Worker, proxy: &TcpProxy, name: &str) -> Option<Arc<ClusterSlot>> {
    match (proxy.directory.find(name), &proxy.on_demand) {
        (None, Some(rules)) => {
            Box::pin(on_demand::cluster_named(worker, rules, name)).await;
            proxy.directory.find(name)
        }
        (found, _) => found,
    }
}

/// What has been reached, and how.
struct Reached {
    stream: End,
    tls: Option<Arc<ConnectionTls>>,
    local: Option<SocketAddr>,
    /// Where its bytes are counted, if the pool does not.
    connection: Option<Connection>,
}

/// A connection to `host`, or a tunnel through it; else what went wrong.
async fn connect_or_tunnel(
    worker: &Worker,
    proxy: &TcpProxy,
    cluster: &WorkerCluster,
    host: &Rc<Host>,
    client: &Client<'_>,
) -> Result<Reached, String> {
    let tunneling = proxy
        .tunneling
        .as_ref()
        .filter(|_| client.state.known(Factory::NoTunneling) != Some("true"));
    let Some(tunneling) = tunneling else {
        let (connected, connection) = connect_to(worker, cluster, host, client).await?;
        return Ok(Reached {
            stream: End::Direct(connected.stream),
            tls: connected.tls,
            local: connected.local,
            connection: Some(connection),
        });
    };
    // Boxed: few connections are tunnelled, and each connection's future would carry its state.
    let granted = Box::pin(tcp_tunnel::open(worker, cluster, host, tunneling, client)).await?;
    Ok(Reached {
        tls: granted.lease.tls().cloned(),
        local: granted.lease.local(),
        stream: End::Tunnel(granted),
        connection: None,
    })
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
