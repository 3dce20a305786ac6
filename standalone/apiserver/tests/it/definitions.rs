//! Definitions of kinds: what is served in which version, and from when on.

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{Api, DynamicObject, ListParams, Patch, PatchParams, PostParams};
use kube::core::{ApiResource, GroupVersionKind};
use kube::runtime::wait::await_condition;
use kube::{Client, ResourceExt as _};
use serde_json::json;

use crate::client::{DEADLINE, server};

/// Creates the definition of birds and waits until it is established.
async fn define(client: &Client, definition: &CustomResourceDefinition) -> Api<CustomResourceDefinition> {
    let definitions: Api<CustomResourceDefinition> = Api::all(client.clone());
    definitions
        .create(&PostParams::default(), definition)
        .await
        .expect("created");
    let established = await_condition(
        definitions.clone(),
        "birds.example.com",
        kube::runtime::conditions::is_crd_established(),
    );
    tokio::time::timeout(DEADLINE, established)
        .await
        .expect("in time")
        .expect("established");
    definitions
}

#[tokio::test]
async fn a_custom_object_is_read_and_written_in_each_version_of_its_definition() {
    let (server, client) = server().await;
    let version = |name: &str, storage: bool| {
        json!({"name": name, "served": true, "storage": storage, "schema": {"openAPIV3Schema": {"type": "object",
            "properties": {"spec": {"type": "object", "properties": {"size": {"type": "integer"}}}}}}})
    };
    let definition: CustomResourceDefinition = serde_json::from_value(json!({
        "metadata": {"name": "birds.example.com"},
        "spec": {"group": "example.com", "scope": "Namespaced", "conversion": {"strategy": "None"},
            "names": {"plural": "birds", "singular": "bird", "kind": "Bird"},
            "versions": [version("v1", true), version("v1beta1", false)]}}))
    .expect("a definition");
    define(&client, &definition).await;
    let birds = |version: &str| {
        let kind = GroupVersionKind::gvk("example.com", version, "Bird");
        Api::<DynamicObject>::default_namespaced_with(client.clone(), &ApiResource::from_gvk(&kind))
    };
    let old: DynamicObject = serde_json::from_value(
        json!({"apiVersion": "example.com/v1beta1", "kind": "Bird", "metadata": {"name": "serin"}, "spec": {"size": 1}}),
    )
    .expect("an object");
    let created = birds("v1beta1")
        .create(&PostParams::default(), &old)
        .await
        .expect("created");
    let read = birds("v1").get("serin").await.expect("read");
    assert_eq!(read.types.as_ref().expect("types").api_version, "example.com/v1");
    assert_eq!(read.data, created.data);
    assert_eq!(read.uid(), created.uid());
    let patch = Patch::Merge(json!({"spec": {"size": 2}}));
    birds("v1")
        .patch("serin", &PatchParams::default(), &patch)
        .await
        .expect("patched");
    let listed = birds("v1beta1")
        .list(&ListParams::default())
        .await
        .expect("a list");
    assert_eq!(
        listed.items[0].types.as_ref().expect("types").api_version,
        "example.com/v1beta1"
    );
    assert_eq!(listed.items[0].data["spec"]["size"], 2);
    server.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_changed_definition_holds_for_the_next_write() {
    let (server, client) = server().await;
    let definition = |longest: usize| -> CustomResourceDefinition {
        serde_json::from_value(json!({
            "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition", "metadata": {"name": "birds.example.com"},
            "spec": {"group": "example.com", "scope": "Namespaced", "names": {"plural": "birds", "singular": "bird", "kind": "Bird"},
                "versions": [{"name": "v1", "served": true, "storage": true, "schema": {"openAPIV3Schema": {"type": "object",
                    "properties": {"song": {"type": "string", "maxLength": longest}}}}}]}}))
        .expect("a definition")
    };
    let definitions = define(&client, &definition(1)).await;
    let kind = GroupVersionKind::gvk("example.com", "v1", "Bird");
    let birds: Api<DynamicObject> = Api::default_namespaced_with(client, &ApiResource::from_gvk(&kind));
    let sing = |length: usize| {
        let song = "x".repeat(length);
        Patch::Apply(
            json!({"apiVersion": "example.com/v1", "kind": "Bird", "metadata": {"name": "serin"}, "song": song}),
        )
    };
    let params = PatchParams::apply("tests").force();
    // No event is waited for: what was answered holds.
    for longest in (1..30).chain((1..30).rev()) {
        definitions
            .patch("birds.example.com", &params, &Patch::Apply(definition(longest)))
            .await
            .expect("changed");
        birds
            .patch("serin", &params, &sing(longest))
            .await
            .expect("it is short enough");
        let error = birds
            .patch("serin", &params, &sing(longest + 1))
            .await
            .expect_err("it is too long");
        assert!(
            matches!(&error, kube::Error::Api(s) if s.code == 422),
            "{longest}: {error:?}"
        );
    }
    server.shutdown().await;
}
