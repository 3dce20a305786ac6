//! The control side of the process: configuration in, measurements out, beginning and end.
//!
//! [`Proxy`] owns the worker threads and the [`Store`]. It can be driven by hand (tests, static configuration) or by
//! [`xds`]; [`admin`] shows what it does. [`run`] is the process around it.
//!
//! | what happens | where |
//! |---|---|
//! | a resource arrives, is taken or refused, and sockets open or close for it | [`xds`], `changes`, `sockets` |
//! | a secret arrives, or a file with one changes | [`sds`], [`certs`], `changes` |
//! | a name is resolved, a host's health is asked for, an outlier is looked at | [`dns`], [`health`], [`outliers`] |
//! | statistics are read, or pushed | [`scrape`], [`server_stats`], [`crate::metrics::push`] |
//! | somebody asks | [`admin`], [`levels`] |
//! | listeners or the process end; a successor takes over; an application begins and ends | [`drain`], [`restart`], [`application`] |

pub mod admin;
pub mod application;
pub mod certs;
mod changes;
pub mod dial;
pub mod dns;
pub mod drain;
pub mod health;
pub mod levels;
pub mod outliers;
pub mod restart;
pub mod run;
pub mod scrape;
pub mod sds;
pub mod server_stats;
mod sockets;
pub mod xds;

pub use sockets::ListeningSockets;

use std::collections::HashMap;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use http::HeaderValue;
use parking_lot::Mutex;
use serin_xds::pb::envoy::config::core::v3::Node;
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

use crate::config::endpoint::zone_name;
use crate::config::on_demand::{self, OnDemand};
use crate::config::runtime;
use crate::config::slot::{Here, Home};
use crate::config::store::{Kept, Store};
use crate::error::Error;
use crate::metrics::baseline::Baseline;
use crate::metrics::peer::{Workload, header_of_node};
use crate::metrics::select;
use crate::metrics::series::Shard;
use crate::overload::{self, Overload};
use crate::worker::{Command, Shared, Worker};

/// Commands that may wait for a worker; one is some hundred bytes and takes microseconds.
const COMMANDS: usize = 1024;
/// Access log lines that may wait to be written.
const LOG_LINES: usize = 1024;

/// What a proxy is started with.
#[derive(Debug, Default)]
pub struct Options {
    /// Who it is.
    pub node: Node,
    /// Worker threads; 0 for one per core.
    pub concurrency: usize,
    /// Listening sockets taken over from the parent, by the port of the listener that uses them.
    pub inherited: HashMap<u16, TcpListener>,
    /// The cluster that the proxy is a member of (`local_cluster_name`): zone-aware routing compares zones with it.
    pub local_cluster: Option<String>,
    /// The address of the workload beside it: where no local cluster is named, it is the one that has this address among
    /// its endpoints.
    pub own_address: Option<std::net::IpAddr>,
    /// When to do less.
    pub overload: overload::Rules,
    /// Layers of runtime values, lowest first.
    pub runtime: Vec<runtime::Layer>,
    /// What there may be of resources on demand.
    pub on_demand: on_demand::Limits,
    /// Which statistics are told.
    pub stats: select::Rules,
    /// The bootstrap as it was read, encoded; empty where there is none.
    pub bootstrap: Box<[u8]>,
    /// What the process was started with, for those who ask.
    pub started_as: StartedAs,
}

/// How the process was started (`command_line_options` of `/server_info`).
#[derive(Clone, Debug, Default)]
pub struct StartedAs {
    /// The file of the bootstrap.
    pub config_path: String,
    /// Path of the socket for hot restarts.
    pub restart_path: String,
}

struct WorkerHandle {
    commands: mpsc::Sender<Command>,
    thread: std::thread::JoinHandle<()>,
}

/// A running proxy.
pub struct Proxy {
    /// Who it is.
    pub node: Node,
    own: Arc<Workload>,
    store: Mutex<Store>,
    workers: Vec<WorkerHandle>,
    shards: Arc<[Arc<Shard>]>,
    overload: Arc<Overload>,
    on_demand: Arc<OnDemand>,
    sockets: ListeningSockets,
    live: CancellationToken,
    ready: AtomicBool,
    draining: AtomicBool,
    health_fails: AtomicBool,
    started: std::time::Instant,
    /// From the start until the first full configuration, in milliseconds.
    initialized: std::sync::OnceLock<u64>,
    stats: select::Rules,
    bootstrap: Kept,
    started_as: StartedAs,
    /// What the connection to the control plane looks like.
    control_plane: server_stats::ControlPlaneStats,
    admin_counts: Arc<admin::counted::AdminCounts>,
    changes: watch::Sender<()>,
    /// Told when requests may go elsewhere from now on.
    rerouted: Arc<Notify>,
    baseline: Mutex<Baseline>,
    drain_time: Mutex<Duration>,
    /// What closes listeners after a graceful drain.
    drainer: Mutex<Option<tokio::task::JoinHandle<()>>>,
}

impl Drop for Proxy {
    fn drop(&mut self) {
        if let Some(task) = self.drainer.get_mut().take() {
            task.abort();
        }
    }
}

impl Proxy {
    /// Starts the workers. They serve nothing until listeners are [applied](Self::apply). The access log's lines come
    /// out of the receiver.
    pub fn start(options: Options) -> Result<(Arc<Self>, mpsc::Receiver<String>), Error> {
        let count = match options.concurrency {
            0 => std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
            given => given,
        };
        let overload = Overload::new(&options.overload);
        let mut store = Store::new(count);
        store.runtime().set_layers(options.runtime);
        let on_demand = OnDemand::new(options.on_demand);
        let home = match (&options.local_cluster, options.own_address) {
            (Some(name), _) => {
                let here = Here {
                    slot: store.local_cluster(name),
                    zone: zone_name(options.node.locality.as_ref()),
                };
                Some(Arc::new(Home::new(Some(here))))
            }
            (None, Some(address)) => {
                let home = Arc::new(Home::new(None));
                store.look_for(address, home.clone());
                Some(home)
            }
            (None, None) => None,
        };
        if let Some(home) = &home {
            store.set_home(home.clone());
        }
        let metadata = options.node.metadata.clone().unwrap_or_default();
        let own = Workload::of_node(&metadata);
        let (log, lines) = mpsc::channel(LOG_LINES);
        // Nothing has been counted yet.
        options.stats.buckets.begin();
        let header = |text: &str| HeaderValue::from_str(text).unwrap_or(HeaderValue::from_static("unknown"));
        let shared = Arc::new(Shared {
            workers: count,
            own: own.clone(),
            peer_metadata: header(&header_of_node(&metadata)),
            peer_id: header(&options.node.id),
            node: Arc::new(options.node.clone()),
            cluster: options.node.cluster.as_str().into(),
            overload: overload.clone(),
            on_demand: on_demand.clone(),
            home: home.clone(),
            tap: store.tap_everywhere(),
            virtual_listeners: store.virtual_listeners(),
            neighbours: arc_swap::ArcSwap::default(),
            log,
        });
        let shards: Arc<[Arc<Shard>]> = (0..count).map(|_| Arc::default()).collect();
        let mut workers = Vec::with_capacity(count);
        for (id, shard) in shards.iter().enumerate() {
            let (commands, receiver) = mpsc::channel(COMMANDS);
            let (shared, shard) = (shared.clone(), shard.clone());
            let thread = std::thread::Builder::new()
                .name(format!("worker-{id}"))
                .spawn(move || {
                    if let Err(error) = Worker::run(id, shared, shard, receiver) {
                        tracing::error!(worker = id, %error, "worker ended");
                    }
                })
                .map_err(|source| Error::Start {
                    what: "a worker thread",
                    source,
                })?;
            workers.push(WorkerHandle { commands, thread });
        }
        shared.neighbours.store(Arc::new(
            workers.iter().map(|worker| worker.commands.clone()).collect(),
        ));
        let proxy = Self {
            node: options.node,
            own,
            store: Mutex::new(store),
            workers,
            shards,
            overload,
            on_demand,
            sockets: ListeningSockets::new(options.inherited),
            live: CancellationToken::new(),
            ready: AtomicBool::new(false),
            draining: AtomicBool::new(false),
            health_fails: AtomicBool::new(false),
            started: std::time::Instant::now(),
            initialized: std::sync::OnceLock::new(),
            stats: options.stats,
            bootstrap: Kept::now(&options.bootstrap),
            started_as: options.started_as,
            control_plane: server_stats::ControlPlaneStats::default(),
            admin_counts: Arc::default(),
            changes: watch::Sender::new(()),
            baseline: Mutex::default(),
            drain_time: Mutex::new(run::DEFAULT_DRAIN),
            drainer: Mutex::default(),
            rerouted: Arc::default(),
        };
        Ok((Arc::new(proxy), lines))
    }

    /// The listening sockets of the process.
    pub fn sockets(&self) -> &ListeningSockets {
        &self.sockets
    }

    /// Where a listener is bound.
    pub fn listener_address(&self, name: &str) -> Option<SocketAddr> {
        self.sockets.addresses(name).first().copied()
    }

    /// Every address where a listener is bound, in the order of its configuration.
    pub fn listener_addresses(&self, name: &str) -> Vec<SocketAddr> {
        self.sockets.addresses(name)
    }

    /// What requests wait for.
    pub fn on_demand(&self) -> Arc<OnDemand> {
        self.on_demand.clone()
    }

    /// What the overload manager tells the workers.
    pub fn overload(&self) -> Arc<Overload> {
        self.overload.clone()
    }

    /// Told when requests may go elsewhere from now on: what was counted before belongs to what was.
    pub fn rerouted(&self) -> Arc<Notify> {
        self.rerouted.clone()
    }

    /// Woken when clusters or endpoints may have changed.
    pub fn changes(&self) -> watch::Receiver<()> {
        self.changes.subscribe()
    }

    /// Says that clusters or endpoints were changed by way of [`Self::store`].
    pub fn changed(&self) {
        self.changes.send_replace(());
    }

    /// Reads or changes the configuration store; must not be kept over an `await`.
    pub fn store<T>(&self, f: impl FnOnce(&mut Store) -> T) -> T {
        f(&mut self.store.lock())
    }

    /// Counters are shown from zero from now on. What is streamed to the control plane stays cumulative.
    pub fn reset_counters(&self) {
        let counted = self.counted();
        self.baseline.lock().reset(counted);
    }

    /// Counters go on from what the process before this one has counted.
    pub fn take_counters(&self, told: &serde_json::Value) {
        self.baseline.lock().take(told);
    }

    /// What the metrics pusher reads.
    pub fn shards(&self) -> (Arc<Workload>, Arc<[Arc<Shard>]>) {
        (self.own.clone(), self.shards.clone())
    }

    /// Says that the first full configuration is live. Stays so: later gaps are served with what there is.
    pub fn set_ready(&self) {
        self.initialized
            .get_or_init(|| self.started.elapsed().as_millis() as u64);
        self.ready.store(true, Ordering::Release);
        self.live.cancel();
    }

    /// Waits for [`Self::set_ready`].
    pub async fn live(&self) {
        self.live.cancelled().await;
    }

    /// Whether [`Self::set_ready`] has been called, whatever has become of the proxy since.
    pub fn was_ready(&self) -> bool {
        self.ready.load(Ordering::Acquire)
    }

    /// Whether the proxy should get traffic.
    pub fn is_ready(&self) -> bool {
        self.state() == "LIVE"
    }

    /// Envoy's name of how far the process has come.
    pub fn state(&self) -> &'static str {
        if self.draining.load(Ordering::Acquire) || self.health_fails.load(Ordering::Acquire) {
            "DRAINING"
        } else if self.ready.load(Ordering::Acquire) {
            "LIVE"
        } else {
            "PRE_INITIALIZING"
        }
    }

    /// Says on purpose that the proxy is not ready, or no longer so.
    pub fn fail_health_check(&self, fails: bool) {
        self.health_fails.store(fails, Ordering::Release);
    }

    /// Worker threads.
    pub fn concurrency(&self) -> usize {
        self.workers.len()
    }

    /// Time since the start.
    pub fn uptime(&self) -> Duration {
        self.started.elapsed()
    }

    /// Open downstream connections.
    pub async fn connections(&self) -> usize {
        self.count(Command::Connections).await
    }

    /// Running tasks of the workers: a downstream or upstream connection is one, a tunnel, a mirrored request.
    pub async fn tasks(&self) -> usize {
        self.count(Command::Tasks).await
    }

    async fn count(&self, question: fn(oneshot::Sender<usize>) -> Command) -> usize {
        let mut total = 0;
        for worker in &self.workers {
            let (reply, answer) = oneshot::channel();
            if worker.commands.send(question(reply)).await.is_ok() {
                total += answer.await.unwrap_or(0);
            }
        }
        total
    }
}
