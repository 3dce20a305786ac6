//! Tables, the form in which `kubectl get` asks for objects.

mod builtin;
pub(crate) mod jsonpath;
mod pods;

use jiff::Timestamp;
use serde_json::{Value, json};

use crate::kinds::{Column, Kind, Version};
use crate::{meta, time};

fn definition(name: &str, kind: &str, format: &str, description: &str, priority: i64) -> Value {
    json!({"name": name, "type": kind, "format": format, "description": description, "priority": priority})
}

fn definitions(kind: &Kind, version: &Version) -> Vec<Value> {
    if kind.is_custom() {
        let mut out = vec![definition("Name", "string", "name", NAME_DESCRIPTION, 0)];
        for c in columns(version) {
            let described = if c.description.is_empty() {
                format!(
                    "Custom resource definition column (in JSONPath format): {}",
                    c.json_path
                )
            } else {
                c.description.clone()
            };
            out.push(definition(&c.name, &c.r#type, &c.format, &described, c.priority));
        }
        return out;
    }
    builtin::definitions(kind)
}

const NAME_DESCRIPTION: &str = "Name must be unique within a namespace. Is required when creating resources, although some resources may allow a client to request the generation of an appropriate name automatically. Name is primarily intended for creation idempotence and configuration definition. Cannot be updated. More info: https://kubernetes.io/docs/concepts/overview/working-with-objects/names#names";

fn columns(version: &Version) -> Vec<Column> {
    if version.columns.is_empty() {
        return vec![Column {
            name: "Age".into(),
            r#type: "date".into(),
            format: String::new(),
            description: "CreationTimestamp is a timestamp representing the server time when this object was created. It is not guaranteed to be set in happens-before order across separate operations. Clients may not set this value. It is represented in RFC3339 form and is in UTC.\n\nPopulated by the system. Read-only. Null for lists. More info: https://git.k8s.io/community/contributors/devel/sig-architecture/api-conventions.md#metadata".into(),
            priority: 0,
            json_path: ".metadata.creationTimestamp".into(),
        }];
    }
    version.columns.clone()
}

fn cells(kind: &Kind, version: &Version, object: &Value, now: Timestamp) -> Vec<Value> {
    if !kind.is_custom() {
        return builtin::cells(kind, object, now);
    }
    let mut out = vec![json!(meta::name(object))];
    for column in columns(version) {
        let found = jsonpath::find(object, &column.json_path);
        out.push(custom_cell(&column, &found, now));
    }
    out
}

fn custom_cell(column: &Column, found: &[&Value], now: Timestamp) -> Value {
    let Some(first) = found.first().filter(|v| !v.is_null()) else {
        return Value::Null;
    };
    match column.r#type.as_str() {
        "integer" => match first {
            Value::Number(n) => n.as_i64().map_or_else(
                || n.as_f64().map_or(Value::Null, |f| json!(f as i64)),
                |i| json!(i),
            ),
            _ => Value::Null,
        },
        "number" => match first {
            Value::Number(_) => (*first).clone(),
            _ => Value::Null,
        },
        "boolean" => match first {
            Value::Bool(_) => (*first).clone(),
            _ => Value::Null,
        },
        "date" => match first.as_str().and_then(time::parse) {
            Some(at) => json!(time::human((now.as_second() - at.as_second()).max(0))),
            None => json!("<invalid>"),
        },
        _ => json!(jsonpath::text(first)),
    }
}

fn row(kind: &Kind, version: &Version, object: &Value, include: &str, now: Timestamp) -> Value {
    let mut row = json!({"cells": cells(kind, version, object, now)});
    if &*kind.plural == "pods"
        && kind.group.is_empty()
        && let Some(conditions) = pods::row_conditions(object)
    {
        row["conditions"] = conditions;
    }
    match include {
        "None" => {}
        "Object" => row["object"] = object.clone(),
        _ => row["object"] = crate::http::respond::partial(object),
    }
    row
}

fn table(
    kind: &Kind,
    version: &Version,
    objects: &[Value],
    metadata: &Value,
    include: &str,
    now: Timestamp,
    with_columns: bool,
) -> Value {
    let rows: Vec<Value> = objects
        .iter()
        .map(|o| row(kind, version, o, include, now))
        .collect();
    let definitions = if with_columns {
        json!(definitions(kind, version))
    } else {
        Value::Null
    };
    json!({"kind": "Table", "apiVersion": "meta.k8s.io/v1", "metadata": metadata, "columnDefinitions": definitions, "rows": rows})
}

pub(crate) fn of_list(
    kind: &Kind,
    version: &Version,
    objects: &[Value],
    metadata: &Value,
    include: &str,
    now: Timestamp,
) -> Value {
    table(kind, version, objects, metadata, include, now, true)
}

pub(crate) fn of_one(kind: &Kind, version: &Version, object: &Value, include: &str, now: Timestamp) -> Value {
    let metadata = json!({"resourceVersion": meta::text(object, "resourceVersion")});
    table(
        kind,
        version,
        std::slice::from_ref(object),
        &metadata,
        include,
        now,
        true,
    )
}

/// A watch event: the column definitions come only with the first.
pub(crate) fn of_event(
    kind: &Kind,
    version: &Version,
    object: &Value,
    with_columns: bool,
    include: &str,
    now: Timestamp,
) -> Value {
    let metadata = json!({"resourceVersion": meta::text(object, "resourceVersion")});
    table(
        kind,
        version,
        std::slice::from_ref(object),
        &metadata,
        include,
        now,
        with_columns,
    )
}
