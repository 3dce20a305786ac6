//! Writing status: the difference only, against the newest state that we know of.
//!
//! A watch cache lags behind our own writes by a round trip. Who computed the next difference from the cache could
//! leave out what it must say, and who read the inventory from it could forget objects. [`StatusWriter::newest`] is
//! therefore the newer of what the watch and what the last write returned.

use std::collections::HashMap;
use std::fmt::Debug;
use std::sync::Arc;

use kube::api::{Api, Patch, PatchParams};
use kube::{Resource, ResourceExt};
use parking_lot::Mutex;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

use crate::error::Error;
use crate::key::Key;

/// The JSON merge patch (RFC 7386) that turns `old` into `new`; `None` when they are equal.
pub(crate) fn merge_difference(old: &Value, new: &Value) -> Option<Value> {
    if old == new {
        return None;
    }
    let (Value::Object(old), Value::Object(new)) = (old, new) else {
        return Some(new.clone());
    };
    let mut patch = Map::new();
    for key in old.keys().filter(|key| !new.contains_key(*key)) {
        patch.insert(key.clone(), Value::Null);
    }
    for (key, value) in new {
        match old.get(key) {
            Some(before) => {
                if let Some(difference) = merge_difference(before, value) {
                    patch.insert(key.clone(), difference);
                }
            }
            None => {
                patch.insert(key.clone(), value.clone());
            }
        }
    }
    Some(Value::Object(patch))
}

/// `metadata.resourceVersion` as a number; Kubernetes 1.35 declares them comparable, and every server of ours and
/// etcd-based ones always counted.
pub(crate) fn resource_version<K: ResourceExt>(object: &K) -> u64 {
    object
        .resource_version()
        .and_then(|v| v.parse().ok())
        .unwrap_or(0)
}

/// Writes the statuses of one kind.
pub(crate) struct StatusWriter<K> {
    client: kube::Client,
    field_manager: &'static str,
    written: Mutex<HashMap<Key, Arc<K>>>,
}

impl<K> StatusWriter<K>
where
    K: Resource<Scope = kube::core::NamespaceResourceScope> + Clone + Debug + Serialize + DeserializeOwned,
    K::DynamicType: Default,
{
    pub(crate) fn new(client: kube::Client, field_manager: &'static str) -> Self {
        Self {
            client,
            field_manager,
            written: Mutex::default(),
        }
    }

    /// The newer of the watched object and the last written one.
    pub(crate) fn newest(&self, watched: Arc<K>) -> Arc<K> {
        let key = Key::of(watched.as_ref());
        let mut written = self.written.lock();
        match written.get(&key) {
            Some(ours)
                if ours.uid() == watched.uid()
                    && resource_version(ours.as_ref()) > resource_version(watched.as_ref()) =>
            {
                ours.clone()
            }
            Some(_) => {
                written.remove(&key);
                watched
            }
            None => watched,
        }
    }

    /// Notes what a write of ours returned.
    pub(crate) fn note(&self, object: K) -> Arc<K> {
        let object = Arc::new(object);
        self.written
            .lock()
            .insert(Key::of(object.as_ref()), object.clone());
        object
    }

    pub(crate) fn forget(&self, key: &Key) {
        self.written.lock().remove(key);
    }

    /// Writes what differs between the statuses; nothing when nothing does. Returns the newest object.
    pub(crate) async fn write<S: Serialize>(
        &self,
        object: &Arc<K>,
        old: &S,
        new: &S,
    ) -> Result<Arc<K>, Error> {
        let key = Key::of(object.as_ref());
        let name = || format!("{} {key}", K::kind(&K::DynamicType::default()));
        let encode = |status: &S| {
            serde_json::to_value(status).map_err(|source| {
                Error::Kit(serin_kit::Error::Encode {
                    object: name(),
                    source,
                })
            })
        };
        let Some(difference) = merge_difference(&encode(old)?, &encode(new)?) else {
            return Ok(object.clone());
        };
        let api: Api<K> = Api::namespaced(self.client.clone(), &key.namespace);
        let params = PatchParams {
            field_manager: Some(self.field_manager.into()),
            ..Default::default()
        };
        let written = api
            .patch_status(&key.name, &params, &Patch::Merge(json!({ "status": difference })))
            .await
            .map_err(|e| Error::api(format!("write the status of {}", name()), e))?;
        Ok(self.note(written))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn merge(target: &mut Value, patch: &Value) {
        let Value::Object(patch) = patch else {
            *target = patch.clone();
            return;
        };
        if !target.is_object() {
            *target = json!({});
        }
        let Some(target) = target.as_object_mut() else {
            return;
        };
        for (key, value) in patch {
            if value.is_null() {
                target.remove(key);
            } else {
                merge(target.entry(key.clone()).or_insert(Value::Null), value);
            }
        }
    }

    fn tree() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            any::<bool>().prop_map(Value::from),
            "[a-c]{0,2}".prop_map(Value::from),
            Just(json!([1, {"x": 2}]))
        ];
        let any = leaf.prop_recursive(3, 24, 4, |inner| {
            proptest::collection::btree_map("[a-d]", inner, 0..4)
                .prop_map(|m| Value::Object(m.into_iter().collect()))
        });
        proptest::collection::btree_map("[a-d]", any, 0..4)
            .prop_map(|m| Value::Object(m.into_iter().collect()))
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(128))]

        #[test]
        fn the_difference_merged_into_the_old_status_is_the_new_status(old in tree(), new in tree()) {
            let mut patched = old.clone();
            match merge_difference(&old, &new) {
                Some(patch) => merge(&mut patched, &patch),
                None => prop_assert_eq!(&old, &new),
            }
            prop_assert_eq!(patched, new);
        }
    }
}
