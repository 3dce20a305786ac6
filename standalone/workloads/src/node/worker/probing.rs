//! The probes of running containers and what follows from their findings.

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Container as ContainerObject;
use tokio::task::JoinSet;

use super::Worker;
use crate::node::lifecycle::Phase;
use crate::node::probes::{self, Finding, Kind, ProbeEvent};
use crate::node::start;

/// The probes that run for one start of a container.
pub(super) struct Probing {
    pub(super) attempt: u32,
    pub(super) tasks: JoinSet<()>,
}

impl Worker {
    pub(super) fn target(&self, name: &str, spec: &ContainerObject) -> Option<probes::Target> {
        Some(probes::Target {
            address: self.address?.to_string(),
            shim: self.shim.clone()?,
            container: Arc::new(spec.clone()),
            env: self.env.get(name)?.clone(),
            command: start::command_of(&self.context, spec),
            attempt: self.container(name)?.restarts,
        })
    }

    pub(super) fn start_probes(&mut self, name: &str, spec: &ContainerObject, started: bool) {
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

    pub(super) fn on_probe(&mut self, event: ProbeEvent) {
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
}
