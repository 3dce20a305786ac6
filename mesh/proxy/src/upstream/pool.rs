//! Connections to one endpoint, kept by one worker.
//!
//! HTTP/1: idle connections are reused last in, first out, so that the pool shrinks to what is needed. HTTP/2:
//! connections are shared up to the peer's stream limit. The connection's own task runs on the worker; it ends when the
//! peer closes or the last handle is dropped.

use std::cell::{Cell, RefCell};
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use http::{Request, Response};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::sync::Notify;

use super::connect::{self, ConnectOptions, Connected, Speaking, Stream};
use super::http2;
use super::metered::Metered;
use crate::config::cluster::{Cluster, Priority};
use crate::config::endpoint::Endpoint;
use crate::config::slot::ClusterSlot;
use crate::metrics::clusters::{Connection, Shared as Counts};
use crate::metrics::events::ClusterEvent;
use crate::tls::info::ConnectionTls;
use crate::worker::Worker;
use crate::worker::body::UpstreamBody;
use crate::worker::incoming::Incoming;
use crate::worker::interim::Tell;

/// HTTP/1 connections that one worker keeps idle per endpoint.
const MAX_IDLE: usize = 256;
/// Sets of connection options (server names, clients told by PROXY protocol) with pools of their own, per endpoint.
const MAX_VARIANTS: usize = 512;

/// Why there is no connection.
#[derive(Clone, Debug)]
pub enum ConnectError {
    /// It took too long.
    Timeout,
    /// The system or the peer said no.
    Io(io::ErrorKind, Arc<str>),
    /// A circuit breaker is open.
    Overflow,
}

impl std::fmt::Display for ConnectError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Timeout => f.write_str("connection timeout"),
            Self::Io(_, text) => f.write_str(text),
            Self::Overflow => f.write_str("too many connections"),
        }
    }
}

impl From<io::Error> for ConnectError {
    fn from(error: io::Error) -> Self {
        Self::Io(error.kind(), error.to_string().into())
    }
}

impl From<hyper::Error> for ConnectError {
    fn from(error: hyper::Error) -> Self {
        Self::Io(io::ErrorKind::Other, error.to_string().into())
    }
}

impl From<h2::Error> for ConnectError {
    fn from(error: h2::Error) -> Self {
        Self::Io(io::ErrorKind::Other, error.to_string().into())
    }
}

/// Why a request has no answer.
#[derive(Debug, thiserror::Error)]
pub enum SendError {
    /// Over HTTP/1.
    #[error(transparent)]
    Http1(hyper::Error),
    /// Over HTTP/2.
    #[error("http2 error")]
    Http2(#[source] h2::Error),
}

/// A request that was not answered.
#[derive(Debug)]
pub struct Unanswered {
    /// Why.
    pub error: SendError,
    /// Nothing of it was sent.
    pub unsent: bool,
}

/// What hyper says of a request over HTTP/1 that was not answered.
type Http1Error = hyper::client::conn::TrySendError<Request<UpstreamBody>>;

impl From<Http1Error> for Unanswered {
    fn from(mut error: Http1Error) -> Self {
        Self {
            unsent: error.take_message().is_some(),
            error: SendError::Http1(error.into_error()),
        }
    }
}

/// Of a request whose head was sent.
impl From<h2::Error> for Unanswered {
    fn from(error: h2::Error) -> Self {
        Self {
            unsent: false,
            error: SendError::Http2(error),
        }
    }
}

/// Whether a connection has lived for as long as the cluster lets it. The clock is read where there is a limit only.
fn too_old(cluster: &Cluster, born: Instant) -> bool {
    cluster
        .max_connection_duration
        .is_some_and(|limit| born.elapsed() >= limit)
}

/// Counts a connection for as long as it lives.
#[derive(Debug)]
struct Counted {
    /// Where there is a limit.
    slot: Option<(Arc<ClusterSlot>, Priority)>,
    connection: Connection,
}

impl Drop for Counted {
    fn drop(&mut self) {
        if let Some((slot, priority)) = &self.slot {
            slot.usage
                .of(*priority)
                .connections
                .fetch_sub(1, Ordering::Relaxed);
        }
    }
}

/// The connection, its bytes counted.
fn metered(stream: Stream, counted: &Counted) -> Metered {
    let connection = &counted.connection;
    Metered::watched(stream, connection.cells().clone(), connection.shared().clone())
}

#[derive(Debug)]
struct Idle {
    sender: http1::SendRequest<UpstreamBody>,
    counted: Arc<Counts>,
    since: Instant,
    born: Instant,
    served: u32,
    tls: Option<Arc<ConnectionTls>>,
    local: Option<SocketAddr>,
}

#[derive(Debug)]
struct Shared2 {
    handle: http2::Handle,
    counted: Arc<Counts>,
    served: Cell<u32>,
    born: Instant,
    idle_since: Cell<Instant>,
    tls: Option<Arc<ConnectionTls>>,
    local: Option<SocketAddr>,
}

/// Connections of one worker to one endpoint.
#[derive(Debug, Default)]
pub struct Pool {
    idle: RefCell<Vec<Idle>>,
    shared: RefCell<Vec<Rc<Shared2>>>,
    connecting2: Cell<bool>,
    connected2: Notify,
    last_failure: RefCell<Option<(u64, ConnectError)>>,
    failures: Cell<u64>,
    retired: Cell<bool>,
    /// Whether ALPN chose HTTP/2 the last time that it could choose.
    chosen2: Cell<Option<bool>>,
    /// Connections with options of their own.
    variants: RefCell<Vec<(ConnectOptions, Rc<Pool>)>>,
}

/// The right to send one request on a connection.
#[derive(Debug)]
pub enum Lease {
    /// A whole HTTP/1 connection.
    Http1 {
        /// To send with.
        sender: http1::SendRequest<UpstreamBody>,
        /// What is known of the connection.
        counted: Arc<Counts>,
        /// Requests served before.
        served: u32,
        /// When it was made.
        born: Instant,
        /// What TLS was negotiated to.
        tls: Option<Arc<ConnectionTls>>,
        /// Our own end.
        local: Option<SocketAddr>,
        /// Where it goes back to.
        pool: Rc<Pool>,
    },
    /// A stream of an HTTP/2 connection.
    Http2(Stream2),
}

/// A stream's place on an HTTP/2 connection.
#[derive(Debug)]
pub struct Stream2(Rc<Shared2>);

impl Drop for Stream2 {
    fn drop(&mut self) {
        self.0.handle.leave();
        self.0.counted.end();
        if self.0.handle.active() == 0 {
            self.0.idle_since.set(Instant::now());
        }
    }
}

impl Stream2 {
    /// Sends the request of this place; `tell` is told of interim answers.
    pub fn send(
        &self,
        request: Request<UpstreamBody>,
        tell: Option<Tell>,
    ) -> Result<http2::Answering, Unanswered> {
        self.0.handle.send(request, tell).map_err(|error| Unanswered {
            // What is left is a request that cannot be written.
            unsent: error.is_go_away() || error.is_reset() || error.is_io(),
            error: SendError::Http2(error),
        })
    }
}

/// Sends a request over HTTP/1; `tell` is told of interim answers.
pub fn http1_send(
    sender: &mut http1::SendRequest<UpstreamBody>,
    mut request: Request<UpstreamBody>,
    tell: Option<Tell>,
) -> impl Future<Output = Result<Response<hyper::body::Incoming>, Http1Error>> + use<> {
    if let Some(tell) = tell {
        hyper::ext::on_informational(&mut request, move |answer| {
            tell(answer.status(), answer.headers());
        });
    }
    sender.try_send_request(request)
}

impl Lease {
    /// Whether requests went over the connection before: then a failure may be that it was closed while idle.
    pub fn reused(&self) -> bool {
        match self {
            Self::Http1 { served, .. } => *served > 0,
            Self::Http2(stream) => stream.0.served.get() > 1,
        }
    }

    /// Sends a request and waits for its final answer; `tell` is told of interim ones.
    pub async fn send(
        &mut self,
        request: Request<UpstreamBody>,
        tell: Option<Tell>,
    ) -> Result<Response<Incoming>, Unanswered> {
        match self {
            Self::Http1 { sender, .. } => {
                let response = http1_send(sender, request, tell).await?;
                Ok(response.map(Incoming::Http1))
            }
            Self::Http2(stream) => Ok(stream.send(request, tell)?.await?),
        }
    }

    /// Whether it is a stream of HTTP/2.
    pub fn is_http2(&self) -> bool {
        matches!(self, Self::Http2(_))
    }

    /// What TLS was negotiated to.
    pub fn tls(&self) -> Option<&Arc<ConnectionTls>> {
        match self {
            Self::Http1 { tls, .. } => tls.as_ref(),
            Self::Http2(stream) => stream.0.tls.as_ref(),
        }
    }

    /// Our own end of the connection.
    pub fn local(&self) -> Option<SocketAddr> {
        match self {
            Self::Http1 { local, .. } => *local,
            Self::Http2(stream) => stream.0.local,
        }
    }

    /// The exchange is over `now` and the connection may be used again.
    pub fn release(self, max_requests: u32, now: Instant) {
        if let Self::Http1 {
            sender,
            counted,
            served,
            born,
            tls,
            local,
            pool,
        } = self
        {
            counted.end();
            let served = served + 1;
            let used_up = max_requests > 0 && served >= max_requests;
            if used_up {
                counted.note(ClusterEvent::CxMaxRequests);
            }
            if !used_up && !pool.retired.get() && !sender.is_closed() {
                let mut idle = pool.idle.borrow_mut();
                if idle.len() < MAX_IDLE {
                    idle.push(Idle {
                        sender,
                        counted,
                        since: now,
                        born,
                        served,
                        tls,
                        local,
                    });
                }
            }
        }
    }
}

impl Pool {
    /// The pool of connections with these options.
    pub fn variant(self: &Rc<Self>, options: &ConnectOptions) -> Rc<Self> {
        if options.is_empty() {
            return self.clone();
        }
        let mut variants = self.variants.borrow_mut();
        if let Some((_, pool)) = variants.iter().find(|(known, _)| known == options) {
            return pool.clone();
        }
        let pool = Rc::new(Self::default());
        // Beyond that connections are used once.
        if variants.len() < MAX_VARIANTS && !self.retired.get() {
            variants.push((options.clone(), pool.clone()));
        }
        pool
    }

    /// An idle or shared connection, if there is one.
    pub fn reuse(self: &Rc<Self>, speaking: Speaking, cluster: &Cluster) -> Option<Lease> {
        match speaking {
            Speaking::Http2 => self.reuse2(cluster).map(Lease::Http2),
            Speaking::Either => self
                .reuse2(cluster)
                .map(Lease::Http2)
                .or_else(|| self.reuse1(cluster)),
            Speaking::Http1 | Speaking::Bytes => self.reuse1(cluster),
        }
    }

    fn reuse1(self: &Rc<Self>, cluster: &Cluster) -> Option<Lease> {
        let mut idle = self.idle.borrow_mut();
        let mut index = idle.len();
        while index > 0 {
            index -= 1;
            if too_old(cluster, idle[index].born) {
                idle[index].counted.note(ClusterEvent::CxMaxDuration);
                idle.remove(index);
                continue;
            }
            if idle[index].sender.is_ready() {
                let taken = idle.remove(index);
                taken.counted.begin();
                return Some(Lease::Http1 {
                    sender: taken.sender,
                    counted: taken.counted,
                    served: taken.served,
                    born: taken.born,
                    tls: taken.tls,
                    local: taken.local,
                    pool: self.clone(),
                });
            }
            // Not ready but open: its task has yet to notice that the last exchange is over.
            if idle[index].sender.is_closed() {
                idle.remove(index);
            }
        }
        None
    }

    fn reuse2(&self, cluster: &Cluster) -> Option<Stream2> {
        let mut shared = self.shared.borrow_mut();
        // One that is too old ends with the streams that it has.
        shared.retain(|connection| {
            let old = too_old(cluster, connection.born);
            if old {
                connection.counted.note(ClusterEvent::CxMaxDuration);
            }
            !connection.handle.is_closed() && !old
        });
        let limit = cluster.max_requests_per_connection;
        let found = shared.iter().find(|connection| {
            let streams = (connection.handle.streams() as u64).min(u64::from(cluster.max_streams));
            u64::from(connection.handle.active()) < streams.max(1)
                && (limit == 0 || connection.served.get() < limit)
        })?;
        found.handle.enter();
        found.counted.begin();
        if limit > 0 && found.served.get() + 1 >= limit {
            found.counted.note(ClusterEvent::CxMaxRequests);
        }
        found.served.set(found.served.get().saturating_add(1));
        Some(Stream2(found.clone()))
    }

    /// A connection to `endpoint`, made if need be.
    pub async fn acquire(
        self: &Rc<Self>,
        worker: &Worker,
        slot: &Arc<ClusterSlot>,
        cluster: &Cluster,
        endpoint: &Endpoint,
        speaking: Speaking,
        options: &ConnectOptions,
    ) -> Result<Lease, ConnectError> {
        loop {
            if let Some(lease) = self.reuse(speaking, cluster) {
                return Ok(lease);
            }
            let may_share = match speaking {
                Speaking::Http2 => true,
                Speaking::Either => self.chosen2.get() != Some(false),
                Speaking::Http1 | Speaking::Bytes => false,
            };
            if !may_share || !self.connecting2.get() {
                return self
                    .connect(worker, slot, cluster, endpoint, speaking, options, may_share)
                    .await;
            }
            // Someone is connecting: the new connection will likely carry this request as well.
            let before = self.failures.get();
            self.connected2.notified().await;
            if self.failures.get() != before
                && let Some((_, error)) = &*self.last_failure.borrow()
            {
                return Err(error.clone());
            }
        }
    }

    async fn open(
        worker: &Worker,
        slot: &Arc<ClusterSlot>,
        cluster: &Cluster,
        endpoint: &Endpoint,
        speaking: Speaking,
        options: &ConnectOptions,
    ) -> Result<(Connected, Counted), ConnectError> {
        let limit = cluster.limits.of(options.priority).connections;
        let cells = worker.recorder.cluster(slot);
        let limited = limit != u32::MAX;
        if limited {
            let open = &slot.usage.of(options.priority).connections;
            if open.fetch_add(1, Ordering::Relaxed) >= limit {
                open.fetch_sub(1, Ordering::Relaxed);
                cells.connection_overflow.add(1);
                return Err(ConnectError::Overflow);
            }
        }
        let mut counted = Counted {
            slot: limited.then(|| (slot.clone(), options.priority)),
            connection: cells.connecting(&endpoint.state),
        };
        // What is not negotiated is known before, and counts for connections that fail as well.
        match speaking {
            Speaking::Http1 => counted.connection.speaks(false),
            Speaking::Http2 => counted.connection.speaks(true),
            Speaking::Either | Speaking::Bytes => {}
        }
        let work = connect::connect(cluster, endpoint, speaking, options);
        let result = match tokio::time::timeout(cluster.connect_timeout, work).await {
            Ok(Ok(connected)) => Ok(connected),
            Ok(Err(error)) if connect::is_unbound(&error) => {
                counted.connection.unbound();
                worker.recorder.counters().upstream_connect_failures.add(1);
                return Err(error.into());
            }
            Ok(Err(error)) => Err(error.into()),
            Err(_) => Err(ConnectError::Timeout),
        };
        match result {
            Ok(connected) => {
                worker.recorder.counters().upstream_connections.add(1);
                counted.connection.made();
                Ok((connected, counted))
            }
            Err(error) => {
                counted.connection.failed(matches!(error, ConnectError::Timeout));
                worker.recorder.counters().upstream_connect_failures.add(1);
                Err(error)
            }
        }
    }

    /// Makes a connection. `may_share` lets other requests wait for it, since it may become one that is shared.
    async fn connect(
        self: &Rc<Self>,
        worker: &Worker,
        slot: &Arc<ClusterSlot>,
        cluster: &Cluster,
        endpoint: &Endpoint,
        speaking: Speaking,
        options: &ConnectOptions,
        may_share: bool,
    ) -> Result<Lease, ConnectError> {
        /// Tells waiters on every way out, also when the request is dropped meanwhile.
        struct Connecting<'a>(&'a Pool);
        impl Drop for Connecting<'_> {
            fn drop(&mut self) {
                self.0.connecting2.set(false);
                self.0.connected2.notify_waiters();
            }
        }
        let _connecting = may_share.then(|| {
            self.connecting2.set(true);
            Connecting(self)
        });
        let result = async {
            let (connected, counted) = Self::open(worker, slot, cluster, endpoint, speaking, options).await?;
            let http2 = match speaking {
                Speaking::Http2 => true,
                Speaking::Http1 | Speaking::Bytes => false,
                Speaking::Either => {
                    let chosen = connected
                        .tls
                        .as_ref()
                        .is_some_and(|tls| matches!(tls.alpn.as_deref(), Some("h2" | "istio-h2")));
                    self.chosen2.set(Some(chosen));
                    chosen
                }
            };
            if speaking == Speaking::Either {
                counted.connection.speaks(http2);
            }
            if http2 {
                self.handshake2(worker, connected, counted).await
            } else {
                self.handshake1(worker, connected, counted).await
            }
        }
        .await;
        if let Err(error) = &result
            && may_share
        {
            self.failures.set(self.failures.get() + 1);
            *self.last_failure.borrow_mut() = Some((self.failures.get(), error.clone()));
        }
        result
    }

    async fn handshake1(
        self: &Rc<Self>,
        worker: &Worker,
        connected: Connected,
        counted: Counted,
    ) -> Result<Lease, ConnectError> {
        let (sender, connection) = http1::Builder::new()
            .max_buf_size(64 * 1024)
            .handshake::<_, UpstreamBody>(TokioIo::new(metered(connected.stream, &counted)))
            .await?;
        let shared = counted.connection.shared().clone();
        shared.begin();
        worker.tasks.spawn_local(async move {
            // An error also reaches the request, which reports it.
            let _ = connection.with_upgrades().await;
            drop(counted);
        });
        Ok(Lease::Http1 {
            sender,
            counted: shared,
            served: 0,
            born: Instant::now(),
            tls: connected.tls,
            local: connected.local,
            pool: self.clone(),
        })
    }

    async fn handshake2(
        self: &Rc<Self>,
        worker: &Worker,
        connected: Connected,
        counted: Counted,
    ) -> Result<Lease, ConnectError> {
        let stream = metered(connected.stream, &counted);
        let known = counted.connection.shared().clone();
        known.begin();
        let handle = http2::connect(stream, &worker.tasks, counted).await?;
        handle.enter();
        let shared = Rc::new(Shared2 {
            handle,
            counted: known,
            served: Cell::new(1),
            born: Instant::now(),
            idle_since: Cell::new(Instant::now()),
            tls: connected.tls,
            local: connected.local,
        });
        self.shared.borrow_mut().push(shared.clone());
        Ok(Lease::Http2(Stream2(shared)))
    }

    /// Closes what has been idle for too long; returns whether the pool is empty.
    pub fn sweep(&self, now: Instant, idle_timeout: Duration) -> bool {
        let within = |since: Instant, counted: &Counts| {
            let within = now.duration_since(since) < idle_timeout;
            if !within {
                counted.note(ClusterEvent::CxIdleTimeout);
            }
            within
        };
        self.idle
            .borrow_mut()
            .retain(|idle| !idle.sender.is_closed() && within(idle.since, &idle.counted));
        self.shared.borrow_mut().retain(|connection| {
            !connection.handle.is_closed()
                && (connection.handle.active() > 0
                    || within(connection.idle_since.get(), &connection.counted))
        });
        let mut variants = self.variants.borrow_mut();
        // One that a request uses is kept: its connection comes back.
        variants.retain(|(_, pool)| !pool.sweep(now, idle_timeout) || Rc::strong_count(pool) > 1);
        self.idle.borrow().is_empty() && self.shared.borrow().is_empty() && variants.is_empty()
    }

    /// The endpoint is gone: idle connections close now, busy ones when their exchange is over.
    pub fn retire(&self) {
        self.retired.set(true);
        self.idle.borrow_mut().clear();
        self.shared.borrow_mut().clear();
        for (_, pool) in self.variants.borrow_mut().drain(..) {
            pool.retire();
        }
    }
}
