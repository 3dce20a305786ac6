//! `/config_dump`: Envoy's sections, with the resources as they were received.

mod sections;

use std::fmt::Write as _;

use serde_json::{Map, Value};

use sections::sections;

use super::Proxy;

/// Paths of a mask.
const MAX_PATHS: usize = 64;

/// What of the configuration is wanted.
#[derive(Debug, Default)]
pub(super) struct Wanted<'a> {
    /// A field of a section instead of all sections.
    pub resource: Option<&'a str>,
    /// Resources whose name matches somewhere.
    pub named: Option<&'a regex::Regex>,
    /// Fields of sections, or of the resources where `resource` is given (`google.protobuf.FieldMask`).
    pub mask: Option<&'a str>,
    /// Endpoints as well.
    pub endpoints: bool,
}

/// Why there is no dump.
#[derive(Debug, thiserror::Error)]
pub(super) enum DumpError {
    /// No section has that field.
    #[error("{0} not found in config dump")]
    NoResource(String),
    /// The mask names nothing, or is none.
    #[error("FieldMask {0:?} could not be successfully applied to any configs.")]
    Mask(String),
}

/// The dump, as text.
pub(super) fn config_dump(proxy: &Proxy, wanted: &Wanted<'_>) -> Result<String, DumpError> {
    let mask = wanted.mask.map(Mask::parse).transpose()?;
    let sections = sections(proxy, wanted, mask.as_ref());
    if sections.is_empty() {
        return Err(match wanted.resource {
            Some(resource) => DumpError::NoResource(resource.to_owned()),
            None => DumpError::Mask(wanted.mask.unwrap_or_default().to_owned()),
        });
    }
    let mut out = String::from("{\n  \"configs\": [");
    for (index, section) in sections.into_iter().enumerate() {
        let lists = section.lists.into_iter();
        if wanted.resource.is_some() {
            for (_, entries) in lists {
                let _ = write!(out, "\n        {}", entries.join(",\n        "));
            }
            continue;
        }
        let comma = if index == 0 { "" } else { "," };
        // Writing to a String cannot fail.
        let _ = write!(
            out,
            "{comma}\n    {{\n      \"@type\": \"type.googleapis.com/envoy.admin.v3.{}\"",
            section.kind
        );
        for (field, value) in section.single {
            let _ = write!(out, ",\n      \"{field}\": {value}");
        }
        for (field, entries) in lists.filter(|(_, entries)| !entries.is_empty()) {
            let entries = entries.join(",\n        ");
            let _ = write!(out, ",\n      \"{field}\": [\n        {entries}\n      ]");
        }
        out.push_str("\n    }");
    }
    out.push_str("\n  ]\n}\n");
    Ok(out)
}

/// A `FieldMask`: fields, and fields within them; a field without fields of its own is wanted whole.
#[derive(Debug, Default)]
struct Mask(std::collections::BTreeMap<String, Mask>);

impl Mask {
    fn parse(text: &str) -> Result<Self, DumpError> {
        let bad = || DumpError::Mask(text.to_owned());
        let mut out = Self::default();
        if text.split(',').count() > MAX_PATHS {
            return Err(bad());
        }
        for path in text.split(',') {
            let mut at = &mut out;
            for field in path.split('.') {
                let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
                if field.is_empty() || !field.bytes().all(plain) {
                    return Err(bad());
                }
                at = at.0.entry(field.to_owned()).or_default();
            }
        }
        Ok(out)
    }

    /// Whether everything is wanted.
    fn is_whole(&self) -> bool {
        self.0.is_empty()
    }

    /// The wanted fields of a value; of a list, those of each of its values. A type is kept, so that it can be read.
    fn apply(&self, value: &Value) -> Value {
        if self.is_whole() {
            return value.clone();
        }
        match value {
            Value::Object(map) => {
                let mut out = Map::new();
                for (key, inner) in map {
                    if let Some(mask) = self.0.get(key) {
                        out.insert(key.clone(), mask.apply(inner));
                    } else if key == "@type" {
                        out.insert(key.clone(), inner.clone());
                    }
                }
                out.into()
            }
            Value::Array(list) => list.iter().map(|value| self.apply(value)).collect(),
            other => other.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_mask_leaves_the_fields_that_it_names_and_what_is_within_them() {
        let value =
            json!({"a": {"b": 1, "c": {"d": 2, "e": 3}}, "f": [{"b": 1, "g": 2}], "@type": "t", "h": 1});
        for (mask, expected) in [
            ("a", json!({"a": {"b": 1, "c": {"d": 2, "e": 3}}, "@type": "t"})),
            ("a.c.d,h", json!({"a": {"c": {"d": 2}}, "h": 1, "@type": "t"})),
            ("f.g", json!({"f": [{"g": 2}], "@type": "t"})),
            ("nothing", json!({"@type": "t"})),
        ] {
            assert_eq!(Mask::parse(mask).unwrap().apply(&value), expected, "{mask}");
        }
        for bad in ["", "a..b", "a b", ",", "a,"] {
            assert!(Mask::parse(bad).is_err(), "{bad:?}");
        }
    }
}
