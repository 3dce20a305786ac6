//! Would a server-side apply change anything? Answered without asking the server, from the field set that it keeps
//! for our field manager (`metadata.managedFields[].fieldsV1`).
//!
//! The field set says which fields of the live object are ours and how lists are keyed, so no schema is needed. An apply
//! changes nothing when the desired object has exactly the fields of the set and the live values are the desired ones.
//! Where that cannot be seen from here (a quantity that the server rewrote, a list whose key was defaulted in an unusual
//! way) the answer is *no*, and the server is asked; the caller remembers the server's answer by [`projection`].

use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

/// Fields of `metadata` that identify an object and never appear in a field set.
const IDENTITY: [&str; 2] = ["name", "namespace"];

/// The field set of `manager`'s server-side apply, if it ever applied the object.
pub(crate) fn applied_by<'a>(live: &'a Value, manager: &str) -> Option<&'a Value> {
    live.pointer("/metadata/managedFields")?
        .as_array()?
        .iter()
        .find(|e| {
            e["manager"] == manager
                && e["operation"] == "Apply"
                && e.get("subresource")
                    .and_then(Value::as_str)
                    .unwrap_or("")
                    .is_empty()
        })?
        .get("fieldsV1")
}

/// Whether applying `desired` over `live` would be without effect. `owned` is our field set.
pub(crate) fn unchanged(desired: &Value, live: &Value, owned: &Value) -> bool {
    let (Some(desired), Some(live), Some(owned)) = (desired.as_object(), live.as_object(), owned.as_object())
    else {
        return false;
    };
    let is_root_identity = |key: &str| matches!(key, "apiVersion" | "kind");
    object_same(desired, live, owned, &|key| is_root_identity(key), true)
}

fn is_leaf(owned: &Value) -> bool {
    owned.as_object().is_some_and(|o| o.keys().all(|k| k == "."))
}

fn object_same(
    desired: &Map<String, Value>,
    live: &Map<String, Value>,
    owned: &Map<String, Value>,
    skip: &dyn Fn(&str) -> bool,
    root: bool,
) -> bool {
    let gone = owned
        .keys()
        .filter_map(|k| k.strip_prefix("f:"))
        .any(|key| !desired.contains_key(key));
    if gone {
        return false;
    }
    for (key, want) in desired {
        if skip(key) {
            continue;
        }
        let Some(have) = live.get(key) else { return false };
        let below = owned.get(&format!("f:{key}"));
        if root && key == "metadata" {
            let (Some(want), Some(have)) = (want.as_object(), have.as_object()) else {
                return false;
            };
            let none = Map::new();
            let below = below.and_then(Value::as_object).unwrap_or(&none);
            if !object_same(want, have, below, &|key| IDENTITY.contains(&key), false) {
                return false;
            }
            continue;
        }
        let Some(below) = below else { return false };
        if !value_same(want, have, below) {
            return false;
        }
    }
    true
}

fn value_same(want: &Value, have: &Value, owned: &Value) -> bool {
    if is_leaf(owned) {
        return equal(want, have);
    }
    let Some(owned) = owned.as_object() else {
        return false;
    };
    match (want, have) {
        (Value::Object(want), Value::Object(have)) => object_same(want, have, owned, &|_| false, false),
        (Value::Array(want), Value::Array(have)) => list_same(want, have, owned),
        _ => false,
    }
}

fn list_same(want: &[Value], have: &[Value], owned: &Map<String, Value>) -> bool {
    let mut claimed = vec![false; want.len()];
    for (key, below) in owned.iter().filter(|(k, _)| *k != ".") {
        if let Some(value) = key.strip_prefix("v:") {
            let Ok(value) = serde_json::from_str::<Value>(value) else {
                return false;
            };
            let Some(at) = want.iter().position(|w| equal(w, &value)) else {
                return false;
            };
            if !have.iter().any(|h| equal(h, &value)) {
                return false;
            }
            claimed[at] = true;
        } else if let Some(keys) = key.strip_prefix("k:") {
            let Ok(Value::Object(keys)) = serde_json::from_str(keys) else {
                return false;
            };
            // The desired element may leave out a key that the server defaults (a port's protocol).
            let fits = |w: &Value| keys.iter().all(|(k, v)| w.get(k).is_none_or(|x| equal(x, v)));
            let Some(at) = want.iter().enumerate().position(|(i, w)| !claimed[i] && fits(w)) else {
                return false;
            };
            let Some(live) = have
                .iter()
                .find(|h| keys.iter().all(|(k, v)| h.get(k).is_some_and(|x| equal(x, v))))
            else {
                return false;
            };
            claimed[at] = true;
            let same = if is_leaf(below) {
                subset(&want[at], live)
            } else {
                value_same(&want[at], live, below)
            };
            if !same {
                return false;
            }
        } else {
            return false;
        }
    }
    claimed.iter().all(|c| *c)
}

/// An element of which only the existence is ours: what is desired of it must be there.
fn subset(want: &Value, have: &Value) -> bool {
    match (want, have) {
        (Value::Object(w), Value::Object(h)) => w.iter().all(|(k, v)| h.get(k).is_some_and(|x| equal(v, x))),
        _ => equal(want, have),
    }
}

/// Equality of JSON where `1` and `1.0` are the same number.
fn equal(a: &Value, b: &Value) -> bool {
    match (a, b) {
        (Value::Number(x), Value::Number(y)) => x == y || x.as_f64() == y.as_f64(),
        (Value::Array(x), Value::Array(y)) => x.len() == y.len() && x.iter().zip(y).all(|(a, b)| equal(a, b)),
        (Value::Object(x), Value::Object(y)) => {
            x.len() == y.len() && x.iter().all(|(k, v)| y.get(k).is_some_and(|w| equal(v, w)))
        }
        _ => a == b,
    }
}

/// A digest of the live values of our fields. Stays the same while others change only what is theirs.
pub(crate) fn projection(live: &Value, owned: &Value) -> [u8; 32] {
    let mut hash = Sha256::new();
    project(live, owned, &mut hash);
    hash.finalize().into()
}

fn project(live: &Value, owned: &Value, hash: &mut Sha256) {
    if is_leaf(owned) {
        hash.update(serde_json::to_vec(live).unwrap_or_default());
        return;
    }
    let Some(owned) = owned.as_object() else { return };
    for (key, below) in owned {
        hash.update([b'{']);
        hash.update(key);
        let child = if let Some(field) = key.strip_prefix("f:") {
            live.get(field)
        } else if let Some(keys) = key.strip_prefix("k:") {
            serde_json::from_str::<Map<String, Value>>(keys)
                .ok()
                .and_then(|keys| {
                    live.as_array()?
                        .iter()
                        .find(|h| keys.iter().all(|(k, v)| h.get(k).is_some_and(|x| equal(x, v))))
                })
        } else if let Some(value) = key.strip_prefix("v:") {
            serde_json::from_str::<Value>(value)
                .ok()
                .and_then(|v| live.as_array()?.iter().find(|h| equal(h, &v)))
        } else {
            continue;
        };
        match child {
            Some(child) => project(child, below, hash),
            None => hash.update([0]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn desired() -> Value {
        json!({"apiVersion": "apps/v1", "kind": "Deployment",
            "metadata": {"name": "web", "namespace": "prod", "labels": {"app": "web"}},
            "spec": {"replicas": 2, "template": {"spec": {"containers": [
                {"name": "app", "image": "app:1", "ports": [{"containerPort": 80}], "args": ["-v", "x"], "resources": {"limits": {"cpu": "1"}}}]}}}})
    }

    fn live() -> Value {
        json!({"apiVersion": "apps/v1", "kind": "Deployment",
            "metadata": {"name": "web", "namespace": "prod", "labels": {"app": "web", "theirs": "x"}, "uid": "u"},
            "spec": {"replicas": 2, "progressDeadlineSeconds": 600, "template": {"spec": {"containers": [
                {"name": "app", "image": "app:1", "imagePullPolicy": "Always", "ports": [{"containerPort": 80, "protocol": "TCP"}],
                 "args": ["-v", "x"], "resources": {"limits": {"cpu": "1"}}},
                {"name": "injected", "image": "proxy:1"}]}}},
            "status": {"replicas": 2}})
    }

    fn owned() -> Value {
        json!({"f:metadata": {"f:labels": {"f:app": {}}},
            "f:spec": {"f:replicas": {}, "f:template": {"f:spec": {"f:containers": {"k:{\"name\":\"app\"}": {
                ".": {}, "f:name": {}, "f:image": {}, "f:args": {},
                "f:ports": {"k:{\"containerPort\":80,\"protocol\":\"TCP\"}": {".": {}, "f:containerPort": {}}},
                "f:resources": {"f:limits": {"f:cpu": {}}}}}}}}})
    }

    #[test]
    fn defaults_and_fields_of_others_do_not_count_as_changes() {
        assert!(unchanged(&desired(), &live(), &owned()));
    }

    #[test]
    fn every_change_of_ours_and_every_drift_is_seen() {
        let edits: &[(&str, Value)] = &[
            ("/spec/replicas", json!(3)),
            ("/spec/template/spec/containers/0/image", json!("app:2")),
            ("/spec/template/spec/containers/0/args", json!(["-v"])),
            (
                "/spec/template/spec/containers/0/ports/0/containerPort",
                json!(81),
            ),
            (
                "/spec/template/spec/containers/0/resources/limits/cpu",
                json!("2"),
            ),
            ("/metadata/labels/app", json!("api")),
            ("/metadata/labels", json!({"app": "web", "new": "label"})),
            ("/metadata/labels", json!({})),
            (
                "/spec/template/spec/containers",
                json!([{"name": "app", "image": "app:1"}, {"name": "second"}]),
            ),
        ];
        for (pointer, value) in edits {
            let mut changed = desired();
            *changed.pointer_mut(pointer).unwrap() = value.clone();
            assert!(
                !unchanged(&changed, &live(), &owned()),
                "desired {pointer} = {value}"
            );
        }
        for (pointer, value) in &edits[..6] {
            let mut drifted = live();
            *drifted.pointer_mut(pointer).unwrap() = value.clone();
            assert!(
                !unchanged(&desired(), &drifted, &owned()),
                "live {pointer} = {value}"
            );
        }
    }

    #[test]
    fn the_projection_follows_our_fields_and_nothing_else() {
        let before = projection(&live(), &owned());
        let mut theirs = live();
        theirs["status"]["replicas"] = json!(0);
        theirs["metadata"]["labels"]["theirs"] = json!("y");
        theirs["spec"]["template"]["spec"]["containers"][1]["image"] = json!("proxy:2");
        assert_eq!(projection(&theirs, &owned()), before);
        let mut ours = live();
        ours["spec"]["replicas"] = json!(5);
        assert_ne!(projection(&ours, &owned()), before);
    }

    #[test]
    fn the_field_set_is_found_by_manager_and_operation() {
        let object = json!({"metadata": {"managedFields": [
            {"manager": "m", "operation": "Update", "fieldsV1": {"f:a": {}}},
            {"manager": "m", "operation": "Apply", "subresource": "status", "fieldsV1": {"f:b": {}}},
            {"manager": "m", "operation": "Apply", "fieldsV1": {"f:c": {}}}]}});
        assert_eq!(applied_by(&object, "m"), Some(&json!({"f:c": {}})));
        assert_eq!(applied_by(&object, "other"), None);
    }
}
