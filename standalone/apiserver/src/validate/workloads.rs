//! Deployments and their kin, ConfigMaps and Secrets.

use serde_json::{Value, json};

use crate::error::{FieldError, FieldErrorKind};
use crate::kinds::Kind;
use crate::meta;
use crate::selector::LabelSelector;

/// Largest ConfigMap or Secret, in bytes of data.
const DATA_MAX: usize = 1 << 20;

pub(crate) fn check(kind: &Kind, object: &Value, live: Option<&Value>, errors: &mut Vec<FieldError>) {
    match &*kind.plural {
        "deployments" | "replicasets" | "statefulsets" | "daemonsets" => {}
        "jobs" => {
            template(object, "spec.template", errors);
            return;
        }
        _ => return,
    }
    if let Some(replicas) = meta::int_at(object, "spec.replicas").filter(|r| *r < 0) {
        errors.push(FieldError::invalid(
            "spec.replicas",
            &json!(replicas),
            "must be greater than or equal to 0",
        ));
    }
    let selector = meta::at(object, "spec.selector").filter(|s| !s.is_null());
    match selector {
        None => {
            errors.push(FieldError::required("spec.selector", ""));
            // No selector selects nothing, so not the template either.
            errors.push(FieldError::invalid(
                "spec.template.metadata.labels",
                meta::at(object, "spec.template.metadata.labels").unwrap_or(&Value::Null),
                "`selector` does not match template `labels`",
            ));
        }
        Some(selector) => {
            let parsed = LabelSelector::from_object(selector);
            if parsed.as_ref().is_some_and(LabelSelector::is_empty) {
                errors.push(FieldError::invalid(
                    "spec.selector",
                    selector,
                    format!("empty selector is invalid for {}", kind.kind.to_lowercase()),
                ));
            } else if let Some(parsed) = parsed {
                let labels = meta::at(object, "spec.template.metadata.labels")
                    .cloned()
                    .unwrap_or_default();
                if !parsed.matches_labels(&labels) {
                    errors.push(FieldError::invalid(
                        "spec.template.metadata.labels",
                        &labels,
                        "`selector` does not match template `labels`",
                    ));
                }
            }
        }
    }
    if meta::str_at(object, "spec.strategy.type") == "Recreate"
        && meta::at(object, "spec.strategy.rollingUpdate").is_some()
    {
        errors.push(FieldError::forbidden(
            "spec.strategy.rollingUpdate",
            "may not be specified when strategy `type` is 'Recreate'",
        ));
    }
    template(object, "spec.template", errors);
    let policy = meta::str_at(object, "spec.template.spec.restartPolicy");
    if !policy.is_empty() && policy != "Always" {
        errors.push(FieldError::not_supported(
            "spec.template.spec.restartPolicy",
            &json!(policy),
            &["Always"],
        ));
    }
    if let Some(live) = live {
        let (new, old) = (meta::at(object, "spec.selector"), meta::at(live, "spec.selector"));
        if new != old {
            errors.push(FieldError {
                kind: FieldErrorKind::Invalid,
                field: "spec.selector".into(),
                value: Some(go_selector(new.unwrap_or(&Value::Null))),
                detail: "field is immutable".into(),
            });
        }
    }
}

/// Go's `%v` of a LabelSelector in validation messages.
fn go_selector(selector: &Value) -> String {
    let labels = selector.get("matchLabels").cloned().unwrap_or(Value::Null);

    match labels.as_object() {
        Some(map) if !map.is_empty() => {
            let pairs: Vec<String> = map.iter().map(|(k, v)| format!("\"{k}\":{v}")).collect();
            format!("{{\"matchLabels\":{{{}}}}}", pairs.join(","))
        }
        _ if selector.is_null() => "null".to_owned(),
        _ => "{}".to_owned(),
    }
}

fn template(object: &Value, path: &str, errors: &mut Vec<FieldError>) {
    let spec = meta::at(object, &format!("{path}.spec")).unwrap_or(&Value::Null);
    super::pods::pod_spec(spec, &format!("{path}.spec"), errors);
}

/// ConfigMaps and Secrets.
pub(crate) fn data(object: &Value, live: Option<&Value>, errors: &mut Vec<FieldError>) {
    let mut size = 0;
    for section in ["data", "binaryData"] {
        for (key, value) in object
            .get(section)
            .and_then(Value::as_object)
            .into_iter()
            .flatten()
        {
            let is_secret = object.get("kind").and_then(Value::as_str) == Some("Secret");
            let length = value.as_str().map_or(0, str::len);
            size += if section == "binaryData" || is_secret {
                length / 4 * 3
            } else {
                length
            };
            for e in key_errors(key) {
                errors.push(FieldError::invalid(format!("{section}[{key}]"), &json!(key), e));
            }
            if section == "binaryData" && object.get("data").and_then(|d| d.get(key)).is_some() {
                errors.push(FieldError::invalid(
                    format!("data[{key}]"),
                    &json!(key),
                    "duplicate of key present in binaryData",
                ));
            }
        }
    }
    if size > DATA_MAX {
        let field = if object.get("kind").and_then(Value::as_str) == Some("Secret") {
            "data"
        } else {
            "[]"
        };
        errors.push(FieldError::plain(
            FieldErrorKind::TooLong,
            field,
            &format!("may not be more than {DATA_MAX} bytes"),
        ));
    }
    if let Some(live) = live {
        if live.get("immutable") == Some(&Value::Bool(true)) {
            if object.get("immutable") != Some(&Value::Bool(true)) {
                errors.push(FieldError::forbidden(
                    "immutable",
                    "field is immutable when `immutable` is set",
                ));
            }
            for section in ["data", "binaryData"] {
                if object.get(section) != live.get(section) {
                    errors.push(FieldError::forbidden(
                        section,
                        "field is immutable when `immutable` is set",
                    ));
                }
            }
        }
        if object.get("kind").and_then(Value::as_str) == Some("Secret")
            && object.get("type") != live.get("type")
        {
            errors.push(FieldError::invalid(
                "type",
                object.get("type").unwrap_or(&Value::Null),
                "field is immutable",
            ));
        }
    }
}

fn key_errors(key: &str) -> Vec<String> {
    let mut errors = Vec::new();
    if key.len() > 253 {
        errors.push("must be no more than 253 characters".to_owned());
    }
    if key.is_empty()
        || !key
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
    {
        errors.push("a valid config key must consist of alphanumeric characters, '-', '_' or '.' (e.g. 'key.name',  or 'KEY_NAME',  or 'key-name', regex used for validation is '[-._a-zA-Z0-9]+')".to_owned());
    }
    if key == "." || key == ".." || key.starts_with("..") {
        errors.push(format!("must not be '{key}'").replace("'...", "'.."));
    }
    errors
}
