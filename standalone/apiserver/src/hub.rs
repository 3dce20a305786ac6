//! The live server behind all front ends: the store under one lock, the kinds, the log, and the wake-ups of watchers.
//!
//! A write is applied and logged under the store's lock, so the log has the order of resource versions. Readers and watchers see it at
//! once; the writer is answered when it is on disk. After a crash nobody can be fooled by a version that was seen but lost: the next start
//! leaves a gap in the versions and has no history, so every watcher is told 410 and lists again.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::{Mutex, RwLock};
use serde_json::Value;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::admission::{Admission, PodLogs};
use crate::clock::Clock;
use crate::error::{ApiError, ApiResult};
use crate::kinds::{Kind, Registry, ResourceId};
use crate::log::Log;
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

    fn wake(&self, resource: &ResourceId, rv: u64) {
        if let Some(sender) = self.wakes.read().get(resource) {
            sender.send_modify(|v| *v = rv.max(*v));
        }
        self.any.send_modify(|v| *v = rv.max(*v));
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
        let (event, ticket) = {
            let mut store = self.store.lock();
            let event = store
                .put(resource, key, value, expect)
                .map_err(CommitError::Lost)?;
            let ticket = self.record(resource, &event);
            (event, ticket)
        };
        self.finish(resource, event, ticket).await
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
        let (event, ticket) = {
            let mut store = self.store.lock();
            let event = store.remove(resource, key, last, rv).map_err(CommitError::Lost)?;
            let ticket = self.record(resource, &event);
            (event, ticket)
        };
        self.finish(resource, event, ticket).await
    }

    fn healthy(&self) -> Result<(), CommitError> {
        match self.log.as_ref().and_then(Log::failure) {
            Some(failure) => Err(CommitError::Storage(failure)),
            None => Ok(()),
        }
    }

    fn record(&self, resource: &ResourceId, event: &Event) -> u64 {
        let Some(log) = &self.log else { return 0 };
        match event.change {
            Change::Added | Change::Modified => {
                log.put(resource, &event.key, event.rv, &event.object.whole())
            }
            Change::Deleted => log.delete(resource, &event.key, event.rv),
        }
    }

    async fn finish(
        &self,
        resource: &ResourceId,
        event: Arc<Event>,
        ticket: u64,
    ) -> Result<Arc<Event>, CommitError> {
        self.wake(resource, event.rv);
        if let Some(log) = &self.log {
            log.durable(ticket).await.map_err(CommitError::Storage)?;
        }
        Ok(event)
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
