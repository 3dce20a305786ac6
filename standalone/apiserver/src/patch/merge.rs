//! RFC 7396.

use serde_json::{Map, Value};

/// Apply a merge patch.
pub(crate) fn apply(target: &mut Value, patch: &Value) {
    let Value::Object(members) = patch else {
        *target = patch.clone();
        return;
    };
    if !target.is_object() {
        *target = Value::Object(Map::new());
    }
    let Value::Object(out) = target else { return };
    for (key, value) in members {
        if value.is_null() {
            out.remove(key);
        } else if value.is_object() {
            apply(out.entry(key.clone()).or_insert(Value::Null), value);
        } else {
            out.insert(key.clone(), value.clone());
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn null_removes_maps_merge_and_lists_are_replaced() {
        let mut target = json!({"a": {"b": 1, "c": 2}, "l": [1, 2], "x": 1});
        apply(
            &mut target,
            &json!({"a": {"b": null, "d": {"e": null, "f": 1}}, "l": [3], "x": {"y": 1}}),
        );
        assert_eq!(
            target,
            json!({"a": {"c": 2, "d": {"f": 1}}, "l": [3], "x": {"y": 1}})
        );
    }
}
