//! A worker: one thread, one `current_thread` runtime, its own listening sockets, pools and metric cells. Nothing on
//! the request path is shared with other workers but the configuration that is read.
//!
//! # The way of a connection, and of a request
//! ```text
//! accept ─▶ arrival: addresses, first bytes, chain ─▶ chain: place, TLS, network filters ─┬▶ tcp ─▶ reach ─▶ relay
//!                                                                                         └▶ http ─▶ http1 | http2
//! request ─▶ admit, identify, route ─▶ filters::decode ─┬▶ local: an answer of our own ───────┐
//!                                                       └▶ upstream: cluster, plan            ├▶ filters::encode
//!                                                          attempts: endpoint, lease, retry ─▶ respond
//! ```
//! What is remembered of a request from its first byte to its last is its [`exchange`]; when that is dropped it is counted,
//! logged and traced.
//!
//! | a line about | is in |
//! |---|---|
//! | sockets, the PROXY protocol, what a connection speaks, network filters | [`accept`], [`sniff`] |
//! | what requests of a connection share; one HTTP version | [`http`]; `http1`, `rest`, `http2` |
//! | what a request must look like, which route it takes | `request` |
//! | who asks; what requests ask about their own time | `request`; `asked` |
//! | HTTP filters that wait, or keep state of a request | `filters` (what they decide is in [`crate::policy`]) |
//! | which fields go on; header templates | `prepare`; `scene` |
//! | which endpoint, which connection, whether again, several at once | `upstream`, `attempts`, `hedge`, `failure` |
//! | bodies; time limits of a response | [`body`], [`incoming`], `streams`; [`watch`] |
//! | CONNECT and upgrades; TCP inside of them | `tunnel`; `tcp_tunnel` |
//! | interim answers | [`interim`] |
//! | requests of the proxy's own: filters' services, mirrors | `call`, `grpc_stream`, `mirror` |
//! | access logs, spans, taps | `logging`, `connection_log`, `spans`, `tap` |
//! | waiting for what is rare | `alarm`, `seldom` |

pub mod accept;
mod alarm;
mod answer;
mod asked;
mod attempts;
pub mod body;
pub mod call;
mod connection_log;
mod date;
pub mod exchange;
mod failure;
pub mod filters;
mod grpc_stream;
mod hedge;
pub mod http;
mod http1;
mod http2;
pub mod incoming;
pub mod interim;
mod intervals;
pub mod io;
pub mod local;
mod logging;
mod mirror;
mod prepare;
pub mod request;
mod respond;
mod rest;
mod scene;
pub(crate) mod seldom;
pub mod sniff;
mod spans;
pub(crate) mod streams;
pub mod tap;
pub mod tcp;
mod tcp_tunnel;
mod tunnel;
pub mod upstream;
pub mod watch;

pub(crate) use tunnel::CONNECT;

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ::http::HeaderValue;
use arc_swap::ArcSwap;
use tokio::sync::{Notify, mpsc, oneshot};
use tokio_util::task::TaskTracker;

use crate::config::on_demand::OnDemand;
use crate::config::slot::{Chore, ClusterSlot, Home, ListenerSlot};
use crate::config::store::VirtualListeners;
use crate::metrics::hosts;
use crate::metrics::peer::Workload;
use crate::metrics::series::{Recorder, Shard};
use crate::overload::Overload;
use crate::policy::tap::Spot;
use crate::upstream::cluster::WorkerCluster;

/// How often idle connections are looked at.
const SWEEP: Duration = Duration::from_secs(5);
/// Peers whose metadata header one worker remembers.
const MAX_PEERS: usize = 1024;

/// What all workers know.
#[derive(Debug)]
pub struct Shared {
    /// How many workers there are.
    pub workers: usize,
    /// Who we are.
    pub own: Arc<Workload>,
    /// Who we are, for peers (`x-envoy-peer-metadata`, `-id`).
    pub peer_metadata: HeaderValue,
    /// Our node id.
    pub peer_id: HeaderValue,
    /// Who we are, as services are told.
    pub node: Arc<serin_xds::pb::envoy::config::core::v3::Node>,
    /// Name of the cluster that we belong to (`node.cluster`).
    pub cluster: Box<str>,
    /// What there is too much of.
    pub overload: Arc<Overload>,
    /// What requests wait for.
    pub on_demand: Arc<OnDemand>,
    /// Where the proxy is, if that is known.
    pub home: Option<Arc<Home>>,
    /// Where every request can be looked at.
    pub tap: Arc<Spot>,
    /// Listeners without sockets.
    pub virtual_listeners: Arc<ArcSwap<VirtualListeners>>,
    /// The workers' own commands, by worker: how connections are handed over.
    pub neighbours: ArcSwap<Vec<mpsc::Sender<Command>>>,
    /// Where access log lines go.
    pub log: mpsc::Sender<String>,
}

/// How far the end has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum DrainPhase {
    /// Not at all.
    Serving,
    /// Clients are told to go elsewhere; new connections still get answers.
    Discouraging,
    /// No new connections; what is idle closes, what is busy finishes.
    Closing,
}

/// What the control thread asks of a worker.
#[derive(Debug)]
pub enum Command {
    /// Accept on these sockets.
    Listen(Arc<ListenerSlot>, Vec<std::net::TcpListener>),
    /// Serve a connection that another worker accepted, to keep the numbers even.
    Serve(Arc<ListenerSlot>, std::net::TcpStream, SocketAddr, accept::Share),
    /// Do that in the background.
    Chore(Chore),
    /// Stop accepting for the listener of that name; its connections drain.
    Close(Arc<str>),
    /// Accept no more: a successor does.
    StopAccepting,
    /// Enter that phase of the end.
    Drain(DrainPhase),
    /// Number of open connections.
    Connections(oneshot::Sender<usize>),
    /// Number of running tasks: connections of both sides, tunnels, mirrors.
    Tasks(oneshot::Sender<usize>),
    /// Drop everything and end.
    Stop,
}

/// See the module.
pub struct Worker {
    /// Index of the worker.
    pub id: usize,
    /// What all know.
    pub shared: Arc<Shared>,
    /// Metric cells.
    pub recorder: Recorder,
    /// Tasks of the worker: upstream connections, tunnels, mirrors.
    pub tasks: TaskTracker,
    phase: Cell<DrainPhase>,
    phase_changed: Notify,
    open: Cell<usize>,
    /// Connections closed when memory was last given back.
    collected_at: Cell<u64>,
    clusters: RefCell<Vec<Option<Rc<WorkerCluster>>>>,
    peers: RefCell<HashMap<Vec<u8>, Arc<Workload>, foldhash::fast::RandomState>>,
}

/// Counts a downstream connection.
pub struct OpenConnection(Rc<Worker>);

impl Drop for OpenConnection {
    fn drop(&mut self) {
        self.0.open.set(self.0.open.get() - 1);
        self.0.recorder.counters().connections_closed.add(1);
    }
}

impl Worker {
    fn new(id: usize, shared: Arc<Shared>, shard: Arc<Shard>) -> Rc<Self> {
        Rc::new(Self {
            id,
            shared,
            recorder: Recorder::new(shard),
            tasks: TaskTracker::new(),
            phase: Cell::new(DrainPhase::Serving),
            phase_changed: Notify::new(),
            open: Cell::new(0),
            collected_at: Cell::new(0),
            clusters: RefCell::default(),
            peers: RefCell::default(),
        })
    }

    /// Runs a worker until it is told to stop. Blocks the thread.
    pub fn run(
        id: usize,
        shared: Arc<Shared>,
        shard: Arc<Shard>,
        commands: mpsc::Receiver<Command>,
    ) -> std::io::Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            // How many tasks run between two looks for IO while there are tasks to run. Accepting and serving share the
            // thread, so a new connection waits that long; looking more often breaks what goes over one HTTP/2
            // connection into more and smaller writes.
            .event_interval(128)
            // A local one: its tasks need not be Send, and no set of tasks stands between them and the scheduler.
            .build_local(tokio::runtime::LocalOptions::default())?;
        hosts::count_as(id, shared.workers);
        let worker = Self::new(id, shared, shard);
        runtime.block_on(worker.clone().follow(commands));
        Ok(())
    }

    async fn follow(self: Rc<Self>, mut commands: mpsc::Receiver<Command>) {
        let mut listeners: HashMap<Arc<str>, Vec<tokio::task::JoinHandle<()>>> = HashMap::new();
        let stop = |tasks: Vec<tokio::task::JoinHandle<()>>| tasks.iter().for_each(|task| task.abort());
        let mut sweep = tokio::time::interval(SWEEP);
        sweep.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let command = tokio::select! {
                command = commands.recv() => command,
                _ = sweep.tick() => {
                    self.sweep();
                    continue;
                }
            };
            match command {
                None | Some(Command::Stop) => break,
                Some(Command::Listen(slot, sockets)) => {
                    let name = slot.load().name.clone();
                    let mut tasks = Vec::with_capacity(sockets.len());
                    for socket in sockets {
                        match tokio::net::TcpListener::from_std(socket) {
                            Ok(socket) => {
                                let work = accept::run(self.clone(), slot.clone(), socket);
                                tasks.push(tokio::task::spawn_local(work));
                            }
                            Err(error) => {
                                tracing::error!(listener = %name, %error, "listening socket not usable");
                            }
                        }
                    }
                    if let Some(old) = listeners.insert(name, tasks) {
                        stop(old);
                    }
                }
                Some(Command::Serve(slot, stream, remote, share)) => {
                    match tokio::net::TcpStream::from_std(stream) {
                        Ok(stream) => accept::serve(self.clone(), slot, stream, remote, Some(share)),
                        Err(error) => tracing::warn!(%error, "a connection could not be taken over"),
                    }
                }
                Some(Command::Chore(Chore::Keys(remote))) => filters::fetch_ahead(&self, remote),
                Some(Command::Close(name)) => {
                    if let Some(tasks) = listeners.remove(&name) {
                        stop(tasks);
                    }
                }
                Some(Command::StopAccepting) => {
                    for (_, tasks) in listeners.drain() {
                        stop(tasks);
                    }
                }
                Some(Command::Drain(phase)) => {
                    self.phase.set(phase.max(self.phase.get()));
                    self.phase_changed.notify_waiters();
                    if self.phase.get() == DrainPhase::Closing {
                        for (_, tasks) in listeners.drain() {
                            stop(tasks);
                        }
                    }
                }
                Some(Command::Connections(reply)) => {
                    // The asker may have gone.
                    let _ = reply.send(self.open.get());
                }
                Some(Command::Tasks(reply)) => {
                    let _ = reply.send(self.tasks.len());
                }
            }
        }
        listeners.into_values().for_each(stop);
    }

    /// How far the end has come.
    pub fn phase(&self) -> DrainPhase {
        self.phase.get()
    }

    /// Waits until nothing new is served.
    pub async fn closing(&self) {
        while self.phase.get() != DrainPhase::Closing {
            self.phase_changed.notified().await;
        }
    }

    /// Waits for the next phase.
    pub async fn phase_changed(&self) {
        self.phase_changed.notified().await;
    }

    /// Counts a downstream connection until dropped.
    pub fn open_connection(self: &Rc<Self>) -> OpenConnection {
        self.open.set(self.open.get() + 1);
        self.recorder.counters().connections.add(1);
        OpenConnection(self.clone())
    }

    /// The cluster behind a slot as it is now, or `None` if it does not exist.
    pub fn cluster(&self, slot: &Arc<ClusterSlot>) -> Option<Rc<WorkerCluster>> {
        let mut clusters = self.clusters.borrow_mut();
        let index = slot.id as usize;
        if index >= clusters.len() {
            clusters.resize(index + 1, None);
        }
        // The id of a slot that nobody holds any more may have been given to another cluster.
        let existing = clusters[index]
            .as_ref()
            .filter(|existing| Arc::ptr_eq(&existing.slot, slot));
        if let Some(existing) = existing
            && existing.version == slot.version()
        {
            return Some(existing.clone());
        }
        let made = WorkerCluster::new(
            slot,
            existing.map(|existing| &**existing),
            self.shared.home.as_ref(),
        )
        .map(Rc::new);
        clusters[index].clone_from(&made);
        made
    }

    fn sweep(&self) {
        /// Connections that ended since memory was last given back.
        const MANY: u64 = 16;
        let counters = self.recorder.counters();
        let ended = counters.connections_closed.get();
        if ended - self.collected_at.get() >= MANY {
            self.collected_at.set(ended);
            crate::sys::collect_memory();
        }
        self.recorder.sweep(crate::clock::now_ms());
        let now = Instant::now();
        let mut clusters = self.clusters.borrow_mut();
        for entry in clusters.iter_mut() {
            if let Some(cluster) = entry {
                if cluster.version != cluster.slot.version() {
                    *entry = WorkerCluster::new(&cluster.slot, Some(&**cluster), self.shared.home.as_ref())
                        .map(Rc::new);
                } else {
                    cluster.sweep(now);
                }
            }
        }
    }

    /// The workload that a peer's metadata header names.
    pub fn peer(&self, header: &HeaderValue) -> Option<Arc<Workload>> {
        let mut peers = self.peers.borrow_mut();
        if let Some(peer) = peers.get(header.as_bytes()) {
            return Some(peer.clone());
        }
        let peer = Workload::of_header(header.as_bytes())?;
        if peers.len() >= MAX_PEERS {
            peers.clear();
        }
        peers.insert(header.as_bytes().to_vec(), peer.clone());
        Some(peer)
    }

    /// Hands a line to the access log; dropped, and counted, when the log is behind.
    pub fn log(&self, line: String) {
        if self.shared.log.try_send(line).is_err() {
            self.recorder.counters().log_dropped.add(1);
        }
    }
}
