//! The engine of the comparisons: is a bad event more frequent in the canary's requests than in the primary's, by more
//! than a tolerated ratio? Sequential: it may be looked at after every batch, for ever.
//!
//! A batch has `n_c` and `n_p` requests with `x_c` and `x_p` bad ones; `ρ = n_c/(n_c+n_p)`, `m = x_c+x_p`. For each ratio
//! `φ_k` of a grid the evidence against the tolerated ratio `φ_0` grows by
//!
//! ```text
//! ln L_k += x_c ln(φ_k/φ_0) − m ln((ρ φ_k + 1 − ρ) / (ρ φ_0 + 1 − ρ))
//! ```
//!
//! and `E = Σ_k w_k L_k`. Ratios above `φ_0` give the evidence that the canary is worse, ratios below it the evidence that
//! it is within the tolerance.
//!
//! **Why this holds.** Let each request fail independently, with any probabilities that may change from batch to batch and
//! depend on all that was before, of which only `p_c ≤ φ_0 p_p` is asked (means over the batch). With `u = L`'s factor per
//! canary failure and `v` that per primary failure, `E[L] = (1+p_c(u−1))^{n_c} (1+p_p(v−1))^{n_p} ≤ exp(n_c p_c (u−1) +
//! n_p p_p (v−1))`, and since `ρ φ_0 (u−1) + (1−ρ)(v−1) = 0` and `u ≥ 1` this is at most 1. So `E` is a nonnegative
//! supermartingale that starts at 1, and by Ville's inequality (J. Ville 1939; for mixtures H. Robbins 1970) it ever reaches
//! `1/α` with probability at most α: however often one looks, for any error rate, any batch size, any change of weights. An
//! outage that raises both rates cancels. The same follows from exchangeability inside the batch alone, without
//! independence: given `m` the canary's failures are hypergeometric, which the binomial dominates in convex order
//! (W. Hoeffding 1963, theorem 4). The form is that of Lindon and Malek (NeurIPS 2022, arXiv 2011.03567) with a discrete
//! mixture. The other direction is the same with `p_c ≥ φ_0 p_p` and `u ≤ 1`.
//!
//! What is asked of the caller: which requests are in which batch may depend on how many there were, never on how they
//! went.

use serde::{Deserialize, Serialize};

use crate::math::log_sum_exp;

/// Ratios above the tolerance, in multiples of it, and how the mixture is spread over them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Grid {
    multiples: [f64; WORSE],
    logs: [f64; WORSE],
    /// Weights without a tolerance, and with one. A ratio of weight `w` costs at most `ln 1/w` of the 4.6 that alpha = 1 %
    /// asks for, and less where neighbours share.
    strict: [f64; WORSE],
    tolerant: [f64; WORSE],
}

const WORSE: usize = 8;
const BETTER: usize = 5;
/// `ln E` from which on nobody asks how much higher it climbs: one in 10^21.
const SETTLED: f64 = 50.0;

/// Weights of the ratios below the tolerance: most on a canary that equals the primary, which is what is hoped for.
const BETTER_WEIGHTS: [f64; BETTER] = [0.15, 0.45, 0.2, 0.12, 0.08];

impl Grid {
    /// For rare events such as errors: half as many again up to a hundred times as many. Without a tolerance the weight is
    /// on the ratios that three errors of a canary with a tenth of the traffic and none of the primary decide; with one,
    /// small regressions need more of it, since they are nearer to what is tolerated.
    pub const ERRORS: Self = Self {
        multiples: [1.5, 2.0, 3.0, 5.0, 10.0, 20.0, 40.0, 100.0],
        logs: [
            0.405_465_108_108_164_4,
            std::f64::consts::LN_2,
            1.098_612_288_668_109_8,
            1.609_437_912_434_100_3,
            std::f64::consts::LN_10,
            2.995_732_273_553_991,
            3.688_879_454_113_936_3,
            4.605_170_185_988_092,
        ],
        strict: [0.05, 0.06, 0.06, 0.06, 0.08, 0.29, 0.24, 0.16],
        tolerant: [0.08, 0.09, 0.1, 0.08, 0.09, 0.2, 0.2, 0.16],
    };

    /// For shares of slow requests: finer, because such shares cannot grow as far.
    pub const SLOW: Self = Self {
        multiples: [1.15, 1.35, 1.65, 2.2, 3.3, 6.0, 12.0, 30.0],
        logs: [
            0.139_761_942_375_158_6,
            0.300_104_592_450_338_05,
            0.500_775_287_912_489_2,
            0.788_457_360_364_270_3,
            1.193_922_468_472_434_6,
            1.791_759_469_228_055,
            2.484_906_649_788_000_4,
            3.401_197_381_662_155_5,
        ],
        strict: [0.125; WORSE],
        tolerant: [0.125; WORSE],
    };

    const fn weights(&self, tolerance: f64) -> &[f64; WORSE] {
        if tolerance > 1.0 {
            &self.tolerant
        } else {
            &self.strict
        }
    }

    /// The ratios above the tolerance.
    pub fn worse(&self, tolerance: f64) -> impl Iterator<Item = f64> + '_ {
        self.multiples.iter().map(move |multiple| multiple * tolerance)
    }
}

/// The ratios at and below 1 that speak for the canary; the first lies between 1 and the tolerance.
fn better(tolerance: f64) -> [f64; BETTER] {
    [tolerance.sqrt(), 1.0, 0.5, 0.25, 0.05]
}

/// The logarithms of [`better`], from that of the tolerance.
fn better_logs(tolerance_log: f64) -> [f64; BETTER] {
    const LN_HALF: f64 = -std::f64::consts::LN_2;
    const LN_TWENTIETH: f64 = -2.995_732_273_553_991;
    [0.5 * tolerance_log, 0.0, LN_HALF, 2.0 * LN_HALF, LN_TWENTIETH]
}

/// Counts of both arms over the same interval.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Batch {
    /// Requests of the canary.
    pub canary: u64,
    /// Those of them that were bad.
    pub canary_bad: u64,
    /// Requests of the primary.
    pub primary: u64,
    /// Those of them that were bad.
    pub primary_bad: u64,
}

impl Batch {
    /// Whether both arms have requests: a batch with one arm alone says nothing about a ratio.
    pub const fn has_both(&self) -> bool {
        self.canary > 0 && self.primary > 0
    }

    /// Adds a later batch.
    pub fn add(&mut self, other: &Self) {
        self.canary = self.canary.saturating_add(other.canary);
        self.canary_bad = self.canary_bad.saturating_add(other.canary_bad);
        self.primary = self.primary.saturating_add(other.primary);
        self.primary_bad = self.primary_bad.saturating_add(other.primary_bad);
    }

    /// The canary's share of the requests.
    pub fn share(&self) -> f64 {
        self.canary as f64 / (self.canary as f64 + self.primary as f64)
    }
}

/// The evidence so far: a few numbers, safe to keep in a status and to continue from after a restart.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RatioTest {
    /// `ln L_k` of the ratios above the tolerance, since the run began.
    worse: [f64; WORSE],
    /// `ln L_k` of those below, since the run began.
    better: [f64; BETTER],
    /// What that was when the step began: each step must show anew that it does no harm.
    better_before: [f64; BETTER],
    /// The highest `ln E` ever reached against the canary, followed up to [`SETTLED`]: that verdict does not come back.
    peak: f64,
    /// The highest reached for it in this step.
    peak_better: f64,
    /// Counts of the run, for explanations.
    totals: Batch,
}

impl RatioTest {
    /// Takes in one batch. O(1). A batch without one of the arms counts for the totals only.
    pub fn observe(&mut self, batch: &Batch, tolerance: f64, grid: &Grid) {
        let batch = Batch {
            canary_bad: batch.canary_bad.min(batch.canary),
            primary_bad: batch.primary_bad.min(batch.primary),
            ..*batch
        };
        self.totals.add(&batch);
        let canary_bad = batch.canary_bad as f64;
        let bad = canary_bad + batch.primary_bad as f64;
        if bad == 0.0 || !batch.has_both() {
            return;
        }
        let tolerance = tolerance.max(1.0);
        let share = batch.share();
        let rest = 1.0 - share;
        let base = share * tolerance + rest;
        let (scale, shift) = (share * tolerance / base, rest / base);
        let mut highest = f64::NEG_INFINITY;
        for ((log, multiple), step) in self.worse.iter_mut().zip(grid.multiples).zip(grid.logs) {
            *log += canary_bad * step - bad * (scale * multiple + shift).ln();
            highest = highest.max(*log);
        }
        // A mixture never exceeds its largest component: most of the time there is nothing to add up.
        if highest > self.peak && self.peak < SETTLED {
            self.peak = self.peak.max(self.log_evidence(tolerance, grid));
        }
        let (base_log, tolerance_log) = (base.ln(), tolerance.ln());
        let mut highest = f64::NEG_INFINITY;
        let ratios = better(tolerance).into_iter().zip(better_logs(tolerance_log));
        for ((log, before), (ratio, ratio_log)) in self.better.iter_mut().zip(self.better_before).zip(ratios)
        {
            // The canary's equal to the primary: the mean factor is that of the base alone.
            let mean = if ratio == 1.0 {
                0.0
            } else {
                (share * ratio + rest).ln()
            };
            *log += canary_bad * (ratio_log - tolerance_log) - bad * (mean - base_log);
            highest = highest.max(*log - before);
        }
        if highest > self.peak_better && self.peak_better < SETTLED {
            self.peak_better = self.peak_better.max(self.log_evidence_for());
        }
    }

    /// A new step begins: that it is within the tolerance must be shown again. What speaks against the canary stays.
    pub fn begin_step(&mut self) {
        self.better_before = self.better;
        self.peak_better = 0.0;
    }

    /// `ln E` against the canary now; 0 at the start.
    pub fn log_evidence(&self, tolerance: f64, grid: &Grid) -> f64 {
        log_sum_exp(grid.weights(tolerance).iter().copied().zip(self.worse))
    }

    /// What [`RatioTest::log_evidence`] does not exceed: a mixture is at most its largest component.
    pub fn log_ceiling(&self) -> f64 {
        self.worse.iter().copied().fold(f64::NEG_INFINITY, f64::max)
    }

    /// The highest `ln E` against the canary so far.
    pub const fn log_peak(&self) -> f64 {
        self.peak
    }

    /// `ln E` for the canary in this step.
    pub fn log_evidence_for(&self) -> f64 {
        let step = self.better.iter().zip(self.better_before);
        log_sum_exp(
            BETTER_WEIGHTS
                .into_iter()
                .zip(step.map(|(log, before)| log - before)),
        )
    }

    /// The highest `ln E` for the canary in this step.
    pub const fn log_peak_for(&self) -> f64 {
        self.peak_better
    }

    /// Counts of the run.
    pub const fn totals(&self) -> &Batch {
        &self.totals
    }

    /// A confidence sequence for the ratio of the run: it holds the true ratio, if that is constant, at all times together
    /// with probability at least `1 − alpha`. Its ends are points of the grid, rounded outwards: from 0, up to infinity.
    pub fn interval(&self, tolerance: f64, alpha: f64, grid: &Grid) -> [f64; 2] {
        let tolerance = tolerance.max(1.0);
        // The likelihood at every point of the grid relative to the tolerance, ascending; half of the mixture on each
        // side.
        let below = better(tolerance).into_iter().zip(self.better).rev();
        let above = grid.worse(tolerance).zip(self.worse);
        let points: Vec<(f64, f64)> = below.chain([(tolerance, 0.0)]).chain(above).collect();
        let run = log_sum_exp(BETTER_WEIGHTS.into_iter().zip(self.better));
        let worse = self.log_evidence(tolerance, grid);
        let log_mixture = log_sum_exp([(0.5, worse), (0.5, run)].into_iter());
        let inside = |log: &f64| log_mixture - log < (1.0 / alpha).ln();
        let first = points.iter().position(|(_, log)| inside(log));
        let last = points.iter().rposition(|(_, log)| inside(log));
        let (Some(first), Some(last)) = (first, last) else {
            return [0.0, f64::INFINITY];
        };
        let low = first.checked_sub(1).map_or(0.0, |index| points[index].0);
        let high = points.get(last + 1).map_or(f64::INFINITY, |point| point.0);
        [low, high]
    }
}

/// The growth of the evidence per canary request, in nats, of the best component: against the canary when its true ratio
/// is `ratio` and above the tolerance, for it when it is below. `rate` is the primary's rate of bad events, `share` the
/// canary's share of the requests.
pub(crate) fn growth(rate: f64, share: f64, ratio: f64, tolerance: f64, grid: &Grid) -> f64 {
    let tolerance = tolerance.max(1.0);
    let canary_rate = (rate * ratio).min(1.0);
    let per_request = |candidate: f64| {
        let bad = canary_rate + rate * (1.0 - share) / share;
        canary_rate * (candidate / tolerance).ln()
            - bad * ((share * candidate + 1.0 - share) / (share * tolerance + 1.0 - share)).ln()
    };
    if ratio > tolerance {
        grid.worse(tolerance).map(per_request).fold(0.0, f64::max)
    } else {
        better(tolerance).into_iter().map(per_request).fold(0.0, f64::max)
    }
}

/// What the spread of the mixture costs, in nats: neighbours on the grid share the load, so less than the logarithm of
/// its size. Calibrated on simulated medians.
pub(crate) const MIXTURE_COST: f64 = 1.0;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::random::Random;

    fn batch(canary: (u64, u64), primary: (u64, u64)) -> Batch {
        Batch {
            canary: canary.0,
            canary_bad: canary.1,
            primary: primary.0,
            primary_bad: primary.1,
        }
    }

    fn observed(batches: &[Batch], tolerance: f64) -> RatioTest {
        let mut test = RatioTest::default();
        for batch in batches {
            test.observe(batch, tolerance, &Grid::ERRORS);
        }
        test
    }

    fn against(test: &RatioTest, tolerance: f64) -> f64 {
        test.log_evidence(tolerance, &Grid::ERRORS)
    }

    #[test]
    fn the_grids_logarithms_are_those_of_its_ratios_and_its_weights_add_up() {
        for grid in [Grid::ERRORS, Grid::SLOW] {
            for (ratio, log) in grid.multiples.iter().zip(grid.logs) {
                assert!((ratio.ln() - log).abs() < 1e-14, "{ratio}");
            }
            for weights in [grid.strict, grid.tolerant] {
                assert!((weights.iter().sum::<f64>() - 1.0).abs() < 1e-12, "{weights:?}");
            }
        }
        assert!((BETTER_WEIGHTS.iter().sum::<f64>() - 1.0).abs() < 1e-12);
    }

    #[test]
    fn one_batch_gives_the_evidence_of_the_formula() {
        // rho = 0.1, x_c = 3, m = 4, phi_0 = 1: E = Σ w phi^3 / (0.1 phi + 0.9)^4.
        let test = observed(&[batch((10, 3), (90, 1))], 1.0);
        let expected: f64 = Grid::ERRORS
            .worse(1.0)
            .zip(Grid::ERRORS.strict)
            .map(|(phi, weight)| weight * phi.powi(3) / (0.1 * phi + 0.9).powi(4))
            .sum();
        assert!((against(&test, 1.0).exp() - expected).abs() < 1e-9 * expected);
    }

    /// The exact expectation over all outcomes of one batch, which must not exceed 1 for any rates within the tolerance.
    #[test]
    fn the_expected_factor_of_a_batch_is_at_most_one_up_to_the_tolerance() {
        fn binomial(n: u64, p: f64) -> Vec<f64> {
            let mut mass = vec![1.0];
            for _ in 0..n {
                let mut next = vec![0.0; mass.len() + 1];
                for (k, weight) in mass.iter().enumerate() {
                    next[k] += weight * (1.0 - p);
                    next[k + 1] += weight * p;
                }
                mass = next;
            }
            mass
        }
        for tolerance in [1.0, 1.5, 3.0] {
            for primary_rate in [0.001, 0.05, 0.3] {
                for (n_c, n_p) in [(1, 30), (5, 20), (12, 4)] {
                    let (mut worse, mut in_favour) = (0.0, 0.0);
                    let canary = binomial(n_c, primary_rate * tolerance);
                    let primary = binomial(n_p, primary_rate);
                    for (x_c, canary) in canary.iter().enumerate() {
                        for (x_p, primary) in primary.iter().enumerate() {
                            let one = batch((n_c, x_c as u64), (n_p, x_p as u64));
                            let test = observed(&[one], tolerance);
                            worse += canary * primary * against(&test, tolerance).exp();
                            in_favour += canary * primary * test.log_evidence_for().exp();
                        }
                    }
                    let case = format!("{tolerance} {primary_rate} {n_c} {n_p}: {worse} {in_favour}");
                    assert!(worse <= 1.0 + 1e-9 && in_favour <= 1.0 + 1e-9, "{case}");
                    assert!(
                        worse > 0.5 || primary_rate > 0.1,
                        "and it is not wasteful: {case}"
                    );
                }
            }
        }
    }

    fn false_alarms(tolerance: f64, ratio: f64, alpha: f64, runs: usize, random: &mut Random) -> usize {
        (0..runs)
            .filter(|_| {
                let mut test = RatioTest::default();
                (0..300).any(|second| {
                    // The weight climbs, and at times everything fails more often, for both.
                    let canary = 10 + 20 * (second / 60);
                    let rate = if (100..130).contains(&second) { 0.08 } else { 0.01 };
                    let one = batch(
                        (canary, random.binomial(canary, rate * ratio)),
                        (100, random.binomial(100, rate)),
                    );
                    test.observe(&one, tolerance, &Grid::ERRORS);
                    test.log_peak() >= (1.0 / alpha).ln()
                })
            })
            .count()
    }

    #[test]
    fn healthy_releases_looked_at_every_second_are_called_bad_less_often_than_alpha() {
        let mut random = Random::new(42);
        // 5 % of 1,000 are 50; three standard deviations above that are 71.
        let alarms = false_alarms(1.0, 1.0, 0.05, 1000, &mut random);
        assert!(alarms <= 71, "{alarms} false alarms");
        // At the tolerance itself, the worst case that is still healthy.
        let alarms = false_alarms(1.5, 1.5, 0.05, 1000, &mut random);
        assert!(alarms <= 71, "{alarms} false alarms at the tolerance");
    }

    #[test]
    fn a_canary_at_twice_its_tolerance_is_called_good_less_often_than_alpha() {
        let mut random = Random::new(43);
        let runs = 1000;
        let wrong = (0..runs)
            .filter(|_| {
                let mut test = RatioTest::default();
                (0..300).any(|_| {
                    let one = batch(
                        (20, random.binomial(20, 0.015)),
                        (100, random.binomial(100, 0.01)),
                    );
                    test.observe(&one, 1.5, &Grid::ERRORS);
                    test.log_peak_for() >= 20f64.ln()
                })
            })
            .count();
        assert!(wrong <= 71, "{wrong} of {runs}");
    }

    /// Counts with Poisson-like spread that need no random numbers: what is expected, batch for batch.
    #[test]
    fn good_is_established_within_one_and_a_half_times_the_information_bound() {
        let (rate, share, tolerance, alpha) = (0.002_f64, 0.1, 1.5_f64, 0.01_f64);
        let mut random = Random::new(44);
        let per_request = growth(rate, share, 1.0, tolerance, &Grid::ERRORS);
        let bound = (1.0 / alpha).ln() / per_request;
        let mut needed: Vec<f64> = (0..60)
            .map(|_| {
                let mut test = RatioTest::default();
                while test.log_peak_for() < (1.0 / alpha).ln() {
                    let one = batch(
                        (1000, random.binomial(1000, rate)),
                        (9000, random.binomial(9000, rate)),
                    );
                    test.observe(&one, tolerance, &Grid::ERRORS);
                }
                test.totals().canary as f64
            })
            .collect();
        needed.sort_by(f64::total_cmp);
        let mean = needed.iter().sum::<f64>() / needed.len() as f64;
        assert!(
            mean <= 1.5 * bound,
            "{mean} requests on average, the bound is {bound}"
        );
    }

    #[test]
    fn the_interval_of_the_ratio_holds_the_true_one_and_narrows() {
        let mut random = Random::new(45);
        let mut test = RatioTest::default();
        let width = |[low, high]: [f64; 2]| high - low;
        let mut before = f64::INFINITY;
        for step in 1..=400 {
            let one = batch(
                (100, random.binomial(100, 0.05)),
                (900, random.binomial(900, 0.01)),
            );
            test.observe(&one, 1.5, &Grid::ERRORS);
            let [low, high] = test.interval(1.5, 0.01, &Grid::ERRORS);
            assert!(low <= 5.0 && 5.0 <= high, "[{low}, {high}] after {step}");
            if step % 100 == 0 {
                let now = width([low, high]);
                assert!(now <= before, "{now} after {before}");
                before = now;
            }
        }
        assert!(before < 10.0, "{before}");
    }

    #[test]
    fn the_state_fits_a_few_hundred_bytes_of_status() {
        let mut random = Random::new(46);
        let mut test = RatioTest::default();
        for _ in 0..10_000 {
            let one = batch(
                (100, random.binomial(100, 0.02)),
                (900, random.binomial(900, 0.01)),
            );
            test.observe(&one, 1.5, &Grid::ERRORS);
        }
        let text = serde_json::to_string(&test).unwrap();
        assert!(text.len() < 600, "{} bytes: {text}", text.len());
    }

    fn batches() -> impl Strategy<Value = Vec<Batch>> {
        prop::collection::vec(
            ((0u64..50, 0u64..6), (0u64..500, 0u64..6)).prop_map(|(canary, primary)| batch(canary, primary)),
            1..40,
        )
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn the_order_of_batches_does_not_change_the_evidence(batches in batches(), turn in 0usize..40) {
            let mut turned = batches.clone();
            turned.rotate_left(turn % batches.len());
            let (one, other) = (observed(&batches, 1.5), observed(&turned, 1.5));
            prop_assert!((against(&one, 1.5) - against(&other, 1.5)).abs() < 1e-9);
            prop_assert!((one.log_evidence_for() - other.log_evidence_for()).abs() < 1e-9);
        }

        #[test]
        fn splitting_a_batch_with_its_share_does_not_change_the_evidence(
            canary in 1u64..50, primary in 1u64..500, parts in 2u64..9,
            bad in prop::collection::vec((0u64..3, 0u64..3), 9),
        ) {
            let mut whole = Batch::default();
            let mut split = RatioTest::default();
            for (canary_bad, primary_bad) in bad.into_iter().take(parts as usize) {
                let part = batch((canary, canary_bad.min(canary)), (primary, primary_bad.min(primary)));
                whole.add(&part);
                split.observe(&part, 1.5, &Grid::ERRORS);
            }
            let whole = observed(&[whole], 1.5);
            prop_assert!((against(&whole, 1.5) - against(&split, 1.5)).abs() < 1e-8);
            prop_assert!((whole.log_evidence_for() - split.log_evidence_for()).abs() < 1e-8);
            prop_assert_eq!(whole.totals(), split.totals());
        }

        #[test]
        fn the_evidence_survives_a_restart_in_the_middle(batches in batches(), restart_at in 0usize..40) {
            let mut restarted = RatioTest::default();
            for (index, batch) in batches.iter().enumerate() {
                if index == restart_at {
                    let stored = serde_json::to_string(&restarted).unwrap();
                    restarted = serde_json::from_str(&stored).unwrap();
                }
                restarted.observe(batch, 1.5, &Grid::ERRORS);
            }
            let straight = observed(&batches, 1.5);
            prop_assert!((against(&straight, 1.5) - against(&restarted, 1.5)).abs() < 1e-9);
            prop_assert!((straight.log_peak() - restarted.log_peak()).abs() < 1e-9);
        }

        #[test]
        fn counts_up_to_a_trillion_give_finite_evidence(
            canary in 1u64..1_000_000_000_000, primary in 1u64..1_000_000_000_000,
            canary_share in 0.0f64..1.0, primary_share in 0.0f64..1.0, repeats in 1usize..20,
        ) {
            let bad = |n: u64, share: f64| (n as f64 * share) as u64;
            let one = batch((canary, bad(canary, canary_share)), (primary, bad(primary, primary_share)));
            let test = observed(&vec![one; repeats], 1.5);
            prop_assert!(against(&test, 1.5).is_finite() && test.log_evidence_for().is_finite());
            prop_assert!(test.log_peak() >= 0.0 && test.log_peak_for() >= 0.0);
            let [low, high] = test.interval(1.5, 0.01, &Grid::ERRORS);
            prop_assert!(low >= 0.0 && high > low);
        }

        #[test]
        fn more_canary_errors_never_weaken_the_evidence(errors in 0u64..20, others in 0u64..20) {
            let fewer = observed(&[batch((20, errors.min(19)), (180, others))], 1.5);
            let more = observed(&[batch((20, errors.min(19) + 1), (180, others))], 1.5);
            prop_assert!(against(&more, 1.5) >= against(&fewer, 1.5));
            prop_assert!(more.log_evidence_for() <= fewer.log_evidence_for());
        }

        #[test]
        fn a_verdict_once_reached_stays(batches in batches()) {
            let mut test = RatioTest::default();
            let mut peak = 0.0;
            for batch in &batches {
                test.observe(batch, 1.5, &Grid::ERRORS);
                let now = against(&test, 1.5).min(SETTLED);
                prop_assert!(test.log_peak() >= peak && test.log_peak() >= now - 1e-12);
                peak = test.log_peak();
            }
        }
    }
}
