//! What a kind does around a write: system fields, which half of the object an endpoint may change, generation, finalizers.

use serde_json::{Map, Value, json};

use crate::kinds::{Kind, Version};
use crate::meta;

/// Whether the status of this kind can be written only through its subresource.
fn separates_status(kind: &Kind, version: &Version) -> bool {
    version.status || kind.has_subresource(version, "status")
}

fn has_generation(kind: &Kind) -> bool {
    kind.row().is_none_or(crate::kinds::Row::has_generation)
}

/// Paths that an endpoint cannot change, hence cannot own.
pub(crate) fn reset_fields(kind: &Kind, subresource: &str) -> &'static [&'static str] {
    match (kind.row().map(|r| r.plural), subresource) {
        (_, "status") if kind.is_custom() => &["spec"],
        (Some("deployments" | "daemonsets" | "statefulsets" | "replicasets"), "status") => {
            &["spec", "metadata.labels"]
        }
        (Some("pods"), "status") => &["spec", "metadata.deletionTimestamp", "metadata.ownerReferences"],
        (_, "status") => &["spec"],
        (Some("events" | "configmaps" | "secrets" | "leases"), _) => &[],
        (_, _) if kind.versions.iter().any(|v| v.status) => &["status"],
        _ => &[],
    }
}

/// System fields of a new object.
pub(crate) fn prepare_create(kind: &Kind, object: &mut Value, now: &str, uid: impl FnOnce() -> String) {
    let metadata = meta::metadata_mut(object);
    for field in [
        "resourceVersion",
        "selfLink",
        "deletionTimestamp",
        "deletionGracePeriodSeconds",
    ] {
        metadata.remove(field);
    }
    metadata.insert("uid".into(), json!(uid()));
    metadata.insert("creationTimestamp".into(), json!(now));
    if has_generation(kind) {
        metadata.insert("generation".into(), json!(1));
    }
    let version = kind.versions.first();
    let Some(version) = version else { return };
    if separates_status(kind, version) {
        let map = meta::as_object_mut(object);
        match kind.row() {
            // Nodes and Services may bring a status of their own at creation; the rest starts empty.
            Some(row) if row.plural == "nodes" => {}
            Some(_) => match version.zero.get("status") {
                Some(zero) => {
                    map.insert("status".into(), zero.clone());
                }
                None => {
                    map.remove("status");
                }
            },
            None => {
                map.remove("status");
            }
        }
    }
}

/// What an update through an endpoint may not touch is taken from the live object.
pub(crate) fn prepare_update(
    kind: &Kind,
    version: &Version,
    subresource: &str,
    object: &mut Value,
    live: &Value,
) {
    let live_meta = meta::metadata(live).clone();
    let metadata = meta::metadata_mut(object);
    for field in [
        "uid",
        "creationTimestamp",
        "deletionTimestamp",
        "deletionGracePeriodSeconds",
        "generation",
        "selfLink",
        "generateName",
    ] {
        match live_meta.get(field) {
            Some(value) if field != "generateName" || !metadata.contains_key(field) => {
                metadata.insert(field.into(), value.clone());
            }
            Some(_) => {}
            None => {
                metadata.remove(field);
            }
        }
    }
    let keep = |object: &mut Value, field: &str| {
        let map = meta::as_object_mut(object);
        match live.get(field) {
            Some(value) => {
                map.insert(field.to_owned(), value.clone());
            }
            None => {
                map.remove(field);
            }
        }
    };
    if subresource == "status" {
        let managed = metadata.get("managedFields").cloned();
        if kind.is_custom() {
            // Only status changes; of metadata nothing but the bookkeeping.
            let status = object.get("status").cloned();
            *object = live.clone();
            let map = meta::as_object_mut(object);
            match status {
                Some(status) => {
                    map.insert("status".into(), status);
                }
                None => {
                    map.remove("status");
                }
            }
            if let Some(managed) = managed {
                meta::metadata_mut(object).insert("managedFields".into(), managed);
            }
        } else {
            keep(object, "spec");
            let labels = match kind.row().map(|r| r.plural) {
                Some(
                    "deployments" | "replicasets" | "daemonsets" | "statefulsets" | "replicationcontrollers",
                ) => &["labels"][..],
                Some("pods") => &["ownerReferences"][..],
                _ => &[],
            };
            for field in labels {
                let metadata = meta::metadata_mut(object);
                match live_meta.get(*field) {
                    Some(value) => {
                        metadata.insert((*field).into(), value.clone());
                    }
                    None => {
                        metadata.remove(*field);
                    }
                }
            }
        }
    } else if separates_status(kind, version) {
        keep(object, "status");
    }
    if kind.is("", "namespaces") && subresource.is_empty() {
        // spec.finalizers changes only through the finalize subresource.
        keep(object, "spec");
    }
}

/// Count the generation up when the specification changed or deletion began.
pub(crate) fn bump_generation(kind: &Kind, version: &Version, object: &mut Value, live: &Value) {
    if !has_generation(kind) {
        return;
    }
    let without = |v: &Value| -> Map<String, Value> {
        let mut map = v.as_object().cloned().unwrap_or_default();
        map.remove("metadata");
        map.remove("apiVersion");
        map.remove("kind");
        if separates_status(kind, version) {
            map.remove("status");
        }
        map
    };
    let changed = if kind.is_custom()
        || kind.is("networking.k8s.io", "ingressclasses")
        || meta::at(object, "spec").is_none()
    {
        without(object) != without(live)
    } else {
        object.get("spec") != live.get("spec")
    };
    if changed {
        let next = meta::generation(live) + 1;
        meta::metadata_mut(object).insert("generation".into(), json!(next));
    }
}

/// An object whose deletion waited for its finalizers, the last of which is gone.
pub(crate) fn is_finished(kind: &Kind, object: &Value) -> bool {
    if !meta::is_terminating(object) || meta::finalizers(object).next().is_some() {
        return false;
    }
    if kind.is("", "namespaces") {
        return meta::list_at(object, "spec.finalizers").is_empty();
    }
    meta::metadata(object)
        .get("deletionGracePeriodSeconds")
        .and_then(Value::as_i64)
        .unwrap_or(0)
        == 0
}

/// Conditions that admission made get their time.
pub(crate) fn stamp_conditions(object: &mut Value, now: &str) {
    let status = meta::member_object(object, "status");
    let Some(Value::Array(conditions)) = status.get_mut("conditions") else {
        return;
    };
    for condition in conditions.iter_mut().filter_map(Value::as_object_mut) {
        if condition.get("lastTransitionTime").is_none_or(Value::is_null) {
            condition.insert("lastTransitionTime".into(), now.into());
        }
    }
}
