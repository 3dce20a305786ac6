//! Latency at a quantile: is a larger share of the canary's requests slower than the primary's running quantile?
//!
//! Before each batch the bucket bound nearest to the primary's quantile is chosen from what was seen before; then both
//! arms' requests beyond it are counted, and [`super::ratio`] compares the shares. Only counts beyond a bound are used, so
//! heavy tails and given buckets do no harm; a slowdown inside one bucket is not seen.
//!
//! The tolerance is one of *odds*: the odds of a request being slower than the primary's quantile may be `t` times as high
//! as for the primary. For the tail that is the ratio of shares itself; for the median `t = 1.5` means a share of 60 %
//! instead of 50 %.

use serde::{Deserialize, Serialize};

use super::errors::{Clock, missing, ratio_verdict};
use super::ratio::{Batch, Grid, RatioTest};
use super::running::Durations;
use crate::text;
use crate::verdict::{Evidence, Missing, Verdict};

/// What the comparison promises.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Options {
    /// Highest probability with which a release within the tolerance is ever called bad.
    pub alpha: f64,
    /// Ratio of the odds of being slow that is still tolerated, at least 1.
    pub tolerance: f64,
    /// The quantile, above 0 and below 1.
    pub quantile: f64,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            alpha: 0.01,
            tolerance: 1.5,
            quantile: 0.99,
        }
    }
}

impl Options {
    /// The tolerated ratio of shares.
    pub fn share_tolerance(&self) -> f64 {
        let odds = self.tolerance.max(1.0);
        odds / (odds * (1.0 - self.quantile) + self.quantile)
    }
}

/// The evidence so far.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Latency {
    test: RatioTest,
    clock: Clock,
    /// The bound that was used last, in milliseconds.
    bound_ms: f64,
    /// Canary requests that came before the primary was known well enough.
    skipped: u64,
}

impl Latency {
    /// Takes in one interval of both arms.
    pub fn observe(&mut self, at_ms: i64, durations: &Durations<'_>, options: &Options) {
        self.clock.tick(at_ms);
        let known = durations.known.as_ref();
        let Some((index, _)) = known.and_then(|known| known.bound_near(options.quantile)) else {
            self.skipped = self.skipped.saturating_add(durations.canary_total);
            return;
        };
        let beyond = |counts: &[u64]| counts.iter().skip(index + 1).sum();
        let batch = Batch {
            canary: durations.canary_total,
            canary_bad: beyond(&durations.canary.counts),
            primary: durations.primary_total,
            primary_bad: beyond(&durations.primary.counts),
        };
        let bounds = &durations.canary.bounds_ms;
        self.bound_ms = bounds.get(index).copied().unwrap_or(f64::MAX);
        self.test.observe(&batch, options.share_tolerance(), &Grid::SLOW);
    }

    /// A new step begins: what speaks for the canary starts anew.
    pub fn begin_step(&mut self) {
        self.test.begin_step();
    }

    /// The engine, for combinations and status.
    pub const fn test(&self) -> &RatioTest {
        &self.test
    }

    /// The verdict so far. `Bad` is final.
    pub fn verdict(&self, options: &Options) -> Verdict {
        let totals = self.test.totals();
        if totals.canary == 0 || totals.primary == 0 {
            if self.skipped == 0 {
                return Verdict::NoData {
                    explanation: "no durations of both canary and primary yet".to_owned(),
                };
            }
            let percentile = text::short(options.quantile * 100.0);
            return Verdict::Undecided {
                evidence: Evidence {
                    value: 1.0,
                    bound: 1.0 / options.alpha,
                    samples: 0,
                    alpha: Some(options.alpha),
                    explanation: format!(
                        "{} canary requests came before the primary's p{percentile} was known",
                        text::count(self.skipped)
                    ),
                },
                missing: Missing {
                    what: format!("enough requests to know the primary's p{percentile}"),
                    seconds: None,
                },
            };
        }
        let facts = format!(
            "{} of {} canary requests take longer than {} ms (near the primary's p{}), of the primary's {}",
            text::percent(totals.canary_bad, totals.canary),
            text::count(totals.canary),
            text::short(self.bound_ms),
            text::short(options.quantile * 100.0),
            text::percent(totals.primary_bad, totals.primary),
        );
        let tolerance = options.share_tolerance();
        ratio_verdict(&self.test, &facts, options.alpha, tolerance, &Grid::SLOW, || {
            missing(
                &self.test,
                &self.clock,
                options.alpha,
                tolerance,
                &Grid::SLOW,
                "slow requests",
            )
        })
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::super::running::Running;
    use super::*;
    use crate::random::Random;
    use crate::sample::{Counts, Histogram, Sample};

    /// Istio's bounds up to ten seconds.
    pub(crate) const BOUNDS: [f64; 13] = [
        0.5, 1.0, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0, 1000.0, 2500.0, 5000.0, 10000.0,
    ];

    pub(crate) fn histogram(random: &mut Random, requests: u64, draw: impl Fn(&mut Random) -> f64) -> Counts {
        let mut latency = Histogram::new(BOUNDS.to_vec());
        for _ in 0..requests {
            let ms = draw(random);
            let bucket = BOUNDS.partition_point(|bound| *bound < ms);
            latency.counts[bucket] += 1;
        }
        Counts {
            requests,
            latency,
            ..Counts::default()
        }
    }

    /// Log-normal, median 20 ms.
    pub(crate) fn log_normal(sigma: f64, factor: f64) -> impl Fn(&mut Random) -> f64 {
        move |random| 20.0 * factor * (sigma * random.normal()).exp()
    }

    struct World {
        random: Random,
        running: Running,
        latency: Latency,
        options: Options,
    }

    impl World {
        fn new(seed: u64, options: Options) -> Self {
            Self {
                random: Random::new(seed),
                running: Running::default(),
                latency: Latency::default(),
                options,
            }
        }

        fn second(
            &mut self,
            at: i64,
            requests: (u64, u64),
            canary: impl Fn(&mut Random) -> f64,
            primary: impl Fn(&mut Random) -> f64,
        ) {
            let sample = Sample {
                at_ms: at * 1000,
                from_ms: None,
                canary: histogram(&mut self.random, requests.0, canary),
                primary: histogram(&mut self.random, requests.1, primary),
            };
            let durations = Durations::of(&sample, &self.running);
            self.latency.observe(sample.at_ms, &durations, &self.options);
            self.running.remember(&sample.primary.latency);
        }
    }

    #[test]
    fn half_as_slow_again_at_the_tail_is_found_within_a_minute() {
        let mut found = Vec::new();
        for seed in 0..9 {
            let mut world = World::new(seed, Options::default());
            let mut second = 0;
            while !world.latency.verdict(&world.options).is_bad() && second < 300 {
                world.second(second, (100, 900), log_normal(0.7, 1.5), log_normal(0.7, 1.0));
                second += 1;
            }
            found.push(second);
        }
        found.sort_unstable();
        assert!(found[4] <= 60, "{found:?}");
    }

    #[test]
    fn equal_latencies_are_called_bad_less_often_than_alpha_even_with_heavy_tails_and_drift() {
        let options = Options {
            alpha: 0.05,
            tolerance: 1.0,
            quantile: 0.9,
        };
        let mut alarms = 0;
        let runs = 300;
        for seed in 0..runs {
            let mut world = World::new(seed, options);
            for second in 0..60 {
                // A Pareto tail of index 1.2 (no variance), and everything slows down by four halfway, for both.
                let factor = if second > 30 { 4.0 } else { 1.0 };
                let draw = move |random: &mut Random| 10.0 * factor * (1.0 - random.unit()).powf(-1.0 / 1.2);
                world.second(second, (20, 60), draw, draw);
            }
            alarms += u64::from(world.latency.verdict(&options).is_bad());
        }
        // 5 % of 300 are 15; three standard deviations above that are 26.
        assert!(alarms <= 26, "{alarms} of {runs}");
    }

    #[test]
    fn a_canary_as_fast_as_the_primary_is_shown_to_be_good() {
        let mut world = World::new(5, Options::default());
        let mut second = 0;
        while !world.latency.verdict(&world.options).is_good() {
            world.second(second, (300, 700), log_normal(0.7, 1.0), log_normal(0.7, 1.0));
            second += 1;
            assert!(
                second < 400,
                "{}",
                world.latency.verdict(&world.options).explanation()
            );
        }
        assert!(
            world
                .latency
                .verdict(&world.options)
                .explanation()
                .contains("shown to be within"),
            "{}",
            world.latency.verdict(&world.options).explanation()
        );
    }

    #[test]
    fn before_the_primary_is_known_it_is_undecided_and_says_so() {
        let mut world = World::new(1, Options::default());
        world.second(0, (10, 90), log_normal(0.5, 1.0), log_normal(0.5, 1.0));
        let verdict = world.latency.verdict(&world.options);
        assert_eq!(verdict.word(), "undecided");
        assert_eq!(
            verdict.explanation(),
            "10 canary requests came before the primary's p99 was known"
        );
    }

    #[test]
    fn the_tolerance_of_the_median_is_one_of_odds() {
        let at = |quantile| {
            Options {
                quantile,
                ..Options::default()
            }
            .share_tolerance()
        };
        assert!((at(0.5) - 1.2).abs() < 1e-12);
        assert!((at(0.99) - 1.4925).abs() < 1e-4);
    }

    #[test]
    fn the_state_survives_a_restart_and_fits_a_few_hundred_bytes() {
        let mut world = World::new(2, Options::default());
        for second in 0..60 {
            world.second(second, (100, 900), log_normal(0.5, 1.1), log_normal(0.5, 1.0));
        }
        let text = serde_json::to_string(&world.latency).unwrap();
        assert!(text.len() < 700, "{} bytes", text.len());
        let read: Latency = serde_json::from_str(&text).unwrap();
        let evidence = |latency: &Latency| latency.test().log_evidence(1.5, &Grid::SLOW);
        assert!((evidence(&read) - evidence(&world.latency)).abs() < 1e-9);
        let text = serde_json::to_string(&world.running).unwrap();
        assert!(text.len() < 400, "{} bytes", text.len());
        let read: Running = serde_json::from_str(&text).unwrap();
        assert_eq!(read, world.running);
    }
}
