//! One watch per kind, shared by whoever needs it: a store to read from, and a bounded stream of changes to react to.
//!
//! The store is written before the change is announced, so whoever hears of a change reads at least that state. A
//! listener that falls behind by more than [`BACKLOG`] changes is told to look at everything again
//! ([`Change::Resync`]) instead of holding up the others; the same happens after every (re)list, when deletions may
//! have gone unseen. A watch that breaks is retried with back-off for ever; the store keeps the last known state.

use std::fmt::Debug;
use std::hash::Hash;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use kube::runtime::reflector::{ObjectRef, Store, store::Writer};
use kube::runtime::watcher::{self, Event};
use kube::runtime::{WatchStreamExt, reflector};
use kube::{Api, Resource, ResourceExt};
use serde::de::DeserializeOwned;
use tokio::sync::broadcast;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use crate::Error;

/// How many changes a listener may lag behind before it is told to resync.
pub const BACKLOG: usize = 1024;

/// What happened to an object.
#[derive(Debug)]
pub enum Change<K> {
    /// It was created or changed.
    Applied(Arc<K>),
    /// It was deleted; the last state known.
    Deleted(Arc<K>),
    /// Changes may have been missed: read the store again.
    Resync,
}

impl<K> Clone for Change<K> {
    fn clone(&self) -> Self {
        match self {
            Self::Applied(object) => Self::Applied(object.clone()),
            Self::Deleted(object) => Self::Deleted(object.clone()),
            Self::Resync => Self::Resync,
        }
    }
}

/// A watched kind. Cloning is cheap and shares the watch.
pub struct Cache<K>
where
    K: Resource + 'static,
    K::DynamicType: Hash + Eq,
{
    store: Store<K>,
    dynamic: K::DynamicType,
    changes: broadcast::Sender<Change<K>>,
}

impl<K> Clone for Cache<K>
where
    K: Resource + 'static,
    K::DynamicType: Hash + Eq + Clone,
{
    fn clone(&self) -> Self {
        Self {
            store: self.store.clone(),
            dynamic: self.dynamic.clone(),
            changes: self.changes.clone(),
        }
    }
}

/// The changes of a [`Cache`] since [`Cache::changes`] was called.
pub struct Changes<K> {
    receiver: broadcast::Receiver<Change<K>>,
}

impl<K> Changes<K> {
    /// The next change; `None` when the cache was shut down.
    pub async fn next(&mut self) -> Option<Change<K>> {
        match self.receiver.recv().await {
            Ok(change) => Some(change),
            Err(broadcast::error::RecvError::Lagged(missed)) => {
                debug!(missed, "listener of a watch fell behind");
                Some(Change::Resync)
            }
            Err(broadcast::error::RecvError::Closed) => None,
        }
    }
}

impl<K> Cache<K>
where
    K: Resource + Clone + Debug + DeserializeOwned + Send + Sync + 'static,
    K::DynamicType: Hash + Eq + Clone + Debug + Unpin + Send + Sync,
{
    /// Starts watching a kind whose type is known at compile time. Ends with `cancel`.
    pub fn start(api: Api<K>, cancel: CancellationToken) -> Self
    where
        K::DynamicType: Default,
    {
        Self::start_with(api, K::DynamicType::default(), watcher::Config::default(), cancel)
    }

    /// Starts watching with a configuration (selectors) and, for dynamic objects, their type.
    pub fn start_with(
        api: Api<K>,
        dynamic: K::DynamicType,
        config: watcher::Config,
        cancel: CancellationToken,
    ) -> Self {
        let writer = Writer::<K>::new(dynamic.clone());
        let store = writer.as_reader();
        let (changes, _) = broadcast::channel(BACKLOG);
        let cache = Self {
            store,
            dynamic,
            changes,
        };
        let task = cache.clone();
        tokio::spawn(async move {
            tokio::select! {
                () = cancel.cancelled() => {}
                () = task.watch(api, config, writer) => {}
            }
        });
        cache
    }

    async fn watch(self, api: Api<K>, config: watcher::Config, mut writer: Writer<K>) {
        let kind = K::kind(&self.dynamic).into_owned();
        let mut events = watcher::watcher(api, config)
            .default_backoff()
            .modify(|object| {
                // Nobody of ours reads them from a cache, and they are often half of an object.
                object.managed_fields_mut().clear();
            })
            .boxed();
        while let Some(event) = events.next().await {
            let event = match event {
                Ok(event) => event,
                Err(error) => {
                    warn!(%kind, %error, "watch failed; the last known state stays");
                    continue;
                }
            };
            writer.apply_watcher_event(&event);
            let change = match event {
                Event::Apply(object) => Change::Applied(self.stored(object)),
                Event::Delete(object) => Change::Deleted(Arc::new(object)),
                Event::InitDone => Change::Resync,
                Event::Init | Event::InitApply(_) => continue,
            };
            // An error means that nobody listens now; the store has it.
            let _ = self.changes.send(change);
        }
    }

    fn stored(&self, object: K) -> Arc<K> {
        self.store
            .get(&ObjectRef::from_obj_with(&object, self.dynamic.clone()))
            .unwrap_or_else(|| Arc::new(object))
    }

    /// Waits until the first list is in the store.
    pub async fn ready(&self, deadline: Duration) -> Result<(), Error> {
        match tokio::time::timeout(deadline, self.store.wait_until_ready()).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) | Err(_) => Err(Error::NotReady {
                kind: K::kind(&self.dynamic).into_owned(),
                seconds: deadline.as_secs(),
            }),
        }
    }

    /// The object as last seen.
    pub fn get(&self, namespace: Option<&str>, name: &str) -> Option<Arc<K>> {
        let mut key = ObjectRef::new_with(name, self.dynamic.clone());
        if let Some(namespace) = namespace {
            key = key.within(namespace);
        }
        self.store.get(&key)
    }

    /// Every object as last seen, in no order. O(all): for resyncs, not for events.
    pub fn list(&self) -> Vec<Arc<K>> {
        self.store.state()
    }

    /// A stream of the changes from now on. Subscribe first and read the store then, so that nothing falls between.
    pub fn changes(&self) -> Changes<K> {
        Changes {
            receiver: self.changes.subscribe(),
        }
    }

    /// The underlying store, for kube-runtime's own tools.
    pub fn store(&self) -> reflector::Store<K> {
        self.store.clone()
    }
}

#[cfg(test)]
mod tests;
