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

/// Ways to be slower: so many of [`ODDS`], then so many of [`HAZARD_POWERS`].
const ALTERNATIVES: usize = ODDS.len() + HAZARD_POWERS.len();
/// The odds of exceeding any duration are this many times as high.
const ODDS: [f64; 4] = [1.25, 1.6, 2.5, 6.0];
/// Survival is raised to these powers, one over 1.15, 1.4, 2 and 4: a longer tail.
const HAZARD_POWERS: [f64; 4] = [1.0 / 1.15, 1.0 / 1.4, 0.5, 0.25];

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

/// The primary's distribution as the alternatives need it: everything that does not depend on the batch's counts. Buckets
/// below the first and beyond the last that the primary was ever seen in are taken together, which only the past decides.
struct Shape {
    first: usize,
    buckets: usize,
    /// Survival at the lower edge of each bucket, strictly falling: an empty bucket is a sliver.
    survival: [f64; BUCKETS_MAX],
    /// One over the share of the primary's requests in each bucket.
    inverse: [f64; BUCKETS_MAX],
    /// Survival under the tolerated odds, and the density relative to the primary's.
    tolerated_survival: [f64; BUCKETS_MAX],
    tolerated: [f64; BUCKETS_MAX],
}

impl Shape {
    fn of(known: &Survival, tolerance: f64) -> Self {
        let (first, last) = known.support();
        let end = (last + 2).min(known.shares().len());
        let mut shape = Self {
            first,
            buckets: end - first,
            survival: [0.0; BUCKETS_MAX],
            inverse: [0.0; BUCKETS_MAX],
            tolerated_survival: [0.0; BUCKETS_MAX],
            tolerated: [0.0; BUCKETS_MAX],
        };
        let mut upper = 1.0;
        for (bucket, share) in known.shares()[first..end].iter().enumerate() {
            let survival = if bucket == 0 {
                1.0
            } else {
                share.min(upper - 1e-9 * upper)
            };
            shape.survival[bucket] = survival;
            shape.tolerated_survival[bucket] = odds(survival, tolerance);
            upper = survival;
        }
        let (mut below, mut tolerated_below) = (0.0, 0.0);
        for bucket in (0..shape.buckets).rev() {
            let (survival, tolerated) = (shape.survival[bucket], shape.tolerated_survival[bucket]);
            shape.inverse[bucket] = 1.0 / (survival - below);
            shape.tolerated[bucket] = (tolerated - tolerated_below) * shape.inverse[bucket];
            (below, tolerated_below) = (survival, tolerated);
        }
        shape
    }

    /// A batch's counts in these buckets.
    fn counts(&self, counts: &[u64]) -> [f64; BUCKETS_MAX] {
        let mut grouped = [0.0; BUCKETS_MAX];
        for (bucket, count) in counts.iter().enumerate() {
            let bucket = bucket.saturating_sub(self.first).min(self.buckets - 1);
            grouped[bucket] += *count as f64;
        }
        grouped
    }

    /// Both arms' factors per bucket for all alternatives, from the last bucket to the first.
    fn factors(
        &self,
        share: f64,
        tolerance: f64,
        mut each: impl FnMut(usize, &[f64; ALTERNATIVES], &[f64; ALTERNATIVES]),
    ) {
        let rest = 1.0 - share;
        let mut below = [0.0; ALTERNATIVES];
        let mut least = [f64::INFINITY; ALTERNATIVES];
        for bucket in (0..self.buckets).rev() {
            let (survival, tolerated) = (self.survival[bucket], self.tolerated[bucket]);
            // One logarithm serves all powers.
            let log = self.tolerated_survival[bucket].ln();
            let at: [f64; ALTERNATIVES] = std::array::from_fn(|alternative| {
                match (
                    ODDS.get(alternative),
                    HAZARD_POWERS.get(alternative.wrapping_sub(ODDS.len())),
                ) {
                    (Some(times), _) => odds(survival, tolerance * times),
                    (None, Some(power)) => (log * power).exp(),
                    (None, None) => survival,
                }
            });
            let most = 1.0 + 0.9 * rest / (share * tolerated.max(1.0));
            let (mixed, above, under) = (share * tolerated + rest, tolerated.max(1.0), tolerated.min(1.0));
            let mut primary = [0.0; ALTERNATIVES];
            for alternative in 0..ALTERNATIVES {
                let density = (at[alternative] - below[alternative]) * self.inverse[bucket];
                let factor = density * mixed / (tolerated * (share * density + rest));
                // Rising with the duration: otherwise a faster canary could look slower.
                let canary = least[alternative].min(factor).min(most);
                let weight = if canary > 1.0 { above } else { under };
                primary[alternative] = 1.0 - share / rest * weight * (canary - 1.0);
                least[alternative] = canary;
            }
            below = at;
            each(bucket, &least, &primary);
        }
    }
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
        let (ours, theirs) = (
            shape.counts(&durations.canary.counts),
            shape.counts(&durations.primary.counts),
        );
        let slower = &mut self.slower;
        shape.factors(share, tolerance, |bucket, canary, primary| {
            for (count, factors) in [(ours[bucket], canary), (theirs[bucket], primary)] {
                if count > 0.0 {
                    for (log, factor) in slower.iter_mut().zip(factors) {
                        *log += count * factor.ln();
                    }
                }
            }
        });
        if self.log_ceiling() > self.peak {
            self.peak = self.peak.max(self.log_evidence());
        }
        let rest = 1.0 - share;
        for bucket in 0..shape.buckets {
            let (ours, theirs) = (ours[bucket], theirs[bucket]);
            if tolerance > 1.0 && ours + theirs > 0.0 {
                let tolerated = shape.tolerated[bucket];
                self.equal += (ours + theirs) * (share * tolerated + rest).ln() - ours * tolerated.ln();
            }
            let next = if bucket + 1 < shape.buckets {
                shape.survival[bucket + 1]
            } else {
                0.0
            };
            self.places += ours * (1.0 - 0.5 * (shape.survival[bucket] + next));
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

    #[test]
    fn factors_rise_with_the_duration_and_stay_positive() {
        for share in [0.01, 0.1, 0.5, 0.9, 0.99] {
            for tolerance in [1.0, 1.5, 3.0] {
                let mut before = [f64::INFINITY; ALTERNATIVES];
                Shape::of(&known(), tolerance).factors(share, tolerance, |bucket, canary, primary| {
                    for alternative in 0..ALTERNATIVES {
                        let (canary, primary) = (canary[alternative], primary[alternative]);
                        let case = format!("{share} {tolerance} {alternative} {bucket}: {canary} {primary}");
                        assert!(
                            canary <= before[alternative] && canary > 0.0 && primary > 0.0,
                            "{case}"
                        );
                    }
                    before = *canary;
                });
            }
        }
    }

    /// The exact expectation of a batch of one canary request among four of the primary is at most 1 for any common
    /// distribution, the running estimate being right or wrong.
    #[test]
    fn the_expected_factor_is_at_most_one_whatever_the_common_distribution_is() {
        let mut random = Random::new(12);
        for tolerance in [1.0, 1.5] {
            let shape = Shape::of(&known(), tolerance);
            for _ in 0..50 {
                let mut common: Vec<f64> = (0..shape.buckets).map(|_| -(1.0 - random.unit()).ln()).collect();
                let sum: f64 = common.iter().sum();
                for share in &mut common {
                    *share /= sum;
                }
                let (mut canary_mean, mut primary_mean) = ([0.0; ALTERNATIVES], [0.0; ALTERNATIVES]);
                shape.factors(0.2, tolerance, |bucket, canary, primary| {
                    for alternative in 0..ALTERNATIVES {
                        canary_mean[alternative] += common[bucket] * canary[alternative];
                        primary_mean[alternative] += common[bucket] * primary[alternative];
                    }
                });
                for (canary, primary) in canary_mean.into_iter().zip(primary_mean) {
                    let mean: f64 = canary * primary.powi(4);
                    assert!(mean <= 1.0 + 1e-9, "at {tolerance}: {mean}");
                }
            }
        }
    }

    #[test]
    fn splitting_a_batch_with_its_share_does_not_change_the_evidence() {
        let mut random = Random::new(9);
        let mut running = Running::default();
        running.remember(&histogram(&mut random, 2000, log_normal(0.6, 1.0)).latency);
        let half = Sample {
            canary: histogram(&mut random, 30, log_normal(0.6, 1.4)),
            primary: histogram(&mut random, 170, log_normal(0.6, 1.0)),
            ..Sample::default()
        };
        let mut whole = half.clone();
        whole.add(&half);
        let (mut once, mut twice) = (Distribution::default(), Distribution::default());
        once.observe(&Durations::of(&whole, &running), &Options::default());
        for _ in 0..2 {
            twice.observe(&Durations::of(&half, &running), &Options::default());
        }
        assert!((once.log_evidence() - twice.log_evidence()).abs() < 1e-9);
        assert!((once.equal - twice.equal).abs() < 1e-9);
    }

    #[test]
    fn durations_where_the_primary_has_none_count_in_the_nearest_bucket_that_it_has() {
        let mut running = Running::default();
        running.remember(&crate::Histogram {
            bounds_ms: (1..9).map(f64::from).collect(),
            counts: vec![0, 0, 500, 400, 100, 0, 0, 0, 0],
        });
        let shape = Shape::of(&running.survival(), 1.0);
        let grouped = shape.counts(&[1, 2, 4, 8, 16, 32, 64, 128, 256]);
        assert_eq!((shape.first, shape.buckets), (2, 4));
        assert_eq!(grouped[..4], [7.0, 8.0, 16.0, 480.0]);
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
            from_ms: None,
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
