//! A cluster as one worker sees it: its hosts with their connections, and the balancer over them.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::balance::{Balancer, Wish};
use super::outlier::{self, Event};
use super::pool::Pool;
use crate::clock::now_ms;
use crate::config::cluster::{Cluster, Discovery};
use crate::config::convert::Address;
use crate::config::endpoint::{Endpoint, EndpointSet};
use crate::config::slot::ClusterSlot;

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
    pub active: Rc<Cell<u32>>,
}

/// Counts a request on a host.
#[derive(Debug)]
pub struct Active(Rc<Cell<u32>>);

impl Active {
    /// Counts until dropped.
    pub fn on(host: &Host) -> Self {
        host.active.set(host.active.get() + 1);
        Self(host.active.clone())
    }
}

impl Drop for Active {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
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
    dynamic: RefCell<HashMap<SocketAddr, Rc<Host>, foldhash::fast::RandomState>>,
}

impl WorkerCluster {
    /// The slot's present content, taking over the hosts of `previous`; `None` when the cluster does not exist.
    pub fn new(slot: &Arc<ClusterSlot>, previous: Option<&Self>) -> Option<Self> {
        // Read first: a change after this makes the version differ and brings us back.
        let version = slot.version();
        let Some(config) = slot.config() else {
            if let Some(previous) = previous {
                previous.retire_missing(&[]);
            }
            return None;
        };
        let set = slot.endpoints();
        slot.usage.used.store(true, Ordering::Relaxed);
        let known: HashMap<&Address, &Rc<Host>, foldhash::fast::RandomState> = previous
            .iter()
            .flat_map(|previous| &previous.hosts)
            .map(|host| (&host.endpoint.address, host))
            .collect();
        let hosts: Vec<Rc<Host>> = set
            .iter()
            .flat_map(|set| set.all.iter())
            .map(|endpoint| match known.get(&endpoint.address) {
                Some(host) => Rc::new(Host {
                    endpoint: endpoint.clone(),
                    pool: pool_for(&config, endpoint, previous, host),
                    active: host.active.clone(),
                }),
                None => Rc::new(Host {
                    endpoint: endpoint.clone(),
                    pool: Rc::default(),
                    active: Rc::default(),
                }),
            })
            .collect();
        if let Some(previous) = previous {
            previous.retire_missing(&hosts);
        }
        let balancer = set
            .as_ref()
            .map_or_else(Balancer::default, |set| Balancer::new(&config, set, &hosts));
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
            dynamic,
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
                let mut destination = destination?;
                if let Some(port) = port {
                    destination.set_port(*port);
                }
                Some(self.dynamic_host(destination))
            }
            Discovery::Static | Discovery::Eds(_) | Discovery::Dns { .. } => {
                let wish = Wish {
                    some_ejected: self.some_ejected(),
                    ..*wish
                };
                let host = self.balancer.pick(&self.config, &wish)?;
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
                Some(self.balancer.pick(&self.config, &wish).unwrap_or(host))
            }
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
        let host = Rc::new(Host {
            endpoint: Arc::new(endpoint),
            pool: Rc::default(),
            active: Rc::default(),
        });
        dynamic.insert(destination, host.clone());
        host
    }

    /// Tells outlier detection how a request to `host` went; returns whether that ejected it.
    pub fn record(&self, host: &Host, event: Event) -> bool {
        let Some(rules) = &self.config.outlier else {
            return false;
        };
        let all = self.set.as_ref().map_or(&[][..], |set| &set.all);
        let ejected = outlier::record(rules, &host.endpoint.state, all, event, now_ms);
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
