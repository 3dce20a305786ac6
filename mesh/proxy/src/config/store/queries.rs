//! What others ask of the store: names to subscribe to, what is still missing, what exists.

use std::collections::BTreeSet;
use std::sync::Arc;

use serin_xds::ResourceType;
use serin_xds::client::NameChanges;

use super::Store;
use super::received::{Kept, Received};
use crate::config::cluster::{Cluster, Discovery};
use crate::config::listener::Listener;
use crate::config::on_demand::Wanted;
use crate::config::slot::{ClusterSlot, FirstUses, VirtualHostSlot};
use crate::config::table::RouteTable;
use crate::policy::tap::{EVERYWHERE, Spot};

impl Store {
    /// What was received and is in use.
    pub fn received(&self) -> &Received {
        &self.received
    }

    /// Encoded endpoints by the name that they were asked for by.
    pub fn assignments(&self) -> impl Iterator<Item = (&str, &Kept)> {
        self.assignments.iter().map(|(name, kept)| (&**name, kept))
    }

    /// Names that the proxy must ask for by EDS.
    pub fn eds_names(&self) -> impl Iterator<Item = &str> {
        self.eds.all().map(|name| &**name)
    }

    /// What has changed of names to ask for, since this was asked last.
    pub fn take_name_changes(&mut self) -> [(ResourceType, NameChanges); 3] {
        [
            (ResourceType::Secret, self.slots.secrets.take_name_changes()),
            (ResourceType::Endpoints, self.eds.take_changes()),
            (ResourceType::Route, self.rds.take_changes()),
        ]
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
    pub fn rds_names(&self) -> impl Iterator<Item = &Arc<str>> {
        self.rds.all()
    }

    /// Whether any route configuration takes its virtual hosts by VHDS.
    pub fn wants_virtual_hosts(&self) -> bool {
        self.discovering > 0
    }

    /// Names that the proxy must ask for by ECDS.
    pub fn extension_names(&mut self) -> BTreeSet<Arc<str>> {
        let extensions = &mut self.slots.extensions;
        let names = extensions.names();
        let subjects = names.iter().flat_map(|name| {
            let kinds = extensions.kinds(name).into_iter();
            kinds.map(|kind| (kind, Box::from(&**name)))
        });
        self.counts.subscriptions.ask_extensions(&subjects.collect());
        names
    }

    /// Whether the cluster can be used: it exists and, where its endpoints come by EDS, has been told them.
    pub fn cluster_is_live(&self, name: &str) -> bool {
        let Some(config) = self.clusters.get(name).and_then(|slot| slot.config()) else {
            return false;
        };
        match &config.discovery {
            Discovery::Eds(eds) => self.eds.is_answered(eds),
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
    pub fn checked_clusters(&self) -> impl Iterator<Item = &Arc<ClusterSlot>> {
        self.checked.values()
    }

    /// Changes with each change of these clusters or of their endpoints.
    pub fn checked_version(&self) -> u64 {
        self.checked_version
    }

    /// Where the first use of each cluster is told.
    pub fn first_uses(&self) -> Arc<FirstUses> {
        self.slots.first_uses.clone()
    }

    /// Clusters whose endpoints are names to resolve.
    pub fn dns_clusters(&self) -> Vec<Arc<Cluster>> {
        self.dns.values().filter_map(|slot| slot.config()).collect()
    }

    /// Whether the configuration that has been announced is complete: [`Self::cold`] would name nothing.
    pub fn is_complete(&self) -> bool {
        self.eds.is_complete() && self.rds.is_complete() && self.missing_for_warmth().is_empty()
    }

    /// What is still missing before the configuration that has been announced is complete: endpoints of clusters and
    /// routes of listeners that were never answered for.
    pub fn cold(&self) -> Vec<String> {
        let endpoints = self.eds.cold().map(|name| format!("endpoints {name}"));
        let routes = self.rds.cold().map(|name| format!("routes {name}"));
        endpoints.chain(routes).chain(self.missing_for_warmth()).collect()
    }

    /// Filters, secrets and layers of the runtime that something waits for.
    fn missing_for_warmth(&self) -> Vec<String> {
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
        let mut missing: Vec<_> = extensions.map(|name| format!("extension {name}")).collect();
        let layers = self.slots.runtime.awaited();
        missing.extend(layers.map(|layer| format!("runtime layer {}", layer.name)));
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
