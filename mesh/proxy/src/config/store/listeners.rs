//! Listeners: taken, opened once their routes, secrets and filters are here, replaced, removed; and what stands beside them.

use std::sync::Arc;

use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::envoy::config::listener::v3 as pb_listener;
use serin_xds::pb::envoy::service::runtime::v3 as pb_runtime;

use super::{ListenerChange, Store, Update, VirtualListeners, Waiting, decode};
use crate::clock::now_ms;
use crate::config::extension::Extensions;
use crate::config::listener::Listener;
use crate::config::route::Context;
use crate::config::slot::ListenerSlot;
use crate::error::Refusal;
use crate::random;
use crate::tls::table::Side;

impl Store {
    pub(super) fn put_listener(&mut self, update: &Update<'_>) -> Result<(), Refusal> {
        let message = decode::<pb_listener::Listener>(update)?;
        let mut context = Context {
            slots: &mut self.slots,
            workers: self.workers,
            seed: random::next(),
        };
        let listener = Arc::new(Listener::compile(&message, &mut context)?);
        for name in listener.route_names() {
            let known = self.route_state(&name).base.is_some();
            self.rds.hold(&name, &listener.name, known);
        }
        for manager in listener.all_chains().filter_map(|chain| chain.manager()) {
            if let Some(name) = manager.rds_name() {
                let counts = &mut self.counts.subscriptions;
                counts.ask_routes(&name, &manager.stat_prefix);
            }
        }
        if self.is_listener_warm(&listener) && !self.slots.runtime.is_awaited() {
            self.give_up_waiting(&listener.name);
            self.activate_listener(listener);
        } else {
            let waiting = Waiting {
                item: listener.clone(),
                since: now_ms(),
            };
            if let Some(old) = self.warming.listeners.insert(listener.name.clone(), waiting) {
                self.leave_routes(&old.item);
            }
            if listener.bind && !self.is_bound_like(&listener) {
                self.changes.push(ListenerChange::Try(listener));
            }
        }
        Ok(())
    }

    /// Whether sockets are open where the listener wants them.
    fn is_bound_like(&self, listener: &Listener) -> bool {
        let bound = self.bound.get(&listener.name);
        bound.is_some_and(|slot| slot.load().addresses == listener.addresses)
    }

    /// What waits under this name is given up; the listener that is in use stays.
    pub fn give_up_waiting(&mut self, name: &str) {
        if let Some(waiting) = self.warming.listeners.remove(name) {
            self.leave_routes(&waiting.item);
        }
    }

    /// Whether everything that a listener needs has come, or the control plane has said that there is no such thing.
    pub(super) fn is_listener_warm(&self, listener: &Listener) -> bool {
        listener.is_warm() && listener.route_names().all(|name| self.rds.is_answered(&name))
    }

    /// A listener is not in this place any more.
    fn leave_routes(&mut self, listener: &Listener) {
        for name in listener.route_names() {
            if self.rds.release(&name, &listener.name) {
                self.counts.subscriptions.leave_routes(&name);
            }
        }
    }

    pub(super) fn put_extension(&mut self, update: &Update<'_>) -> Result<(), Refusal> {
        let message = decode::<core::TypedExtensionConfig>(update)?;
        let mut context = Context {
            slots: &mut self.slots,
            workers: self.workers,
            seed: random::next(),
        };
        Extensions::put(update.name, &message, &mut context)
    }

    pub(super) fn put_runtime(&mut self, update: &Update<'_>) -> Result<(), Refusal> {
        let message = decode::<pb_runtime::Runtime>(update)?;
        self.slots.runtime.put(update.name, message.layer.as_ref())
    }

    pub(super) fn activate_listener(&mut self, listener: Arc<Listener>) {
        if listener.bind {
            match self.bound.get(&listener.name) {
                Some(slot) if slot.load().addresses == listener.addresses => {
                    self.counts.in_place += 1;
                    slot.set(listener.clone());
                }
                existing => {
                    if existing.is_some() {
                        self.changes.push(ListenerChange::Close(listener.name.clone()));
                    }
                    let slot = Arc::new(ListenerSlot::new(listener.clone(), self.workers));
                    self.bound.insert(listener.name.clone(), slot.clone());
                    self.changes.push(ListenerChange::Open(slot));
                }
            }
        } else if self.bound.remove(&listener.name).is_some() {
            self.changes.push(ListenerChange::Close(listener.name.clone()));
        }
        match self.listeners.insert(listener.name.clone(), listener) {
            None => self.counts.listeners.added += 1,
            Some(old) => {
                self.counts.listeners.modified += 1;
                old.retire();
                self.leave_routes(&old);
            }
        }
    }

    pub(super) fn remove_listener(&mut self, name: &str) {
        self.slots.secrets.forget(Side::Listener, name);
        self.give_up_waiting(name);
        if let Some(old) = self.listeners.remove(name) {
            self.counts.listeners.removed += 1;
            old.retire();
            self.leave_routes(&old);
        }
        if let Some(slot) = self.bound.remove(name) {
            self.changes.push(ListenerChange::Close(slot.load().name.clone()));
        }
    }

    pub(super) fn publish_virtual_listeners(&mut self) {
        let mut table = VirtualListeners::default();
        for listener in self.listeners.values().filter(|listener| !listener.bind) {
            for address in &listener.addresses {
                if address.ip().is_unspecified() {
                    table.by_port.insert(address.port(), listener.clone());
                } else {
                    table.exact.insert(*address, listener.clone());
                }
            }
        }
        self.virtuals.store(Arc::new(table));
    }
}
