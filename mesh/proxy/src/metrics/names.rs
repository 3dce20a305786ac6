//! Statistics by Envoy's own names (`cluster.reviews.upstream_rq_total`), as its admin port tells them: as text and as
//! JSON.

use std::fmt::Write;

use serde_json::{Value as Json, json};

use super::collect::{Family, Labels, Value};
use super::series::{BOUNDS, HistogramValue};

/// Quantiles that are told of a histogram.
const QUANTILES: [f64; 5] = [0.25, 0.5, 0.9, 0.95, 0.99];

/// Kinds of statistics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Counters only.
    Counters,
    /// Gauges only.
    Gauges,
    /// Histograms only.
    Histograms,
}

/// Which statistics are told.
#[derive(Debug, Default)]
pub struct Wanted {
    /// Names that match somewhere.
    pub filter: Option<regex::Regex>,
    /// None that are zero.
    pub used_only: bool,
    /// Of one kind.
    pub kind: Option<Kind>,
}

/// The name under which Envoy's `/stats` has a series.
pub fn name(family: &str, labels: &Labels) -> String {
    let label = |key: &str| {
        labels
            .iter()
            .find(|(own, _)| *own == key)
            .map(|(_, value)| value.as_str())
    };
    let mut rest = family.strip_prefix("envoy_").unwrap_or(family).to_owned();
    let mut used = Vec::new();
    let mut out = String::new();
    for (area, key) in [
        ("cluster_", "envoy_cluster_name"),
        ("http_", "envoy_http_conn_manager_prefix"),
        ("listener_", "envoy_listener_address"),
        ("tcp_", "envoy_tcp_prefix"),
    ] {
        if let (Some(inner), Some(value)) = (rest.strip_prefix(area), label(key)) {
            out = format!("{}.{value}.", area.trim_end_matches('_'));
            rest = inner.to_owned();
            used.push(key);
            break;
        }
    }
    if out.is_empty() {
        for area in ["cluster_manager_", "listener_manager_", "server_"] {
            if let Some(inner) = rest.strip_prefix(area) {
                out = format!("{}.", area.trim_end_matches('_'));
                rest = inner.to_owned();
                break;
            }
        }
    }
    if let Some(inner) = rest.strip_prefix("grpc_")
        && out.starts_with("cluster.")
    {
        out.push_str("grpc.");
        for key in ["envoy_grpc_bridge_service", "envoy_grpc_bridge_method"] {
            if let Some(value) = label(key) {
                let _ = write!(out, "{value}.");
                used.push(key);
            }
        }
        rest = inner.to_owned();
    }
    if let Some(class) = label("envoy_response_code_class") {
        rest = rest.replace("_xx", &format!("_{class}xx"));
        used.push("envoy_response_code_class");
    } else if let Some(code) = label("envoy_response_code") {
        let _ = write!(rest, "_{code}");
        used.push("envoy_response_code");
    }
    out.push_str(&rest);
    for (key, value) in labels {
        if !used.contains(key) && !value.is_empty() {
            let _ = write!(out, ".{key}.{value}");
        }
    }
    out
}

/// Every wanted series by its name.
fn each<'a>(families: &'a [Family], wanted: &'a Wanted) -> impl Iterator<Item = (String, &'a Value)> {
    families
        .iter()
        .flat_map(|family| {
            family
                .metrics
                .iter()
                .map(move |(labels, value)| (name(family.name, labels), value))
        })
        .filter(|(name, value)| {
            let kind = match value {
                Value::Counter(_) => Kind::Counters,
                Value::Gauge(_) => Kind::Gauges,
                Value::Histogram(_) => Kind::Histograms,
            };
            let used = match value {
                Value::Counter(value) | Value::Gauge(value) => *value != 0.0,
                Value::Histogram(histogram) => histogram.count() > 0,
            };
            (!wanted.used_only || used)
                && wanted.kind.is_none_or(|wanted| wanted == kind)
                && wanted.filter.as_ref().is_none_or(|filter| filter.is_match(name))
        })
}

/// `name: value`, sorted, histograms after the rest.
pub fn text(families: &[Family], wanted: &Wanted) -> String {
    let (mut simple, mut histograms) = (Vec::new(), Vec::new());
    for (name, value) in each(families, wanted) {
        match value {
            Value::Counter(value) | Value::Gauge(value) => simple.push(format!("{name}: {value}\n")),
            Value::Histogram(histogram) => {
                let mut line = format!("{name}:");
                for quantile in QUANTILES {
                    let at = histogram_quantile(histogram, quantile);
                    let _ = write!(line, " P{}(nan,{at})", quantile * 100.0);
                }
                histograms.push(line + "\n");
            }
        }
    }
    simple.sort_unstable();
    histograms.sort_unstable();
    simple.concat() + &histograms.concat()
}

/// The same in the shape of `/stats?format=json`.
pub fn json(families: &[Family], wanted: &Wanted) -> Json {
    let (mut stats, mut computed) = (Vec::new(), Vec::new());
    for (name, value) in each(families, wanted) {
        match value {
            Value::Counter(value) | Value::Gauge(value) => stats.push(json!({"name": name, "value": value})),
            Value::Histogram(histogram) => {
                let values: Vec<Json> = QUANTILES
                    .iter()
                    .map(|at| json!({"interval": null, "cumulative": histogram_quantile(histogram, *at)}))
                    .collect();
                computed.push(json!({"name": name, "values": values}));
            }
        }
    }
    if !computed.is_empty() {
        stats.push(json!({"histograms": {
            "supported_quantiles": QUANTILES.map(|quantile| quantile * 100.0),
            "computed_quantiles": computed,
        }}));
    }
    json!({ "stats": stats })
}

/// A quantile, evenly spread within its bucket; the last bound for what lies above it.
fn histogram_quantile(histogram: &HistogramValue, quantile: f64) -> f64 {
    let rank = quantile * histogram.count() as f64;
    let (mut below, mut low) = (0.0, 0.0);
    for (count, bound) in histogram.buckets.iter().zip(BOUNDS) {
        let count = *count as f64;
        if count > 0.0 && below + count >= rank {
            return low + (bound - low) * ((rank - below) / count).clamp(0.0, 1.0);
        }
        below += count;
        low = bound;
    }
    low
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn series_have_the_names_that_envoy_gives_them() {
        let labels = |pairs: &[(&'static str, &str)]| -> Labels {
            pairs
                .iter()
                .map(|(key, value)| (*key, (*value).to_owned()))
                .collect()
        };
        for (family, pairs, expected) in [
            (
                "envoy_cluster_upstream_rq_total",
                &[("envoy_cluster_name", "a.b")][..],
                "cluster.a.b.upstream_rq_total",
            ),
            (
                "envoy_cluster_upstream_rq_xx",
                &[("envoy_response_code_class", "5"), ("envoy_cluster_name", "c")],
                "cluster.c.upstream_rq_5xx",
            ),
            (
                "envoy_cluster_grpc_0",
                &[
                    ("envoy_cluster_name", "c"),
                    ("envoy_grpc_bridge_service", "p.S"),
                    ("envoy_grpc_bridge_method", "M"),
                ],
                "cluster.c.grpc.p.S.M.0",
            ),
            (
                "envoy_http_rbac_denied",
                &[("envoy_http_conn_manager_prefix", "in")],
                "http.in.rbac_denied",
            ),
            (
                "envoy_listener_downstream_cx_total",
                &[("envoy_listener_address", "0.0.0.0_80")],
                "listener.0.0.0.0_80.downstream_cx_total",
            ),
            ("envoy_server_live", &[], "server.live"),
            (
                "istio_requests_total",
                &[("reporter", "source"), ("grpc_response_status", "")],
                "istio_requests_total.reporter.source",
            ),
        ] {
            assert_eq!(name(family, &labels(pairs)), expected);
        }
    }

    #[test]
    fn only_what_is_wanted_is_told() {
        let mut histogram = HistogramValue::default();
        histogram.buckets[0] = 4;
        let families = [
            Family {
                name: "envoy_server_live",
                help: "",
                metrics: vec![(vec![], Value::Gauge(1.0))],
            },
            Family {
                name: "envoy_server_zero",
                help: "",
                metrics: vec![(vec![], Value::Counter(0.0))],
            },
            Family {
                name: "istio_request_bytes",
                help: "",
                metrics: vec![(vec![], Value::Histogram(Box::new(histogram)))],
            },
        ];
        let all = text(&families, &Wanted::default());
        assert!(
            all.starts_with("server.live: 1\nserver.zero: 0\nistio_request_bytes: P25("),
            "{all}"
        );
        let used = Wanted {
            used_only: true,
            kind: None,
            filter: Some(regex::Regex::new("^server").unwrap()),
        };
        assert_eq!(text(&families, &used), "server.live: 1\n");
        let histograms = Wanted {
            kind: Some(Kind::Histograms),
            ..Default::default()
        };
        let shown = json(&families, &histograms);
        let computed = &shown["stats"][0]["histograms"]["computed_quantiles"][0];
        // Half of four values between 0 and 0.5.
        assert_eq!(computed["values"][1]["cumulative"], 0.25);
    }
}
