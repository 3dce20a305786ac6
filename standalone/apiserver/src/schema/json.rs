//! Reading JSON as Go's decoder for Kubernetes does: duplicate keys are noticed (the last one wins) and named by path.

use std::fmt::Write as _;

use serde::de::{DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

/// Objects nested deeper than this are refused, as Go's decoder refuses them (10,000) but safely below our own stack.
const MAX_DEPTH: usize = 120;

/// A decoded document and the duplicate keys found in it, as `metadata.labels.x`.
pub(crate) struct Decoded {
    pub(crate) value: Value,
    pub(crate) duplicates: Vec<String>,
}

/// Decode one JSON document.
pub(crate) fn decode(bytes: &[u8]) -> Result<Decoded, serde_json::Error> {
    let mut duplicates = Vec::new();
    // Go replaces bytes that are not UTF-8 by U+FFFD instead of refusing them.
    let text = String::from_utf8_lossy(bytes);
    let mut deserializer = serde_json::Deserializer::from_str(&text);
    let value = Seed {
        path: None,
        duplicates: &mut duplicates,
        depth: 0,
    }
    .deserialize(&mut deserializer)?;
    deserializer.end()?;
    Ok(Decoded { value, duplicates })
}

/// Decode the first document of a YAML stream, as Kubernetes does.
pub(crate) fn decode_yaml(text: &str) -> Result<Decoded, serde_yaml::Error> {
    let mut duplicates = Vec::new();
    let value = match serde_yaml::Deserializer::from_str(text).next() {
        Some(document) => Seed {
            path: None,
            duplicates: &mut duplicates,
            depth: 0,
        }
        .deserialize(document)?,
        None => Value::Null,
    };
    Ok(Decoded { value, duplicates })
}

/// Lines of block mappings that set a key once more, counted from 1, with the key.
pub(crate) fn repeated_keys(text: &str) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    // Mappings that are open, by their indentation, with the keys seen in them.
    let mut open: Vec<(usize, Vec<&str>)> = Vec::new();
    let mut block_scalar: Option<usize> = None;
    for (number, line) in text.lines().enumerate() {
        let mut indent = line.len() - line.trim_start_matches(' ').len();
        let mut rest = line.trim();
        if rest.is_empty() || rest.starts_with('#') {
            continue;
        }
        if block_scalar.is_some_and(|outer| indent > outer) {
            continue;
        }
        block_scalar = None;
        let item = rest.starts_with("- ");
        while let Some(inner) = rest.strip_prefix("- ") {
            // An item is a mapping of its own.
            open.retain(|(depth, _)| *depth <= indent);
            indent += rest.len() - inner.trim_start().len();
            rest = inner.trim_start();
        }
        open.retain(|(depth, _)| *depth < indent || (*depth == indent && !item));
        let Some((key, value)) = rest
            .split_once(": ")
            .or_else(|| rest.strip_suffix(':').map(|key| (key, "")))
        else {
            continue;
        };
        let key = key.trim().trim_matches(['"', '\'']);
        if value.trim_start().starts_with(['|', '>']) {
            block_scalar = Some(indent);
        }
        match open.last_mut().filter(|(depth, _)| *depth == indent) {
            Some((_, keys)) if keys.contains(&key) => found.push((number + 1, key.to_owned())),
            Some((_, keys)) => keys.push(key),
            None => open.push((indent, vec![key])),
        }
    }
    found
}

/// A linked path, so that nothing is allocated unless a duplicate is found.
#[derive(Clone, Copy)]
struct Path<'a> {
    parent: Option<&'a Path<'a>>,
    step: Step<'a>,
}

#[derive(Clone, Copy)]
enum Step<'a> {
    Key(&'a str),
    Index(usize),
}

impl Path<'_> {
    fn write(&self, out: &mut String) {
        if let Some(parent) = self.parent {
            parent.write(out);
        }
        match self.step {
            Step::Key(key) => {
                if !out.is_empty() {
                    out.push('.');
                }
                out.push_str(key);
            }
            Step::Index(i) => {
                let _ = write!(out, "[{i}]");
            }
        }
    }
}

struct Seed<'a, 'p> {
    path: Option<&'p Path<'p>>,
    duplicates: &'a mut Vec<String>,
    depth: usize,
}

impl<'de> DeserializeSeed<'de> for Seed<'_, '_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Seed<'_, '_> {
    type Value = Value;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_bool<E>(self, v: bool) -> Result<Value, E> {
        Ok(Value::Bool(v))
    }

    fn visit_i64<E>(self, v: i64) -> Result<Value, E> {
        Ok(v.into())
    }

    fn visit_u64<E>(self, v: u64) -> Result<Value, E> {
        Ok(v.into())
    }

    fn visit_f64<E>(self, v: f64) -> Result<Value, E> {
        Ok(Number::from_f64(v).map_or(Value::Null, Value::Number))
    }

    fn visit_str<E>(self, v: &str) -> Result<Value, E> {
        Ok(Value::String(v.to_owned()))
    }

    fn visit_string<E>(self, v: String) -> Result<Value, E> {
        Ok(Value::String(v))
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        if self.depth > MAX_DEPTH {
            return Err(A::Error::custom("exceeded max depth"));
        }
        let mut out = Vec::new();
        loop {
            let path = Path {
                parent: self.path,
                step: Step::Index(out.len()),
            };
            let seed = Seed {
                path: Some(&path),
                duplicates: &mut *self.duplicates,
                depth: self.depth + 1,
            };
            match seq.next_element_seed(seed)? {
                Some(value) => out.push(value),
                None => return Ok(Value::Array(out)),
            }
        }
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        if self.depth > MAX_DEPTH {
            return Err(A::Error::custom("exceeded max depth"));
        }
        let mut out = Map::new();
        while let Some(key) = map.next_key::<String>()? {
            let path = Path {
                parent: self.path,
                step: Step::Key(&key),
            };
            if out.contains_key(&key) {
                let mut text = String::new();
                path.write(&mut text);
                if !self.duplicates.contains(&text) {
                    self.duplicates.push(text);
                }
            }
            let value = map.next_value_seed(Seed {
                path: Some(&path),
                duplicates: &mut *self.duplicates,
                depth: self.depth + 1,
            })?;
            // Go decodes a repeated object into the one it already has.
            match (out.get_mut(&key), value) {
                (Some(Value::Object(old)), Value::Object(new)) => old.extend(new),
                (_, value) => {
                    out.insert(key, value);
                }
            }
        }
        Ok(Value::Object(out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn duplicate_keys_are_named_by_path_and_the_last_wins() {
        let d = decode(br#"{"a":{"b":1,"b":2},"l":[{"x":1,"x":1}]}"#).expect("decodes");
        assert_eq!(d.value["a"]["b"], 2);
        assert_eq!(d.duplicates, ["a.b", "l[0].x"]);
    }

    #[test]
    fn keys_that_a_yaml_text_sets_twice_are_found_with_their_lines() {
        let text = "kind: D\nspec:\n  replicas: 1\n  list:\n  - a: 1\n    b: 2\n  - a: 3\n    a: 4\n  text: |\n    x: 1\n    x: 2\n  replicas: 2\n";
        let wanted = [(8, "a".to_owned()), (12, "replicas".to_owned())];
        assert_eq!(repeated_keys(text), wanted);
        let decoded = decode_yaml(text).expect("it decodes");
        assert_eq!(decoded.duplicates, ["spec.list[1].a", "spec.replicas"]);
        assert_eq!(decoded.value["spec"]["replicas"], 2);
        let several = decode_yaml("a: 1\n---\na: 2\n").expect("it decodes");
        assert_eq!(several.value["a"], 1);
    }

    #[test]
    fn nesting_beyond_the_limit_is_refused_not_a_stack_overflow() {
        let deep = "[".repeat(100_000);
        assert!(decode(deep.as_bytes()).is_err());
    }
}
