//! Statistics by Envoy's own names (`cluster.reviews.upstream_rq_total`), as its admin port tells them: as text and as
//! JSON.

use std::fmt::Write;
use std::ops::Range;

use serde_json::{Value as Json, json};

use super::collect::{Family, Labels, Value};
use super::series::HistogramValue;

/// Quantiles that are told of a histogram, as Envoy does.
const QUANTILES: [f64; 10] = [0.0, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.995, 0.999, 1.0];

/// How histograms are told (`histogram_buckets`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Buckets {
    /// As quantiles.
    #[default]
    None,
    /// How many values each bound is not below.
    Cumulative,
    /// How many values lie between a bound and the one before.
    Disjoint,
    /// Both quantiles and buckets, with their widths.
    Detailed,
}

/// Parts of names that Envoy writes with a dot behind them, within an area; longer ones first.
const SCOPES: [(&str, &[&str]); 3] = [
    (
        "cluster.",
        &[
            "circuit_breakers_default_",
            "circuit_breakers_high_",
            "outlier_detection_",
            "health_check_",
            "external_",
            "ext_authz_",
            "ratelimit_",
            "ssl_",
            "http1_",
            "http2_",
        ],
    ),
    (
        "http.",
        &[
            "tap_",
            "tracing_",
            "rbac_",
            "ext_authz_",
            "ext_proc_",
            "jwt_authn_",
            "fault_",
            "cors_",
            "buffer_",
            "local_rate_limit_",
            "adaptive_concurrency_",
            "compressor_",
        ],
    ),
    ("listener.", &["ssl_"]),
];

/// What comes after the place in the name of a statistic: `outlier_detection_x` is `outlier_detection.x`.
fn scoped(area: &str, rest: &str) -> String {
    let scopes = SCOPES.iter().find(|(of, _)| area.starts_with(of));
    let scope = scopes
        .into_iter()
        .flat_map(|(_, scopes)| scopes.iter())
        .find(|scope| rest.starts_with(**scope));
    match scope {
        None => rest.to_owned(),
        Some(scope) => {
            let dotted = match scope.strip_prefix("circuit_breakers_") {
                Some(priority) => format!("circuit_breakers.{priority}"),
                None => (*scope).to_owned(),
            };
            format!("{}.{}", dotted.trim_end_matches('_'), &rest[scope.len()..])
        }
    }
}

/// What comes after the cluster in the name of a statistic of clusters that has no further labels.
pub fn cluster_tail(family: &str) -> String {
    let rest = family.strip_prefix("envoy_cluster_").unwrap_or(family);
    scoped("cluster.", rest)
}

/// The name under which Envoy's `/stats` has a series.
pub fn name(family: &str, labels: &Labels) -> String {
    with_places(family, labels).0
}

/// Which part of a name says the value of a label: what Envoy takes out of the name where it makes a label of it.
pub type Places = Vec<(&'static str, Range<usize>)>;

/// A name on its way.
struct Writing<'a> {
    labels: &'a Labels,
    out: String,
    places: Places,
}

impl Writing<'_> {
    /// The value of a label, and the label as it is kept.
    fn find(&self, key: &str) -> Option<(&'static str, &str)> {
        let found = self.labels.iter().find(|(own, _)| *own == key)?;
        Some((found.0, found.1.as_str()))
    }

    /// Writes a label's value between `before` and `after`, of which `after` is the value's as well; whether there is one.
    fn part(&mut self, before: &str, key: &str, after: &str) -> bool {
        let Some((key, value)) = self.labels.iter().find(|(own, _)| *own == key) else {
            return false;
        };
        self.out.push_str(before);
        let start = self.out.len();
        self.out.push_str(value);
        self.out.push_str(after);
        self.places.push((*key, start..self.out.len()));
        true
    }
}

/// A [name](name()), and where the values of labels are in it.
pub fn with_places(family: &str, labels: &Labels) -> (String, Places) {
    let mut name = Writing {
        labels,
        out: String::new(),
        places: Places::new(),
    };
    let mut rest = family.strip_prefix("envoy_").unwrap_or(family);
    for (area, key) in [
        ("cluster_", "envoy_cluster_name"),
        ("http_", "envoy_http_conn_manager_prefix"),
        ("listener_", "envoy_listener_address"),
        ("tcp_", "envoy_tcp_prefix"),
    ] {
        if let Some(inner) = rest.strip_prefix(area)
            && name.find(key).is_some()
        {
            name.out.push_str(area.trim_end_matches('_'));
            name.part(".", key, ".");
            rest = inner;
            break;
        }
    }
    if let Some(inner) = rest.strip_prefix("listener_admin_")
        && name.out.is_empty()
    {
        name.out.push_str("listener.admin.");
        rest = inner;
    }
    if let Some(inner) = rest.strip_prefix("http_")
        && name.out.starts_with("listener.")
        && name.part("http.", "envoy_http_conn_manager_prefix", ".")
    {
        rest = inner;
    }
    if name.out.starts_with("listener.") && name.part("worker_", "envoy_worker_id", ".") {
        rest = rest.strip_prefix("worker_").unwrap_or(rest);
    }
    if name.out.is_empty() {
        for (area, inner) in [
            ("cluster_manager_", &["cds_"][..]),
            ("listener_manager_", &["lds_"]),
            ("server_", &[]),
            ("control_plane_", &[]),
            ("runtime_", &[]),
            ("http1_", &[]),
            ("http2_", &[]),
        ] {
            if let Some(left) = rest.strip_prefix(area) {
                let _ = write!(name.out, "{}.", area.trim_end_matches('_'));
                rest = left;
                if let Some(scope) = inner.iter().find(|scope| rest.starts_with(**scope)) {
                    let _ = write!(name.out, "{}.", scope.trim_end_matches('_'));
                    rest = &rest[scope.len()..];
                }
                break;
            }
        }
    }
    if let Some(inner) = rest.strip_prefix("rds_")
        && name.out.starts_with("http.")
        && name.part("rds.", "envoy_rds_route_config", ".")
    {
        rest = inner;
    }
    if let Some(inner) = rest.strip_prefix("vhds_")
        && name.out.starts_with("http.")
        && name.part("vhds.", "route_config", ".")
    {
        rest = inner;
    }
    for kind in ["http_filter", "network_filter", "tcp_listener_filter"] {
        if let Some(inner) = rest
            .strip_prefix("extension_config_discovery_")
            .and_then(|rest| rest.strip_prefix(kind)?.strip_prefix('_'))
            && name.part(&format!("extension_config_discovery.{kind}."), "extension", ".")
        {
            rest = inner;
            break;
        }
    }
    if let Some(inner) = rest.strip_prefix("sds_")
        && name.out.is_empty()
        && name.part("sds.", "envoy_xds_resource_name", ".")
    {
        rest = inner;
    }
    if let Some(inner) = rest.strip_prefix("grpc_")
        && name.out.starts_with("cluster.")
    {
        name.out.push_str("grpc.");
        name.part("", "envoy_grpc_bridge_service", ".");
        name.part("", "envoy_grpc_bridge_method", ".");
        rest = inner;
    }
    if let Some(inner) = rest.strip_prefix("vhost_vcluster_")
        && name.find("envoy_virtual_host").is_some()
        && name.find("envoy_virtual_cluster").is_some()
    {
        name.part("vhost.", "envoy_virtual_host", ".");
        name.part("vcluster.", "envoy_virtual_cluster", ".");
        rest = inner;
    }
    let rest = scoped(&name.out, rest);
    match rest.split_once("_xx") {
        Some((before, after)) if name.part(&format!("{before}_"), "envoy_response_code_class", "") => {
            let _ = write!(name.out, "xx{after}");
        }
        _ => {
            name.out.push_str(&rest);
            // The line before the code goes with it.
            let start = name.out.len();
            if name.part("_", "envoy_response_code", "")
                && let Some((_, place)) = name.places.last_mut()
            {
                place.start = start;
            }
        }
    }
    for (key, value) in labels {
        if !value.is_empty() && !name.places.iter().any(|(own, _)| own == key) {
            let start = name.out.len();
            let _ = write!(name.out, ".{key}.{value}");
            name.places.push((*key, start..name.out.len()));
        }
    }
    (name.out, name.places)
}

/// `name: value`, sorted; histograms apart, which come after the rest.
pub fn text(families: &[Family], buckets: Buckets) -> [String; 2] {
    let (mut simple, mut histograms) = (Vec::new(), Vec::new());
    for family in families {
        for (labels, value) in &family.metrics {
            let name = name(family.name, labels);
            match value {
                Value::Counter(value) | Value::Gauge(value) => simple.push(format!("{name}: {value}\n")),
                Value::Whole(value) => simple.push(format!("{name}: {value}\n")),
                Value::Histogram(histogram) => histograms.push(histogram_line(&name, histogram, buckets)),
            }
        }
    }
    simple.sort_unstable();
    histograms.sort_unstable();
    [simple.concat(), histograms.concat()]
}

/// What of a histogram a line of text says. There are no intervals here: everything is told since the start.
fn histogram_line(name: &str, histogram: &HistogramValue, buckets: Buckets) -> String {
    let mut line = format!("{name}:");
    match buckets {
        Buckets::None => {
            if histogram.count() == 0 {
                return line + " No recorded values\n";
            }
            for quantile in QUANTILES {
                let at = histogram_quantile(histogram, quantile);
                let _ = write!(line, " P{}(nan,{at})", percent(quantile));
            }
        }
        Buckets::Cumulative => {
            let mut sum = 0;
            for (bound, count) in histogram.shown() {
                sum += count;
                let _ = write!(line, " B{bound}(0,{sum})");
            }
        }
        Buckets::Disjoint => {
            for (bound, count) in histogram.shown() {
                let _ = write!(line, " B{bound}(0,{count})");
            }
        }
        Buckets::Detailed => {
            line.push_str("\n  totals=");
            for (index, (low, width, count)) in filled(histogram).enumerate() {
                let comma = if index == 0 { "" } else { ", " };
                let _ = write!(line, "{comma}{low},{width}:{count}");
            }
            line.push_str("\n  intervals=\n  summary=");
            for (index, quantile) in QUANTILES.into_iter().enumerate() {
                let comma = if index == 0 { "" } else { ", " };
                let at = histogram_quantile(histogram, quantile);
                let _ = write!(line, "{comma}P{}(nan,{at})", percent(quantile));
            }
        }
    }
    line + "\n"
}

/// A share as a percentage, without the noise of binary fractions.
fn percent(share: f64) -> f64 {
    (share * 1000.0).round() / 10.0
}

/// Lower bound, width and count of the buckets that hold something; what lies above every bound has no width.
fn filled(histogram: &HistogramValue) -> impl Iterator<Item = (f64, f64, u64)> {
    let mut low = 0.0;
    let within = histogram.shown().map(move |(high, count)| {
        let bucket = (low, high - low, count);
        low = high;
        bucket
    });
    let (last, above) = histogram.above();
    within
        .chain([(last, 0.0, above)])
        .filter(|(_, _, count)| *count > 0)
}

/// The same as values in the shape of `/stats?format=json`: those with a number, and what [`json_histograms`] puts
/// together.
pub fn json(families: &[Family], buckets: Buckets) -> [Vec<Json>; 2] {
    let (mut simple, mut told) = (Vec::new(), Vec::new());
    for family in families {
        for (labels, value) in &family.metrics {
            let name = name(family.name, labels);
            match value {
                Value::Counter(value) | Value::Gauge(value) => {
                    simple.push(json!({"name": name, "value": value}));
                }
                Value::Whole(value) => simple.push(json!({"name": name, "value": value})),
                Value::Histogram(histogram) => told.push(histogram_json(&name, histogram, buckets)),
            }
        }
    }
    [simple, told]
}

/// The last entry of `/stats?format=json`.
pub fn json_histograms(told: Vec<Json>, buckets: Buckets) -> Json {
    let quantiles = QUANTILES.map(percent);
    let histograms = match buckets {
        Buckets::None => json!({ "supported_quantiles": quantiles, "computed_quantiles": told }),
        Buckets::Cumulative | Buckets::Disjoint => told.into(),
        Buckets::Detailed => json!({ "supported_percentiles": quantiles, "details": told }),
    };
    json!({ "histograms": histograms })
}

fn histogram_json(name: &str, histogram: &HistogramValue, buckets: Buckets) -> Json {
    let quantiles = || -> Vec<Json> {
        QUANTILES
            .iter()
            .map(|at| {
                let value = (histogram.count() > 0).then(|| histogram_quantile(histogram, *at));
                json!({"interval": null, "cumulative": value})
            })
            .collect()
    };
    match buckets {
        Buckets::None => json!({"name": name, "values": quantiles()}),
        Buckets::Cumulative | Buckets::Disjoint => {
            let mut sum = 0;
            let each: Vec<Json> = histogram
                .shown()
                .map(|(bound, count)| {
                    sum += count;
                    let told = if buckets == Buckets::Disjoint { count } else { sum };
                    json!({"upper_bound": bound, "interval": 0, "cumulative": told})
                })
                .collect();
            json!({"name": name, "buckets": each})
        }
        Buckets::Detailed => {
            let totals: Vec<Json> = filled(histogram)
                .map(|(low, width, count)| json!({"lower_bound": low, "width": width, "count": count}))
                .collect();
            json!({"name": name, "percentiles": quantiles(), "totals": totals, "intervals": []})
        }
    }
}

/// A quantile, evenly spread within its bucket; the last bound for what lies above it.
fn histogram_quantile(histogram: &HistogramValue, quantile: f64) -> f64 {
    let rank = quantile * histogram.count() as f64;
    let (mut below, mut low) = (0.0, 0.0);
    for (bound, count) in histogram.shown() {
        let count = count as f64;
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
    use super::super::select::{Kind, Select};
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
                "envoy_http_tap_rq_tapped",
                &[("envoy_http_conn_manager_prefix", "in")],
                "http.in.tap.rq_tapped",
            ),
            (
                "envoy_http_rbac_denied",
                &[("envoy_http_conn_manager_prefix", "in")],
                "http.in.rbac.denied",
            ),
            (
                "envoy_listener_downstream_cx_total",
                &[("envoy_listener_address", "0.0.0.0_80")],
                "listener.0.0.0.0_80.downstream_cx_total",
            ),
            (
                "envoy_cluster_upstream_rq",
                &[("envoy_response_code", "503"), ("envoy_cluster_name", "c")],
                "cluster.c.upstream_rq_503",
            ),
            (
                "envoy_cluster_circuit_breakers_high_rq_pending_open",
                &[("envoy_cluster_name", "c")],
                "cluster.c.circuit_breakers.high.rq_pending_open",
            ),
            (
                "envoy_cluster_outlier_detection_ejections_active",
                &[("envoy_cluster_name", "c")],
                "cluster.c.outlier_detection.ejections_active",
            ),
            (
                "envoy_cluster_external_upstream_rq_xx",
                &[("envoy_response_code_class", "5"), ("envoy_cluster_name", "c")],
                "cluster.c.external.upstream_rq_5xx",
            ),
            (
                "envoy_listener_worker_downstream_cx_total",
                &[("envoy_worker_id", "0"), ("envoy_listener_address", "a_1")],
                "listener.a_1.worker_0.downstream_cx_total",
            ),
            (
                "envoy_cluster_manager_cds_update_success",
                &[],
                "cluster_manager.cds.update_success",
            ),
            (
                "envoy_control_plane_connected_state",
                &[],
                "control_plane.connected_state",
            ),
            (
                "envoy_http_rds_update_success",
                &[
                    ("envoy_rds_route_config", "r"),
                    ("envoy_http_conn_manager_prefix", "in"),
                ],
                "http.in.rds.r.update_success",
            ),
            (
                "envoy_vhost_vcluster_upstream_rq_xx",
                &[
                    ("envoy_response_code_class", "2"),
                    ("envoy_virtual_cluster", "v"),
                    ("envoy_virtual_host", "h"),
                ],
                "vhost.h.vcluster.v.upstream_rq_2xx",
            ),
            ("envoy_server_live", &[], "server.live"),
            (
                "envoy_listener_http_downstream_rq_xx",
                &[
                    ("envoy_response_code_class", "2"),
                    ("envoy_http_conn_manager_prefix", "in"),
                    ("envoy_listener_address", "127.0.0.1_80"),
                ],
                "listener.127.0.0.1_80.http.in.downstream_rq_2xx",
            ),
            (
                "envoy_listener_admin_http_downstream_rq_completed",
                &[("envoy_http_conn_manager_prefix", "admin")],
                "listener.admin.http.admin.downstream_rq_completed",
            ),
            (
                "envoy_listener_admin_downstream_cx_total",
                &[],
                "listener.admin.downstream_cx_total",
            ),
            (
                "envoy_http_vhds_update_success",
                &[("route_config", "r"), ("envoy_http_conn_manager_prefix", "in")],
                "http.in.vhds.r.update_success",
            ),
            (
                "envoy_extension_config_discovery_tcp_listener_filter_config_fail",
                &[("extension", "a.b")],
                "extension_config_discovery.tcp_listener_filter.a.b.config_fail",
            ),
            (
                "envoy_sds_update_success",
                &[("envoy_xds_resource_name", "cert")],
                "sds.cert.update_success",
            ),
            ("envoy_http2_rx_reset", &[], "http2.rx_reset"),
            (
                "envoy_cluster_http2_rx_reset",
                &[("envoy_cluster_name", "c")],
                "cluster.c.http2.rx_reset",
            ),
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
        let [simple, histograms] = text(&families, Buckets::None);
        assert_eq!(simple, "server.live: 1\nserver.zero: 0\n");
        assert!(histograms.starts_with("istio_request_bytes: P0("), "{histograms}");
        let select = Select {
            used_only: true,
            filter: Some(regex::Regex::new("^server").unwrap()),
            ..Default::default()
        };
        let mut used = families.to_vec();
        select.narrow(&mut used);
        assert_eq!(text(&used, Buckets::None).concat(), "server.live: 1\n");
        let select = Select {
            kind: Some(Kind::Histograms),
            ..Default::default()
        };
        let mut histograms = families.to_vec();
        select.narrow(&mut histograms);
        let [simple, told] = json(&histograms, Buckets::None);
        assert!(simple.is_empty());
        let shown = json_histograms(told, Buckets::None);
        let computed = &shown["histograms"]["computed_quantiles"][0];
        // Half of four values between 0 and 0.5.
        assert_eq!(computed["values"][2]["cumulative"], 0.25);
    }

    #[test]
    fn histograms_are_told_as_the_client_wants_them() {
        let mut histogram = HistogramValue::default();
        (histogram.buckets[0], histogram.buckets[2], histogram.buckets[19]) = (1, 2, 1);
        let families = [Family {
            name: "istio_request_bytes",
            help: "",
            metrics: vec![(vec![], Value::Histogram(Box::new(histogram)))],
        }];
        let told = |buckets| {
            let [_, histograms] = json(&families, buckets);
            (
                text(&families, buckets).concat(),
                json_histograms(histograms, buckets)["histograms"].clone(),
            )
        };
        let (text, json) = told(Buckets::Cumulative);
        assert!(
            text.starts_with("istio_request_bytes: B0.5(0,1) B1(0,1) B5(0,3) B10(0,3) "),
            "{text}"
        );
        assert_eq!(
            json[0]["buckets"][2],
            json!({"upper_bound": 5.0, "interval": 0, "cumulative": 3})
        );
        let (text, json) = told(Buckets::Disjoint);
        assert!(
            text.starts_with("istio_request_bytes: B0.5(0,1) B1(0,0) B5(0,2) B10(0,0) "),
            "{text}"
        );
        assert_eq!(json[0]["buckets"][2]["cumulative"], 2);
        let (text, json) = told(Buckets::Detailed);
        assert!(text.contains("totals=0,0.5:1, 1,4:2, 3600000,0:1\n"), "{text}");
        let totals = &json["details"][0]["totals"];
        assert_eq!(totals[1], json!({"lower_bound": 1.0, "width": 4.0, "count": 2}));
    }
}
