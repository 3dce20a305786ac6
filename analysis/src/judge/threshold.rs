//! Flagger's rule for one metric: the value of a window must lie inside `thresholdRange`.
//!
//! How many failed checks stop a rollout (`analysis.threshold`) is counted by [`super::flagger`] for those who want the rule
//! alone, and by the rollout's state machine.

use serde::{Deserialize, Serialize};

use crate::sample::Counts;
use crate::verdict::{Evidence, Verdict};

/// The metrics that Flagger knows without a template.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Builtin {
    /// `request-success-rate`: percent of requests whose answer is not a 5xx.
    #[serde(rename = "request-success-rate")]
    RequestSuccessRate,
    /// `request-duration`: the 99th percentile in milliseconds.
    #[serde(rename = "request-duration")]
    RequestDuration,
}

impl Builtin {
    /// By the name in `analysis.metrics[].name`.
    pub fn from_name(name: &str) -> Option<Self> {
        match name {
            "request-success-rate" => Some(Self::RequestSuccessRate),
            "request-duration" => Some(Self::RequestDuration),
            _ => None,
        }
    }

    /// The value of the metric over a window, `None` without requests.
    pub fn value(self, window: &Counts) -> Option<f64> {
        match self {
            Self::RequestSuccessRate => window.success_rate_percent(),
            Self::RequestDuration => window.latency.quantile(0.99),
        }
    }

    const fn unit(self) -> &'static str {
        match self {
            Self::RequestSuccessRate => "%",
            Self::RequestDuration => " ms",
        }
    }

    const fn what(self) -> &'static str {
        match self {
            Self::RequestSuccessRate => "success rate",
            Self::RequestDuration => "p99 duration",
        }
    }
}

/// Bounds of a metric; both inclusive, both optional.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Range {
    /// The value must be at least this.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min: Option<f64>,
    /// The value must be at most this.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max: Option<f64>,
}

impl Range {
    /// Whether a value lies within; a bound itself does.
    pub fn contains(&self, value: f64) -> bool {
        self.broken_by(value).is_none()
    }

    /// The bound that a value breaks. What is not a number breaks every bound.
    pub fn broken_by(&self, value: f64) -> Option<f64> {
        let min = self.min.filter(|min| value < *min || value.is_nan());
        min.or(self.max.filter(|max| value > *max || value.is_nan()))
    }

    /// The range without a margin at each bound.
    pub fn shrunk(&self, margin: f64) -> Self {
        Self {
            min: self.min.map(|min| min + margin),
            max: self.max.map(|max| max - margin),
        }
    }
}

impl std::fmt::Display for Range {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match (self.min, self.max) {
            (Some(min), Some(max)) => write!(formatter, "{min} to {max}"),
            (Some(min), None) => write!(formatter, "at least {min}"),
            (None, Some(max)) => write!(formatter, "at most {max}"),
            (None, None) => formatter.write_str("any value"),
        }
    }
}

/// Judges one window of canary requests. A value at a bound is inside it, as in Flagger. No requests are no data,
/// which Flagger counts as a halt, not as a failed check.
pub fn judge(metric: Builtin, range: Range, window: &Counts) -> Verdict {
    let Some(value) = metric.value(window) else {
        return Verdict::NoData {
            explanation: format!("no requests to the canary, so no {}", metric.what()),
        };
    };
    let (unit, what) = (metric.unit(), metric.what());
    let broken = match (range.min, range.max) {
        (Some(min), _) if value < min => Some((min, "below", "min")),
        (_, Some(max)) if value > max => Some((max, "above", "max")),
        _ => None,
    };
    match broken {
        Some((bound, side, word)) => Verdict::Bad(Evidence {
            value,
            bound,
            samples: window.requests,
            alpha: None,
            explanation: format!(
                "{what} of {} canary requests is {value:.2}{unit}, {side} the {word} of {bound}{unit}",
                window.requests
            ),
        }),
        None => Verdict::Good(Evidence {
            value,
            bound: range.min.or(range.max).unwrap_or(value),
            samples: window.requests,
            alpha: None,
            explanation: format!(
                "{what} of {} canary requests is {value:.2}{unit}",
                window.requests
            ),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn window(requests: u64, errors: u64) -> Counts {
        Counts {
            requests,
            errors,
            ..Counts::default()
        }
    }

    #[test]
    fn a_success_rate_at_its_minimum_passes_and_below_it_fails() {
        let range = Range {
            min: Some(99.0),
            max: None,
        };
        assert!(matches!(
            judge(Builtin::RequestSuccessRate, range, &window(100, 1)),
            Verdict::Good(_)
        ));
        assert!(matches!(
            judge(Builtin::RequestSuccessRate, range, &window(100, 2)),
            Verdict::Bad(_)
        ));
    }

    #[test]
    fn no_requests_are_no_data_and_neither_good_nor_bad() {
        let verdict = judge(
            Builtin::RequestSuccessRate,
            Range {
                min: Some(99.0),
                max: None,
            },
            &window(0, 0),
        );
        assert_eq!(verdict.word(), "no data");
    }

    #[test]
    fn a_duration_above_its_maximum_fails_with_both_numbers_named() {
        let mut slow = window(100, 0);
        slow.latency = crate::Histogram {
            bounds_ms: vec![100.0, 500.0, 1000.0],
            counts: vec![0, 0, 100, 0],
        };
        let verdict = judge(
            Builtin::RequestDuration,
            Range {
                min: None,
                max: Some(500.0),
            },
            &slow,
        );
        assert_eq!(
            verdict.explanation(),
            "p99 duration of 100 canary requests is 995.00 ms, above the max of 500 ms"
        );
    }
}
