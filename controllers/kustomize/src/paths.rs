//! Field paths of replacements and variables: `spec.containers.[name=app].image`, `spec.rules.0.host`, `metadata.labels.*`.

use serin_manifests::{Map, Scalar, Value};

use crate::field_spec::split_path;
use crate::selector::compile;

/// Splits a path at dots. What stands in brackets is one part; brackets without `=` are taken off.
pub(crate) fn split_field_path(path: &str) -> Vec<String> {
    let parts = split_path(path, '.');
    let mut out = Vec::with_capacity(parts.len());
    let mut i = 0;
    while i < parts.len() {
        let mut part = parts[i].clone();
        if part.starts_with('[') && !part.ends_with(']') {
            while i + 1 < parts.len() {
                i += 1;
                part.push('.');
                part.push_str(&parts[i]);
                if parts[i].ends_with(']') {
                    break;
                }
            }
            if !part.contains('=') {
                part = part.trim_matches(['[', ']']).to_owned();
            }
        }
        out.push(part);
        i += 1;
    }
    out
}

/// What a new field becomes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Kind {
    Scalar,
    Seq,
    Map,
}

impl Kind {
    pub(crate) fn of(value: &Value) -> Kind {
        match value {
            Value::Scalar(_) => Kind::Scalar,
            Value::Seq(_) => Kind::Seq,
            Value::Map(_) => Kind::Map,
        }
    }

    fn empty(self) -> Value {
        match self {
            Kind::Scalar => Value::Scalar(Scalar::untyped("")),
            Kind::Seq => Value::from(Vec::new()),
            Kind::Map => Value::Map(Map::new()),
        }
    }

    /// The kind that the next part of a path needs.
    fn for_next(next: Option<&String>, last: Kind) -> Kind {
        match next {
            None => last,
            Some(p) if is_list_part(p) || index(p).is_some() => Kind::Seq,
            Some(_) => Kind::Map,
        }
    }
}

fn is_list_part(part: &str) -> bool {
    part.starts_with('[') && part.ends_with(']')
}

/// A number as Go's Atoi reads it: a sign is allowed.
fn atoi(part: &str) -> Option<i64> {
    part.parse().ok()
}

fn index(part: &str) -> Option<usize> {
    atoi(part).and_then(|n| usize::try_from(n).ok())
}

fn name_and_value(part: &str) -> Result<(&str, &str), String> {
    let inner = part.strip_suffix(']').unwrap_or(part);
    let inner = inner.strip_prefix('[').unwrap_or(inner);
    inner
        .split_once('=')
        .ok_or_else(|| "list path element must contain fieldName=fieldValue for element to match".to_owned())
}

fn wrong(expected: &str, found: &Value) -> String {
    crate::field_spec::wrong_kind(expected, found)
}

/// Finds one value. `Ok(None)` when the path leads nowhere.
pub(crate) fn lookup<'a>(root: &'a Map, path: &[String]) -> Result<Option<&'a Value>, String> {
    let mut at: Option<&'a Value> = None;
    for part in path.iter().map(|p| p.trim()).filter(|p| !p.is_empty()) {
        if at.is_some_and(Value::is_null) {
            return Ok(None);
        }
        let next = if let Some(n) = atoi(part) {
            let n = usize::try_from(n).map_err(|_| format!("array index {n} cannot be negative"))?;
            elements(at)?.get(n)
        } else if part == "-" {
            elements(at)?.last()
        } else if part == "*" {
            return Err("wildcard is not supported in PathGetter".into());
        } else if is_list_part(part) {
            let (name, value) = name_and_value(part)?;
            elements(at)?.iter().find(|item| {
                if name.is_empty() {
                    matches!(item, Value::Scalar(s) if &*s.text == value)
                } else {
                    item.get(name)
                        .is_some_and(|v| crate::resource::raw_text(v) == value)
                }
            })
        } else {
            match at {
                None => root.get(part),
                Some(Value::Map(map)) => map.get(part),
                Some(other) => return Err(wrong("mapping", other)),
            }
        };
        match next {
            Some(value) => at = Some(value),
            None => return Ok(None),
        }
    }
    Ok(at)
}

fn elements(at: Option<&Value>) -> Result<&[Value], String> {
    match at {
        Some(Value::Seq(seq)) => Ok(&seq.items),
        Some(other) => Err(wrong("sequence", other)),
        None => Err("wrong node kind: expected sequence but got mapping".into()),
    }
}

/// Calls `set` with every value that a path with patterns leads to, making fields where `create` says so. Returns how many.
pub(crate) fn for_each_match(
    value: &mut Value,
    path: &[String],
    create: Option<Kind>,
    max_regex: usize,
    set: &mut dyn FnMut(&mut Value) -> Result<(), String>,
) -> Result<usize, String> {
    let Some(part) = path.first() else {
        set(value)?;
        return Ok(1);
    };
    let rest = &path[1..];
    if let Some(n) = index(part) {
        let items = items_mut(value)?;
        if n == items.len()
            && let Some(kind) = create
        {
            items.push(Kind::for_next(rest.first(), kind).empty());
        }
        let count = items.len();
        let item = items
            .get_mut(n)
            .ok_or_else(|| format!("index {n} specified but only {count} elements found"))?;
        return for_each_match(item, rest, create, max_regex, set);
    }
    if is_list_part(part) {
        return in_matching_elements(value, part, rest, create, max_regex, set);
    }
    if part == "*" {
        let mut count = 0;
        for item in items_mut(value)? {
            count += for_each_match(item, rest, create, max_regex, set)?;
        }
        return Ok(count);
    }
    match value {
        Value::Map(map) => {
            if map.index_of(part).is_none() {
                match create {
                    Some(kind) => map.push(part, Kind::for_next(rest.first(), kind).empty()),
                    None => return Ok(0),
                }
            }
            match map.get_mut(part) {
                Some(field) => for_each_match(field, rest, create, max_regex, set),
                None => Ok(0),
            }
        }
        Value::Scalar(s) if s.is_null() => Ok(0),
        other => Err(wrong("mapping", other)),
    }
}

fn items_mut(value: &mut Value) -> Result<&mut Vec<Value>, String> {
    match value {
        Value::Seq(seq) => Ok(&mut seq.items),
        other => Err(wrong("sequence", other)),
    }
}

fn in_matching_elements(
    value: &mut Value,
    part: &str,
    rest: &[String],
    create: Option<Kind>,
    max_regex: usize,
    set: &mut dyn FnMut(&mut Value) -> Result<(), String>,
) -> Result<usize, String> {
    let (name, pattern) = name_and_value(part)?;
    let (name, pattern) = (name.to_owned(), pattern.to_owned());
    if value.is_null() {
        return Ok(0);
    }
    let regex = compile(&pattern, max_regex).map_err(|e| e.to_string())?;
    let items = items_mut(value)?;
    let mut count = 0;
    for item in items.iter_mut() {
        if name.is_empty() {
            // The text is matched as it would be printed, and what follows in the path is not looked at.
            if regex.is_match(&printed(item)) {
                set(item)?;
                count += 1;
            }
        } else if item
            .get(&name)
            .is_some_and(|field| regex.is_match(&printed(field)))
        {
            count += for_each_match(item, rest, create, max_regex, set)?;
        }
    }
    if count > 0 || create.is_none() {
        return Ok(count);
    }
    let mut item = if name.is_empty() {
        Value::Scalar(Scalar::untyped(pattern.as_str()))
    } else {
        let mut map = Map::new();
        map.push(&name, Value::Scalar(Scalar::untyped(pattern.as_str())));
        Value::Map(map)
    };
    if name.is_empty() {
        set(&mut item)?;
        count = 1;
    } else {
        count = for_each_match(&mut item, rest, create, max_regex, set)?;
    }
    items.push(item);
    Ok(count)
}

/// A value as a document of its own, without the line end: quotes are part of it.
fn printed(value: &Value) -> String {
    match value {
        Value::Scalar(s) => {
            use serin_manifests::{Style, Tag};
            match s.style {
                Style::Single => format!("'{}'", s.text.replace('\'', "''")),
                Style::Double => format!("{:?}", s.text),
                _ if s.tag == Tag::Str && serin_manifests::tag_of(&s.text) != Tag::Str => {
                    format!("\"{}\"", s.text)
                }
                _ => s.text.trim().to_owned(),
            }
        }
        other => serin_manifests::yaml::write_value(other)
            .unwrap_or_default()
            .trim()
            .to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn brackets_keep_what_they_hold_together() {
        assert_eq!(
            split_field_path("spec.containers.[name=a.b].image"),
            ["spec", "containers", "[name=a.b]", "image"]
        );
        assert_eq!(
            split_field_path("metadata.annotations.[a.b/c]"),
            ["metadata", "annotations", "a.b/c"]
        );
        assert_eq!(
            split_field_path(r"metadata.annotations.a\.b/c"),
            ["metadata", "annotations", "a.b/c"]
        );
        assert_eq!(split_field_path("a.[x=1]"), ["a", "[x=1]"]);
    }
}
