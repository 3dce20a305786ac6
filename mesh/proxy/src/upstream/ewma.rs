//! Peak EWMA: the latency of a host as a moving average that jumps up at once and comes down slowly.
//!
//! A sample above the average becomes the average; one below pulls it down by `1 - exp(-elapsed / decay)` (Finagle's
//! and Linkerd's rule). The time is an argument; one cell per host and worker, written by its own worker only.

use std::cell::Cell;
use std::time::Duration;

/// See the module.
#[derive(Debug, Default)]
pub struct Ewma {
    /// Milliseconds; 0 while nothing was measured.
    cost: Cell<f64>,
    /// Of the last sample, on the process clock in milliseconds.
    at: Cell<u64>,
}

impl Ewma {
    /// Takes a latency that was measured at `now_ms`.
    pub fn observe(&self, latency: Duration, now_ms: u64, decay: Duration) {
        let sample = latency.as_secs_f64() * 1000.0;
        let before = self.cost.get();
        let next = if before == 0.0 || sample >= before {
            sample
        } else {
            let elapsed = now_ms.saturating_sub(self.at.get()) as f64;
            let keep = (-elapsed / (decay.as_secs_f64() * 1000.0).max(1.0)).exp();
            before * keep + sample * (1.0 - keep)
        };
        // Never 0 once measured: 0 means not measured.
        self.cost.set(next.max(0.001));
        self.at.set(now_ms);
    }

    /// What the next request would cost beside `active` others, in milliseconds: comparable between hosts.
    pub fn cost(&self, active: u32, default_rtt: Duration) -> f64 {
        let latency = match self.cost.get() {
            0.0 => default_rtt.as_secs_f64() * 1000.0,
            measured => measured,
        };
        latency * (f64::from(active) + 1.0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const DECAY: Duration = Duration::from_secs(10);
    const DEFAULT: Duration = Duration::from_millis(10);

    #[test]
    fn a_peak_counts_at_once_and_is_forgotten_slowly() {
        let ewma = Ewma::default();
        assert_eq!(ewma.cost(0, DEFAULT), 10.0, "nothing measured yet");
        ewma.observe(Duration::from_millis(5), 0, DECAY);
        ewma.observe(Duration::from_millis(500), 1, DECAY);
        assert_eq!(ewma.cost(0, DEFAULT), 500.0);
        assert_eq!(ewma.cost(1, DEFAULT), 1000.0);
        // After one decay time a third of the peak is left.
        ewma.observe(Duration::from_millis(5), 10_001, DECAY);
        let cost = ewma.cost(0, DEFAULT);
        assert!((180.0..195.0).contains(&cost), "{cost}");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn the_cost_stays_between_the_least_and_the_largest_sample(
            samples in proptest::collection::vec((1u64..5_000, 0u64..20_000), 1..40),
        ) {
            let ewma = Ewma::default();
            let mut now = 0;
            for (sample, gap) in &samples {
                now += gap;
                ewma.observe(Duration::from_millis(*sample), now, DECAY);
            }
            let least = samples.iter().map(|(sample, _)| *sample).min().unwrap_or_default() as f64;
            let most = samples.iter().map(|(sample, _)| *sample).max().unwrap_or_default() as f64;
            let cost = ewma.cost(0, DEFAULT);
            prop_assert!((least - 1e-6..=most + 1e-6).contains(&cost), "{cost} of {least} to {most}");
        }
    }
}
