//! Many runs of a scenario, on all cores.

use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};

use crate::contest::{Call, Entry};
use crate::random;
use crate::scenario::Scenario;
use crate::stats::{confidence, quantile};
use crate::world::World;

/// Runs that a thread takes at a time.
const BLOCK: u64 = 16;

/// What became of one contestant in all runs of a scenario.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tally {
    /// Its name.
    pub name: String,
    /// Runs.
    pub runs: u64,
    /// Seconds until it said bad, of those runs in which it did; sorted.
    pub bad_at: Vec<u32>,
    /// Seconds until it said good for the first time; sorted.
    pub good_at: Vec<u32>,
    /// Canary requests that failed until it said bad, or until the end; summed over the runs.
    pub harmed: u64,
}

impl Tally {
    /// Share of runs in which it said bad.
    pub fn rate(&self) -> f64 {
        self.bad_at.len() as f64 / self.runs.max(1) as f64
    }

    /// 95 % confidence interval of [`Tally::rate`].
    pub fn interval(&self) -> (f64, f64) {
        confidence(self.bad_at.len() as u64, self.runs.max(1))
    }

    /// Seconds in which a share `q` of the runs was found bad.
    pub fn found_within(&self, q: f64) -> Option<u32> {
        quantile(&self.bad_at, self.runs, q)
    }

    /// Seconds in which a share `q` of the runs was found good.
    pub fn good_within(&self, q: f64) -> Option<u32> {
        quantile(&self.good_at, self.runs, q)
    }

    /// Canary requests that failed, per run.
    pub fn harmed_per_run(&self) -> f64 {
        self.harmed as f64 / self.runs.max(1) as f64
    }

    fn merge(&mut self, other: Self) {
        self.runs += other.runs;
        self.bad_at.extend(other.bad_at);
        self.good_at.extend(other.good_at);
        self.harmed += other.harmed;
    }
}

/// Lets every contestant see the same runs. `threads` changes how long it takes and nothing else.
pub fn contest(scenario: &Scenario, entries: &[Entry], runs: u64, threads: usize) -> Vec<Tally> {
    let next = AtomicU64::new(0);
    let work = || {
        let mut tallies = empty(entries);
        loop {
            let first = next.fetch_add(BLOCK, Ordering::Relaxed);
            if first >= runs {
                return tallies;
            }
            for number in first..(first + BLOCK).min(runs) {
                one(scenario, entries, number, &mut tallies);
            }
        }
    };
    let mut tallies = empty(entries);
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads.max(1)).map(|_| scope.spawn(work)).collect();
        for worker in workers {
            match worker.join() {
                Ok(part) => {
                    for (tally, part) in tallies.iter_mut().zip(part) {
                        tally.merge(part);
                    }
                }
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
    });
    for tally in &mut tallies {
        tally.bad_at.sort_unstable();
        tally.good_at.sort_unstable();
    }
    tallies
}

fn empty(entries: &[Entry]) -> Vec<Tally> {
    let tally = |entry: &Entry| Tally {
        name: entry.name.to_owned(),
        ..Tally::default()
    };
    entries.iter().map(tally).collect()
}

fn one(scenario: &Scenario, entries: &[Entry], number: u64, tallies: &mut [Tally]) {
    let mut world = World::new(scenario, random::seed(&scenario.name, number));
    let mut contestants: Vec<_> = entries
        .iter()
        .enumerate()
        .filter(|(_, entry)| number < entry.runs_max)
        .map(|(index, entry)| (index, (entry.make)(scenario), false))
        .collect();
    for (index, ..) in &contestants {
        tallies[*index].runs += 1;
    }
    let mut harmed = 0;
    for second in 1..=scenario.seconds {
        let seen = world.tick();
        harmed += seen.harmed;
        let (counts, restarted) = (world.counts(), world.restarted());
        let at = u32::try_from(second).unwrap_or(u32::MAX);
        contestants.retain_mut(|(index, contestant, was_good)| {
            if counts || !entries[*index].ours {
                match contestant.observe(second, &seen.sample) {
                    Call::Bad => {
                        tallies[*index].bad_at.push(at);
                        tallies[*index].harmed += harmed;
                        return false;
                    }
                    Call::Good if !*was_good => {
                        *was_good = true;
                        tallies[*index].good_at.push(at);
                    }
                    Call::Good | Call::Undecided => {}
                }
            }
            if restarted {
                contestant.restart();
            }
            true
        });
        if contestants.is_empty() {
            return;
        }
    }
    for (index, ..) in contestants {
        tallies[index].harmed += harmed;
    }
}
