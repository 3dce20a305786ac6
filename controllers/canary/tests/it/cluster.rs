//! A cluster for one test: API server, CRDs, a stand-in for Deployments' pods, a mesh and measurements that the test turns.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use futures::StreamExt;
use futures::stream::BoxStream;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{Api, DynamicObject, Patch, PatchParams, PostParams};
use kube::core::{ApiResource, GroupVersionKind};
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Resource, ResourceExt};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use serin_analysis::sample::{Counts, Histogram, Sample};
use serin_analysis::{MetricSource, Query, SourceError};
use serin_apiserver::ApiServer;
use serin_canary::traffic::{KubeTraffic, Liveness, LivenessSource};
use serin_canary::{Context, objects};
use serin_crds::flagger::{Canary, CanaryPhase};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_stream::wrappers::{IntervalStream, WatchStream};
use tokio_util::sync::CancellationToken;
use tower::ServiceExt;

pub(crate) const NAMESPACE: &str = "test";
/// How long anything may take before the test gives up.
const PATIENCE: Duration = Duration::from_secs(40);

/// What the proxies do with a weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mesh {
    /// They take it at once.
    Live,
    /// One of them never answers.
    Stuck,
    /// One of them refuses it.
    Refusing,
}

/// What the canary answers: requests and errors of each sample.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Load {
    pub(crate) requests: u64,
    pub(crate) errors: u64,
    /// Of the primary's requests, four times as many.
    pub(crate) primary_errors: u64,
}

pub(crate) const GOOD: Load = Load {
    requests: 50,
    errors: 0,
    primary_errors: 0,
};
pub(crate) const BAD: Load = Load {
    requests: 50,
    errors: 15,
    primary_errors: 0,
};
/// What was promoted turns out to be bad.
pub(crate) const BAD_PRIMARY: Load = Load {
    requests: 50,
    errors: 0,
    primary_errors: 60,
};

pub(crate) struct Cluster {
    pub(crate) client: kube::Client,
    pub(crate) mesh: watch::Sender<Mesh>,
    pub(crate) load: watch::Sender<Load>,
    /// Images whose pods never become ready.
    pub(crate) broken: watch::Sender<Vec<String>>,
    /// Requests of the controller that are no watches.
    pub(crate) requests: Arc<AtomicUsize>,
    server: Arc<ApiServer>,
    controller: Option<(CancellationToken, JoinSet<()>)>,
    tasks: JoinSet<()>,
}

impl Cluster {
    pub(crate) async fn start() -> Self {
        let server = Arc::new(ApiServer::builder().build().await.unwrap());
        let client = serin_kit::client::over_service(server.service());
        for crd in serin_crds::definitions() {
            let api: Api<CustomResourceDefinition> = Api::all(client.clone());
            api.create(&PostParams::default(), &crd).await.unwrap();
        }
        let mut cluster = Self {
            client,
            mesh: watch::Sender::new(Mesh::Live),
            load: watch::Sender::new(GOOD),
            broken: watch::Sender::new(Vec::new()),
            requests: Arc::default(),
            server,
            controller: None,
            tasks: JoinSet::new(),
        };
        cluster
            .create(json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}}))
            .await;
        let (client, broken) = (cluster.client.clone(), cluster.broken.subscribe());
        cluster.tasks.spawn(run_pods(client, broken));
        cluster
    }

    pub(crate) fn api<K>(&self) -> Api<K>
    where
        K: Resource<DynamicType = (), Scope = k8s_openapi::NamespaceResourceScope>,
    {
        Api::namespaced(self.client.clone(), NAMESPACE)
    }

    pub(crate) async fn create(&self, object: Value) {
        let text = |key: &str| object[key].as_str().unwrap().to_owned();
        let (group, version) = match text("apiVersion").split_once('/') {
            Some((group, version)) => (group.to_owned(), version.to_owned()),
            None => (String::new(), text("apiVersion")),
        };
        let resource = ApiResource::from_gvk(&GroupVersionKind {
            group,
            version,
            kind: text("kind"),
        });
        let api: Api<DynamicObject> = if text("kind") == "Namespace" {
            Api::all_with(self.client.clone(), &resource)
        } else {
            Api::namespaced_with(self.client.clone(), NAMESPACE, &resource)
        };
        let object: DynamicObject = serde_json::from_value(object).unwrap();
        api.create(&PostParams::default(), &object).await.unwrap();
    }

    pub(crate) async fn patch<K>(&self, name: &str, patch: Value) -> K
    where
        K: Resource<DynamicType = (), Scope = k8s_openapi::NamespaceResourceScope>
            + DeserializeOwned
            + Clone
            + std::fmt::Debug,
    {
        let parameters = PatchParams::default();
        self.api::<K>()
            .patch(name, &parameters, &Patch::Merge(&patch))
            .await
            .unwrap()
    }

    /// A Deployment `podinfo`, and a Canary for it with two steps of one second.
    pub(crate) async fn podinfo(&self, spec: Value) {
        self.create(json!({
            "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "podinfo"},
            "spec": {"replicas": 2, "selector": {"matchLabels": {"app": "podinfo"}}, "template": {
                "metadata": {"labels": {"app": "podinfo"}},
                "spec": {"containers": [{"name": "app", "image": "podinfo:1", "ports": [{"containerPort": 9898}]}]}}},
        }))
        .await;
        let mut canary = json!({
            "apiVersion": "flagger.app/v1beta1", "kind": "Canary", "metadata": {"name": "podinfo"},
            "spec": {
                "targetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": "podinfo"},
                "service": {"port": 80, "targetPort": 9898},
                "analysis": {"interval": "1s", "threshold": 1, "stepWeights": [20, 60], "metrics": [
                    {"name": "request-success-rate", "thresholdRange": {"min": 99}},
                    {"name": "request-duration", "thresholdRange": {"max": 500}}]},
            },
        });
        for (key, value) in spec.as_object().unwrap() {
            canary["spec"][key] = value.clone();
        }
        self.create(canary).await;
    }

    pub(crate) async fn push(&self, image: &str) {
        let containers = json!([{"name": "app", "image": image, "ports": [{"containerPort": 9898}]}]);
        let patch = json!({"spec": {"template": {"spec": {"containers": containers}}}});
        self.patch::<Deployment>("podinfo", patch).await;
    }

    pub(crate) fn start_controller(&mut self) {
        self.start_controller_with(objects::Options::default());
    }

    pub(crate) fn start_controller_with(&mut self, options: objects::Options) {
        let requests = self.requests.clone();
        let counted = self
            .server
            .service()
            .map_request(move |request: http::Request<kube::client::Body>| {
                if !request.uri().query().unwrap_or_default().contains("watch=true") {
                    requests.fetch_add(1, Ordering::SeqCst);
                }
                request
            });
        let client = serin_kit::client::over_service(counted);
        let context = Context {
            client: client.clone(),
            namespace: None,
            traffic: Arc::new(KubeTraffic::new(client, Arc::new(Proxies(self.mesh.subscribe())))),
            metrics: Arc::new(Measured(self.load.subscribe())),
            options,
            own_metrics: serin_canary::metrics::Metrics::default(),
        };
        let cancel = CancellationToken::new();
        let mut tasks = JoinSet::new();
        let token = cancel.clone();
        tasks.spawn(async move { serin_canary::run(context, token).await.unwrap() });
        self.controller = Some((cancel, tasks));
    }

    /// Stops the controller as a crash would: nothing is finished.
    pub(crate) async fn kill_controller(&mut self) {
        if let Some((_, mut tasks)) = self.controller.take() {
            tasks.shutdown().await;
        }
    }

    pub(crate) async fn stop_controller(&mut self) {
        if let Some((cancel, mut tasks)) = self.controller.take() {
            cancel.cancel();
            patiently("the controller ends", async {
                while tasks.join_next().await.is_some() {}
            })
            .await;
        }
    }

    /// Waits until an object is as `wanted`; returns it.
    pub(crate) async fn until<K>(&self, name: &str, what: &str, wanted: impl Fn(&K) -> bool) -> K
    where
        K: Resource<DynamicType = (), Scope = k8s_openapi::NamespaceResourceScope>
            + DeserializeOwned
            + Clone
            + std::fmt::Debug
            + Send
            + 'static,
    {
        let config = watcher::Config::default().fields(&format!("metadata.name={name}"));
        let mut objects = watcher(self.api::<K>(), config).applied_objects().boxed();
        let mut last = None;
        let found = tokio::time::timeout(PATIENCE, async {
            while let Some(object) = objects.next().await {
                let object = object.unwrap();
                if wanted(&object) {
                    return object;
                }
                last = Some(object);
            }
            panic!("the watch of {name} ended");
        })
        .await;
        found.unwrap_or_else(|_| panic!("not within {PATIENCE:?}: {what}; last {last:#?}"))
    }

    pub(crate) async fn phase(&self, phase: CanaryPhase) -> Canary {
        let what = format!("phase {phase}");
        self.until("podinfo", &what, |canary: &Canary| phase_of(canary) == phase)
            .await
    }

    /// Waits for a phase of a revision other than `but`.
    pub(crate) async fn phase_of_new(&self, phase: CanaryPhase, but: &str) -> Canary {
        let what = format!("phase {phase} of a new revision");
        self.until("podinfo", &what, |canary: &Canary| {
            phase_of(canary) == phase && applied(canary) != but
        })
        .await
    }
}

pub(crate) fn phase_of(canary: &Canary) -> CanaryPhase {
    canary
        .status
        .clone()
        .unwrap_or_default()
        .phase
        .unwrap_or_default()
}

pub(crate) fn applied(canary: &Canary) -> String {
    canary
        .status
        .clone()
        .unwrap_or_default()
        .last_applied_spec
        .unwrap_or_default()
}

pub(crate) async fn patiently<T>(what: &str, future: impl Future<Output = T>) -> T {
    let done = tokio::time::timeout(PATIENCE, Box::pin(future)).await;
    done.unwrap_or_else(|_| panic!("not within {PATIENCE:?}: {what}"))
}

/// Deployments' pods: ready at once, unless their image is broken. Endpoints of the Services follow.
async fn run_pods(client: kube::Client, mut broken: watch::Receiver<Vec<String>>) {
    let api: Api<Deployment> = Api::all(client.clone());
    let mut deployments = watcher(api.clone(), watcher::Config::default())
        .applied_objects()
        .boxed();
    let mut known: std::collections::BTreeMap<String, Deployment> = std::collections::BTreeMap::new();
    loop {
        tokio::select! {
            Some(deployment) = deployments.next() => {
                let deployment = deployment.unwrap();
                let broken = broken.borrow().clone();
                settle(&client, &deployment, &broken).await;
                known.insert(deployment.name_any(), deployment);
            }
            Ok(()) = broken.changed() => {
                let broken = broken.borrow_and_update().clone();
                for deployment in known.values() {
                    settle(&client, deployment, &broken).await;
                }
            }
            else => return,
        }
    }
}

async fn settle(client: &kube::Client, deployment: &Deployment, broken: &[String]) {
    let namespace = deployment.namespace().unwrap();
    let spec = deployment.spec.clone().unwrap();
    let replicas = spec.replicas.unwrap_or(1);
    let image = spec.template.spec.as_ref().unwrap().containers[0]
        .image
        .clone()
        .unwrap_or_default();
    let available = if broken.contains(&image) { 0 } else { replicas };
    let status = json!({
        "observedGeneration": deployment.metadata.generation, "replicas": replicas, "updatedReplicas": replicas,
        "readyReplicas": available, "availableReplicas": available,
    });
    let api: Api<Deployment> = Api::namespaced(client.clone(), &namespace);
    let current = json!(deployment.status);
    let name = deployment.name_any();
    if status
        .as_object()
        .unwrap()
        .iter()
        .any(|(key, value)| current[key] != *value)
    {
        let patch = json!({"status": status});
        api.patch_status(&name, &PatchParams::default(), &Patch::Merge(&patch))
            .await
            .unwrap();
    }
    let service = if name.ends_with("-primary") {
        name.clone()
    } else {
        format!("{name}-canary")
    };
    let endpoints: Vec<Value> = (0..available)
        .map(|pod| json!({"addresses": [format!("10.0.0.{}", pod + 1)], "conditions": {"ready": true}}))
        .collect();
    let slice = json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {"name": format!("{service}-x"), "labels": {"kubernetes.io/service-name": service}},
        "addressType": "IPv4", "endpoints": endpoints, "ports": [{"name": "http", "port": 9898, "protocol": "TCP"}],
    });
    let api: Api<k8s_openapi::api::discovery::v1::EndpointSlice> =
        Api::namespaced(client.clone(), &namespace);
    let parameters = PatchParams::apply("test").force();
    api.patch(&format!("{service}-x"), &parameters, &Patch::Apply(&slice))
        .await
        .unwrap();
}

struct Proxies(watch::Receiver<Mesh>);

impl LivenessSource for Proxies {
    fn watch(&self, object: &str, generation: i64) -> BoxStream<'static, Liveness> {
        assert!(
            object.starts_with(&format!("VirtualService/{NAMESPACE}/")),
            "{object}"
        );
        WatchStream::new(self.0.clone())
            .map(move |mesh| Liveness {
                generation,
                known: true,
                needed: 2,
                sent: 2,
                acked: if mesh == Mesh::Live { 2 } else { 1 },
                refused: u32::from(mesh == Mesh::Refusing),
                reason: (mesh == Mesh::Refusing).then(|| "no such cluster".to_owned()),
            })
            .boxed()
    }
}

struct Measured(watch::Receiver<Load>);

#[async_trait]
impl MetricSource for Measured {
    fn name(&self) -> &'static str {
        "test"
    }

    async fn subscribe(&self, query: &Query) -> Result<BoxStream<'static, Sample>, SourceError> {
        assert_eq!(
            query.primary_workload,
            format!("{}-primary", query.canary_workload)
        );
        let load = self.0.clone();
        // Ten times as often as a mesh reports.
        let ticks = IntervalStream::new(tokio::time::interval(Duration::from_millis(100)));
        Ok(ticks
            .map(move |_| {
                let Load {
                    requests,
                    errors,
                    primary_errors,
                } = *load.borrow();
                let counts = |requests, errors| Counts {
                    requests,
                    errors,
                    latency: Histogram {
                        bounds_ms: vec![100.0],
                        counts: vec![requests, 0],
                    },
                    ..Counts::default()
                };
                let now_ms = k8s_openapi::jiff::Timestamp::now().as_millisecond();
                Sample {
                    at_ms: now_ms,
                    from_ms: Some(now_ms - 100),
                    canary: counts(requests, errors),
                    primary: counts(requests * 4, primary_errors),
                }
            })
            .boxed())
    }
}
