//! Server-side apply of manifests that the CLI brings itself: definitions, the gateway, the demo's objects.

use std::time::Duration;

use anyhow::Context as _;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{Api, DynamicObject, Patch, PatchParams};
use kube::core::{ApiResource, GroupVersionKind};
use kube::runtime::wait::{await_condition, conditions::is_crd_established};
use kube::{Client, ResourceExt as _, discovery};
use serde_json::Value;

/// Owner of the fields of what the CLI applies.
pub(crate) const FIELD_MANAGER: &str = "serin";

/// Applies the documents of a manifest in their order. `file` names it in errors.
pub(crate) async fn apply_manifests(client: &Client, text: &str, file: &str) -> anyhow::Result<()> {
    for object in serin_manifests::parse_documents(text, file)? {
        let json = object.to_json()?;
        apply(client, &json)
            .await
            .with_context(|| format!("apply {} {} of {file}", object.kind(), object.name()))?;
    }
    Ok(())
}

/// Applies one object.
pub(crate) async fn apply(client: &Client, object: &Value) -> anyhow::Result<()> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let (api_version, kind) = (text(&object["apiVersion"]), text(&object["kind"]));
    let (group, version) = api_version.rsplit_once('/').unwrap_or(("", &api_version));
    let gvk = GroupVersionKind::gvk(group, version, &kind);
    let (resource, capabilities) = discovery::pinned_kind(client, &gvk)
        .await
        .with_context(|| format!("find kind {kind} of {api_version} in the cluster"))?;
    let namespaced = capabilities.scope == discovery::Scope::Namespaced;
    let api = api_of(
        client,
        &resource,
        namespaced.then(|| text(&object["metadata"]["namespace"])),
    );
    let name = text(&object["metadata"]["name"]);
    api.patch(
        &name,
        &PatchParams::apply(FIELD_MANAGER).force(),
        &Patch::Apply(object),
    )
    .await?;
    Ok(())
}

fn api_of(client: &Client, resource: &ApiResource, namespace: Option<String>) -> Api<DynamicObject> {
    match namespace {
        Some(namespace) if namespace.is_empty() => Api::default_namespaced_with(client.clone(), resource),
        Some(namespace) => Api::namespaced_with(client.clone(), &namespace, resource),
        None => Api::all_with(client.clone(), resource),
    }
}

/// How long a definition may take until its kind is served.
const ESTABLISH_TIMEOUT: Duration = Duration::from_secs(20);

/// Applies a CustomResourceDefinition and waits until its kind is served.
pub(crate) async fn define(client: &Client, definition: &CustomResourceDefinition) -> anyhow::Result<()> {
    let api: Api<CustomResourceDefinition> = Api::all(client.clone());
    let name = definition.name_any();
    api.patch(
        &name,
        &PatchParams::apply(FIELD_MANAGER).force(),
        &Patch::Apply(definition),
    )
    .await?;
    let established = await_condition(api, &name, is_crd_established());
    tokio::time::timeout(ESTABLISH_TIMEOUT, established)
        .await
        .with_context(|| {
            format!(
                "{name} is not established after {} s",
                ESTABLISH_TIMEOUT.as_secs()
            )
        })??;
    Ok(())
}
