//! kube-rs as the client, in process.

use std::time::Duration;

use futures::{StreamExt as _, TryStreamExt as _};
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Pod, Service};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{
    Api, DeleteParams, DynamicObject, ListParams, Patch, PatchParams, PostParams, WatchEvent, WatchParams,
};
use kube::core::{ApiResource, GroupVersionKind};
use kube::runtime::{WatchStreamExt as _, watcher};
use kube::{Client, ResourceExt as _};
use serde_json::json;
use serin_apiserver::ApiServer;

/// Everything that waits for an event of the server waits at most this long.
pub(crate) const DEADLINE: Duration = Duration::from_secs(20);

pub(crate) async fn server() -> (ApiServer, Client) {
    let server = ApiServer::builder().build().await.expect("the server starts");
    let client = Client::new(server.service(), "default");
    (server, client)
}

pub(crate) fn config_map(name: &str, data: serde_json::Value) -> ConfigMap {
    serde_json::from_value(json!({"metadata": {"name": name}, "data": data})).expect("a ConfigMap")
}

#[tokio::test]
async fn objects_are_created_read_replaced_patched_and_deleted() {
    let (server, client) = server().await;
    let api: Api<ConfigMap> = Api::default_namespaced(client);
    let created = api
        .create(&PostParams::default(), &config_map("c", json!({"a": "1"})))
        .await
        .expect("created");
    assert!(created.uid().is_some());
    assert!(created.resource_version().is_some());
    let error = api
        .create(&PostParams::default(), &config_map("c", json!({})))
        .await
        .expect_err("it exists");
    assert!(
        matches!(&error, kube::Error::Api(s) if s.is_already_exists()),
        "{error:?}"
    );
    let mut changed = created.clone();
    changed.data = Some([("a".to_owned(), "2".to_owned())].into());
    let replaced = api
        .replace("c", &PostParams::default(), &changed)
        .await
        .expect("replaced");
    let error = api
        .replace("c", &PostParams::default(), &changed)
        .await
        .expect_err("the version is stale");
    assert!(
        matches!(&error, kube::Error::Api(s) if s.code == 409),
        "{error:?}"
    );
    let patched = api
        .patch(
            "c",
            &PatchParams::default(),
            &Patch::Merge(json!({"data": {"b": "3"}})),
        )
        .await
        .expect("patched");
    assert_ne!(patched.resource_version(), replaced.resource_version());
    let same = api
        .patch(
            "c",
            &PatchParams::default(),
            &Patch::Merge(json!({"data": {"b": "3"}})),
        )
        .await
        .expect("patched again");
    assert_eq!(
        same.resource_version(),
        patched.resource_version(),
        "a write that changes nothing keeps the version"
    );
    api.delete("c", &DeleteParams::default()).await.expect("deleted");
    assert!(api.get_opt("c").await.expect("answered").is_none());
    server.shutdown().await;
}

#[tokio::test]
async fn a_watcher_sees_changes_in_order_by_list_and_watch_and_by_streaming_list() {
    for strategy in [
        watcher::Config::default(),
        watcher::Config::default().streaming_lists(),
    ] {
        let (server, client) = server().await;
        let api: Api<ConfigMap> = Api::default_namespaced(client);
        api.create(&PostParams::default(), &config_map("before", json!({})))
            .await
            .expect("created");
        let mut events = std::pin::pin!(watcher(api.clone(), strategy).applied_objects());
        let next = tokio::time::timeout(DEADLINE, events.try_next())
            .await
            .expect("in time")
            .expect("no error");
        assert_eq!(next.expect("an object").name_any(), "before");
        for i in 0..5 {
            api.create(&PostParams::default(), &config_map(&format!("n{i}"), json!({})))
                .await
                .expect("created");
        }
        for i in 0..5 {
            let next = tokio::time::timeout(DEADLINE, events.try_next())
                .await
                .expect("in time")
                .expect("no error");
            assert_eq!(next.expect("an object").name_any(), format!("n{i}"));
        }
        server.shutdown().await;
    }
}

#[tokio::test]
async fn an_object_that_leaves_a_selector_is_seen_as_deleted_and_one_that_enters_as_added() {
    let (server, client) = server().await;
    let api: Api<ConfigMap> = Api::default_namespaced(client);
    let list = api.list(&ListParams::default()).await.expect("listed");
    let rv = list.metadata.resource_version.expect("a version");
    let watch = api
        .watch(&WatchParams::default().labels("s=1").timeout(10), &rv)
        .await
        .expect("watching");
    let mut watch = watch.boxed();
    api.create(&PostParams::default(), &config_map("c", json!({})))
        .await
        .expect("created");
    for labels in [json!({"s": "1"}), json!({"s": null})] {
        api.patch(
            "c",
            &PatchParams::default(),
            &Patch::Merge(json!({"metadata": {"labels": labels}})),
        )
        .await
        .expect("patched");
    }
    let mut seen = Vec::new();
    while seen.len() < 2 {
        match tokio::time::timeout(DEADLINE, watch.try_next())
            .await
            .expect("in time")
            .expect("no error")
        {
            Some(WatchEvent::Added(o)) => seen.push(format!("added {}", o.name_any())),
            Some(WatchEvent::Deleted(o)) => seen.push(format!("deleted {}", o.name_any())),
            Some(WatchEvent::Bookmark(_)) => {}
            other => panic!("unexpected {other:?}"),
        }
    }
    assert_eq!(seen, ["added c", "deleted c"]);
    server.shutdown().await;
}

#[tokio::test]
async fn built_in_kinds_look_as_kubernetes_would_have_defaulted_them() {
    let (server, client) = server().await;
    let deployments: Api<Deployment> = Api::default_namespaced(client.clone());
    let wanted: Deployment = serde_json::from_value(json!({"metadata": {"name": "d"}, "spec": {"selector": {"matchLabels": {"a": "b"}},
        "template": {"metadata": {"labels": {"a": "b"}}, "spec": {"containers": [{"name": "c", "image": "nginx"}]}}}}))
    .expect("a Deployment");
    let created = deployments
        .create(&PostParams::default(), &wanted)
        .await
        .expect("created");
    let spec = created.spec.expect("a spec");
    assert_eq!(spec.replicas, Some(1));
    assert_eq!(
        spec.template.spec.expect("a pod spec").containers[0]
            .image_pull_policy
            .as_deref(),
        Some("Always")
    );
    assert_eq!(created.metadata.generation, Some(1));
    let services: Api<Service> = Api::default_namespaced(client);
    let wanted: Service = serde_json::from_value(
        json!({"metadata": {"name": "s"}, "spec": {"type": "NodePort", "ports": [{"port": 80}]}}),
    )
    .expect("a Service");
    let created = services
        .create(&PostParams::default(), &wanted)
        .await
        .expect("created")
        .spec
        .expect("a spec");
    assert!(created.cluster_ip.expect("an address").starts_with("10.96."));
    assert!(created.ports.expect("ports")[0].node_port.expect("a node port") >= 30000);
    server.shutdown().await;
}

#[tokio::test]
async fn status_and_specification_are_written_separately() {
    let (server, client) = server().await;
    let api: Api<Pod> = Api::default_namespaced(client);
    let pod: Pod = serde_json::from_value(
        json!({"metadata": {"name": "p"}, "spec": {"containers": [{"name": "c", "image": "i"}]}}),
    )
    .expect("a Pod");
    let created = api.create(&PostParams::default(), &pod).await.expect("created");
    let patched = api
        .patch_status(
            "p",
            &PatchParams::default(),
            &Patch::Merge(json!({"spec": {"nodeName": "x"}, "status": {"phase": "Running"}})),
        )
        .await
        .expect("patched");
    assert_eq!(patched.status.and_then(|s| s.phase).as_deref(), Some("Running"));
    assert_eq!(patched.spec.and_then(|s| s.node_name), None);
    assert_eq!(patched.metadata.generation, created.metadata.generation);
    server.shutdown().await;
}

#[tokio::test]
async fn server_side_apply_owns_conflicts_and_forces() {
    let (server, client) = server().await;
    let api: Api<ConfigMap> = Api::default_namespaced(client);
    let config = |value: &str| {
        Patch::Apply(
            json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "c"}, "data": {"k": value}}),
        )
    };
    api.patch("c", &PatchParams::apply("one"), &config("1"))
        .await
        .expect("created by apply");
    let error = api
        .patch("c", &PatchParams::apply("two"), &config("2"))
        .await
        .expect_err("a conflict");
    assert!(
        matches!(&error, kube::Error::Api(s) if s.code == 409 && s.message.contains("conflict with \"one\": .data.k")),
        "{error:?}"
    );
    let forced = api
        .patch("c", &PatchParams::apply("two").force(), &config("2"))
        .await
        .expect("forced");
    assert_eq!(forced.data.expect("data")["k"], "2");
    server.shutdown().await;
}

fn widgets(client: Client) -> Api<DynamicObject> {
    let resource =
        ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk("example.com", "v1", "Widget"), "widgets");
    Api::default_namespaced_with(client, &resource)
}

async fn define_widgets(client: &Client) {
    let crd: CustomResourceDefinition = serde_json::from_value(json!({
        "metadata": {"name": "widgets.example.com"},
        "spec": {"group": "example.com", "scope": "Namespaced", "names": {"plural": "widgets", "kind": "Widget"},
            "versions": [{"name": "v1", "served": true, "storage": true, "subresources": {"status": {}},
                "schema": {"openAPIV3Schema": {"type": "object", "properties": {
                    "spec": {"type": "object", "required": ["size"], "properties": {
                        "size": {"type": "integer", "minimum": 1}, "colour": {"type": "string", "default": "red"}}},
                    "status": {"type": "object", "x-kubernetes-preserve-unknown-fields": true}}}}}]}}))
    .expect("a CRD");
    let api: Api<CustomResourceDefinition> = Api::all(client.clone());
    api.create(&PostParams::default(), &crd).await.expect("created");
    let established = kube::runtime::wait::await_condition(
        api,
        "widgets.example.com",
        kube::runtime::conditions::is_crd_established(),
    );
    tokio::time::timeout(DEADLINE, established)
        .await
        .expect("in time")
        .expect("established");
}

#[tokio::test]
async fn custom_resources_are_defaulted_pruned_and_checked_by_their_schema() {
    let (server, client) = server().await;
    define_widgets(&client).await;
    let api = widgets(client);
    let widget = |spec: serde_json::Value| -> DynamicObject {
        serde_json::from_value(json!({"apiVersion": "example.com/v1", "kind": "Widget", "metadata": {"name": "w"}, "spec": spec})).expect("an object")
    };
    let error = api
        .create(&PostParams::default(), &widget(json!({"size": 0})))
        .await
        .expect_err("too small");
    assert!(
        matches!(&error, kube::Error::Api(s) if s.code == 422 && s.message.contains("spec.size in body should be greater than or equal to 1")),
        "{error:?}"
    );
    let created = api
        .create(&PostParams::default(), &widget(json!({"size": 1, "extra": true})))
        .await
        .expect("created");
    assert_eq!(created.data["spec"], json!({"size": 1, "colour": "red"}));
    let patched = api
        .patch_status(
            "w",
            &PatchParams::default(),
            &Patch::Merge(json!({"status": {"ready": true}})),
        )
        .await
        .expect("patched");
    assert_eq!(patched.metadata.generation, Some(1));
    server.shutdown().await;
}

#[tokio::test]
async fn the_finalizer_of_kube_runtime_is_set_and_taken_off_and_the_object_goes() {
    use kube::runtime::finalizer::{Event, finalizer};
    let (server, client) = server().await;
    let api: Api<ConfigMap> = Api::default_namespaced(client);
    api.create(&PostParams::default(), &config_map("c", json!({})))
        .await
        .expect("created");
    let reconcile = |event: Event<ConfigMap>| async move {
        let _ = event;
        Ok::<_, std::io::Error>(kube::runtime::controller::Action::await_change())
    };
    let object = std::sync::Arc::new(api.get("c").await.expect("there"));
    finalizer(&api, "example.com/f", object, reconcile)
        .await
        .expect("added");
    let marked = api
        .delete("c", &DeleteParams::default())
        .await
        .expect("marked")
        .left()
        .expect("still there");
    assert!(marked.metadata.deletion_timestamp.is_some());
    let object = std::sync::Arc::new(api.get("c").await.expect("there"));
    finalizer(&api, "example.com/f", object, reconcile)
        .await
        .expect("cleaned up");
    assert!(api.get_opt("c").await.expect("answered").is_none());
    server.shutdown().await;
}

#[tokio::test]
async fn dependents_go_with_their_owner_and_a_namespace_with_its_content() {
    let (server, client) = server().await;
    let namespaces: Api<Namespace> = Api::all(client.clone());
    let ns: Namespace = serde_json::from_value(json!({"metadata": {"name": "n"}})).expect("a Namespace");
    namespaces
        .create(&PostParams::default(), &ns)
        .await
        .expect("created");
    let api: Api<ConfigMap> = Api::namespaced(client, "n");
    let owner = api
        .create(&PostParams::default(), &config_map("owner", json!({})))
        .await
        .expect("created");
    let dependent: ConfigMap =
        serde_json::from_value(json!({"metadata": {"name": "dependent", "ownerReferences": [
        {"apiVersion": "v1", "kind": "ConfigMap", "name": "owner", "uid": owner.uid()}]}}))
        .expect("a ConfigMap");
    api.create(&PostParams::default(), &dependent)
        .await
        .expect("created");
    let gone = async |name: &str, uid: Option<String>| {
        let condition = kube::runtime::conditions::is_deleted(uid.as_deref().unwrap_or_default());
        kube::runtime::wait::await_condition(api.clone(), name, condition).await
    };
    let uid = api.get("dependent").await.expect("there").uid();
    api.delete("owner", &DeleteParams::background())
        .await
        .expect("deleted");
    tokio::time::timeout(DEADLINE, gone("dependent", uid))
        .await
        .expect("in time")
        .expect("collected");
    let left = api
        .create(&PostParams::default(), &config_map("left", json!({})))
        .await
        .expect("created");
    namespaces
        .delete("n", &DeleteParams::default())
        .await
        .expect("deleting");
    tokio::time::timeout(DEADLINE, gone("left", left.uid()))
        .await
        .expect("in time")
        .expect("emptied");
    server.shutdown().await;
}

#[tokio::test]
async fn a_definition_that_is_applied_again_stays_as_it_is() {
    let (server, client) = server().await;
    define_widgets(&client).await;
    let api: Api<DynamicObject> = Api::all_with(
        client,
        &ApiResource::from_gvk(&GroupVersionKind::gvk(
            "apiextensions.k8s.io",
            "v1",
            "CustomResourceDefinition",
        )),
    );
    let stored = api.get("widgets.example.com").await.expect("there");
    let config = json!({"apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
        "metadata": {"name": "widgets.example.com"}, "spec": stored.data["spec"]});
    let params = PatchParams::apply("serin").force();
    let first = api
        .patch("widgets.example.com", &params, &Patch::Apply(&config))
        .await
        .expect("applied");
    let second = api
        .patch("widgets.example.com", &params, &Patch::Apply(&config))
        .await
        .expect("applied again");
    assert_eq!(first.resource_version(), second.resource_version());
    server.shutdown().await;
}

#[tokio::test]
async fn a_pod_is_bound_once() {
    let (server, client) = server().await;
    let api: Api<Pod> = Api::default_namespaced(client.clone());
    let pod: Pod = serde_json::from_value(
        json!({"metadata": {"name": "p"}, "spec": {"containers": [{"name": "c", "image": "i"}]}}),
    )
    .expect("a Pod");
    api.create(&PostParams::default(), &pod).await.expect("created");
    let bind = || {
        http::Request::post("/api/v1/namespaces/default/pods/p/binding")
            .header("content-type", "application/json")
            .body(br#"{"apiVersion":"v1","kind":"Binding","metadata":{"name":"p"},"target":{"kind":"Node","name":"n1"}}"#.to_vec())
            .expect("a request")
    };
    client.request::<serde_json::Value>(bind()).await.expect("bound");
    let bound = api.get("p").await.expect("there");
    assert_eq!(bound.spec.and_then(|s| s.node_name).as_deref(), Some("n1"));
    let error = client
        .request::<serde_json::Value>(bind())
        .await
        .expect_err("bound already");
    assert!(
        matches!(&error, kube::Error::Api(s) if s.code == 409),
        "{error:?}"
    );
    server.shutdown().await;
}

#[tokio::test]
async fn foreground_deletion_waits_for_blocking_dependents_and_orphans_are_left_alone() {
    let (server, client) = server().await;
    let api: Api<ConfigMap> = Api::default_namespaced(client);
    let dependent = |name: &str, owner: &ConfigMap| -> ConfigMap {
        serde_json::from_value(json!({"metadata": {"name": name, "finalizers": ["example.com/wait"], "ownerReferences": [
            {"apiVersion": "v1", "kind": "ConfigMap", "name": owner.name_any(), "uid": owner.uid(), "blockOwnerDeletion": true}]}}))
        .expect("a ConfigMap")
    };
    let owner = api
        .create(&PostParams::default(), &config_map("owner", json!({})))
        .await
        .expect("created");
    api.create(&PostParams::default(), &dependent("held", &owner))
        .await
        .expect("created");
    api.delete("owner", &DeleteParams::foreground())
        .await
        .expect("marked");
    let terminating = |o: Option<&ConfigMap>| o.is_some_and(|o| o.metadata.deletion_timestamp.is_some());
    let wait = kube::runtime::wait::await_condition(api.clone(), "held", terminating);
    tokio::time::timeout(DEADLINE, wait)
        .await
        .expect("in time")
        .expect("marked");
    assert!(
        api.get_opt("owner").await.expect("answered").is_some(),
        "the owner waits for its dependent"
    );
    api.patch(
        "held",
        &PatchParams::default(),
        &Patch::Merge(json!({"metadata": {"finalizers": null}})),
    )
    .await
    .expect("released");
    let uid = owner.uid().unwrap_or_default();
    let gone = kube::runtime::conditions::is_deleted(&uid);
    let wait = kube::runtime::wait::await_condition(api.clone(), "owner", gone);
    tokio::time::timeout(DEADLINE, wait)
        .await
        .expect("in time")
        .expect("gone");
    let owner = api
        .create(&PostParams::default(), &config_map("other", json!({})))
        .await
        .expect("created");
    api.create(&PostParams::default(), &dependent("kept", &owner))
        .await
        .expect("created");
    api.delete("other", &DeleteParams::orphan())
        .await
        .expect("marked");
    let free = |o: Option<&ConfigMap>| o.is_some_and(|o| o.metadata.owner_references.is_none());
    let wait = kube::runtime::wait::await_condition(api.clone(), "kept", free);
    tokio::time::timeout(DEADLINE, wait)
        .await
        .expect("in time")
        .expect("orphaned");
    server.shutdown().await;
}

struct Labels;

#[async_trait::async_trait]
impl serin_apiserver::Admission for Labels {
    fn wants(&self, group: &str, resource: &str) -> bool {
        group.is_empty() && resource == "configmaps"
    }

    async fn admit(
        &self,
        request: &serin_apiserver::AdmissionRequest,
    ) -> Result<Option<serde_json::Value>, serin_apiserver::Denied> {
        if request.name == "forbidden" {
            return Err(serin_apiserver::Denied {
                message: "not this one".into(),
                code: 403,
            });
        }
        let mut object = request.object.clone();
        if !object.is_null() {
            object["metadata"]["labels"] = json!({"admitted": "yes"});
        }
        Ok(Some(object))
    }
}

#[tokio::test]
async fn admission_changes_and_refuses_writes_without_owning_what_it_changes() {
    let server = ApiServer::builder()
        .admission(std::sync::Arc::new(Labels))
        .build()
        .await
        .expect("the server starts");
    let api: Api<ConfigMap> = Api::default_namespaced(Client::new(server.service(), "default"));
    let created = api
        .create(&PostParams::default(), &config_map("c", json!({})))
        .await
        .expect("created");
    assert_eq!(created.labels().get("admitted").map(String::as_str), Some("yes"));
    assert!(created.managed_fields().is_empty());
    let error = api
        .create(&PostParams::default(), &config_map("forbidden", json!({})))
        .await
        .expect_err("refused");
    assert!(
        matches!(&error, kube::Error::Api(s) if s.code == 403 && s.message.contains("not this one")),
        "{error:?}"
    );
    server.shutdown().await;
}

#[tokio::test]
async fn a_dry_run_answers_as_if_and_writes_nothing() {
    let (server, client) = server().await;
    let api: Api<ConfigMap> = Api::default_namespaced(client);
    let dry = PostParams {
        dry_run: true,
        ..PostParams::default()
    };
    let tried = api
        .create(&dry, &config_map("c", json!({"a": "1"})))
        .await
        .expect("it would be created");
    assert!(tried.uid().is_some());
    assert!(api.get_opt("c").await.expect("an answer").is_none());
    let created = api
        .create(&PostParams::default(), &config_map("c", json!({"a": "1"})))
        .await
        .expect("created");
    let error = api
        .create(&dry, &config_map("c", json!({})))
        .await
        .expect_err("it exists");
    assert!(
        matches!(&error, kube::Error::Api(s) if s.is_already_exists()),
        "{error:?}"
    );
    let before = server.resource_version();
    let patch = Patch::Merge(json!({"data": {"a": "2"}}));
    let params = PatchParams {
        dry_run: true,
        ..PatchParams::default()
    };
    let patched = api
        .patch("c", &params, &patch)
        .await
        .expect("it would be patched");
    assert_eq!(patched.data.expect("data")["a"], "2");
    let applied = Patch::Apply(json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "d"}}));
    let params = PatchParams {
        dry_run: true,
        ..PatchParams::apply("tests")
    };
    api.patch("d", &params, &applied)
        .await
        .expect("it would be applied");
    let params = DeleteParams {
        dry_run: true,
        ..DeleteParams::default()
    };
    api.delete("c", &params).await.expect("it would be deleted");
    assert_eq!(server.resource_version(), before);
    let left = api.list(&ListParams::default()).await.expect("a list").items;
    assert_eq!(left.len(), 1);
    assert_eq!(
        left[0].metadata.resource_version,
        created.metadata.resource_version
    );
    server.shutdown().await;
}
