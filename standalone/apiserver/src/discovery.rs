//! Discovery: what groups, versions and resources there are, plain and aggregated.

use serde_json::{Map, Value, json};

use crate::kinds::{Kind, Registry, Version, group_version};

const VERBS: [&str; 8] = [
    "create",
    "delete",
    "deletecollection",
    "get",
    "list",
    "patch",
    "update",
    "watch",
];

/// Groups in the order in which clients shall prefer them.
const ORDER: [&str; 14] = [
    "",
    "apps",
    "events.k8s.io",
    "autoscaling",
    "batch",
    "networking.k8s.io",
    "policy",
    "rbac.authorization.k8s.io",
    "storage.k8s.io",
    "apiextensions.k8s.io",
    "scheduling.k8s.io",
    "coordination.k8s.io",
    "discovery.k8s.io",
    "",
];

fn rank(group: &str) -> usize {
    ORDER.iter().position(|g| *g == group).unwrap_or(ORDER.len())
}

/// Group names but for core, in order.
pub(crate) fn groups(registry: &Registry) -> Vec<String> {
    let mut groups: Vec<String> = registry
        .all()
        .map(|k| k.group.to_string())
        .filter(|g| !g.is_empty())
        .collect();
    groups.sort_by(|a, b| (rank(a), a).cmp(&(rank(b), b)));
    groups.dedup();
    groups
}

/// Served versions of a group, preferred first.
pub(crate) fn versions(registry: &Registry, group: &str) -> Vec<String> {
    let mut versions: Vec<String> = registry
        .all()
        .filter(|k| &*k.group == group)
        .flat_map(|k| k.versions.iter().filter(|v| v.served).map(|v| v.name.to_string()))
        .collect();
    versions.sort_by(|a, b| {
        crate::crd::definition::version_order(b).cmp(&crate::crd::definition::version_order(a))
    });
    versions.dedup();
    versions
}

/// Kubernetes lists the verbs of custom resources in another order.
const CUSTOM_VERBS: [&str; 8] = [
    "delete",
    "deletecollection",
    "get",
    "list",
    "patch",
    "create",
    "update",
    "watch",
];

fn verbs(kind: &Kind) -> Vec<&'static str> {
    if kind.is_custom() {
        return CUSTOM_VERBS.to_vec();
    }
    let no_collection_delete = kind.is("", "namespaces");
    VERBS
        .into_iter()
        .filter(|v| !(no_collection_delete && *v == "deletecollection"))
        .collect()
}

/// Kinds of a group version by plural name.
pub(crate) fn members<'a>(
    registry: &'a Registry,
    group: &str,
    version: &str,
) -> Vec<(&'a Kind, &'a Version)> {
    registry
        .all()
        .filter(|k| &*k.group == group)
        .filter_map(|k| k.version(version).map(|v| (&**k, v)))
        .collect()
}

fn subresources(kind: &Kind, version: &Version) -> Vec<&'static str> {
    match kind.row() {
        Some(row) => row.subresources.to_vec(),
        None => [("status", version.status), ("scale", version.scale.is_some())]
            .into_iter()
            .filter(|(_, there)| *there)
            .map(|(name, _)| name)
            .collect(),
    }
}

fn subresource_verbs(name: &str) -> &'static [&'static str] {
    match name {
        "log" => &["get"],
        "finalize" => &["update"],
        _ => &["get", "patch", "update"],
    }
}

pub(crate) fn group(registry: &Registry, name: &str) -> Option<Value> {
    let versions = versions(registry, name);
    let preferred = versions.first()?;
    let list: Vec<Value> = versions
        .iter()
        .map(|v| json!({"groupVersion": group_version(name, v), "version": v}))
        .collect();
    Some(json!({
        "kind": "APIGroup", "apiVersion": "v1", "name": name, "versions": list,
        "preferredVersion": {"groupVersion": group_version(name, preferred), "version": preferred},
    }))
}

pub(crate) fn group_list(registry: &Registry) -> Value {
    let groups: Vec<Value> = groups(registry)
        .iter()
        .filter_map(|g| group(registry, g))
        .map(|mut g| {
            if let Some(map) = g.as_object_mut() {
                map.remove("kind");
                map.remove("apiVersion");
            }
            g
        })
        .collect();
    json!({"kind": "APIGroupList", "apiVersion": "v1", "groups": groups})
}

/// The APIResourceList of a group version.
pub(crate) fn resources(registry: &Registry, group: &str, version: &str) -> Option<Value> {
    if !registry.has_group_version(group, version) {
        return None;
    }
    let mut list = Vec::new();
    for (kind, v) in members(registry, group, version) {
        let mut entry = Map::new();
        entry.insert("name".into(), json!(&*kind.plural));
        entry.insert("singularName".into(), json!(kind.singular));
        entry.insert("namespaced".into(), json!(kind.namespaced));
        entry.insert("kind".into(), json!(&*kind.kind));
        entry.insert("verbs".into(), json!(verbs(kind)));
        if !kind.short_names.is_empty() {
            entry.insert("shortNames".into(), json!(kind.short_names));
        }
        if !kind.categories.is_empty() {
            entry.insert("categories".into(), json!(kind.categories));
        }
        entry.insert("storageVersionHash".into(), json!(storage_hash(kind)));
        list.push(Value::Object(entry));
        for sub in subresources(kind, v) {
            let mut entry = Map::new();
            entry.insert("name".into(), json!(format!("{}/{sub}", kind.plural)));
            entry.insert("singularName".into(), json!(""));
            entry.insert("namespaced".into(), json!(kind.namespaced));
            if sub == "scale" {
                entry.insert("group".into(), json!("autoscaling"));
                entry.insert("version".into(), json!("v1"));
                entry.insert("kind".into(), json!("Scale"));
            } else {
                entry.insert("kind".into(), json!(&*kind.kind));
            }
            entry.insert("verbs".into(), json!(subresource_verbs(sub)));
            list.push(Value::Object(entry));
        }
    }
    Some(
        json!({"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": group_version(group, version), "resources": list}),
    )
}

/// Changes exactly when the storage version of the kind does.
fn storage_hash(kind: &Kind) -> String {
    use base64::Engine as _;
    use sha2::{Digest as _, Sha256};
    let version = kind.storage_version().map_or("", |v| &v.name);
    let digest = Sha256::digest(format!("{}/{version}/{}", kind.group, kind.kind));
    base64::engine::general_purpose::STANDARD.encode(&digest[..8])
}

/// The aggregated form of `/api` (core) or `/apis`.
pub(crate) fn aggregated(registry: &Registry, core: bool) -> Value {
    let names = if core {
        vec![String::new()]
    } else {
        groups(registry)
    };
    let items: Vec<Value> = names
        .iter()
        .map(|group| {
            let versions: Vec<Value> = versions(registry, group)
                .iter()
                .map(|version| {
                    let resources: Vec<Value> = members(registry, group, version)
                        .into_iter()
                        .map(|(k, v)| aggregated_resource(k, v))
                        .collect();
                    json!({"version": version, "resources": resources, "freshness": "Current"})
                })
                .collect();
            let metadata = if core { json!({}) } else { json!({"name": group}) };
            json!({"metadata": metadata, "versions": versions})
        })
        .collect();
    json!({"kind": "APIGroupDiscoveryList", "apiVersion": "apidiscovery.k8s.io/v2", "metadata": {}, "items": items})
}

fn aggregated_resource(kind: &Kind, version: &Version) -> Value {
    let (group, name) = if kind.is_custom() {
        (&*kind.group, &*version.name)
    } else {
        ("", "")
    };
    let mut out = Map::new();
    out.insert("resource".into(), json!(&*kind.plural));
    out.insert(
        "responseKind".into(),
        json!({"group": group, "version": name, "kind": &*kind.kind}),
    );
    out.insert(
        "scope".into(),
        json!(if kind.namespaced { "Namespaced" } else { "Cluster" }),
    );
    out.insert("singularResource".into(), json!(kind.singular));
    out.insert("verbs".into(), json!(verbs(kind)));
    if !kind.short_names.is_empty() {
        out.insert("shortNames".into(), json!(kind.short_names));
    }
    if !kind.categories.is_empty() {
        out.insert("categories".into(), json!(kind.categories));
    }
    let subs: Vec<Value> = subresources(kind, version)
        .into_iter()
        .map(|sub| {
            let response = if sub == "scale" {
                json!({"group": "autoscaling", "version": "v1", "kind": "Scale"})
            } else {
                json!({"group": group, "version": name, "kind": &*kind.kind})
            };
            json!({"subresource": sub, "responseKind": response, "verbs": subresource_verbs(sub)})
        })
        .collect();
    if !subs.is_empty() {
        out.insert("subresources".into(), Value::Array(subs));
    }
    Value::Object(out)
}

/// `/`: every path that leads somewhere.
pub(crate) fn root_paths(registry: &Registry) -> Vec<String> {
    let mut paths = vec![
        "/api".to_owned(),
        "/api/v1".to_owned(),
        "/apis".to_owned(),
        "/apis/".to_owned(),
    ];
    for group in groups(registry) {
        paths.push(format!("/apis/{group}"));
        for version in versions(registry, &group) {
            paths.push(format!("/apis/{group}/{version}"));
        }
    }
    for path in [
        "/healthz",
        "/healthz/ping",
        "/healthz/storage",
        "/livez",
        "/metrics",
        "/openapi/v3",
        "/openapi/v3/",
        "/readyz",
        "/version",
    ] {
        paths.push(path.to_owned());
    }
    paths.sort();
    paths
}
