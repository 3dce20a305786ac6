//! Kayenta's judge (NetflixACAJudge-v1.0) on one metric, which then is the whole score.
//!
//! Points of a minute each for canary and primary; at every analysis all points so far are compared. Mann-Whitney with
//! the normal approximation, corrections for ties and continuity; the 98 % confidence interval [L, U] of the shift is
//! where the statistic of the shifted samples crosses its quantiles; the canary is High when L is above a quarter of the
//! estimated shift and the ratio of the means is at least the allowed increase. Outliers are kept, NaN points removed,
//! which is how Kayenta is configured by default. Fewer than two points of either: no data.

use serin_analysis::Sample;

use crate::contest::{Call, Contestant};
use crate::random::Random;

/// Length of a point in seconds.
const POINT: u64 = 60;
/// Kayenta's share of the estimated shift that the bound must exceed.
const TOLERANCE: f64 = 0.25;
/// `z` of 0.99: the interval has 98 %.
const Z: f64 = 2.326_347_874_040_841;
/// Accuracy of the roots (R's `uniroot` in `wilcox.test`, from which Kayenta's was made, has 1e-4).
const ROOT: f64 = 1e-4;

/// What is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Metric {
    /// Percent of failing requests.
    Errors,
    /// The 99th percentile in milliseconds.
    Duration,
}

impl Metric {
    fn value(self, counts: &serin_analysis::Counts) -> Option<f64> {
        match self {
            Self::Errors => counts.success_rate_percent().map(|rate| 100.0 - rate),
            Self::Duration => counts.latency.quantile(0.99),
        }
    }
}

/// The judge, asked every `interval` seconds.
pub struct Kayenta {
    metric: Metric,
    interval: u64,
    point: Sample,
    canary: Vec<f64>,
    primary: Vec<f64>,
}

impl Kayenta {
    /// Analyses everything so far every `interval` seconds.
    pub fn new(metric: Metric, interval: u64) -> Self {
        Self {
            metric,
            interval,
            point: Sample::default(),
            canary: Vec::new(),
            primary: Vec::new(),
        }
    }
}

impl Contestant for Kayenta {
    fn observe(&mut self, second: u64, sample: &Sample) -> Call {
        self.point.add(sample);
        if second.is_multiple_of(POINT) {
            let point = std::mem::take(&mut self.point);
            self.canary.extend(self.metric.value(&point.canary));
            self.primary.extend(self.metric.value(&point.primary));
        }
        if second.is_multiple_of(self.interval) && classify(&self.canary, &self.primary) == Class::High {
            Call::Bad
        } else {
            Call::Undecided
        }
    }
}

/// Kayenta's classes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// No difference that counts.
    Pass,
    /// The canary is higher.
    High,
    /// The canary is lower.
    Low,
    /// Too few points.
    Nodata,
}

/// Classifies a canary's points against the primary's.
pub fn classify(canary: &[f64], primary: &[f64]) -> Class {
    if canary.len() < 2 || primary.len() < 2 {
        return Class::Nodata;
    }
    if canary == primary {
        return Class::Pass;
    }
    let constant = |values: &Vec<f64>| values.iter().all(|value| *value == values[0]);
    let (mut x, mut y) = (canary.to_vec(), primary.to_vec());
    for values in [&mut x, &mut y] {
        if constant(values) {
            // Kayenta breaks the ties of a constant set with noise relative to it (zeros stay zeros); from a fixed seed
            // here, so that a verdict can be repeated.
            let mut random = Random::new(0);
            for value in values {
                *value *= 1.0 + 1e-5 * random.normal();
            }
        }
    }
    let shift = root(&x, &y, 0.0, false);
    let (lower, upper) = (root(&x, &y, Z, true), root(&x, &y, -Z, true));
    let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
    let (mean_canary, mean_primary) = (mean(canary), mean(primary));
    let ratio = if mean_primary == 0.0 {
        if mean_canary == 0.0 { 1.0 } else { f64::INFINITY }
    } else {
        mean_canary / mean_primary
    };
    let band = TOLERANCE * shift.abs();
    if lower > band && ratio >= 1.0 {
        Class::High
    } else if upper < -band && ratio <= 1.0 {
        Class::Low
    } else {
        Class::Pass
    }
}

/// The standardised Mann-Whitney statistic of `x - shift` against `y`.
pub fn statistic(x: &[f64], y: &[f64], shift: f64, correct: bool) -> f64 {
    let mut all: Vec<(f64, bool)> = x.iter().map(|value| (value - shift, true)).collect();
    all.extend(y.iter().map(|value| (*value, false)));
    all.sort_unstable_by(|a, b| a.0.total_cmp(&b.0));
    let (n_x, n_y) = (x.len() as f64, y.len() as f64);
    let (mut ranks, mut ties) = (0.0, 0.0);
    let mut start = 0;
    while start < all.len() {
        let same = all[start..]
            .iter()
            .take_while(|(value, _)| *value == all[start].0)
            .count();
        let rank = start as f64 + f64::midpoint(same as f64, 1.0);
        ranks += rank * all[start..start + same].iter().filter(|(_, is_x)| *is_x).count() as f64;
        let same_count = same as f64;
        ties += same_count * same_count * same_count - same_count;
        start += same;
    }
    let w = ranks - n_x * (n_x + 1.0) / 2.0 - n_x * n_y / 2.0;
    let n = n_x + n_y;
    let sigma = (n_x * n_y / 12.0 * (n + 1.0 - ties / (n * (n - 1.0)))).sqrt();
    let correction = if correct && w != 0.0 {
        0.5 * w.signum()
    } else {
        0.0
    };
    if sigma > 0.0 {
        (w - correction) / sigma
    } else {
        0.0
    }
}

/// The shift at which the statistic falls to `z`. It falls in steps, so halving finds the step.
fn root(x: &[f64], y: &[f64], z: f64, correct: bool) -> f64 {
    let least = |values: &[f64]| values.iter().copied().fold(f64::INFINITY, f64::min);
    let most = |values: &[f64]| values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let (mut low, mut high) = (least(x) - most(y), most(x) - least(y));
    if statistic(x, y, low, correct) <= z {
        return low;
    }
    if statistic(x, y, high, correct) >= z {
        return high;
    }
    while high - low > ROOT {
        let middle = low.midpoint(high);
        if statistic(x, y, middle, correct) > z {
            low = middle;
        } else {
            high = middle;
        }
    }
    low.midpoint(high)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The permeability data of Hollander and Wolfe (1973, p. 69), as in the documentation of R's `wilcox.test`:
    /// W = 35, so z = (35 - 25 - 0.5) / sqrt(5 * 10 * 16 / 12), and the estimated shift is 0.305.
    #[test]
    fn the_statistic_and_the_shift_are_those_of_the_textbook_example() {
        let x = [0.80, 0.83, 1.89, 1.04, 1.45, 1.38, 1.91, 1.64, 0.73, 1.46];
        let y = [1.15, 0.88, 0.90, 0.74, 1.21];
        assert!((statistic(&x, &y, 0.0, true) - 9.5 / (800.0_f64 / 12.0).sqrt()).abs() < 1e-12);
        assert!((root(&x, &y, 0.0, false) - 0.305).abs() < 0.006);
    }

    #[test]
    fn classes_are_those_of_kayenta() {
        let low: Vec<f64> = (0..30).map(|i| 1.0 + 0.01 * f64::from(i % 7)).collect();
        let high: Vec<f64> = low.iter().map(|value| value * 3.0).collect();
        assert_eq!(classify(&high, &low), Class::High);
        assert_eq!(classify(&low, &high), Class::Low);
        assert_eq!(classify(&low, &low), Class::Pass);
        assert_eq!(classify(&low[..1], &low), Class::Nodata);
    }

    /// Kayenta issue 426: rare errors against none pass.
    #[test]
    fn a_few_errors_against_zeros_pass() {
        assert_eq!(classify(&[0.0, 1.0, 2.0, 1.0, 0.0, 0.0], &[0.0; 6]), Class::Pass);
    }
}
