//! Types of objects: what every field is, how lists merge, what Go writes when a field is absent.
//!
//! Built-in types come from `builtin.tsv`, a table generated once from Kubernetes' OpenAPI documents (a line `T name flags` opens a type,
//! the lines after it are `field`, `type`, `attributes`). Types of custom resources are parsed from their CRD ([`crate::crd`]) into the
//! same form, so that decoding, strategic merge and server-side apply have one notion of a type.

pub(crate) mod conform;
pub(crate) mod json;
pub(crate) mod syntax;

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, LazyLock};

use serde_json::{Map, Value};

use crate::crd::rules::Rules;

/// A type, with what the place that uses it adds (list type, default, patch strategy).
#[derive(Debug, Clone)]
pub(crate) struct Schema {
    pub(crate) shape: Shape,
    /// The whole value is one field for server-side apply.
    pub(crate) atomic: bool,
    /// What an absent field is written as: Go's zero value for built-in kinds, the schema's `default` for custom ones.
    pub(crate) default: Option<Value>,
    pub(crate) patch: PatchStrategy,
    /// Validation of custom resources.
    pub(crate) rules: Option<Box<Rules>>,
}

#[derive(Debug, Clone)]
pub(crate) enum Shape {
    /// Anything goes and fields are deduced from the value.
    Any,
    /// A JSON object that is kept as it is and owned as a whole.
    Open,
    Scalar(Scalar),
    List {
        item: Arc<Schema>,
        kind: ListKind,
    },
    Map {
        value: Arc<Schema>,
    },
    Struct(Arc<Struct>),
    /// A named built-in type.
    Ref(usize),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scalar {
    String,
    Int32,
    Int64,
    Number,
    Boolean,
    Bytes,
    IntOrString,
    Quantity,
    Time,
    MicroTime,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum ListKind {
    Atomic,
    Set,
    Map(Arc<[Box<str>]>),
}

#[derive(Debug, Clone, Default)]
pub(crate) struct PatchStrategy {
    pub(crate) merge: bool,
    pub(crate) retain_keys: bool,
    pub(crate) merge_key: Option<Box<str>>,
}

#[derive(Debug, Default)]
pub(crate) struct Struct {
    pub(crate) fields: BTreeMap<Box<str>, Field>,
    /// Fields that are not named are kept (`x-kubernetes-preserve-unknown-fields`).
    pub(crate) preserve_unknown: bool,
}

#[derive(Debug)]
pub(crate) struct Field {
    pub(crate) schema: Schema,
    pub(crate) required: bool,
    pub(crate) empty: EmptyValue,
}

/// What becomes of an explicit zero value (`""`, `0`, `false`, `[]`, `{}`) of an optional field.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum EmptyValue {
    /// Go's `omitempty` on a plain value: it is not written.
    Dropped,
    /// The field is a pointer, or not optional.
    Kept,
}

/// A built-in type by name.
#[derive(Debug)]
struct Named {
    name: &'static str,
    schema: Schema,
}

struct Builtin {
    types: Vec<Named>,
    by_name: HashMap<&'static str, usize>,
}

static TABLE: &str = include_str!("builtin.tsv");
static BUILTIN: LazyLock<Builtin> = LazyLock::new(parse_table);
static ANY: Schema = Schema::of(Shape::Any);

impl Schema {
    pub(crate) const fn of(shape: Shape) -> Self {
        Self {
            shape,
            atomic: false,
            default: None,
            patch: PatchStrategy {
                merge: false,
                retain_keys: false,
                merge_key: None,
            },
            rules: None,
        }
    }

    /// The type behind a reference; itself where it is none.
    pub(crate) fn resolve(&self) -> &Schema {
        match self.shape {
            Shape::Ref(id) => BUILTIN.types.get(id).map_or(&ANY, |t| &t.schema),
            _ => self,
        }
    }

    /// The name that Go's struct of this type has; empty where it is none.
    pub(crate) fn go_name(&self) -> &'static str {
        match self.shape {
            Shape::Ref(id) => builtin_name(id).rsplit('.').next().unwrap_or_default(),
            _ => "",
        }
    }

    pub(crate) fn is_atomic(&self) -> bool {
        self.atomic || self.resolve().atomic
    }

    /// The schema of a member of an object, and whether the type names it (a map or an unknown field does not).
    pub(crate) fn member(&self, name: &str) -> (&Schema, bool) {
        match &self.resolve().shape {
            Shape::Struct(s) => s.fields.get(name).map_or((&ANY, false), |f| (&f.schema, true)),
            Shape::Map { value } => (value, false),
            Shape::Any | Shape::Open | Shape::Scalar(_) | Shape::List { .. } | Shape::Ref(_) => (&ANY, false),
        }
    }

    pub(crate) fn item(&self) -> &Schema {
        match &self.resolve().shape {
            Shape::List { item, .. } => item,
            _ => &ANY,
        }
    }
}

/// The schema of a built-in type (`apps.v1.Deployment`).
pub(crate) fn builtin(name: &str) -> Schema {
    BUILTIN
        .by_name
        .get(name)
        .map_or_else(|| Schema::of(Shape::Any), |id| Schema::of(Shape::Ref(*id)))
}

/// All built-in types in table order.
#[cfg(test)]
pub(crate) fn builtin_types() -> impl Iterator<Item = (&'static str, &'static Schema)> {
    BUILTIN.types.iter().map(|t| (t.name, &t.schema))
}

/// Name of the built-in type that a reference points to.
pub(crate) fn builtin_name(id: usize) -> &'static str {
    BUILTIN.types.get(id).map_or("", |t| t.name)
}

/// What Go marshals for a new, empty object of this type: non-pointer structs as `{}`, required lists and maps as null.
pub(crate) fn zero_value(schema: &Schema) -> Value {
    let Shape::Struct(s) = &schema.resolve().shape else {
        return Value::Object(Map::new());
    };
    let mut out = Map::new();
    for (name, field) in &s.fields {
        match &field.schema.default {
            Some(Value::Object(_)) => {
                out.insert(name.to_string(), zero_value(&field.schema));
            }
            Some(other) if is_go_zero(other) => {
                out.insert(name.to_string(), other.clone());
            }
            Some(_) => {}
            None if field.required => {
                if matches!(
                    field.schema.resolve().shape,
                    Shape::List { .. } | Shape::Map { .. }
                ) {
                    out.insert(name.to_string(), Value::Null);
                }
            }
            None => {}
        }
    }
    Value::Object(out)
}

pub(crate) fn is_go_zero(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(b) => !b,
        Value::Number(n) => n.as_f64() == Some(0.0),
        Value::String(s) => s.is_empty(),
        Value::Array(a) => a.is_empty(),
        Value::Object(o) => o.is_empty(),
    }
}

fn parse_table() -> Builtin {
    let mut by_name: HashMap<&'static str, usize> = HashMap::new();
    for line in TABLE.lines() {
        if let Some(rest) = line.strip_prefix("T\t") {
            let name = rest.split('\t').next().unwrap_or_default();
            by_name.insert(name, by_name.len());
        }
    }
    let mut types: Vec<Named> = Vec::with_capacity(by_name.len());
    let mut current: Option<(&'static str, &'static str, Struct)> = None;
    for line in TABLE.lines() {
        let mut columns = line.split('\t');
        let first = columns.next().unwrap_or_default();
        let second = columns.next().unwrap_or_default();
        let third = columns.next().unwrap_or_default();
        if first == "T" {
            if let Some(done) = current.take() {
                types.push(finish_type(done));
            }
            current = Some((second, third, Struct::default()));
        } else if let Some((_, _, s)) = &mut current {
            s.fields
                .insert(first.into(), parse_field(second, third, &by_name));
        }
    }
    if let Some(done) = current.take() {
        types.push(finish_type(done));
    }
    Builtin { types, by_name }
}

fn finish_type((name, flags, fields): (&'static str, &'static str, Struct)) -> Named {
    let mut schema = Schema::of(Shape::Struct(Arc::new(fields)));
    for flag in flags.split(' ') {
        match flag {
            "a" => schema.atomic = true,
            "=intstr" => schema.shape = Shape::Scalar(Scalar::IntOrString),
            "=quantity" => schema.shape = Shape::Scalar(Scalar::Quantity),
            "=time" => schema.shape = Shape::Scalar(Scalar::Time),
            "=microtime" => schema.shape = Shape::Scalar(Scalar::MicroTime),
            "=open" => schema.shape = Shape::Open,
            "=any" => schema.shape = Shape::Any,
            _ => {}
        }
    }
    Named { name, schema }
}

fn parse_shape(text: &str, names: &HashMap<&'static str, usize>) -> Shape {
    if let Some(item) = text.strip_prefix('[') {
        return Shape::List {
            item: Arc::new(Schema::of(parse_shape(item, names))),
            kind: ListKind::Atomic,
        };
    }
    if let Some(value) = text.strip_prefix('{') {
        return Shape::Map {
            value: Arc::new(Schema::of(parse_shape(value, names))),
        };
    }
    if let Some(name) = text.strip_prefix('@') {
        return names.get(name).map_or(Shape::Any, |id| Shape::Ref(*id));
    }
    match text {
        "s" => Shape::Scalar(Scalar::String),
        "i" => Shape::Scalar(Scalar::Int32),
        "l" => Shape::Scalar(Scalar::Int64),
        "n" => Shape::Scalar(Scalar::Number),
        "b" => Shape::Scalar(Scalar::Boolean),
        "y" => Shape::Scalar(Scalar::Bytes),
        _ => Shape::Any,
    }
}

fn parse_field(type_text: &str, attributes: &str, names: &HashMap<&'static str, usize>) -> Field {
    let mut schema = Schema::of(parse_shape(type_text, names));
    let mut required = false;
    let mut zero_dropped = false;
    let mut zero_kept = false;
    for attribute in attributes.split(' ') {
        if attribute == "r" {
            required = true;
        } else if attribute == "z" {
            zero_dropped = true;
        } else if attribute == "k" {
            zero_kept = true;
        } else if attribute == "d" {
            schema.default = Some(Value::Object(Map::new()));
        } else if attribute == "a" {
            schema.atomic = true;
        } else if let Some(json) = attribute.strip_prefix("d=") {
            schema.default = serde_json::from_str(json).ok();
        } else if let Some(list_type) = attribute.strip_prefix("lt=") {
            if let Shape::List { kind, .. } = &mut schema.shape {
                *kind = match list_type.strip_prefix("map:") {
                    Some(keys) => ListKind::Map(keys.split(',').map(Box::from).collect()),
                    None => ListKind::Set,
                };
            }
        } else if let Some(strategy) = attribute.strip_prefix("ps=") {
            schema.patch.merge = strategy.split(',').any(|s| s == "merge");
            schema.patch.retain_keys = strategy.split(',').any(|s| s == "retainKeys");
        } else if let Some(key) = attribute.strip_prefix("pk=") {
            schema.patch.merge_key = Some(key.into());
        }
    }
    let drops = match &schema.shape {
        Shape::Scalar(Scalar::Int32 | Scalar::Int64 | Scalar::Number | Scalar::Boolean) => zero_dropped,
        Shape::Scalar(_) | Shape::List { .. } | Shape::Map { .. } => {
            !zero_kept && !required && schema.default.is_none()
        }
        Shape::Any | Shape::Open | Shape::Struct(_) | Shape::Ref(_) => false,
    };
    let empty = if drops {
        EmptyValue::Dropped
    } else {
        EmptyValue::Kept
    };
    Field {
        schema,
        required,
        empty,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_of_a_builtin_type_knows_its_merge_keys() {
        let deployment = builtin("apps.v1.Deployment");
        let (spec, _) = deployment.member("spec");
        let (template, _) = spec.member("template");
        let (pod_spec, _) = template.member("spec");
        let (containers, named) = pod_spec.member("containers");
        assert!(named);
        assert_eq!(containers.patch.merge_key.as_deref(), Some("name"));
        let (ports, _) = containers.item().member("ports");
        let Shape::List {
            kind: ListKind::Map(keys),
            ..
        } = &ports.shape
        else {
            panic!("ports is a list map: {ports:?}");
        };
        assert_eq!(
            keys.iter().map(|k| &**k).collect::<Vec<_>>(),
            ["containerPort", "protocol"]
        );
    }

    #[test]
    fn the_zero_value_is_what_go_marshals() {
        let zero = zero_value(&builtin("apps.v1.Deployment"));
        assert_eq!(zero["spec"]["strategy"], serde_json::json!({}));
        assert_eq!(zero["spec"]["template"]["spec"]["containers"], Value::Null);
        assert!(zero["spec"].get("replicas").is_none());
    }

    #[test]
    fn every_reference_of_the_table_resolves() {
        assert!(builtin_types().count() > 200);
        for (_, schema) in builtin_types() {
            if let Shape::Struct(s) = &schema.shape {
                for field in s.fields.values() {
                    if let Shape::Ref(id) = field.schema.shape {
                        assert!(!builtin_name(id).is_empty());
                    }
                }
            }
        }
    }
}
