//! Between the stored form of an object and the version a client asked for.
//!
//! Custom resources change only their `apiVersion` (conversion strategy None). Events are stored as core/v1 and read as
//! events.k8s.io/v1 as well, under the names that the newer group gives the same fields.

use serde_json::{Map, Value};

use crate::kinds::{Kind, Version};
use crate::meta;
use crate::selector::FieldSelector;

/// Whether an object of this kind is served as it is stored, but for its apiVersion.
pub(crate) fn is_stored_form(kind: &Kind) -> bool {
    !is_new_event(kind)
}

fn is_new_event(kind: &Kind) -> bool {
    &*kind.group == "events.k8s.io"
}

/// Fields of an Event by their events.k8s.io and core names.
const EVENT_FIELDS: [(&str, &str); 7] = [
    ("note", "message"),
    ("regarding", "involvedObject"),
    ("reportingController", "reportingComponent"),
    ("deprecatedSource", "source"),
    ("deprecatedFirstTimestamp", "firstTimestamp"),
    ("deprecatedLastTimestamp", "lastTimestamp"),
    ("deprecatedCount", "count"),
];

fn rename(object: &mut Map<String, Value>, from: &str, to: &str) {
    if let Some(value) = object.remove(from) {
        object.insert(to.to_owned(), value);
    }
}

/// An object as stored, in `version`.
pub(crate) fn from_hub(kind: &Kind, version: &Version, stored: &Value) -> Value {
    let mut object = stored.clone();
    if is_new_event(kind) {
        let map = meta::as_object_mut(&mut object);
        for (new, core) in EVENT_FIELDS {
            rename(map, core, new);
        }
        // Core always writes source and involvedObject; the newer group writes them under its own names.
        map.insert("apiVersion".into(), Value::String("events.k8s.io/v1".into()));
        if let Some(instance) = map.get_mut("reportingInstance")
            && instance.as_str() == Some("")
            && map.get("eventTime").is_none_or(Value::is_null)
        {
            map.remove("reportingInstance");
        }
        if map.get("reportingController").and_then(Value::as_str) == Some("") {
            map.remove("reportingController");
        }
        return object;
    }
    if kind.is_custom() {
        meta::as_object_mut(&mut object).insert(
            "apiVersion".into(),
            Value::String(kind.api_version(&version.name)),
        );
    }
    object
}

/// An object in a served version, as it is to be stored.
pub(crate) fn to_hub(kind: &Kind, mut object: Value) -> Value {
    if is_new_event(kind) {
        let map = meta::as_object_mut(&mut object);
        for (new, core) in EVENT_FIELDS {
            rename(map, new, core);
        }
        map.insert("apiVersion".into(), Value::String("v1".into()));
        for (field, zero) in [
            ("reportingComponent", Value::String(String::new())),
            ("reportingInstance", Value::String(String::new())),
            ("source", Value::Object(Map::new())),
            ("involvedObject", Value::Object(Map::new())),
            ("firstTimestamp", Value::Null),
            ("lastTimestamp", Value::Null),
        ] {
            map.entry(field.to_owned()).or_insert(zero);
        }
        return object;
    }
    if kind.is_custom()
        && let Some(version) = kind.storage_version()
    {
        meta::as_object_mut(&mut object).insert(
            "apiVersion".into(),
            Value::String(kind.api_version(&version.name)),
        );
    }
    object
}

/// Field selectors are evaluated on the stored form.
pub(crate) fn hub_field_names(kind: &Kind, selector: &mut FieldSelector) {
    if !is_new_event(kind) {
        return;
    }
    for term in &mut selector.0 {
        if let Some(rest) = term.path.strip_prefix("regarding.") {
            term.path = format!("involvedObject.{rest}");
        } else if term.path == "reportingController" {
            term.path = "reportingComponent".into();
        }
    }
}
