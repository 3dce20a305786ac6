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

use super::running::{Running, coarse};
use crate::math::log_sum_exp;
use crate::sample::Sample;
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

/// Ways to be slower.
#[derive(Clone, Copy, Debug)]
enum Alternative {
    /// The odds of exceeding any duration are this many times as high.
    Odds(f64),
    /// Survival is raised to one over this power: a longer tail.
    Hazard(f64),
}

const ALTERNATIVES: [Alternative; 8] = [
    Alternative::Odds(1.25),
    Alternative::Odds(1.6),
    Alternative::Odds(2.5),
    Alternative::Odds(6.0),
    Alternative::Hazard(1.15),
    Alternative::Hazard(1.4),
    Alternative::Hazard(2.0),
    Alternative::Hazard(4.0),
];

/// Primary requests that must be known before the first batch is judged.
const KNOWN_MIN: f64 = 50.0;

/// The evidence so far.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Distribution {
    slower: [f64; ALTERNATIVES.len()],
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

impl Alternative {
    fn survival(self, survival: f64, tolerance: f64) -> f64 {
        match self {
            Self::Odds(times) => odds(survival, tolerance * times),
            Self::Hazard(times) => odds(survival, tolerance).powf(1.0 / times),
        }
    }
}

/// Density of a transformed distribution relative to the primary's, per bucket.
fn densities(survival: &[f64], transform: impl Fn(f64) -> f64) -> Vec<f64> {
    survival
        .iter()
        .enumerate()
        .map(|(bucket, &upper)| {
            let lower = survival.get(bucket + 1).copied().unwrap_or(0.0);
            // An empty bucket has the density of a sliver.
            let lower = lower.min(upper - 1e-9 * upper);
            (transform(upper) - transform(lower)) / (upper - lower)
        })
        .collect()
}

/// Both arms' logarithmic factors per bucket, for one alternative.
fn factors(tolerated: &[f64], alternative: &[f64], share: f64) -> Vec<(f64, f64)> {
    let rest = 1.0 - share;
    let mut factors: Vec<f64> = tolerated
        .iter()
        .zip(alternative)
        .map(|(tolerated, alternative)| {
            let factor = alternative / tolerated * (share * tolerated + rest) / (share * alternative + rest);
            factor.min(1.0 + 0.9 * rest / (share * tolerated.max(1.0)))
        })
        .collect();
    // Rising with the duration: otherwise a faster canary could look slower.
    let mut least = f64::INFINITY;
    for factor in factors.iter_mut().rev() {
        least = least.min(*factor);
        *factor = least;
    }
    factors
        .into_iter()
        .zip(tolerated)
        .map(|(canary, tolerated)| {
            let weight = if canary > 1.0 {
                tolerated.max(1.0)
            } else {
                tolerated.min(1.0)
            };
            let primary = 1.0 - share / rest * weight * (canary - 1.0);
            (canary.ln(), primary.ln())
        })
        .collect()
}

impl Distribution {
    /// Takes in one interval of both arms. `primary` is what was known of the primary before it. O(buckets).
    pub fn observe(&mut self, sample: &Sample, primary: &Running, options: &Options) {
        let (theirs, ours) = (coarse(&sample.primary.latency), coarse(&sample.canary.latency));
        let (canary_total, primary_total) = (ours.total(), theirs.total());
        if canary_total == 0
            || primary_total == 0
            || theirs.bounds_ms != ours.bounds_ms
            || !primary.matches(&theirs)
            || primary.total() < KNOWN_MIN
        {
            return;
        }
        self.canary = self.canary.saturating_add(canary_total);
        self.primary = self.primary.saturating_add(primary_total);
        let share = canary_total as f64 / (canary_total as f64 + primary_total as f64);
        let tolerance = options.tolerance.max(1.0);
        let survival = primary.survival();
        let tolerated = densities(&survival, |upper| odds(upper, tolerance));
        let evidence = |factors: &[(f64, f64)]| -> f64 {
            let arms = ours.counts.iter().zip(&theirs.counts).zip(factors);
            arms.map(|((canary, primary), (ours, theirs))| *canary as f64 * ours + *primary as f64 * theirs)
                .sum()
        };
        for (log, alternative) in self.slower.iter_mut().zip(ALTERNATIVES) {
            let expected = densities(&survival, |upper| alternative.survival(upper, tolerance));
            *log += evidence(&factors(&tolerated, &expected, share));
        }
        self.peak = self.peak.max(self.log_evidence());
        if tolerance > 1.0 {
            let rest = 1.0 - share;
            let factors: Vec<(f64, f64)> = tolerated
                .iter()
                .map(|tolerated| {
                    let mixed = share * tolerated + rest;
                    ((mixed / tolerated).ln(), mixed.ln())
                })
                .collect();
            self.equal += evidence(&factors);
            self.peak_equal = self.peak_equal.max(self.equal);
        }
        for (bucket, count) in ours.counts.iter().enumerate() {
            let upper = survival.get(bucket).copied().unwrap_or(0.0);
            let lower = survival.get(bucket + 1).copied().unwrap_or(0.0);
            self.places += *count as f64 * (1.0 - 0.5 * (upper + lower));
        }
    }

    /// A new step begins: what speaks for the canary starts anew.
    pub fn begin_step(&mut self) {
        self.equal = 0.0;
        self.peak_equal = 0.0;
    }

    /// `ln E` against the canary now; 0 at the start.
    pub fn log_evidence(&self) -> f64 {
        log_sum_exp(
            self.slower
                .iter()
                .map(|log| (1.0 / ALTERNATIVES.len() as f64, *log)),
        )
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
    use super::*;
    use crate::random::Random;

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
            self.judge.observe(&sample, &self.running, &self.options);
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

    #[test]
    fn factors_rise_with_the_duration_and_stay_positive() {
        let survival = [1.0, 0.9, 0.9, 0.5, 0.2, 0.01, 0.0005];
        for share in [0.01, 0.1, 0.5, 0.9, 0.99] {
            for tolerance in [1.0, 1.5, 3.0] {
                let tolerated = densities(&survival, |upper| odds(upper, tolerance));
                for alternative in ALTERNATIVES {
                    let expected = densities(&survival, |upper| alternative.survival(upper, tolerance));
                    let factors = factors(&tolerated, &expected, share);
                    let case = format!("{share} {tolerance} {alternative:?}: {factors:?}");
                    assert!(factors.windows(2).all(|pair| pair[0].0 <= pair[1].0), "{case}");
                    assert!(
                        factors
                            .iter()
                            .all(|pair| pair.0.is_finite() && pair.1.is_finite()),
                        "{case}"
                    );
                }
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
        judge.observe(&sample, &running, &Options::default());
        assert!(judge.log_evidence().is_finite());
        let text = serde_json::to_string(&judge).unwrap();
        assert!(text.len() < 500, "{}", text.len());
        let read: Distribution = serde_json::from_str(&text).unwrap();
        assert!((read.log_evidence() / judge.log_evidence() - 1.0).abs() < 1e-9);
    }
}
