//! Whole rollouts, and controllers that die in the middle of them.

use std::sync::atomic::Ordering;

use futures::StreamExt;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{ConfigMap, Event, Pod, Service};
use kube::ResourceExt;
use kube::api::{ListParams, Patch, PatchParams, PostParams};
use kube::runtime::{WatchStreamExt, watcher};
use serde_json::json;
use serin_crds::flagger::{Canary, CanaryPhase, StepOutcome};
use serin_crds::istio::{DestinationRule, VirtualService};

use crate::cluster::{BAD, Cluster, Mesh, applied, patiently, phase_of};

fn weight(route: &VirtualService) -> i64 {
    serde_json::to_value(route).unwrap()["spec"]["http"][0]["route"][1]["weight"]
        .as_i64()
        .unwrap()
}

fn image(deployment: &Deployment) -> String {
    let spec = deployment.spec.clone().unwrap();
    spec.template.spec.unwrap().containers[0].image.clone().unwrap()
}

fn replicas(deployment: &Deployment) -> i32 {
    deployment.spec.as_ref().unwrap().replicas.unwrap()
}

/// Waits for an event with this text.
async fn event(cluster: &Cluster, wanted: &str) -> Event {
    let mut events = watcher(cluster.api::<Event>(), watcher::Config::default())
        .applied_objects()
        .boxed();
    patiently(wanted, async {
        while let Some(event) = events.next().await {
            let event = event.unwrap();
            if event.message.as_deref() == Some(wanted) {
                return event;
            }
        }
        panic!("the watch of events ended");
    })
    .await
}

/// Everything of the weights that a route ever carried, in order.
struct Weights {
    task: tokio::task::JoinHandle<()>,
    seen: tokio::sync::watch::Receiver<Vec<i64>>,
}

impl Weights {
    async fn watch(cluster: &Cluster) -> Self {
        let (sender, seen) = tokio::sync::watch::channel(Vec::new());
        let api = cluster.api::<VirtualService>();
        let task = tokio::spawn(async move {
            let mut routes = watcher(api, watcher::Config::default()).applied_objects().boxed();
            while let Some(Ok(route)) = routes.next().await {
                let weight = weight(&route);
                sender.send_if_modified(|weights| {
                    let new = weights.last() != Some(&weight);
                    if new {
                        weights.push(weight);
                    }
                    new
                });
            }
        });
        let mut weights = Self { task, seen };
        weights.until(|weights| !weights.is_empty()).await;
        weights
    }

    async fn until(&mut self, wanted: impl Fn(&[i64]) -> bool) -> Vec<i64> {
        let seen = patiently("weights", self.seen.wait_for(|weights| wanted(weights))).await;
        seen.unwrap().clone()
    }
}

impl Drop for Weights {
    fn drop(&mut self) {
        self.task.abort();
    }
}

#[tokio::test]
async fn a_good_release_is_promoted_and_a_bad_one_is_taken_back_within_its_first_window() {
    let mut cluster = Cluster::start().await;
    cluster.podinfo(json!({})).await;
    cluster.start_controller();

    let canary = cluster.phase(CanaryPhase::Initialized).await;
    let first = applied(&canary);
    let target = cluster
        .until("podinfo", "target at zero", |target: &Deployment| {
            replicas(target) == 0
        })
        .await;
    assert_eq!(image(&target), "podinfo:1");
    let primary: Deployment = cluster.api().get("podinfo-primary").await.unwrap();
    assert_eq!((image(&primary), replicas(&primary)), ("podinfo:1".to_owned(), 2));
    let apex: Service = cluster.api().get("podinfo").await.unwrap();
    assert_eq!(apex.spec.unwrap().selector.unwrap()["app"], "podinfo-primary");

    let mut weights = Weights::watch(&cluster).await;
    cluster.push("podinfo:2").await;
    let canary = cluster.phase_of_new(CanaryPhase::Succeeded, &first).await;
    assert_eq!(weights.until(|weights| weights.len() >= 4).await, [0, 20, 60, 0]);
    let primary: Deployment = cluster.api().get("podinfo-primary").await.unwrap();
    assert_eq!(image(&primary), "podinfo:2");
    cluster
        .until("podinfo", "target at zero", |target: &Deployment| {
            replicas(target) == 0
        })
        .await;
    let status = canary.status.clone().unwrap();
    let history: Vec<_> = status.history.iter().map(|step| step.weight).collect();
    assert_eq!(history, [20, 60, 0]);
    for step in &status.history[..2] {
        let (live, ended) = (step.live_at.clone().unwrap().0, step.ended_at.clone().unwrap().0);
        assert!(
            ended.duration_since(live) >= k8s_openapi::jiff::SignedDuration::from_secs(1),
            "{step:?}"
        );
        assert_eq!(step.outcome, Some(StepOutcome::Passed));
    }
    let names: Vec<_> = status.metrics.iter().map(|metric| metric.name.as_str()).collect();
    assert_eq!(
        names,
        [
            "request-success-rate",
            "request-duration",
            "errors",
            "latency-p99",
            "comparison"
        ]
    );
    assert!(
        status.metrics.iter().all(|metric| metric.samples.unwrap() > 0),
        "{:?}",
        status.metrics
    );

    cluster.load.send(BAD).unwrap();
    let second = applied(&canary);
    cluster.push("podinfo:3").await;
    let canary = cluster.phase_of_new(CanaryPhase::Failed, &second).await;
    assert_eq!(weights.until(|weights| weights.len() >= 6).await[4..], [20, 0]);
    let status = canary.status.unwrap();
    assert!(
        status.message.as_deref().unwrap().contains("canary fails 30 %"),
        "{:?}",
        status.message
    );
    let promoted = status
        .conditions
        .iter()
        .find(|condition| condition.r#type == "Promoted")
        .unwrap();
    assert_eq!(
        (promoted.status.as_str(), promoted.reason.as_str()),
        ("False", "Failed")
    );
    cluster
        .until("podinfo", "target at zero", |target: &Deployment| {
            replicas(target) == 0
        })
        .await;
    let primary: Deployment = cluster.api().get("podinfo-primary").await.unwrap();
    assert_eq!(image(&primary), "podinfo:2", "the good one goes on");
    let failed = cluster
        .until("podinfo", "the last step is live", |canary: &Canary| {
            let status = canary.status.clone().unwrap();
            status.run.is_none() && status.history.last().is_some_and(|step| step.live_at.is_some())
        })
        .await;
    assert_eq!(failed.status.unwrap().history.last().unwrap().weight, 0);
    cluster.stop_controller().await;
}

#[tokio::test]
async fn events_tell_the_story_on_the_canary() {
    let mut cluster = Cluster::start().await;
    cluster.podinfo(json!({"skipAnalysis": true})).await;
    cluster.start_controller();
    let canary = cluster.phase(CanaryPhase::Initialized).await;
    cluster.push("podinfo:2").await;
    cluster
        .phase_of_new(CanaryPhase::Succeeded, &applied(&canary))
        .await;
    let event = event(
        &cluster,
        "Promotion completed! Canary analysis was skipped for podinfo.test",
    )
    .await;
    assert_eq!(event.involved_object.name.as_deref(), Some("podinfo"));
    assert_eq!(event.involved_object.kind.as_deref(), Some("Canary"));
    assert_eq!(event.reason.as_deref(), Some("Synced"));
    cluster.stop_controller().await;
}

#[tokio::test]
async fn a_controller_killed_in_each_phase_is_followed_by_one_that_finishes_the_rollout() {
    let mut cluster = Cluster::start().await;
    cluster.podinfo(json!({})).await;
    cluster.start_controller();
    cluster.phase(CanaryPhase::Initializing).await;
    cluster.kill_controller().await;
    cluster.start_controller();
    let first = applied(&cluster.phase(CanaryPhase::Initialized).await);
    let mut weights = Weights::watch(&cluster).await;

    // Not ready: the first phase of the run lasts as long as the test wants.
    cluster.broken.send(vec!["podinfo:2".to_owned()]).unwrap();
    cluster.push("podinfo:2").await;
    cluster.phase_of_new(CanaryPhase::Progressing, &first).await;
    cluster.kill_controller().await;
    cluster.broken.send(Vec::new()).unwrap();
    cluster.start_controller();
    for weight in [20, 60] {
        weights.until(|weights| weights.last() == Some(&weight)).await;
        cluster.kill_controller().await;
        cluster.start_controller();
    }
    for phase in [CanaryPhase::Promoting, CanaryPhase::Finalising] {
        cluster
            .until("podinfo", "past the phase", |canary: &Canary| {
                phase_of(canary) == phase || phase_of(canary) == CanaryPhase::Succeeded
            })
            .await;
        cluster.kill_controller().await;
        cluster.start_controller();
    }
    let canary = cluster.phase_of_new(CanaryPhase::Succeeded, &first).await;
    assert_eq!(weights.until(|weights| weights.len() >= 4).await, [0, 20, 60, 0]);
    let status = canary.status.unwrap();
    assert_eq!(status.last_applied_spec, status.last_promoted_spec);
    // Nothing is doubled.
    let names = |list: Vec<String>| -> Vec<String> {
        let mut list = list;
        list.sort();
        list
    };
    let services = cluster
        .api::<Service>()
        .list(&ListParams::default())
        .await
        .unwrap();
    assert_eq!(
        names(services.iter().map(ResourceExt::name_any).collect()),
        ["podinfo", "podinfo-canary", "podinfo-primary"]
    );
    let rules = cluster
        .api::<DestinationRule>()
        .list(&ListParams::default())
        .await
        .unwrap();
    assert_eq!(
        names(rules.iter().map(ResourceExt::name_any).collect()),
        ["podinfo-canary", "podinfo-primary"]
    );
    cluster.stop_controller().await;
}

#[tokio::test]
async fn a_controller_that_starts_into_a_bad_release_stops_it_first() {
    let mut cluster = Cluster::start().await;
    cluster.podinfo(json!({})).await;
    cluster.start_controller();
    cluster.phase(CanaryPhase::Initialized).await;
    let mut weights = Weights::watch(&cluster).await;
    cluster.push("podinfo:2").await;
    weights.until(|weights| weights.last() == Some(&20)).await;
    cluster.kill_controller().await;
    // While nobody looks, the canary loses its pods.
    cluster.broken.send(vec!["podinfo:2".to_owned()]).unwrap();
    cluster
        .until("podinfo", "no pod is available", |target: &Deployment| {
            target
                .status
                .as_ref()
                .and_then(|status| status.available_replicas)
                .unwrap_or(0)
                == 0
        })
        .await;
    cluster.start_controller();
    cluster.phase(CanaryPhase::Failed).await;
    assert_eq!(weights.until(|weights| weights.len() >= 3).await, [0, 20, 0]);
    cluster.stop_controller().await;
}

#[tokio::test]
async fn a_pod_that_dies_under_traffic_stops_the_run_though_others_are_available() {
    let mut cluster = Cluster::start().await;
    cluster
        .podinfo(json!({"analysis": {"interval": "60m", "threshold": 1, "stepWeight": 20}}))
        .await;
    cluster.start_controller();
    cluster.phase(CanaryPhase::Initialized).await;
    let mut weights = Weights::watch(&cluster).await;
    cluster.push("podinfo:2").await;
    weights.until(|weights| weights.last() == Some(&20)).await;
    let pod: Pod = serde_json::from_value(json!({
        "metadata": {"name": "podinfo-7c-x", "labels": {"app": "podinfo"}},
        "spec": {"containers": [{"name": "app", "image": "podinfo:2"}]},
    }))
    .unwrap();
    cluster
        .api::<Pod>()
        .create(&PostParams::default(), &pod)
        .await
        .unwrap();
    let now = k8s_openapi::jiff::Timestamp::now()
        .checked_add(k8s_openapi::jiff::SignedDuration::from_secs(1))
        .unwrap();
    let finished = k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(now);
    let status = json!({"status": {"phase": "Running", "containerStatuses": [{
        "name": "app", "image": "podinfo:2", "imageID": "", "ready": false, "restartCount": 1,
        "state": {"waiting": {"reason": "CrashLoopBackOff"}},
        "lastState": {"terminated": {"exitCode": 7, "reason": "Error", "finishedAt": finished}}}]}});
    let parameters = PatchParams::default();
    cluster
        .api::<Pod>()
        .patch_status("podinfo-7c-x", &parameters, &Patch::Merge(&status))
        .await
        .unwrap();
    let canary = cluster.phase(CanaryPhase::Failed).await;
    let message = canary.status.unwrap().message.unwrap();
    assert_eq!(
        message,
        "rolled back: pod podinfo-7c-x died: container app exited with code 7"
    );
    assert_eq!(weights.until(|weights| weights.len() >= 3).await, [0, 20, 0]);
    cluster.stop_controller().await;
}

#[tokio::test]
async fn a_weight_that_is_not_live_is_not_measured_and_one_that_is_refused_is_taken_back() {
    let mut cluster = Cluster::start().await;
    cluster.podinfo(json!({})).await;
    cluster.start_controller();
    let first = applied(&cluster.phase(CanaryPhase::Initialized).await);
    cluster.mesh.send(Mesh::Stuck).unwrap();
    cluster.push("podinfo:2").await;
    let waiting = cluster
        .until("podinfo", "the weight is waited for", |canary: &Canary| {
            let status = canary.status.clone().unwrap_or_default();
            status.message.as_deref() == Some("weight 20 is live in 1 of 2 proxies")
        })
        .await;
    let status = waiting.status.unwrap();
    assert_eq!(status.run.unwrap().window_started_at, None);
    assert_eq!(status.weight_live.unwrap().live, Some(false));
    cluster.mesh.send(Mesh::Refusing).unwrap();
    let canary = cluster.phase_of_new(CanaryPhase::Failed, &first).await;
    let message = canary.status.unwrap().message.unwrap();
    assert_eq!(
        message,
        "rolled back: 1 proxies refused weight 20: no such cluster"
    );
    cluster.stop_controller().await;
}

#[tokio::test]
async fn a_config_map_alone_is_rolled_out_like_a_release() {
    let mut cluster = Cluster::start().await;
    let config = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "settings"}, "data": {"a": "1"}});
    cluster.create(config).await;
    cluster
        .podinfo(json!({"analysis": {"interval": "1s", "threshold": 1, "stepWeight": 100}}))
        .await;
    let containers =
        json!([{"name": "app", "image": "podinfo:1", "envFrom": [{"configMapRef": {"name": "settings"}}]}]);
    let patch = json!({"spec": {"template": {"spec": {"containers": containers}}}});
    cluster.patch::<Deployment>("podinfo", patch).await;
    cluster.start_controller();
    cluster.phase(CanaryPhase::Initialized).await;
    let copy: ConfigMap = cluster.api().get("settings-primary").await.unwrap();
    assert_eq!(copy.data.unwrap()["a"], "1");
    cluster
        .patch::<ConfigMap>("settings", json!({"data": {"a": "2"}}))
        .await;
    cluster.phase(CanaryPhase::Succeeded).await;
    let copy: ConfigMap = cluster.api().get("settings-primary").await.unwrap();
    assert_eq!(copy.data.unwrap()["a"], "2");
    let primary: Deployment = cluster.api().get("podinfo-primary").await.unwrap();
    let pod = primary.spec.unwrap().template.spec.unwrap();
    let source = pod.containers[0].env_from.clone().unwrap()[0]
        .config_map_ref
        .clone()
        .unwrap();
    assert_eq!(source.name, "settings-primary");
    cluster.stop_controller().await;
}

#[tokio::test]
async fn a_canary_at_rest_costs_no_request() {
    let mut cluster = Cluster::start().await;
    cluster.podinfo(json!({})).await;
    cluster.start_controller();
    cluster.phase(CanaryPhase::Initialized).await;
    cluster
        .until("podinfo", "target at zero", |target: &Deployment| {
            replicas(target) == 0
        })
        .await;
    // The last request of an initialisation.
    event(&cluster, "Initialization done! podinfo.test").await;
    let before = cluster.requests.load(Ordering::SeqCst);
    // Woken by its own objects, it has nothing to do.
    for round in 0..10 {
        let patch = json!({"metadata": {"annotations": {"round": round.to_string()}}});
        cluster
            .patch::<Deployment>("podinfo-primary", patch.clone())
            .await;
        cluster.patch::<Deployment>("podinfo", patch.clone()).await;
        cluster.patch::<Service>("podinfo-canary", patch).await;
    }
    // One request to be seen after all of that.
    cluster
        .patch::<Canary>("podinfo", json!({"spec": {"suspend": true}}))
        .await;
    cluster
        .until("podinfo", "suspension is told", |canary: &Canary| {
            canary
                .status
                .as_ref()
                .and_then(|status| status.message.as_deref())
                == Some("suspended; weights stay where they are")
        })
        .await;
    cluster.stop_controller().await;
    assert_eq!(cluster.requests.load(Ordering::SeqCst), before + 1);
}

#[tokio::test]
async fn what_is_not_honoured_is_named_and_nothing_is_touched() {
    let mut cluster = Cluster::start().await;
    cluster
        .podinfo(json!({"analysis": {"interval": "1s", "threshold": 1, "iterations": 5, "mirror": true}}))
        .await;
    cluster.start_controller();
    let canary = cluster
        .until("podinfo", "the condition", |canary: &Canary| {
            canary
                .status
                .as_ref()
                .is_some_and(|status| !status.conditions.is_empty())
        })
        .await;
    let status = canary.status.unwrap();
    let condition = &status.conditions[0];
    assert_eq!(
        (condition.r#type.as_str(), condition.status.as_str()),
        ("FullyHonoured", "False")
    );
    let message = condition.message.as_deref().unwrap();
    assert!(
        message.contains("spec.analysis.iterations is refused") && message.contains("spec.analysis.mirror")
    );
    assert_eq!(status.phase, None);
    cluster.stop_controller().await;
    let services = cluster
        .api::<Service>()
        .list(&ListParams::default())
        .await
        .unwrap();
    assert_eq!(services.items.len(), 0);
    let target: Deployment = cluster.api().get("podinfo").await.unwrap();
    assert_eq!(replicas(&target), 2);
}
