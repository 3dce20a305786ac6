//! The revisions that sources currently stand at, for whoever builds from them.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::RwLock;
use tokio::sync::broadcast;

use super::tree::Snapshot;
use crate::key::Key;

/// Changes that a slow listener may lag behind before it is told to look at everything.
const BACKLOG: usize = 1024;

/// The current revision of every source that has one. Cloning shares it.
#[derive(Clone)]
pub(crate) struct Artifacts {
    current: Arc<RwLock<HashMap<Key, Arc<Snapshot>>>>,
    changes: broadcast::Sender<Key>,
}

impl Artifacts {
    pub(crate) fn new() -> Self {
        Self {
            current: Arc::default(),
            changes: broadcast::channel(BACKLOG).0,
        }
    }

    pub(crate) fn get(&self, source: &Key) -> Option<Arc<Snapshot>> {
        self.current.read().get(source).cloned()
    }

    /// Publishes a revision. Listeners hear of it when its revision or its visible content changed.
    pub(crate) fn publish(&self, source: &Key, snapshot: Arc<Snapshot>) {
        let before = self.current.write().insert(source.clone(), snapshot.clone());
        let same = before.is_some_and(|b| b.revision == snapshot.revision && b.digest == snapshot.digest);
        if !same {
            let _ = self.changes.send(source.clone());
        }
    }

    pub(crate) fn remove(&self, source: &Key) {
        if self.current.write().remove(source).is_some() {
            let _ = self.changes.send(source.clone());
        }
    }

    pub(crate) fn changes(&self) -> broadcast::Receiver<Key> {
        self.changes.subscribe()
    }
}
