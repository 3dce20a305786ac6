//! Dynamic metadata: what filters tell later filters, logs and spans about a request, and the matchers for it.

use serin_xds::pb::envoy::r#type::matcher::v3 as matcher;
use serin_xds::pb::envoy::r#type::metadata::v3 as key;
use serin_xds::pb::google::protobuf::{Struct, Value, value::Kind};

use super::filter_state::FilterState;
use crate::config::convert::{each, required};
use crate::config::matchers::StringMatch;
use crate::error::{Refusal, Within};

/// Values by namespace, a list, because there are one or two of them; and beside them the filter state, which goes the same
/// ways.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Metadata {
    namespaces: Vec<(Box<str>, Struct)>,
    /// Objects by key.
    pub state: FilterState,
}

impl Metadata {
    /// None.
    pub const EMPTY: Self = Self {
        namespaces: Vec::new(),
        state: FilterState::EMPTY,
    };

    /// What requests see of their connection: its filter state, not its metadata.
    pub fn of_connection(state: FilterState) -> Self {
        Self {
            namespaces: Vec::new(),
            state,
        }
    }

    /// What a resource says; `None` where it says nothing.
    pub(crate) fn of_resource(
        from: Option<&serin_xds::pb::envoy::config::core::v3::Metadata>,
    ) -> Option<Box<Self>> {
        let from = from.filter(|from| !from.filter_metadata.is_empty())?;
        let each = from.filter_metadata.iter();
        Some(Box::new(Self {
            namespaces: each
                .map(|(name, fields)| (name.as_str().into(), fields.clone()))
                .collect(),
            state: FilterState::EMPTY,
        }))
    }

    /// The values of a namespace.
    pub fn get(&self, namespace: &str) -> Option<&Struct> {
        self.namespaces
            .iter()
            .find(|(name, _)| **name == *namespace)
            .map(|(_, fields)| fields)
    }

    /// Every namespace.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Struct)> {
        self.namespaces.iter().map(|(name, fields)| (&**name, fields))
    }

    /// The values of a namespace, made if there are none.
    pub fn entry(&mut self, namespace: &str) -> &mut Struct {
        let index = match self.namespaces.iter().position(|(name, _)| **name == *namespace) {
            Some(index) => index,
            None => {
                self.namespaces.push((namespace.into(), Struct::default()));
                self.namespaces.len() - 1
            }
        };
        &mut self.namespaces[index].1
    }

    /// Sets one value.
    pub fn set(&mut self, namespace: &str, field: &str, value: Value) {
        self.entry(namespace).fields.insert(field.to_owned(), value);
    }

    /// Sets all fields of `from`, replacing those of the same name.
    pub fn merge(&mut self, namespace: &str, from: Struct) {
        self.entry(namespace).fields.extend(from.fields);
    }

    /// The value at a path of keys.
    pub fn find<'a, S: AsRef<str>>(
        &'a self,
        namespace: &str,
        path: impl IntoIterator<Item = S>,
    ) -> Option<&'a Value> {
        find(self.get(namespace)?, path)
    }
}

/// The value at a path of keys below `fields`.
pub(crate) fn find<S: AsRef<str>>(fields: &Struct, path: impl IntoIterator<Item = S>) -> Option<&Value> {
    let mut path = path.into_iter();
    let mut value = fields.fields.get(path.next()?.as_ref())?;
    for key in path {
        match &value.kind {
            Some(Kind::StructValue(inner)) => value = inner.fields.get(key.as_ref())?,
            _ => return None,
        }
    }
    Some(value)
}

/// A text as a value.
pub(crate) fn text(value: impl Into<String>) -> Value {
    Value {
        kind: Some(Kind::StringValue(value.into())),
    }
}

/// A JSON document as a value.
pub(crate) fn of_json(from: &serde_json::Value) -> Value {
    use serde_json::Value as Json;
    let kind = match from {
        Json::Null => Kind::NullValue(0),
        Json::Bool(value) => Kind::BoolValue(*value),
        Json::Number(value) => Kind::NumberValue(value.as_f64().unwrap_or_default()),
        Json::String(value) => Kind::StringValue(value.clone()),
        Json::Array(values) => Kind::ListValue(serin_xds::pb::google::protobuf::ListValue {
            values: values.iter().map(of_json).collect(),
        }),
        Json::Object(fields) => Kind::StructValue(Struct {
            fields: fields
                .iter()
                .map(|(key, value)| (key.clone(), of_json(value)))
                .collect(),
        }),
    };
    Value { kind: Some(kind) }
}

/// A value as a JSON document; whole numbers are written without a fraction.
pub(crate) fn to_json(from: &Value) -> serde_json::Value {
    use serde_json::Value as Json;
    match &from.kind {
        None | Some(Kind::NullValue(_)) => Json::Null,
        Some(Kind::BoolValue(value)) => Json::Bool(*value),
        Some(Kind::NumberValue(value)) if value.fract() == 0.0 && value.abs() < 9e15 => {
            Json::from(*value as i64)
        }
        Some(Kind::NumberValue(value)) => Json::from(*value),
        Some(Kind::StringValue(value)) => Json::String(value.clone()),
        Some(Kind::ListValue(list)) => list.values.iter().map(to_json).collect(),
        Some(Kind::StructValue(fields)) => struct_to_json(fields),
    }
}

/// A struct as a JSON object, keys in order.
pub(crate) fn struct_to_json(from: &Struct) -> serde_json::Value {
    let mut keys: Vec<_> = from.fields.iter().collect();
    keys.sort_by_key(|(key, _)| *key);
    serde_json::Value::Object(
        keys.into_iter()
            .map(|(key, value)| (key.clone(), to_json(value)))
            .collect(),
    )
}

/// A `MetadataKey`: namespace and path.
#[derive(Clone, Debug)]
pub struct Key {
    /// Namespace.
    pub namespace: Box<str>,
    /// Path of keys below it.
    pub path: Box<[Box<str>]>,
}

impl Key {
    /// Compiles the message.
    pub(crate) fn compile(from: Option<&key::MetadataKey>) -> Result<Self, Refusal> {
        let from = from.ok_or_else(|| Refusal::new("metadata_key", "is missing"))?;
        Ok(Self {
            namespace: from.key.as_str().into(),
            path: from
                .path
                .iter()
                .map(|segment| match &segment.segment {
                    Some(key::metadata_key::path_segment::Segment::Key(key)) => Ok(key.as_str().into()),
                    Some(key::metadata_key::path_segment::Segment::Index(_)) => {
                        Err(Refusal::new("metadata_key.path", "indices are not supported"))
                    }
                    None => Err(Refusal::new("metadata_key.path", "a segment has no key")),
                })
                .collect::<Result<_, _>>()?,
        })
    }

    /// The value, if it is there.
    pub fn find<'a>(&self, metadata: &'a Metadata) -> Option<&'a Value> {
        metadata.find(&self.namespace, &*self.path)
    }
}

/// A `ValueMatcher`.
#[derive(Clone, Debug)]
pub enum ValueMatch {
    /// Null.
    Null,
    /// A number from the first up to, not including, the second.
    Range(f64, f64),
    /// This number.
    Number(f64),
    /// A text.
    Text(StringMatch),
    /// This truth value.
    Bool(bool),
    /// There is (not) a value.
    Present(bool),
    /// A list with such an element.
    AnyOf(Box<ValueMatch>),
    /// One of these.
    Or(Box<[ValueMatch]>),
}

impl ValueMatch {
    /// Compiles the message.
    pub(crate) fn compile(from: &matcher::ValueMatcher) -> Result<Self, Refusal> {
        use matcher::value_matcher::MatchPattern;
        Ok(match required(from.match_pattern.as_ref(), "match_pattern")? {
            MatchPattern::NullMatch(_) => Self::Null,
            MatchPattern::DoubleMatch(double) => match &double.match_pattern {
                Some(matcher::double_matcher::MatchPattern::Range(range)) => {
                    Self::Range(range.start, range.end)
                }
                Some(matcher::double_matcher::MatchPattern::Exact(value)) => Self::Number(*value),
                None => return Err(Refusal::new("double_match", "match_pattern is missing")),
            },
            MatchPattern::StringMatch(text) => Self::Text(StringMatch::compile(text).within("string_match")?),
            MatchPattern::BoolMatch(value) => Self::Bool(*value),
            MatchPattern::PresentMatch(value) => Self::Present(*value),
            MatchPattern::ListMatch(list) => match &list.match_pattern {
                Some(matcher::list_matcher::MatchPattern::OneOf(inner)) => {
                    Self::AnyOf(Box::new(Self::compile(inner).within("list_match.one_of")?))
                }
                None => return Err(Refusal::new("list_match", "one_of is missing")),
            },
            MatchPattern::OrMatch(or) => Self::Or(each(
                &or.value_matchers,
                "or_match.value_matchers",
                Self::compile,
            )?),
        })
    }

    /// Whether `value` is as asked.
    pub fn matches(&self, value: Option<&Value>) -> bool {
        let kind = value.and_then(|value| value.kind.as_ref());
        match (self, kind) {
            (Self::Present(wanted), kind) => kind.is_some() == *wanted,
            (Self::Or(all), _) => all.iter().any(|inner| inner.matches(value)),
            (_, None) => false,
            (Self::Null, Some(Kind::NullValue(_))) => true,
            (Self::Range(start, end), Some(Kind::NumberValue(value))) => start <= value && value < end,
            (Self::Number(wanted), Some(Kind::NumberValue(value))) => value == wanted,
            (Self::Text(test), Some(Kind::StringValue(value))) => test.matches(value),
            (Self::Bool(wanted), Some(Kind::BoolValue(value))) => value == wanted,
            (Self::AnyOf(inner), Some(Kind::ListValue(list))) => {
                list.values.iter().any(|value| inner.matches(Some(value)))
            }
            _ => false,
        }
    }
}

/// A `MetadataMatcher`.
#[derive(Clone, Debug)]
pub struct MetadataMatch {
    key: Key,
    value: ValueMatch,
    invert: bool,
}

impl MetadataMatch {
    /// Compiles the message.
    pub(crate) fn compile(from: &matcher::MetadataMatcher) -> Result<Self, Refusal> {
        let path: Box<[Box<str>]> = from
            .path
            .iter()
            .map(|segment| match &segment.segment {
                Some(matcher::metadata_matcher::path_segment::Segment::Key(key)) => Ok(key.as_str().into()),
                None => Err(Refusal::new("path", "a segment has no key")),
            })
            .collect::<Result<_, _>>()?;
        if path.is_empty() {
            return Err(Refusal::new("path", "is empty"));
        }
        Ok(Self {
            key: Key {
                namespace: from.filter.as_str().into(),
                path,
            },
            value: ValueMatch::compile(required(from.value.as_ref(), "value")?).within("value")?,
            invert: from.invert,
        })
    }

    /// Whether the metadata is as asked.
    pub fn matches(&self, metadata: &Metadata) -> bool {
        self.value.matches(self.key.find(metadata)) != self.invert
    }

    /// Whether there is a value at all.
    pub fn finds(&self, metadata: &Metadata) -> bool {
        self.key.find(metadata).is_some()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn values_match_by_kind_path_list_and_alternatives() {
        use matcher::value_matcher::MatchPattern;
        let mut metadata = Metadata::default();
        let Some(Kind::StructValue(fields)) =
            of_json(&json!({"a": {"b": ["x", "y"], "n": 3, "t": true, "z": null}})).kind
        else {
            panic!("an object is a struct");
        };
        metadata.merge("ns", fields);
        let exact = |value: &str| {
            MatchPattern::StringMatch(matcher::StringMatcher {
                match_pattern: Some(matcher::string_matcher::MatchPattern::Exact(value.into())),
                ..Default::default()
            })
        };
        let wrap = |pattern| matcher::ValueMatcher {
            match_pattern: Some(pattern),
        };
        let list = |inner| {
            MatchPattern::ListMatch(Box::new(matcher::ListMatcher {
                match_pattern: Some(matcher::list_matcher::MatchPattern::OneOf(Box::new(wrap(inner)))),
            }))
        };
        let cases = [
            ("b", list(exact("y")), true),
            ("b", list(exact("q")), false),
            ("b", exact("x"), false),
            (
                "b",
                MatchPattern::OrMatch(matcher::OrMatcher {
                    value_matchers: vec![wrap(exact("x")), wrap(list(exact("x")))],
                }),
                true,
            ),
            ("t", MatchPattern::BoolMatch(true), true),
            (
                "z",
                MatchPattern::NullMatch(matcher::value_matcher::NullMatch {}),
                true,
            ),
            ("n", MatchPattern::PresentMatch(true), true),
            ("none", MatchPattern::PresentMatch(true), false),
            ("none", MatchPattern::PresentMatch(false), true),
        ];
        for (field, pattern, expected) in cases {
            let mut message = matcher::MetadataMatcher {
                filter: "ns".into(),
                path: ["a", field]
                    .into_iter()
                    .map(|key| matcher::metadata_matcher::PathSegment {
                        segment: Some(matcher::metadata_matcher::path_segment::Segment::Key(key.into())),
                    })
                    .collect(),
                value: Some(wrap(pattern.clone())),
                invert: false,
            };
            assert_eq!(
                MetadataMatch::compile(&message).unwrap().matches(&metadata),
                expected,
                "{field} {pattern:?}"
            );
            message.invert = true;
            assert_eq!(
                MetadataMatch::compile(&message).unwrap().matches(&metadata),
                !expected,
                "not {field} {pattern:?}"
            );
        }
    }
}
