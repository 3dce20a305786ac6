//! `metadata` of every kind.

use serde_json::{Value, json};

use crate::error::{FieldError, FieldErrorKind};
use crate::kinds::Kind;
use crate::meta;
use crate::names;

/// All annotations together, in bytes.
const ANNOTATIONS_MAX: usize = 256 << 10;

pub(crate) fn check(kind: &Kind, object: &Value, live: Option<&Value>) -> Vec<FieldError> {
    let mut errors = Vec::new();
    let name = meta::name(object);
    if live.is_none() {
        for e in name_errors(kind, name) {
            errors.push(FieldError::invalid("metadata.name", &json!(name), e));
        }
    }
    let metadata = meta::metadata(object);
    for (key, value) in metadata
        .get("labels")
        .and_then(Value::as_object)
        .into_iter()
        .flatten()
    {
        for e in names::qualified_name_errors(key) {
            errors.push(FieldError::invalid("metadata.labels", &json!(key), e));
        }
        for e in names::label_value_errors(value.as_str().unwrap_or_default()) {
            errors.push(FieldError::invalid("metadata.labels", value, e));
        }
    }
    let mut size = 0;
    for (key, value) in metadata
        .get("annotations")
        .and_then(Value::as_object)
        .into_iter()
        .flatten()
    {
        size += key.len() + value.as_str().map_or(0, str::len);
        for e in names::qualified_name_errors(&key.to_lowercase()) {
            errors.push(FieldError::invalid("metadata.annotations", &json!(key), e));
        }
    }
    if size > ANNOTATIONS_MAX {
        errors.push(FieldError::plain(
            FieldErrorKind::TooLong,
            "metadata.annotations",
            &format!("may not be more than {ANNOTATIONS_MAX} bytes"),
        ));
    }
    owners(metadata, &mut errors);
    for (i, finalizer) in meta::finalizers(object).enumerate() {
        for e in names::qualified_name_errors(finalizer) {
            errors.push(FieldError::invalid(
                format!("metadata.finalizers[{i}]"),
                &json!(finalizer),
                e,
            ));
        }
        if !finalizer.contains('/')
            && !matches!(finalizer, "orphan" | "foregroundDeletion" | "kubernetes")
            && names::qualified_name_errors(finalizer).is_empty()
            && !kind.is_custom()
            && &*kind.group != "apiextensions.k8s.io"
        {
            errors.push(FieldError::invalid(
                format!("metadata.finalizers[{i}]"),
                &json!(finalizer),
                "name is neither a standard finalizer name nor is it fully qualified",
            ));
        }
    }
    if let Some(live) = live.filter(|l| meta::is_terminating(l)) {
        let added: Vec<&str> = meta::finalizers(object)
            .filter(|f| !meta::finalizers(live).any(|l| l == *f))
            .collect();
        if !added.is_empty() {
            let shown: Vec<String> = added.iter().map(|f| format!("{f:?}")).collect();
            errors.push(FieldError::forbidden(
                "metadata.finalizers",
                &format!(
                    "no new finalizers can be added if the object is being deleted, found new finalizers []string{{{}}}",
                    shown.join(", ")
                ),
            ));
        }
    }
    if live.is_some() && !kind.is_custom() && &*kind.group != "apiextensions.k8s.io" {
        // Kubernetes checks metadata of built-in kinds twice on an update, and reports it twice.
        let again = errors.clone();
        errors.extend(again);
    }
    errors
}

fn owners(metadata: &serde_json::Map<String, Value>, errors: &mut Vec<FieldError>) {
    let list = metadata
        .get("ownerReferences")
        .and_then(Value::as_array)
        .map_or(&[][..], Vec::as_slice);
    let mut controllers = 0;
    for (i, owner) in list.iter().enumerate() {
        let at = |f: &str| format!("metadata.ownerReferences[{i}].{f}");
        let empty = |f: &str| {
            owner
                .get(f)
                .and_then(Value::as_str)
                .unwrap_or_default()
                .is_empty()
        };
        for (field, text) in [
            ("apiVersion", "version must not be empty"),
            ("kind", "must not be empty"),
            ("name", "must not be empty"),
            ("uid", "must not be empty"),
        ] {
            if empty(field) {
                errors.push(FieldError::invalid(at(field), &json!(""), text));
            }
        }
        controllers += usize::from(owner.get("controller") == Some(&Value::Bool(true)));
    }
    if controllers > 1 {
        errors.push(FieldError::invalid(
            "metadata.ownerReferences",
            &Value::Array(list.to_vec()),
            "Only one reference can have Controller set to true",
        ));
    }
}

fn name_errors(kind: &Kind, name: &str) -> Vec<String> {
    match (&*kind.group, &*kind.plural) {
        ("", "namespaces") => names::label_errors(name),
        ("", "services") => names::dns_1035_errors(name),
        ("rbac.authorization.k8s.io", _) => names::path_segment_errors(name),
        _ => names::subdomain_errors(name),
    }
}
