//! The watch after a promotion, through a whole cluster.

use k8s_openapi::ByteString;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use serde_json::json;
use serin_crds::flagger::{Canary, CanaryPhase};

use crate::cluster::{BAD_PRIMARY, Cluster, GOOD, applied};

fn image(deployment: &Deployment) -> String {
    let spec = deployment.spec.clone().unwrap();
    spec.template.spec.unwrap().containers[0].image.clone().unwrap()
}

fn analysis() -> serde_json::Value {
    json!({
        "interval": "1s", "threshold": 1, "stepWeights": [50],
        "metrics": [{"name": "request-success-rate", "thresholdRange": {"min": 99}}],
        "comparison": {"watch": {"duration": "10m"}},
    })
}

/// A target that reads a ConfigMap and a Secret.
async fn with_configs(cluster: &Cluster) {
    for (kind, data) in [
        ("ConfigMap", json!({"mode": "one"})),
        ("Secret", json!({"mode": "b25l"})),
    ] {
        cluster
            .create(json!({"apiVersion": "v1", "kind": kind, "metadata": {"name": "settings"}, "data": data}))
            .await;
    }
    let sources = json!([{"configMapRef": {"name": "settings"}}, {"secretRef": {"name": "settings"}}]);
    let containers = json!([{"name": "app", "image": "podinfo:1", "envFrom": sources}]);
    let patch = json!({"spec": {"template": {"spec": {"containers": containers}}}});
    cluster.patch::<Deployment>("podinfo", patch).await;
}

#[tokio::test]
async fn a_promotion_that_turns_out_bad_is_taken_back_with_its_configs_also_by_the_next_controller() {
    let mut cluster = Cluster::start().await;
    cluster.podinfo(json!({"analysis": analysis()})).await;
    with_configs(&cluster).await;
    cluster.start_controller();
    let canary = cluster.phase(CanaryPhase::Initialized).await;
    let first = applied(&canary);

    // Revision 2 comes with other settings.
    cluster
        .patch::<ConfigMap>("settings", json!({"data": {"mode": "two"}}))
        .await;
    cluster
        .patch::<Secret>("settings", json!({"data": {"mode": "dHdv"}}))
        .await;
    let containers = json!([{"name": "app", "image": "podinfo:2", "envFrom": [
        {"configMapRef": {"name": "settings"}}, {"secretRef": {"name": "settings"}}]}]);
    let patch = json!({"spec": {"template": {"spec": {"containers": containers}}}});
    cluster.patch::<Deployment>("podinfo", patch).await;
    let canary = cluster
        .until(
            "podinfo",
            "revision 2 is promoted and watched",
            |canary: &Canary| {
                let status = canary.status.clone().unwrap_or_default();
                status.phase == Some(CanaryPhase::Succeeded)
                    && applied(canary) != first
                    && status.watch.is_some()
            },
        )
        .await;
    let second = applied(&canary);
    let primary: Deployment = cluster.api().get("podinfo-primary").await.unwrap();
    assert_eq!(image(&primary), "podinfo:2");
    let kept: Secret = cluster.api().get("podinfo-primary-former").await.unwrap();
    assert_eq!(kept.metadata.owner_references.unwrap()[0].kind, "Canary");

    // Another controller goes on with the watch.
    cluster.kill_controller().await;
    cluster.load.send_replace(BAD_PRIMARY);
    cluster.start_controller();
    let canary = cluster.phase(CanaryPhase::Failed).await;
    let status = canary.status.clone().unwrap();
    assert_eq!(status.last_promoted_spec, Some(first.clone()));
    assert_eq!(status.last_applied_spec, Some(second));
    let message = status.message.unwrap();
    assert!(
        message.starts_with("rolled back after the promotion: 30 % of the last ")
            && message.contains("is normal"),
        "{message}"
    );
    assert!(status.watch.unwrap().alarmed_at.is_some());
    let primary: Deployment = cluster.api().get("podinfo-primary").await.unwrap();
    assert_eq!(image(&primary), "podinfo:1");
    let map: ConfigMap = cluster.api().get("settings-primary").await.unwrap();
    assert_eq!(map.data.unwrap()["mode"], "one");
    let secret: Secret = cluster.api().get("settings-primary").await.unwrap();
    assert_eq!(secret.data.unwrap()["mode"], ByteString(b"one".to_vec()));

    // The next revision is compared with what was brought back, and comes through.
    cluster.load.send_replace(GOOD);
    cluster.push("podinfo:3").await;
    cluster
        .until("podinfo", "revision 3 is promoted", |canary: &Canary| {
            let status = canary.status.clone().unwrap_or_default();
            status.phase == Some(CanaryPhase::Succeeded) && status.watch.is_some()
        })
        .await;
    let primary: Deployment = cluster.api().get("podinfo-primary").await.unwrap();
    assert_eq!(image(&primary), "podinfo:3");
}
