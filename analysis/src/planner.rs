//! Before a step: how long does it take, at the current traffic, to find a regression of a given size? And what can the
//! configured interval find at all?
//!
//! An estimate from the growth of the evidence per request: `(ln 1/α + cost of the mixture) / growth`. Medians of the
//! simulations lie within a third of it.

use serde::{Deserialize, Serialize};

use crate::judge::ratio::{Grid, MIXTURE_COST, growth};
use crate::text;

/// The traffic of a step.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Traffic {
    /// Requests per second to both arms together.
    pub requests_per_second: f64,
    /// The canary's share of them, above 0 and below 1.
    pub share: f64,
    /// The primary's share of errors.
    pub error_rate: f64,
}

/// What is to be found, how surely.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Goal {
    /// Alpha of the metric.
    pub alpha: f64,
    /// Tolerated ratio.
    pub tolerance: f64,
    /// The ratio that must be found.
    pub ratio: f64,
}

/// Ratio that the planner asks for when nothing is configured: four times the primary's errors.
pub const RATIO_DEFAULT: f64 = 4.0;

/// A primary without errors is planned for as if it failed this often: nothing can be planned with nothing.
pub const ERROR_RATE_MIN: f64 = 1e-4;

/// A canary's error rate that is worth finding however few errors the primary has.
pub const ERROR_RATE_WORTH_FINDING: f64 = 0.01;

/// The ratio to plan for: what is asked for, and more where the primary has so few errors that this would still be few.
pub fn ratio_worth_finding(error_rate: f64, ratio: f64) -> f64 {
    ratio.max(ERROR_RATE_WORTH_FINDING / error_rate.max(ERROR_RATE_MIN))
}

impl Traffic {
    fn canary_per_second(&self) -> f64 {
        self.requests_per_second * self.share.clamp(0.0, 1.0)
    }

    fn rate(&self) -> f64 {
        self.error_rate.clamp(ERROR_RATE_MIN, 1.0)
    }

    fn has_both(&self) -> bool {
        self.requests_per_second > 0.0 && self.share > 0.0 && self.share < 1.0
    }

    /// Seconds until a canary that fails `ratio` times as often is called bad; `None` if never.
    pub fn seconds_to_find(&self, goal: &Goal) -> Option<f64> {
        self.seconds(goal.ratio, goal)
            .filter(|_| goal.ratio > goal.tolerance)
    }

    /// Seconds until a canary that equals the primary is shown to be within the tolerance; `None` if never.
    pub fn seconds_to_clear(&self, goal: &Goal) -> Option<f64> {
        self.seconds(1.0, goal).filter(|_| goal.tolerance > 1.0)
    }

    fn seconds(&self, ratio: f64, goal: &Goal) -> Option<f64> {
        if !self.has_both() {
            return None;
        }
        let per_request = growth(self.rate(), self.share, ratio, goal.tolerance, &Grid::ERRORS);
        let seconds = ((1.0 / goal.alpha).ln() + MIXTURE_COST) / per_request / self.canary_per_second();
        seconds.is_finite().then_some(seconds)
    }

    /// The smallest ratio that is found within so many seconds, to a tenth; `None` if not even a total failure is.
    pub fn smallest_ratio(&self, seconds: f64, goal: &Goal) -> Option<f64> {
        let highest = 1.0 / self.rate();
        let found = |ratio: f64| {
            self.seconds_to_find(&Goal { ratio, ..*goal })
                .is_some_and(|needed| needed <= seconds)
        };
        if !found(highest) {
            return None;
        }
        let (mut low, mut high) = (goal.tolerance, highest);
        while high - low > 0.05 * low {
            let middle = 0.5 * (low + high);
            if found(middle) {
                high = middle;
            } else {
                low = middle;
            }
        }
        Some(high)
    }
}

/// What the planner says of one step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct StepPlan {
    /// Share of the canary in percent.
    pub weight_percent: f64,
    /// Seconds until the regression of the goal is found; `None` if never.
    pub seconds_to_find: Option<f64>,
    /// Seconds until an equal canary is shown to be within the tolerance; `None` if never.
    pub seconds_to_clear: Option<f64>,
    /// The smallest ratio that the interval finds; `None` if it finds nothing.
    pub smallest_ratio: Option<f64>,
}

/// A plan of all steps.
pub fn plan(
    requests_per_second: f64,
    error_rate: f64,
    weights_percent: &[f64],
    interval_seconds: f64,
    goal: &Goal,
) -> Vec<StepPlan> {
    weights_percent
        .iter()
        .map(|weight| {
            let traffic = Traffic {
                requests_per_second,
                share: weight / 100.0,
                error_rate,
            };
            StepPlan {
                weight_percent: *weight,
                seconds_to_find: traffic.seconds_to_find(goal),
                seconds_to_clear: traffic.seconds_to_clear(goal),
                smallest_ratio: traffic.smallest_ratio(interval_seconds, goal),
            }
        })
        .collect()
}

/// A sentence of warning when the ladder as a whole is too short to find the regression of the goal; evidence adds up over
/// the steps. `None` when it is found.
pub fn warning(
    steps: &[StepPlan],
    requests_per_second: f64,
    error_rate: f64,
    interval_seconds: f64,
    goal: &Goal,
) -> Option<String> {
    let judged: Vec<&StepPlan> = steps.iter().filter(|step| step.weight_percent < 100.0).collect();
    let progress: f64 = judged
        .iter()
        .filter_map(|step| step.seconds_to_find)
        .map(|needed| interval_seconds / needed)
        .sum();
    if progress >= 1.0 {
        return None;
    }
    let traffic = text::short(requests_per_second);
    let interval = text::seconds(interval_seconds);
    let percent = |ratio: f64| text::short((100.0 * ratio * error_rate.max(ERROR_RATE_MIN)).min(100.0));
    let needed = judged
        .iter()
        .filter_map(|step| step.seconds_to_find)
        .reduce(f64::min);
    let found = judged
        .iter()
        .filter_map(|step| step.smallest_ratio)
        .reduce(f64::min);
    let advice = match needed {
        Some(needed) => format!("that takes about {} at the highest weight", text::seconds(needed)),
        None => "no interval is long enough at this traffic".to_owned(),
    };
    let finds = match found {
        Some(ratio) => format!("one step finds {} %", percent(ratio)),
        None => "one step finds nothing at all".to_owned(),
    };
    Some(format!(
        "at {traffic} requests/s, steps of {interval} are too short to find an error rate of {} % where the primary's is {} %: \
         {advice}; {finds}",
        percent(goal.ratio),
        text::short(100.0 * error_rate),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::judge::ratio::{Batch, RatioTest};
    use crate::random::Random;

    const GOAL: Goal = Goal {
        alpha: 0.01,
        tolerance: 1.5,
        ratio: 5.0,
    };

    fn simulated_median(rps: u64, share: f64, rate: f64, ratio: f64, goal: &Goal, good: bool) -> f64 {
        let canary = (rps as f64 * share) as u64;
        let mut needed: Vec<u32> = (0..101)
            .map(|seed| {
                let mut random = Random::new(seed);
                let mut test = RatioTest::default();
                let mut seconds = 0;
                loop {
                    seconds += 1;
                    let batch = Batch {
                        canary,
                        canary_bad: random.binomial(canary, rate * ratio),
                        primary: rps - canary,
                        primary_bad: random.binomial(rps - canary, rate),
                    };
                    test.observe(&batch, goal.tolerance, &Grid::ERRORS);
                    let log = if good {
                        test.log_peak_for()
                    } else {
                        test.log_peak()
                    };
                    if log >= (1.0 / goal.alpha).ln() || seconds > 5000 {
                        return seconds;
                    }
                }
            })
            .collect();
        needed.sort_unstable();
        f64::from(needed[50])
    }

    #[test]
    fn the_plan_is_near_what_simulations_need() {
        for (rps, share, rate, ratio) in [
            (1000, 0.1, 0.001, 5.0),
            (100, 0.1, 0.01, 3.0),
            (1000, 0.5, 0.01, 2.5),
            (100, 0.05, 0.005, 20.0),
        ] {
            let goal = Goal { ratio, ..GOAL };
            let traffic = Traffic {
                requests_per_second: rps as f64,
                share,
                error_rate: rate,
            };
            let planned = traffic.seconds_to_find(&goal).unwrap();
            let median = simulated_median(rps, share, rate, ratio, &goal, false);
            assert!(
                planned < 2.0 * median + 2.0 && median < 1.5 * planned + 2.0,
                "{rps} {share} {rate} {ratio}: planned {planned}, median {median}"
            );
        }
        let traffic = Traffic {
            requests_per_second: 1000.0,
            share: 0.3,
            error_rate: 0.01,
        };
        let planned = traffic.seconds_to_clear(&GOAL).unwrap();
        let median = simulated_median(1000, 0.3, 0.01, 1.0, &GOAL, true);
        assert!(
            planned < 2.0 * median && median < 1.5 * planned,
            "planned {planned}, median {median}"
        );
    }

    #[test]
    fn an_interval_that_can_find_nothing_is_warned_of() {
        let weights = [5.0, 20.0];
        let steps = plan(5.0, 0.001, &weights, 10.0, &GOAL);
        let warning = warning(&steps, 5.0, 0.001, 10.0, &GOAL).unwrap();
        assert!(
            warning.starts_with(
                "at 5 requests/s, steps of 10 s are too short to find an error rate of 0.5 % where the primary's is 0.1 %"
            ),
            "{warning}"
        );
    }

    #[test]
    fn an_interval_that_is_long_enough_is_not_warned_of() {
        let steps = plan(1000.0, 0.001, &[10.0, 50.0], 60.0, &GOAL);
        assert_eq!(warning(&steps, 1000.0, 0.001, 60.0, &GOAL), None);
        assert!(steps[0].smallest_ratio.unwrap() < 5.0);
        assert!(
            steps[1].seconds_to_find < steps[0].seconds_to_find,
            "more share, less time"
        );
    }

    #[test]
    fn without_traffic_or_a_tolerance_nothing_can_be_planned() {
        let none = Traffic {
            requests_per_second: 0.0,
            share: 0.1,
            error_rate: 0.01,
        };
        assert_eq!(none.seconds_to_find(&GOAL), None);
        let traffic = Traffic {
            requests_per_second: 100.0,
            ..none
        };
        let strict = Goal {
            tolerance: 1.0,
            ..GOAL
        };
        assert_eq!(traffic.seconds_to_clear(&strict), None);
        let within = Goal { ratio: 1.2, ..GOAL };
        assert_eq!(
            traffic.seconds_to_find(&within),
            None,
            "what is tolerated is never found"
        );
    }
}
