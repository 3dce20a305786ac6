//! Which cluster this proxy is a member of: the one that has its own address among its endpoints.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use super::Store;
use crate::config::convert::Address;
use crate::config::endpoint::EndpointSet;
use crate::config::slot::{ClusterSlot, Here, Home};

/// What is looked for, and where it has been found.
#[derive(Debug)]
pub(super) struct Membership {
    own: IpAddr,
    home: Arc<Home>,
    /// Clusters with that address, whole services before their subsets, and the zone that it has there.
    found: BTreeMap<(bool, Arc<str>), (Arc<ClusterSlot>, Box<str>)>,
}

/// Whether a cluster is a subset of a service: `outbound|80|v1|reviews` of `outbound|80||reviews`.
fn is_subset(name: &str) -> bool {
    name.split('|').nth(2).is_some_and(|subset| !subset.is_empty())
}

impl Store {
    /// From now on `home` is where `own` is an endpoint.
    pub fn look_for(&mut self, own: IpAddr, home: Arc<Home>) {
        self.membership = Some(Membership {
            own,
            home,
            found: BTreeMap::new(),
        });
    }

    /// The endpoints of a cluster have changed, or it is gone.
    pub(super) fn note_membership(&mut self, slot: &Arc<ClusterSlot>, set: Option<&EndpointSet>) {
        let Some(membership) = &mut self.membership else {
            return;
        };
        // Of inbound clusters and the like every proxy would be the only member.
        if !slot.name.starts_with("outbound|") {
            return;
        }
        let own = membership.own;
        let zone = set.into_iter().find_map(|set| {
            let at = set.all.iter().position(|endpoint| {
                matches!(&endpoint.address, Address::Tcp(address) if address.ip().to_canonical() == own)
            })?;
            set.priorities
                .iter()
                .flatten()
                .find(|locality| locality.members.contains(&at))
                .map(|locality| locality.zone.clone())
        });
        let key = (is_subset(&slot.name), slot.name.clone());
        let before = membership
            .found
            .first_key_value()
            .map(|(key, (_, zone))| (key.clone(), zone.clone()));
        match zone {
            Some(zone) => membership.found.insert(key, (slot.clone(), zone)),
            None => membership.found.remove(&key),
        };
        let after = membership.found.first_key_value();
        if before != after.map(|(key, (_, zone))| (key.clone(), zone.clone())) {
            membership.home.set(after.map(|(_, (slot, zone))| Here {
                slot: slot.clone(),
                zone: zone.clone(),
            }));
        }
    }
}
