//! Objects that were there before the Canary: taken over, and given back when it is deleted.

use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::Service;
use kube::ResourceExt;
use kube::api::DeleteParams;
use serde_json::{Value, json};
use serin_crds::flagger::{Canary, CanaryPhase};
use serin_crds::istio::VirtualService;

use crate::cluster::{Cluster, patiently};

const OPT_OUT: &str = "kustomize.toolkit.fluxcd.io/reconcile";

fn selector(service: &Service) -> Value {
    json!(service.spec.as_ref().unwrap().selector)
}

#[tokio::test]
async fn a_service_and_a_route_of_the_user_are_taken_over_and_given_back() {
    let mut cluster = Cluster::start().await;
    let ports = json!([{"name": "web", "port": 80, "targetPort": 9898}]);
    cluster
        .create(json!({
            "apiVersion": "v1", "kind": "Service", "metadata": {"name": "podinfo", "labels": {"mine": "1"}},
            "spec": {"selector": {"app": "podinfo", "tier": "web"}, "ports": ports},
        }))
        .await;
    let route = json!({
        "hosts": ["app.example.com"], "gateways": ["istio-system/public"],
        "http": [{"name": "mine", "route": [{"destination": {"host": "podinfo"}}],
                  "fault": {"abort": {"httpStatus": 503, "percentage": {"value": 1}}}}],
    });
    cluster
        .create(json!({
            "apiVersion": "networking.istio.io/v1", "kind": "VirtualService",
            "metadata": {"name": "podinfo", "labels": {"mine": "1"}}, "spec": route,
        }))
        .await;
    cluster.podinfo(json!({"revertOnDeletion": true})).await;
    cluster.start_controller();
    let canary = cluster.phase(CanaryPhase::Initialized).await;
    assert_eq!(canary.finalizers(), ["finalizer.flagger.app"]);

    let service: Service = cluster.api().get("podinfo").await.unwrap();
    assert_eq!(selector(&service)["app"], "podinfo-primary");
    assert_eq!(service.labels()["mine"], "1");
    assert_eq!(service.annotations()[OPT_OUT], "disabled");
    assert_eq!(service.owner_references().len(), 0);
    let taken: VirtualService = cluster.api().get("podinfo").await.unwrap();
    assert_eq!(taken.labels()["mine"], "1");
    assert_eq!(taken.owner_references().len(), 0);
    assert_eq!(json!(taken.spec)["hosts"], json!(["podinfo"]));

    cluster
        .api::<Canary>()
        .delete("podinfo", &DeleteParams::default())
        .await
        .unwrap();
    let uid = canary.uid().unwrap();
    let gone = kube::runtime::wait::await_condition(
        cluster.api::<Canary>(),
        "podinfo",
        kube::runtime::conditions::is_deleted(&uid),
    );
    patiently("the Canary is gone", Box::pin(gone)).await.unwrap();
    let target: Deployment = cluster.api().get("podinfo").await.unwrap();
    assert_eq!(target.spec.unwrap().replicas, Some(2));
    let service: Service = cluster.api().get("podinfo").await.unwrap();
    assert_eq!(selector(&service), json!({"app": "podinfo", "tier": "web"}));
    assert_eq!(
        service.spec.as_ref().unwrap().ports.clone().unwrap()[0]
            .name
            .as_deref(),
        Some("web")
    );
    assert!(!service.annotations().contains_key(OPT_OUT));
    let given_back: VirtualService = cluster.api().get("podinfo").await.unwrap();
    assert_eq!(json!(given_back.spec), route, "exactly as it was");
    assert!(!given_back.annotations().contains_key(OPT_OUT));
    cluster.stop_controller().await;
}

#[tokio::test]
async fn a_route_that_somebody_deletes_or_edits_comes_back_with_its_weight() {
    let mut cluster = Cluster::start().await;
    cluster
        .podinfo(json!({"analysis": {"interval": "60m", "threshold": 1, "stepWeight": 20}}))
        .await;
    cluster.start_controller();
    cluster.phase(CanaryPhase::Initialized).await;
    cluster.push("podinfo:2").await;
    let split = |route: &VirtualService| json!(route.spec)["http"][0]["route"][1]["weight"] == 20;
    let route = cluster.until("podinfo", "weight 20", split).await;
    cluster
        .api::<VirtualService>()
        .delete("podinfo", &DeleteParams::default())
        .await
        .unwrap();
    let again = cluster
        .until("podinfo", "it comes back", |new: &VirtualService| {
            new.uid() != route.uid() && split(new)
        })
        .await;
    let http = json!([{"route": [{"destination": {"host": "podinfo-primary"}, "weight": 100}]}]);
    let edited: VirtualService = cluster.patch("podinfo", json!({"spec": {"http": http}})).await;
    assert_eq!(edited.uid(), again.uid());
    cluster
        .until("podinfo", "it is repaired", |new: &VirtualService| {
            new.metadata.generation > edited.metadata.generation && split(new)
        })
        .await;
    let canary: Canary = cluster.api().get("podinfo").await.unwrap();
    assert_eq!(canary.status.unwrap().phase, Some(CanaryPhase::Progressing));
    cluster.stop_controller().await;
}
