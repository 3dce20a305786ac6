//! Families that are made of what a registry holds: of events, of connections by worker and by what they speak.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::{HTTP, LISTENER, Registry};
use crate::metrics::collect::{Family, Labels, Value};
use crate::metrics::events::{CodecEvent, Event, HttpEvent, ListenerEvent, TcpEvent, WorkerEvents};

/// A family for each event that has a name.
pub(super) fn event_families<E: Event>(
    all: &BTreeMap<Box<str>, Arc<WorkerEvents<E>>>,
    label: &'static str,
) -> impl Iterator<Item = Family> {
    let named = E::ALL
        .iter()
        .enumerate()
        .filter(|(_, (name, _))| !name.is_empty());
    named.map(move |(index, (name, help))| Family {
        name,
        help,
        metrics: all
            .iter()
            .map(|(value, events)| {
                let labels = vec![(label, value.to_string())];
                (labels, Value::Counter(events.at(index) as f64))
            })
            .collect(),
    })
}

/// The labels of an answer's class without the listener.
pub(super) fn of_manager(labels: &Labels) -> Labels {
    let kept = labels.iter().filter(|(key, _)| *key != LISTENER.label);
    kept.cloned().collect()
}

impl Registry {
    /// Answers by class of each manager, and how many there were at each listener: sums of what is counted, by class,
    /// manager and listener.
    pub(super) fn answers(&self, families: &mut Vec<Family>) {
        let Some(names) = &HTTP.requests else { return };
        let mut classes: BTreeMap<Labels, f64> = BTreeMap::new();
        for (labels, count) in &self.retired {
            classes.insert(labels.clone(), *count as f64);
        }
        let mut completed: BTreeMap<Labels, f64> = BTreeMap::new();
        let counted = families
            .iter()
            .find(|family| family.name == names.classes_by_listener);
        for (labels, value) in counted.into_iter().flat_map(|family| &family.metrics) {
            let Value::Counter(value) = value else { continue };
            *classes.entry(of_manager(labels)).or_default() += value;
            let place = labels
                .iter()
                .filter(|(key, _)| *key == LISTENER.label || *key == HTTP.label);
            *completed.entry(place.cloned().collect()).or_default() += value;
        }
        for (name, help, sums) in [
            (names.classes, "Answers by the class of their status.", classes),
            (
                names.completed_by_listener,
                "Requests at a listener that have been answered.",
                completed,
            ),
        ] {
            families.push(Family {
                name,
                help,
                metrics: sums
                    .into_iter()
                    .map(|(labels, sum)| (labels, Value::Counter(sum)))
                    .collect(),
            });
        }
    }

    /// What happened in what reads and writes HTTP, of the versions that clients have spoken.
    pub(super) fn codecs(&self, families: &[Family]) -> Vec<Family> {
        let Some(events) = &self.codec else {
            return Vec::new();
        };
        let spoken = |name: &str| {
            let family = families.iter().find(|family| family.name == name);
            let mut metrics = family.into_iter().flat_map(|family| &family.metrics);
            metrics.any(|(_, value)| value.is_used())
        };
        let Some(names) = &HTTP.requests else {
            return Vec::new();
        };
        let versions = [("envoy_http1_", names.http1), ("envoy_http2_", names.http2)];
        let versions = versions.map(|(prefix, connections)| (prefix, spoken(connections)));
        CodecEvent::ALL
            .iter()
            .enumerate()
            .filter(|(_, (name, _))| {
                versions
                    .iter()
                    .any(|(prefix, spoken)| *spoken && name.starts_with(prefix))
            })
            .map(|(index, (name, help))| Family {
                name,
                help,
                metrics: vec![(Labels::new(), Value::Counter(events.at(index) as f64))],
            })
            .collect()
    }

    /// Connections of listeners by worker.
    pub(super) fn per_worker(&self) -> [Family; 2] {
        let cells = |name: &'static str| {
            self.counters
                .range((name, Labels::new())..)
                .take_while(move |((own, _), _)| *own == name)
        };
        let of = |labels: &Labels, worker: usize| {
            let mut out = vec![("envoy_worker_id", worker.to_string())];
            out.extend(labels.iter().cloned());
            out
        };
        let (mut total, mut active) = (Vec::new(), Vec::new());
        for (((_, labels), opened), (_, closed)) in cells(LISTENER.opened).zip(cells(LISTENER.closed)) {
            for (worker, (opened, closed)) in opened.cells.iter().zip(&closed.cells).enumerate() {
                let opened = opened.0.load(Ordering::Relaxed);
                let open = opened.saturating_sub(closed.0.load(Ordering::Relaxed));
                total.push((of(labels, worker), Value::Counter(opened as f64)));
                active.push((of(labels, worker), Value::Gauge(open as f64)));
            }
        }
        [
            Family {
                name: "envoy_listener_worker_downstream_cx_total",
                help: "Connections of a worker.",
                metrics: total,
            },
            Family {
                name: "envoy_listener_worker_downstream_cx_active",
                help: "Open connections of a worker.",
                metrics: active,
            },
        ]
    }

    /// Open connections by what they speak, and what waits within listener filters.
    pub(super) fn connections_by_kind(&self, families: &mut Vec<Family>) {
        let total = |families: &[Family], name: &str, value: &str| {
            let family = families.iter().find(|family| family.name == name);
            let found = family
                .into_iter()
                .flat_map(|family| &family.metrics)
                .find(|(labels, _)| labels.iter().any(|(_, own)| own == value));
            match found {
                Some((_, Value::Counter(value) | Value::Gauge(value))) => *value,
                _ => 0.0,
            }
        };
        let mut kinds: [Vec<(Labels, Value)>; 4] = Default::default();
        for (value, events) in &self.http {
            let label = || vec![(HTTP.label, value.to_string())];
            let ended = |event| events.get(event) as f64;
            let http2 = total(families, "envoy_http_downstream_cx_http2_total", value)
                - ended(HttpEvent::CxHttp2Ended);
            let tls =
                total(families, "envoy_http_downstream_cx_ssl_total", value) - ended(HttpEvent::CxTlsEnded);
            let open = total(families, "envoy_http_downstream_cx_active", value);
            let tunnels = ended(HttpEvent::CxUpgrades) - ended(HttpEvent::CxUpgradesEnded);
            for (kind, count) in kinds.iter_mut().zip([open - http2, http2, tls, tunnels]) {
                // Workers go on while they are read.
                kind.push((label(), Value::Gauge(count.max(0.0))));
            }
        }
        let names = [
            (
                "envoy_http_downstream_cx_http1_active",
                "Open connections of HTTP/1.",
            ),
            (
                "envoy_http_downstream_cx_http2_active",
                "Open connections of HTTP/2.",
            ),
            ("envoy_http_downstream_cx_ssl_active", "Open connections of TLS."),
            ("envoy_http_downstream_cx_upgrades_active", "Open tunnels."),
        ];
        families.extend(
            names
                .into_iter()
                .zip(kinds)
                .map(|((name, help), metrics)| Family { name, help, metrics }),
        );
        let gauge = |name, help, metrics| Family { name, help, metrics };
        families.push(gauge(
            "envoy_listener_downstream_pre_cx_active",
            "Connections within listener filters.",
            self.listeners
                .iter()
                .map(|(value, events)| {
                    let done = events.get(ListenerEvent::Classified);
                    let open = events.get(ListenerEvent::Accepted).saturating_sub(done);
                    (
                        vec![(LISTENER.label, value.to_string())],
                        Value::Gauge(open as f64),
                    )
                })
                .collect(),
        ));
        families.push(gauge(
            "envoy_tcp_downstream_cx_active",
            "Open connections.",
            self.tcp
                .iter()
                .map(|(value, events)| {
                    let closed = events.get(TcpEvent::Closed);
                    let open = events.get(TcpEvent::Opened).saturating_sub(closed);
                    (
                        vec![("envoy_tcp_prefix", value.to_string())],
                        Value::Gauge(open as f64),
                    )
                })
                .collect(),
        ));
    }
}
