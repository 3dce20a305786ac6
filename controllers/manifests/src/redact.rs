//! Secrets must not reach logs, events, plans or a screen.

use crate::object::Object;
use crate::value::{Map, Value};

/// What stands in place of a secret value.
pub const REDACTED: &str = "*** (redacted)";
/// What stands in place of a value that differs from the one it is compared with.
pub const REDACTED_CHANGED: &str = "*** (redacted, changed)";

/// Where kubectl keeps a copy of the whole object.
const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";

/// Whether the values of this object are secret.
pub fn is_secret(object: &Object) -> bool {
    object.kind() == "Secret" && object.group().is_empty()
}

/// Masks the values of a Secret, also in the `last-applied-configuration` annotation. Other objects stay as they are.
pub fn redact(object: &mut Object) {
    if is_secret(object) {
        mask(object.root_mut(), |_, _, _| REDACTED);
    }
}

/// Masks two versions of a Secret so that one still sees which keys were added, removed or changed, and nothing else.
pub fn redact_pair(before: &mut Object, after: &mut Object) {
    if is_secret(before) || is_secret(after) {
        let old = before.root().clone();
        mask(after.root_mut(), |field, key, value| {
            match old.get(field).and_then(|data| data.get(key)) {
                Some(previous) if previous != value => REDACTED_CHANGED,
                Some(_) | None => REDACTED,
            }
        });
        mask(before.root_mut(), |_, _, _| REDACTED);
    }
}

fn mask(root: &mut Map, text: impl Fn(&str, &str, &Value) -> &'static str) {
    for field in ["data", "stringData"] {
        match root.get_mut(field) {
            Some(Value::Map(data)) => {
                for e in &mut data.entries {
                    e.value = Value::string(text(field, &e.key.text, &e.value));
                }
            }
            // Not what the API allows, but still not to be shown.
            Some(other) => *other = Value::string(REDACTED),
            None => {}
        }
    }
    let annotations = root.get_mut("metadata").and_then(Value::as_map_mut);
    if let Some(copy) = annotations
        .and_then(|m| m.get_mut("annotations"))
        .and_then(Value::as_map_mut)
        .and_then(|m| m.get_mut(LAST_APPLIED))
    {
        *copy = Value::string(REDACTED);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::object::parse_documents;

    fn secret(data: &str) -> Object {
        let text = format!(
            "apiVersion: v1\nkind: Secret\nmetadata:\n  name: s\n  annotations: {{{LAST_APPLIED}: hunter2}}\ndata: {data}\n"
        );
        parse_documents(&text, "s.yaml").unwrap().remove(0)
    }

    #[test]
    fn no_value_of_a_secret_survives_redaction() {
        let mut object = secret("{password: hunter2, other: hunter2}");
        redact(&mut object);
        let text = object.to_yaml().unwrap();
        assert!(!text.contains("hunter2"), "{text}");
        assert!(text.contains("password"), "{text}");
    }

    #[test]
    fn a_pair_shows_that_a_value_changed_but_not_how() {
        let mut before = secret("{a: hunter2, b: hunter2}");
        let mut after = secret("{a: hunter3, b: hunter2, c: hunter2}");
        redact_pair(&mut before, &mut after);
        let changes = crate::diff::diff(before.root(), after.root());
        let paths: Vec<&str> = changes.iter().map(|c| c.path.as_str()).collect();
        assert_eq!(paths, ["data.a", "data.c"]);
        assert!(!format!("{changes:?}").contains("hunter"));
    }

    #[test]
    fn other_objects_are_not_touched() {
        let text = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: c}\ndata: {a: b}\n";
        let mut object = parse_documents(text, "c.yaml").unwrap().remove(0);
        let copy = object.clone();
        redact(&mut object);
        assert_eq!(object, copy);
    }
}
