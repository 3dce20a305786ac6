//! Checking custom resources against their schema, with the messages of Kubernetes' validation.

use serde_json::Value;

use super::rules::Rules;
use crate::error::{FieldError, FieldErrorKind, show};
use crate::schema::{ListKind, Schema, Shape};

/// Check `value`; `old` is its former state where there is one, for transition rules and ratcheting.
pub(crate) fn validate(schema: &Schema, value: &Value, old: Option<&Value>) -> Vec<FieldError> {
    let mut errors = Vec::new();
    check(schema, value, "", &mut errors);
    if errors.is_empty() {
        super::cel::check(schema, value, old, "", &mut errors);
    }
    if let Some(old) = old {
        // Ratcheting: what was wrong before and is unchanged does not block a write.
        errors.retain(|e| !unchanged(value, old, &e.field));
    }
    errors
}

fn unchanged(value: &Value, old: &Value, field: &str) -> bool {
    !field.is_empty()
        && field != "<nil>"
        && matches!((lookup(value, field), lookup(old, field)), (Some(a), Some(b)) if a == b)
}

fn lookup<'a>(value: &'a Value, path: &str) -> Option<&'a Value> {
    let mut at = value;
    for part in path.split('.') {
        let (name, indices) = part.split_once('[').map_or((part, ""), |(n, i)| (n, i));
        if !name.is_empty() {
            at = at.get(name)?;
        }
        for index in indices.split('[').filter(|i| !i.is_empty()) {
            let index = index.trim_end_matches(']');
            at = match index.parse::<usize>() {
                Ok(i) => at.get(i)?,
                Err(_) => at.get(index)?,
            };
        }
    }
    Some(at)
}

fn child(path: &str, name: &str) -> String {
    if path.is_empty() {
        name.to_owned()
    } else {
        format!("{path}.{name}")
    }
}

fn type_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(n) if n.is_f64() && n.as_f64().is_some_and(|f| f.fract() != 0.0) => "number",
        Value::Number(_) => "integer",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}

fn fits(rules: &Rules, value: &Value) -> bool {
    if value.is_null() {
        return rules.nullable;
    }
    if rules.int_or_string {
        return matches!(type_of(value), "integer" | "string");
    }
    match (rules.kind.as_str(), type_of(value)) {
        ("", _) => true,
        ("number", "integer" | "number") => true,
        (wanted, found) => wanted == found,
    }
}

fn check(schema: &Schema, value: &Value, path: &str, errors: &mut Vec<FieldError>) {
    let Some(rules) = &schema.rules else { return };
    let shown_path = || {
        if path.is_empty() {
            "<nil>".to_owned()
        } else {
            path.to_owned()
        }
    };
    if value.is_null() {
        // Null of an optional field is no value at all.
        return;
    }
    if !fits(rules, value) {
        let wanted = if rules.int_or_string {
            "integer,string"
        } else {
            rules.kind.as_str()
        };
        // Kubernetes prints composite values as their type here.
        let printed = match value {
            Value::Object(_) => "\"object\"".to_owned(),
            Value::Array(_) => "\"array\"".to_owned(),
            Value::Null => "\"null\"".to_owned(),
            Value::String(_) => "\"string\"".to_owned(),
            Value::Bool(_) => "\"boolean\"".to_owned(),
            Value::Number(_) => format!("\"{}\"", type_of(value)),
        };
        errors.push(FieldError {
            kind: FieldErrorKind::TypeInvalid,
            field: shown_path(),
            value: Some(printed),
            detail: format!("{path} in body must be of type {wanted}: \"{}\"", type_of(value)),
        });
        return;
    }
    if value.is_null() {
        return;
    }
    check_rules(rules, value, path, errors);
    match (&schema.shape, value) {
        (Shape::Struct(s), Value::Object(members)) => {
            for (name, member) in members {
                if let Some(field) = s.fields.get(name.as_str()) {
                    let nullable = field.schema.rules.as_ref().is_none_or(|r| r.nullable);
                    if member.is_null() && !nullable && rules.required.iter().any(|r| r == name) {
                        errors.push(FieldError::required(child(path, name), ""));
                        continue;
                    }
                    check(&field.schema, member, &child(path, name), errors);
                }
            }
        }
        (Shape::Map { value: element }, Value::Object(members)) => {
            for (name, member) in members {
                check(element, member, &child(path, name), errors);
            }
        }
        (Shape::List { item, kind }, Value::Array(items)) => {
            for (i, member) in items.iter().enumerate() {
                check(item, member, &format!("{path}[{i}]"), errors);
            }
            check_list_kind(kind, schema, items, path, errors);
        }
        _ => {}
    }
}

fn check_list_kind(
    kind: &ListKind,
    schema: &Schema,
    items: &[Value],
    path: &str,
    errors: &mut Vec<FieldError>,
) {
    let mut seen = std::collections::HashSet::new();
    for (i, item) in items.iter().enumerate() {
        if let (ListKind::Set | ListKind::Map(_), Ok(step)) =
            (kind, crate::apply::typed::item_step(kind, schema, i, item))
            && !seen.insert(step.clone())
        {
            let value = match kind {
                ListKind::Map(_) => {
                    serde_json::from_str(step.strip_prefix("k:").unwrap_or_default()).unwrap_or(Value::Null)
                }
                _ => item.clone(),
            };
            errors.push(FieldError::duplicate(format!("{path}[{i}]"), &value));
        }
    }
}

fn check_rules(rules: &Rules, value: &Value, path: &str, errors: &mut Vec<FieldError>) {
    let field = if path.is_empty() {
        "<nil>".to_owned()
    } else {
        path.to_owned()
    };
    let invalid = |errors: &mut Vec<FieldError>, text: String| {
        errors.push(FieldError::invalid(
            field.clone(),
            value,
            format!("{path} in body {text}"),
        ));
    };
    if let Some(n) = value.as_f64() {
        if let Some(min) = rules.minimum
            && (n < min || (rules.exclusive_minimum && n <= min))
        {
            let text = if rules.exclusive_minimum {
                "should be greater than"
            } else {
                "should be greater than or equal to"
            };
            invalid(errors, format!("{text} {}", number(min)));
        }
        if let Some(max) = rules.maximum
            && (n > max || (rules.exclusive_maximum && n >= max))
        {
            let text = if rules.exclusive_maximum {
                "should be less than"
            } else {
                "should be less than or equal to"
            };
            invalid(errors, format!("{text} {}", number(max)));
        }
        if let Some(step) = rules.multiple_of.filter(|s| *s != 0.0) {
            let ratio = n / step;
            if (ratio - ratio.round()).abs() > 1e-9 {
                invalid(errors, format!("should be a multiple of {}", number(step)));
            }
        }
    }
    if let Some(text) = value.as_str() {
        let length = text.chars().count() as u64;
        // The first thing that is wrong with a text is the only one that is said.
        if let Some(max) = rules.max_length.filter(|m| length > *m) {
            errors.push(too_long(&field, max));
        } else if let Some(min) = rules.min_length.filter(|m| length < *m) {
            invalid(errors, format!("should be at least {min} chars long"));
        } else if let Some((pattern, regex)) = &rules.pattern
            && regex.as_ref().is_some_and(|r| !r.is_match(text))
        {
            invalid(errors, format!("should match '{pattern}'"));
        }
        if let Some(format) = &rules.format
            && !super::cel::format_holds(format, text)
        {
            errors.push(FieldError {
                kind: FieldErrorKind::TypeInvalid,
                field: field.clone(),
                value: Some(show(value)),
                detail: format!("{path} in body must be of type {format}: {text:?}"),
            });
        }
    }
    if let Some(items) = value.as_array() {
        let length = items.len() as u64;
        if let Some(max) = rules.max_items.filter(|m| length > *m) {
            errors.push(FieldError {
                kind: FieldErrorKind::TooMany,
                field: field.clone(),
                value: Some(length.to_string()),
                detail: at_most(max),
            });
        }
        if let Some(min) = rules.min_items.filter(|m| length < *m) {
            errors.push(FieldError {
                kind: FieldErrorKind::Invalid,
                field: field.clone(),
                value: Some(length.to_string()),
                detail: format!("{path} in body should have at least {min} items"),
            });
        }
        if rules.unique_items
            && items
                .iter()
                .enumerate()
                .any(|(i, a)| items.iter().take(i).any(|b| a == b))
        {
            invalid(errors, "shouldn't contain duplicates".to_owned());
        }
    }
    if let Some(members) = value.as_object() {
        let count = members.len() as u64;
        if let Some(max) = rules.max_properties.filter(|m| count > *m) {
            errors.push(FieldError {
                kind: FieldErrorKind::TooMany,
                field: field.clone(),
                value: Some(count.to_string()),
                detail: at_most(max),
            });
        }
        if let Some(min) = rules.min_properties.filter(|m| count < *m) {
            errors.push(FieldError {
                kind: FieldErrorKind::Invalid,
                field: field.clone(),
                value: Some(count.to_string()),
                detail: format!("{path} in body should have at least {min} properties"),
            });
        }
        for name in &rules.required {
            if !members.contains_key(name) {
                errors.push(FieldError::required(child(path, name), ""));
            }
        }
        if rules.embedded {
            check_embedded(members, path, errors);
        }
    }
    if let Some(choices) = &rules.choices
        && !choices.iter().any(|c| c == value)
    {
        let list: Vec<String> = choices.iter().map(show).collect();
        errors.push(FieldError {
            kind: FieldErrorKind::NotSupported,
            field: field.clone(),
            value: Some(show(value)),
            detail: format!("supported values: {}", list.join(", ")),
        });
    }
    check_logic(rules, value, path, errors);
}

fn check_logic(rules: &Rules, value: &Value, path: &str, errors: &mut Vec<FieldError>) {
    let passes = |schema: &Schema| {
        let mut found = Vec::new();
        check(schema, value, path, &mut found);
        found
    };
    let fail = |errors: &mut Vec<FieldError>, text: &str| {
        errors.push(FieldError {
            kind: FieldErrorKind::Invalid,
            field: "<nil>".to_owned(),
            value: Some("\"\"".to_owned()),
            detail: format!("{path:?} {text}"),
        });
    };
    if !rules.any_of.is_empty() {
        let results: Vec<Vec<FieldError>> = rules.any_of.iter().map(passes).collect();
        if results.iter().all(|r| !r.is_empty()) {
            fail(errors, "must validate at least one schema (anyOf)");
            errors.extend(results.into_iter().min_by_key(Vec::len).into_iter().flatten());
        }
    }
    if !rules.one_of.is_empty() {
        let results: Vec<Vec<FieldError>> = rules.one_of.iter().map(passes).collect();
        let valid = results.iter().filter(|r| r.is_empty()).count();
        if valid != 1 {
            let found = if valid == 0 {
                "Found none valid"
            } else {
                &format!("Found {valid} valid alternatives")
            };
            fail(
                errors,
                &format!("must validate one and only one schema (oneOf). {found}"),
            );
            if valid == 0 {
                errors.extend(results.into_iter().min_by_key(Vec::len).into_iter().flatten());
            }
        }
    }
    if !rules.all_of.is_empty() {
        let failed: Vec<FieldError> = rules.all_of.iter().flat_map(passes).collect();
        if !failed.is_empty() {
            let valid = rules.all_of.iter().filter(|s| passes(s).is_empty()).count();
            let none = if valid == 0 { ". None validated" } else { "" };
            fail(errors, &format!("must validate all the schemas (allOf){none}"));
            errors.extend(failed);
        }
    }
    if let Some(not) = &rules.not
        && passes(not).is_empty()
    {
        fail(errors, "must not validate the schema (not)");
    }
}

fn check_embedded(members: &serde_json::Map<String, Value>, path: &str, errors: &mut Vec<FieldError>) {
    for name in ["apiVersion", "kind"] {
        if members
            .get(name)
            .and_then(Value::as_str)
            .unwrap_or_default()
            .is_empty()
        {
            errors.push(FieldError::required(child(path, name), ""));
        }
    }
    let text = |name: &str| members.get(name).and_then(Value::as_str).unwrap_or_default();
    let (api_version, kind) = (text("apiVersion"), text("kind"));
    if api_version.matches('/').count() > 1 {
        errors.push(FieldError::invalid(
            child(path, "apiVersion"),
            &Value::String(api_version.to_owned()),
            format!("unexpected GroupVersion string: {api_version}"),
        ));
    }
    if !kind.is_empty() {
        for error in crate::names::dns_1035_errors(&kind.to_lowercase()) {
            errors.push(FieldError::invalid(
                child(path, "kind"),
                &Value::String(kind.to_owned()),
                format!("may have mixed case, but should otherwise match: {error}"),
            ));
        }
    }
    let labels = members
        .get("metadata")
        .and_then(|metadata| metadata.get("labels"));
    for (key, value) in labels.and_then(Value::as_object).into_iter().flatten() {
        let at = format!("{}.labels", child(path, "metadata"));
        for error in crate::names::qualified_name_errors(key) {
            errors.push(FieldError::invalid(
                at.clone(),
                &Value::String(key.clone()),
                error,
            ));
        }
        let value = value.as_str().unwrap_or_default();
        for error in crate::names::label_value_errors(value) {
            errors.push(FieldError::invalid(
                at.clone(),
                &Value::String(value.to_owned()),
                error,
            ));
        }
    }
}

fn at_most(max: u64) -> String {
    format!("must have at most {max} item{}", if max == 1 { "" } else { "s" })
}

fn too_long(field: &str, max: u64) -> FieldError {
    FieldError::plain(
        FieldErrorKind::TooLong,
        field,
        &format!("may not be more than {max} bytes"),
    )
}

fn number(n: f64) -> String {
    if n.fract() == 0.0 && n.abs() < 1e15 {
        format!("{n:.0}")
    } else {
        n.to_string()
    }
}
