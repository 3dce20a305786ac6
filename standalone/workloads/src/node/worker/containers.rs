//! Starting, stopping and killing containers, and what their ends mean.

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Container as ContainerObject, Lifecycle};
use nix::libc;
use tracing::debug;

use super::Worker;
use crate::node::lifecycle::{Container, Phase, Role, timestamp};
use crate::node::shim_client::{ShimClient, ShimEvent};
use crate::node::{sandbox, start};

/// How long a deleted pod's containers go on before they are told to stop, unless a preStop hook says otherwise.
///
/// Kubernetes tells a pod to stop in the same moment in which it tells everybody else to stop sending to it; whoever
/// stops at once loses the requests in between, which is why people write `preStop: sleep`. Endpoint removals reach
/// proxies within tens of milliseconds here.
const ENDPOINTS_LEAVE: Duration = Duration::from_millis(500);

impl Worker {
    pub(super) async fn start(&mut self, name: &str) {
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

    pub(super) fn post_start(&mut self, name: &str, spec: &ContainerObject, shim: &Arc<ShimClient>) {
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

    /// preStop, then SIGTERM; SIGKILL comes from a later decision.
    pub(super) fn stop(&mut self, name: &str, deadline: Timestamp) {
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

    pub(super) async fn kill(&mut self, name: &str) {
        if let Some(container) = self.container_mut(name) {
            container.killed = true;
        }
        if let Some(shim) = self.shim.clone()
            && let Err(reason) = shim.signal(name, libc::SIGKILL).await
        {
            debug!(container = %name, %reason, "kill");
        }
    }

    pub(super) fn on_shim_event(&mut self, event: ShimEvent) {
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
    pub(super) fn on_shim_gone(&mut self) {
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
}

fn stop_signal(lifecycle: Option<&Lifecycle>) -> i32 {
    lifecycle
        .and_then(|lifecycle| lifecycle.stop_signal.as_deref())
        .and_then(|name| name.parse::<nix::sys::signal::Signal>().ok())
        .map_or(libc::SIGTERM, |signal| signal as i32)
}
