//! The account, pure: events of connections in, counts out. Time is an argument.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::Arc;
use std::time::Duration;

use foldhash::fast::RandomState;
use serin_xds::server::{ClientId, Event};
use serin_xds::{Origin, Resource, ResourceType};

use super::liveness::{Liveness, ObjectReport, ProxyReport, ProxyStand, Refused};

/// Refusals that a [`Liveness`] quotes; the count is complete.
const QUOTED_REFUSALS: usize = 3;

type HashMap<K, V> = std::collections::HashMap<K, V, RandomState>;

type Key = (ResourceType, Arc<str>);

/// The account. Every change returns the objects that it concerned.
#[derive(Debug, Default)]
pub struct Book {
    proxies: HashMap<ClientId, Proxy>,
    objects: HashMap<Arc<str>, Object>,
}

#[derive(Debug)]
struct Proxy {
    id: Arc<str>,
    /// Resources that come from user objects; the others are of no interest here.
    tracked: HashMap<Key, Tracked>,
}

/// One resource on one proxy.
#[derive(Clone, Debug, Default)]
struct Tracked {
    wanted: Option<Arc<Resource>>,
    held: Option<Arc<Resource>>,
    /// Version that was handed to the transport last.
    sent: Option<Arc<str>>,
    refused: Option<(Arc<str>, Arc<str>)>,
}

/// What one resource on one proxy means for one object.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Share {
    needs: bool,
    pending: bool,
    unsent: bool,
    refused: bool,
    generation: i64,
}

#[derive(Debug, Default)]
struct Object {
    /// Newest generation that was translated; 0 before the first.
    generation: i64,
    observed_at: Duration,
    rejected: Option<(i64, Arc<str>)>,
    stands: HashMap<ClientId, Stand>,
    /// How many proxies have acked a generation, and nothing newer.
    acked: BTreeMap<i64, usize>,
    /// Proxies with something pending, longest first.
    pending: BTreeSet<(Duration, ClientId)>,
    refused: BTreeMap<ClientId, BTreeMap<Key, Arc<str>>>,
    unsent: usize,
    /// The last proxy to take the generation before it was live everywhere, and how long after the translation.
    last: Option<(Arc<str>, Duration)>,
    /// It has been live everywhere; who joins later does not count as slow.
    complete: bool,
    deleted: bool,
}

/// Where one proxy stands with one object; counts are of resources.
#[derive(Debug, Default)]
struct Stand {
    needs: usize,
    pending: usize,
    unsent: usize,
    acked: i64,
    /// Newest generation among the resources that it was given.
    given: i64,
    pending_since: Duration,
}

impl Tracked {
    fn in_sync(&self) -> bool {
        match (&self.wanted, &self.held) {
            (Some(wanted), Some(held)) => wanted.version == held.version,
            (None, None) => true,
            (Some(_), None) | (None, Some(_)) => false,
        }
    }

    fn refusal(&self) -> Option<&Arc<str>> {
        let (version, reason) = self.refused.as_ref()?;
        (self.wanted.as_ref()?.version == *version).then_some(reason)
    }

    /// The share of each object that the resource comes from, or came from while that has yet to be undone.
    fn shares(&self) -> BTreeMap<Arc<str>, Share> {
        let mut shares: BTreeMap<Arc<str>, Share> = BTreeMap::new();
        let in_sync = self.in_sync();
        let refused = self.refusal().is_some();
        let sent = self
            .wanted
            .as_ref()
            .is_none_or(|wanted| self.sent.as_ref() == Some(&wanted.version));
        let pending = |share: &mut Share| {
            share.pending = !in_sync;
            share.unsent = !in_sync && !sent;
        };
        for origin in origins(self.wanted.as_ref()) {
            let share = shares.entry(origin.object.clone()).or_default();
            share.needs = true;
            share.refused = refused;
            share.generation = share.generation.max(origin.generation);
            pending(share);
        }
        if !in_sync {
            for origin in origins(self.held.as_ref()) {
                pending(shares.entry(origin.object.clone()).or_default());
            }
        }
        shares
    }
}

fn origins(resource: Option<&Arc<Resource>>) -> &[Origin] {
    resource.map_or(&[], |resource| &resource.origins)
}

impl Book {
    /// A proxy has connected and needs nothing yet.
    pub fn connect(&mut self, client: ClientId, id: &str) -> HashSet<Arc<str>> {
        self.proxies.insert(
            client,
            Proxy {
                id: id.into(),
                tracked: HashMap::default(),
            },
        );
        HashSet::new()
    }

    /// A proxy is gone and needs nothing any more.
    pub fn disconnect(&mut self, client: ClientId) -> HashSet<Arc<str>> {
        let Some(proxy) = self.proxies.remove(&client) else {
            return HashSet::new();
        };
        let concerned: HashSet<Arc<str>> = proxy
            .tracked
            .values()
            .flat_map(|tracked| tracked.shares().into_keys())
            .collect();
        for name in &concerned {
            if let Some(object) = self.objects.get_mut(name) {
                object.drop_stand(client);
            }
            self.prune(name);
        }
        concerned
    }

    /// What happened on a proxy's connection, in order.
    pub fn record(&mut self, client: ClientId, events: &[Event], now: Duration) -> HashSet<Arc<str>> {
        let mut changed = HashSet::new();
        for event in events {
            self.record_one(client, event, now, &mut changed);
        }
        changed
    }

    fn record_one(
        &mut self,
        client: ClientId,
        event: &Event,
        now: Duration,
        changed: &mut HashSet<Arc<str>>,
    ) {
        let Some(proxy) = self.proxies.get_mut(&client) else {
            return;
        };
        let (resource_type, name, has_origins) = match event {
            Event::Wanted(one) | Event::Sent(one) | Event::Held(one) | Event::Refused(one, _) => {
                (one.resource_type, one.name.clone(), !one.origins.is_empty())
            }
            Event::Unwanted(resource_type, name) | Event::Gone(resource_type, name) => {
                (*resource_type, name.clone(), false)
            }
        };
        let key = (resource_type, name);
        // Most resources come from no user object; they never get a record.
        if !has_origins && !proxy.tracked.contains_key(&key) {
            return;
        }
        let tracked = proxy.tracked.entry(key.clone()).or_default();
        let before = tracked.shares();
        match event {
            Event::Wanted(resource) => tracked.wanted = Some(resource.clone()),
            Event::Unwanted(..) => tracked.wanted = None,
            Event::Sent(resource) => tracked.sent = Some(resource.version.clone()),
            Event::Held(resource) => {
                tracked.held = Some(resource.clone());
                tracked.refused = None;
            }
            Event::Refused(resource, reason) => {
                tracked.refused = Some((resource.version.clone(), reason.clone()));
            }
            Event::Gone(..) => tracked.held = None,
        }
        let after = tracked.shares();
        let refusal = tracked.refusal().cloned();
        let id = proxy.id.clone();
        if after.is_empty() {
            proxy.tracked.remove(&key);
        }
        for name in before
            .keys()
            .chain(after.keys().filter(|name| !before.contains_key(*name)))
        {
            let old = before.get(name).copied().unwrap_or_default();
            let new = after.get(name).copied().unwrap_or_default();
            let object = self.objects.entry(name.clone()).or_default();
            if object.shift(client, &id, &key, old, new, refusal.as_ref(), now) {
                changed.insert(name.clone());
            }
            self.prune(name);
        }
    }

    /// A generation has been translated, and every connected proxy has been given what it needs of it.
    pub fn observe(&mut self, name: &Arc<str>, generation: i64, now: Duration) -> HashSet<Arc<str>> {
        let object = self.objects.entry(name.clone()).or_default();
        if generation < object.generation {
            // Deleted and created again: generations start anew.
            object.acked.clear();
            for stand in object.stands.values_mut() {
                stand.acked = 0;
                stand.given = 0;
                *object.acked.entry(0).or_default() += 1;
            }
        }
        if generation != object.generation {
            object.observed_at = now;
            object.last = None;
            object.complete = false;
        }
        object.generation = generation;
        object.deleted = false;
        object.rejected = None;
        let settled: Vec<_> = object
            .stands
            .iter()
            .filter(|(_, stand)| stand.pending == 0)
            .map(|(client, _)| *client)
            .collect();
        for client in settled {
            let id = self
                .proxies
                .get(&client)
                .map(|proxy| proxy.id.clone())
                .unwrap_or_default();
            object.live(client, &id, now);
        }
        object.complete |= object.pending.is_empty();
        HashSet::from([name.clone()])
    }

    /// The control plane itself refuses a generation.
    pub fn reject(
        &mut self,
        name: &Arc<str>,
        generation: i64,
        reason: &str,
        _now: Duration,
    ) -> HashSet<Arc<str>> {
        let object = self.objects.entry(name.clone()).or_default();
        object.rejected = Some((generation, reason.into()));
        object.deleted = false;
        HashSet::from([name.clone()])
    }

    /// The object was deleted; it is forgotten once no proxy holds anything made from it.
    pub fn forget(&mut self, name: &Arc<str>) -> HashSet<Arc<str>> {
        let Some(object) = self.objects.get_mut(name) else {
            return HashSet::new();
        };
        object.deleted = true;
        object.rejected = None;
        self.prune(name);
        HashSet::from([name.clone()])
    }

    fn prune(&mut self, name: &Arc<str>) {
        let needless = |object: &Object| {
            let unknown = object.generation == 0 && object.rejected.is_none();
            object.stands.is_empty() && (object.deleted || unknown)
        };
        if self.objects.get(name).is_some_and(needless) {
            self.objects.remove(name);
        }
    }

    /// How live a generation of an object is.
    pub fn liveness(&self, name: &str, generation: i64) -> Liveness {
        let Some((name, object)) = self.objects.get_key_value(name) else {
            return Liveness {
                object: name.into(),
                generation,
                ..Liveness::default()
            };
        };
        let rejected = object
            .rejected
            .as_ref()
            .filter(|(rejected, _)| *rejected >= generation);
        let observed = object.generation >= generation && generation > 0;
        let newest = generation == object.generation;
        let waiting = object
            .pending
            .first()
            .and_then(|(_, client)| self.proxies.get(client));
        Liveness {
            object: name.clone(),
            generation,
            observed: observed || rejected.is_some(),
            needed: object.stands.len(),
            sent: object.stands.len() - object.unsent,
            acked: object.acked.range(generation..).map(|(_, count)| count).sum(),
            refused: object.refused.len(),
            refusals: object
                .refused
                .iter()
                .flat_map(|(client, refusals)| refusals.iter().map(move |refusal| (client, refusal)))
                .take(QUOTED_REFUSALS)
                .map(|(client, (key, reason))| self.refused(*client, key, reason))
                .collect(),
            rejected: rejected.map(|(_, reason)| reason.clone()),
            slowest: waiting
                .map(|proxy| proxy.id.clone())
                .or_else(|| object.last.as_ref().map(|(proxy, _)| proxy.clone())),
            live_after: object
                .last
                .as_ref()
                .filter(|_| newest && observed && object.complete)
                .map(|(_, after)| *after),
        }
    }

    fn refused(&self, client: ClientId, key: &Key, reason: &Arc<str>) -> Refused {
        Refused {
            proxy: self
                .proxies
                .get(&client)
                .map(|proxy| proxy.id.clone())
                .unwrap_or_default(),
            resource: format!("{} {}", key.0.abbreviation(), key.1).into(),
            reason: reason.clone(),
        }
    }

    /// Every known object with its newest generation, by name.
    pub fn objects(&self) -> Vec<Liveness> {
        let mut names: Vec<_> = self
            .objects
            .iter()
            .filter(|(_, object)| !object.deleted)
            .collect();
        names.sort_unstable_by_key(|(name, _)| (*name).clone());
        names
            .into_iter()
            .map(|(name, object)| self.liveness(name, object.newest()))
            .collect()
    }

    /// How each proxy that needs an object stands.
    pub fn report(&self, name: &str) -> ObjectReport {
        let object = self.objects.get(name);
        let liveness = self.liveness(name, object.map_or(0, Object::newest));
        let mut proxies: Vec<_> = object
            .into_iter()
            .flat_map(|object| {
                object
                    .stands
                    .iter()
                    .map(move |(client, stand)| (object, client, stand))
            })
            .map(|(object, client, stand)| {
                let refusal = object
                    .refused
                    .get(client)
                    .and_then(|refusals| refusals.first_key_value());
                let word = match refusal {
                    Some((key, reason)) => ProxyStand::Refused(self.refused(*client, key, reason)),
                    None if stand.pending == 0 => ProxyStand::Acked,
                    None if stand.unsent == 0 => ProxyStand::Sent,
                    None => ProxyStand::Needed,
                };
                let id = self
                    .proxies
                    .get(client)
                    .map(|proxy| proxy.id.clone())
                    .unwrap_or_default();
                (id, stand.acked, word)
            })
            .collect();
        proxies.sort_unstable_by(|one, two| one.0.cmp(&two.0));
        ObjectReport { liveness, proxies }
    }

    /// Every connected proxy with what it still owes, by node id.
    pub fn proxies(&self) -> Vec<ProxyReport> {
        let mut reports: Vec<_> = self
            .proxies
            .iter()
            .map(|(client, proxy)| ProxyReport {
                proxy: proxy.id.clone(),
                pending: proxy
                    .tracked
                    .values()
                    .filter(|tracked| !tracked.in_sync())
                    .count(),
                refused: proxy
                    .tracked
                    .iter()
                    .filter_map(|(key, tracked)| Some(self.refused(*client, key, tracked.refusal()?)))
                    .collect(),
            })
            .collect();
        reports.sort_unstable_by(|one, two| one.proxy.cmp(&two.proxy));
        reports
    }
}

impl Object {
    fn newest(&self) -> i64 {
        self.generation
            .max(self.rejected.as_ref().map_or(0, |(generation, _)| *generation))
    }

    /// Replaces one resource's share for one proxy; returns whether anything changed.
    fn shift(
        &mut self,
        client: ClientId,
        id: &Arc<str>,
        key: &Key,
        old: Share,
        new: Share,
        refusal: Option<&Arc<str>>,
        now: Duration,
    ) -> bool {
        match refusal.filter(|_| new.refused) {
            Some(reason) => {
                self.refused
                    .entry(client)
                    .or_default()
                    .insert(key.clone(), reason.clone());
            }
            None if old.refused => self.drop_refusal(client, key),
            None => {}
        }
        if old == new {
            return false;
        }
        if !self.stands.contains_key(&client) {
            *self.acked.entry(0).or_default() += 1;
        }
        let stand = self.stands.entry(client).or_default();
        let had_unsent = stand.unsent > 0;
        let had_pending = stand.pending > 0;
        add(&mut stand.needs, old.needs, new.needs);
        add(&mut stand.pending, old.pending, new.pending);
        add(&mut stand.unsent, old.unsent, new.unsent);
        stand.given = stand.given.max(new.generation);
        add(&mut self.unsent, had_unsent, stand.unsent > 0);
        match (had_pending, stand.pending > 0) {
            (false, true) => {
                stand.pending_since = now;
                self.pending.insert((now, client));
            }
            (true, false) => drop(self.pending.remove(&(stand.pending_since, client))),
            (false, false) | (true, true) => {}
        }
        if stand.needs == 0 && stand.pending == 0 {
            self.drop_stand(client);
        } else if stand.pending == 0 {
            self.live(client, id, now);
        }
        true
    }

    /// Nothing is pending for the proxy: it runs with the newest generation that it can know.
    fn live(&mut self, client: ClientId, id: &Arc<str>, now: Duration) {
        let Some(stand) = self.stands.get_mut(&client) else {
            return;
        };
        let generation = self.generation.max(stand.given);
        if stand.acked >= generation {
            return;
        }
        release(&mut self.acked, stand.acked);
        stand.acked = generation;
        *self.acked.entry(generation).or_default() += 1;
        if !self.complete {
            self.last = Some((id.clone(), now.saturating_sub(self.observed_at)));
            self.complete = self.pending.is_empty() && generation == self.generation;
        }
    }

    fn drop_stand(&mut self, client: ClientId) {
        let Some(stand) = self.stands.remove(&client) else {
            return;
        };
        release(&mut self.acked, stand.acked);
        self.pending.remove(&(stand.pending_since, client));
        self.refused.remove(&client);
        self.unsent -= usize::from(stand.unsent > 0);
    }

    fn drop_refusal(&mut self, client: ClientId, key: &Key) {
        if let Some(refusals) = self.refused.get_mut(&client) {
            refusals.remove(key);
            if refusals.is_empty() {
                self.refused.remove(&client);
            }
        }
    }
}

fn add(count: &mut usize, old: bool, new: bool) {
    *count = *count + usize::from(new) - usize::from(old);
}

fn release(counts: &mut BTreeMap<i64, usize>, generation: i64) {
    if let Some(count) = counts.get_mut(&generation) {
        *count -= 1;
        if *count == 0 {
            counts.remove(&generation);
        }
    }
}

#[cfg(test)]
impl Book {
    /// Needed, sent and refused of an object, counted over all resources of all proxies.
    pub(super) fn count_from_scratch(&self, object: &str) -> (usize, usize, usize) {
        let (mut needed, mut sent, mut refused) = (0, 0, 0);
        for proxy in self.proxies.values() {
            let shares: Vec<_> = proxy
                .tracked
                .values()
                .filter_map(|tracked| tracked.shares().get(object).copied())
                .collect();
            if shares.iter().any(|share| share.needs || share.pending) {
                needed += 1;
                sent += usize::from(!shares.iter().any(|share| share.unsent));
            }
            refused += usize::from(shares.iter().any(|share| share.refused));
        }
        (needed, sent, refused)
    }
}
