//! A CRD's OpenAPI schema as a [`Schema`] with validation rules.

use std::collections::BTreeMap;
use std::sync::Arc;

use regex::Regex;
use serde_json::Value;

use super::cel::Rule;
use crate::schema::{EmptyValue, Field, ListKind, Scalar, Schema, Shape, Struct, builtin};

/// What a structural schema demands besides the type.
#[derive(Debug, Clone, Default)]
pub(crate) struct Rules {
    /// `object`, `array`, `string`, `integer`, `number`, `boolean`, or empty (int-or-string, anything).
    pub(crate) kind: String,
    pub(crate) nullable: bool,
    pub(crate) int_or_string: bool,
    pub(crate) embedded: bool,
    pub(crate) required: Vec<String>,
    pub(crate) choices: Option<Vec<Value>>,
    pub(crate) minimum: Option<f64>,
    pub(crate) maximum: Option<f64>,
    pub(crate) exclusive_minimum: bool,
    pub(crate) exclusive_maximum: bool,
    pub(crate) multiple_of: Option<f64>,
    pub(crate) min_length: Option<u64>,
    pub(crate) max_length: Option<u64>,
    pub(crate) pattern: Option<(String, Option<Regex>)>,
    pub(crate) format: Option<String>,
    pub(crate) min_items: Option<u64>,
    pub(crate) max_items: Option<u64>,
    pub(crate) unique_items: bool,
    pub(crate) min_properties: Option<u64>,
    pub(crate) max_properties: Option<u64>,
    pub(crate) all_of: Vec<Schema>,
    pub(crate) any_of: Vec<Schema>,
    pub(crate) one_of: Vec<Schema>,
    pub(crate) not: Option<Box<Schema>>,
    pub(crate) cel: Vec<Rule>,
}

/// Parse a JSON schema of a CRD version. `root` schemas get the metadata type of Kubernetes.
pub(crate) fn parse(json: &Value, root: bool) -> Schema {
    let mut schema = parse_node(json);
    if root {
        root_fields(&mut schema);
    }
    schema
}

/// `apiVersion`, `kind` and `metadata` belong to every object, whatever the schema says of them.
fn root_fields(schema: &mut Schema) {
    let (preserve, fields) = match &schema.shape {
        Shape::Struct(s) => (
            s.preserve_unknown,
            s.fields
                .iter()
                .map(|(k, f)| {
                    (
                        k.clone(),
                        Field {
                            schema: f.schema.clone(),
                            required: f.required,
                            empty: f.empty,
                        },
                    )
                })
                .collect::<BTreeMap<_, _>>(),
        ),
        Shape::Any => (true, BTreeMap::new()),
        _ => return,
    };
    let mut fields = fields;
    let string = || Field {
        schema: Schema::of(Shape::Scalar(Scalar::String)),
        required: false,
        empty: EmptyValue::Kept,
    };
    fields.insert("apiVersion".into(), string());
    fields.insert("kind".into(), string());
    fields.insert(
        "metadata".into(),
        Field {
            schema: builtin("meta.v1.ObjectMeta"),
            required: false,
            empty: EmptyValue::Kept,
        },
    );
    schema.shape = Shape::Struct(Arc::new(Struct {
        fields,
        preserve_unknown: preserve,
    }));
}

fn parse_node(json: &Value) -> Schema {
    let text = |key: &str| json.get(key).and_then(Value::as_str).unwrap_or_default();
    let flag = |key: &str| json.get(key).and_then(Value::as_bool).unwrap_or(false);
    let preserve = flag("x-kubernetes-preserve-unknown-fields");
    let embedded = flag("x-kubernetes-embedded-resource");
    let int_or_string = flag("x-kubernetes-int-or-string");
    let mut schema = Schema::of(Shape::Any);
    schema.default = json.get("default").cloned();
    schema.atomic = text("x-kubernetes-map-type") == "atomic";
    let has_properties = json.get("properties").is_some();
    // Branches of allOf and the like name properties without saying that they are of an object.
    let implied = match text("type") {
        "" if has_properties => "object",
        "" if json.get("items").is_some() => "array",
        given => given,
    };
    let preserve = preserve || text("type").is_empty();
    schema.shape = match implied {
        "object"
            if !has_properties
                && json
                    .get("additionalProperties")
                    .is_some_and(|a| a != &Value::Bool(false)) =>
        {
            let value = match json.get("additionalProperties") {
                Some(node @ Value::Object(_)) => parse_node(node),
                _ => Schema::of(Shape::Any),
            };
            Shape::Map {
                value: Arc::new(value),
            }
        }
        "object" => {
            let mut fields = BTreeMap::new();
            let required: Vec<&str> = crate::meta::list_at(json, "required")
                .iter()
                .filter_map(Value::as_str)
                .collect();
            for (name, node) in json
                .get("properties")
                .and_then(Value::as_object)
                .into_iter()
                .flatten()
            {
                let field = Field {
                    schema: parse_node(node),
                    required: required.contains(&name.as_str()),
                    empty: EmptyValue::Kept,
                };
                fields.insert(name.as_str().into(), field);
            }
            if embedded {
                for (name, inner) in [
                    ("apiVersion", Schema::of(Shape::Scalar(Scalar::String))),
                    ("kind", Schema::of(Shape::Scalar(Scalar::String))),
                    ("metadata", builtin("meta.v1.ObjectMeta")),
                ] {
                    fields.insert(
                        name.into(),
                        Field {
                            schema: inner,
                            required: false,
                            empty: EmptyValue::Kept,
                        },
                    );
                }
            }
            Shape::Struct(Arc::new(Struct {
                fields,
                preserve_unknown: preserve,
            }))
        }
        "array" => Shape::List {
            item: Arc::new(
                json.get("items")
                    .map_or_else(|| Schema::of(Shape::Any), parse_node),
            ),
            kind: match text("x-kubernetes-list-type") {
                "set" => ListKind::Set,
                "map" => ListKind::Map(
                    crate::meta::list_at(json, "x-kubernetes-list-map-keys")
                        .iter()
                        .filter_map(Value::as_str)
                        .map(Box::from)
                        .collect(),
                ),
                _ => ListKind::Atomic,
            },
        },
        "string" => Shape::Scalar(Scalar::String),
        "integer" => Shape::Scalar(Scalar::Int64),
        "number" => Shape::Scalar(Scalar::Number),
        "boolean" => Shape::Scalar(Scalar::Boolean),
        _ if int_or_string => Shape::Scalar(Scalar::IntOrString),
        _ => Shape::Any,
    };
    schema.rules = Some(Box::new(parse_rules(json, int_or_string, embedded)));
    schema
}

/// The rules of one node, also of a branch of `allOf` and the like.
fn parse_rules(json: &Value, int_or_string: bool, embedded: bool) -> Rules {
    let number = |key: &str| json.get(key).and_then(Value::as_f64);
    let count = |key: &str| json.get(key).and_then(Value::as_u64);
    let flag = |key: &str| json.get(key).and_then(Value::as_bool).unwrap_or(false);
    let branches = |key: &str| {
        crate::meta::list_at(json, key)
            .iter()
            .map(parse_node)
            .collect::<Vec<_>>()
    };
    Rules {
        kind: json
            .get("type")
            .and_then(Value::as_str)
            .unwrap_or_default()
            .to_owned(),
        nullable: flag("nullable"),
        int_or_string,
        embedded,
        required: crate::meta::list_at(json, "required")
            .iter()
            .filter_map(Value::as_str)
            .map(str::to_owned)
            .collect(),
        choices: json.get("enum").and_then(Value::as_array).cloned(),
        minimum: number("minimum"),
        maximum: number("maximum"),
        exclusive_minimum: flag("exclusiveMinimum"),
        exclusive_maximum: flag("exclusiveMaximum"),
        multiple_of: number("multipleOf"),
        min_length: count("minLength"),
        max_length: count("maxLength"),
        pattern: json
            .get("pattern")
            .and_then(Value::as_str)
            .map(|p| (p.to_owned(), Regex::new(p).ok())),
        format: json.get("format").and_then(Value::as_str).map(str::to_owned),
        min_items: count("minItems"),
        max_items: count("maxItems"),
        unique_items: flag("uniqueItems"),
        min_properties: count("minProperties"),
        max_properties: count("maxProperties"),
        all_of: branches("allOf"),
        any_of: branches("anyOf"),
        one_of: branches("oneOf"),
        not: json.get("not").map(|n| Box::new(parse_node(n))),
        cel: super::cel::parse(json),
    }
}
