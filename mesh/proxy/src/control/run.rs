//! The process: everything started, joined and ended in order.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use nix::sys::signal::Signal as Number;
use serin_xds::ResourceType;
use serin_xds::client::Endpoint;
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::admin::{AdminPort, Port};
use super::application::{Application, Running};
use super::restart::{self, Predecessor, Station};
use super::{Options, Proxy, dial, dns, health, outliers, sds, xds};
use crate::config::store::{Store, Update};
use crate::error::{Error, Refusal};
use crate::metrics::expiry;
use crate::metrics::push::Pusher;
use crate::overload;

/// Istio's time in which clients are told to go elsewhere (`TERMINATION_DRAIN_DURATION_SECONDS`).
pub const DEFAULT_DRAIN: Duration = Duration::from_secs(5);
/// How often files with secrets are looked at.
const SECRETS: Duration = Duration::from_secs(1);
/// Time for what runs to end after that.
const FINISH: Duration = Duration::from_secs(20);

/// A resource from a file.
#[derive(Clone, Debug)]
pub struct StaticResource {
    /// Type.
    pub resource_type: ResourceType,
    /// Name.
    pub name: String,
    /// Encoded message.
    pub body: Vec<u8>,
    /// Where the document has it: `static_resources.clusters[0]`.
    pub at: String,
}

impl StaticResource {
    fn update(&self) -> Update<'_> {
        Update {
            name: &self.name,
            body: &self.body,
        }
    }
}

/// What was refused of resources, by its place in the document.
fn refused(resources: &[StaticResource], refused: Vec<(Box<str>, Refusal)>) -> Result<(), Error> {
    if refused.is_empty() {
        return Ok(());
    }
    let placed = refused.into_iter().map(|(name, mut refusal)| {
        let at = resources.iter().find(|resource| *resource.name == *name);
        refusal.reason = format!("{} ({name:?})", refusal.reason);
        refusal.within(at.map_or("static_resources", |resource| resource.at.as_str()))
    });
    Err(Error::Bootstrap(placed.collect()))
}

/// Where a control plane is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ControlPlane {
    /// At an address, in plain HTTP/2.
    At(Endpoint),
    /// Behind the static cluster of that name, with what the cluster says: TLS, several endpoints.
    Cluster(String),
}

/// Everything that the process is told at its start.
#[derive(Debug, Default)]
pub struct Plan {
    /// The proxy itself.
    pub options: Options,
    /// Where configuration comes from, beside the static resources.
    pub control_plane: Option<ControlPlane>,
    /// Whether measurements are streamed there.
    pub push_metrics: bool,
    /// Resources that do not come from a control plane.
    pub static_resources: Vec<StaticResource>,
    /// Admin port.
    pub admin: Option<SocketAddr>,
    /// Admin port on a Unix socket, with its permissions.
    pub admin_socket: Option<(PathBuf, u32)>,
    /// Prometheus port.
    pub prometheus: Option<SocketAddr>,
    /// Readiness port.
    pub ready: Option<SocketAddr>,
    /// For how long clients are told to go elsewhere before the end.
    pub drain: Duration,
    /// Unix socket over which sockets are taken from the process before this one, and given to the next.
    pub restart: Option<PathBuf>,
    /// What is started once the proxy serves, and with which the proxy ends.
    pub application: Option<Application>,
}

impl Plan {
    /// The admin port is on that Unix socket, if one is given, and nowhere else.
    pub fn serve_admin_at(&mut self, socket: Option<PathBuf>) {
        if let Some(path) = socket {
            self.admin = None;
            self.admin_socket = Some((path, crate::bootstrap::file::ADMIN_SOCKET_MODE));
        }
    }
}

/// Runs a proxy until it is told to end by SIGTERM, SIGINT or `/quitquitquit`, or until its application has ended, whose exit code is
/// returned.
pub async fn run(plan: Plan) -> Result<u8, Error> {
    let predecessor = match &plan.restart {
        None => None,
        Some(path) => restart::take(path)?,
    };
    let rules = plan.options.overload.clone();
    let mut options = plan.options;
    if let Some(path) = &plan.restart {
        options.started_as.restart_path = path.display().to_string();
    }
    let (proxy, lines) = Proxy::start(options)?;
    // The workers have their own threads by now. A change of configuration is a fraction of a millisecond of work, for which
    // this thread would wait for several behind busy workers.
    if let Err(error) = crate::sys::ask_for_short_turns() {
        tracing::debug!(%error, "the control thread is scheduled as all others");
    }
    if plan.restart.is_some() {
        proxy.sockets().keep_copies();
    }
    let predecessor = predecessor.map(|(predecessor, sockets)| {
        proxy.sockets().take_over(sockets);
        predecessor
    });
    proxy.set_drain_time(plan.drain);
    let ends = Ends::new();
    let tasks = TaskTracker::new();
    let log = tokio::spawn(write_log(lines));
    let addresses = [
        (plan.admin, Port::Admin),
        (plan.prometheus, Port::Prometheus),
        (plan.ready, Port::Ready),
    ];
    let socket = plan.admin_socket.as_ref();
    for port in bind(&proxy, addresses, socket, predecessor.is_some())? {
        tasks.spawn(port.serve(proxy.clone(), ends.quit.clone(), ends.ports.clone()));
    }
    // Before anything serves: whoever is asked to end from then on drains.
    let mut signals = Signals::new()?;
    if plan.control_plane.is_none() {
        proxy.waited_for_runtime(None).await;
    }
    apply_static(&proxy, &plan.static_resources).await?;
    // Encoded messages of a large file are megabytes.
    drop(plan.static_resources);
    tend(&proxy, rules, &tasks, &ends.all);
    match plan.control_plane {
        None => proxy.set_ready(),
        Some(control_plane) => follow(&proxy, control_plane, plan.push_metrics, &tasks, &ends.all),
    }
    let (succeed, succeeded) = oneshot::channel();
    if let Some(path) = plan.restart {
        let work = succession(path, predecessor, proxy.clone(), succeed, ends.all.clone());
        tasks.spawn(work);
    }
    let mut running = None;
    let (mut heir, mut code) = (None, None);
    tokio::select! {
        ended = beside(&proxy, plan.application.as_ref(), &mut running) => code = Some(ended?),
        asked = asked_to_end(&proxy, &mut signals, &ends, succeeded) => match asked {
            Asked::Signal(number) => code = end_application(running.as_mut(), number, &mut signals).await,
            Asked::Successor(stream) => heir = Some(stream),
        },
    }
    let ended = CancellationToken::new();
    let report = heir.map(|heir| tokio::spawn(restart::report(proxy.clone(), heir, ended.clone())));
    // Nobody who is told to go elsewhere would come back to an application that has ended.
    let discourage = if code.is_some() {
        Duration::ZERO
    } else {
        plan.drain
    };
    // A second signal means now.
    tokio::select! {
        () = proxy.shut_down(discourage, FINISH) => {}
        _ = signals.next() => {}
    }
    ended.cancel();
    if let Some(report) = report {
        // What is counted now is all that will be.
        let _ = report.await;
    }
    ends.all.cancel();
    tasks.close();
    tasks.wait().await;
    proxy.stop().await;
    // Ends with the workers, which held the other ends.
    let _ = log.await;
    Ok(code.unwrap_or(0))
}

/// Starts the application once the proxy serves, and waits for its end.
async fn beside(
    proxy: &Proxy,
    application: Option<&Application>,
    running: &mut Option<Running>,
) -> Result<u8, Error> {
    let Some(application) = application else {
        return std::future::pending().await;
    };
    proxy.live().await;
    let code = running.insert(application.start()?).ended().await;
    tracing::info!(code, "the application has ended");
    Ok(code)
}

/// Passes a signal on to the application, if it runs, and goes on serving it until it has ended. With another signal it is waited for
/// no longer.
async fn end_application(running: Option<&mut Running>, number: Number, signals: &mut Signals) -> Option<u8> {
    let running = running?;
    running.tell(number);
    tokio::select! {
        code = running.ended() => Some(code),
        _ = signals.next() => None,
    }
}

/// What ends when.
struct Ends {
    all: CancellationToken,
    /// The ports that answer people and probes: before everything else where a successor has them.
    ports: CancellationToken,
    /// Somebody asks for the end over the admin port.
    quit: CancellationToken,
}

impl Ends {
    fn new() -> Self {
        let all = CancellationToken::new();
        Self {
            ports: all.child_token(),
            quit: CancellationToken::new(),
            all,
        }
    }
}

/// The signals that ask for the end.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn new() -> Result<Self, Error> {
        let of = |kind| {
            signal(kind).map_err(|source| Error::Start {
                what: "signal handling",
                source,
            })
        };
        Ok(Self {
            terminate: of(SignalKind::terminate())?,
            interrupt: of(SignalKind::interrupt())?,
        })
    }

    /// The next one.
    async fn next(&mut self) -> Number {
        tokio::select! {
            _ = self.terminate.recv() => Number::SIGTERM,
            _ = self.interrupt.recv() => Number::SIGINT,
        }
    }
}

/// Binds the ports that answer people and probes.
fn bind(
    proxy: &Arc<Proxy>,
    addresses: [(Option<SocketAddr>, Port); 3],
    socket: Option<&(PathBuf, u32)>,
    has_predecessor: bool,
) -> Result<Vec<AdminPort>, Error> {
    let mut out = Vec::new();
    for (address, port) in addresses {
        if let Some(address) = address {
            out.push(AdminPort::bind(proxy, address, port)?);
        }
    }
    if let Some((path, mode)) = socket {
        out.push(AdminPort::bind_unix(path, *mode, Port::Admin, has_predecessor)?);
    }
    Ok(out)
}

/// Starts what looks after things for as long as the process runs.
fn tend(proxy: &Arc<Proxy>, rules: overload::Rules, tasks: &TaskTracker, cancel: &CancellationToken) {
    tasks.spawn(housekeeping(proxy.clone(), cancel.clone()));
    tasks.spawn(dns::run(proxy.clone(), cancel.clone()));
    tasks.spawn(health::run(proxy.clone(), cancel.clone()));
    tasks.spawn(outliers::run(proxy.clone(), cancel.clone()));
    tasks.spawn(tend_secrets(proxy.clone(), cancel.clone()));
    tasks.spawn(sds::run(proxy.clone(), cancel.clone()));
    tasks.spawn(overload::run(rules, proxy.overload(), cancel.clone()));
}

/// Who asks for the end.
enum Asked {
    /// A signal, or what stands for it.
    Signal(Number),
    /// A process that serves in the place of this one, and is told what is still counted.
    Successor(UnixStream),
}

/// Waits for whoever asks for the end.
async fn asked_to_end(
    proxy: &Proxy,
    signals: &mut Signals,
    ends: &Ends,
    succeeded: oneshot::Receiver<UnixStream>,
) -> Asked {
    tokio::select! {
        number = signals.next() => {
            tracing::info!("{number}: draining");
            Asked::Signal(number)
        }
        () = ends.quit.cancelled() => {
            tracing::info!("asked to quit: draining");
            Asked::Signal(Number::SIGTERM)
        }
        Ok(heir) = succeeded => {
            tracing::info!("a successor serves: draining");
            ends.ports.cancel();
            proxy.stop_accepting().await;
            Asked::Successor(heir)
        }
    }
}

/// Takes configuration from the control plane, and streams measurements to it where it is told to.
fn follow(
    proxy: &Arc<Proxy>,
    control_plane: ControlPlane,
    push_metrics: bool,
    tasks: &TaskTracker,
    cancel: &CancellationToken,
) {
    let endpoint = match control_plane {
        ControlPlane::At(endpoint) => endpoint,
        ControlPlane::Cluster(name) => dial::cluster(proxy, &name),
    };
    if push_metrics {
        let (own, shards) = proxy.shards();
        let pusher = Pusher {
            endpoint: endpoint.clone(),
            node: proxy.node.clone(),
            own,
            shards,
            rerouted: proxy.rerouted(),
        };
        tasks.spawn(pusher.run(cancel.clone()));
    }
    tasks.spawn(xds::follow(proxy.clone(), endpoint, cancel.clone()));
}

/// Once this process serves: takes over from the one before it, and waits for the one after it, which is told to `succeed`.
async fn succession(
    path: PathBuf,
    predecessor: Option<Predecessor>,
    proxy: Arc<Proxy>,
    succeed: oneshot::Sender<UnixStream>,
    cancel: CancellationToken,
) {
    tokio::select! {
        () = cancel.cancelled() => return,
        () = proxy.live() => {}
    }
    proxy.sockets().close_handed();
    // Before the one before us hears that we serve: from then on we are asked.
    let station = match Station::open(&path) {
        Ok(station) => station,
        Err(error) => return tracing::error!(%error, "no hot restart"),
    };
    let inherit = async {
        if let Some(predecessor) = predecessor {
            predecessor.ready(proxy.clone(), cancel.clone()).await;
        }
    };
    let serve = async {
        if let Some(heir) = station.serve(proxy.clone(), cancel.clone()).await {
            let _ = succeed.send(heir);
        }
    };
    tokio::join!(inherit, serve);
}

/// Ends unused series; gives memory back after the start and after each burst of configuration.
async fn housekeeping(proxy: Arc<Proxy>, cancel: CancellationToken) {
    /// How often the store is looked at.
    const LOOK: Duration = Duration::from_secs(2);
    let (mut seen, mut collected) = (0, u64::MAX);
    // What was applied when pages were given back last, but for the start.
    let (mut begun, mut forgotten) = (false, u64::MAX);
    let shards = proxy.shards().1;
    let (mut looks, mut live) = (0u32, false);
    loop {
        tokio::select! {
            () = cancel.cancelled() => return,
            // The start is what touches most.
            () = proxy.live(), if !live => live = true,
            () = tokio::time::sleep(LOOK) => {}
        }
        looks = looks.wrapping_add(1);
        if looks.is_multiple_of(15) {
            expiry::mark(&shards, crate::clock::now_ms(), expiry::Limits::default());
        }
        let applied = proxy.store(|store| store.applied());
        let quiet = std::mem::replace(&mut seen, applied) == applied;
        if quiet && collected != applied {
            collected = applied;
            proxy.store(Store::sweep);
            crate::sys::collect_memory();
        }
        // What compiles configuration is not needed until the next change; what is needed comes back from the page cache, for
        // half a millisecond in all, which each change of many would pay again. The start is followed by the first steps of
        // every task, so that a quiet moment after it finds as much again.
        let begins = !std::mem::replace(&mut begun, proxy.is_ready());
        if proxy.is_ready() && (begins || quiet && forgotten != applied) {
            if begins {
                crate::Allocator.serve();
            } else {
                forgotten = applied;
            }
            crate::sys::forget_startup_pages();
        }
    }
}

/// Applies resources in make-before-break order; a refusal ends the start, because a file is fixed by hand.
pub async fn apply_static(proxy: &Arc<Proxy>, resources: &[StaticResource]) -> Result<(), Error> {
    for resource_type in ResourceType::ALL
        .into_iter()
        .filter(|ty| *ty != ResourceType::Listener)
        .chain([ResourceType::Listener])
    {
        let of_type: Vec<_> = resources
            .iter()
            .filter(|resource| resource.resource_type == resource_type)
            .cloned()
            .collect();
        let batch: Vec<_> = of_type.iter().map(StaticResource::update).collect();
        if !batch.is_empty() {
            refused(&of_type, proxy.apply(resource_type, &batch, &[]).await)?;
        }
        proxy.store(|store| store.note_static(resource_type, batch.iter().map(|update| update.name)));
    }
    Ok(())
}

/// Compiles resources without serving them.
pub fn check(resources: &[StaticResource]) -> Result<(), Error> {
    let mut store = Store::new(1);
    let mut wrong = Vec::new();
    for resource in resources {
        let one = store.apply(resource.resource_type, &[resource.update()], &[]);
        if let Err(Error::Bootstrap(more)) = refused(std::slice::from_ref(resource), one) {
            wrong.extend(more);
        }
    }
    if wrong.is_empty() {
        Ok(())
    } else {
        Err(Error::Bootstrap(wrong))
    }
}

/// Looks after secrets from files, after what waits for secrets, and after endpoints that are to be given up.
async fn tend_secrets(proxy: Arc<Proxy>, cancel: CancellationToken) {
    let mut tick = tokio::time::interval(SECRETS);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = cancel.cancelled() => return,
            _ = tick.tick() => {
                let now = crate::clock::now_ms();
                proxy.store(|store| store.end_stale(now));
                proxy.tend_secrets(now).await;
            }
        }
    }
}

async fn write_log(mut lines: mpsc::Receiver<String>) {
    let mut stderr = tokio::io::stderr();
    while let Some(mut line) = lines.recv().await {
        line.push('\n');
        // With nobody reading stderr there is nobody to tell.
        let _ = stderr.write_all(line.as_bytes()).await;
    }
}
