//! Active health checks: what a row of results means for a host. Pure; the control side makes the checks.

use std::time::Duration;

use crate::config::health_check::Schedule;

/// How one check went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finding {
    /// The answer was good.
    Passed,
    /// No answer, or one that counts towards the threshold.
    Failed,
    /// An answer that says that the host is not fit: it goes out at once.
    Refused,
}

/// One host under one check.
///
/// As in Envoy: a host starts out unhealthy, its very first result decides alone; afterwards it takes
/// `unhealthy_threshold` failures or `healthy_threshold` successes in a row to change.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Whether the host may be used.
    pub healthy: bool,
    checked: bool,
    row: u32,
}

impl Tally {
    /// Of a host that is known to be healthy, or of which nothing is known.
    pub fn starting(healthy: bool) -> Self {
        Self {
            healthy,
            ..Self::default()
        }
    }

    /// Takes a result in; whether the host's state has changed by it, and how long to wait before the next check, to
    /// which the caller adds its jitter.
    pub fn record(&mut self, finding: Finding, schedule: &Schedule, traffic: bool) -> (bool, Duration) {
        let first = !std::mem::replace(&mut self.checked, true);
        let passed = finding == Finding::Passed;
        if passed == self.healthy {
            self.row = 0;
            return (false, self.interval(schedule, traffic));
        }
        self.row += 1;
        let needed = match (passed, finding) {
            _ if first => 1,
            (true, _) => schedule.healthy_threshold,
            (false, Finding::Refused) => 1,
            (false, _) => schedule.unhealthy_threshold,
        };
        if self.row < needed {
            let edge = if passed {
                schedule.healthy_edge_interval
            } else {
                schedule.unhealthy_edge_interval
            };
            return (false, edge);
        }
        self.healthy = passed;
        self.row = 0;
        (true, self.interval(schedule, traffic))
    }

    fn interval(&self, schedule: &Schedule, traffic: bool) -> Duration {
        match (traffic, self.healthy) {
            (false, true) => schedule.no_traffic.0,
            (false, false) => schedule.no_traffic.1,
            (true, true) => schedule.interval,
            (true, false) => schedule.unhealthy_interval,
        }
    }
}

/// The jitter of one interval, for a uniform draw.
pub fn jitter(schedule: &Schedule, interval: Duration, random: u64) -> Duration {
    let share = random as f64 / u64::MAX as f64;
    schedule.jitter.mul_f64(share) + interval.mul_f64(share * f64::from(schedule.jitter_percent) / 100.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schedule() -> Schedule {
        let seconds = Duration::from_secs;
        Schedule {
            timeout: seconds(1),
            interval: seconds(10),
            unhealthy_interval: seconds(20),
            unhealthy_edge_interval: seconds(3),
            healthy_edge_interval: seconds(4),
            no_traffic: (seconds(50), seconds(60)),
            initial_jitter: Duration::ZERO,
            jitter: seconds(2),
            jitter_percent: 10,
            unhealthy_threshold: 3,
            healthy_threshold: 2,
        }
    }

    /// Runs findings (`+`, `-`, `!` for refused) and returns the states as `H` and `U`.
    fn states(findings: &str) -> String {
        let mut tally = Tally::default();
        findings
            .chars()
            .map(|finding| {
                let finding = match finding {
                    '+' => Finding::Passed,
                    '-' => Finding::Failed,
                    _ => Finding::Refused,
                };
                tally.record(finding, &schedule(), true);
                if tally.healthy { 'H' } else { 'U' }
            })
            .collect()
    }

    #[test]
    fn the_first_result_decides_alone_and_later_ones_need_a_row() {
        for (findings, expected) in [
            ("+", "H"),
            ("-", "U"),
            ("+--+---", "HHHHHHU"),
            ("-+-++", "UUUUH"),
            ("+!", "HU"),
            ("+!+-++", "HUUUUH"),
        ] {
            assert_eq!(states(findings), expected, "{findings}");
        }
    }

    #[test]
    fn the_interval_is_that_of_the_state_and_of_its_edges() {
        let mut tally = Tally::default();
        let schedule = schedule();
        let mut next = |finding, traffic| tally.record(finding, &schedule, traffic).1.as_secs();
        assert_eq!(next(Finding::Passed, false), 50);
        assert_eq!(next(Finding::Passed, true), 10);
        assert_eq!(next(Finding::Failed, true), 3);
        assert_eq!(next(Finding::Failed, true), 3);
        assert_eq!(next(Finding::Failed, true), 20);
        assert_eq!(next(Finding::Failed, false), 60);
        assert_eq!(next(Finding::Passed, true), 4);
        assert_eq!(next(Finding::Passed, true), 10);
    }

    #[test]
    fn jitter_stays_within_what_is_configured() {
        let ten = Duration::from_secs(10);
        assert_eq!(jitter(&schedule(), ten, 0), Duration::ZERO);
        let most = jitter(&schedule(), ten, u64::MAX);
        assert!((most.as_secs_f64() - 3.0).abs() < 1e-9, "{most:?}");
    }
}
