//! Field specifications: which fields of which kinds a transformer touches, and the walk to them.

use serin_manifests::{Map, Scalar, Tag, Value};

use crate::id::{Gvk, selects};

/// One field of some kinds.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub(crate) struct FieldSpec {
    /// The kinds; empty parts are wildcards.
    pub gvk: Gvk,
    /// Path, `/` between keys, `\/` for a slash in a key, `[]` after a key that holds a list.
    pub path: String,
    /// Make the field where it is missing.
    pub create: bool,
}

impl FieldSpec {
    /// A field of every kind that is made where missing.
    pub(crate) fn everywhere(path: &str) -> FieldSpec {
        FieldSpec {
            gvk: Gvk::default(),
            path: path.into(),
            create: true,
        }
    }

    /// Whether `self`, in a list, already covers `other`.
    fn covers(&self, other: &FieldSpec) -> bool {
        self.gvk.is_selected_by(&other.gvk) && self.path == other.path
    }
}

/// Adds what is not there yet. Two specifications of one field may not disagree about `create`.
pub(crate) fn merge_all(into: &mut Vec<FieldSpec>, incoming: &[FieldSpec]) -> Result<(), String> {
    for spec in incoming {
        merge_one(into, spec)?;
    }
    Ok(())
}

/// See [`merge_all`].
pub(crate) fn merge_one(into: &mut Vec<FieldSpec>, spec: &FieldSpec) -> Result<(), String> {
    match into.iter().find(|s| s.covers(spec)) {
        Some(existing) if existing.create != spec.create => Err(format!(
            "conflicting fieldspecs: {}:{} has create {} in one place and {} in another",
            spec.gvk, spec.path, existing.create, spec.create
        )),
        Some(_) => Ok(()),
        None => {
            into.push(spec.clone());
            Ok(())
        }
    }
}

/// What a missing field becomes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Create {
    /// Nothing: the field is left out.
    Never,
    /// A scalar; a null that is there gets this tag.
    Scalar(Tag),
    /// A mapping.
    Mapping,
}

/// Splits a path at a delimiter that is not escaped. A leading delimiter is ignored.
pub(crate) fn split_path(path: &str, delimiter: char) -> Vec<String> {
    let mut parts: Vec<&str> = path.split(delimiter).collect();
    if parts.len() > 1 && parts[0].is_empty() {
        parts.remove(0);
    }
    let mut out: Vec<String> = Vec::with_capacity(parts.len());
    for part in parts {
        match out.last_mut() {
            Some(last) if last.ends_with('\\') => {
                last.pop();
                last.push(delimiter);
                last.push_str(part);
            }
            _ => out.push(part.to_owned()),
        }
    }
    out
}

/// A specification with its path taken apart, ready to walk.
#[derive(Clone, Debug)]
pub(crate) struct Walk {
    gvk: Gvk,
    path: Vec<String>,
    text: String,
    create: bool,
}

impl Walk {
    /// Prepares a specification.
    pub(crate) fn new(spec: &FieldSpec) -> Walk {
        Walk {
            gvk: spec.gvk.clone(),
            path: split_path(&spec.path, '/'),
            text: spec.path.clone(),
            create: spec.create,
        }
    }

    /// The path as written.
    pub(crate) fn path(&self) -> &str {
        &self.text
    }

    /// Whether it applies to a kind.
    pub(crate) fn applies_to(&self, group: &str, version: &str, kind: &str) -> bool {
        selects(&self.gvk, group, version, kind)
    }

    /// Whether it is meant for this kind by name.
    pub(crate) fn names_kind(&self, kind: &str) -> bool {
        self.gvk.kind == kind
    }

    /// Calls `set` with every value at the path.
    pub(crate) fn visit(
        &self,
        root: &mut Map,
        create: Create,
        set: &mut dyn FnMut(&mut Value) -> Result<(), String>,
    ) -> Result<(), String> {
        let create = if self.create { create } else { Create::Never };
        in_map(root, &self.path, create, set).map_err(|e| format!("considering field '{}': {e}", self.text))
    }
}

fn in_value(
    value: &mut Value,
    path: &[String],
    create: Create,
    set: &mut dyn FnMut(&mut Value) -> Result<(), String>,
) -> Result<(), String> {
    if path.is_empty() {
        return set(value);
    }
    match value {
        Value::Map(map) => in_map(map, path, create, set),
        Value::Seq(seq) => seq
            .items
            .iter_mut()
            .try_for_each(|item| in_value(item, path, create, set)),
        Value::Scalar(s) if s.is_null() => Ok(()),
        Value::Scalar(_) => Err("expected sequence or mapping node".into()),
    }
}

fn in_map(
    map: &mut Map,
    path: &[String],
    create: Create,
    set: &mut dyn FnMut(&mut Value) -> Result<(), String>,
) -> Result<(), String> {
    let (name, is_list) = match path[0].strip_suffix("[]") {
        Some(name) => (name, true),
        None => (path[0].as_str(), false),
    };
    if name.is_empty() {
        return Err("cannot set or create an empty field name".into());
    }
    let make = match create {
        Create::Never => None,
        _ if is_list => None,
        Create::Scalar(_) if path.len() == 1 => Some(Value::Scalar(Scalar::untyped(""))),
        _ => Some(Value::Map(Map::new())),
    };
    let index = match (map.index_of(name), make) {
        (Some(index), make) => {
            let value = &mut map.entries[index].value;
            if let Value::Scalar(s) = value
                && s.is_null()
            {
                // A null takes the type that the path asks for; a list stays behind as an empty list.
                match (make, create) {
                    (Some(Value::Map(m)), _) => *value = Value::Map(m),
                    (Some(_), Create::Scalar(tag)) => s.tag = tag,
                    _ if is_list => *value = Value::from(Vec::new()),
                    _ => {}
                }
            }
            index
        }
        (None, Some(value)) => {
            map.push(name, value);
            map.len() - 1
        }
        (None, None) => return Ok(()),
    };
    in_value(&mut map.entries[index].value, &path[1..], create, set)
}

/// Replaces a scalar, keeping how it was quoted: a number set into a quoted field yields text.
pub(crate) fn set_scalar(target: &mut Value, text: &str, tag: Tag) -> Result<(), String> {
    match target {
        Value::Scalar(old) => {
            *old = Scalar {
                text: text.into(),
                pos: old.pos,
                tag,
                style: old.style,
                tagged: old.tagged,
            };
            Ok(())
        }
        other => Err(wrong_kind("scalar", other)),
    }
}

/// Sets a key of a mapping to a scalar, keeping how an existing value was quoted.
pub(crate) fn set_entry(target: &mut Value, key: &str, text: &str, tag: Tag) -> Result<(), String> {
    match target {
        Value::Map(map) => {
            match map.get_mut(key) {
                Some(Value::Scalar(old)) => {
                    *old = Scalar {
                        text: text.into(),
                        pos: old.pos,
                        tag,
                        style: old.style,
                        tagged: old.tagged,
                    };
                }
                Some(other) => *other = Value::Scalar(Scalar::tagged_as(tag, text)),
                None => map.push(key, Value::Scalar(Scalar::tagged_as(tag, text))),
            }
            Ok(())
        }
        Value::Scalar(s) if s.is_null() => Ok(()),
        other => Err(wrong_kind("mapping", other)),
    }
}

/// The message for a value of the wrong kind.
pub(crate) fn wrong_kind(expected: &str, found: &Value) -> String {
    let kind = match found {
        Value::Scalar(_) => "scalar",
        Value::Seq(_) => "sequence",
        Value::Map(_) => "mapping",
    };
    format!("wrong node kind: expected {expected} but got {kind}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_escaped_slash_stays_in_the_key() {
        assert_eq!(
            split_path(r"metadata/annotations/a.b\/c", '/'),
            ["metadata", "annotations", "a.b/c"]
        );
        assert_eq!(split_path("/a/b", '/'), ["a", "b"]);
        assert_eq!(split_path(r"a.b\.c", '.'), ["a", "b.c"]);
    }

    #[test]
    fn a_specification_that_is_covered_is_not_added_twice() {
        let mut list = vec![FieldSpec {
            gvk: Gvk::of("apps/v1", "Deployment"),
            path: "a/b".into(),
            create: true,
        }];
        merge_one(
            &mut list,
            &FieldSpec {
                gvk: Gvk {
                    kind: "Deployment".into(),
                    ..Gvk::default()
                },
                path: "a/b".into(),
                create: true,
            },
        )
        .unwrap();
        assert_eq!(list.len(), 1);
        let conflict = FieldSpec {
            gvk: Gvk::default(),
            path: "a/b".into(),
            create: false,
        };
        assert!(
            merge_one(&mut list, &conflict)
                .unwrap_err()
                .contains("conflicting fieldspecs")
        );
    }
}
