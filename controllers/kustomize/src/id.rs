//! Identity of a resource inside a build: group, version, kind, name, namespace, and how two of them compare.

use std::fmt;

use serin_manifests::split_api_version;

/// Group, version and kind. As a selector, an empty part means "any".
#[derive(Clone, PartialEq, Eq, Hash, Debug, Default, PartialOrd, Ord)]
pub(crate) struct Gvk {
    /// API group; empty for the core group, or for "any" in a selector.
    pub group: String,
    /// API version.
    pub version: String,
    /// Kind.
    pub kind: String,
}

impl Gvk {
    /// From `apiVersion` and `kind` of an object.
    pub(crate) fn of(api_version: &str, kind: &str) -> Gvk {
        let (group, version) = split_api_version(api_version);
        Gvk {
            group: group.into(),
            version: version.into(),
            kind: kind.into(),
        }
    }

    /// Whether a selector with empty parts as wildcards selects this.
    pub(crate) fn is_selected_by(&self, selector: &Gvk) -> bool {
        selects(selector, &self.group, &self.version, &self.kind)
    }
}

/// Whether a selector selects the given group, version and kind.
pub(crate) fn selects(selector: &Gvk, group: &str, version: &str, kind: &str) -> bool {
    (selector.group.is_empty() || selector.group == group)
        && (selector.version.is_empty() || selector.version == version)
        && (selector.kind.is_empty() || selector.kind == kind)
}

impl fmt::Display for Gvk {
    /// `Deployment.v1.apps`, `ConfigMap.v1.[noGrp]`: the form that users of kustomize search for.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let or = |s: &str, none: &'static str| {
            if s.is_empty() {
                none.to_owned()
            } else {
                s.to_owned()
            }
        };
        write!(
            f,
            "{}.{}.{}",
            or(&self.kind, "[noKind]"),
            or(&self.version, "[noVer]"),
            or(&self.group, "[noGrp]")
        )
    }
}

/// The namespace that stands for "none" in identities of cluster-scoped objects.
pub(crate) const NOT_A_NAMESPACE: &str = "_non_namespaceable_";

/// An identity. `namespace` is as written; compare by [`ResId::effective_namespace`].
#[derive(Clone, Debug, Default)]
pub(crate) struct ResId {
    /// Group, version, kind.
    pub gvk: Gvk,
    /// Name.
    pub name: String,
    /// Namespace as written.
    pub namespace: String,
    /// Known to be cluster-scoped.
    pub cluster_scoped: bool,
}

impl ResId {
    /// The namespace that counts: `default` when none is set, a name that no namespace has for cluster-scoped kinds.
    pub(crate) fn effective_namespace(&self) -> &str {
        effective_namespace(&self.namespace, self.cluster_scoped)
    }

    /// Same group, version, kind and name.
    pub(crate) fn gvkn_equals(&self, other: &ResId) -> bool {
        self.name == other.name && self.gvk == other.gvk
    }

    /// Same object.
    pub(crate) fn equals(&self, other: &ResId) -> bool {
        self.effective_namespace() == other.effective_namespace() && self.gvkn_equals(other)
    }

    /// Whether a selector selects it: empty parts are wildcards, nothing is a pattern.
    pub(crate) fn is_selected_by(&self, selector: &ResId) -> bool {
        (selector.name.is_empty() || selector.name == self.name)
            && (selector.namespace.is_empty() || selector.effective_namespace() == self.effective_namespace())
            && self.gvk.is_selected_by(&selector.gvk)
    }

    /// Whether nothing is set.
    pub(crate) fn is_empty(&self) -> bool {
        self.gvk == Gvk::default() && self.name.is_empty() && self.namespace.is_empty()
    }
}

pub(crate) fn effective_namespace(namespace: &str, cluster_scoped: bool) -> &str {
    if cluster_scoped {
        NOT_A_NAMESPACE
    } else if namespace.is_empty() {
        "default"
    } else {
        namespace
    }
}

impl fmt::Display for ResId {
    /// `Deployment.v1.apps/web.[noNs]`
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = if self.name.is_empty() {
            "[noName]"
        } else {
            &self.name
        };
        let ns = if self.namespace.is_empty() {
            "[noNs]"
        } else {
            &self.namespace
        };
        write!(f, "{}/{}.{}", self.gvk, name, ns)
    }
}
