//! A cluster to which a git repository delivers podinfo with a Canary: where most stories begin.

use serde_json::Value;

use crate::api::Api;
use crate::cluster::TestCluster;
use crate::repository::Repository;

/// Namespace of everything that is delivered.
pub(crate) const NAMESPACE: &str = "shop";
/// Name of the Deployment and of its Canary.
pub(crate) const APPLICATION: &str = "podinfo";
/// Host at the gateway.
pub(crate) const HOST: &str = "podinfo.example.com";
/// Requests a second that are enough for a verdict within a step, and little enough for a busy machine.
pub(crate) const RATE: u32 = 100;

const BASE: &str = "\
apiVersion: kustomize.config.k8s.io/v1beta1
kind: Kustomization
namespace: shop
resources:
  - deployment.yaml
  - canary.yaml
";

const SYNC: &str = "
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {istio-injection: enabled}}
---
apiVersion: source.toolkit.fluxcd.io/v1
kind: GitRepository
metadata: {name: shop, namespace: shop}
spec: {interval: 1m, url: 'URL', ref: {branch: main}}
---
apiVersion: kustomize.toolkit.fluxcd.io/v1
kind: Kustomization
metadata: {name: shop, namespace: shop}
spec: {interval: 10m, retryInterval: 10m, path: ./app, prune: true, sourceRef: {kind: GitRepository, name: shop}}
";

/// The Deployment of a version of which so many percent of the answers fail.
pub(crate) fn deployment(version: &str, error_percent: u8) -> String {
    format!(
        "\
apiVersion: apps/v1
kind: Deployment
metadata:
  name: podinfo
spec:
  progressDeadlineSeconds: 60
  selector: {{matchLabels: {{app: podinfo}}}}
  template:
    metadata: {{labels: {{app: podinfo}}}}
    spec:
      containers:
        - name: podinfod
          image: serin.dev/examples/podinfo:{version}
          ports: [{{name: http, containerPort: 9898}}]
          env: [{{name: PODINFO_ERROR_PERCENT, value: \"{error_percent}\"}}]
          readinessProbe: {{httpGet: {{path: /readyz, port: http}}, periodSeconds: 1}}
"
    )
}

/// The Canary with these weights, of which each lasts `interval`.
pub(crate) fn canary(weights: &str, interval: &str) -> String {
    format!(
        "\
apiVersion: flagger.app/v1beta1
kind: Canary
metadata:
  name: podinfo
spec:
  targetRef: {{apiVersion: apps/v1, kind: Deployment, name: podinfo}}
  progressDeadlineSeconds: 60
  service:
    port: 9898
    portName: http
    targetPort: http
    gateways: [istio-system/public, mesh]
    hosts: [{HOST}]
  analysis:
    interval: {interval}
    threshold: 2
    stepWeights: {weights}
    metrics:
      - {{name: request-success-rate, thresholdRange: {{min: 90}}, interval: {interval}}}
"
    )
}

/// The cluster, its API and the repository.
pub(crate) struct Delivery {
    pub(crate) api: Api,
    pub(crate) repository: Repository,
    pub(crate) cluster: TestCluster,
}

impl Delivery {
    /// A cluster that runs, and a repository with version 1.0.0 that it does not know yet.
    pub(crate) fn prepare(weights: &str, interval: &str) -> Option<Self> {
        Self::prepare_on(TestCluster::new()?, weights, interval)
    }

    /// The same on a cluster that is not started yet.
    fn prepare_on(cluster: TestCluster, weights: &str, interval: &str) -> Option<Self> {
        cluster.up();
        let repository = Repository::create(
            &cluster.home().join("git"),
            &[
                ("app/kustomization.yaml", BASE),
                ("app/deployment.yaml", &deployment("1.0.0", 0)),
                ("app/canary.yaml", &canary(weights, interval)),
            ],
        );
        Some(Self {
            api: cluster.api(),
            repository,
            cluster,
        })
    }

    /// Lets the cluster know the repository.
    pub(crate) fn sync(&self) {
        self.api.apply(&SYNC.replace("URL", &self.repository.url()));
    }

    /// A cluster in which version 1.0.0 runs and is reached through the gateway.
    pub(crate) fn start(weights: &str, interval: &str) -> Option<Self> {
        Self::start_on(TestCluster::new()?, weights, interval)
    }

    /// The same on a cluster that is not started yet.
    pub(crate) fn start_on(cluster: TestCluster, weights: &str, interval: &str) -> Option<Self> {
        let delivery = Self::prepare_on(cluster, weights, interval)?;
        delivery.sync();
        delivery.settled("Initialized");
        delivery.reachable();
        Some(delivery)
    }

    /// Waits until the route is live in every proxy.
    pub(crate) fn reachable(&self) {
        self.api
            .until("VirtualService", NAMESPACE, APPLICATION, "be live", |route| {
                crate::api::is(route, "Live", "True")
            });
    }

    /// Pushes a version of which so many percent of the answers fail.
    pub(crate) fn release(&self, version: &str, error_percent: u8) -> String {
        self.repository
            .push(&[("app/deployment.yaml", &deployment(version, error_percent))])
    }

    /// Waits until the rollout is in a phase.
    pub(crate) fn settled(&self, phase: &str) -> Value {
        self.canary(&format!("be {phase}"), |status| status["phase"] == phase)
    }

    /// Waits until the status of the Canary satisfies the predicate; returns that status.
    pub(crate) fn canary(&self, what: &str, mut wanted: impl FnMut(&Value) -> bool) -> Value {
        let canary = self.api.until("Canary", NAMESPACE, APPLICATION, what, |canary| {
            wanted(&canary["status"])
        });
        canary["status"].clone()
    }

    /// The version that the primary is told to run.
    pub(crate) fn primary_image(&self) -> String {
        let primary = self.api.get("Deployment", NAMESPACE, "podinfo-primary");
        let image = &primary["spec"]["template"]["spec"]["containers"][0]["image"];
        image.as_str().unwrap().to_owned()
    }

    /// Pods that are not being deleted: name and how often a container of it was restarted.
    pub(crate) fn pods(&self, namespace: &str) -> Vec<(String, u64)> {
        let mut pods: Vec<(String, u64)> = self
            .api
            .list("Pod", namespace)
            .iter()
            .filter(|pod| pod["metadata"]["deletionTimestamp"].is_null())
            .map(|pod| {
                let containers = pod["status"]["containerStatuses"].as_array();
                let restarts = containers.into_iter().flatten();
                (
                    pod["metadata"]["name"].as_str().unwrap().to_owned(),
                    restarts
                        .filter_map(|container| container["restartCount"].as_u64())
                        .sum(),
                )
            })
            .collect();
        pods.sort();
        pods
    }

    /// Waits until one pod of the primary is left and none of the canary; no container of it was ever restarted.
    #[track_caller]
    pub(crate) fn only_the_primary_is_left(&self) {
        self.api.until(
            "Deployment",
            NAMESPACE,
            APPLICATION,
            "be scaled down",
            |deployment| {
                deployment["spec"]["replicas"] == 0
                    && deployment["status"]["replicas"].as_u64().unwrap_or(0) == 0
            },
        );
        self.api
            .until_all("Pod", NAMESPACE, "be the primary's one", |pods| pods.len() == 1);
        let pods = self.pods(NAMESPACE);
        assert!(
            pods[0].0.starts_with("podinfo-primary-") && pods[0].1 == 0,
            "{pods:?}"
        );
    }

    /// What the events about the Canary say, and how often each was told.
    pub(crate) fn events(&self) -> std::collections::BTreeMap<String, u64> {
        let mut told = std::collections::BTreeMap::new();
        for event in self.api.list("Event", NAMESPACE) {
            if event["involvedObject"]["kind"] == "Canary" {
                let count = event["series"]["count"]
                    .as_u64()
                    .or_else(|| event["count"].as_u64())
                    .unwrap_or(1);
                let note = event["message"].as_str().unwrap_or_default();
                *told.entry(note.to_owned()).or_default() += count.max(1);
            }
        }
        told
    }
}
