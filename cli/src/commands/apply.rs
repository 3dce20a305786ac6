//! Server-side apply of manifests that the CLI brings itself: definitions, the gateway, the demo's objects.

use anyhow::Context as _;
use kube::api::{Api, DynamicObject, Patch, PatchParams};
use kube::core::{ApiResource, GroupVersionKind};
use kube::{Client, discovery};
use serde_json::Value;

/// Owner of the fields of what the CLI applies.
pub(crate) const FIELD_MANAGER: &str = "serin";

/// Applies the documents of a manifest in their order. `file` names it in errors.
pub(crate) async fn apply_manifests(client: &Client, text: &str, file: &str) -> anyhow::Result<()> {
    for object in serin_manifests::parse_documents(text, file)? {
        let json = object.to_json()?;
        apply(client, &json).await.with_context(|| format!("apply {} {} of {file}", object.kind(), object.name()))?;
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
    let api = api_of(client, &resource, namespaced.then(|| text(&object["metadata"]["namespace"])));
    let name = text(&object["metadata"]["name"]);
    api.patch(&name, &PatchParams::apply(FIELD_MANAGER).force(), &Patch::Apply(object)).await?;
    Ok(())
}

fn api_of(client: &Client, resource: &ApiResource, namespace: Option<String>) -> Api<DynamicObject> {
    match namespace {
        Some(namespace) if namespace.is_empty() => Api::default_namespaced_with(client.clone(), resource),
        Some(namespace) => Api::namespaced_with(client.clone(), &namespace, resource),
        None => Api::all_with(client.clone(), resource),
    }
}

/// Applies a CustomResourceDefinition. Its own kind needs no discovery.
pub(crate) async fn apply_definition(client: &Client, name: &str, definition: &Value) -> anyhow::Result<()> {
    let gvk = GroupVersionKind::gvk("apiextensions.k8s.io", "v1", "CustomResourceDefinition");
    let resource = ApiResource::from_gvk_with_plural(&gvk, "customresourcedefinitions");
    let api = api_of(client, &resource, None);
    api.patch(name, &PatchParams::apply(FIELD_MANAGER).force(), &Patch::Apply(definition)).await?;
    Ok(())
}
