//! What is live, of all objects that some Kustomization applied: one watch per kind, shared by all.
//!
//! The watches ask for objects with our owner label only, so memory and traffic follow what is managed and not what the
//! cluster holds. Writes of ours are put in at once ([`Live::put`]), since a watch lags by a round trip and a plan must
//! not be made against the past. An object that loses the label is seen as deleted, which is drift.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use kube::core::DynamicObject;
use kube::runtime::WatchStreamExt as _;
use kube::runtime::watcher::{self, Event};
use parking_lot::{Mutex, RwLock};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::discovery::{Discovery, Served};
use crate::error::{Error, server_words};
use crate::key::{Key, ObjectId};
use crate::plan::{LiveObject, OWNER_NAME};

/// How long the first list of a kind may take.
const FIRST_LIST: Duration = Duration::from_secs(20);

/// Hears of every change of a managed object: the object, and whose it is (or was).
pub(crate) type OnChange = dyn Fn(&ObjectId, Option<Key>) + Send + Sync;

type Name = (String, String);

struct Kind {
    group: String,
    kind: String,
    objects: RwLock<HashMap<Name, Arc<LiveObject>>>,
    /// Counts changes, for those who wait for one.
    version: watch::Sender<u64>,
    state: watch::Sender<WatchState>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum WatchState {
    Starting,
    Watching,
    Failing(String),
    /// The kind is not served any more; the watch has ended.
    Gone,
}

/// The shared watches. Cloning shares them.
#[derive(Clone)]
pub(crate) struct Live {
    inner: Arc<Inner>,
}

struct Inner {
    discovery: Discovery,
    kinds: Mutex<HashMap<(String, String), Arc<Kind>>>,
    on_change: Box<OnChange>,
    cancel: CancellationToken,
    tasks: TaskTracker,
}

impl Live {
    pub(crate) fn new(
        discovery: Discovery,
        on_change: Box<OnChange>,
        cancel: CancellationToken,
        tasks: TaskTracker,
    ) -> Self {
        Self {
            inner: Arc::new(Inner {
                discovery,
                kinds: Mutex::default(),
                on_change,
                cancel,
                tasks,
            }),
        }
    }

    /// Makes sure that a kind is watched and its first list is in.
    pub(crate) async fn ensure(&self, served: &Served) -> Result<(), Error> {
        let kind = self.kind(served);
        let mut state = kind.state.subscribe();
        let name = format!("{} ({})", served.resource.kind, served.resource.api_version);
        let wait = async {
            loop {
                match &*state.borrow_and_update() {
                    WatchState::Watching => return Ok(()),
                    WatchState::Failing(reason) => {
                        return Err(Error::Deadline {
                            what: format!("cannot watch {name}: {reason}; trying again, no answer"),
                            after: FIRST_LIST,
                        });
                    }
                    WatchState::Gone => {
                        return Err(Error::Deadline {
                            what: format!("{name} is not served any more, no watch"),
                            after: FIRST_LIST,
                        });
                    }
                    WatchState::Starting => {}
                }
                if state.changed().await.is_err() {
                    return Err(Error::Stopping);
                }
            }
        };
        tokio::time::timeout(FIRST_LIST, wait)
            .await
            .map_err(|_| Error::Deadline {
                what: format!("the watch of {name} delivered no first list"),
                after: FIRST_LIST,
            })?
    }

    fn kind(&self, served: &Served) -> Arc<Kind> {
        let key = (served.resource.group.clone(), served.resource.kind.clone());
        let mut kinds = self.inner.kinds.lock();
        if let Some(kind) = kinds.get(&key)
            && *kind.state.borrow() != WatchState::Gone
        {
            return kind.clone();
        }
        let kind = Arc::new(Kind {
            group: key.0.clone(),
            kind: key.1.clone(),
            objects: RwLock::default(),
            version: watch::channel(0).0,
            state: watch::channel(WatchState::Starting).0,
        });
        kinds.insert(key, kind.clone());
        let live = self.clone();
        let served = served.clone();
        let task = kind.clone();
        self.inner.tasks.spawn(async move {
            let cancel = live.inner.cancel.clone();
            tokio::select! {
                () = cancel.cancelled() => {}
                () = live.watch(&task, served) => {}
            }
        });
        kind
    }

    async fn watch(&self, kind: &Kind, served: Served) {
        let api = self.inner.discovery.api_all(&served);
        let config = watcher::Config::default().labels(OWNER_NAME);
        let mut events = watcher::watcher(api, config).default_backoff().boxed();
        let mut listed: Option<Vec<Name>> = None;
        while let Some(event) = events.next().await {
            match event {
                Ok(Event::Init) => listed = Some(Vec::new()),
                Ok(Event::InitApply(object)) => {
                    if let Some(listed) = &mut listed {
                        listed.push(name_of(&object));
                    }
                    self.take(kind, object);
                }
                Ok(Event::InitDone) => {
                    let listed: std::collections::HashSet<Name> =
                        listed.take().unwrap_or_default().into_iter().collect();
                    let gone: Vec<Name> = kind
                        .objects
                        .read()
                        .keys()
                        .filter(|n| !listed.contains(*n))
                        .cloned()
                        .collect();
                    for name in gone {
                        self.drop_object(kind, &name, None);
                    }
                    kind.state.send_replace(WatchState::Watching);
                }
                Ok(Event::Apply(object)) => self.take(kind, object),
                Ok(Event::Delete(object)) => {
                    let version = crate::status::resource_version(&object);
                    self.drop_object(kind, &name_of(&object), Some(version));
                }
                Err(error) => {
                    let words = match &error {
                        watcher::Error::InitialListFailed(e) | watcher::Error::WatchStartFailed(e) => {
                            server_words(e)
                        }
                        other => other.to_string(),
                    };
                    let gone = matches!(&error, watcher::Error::InitialListFailed(kube::Error::Api(s)) | watcher::Error::WatchStartFailed(kube::Error::Api(s)) if s.code == 404);
                    if gone {
                        self.inner.discovery.forget(&served.resource.api_version);
                        kind.state.send_replace(WatchState::Gone);
                        return;
                    }
                    tracing::debug!(kind = %kind.kind, error = %words, "watch of managed objects failed; the last known state stays");
                    kind.state.send_if_modified(|state| {
                        let starting = *state != WatchState::Watching;
                        if starting {
                            *state = WatchState::Failing(words);
                        }
                        starting
                    });
                }
            }
        }
    }

    fn take(&self, kind: &Kind, object: DynamicObject) {
        let name = name_of(&object);
        let Ok(value) = serde_json::to_value(object) else {
            return;
        };
        self.store(kind, name, LiveObject::new(value));
    }

    fn store(&self, kind: &Kind, name: Name, object: LiveObject) {
        let owner = object.owner();
        let Some(owner) = owner else {
            // A server that does not know label selectors, or a write that took our label away.
            self.drop_object(kind, &name, Some(object.resource_version));
            return;
        };
        let before = {
            let mut objects = kind.objects.write();
            match objects.get(&name) {
                Some(held)
                    if held.resource_version >= object.resource_version
                        && object.resource_version != 0
                        && same_uid(held, &object) =>
                {
                    return;
                }
                _ => objects.insert(name.clone(), Arc::new(object)),
            }
        };
        let former = before.and_then(|b| b.owner()).filter(|former| *former != owner);
        self.changed(kind, name, Some(owner), former);
    }

    fn drop_object(&self, kind: &Kind, name: &Name, version: Option<u64>) {
        let removed = {
            let mut objects = kind.objects.write();
            match (objects.get(name), version) {
                // An old deletion, of the object that was here before ours was created.
                (Some(held), Some(version)) if held.resource_version > version => None,
                _ => objects.remove(name),
            }
        };
        if let Some(removed) = removed {
            self.changed(kind, name.clone(), removed.owner(), None);
        }
    }

    fn changed(&self, kind: &Kind, name: Name, owner: Option<Key>, former: Option<Key>) {
        kind.version.send_modify(|v| *v += 1);
        let id = ObjectId {
            group: kind.group.clone(),
            kind: kind.kind.clone(),
            namespace: name.0,
            name: name.1,
        };
        (self.inner.on_change)(&id, owner);
        if former.is_some() {
            (self.inner.on_change)(&id, former);
        }
    }

    /// The object as last seen; only those that carry an owner label are here.
    pub(crate) fn get(&self, id: &ObjectId) -> Option<Arc<LiveObject>> {
        let kind = self
            .inner
            .kinds
            .lock()
            .get(&(id.group.clone(), id.kind.clone()))
            .cloned()?;
        let objects = kind.objects.read();
        objects.get(&(id.namespace.clone(), id.name.clone())).cloned()
    }

    /// Whether some managed object of a kind fulfils a condition.
    pub(crate) fn any(&self, group: &str, kind: &str, condition: impl Fn(&LiveObject) -> bool) -> bool {
        let kind = self
            .inner
            .kinds
            .lock()
            .get(&(group.to_string(), kind.to_string()))
            .cloned();
        kind.is_some_and(|kind| kind.objects.read().values().any(|object| condition(object)))
    }

    /// Puts in what a write of ours returned.
    pub(crate) fn put(&self, id: &ObjectId, object: LiveObject) {
        let kind = self
            .inner
            .kinds
            .lock()
            .get(&(id.group.clone(), id.kind.clone()))
            .cloned();
        if let Some(kind) = kind {
            self.store(&kind, (id.namespace.clone(), id.name.clone()), object);
        }
    }

    /// Waits until `done` says so, looking again whenever an object of the kind changes.
    pub(crate) async fn wait(
        &self,
        id: &ObjectId,
        mut done: impl FnMut(Option<&LiveObject>) -> bool,
    ) -> Result<(), Error> {
        let kind = self
            .inner
            .kinds
            .lock()
            .get(&(id.group.clone(), id.kind.clone()))
            .cloned();
        let Some(kind) = kind else { return Ok(()) };
        let mut version = kind.version.subscribe();
        loop {
            version.borrow_and_update();
            if done(self.get(id).as_deref()) {
                return Ok(());
            }
            version.changed().await.map_err(|_| Error::Stopping)?;
        }
    }
}

fn name_of(object: &DynamicObject) -> Name {
    let metadata = &object.metadata;
    (
        metadata.namespace.clone().unwrap_or_default(),
        metadata.name.clone().unwrap_or_default(),
    )
}

fn same_uid(a: &LiveObject, b: &LiveObject) -> bool {
    a.value.pointer("/metadata/uid") == b.value.pointer("/metadata/uid")
}
