//! From a revision to objects: the spec laid over the kustomization, kustomize, decryption, variable substitution.
//!
//! Pure but for reading the revision. A [`Built`] carries the record of what was read ([`view::ReadSet`]) and a digest of
//! everything else that went in ([`recipe`]); while both hold, a new revision has the same objects and is not built.

pub(crate) mod decryption;
mod overlay;
pub(crate) mod view;

use std::collections::BTreeMap;
use std::sync::Arc;

use serde_json::json;
use serin_crds::flux::kustomize::{KustomizationSpec, SubstituteStrategy};
use serin_manifests::Object;
use sha2::{Digest, Sha256};

use self::decryption::Decryption;
use self::view::{ReadSet, View};
use crate::error::Error;
use crate::key::Key;
use crate::plan::Desired;
use crate::source::credentials::hex;
use crate::source::tree::Snapshot;

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
pub(crate) fn recipe(
    key: &Key,
    spec: &KustomizationSpec,
    variables: Option<&Variables>,
    decryption: Option<&Decryption>,
) -> [u8; 32] {
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
        decryption.map(|d| hex(&d.digest)),
    ]);
    Sha256::digest(parts.to_string()).into()
}

/// Builds a revision. Blocks on reading files.
pub(crate) fn build(
    snapshot: &Snapshot,
    key: &Key,
    spec: &KustomizationSpec,
    variables: Option<&Variables>,
    decryption: Option<&Decryption>,
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
    let mut objects = kustomize(&view, &directory, decryption)?;
    for object in &mut objects {
        decryption::open_object(object, decryption)?;
    }
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
        recipe: recipe(key, spec, variables, decryption),
    })
}

fn kustomize(
    view: &View<'_>,
    directory: &str,
    decryption: Option<&Decryption>,
) -> Result<Vec<Object>, Error> {
    let options = serin_kustomize::Options {
        load_restrictor: serin_kustomize::LoadRestrictor::None,
        reorder: serin_kustomize::Reorder::None,
        decrypt: decryption.map(|d| d as &dyn serin_kustomize::Decrypt),
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

/// Strict: a variable that is not set and has no default is an error, as it is in Flux since 2.9.
fn substitute_one(object: Object, variables: &Variables) -> Result<Object, Error> {
    match serin_kustomize::substitute::object(&object, &variables.0, true) {
        Ok(None) => Ok(object),
        Ok(Some(new)) => Ok(new),
        Err(e) => Err(Error::Build(format!(
            "{}: envsubst error: {e}",
            whereabouts(&object)
        ))),
    }
}

/// The object's identity and where it is defined.
fn whereabouts(object: &Object) -> String {
    match object.source() {
        Some(source) => format!("{} (from {}:{})", object.id(), source.file, source.line),
        None => object.id().to_string(),
    }
}

#[cfg(test)]
mod tests;
