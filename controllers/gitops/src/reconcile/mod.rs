//! `Kustomization` objects: what makes one move, and whose turn it is.
//!
//! ```text
//! changes of Kustomizations ─┐
//! new revisions ─────────────┤           ┌─ gate (pure) ─ build ─ plan (pure) ─ apply ─ prune ─┐
//! live objects (drift, health)├─▶ queue ─▶ pass                                                 ├─▶ status
//! readiness of dependencies ─┤           └─ settle: health (pure) ───────────────────────────┘
//! appointments (interval, retry, deadline)
//! ```
//!
//! A pass is short: it never waits for health. It leaves a deadline behind, and events of the objects bring it back.

mod conditions;
mod decryption;
mod finalize;
mod gate;
mod index;
mod memory;
mod pass;
mod refused;
mod settle;
mod variables;
mod work;

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Weak};

use k8s_openapi::api::core::v1::{ConfigMap, ObjectReference, Secret};
use kube::runtime::watcher;
use kube::{Api, Client, Resource as _, ResourceExt as _};
use parking_lot::Mutex;
use serin_crds::flux::kustomize::Kustomization;
use serin_crds::flux::source::GitRepository;
use serin_kit::cache::{Cache, Change};
use serin_kit::condition;
use serin_kit::events::Recorder;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use self::index::{Index, Refers};
use self::memory::Memory;
use crate::apply::Applier;
use crate::apply::discovery::Discovery;
use crate::apply::live::Live;
use crate::health::{self};
use crate::key::{Key, ObjectId};
use crate::plan::{self, Action};
use crate::queue::{self, Queue, Urgency};
use crate::source::store::Artifacts;
use crate::status::StatusWriter;
use crate::timeline::Timeline;

/// The field manager of status writes, as Flux.
const STATUS_MANAGER: &str = "gotk-kustomize-controller";
/// A ConfigMap or Secret with this label wakes those that take variables from it.
const WATCH_LABEL: &str = "reconcile.fluxcd.io/watch=Enabled";
/// The annotation with which people ask for a pass.
pub(crate) const REQUESTED_AT: &str = "reconcile.fluxcd.io/requestedAt";

/// What is known of an object when its last change was handled.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Seen {
    uid: Option<String>,
    generation: Option<i64>,
    requested: Option<String>,
    deleting: bool,
    /// Ready, on which generation, with which revision: what dependents wait for.
    readiness: (bool, Option<i64>, Option<String>),
}

impl Seen {
    fn of(ks: &Kustomization) -> Self {
        let status = ks.status.as_ref();
        Self {
            uid: ks.uid(),
            generation: ks.metadata.generation,
            requested: ks.annotations().get(REQUESTED_AT).cloned(),
            deleting: ks.metadata.deletion_timestamp.is_some(),
            readiness: (
                status.is_some_and(|s| condition::is_true(&s.conditions, "Ready")),
                status.and_then(|s| s.observed_generation),
                status.and_then(|s| s.last_applied_revision.clone()),
            ),
        }
    }

    fn asks_for_a_pass(&self, before: Option<&Self>) -> bool {
        before.is_none_or(|b| {
            (&b.uid, b.generation, &b.requested, b.deleting)
                != (&self.uid, self.generation, &self.requested, self.deleting)
        })
    }
}

/// The controller.
pub(crate) struct Kustomizations {
    client: Client,
    cache: Cache<Kustomization>,
    sources: Cache<GitRepository>,
    artifacts: Artifacts,
    applier: Applier,
    queue: Queue,
    memory: Mutex<HashMap<Key, Memory>>,
    index: Mutex<Index>,
    seen: Mutex<HashMap<Key, Seen>>,
    status: StatusWriter<Kustomization>,
    recorder: Recorder,
    timeline: Timeline,
}

/// What the controller needs from around it.
pub(crate) struct Parts {
    pub(crate) client: Client,
    pub(crate) cache: Cache<Kustomization>,
    pub(crate) sources: Cache<GitRepository>,
    pub(crate) artifacts: Artifacts,
    pub(crate) recorder: Recorder,
    pub(crate) timeline: Timeline,
    pub(crate) cancel: CancellationToken,
    pub(crate) tasks: TaskTracker,
}

impl Kustomizations {
    pub(crate) fn new(parts: Parts) -> Arc<Self> {
        Arc::new_cyclic(|this: &Weak<Self>| {
            let discovery = Discovery::new(parts.client.clone());
            let this = this.clone();
            let on_change = move |id: &ObjectId, owner: Option<Key>| {
                if let (Some(this), Some(owner)) = (this.upgrade(), owner) {
                    this.live_changed(id, &owner);
                }
            };
            let live = Live::new(
                discovery.clone(),
                Box::new(on_change),
                parts.cancel.clone(),
                parts.tasks.clone(),
            );
            Self {
                applier: Applier::new(discovery, live),
                status: StatusWriter::new(parts.client.clone(), STATUS_MANAGER),
                client: parts.client,
                cache: parts.cache,
                sources: parts.sources,
                artifacts: parts.artifacts,
                queue: Queue::default(),
                memory: Mutex::default(),
                index: Mutex::default(),
                seen: Mutex::default(),
                recorder: parts.recorder,
                timeline: parts.timeline,
            }
        })
    }

    /// Runs until `cancel`; passes under way end before it returns.
    pub(crate) async fn run(self: Arc<Self>, cancel: CancellationToken) {
        let triggers = self.clone().triggers(cancel.clone());
        let passes = queue::work(
            self,
            cancel,
            |this| &this.queue,
            |this, key| async move {
                this.reconcile(&key).await;
            },
        );
        tokio::join!(triggers, passes);
    }

    async fn triggers(self: Arc<Self>, cancel: CancellationToken) {
        let mut objects = self.cache.changes();
        let mut sources = self.sources.changes();
        let mut artifacts = self.artifacts.changes();
        let labelled = || watcher::Config::default().labels(WATCH_LABEL);
        let config_maps: Cache<ConfigMap> =
            Cache::start_with(Api::all(self.client.clone()), (), labelled(), cancel.clone());
        let secrets: Cache<Secret> =
            Cache::start_with(Api::all(self.client.clone()), (), labelled(), cancel.clone());
        let (mut maps, mut secs) = (config_maps.changes(), secrets.changes());
        self.resync();
        loop {
            tokio::select! {
                () = cancel.cancelled() => return,
                change = objects.next() => match change {
                    Some(Change::Applied(ks)) => self.object_applied(&ks),
                    Some(Change::Deleted(ks)) => self.object_deleted(&Key::of(ks.as_ref())),
                    Some(Change::Resync) => self.resync(),
                    None => return,
                },
                change = sources.next() => match change {
                    Some(Change::Applied(source) | Change::Deleted(source)) => self.source_changed(&Key::of(source.as_ref())),
                    Some(Change::Resync) => self.sources.list().iter().for_each(|s| self.source_changed(&Key::of(s.as_ref()))),
                    None => return,
                },
                change = artifacts.recv() => match change {
                    Ok(source) => self.clone().revision_changed(source).await,
                    Err(tokio::sync::broadcast::error::RecvError::Lagged(_)) => self.push_all(),
                    Err(tokio::sync::broadcast::error::RecvError::Closed) => return,
                },
                change = maps.next() => match change {
                    Some(Change::Applied(o) | Change::Deleted(o)) => self.variables_changed(&Refers::ConfigMap(Key::of(o.as_ref()))),
                    Some(Change::Resync) => {}
                    None => return,
                },
                change = secs.next() => match change {
                    Some(Change::Applied(o) | Change::Deleted(o)) => self.variables_changed(&Refers::Secret(Key::of(o.as_ref()))),
                    Some(Change::Resync) => {}
                    None => return,
                },
            }
        }
    }

    fn resync(&self) {
        let all = self.cache.list();
        let here: HashSet<Key> = all.iter().map(|ks| Key::of(ks.as_ref())).collect();
        let gone: Vec<Key> = self
            .seen
            .lock()
            .keys()
            .filter(|k| !here.contains(*k))
            .cloned()
            .collect();
        for key in gone {
            self.object_deleted(&key);
        }
        for ks in &all {
            self.object_applied(ks);
        }
    }

    fn push_all(&self) {
        for key in self.seen.lock().keys() {
            self.queue.push(key, Urgency::High);
        }
    }

    fn object_applied(&self, ks: &Kustomization) {
        let key = Key::of(ks);
        self.index.lock().apply(&key, ks);
        let now = Seen::of(ks);
        let before = self.seen.lock().insert(key.clone(), now.clone());
        if now.asks_for_a_pass(before.as_ref()) {
            self.queue.push(&key, Urgency::High);
        }
        if before.is_none_or(|b| b.readiness != now.readiness) {
            self.push_dependents(&key);
        }
    }

    fn object_deleted(&self, key: &Key) {
        self.index.lock().delete(key);
        self.seen.lock().remove(key);
        self.queue.push(key, Urgency::High);
        self.push_dependents(key);
    }

    fn push_dependents(&self, key: &Key) {
        let dependents = self.index.lock().referring_to(&Refers::Dependency(key.clone()));
        for dependent in dependents {
            self.queue.push(&dependent, Urgency::High);
        }
    }

    /// The source's object changed. Its revisions come through [`Artifacts`]; here only its absence and its words matter.
    fn source_changed(&self, source: &Key) {
        if self.artifacts.get(source).is_none() {
            for key in self.index.lock().referring_to(&Refers::Source(source.clone())) {
                self.queue.push(&key, Urgency::Low);
            }
        }
    }

    /// A new revision: those whose files changed go first, the others only note it.
    async fn revision_changed(self: Arc<Self>, source: Key) {
        let keys = self.index.lock().referring_to(&Refers::Source(source.clone()));
        let snapshot = self.artifacts.get(&source);
        let this = self.clone();
        let checked = tokio::task::spawn_blocking(move || {
            let mut unaffected = Vec::new();
            for key in keys {
                let built = this.memory.lock().get(&key).and_then(|m| m.built.clone());
                let same = match (&snapshot, built) {
                    (Some(snapshot), Some(built)) => built.reads.holds(snapshot).unwrap_or(false),
                    _ => false,
                };
                if same {
                    unaffected.push(key);
                    continue;
                }
                if let Some(memory) = this.memory.lock().get(&key) {
                    memory.superseded.cancel();
                }
                this.queue.push(&key, Urgency::High);
            }
            for key in unaffected {
                this.queue.push(&key, Urgency::Low);
            }
        });
        if checked.await.is_err() {
            self.push_all();
        }
    }

    fn variables_changed(&self, what: &Refers) {
        for key in self.index.lock().referring_to(what) {
            if let Some(memory) = self.memory.lock().get_mut(&key) {
                memory.variables_changed = true;
            }
            self.queue.push(&key, Urgency::High);
        }
    }

    /// A managed object changed. Costs one comparison of that object; only drift and changed health wake the owner.
    fn live_changed(&self, id: &ObjectId, owner: &Key) {
        let live = self.applier.live.get(id);
        let mut all = self.memory.lock();
        let Some(memory) = all.get_mut(owner) else { return };
        if memory.finalizing {
            self.queue.push(owner, Urgency::High);
        }
        let waits = memory.health.is_some();
        let Some(tracked) = memory.applied.as_mut().and_then(|a| a.objects.get_mut(id)) else {
            return;
        };
        let action = plan::decide(&tracked.desired, live.as_deref(), tracked.accepted.as_ref());
        if matches!(action, Action::Create | Action::Configure) && !tracked.skipped {
            memory.drift = true;
            self.queue.push(owner, Urgency::High);
            return;
        }
        if waits {
            // Custom rules may see what the generic ones do not, so only an unchanged verdict on a plain kind is silent.
            let state = live
                .as_ref()
                .map(|l| health::assess(&l.value, jiff::Timestamp::now()).state);
            let changed = state != tracked.state || id.group.contains('.');
            tracked.state = state;
            if changed {
                self.queue.push(owner, Urgency::High);
            }
        }
    }

    fn reference(&self, ks: &Kustomization) -> ObjectReference {
        ks.object_ref(&())
    }
}
