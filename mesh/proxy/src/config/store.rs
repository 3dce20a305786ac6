//! The store: every configuration resource that the proxy holds, by type and name.
//!
//! Owned by the control thread. [`Store::apply`] takes a batch (one xDS response) and says what was refused;
//! everything else is live, on all workers, when it returns. Bound listeners are announced to the workers through
//! [`ListenerChange`]s; all else they read through slots.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::SocketAddr;
use std::sync::Arc;

use arc_swap::ArcSwap;
use prost::Message;
use serin_xds::ResourceType;
use serin_xds::pb::envoy::config::cluster::v3 as pb_cluster;
use serin_xds::pb::envoy::config::endpoint::v3 as pb_endpoint;
use serin_xds::pb::envoy::config::listener::v3 as pb_listener;
use serin_xds::pb::envoy::config::route::v3 as pb_route;

use super::cluster::{Cluster, Discovery, Outlier};
use super::convert::Address;
use super::endpoint::EndpointSet;
use super::headers::HeaderOps;
use super::listener::Listener;
use super::route::{Context, VirtualHost};
use super::slot::{ClusterSlot, ListenerSlot, RouteSlot, Slots, VirtualHostSlot};
use super::table::{DomainIndex, RouteTable};
use crate::clock::now_ms;
use crate::error::{Refusal, Within};
use crate::metrics::collect::Family;
use crate::policy::per_route::PerRoute;
use crate::random;
use crate::tls::table::{SecretTable, Side};

/// How long clusters and listeners wait for their secrets: Envoy's `initial_fetch_timeout`.
pub const WARMING_LIMIT_MS: u64 = 15_000;

/// What the workers must do about a socket.
#[derive(Clone, Debug)]
pub enum ListenerChange {
    /// Listen.
    Open(Arc<ListenerSlot>),
    /// Stop listening; connections drain.
    Close(Arc<str>),
}

/// One resource of a batch.
#[derive(Clone, Debug)]
pub struct Update<'a> {
    /// Its name.
    pub name: &'a str,
    /// The encoded message.
    pub body: &'a [u8],
}

/// Listeners without a socket, by the destination that they stand for.
#[derive(Debug, Default)]
pub struct VirtualListeners {
    exact: HashMap<SocketAddr, Arc<Listener>, foldhash::fast::RandomState>,
    by_port: HashMap<u16, Arc<Listener>, foldhash::fast::RandomState>,
}

impl VirtualListeners {
    /// The listener for a connection to `destination`.
    pub fn find(&self, destination: SocketAddr) -> Option<&Arc<Listener>> {
        self.exact
            .get(&destination)
            .or_else(|| self.by_port.get(&destination.port()))
    }
}

/// State of one route configuration.
#[derive(Debug)]
struct RouteState {
    slot: Arc<RouteSlot>,
    /// The message without its virtual hosts; `None` while only virtual hosts have arrived.
    base: Option<pb_route::RouteConfiguration>,
    /// Filter configuration of the message, compiled with it.
    per_filter: Arc<PerRoute>,
    inline: Vec<Arc<VirtualHostSlot>>,
    discovered: BTreeMap<Box<str>, Arc<VirtualHostSlot>>,
}

/// What waits for secrets.
#[derive(Debug, Default)]
struct Warming {
    clusters: BTreeMap<Arc<str>, Waiting<(Cluster, Option<EndpointSet>)>>,
    listeners: BTreeMap<Arc<str>, Waiting<Arc<Listener>>>,
}

#[derive(Debug)]
struct Waiting<T> {
    item: T,
    /// Process clock, ms.
    since: u64,
}

/// See the module.
#[derive(Debug)]
pub struct Store {
    slots: Slots,
    workers: usize,
    clusters: BTreeMap<Arc<str>, Arc<ClusterSlot>>,
    /// EDS name to the clusters that use it.
    eds: BTreeMap<Box<str>, BTreeSet<Arc<str>>>,
    /// Encoded: decoded messages are many times as large, and these are only read again when a cluster is replaced.
    assignments: BTreeMap<Box<str>, Box<[u8]>>,
    routes: BTreeMap<Arc<str>, RouteState>,
    listeners: BTreeMap<Arc<str>, Arc<Listener>>,
    bound: BTreeMap<Arc<str>, Arc<ListenerSlot>>,
    virtuals: Arc<ArcSwap<VirtualListeners>>,
    warming: Warming,
    answered: BTreeSet<(ResourceType, Arc<str>)>,
    changes: Vec<ListenerChange>,
    applied: u64,
}

impl Store {
    /// An empty store for that many workers.
    pub fn new(workers: usize) -> Self {
        Self {
            slots: Slots::default(),
            workers: workers.max(1),
            clusters: BTreeMap::new(),
            eds: BTreeMap::new(),
            assignments: BTreeMap::new(),
            routes: BTreeMap::new(),
            listeners: BTreeMap::new(),
            bound: BTreeMap::new(),
            virtuals: Arc::default(),
            warming: Warming::default(),
            answered: BTreeSet::new(),
            changes: Vec::new(),
            applied: 0,
        }
    }

    /// Batches taken so far.
    pub fn applied(&self) -> u64 {
        self.applied
    }

    /// The slot of the cluster that this proxy is a member of.
    pub fn local_cluster(&mut self, name: &str) -> Arc<ClusterSlot> {
        self.slots.cluster(name)
    }

    /// Listeners without sockets; shared with the workers.
    pub fn virtual_listeners(&self) -> Arc<ArcSwap<VirtualListeners>> {
        self.virtuals.clone()
    }

    /// Sockets to open or close since the last call.
    pub fn take_listener_changes(&mut self) -> Vec<ListenerChange> {
        std::mem::take(&mut self.changes)
    }

    /// Access log files are opened anew.
    pub fn reopen_logs(&self) {
        self.slots.sinks.reopen();
    }

    /// What filters counted.
    pub fn counters(&self) -> Vec<Family> {
        self.slots.counters.collect()
    }

    /// Takes a batch of resources of one type. What is refused is returned by name; the rest is live.
    pub fn apply(
        &mut self,
        resource_type: ResourceType,
        upserted: &[Update<'_>],
        removed: &[&str],
    ) -> Vec<(Box<str>, Refusal)> {
        self.applied += 1;
        let mut refused = Vec::new();
        let mut dirty = BTreeSet::new();
        for update in upserted {
            self.answered.insert((resource_type, update.name.into()));
            let result = match resource_type {
                ResourceType::Cluster => self.put_cluster(update),
                ResourceType::Endpoints => self.put_endpoints(update),
                ResourceType::Listener => self.put_listener(update),
                ResourceType::Route => self.put_route(update, &mut dirty),
                ResourceType::VirtualHost => self.put_virtual_host(update, &mut dirty),
                ResourceType::Secret => self.slots.secrets.put(update.name, update.body),
            };
            if let Err(refusal) = result {
                refused.push((update.name.into(), refusal));
            }
        }
        for name in removed {
            self.answered.insert((resource_type, (*name).into()));
            match resource_type {
                ResourceType::Cluster => self.remove_cluster(name),
                ResourceType::Endpoints => self.remove_endpoints(name),
                ResourceType::Listener => self.remove_listener(name),
                ResourceType::Route => self.remove_route(name),
                ResourceType::VirtualHost => self.remove_virtual_host(name, &mut dirty),
                ResourceType::Secret => self.slots.secrets.remove(name),
            }
        }
        for name in dirty {
            refused.extend(self.rebuild(&name));
        }
        if resource_type == ResourceType::Secret {
            self.warm(None);
        }
        if resource_type == ResourceType::Listener {
            self.publish_virtual_listeners();
        }
        if !removed.is_empty() {
            self.slots.sweep();
        }
        refused
    }

    fn put_cluster(&mut self, update: &Update<'_>) -> Result<(), Refusal> {
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

    fn activate_cluster(&mut self, slot: Arc<ClusterSlot>, (cluster, own): (Cluster, Option<EndpointSet>)) {
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
            slot.set_endpoints(Some(Arc::new(set)));
        }
        self.clusters.insert(slot.name.clone(), slot);
    }

    /// Takes into use what has got its secrets meanwhile, or at `now` (process clock, ms) has waited long enough:
    /// connections then fail one by one until the secrets come, and everything else works.
    pub fn warm(&mut self, now: Option<u64>) {
        let late = |since: u64| now.is_some_and(|now| now.saturating_sub(since) >= WARMING_LIMIT_MS);
        let ready: Vec<_> = self
            .warming
            .clusters
            .iter()
            .filter(|(_, waiting)| {
                late(waiting.since) || waiting.item.0.secrets().all(|secret| secret.version() > 0)
            })
            .map(|(name, _)| name.clone())
            .collect();
        for name in ready {
            if let Some(waiting) = self.warming.clusters.remove(&name) {
                let slot = self.slots.cluster(&name);
                self.activate_cluster(slot, waiting.item);
            }
        }
        let ready: Vec<_> = self
            .warming
            .listeners
            .iter()
            .filter(|(_, waiting)| {
                late(waiting.since) || waiting.item.secrets().all(|secret| secret.version() > 0)
            })
            .map(|(name, _)| name.clone())
            .collect();
        let any = !ready.is_empty();
        for name in ready {
            if let Some(waiting) = self.warming.listeners.remove(&name) {
                self.activate_listener(waiting.item);
            }
        }
        if any {
            self.publish_virtual_listeners();
        }
    }

    /// Whether something waits for secrets.
    pub fn is_warming(&self) -> bool {
        !self.warming.clusters.is_empty() || !self.warming.listeners.is_empty()
    }

    /// Every secret: what is in use, what is wanted, what it counts.
    pub fn secrets(&mut self) -> &mut SecretTable {
        &mut self.slots.secrets
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

    fn remove_cluster(&mut self, name: &str) {
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
    }

    fn put_endpoints(&mut self, update: &Update<'_>) -> Result<(), Refusal> {
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
            slot.set_endpoints(Some(Arc::new(set)));
        }
        self.assignments.insert(update.name.into(), update.body.into());
        Ok(())
    }

    fn remove_endpoints(&mut self, name: &str) {
        self.assignments.remove(name);
        for user in self.eds.get(name).into_iter().flatten() {
            if let Some(slot) = self.clusters.get(user) {
                slot.set_endpoints(Some(Arc::new(EndpointSet::default())));
            }
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

    fn put_listener(&mut self, update: &Update<'_>) -> Result<(), Refusal> {
        let message = decode::<pb_listener::Listener>(update)?;
        let mut context = Context {
            slots: &mut self.slots,
            workers: self.workers,
            seed: random::next(),
        };
        let listener = Arc::new(Listener::compile(&message, &mut context)?);
        for name in listener.route_names() {
            self.route_state(&name);
        }
        if listener.secrets().all(|secret| secret.version() > 0) {
            self.warming.listeners.remove(&listener.name);
            self.activate_listener(listener);
        } else {
            let waiting = Waiting {
                item: listener.clone(),
                since: now_ms(),
            };
            self.warming.listeners.insert(listener.name.clone(), waiting);
        }
        Ok(())
    }

    fn activate_listener(&mut self, listener: Arc<Listener>) {
        if listener.bind {
            match self.bound.get(&listener.name) {
                Some(slot) if slot.load().addresses == listener.addresses => slot.set(listener.clone()),
                existing => {
                    if existing.is_some() {
                        self.changes.push(ListenerChange::Close(listener.name.clone()));
                    }
                    let slot = Arc::new(ListenerSlot::new(listener.clone(), self.workers));
                    self.bound.insert(listener.name.clone(), slot.clone());
                    self.changes.push(ListenerChange::Open(slot));
                }
            }
        } else if self.bound.remove(&listener.name).is_some() {
            self.changes.push(ListenerChange::Close(listener.name.clone()));
        }
        if let Some(old) = self.listeners.insert(listener.name.clone(), listener) {
            old.retire();
        }
    }

    fn remove_listener(&mut self, name: &str) {
        self.slots.secrets.forget(Side::Listener, name);
        self.warming.listeners.remove(name);
        if let Some(old) = self.listeners.remove(name) {
            old.retire();
        }
        if let Some(slot) = self.bound.remove(name) {
            self.changes.push(ListenerChange::Close(slot.load().name.clone()));
        }
    }

    fn publish_virtual_listeners(&mut self) {
        let mut table = VirtualListeners::default();
        for listener in self.listeners.values().filter(|listener| !listener.bind) {
            for address in &listener.addresses {
                if address.ip().is_unspecified() {
                    table.by_port.insert(address.port(), listener.clone());
                } else {
                    table.exact.insert(*address, listener.clone());
                }
            }
        }
        self.virtuals.store(Arc::new(table));
    }

    fn route_state(&mut self, name: &str) -> &mut RouteState {
        let slot = self.slots.route(name);
        self.routes
            .entry(slot.name.clone())
            .or_insert_with(|| RouteState {
                slot,
                base: None,
                per_filter: Arc::default(),
                inline: Vec::new(),
                discovered: BTreeMap::new(),
            })
    }

    fn put_route(&mut self, update: &Update<'_>, dirty: &mut BTreeSet<Arc<str>>) -> Result<(), Refusal> {
        let mut message = decode::<pb_route::RouteConfiguration>(update)?;
        let mut context = Context {
            slots: &mut self.slots,
            workers: self.workers,
            seed: random::next(),
        };
        let inline = compile_hosts(&message, &mut context)?;
        // Compiled before it is kept, so that a refusal leaves the last good one.
        check_table(&message, &inline)?;
        let per_filter = Arc::new(PerRoute::compile(&message.typed_per_filter_config, &mut context)?);
        message.virtual_hosts.clear();
        let state = self.route_state(update.name);
        state.per_filter = per_filter;
        state.base = Some(message);
        state.inline = inline;
        dirty.insert(state.slot.name.clone());
        Ok(())
    }

    fn remove_route(&mut self, name: &str) {
        if let Some(state) = self.routes.get_mut(name) {
            state.base = None;
            state.inline.clear();
            state.slot.set(None);
            if state.discovered.is_empty()
                && !self
                    .listeners
                    .values()
                    .any(|l| l.route_names().any(|n| &*n == name))
            {
                self.routes.remove(name);
            }
        }
    }

    fn put_virtual_host(
        &mut self,
        update: &Update<'_>,
        dirty: &mut BTreeSet<Arc<str>>,
    ) -> Result<(), Refusal> {
        let (route_name, host_name) = split_host_name(update.name)?;
        let message = decode::<pb_route::VirtualHost>(update)?;
        let mut context = Context {
            slots: &mut self.slots,
            workers: self.workers,
            seed: random::next(),
        };
        let host = VirtualHost::compile(&message, &mut context)?;
        let state = self.route_state(route_name);
        match state.discovered.get(host_name) {
            // The common case, a weight change: one swap, and the table is not touched.
            Some(slot) if slot.load().domains == host.domains => slot.set(host),
            _ => {
                // A new slot also when domains change, so that until the table is rebuilt the old one stays whole.
                state
                    .discovered
                    .insert(host_name.into(), Arc::new(VirtualHostSlot::new(host)));
                dirty.insert(state.slot.name.clone());
            }
        }
        Ok(())
    }

    fn remove_virtual_host(&mut self, name: &str, dirty: &mut BTreeSet<Arc<str>>) {
        let Ok((route_name, host_name)) = split_host_name(name) else {
            return;
        };
        if let Some(state) = self.routes.get_mut(route_name)
            && state.discovered.remove(host_name).is_some()
        {
            dirty.insert(state.slot.name.clone());
        }
    }

    /// Rebuilds the domain index of a route configuration. A discovered host that claims the domain of another is left
    /// out and named.
    fn rebuild(&mut self, name: &str) -> Vec<(Box<str>, Refusal)> {
        let Some(state) = self.routes.get_mut(name) else {
            return Vec::new();
        };
        let Some(base) = &state.base else {
            state.slot.set(None);
            return Vec::new();
        };
        let mut refused = Vec::new();
        let mut domains = DomainIndex::default();
        for host in &state.inline {
            // Checked when the configuration was taken.
            let _ = insert_host(&mut domains, host);
        }
        state
            .discovered
            .retain(|host_name, host| match insert_host(&mut domains, host) {
                Ok(()) => true,
                Err(refusal) => {
                    refused.push((format!("{name}/{host_name}").into(), refusal));
                    false
                }
            });
        match table_of(base, domains, state.per_filter.clone()) {
            Ok(table) => state.slot.set(Some(Arc::new(table))),
            Err(refusal) => refused.push((name.into(), refusal)),
        }
        refused
    }

    /// Names that the proxy must ask for by EDS.
    pub fn eds_names(&self) -> impl Iterator<Item = &str> {
        self.eds.keys().map(|name| &**name)
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

fn decode<M: Message + Default>(update: &Update<'_>) -> Result<M, Refusal> {
    M::decode(update.body).map_err(|error| Refusal::new("", format!("not a valid message: {error}")))
}

fn split_host_name(name: &str) -> Result<(&str, &str), Refusal> {
    name.split_once('/').ok_or_else(|| {
        Refusal::new(
            "name",
            "a virtual host resource is named <route configuration>/<virtual host>",
        )
    })
}

fn compile_hosts(
    from: &pb_route::RouteConfiguration,
    context: &mut Context<'_>,
) -> Result<Vec<Arc<VirtualHostSlot>>, Refusal> {
    from.virtual_hosts
        .iter()
        .enumerate()
        .map(|(index, host)| {
            VirtualHost::compile(host, context)
                .map(|host| Arc::new(VirtualHostSlot::new(host)))
                .within(format!("virtual_hosts[{index}]"))
        })
        .collect()
}

fn insert_host(domains: &mut DomainIndex, host: &Arc<VirtualHostSlot>) -> Result<(), Refusal> {
    let loaded = host.load();
    loaded
        .domains
        .iter()
        .try_for_each(|domain| domains.check(domain, host))?;
    loaded
        .domains
        .iter()
        .for_each(|domain| domains.insert(domain, host));
    Ok(())
}

fn check_table(from: &pb_route::RouteConfiguration, hosts: &[Arc<VirtualHostSlot>]) -> Result<(), Refusal> {
    let mut domains = DomainIndex::default();
    for (index, host) in hosts.iter().enumerate() {
        insert_host(&mut domains, host).within(format!("virtual_hosts[{index}]"))?;
    }
    table_of(from, domains, Arc::default()).map(drop)
}

fn table_of(
    from: &pb_route::RouteConfiguration,
    domains: DomainIndex,
    per_filter: Arc<PerRoute>,
) -> Result<RouteTable, Refusal> {
    let unsupported = [
        ("vhost_header", !from.vhost_header.is_empty()),
        (
            "cluster_specifier_plugins",
            !from.cluster_specifier_plugins.is_empty(),
        ),
        (
            "request_mirror_policies",
            !from.request_mirror_policies.is_empty(),
        ),
        (
            "most_specific_header_mutations_wins",
            from.most_specific_header_mutations_wins,
        ),
        (
            "ignore_path_parameters_in_path_matching",
            from.ignore_path_parameters_in_path_matching,
        ),
    ];
    if let Some((field, _)) = unsupported.iter().find(|(_, present)| *present) {
        return Err(Refusal::new(*field, "not supported"));
    }
    Ok(RouteTable {
        name: from.name.as_str().into(),
        domains,
        ignore_port: from.ignore_port_in_host_matching,
        request_headers: HeaderOps::compile(
            &from.request_headers_to_add,
            &from.request_headers_to_remove,
            "request_headers",
        )?,
        response_headers: HeaderOps::compile(
            &from.response_headers_to_add,
            &from.response_headers_to_remove,
            "response_headers",
        )?,
        per_filter,
    })
}

/// Compiles the route configuration that a listener carries itself.
pub(super) fn compile_inline_routes(
    from: &pb_route::RouteConfiguration,
    context: &mut Context<'_>,
) -> Result<RouteTable, Refusal> {
    if from.vhds.is_some() {
        return Err(Refusal::new("vhds", "needs a route configuration by RDS"));
    }
    let hosts = compile_hosts(from, context)?;
    let mut domains = DomainIndex::default();
    for (index, host) in hosts.iter().enumerate() {
        insert_host(&mut domains, host).within(format!("virtual_hosts[{index}]"))?;
    }
    let per_filter = Arc::new(PerRoute::compile(&from.typed_per_filter_config, context)?);
    table_of(from, domains, per_filter)
}

#[cfg(test)]
mod tests;
