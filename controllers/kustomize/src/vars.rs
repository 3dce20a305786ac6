//! `vars`: `$(NAME)` in certain fields becomes the value of a field of a resource.

use serin_manifests::{Plain, Scalar, Style, Tag, Value};

use crate::error::{Cause, Result};
use crate::field_spec::{Create, FieldSpec, Walk};
use crate::id::ResId;
use crate::kustomization::Var;
use crate::paths::{lookup, split_field_path};
use crate::resmap::ResMap;
use crate::transform::Env;

/// Notes at the resources which variables they give the value of. A name may be defined once in a build.
pub(crate) fn merge(known: &mut Vec<Var>, incoming: &[Var], map: &mut ResMap, env: &Env<'_>) -> Result<()> {
    for var in incoming {
        let id = ResId {
            gvk: var.gvk.clone(),
            name: var.object_name.clone(),
            namespace: var.object_namespace.clone(),
            cluster_scoped: false,
        };
        env.step(map.len())?;
        let matches: Vec<usize> = (0..map.len())
            .filter(|&i| {
                let r = &map.resources()[i];
                let ids =
                    std::iter::once(r.id(env.schemas)).chain(r.previous.iter().map(|p| r.previous_id(p)));
                ids.into_iter().any(|have| {
                    if id.namespace.is_empty() {
                        id.gvkn_equals(&have)
                    } else {
                        id.equals(&have)
                    }
                })
            })
            .collect();
        match matches[..] {
            [] => {}
            [index] => map.contents_mut()[index].variables.push(var.name.clone()),
            _ => {
                return Err(Cause::Var(format!(
                    "found {} resId matches for var {} (unable to disambiguate)",
                    matches.len(),
                    var.name
                ))
                .into());
            }
        }
    }
    add_all(known, incoming)
}

/// Adds definitions; a name that is known already is an error.
pub(crate) fn add_all(known: &mut Vec<Var>, incoming: &[Var]) -> Result<()> {
    for var in incoming {
        if known.iter().any(|v| v.name == var.name) {
            return Err(Cause::Var(format!("merging vars: var '{}' already encountered", var.name)).into());
        }
        known.push(var.clone());
    }
    Ok(())
}

/// The value of a variable.
enum Content {
    Text(String),
    Int(i64),
    Float(f64),
    Bool(bool),
    /// A list or a map cannot be put into text; the reference stays.
    Structure,
}

impl Content {
    fn scalar(&self) -> Option<(Tag, String)> {
        Some(match self {
            Content::Text(text) => (Tag::Str, text.clone()),
            Content::Int(i) => (Tag::Int, i.to_string()),
            Content::Float(f) => (Tag::Float, format!("{f}")),
            Content::Bool(b) => (Tag::Bool, b.to_string()),
            Content::Structure => return None,
        })
    }
}

/// Replaces all references.
pub(crate) fn resolve(map: &mut ResMap, vars: &[Var], specs: &[FieldSpec], env: &Env<'_>) -> Result<()> {
    if vars.is_empty() {
        return Ok(());
    }
    let mut values = std::collections::HashMap::new();
    for var in vars {
        let Some(r) = map.resources().iter().find(|r| r.variables.contains(&var.name)) else {
            let message = format!(
                "var '{}' cannot be mapped to a field in the set of known resources",
                var.name
            );
            return Err(Cause::Var(message).into());
        };
        let path = list_indexes(&split_field_path(&var.field_path));
        let value = lookup(&r.root, &path).ok().flatten().and_then(content);
        let Some(value) = value else {
            let message = format!(
                "field specified in var '{}' not found in corresponding resource: {} of {}",
                var.name,
                var.field_path,
                r.id(env.schemas)
            );
            return Err(Cause::Var(message).into());
        };
        values.insert(var.name.as_str(), value);
    }
    let walks: Vec<Walk> = specs.iter().map(Walk::new).collect();
    for r in map.resources_mut() {
        env.step(walks.len())?;
        let gvk = r.gvk();
        for walk in walks
            .iter()
            .filter(|w| w.applies_to(&gvk.group, &gvk.version, &gvk.kind))
        {
            walk.visit(&mut r.root, Create::Never, &mut |v| set(v, &values))
                .map_err(Cause::Var)?;
        }
    }
    Ok(())
}

/// `ports[0]` means the key `ports` and the index 0.
fn list_indexes(path: &[String]) -> Vec<String> {
    let mut out = Vec::new();
    for part in path {
        let split = part.strip_suffix(']').and_then(|p| p.rsplit_once('['));
        match split {
            Some((name, index)) if !index.is_empty() && index.bytes().all(|b| b.is_ascii_digit()) => {
                if !name.is_empty() {
                    out.push(name.to_owned());
                }
                out.push(index.to_owned());
            }
            _ => out.push(part.clone()),
        }
    }
    out
}

fn content(value: &Value) -> Option<Content> {
    let Value::Scalar(scalar) = value else {
        return Some(Content::Structure);
    };
    match scalar.tag {
        Tag::Int => scalar.text.parse().ok().map(Content::Int),
        Tag::Float => scalar.text.parse().ok().map(Content::Float),
        Tag::Bool => match scalar.plain().ok()? {
            Plain::Bool(b) => Some(Content::Bool(b)),
            _ => scalar.text.parse().ok().map(Content::Bool),
        },
        _ => Some(Content::Text(scalar.text.to_string())),
    }
}

type Values<'a> = std::collections::HashMap<&'a str, Content>;

fn set(value: &mut Value, values: &Values<'_>) -> std::result::Result<(), String> {
    match value {
        Value::Scalar(s) => {
            if is_text(s) {
                replace(s, values);
            }
            Ok(())
        }
        Value::Map(map) => {
            for entry in &mut map.entries {
                if !is_text(&entry.key) {
                    return Err(format!(
                        "invalid map key: value='{}', tag='{:?}'",
                        entry.key.text, entry.key.tag
                    ));
                }
                if let Value::Scalar(s) = &mut entry.value
                    && is_text(s)
                {
                    replace(s, values);
                }
            }
            Ok(())
        }
        Value::Seq(seq) => {
            for item in &mut seq.items {
                match item {
                    Value::Scalar(s) if is_text(s) => replace(s, values),
                    _ => return Err("invalid value type expect a string".into()),
                }
            }
            Ok(())
        }
    }
}

/// Tagged as text, or not tagged: what looks like a number but was set by a transformer counts as text here.
fn is_text(s: &Scalar) -> bool {
    matches!(s.tag, Tag::Str | Tag::Unset)
}

fn replace(s: &mut Scalar, values: &Values<'_>) {
    let (tag, text) = expand(&s.text, values);
    *s = Scalar {
        text: text.into(),
        pos: s.pos,
        tag,
        style: Style::Plain,
        tagged: false,
    };
}

/// Expands `$(NAME)`; `$$` becomes `$`; unknown names stay. A text that is one reference takes the type of its value.
fn expand(text: &str, values: &Values<'_>) -> (Tag, String) {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('$') {
        out.push_str(&rest[..at]);
        let after = &rest[at + 1..];
        if let Some(tail) = after.strip_prefix('$') {
            out.push('$');
            rest = tail;
        } else if let Some((name, tail)) = after.strip_prefix('(').and_then(|inner| inner.split_once(')')) {
            match values.get(name).and_then(Content::scalar) {
                Some((tag, value)) => {
                    if text.len() == name.len() + 3 {
                        return (tag, value);
                    }
                    out.push_str(&value);
                }
                None => {
                    out.push_str("$(");
                    out.push_str(name);
                    out.push(')');
                }
            }
            rest = tail;
        } else {
            out.push('$');
            rest = after;
        }
    }
    out.push_str(rest);
    (Tag::Str, out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_are_expanded_as_in_containers() {
        let values: Values<'_> = [("A", Content::Text("x".into())), ("N", Content::Int(3))]
            .into_iter()
            .collect();
        let cases: &[(&str, Tag, &str)] = &[
            ("$(A)-$(N)", Tag::Str, "x-3"),
            ("$(N)", Tag::Int, "3"),
            ("$$(A)", Tag::Str, "$(A)"),
            ("$(B) $A $", Tag::Str, "$(B) $A $"),
            ("$(A", Tag::Str, "$(A"),
        ];
        for (text, tag, want) in cases {
            assert_eq!(expand(text, &values), (*tag, (*want).to_owned()), "{text}");
        }
    }
}
