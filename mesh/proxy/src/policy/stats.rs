//! Counters of filters, by Envoy's names: one cell per worker, so that nobody waits for anybody's cache line, kept by
//! name in a registry, so that a filter that is configured anew goes on counting.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

mod shown;

use shown::event_families;

use crate::metrics::collect::{Family, Labels, Value};
use crate::metrics::events::{CodecEvent, Event, HttpEvent, ListenerEvent, TcpEvent, WorkerEvents};
use crate::metrics::series::{Histogram, HistogramValue};

/// Counters that the registry holds at most; later ones count for nobody but are harmless.
const MAX_COUNTERS: usize = 10_000;

/// A cell that shares its cache line with no other.
#[derive(Debug, Default)]
#[repr(align(64))]
struct Cell(AtomicU64);

/// A counter with a cell per worker.
#[derive(Debug)]
pub struct Counter {
    cells: Box<[Cell]>,
}

impl Counter {
    fn new(workers: usize) -> Arc<Self> {
        Arc::new(Self {
            cells: (0..workers.max(1)).map(|_| Cell::default()).collect(),
        })
    }

    /// Adds one on behalf of a worker.
    pub fn add(&self, worker: usize) {
        self.add_many(worker, 1);
    }

    /// Adds that many on behalf of a worker, by that worker.
    pub fn add_many(&self, worker: usize, count: u64) {
        if let Some(cell) = self.cells.get(worker) {
            // Each cell has one writer.
            let sum = cell.0.load(Ordering::Relaxed).wrapping_add(count);
            cell.0.store(sum, Ordering::Relaxed);
        }
    }

    /// The sum over all workers.
    pub fn get(&self) -> u64 {
        self.cells.iter().map(|cell| cell.0.load(Ordering::Relaxed)).sum()
    }
}

/// A distribution with a histogram per worker, each made with its first value.
#[derive(Debug)]
pub struct Distribution {
    cells: Box<[OnceLock<Box<Histogram>>]>,
}

impl Distribution {
    fn new(workers: usize) -> Arc<Self> {
        Arc::new(Self {
            cells: (0..workers.max(1)).map(|_| OnceLock::new()).collect(),
        })
    }

    /// Counts how long something took, in milliseconds, by a worker.
    pub fn observe(&self, worker: usize, took: Duration) {
        if let Some(cell) = self.cells.get(worker) {
            cell.get_or_init(Box::default)
                .observe_thousandths(took.as_micros() as u64);
        }
    }

    fn get(&self) -> HistogramValue {
        let mut out = HistogramValue::default();
        for histogram in self.cells.iter().filter_map(OnceLock::get) {
            histogram.read(&mut out);
        }
        out
    }
}

/// Names of the counters of a kind of place.
#[derive(Debug)]
pub struct Area {
    pub(crate) label: &'static str,
    opened: &'static str,
    closed: &'static str,
    active: &'static str,
    length: &'static str,
    requests: Option<RequestNames>,
}

/// Of a place that has requests.
#[derive(Debug)]
struct RequestNames {
    total: &'static str,
    completed: &'static str,
    active: &'static str,
    classes: &'static str,
    time: &'static str,
    http1: &'static str,
    http2: &'static str,
    tls: &'static str,
    http2_requests: &'static str,
    http1_requests: &'static str,
    routed: &'static str,
    received: &'static str,
    sent: &'static str,
    /// Classes of answers by listener as well. Only these are counted: those of a manager's prefix are their sum.
    classes_by_listener: &'static str,
    completed_by_listener: &'static str,
}

/// Connection managers.
pub static HTTP: Area = Area {
    label: "envoy_http_conn_manager_prefix",
    opened: "envoy_http_downstream_cx_total",
    closed: "envoy_http_downstream_cx_destroy",
    active: "envoy_http_downstream_cx_active",
    length: "envoy_http_downstream_cx_length_ms",
    requests: Some(RequestNames {
        total: "envoy_http_downstream_rq_total",
        completed: "envoy_http_downstream_rq_completed",
        active: "envoy_http_downstream_rq_active",
        classes: "envoy_http_downstream_rq_xx",
        time: "envoy_http_downstream_rq_time",
        http1: "envoy_http_downstream_cx_http1_total",
        http2: "envoy_http_downstream_cx_http2_total",
        tls: "envoy_http_downstream_cx_ssl_total",
        http2_requests: "envoy_http_downstream_rq_http2_total",
        http1_requests: "envoy_http_downstream_rq_http1_total",
        routed: "envoy_http_rq_total",
        received: "envoy_http_downstream_cx_rx_bytes_total",
        sent: "envoy_http_downstream_cx_tx_bytes_total",
        classes_by_listener: "envoy_listener_http_downstream_rq_xx",
        completed_by_listener: "envoy_listener_http_downstream_rq_completed",
    }),
};
/// Listeners.
pub static LISTENER: Area = Area {
    label: "envoy_listener_address",
    opened: "envoy_listener_downstream_cx_total",
    closed: "envoy_listener_downstream_cx_destroy",
    active: "envoy_listener_downstream_cx_active",
    length: "envoy_listener_downstream_cx_length_ms",
    requests: None,
};

/// Counters of a place.
#[derive(Debug)]
pub struct Traffic {
    opened: Arc<Counter>,
    closed: Arc<Counter>,
    length: Arc<Distribution>,
    requests: Option<Requests>,
    http: Option<Arc<WorkerEvents<HttpEvent>>>,
    codec: Option<Arc<WorkerEvents<CodecEvent>>>,
    listener: Option<Arc<WorkerEvents<ListenerEvent>>>,
}

#[derive(Debug)]
struct Requests {
    total: Arc<Counter>,
    completed: Arc<Counter>,
    classes: [Arc<Counter>; 5],
    time: Arc<Distribution>,
    http1: Arc<Counter>,
    http2: Arc<Counter>,
    tls: Arc<Counter>,
    http2_requests: Arc<Counter>,
    routed: Arc<Counter>,
    received: Arc<Counter>,
    sent: Arc<Counter>,
}

/// Where the bytes of a worker's connections are counted.
#[derive(Clone, Debug)]
pub struct Bytes {
    received: Arc<Counter>,
    sent: Arc<Counter>,
    worker: usize,
}

impl Bytes {
    /// Bytes from the client.
    pub fn received(&self, count: usize) {
        self.received.add_many(self.worker, count as u64);
    }

    /// Bytes to the client.
    pub fn sent(&self, count: usize) {
        self.sent.add_many(self.worker, count as u64);
    }
}

impl Traffic {
    /// Counts a connection until the answer is dropped.
    pub fn open(&self, worker: usize) -> OpenCount {
        self.opened.add(worker);
        OpenCount {
            closed: self.closed.clone(),
            length: self.length.clone(),
            since: Instant::now(),
            worker,
            http: self.http.clone(),
            http2: false,
            tls: false,
        }
    }

    /// Counts what a connection speaks.
    pub fn speaks(&self, open: &mut OpenCount, http2: bool, tls: bool) {
        (open.http2, open.tls) = (http2, tls);
        if let Some(requests) = &self.requests {
            let version = if http2 { &requests.http2 } else { &requests.http1 };
            version.add(open.worker);
            if tls {
                requests.tls.add(open.worker);
            }
        }
    }

    /// Where bytes of a worker's connections are counted.
    pub fn bytes(&self, worker: usize) -> Option<Bytes> {
        self.requests.as_ref().map(|requests| Bytes {
            received: requests.received.clone(),
            sent: requests.sent.clone(),
            worker,
        })
    }

    /// Something rare has happened to a connection or request.
    pub fn note(&self, event: HttpEvent, worker: usize) {
        if let Some(events) = &self.http {
            events.note(event, worker);
        }
    }

    /// That often has something rare happened in what reads and writes HTTP.
    pub fn note_codec(&self, event: CodecEvent, times: u64, worker: usize) {
        if let Some(events) = &self.codec {
            events.note_many(event, times, worker);
        }
    }

    /// Something rare has happened to a connection of a listener.
    pub fn note_listener(&self, event: ListenerEvent, worker: usize) {
        if let Some(events) = &self.listener {
            events.note(event, worker);
        }
    }

    /// Counts a request that begins.
    pub fn request_began(&self, http2: bool, worker: usize) {
        if let Some(requests) = &self.requests {
            requests.total.add(worker);
            if http2 {
                requests.http2_requests.add(worker);
            }
        }
    }

    /// Counts a request that has come to the router.
    pub fn routed(&self, worker: usize) {
        if let Some(requests) = &self.requests {
            requests.routed.add(worker);
        }
    }

    /// Counts a request that has ended.
    pub fn request(&self, code: u16, took: Duration, worker: usize) {
        let Some(requests) = &self.requests else { return };
        requests.completed.add(worker);
        requests.time.observe(worker, took);
        let class = usize::from(code / 100).checked_sub(1);
        if let Some(counter) = class.and_then(|class| requests.classes.get(class)) {
            counter.add(worker);
        }
    }
}

/// A connection that is counted as open.
#[derive(Debug)]
pub struct OpenCount {
    closed: Arc<Counter>,
    length: Arc<Distribution>,
    since: Instant,
    worker: usize,
    http: Option<Arc<WorkerEvents<HttpEvent>>>,
    http2: bool,
    tls: bool,
}

impl Drop for OpenCount {
    fn drop(&mut self) {
        if let Some(events) = &self.http {
            if self.http2 {
                events.note(HttpEvent::CxHttp2Ended, self.worker);
            }
            if self.tls {
                events.note(HttpEvent::CxTlsEnded, self.worker);
            }
        }
        self.closed.add(self.worker);
        self.length.observe(self.worker, self.since.elapsed());
    }
}

/// All counters, by name and labels. Owned by whoever compiles the configuration.
#[derive(Debug, Default)]
pub struct Registry {
    counters: BTreeMap<(&'static str, Labels), Arc<Counter>>,
    distributions: BTreeMap<(&'static str, Labels), Arc<Distribution>>,
    /// Answers at listeners that are gone, of managers that others have, by class and manager.
    retired: BTreeMap<Labels, u64>,
    http: BTreeMap<Box<str>, Arc<WorkerEvents<HttpEvent>>>,
    listeners: BTreeMap<Box<str>, Arc<WorkerEvents<ListenerEvent>>>,
    tcp: BTreeMap<Box<str>, Arc<WorkerEvents<TcpEvent>>>,
    /// Of all managers together; made with the first of them.
    codec: Option<Arc<WorkerEvents<CodecEvent>>>,
    /// Calls by gRPC method.
    pub grpc: super::grpc_stats::Table,
    /// Where requests can be looked at.
    pub spots: super::tap::Spots,
    /// Buckets that filters share by a key and what they are made of.
    buckets:
        std::collections::HashMap<(Box<str>, super::bucket::Fill), std::sync::Weak<super::bucket::Bucket>>,
}

impl Registry {
    /// The counter of that name and these labels, made if nobody asked for it before.
    pub fn counter(
        &mut self,
        workers: usize,
        name: &'static str,
        labels: &[(&'static str, &str)],
    ) -> Arc<Counter> {
        let labels: Labels = labels
            .iter()
            .filter(|(_, value)| !value.is_empty())
            .map(|(key, value)| (*key, (*value).to_owned()))
            .collect();
        if let Some(counter) = self.counters.get(&(name, labels.clone())) {
            return counter.clone();
        }
        let counter = Counter::new(workers);
        if self.counters.len() < MAX_COUNTERS {
            self.counters.insert((name, labels), counter.clone());
        }
        counter
    }

    /// The counters of connections to a listener's address.
    pub fn traffic(&mut self, workers: usize, listener: &str) -> Traffic {
        self.traffic_in(workers, &LISTENER, listener, "")
    }

    /// The counters of connections and requests of managers with that prefix, at the listener of that address.
    pub fn traffic_of(&mut self, workers: usize, listener: &str, prefix: &str) -> Traffic {
        self.traffic_in(workers, &HTTP, prefix, listener)
    }

    fn traffic_in(&mut self, workers: usize, area: &'static Area, value: &str, listener: &str) -> Traffic {
        let label = (area.label, value);
        let requests = area.requests.as_ref().map(|names| Requests {
            total: self.counter(workers, names.total, &[label]),
            completed: self.counter(workers, names.completed, &[label]),
            classes: ["1", "2", "3", "4", "5"].map(|class| {
                self.counter(
                    workers,
                    names.classes_by_listener,
                    &[
                        ("envoy_response_code_class", class),
                        label,
                        (LISTENER.label, listener),
                    ],
                )
            }),
            time: self.distribution(workers, names.time, &[label]),
            http1: self.counter(workers, names.http1, &[label]),
            http2: self.counter(workers, names.http2, &[label]),
            tls: self.counter(workers, names.tls, &[label]),
            http2_requests: self.counter(workers, names.http2_requests, &[label]),
            routed: self.counter(workers, names.routed, &[label]),
            received: self.counter(workers, names.received, &[label]),
            sent: self.counter(workers, names.sent, &[label]),
        });
        let is_http = requests.is_some();
        Traffic {
            opened: self.counter(workers, area.opened, &[label]),
            closed: self.counter(workers, area.closed, &[label]),
            length: self.distribution(workers, area.length, &[label]),
            requests,
            http: is_http.then(|| events_of(&mut self.http, value, workers)),
            codec: is_http.then(|| {
                let made = || Arc::new(WorkerEvents::new(workers));
                self.codec.get_or_insert_with(made).clone()
            }),
            listener: (!is_http).then(|| events_of(&mut self.listeners, value, workers)),
        }
    }

    /// The counters of TCP proxies with that prefix.
    pub fn tcp(&mut self, workers: usize, prefix: &str) -> Arc<WorkerEvents<TcpEvent>> {
        events_of(&mut self.tcp, prefix, workers)
    }

    /// The distribution of that name and these labels, made if nobody asked for it before.
    pub fn distribution(
        &mut self,
        workers: usize,
        name: &'static str,
        labels: &[(&'static str, &str)],
    ) -> Arc<Distribution> {
        let labels = labels.iter().map(|(key, value)| (*key, (*value).to_owned()));
        let key = (name, labels.collect());
        if let Some(found) = self.distributions.get(&key) {
            return found.clone();
        }
        let made = Distribution::new(workers);
        if self.distributions.len() < MAX_COUNTERS {
            self.distributions.insert(key, made.clone());
        }
        made
    }

    /// The bucket that filters with that key and the same filling share; without a key it is one's own.
    pub(crate) fn bucket(
        &mut self,
        key: &str,
        fill: super::bucket::Fill,
        now_ms: u64,
    ) -> Arc<super::bucket::Bucket> {
        let make = || Arc::new(super::bucket::Bucket::new(fill, now_ms));
        if key.is_empty() {
            return make();
        }
        let place = self.buckets.entry((key.into(), fill)).or_default();
        place.upgrade().unwrap_or_else(|| {
            let bucket = make();
            *place = Arc::downgrade(&bucket);
            bucket
        })
    }

    /// Forgets counters that no filter uses any more.
    pub fn sweep(&mut self) {
        self.buckets.retain(|_, bucket| bucket.strong_count() > 0);
        let names = HTTP.requests.as_ref().map(|names| names.classes_by_listener);
        let retired = &mut self.retired;
        self.counters.retain(|(name, labels), counter| {
            let used = Arc::strong_count(counter) > 1;
            if !used && names == Some(*name) {
                *retired.entry(shown::of_manager(labels)).or_default() += counter.get();
            }
            used
        });
        self.distributions
            .retain(|_, distribution| Arc::strong_count(distribution) > 1);
        self.http.retain(|_, events| Arc::strong_count(events) > 1);
        let http = &self.http;
        self.retired.retain(|labels, _| {
            let prefix = labels.iter().find(|(key, _)| *key == HTTP.label);
            prefix.is_some_and(|(_, prefix)| http.contains_key(prefix.as_str()))
        });
        self.listeners.retain(|_, events| Arc::strong_count(events) > 1);
        self.tcp.retain(|_, events| Arc::strong_count(events) > 1);
        self.spots.sweep();
    }

    /// What was counted.
    pub fn collect(&self) -> Vec<Family> {
        let mut families: Vec<Family> = Vec::new();
        for ((name, labels), counter) in &self.counters {
            let metric = (labels.clone(), Value::Counter(counter.get() as f64));
            match families.last_mut() {
                Some(family) if family.name == *name => family.metrics.push(metric),
                _ => families.push(Family {
                    name,
                    help: "Counted by a filter.",
                    metrics: vec![metric],
                }),
            }
        }
        self.answers(&mut families);
        for area in [&HTTP, &LISTENER] {
            families.extend(active(&families, area.active, area.opened, area.closed));
            if let Some(names) = &area.requests {
                families.extend(active(&families, names.active, names.total, names.completed));
                families.extend(less(
                    &families,
                    names.http1_requests,
                    names.total,
                    names.http2_requests,
                    Value::Counter,
                    "Requests over HTTP/1.",
                ));
            }
        }
        answered(&mut families);
        families.extend(self.per_worker());
        families.extend(event_families(&self.http, HTTP.label));
        families.extend(event_families(&self.listeners, LISTENER.label));
        families.extend(event_families(&self.tcp, "envoy_tcp_prefix"));
        families.extend(self.codecs(&families));
        self.connections_by_kind(&mut families);
        for ((name, labels), distribution) in &self.distributions {
            let metric = (labels.clone(), Value::Histogram(Box::new(distribution.get())));
            match families.last_mut() {
                Some(family) if family.name == *name => family.metrics.push(metric),
                _ => families.push(Family {
                    name,
                    help: "Milliseconds.",
                    metrics: vec![metric],
                }),
            }
        }
        families.extend(self.grpc.collect());
        families.push(Family {
            name: "serin_proxy_tap_dropped_total",
            help: "Traces that a slow reader of POST /tap has lost.",
            metrics: self
                .spots
                .dropped()
                .into_iter()
                .filter(|(_, count)| *count > 0)
                .map(|(id, count)| (vec![("config_id", id)], Value::Counter(count as f64)))
                .collect(),
        });
        families.retain(|family| !family.metrics.is_empty());
        families
    }
}

/// What is going on: what has begun less what has ended.
fn active(families: &[Family], name: &'static str, began: &str, ended: &str) -> Option<Family> {
    less(families, name, began, ended, Value::Gauge, "Open now.")
}

/// One family less another.
fn less(
    families: &[Family],
    name: &'static str,
    began: &str,
    ended: &str,
    value_of: fn(f64) -> Value,
    help: &'static str,
) -> Option<Family> {
    let find = |name: &str| families.iter().find(|family| family.name == name);
    let (began, ended) = (find(began)?, find(ended)?);
    let number = |value: &Value| match value {
        Value::Counter(value) => *value,
        _ => 0.0,
    };
    // Both are in the order of their labels, and usually have the same ones.
    let mut ended = ended.metrics.iter().peekable();
    let metrics = began
        .metrics
        .iter()
        .map(|(labels, value)| {
            while ended.next_if(|(own, _)| own < labels).is_some() {}
            let over = ended.next_if(|(own, _)| own == labels);
            let over = over.map_or(0.0, |(_, value)| number(value));
            // Workers are read one after the other, and go on meanwhile.
            (labels.clone(), value_of((number(value) - over).max(0.0)))
        })
        .collect();
    Some(Family { name, help, metrics })
}

/// What is shown as completed is what was answered: a request whose client has gone is not.
fn answered(families: &mut [Family]) {
    let Some(names) = &HTTP.requests else { return };
    let mut sums: BTreeMap<Labels, f64> = BTreeMap::new();
    for (labels, value) in families
        .iter()
        .filter(|family| family.name == names.classes)
        .flat_map(|family| &family.metrics)
    {
        let place = labels.iter().filter(|(key, _)| *key == HTTP.label);
        if let Value::Counter(value) = value {
            *sums.entry(place.cloned().collect()).or_default() += value;
        }
    }
    for family in families
        .iter_mut()
        .filter(|family| family.name == names.completed)
    {
        for (labels, value) in &mut family.metrics {
            *value = Value::Counter(sums.get(labels).copied().unwrap_or(0.0));
        }
    }
}

fn events_of<E: Event>(
    all: &mut BTreeMap<Box<str>, Arc<WorkerEvents<E>>>,
    value: &str,
    workers: usize,
) -> Arc<WorkerEvents<E>> {
    if let Some(found) = all.get(value) {
        return found.clone();
    }
    let made = Arc::new(WorkerEvents::new(workers));
    if all.len() < MAX_COUNTERS {
        all.insert(value.into(), made.clone());
    }
    made
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_counter_is_found_again_by_name_and_labels_and_sums_its_workers() {
        let mut registry = Registry::default();
        let labels = [("envoy_http_conn_manager_prefix", "in")];
        let counter = registry.counter(2, "envoy_http_rbac_denied", &labels);
        counter.add(0);
        counter.add(1);
        registry.counter(2, "envoy_http_rbac_denied", &labels).add(1);
        let families = registry.collect();
        assert_eq!(families[0].metrics[0].1, Value::Counter(3.0));
        drop(counter);
        registry.sweep();
        assert!(registry.collect().is_empty());
    }

    #[test]
    fn a_managers_answers_stay_when_one_of_its_listeners_goes() {
        let mut registry = Registry::default();
        let [one, other] = ["one", "other"].map(|listener| registry.traffic_of(1, listener, "in"));
        one.request(200, Duration::ZERO, 0);
        other.request(200, Duration::ZERO, 0);
        let shown = |registry: &Registry, name: &str| -> Vec<(Labels, Value)> {
            let families = registry.collect();
            let family = families.into_iter().find(|family| family.name == name);
            let metrics = family.map(|family| family.metrics).unwrap_or_default();
            metrics.into_iter().filter(|(_, value)| value.is_used()).collect()
        };
        let class = |count: f64| {
            let labels = vec![
                ("envoy_response_code_class", "2".to_owned()),
                (HTTP.label, "in".to_owned()),
            ];
            vec![(labels, Value::Counter(count))]
        };
        let all = "envoy_http_downstream_rq_xx";
        assert_eq!(shown(&registry, all), class(2.0));
        drop(one);
        registry.sweep();
        other.request(201, Duration::ZERO, 0);
        assert_eq!(shown(&registry, all), class(3.0));
        let left = shown(&registry, "envoy_listener_http_downstream_rq_completed");
        let labels = vec![
            (HTTP.label, "in".to_owned()),
            (LISTENER.label, "other".to_owned()),
        ];
        assert_eq!(left, vec![(labels, Value::Counter(2.0))]);
        drop(other);
        registry.sweep();
        assert!(registry.collect().is_empty(), "nobody has that prefix any more");
    }
}
