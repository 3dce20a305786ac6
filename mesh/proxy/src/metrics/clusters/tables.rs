//! Families of statistics that every cluster has one series of: names, help, and where the values are.

use std::sync::LazyLock;
use std::sync::atomic::AtomicU32;

use super::{Cell, ClusterCells};
use crate::config::slot::Updates;
use crate::metrics::events::{ClusterEvent, Event};
use crate::metrics::names;

pub(super) type Read = fn(&ClusterCells) -> &Cell;

/// Counters by name.
pub(super) const COUNTERS: [(&str, &str, Read); 19] = [
    (
        "envoy_cluster_upstream_rq_total",
        "Requests sent, each attempt.",
        |cells| &cells.total,
    ),
    (
        "envoy_cluster_upstream_rq_completed",
        "Requests that have been answered.",
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
pub(super) const COMPLETED: usize = 1;
pub(super) const CONNECTIONS: usize = 9;
pub(super) const CONNECTIONS_HTTP2: usize = 11;
pub(super) const CONNECTIONS_CLOSED: usize = 12;
pub(super) const BEGAN: usize = 18;

/// Counters of updates of endpoints, and those that only clusters have which ask for them.
pub(super) const UPDATES: [(&str, &str, fn(&Updates) -> &AtomicU32); 6] = [
    (
        "envoy_cluster_membership_change",
        "Changes of the set of endpoints.",
        |updates| &updates.memberships,
    ),
    (
        "envoy_cluster_update_attempt",
        "Times that endpoints were asked for.",
        |updates| &updates.attempts,
    ),
    (
        "envoy_cluster_update_success",
        "Answers that were taken.",
        |updates| &updates.successes,
    ),
    (
        "envoy_cluster_update_failure",
        "Times that endpoints could not be had.",
        |updates| &updates.failures,
    ),
    (
        "envoy_cluster_update_no_rebuild",
        "Answers that changed nothing.",
        |updates| &updates.unchanged,
    ),
    (
        "envoy_cluster_update_rejected",
        "Answers that were refused.",
        |updates| &updates.rejected,
    ),
];
pub(super) const ATTEMPTS: usize = 1;
pub(super) const FAILURES: usize = 3;
pub(super) const REJECTED: usize = 5;

/// Gauges: those of the cluster, then of circuit breakers, of each priority.
pub(super) const GAUGES: [(&str, &str); 25] = [
    ("envoy_cluster_membership_total", "Endpoints."),
    ("envoy_cluster_membership_healthy", "Endpoints that may be used."),
    (
        "envoy_cluster_membership_degraded",
        "Endpoints that are degraded.",
    ),
    (
        "envoy_cluster_membership_excluded",
        "Endpoints that count for nothing because they have not been checked yet.",
    ),
    (
        "envoy_cluster_max_host_weight",
        "The largest weight, of endpoints that are discovered.",
    ),
    (
        "envoy_cluster_warming_state",
        "1 while the cluster waits for its endpoints.",
    ),
    (
        "envoy_cluster_upstream_rq_pending_active",
        "Requests that wait for a connection.",
    ),
    (
        "envoy_cluster_outlier_detection_ejections_active",
        "Endpoints that are ejected.",
    ),
    (
        "envoy_cluster_health_check_healthy",
        "Endpoints that pass their checks.",
    ),
    (
        "envoy_cluster_circuit_breakers_default_cx_open",
        "1 while a circuit breaker is open.",
    ),
    (
        "envoy_cluster_circuit_breakers_default_rq_pending_open",
        "1 while a circuit breaker is open.",
    ),
    (
        "envoy_cluster_circuit_breakers_default_rq_open",
        "1 while a circuit breaker is open.",
    ),
    (
        "envoy_cluster_circuit_breakers_default_rq_retry_open",
        "1 while a circuit breaker is open.",
    ),
    (
        "envoy_cluster_circuit_breakers_default_remaining_cx",
        "What a circuit breaker still allows.",
    ),
    (
        "envoy_cluster_circuit_breakers_default_remaining_pending",
        "What a circuit breaker still allows.",
    ),
    (
        "envoy_cluster_circuit_breakers_default_remaining_rq",
        "What a circuit breaker still allows.",
    ),
    (
        "envoy_cluster_circuit_breakers_default_remaining_retries",
        "What a circuit breaker still allows.",
    ),
    (
        "envoy_cluster_circuit_breakers_high_cx_open",
        "1 while a circuit breaker is open.",
    ),
    (
        "envoy_cluster_circuit_breakers_high_rq_pending_open",
        "1 while a circuit breaker is open.",
    ),
    (
        "envoy_cluster_circuit_breakers_high_rq_open",
        "1 while a circuit breaker is open.",
    ),
    (
        "envoy_cluster_circuit_breakers_high_rq_retry_open",
        "1 while a circuit breaker is open.",
    ),
    (
        "envoy_cluster_circuit_breakers_high_remaining_cx",
        "What a circuit breaker still allows.",
    ),
    (
        "envoy_cluster_circuit_breakers_high_remaining_pending",
        "What a circuit breaker still allows.",
    ),
    (
        "envoy_cluster_circuit_breakers_high_remaining_rq",
        "What a circuit breaker still allows.",
    ),
    (
        "envoy_cluster_circuit_breakers_high_remaining_retries",
        "What a circuit breaker still allows.",
    ),
];
pub(super) const BREAKERS: usize = 9;

/// Where the values of a family come from.
#[derive(Clone, Copy, Debug)]
pub(super) enum From {
    Counter(usize),
    /// What has begun less what has ended.
    Active(usize, usize),
    Event(usize),
    Update(usize),
    Gauge(usize),
    ExternalCompleted,
    /// Subsets that have come less those that have gone.
    SubsetsActive,
    /// The state of the control plane that its endpoints are of.
    Version,
    /// When its endpoints came last.
    Updated,
}

/// A family with one series per cluster.
#[derive(Debug)]
pub(super) struct Stat {
    pub family: &'static str,
    pub help: &'static str,
    /// Of its name in Envoy's form, after the cluster's.
    pub tail: String,
    pub from: From,
}

pub(super) static STATS: LazyLock<Vec<Stat>> = LazyLock::new(|| {
    let stat = |family: &'static str, help, from| Stat {
        family,
        help,
        tail: names::cluster_tail(family),
        from,
    };
    let named = |name: &&str| !name.is_empty();
    let mut out: Vec<Stat> = COUNTERS
        .iter()
        .enumerate()
        .filter(|(_, (name, ..))| named(name))
        .map(|(index, (name, help, _))| stat(name, help, From::Counter(index)))
        .collect();
    out.push(stat(
        "envoy_cluster_upstream_rq_active",
        "Requests on their way.",
        From::Active(BEGAN, COMPLETED),
    ));
    out.push(stat(
        "envoy_cluster_upstream_cx_active",
        "Connections open, or being made.",
        From::Active(CONNECTIONS, CONNECTIONS_CLOSED),
    ));
    out.push(stat(
        "envoy_cluster_external_upstream_rq_completed",
        "Requests from outside that have ended.",
        From::ExternalCompleted,
    ));
    out.push(stat(
        "envoy_cluster_lb_subsets_active",
        "Subsets that have endpoints.",
        From::SubsetsActive,
    ));
    out.push(stat(
        "envoy_cluster_version",
        "The hash of what the control plane calls the state that the endpoints are of.",
        From::Version,
    ));
    out.push(stat(
        "envoy_cluster_update_time",
        "When endpoints came last, in milliseconds since 1970.",
        From::Updated,
    ));
    for (index, (name, help)) in ClusterEvent::ALL.iter().enumerate() {
        out.push(stat(name, help, From::Event(index)));
    }
    for (index, (name, help, _)) in UPDATES.iter().enumerate() {
        out.push(stat(name, help, From::Update(index)));
    }
    for (index, (name, help)) in GAUGES.iter().enumerate() {
        out.push(stat(name, help, From::Gauge(index)));
    }
    out
});
