//! Providers that ask the cluster: Keptn, Jobs, external metrics.

use futures::StreamExt;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::Namespace;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{Api, ApiResource, DynamicObject, ListParams, Patch, PatchParams, PostParams};
use kube::core::GroupVersionKind;
use kube::runtime::wait::{await_condition, conditions::is_crd_established};
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Resource, ResourceExt};
use serde_json::{Value, json};
use serin_apiserver::ApiServer;
use serin_providers::{Connector, Environment, Error, Limits};
use tokio::task::JoinSet;

use crate::{ask, config};

/// The server is to be kept: what makes definitions servable ends with it.
async fn cluster() -> (ApiServer, kube::Client, Connector) {
    let server = ApiServer::builder().build().await.unwrap();
    let client = serin_kit::client::over_service(server.service());
    let namespace: Namespace = serde_json::from_value(json!({"metadata": {"name": "test"}})).unwrap();
    Api::all(client.clone())
        .create(&PostParams::default(), &namespace)
        .await
        .unwrap();
    let connector = Connector::new(Limits::default(), Environment::default(), Some(client.clone())).unwrap();
    (server, client, connector)
}

fn keptn_resource(kind: &str, plural: &str) -> ApiResource {
    ApiResource::from_gvk_with_plural(
        &GroupVersionKind::gvk("metrics.keptn.sh", "v1beta1", kind),
        plural,
    )
}

async fn define(client: &kube::Client, kind: &str, plural: &str) {
    let crd: CustomResourceDefinition = serde_json::from_value(json!({
        "metadata": {"name": format!("{plural}.metrics.keptn.sh")},
        "spec": {"group": "metrics.keptn.sh", "scope": "Namespaced", "names": {"kind": kind, "plural": plural,
            "singular": kind.to_lowercase(), "listKind": format!("{kind}List")},
            "versions": [{"name": "v1beta1", "served": true, "storage": true, "subresources": {"status": {}},
            "schema": {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": true}}}]},
    }))
    .unwrap();
    let api: Api<CustomResourceDefinition> = Api::all(client.clone());
    api.create(&PostParams::default(), &crd).await.unwrap();
    let name = crd.name_any();
    let established = await_condition(api, &name, is_crd_established());
    let patience = std::time::Duration::from_secs(30);
    tokio::time::timeout(patience, established)
        .await
        .expect("an established CRD")
        .unwrap();
}

#[tokio::test]
async fn a_keptn_metric_is_read_from_its_status() {
    let (_server, client, connector) = cluster().await;
    define(&client, "KeptnMetric", "keptnmetrics").await;
    let api: Api<DynamicObject> =
        Api::namespaced_with(client, "test", &keptn_resource("KeptnMetric", "keptnmetrics"));
    let object = json!({"apiVersion": "metrics.keptn.sh/v1beta1", "kind": "KeptnMetric", "metadata": {"name": "errors"}});
    api.create(&PostParams::default(), &serde_json::from_value(object).unwrap())
        .await
        .unwrap();
    let config = config("keptn", "", &[]);
    let query = "KeptnMetric/test/errors";
    let error = connector.query(&config, &ask(query)).await.unwrap_err();
    assert!(matches!(error, Error::Answer { .. }), "{error}");
    let status = Patch::Merge(json!({"status": {"value": "0.75"}}));
    api.patch_status("errors", &PatchParams::default(), &status)
        .await
        .unwrap();
    assert_eq!(connector.query(&config, &ask(query)).await.unwrap(), 0.75);
    let error = connector
        .query(&config, &ask("keptnmetric/test/none"))
        .await
        .unwrap_err();
    assert!(matches!(error, Error::Status { status: 404, .. }), "{error}");
}

/// Gives every object that appears a status, as its controller would, and returns what it saw.
fn controller<K>(api: Api<K>, status: Value) -> JoinSet<Value>
where
    K: Resource
        + Clone
        + std::fmt::Debug
        + serde::de::DeserializeOwned
        + serde::Serialize
        + Send
        + Sync
        + 'static,
    K::DynamicType: Default,
{
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        let mut objects = Box::pin(watcher(api.clone(), watcher::Config::default()).applied_objects());
        loop {
            let Some(Ok(object)) = objects.next().await else {
                continue;
            };
            let seen = serde_json::to_value(&object).unwrap();
            let patch = Patch::Merge(json!({"status": status}));
            api.patch_status(&object.name_any(), &PatchParams::default(), &patch)
                .await
                .unwrap();
            return seen;
        }
    });
    tasks
}

#[tokio::test]
async fn a_keptn_analysis_is_created_awaited_and_deleted() {
    let (_server, client, connector) = cluster().await;
    define(&client, "Analysis", "analyses").await;
    let api: Api<DynamicObject> =
        Api::namespaced_with(client, "test", &keptn_resource("Analysis", "analyses"));
    for (pass, expected) in [(true, 1.0), (false, 0.0)] {
        let watched = api.clone();
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let mut objects =
                Box::pin(watcher(watched.clone(), watcher::Config::default()).applied_objects());
            loop {
                let Some(Ok(object)) = objects.next().await else {
                    continue;
                };
                let patch = Patch::Merge(json!({"status": {"state": "Completed", "pass": pass}}));
                watched
                    .patch_status(&object.name_any(), &PatchParams::default(), &patch)
                    .await
                    .unwrap();
                return object.data["spec"].clone();
            }
        });
        let query = ask("analysis/test/my-definition/5m/app=podinfo;tier=a");
        assert_eq!(
            connector.query(&config("keptn", "", &[]), &query).await.unwrap(),
            expected
        );
        assert_eq!(
            tasks.join_next().await.unwrap().unwrap(),
            json!({"analysisDefinition": {"name": "my-definition"}, "timeframe": {"recent": "5m"},
                "args": {"app": "podinfo", "tier": "a"}})
        );
        assert!(api.list(&ListParams::default()).await.unwrap().items.is_empty());
    }
}

const JOB: &str = "
apiVersion: batch/v1
kind: Job
metadata: {name: smoke}
spec:
  backoffLimit: 0
  template:
    spec:
      restartPolicy: Never
      containers:
      - {name: smoke, image: smoke:1, args: [\"--service\", podinfo]}
";

#[tokio::test]
async fn a_job_that_completes_is_one_and_a_job_that_fails_is_zero() {
    let (_server, client, connector) = cluster().await;
    let api: Api<Job> = Api::namespaced(client, "test");
    for (condition, expected) in [("Complete", 1.0), ("Failed", 0.0)] {
        let status = json!({"conditions": [{"type": condition, "status": "True"}]});
        let mut tasks = controller(api.clone(), status);
        assert_eq!(
            connector.query(&config("job", "", &[]), &ask(JOB)).await.unwrap(),
            expected
        );
        let seen = tasks.join_next().await.unwrap().unwrap();
        assert_eq!(seen["spec"]["activeDeadlineSeconds"], 600);
        assert_eq!(
            seen["metadata"]["labels"]["app.kubernetes.io/managed-by"],
            "serin"
        );
        let left = api.list(&ListParams::default()).await.unwrap().items;
        let live = left
            .iter()
            .filter(|job| job.metadata.deletion_timestamp.is_none());
        assert_eq!(live.count(), 0);
    }
}

#[tokio::test]
async fn external_metrics_of_the_cluster_that_has_none_are_an_error_and_not_empty() {
    let (_server, _client, connector) = cluster().await;
    let error = connector
        .query(
            &config("externalmetrics", "", &[]),
            &ask("ns/errors?labelSelector=a%3Db"),
        )
        .await
        .unwrap_err();
    assert!(matches!(error, Error::Status { status: 404, .. }), "{error}");
}
