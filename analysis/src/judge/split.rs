//! Sanity: does the mesh really split as configured? The sequential multinomial test of Lindon and Malek ("Anytime-Valid
//! Inference for Multinomial Count Data", NeurIPS 2022, arXiv 2011.03567).
//!
//! With expected shares `θ` and counts `S` the evidence against the split is
//! `O = Γ(Σa) / Γ(Σa + n) · Π Γ(a_i + S_i)/Γ(a_i) · Π θ_i^{−S_i}`, a martingale from 1 under the split, with the prior
//! `a = κ θ`. Counts are of requests, so sticky clients look like a wrong split: this warns, it never stops a release.

use serde::{Deserialize, Serialize};

use crate::math::ln_rising;
use crate::text;
use crate::verdict::{Evidence, Missing, Verdict};

/// Concentration of the prior: deviations of some ten percent of a share are looked for first.
const CONCENTRATION: f64 = 100.0;

/// Highest probability with which a correct split of one weight is ever called wrong.
pub const ALPHA: f64 = 0.001;

/// The counts of one weight. A new weight begins a new test.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Split {
    canary: u64,
    primary: u64,
    peak: f64,
}

/// `ln O` for two or more arms.
pub fn log_evidence(counts: &[u64], shares: &[f64], concentration: f64) -> f64 {
    let n: u64 = counts.iter().sum();
    let arms: f64 = counts
        .iter()
        .zip(shares)
        .filter(|(count, _)| **count > 0)
        .map(|(count, share)| ln_rising(concentration * share, *count as f64) - *count as f64 * share.ln())
        .sum();
    arms - ln_rising(concentration, n as f64)
}

impl Split {
    /// Takes in requests per arm at a weight of the canary in percent. Nothing can be tested at 0 and 100.
    pub fn observe(&mut self, canary: u64, primary: u64, weight_percent: f64) {
        self.canary = self.canary.saturating_add(canary);
        self.primary = self.primary.saturating_add(primary);
        if weight_percent > 0.0 && weight_percent < 100.0 {
            let share = weight_percent / 100.0;
            let log = log_evidence(&[self.canary, self.primary], &[share, 1.0 - share], CONCENTRATION);
            self.peak = self.peak.max(log);
        }
    }

    /// Another weight: from now on its share is expected.
    pub fn begin_step(&mut self) {
        *self = Self::default();
    }

    /// Whether the requests were split as configured.
    pub fn verdict(&self, weight_percent: f64) -> Verdict {
        let n = self.canary + self.primary;
        if n == 0 {
            return Verdict::NoData {
                explanation: "no requests yet".to_owned(),
            };
        }
        let facts = format!(
            "the canary got {} of {} requests at weight {}",
            text::percent(self.canary, n),
            text::count(n),
            text::short(weight_percent),
        );
        let evidence = |explanation| Evidence {
            value: self.peak.min(700.0).exp(),
            bound: 1.0 / ALPHA,
            samples: self.canary,
            alpha: Some(ALPHA),
            explanation,
        };
        if self.peak >= (1.0 / ALPHA).ln() {
            return Verdict::Bad(evidence(format!(
                "{facts}, which is not what is configured: sticky clients, callers without a proxy, or a route of \
                 somebody else"
            )));
        }
        Verdict::Undecided {
            evidence: evidence(facts),
            missing: Missing {
                what: "nothing; a correct split stays unproven".to_owned(),
                seconds: None,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::random::Random;

    /// With a = (1, 1) the formula is elementary: O = S1! S2! / (n+1)! · 2^n at equal shares.
    #[test]
    fn the_evidence_is_that_of_the_formula() {
        // 8 of 10: 8! 2! / 11! · 2^10 = 2.068687.
        let log = log_evidence(&[8, 2], &[0.5, 0.5], 2.0);
        assert!((log.exp() - 2.068_687).abs() < 1e-6, "{}", log.exp());
        // Three arms, a = (1, 1, 1), counts (3, 0, 0): 2! 3! / 5! · 3^3 = 2.7.
        let third = 1.0 / 3.0;
        let log = log_evidence(&[3, 0, 0], &[third, third, third], 3.0);
        assert!((log.exp() - 2.7).abs() < 1e-9, "{}", log.exp());
    }

    #[test]
    fn a_correct_split_is_hardly_ever_called_wrong_and_a_wrong_one_is_found() {
        let mut random = Random::new(12);
        let mut run = |true_share: f64| {
            let mut split = Split::default();
            (0..200).position(|_| {
                let canary = random.binomial(100, true_share);
                split.observe(canary, 100 - canary, 10.0);
                split.verdict(10.0).is_bad()
            })
        };
        let wrong = (0..500).filter(|_| run(0.1).is_some()).count();
        assert!(wrong <= 3, "{wrong} of 500");
        let found = (0..50).filter_map(|_| run(0.2)).max();
        assert!(found.is_some_and(|second| second < 40), "{found:?}");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn counts_up_to_a_trillion_are_finite(
            canary in 0u64..1_000_000_000_000, primary in 0u64..1_000_000_000_000, weight in 1u32..100,
        ) {
            let mut split = Split::default();
            split.observe(canary, primary, f64::from(weight));
            prop_assert!(split.peak.is_finite());
            let _ = split.verdict(f64::from(weight));
        }
    }
}
