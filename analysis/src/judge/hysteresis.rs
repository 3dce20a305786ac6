//! A number per interval from an external provider, held against a range with hysteresis: one outlier does not fail it, and
//! one good value does not heal it.

use serde::{Deserialize, Serialize};

use super::threshold::Range;
use crate::text;
use crate::verdict::{Evidence, Missing, Verdict};

/// How a value fails and heals.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Options {
    /// Bounds, both inclusive.
    pub range: Range,
    /// How far inside the bounds a value must be to heal, in the metric's unit.
    pub margin: f64,
    /// Values in a row outside the bounds that fail the metric, at least 1.
    pub failures: u32,
    /// Values in a row inside by the margin that heal it, at least 1.
    pub recoveries: u32,
}

impl Options {
    /// Flagger's rule: no hysteresis at all.
    pub const fn plain(range: Range) -> Self {
        Self {
            range,
            margin: 0.0,
            failures: 1,
            recoveries: 1,
        }
    }
}

/// Where the values stand.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Hysteresis {
    /// Values in a row that speak against the current state.
    streak: u32,
    failing: bool,
    values: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    last: Option<f64>,
}

impl Hysteresis {
    /// Takes in the value of an interval; one that is not a number is no value.
    pub fn observe(&mut self, value: f64, options: &Options) {
        if !value.is_finite() {
            return;
        }
        self.values = self.values.saturating_add(1);
        self.last = Some(value);
        let against = if self.failing {
            options.range.shrunk(options.margin).contains(value)
        } else {
            !options.range.contains(value)
        };
        self.streak = if against { self.streak.saturating_add(1) } else { 0 };
        let needed = if self.failing {
            options.recoveries
        } else {
            options.failures
        };
        if self.streak >= needed.max(1) {
            self.failing = !self.failing;
            self.streak = 0;
        }
    }

    /// The verdict on the last value and those before it.
    pub fn verdict(&self, options: &Options) -> Verdict {
        let Some(value) = self.last else {
            return Verdict::NoData {
                explanation: "no value yet".to_owned(),
            };
        };
        let outside = options.range.broken_by(value);
        let bound = outside
            .or(options.range.min)
            .or(options.range.max)
            .unwrap_or(value);
        let evidence = |explanation| Evidence {
            value,
            bound,
            samples: self.values,
            alpha: None,
            explanation,
        };
        let told = text::short(value);
        if self.failing {
            return Verdict::Bad(evidence(format!(
                "value {told} is outside {}, or was for {} intervals in a row and has not healed",
                options.range,
                options.failures.max(1)
            )));
        }
        if outside.is_some() {
            let left = options.failures.max(1) - self.streak;
            return Verdict::Undecided {
                evidence: evidence(format!("value {told} is outside {}", options.range)),
                missing: Missing {
                    what: format!("{left} more such values in a row"),
                    seconds: None,
                },
            };
        }
        Verdict::Good(evidence(format!("value {told} is within {}", options.range)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(values: &[f64], options: &Options) -> Verdict {
        let mut state = Hysteresis::default();
        for value in values {
            state.observe(*value, options);
        }
        state.verdict(options)
    }

    #[test]
    fn outliers_do_not_fail_and_single_good_values_do_not_heal() {
        let options = Options {
            range: Range {
                min: None,
                max: Some(100.0),
            },
            margin: 10.0,
            failures: 3,
            recoveries: 2,
        };
        for (values, word) in [
            (&[][..], "no data"),
            (&[50.0], "good"),
            (&[50.0, 101.0], "undecided"),
            (&[101.0, 101.0, 50.0, 101.0, 101.0], "undecided"),
            (&[101.0, 101.0, 101.0], "bad"),
            (&[101.0, 101.0, 101.0, 80.0], "bad"),
            (&[101.0, 101.0, 101.0, 95.0, 95.0], "bad"),
            (&[101.0, 101.0, 101.0, 90.0, 90.0], "good"),
            (&[f64::NAN, f64::INFINITY], "no data"),
        ] {
            assert_eq!(after(values, &options).word(), word, "{values:?}");
        }
    }

    #[test]
    fn without_hysteresis_it_is_flaggers_rule() {
        let options = Options::plain(Range {
            min: Some(1.0),
            max: Some(2.0),
        });
        assert_eq!(after(&[1.0], &options).word(), "good");
        assert_eq!(after(&[1.5, 2.1], &options).word(), "bad");
        assert_eq!(after(&[1.5, 2.1, 1.5], &options).word(), "good");
    }
}
