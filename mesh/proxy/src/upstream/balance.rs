//! Choosing an endpoint: priorities, health, panic, localities and zones; the policies themselves are in `draw`.
//!
//! The common case (one priority, everybody healthy) looks at nothing but the hosts it draws.

use std::cell::{Cell, OnceCell};
use std::rc::Rc;
use std::sync::atomic::Ordering;

use super::cluster::Host;
use super::outlier::is_ejected;
use super::zone::ZoneRouting;
use crate::clock::now_ms;
use crate::config::balancing::reported::Reporting;
use crate::config::cluster::Cluster;
use crate::config::endpoint::EndpointSet;
use crate::config::retry::HostRules;
use crate::config::subset::Criteria;
use crate::random;

mod draw;
mod hashed;
mod loads;

use draw::{Compared, View};
use hashed::{Hashed, HashedHosts};
use loads::{Health, Loads};

/// Usable hosts of one priority that are equally well.
#[derive(Debug, Default)]
struct Group {
    hosts: Vec<Rc<Host>>,
    /// Localities with weights, as ranges of `hosts`; none when weights do not count.
    localities: Vec<(u32, std::ops::Range<usize>)>,
    /// All localities in the order of the endpoint set, where zones count.
    zones: Vec<std::ops::Range<usize>>,
    hashed: Option<HashedHosts>,
}

/// The hosts of one priority.
#[derive(Debug, Default)]
struct Level {
    healthy: Group,
    /// Used when the healthy of all levels cannot carry the load.
    degraded: Group,
    /// Hosts that EDS or checks call unusable are in neither group; they count here.
    total: usize,
    /// The largest weight.
    heaviest: u32,
    /// Everybody that EDS names, for panic.
    everybody: Vec<Rc<Host>>,
    /// Localities with their weights, as ranges of `everybody`, where they count for consistent hashing.
    parts: Vec<(u64, std::ops::Range<usize>)>,
    /// Made by the first request that finds a panic.
    everybody_hashed: OnceCell<Rc<Hashed>>,
}

/// The balancer of one cluster, or of one subset of it, on one worker.
#[derive(Debug, Default)]
pub struct Balancer {
    levels: Vec<Level>,
    turn: Cell<u64>,
    /// Somebody was chosen whatever their health, since that was asked last.
    panicked: Cell<bool>,
    /// Until when some host is young enough for slow start.
    slow_until: u64,
    overprovisioning: u32,
    /// How the load is shared out while nobody is ejected.
    loads: Loads,
    /// How the weights that hosts have reported compare, and until when.
    compared: Cell<Compared>,
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
    /// The subset that is wanted.
    pub criteria: Option<&'a Criteria>,
    /// Priorities to avoid, one bit each.
    pub tried_priorities: u128,
    /// Which hosts a retry avoids beside those tried.
    pub rules: Option<&'a HostRules>,
    /// How requests keep to the own zone.
    pub zones: Option<&'a ZoneRouting>,
}

impl Wish<'_> {
    fn avoids(&self, host: &Host) -> bool {
        self.tried.iter().any(|tried| Rc::ptr_eq(&tried.pool, &host.pool))
            || self.rules.is_some_and(|rules| rules.rejects(&host.endpoint))
    }

    fn is_free(&self) -> bool {
        self.tried.is_empty() && self.rules.is_none()
    }
}

/// Which hosts of a set a balancer is over.
#[derive(Clone, Copy, Debug)]
pub enum Members<'a> {
    /// All.
    All,
    /// These, by index, in rising order: a subset. Locality weights count as told.
    Some(&'a [usize], LocalityWeights),
}

/// How locality weights count within a subset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LocalityWeights {
    /// Not at all.
    Ignored,
    /// As they are.
    Kept,
    /// By the part of the locality that is in the subset.
    Scaled,
}

impl<'a> Members<'a> {
    /// Those within `range`.
    fn within(&self, range: &std::ops::Range<usize>) -> (usize, MemberIndices<'a>) {
        match self {
            Self::All => (range.len(), MemberIndices::Range(range.clone())),
            Self::Some(indices, _) => {
                let start = indices.partition_point(|index| *index < range.start);
                let end = indices.partition_point(|index| *index < range.end);
                (end - start, MemberIndices::List(indices[start..end].iter()))
            }
        }
    }
}

enum MemberIndices<'a> {
    Range(std::ops::Range<usize>),
    List(std::slice::Iter<'a, usize>),
}

impl Iterator for MemberIndices<'_> {
    type Item = usize;

    fn next(&mut self) -> Option<usize> {
        match self {
            Self::Range(range) => range.next(),
            Self::List(list) => list.next().copied(),
        }
    }
}

impl Balancer {
    /// For `hosts`, which are those of `set` in the same order.
    pub fn new(cluster: &Cluster, set: &EndpointSet, hosts: &[Rc<Host>]) -> Self {
        Self::of(cluster, set, hosts, Members::All)
    }

    /// For some of `hosts`, which are those of `set` in the same order.
    pub fn of(cluster: &Cluster, set: &EndpointSet, hosts: &[Rc<Host>], members: Members<'_>) -> Self {
        let slow_until = cluster.slow_start.map_or(0, |slow| {
            let youngest = hosts
                .iter()
                .map(|host| host.endpoint.state.since.load(Ordering::Relaxed))
                .max();
            youngest.unwrap_or(0) + slow.window.as_millis() as u64
        });
        let levels: Vec<Level> = set
            .priorities
            .iter()
            .map(|localities| Level::new(cluster, set, hosts, localities, members))
            .collect();
        let overprovisioning = set.overprovisioning;
        // One level without degraded hosts, the usual case, needs none: there are many clusters.
        let shared = levels.len() > 1 || levels.iter().any(|level| !level.degraded.hosts.is_empty());
        let loads = if shared {
            let levels = levels.iter().map(Level::health);
            Loads::new(levels, overprovisioning, cluster.panic_threshold, 0)
        } else {
            Loads::default()
        };
        // Workers and restarts start at different hosts.
        Self {
            levels,
            turn: Cell::new(random::next() >> 32),
            panicked: Cell::new(false),
            slow_until,
            overprovisioning,
            loads,
            compared: Cell::default(),
        }
    }

    /// Whether somebody was chosen whatever their health, since this was asked last.
    pub fn has_panicked(&self) -> bool {
        self.panicked.get() && self.panicked.replace(false)
    }

    /// Compares the weights that hosts have reported, from time to time.
    fn compare(&self, rules: &Reporting, now: u64) -> Compared {
        let known = self.compared.get();
        if known.heaviest > 0.0 && now < known.until {
            return known;
        }
        let hosts = self.levels.iter().flat_map(|level| &level.everybody);
        let mut weights: Vec<f64> = hosts
            .filter_map(|host| host.endpoint.state.reported.weight(rules, now))
            .collect();
        weights.sort_unstable_by(f64::total_cmp);
        let median = weights.get(weights.len() / 2).copied().unwrap_or(1.0);
        let compared = Compared {
            until: now + rules.update_ms,
            median,
            heaviest: weights.last().copied().unwrap_or(1.0).max(median),
        };
        self.compared.set(compared);
        compared
    }

    /// Whether it is over no host at all.
    pub fn is_empty(&self) -> bool {
        self.levels.iter().all(|level| level.total == 0)
    }

    /// Usable hosts of each locality of the first priority: number and weight.
    pub fn zones(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.levels.first().into_iter().flat_map(|level| {
            level.healthy.zones.iter().map(|range| {
                let hosts = &level.healthy.hosts[range.clone()];
                let weight = hosts.iter().map(|host| u64::from(host.endpoint.weight)).sum();
                (hosts.len() as u64, weight)
            })
        })
    }

    /// A host, or `None` if no host may be used.
    pub fn pick(&self, cluster: &Cluster, wish: &Wish<'_>) -> Option<Rc<Host>> {
        let mut view = self.view(cluster, wish)?;
        if self.slow_until > 0
            && let Some(slow) = cluster.slow_start
        {
            let now = now_ms();
            view.slow = (now < self.slow_until).then_some((slow, now));
        }
        if let Some(rules) = &cluster.reporting {
            let now = now_ms();
            view.reported = Some((rules, now, self.compare(rules, now)));
        }
        if wish.is_free() {
            return view.draw(cluster, wish, 0, &self.turn);
        }
        let mut last = None;
        for draw in 0..wish.attempts.max(1) {
            let host = view.draw(cluster, wish, draw as usize, &self.turn)?;
            if !wish.avoids(&host) {
                return Some(host);
            }
            last = Some(host);
        }
        // Chance kept hitting hosts that were tried: take one that was not, if there is one.
        let fresh = view
            .hosts
            .iter()
            .find(|host| !host.ejected() && !wish.avoids(host));
        fresh.cloned().or(last)
    }

    /// The hosts for this request: of which priority, and which of it.
    fn view(&self, cluster: &Cluster, wish: &Wish<'_>) -> Option<View<'_>> {
        let only = match &self.levels[..] {
            [] => return None,
            [only] if only.degraded.hosts.is_empty() && wish.tried_priorities == 0 => only,
            _ => return self.view_of_several(cluster, wish),
        };
        let health = if wish.some_ejected {
            only.health_now()
        } else {
            only.health()
        };
        if health.healthy < health.total {
            // One level that is well enough to carry everything does not panic, whatever the threshold (Envoy).
            let carries = health.availability(self.overprovisioning) >= 100;
            if !carries && health.below(cluster.panic_threshold) {
                self.panicked.set(true);
                return only.panic(cluster);
            }
            if health.healthy == 0 {
                return None;
            }
        }
        only.healthy
            .view(cluster, only.heaviest, wish.zones, wish.some_ejected)
    }

    fn view_of_several(&self, cluster: &Cluster, wish: &Wish<'_>) -> Option<View<'_>> {
        let fresh;
        let loads = if wish.some_ejected || wish.tried_priorities != 0 {
            let health = |level: &Level| {
                if wish.some_ejected {
                    level.health_now()
                } else {
                    level.health()
                }
            };
            // Also for one level whose priority was tried.
            fresh = Loads::new(
                self.levels.iter().map(health),
                self.overprovisioning,
                cluster.panic_threshold,
                wish.tried_priorities,
            );
            &fresh
        } else {
            &self.loads
        };
        // A key keeps to its priority as well.
        let (index, degraded) = match wish.hash.filter(|_| cluster.lb.hashes()) {
            Some(hash) => loads.choose(|count| (hash % count as u64) as usize)?,
            None => loads.choose(random::below)?,
        };
        let level = &self.levels[index];
        if loads.may_panic() && loads.health(index).below(cluster.panic_threshold) {
            self.panicked.set(true);
            return level.panic(cluster);
        }
        if loads.nobody() {
            return None;
        }
        let group = if degraded { &level.degraded } else { &level.healthy };
        let zones = wish.zones.filter(|_| index == 0 && !degraded);
        group.view(cluster, level.heaviest, zones, wish.some_ejected)
    }
}

impl Level {
    fn new(
        cluster: &Cluster,
        set: &EndpointSet,
        hosts: &[Rc<Host>],
        localities: &[crate::config::endpoint::Locality],
        members: Members<'_>,
    ) -> Self {
        let checks = cluster.health_checks.len();
        let weights = match members {
            Members::All if cluster.locality_weighted => LocalityWeights::Kept,
            Members::All => LocalityWeights::Ignored,
            Members::Some(_, _) if !cluster.locality_weighted => LocalityWeights::Ignored,
            Members::Some(_, weights) => weights,
        };
        let mut level = Self {
            heaviest: 1,
            ..Self::default()
        };
        let hashes = cluster.lb.hashes();
        // Localities for consistent hashing, of healthy and of degraded hosts.
        let mut parts = (Vec::new(), Vec::new());
        for locality in localities {
            let (count, indices) = members.within(&locality.members);
            let starts = (level.healthy.hosts.len(), level.degraded.hosts.len());
            let first = level.everybody.len();
            for host in indices.map(|index| &hosts[index]) {
                level.everybody.push(host.clone());
                level.heaviest = level.heaviest.max(host.endpoint.weight);
                if host.endpoint.usable(checks) {
                    let group = if host.endpoint.degraded {
                        &mut level.degraded
                    } else {
                        &mut level.healthy
                    };
                    group.hosts.push(host.clone());
                }
            }
            level.total += count;
            let mut weight = u64::from(locality.weight);
            if weights == LocalityWeights::Scaled {
                weight = (weight * count as u64).div_ceil(locality.members.len().max(1) as u64);
            }
            if hashes && weights != LocalityWeights::Ignored {
                level.parts.push((weight, first..level.everybody.len()));
                parts.0.push((weight, starts.0..level.healthy.hosts.len()));
                parts.1.push((weight, starts.1..level.degraded.hosts.len()));
            }
            for (group, start) in [(&mut level.healthy, starts.0), (&mut level.degraded, starts.1)] {
                let range = start..group.hosts.len();
                if cluster.zone_aware.is_some() {
                    group.zones.push(range.clone());
                }
                if range.is_empty() || weights == LocalityWeights::Ignored {
                    continue;
                }
                // The share shrinks only once less than 1/1.4 of the locality is usable.
                let usable = range.len() as u64 * u64::from(set.overprovisioning);
                let effective = weight * usable.min(count as u64 * 100) / count as u64;
                if effective > 0 {
                    group.localities.push((effective as u32, range));
                }
            }
        }
        if hashes {
            for (group, parts) in [(&mut level.healthy, parts.0), (&mut level.degraded, parts.1)] {
                group.hashed = Some(HashedHosts::new(cluster, &group.hosts, parts));
            }
        }
        level
    }

    fn health(&self) -> Health {
        Health {
            healthy: self.healthy.hosts.len(),
            degraded: self.degraded.hosts.len(),
            total: self.total,
        }
    }

    /// Without those that outlier detection has out now.
    fn health_now(&self) -> Health {
        let usable = |group: &Group| group.hosts.iter().filter(|host| !host.ejected()).count();
        Health {
            healthy: usable(&self.healthy),
            degraded: usable(&self.degraded),
            total: self.total,
        }
    }

    /// Too few are well: everybody is used, unless the cluster would rather fail.
    fn panic(&self, cluster: &Cluster) -> Option<View<'_>> {
        if cluster.zone_aware.is_some_and(|rules| rules.fail_on_panic) || self.everybody.is_empty() {
            return None;
        }
        let hashed = cluster.lb.hashes().then(|| {
            let all = || Rc::new(Hashed::new(cluster, &self.everybody, &self.parts, |_| true));
            self.everybody_hashed.get_or_init(all).clone()
        });
        Some(View {
            hosts: &self.everybody,
            localities: &[],
            zone: None,
            heaviest: self.heaviest,
            hashed,
            panic: true,
            slow: None,
            reported: None,
        })
    }
}

impl Group {
    fn view(
        &self,
        cluster: &Cluster,
        heaviest: u32,
        zones: Option<&ZoneRouting>,
        some_ejected: bool,
    ) -> Option<View<'_>> {
        if self.hosts.is_empty() {
            return None;
        }
        let zone = zones
            .and_then(|zones| zones.choose(random::below))
            .and_then(|index| self.zones.get(index))
            .filter(|range| !range.is_empty());
        Some(View {
            hosts: &self.hosts,
            localities: &self.localities,
            zone,
            heaviest,
            hashed: self
                .hashed
                .as_ref()
                .map(|hashed| hashed.now(cluster, &self.hosts, some_ejected)),
            panic: false,
            slow: None,
            reported: None,
        })
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
