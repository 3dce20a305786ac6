//! Metrics that a provider is asked for: what the spec says of them, when a value counts, and Flagger's rule for it. Pure.

use std::collections::BTreeMap;
use std::time::Duration;

use jiff::Timestamp;
use serin_analysis::judge::group_sequential::{self, Spending};
use serin_analysis::judge::hysteresis;
use serin_analysis::judge::mann_whitney::{self, Direction, EffectSize};
use serin_analysis::judge::threshold::Range;
use serin_analysis::judge::values::Rule;
use serin_analysis::verdict::{Evidence, Verdict};
use serin_crds::flagger::{
    CanaryMetric, CanarySpec, CanaryStatus, Deviation, TemplateComparison, TemplateEffectSize, TemplateJudge,
    TemplateSpending,
};
use serin_kit::unhonoured::Field;

/// Alpha of a group-sequential plan when the template names none: that of the comparison.
const ALPHA_DEFAULT: f64 = 0.01;
/// Looks of a plan when the template names none.
const LOOKS_DEFAULT: usize = 20;
/// Interval of a metric when the spec names none. Flagger leaves it empty, which no provider understands.
const INTERVAL_DEFAULT: &str = "1m";

/// Where the query comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A MetricTemplate; `None` is the Canary's own namespace.
    Template {
        /// Its namespace.
        namespace: Option<String>,
        /// Its name.
        name: String,
    },
    /// `query` of the metric itself, for the Prometheus at `spec.metricsServer`.
    Inline {
        /// The Prometheus.
        address: String,
        /// The query, a template like any other.
        query: String,
    },
}

/// A metric that a provider is asked for.
#[derive(Clone, Debug, PartialEq)]
pub struct TemplatePlan {
    /// Name as in the spec.
    pub name: String,
    /// Where its query comes from.
    pub source: Source,
    /// Bounds, both inclusive.
    pub range: Range,
    /// `interval`, for the provider.
    pub window: Duration,
    /// `interval` as the template sees it.
    pub interval: String,
    /// Values for `{{ variables.x }}`.
    pub variables: BTreeMap<String, String>,
}

/// What a provider said.
#[derive(Clone, Debug, PartialEq)]
pub struct Reading {
    /// When it was asked.
    pub asked_at: Timestamp,
    /// Its answer.
    pub outcome: Outcome,
    /// What the template's own rule says of this value and those before it; `None` where there is no rule but the range.
    pub verdict: Option<Verdict>,
    /// Whether that rule compares with the primary; the range then counts besides. The rule of a range with hysteresis
    /// stands in its place.
    pub compares: bool,
}

/// The answer of a provider.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// A number.
    Value(f64),
    /// There is nothing to measure; why.
    NoValues(String),
    /// It could not be asked; why.
    Failed(String),
}

/// The metrics of a spec that are not built in. What cannot be asked is refused by name.
pub(crate) fn plans(spec: &CanarySpec, fields: &mut Vec<Field>) -> Vec<TemplatePlan> {
    let metrics = spec.analysis.metrics.iter().enumerate();
    metrics
        .filter_map(|(index, metric)| plan(index, metric, spec, fields))
        .collect()
}

fn plan(
    index: usize,
    metric: &CanaryMetric,
    spec: &CanarySpec,
    fields: &mut Vec<Field>,
) -> Option<TemplatePlan> {
    let mut refuse = |field: &str, reason: String| {
        fields.push(Field::refused(
            format!("spec.analysis.metrics[{index}]{field}"),
            reason,
        ));
    };
    let source = match (&metric.template_ref, &metric.query) {
        (Some(reference), _) => Source::Template {
            namespace: reference
                .namespace
                .clone()
                .filter(|namespace| !namespace.is_empty()),
            name: reference.name.clone(),
        },
        (None, Some(query)) => match spec.metrics_server.clone().filter(|address| !address.is_empty()) {
            Some(address) => Source::Inline {
                address,
                query: query.clone(),
            },
            None => {
                refuse(
                    ".query",
                    "there is no Prometheus to ask; set spec.metricsServer to its address, or use templateRef".to_owned(),
                );
                return None;
            }
        },
        (None, None) => return None,
    };
    let range = match (&metric.threshold_range, metric.threshold) {
        (Some(range), _) => Range {
            min: range.min,
            max: range.max,
        },
        (None, Some(max)) => Range {
            min: None,
            max: Some(max),
        },
        (None, None) => Range::default(),
    };
    if range.min.is_none() && range.max.is_none() {
        refuse(
            ".thresholdRange",
            "a metric without min and max says nothing (Flagger takes 0 for the maximum); set one of them"
                .to_owned(),
        );
        return None;
    }
    let interval = metric
        .interval
        .clone()
        .filter(|interval| !interval.is_empty())
        .unwrap_or_else(|| INTERVAL_DEFAULT.to_owned());
    let window = match serin_crds::Duration(interval.clone()).parse() {
        Ok(window) => window,
        Err(error) => {
            refuse(".interval", error.to_string());
            return None;
        }
    };
    Some(TemplatePlan {
        name: metric.name.clone(),
        source,
        range,
        window,
        interval,
        variables: metric.template_variables.clone(),
    })
}

/// Since when the current window has been measured; `None` while none is open. `since` is when this process began to
/// measure.
pub(crate) fn opened(status: &CanaryStatus, since: Option<Timestamp>) -> Option<Timestamp> {
    let run = status.run.as_ref()?;
    let window = run.window_started_at.as_ref()?.0;
    let checked = run.checked_at.as_ref().map(|at| at.0);
    [Some(window), checked, since].into_iter().flatten().max()
}

/// What a metric's last reading says; `None` while nobody has answered a question that was asked at `due` or later.
pub(crate) fn answered(reading: Option<&Reading>, due: Timestamp) -> Option<&Reading> {
    reading.filter(|reading| reading.asked_at >= due)
}

/// Flagger's rule: the value must lie inside the bounds, a value at a bound does.
pub(crate) fn judge(plan: &TemplatePlan, reading: Option<&Reading>) -> Verdict {
    let name = &plan.name;
    let value = match reading.map(|reading| &reading.outcome) {
        Some(Outcome::Value(value)) => *value,
        Some(Outcome::NoValues(why)) => {
            return Verdict::NoData {
                explanation: format!("{name}: {why}"),
            };
        }
        Some(Outcome::Failed(why)) => {
            return Verdict::ProviderError {
                explanation: format!("{name}: {why}"),
            };
        }
        None => {
            return Verdict::NoData {
                explanation: format!("{name} is asked for at the end of the window"),
            };
        }
    };
    let evidence = |bound: f64, explanation: String| Evidence {
        value,
        bound,
        samples: 0,
        alpha: None,
        explanation,
    };
    if let Some(reading) = reading.filter(|reading| !reading.compares)
        && let Some(verdict) = reading.verdict.clone()
    {
        return named(name, verdict);
    }
    match (plan.range.min, plan.range.max) {
        (Some(min), _) if value < min => Verdict::Bad(evidence(
            min,
            format!("{name} is {value:.2}, below the min of {min}"),
        )),
        (_, Some(max)) if value > max => Verdict::Bad(evidence(
            max,
            format!("{name} is {value:.2}, above the max of {max}"),
        )),
        (min, max) => match reading.and_then(|reading| reading.verdict.clone()) {
            Some(verdict) => named(name, verdict),
            None => Verdict::Good(evidence(
                min.or(max).unwrap_or(value),
                format!("{name} is {value:.2}"),
            )),
        },
    }
}

fn named(name: &str, mut verdict: Verdict) -> Verdict {
    match &mut verdict {
        Verdict::Bad(evidence) | Verdict::Good(evidence) | Verdict::Undecided { evidence, .. } => {
            evidence.explanation = format!("{name}: {}", evidence.explanation);
        }
        Verdict::NoData { explanation } | Verdict::ProviderError { explanation } => {
            *explanation = format!("{name}: {explanation}");
        }
    }
    verdict
}

/// The rule of a template, or what is wrong with it. `range` is the Canary's.
pub(crate) fn rule(comparison: &TemplateComparison, range: Range) -> Result<Rule, String> {
    let unknown = |field: &str, value: &str| format!("comparison.{field}: {value:?} is not known");
    let direction = match &comparison.direction {
        None | Some(Deviation::Increase) => Direction::Increase,
        Some(Deviation::Decrease) => Direction::Decrease,
        Some(Deviation::Either) => Direction::Either,
        Some(Deviation::Other(other)) => return Err(unknown("direction", other)),
    };
    let count = |value: Option<i32>| u32::try_from(value.unwrap_or(1)).unwrap_or(1).max(1);
    match &comparison.judge {
        None | Some(TemplateJudge::Range) => Ok(Rule::Range(hysteresis::Options {
            range,
            margin: comparison.margin.filter(|margin| *margin >= 0.0).unwrap_or(0.0),
            failures: count(comparison.failures),
            recoveries: count(comparison.recoveries),
        })),
        Some(TemplateJudge::MannWhitney) => {
            let effect_size = match &comparison.effect_size {
                None | Some(TemplateEffectSize::MeanRatio) => EffectSize::MeanRatio,
                Some(TemplateEffectSize::Cles) => EffectSize::Cles,
                Some(TemplateEffectSize::Other(other)) => return Err(unknown("effectSize", other)),
            };
            let mut options = mann_whitney::Options::new(direction, effect_size);
            options.allowed_increase = comparison.allowed_increase.unwrap_or(options.allowed_increase);
            options.allowed_decrease = comparison.allowed_decrease.unwrap_or(options.allowed_decrease);
            Ok(Rule::MannWhitney(options))
        }
        Some(TemplateJudge::GroupSequential) => {
            let spending = match &comparison.spending {
                None | Some(TemplateSpending::ObrienFleming) => Spending::ObrienFleming,
                Some(TemplateSpending::Pocock) => Spending::Pocock,
                Some(TemplateSpending::Other(other)) => return Err(unknown("spending", other)),
            };
            if direction == Direction::Either {
                return Err(
                    "comparison.direction: a plan looks at one side; say Increase or Decrease".to_owned(),
                );
            }
            let alpha = comparison.alpha.unwrap_or(ALPHA_DEFAULT);
            if !(1e-6..=0.5).contains(&alpha) {
                return Err(format!(
                    "comparison.alpha: {alpha} is not between 0.000001 and 0.5"
                ));
            }
            let looks = comparison
                .looks
                .map_or(LOOKS_DEFAULT, |looks| looks.max(1) as usize);
            Ok(Rule::GroupSequential {
                plan: group_sequential::Plan::new(looks, alpha, spending),
                higher_is_worse: direction == Direction::Increase,
            })
        }
        Some(TemplateJudge::Other(other)) => Err(unknown("judge", other)),
    }
}

/// Why a check failed, as Flagger words it.
pub(crate) fn halt_text(plan: &TemplatePlan, evidence: &Evidence) -> String {
    let (name, value) = (&plan.name, evidence.value);
    match (plan.range.min, plan.range.max) {
        (Some(min), _) if value < min && evidence.bound == min => format!("{name} {value:.2} < {min}"),
        (_, Some(max)) if value > max && evidence.bound == max => format!("{name} {value:.2} > {max}"),
        _ => evidence.explanation.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn read(metric: Value, server: Option<&str>) -> (Vec<TemplatePlan>, Vec<Field>) {
        let spec = json!({
            "targetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": "podinfo"},
            "service": {"port": 80},
            "metricsServer": server,
            "analysis": {"stepWeight": 5, "metrics": [{"name": "request-success-rate"}, metric]},
        });
        let mut fields = Vec::new();
        let plans = plans(&serde_json::from_value(spec).unwrap(), &mut fields);
        (plans, fields)
    }

    #[test]
    fn a_template_metric_keeps_its_bounds_interval_and_variables() {
        let (plans, fields) = read(
            json!({"name": "errors", "templateRef": {"name": "t", "namespace": "shared"}, "interval": "30s",
                "templateVariables": {"a": "b"}, "thresholdRange": {"min": 0, "max": 1}}),
            None,
        );
        assert!(fields.is_empty(), "{fields:?}");
        let [plan] = plans.as_slice() else {
            panic!("{plans:?}")
        };
        assert_eq!(
            (plan.window, plan.interval.as_str()),
            (Duration::from_secs(30), "30s")
        );
        assert_eq!((plan.range.min, plan.range.max), (Some(0.0), Some(1.0)));
        assert_eq!(plan.variables["a"], "b");
        let expected = Source::Template {
            namespace: Some("shared".to_owned()),
            name: "t".to_owned(),
        };
        assert_eq!(plan.source, expected);
    }

    #[test]
    fn a_metric_that_could_not_be_judged_is_refused_by_name() {
        for (metric, server, path) in [
            (
                json!({"name": "x", "templateRef": {"name": "t"}}),
                None,
                "spec.analysis.metrics[1].thresholdRange",
            ),
            (
                json!({"name": "x", "query": "q", "threshold": 1}),
                None,
                "spec.analysis.metrics[1].query",
            ),
            (
                json!({"name": "x", "templateRef": {"name": "t"}, "threshold": 1, "interval": "soon"}),
                Some("http://p"),
                "spec.analysis.metrics[1].interval",
            ),
        ] {
            let (plans, fields) = read(metric, server);
            assert!(plans.is_empty());
            assert_eq!(fields[0].path, path);
        }
        let (plans, _) = read(
            json!({"name": "x", "query": "q", "threshold": 5}),
            Some("http://p"),
        );
        assert_eq!(
            (plans[0].range.max, plans[0].interval.as_str()),
            (Some(5.0), "1m")
        );
    }

    #[test]
    fn a_value_at_a_bound_passes_and_one_beyond_it_fails_in_flaggers_words() {
        let (plans, _) = read(
            json!({"name": "errors", "templateRef": {"name": "t"}, "thresholdRange": {"min": 0.5, "max": 1}}),
            None,
        );
        let reading = |value| Reading {
            asked_at: Timestamp::UNIX_EPOCH,
            outcome: Outcome::Value(value),
            verdict: None,
            compares: false,
        };
        for (value, word) in [
            (0.5, "good"),
            (1.0, "good"),
            (0.49, "bad"),
            (12.345, "bad"),
            (f64::INFINITY, "bad"),
        ] {
            assert_eq!(judge(&plans[0], Some(&reading(value))).word(), word, "{value}");
        }
        for (value, text) in [(12.345, "errors 12.35 > 1"), (0.1, "errors 0.10 < 0.5")] {
            let verdict = judge(&plans[0], Some(&reading(value)));
            assert_eq!(halt_text(&plans[0], verdict.evidence().unwrap()), text);
        }
        assert_eq!(judge(&plans[0], None).word(), "no data");
    }

    #[test]
    fn a_templates_rule_is_read_from_its_comparison_and_nonsense_is_named() {
        let rule = |spec: Value| {
            let comparison: TemplateComparison = serde_json::from_value(spec).unwrap();
            rule(&comparison, Range::default())
        };
        let Ok(Rule::Range(options)) = rule(json!({"failures": 3, "recoveries": 2, "margin": 0.5})) else {
            panic!("a range");
        };
        assert_eq!(
            (options.failures, options.recoveries, options.margin),
            (3, 2, 0.5)
        );
        let Ok(Rule::MannWhitney(options)) = rule(
            json!({"judge": "MannWhitney", "direction": "Either", "effectSize": "Cles", "allowedIncrease": 0.8}),
        ) else {
            panic!("Mann-Whitney");
        };
        assert_eq!((options.allowed_increase, options.allowed_decrease), (0.8, 0.5));
        let Ok(Rule::GroupSequential {
            plan,
            higher_is_worse,
        }) = rule(
            json!({"judge": "GroupSequential", "direction": "Decrease", "looks": 5, "spending": "Pocock"}),
        )
        else {
            panic!("a plan");
        };
        assert_eq!((plan.boundaries().len(), higher_is_worse), (5, false));
        for (spec, field) in [
            (json!({"judge": "Guess"}), "comparison.judge"),
            (
                json!({"judge": "GroupSequential", "direction": "Either"}),
                "comparison.direction",
            ),
            (
                json!({"judge": "GroupSequential", "alpha": 0}),
                "comparison.alpha",
            ),
            (
                json!({"judge": "MannWhitney", "effectSize": "x"}),
                "comparison.effectSize",
            ),
        ] {
            let told = rule(spec).unwrap_err();
            assert!(told.starts_with(field), "{told}");
        }
    }

    #[test]
    fn the_range_fails_a_value_first_and_then_the_templates_rule_speaks() {
        let (plans, _) = read(
            json!({"name": "errors", "templateRef": {"name": "t"}, "thresholdRange": {"max": 10}}),
            None,
        );
        let reading = |value, verdict| Reading {
            asked_at: Timestamp::UNIX_EPOCH,
            outcome: Outcome::Value(value),
            verdict: Some(verdict),
            compares: true,
        };
        let worse = Verdict::Bad(Evidence {
            explanation: "significantly higher".to_owned(),
            ..Evidence::default()
        });
        let told = judge(&plans[0], Some(&reading(5.0, worse.clone())));
        assert!(told.is_bad());
        assert_eq!(told.explanation(), "errors: significantly higher");
        assert!(
            judge(&plans[0], Some(&reading(11.0, worse)))
                .explanation()
                .contains("above the max")
        );
    }
}
