//! What differs between two objects, path by path, for plans that people read.

use crate::value::{Map, Value};

/// One difference.
#[derive(Clone, Debug, PartialEq)]
pub struct Change {
    /// The path, as in `spec.template.spec.containers[name=app].image`. Keys with dots are quoted.
    pub path: String,
    /// The value before; `None` if it was not there.
    pub before: Option<Value>,
    /// The value after; `None` if it is gone.
    pub after: Option<Value>,
}

/// All differences from `before` to `after`.
///
/// Lists whose elements all have a distinct `name` are compared by name, others by position.
pub fn diff(before: &Map, after: &Map) -> Vec<Change> {
    let mut changes = Vec::new();
    maps(before, after, "", &mut changes);
    changes
}

fn maps(before: &Map, after: &Map, path: &str, changes: &mut Vec<Change>) {
    let in_after = after.finder();
    let in_before = before.finder();
    for e in &before.entries {
        let path = child(path, &e.key.text);
        match in_after.find(&e.key.text) {
            Some(i) => values(&e.value, &after.entries[i].value, &path, changes),
            None => changes.push(Change {
                path,
                before: Some(e.value.clone()),
                after: None,
            }),
        }
    }
    for e in &after.entries {
        if in_before.find(&e.key.text).is_none() {
            let path = child(path, &e.key.text);
            changes.push(Change {
                path,
                before: None,
                after: Some(e.value.clone()),
            });
        }
    }
}

fn values(before: &Value, after: &Value, path: &str, changes: &mut Vec<Change>) {
    match (before, after) {
        (Value::Map(b), Value::Map(a)) => maps(b, a, path, changes),
        (Value::Seq(b), Value::Seq(a)) => lists(&b.items, &a.items, path, changes),
        _ if before == after => {}
        _ => changes.push(Change {
            path: path.into(),
            before: Some(before.clone()),
            after: Some(after.clone()),
        }),
    }
}

fn lists(before: &[Value], after: &[Value], path: &str, changes: &mut Vec<Change>) {
    if let (Some(b), Some(a)) = (names(before), names(after)) {
        for (name, value) in b.iter().zip(before) {
            let path = format!("{path}[name={name}]");
            match a.iter().position(|n| n == name) {
                Some(i) => values(value, &after[i], &path, changes),
                None => changes.push(Change {
                    path,
                    before: Some(value.clone()),
                    after: None,
                }),
            }
        }
        for (name, value) in a.iter().zip(after) {
            if !b.contains(name) {
                let path = format!("{path}[name={name}]");
                changes.push(Change {
                    path,
                    before: None,
                    after: Some(value.clone()),
                });
            }
        }
        return;
    }
    for i in 0..before.len().max(after.len()) {
        let path = format!("{path}[{i}]");
        match (before.get(i), after.get(i)) {
            (Some(b), Some(a)) => values(b, a, &path, changes),
            (b, a) => changes.push(Change {
                path,
                before: b.cloned(),
                after: a.cloned(),
            }),
        }
    }
}

/// The names of the elements, if all have one and no two are equal.
fn names(items: &[Value]) -> Option<Vec<&str>> {
    let names: Vec<&str> = items
        .iter()
        .map(|i| i.get("name").and_then(Value::text))
        .collect::<Option<_>>()?;
    let distinct: std::collections::HashSet<&str> = names.iter().copied().collect();
    (distinct.len() == names.len() && !names.is_empty()).then_some(names)
}

fn child(path: &str, key: &str) -> String {
    let plain = key
        .chars()
        .all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '$'));
    match (path.is_empty(), plain) {
        (true, true) => key.to_owned(),
        (false, true) => format!("{path}.{key}"),
        (_, false) => format!("{path}[\"{key}\"]"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::object::parse_documents;

    fn root(text: &str) -> Map {
        parse_documents(text, "t.yaml").unwrap().remove(0).into_root()
    }

    #[test]
    fn named_list_elements_are_compared_by_name() {
        let before = root(
            "apiVersion: v1\nkind: Pod\nmetadata: {name: p}\nspec:\n  containers: [{name: a, image: x:1}, {name: b, image: y:1}]\n",
        );
        let after = root(
            "apiVersion: v1\nkind: Pod\nmetadata: {name: p}\nspec:\n  containers: [{name: b, image: y:2}, {name: a, image: x:1}]\n",
        );
        let changes = diff(&before, &after);
        assert_eq!(changes.len(), 1);
        assert_eq!(changes[0].path, "spec.containers[name=b].image");
        assert_eq!(changes[0].after, Some(Value::string("y:2")));
    }

    #[test]
    fn equal_numbers_in_different_notation_do_not_differ() {
        let before = root("apiVersion: v1\nkind: X\nmetadata: {name: p}\nspec: {a: 1000, b: 0x10}\n");
        let after = root("apiVersion: v1\nkind: X\nmetadata: {name: p}\nspec: {b: 16, a: 1e3}\n");
        assert_eq!(diff(&before, &after), []);
    }

    #[test]
    fn added_and_removed_keys_are_told_apart() {
        let before = root("apiVersion: v1\nkind: X\nmetadata: {name: p, annotations: {a.b/c: '1'}}\n");
        let after = root("apiVersion: v1\nkind: X\nmetadata: {name: p, labels: {x: y}}\n");
        let paths: Vec<_> = diff(&before, &after)
            .into_iter()
            .map(|c| (c.path, c.before.is_some(), c.after.is_some()))
            .collect();
        assert_eq!(
            paths,
            [
                ("metadata.annotations".to_owned(), true, false),
                ("metadata.labels".to_owned(), false, true)
            ]
        );
    }
}
