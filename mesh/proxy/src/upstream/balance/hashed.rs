//! Consistent hashing over the hosts of one group: the table, and with bounded loads who is tried instead.
//!
//! A host that outlier detection has out is taken out of the table, as if it had never been there, so that its keys go
//! where other proxies send them; such a table is kept until somebody else is out.

use std::cell::RefCell;
use std::rc::Rc;

use crate::config::cluster::{Cluster, LbPolicy};
use crate::upstream::cluster::Host;
use crate::upstream::consistent::{Member, Shuffle, Table};

/// The hosts of a group for consistent hashing.
#[derive(Debug)]
pub(super) struct HashedHosts {
    /// Localities with their weights, where these count.
    parts: Vec<(u64, std::ops::Range<usize>)>,
    all: Rc<Hashed>,
    /// Who was out last, and the table without them.
    without: RefCell<Option<(Vec<u32>, Rc<Hashed>)>>,
}

impl HashedHosts {
    pub(super) fn new(
        cluster: &Cluster,
        hosts: &[Rc<Host>],
        parts: Vec<(u64, std::ops::Range<usize>)>,
    ) -> Self {
        Self {
            all: Rc::new(Hashed::new(cluster, hosts, &parts, |_| true)),
            parts,
            without: RefCell::default(),
        }
    }

    /// As it is now.
    pub(super) fn now(&self, cluster: &Cluster, hosts: &[Rc<Host>], some_ejected: bool) -> Rc<Hashed> {
        if !some_ejected {
            return self.all.clone();
        }
        let out: Vec<u32> = (0..hosts.len() as u32)
            .filter(|index| hosts[*index as usize].ejected())
            .collect();
        if out.is_empty() {
            return self.all.clone();
        }
        let mut kept = self.without.borrow_mut();
        match &*kept {
            Some((before, table)) if *before == out => table.clone(),
            _ => {
                let stays = |index: usize| out.binary_search(&(index as u32)).is_err();
                let table = Rc::new(Hashed::new(cluster, hosts, &self.parts, stays));
                *kept = Some((out, table.clone()));
                table
            }
        }
    }
}

/// A table, and the hosts that are in it.
#[derive(Debug)]
pub(super) struct Hashed {
    table: Table,
    /// Index and part of the load, by index.
    shares: Vec<(u32, f64)>,
}

impl Hashed {
    /// Of those `hosts` that `stay`, by index.
    pub(super) fn new(
        cluster: &Cluster,
        hosts: &[Rc<Host>],
        parts: &[(u64, std::ops::Range<usize>)],
        stays: impl Fn(usize) -> bool,
    ) -> Self {
        let mut shares = Vec::with_capacity(hosts.len());
        let mut add = |range: std::ops::Range<usize>, part: f64| {
            let staying = || range.clone().filter(|index| stays(*index));
            let weight = |index: usize| u64::from(hosts[index].endpoint.weight);
            let sum: u64 = staying().map(weight).sum();
            // Multiplied before it is divided: the rounding is Envoy's as well.
            shares.extend(staying().map(|index| (index as u32, weight(index) as f64 * part / sum as f64)));
        };
        if parts.is_empty() {
            add(0..hosts.len(), 1.0);
        }
        let sum: u64 = parts.iter().map(|(weight, _)| *weight).sum();
        for (weight, range) in parts.iter().filter(|(weight, _)| *weight > 0) {
            add(range.clone(), *weight as f64 / sum as f64);
        }
        let members: Vec<Member<'_>> = shares
            .iter()
            .map(|(index, share)| {
                let endpoint = &hosts[*index as usize].endpoint;
                let name = match endpoint.hash_key() {
                    Some(key) => key,
                    None if cluster.hashing.by_hostname && !endpoint.hostname().is_empty() => {
                        endpoint.hostname()
                    }
                    None => &*endpoint.text,
                };
                Member {
                    name,
                    index: *index,
                    share: *share,
                }
            })
            .collect();
        let table = match cluster.lb {
            LbPolicy::RingHash {
                minimum,
                maximum,
                function,
            } => Table::ring(&members, minimum, maximum, function),
            LbPolicy::Maglev { size } => Table::maglev(&members, size),
            LbPolicy::RoundRobin
            | LbPolicy::LeastRequest { .. }
            | LbPolicy::Random
            | LbPolicy::ClientSideWeighted
            | LbPolicy::PeakEwma { .. } => Table::Maglev(Vec::new()),
        };
        Self { table, shares }
    }

    /// The index of the host for `hash`; with bounded loads (`factor`, in percent of the average) another one where that
    /// host carries more than its part.
    pub(super) fn find(
        &self,
        hosts: &[Rc<Host>],
        hash: u64,
        attempt: usize,
        factor: Option<u32>,
    ) -> Option<usize> {
        let first = self.table.find(hash, attempt)?;
        let Some(factor) = factor else {
            return Some(first);
        };
        let all = hosts[first].siblings.as_ref().map_or(0, |all| all.get());
        let load = |(index, share): (u32, f64)| {
            f64::from(hosts[index as usize].active.get()) / slots(all, factor, share)
        };
        let place = self
            .shares
            .binary_search_by_key(&(first as u32), |(index, _)| *index)
            .ok()?;
        let mut least = (load(self.shares[place]), first);
        if least.0 <= 1.0 {
            return Some(first);
        }
        for other in Shuffle::new(hash, self.shares.len()).filter(|other| *other != place) {
            let there = load(self.shares[other]);
            let index = self.shares[other].0 as usize;
            if there <= 1.0 {
                return Some(index);
            }
            if there < least.0 {
                least = (there, index);
            }
        }
        Some(least.1)
    }
}

/// Requests that a host may have on their way when `all` are: its part of `factor` percent of one more than there are, at
/// least one.
fn slots(all: u32, factor: u32, share: f64) -> f64 {
    let total = (u64::from(all + 1) * u64::from(factor)).div_ceil(100);
    (total as f64 * share).ceil().max(1.0)
}
