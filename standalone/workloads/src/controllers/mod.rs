//! The controllers of a cluster's workloads, over any `kube::Client`.
//!
//! Each is a pure decision (`deployment::decide`, `replicaset::decide`, `endpointslice::desired`) and a shell that
//! reads from shared mirrors, acts, and writes status. They react to events only; the one clock they
//! look at is for `progressDeadlineSeconds`, `minReadySeconds` and retries. Words and numbers of statuses, conditions
//! and events are Kubernetes', because kubectl, Flux and Flagger read them.

mod deployment;
mod deployment_shell;
mod endpointslice;
mod endpointslice_shell;
mod queue;
mod replicaset;
mod replicaset_shell;
mod rollout;
mod scheduler;
mod template;

use std::fmt::Debug;
use std::time::Duration;

use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::apps::v1::{Deployment, ReplicaSet};
use k8s_openapi::api::core::v1::{Node, Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::runtime::watcher;
use kube::{Api, Resource, ResourceExt};
use serde::de::DeserializeOwned;
use serin_kit::events::Recorder;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::Error;
use crate::mirror::Mirror;

/// How long the API server may take to deliver the first lists.
const LIST_DEADLINE: Duration = Duration::from_secs(60);

/// What the controllers share.
#[derive(Clone)]
pub(crate) struct Shared {
    pub(crate) client: kube::Client,
    pub(crate) deployments: Mirror<Deployment>,
    pub(crate) replica_sets: Mirror<ReplicaSet>,
    pub(crate) pods: Mirror<Pod>,
    pub(crate) services: Mirror<Service>,
    pub(crate) slices: Mirror<EndpointSlice>,
    pub(crate) nodes: Mirror<Node>,
}

impl Shared {
    /// Whether the API server, not only the mirror, has this very object and does not delete it. Each kind has a watch
    /// of its own, so dependents may be seen to go before their owner; whoever would replace them asks first.
    pub(crate) async fn still_has<K>(&self, object: &K) -> Result<bool, Error>
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + Debug + DeserializeOwned,
    {
        let namespace = object.namespace().unwrap_or_default();
        let name = object.name_any();
        let api: Api<K> = Api::namespaced(self.client.clone(), &namespace);
        let found = api
            .get_metadata_opt(&name)
            .await
            .map_err(|error| Error::api(format!("read {} {namespace}/{name}", K::kind(&())), error))?;
        Ok(found.is_some_and(|found| {
            found.metadata.uid == object.uid() && found.metadata.deletion_timestamp.is_none()
        }))
    }
}

/// Runs all controllers until `cancel`.
pub async fn run(client: kube::Client, cancel: CancellationToken) -> Result<(), Error> {
    // Ends the watches with this function, whatever ends it.
    let inner = cancel.child_token();
    let _ended = inner.clone().drop_guard();
    fn everything() -> watcher::Config {
        watcher::Config::default()
    }
    macro_rules! mirror {
        ($kind:ty, $what:literal) => {
            Mirror::<$kind>::start(Api::all(client.clone()), everything(), $what, inner.clone())
        };
    }
    let shared = Shared {
        deployments: mirror!(Deployment, "deployments"),
        replica_sets: mirror!(ReplicaSet, "replicasets"),
        pods: mirror!(Pod, "pods"),
        services: mirror!(Service, "services"),
        slices: mirror!(EndpointSlice, "endpointslices"),
        nodes: mirror!(Node, "nodes"),
        client: client.clone(),
    };
    shared.deployments.ready("deployments", LIST_DEADLINE).await?;
    shared.replica_sets.ready("replicasets", LIST_DEADLINE).await?;
    shared.pods.ready("pods", LIST_DEADLINE).await?;
    shared.services.ready("services", LIST_DEADLINE).await?;
    shared.slices.ready("endpointslices", LIST_DEADLINE).await?;
    shared.nodes.ready("nodes", LIST_DEADLINE).await?;
    let mut recorders = Vec::new();
    let mut recorder = |name: &str| {
        let recorder = Recorder::start(client.clone(), name, inner.clone());
        recorders.push(recorder.clone());
        recorder
    };
    let mut tasks = JoinSet::new();
    tasks.spawn(deployment_shell::run(
        shared.clone(),
        recorder("deployment-controller"),
        inner.clone(),
    ));
    tasks.spawn(replicaset_shell::run(
        shared.clone(),
        recorder("replicaset-controller"),
        inner.clone(),
    ));
    tasks.spawn(endpointslice_shell::run(
        shared.clone(),
        recorder("endpoint-slice-controller"),
        inner.clone(),
    ));
    tasks.spawn(scheduler::run(
        shared,
        recorder("default-scheduler"),
        inner.clone(),
    ));
    while tasks.join_next().await.is_some() {}
    futures::future::join_all(recorders.iter().map(Recorder::flush)).await;
    Ok(())
}
