//! The store: every configuration resource that the proxy holds, by type and name.
//!
//! Owned by the control thread. [`Store::apply`] takes a batch (one xDS response) and says what was refused;
//! everything else is live, on all workers, when it returns. Bound listeners are announced to the workers through
//! [`ListenerChange`]s; all else they read through slots.

mod clusters;
mod counts;
mod listeners;
mod membership;
mod names;
mod queries;
mod received;
mod routes;
pub mod subscriptions;

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use arc_swap::ArcSwap;
use prost::Message;
use serin_xds::ResourceType;

use self::counts::Counts;
use self::membership::Membership;
use self::names::Names;
pub use self::received::{Failure, Kept, Received};
pub(super) use self::routes::compile_inline_routes;
use self::routes::{RouteState, Staged};
use self::subscriptions::Came;
use super::cluster::Cluster;
use super::endpoint::EndpointSet;
use super::listener::Listener;
use super::slot::{ClusterSlot, ListenerSlot, Slots};
use crate::config::runtime::Runtime;
use crate::error::Refusal;
use crate::metrics::collect::Family;
use crate::tls::table::SecretTable;

/// How long clusters and listeners wait for their secrets: Envoy's `initial_fetch_timeout`.
pub const WARMING_LIMIT_MS: u64 = 15_000;

/// What the workers must do about a socket.
#[derive(Clone, Debug)]
pub enum ListenerChange {
    /// Listen.
    Open(Arc<ListenerSlot>),
    /// Stop listening; connections drain.
    Close(Arc<str>),
    /// It waits for something; what it will be bound to must be free.
    Try(Arc<Listener>),
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

/// What waits for secrets, for the configuration of filters, or for the runtime.
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
    /// Clusters whose endpoints are names to resolve.
    dns: BTreeMap<Arc<str>, Arc<ClusterSlot>>,
    /// Clusters with active health checks, and how often they or their endpoints have changed.
    checked: BTreeMap<Arc<str>, Arc<ClusterSlot>>,
    checked_version: u64,
    /// EDS names and the clusters that use them.
    eds: Names,
    /// RDS names and the listeners that use them, once for each place: in use, waiting.
    rds: Names,
    /// Route configurations that take their virtual hosts by VHDS.
    discovering: usize,
    /// Encoded: decoded messages are many times as large, and these are only read again when a cluster is replaced.
    assignments: BTreeMap<Box<str>, Kept>,
    /// Those that are given up if nothing follows, and when, on the process clock.
    stale: BTreeMap<Box<str>, u64>,
    routes: BTreeMap<Arc<str>, RouteState>,
    listeners: BTreeMap<Arc<str>, Arc<Listener>>,
    bound: BTreeMap<Arc<str>, Arc<ListenerSlot>>,
    virtuals: Arc<ArcSwap<VirtualListeners>>,
    warming: Warming,
    membership: Option<Membership>,
    changes: Vec<ListenerChange>,
    applied: u64,
    received: Received,
    counts: Counts,
}

impl Store {
    /// An empty store for that many workers.
    pub fn new(workers: usize) -> Self {
        Self {
            slots: Slots::default(),
            workers: workers.max(1),
            clusters: BTreeMap::new(),
            dns: BTreeMap::new(),
            checked: BTreeMap::new(),
            checked_version: 0,
            eds: Names::default(),
            rds: Names::default(),
            discovering: 0,
            assignments: BTreeMap::new(),
            stale: BTreeMap::new(),
            routes: BTreeMap::new(),
            listeners: BTreeMap::new(),
            bound: BTreeMap::new(),
            virtuals: Arc::default(),
            warming: Warming::default(),
            membership: None,
            changes: Vec::new(),
            applied: 0,
            received: Received::default(),
            counts: Counts::default(),
        }
    }

    /// What the managers of clusters and listeners count.
    pub fn counts(&mut self) -> &mut Counts {
        &mut self.counts
    }

    /// Clusters and listeners that wait for something.
    pub fn warming_count(&self) -> (usize, usize) {
        (self.warming.clusters.len(), self.warming.listeners.len())
    }

    /// Batches taken so far.
    pub fn applied(&self) -> u64 {
        self.applied
    }

    /// The slot of the cluster that this proxy is a member of.
    pub fn local_cluster(&mut self, name: &str) -> Arc<ClusterSlot> {
        self.slots.cluster(name)
    }

    /// Where this proxy is, for limits that the members of its cluster share.
    pub(crate) fn set_home(&mut self, home: Arc<super::slot::Home>) {
        self.slots.home = Some(home);
    }

    /// Listeners without sockets; shared with the workers.
    pub fn virtual_listeners(&self) -> Arc<ArcSwap<VirtualListeners>> {
        self.virtuals.clone()
    }

    /// Sockets to open or close since the last call.
    pub fn take_listener_changes(&mut self) -> Vec<ListenerChange> {
        std::mem::take(&mut self.changes)
    }

    /// What workers are to do in the background since the last call.
    pub fn take_chores(&mut self) -> Vec<crate::config::slot::Chore> {
        std::mem::take(&mut self.slots.chores)
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
        let mut staged = Staged::new();
        for update in upserted {
            self.answer(resource_type, update.name);
            let news = resource_type == ResourceType::Route
                && self
                    .received
                    .route(update.name)
                    .is_none_or(|kept| kept != update.body);
            let result = match resource_type {
                ResourceType::Cluster => self.put_cluster(update),
                ResourceType::Endpoints => self.put_endpoints(update),
                ResourceType::Listener => self.put_listener(update),
                ResourceType::Route => self.put_route(update, &mut refused),
                ResourceType::VirtualHost => self.put_virtual_host(update, &mut staged),
                ResourceType::Secret => self.slots.secrets.put(update.name, update.body),
                ResourceType::Extension => self.put_extension(update),
                ResourceType::Runtime => self.put_runtime(update),
            };
            match result {
                Ok(()) => {
                    if news {
                        self.counts.subscriptions.routes_changed(update.name);
                    }
                    self.received.keep(resource_type, update.name, update.body);
                }
                Err(refusal) => refused.push((update.name.into(), refusal)),
            }
        }
        for name in removed {
            self.received.forget(resource_type, name);
            self.answer(resource_type, name);
            match resource_type {
                ResourceType::Cluster => self.remove_cluster(name),
                ResourceType::Endpoints => self.remove_endpoints(name),
                ResourceType::Listener => self.remove_listener(name),
                ResourceType::Route => self.remove_route(name),
                ResourceType::VirtualHost => self.remove_virtual_host(name, &mut staged),
                ResourceType::Secret => self.slots.secrets.remove(name),
                ResourceType::Extension => self.slots.extensions.remove(name),
                ResourceType::Runtime => self.slots.runtime.remove(name),
            }
        }
        refused.extend(self.settle_hosts(staged));
        if !refused.is_empty() {
            let bodies: HashMap<&str, &[u8]> =
                upserted.iter().map(|update| (update.name, update.body)).collect();
            for (name, refusal) in &refused {
                let body = bodies.get(&**name).copied();
                self.received.fail(resource_type, name, body, refusal);
            }
        }
        if self.is_warming() || resource_type == ResourceType::Runtime {
            self.warm(None);
        }
        if resource_type == ResourceType::Listener {
            self.publish_virtual_listeners();
        }
        self.slots.sweep_after(removed.len());
        refused
    }

    /// The control plane's versions of the resources that have been [applied](Self::apply) just now.
    pub fn note_versions<'a>(
        &mut self,
        resource_type: ResourceType,
        versions: impl IntoIterator<Item = (&'a str, &'a Arc<str>)>,
    ) {
        for (name, version) in versions {
            if resource_type == ResourceType::Endpoints
                && self.received.failure(resource_type, name).is_none()
            {
                if let Some(kept) = self.assignments.get_mut(name) {
                    kept.version = Some(version.clone());
                }
            } else {
                self.received.note_version(resource_type, name, version);
            }
        }
    }

    /// What has been [applied](Self::apply) just now was one delivery of the control plane, of a state that it calls
    /// `version`, and took so long; `refused` are the names of which it was refused.
    pub fn note_delivery<'a>(
        &mut self,
        resource_type: ResourceType,
        version: &str,
        names: impl Iterator<Item = &'a str>,
        refused: &[(Box<str>, Refusal)],
        took: Duration,
    ) {
        let version = subscriptions::version_hash(version);
        let taken = |name: &str| !refused.iter().any(|(refused, _)| **refused == *name);
        let came = |taken| Came { taken, version, took };
        let counts = &mut self.counts.subscriptions;
        match resource_type {
            ResourceType::Cluster => {
                let changed = names.into_iter().any(taken);
                counts.clusters_came(came(refused.is_empty()), changed);
            }
            ResourceType::Listener => counts.listeners_came(came(refused.is_empty())),
            ResourceType::Route => {
                for name in names {
                    counts.routes_came(name, came(taken(name)));
                    let state = self.routes.get(name);
                    counts.ask_hosts(name, state.is_some_and(|state| state.discovers()));
                }
            }
            ResourceType::VirtualHost => {
                // Of a delivery there is one for each route configuration of which something was in it.
                let mut of_routes = BTreeMap::new();
                for name in names {
                    let route = name.split_once('/').map_or(name, |(route, _)| route);
                    *of_routes.entry(route).or_insert(true) &= taken(name);
                }
                for (route, taken) in of_routes {
                    counts.hosts_came(route, came(taken));
                }
            }
            ResourceType::Extension => names.for_each(|name| counts.extension_came(name, came(taken(name)))),
            ResourceType::Secret => names.for_each(|name| counts.secret_came(name, came(taken(name)))),
            ResourceType::Endpoints => {
                let now = received::wall_ms();
                for name in names.filter(|name| taken(name)) {
                    let users = self.eds.users(name).iter();
                    for slot in users.filter_map(|user| self.clusters.get(user)) {
                        slot.updates.version.store(version, Ordering::Relaxed);
                        slot.updates.updated.store(now, Ordering::Relaxed);
                    }
                }
            }
            ResourceType::Runtime => {}
        }
    }

    /// A stream to the control plane has ended, or could not be opened.
    pub fn note_lost(&mut self) {
        self.counts.subscriptions.lose();
    }

    /// How many of them have.
    pub fn lost(&self) -> u64 {
        self.counts.subscriptions.lost()
    }

    /// What is counted of what the control plane and services of secrets are asked for.
    pub fn subscription_families(&mut self) -> Vec<Family> {
        let secrets = self.slots.secrets.asked_for();
        self.counts.subscriptions.families(&secrets)
    }

    /// Resources that have been [applied](Self::apply) just now are of the bootstrap.
    pub fn note_static<'a>(&mut self, resource_type: ResourceType, names: impl Iterator<Item = &'a str>) {
        for name in names {
            self.received.note_static(resource_type, name);
        }
    }

    /// The control plane has said something about a name.
    fn answer(&mut self, resource_type: ResourceType, name: &str) {
        match resource_type {
            ResourceType::Endpoints => self.eds.answer(name),
            ResourceType::Route => self.rds.answer(name),
            ResourceType::Runtime => self.slots.runtime.answer(name),
            _ => {}
        }
    }

    /// Forgets what nobody refers to any more, where that was put off.
    pub fn sweep(&mut self) {
        self.slots.sweep_rest();
    }

    /// Takes into use what has got meanwhile what it waited for, or at `now` (process clock, ms) has waited long enough:
    /// connections then fail one by one until the secrets come, requests until the routes do, and everything else works.
    pub fn warm(&mut self, now: Option<u64>) {
        let late = |since: u64| now.is_some_and(|now| now.saturating_sub(since) >= WARMING_LIMIT_MS);
        let ready: Vec<_> = self
            .warming
            .clusters
            .iter()
            .filter(|(name, waiting)| late(waiting.since) || self.is_cluster_warm(name, &waiting.item.0))
            .map(|(name, _)| name.clone())
            .collect();
        for name in ready {
            if let Some(waiting) = self.warming.clusters.remove(&name) {
                for secret in waiting.item.0.secrets().filter(|secret| secret.version() == 0) {
                    self.counts.subscriptions.secret_late(&secret.name);
                }
                let slot = self.slots.cluster(&name);
                self.activate_cluster(slot, waiting.item);
            }
        }
        // What serves follows the runtime from the start on.
        if self.slots.runtime.is_awaited() {
            return;
        }
        let ready: Vec<_> = self
            .warming
            .listeners
            .iter()
            .filter(|(_, waiting)| late(waiting.since) || self.is_listener_warm(&waiting.item))
            .map(|(name, _)| name.clone())
            .collect();
        let any = !ready.is_empty();
        for name in ready {
            if let Some(waiting) = self.warming.listeners.remove(&name) {
                let counts = &mut self.counts.subscriptions;
                for place in waiting.item.discovered().filter(|place| !place.is_settled()) {
                    let (kind, name) = place.subject();
                    counts.extension_late(kind, name);
                    place.fall_back();
                }
                for secret in waiting.item.secrets().filter(|secret| secret.version() == 0) {
                    counts.secret_late(&secret.name);
                }
                self.activate_listener(waiting.item);
            }
        }
        if any {
            self.publish_virtual_listeners();
        }
    }

    /// So long has been waited for layers of the runtime; for ever, where nobody will send any (`None`).
    pub fn waited_for_runtime(&mut self, waited: Option<std::time::Duration>) {
        self.slots.runtime.expire(waited);
        self.warm(None);
    }

    /// Values by which shares of requests change.
    pub fn runtime(&mut self) -> &mut Runtime {
        &mut self.slots.runtime
    }

    /// Whether something waits for secrets, routes, endpoints, the configuration of filters or the runtime.
    pub fn is_warming(&self) -> bool {
        !self.warming.clusters.is_empty() || !self.warming.listeners.is_empty()
    }

    /// Every secret: what is in use, what is wanted, what it counts.
    pub fn secrets(&mut self) -> &mut SecretTable {
        &mut self.slots.secrets
    }
}

fn decode<M: Message + Default>(update: &Update<'_>) -> Result<M, Refusal> {
    M::decode(update.body).map_err(|error| Refusal::new("", format!("not a valid message: {error}")))
}

#[cfg(test)]
mod tests;
