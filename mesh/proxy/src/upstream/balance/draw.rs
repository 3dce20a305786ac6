//! The policies: one host of those that a request may have.

use std::cell::Cell;
use std::rc::Rc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::Wish;
use super::hashed::Hashed;
use crate::config::balancing::PLAIN_BIAS;
use crate::config::balancing::reported::Reporting;
use crate::config::cluster::{Cluster, LbPolicy, SlowStart};
use crate::random;
use crate::upstream::cluster::Host;

/// Draws that chance gets before hosts are looked through.
const MAX_DRAWS: u32 = 32;

/// Hosts of one priority, as one request sees them.
pub(super) struct View<'a> {
    pub(super) hosts: &'a [Rc<Host>],
    pub(super) localities: &'a [(u32, std::ops::Range<usize>)],
    /// The zone that was chosen for the request.
    pub(super) zone: Option<&'a std::ops::Range<usize>>,
    pub(super) heaviest: u32,
    pub(super) hashed: Option<Rc<Hashed>>,
    pub(super) panic: bool,
    /// The time, while slow start has a say.
    pub(super) slow: Option<(SlowStart, u64)>,
    /// How weights follow from reports, the time, and how they compare.
    pub(super) reported: Option<(&'a Reporting, u64, Compared)>,
}

/// How the weights that hosts have reported compare.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Compared {
    /// Until when that is not looked at again (process clock, ms).
    pub(super) until: u64,
    /// What hosts without a weight have.
    pub(super) median: f64,
    pub(super) heaviest: f64,
}

impl View<'_> {
    pub(super) fn draw(
        &self,
        cluster: &Cluster,
        wish: &Wish<'_>,
        attempt: usize,
        turn: &Cell<u64>,
    ) -> Option<Rc<Host>> {
        if let (Some(hashed), Some(hash)) = (&self.hashed, wish.hash)
            && let Some(index) = hashed.find(self.hosts, hash, attempt, cluster.hashing.balance_factor)
        {
            return Some(self.hosts[index].clone());
        }
        let hosts = match (self.zone, self.localities) {
            (Some(zone), _) => &self.hosts[zone.clone()],
            (None, []) => self.hosts,
            (None, [(_, only)]) => &self.hosts[only.clone()],
            (None, several) => {
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
            LbPolicy::ClientSideWeighted => self.by_reports(hosts, turn),
            LbPolicy::LeastRequest { choices: 0, bias } => self.least_of_all(hosts, bias),
            LbPolicy::LeastRequest { choices, bias } => self.least_request(hosts, choices, bias),
            LbPolicy::PeakEwma { default_rtt, .. } => self.cheaper(hosts, default_rtt),
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

    /// In turn by what hosts have reported.
    fn by_reports<'h>(&self, hosts: &'h [Rc<Host>], turn: &Cell<u64>) -> Option<&'h Rc<Host>> {
        let Some((rules, now, compared)) = self.reported else {
            return self.round_robin(hosts, turn);
        };
        let count = hosts.len() as u64;
        for _ in 0..count * 1000 {
            let n = turn.get();
            turn.set(n.wrapping_add(1));
            let host = &hosts[(n % count) as usize];
            let own = host.endpoint.state.reported.weight(rules, now);
            let share = (own.unwrap_or(compared.median) / compared.heaviest).min(1.0);
            // As for the weights that EDS tells. Rounds are counted modulo what a number with a fraction can tell apart.
            let round = (n / count % (1 << 32)) as f64;
            let takes = ((round + 1.0) * share).floor() > (round * share).floor();
            if takes && self.may_use(host) && self.old_enough(host) {
                return Some(host);
            }
        }
        None
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

    fn least_request<'h>(&self, hosts: &'h [Rc<Host>], choices: u32, bias: u32) -> Option<&'h Rc<Host>> {
        let mut best: Option<&Rc<Host>> = None;
        for _ in 0..choices {
            // A young host is drawn less often, which is how its weight is smaller here.
            let Some(host) = self.random(hosts) else { continue };
            if best.is_none_or(|best| busier(best, host, bias)) {
                best = Some(host);
            }
        }
        best
    }

    /// The least busy of all, one of them at random if there are several.
    fn least_of_all<'h>(&self, hosts: &'h [Rc<Host>], bias: u32) -> Option<&'h Rc<Host>> {
        let mut best: Option<&Rc<Host>> = None;
        let mut equals = 1;
        for host in hosts
            .iter()
            .filter(|host| self.may_use(host) && self.old_enough(host))
        {
            let better = match best {
                None => true,
                Some(best) if busier(best, host, bias) => {
                    equals = 1;
                    true
                }
                Some(best) if busier(host, best, bias) => false,
                Some(_) => {
                    equals += 1;
                    random::below(equals) == 0
                }
            };
            if better {
                best = Some(host);
            }
        }
        best
    }

    /// The cheaper of two by latency and requests on their way.
    fn cheaper<'h>(&self, hosts: &'h [Rc<Host>], default_rtt: Duration) -> Option<&'h Rc<Host>> {
        let one = self.random(hosts)?;
        // Drawn again until it is another one; with two hosts half of the draws would be wasted otherwise.
        let other = (0..4)
            .filter_map(|_| self.random(hosts))
            .find(|other| !Rc::ptr_eq(one, other));
        let cost = |host: &Rc<Host>| {
            let active = host.active.get();
            host.ewma.as_ref().map_or_else(
                || default_rtt.as_secs_f64() * 1000.0 * (f64::from(active) + 1.0),
                |ewma| ewma.cost(active, default_rtt),
            )
        };
        Some(match other {
            Some(other) if cost(other) < cost(one) => other,
            _ => one,
        })
    }

    fn random<'h>(&self, hosts: &'h [Rc<Host>]) -> Option<&'h Rc<Host>> {
        if hosts.is_empty() {
            return None;
        }
        // Rejection sampling by weight: one draw when the weights are equal.
        let heaviest = self.heaviest;
        for _ in 0..MAX_DRAWS {
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

/// Whether `one` has more requests per weight than `other`, usually without a division. Where all weights are the same, any
/// bias but none gives the same order.
fn busier(one: &Host, other: &Host, bias: u32) -> bool {
    if bias != PLAIN_BIAS && one.endpoint.weight != other.endpoint.weight {
        let load = |host: &Host| {
            (f64::from(host.active.get()) + 1.0).powf(f64::from(bias) / 1000.0)
                / f64::from(host.endpoint.weight)
        };
        return load(other) < load(one);
    }
    u64::from(other.active.get()) * u64::from(one.endpoint.weight)
        < u64::from(one.active.get()) * u64::from(other.endpoint.weight)
}
