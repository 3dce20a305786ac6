//! From a revision to objects: the spec laid over the kustomization, kustomize, variable substitution.
//!
//! Pure but for reading the revision. A [`Built`] carries the record of what was read ([`view::ReadSet`]) and a digest of
//! everything else that went in ([`recipe`]); while both hold, a new revision has the same objects and is not built.

pub(crate) mod envsubst;
pub(crate) mod glob;
mod overlay;
pub(crate) mod view;

use std::collections::BTreeMap;
use std::sync::Arc;

use serde_json::json;
use serin_crds::flux::kustomize::{KustomizationSpec, SubstituteStrategy};
use serin_manifests::Object;
use sha2::{Digest, Sha256};

use self::view::{ReadSet, View};
use crate::error::Error;
use crate::key::Key;
use crate::plan::Desired;
use crate::source::credentials::hex;
use crate::source::tree::Snapshot;

/// An annotation that exempts one object from substitution.
const SUBSTITUTE: &str = "kustomize.toolkit.fluxcd.io/substitute";

/// Variables for `${}`. `None` in the spec's sense (no `postBuild`) is `Option::None` outside of this type.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Variables(pub(crate) BTreeMap<String, String>);

/// The objects of one revision.
#[derive(Debug)]
pub(crate) struct Built {
    pub(crate) objects: Vec<Arc<Desired>>,
    /// `sha256:…` of the objects; the key of the history.
    pub(crate) digest: String,
    pub(crate) reads: ReadSet,
    pub(crate) recipe: [u8; 32],
}

/// A digest of all that determines a build beside the files.
pub(crate) fn recipe(key: &Key, spec: &KustomizationSpec, variables: Option<&Variables>) -> [u8; 32] {
    let parts = json!([
        [key.namespace, key.name],
        [
            spec.path,
            spec.target_namespace,
            spec.name_prefix,
            spec.name_suffix
        ],
        spec.common_metadata,
        spec.patches,
        spec.images,
        [
            json!(spec.components),
            json!(spec.ignore_missing_components),
            json!(spec.build_metadata)
        ],
        spec.post_build.as_ref().map(|p| json!(p.substitute_strategy)),
        variables.map(|v| &v.0),
    ]);
    Sha256::digest(parts.to_string()).into()
}

/// Builds a revision. Blocks on reading files.
pub(crate) fn build(
    snapshot: &Snapshot,
    key: &Key,
    spec: &KustomizationSpec,
    variables: Option<&Variables>,
) -> Result<Built, Error> {
    let directory = overlay::normalise(spec.path.as_deref())?;
    let mut view = View::new(snapshot);
    if !directory.is_empty() && !view.is_directory(&directory)? {
        return Err(Error::Build(format!(
            "kustomization path not found: '{directory}' is not a directory of revision {}",
            snapshot.revision
        )));
    }
    overlay::lay_over(&mut view, &directory, spec)?;
    let objects = kustomize(&view, &directory)?;
    let objects = substitute_all(objects, spec, variables)?;
    let none = BTreeMap::new();
    let (labels, annotations) = spec
        .common_metadata
        .as_ref()
        .map_or((&none, &none), |m| (&m.labels, &m.annotations));
    let pairs = |map: &'_ BTreeMap<String, String>| -> Vec<(String, String)> {
        map.iter().map(|(k, v)| (k.clone(), v.clone())).collect()
    };
    let (labels, annotations) = (pairs(labels), pairs(annotations));
    let mut desired = Vec::with_capacity(objects.len());
    let mut hash = Sha256::new();
    for object in objects {
        let origin = object.source().map(|s| format!("{}:{}", s.file, s.line));
        let value = object.to_json().map_err(|e| Error::Build(e.to_string()))?;
        let at = origin.clone().map(|o| format!(" ({o})")).unwrap_or_default();
        if object.kind() == "Secret" && value.get("sops").is_some() {
            return Err(Error::Build(format!(
                "Secret {}/{} is SOPS encrypted, configuring decryption is required for this secret to be reconciled, and spec.decryption is not honoured yet{at}",
                object.namespace(),
                object.name()
            )));
        }
        let one = Desired::new(value, key, &labels, &annotations, origin)
            .map_err(|e| Error::Build(format!("{e}{at}")))?;
        hash.update(one.digest);
        desired.push(one);
    }
    refuse_duplicates(&desired)?;
    Ok(Built {
        objects: desired,
        digest: format!("sha256:{}", hex(&hash.finalize())),
        reads: view.into_reads(),
        recipe: recipe(key, spec, variables),
    })
}

fn kustomize(view: &View<'_>, directory: &str) -> Result<Vec<Object>, Error> {
    let options = serin_kustomize::Options {
        load_restrictor: serin_kustomize::LoadRestrictor::None,
        reorder: serin_kustomize::Reorder::None,
        ..Default::default()
    };
    let build = serin_kustomize::build(view, directory, &options)
        .map_err(|e| Error::Build(format!("kustomize build failed: {e}")))?;
    Ok(build.objects)
}

/// The same object twice would make its content depend on the order of requests.
fn refuse_duplicates(objects: &[Arc<Desired>]) -> Result<(), Error> {
    let mut seen = std::collections::HashMap::new();
    for object in objects {
        if let Some(first) = seen.insert(&object.id, object) {
            let origins: Vec<&str> = [first, object]
                .iter()
                .filter_map(|o| o.origin.as_deref())
                .collect();
            return Err(Error::Build(format!(
                "{} is defined twice: {}",
                object.id,
                origins.join(" and ")
            )));
        }
    }
    Ok(())
}

fn substitute_all(
    objects: Vec<Object>,
    spec: &KustomizationSpec,
    variables: Option<&Variables>,
) -> Result<Vec<Object>, Error> {
    let (Some(post_build), Some(variables)) = (&spec.post_build, variables) else {
        return Ok(objects);
    };
    let always = post_build.substitute_strategy == Some(SubstituteStrategy::Always);
    if variables.0.is_empty() && !always {
        return Ok(objects);
    }
    objects
        .into_iter()
        .map(|object| substitute_one(object, variables))
        .collect()
}

/// Substitutes in the object's YAML text and reads it again, as Flux does: an unquoted `${n}` becomes a number.
fn substitute_one(object: Object, variables: &Variables) -> Result<Object, Error> {
    if object.annotation(SUBSTITUTE).is_some_and(|v| v == "disabled")
        || object.label(SUBSTITUTE).is_some_and(|v| v == "disabled")
    {
        return Ok(object);
    }
    let text = object.to_yaml().map_err(|e| Error::Build(e.to_string()))?;
    if !text.contains('$') {
        return Ok(object);
    }
    let source = object.source().cloned();
    let at = source
        .as_ref()
        .map(|s| format!(" (from {}:{})", s.file, s.line))
        .unwrap_or_default();
    let what = format!("{}{at}", object.id());
    let text = envsubst::substitute(text.as_bytes(), &variables.0, true).map_err(|e| {
        Error::Build(format!(
            "{what}: envsubst error: variable substitution failed: {e}"
        ))
    })?;
    let text = String::from_utf8(text)
        .map_err(|_| Error::Build(format!("{what}: the substituted text is not UTF-8")))?;
    let name = format!("{what} after substitution");
    let mut objects =
        serin_manifests::parse_documents(&text, &name).map_err(|e| Error::Build(e.to_string()))?;
    match (objects.pop(), objects.is_empty()) {
        (Some(one), true) => Ok(one.with_source(source)),
        _ => Err(Error::Build(format!(
            "{what}: a variable's value splits the object into several"
        ))),
    }
}

#[cfg(test)]
mod tests;
