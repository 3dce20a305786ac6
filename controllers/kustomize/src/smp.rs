//! Strategic merge: a patch in the shape of the object.
//!
//! Maps merge, scalars and plain lists are replaced, null removes, `$patch` says otherwise, and lists that the schema says
//! to merge are matched by key, new elements first. The whole object is walked, also where the patch says nothing: empty
//! values (`key:`) go, lists with keys are normalised. All of that is what kustomize does, its oddities included:
//! a value keeps the quotes of the one it replaces, so a number patched over quoted text becomes text.

use serin_manifests::{Map, Scalar, Tag, Value};

use crate::field_spec::wrong_kind;
use crate::resource::raw_text;
use crate::schema::{Cursor, Schemas};

/// A merged value, and whether it is the old one changed rather than the patch's in its place.
struct Merged {
    value: Value,
    is_dest: bool,
}

type Outcome = Result<Option<Merged>, String>;

/// Applies a patch to an object. `None` when the patch deletes the object.
///
/// `$patch: replace` at the top has no effect at all: kustomize makes the new object and then forgets it.
pub(crate) fn apply(dest: Map, patch: Map, schemas: &Schemas) -> Result<Option<Map>, String> {
    if let Some(text) = patch.get(DIRECTIVE)
        && directive(raw_text(text))? == Directive::Replace
    {
        return Ok(Some(dest));
    }
    let merger = Merger { schemas };
    match merger.walk(Some(Value::Map(dest)), Some(Value::Map(patch)), None)? {
        Some(Merged {
            value: Value::Map(map),
            ..
        }) => Ok(Some(map)),
        Some(_) | None => Ok(None),
    }
}

#[derive(PartialEq, Clone, Copy)]
enum Directive {
    Merge,
    Replace,
    Delete,
}

fn directive(text: &str) -> Result<Directive, String> {
    match text {
        "merge" => Ok(Directive::Merge),
        "replace" => Ok(Directive::Replace),
        "delete" => Ok(Directive::Delete),
        other => Err(format!("unknown patch strategy '{other}'")),
    }
}

const DIRECTIVE: &str = "$patch";

/// Reads and removes the directive of a mapping.
fn take_map_directive(patch: &mut Map) -> Result<Directive, String> {
    let Some(index) = patch.index_of(DIRECTIVE) else {
        return Ok(Directive::Merge);
    };
    let found = directive(raw_text(&patch.entries[index].value))?;
    patch.entries.remove(index);
    Ok(found)
}

/// Reads and removes the directive of a list: an element that holds nothing else.
fn take_list_directive(items: &mut Vec<Value>) -> Result<Directive, String> {
    let found = items.iter().find_map(|item| {
        let map = item.as_map()?;
        map.get(DIRECTIVE).map(|d| (map.len(), raw_text(d).to_owned()))
    });
    let Some((1, text)) = found else {
        return Ok(Directive::Merge);
    };
    let found = directive(&text)?;
    // The removal also sweeps out empty elements.
    items.retain(|item| {
        !item.is_null() && !is_empty_map(item) && item.get(DIRECTIVE).is_none_or(|d| raw_text(d) != text)
    });
    Ok(found)
}

fn is_empty_map(value: &Value) -> bool {
    matches!(value, Value::Map(m) if m.is_empty())
}

/// A null that was written out (`null`, `~`) stays; an empty value goes.
fn is_written_null(value: &Value) -> bool {
    matches!(value, Value::Scalar(s) if s.is_null() && !s.text.is_empty())
}

struct Merger<'a> {
    schemas: &'a Schemas,
}

impl<'a> Merger<'a> {
    fn schema_of(
        &self,
        given: Option<Cursor<'a>>,
        dest: Option<&Value>,
        origin: Option<&Value>,
    ) -> Option<Cursor<'a>> {
        if given.is_some() {
            return given;
        }
        let of = |value: &Value| {
            let map = value.as_map()?;
            let api_version = map.get("apiVersion").map_or("", raw_text);
            let kind = map.get("kind").map_or("", raw_text);
            if api_version.is_empty() || kind.is_empty() {
                return None;
            }
            self.schemas.of_kind(api_version, kind)
        };
        dest.and_then(of).or_else(|| origin.and_then(of))
    }

    fn walk(&self, dest: Option<Value>, origin: Option<Value>, schema: Option<Cursor<'a>>) -> Outcome {
        let dest_is_null = dest.as_ref().is_none_or(Value::is_null);
        let origin_is_null = origin.as_ref().is_none_or(Value::is_null);
        let schema = self.schema_of(schema, dest.as_ref(), origin.as_ref());
        match (dest, origin) {
            (dest, origin) if dest_is_null && origin_is_null => Ok(match (dest, origin) {
                (Some(value), None) if is_written_null(&value) => Some(Merged { value, is_dest: true }),
                _ => None,
            }),
            // Only the patch has it.
            (_, Some(origin)) if dest_is_null => match origin {
                Value::Map(mut map) => {
                    // Unknown directives are not complained about here, and stay.
                    if matches!(take_map_directive(&mut map), Ok(Directive::Delete)) {
                        return Ok(None);
                    }
                    self.added(Value::Map(map), schema, false)
                }
                Value::Seq(_) => self.added(origin, schema, false),
                Value::Scalar(_) => Ok(Some(Merged {
                    value: origin,
                    is_dest: false,
                })),
            },
            (Some(dest), origin) => match dest {
                Value::Map(map) => self.map(map, origin, schema),
                Value::Seq(seq) => {
                    let pos = seq.pos;
                    let merged = self.list(seq.items, origin, schema)?;
                    Ok(merged.map(|mut m| {
                        if let Value::Seq(s) = &mut m.value {
                            s.pos = pos;
                        }
                        m
                    }))
                }
                Value::Scalar(_) => match origin {
                    None => Ok(Some(Merged {
                        value: dest,
                        is_dest: true,
                    })),
                    Some(Value::Scalar(s)) if s.is_null() => Ok(None),
                    Some(value @ Value::Scalar(_)) => Ok(Some(Merged {
                        value,
                        is_dest: false,
                    })),
                    Some(other) => Err(wrong_kind("scalar", &other)),
                },
            },
            (None, _) => Ok(None),
        }
    }

    /// A value that only the patch has (`directive_taken` false: of it and below) merged with itself: nulls and directives
    /// inside take effect.
    fn added(&self, value: Value, schema: Option<Cursor<'a>>, check: bool) -> Outcome {
        let schema = self.schema_of(schema, Some(&value), None);
        match value {
            Value::Scalar(s) if s.is_null() => Ok(None),
            Value::Scalar(_) => Ok(Some(Merged { value, is_dest: true })),
            Value::Map(mut map) => {
                if check && take_map_directive(&mut map)? == Directive::Delete {
                    return Ok(None);
                }
                let mut kept = Map {
                    entries: Vec::with_capacity(map.len()),
                    pos: map.pos,
                };
                for mut entry in map.entries {
                    let below = schema.and_then(|s| s.field(&entry.key.text));
                    if let Some(merged) = self.added(entry.value, below, true)? {
                        entry.value = merged.value;
                        kept.entries.push(entry);
                    }
                }
                Ok(Some(Merged {
                    value: Value::Map(kept),
                    is_dest: true,
                }))
            }
            Value::Seq(mut seq) => {
                if !schema.is_some_and(|s| s.merges()) {
                    return Ok(Some(Merged {
                        value: Value::Seq(seq),
                        is_dest: true,
                    }));
                }
                if check && take_list_directive(&mut seq.items)? == Directive::Delete {
                    return Ok(None);
                }
                seq.items = self.associative(seq.items, None, schema, true)?;
                Ok(Some(Merged {
                    value: Value::Seq(seq),
                    is_dest: true,
                }))
            }
        }
    }

    fn map(&self, mut dest: Map, origin: Option<Value>, schema: Option<Cursor<'a>>) -> Outcome {
        let mut origin = match origin {
            None => return self.map_alone(dest, schema),
            Some(Value::Map(map)) => map,
            Some(v) if v.is_null() => return Ok(None),
            Some(other) => return Err(wrong_kind("mapping", &other)),
        };
        match take_map_directive(&mut origin)? {
            Directive::Delete => return Ok(None),
            Directive::Replace => {
                let added = self.added(Value::Map(origin), schema, false)?;
                return Ok(added.map(|m| Merged {
                    value: m.value,
                    is_dest: false,
                }));
            }
            Directive::Merge => {}
        }
        // Fields of the object, with what the patch says about each.
        let finder = origin.finder();
        let in_origin: Vec<Option<usize>> = dest.entries.iter().map(|e| finder.find(&e.key.text)).collect();
        let known: std::collections::HashSet<usize> = in_origin.iter().flatten().copied().collect();
        let mut patches: Vec<Option<Value>> = Vec::with_capacity(origin.len());
        let mut new_keys = Vec::new();
        for (i, entry) in origin.entries.into_iter().enumerate() {
            patches.push(Some(entry.value));
            if !known.contains(&i) {
                new_keys.push((i, entry.key));
            }
        }
        let mut kept = Map {
            entries: Vec::with_capacity(dest.len() + new_keys.len()),
            pos: dest.pos,
        };
        for (mut entry, index) in dest.entries.drain(..).zip(in_origin) {
            let below = schema.and_then(|s| s.field(&entry.key.text));
            let patch = index.and_then(|i| patches[i].take());
            let old = entry.value.as_scalar().map(|s| (s.style, s.tagged, s.shared));
            if let Some(merged) = self.walk(Some(entry.value), patch, below)? {
                entry.value = merged.value;
                if let (false, Value::Scalar(s)) = (merged.is_dest, &mut entry.value) {
                    take_place_of(s, old);
                }
                kept.entries.push(entry);
            }
        }
        for (index, key) in new_keys {
            let below = schema.and_then(|s| s.field(&key.text));
            if let Some(merged) = self.walk(None, patches[index].take(), below)? {
                let key = Scalar {
                    tag: Tag::Unset,
                    ..key
                };
                kept.entries.push(serin_manifests::Entry {
                    key,
                    value: merged.value,
                });
            }
        }
        Ok(Some(Merged {
            value: Value::Map(kept),
            is_dest: true,
        }))
    }

    /// A mapping that the patch says nothing about.
    fn map_alone(&self, mut dest: Map, schema: Option<Cursor<'a>>) -> Outcome {
        let mut failed = None;
        dest.entries.retain_mut(|entry| {
            if failed.is_some() {
                return true;
            }
            match self.alone(&mut entry.value, schema.and_then(|s| s.field(&entry.key.text))) {
                Ok(keep) => keep,
                Err(e) => {
                    failed = Some(e);
                    true
                }
            }
        });
        match failed {
            Some(e) => Err(e),
            None => Ok(Some(Merged {
                value: Value::Map(dest),
                is_dest: true,
            })),
        }
    }

    /// Normalises a value in place; `false` when it goes.
    fn alone(&self, value: &mut Value, schema: Option<Cursor<'a>>) -> Result<bool, String> {
        match value {
            Value::Scalar(s) if s.is_null() => Ok(!s.text.is_empty()),
            Value::Scalar(_) => Ok(true),
            _ => {
                let schema = self.schema_of(schema, Some(value), None);
                if let Value::Seq(seq) = value {
                    if schema.is_some_and(|s| s.merges()) {
                        let items = std::mem::take(&mut seq.items);
                        seq.items = self.associative(items, None, schema, false)?;
                    }
                    return Ok(true);
                }
                if let Value::Map(map) = value {
                    let dest = std::mem::take(map);
                    return match self.map_alone(dest, schema)? {
                        Some(Merged {
                            value: Value::Map(kept),
                            ..
                        }) => {
                            *map = kept;
                            Ok(true)
                        }
                        _ => Ok(false),
                    };
                }
                Ok(true)
            }
        }
    }

    fn list(&self, dest: Vec<Value>, origin: Option<Value>, schema: Option<Cursor<'a>>) -> Outcome {
        let associative = schema.is_some_and(|s| s.merges());
        let mut origin = match origin {
            None if associative => {
                let items = self.associative(dest, None, schema, false)?;
                return Ok(Some(Merged {
                    value: Value::from(items),
                    is_dest: true,
                }));
            }
            None => {
                return Ok(Some(Merged {
                    value: Value::from(dest),
                    is_dest: true,
                }));
            }
            Some(v) if v.is_null() => return Ok(None),
            Some(Value::Seq(seq)) => seq,
            Some(other) => return Err(wrong_kind("sequence", &other)),
        };
        if !associative {
            return Ok(Some(Merged {
                value: Value::Seq(origin),
                is_dest: false,
            }));
        }
        match take_list_directive(&mut origin.items)? {
            Directive::Delete => Ok(None),
            Directive::Replace => {
                let items = self.associative(origin.items, None, schema, true)?;
                Ok(Some(Merged {
                    value: Value::from(items),
                    is_dest: false,
                }))
            }
            Directive::Merge => {
                let items = self.associative(dest, Some(origin.items), schema, false)?;
                Ok(Some(Merged {
                    value: Value::from(items),
                    is_dest: true,
                }))
            }
        }
    }

    /// Merges lists by key. With `to_itself` the list stands on both sides, as kustomize has it for what is only in the patch.
    fn associative(
        &self,
        mut dest: Vec<Value>,
        origin: Option<Vec<Value>>,
        schema: Option<Cursor<'a>>,
        to_itself: bool,
    ) -> Result<Vec<Value>, String> {
        let keys: Vec<&str> = schema
            .and_then(|s| s.merge_keys())
            .map(|k| k.iter().map(|k| &**k).collect())
            .unwrap_or_default();
        let elements = schema.and_then(|s| s.elements());
        let mut origin = origin;
        let mut values = if keys.is_empty() {
            Vec::new()
        } else {
            key_values(&keys, origin.as_deref(), &dest)
        };
        let keys = if keys.is_empty() {
            values = primitive_values(origin.as_deref(), &dest);
            vec![""]
        } else {
            keys
        };
        if keys.len() > 1 {
            complete_values(&mut values);
        }
        if values.is_empty() {
            return Ok(Vec::new());
        }
        let valid = valid_keys(&keys, &values);
        let mut merged_items: Vec<Value> = Vec::with_capacity(values.len());
        for value in &values {
            let (valid_keys, valid_values) = restrict(&keys, value, &valid);
            let own = own_keys(&valid_keys, &valid_values);
            let dest_index = find(&dest, &own.0, &own.1);
            let merged = if to_itself {
                match dest_index {
                    Some(i) => self.added(dest[i].clone(), elements, true)?,
                    None => None,
                }
            } else {
                let origin_index = origin.as_ref().and_then(|o| find(o, &own.0, &own.1));
                let patch = origin_index.and_then(|i| origin.as_mut().map(|o| o[i].clone()));
                self.walk(dest_index.map(|i| dest[i].clone()), patch, elements)?
            };
            let Some(Merged {
                value: mut item,
                is_dest,
            }) = merged.filter(|m| !m.value.is_null() && !is_empty_map(&m.value))
            else {
                set_element(&mut dest, &valid_keys, &valid_values, None);
                continue;
            };
            for (key, text) in valid_keys.iter().zip(&valid_values) {
                if text.is_empty() {
                    continue;
                }
                match &mut item {
                    Value::Map(map) if map.get(key).is_none() => {
                        map.push(key, Value::Scalar(Scalar::untyped(text.as_str())));
                    }
                    // An element of a set of scalars has its text set anew, without a type.
                    Value::Scalar(s) => s.tag = Tag::Unset,
                    _ => {}
                }
            }
            if let (true, Some(i)) = (is_dest, dest_index) {
                dest[i] = item.clone();
            }
            set_element(&mut merged_items, &valid_keys, &valid_values, Some(item));
        }
        // What was in the object follows; elements that were merged already are in their place.
        let last = values
            .last()
            .map(|v| restrict(&keys, v, &valid).0)
            .unwrap_or_default();
        append(&mut merged_items, dest, &last);
        Ok(merged_items)
    }
}

/// A scalar of the patch keeps how the one in its place was quoted, and in how many places that stood.
fn take_place_of(s: &mut Scalar, old: Option<(serin_manifests::Style, bool, u8)>) {
    (s.style, s.tagged, s.shared) = old.unwrap_or((serin_manifests::Style::Plain, false, 0));
}

fn key_text(item: &Value, key: &str) -> String {
    item.get(key)
        .filter(|v| !v.is_null_or_empty())
        .map_or("", raw_text)
        .to_owned()
}

/// The distinct key values, those of the patch first.
fn key_values(keys: &[&str], origin: Option<&[Value]>, dest: &[Value]) -> Vec<Vec<String>> {
    let mut seen = std::collections::HashSet::new();
    let mut out = Vec::new();
    for item in origin.into_iter().flatten().chain(dest) {
        let values: Vec<String> = keys.iter().map(|k| key_text(item, k)).collect();
        if seen.insert(values.clone()) {
            out.push(values);
        }
    }
    out
}

fn primitive_values(origin: Option<&[Value]>, dest: &[Value]) -> Vec<Vec<String>> {
    let mut seen = std::collections::HashSet::new();
    let mut out = Vec::new();
    for item in origin.into_iter().flatten().chain(dest) {
        let text = raw_text(item).to_owned();
        if seen.insert(text.clone()) {
            out.push(vec![text]);
        }
    }
    out
}

/// Fills in missing secondary keys from values that agree in the others.
fn complete_values(values: &mut [Vec<String>]) {
    for i in 0..values.len() {
        for j in 0..values.len() {
            if let Some(both) = agreeing(&values[i], &values[j]) {
                values[i].clone_from(&both);
                values[j] = both;
            }
        }
    }
}

fn agreeing(a: &[String], b: &[String]) -> Option<Vec<String>> {
    let mut common = false;
    let mut out = Vec::with_capacity(a.len());
    for (x, y) in a.iter().zip(b) {
        if x == y {
            common = true;
            out.push(x.clone());
        } else if !x.is_empty() && !y.is_empty() {
            return None;
        } else {
            out.push(if x.is_empty() { y.clone() } else { x.clone() });
        }
    }
    common.then_some(out)
}

/// Which keys have a value anywhere. Empty when none has.
fn valid_keys(keys: &[&str], values: &[Vec<String>]) -> Vec<bool> {
    (0..keys.len())
        .map(|i| values.iter().any(|v| v.get(i).is_some_and(|t| !t.is_empty())))
        .collect()
}

fn restrict<'k>(keys: &[&'k str], values: &[String], valid: &[bool]) -> (Vec<&'k str>, Vec<String>) {
    if !valid.iter().any(|v| *v) {
        return (keys.to_vec(), values.to_vec());
    }
    let kept_keys = keys
        .iter()
        .zip(valid)
        .filter(|(_, v)| **v)
        .map(|(k, _)| *k)
        .collect();
    let kept = values
        .iter()
        .zip(valid)
        .filter(|(t, v)| **v || !t.is_empty())
        .map(|(t, _)| t.clone())
        .collect();
    (kept_keys, kept)
}

/// The keys that this very element has.
fn own_keys<'k>(keys: &[&'k str], values: &[String]) -> (Vec<&'k str>, Vec<String>) {
    let valid: Vec<bool> = values.iter().map(|v| !v.is_empty()).collect();
    restrict(keys, values, &valid)
}

fn find(items: &[Value], keys: &[&str], values: &[String]) -> Option<usize> {
    if keys.first().is_none_or(|k| k.is_empty()) {
        let text = values.first().map_or("", String::as_str);
        return items.iter().position(|item| raw_text(item) == text);
    }
    items.iter().position(|item| {
        item.as_map().is_some_and(|map| {
            keys.iter()
                .zip(values)
                .all(|(k, v)| map.get(k).is_some_and(|field| raw_text(field) == v))
        })
    })
}

/// Replaces (or, without an element, removes) the elements with the given key values; adds the element if there were none.
/// Empty elements are swept out on the way.
fn set_element(items: &mut Vec<Value>, keys: &[&str], values: &[String], element: Option<Value>) {
    let by_field =
        keys.first().is_some_and(|k| !k.is_empty()) && values.first().is_some_and(|v| !v.is_empty());
    let mut found = false;
    let mut out = Vec::with_capacity(items.len() + 1);
    for item in items.drain(..) {
        if item.is_null() || is_empty_map(&item) {
            continue;
        }
        if !matches!(item, Value::Map(_)) && by_field {
            out.push(item);
            continue;
        }
        // A key without a value of its own is as good as the one before it.
        let mut previous = false;
        let matches = keys.iter().enumerate().all(|(j, key)| {
            if let Some(text) = values.get(j) {
                previous = field_matches(&item, key, text);
            }
            previous
        });
        if !matches {
            if !values.is_empty() {
                out.push(item);
            }
            continue;
        }
        found = true;
        if let Some(element) = &element {
            out.push(element.clone());
        }
    }
    *items = out;
    if let (Some(element), false) = (element, found)
        && !element.is_null()
    {
        items.push(element);
    }
}

/// An empty text asks only whether the field is there.
fn field_matches(item: &Value, key: &str, text: &str) -> bool {
    match item {
        Value::Scalar(s) if key.is_empty() => &*s.text == text,
        Value::Map(map) => map
            .get(key)
            .is_some_and(|v| text.is_empty() || raw_text(v) == text),
        _ => false,
    }
}

fn append(items: &mut Vec<Value>, rest: Vec<Value>, keys: &[&str]) {
    // The usual case: every element has its key and stands in `items` already, so that setting it changes one place only.
    let mut positions: std::collections::HashMap<Vec<String>, usize> = std::collections::HashMap::new();
    let simple = |item: &Value| -> Option<Vec<String>> {
        let map = item.as_map()?;
        let texts: Vec<String> = keys
            .iter()
            .map(|k| map.get(k).map_or("", raw_text).to_owned())
            .collect();
        texts.iter().all(|t| !t.is_empty()).then_some(texts)
    };
    let mut regular = keys.first().is_some_and(|k| !k.is_empty()) && keys.len() == 1;
    for (i, item) in items.iter().enumerate() {
        match simple(item) {
            Some(texts) if regular => regular = positions.insert(texts, i).is_none(),
            _ => regular = false,
        }
        if !regular {
            break;
        }
    }
    if regular && rest.iter().all(|item| simple(item).is_some()) {
        for item in rest {
            let Some(texts) = simple(&item) else { continue };
            match positions.get(&texts) {
                Some(&i) => items[i] = item,
                None => {
                    positions.insert(texts, items.len());
                    items.push(item);
                }
            }
        }
        return;
    }
    for item in rest {
        if keys.first().is_none_or(|k| k.is_empty()) {
            let text = raw_text(&item).to_owned();
            set_element(items, &[""], &[text], Some(item));
            continue;
        }
        let mut values = Vec::new();
        for key in keys {
            match item.get(key) {
                None => items.push(item.clone()),
                Some(v) => values.push(raw_text(v).to_owned()),
            }
        }
        if keys.len() > 1 {
            set_element(items, keys, &values, None);
        }
        set_element(items, keys, &values, Some(item));
    }
}
