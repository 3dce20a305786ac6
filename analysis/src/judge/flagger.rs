//! Flagger's rule whole, for those who want it and to be compared with: every interval the metrics are checked in order,
//! the first that fails ends the check and counts; when `threshold` checks have failed in the run, the next interval rolls
//! back. Failed checks are never taken back.
//!
//! As in Flagger 1.44 (`pkg/controller/scheduler.go`): the value of a metric is computed over the canary's last
//! `window`; no value at all counts as a failed check; the rollback happens one interval after the check that reached the
//! threshold, because it is looked at before the check.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use super::threshold::{self, Builtin, Range};
use crate::sample::{Counts, Sample};
use crate::text;
use crate::verdict::{Evidence, Missing, Verdict};

/// `spec.analysis` as far as it judges.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Options {
    /// `interval`, in milliseconds. Flagger raises everything below 10 s to 10 s; this does not.
    pub interval_ms: i64,
    /// `threshold`: failed checks until the rollback; 0 and less mean 1.
    pub threshold: u32,
    /// `metrics`, in order.
    pub metrics: Vec<Metric>,
}

/// One of `metrics[]`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Metric {
    /// What is measured.
    pub builtin: Builtin,
    /// `thresholdRange`.
    pub range: Range,
    /// `interval` of the metric, in milliseconds: how far back its value reaches.
    pub window_ms: i64,
}

/// Longest history kept, in samples: the windows of an hour at one a second.
const SAMPLES_MAX: usize = 3600;

/// Where the rule stands.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Flagger {
    failed_checks: u32,
    checks: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    next_tick_ms: Option<i64>,
    rolled_back: bool,
    last_failure: String,
    /// Not part of the kept state: Prometheus has it.
    #[serde(skip)]
    samples: VecDeque<(i64, Counts)>,
}

impl Flagger {
    /// Takes in one interval of measurements and ticks when it is time.
    pub fn observe(&mut self, sample: &Sample, options: &Options) {
        if self.samples.len() >= SAMPLES_MAX {
            self.samples.pop_front();
        }
        self.samples.push_back((sample.at_ms, sample.canary.clone()));
        let interval = options.interval_ms.max(1);
        let tick = *self
            .next_tick_ms
            .get_or_insert_with(|| sample.at_ms.saturating_add(interval));
        if sample.at_ms < tick {
            return;
        }
        // A gap in the record is one tick late, not many ticks at once.
        self.next_tick_ms = Some(tick.saturating_add(interval).max(sample.at_ms));
        self.tick(sample.at_ms, options);
    }

    fn tick(&mut self, now_ms: i64, options: &Options) {
        if self.rolled_back || self.failed_checks >= options.threshold.max(1) {
            self.rolled_back = true;
            return;
        }
        self.checks = self.checks.saturating_add(1);
        for metric in &options.metrics {
            let from = now_ms.saturating_sub(metric.window_ms);
            let mut window = Counts::default();
            for (_, counts) in self.samples.iter().rev().take_while(|(at, _)| *at > from) {
                window.add(counts);
            }
            let verdict = threshold::judge(metric.builtin, metric.range, &window);
            if !verdict.is_good() {
                self.failed_checks = self.failed_checks.saturating_add(1);
                verdict.explanation().clone_into(&mut self.last_failure);
                return;
            }
        }
    }

    /// Failed checks so far.
    pub const fn failed_checks(&self) -> u32 {
        self.failed_checks
    }

    /// Checks so far.
    pub const fn checks(&self) -> u32 {
        self.checks
    }

    /// `Bad` once it has rolled back; never `Good`: Flagger knows no such thing.
    pub fn verdict(&self, options: &Options) -> Verdict {
        let threshold = options.threshold.max(1);
        let evidence = |explanation| Evidence {
            value: f64::from(self.failed_checks),
            bound: f64::from(threshold),
            samples: u64::from(self.checks),
            alpha: None,
            explanation,
        };
        let facts = format!(
            "{} of {} checks failed, threshold {threshold}",
            self.failed_checks, self.checks
        );
        let told = if self.last_failure.is_empty() {
            facts
        } else {
            format!("{facts}; last: {}", self.last_failure)
        };
        if self.rolled_back {
            return Verdict::Bad(evidence(told));
        }
        let interval = options.interval_ms.max(1) as f64 / 1000.0;
        Verdict::Undecided {
            evidence: evidence(told),
            missing: Missing {
                what: format!("the next check, every {}", text::seconds(interval)),
                seconds: Some(interval),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(threshold: u32) -> Options {
        Options {
            interval_ms: 60_000,
            threshold,
            metrics: vec![Metric {
                builtin: Builtin::RequestSuccessRate,
                range: Range {
                    min: Some(99.0),
                    max: None,
                },
                window_ms: 60_000,
            }],
        }
    }

    /// Seconds until the rollback, when each second has ten requests and `errors(second)` of them fail.
    fn rolled_back_at(options: &Options, errors: impl Fn(i64) -> u64) -> Option<i64> {
        let mut rule = Flagger::default();
        (0..3600).find(|second| {
            let sample = Sample {
                at_ms: second * 1000,
                from_ms: None,
                canary: Counts {
                    requests: 10,
                    errors: errors(*second),
                    ..Counts::default()
                },
                ..Sample::default()
            };
            rule.observe(&sample, options);
            rule.verdict(options).is_bad()
        })
    }

    #[test]
    fn five_failed_checks_at_a_minute_each_take_six_minutes_to_roll_back() {
        assert_eq!(rolled_back_at(&options(5), |_| 5), Some(360));
        assert_eq!(rolled_back_at(&options(1), |_| 5), Some(120));
    }

    #[test]
    fn a_regression_under_the_line_is_never_seen() {
        // One request in a thousand before, nine in a thousand now.
        assert_eq!(
            rolled_back_at(&options(1), |second| u64::from(second % 12 == 0)),
            None
        );
    }

    #[test]
    fn failed_checks_add_up_over_the_run_and_are_never_taken_back() {
        // Every fourth minute is bad.
        let errors = |second: i64| u64::from((second / 60) % 4 == 0);
        assert!(rolled_back_at(&options(5), errors).is_some());
    }

    #[test]
    fn no_requests_count_as_a_failed_check() {
        let mut rule = Flagger::default();
        let options = options(1);
        for second in 0..=120 {
            let sample = Sample {
                at_ms: second * 1000,
                from_ms: None,
                ..Sample::default()
            };
            rule.observe(&sample, &options);
        }
        assert!(rule.verdict(&options).is_bad());
        assert_eq!((rule.failed_checks(), rule.checks()), (1, 1));
    }
}
