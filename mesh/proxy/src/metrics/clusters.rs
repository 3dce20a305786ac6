//! Requests and connections to clusters, by Envoy's names (`cluster.<name>.upstream_*`): a set of cells per worker and
//! cluster, made with the first request or connection, gone with the cluster. What is rarer is counted by the slot
//! ([`super::events`]); both are read, with what the configuration says, in [`rows`]. A cluster that nobody uses has no cells
//! and is shown all the same.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, AtomicU32, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::time::{Duration, Instant};

use super::events::ClusterEvent;
use super::flags::Flags;
use super::series::{Cell, Histogram};
use crate::config::endpoint::HostState;
use crate::config::slot::ClusterSlot;

pub mod rows;
mod tables;

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
    /// Requests sent, each attempt.
    pub total: Cell,
    completed: Cell,
    /// Attempts that the retry policy asked for.
    pub retries: Cell,
    retry_success: Cell,
    /// Retries that there was no room for.
    pub retry_overflow: Cell,
    /// Requests that took too long.
    pub timeouts: Cell,
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
    /// Made with the first connection.
    of_connections: OnceLock<Box<OfConnections>>,
}

/// Distributions over connections.
#[derive(Debug, Default)]
struct OfConnections {
    made_in: Histogram,
    length: Histogram,
    requests: Histogram,
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
            of_connections: OnceLock::new(),
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

    /// Something rare has happened.
    pub fn note(&self, event: ClusterEvent) {
        if let Some(slot) = self.slot.upgrade() {
            slot.counted.note(event);
        }
    }

    /// Counts a request that has ended, by its owner.
    pub fn count(&self, code: u16, attempts: u32, flags: Flags, took: Duration) {
        self.completed.add(1);
        if attempts > 1 && code < 500 && !flags.has(Flags::RETRY_LIMIT) {
            self.retry_success.add(1);
        }
        if let Some(class) = usize::from(code / 100)
            .checked_sub(1)
            .and_then(|at| self.classes.get(at))
        {
            class.add(1);
            self.codes.count(code);
        }
        self.time.observe_thousandths(took.as_micros() as u64);
    }

    /// A connection to a host is being made.
    pub fn connecting(self: Arc<Self>, host: &Arc<HostState>) -> Connection {
        self.connections.add(1);
        host.counted.connecting();
        Connection {
            shared: Arc::new(Shared {
                cells: self,
                by_peer: AtomicBool::new(false),
                busy: AtomicU32::new(0),
                served: AtomicU32::new(0),
                one_by_one: AtomicBool::new(false),
                http: AtomicBool::new(false),
                over: AtomicU8::new(0),
            }),
            host: host.clone(),
            since: Instant::now(),
            made: false,
        }
    }
}

/// What the parts of a connection to an endpoint know of it together.
#[derive(Debug)]
pub struct Shared {
    cells: Arc<ClusterCells>,
    /// The endpoint has ended it.
    by_peer: AtomicBool,
    /// Requests on it.
    busy: AtomicU32,
    /// Requests that it has had.
    served: AtomicU32,
    /// Its requests come one after the other (HTTP/1): each says itself whether it has ended in good order, which may be
    /// a moment after the connection has ended.
    one_by_one: AtomicBool,
    /// It carries requests, not bytes alone.
    http: AtomicBool,
    /// [`ENDED`] and who ended it, if it was made.
    over: AtomicU8,
}

/// By us.
const ENDED: u8 = 1;
/// By the endpoint.
const ENDED_BY_PEER: u8 = 2;

impl Shared {
    /// The endpoint has said that it is over.
    pub fn ended_by_peer(&self) {
        self.by_peer.store(true, Ordering::Relaxed);
    }

    /// A request begins on it.
    pub fn begin(&self) {
        // Only the connection's worker writes.
        for count in [&self.busy, &self.served] {
            count.store(count.load(Ordering::Relaxed).wrapping_add(1), Ordering::Relaxed);
        }
    }

    /// A request on it has ended in good order.
    pub fn end(&self) {
        let busy = self.busy.load(Ordering::Relaxed).saturating_sub(1);
        self.busy.store(busy, Ordering::Relaxed);
    }

    /// Something rare has happened to it.
    pub fn note(&self, event: ClusterEvent) {
        self.cells.note(event);
    }

    /// It has ended while a request was on its way, if one is.
    fn note_request(&self) {
        if self.busy.load(Ordering::Relaxed) == 0 {
            return;
        }
        self.note(ClusterEvent::CxDestroyWithRequest);
        self.note(if self.over.load(Ordering::Relaxed) == ENDED_BY_PEER {
            ClusterEvent::CxDestroyRemoteWithRequest
        } else {
            ClusterEvent::CxDestroyLocalWithRequest
        });
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        if *self.over.get_mut() != 0 && *self.one_by_one.get_mut() {
            self.note_request();
        }
    }
}

/// A connection to an endpoint, counted until it is dropped, by its worker.
#[derive(Debug)]
pub struct Connection {
    shared: Arc<Shared>,
    host: Arc<HostState>,
    since: Instant,
    made: bool,
}

impl Connection {
    /// It is made.
    pub fn made(&mut self) {
        let now = Instant::now();
        let took = now.duration_since(self.since);
        let histograms = self.cells().of_connections.get_or_init(Box::default);
        histograms.made_in.observe_thousandths(took.as_micros() as u64);
        self.since = now;
        self.made = true;
    }

    /// It speaks that version of HTTP.
    pub fn speaks(&self, http2: bool) {
        self.shared.http.store(true, Ordering::Relaxed);
        if http2 {
            self.cells().connections_http2.add(1);
        } else {
            self.cells().connections_http1.add(1);
            self.shared.one_by_one.store(true, Ordering::Relaxed);
        }
    }

    /// It could not be made.
    pub fn failed(&self, timeout: bool) {
        self.cells().connect_failures.add(1);
        self.host.counted.connect_failed();
        if timeout {
            self.cells().connect_timeouts.add(1);
        } else {
            self.shared.ended_by_peer();
        }
    }

    /// Its own end could not be bound.
    pub fn unbound(&self) {
        self.cells().connect_failures.add(1);
        self.cells().note(ClusterEvent::BindError);
        self.host.counted.connect_failed();
    }

    /// Where its bytes are counted.
    pub fn cells(&self) -> &Arc<ClusterCells> {
        &self.shared.cells
    }

    /// What its parts know of it.
    pub fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        let cells = self.cells();
        cells.connections_closed.add(1);
        self.host.counted.connection_ends();
        let by_peer = self.shared.by_peer.load(Ordering::Relaxed);
        cells.note(if by_peer {
            ClusterEvent::CxDestroyRemote
        } else {
            ClusterEvent::CxDestroyLocal
        });
        if self.made {
            let over = if by_peer { ENDED_BY_PEER } else { ENDED };
            self.shared.over.store(over, Ordering::Relaxed);
            if !self.shared.one_by_one.load(Ordering::Relaxed) {
                self.shared.note_request();
            }
            let histograms = cells.of_connections.get_or_init(Box::default);
            let length = self.since.elapsed().as_micros() as u64;
            histograms.length.observe_thousandths(length);
            if self.shared.http.load(Ordering::Relaxed) {
                let served = self.shared.served.load(Ordering::Relaxed);
                histograms.requests.observe_thousandths(u64::from(served) * 1000);
            }
        }
    }
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
    fn a_used_cluster_costs_a_worker_less_than_a_kilobyte() {
        assert!(size_of::<ClusterCells>() <= 512, "{}", size_of::<ClusterCells>());
        assert!(size_of::<Histogram>() <= 176, "{}", size_of::<Histogram>());
    }
}
