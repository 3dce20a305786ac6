//! ConfigMaps and Secrets that a workload uses: found in its pod template, hashed, copied for the primary.
//!
//! Followed are volumes, projected volumes, `env` and `envFrom` of containers and init containers. Left alone are Secrets
//! of other types than those of [`SECRET_TYPES`], objects with the annotation [`OPT_OUT`], and optional references to
//! what does not exist. Unlike Flagger, `binaryData` is copied and counts as content.

use std::collections::BTreeMap;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{ConfigMap, PodTemplateSpec, Secret};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::{Blueprint, Ownership};

/// Annotation with which an object is left out of tracking, with the value `disabled`.
pub const OPT_OUT: &str = "flagger.app/config-tracking";
/// Types of Secrets that are tracked.
pub const SECRET_TYPES: [&str; 4] = [
    "Opaque",
    "kubernetes.io/basic-auth",
    "kubernetes.io/ssh-auth",
    "kubernetes.io/tls",
];

/// What kind of object a reference names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// A ConfigMap.
    ConfigMap,
    /// A Secret.
    Secret,
}

/// A reference in a pod template.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Reference {
    /// Kind of the object.
    pub kind: Kind,
    /// Its name.
    pub name: String,
}

impl Reference {
    /// `configmap/<name>` or `secret/<name>`, as in `status.trackedConfigs`.
    pub fn key(&self) -> String {
        match self.kind {
            Kind::ConfigMap => format!("configmap/{}", self.name),
            Kind::Secret => format!("secret/{}", self.name),
        }
    }
}

/// A tracked object.
#[derive(Clone, Debug)]
pub enum Tracked {
    /// A ConfigMap.
    ConfigMap(Arc<ConfigMap>),
    /// A Secret.
    Secret(Arc<Secret>),
}

impl Tracked {
    /// First eight bytes of the SHA-256 of the JSON of `data`, in hex: Flagger's checksum. `binaryData`, which Flagger
    /// leaves out, is hashed after it where there is any.
    pub fn checksum(&self) -> String {
        let mut hasher = Sha256::new();
        match self {
            Self::ConfigMap(map) => {
                hasher.update(go_json(&map.data.clone().unwrap_or_default()));
                if let Some(binary) = map.binary_data.as_ref().filter(|binary| !binary.is_empty()) {
                    hasher.update(go_json(binary));
                }
            }
            Self::Secret(secret) => hasher.update(go_json(&secret.data.clone().unwrap_or_default())),
        }
        crate::hex(&hasher.finalize()[..8])
    }
}

/// JSON as Go's encoder writes it: keys sorted, and the characters that matter in HTML escaped.
fn go_json<T: serde::Serialize>(data: &T) -> String {
    serde_json::to_string(data)
        .unwrap_or_default()
        .replace('&', "\\u0026")
        .replace('<', "\\u003c")
        .replace('>', "\\u003e")
        .replace('\u{2028}', "\\u2028")
        .replace('\u{2029}', "\\u2029")
}

/// Calls `visit` with every reference in a pod template (as JSON); it may rewrite the name.
pub fn for_each_reference(template: &mut Value, visit: &mut dyn FnMut(Kind, &mut String, bool)) {
    use Kind::{ConfigMap, Secret};
    for containers in ["/spec/containers", "/spec/initContainers"] {
        for container in list(template, containers) {
            for variable in list(container, "/env") {
                one(variable, "/valueFrom/configMapKeyRef", "name", ConfigMap, visit);
                one(variable, "/valueFrom/secretKeyRef", "name", Secret, visit);
            }
            for source in list(container, "/envFrom") {
                one(source, "/configMapRef", "name", ConfigMap, visit);
                one(source, "/secretRef", "name", Secret, visit);
            }
        }
    }
    for volume in list(template, "/spec/volumes") {
        one(volume, "/configMap", "name", ConfigMap, visit);
        one(volume, "/secret", "secretName", Secret, visit);
        for source in list(volume, "/projected/sources") {
            one(source, "/configMap", "name", ConfigMap, visit);
            one(source, "/secret", "name", Secret, visit);
        }
    }
}

/// The elements of the list at a JSON pointer; none where there is no list.
pub(super) fn list<'v>(value: &'v mut Value, pointer: &str) -> impl Iterator<Item = &'v mut Value> {
    value
        .pointer_mut(pointer)
        .and_then(Value::as_array_mut)
        .into_iter()
        .flatten()
}

fn one(
    holder: &mut Value,
    pointer: &str,
    field: &str,
    kind: Kind,
    visit: &mut dyn FnMut(Kind, &mut String, bool),
) {
    let Some(reference) = holder.pointer_mut(pointer) else {
        return;
    };
    let optional = reference
        .get("optional")
        .and_then(Value::as_bool)
        .unwrap_or(false);
    if let Some(Value::String(name)) = reference.get_mut(field) {
        visit(kind, name, optional);
    }
}

/// References of a template. `true` stands beside those that must exist.
pub fn references(template: &PodTemplateSpec) -> BTreeMap<Reference, bool> {
    let mut found = BTreeMap::new();
    let mut template = serde_json::to_value(template).unwrap_or_default();
    for_each_reference(&mut template, &mut |kind, name, optional| {
        let required = found
            .entry(Reference {
                kind,
                name: name.clone(),
            })
            .or_insert(false);
        *required |= !optional;
    });
    found
}

/// The tracked objects of a template, by reference. Fails with a sentence for the user when one that must exist does
/// not.
pub fn tracked(
    template: &PodTemplateSpec,
    config_map: impl Fn(&str) -> Option<Arc<ConfigMap>>,
    secret: impl Fn(&str) -> Option<Arc<Secret>>,
) -> Result<BTreeMap<Reference, Tracked>, String> {
    let opted_out = |annotations: &Option<BTreeMap<String, String>>| {
        annotations
            .as_ref()
            .and_then(|annotations| annotations.get(OPT_OUT))
            .is_some_and(|value| value == "disabled")
    };
    let mut found = BTreeMap::new();
    for (reference, required) in references(template) {
        let object = match reference.kind {
            Kind::ConfigMap => config_map(&reference.name).map(|map| {
                let skip = opted_out(&map.metadata.annotations);
                (skip, Tracked::ConfigMap(map))
            }),
            Kind::Secret => secret(&reference.name).map(|secret| {
                let type_ = secret.type_.as_deref().unwrap_or("Opaque");
                let skip = opted_out(&secret.metadata.annotations) || !SECRET_TYPES.contains(&type_);
                (skip, Tracked::Secret(secret))
            }),
        };
        match object {
            Some((true, _)) => {}
            Some((false, object)) => {
                found.insert(reference, object);
            }
            None if required => return Err(format!("{} is referred to and does not exist", reference.key())),
            None => {}
        }
    }
    Ok(found)
}

impl Blueprint<'_> {
    /// The primary's copies of tracked objects.
    pub fn config_copies(&self, tracked: &BTreeMap<Reference, Tracked>) -> Vec<(Kind, Value)> {
        tracked
            .iter()
            .map(|(reference, object)| {
                let metadata = self.metadata(&format!("{}-primary", reference.name), Ownership::Ours);
                let copy = match object {
                    Tracked::ConfigMap(map) => {
                        let mut copy = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata});
                        if let Some(data) = &map.data {
                            copy["data"] = json!(data);
                        }
                        if let Some(data) = &map.binary_data {
                            copy["binaryData"] = json!(data);
                        }
                        copy
                    }
                    Tracked::Secret(secret) => json!({
                        "apiVersion": "v1",
                        "kind": "Secret",
                        "metadata": metadata,
                        "type": secret.type_,
                        "data": secret.data,
                    }),
                };
                (reference.kind, copy)
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_of_a_config_map_is_flaggers() {
        let map = |data: &[(&str, &str)]| {
            Tracked::ConfigMap(Arc::new(ConfigMap {
                data: Some(
                    data.iter()
                        .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
                        .collect(),
                ),
                ..ConfigMap::default()
            }))
        };
        assert_eq!(map(&[("t", "1")]).checksum(), "8a22710b84043416");
        assert_eq!(map(&[("A", "2")]).checksum(), "05ad4a30afaa7971");
    }

    #[test]
    fn binary_data_counts_as_content() {
        let mut map = ConfigMap::default();
        let without = Tracked::ConfigMap(Arc::new(map.clone())).checksum();
        map.binary_data = Some([("b".to_owned(), k8s_openapi::ByteString(vec![0, 1]))].into());
        assert_ne!(Tracked::ConfigMap(Arc::new(map)).checksum(), without);
    }
}
