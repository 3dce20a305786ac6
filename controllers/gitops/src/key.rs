//! Names of objects: the key of a namespaced object of a known kind, and the identity of any object.

use std::fmt;

use kube::ResourceExt;
use serde_json::Value;

/// Namespace and name of an object whose kind is clear from the context.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Key {
    pub(crate) namespace: String,
    pub(crate) name: String,
}

impl Key {
    pub(crate) fn new(namespace: impl Into<String>, name: impl Into<String>) -> Self {
        Self {
            namespace: namespace.into(),
            name: name.into(),
        }
    }

    pub(crate) fn of<K: ResourceExt>(object: &K) -> Self {
        Self::new(object.namespace().unwrap_or_default(), object.name_any())
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// One object of the cluster, whatever version it is read in.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct ObjectId {
    pub(crate) group: String,
    pub(crate) kind: String,
    /// Empty for cluster-scoped objects.
    pub(crate) namespace: String,
    pub(crate) name: String,
}

impl ObjectId {
    /// Reads an object's identity; `None` when apiVersion, kind or name are missing.
    pub(crate) fn of(object: &Value) -> Option<Self> {
        let text = |path: &str| {
            object
                .pointer(path)
                .and_then(Value::as_str)
                .filter(|s| !s.is_empty())
        };
        Some(Self {
            group: group_version(text("/apiVersion")?).0.to_string(),
            kind: text("/kind")?.to_string(),
            namespace: text("/metadata/namespace").unwrap_or_default().to_string(),
            name: text("/metadata/name")?.to_string(),
        })
    }
}

/// As Flux writes objects in messages and events: `Kind/namespace/name`.
impl fmt::Display for ObjectId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.namespace.is_empty() {
            write!(f, "{}/{}", self.kind, self.name)
        } else {
            write!(f, "{}/{}/{}", self.kind, self.namespace, self.name)
        }
    }
}

/// `apps/v1` to (`apps`, `v1`), `v1` to (``, `v1`).
pub(crate) fn group_version(api_version: &str) -> (&str, &str) {
    api_version.split_once('/').unwrap_or(("", api_version))
}
