//! What a judge can say, and how verdicts of several metrics combine.

use serde::{Deserialize, Serialize};

/// The numbers behind a verdict, for status, events and people.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Evidence {
    /// The measured value, in the metric's unit (percent, milliseconds, or the evidence E of a comparison).
    pub value: f64,
    /// The bound that it was held against, in the same unit.
    pub bound: f64,
    /// How many canary observations it rests on.
    pub samples: u64,
    /// Highest probability with which this metric ever calls a healthy release bad; `None` for a rule that promises
    /// nothing (a fixed threshold).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub alpha: Option<f64>,
    /// One sentence that a person understands.
    pub explanation: String,
}

/// What an undecided judge waits for.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Missing {
    /// What is missing, for example `about 5,200 more canary requests`.
    pub what: String,
    /// How long that takes at the traffic of this run, in seconds; `None` when it may never come (no errors at all, or a
    /// canary that lies exactly at its tolerance).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seconds: Option<f64>,
}

/// What a judge says of one metric, or all of them of a release.
///
/// *No data* and *provider error* are values of their own, never a failure by accident nor a success.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "verdict", rename_all = "camelCase")]
pub enum Verdict {
    /// The release is worse: stop it now.
    Bad(Evidence),
    /// The release is not worse than tolerated.
    Good(Evidence),
    /// The evidence does not suffice yet.
    Undecided {
        /// The evidence so far.
        #[serde(flatten)]
        evidence: Evidence,
        /// What would decide it.
        missing: Missing,
    },
    /// There was nothing to measure.
    NoData {
        /// What is missing.
        explanation: String,
    },
    /// The source could not be asked.
    ProviderError {
        /// What went wrong.
        explanation: String,
    },
}

impl Verdict {
    /// The word for status and tables.
    pub const fn word(&self) -> &'static str {
        match self {
            Self::Bad(_) => "bad",
            Self::Good(_) => "good",
            Self::Undecided { .. } => "undecided",
            Self::NoData { .. } => "no data",
            Self::ProviderError { .. } => "provider error",
        }
    }

    /// The sentence behind the word.
    pub fn explanation(&self) -> &str {
        match self {
            Self::Bad(evidence) | Self::Good(evidence) | Self::Undecided { evidence, .. } => {
                &evidence.explanation
            }
            Self::NoData { explanation } | Self::ProviderError { explanation } => explanation,
        }
    }

    /// The numbers, where there are any.
    pub const fn evidence(&self) -> Option<&Evidence> {
        match self {
            Self::Bad(evidence) | Self::Good(evidence) | Self::Undecided { evidence, .. } => Some(evidence),
            Self::NoData { .. } | Self::ProviderError { .. } => None,
        }
    }

    /// What is missing, where something is.
    pub const fn missing(&self) -> Option<&Missing> {
        match self {
            Self::Undecided { missing, .. } => Some(missing),
            Self::Bad(_) | Self::Good(_) | Self::NoData { .. } | Self::ProviderError { .. } => None,
        }
    }

    /// Whether the release must be stopped.
    pub const fn is_bad(&self) -> bool {
        matches!(self, Self::Bad(_))
    }

    /// Whether the release was shown to be within its tolerance.
    pub const fn is_good(&self) -> bool {
        matches!(self, Self::Good(_))
    }
}

/// What happens where there is no data, or where the provider fails.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Policy {
    /// The step waits until there is data. A monitoring outage then neither promotes nor rolls back.
    #[default]
    Hold,
    /// The step is prolonged, up to a limit; then it counts as a failed check.
    Extend,
    /// It counts as a failed check, as with Flagger.
    Fail,
    /// The metric is left out, as if it had passed.
    Pass,
}

/// One metric's part of a combined verdict.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct MetricVerdict {
    /// Name of the metric.
    pub name: String,
    /// Its share of the overall alpha, 0 to 1; 0 for a rule that promises nothing.
    pub weight: f64,
    /// What its judge says.
    #[serde(flatten)]
    pub verdict: Verdict,
}

/// What all metrics together say.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Combined {
    /// The verdict on the release.
    #[serde(flatten)]
    pub verdict: Verdict,
    /// Metric by metric, in the order of the options.
    pub metrics: Vec<MetricVerdict>,
}

/// Combines verdicts: one bad metric makes a release bad; then missing data counts, by its policy; then whoever is
/// undecided; only if all are good is the release good. Each judge holds its share of alpha, so the whole holds alpha by
/// the union bound, however the metrics depend on each other.
pub fn combine(metrics: Vec<MetricVerdict>, on_no_data: Policy, on_provider_error: Policy) -> Combined {
    let verdict = combined(&metrics, on_no_data, on_provider_error);
    Combined { verdict, metrics }
}

fn combined(metrics: &[MetricVerdict], on_no_data: Policy, on_provider_error: Policy) -> Verdict {
    if let Some(bad) = metrics.iter().find(|metric| metric.verdict.is_bad()) {
        return bad.verdict.clone();
    }
    let mut longest: Option<&Verdict> = None;
    let mut good: Option<&Evidence> = None;
    for metric in metrics {
        match &metric.verdict {
            Verdict::ProviderError { explanation } => match on_provider_error {
                Policy::Pass => {}
                Policy::Fail => return failed(explanation),
                Policy::Hold | Policy::Extend => return metric.verdict.clone(),
            },
            Verdict::NoData { explanation } => match on_no_data {
                Policy::Pass => {}
                Policy::Fail => return failed(explanation),
                Policy::Hold | Policy::Extend => return metric.verdict.clone(),
            },
            Verdict::Undecided { missing, .. } => {
                let wait = |missing: &Missing| missing.seconds.unwrap_or(f64::INFINITY);
                let known = longest.and_then(Verdict::missing).map_or(-1.0, wait);
                if wait(missing) > known {
                    longest = Some(&metric.verdict);
                }
            }
            Verdict::Good(evidence) => {
                good.get_or_insert(evidence);
            }
            Verdict::Bad(_) => {}
        }
    }
    match (longest, good) {
        (Some(undecided), _) => undecided.clone(),
        (None, Some(evidence)) => Verdict::Good(evidence.clone()),
        (None, None) => Verdict::NoData {
            explanation: "no metric has anything to say".to_owned(),
        },
    }
}

fn failed(explanation: &str) -> Verdict {
    Verdict::Bad(Evidence {
        explanation: format!("{explanation}; the policy counts that as a failure"),
        ..Evidence::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn metric(name: &str, verdict: Verdict) -> MetricVerdict {
        MetricVerdict {
            name: name.to_owned(),
            weight: 0.5,
            verdict,
        }
    }

    fn evidence(explanation: &str) -> Evidence {
        Evidence {
            explanation: explanation.to_owned(),
            ..Evidence::default()
        }
    }

    fn undecided(seconds: Option<f64>) -> Verdict {
        Verdict::Undecided {
            evidence: evidence("waits"),
            missing: Missing {
                what: "requests".to_owned(),
                seconds,
            },
        }
    }

    fn no_data() -> Verdict {
        Verdict::NoData {
            explanation: "no requests".to_owned(),
        }
    }

    #[test]
    fn one_bad_metric_outweighs_everything_else() {
        let all = vec![
            metric("a", Verdict::Good(evidence("fine"))),
            metric("b", no_data()),
            metric("c", Verdict::Bad(evidence("worse"))),
        ];
        let combined = combine(all, Policy::Hold, Policy::Hold);
        assert_eq!(combined.verdict.explanation(), "worse");
        assert!(combined.verdict.is_bad());
    }

    #[test]
    fn a_release_is_good_only_if_every_metric_is() {
        let good = || Verdict::Good(evidence("fine"));
        let both = combine(
            vec![metric("a", good()), metric("b", good())],
            Policy::Hold,
            Policy::Hold,
        );
        assert!(both.verdict.is_good());
        let one = combine(
            vec![metric("a", good()), metric("b", undecided(Some(5.0)))],
            Policy::Hold,
            Policy::Hold,
        );
        assert_eq!(one.verdict.word(), "undecided");
    }

    #[test]
    fn of_several_undecided_metrics_the_longest_wait_is_told() {
        let all = vec![
            metric("a", undecided(Some(5.0))),
            metric("b", undecided(None)),
            metric("c", undecided(Some(50.0))),
        ];
        let combined = combine(all, Policy::Hold, Policy::Hold);
        assert_eq!(combined.verdict.missing().unwrap().seconds, None);
    }

    #[test]
    fn missing_data_holds_fails_or_passes_as_the_policy_says() {
        let all = || {
            vec![
                metric("a", Verdict::Good(evidence("fine"))),
                metric("b", no_data()),
            ]
        };
        for (policy, word) in [
            (Policy::Hold, "no data"),
            (Policy::Extend, "no data"),
            (Policy::Fail, "bad"),
            (Policy::Pass, "good"),
        ] {
            assert_eq!(
                combine(all(), policy, Policy::Hold).verdict.word(),
                word,
                "{policy:?}"
            );
        }
        let failing = vec![metric(
            "a",
            Verdict::ProviderError {
                explanation: "down".to_owned(),
            },
        )];
        assert_eq!(
            combine(failing.clone(), Policy::Fail, Policy::Hold)
                .verdict
                .word(),
            "provider error",
            "the two have policies of their own"
        );
        assert_eq!(combine(failing, Policy::Hold, Policy::Fail).verdict.word(), "bad");
    }
}
