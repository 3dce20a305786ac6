//! Rollouts as a real kube-controller-manager made them (`../shared/data/kube-api`), step by step against ours.
//!
//! At each recorded point the counts, conditions and annotations of Deployment and ReplicaSets and the number of pods
//! in each state must come to be the recorded ones. Not compared: generations of ReplicaSets (how many writes led
//! there), names and messages that hold a hash, and the reason of a rollout in progress, which the recording itself
//! calls a matter of timing.

use std::path::PathBuf;

use futures::StreamExt;
use k8s_openapi::api::apps::v1::{Deployment, ReplicaSet};
use k8s_openapi::api::core::v1::{Namespace, Pod};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::{Api, DeleteParams, Patch, PatchParams, PostParams};
use kube::runtime::watcher;
use kube::{Client, ResourceExt};
use serde_json::{Value, json};
use serin_apiserver::ApiServer;
use tokio_util::sync::CancellationToken;

use crate::cluster::{DEADLINE, create};

fn scenarios() -> Option<PathBuf> {
    let path =
        PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../../shared/data/kube-api/scenarios/controllers");
    if path.is_dir() {
        return Some(path);
    }
    eprintln!("SKIPPED: recorded rollouts: ../shared is not here");
    None
}

struct Replay {
    client: Client,
    namespace: String,
    addresses: u8,
    _server: ApiServer,
    _stop: tokio_util::sync::DropGuard,
}

/// What is compared of a recorded or a real snapshot.
fn essence(snapshot: &Value) -> Value {
    let conditions = |status: &Value| -> Vec<String> {
        let mut all: Vec<String> = status["conditions"]
            .as_array()
            .into_iter()
            .flatten()
            .map(|condition| {
                // Either of several, where the recorder saw both.
                let reason = condition["reason"]["$any_of"][0]
                    .as_str()
                    .or(condition["reason"].as_str())
                    .unwrap_or_default();
                let reason = match reason {
                    "NewReplicaSetCreated" | "FoundNewReplicaSet" | "ReplicaSetUpdated" => "(in progress)",
                    other => other,
                };
                format!(
                    "{}={} {reason}",
                    condition["type"].as_str().unwrap_or_default(),
                    condition["status"].as_str().unwrap_or_default()
                )
            })
            .collect();
        all.sort();
        all
    };
    let numbers = |status: &Value, names: &[&str]| -> Value {
        names
            .iter()
            .map(|name| (name.to_string(), json!(status[*name].as_i64().unwrap_or(0))))
            .collect::<serde_json::Map<_, _>>()
            .into()
    };
    let deployments: Vec<Value> = snapshot["deployments"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|object| {
            json!({"revision": object["annotations"]["deployment.kubernetes.io/revision"],
                   "replicas": object["spec.replicas"],
                   "observed": object["status"]["observedGeneration"] == object["generation"],
                   "status": numbers(&object["status"], &["replicas", "updatedReplicas", "readyReplicas",
                        "availableReplicas", "unavailableReplicas", "terminatingReplicas"]),
                   "conditions": conditions(&object["status"])})
        })
        .collect();
    let mut sets: Vec<Value> = snapshot["replicasets"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|object| {
            let annotations = object["annotations"].as_object().cloned().unwrap_or_default();
            json!({"image": object["image"], "annotations": annotations, "replicas": object["spec.replicas"],
                   "status": numbers(&object["status"], &["replicas", "fullyLabeledReplicas", "readyReplicas",
                        "availableReplicas", "terminatingReplicas"])})
        })
        .collect();
    sets.sort_by_key(|set| set["image"].to_string());
    let mut pods: Vec<String> = snapshot["pods"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|pod| {
            format!(
                "{} ready={} terminating={}",
                pod["phase"], pod["ready"], pod["terminating"]
            )
        })
        .collect();
    pods.sort();
    json!({"deployments": deployments, "replicasets": sets, "pods": pods})
}

impl Replay {
    async fn start(namespace: &str) -> Self {
        let server = ApiServer::builder().build().await.unwrap();
        let client = serin_kit::client::over_service(server.service());
        let namespaces: Api<Namespace> = Api::all(client.clone());
        create(&namespaces, json!({"metadata": {"name": namespace}})).await;
        let cancel = CancellationToken::new();
        let (controllers, token) = (client.clone(), cancel.clone());
        tokio::spawn(async move { serin_workloads::controllers::run(controllers, token).await });
        Self {
            client,
            namespace: namespace.to_owned(),
            addresses: 0,
            _server: server,
            _stop: cancel.drop_guard(),
        }
    }

    fn pods(&self) -> Api<Pod> {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    async fn snapshot(&self) -> Value {
        let deployments: Api<Deployment> = Api::namespaced(self.client.clone(), &self.namespace);
        let sets: Api<ReplicaSet> = Api::namespaced(self.client.clone(), &self.namespace);
        let ours = |annotations: &std::collections::BTreeMap<String, String>| -> Value {
            annotations
                .iter()
                .filter(|(key, _)| key.starts_with("deployment.kubernetes.io/"))
                .map(|(k, v)| (k.clone(), json!(v)))
                .collect::<serde_json::Map<_, _>>()
                .into()
        };
        let deployments: Vec<Value> = deployments
            .list(&Default::default())
            .await
            .unwrap()
            .items
            .iter()
            .map(|d| {
                json!({"generation": d.metadata.generation, "annotations": ours(d.annotations()),
                            "spec.replicas": d.spec.as_ref().unwrap().replicas, "status": d.status})
            })
            .collect();
        let sets: Vec<Value> = sets
            .list(&Default::default())
            .await
            .unwrap()
            .items
            .iter()
            .map(|s| {
                let spec = s.spec.as_ref().unwrap();
                let image = spec.template.as_ref().unwrap().spec.as_ref().unwrap().containers[0].image.clone();
                json!({"annotations": ours(s.annotations()), "spec.replicas": spec.replicas, "image": image, "status": s.status})
            })
            .collect();
        let pods: Vec<Value> = self
            .pods()
            .list(&Default::default())
            .await
            .unwrap()
            .items
            .iter()
            .map(|p| {
                json!({"phase": p.status.as_ref().unwrap().phase, "ready": is_ready(p),
                            "terminating": p.metadata.deletion_timestamp.is_some()})
            })
            .collect();
        json!({"deployments": deployments, "replicasets": sets, "pods": pods})
    }

    /// Waits until the snapshot is the recorded one; every write may make it so.
    async fn comes_to(&self, name: &str, recorded: &Value) {
        let wanted = essence(recorded);
        let deployments = watcher::watcher(
            Api::<Deployment>::namespaced(self.client.clone(), &self.namespace),
            watcher::Config::default(),
        );
        let sets = watcher::watcher(
            Api::<ReplicaSet>::namespaced(self.client.clone(), &self.namespace),
            watcher::Config::default(),
        );
        let pods = watcher::watcher(self.pods(), watcher::Config::default());
        let mut changes = futures::stream::select(
            deployments.map(|_| ()).boxed(),
            futures::stream::select(sets.map(|_| ()).boxed(), pods.map(|_| ()).boxed()),
        );
        let waiting = async {
            loop {
                if essence(&self.snapshot().await) == wanted {
                    return;
                }
                changes.next().await;
            }
        };
        if tokio::time::timeout(DEADLINE, waiting).await.is_err() {
            let found = essence(&self.snapshot().await);
            panic!("{name}\nrecorded {wanted:#}\nours     {found:#}");
        }
    }

    /// The recorder's kubelet: removes the oldest terminating pod, or makes the oldest unready one ready.
    async fn kubelet(&mut self) -> bool {
        let api = self.pods();
        let mut pods = api.list(&Default::default()).await.unwrap().items;
        pods.sort_by_key(|pod| {
            (
                pod.creation_timestamp().map(|time| time.0),
                pod.resource_version().and_then(|v| v.parse::<u64>().ok()),
            )
        });
        if let Some(pod) = pods.iter().find(|pod| pod.metadata.deletion_timestamp.is_some()) {
            let now = DeleteParams {
                grace_period_seconds: Some(0),
                ..DeleteParams::default()
            };
            api.delete(&pod.name_any(), &now).await.unwrap();
            return true;
        }
        let Some(pod) = pods.iter().find(|pod| !is_ready(pod)) else {
            return false;
        };
        let name = pod.name_any();
        if pod.spec.as_ref().unwrap().node_name.is_none() {
            let binding = json!({"apiVersion": "v1", "kind": "Binding", "metadata": {"name": name},
                                 "target": {"apiVersion": "v1", "kind": "Node", "name": "node-1"}});
            let _: Value = api
                .create_subresource("binding", &name, &PostParams::default(), &binding)
                .await
                .unwrap();
        }
        self.addresses += 1;
        let now = jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
        let status = json!({"status": {"phase": "Running", "podIP": format!("10.1.0.{}", self.addresses),
            "conditions": [{"type": "Ready", "status": "True", "lastTransitionTime": now}]}});
        api.patch_status(&name, &PatchParams::default(), &Patch::Strategic(&status))
            .await
            .unwrap();
        true
    }

    async fn request(&self, request: &Value) {
        let query: Vec<String> = request["query"]
            .as_object()
            .into_iter()
            .flatten()
            .map(|(name, value)| format!("{name}={}", value.as_str().unwrap()))
            .collect();
        let path = format!("{}?{}", request["path"].as_str().unwrap(), query.join("&"));
        let body = match &request["body"] {
            Value::Null => Vec::new(),
            body => serde_json::to_vec(body).unwrap(),
        };
        let kind = request["headers"]["Content-Type"]
            .as_str()
            .unwrap_or("application/json");
        let request = http::Request::builder()
            .method(request["method"].as_str().unwrap())
            .uri(path)
            .header("Content-Type", kind)
            .body(body)
            .unwrap();
        let answer: Value = self.client.request(request).await.unwrap();
        assert!(answer["kind"].is_string());
    }
}

fn is_ready(pod: &Pod) -> bool {
    pod.status
        .iter()
        .flat_map(|status| status.conditions.iter().flatten())
        .any(|condition| condition.type_ == "Ready" && condition.status == "True")
}

async fn replay(name: &str) {
    let Some(directory) = scenarios() else { return };
    let text = std::fs::read(directory.join(format!("{name}.json"))).unwrap();
    let scenario: Value = serde_json::from_slice(&text).unwrap();
    let mut replay = Replay::start(scenario["namespace"].as_str().unwrap()).await;
    let mut compared = 0;
    for step in scenario["steps"].as_array().unwrap() {
        if !step["request"].is_null() {
            replay.request(&step["request"]).await;
            continue;
        }
        let trace = &step["trace"];
        let at = trace["at"].as_str().unwrap_or_default();
        if trace["deployments"].is_null() && trace["replicasets"].is_null() {
            continue;
        }
        if at.contains("pod ready") || at.contains("pod removed") {
            assert!(replay.kubelet().await, "{at}: nothing for the kubelet to do");
        } else if at.ends_with(": end") {
            // All the turns in between were not recorded: after each the controllers must have come to rest, which
            // shows in that nothing is left to do when the recorded state is reached.
            finish(&mut replay, &essence(trace)).await;
        }
        replay.comes_to(&format!("{name}: {at}"), trace).await;
        compared += 1;
    }
    assert!(compared > 0);
}

/// Takes turns until the recorded end is reached.
async fn finish(replay: &mut Replay, wanted: &Value) {
    let turns = async {
        while essence(&replay.snapshot().await) != *wanted {
            if !replay.kubelet().await {
                // The controllers are about to create or delete something.
                tokio::task::yield_now().await;
            }
        }
    };
    let reached = tokio::time::timeout(DEADLINE, turns).await.is_ok();
    assert!(
        reached,
        "recorded end {wanted:#}\nours {:#}",
        essence(&replay.snapshot().await)
    );
}

/// What is recorded as `delete/deployment-orphan`: who owns the one ReplicaSet at each point, and that its pod stays.
#[tokio::test(flavor = "multi_thread")]
async fn a_replica_set_that_its_deployment_left_behind_is_taken_by_the_next_one_with_its_pod() {
    let mut replay = Replay::start("orphan").await;
    let deployments: Api<Deployment> = Api::namespaced(replay.client.clone(), "orphan");
    let sets: Api<ReplicaSet> = Api::namespaced(replay.client.clone(), "orphan");
    let deployment = json!({"metadata": {"name": "d"}, "spec": {"selector": {"matchLabels": {"app": "w"}},
        "template": {"metadata": {"labels": {"app": "w"}}, "spec": {"containers": [{"name": "c", "image": "i"}]}}}});
    let first = create(&deployments, deployment.clone()).await;
    let (set, pod) = settled(&mut replay, &sets, first.uid()).await;

    let orphaned = DeleteParams {
        propagation_policy: Some(kube::api::PropagationPolicy::Orphan),
        ..DeleteParams::default()
    };
    deployments.delete("d", &orphaned).await.unwrap();
    assert_eq!(
        settled(&mut replay, &sets, None).await,
        (set.clone(), pod.clone())
    );
    let gone = async { while deployments.get_opt("d").await.unwrap().is_some() {} };
    tokio::time::timeout(DEADLINE, gone).await.expect("it goes");

    let second = create(&deployments, deployment).await;
    assert_ne!(second.uid(), first.uid());
    assert_eq!(settled(&mut replay, &sets, second.uid()).await, (set, pod));
}

/// The uids of the only ReplicaSet and its only pod, once that is ready and the set has this owner.
async fn settled(replay: &mut Replay, sets: &Api<ReplicaSet>, owner: Option<String>) -> (String, String) {
    let looking = async {
        loop {
            let all = sets.list(&Default::default()).await.unwrap().items;
            let pods = replay.pods().list(&Default::default()).await.unwrap().items;
            if let ([set], [pod]) = (all.as_slice(), pods.as_slice())
                && set.owner_references().first().map(|o| o.uid.clone()) == owner
                && is_ready(pod)
            {
                return (set.uid().unwrap(), pod.uid().unwrap());
            }
            if !replay.kubelet().await {
                tokio::task::yield_now().await;
            }
        }
    };
    tokio::time::timeout(DEADLINE, looking).await.expect("it settles")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_recorded_creation_comes_to_the_same_statuses() {
    replay("deployment-create").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn recorded_rolling_updates_come_to_the_same_statuses() {
    for name in [
        "rolling-default-25",
        "rolling-surge0-unavail1",
        "rolling-surge100",
        "rolling-surge2-unavail1",
    ] {
        replay(name).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn recorded_scaling_in_the_middle_of_a_rollout_comes_to_the_same_sizes() {
    replay("proportional-scaling").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn recorded_adoption_and_release_of_pods_come_to_the_same_statuses() {
    replay("selector-overlap-adoption").await;
}

/// What is compared of EndpointSlices.
fn slices(all: &Value) -> Vec<Value> {
    let mut all: Vec<Value> = all
        .as_array()
        .into_iter()
        .flatten()
        .map(|slice| {
            let list = |field: &str| slice[field].as_array().cloned().unwrap_or_default();
            json!({"service": slice["service"], "ports": list("ports"), "endpoints": list("endpoints")})
        })
        .collect();
    all.sort_by_key(|slice| slice["service"].to_string());
    all
}

async fn own_slices(api: &Api<EndpointSlice>) -> Value {
    let list = api.list(&Default::default()).await.unwrap().items;
    list.iter()
        .map(|slice| {
            let endpoints: Vec<Value> = slice
                .endpoints
                .iter()
                .map(|endpoint| json!({"conditions": endpoint.conditions, "address": endpoint.addresses, "nodeName": endpoint.node_name}))
                .collect();
            json!({"service": slice.labels()["kubernetes.io/service-name"], "ports": slice.ports, "endpoints": endpoints})
        })
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn recorded_endpoints_have_the_same_conditions_through_a_pods_life() {
    let Some(directory) = scenarios() else { return };
    let text = std::fs::read(directory.join("endpointslice-conditions.json")).unwrap();
    let scenario: Value = serde_json::from_slice(&text).unwrap();
    let namespace = scenario["namespace"].as_str().unwrap();
    let mut replay = Replay::start(namespace).await;
    let api: Api<EndpointSlice> = Api::namespaced(replay.client.clone(), namespace);
    let mut compared = 0;
    for step in scenario["steps"].as_array().unwrap() {
        let trace = &step["trace"];
        if trace.is_null() {
            replay.request(&step["request"]).await;
            continue;
        }
        let at = trace["at"].as_str().unwrap();
        if at == "ready" {
            assert!(replay.kubelet().await, "there is a pod");
        }
        let wanted = slices(&trace["endpointslices"]);
        let mut changes = watcher::watcher(api.clone(), watcher::Config::default()).boxed();
        let waiting = async {
            while slices(&own_slices(&api).await) != wanted {
                changes.next().await;
            }
        };
        if tokio::time::timeout(DEADLINE, waiting).await.is_err() {
            let found = slices(&own_slices(&api).await);
            panic!("{at}\nrecorded {:#}\nours     {:#}", json!(wanted), json!(found));
        }
        compared += 1;
    }
    assert_eq!(compared, 7);
}

#[tokio::test(flavor = "multi_thread")]
async fn recorded_history_is_cut_at_the_same_revision() {
    replay("revision-history-limit").await;
}
