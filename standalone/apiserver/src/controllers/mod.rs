//! The parts of Kubernetes' controller manager without which an API server does not feel like one, driven by the store's events:
//! CRD conditions ([`crds`]), namespaces and their default ServiceAccount ([`namespaces`]), the garbage collector ([`garbage`]).

pub(crate) mod crds;
pub(crate) mod garbage;
pub(crate) mod namespaces;

use std::sync::Arc;

use tokio_util::task::TaskTracker;

use crate::hub::Hub;
use crate::kinds::ResourceId;
use crate::store::Stored;

/// Start all of them; they end with the hub's shutdown.
pub(crate) fn spawn(hub: &Arc<Hub>, tasks: &TaskTracker, garbage_collector: bool) {
    tasks.spawn(crds::run(hub.clone()));
    tasks.spawn(namespaces::run(hub.clone()));
    if garbage_collector {
        tasks.spawn(garbage::run(hub.clone()));
    }
}

/// A change that a controller looks at.
pub(crate) struct Seen {
    pub(crate) object: Arc<Stored>,
    pub(crate) deleted: bool,
}

/// Follows one kind through the history; falls back to a full list when it was too slow.
pub(crate) struct Follower {
    resource: ResourceId,
    position: Option<u64>,
}

impl Follower {
    pub(crate) fn new(resource: &str) -> Self {
        Self {
            resource: resource.into(),
            position: None,
        }
    }

    pub(crate) fn resource(&self) -> &ResourceId {
        &self.resource
    }

    /// What changed since the last call; everything at the first.
    pub(crate) fn changes(&mut self, hub: &Hub) -> Vec<Seen> {
        let store = hub.store.lock();
        let events = self.position.and_then(|p| store.events_after(&self.resource, p));
        self.position = Some(store.rv());
        match events {
            Some(events) => events
                .iter()
                .map(|e| Seen {
                    object: e.object.clone(),
                    deleted: e.change == crate::store::Change::Deleted,
                })
                .collect(),
            None => store
                .list(&self.resource, "", None, None, |_| true)
                .items
                .into_iter()
                .map(|object| Seen {
                    object,
                    deleted: false,
                })
                .collect(),
        }
    }
}
