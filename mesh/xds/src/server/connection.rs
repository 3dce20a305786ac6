//! The state of one client's stream, seen from the server: what it subscribes to, what its view is, what it holds.
//!
//! Pure: requests, changes of the view and the time come in; responses and [`Event`]s come out.
//!
//! # Rules
//! - At most one response per type is outstanding. What changes meanwhile is merged: the newest state wins.
//! - Nothing is sent that the client holds, and nothing that it refused until its content changes.
//! - *Make before break.* Each change of the view has a sequence number. A resource is sent once everything it may
//!   refer to that changed with it or before it has been **acknowledged**: clusters, then endpoints, then listeners,
//!   routes and virtual hosts. Later changes do not hold it up, so churn of endpoints cannot starve a route. Clusters and
//!   endpoints are removed once nothing of the same change can refer to them any more.
//! - Waiting is bounded ([`Options::patience`]): a client that does not acknowledge is sent the rest all the same.
//! - A NACK that names resources refuses these. If it does not say what it accepted, the rest is sent again; if it names
//!   nothing, the response is sent again in halves until the culprit stands alone.

mod answer;
mod send;
mod state;

use std::sync::Arc;
use std::time::Duration;

use state::{Held, TypeState};

use super::dirty::Dirty;
use crate::resource::{Change, Resource, ResourceType};

/// How a [`Connection`] behaves.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Longest time for which something waits for acknowledgements of what it depends on.
    pub patience: Duration,
    /// Resources are split over several responses beyond this size. The transport keeps a buffer as large as the largest
    /// response for as long as the stream lives, so this, times two, is what each proxy costs for ever.
    pub max_response_bytes: usize,
    /// Send the endpoints of a cluster again when the cluster changes. Envoy waits for them before it uses the new
    /// cluster (envoy issue 13009); our proxy keeps them.
    pub endpoints_follow_clusters: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            patience: Duration::from_secs(2),
            max_response_bytes: 16 * 1024,
            endpoints_follow_clusters: false,
        }
    }
}

/// What became of one resource on one connection.
#[derive(Clone, Debug)]
pub enum Event {
    /// The client subscribes to it and its view has it in this version from now on.
    Wanted(Arc<Resource>),
    /// The view or the subscription no longer has it. If the client holds it, [`Event::Gone`] follows.
    Unwanted(ResourceType, Arc<str>),
    /// It was handed to the transport.
    Sent(Arc<Resource>),
    /// The client holds exactly this: it acknowledged it or stated so when it connected.
    Held(Arc<Resource>),
    /// The client refused it and keeps what it held before.
    Refused(Arc<Resource>, Arc<str>),
    /// The client holds nothing by this name any more.
    Gone(ResourceType, Arc<str>),
}

/// A response to be sent.
#[derive(Debug)]
pub struct Response {
    /// Type of all resources in it.
    pub resource_type: ResourceType,
    /// Identifies it in the client's answer; unique on the connection.
    pub nonce: u64,
    /// New or changed resources.
    pub upserted: Vec<Arc<Resource>>,
    /// Names that exist no more or never did.
    pub removed: Vec<Arc<str>>,
}

/// The state of one stream. See the module's documentation.
#[derive(Debug)]
pub struct Connection {
    options: Options,
    loaded: bool,
    sequence: u64,
    last_nonce: u64,
    types: [TypeState; ResourceType::COUNT],
    /// New clusters whose endpoints the client has not asked for yet → sequence number of the cluster.
    awaited_endpoints: Dirty,
    awaiting_since: Option<Duration>,
    events: Vec<Event>,
}

impl Connection {
    /// A new stream, with no view yet: nothing is answered before [`Connection::load`].
    pub fn new(options: Options) -> Self {
        Self {
            options,
            loaded: false,
            sequence: 1,
            last_nonce: 0,
            types: Default::default(),
            awaited_endpoints: Dirty::default(),
            awaiting_since: None,
            events: Vec::new(),
        }
    }

    /// The whole view, once.
    pub fn load(&mut self, view: impl IntoIterator<Item = Arc<Resource>>) {
        self.loaded = true;
        self.apply(view.into_iter().map(Change::Upsert));
        // What the client stated and the view does not have must go.
        for resource_type in ResourceType::ALL {
            let names: Vec<_> = self.types[resource_type.index()]
                .entries
                .keys()
                .cloned()
                .collect();
            for name in names {
                self.classify(resource_type, &name, self.sequence);
            }
        }
    }

    /// Changes of the view that belong together.
    pub fn apply(&mut self, changes: impl IntoIterator<Item = Change>) {
        self.sequence += 1;
        for change in changes {
            match change {
                Change::Upsert(resource) => self.upsert(resource),
                Change::Remove(resource_type, name) => self.remove(resource_type, &name),
            }
        }
    }

    fn upsert(&mut self, resource: Arc<Resource>) {
        let resource_type = resource.resource_type;
        let state = &mut self.types[resource_type.index()];
        let subscribed = state.subscribed(&resource.name);
        let entry = state.entries.entry(resource.name.clone()).or_default();
        if subscribed {
            self.events.push(Event::Wanted(resource.clone()));
            if entry.in_flight.is_none() && entry.held.is_version(&resource.version) {
                entry.held = Held::Resource(resource.clone());
                self.events.push(Event::Held(resource.clone()));
            }
        }
        let name = resource.name.clone();
        entry.wanted = Some(resource);
        self.classify(resource_type, &name, self.sequence);
    }

    fn remove(&mut self, resource_type: ResourceType, name: &Arc<str>) {
        let state = &mut self.types[resource_type.index()];
        let subscribed = state.subscribed(name);
        let Some(entry) = state.entries.get_mut(name) else {
            return;
        };
        if entry.wanted.take().is_some() && subscribed {
            self.events.push(Event::Unwanted(resource_type, name.clone()));
            if entry.in_flight.is_none() && matches!(entry.held, Held::Unknown | Held::Nothing) {
                self.events.push(Event::Gone(resource_type, name.clone()));
            }
        }
        self.awaited_endpoints_done(resource_type, name);
        self.classify(resource_type, name, self.sequence);
    }

    /// Whether the client has asked for this type on this stream.
    pub fn has_asked(&self, resource_type: ResourceType) -> bool {
        self.types[resource_type.index()].asked
    }

    /// The first request of a type: what the client holds already.
    pub fn state_held<'a>(
        &mut self,
        resource_type: ResourceType,
        held: impl IntoIterator<Item = (&'a str, &'a str)>,
    ) {
        let state = &mut self.types[resource_type.index()];
        for (name, version) in held {
            state.entries.entry(name.into()).or_default().held = Held::Stated(version.into());
        }
    }

    /// The client wants these names too, or everything. Names that it has are sent again: it asked.
    pub fn subscribe<'a>(
        &mut self,
        resource_type: ResourceType,
        all: bool,
        names: impl IntoIterator<Item = &'a str>,
    ) {
        let state = &mut self.types[resource_type.index()];
        let first = !std::mem::replace(&mut state.asked, true);
        if all && !state.all {
            // What is subscribed to by name stays as it is; the rest becomes subscribed now.
            state.all = true;
            let newly: Vec<_> = state
                .entries
                .keys()
                .filter(|name| !state.names.contains(*name))
                .cloned()
                .collect();
            for name in newly {
                self.subscribed_now(resource_type, &name);
            }
        }
        for name in names {
            let name: Arc<str> = name.into();
            let state = &mut self.types[resource_type.index()];
            let known = state.subscribed(&name);
            state.names.insert(name.clone());
            if known {
                let entry = state.entries.entry(name.clone()).or_default();
                if !first && entry.in_flight.is_none() {
                    entry.held = Held::Unknown;
                    entry.refused = None;
                }
                self.classify(resource_type, &name, self.sequence);
            } else {
                state.entries.entry(name.clone()).or_default();
                self.subscribed_now(resource_type, &name);
            }
        }
    }

    fn subscribed_now(&mut self, resource_type: ResourceType, name: &Arc<str>) {
        let state = &mut self.types[resource_type.index()];
        if let Some(entry) = state.entries.get_mut(name)
            && let Some(wanted) = &entry.wanted
        {
            self.events.push(Event::Wanted(wanted.clone()));
            if entry.held.is_version(&wanted.version) {
                entry.held = Held::Resource(wanted.clone());
                self.events.push(Event::Held(wanted.clone()));
            }
        }
        let sequence = self
            .awaited_endpoints_done(resource_type, name)
            .unwrap_or(self.sequence);
        self.classify(resource_type, name, sequence);
    }

    /// The client no longer wants these names, or no longer everything.
    pub fn unsubscribe<'a>(
        &mut self,
        resource_type: ResourceType,
        all: bool,
        names: impl IntoIterator<Item = &'a str>,
    ) {
        let state = &mut self.types[resource_type.index()];
        let mut lost: Vec<Arc<str>> = names
            .into_iter()
            .filter_map(|name| state.names.take(name))
            .collect();
        if all && std::mem::replace(&mut state.all, false) {
            // The client keeps what it asks for by name as well.
            let kept = &state.names;
            lost.extend(state.entries.keys().filter(|name| !kept.contains(*name)).cloned());
        }
        lost.sort_unstable();
        lost.dedup();
        for name in lost {
            let state = &mut self.types[resource_type.index()];
            if state.subscribed(&name) {
                // Still part of everything, if it exists at all. The client cannot know and has dropped it, so it is told.
                let entry = state.entries.entry(name.clone()).or_default();
                entry.held = Held::Unknown;
                entry.in_flight = None;
                entry.refused = None;
                self.events.push(Event::Gone(resource_type, name.clone()));
                self.classify(resource_type, &name, self.sequence);
                continue;
            }
            if let Some(entry) = state.entries.get_mut(&name) {
                // The client forgets it; the answer to what is in flight says nothing about it any more.
                entry.held = Held::Unknown;
                entry.in_flight = None;
                entry.refused = None;
                self.events.push(Event::Unwanted(resource_type, name.clone()));
                self.events.push(Event::Gone(resource_type, name.clone()));
            }
            self.classify(resource_type, &name, self.sequence);
        }
    }

    /// The names that are subscribed to explicitly.
    pub(super) fn subscribed_names(&self, resource_type: ResourceType) -> impl Iterator<Item = &Arc<str>> {
        self.types[resource_type.index()].names.iter()
    }

    /// Nonce of the response that waits for its answer.
    pub fn outstanding(&self, resource_type: ResourceType) -> Option<u64> {
        self.types[resource_type.index()]
            .outstanding
            .as_ref()
            .map(|outstanding| outstanding.nonce)
    }

    /// What happened since the last call.
    pub fn take_events(&mut self) -> Vec<Event> {
        std::mem::take(&mut self.events)
    }

    /// Everything that the client holds of a type once it takes what is in flight: the state of the world.
    pub(super) fn world(&self, resource_type: ResourceType) -> Vec<Arc<Resource>> {
        let mut world: Vec<_> = self.types[resource_type.index()]
            .entries
            .values()
            .filter_map(|entry| match entry.in_flight.as_ref().unwrap_or(&entry.held) {
                Held::Resource(resource) => Some(resource.clone()),
                Held::Unknown | Held::Perhaps | Held::Nothing | Held::Stated(_) => None,
            })
            .collect();
        world.sort_unstable_by(|a, b| a.name.cmp(&b.name));
        world
    }
}
