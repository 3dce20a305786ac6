//! Taking over what an earlier node started.

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::Pod as PodObject;
use kube::ResourceExt;
use tokio::sync::mpsc;
use tracing::{info, warn};

use super::Worker;
use crate::node::lifecycle::{Container, Phase, timestamp};
use crate::node::shim_client::{ShimClient, ShimEvent};
use crate::node::{record, sandbox, start};

impl Worker {
    /// Takes over what an earlier node started.
    pub(super) async fn adopt(&mut self) -> Option<mpsc::Receiver<ShimEvent>> {
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
    pub(super) fn restore_counts(&mut self) {
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

    pub(super) fn resume_probes(&mut self) {
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
}

/// Whether the init containers of a pod that runs were through.
fn was_initialized(object: &PodObject) -> bool {
    object.status.as_ref().is_some_and(|status| {
        let mut conditions = status.conditions.iter().flatten();
        status.phase.as_deref() != Some("Pending")
            && conditions.any(|condition| condition.type_ == "Initialized" && condition.status == "True")
    })
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
