//! `replacements`: values copied from one field to others.

use serin_manifests::Value;

use crate::error::{Cause, Error, Result, nearest};
use crate::id::ResId;
use crate::kustomization::{FieldOptions, Replacement, ReplacementTarget};
use crate::paths::{Kind, for_each_match, lookup, split_field_path};
use crate::resmap::ResMap;
use crate::resource::{Resource, raw_text};
use crate::selector::{Requirement, Selector, matches_all, parse_label_selector};
use crate::transform::Env;

/// A replacement with its selectors read.
#[derive(Debug)]
pub(crate) struct PreparedReplacement {
    replacement: Replacement,
    targets: Vec<PreparedTarget>,
}

#[derive(Debug)]
struct PreparedTarget {
    target: ReplacementTarget,
    select: PreparedSelector,
    reject: Vec<PreparedSelector>,
    paths: Vec<(String, Vec<String>)>,
}

#[derive(Debug)]
struct PreparedSelector {
    id: ResId,
    by_metadata: bool,
    labels: Vec<Requirement>,
    annotations: Vec<Requirement>,
}

impl PreparedSelector {
    fn new(s: &Selector) -> Result<PreparedSelector> {
        Ok(PreparedSelector {
            id: ResId {
                gvk: s.gvk.clone(),
                name: s.name.clone(),
                namespace: s.namespace.clone(),
                cluster_scoped: false,
            },
            by_metadata: !s.label_selector.is_empty() || !s.annotation_selector.is_empty(),
            labels: parse_label_selector(&s.label_selector)?,
            annotations: parse_label_selector(&s.annotation_selector)?,
        })
    }

    fn metadata_matches(&self, r: &Resource) -> bool {
        if !self.by_metadata {
            return true;
        }
        let metadata = r.root.get("metadata");
        let map = |key: &str| metadata.and_then(|m| m.get(key)).and_then(Value::as_map);
        matches_all(&self.labels, map("labels")) && matches_all(&self.annotations, map("annotations"))
    }
}

/// Checks a replacement and reads its selectors.
pub(crate) fn prepare(replacement: Replacement) -> Result<PreparedReplacement> {
    let place = replacement.place.clone();
    let fail =
        |message: &str| Err(Error::new(Cause::Replacement(message.to_owned())).at_option(place.clone()));
    if (replacement.source.is_none() && replacement.source_value.is_none()) || replacement.targets.is_none() {
        return fail("replacements must specify a source and at least one target");
    }
    if replacement.source.is_some() && replacement.source_value.is_some() {
        return fail("value and resource selectors are mutually exclusive");
    }
    let mut targets = Vec::new();
    for target in replacement.targets.iter().flatten() {
        let Some(select) = &target.select else {
            return fail("target must specify resources to select");
        };
        let mut field_paths = target.field_paths.clone();
        if field_paths.is_empty() {
            field_paths.push("metadata.name".into());
        }
        targets.push(PreparedTarget {
            select: PreparedSelector::new(select)?,
            reject: target
                .reject
                .iter()
                .map(PreparedSelector::new)
                .collect::<Result<_>>()?,
            paths: field_paths
                .into_iter()
                .map(|p| (p.clone(), split_field_path(&p)))
                .collect(),
            target: target.clone(),
        });
    }
    Ok(PreparedReplacement { replacement, targets })
}

/// All identities of a resource, the present one first.
fn ids(r: &Resource) -> Vec<ResId> {
    let current = ResId {
        gvk: r.gvk(),
        name: r.name().into(),
        namespace: r.namespace().into(),
        cluster_scoped: false,
    };
    std::iter::once(current)
        .chain(r.previous.iter().map(|p| r.previous_id(p)))
        .collect()
}

/// A cheap test before all identities are made.
fn may_be(r: &Resource, selector: &ResId) -> bool {
    (selector.name.is_empty()
        || selector.name == r.name()
        || r.previous.iter().any(|p| p.name == selector.name))
        && (selector.gvk.kind.is_empty()
            || selector.gvk.kind == r.kind()
            || r.previous.iter().any(|p| p.kind == selector.gvk.kind))
}

pub(crate) fn apply(map: &mut ResMap, replacements: &[PreparedReplacement], env: &Env<'_>) -> Result<()> {
    for prepared in replacements {
        let at = |e: Error| e.at_option(prepared.replacement.place.clone());
        let value = source_value(map, &prepared.replacement, env).map_err(at)?;
        for target in &prepared.targets {
            env.step(map.len())?;
            for index in 0..map.len() {
                let r = &map.resources()[index];
                if !may_be(r, &target.select.id) || !selected(r, target) {
                    continue;
                }
                copy_to(map, index, &value, target, env).map_err(at)?;
            }
        }
    }
    Ok(())
}

fn selected(r: &Resource, target: &PreparedTarget) -> bool {
    if !target.select.metadata_matches(r) {
        return false;
    }
    if target
        .reject
        .iter()
        .any(|reject| reject.by_metadata && reject.metadata_matches(r))
    {
        return false;
    }
    let ids = ids(r);
    ids.iter().any(|id| id.is_selected_by(&target.select.id))
        && !target
            .reject
            .iter()
            .any(|reject| !reject.id.is_empty() && ids.iter().any(|id| id.is_selected_by(&reject.id)))
}

fn source_value(map: &ResMap, replacement: &Replacement, env: &Env<'_>) -> Result<Value> {
    if let Some(text) = &replacement.source_value {
        return Ok(Value::Scalar(serin_manifests::Scalar::untyped(text.as_str())));
    }
    let Some(source) = &replacement.source else {
        return Err(
            Cause::Replacement("replacements must specify a source and at least one target".into()).into(),
        );
    };
    env.step(map.len())?;
    let path = if source.field_path.is_empty() {
        "metadata.name"
    } else {
        &source.field_path
    };
    let shown = || {
        if source.field_path.is_empty() {
            source.id.to_string()
        } else {
            format!("{}:{}", source.id, source.field_path)
        }
    };
    let mut matches = map
        .resources()
        .iter()
        .filter(|r| may_be(r, &source.id) && ids(r).iter().any(|id| id.is_selected_by(&source.id)));
    let Some(found) = matches.next() else {
        let error = Error::new(Cause::Replacement(format!("nothing selected by {}", shown())));
        let same_kind = map
            .resources()
            .iter()
            .filter(|r| source.id.gvk.kind.is_empty() || r.kind() == source.id.gvk.kind);
        return Err(match nearest(&source.id.name, same_kind.map(Resource::name)) {
            Some(name) => error.help(format!("did you mean '{name}'?")),
            None => error,
        });
    };
    if let Some(second) = matches.next() {
        return Err(Error::new(Cause::Replacement(format!(
            "multiple matches for selector {}",
            shown()
        )))
        .help(format!(
            "{} and {} both match; add kind, name or namespace to the source",
            found.id(env.schemas),
            second.id(env.schemas)
        )));
    }
    let value = lookup(&found.root, &split_field_path(path))
        .map_err(|e| Cause::Replacement(format!("error looking up replacement source: {e}")))?;
    let Some(value) = value.filter(|v| !v.is_null_or_empty()) else {
        return Err(Cause::Replacement(format!(
            "fieldPath `{path}` is missing for replacement source {}",
            source.id
        ))
        .into());
    };
    refine(value, source.options.as_ref())
}

/// One part of the value, where a delimiter is given.
fn refine(value: &Value, options: Option<&FieldOptions>) -> Result<Value> {
    let Some(options) = options.filter(|o| !o.delimiter.is_empty()) else {
        return Ok(value.clone());
    };
    let Value::Scalar(scalar) = value else {
        return Err(Cause::Replacement("delimiter option can only be used with scalar nodes".into()).into());
    };
    let parts: Vec<&str> = scalar.text.split(options.delimiter.as_str()).collect();
    match usize::try_from(options.index).ok().and_then(|i| parts.get(i)) {
        Some(part) => {
            let mut out = scalar.clone();
            out.text = (*part).into();
            Ok(Value::Scalar(out))
        }
        None => Err(Cause::Replacement(format!(
            "options.index {} is out of bounds for value {}",
            options.index, scalar.text
        ))
        .into()),
    }
}

fn copy_to(
    map: &mut ResMap,
    index: usize,
    value: &Value,
    target: &PreparedTarget,
    env: &Env<'_>,
) -> Result<()> {
    let options = target.target.options.as_ref();
    let create = options.filter(|o| o.create).map(|_| Kind::of(value));
    let r = &mut map.resources_mut()[index];
    for (text, path) in &target.paths {
        let verb = if create.is_some() {
            "find or create"
        } else {
            "find"
        };
        let mut root = Value::Map(std::mem::take(&mut r.root));
        let found = for_each_match(
            &mut root,
            path,
            create,
            env.budget.max_regex_bytes,
            &mut |field| set(field, value, options),
        );
        if let Value::Map(map) = root {
            r.root = map;
        }
        let missing = |detail: &str| {
            let message = format!("unable to {verb} field \"{text}\" in replacement target{detail}");
            Error::new(Cause::Replacement(message)).help(format!(
                "the target is {}; `options.create: true` makes missing fields",
                r.id(env.schemas)
            ))
        };
        match found {
            Ok(0) => return Err(missing("")),
            Ok(_) => {}
            Err(e) if e.starts_with("delimiter option") => return Err(Cause::Replacement(e).into()),
            Err(e) => return Err(missing(&format!(": {e}"))),
        }
    }
    Ok(())
}

fn set(field: &mut Value, value: &Value, options: Option<&FieldOptions>) -> std::result::Result<(), String> {
    let mut value = value.clone();
    if let Some(options) = options.filter(|o| !o.delimiter.is_empty()) {
        let Value::Scalar(target) = &*field else {
            return Err("delimiter option can only be used with scalar nodes".into());
        };
        let new = value.text().unwrap_or("").to_owned();
        let mut parts: Vec<String> = target
            .text
            .split(options.delimiter.as_str())
            .map(str::to_owned)
            .collect();
        match usize::try_from(options.index) {
            Err(_) => parts.insert(0, new),
            Ok(i) if i >= parts.len() => parts.push(new),
            Ok(i) => parts[i] = new,
        }
        let joined = parts.join(&options.delimiter);
        match &mut value {
            Value::Scalar(s) => s.text = joined.into(),
            other => *other = Value::string(joined),
        }
    }
    match field {
        // Only the text: quotes and type of the target stay.
        Value::Scalar(target) => target.text = raw_text(&value).into(),
        other => *other = value,
    }
    Ok(())
}
