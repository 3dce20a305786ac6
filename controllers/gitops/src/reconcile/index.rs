//! Who is affected by what: from sources, dependencies and configuration to Kustomizations. Kept up to date by single
//! changes; no lookup goes through all objects.

use std::collections::{BTreeSet, HashMap};

use serin_crds::flux::kustomize::{Kustomization, SourceKind, SubstituteKind};

use crate::key::Key;

/// What a Kustomization refers to.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Refers {
    Source(Key),
    Dependency(Key),
    ConfigMap(Key),
    Secret(Key),
}

/// The index.
#[derive(Debug, Default)]
pub(crate) struct Index {
    referring: HashMap<Refers, BTreeSet<Key>>,
    of: HashMap<Key, BTreeSet<Refers>>,
}

/// The source of a Kustomization.
pub(crate) fn source_of(key: &Key, ks: &Kustomization) -> Key {
    let reference = &ks.spec.source_ref;
    Key::new(
        reference
            .namespace
            .clone()
            .unwrap_or_else(|| key.namespace.clone()),
        reference.name.clone(),
    )
}

/// The dependencies of a Kustomization, in order.
pub(crate) fn dependencies_of(key: &Key, ks: &Kustomization) -> Vec<Key> {
    ks.spec
        .depends_on
        .iter()
        .map(|d| {
            Key::new(
                d.namespace.clone().unwrap_or_else(|| key.namespace.clone()),
                d.name.clone(),
            )
        })
        .collect()
}

impl Index {
    pub(crate) fn apply(&mut self, key: &Key, ks: &Kustomization) {
        let mut refers = BTreeSet::new();
        if ks.spec.source_ref.kind == SourceKind::GitRepository {
            refers.insert(Refers::Source(source_of(key, ks)));
        }
        refers.extend(dependencies_of(key, ks).into_iter().map(Refers::Dependency));
        if let Some(secret) = ks.spec.decryption.as_ref().and_then(|d| d.secret_ref.as_ref()) {
            refers.insert(Refers::Secret(Key::new(
                key.namespace.clone(),
                secret.name.clone(),
            )));
        }
        for reference in ks.spec.post_build.iter().flat_map(|p| &p.substitute_from) {
            let object = Key::new(key.namespace.clone(), reference.name.clone());
            refers.insert(if reference.kind == SubstituteKind::Secret {
                Refers::Secret(object)
            } else {
                Refers::ConfigMap(object)
            });
        }
        if self.of.get(key) == Some(&refers) {
            return;
        }
        self.delete(key);
        for reference in &refers {
            self.referring
                .entry(reference.clone())
                .or_default()
                .insert(key.clone());
        }
        self.of.insert(key.clone(), refers);
    }

    pub(crate) fn delete(&mut self, key: &Key) {
        for reference in self.of.remove(key).unwrap_or_default() {
            if let Some(keys) = self.referring.get_mut(&reference) {
                keys.remove(key);
                if keys.is_empty() {
                    self.referring.remove(&reference);
                }
            }
        }
    }

    pub(crate) fn referring_to(&self, what: &Refers) -> Vec<Key> {
        self.referring
            .get(what)
            .map(|keys| keys.iter().cloned().collect())
            .unwrap_or_default()
    }

    /// A way from `key` along dependencies back to itself, if there is one: `[key, …, key]`.
    pub(crate) fn cycle_through(&self, key: &Key) -> Option<Vec<Key>> {
        let dependencies = |k: &Key| -> Vec<Key> {
            self.of
                .get(k)
                .into_iter()
                .flatten()
                .filter_map(|r| {
                    if let Refers::Dependency(d) = r {
                        Some(d.clone())
                    } else {
                        None
                    }
                })
                .collect()
        };
        let mut came_from: HashMap<Key, Key> = HashMap::new();
        let mut todo = vec![key.clone()];
        while let Some(at) = todo.pop() {
            for next in dependencies(&at) {
                if next == *key {
                    let mut path = vec![key.clone()];
                    let mut back = at;
                    while back != *key {
                        path.push(back.clone());
                        back = came_from.get(&back)?.clone();
                    }
                    path.push(key.clone());
                    path.reverse();
                    return Some(path);
                }
                if !came_from.contains_key(&next) {
                    came_from.insert(next.clone(), at.clone());
                    todo.push(next);
                }
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serin_crds::flux::kustomize::{
        CrossNamespaceSourceReference, DependencyReference, KustomizationSpec,
    };

    fn ks(source: &str, depends_on: &[&str]) -> Kustomization {
        let spec = KustomizationSpec {
            source_ref: CrossNamespaceSourceReference {
                kind: SourceKind::GitRepository,
                name: source.into(),
                ..Default::default()
            },
            depends_on: depends_on
                .iter()
                .map(|n| DependencyReference {
                    name: (*n).into(),
                    ..Default::default()
                })
                .collect(),
            ..Default::default()
        };
        Kustomization::new("x", spec)
    }

    fn key(name: &str) -> Key {
        Key::new("ns", name)
    }

    #[test]
    fn references_follow_every_change_of_an_object() {
        let mut index = Index::default();
        index.apply(&key("a"), &ks("repo", &["b"]));
        index.apply(&key("c"), &ks("repo", &[]));
        assert_eq!(
            index.referring_to(&Refers::Source(key("repo"))),
            [key("a"), key("c")]
        );
        assert_eq!(index.referring_to(&Refers::Dependency(key("b"))), [key("a")]);
        index.apply(&key("a"), &ks("other", &[]));
        assert_eq!(index.referring_to(&Refers::Source(key("repo"))), [key("c")]);
        assert!(index.referring_to(&Refers::Dependency(key("b"))).is_empty());
        index.delete(&key("c"));
        assert!(index.referring_to(&Refers::Source(key("repo"))).is_empty());
    }

    #[test]
    fn a_cycle_of_dependencies_is_found_and_told_as_a_path() {
        let mut index = Index::default();
        index.apply(&key("a"), &ks("r", &["b", "x"]));
        index.apply(&key("b"), &ks("r", &["c"]));
        index.apply(&key("c"), &ks("r", &["a"]));
        index.apply(&key("x"), &ks("r", &["b"]));
        let path = index.cycle_through(&key("a")).unwrap();
        assert_eq!(path.first(), path.last());
        assert!(path.len() >= 4, "{path:?}");
        assert_eq!(
            index.cycle_through(&key("x")).map(|p| p.len()),
            Some(5),
            "x needs b, c, a, and a needs x"
        );
        index.apply(&key("a"), &ks("r", &[]));
        assert_eq!(index.cycle_through(&key("b")), None);
        index.apply(&key("d"), &ks("r", &["d"]));
        assert_eq!(index.cycle_through(&key("d")), Some(vec![key("d"), key("d")]));
    }
}
