//! Clusters and their endpoints: taken, activated once their secrets are here, removed.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use prost::Message;
use serin_xds::pb::envoy::config::cluster::v3 as pb_cluster;
use serin_xds::pb::envoy::config::endpoint::v3 as pb_endpoint;

use super::{Kept, Store, Update, Waiting, decode};
use crate::clock::now_ms;
use crate::config::cluster::{Cluster, Discovery};
use crate::config::convert::Address;
use crate::config::endpoint::{EndpointSet, stale_after};
use crate::config::slot::{ClusterSlot, Updates};
use crate::error::{Refusal, Within};
use crate::metrics::events::ClusterEvent;
use crate::tls::table::Side;
use crate::upstream::subset::group_names;

impl Store {
    pub(super) fn put_cluster(&mut self, update: &Update<'_>) -> Result<(), Refusal> {
        let message = decode::<pb_cluster::Cluster>(update)?;
        let previous = self
            .slots
            .find_cluster(update.name)
            .and_then(|slot| slot.config());
        let cluster = Cluster::compile(&message, &mut self.slots.secrets, previous.as_deref())?;
        let own = match (&cluster.discovery, &message.load_assignment) {
            (Discovery::Static, Some(assignment)) => {
                let previous = self
                    .slots
                    .find_cluster(update.name)
                    .and_then(|slot| slot.endpoints());
                Some(EndpointSet::compile(assignment, previous.as_deref()).within("load_assignment")?)
            }
            (Discovery::Static, None) => Some(EndpointSet::default()),
            _ => None,
        };
        if let Some(set) = &own
            && let Some(endpoint) = set
                .all
                .iter()
                .find(|endpoint| matches!(endpoint.address, Address::Name(..)))
        {
            return Err(Refusal::new(
                "load_assignment",
                format!(
                    "{} is not an address; a STATIC cluster cannot resolve names",
                    endpoint.address
                ),
            ));
        }
        let slot = self.slots.cluster(update.name);
        let before = self.eds_names_of(&slot.name);
        if let Discovery::Eds(name) = &cluster.discovery
            && !self.eds.is_held_by(name, &slot.name)
        {
            let known = self.assignments.contains_key(name);
            self.eds.hold(name, &slot.name, known);
            Updates::add(&slot.updates.attempts);
            let lost = u32::try_from(self.counts.subscriptions.lost()).unwrap_or(u32::MAX);
            slot.updates.lost_before.store(lost, Ordering::Relaxed);
        }
        let name = slot.name.clone();
        let ready = self.is_cluster_warm(&name, &cluster);
        let waiting = Waiting {
            item: (cluster, own),
            since: now_ms(),
        };
        if ready {
            self.warming.clusters.remove(&slot.name);
            self.activate_cluster(slot, waiting.item);
        } else {
            // Until then the one before stays in use.
            self.warming.clusters.insert(slot.name.clone(), waiting);
        }
        self.leave_eds_names(&name, before);
        Ok(())
    }

    /// Whether everything that a cluster needs has come: its secrets, and its endpoints where another one is in use, which
    /// has some. Requests for a new one are told that it has none yet.
    pub(super) fn is_cluster_warm(&self, name: &str, cluster: &Cluster) -> bool {
        let has_endpoints = match &cluster.discovery {
            Discovery::Eds(endpoints) => {
                self.eds.is_answered(endpoints)
                    || self.clusters.get(name).is_none_or(|slot| slot.config().is_none())
            }
            _ => true,
        };
        has_endpoints && cluster.secrets().all(|secret| secret.version() > 0)
    }

    /// The EDS names of a cluster: as it is, and as it will be.
    fn eds_names_of(&self, name: &str) -> Vec<Box<str>> {
        let eds = |cluster: &Cluster| match &cluster.discovery {
            Discovery::Eds(name) => Some(name.clone()),
            _ => None,
        };
        let active = self.clusters.get(name).and_then(|slot| slot.config());
        let waiting = self.warming.clusters.get(name);
        active
            .and_then(|config| eds(&config))
            .into_iter()
            .chain(waiting.and_then(|waiting| eds(&waiting.item.0)))
            .collect()
    }

    /// A cluster has changed that used these EDS names: those that it uses no more lose it.
    fn leave_eds_names(&mut self, cluster: &str, before: Vec<Box<str>>) {
        if before.is_empty() {
            return;
        }
        let now = self.eds_names_of(cluster);
        for name in before.iter().filter(|name| !now.contains(name)) {
            if self.eds.is_held_by(name, cluster) && self.eds.release(name, cluster) {
                self.assignments.remove(name);
                self.stale.remove(name);
            }
        }
    }

    pub(super) fn activate_cluster(
        &mut self,
        slot: Arc<ClusterSlot>,
        (cluster, own): (Cluster, Option<EndpointSet>),
    ) {
        let before = self.eds_names_of(&slot.name);
        let name = slot.name.clone();
        let mut endpoints = None;
        if let Discovery::Eds(name) = &cluster.discovery {
            endpoints = self
                .assignments
                .get(name)
                .and_then(|kept| pb_endpoint::ClusterLoadAssignment::decode(&*kept.body).ok())
                .and_then(|assignment| EndpointSet::compile(&assignment, slot.endpoints().as_deref()).ok());
        }
        let cluster = Arc::new(cluster);
        self.note_kind(&slot, Some(&cluster));
        let groups = groups_of(&slot);
        slot.set_config(Some(cluster));
        note_groups(&slot, groups);
        match self.clusters.insert(slot.name.clone(), slot.clone()) {
            None => self.counts.clusters.added += 1,
            Some(_) => self.counts.clusters.modified += 1,
        }
        if let Some(set) = own.or(endpoints) {
            self.set_endpoints(&slot, set);
        }
        self.leave_eds_names(&name, before);
    }

    /// Notes what is done for a cluster in the background; nothing for one that is gone.
    fn note_kind(&mut self, slot: &Arc<ClusterSlot>, config: Option<&Cluster>) {
        if config.is_some_and(|config| matches!(config.discovery, Discovery::Dns { .. })) {
            self.dns.insert(slot.name.clone(), slot.clone());
        } else {
            self.dns.remove(&slot.name);
        }
        if config.is_some_and(|config| !config.health_checks.is_empty()) {
            self.checked.insert(slot.name.clone(), slot.clone());
            self.checked_version += 1;
        } else if self.checked.remove(&slot.name).is_some() {
            self.checked_version += 1;
        }
    }

    /// Replaces the endpoints of a cluster.
    fn set_endpoints(&mut self, slot: &Arc<ClusterSlot>, set: EndpointSet) {
        self.note_membership(slot, Some(&set));
        if !same_members(slot.endpoints().as_deref(), &set) {
            Updates::add(&slot.updates.memberships);
        }
        let groups = groups_of(slot);
        slot.set_endpoints(Some(Arc::new(set)));
        note_groups(slot, groups);
        if self.checked.contains_key(&slot.name) {
            self.checked_version += 1;
        }
    }

    pub(super) fn remove_cluster(&mut self, name: &str) {
        self.slots.secrets.forget(Side::Cluster, name);
        let before = self.eds_names_of(name);
        self.warming.clusters.remove(name);
        if let Some(slot) = self.clusters.remove(name) {
            self.counts.clusters.removed += 1;
            let groups = groups_of(&slot);
            slot.set_config(None);
            slot.set_endpoints(None);
            note_groups(&slot, groups);
            self.note_kind(&slot, None);
            self.note_membership(&slot, None);
        }
        self.leave_eds_names(name, before);
    }

    pub(super) fn put_endpoints(&mut self, update: &Update<'_>) -> Result<(), Refusal> {
        let taken = self.take_endpoints(update);
        if taken.is_err() {
            for slot in self
                .eds
                .users(update.name)
                .iter()
                .filter_map(|user| self.clusters.get(user))
            {
                // One for the answer, one for saying that it is refused (Envoy).
                Updates::add(&slot.updates.attempts);
                Updates::add(&slot.updates.attempts);
                Updates::add(&slot.updates.rejected);
            }
        }
        taken
    }

    fn take_endpoints(&mut self, update: &Update<'_>) -> Result<(), Refusal> {
        let message = decode::<pb_endpoint::ClusterLoadAssignment>(update)?;
        let stale_after = stale_after(&message)?;
        let users = self.eds.users(update.name).to_vec();
        let mut compiled = Vec::with_capacity(users.len());
        for user in &users {
            if let Some(slot) = self.clusters.get(user) {
                compiled.push((
                    slot.clone(),
                    EndpointSet::compile(&message, slot.endpoints().as_deref())?,
                ));
            }
        }
        if users.is_empty() {
            EndpointSet::compile(&message, None)?;
        }
        let same = self
            .assignments
            .get(update.name)
            .is_some_and(|kept| *kept.body == *update.body);
        for (slot, set) in compiled {
            Updates::add(&slot.updates.attempts);
            Updates::add(&slot.updates.successes);
            if same {
                Updates::add(&slot.updates.unchanged);
            }
            if stale_after.is_some() {
                slot.counted.note(ClusterEvent::AssignmentTimeout);
            }
            self.set_endpoints(&slot, set);
        }
        match stale_after {
            Some(after) => {
                let at = now_ms().saturating_add(after.as_millis() as u64);
                self.stale.insert(update.name.into(), at);
            }
            None => drop(self.stale.remove(update.name)),
        }
        match self.assignments.get_mut(update.name) {
            Some(kept) => *kept = Kept::now(update.body),
            None => {
                self.assignments
                    .insert(update.name.into(), Kept::now(update.body));
            }
        }
        Ok(())
    }

    /// Gives up the endpoints for which no update has followed in the time that they were given, as of `now_ms`.
    pub fn end_stale(&mut self, now_ms: u64) {
        let due = self.stale.iter().filter(|(_, at)| **at <= now_ms);
        let due: Vec<Box<str>> = due.map(|(name, _)| name.clone()).collect();
        for name in due {
            tracing::warn!(assignment = %name, "no update has followed: its endpoints are used no more");
            self.stale.remove(&name);
            self.assignments.remove(&name);
            let users = self.eds.users(&name).iter();
            let slots: Vec<_> = users
                .filter_map(|user| self.clusters.get(user))
                .cloned()
                .collect();
            for slot in slots {
                slot.counted.note(ClusterEvent::AssignmentStale);
                self.set_endpoints(&slot, EndpointSet::default());
            }
        }
    }

    pub(super) fn remove_endpoints(&mut self, name: &str) {
        self.assignments.remove(name);
        self.stale.remove(name);
        let users = self.eds.users(name).iter();
        let slots: Vec<_> = users
            .filter_map(|user| self.clusters.get(user))
            .cloned()
            .collect();
        for slot in slots {
            Updates::add(&slot.updates.attempts);
            Updates::add(&slot.updates.successes);
            slot.counted.note(ClusterEvent::UpdateEmpty);
            self.set_endpoints(&slot, EndpointSet::default());
        }
    }

    /// Replaces the endpoints of a cluster whose names were resolved.
    pub fn set_resolved(
        &mut self,
        cluster: &str,
        assignment: &pb_endpoint::ClusterLoadAssignment,
    ) -> Result<(), Refusal> {
        if let Some(slot) = self.clusters.get(cluster).cloned() {
            Updates::add(&slot.updates.attempts);
            let set = EndpointSet::compile(assignment, slot.endpoints().as_deref())
                .inspect_err(|_| Updates::add(&slot.updates.failures))?;
            Updates::add(&slot.updates.successes);
            self.set_endpoints(&slot, set);
        }
        Ok(())
    }

    /// The names of a cluster could not be resolved.
    pub fn note_unresolved(&mut self, cluster: &str) {
        if let Some(slot) = self.clusters.get(cluster) {
            Updates::add(&slot.updates.attempts);
            Updates::add(&slot.updates.failures);
        }
    }
}

/// The subsets of a cluster, if it has any.
fn groups_of(slot: &ClusterSlot) -> Option<BTreeSet<Box<[u8]>>> {
    let config = slot.config()?;
    let rules = config.subsets.as_ref()?;
    Some(group_names(rules, &*slot.endpoints()?))
}

/// Counts which subsets have come and gone since they were `before`.
fn note_groups(slot: &ClusterSlot, before: Option<BTreeSet<Box<[u8]>>>) {
    let after = groups_of(slot);
    if before.is_none() && after.is_none() {
        return;
    }
    let (before, after) = (before.unwrap_or_default(), after.unwrap_or_default());
    for _ in after.difference(&before) {
        slot.counted.note(ClusterEvent::SubsetCreated);
    }
    for _ in before.difference(&after) {
        slot.counted.note(ClusterEvent::SubsetRemoved);
    }
}

/// Whether both hold the same addresses.
fn same_members(before: Option<&EndpointSet>, after: &EndpointSet) -> bool {
    let Some(before) = before else {
        return after.all.is_empty();
    };
    if before.all.len() != after.all.len() {
        return false;
    }
    let in_order = before.all.iter().zip(&after.all);
    if in_order.clone().all(|(one, other)| one.address == other.address) {
        return true;
    }
    let known: std::collections::HashSet<&Address> = before.all.iter().map(|one| &one.address).collect();
    after.all.iter().all(|one| known.contains(&one.address))
}
