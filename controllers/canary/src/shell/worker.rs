//! One Canary: observe, decide, act, sleep until something happens.

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use futures::stream::BoxStream;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::ObjectReference;
use kube::api::Api;
use kube::{Resource, ResourceExt};
use serin_analysis::{Judges, Query};
use serin_crds::flagger::{Canary, CanaryPhase, CanaryStatus, Evidence};
use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use super::act::{Acting, within};
use super::dead_pods::DeadPods;
use super::measure::Measuring;
use super::observe::{Seen, Written, observe};
use super::templates::Templates;
use super::{Key, Shared};
use crate::decide::{COMPARISON_STATE, Decision, Event, decide, watch};
use crate::metrics::Subject;
use crate::objects::Blueprint;
use crate::plan::Plan;
use crate::traffic::Liveness;
use crate::{Error, FIELD_MANAGER};

/// First wait after an error; doubled up to [`RETRY_MAX`].
const RETRY_MIN: Duration = Duration::from_millis(100);
/// Longest wait between two tries.
const RETRY_MAX: Duration = Duration::from_secs(10);
/// How old measured values in the status may grow. They change every second; nobody needs a write for each.
const VALUES_MAX_AGE: Duration = Duration::from_secs(5);
/// Wait before a mesh that ended its report on a route is asked again.
const LIVENESS_RETRY: Duration = Duration::from_secs(1);
/// Events that wait for a status that cannot be written; the oldest are dropped.
const UNTOLD_MAX: usize = 64;

/// Reason of every event, as in Flagger.
const EVENT_REASON: &str = "Synced";
/// Longest action of an event that the API takes. Events with the same reason and action are counted as one, under the
/// first one's text; so the text itself is the action.
const ACTION_MAX: usize = 128;

/// Works on a Canary until it is gone or `cancel` fires. Returns its key.
pub(crate) async fn work(shared: Arc<Shared>, key: Key, wake: Arc<Notify>, cancel: CancellationToken) -> Key {
    let mut worker = Worker {
        shared,
        key: key.clone(),
        uid: None,
        status: None,
        unwritten: false,
        untold: Vec::new(),
        written_at: None,
        written: Written::default(),
        measuring: Measuring::default(),
        templates: Templates::default(),
        live: LiveWatch::default(),
        dead_pods: None,
        plan: None,
        shown: None,
        retry: RETRY_MIN,
    };
    loop {
        let wake_at = match Box::pin(worker.once()).await {
            Ok(Next::Gone) => {
                worker.forget_metrics();
                return key;
            }
            // A new phase may have something to do with what is seen already.
            Ok(Next::Again) if !cancel.is_cancelled() => continue,
            Ok(Next::Again) => return key,
            Ok(Next::At(at)) => {
                worker.retry = RETRY_MIN;
                at.map(|at| worker.instant(at))
            }
            Err(error) => {
                warn!(%error, retry_ms = worker.retry.as_millis(), "rollout step failed; it is tried again");
                let at = Instant::now() + worker.retry;
                worker.retry = (worker.retry * 2).min(RETRY_MAX);
                Some(at)
            }
        };
        tokio::select! {
            () = cancel.cancelled() => return key,
            () = wake.notified() => {}
            () = sleep(wake_at) => {}
            () = worker.live.next() => {}
            () = worker.measuring.next(worker.plan.as_ref(), Timestamp::now) => {}
            () = worker.templates.next() => {}
            () = next_death(&mut worker.dead_pods) => {}
        }
    }
}

enum Next {
    Gone,
    Again,
    At(Option<Timestamp>),
}

struct Worker {
    shared: Arc<Shared>,
    key: Key,
    /// The Canary that all of this is about.
    uid: Option<String>,
    /// The status as we last wrote it. The cache may lag behind our own writes; this does not.
    status: Option<CanaryStatus>,
    /// Whether the status in memory is newer than the one on the API server in more than measured values.
    unwritten: bool,
    /// Events of statuses that are not written yet.
    untold: Vec<Event>,
    written_at: Option<Instant>,
    written: Written,
    measuring: Measuring,
    templates: Templates,
    live: LiveWatch,
    dead_pods: Option<DeadPods>,
    plan: Option<Plan>,
    /// Whose metrics are shown.
    shown: Option<Subject>,
    retry: Duration,
}

impl Worker {
    /// One round: observe, decide, act.
    async fn once(&mut self) -> Result<Next, Error> {
        let begun = Instant::now();
        let Some(mut seen) = observe(&self.shared, &self.key, &self.written) else {
            info!("Canary is gone");
            return Ok(Next::Gone);
        };
        let now = self.shared.now();
        if self.uid != seen.canary.uid() {
            // Deleted and created again under the same name: nothing of the other one holds.
            self.forget();
            self.uid = seen.canary.uid();
        }
        let status = self
            .status
            .get_or_insert_with(|| seen.canary.status.clone().unwrap_or_default())
            .clone();
        self.listen(&seen, &status);
        seen.observed.liveness = self.live.last.clone();
        seen.observed.dead_pods = self.dead_pods.as_ref().map(DeadPods::list).unwrap_or_default();
        seen.observed.measured = self.measuring.measured(&seen.plan, now);
        self.templates.observe(&self.shared, &mut seen, &status, now);

        let decision = decide(&seen.observed, &seen.plan, &status, now);
        for action in &decision.actions {
            debug!(?action, "acting");
            let mut acting = Acting {
                shared: &self.shared,
                key: &self.key,
                seen: &seen,
                written: &mut self.written,
            };
            acting.act(action).await?;
        }
        let wake_at = decision.wake_at;
        let same_phase = status.phase == decision.status.phase;
        self.show(&seen.plan, &status, &decision.status, begun.elapsed());
        self.report(&seen, status, decision).await?;
        self.plan = Some(seen.plan);
        Ok(if same_phase {
            Next::At(wake_at)
        } else {
            Next::Again
        })
    }

    /// The controller's own metrics of this round.
    fn show(&mut self, plan: &Plan, before: &CanaryStatus, after: &CanaryStatus, took: Duration) {
        let subject = Subject {
            namespace: self.key.namespace.clone(),
            target: plan.target.clone(),
            primary: plan.primary(),
        };
        if self.shown.as_ref().is_some_and(|shown| *shown != subject) {
            self.forget_metrics();
        }
        let metrics = &self.shared.context.own_metrics;
        metrics.round(&subject, before, after, plan.skip_analysis, took);
        self.shown = Some(subject);
    }

    fn forget_metrics(&mut self) {
        let Some(subject) = self.shown.take() else { return };
        let status = self.status.iter().flat_map(|status| &status.metrics);
        let planned = self.plan.iter().flat_map(|plan| &plan.metrics);
        let names = status
            .map(|metric| metric.name.clone())
            .chain(planned.map(|metric| metric.name.clone()));
        self.shared.context.own_metrics.forget(&subject, names);
    }

    fn forget(&mut self) {
        self.status = None;
        self.unwritten = false;
        self.untold.clear();
        self.written_at = None;
        self.written = Written::default();
        self.measuring.stop();
        self.templates = Templates::default();
        self.live = LiveWatch::default();
        self.dead_pods = None;
    }

    /// Listens to what this phase depends on, and to nothing else.
    fn listen(&mut self, seen: &Seen, status: &CanaryStatus) {
        let generation = seen.observed.route.as_ref().map(|route| route.generation);
        let settled = matches!(
            status.phase,
            Some(CanaryPhase::Initialized | CanaryPhase::Succeeded | CanaryPhase::Failed)
        ) && status.run.is_none();
        match generation.filter(|_| !settled) {
            Some(generation) => {
                let traffic = &self.shared.context.traffic;
                let (namespace, apex) = (&self.key.namespace, &seen.plan.apex);
                self.live
                    .watch(generation, || traffic.liveness(namespace, apex, generation));
            }
            None => self.live = LiveWatch::default(),
        }

        let running = status.phase == Some(CanaryPhase::Progressing) && !seen.plan.suspend;
        if !running {
            self.dead_pods = None;
            self.watch_promotion(seen, status);
            return;
        }
        if let Some(target) = seen.target.as_deref()
            && let Ok(blueprint) = Blueprint::new(&seen.canary, target, &self.shared.context.options)
        {
            let selector = blueprint.target_selector();
            if self
                .dead_pods
                .as_ref()
                .is_none_or(|watch| watch.selector() != selector)
            {
                let client = self.shared.context.client.clone();
                self.dead_pods = Some(DeadPods::watch(client, &self.key.namespace, selector));
            }
        }
        let run = status.run.clone().unwrap_or_default();
        let started = run
            .started_at
            .as_ref()
            .map(|at| at.0)
            .or(Some(Timestamp::UNIX_EPOCH));
        self.measuring.run(started, || evidence(status));
        self.measuring.revision(
            first_weight(status),
            run.former_traffic_until.as_ref().map(|at| at.0),
        );
        self.measuring.window(
            run.window_started_at.as_ref().map(|at| at.0),
            status.canary_weight.unwrap_or(0),
        );
        self.subscribe(seen);
    }

    fn subscribe(&mut self, seen: &Seen) {
        let query = Query {
            namespace: self.key.namespace.clone(),
            canary_workload: seen.plan.target.clone(),
            primary_workload: seen.plan.primary(),
            service: seen.plan.apex.clone(),
        };
        self.measuring.ensure(&self.shared.context.metrics, &query);
    }

    /// Between runs only a promotion that is being watched is measured.
    fn watch_promotion(&mut self, seen: &Seen, status: &CanaryStatus) {
        let plan = seen.plan.comparison.as_ref().and_then(|plan| plan.watch);
        let on = status.phase == Some(CanaryPhase::Succeeded) && !seen.plan.suspend;
        let options = plan.filter(|_| on).and_then(|plan| watch::options(status, &plan));
        let since = status.watch.as_ref().and_then(|watch| watch.started_at.as_ref());
        let (Some(options), Some(since)) = (options, since) else {
            self.measuring.stop();
            return;
        };
        self.measuring.watch(since.0, options, || watch::detector(status));
        self.subscribe(seen);
    }

    /// Writes the status and then tells the events. In this order a process that dies between the two takes an event with
    /// it, which the status says as well; in the other order the next process would decide the same again and tell it twice.
    async fn report(&mut self, seen: &Seen, before: CanaryStatus, decision: Decision) -> Result<(), Error> {
        let fresh = self.written_at.is_some_and(|at| at.elapsed() < VALUES_MAX_AGE);
        let changed = match (before == decision.status, fresh) {
            (true, _) => false,
            (false, false) => true,
            (false, true) => without_values(&before) != without_values(&decision.status),
        };
        // Kept even when the write below fails: what was decided and done is not decided again from an older status.
        self.status = Some(decision.status.clone());
        self.unwritten |= changed;
        self.untold.extend(decision.events);
        let excess = self.untold.len().saturating_sub(UNTOLD_MAX);
        self.untold.drain(..excess);
        if !self.unwritten {
            self.tell(seen);
            return Ok(());
        }
        let client = self.shared.context.client.clone();
        let api: Api<Canary> = Api::namespaced(client, &self.key.namespace);
        let object = format!("Canary {}", self.key);
        let write = serin_kit::apply::apply_status(
            &api,
            FIELD_MANAGER,
            Some(&self.key.namespace),
            &self.key.name,
            &decision.status,
        );
        match within(&object, "apply status of", async { Ok(write.await?) }).await {
            Ok(_) => {}
            // The finalizer was the last thing that kept it.
            Err(_) if seen.observed.deleting && !still_there(&self.shared, &self.key) => {}
            Err(error) => return Err(error),
        }
        self.unwritten = false;
        self.written_at = Some(Instant::now());
        self.tell(seen);
        Ok(())
    }

    fn tell(&mut self, seen: &Seen) {
        let about = reference(&seen.canary);
        for event in self.untold.drain(..) {
            info!(message = %event.message, "event");
            let (recorder, note) = (&self.shared.recorder, &event.message);
            let action = shortened(note, ACTION_MAX);
            if event.warning {
                recorder.warning(&about, EVENT_REASON, action, note);
            } else {
                recorder.normal(&about, EVENT_REASON, action, note);
            }
        }
    }

    fn instant(&self, at: Timestamp) -> Instant {
        let wait = at.duration_since(self.shared.now());
        Instant::now() + Duration::try_from(wait).unwrap_or(Duration::ZERO)
    }
}

fn shortened(text: &str, max: usize) -> &str {
    let mut end = text.len().min(max);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

fn still_there(shared: &Shared, key: &Key) -> bool {
    shared
        .caches
        .canaries
        .get(Some(&key.namespace), &key.name)
        .is_some()
}

fn reference(canary: &Canary) -> ObjectReference {
    canary.object_ref(&())
}

/// The evidence that a run had when its status was last written.
fn evidence(status: &CanaryStatus) -> Option<Judges> {
    let state = status
        .run
        .as_ref()?
        .evidence
        .as_ref()?
        .judges
        .get(COMPARISON_STATE)?;
    serde_json::from_value(state.clone()).ok()
}

/// When this run's revision first got a share.
fn first_weight(status: &CanaryStatus) -> Option<Timestamp> {
    match status.history.first() {
        Some(step) => Some(step.started_at.as_ref().map_or(Timestamp::UNIX_EPOCH, |at| at.0)),
        // A run that another controller began has no record of ours.
        None => (status.canary_weight.unwrap_or(0) > 0).then_some(Timestamp::UNIX_EPOCH),
    }
}

/// A status without what changes with every sample.
fn without_values(status: &CanaryStatus) -> CanaryStatus {
    let mut status = status.clone();
    for metric in &mut status.metrics {
        metric.value = None;
        metric.samples = None;
        metric.message = None;
        metric.remaining_seconds = None;
    }
    if let Some(run) = status.run.as_mut() {
        run.evidence = None;
    }
    if let Some(watch) = status.watch.as_mut() {
        // Whether it watches at all is no measured value.
        watch.message = None;
        watch.evidence = watch.evidence.take().map(|_| Evidence::default());
    }
    if let Some(live) = status.weight_live.as_mut() {
        // A thousand proxies acknowledge one after the other; whether all have is what counts.
        (live.sent, live.acked) = (None, None);
    }
    status
}

async fn sleep(until: Option<Instant>) {
    match until {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

async fn next_death(dead_pods: &mut Option<DeadPods>) {
    match dead_pods {
        Some(watch) => watch.next().await,
        None => std::future::pending().await,
    }
}

/// What the mesh says about the route's current generation.
#[derive(Default)]
struct LiveWatch {
    generation: Option<i64>,
    stream: Option<BoxStream<'static, Liveness>>,
    retry_at: Option<Instant>,
    last: Option<Liveness>,
}

impl LiveWatch {
    fn watch(&mut self, generation: i64, subscribe: impl FnOnce() -> BoxStream<'static, Liveness>) {
        let waiting = self.retry_at.is_some_and(|at| Instant::now() < at);
        if self.generation == Some(generation) && (self.stream.is_some() || waiting) {
            return;
        }
        if self.generation != Some(generation) {
            self.last = None;
        }
        self.generation = Some(generation);
        self.retry_at = None;
        self.stream = Some(subscribe());
    }

    async fn next(&mut self) {
        match (&mut self.stream, self.retry_at) {
            (Some(stream), _) => match stream.next().await {
                Some(live) => self.last = Some(live),
                None => {
                    self.stream = None;
                    self.retry_at = Some(Instant::now() + LIVENESS_RETRY);
                }
            },
            (None, Some(at)) => tokio::time::sleep_until(at).await,
            (None, None) => std::future::pending().await,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serin_analysis::sample::{Counts, Sample};
    use serin_crds::flagger::RunStatus;

    #[test]
    fn evidence_is_read_back_from_a_status_as_it_was_written() {
        let mut judges = Judges::default();
        let options = serin_analysis::Options::default();
        let counts = |requests, errors| Counts {
            requests,
            errors,
            ..Counts::default()
        };
        let sample = Sample {
            at_ms: 1,
            from_ms: None,
            canary: counts(20, 3),
            primary: counts(80, 1),
        };
        judges.observe(&sample, 20.0, &options);
        let state = serde_json::to_value(&judges).unwrap();
        let evidence_status = Evidence {
            judges: [(COMPARISON_STATE.to_owned(), state)].into(),
        };
        let run = RunStatus {
            evidence: Some(evidence_status),
            ..RunStatus::default()
        };
        let status = CanaryStatus {
            run: Some(run),
            ..CanaryStatus::default()
        };
        // Through the API server: as text.
        let text = serde_json::to_string(&status).unwrap();
        let read: CanaryStatus = serde_json::from_str(&text).unwrap();
        // Up to the last digit of a float in JSON.
        let read = evidence(&read).unwrap();
        let value = |judges: &Judges| {
            judges.verdict(&options).metrics[0]
                .verdict
                .evidence()
                .unwrap()
                .value
        };
        assert!(
            (value(&read) - value(&judges)).abs() < 1e-9,
            "{read:?} {judges:?}"
        );
        assert_eq!(read.totals(), judges.totals());
        assert_eq!(evidence(&CanaryStatus::default()), None);
    }

    #[test]
    fn a_long_event_is_shortened_at_a_character() {
        assert_eq!(shortened("abc", 128), "abc");
        assert_eq!(shortened("aä", 2), "a");
    }
}
