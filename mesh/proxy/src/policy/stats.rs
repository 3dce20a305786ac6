//! Counters of filters, by Envoy's names: one cell per worker, so that nobody waits for anybody's cache line, kept by
//! name in a registry, so that a filter that is configured anew goes on counting.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::metrics::collect::{Family, Labels, Value};

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

/// Names of the counters of a kind of place.
#[derive(Debug)]
pub struct Area {
    label: &'static str,
    opened: &'static str,
    closed: &'static str,
    requests: Option<&'static str>,
    classes: Option<&'static str>,
}

/// Connection managers.
pub static HTTP: Area = Area {
    label: "envoy_http_conn_manager_prefix",
    opened: "envoy_http_downstream_cx_total",
    closed: "envoy_http_downstream_cx_destroy",
    requests: Some("envoy_http_downstream_rq_total"),
    classes: Some("envoy_http_downstream_rq_xx"),
};
/// Listeners.
pub static LISTENER: Area = Area {
    label: "envoy_listener_address",
    opened: "envoy_listener_downstream_cx_total",
    closed: "envoy_listener_downstream_cx_destroy",
    requests: None,
    classes: None,
};

/// Counters of a place.
#[derive(Debug)]
pub struct Traffic {
    opened: Arc<Counter>,
    closed: Arc<Counter>,
    requests: Option<Arc<Counter>>,
    classes: Option<[Arc<Counter>; 5]>,
}

impl Traffic {
    /// Counts a connection until the answer is dropped.
    pub fn open(&self, worker: usize) -> OpenCount {
        self.opened.add(worker);
        OpenCount {
            closed: self.closed.clone(),
            worker,
        }
    }

    /// Counts a request that has ended.
    pub fn request(&self, code: u16, worker: usize) {
        if let Some(requests) = &self.requests {
            requests.add(worker);
        }
        let class = usize::from(code / 100).checked_sub(1);
        if let Some(counter) = self
            .classes
            .as_ref()
            .zip(class)
            .and_then(|(all, class)| all.get(class))
        {
            counter.add(worker);
        }
    }
}

/// A connection that is counted as open.
#[derive(Debug)]
pub struct OpenCount {
    closed: Arc<Counter>,
    worker: usize,
}

impl Drop for OpenCount {
    fn drop(&mut self) {
        self.closed.add(self.worker);
    }
}

/// All counters, by name and labels. Owned by whoever compiles the configuration.
#[derive(Debug, Default)]
pub struct Registry {
    counters: BTreeMap<(&'static str, Labels), Arc<Counter>>,
    /// Calls by gRPC method.
    pub grpc: super::grpc_stats::Table,
    /// Where requests can be looked at.
    pub spots: super::tap::Spots,
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

    /// The counters of connections and requests of one place: a connection manager's prefix, a listener's address.
    pub fn traffic(&mut self, workers: usize, area: &'static Area, value: &str) -> Traffic {
        let label = (area.label, value);
        let mut counter = |name| self.counter(workers, name, &[label]);
        let (opened, closed) = (counter(area.opened), counter(area.closed));
        let requests = area.requests.map(&mut counter);
        let classes = area.classes.map(|name| {
            ["1", "2", "3", "4", "5"]
                .map(|class| self.counter(workers, name, &[("envoy_response_code_class", class), label]))
        });
        Traffic {
            opened,
            closed,
            requests,
            classes,
        }
    }

    /// Forgets counters that no filter uses any more.
    pub fn sweep(&mut self) {
        self.counters.retain(|_, counter| Arc::strong_count(counter) > 1);
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
        for area in [&HTTP, &LISTENER] {
            families.extend(active(&families, area));
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

/// Open connections: those that were opened less those that were closed.
fn active(families: &[Family], area: &Area) -> Option<Family> {
    let find = |name: &str| families.iter().find(|family| family.name == name);
    let (opened, closed) = (find(area.opened)?, find(area.closed)?);
    let number = |value: &Value| match value {
        Value::Counter(value) => *value,
        _ => 0.0,
    };
    let metrics = opened
        .metrics
        .iter()
        .map(|(labels, value)| {
            let closed = closed.metrics.iter().find(|(own, _)| own == labels);
            let open = number(value) - closed.map_or(0.0, |(_, value)| number(value));
            (labels.clone(), Value::Gauge(open))
        })
        .collect();
    Some(Family {
        name: match area.label {
            "envoy_listener_address" => "envoy_listener_downstream_cx_active",
            _ => "envoy_http_downstream_cx_active",
        },
        help: "Connections open.",
        metrics,
    })
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
}
