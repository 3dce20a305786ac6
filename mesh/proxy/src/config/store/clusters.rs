//! Clusters and their endpoints: taken, activated once their secrets are here, removed.

use std::sync::Arc;

use prost::Message;
use serin_xds::ResourceType;
use serin_xds::pb::envoy::config::cluster::v3 as pb_cluster;
use serin_xds::pb::envoy::config::endpoint::v3 as pb_endpoint;

use super::{Store, Update, Waiting, decode};
use crate::clock::now_ms;
use crate::config::cluster::{Cluster, Discovery};
use crate::config::convert::Address;
use crate::config::endpoint::EndpointSet;
use crate::config::slot::ClusterSlot;
use crate::error::{Refusal, Within};
use crate::tls::table::Side;

impl Store {
    pub(super) fn put_cluster(&mut self, update: &Update<'_>) -> Result<(), Refusal> {
        let message = decode::<pb_cluster::Cluster>(update)?;
        let previous = self
            .slots
            .find_cluster(update.name)
            .and_then(|slot| slot.config());
        let cluster = Cluster::compile(&message, &mut self.slots.secrets, previous.as_deref())?;
        let own = match (&cluster.discovery, &cluster.load_assignment) {
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
        if let Discovery::Eds(name) = &cluster.discovery {
            self.eds
                .entry(name.clone())
                .or_default()
                .insert(slot.name.clone());
        }
        let ready = cluster.secrets().all(|secret| secret.version() > 0);
        let waiting = Waiting {
            item: (cluster, own),
            since: now_ms(),
        };
        if ready {
            self.warming.clusters.remove(&slot.name);
            self.activate_cluster(slot, waiting.item);
        } else {
            // Until its secrets are here the one before stays in use.
            self.warming.clusters.insert(slot.name.clone(), waiting);
        }
        Ok(())
    }

    pub(super) fn activate_cluster(
        &mut self,
        slot: Arc<ClusterSlot>,
        (cluster, own): (Cluster, Option<EndpointSet>),
    ) {
        let old_eds = slot.config().and_then(|old| match &old.discovery {
            Discovery::Eds(name) => Some(name.clone()),
            _ => None,
        });
        if let Some(old) = old_eds
            && cluster.discovery != Discovery::Eds(old.clone())
        {
            self.forget_eds_user(&old, &slot.name);
        }
        let mut endpoints = None;
        if let Discovery::Eds(name) = &cluster.discovery {
            endpoints = self
                .assignments
                .get(name)
                .and_then(|body| pb_endpoint::ClusterLoadAssignment::decode(&**body).ok())
                .and_then(|assignment| EndpointSet::compile(&assignment, slot.endpoints().as_deref()).ok());
        }
        slot.set_config(Some(Arc::new(cluster)));
        if let Some(set) = own.or(endpoints) {
            self.note_membership(&slot, Some(&set));
            slot.set_endpoints(Some(Arc::new(set)));
        }
        self.clusters.insert(slot.name.clone(), slot);
    }

    fn forget_eds_user(&mut self, eds_name: &str, cluster: &str) {
        if let Some(users) = self.eds.get_mut(eds_name) {
            users.remove(cluster);
            if users.is_empty() {
                self.eds.remove(eds_name);
                self.assignments.remove(eds_name);
                self.answered.remove(&(ResourceType::Endpoints, eds_name.into()));
            }
        }
    }

    pub(super) fn remove_cluster(&mut self, name: &str) {
        self.slots.secrets.forget(Side::Cluster, name);
        if let Some(waiting) = self.warming.clusters.remove(name)
            && let Discovery::Eds(eds_name) = &waiting.item.0.discovery
        {
            self.forget_eds_user(eds_name, name);
        }
        let Some(slot) = self.clusters.remove(name) else {
            return;
        };
        if let Some(config) = slot.config()
            && let Discovery::Eds(eds_name) = &config.discovery
        {
            self.forget_eds_user(eds_name, name);
        }
        slot.set_config(None);
        slot.set_endpoints(None);
        self.note_membership(&slot, None);
    }

    pub(super) fn put_endpoints(&mut self, update: &Update<'_>) -> Result<(), Refusal> {
        let message = decode::<pb_endpoint::ClusterLoadAssignment>(update)?;
        let users: Vec<_> = self.eds.get(update.name).into_iter().flatten().cloned().collect();
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
        for (slot, set) in compiled {
            self.note_membership(&slot, Some(&set));
            slot.set_endpoints(Some(Arc::new(set)));
        }
        self.assignments.insert(update.name.into(), update.body.into());
        Ok(())
    }

    pub(super) fn remove_endpoints(&mut self, name: &str) {
        self.assignments.remove(name);
        let users = self.eds.get(name).into_iter().flatten();
        let slots: Vec<_> = users
            .filter_map(|user| self.clusters.get(user))
            .cloned()
            .collect();
        for slot in slots {
            slot.set_endpoints(Some(Arc::new(EndpointSet::default())));
            self.note_membership(&slot, None);
        }
    }

    /// Replaces the endpoints of a cluster whose names were resolved.
    pub fn set_resolved(
        &mut self,
        cluster: &str,
        assignment: &pb_endpoint::ClusterLoadAssignment,
    ) -> Result<(), Refusal> {
        if let Some(slot) = self.clusters.get(cluster) {
            let set = EndpointSet::compile(assignment, slot.endpoints().as_deref())?;
            slot.set_endpoints(Some(Arc::new(set)));
            self.answered.insert((ResourceType::Endpoints, cluster.into()));
        }
        Ok(())
    }
}
