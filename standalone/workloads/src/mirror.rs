//! A watched kind in memory, ordered by namespace and name, that also knows our own writes.
//!
//! kit's cache lags behind a write until its event comes back; a controller that counts pods would create one twice.
//! Here the answer of a write is [noted](Mirror::note) at once, and an event with an older resourceVersion does not
//! take it back. That replaces the expectations that Kubernetes' controllers keep, and needs resourceVersions that can
//! be compared as numbers, which Kubernetes guarantees since 1.35 and our API server always does.

use std::collections::{BTreeMap, VecDeque};
use std::fmt::Debug;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use kube::runtime::WatchStreamExt;
use kube::runtime::utils::Backoff;
use kube::runtime::watcher::{self, Event};
use kube::{Api, Resource, ResourceExt};
use parking_lot::RwLock;
use serde::de::DeserializeOwned;
use tokio::sync::{broadcast, watch};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

pub(crate) use serin_kit::cache::Change;

use crate::Error;

/// How many changes a listener may lag behind before it is told to look at everything.
const BACKLOG: usize = 4096;
/// How many deleted objects are remembered, so that a late note of one does not bring it back.
const TOMBSTONES: usize = 1024;

/// Namespace and name; the namespace is empty for cluster-scoped kinds.
pub(crate) type Key = (String, String);

struct State<K> {
    objects: BTreeMap<Key, Arc<K>>,
    /// uid and the resourceVersion of its end.
    deleted: VecDeque<String>,
}

struct Inner<K> {
    state: RwLock<State<K>>,
    changes: broadcast::Sender<Change<K>>,
    ready: watch::Sender<bool>,
}

/// A watched kind. Cloning shares the watch.
pub(crate) struct Mirror<K>(Arc<Inner<K>>);

impl<K> Clone for Mirror<K> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

/// Key of an object.
pub(crate) fn key<K: ResourceExt>(object: &K) -> Key {
    (object.namespace().unwrap_or_default(), object.name_any())
}

fn version<K: ResourceExt>(object: &K) -> Option<u64> {
    object.resource_version().and_then(|version| version.parse().ok())
}

/// Retries from 20 ms to half a second: the API server is on this machine, and while it is away nothing else is to do.
#[derive(Debug, Default)]
struct LocalBackoff {
    step: u32,
}

impl Iterator for LocalBackoff {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        let delay = Duration::from_millis(20 << self.step.min(5)).min(Duration::from_millis(500));
        self.step += 1;
        Some(delay)
    }
}

impl Backoff for LocalBackoff {
    fn reset(&mut self) {
        self.step = 0;
    }
}

impl<K> Mirror<K>
where
    K: Resource + Clone + Debug + DeserializeOwned + Send + Sync + 'static,
{
    /// A mirror that is filled by hand: for tests, and for kinds that nobody watches.
    pub(crate) fn empty() -> Self {
        Self(Arc::new(Inner {
            state: RwLock::new(State {
                objects: BTreeMap::new(),
                deleted: VecDeque::new(),
            }),
            changes: broadcast::channel(BACKLOG).0,
            ready: watch::channel(false).0,
        }))
    }

    /// Starts watching; ends with `cancel`.
    pub(crate) fn start(
        api: Api<K>,
        config: watcher::Config,
        what: &'static str,
        cancel: CancellationToken,
    ) -> Self {
        let mirror = Self::empty();
        let task = mirror.clone();
        tokio::spawn(async move {
            tokio::select! {
                () = cancel.cancelled() => {}
                () = task.watch(api, config, what) => {}
            }
        });
        mirror
    }

    async fn watch(self, api: Api<K>, config: watcher::Config, what: &'static str) {
        let mut events = watcher::watcher(api, config)
            .backoff(LocalBackoff::default())
            .modify(|object| object.managed_fields_mut().clear())
            .boxed();
        let mut listed: Option<BTreeMap<Key, Arc<K>>> = None;
        let mut failing = false;
        while let Some(event) = events.next().await {
            // A watch that fails begins anew with `Init`, which says nothing about success.
            if matches!(event, Ok(Event::InitDone | Event::Apply(_) | Event::Delete(_))) {
                failing = false;
            }
            tracing::trace!(what, event = ?event.as_ref().map(std::mem::discriminant), "watch");
            match event {
                Ok(Event::Init) => listed = Some(BTreeMap::new()),
                Ok(Event::InitApply(object)) => {
                    listed
                        .get_or_insert_default()
                        .insert(key(&object), Arc::new(object));
                }
                Ok(Event::InitDone) => {
                    self.replace(listed.take().unwrap_or_default());
                    self.0.ready.send_replace(true);
                }
                Ok(Event::Apply(object)) => self.note(object),
                Ok(Event::Delete(object)) => self.note_deleted(&object),
                Err(error) => {
                    // Once per outage: it is retried several times a second.
                    if !failing {
                        warn!(what, %error, "watch failed; the last known state stays");
                    }
                    failing = true;
                }
            }
        }
    }

    fn replace(&self, objects: BTreeMap<Key, Arc<K>>) {
        self.0.state.write().objects = objects;
        // An error means that nobody listens, here and below.
        let _ = self.0.changes.send(Change::Resync);
    }

    /// Takes in an object as read from a watch or answered to a write of ours, unless a newer state is known.
    pub(crate) fn note(&self, object: K) {
        let key = key(&object);
        let object = Arc::new(object);
        {
            let mut state = self.0.state.write();
            if let Some(known) = state.objects.get(&key)
                && known.uid() == object.uid()
                && version(known.as_ref()) >= version(object.as_ref())
                && version(object.as_ref()).is_some()
            {
                return;
            }
            if object.uid().is_some_and(|uid| state.deleted.contains(&uid)) {
                return;
            }
            state.objects.insert(key, object.clone());
        }
        let _ = self.0.changes.send(Change::Applied(object));
    }

    /// Takes in that an object is gone.
    pub(crate) fn note_deleted(&self, object: &K) {
        let key = key(object);
        let removed = {
            let mut state = self.0.state.write();
            if let Some(uid) = object.uid() {
                if state.deleted.len() == TOMBSTONES {
                    state.deleted.pop_front();
                }
                state.deleted.push_back(uid);
            }
            match state.objects.get(&key) {
                Some(known) if known.uid() == object.uid() || object.uid().is_none() => {
                    state.objects.remove(&key)
                }
                _ => None,
            }
        };
        match removed {
            Some(removed) => {
                let _ = self.0.changes.send(Change::Deleted(removed));
            }
            None => debug!(?key, "deleted before it was known"),
        }
    }

    /// Waits for the first list.
    pub(crate) async fn ready(&self, what: &'static str, deadline: Duration) -> Result<(), Error> {
        let mut ready = self.0.ready.subscribe();
        let wait = ready.wait_for(|ready| *ready);
        match tokio::time::timeout(deadline, wait).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(_)) | Err(_) => Err(Error::NotListed {
                what,
                seconds: deadline.as_secs(),
            }),
        }
    }

    pub(crate) fn get(&self, namespace: &str, name: &str) -> Option<Arc<K>> {
        self.0
            .state
            .read()
            .objects
            .get(&(namespace.to_owned(), name.to_owned()))
            .cloned()
    }

    /// All objects of a namespace, by name.
    pub(crate) fn in_namespace(&self, namespace: &str) -> Vec<Arc<K>> {
        let from = (namespace.to_owned(), String::new());
        self.0
            .state
            .read()
            .objects
            .range(from..)
            .take_while(|((of, _), _)| of == namespace)
            .map(|(_, object)| object.clone())
            .collect()
    }

    /// Everything: for resyncs, not for events.
    pub(crate) fn all(&self) -> Vec<Arc<K>> {
        self.0.state.read().objects.values().cloned().collect()
    }

    /// Changes from now on. Subscribe first and read afterwards.
    pub(crate) fn changes(&self) -> Changes<K> {
        Changes(self.0.changes.subscribe())
    }
}

/// See [`Mirror::changes`].
pub(crate) struct Changes<K>(broadcast::Receiver<Change<K>>);

impl<K> Changes<K> {
    /// The next change; pends for ever once the mirror is gone (its owner is then about to be cancelled).
    pub(crate) async fn next(&mut self) -> Change<K> {
        match self.0.recv().await {
            Ok(change) => change,
            Err(broadcast::error::RecvError::Lagged(_)) => Change::Resync,
            Err(broadcast::error::RecvError::Closed) => std::future::pending().await,
        }
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::ConfigMap;

    use super::*;

    fn object(version: &str, uid: &str) -> ConfigMap {
        serde_json::from_value(serde_json::json!({
            "metadata": {"name": "a", "namespace": "n", "uid": uid, "resourceVersion": version}
        }))
        .unwrap()
    }

    fn version_in(mirror: &Mirror<ConfigMap>) -> Option<String> {
        mirror.get("n", "a").and_then(|object| object.resource_version())
    }

    #[test]
    fn a_write_of_ours_is_not_taken_back_by_an_older_event() {
        let mirror = Mirror::empty();
        mirror.note(object("5", "u"));
        mirror.note(object("9", "u"));
        mirror.note(object("7", "u"));
        assert_eq!(version_in(&mirror).as_deref(), Some("9"));
        mirror.note(object("10", "u"));
        assert_eq!(version_in(&mirror).as_deref(), Some("10"));
    }

    #[test]
    fn a_late_note_of_a_deleted_object_does_not_bring_it_back_but_a_successor_may_come() {
        let mirror = Mirror::empty();
        mirror.note(object("5", "u"));
        mirror.note_deleted(&object("6", "u"));
        assert_eq!(version_in(&mirror), None);
        mirror.note(object("5", "u"));
        assert_eq!(version_in(&mirror), None);
        mirror.note(object("8", "v"));
        assert_eq!(version_in(&mirror).as_deref(), Some("8"));
        mirror.note_deleted(&object("6", "u"));
        assert_eq!(version_in(&mirror).as_deref(), Some("8"));
    }

    #[test]
    fn a_namespace_is_listed_without_its_neighbours() {
        let mirror = Mirror::empty();
        for (namespace, name) in [("a", "x"), ("b", "y"), ("b", "z"), ("ba", "w")] {
            mirror.note(
                serde_json::from_value::<ConfigMap>(serde_json::json!({
                    "metadata": {"name": name, "namespace": namespace, "uid": name, "resourceVersion": "1"}
                }))
                .unwrap(),
            );
        }
        let names: Vec<String> = mirror
            .in_namespace("b")
            .iter()
            .map(|object| object.name_any())
            .collect();
        assert_eq!(names, ["y", "z"]);
    }
}
