//! Typed values: which fields a value sets, how two values differ, merging one into another, removing fields.

use serde_json::{Map, Value};

use super::fieldset::FieldSet;
use crate::schema::{ListKind, Schema, Shape};

/// How one value became another.
#[derive(Debug, Default)]
pub(crate) struct Comparison {
    pub(crate) added: FieldSet,
    pub(crate) modified: FieldSet,
    pub(crate) removed: FieldSet,
}

impl Comparison {
    /// The same but for fields that the endpoint cannot change.
    pub(crate) fn without(self, ignored: &FieldSet) -> Self {
        Self {
            added: self.added.recursive_difference(ignored),
            modified: self.modified.recursive_difference(ignored),
            removed: self.removed.recursive_difference(ignored),
        }
    }

    pub(crate) fn is_same(&self) -> bool {
        self.added.is_empty() && self.modified.is_empty() && self.removed.is_empty()
    }
}

/// What a value is to server-side apply, after deducing what the schema leaves open.
enum View<'a> {
    Leaf,
    Map(&'a Schema),
    List(&'a Schema, &'a ListKind),
}

fn view<'a>(schema: &'a Schema, value: &Value) -> View<'a> {
    let resolved = schema.resolve();
    if schema.is_atomic() {
        return View::Leaf;
    }
    match &resolved.shape {
        Shape::Scalar(_) | Shape::Open | Shape::Ref(_) => View::Leaf,
        Shape::List {
            kind: ListKind::Atomic,
            ..
        } => View::Leaf,
        Shape::List { kind, .. } if value.is_array() || value.is_null() => View::List(resolved, kind),
        Shape::Map { .. } | Shape::Struct(_) if value.is_object() || value.is_null() => View::Map(resolved),
        Shape::Any if value.is_object() => View::Map(resolved),
        Shape::Any | Shape::List { .. } | Shape::Map { .. } | Shape::Struct(_) => View::Leaf,
    }
}

/// The step that leads to an item of an associative list.
pub(crate) fn item_step(
    kind: &ListKind,
    schema: &Schema,
    index: usize,
    item: &Value,
) -> Result<Box<str>, String> {
    match kind {
        ListKind::Atomic => Ok(format!("i:{index}").into()),
        ListKind::Set => match item {
            Value::Array(_) => Err("invalid element type for set: list".to_owned()),
            Value::Object(_) | Value::Null => {
                Err("associative list with keys may not have non-scalar elements".to_owned())
            }
            scalar => Ok(format!("v:{scalar}").into()),
        },
        ListKind::Map(keys) => {
            let Some(members) = item.as_object() else {
                return Err(if item.is_null() {
                    "associative list with keys may not have a null element".to_owned()
                } else {
                    "associative list with keys may not have non-map elements".to_owned()
                });
            };
            let mut out = Map::new();
            let mut sorted: Vec<&str> = keys.iter().map(|k| &**k).collect();
            sorted.sort_unstable();
            for key in sorted {
                let default = schema.item().member(key).0.default.clone();
                match members.get(key).cloned().or(default) {
                    Some(value) => {
                        out.insert(key.to_owned(), value);
                    }
                    None if keys.len() > 1 => {}
                    None => {
                        return Err(format!(
                            "associative list with keys has an element that omits key field {key:?} (and doesn't have default value)"
                        ));
                    }
                }
            }
            if out.is_empty() {
                return Err(format!(
                    "associative list with keys has an element that omits all key fields {:?} (and doesn't have default values for any key fields)",
                    keys.iter().map(|k| &**k).collect::<Vec<_>>()
                ));
            }
            // serde_json keeps insertion order or sorts: either way the keys come sorted here.
            Ok(format!("k:{}", Value::Object(out)).into())
        }
    }
}

fn field_step(name: &str) -> Box<str> {
    format!("f:{name}").into()
}

/// The set of fields that `value` sets.
pub(crate) fn field_set(schema: &Schema, value: &Value) -> Result<FieldSet, String> {
    let mut set = FieldSet::default();
    let mut path = Vec::new();
    collect(schema, value, &mut path, &mut set)?;
    Ok(set)
}

fn shown(path: &[Box<str>]) -> String {
    path.iter().map(|s| super::fieldset::show_step(s)).collect()
}

fn collect(
    schema: &Schema,
    value: &Value,
    path: &mut Vec<Box<str>>,
    set: &mut FieldSet,
) -> Result<(), String> {
    match view(schema, value) {
        View::Leaf => set.insert(path),
        View::List(list, kind) => {
            let mut seen: std::collections::HashSet<Box<str>> = std::collections::HashSet::new();
            for (i, item) in value.as_array().into_iter().flatten().enumerate() {
                let step = item_step(kind, list, i, item)
                    .map_err(|e| format!("{}: element {i}: {e}", shown(path)))?;
                if !seen.insert(step.clone()) {
                    return Err(format!(
                        "{}: duplicate entries for key {}",
                        shown(path),
                        super::fieldset::show_step(&step)
                    ));
                }
                path.push(step);
                collect(list.item(), item, path, set)?;
                set.insert(path);
                path.pop();
            }
        }
        View::Map(map) => {
            for (key, member) in value.as_object().into_iter().flatten() {
                let (field, named) = map.member(key);
                path.push(field_step(key));
                collect(field, member, path, set)?;
                if member.is_null() || member.as_object().is_some_and(Map::is_empty) || !named {
                    set.insert(path);
                }
                path.pop();
            }
        }
    }
    Ok(())
}

/// Compare two values of one type.
pub(crate) fn compare(schema: &Schema, old: &Value, new: &Value) -> Comparison {
    let mut out = Comparison::default();
    let mut path = Vec::new();
    compare_at(schema, Some(old), Some(new), &mut path, &mut out);
    out
}

/// Returns after noting the path itself where one side is absent.
fn compare_at(
    schema: &Schema,
    old: Option<&Value>,
    new: Option<&Value>,
    path: &mut Vec<Box<str>>,
    out: &mut Comparison,
) {
    match (old, new) {
        (None, None) => return,
        (Some(a), Some(b)) if a == b => return,
        _ => {}
    }
    let sample = new
        .filter(|v| !v.is_null())
        .or(old)
        .or(new)
        .unwrap_or(&Value::Null);
    match view(schema, sample) {
        View::Leaf => {
            // A deduced value may change its form: what the old form owned below is gone.
            note(old, new, path, out);
            return;
        }
        View::List(list, kind) => {
            let items = |v: Option<&Value>| v.and_then(Value::as_array).cloned().unwrap_or_default();
            let (olds, news) = (items(old), items(new));
            if olds.is_empty() && news.is_empty() {
                note(old, new, path, out);
                return;
            }
            let index = |items: &[Value]| -> Vec<(Box<str>, usize)> {
                items
                    .iter()
                    .enumerate()
                    .filter_map(|(i, item)| item_step(kind, list, i, item).ok().map(|s| (s, i)))
                    .collect()
            };
            let (old_index, new_index) = (index(&olds), index(&news));
            let old_at: std::collections::HashMap<&str, usize> =
                old_index.iter().rev().map(|(s, i)| (&**s, *i)).collect();
            let new_at: std::collections::HashMap<&str, usize> =
                new_index.iter().rev().map(|(s, i)| (&**s, *i)).collect();
            // Items that share a key are owned together, and as a whole.
            let repeated = new_at.len() != new_index.len();
            let mut doubles: std::collections::HashSet<&str> = std::collections::HashSet::new();
            for (step, i) in &new_index {
                let of = |all: &[(Box<str>, usize)], items: &[Value]| -> Vec<Value> {
                    let same = all.iter().filter(|(other, _)| other == step);
                    same.filter_map(|(_, at)| items.get(*at).cloned()).collect()
                };
                if repeated && new_index.iter().any(|(other, at)| other == step && at != i) {
                    if doubles.insert(step) {
                        let (olds, news) = (of(&old_index, &olds), of(&new_index, &news));
                        let (olds, news) = (Value::Array(olds), Value::Array(news));
                        path.push(step.clone());
                        let before = old_at.contains_key(&**step).then_some(&olds);
                        note(before, Some(&news), path, out);
                        path.pop();
                    }
                    continue;
                }
                path.push(step.clone());
                let before = old_at.get(&**step).and_then(|j| olds.get(*j));
                compare_at(list.item(), before, news.get(*i), path, out);
                path.pop();
            }
            for (step, i) in &old_index {
                if !new_at.contains_key(&**step) {
                    path.push(step.clone());
                    compare_at(list.item(), olds.get(*i), None, path, out);
                    path.pop();
                }
            }
        }
        View::Map(map) => {
            let empty = Map::new();
            let olds = old.and_then(Value::as_object).unwrap_or(&empty);
            let news = new.and_then(Value::as_object).unwrap_or(&empty);
            if olds.is_empty() && news.is_empty() {
                note(old, new, path, out);
                return;
            }
            for (key, value) in news {
                path.push(field_step(key));
                compare_at(map.member(key).0, olds.get(key), Some(value), path, out);
                path.pop();
            }
            for (key, value) in olds {
                if !news.contains_key(key) {
                    path.push(field_step(key));
                    compare_at(map.member(key).0, Some(value), None, path, out);
                    path.pop();
                }
            }
        }
    }
    if !path.is_empty() {
        if old.is_none() {
            out.added.insert(path);
        } else if new.is_none() {
            out.removed.insert(path);
        }
    }
}

fn note(old: Option<&Value>, new: Option<&Value>, path: &[Box<str>], out: &mut Comparison) {
    match (old, new) {
        (None, _) => out.added.insert(path),
        (_, None) => out.removed.insert(path),
        (Some(a), Some(b)) if a != b => out.modified.insert(path),
        _ => {}
    }
}

/// Merge what an applier wants into the live value.
pub(crate) fn merge(schema: &Schema, live: &Value, wanted: &Value) -> Value {
    match view(schema, if wanted.is_null() { live } else { wanted }) {
        View::Leaf => wanted.clone(),
        View::Map(map) => {
            // An applied null owns the field and leaves the live value alone.
            let Value::Object(wanted) = wanted else {
                return live.clone();
            };
            let mut out = live.as_object().cloned().unwrap_or_default();
            for (key, value) in wanted {
                let merged = match out.get(key) {
                    Some(old) => merge(map.member(key).0, old, value),
                    None => value.clone(),
                };
                out.insert(key.clone(), merged);
            }
            Value::Object(out)
        }
        View::List(list, kind) => {
            let Value::Array(wanted) = wanted else {
                return live.clone();
            };
            let live = live.as_array().map_or(&[][..], Vec::as_slice);
            merge_list(list, kind, live, wanted)
        }
    }
}

/// Order: live-only items stay where they are and come before what is new at their place; the rest follows the wanted order.
fn merge_list(list: &Schema, kind: &ListKind, live: &[Value], wanted: &[Value]) -> Value {
    use std::collections::{HashMap, HashSet};
    let key =
        |i: usize, item: &Value| item_step(kind, list, i, item).unwrap_or_else(|_| format!("i:{i}").into());
    let live_keys: Vec<Box<str>> = live.iter().enumerate().map(|(i, v)| key(i, v)).collect();
    let wanted_keys: Vec<Box<str>> = wanted.iter().enumerate().map(|(i, v)| key(i, v)).collect();
    let live_at: HashMap<&str, usize> = live_keys
        .iter()
        .enumerate()
        .rev()
        .map(|(i, k)| (&**k, i))
        .collect();
    let in_wanted: HashSet<&str> = wanted_keys.iter().map(|k| &**k).collect();
    let mut done: HashSet<&str> = HashSet::new();
    let mut out = Vec::with_capacity(live.len() + wanted.len());
    let (mut l, mut w) = (0, 0);
    loop {
        if let (Some(k), Some(item)) = (live_keys.get(l), live.get(l)) {
            if done.contains(&**k) {
                l += 1;
                continue;
            }
            if !in_wanted.contains(&**k) {
                out.push(item.clone());
                l += 1;
                continue;
            }
        }
        let (Some(k), Some(item)) = (wanted_keys.get(w), wanted.get(w)) else {
            break;
        };
        out.push(match live_at.get(&**k).and_then(|i| live.get(*i)) {
            Some(old) => merge(list.item(), old, item),
            None => item.clone(),
        });
        done.insert(&**k);
        w += 1;
    }
    Value::Array(out)
}

/// `value` without the members of `gone` (whole subtrees).
pub(crate) fn remove(schema: &Schema, value: &Value, gone: &FieldSet) -> Value {
    match value {
        Value::Object(members) => {
            if !matches!(view(schema, value), View::Map(_)) {
                return value.clone();
            }
            let mut out = Map::new();
            for (key, member) in members {
                let keep = match gone.0.get(&*field_step(key)) {
                    Some(node) if node.member => continue,
                    Some(node) if !node.children.0.is_empty() => {
                        remove(schema.member(key).0, member, &node.children)
                    }
                    _ => member.clone(),
                };
                out.insert(key.clone(), keep);
            }
            Value::Object(out)
        }
        Value::Array(items) => {
            let View::List(list, kind) = view(schema, value) else {
                return value.clone();
            };
            let mut out = Vec::with_capacity(items.len());
            for (i, item) in items.iter().enumerate() {
                let step = item_step(kind, list, i, item).unwrap_or_default();
                match gone.0.get(&step) {
                    Some(node) if node.member => {}
                    Some(node) if !node.children.0.is_empty() => {
                        out.push(remove(list.item(), item, &node.children))
                    }
                    _ => out.push(item.clone()),
                }
            }
            Value::Array(out)
        }
        scalar => scalar.clone(),
    }
}

/// Containers that a type names become members where something below them is.
pub(crate) fn with_named_fields(schema: &Schema, set: &FieldSet) -> FieldSet {
    let mut out = FieldSet::default();
    for (step, node) in &set.0 {
        let (child, named) = match step.strip_prefix("f:") {
            Some(name) => schema.member(name),
            None => (schema.item(), false),
        };
        let mut node = node.clone();
        node.member |= named && !node.children.0.is_empty();
        node.children = with_named_fields(child, &node.children);
        out.0.insert(step.clone(), node);
    }
    out
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::schema::builtin;

    #[test]
    fn a_list_map_is_owned_item_by_item() {
        let pod = builtin("core.v1.Pod");
        let set = field_set(
            &pod,
            &json!({"spec": {"containers": [{"name": "c", "image": "i"}]}}),
        )
        .expect("a set");
        assert_eq!(
            set.to_json(),
            json!({"f:spec": {"f:containers": {"k:{\"name\":\"c\"}": {".": {}, "f:image": {}, "f:name": {}}}}})
        );
    }

    #[test]
    fn merging_keeps_live_only_items_in_place() {
        let pod = builtin("core.v1.Pod");
        let live =
            json!({"spec": {"containers": [{"name": "a", "image": "1"}, {"name": "b", "image": "2"}]}});
        let wanted = json!({"spec": {"containers": [{"name": "b", "image": "3"}, {"name": "c"}]}});
        assert_eq!(
            merge(&pod, &live, &wanted),
            json!({"spec": {"containers": [{"name": "a", "image": "1"}, {"name": "b", "image": "3"}, {"name": "c"}]}})
        );
    }

    #[test]
    fn reordering_by_the_applier_is_followed() {
        let pod = builtin("core.v1.Pod");
        let live = json!({"spec": {"containers": [{"name": "a"}, {"name": "b"}]}});
        let wanted = json!({"spec": {"containers": [{"name": "b"}, {"name": "a"}]}});
        assert_eq!(merge(&pod, &live, &wanted), wanted);
    }

    #[test]
    fn items_that_share_a_key_are_owned_as_a_whole() {
        let env = |values: &[&str]| {
            let env: Vec<Value> = values.iter().map(|v| json!({"name": "A", "value": v})).collect();
            json!({"name": "c", "env": env})
        };
        let container = builtin("core.v1.Container");
        let found = compare(&container, &json!({"name": "c"}), &env(&["1", "2"]));
        assert_eq!(
            found.added.to_json(),
            json!({"f:env": {".": {}, "k:{\"name\":\"A\"}": {}}})
        );
        let found = compare(&container, &env(&["1", "2"]), &env(&["1", "3"]));
        assert_eq!(
            found.modified.to_json(),
            json!({"f:env": {"k:{\"name\":\"A\"}": {}}})
        );
    }

    #[test]
    fn comparing_names_what_came_went_and_changed() {
        let schema = builtin("core.v1.ConfigMap");
        let c = compare(
            &schema,
            &json!({"data": {"a": "1", "b": "2"}}),
            &json!({"data": {"b": "3", "c": "4"}}),
        );
        assert_eq!(c.added.paths(), [".data.c"]);
        assert_eq!(c.modified.paths(), [".data.b"]);
        assert_eq!(c.removed.paths(), [".data.a"]);
        let c = compare(&schema, &json!({}), &json!({"data": {"a": "1"}}));
        assert_eq!(c.added.paths(), [".data", ".data.a"]);
    }
}
