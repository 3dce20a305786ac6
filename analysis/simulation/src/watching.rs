//! The watch after promotion: false alarms per day over many days, and how soon a change is found after hours of quiet.

use serin_analysis::judge::watch::{Options, Watch, upper_rate};

use crate::random::{self, Random};

/// What is watched.
#[derive(Clone, Copy, Debug)]
pub struct Scene {
    /// Requests per second.
    pub rps: f64,
    /// Share of failing requests while nothing is wrong.
    pub rate: f64,
    /// Whether the rate is exactly the baseline, which is the worst that still counts as normal; otherwise the baseline is
    /// what an hour before the promotion has shown, times the tolerance of 1.5.
    pub at_baseline: bool,
    /// Share of failing requests after something has happened.
    pub changed: f64,
}

/// The scenes of the documentation.
pub const SCENES: [Scene; 4] = [
    Scene {
        rps: 100.0,
        rate: 0.005,
        at_baseline: true,
        changed: 0.05,
    },
    Scene {
        rps: 100.0,
        rate: 0.001,
        at_baseline: false,
        changed: 0.02,
    },
    Scene {
        rps: 1000.0,
        rate: 0.001,
        at_baseline: false,
        changed: 0.005,
    },
    Scene {
        rps: 10.0,
        rate: 0.001,
        at_baseline: false,
        changed: 0.1,
    },
];

/// False alarms a day that are allowed here.
pub const ALLOWED: f64 = 1.0;
const DAY: u64 = 86_400;
/// Seconds of quiet before the change.
const QUIET: u64 = 3600;
/// Changes that are waited for.
const CHANGES: u64 = 400;

/// What came of it.
#[derive(Clone, Debug, PartialEq)]
pub struct Watched {
    /// Days that were watched.
    pub days: u64,
    /// Alarms in them.
    pub alarms: u64,
    /// Seconds until the change was found, sorted; the alarm before the change counts as found at once.
    pub found: Vec<u32>,
}

impl Scene {
    fn options(&self, random: &mut Random) -> Options {
        let baseline = if self.at_baseline {
            self.rate
        } else {
            let requests = (self.rps * QUIET as f64) as u64;
            1.5 * upper_rate(requests, random.binomial(requests, self.rate), 0.05)
        };
        Options::each_second(baseline, ALLOWED)
    }

    fn second(&self, rate: f64, watch: &mut Watch, options: &Options, random: &mut Random) {
        let requests = random.poisson(self.rps);
        watch.observe(requests, random.binomial(requests, rate), options);
    }

    /// Watches for so many days, and for four hundred changes.
    pub fn watch(&self, days: u64) -> Watched {
        let mut random = Random::new(random::seed("watch", (self.rps * 1e6 + self.rate * 1e9) as u64));
        let options = self.options(&mut random);
        let mut watch = Watch::default();
        let mut alarms = 0;
        for _ in 0..days * DAY {
            self.second(self.rate, &mut watch, &options, &mut random);
            if watch.is_alarmed() {
                alarms += 1;
                watch = Watch::default();
            }
        }
        let mut found: Vec<u32> = (0..CHANGES)
            .map(|_| {
                let mut watch = Watch::default();
                for _ in 0..QUIET {
                    self.second(self.rate, &mut watch, &options, &mut random);
                    if watch.is_alarmed() {
                        watch = Watch::default();
                    }
                }
                let mut seconds = 0;
                while !watch.is_alarmed() && u64::from(seconds) < DAY {
                    self.second(self.changed, &mut watch, &options, &mut random);
                    seconds += 1;
                }
                seconds
            })
            .collect();
        found.sort_unstable();
        Watched { days, alarms, found }
    }
}
