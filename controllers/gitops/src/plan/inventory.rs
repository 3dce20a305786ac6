//! The inventory: what a Kustomization has applied, in Flux's compact form.

use serin_crds::flux::kustomize::{ResourceInventory, ResourceRef};

use crate::key::{ObjectId, group_version};

/// `<namespace>_<name>_<group>_<kind>`. Names of RBAC objects may have colons, which are written as `__`.
pub(crate) fn entry(id: &ObjectId, api_version: &str) -> ResourceRef {
    ResourceRef {
        id: format!(
            "{}_{}_{}_{}",
            id.namespace,
            id.name.replace(':', "__"),
            id.group,
            id.kind
        ),
        v: group_version(api_version).1.to_string(),
    }
}

/// Reads an entry; `None` when it is not one. Namespaces, groups and kinds have no underscore.
pub(crate) fn parse(entry: &ResourceRef) -> Option<(ObjectId, String)> {
    let (namespace, rest) = entry.id.split_once('_')?;
    let (rest, kind) = rest.rsplit_once('_')?;
    let (name, group) = rest.rsplit_once('_')?;
    if name.is_empty() || kind.is_empty() {
        return None;
    }
    let api_version = if group.is_empty() {
        entry.v.clone()
    } else {
        format!("{group}/{}", entry.v)
    };
    let id = ObjectId {
        group: group.into(),
        kind: kind.into(),
        namespace: namespace.into(),
        name: name.replace("__", ":"),
    };
    Some((id, api_version))
}

/// The objects of an inventory; entries that cannot be read are left out.
pub(crate) fn objects(inventory: Option<&ResourceInventory>) -> Vec<(ObjectId, String)> {
    inventory
        .map(|i| i.entries.iter().filter_map(parse).collect())
        .unwrap_or_default()
}

/// The inventory of these objects: sorted, each once (the first version given wins).
pub(crate) fn of<'a>(objects: impl IntoIterator<Item = (&'a ObjectId, &'a str)>) -> ResourceInventory {
    let mut entries: Vec<ResourceRef> = objects
        .into_iter()
        .map(|(id, version)| entry(id, version))
        .collect();
    // Stable: of two versions of one object the first stays.
    entries.sort_by(|a, b| a.id.cmp(&b.id));
    entries.dedup_by(|later, first| later.id == first.id);
    ResourceInventory { entries }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn entries_look_as_flux_writes_them() {
        let deployment = ObjectId {
            group: "apps".into(),
            kind: "Deployment".into(),
            namespace: "prod".into(),
            name: "web".into(),
        };
        assert_eq!(
            entry(&deployment, "apps/v1"),
            ResourceRef {
                id: "prod_web_apps_Deployment".into(),
                v: "v1".into()
            }
        );
        let role = ObjectId {
            group: "rbac.authorization.k8s.io".into(),
            kind: "ClusterRole".into(),
            namespace: String::new(),
            name: "system:x".into(),
        };
        assert_eq!(
            entry(&role, "rbac.authorization.k8s.io/v1").id,
            "_system__x_rbac.authorization.k8s.io_ClusterRole"
        );
        assert_eq!(
            parse(&ResourceRef {
                id: "nonsense".into(),
                v: "v1".into()
            }),
            None
        );
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn what_is_written_is_read_back(
            namespace in "[a-z0-9-]{0,8}", name in "[a-z0-9.-]{1,8}(:[a-z]{1,3})?", group in "([a-z]{1,5}\\.[a-z]{1,3})?", kind in "[A-Z][A-Za-z]{0,8}",
        ) {
            let id = ObjectId { group: group.clone(), kind, namespace, name };
            let version = if group.is_empty() { "v1".to_string() } else { format!("{group}/v1") };
            prop_assert_eq!(parse(&entry(&id, &version)), Some((id, version)));
        }
    }
}
