//! Seconds of a scenario: what callers' proxies would report of both arms.
//!
//! Counts are drawn for the second as a whole, never request by request: a Poisson number of requests thinned by the
//! share is two Poisson numbers, independent failures are binomial, and a histogram is multinomial. All of that is
//! exact, and a simulated hour costs microseconds a second however much traffic there is.

use serin_analysis::{Counts, Sample};

use crate::latency::Buckets;
use crate::random::Random;
use crate::scenario::{Arrivals, Errors, Mitigation, Scenario};

/// Clients of a scenario with sticky sessions.
const CLIENTS: usize = 200;
/// Seconds of warm-up that do not count with [`Mitigation::WarmUp`].
pub const WARM_UP: u64 = 120;
/// How fast caches warm.
const WARMING: f64 = 20.0;

/// The state of one run.
pub struct World<'s> {
    scenario: &'s Scenario,
    random: Random,
    second: u64,
    /// In a burst, or in an outage.
    excited: bool,
    failing: bool,
    /// Rank of each client (it goes to the canary when this is below the share) and its part of the traffic.
    clients: Vec<(f64, f64)>,
    share: (f64, f64),
    latency: Option<(Buckets, Buckets)>,
}

/// One second.
#[derive(Clone, Debug, Default)]
pub struct Second {
    /// What is reported.
    pub sample: Sample,
    /// Canary requests that failed, whether they count or not.
    pub harmed: u64,
}

impl<'s> World<'s> {
    /// The run with this seed.
    pub fn new(scenario: &'s Scenario, seed: u64) -> Self {
        let mut random = Random::new(seed);
        let mut clients = Vec::new();
        if scenario.sticky {
            // Unequal: a few clients make most of the traffic.
            clients = (0..CLIENTS)
                .map(|_| (random.unit(), random.normal().exp()))
                .collect();
            let total: f64 = clients.iter().map(|(_, weight)| weight).sum();
            for (_, weight) in &mut clients {
                *weight /= total;
            }
        }
        let latency = scenario
            .latency
            .map(|latency| (latency.slower(scenario.slower).buckets(), latency.buckets()));
        Self {
            scenario,
            random,
            second: 0,
            excited: false,
            failing: false,
            clients,
            share: (f64::NAN, 0.0),
            latency,
        }
    }

    fn rate(&mut self) -> f64 {
        let rps = self.scenario.rps;
        match self.scenario.arrivals {
            Arrivals::Poisson => rps,
            Arrivals::Bursts => {
                let leave = if self.excited { 1.0 / 10.0 } else { 1.0 / 50.0 };
                self.excited ^= self.random.chance(leave);
                // A sixth of the time at four times the usual rate: the mean is the scenario's.
                if self.excited {
                    rps * 8.0 / 3.0
                } else {
                    rps * 2.0 / 3.0
                }
            }
            Arrivals::Diurnal => {
                let phase = std::f64::consts::TAU * self.second as f64 / 3600.0;
                rps * (1.0 - 0.8 * phase.cos())
            }
        }
    }

    /// Share of the traffic that really goes to the canary.
    fn share(&mut self) -> f64 {
        let ladder = self.scenario.ladder.iter().rev();
        let wanted = ladder
            .into_iter()
            .find(|(from, _)| *from <= self.second)
            .map_or(0.0, |(_, share)| *share);
        if !self.scenario.sticky {
            return wanted;
        }
        if self.share.0 != wanted {
            let there = self.clients.iter().filter(|(rank, _)| *rank < wanted);
            self.share = (wanted, there.map(|(_, weight)| weight).sum());
        }
        self.share.1
    }

    /// The next second.
    pub fn tick(&mut self) -> Second {
        let (rate, share) = (self.rate(), self.share());
        let mut canary = self.random.poisson(rate * share);
        let mut primary = self.random.poisson(rate * (1.0 - share));
        let scenario = self.scenario;
        let (mut p_canary, mut p_primary) = (scenario.canary, scenario.base);
        let (mut counted, mut told) = (None, None::<[u64; 2]>);
        match scenario.errors {
            Errors::Independent => {}
            Errors::SharedOutage => {
                let leave = if self.failing { 1.0 / 20.0 } else { 1.0 / 300.0 };
                self.failing ^= self.random.chance(leave);
                if self.failing {
                    p_canary = 1.0 - (1.0 - p_canary) * 0.7;
                    p_primary = 1.0 - (1.0 - p_primary) * 0.7;
                }
            }
            Errors::ColdCache { factor } => {
                let warm = (-(self.second as f64) / WARMING).exp();
                p_canary = (p_canary * (1.0 + (factor - 1.0) * warm)).min(1.0);
            }
            Errors::BadPrimaryPod { share } => p_primary = 0.9 * p_primary + 0.1 * share,
            Errors::ClientClusters { mean } => {
                // So many failing clients that the share of failing requests is the scenario's.
                let clients =
                    [canary, primary].map(|requests| self.random.binomial(requests, scenario.base / mean));
                let failed =
                    clients.map(|clients| (0..clients).map(|_| self.random.geometric(mean)).sum::<u64>());
                counted = Some(failed);
                told = Some(clients);
                // The repetitions are requests too.
                canary += failed[0] - clients[0];
                primary += failed[1] - clients[1];
            }
            Errors::RetryStorm { again } => {
                let first = [
                    self.random.binomial(canary, p_canary),
                    self.random.binomial(primary, p_primary),
                ];
                let mut failed = first;
                let mut waiting = first[0] + first[1];
                for _ in 0..3 {
                    // Every repetition is a new request, which the mesh sends by weight.
                    let to_canary = self.random.binomial(waiting, share);
                    let to_primary = waiting - to_canary;
                    canary += to_canary;
                    primary += to_primary;
                    let again = [to_canary, to_primary].map(|sent| self.random.binomial(sent, again));
                    failed[0] += again[0];
                    failed[1] += again[1];
                    waiting = again[0] + again[1];
                }
                counted = Some(failed);
            }
        }
        let [canary_errors, primary_errors] = counted.unwrap_or_else(|| {
            [
                self.random.binomial(canary, p_canary),
                self.random.binomial(primary, p_primary),
            ]
        });
        self.second += 1;
        let mut sample = Sample {
            at_ms: i64::try_from(self.second).unwrap_or(i64::MAX) * 1000,
            from_ms: None,
            canary: Counts {
                requests: canary,
                errors: canary_errors,
                error_clients: told.map(|clients| clients[0]),
                ..Counts::default()
            },
            primary: Counts {
                requests: primary,
                errors: primary_errors,
                error_clients: told.map(|clients| clients[1]),
                ..Counts::default()
            },
        };
        if let Some((of_canary, of_primary)) = &self.latency {
            of_canary.draw(canary, &mut self.random, &mut sample.canary.latency);
            of_primary.draw(primary, &mut self.random, &mut sample.primary.latency);
        }
        Second {
            harmed: canary_errors,
            sample,
        }
    }

    /// Whether what was reported in the second before counts for the verdict.
    pub fn counts(&self) -> bool {
        self.scenario.mitigation != Mitigation::WarmUp || self.second > WARM_UP
    }

    /// Whether the controller died after the second before.
    pub fn restarted(&self) -> bool {
        self.scenario
            .restart_every
            .is_some_and(|every| self.second.is_multiple_of(every))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scenario::{healthy, regressions};

    #[test]
    fn every_scenario_has_the_traffic_and_the_errors_that_it_names() {
        for scenario in healthy().iter().chain(&regressions()) {
            let mut totals = Sample::default();
            for run in 0..8 {
                let mut world = World::new(scenario, run);
                for _ in 0..scenario.seconds {
                    totals.add(&world.tick().sample);
                }
            }
            let requests = (totals.canary.requests + totals.primary.requests) as f64;
            let expected = scenario.rps * scenario.seconds as f64 * 8.0;
            let grown = match scenario.errors {
                Errors::RetryStorm { .. } | Errors::ClientClusters { .. } => 0.03,
                _ => 0.0,
            };
            let spread = if scenario.arrivals == Arrivals::Bursts {
                0.1
            } else {
                0.02
            };
            assert!(
                (requests / expected - 1.0).abs() < spread + grown,
                "{}: {requests}",
                scenario.name
            );
            if scenario.errors == Errors::Independent {
                let share = totals.primary.errors as f64 / totals.primary.requests as f64;
                let spread = 5.0 * (scenario.base / totals.primary.requests as f64).sqrt();
                assert!(
                    (share - scenario.base).abs() < spread,
                    "{}: {share}",
                    scenario.name
                );
            }
        }
    }

    #[test]
    fn a_run_is_repeated_exactly_by_its_seed() {
        for scenario in healthy() {
            let mut one = World::new(&scenario, 9);
            let mut two = World::new(&scenario, 9);
            for _ in 0..50 {
                assert_eq!(one.tick().sample, two.tick().sample, "{}", scenario.name);
            }
        }
    }
}
