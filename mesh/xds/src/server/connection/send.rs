//! What is to be sent, and when: classification, order across types, batches.

use std::sync::Arc;
use std::time::Duration;

use super::state::{Held, Outstanding, TypeState};
use super::{Connection, Event, Response};
use crate::resource::ResourceType;
use crate::server::dirty::Dirty;

/// Most resources of one response: enough for the small ones to fill it.
const MAX_RESOURCES: usize = 128;

impl Connection {
    /// Decides anew whether a resource must be sent or removed.
    pub(super) fn classify(&mut self, resource_type: ResourceType, name: &Arc<str>, sequence: u64) {
        let state = &mut self.types[resource_type.index()];
        let subscribed = state.subscribed(name);
        let named = state.names.contains(name);
        let Some(entry) = state.entries.get(name) else {
            return;
        };
        let basis = entry.in_flight.as_ref().unwrap_or(&entry.held);
        let (mut upsert, mut removal) = (false, false);
        match &entry.wanted {
            Some(wanted) => {
                let refused = entry.in_flight.is_none() && entry.refused.as_ref() == Some(&wanted.version);
                upsert = !basis.is_version(&wanted.version) && !refused;
            }
            None => match basis {
                Held::Stated(_) | Held::Resource(_) | Held::Perhaps => removal = true,
                // A name that was asked for and does not exist: the client must be told, and need not wait for it.
                Held::Unknown => upsert = named,
                Held::Nothing => {}
            },
        }
        let needless = entry.wanted.is_none() && entry.in_flight.is_none() && !removal && !named;
        if subscribed && upsert {
            state.upserts.insert(name, sequence);
        } else {
            state.upserts.remove(name);
        }
        if subscribed && removal {
            state.removals.insert(name, sequence);
        } else {
            state.removals.remove(name);
        }
        // Before the view is loaded an entry holds what the client stated.
        if self.loaded && (needless || (!subscribed && entry.wanted.is_none())) {
            state.entries.remove(name);
        }
    }

    /// The next response that may be sent; call until `None` after every other call.
    pub fn poll(&mut self, now: Duration) -> Option<Response> {
        if !self.loaded {
            return None;
        }
        self.mind_awaited_endpoints(now);
        ResourceType::ALL
            .into_iter()
            .find_map(|resource_type| self.poll_type(resource_type, now))
    }

    fn poll_type(&mut self, resource_type: ResourceType, now: Duration) -> Option<Response> {
        let state = &self.types[resource_type.index()];
        if !state.asked || state.outstanding.is_some() {
            return None;
        }
        if state.answered && state.upserts.is_empty() && state.removals.is_empty() {
            let state = &mut self.types[resource_type.index()];
            (state.upserts_blocked_since, state.removals_blocked_since) = (None, None);
            return None;
        }
        let patience = self.options.patience;
        let expired = |since: Option<Duration>| since.is_some_and(|since| now >= since + patience);
        let upsert_barrier = if expired(state.upserts_blocked_since) {
            u64::MAX
        } else {
            self.upsert_barrier(resource_type)
        };
        let removal_barrier = if expired(state.removals_blocked_since) {
            u64::MAX
        } else {
            self.removal_barrier(resource_type)
        };

        let max_bytes = self.options.max_response_bytes;
        let state = &mut self.types[resource_type.index()];
        let (mut count, mut bytes) = (0, 0);
        let entries = &state.entries;
        let batch = state.batch;
        let (names, oldest_upsert) = state.upserts.take(upsert_barrier, MAX_RESOURCES, |name| {
            let size = entries
                .get(name)
                .and_then(|entry| entry.wanted.as_ref())
                .map_or(0, |one| one.body.len());
            let fits = count == 0 || (count < batch && bytes + size <= max_bytes);
            count += 1;
            bytes += size;
            fits
        });
        let (removed, oldest_removal) = state.removals.take(removal_barrier, usize::MAX, |_| true);
        state.upserts_blocked_since = blocked(&state.upserts, &names, state.upserts_blocked_since, now);
        state.removals_blocked_since = blocked(&state.removals, &removed, state.removals_blocked_since, now);
        let due = !state.answered && state.upserts.is_empty();
        if names.is_empty() && removed.is_empty() && !due {
            return None;
        }
        Some(self.send(resource_type, names, removed, (oldest_upsert, oldest_removal)))
    }

    fn send(
        &mut self,
        resource_type: ResourceType,
        names: Vec<Arc<str>>,
        mut removed: Vec<Arc<str>>,
        (oldest_upsert, oldest_removal): (u64, u64),
    ) -> Response {
        self.last_nonce += 1;
        let state = &mut self.types[resource_type.index()];
        state.answered = true;
        let mut upserted = Vec::with_capacity(names.len());
        for name in names {
            let Some(entry) = state.entries.get_mut(&name) else {
                continue;
            };
            match &entry.wanted {
                Some(wanted) => {
                    entry.in_flight = Some(Held::Resource(wanted.clone()));
                    self.events.push(Event::Sent(wanted.clone()));
                    upserted.push(wanted.clone());
                }
                None => removed.push(name),
            }
        }
        for name in &removed {
            if let Some(entry) = state.entries.get_mut(name) {
                entry.in_flight = Some(Held::Nothing);
            }
        }
        state.outstanding = Some(Outstanding {
            nonce: self.last_nonce,
            upserted: upserted.clone(),
            removed: removed.clone(),
            oldest_upsert,
            oldest_removal,
        });
        Response {
            resource_type,
            nonce: self.last_nonce,
            upserted,
            removed,
        }
    }

    /// Additions of a type wait for older additions of the types that they may refer to.
    fn upsert_barrier(&self, resource_type: ResourceType) -> u64 {
        let earlier = self.types[..resource_type.index()]
            .iter()
            .map(TypeState::oldest_upsert);
        let awaited = if resource_type > ResourceType::Endpoints {
            self.awaited_endpoints.oldest()
        } else {
            u64::MAX
        };
        earlier.min().unwrap_or(u64::MAX).min(awaited)
    }

    /// Removals of a type wait for whatever may still refer to it.
    fn removal_barrier(&self, resource_type: ResourceType) -> u64 {
        use ResourceType::{Cluster, Endpoints, Extension, Listener, Route, Runtime, Secret, VirtualHost};
        let upserts = |types: &[ResourceType]| {
            types
                .iter()
                .map(|ty| self.types[ty.index()].oldest_upsert())
                .min()
                .unwrap_or(u64::MAX)
        };
        let removals = |types: &[ResourceType]| {
            types
                .iter()
                .map(|ty| self.types[ty.index()].oldest_removal())
                .min()
                .unwrap_or(u64::MAX)
        };
        match resource_type {
            Listener | Runtime => u64::MAX,
            Extension => upserts(&ResourceType::ALL).min(removals(&[Listener])),
            Route => upserts(&[Listener]).min(removals(&[Listener])),
            // A host that goes is a change of routing like any other.
            VirtualHost => self.upsert_barrier(VirtualHost),
            Cluster => upserts(&ResourceType::ALL)
                .min(removals(&[Listener, Route, VirtualHost]))
                .min(self.awaited_endpoints.oldest()),
            Secret => upserts(&ResourceType::ALL).min(removals(&[Cluster, Listener])),
            Endpoints => upserts(&ResourceType::ALL)
                .min(removals(&[Cluster, Listener, Route, VirtualHost]))
                .min(self.awaited_endpoints.oldest()),
        }
    }

    fn mind_awaited_endpoints(&mut self, now: Duration) {
        if self.awaited_endpoints.is_empty() {
            return;
        }
        let since = *self.awaiting_since.get_or_insert(now);
        if now >= since + self.options.patience {
            self.awaited_endpoints = Dirty::default();
            self.awaiting_since = None;
        }
    }

    /// When [`Connection::poll`] must be called next even if nothing happens.
    pub fn deadline(&self) -> Option<Duration> {
        self.types
            .iter()
            .filter(|state| state.outstanding.is_none())
            .flat_map(|state| {
                [
                    state.upserts_blocked_since.filter(|_| !state.upserts.is_empty()),
                    state
                        .removals_blocked_since
                        .filter(|_| !state.removals.is_empty()),
                ]
            })
            .chain([self.awaiting_since])
            .flatten()
            .min()
            .map(|since| since + self.options.patience)
    }
}

/// Since when something waits: it starts with the first poll that leaves it and ends when something goes out.
fn blocked(waiting: &Dirty, taken: &[Arc<str>], since: Option<Duration>, now: Duration) -> Option<Duration> {
    (!waiting.is_empty() && taken.is_empty()).then(|| since.unwrap_or(now))
}
