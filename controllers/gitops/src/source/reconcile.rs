//! `GitRepository` objects: when to look at a remote, and what to say about it.
//!
//! A look is cheap when nothing moved (one listing of references), so every cause leads to one: a webhook's
//! annotation, an event of a watched local repository, a changed spec, the interval. A revision is published before the
//! status is written, so that who builds from it does not wait for the API server.

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Secret;
use kube::{Api, Client, Resource as _, ResourceExt as _};
use parking_lot::Mutex;
use serin_crds::flux::source::{GitRepository, GitRepositorySpec};
use serin_kit::cache::{Cache, Change};
use serin_kit::condition;
use serin_kit::events::Recorder;
use serin_kit::unhonoured::{self, Field};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::credentials::{Auth, Keys, Place, without_credentials};
use super::git::{self, Fetched, Request};
use super::local_watch::LocalWatches;
use super::reference::Wanted;
use super::status::{Fault, describe, refused};
use super::store::Artifacts;
use super::threads::{Job, Threads};
use super::tree::{Repo, Snapshot};
use crate::error::{Error, server_words};
use crate::key::Key;
use crate::queue::{self, Queue, Urgency, jittered};
use crate::reconcile::REQUESTED_AT;
use crate::status::StatusWriter;
use crate::timeline::{Timeline, What};

const STATUS_MANAGER: &str = "gotk-source-controller";
/// Flux's default for `spec.timeout`.
const TIMEOUT_DEFAULT: Duration = Duration::from_secs(60);
const INTERVAL_DEFAULT: Duration = Duration::from_secs(60);
/// First and longest pause after failures; the interval bounds it too. Flux: 750 ms to 15 min.
const RETRY_MIN: Duration = Duration::from_millis(750);
const RETRY_MAX: Duration = Duration::from_secs(900);

/// The controller.
pub(crate) struct Sources {
    client: Client,
    cache: Cache<GitRepository>,
    artifacts: Artifacts,
    threads: Threads,
    watches: Option<LocalWatches>,
    queue: Arc<Queue>,
    status: StatusWriter<GitRepository>,
    recorder: Recorder,
    timeline: Timeline,
    cache_dir: PathBuf,
    local_allowed: bool,
    memory: Mutex<HashMap<Key, Memory>>,
    repos: Mutex<HashMap<PathBuf, Arc<Repo>>>,
}

#[derive(Debug, Default)]
struct Memory {
    /// Its git cache, once it was looked at.
    cache: Option<PathBuf>,
    seen: Option<(Option<i64>, Option<String>, Option<String>)>,
    failures: u32,
}

/// The pause after this many failures in a row.
fn pause(failures: u32, interval: Duration) -> Duration {
    RETRY_MIN
        .saturating_mul(1 << failures.min(16).saturating_sub(1))
        .min(RETRY_MAX)
        .min(interval.max(RETRY_MIN))
}

/// What [`Sources::new`] needs.
pub(crate) struct Parts {
    pub(crate) client: Client,
    pub(crate) cache: Cache<GitRepository>,
    pub(crate) artifacts: Artifacts,
    pub(crate) recorder: Recorder,
    pub(crate) timeline: Timeline,
    pub(crate) cache_dir: PathBuf,
    pub(crate) local_allowed: bool,
}

impl Sources {
    pub(crate) fn new(parts: Parts) -> Result<Arc<Self>, Error> {
        crate::sys::init_libgit2();
        let queue = Arc::new(Queue::default());
        let watches = if parts.local_allowed {
            let queue = queue.clone();
            Some(LocalWatches::new(Arc::new(move |key: &Key| {
                queue.push(key, Urgency::High)
            }))?)
        } else {
            None
        };
        std::fs::create_dir_all(&parts.cache_dir).map_err(|source| Error::Io {
            action: "create the git cache",
            path: parts.cache_dir.display().to_string(),
            source,
        })?;
        Ok(Arc::new(Self {
            status: StatusWriter::new(parts.client.clone(), STATUS_MANAGER),
            client: parts.client,
            cache: parts.cache,
            artifacts: parts.artifacts,
            threads: Threads::new(),
            watches,
            queue,
            recorder: parts.recorder,
            timeline: parts.timeline,
            cache_dir: parts.cache_dir,
            local_allowed: parts.local_allowed,
            memory: Mutex::default(),
            repos: Mutex::default(),
        }))
    }

    /// Runs until `cancel`.
    pub(crate) async fn run(self: Arc<Self>, cancel: CancellationToken) {
        let triggers = self.clone().triggers(cancel.clone());
        let looks = queue::work(
            self.clone(),
            cancel,
            |this| &this.queue,
            |this, key| async move {
                this.reconcile(&key).await;
            },
        );
        tokio::join!(triggers, looks);
    }

    async fn triggers(self: Arc<Self>, cancel: CancellationToken) {
        let mut changes = self.cache.changes();
        self.resync();
        loop {
            let change = tokio::select! {
                () = cancel.cancelled() => return,
                change = changes.next() => change,
            };
            match change {
                Some(Change::Applied(object)) => self.changed(&object),
                Some(Change::Deleted(object)) => self.queue.push(&Key::of(object.as_ref()), Urgency::High),
                Some(Change::Resync) => self.resync(),
                None => return,
            }
        }
    }

    fn resync(&self) {
        for object in self.cache.list() {
            self.changed(&object);
        }
        let known: Vec<Key> = self.memory.lock().keys().cloned().collect();
        for key in known
            .iter()
            .filter(|k| self.cache.get(Some(&k.namespace), &k.name).is_none())
        {
            self.queue.push(key, Urgency::High);
        }
    }

    fn changed(&self, object: &GitRepository) {
        let key = Key::of(object);
        let now = (
            object.metadata.generation,
            object.annotations().get(REQUESTED_AT).cloned(),
            object.uid(),
        );
        let mut memory = self.memory.lock();
        let seen = &mut memory.entry(key.clone()).or_default().seen;
        if seen.as_ref() != Some(&now) {
            *seen = Some(now);
            self.queue.push(&key, Urgency::High);
        }
    }

    /// Removes the caches that no source uses. Does nothing while some source has not been looked at since the start.
    async fn sweep(&self) {
        let used: HashSet<PathBuf> = {
            let memory = self.memory.lock();
            let caches = self
                .cache
                .list()
                .iter()
                .map(|o| memory.get(&Key::of(o.as_ref())).and_then(|m| m.cache.clone()))
                .collect::<Option<_>>();
            let Some(used) = caches else { return };
            used
        };
        self.repos.lock().retain(|path, _| used.contains(path));
        let directory = self.cache_dir.clone();
        let removal = tokio::task::spawn_blocking(move || {
            let Ok(entries) = std::fs::read_dir(directory) else {
                return;
            };
            for path in entries
                .filter_map(|e| Some(e.ok()?.path()))
                .filter(|p| !used.contains(p))
            {
                if let Err(error) = std::fs::remove_dir_all(&path) {
                    tracing::debug!(path = %path.display(), %error, "an unused git cache stays");
                }
            }
        });
        if removal.await.is_err() {
            tracing::warn!("removing unused git caches ended abnormally");
        }
    }

    async fn reconcile(&self, key: &Key) {
        let object = self.cache.get(Some(&key.namespace), &key.name);
        let Some(object) = object.filter(|o| o.metadata.deletion_timestamp.is_none()) else {
            self.artifacts.remove(key);
            self.memory.lock().remove(key);
            self.status.forget(key);
            self.queue.cancel_at(key);
            if let Some(watches) = &self.watches {
                watches.forget(key);
            }
            self.sweep().await;
            return;
        };
        let object = self.status.newest(object);
        if object.spec.suspend == Some(true) {
            self.queue.cancel_at(key);
            return;
        }
        let interval = object.spec.interval.parse_or(INTERVAL_DEFAULT);
        let refused = refused(&object.spec);
        let result = if unhonoured::refuses(&refused) {
            Err(Fault::terminal("FieldsRefused", unhonoured::message(&refused)))
        } else {
            self.look(key, &object).await
        };
        let failures = {
            let mut memory = self.memory.lock();
            let memory = memory.entry(key.clone()).or_default();
            memory.failures = if result.is_err() { memory.failures + 1 } else { 0 };
            memory.failures
        };
        match &result {
            Err(fault) if fault.terminal => self.queue.cancel_at(key),
            Err(_) => self
                .queue
                .push_at(key, Instant::now() + pause(failures, interval)),
            Ok(_) => self.queue.push_at(key, Instant::now() + jittered(interval, key)),
        }
        if let Err(error) = self.say(key, &object, &refused, result).await {
            tracing::warn!(source = %key, %error, "status not written, trying again");
            self.queue
                .push_at(key, Instant::now() + pause(failures.max(1), interval));
        }
    }

    async fn look(&self, key: &Key, object: &GitRepository) -> Result<(Arc<Snapshot>, Fetched), Fault> {
        let spec = &object.spec;
        let invalid = |message: String| Fault::terminal("URLInvalid", message);
        let place = Place::parse(&spec.url, self.local_allowed).map_err(invalid)?;
        let wanted = Wanted::from_spec(spec.r#ref.as_ref()).map_err(invalid)?;
        let auth = self.auth(key, spec, &place).await?;
        let cache = self.cache_dir.join(auth.identity(&place));
        let moved = {
            let mut memory = self.memory.lock();
            let held = &mut memory.entry(key.clone()).or_default().cache;
            held.replace(cache.clone()).is_some_and(|before| before != cache)
        };
        if moved {
            self.sweep().await;
        }
        let deadline = spec
            .timeout
            .as_ref()
            .map_or(TIMEOUT_DEFAULT, |t| t.parse_or(TIMEOUT_DEFAULT));
        if self.artifacts.get(key).is_none() {
            self.take_up(key, object, &cache).await;
        }
        let request = Request {
            place: place.clone(),
            auth,
            wanted,
            cache: cache.clone(),
        };
        let url = without_credentials(&spec.url);
        let host = place.host();
        let job = Job {
            host: &host,
            cache: &cache,
            action: "fetch",
            url: &url,
            deadline,
        };
        let fetched = self.threads.run(job, move |stop| git::sync(&request, stop)).await;
        if let (Some(watches), Place::Local(path)) = (&self.watches, &place) {
            // Also after a failure: an empty repository gets its first commit some day.
            match watches.watch(key, path) {
                Ok(()) => {}
                Err(error) if fetched.is_ok() => {
                    tracing::warn!(source = %key, %error, "pushes will be seen at the interval only")
                }
                Err(_) => {}
            }
        }
        let fetched = fetched?;
        let snapshot = self.snapshot(object, &cache, &fetched)?;
        let missing = {
            let snapshot = snapshot.clone();
            tokio::task::spawn_blocking(move || snapshot.missing_sparse().map(|m| m.map(str::to_string)))
                .await
        };
        if let Ok(Some(directory)) = missing.map_err(|_| Error::Stopping)? {
            return Err(Fault {
                reason: "GitOperationFailed",
                message: format!(
                    "failed to sparse checkout directory '{directory}': it does not exist in revision {}",
                    fetched.revision
                ),
                terminal: false,
            });
        }
        let news = self
            .artifacts
            .get(key)
            .is_none_or(|a| a.revision != fetched.revision);
        if news {
            let what = What::RevisionSeen {
                subject: fetched.subject.clone(),
                author: fetched.author.clone(),
            };
            self.timeline
                .tell(format!("GitRepository/{key}"), &fetched.revision, what);
        }
        self.artifacts.publish(key, snapshot.clone());
        Ok((snapshot, fetched))
    }

    /// After a start: the revision of the last process, if its commit is still in the cache, so that a git server that
    /// is away does not matter.
    async fn take_up(&self, key: &Key, object: &GitRepository, cache: &std::path::Path) {
        let Some(known) = object
            .status
            .as_ref()
            .and_then(|s| s.artifact.as_ref())
            .map(|a| a.revision.clone())
        else {
            return;
        };
        let at = cache.to_path_buf();
        let fetched = tokio::task::spawn_blocking(move || git::from_cache(&at, &known))
            .await
            .ok()
            .flatten();
        if let Some(fetched) = fetched
            && let Ok(snapshot) = self.snapshot(object, cache, &fetched)
        {
            self.artifacts.publish(key, snapshot);
        }
    }

    fn snapshot(
        &self,
        object: &GitRepository,
        cache: &std::path::Path,
        fetched: &Fetched,
    ) -> Result<Arc<Snapshot>, Error> {
        let repo = {
            let mut repos = self.repos.lock();
            // A repository that nobody reads any more is closed.
            repos.retain(|path, repo| path == cache || Arc::strong_count(repo) > 1);
            match repos.get(cache).filter(|r| r.has(fetched.tree)) {
                Some(repo) => repo.clone(),
                None => {
                    let repo = Repo::open(cache)?;
                    repos.insert(cache.to_path_buf(), repo.clone());
                    repo
                }
            }
        };
        let spec = &object.spec;
        let snapshot = Snapshot::new(
            repo,
            fetched.revision.clone(),
            &fetched.commit,
            fetched.tree,
            spec.ignore.as_deref(),
            &spec.sparse_checkout,
        );
        Ok(Arc::new(snapshot))
    }

    async fn auth(&self, key: &Key, spec: &GitRepositorySpec, place: &Place) -> Result<Auth, Fault> {
        let failed = |name: &str, reason: String| Error::Referred {
            kind: "Secret",
            namespace: key.namespace.clone(),
            name: name.to_string(),
            reason,
        };
        let mut auth = match &spec.secret_ref {
            Some(reference) => {
                let keys = self.secret(key, &reference.name).await?;
                Auth::from_secret(place, &keys).map_err(|reason| failed(&reference.name, reason))?
            }
            None if matches!(place, Place::Ssh { .. }) => {
                return Err(Fault::terminal(
                    "AuthenticationFailed",
                    "spec.secretRef is required for ssh: a Secret with the keys 'identity' and 'known_hosts'"
                        .into(),
                ));
            }
            None => Auth::default(),
        };
        if let Some(reference) = &spec.proxy_secret_ref {
            // libgit2 goes past the proxy of a plain http address, which must not happen in silence.
            if !matches!(place, Place::Http { tls: true, .. }) {
                return Err(Fault::terminal(
                    "FieldsRefused",
                    "spec.proxySecretRef is honoured for https addresses only: write https in spec.url, or leave the proxy out"
                        .into(),
                ));
            }
            let keys = self.secret(key, &reference.name).await?;
            auth.add_proxy(&keys)
                .map_err(|reason| failed(&reference.name, reason))?;
        }
        Ok(auth)
    }

    async fn secret(&self, key: &Key, name: &str) -> Result<Keys, Error> {
        let failed = |reason: String| Error::Referred {
            kind: "Secret",
            namespace: key.namespace.clone(),
            name: name.to_string(),
            reason,
        };
        let api: Api<Secret> = Api::namespaced(self.client.clone(), &key.namespace);
        let secret = api
            .get_opt(name)
            .await
            .map_err(|e| failed(server_words(&e)))?
            .ok_or_else(|| failed("not found".into()))?;
        Ok(secret
            .data
            .unwrap_or_default()
            .into_iter()
            .map(|(k, v)| (k, v.0))
            .collect())
    }

    /// Writes what came of a look.
    async fn say(
        &self,
        key: &Key,
        object: &Arc<GitRepository>,
        refused: &[Field],
        result: Result<(Arc<Snapshot>, Fetched), Fault>,
    ) -> Result<(), Error> {
        let old = object.status.clone().unwrap_or_default();
        let mut new = old.clone();
        let now = Timestamp::now();
        let requested = object.annotations().get(REQUESTED_AT).cloned();
        describe(&mut new, object, key, &result, requested, now);
        unhonoured::set(&mut new.conditions, refused, object.metadata.generation, now);
        let reference = object.object_ref(&());
        match &result {
            Ok((snapshot, fetched)) => {
                let before = old.artifact.as_ref().map(|a| a.revision.as_str());
                if before != Some(snapshot.revision.as_str()) {
                    let note = format!("stored artifact for commit '{}'", fetched.subject);
                    self.recorder.normal(&reference, "NewArtifact", "Fetch", &note);
                } else if condition::is_true(&old.conditions, "FetchFailed") {
                    self.recorder.normal(
                        &reference,
                        "Succeeded",
                        "Fetch",
                        &format!("fetched again: {}", snapshot.revision),
                    );
                }
            }
            Err(fault) => {
                let known = condition::get(&old.conditions, "Ready");
                if known.is_none_or(|c| c.message != fault.message) {
                    self.recorder
                        .warning(&reference, fault.reason, "Fetch", &fault.message);
                }
            }
        }
        self.status.write(object, &old, &new).await.map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_after_failures_double_up_to_the_interval() {
        let minute = Duration::from_secs(60);
        assert_eq!(pause(1, minute), Duration::from_millis(750));
        assert_eq!(pause(2, minute), Duration::from_millis(1500));
        assert_eq!(pause(30, minute), minute);
        assert_eq!(pause(30, Duration::from_secs(3600)), RETRY_MAX);
    }
}
