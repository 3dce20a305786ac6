//! The primary as it was before a promotion, kept in one Secret so that the promotion can be taken back. A Secret, because
//! copies of Secrets are among what is kept.

use std::collections::BTreeMap;

use k8s_openapi::ByteString;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde_json::{Value, json};

use super::primary::allowed;
use super::{Blueprint, Ownership};
use crate::observed::Former;

/// Annotation with the `flagger-id` of what is kept.
const ID: &str = "serin.dev/flagger-id";
/// Annotation with the `flagger-id` of what took its place.
const REPLACED_BY: &str = "serin.dev/replaced-by";
/// Where the objects are.
const OBJECTS: &str = "objects.json";
/// Longest content, in bytes: an object of the API server has at most a megabyte and a half, and base64 adds a third.
const CONTENT_MAX: usize = 1 << 20;

/// Name of the Secret that keeps a primary.
pub fn name(primary: &str) -> String {
    format!("{primary}-former")
}

/// Which primary a Secret keeps.
pub fn read(kept: &Secret) -> Option<Former> {
    let annotations = kept.metadata.annotations.as_ref()?;
    Some(Former {
        id: annotations.get(ID)?.clone(),
        replaced_by: annotations.get(REPLACED_BY)?.clone(),
    })
}

/// The objects that a Secret keeps, ConfigMaps and Secrets first. Fails with a sentence for the user.
pub fn objects(kept: &Secret) -> Result<Vec<Value>, String> {
    let data = kept.data.as_ref().and_then(|data| data.get(OBJECTS));
    let ByteString(content) = data.ok_or_else(|| format!("it has no {OBJECTS}"))?;
    serde_json::from_slice(content).map_err(|error| format!("its {OBJECTS} cannot be read: {error}"))
}

/// An object's metadata as it is applied again.
fn metadata(metadata: &ObjectMeta) -> Value {
    let annotations: BTreeMap<String, String> = allowed(metadata.annotations.as_ref()).collect();
    json!({
        "name": metadata.name,
        "namespace": metadata.namespace,
        "labels": metadata.labels.clone().unwrap_or_default(),
        "annotations": annotations,
        "ownerReferences": metadata.owner_references.clone().unwrap_or_default(),
    })
}

impl Blueprint<'_> {
    /// A Secret that keeps the primary and these copies. Fails with a sentence for the user when that is too much.
    pub fn former(
        &self,
        primary: &Deployment,
        config_maps: &[ConfigMap],
        secrets: &[Secret],
        former: &Former,
    ) -> Result<Value, String> {
        let mut objects = Vec::new();
        for map in config_maps {
            let mut object =
                json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata(&map.metadata)});
            if let Some(data) = &map.data {
                object["data"] = json!(data);
            }
            if let Some(data) = &map.binary_data {
                object["binaryData"] = json!(data);
            }
            objects.push(object);
        }
        for secret in secrets {
            objects.push(json!({
                "apiVersion": "v1", "kind": "Secret", "metadata": metadata(&secret.metadata),
                "type": secret.type_, "data": secret.data,
            }));
        }
        objects.push(json!({
            "apiVersion": "apps/v1", "kind": "Deployment", "metadata": metadata(&primary.metadata),
            "spec": primary.spec,
        }));
        let content = serde_json::to_vec(&objects).map_err(|error| error.to_string())?;
        if content.len() > CONTENT_MAX {
            return Err(format!(
                "{} and what it mounts have {} bytes, more than a Secret holds",
                self.primary_name(),
                content.len()
            ));
        }
        let mut metadata = self.metadata(&name(&self.primary_name()), Ownership::Ours);
        let annotations = json!({ID: former.id, REPLACED_BY: former.replaced_by});
        metadata.insert("annotations".to_owned(), annotations);
        Ok(json!({
            "apiVersion": "v1", "kind": "Secret", "metadata": metadata, "type": "Opaque",
            "data": {OBJECTS: ByteString(content)},
        }))
    }
}
