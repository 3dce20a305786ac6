//! Watches on the objects of the demo, turned into one timeline of facts.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Instant;

use futures::StreamExt as _;
use k8s_openapi::api::apps::v1::Deployment;
use kube::runtime::WatchStreamExt as _;
use kube::runtime::watcher::{self, Event};
use kube::{Api, Client, Resource};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serin_crds::flagger::Canary;
use serin_crds::flux::kustomize::Kustomization;
use serin_crds::flux::source::GitRepository;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

/// Namespace of the demo's objects.
pub(super) const NAMESPACE: &str = "demo";
/// Name of the delivered application.
pub(super) const APPLICATION: &str = "podinfo";
/// Facts that may wait to be read.
const QUEUE: usize = 1024;

/// Something that became true.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub(super) enum Fact {
    /// A commit was pushed.
    Pushed { version: String, commit: String },
    /// The source controller has the commit.
    Seen { commit: String },
    /// The Kustomization has applied the commit.
    Applied { commit: String },
    /// The Deployment runs another image.
    ImageChanged { image: String },
    /// Pods of the canary were asked for.
    CanaryRequested,
    /// The canary's pods are ready.
    CanaryReady,
    /// The rollout is in another phase.
    Phase { phase: String, message: String },
    /// The rollout wants this share for the canary.
    WeightWanted { weight: i32 },
    /// Every proxy that needs it has this share.
    WeightLive { weight: i32, acked: i32, needed: i32 },
    /// A verdict on a metric changed.
    Verdict {
        metric: String,
        verdict: String,
        message: String,
    },
    /// The first bad answer of a version was seen by a client.
    FirstBadAnswer { version: String },
    /// Something else worth a line.
    Note { text: String },
}

/// A fact and when it was seen.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Entry {
    /// Seconds since the demo started.
    pub(super) t: f64,
    /// What became true.
    #[serde(flatten)]
    pub(super) fact: Fact,
}

/// Where facts are collected, in order.
#[derive(Clone)]
pub(super) struct Timeline {
    started: Instant,
    events: Arc<parking_lot::Mutex<Vec<Entry>>>,
    announce: mpsc::Sender<Entry>,
    count: Arc<watch::Sender<usize>>,
}

impl Timeline {
    /// An empty timeline and the facts as they come.
    pub(super) fn new() -> (Self, mpsc::Receiver<Entry>) {
        let (announce, announced) = mpsc::channel(QUEUE);
        let timeline = Self {
            started: Instant::now(),
            events: Arc::default(),
            announce,
            count: Arc::new(watch::Sender::new(0)),
        };
        (timeline, announced)
    }

    /// Seconds since the demo started.
    pub(super) fn now(&self) -> f64 {
        self.started.elapsed().as_secs_f64()
    }

    /// When the demo started.
    pub(super) fn started(&self) -> Instant {
        self.started
    }

    /// Adds a fact that became true now.
    pub(super) fn add(&self, fact: Fact) {
        self.add_at(self.now(), fact);
    }

    /// Adds a fact that became true at `t` seconds.
    pub(super) fn add_at(&self, t: f64, fact: Fact) {
        let event = Entry { t, fact };
        let length = {
            let mut events = self.events.lock();
            events.push(event.clone());
            events.len()
        };
        // A reader that lags loses lines on the terminal; the report has them all.
        let _ = self.announce.try_send(event);
        self.count.send_replace(length);
    }

    /// All facts so far.
    pub(super) fn events(&self) -> Vec<Entry> {
        self.events.lock().clone()
    }

    /// Waits until a fact after `since` seconds satisfies the predicate; returns it.
    pub(super) async fn until(&self, since: f64, wanted: impl Fn(&Fact) -> bool) -> Entry {
        let mut count = self.count.subscribe();
        loop {
            let found = self
                .events
                .lock()
                .iter()
                .find(|event| event.t >= since && wanted(&event.fact))
                .cloned();
            if let Some(found) = found {
                return found;
            }
            if count.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }
}

/// Starts the watches; they end when the set is dropped.
pub(super) fn start(client: &Client, timeline: &Timeline) -> JoinSet<()> {
    let mut tasks = JoinSet::new();
    let mut seen = BTreeSet::new();
    let target = timeline.clone();
    tasks.spawn(each(
        Api::namespaced(client.clone(), NAMESPACE),
        move |object: GitRepository| {
            let revision = object
                .status
                .and_then(|status| status.artifact)
                .map(|artifact| artifact.revision);
            if let Some(commit) = revision.as_deref().and_then(commit_of)
                && seen.insert(commit.to_owned())
            {
                target.add(Fact::Seen {
                    commit: commit.to_owned(),
                });
            }
        },
    ));
    let mut applied = BTreeSet::new();
    let target = timeline.clone();
    tasks.spawn(each(
        Api::namespaced(client.clone(), NAMESPACE),
        move |object: Kustomization| {
            let revision = object.status.and_then(|status| status.last_applied_revision);
            if let Some(commit) = revision.as_deref().and_then(commit_of)
                && applied.insert(commit.to_owned())
            {
                target.add(Fact::Applied {
                    commit: commit.to_owned(),
                });
            }
        },
    ));
    let mut deployment = DeploymentFacts::default();
    let target = timeline.clone();
    tasks.spawn(each(
        Api::namespaced(client.clone(), NAMESPACE),
        move |object: Deployment| {
            if object.metadata.name.as_deref() == Some(APPLICATION) {
                deployment
                    .facts(&object)
                    .into_iter()
                    .for_each(|fact| target.add(fact));
            }
        },
    ));
    let mut canary = CanaryFacts::default();
    let target = timeline.clone();
    tasks.spawn(each(
        Api::namespaced(client.clone(), NAMESPACE),
        move |object: Canary| {
            if object.metadata.name.as_deref() == Some(APPLICATION) {
                canary
                    .facts(&object)
                    .into_iter()
                    .for_each(|fact| target.add(fact));
            }
        },
    ));
    tasks
}

async fn each<K>(api: Api<K>, mut look: impl FnMut(K))
where
    K: Resource + Clone + std::fmt::Debug + DeserializeOwned + Send + 'static,
{
    let mut events = watcher::watcher(api, watcher::Config::default())
        .default_backoff()
        .boxed();
    while let Some(event) = events.next().await {
        if let Ok(Event::Apply(object) | Event::InitApply(object)) = event {
            look(object);
        }
    }
}

/// `main@sha1:abc…` → `abc…`.
fn commit_of(revision: &str) -> Option<&str> {
    revision.rsplit_once(':').map(|(_, commit)| commit)
}

/// The last state of the Deployment that facts were made from.
#[derive(Default)]
struct DeploymentFacts {
    image: String,
    replicas: i32,
    ready: bool,
}

impl DeploymentFacts {
    fn facts(&mut self, object: &Deployment) -> Vec<Fact> {
        let mut facts = Vec::new();
        let Some(spec) = &object.spec else { return facts };
        let mut containers = spec.template.spec.iter().flat_map(|pod| &pod.containers);
        let image = containers
            .find_map(|container| container.image.clone())
            .unwrap_or_default();
        if image != self.image {
            if !self.image.is_empty() {
                facts.push(Fact::ImageChanged { image: image.clone() });
            }
            self.image = image;
        }
        let replicas = spec.replicas.unwrap_or(1);
        if replicas > 0 && self.replicas == 0 {
            facts.push(Fact::CanaryRequested);
        }
        let available = object
            .status
            .as_ref()
            .and_then(|status| status.available_replicas)
            .unwrap_or(0);
        let ready = replicas > 0 && available >= replicas;
        if ready && !self.ready {
            facts.push(Fact::CanaryReady);
        }
        self.replicas = replicas;
        self.ready = ready;
        facts
    }
}

/// The last state of the Canary that facts were made from.
#[derive(Default)]
struct CanaryFacts {
    phase: String,
    wanted: i32,
    live: Option<i32>,
    verdicts: std::collections::BTreeMap<String, String>,
}

impl CanaryFacts {
    fn facts(&mut self, object: &Canary) -> Vec<Fact> {
        let mut facts = Vec::new();
        let Some(status) = &object.status else {
            return facts;
        };
        let phase = status.phase.as_ref().map(ToString::to_string).unwrap_or_default();
        if phase != self.phase {
            let message = status.message.clone().unwrap_or_default();
            facts.push(Fact::Phase {
                phase: phase.clone(),
                message,
            });
            self.phase = phase;
        }
        for metric in &status.metrics {
            let before = self.verdicts.insert(metric.name.clone(), metric.verdict.clone());
            if metric.verdict == "bad" && before.as_deref() != Some("bad") {
                facts.push(Fact::Verdict {
                    metric: metric.name.clone(),
                    verdict: metric.verdict.clone(),
                    message: metric.message.clone().unwrap_or_default(),
                });
            }
        }
        let wanted = status.canary_weight.unwrap_or(0);
        if wanted != self.wanted {
            facts.push(Fact::WeightWanted { weight: wanted });
            self.wanted = wanted;
        }
        let live = status.weight_live.as_ref().filter(|live| live.live == Some(true));
        let weight = live.map(|live| live.weight);
        if weight != self.live {
            if let Some(live) = live {
                facts.push(Fact::WeightLive {
                    weight: live.weight,
                    acked: live.acked.unwrap_or(0),
                    needed: live.needed.unwrap_or(0),
                });
            }
            self.live = weight;
        }
        facts
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn canary(status: serde_json::Value) -> Canary {
        serde_json::from_value(json!({
            "apiVersion": "flagger.app/v1beta1", "kind": "Canary", "metadata": {"name": APPLICATION},
            "spec": {"targetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": APPLICATION}, "service": {"port": 80}, "analysis": {}},
            "status": status,
        }))
        .unwrap()
    }

    #[test]
    fn a_weight_is_wanted_first_and_live_later() {
        let mut facts = CanaryFacts::default();
        let wanted = facts.facts(&canary(json!({"phase": "Progressing", "canaryWeight": 10})));
        assert!(wanted.contains(&Fact::WeightWanted { weight: 10 }));
        let status = json!({
            "phase": "Progressing", "canaryWeight": 10,
            "weightLive": {"weight": 10, "generation": 2, "acked": 3, "needed": 3, "live": true},
        });
        assert_eq!(
            facts.facts(&canary(status.clone())),
            [Fact::WeightLive {
                weight: 10,
                acked: 3,
                needed: 3
            }]
        );
        assert_eq!(facts.facts(&canary(status)), []);
    }

    #[tokio::test]
    async fn whoever_waits_for_a_fact_hears_of_it_once_it_is_there() {
        let (timeline, _announced) = Timeline::new();
        let waiting = timeline.clone();
        let wait =
            tokio::spawn(async move { waiting.until(0.0, |fact| *fact == Fact::CanaryRequested).await });
        timeline.add(Fact::CanaryReady);
        timeline.add(Fact::CanaryRequested);
        assert_eq!(wait.await.unwrap().fact, Fact::CanaryRequested);
    }

    #[test]
    fn the_commit_is_what_follows_the_digest_algorithm() {
        assert_eq!(commit_of("main@sha1:abc"), Some("abc"));
    }
}
