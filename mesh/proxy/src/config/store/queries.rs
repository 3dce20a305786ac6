//! What others ask of the store: names to subscribe to, what is still missing, what exists.

use std::collections::BTreeSet;
use std::sync::Arc;

use serin_xds::ResourceType;

use super::Store;
use super::received::Received;
use crate::config::cluster::{Cluster, Discovery, Outlier};
use crate::config::listener::Listener;
use crate::config::slot::ClusterSlot;
use crate::config::table::RouteTable;
use crate::policy::tap::{EVERYWHERE, Spot};

impl Store {
    /// What was received and is in use.
    pub fn received(&self) -> &Received {
        &self.received
    }

    /// Encoded endpoints by the name that they were asked for by.
    pub fn assignments(&self) -> impl Iterator<Item = (&str, &[u8])> {
        self.assignments.iter().map(|(name, body)| (&**name, &**body))
    }

    /// Names that the proxy must ask for by EDS.
    pub fn eds_names(&self) -> impl Iterator<Item = &str> {
        self.eds.keys().map(|name| &**name)
    }

    /// Where requests that pass a tap filter of that id can be looked at.
    pub fn tap_spot(&self, id: &str) -> Option<Arc<Spot>> {
        self.slots.counters.spots.find(id)
    }

    /// Where all requests can be looked at.
    pub fn tap_everywhere(&self) -> Arc<Spot> {
        self.slots.counters.spots.spot(EVERYWHERE)
    }

    /// Names that the proxy must ask for by RDS.
    pub fn rds_names(&self) -> BTreeSet<Arc<str>> {
        self.listeners
            .values()
            .chain(self.warming.listeners.values().map(|waiting| &waiting.item))
            .flat_map(|listener| listener.route_names().collect::<Vec<_>>())
            .collect()
    }

    /// Whether any route configuration takes its virtual hosts by VHDS.
    pub fn wants_virtual_hosts(&self) -> bool {
        self.routes
            .values()
            .any(|state| state.base.as_ref().is_some_and(|base| base.vhds.is_some()))
    }

    /// Clusters with active health checks.
    pub fn checked_clusters(&self) -> Vec<Arc<ClusterSlot>> {
        self.clusters_where(|config| !config.health_checks.is_empty())
    }

    /// Clusters whose hosts are compared with each other at intervals.
    pub fn compared_clusters(&self) -> Vec<Arc<ClusterSlot>> {
        self.clusters_where(|config| config.outlier.as_ref().is_some_and(Outlier::compares))
    }

    fn clusters_where(&self, wanted: impl Fn(&Cluster) -> bool) -> Vec<Arc<ClusterSlot>> {
        self.clusters
            .values()
            .filter(|slot| slot.config().is_some_and(|config| wanted(&config)))
            .cloned()
            .collect()
    }

    /// Clusters whose endpoints are names to resolve.
    pub fn dns_clusters(&self) -> Vec<Arc<Cluster>> {
        self.clusters
            .values()
            .filter_map(|slot| slot.config())
            .filter(|config| matches!(config.discovery, Discovery::Dns { .. }))
            .collect()
    }

    /// What is still missing before the configuration that has been announced is complete: endpoints of clusters and
    /// routes of listeners that were never answered for.
    pub fn cold(&self) -> Vec<String> {
        let mut missing = Vec::new();
        for name in self.eds.keys() {
            if !self
                .answered
                .contains(&(ResourceType::Endpoints, Arc::from(&**name)))
            {
                missing.push(format!("endpoints {name}"));
            }
        }
        for name in self.rds_names() {
            if !self.answered.contains(&(ResourceType::Route, name.clone())) {
                missing.push(format!("routes {name}"));
            }
        }
        let clusters = self
            .warming
            .clusters
            .values()
            .flat_map(|waiting| waiting.item.0.secrets());
        let listeners = self
            .warming
            .listeners
            .values()
            .flat_map(|waiting| waiting.item.secrets());
        let secrets: BTreeSet<_> = clusters
            .chain(listeners)
            .filter(|secret| secret.version() == 0)
            .map(|secret| format!("secret {}", secret.name))
            .collect();
        missing.extend(secrets);
        missing
    }

    /// Every cluster that exists.
    pub fn clusters(&self) -> impl Iterator<Item = &Arc<ClusterSlot>> {
        self.clusters.values()
    }

    /// Every listener that exists.
    pub fn listeners(&self) -> impl Iterator<Item = &Arc<Listener>> {
        self.listeners.values()
    }

    /// Every route configuration: name, table, number of virtual hosts.
    pub fn routes(&self) -> impl Iterator<Item = (&Arc<str>, Option<Arc<RouteTable>>, usize)> {
        self.routes.iter().map(|(name, state)| {
            (
                name,
                state.slot.table(),
                state.inline.len() + state.discovered.len(),
            )
        })
    }
}
