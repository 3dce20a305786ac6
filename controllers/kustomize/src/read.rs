//! Files of resources: several documents, lists taken apart, each checked for what makes it a resource.

use std::collections::VecDeque;
use std::sync::Arc;

use serin_manifests::yaml::{ReadOptions, parse_document, split_documents};
use serin_manifests::{Dialect, Limits, Map, Place, Scalar, Source, Style, Tag, Value};

use crate::error::{Cause, Error, Result};
use crate::resource::{Resource, check_keys, raw_text};

/// Reads the resources of a file.
pub(crate) fn resources(bytes: &[u8], file: &str, limits: &Limits) -> Result<Vec<Resource>> {
    let text = utf8(bytes, file)?;
    let shared: Arc<str> = file.into();
    let parts = split_documents(text, file, limits)?;
    let single = parts.len() == 1;
    let mut queue: VecDeque<Map> = VecDeque::new();
    for (line_offset, part) in parts {
        let options = ReadOptions {
            file,
            line_offset,
            dialect: Dialect::Kustomize,
            limits,
        };
        let Some(value) = parse_document(part, &options)? else {
            continue;
        };
        match value {
            Value::Map(mut map) => {
                let kind = map.get("kind").map_or("", raw_text);
                if single && matches!(kind, "List" | "ResourceList") && map.get("items").is_some() {
                    // Taken apart as they are; of a list in a file with others the elements go through JSON.
                    if let Some(Value::Seq(items)) = map.remove("items") {
                        for item in items.items.into_iter().filter(|i| !i.is_null_or_empty()) {
                            queue.push_back(checked(item, file, text)?);
                        }
                    }
                } else if !map.is_empty() {
                    queue.push_back(checked(Value::Map(map), file, text)?);
                }
            }
            Value::Seq(seq) if seq.items.is_empty() => {}
            other => {
                queue.push_back(checked(other, file, text)?);
            }
        }
    }
    let mut out = Vec::with_capacity(queue.len());
    while let Some(mut map) = queue.pop_front() {
        let kind = map.get("kind").map_or("", raw_text).to_owned();
        if !kind.ends_with("List") || map.get("items").is_none() {
            let source = Source {
                file: shared.clone(),
                line: map.pos.line(),
            };
            out.push(Resource::new(map, Some(source)));
            continue;
        }
        match map.remove("items") {
            Some(Value::Seq(items)) => {
                for mut item in items.items {
                    if let Value::Map(m) = &item {
                        check_keys(m).map_err(|m| {
                            not_a_resource(
                                format!("trouble expanding list of {kind}; {m}"),
                                &item,
                                file,
                                text,
                            )
                        })?;
                    }
                    as_from_json(&mut item).map_err(|m| {
                        not_a_resource(
                            format!("trouble expanding list of {kind}; {m}"),
                            &item,
                            file,
                            text,
                        )
                    })?;
                    if !item.is_null_or_empty() {
                        queue.push_back(checked(item, file, text)?);
                    }
                }
            }
            Some(v) if v.is_null() => {}
            Some(other) => {
                let message = format!(
                    "expected array in {kind}/items, but found a {}",
                    other.type_name()
                );
                return Err(not_a_resource(message, &other, file, text));
            }
            None => {}
        }
    }
    Ok(out)
}

/// The text of a file that must be UTF-8.
pub(crate) fn utf8<'b>(bytes: &'b [u8], file: &str) -> Result<&'b str> {
    std::str::from_utf8(bytes).map_err(|e| {
        let valid = &bytes[..e.valid_up_to()];
        let line = valid.split(|&b| b == b'\n').count();
        let place = Place {
            file: file.to_owned(),
            line,
            column: 0,
            snippet: String::new(),
        };
        Error::from(serin_manifests::Error::Syntax {
            message: "yaml: invalid UTF-8 octet".into(),
            place,
        })
    })
}

fn not_a_resource(message: String, value: &Value, file: &str, text: &str) -> Error {
    let place = Place::in_text(file, text, value.pos().line(), value.pos().column());
    Error::new(Cause::NotAResource(message)).at(place)
}

/// A resource has a kind, and a name unless it is a list.
fn checked(value: Value, file: &str, text: &str) -> Result<Map> {
    let fail = |message: &str, value: &Value| Err(not_a_resource(message.to_owned(), value, file, text));
    let Value::Map(map) = value else {
        return fail("missing Resource metadata", &value);
    };
    let kind = map
        .get("kind")
        .filter(|v| !v.is_null_or_empty())
        .and_then(Value::text)
        .unwrap_or("");
    let api_version = map.get("apiVersion").filter(|v| !v.is_null_or_empty());
    let metadata = map.get("metadata").filter(|v| !v.is_null_or_empty());
    if kind.is_empty() {
        let message = if api_version.is_none() && metadata.is_none() {
            "missing Resource metadata"
        } else {
            "missing kind in object"
        };
        return Err(not_a_resource(message.to_owned(), &Value::Map(map), file, text)
            .help("every document needs apiVersion, kind and metadata.name; files that are no resources (values, patches) do not belong into `resources`"));
    }
    if kind.ends_with("List") {
        return Ok(map);
    }
    let name = metadata
        .and_then(|m| m.get("name"))
        .filter(|v| !v.is_null_or_empty())
        .map_or("", raw_text);
    if name.is_empty() {
        let generated = metadata.and_then(|m| m.get("generateName")).is_some();
        let message = format!("missing metadata.name in object {kind}");
        let error = not_a_resource(message, &Value::Map(map), file, text);
        return Err(if generated {
            error.help("metadata.generateName is not enough: a build must know the name; give metadata.name")
        } else {
            error
        });
    }
    Ok(map)
}

/// What a value looks like once it was written as JSON and read as YAML: text in double quotes, canonical numbers.
fn as_from_json(value: &mut Value) -> std::result::Result<(), String> {
    match value {
        Value::Map(map) => map.entries.iter_mut().try_for_each(|e| {
            e.key = Scalar {
                style: Style::Double,
                pos: e.key.pos,
                ..Scalar::string(&*e.key.text)
            };
            as_from_json(&mut e.value)
        }),
        Value::Seq(seq) => seq.items.iter_mut().try_for_each(as_from_json),
        Value::Scalar(s) => {
            let json = Value::Scalar(s.clone()).to_json()?;
            let pos = s.pos;
            *s = match json {
                serde_json::Value::String(text) => Scalar {
                    style: Style::Double,
                    ..Scalar::string(text)
                },
                serde_json::Value::Null => Scalar::tagged_as(Tag::Null, "null"),
                other => {
                    let text = other.to_string();
                    Scalar::tagged_as(serin_manifests::tag_of(&text), text)
                }
            };
            s.pos = pos;
            Ok(())
        }
    }
}
