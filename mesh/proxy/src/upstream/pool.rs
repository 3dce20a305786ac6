//! Connections to one endpoint, kept by one worker.
//!
//! HTTP/1: idle connections are reused last in, first out, so that the pool shrinks to what is needed. HTTP/2:
//! connections are shared up to the peer's stream limit. Each connection has a task on the worker, which ends when the peer
//! closes or the last handle is dropped.

mod error;
mod lease;

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tokio::sync::Notify;

pub use self::error::{ConnectError, SendError, Unanswered};
pub use self::lease::{Lease, StreamLease};

use self::lease::{Http1, Http2};
use super::connect::{self, ConnectOptions, Connected, Speaking, Stream};
use super::metered::Metered;
use super::{http1, http2};
use crate::config::cluster::{Cluster, Priority};
use crate::config::endpoint::Endpoint;
use crate::config::slot::ClusterSlot;
use crate::metrics::clusters::{Connection, Shared as Counts};
use crate::metrics::events::ClusterEvent;
use crate::worker::Worker;

/// HTTP/1 connections that one worker keeps idle per endpoint.
const MAX_IDLE: usize = 256;
/// Sets of connection options (server names, clients told by PROXY protocol) with pools of their own, per endpoint.
const MAX_VARIANTS: usize = 512;

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

/// An HTTP/1 connection without a request.
#[derive(Debug)]
struct Idle {
    connection: Http1,
    since: Instant,
}

/// Whom to connect to, and how.
#[derive(Clone, Copy)]
pub struct Wanted<'a> {
    /// Who wants it.
    pub worker: &'a Worker,
    /// Where it is counted.
    pub slot: &'a Arc<ClusterSlot>,
    /// What the cluster says of its connections.
    pub cluster: &'a Cluster,
    /// The peer.
    pub endpoint: &'a Endpoint,
    /// What is spoken on it.
    pub speaking: Speaking,
    /// What it has of its own.
    pub options: &'a ConnectOptions,
}

/// Connections of one worker to one endpoint.
#[derive(Debug, Default)]
pub struct Pool {
    idle: RefCell<Vec<Idle>>,
    shared: RefCell<Vec<Rc<Http2>>>,
    /// A connection is being made that requests may share.
    connecting: Cell<bool>,
    /// That has ended, well or not.
    connected: Notify,
    last_failure: RefCell<Option<ConnectError>>,
    failures: Cell<u64>,
    retired: Cell<bool>,
    /// Whether ALPN chose HTTP/2 the last time that it could choose.
    chose_http2: Cell<Option<bool>>,
    /// Connections with options of their own.
    variants: RefCell<Vec<(ConnectOptions, Rc<Pool>)>>,
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
            Speaking::Http2 => self.reuse_http2(cluster).map(Lease::Http2),
            Speaking::Either => self
                .reuse_http2(cluster)
                .map(Lease::Http2)
                .or_else(|| self.reuse_http1(cluster)),
            Speaking::Http1 | Speaking::Bytes => self.reuse_http1(cluster),
        }
    }

    fn reuse_http1(self: &Rc<Self>, cluster: &Cluster) -> Option<Lease> {
        let mut idle = self.idle.borrow_mut();
        for index in (0..idle.len()).rev() {
            let connection = &idle[index].connection;
            if too_old(cluster, connection.born) {
                connection.counted.note(ClusterEvent::CxMaxDuration);
                idle.remove(index);
            } else if connection.handle.is_ready() {
                let connection = idle.remove(index).connection;
                connection.counted.begin();
                return Some(Lease::Http1(connection, self.clone()));
            } else if connection.handle.is_closed() {
                idle.remove(index);
            }
            // Else the rest of a request is being sent whose answer came first.
        }
        None
    }

    fn reuse_http2(&self, cluster: &Cluster) -> Option<StreamLease> {
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
        let stream = StreamLease::on(found);
        if limit > 0 && found.served.get() >= limit {
            found.counted.note(ClusterEvent::CxMaxRequests);
        }
        Some(stream)
    }

    /// Takes a connection back whose exchange is over `now`.
    fn take_back(&self, mut connection: Http1, max_requests: u32, now: Instant) {
        connection.counted.end();
        connection.served += 1;
        if max_requests > 0 && connection.served >= max_requests {
            connection.counted.note(ClusterEvent::CxMaxRequests);
            return;
        }
        if self.retired.get() || !connection.handle.rest() {
            return;
        }
        let mut idle = self.idle.borrow_mut();
        if idle.len() < MAX_IDLE {
            idle.push(Idle {
                connection,
                since: now,
            });
        }
    }

    /// A connection, made if need be.
    pub async fn acquire(self: &Rc<Self>, wanted: Wanted<'_>) -> Result<Lease, ConnectError> {
        loop {
            if let Some(lease) = self.reuse(wanted.speaking, wanted.cluster) {
                return Ok(lease);
            }
            let may_share = match wanted.speaking {
                Speaking::Http2 => true,
                Speaking::Either => self.chose_http2.get() != Some(false),
                Speaking::Http1 | Speaking::Bytes => false,
            };
            if !may_share {
                return self.connect(wanted).await;
            }
            if !self.connecting.get() {
                return self.connect_shared(wanted).await;
            }
            // Someone is connecting: the new connection will likely carry this request as well.
            let before = self.failures.get();
            self.connected.notified().await;
            if self.failures.get() != before
                && let Some(error) = &*self.last_failure.borrow()
            {
                return Err(error.clone());
            }
        }
    }

    /// Makes a connection that other requests wait for, since it may become one that is shared.
    async fn connect_shared(self: &Rc<Self>, wanted: Wanted<'_>) -> Result<Lease, ConnectError> {
        /// Tells waiters on every way out, also when the request is dropped meanwhile.
        struct Connecting<'a>(&'a Pool);
        impl Drop for Connecting<'_> {
            fn drop(&mut self) {
                self.0.connecting.set(false);
                self.0.connected.notify_waiters();
            }
        }
        self.connecting.set(true);
        let _connecting = Connecting(self);
        let result = self.connect(wanted).await;
        if let Err(error) = &result {
            self.failures.set(self.failures.get() + 1);
            *self.last_failure.borrow_mut() = Some(error.clone());
        }
        result
    }

    async fn connect(self: &Rc<Self>, wanted: Wanted<'_>) -> Result<Lease, ConnectError> {
        let (connected, counted) = open(wanted).await?;
        let http2 = match wanted.speaking {
            Speaking::Http2 => true,
            Speaking::Http1 | Speaking::Bytes => false,
            Speaking::Either => {
                let agreed = connected.tls.as_ref().and_then(|tls| tls.alpn.as_deref());
                let chosen = matches!(agreed, Some("h2" | "istio-h2"));
                self.chose_http2.set(Some(chosen));
                counted.connection.speaks(chosen);
                chosen
            }
        };
        if http2 {
            self.start_http2(wanted, connected, counted).await
        } else {
            Ok(self.start_http1(wanted.worker, connected, counted))
        }
    }

    fn start_http1(self: &Rc<Self>, worker: &Worker, connected: Connected, counted: Counted) -> Lease {
        let stream = metered(connected.stream, &counted);
        let counts = counted.connection.shared().clone();
        counts.begin();
        let connection = Http1 {
            handle: http1::connect(stream, &worker.tasks, counted),
            counted: counts,
            served: 0,
            born: Instant::now(),
            tls: connected.tls,
            local: connected.local,
        };
        Lease::Http1(connection, self.clone())
    }

    async fn start_http2(
        &self,
        wanted: Wanted<'_>,
        connected: Connected,
        counted: Counted,
    ) -> Result<Lease, ConnectError> {
        let stream = metered(connected.stream, &counted);
        let counts = counted.connection.shared().clone();
        let handle = http2::connect(
            stream,
            wanted.cluster.http2,
            &wanted.worker.tasks,
            counts.clone(),
            counted,
        )
        .await?;
        let connection = Rc::new(Http2 {
            handle,
            counted: counts,
            served: Cell::new(0),
            born: Instant::now(),
            idle_since: Cell::new(Instant::now()),
            tls: connected.tls,
            local: connected.local,
        });
        self.shared.borrow_mut().push(connection.clone());
        Ok(Lease::Http2(StreamLease::on(&connection)))
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
        self.idle.borrow_mut().retain(|idle| {
            let connection = &idle.connection;
            !connection.handle.is_closed() && within(idle.since, &connection.counted)
        });
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

/// Connects, within the cluster's time and limit.
async fn open(wanted: Wanted<'_>) -> Result<(Connected, Counted), ConnectError> {
    let Wanted {
        worker,
        slot,
        cluster,
        endpoint,
        speaking,
        options,
    } = wanted;
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
    let error = match tokio::time::timeout(cluster.connect_timeout, work).await {
        Ok(Ok(connected)) => {
            worker.recorder.counters().upstream_connections.add(1);
            counted.connection.made();
            return Ok((connected, counted));
        }
        Ok(Err(error)) if connect::is_unbound(&error) => {
            counted.connection.unbound();
            worker.recorder.counters().upstream_connect_failures.add(1);
            return Err(error.into());
        }
        Ok(Err(error)) => error.into(),
        Err(_) => ConnectError::Timeout,
    };
    counted.connection.failed(matches!(error, ConnectError::Timeout));
    worker.recorder.counters().upstream_connect_failures.add(1);
    Err(error)
}
