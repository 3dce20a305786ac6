//! Fields of a Kustomization that are read and not honoured, each with what follows from it.

use serin_crds::flux::kustomize::{DecryptionProvider, KustomizationSpec, SourceKind};
use serin_kit::unhonoured::Field;

/// The fields of `spec` that are set and not acted on.
pub(crate) fn fields(spec: &KustomizationSpec) -> Vec<Field> {
    let mut fields = Vec::new();
    if spec.source_ref.kind != SourceKind::GitRepository {
        fields.push(Field::refused(
            "spec.sourceRef.kind",
            format!(
                "sources of kind {} are not served yet; use a GitRepository",
                spec.source_ref.kind
            ),
        ));
    }
    if let Some(decryption) = &spec.decryption {
        if decryption.provider != DecryptionProvider::Sops {
            fields.push(Field::refused(
                "spec.decryption.provider",
                format!("'{}' is not known; use sops", decryption.provider),
            ));
        }
        if decryption.service_account_name.is_some() {
            fields.push(Field::refused(
                "spec.decryption.serviceAccountName",
                "cloud key services are not served; encrypt for an age recipient and name its key in spec.decryption.secretRef",
            ));
        }
    }
    if spec.kube_config.is_some() {
        fields.push(Field::refused(
            "spec.kubeConfig",
            "other clusters are not served yet; run Serin in that cluster",
        ));
    }
    if spec.service_account_name.is_some() {
        fields.push(Field::refused("spec.serviceAccountName", "impersonation is not there yet, and applying with more rights than asked for would be wrong; remove it to apply with the controller's rights"));
    }
    if !spec.ignore.is_empty() {
        fields.push(Field::refused("spec.ignore", "excluding fields from an apply is not there yet; leave the fields out of the manifests, or annotate the object with kustomize.toolkit.fluxcd.io/ssa: Merge"));
    }
    fields
}

#[cfg(test)]
mod tests {
    use super::*;
    use serin_crds::flux::kustomize::{
        CrossNamespaceSourceReference, Decryption, IgnoreRule, KubeConfigReference,
    };
    use serin_kit::unhonoured;

    #[test]
    fn what_would_act_otherwise_than_asked_is_refused_by_name() {
        let mut spec = KustomizationSpec {
            source_ref: CrossNamespaceSourceReference {
                kind: SourceKind::GitRepository,
                ..Default::default()
            },
            ..Default::default()
        };
        assert!(fields(&spec).is_empty());
        spec.decryption = Some(Decryption::default());
        assert!(fields(&spec).is_empty());
        spec.decryption = Some(Decryption {
            provider: DecryptionProvider::Other("vault".into()),
            service_account_name: Some("kms".into()),
            ..Default::default()
        });
        spec.kube_config = Some(KubeConfigReference::default());
        spec.service_account_name = Some("tenant".into());
        spec.ignore = vec![IgnoreRule::default()];
        spec.source_ref.kind = SourceKind::OciRepository;
        let fields = fields(&spec);
        assert_eq!(fields.len(), 6);
        assert!(unhonoured::refuses(&fields));
        assert!(unhonoured::message(&fields).contains("OCIRepository"));
    }
}
