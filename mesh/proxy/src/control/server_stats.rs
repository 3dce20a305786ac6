//! Statistics of the process and of the configuration, read when somebody asks (`server.*`, `cluster.*.membership_*`).

use std::sync::atomic::Ordering;

use super::Proxy;
use crate::config::cluster::{Breakers, Priority};
use crate::config::slot::ClusterSlot;
use crate::config::store::Store;
use crate::metrics::collect::{Family, Labels, Value};

/// Memory of the process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// Bytes in use that belong to this process alone.
    pub allocated: u64,
    /// Bytes of heap and other writable memory that are mapped.
    pub heap: u64,
    /// Resident bytes.
    pub physical: u64,
}

/// Reads `/proc/self/statm`.
pub fn memory() -> Memory {
    parse_memory(
        &std::fs::read_to_string("/proc/self/statm").unwrap_or_default(),
        page_size(),
    )
}

fn page_size() -> u64 {
    nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE)
        .ok()
        .flatten()
        .and_then(|size| u64::try_from(size).ok())
        .unwrap_or(4096)
}

/// size resident shared text lib data dt, in pages.
fn parse_memory(text: &str, page: u64) -> Memory {
    let pages: Vec<u64> = text
        .split_ascii_whitespace()
        .filter_map(|number| number.parse().ok())
        .collect();
    let at = |index: usize| pages.get(index).copied().unwrap_or(0) * page;
    Memory {
        allocated: at(1).saturating_sub(at(2)),
        heap: at(5),
        physical: at(1),
    }
}

fn gauge(name: &'static str, help: &'static str, value: f64) -> Family {
    Family {
        name,
        help,
        metrics: vec![(Vec::new(), Value::Gauge(value))],
    }
}

/// Statistics of the process.
pub(super) fn server(proxy: &Proxy) -> Vec<Family> {
    let memory = memory();
    let state = match proxy.state() {
        "LIVE" => 0.0,
        "DRAINING" => 1.0,
        _ => 2.0,
    };
    vec![
        gauge(
            "envoy_server_live",
            "1 while it serves and does not drain.",
            f64::from(u8::from(state == 0.0)),
        ),
        gauge(
            "envoy_server_state",
            "0 live, 1 draining, 2 before its first full configuration.",
            state,
        ),
        gauge(
            "envoy_server_uptime",
            "Seconds since the start.",
            proxy.uptime().as_secs() as f64,
        ),
        gauge(
            "envoy_server_concurrency",
            "Worker threads.",
            proxy.concurrency() as f64,
        ),
        gauge(
            "envoy_server_memory_allocated",
            "Bytes of its own memory.",
            memory.allocated as f64,
        ),
        gauge(
            "envoy_server_memory_physical_size",
            "Resident bytes.",
            memory.physical as f64,
        ),
    ]
}

/// Statistics of circuit breakers: open or not, then what is left, of each priority.
const BREAKERS: [&str; 16] = [
    "envoy_cluster_circuit_breakers_default_cx_open",
    "envoy_cluster_circuit_breakers_default_rq_pending_open",
    "envoy_cluster_circuit_breakers_default_rq_open",
    "envoy_cluster_circuit_breakers_default_rq_retry_open",
    "envoy_cluster_circuit_breakers_default_remaining_cx",
    "envoy_cluster_circuit_breakers_default_remaining_pending",
    "envoy_cluster_circuit_breakers_default_remaining_rq",
    "envoy_cluster_circuit_breakers_default_remaining_retries",
    "envoy_cluster_circuit_breakers_high_cx_open",
    "envoy_cluster_circuit_breakers_high_rq_pending_open",
    "envoy_cluster_circuit_breakers_high_rq_open",
    "envoy_cluster_circuit_breakers_high_rq_retry_open",
    "envoy_cluster_circuit_breakers_high_remaining_cx",
    "envoy_cluster_circuit_breakers_high_remaining_pending",
    "envoy_cluster_circuit_breakers_high_remaining_rq",
    "envoy_cluster_circuit_breakers_high_remaining_retries",
];

fn read_breakers(
    slot: &ClusterSlot,
    limits: &Breakers,
    labels: &Labels,
    into: &mut [Vec<(Labels, Value)>; BREAKERS.len()],
) {
    for (priority, _) in Priority::ALL {
        let (level, limits) = (slot.usage.of(priority), limits.of(priority));
        let used = [
            &level.connections,
            &level.pending,
            &level.requests,
            &level.retries,
        ]
        .map(|count| count.load(Ordering::Relaxed));
        let allowed = [
            limits.connections,
            limits.pending,
            limits.requests,
            limits.retry_limit(used[2]),
        ];
        let first = priority as usize * 8;
        for (index, (used, allowed)) in used.into_iter().zip(allowed).enumerate() {
            let mut put = |at: usize, value: u32| {
                into[first + at].push((labels.clone(), Value::Gauge(f64::from(value))));
            };
            put(index, u32::from(used >= allowed));
            if limits.track_remaining {
                put(4 + index, allowed.saturating_sub(used));
            }
        }
    }
}

/// Statistics of the configuration; members only of clusters that have had a request.
pub(super) fn configuration(store: &Store, now_ms: u64) -> Vec<Family> {
    let (mut total, mut healthy) = (Vec::new(), Vec::new());
    let mut breakers: [Vec<(Labels, Value)>; BREAKERS.len()] = Default::default();
    let mut pending = Vec::new();
    let mut clusters = 0;
    for slot in store.clusters() {
        clusters += 1;
        if !slot.usage.used.load(Ordering::Relaxed) {
            continue;
        }
        let labels: Labels = vec![("envoy_cluster_name", slot.name.to_string())];
        if let Some(config) = slot.config() {
            read_breakers(slot, &config.limits, &labels, &mut breakers);
            let waiting = Priority::ALL.map(|(priority, _)| &slot.usage.of(priority).pending);
            let waiting: u32 = waiting.iter().map(|count| count.load(Ordering::Relaxed)).sum();
            pending.push((labels.clone(), Value::Gauge(f64::from(waiting))));
        }
        let Some(set) = slot.endpoints() else { continue };
        let checks = slot.config().map_or(0, |config| config.health_checks.len());
        let well = set
            .all
            .iter()
            .filter(|endpoint| {
                endpoint.usable(checks) && endpoint.state.ejected_until.load(Ordering::Relaxed) <= now_ms
            })
            .count();
        total.push((labels.clone(), Value::Gauge(set.all.len() as f64)));
        healthy.push((labels, Value::Gauge(well as f64)));
    }
    let listeners = store.listeners().filter(|listener| listener.bind).count();
    let mut out = vec![
        gauge(
            "envoy_cluster_manager_active_clusters",
            "Clusters.",
            f64::from(clusters),
        ),
        gauge(
            "envoy_listener_manager_total_listeners_active",
            "Bound listeners.",
            listeners as f64,
        ),
        gauge("envoy_listener_manager_workers_started", "The workers run.", 1.0),
    ];
    let breakers = BREAKERS.into_iter().zip(breakers).map(|(name, metrics)| {
        let help = if name.contains("remaining") {
            "What a circuit breaker still allows."
        } else {
            "1 while a circuit breaker is open."
        };
        (name, help, metrics)
    });
    for (name, help, metrics) in breakers.chain([
        (
            "envoy_cluster_upstream_rq_pending_active",
            "Requests that wait for a connection.",
            pending,
        ),
        ("envoy_cluster_membership_total", "Endpoints.", total),
        (
            "envoy_cluster_membership_healthy",
            "Endpoints that may be used.",
            healthy,
        ),
    ]) {
        if !metrics.is_empty() {
            out.push(Family { name, help, metrics });
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_read_from_the_kernels_numbers() {
        let memory = parse_memory("1000 300 100 50 0 400 0\n", 4096);
        assert_eq!(memory.allocated, 200 * 4096);
        assert_eq!((memory.heap, memory.physical), (400 * 4096, 300 * 4096));
        assert_eq!(parse_memory("", 4096), Memory::default());
        assert!(super::memory().physical > 100_000);
    }
}
