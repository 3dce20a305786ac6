//! OpenAPI v3 per group version: enough for `kubectl apply`, `diff`, `create` and `explain` (without prose).

use std::collections::{BTreeSet, HashMap};
use std::fmt::Write as _;
use std::sync::LazyLock;

use serde_json::{Map, Value, json};
use sha2::{Digest as _, Sha256};

use crate::discovery;
#[cfg(test)]
use crate::kinds::group_version;
use crate::kinds::{Kind, Registry, Version};
use crate::schema::{self, ListKind, Scalar, Schema, Shape};

fn path_of(group: &str, version: &str) -> String {
    if group.is_empty() {
        format!("api/{version}")
    } else {
        format!("apis/{group}/{version}")
    }
}

/// `/openapi/v3`.
pub(crate) fn index(registry: &Registry) -> Value {
    let mut paths = Map::new();
    let mut groups = discovery::groups(registry);
    groups.push(String::new());
    for group in groups {
        for version in discovery::versions(registry, &group) {
            let path = path_of(&group, &version);
            let hash = hash(registry, &group, &version);
            paths.insert(
                path.clone(),
                json!({"serverRelativeURL": format!("/openapi/v3/{path}?hash={hash}")}),
            );
        }
    }
    json!({ "paths": paths })
}

/// Names the state of a group version without building its document: built-in types never change, CRD schemas are hashed.
fn hash(registry: &Registry, group: &str, version: &str) -> String {
    let mut digest = Sha256::new();
    digest.update(env!("CARGO_PKG_VERSION"));
    for (kind, v) in discovery::members(registry, group, version) {
        digest.update(kind.kind.as_bytes());
        if let Some(schema) = &v.open_api {
            digest.update(schema.to_string());
        }
    }
    let mut out = String::new();
    for b in digest.finalize().iter().take(16) {
        let _ = write!(out, "{b:02X}");
    }
    out
}

/// `/openapi/v3/apis/apps/v1`.
pub(crate) fn document(registry: &Registry, segments: &[&str]) -> Option<Value> {
    let (group, version) = match segments {
        ["api", version] => ("", *version),
        ["apis", group, version] => (*group, *version),
        _ => return None,
    };
    if !registry.has_group_version(group, version) {
        return None;
    }
    let mut paths = Map::new();
    let mut schemas = Map::new();
    let mut wanted: BTreeSet<String> = BTreeSet::new();
    wanted.insert("meta.v1.DeleteOptions".into());
    wanted.insert("meta.v1.ObjectMeta".into());
    for (kind, v) in discovery::members(registry, group, version) {
        add_paths(kind, v, &mut paths);
        match (kind.row(), &v.open_api) {
            (Some(row), _) => {
                wanted.insert(row.schema.to_owned());
            }
            (None, Some(custom)) => {
                schemas.insert(custom_name(kind, v), custom_schema(kind, v, custom));
            }
            (None, None) => {}
        }
    }
    add_types(&wanted, registry, &mut schemas);
    Some(json!({
        "openapi": "3.0.0", "info": {"title": "Kubernetes", "version": super::http::roots::VERSION},
        "paths": paths, "components": {"schemas": schemas},
    }))
}

fn full_name(short: &str) -> String {
    match short {
        "Quantity" => "io.k8s.apimachinery.pkg.api.resource.Quantity".into(),
        "IntOrString" => "io.k8s.apimachinery.pkg.util.intstr.IntOrString".into(),
        _ if short.starts_with("meta.v1.") => format!("io.k8s.apimachinery.pkg.apis.{short}"),
        _ if short.starts_with("runtime.") => format!("io.k8s.apimachinery.pkg.{short}"),
        _ if short.starts_with("apiextensions.") => {
            format!("io.k8s.apiextensions-apiserver.pkg.apis.{short}")
        }
        _ => format!("io.k8s.api.{short}"),
    }
}

fn custom_name(kind: &Kind, version: &Version) -> String {
    let mut parts: Vec<&str> = kind.group.split('.').collect();
    parts.reverse();
    format!("{}.{}.{}", parts.join("."), version.name, kind.kind)
}

fn gvk(kind: &Kind, version: &Version) -> Value {
    json!({"group": &*kind.group, "kind": &*kind.kind, "version": &*version.name})
}

fn custom_schema(kind: &Kind, version: &Version, custom: &Value) -> Value {
    let mut schema = custom.clone();
    let map = crate::meta::as_object_mut(&mut schema);
    let properties = crate::meta::as_object_mut(map.entry("properties").or_insert_with(|| json!({})));
    properties.insert("apiVersion".into(), json!({"type": "string"}));
    properties.insert("kind".into(), json!({"type": "string"}));
    properties.insert("metadata".into(), reference("meta.v1.ObjectMeta"));
    explain("", &mut schema);
    let map = crate::meta::as_object_mut(&mut schema);
    map.insert(
        "x-kubernetes-group-version-kind".into(),
        json!([gvk(kind, version)]),
    );
    schema
}

fn reference(short: &str) -> Value {
    json!({"allOf": [{"$ref": format!("#/components/schemas/{}", full_name(short))}], "default": {}})
}

fn add_paths(kind: &Kind, version: &Version, paths: &mut Map<String, Value>) {
    let base = format!("/{}", path_of(&kind.group, &version.name));
    let collection = if kind.namespaced {
        format!("{base}/namespaces/{{namespace}}/{}", kind.plural)
    } else {
        format!("{base}/{}", kind.plural)
    };
    let schema = match kind.row() {
        Some(row) => full_name(row.schema),
        None => custom_name(kind, version),
    };
    let body = |media: &[&str]| {
        let content: Map<String, Value> = media
            .iter()
            .map(|m| {
                (
                    (*m).to_owned(),
                    json!({"schema": {"$ref": format!("#/components/schemas/{schema}")}}),
                )
            })
            .collect();
        json!({"content": content, "required": true})
    };
    let parameters = |names: &[&str]| -> Vec<Value> {
        names
            .iter()
            .map(|n| {
                let kind = if *n == "force" { "boolean" } else { "string" };
                json!({"name": n, "in": "query", "schema": {"type": kind, "uniqueItems": true}})
            })
            .collect()
    };
    let operation = |action: &str, names: &[&str]| {
        json!({
            "parameters": parameters(names),
            "responses": {"200": {"description": "OK", "content": {"application/json": {"schema": {"$ref": format!("#/components/schemas/{schema}")}}}}},
            "x-kubernetes-action": action, "x-kubernetes-group-version-kind": gvk(kind, version),
        })
    };
    let write = ["dryRun", "fieldManager", "fieldValidation"];
    let mut post = operation("post", &write);
    post["requestBody"] = body(&["application/json"]);
    let mut put = operation("put", &write);
    put["requestBody"] = body(&["application/json"]);
    let mut patch = operation("patch", &["dryRun", "fieldManager", "fieldValidation", "force"]);
    let mut media = vec![
        "application/apply-patch+yaml",
        "application/json-patch+json",
        "application/merge-patch+json",
    ];
    if !kind.is_custom() {
        media.push("application/strategic-merge-patch+json");
    }
    patch["requestBody"] = body(&media);
    paths.insert(
        collection.clone(),
        json!({"get": operation("list", &["labelSelector", "fieldSelector", "limit", "continue", "watch"]), "post": post, "delete": operation("deletecollection", &["labelSelector", "fieldSelector", "dryRun"])}),
    );
    paths.insert(
        format!("{collection}/{{name}}"),
        json!({"get": operation("get", &[]), "put": put, "patch": patch, "delete": operation("delete", &["dryRun", "gracePeriodSeconds", "propagationPolicy"])}),
    );
}

/// Types by name with everything they refer to.
fn add_types(roots: &BTreeSet<String>, registry: &Registry, out: &mut Map<String, Value>) {
    let mut queue: Vec<String> = roots.iter().cloned().collect();
    let mut done: BTreeSet<String> = BTreeSet::new();
    while let Some(name) = queue.pop() {
        if !done.insert(name.clone()) {
            continue;
        }
        let schema = schema::builtin(&name);
        let mut value = describe(schema.resolve(), &mut queue);
        explain(&name, &mut value);
        if let Some(kind) = registry.all().find(|k| k.row().is_some_and(|r| r.schema == name))
            && let Some(version) = kind.versions.first()
        {
            value["x-kubernetes-group-version-kind"] = json!([gvk(kind, version)]);
        }
        out.insert(full_name(&name), value);
    }
}

/// What types and fields are for, as `type[.field]<TAB>sentence`: of the kinds that people write most.
static PROSE: LazyLock<HashMap<&str, &str>> = LazyLock::new(|| {
    include_str!("schema/prose.tsv")
        .lines()
        .filter_map(|line| line.split_once('\t'))
        .collect()
});

/// Adds what is known of a type and its fields.
fn explain(name: &str, described: &mut Value) {
    if let Some(text) = PROSE.get(name) {
        described["description"] = json!(text);
    }
    let Some(properties) = described.get_mut("properties").and_then(Value::as_object_mut) else {
        return;
    };
    let kind_has_objects = properties.contains_key("metadata");
    for (field, value) in properties {
        let own = PROSE.get(format!("{name}.{field}").as_str()).copied();
        let common = match field.as_str() {
            "apiVersion" if kind_has_objects => Some("The group and version that the object is written in."),
            "kind" if kind_has_objects => Some("What kind of object it is."),
            "metadata" => Some("Its name, labels and what else every object has."),
            _ => None,
        };
        if let Some(text) = own.or(common) {
            value["description"] = json!(text);
        }
    }
}

fn describe(schema: &Schema, queue: &mut Vec<String>) -> Value {
    match &schema.shape {
        Shape::Any => json!({}),
        Shape::Open => json!({"type": "object"}),
        Shape::Scalar(scalar) => match scalar {
            Scalar::String => json!({"type": "string"}),
            Scalar::Int32 => json!({"type": "integer", "format": "int32"}),
            Scalar::Int64 => json!({"type": "integer", "format": "int64"}),
            Scalar::Number => json!({"type": "number", "format": "double"}),
            Scalar::Boolean => json!({"type": "boolean"}),
            Scalar::Bytes => json!({"type": "string", "format": "byte"}),
            Scalar::IntOrString => {
                json!({"format": "int-or-string", "oneOf": [{"type": "integer"}, {"type": "string"}]})
            }
            Scalar::Quantity => json!({"oneOf": [{"type": "string"}, {"type": "number"}]}),
            Scalar::Time | Scalar::MicroTime => json!({"type": "string", "format": "date-time"}),
        },
        Shape::List { item, kind } => {
            let mut out = json!({"type": "array", "items": describe(item, queue)});
            match kind {
                ListKind::Atomic => out["x-kubernetes-list-type"] = json!("atomic"),
                ListKind::Set => out["x-kubernetes-list-type"] = json!("set"),
                ListKind::Map(keys) => {
                    out["x-kubernetes-list-type"] = json!("map");
                    out["x-kubernetes-list-map-keys"] = json!(keys.iter().map(|k| &**k).collect::<Vec<_>>());
                }
            }
            out
        }
        Shape::Map { value } => json!({"type": "object", "additionalProperties": describe(value, queue)}),
        Shape::Ref(id) => {
            let name = schema::builtin_name(*id);
            queue.push(name.to_owned());
            reference(name)
        }
        Shape::Struct(s) => {
            let mut properties = Map::new();
            let mut required = Vec::new();
            for (name, field) in &s.fields {
                let mut value = describe(&field.schema, queue);
                if let Some(key) = &field.schema.patch.merge_key {
                    value["x-kubernetes-patch-merge-key"] = json!(&**key);
                }
                let strategies: Vec<&str> = [
                    (field.schema.patch.merge, "merge"),
                    (field.schema.patch.retain_keys, "retainKeys"),
                ]
                .into_iter()
                .filter(|(on, _)| *on)
                .map(|(_, n)| n)
                .collect();
                if !strategies.is_empty() {
                    value["x-kubernetes-patch-strategy"] = json!(strategies.join(","));
                }
                properties.insert(name.to_string(), value);
                if field.required {
                    required.push(name.to_string());
                }
            }
            let mut out = json!({"type": "object", "properties": properties});
            if !required.is_empty() {
                out["required"] = json!(required);
            }
            if schema.atomic {
                out["x-kubernetes-map-type"] = json!("atomic");
            }
            out
        }
    }
}

/// `group/version` of everything that has a document, for tests of completeness.
#[cfg(test)]
fn documented(registry: &Registry) -> Vec<String> {
    let mut out: Vec<String> = registry
        .all()
        .flat_map(|k| k.versions.iter().map(|v| group_version(&k.group, &v.name)))
        .collect();
    out.sort();
    out.dedup();
    out
}

/// OpenAPI v2 as an empty document: kinds are described in v3. kubectl asks for it when it does not find a kind there, and takes a
/// missing one for a failure of the server instead of saying that the kind does not exist.
pub(crate) fn version_two(accept: Option<&http::HeaderValue>) -> http::Response<axum::body::Body> {
    let wants_protobuf = accept
        .and_then(|value| value.to_str().ok())
        .is_some_and(|value| value.contains("proto-openapi.spec.v2"));
    if !wants_protobuf {
        let document =
            serde_json::json!({"swagger": "2.0", "info": {"title": TITLE, "version": VERSION}, "paths": {}});
        return crate::http::respond::json(200, &document, &[]);
    }
    // gnostic's Document { swagger = 1, info = 2 { title = 1, version = 2 } }; all lengths are below 128.
    let field = |number: u8, bytes: &[u8]| [&[(number << 3) | 2, bytes.len() as u8], bytes].concat();
    let info = [field(1, TITLE.as_bytes()), field(2, VERSION.as_bytes())].concat();
    let document = [field(1, b"2.0"), field(2, &info)].concat();
    crate::http::respond::bytes(
        200,
        document.into(),
        "application/com.github.proto-openapi.spec.v2.v1.0+protobuf",
        &[],
    )
}

const TITLE: &str = "Kubernetes";
const VERSION: &str = "v1.35";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_group_version_has_a_document_whose_references_resolve() {
        let registry = Registry::builtin();
        assert!(documented(&registry).len() > 8);
        let index = index(&registry);
        for path in index["paths"].as_object().expect("paths").keys() {
            let segments: Vec<&str> = path.split('/').collect();
            let document = document(&registry, &segments).expect("a document");
            let text = document.to_string();
            for found in text.split("#/components/schemas/").skip(1) {
                let name = found.split('"').next().unwrap_or_default();
                assert!(
                    document["components"]["schemas"].get(name).is_some(),
                    "{path}: {name}"
                );
            }
        }
    }

    #[test]
    fn what_is_explained_exists() {
        let types: HashMap<&str, &Schema> = schema::builtin_types().collect();
        for name in PROSE.keys() {
            let field = name
                .rsplit_once('.')
                .is_some_and(|(owner, field)| types.get(owner).is_some_and(|owner| owner.member(field).1));
            assert!(types.contains_key(name) || field, "{name}");
        }
        let registry = Registry::builtin();
        let document = document(&registry, &["apis", "apps", "v1"]).expect("a document");
        let schemas = &document["components"]["schemas"];
        let replicas = &schemas["io.k8s.api.apps.v1.DeploymentSpec"]["properties"]["replicas"];
        assert!(replicas["description"].is_string(), "{replicas}");
        let kind = &schemas["io.k8s.api.apps.v1.Deployment"]["properties"]["kind"];
        assert!(kind["description"].is_string(), "{kind}");
    }

    #[test]
    fn the_patch_operation_tells_kubectl_that_field_validation_is_supported() {
        let registry = Registry::builtin();
        let document = document(&registry, &["apis", "apps", "v1"]).expect("a document");
        let patch = &document["paths"]["/apis/apps/v1/namespaces/{namespace}/deployments/{name}"]["patch"];
        assert_eq!(patch["x-kubernetes-group-version-kind"]["kind"], "Deployment");
        assert!(patch["parameters"].to_string().contains("fieldValidation"));
    }
}
