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
        if let Some(cell) = self.cells.get(worker) {
            cell.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Adds that many on behalf of a worker.
    pub fn add_many(&self, worker: usize, count: u64) {
        if let Some(cell) = self.cells.get(worker) {
            cell.0.fetch_add(count, Ordering::Relaxed);
        }
    }

    /// The sum over all workers.
    pub fn get(&self) -> u64 {
        self.cells.iter().map(|cell| cell.0.load(Ordering::Relaxed)).sum()
    }
}

/// All counters, by name and labels. Owned by whoever compiles the configuration.
#[derive(Debug, Default)]
pub struct Registry {
    counters: BTreeMap<(&'static str, Labels), Arc<Counter>>,
    /// Calls by gRPC method.
    pub grpc: super::grpc_stats::Table,
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

    /// Forgets counters that no filter uses any more.
    pub fn sweep(&mut self) {
        self.counters.retain(|_, counter| Arc::strong_count(counter) > 1);
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
        families.extend(self.grpc.collect());
        families
    }
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
