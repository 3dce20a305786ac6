//! Values of an external provider, one per interval and arm, judged by one of three rules: a range with hysteresis, the
//! Mann-Whitney test against the primary's values, or a group-sequential plan against them.

use serde::{Deserialize, Serialize};

use super::group_sequential::{GroupSequential, Plan, VALUES_MIN};
use super::hysteresis::{self, Hysteresis};
use super::mann_whitney::{self, Class};
use crate::text;
use crate::verdict::{Evidence, Missing, Verdict};

/// Values that are kept per arm for the Mann-Whitney test: two hours at one a minute.
pub const VALUES_MAX: usize = 120;

/// How values are judged.
#[derive(Clone, Debug, PartialEq)]
pub enum Rule {
    /// They must stay in a range.
    Range(hysteresis::Options),
    /// They must not deviate from the primary's, by the test that Kayenta uses.
    MannWhitney(mann_whitney::Options),
    /// They must not be worse than the primary's, with a bound over all looks.
    GroupSequential {
        /// Its boundaries.
        plan: Plan,
        /// Whether a higher value is worse.
        higher_is_worse: bool,
    },
}

impl Rule {
    /// Whether it needs the primary's values.
    pub const fn compares(&self) -> bool {
        match self {
            Self::Range(_) => false,
            Self::MannWhitney(_) | Self::GroupSequential { .. } => true,
        }
    }
}

/// The values so far.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Values {
    #[serde(default)]
    hysteresis: Hysteresis,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    canary: Vec<f64>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    primary: Vec<f64>,
    #[serde(default)]
    sequential: GroupSequential,
}

impl Values {
    /// Takes in the values of one interval. What is not a number, or lacks the other arm where that is needed, is none.
    pub fn observe(&mut self, canary: f64, primary: Option<f64>, rule: &Rule) {
        let primary = primary.filter(|value| value.is_finite());
        match (rule, primary) {
            (Rule::Range(options), _) => self.hysteresis.observe(canary, options),
            (Rule::MannWhitney(_), Some(primary)) if canary.is_finite() => {
                for (values, value) in [(&mut self.canary, canary), (&mut self.primary, primary)] {
                    if values.len() >= VALUES_MAX {
                        values.remove(0);
                    }
                    values.push(value);
                }
            }
            (
                Rule::GroupSequential {
                    plan,
                    higher_is_worse,
                },
                Some(primary),
            ) => self.sequential.observe(canary, primary, *higher_is_worse, plan),
            (Rule::MannWhitney(_) | Rule::GroupSequential { .. }, _) => {}
        }
    }

    /// The verdict so far.
    pub fn verdict(&self, rule: &Rule) -> Verdict {
        match rule {
            Rule::Range(options) => self.hysteresis.verdict(options),
            Rule::GroupSequential { plan, .. } => self.sequential.verdict(plan),
            Rule::MannWhitney(options) => self.mann_whitney(options),
        }
    }

    fn mann_whitney(&self, options: &mann_whitney::Options) -> Verdict {
        let outcome = mann_whitney::classify(&self.canary, &self.primary, options);
        let n = self.canary.len() as u64;
        let effect = outcome.effect.unwrap_or(1.0);
        let (sign, bound) = match outcome.class {
            Class::Low => ("lower", options.allowed_decrease),
            Class::Pass | Class::High | Class::Nodata | Class::NodataFailMetric => {
                ("higher", options.allowed_increase)
            }
        };
        let evidence = |explanation| Evidence {
            value: effect,
            bound,
            samples: n,
            alpha: None,
            explanation,
        };
        let size = match options.effect_size {
            mann_whitney::EffectSize::MeanRatio => {
                format!("{} times the primary's on average", text::short(effect))
            }
            mann_whitney::EffectSize::Cles => {
                format!(
                    "higher than the primary's in {} % of all pairs",
                    text::short(100.0 * effect)
                )
            }
        };
        match outcome.class {
            Class::Nodata => Verdict::NoData {
                explanation: "no values of both canary and primary yet".to_owned(),
            },
            Class::NodataFailMetric => {
                Verdict::Bad(evidence("there must be values and there are none".to_owned()))
            }
            Class::High | Class::Low => Verdict::Bad(evidence(format!(
                "{n} values of the canary are significantly {sign}, {size} (Mann-Whitney, 98 % interval)"
            ))),
            Class::Pass if n < VALUES_MIN => Verdict::Undecided {
                evidence: evidence(format!("{n} values of the canary are {size}")),
                missing: Missing {
                    what: format!("{} more values", VALUES_MIN - n),
                    seconds: None,
                },
            },
            Class::Pass => Verdict::Good(evidence(format!(
                "{n} values of the canary do not deviate, {size}"
            ))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::group_sequential::Spending;
    use super::super::mann_whitney::{Direction, EffectSize, Options};
    use super::super::threshold::Range;
    use super::*;

    fn judged(rule: &Rule, pairs: impl Iterator<Item = (f64, Option<f64>)>) -> Verdict {
        let mut values = Values::default();
        for (canary, primary) in pairs {
            values.observe(canary, primary, rule);
            // In the middle of a run, at every value.
            let stored = serde_json::to_string(&values).unwrap();
            values = serde_json::from_str(&stored).unwrap();
        }
        values.verdict(rule)
    }

    #[test]
    fn values_are_judged_by_range_by_mann_whitney_or_by_a_plan() {
        let range = Rule::Range(hysteresis::Options::plain(Range {
            min: None,
            max: Some(50.0),
        }));
        let kayenta = Rule::MannWhitney(Options::new(Direction::Increase, EffectSize::MeanRatio));
        let sequential = Rule::GroupSequential {
            plan: Plan::new(20, 0.01, Spending::Pocock),
            higher_is_worse: true,
        };
        let pairs = |shift: f64| {
            (0..20).map(move |i| (20.0 + shift + f64::from(i % 3), Some(20.0 + f64::from(i % 4))))
        };
        for (rule, equal, higher) in [
            (&range, "good", "bad"),
            (&kayenta, "good", "bad"),
            (&sequential, "good", "bad"),
        ] {
            assert_eq!(judged(rule, pairs(0.0)).word(), equal, "{rule:?}");
            assert_eq!(judged(rule, pairs(40.0)).word(), higher, "{rule:?}");
        }
        assert_eq!(
            judged(&kayenta, pairs(-15.0)).word(),
            "good",
            "lower is not worse"
        );
        assert!(!range.compares() && kayenta.compares() && sequential.compares());
    }

    #[test]
    fn values_without_the_primarys_are_no_data_where_they_are_compared() {
        let kayenta = Rule::MannWhitney(Options::new(Direction::Either, EffectSize::Cles));
        assert_eq!(judged(&kayenta, (0..9).map(|_| (1.0, None))).word(), "no data");
        assert_eq!(
            judged(&kayenta, (0..3).map(|i| (f64::from(i), Some(f64::from(i) + 0.1)))).word(),
            "undecided"
        );
    }

    #[test]
    fn no_more_values_are_kept_than_the_limit() {
        let kayenta = Rule::MannWhitney(Options::new(Direction::Either, EffectSize::Cles));
        let mut values = Values::default();
        for i in 0..10 * VALUES_MAX {
            values.observe(i as f64, Some(i as f64), &kayenta);
        }
        assert_eq!(
            (values.canary.len(), values.primary.len()),
            (VALUES_MAX, VALUES_MAX)
        );
    }
}
