//! Requests to clusters, by Envoy's names (`cluster.<name>.upstream_rq_*`): a set of cells per worker and cluster, made
//! with the first request, gone with the cluster.

use std::collections::BTreeMap;
use std::sync::{Arc, Weak};

use super::collect::{Family, Labels, Value};
use super::flags::Flags;
use super::series::{Cell, Shard};
use crate::config::slot::ClusterSlot;

/// What one worker counts of a cluster.
#[derive(Debug)]
pub struct ClusterCells {
    name: Arc<str>,
    slot: Weak<ClusterSlot>,
    total: Cell,
    completed: Cell,
    retries: Cell,
    timeouts: Cell,
    overflows: Cell,
    classes: [Cell; 5],
}

impl ClusterCells {
    /// Without requests yet.
    pub fn new(slot: &Arc<ClusterSlot>) -> Arc<Self> {
        Arc::new(Self {
            name: slot.name.clone(),
            slot: Arc::downgrade(slot),
            total: Cell::default(),
            completed: Cell::default(),
            retries: Cell::default(),
            timeouts: Cell::default(),
            overflows: Cell::default(),
            classes: Default::default(),
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
    pub fn count(&self, code: u16, attempts: u32, flags: Flags) {
        self.total.add(u64::from(attempts));
        self.retries.add(u64::from(attempts.saturating_sub(1)));
        self.completed.add(1);
        if let Some(class) = usize::from(code / 100)
            .checked_sub(1)
            .and_then(|at| self.classes.get(at))
        {
            class.add(1);
        }
        if flags.has(Flags::UPSTREAM_TIMEOUT) {
            self.timeouts.add(1);
        }
        if flags.has(Flags::UPSTREAM_OVERFLOW) {
            self.overflows.add(1);
        }
    }
}

/// What all workers counted.
pub fn collect(shards: &[Arc<Shard>]) -> Vec<Family> {
    const NAMES: [(&str, &str); 5] = [
        ("envoy_cluster_upstream_rq_total", "Requests sent, each attempt."),
        ("envoy_cluster_upstream_rq_completed", "Requests that have ended."),
        ("envoy_cluster_upstream_rq_retry", "Attempts after the first."),
        (
            "envoy_cluster_upstream_rq_timeout",
            "Requests that took too long.",
        ),
        (
            "envoy_cluster_upstream_rq_pending_overflow",
            "Requests that a circuit breaker turned away.",
        ),
    ];
    let mut sums: BTreeMap<Arc<str>, [u64; 10]> = BTreeMap::new();
    for shard in shards {
        let cells = shard.clusters.lock().clone();
        for cells in cells {
            let sum = sums.entry(cells.name.clone()).or_default();
            let own = [
                &cells.total,
                &cells.completed,
                &cells.retries,
                &cells.timeouts,
                &cells.overflows,
            ];
            for (sum, cell) in sum.iter_mut().zip(own.into_iter().chain(&cells.classes)) {
                *sum += cell.get();
            }
        }
    }
    if sums.is_empty() {
        return Vec::new();
    }
    let label = |name: &Arc<str>| ("envoy_cluster_name", name.to_string());
    let mut out: Vec<Family> = NAMES
        .into_iter()
        .enumerate()
        .map(|(index, (name, help))| Family {
            name,
            help,
            metrics: sums
                .iter()
                .map(|(cluster, sum)| (vec![label(cluster)], Value::Counter(sum[index] as f64)))
                .collect(),
        })
        .collect();
    out.push(Family {
        name: "envoy_cluster_upstream_rq_xx",
        help: "Answers by the class of their status.",
        metrics: sums
            .iter()
            .flat_map(|(cluster, sum)| {
                (1..=5).zip(&sum[5..]).map(move |(class, count)| {
                    let labels: Labels =
                        vec![("envoy_response_code_class", class.to_string()), label(cluster)];
                    (labels, Value::Counter(*count as f64))
                })
            })
            .collect(),
    });
    out
}
