//! Metric series: cells that one worker writes and anybody reads.
//!
//! A worker looks a series up by a small key of numbers and pointers (no string is touched per request), and adds with
//! plain loads and stores, because it is the only writer. Readers sum over workers.

use std::cell::{self, RefCell};
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::Mutex;

use super::clusters::ClusterCells;
use super::flags::Flags;
pub use super::histogram::{BOUNDS, Histogram, HistogramValue};
use super::peer::{Principals, ServiceIdentity, Workload};
use crate::config::slot::ClusterSlot;

/// Series that one worker may hold; what comes beyond is counted under an unknown peer and service.
pub const MAX_SERIES: usize = 10_000;

/// A number that one thread adds to.
#[derive(Debug, Default)]
pub struct Cell(AtomicU64);

impl Cell {
    /// Adds; must only be called by the owning worker.
    pub fn add(&self, n: u64) {
        self.0
            .store(self.0.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
    }

    /// The current value.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// When a series was used last, and whether it may go; see [`super::expiry`].
#[derive(Debug, Default)]
pub struct Life {
    /// Process clock, milliseconds, as of the worker's last sweep.
    touched: AtomicU64,
    expired: AtomicBool,
}

impl Life {
    fn touch(&self, now_ms: u64) {
        if self.touched.load(Ordering::Relaxed) != now_ms {
            self.touched.store(now_ms, Ordering::Relaxed);
        }
        if self.expired.load(Ordering::Relaxed) {
            self.expired.store(false, Ordering::Relaxed);
        }
    }

    /// When it was used last.
    pub fn touched(&self) -> u64 {
        self.touched.load(Ordering::Relaxed)
    }

    /// Says that nobody needs it any more; taken back when it is used before the worker drops it.
    pub fn expire(&self) {
        self.expired.store(true, Ordering::Relaxed);
    }

    fn is_expired(&self) -> bool {
        self.expired.load(Ordering::Relaxed)
    }
}

/// Who reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Reporter {
    /// The client's proxy.
    Source,
    /// The server's proxy.
    Destination,
}

/// Protocol of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Protocol {
    /// HTTP.
    Http,
    /// gRPC.
    Grpc,
    /// Bytes.
    Tcp,
}

/// What tells HTTP series apart.
#[derive(Clone, Debug)]
pub struct HttpLabels {
    /// Who reports.
    pub reporter: Reporter,
    /// The other side.
    pub peer: Arc<Workload>,
    /// The service that was asked for.
    pub service: Arc<ServiceIdentity>,
    /// HTTP or gRPC.
    pub protocol: Protocol,
    /// Status, 0 if none was sent.
    pub code: u16,
    /// gRPC status, if there was one.
    pub grpc_status: Option<u8>,
    /// Flags.
    pub flags: Flags,
    /// Who both sides proved to be, where mutual TLS was used.
    pub principals: Option<Arc<Principals>>,
}

/// Labels as numbers; equal on all workers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct HttpKey {
    principals: usize,
    peer: usize,
    service: usize,
    code: u16,
    grpc_status: u16,
    flags: Flags,
    reporter: Reporter,
    protocol: Protocol,
}

/// Interned as well; 0 for none.
fn address_of(principals: Option<&Arc<Principals>>) -> usize {
    principals.map_or(0, |principals| Arc::as_ptr(principals).addr())
}

impl HttpLabels {
    /// The labels as a key.
    pub fn key(&self) -> HttpKey {
        HttpKey {
            // Interned: equal identities have equal addresses for as long as the series holds them.
            peer: Arc::as_ptr(&self.peer).addr(),
            service: Arc::as_ptr(&self.service).addr(),
            principals: address_of(self.principals.as_ref()),
            code: self.code,
            grpc_status: self.grpc_status.map_or(u16::MAX, u16::from),
            flags: self.flags,
            reporter: self.reporter,
            protocol: self.protocol,
        }
    }
}

/// The metrics of one set of HTTP labels on one worker.
#[derive(Debug)]
pub struct HttpSeries {
    /// Its labels.
    pub labels: HttpLabels,
    /// Its use.
    pub life: Life,
    /// `istio_requests_total`.
    pub requests: Cell,
    /// `istio_request_duration_milliseconds`.
    pub duration: Histogram,
    /// `istio_request_bytes`.
    pub request_bytes: Histogram,
    /// `istio_response_bytes`.
    pub response_bytes: Histogram,
}

/// What tells TCP series apart.
#[derive(Clone, Debug)]
pub struct TcpLabels {
    /// Who reports.
    pub reporter: Reporter,
    /// The other side.
    pub peer: Arc<Workload>,
    /// The service.
    pub service: Arc<ServiceIdentity>,
    /// Flags.
    pub flags: Flags,
    /// Who both sides proved to be, where mutual TLS was used.
    pub principals: Option<Arc<Principals>>,
}

impl TcpLabels {
    /// The labels as a key.
    pub fn key(&self) -> TcpKey {
        (
            Arc::as_ptr(&self.peer).addr(),
            Arc::as_ptr(&self.service).addr(),
            address_of(self.principals.as_ref()),
            self.flags,
            self.reporter,
        )
    }
}

/// The metrics of one set of TCP labels on one worker.
#[derive(Debug)]
pub struct TcpSeries {
    /// Its labels.
    pub labels: TcpLabels,
    /// Its use.
    pub life: Life,
    /// `istio_tcp_connections_opened_total`.
    pub opened: Cell,
    /// `istio_tcp_connections_closed_total`.
    pub closed: Cell,
    /// `istio_tcp_sent_bytes_total`: towards the client.
    pub sent: Cell,
    /// `istio_tcp_received_bytes_total`: from the client.
    pub received: Cell,
}

/// Counters of what the proxy itself does, per worker.
#[derive(Debug, Default)]
pub struct WorkerCounters {
    /// Downstream connections accepted.
    pub connections: Cell,
    /// Downstream connections closed.
    pub connections_closed: Cell,
    /// Upstream connections made.
    pub upstream_connections: Cell,
    /// Upstream connections that could not be made.
    pub upstream_connect_failures: Cell,
    /// Retries.
    pub retries: Cell,
    /// Requests refused by the hygiene layer.
    pub refused_requests: Cell,
    /// Connections closed at once by the overload manager.
    pub refused_connections: Cell,
    /// Outlier ejections.
    pub ejections: Cell,
    /// Series that were folded into `unknown` for lack of room.
    pub folded_series: Cell,
    /// Series that were dropped because nobody used them any more.
    pub expired_series: Cell,
    /// Access log lines that were dropped because the sink was slow.
    pub log_dropped: Cell,
}

/// All series of one worker; the shared half.
#[derive(Debug, Default)]
pub struct Shard {
    /// HTTP series.
    pub http: Mutex<Vec<Arc<HttpSeries>>>,
    /// TCP series.
    pub tcp: Mutex<Vec<Arc<TcpSeries>>>,
    /// Requests to clusters.
    pub clusters: Mutex<Vec<Arc<ClusterCells>>>,
    /// Own counters.
    pub counters: WorkerCounters,
}

/// Labels of TCP series as numbers; equal on all workers.
pub type TcpKey = (usize, usize, usize, Flags, Reporter);

/// All series of one worker; the worker's half.
pub struct Recorder {
    shard: Arc<Shard>,
    /// Process clock as of the last sweep: uses are dated by it.
    now_ms: cell::Cell<u64>,
    http: RefCell<HashMap<HttpKey, Arc<HttpSeries>, foldhash::fast::RandomState>>,
    tcp: RefCell<HashMap<TcpKey, Arc<TcpSeries>, foldhash::fast::RandomState>>,
    /// By the number of the cluster's slot.
    clusters: RefCell<Vec<Option<Arc<ClusterCells>>>>,
}

impl Recorder {
    /// The worker's half of `shard`.
    pub fn new(shard: Arc<Shard>) -> Self {
        Self {
            shard,
            now_ms: cell::Cell::new(crate::clock::now_ms()),
            http: RefCell::default(),
            tcp: RefCell::default(),
            clusters: RefCell::default(),
        }
    }

    /// Where what happens to a cluster is counted.
    pub fn cluster(&self, slot: &Arc<ClusterSlot>) -> Arc<ClusterCells> {
        let mut clusters = self.clusters.borrow_mut();
        let index = slot.id as usize;
        if index >= clusters.len() {
            clusters.resize(index + 1, None);
        }
        if let Some(cells) = clusters[index].as_ref().filter(|cells| cells.are_of(slot)) {
            return cells.clone();
        }
        let cells = ClusterCells::new(slot);
        self.shard.clusters.lock().push(cells.clone());
        clusters[index] = Some(cells.clone());
        cells
    }

    /// The worker's own counters.
    pub fn counters(&self) -> &WorkerCounters {
        &self.shard.counters
    }

    /// Drops series that have expired; called now and then.
    pub fn sweep(&self, now_ms: u64) {
        self.now_ms.set(now_ms);
        let mut gone = false;
        for entry in &mut *self.clusters.borrow_mut() {
            if entry.as_ref().is_some_and(|cells| cells.are_stale()) {
                *entry = None;
                gone = true;
            }
        }
        if gone {
            self.shard.clusters.lock().retain(|cells| !cells.are_stale());
        }
        let mut dropped = 0;
        self.http.borrow_mut().retain(|_, series| {
            let keep = !series.life.is_expired();
            dropped += u64::from(!keep);
            keep
        });
        self.tcp.borrow_mut().retain(|_, series| {
            let keep = !series.life.is_expired();
            dropped += u64::from(!keep);
            keep
        });
        if dropped > 0 {
            self.shard.counters.expired_series.add(dropped);
            // Both sides go by the flag, which only this thread takes back.
            self.shard.http.lock().retain(|series| !series.life.is_expired());
            self.shard.tcp.lock().retain(|series| !series.life.is_expired());
        }
    }

    /// The series with these labels.
    pub fn http(&self, labels: &HttpLabels) -> Arc<HttpSeries> {
        let mut table = self.http.borrow_mut();
        if let Some(series) = table.get(&labels.key()) {
            series.life.touch(self.now_ms.get());
            return series.clone();
        }
        let mut labels = labels.clone();
        if table.len() >= MAX_SERIES {
            self.shard.counters.folded_series.add(1);
            labels.peer = Workload::unknown();
            labels.service = ServiceIdentity::unknown();
            labels.principals = None;
            if let Some(series) = table.get(&labels.key()) {
                series.life.touch(self.now_ms.get());
                return series.clone();
            }
        }
        let series = Arc::new(HttpSeries {
            life: Life::default(),
            requests: Cell::default(),
            duration: Histogram::default(),
            request_bytes: Histogram::default(),
            response_bytes: Histogram::default(),
            labels,
        });
        series.life.touch(self.now_ms.get());
        table.insert(series.labels.key(), series.clone());
        self.shard.http.lock().push(series.clone());
        series
    }

    /// The TCP series with these labels.
    pub fn tcp(&self, labels: &TcpLabels) -> Arc<TcpSeries> {
        let mut table = self.tcp.borrow_mut();
        if let Some(series) = table.get(&labels.key()) {
            series.life.touch(self.now_ms.get());
            return series.clone();
        }
        let mut labels = labels.clone();
        if table.len() >= MAX_SERIES {
            self.shard.counters.folded_series.add(1);
            labels.peer = Workload::unknown();
            labels.service = ServiceIdentity::unknown();
            labels.principals = None;
            if let Some(series) = table.get(&labels.key()) {
                series.life.touch(self.now_ms.get());
                return series.clone();
            }
        }
        let series = Arc::new(TcpSeries {
            life: Life::default(),
            opened: Cell::default(),
            closed: Cell::default(),
            sent: Cell::default(),
            received: Cell::default(),
            labels,
        });
        series.life.touch(self.now_ms.get());
        table.insert(series.labels.key(), series.clone());
        self.shard.tcp.lock().push(series.clone());
        series
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_fall_into_the_bucket_whose_bound_they_do_not_exceed() {
        let histogram = Histogram::default();
        for value in [0, 500, 501, 1_000, 3_600_000_000, 3_600_000_001] {
            histogram.observe_thousandths(value);
        }
        let mut read = HistogramValue::default();
        histogram.read(&mut read);
        assert_eq!(read.buckets[0], 2);
        assert_eq!(read.buckets[1], 2);
        assert_eq!(read.buckets[18], 1);
        assert_eq!(read.buckets[19], 1);
        assert_eq!(read.count(), 6);
    }

    #[test]
    fn equal_labels_are_one_series_and_different_ones_are_not() {
        let recorder = Recorder::new(Arc::default());
        let labels = |code| HttpLabels {
            reporter: Reporter::Source,
            peer: Workload::parse("a;b;c;d;e"),
            service: ServiceIdentity::new("h", "n", "s"),
            protocol: Protocol::Http,
            code,
            grpc_status: None,
            flags: Flags::default(),
            principals: None,
        };
        let first = recorder.http(&labels(200));
        assert!(Arc::ptr_eq(&first, &recorder.http(&labels(200))));
        assert!(!Arc::ptr_eq(&first, &recorder.http(&labels(500))));
    }
}
