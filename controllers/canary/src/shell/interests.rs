//! Which Canaries an object concerns. An event costs one look-up, however many Canaries there are.

use std::collections::{BTreeSet, HashMap};

use parking_lot::Mutex;

use super::Key;

/// What kind of object an interest is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Kind {
    Deployment,
    /// A Deployment, as the target that is rolled out. Two Canaries with the same one are rivals.
    Target,
    Service,
    Route,
    Rule,
    ConfigMap,
    Secret,
    /// Endpoints, by the name of their Service.
    Endpoints,
}

/// An object in the Canary's own namespace.
pub(crate) type Interest = (Kind, String);

#[derive(Default)]
struct Tables {
    by_object: HashMap<(Kind, String, String), BTreeSet<Key>>,
    by_canary: HashMap<Key, BTreeSet<Interest>>,
}

#[derive(Default)]
pub(crate) struct Interests {
    tables: Mutex<Tables>,
}

impl Interests {
    /// Says what a Canary looks at. Replaces what it said before.
    pub(crate) fn set(&self, key: &Key, interests: BTreeSet<Interest>) {
        let mut tables = self.tables.lock();
        if tables.by_canary.get(key) == Some(&interests) {
            return;
        }
        tables.remove(key);
        for (kind, name) in &interests {
            tables
                .by_object
                .entry((*kind, key.namespace.clone(), name.clone()))
                .or_default()
                .insert(key.clone());
        }
        tables.by_canary.insert(key.clone(), interests);
    }

    pub(crate) fn forget(&self, key: &Key) {
        self.tables.lock().remove(key);
    }

    /// The Canaries that look at an object.
    pub(crate) fn concerned(&self, kind: Kind, namespace: &str, name: &str) -> Vec<Key> {
        self.tables
            .lock()
            .by_object
            .get(&(kind, namespace.to_owned(), name.to_owned()))
            .map(|keys| keys.iter().cloned().collect())
            .unwrap_or_default()
    }
}

impl Tables {
    fn remove(&mut self, key: &Key) {
        for (kind, name) in self.by_canary.remove(key).unwrap_or_default() {
            let object = (kind, key.namespace.clone(), name);
            if let Some(keys) = self.by_object.get_mut(&object) {
                keys.remove(key);
                if keys.is_empty() {
                    self.by_object.remove(&object);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_object_concerns_those_who_look_at_it_now_and_nobody_else() {
        let key = |name: &str| Key {
            namespace: "ns".to_owned(),
            name: name.to_owned(),
        };
        let interests = Interests::default();
        interests.set(&key("a"), [(Kind::Service, "web".to_owned())].into());
        interests.set(&key("b"), [(Kind::Service, "web".to_owned())].into());
        assert_eq!(
            interests.concerned(Kind::Service, "ns", "web"),
            [key("a"), key("b")]
        );
        assert!(interests.concerned(Kind::Service, "other", "web").is_empty());
        interests.set(&key("a"), [(Kind::Secret, "s".to_owned())].into());
        interests.forget(&key("b"));
        assert!(interests.concerned(Kind::Service, "ns", "web").is_empty());
        assert_eq!(interests.concerned(Kind::Secret, "ns", "s"), [key("a")]);
    }
}
