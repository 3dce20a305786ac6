//! The ack ledger: for every user object and generation, which proxies need it, were sent it, acknowledged it, refused it.
//!
//! A weight that was *sent* is not a weight that is *live*. A rollout waits for the latter, and this is where it asks:
//! [`Ledger::watch`] gives the [`Liveness`] of `(object, generation)`, now and at each change.
//!
//! The account itself is [`Book`], pure and fed with the [`Event`]s of connections; the [`Ledger`] is the shared handle
//! with a clock and the watches.
//!
//! # What the numbers mean
//! - A proxy *needs* an object while a resource made from it is in the proxy's view and subscribed to, or while a
//!   resource made from it has yet to be removed from the proxy.
//! - It has *acked* a generation once everything in its view that comes from the object at that generation, or at a
//!   newer one, is acknowledged. What did not change by content needs no message and counts at once; so does what a
//!   proxy states to hold when it reconnects.
//! - A proxy that is gone is not needed any more. If it lives and has only lost its connection, it keeps what it has and
//!   counts again as soon as it is back.
//! - A generation that was overtaken by a newer one is acked by whoever acked the newer one.
//!
//! # Cost
//! An acknowledgement costs what the resource has origins; a generation costs what needs the object. Memory is one
//! small record per proxy and object that it needs, whatever the number of generations.

mod book;
mod liveness;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::time::Instant;

use parking_lot::Mutex;
use serin_xds::server::{ClientId, Event};
use tokio::sync::{Notify, watch};

pub use book::Book;
pub use liveness::{Liveness, ObjectReport, ProxyReport, ProxyStand, Refused};

/// The shared account; see the module's documentation. Cloning shares it.
#[derive(Clone, Debug)]
pub struct Ledger {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    started: Instant,
    state: Mutex<State>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct State {
    book: Book,
    watches: HashMap<Arc<str>, BTreeMap<i64, watch::Sender<Liveness>>>,
    /// Objects whose liveness changed since [`Ledger::changes`] was last answered; at most one entry per object.
    dirty: HashSet<Arc<str>>,
}

impl Default for Ledger {
    fn default() -> Self {
        Self::new()
    }
}

impl Ledger {
    /// An empty ledger.
    pub fn new() -> Self {
        let shared = Shared {
            started: Instant::now(),
            state: Mutex::new(State::default()),
            changed: Notify::new(),
        };
        Self {
            shared: Arc::new(shared),
        }
    }

    /// A proxy has connected.
    pub fn connect(&self, client: ClientId, proxy: &str) {
        self.with(|book, _| book.connect(client, proxy));
    }

    /// A proxy is gone.
    pub fn disconnect(&self, client: ClientId) {
        self.with(|book, _| book.disconnect(client));
    }

    /// What happened on a proxy's connection, in order.
    pub fn record(&self, client: ClientId, events: &[Event]) {
        self.with(|book, now| book.record(client, events, now));
    }

    /// A generation has been translated, and every connected proxy has been given what it needs of it.
    pub fn observe(&self, object: &Arc<str>, generation: i64) {
        self.with(|book, now| book.observe(object, generation, now));
    }

    /// The control plane itself refuses a generation; proxies keep what they have.
    pub fn reject(&self, object: &Arc<str>, generation: i64, reason: &str) {
        self.with(|book, now| book.reject(object, generation, reason, now));
    }

    /// The object was deleted.
    pub fn forget(&self, object: &Arc<str>) {
        self.with(|book, _| book.forget(object));
    }

    /// The liveness of a generation of an object (`Kind/namespace/name`), now and at each change, for as long as the
    /// receiver lives. An object that is not known yet is reported as not observed.
    pub fn watch(&self, object: &str, generation: i64) -> watch::Receiver<Liveness> {
        let mut state = self.shared.state.lock();
        let State { book, watches, .. } = &mut *state;
        // Watches that nobody looks at any more go when the next one comes.
        watches.retain(|_, generations| {
            generations.retain(|_, sender| sender.receiver_count() > 0);
            !generations.is_empty()
        });
        let object: Arc<str> = object.into();
        let generations = watches.entry(object.clone()).or_default();
        match generations.get(&generation) {
            Some(sender) => sender.subscribe(),
            None => {
                let (sender, receiver) = watch::channel(book.liveness(&object, generation));
                generations.insert(generation, sender);
                receiver
            }
        }
    }

    /// The liveness of a generation of an object, now.
    pub fn liveness(&self, object: &str, generation: i64) -> Liveness {
        self.shared.state.lock().book.liveness(object, generation)
    }

    /// Every known object with its newest generation and how live it is, by name.
    pub fn objects(&self) -> Vec<Liveness> {
        self.shared.state.lock().book.objects()
    }

    /// How each proxy that needs an object stands.
    pub fn report(&self, object: &str) -> ObjectReport {
        self.shared.state.lock().book.report(object)
    }

    /// Every connected proxy with what it still owes.
    pub fn proxies(&self) -> Vec<ProxyReport> {
        self.shared.state.lock().book.proxies()
    }

    /// Waits for changes and returns the objects that changed since the last answer. For one consumer: the status
    /// writer.
    pub async fn changes(&self) -> HashSet<Arc<str>> {
        loop {
            let dirty = self.take_changes();
            if !dirty.is_empty() {
                return dirty;
            }
            self.shared.changed.notified().await;
        }
    }

    /// The objects that changed since the last answer; for the consumer of [`Ledger::changes`].
    pub fn take_changes(&self) -> HashSet<Arc<str>> {
        std::mem::take(&mut self.shared.state.lock().dirty)
    }

    /// Reports objects as changed for another reason than liveness.
    pub fn mark(&self, objects: impl IntoIterator<Item = Arc<str>>) {
        self.shared.state.lock().dirty.extend(objects);
        self.shared.changed.notify_one();
    }

    fn with(&self, change: impl FnOnce(&mut Book, std::time::Duration) -> HashSet<Arc<str>>) {
        let now = self.shared.started.elapsed();
        let mut state = self.shared.state.lock();
        let State { book, watches, dirty } = &mut *state;
        let changed = change(book, now);
        if changed.is_empty() {
            return;
        }
        for object in &changed {
            for (generation, sender) in watches.get(object).into_iter().flatten() {
                let liveness = book.liveness(object, *generation);
                sender.send_if_modified(|current| {
                    let differs = *current != liveness;
                    *current = liveness;
                    differs
                });
            }
        }
        dirty.extend(changed);
        drop(state);
        self.shared.changed.notify_one();
    }
}
