//! What a CRD's schema may not contain: it has to be structural, and its defaults and rules have to be usable.

use serde_json::Value;

use super::{cel, cel_check, rules, validate};
use crate::error::FieldError;
use crate::meta;

const TYPES: [&str; 6] = ["array", "boolean", "integer", "number", "object", "string"];
/// Words that name a part of the structure; branches of `allOf` and the like may not use them.
const STRUCTURE: [&str; 5] = ["type", "default", "additionalProperties", "nullable", "title"];

/// Check the schemas of all versions.
pub(crate) fn check(crd: &Value, errors: &mut Vec<FieldError>) {
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
        match root.get("type") {
            None => errors.push(FieldError::required(
                format!("{path}.type"),
                "must not be empty at the root",
            )),
            Some(Value::String(s)) if s == "object" => {}
            Some(other) => errors.push(FieldError::invalid(
                format!("{path}.type"),
                other,
                "must be object at the root",
            )),
        }
        top_metadata(root, &path, errors);
        let mut walk = Walk {
            costs: cel_check::Costs::default(),
            errors,
        };
        let at = At {
            place: Place::Root,
            uncorrelated: None,
            times: 1,
        };
        walk.node(root, &path, at);
        let Walk { costs, errors } = walk;
        costs.errors(&path, errors);
    }
}

/// Of `metadata` only the name may be constrained.
fn top_metadata(root: &Value, path: &str, errors: &mut Vec<FieldError>) {
    let Some(metadata) = meta::at(root, "properties.metadata") else {
        return;
    };
    let properties = metadata.get("properties").and_then(Value::as_object);
    let path = format!("{path}.properties[metadata]");
    if properties
        .into_iter()
        .flatten()
        .any(|(name, _)| name != "name" && name != "generateName")
    {
        errors.push(FieldError::forbidden(
            path,
            "must not specify anything other than name and generateName, but metadata is implicitly specified",
        ));
        return;
    }
    for (name, child) in properties.into_iter().flatten() {
        if child.get("default").is_some() {
            errors.push(FieldError::forbidden(
                format!("{path}.properties[{name}].default"),
                "must not be set in top-level metadata",
            ));
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    Root,
    Field,
    Items,
}

/// What a node's place in the schema means for it.
#[derive(Clone, Copy)]
struct At<'p> {
    place: Place,
    /// The list above whose items cannot be told apart, so that there is no old one to a new one.
    uncorrelated: Option<&'p str>,
    /// How often a value of the node can occur in an object.
    times: u64,
}

struct Walk<'e> {
    costs: cel_check::Costs,
    errors: &'e mut Vec<FieldError>,
}

/// Go's sentence about a regular expression that is none, where it has one.
fn go_pattern_error(pattern: &str, error: &regex::Error) -> String {
    let text = error.to_string();
    let reason = text.rsplit("error: ").next().unwrap_or(&text).trim();
    let said = match reason {
        "unclosed group" => format!("missing closing ): `{pattern}`"),
        "unopened group" => format!("unexpected ): `{pattern}`"),
        "unclosed character class" => {
            let from = pattern
                .rfind('[')
                .and_then(|at| pattern.get(at..))
                .unwrap_or(pattern);
            format!("missing closing ]: `{from}`")
        }
        reason if reason.starts_with("look-around") => {
            let from = pattern.find("(?").and_then(|at| pattern.get(at..at + 3));
            format!(
                "invalid or unsupported Perl syntax: `{}`",
                from.unwrap_or(pattern)
            )
        }
        reason => format!("{reason}: `{pattern}`"),
    };
    format!("error parsing regexp: {said}")
}

impl Walk<'_> {
    fn node(&mut self, schema: &Value, path: &str, at: At<'_>) {
        let At {
            place,
            uncorrelated,
            times,
        } = at;
        let errors = &mut *self.errors;
        let flag = |key: &str| schema.get(key).and_then(Value::as_bool).unwrap_or(false);
        let kind = meta::str_at(schema, "type");
        if kind.is_empty() {
            let open = flag("x-kubernetes-int-or-string") || flag("x-kubernetes-preserve-unknown-fields");
            if place != Place::Root && !open {
                let what = if place == Place::Items {
                    "array items"
                } else {
                    "object fields"
                };
                errors.push(FieldError::required(
                    format!("{path}.type"),
                    &format!("must not be empty for specified {what}"),
                ));
            }
        } else if !TYPES.contains(&kind) {
            errors.push(FieldError::not_supported(
                format!("{path}.type"),
                &Value::String(kind.to_owned()),
                &TYPES,
            ));
        }
        if schema.get("x-kubernetes-preserve-unknown-fields") == Some(&Value::Bool(false)) {
            errors.push(FieldError::invalid(
                format!("{path}.x-kubernetes-preserve-unknown-fields"),
                &Value::Bool(false),
                "must be true or undefined",
            ));
        }
        let has_properties = schema
            .get("properties")
            .and_then(Value::as_object)
            .is_some_and(|p| !p.is_empty());
        if has_properties
            && schema
                .get("additionalProperties")
                .is_some_and(|a| a != &Value::Bool(false))
        {
            errors.push(FieldError::forbidden(
                format!("{path}.additionalProperties"),
                "additionalProperties and properties are mutual exclusive",
            ));
        }
        if flag("uniqueItems") {
            errors.push(FieldError::forbidden(
                format!("{path}.uniqueItems"),
                "uniqueItems cannot be set to true since the runtime complexity becomes quadratic",
            ));
        }
        if schema.get("$ref").is_some() {
            errors.push(FieldError::forbidden(
                format!("{path}.$ref"),
                "$ref is not supported",
            ));
        }
        list_type(schema, kind, path, errors);
        default(schema, path, errors);
        cel::rule_errors(schema, path, uncorrelated, times, &mut self.costs, errors);
        if let Some(pattern) = schema.get("pattern").and_then(Value::as_str)
            && let Err(error) = regex::Regex::new(pattern)
        {
            errors.push(FieldError::invalid(
                format!("{path}.pattern"),
                &Value::String(pattern.to_owned()),
                format!(
                    "must be a valid regular expression, but isn't: {}",
                    go_pattern_error(pattern, &error)
                ),
            ));
        }
        for word in ["allOf", "anyOf", "oneOf"] {
            for (i, branch) in meta::list_at(schema, word).iter().enumerate() {
                let int_or_string = flag("x-kubernetes-int-or-string");
                branch_is_plain(branch, &format!("{path}.{word}[{i}]"), int_or_string, errors);
            }
        }
        if let Some(branch) = schema.get("not") {
            branch_is_plain(branch, &format!("{path}.not"), false, errors);
        }
        for (name, child) in schema
            .get("properties")
            .and_then(Value::as_object)
            .into_iter()
            .flatten()
        {
            let at = At {
                place: Place::Field,
                ..at
            };
            self.node(child, &format!("{path}.properties[{name}]"), at);
        }
        if let Some(child @ Value::Object(_)) = schema.get("additionalProperties") {
            let at = At {
                place: Place::Field,
                uncorrelated,
                times: times.saturating_mul(cel_check::occurrences(schema).max(1)),
            };
            self.node(child, &format!("{path}.additionalProperties"), at);
        }
        if let Some(child) = schema.get("items") {
            let by_key = meta::str_at(schema, "x-kubernetes-list-type") == "map";
            let uncorrelated = uncorrelated.or((!by_key).then_some(path));
            let at = At {
                place: Place::Items,
                uncorrelated,
                times: times.saturating_mul(cel_check::occurrences(schema).max(1)),
            };
            self.node(child, &format!("{path}.items"), at);
        } else if kind == "array" {
            self.errors
                .push(FieldError::required(format!("{path}.items"), "must be specified"));
        }
    }
}

fn list_type(schema: &Value, kind: &str, path: &str, errors: &mut Vec<FieldError>) {
    let Some(list_type) = schema.get("x-kubernetes-list-type") else {
        return;
    };
    if kind != "array" {
        errors.push(FieldError::invalid(
            format!("{path}.type"),
            &Value::String(kind.to_owned()),
            "must be array if x-kubernetes-list-type is specified",
        ));
    }
    let keys = meta::list_at(schema, "x-kubernetes-list-map-keys");
    match list_type.as_str().unwrap_or_default() {
        "atomic" => {}
        "set" => {
            let item = meta::at(schema, "items").unwrap_or(&Value::Null);
            if meta::str_at(item, "type") == "object"
                && meta::str_at(item, "x-kubernetes-map-type") != "atomic"
            {
                errors.push(FieldError::invalid(
                    format!("{path}.items.x-kubernetes-map-type"),
                    &Value::Null,
                    "must be atomic as item of a list with x-kubernetes-list-type=set",
                ));
            }
        }
        "map" if keys.is_empty() => errors.push(FieldError::required(
            format!("{path}.x-kubernetes-list-map-keys"),
            "must not be empty if x-kubernetes-list-type is map",
        )),
        "map" => {
            let properties = meta::at(schema, "items.properties");
            let unknown = |k: &Value| {
                properties
                    .and_then(|p| p.get(k.as_str().unwrap_or_default()))
                    .is_none()
            };
            if keys.iter().any(unknown) {
                errors.push(FieldError::invalid(
                    format!("{path}.x-kubernetes-list-map-keys"),
                    &Value::Array(keys.to_vec()),
                    "entries must all be names of item properties",
                ));
            }
        }
        _ => {
            let mut error =
                FieldError::not_supported(format!("{path}.x-kubernetes-list-type"), list_type, &[]);
            error.detail = "supported values: \"atomic\", \"set\", \"map\"".into();
            errors.push(error);
        }
    }
}

/// A default has to be a value that the schema accepts.
fn default(schema: &Value, path: &str, errors: &mut Vec<FieldError>) {
    let Some(value) = schema.get("default") else {
        return;
    };
    let found = validate::validate(&rules::parse(schema, false), value, None);
    errors.extend(found.into_iter().map(|mut e| {
        e.field = match e.field.as_str() {
            "<nil>" => format!("{path}.default"),
            inner => format!("{path}.default.{inner}"),
        };
        e
    }));
}

/// Branches check values; the structure is that of the node that holds them.
fn branch_is_plain(schema: &Value, path: &str, int_or_string: bool, errors: &mut Vec<FieldError>) {
    for (name, child) in schema
        .get("properties")
        .and_then(Value::as_object)
        .into_iter()
        .flatten()
    {
        branch_is_plain(child, &format!("{path}.properties[{name}]"), false, errors);
    }
    if let Some(child) = schema.get("items") {
        branch_is_plain(child, &format!("{path}.items"), false, errors);
    }
    for word in STRUCTURE {
        // `anyOf: [{type: integer}, {type: string}]` is the long form of int-or-string.
        let allowed = word == "type" && int_or_string;
        if schema.get(word).is_some() && !allowed {
            errors.push(FieldError::forbidden(
                format!("{path}.{word}"),
                "must be empty to be structural",
            ));
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn errors(spec: Value) -> Vec<String> {
        let crd = json!({"spec": {"versions": [{"schema": {"openAPIV3Schema": {"type": "object", "properties": {"spec": spec}}}}]}});
        let mut out = Vec::new();
        check(&crd, &mut out);
        out.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn schemas_that_are_not_structural_are_refused_with_the_path() {
        for (schema, wanted) in [
            (json!({"properties": {}}), "properties[spec].type: Required value"),
            (json!({"type": "foo"}), "Unsupported value: \"foo\""),
            (json!({"type": "array"}), "items: Required value"),
            (
                json!({"type": "string", "default": 5}),
                "properties[spec].default: Invalid value: \"integer\"",
            ),
            (
                json!({"type": "object", "anyOf": [{"type": "object"}]}),
                "anyOf[0].type: Forbidden",
            ),
        ] {
            let found = errors(schema);
            assert!(found.iter().any(|e| e.contains(wanted)), "{wanted}: {found:?}");
        }
        assert!(errors(json!({"x-kubernetes-int-or-string": true, "anyOf": [{"type": "integer"}, {"type": "string"}]})).is_empty());
    }
}
