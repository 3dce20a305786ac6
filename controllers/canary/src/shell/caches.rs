//! The watches of this controller. One per kind, shared by all Canaries.

use std::time::Duration;

use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{ConfigMap, Secret, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::Api;
use serde::de::DeserializeOwned;
use serin_crds::flagger::{Canary, MetricTemplate};
use serin_crds::istio::{DestinationRule, VirtualService};
use serin_kit::cache::Cache;
use tokio_util::sync::CancellationToken;

/// Watch caches of everything that a rollout looks at.
#[derive(Clone)]
pub struct Caches {
    pub(crate) canaries: Cache<Canary>,
    pub(crate) deployments: Cache<Deployment>,
    pub(crate) services: Cache<Service>,
    pub(crate) routes: Cache<VirtualService>,
    pub(crate) rules: Cache<DestinationRule>,
    pub(crate) config_maps: Cache<ConfigMap>,
    pub(crate) secrets: Cache<Secret>,
    pub(crate) endpoints: Cache<EndpointSlice>,
    pub(crate) templates: Cache<MetricTemplate>,
}

impl Caches {
    /// Starts all watches, of one namespace or of all.
    pub fn start(client: &kube::Client, namespace: Option<&str>, cancel: &CancellationToken) -> Self {
        Self {
            canaries: one(client, namespace, cancel),
            deployments: one(client, namespace, cancel),
            services: one(client, namespace, cancel),
            routes: one(client, namespace, cancel),
            rules: one(client, namespace, cancel),
            config_maps: one(client, namespace, cancel),
            secrets: one(client, namespace, cancel),
            endpoints: one(client, namespace, cancel),
            templates: one(client, namespace, cancel),
        }
    }

    /// Waits for the first list of every kind.
    pub async fn ready(&self, deadline: Duration) -> Result<(), serin_kit::Error> {
        tokio::try_join!(
            self.canaries.ready(deadline),
            self.deployments.ready(deadline),
            self.services.ready(deadline),
            self.routes.ready(deadline),
            self.rules.ready(deadline),
            self.config_maps.ready(deadline),
            self.secrets.ready(deadline),
            self.endpoints.ready(deadline),
            self.templates.ready(deadline),
        )?;
        Ok(())
    }
}

fn one<K>(client: &kube::Client, namespace: Option<&str>, cancel: &CancellationToken) -> Cache<K>
where
    K: kube::Resource<Scope = k8s_openapi::NamespaceResourceScope, DynamicType = ()>
        + Clone
        + std::fmt::Debug
        + DeserializeOwned
        + Send
        + Sync
        + 'static,
{
    let api = match namespace {
        Some(namespace) => Api::namespaced(client.clone(), namespace),
        None => Api::all(client.clone()),
    };
    Cache::start(api, cancel.clone())
}
