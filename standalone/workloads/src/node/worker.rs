//! One pod on this node: carries out what [`super::lifecycle`] decides, and reports what [`super::status`] says.
//!
//! A worker is woken by the pod object, its shim, its probes, ConfigMaps and Secrets it reads, the image catalogue
//! and the time that the decision named; it polls nothing. Writing status never holds up the pod: one patch is in
//! flight, the newest state follows it.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{
    Container as ContainerObject, Lifecycle, ObjectReference, Pod as PodObject, PodStatus,
};
use kube::api::{DeleteParams, Patch, PatchParams, Preconditions};
use kube::{Api, Resource, ResourceExt};
use nix::libc;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tracing::{debug, info, warn};

use super::context::Context;
use super::env::{self, PodFacts};
use super::lifecycle::{Action, Container, Deletion, Phase, Pod, RestartPolicy, Role, decide, timestamp};
use super::probes::{self, Finding, Kind, ProbeEvent};
use super::record::{self, PodRecord};
use super::sandbox;
use super::shim_client::{ShimClient, ShimEvent};
use super::start;
use super::status::{StatusFacts, pod_status};
use super::volumes;

/// How long a deleted pod's containers go on before they are told to stop, unless a preStop hook says otherwise.
///
/// Kubernetes tells a pod to stop in the same moment in which it tells everybody else to stop sending to it; whoever
/// stops at once loses the requests in between, which is why people write `preStop: sleep`. Endpoint removals reach
/// proxies within tens of milliseconds here.
const ENDPOINTS_LEAVE: Duration = Duration::from_millis(500);

/// Grace of a pod whose object is gone (forced deletion): kubelet's minimum.
const FORCED_GRACE: Duration = Duration::from_secs(1);
/// How long one status write may take.
const WRITE_DEADLINE: Duration = Duration::from_secs(10);
/// First and longest wait before a write is tried again.
const RETRY: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));

/// What the node tells a worker.
#[derive(Debug, Clone)]
pub(crate) enum PodUpdate {
    /// The object's latest state.
    Present(Arc<PodObject>),
    /// The object is gone.
    Gone,
}

/// The probes that run for one start of a container.
struct Probing {
    attempt: u32,
    tasks: JoinSet<()>,
}

pub(crate) struct Worker {
    pub(crate) context: Arc<Context>,
    pub(crate) object: Arc<PodObject>,
    pub(crate) uid: String,
    pub(crate) directory: PathBuf,
    pub(crate) pod: Pod,
    pub(crate) address: Option<Ipv4Addr>,
    pub(crate) shim: Option<Arc<ShimClient>>,
    pub(crate) shim_process: Option<std::process::Child>,
    pub(crate) listeners: Vec<(u16, OwnedFd)>,
    gone: bool,
    /// The object says that it has completed, and nothing of it is left here: it only waits to be deleted.
    terminal: bool,
    started_at: Option<Timestamp>,
    published: PodStatus,
    write: Option<BoxFuture<'static, Result<(), String>>>,
    write_retry: Duration,
    write_not_before: Option<tokio::time::Instant>,
    /// Status in flight, which becomes `published` when it is written.
    writing: Option<PodStatus>,
    probing: BTreeMap<String, Probing>,
    probe_events: (mpsc::Sender<ProbeEvent>, mpsc::Receiver<ProbeEvent>),
    hooks: JoinSet<()>,
    not_honoured: String,
    sandbox_retry: Duration,
    sandbox_not_before: Option<tokio::time::Instant>,
    /// Env of each running container, for exec probes and hooks.
    env: BTreeMap<String, Arc<Vec<(String, String)>>>,
}

impl Worker {
    pub(crate) fn new(context: Arc<Context>, object: Arc<PodObject>) -> Self {
        let uid = object.uid().unwrap_or_default();
        let directory = context.paths.pod(&uid);
        let published = object.status.clone().unwrap_or_default();
        Self {
            pod: lifecycle_of(&object),
            not_honoured: start::not_honoured(&object),
            started_at: published.start_time.as_ref().map(|time| time.0),
            published,
            context,
            object,
            uid,
            directory,
            address: None,
            shim: None,
            shim_process: None,
            listeners: Vec::new(),
            gone: false,
            terminal: false,
            write: None,
            write_retry: RETRY.0,
            write_not_before: None,
            writing: None,
            probing: BTreeMap::new(),
            probe_events: mpsc::channel(64),
            hooks: JoinSet::new(),
            sandbox_retry: RETRY.0,
            sandbox_not_before: None,
            env: BTreeMap::new(),
        }
    }

    /// Runs the pod to its end: until its object is deleted and nothing of it is left. Returns early, leaving
    /// everything running, when the node is cancelled.
    pub(crate) async fn run(mut self, mut updates: watch::Receiver<PodUpdate>) {
        let cancel = self.context.cancel.clone();
        let mut shim_events = self.adopt().await;
        let phase = self
            .object
            .status
            .as_ref()
            .and_then(|status| status.phase.as_deref());
        if self.shim.is_none() && matches!(phase, Some("Succeeded" | "Failed")) {
            self.terminal = true;
            self.pod.finished = true;
        }
        let mut config_changes = self.context.config_changed.subscribe();
        let mut catalogue = self.context.catalogue.subscribe();
        loop {
            let update = updates.borrow_and_update().clone();
            self.on_update(update);
            if self.shim.is_none()
                && !self.pod.finished
                && self.pod.deletion.is_none()
                && let Some(events) = self.create_sandbox().await
            {
                shim_events = Some(events);
            }
            let wake_at = if self.shim.is_some() || self.pod.deletion.is_some() {
                self.act().await
            } else {
                None
            };
            if self.pod.finished && self.pod.deletion.is_some() {
                self.remove().await;
                return;
            }
            self.publish();
            let wake = [
                wake_at.map(instant),
                self.write_not_before
                    .filter(|_| self.write.is_none() && self.needs_publishing()),
                self.sandbox_not_before.filter(|_| self.shim.is_none()),
            ]
            .into_iter()
            .flatten()
            .min();
            tokio::select! {
                () = cancel.cancelled() => return,
                changed = updates.changed() => if changed.is_err() { return },
                event = next_event(&mut shim_events) => match event {
                    Some(event) => self.on_shim_event(event),
                    None => shim_events = None,
                },
                event = self.probe_events.1.recv() => if let Some(event) = event { self.on_probe(event) },
                result = finish(&mut self.write) => self.on_written(result),
                _ = config_changes.changed() => self.on_config_changed(),
                _ = catalogue.changed() => self.on_config_changed(),
                () = sleep_until(wake) => {}
                Some(_) = self.hooks.join_next() => {}
            }
        }
    }

    fn on_update(&mut self, update: PodUpdate) {
        match update {
            PodUpdate::Present(object) => {
                self.object = object;
                if self.object.metadata.deletion_timestamp.is_some() {
                    let seconds = self
                        .object
                        .metadata
                        .deletion_grace_period_seconds
                        .unwrap_or(30)
                        .max(0);
                    self.delete_within(Duration::from_secs(seconds.unsigned_abs()));
                }
            }
            PodUpdate::Gone => {
                self.gone = true;
                self.delete_within(FORCED_GRACE);
            }
        }
    }

    fn delete_within(&mut self, grace: Duration) {
        let deadline = Timestamp::now() + grace;
        match &mut self.pod.deletion {
            // Asked again with less time.
            Some(deletion) => deletion.deadline = deletion.deadline.min(deadline),
            None => {
                self.pod.deletion = Some(Deletion { deadline });
                // A pod that had completed before still has to be removed: that is another finish.
                self.pod.finished = false;
                // A stopping pod is not to be found ready or restarted by its probes.
                self.probing.retain(|_, probing| {
                    probing.tasks.abort_all();
                    false
                });
            }
        }
    }

    /// Takes over what an earlier node started.
    async fn adopt(&mut self) -> Option<mpsc::Receiver<ShimEvent>> {
        self.restore_counts();
        let record = record::read_pod(&self.directory).ok()?;
        if let Ok((client, events)) = ShimClient::adopt(&self.directory) {
            let client = Arc::new(client);
            match client.state().await {
                Ok(reports) => {
                    self.address = Some(record.address);
                    self.pod.initialized = was_initialized(&self.object);
                    for report in reports {
                        if let Some(container) = self
                            .pod
                            .containers
                            .iter_mut()
                            .find(|container| container.name == report.name)
                        {
                            restore(container, &report, &self.object);
                        }
                    }
                    self.listeners = client.listeners().await.unwrap_or_default();
                    self.context.listeners.adopt(&self.object, &self.listeners);
                    self.shim = Some(client);
                    self.resume_probes();
                    info!(pod = %self.object.name_any(), "adopted a running pod");
                    return Some(events);
                }
                Err(error) => {
                    warn!(pod = %self.object.name_any(), %error, "its shim does not answer; starting the pod anew");
                    let _ = client.shutdown(Duration::ZERO).await;
                }
            }
        }
        // Its containers died with the shim. The address is free again, and a restart is a restart.
        sandbox::clear(&self.directory);
        self.context.addresses.release(record.address);
        None
    }

    /// Restart counts as the object has them: what is started anew in a new sandbox has been restarted.
    fn restore_counts(&mut self) {
        let Some(status) = self.object.status.as_ref() else {
            return;
        };
        let all = status
            .container_statuses
            .iter()
            .chain(status.init_container_statuses.iter())
            .flatten();
        for known in all {
            let Some(container) = self
                .pod
                .containers
                .iter_mut()
                .find(|container| container.name == known.name)
            else {
                continue;
            };
            container.restarts = known.restart_count.max(0) as u32;
            container.started_once = known.container_id.is_some();
        }
    }

    fn resume_probes(&mut self) {
        let running: Vec<(String, bool)> = self
            .pod
            .containers
            .iter()
            .filter_map(|container| match container.phase {
                Phase::Running { started, .. } => Some((container.name.clone(), started)),
                _ => None,
            })
            .collect();
        for (name, started) in running {
            if let (Some(spec), Ok(prepared)) = (
                self.spec_of(&name),
                self.facts().and_then(|facts| {
                    let spec = self.spec_of(&name).unwrap_or_default();
                    start::environment(&self.context, &self.object, &spec, &facts)
                }),
            ) {
                self.env.insert(name.clone(), Arc::new(prepared));
                self.start_probes(&name, &spec, started);
            }
        }
    }

    fn facts(&self) -> Result<PodFacts, env::ConfigError> {
        let address = self
            .address
            .ok_or_else(|| env::ConfigError("the pod has no address".to_owned()))?;
        Ok(PodFacts {
            pod_ip: address.to_string(),
            host_ip: self.context.config.gateway().to_string(),
            node_name: self.context.config.node_name.clone(),
        })
    }

    pub(crate) fn spec_of(&self, name: &str) -> Option<ContainerObject> {
        let spec = self.object.spec.as_ref()?;
        spec.init_containers
            .iter()
            .flatten()
            .chain(&spec.containers)
            .find(|container| container.name == name)
            .cloned()
    }

    pub(crate) fn reference(&self) -> ObjectReference {
        self.object.object_ref(&())
    }

    async fn create_sandbox(&mut self) -> Option<mpsc::Receiver<ShimEvent>> {
        if self
            .sandbox_not_before
            .is_some_and(|at| tokio::time::Instant::now() < at)
        {
            return None;
        }
        self.started_at.get_or_insert_with(Timestamp::now);
        match sandbox::create(self).await {
            Ok(events) => {
                self.sandbox_not_before = None;
                Some(events)
            }
            Err(reason) => {
                self.context.recorder.warning(
                    &self.reference(),
                    "FailedCreatePodSandBox",
                    "CreateSandbox",
                    &format!("Failed to create pod sandbox: {reason}"),
                );
                warn!(pod = %self.object.name_any(), %reason, "create the pod's sandbox");
                self.sandbox_not_before = Some(tokio::time::Instant::now() + self.sandbox_retry);
                self.sandbox_retry = (self.sandbox_retry * 2).min(Duration::from_secs(30));
                None
            }
        }
    }

    /// Decides and acts until nothing is left to do now; when to look again.
    async fn act(&mut self) -> Option<Timestamp> {
        // Each round starts, stops or kills a container or ends; the bound only guards against a mistake.
        for _ in 0..64 {
            let decision = decide(&mut self.pod, Timestamp::now());
            if decision.actions.is_empty() {
                return decision.wake_at;
            }
            for action in decision.actions {
                match action {
                    Action::Start(name) => self.start(&name).await,
                    Action::Stop(name, deadline) => self.stop(&name, deadline),
                    Action::Kill(name) => self.kill(&name).await,
                    Action::Finish => {
                        debug!(pod = %self.object.name_any(), "nothing of the pod runs any more")
                    }
                }
            }
        }
        Some(Timestamp::now() + Duration::from_secs(1))
    }

    async fn start(&mut self, name: &str) {
        let (Some(spec), Some(shim)) = (self.spec_of(name), self.shim.clone()) else {
            return;
        };
        let attempt = self.container(name).map_or(0, |container| {
            if container.started_once {
                container.restarts + 1
            } else {
                container.restarts
            }
        });
        let prepared = match self.facts() {
            Ok(facts) => start::prepare(
                &self.context,
                &self.object,
                &spec,
                &facts,
                &self.directory,
                attempt,
                &self.listeners,
            ),
            Err(error) => Err(start::NotPrepared::config(error.0)),
        };
        let prepared = match prepared {
            Ok(prepared) => prepared,
            Err(refused) => {
                let again = self.container(name).is_some_and(|container| {
                    matches!(&container.phase, Phase::Waiting { message: Some(message), .. } if *message == refused.message)
                });
                let reason = if again {
                    refused.repeated_reason
                } else {
                    refused.reason
                };
                if !again {
                    self.context
                        .recorder
                        .warning(&self.reference(), "Failed", "Start", &refused.message);
                }
                if let Some(container) = self.container_mut(name) {
                    container.on_start_failed(reason, &refused.message, Timestamp::now());
                }
                return;
            }
        };
        if let Some(container) = self.container_mut(name) {
            if let Phase::Ended(exit) = container.phase {
                container.last = Some(exit);
            }
            container.phase = Phase::Starting;
        }
        let fds: Vec<_> = if prepared.spec.listeners.is_empty() {
            Vec::new()
        } else {
            self.listeners.iter().map(|(_, fd)| fd.as_raw_fd()).collect()
        };
        let result = match start::write_spec(&self.directory, &prepared.spec) {
            Ok(file) => shim.start(file, &fds).await,
            Err(error) => Err(format!("write the container's specification: {error}")),
        };
        match result {
            Ok((_, started_at)) => {
                let has_startup = spec.startup_probe.is_some();
                let has_readiness = spec.readiness_probe.is_some();
                if let Some(container) = self.container_mut(name) {
                    container.on_started(timestamp(started_at), has_startup, has_readiness);
                }
                self.env
                    .insert(name.to_owned(), Arc::new(prepared.spec.env.clone()));
                self.start_probes(name, &spec, !has_startup);
                self.post_start(name, &spec, &shim);
            }
            Err(reason) => {
                let message = format!("failed to start container \"{name}\": {reason}");
                self.context.recorder.warning(
                    &self.reference(),
                    "Failed",
                    "Start",
                    &format!("Error: {message}"),
                );
                if let Some(container) = self.container_mut(name) {
                    container.started_once = true;
                    container.on_start_failed("RunContainerError", &message, Timestamp::now());
                }
            }
        }
    }

    fn target(&self, name: &str, spec: &ContainerObject) -> Option<probes::Target> {
        Some(probes::Target {
            address: self.address?.to_string(),
            shim: self.shim.clone()?,
            container: Arc::new(spec.clone()),
            env: self.env.get(name)?.clone(),
            command: start::command_of(&self.context, spec),
            attempt: self.container(name)?.restarts,
        })
    }

    fn start_probes(&mut self, name: &str, spec: &ContainerObject, started: bool) {
        let Some(target) = self.target(name, spec) else {
            return;
        };
        let mut tasks = JoinSet::new();
        let mut add = |kind, probe: &Option<_>| {
            if let Some(probe) = probe.clone() {
                tasks.spawn(probes::run(
                    target.clone(),
                    kind,
                    probe,
                    self.probe_events.0.clone(),
                ));
            }
        };
        if started {
            add(Kind::Readiness, &spec.readiness_probe);
            add(Kind::Liveness, &spec.liveness_probe);
        } else {
            add(Kind::Startup, &spec.startup_probe);
        }
        let attempt = target.attempt;
        self.probing.insert(name.to_owned(), Probing { attempt, tasks });
    }

    fn on_probe(&mut self, event: ProbeEvent) {
        let current = self
            .probing
            .get(&event.container)
            .is_some_and(|probing| probing.attempt == event.attempt);
        if !current || self.pod.deletion.is_some() {
            return;
        }
        let Some(spec) = self.spec_of(&event.container) else {
            return;
        };
        match &event.finding {
            Finding::Unhealthy(reason) | Finding::Failed(reason) => {
                let note = format!("{} probe failed: {reason}", event.kind.name());
                self.context
                    .recorder
                    .warning(&self.reference(), "Unhealthy", "Probe", &note);
            }
            Finding::Passed => {}
        }
        let has_readiness = spec.readiness_probe.is_some();
        let Some(container) = self.container_mut(&event.container) else {
            return;
        };
        let Phase::Running { started, ready, .. } = &mut container.phase else {
            return;
        };
        match (event.kind, event.finding) {
            (Kind::Startup, Finding::Passed) => {
                *started = true;
                *ready = !has_readiness;
                self.start_probes(&event.container, &spec, true);
            }
            (Kind::Readiness, Finding::Passed) => *ready = true,
            (Kind::Readiness, Finding::Failed(_)) => *ready = false,
            (Kind::Startup | Kind::Liveness, Finding::Failed(_)) => {
                let (probe, what) = if event.kind == Kind::Startup {
                    (&spec.startup_probe, "startup")
                } else {
                    (&spec.liveness_probe, "liveness")
                };
                let grace = probe
                    .as_ref()
                    .and_then(|probe| probe.termination_grace_period_seconds)
                    .or_else(|| {
                        self.object
                            .spec
                            .as_ref()
                            .and_then(|spec| spec.termination_grace_period_seconds)
                    })
                    .unwrap_or(30)
                    .max(0)
                    .unsigned_abs();
                let note = format!(
                    "Container {} failed {what} probe, will be restarted",
                    event.container
                );
                self.context
                    .recorder
                    .normal(&self.reference(), "Killing", "Kill", &note);
                self.stop(&event.container, Timestamp::now() + Duration::from_secs(grace));
            }
            (Kind::Liveness, Finding::Passed) | (_, Finding::Unhealthy(_)) => {}
        }
    }

    /// preStop, then SIGTERM; SIGKILL comes from a later decision.
    fn stop(&mut self, name: &str, deadline: Timestamp) {
        if let Some(probing) = self.probing.remove(name) {
            drop(probing);
        }
        let first = self
            .container(name)
            .is_some_and(|container| container.stopping.is_none());
        if let Some(container) = self.container_mut(name) {
            container.stopping = Some(deadline);
        }
        let (Some(shim), Some(spec), true) = (self.shim.clone(), self.spec_of(name), first) else {
            return;
        };
        let target = self.target(name, &spec);
        let presence = self.context.presence.clone();
        let name = name.to_owned();
        let left = deadline.duration_since(Timestamp::now());
        let left = Duration::try_from(left).unwrap_or_default();
        let serves = self.pod.deletion.is_some()
            && self
                .container(&name)
                .is_some_and(|container| container.role == Role::Main);
        self.hooks.spawn(async move {
            let hook = spec
                .lifecycle
                .as_ref()
                .and_then(|lifecycle| lifecycle.pre_stop.as_ref());
            if let (Some(hook), Some(target)) = (hook, target)
                && let Err(reason) = start::run_hook(hook, &target, left).await
            {
                debug!(container = %name, %reason, "preStop hook");
            } else if hook.is_none() && serves {
                presence
                    .everybody_told(ENDPOINTS_LEAVE.min(left / 4), left * 3 / 4)
                    .await;
            }
            if let Err(reason) = shim.signal(&name, stop_signal(spec.lifecycle.as_ref())).await {
                debug!(container = %name, %reason, "it ended before it was told to");
            }
        });
    }

    fn post_start(&mut self, name: &str, spec: &ContainerObject, shim: &Arc<ShimClient>) {
        let Some(hook) = spec
            .lifecycle
            .as_ref()
            .and_then(|lifecycle| lifecycle.post_start.clone())
        else {
            return;
        };
        let Some(target) = self.target(name, spec) else {
            return;
        };
        let (shim, name) = (shim.clone(), name.to_owned());
        let (recorder, about) = (self.context.recorder.clone(), self.reference());
        self.hooks.spawn(async move {
            if let Err(reason) = start::run_hook(&hook, &target, Duration::from_secs(60)).await {
                recorder.warning(
                    &about,
                    "FailedPostStartHook",
                    "PostStart",
                    &format!("PostStartHook failed: {reason}"),
                );
                let _ = shim.signal(&name, libc::SIGKILL).await;
            }
        });
    }

    async fn kill(&mut self, name: &str) {
        if let Some(container) = self.container_mut(name) {
            container.killed = true;
        }
        if let Some(shim) = self.shim.clone()
            && let Err(reason) = shim.signal(name, libc::SIGKILL).await
        {
            debug!(container = %name, %reason, "kill");
        }
    }

    fn on_shim_event(&mut self, event: ShimEvent) {
        match event {
            ShimEvent::Exited {
                container,
                attempt,
                exit,
            } => {
                self.probing.remove(&container);
                let Some(known) = self.container_mut(&container) else {
                    return;
                };
                let current = if known.phase == Phase::Starting && known.started_once {
                    known.restarts + 1
                } else {
                    known.restarts
                };
                if attempt == current && !matches!(known.phase, Phase::Ended(_)) {
                    if known.phase == Phase::Starting {
                        known.on_started(timestamp(exit.started_at), false, false);
                    }
                    known.on_ended(exit);
                }
            }
            ShimEvent::Gone => self.on_shim_gone(),
        }
    }

    /// The shim was killed, and its containers with it.
    fn on_shim_gone(&mut self) {
        if let Some(mut child) = self.shim_process.take() {
            // It has ended or is about to; reaping takes no time worth a thread.
            let _ = child.try_wait();
            self.context.reap(child);
        }
        self.shim = None;
        self.probing.clear();
        let now = Timestamp::now().as_millisecond();
        for container in &mut self.pod.containers {
            if let Phase::Running { started_at, .. } = container.phase {
                container.on_ended(crate::shim::protocol::Exit {
                    code: 137,
                    signal: Some(libc::SIGKILL),
                    started_at: started_at.as_millisecond(),
                    finished_at: now,
                });
            }
        }
        if let Some(address) = self.address.take() {
            sandbox::clear(&self.directory);
            self.context.addresses.release(address);
        }
        // A new sandbox means that init containers run again, as in Kubernetes.
        if self.pod.deletion.is_none() && !self.pod.finished {
            self.pod.initialized = false;
            for container in self
                .pod
                .containers
                .iter_mut()
                .filter(|container| container.role == Role::Init)
            {
                container.phase = Container::new(&container.name, Role::Init).phase;
                container.not_before = None;
            }
        }
    }

    /// What containers wait for may be there now; volumes that show it are rewritten.
    fn on_config_changed(&mut self) {
        for container in &mut self.pod.containers {
            if let Phase::Waiting { message: Some(_), .. } = container.phase {
                container.not_before = None;
            }
        }
        if let Ok(facts) = self.facts() {
            let references = self.context.references(&self.object);
            match volumes::plan(&self.object, &self.directory, &facts, &references) {
                Ok(volumes) => {
                    for volume in volumes.iter().filter(|volume| volume.content.is_some()) {
                        if let Err(error) = volumes::write(volume, &start::stamp()) {
                            warn!(volume = %volume.name, %error, "update a volume");
                        }
                    }
                }
                Err(error) => debug!(%error, "a volume's source is missing; its content stays"),
            }
        }
    }

    fn container(&self, name: &str) -> Option<&Container> {
        self.pod
            .containers
            .iter()
            .find(|container| container.name == name)
    }

    fn container_mut(&mut self, name: &str) -> Option<&mut Container> {
        self.pod
            .containers
            .iter_mut()
            .find(|container| container.name == name)
    }

    fn status(&self) -> PodStatus {
        let facts = StatusFacts {
            pod_ip: self.address.map(|address| address.to_string()),
            host_ip: self.context.config.gateway().to_string(),
            started_at: self.started_at,
            sandbox_ready: self.shim.is_some(),
            not_honoured: self.not_honoured.clone(),
        };
        let previous = self.writing.as_ref().unwrap_or(&self.published);
        pod_status(&self.object, &self.pod, &facts, previous, Timestamp::now())
    }

    fn needs_publishing(&self) -> bool {
        !self.gone && !self.terminal && self.status() != self.published
    }

    /// Starts writing the status if it changed and none is being written.
    fn publish(&mut self) {
        if self.gone
            || self.terminal
            || self.write.is_some()
            || self
                .write_not_before
                .is_some_and(|at| tokio::time::Instant::now() < at)
        {
            return;
        }
        let status = self.status();
        if status == self.published {
            return;
        }
        let api = self.api();
        let name = self.object.name_any();
        let patch = serde_json::json!({"metadata": {"uid": self.uid}, "status": status});
        self.writing = Some(status);
        self.write = Some(
            async move {
                let (parameters, patch) = (PatchParams::default(), Patch::Strategic(&patch));
                let write = api.patch_status(&name, &parameters, &patch);
                match tokio::time::timeout(WRITE_DEADLINE, write).await {
                    Ok(Ok(_)) => Ok(()),
                    // Deleted, or another pod of that name: the watch says so too.
                    Ok(Err(kube::Error::Api(status))) if status.code == 404 || status.code == 409 => Ok(()),
                    Ok(Err(error)) => Err(error.to_string()),
                    Err(_) => Err("no answer within 10 s".to_owned()),
                }
            }
            .boxed(),
        );
    }

    fn on_written(&mut self, result: Result<(), String>) {
        self.write = None;
        let written = self.writing.take();
        match result {
            Ok(()) => {
                self.published = written.unwrap_or_default();
                self.write_retry = RETRY.0;
                self.write_not_before = None;
            }
            Err(error) => {
                debug!(pod = %self.object.name_any(), error, "write status; will be tried again");
                self.write_not_before = Some(tokio::time::Instant::now() + self.write_retry);
                self.write_retry = (self.write_retry * 2).min(RETRY.1);
            }
        }
    }

    fn api(&self) -> Api<PodObject> {
        Api::namespaced(
            self.context.client.clone(),
            &self.object.namespace().unwrap_or_default(),
        )
    }

    /// Writes the last status, deletes the object and clears up.
    async fn remove(&mut self) {
        if let Some(write) = self.write.take() {
            let _ = write.await;
            self.writing = None;
        }
        if let Some(shim) = self.shim.take() {
            let _ = shim.shutdown(Duration::ZERO).await;
        }
        if let Some(child) = self.shim_process.take() {
            self.context.reap(child);
        }
        // Before the object goes: who sees that it is gone finds nothing of it here.
        sandbox::clear(&self.directory);
        if !self.gone {
            self.publish();
            if let Some(write) = self.write.take() {
                let _ = write.await;
            }
            self.delete_object().await;
        }
        // Only now: while the object is there, its address is its own.
        if let Some(address) = self.address.take() {
            self.context.addresses.release(address);
        }
        self.context.remove_logs(&self.object);
        info!(pod = %self.object.name_any(), "removed");
    }

    /// Deletes the object for good; only this very pod, not a successor of its name.
    fn delete_object(&self) -> impl Future<Output = ()> + Send + use<> {
        let parameters = DeleteParams {
            grace_period_seconds: Some(0),
            preconditions: Some(Preconditions {
                uid: Some(self.uid.clone()),
                resource_version: None,
            }),
            ..DeleteParams::default()
        };
        let (api, name, cancel) = (self.api(), self.object.name_any(), self.context.cancel.clone());
        async move {
            let mut wait = RETRY.0;
            loop {
                match tokio::time::timeout(WRITE_DEADLINE, api.delete(&name, &parameters)).await {
                    Ok(Ok(_)) => return,
                    Ok(Err(kube::Error::Api(status))) if status.code == 404 || status.code == 409 => return,
                    Ok(Err(_)) | Err(_) => {}
                }
                tokio::select! {
                    () = cancel.cancelled() => return,
                    () = tokio::time::sleep(wait) => wait = (wait * 2).min(RETRY.1),
                }
            }
        }
    }

    pub(crate) fn write_record(&self, address: Ipv4Addr) -> std::io::Result<()> {
        record::write_pod(
            &self.directory,
            &PodRecord {
                address,
                pod: self.object.as_ref().clone(),
            },
        )
    }
}

/// Whether the init containers of a pod that runs were through.
fn was_initialized(object: &PodObject) -> bool {
    object.status.as_ref().is_some_and(|status| {
        let mut conditions = status.conditions.iter().flatten();
        status.phase.as_deref() != Some("Pending")
            && conditions.any(|condition| condition.type_ == "Initialized" && condition.status == "True")
    })
}

fn stop_signal(lifecycle: Option<&Lifecycle>) -> i32 {
    lifecycle
        .and_then(|lifecycle| lifecycle.stop_signal.as_deref())
        .and_then(|name| name.parse::<nix::sys::signal::Signal>().ok())
        .map_or(libc::SIGTERM, |signal| signal as i32)
}

fn instant(at: Timestamp) -> tokio::time::Instant {
    let left = Duration::try_from(at.duration_since(Timestamp::now())).unwrap_or_default();
    // Timers have millisecond resolution and must not fire early.
    tokio::time::Instant::now() + left + Duration::from_millis(1)
}

async fn sleep_until(at: Option<tokio::time::Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

async fn next_event(events: &mut Option<mpsc::Receiver<ShimEvent>>) -> Option<ShimEvent> {
    match events {
        Some(events) => events.recv().await,
        None => std::future::pending().await,
    }
}

async fn finish(write: &mut Option<BoxFuture<'static, Result<(), String>>>) -> Result<(), String> {
    match write {
        Some(write) => write.await,
        None => std::future::pending().await,
    }
}

fn lifecycle_of(object: &PodObject) -> Pod {
    let spec = object.spec.as_ref();
    let mut containers = Vec::new();
    for container in spec.iter().flat_map(|spec| spec.init_containers.iter().flatten()) {
        let sidecar = container.restart_policy.as_deref() == Some("Always");
        containers.push(Container::new(
            &container.name,
            if sidecar { Role::Sidecar } else { Role::Init },
        ));
    }
    for container in spec.iter().flat_map(|spec| &spec.containers) {
        containers.push(Container::new(&container.name, Role::Main));
    }
    Pod {
        restart_policy: match spec.and_then(|spec| spec.restart_policy.as_deref()) {
            Some("Never") => RestartPolicy::Never,
            Some("OnFailure") => RestartPolicy::OnFailure,
            _ => RestartPolicy::Always,
        },
        containers,
        initialized: false,
        deletion: None,
        grace: Duration::from_secs(
            spec.and_then(|spec| spec.termination_grace_period_seconds)
                .unwrap_or(30)
                .max(0)
                .unsigned_abs(),
        ),
        finished: false,
    }
}

/// A container as its shim knows it; readiness is taken from the object, so that an adopted pod stays ready.
fn restore(container: &mut Container, report: &crate::shim::protocol::ContainerReport, object: &PodObject) {
    container.restarts = report.attempt;
    container.started_once = true;
    let known = object
        .status
        .iter()
        .flat_map(|status| {
            status
                .container_statuses
                .iter()
                .chain(status.init_container_statuses.iter())
                .flatten()
        })
        .find(|status| status.name == container.name);
    container.phase = match report.exit {
        Some(exit) => {
            container.on_ended(exit);
            return;
        }
        None => Phase::Running {
            started_at: timestamp(report.started_at),
            started: known.and_then(|status| status.started).unwrap_or(false),
            ready: known.is_some_and(|status| status.ready),
        },
    };
}
