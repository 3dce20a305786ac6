//! The variables of `spec.postBuild`: inline ones and those from ConfigMaps and Secrets.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use kube::{Api, Client};
use serin_crds::flux::kustomize::{KustomizationSpec, SubstituteKind};

use crate::build::Variables;
use crate::error::{Error, server_words};
use crate::key::Key;

/// Collects the variables; `None` without `postBuild`. Inline ones beat the others, later references beat earlier ones.
pub(crate) async fn resolve(
    client: &Client,
    key: &Key,
    spec: &KustomizationSpec,
) -> Result<Option<Variables>, Error> {
    let Some(post_build) = &spec.post_build else {
        return Ok(None);
    };
    let mut all = BTreeMap::new();
    for reference in &post_build.substitute_from {
        let kind = match reference.kind {
            SubstituteKind::Secret => "Secret",
            SubstituteKind::ConfigMap => "ConfigMap",
            SubstituteKind::Other(ref other) => {
                return Err(Error::Spec(format!(
                    "spec.postBuild.substituteFrom: kind '{other}' is not ConfigMap or Secret"
                )));
            }
        };
        let failed = |reason: String| Error::Referred {
            kind,
            namespace: key.namespace.clone(),
            name: reference.name.clone(),
            reason,
        };
        let values = match kind {
            "Secret" => {
                let api: Api<Secret> = Api::namespaced(client.clone(), &key.namespace);
                let found = api
                    .get_opt(&reference.name)
                    .await
                    .map_err(|e| failed(server_words(&e)))?;
                found.map(|secret| {
                    secret
                        .data
                        .unwrap_or_default()
                        .into_iter()
                        .map(|(k, v)| (k, String::from_utf8_lossy(&v.0).into_owned()))
                        .collect::<Vec<_>>()
                })
            }
            _ => {
                let api: Api<ConfigMap> = Api::namespaced(client.clone(), &key.namespace);
                let found = api
                    .get_opt(&reference.name)
                    .await
                    .map_err(|e| failed(server_words(&e)))?;
                found.map(|map| map.data.unwrap_or_default().into_iter().collect())
            }
        };
        match values {
            Some(values) => {
                for (name, value) in values {
                    insert(&mut all, name, &value)?;
                }
            }
            None if reference.optional == Some(true) => {}
            None => return Err(failed("not found; create it, or set optional: true".into())),
        }
    }
    for (name, value) in &post_build.substitute {
        insert(&mut all, name.clone(), value)?;
    }
    Ok(Some(Variables(all)))
}

/// Names as shells have them; line ends in values are removed, since one would break the YAML around it.
fn insert(all: &mut BTreeMap<String, String>, name: String, value: &str) -> Result<(), Error> {
    let good = name
        .bytes()
        .enumerate()
        .all(|(i, b)| b == b'_' || b.is_ascii_alphabetic() || (i > 0 && b.is_ascii_digit()));
    if !good || name.is_empty() {
        return Err(Error::Spec(format!(
            "'{name}' var name is invalid, must match '^[_[:alpha:]][_[:alpha:][:digit:]]*$'"
        )));
    }
    all.insert(name, value.replace('\n', ""));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_checked_and_line_ends_removed() {
        let mut all = BTreeMap::new();
        insert(&mut all, "_A1".into(), "a\nb\n").unwrap();
        assert_eq!(all["_A1"], "ab");
        for bad in ["1a", "a-b", "", "a.b"] {
            assert!(
                insert(&mut all, bad.into(), "")
                    .unwrap_err()
                    .to_string()
                    .contains("var name is invalid"),
                "{bad}"
            );
        }
    }
}
