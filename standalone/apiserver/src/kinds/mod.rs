//! What kinds there are: the built-in table and what CRDs define, in one registry.

mod table;

use std::collections::BTreeMap;
use std::sync::Arc;

use serde_json::Value;

use crate::schema::{self, Schema};

pub(crate) use table::{Row, Scope, rows};

/// Identifies where objects of a kind are stored: `<group>/<plural>`.
pub(crate) type ResourceId = Arc<str>;

/// A kind that is served, with all its versions.
#[derive(Debug)]
pub(crate) struct Kind {
    pub(crate) group: Arc<str>,
    pub(crate) plural: Arc<str>,
    pub(crate) singular: String,
    pub(crate) kind: Arc<str>,
    pub(crate) list_kind: String,
    pub(crate) short_names: Vec<String>,
    pub(crate) categories: Vec<String>,
    pub(crate) namespaced: bool,
    /// Where its objects are stored; two kinds may share a place (core and events.k8s.io Events).
    pub(crate) resource: ResourceId,
    /// In order of preference.
    pub(crate) versions: Vec<Version>,
    pub(crate) origin: Origin,
}

#[derive(Debug, Clone, Copy)]
pub(crate) enum Origin {
    Builtin(&'static Row),
    Custom,
}

/// One served version of a kind.
#[derive(Debug)]
pub(crate) struct Version {
    pub(crate) name: Arc<str>,
    pub(crate) schema: Arc<Schema>,
    /// The empty object that a new one is compared with for field ownership.
    pub(crate) zero: Value,
    pub(crate) served: bool,
    pub(crate) storage: bool,
    pub(crate) deprecation: Option<String>,
    pub(crate) status: bool,
    pub(crate) scale: Option<ScalePaths>,
    pub(crate) columns: Vec<Column>,
    pub(crate) selectable: Vec<String>,
    /// The CRD's own schema, for its OpenAPI document.
    pub(crate) open_api: Option<Value>,
}

#[derive(Debug, Clone)]
pub(crate) struct ScalePaths {
    pub(crate) spec: String,
    pub(crate) status: String,
    pub(crate) selector: Option<String>,
}

/// A printer column of a CRD.
#[derive(Debug, Clone)]
pub(crate) struct Column {
    pub(crate) name: String,
    pub(crate) r#type: String,
    pub(crate) format: String,
    pub(crate) description: String,
    pub(crate) priority: i64,
    pub(crate) json_path: String,
}

impl Kind {
    pub(crate) fn version(&self, name: &str) -> Option<&Version> {
        self.versions.iter().find(|v| &*v.name == name && v.served)
    }

    /// The version in which objects are kept.
    pub(crate) fn storage_version(&self) -> Option<&Version> {
        self.versions.iter().find(|v| v.storage).or(self.versions.first())
    }

    pub(crate) fn api_version(&self, version: &str) -> String {
        group_version(&self.group, version)
    }

    pub(crate) fn row(&self) -> Option<&'static Row> {
        match self.origin {
            Origin::Builtin(row) => Some(row),
            Origin::Custom => None,
        }
    }

    pub(crate) fn is_custom(&self) -> bool {
        matches!(self.origin, Origin::Custom)
    }

    /// Whether this is the built-in kind of that group and plural.
    pub(crate) fn is(&self, group: &str, plural: &str) -> bool {
        &*self.group == group && &*self.plural == plural
    }

    pub(crate) fn has_subresource(&self, version: &Version, name: &str) -> bool {
        match (name, self.row()) {
            (_, Some(row)) => row.subresources.contains(&name),
            ("status", None) => version.status,
            ("scale", None) => version.scale.is_some(),
            _ => false,
        }
    }
}

/// `v1`, or `apps/v1`.
pub(crate) fn group_version(group: &str, version: &str) -> String {
    if group.is_empty() {
        version.to_owned()
    } else {
        format!("{group}/{version}")
    }
}

/// Split `apps/v1` or `v1`.
pub(crate) fn split_group_version(api_version: &str) -> (&str, &str) {
    api_version.split_once('/').unwrap_or(("", api_version))
}

/// All kinds by group and plural. Replaced as a whole when a CRD changes.
#[derive(Debug, Clone, Default)]
pub(crate) struct Registry {
    kinds: BTreeMap<(Arc<str>, Arc<str>), Arc<Kind>>,
    by_resource: BTreeMap<ResourceId, Arc<Kind>>,
}

impl Registry {
    pub(crate) fn builtin() -> Self {
        let mut registry = Self::default();
        for row in rows() {
            registry.insert(Arc::new(from_row(row)));
        }
        registry
    }

    pub(crate) fn insert(&mut self, kind: Arc<Kind>) {
        // The first kind of a shared place is the one that stored objects are read as.
        let owner = self
            .by_resource
            .get(&kind.resource)
            .is_none_or(|k| k.group == kind.group);
        if owner {
            self.by_resource.insert(kind.resource.clone(), kind.clone());
        }
        self.kinds.insert((kind.group.clone(), kind.plural.clone()), kind);
    }

    pub(crate) fn remove(&mut self, group: &str, plural: &str) {
        if let Some(kind) = self.kinds.remove(&(group.into(), plural.into())) {
            self.by_resource.remove(&kind.resource);
        }
    }

    pub(crate) fn get(&self, group: &str, plural: &str) -> Option<&Arc<Kind>> {
        self.kinds.get(&(group.into(), plural.into()))
    }

    pub(crate) fn by_resource(&self, resource: &str) -> Option<&Arc<Kind>> {
        self.by_resource.get(resource)
    }

    pub(crate) fn by_kind(&self, group: &str, kind: &str) -> Option<&Arc<Kind>> {
        self.kinds
            .values()
            .find(|k| &*k.group == group && &*k.kind == kind)
    }

    pub(crate) fn all(&self) -> impl Iterator<Item = &Arc<Kind>> {
        self.kinds.values()
    }

    pub(crate) fn has_group_version(&self, group: &str, version: &str) -> bool {
        self.kinds
            .values()
            .any(|k| &*k.group == group && k.version(version).is_some())
    }
}

fn from_row(row: &'static Row) -> Kind {
    let schema = schema::builtin(row.schema);
    let zero = schema::zero_value(&schema);
    let strings = |list: &[&str]| list.iter().map(|s| (*s).to_owned()).collect();
    Kind {
        group: row.group.into(),
        plural: row.plural.into(),
        singular: row.singular.into(),
        kind: row.kind.into(),
        list_kind: format!("{}List", row.kind),
        short_names: strings(row.short_names),
        categories: strings(row.categories),
        namespaced: row.scope == Scope::Namespaced,
        resource: if row.kind == "Event" {
            "/events".into()
        } else {
            format!("{}/{}", row.group, row.plural).into()
        },
        versions: vec![Version {
            name: row.version.into(),
            schema: Arc::new(schema),
            zero,
            served: true,
            storage: true,
            deprecation: None,
            status: row.subresources.contains(&"status"),
            scale: row.subresources.contains(&"scale").then(|| ScalePaths {
                spec: ".spec.replicas".into(),
                status: ".status.replicas".into(),
                selector: None,
            }),
            columns: Vec::new(),
            selectable: Vec::new(),
            open_api: None,
        }],
        origin: Origin::Builtin(row),
    }
}

/// Whether a field selector may name `path` for this kind.
pub(crate) fn selectable(kind: &Kind, version: &Version, path: &str) -> bool {
    if path == "metadata.name" || (path == "metadata.namespace" && kind.namespaced) {
        return true;
    }
    let builtin: &[&str] = match kind.row().map(|r| (r.group, r.plural)) {
        Some(("", "pods")) => &[
            "spec.nodeName",
            "spec.restartPolicy",
            "spec.schedulerName",
            "spec.serviceAccountName",
            "spec.hostNetwork",
            "status.phase",
            "status.podIP",
            "status.podIPs",
            "status.nominatedNodeName",
        ],
        Some((_, "events")) => &[
            "involvedObject.kind",
            "involvedObject.namespace",
            "involvedObject.name",
            "involvedObject.uid",
            "involvedObject.apiVersion",
            "involvedObject.resourceVersion",
            "involvedObject.fieldPath",
            "regarding.kind",
            "regarding.namespace",
            "regarding.name",
            "regarding.uid",
            "regarding.apiVersion",
            "regarding.resourceVersion",
            "regarding.fieldPath",
            "reason",
            "reportingComponent",
            "reportingController",
            "source",
            "type",
        ],
        Some(("", "nodes")) => &["spec.unschedulable"],
        Some(("", "namespaces")) => &["status.phase", "name"],
        Some(("", "secrets")) => &["type"],
        Some(("", "services")) => &["spec.clusterIP", "spec.type"],
        Some(("", "replicationcontrollers")) => &["status.replicas"],
        Some(("batch", "jobs")) => &["status.successful"],
        _ => &[],
    };
    builtin.contains(&path) || version.selectable.iter().any(|s| s == path)
}
