//! Kubernetes' strategic merge patch: lists merge by the key that the type names; `$patch`, `$retainKeys`, `$setElementOrder/x` and
//! `$deleteFromPrimitiveList/x` direct it. A malformed patch is an internal error (500) in Kubernetes, and so here.

use std::cmp::Ordering;

use serde_json::{Map, Value};

use crate::schema::{Schema, Shape};

const PATCH: &str = "$patch";
const RETAIN: &str = "$retainKeys";
const ORDER: &str = "$setElementOrder/";
const DELETE_PRIMITIVE: &str = "$deleteFromPrimitiveList/";

type Outcome<T> = Result<T, String>;

/// Apply `patch` to an object of type `schema`.
pub(crate) fn apply(target: &mut Value, patch: &Value, schema: &Schema) -> Outcome<()> {
    let Value::Object(patch) = patch else {
        return Err("json: cannot unmarshal into Go value of type map[string]interface {}".into());
    };
    let original = std::mem::take(crate::meta::as_object_mut(target));
    *target = Value::Object(merge_map(original, patch, schema)?);
    Ok(())
}

fn merge_map(
    mut original: Map<String, Value>,
    patch: &Map<String, Value>,
    schema: &Schema,
) -> Outcome<Map<String, Value>> {
    match patch.get(PATCH) {
        None => {}
        Some(Value::String(s)) if s == "replace" => {
            let mut replaced = patch.clone();
            replaced.remove(PATCH);
            return Ok(replaced);
        }
        Some(Value::String(s)) if s == "delete" => return Ok(Map::new()),
        Some(other) => return Err(unknown_directive(other, patch)),
    }
    if let Some(retain) = patch.get(RETAIN) {
        let Some(keys) = retain.as_array() else {
            return Err("invalid patch format of retainKeys".into());
        };
        for key in patch.keys() {
            if key != RETAIN
                && !key.starts_with('$')
                && !keys.iter().any(|k| k.as_str() == Some(key))
                && !patch[key].is_null()
            {
                return Err("retainKeys list doesn't contain all the keys in the patch".into());
            }
        }
        original.retain(|key, _| keys.iter().any(|k| k.as_str() == Some(key)));
    }
    for (key, value) in patch {
        if key == RETAIN || key == PATCH {
            continue;
        }
        if let Some(field) = key.strip_prefix(DELETE_PRIMITIVE) {
            if let (Some(Value::Array(list)), Some(gone)) = (original.get_mut(field), value.as_array()) {
                list.retain(|item| !gone.contains(item));
            }
            continue;
        }
        if key.starts_with(ORDER) {
            continue;
        }
        if value.is_null() {
            original.remove(key);
            continue;
        }
        let (field, _) = schema.member(key);
        let merged = match (original.remove(key), value) {
            (Some(Value::Object(old)), Value::Object(new)) => Value::Object(merge_map(old, new, field)?),
            (Some(Value::Array(old)), Value::Array(new)) if field.patch.merge => {
                let order = patch.get(&format!("{ORDER}{key}"));
                Value::Array(merge_list(old, new, field, order)?)
            }
            (None, Value::Array(new)) if field.patch.merge => {
                let order = patch.get(&format!("{ORDER}{key}"));
                Value::Array(merge_list(Vec::new(), new, field, order)?)
            }
            (_, Value::Object(new)) => Value::Object(merge_map(Map::new(), new, field)?),
            (_, other) => other.clone(),
        };
        original.insert(key.clone(), merged);
    }
    // An order without a list: the live list is sorted by it.
    for (key, order) in patch {
        let Some(field_name) = key.strip_prefix(ORDER) else {
            continue;
        };
        if patch.contains_key(field_name) {
            continue;
        }
        let (field, named) = schema.member(field_name);
        if !named && matches!(schema.resolve().shape, Shape::Struct(_)) {
            return Err(format!(
                "unable to find api field in struct {} for the json field {field_name:?}",
                schema.go_name()
            ));
        }
        if let Some(Value::Array(list)) = original.get_mut(field_name) {
            let old = list.clone();
            let taken = std::mem::take(list);
            *list = reorder(taken, &old, order, &[], field)?;
        }
    }
    Ok(original)
}

/// A value as Go's `%v` prints it: `map[a:1 b:2]`, `[x y]`.
fn go(value: &Value) -> String {
    match value {
        Value::Object(map) => {
            let mut parts: Vec<String> = map.iter().map(|(k, v)| format!("{k}:{}", go(v))).collect();
            parts.sort();
            format!("map[{}]", parts.join(" "))
        }
        Value::Array(list) => format!("[{}]", list.iter().map(go).collect::<Vec<_>>().join(" ")),
        Value::String(s) => s.clone(),
        Value::Null => "<nil>".to_owned(),
        other => other.to_string(),
    }
}

fn unknown_directive(directive: &Value, members: &Map<String, Value>) -> String {
    match directive {
        Value::String(s) => format!(
            "unknown patch type: {s} in map: {}",
            go(&Value::Object(members.clone()))
        ),
        other => format!("invalid value for special key {PATCH}: {other}"),
    }
}

fn merge_list(
    old: Vec<Value>,
    patch: &[Value],
    field: &Schema,
    order: Option<&Value>,
) -> Outcome<Vec<Value>> {
    let primitive = !matches!(
        field.item().resolve().shape,
        Shape::Struct(_) | Shape::Map { .. } | Shape::Any
    );
    let before = old.clone();
    let mut merged = old;
    if primitive {
        for item in patch {
            if !merged.contains(item) {
                merged.push(item.clone());
            }
        }
    } else {
        let key = merge_key(field)?;
        let replace = patch
            .iter()
            .any(|i| i.get(PATCH).and_then(Value::as_str) == Some("replace"));
        if replace {
            return Ok(patch.iter().filter(|i| i.get(PATCH).is_none()).cloned().collect());
        }
        for item in patch {
            let Value::Object(members) = item else {
                return Err(format!("expected map in list, found {item}"));
            };
            match members.get(PATCH) {
                Some(Value::String(s)) if s == "delete" => {
                    let Some(wanted) = members.get(key) else {
                        return Err(no_merge_key(members, key));
                    };
                    merged.retain(|m| m.get(key) != Some(wanted));
                    continue;
                }
                Some(Value::String(s)) if s == "merge" => {}
                Some(other) => return Err(unknown_directive(other, members)),
                None => {}
            }
            let Some(wanted) = members.get(key) else {
                return Err(no_merge_key(members, key));
            };
            match merged.iter().position(|m| m.get(key) == Some(wanted)) {
                Some(at) => {
                    let old = merged.get_mut(at).map(Value::take).unwrap_or_default();
                    let Value::Object(old) = old else { continue };
                    let mut members = members.clone();
                    members.remove(PATCH);
                    let new = Value::Object(merge_map(old, &members, field.item())?);
                    if let Some(slot) = merged.get_mut(at) {
                        *slot = new;
                    }
                }
                None => {
                    let mut members = members.clone();
                    members.remove(PATCH);
                    merged.push(Value::Object(merge_map(Map::new(), &members, field.item())?));
                }
            }
        }
    }
    match order {
        Some(order) => reorder(merged, &before, order, patch, field),
        // Without an explicit order the patch itself is one.
        None => {
            let own: Vec<Value> = patch.iter().filter(|i| i.get(PATCH).is_none()).cloned().collect();
            reorder(merged, &before, &Value::Array(own), &[], field)
        }
    }
}

fn merge_key(field: &Schema) -> Outcome<&str> {
    field
        .patch
        .merge_key
        .as_deref()
        .ok_or_else(|| "cannot merge lists without merge key for type".to_owned())
}

fn no_merge_key(members: &Map<String, Value>, key: &str) -> String {
    // Go prints a map as map[a:1 b:2].
    let shown: Vec<String> = members
        .iter()
        .map(|(k, v)| format!("{k}:{}", v.as_str().map_or_else(|| v.to_string(), str::to_owned)))
        .collect();
    format!(
        "map: map[{}] does not contain declared merge key: {key}",
        shown.join(" ")
    )
}

fn same(a: &Value, b: &Value, key: Option<&str>) -> bool {
    match key {
        Some(key) => a.get(key).is_some() && a.get(key) == b.get(key),
        None => a == b,
    }
}

/// Items that the order names come in its order; the others keep their place relative to what was there before.
fn reorder(
    merged: Vec<Value>,
    before: &[Value],
    order: &Value,
    patch: &[Value],
    field: &Schema,
) -> Outcome<Vec<Value>> {
    let Some(order) = order.as_array() else {
        return Err("invalid patch format of setElementOrder list".into());
    };
    let primitive = !matches!(
        field.item().resolve().shape,
        Shape::Struct(_) | Shape::Map { .. } | Shape::Any
    );
    let key = if primitive { None } else { Some(merge_key(field)?) };
    for item in patch.iter().filter(|i| i.get(PATCH).is_none()) {
        if !order.iter().any(|o| same(o, item, key)) {
            return Err(format!(
                "The order in patch list:\n{}\n doesn't match $setElementOrder list:\n{}\n",
                go(&Value::Array(patch.to_vec())),
                go(&Value::Array(order.clone()))
            ));
        }
    }
    let place = |list: &[Value], item: &Value| list.iter().position(|o| same(o, item, key));
    let (mut ordered, mut rest): (Vec<Value>, Vec<Value>) =
        merged.into_iter().partition(|m| place(order, m).is_some());
    ordered.sort_by_key(|m| place(order, m));
    rest.sort_by(|a, b| match (place(before, a), place(before, b)) {
        (Some(x), Some(y)) => x.cmp(&y),
        _ => Ordering::Equal,
    });
    let mut out = Vec::with_capacity(ordered.len() + rest.len());
    let mut left = rest.into_iter().peekable();
    let mut right = ordered.into_iter().peekable();
    loop {
        match (left.peek(), right.peek()) {
            (Some(l), Some(r)) => {
                let left_first = matches!((place(before, l), place(before, r)), (Some(x), Some(y)) if x < y);
                out.extend(if left_first { left.next() } else { right.next() });
            }
            (Some(_), None) => out.extend(left.next()),
            (None, Some(_)) => out.extend(right.next()),
            (None, None) => return Ok(out),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::schema::builtin;

    fn pod(containers: Value) -> Value {
        json!({"spec": {"containers": containers}})
    }

    #[test]
    fn containers_merge_by_name_and_follow_the_order_given() {
        let mut object = pod(json!([{"name": "a", "image": "1"}, {"name": "b", "image": "2"}]));
        let patch = json!({"spec": {"$setElementOrder/containers": [{"name": "c"}, {"name": "a"}, {"name": "b"}],
            "containers": [{"name": "c", "image": "3"}, {"name": "a", "image": "9"}]}});
        apply(&mut object, &patch, &builtin("core.v1.Pod")).expect("applies");
        assert_eq!(
            object,
            pod(
                json!([{"name": "c", "image": "3"}, {"name": "a", "image": "9"}, {"name": "b", "image": "2"}])
            )
        );
    }

    #[test]
    fn directives_delete_replace_and_retain() {
        let schema = builtin("core.v1.Pod");
        let mut object = pod(json!([{"name": "a"}, {"name": "b"}]));
        apply(
            &mut object,
            &pod(json!([{"name": "a", "$patch": "delete"}])),
            &schema,
        )
        .expect("applies");
        assert_eq!(object, pod(json!([{"name": "b"}])));
        apply(
            &mut object,
            &pod(json!([{"name": "z"}, {"$patch": "replace"}])),
            &schema,
        )
        .expect("applies");
        assert_eq!(object, pod(json!([{"name": "z"}])));
        let mut deployment =
            json!({"spec": {"strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1}}}});
        apply(
            &mut deployment,
            &json!({"spec": {"strategy": {"$retainKeys": ["type"], "type": "Recreate"}}}),
            &builtin("apps.v1.Deployment"),
        )
        .expect("applies");
        assert_eq!(deployment, json!({"spec": {"strategy": {"type": "Recreate"}}}));
    }

    #[test]
    fn malformed_patches_say_what_is_wrong() {
        let schema = builtin("core.v1.Pod");
        for bad in [pod(json!([{"image": "x"}])), json!({"spec": {"$patch": "bogus"}})] {
            assert!(
                apply(&mut pod(json!([{"name": "a"}])), &bad, &schema).is_err(),
                "{bad}"
            );
        }
    }
}
