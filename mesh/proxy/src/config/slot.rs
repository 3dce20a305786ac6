//! Slots: the cells through which configuration reaches the workers.
//!
//! A route refers to a cluster, a listener to a route table, a route table to its virtual hosts, each through a *slot*:
//! a named cell whose content is swapped atomically. So one changed resource costs one swap, whatever the size of the
//! mesh; a request that has loaded a value keeps it until it is done; and a name may be referred to before, and after,
//! the thing exists (a route to a missing cluster answers 503 `NC`).

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use arc_swap::ArcSwapOption;

use super::cluster::{Cluster, Priority};
use super::discovery::Discovery;
use super::endpoint::EndpointSet;
use super::listener::Listener;
use super::route::VirtualHost;
use super::table::RouteTable;
use crate::metrics::events::{ClusterEvent, Events};

/// A cluster by name: its configuration and its endpoints, each replaced on its own.
#[derive(Debug)]
pub struct ClusterSlot {
    /// Dense index for the workers' tables. May be used again once nobody holds the slot.
    pub id: u32,
    /// The cluster's name.
    pub name: Arc<str>,
    config: ArcSwapOption<Cluster>,
    endpoints: ArcSwapOption<EndpointSet>,
    version: AtomicU64,
    /// What is in use now, over all workers.
    pub usage: Usage,
    /// What rarely happens to it, over all workers.
    pub counted: Events<ClusterEvent>,
    /// Updates of its endpoints.
    pub updates: Updates,
    /// Whether a request that would have waited for it was for it.
    used: Used,
    first_uses: Arc<FirstUses>,
}

/// How the endpoints of a cluster have changed. Small, since every cluster has it.
#[derive(Debug, Default)]
pub struct Updates {
    /// Times that they were asked for.
    pub attempts: AtomicU32,
    /// Answers that were taken.
    pub successes: AtomicU32,
    /// Times that they could not be had.
    pub failures: AtomicU32,
    /// Answers that were refused.
    pub rejected: AtomicU32,
    /// Answers that changed nothing.
    pub unchanged: AtomicU32,
    /// Changes of the set of endpoints.
    pub memberships: AtomicU32,
    /// Streams to the control plane that had failed when it was asked for them first.
    pub lost_before: AtomicU32,
    /// The hash of the state's name that they are of; 0 if they are not discovered.
    pub version: AtomicU64,
    /// When some were taken last, in milliseconds since 1970.
    pub updated: AtomicU64,
}

impl Updates {
    /// Counts one.
    pub(crate) fn add(counter: &AtomicU32) {
        counter.fetch_add(1, Ordering::Relaxed);
    }
}

/// Shared counts for circuit breakers; only written when a limit is set.
#[derive(Debug, Default)]
pub struct Level {
    /// Open or opening connections.
    pub connections: AtomicU32,
    /// Requests on their way.
    pub requests: AtomicU32,
    /// Requests waiting for a connection.
    pub pending: AtomicU32,
    /// Retries on their way.
    pub retries: AtomicU32,
}

/// What is in use of a cluster, over all workers.
#[derive(Debug, Default)]
pub struct Usage {
    levels: [Level; 2],
    /// Whether any worker has had a request for it since it came.
    pub used: AtomicBool,
    /// When the last ejection by outlier detection ends (process clock, ms): after that nobody need be asked.
    pub ejected_until: AtomicU64,
}

impl Usage {
    /// What requests of that priority use.
    pub fn of(&self, priority: Priority) -> &Level {
        &self.levels[priority as usize]
    }
}

/// The first use of each cluster, told by the workers: whoever looks after clusters in the background need not know those
/// that nobody uses.
#[derive(Debug, Default)]
pub struct FirstUses {
    /// Whether somebody listens; else nothing is kept.
    followed: AtomicBool,
    /// At most one entry for each cluster that there is.
    slots: parking_lot::Mutex<Vec<std::sync::Weak<ClusterSlot>>>,
    told: tokio::sync::Notify,
}

impl FirstUses {
    /// From now on uses are told.
    pub(crate) fn follow(&self) {
        self.followed.store(true, Ordering::Release);
    }

    /// Waits until there are any.
    pub(crate) async fn told(&self) {
        self.told.notified().await;
    }

    /// Those since this was asked last.
    pub(crate) fn take(&self) -> Vec<std::sync::Weak<ClusterSlot>> {
        std::mem::take(&mut *self.slots.lock())
    }
}

impl ClusterSlot {
    pub(crate) fn new(id: u32, name: Arc<str>, first_uses: Arc<FirstUses>) -> Self {
        Self {
            first_uses,
            id,
            name,
            config: ArcSwapOption::empty(),
            endpoints: ArcSwapOption::empty(),
            version: AtomicU64::new(1),
            usage: Usage::default(),
            counted: Events::default(),
            updates: Updates::default(),
            used: Used::default(),
        }
    }

    /// A worker has a request for it; cheap for all but the first since it came.
    pub(crate) fn note_use(self: &Arc<Self>) {
        if !self.usage.used.load(Ordering::Relaxed)
            && !self.usage.used.swap(true, Ordering::Relaxed)
            && self.first_uses.followed.load(Ordering::Acquire)
        {
            self.first_uses.slots.lock().push(Arc::downgrade(self));
            self.first_uses.told.notify_one();
        }
    }

    /// Whether the cluster exists.
    pub fn exists(&self) -> bool {
        self.config.load().is_some()
    }

    /// Whether it can be used: it exists and, where its endpoints come by EDS, has been told them.
    pub fn is_live(&self) -> bool {
        let config = self.config.load();
        let Some(config) = &*config else {
            return false;
        };
        !matches!(config.discovery, Discovery::Eds(_)) || self.endpoints.load().is_some()
    }

    /// A request that would have waited for it was for it.
    pub(crate) fn mark_used(&self) {
        self.used.mark();
    }

    /// Whether one was, since this was asked last.
    pub(crate) fn take_used(&self) -> bool {
        self.used.take()
    }

    /// Changes whenever the configuration or the endpoints do.
    pub fn version(&self) -> u64 {
        self.version.load(Ordering::Acquire)
    }

    /// The configuration, if the cluster exists.
    pub fn config(&self) -> Option<Arc<Cluster>> {
        self.config.load_full()
    }

    /// The endpoints, if they are known.
    pub fn endpoints(&self) -> Option<Arc<EndpointSet>> {
        self.endpoints.load_full()
    }

    /// Makes workers look at the hosts again, whose records have changed.
    pub(crate) fn touch(&self) {
        self.version.fetch_add(1, Ordering::Release);
    }

    pub(crate) fn set_config(&self, config: Option<Arc<Cluster>>) {
        if config.is_none() {
            self.usage.used.store(false, Ordering::Relaxed);
        }
        self.config.store(config);
        self.version.fetch_add(1, Ordering::Release);
    }

    pub(crate) fn set_endpoints(&self, endpoints: Option<Arc<EndpointSet>>) {
        self.endpoints.store(endpoints);
        self.version.fetch_add(1, Ordering::Release);
    }
}

/// Where a proxy is: the cluster that it is a member of, and its zone.
#[derive(Debug)]
pub struct Here {
    /// The local cluster.
    pub slot: Arc<ClusterSlot>,
    /// `region/zone/sub_zone`.
    pub zone: Box<str>,
}

/// Where this proxy is, as far as it is known: told by `local_cluster_name` and the node's locality, or found out from the
/// endpoints that have its own address.
#[derive(Debug)]
pub struct Home {
    here: ArcSwapOption<Here>,
    /// Changes of `here`.
    moves: AtomicU64,
}

impl Home {
    pub(crate) fn new(here: Option<Here>) -> Self {
        Self {
            here: ArcSwapOption::from_pointee(here),
            moves: AtomicU64::new(0),
        }
    }

    /// Where that is.
    pub fn here(&self) -> Option<Arc<Here>> {
        self.here.load_full()
    }

    /// How many the local cluster has, as far as is known.
    pub fn members(&self) -> u32 {
        let here = self.here.load();
        let set = here.as_ref().and_then(|here| here.slot.endpoints());
        set.map_or(0, |set| {
            let of_first = set.priorities.first().into_iter().flatten();
            of_first.map(|locality| locality.members.len() as u32).sum()
        })
    }

    /// Differs whenever the place or its members do.
    pub fn version(&self) -> (u64, u64) {
        let members = self.here.load().as_ref().map_or(0, |here| here.slot.version());
        (self.moves.load(Ordering::Acquire), members)
    }

    pub(crate) fn set(&self, here: Option<Here>) {
        self.here.store(here.map(Arc::new));
        self.moves.fetch_add(1, Ordering::Release);
    }
}

impl Here {
    /// Usable hosts of the local cluster by zone.
    pub fn callers(&self) -> std::collections::HashMap<Box<str>, u64> {
        let mut out = std::collections::HashMap::new();
        let checks = self.slot.config().map_or(0, |config| config.health_checks.len());
        let Some(set) = self.slot.endpoints() else {
            return out;
        };
        for locality in set.priorities.iter().take(1).flatten() {
            let usable = set.all[locality.members.clone()]
                .iter()
                .filter(|endpoint| endpoint.usable(checks))
                .count();
            *out.entry(locality.zone.clone()).or_default() += usable as u64;
        }
        out
    }
}

/// A route configuration by name.
#[derive(Debug)]
pub struct RouteSlot {
    /// The route configuration's name.
    pub name: Arc<str>,
    table: ArcSwapOption<RouteTable>,
}

impl RouteSlot {
    pub(crate) fn new(name: Arc<str>) -> Self {
        Self {
            name,
            table: ArcSwapOption::empty(),
        }
    }

    /// The table, if it has arrived.
    pub fn table(&self) -> Option<Arc<RouteTable>> {
        self.table.load_full()
    }

    pub(crate) fn set(&self, table: Option<Arc<RouteTable>>) {
        self.table.store(table);
    }
}

/// One virtual host of a route table; replaced without touching the table.
#[derive(Debug)]
pub struct VirtualHostSlot {
    host: arc_swap::ArcSwap<VirtualHost>,
    used: Used,
}

/// Whether something has been used since somebody asked. Written only when that changes, so that workers can all look.
#[derive(Debug, Default)]
struct Used(AtomicBool);

impl Used {
    fn mark(&self) {
        if !self.0.load(Ordering::Relaxed) {
            self.0.store(true, Ordering::Relaxed);
        }
    }

    fn take(&self) -> bool {
        self.0.swap(false, Ordering::Relaxed)
    }
}

impl VirtualHostSlot {
    pub(crate) fn new(host: VirtualHost) -> Self {
        Self {
            host: arc_swap::ArcSwap::from_pointee(host),
            used: Used::default(),
        }
    }

    /// The virtual host as it is now.
    pub fn load(&self) -> Arc<VirtualHost> {
        self.host.load_full()
    }

    pub(crate) fn set(&self, host: VirtualHost) {
        self.host.store(Arc::new(host));
    }

    /// A request was for it.
    pub(crate) fn mark_used(&self) {
        self.used.mark();
    }

    /// Whether a request was, since this was asked last.
    pub(crate) fn take_used(&self) -> bool {
        self.used.take()
    }
}

/// A bound listener; the configuration that new connections get.
#[derive(Debug)]
pub struct ListenerSlot {
    listener: arc_swap::ArcSwap<Listener>,
    /// Connections of each worker, counted only where the listener wants them exactly even.
    pub connections: Box<[AtomicU32]>,
}

impl ListenerSlot {
    pub(crate) fn new(listener: Arc<Listener>, workers: usize) -> Self {
        Self {
            listener: arc_swap::ArcSwap::new(listener),
            connections: (0..workers).map(|_| AtomicU32::new(0)).collect(),
        }
    }

    /// The listener as it is now.
    pub fn load(&self) -> Arc<Listener> {
        self.listener.load_full()
    }

    /// Replaces the configuration and tells connections of the old one to finish.
    pub(crate) fn set(&self, listener: Arc<Listener>) {
        let old = self.listener.swap(listener);
        old.retire();
    }
}

type Names = std::collections::HashMap<Arc<str>, std::sync::Weak<ClusterSlot>, foldhash::fast::RandomState>;

/// Cluster slots by name, read by workers once for a connection.
#[derive(Clone, Debug, Default)]
pub struct Directory(Arc<parking_lot::RwLock<Names>>);

impl Directory {
    /// The slot of that cluster.
    pub fn find(&self, name: &str) -> Option<Arc<ClusterSlot>> {
        self.0.read().get(name)?.upgrade()
    }
}

/// What a worker does in the background, for as long as its object lives.
#[derive(Clone, Debug)]
pub enum Chore {
    /// Fetches an issuer's keys before anybody needs them.
    Keys(std::sync::Weak<crate::policy::jwt::jwks::Remote>),
}

/// Cluster and route slots by name; owned by whoever compiles the configuration.
#[derive(Debug, Default)]
pub struct Slots {
    clusters: std::collections::HashMap<Arc<str>, Arc<ClusterSlot>, foldhash::fast::RandomState>,
    routes: std::collections::HashMap<Arc<str>, Arc<RouteSlot>, foldhash::fast::RandomState>,
    free: Vec<u32>,
    next: u32,
    /// Resources removed since the last sweep.
    removed: usize,
    /// Where the first use of each cluster is told.
    pub first_uses: Arc<FirstUses>,
    /// Clusters by name, for connections that name theirs.
    pub directory: Directory,
    /// Where this proxy is, if it can know.
    pub home: Option<Arc<Home>>,
    /// Counters of filters.
    pub counters: crate::policy::stats::Registry,
    /// What workers are to do in the background for what was compiled.
    pub chores: Vec<Chore>,
    /// Where access logs are written.
    pub sinks: crate::observe::sink::Sinks,
    /// Values by which shares of requests change.
    pub runtime: crate::config::runtime::Runtime,
    /// Retry policies of routes, of which most are equal.
    pub(crate) retries: super::equal::Equal<super::retry::RetryPolicy>,
    /// Filters whose configuration is a resource of its own.
    pub extensions: crate::config::extension::Extensions,
    /// Secrets that clusters and listeners refer to.
    pub secrets: crate::tls::table::SecretTable,
}

impl Slots {
    /// The slot of that cluster, made if nobody spoke of it before.
    pub fn cluster(&mut self, name: &str) -> Arc<ClusterSlot> {
        if let Some(slot) = self.clusters.get(name) {
            return slot.clone();
        }
        let id = self.free.pop().unwrap_or_else(|| {
            self.next += 1;
            self.next - 1
        });
        let slot = Arc::new(ClusterSlot::new(id, name.into(), self.first_uses.clone()));
        self.clusters.insert(slot.name.clone(), slot.clone());
        self.directory
            .0
            .write()
            .insert(slot.name.clone(), Arc::downgrade(&slot));
        slot
    }

    /// The slot of that route configuration.
    pub fn route(&mut self, name: &str) -> Arc<RouteSlot> {
        if let Some(slot) = self.routes.get(name) {
            return slot.clone();
        }
        let slot = Arc::new(RouteSlot::new(name.into()));
        self.routes.insert(slot.name.clone(), slot.clone());
        slot
    }

    /// Every cluster slot.
    pub fn clusters(&self) -> impl Iterator<Item = &Arc<ClusterSlot>> {
        self.clusters.values()
    }

    /// The slot of a cluster that somebody spoke of.
    pub fn find_cluster(&self, name: &str) -> Option<&Arc<ClusterSlot>> {
        self.clusters.get(name)
    }

    /// Forgets what nobody refers to any more after so many removals, or later: looking costs a time for all slots, so it
    /// comes after as many removals as make that up.
    pub fn sweep_after(&mut self, removed: usize) {
        /// Slots that are looked at for each removal.
        const EACH: usize = 64;
        self.removed += removed;
        if self.removed > 0 && self.removed * EACH >= self.clusters.len() {
            self.sweep();
        }
    }

    /// Does what [`Self::sweep_after`] has put off.
    pub fn sweep_rest(&mut self) {
        if self.removed > 0 {
            self.sweep();
        }
    }

    /// Forgets slots that hold nothing and that nobody refers to any more.
    pub fn sweep(&mut self) {
        self.removed = 0;
        let free = &mut self.free;
        let mut directory = self.directory.0.write();
        self.clusters.retain(|name, slot| {
            let keep = Arc::strong_count(slot) > 1
                || slot.config.load().is_some()
                || slot.endpoints.load().is_some();
            if !keep {
                free.push(slot.id);
                directory.remove(name);
            }
            keep
        });
        drop(directory);
        self.routes
            .retain(|_, slot| Arc::strong_count(slot) > 1 || slot.table.load().is_some());
        self.counters.sweep();
        self.sinks.sweep();
        self.secrets.sweep();
    }
}
