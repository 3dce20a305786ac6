//! The shell around the decision: watches in, writes out.

mod act;
mod caches;
mod dead_pods;
mod endpoints;
mod interests;
mod measure;
mod observe;
mod templates;
mod worker;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use kube::{Resource, ResourceExt};
use serin_analysis::MetricSource;
use serin_kit::cache::{Cache, Change};
use serin_kit::events::Recorder;
use serin_providers::{Connector, Environment, Limits};
use tokio::sync::Notify;
use tokio::task::{AbortHandle, JoinSet};
use tokio_util::sync::CancellationToken;
use tracing::{Instrument, info, info_span};

pub use caches::Caches;

use crate::Error;
use crate::metrics::Metrics;
use crate::objects::Options;
use crate::traffic::Traffic;
use endpoints::{Effect, Endpoints};
use interests::{Interests, Kind};

/// How long the first lists may take.
const CACHES_DEADLINE: Duration = Duration::from_secs(60);
/// How long workers may take to end after a cancellation: one write's deadline.
const STOP_DEADLINE: Duration = Duration::from_secs(10);

/// What a controller of Canaries needs.
#[derive(Clone)]
pub struct Context {
    /// Client for everything that is read and written.
    pub client: kube::Client,
    /// Only Canaries of this namespace; `None` for all.
    pub namespace: Option<String>,
    /// The mesh.
    pub traffic: Arc<dyn Traffic>,
    /// Where measurements come from.
    pub metrics: Arc<dyn MetricSource>,
    /// Options that are the same for all Canaries.
    pub options: Options,
    /// What is shown of the controller itself.
    pub own_metrics: Metrics,
}

/// Name and namespace of a Canary.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Key {
    pub(crate) namespace: String,
    pub(crate) name: String,
}

impl std::fmt::Display for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// What all workers share.
pub(crate) struct Shared {
    pub(crate) context: Context,
    pub(crate) caches: Caches,
    pub(crate) recorder: Recorder,
    pub(crate) interests: Interests,
    pub(crate) endpoints: Endpoints,
    pub(crate) providers: Connector,
}

impl Shared {
    /// The time.
    pub(crate) fn now(&self) -> Timestamp {
        Timestamp::now()
    }
}

/// Runs until `cancel` fires. Fails only when the first lists do not arrive; later troubles are retried.
pub async fn run(context: Context, cancel: CancellationToken) -> Result<(), Error> {
    // Everything started here ends with this function, also when it fails.
    let cancel = cancel.child_token();
    let guard = cancel.clone().drop_guard();
    let caches = Caches::start(&context.client, context.namespace.as_deref(), &cancel);
    let providers = Connector::new(
        Limits::default(),
        Environment::of_process(),
        Some(context.client.clone()),
    )?;
    let recorder = Recorder::start(context.client.clone(), "flagger", cancel.clone());
    let shared = Arc::new(Shared {
        context,
        caches,
        recorder,
        interests: Interests::default(),
        endpoints: Endpoints::default(),
        providers,
    });
    let mut dispatcher = Dispatcher {
        shared: shared.clone(),
        cancel: cancel.clone(),
        workers: HashMap::new(),
        counts: HashMap::new(),
        tasks: JoinSet::new(),
    };
    dispatcher.dispatch().await?;
    drop(guard);
    let stopped = async { while dispatcher.tasks.join_next().await.is_some() {} };
    if tokio::time::timeout(STOP_DEADLINE, stopped).await.is_err() {
        dispatcher.tasks.abort_all();
    }
    shared.recorder.flush().await;
    Ok(())
}

struct Running {
    wake: Arc<Notify>,
    abort: AbortHandle,
}

/// Wakes the worker of every Canary that a change concerns.
struct Dispatcher {
    shared: Arc<Shared>,
    cancel: CancellationToken,
    workers: HashMap<Key, Running>,
    /// Workers per namespace.
    counts: HashMap<String, usize>,
    tasks: JoinSet<Key>,
}

impl Dispatcher {
    async fn dispatch(&mut self) -> Result<(), Error> {
        // Subscribed before the stores are read, so that nothing falls between.
        let caches = self.shared.caches.clone();
        let mut canaries = caches.canaries.changes();
        let mut deployments = caches.deployments.changes();
        let mut services = caches.services.changes();
        let mut routes = caches.routes.changes();
        let mut rules = caches.rules.changes();
        let mut config_maps = caches.config_maps.changes();
        let mut secrets = caches.secrets.changes();
        let mut endpoints = caches.endpoints.changes();
        tokio::select! {
            // First: caches that are told to end say that they never became ready.
            biased;
            () = self.cancel.cancelled() => return Ok(()),
            ready = caches.ready(CACHES_DEADLINE) => ready?,
        }
        self.shared.endpoints.reset(&caches.endpoints.list());
        self.resync_canaries(&caches.canaries);
        info!(canaries = self.workers.len(), "watching Canaries");
        let cancel = self.cancel.clone();
        loop {
            tokio::select! {
                () = cancel.cancelled() => return Ok(()),
                Some(change) = canaries.next() => self.canary(&change, &caches.canaries),
                Some(change) = deployments.next() => self.concern(Kind::Deployment, &change),
                Some(change) = services.next() => self.concern(Kind::Service, &change),
                Some(change) = routes.next() => self.concern(Kind::Route, &change),
                Some(change) = rules.next() => self.concern(Kind::Rule, &change),
                Some(change) = config_maps.next() => self.concern(Kind::ConfigMap, &change),
                Some(change) = secrets.next() => self.concern(Kind::Secret, &change),
                Some(change) = endpoints.next() => match self.shared.endpoints.apply(&change) {
                    Effect::Changed(namespace, service) => self.wake(Kind::Endpoints, &namespace, &service),
                    Effect::Nothing => {}
                    Effect::Reset => {
                        self.shared.endpoints.reset(&caches.endpoints.list());
                        self.wake_all();
                    }
                },
                Some(ended) = self.tasks.join_next() => self.ended(ended.ok()),
                // Every cache was shut down.
                else => return Ok(()),
            }
        }
    }

    fn canary(
        &mut self,
        change: &Change<serin_crds::flagger::Canary>,
        cache: &Cache<serin_crds::flagger::Canary>,
    ) {
        match change {
            Change::Applied(canary) | Change::Deleted(canary) => {
                let key = key_of(&**canary);
                match self.workers.get(&key) {
                    Some(running) => running.wake.notify_one(),
                    None if matches!(change, Change::Applied(_)) => self.start(key),
                    None => {}
                }
            }
            Change::Resync => self.resync_canaries(cache),
        }
    }

    fn resync_canaries(&mut self, cache: &Cache<serin_crds::flagger::Canary>) {
        for canary in cache.list() {
            let key = key_of(&*canary);
            if !self.workers.contains_key(&key) {
                self.start(key);
            }
        }
        self.wake_all();
    }

    fn start(&mut self, key: Key) {
        let wake = Arc::new(Notify::new());
        let span = info_span!("canary", namespace = %key.namespace, name = %key.name);
        let work = worker::work(
            self.shared.clone(),
            key.clone(),
            wake.clone(),
            self.cancel.child_token(),
        );
        let abort = self.tasks.spawn(Box::pin(work).instrument(span));
        let count = self.counts.entry(key.namespace.clone()).or_default();
        *count += 1;
        self.shared.context.own_metrics.count(&key.namespace, *count);
        self.workers.insert(key, Running { wake, abort });
    }

    fn uncount(&mut self, namespace: &str) {
        let Some(count) = self.counts.get_mut(namespace) else {
            return;
        };
        *count -= 1;
        self.shared.context.own_metrics.count(namespace, *count);
        if *count == 0 {
            self.counts.remove(namespace);
        }
    }

    /// A worker ends when its Canary is gone. One that came back in between gets a new worker.
    fn ended(&mut self, key: Option<Key>) {
        let ended: Vec<Key> = match key {
            Some(key) => vec![key],
            // It panicked: whose it was is only told by its handle.
            None => self
                .workers
                .iter()
                .filter(|(_, running)| running.abort.is_finished())
                .map(|(key, _)| key.clone())
                .collect(),
        };
        for key in ended {
            if self.workers.remove(&key).is_some() {
                self.uncount(&key.namespace);
            }
            self.shared.interests.forget(&key);
            if self
                .shared
                .caches
                .canaries
                .get(Some(&key.namespace), &key.name)
                .is_some()
            {
                self.start(key);
            }
        }
    }

    fn concern<K: Resource<DynamicType = ()>>(&self, kind: Kind, change: &Change<K>) {
        match change {
            Change::Applied(object) | Change::Deleted(object) => {
                self.wake(kind, &object.namespace().unwrap_or_default(), &object.name_any());
            }
            Change::Resync => self.wake_all(),
        }
    }

    fn wake(&self, kind: Kind, namespace: &str, name: &str) {
        for key in self.shared.interests.concerned(kind, namespace, name) {
            if let Some(running) = self.workers.get(&key) {
                running.wake.notify_one();
            }
        }
    }

    fn wake_all(&self) {
        for running in self.workers.values() {
            running.wake.notify_one();
        }
    }
}

fn key_of<K: Resource<DynamicType = ()>>(object: &K) -> Key {
    Key {
        namespace: object.namespace().unwrap_or_default(),
        name: object.name_any(),
    }
}
