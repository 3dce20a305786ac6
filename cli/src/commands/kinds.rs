//! The kinds that can be named on the command line, by their plural, singular, kind or short names.

use anyhow::bail;
use kube::core::{ApiResource, GroupVersionKind};

/// A kind as it can be typed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Kind {
    group: &'static str,
    version: &'static str,
    pub(crate) kind: &'static str,
    pub(crate) plural: &'static str,
    short: &'static [&'static str],
    pub(crate) namespaced: bool,
}

const fn kind(
    group: &'static str,
    version: &'static str,
    kind: &'static str,
    plural: &'static str,
    short: &'static [&'static str],
) -> Kind {
    Kind {
        group,
        version,
        kind,
        plural,
        short,
        namespaced: true,
    }
}

/// Every kind with conditions or phases that one may want to wait for.
pub(crate) const KINDS: &[Kind] = &[
    kind(
        "networking.istio.io",
        "v1",
        "VirtualService",
        "virtualservices",
        &["vs"],
    ),
    kind(
        "networking.istio.io",
        "v1",
        "DestinationRule",
        "destinationrules",
        &["dr"],
    ),
    kind("networking.istio.io", "v1", "Gateway", "gateways", &["gw"]),
    kind("flagger.app", "v1beta1", "Canary", "canaries", &["can"]),
    kind(
        "source.toolkit.fluxcd.io",
        "v1",
        "GitRepository",
        "gitrepositories",
        &["gitrepo"],
    ),
    kind(
        "kustomize.toolkit.fluxcd.io",
        "v1",
        "Kustomization",
        "kustomizations",
        &["ks"],
    ),
    kind(
        "notification.toolkit.fluxcd.io",
        "v1",
        "Receiver",
        "receivers",
        &[],
    ),
    kind("apps", "v1", "Deployment", "deployments", &["deploy"]),
    kind("apps", "v1", "ReplicaSet", "replicasets", &["rs"]),
    kind("", "v1", "Pod", "pods", &["po"]),
    kind("", "v1", "Service", "services", &["svc"]),
    Kind {
        namespaced: false,
        ..kind("", "v1", "Namespace", "namespaces", &["ns"])
    },
    Kind {
        namespaced: false,
        ..kind("", "v1", "Node", "nodes", &["no"])
    },
];

impl Kind {
    /// Finds a kind by any of its names.
    pub(crate) fn find(name: &str) -> anyhow::Result<Kind> {
        let name = name.to_lowercase();
        let found = KINDS.iter().find(|kind| {
            kind.plural == name || kind.kind.to_lowercase() == name || kind.short.contains(&name.as_str())
        });
        match found {
            Some(kind) => Ok(*kind),
            None => {
                let known: Vec<&str> = KINDS.iter().map(|kind| kind.plural).collect();
                bail!(
                    "{name:?} is not a kind that this command knows; it knows {}",
                    known.join(", ")
                )
            }
        }
    }

    /// How kube names it.
    pub(crate) fn resource(&self) -> ApiResource {
        let gvk = GroupVersionKind::gvk(self.group, self.version, self.kind);
        ApiResource::from_gvk_with_plural(&gvk, self.plural)
    }
}

/// Splits `vs/reviews` into its kind and its name.
pub(crate) fn parse_target(text: &str) -> anyhow::Result<(Kind, String)> {
    match text.split_once('/') {
        Some((kind, name)) if !name.is_empty() => Ok((Kind::find(kind)?, name.to_owned())),
        Some(_) | None => bail!("{text:?}: say kind and name, for example vs/reviews"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kind_is_found_by_all_of_its_names() {
        for name in ["vs", "virtualservice", "VirtualService", "virtualservices"] {
            assert_eq!(Kind::find(name).unwrap().kind, "VirtualService");
        }
        assert!(Kind::find("widget").unwrap_err().to_string().contains("canaries"));
    }

    #[test]
    fn a_target_is_a_kind_and_a_name() {
        let (kind, name) = parse_target("canary/podinfo").unwrap();
        assert_eq!((kind.plural, name.as_str()), ("canaries", "podinfo"));
        assert!(parse_target("podinfo").is_err());
        assert!(parse_target("vs/").is_err());
    }
}
