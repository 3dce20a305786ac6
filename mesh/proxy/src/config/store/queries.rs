//! What others ask of the store: names to subscribe to, what is still missing, what exists.

use std::collections::BTreeSet;
use std::sync::Arc;

use serin_xds::ResourceType;

use super::Store;
use super::received::Received;
use crate::config::cluster::{Cluster, Discovery, Outlier};
use crate::config::listener::Listener;
use crate::config::on_demand::Wanted;
use crate::config::slot::{ClusterSlot, VirtualHostSlot};
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

    /// Names that the proxy must ask for by ECDS.
    pub fn extension_names(&mut self) -> BTreeSet<Arc<str>> {
        self.slots.extensions.names()
    }

    /// Whether the cluster can be used: it exists and, where its endpoints come by EDS, has been told them.
    pub fn cluster_is_live(&self, name: &str) -> bool {
        let Some(config) = self.clusters.get(name).and_then(|slot| slot.config()) else {
            return false;
        };
        match &config.discovery {
            Discovery::Eds(eds) => {
                let key = (ResourceType::Endpoints, Arc::from(&**eds));
                self.answered.contains(&key)
            }
            Discovery::Static | Discovery::Dns { .. } | Discovery::OriginalDst { .. } => true,
        }
    }

    /// The virtual host behind a name on demand, `<route configuration>/<host>`.
    fn host_on_demand(&self, name: &str) -> Option<Arc<VirtualHostSlot>> {
        let (route, host) = name.split_once('/')?;
        self.routes.get(route)?.slot.table()?.find(host).cloned()
    }

    /// Whether a virtual host answers for a name on demand.
    pub fn host_is_live(&self, name: &str) -> bool {
        self.host_on_demand(name).is_some()
    }

    /// Whether what a name on demand stands for has been used since this was asked last.
    pub fn take_used(&self, kind: Wanted, name: &str) -> bool {
        match kind {
            Wanted::VirtualHost => self.host_on_demand(name).is_some_and(|slot| slot.take_used()),
            Wanted::Cluster => self.clusters.get(name).is_some_and(|slot| slot.take_used()),
        }
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
        let extensions = self.slots.extensions.unsettled();
        missing.extend(extensions.map(|name| format!("extension {name}")));
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
