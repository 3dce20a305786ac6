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

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use foldhash::fast::RandomState;

use super::dirty::Dirty;
use crate::refusal::{Attribution, attribute};
use crate::resource::{Change, Resource, ResourceType};

/// How a [`Connection`] behaves.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Longest time for which something waits for acknowledgements of what it depends on.
    pub patience: Duration,
    /// Resources are split over several responses beyond this size. Go clients read 4 MiB unless told otherwise.
    pub max_response_bytes: usize,
    /// Send the endpoints of a cluster again when the cluster changes. Envoy waits for them before it uses the new
    /// cluster (envoy issue 13009); our proxy keeps them.
    pub endpoints_follow_clusters: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            patience: Duration::from_secs(2),
            max_response_bytes: 2 * 1024 * 1024,
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
    types: [TypeState; 5],
    /// New clusters whose endpoints the client has not asked for yet → sequence number of the cluster.
    awaited_endpoints: Dirty,
    awaiting_since: Option<Duration>,
    events: Vec<Event>,
}

#[derive(Debug)]
struct TypeState {
    asked: bool,
    answered: bool,
    all: bool,
    names: HashSet<Arc<str>, RandomState>,
    entries: HashMap<Arc<str>, Entry, RandomState>,
    upserts: Dirty,
    removals: Dirty,
    outstanding: Option<Outstanding>,
    /// Most resources in the next response, while a culprit is being searched.
    batch: usize,
    upserts_blocked_since: Option<Duration>,
    removals_blocked_since: Option<Duration>,
}

impl Default for TypeState {
    fn default() -> Self {
        Self {
            asked: false,
            answered: false,
            all: false,
            names: HashSet::default(),
            entries: HashMap::default(),
            upserts: Dirty::default(),
            removals: Dirty::default(),
            outstanding: None,
            batch: usize::MAX,
            upserts_blocked_since: None,
            removals_blocked_since: None,
        }
    }
}

#[derive(Debug, Default)]
struct Entry {
    wanted: Option<Arc<Resource>>,
    held: Held,
    /// What the client will hold if it accepts the outstanding response.
    in_flight: Option<Held>,
    /// Version that was refused last.
    refused: Option<Arc<str>>,
}

#[derive(Clone, Debug, Default)]
enum Held {
    /// Nothing, or nothing known: it must be told.
    #[default]
    Unknown,
    /// It was told that there is none.
    Nothing,
    /// A version that the client stated.
    Stated(Arc<str>),
    /// A resource that it accepted.
    Resource(Arc<Resource>),
}

impl Held {
    fn is_version(&self, version: &str) -> bool {
        match self {
            Self::Unknown | Self::Nothing => false,
            Self::Stated(held) => **held == *version,
            Self::Resource(held) => *held.version == *version,
        }
    }
}

#[derive(Debug)]
struct Outstanding {
    nonce: u64,
    upserted: Vec<Arc<Resource>>,
    removed: Vec<Arc<str>>,
    /// Lowest sequence numbers within.
    oldest_upsert: u64,
    oldest_removal: u64,
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
            lost.extend(state.entries.keys().cloned());
        }
        lost.sort_unstable();
        lost.dedup();
        for name in lost {
            let state = &mut self.types[resource_type.index()];
            if state.subscribed(&name) {
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
            return; // unsubscribed meanwhile
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

    fn awaited_endpoints_done(&mut self, resource_type: ResourceType, name: &Arc<str>) -> Option<u64> {
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

    /// Decides anew whether a resource must be sent or removed.
    fn classify(&mut self, resource_type: ResourceType, name: &Arc<str>, sequence: u64) {
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
                Held::Stated(_) | Held::Resource(_) => removal = true,
                // A name that was asked for and does not exist: the client must be told, and need not wait for it.
                Held::Unknown => upsert = named,
                Held::Nothing => {}
            },
        }
        let needless = entry.wanted.is_none() && entry.in_flight.is_none() && !removal && !named;
        match subscribed && upsert {
            true => state.upserts.insert(name, sequence),
            false => {
                state.upserts.remove(name);
            }
        }
        match subscribed && removal {
            true => state.removals.insert(name, sequence),
            false => {
                state.removals.remove(name);
            }
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
        let (names, oldest_upsert) = state.upserts.take(upsert_barrier, |name| {
            let size = entries
                .get(name)
                .and_then(|entry| entry.wanted.as_ref())
                .map_or(0, |one| one.body.len());
            let fits = count == 0 || (count < batch && bytes + size <= max_bytes);
            count += 1;
            bytes += size;
            fits
        });
        let (removed, oldest_removal) = state.removals.take(removal_barrier, |_| true);
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
        use ResourceType::*;
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
            Listener => u64::MAX,
            Route => upserts(&[Listener]).min(removals(&[Listener])),
            // A host that goes is a change of routing like any other.
            VirtualHost => self.upsert_barrier(VirtualHost),
            Cluster => upserts(&ResourceType::ALL)
                .min(removals(&[Listener, Route, VirtualHost]))
                .min(self.awaited_endpoints.oldest()),
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
                Held::Unknown | Held::Nothing | Held::Stated(_) => None,
            })
            .collect();
        world.sort_unstable_by(|a, b| a.name.cmp(&b.name));
        world
    }
}

impl TypeState {
    fn subscribed(&self, name: &str) -> bool {
        self.all || self.names.contains(name)
    }

    fn oldest_upsert(&self) -> u64 {
        self.upserts.oldest().min(
            self.outstanding
                .as_ref()
                .map_or(u64::MAX, |outstanding| outstanding.oldest_upsert),
        )
    }

    fn oldest_removal(&self) -> u64 {
        self.removals.oldest().min(
            self.outstanding
                .as_ref()
                .map_or(u64::MAX, |outstanding| outstanding.oldest_removal),
        )
    }
}

/// Since when something waits: it starts with the first poll that leaves it and ends when something goes out.
fn blocked(waiting: &Dirty, taken: &[Arc<str>], since: Option<Duration>, now: Duration) -> Option<Duration> {
    (!waiting.is_empty() && taken.is_empty()).then(|| since.unwrap_or(now))
}
