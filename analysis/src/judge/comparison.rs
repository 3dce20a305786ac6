//! The sequential comparison of canary against primary by counts of a bad event (errors).
//!
//! Each batch brings, per arm, how many requests there were and how many of them were bad. Under the hypothesis that a
//! canary request is at most `tolerance` times as likely to be bad as a primary one, the evidence
//! `E = Σ_k w_k Π_t L_k(t)` is a nonnegative supermartingale that starts at 1, for a grid of rate ratios `φ_k` above
//! the tolerance `φ_0`:
//!
//! ```text
//! ln L_k(t) = x_c ln(φ_k/φ_0) − m ln((ρ φ_k + 1 − ρ) / (ρ φ_0 + 1 − ρ)),   ρ = n_c / (n_c + n_p),  m = x_c + x_p
//! ```
//!
//! By Ville's inequality (J. Ville 1939; for mixtures: H. Robbins 1970) it ever reaches `1/alpha` with probability at
//! most alpha, however often one looks, whatever the weights were in each batch. With `φ_0 = 1` this holds under
//! exchangeability inside a batch: given m the bad requests of the canary are hypergeometric, which the binomial
//! dominates in convex order (W. Hoeffding 1963, theorem 4). With a tolerance above 1 it rests on the per-request
//! binomial model. A dependency that fails for both arms cancels.
//!
//! What it does not cover: one client that repeats a failing request counts as many (choose a higher tolerance), and
//! two arms that are both bad are equal (keep an absolute bound beside it).

use serde::{Deserialize, Serialize};

use crate::sample::Sample;
use crate::verdict::{Evidence, Verdict};

/// Rate ratios that the mixture looks for, as multiples of the tolerance. A real ratio between two of them costs less
/// than the doubling of the time that the next one would need.
const RATIOS: [f64; 8] = [1.5, 2.0, 3.0, 5.0, 10.0, 20.0, 50.0, 100.0];

/// What the comparison promises.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Options {
    /// Highest probability with which a release that is within the tolerance is ever called bad.
    pub alpha: f64,
    /// The rate ratio canary : primary that is still tolerated, at least 1.
    pub tolerance: f64,
}

impl Default for Options {
    /// One healthy release in a hundred, and half as many errors again as the primary has.
    fn default() -> Self {
        Self {
            alpha: 0.01,
            tolerance: 1.5,
        }
    }
}

/// The evidence so far: a few numbers, safe to keep in a status and to continue from after a restart.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Comparison {
    /// `ln` of each component's likelihood ratio, in the order of the grid.
    log_evidence: [f64; RATIOS.len()],
    /// The highest `ln E` ever reached: the verdict does not come back.
    peak: f64,
    /// Totals, for the explanation.
    totals: Totals,
    /// Counts of one arm that wait for counts of the other: a batch with one arm alone says nothing about the ratio.
    /// When a batch is complete depends on requests only, never on how they ended, so the bound holds.
    #[serde(default)]
    pending: Totals,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Totals {
    canary_requests: u64,
    canary_bad: u64,
    primary_requests: u64,
    primary_bad: u64,
}

impl Totals {
    fn add(&mut self, sample: &Sample) {
        self.canary_requests += sample.canary.requests;
        self.canary_bad += sample.canary.errors;
        self.primary_requests += sample.primary.requests;
        self.primary_bad += sample.primary.errors;
    }
}

impl Default for Comparison {
    fn default() -> Self {
        Self {
            log_evidence: [0.0; RATIOS.len()],
            peak: 0.0,
            totals: Totals::default(),
            pending: Totals::default(),
        }
    }
}

impl Comparison {
    /// Takes in one batch of errors. O(1).
    pub fn observe(&mut self, sample: &Sample, options: &Options) {
        self.totals.add(sample);
        self.pending.add(sample);
        if self.pending.canary_requests == 0 || self.pending.primary_requests == 0 {
            return;
        }
        let batch = std::mem::take(&mut self.pending);
        let (canary, primary) = (batch.canary_requests as f64, batch.primary_requests as f64);
        let share = canary / (canary + primary);
        let canary_bad = batch.canary_bad as f64;
        let bad = canary_bad + batch.primary_bad as f64;
        let tolerated = options.tolerance.max(1.0);
        let base = share * tolerated + 1.0 - share;
        for (log, multiple) in self.log_evidence.iter_mut().zip(RATIOS) {
            let ratio = tolerated * multiple;
            *log += canary_bad * multiple.ln() - bad * ((share * ratio + 1.0 - share) / base).ln();
        }
        self.peak = self.peak.max(self.log_mixture());
    }

    /// `E`, the evidence against the canary now; 1 at the start.
    pub fn evidence(&self) -> f64 {
        self.log_mixture().exp()
    }

    fn log_mixture(&self) -> f64 {
        let highest = self
            .log_evidence
            .iter()
            .copied()
            .fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = self.log_evidence.iter().map(|log| (log - highest).exp()).sum();
        highest + (sum / RATIOS.len() as f64).ln()
    }

    /// The verdict so far. `Bad` is final: the evidence has once reached `1/alpha`.
    pub fn verdict(&self, options: &Options) -> Verdict {
        let Totals {
            canary_requests,
            canary_bad,
            primary_requests,
            primary_bad,
        } = self.totals;
        if canary_requests == 0 {
            return Verdict::NoData {
                explanation: "no requests to the canary yet".to_owned(),
            };
        }
        let percent = |bad: u64, requests: u64| 100.0 * bad as f64 / requests.max(1) as f64;
        let bound = 1.0 / options.alpha;
        let facts = format!(
            "canary fails {:.2} % of {canary_requests} requests, primary {:.2} % of {primary_requests}",
            percent(canary_bad, canary_requests),
            percent(primary_bad, primary_requests),
        );
        let evidence = |explanation| Evidence {
            value: self.peak.exp().min(f64::MAX),
            bound,
            samples: canary_requests,
            explanation,
        };
        if self.peak >= bound.ln() {
            Verdict::Bad(evidence(format!(
                "{facts}; at most 1 in {bound:.0} healthy releases would ever look this bad"
            )))
        } else {
            Verdict::Undecided(evidence(facts))
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::sample::Counts;

    fn sample(canary: (u64, u64), primary: (u64, u64)) -> Sample {
        let counts = |(requests, errors)| Counts {
            requests,
            errors,
            ..Counts::default()
        };
        Sample {
            at_ms: 0,
            canary: counts(canary),
            primary: counts(primary),
        }
    }

    /// SplitMix64 (G. Steele et al. 2014): a deterministic stream for the simulations below.
    struct Random(u64);

    impl Random {
        fn next_unit(&mut self) -> f64 {
            self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
            let mut z = self.0;
            z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
            ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
        }

        fn binomial(&mut self, n: u64, p: f64) -> u64 {
            (0..n).filter(|_| self.next_unit() < p).count() as u64
        }
    }

    #[test]
    fn thirty_percent_errors_against_none_are_called_bad_within_two_dozen_canary_requests() {
        let mut comparison = Comparison::default();
        let options = Options::default();
        let mut requests = 0;
        let mut random = Random(7);
        while !comparison.verdict(&options).is_bad() && requests < 100 {
            comparison.observe(&sample((2, random.binomial(2, 0.3)), (18, 0)), &options);
            requests += 2;
        }
        assert!(requests <= 24, "took {requests} canary requests");
    }

    #[test]
    fn an_outage_that_hits_both_arms_alike_is_not_held_against_the_canary() {
        let mut comparison = Comparison::default();
        let options = Options::default();
        for _ in 0..100 {
            comparison.observe(&sample((10, 5), (90, 45)), &options);
        }
        assert_eq!(comparison.verdict(&options).word(), "undecided");
    }

    #[test]
    fn healthy_releases_looked_at_every_second_are_called_bad_less_often_than_alpha() {
        let options = Options {
            alpha: 0.05,
            tolerance: 1.0,
        };
        let mut random = Random(42);
        let runs = 400;
        let false_alarms = (0..runs)
            .filter(|_| {
                let mut comparison = Comparison::default();
                (0..300).any(|_| {
                    let batch = sample((10, random.binomial(10, 0.01)), (90, random.binomial(90, 0.01)));
                    comparison.observe(&batch, &options);
                    comparison.verdict(&options).is_bad()
                })
            })
            .count();
        // 5 % of 400 are 20; three standard deviations above that are 33.
        assert!(false_alarms <= 33, "{false_alarms} false alarms in {runs} runs");
    }

    #[test]
    fn arms_that_are_reported_apart_are_compared_all_the_same() {
        let options = Options::default();
        let (mut together, mut apart) = (Comparison::default(), Comparison::default());
        for _ in 0..10 {
            together.observe(&sample((20, 6), (180, 1)), &options);
            apart.observe(&sample((0, 0), (180, 1)), &options);
            apart.observe(&sample((20, 6), (0, 0)), &options);
        }
        assert_eq!(together.evidence(), apart.evidence());
        assert!(apart.verdict(&options).is_bad());
    }

    #[test]
    fn no_canary_requests_are_no_data() {
        assert_eq!(
            Comparison::default().verdict(&Options::default()).word(),
            "no data"
        );
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn the_evidence_survives_a_restart_in_the_middle(
            batches in prop::collection::vec(((0u64..50, 0u64..5), (0u64..500, 0u64..5)), 1..40),
            restart_at in 0usize..40,
        ) {
            let options = Options::default();
            let mut straight = Comparison::default();
            let mut restarted = Comparison::default();
            for (index, ((canary, canary_bad), (primary, primary_bad))) in batches.into_iter().enumerate() {
                if index == restart_at {
                    let stored = serde_json::to_string(&restarted).unwrap();
                    restarted = serde_json::from_str(&stored).unwrap();
                }
                let batch = sample((canary, canary_bad.min(canary)), (primary, primary_bad.min(primary)));
                straight.observe(&batch, &options);
                restarted.observe(&batch, &options);
            }
            prop_assert!((straight.evidence() - restarted.evidence()).abs() <= 1e-9 * straight.evidence().max(1.0));
        }

        #[test]
        fn counts_up_to_a_trillion_give_finite_evidence(
            canary in 1u64..1_000_000_000_000, primary in 1u64..1_000_000_000_000,
            canary_share in 0.0f64..1.0, primary_share in 0.0f64..1.0,
        ) {
            let options = Options::default();
            let mut comparison = Comparison::default();
            let bad = |n: u64, share: f64| (n as f64 * share) as u64;
            comparison.observe(&sample((canary, bad(canary, canary_share)), (primary, bad(primary, primary_share))), &options);
            prop_assert!(!comparison.log_mixture().is_nan());
            let _ = comparison.verdict(&options);
        }

        #[test]
        fn more_canary_errors_never_weaken_the_evidence(errors in 0u64..20) {
            let options = Options::default();
            let (mut fewer, mut more) = (Comparison::default(), Comparison::default());
            fewer.observe(&sample((20, errors), (180, 0)), &options);
            more.observe(&sample((20, errors.min(19) + 1), (180, 0)), &options);
            prop_assert!(more.evidence() >= fewer.evidence());
        }
    }
}
