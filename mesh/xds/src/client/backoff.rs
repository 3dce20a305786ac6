//! How long to wait before the next attempt to reach the control plane.

use std::time::Duration;

/// Bounds of the waits between connection attempts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BackoffRange {
    /// Longest first wait.
    pub initial: Duration,
    /// Longest wait ever.
    pub max: Duration,
}

impl Default for BackoffRange {
    /// 500 ms to 30 s, as Envoy's `initial_fetch` back-off and gRPC's connection back-off.
    fn default() -> Self {
        Self {
            initial: Duration::from_millis(500),
            max: Duration::from_secs(30),
        }
    }
}

/// Exponential back-off with full jitter above a tenth: a fleet that lost its control plane does not come back at once.
#[derive(Debug)]
pub(super) struct Backoff {
    range: BackoffRange,
    ceiling: Duration,
}

impl Backoff {
    pub(super) fn new(range: BackoffRange) -> Self {
        Self {
            range,
            ceiling: range.initial,
        }
    }

    /// The stream worked: the next failure starts from the beginning.
    pub(super) fn reset(&mut self) {
        self.ceiling = self.range.initial;
    }

    /// The next wait; `random` is uniform in 0..1.
    pub(super) fn next(&mut self, random: f64) -> Duration {
        let wait = self.ceiling.mul_f64(0.1 + 0.9 * random.clamp(0.0, 1.0));
        self.ceiling = (self.ceiling * 2).min(self.range.max);
        wait
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_the_maximum_and_start_again_after_success() {
        let mut backoff = Backoff::new(BackoffRange::default());
        let longest: Vec<_> = (0..8).map(|_| backoff.next(1.0).as_millis()).collect();
        assert_eq!(longest, [500, 1000, 2000, 4000, 8000, 16000, 30000, 30000]);
        backoff.reset();
        assert_eq!(backoff.next(0.0).as_millis(), 50);
    }
}
