//! Statistics of clusters as they are shown: what workers counted, what slots counted, and what the configuration says,
//! also of clusters that nobody has used.
//!
//! A look ([`Rows`]) takes what there is once, a few hundred bytes for a cluster; series are made of it piece by piece, by
//! rows or by families, so that a scrape of 30,000 clusters never holds its three million series at a time, and a filter
//! makes those that pass it only. A cluster without requests has no histograms, no statuses and no classes.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::BTreeMap;
use super::tables::{
    ATTEMPTS, BREAKERS, COMPLETED, CONNECTIONS_HTTP2, COUNTERS, FAILURES, From, GAUGES, REJECTED, STATS,
    UPDATES,
};
use crate::config::cluster::{Cluster, Discovery, Priority};
use crate::config::slot::ClusterSlot;
use crate::metrics::collect::{Family, Value};
use crate::metrics::events::{ClusterEvent, Event};
use crate::metrics::select::{Deferred, Kind, Select};
use crate::metrics::series::{HistogramValue, Shard};

const HISTOGRAMS: [(&str, &str, fn(&Sum) -> &HistogramValue); 4] = [
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
    (
        "envoy_cluster_upstream_rq_per_cx",
        "Requests that connections carried.",
        |sum| &sum.requests,
    ),
];

/// Answers, and the same again as those to requests from outside: none is from inside, since addresses are internal to
/// Envoy only where `internal_address_config` says so, which is not supported.
const ANSWERS: [[&str; 2]; 2] = [
    ["envoy_cluster_upstream_rq_xx", "envoy_cluster_upstream_rq"],
    [
        "envoy_cluster_external_upstream_rq_xx",
        "envoy_cluster_external_upstream_rq",
    ],
];

#[derive(Debug, Default)]
struct Sum {
    counters: [u64; COUNTERS.len()],
    classes: [u64; 5],
    codes: BTreeMap<u16, u64>,
    time: HistogramValue,
    connect: HistogramValue,
    length: HistogramValue,
    requests: HistogramValue,
}

/// What there is of one cluster.
#[derive(Debug)]
pub struct Row {
    slot: Arc<ClusterSlot>,
    config: Option<Arc<Cluster>>,
    gauges: [Option<u32>; GAUGES.len()],
    sum: Option<Box<Sum>>,
    /// Streams to the control plane that failed while its endpoints were asked for.
    lost: u32,
}

/// What is looked at beside the clusters.
#[derive(Clone, Copy, Debug, Default)]
pub struct Look {
    /// The process clock.
    pub now_ms: u64,
    /// Streams to the control plane that have failed.
    pub lost: u64,
}

impl Row {
    fn new(slot: &Arc<ClusterSlot>, sum: Option<Box<Sum>>, look: Look) -> Self {
        let config = slot.config();
        let mut gauges = [None; GAUGES.len()];
        if let Some(config) = &config {
            read_gauges(slot, config, look.now_ms, &mut gauges);
        }
        let mut row = Self {
            slot: slot.clone(),
            config,
            gauges,
            sum,
            lost: 0,
        };
        if row.asks() {
            let lost = u32::try_from(look.lost).unwrap_or(u32::MAX);
            row.lost = lost.saturating_sub(slot.updates.lost_before.load(Ordering::Relaxed));
        }
        row
    }

    fn is_used(&self) -> bool {
        self.sum.is_some() || self.slot.usage.used.load(Ordering::Relaxed)
    }

    /// Requests that have been answered. Others end without, when their client has gone.
    fn answered(&self) -> u64 {
        self.sum.as_ref().map_or(0, |sum| sum.classes.iter().sum())
    }

    /// Whether its endpoints are asked for by EDS.
    fn asks(&self) -> bool {
        let config = self.config.as_ref();
        config.is_some_and(|config| matches!(config.discovery, Discovery::Eds(_)))
    }

    /// A number; nothing where the cluster has no such statistic.
    fn value(&self, from: From, deferred: Deferred) -> Option<Value> {
        let count = |value: u64| Value::Counter(value as f64);
        let traffic = deferred == Deferred::No || self.is_used();
        let counter = |index: usize| self.sum.as_ref().map_or(0, |sum| sum.counters[index]);
        Some(match from {
            From::Counter(COMPLETED) if traffic => count(self.answered()),
            From::Counter(index) if traffic => count(counter(index)),
            // Workers are read one after the other, and go on meanwhile.
            From::Active(began, ended) if traffic => {
                Value::Gauge(counter(began).saturating_sub(counter(ended)) as f64)
            }
            From::ExternalCompleted => {
                self.sum.as_ref()?;
                count(self.answered())
            }
            From::Counter(_) | From::Active(..) => return None,
            From::Event(index) => {
                let name = ClusterEvent::ALL[index].0;
                let config = self.config.as_ref();
                let has = if name.starts_with("envoy_cluster_outlier") {
                    config.is_some_and(|config| config.outlier.is_some())
                } else if name.starts_with("envoy_cluster_health_check") {
                    config.is_some_and(|config| !config.health_checks.is_empty())
                } else if name.starts_with("envoy_cluster_http2") {
                    // From the first connection that speaks it on.
                    counter(CONNECTIONS_HTTP2) > 0
                } else {
                    traffic
                };
                if !has {
                    return None;
                }
                count(self.slot.counted.at(index))
            }
            From::SubsetsActive if traffic => {
                let counted = &self.slot.counted;
                let created = counted.get(ClusterEvent::SubsetCreated);
                let removed = counted.get(ClusterEvent::SubsetRemoved);
                Value::Gauge(created.saturating_sub(removed) as f64)
            }
            From::SubsetsActive => return None,
            From::Update(index) => {
                if index == REJECTED && !self.asks() {
                    return None;
                }
                let read = UPDATES[index].2;
                let lost = if matches!(index, ATTEMPTS | FAILURES) {
                    self.lost
                } else {
                    0
                };
                let own = read(&self.slot.updates).load(Ordering::Relaxed);
                count(u64::from(own) + u64::from(lost))
            }
            From::Version => Value::Whole(self.slot.updates.version.load(Ordering::Relaxed)),
            From::Updated if self.asks() => Value::Whole(self.slot.updates.updated.load(Ordering::Relaxed)),
            From::Updated => return None,
            From::Gauge(index) => Value::Gauge(f64::from(self.gauges[index]?)),
        })
    }
}

fn read_gauges(slot: &ClusterSlot, config: &Cluster, now_ms: u64, gauges: &mut [Option<u32>; GAUGES.len()]) {
    let checks = config.health_checks.len();
    let count = |count: usize| Some(u32::try_from(count).unwrap_or(u32::MAX));
    let (mut total, mut healthy, mut degraded, mut ejected, mut passing, mut heaviest) = (0, 0, 0, 0, 0, 0);
    if let Some(set) = slot.endpoints() {
        total = set.all.len();
        for endpoint in &set.all {
            let out = endpoint.state.ejected_until.load(Ordering::Relaxed) > now_ms;
            let usable = endpoint.usable(checks);
            ejected += usize::from(out);
            passing += usize::from(usable);
            if usable && !out {
                if endpoint.degraded {
                    degraded += 1;
                } else {
                    healthy += 1;
                }
            }
            heaviest = heaviest.max(endpoint.weight);
        }
    }
    let discovered = matches!(config.discovery, Discovery::Eds(_) | Discovery::Dns { .. });
    let waiting = Priority::ALL.map(|(priority, _)| &slot.usage.of(priority).pending);
    let waiting: u32 = waiting.iter().map(|count| count.load(Ordering::Relaxed)).sum();
    gauges[..BREAKERS].copy_from_slice(&[
        count(total),
        count(healthy),
        count(degraded),
        Some(0),
        Some(if discovered { heaviest } else { 0 }),
        Some(0),
        Some(waiting),
        config.outlier.as_ref().and_then(|_| count(ejected)),
        (checks > 0).then_some(()).and_then(|()| count(passing)),
    ]);
    for (priority, _) in Priority::ALL {
        let (level, limits) = (slot.usage.of(priority), config.limits.of(priority));
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
        let first = BREAKERS + priority as usize * 8;
        for (index, (used, allowed)) in used.into_iter().zip(allowed).enumerate() {
            gauges[first + index] = Some(u32::from(used >= allowed));
            if limits.track_remaining {
                gauges[first + 4 + index] = Some(allowed.saturating_sub(used));
            }
        }
    }
}

/// A look at all clusters.
#[derive(Debug)]
pub struct Rows(Vec<Row>);

impl Rows {
    /// What workers have counted, and what there is of `slots`, in their order. With [`Deferred::Hidden`] those that nobody
    /// has used are left out.
    pub fn read<'s>(
        shards: &[Arc<Shard>],
        slots: impl Iterator<Item = &'s Arc<ClusterSlot>>,
        deferred: Deferred,
        look: Look,
    ) -> Self {
        let mut sums = sums(shards);
        let mut rows = Vec::new();
        for slot in slots {
            let sum = sums.remove(&slot.name);
            if deferred == Deferred::Hidden && sum.is_none() && !slot.usage.used.load(Ordering::Relaxed) {
                continue;
            }
            rows.push(Row::new(slot, sum, look));
        }
        Self(rows)
    }

    /// Clusters.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Families.
    pub fn families(&self) -> usize {
        STATS.len() + HISTOGRAMS.len() + ANSWERS.as_flattened().len()
    }

    /// The wanted series of some rows and of some families.
    pub fn pick(&self, rows: Range<usize>, families: Range<usize>, select: &Select) -> Vec<Family> {
        let rows = &self.0[rows];
        let mut name = String::new();
        let mut out = Vec::new();
        let mut add = |name, help, metrics: Vec<_>| {
            if !metrics.is_empty() {
                out.push(Family { name, help, metrics });
            }
        };
        for index in families {
            if let Some(stat) = STATS.get(index) {
                if !select.may_have(stat.family) {
                    continue;
                }
                let metrics = rows.iter().filter_map(|row| {
                    let value = row.value(stat.from, select.deferred)?;
                    if !select.wants_value(Kind::of(&value), value.is_used()) {
                        return None;
                    }
                    if select.looks_at_names() {
                        name.clear();
                        name.push_str("cluster.");
                        name.push_str(&row.slot.name);
                        name.push('.');
                        name.push_str(&stat.tail);
                        if !select.wants_name(stat.family, &name) {
                            return None;
                        }
                    }
                    Some((vec![label(row)], value))
                });
                let metrics = metrics.collect();
                add(stat.family, stat.help, metrics);
                continue;
            }
            let index = index - STATS.len();
            if let Some((family, help, read)) = HISTOGRAMS.get(index) {
                let metrics = rows.iter().filter_map(|row| {
                    let value = read(row.sum.as_ref()?);
                    Some((vec![label(row)], Value::Histogram(Box::new(value.clone()))))
                });
                add(family, help, select.pick(family, metrics));
                continue;
            }
            let index = index - HISTOGRAMS.len();
            let family = ANSWERS.as_flattened()[index];
            if index.is_multiple_of(2) {
                let metrics = rows.iter().flat_map(|row| {
                    let sum = row.sum.iter();
                    sum.flat_map(|sum| (1..=5).zip(&sum.classes))
                        .map(|(class, count)| {
                            let labels = vec![("envoy_response_code_class", class.to_string()), label(row)];
                            (labels, Value::Counter(*count as f64))
                        })
                });
                add(
                    family,
                    "Answers by the class of their status.",
                    select.pick(family, metrics),
                );
            } else {
                let metrics = rows.iter().flat_map(|row| {
                    let sum = row.sum.iter();
                    sum.flat_map(|sum| &sum.codes).map(|(code, count)| {
                        let labels = vec![("envoy_response_code", code.to_string()), label(row)];
                        (labels, Value::Counter(*count as f64))
                    })
                });
                add(family, "Answers by their status.", select.pick(family, metrics));
            }
        }
        out
    }
}

fn label(row: &Row) -> (&'static str, String) {
    ("envoy_cluster_name", row.slot.name.to_string())
}

/// What workers counted, by cluster.
fn sums(shards: &[Arc<Shard>]) -> HashMap<Arc<str>, Box<Sum>, foldhash::fast::RandomState> {
    let mut sums: HashMap<Arc<str>, Box<Sum>, foldhash::fast::RandomState> = HashMap::default();
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
            if let Some(connections) = cells.of_connections.get() {
                connections.made_in.read(&mut sum.connect);
                connections.length.read(&mut sum.length);
                connections.requests.read(&mut sum.requests);
            }
        }
    }
    sums
}

#[cfg(test)]
mod tests {
    use super::super::tables::{BEGAN, CONNECTIONS, CONNECTIONS_CLOSED};
    use super::*;
    use crate::metrics::collect::Labels;

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
        assert_eq!(UPDATES[REJECTED].0, "envoy_cluster_update_rejected");
        assert_eq!(UPDATES[ATTEMPTS].0, "envoy_cluster_update_attempt");
        assert_eq!(UPDATES[FAILURES].0, "envoy_cluster_update_failure");
        assert_eq!(
            GAUGES[BREAKERS].0,
            "envoy_cluster_circuit_breakers_default_cx_open"
        );
    }

    fn slots(count: u32) -> Vec<Arc<ClusterSlot>> {
        (0..count)
            .map(|id| Arc::new(ClusterSlot::new(id, format!("c{id}").into(), Arc::default())))
            .collect()
    }

    #[test]
    fn a_cluster_that_nobody_has_used_is_shown_with_zeros_unless_that_is_put_off_or_hidden() {
        let slots = slots(2);
        slots[1].counted.note(ClusterEvent::Panic);
        let shown = |deferred| {
            let rows = Rows::read(&[], slots.iter(), deferred, Look::default());
            let select = Select {
                deferred,
                ..Select::default()
            };
            let families = rows.pick(0..rows.len(), 0..rows.families(), &select);
            let found = families
                .iter()
                .find(|family| family.name == "envoy_cluster_lb_healthy_panic");
            found.map(|family| {
                family
                    .metrics
                    .iter()
                    .map(|(_, value)| value.clone())
                    .collect::<Vec<_>>()
            })
        };
        assert_eq!(
            shown(Deferred::No),
            Some(vec![Value::Counter(0.0), Value::Counter(1.0)])
        );
        assert_eq!(shown(Deferred::Yes), None);
        let rows = Rows::read(&[], slots.iter(), Deferred::Hidden, Look::default());
        assert!(rows.is_empty());
    }

    #[test]
    fn a_filter_makes_only_the_series_that_pass_it() {
        let slots = slots(1_000);
        let rows = Rows::read(&[], slots.iter(), Deferred::No, Look::default());
        let select = Select {
            filter: Some(regex::Regex::new("^cluster\\.c77\\.upstream_rq_total$").unwrap()),
            ..Select::default()
        };
        let families = rows.pick(0..rows.len(), 0..rows.families(), &select);
        let series: Vec<_> = families.iter().flat_map(|family| &family.metrics).collect();
        assert_eq!(series.len(), 1);
        assert_eq!(
            series[0].0,
            vec![("envoy_cluster_name", "c77".to_owned())] as Labels
        );
    }

    #[test]
    fn pieces_by_rows_and_by_families_hold_the_same_series() {
        let slots = slots(10);
        let rows = Rows::read(&[], slots.iter(), Deferred::No, Look::default());
        let select = Select::default();
        let count = |families: Vec<Family>| families.iter().map(|family| family.metrics.len()).sum::<usize>();
        let whole = count(rows.pick(0..rows.len(), 0..rows.families(), &select));
        let by_rows: usize = (0..rows.len())
            .map(|row| count(rows.pick(row..row + 1, 0..rows.families(), &select)))
            .sum();
        let by_families: usize = (0..rows.families())
            .map(|family| count(rows.pick(0..rows.len(), family..family + 1, &select)))
            .sum();
        assert!(whole > 500, "{whole}");
        assert_eq!((by_rows, by_families), (whole, whole));
    }
}
