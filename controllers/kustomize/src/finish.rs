//! What is done once, at the root, when everything is built: local objects go, the rest is ordered, notes are taken out.

use serin_manifests::order::{LEGACY_FIRST, LEGACY_LAST, compare_legacy, legacy_rank};
use serin_manifests::{Id, Map, Tag, Value};

use crate::error::{Cause, Error, Result};
use crate::kustomization::SortOptions;
use crate::options::Reorder;
use crate::origin::{self, ORIGIN_ANNOTATION, TRANSFORMATIONS_ANNOTATION};
use crate::resmap::ResMap;
use crate::resource::Resource;
use crate::schema::Schemas;

/// The label that `buildMetadata: [managedByLabel]` sets, and its value: that of a kustomize built from source.
const MANAGED_BY: (&str, &str) = ("app.kubernetes.io/managed-by", "kustomize-(devel)");
/// Resources with this annotation take part in the build and are not in its result.
const LOCAL_CONFIG: &str = "config.kubernetes.io/local-config";

pub(crate) fn drop_local(map: &mut ResMap) {
    let local = |r: &Resource| {
        let annotations = r.root.get("metadata").and_then(|m| m.get("annotations"));
        annotations
            .and_then(|a| a.get(LOCAL_CONFIG))
            .is_some_and(|v| v.text() != Some("false"))
    };
    if map.resources().iter().any(local) {
        map.retain(|r| !local(r));
    }
}

pub(crate) fn sort(
    map: &mut ResMap,
    options: Option<&SortOptions>,
    reorder: Reorder,
    schemas: &Schemas,
) -> Result<()> {
    let (first, last): (Vec<String>, Vec<String>) = match options {
        None if reorder == Reorder::None => return Ok(()),
        None => default_order(),
        Some(options) => {
            let fail =
                |message: String| Error::new(Cause::SortOptions(message)).at_option(options.place.clone());
            match options.order.as_str() {
                "fifo" if options.legacy.is_some() => {
                    return Err(fail(
                        "the field 'sortOptions.legacySortOptions' is set but the selected sort order is 'fifo', not 'legacy'".into(),
                    ));
                }
                "fifo" => return Ok(()),
                "legacy" => options.legacy.clone().unwrap_or_else(default_order),
                _ => {
                    return Err(fail(
                        "the field 'sortOptions.order' must be one of [fifo, legacy]".into(),
                    ));
                }
            }
        }
    };
    let resources = std::mem::take(map).into_resources();
    let mut keyed: Vec<(Id, i32, Resource)> = resources
        .into_iter()
        .map(|r| {
            let gvk = r.gvk();
            let rank = legacy_rank(&gvk.kind, &first, &last);
            let id = Id {
                group: gvk.group,
                version: gvk.version,
                kind: gvk.kind,
                namespace: r.namespace().into(),
                name: r.name().into(),
            };
            (id, rank, r)
        })
        .collect();
    keyed.sort_by(|a, b| compare_legacy(&a.0, a.1, &b.0, b.1));
    for (_, _, r) in keyed {
        map.append(r, schemas)?;
    }
    Ok(())
}

fn default_order() -> (Vec<String>, Vec<String>) {
    let owned = |list: &[&str]| list.iter().map(|s| (*s).to_owned()).collect();
    (owned(&LEGACY_FIRST), owned(&LEGACY_LAST))
}

/// A patch may have taken away what makes an object one.
pub(crate) fn check_identity(r: &Resource) -> Result<()> {
    let missing = if r.kind().is_empty() {
        "kind"
    } else if r.name().is_empty() {
        "metadata.name"
    } else {
        return Ok(());
    };
    let what = format!("missing {missing} in object {} '{}'", r.kind(), r.name());
    let error = Error::new(Cause::NotAResource(what));
    Err(match &r.source {
        Some(source) => error.help(format!(
            "the object is defined in {}:{}; a patch has removed its {missing}",
            source.file, source.line
        )),
        None => error.help(format!("a patch has removed its {missing}")),
    })
}

/// What is done to every object of the result: annotations become text, those of the build itself go.
pub(crate) fn finish(r: &mut Resource, managed_by: bool, origins: bool, transformations: bool) {
    if managed_by && let Some(metadata) = r.metadata_mut() {
        if metadata.get("labels").is_none_or(Value::is_null) {
            metadata.set("labels", Value::Map(Map::new()));
        }
        if let Some(labels) = metadata.get_mut("labels") {
            // Only a mapping can take it; anything else would have failed as labels long before.
            let _ = crate::field_spec::set_entry(labels, MANAGED_BY.0, MANAGED_BY.1, Tag::Str, 0);
        }
    }
    let has_annotations = r
        .root
        .get("metadata")
        .and_then(|m| m.get("annotations"))
        .is_some();
    let mut annotations = r.string_map("annotations");
    annotations.retain(|(key, _)| !is_build_annotation(key));
    if let (true, Some(origin)) = (origins, &r.origin) {
        annotations.push((ORIGIN_ANNOTATION.to_owned(), origin.to_yaml()));
    }
    if transformations && !r.transformations.is_empty() {
        annotations.push((
            TRANSFORMATIONS_ANNOTATION.to_owned(),
            origin::list_to_yaml(&r.transformations),
        ));
    }
    if has_annotations || !annotations.is_empty() {
        r.set_string_map("annotations", annotations);
    }
}

/// Annotations that kustomize uses for its own notes; they never leave a build.
fn is_build_annotation(key: &str) -> bool {
    const NOTES: [&str; 11] = [
        "previousKinds",
        "previousNames",
        "prefixes",
        "suffixes",
        "previousNamespaces",
        "allowNameChange",
        "allowKindChange",
        "refBy",
        "generatorBehavior",
        "needsHashSuffix",
        "id",
    ];
    const OTHERS: [&str; 8] = [
        "internal.config.kubernetes.io/path",
        "internal.config.kubernetes.io/index",
        "internal.config.kubernetes.io/seqindent",
        "internal.config.kubernetes.io/annotations-migration-resource-id",
        "config.kubernetes.io/path",
        "config.kubernetes.io/index",
        "config.k8s.io/id",
        "config.kubernetes.io/origin",
    ];
    key == TRANSFORMATIONS_ANNOTATION
        || OTHERS.contains(&key)
        || key
            .strip_prefix("internal.config.kubernetes.io/")
            .is_some_and(|note| NOTES.contains(&note))
}
