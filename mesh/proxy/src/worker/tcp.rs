//! TCP: a connection and its endpoint joined both ways, counted, with limits of time.
//!
//! `reach` connects, `relay` moves the bytes.

use std::cell::Cell;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

mod reach;
mod relay;

pub(super) use reach::{Upstream, open};

use reach::End;
use relay::{join_sockets, relay};

use super::Worker;
use super::connection_log::{ConnectionLog, periodically};
use super::io::Io;
use super::seldom::Seldom;
use crate::config::listener::TcpProxy;
use crate::metrics::clusters::ClusterCells;
use crate::metrics::events::{TcpEvent, WorkerEvents};
use crate::metrics::flags::Flags;
use crate::metrics::series::TcpSeries;
use crate::observe::record::LogType;
use crate::policy::filter_state::FilterState;
use crate::tls::info::ConnectionTls;
use crate::upstream::connect::Stream;

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

impl Counted {
    fn of(series: Option<Arc<TcpSeries>>) -> Self {
        if let Some(series) = &series {
            series.opened.add(1);
        }
        Self(series)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        if let Some(series) = &self.0 {
            series.closed.add(1);
        }
    }
}

/// Where the bytes of a connection are counted.
struct Moved<'a> {
    proxy: &'a TcpProxy,
    log: &'a ConnectionLog,
    series: Counted,
    cells: Option<Arc<ClusterCells>>,
    worker: usize,
    last: Cell<Instant>,
}

impl Moved<'_> {
    /// From the client to the endpoint.
    fn up(&self, count: usize) {
        self.last.set(Instant::now());
        let count = count as u64;
        self.log.received.set(self.log.received.get() + count);
        if let Some(series) = &self.series.0 {
            series.received.add(count);
        }
        if let Some(cells) = &self.cells {
            cells.sent.add(count);
        }
        self.proxy.bytes[0].add_many(self.worker, count);
    }

    /// From the endpoint to the client.
    fn down(&self, count: usize) {
        self.last.set(Instant::now());
        let count = count as u64;
        self.log.sent.set(self.log.sent.get() + count);
        if let Some(series) = &self.series.0 {
            series.sent.add(count);
        }
        if let Some(cells) = &self.cells {
            cells.received.add(count);
        }
        self.proxy.bytes[1].add_many(self.worker, count);
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
    let shared = upstream.connection.as_ref().map(|own| own.shared().clone());
    let moved = Moved {
        proxy: &proxy,
        log: &log,
        series: Counted::of(proxy.stats.then(|| worker.recorder.tcp(&upstream.labels))),
        cells: upstream.connection.as_ref().map(|own| own.cells().clone()),
        worker: worker.id,
        last: Cell::new(Instant::now()),
    };
    let received = |count| moved.up(count);
    let sent = |count| moved.down(count);
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
                let stream = tunnel.stream;
                relay(downstream, stream, &prefix, &upstream.early, received, sent).await
            }
        };
    };
    tokio::select! {
        biased;
        // Each side has said that it is over, or one has broken.
        () = both => {
            if let Some(shared) = &shared {
                shared.ended_by_peer();
            }
        }
        () = Seldom::new(limits(&worker, &moved)) => {}
    }
}

/// Ends when the connection must, and says why.
async fn limits(worker: &Worker, moved: &Moved<'_>) {
    let (proxy, log) = (moved.proxy, moved.log);
    tokio::select! {
        () = quiet(&moved.last, proxy.idle_timeout) => {
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
