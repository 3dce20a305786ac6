//! What a client's answer to a response means for each resource in it.

use std::collections::HashMap;
use std::sync::Arc;

use super::state::Held;
use super::{Connection, Event};
use crate::refusal::{Attribution, attribute};
use crate::resource::{Resource, ResourceType};

impl Connection {
    /// The client's answer to a response. An answer to any other than the outstanding one is ignored.
    pub fn answer(&mut self, resource_type: ResourceType, nonce: u64, error: Option<&str>) {
        let state = &mut self.types[resource_type.index()];
        let Some(outstanding) = state
            .outstanding
            .take_if(|outstanding| outstanding.nonce == nonce)
        else {
            return;
        };
        let attribution = match error {
            None => Attribution::Exact(Vec::new()),
            // Removals cannot be refused.
            Some(_) if outstanding.upserted.is_empty() => Attribution::Exact(Vec::new()),
            Some(text) => attribute(text, outstanding.upserted.iter().map(|resource| &resource.name)),
        };
        let single = outstanding.upserted.len() == 1;
        let (refusals, rest_accepted) = match attribution {
            Attribution::Exact(refusals) => (refusals, true),
            Attribution::Named(refusals) => (refusals, false),
            Attribution::Unknown if single => {
                let name = outstanding.upserted[0].name.clone();
                (vec![crate::Refusal::new(name, error.unwrap_or_default())], true)
            }
            Attribution::Unknown => {
                state.batch = (outstanding.upserted.len() / 2).max(1);
                (Vec::new(), false)
            }
        };
        if error.is_none() {
            state.batch = state.batch.saturating_mul(2);
        }
        let refusals: HashMap<_, _> = refusals
            .into_iter()
            .map(|refusal| (refusal.name, refusal.reason))
            .collect();
        for resource in &outstanding.upserted {
            match refusals.get(&resource.name) {
                Some(reason) => self.refused(resource, reason),
                None if rest_accepted => self.accepted(resource, outstanding.oldest_upsert),
                None => self.unanswered(resource_type, &resource.name, outstanding.oldest_upsert),
            }
        }
        for name in &outstanding.removed {
            if rest_accepted {
                self.gone(resource_type, name);
            } else {
                self.unanswered(resource_type, name, outstanding.oldest_removal);
            }
        }
    }

    fn accepted(&mut self, resource: &Arc<Resource>, sequence: u64) {
        let state = &mut self.types[resource.resource_type.index()];
        let Some(entry) = state
            .entries
            .get_mut(&resource.name)
            .filter(|entry| entry.in_flight.is_some())
        else {
            // Unsubscribed meanwhile. Part of everything, it may have come before the name was given up, and is dropped, or
            // after that, and is held.
            if state.subscribed(&resource.name) {
                state.entries.entry(resource.name.clone()).or_default().held = Held::Perhaps;
                self.classify(resource.resource_type, &resource.name, self.sequence);
            }
            return;
        };
        entry.in_flight = None;
        entry.refused = None;
        // The view may have the same content with newer origins by now.
        let held = match &entry.wanted {
            Some(wanted) if wanted.version == resource.version => wanted.clone(),
            _ => resource.clone(),
        };
        entry.held = Held::Resource(held.clone());
        self.events.push(Event::Held(held));
        self.classify(resource.resource_type, &resource.name, self.sequence);
        if resource.resource_type == ResourceType::Cluster {
            self.cluster_accepted(&resource.name, sequence);
        }
    }

    /// What a newly accepted cluster means for its endpoints.
    fn cluster_accepted(&mut self, name: &Arc<str>, sequence: u64) {
        let state = &mut self.types[ResourceType::Endpoints.index()];
        let subscribed = state.subscribed(name);
        let Some(entry) = state.entries.get_mut(name).filter(|entry| entry.wanted.is_some()) else {
            return;
        };
        if !subscribed {
            self.awaited_endpoints.insert(name, sequence);
        } else if self.options.endpoints_follow_clusters && entry.in_flight.is_none() {
            entry.held = Held::Unknown;
            self.classify(ResourceType::Endpoints, name, sequence);
        }
    }

    pub(super) fn awaited_endpoints_done(
        &mut self,
        resource_type: ResourceType,
        name: &Arc<str>,
    ) -> Option<u64> {
        if resource_type != ResourceType::Endpoints || self.awaited_endpoints.is_empty() {
            return None;
        }
        let sequence = self.awaited_endpoints.remove(name);
        if self.awaited_endpoints.is_empty() {
            self.awaiting_since = None;
        }
        sequence
    }

    fn refused(&mut self, resource: &Arc<Resource>, reason: &Arc<str>) {
        let state = &mut self.types[resource.resource_type.index()];
        let Some(entry) = state
            .entries
            .get_mut(&resource.name)
            .filter(|entry| entry.in_flight.is_some())
        else {
            return;
        };
        entry.in_flight = None;
        entry.refused = Some(resource.version.clone());
        self.events.push(Event::Refused(resource.clone(), reason.clone()));
        self.classify(resource.resource_type, &resource.name, self.sequence);
    }

    fn unanswered(&mut self, resource_type: ResourceType, name: &Arc<str>, sequence: u64) {
        if let Some(entry) = self.types[resource_type.index()].entries.get_mut(name) {
            entry.in_flight = None;
        }
        self.classify(resource_type, name, sequence);
    }

    fn gone(&mut self, resource_type: ResourceType, name: &Arc<str>) {
        let state = &mut self.types[resource_type.index()];
        let Some(entry) = state
            .entries
            .get_mut(name)
            .filter(|entry| entry.in_flight.is_some())
        else {
            return;
        };
        entry.in_flight = None;
        entry.held = Held::Nothing;
        self.events.push(Event::Gone(resource_type, name.clone()));
        self.classify(resource_type, name, self.sequence);
    }
}
