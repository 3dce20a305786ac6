//! Reading the series of all workers as metric families with Istio's exact labels.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::peer::{Principals, UNKNOWN, Workload};
use super::series::{HistogramValue, HttpLabels, HttpSeries, Protocol, Reporter, Shard, TcpLabels};

/// A label set in the order in which Istio writes it.
pub type Labels = Vec<(&'static str, String)>;

/// A value.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// Cumulative.
    Counter(f64),
    /// Momentary.
    Gauge(f64),
    /// Momentary, and to be told to the last digit: a hash, a time in milliseconds.
    Whole(u64),
    /// Distribution.
    Histogram(Box<HistogramValue>),
}

impl Value {
    /// Whether it is anything but zero, or has any values.
    pub fn is_used(&self) -> bool {
        match self {
            Self::Counter(value) | Self::Gauge(value) => *value != 0.0,
            Self::Whole(value) => *value != 0,
            Self::Histogram(histogram) => histogram.count() > 0,
        }
    }
}

/// A metric family.
#[derive(Clone, Debug)]
pub struct Family {
    /// Name with its `_total`, where it has one.
    pub name: &'static str,
    /// Help.
    pub help: &'static str,
    /// Its series.
    pub metrics: Vec<(Labels, Value)>,
}

#[derive(Default)]
struct HttpSum {
    requests: u64,
    duration: HistogramValue,
    request_bytes: HistogramValue,
    response_bytes: HistogramValue,
}

/// Everything that the workers counted, as `own` reports it.
pub fn collect(own: &Workload, shards: &[Arc<Shard>]) -> Vec<Family> {
    let mut families = http_families(own, shards);
    families.extend(tcp_families(own, shards));
    families.extend(own_families(shards));
    families
}

fn http_families(own: &Workload, shards: &[Arc<Shard>]) -> Vec<Family> {
    let mut sums: BTreeMap<Labels, HttpSum> = BTreeMap::new();
    for shard in shards {
        // The list is copied so that a worker never waits for a reader to format text.
        let series: Vec<Arc<HttpSeries>> = shard.http.lock().clone();
        for series in series {
            let sum = sums.entry(http_labels(own, &series.labels)).or_default();
            sum.requests += series.requests.get();
            series.duration.read(&mut sum.duration);
            series.request_bytes.read(&mut sum.request_bytes);
            series.response_bytes.read(&mut sum.response_bytes);
        }
    }
    if sums.is_empty() {
        return Vec::new();
    }
    let mut requests = Vec::with_capacity(sums.len());
    let [mut duration, mut request_bytes, mut response_bytes] =
        [(); 3].map(|()| Vec::with_capacity(sums.len()));
    for (labels, sum) in sums {
        requests.push((labels.clone(), Value::Counter(sum.requests as f64)));
        duration.push((labels.clone(), Value::Histogram(Box::new(sum.duration))));
        request_bytes.push((labels.clone(), Value::Histogram(Box::new(sum.request_bytes))));
        response_bytes.push((labels, Value::Histogram(Box::new(sum.response_bytes))));
    }
    vec![
        Family {
            name: "istio_requests_total",
            help: "Requests.",
            metrics: requests,
        },
        Family {
            name: "istio_request_duration_milliseconds",
            help: "Time from the request's first byte to the response's last.",
            metrics: duration,
        },
        Family {
            name: "istio_request_bytes",
            help: "Sizes of request bodies.",
            metrics: request_bytes,
        },
        Family {
            name: "istio_response_bytes",
            help: "Sizes of response bodies.",
            metrics: response_bytes,
        },
    ]
}

fn tcp_families(own: &Workload, shards: &[Arc<Shard>]) -> Vec<Family> {
    let mut sums: BTreeMap<Labels, [u64; 4]> = BTreeMap::new();
    for shard in shards {
        let series = shard.tcp.lock().clone();
        for series in series {
            let sum = sums.entry(tcp_labels(own, &series.labels)).or_default();
            for (sum, cell) in
                sum.iter_mut()
                    .zip([&series.opened, &series.closed, &series.sent, &series.received])
            {
                *sum += cell.get();
            }
        }
    }
    if sums.is_empty() {
        return Vec::new();
    }
    let names = [
        ("istio_tcp_connections_opened_total", "TCP connections opened."),
        ("istio_tcp_connections_closed_total", "TCP connections closed."),
        ("istio_tcp_sent_bytes_total", "Bytes sent to clients."),
        ("istio_tcp_received_bytes_total", "Bytes received from clients."),
    ];
    names
        .into_iter()
        .enumerate()
        .map(|(index, (name, help))| Family {
            name,
            help,
            metrics: sums
                .iter()
                .map(|(labels, values)| (labels.clone(), Value::Counter(values[index] as f64)))
                .collect(),
        })
        .collect()
}

fn own_families(shards: &[Arc<Shard>]) -> Vec<Family> {
    let sum = |read: fn(&Shard) -> u64| shards.iter().map(|shard| read(shard)).sum::<u64>() as f64;
    let counter = |name, help, value| Family {
        name,
        help,
        metrics: vec![(Vec::new(), Value::Counter(value))],
    };
    let connections = sum(|shard| shard.counters.connections.get());
    let closed = sum(|shard| shard.counters.connections_closed.get());
    vec![
        counter(
            "serin_proxy_downstream_connections_total",
            "Connections accepted.",
            connections,
        ),
        Family {
            name: "serin_proxy_downstream_connections_active",
            help: "Connections open.",
            metrics: vec![(Vec::new(), Value::Gauge(connections - closed))],
        },
        counter(
            "serin_proxy_upstream_connections_total",
            "Connections made to endpoints.",
            sum(|shard| shard.counters.upstream_connections.get()),
        ),
        counter(
            "serin_proxy_upstream_connect_failures_total",
            "Connections to endpoints that failed.",
            sum(|shard| shard.counters.upstream_connect_failures.get()),
        ),
        counter(
            "serin_proxy_retries_total",
            "Retried requests.",
            sum(|shard| shard.counters.retries.get()),
        ),
        counter(
            "serin_proxy_refused_requests_total",
            "Requests that broke the protocol and were refused.",
            sum(|shard| shard.counters.refused_requests.get()),
        ),
        counter(
            "serin_proxy_refused_connections_total",
            "Connections closed at once by the overload manager.",
            sum(|shard| shard.counters.refused_connections.get()),
        ),
        counter(
            "serin_proxy_outlier_ejections_total",
            "Endpoints ejected by outlier detection.",
            sum(|shard| shard.counters.ejections.get()),
        ),
        counter(
            "serin_proxy_folded_series_total",
            "Metric series folded into unknown for lack of room.",
            sum(|shard| shard.counters.folded_series.get()),
        ),
        counter(
            "serin_proxy_expired_series_total",
            "Metric series dropped because nobody used them.",
            sum(|shard| shard.counters.expired_series.get()),
        ),
        counter(
            "serin_proxy_access_log_dropped_total",
            "Access log lines dropped because the sink was slow.",
            sum(|shard| shard.counters.log_dropped.get()),
        ),
    ]
}

fn sides(own: &Workload, reporter: Reporter, peer: &Workload, principals: Option<&Principals>) -> Labels {
    let (source, destination) = match reporter {
        Reporter::Source => (own, peer),
        Reporter::Destination => (peer, own),
    };
    let text = |value: &str| value.to_owned();
    let name = match reporter {
        Reporter::Source => "source",
        Reporter::Destination => "destination",
    };
    vec![
        ("reporter", text(name)),
        ("source_workload", text(&source.name)),
        ("source_canonical_service", text(&source.canonical_service)),
        ("source_canonical_revision", text(&source.canonical_revision)),
        ("source_workload_namespace", text(&source.namespace)),
        (
            "source_principal",
            text(principals.map_or(UNKNOWN, |principals| &principals.source)),
        ),
        ("source_app", text(&source.app)),
        ("source_version", text(&source.version)),
        ("source_cluster", text(&source.cluster)),
        ("destination_workload", text(&destination.name)),
        ("destination_workload_namespace", text(&destination.namespace)),
        (
            "destination_principal",
            text(principals.map_or(UNKNOWN, |principals| &principals.destination)),
        ),
        ("destination_app", text(&destination.app)),
        ("destination_version", text(&destination.version)),
        (
            "destination_canonical_service",
            text(&destination.canonical_service),
        ),
        (
            "destination_canonical_revision",
            text(&destination.canonical_revision),
        ),
        ("destination_cluster", text(&destination.cluster)),
    ]
}

fn security_policy(reporter: Reporter, principals: Option<&Principals>) -> String {
    // The client's side cannot know what the server enforced; the server's side knows whether it was mutual TLS.
    match reporter {
        Reporter::Source => UNKNOWN.into(),
        Reporter::Destination if principals.is_some() => "mutual_tls".into(),
        Reporter::Destination => "none".into(),
    }
}

fn http_labels(own: &Workload, labels: &HttpLabels) -> Labels {
    let mut out = sides(own, labels.reporter, &labels.peer, labels.principals.as_deref());
    let protocol = match labels.protocol {
        Protocol::Http => "http",
        Protocol::Grpc => "grpc",
        Protocol::Tcp => "tcp",
    };
    out.extend([
        ("destination_service", labels.service.host.to_string()),
        ("destination_service_name", labels.service.name.to_string()),
        (
            "destination_service_namespace",
            labels.service.namespace.to_string(),
        ),
        ("request_protocol", protocol.to_owned()),
        ("response_code", labels.code.to_string()),
        (
            "grpc_response_status",
            labels
                .grpc_status
                .map(|code| code.to_string())
                .unwrap_or_default(),
        ),
        ("response_flags", labels.flags.to_string()),
        (
            "connection_security_policy",
            security_policy(labels.reporter, labels.principals.as_deref()),
        ),
    ]);
    out
}

fn tcp_labels(own: &Workload, labels: &TcpLabels) -> Labels {
    let mut out = sides(own, labels.reporter, &labels.peer, labels.principals.as_deref());
    out.extend([
        ("destination_service", labels.service.host.to_string()),
        ("destination_service_name", labels.service.name.to_string()),
        (
            "destination_service_namespace",
            labels.service.namespace.to_string(),
        ),
        ("request_protocol", "tcp".to_owned()),
        ("response_flags", labels.flags.to_string()),
        (
            "connection_security_policy",
            security_policy(labels.reporter, labels.principals.as_deref()),
        ),
    ]);
    out
}
