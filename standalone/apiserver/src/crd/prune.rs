//! Pruning (dropping what the schema does not name) and defaulting of custom resources.

use serde_json::Value;

use crate::schema::{Schema, Shape};

/// Drop unknown fields, noting their paths.
pub(crate) fn prune(schema: &Schema, value: &mut Value, unknown: &mut Vec<String>) {
    let mut path = String::new();
    prune_at(schema, value, &mut path, unknown);
}

fn prune_at(schema: &Schema, value: &mut Value, path: &mut String, unknown: &mut Vec<String>) {
    match (&schema.shape, value) {
        (Shape::Struct(s), Value::Object(members)) => {
            let extra: Vec<String> = if s.preserve_unknown {
                Vec::new()
            } else {
                members
                    .keys()
                    .filter(|k| !s.fields.contains_key(k.as_str()))
                    .cloned()
                    .collect()
            };
            for key in extra {
                members.remove(&key);
                unknown.push(join(path, &key));
            }
            for (key, member) in members.iter_mut() {
                if let Some(field) = s.fields.get(key.as_str()) {
                    let at = path.len();
                    *path = join(path, key);
                    if matches!(field.schema.shape, Shape::Ref(_)) {
                        prune_builtin(&field.schema, member, path, unknown);
                    } else {
                        prune_at(&field.schema, member, path, unknown);
                    }
                    path.truncate(at);
                }
            }
        }
        (Shape::Map { value: element }, Value::Object(members)) => {
            for (key, member) in members.iter_mut() {
                let at = path.len();
                *path = join(path, key);
                prune_at(element, member, path, unknown);
                path.truncate(at);
            }
        }
        (Shape::List { item, .. }, Value::Array(items)) => {
            for (i, member) in items.iter_mut().enumerate() {
                let at = path.len();
                path.push_str(&format!("[{i}]"));
                prune_at(item, member, path, unknown);
                path.truncate(at);
            }
        }
        _ => {}
    }
}

/// `metadata` is a built-in type within a custom resource.
fn prune_builtin(schema: &Schema, value: &mut Value, path: &str, unknown: &mut Vec<String>) {
    if value.is_null() {
        return;
    }
    let (conformed, report) = crate::schema::conform::conform(schema, value.take());
    unknown.extend(report.unknown.iter().map(|u| join(path, u)));
    *value = conformed;
}

fn join(path: &str, key: &str) -> String {
    if path.is_empty() {
        key.to_owned()
    } else {
        format!("{path}.{key}")
    }
}

/// Fill absent fields from the schema's defaults; null of a field that may not be null counts as absent.
pub(crate) fn default(schema: &Schema, value: &mut Value) {
    match (&schema.shape, value) {
        (Shape::Struct(s), Value::Object(members)) => {
            for (name, field) in &s.fields {
                let nullable = field.schema.rules.as_ref().is_some_and(|r| r.nullable);
                let missing = match members.get(&**name) {
                    None => true,
                    Some(Value::Null) => !nullable && field.schema.default.is_some(),
                    Some(_) => false,
                };
                if missing
                    && let Some(default) = field
                        .schema
                        .default
                        .as_ref()
                        .filter(|_| !matches!(field.schema.shape, Shape::Ref(_)))
                {
                    members.insert(name.to_string(), default.clone());
                }
                if let Some(member) = members.get_mut(&**name) {
                    default_member(&field.schema, member);
                }
            }
        }
        (Shape::Map { value: element }, Value::Object(members)) => {
            for member in members.values_mut() {
                default_member(element, member);
            }
        }
        (Shape::List { item, .. }, Value::Array(items)) => {
            for member in items {
                default_member(item, member);
            }
        }
        _ => {}
    }
}

fn default_member(schema: &Schema, member: &mut Value) {
    if !matches!(schema.shape, Shape::Ref(_)) {
        default(schema, member);
    }
}
