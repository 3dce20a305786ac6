//! The keys that `spec.decryption` names.

use k8s_openapi::api::core::v1::Secret;
use kube::{Api, Client};
use serin_crds::flux::kustomize::KustomizationSpec;

use crate::build::decryption::Decryption;
use crate::error::{Error, server_words};
use crate::key::Key;

/// Reads the keys; `None` without `spec.decryption`. Without `secretRef` there are none, and what is encrypted is refused.
pub(crate) async fn resolve(
    client: &Client,
    key: &Key,
    spec: &KustomizationSpec,
) -> Result<Option<Decryption>, Error> {
    let Some(decryption) = &spec.decryption else {
        return Ok(None);
    };
    let Some(reference) = &decryption.secret_ref else {
        return Ok(Some(Decryption::default()));
    };
    let failed = |reason: String| Error::Referred {
        kind: "Secret",
        namespace: key.namespace.clone(),
        name: reference.name.clone(),
        reason,
    };
    let api: Api<Secret> = Api::namespaced(client.clone(), &key.namespace);
    let found = api
        .get_opt(&reference.name)
        .await
        .map_err(|e| failed(server_words(&e)))?
        .ok_or_else(|| failed("not found; create it with the keys that spec.decryption needs".into()))?;
    let data = found.data.unwrap_or_default();
    Decryption::from_secret(
        data.iter()
            .map(|(name, value)| (name.as_str(), value.0.as_slice())),
    )
    .map(Some)
    .map_err(failed)
}
