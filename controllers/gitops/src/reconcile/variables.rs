//! The variables of `spec.postBuild`: inline ones and those from ConfigMaps and Secrets.

use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use kube::{Api, Client};
use serin_crds::flux::kustomize::{KustomizationSpec, SubstituteKind};
use serin_kustomize::substitute;

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
    let mut all = substitute::Variables::new();
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
                    all.add(&name, &value).map_err(|e| Error::Spec(e.to_string()))?;
                }
            }
            None if reference.optional == Some(true) => {}
            None => return Err(failed("not found; create it, or set optional: true".into())),
        }
    }
    for (name, value) in &post_build.substitute {
        all.add(name, value).map_err(|e| Error::Spec(e.to_string()))?;
    }
    Ok(Some(Variables(all.into_map())))
}
