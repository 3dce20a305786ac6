//! The control side of the process: configuration in, measurements out, beginning and end.
//!
//! [`Proxy`] owns the worker threads and the [`Store`]. It can be driven by hand (tests, static configuration) or by
//! [`xds`]; [`admin`] shows what it does.

pub mod admin;
pub mod certs;
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
pub mod xds;

use std::collections::HashMap;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use http::HeaderValue;
use parking_lot::Mutex;
use serin_xds::ResourceType;
use serin_xds::pb::envoy::config::core::v3::Node;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

use crate::config::endpoint::zone_name;
use crate::config::on_demand::{self, OnDemand};
use crate::config::runtime;
use crate::config::slot::{Here, Home};
use crate::config::store::{Kept, ListenerChange, Store, Update};
use crate::error::{Error, Refusal};
use crate::metrics::baseline::Baseline;
use crate::metrics::peer::{Workload, header_of_node};
use crate::metrics::select;
use crate::metrics::series::Shard;
use crate::overload::{self, Overload};
use crate::tls;
use crate::worker::{Command, DrainPhase, Shared, Worker};

/// Commands that may wait for a worker; one is some hundred bytes and takes microseconds.
const COMMANDS: usize = 1024;
/// Access log lines that may wait to be written.
const LOG_LINES: usize = 1024;
/// Connections that the kernel keeps waiting for accept.
const BACKLOG: i32 = 4096;

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
    inherited: HashMap<u16, TcpListener>,
    bound: Mutex<HashMap<Arc<str>, Vec<SocketAddr>>>,
    /// Sockets of the process before this one that no listener has taken yet.
    handed: Mutex<restart::Sockets>,
    /// Copies of all listening sockets by their owner, for a successor; `None` where nobody will ask.
    kept: Mutex<Option<HashMap<Arc<str>, Vec<TcpListener>>>>,
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
            inherited: options.inherited,
            bound: Mutex::default(),
            handed: Mutex::default(),
            kept: Mutex::default(),
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

    /// What requests wait for.
    pub fn on_demand(&self) -> Arc<OnDemand> {
        self.on_demand.clone()
    }

    /// What the overload manager tells the workers.
    pub fn overload(&self) -> Arc<Overload> {
        self.overload.clone()
    }

    /// Takes a batch of resources; what is refused is returned by name, the rest is live on every worker.
    pub async fn apply(
        &self,
        resource_type: ResourceType,
        upserted: &[Update<'_>],
        removed: &[&str],
    ) -> Vec<(Box<str>, Refusal)> {
        let (mut refused, changes) = {
            let mut store = self.store.lock();
            let refused = store.apply(resource_type, upserted, removed);
            (refused, store.take_listener_changes())
        };
        if matches!(resource_type, ResourceType::Route | ResourceType::VirtualHost) {
            self.rerouted.notify_one();
        }
        refused.extend(self.follow(changes).await);
        refused
    }

    /// Told when requests may go elsewhere from now on: what was counted before belongs to what was.
    pub fn rerouted(&self) -> Arc<Notify> {
        self.rerouted.clone()
    }

    /// Takes secrets of a service; what is refused is returned by name, the rest is in use.
    pub async fn apply_secrets_of(
        &self,
        service: &tls::table::SdsService,
        upserted: &[Update<'_>],
    ) -> Vec<(Box<str>, Refusal)> {
        let (refused, changes) = {
            let mut store = self.store.lock();
            let mut refused = Vec::new();
            for update in upserted {
                if let Err(refusal) = store.secrets().put_of(service, update.name, update.body) {
                    refused.push((update.name.into(), refusal));
                }
            }
            store.warm(None);
            (refused, store.take_listener_changes())
        };
        for (name, refusal) in self.follow(changes).await {
            tracing::warn!(listener = %name, %refusal, "not opened");
        }
        refused
    }

    /// Takes into use what waits for secrets when they have come from files or, at `now_ms` on the process clock, it has
    /// waited long enough; reads changed files again. Cheap when there is nothing to do.
    pub async fn tend_secrets(&self, now_ms: u64) {
        let (unusable, changes) = {
            let mut store = self.store.lock();
            let unusable = store.secrets().reload_files();
            if store.is_warming() {
                store.warm(Some(now_ms));
            }
            (unusable, store.take_listener_changes())
        };
        for refusal in unusable {
            tracing::warn!(%refusal, "a changed file cannot be used; what it held before stays in use");
        }
        for (name, refusal) in self.follow(changes).await {
            tracing::warn!(listener = %name, %refusal, "not opened");
        }
    }

    /// So long has been waited for layers of the runtime; for ever, where nobody will send any (`None`). Listeners that
    /// waited for nothing else are opened.
    pub async fn waited_for_runtime(&self, waited: Option<Duration>) {
        let changes = {
            let mut store = self.store.lock();
            store.waited_for_runtime(waited);
            store.take_listener_changes()
        };
        for (name, refusal) in self.follow(changes).await {
            tracing::warn!(listener = %name, %refusal, "not opened");
        }
    }

    /// Opens and closes sockets; returns the listeners that could not be opened.
    async fn follow(&self, changes: Vec<ListenerChange>) -> Vec<(Box<str>, Refusal)> {
        let mut refused = Vec::new();
        // The first worker does for all what is to be done once.
        let chores = self.store(Store::take_chores);
        for chore in chores {
            if let Some(worker) = self.workers.first() {
                let _ = worker.commands.send(Command::Chore(chore)).await;
            }
        }
        for change in changes {
            match change {
                ListenerChange::Open(slot) => {
                    let listener = slot.load();
                    match self.bind_all(&listener.addresses) {
                        Ok(sockets) => {
                            let bound = sockets.first().into_iter().flatten();
                            let bound: Vec<_> = bound.filter_map(|socket| socket.local_addr().ok()).collect();
                            self.bound.lock().insert(listener.name.clone(), bound);
                            self.store.lock().counts().opened(self.workers.len());
                            self.keep(&listener.name, sockets.iter().flatten());
                            for (worker, sockets) in self.workers.iter().zip(sockets) {
                                // A worker that has ended serves nothing; its end has been logged.
                                let _ = worker.commands.send(Command::Listen(slot.clone(), sockets)).await;
                            }
                        }
                        Err((address, source)) => {
                            let error = Error::Bind {
                                name: listener.name.to_string(),
                                address,
                                source,
                            };
                            // Forgotten, so that the control plane's next attempt binds again.
                            let mut store = self.store.lock();
                            store.counts().not_opened();
                            store.apply(ResourceType::Listener, &[], &[&listener.name]);
                            store.take_listener_changes();
                            refused.push((
                                (*listener.name).into(),
                                Refusal::new("address", full_text(&error)),
                            ));
                        }
                    }
                }
                ListenerChange::Close(name) => {
                    self.bound.lock().remove(&name);
                    if let Some(kept) = &mut *self.kept.lock() {
                        kept.remove(&name);
                    }
                    for worker in &self.workers {
                        let _ = worker.commands.send(Command::Close(name.clone())).await;
                    }
                }
            }
        }
        self.changes.send_replace(());
        refused
    }

    /// Woken when clusters or endpoints may have changed.
    pub fn changes(&self) -> watch::Receiver<()> {
        self.changes.subscribe()
    }

    /// Says that clusters or endpoints were changed by way of [`Self::store`].
    pub fn changed(&self) {
        self.changes.send_replace(());
    }

    /// For each worker a socket for each of the addresses.
    fn bind_all(
        &self,
        addresses: &[SocketAddr],
    ) -> Result<Vec<Vec<TcpListener>>, (SocketAddr, std::io::Error)> {
        let mut out: Vec<Vec<_>> = self.workers.iter().map(|_| Vec::new()).collect();
        for address in addresses {
            let sockets = self.bind(*address).map_err(|error| (*address, error))?;
            for (of_worker, sockets) in out.iter_mut().zip(sockets) {
                of_worker.extend(sockets);
            }
        }
        Ok(out)
    }

    /// At least one socket per worker for `address`.
    fn bind(&self, address: SocketAddr) -> std::io::Result<Vec<Vec<TcpListener>>> {
        if let Some(inherited) = self.inherited.get(&address.port()) {
            let each = |_| inherited.try_clone().map(|socket| vec![socket]);
            return self.workers.iter().map(each).collect();
        }
        let handed = self.handed.lock().remove(&address);
        if let Some(handed) = handed {
            return restart::distribute(handed, self.workers.len());
        }
        let mut sockets = Vec::with_capacity(self.workers.len());
        let mut address = address;
        for _ in &self.workers {
            let socket = listening_socket(address, true)?;
            // Port 0 is the kernel's choice once; the others join it.
            address = socket.local_addr()?;
            sockets.push(vec![socket]);
        }
        Ok(sockets)
    }

    /// Sockets of the process before this one are used for the listeners of their addresses.
    pub fn take_over(&self, sockets: restart::Sockets) {
        *self.handed.lock() = sockets;
    }

    /// A socket for one of the process's own ports.
    pub(crate) fn own_socket(&self, name: &str, address: SocketAddr) -> std::io::Result<TcpListener> {
        let handed = self.handed.lock().remove(&address).and_then(|mut all| all.pop());
        let socket = match handed {
            Some(socket) => socket,
            None => listening_socket(address, false)?,
        };
        self.keep(&Arc::from(name), [&socket].into_iter());
        Ok(socket)
    }

    /// From now on copies of listening sockets are kept for a successor.
    pub fn keep_sockets(&self) {
        self.kept.lock().get_or_insert_default();
    }

    fn keep<'a>(&self, owner: &Arc<str>, sockets: impl Iterator<Item = &'a TcpListener>) {
        if let Some(kept) = &mut *self.kept.lock() {
            // A socket that cannot be copied is not handed over: the successor binds its own.
            let copies = sockets.filter_map(|socket| socket.try_clone().ok()).collect();
            kept.insert(owner.clone(), copies);
        }
    }

    /// Copies of all listening sockets.
    fn kept_sockets(&self) -> std::io::Result<Vec<TcpListener>> {
        self.kept
            .lock()
            .iter()
            .flat_map(HashMap::values)
            .flatten()
            .map(TcpListener::try_clone)
            .collect()
    }

    /// Closes sockets of the process before this one that no listener has taken.
    pub fn close_handed(&self) {
        self.handed.lock().clear();
    }

    /// Accepts no more; what is connected is served on.
    pub async fn stop_accepting(&self) {
        *self.kept.lock() = None;
        for worker in &self.workers {
            let _ = worker.commands.send(Command::StopAccepting).await;
        }
    }

    /// Where a listener is bound.
    pub fn listener_address(&self, name: &str) -> Option<SocketAddr> {
        self.bound.lock().get(name)?.first().copied()
    }

    /// Every address where a listener is bound, in the order of its configuration.
    pub fn listener_addresses(&self, name: &str) -> Vec<SocketAddr> {
        self.bound.lock().get(name).cloned().unwrap_or_default()
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

    /// Enters a phase of the end.
    pub async fn drain(&self, phase: DrainPhase) {
        self.draining.store(true, Ordering::Release);
        if phase == DrainPhase::Closing {
            // A copy would keep the socket listening.
            *self.kept.lock() = None;
        }
        for worker in &self.workers {
            let _ = worker.commands.send(Command::Drain(phase)).await;
        }
    }

    /// Drains in order: for up to `discourage` clients are told to go elsewhere while everything is still served, then
    /// nothing new is accepted and what runs has `finish` to end. Over earlier when nobody is connected any more.
    pub async fn shut_down(&self, discourage: Duration, finish: Duration) {
        /// How often connections are counted.
        const LOOK: Duration = Duration::from_millis(100);
        /// Nobody connected for this long means that nobody will come.
        const QUIET: u32 = 10;
        self.drain(DrainPhase::Discouraging).await;
        let end = tokio::time::Instant::now() + discourage;
        let mut quiet = 0;
        while tokio::time::Instant::now() < end && quiet < QUIET {
            tokio::time::sleep(LOOK).await;
            quiet = if self.connections().await == 0 {
                quiet + 1
            } else {
                0
            };
        }
        self.drain(DrainPhase::Closing).await;
        let end = tokio::time::Instant::now() + finish;
        while tokio::time::Instant::now() < end && self.connections().await > 0 {
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Ends the workers and waits for their threads. Connections still open are dropped.
    pub async fn stop(self: Arc<Self>) {
        for worker in &self.workers {
            let _ = worker.commands.send(Command::Stop).await;
        }
        if let Some(mut proxy) = Arc::into_inner(self) {
            let workers = std::mem::take(&mut proxy.workers);
            let join = move || {
                for worker in workers {
                    // A panic has been reported by the thread itself.
                    let _ = worker.thread.join();
                }
            };
            let _ = tokio::task::spawn_blocking(join).await;
        }
    }
}

/// A listening TCP socket, ready for a runtime.
pub(crate) fn listening_socket(address: SocketAddr, reuse_port: bool) -> std::io::Result<TcpListener> {
    let socket = Socket::new(
        Domain::for_address(address),
        Type::STREAM.nonblocking().cloexec(),
        Some(Protocol::TCP),
    )?;
    socket.set_reuse_address(true)?;
    if reuse_port {
        socket.set_reuse_port(true)?;
    }
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

fn full_text(error: &dyn std::error::Error) -> String {
    // The display of this crate's errors includes their source.
    error.to_string()
}
