//! Server-side apply of objects and of statuses, with one field manager per controller.

use std::fmt::Debug;

use kube::api::{Api, Patch, PatchParams};
use kube::{Resource, ResourceExt};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::json;

use crate::Error;

/// Applies an object, taking ownership of every field in it (`force`): a controller is the authority over what it
/// generates. Returns the object as stored.
pub async fn apply<K>(api: &Api<K>, field_manager: &str, object: &K) -> Result<K, Error>
where
    K: Resource + Serialize + DeserializeOwned + Clone + Debug,
    K::DynamicType: Default,
{
    let name = object.name_any();
    api.patch(
        &name,
        &PatchParams::apply(field_manager).force(),
        &Patch::Apply(object),
    )
    .await
    .map_err(|source| Error::Write {
        action: "apply",
        object: describe::<K>(object.namespace().as_deref(), &name),
        source: Box::new(source),
    })
}

/// Applies the whole status of an object. The caller compares before it calls: a status that did not change is not
/// written.
pub async fn apply_status<K, S>(
    api: &Api<K>,
    field_manager: &str,
    namespace: Option<&str>,
    name: &str,
    status: &S,
) -> Result<K, Error>
where
    K: Resource + DeserializeOwned + Clone + Debug,
    K::DynamicType: Default,
    S: Serialize,
{
    let dynamic = K::DynamicType::default();
    let object = describe::<K>(namespace, name);
    let status = serde_json::to_value(status).map_err(|source| Error::Encode {
        object: object.clone(),
        source,
    })?;
    let patch = json!({
        "apiVersion": K::api_version(&dynamic),
        "kind": K::kind(&dynamic),
        "metadata": { "name": name, "namespace": namespace },
        "status": status,
    });
    api.patch_status(
        name,
        &PatchParams::apply(field_manager).force(),
        &Patch::Apply(&patch),
    )
    .await
    .map_err(|source| Error::Write {
        action: "apply status of",
        object,
        source: Box::new(source),
    })
}

/// `Kind namespace/name`, as our messages name objects.
pub fn describe<K>(namespace: Option<&str>, name: &str) -> String
where
    K: Resource,
    K::DynamicType: Default,
{
    let kind = K::kind(&K::DynamicType::default()).into_owned();
    match namespace {
        Some(namespace) => format!("{kind} {namespace}/{name}"),
        None => format!("{kind} {name}"),
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::{ConfigMap, Node};

    use super::*;

    #[test]
    fn objects_are_named_by_kind_namespace_and_name() {
        assert_eq!(
            describe::<ConfigMap>(Some("prod"), "settings"),
            "ConfigMap prod/settings"
        );
        assert_eq!(describe::<Node>(None, "laptop"), "Node laptop");
    }
}
