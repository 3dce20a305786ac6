//! Flagger's rule: at every `interval` the window of the last minute is held against the limits; a window outside is a
//! failed check; the tick after the one at which `threshold` checks have failed rolls back. Failed checks add up over the
//! whole run. A window without data is a failed check.

use serin_analysis::Sample;

use super::{Window, is_bad};
use crate::contest::{Call, Contestant};

/// The rule with its two numbers.
pub struct Flagger {
    interval: u64,
    threshold: u32,
    failed: u32,
    window: Window,
}

impl Flagger {
    /// `analysis.interval` in seconds (at least 10, as there) and `analysis.threshold`.
    pub fn new(interval: u64, threshold: u32) -> Self {
        Self {
            interval: interval.max(10),
            threshold: threshold.max(1),
            failed: 0,
            window: Window::default(),
        }
    }
}

impl Contestant for Flagger {
    fn observe(&mut self, second: u64, sample: &Sample) -> Call {
        self.window.push(&sample.canary);
        if !second.is_multiple_of(self.interval) {
            return Call::Undecided;
        }
        if self.failed >= self.threshold {
            return Call::Bad;
        }
        if is_bad(&self.window.total()) {
            self.failed += 1;
        }
        Call::Undecided
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serin_analysis::Counts;

    fn second(errors: u64) -> Sample {
        Sample {
            canary: Counts {
                requests: 10,
                errors,
                ..Counts::default()
            },
            ..Sample::default()
        }
    }

    #[test]
    fn five_failed_checks_and_one_more_tick_roll_back() {
        let mut flagger = Flagger::new(60, 5);
        let bad = (1..=3600).find(|second_of| flagger.observe(*second_of, &second(1)) == Call::Bad);
        assert_eq!(bad, Some(360));
        let mut flagger = Flagger::new(60, 5);
        assert!((1..=3600).all(|second_of| flagger.observe(second_of, &second(0)) == Call::Undecided));
    }

    #[test]
    fn silence_is_a_failed_check() {
        let mut flagger = Flagger::new(10, 1);
        let bad = (1..=60).find(|second_of| flagger.observe(*second_of, &Sample::default()) == Call::Bad);
        assert_eq!(bad, Some(20));
    }
}
