//! What Kubernetes fills in for the built-in kinds, so that stored objects look real.

pub(crate) mod addresses;
mod pods;
mod services;
mod workloads;

use serde_json::{Map, Value, json};

use crate::error::{ApiResult, FieldError};
use crate::hub::Hub;
use crate::kinds::Kind;
use crate::meta;

/// Static defaults: a function of the object alone.
pub(crate) fn apply(kind: &Kind, object: &mut Value, live: Option<&Value>) {
    let Some(row) = kind.row() else { return };
    match (row.group, row.plural) {
        ("", "pods") => {
            pods::spec(meta::member_object(object, "spec"));
            pods::scheme(object, live);
        }
        ("", "services") => services::apply(object),
        ("", "namespaces") => namespace(object),
        ("", "secrets") => secret(object),
        ("", "nodes") => node(object),
        ("", "persistentvolumeclaims") => set(
            meta::member_object(object, "spec"),
            "volumeMode",
            json!("Filesystem"),
        ),
        ("", "persistentvolumes") => workloads::volume(object),
        ("", "limitranges") => workloads::limit_range(object),
        ("", "podtemplates") => pods::template(meta::member_object(object, "template")),
        ("apps" | "batch", _) | ("", "replicationcontrollers") => workloads::apply(row.plural, object),
        ("networking.k8s.io", "networkpolicies") => workloads::network_policy(object),
        ("rbac.authorization.k8s.io", "rolebindings" | "clusterrolebindings") => {
            workloads::role_binding(object)
        }
        ("storage.k8s.io", "storageclasses") => {
            set(meta::as_object_mut(object), "reclaimPolicy", json!("Delete"));
            set(
                meta::as_object_mut(object),
                "volumeBindingMode",
                json!("Immediate"),
            );
        }
        ("scheduling.k8s.io", "priorityclasses") => set(
            meta::as_object_mut(object),
            "preemptionPolicy",
            json!("PreemptLowerPriority"),
        ),
        ("discovery.k8s.io", "endpointslices") => services::endpoint_slice(object),
        ("", "endpoints") => services::endpoints(object),
        ("autoscaling", _) => workloads::autoscaler(object),
        ("apiextensions.k8s.io", _) => {
            crate::crd::definition::default(object);
        }
        _ => {}
    }
}

/// What the built-in admission plug-ins and the strategy of a kind add: owned by nobody.
pub(crate) fn admit(kind: &Kind, object: &mut Value, live: Option<&Value>) {
    let Some(row) = kind.row() else { return };
    match (row.group, row.plural) {
        ("", "pods") => pods::created(object, live),
        ("", "namespaces") => namespace_created(object, live),
        ("", "persistentvolumeclaims") => workloads::protected(object, live, "kubernetes.io/pvc-protection"),
        ("", "persistentvolumes") => workloads::protected(object, live, "kubernetes.io/pv-protection"),
        ("batch", "jobs") => workloads::job_created(object, live),
        ("apps", "replicasets" | "statefulsets") | ("", "replicationcontrollers") => {
            workloads::counters(row.plural, object, live)
        }
        ("apiextensions.k8s.io", _) if live.is_none() => crate::crd::definition::initial_status(object),
        _ => {}
    }
}

/// Admission plug-ins that look at the rest of the cluster or are a matter of configuration; for new objects only.
pub(crate) fn plugins(hub: &Hub, kind: &Kind, name: &str, object: &mut Value) -> ApiResult<()> {
    if kind.is("", "pods") {
        pods::priority(hub, name, object)?;
        if hub.kubernetes_admission {
            pods::token_volume(&hub.clock.suffix(5), object);
        }
    }
    if kind.is("", "nodes") && hub.kubernetes_admission {
        let taints = meta::member_object(object, "spec")
            .entry("taints")
            .or_insert_with(|| json!([]));
        if let Value::Array(list) = taints {
            list.push(json!({"key": "node.kubernetes.io/not-ready", "effect": "NoSchedule"}));
        }
    }
    Ok(())
}

/// Defaults that need the rest of the cluster: addresses and ports of Services.
pub(crate) fn resolve(
    hub: &Hub,
    kind: &Kind,
    object: &mut Value,
    live: Option<&Value>,
) -> Result<(), Vec<FieldError>> {
    if kind.is("", "services") {
        return hub.addresses.lock().assign(object, live);
    }
    Ok(())
}

/// Set a field that is absent or null.
pub(crate) fn set(map: &mut Map<String, Value>, key: &str, value: Value) {
    if map.get(key).is_none_or(Value::is_null) {
        map.insert(key.to_owned(), value);
    }
}

/// What a node can give away is what it has, until it says less.
fn node(object: &mut Value) {
    let status = meta::member_object(object, "status");
    if !status.contains_key("allocatable")
        && let Some(capacity) = status.get("capacity").cloned()
    {
        status.insert("allocatable".into(), capacity);
    }
}

fn namespace(object: &mut Value) {
    let name = meta::name(object).to_owned();
    if !name.is_empty() {
        let labels = meta::metadata_mut(object)
            .entry("labels")
            .or_insert_with(|| json!({}));
        meta::as_object_mut(labels).insert("kubernetes.io/metadata.name".into(), json!(name));
    }
}

fn namespace_created(object: &mut Value, live: Option<&Value>) {
    if live.is_none() {
        let spec = meta::member_object(object, "spec");
        let finalizers = spec.entry("finalizers").or_insert_with(|| json!([]));
        if let Value::Array(list) = finalizers
            && !list.contains(&json!("kubernetes"))
        {
            list.push(json!("kubernetes"));
        }
        meta::as_object_mut(object).insert("status".into(), json!({"phase": "Active"}));
    }
}

fn secret(object: &mut Value) {
    let map = meta::as_object_mut(object);
    set(map, "type", json!("Opaque"));
    if let Some(Value::Object(strings)) = map.remove("stringData") {
        use base64::Engine as _;
        let data = map.entry("data").or_insert_with(|| json!({}));
        let data = meta::as_object_mut(data);
        for (key, value) in strings {
            let encoded =
                base64::engine::general_purpose::STANDARD.encode(value.as_str().unwrap_or_default());
            data.insert(key, json!(encoded));
        }
    }
}
