//! The object store as a state machine: no clock, no files, no tasks.
//!
//! One counter of resource versions over all kinds. Each kind keeps its objects by `namespace/name` and a bounded history of events;
//! a watcher is a position in that history, so a slow one costs nothing and finds itself too old when the history has moved on.
//!
//! A write has two moments. [`Store::put`] and [`Store::remove`] *stage* it: it has a version, and writers that expect the state before
//! it lose, but no reader, list or watch sees it. [`Store::publish`] shows what has become durable meanwhile, in order. So nobody is ever
//! shown what a crash could take back.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use serde_json::Value;

use crate::kinds::ResourceId;
use crate::meta;

/// Events kept per kind for watchers that come back.
pub(crate) const HISTORY_EVENTS: usize = 4096;
/// Approximate bytes of history kept per kind.
pub(crate) const HISTORY_BYTES: usize = 32 << 20;

/// A stored object: immutable, shared by readers, encoded once.
#[derive(Debug)]
pub(crate) struct Stored {
    pub(crate) value: Value,
    pub(crate) rv: u64,
    bare: OnceLock<Bytes>,
}

/// The beginning of an encoded object: its type.
#[derive(Debug, Clone)]
pub(crate) struct TypeHead(Vec<u8>);

impl TypeHead {
    pub(crate) fn new(kind: &str, api_version: &str) -> Self {
        let text = |s: &str| serde_json::to_string(s).unwrap_or_default();
        Self(format!("{{\"kind\":{},\"apiVersion\":{},", text(kind), text(api_version)).into_bytes())
    }
}

impl Stored {
    /// Takes the object and writes its resource version into it.
    pub(crate) fn new(mut value: Value, rv: u64) -> Self {
        meta::metadata_mut(&mut value).insert("resourceVersion".into(), Value::String(rv.to_string()));
        Self {
            value,
            rv,
            bare: OnceLock::new(),
        }
    }

    /// The object as JSON without its kind and apiVersion: what all its served versions share, encoded once.
    pub(crate) fn bare(&self) -> &Bytes {
        self.bare.get_or_init(|| {
            let mut out = Vec::with_capacity(512);
            let members = self
                .value
                .as_object()
                .into_iter()
                .flatten()
                .filter(|(k, _)| *k != "kind" && *k != "apiVersion");
            // An object of strings, numbers and lists always encodes.
            let _ = serde::Serializer::collect_map(&mut serde_json::Serializer::new(&mut out), members);
            out.into()
        })
    }

    /// Write the object as a given type. An object always has metadata, so something follows the head.
    pub(crate) fn write(&self, head: &TypeHead, out: &mut impl bytes::BufMut) {
        out.put_slice(&head.0);
        out.put_slice(self.bare().get(1..).unwrap_or_default());
    }

    /// The object as it is stored, whole.
    pub(crate) fn whole(&self) -> Vec<u8> {
        let text = |key: &str| self.value.get(key).and_then(Value::as_str).unwrap_or_default();
        let mut out = Vec::with_capacity(self.bare().len() + 64);
        self.write(&TypeHead::new(text("kind"), text("apiVersion")), &mut out);
        out
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Change {
    Added,
    Modified,
    Deleted,
}

/// One change of one object.
#[derive(Debug)]
pub(crate) struct Event {
    pub(crate) rv: u64,
    pub(crate) change: Change,
    pub(crate) key: Arc<str>,
    /// The state after the change; for a deletion the last state under the new resource version.
    pub(crate) object: Arc<Stored>,
    pub(crate) previous: Option<Arc<Stored>>,
}

#[derive(Debug, Default)]
struct Table {
    /// What readers see.
    objects: BTreeMap<Arc<str>, Arc<Stored>>,
    /// Where the staged writes have got to: the version of the last one of a key, and its object unless that deleted it.
    ahead: HashMap<Arc<str>, (u64, Option<Arc<Stored>>)>,
    history: VecDeque<Arc<Event>>,
    history_bytes: usize,
    /// Every event up to and including this version may be gone from the history.
    trimmed: u64,
}

/// What a write expects of the object it replaces.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Expect {
    Absent,
    At(u64),
}

/// The store changed under the writer.
#[derive(Debug)]
pub(crate) enum Lost {
    Exists,
    Changed,
    Missing,
}

/// A page of a list.
#[derive(Debug)]
pub(crate) struct Page {
    pub(crate) items: Vec<Arc<Stored>>,
    /// The key after which the next page begins.
    pub(crate) next_after: Option<Arc<str>>,
    /// Objects that remain after this page, where that is known without looking at them.
    pub(crate) remaining: usize,
    pub(crate) rv: u64,
}

/// All objects of all kinds.
#[derive(Debug)]
pub(crate) struct Store {
    /// The newest version that readers see.
    rv: u64,
    /// The newest version that was given out.
    head: u64,
    /// Writes that are not published yet, in the order of their versions.
    staged: VecDeque<(ResourceId, Arc<Event>)>,
    tables: HashMap<ResourceId, Table>,
    /// History before this version is not known (the server started there).
    origin: u64,
    history_events: usize,
    /// The last events of all kinds, for controllers that follow everything.
    journal: VecDeque<(ResourceId, Arc<Event>)>,
    journal_trimmed: u64,
}

/// Events of all kinds kept for controllers.
const JOURNAL_EVENTS: usize = 8192;

impl Table {
    /// The state that the next write has to expect.
    fn head(&self, key: &str) -> Option<&Arc<Stored>> {
        match self.ahead.get(key) {
            Some((_, object)) => object.as_ref(),
            None => self.objects.get(key),
        }
    }
}

impl Store {
    pub(crate) fn new(first_rv: u64) -> Self {
        Self {
            rv: first_rv,
            head: first_rv,
            staged: VecDeque::new(),
            tables: HashMap::new(),
            origin: first_rv,
            history_events: HISTORY_EVENTS,
            journal: VecDeque::new(),
            journal_trimmed: first_rv,
        }
    }

    pub(crate) fn set_history_limit(&mut self, events: usize) {
        self.history_events = events.max(1);
    }

    pub(crate) fn rv(&self) -> u64 {
        self.rv
    }

    pub(crate) fn get(&self, resource: &str, key: &str) -> Option<&Arc<Stored>> {
        self.tables.get(resource)?.objects.get(key)
    }

    /// Restore an object at start-up: no event.
    pub(crate) fn restore(&mut self, resource: &ResourceId, key: &str, value: Value, rv: u64) {
        self.rv = self.rv.max(rv);
        self.head = self.rv;
        self.origin = self.rv;
        let table = self.tables.entry(resource.clone()).or_default();
        table.objects.insert(key.into(), Arc::new(Stored::new(value, rv)));
    }

    pub(crate) fn forget(&mut self, resource: &str, key: &str, rv: u64) {
        self.rv = self.rv.max(rv);
        self.head = self.rv;
        self.origin = self.rv;
        if let Some(table) = self.tables.get_mut(resource) {
            table.objects.remove(key);
        }
    }

    /// Leave a gap so that versions that were given out but not made durable are never given out again.
    pub(crate) fn skip_versions(&mut self, gap: u64) {
        self.rv += gap;
        self.head = self.rv;
        self.origin = self.rv;
        self.journal_trimmed = self.rv;
    }

    /// Version of the staged write that a key waits for, if there is one.
    pub(crate) fn staged_at(&self, resource: &str, key: &str) -> Option<u64> {
        Some(self.tables.get(resource)?.ahead.get(key)?.0)
    }

    /// Stage the creation or replacement of an object.
    pub(crate) fn put(
        &mut self,
        resource: &ResourceId,
        key: &str,
        value: Value,
        expect: Expect,
    ) -> Result<Arc<Event>, Lost> {
        let table = self.tables.entry(resource.clone()).or_default();
        let previous = table.head(key).cloned();
        match (expect, &previous) {
            (Expect::Absent, Some(_)) => return Err(Lost::Exists),
            (Expect::At(_), None) => return Err(Lost::Missing),
            (Expect::At(rv), Some(p)) if p.rv != rv => return Err(Lost::Changed),
            _ => {}
        }
        self.head += 1;
        let key: Arc<str> = key.into();
        let object = Arc::new(Stored::new(value, self.head));
        table.ahead.insert(key.clone(), (self.head, Some(object.clone())));
        let event = Event {
            rv: self.head,
            change: if previous.is_some() {
                Change::Modified
            } else {
                Change::Added
            },
            key,
            object,
            previous,
        };
        Ok(self.stage(resource, event))
    }

    /// Stage the deletion of an object; `last` is its final state as watchers shall see it.
    pub(crate) fn remove(
        &mut self,
        resource: &ResourceId,
        key: &str,
        last: Value,
        rv: u64,
    ) -> Result<Arc<Event>, Lost> {
        let table = self.tables.entry(resource.clone()).or_default();
        let previous = match table.head(key) {
            None => return Err(Lost::Missing),
            Some(p) if p.rv != rv => return Err(Lost::Changed),
            Some(p) => p.clone(),
        };
        self.head += 1;
        let key: Arc<str> = key.into();
        table.ahead.insert(key.clone(), (self.head, None));
        let event = Event {
            rv: self.head,
            change: Change::Deleted,
            key,
            object: Arc::new(Stored::new(last, self.head)),
            previous: Some(previous),
        };
        Ok(self.stage(resource, event))
    }

    fn stage(&mut self, resource: &ResourceId, event: Event) -> Arc<Event> {
        let event = Arc::new(event);
        self.staged.push_back((resource.clone(), event.clone()));
        event
    }

    /// Writes of one kind that [`Self::publish`] up to this version will show, in their order.
    pub(crate) fn to_be_published(&self, resource: &str, durable: u64) -> Vec<Arc<Event>> {
        self.staged
            .iter()
            .take_while(|(_, event)| event.rv <= durable)
            .filter(|(of, _)| **of == *resource)
            .map(|(_, event)| event.clone())
            .collect()
    }

    /// Show every staged write up to a version; the kinds that changed, each with its newest version.
    pub(crate) fn publish(&mut self, durable: u64) -> Vec<(ResourceId, u64)> {
        let mut changed: Vec<(ResourceId, u64)> = Vec::new();
        while self.staged.front().is_some_and(|(_, e)| e.rv <= durable) {
            let Some((resource, event)) = self.staged.pop_front() else {
                break;
            };
            self.rv = event.rv;
            let table = self.tables.entry(resource.clone()).or_default();
            if table.ahead.get(&event.key).is_some_and(|(rv, _)| *rv == event.rv) {
                table.ahead.remove(&event.key);
            }
            match event.change {
                Change::Added | Change::Modified => {
                    table.objects.insert(event.key.clone(), event.object.clone());
                }
                Change::Deleted => {
                    table.objects.remove(&event.key);
                }
            }
            match changed.iter_mut().find(|(r, _)| *r == resource) {
                Some((_, rv)) => *rv = event.rv,
                None => changed.push((resource.clone(), event.rv)),
            }
            self.remember(&resource, event);
        }
        changed
    }

    fn remember(&mut self, resource: &ResourceId, event: Arc<Event>) {
        let limit = self.history_events;
        let table = self.tables.entry(resource.clone()).or_default();
        table.history_bytes += event.object.bare().len();
        table.history.push_back(event.clone());
        while table.history.len() > limit || table.history_bytes > HISTORY_BYTES {
            let Some(old) = table.history.pop_front() else {
                break;
            };
            table.history_bytes -= old.object.bare().len();
            table.trimmed = old.rv;
        }
        self.journal.push_back((resource.clone(), event));
        while self.journal.len() > JOURNAL_EVENTS {
            if let Some((_, old)) = self.journal.pop_front() {
                self.journal_trimmed = old.rv;
            }
        }
    }

    /// Events of all kinds after `rv`; `None` where they no longer reach back that far.
    pub(crate) fn journal_after(&self, rv: u64) -> Option<Vec<(ResourceId, Arc<Event>)>> {
        if rv < self.journal_trimmed {
            return None;
        }
        let start = self.journal.partition_point(|(_, e)| e.rv <= rv);
        Some(self.journal.iter().skip(start).cloned().collect())
    }

    /// Discard all history, as etcd's compaction does.
    pub(crate) fn compact(&mut self) {
        self.origin = self.rv;
        for table in self.tables.values_mut() {
            table.history.clear();
            table.history_bytes = 0;
            table.trimmed = self.rv;
        }
    }

    /// Events of a kind after `rv`; `None` where the history no longer reaches back that far.
    pub(crate) fn events_after(&self, resource: &str, rv: u64) -> Option<Vec<Arc<Event>>> {
        let (trimmed, history) = match self.tables.get(resource) {
            Some(table) => (table.trimmed, Some(&table.history)),
            None => (0, None),
        };
        if rv < trimmed.max(self.origin) {
            return None;
        }
        let Some(history) = history else {
            return Some(Vec::new());
        };
        let start = history.partition_point(|e| e.rv <= rv);
        Some(history.iter().skip(start).cloned().collect())
    }

    /// Oldest version from which a watch of this kind can start.
    pub(crate) fn oldest(&self, resource: &str) -> u64 {
        self.tables
            .get(resource)
            .map_or(0, |t| t.trimmed)
            .max(self.origin)
    }

    /// Objects whose key begins with `prefix`, from the first key after `after`, at most `limit` that pass `keep`.
    pub(crate) fn list(
        &self,
        resource: &str,
        prefix: &str,
        after: Option<&str>,
        limit: Option<usize>,
        keep: impl Fn(&Stored) -> bool,
    ) -> Page {
        let mut page = Page {
            items: Vec::new(),
            next_after: None,
            remaining: 0,
            rv: self.rv,
        };
        let Some(table) = self.tables.get(resource) else {
            return page;
        };
        let start = match after {
            Some(after) => std::ops::Bound::Excluded(Arc::<str>::from(after)),
            None => std::ops::Bound::Included(Arc::<str>::from(prefix)),
        };
        let mut last: Option<Arc<str>> = None;
        for (key, object) in table.objects.range((start, std::ops::Bound::Unbounded)) {
            if !key.starts_with(prefix) {
                break;
            }
            if limit.is_some_and(|l| page.items.len() >= l) {
                if page.next_after.is_none() {
                    if !keep(object) {
                        continue;
                    }
                    page.next_after.clone_from(&last);
                }
                page.remaining += 1;
                continue;
            }
            if keep(object) {
                page.items.push(object.clone());
                last = Some(key.clone());
            }
        }
        page
    }

    /// The same list as it was at an older version; `None` where the history no longer reaches back that far.
    ///
    /// The events since then are undone, newest first, so the cost is in what changed, not in what exists.
    pub(crate) fn list_at(
        &self,
        resource: &str,
        prefix: &str,
        after: Option<&str>,
        limit: Option<usize>,
        rv: u64,
        keep: impl Fn(&Stored) -> bool,
    ) -> Option<Page> {
        let since = self.events_after(resource, rv)?;
        if since.is_empty() {
            let page = self.list(resource, prefix, after, limit, keep);
            return Some(Page { rv, ..page });
        }
        let mut undone: BTreeMap<Arc<str>, Option<Arc<Stored>>> = BTreeMap::new();
        for event in since.iter().rev() {
            undone.insert(event.key.clone(), event.previous.clone());
        }
        let start = || match after {
            Some(after) => std::ops::Bound::Excluded(Arc::<str>::from(after)),
            None => std::ops::Bound::Included(Arc::<str>::from(prefix)),
        };
        let range = (start(), std::ops::Bound::Unbounded);
        let now = self.tables.get(resource).map(|table| table.objects.range(range));
        let mut now = now.into_iter().flatten().peekable();
        let mut then = undone.range((start(), std::ops::Bound::Unbounded)).peekable();
        let mut page = Page {
            items: Vec::new(),
            next_after: None,
            remaining: 0,
            rv,
        };
        let mut last: Option<Arc<str>> = None;
        loop {
            let (key, object) = match (now.peek(), then.peek()) {
                (None, None) => break,
                (Some((key, _)), Some((changed, _))) if key < changed => {
                    let Some((key, object)) = now.next() else { break };
                    (key, Some(object))
                }
                (Some(_), None) => {
                    let Some((key, object)) = now.next() else { break };
                    (key, Some(object))
                }
                (current, Some((changed, _))) => {
                    if current.is_some_and(|(key, _)| key == changed) {
                        now.next();
                    }
                    let Some((key, before)) = then.next() else { break };
                    (key, before.as_ref())
                }
            };
            if !key.starts_with(prefix) {
                break;
            }
            let Some(object) = object.filter(|object| keep(object)) else {
                continue;
            };
            if limit.is_some_and(|limit| page.items.len() >= limit) {
                page.next_after = page.next_after.or_else(|| last.clone());
                page.remaining += 1;
            } else {
                page.items.push(object.clone());
                last = Some(key.clone());
            }
        }
        Some(page)
    }

    /// Every published object, for snapshots and for finding dependents.
    pub(crate) fn all(&self) -> impl Iterator<Item = (&ResourceId, &Arc<str>, &Arc<Stored>)> {
        self.tables
            .iter()
            .flat_map(|(r, t)| t.objects.iter().map(move |(k, o)| (r, k, o)))
    }

    pub(crate) fn count(&self, resource: &str) -> usize {
        self.tables.get(resource).map_or(0, |t| t.objects.len())
    }
}

/// `namespace/name`, or `name` of a cluster-scoped object. Sorted as etcd sorts its keys.
pub(crate) fn key(namespace: &str, name: &str) -> String {
    if namespace.is_empty() {
        name.to_owned()
    } else {
        format!("{namespace}/{name}")
    }
}

#[cfg(test)]
mod tests;
