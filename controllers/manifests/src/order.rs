//! In which order objects are printed and applied.

use std::cmp::Ordering;

use crate::object::{Id, Object};

/// Kinds that kustomize's `legacy` order puts first, in this order.
pub const LEGACY_FIRST: [&str; 22] = [
    "Namespace",
    "ResourceQuota",
    "StorageClass",
    "CustomResourceDefinition",
    "ServiceAccount",
    "PodSecurityPolicy",
    "Role",
    "ClusterRole",
    "RoleBinding",
    "ClusterRoleBinding",
    "ConfigMap",
    "Secret",
    "Endpoints",
    "Service",
    "LimitRange",
    "PriorityClass",
    "PersistentVolume",
    "PersistentVolumeClaim",
    "Deployment",
    "StatefulSet",
    "CronJob",
    "PodDisruptionBudget",
];

/// Kinds that kustomize's `legacy` order puts last.
pub const LEGACY_LAST: [&str; 2] = ["MutatingWebhookConfiguration", "ValidatingWebhookConfiguration"];

/// Flux's order: what others need comes first. Every kind that ends in `Class` stands where `CLASSES` is.
const APPLY_FIRST: [&str; 19] = [
    "CustomResourceDefinition",
    "Namespace",
    "ClusterRole",
    CLASSES,
    "ClusterRoleBinding",
    "ResourceQuota",
    "ServiceAccount",
    "Role",
    "RoleBinding",
    "ConfigMap",
    "Secret",
    "Service",
    "LimitRange",
    "PersistentVolume",
    "PersistentVolumeClaim",
    "Deployment",
    "StatefulSet",
    "CronJob",
    "PodDisruptionBudget",
];
const CLASSES: &str = "…Class";

/// Groups of objects that are applied one after the other; each must be established before the next starts.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Hash)]
pub enum Stage {
    /// Definitions of kinds, namespaces, cluster roles (what others refer to or aggregate).
    Definitions,
    /// Classes (storage, gateways, priorities) that others name.
    Classes,
    /// All the rest.
    Resources,
}

/// The stage of an object.
pub fn stage(object: &Object) -> Stage {
    match object.kind() {
        "CustomResourceDefinition" | "Namespace" | "ClusterRole" => Stage::Definitions,
        kind if kind.ends_with("Class") => Stage::Classes,
        _ => Stage::Resources,
    }
}

/// Sorts objects into the order in which they are applied: by stage, then by kind, then by namespace and name.
/// The sort is stable.
pub fn sort_for_apply(objects: &mut [Object]) {
    objects.sort_by_cached_key(|o| {
        let id = o.id();
        (
            stage(o),
            apply_rank(&id.kind),
            id.group,
            id.kind,
            id.namespace,
            id.name,
        )
    });
}

fn apply_rank(kind: &str) -> i32 {
    let kind = if kind.ends_with("Class") { CLASSES } else { kind };
    if let Some(i) = APPLY_FIRST.iter().position(|k| *k == kind) {
        return i as i32 - APPLY_FIRST.len() as i32;
    }
    LEGACY_LAST
        .iter()
        .position(|k| *k == kind)
        .map_or(0, |i| i as i32 + 1)
}

/// The rank of a kind in a `legacy` order with the given lists: negative for first, positive for last, 0 for all else.
pub fn legacy_rank<S: AsRef<str>>(kind: &str, first: &[S], last: &[S]) -> i32 {
    // A kind named twice has its last place, and "last" wins over "first".
    if let Some(i) = last.iter().rposition(|k| k.as_ref() == kind) {
        return i as i32 + 1;
    }
    first
        .iter()
        .rposition(|k| k.as_ref() == kind)
        .map_or(0, |i| i as i32 - first.len() as i32)
}

/// Compares by kustomize's `legacy` order, given the ranks of both kinds.
pub fn compare_legacy(a: &Id, a_rank: i32, b: &Id, b_rank: i32) -> Ordering {
    let same_gvk = a.group == b.group && a.version == b.version && a.kind == b.kind;
    if same_gvk {
        return or(&a.namespace, "~X")
            .bytes()
            .chain(*b"|")
            .chain(or(&a.name, "~N").bytes())
            .cmp(
                or(&b.namespace, "~X")
                    .bytes()
                    .chain(*b"|")
                    .chain(or(&b.name, "~N").bytes()),
            );
    }
    if a_rank != b_rank {
        return a_rank.cmp(&b_rank);
    }
    let order = gvk_text(a).cmp(gvk_text(b));
    // A Namespace of the core group comes before one of any other group.
    if a.kind == "Namespace" && b.kind == "Namespace" && (a.group.is_empty() || b.group.is_empty()) {
        return order.reverse();
    }
    order
}

fn or<'a>(text: &'a str, empty: &'a str) -> &'a str {
    if text.is_empty() { empty } else { text }
}

fn gvk_text(id: &Id) -> impl Iterator<Item = u8> + '_ {
    or(&id.group, "~G")
        .bytes()
        .chain(*b"_")
        .chain(or(&id.version, "~V").bytes())
        .chain(*b"_")
        .chain(or(&id.kind, "~K").bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::object::parse_documents;

    #[test]
    fn definitions_come_before_what_uses_them() {
        let text = "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: a, namespace: x}\n---\n\
                    apiVersion: v1\nkind: Namespace\nmetadata: {name: x}\n---\n\
                    apiVersion: gateway.networking.k8s.io/v1\nkind: GatewayClass\nmetadata: {name: g}\n---\n\
                    apiVersion: apiextensions.k8s.io/v1\nkind: CustomResourceDefinition\nmetadata: {name: d}\n";
        let mut objects = parse_documents(text, "f.yaml").unwrap();
        sort_for_apply(&mut objects);
        let kinds: Vec<&str> = objects.iter().map(Object::kind).collect();
        assert_eq!(
            kinds,
            [
                "CustomResourceDefinition",
                "Namespace",
                "GatewayClass",
                "Deployment"
            ]
        );
    }
}
