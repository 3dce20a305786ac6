//! Fitting a decoded document to a built-in type, as Go's decoder and encoder would between them: unknown fields are dropped and named,
//! a value of the wrong type is refused in the decoder's words, nulls and omitted-when-empty values vanish, structs that Go always writes appear.

use serde_json::{Map, Value};

use super::{EmptyValue, Field, Scalar, Schema, Shape, Struct};
use crate::quantity;
use crate::time;

/// What was noticed while conforming.
#[derive(Debug, Default)]
pub(crate) struct Report {
    /// Paths of fields that the type does not have, in document order.
    pub(crate) unknown: Vec<String>,
    /// The first value of a wrong type.
    pub(crate) error: Option<String>,
    /// The same in the words of server-side apply, which knows a field's path but no Go structs.
    pub(crate) typed: Option<String>,
}

/// Where in a document one is.
#[derive(Default)]
struct At {
    /// Every step, as `spec.containers[0].env`.
    path: String,
    /// Fields of structs alone, as Go's decoder names them: `spec.containers.env`.
    fields: String,
    /// The struct that has the last of the fields.
    owner: &'static str,
}

impl At {
    /// What `inner` finds one step further. `owner` is given where the step is a field of a struct.
    fn step<T>(&mut self, name: &str, owner: Option<&'static str>, inner: impl FnOnce(&mut Self) -> T) -> T {
        let (path, fields, before) = (self.path.len(), self.fields.len(), self.owner);
        if !self.path.is_empty() && !name.starts_with('[') {
            self.path.push('.');
        }
        self.path.push_str(name);
        if let Some(owner) = owner {
            if !self.fields.is_empty() {
                self.fields.push('.');
            }
            self.fields.push_str(name);
            self.owner = owner;
        }
        let found = inner(self);
        self.path.truncate(path);
        self.fields.truncate(fields);
        self.owner = before;
        found
    }
}

/// Fit `value` to `schema`.
pub(crate) fn conform(schema: &Schema, value: Value) -> (Value, Report) {
    let mut report = Report::default();
    let value = walk(schema, value, &mut At::default(), &mut report);
    (value, report)
}

/// A type as Go's reflection prints it.
fn go_type(schema: &Schema) -> String {
    match &schema.shape {
        Shape::Ref(id) => match schema.resolve().shape {
            Shape::Struct(_) => {
                let name = super::builtin_name(*id);
                let mut parts = name.rsplitn(3, '.');
                let (kind, version) = (parts.next().unwrap_or(name), parts.next().unwrap_or_default());
                format!("{version}.{kind}")
            }
            _ => go_type(schema.resolve()),
        },
        Shape::Scalar(scalar) => go_scalar(*scalar).to_owned(),
        Shape::List { item, .. } => format!("[]{}", go_type(item)),
        Shape::Map { value } => format!("map[string]{}", go_type(value)),
        Shape::Any | Shape::Open | Shape::Struct(_) => "map[string]interface {}".to_owned(),
    }
}

fn go_scalar(scalar: Scalar) -> &'static str {
    match scalar {
        Scalar::String | Scalar::Time | Scalar::MicroTime => "string",
        Scalar::Int32 => "int32",
        Scalar::Int64 => "int64",
        Scalar::Number => "float64",
        Scalar::Boolean => "bool",
        Scalar::Bytes => "[]uint8",
        Scalar::IntOrString => "intstr.IntOrString",
        Scalar::Quantity => "resource.Quantity",
    }
}

fn walk(schema: &Schema, value: Value, path: &mut At, report: &mut Report) -> Value {
    match &schema.resolve().shape {
        Shape::Any | Shape::Ref(_) => value,
        Shape::Open => value,
        Shape::Scalar(scalar) => walk_scalar(*scalar, value, path, report),
        Shape::List { item, .. } => match value {
            Value::Array(items) => {
                let mut out = Vec::with_capacity(items.len());
                for (i, v) in items.into_iter().enumerate() {
                    out.push(if v.is_null() {
                        null_item(item)
                    } else {
                        path.step(&format!("[{i}]"), None, |path| walk(item, v, path, report))
                    });
                }
                Value::Array(out)
            }
            Value::Null => Value::Null,
            other => mismatch(&other, &go_type(schema), path, report),
        },
        Shape::Map { value: element } => match value {
            Value::Object(members) => {
                let mut out = Map::new();
                for (key, v) in members {
                    let v = if v.is_null() {
                        null_item(element)
                    } else {
                        path.step(&key, None, |path| walk(element, v, path, report))
                    };
                    out.insert(key, v);
                }
                Value::Object(out)
            }
            Value::Null => Value::Null,
            other => mismatch(&other, &go_type(schema), path, report),
        },
        Shape::Struct(s) => match value {
            Value::Object(members) => walk_struct(s, schema.go_name(), members, path, report),
            Value::Null => Value::Null,
            other => mismatch(&other, &go_type(schema), path, report),
        },
    }
}

/// Go decodes a null item into the element's zero value.
fn null_item(item: &Schema) -> Value {
    match &item.resolve().shape {
        Shape::Scalar(Scalar::String | Scalar::Bytes | Scalar::IntOrString) => Value::String(String::new()),
        Shape::Scalar(Scalar::Quantity) => Value::String("0".into()),
        Shape::Struct(_) => super::zero_value(item),
        _ => Value::Null,
    }
}

fn walk_struct(
    s: &Struct,
    owner: &'static str,
    mut members: Map<String, Value>,
    path: &mut At,
    report: &mut Report,
) -> Value {
    let mut out = Map::new();
    for (name, field) in &s.fields {
        let given = members.remove(&**name).filter(|v| !v.is_null());
        match given {
            Some(value) => {
                let value = path.step(name, Some(owner), |path| walk(&field.schema, value, path, report));
                if value.is_null() && !matches!(field.schema.resolve().shape, Shape::Any) {
                    absent(name, field, &mut out);
                } else if field.empty == EmptyValue::Dropped && super::is_go_zero(&value) {
                    // omitted when empty
                } else {
                    out.insert(name.to_string(), value);
                }
            }
            None => absent(name, field, &mut out),
        }
    }
    for (key, value) in members {
        if s.preserve_unknown {
            out.insert(key, value);
        } else {
            path.step(&key, None, |at| report.unknown.push(at.path.clone()));
        }
    }
    Value::Object(out)
}

/// What Go writes for a field that was not given.
fn absent(name: &str, field: &Field, out: &mut Map<String, Value>) {
    match &field.schema.default {
        Some(Value::Object(_)) => {
            // Times, quantities and open values are pointers or omitzero in the types concerned.
            if let Shape::Struct(_) = &field.schema.resolve().shape {
                out.insert(name.to_owned(), super::zero_value(&field.schema));
            }
        }
        Some(other) if super::is_go_zero(other) => {
            // Also `null`, of times that are no pointers.
            out.insert(name.to_owned(), other.clone());
        }
        Some(_) => {}
        None if field.required
            && matches!(
                field.schema.resolve().shape,
                Shape::List { .. } | Shape::Map { .. }
            ) =>
        {
            out.insert(name.to_owned(), Value::Null);
        }
        None => {}
    }
}

fn walk_scalar(scalar: Scalar, value: Value, path: &At, report: &mut Report) -> Value {
    match (scalar, value) {
        (_, Value::Null) => Value::Null,
        (Scalar::String, v @ Value::String(_)) => v,
        (Scalar::Boolean, v @ Value::Bool(_)) => v,
        (Scalar::Number, v @ Value::Number(_)) => v,
        (Scalar::Int32, Value::Number(n)) => match n.as_i64() {
            Some(i) if i32::try_from(i).is_ok() => Value::Number(n),
            _ => number_mismatch(&n, "int32", path, report),
        },
        (Scalar::Int64, Value::Number(n)) => {
            if n.is_i64() {
                Value::Number(n)
            } else {
                number_mismatch(&n, "int64", path, report)
            }
        }
        (Scalar::IntOrString, Value::Number(n)) => match n.as_i64() {
            Some(i) if i32::try_from(i).is_ok() => Value::Number(n),
            _ => number_mismatch(&n, "int32", path, report),
        },
        (Scalar::IntOrString, v @ Value::String(_)) => v,
        (Scalar::Quantity, Value::String(text)) => match quantity::canonical(&text) {
            Some(canonical) => Value::String(canonical),
            None => fail(quantity::MALFORMED.to_owned(), report),
        },
        (Scalar::Quantity, Value::Number(n)) => match quantity::canonical(&n.to_string()) {
            Some(canonical) => Value::String(canonical),
            None => number_mismatch(&n, "resource.Quantity", path, report),
        },
        (Scalar::Bytes, Value::String(text)) => {
            use base64::Engine as _;
            match base64::engine::general_purpose::STANDARD.decode(text.replace(['\n', '\r'], "")) {
                Ok(_) => Value::String(text.replace(['\n', '\r'], "")),
                Err(error) => fail(
                    match error {
                        base64::DecodeError::InvalidByte(at, _) => {
                            format!("illegal base64 data at input byte {at}")
                        }
                        _ => format!(
                            "illegal base64 data at input byte {}",
                            text.len().saturating_sub(1)
                        ),
                    },
                    report,
                ),
            }
        }
        (Scalar::Time, Value::String(text)) => match time::parse(&text) {
            Some(at) => Value::String(time::seconds(at)),
            None if text.is_empty() => Value::Null,
            None => fail(bad_time(&text), report),
        },
        (Scalar::MicroTime, Value::String(text)) => match time::parse(&text) {
            Some(at) => Value::String(time::micros(at)),
            None if text.is_empty() => Value::Null,
            None => fail(bad_time(&text), report),
        },
        (scalar, other) => {
            let expected = match scalar {
                Scalar::String | Scalar::Bytes => "string",
                Scalar::Int32 | Scalar::Int64 | Scalar::Number => "numeric (int or float)",
                Scalar::Boolean => "boolean",
                Scalar::IntOrString | Scalar::Quantity | Scalar::Time | Scalar::MicroTime => "",
            };
            if report.error.is_none() && !expected.is_empty() && !other.is_object() && !other.is_array() {
                report.typed = Some(format!(
                    ".{}: expected {expected}, got &value.valueUnstructured{{Value:{other}}}",
                    path.path
                ));
            }
            mismatch(&other, go_scalar(scalar), path, report)
        }
    }
}

fn bad_time(text: &str) -> String {
    format!(
        "parsing time \"\\\"{text}\\\"\" as \"\\\"2006-01-02T15:04:05Z07:00\\\"\": cannot parse \"{text}\" as \"2006\""
    )
}

fn fail(message: String, report: &mut Report) -> Value {
    report.error.get_or_insert(message);
    Value::Null
}

fn number_mismatch(n: &serde_json::Number, go: &str, path: &At, report: &mut Report) -> Value {
    fail(
        format!(
            "json: cannot unmarshal number {n} into Go struct field {}.{} of type {go}",
            path.owner, path.fields
        ),
        report,
    )
}

fn mismatch(value: &Value, go: &str, path: &At, report: &mut Report) -> Value {
    let what = crate::meta::type_word(value);
    fail(
        format!(
            "json: cannot unmarshal {what} into Go struct field {}.{} of type {go}",
            path.owner, path.fields
        ),
        report,
    )
}

/// Storage does not tell an empty required list from none: both are null.
pub(crate) fn empty_required_to_null(schema: &Schema, value: &mut Value) {
    match (&schema.resolve().shape, value) {
        (Shape::Struct(s), Value::Object(members)) => {
            for (name, member) in members.iter_mut() {
                let Some(field) = s.fields.get(name.as_str()) else {
                    continue;
                };
                let is_collection = matches!(
                    field.schema.resolve().shape,
                    Shape::List { .. } | Shape::Map { .. }
                );
                if (field.required || field.schema.default == Some(Value::Null))
                    && is_collection
                    && super::is_go_zero(member)
                {
                    *member = Value::Null;
                } else {
                    empty_required_to_null(&field.schema, member);
                }
            }
        }
        (Shape::List { item, .. }, Value::Array(items)) => {
            for member in items {
                empty_required_to_null(item, member);
            }
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::schema::builtin;

    #[test]
    fn unknown_fields_are_dropped_and_named_by_path() {
        let (value, report) = conform(
            &builtin("core.v1.Pod"),
            json!({"metadata": {"name": "p"}, "spec": {"containers": [{"name": "c", "bogus": 1}]}, "extra": true}),
        );
        assert_eq!(report.unknown, ["spec.containers[0].bogus", "extra"]);
        assert!(value["spec"]["containers"][0].get("bogus").is_none());
        assert_eq!(value["status"], json!({}));
    }

    #[test]
    fn a_wrong_type_is_refused_in_the_decoders_words() {
        let (_, report) = conform(
            &builtin("apps.v1.Deployment"),
            json!({"spec": {"replicas": "three"}}),
        );
        assert_eq!(
            report.error.as_deref(),
            Some(
                "json: cannot unmarshal string into Go struct field DeploymentSpec.spec.replicas of type int32"
            )
        );
    }

    #[test]
    fn conforming_twice_changes_nothing() {
        let body = json!({"metadata": {"name": "d"}, "spec": {"selector": {"matchLabels": {"a": "b"}}, "paused": false, "replicas": 0,
            "template": {"metadata": {"labels": {"a": "b"}}, "spec": {"containers": [{"name": "c", "resources": {"limits": {"cpu": "0.5"}}}]}}}});
        let (once, _) = conform(&builtin("apps.v1.Deployment"), body);
        assert_eq!(once["spec"]["replicas"], 0);
        assert!(once["spec"].get("paused").is_none());
        assert_eq!(
            once["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"],
            "500m"
        );
        let (twice, _) = conform(&builtin("apps.v1.Deployment"), once.clone());
        assert_eq!(once, twice);
    }
}
