//! The set-metadata filter: fixed dynamic metadata for every request.

use serin_xds::pb::envoy::extensions::filters::http::set_metadata::v3 as filter;
use serin_xds::pb::google::protobuf::{Struct, Value, value::Kind};

use super::metadata::Metadata;
use crate::error::Refusal;

/// A compiled `Config`.
#[derive(Debug)]
pub struct SetMetadata(Box<[Entry]>);

#[derive(Debug)]
struct Entry {
    namespace: Box<str>,
    value: Struct,
    overwrite: bool,
}

impl SetMetadata {
    /// Compiles the message.
    pub(crate) fn compile(from: &filter::Config) -> Result<Self, Refusal> {
        let mut entries = Vec::new();
        if let Some(value) = &from.value {
            entries.push(Entry {
                namespace: from.metadata_namespace.as_str().into(),
                value: value.clone(),
                // The older pair of fields merges, as below.
                overwrite: true,
            });
        }
        for (index, entry) in from.metadata.iter().enumerate() {
            if entry.typed_value.is_some() {
                return Err(Refusal::new(
                    format!("metadata[{index}].typed_value"),
                    "typed metadata is not supported",
                ));
            }
            if entry.metadata_namespace.is_empty() {
                return Err(Refusal::new(
                    format!("metadata[{index}].metadata_namespace"),
                    "is missing",
                ));
            }
            if let Some(value) = &entry.value {
                entries.push(Entry {
                    namespace: entry.metadata_namespace.as_str().into(),
                    value: value.clone(),
                    overwrite: entry.allow_overwrite,
                });
            }
        }
        Ok(Self(entries.into()))
    }

    /// Sets the values. Where a namespace exists, they are merged in if overwriting is allowed, else left out.
    pub fn apply(&self, metadata: &mut Metadata) {
        for entry in &self.0 {
            if metadata.get(&entry.namespace).is_none() {
                metadata.merge(&entry.namespace, entry.value.clone());
            } else if entry.overwrite {
                merge(metadata.entry(&entry.namespace), &entry.value);
            }
        }
    }
}

/// Structs are merged, lists are joined, everything else is replaced.
fn merge(into: &mut Struct, from: &Struct) {
    for (key, value) in &from.fields {
        match (into.fields.get_mut(key).map(|value| &mut value.kind), &value.kind) {
            (Some(Some(Kind::StructValue(old))), Some(Kind::StructValue(new))) => merge(old, new),
            (Some(Some(Kind::ListValue(old))), Some(Kind::ListValue(new))) => {
                old.values.extend(new.values.iter().cloned())
            }
            (_, kind) => {
                into.fields.insert(key.clone(), Value { kind: kind.clone() });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::policy::metadata::{of_json, struct_to_json};

    fn fields(from: serde_json::Value) -> Option<Struct> {
        match of_json(&from).kind {
            Some(Kind::StructValue(fields)) => Some(fields),
            _ => None,
        }
    }

    #[test]
    fn values_are_merged_only_where_overwriting_is_allowed() {
        let entry = |value, overwrite| filter::Metadata {
            metadata_namespace: "ns".into(),
            allow_overwrite: overwrite,
            value: fields(value),
            typed_value: None,
        };
        let compiled = SetMetadata::compile(&filter::Config {
            metadata: vec![
                entry(json!({"a": {"x": 1}, "l": ["p"]}), false),
                entry(json!({"b": 1}), false),
                entry(json!({"a": {"y": 2}, "l": ["q"]}), true),
            ],
            ..Default::default()
        })
        .unwrap();
        let mut metadata = Metadata::default();
        compiled.apply(&mut metadata);
        assert_eq!(
            struct_to_json(metadata.get("ns").unwrap()),
            json!({"a": {"x": 1, "y": 2}, "l": ["p", "q"]})
        );
    }
}
