//! serin-gitops: from a commit to applied, healthy objects. `GitRepository`, `Kustomization` and `Receiver` with Flux's
//! names, statuses, annotations and field managers.
//!
//! # How data flows
//!
//! ```text
//! webhook / ref watch / interval ─▶ source: list, fetch one commit into a bare cache ─▶ Snapshot (a git tree, read in place)
//!                                                                                          │ published in memory
//!  ┌───────────────────────────────────────────────────────────────────────────────────────┘
//!  └▶ reconcile: gate ─▶ build (kustomize + substitution, read set) ─▶ plan ─▶ apply (staged) ─▶ prune ─▶ health ─▶ status
//!         ▲                                                              ▲         │
//!         │ drift, health                                                └─ live ◀─┘  one watch per managed kind
//! ```
//!
//! Pure: `build` but for reading files, `plan`, `health`, `reconcile::gate`, `reconcile::conditions`, `reconcile::index`,
//! `source::{reference, ignore, semver_range, known_hosts}`. Shells: `source::reconcile`, `reconcile`, `apply`, `receiver`.
//!
//! # What makes it fast
//!
//! * A revision reaches builders in memory before the source's status is written.
//! * A build is skipped when everything that the last one looked at is the same in the new revision; the check costs what
//!   was read, not what the repository holds. Kustomizations that are affected go before those that only note the revision.
//! * What is live is known from watches over the objects that carry our owner label. Whether an apply would change
//!   anything is answered from `managedFields`, so an unchanged object costs no request and a Kustomization at rest none.
//! * Health is an event, not a wait: no worker is held, and a newer revision supersedes at once.
//!
//! # What is kept where
//!
//! Everything that matters is in statuses (inventory written before the first apply) and in git. Memory and the git cache
//! can be lost at any time; the first pass after a start compares and is back.
//!
//! # Decisions
//!
//! * Unknown fields are refused (`fieldValidation=Strict`); Flux lets the server prune them from custom resources.
//! * `Ready` is not taken away when an object that was healthy starts to roll out by itself; a failure takes it away.
//! * Drift is corrected at once, and again and again only with growing pauses (1 s to 5 min).
//! * `spec.replicas` is left to another controller that sets it (a canary, an autoscaler); kubectl's number is corrected.
//! * Failures of the API server itself are retried within 5 s, whatever `retryInterval` says.
//! * Symbolic links inside a repository are followed; Flux drops them from the artifact.
//! * A server's certificate is checked against `ca.crt` directly, without building a chain: list intermediates.
//!
//! # Limits
//!
//! No OCIRepository, Bucket or Helm sources; decryption with age keys only; no impersonation or other clusters: refused by condition. See
//! `docs/supported/flux.md`. A `serin.dev/prune-max` annotation on a Kustomization bounds how many objects one revision may
//! delete.

mod apply;
mod build;
mod error;
mod health;
mod key;
mod plan;
mod queue;
mod receiver;
mod reconcile;
mod source;
mod status;
mod sys;
mod timeline;

use std::path::PathBuf;
use std::time::Duration;

use kube::{Api, Client};
use serin_kit::cache::Cache;
use serin_kit::events::Recorder;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub use error::Error;
pub use receiver::Receivers;
pub use timeline::{Moment, What};

/// How long the first lists of our kinds may take. Their definitions must be installed before [`run`].
const FIRST_LIST: Duration = Duration::from_secs(60);
/// How long tasks may take to end when the controller stops.
const SHUTDOWN: Duration = Duration::from_secs(5);

/// What the controllers run with.
#[derive(Clone)]
pub struct Context {
    /// The cluster.
    pub client: Client,
    /// Directory of the bare git caches. May be deleted at any time while nothing runs.
    pub cache_dir: PathBuf,
    /// Whether `file://` and absolute paths are honoured as `spec.url` (standalone; on a shared cluster they would read
    /// the controller's own files).
    pub local_sources: bool,
    /// Hears of revisions seen and applied. A full channel loses moments.
    pub timeline: Option<mpsc::Sender<Moment>>,
}

impl Context {
    /// A context that honours local repositories (standalone) and tells nobody. The fields are open to change.
    pub fn new(client: Client, cache_dir: impl Into<PathBuf>) -> Self {
        Self {
            client,
            cache_dir: cache_dir.into(),
            local_sources: true,
            timeline: None,
        }
    }
}

/// Runs the source and the kustomize controllers until `cancel`. Returns early only if the definitions of our kinds are
/// not installed.
pub async fn run(context: Context, cancel: CancellationToken) -> Result<(), Error> {
    let Context {
        client,
        cache_dir,
        local_sources,
        timeline,
    } = context;
    let timeline = timeline::Timeline(timeline);
    let child = cancel.child_token();
    let _stop = child.clone().drop_guard();
    let sources_cache = Cache::start(Api::all(client.clone()), child.clone());
    let objects_cache = Cache::start(Api::all(client.clone()), child.clone());
    tokio::select! {
        // First: caches that are told to end say that they never became ready.
        biased;
        () = cancel.cancelled() => return Ok(()),
        ready = async {
            sources_cache.ready(FIRST_LIST).await?;
            objects_cache.ready(FIRST_LIST).await
        } => ready?,
    }
    let artifacts = source::store::Artifacts::new();
    let tasks = TaskTracker::new();
    let recorder = |controller| Recorder::start(client.clone(), controller, child.clone());
    let source_events = recorder("source-controller");
    let kustomize_events = recorder("kustomize-controller");
    let sources = source::reconcile::Sources::new(source::reconcile::Parts {
        client: client.clone(),
        cache: sources_cache.clone(),
        artifacts: artifacts.clone(),
        recorder: source_events.clone(),
        timeline: timeline.clone(),
        cache_dir,
        local_allowed: local_sources,
    })?;
    let kustomizations = reconcile::Kustomizations::new(reconcile::Parts {
        client: client.clone(),
        cache: objects_cache,
        sources: sources_cache,
        artifacts,
        recorder: kustomize_events.clone(),
        timeline,
        cancel: child.clone(),
        tasks: tasks.clone(),
    });
    tokio::join!(sources.run(child.clone()), kustomizations.run(child.clone()));
    tasks.close();
    if tokio::time::timeout(SHUTDOWN, tasks.wait()).await.is_err() {
        tracing::warn!("watches of managed objects did not end in time");
    }
    tokio::join!(source_events.flush(), kustomize_events.flush());
    Ok(())
}
