//! `spec.analysis.comparison`, normalised.

use std::time::Duration;

use serin_analysis::ErrorClass;
use serin_analysis::judge::warmth;
use serin_analysis::judges::{Kind, Metric, Options};
use serin_analysis::planner::RATIO_DEFAULT;
use serin_analysis::verdict::Policy;
use serin_crds::flagger::{AdvancePolicy, Comparison, MissingPolicy, PromotionWatch};
use serin_kit::unhonoured::Field;

/// Intervals by which a step is prolonged at most when the spec says nothing.
const EXTEND_LIMIT_DEFAULT: i32 = 3;
/// Most metrics that are compared: each has a state in the status.
const METRICS_MAX: usize = 12;
const PATH: &str = "spec.analysis.comparison";
/// How long a promotion is watched, and the limits of that.
const WATCH_DURATION_DEFAULT: Duration = Duration::from_secs(3600);
const WATCH_DURATION_MIN: Duration = Duration::from_secs(10);
const WATCH_DURATION_MAX: Duration = Duration::from_secs(7 * 86_400);
/// One promotion in 240 is taken back wrongly within the hour, at most.
const FALSE_ALARMS_DEFAULT: f64 = 0.1;

/// When a step that nothing speaks against may go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Advance {
    /// When its interval is over.
    AtInterval,
    /// When it was shown to be good; in the end also without.
    WhenGood,
    /// As soon as it was shown to be good, or when its interval is over.
    Early,
}

/// How a run is compared.
#[derive(Clone, Debug, PartialEq)]
pub struct ComparisonPlan {
    /// What the judges are given.
    pub options: Options,
    /// When a step may go on.
    pub advance: Advance,
    /// Intervals by which a step is prolonged at most.
    pub extend_limit: i32,
    /// The ratio of errors that the steps should find.
    pub expected_ratio: f64,
    /// What happens where there is nothing to measure. The judges themselves only say so.
    pub on_no_data: Policy,
    /// What happens where the source fails.
    pub on_provider_error: Policy,
    /// The watch after a promotion, if there is one.
    pub watch: Option<WatchPlan>,
}

/// `watch`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct WatchPlan {
    /// How long after the promotion.
    pub duration: Duration,
    /// On average, at most.
    pub false_alarms_per_day: f64,
    /// Whether an alarm takes the promotion back.
    pub rollback: bool,
}

impl Default for ComparisonPlan {
    fn default() -> Self {
        Self {
            options: Options::default(),
            advance: Advance::AtInterval,
            extend_limit: EXTEND_LIMIT_DEFAULT,
            expected_ratio: RATIO_DEFAULT,
            on_no_data: Policy::Hold,
            on_provider_error: Policy::Hold,
            watch: None,
        }
    }
}

impl ComparisonPlan {
    /// Reads the block; `None` when it is switched off. What cannot be read is refused.
    pub fn new(spec: &Comparison, fields: &mut Vec<Field>) -> Option<Self> {
        if spec.enabled == Some(false) {
            return None;
        }
        let mut plan = Self::default();
        let options = &mut plan.options;
        if let Some(alpha) = spec.alpha {
            if !(1e-6..=0.5).contains(&alpha) {
                fields.push(Field::refused(
                    format!("{PATH}.alpha"),
                    format!("{alpha} is not between 0.000001 and 0.5"),
                ));
            } else {
                options.alpha = alpha;
            }
        }
        if let Some(tolerance) = tolerance(spec.tolerance, &format!("{PATH}.tolerance"), fields) {
            options.tolerance = tolerance;
        }
        if !spec.metrics.is_empty() {
            options.metrics = metrics(spec, fields);
        }
        guards(spec, options, fields);
        if options.metrics.len() > METRICS_MAX {
            fields.push(Field::refused(
                format!("{PATH}.metrics"),
                format!(
                    "{} metrics; at most {METRICS_MAX} are compared",
                    options.metrics.len()
                ),
            ));
        }
        if let Some(text) = &spec.warm_up {
            match serin_crds::Duration(text.clone()).parse() {
                Ok(longest) => {
                    options.warm_up = warmth::Options {
                        shortest_ms: 0,
                        longest_ms: i64::try_from(longest.as_millis()).unwrap_or(i64::MAX),
                        errors: spec.warm_up_errors.unwrap_or(false),
                    }
                }
                Err(error) => fields.push(Field::refused(format!("{PATH}.warmUp"), error.to_string())),
            }
        }
        plan.on_no_data = policy(spec.on_no_data.as_ref(), "onNoData", fields);
        plan.on_provider_error = policy(spec.on_provider_error.as_ref(), "onProviderError", fields);
        plan.advance = match &spec.advance {
            None | Some(AdvancePolicy::AtInterval) => Advance::AtInterval,
            Some(AdvancePolicy::WhenGood) => Advance::WhenGood,
            Some(AdvancePolicy::Early) => Advance::Early,
            Some(AdvancePolicy::Other(other)) => {
                fields.push(unknown("advance", other));
                Advance::AtInterval
            }
        };
        plan.extend_limit = spec.extend_limit.unwrap_or(EXTEND_LIMIT_DEFAULT).clamp(1, 1000);
        if let Some(ratio) = spec.expected_ratio {
            if ratio.is_finite() && ratio > plan.options.tolerance {
                plan.expected_ratio = ratio;
            } else {
                fields.push(Field::refused(
                    format!("{PATH}.expectedRatio"),
                    format!("{ratio} is within the tolerance, which is never found"),
                ));
            }
        }
        plan.expected_ratio = plan.expected_ratio.max(plan.options.tolerance * 1.5);
        plan.watch = spec.watch.as_ref().map(|spec| watch(spec, fields));
        Some(plan)
    }
}

fn watch(spec: &PromotionWatch, fields: &mut Vec<Field>) -> WatchPlan {
    let mut plan = WatchPlan {
        duration: WATCH_DURATION_DEFAULT,
        false_alarms_per_day: FALSE_ALARMS_DEFAULT,
        rollback: spec.rollback.unwrap_or(true),
    };
    if let Some(text) = &spec.duration {
        match serin_crds::Duration(text.clone()).parse() {
            Ok(duration) if (WATCH_DURATION_MIN..=WATCH_DURATION_MAX).contains(&duration) => {
                plan.duration = duration
            }
            Ok(_) => fields.push(Field::refused(
                format!("{PATH}.watch.duration"),
                format!("{text} is not between 10s and 168h"),
            )),
            Err(error) => fields.push(Field::refused(
                format!("{PATH}.watch.duration"),
                error.to_string(),
            )),
        }
    }
    match spec.false_alarms_per_day {
        None => {}
        Some(count) if (1e-4..=100.0).contains(&count) => plan.false_alarms_per_day = count,
        Some(count) => fields.push(Field::refused(
            format!("{PATH}.watch.falseAlarmsPerDay"),
            format!("{count} is not between 0.0001 and 100"),
        )),
    }
    plan
}

fn unknown(field: &str, value: &str) -> Field {
    Field::refused(format!("{PATH}.{field}"), format!("{value:?} is not known"))
}

fn tolerance(value: Option<f64>, path: &str, fields: &mut Vec<Field>) -> Option<f64> {
    let value = value?;
    if value.is_finite() && value >= 1.0 {
        return Some(value);
    }
    fields.push(Field::refused(
        path,
        format!("{value} is below 1, which nothing could meet"),
    ));
    None
}

fn metrics(spec: &Comparison, fields: &mut Vec<Field>) -> Vec<Metric> {
    let mut metrics: Vec<Metric> = Vec::new();
    for (index, metric) in spec.metrics.iter().enumerate() {
        let path = |field: &str| format!("{PATH}.metrics[{index}].{field}");
        let Some(mut known) = Metric::by_name(&metric.name) else {
            fields.push(Field::refused(
                path("name"),
                format!(
                    "{:?} is not known; use errors, errors-5xx, errors-grpc, errors-connection, latency, or latency-p99 \
                     with any percentile",
                    metric.name
                ),
            ));
            continue;
        };
        if matches!(
            known.kind,
            Kind::Errors {
                class: ErrorClass::ByClient
            }
        ) {
            fields.push(Field::refused(
                path("name"),
                "proxies do not tell clients apart; it is for recorded data (serin judge)",
            ));
            continue;
        }
        if metrics.iter().any(|other| other.name == known.name) {
            fields.push(Field::refused(
                path("name"),
                format!("{:?} is there twice", metric.name),
            ));
            continue;
        }
        match metric.weight {
            None => {}
            Some(weight) if weight.is_finite() && weight > 0.0 => known.weight = weight,
            Some(weight) => fields.push(Field::refused(path("weight"), format!("{weight} is not above 0"))),
        }
        known.tolerance = tolerance(metric.tolerance, &path("tolerance"), fields);
        metrics.push(known);
    }
    metrics
}

fn guards(spec: &Comparison, options: &mut Options, fields: &mut Vec<Field>) {
    if let Some(percent) = spec.max_error_rate {
        if percent > 0.0 && percent <= 90.0 {
            options.metrics.push(Metric {
                name: "max-error-rate".to_owned(),
                kind: Kind::ErrorRate {
                    acceptable: percent / 100.0,
                    unacceptable: None,
                },
                weight: 1.0,
                tolerance: None,
            });
        } else {
            fields.push(Field::refused(
                format!("{PATH}.maxErrorRate"),
                format!("{percent} is not a percentage above 0 and up to 90"),
            ));
        }
    }
    for (index, bound) in spec.max_latency.iter().enumerate() {
        let valid = bound.percentile > 0.0
            && bound.percentile < 100.0
            && bound.milliseconds > 0.0
            && bound.milliseconds.is_finite();
        if !valid {
            fields.push(Field::refused(
                format!("{PATH}.maxLatency[{index}]"),
                format!("p{} of {} ms is no bound", bound.percentile, bound.milliseconds),
            ));
            continue;
        }
        options.metrics.push(Metric {
            name: format!("max-latency-p{}", bound.percentile),
            kind: Kind::LatencyBound {
                quantile: bound.percentile / 100.0,
                bound_ms: bound.milliseconds,
            },
            weight: 1.0,
            tolerance: None,
        });
    }
}

fn policy(policy: Option<&MissingPolicy>, field: &str, fields: &mut Vec<Field>) -> Policy {
    match policy {
        None | Some(MissingPolicy::Hold) => Policy::Hold,
        Some(MissingPolicy::Extend) => Policy::Extend,
        Some(MissingPolicy::Fail) => Policy::Fail,
        Some(MissingPolicy::Pass) => Policy::Pass,
        Some(MissingPolicy::Other(other)) => {
            fields.push(unknown(field, other));
            Policy::Hold
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn plan(spec: serde_json::Value) -> (Option<ComparisonPlan>, Vec<Field>) {
        let mut fields = Vec::new();
        let plan = ComparisonPlan::new(&serde_json::from_value(spec).unwrap(), &mut fields);
        (plan, fields)
    }

    #[test]
    fn without_a_comparison_block_the_defaults_apply() {
        let (plan, fields) = plan(json!({}));
        assert_eq!((plan, fields), (Some(ComparisonPlan::default()), vec![]));
    }

    #[test]
    fn every_field_of_the_comparison_is_read() {
        let (plan, fields) = plan(json!({
            "alpha": 0.001, "tolerance": 2, "advance": "WhenGood", "extendLimit": 5, "warmUp": "2m", "warmUpErrors": true,
            "onNoData": "Extend", "onProviderError": "Fail", "maxErrorRate": 5, "expectedRatio": 6,
            "maxLatency": [{"percentile": 99, "milliseconds": 500}],
            "metrics": [{"name": "errors-5xx", "weight": 4}, {"name": "latency-p90", "tolerance": 1.2}],
        }));
        assert_eq!(fields, vec![]);
        let plan = plan.unwrap();
        let names: Vec<&str> = plan
            .options
            .metrics
            .iter()
            .map(|metric| metric.name.as_str())
            .collect();
        assert_eq!(
            names,
            ["errors-5xx", "latency-p90", "max-error-rate", "max-latency-p99"]
        );
        assert_eq!((plan.options.alpha, plan.options.tolerance), (0.001, 2.0));
        assert_eq!(
            (plan.advance, plan.extend_limit, plan.expected_ratio),
            (Advance::WhenGood, 5, 6.0)
        );
        assert_eq!(plan.options.warm_up.longest_ms, 120_000);
        assert!(plan.options.warm_up.errors);
        assert_eq!(
            (plan.on_no_data, plan.on_provider_error),
            (Policy::Extend, Policy::Fail)
        );
        assert_eq!(plan.options.metrics[1].tolerance, Some(1.2));
        let share = plan.options.share(&plan.options.metrics[0]);
        assert!((share - 4.0 / 7.0).abs() < 1e-12);
    }

    #[test]
    fn what_makes_no_sense_in_a_comparison_is_refused_by_name() {
        for (spec, path) in [
            (json!({"alpha": 0}), "spec.analysis.comparison.alpha"),
            (json!({"tolerance": 0.9}), "spec.analysis.comparison.tolerance"),
            (
                json!({"metrics": [{"name": "speed"}]}),
                "spec.analysis.comparison.metrics[0].name",
            ),
            (
                json!({"metrics": [{"name": "errors"}, {"name": "errors"}]}),
                "spec.analysis.comparison.metrics[1].name",
            ),
            (
                json!({"metrics": [{"name": "errors-by-client"}]}),
                "spec.analysis.comparison.metrics[0].name",
            ),
            (
                json!({"metrics": [{"name": "errors", "weight": 0}]}),
                "spec.analysis.comparison.metrics[0].weight",
            ),
            (
                json!({"maxErrorRate": 0}),
                "spec.analysis.comparison.maxErrorRate",
            ),
            (
                json!({"maxLatency": [{"percentile": 100, "milliseconds": 5}]}),
                "spec.analysis.comparison.maxLatency[0]",
            ),
            (json!({"warmUp": "soon"}), "spec.analysis.comparison.warmUp"),
            (json!({"advance": "Maybe"}), "spec.analysis.comparison.advance"),
            (json!({"onNoData": "Panic"}), "spec.analysis.comparison.onNoData"),
            (
                json!({"watch": {"duration": "1s"}}),
                "spec.analysis.comparison.watch.duration",
            ),
            (
                json!({"watch": {"falseAlarmsPerDay": 0}}),
                "spec.analysis.comparison.watch.falseAlarmsPerDay",
            ),
            (
                json!({"expectedRatio": 1.2}),
                "spec.analysis.comparison.expectedRatio",
            ),
        ] {
            let (_, fields) = plan(spec.clone());
            let paths: Vec<&str> = fields.iter().map(|field| field.path.as_str()).collect();
            assert_eq!(paths, [path], "{spec}");
        }
    }
}
