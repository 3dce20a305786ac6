//! Telling the API server: status writes, the end of the object, and the record for the next node.

use std::net::Ipv4Addr;
use std::time::Duration;

use futures::FutureExt;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Pod as PodObject, PodStatus};
use kube::api::{DeleteParams, Patch, PatchParams, Preconditions};
use kube::{Api, ResourceExt};
use tracing::{debug, info};

use super::{RETRY, Worker};
use crate::node::record::{self, PodRecord};
use crate::node::sandbox;
use crate::node::status::{StatusFacts, pod_status};

/// How long one status write may take.
const WRITE_DEADLINE: Duration = Duration::from_secs(10);
impl Worker {
    pub(super) fn status(&self) -> PodStatus {
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

    pub(super) fn needs_publishing(&self) -> bool {
        !self.gone && !self.terminal && self.status() != self.published
    }

    /// Starts writing the status if it changed and none is being written.
    pub(super) fn publish(&mut self) {
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

    pub(super) fn on_written(&mut self, result: Result<(), String>) {
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

    pub(super) fn api(&self) -> Api<PodObject> {
        Api::namespaced(
            self.context.client.clone(),
            &self.object.namespace().unwrap_or_default(),
        )
    }

    /// Writes the last status, deletes the object and clears up.
    pub(super) async fn remove(&mut self) {
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
    pub(super) fn delete_object(&self) -> impl Future<Output = ()> + Send + use<> {
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
