//! Choosing an endpoint: priorities, health, panic, and the balancing policies.
//!
//! The common case (one priority, everybody healthy) looks at nothing but the hosts it draws.

use std::cell::Cell;
use std::rc::Rc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::cluster::Host;
use super::consistent::Table;
use super::outlier::is_ejected;
use crate::clock::now_ms;
use crate::config::cluster::{Cluster, LbPolicy, SlowStart};
use crate::config::endpoint::EndpointSet;
use crate::random;

/// The hosts of one priority.
#[derive(Debug)]
struct Level {
    hosts: Vec<Rc<Host>>,
    /// Localities with weights, as ranges of `hosts`; one without a weight when weights do not count.
    localities: Vec<(u32, std::ops::Range<usize>)>,
    /// Hosts that EDS calls unusable are not in `hosts`; they count here.
    total: usize,
    /// The largest weight.
    heaviest: u32,
    /// Everybody that EDS names, for panic.
    everybody: Vec<Rc<Host>>,
    table: Option<Table>,
}

/// The balancer of one cluster on one worker.
#[derive(Debug, Default)]
pub struct Balancer {
    levels: Vec<Level>,
    turn: Cell<u64>,
    /// Until when some host is young enough for slow start.
    slow_until: u64,
    overprovisioning: u32,
}

/// What a request brings to the choice.
#[derive(Clone, Copy, Debug, Default)]
pub struct Wish<'a> {
    /// Hash for consistent hashing.
    pub hash: Option<u64>,
    /// Hosts to avoid.
    pub tried: &'a [Rc<Host>],
    /// How many draws may be spent on avoiding them.
    pub attempts: u32,
    /// Whether outlier detection may have anybody out; when not, nobody is asked.
    pub some_ejected: bool,
}

impl Balancer {
    /// For `hosts`, which are those of `set` in the same order.
    pub fn new(cluster: &Cluster, set: &EndpointSet, hosts: &[Rc<Host>]) -> Self {
        let checks = cluster.health_checks.len();
        let slow_until = cluster.slow_start.map_or(0, |slow| {
            let youngest = hosts
                .iter()
                .map(|host| host.endpoint.state.since.load(Ordering::Relaxed))
                .max();
            youngest.unwrap_or(0) + slow.window.as_millis() as u64
        });
        let levels = set
            .priorities
            .iter()
            .map(|localities| {
                let mut level = Level {
                    hosts: Vec::new(),
                    localities: Vec::new(),
                    total: 0,
                    heaviest: 1,
                    everybody: Vec::new(),
                    table: None,
                };
                for locality in localities {
                    let start = level.hosts.len();
                    let members = &hosts[locality.members.clone()];
                    level.everybody.extend(members.iter().cloned());
                    level.hosts.extend(
                        members
                            .iter()
                            .filter(|host| host.endpoint.usable(checks))
                            .cloned(),
                    );
                    level.total += members.len();
                    if level.hosts.len() > start && cluster.locality_weighted {
                        // The share shrinks only once less than 1/1.4 of the locality is usable.
                        let usable = (level.hosts.len() - start) as u64 * u64::from(set.overprovisioning);
                        let effective = u64::from(locality.weight) * usable.min(members.len() as u64 * 100);
                        level.localities.push((
                            (effective / members.len() as u64) as u32,
                            start..level.hosts.len(),
                        ));
                    }
                }
                level.heaviest = level
                    .everybody
                    .iter()
                    .map(|host| host.endpoint.weight)
                    .max()
                    .unwrap_or(1);
                level.localities.retain(|(weight, _)| *weight > 0);
                if level.localities.is_empty() {
                    level.localities.push((1, 0..level.hosts.len()));
                }
                let named: Vec<(&str, u32)> = level
                    .hosts
                    .iter()
                    .map(|host| (&*host.endpoint.text, host.endpoint.weight))
                    .collect();
                level.table = match cluster.lb {
                    LbPolicy::RingHash { minimum } => Some(Table::ring(&named, minimum)),
                    LbPolicy::Maglev { size } => Some(Table::maglev(&named, size)),
                    LbPolicy::RoundRobin | LbPolicy::LeastRequest { .. } | LbPolicy::Random => None,
                };
                level
            })
            .collect();
        // Workers and restarts start at different hosts.
        Self {
            levels,
            turn: Cell::new(random::next() >> 32),
            slow_until,
            overprovisioning: set.overprovisioning,
        }
    }

    /// A host, or `None` if no host may be used.
    pub fn pick(&self, cluster: &Cluster, wish: &Wish<'_>) -> Option<Rc<Host>> {
        let mut level = self.level(cluster, wish.some_ejected)?;
        if self.slow_until > 0
            && let Some(slow) = cluster.slow_start
        {
            let now = now_ms();
            level.slow = (now < self.slow_until).then_some((slow, now));
        }
        let mut last = None;
        for draw in 0..wish.attempts.max(1) {
            let host = level.draw(cluster, wish, draw as usize, &self.turn)?;
            if !wish.tried.iter().any(|tried| Rc::ptr_eq(&tried.pool, &host.pool)) {
                return Some(host);
            }
            last = Some(host);
        }
        // Chance kept hitting hosts that were tried: take one that was not, if there is one.
        let fresh = level.hosts.iter().find(|host| {
            !host.ejected() && !wish.tried.iter().any(|tried| Rc::ptr_eq(&tried.pool, &host.pool))
        });
        if wish.tried.is_empty() {
            last
        } else {
            fresh.cloned().or(last)
        }
    }

    /// The priority level for this request: each takes as much of the load as its usable share, times the
    /// overprovisioning factor, allows.
    fn level(&self, cluster: &Cluster, some_ejected: bool) -> Option<LevelView<'_>> {
        let (first, rest) = self.levels.split_first()?;
        if rest.is_empty() || first.total == 0 && rest.iter().all(|level| level.total == 0) {
            return first.view(cluster, some_ejected);
        }
        let share = |level: &Level| {
            let scaled = level.usable() * self.overprovisioning as usize;
            scaled.checked_div(level.total).unwrap_or(0).min(100)
        };
        let shares: Vec<usize> = self.levels.iter().map(share).collect();
        let sum: usize = shares.iter().sum();
        let scale = sum.clamp(1, 100);
        let mut point = random::below(scale);
        for (level, share) in self.levels.iter().zip(&shares) {
            if point < *share {
                return level.view(cluster, some_ejected);
            }
            point -= share;
        }
        // Nobody is usable anywhere: panic decides on the first level that has anybody.
        self.levels
            .iter()
            .find(|level| level.total > 0)?
            .view(cluster, some_ejected)
    }
}

struct LevelView<'a> {
    hosts: &'a [Rc<Host>],
    localities: &'a [(u32, std::ops::Range<usize>)],
    heaviest: u32,
    table: Option<&'a Table>,
    panic: bool,
    /// The time, while slow start has a say.
    slow: Option<(SlowStart, u64)>,
}

impl Level {
    fn usable(&self) -> usize {
        self.hosts.iter().filter(|host| !host.ejected()).count()
    }

    fn view(&self, cluster: &Cluster, some_ejected: bool) -> Option<LevelView<'_>> {
        let healthy = self.hosts.len();
        if healthy < self.total || some_ejected {
            let usable = if some_ejected { self.usable() } else { healthy };
            if (usable as f64) * 100.0 < cluster.panic_threshold * self.total as f64 {
                return Some(LevelView {
                    hosts: &self.everybody,
                    localities: &[],
                    heaviest: self.heaviest,
                    table: None,
                    panic: true,
                    slow: None,
                });
            }
            if usable == 0 {
                return None;
            }
        }
        (healthy > 0).then_some(LevelView {
            hosts: &self.hosts,
            localities: &self.localities,
            heaviest: self.heaviest,
            table: self.table.as_ref(),
            panic: false,
            slow: None,
        })
    }
}

impl LevelView<'_> {
    fn draw(&self, cluster: &Cluster, wish: &Wish<'_>, attempt: usize, turn: &Cell<u64>) -> Option<Rc<Host>> {
        if let (Some(table), Some(hash)) = (self.table, wish.hash) {
            let host = (0..self.hosts.len().max(1))
                .filter_map(|step| table.find(hash, attempt + step))
                .map(|index| &self.hosts[index])
                .find(|host| self.may_use(host));
            return host.cloned();
        }
        let hosts = match self.localities {
            [] => self.hosts,
            [(_, only)] => &self.hosts[only.clone()],
            several => {
                let total: u64 = several.iter().map(|(weight, _)| u64::from(*weight)).sum();
                let mut point = random::below(total as usize) as u64;
                let range = several.iter().find(|(weight, _)| {
                    let here = point < u64::from(*weight);
                    point = point.saturating_sub(u64::from(*weight));
                    here
                });
                &self.hosts[range?.1.clone()]
            }
        };
        let chosen = match cluster.lb {
            LbPolicy::RoundRobin => self.round_robin(hosts, turn),
            LbPolicy::LeastRequest { choices } => self.least_request(hosts, choices),
            // Without a hash the consistent policies choose at random, as Envoy does.
            LbPolicy::Random | LbPolicy::RingHash { .. } | LbPolicy::Maglev { .. } => self.random(hosts),
        };
        // Chance may miss the few usable ones; then they are looked for.
        chosen
            .or_else(|| hosts.iter().find(|host| self.may_use(host)))
            .or_else(|| self.hosts.iter().find(|host| self.may_use(host)))
            .cloned()
    }

    fn may_use(&self, host: &Host) -> bool {
        self.panic || !host.ejected()
    }

    /// The part of its weight that a host has by its age.
    fn factor(&self, host: &Host) -> f64 {
        self.slow.map_or(1.0, |(slow, now)| {
            let since = host.endpoint.state.since.load(Ordering::Relaxed);
            if since == 0 {
                return 1.0;
            }
            slow.factor(Duration::from_millis(now.saturating_sub(since)))
        })
    }

    /// Whether a draw accepts the host by its age.
    fn old_enough(&self, host: &Host) -> bool {
        if self.slow.is_none() {
            return true;
        }
        let factor = self.factor(host);
        factor >= 1.0 || (random::next() as f64) < factor * u64::MAX as f64
    }

    /// In turn; a host of weight `w` takes its turn in `w` of `heaviest` rounds, spread evenly.
    fn round_robin<'h>(&self, hosts: &'h [Rc<Host>], turn: &Cell<u64>) -> Option<&'h Rc<Host>> {
        let count = hosts.len() as u64;
        if count == 0 {
            return None;
        }
        let heaviest = u64::from(self.heaviest);
        for _ in 0..count * heaviest.min(1000) {
            let n = turn.get();
            turn.set(n.wrapping_add(1));
            let host = &hosts[(n % count) as usize];
            let (round, weight) = (n / count, u64::from(host.endpoint.weight));
            // Takes its turn when the multiple of weight/heaviest steps over a whole number.
            let takes = (round + 1) * weight / heaviest > round * weight / heaviest;
            if takes && self.may_use(host) && self.old_enough(host) {
                return Some(host);
            }
        }
        None
    }

    fn least_request<'h>(&self, hosts: &'h [Rc<Host>], choices: u32) -> Option<&'h Rc<Host>> {
        let mut best: Option<&Rc<Host>> = None;
        for _ in 0..choices {
            // A young host is drawn less often, which is how its weight is smaller here.
            let Some(host) = self.random(hosts) else { continue };
            // Compared as requests per weight, without a division.
            let better = best.is_none_or(|best| {
                u64::from(host.active.get()) * u64::from(best.endpoint.weight)
                    < u64::from(best.active.get()) * u64::from(host.endpoint.weight)
            });
            if better {
                best = Some(host);
            }
        }
        best
    }

    fn random<'h>(&self, hosts: &'h [Rc<Host>]) -> Option<&'h Rc<Host>> {
        if hosts.is_empty() {
            return None;
        }
        // Rejection sampling by weight: one draw when the weights are equal.
        let heaviest = self.heaviest;
        for _ in 0..32 {
            let host = &hosts[random::below(hosts.len())];
            if (host.endpoint.weight == heaviest
                || random::below(heaviest as usize) < host.endpoint.weight as usize)
                && self.may_use(host)
                && self.old_enough(host)
            {
                return Some(host);
            }
        }
        None
    }
}

impl Host {
    /// Whether outlier detection has the host out now.
    pub fn ejected(&self) -> bool {
        is_ejected(&self.endpoint.state, now_ms)
    }
}

#[cfg(test)]
mod tests;
