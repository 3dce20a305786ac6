//! An absolute guard: is the canary's rate of a bad event acceptable (`p0`) or unacceptable (`p1`)? A comparison is blind
//! when both arms are bad; this is not. Also a bound on a quantile of latency: at most `1 − q` of the requests may take
//! longer than the bound.
//!
//! A. Wald's sequential probability ratio test (1945): `Λ = (p1/p0)^x ((1−p1)/(1−p0))^{n−x}`; the canary is bad when Λ
//! reaches `1/α`, good when it falls to `β`. Wald's own thresholds are `(1−β)/α` and `β/(1−α)`; these are the ones that
//! Ville's inequality proves without an approximation, and they differ by less than a request in a hundred. Below `p0` and
//! above `p1` the errors are smaller still.

use serde::{Deserialize, Serialize};

use crate::text;
use crate::verdict::{Evidence, Missing, Verdict};

/// What the guard promises.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Options {
    /// The rate that is still acceptable, above 0.
    pub acceptable: f64,
    /// The rate that must be found; above the acceptable one, below 1.
    pub unacceptable: f64,
    /// Highest probability of calling a rate up to the acceptable one bad.
    pub alpha: f64,
    /// Highest probability of calling a rate from the unacceptable one on good.
    pub beta: f64,
}

impl Options {
    /// A guard for a rate, with an unacceptable rate three times as high where none is given.
    pub fn new(acceptable: f64, unacceptable: Option<f64>, alpha: f64) -> Self {
        let acceptable = acceptable.clamp(1e-9, 0.98);
        Self {
            acceptable,
            unacceptable: unacceptable
                .unwrap_or(acceptable * 3.0)
                .clamp(acceptable * 1.01, 0.999),
            alpha,
            beta: alpha,
        }
    }

    fn step(&self) -> (f64, f64) {
        (
            (self.unacceptable / self.acceptable).ln(),
            (-self.unacceptable).ln_1p() - (-self.acceptable).ln_1p(),
        )
    }
}

/// The evidence so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Guard {
    requests: u64,
    bad: u64,
    /// `ln Λ` now.
    log: f64,
    /// The highest ever, of the run.
    highest: f64,
    /// `ln Λ` when the step began.
    log_before: f64,
    /// The lowest since then, relative to that.
    lowest: f64,
}

impl Guard {
    /// Takes in requests of the canary, `bad` of them bad. O(1).
    pub fn observe(&mut self, requests: u64, bad: u64, options: &Options) {
        let bad = bad.min(requests);
        self.requests = self.requests.saturating_add(requests);
        self.bad = self.bad.saturating_add(bad);
        let (up, down) = options.step();
        self.log += bad as f64 * up + (requests - bad) as f64 * down;
        self.highest = self.highest.max(self.log);
        self.lowest = self.lowest.min(self.log - self.log_before);
    }

    /// A new step begins: what speaks for the canary starts anew.
    pub fn begin_step(&mut self) {
        self.log_before = self.log;
        self.lowest = 0.0;
    }

    /// `ln Λ`, the evidence against the canary now.
    pub const fn log_evidence(&self) -> f64 {
        self.log
    }

    /// The highest `ln Λ` so far.
    pub const fn log_peak(&self) -> f64 {
        self.highest
    }

    /// The verdict so far, about what `event` names, for example `fails` or `takes longer than 500 ms in`.
    pub fn verdict(&self, options: &Options, event: &str) -> Verdict {
        if self.requests == 0 {
            return Verdict::NoData {
                explanation: "no requests to the canary yet".to_owned(),
            };
        }
        let facts = format!(
            "canary {event} {} of {} requests, acceptable are {} %",
            text::percent(self.bad, self.requests),
            text::count(self.requests),
            text::short(100.0 * options.acceptable),
        );
        let bound = 1.0 / options.alpha;
        let evidence = |log: f64, explanation: String| Evidence {
            value: log.clamp(-700.0, 700.0).exp(),
            bound,
            samples: self.requests,
            alpha: Some(options.alpha),
            explanation,
        };
        if self.highest >= bound.ln() {
            let one_in = text::count(bound.floor() as u64);
            return Verdict::Bad(evidence(
                self.highest,
                format!("{facts}; at most 1 in {one_in} acceptable releases would ever look this bad"),
            ));
        }
        let wanted = options.beta.ln();
        if self.lowest <= wanted {
            return Verdict::Good(evidence(
                self.log,
                format!(
                    "{facts}; shown to be below {} %",
                    text::short(100.0 * options.unacceptable)
                ),
            ));
        }
        let (up, down) = options.step();
        let drift = options.acceptable * up + (1.0 - options.acceptable) * down;
        // At the acceptable rate itself; a lower one needs less.
        let requests = ((wanted - (self.log - self.log_before)) / drift).max(1.0);
        let what = format!(
            "about {} more canary requests",
            text::count(requests.ceil() as u64)
        );
        Verdict::Undecided {
            evidence: evidence(self.log, format!("{facts}; undecided, missing {what}")),
            missing: Missing { what, seconds: None },
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::random::Random;

    /// A. Wald, "Sequential Analysis" (1947), section 5.3: p0 = 0.1, p1 = 0.3, α = 0.02, β = 0.03. The lines that separate
    /// the decisions have the slope 0.186 and the intercepts 2.88 and −2.58.
    #[test]
    fn walds_worked_example_has_his_slope_and_intercepts() {
        let options = Options {
            acceptable: 0.1,
            unacceptable: 0.3,
            alpha: 0.02,
            beta: 0.03,
        };
        let (up, down) = options.step();
        let slope = -down / (up - down);
        assert!((slope - 0.186).abs() < 0.0005, "{slope}");
        let upper = ((1.0 - 0.03) / 0.02_f64).ln() / (up - down);
        let lower = (0.03 / (1.0 - 0.02_f64)).ln() / (up - down);
        assert!((upper - 2.88).abs() < 0.005, "{upper}");
        assert!((lower + 2.58).abs() < 0.005, "{lower}");
        // Ville's bound instead of Wald's is 0.02 defectives higher.
        let ours = (1.0 / 0.02_f64).ln() / (up - down);
        assert!((0.0..0.03).contains(&(ours - upper)), "{ours}");
    }

    #[test]
    fn acceptable_releases_are_called_bad_and_unacceptable_ones_good_less_often_than_promised() {
        let options = Options::new(0.01, Some(0.03), 0.05);
        let mut random = Random::new(9);
        let (mut bad, mut good) = (0, 0);
        for _ in 0..1000 {
            for (rate, wrong, word) in [(0.01, &mut bad, "bad"), (0.03, &mut good, "good")] {
                let mut guard = Guard::default();
                let decided = (0..400).find_map(|_| {
                    guard.observe(20, random.binomial(20, rate), &options);
                    let verdict = guard.verdict(&options, "fails").word();
                    (verdict != "undecided").then_some(verdict)
                });
                *wrong += u64::from(decided == Some(word));
            }
        }
        // 50 are allowed on average; 71 is three standard deviations above that.
        assert!(bad <= 71 && good <= 71, "{bad} {good}");
    }

    #[test]
    fn two_arms_that_are_both_bad_are_found_by_the_guard_alone() {
        let options = Options::new(0.01, None, 0.01);
        let mut guard = Guard::default();
        guard.observe(200, 30, &options);
        let verdict = guard.verdict(&options, "fails");
        assert!(verdict.is_bad());
        assert_eq!(
            verdict.explanation(),
            "canary fails 15 % of 200 requests, acceptable are 1 %; at most 1 in 100 acceptable releases would ever look this bad"
        );
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn order_and_splits_do_not_matter_and_a_trillion_is_finite(
            parts in prop::collection::vec((0u64..1_000_000_000_000, 0u64..1_000_000_000), 1..10),
        ) {
            let options = Options::new(0.001, None, 0.01);
            let (mut forward, mut backward, mut whole) = (Guard::default(), Guard::default(), Guard::default());
            for (requests, bad) in &parts {
                forward.observe(*requests, *bad, &options);
            }
            for (requests, bad) in parts.iter().rev() {
                backward.observe(*requests, *bad, &options);
            }
            let bad = parts.iter().map(|(requests, bad)| bad.min(requests)).sum();
            whole.observe(parts.iter().map(|part| part.0).sum(), bad, &options);
            let close = |one: f64, other: f64| (one - other).abs() <= 1e-9 * one.abs().max(1.0);
            prop_assert!(whole.log_evidence().is_finite());
            prop_assert!(close(forward.log_evidence(), whole.log_evidence()));
            prop_assert!(close(backward.log_evidence(), whole.log_evidence()));
            let read: Guard = serde_json::from_str(&serde_json::to_string(&forward).unwrap()).unwrap();
            prop_assert!(close(read.log_peak(), forward.log_peak()));
        }
    }
}
