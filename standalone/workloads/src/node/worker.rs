//! One pod on this node: carries out what [`super::lifecycle`] decides, and reports what [`super::status`] says.
//!
//! A worker is woken by the pod object, its shim, its probes, ConfigMaps and Secrets it reads, the image catalogue
//! and the time that the decision named; it polls nothing. Writing status never holds up the pod: one patch is in
//! flight, the newest state follows it.

mod adopt;
mod containers;
mod probing;
mod report;

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{
    Container as ContainerObject, ObjectReference, Pod as PodObject, PodStatus,
};
use kube::{Resource, ResourceExt};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tracing::{debug, warn};

use super::context::Context;
use super::env::{self, PodFacts};
use super::lifecycle::{Action, Container, Deletion, Phase, Pod, RestartPolicy, Role, decide};
use super::probes::ProbeEvent;
use super::shim_client::{ShimClient, ShimEvent};
use super::{sandbox, start, volumes};
use probing::Probing;

/// Grace of a pod whose object is gone (forced deletion): kubelet's minimum.
const FORCED_GRACE: Duration = Duration::from_secs(1);
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
