//! The live server behind all front ends: the store under one lock, the kinds, the log, and the wake-ups of watchers.
//!
//! A write is staged and logged under the store's lock, so the log has the order of resource versions. Nobody sees it before it is on
//! disk: the log's writer syncs a group, publishes it to readers and watchers, and only then wakes the writers to their answers. One that
//! lost against a write that is still staged is told so when that is durable, and not at all if it never becomes so: answers, lists and
//! watches alike show what a `kill -9` cannot take back. The next start leaves a gap in the versions and has no history, so every watcher
//! is told 410 and lists again.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::{Mutex, RwLock};
use serde_json::Value;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::admission::{Admission, PodLogs};
use crate::clock::Clock;
use crate::controllers::crds;
use crate::error::{ApiError, ApiResult};
use crate::kinds::{Kind, Registry, ResourceId};
use crate::log::{Log, StoreSide};
use crate::store::{Change, Event, Expect, Lost, Store, Stored};

pub(crate) struct Hub {
    pub(crate) store: Mutex<Store>,
    registry: RwLock<Arc<Registry>>,
    wakes: RwLock<HashMap<ResourceId, watch::Sender<u64>>>,
    /// Any write at all, for controllers.
    pub(crate) any: watch::Sender<u64>,
    pub(crate) log: Option<Log>,
    pub(crate) admission: Option<Arc<dyn Admission>>,
    pub(crate) pod_logs: Option<Arc<dyn PodLogs>>,
    pub(crate) clock: Arc<dyn Clock>,
    /// See [`crate::Builder::kubernetes_admission`].
    pub(crate) kubernetes_admission: bool,
    pub(crate) addresses: Mutex<crate::defaults::addresses::Allocator>,
    pub(crate) shutdown: CancellationToken,
    /// Streams that are being served; watches beyond the bound are refused.
    pub(crate) watchers: std::sync::atomic::AtomicUsize,
    /// Bumped when kinds change: the ETag of discovery and OpenAPI.
    pub(crate) registry_version: std::sync::atomic::AtomicU64,
}

/// A write that did not happen.
#[derive(Debug)]
pub(crate) enum CommitError {
    Lost(Lost),
    Storage(String),
}

/// What became of a write under the store's lock.
enum Staged {
    /// In the log's buffer; its writer thread publishes it.
    Logged(Arc<Event>),
    /// There is no log: seen already, by those who are to be woken.
    Published(Arc<Event>, Vec<(ResourceId, u64)>),
    /// The state was another one; `against` is the version to wait for where that state is not durable yet.
    Lost { lost: Lost, against: Option<u64> },
}

impl Hub {
    pub(crate) fn new(
        store: Store,
        log: Option<Log>,
        clock: Arc<dyn Clock>,
        admission: Option<Arc<dyn Admission>>,
        pod_logs: Option<Arc<dyn PodLogs>>,
        kubernetes_admission: bool,
    ) -> Self {
        Self {
            any: watch::Sender::new(store.rv()),
            store: Mutex::new(store),
            registry: RwLock::new(Arc::new(Registry::builtin())),
            wakes: RwLock::new(HashMap::new()),
            log,
            admission,
            pod_logs,
            clock,
            kubernetes_admission,
            addresses: Mutex::new(crate::defaults::addresses::Allocator::default()),
            shutdown: CancellationToken::new(),
            watchers: std::sync::atomic::AtomicUsize::new(0),
            registry_version: std::sync::atomic::AtomicU64::new(1),
        }
    }

    pub(crate) fn registry(&self) -> Arc<Registry> {
        self.registry.read().clone()
    }

    pub(crate) fn change_registry(&self, change: impl FnOnce(&mut Registry)) {
        let mut slot = self.registry.write();
        let mut next = (**slot).clone();
        change(&mut next);
        *slot = Arc::new(next);
        self.registry_version
            .fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    }

    /// Wakes up with every event of a kind.
    pub(crate) fn subscribe(&self, resource: &ResourceId) -> watch::Receiver<u64> {
        if let Some(sender) = self.wakes.read().get(resource) {
            return sender.subscribe();
        }
        self.wakes
            .write()
            .entry(resource.clone())
            .or_insert_with(|| watch::Sender::new(0))
            .subscribe()
    }

    fn wake(&self, changed: &[(ResourceId, u64)]) {
        let wakes = self.wakes.read();
        let mut newest = 0;
        for (resource, rv) in changed {
            newest = newest.max(*rv);
            if let Some(sender) = wakes.get(resource) {
                sender.send_modify(|v| *v = (*rv).max(*v));
            }
        }
        if newest > 0 {
            self.any.send_modify(|v| *v = newest.max(*v));
        }
    }

    pub(crate) fn get(&self, kind: &Kind, key: &str) -> Option<Arc<Stored>> {
        self.store.lock().get(&kind.resource, key).cloned()
    }

    pub(crate) fn get_at(&self, resource: &str, key: &str) -> Option<Arc<Stored>> {
        self.store.lock().get(resource, key).cloned()
    }

    /// Create or replace an object and wait until it is durable.
    pub(crate) async fn put(
        &self,
        resource: &ResourceId,
        key: &str,
        value: Value,
        expect: Expect,
    ) -> Result<Arc<Event>, CommitError> {
        self.healthy()?;
        self.namespace_settled(resource, key, expect).await?;
        let staged = {
            let mut store = self.store.lock();
            let staged = store.put(resource, key, value, expect);
            self.record(&mut store, resource, key, staged)
        };
        self.finish(staged).await
    }

    /// Delete an object and wait until that is durable.
    pub(crate) async fn remove(
        &self,
        resource: &ResourceId,
        key: &str,
        last: Value,
        rv: u64,
    ) -> Result<Arc<Event>, CommitError> {
        self.healthy()?;
        let staged = {
            let mut store = self.store.lock();
            let staged = store.remove(resource, key, last, rv);
            self.record(&mut store, resource, key, staged)
        };
        self.finish(staged).await
    }

    /// A new object in a namespace that is itself being changed waits for that: it may be about to go, and what is made in it after its
    /// contents were counted would be left behind.
    async fn namespace_settled(
        &self,
        resource: &ResourceId,
        key: &str,
        expect: Expect,
    ) -> Result<(), CommitError> {
        let (Expect::Absent, Some((namespace, _))) = (expect, key.split_once('/')) else {
            return Ok(());
        };
        let Some(staged) = self.store.lock().staged_at("/namespaces", namespace) else {
            return Ok(());
        };
        tracing::trace!(%resource, key, "waiting for a change of the namespace");
        self.durable(staged).await?;
        Err(CommitError::Lost(Lost::Changed))
    }

    fn healthy(&self) -> Result<(), CommitError> {
        match self.log.as_ref().and_then(Log::failure) {
            Some(failure) => Err(CommitError::Storage(failure)),
            None => Ok(()),
        }
    }

    /// Log what was staged, under the lock of the store.
    fn record(
        &self,
        store: &mut Store,
        resource: &ResourceId,
        key: &str,
        staged: Result<Arc<Event>, Lost>,
    ) -> Staged {
        let event = match staged {
            Ok(event) => event,
            Err(lost) => {
                return Staged::Lost {
                    lost,
                    against: store.staged_at(resource, key),
                };
            }
        };
        let Some(log) = &self.log else {
            let changed = self.show(store, event.rv);
            return Staged::Published(event, changed);
        };
        match event.change {
            Change::Added | Change::Modified => {
                log.put(resource, &event.key, event.rv, &event.object.whole());
            }
            Change::Deleted => log.delete(resource, &event.key, event.rv),
        }
        Staged::Logged(event)
    }

    async fn finish(&self, staged: Staged) -> Result<Arc<Event>, CommitError> {
        match staged {
            Staged::Logged(event) => {
                self.durable(event.rv).await?;
                Ok(event)
            }
            Staged::Published(event, changed) => {
                self.wake(&changed);
                Ok(event)
            }
            Staged::Lost { lost, against } => {
                if let Some(rv) = against {
                    self.durable(rv).await?;
                }
                Err(CommitError::Lost(lost))
            }
        }
    }

    /// Wait until a version is on disk and published.
    async fn durable(&self, rv: u64) -> Result<(), CommitError> {
        match &self.log {
            Some(log) => log.durable(rv).await.map_err(CommitError::Storage),
            None => Ok(()),
        }
    }

    /// Show readers and watchers everything up to a version, which is on disk.
    pub(crate) fn publish(&self, durable: u64) {
        let changed = self.show(&mut self.store.lock(), durable);
        self.wake(&changed);
    }

    /// Publishes within the store. Requests are answered by a definition from the moment in which it can be read, so that
    /// nobody who has been told of a change of it meets what was before.
    fn show(&self, store: &mut Store, durable: u64) -> Vec<(ResourceId, u64)> {
        for event in store.to_be_published(crds::RESOURCE, durable) {
            crds::take_over(self, &event);
        }
        store.publish(durable)
    }

    pub(crate) fn storage_error(text: &str) -> ApiError {
        let mut error = ApiError::internal(format!("storage: {text}"));
        error.code = 500;
        error
    }

    /// Change an object of our own accord until it succeeds or `edit` gives up.
    pub(crate) async fn modify(
        &self,
        resource: &ResourceId,
        key: &str,
        manager: &str,
        subresource: &str,
        edit: impl Fn(&Value) -> Option<Value>,
    ) -> ApiResult<Option<Arc<Event>>> {
        for _ in 0..MODIFY_ATTEMPTS {
            let Some(current) = self.get_at(resource, key) else {
                return Ok(None);
            };
            let Some(mut next) = edit(&current.value) else {
                return Ok(None);
            };
            if next == current.value {
                return Ok(None);
            }
            let registry = self.registry();
            if let Some((kind, version)) = registry
                .by_resource(resource)
                .and_then(|k| k.storage_version().map(|v| (k, v)))
            {
                let now = crate::time::seconds(self.clock.now());
                let write = crate::apply::managers::Write {
                    schema: &version.schema,
                    zero: &version.zero,
                    api_version: &kind.api_version(&version.name),
                    subresource,
                    manager,
                    now: &now,
                    reset: if subresource == "status" {
                        &["spec", "metadata"]
                    } else {
                        &[]
                    },
                };
                crate::apply::managers::update(&write, Some(&current.value), &mut next);
            }
            match self.put(resource, key, next, Expect::At(current.rv)).await {
                Ok(event) => return Ok(Some(event)),
                Err(CommitError::Lost(_)) => {}
                Err(CommitError::Storage(text)) => return Err(Self::storage_error(&text)),
            }
        }
        Err(ApiError::internal(format!(
            "{resource} {key} changed too often to be updated"
        )))
    }
}

/// Attempts of an update that keeps losing against others.
pub(crate) const MODIFY_ATTEMPTS: usize = 32;

/// The store as the log's writer sees it.
#[derive(Default)]
pub(crate) struct BehindLog {
    hub: parking_lot::Mutex<std::sync::Weak<Hub>>,
}

impl BehindLog {
    pub(crate) fn attach(&self, hub: &Arc<Hub>) {
        *self.hub.lock() = Arc::downgrade(hub);
    }
}

impl StoreSide for BehindLog {
    fn publish(&self, durable: u64) {
        let hub = self.hub.lock().upgrade();
        if let Some(hub) = hub {
            hub.publish(durable);
        }
    }

    fn snapshot(&self) -> (Vec<(Arc<str>, Arc<str>, u64, Vec<u8>)>, u64) {
        let hub = self.hub.lock().upgrade();
        let Some(hub) = hub else {
            return (Vec::new(), 0);
        };
        let (objects, rv) = {
            let store = hub.store.lock();
            let objects: Vec<_> = store
                .all()
                .map(|(r, k, o)| (r.clone(), k.clone(), o.clone()))
                .collect();
            (objects, store.rv())
        };
        let encoded = objects
            .into_iter()
            .map(|(r, k, o)| (r, k, o.rv, o.whole()))
            .collect();
        (encoded, rv)
    }
}

#[cfg(test)]
mod tests;
