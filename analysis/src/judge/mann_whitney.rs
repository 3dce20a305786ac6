//! Values from an external provider against those of the primary (or a baseline), without assumptions on their
//! distribution: the Mann-Whitney test with the effect sizes and classes of Kayenta's `NetflixACAJudge-v1.0`.
//!
//! The confidence interval of the shift is that of R's `wilcox.test(conf.int = TRUE, exact = FALSE)`: the shifts at which
//! the normal approximation with tie and continuity correction crosses its quantiles (H. Mann and D. Whitney 1947;
//! J. Hodges and E. Lehmann 1963).
//!
//! It looks once at a finished window. Run at every interval it has no bound over the whole run: use
//! [`super::group_sequential`] for a known number of looks.

use serde::{Deserialize, Serialize};

use crate::math::{brent, normal_cdf, normal_quantile};

/// Confidence of the interval (Kayenta: 98 %).
pub const CONFIDENCE: f64 = 0.98;
/// The interval must lie beyond this share of the shift (Kayenta: 0.25).
pub const TOLERANCE: f64 = 0.25;
/// Kayenta's solver stops at this width of the bracket.
const SOLVER_TOLERANCE: f64 = 1e-6;
/// Relative spread of the noise that is added to constant series, as in Kayenta.
const NOISE: f64 = 1e-5;

/// Which deviations count.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Direction {
    /// Higher is worse.
    Increase,
    /// Lower is worse.
    Decrease,
    /// Both are.
    #[default]
    Either,
}

/// How large a deviation is told.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum EffectSize {
    /// Mean of the canary over mean of the baseline; 1 is no effect.
    #[default]
    MeanRatio,
    /// The probability that a value of the canary is higher (common language effect size); 0.5 is no effect.
    Cles,
}

/// Kayenta's options of one metric.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Options {
    /// Which deviations count.
    pub direction: Direction,
    /// How they are measured.
    pub effect_size: EffectSize,
    /// A deviation upwards counts from this effect size on.
    pub allowed_increase: f64,
    /// A deviation downwards counts up to this effect size.
    pub allowed_decrease: f64,
    /// No values at all fail the metric instead of leaving it out.
    pub must_have_data: bool,
}

impl Options {
    /// Kayenta's defaults: every significant deviation counts.
    pub const fn new(direction: Direction, effect_size: EffectSize) -> Self {
        let neutral = match effect_size {
            EffectSize::MeanRatio => 1.0,
            EffectSize::Cles => 0.5,
        };
        Self {
            direction,
            effect_size,
            allowed_increase: neutral,
            allowed_decrease: neutral,
            must_have_data: false,
        }
    }
}

/// Kayenta's classes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Class {
    /// No deviation that counts.
    Pass,
    /// Higher.
    High,
    /// Lower.
    Low,
    /// No values, which leaves the metric out.
    Nodata,
    /// No values, which fails the metric.
    NodataFailMetric,
}

/// What the test found.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Outcome {
    /// The class.
    pub class: Class,
    /// The effect size, where there are values.
    pub effect: Option<f64>,
    /// Confidence interval of the shift, where it was computed.
    pub shift: Option<Shift>,
}

/// The shift of the canary's values against the baseline's.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Shift {
    /// Lower end of the confidence interval.
    pub low: f64,
    /// The Hodges-Lehmann estimate.
    pub estimate: f64,
    /// Upper end of the confidence interval.
    pub high: f64,
}

/// Ranks with ties averaged, and the sum of `t³ − t` over the ties.
fn ranks(values: &[f64]) -> (Vec<f64>, f64) {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|one, other| values[*one].total_cmp(&values[*other]));
    let mut ranks = vec![0.0; values.len()];
    let mut ties = 0.0;
    let mut start = 0;
    while start < order.len() {
        let mut end = start + 1;
        while end < order.len() && values[order[end]] == values[order[start]] {
            end += 1;
        }
        let rank = 0.5 * (start + 1 + end) as f64;
        for index in &order[start..end] {
            ranks[*index] = rank;
        }
        let tied = (end - start) as f64;
        ties += tied * tied * tied - tied;
        start = end;
    }
    (ranks, ties)
}

/// `z` of the hypothesis that the canary's values are the baseline's plus `shift`; `None` when all values are tied.
pub fn z(canary: &[f64], baseline: &[f64], shift: f64) -> Option<f64> {
    let (nx, ny) = (canary.len() as f64, baseline.len() as f64);
    let joined: Vec<f64> = canary
        .iter()
        .map(|value| value - shift)
        .chain(baseline.iter().copied())
        .collect();
    let (ranks, ties) = ranks(&joined);
    let sum: f64 = ranks.iter().take(canary.len()).sum();
    let w = sum - nx * (nx + 1.0) / 2.0 - nx * ny / 2.0;
    let correction = if w == 0.0 { 0.0 } else { 0.5_f64.copysign(w) };
    let n = nx + ny;
    let variance = nx * ny / 12.0 * (n + 1.0 - ties / (n * (n - 1.0)));
    (variance > 0.0).then(|| (w - correction) / variance.sqrt())
}

/// Two-sided p-value of no shift.
pub fn p_value(canary: &[f64], baseline: &[f64]) -> Option<f64> {
    z(canary, baseline, 0.0).map(|z| (2.0 * normal_cdf(-z.abs())).min(1.0))
}

/// The shift with its confidence interval; `None` when a series is empty or all values are tied.
pub fn shift(canary: &[f64], baseline: &[f64], confidence: f64) -> Option<Shift> {
    let extreme = |values: &[f64], pick: fn(f64, f64) -> f64| values.iter().copied().reduce(pick);
    let lowest = extreme(canary, f64::min)? - extreme(baseline, f64::max)?;
    let highest = extreme(canary, f64::max)? - extreme(baseline, f64::min)?;
    z(canary, baseline, lowest)?;
    z(canary, baseline, highest)?;
    let crossing = |quantile: f64| {
        let distance = |shift: f64| z(canary, baseline, shift).unwrap_or(0.0) - quantile;
        if distance(lowest) <= 0.0 {
            lowest
        } else if distance(highest) >= 0.0 {
            highest
        } else {
            brent(distance, lowest, highest, SOLVER_TOLERANCE)
        }
    };
    let quantile = normal_quantile(1.0 - (1.0 - confidence) / 2.0);
    Some(Shift {
        low: crossing(quantile),
        estimate: crossing(0.0),
        high: crossing(-quantile),
    })
}

/// The effect size.
pub fn effect(canary: &[f64], baseline: &[f64], kind: EffectSize) -> f64 {
    let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len().max(1) as f64;
    match kind {
        EffectSize::MeanRatio => {
            let (ours, theirs) = (mean(canary), mean(baseline));
            if theirs == 0.0 { 1.0 } else { ours / theirs }
        }
        EffectSize::Cles => {
            let joined: Vec<f64> = canary.iter().chain(baseline).copied().collect();
            let (m, n) = (canary.len() as f64, baseline.len() as f64);
            let sum: f64 = ranks(&joined).0.iter().take(canary.len()).sum();
            if m * n == 0.0 {
                0.5
            } else {
                (2.0 * sum - m * (m + 1.0)) / (2.0 * m * n)
            }
        }
    }
}

/// Kayenta's replacement of values that are not numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum NanStrategy {
    /// They are left out.
    #[default]
    Remove,
    /// They count as 0.
    Replace,
}

/// A series without what is not a number.
pub fn cleaned(values: &[f64], strategy: NanStrategy) -> Vec<f64> {
    let numbers = values.iter().copied();
    match strategy {
        NanStrategy::Remove => numbers.filter(|value| !value.is_nan()).collect(),
        NanStrategy::Replace => numbers
            .map(|value| if value.is_nan() { 0.0 } else { value })
            .collect(),
    }
}

/// A series without outliers: inside `[min(p1, Q1 − 3 IQR), max(p99, Q3 + 3 IQR)]`.
pub fn without_outliers(values: &[f64]) -> Vec<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let Some(last) = sorted.len().checked_sub(1) else {
        return Vec::new();
    };
    // Linear between the order statistics, as NumPy and Kayenta do.
    let at = |q: f64| {
        let place = q * last as f64;
        let below = place.floor() as usize;
        let above = (below + 1).min(last);
        sorted[below] + (sorted[above] - sorted[below]) * place.fract()
    };
    let (q1, q3) = (at(0.25), at(0.75));
    let reach = 3.0 * (q3 - q1);
    let (low, high) = (at(0.01).min(q1 - reach), at(0.99).max(q3 + reach));
    values
        .iter()
        .copied()
        .filter(|value| (low..=high).contains(value))
        .collect()
}

/// A constant series with a little Gaussian noise, always the same one, so that a verdict can be told again.
fn with_noise(values: &[f64], seed: u64) -> Vec<f64> {
    let constant = values.windows(2).all(|pair| pair[0] == pair[1]);
    if !constant {
        return values.to_vec();
    }
    let mut state = seed;
    let mut unit = move || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        ((state >> 11) as f64 + 0.5) / (1u64 << 53) as f64
    };
    values
        .iter()
        .map(|value| value + NOISE * value.abs().max(NOISE) * normal_quantile(unit()))
        .collect()
}

/// Classifies a metric as Kayenta does.
pub fn classify(canary: &[f64], baseline: &[f64], options: &Options) -> Outcome {
    let outcome = |class| Outcome {
        class,
        effect: None,
        shift: None,
    };
    if canary.is_empty() || baseline.is_empty() {
        return outcome(if options.must_have_data {
            Class::NodataFailMetric
        } else {
            Class::Nodata
        });
    }
    let constant = |values: &[f64]| values.windows(2).all(|pair| pair[0] == pair[1]);
    if canary == baseline || (constant(canary) && constant(baseline) && canary[0] == baseline[0]) {
        return outcome(Class::Pass);
    }
    let effect = effect(canary, baseline, options.effect_size);
    let (ours, theirs) = (with_noise(canary, 1), with_noise(baseline, 2));
    let Some(shift) = shift(&ours, &theirs, CONFIDENCE) else {
        return Outcome {
            effect: Some(effect),
            ..outcome(Class::Pass)
        };
    };
    let critical = TOLERANCE * shift.estimate.abs();
    let up = matches!(options.direction, Direction::Increase | Direction::Either)
        && shift.low > critical
        && effect >= options.allowed_increase;
    let down = matches!(options.direction, Direction::Decrease | Direction::Either)
        && shift.high < -critical
        && effect <= options.allowed_decrease;
    let class = if up {
        Class::High
    } else if down {
        Class::Low
    } else {
        Class::Pass
    };
    Outcome {
        class,
        effect: Some(effect),
        shift: Some(shift),
    }
}

/// Kayenta's score of a group of metrics: the share that passes, in percent; `Nodata` is left out.
pub fn group_score(classes: &[Class]) -> f64 {
    let count = |wanted: &[Class]| classes.iter().filter(|class| wanted.contains(class)).count() as f64;
    let judged = count(&[Class::Pass, Class::High, Class::Low, Class::NodataFailMetric]);
    if judged == 0.0 {
        0.0
    } else {
        100.0 * count(&[Class::Pass]) / judged
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Ozone in New York, May and August 1973, from R's `airquality` (Chambers et al. 1983), as in the example of R's
    /// `wilcox.test`: W = 127.5, p-value = 0.0001208.
    const MAY: [f64; 26] = [
        41.0, 36.0, 12.0, 18.0, 28.0, 23.0, 19.0, 8.0, 7.0, 16.0, 11.0, 14.0, 18.0, 14.0, 34.0, 6.0, 30.0,
        11.0, 1.0, 11.0, 4.0, 32.0, 23.0, 45.0, 115.0, 37.0,
    ];
    const AUGUST: [f64; 26] = [
        39.0, 9.0, 16.0, 78.0, 35.0, 66.0, 122.0, 89.0, 110.0, 44.0, 28.0, 65.0, 22.0, 59.0, 23.0, 31.0,
        44.0, 21.0, 9.0, 45.0, 168.0, 73.0, 76.0, 118.0, 84.0, 85.0,
    ];

    #[test]
    fn statistic_and_p_value_are_those_of_rs_published_example() {
        let p = p_value(&MAY, &AUGUST).unwrap();
        assert!((p - 0.000_120_8).abs() < 5e-8, "{p}");
        let joined: Vec<f64> = MAY.iter().chain(&AUGUST).copied().collect();
        let w = ranks(&joined).0.iter().take(26).sum::<f64>() - 26.0 * 27.0 / 2.0;
        assert_eq!(w, 127.5);
    }

    #[test]
    fn the_shift_lies_where_z_crosses_its_quantiles() {
        let shift = shift(&AUGUST, &MAY, 0.98).unwrap();
        assert!(shift.low < shift.estimate && shift.estimate < shift.high);
        // z is a step function of the shift: just below the end it is above the quantile, just above it is below.
        for (end, quantile) in [
            (shift.low, 2.326_348),
            (shift.high, -2.326_348),
            (shift.estimate, 0.0),
        ] {
            let (before, after) = (
                z(&AUGUST, &MAY, end - 1e-4).unwrap(),
                z(&AUGUST, &MAY, end + 1e-4).unwrap(),
            );
            assert!(before >= quantile && after <= quantile, "{end}: {before} {after}");
        }
        // Hodges and Lehmann: the median of all differences.
        let mut differences: Vec<f64> = AUGUST
            .iter()
            .flat_map(|one| MAY.iter().map(move |other| one - other))
            .collect();
        differences.sort_by(f64::total_cmp);
        let median = 0.5 * (differences[337] + differences[338]);
        assert!(
            (shift.estimate - median).abs() < 0.51,
            "{} {median}",
            shift.estimate
        );
    }

    #[test]
    fn classes_are_those_of_kayenta() {
        let either = Options::new(Direction::Either, EffectSize::MeanRatio);
        let increase = Options::new(Direction::Increase, EffectSize::MeanRatio);
        let must = Options {
            must_have_data: true,
            ..either
        };
        let generous = Options {
            allowed_increase: 5.0,
            ..either
        };
        let (low, high): (Vec<f64>, Vec<f64>) = (
            (0..60).map(|i| 10.0 + f64::from(i % 7)).collect(),
            (0..60).map(|i| 20.0 + f64::from(i % 5)).collect(),
        );
        for (canary, baseline, options, class) in [
            (&high[..], &low[..], either, Class::High),
            (&low, &high, either, Class::Low),
            (&low, &high, increase, Class::Pass),
            (&high, &low, generous, Class::Pass),
            (&low, &low, either, Class::Pass),
            (&[], &low, either, Class::Nodata),
            (&[], &low, must, Class::NodataFailMetric),
            (&[10.0; 50], &[20.0; 50], either, Class::Low),
            (&[10.0; 50], &[10.0; 60], either, Class::Pass),
        ] {
            assert_eq!(
                classify(canary, baseline, &options).class,
                class,
                "{canary:?} {baseline:?}"
            );
        }
        // Kayenta's issue 426: rare errors against none pass. A comparison of counts is for that.
        let rare: Vec<f64> = [0.0, 1.0, 2.0, 1.0, 0.0, 0.0].repeat(2);
        assert_eq!(classify(&rare, &[0.0; 12], &either).class, Class::Pass);
    }

    #[test]
    fn effect_sizes_have_their_neutral_values_and_extremes() {
        assert_eq!(effect(&[2.0, 4.0], &[1.0, 2.0], EffectSize::MeanRatio), 2.0);
        assert_eq!(effect(&[1.0, 2.0], &[1.0, 2.0], EffectSize::Cles), 0.5);
        assert_eq!(effect(&[3.0, 4.0], &[1.0, 2.0], EffectSize::Cles), 1.0);
        assert_eq!(effect(&[1.0, 2.0], &[3.0, 4.0], EffectSize::Cles), 0.0);
    }

    #[test]
    fn cleaning_follows_kayentas_strategies() {
        let values = [1.0, f64::NAN, 3.0];
        assert_eq!(cleaned(&values, NanStrategy::Remove), [1.0, 3.0]);
        assert_eq!(cleaned(&values, NanStrategy::Replace), [1.0, 0.0, 3.0]);
        let mut series: Vec<f64> = (0..200).map(|i| f64::from(i % 10)).collect();
        series.push(1000.0);
        assert_eq!(without_outliers(&series).len(), 200);
    }

    #[test]
    fn a_group_is_scored_by_the_share_that_passes() {
        use Class::{High, Low, Nodata, NodataFailMetric, Pass};
        assert_eq!(group_score(&[Pass, Pass, High, Nodata]), 200.0 / 3.0);
        assert_eq!(group_score(&[Pass, Low, NodataFailMetric, Pass]), 50.0);
        assert_eq!(group_score(&[Nodata]), 0.0);
    }
}
