//! Requests and connections to clusters, by Envoy's names (`cluster.<name>.upstream_*`): a set of cells per worker and
//! cluster, made with the first request or connection, gone with the cluster. A cluster that nobody uses costs nothing.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::time::{Duration, Instant};

use super::collect::{Family, Labels, Value};
use super::flags::Flags;
use super::series::{Cell, Histogram, HistogramValue, Shard};
use crate::config::endpoint::HostState;
use crate::config::slot::ClusterSlot;

/// Status codes that are counted without more memory.
const FIRST_CODES: usize = 4;
/// Status codes that are counted after that; further ones only by their class.
const MORE_CODES: usize = 60;

/// A status code and how often it came.
#[derive(Debug, Default)]
struct Code {
    /// 0 while nobody has it.
    code: AtomicU16,
    count: Cell,
}

/// Counts by status code: in the order in which they came up, so the usual one is found at once.
#[derive(Debug, Default)]
struct Codes {
    first: [Code; FIRST_CODES],
    more: OnceLock<Box<[Code]>>,
}

impl Codes {
    fn count(&self, code: u16) {
        let found = Self::find(&self.first, code).or_else(|| {
            let more = || (0..MORE_CODES).map(|_| Code::default()).collect();
            Self::find(self.more.get_or_init(more), code)
        });
        if let Some(cell) = found {
            cell.add(1);
        }
    }

    fn find(codes: &[Code], code: u16) -> Option<&Cell> {
        for entry in codes {
            match entry.code.load(Ordering::Relaxed) {
                own if own == code => return Some(&entry.count),
                0 => {
                    entry.code.store(code, Ordering::Relaxed);
                    return Some(&entry.count);
                }
                _ => {}
            }
        }
        None
    }

    fn read(&self, into: &mut BTreeMap<u16, u64>) {
        for entry in self.first.iter().chain(self.more.get().into_iter().flatten()) {
            match entry.code.load(Ordering::Relaxed) {
                0 => return,
                code => *into.entry(code).or_default() += entry.count.get(),
            }
        }
    }
}

/// What one worker counts of a cluster. Only that worker adds.
#[derive(Debug)]
pub struct ClusterCells {
    name: Arc<str>,
    slot: Weak<ClusterSlot>,
    /// Requests that have come to it.
    pub began: Cell,
    total: Cell,
    completed: Cell,
    retries: Cell,
    retry_success: Cell,
    /// Retries that there was no room for.
    pub retry_overflow: Cell,
    timeouts: Cell,
    /// Tries that took too long.
    pub per_try_timeouts: Cell,
    /// Requests that waited for a connection.
    pub pending: Cell,
    /// Requests that a circuit breaker turned away.
    pub pending_overflow: Cell,
    classes: [Cell; 5],
    codes: Codes,
    time: Histogram,
    connections: Cell,
    connections_http1: Cell,
    connections_http2: Cell,
    connections_closed: Cell,
    connect_failures: Cell,
    connect_timeouts: Cell,
    /// Connections that a circuit breaker did not allow.
    pub connection_overflow: Cell,
    /// Bytes from endpoints.
    pub received: Cell,
    /// Bytes to endpoints.
    pub sent: Cell,
    connect_time: OnceLock<Box<Histogram>>,
    connection_length: OnceLock<Box<Histogram>>,
}

impl ClusterCells {
    /// Without requests yet.
    pub fn new(slot: &Arc<ClusterSlot>) -> Arc<Self> {
        Arc::new(Self {
            name: slot.name.clone(),
            slot: Arc::downgrade(slot),
            began: Cell::default(),
            total: Cell::default(),
            completed: Cell::default(),
            retries: Cell::default(),
            retry_success: Cell::default(),
            retry_overflow: Cell::default(),
            timeouts: Cell::default(),
            per_try_timeouts: Cell::default(),
            pending: Cell::default(),
            pending_overflow: Cell::default(),
            classes: Default::default(),
            codes: Codes::default(),
            time: Histogram::default(),
            connections: Cell::default(),
            connections_http1: Cell::default(),
            connections_http2: Cell::default(),
            connections_closed: Cell::default(),
            connect_failures: Cell::default(),
            connect_timeouts: Cell::default(),
            connection_overflow: Cell::default(),
            received: Cell::default(),
            sent: Cell::default(),
            connect_time: OnceLock::new(),
            connection_length: OnceLock::new(),
        })
    }

    /// Whether they are those of that slot.
    pub fn are_of(&self, slot: &Arc<ClusterSlot>) -> bool {
        std::ptr::eq(self.slot.as_ptr(), Arc::as_ptr(slot))
    }

    /// Whether the cluster is gone.
    pub fn are_stale(&self) -> bool {
        self.slot.strong_count() == 0
    }

    /// Counts a request that has ended, by its owner.
    pub fn count(&self, code: u16, attempts: u32, flags: Flags, took: Duration) {
        self.total.add(u64::from(attempts));
        self.completed.add(1);
        if attempts > 1 {
            self.retries.add(u64::from(attempts - 1));
            if code < 500 && !flags.has(Flags::RETRY_LIMIT) {
                self.retry_success.add(1);
            }
        }
        if let Some(class) = usize::from(code / 100)
            .checked_sub(1)
            .and_then(|at| self.classes.get(at))
        {
            class.add(1);
            self.codes.count(code);
        }
        if flags.has(Flags::UPSTREAM_TIMEOUT) {
            self.timeouts.add(1);
        }
        self.time.observe_thousandths(took.as_micros() as u64);
    }

    /// A connection to a host is being made.
    pub fn connecting(self: Arc<Self>, host: &Arc<HostState>) -> Connection {
        self.connections.add(1);
        host.counted.connecting();
        Connection {
            cells: self,
            host: host.clone(),
            since: Instant::now(),
        }
    }
}

/// A connection to an endpoint, counted until it is dropped, by its worker.
#[derive(Debug)]
pub struct Connection {
    cells: Arc<ClusterCells>,
    host: Arc<HostState>,
    since: Instant,
}

impl Connection {
    /// It is made.
    pub fn made(&mut self) {
        let now = Instant::now();
        let took = now.duration_since(self.since);
        let histogram = self.cells.connect_time.get_or_init(Box::default);
        histogram.observe_thousandths(took.as_micros() as u64);
        self.since = now;
    }

    /// It speaks that version of HTTP.
    pub fn speaks(&self, http2: bool) {
        if http2 {
            self.cells.connections_http2.add(1);
        } else {
            self.cells.connections_http1.add(1);
        }
    }

    /// It could not be made.
    pub fn failed(&self, timeout: bool) {
        self.cells.connect_failures.add(1);
        self.host.counted.connect_failed();
        if timeout {
            self.cells.connect_timeouts.add(1);
        }
    }

    /// Where its bytes are counted.
    pub fn cells(&self) -> &Arc<ClusterCells> {
        &self.cells
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.cells.connections_closed.add(1);
        self.host.counted.connection_ends();
        let length = self.cells.connection_length.get_or_init(Box::default);
        length.observe_thousandths(self.since.elapsed().as_micros() as u64);
    }
}

type Read = fn(&ClusterCells) -> &Cell;

/// Counters by name.
const COUNTERS: [(&str, &str, Read); 19] = [
    (
        "envoy_cluster_upstream_rq_total",
        "Requests sent, each attempt.",
        |cells| &cells.total,
    ),
    (
        "envoy_cluster_upstream_rq_completed",
        "Requests that have ended.",
        |cells| &cells.completed,
    ),
    (
        "envoy_cluster_upstream_rq_retry",
        "Attempts after the first.",
        |cells| &cells.retries,
    ),
    (
        "envoy_cluster_upstream_rq_retry_success",
        "Requests that a retry answered.",
        |cells| &cells.retry_success,
    ),
    (
        "envoy_cluster_upstream_rq_retry_overflow",
        "Retries that there was no room for.",
        |cells| &cells.retry_overflow,
    ),
    (
        "envoy_cluster_upstream_rq_timeout",
        "Requests that took too long.",
        |cells| &cells.timeouts,
    ),
    (
        "envoy_cluster_upstream_rq_per_try_timeout",
        "Attempts that took too long.",
        |cells| &cells.per_try_timeouts,
    ),
    (
        "envoy_cluster_upstream_rq_pending_total",
        "Requests that waited for a connection.",
        |cells| &cells.pending,
    ),
    (
        "envoy_cluster_upstream_rq_pending_overflow",
        "Requests that a circuit breaker turned away.",
        |cells| &cells.pending_overflow,
    ),
    ("envoy_cluster_upstream_cx_total", "Connections begun.", |cells| {
        &cells.connections
    }),
    (
        "envoy_cluster_upstream_cx_http1_total",
        "Connections with HTTP/1.",
        |cells| &cells.connections_http1,
    ),
    (
        "envoy_cluster_upstream_cx_http2_total",
        "Connections with HTTP/2.",
        |cells| &cells.connections_http2,
    ),
    (
        "envoy_cluster_upstream_cx_destroy",
        "Connections ended.",
        |cells| &cells.connections_closed,
    ),
    (
        "envoy_cluster_upstream_cx_connect_fail",
        "Connections that could not be made.",
        |cells| &cells.connect_failures,
    ),
    (
        "envoy_cluster_upstream_cx_connect_timeout",
        "Connections that were not made in time.",
        |cells| &cells.connect_timeouts,
    ),
    (
        "envoy_cluster_upstream_cx_overflow",
        "Connections that a circuit breaker did not allow.",
        |cells| &cells.connection_overflow,
    ),
    (
        "envoy_cluster_upstream_cx_rx_bytes_total",
        "Bytes from endpoints.",
        |cells| &cells.received,
    ),
    (
        "envoy_cluster_upstream_cx_tx_bytes_total",
        "Bytes to endpoints.",
        |cells| &cells.sent,
    ),
    // Not shown itself: what has begun less what has ended is what is active.
    ("", "", |cells| &cells.began),
];
const COMPLETED: usize = 1;
const CONNECTIONS: usize = 9;
const CONNECTIONS_CLOSED: usize = 12;
const BEGAN: usize = 18;

#[derive(Default)]
struct Sum {
    counters: [u64; COUNTERS.len()],
    classes: [u64; 5],
    codes: BTreeMap<u16, u64>,
    time: HistogramValue,
    connect: HistogramValue,
    length: HistogramValue,
}

/// What all workers counted.
pub fn collect(shards: &[Arc<Shard>]) -> Vec<Family> {
    let mut sums: BTreeMap<Arc<str>, Sum> = BTreeMap::new();
    for shard in shards {
        let cells = shard.clusters.lock().clone();
        for cells in cells {
            let sum = sums.entry(cells.name.clone()).or_default();
            for (sum, (.., read)) in sum.counters.iter_mut().zip(COUNTERS) {
                *sum += read(&cells).get();
            }
            for (sum, cell) in sum.classes.iter_mut().zip(&cells.classes) {
                *sum += cell.get();
            }
            cells.codes.read(&mut sum.codes);
            cells.time.read(&mut sum.time);
            for (histogram, sum) in [
                (&cells.connect_time, &mut sum.connect),
                (&cells.connection_length, &mut sum.length),
            ] {
                if let Some(histogram) = histogram.get() {
                    histogram.read(sum);
                }
            }
        }
    }
    if sums.is_empty() {
        return Vec::new();
    }
    families(&sums)
}

fn families(sums: &BTreeMap<Arc<str>, Sum>) -> Vec<Family> {
    let label = |name: &Arc<str>| ("envoy_cluster_name", name.to_string());
    let each = |read: &dyn Fn(&Sum) -> Value| {
        sums.iter()
            .map(|(cluster, sum)| (vec![label(cluster)], read(sum)))
            .collect()
    };
    let mut out: Vec<Family> = COUNTERS
        .into_iter()
        .enumerate()
        .filter(|(_, (name, ..))| !name.is_empty())
        .map(|(index, (name, help, _))| Family {
            name,
            help,
            metrics: each(&|sum| Value::Counter(sum.counters[index] as f64)),
        })
        .collect();
    for (name, help, more, less) in [
        (
            "envoy_cluster_upstream_rq_active",
            "Requests on their way.",
            BEGAN,
            COMPLETED,
        ),
        (
            "envoy_cluster_upstream_cx_active",
            "Connections open, or being made.",
            CONNECTIONS,
            CONNECTIONS_CLOSED,
        ),
    ] {
        out.push(Family {
            name,
            help,
            // Workers are read one after the other, and go on meanwhile.
            metrics: each(&|sum| Value::Gauge(sum.counters[more].saturating_sub(sum.counters[less]) as f64)),
        });
    }
    type ReadHistogram = fn(&Sum) -> &HistogramValue;
    let histograms: [(&str, &str, ReadHistogram); 3] = [
        (
            "envoy_cluster_upstream_rq_time",
            "Milliseconds that requests took.",
            |sum| &sum.time,
        ),
        (
            "envoy_cluster_upstream_cx_connect_ms",
            "Milliseconds that connections took to be made.",
            |sum| &sum.connect,
        ),
        (
            "envoy_cluster_upstream_cx_length_ms",
            "Milliseconds that connections lasted.",
            |sum| &sum.length,
        ),
    ];
    for (name, help, read) in histograms {
        out.push(Family {
            name,
            help,
            metrics: each(&|sum| Value::Histogram(Box::new(read(sum).clone()))),
        });
    }
    out.push(Family {
        name: "envoy_cluster_upstream_rq_xx",
        help: "Answers by the class of their status.",
        metrics: sums
            .iter()
            .flat_map(|(cluster, sum)| {
                (1..=5).zip(&sum.classes).map(move |(class, count)| {
                    let labels: Labels =
                        vec![("envoy_response_code_class", class.to_string()), label(cluster)];
                    (labels, Value::Counter(*count as f64))
                })
            })
            .collect(),
    });
    out.push(Family {
        name: "envoy_cluster_upstream_rq",
        help: "Answers by their status.",
        metrics: sums
            .iter()
            .flat_map(|(cluster, sum)| {
                sum.codes.iter().map(move |(code, count)| {
                    let labels: Labels = vec![("envoy_response_code", code.to_string()), label(cluster)];
                    (labels, Value::Counter(*count as f64))
                })
            })
            .collect(),
    });
    out.retain(|family| !family.metrics.is_empty());
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_status_is_counted_once_whatever_their_number_and_those_beyond_the_limit_by_class_only() {
        let codes = Codes::default();
        let all: Vec<u16> = (200..=280).collect();
        for (times, code) in all.iter().enumerate() {
            for _ in 0..=times {
                codes.count(*code);
            }
        }
        let mut read = BTreeMap::new();
        codes.read(&mut read);
        let known = FIRST_CODES + MORE_CODES;
        let expected: BTreeMap<u16, u64> = all.iter().copied().zip(1..).take(known).collect();
        assert_eq!(read, expected);
    }

    #[test]
    fn counters_are_in_their_places() {
        for (index, name) in [
            (COMPLETED, "envoy_cluster_upstream_rq_completed"),
            (CONNECTIONS, "envoy_cluster_upstream_cx_total"),
            (CONNECTIONS_CLOSED, "envoy_cluster_upstream_cx_destroy"),
            (BEGAN, ""),
        ] {
            assert_eq!(COUNTERS[index].0, name);
        }
    }

    #[test]
    fn a_used_cluster_costs_a_worker_less_than_a_kilobyte() {
        assert!(size_of::<ClusterCells>() <= 512, "{}", size_of::<ClusterCells>());
        assert!(size_of::<Histogram>() <= 176, "{}", size_of::<Histogram>());
    }
}
