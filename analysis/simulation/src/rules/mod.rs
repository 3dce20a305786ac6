//! The rules of others, as they are deployed.

pub mod argo;
pub mod flagger;
pub mod kayenta;

use std::collections::VecDeque;

use serin_analysis::Counts;

/// What Prometheus answers to a `[1m]` query about the canary: counts of the last 60 s.
#[derive(Default)]
pub struct Window {
    seconds: VecDeque<Counts>,
}

/// Length of the window.
const WINDOW: usize = 60;

impl Window {
    /// Takes in a second.
    pub fn push(&mut self, counts: &Counts) {
        if self.seconds.len() == WINDOW {
            self.seconds.pop_front();
        }
        self.seconds.push_back(counts.clone());
    }

    /// All of it.
    pub fn total(&self) -> Counts {
        let mut total = Counts::default();
        for counts in &self.seconds {
            total.add(counts);
        }
        total
    }
}

/// The limits that people configure, for both rules: at least 99 % of requests succeed, and the 99th percentile is at
/// most 500 ms.
pub const SUCCESS_MIN: f64 = 99.0;
/// See [`SUCCESS_MIN`].
pub const DURATION_MAX_MS: f64 = 500.0;

/// Whether a window is outside of the limits. No data is (0/0 is NaN, and no comparison with NaN holds).
pub fn is_bad(window: &Counts) -> bool {
    let success = window.success_rate_percent();
    let slow = !window.latency.counts.is_empty()
        && window
            .latency
            .quantile(0.99)
            .is_none_or(|p99| p99 > DURATION_MAX_MS);
    success.is_none_or(|rate| rate < SUCCESS_MIN) || slow
}
