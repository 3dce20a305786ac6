//! Sidecar injection as an admission step of the API server: what a webhook does on a real cluster.

use std::collections::BTreeMap;
use std::sync::OnceLock;

use async_trait::async_trait;
use k8s_openapi::api::core::v1::{Namespace, Pod};
use kube::{Api, Client};
use serde_json::Value;
use serin_apiserver::{Admission, AdmissionRequest, Denied, Operation};
use serin_control::inject::{DISCOVERY_MOUNT, InjectConfig, admit};

use super::Cluster;

/// Adds sidecars to pods as they are created.
pub(crate) struct SidecarInjection {
    config: InjectConfig,
    /// To read the labels of namespaces; there once the API server is.
    client: OnceLock<Client>,
}

impl SidecarInjection {
    /// Injects proxies that talk to the mesh of `cluster`.
    pub(crate) fn new(cluster: &Cluster) -> Self {
        let mut config = InjectConfig::new(format!("unix:{DISCOVERY_MOUNT}/xds.sock"));
        config.discovery_directory = Some(cluster.mesh().display().to_string());
        Self {
            config,
            client: OnceLock::new(),
        }
    }

    /// Tells how to reach the API. Pods that are created before are refused.
    pub(crate) fn connect(&self, client: Client) {
        let _ = self.client.set(client);
    }

    /// The labels as stored, not as some cache has them: the pod may follow its namespace by a millisecond.
    async fn namespace_labels(&self, name: &str) -> Result<BTreeMap<String, String>, Denied> {
        let client = self
            .client
            .get()
            .ok_or_else(|| denied(503, "the mesh is still starting"))?;
        let api: Api<Namespace> = Api::all(client.clone());
        match api.get_metadata_opt(name).await {
            Ok(found) => Ok(found
                .and_then(|namespace| namespace.metadata.labels)
                .unwrap_or_default()),
            Err(error) => Err(denied(
                500,
                &format!("read the labels of namespace {name}: {error}"),
            )),
        }
    }
}

fn denied(code: u16, message: &str) -> Denied {
    Denied {
        message: format!("sidecar injection: {message}"),
        code,
    }
}

#[async_trait]
impl Admission for SidecarInjection {
    fn wants(&self, group: &str, resource: &str) -> bool {
        group.is_empty() && resource == "pods"
    }

    async fn admit(&self, request: &AdmissionRequest) -> Result<Option<Value>, Denied> {
        if request.operation != Operation::Create || !request.subresource.is_empty() {
            return Ok(None);
        }
        let labels = self.namespace_labels(&request.namespace).await?;
        // A pod that cannot be read is the API server's to refuse, with the field that is wrong.
        let Ok(pod) = serde_json::from_value::<Pod>(request.object.clone()) else {
            return Ok(None);
        };
        match admit(&self.config, &request.namespace, &labels, &pod) {
            Ok(None) => Ok(None),
            Ok(Some(injected)) => serde_json::to_value(injected)
                .map(Some)
                .map_err(|error| denied(500, &format!("encode the pod: {error}"))),
            Err(error) => Err(denied(400, &error.to_string())),
        }
    }
}
