//! `client_side_weighted_round_robin`: weights that follow from what hosts report of their load, in fields of their responses
//! or in trailers (ORCA, gRFC A58).
//!
//! A host's weight is what it does a second by how busy that makes it; errors make it busier. A report counts from
//! `blackout_period` after the first one on, and until `weight_expiration_period` after the last one; a host without a weight
//! has the median of the others. Reports out of band are refused: nobody opens streams to endpoints for them.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::HeaderMap;
use prost::Message;
use serin_xds::pb::envoy::extensions::load_balancing_policies::client_side_weighted_round_robin::v3 as pb;

use crate::config::convert;
use crate::error::{Refusal, Within};

/// Envoy's defaults.
const BLACKOUT: Duration = Duration::from_secs(10);
const EXPIRATION: Duration = Duration::from_secs(180);
const UPDATE: Duration = Duration::from_secs(1);
const PENALTY: f64 = 1.0;
/// Weights are looked at no more often.
const LEAST_UPDATE: Duration = Duration::from_millis(100);
/// The field with a report, its kind before it.
const FIELD: &str = "endpoint-load-metrics";
/// The field with a report as protobuf.
const BINARY_FIELD: &str = "endpoint-load-metrics-bin";

/// `xds.data.orca.v3.OrcaLoadReport`, which is not in the generated set.
#[derive(Clone, PartialEq, Message)]
pub struct Report {
    #[prost(double, tag = "1")]
    cpu_utilization: f64,
    #[prost(double, tag = "2")]
    mem_utilization: f64,
    #[prost(map = "string, double", tag = "4")]
    request_cost: HashMap<String, f64>,
    #[prost(map = "string, double", tag = "5")]
    utilization: HashMap<String, f64>,
    #[prost(double, tag = "6")]
    rps_fractional: f64,
    #[prost(double, tag = "7")]
    eps: f64,
    #[prost(map = "string, double", tag = "8")]
    named_metrics: HashMap<String, f64>,
    #[prost(double, tag = "9")]
    application_utilization: f64,
}

impl Report {
    /// The report of a response's head or trailers; `None` where there is none that can be read.
    pub fn of(headers: &HeaderMap) -> Option<Self> {
        if let Some(value) = headers.get(BINARY_FIELD) {
            return Self::of_binary(value.to_str().ok()?);
        }
        let (kind, value) = headers.get(FIELD)?.to_str().ok()?.split_once(' ')?;
        match kind {
            "BIN" => Self::of_binary(value),
            "JSON" => Self::of_json(value),
            "TEXT" => Self::of_text(value),
            _ => None,
        }
    }

    fn of_binary(text: &str) -> Option<Self> {
        Self::decode(STANDARD.decode(text).ok()?.as_slice()).ok()
    }

    fn of_json(text: &str) -> Option<Self> {
        let value: serde_json::Value = serde_json::from_str(text).ok()?;
        let mut out = Self::default();
        for (name, value) in value.as_object()? {
            match value {
                serde_json::Value::Object(entries) => {
                    for (key, value) in entries {
                        out.set(&format!("{name}.{key}"), value.as_f64()?)?;
                    }
                }
                value => out.set(name, value.as_f64()?)?,
            }
        }
        Some(out)
    }

    fn of_text(text: &str) -> Option<Self> {
        let mut out = Self::default();
        for pair in text.split(',') {
            let (name, value) = pair.split_once('=')?;
            out.set(name.trim(), value.trim().parse().ok()?)?;
        }
        Some(out)
    }

    /// `None` for a name that a report does not have, and for what is no number.
    fn set(&mut self, name: &str, value: f64) -> Option<()> {
        if !value.is_finite() {
            return None;
        }
        let place = match name {
            "cpu_utilization" | "cpuUtilization" => &mut self.cpu_utilization,
            "mem_utilization" | "memUtilization" => &mut self.mem_utilization,
            "application_utilization" | "applicationUtilization" => &mut self.application_utilization,
            "rps_fractional" | "rpsFractional" => &mut self.rps_fractional,
            "eps" => &mut self.eps,
            _ => {
                let (map, key) = name.split_once('.')?;
                let map = match map {
                    "named_metrics" | "namedMetrics" => &mut self.named_metrics,
                    "utilization" => &mut self.utilization,
                    "request_cost" | "requestCost" => &mut self.request_cost,
                    _ => return None,
                };
                map.entry(key.to_owned()).or_default()
            }
        };
        *place = value;
        Some(())
    }

    /// A metric by the name that configurations give it; the largest of `map.*`.
    fn metric(&self, name: &str) -> Option<f64> {
        match name {
            "cpu_utilization" => return Some(self.cpu_utilization),
            "mem_utilization" => return Some(self.mem_utilization),
            "application_utilization" => return Some(self.application_utilization),
            _ => {}
        }
        let (map, key) = name.split_once('.')?;
        let map = match map {
            "named_metrics" => &self.named_metrics,
            "utilization" => &self.utilization,
            "request_cost" => &self.request_cost,
            _ => return None,
        };
        match key {
            "*" => map.values().copied().reduce(f64::max),
            key => map.get(key).copied(),
        }
    }
}

/// The compiled policy.
#[derive(Debug, PartialEq)]
pub struct Reporting {
    blackout_ms: u64,
    expiration_ms: u64,
    /// How often the weights of hosts are compared.
    pub update_ms: u64,
    penalty: f64,
    metrics: Box<[Box<str>]>,
}

impl Reporting {
    pub(super) fn compile(from: &pb::ClientSideWeightedRoundRobin) -> Result<Self, Refusal> {
        if from
            .enable_oob_load_report
            .as_ref()
            .is_some_and(|value| value.value)
        {
            return Err(Refusal::new(
                "enable_oob_load_report",
                "reports out of band are not supported: hosts report with their responses",
            ));
        }
        if from.oob_reporting_config.is_some() {
            return Err(Refusal::new("oob_reporting_config", "not supported"));
        }
        let period = |given: Option<&serin_xds::pb::google::protobuf::Duration>, absent: Duration, field| {
            match given {
                None => Ok(absent),
                Some(given) => convert::duration(given).within(field),
            }
        };
        let penalty = from
            .error_utilization_penalty
            .as_ref()
            .map_or(PENALTY, |value| f64::from(value.value));
        if !(penalty.is_finite() && penalty >= 0.0) {
            return Err(Refusal::new(
                "error_utilization_penalty",
                format!("{penalty} is below zero"),
            ));
        }
        let update = period(from.weight_update_period.as_ref(), UPDATE, "weight_update_period")?;
        Ok(Self {
            blackout_ms: period(from.blackout_period.as_ref(), BLACKOUT, "blackout_period")?.as_millis()
                as u64,
            expiration_ms: period(
                from.weight_expiration_period.as_ref(),
                EXPIRATION,
                "weight_expiration_period",
            )?
            .as_millis() as u64,
            update_ms: update.max(LEAST_UPDATE).as_millis() as u64,
            penalty,
            metrics: from
                .metric_names_for_computing_utilization
                .iter()
                .map(|name| name.as_str().into())
                .collect(),
        })
    }

    /// The weight that a report stands for; `None` for a host that does nothing, or does not say how busy it is.
    pub fn weight(&self, report: &Report) -> Option<f64> {
        let named = || {
            let each = self.metrics.iter();
            each.filter_map(|name| report.metric(name))
                .reduce(f64::max)
                .filter(|value| *value > 0.0)
        };
        let utilization = if report.application_utilization > 0.0 {
            report.application_utilization
        } else {
            named().unwrap_or(report.cpu_utilization)
        };
        let rate = report.rps_fractional;
        if !(utilization > 0.0 && rate > 0.0) {
            return None;
        }
        let errors = if report.eps > 0.0 {
            report.eps / rate * self.penalty
        } else {
            0.0
        };
        Some(rate / (utilization + errors)).filter(|weight| weight.is_finite() && *weight > 0.0)
    }
}

/// What a host has reported, for all workers.
#[derive(Debug, Default)]
pub struct Reported {
    /// Bits of the weight.
    weight: AtomicU64,
    /// When reports began, and when the last one came (process clock, ms, and one more); 0 for never.
    since: AtomicU64,
    last: AtomicU64,
}

impl Reported {
    /// A report has come.
    pub fn take(&self, weight: f64, now_ms: u64) {
        let now = now_ms + 1;
        self.weight.store(weight.to_bits(), Ordering::Relaxed);
        self.last.store(now, Ordering::Relaxed);
        let _ = self
            .since
            .compare_exchange(0, now, Ordering::Relaxed, Ordering::Relaxed);
    }

    /// The weight, where it counts.
    pub fn weight(&self, rules: &Reporting, now_ms: u64) -> Option<f64> {
        let (since, last) = (
            self.since.load(Ordering::Relaxed),
            self.last.load(Ordering::Relaxed),
        );
        if since == 0 {
            return None;
        }
        let now = now_ms + 1;
        if now.saturating_sub(last) >= rules.expiration_ms {
            // What comes next is a beginning.
            self.since.store(0, Ordering::Relaxed);
            return None;
        }
        (now.saturating_sub(since) >= rules.blackout_ms)
            .then(|| f64::from_bits(self.weight.load(Ordering::Relaxed)))
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    fn rules(from: pb::ClientSideWeightedRoundRobin) -> Reporting {
        Reporting::compile(&from).unwrap()
    }

    fn report(field: &'static str, value: &str) -> Option<Report> {
        let mut headers = HeaderMap::new();
        headers.insert(field, HeaderValue::from_str(value).unwrap());
        Report::of(&headers)
    }

    #[test]
    fn reports_are_read_in_every_form_and_what_is_none_is_not() {
        let expected = Report {
            application_utilization: 0.5,
            rps_fractional: 10.0,
            named_metrics: [("queue".to_owned(), 0.25)].into(),
            ..Default::default()
        };
        let binary = STANDARD.encode(expected.encode_to_vec());
        for (field, value) in [
            (
                FIELD,
                "TEXT application_utilization=0.5, rps_fractional=10,named_metrics.queue=0.25",
            ),
            (
                FIELD,
                r#"JSON {"applicationUtilization": 0.5, "rps_fractional": 10, "namedMetrics": {"queue": 0.25}}"#,
            ),
            (FIELD, &*format!("BIN {binary}")),
            (BINARY_FIELD, &*binary),
        ] {
            assert_eq!(report(field, value).as_ref(), Some(&expected), "{value}");
        }
        for bad in [
            "TEXT",
            "TEXT x",
            "TEXT unknown=1",
            "TEXT eps=NaN",
            "JSON []",
            "BIN !",
            "XML <a/>",
        ] {
            assert_eq!(report(FIELD, bad), None, "{bad}");
        }
    }

    #[test]
    fn a_weight_is_what_is_done_by_how_busy_that_makes_and_errors_cost() {
        let plain = rules(pb::ClientSideWeightedRoundRobin::default());
        let named = rules(pb::ClientSideWeightedRoundRobin {
            metric_names_for_computing_utilization: vec![
                "named_metrics.queue".into(),
                "utilization.*".into(),
            ],
            error_utilization_penalty: Some(serin_xds::pb::google::protobuf::FloatValue { value: 2.0 }),
            ..Default::default()
        });
        for (rules, text, expected) in [
            (
                &plain,
                "rps_fractional=100,application_utilization=0.5,cpu_utilization=0.1",
                Some(200.0),
            ),
            (&plain, "rps_fractional=100,cpu_utilization=0.25", Some(400.0)),
            (
                &plain,
                "rps_fractional=100,cpu_utilization=0.25,eps=25",
                Some(200.0),
            ),
            (&plain, "rps_fractional=100,named_metrics.queue=0.5", None),
            (&plain, "cpu_utilization=0.5", None),
            (&plain, "rps_fractional=100", None),
            (
                &named,
                "rps_fractional=100,named_metrics.queue=0.5,cpu_utilization=0.9",
                Some(200.0),
            ),
            (
                &named,
                "rps_fractional=100,utilization.a=0.2,utilization.b=0.4",
                Some(250.0),
            ),
            (&named, "rps_fractional=100,utilization.b=0.4,eps=30", Some(100.0)),
        ] {
            let report = Report::of_text(text).unwrap();
            assert_eq!(rules.weight(&report), expected, "{text}");
        }
    }

    #[test]
    fn a_report_counts_between_its_blackout_and_its_expiry() {
        let rules = rules(pb::ClientSideWeightedRoundRobin::default());
        let reported = Reported::default();
        assert_eq!(reported.weight(&rules, 0), None);
        reported.take(3.0, 1_000);
        assert_eq!(reported.weight(&rules, 10_999), None);
        reported.take(4.0, 10_500);
        assert_eq!(reported.weight(&rules, 11_000), Some(4.0));
        assert_eq!(reported.weight(&rules, 190_499), Some(4.0));
        assert_eq!(reported.weight(&rules, 190_500), None);
        // It begins again.
        reported.take(5.0, 191_000);
        assert_eq!(reported.weight(&rules, 200_999), None);
        assert_eq!(reported.weight(&rules, 201_000), Some(5.0));
    }

    #[test]
    fn what_the_policy_cannot_do_is_refused_by_name() {
        use serin_xds::pb::google::protobuf::{BoolValue, FloatValue};
        for (from, path) in [
            (
                pb::ClientSideWeightedRoundRobin {
                    enable_oob_load_report: Some(BoolValue { value: true }),
                    ..Default::default()
                },
                "enable_oob_load_report",
            ),
            (
                pb::ClientSideWeightedRoundRobin {
                    error_utilization_penalty: Some(FloatValue { value: -1.0 }),
                    ..Default::default()
                },
                "error_utilization_penalty",
            ),
        ] {
            assert_eq!(Reporting::compile(&from).unwrap_err().path, path);
        }
    }
}
