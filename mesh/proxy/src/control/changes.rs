//! Configuration into use: resources and secrets into the store, and what follows for sockets and workers.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use serin_xds::ResourceType;

use super::Proxy;
use crate::config::listener::Listener;
use crate::config::slot::ListenerSlot;
use crate::config::store::{ListenerChange, Store, Update};
use crate::error::{Error, Refusal};
use crate::tls::table::SdsService;
use crate::worker::Command;

/// What was refused, by name.
type Refused = Vec<(Box<str>, Refusal)>;

impl Proxy {
    /// Takes a batch of resources; what is refused is returned by name, the rest is live on every worker.
    pub async fn apply(
        &self,
        resource_type: ResourceType,
        upserted: &[Update<'_>],
        removed: &[&str],
    ) -> Refused {
        let (mut refused, changes) = {
            let mut store = self.store.lock();
            let refused = store.apply(resource_type, upserted, removed);
            (refused, store.take_listener_changes())
        };
        if matches!(resource_type, ResourceType::Route | ResourceType::VirtualHost) {
            self.rerouted.notify_one();
        }
        refused.extend(self.follow(changes).await);
        refused
    }

    /// Takes secrets of a service; what is refused is returned by name, the rest is in use.
    pub async fn apply_secrets_of(&self, service: &SdsService, upserted: &[Update<'_>]) -> Refused {
        let (refused, changes) = {
            let mut store = self.store.lock();
            let mut refused = Vec::new();
            for update in upserted {
                if let Err(refusal) = store.secrets().put_of(service, update.name, update.body) {
                    refused.push((update.name.into(), refusal));
                }
            }
            store.warm(None);
            (refused, store.take_listener_changes())
        };
        self.follow_up(changes).await;
        refused
    }

    /// Takes into use what waits for secrets when they have come from files or, at `now_ms` on the process clock, it has
    /// waited long enough; reads changed files again. Cheap when there is nothing to do.
    pub async fn tend_secrets(&self, now_ms: u64) {
        let (unusable, changes) = {
            let mut store = self.store.lock();
            let unusable = store.secrets().reload_files();
            if store.is_warming() {
                store.warm(Some(now_ms));
            }
            (unusable, store.take_listener_changes())
        };
        for refusal in unusable {
            tracing::warn!(%refusal, "a changed file cannot be used; what it held before stays in use");
        }
        self.follow_up(changes).await;
    }

    /// So long has been waited for layers of the runtime; for ever, where nobody will send any (`None`). Listeners that
    /// waited for nothing else are opened.
    pub async fn waited_for_runtime(&self, waited: Option<Duration>) {
        let changes = {
            let mut store = self.store.lock();
            store.waited_for_runtime(waited);
            store.take_listener_changes()
        };
        self.follow_up(changes).await;
    }

    /// The same where nobody waits for an answer: a listener that cannot be opened is told in the log.
    async fn follow_up(&self, changes: Vec<ListenerChange>) {
        for (name, refusal) in self.follow(changes).await {
            tracing::warn!(listener = %name, %refusal, "not opened");
        }
    }

    /// Opens and closes sockets; returns the listeners that could not be opened.
    async fn follow(&self, changes: Vec<ListenerChange>) -> Refused {
        let mut refused = Vec::new();
        // The first worker does for all what is to be done once.
        let chores = self.store(Store::take_chores);
        for chore in chores {
            if let Some(worker) = self.workers.first() {
                let _ = worker.commands.send(Command::Chore(chore)).await;
            }
        }
        for change in changes {
            match change {
                ListenerChange::Open(slot) => {
                    let listener = slot.load();
                    if let Err(refusal) = self.open(&slot, &listener).await {
                        refused.push(((*listener.name).into(), refusal));
                    }
                }
                ListenerChange::Try(listener) => {
                    if let Err(refusal) = self.try_open(&listener) {
                        refused.push(((*listener.name).into(), refusal));
                    }
                }
                ListenerChange::Close(name) => {
                    self.sockets.close(&name);
                    for worker in &self.workers {
                        let _ = worker.commands.send(Command::Close(name.clone())).await;
                    }
                }
            }
        }
        self.changes.send_replace(());
        refused
    }

    /// Binds a listener's addresses; each worker accepts on sockets of its own.
    async fn open(&self, slot: &Arc<ListenerSlot>, listener: &Listener) -> Result<(), Refusal> {
        let name = &listener.name;
        match self
            .sockets
            .bind_all(name, &listener.addresses, self.workers.len())
        {
            Ok(sockets) => {
                self.store.lock().counts().opened(self.workers.len());
                for (worker, sockets) in self.workers.iter().zip(sockets) {
                    // A worker that has ended serves nothing; its end has been logged.
                    let _ = worker.commands.send(Command::Listen(slot.clone(), sockets)).await;
                }
                Ok(())
            }
            Err((address, source)) => {
                // Forgotten, so that the control plane's next attempt binds again.
                let mut store = self.store.lock();
                store.counts().not_opened();
                store.apply(ResourceType::Listener, &[], &[name]);
                store.take_listener_changes();
                Err(not_bound(name, address, source))
            }
        }
    }

    /// Whether a listener that waits could be bound now: by the time that it is opened nobody may be left to be told.
    fn try_open(&self, listener: &Listener) -> Result<(), Refusal> {
        let Err((address, source)) = self.sockets.try_all(&listener.addresses) else {
            return Ok(());
        };
        let mut store = self.store.lock();
        store.counts().not_opened();
        store.give_up_waiting(&listener.name);
        Err(not_bound(&listener.name, address, source))
    }
}

fn not_bound(name: &Arc<str>, address: SocketAddr, source: std::io::Error) -> Refusal {
    let error = Error::Bind {
        name: name.to_string(),
        address,
        source,
    };
    Refusal::new("address", error.to_string())
}
