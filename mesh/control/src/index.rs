//! Watches → model changes: one cache per kind, all feeding one bounded queue.
//!
//! [`Index`] is the pure part: it knows which objects of each kind were told, so that a resync (which may have missed deletions) becomes
//! exact deletions. [`watch`] is the shell around the shared caches of `serin-kit`.
//!
//! Nothing is translated before every kind has been listed once ([`Event::Synced`]): a half-read world would take routes
//! away from proxies that still need them.

use std::collections::BTreeMap;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Node, Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::Client;
use kube::api::Api;
use serin_crds::istio::{DestinationRule, Gateway, ServiceEntry, Sidecar, VirtualService};
use serin_kit::cache::{self, Cache};
use serin_model::{Change, Kind, Object, ObjectKey};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

mod shell;

pub use shell::{Event, WatchError, watch};

/// What has been told about which objects: their keys and `resourceVersion`s.
#[derive(Debug, Default)]
pub struct Index {
    known: BTreeMap<Kind, BTreeMap<ObjectKey, Option<String>>>,
}

impl Index {
    /// An object exists and looks like this.
    pub fn apply(&mut self, object: Object) -> Change {
        let key = object.key();
        self.known
            .entry(key.kind)
            .or_default()
            .insert(key, object.resource_version().map(str::to_owned));
        Change::Apply(object)
    }

    /// An object is gone; nothing to tell if it was never there.
    pub fn delete(&mut self, key: ObjectKey) -> Option<Change> {
        self.known
            .get_mut(&key.kind)?
            .remove(&key)
            .map(|_| Change::Delete(key))
    }

    /// These are all objects of a kind: whatever else was known is gone, and what has not changed since it was told is left out.
    pub fn reset(&mut self, kind: Kind, objects: Vec<Object>) -> Vec<Change> {
        let before = self.known.remove(&kind).unwrap_or_default();
        let mut changes = Vec::new();
        let mut now = BTreeMap::new();
        for object in objects {
            let (key, version) = (object.key(), object.resource_version().map(str::to_owned));
            let told = version.is_some() && before.get(&key) == Some(&version);
            now.insert(key, version);
            if !told {
                changes.push(Change::Apply(object));
            }
        }
        let gone = before
            .into_keys()
            .filter(|key| !now.contains_key(key))
            .map(Change::Delete);
        let changes = gone.chain(changes).collect();
        self.known.insert(kind, now);
        changes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn service(name: &str) -> Object {
        let mut service = Service::default();
        service.metadata.name = Some(name.into());
        service.metadata.namespace = Some("a".into());
        Object::Service(Arc::new(service))
    }

    fn told(changes: &[Change]) -> Vec<String> {
        changes
            .iter()
            .map(|change| match change {
                Change::Apply(object) => format!("+{}", object.key().name),
                Change::Delete(key) => format!("-{}", key.name),
            })
            .collect()
    }

    #[test]
    fn a_reset_deletes_what_is_not_in_it() {
        let mut index = Index::default();
        index.apply(service("one"));
        index.apply(service("two"));
        let changes = index.reset(Kind::Service, vec![service("two"), service("three")]);
        assert_eq!(told(&changes), ["-one", "+two", "+three"]);
    }

    #[test]
    fn a_reset_leaves_out_what_has_not_changed() {
        let versioned = |version: &str| {
            let mut service = Service::default();
            service.metadata.name = Some("one".into());
            service.metadata.resource_version = Some(version.into());
            Object::Service(Arc::new(service))
        };
        let mut index = Index::default();
        index.apply(versioned("1"));
        assert!(index.reset(Kind::Service, vec![versioned("1")]).is_empty());
        assert_eq!(told(&index.reset(Kind::Service, vec![versioned("2")])), ["+one"]);
    }

    #[test]
    fn deleting_what_was_never_told_says_nothing() {
        let mut index = Index::default();
        assert!(index.delete(service("one").key()).is_none());
        index.apply(service("one"));
        assert!(index.delete(service("one").key()).is_some());
        assert!(index.delete(service("one").key()).is_none());
    }

    #[test]
    fn a_reset_of_one_kind_leaves_the_others_alone() {
        let mut index = Index::default();
        index.apply(service("one"));
        assert!(index.reset(Kind::Pod, Vec::new()).is_empty());
        assert!(index.delete(service("one").key()).is_some());
    }
}
