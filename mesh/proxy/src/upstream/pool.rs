//! Connections to one endpoint, kept by one worker.
//!
//! HTTP/1: idle connections are reused last in, first out, so that the pool shrinks to what is needed. HTTP/2:
//! connections are shared up to the peer's stream limit. The connection's own task runs on the worker; it ends when the
//! peer closes or the last handle is dropped.

use std::cell::{Cell, RefCell};
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::sync::Notify;

use super::connect::{self, Stream};
use crate::config::cluster::Cluster;
use crate::config::convert::Address;
use crate::config::slot::ClusterSlot;
use crate::worker::body::UpstreamBody;
use crate::worker::{LocalExecutor, Worker};

/// HTTP/1 connections that one worker keeps idle per endpoint.
const MAX_IDLE: usize = 256;

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

/// Counts a connection for as long as it lives.
#[derive(Debug)]
struct Counted(Option<Arc<ClusterSlot>>);

impl Drop for Counted {
    fn drop(&mut self) {
        if let Some(slot) = &self.0 {
            slot.usage.connections.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

#[derive(Debug)]
struct Idle {
    sender: http1::SendRequest<UpstreamBody>,
    since: Instant,
    served: u32,
}

#[derive(Debug)]
struct Shared2 {
    sender: http2::SendRequest<UpstreamBody>,
    /// Streams that the peer allows at a time, as its SETTINGS say now.
    streams: Rc<Cell<usize>>,
    active: Cell<u32>,
    served: Cell<u32>,
    idle_since: Cell<Instant>,
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
}

/// The right to send one request on a connection.
#[derive(Debug)]
pub enum Lease {
    /// A whole HTTP/1 connection.
    Http1 {
        /// To send with.
        sender: http1::SendRequest<UpstreamBody>,
        /// Requests served before.
        served: u32,
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
        self.0.active.set(self.0.active.get() - 1);
        if self.0.active.get() == 0 {
            self.0.idle_since.set(Instant::now());
        }
    }
}

impl Stream2 {
    /// A handle to send with.
    pub fn sender(&self) -> http2::SendRequest<UpstreamBody> {
        self.0.sender.clone()
    }
}

impl Lease {
    /// Whether requests went over the connection before: then a failure may be that it was closed while idle.
    pub fn reused(&self) -> bool {
        match self {
            Self::Http1 { served, .. } => *served > 0,
            Self::Http2(stream) => stream.0.served.get() > 1,
        }
    }

    /// The exchange is over and the connection may be used again.
    pub fn release(self, max_requests: u32) {
        if let Self::Http1 { sender, served, pool } = self {
            let served = served + 1;
            let used_up = max_requests > 0 && served >= max_requests;
            if !used_up && !pool.retired.get() && !sender.is_closed() {
                let mut idle = pool.idle.borrow_mut();
                if idle.len() < MAX_IDLE {
                    idle.push(Idle {
                        sender,
                        since: Instant::now(),
                        served,
                    });
                }
            }
        }
    }
}

impl Pool {
    /// An idle or shared connection, if there is one.
    pub fn reuse(self: &Rc<Self>, http2: bool, cluster: &Cluster) -> Option<Lease> {
        if http2 {
            return self.reuse2(cluster).map(Lease::Http2);
        }
        let mut idle = self.idle.borrow_mut();
        let mut index = idle.len();
        while index > 0 {
            index -= 1;
            if idle[index].sender.is_ready() {
                let taken = idle.remove(index);
                return Some(Lease::Http1 {
                    sender: taken.sender,
                    served: taken.served,
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
        shared.retain(|connection| !connection.sender.is_closed());
        let limit = cluster.max_requests_per_connection;
        let found = shared.iter().find(|connection| {
            let streams = (connection.streams.get() as u64).min(u64::from(cluster.max_streams));
            u64::from(connection.active.get()) < streams.max(1)
                && (limit == 0 || connection.served.get() < limit)
        })?;
        found.active.set(found.active.get() + 1);
        found.served.set(found.served.get().saturating_add(1));
        Some(Stream2(found.clone()))
    }

    /// A connection to `address`, made if need be.
    pub async fn acquire(
        self: &Rc<Self>,
        worker: &Worker,
        slot: &Arc<ClusterSlot>,
        cluster: &Cluster,
        address: &Address,
        http2: bool,
    ) -> Result<Lease, ConnectError> {
        if let Some(lease) = self.reuse(http2, cluster) {
            return Ok(lease);
        }
        if !http2 {
            return self.connect1(worker, slot, cluster, address).await;
        }
        loop {
            if let Some(stream) = self.reuse2(cluster) {
                return Ok(Lease::Http2(stream));
            }
            if !self.connecting2.get() {
                return self.connect2(worker, slot, cluster, address).await;
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
        address: &Address,
    ) -> Result<(Stream, Counted), ConnectError> {
        let limit = cluster.limits.connections;
        let counted = if limit == u32::MAX {
            Counted(None)
        } else {
            if slot.usage.connections.fetch_add(1, Ordering::Relaxed) >= limit {
                slot.usage.connections.fetch_sub(1, Ordering::Relaxed);
                return Err(ConnectError::Overflow);
            }
            Counted(Some(slot.clone()))
        };
        let result =
            match tokio::time::timeout(cluster.connect_timeout, connect::connect(cluster, address)).await {
                Ok(Ok(stream)) => Ok(stream),
                Ok(Err(error)) => Err(error.into()),
                Err(_) => Err(ConnectError::Timeout),
            };
        match result {
            Ok(stream) => {
                worker.recorder.counters().upstream_connections.add(1);
                Ok((stream, counted))
            }
            Err(error) => {
                worker.recorder.counters().upstream_connect_failures.add(1);
                Err(error)
            }
        }
    }

    async fn connect1(
        self: &Rc<Self>,
        worker: &Worker,
        slot: &Arc<ClusterSlot>,
        cluster: &Cluster,
        address: &Address,
    ) -> Result<Lease, ConnectError> {
        let (stream, counted) = Self::open(worker, slot, cluster, address).await?;
        let (sender, connection) = http1::Builder::new()
            .max_buf_size(64 * 1024)
            .handshake::<_, UpstreamBody>(TokioIo::new(stream))
            .await?;
        worker.tasks.spawn_local(async move {
            // An error also reaches the request, which reports it.
            let _ = connection.with_upgrades().await;
            drop(counted);
        });
        Ok(Lease::Http1 {
            sender,
            served: 0,
            pool: self.clone(),
        })
    }

    async fn connect2(
        self: &Rc<Self>,
        worker: &Worker,
        slot: &Arc<ClusterSlot>,
        cluster: &Cluster,
        address: &Address,
    ) -> Result<Lease, ConnectError> {
        /// Tells waiters on every way out, also when the request is dropped meanwhile.
        struct Connecting<'a>(&'a Pool);
        impl Drop for Connecting<'_> {
            fn drop(&mut self) {
                self.0.connecting2.set(false);
                self.0.connected2.notify_waiters();
            }
        }
        self.connecting2.set(true);
        let connecting = Connecting(self);
        let result = async {
            let (stream, counted) = Self::open(worker, slot, cluster, address).await?;
            let (sender, connection) = http2::Builder::new(LocalExecutor)
                .timer(TokioTimer::new())
                .initial_stream_window_size(256 * 1024)
                .initial_connection_window_size(1024 * 1024)
                .keep_alive_interval(Duration::from_secs(60))
                .keep_alive_timeout(Duration::from_secs(20))
                .handshake::<_, UpstreamBody>(TokioIo::new(stream))
                .await?;
            let streams = Rc::new(Cell::new(connection.current_max_send_streams()));
            let noted = streams.clone();
            worker.tasks.spawn_local(async move {
                let mut connection = std::pin::pin!(connection);
                let work = std::future::poll_fn(|cx| {
                    let result = connection.as_mut().poll(cx);
                    noted.set(connection.current_max_send_streams());
                    result
                });
                let _ = work.await;
                drop(counted);
            });
            Ok((sender, streams))
        }
        .await;
        match result {
            Ok((sender, streams)) => {
                let shared = Rc::new(Shared2 {
                    sender,
                    streams,
                    active: Cell::new(1),
                    served: Cell::new(1),
                    idle_since: Cell::new(Instant::now()),
                });
                self.shared.borrow_mut().push(shared.clone());
                drop(connecting);
                Ok(Lease::Http2(Stream2(shared)))
            }
            Err(error) => {
                self.failures.set(self.failures.get() + 1);
                *self.last_failure.borrow_mut() = Some((self.failures.get(), ConnectError::clone(&error)));
                Err(error)
            }
        }
    }

    /// Closes what has been idle for too long; returns whether the pool is empty.
    pub fn sweep(&self, now: Instant, idle_timeout: Duration) -> bool {
        self.idle
            .borrow_mut()
            .retain(|idle| !idle.sender.is_closed() && now.duration_since(idle.since) < idle_timeout);
        self.shared.borrow_mut().retain(|connection| {
            !connection.sender.is_closed()
                && (connection.active.get() > 0
                    || now.duration_since(connection.idle_since.get()) < idle_timeout)
        });
        self.idle.borrow().is_empty() && self.shared.borrow().is_empty()
    }

    /// The endpoint is gone: idle connections close now, busy ones when their exchange is over.
    pub fn retire(&self) {
        self.retired.set(true);
        self.idle.borrow_mut().clear();
        self.shared.borrow_mut().clear();
    }
}
