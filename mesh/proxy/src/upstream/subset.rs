//! Subsets of a cluster on one worker: a balancer for each group of endpoints, found by the group's name.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::rc::Rc;

use serin_xds::pb::google::protobuf as google;

use super::balance::{Balancer, LocalityWeights, Members, Wish};
use super::cluster::Host;
use crate::config::cluster::Cluster;
use crate::config::endpoint::EndpointSet;
use crate::config::subset::{Criteria, Fallback, Selector, Subsets, group_name, values_of};

/// Groups that one endpoint may be in by one selector, through lists of values.
const MAX_GROUPS_PER_HOST: usize = 256;

/// See the module.
#[derive(Debug)]
pub struct SubsetBalancer {
    groups: HashMap<Box<[u8]>, Balancer, foldhash::fast::RandomState>,
    default: Balancer,
}

impl SubsetBalancer {
    /// For `hosts`, which are those of `set` in the same order.
    pub fn new(rules: &Subsets, cluster: &Cluster, set: &EndpointSet, hosts: &[Rc<Host>]) -> Self {
        let weights = match (rules.locality_weight_aware, rules.scale_locality_weight) {
            (false, _) => LocalityWeights::Ignored,
            (true, false) => LocalityWeights::Kept,
            (true, true) => LocalityWeights::Scaled,
        };
        let over = |members: &[usize]| Balancer::of(cluster, set, hosts, Members::Some(members, weights));
        let mut groups = HashMap::default();
        for selector in &rules.selectors {
            let mut members: BTreeMap<Box<[u8]>, Vec<usize>> = BTreeMap::new();
            for (index, host) in hosts.iter().enumerate() {
                for name in names(selector, host.endpoint.lb_metadata(), rules.list_as_any) {
                    members.entry(name).or_default().push(index);
                }
            }
            for (name, mut members) in members {
                if selector.single_host {
                    members.truncate(1);
                }
                groups.insert(name, over(&members));
            }
        }
        let default = if rules.default_subset.is_empty() {
            // Envoy: an empty default subset has every endpoint.
            Balancer::new(cluster, set, hosts)
        } else {
            let fitting: Vec<usize> = hosts
                .iter()
                .enumerate()
                .filter(|(_, host)| {
                    let metadata = host.endpoint.lb_metadata();
                    rules.default_subset.fits(metadata, rules.list_as_any)
                })
                .map(|(index, _)| index)
                .collect();
            over(&fitting)
        };
        Self { groups, default }
    }

    /// A host of the group that `wish` asks for, or of what stands for it, and which of the two. `whole` is the balancer over
    /// all hosts.
    pub fn pick(
        &self,
        rules: &Subsets,
        cluster: &Cluster,
        whole: &Balancer,
        wish: &Wish<'_>,
    ) -> (Option<Rc<Host>>, Chosen) {
        let search = Search {
            subsets: self,
            rules,
            cluster,
            whole,
            wish,
            how: Cell::new(Chosen::Subset),
        };
        (search.host(), search.how.get())
    }
}

/// One choice.
struct Search<'a> {
    subsets: &'a SubsetBalancer,
    rules: &'a Subsets,
    cluster: &'a Cluster,
    whole: &'a Balancer,
    wish: &'a Wish<'a>,
    how: Cell<Chosen>,
}

impl Search<'_> {
    fn host(&self) -> Option<Rc<Host>> {
        let Some(criteria) = self.wish.criteria.filter(|criteria| !criteria.is_empty()) else {
            return self.fall_back(&self.rules.fallback);
        };
        if !self.rules.fallback_list || criteria.alternatives.is_empty() {
            return self.host_for(criteria);
        }
        // Each alternative by its own group; what no group has falls back as the last one would.
        criteria
            .alternatives
            .iter()
            .find_map(|choice| self.group(choice)?.pick(self.cluster, self.wish))
            .or_else(|| self.host_for(&criteria.without_alternatives()))
    }

    fn host_for(&self, criteria: &Criteria) -> Option<Rc<Host>> {
        if let Some(group) = self.group(criteria) {
            return group.pick(self.cluster, self.wish).or_else(|| self.anybody());
        }
        let selector = self.rules.selectors.iter().find(|selector| {
            criteria.has_exactly(&selector.keys)
                || self.rules.allow_redundant_keys && criteria.narrowed(&selector.keys).is_some()
        });
        match selector.and_then(|selector| selector.fallback.as_ref()) {
            // Fewer keys each time: this ends.
            Some(Fallback::Keys(keys)) => self.host_for(&criteria.narrowed(keys)?),
            Some(fallback) => self.fall_back(fallback),
            None => self.fall_back(&self.rules.fallback),
        }
    }

    fn group(&self, criteria: &Criteria) -> Option<&Balancer> {
        let groups = &self.subsets.groups;
        if let Some(found) = groups.get(criteria.name()) {
            return Some(found);
        }
        if !self.rules.allow_redundant_keys {
            return None;
        }
        // Selectors with more keys come first.
        self.rules
            .selectors
            .iter()
            .filter_map(|selector| criteria.narrowed(&selector.keys))
            .find_map(|narrowed| groups.get(narrowed.name()))
    }

    fn fall_back(&self, fallback: &Fallback) -> Option<Rc<Host>> {
        self.how.set(Chosen::Fallback);
        match fallback {
            Fallback::Nobody | Fallback::Keys(_) => None,
            Fallback::Anybody => self.whole.pick(self.cluster, self.wish),
            Fallback::Default => {
                let default = &self.subsets.default;
                default.pick(self.cluster, self.wish).or_else(|| self.anybody())
            }
        }
    }

    /// Anybody, where the rules allow that for a group without hosts.
    fn anybody(&self) -> Option<Rc<Host>> {
        if !self.rules.panic_mode_any {
            return None;
        }
        self.how.set(Chosen::Panic);
        self.whole.pick(self.cluster, self.wish)
    }
}

/// How a host was chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Chosen {
    /// From the subset that was asked for.
    Subset,
    /// From what stands for it.
    Fallback,
    /// From all, since the subset has none.
    Panic,
}

/// The names of all groups that the endpoints of a set make.
pub(crate) fn group_names(rules: &Subsets, set: &EndpointSet) -> BTreeSet<Box<[u8]>> {
    let each = rules.selectors.iter().flat_map(|selector| {
        let endpoints = set.all.iter();
        endpoints.flat_map(|endpoint| names(selector, endpoint.lb_metadata(), rules.list_as_any))
    });
    each.collect()
}

/// The names of the groups that an endpoint is in by one selector.
fn names(selector: &Selector, metadata: Option<&google::Struct>, list_as_any: bool) -> Vec<Box<[u8]>> {
    let Some(metadata) = metadata else {
        return Vec::new();
    };
    let mut rows: Vec<Vec<Box<[u8]>>> = vec![Vec::new()];
    for key in &selector.keys {
        let Some(value) = metadata.fields.get(&**key) else {
            return Vec::new();
        };
        let values: Vec<_> = values_of(value, list_as_any).collect();
        rows = rows
            .iter()
            .flat_map(|row| {
                values.iter().map(move |value| {
                    let mut row = row.clone();
                    row.push(value.clone());
                    row
                })
            })
            .take(MAX_GROUPS_PER_HOST)
            .collect();
    }
    let mut names: Vec<_> = rows
        .iter()
        .map(|row| {
            group_name(
                selector
                    .keys
                    .iter()
                    .zip(row)
                    .map(|(key, value)| (&**key, &**value)),
            )
        })
        .collect();
    // A list may hold a value twice.
    names.sort();
    names.dedup();
    names
}

#[cfg(test)]
mod tests;
