//! Custom resources: structural schemas ([`rules`]), checking ([`validate`]), pruning and defaulting ([`prune`]),
//! and turning a CustomResourceDefinition into a served kind with its conditions ([`definition`]).

pub(crate) mod cel;
pub(crate) mod definition;
pub(crate) mod prune;
pub(crate) mod rules;
pub(crate) mod validate;

use serde_json::Value;

use crate::error::FieldError;
use crate::meta;

/// What a schema may not contain: it has to be structural.
fn schema_errors(crd: &Value, errors: &mut Vec<FieldError>) {
    let versions = meta::list_at(crd, "spec.versions");
    for (i, version) in versions.iter().enumerate() {
        let Some(root) = meta::at(version, "schema.openAPIV3Schema") else {
            continue;
        };
        // Kubernetes' internal form holds the schema of a single version outside of the list.
        let path = if versions.len() == 1 {
            "spec.validation.openAPIV3Schema".to_owned()
        } else {
            format!("spec.versions[{i}].schema.openAPIV3Schema")
        };
        if root.get("type") != Some(&Value::String("object".into())) {
            errors.push(FieldError::required(
                format!("{path}.type"),
                "must not be empty at the root",
            ));
        }
        structural(root, &path, errors);
    }
}

fn structural(node: &Value, path: &str, errors: &mut Vec<FieldError>) {
    let flag = |key: &str| node.get(key).and_then(Value::as_bool).unwrap_or(false);
    if node.get("type").is_none()
        && !flag("x-kubernetes-int-or-string")
        && !flag("x-kubernetes-preserve-unknown-fields")
        && path.contains('.')
    {
        let text = if path.ends_with("items") {
            "must not be empty for specified array items"
        } else if path.ends_with("openAPIV3Schema") {
            ""
        } else {
            "must not be empty for specified object fields"
        };
        if !text.is_empty() {
            errors.push(FieldError::required(format!("{path}.type"), text));
        }
    }
    cel::rule_errors(node, path, errors);
    if node.get("additionalProperties").is_some_and(|a| a != &Value::Bool(false)) && node.get("properties").is_some_and(|p| p.as_object().is_some_and(|p| !p.is_empty())) {
        errors.push(FieldError::forbidden(format!("{path}.additionalProperties"), "additionalProperties and properties are mutual exclusive"));
    }
    if flag("uniqueItems") {
        errors.push(FieldError::forbidden(
            format!("{path}.uniqueItems"),
            "uniqueItems cannot be set to true since the runtime complexity becomes quadratic",
        ));
    }
    if node.get("x-kubernetes-list-type") == Some(&Value::String("map".into())) && meta::list_at(node, "x-kubernetes-list-map-keys").is_empty() {
        errors.push(FieldError::required(
            format!("{path}.x-kubernetes-list-map-keys"),
            "must not be empty if x-kubernetes-list-type is map",
        ));
    }
    if node.get("$ref").is_some() {
        errors.push(FieldError::forbidden(
            format!("{path}.$ref"),
            "$ref is not supported",
        ));
    }
    for (name, child) in node
        .get("properties")
        .and_then(Value::as_object)
        .into_iter()
        .flatten()
    {
        structural(child, &format!("{path}.properties[{name}]"), errors);
    }
    if let Some(child @ Value::Object(_)) = node.get("additionalProperties") {
        structural(child, &format!("{path}.additionalProperties"), errors);
    }
    if let Some(child) = node.get("items") {
        structural(child, &format!("{path}.items"), errors);
    } else if node.get("type") == Some(&Value::String("array".into())) {
        errors.push(FieldError::required(format!("{path}.items"), "must be specified"));
    }
    if let Some(pattern) = node.get("pattern").and_then(Value::as_str) {
        if let Err(error) = regex::Regex::new(pattern) {
            errors.push(FieldError::invalid(
                format!("{path}.pattern"),
                &Value::String(pattern.to_owned()),
                format!("must be a valid regular expression, but isn't: {error}"),
            ));
        }
    }
}
