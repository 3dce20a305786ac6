//! Whole latency distributions: is the canary slower anywhere, from the median to the last bucket?
//!
//! A sequential rank test on histograms. Before each batch the primary's running distribution gives every bucket its
//! place; each alternative says how much more often a slower canary would fall into each bucket, by two families: the
//! odds of being slower than any duration are `κ` times as high (what Wilcoxon's test looks for), or the hazard is `κ`
//! times lower (a longer tail, what Savage's test looks for). For bucket `j` the alternative has a factor `f_j` per
//! canary request, rising with the duration, and `g_j` per primary request; the evidence of an alternative is the product
//! over both arms' requests, and `E` is the mean of the alternatives.
//!
//! **Why this holds.** With equal distributions, `E[Π] = (Σ p_j f_j)^{n_c} (Σ p_j g_j)^{n_p} ≤ exp Σ_j p_j (n_c (f_j − 1) +
//! n_p (g_j − 1))`, and `g_j` is chosen so that every term of the sum is at most 0, whatever the `p_j` are: the running
//! estimate may be wrong, and the common distribution may drift or jump. So `E` is a nonnegative supermartingale, and by
//! Ville's inequality the verdict is wrong with probability at most alpha at all times together. A faster canary (by
//! stochastic order) only lowers it, because `f_j` rises.
//!
//! The tolerance is one of odds, as in [`super::quantile`]: a canary for which all odds of being slower are up to `t` times
//! as high is tolerated; at exactly that boundary the bound is approximate, by the error of the running estimate.
//!
//! Compared with the time-uniform bands of Howard and Ramdas (Bernoulli 28(3), 2022), which hold for fixed distributions,
//! it needs no stationarity; its cost is a logarithm per bucket and alternative.

use serde::{Deserialize, Serialize};

use super::running::{BUCKETS_MAX, Durations, Survival};
use crate::math::log_sum_exp;
use crate::text;
use crate::verdict::{Evidence, Missing, Verdict};

/// What the comparison promises.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Options {
    /// Highest probability with which a canary that is nowhere slower is ever called bad.
    pub alpha: f64,
    /// Ratio of the odds of being slow that is still tolerated, at least 1.
    pub tolerance: f64,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            alpha: 0.01,
            tolerance: 1.5,
        }
    }
}

/// Ways to be slower: so many of [`ODDS`], then so many of [`HAZARDS`].
const ALTERNATIVES: usize = ODDS.len() + HAZARDS.len();
/// The odds of exceeding any duration are this many times as high.
const ODDS: [f64; 4] = [1.25, 1.6, 2.5, 6.0];
/// Survival is raised to one over this power: a longer tail.
const HAZARDS: [f64; 4] = [1.15, 1.4, 2.0, 4.0];

/// Primary requests that must be known before the first batch is judged.
const KNOWN_MIN: f64 = 50.0;

/// The evidence so far.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Distribution {
    slower: [f64; ALTERNATIVES],
    peak: f64,
    /// Evidence that the canary equals the primary rather than lies at its tolerance, of this step.
    equal: f64,
    peak_equal: f64,
    canary: u64,
    primary: u64,
    /// Mean place of a request in the primary's distribution (0.5 is like the primary), summed per arm.
    places: f64,
}

fn odds(survival: f64, times: f64) -> f64 {
    times * survival / (times * survival + 1.0 - survival)
}

/// The primary's distribution as the alternatives need it: everything that does not depend on the batch's counts.
struct Shape {
    buckets: usize,
    /// Per bucket, one over the share of the primary's requests in it; an empty bucket is a sliver.
    inverse: [f64; BUCKETS_MAX],
    /// Survival at the lower edge of each bucket under the tolerated odds, and the density in it relative to the primary's.
    tolerated_survival: [f64; BUCKETS_MAX],
    tolerated: [f64; BUCKETS_MAX],
    survival: [f64; BUCKETS_MAX],
}

/// Calls `each(bucket, density)` from the last bucket to the first, for a distribution with this survival at lower edges.
fn densities(shape: &Shape, survival_at: impl Fn(usize) -> f64, mut each: impl FnMut(usize, f64)) {
    let mut below = 0.0;
    for bucket in (0..shape.buckets).rev() {
        let survival = survival_at(bucket);
        each(bucket, (survival - below) * shape.inverse[bucket]);
        below = survival;
    }
}

impl Shape {
    fn of(known: &Survival, tolerance: f64) -> Self {
        let mut shape = Self {
            buckets: known.shares().len(),
            inverse: [0.0; BUCKETS_MAX],
            tolerated_survival: [0.0; BUCKETS_MAX],
            tolerated: [0.0; BUCKETS_MAX],
            survival: [0.0; BUCKETS_MAX],
        };
        let mut upper = f64::INFINITY;
        for (bucket, share) in known.shares().iter().enumerate() {
            let survival = share.min(upper - 1e-9 * upper);
            if let Some(above) = bucket.checked_sub(1) {
                shape.inverse[above] = 1.0 / (upper - survival);
            }
            shape.survival[bucket] = survival;
            shape.tolerated_survival[bucket] = odds(survival, tolerance);
            upper = survival;
        }
        if let Some(last) = shape.buckets.checked_sub(1) {
            shape.inverse[last] = 1.0 / upper;
        }
        let mut tolerated = [0.0; BUCKETS_MAX];
        densities(
            &shape,
            |bucket| shape.tolerated_survival[bucket],
            |bucket, density| tolerated[bucket] = density,
        );
        shape.tolerated = tolerated;
        shape
    }
}

/// Both arms' factors per bucket for one alternative, from the last bucket to the first: `each(bucket, canary, primary)`.
fn factors(
    shape: &Shape,
    share: f64,
    survival_at: impl Fn(usize) -> f64,
    mut each: impl FnMut(usize, f64, f64),
) {
    let rest = 1.0 - share;
    let mut least = f64::INFINITY;
    densities(shape, survival_at, |bucket, density| {
        let tolerated = shape.tolerated[bucket];
        let factor = density * (share * tolerated + rest) / (tolerated * (share * density + rest));
        let most = 1.0 + 0.9 * rest / (share * tolerated.max(1.0));
        // Rising with the duration: otherwise a faster canary could look slower.
        least = least.min(factor).min(most);
        let weight = if least > 1.0 {
            tolerated.max(1.0)
        } else {
            tolerated.min(1.0)
        };
        each(bucket, least, 1.0 - share / rest * weight * (least - 1.0));
    });
}

impl Distribution {
    /// Takes in one interval of both arms. O(buckets).
    pub fn observe(&mut self, durations: &Durations<'_>, options: &Options) {
        let (canary_total, primary_total) = (durations.canary_total, durations.primary_total);
        let Some(known) = durations.known.as_ref() else {
            return;
        };
        if canary_total == 0 || primary_total == 0 || known.total() < KNOWN_MIN {
            return;
        }
        self.canary = self.canary.saturating_add(canary_total);
        self.primary = self.primary.saturating_add(primary_total);
        let share = canary_total as f64 / (canary_total as f64 + primary_total as f64);
        let tolerance = options.tolerance.max(1.0);
        let shape = Shape::of(known, tolerance);
        let (ours, theirs) = (&durations.canary.counts, &durations.primary.counts);
        let evidence = |survival_at: &dyn Fn(usize) -> f64| {
            let mut log = 0.0;
            factors(&shape, share, survival_at, |bucket, canary, primary| {
                if ours[bucket] > 0 {
                    log += ours[bucket] as f64 * canary.ln();
                }
                if theirs[bucket] > 0 {
                    log += theirs[bucket] as f64 * primary.ln();
                }
            });
            log
        };
        for (log, times) in self.slower.iter_mut().zip(ODDS) {
            let times = tolerance * times;
            *log += evidence(&|bucket| odds(shape.survival[bucket], times));
        }
        // One logarithm per bucket serves all powers.
        let mut logs = [0.0; BUCKETS_MAX];
        for (log, survival) in logs.iter_mut().zip(&shape.tolerated_survival[..shape.buckets]) {
            *log = survival.ln();
        }
        for (log, times) in self.slower[ODDS.len()..].iter_mut().zip(HAZARDS) {
            let power = 1.0 / times;
            *log += evidence(&|bucket| (logs[bucket] * power).exp());
        }
        if self.log_ceiling() > self.peak {
            self.peak = self.peak.max(self.log_evidence());
        }
        let rest = 1.0 - share;
        for (bucket, (&ours, &theirs)) in ours.iter().zip(theirs).enumerate() {
            if tolerance > 1.0 && ours + theirs > 0 {
                let tolerated = shape.tolerated[bucket];
                let mixed = (share * tolerated + rest).ln();
                self.equal += (ours as f64 + theirs as f64) * mixed;
                if ours > 0 {
                    self.equal -= ours as f64 * tolerated.ln();
                }
            }
            if ours > 0 {
                let upper = shape.survival[bucket];
                let lower = if bucket + 1 < shape.buckets {
                    shape.survival[bucket + 1]
                } else {
                    0.0
                };
                self.places += ours as f64 * (1.0 - 0.5 * (upper + lower));
            }
        }
        self.peak_equal = self.peak_equal.max(self.equal);
    }

    /// A new step begins: what speaks for the canary starts anew.
    pub fn begin_step(&mut self) {
        self.equal = 0.0;
        self.peak_equal = 0.0;
    }

    /// `ln E` against the canary now; 0 at the start.
    pub fn log_evidence(&self) -> f64 {
        log_sum_exp(self.slower.iter().map(|log| (1.0 / ALTERNATIVES as f64, *log)))
    }

    /// What [`Distribution::log_evidence`] does not exceed.
    pub fn log_ceiling(&self) -> f64 {
        self.slower.iter().copied().fold(f64::NEG_INFINITY, f64::max)
    }

    /// The highest `ln E` against the canary so far.
    pub const fn log_peak(&self) -> f64 {
        self.peak
    }

    /// The verdict so far. `Bad` is final.
    pub fn verdict(&self, options: &Options) -> Verdict {
        if self.canary == 0 {
            return Verdict::NoData {
                explanation: "no durations of both canary and primary yet".to_owned(),
            };
        }
        let faster = 100.0 * self.places / self.canary as f64;
        let facts = format!(
            "a canary request is on average slower than {} % of the primary's ({} against {} requests)",
            text::short(faster),
            text::count(self.canary),
            text::count(self.primary),
        );
        let bound = 1.0 / options.alpha;
        let evidence = |log: f64, explanation: String| Evidence {
            value: log.min(700.0).exp(),
            bound,
            samples: self.canary,
            alpha: Some(options.alpha),
            explanation,
        };
        if self.peak >= bound.ln() {
            return Verdict::Bad(evidence(
                self.peak,
                format!("{facts}; {}", text::promise(options.alpha)),
            ));
        }
        if self.peak_equal >= bound.ln() {
            return Verdict::Good(evidence(
                self.peak_equal,
                format!(
                    "{facts}; shown to be within {} times the primary's odds of being slow",
                    text::short(options.tolerance)
                ),
            ));
        }
        Verdict::Undecided {
            evidence: evidence(self.log_evidence(), format!("{facts}; undecided")),
            missing: Missing {
                what: "more durations of both".to_owned(),
                seconds: None,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::quantile::tests::{histogram, log_normal};
    use super::super::running::Running;
    use super::*;
    use crate::random::Random;
    use crate::sample::Sample;

    struct World {
        random: Random,
        running: Running,
        judge: Distribution,
        options: Options,
    }

    impl World {
        fn new(seed: u64, options: Options) -> Self {
            Self {
                random: Random::new(seed),
                running: Running::default(),
                judge: Distribution::default(),
                options,
            }
        }

        fn second(
            &mut self,
            requests: (u64, u64),
            canary: impl Fn(&mut Random) -> f64,
            primary: impl Fn(&mut Random) -> f64,
        ) -> Verdict {
            let sample = Sample {
                canary: histogram(&mut self.random, requests.0, canary),
                primary: histogram(&mut self.random, requests.1, primary),
                ..Sample::default()
            };
            self.judge
                .observe(&Durations::of(&sample, &self.running), &self.options);
            self.running.remember(&sample.primary.latency);
            self.judge.verdict(&self.options)
        }
    }

    #[test]
    fn equal_distributions_that_jump_are_called_bad_less_often_than_alpha() {
        for tolerance in [1.0, 1.5] {
            let options = Options {
                alpha: 0.05,
                tolerance,
            };
            let runs = 300;
            let mut alarms = 0;
            for seed in 0..runs {
                let mut world = World::new(seed, options);
                for second in 0..40 {
                    let factor = if (15..25).contains(&second) { 8.0 } else { 1.0 };
                    world.second((20, 60), log_normal(1.0, factor), log_normal(1.0, factor));
                }
                alarms += u64::from(world.judge.verdict(&options).is_bad());
            }
            assert!(alarms <= 26, "{alarms} of {runs} at tolerance {tolerance}");
        }
    }

    #[test]
    fn a_faster_canary_is_never_held_to_be_slower() {
        let mut world = World::new(
            1,
            Options {
                alpha: 0.01,
                tolerance: 1.0,
            },
        );
        for _ in 0..100 {
            assert!(
                !world
                    .second((50, 450), log_normal(0.7, 0.6), log_normal(0.7, 1.0))
                    .is_bad()
            );
        }
        assert!(world.judge.log_evidence() < 0.0);
    }

    #[test]
    fn a_slower_middle_and_a_longer_tail_are_both_found() {
        for (name, slow) in [("middle", 1.0), ("tail", 0.0)] {
            let mut world = World::new(3, Options::default());
            let mut second = 0;
            let mut verdict;
            loop {
                verdict = world.second(
                    (50, 450),
                    move |random| {
                        let draw = log_normal(0.6, 1.0)(random);
                        // Everything twice as slow, or one request in twelve ten times as slow.
                        if slow > 0.0 || random.unit() < 0.08 {
                            draw * if slow > 0.0 { 2.0 } else { 10.0 }
                        } else {
                            draw
                        }
                    },
                    log_normal(0.6, 1.0),
                );
                second += 1;
                if verdict.is_bad() || second == 120 {
                    break;
                }
            }
            assert!(
                verdict.is_bad() && second <= 60,
                "{name}: {second} s, {}",
                verdict.explanation()
            );
        }
    }

    #[test]
    fn an_equal_canary_is_shown_to_be_good() {
        let mut world = World::new(4, Options::default());
        let found = (0..200).find(|_| {
            world
                .second((50, 450), log_normal(0.6, 1.0), log_normal(0.6, 1.0))
                .is_good()
        });
        assert!(found.is_some_and(|second| second < 60), "{found:?}");
    }

    #[test]
    fn a_canary_far_beyond_the_tolerance_is_called_good_less_often_than_alpha() {
        let options = Options {
            alpha: 0.05,
            tolerance: 1.2,
        };
        let wrong = (0..200)
            .filter(|seed| {
                let mut world = World::new(*seed, options);
                (0..40).any(|_| {
                    world
                        .second((20, 60), log_normal(1.0, 1.35), log_normal(1.0, 1.0))
                        .is_good()
                })
            })
            .count();
        assert!(wrong <= 19, "{wrong} of 200");
    }

    /// 800, 0, 360 and so on of 2,000 requests in seven buckets.
    fn known() -> Survival {
        let mut running = Running::default();
        running.remember(&crate::Histogram {
            bounds_ms: (1..7).map(f64::from).collect(),
            counts: vec![200, 0, 800, 600, 380, 19, 1],
        });
        running.survival()
    }

    fn each_alternative(shape: &Shape, tolerance: f64, mut each: impl FnMut(&dyn Fn(usize) -> f64, String)) {
        for times in ODDS {
            each(
                &|bucket| odds(shape.survival[bucket], tolerance * times),
                format!("odds {times}"),
            );
        }
        for times in HAZARDS {
            let survival = |bucket: usize| shape.tolerated_survival[bucket].powf(1.0 / times);
            each(&survival, format!("hazard {times}"));
        }
    }

    #[test]
    fn factors_rise_with_the_duration_and_stay_positive() {
        for share in [0.01, 0.1, 0.5, 0.9, 0.99] {
            for tolerance in [1.0, 1.5, 3.0] {
                let shape = Shape::of(&known(), tolerance);
                each_alternative(&shape, tolerance, |survival, name| {
                    let mut before = f64::INFINITY;
                    factors(&shape, share, survival, |bucket, canary, primary| {
                        let case = format!("{share} {tolerance} {name} {bucket}: {canary} {primary}");
                        assert!(canary <= before && canary > 0.0 && primary > 0.0, "{case}");
                        before = canary;
                    });
                });
            }
        }
    }

    /// The exact expectation of a batch of one request per arm is at most 1 for any common distribution, the running
    /// estimate being right or wrong.
    #[test]
    fn the_expected_factor_is_at_most_one_whatever_the_common_distribution_is() {
        let mut random = Random::new(12);
        for tolerance in [1.0, 1.5] {
            let shape = Shape::of(&known(), tolerance);
            for _ in 0..50 {
                let mut common: Vec<f64> = (0..7).map(|_| -(1.0 - random.unit()).ln()).collect();
                let sum: f64 = common.iter().sum();
                common.iter_mut().for_each(|share| *share /= sum);
                each_alternative(&shape, tolerance, |survival, name| {
                    let (mut canary_mean, mut primary_mean) = (0.0, 0.0);
                    // A fifth of the requests are the canary's: four of the primary's for each of its own.
                    factors(&shape, 0.2, survival, |bucket, canary, primary| {
                        canary_mean += common[bucket] * canary;
                        primary_mean += common[bucket] * primary;
                    });
                    let mean = canary_mean * primary_mean.powi(4);
                    assert!(mean <= 1.0 + 1e-9, "{name} at {tolerance}: {mean}");
                });
            }
        }
    }

    #[test]
    fn a_trillion_requests_give_finite_evidence_and_the_state_survives_a_restart() {
        let mut judge = Distribution::default();
        let mut running = Running::default();
        let counts = |factor: u64| crate::Counts {
            requests: 10 * factor,
            latency: crate::Histogram {
                bounds_ms: vec![1.0, 10.0, 100.0],
                counts: vec![factor, 5 * factor, 3 * factor, factor],
            },
            ..crate::Counts::default()
        };
        let sample = Sample {
            at_ms: 0,
            canary: counts(100_000_000_000),
            primary: counts(90_000_000_000),
        };
        running.remember(&sample.primary.latency);
        judge.observe(&Durations::of(&sample, &running), &Options::default());
        assert!(judge.log_evidence().is_finite());
        let text = serde_json::to_string(&judge).unwrap();
        assert!(text.len() < 500, "{}", text.len());
        let read: Distribution = serde_json::from_str(&text).unwrap();
        assert!((read.log_evidence() / judge.log_evidence() - 1.0).abs() < 1e-9);
    }
}
