//! RFC 6902 as Kubernetes applies it: an absent member tests equal to null, `add` without a value adds null,
//! a path without its leading slash loses its first part, at most 10,000 operations.

use serde_json::{Map, Value};

/// Kubernetes' bound on the length of a JSON patch.
pub(crate) const MAX_OPERATIONS: usize = 10_000;

/// Why a patch does not apply.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Failure {
    /// The document is no JSON patch.
    Malformed(String),
    TooMany(usize),
    /// An operation does not fit the object.
    Operation(String),
}

/// Apply all operations or none.
pub(crate) fn apply(target: &mut Value, patch: &Value) -> Result<(), Failure> {
    let Some(operations) = patch.as_array() else {
        return Err(Failure::Malformed(
            "json: cannot unmarshal object into Go value of type []handlers.jsonPatchOp".into(),
        ));
    };
    if operations.len() > MAX_OPERATIONS {
        return Err(Failure::TooMany(operations.len()));
    }
    if let Some(bad) = operations.iter().find(|o| !o.is_object()) {
        return Err(Failure::Malformed(format!(
            "json: cannot unmarshal {} into Go value of type handlers.jsonPatchOp",
            kind_of(bad)
        )));
    }
    let mut work = target.clone();
    for operation in operations {
        step(&mut work, operation)?;
    }
    *target = work;
    Ok(())
}

fn step(target: &mut Value, operation: &Value) -> Result<(), Failure> {
    let text = |key: &str| operation.get(key).and_then(Value::as_str);
    let op = text("op").unwrap_or_default();
    let path = text("path").ok_or_else(|| missing(op, "path"));
    let from = || text("from").ok_or_else(|| missing(op, "from"));
    let value = || operation.get("value").cloned().unwrap_or(Value::Null);
    match op {
        "add" => add(target, path?, value(), op),
        "remove" => remove(target, path?, op).map(drop),
        "replace" => {
            let path = path?;
            if path.is_empty() {
                *target = value();
                return Ok(());
            }
            match find_mut(target, path) {
                Some(slot) => {
                    *slot = value();
                    Ok(())
                }
                // evanphx/json-patch in Kubernetes' configuration: replacing an absent member adds it.
                None => add(target, path, value(), op),
            }
        }
        "move" => {
            let (from, path) = (from()?, path?);
            let moved = remove(target, from, op)?;
            add(target, path, moved, op)
        }
        "copy" => {
            let (from, path) = (from()?, path?);
            let copied = find(target, from).cloned().ok_or_else(|| absent(op, from))?;
            add(target, path, copied, op)
        }
        "test" => {
            let path = path?;
            let wanted = operation.get("value").unwrap_or(&Value::Null);
            let found = find(target, path).unwrap_or(&Value::Null);
            if json_equal(found, wanted) {
                Ok(())
            } else {
                Err(Failure::Operation(format!(
                    "testing path {path} failed: test failed"
                )))
            }
        }
        other => Err(Failure::Operation(format!("Unexpected kind: {other}"))),
    }
}

fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "bool",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}

fn missing(op: &str, what: &str) -> Failure {
    Failure::Operation(format!("{op} operation missing or invalid {what}: missing value"))
}

fn absent(op: &str, path: &str) -> Failure {
    Failure::Operation(format!(
        "{op} operation does not apply: doc is missing {}: {path}: missing value",
        if op == "replace" { "key" } else { "path" }
    ))
}

/// Numbers compare by value.
fn json_equal(a: &Value, b: &Value) -> bool {
    match (a, b) {
        (Value::Number(x), Value::Number(y)) => x == y || x.as_f64() == y.as_f64(),
        (Value::Array(x), Value::Array(y)) => {
            x.len() == y.len() && x.iter().zip(y).all(|(p, q)| json_equal(p, q))
        }
        (Value::Object(x), Value::Object(y)) => {
            x.len() == y.len() && x.iter().all(|(k, p)| y.get(k).is_some_and(|q| json_equal(p, q)))
        }
        (x, y) => x == y,
    }
}

/// Split off the first part whatever it is, as Go's implementation does.
fn parts(path: &str) -> Vec<String> {
    path.split('/')
        .skip(1)
        .map(|p| p.replace("~1", "/").replace("~0", "~"))
        .collect()
}

fn index(text: &str, len: usize) -> Option<usize> {
    if let Some(back) = text.strip_prefix('-') {
        let back: usize = back.parse().ok()?;
        return len.checked_sub(back);
    }
    text.parse().ok()
}

fn child<'a>(value: &'a Value, part: &str) -> Option<&'a Value> {
    match value {
        Value::Object(map) => map.get(part),
        Value::Array(list) => list.get(index(part, list.len())?),
        _ => None,
    }
}

fn find<'a>(target: &'a Value, path: &str) -> Option<&'a Value> {
    parts(path).iter().try_fold(target, |v, part| child(v, part))
}

fn descend_mut<'a>(target: &'a mut Value, parts: &[String]) -> Option<&'a mut Value> {
    let mut at = target;
    for part in parts {
        at = match at {
            Value::Object(map) => map.get_mut(part)?,
            Value::Array(list) => {
                let i = index(part, list.len())?;
                list.get_mut(i)?
            }
            _ => return None,
        };
    }
    Some(at)
}

fn find_mut<'a>(target: &'a mut Value, path: &str) -> Option<&'a mut Value> {
    descend_mut(target, &parts(path))
}

fn add(target: &mut Value, path: &str, value: Value, op: &str) -> Result<(), Failure> {
    let parts = parts(path);
    let Some((last, parents)) = parts.split_last() else {
        if path.is_empty() {
            *target = value;
            return Ok(());
        }
        return Err(absent(op, path));
    };
    match descend_mut(target, parents) {
        Some(Value::Object(map)) => {
            map.insert(last.clone(), value);
            Ok(())
        }
        Some(Value::Array(list)) => {
            let at = if last == "-" {
                Some(list.len())
            } else {
                index(last, list.len())
            };
            match at {
                Some(i) if i <= list.len() => {
                    list.insert(i, value);
                    Ok(())
                }
                Some(i) => Err(Failure::Operation(format!(
                    "{op} operation does not apply: doc is missing path: \"{path}\": Unable to access invalid index: {i}: invalid index referenced"
                ))),
                None => Err(Failure::Operation(format!(
                    "strconv.Atoi: parsing \"{last}\": invalid syntax"
                ))),
            }
        }
        Some(slot @ Value::Null) => {
            let mut map = Map::new();
            map.insert(last.clone(), value);
            *slot = Value::Object(map);
            Ok(())
        }
        _ => Err(Failure::Operation(format!(
            "{op} operation does not apply: doc is missing path: \"{path}\": missing value"
        ))),
    }
}

fn remove(target: &mut Value, path: &str, op: &str) -> Result<Value, Failure> {
    let parts = parts(path);
    let Some((last, parents)) = parts.split_last() else {
        return Err(absent(op, path));
    };
    let gone = match descend_mut(target, parents) {
        Some(Value::Object(map)) => map.remove(last),
        Some(Value::Array(list)) => index(last, list.len())
            .filter(|i| *i < list.len())
            .map(|i| list.remove(i)),
        Some(_) => None,
        None => {
            return Err(Failure::Operation(format!(
                "{op} operation does not apply: doc is missing path: \"{path}\": missing value"
            )));
        }
    };
    gone.ok_or_else(|| {
        Failure::Operation(format!(
            "{op} operation does not apply: doc is missing path: \"{path}\": {}",
            "Unable to remove nonexistent key: ".to_owned() + last + ": missing value"
        ))
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn an_absent_member_tests_equal_to_null_as_kube_finalizers_need() {
        let mut object = json!({"metadata": {}});
        apply(
            &mut object,
            &json!([{"op": "test", "path": "/metadata/finalizers", "value": null}, {"op": "add", "path": "/metadata/finalizers", "value": ["f"]}]),
        )
        .expect("applies");
        assert_eq!(object, json!({"metadata": {"finalizers": ["f"]}}));
    }

    #[test]
    fn a_failing_operation_leaves_the_object_untouched() {
        let mut object = json!({"a": 1});
        let before = object.clone();
        assert!(
            apply(
                &mut object,
                &json!([{"op": "add", "path": "/b", "value": 2}, {"op": "remove", "path": "/c"}])
            )
            .is_err()
        );
        assert_eq!(object, before);
    }

    #[test]
    fn lists_take_indices_and_the_dash() {
        let mut object = json!({"l": [1, 3]});
        apply(
            &mut object,
            &json!([{"op": "add", "path": "/l/1", "value": 2}, {"op": "add", "path": "/l/-", "value": 4}, {"op": "move", "from": "/l/0", "path": "/first"}]),
        )
        .expect("applies");
        assert_eq!(object, json!({"l": [2, 3, 4], "first": 1}));
    }
}
