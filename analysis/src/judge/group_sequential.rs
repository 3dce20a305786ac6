//! A plan for a known number of looks: values from an external provider, one per interval and arm, compared at the end of
//! each interval with a bound over the whole run.
//!
//! Alpha is spent over the looks by a spending function (K. Lan and D. DeMets 1983) of O'Brien-Fleming's or Pocock's
//! shape; the boundaries follow from the joint distribution of the looks, integrated recursively (P. Armitage, C.
//! McPherson, B. Rowe 1969). The statistic is Welch's: the difference of the means over its standard error; with a few
//! values per arm its normality is an approximation, which is why no look is taken before [`VALUES_MIN`].

use serde::{Deserialize, Serialize};

use crate::math::{normal_cdf, normal_pdf, normal_quantile};
use crate::text;
use crate::verdict::{Evidence, Missing, Verdict};

/// Values per arm before the first look.
pub const VALUES_MIN: u64 = 5;
/// Most looks of a plan.
pub const LOOKS_MAX: usize = 100;
/// Step of the integration grid, in standard deviations of an increment.
const GRID: f64 = 0.05;
/// Where a density ends, in standard deviations: 1e-15 lies beyond.
const TAIL: f64 = 8.0;

/// How alpha is spent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Spending {
    /// Little at first, most at the end: `2 − 2Φ(z_{α/2}/√t)`.
    #[default]
    ObrienFleming,
    /// About the same at every look: `α ln(1 + (e − 1) t)`.
    Pocock,
}

impl Spending {
    /// Alpha that may be spent up to the share `t` of the information, for a test whose one tail has `alpha`.
    pub fn spent(self, alpha: f64, t: f64) -> f64 {
        let t = t.clamp(0.0, 1.0);
        if t <= 0.0 {
            return 0.0;
        }
        match self {
            Self::ObrienFleming => 2.0 * normal_cdf(normal_quantile(alpha / 2.0) / t.sqrt()),
            Self::Pocock => alpha * ((std::f64::consts::E - 1.0) * t).ln_1p(),
        }
    }
}

/// A plan: the boundaries of `z` at each look, one-sided.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    boundaries: Vec<f64>,
    alpha: f64,
}

impl Plan {
    /// Boundaries for this many equally spaced looks. `alpha` is that of the one tail that is looked at.
    pub fn new(looks: usize, alpha: f64, spending: Spending) -> Self {
        let looks = looks.clamp(1, LOOKS_MAX);
        let times: Vec<f64> = (1..=looks).map(|look| look as f64 / looks as f64).collect();
        Self {
            boundaries: boundaries(&times, |t| spending.spent(alpha, t)),
            alpha,
        }
    }

    /// The boundary of `z` at each look.
    pub fn boundaries(&self) -> &[f64] {
        &self.boundaries
    }
}

/// The density of the score `S_k = √t_k Z_k` on the paths that have not crossed, on a grid.
struct Density {
    low: f64,
    step: f64,
    values: Vec<f64>,
}

impl Density {
    /// Probability that the next score is above `level`, if it gains a variance of `variance`.
    fn beyond(&self, level: f64, variance: f64) -> f64 {
        let sd = variance.sqrt();
        self.integrate(|score| normal_cdf(-(level - score) / sd))
    }

    fn integrate(&self, f: impl Fn(f64) -> f64) -> f64 {
        self.integrate_between(f64::NEG_INFINITY, f64::INFINITY, f)
    }

    /// Integrates where `f` is not negligible.
    fn integrate_between(&self, low: f64, high: f64, f: impl Fn(f64) -> f64) -> f64 {
        // Simpson's rule; the number of points is odd.
        let last = self.values.len() - 1;
        let place = |score: f64| (((score - self.low) / self.step).max(0.0) as usize).min(last);
        let (first, end) = (place(low), (place(high) + 2).min(last + 1));
        let sum: f64 = self
            .values
            .iter()
            .enumerate()
            .take(end)
            .skip(first)
            .map(|(index, density)| {
                let weight = if index == 0 || index == last {
                    1.0
                } else if index % 2 == 1 {
                    4.0
                } else {
                    2.0
                };
                weight * density * f(self.low + index as f64 * self.step)
            })
            .sum();
        sum * self.step / 3.0
    }
}

fn grid(low: f64, high: f64, sd: f64) -> (f64, usize) {
    let cells = (((high - low) / (GRID * sd)).ceil() as usize).clamp(2, 4000);
    let cells = cells + cells % 2;
    ((high - low) / cells as f64, cells)
}

fn boundaries(times: &[f64], spent: impl Fn(f64) -> f64) -> Vec<f64> {
    let mut found = Vec::with_capacity(times.len());
    let mut density: Option<Density> = None;
    let mut before = (0.0, 0.0);
    for &t in times {
        let (t_before, spent_before) = before;
        let spend = (spent(t) - spent_before).max(1e-16);
        let variance: f64 = t - t_before;
        let beyond = |level: f64| match &density {
            None => normal_cdf(-level / variance.sqrt()),
            Some(density) => density.beyond(level, variance),
        };
        // Bisection on the score: the probability falls with the level.
        let (mut low, mut high) = (-TAIL * t.sqrt(), TAIL * t.sqrt());
        for _ in 0..60 {
            let middle = 0.5 * (low + high);
            if beyond(middle) > spend {
                low = middle;
            } else {
                high = middle;
            }
        }
        let level = 0.5 * (low + high);
        found.push(level / t.sqrt());
        let sd = variance.sqrt();
        let floor = -TAIL * t.sqrt();
        let (step, cells) = grid(floor, level, sd);
        let values = (0..=cells)
            .map(|index| {
                let score = floor + index as f64 * step;
                match &density {
                    None => normal_pdf(score / sd) / sd,
                    Some(density) => {
                        let reach = TAIL * sd;
                        density.integrate_between(score - reach, score + reach, |from| {
                            normal_pdf((score - from) / sd) / sd
                        })
                    }
                }
            })
            .collect();
        density = Some(Density {
            low: floor,
            step,
            values,
        });
        before = (t, spent(t));
    }
    found
}

/// Mean and spread of one arm (B. Welford 1962).
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Moments {
    n: u64,
    mean: f64,
    m2: f64,
}

impl Moments {
    fn add(&mut self, value: f64) {
        self.n += 1;
        let delta = value - self.mean;
        self.mean += delta / self.n as f64;
        self.m2 += delta * (value - self.mean);
    }

    fn squared_error(&self) -> f64 {
        self.m2 / (self.n as f64 - 1.0) / self.n as f64
    }
}

/// The values so far.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct GroupSequential {
    canary: Moments,
    primary: Moments,
    looks: u32,
    crossed: bool,
    z: f64,
}

impl GroupSequential {
    /// Takes in one value of each arm and looks, unless all looks are used up. `higher_is_worse` gives the tail.
    pub fn observe(&mut self, canary: f64, primary: f64, higher_is_worse: bool, plan: &Plan) {
        if !canary.is_finite() || !primary.is_finite() {
            return;
        }
        let Some(boundary) = plan.boundaries.get(self.looks as usize) else {
            return;
        };
        self.looks += 1;
        self.canary.add(canary);
        self.primary.add(primary);
        if self.canary.n < VALUES_MIN {
            return;
        }
        let error = (self.canary.squared_error() + self.primary.squared_error()).sqrt();
        let difference = self.canary.mean - self.primary.mean;
        let difference = if higher_is_worse { difference } else { -difference };
        self.z = if error > 0.0 {
            difference / error
        } else if difference > 0.0 {
            f64::MAX
        } else {
            0.0
        };
        self.crossed |= self.z >= *boundary;
    }

    /// `Bad` once a boundary was crossed; `Good` when the last look has passed without.
    pub fn verdict(&self, plan: &Plan) -> Verdict {
        if self.canary.n == 0 {
            return Verdict::NoData {
                explanation: "no values of both canary and primary yet".to_owned(),
            };
        }
        let looks = plan.boundaries.len();
        let at = (self.looks as usize).clamp(1, looks);
        let facts = format!(
            "the canary's values average {}, the primary's {}, look {} of {looks}",
            text::short(self.canary.mean),
            text::short(self.primary.mean),
            self.looks,
        );
        let evidence = |explanation| Evidence {
            value: self.z,
            bound: plan.boundaries[at - 1],
            samples: self.canary.n,
            alpha: Some(plan.alpha),
            explanation,
        };
        if self.crossed {
            return Verdict::Bad(evidence(format!("{facts}; {}", text::promise(plan.alpha))));
        }
        let left = looks - self.looks as usize;
        if left == 0 {
            return Verdict::Good(evidence(format!("{facts}; no look was beyond its bound")));
        }
        Verdict::Undecided {
            evidence: evidence(facts),
            missing: Missing {
                what: format!("{left} more looks"),
                seconds: None,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Random;

    /// Two-sided 5 % is one-sided 2.5 %, with five looks. Published with the Lan-DeMets programs (Reboussin, DeMets, Kim and
    /// Lan) and by gsDesign (Anderson).
    #[test]
    fn boundaries_of_five_looks_are_the_published_ones() {
        let plan = Plan::new(5, 0.025, Spending::ObrienFleming);
        for (ours, published) in plan
            .boundaries()
            .iter()
            .zip([4.8769, 3.3569, 2.6803, 2.2898, 2.0310])
        {
            assert!((ours - published).abs() < 0.0006, "{ours} {published}");
        }
        let plan = Plan::new(5, 0.025, Spending::Pocock);
        for (ours, published) in plan
            .boundaries()
            .iter()
            .zip([2.4380, 2.4268, 2.4101, 2.3966, 2.3859])
        {
            assert!((ours - published).abs() < 0.0006, "{ours} {published}");
        }
    }

    #[test]
    fn one_look_is_the_usual_test() {
        let plan = Plan::new(1, 0.025, Spending::Pocock);
        assert!((plan.boundaries()[0] - 1.95996).abs() < 1e-4);
    }

    #[test]
    fn equal_series_cross_no_more_often_than_alpha_and_a_higher_one_does() {
        let plan = Plan::new(20, 0.05, Spending::Pocock);
        let mut random = Random::new(31);
        let mut crossed = |shift: f64| {
            (0..1000)
                .filter(|_| {
                    let mut state = GroupSequential::default();
                    for _ in 0..20 {
                        state.observe(
                            10.0 + shift + random.normal(),
                            10.0 + random.normal(),
                            true,
                            &plan,
                        );
                    }
                    state.verdict(&plan).is_bad()
                })
                .count()
        };
        // 50 plus three standard deviations, plus what few values make of a t distribution.
        let wrong = crossed(0.0);
        assert!(wrong <= 80, "{wrong} of 1000");
        assert!(crossed(2.0) > 950);
    }

    #[test]
    fn after_the_last_look_it_is_good_and_takes_no_more() {
        let plan = Plan::new(6, 0.01, Spending::ObrienFleming);
        let mut state = GroupSequential::default();
        for look in 0..10 {
            state.observe(
                1.0 + f64::from(look % 2),
                1.0 + f64::from((look + 1) % 2),
                true,
                &plan,
            );
        }
        let verdict = state.verdict(&plan);
        assert!(verdict.is_good(), "{}", verdict.explanation());
        assert_eq!(verdict.evidence().unwrap().samples, 6);
        let text = serde_json::to_string(&state).unwrap();
        assert!(text.len() < 300);
        assert_eq!(serde_json::from_str::<GroupSequential>(&text).unwrap(), state);
    }
}
