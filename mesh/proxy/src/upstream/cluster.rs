//! A cluster as one worker sees it: its hosts with their connections, and the balancer over them.

use std::cell::{Cell, OnceCell, RefCell};
use std::collections::HashMap;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::balance::{Balancer, Wish};
use super::connect::{ConnectOptions, Speaking};
use super::ewma::Ewma;
use super::outlier::{self, Event};
use super::pool::{ConnectError, Lease, Pool, Wanted};
use super::subset::{Chosen, SubsetBalancer};
use super::zone::{self, Sent, Zone, ZoneRouting};
use crate::clock::now_ms;
use crate::config::balancing::reported::Report;
use crate::config::cluster::{Cluster, Discovery, LbPolicy};
use crate::config::convert::Address;
use crate::config::endpoint::{Endpoint, EndpointSet, HostState};
use crate::config::slot::{ClusterSlot, Home};
use crate::metrics::clusters::ClusterCells;
use crate::metrics::events::ClusterEvent;
use crate::metrics::series::Recorder;
use crate::random;
use crate::worker::Worker;

/// Destinations that one worker keeps connections to for an ORIGINAL_DST cluster.
const MAX_DYNAMIC: usize = 4096;

/// One endpoint on one worker.
#[derive(Debug)]
pub struct Host {
    /// What is known of it.
    pub endpoint: Arc<Endpoint>,
    /// Its connections; the same pool for as long as the address is in the cluster.
    pub pool: Rc<Pool>,
    /// Requests on their way.
    pub active: Rc<InUse>,
    /// Requests on their way to all hosts of the cluster, where the balancer goes by that.
    pub siblings: Option<Rc<Cell<u32>>>,
    /// How long answers take, where the balancer goes by that.
    pub ewma: Option<Rc<Ewma>>,
    /// Its priority level.
    pub priority: u32,
}

/// How many requests a worker has on their way to a host, and where they are counted.
#[derive(Debug)]
pub struct InUse {
    count: Cell<u32>,
    state: Arc<HostState>,
}

impl InUse {
    fn of(endpoint: &Endpoint) -> Rc<Self> {
        Rc::new(Self {
            count: Cell::new(0),
            state: endpoint.state.clone(),
        })
    }
}

impl std::ops::Deref for InUse {
    type Target = Cell<u32>;

    fn deref(&self) -> &Self::Target {
        &self.count
    }
}

impl Host {
    /// A host without connections.
    pub fn new(endpoint: Arc<Endpoint>) -> Self {
        Self {
            active: InUse::of(&endpoint),
            endpoint,
            pool: Rc::default(),
            siblings: None,
            ewma: None,
            priority: 0,
        }
    }
}

/// Counts a request on a host.
#[derive(Debug)]
pub struct Active {
    host: Rc<InUse>,
    siblings: Option<Rc<Cell<u32>>>,
}

impl Active {
    /// Counts until dropped.
    pub fn on(host: &Host) -> Self {
        host.active.set(host.active.get() + 1);
        if let Some(siblings) = &host.siblings {
            siblings.set(siblings.get() + 1);
        }
        host.endpoint.state.counted.request_begins();
        Self {
            host: host.active.clone(),
            siblings: host.siblings.clone(),
        }
    }
}

impl Drop for Active {
    fn drop(&mut self) {
        self.host.state.counted.request_ends();
        self.host.set(self.host.get() - 1);
        if let Some(siblings) = &self.siblings {
            siblings.set(siblings.get() - 1);
        }
    }
}

/// The host's pool, or a new one if its connections were dressed differently (other TLS settings) from now on.
fn pool_for(
    config: &Cluster,
    endpoint: &Endpoint,
    previous: Option<&WorkerCluster>,
    host: &Host,
) -> Rc<Pool> {
    let same = previous.is_some_and(|previous| {
        previous
            .config
            .socket_for(&host.endpoint)
            .is_same(config.socket_for(endpoint))
    });
    if same {
        host.pool.clone()
    } else {
        host.pool.retire();
        Rc::default()
    }
}

/// See the module.
#[derive(Debug)]
pub struct WorkerCluster {
    /// Its slot.
    pub slot: Arc<ClusterSlot>,
    /// Its configuration.
    pub config: Arc<Cluster>,
    /// The slot's version that this was made from.
    pub version: u64,
    set: Option<Arc<EndpointSet>>,
    hosts: Vec<Rc<Host>>,
    balancer: Balancer,
    subsets: Option<Box<SubsetBalancer>>,
    siblings: Option<Rc<Cell<u32>>>,
    /// The local cluster, where zones count, and what was decided for which of its versions.
    home: Option<Arc<Home>>,
    /// For which version of the local cluster; none before the first request.
    routing: RefCell<(Option<(u64, u64)>, ZoneRouting)>,
    dynamic: RefCell<HashMap<SocketAddr, Rc<Host>, foldhash::fast::RandomState>>,
    /// What is counted of it, once something is.
    cells: OnceCell<Arc<ClusterCells>>,
}

impl WorkerCluster {
    /// A connection to one of its hosts.
    pub fn wanted<'a>(
        &'a self,
        worker: &'a Worker,
        host: &'a Host,
        speaking: Speaking,
        options: &'a ConnectOptions,
    ) -> Wanted<'a> {
        Wanted {
            worker,
            slot: &self.slot,
            cluster: &self.config,
            endpoint: &host.endpoint,
            speaking,
            options,
        }
    }

    /// The right to send a request to one of its hosts.
    pub async fn lease(
        &self,
        worker: &Worker,
        host: &Host,
        speaking: Speaking,
        options: &ConnectOptions,
    ) -> Result<Lease, ConnectError> {
        let pool = host.pool.variant(options);
        pool.acquire(self.wanted(worker, host, speaking, options)).await
    }

    /// Where the worker counts what happens to it.
    pub fn cells(&self, recorder: &Recorder) -> &Arc<ClusterCells> {
        self.cells.get_or_init(|| recorder.cluster(&self.slot))
    }

    /// The slot's present content, taking over the hosts of `previous`; `None` when the cluster does not exist.
    pub fn new(slot: &Arc<ClusterSlot>, previous: Option<&Self>, home: Option<&Arc<Home>>) -> Option<Self> {
        // Read first: a change after this makes the version differ and brings us back.
        let version = slot.version();
        let Some(config) = slot.config() else {
            if let Some(previous) = previous {
                previous.retire_missing(&[]);
            }
            return None;
        };
        let set = slot.endpoints();
        slot.note_use();
        let known: HashMap<&Address, &Rc<Host>, foldhash::fast::RandomState> = previous
            .iter()
            .flat_map(|previous| &previous.hosts)
            .map(|host| (&host.endpoint.address, host))
            .collect();
        let siblings = config.hashing.balance_factor.map(|_| {
            previous
                .and_then(|previous| previous.siblings.clone())
                .unwrap_or_default()
        });
        let measures = matches!(config.lb, LbPolicy::PeakEwma { .. });
        let priorities = set.iter().flat_map(|set| {
            set.priorities
                .iter()
                .zip(0u32..)
                .flat_map(|(localities, priority)| {
                    let count = localities.iter().map(|locality| locality.members.len()).sum();
                    std::iter::repeat_n(priority, count)
                })
        });
        let hosts: Vec<Rc<Host>> = set
            .iter()
            .flat_map(|set| set.all.iter())
            .zip(priorities)
            .map(|(endpoint, priority)| {
                let known = known.get(&endpoint.address);
                Rc::new(Host {
                    endpoint: endpoint.clone(),
                    pool: known.map_or_else(Rc::default, |host| pool_for(&config, endpoint, previous, host)),
                    active: known.map_or_else(|| InUse::of(endpoint), |host| host.active.clone()),
                    siblings: siblings.clone(),
                    ewma: measures.then(|| known.and_then(|host| host.ewma.clone()).unwrap_or_default()),
                    priority,
                })
            })
            .collect();
        if let Some(previous) = previous {
            previous.retire_missing(&hosts);
        }
        let balancer = set
            .as_ref()
            .map_or_else(Balancer::default, |set| Balancer::new(&config, set, &hosts));
        let subsets = match (&config.subsets, &set) {
            (Some(rules), Some(set)) => Some(Box::new(SubsetBalancer::new(rules, &config, set, &hosts))),
            _ => None,
        };
        let home = home.filter(|_| config.zone_aware.is_some()).cloned();
        let dynamic =
            previous.map_or_else(RefCell::default, |previous| RefCell::new(previous.dynamic.take()));
        if previous.is_some_and(|previous| !previous.config.socket.is_same(&config.socket)) {
            dynamic
                .borrow_mut()
                .drain()
                .for_each(|(_, host)| host.pool.retire());
        }
        Some(Self {
            slot: slot.clone(),
            config,
            version,
            set,
            hosts,
            balancer,
            subsets,
            siblings,
            home,
            routing: RefCell::new((None, ZoneRouting::Off)),
            dynamic,
            cells: OnceCell::new(),
        })
    }

    /// Connections to hosts that are not in `next` drain.
    fn retire_missing(&self, next: &[Rc<Host>]) {
        let kept: std::collections::HashSet<&Address, foldhash::fast::RandomState> =
            next.iter().map(|host| &host.endpoint.address).collect();
        for host in self
            .hosts
            .iter()
            .filter(|host| !kept.contains(&host.endpoint.address))
        {
            host.pool.retire();
        }
        if next.is_empty() {
            for host in self.dynamic.borrow_mut().drain() {
                host.1.pool.retire();
            }
        }
    }

    /// A host for a request whose client wanted to go to `destination`.
    pub fn pick(&self, wish: &Wish<'_>, destination: Option<SocketAddr>) -> Option<Rc<Host>> {
        match &self.config.discovery {
            Discovery::OriginalDst { port } => {
                let Some(mut destination) = destination else {
                    self.slot.counted.note(ClusterEvent::OriginalDestinationInvalid);
                    return None;
                };
                if let Some(port) = port {
                    destination.set_port(*port);
                }
                Some(self.dynamic_host(destination))
            }
            Discovery::Static | Discovery::Eds(_) | Discovery::Dns { .. } => {
                let routing = self.zone_routing();
                if matches!(routing.as_deref(), Some(ZoneRouting::Direct(_))) {
                    self.slot.counted.note(ClusterEvent::ZoneDirect);
                }
                let wish = Wish {
                    some_ejected: self.some_ejected(),
                    zones: routing.as_deref(),
                    ..*wish
                };
                let host = self.choose(&wish);
                if let Some(sent) = routing.as_deref().and_then(ZoneRouting::take_sent) {
                    self.note_zone(sent);
                }
                let host = host?;
                if outlier::admit(&host.endpoint.state, now_ms) {
                    self.note_probation(&host);
                    return Some(host);
                }
                // Somebody else is trying it; whoever else there is takes the request.
                let tried = [host.clone()];
                let wish = Wish {
                    tried: if wish.tried.is_empty() { &tried } else { wish.tried },
                    attempts: wish.attempts.max(2),
                    some_ejected: true,
                    ..wish
                };
                Some(self.choose(&wish).unwrap_or(host))
            }
        }
    }

    fn note_zone(&self, sent: Sent) {
        let counted = &self.slot.counted;
        match sent {
            Sent::Stays => counted.note(ClusterEvent::ZoneSampled),
            Sent::Across => counted.note(ClusterEvent::ZoneCrossed),
            Sent::Anywhere => {
                counted.note(ClusterEvent::ZoneCrossed);
                counted.note(ClusterEvent::ZoneFull);
            }
        }
    }

    fn choose(&self, wish: &Wish<'_>) -> Option<Rc<Host>> {
        match (&self.subsets, &self.config.subsets) {
            (Some(subsets), Some(rules)) => {
                let (host, how) = subsets.pick(rules, &self.config, &self.balancer, wish);
                self.slot.counted.note(match how {
                    Chosen::Subset => ClusterEvent::SubsetSelected,
                    Chosen::Fallback => ClusterEvent::SubsetFallback,
                    Chosen::Panic => ClusterEvent::SubsetPanic,
                });
                host
            }
            _ => {
                let host = self.balancer.pick(&self.config, wish);
                if self.balancer.has_panicked() || host.is_none() && self.balancer.is_empty() {
                    self.slot.counted.note(ClusterEvent::Panic);
                }
                host
            }
        }
    }

    /// How requests keep to the own zone; decided again when the local cluster has changed.
    fn zone_routing(&self) -> Option<std::cell::Ref<'_, ZoneRouting>> {
        let home = self.home.as_ref()?;
        let rules = self.config.zone_aware.as_ref()?;
        if rules.enabled != crate::config::convert::Fraction::ALL && !rules.enabled.hit(random::next()) {
            return None;
        }
        let version = Some(home.version());
        if self.routing.borrow().0 != version {
            self.slot.counted.note(ClusterEvent::ZoneRecalculated);
            *self.routing.borrow_mut() = (version, self.decide_zones(rules, home));
        }
        Some(std::cell::Ref::map(self.routing.borrow(), |(_, routing)| routing))
    }

    fn decide_zones(&self, rules: &crate::config::balancing::ZoneAware, home: &Home) -> ZoneRouting {
        let Some(first) = self.set.as_ref().and_then(|set| set.priorities.first()) else {
            return ZoneRouting::Off;
        };
        let Some(here) = home.here() else {
            return ZoneRouting::Off;
        };
        let callers = here.callers();
        let zones: Vec<Zone> = first
            .iter()
            .zip(self.balancer.zones())
            .map(|(locality, (count, weight))| Zone {
                callers: callers.get(&locality.zone).copied().unwrap_or(0),
                hosts: if rules.by_weight { weight } else { count },
                count,
            })
            .collect();
        let own = first.iter().position(|locality| locality.zone == here.zone);
        if zones.iter().map(|zone| zone.count).sum::<u64>() < rules.min_cluster_size {
            self.slot.counted.note(ClusterEvent::ZoneTooSmall);
        }
        zone::decide(rules, &zones, own, callers.values().sum())
    }

    /// Whether the balancer goes by how long hosts take.
    pub fn measures(&self) -> bool {
        matches!(self.config.lb, LbPolicy::PeakEwma { .. })
    }

    /// The head or the trailers of a response of `host`, which may say how busy it is.
    pub fn note_load(&self, host: &Host, headers: &http::HeaderMap) {
        if let Some(rules) = &self.config.reporting
            && let Some(weight) = Report::of(headers).and_then(|report| rules.weight(&report))
        {
            host.endpoint.state.reported.take(weight, now_ms());
        }
    }

    /// Takes how long a host took to answer, where the balancer goes by that.
    pub fn observe(&self, host: &Host, latency: Duration) {
        if let (Some(ewma), LbPolicy::PeakEwma { decay, .. }) = (&host.ewma, self.config.lb) {
            ewma.observe(latency, now_ms(), decay);
        }
    }

    /// A host on probation counts as out for everybody else.
    fn note_probation(&self, host: &Host) {
        let until = host.endpoint.state.ejected_until.load(Ordering::Relaxed);
        if until != 0 {
            self.slot.usage.ejected_until.fetch_max(until, Ordering::Relaxed);
        }
    }

    fn some_ejected(&self) -> bool {
        match self.slot.usage.ejected_until.load(Ordering::Relaxed) {
            0 => false,
            until => now_ms() < until,
        }
    }

    fn dynamic_host(&self, destination: SocketAddr) -> Rc<Host> {
        let mut dynamic = self.dynamic.borrow_mut();
        if let Some(host) = dynamic.get(&destination) {
            return host.clone();
        }
        if dynamic.len() >= MAX_DYNAMIC {
            dynamic
                .retain(|_, host| host.active.get() > 0 || !host.pool.sweep(Instant::now(), Duration::MAX));
        }
        let endpoint = Endpoint::at(Address::Tcp(destination));
        let host = Rc::new(Host::new(Arc::new(endpoint)));
        dynamic.insert(destination, host.clone());
        host
    }

    /// Tells outlier detection how a request to `host` went; returns whether that ejected it.
    pub fn record(&self, host: &Host, event: Event) -> bool {
        host.endpoint
            .state
            .counted
            .answered(matches!(event, Event::Status(status) if status < 500));
        let Some(rules) = &self.config.outlier else {
            return false;
        };
        let all = self.set.as_ref().map_or(&[][..], |set| &set.all);
        let ejected = outlier::record(
            rules,
            &host.endpoint.state,
            all,
            event,
            now_ms,
            &self.slot.counted,
        );
        if ejected {
            let until = host.endpoint.state.ejected_until.load(Ordering::Relaxed);
            self.slot.usage.ejected_until.fetch_max(until, Ordering::Relaxed);
        }
        ejected
    }

    /// Whether EDS asks to drop this request.
    pub fn drops(&self, random: u64) -> bool {
        self.set
            .as_ref()
            .and_then(|set| set.drop)
            .is_some_and(|share| share.hit(random))
    }

    /// Closes connections that have been idle for too long and forgets destinations without any.
    pub fn sweep(&self, now: Instant) {
        for host in &self.hosts {
            host.pool.sweep(now, self.config.idle_timeout);
        }
        self.dynamic
            .borrow_mut()
            .retain(|_, host| !host.pool.sweep(now, self.config.idle_timeout) || host.active.get() > 0);
    }
}
