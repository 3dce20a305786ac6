//! Argo Rollouts' rule: at every `interval` a measurement (here the same window of a minute) is successful or failed;
//! more than `failureLimit` failed ones abort at once.

use serin_analysis::Sample;

use super::{Window, is_bad};
use crate::contest::{Call, Contestant};

/// The rule with its two numbers.
pub struct Argo {
    interval: u64,
    failure_limit: u32,
    failed: u32,
    window: Window,
}

impl Argo {
    /// `interval` in seconds and `failureLimit` (0 by default, there).
    pub fn new(interval: u64, failure_limit: u32) -> Self {
        Self {
            interval: interval.max(1),
            failure_limit,
            failed: 0,
            window: Window::default(),
        }
    }
}

impl Contestant for Argo {
    fn observe(&mut self, second: u64, sample: &Sample) -> Call {
        self.window.push(&sample.canary);
        if second.is_multiple_of(self.interval) && is_bad(&self.window.total()) {
            self.failed += 1;
        }
        if self.failed > self.failure_limit {
            Call::Bad
        } else {
            Call::Undecided
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_failure_more_than_the_limit_aborts_at_once() {
        let mut argo = Argo::new(10, 2);
        let bad = (1..=60).find(|second| argo.observe(*second, &Sample::default()) == Call::Bad);
        assert_eq!(bad, Some(30));
    }
}
