//! The formats that SOPS encrypts: text to trees with metadata, and back.

use std::collections::BTreeMap;

use serin_manifests::yaml::{self, ReadOptions, parse_document};
use serin_manifests::{Dialect, Limits, Map, Pos, Scalar, Seq, Style, Value};

use crate::error::{Error, Result};
use crate::metadata::Metadata;

/// The format of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// YAML, one or several documents.
    Yaml,
    /// JSON.
    Json,
    /// Lines of `KEY=value`.
    Dotenv,
    /// Anything: SOPS keeps it as JSON with one field `data`.
    Binary,
}

impl Format {
    /// By the ending of a file's name, as SOPS has it; what has no known ending is binary.
    pub fn of_path(path: &str) -> Format {
        let name = path.rsplit('/').next().unwrap_or(path);
        let has = |ending: &str| name.ends_with(ending);
        if has(".yaml") || has(".yml") {
            Format::Yaml
        } else if has(".json") {
            Format::Json
        } else if has(".env") {
            Format::Dotenv
        } else {
            Format::Binary
        }
    }

    fn name(self) -> &'static str {
        match self {
            Format::Yaml => "YAML",
            Format::Json => "JSON",
            Format::Dotenv => "dotenv",
            Format::Binary => "binary file",
        }
    }
}

/// A file in parts.
pub(crate) struct Document {
    /// One for each document; only YAML has several.
    pub(crate) trees: Vec<Value>,
    pub(crate) metadata: Metadata,
}

impl Document {
    /// The value of a binary file: the only one, below `data`.
    pub(crate) fn binary_data(&self) -> Option<&str> {
        match self.trees.as_slice() {
            [Value::Map(map)] if map.len() == 1 => map.get("data").and_then(Value::as_str),
            _ => None,
        }
    }
}

/// See [`crate::detect`].
pub(crate) fn detect(text: &[u8]) -> Option<Format> {
    let holds = |mark: &str| text.windows(mark.len()).any(|window| window == mark.as_bytes());
    if holds("sops_mac=ENC[") {
        Some(Format::Dotenv)
    } else if holds("\"mac\": \"ENC[") || holds("\"mac\":\"ENC[") {
        // One field of text beside the metadata is how a binary file looks; the tree tells for certain.
        let binary = parse_json(text).is_ok_and(|tree| {
            tree.as_map()
                .is_some_and(|map| map.len() == 2 && map.get("data").is_some_and(|v| v.as_scalar().is_some()))
        });
        Some(if binary { Format::Binary } else { Format::Json })
    } else if holds("mac: ENC[") || holds("mac: \"ENC[") {
        Some(Format::Yaml)
    } else {
        None
    }
}

pub(crate) fn read(text: &[u8], format: Format) -> Result<Document> {
    let mut trees = match format {
        Format::Yaml => parse_yaml(text)?,
        Format::Json | Format::Binary => vec![parse_json(text)?],
        Format::Dotenv => return read_dotenv(text),
    };
    let mut metadata = None;
    for tree in &mut trees {
        let Value::Map(map) = tree else {
            return Err(malformed(format, "a document is not a mapping"));
        };
        if let Some(sops) = map.remove("sops") {
            metadata.get_or_insert(sops);
        }
    }
    let metadata = Metadata::from_value(&metadata.ok_or(Error::NotEncrypted)?)?;
    Ok(Document { trees, metadata })
}

fn malformed(format: Format, message: impl Into<String>) -> Error {
    Error::Malformed {
        format: format.name(),
        message: message.into(),
    }
}

fn utf8(text: &[u8], format: Format) -> Result<&str> {
    std::str::from_utf8(text).map_err(|_| malformed(format, "it is not UTF-8"))
}

fn options(limits: &Limits) -> ReadOptions<'_> {
    ReadOptions {
        file: "encrypted file",
        line_offset: 0,
        dialect: Dialect::Kustomize,
        limits,
    }
}

fn parse_yaml(text: &[u8]) -> Result<Vec<Value>> {
    let (text, limits) = (utf8(text, Format::Yaml)?, Limits::default());
    let wrong = |e: serin_manifests::Error| malformed(Format::Yaml, e.to_string());
    let mut trees = Vec::new();
    for (line_offset, part) in yaml::split_documents(text, "encrypted file", &limits).map_err(wrong)? {
        let options = ReadOptions {
            line_offset,
            ..options(&limits)
        };
        trees.extend(parse_document(part, &options).map_err(wrong)?);
    }
    Ok(trees)
}

/// JSON is read by the YAML reader, which keeps the order of keys: the MAC depends on it.
fn parse_json(text: &[u8]) -> Result<Value> {
    let (text, limits) = (utf8(text, Format::Json)?, Limits::default());
    // Refuses what is YAML but not JSON.
    serde_json::from_str::<serde::de::IgnoredAny>(text)
        .map_err(|e| malformed(Format::Json, e.to_string()))?;
    let parsed =
        parse_document(text, &options(&limits)).map_err(|e| malformed(Format::Json, e.to_string()))?;
    parsed.ok_or(Error::NotEncrypted)
}

/// Lines `KEY=value` with `\n` for line breaks; metadata are keys that start with `sops_`, their nesting
/// flattened as `age__list_0__map_enc`.
fn read_dotenv(text: &[u8]) -> Result<Document> {
    let text = utf8(text, Format::Dotenv)?;
    let (mut map, mut flat) = (Map::new(), BTreeMap::new());
    for line in text
        .split('\n')
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
    {
        let (key, value) = line
            .split_once('=')
            .ok_or_else(|| malformed(Format::Dotenv, "a line is neither KEY=value nor a comment"))?;
        let value = value.replace("\\n", "\n");
        match key.strip_prefix("sops_") {
            Some(key) => {
                flat.insert(key.to_owned(), value);
            }
            None => map.push(key, Value::string(value)),
        }
    }
    if flat.is_empty() {
        return Err(Error::NotEncrypted);
    }
    Ok(Document {
        trees: vec![Value::Map(map)],
        metadata: Metadata::from_value(&unflatten(&flat))?,
    })
}

/// Only lists of keys are nested in practice; everything else stays a field of text.
fn unflatten(flat: &BTreeMap<String, String>) -> Value {
    let mut out = Map::new();
    let mut lists: BTreeMap<&str, BTreeMap<usize, Map>> = BTreeMap::new();
    for (key, value) in flat {
        let nested = key.split_once("__list_").and_then(|(list, rest)| {
            let (index, field) = rest.split_once("__map_")?;
            Some((list, index.parse::<usize>().ok()?, field))
        });
        match nested {
            Some((list, index, field)) => {
                let entry = lists.entry(list).or_default().entry(index).or_default();
                entry.push(field, Value::string(value.as_str()));
            }
            None => out.push(key, Value::string(value.as_str())),
        }
    }
    for (name, entries) in lists {
        let items = entries.into_values().map(Value::Map).collect();
        out.push(
            name,
            Value::Seq(Seq {
                items,
                pos: Pos::NONE,
            }),
        );
    }
    Value::Map(out)
}

/// Writes the decrypted trees. From YAML or JSON to either, from dotenv to dotenv, from binary to bytes.
pub(crate) fn write(trees: &[Value], from: Format, to: Format) -> Result<Vec<u8>> {
    let first = trees.first();
    match to {
        Format::Dotenv => {
            let map = first.and_then(Value::as_map);
            let mut out = String::new();
            for (key, value) in map.into_iter().flat_map(Map::iter) {
                let Value::Scalar(scalar) = value else {
                    return Err(malformed(Format::Dotenv, format!("'{key}' is not one value")));
                };
                out.push_str(&format!("{key}={}\n", scalar.text.replace('\n', "\\n")));
            }
            Ok(out.into_bytes())
        }
        Format::Json => {
            let tree = first.ok_or(Error::NotEncrypted)?;
            let text = yaml::write_json(tree).map_err(|e| malformed(Format::Json, e))?;
            Ok(text.into_bytes())
        }
        // A file of another format under a name without one comes back as what it was.
        Format::Binary if from != Format::Binary => write(trees, from, from),
        Format::Yaml | Format::Binary => {
            let mut out = String::new();
            for (i, tree) in trees.iter().enumerate() {
                if i > 0 {
                    out.push_str("---\n");
                }
                let text = yaml::write_value(&requoted(tree)).map_err(|e| malformed(Format::Yaml, e))?;
                out.push_str(&text);
            }
            Ok(out.into_bytes())
        }
    }
}

/// JSON's quotes are not wanted in YAML, where they would survive.
fn requoted(tree: &Value) -> Value {
    match tree {
        Value::Scalar(scalar) => Value::Scalar(Scalar {
            style: if scalar.style == Style::Double {
                Style::Plain
            } else {
                scalar.style
            },
            ..scalar.clone()
        }),
        Value::Seq(seq) => Value::Seq(Seq {
            items: seq.items.iter().map(requoted).collect(),
            pos: seq.pos,
        }),
        Value::Map(map) => {
            let mut out = map.clone();
            for entry in &mut out.entries {
                entry.value = requoted(&entry.value);
            }
            Value::Map(out)
        }
    }
}
