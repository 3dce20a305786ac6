//! After promotion: a watch with no end and a bounded number of false alarms per day.
//!
//! An e-detector (J. Shin, A. Ramdas, A. Rinaldo, "E-detectors: a nonparametric framework for sequential change detection",
//! 2022) of the Shiryaev-Roberts form: each batch gives the e-value `e_k` of every alternative rate against the baseline,
//! `M_k ← (M_k + 1) e_k`, and `M = Σ w_k M_k`. While the rate is at most the baseline, `M_t − t` is a supermartingale, so the
//! expected number of batches until `M` reaches `A` is at least `A`. With one batch a second and one false alarm a day, `A`
//! is 86,400.
//!
//! The baseline is the upper end of what the run has shown of the primary, times the tolerance.

use serde::{Deserialize, Serialize};

use crate::math::normal_quantile;
use crate::text;
use crate::verdict::{Evidence, Missing, Verdict};

/// Rates that are looked for, in multiples of the baseline.
const RATIOS: [f64; 6] = [1.5, 2.5, 5.0, 12.0, 40.0, 150.0];
const DAY_SECONDS: f64 = 86_400.0;

/// What the watch promises.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Options {
    /// The rate of bad events that counts as normal, above 0 and below 1.
    pub baseline: f64,
    /// Most false alarms per day, on average, while the rate is at most the baseline.
    pub false_alarms_per_day: f64,
    /// Batches per day; each call to [`Watch::observe`] is one.
    pub batches_per_day: f64,
}

impl Options {
    /// A watch that is fed once a second.
    pub fn each_second(baseline: f64, false_alarms_per_day: f64) -> Self {
        Self {
            baseline,
            false_alarms_per_day,
            batches_per_day: DAY_SECONDS,
        }
    }

    /// The level of the alarm.
    pub fn level(&self) -> f64 {
        (self.batches_per_day / self.false_alarms_per_day.max(1e-9)).max(2.0)
    }
}

/// The upper end of a rate of which `bad` in `requests` were seen (Wilson 1927, one-sided at `1 − alpha`): a baseline that
/// is true with that confidence.
pub fn upper_rate(requests: u64, bad: u64, alpha: f64) -> f64 {
    let n = requests.max(1) as f64;
    let (z, share) = (normal_quantile(1.0 - alpha), bad.min(requests) as f64 / n);
    let centre = share + z * z / (2.0 * n);
    let spread = z * (share * (1.0 - share) / n + z * z / (4.0 * n * n)).sqrt();
    ((centre + spread) / (1.0 + z * z / n)).clamp(1e-9, 1.0)
}

/// Where the detector stands.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Watch {
    /// `ln (M_k + 1)`.
    logs: [f64; RATIOS.len()],
    /// Requests and bad ones since the detector last stood near its start: what an alarm is about.
    recent: (u64, u64),
    requests: u64,
    alarmed: bool,
}

impl Watch {
    /// Takes in one batch. O(1). Batches without requests count too: time passes.
    pub fn observe(&mut self, requests: u64, bad: u64, options: &Options) {
        let bad = bad.min(requests);
        self.requests = self.requests.saturating_add(requests);
        self.recent.0 = self.recent.0.saturating_add(requests);
        self.recent.1 = self.recent.1.saturating_add(bad);
        let baseline = options.baseline.clamp(1e-9, 0.99);
        let mut sum = 0.0;
        for (log, ratio) in self.logs.iter_mut().zip(RATIOS) {
            let rate = (baseline * ratio).min(0.5 + 0.5 * baseline);
            let step = bad as f64 * (rate / baseline).ln()
                + (requests - bad) as f64 * ((-rate).ln_1p() - (-baseline).ln_1p());
            let next = (*log + step).min(600.0);
            sum += next.exp() / RATIOS.len() as f64;
            *log = next.exp().ln_1p().max(0.0);
        }
        if sum >= options.level() {
            self.alarmed = true;
        } else if sum < 2.0 && !self.alarmed {
            self.recent = (0, 0);
        }
    }

    /// Whether the alarm has gone off.
    pub const fn is_alarmed(&self) -> bool {
        self.alarmed
    }

    /// `Bad` once the alarm has gone off; never `Good`, since a watch has no end.
    pub fn verdict(&self, options: &Options) -> Verdict {
        if self.requests == 0 {
            return Verdict::NoData {
                explanation: "no requests since the promotion".to_owned(),
            };
        }
        let value = self.logs.iter().map(|log| log.exp_m1()).sum::<f64>() / RATIOS.len() as f64;
        let evidence = |explanation| Evidence {
            value,
            bound: options.level(),
            samples: self.requests,
            alpha: None,
            explanation,
        };
        if self.alarmed {
            return Verdict::Bad(evidence(format!(
                "{} of the last {} requests fail, {} % is normal; at most {} such alarms a day are false",
                text::percent(self.recent.1, self.recent.0),
                text::count(self.recent.0),
                text::short(100.0 * options.baseline),
                text::short(options.false_alarms_per_day),
            )));
        }
        Verdict::Undecided {
            evidence: evidence(format!(
                "nothing unusual in {} requests since the promotion",
                text::count(self.requests)
            )),
            missing: Missing {
                what: "nothing; a watch has no end".to_owned(),
                seconds: None,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Random;

    #[test]
    fn false_alarms_are_no_more_frequent_than_promised() {
        // A "day" of 2,000 batches with one false alarm allowed: over 400 days at most some 400.
        let options = Options {
            baseline: 0.01,
            false_alarms_per_day: 1.0,
            batches_per_day: 2000.0,
        };
        let mut random = Random::new(21);
        let mut watch = Watch::default();
        let mut alarms = 0;
        let days = 100;
        for _ in 0..days * 2000 {
            watch.observe(50, random.binomial(50, 0.01), &options);
            if watch.is_alarmed() {
                alarms += 1;
                watch = Watch::default();
            }
        }
        assert!(alarms <= days, "{alarms} alarms in {days} days");
    }

    #[test]
    fn a_regression_after_hours_of_quiet_is_found_within_seconds() {
        let options = Options::each_second(0.002, 1.0);
        let mut random = Random::new(22);
        let mut watch = Watch::default();
        for _ in 0..10_000 {
            watch.observe(200, random.binomial(200, 0.001), &options);
        }
        assert!(!watch.is_alarmed());
        let mut seconds = 0;
        while !watch.is_alarmed() {
            watch.observe(200, random.binomial(200, 0.05), &options);
            seconds += 1;
        }
        assert!(seconds <= 5, "{seconds} s");
        let verdict = watch.verdict(&options);
        assert!(
            verdict.is_bad() && verdict.explanation().contains("0.2 % is normal"),
            "{}",
            verdict.explanation()
        );
    }

    #[test]
    fn the_baseline_is_above_what_was_seen_and_close_with_many_requests() {
        assert!(upper_rate(100, 0, 0.01) > 0.02);
        let rate = upper_rate(1_000_000, 1000, 0.01);
        assert!(rate > 0.001 && rate < 0.0011, "{rate}");
        // Wilson's one-sided 97.5 % limit of 10 in 100: the published two-sided 95 % interval is (0.0552, 0.1744).
        assert!((upper_rate(100, 10, 0.025) - 0.1744).abs() < 0.0001);
    }

    #[test]
    fn a_trillion_requests_and_a_restart_do_no_harm() {
        let options = Options::each_second(0.001, 0.1);
        let mut watch = Watch::default();
        watch.observe(1_000_000_000_000, 0, &options);
        watch.observe(1_000_000_000_000, 900_000_000_000, &options);
        assert!(watch.is_alarmed());
        let text = serde_json::to_string(&watch).unwrap();
        assert!(text.len() < 300, "{text}");
        assert_eq!(serde_json::from_str::<Watch>(&text).unwrap(), watch);
    }
}
