//! One pass over one Kustomization: gate, build, plan, apply, prune; then [`super::settle`].

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use kube::ResourceExt as _;
use kube::api::{Api, Patch, PatchParams};
use serde_json::json;
use serin_crds::flux::kustomize::{Kustomization, KustomizationSpec, SourceKind};
use serin_kit::unhonoured::{self, Field};
use tokio::time::Instant;

use super::conditions::Edit;
use super::gate::{self, Dependency, Gate, Observed, Source};
use super::memory::{Applied, Failure, Inputs, Tracked};
use super::{Kustomizations, REQUESTED_AT, STATUS_MANAGER, index, refused, variables};
use crate::apply::{Did, Failed, Outcome, Step};
use crate::build::{self, Built};
use crate::error::Error;
use crate::key::{Key, ObjectId};
use crate::plan::{self, Accepted, Action, Prune, STAGES, Stage, inventory};
use crate::queue::{Urgency, jittered};
use crate::source::tree::Snapshot;
use crate::timeline::What;

/// What makes the API server wait for us before an object goes.
pub(super) const FINALIZER: &str = "finalizers.fluxcd.io";
/// Flux's values: the timeout is the interval less half a minute, and at least half a minute.
const TIMEOUT_MARGIN: Duration = Duration::from_secs(30);
/// An interval that cannot be read is the CRD's example value, so that the object is looked at again.
const INTERVAL_DEFAULT: Duration = Duration::from_secs(600);
/// After a write to the API server itself failed.
const API_RETRY: Duration = Duration::from_secs(2);

/// Durations of a spec.
pub(super) struct Times {
    pub(super) interval: Duration,
    pub(super) retry: Duration,
    pub(super) timeout: Duration,
}

impl Times {
    pub(super) fn of(spec: &KustomizationSpec) -> Self {
        let interval = spec.interval.parse_or(INTERVAL_DEFAULT);
        let retry = spec
            .retry_interval
            .as_ref()
            .map_or(interval, |d| d.parse_or(interval));
        let default = interval
            .checked_sub(TIMEOUT_MARGIN)
            .unwrap_or_default()
            .max(TIMEOUT_MARGIN);
        let timeout = spec.timeout.as_ref().map_or(default, |d| d.parse_or(default));
        Self {
            interval,
            retry,
            timeout,
        }
    }
}

/// Why an attempt failed: the condition's reason, and the error.
struct Fault {
    reason: &'static str,
    message: String,
    /// Nothing was tried: a newer revision is there.
    superseded: bool,
}

impl Fault {
    fn new(reason: &'static str, error: &Error) -> Self {
        Self {
            reason,
            message: error.to_string(),
            superseded: false,
        }
    }
}

/// What an attempt did, for events and the timeline.
struct Report {
    outcomes: Vec<Outcome>,
    deleted: Vec<ObjectId>,
    digest: String,
}

impl Report {
    fn named(&self, did: Did) -> Vec<String> {
        let mut names: Vec<String> = self
            .outcomes
            .iter()
            .filter(|o| o.did == did)
            .map(|o| o.desired.id.to_string())
            .collect();
        names.sort();
        names
    }

    /// One line per changed object, as Flux's event.
    fn lines(&self) -> String {
        changes(&self.outcomes, &self.deleted)
    }
}

fn changes(outcomes: &[Outcome], deleted: &[ObjectId]) -> String {
    let mut lines: Vec<String> = outcomes
        .iter()
        .filter(|o| matches!(o.did, Did::Created | Did::Configured))
        .map(|o| format!("{} {}", o.desired.id, o.did.as_str()))
        .collect();
    lines.extend(deleted.iter().map(|id| format!("{id} deleted")));
    lines.join("\n")
}

impl Kustomizations {
    /// Handles one turn of a key.
    pub(super) async fn reconcile(&self, key: &Key) {
        let Some(watched) = self.cache.get(Some(&key.namespace), &key.name) else {
            self.memory.lock().remove(key);
            self.status.forget(key);
            self.queue.cancel_at(key);
            return;
        };
        let ks = self.status.newest(watched);
        if let Err(error) = self.reconcile_object(key, ks).await {
            // Conditions could not be written; the API server is away. Everything is tried again from what is there.
            tracing::warn!(kustomization = %key, %error, "pass not finished, trying again");
            self.queue.push_at(key, Instant::now() + API_RETRY);
        }
    }

    async fn reconcile_object(&self, key: &Key, ks: Arc<Kustomization>) -> Result<(), Error> {
        if ks.metadata.deletion_timestamp.is_some() {
            return self.finalize(key, &ks).await;
        }
        let ks = self.with_finalizer(key, ks).await?;
        if ks.spec.suspend == Some(true) {
            self.queue.cancel_at(key);
            return Ok(());
        }
        let refused = refused::fields(&ks.spec);
        match gate::decide(self.observe(key, &ks, &refused)) {
            Gate::Stalled { reason, message } => {
                self.memory.lock().entry(key.clone()).or_default().health = None;
                self.queue.cancel_at(key);
                self.write(&ks, &refused, |e| e.stalled(reason, &message))
                    .await
                    .map(drop)
            }
            Gate::Waiting { reason, message } => {
                let times = Times::of(&ks.spec);
                self.queue.push_at(key, Instant::now() + times.retry);
                self.write(&ks, &refused, |e| e.failed(reason, &message, false))
                    .await
                    .map(drop)
            }
            Gate::Open(snapshot) => self.proceed(key, ks, &refused, &snapshot).await,
        }
    }

    async fn with_finalizer(&self, key: &Key, ks: Arc<Kustomization>) -> Result<Arc<Kustomization>, Error> {
        if ks.finalizers().iter().any(|f| f == FINALIZER) {
            return Ok(ks);
        }
        let mut finalizers = ks.finalizers().to_vec();
        finalizers.push(FINALIZER.to_string());
        self.patch_finalizers(key, &ks, &finalizers).await
    }

    pub(super) async fn patch_finalizers(
        &self,
        key: &Key,
        ks: &Kustomization,
        finalizers: &[String],
    ) -> Result<Arc<Kustomization>, Error> {
        let api: Api<Kustomization> = Api::namespaced(self.client.clone(), &key.namespace);
        let patch = json!({"metadata": {"finalizers": finalizers, "resourceVersion": ks.resource_version()}});
        let params = PatchParams {
            field_manager: Some(STATUS_MANAGER.into()),
            ..Default::default()
        };
        let written = api.patch(&key.name, &params, &Patch::Merge(patch)).await;
        written
            .map(|o| self.status.note(o))
            .map_err(|e| Error::api(format!("write the finalizer of Kustomization {key}"), e))
    }

    fn observe<'a>(&self, key: &Key, ks: &'a Kustomization, refused: &'a [Field]) -> Observed<'a> {
        let source_key = index::source_of(key, ks);
        let source = match (
            self.artifacts.get(&source_key),
            self.sources.get(Some(&source_key.namespace), &source_key.name),
        ) {
            (Some(snapshot), Some(_)) => Source::Ready(snapshot),
            (_, None) => Source::Missing,
            (None, Some(object)) => {
                let conditions = object
                    .status
                    .as_ref()
                    .map(|s| s.conditions.as_slice())
                    .unwrap_or_default();
                let words = serin_kit::condition::get(conditions, "Ready")
                    .filter(|c| c.status == "False")
                    .map(|c| c.message.clone());
                Source::NoArtifact(words.unwrap_or_default())
            }
        };
        let dependencies = index::dependencies_of(key, ks)
            .into_iter()
            .zip(&ks.spec.depends_on)
            .map(|(dependency, reference)| {
                let object = self
                    .cache
                    .get(Some(&dependency.namespace), &dependency.name)
                    .map(|o| self.status.newest(o));
                let same_source = object.as_ref().is_some_and(|o| {
                    o.spec.source_ref.kind == SourceKind::GitRepository
                        && index::source_of(&dependency, o) == source_key
                });
                Dependency {
                    key: dependency,
                    object,
                    same_source,
                    ready_expr: reference.ready_expr.clone(),
                }
            })
            .collect();
        Observed {
            object: ks,
            refused,
            cycle: if ks.spec.depends_on.is_empty() {
                None
            } else {
                self.index.lock().cycle_through(key)
            },
            source_name: format!("{}/{source_key}", ks.spec.source_ref.kind),
            source,
            dependencies,
        }
    }

    /// Writes the status after `edit`.
    pub(super) async fn write(
        &self,
        ks: &Arc<Kustomization>,
        refused: &[Field],
        edit: impl FnOnce(&mut Edit<'_>),
    ) -> Result<Arc<Kustomization>, Error> {
        let old = ks.status.clone().unwrap_or_default();
        let mut new = old.clone();
        if let Some(applied) = self
            .memory
            .lock()
            .get(&Key::of(ks.as_ref()))
            .and_then(|m| m.inventory.clone())
        {
            new.inventory = Some(applied);
        }
        let now = Timestamp::now();
        edit(&mut Edit {
            status: &mut new,
            generation: ks.metadata.generation,
            now,
        });
        unhonoured::set(&mut new.conditions, refused, ks.metadata.generation, now);
        self.status.write(ks, &old, &new).await
    }

    async fn proceed(
        &self,
        key: &Key,
        ks: Arc<Kustomization>,
        refused: &[Field],
        snapshot: &Arc<Snapshot>,
    ) -> Result<(), Error> {
        let times = Times::of(&ks.spec);
        let now = Instant::now();
        let inputs = Inputs {
            revision: snapshot.revision.clone(),
            content: snapshot.digest.clone(),
            generation: ks.metadata.generation,
            requested: ks.annotations().get(REQUESTED_AT).cloned(),
        };
        enum Turn {
            Pass { corrects: bool },
            Settle,
            Later(Instant),
        }
        let (turn, superseded) = {
            let mut all = self.memory.lock();
            let memory = all.entry(key.clone()).or_default();
            let current = memory.applied.as_ref().is_some_and(|a| a.inputs == inputs);
            let due = memory.full_at.is_none_or(|at| at <= now);
            let turn = match &memory.failure {
                Some(f) if f.inputs == inputs && now < f.retry_at && !memory.variables_changed => {
                    if current {
                        Turn::Settle
                    } else {
                        Turn::Later(f.retry_at)
                    }
                }
                Some(_) => Turn::Pass { corrects: false },
                None if !current || due || memory.variables_changed => Turn::Pass { corrects: false },
                None if memory.drift => {
                    let at = memory.drift_pause.next(now);
                    if at <= now {
                        Turn::Pass { corrects: true }
                    } else {
                        Turn::Later(at)
                    }
                }
                None => Turn::Settle,
            };
            if let Turn::Pass { corrects } = &turn {
                memory.superseded = tokio_util::sync::CancellationToken::new();
                memory.variables_changed = false;
                memory.drift = false;
                memory.full_at = Some(now + jittered(times.interval, key));
                if *corrects {
                    memory.drift_pause.corrected(now);
                }
            }
            (turn, memory.superseded.clone())
        };
        match turn {
            Turn::Later(at) => {
                self.queue.push_at(key, at);
                Ok(())
            }
            Turn::Settle => self.settle(key, &ks, refused, &times, &inputs).await,
            Turn::Pass { .. } => {
                self.attempt(key, ks, refused, &times, inputs, snapshot, &superseded)
                    .await
            }
        }
    }

    async fn attempt(
        &self,
        key: &Key,
        mut ks: Arc<Kustomization>,
        refused: &[Field],
        times: &Times,
        inputs: Inputs,
        snapshot: &Arc<Snapshot>,
        superseded: &tokio_util::sync::CancellationToken,
    ) -> Result<(), Error> {
        let started = Instant::now();
        let work = self.work(key, &mut ks, refused, &inputs, snapshot, times);
        let result = tokio::select! {
            result = tokio::time::timeout(times.timeout, work) => match result {
                Ok(result) => result,
                Err(_) => Ok(Err(Fault {
                    reason: "ReconciliationFailed",
                    message: format!("revision {} was not applied within the timeout of {} s", inputs.revision, times.timeout.as_secs()),
                    superseded: false,
                })),
            },
            // Dropping the work between two requests is safe: what it may have written is in the inventory.
            () = superseded.cancelled() => Ok(Err(Fault { reason: "Progressing", message: String::new(), superseded: true })),
        };
        let ks = self.status.newest(ks);
        match result? {
            Ok(report) => {
                self.report(key, &ks, &inputs, &report);
                self.remember(key, &inputs, report, started, times);
                self.settle(key, &ks, refused, times, &inputs).await
            }
            Err(fault) if fault.superseded => {
                self.queue.push(key, Urgency::High);
                Ok(())
            }
            Err(fault) => {
                self.fail(
                    key,
                    &ks,
                    refused,
                    times,
                    &inputs,
                    fault.reason,
                    &fault.message,
                    false,
                )
                .await
            }
        }
    }

    /// Ends a pass or a wait with a failure: condition, event, and an appointment.
    pub(super) async fn fail(
        &self,
        key: &Key,
        ks: &Arc<Kustomization>,
        refused: &[Field],
        times: &Times,
        inputs: &Inputs,
        reason: &str,
        message: &str,
        unhealthy: bool,
    ) -> Result<(), Error> {
        let retry_at = Instant::now() + times.retry;
        self.memory.lock().entry(key.clone()).or_default().failure = Some(Failure {
            inputs: inputs.clone(),
            retry_at,
        });
        self.queue.push_at(key, retry_at);
        let known = ks
            .status
            .as_ref()
            .and_then(|s| serin_kit::condition::get(&s.conditions, "Ready"));
        let repeated =
            known.is_some_and(|c| c.status == "False" && c.reason == reason && c.message == message);
        if !repeated {
            self.recorder
                .warning(&self.reference(ks), reason, "Reconcile", message);
            let what = What::Failed {
                reason: reason.to_string(),
                message: message.to_string(),
            };
            self.timeline
                .tell(format!("Kustomization/{key}"), &inputs.revision, what);
        }
        self.write(ks, refused, |e| {
            e.failed(reason, message, unhealthy);
            e.status.last_attempted_revision = Some(inputs.revision.clone());
            e.status.last_handled_reconcile_at.clone_from(&inputs.requested);
        })
        .await
        .map(drop)
    }

    /// Build, plan, apply, prune. The outer error is the API server refusing a status write.
    async fn work(
        &self,
        key: &Key,
        ks: &mut Arc<Kustomization>,
        refused: &[Field],
        inputs: &Inputs,
        snapshot: &Arc<Snapshot>,
        times: &Times,
    ) -> Result<Result<Report, Fault>, Error> {
        let built = match self.built(key, ks, snapshot).await {
            Ok(built) => built,
            Err(error) => return Ok(Err(Fault::new("BuildFailed", &error))),
        };
        let accepted: HashMap<ObjectId, Accepted> = {
            let all = self.memory.lock();
            let applied = all.get(key).and_then(|m| m.applied.as_ref());
            applied
                .map(|a| {
                    a.objects
                        .iter()
                        .filter_map(|(id, t)| Some((id.clone(), t.accepted?)))
                        .collect()
                })
                .unwrap_or_default()
        };
        let known = |id: &ObjectId| accepted.get(id).copied();
        let mut planned: Vec<(Stage, Vec<Step>)> = Vec::new();
        for stage in STAGES {
            match self.applier.plan_stage(stage, &built.objects, &known).await {
                Ok(steps) => planned.push((stage, steps)),
                // A kind that an earlier stage defines; planned again when that stage is done.
                Err(failed)
                    if stage != Stage::Definitions
                        && failed.errors.iter().all(|e| matches!(e, Error::NoKind { .. }))
                        && defines(&built) => {}
                Err(failed) => {
                    return Ok(Err(Fault {
                        reason: "ReconciliationFailed",
                        message: failed.message(),
                        superseded: false,
                    }));
                }
            }
        }
        let old = inventory::objects(ks.status.as_ref().and_then(|s| s.inventory.as_ref()));
        let wanted: HashSet<&ObjectId> = built.objects.iter().map(|d| &d.id).collect();
        let stale: Vec<(ObjectId, String)> = old
            .iter()
            .filter(|(id, _)| !wanted.contains(id))
            .cloned()
            .collect();
        if let Some(words) = self.budget(key, ks, &stale).await {
            return Ok(Err(Fault {
                reason: "PruneFailed",
                message: words,
                superseded: false,
            }));
        }
        let pending = planned.len() < STAGES.len();
        let changing = pending
            || !stale.is_empty()
            || planned
                .iter()
                .flat_map(|(_, s)| s)
                .any(|s| matches!(s.action, Action::Create | Action::Configure));
        self.memory.lock().entry(key.clone()).or_default().inventory = None;
        if changing {
            // Written before anything is applied: whatever dies from here on, the inventory knows every object.
            let ahead = inventory::of(
                built
                    .objects
                    .iter()
                    .map(|d| (&d.id, d.api_version.as_str()))
                    .chain(old.iter().map(|(id, v)| (id, v.as_str()))),
            );
            *ks = self
                .write(ks, refused, |e| {
                    e.progressing(&format!(
                        "Applying manifests of revision {} with a timeout of {}s",
                        inputs.revision,
                        times.timeout.as_secs()
                    ));
                    e.status.last_attempted_revision = Some(inputs.revision.clone());
                    e.status.inventory = Some(ahead);
                })
                .await?;
        }
        let force = ks.spec.force == Some(true);
        let outcomes = match self
            .applier
            .apply_all(&built.objects, &known, force, planned)
            .await
        {
            Ok(outcomes) => outcomes,
            Err(failed) => return Ok(Err(self.apply_failed(ks, &failed))),
        };
        let mut now_applied = inventory::of(built.objects.iter().map(|d| (&d.id, d.api_version.as_str())));
        let mut deleted = Vec::new();
        let mut prune_fault = None;
        if ks.spec.prune && !stale.is_empty() {
            let pruned = self.applier.prune(&stale, key).await;
            for (id, reason) in &pruned.kept {
                tracing::info!(kustomization = %key, object = %id, reason, "not pruned");
            }
            deleted = pruned.deleted;
            if !pruned.errors.is_empty() {
                let failed = Failed {
                    errors: pruned.errors,
                    done: Vec::new(),
                };
                now_applied = inventory::of(
                    built
                        .objects
                        .iter()
                        .map(|d| (&d.id, d.api_version.as_str()))
                        .chain(pruned.failed.iter().map(|(id, v)| (id, v.as_str()))),
                );
                prune_fault = Some(Fault {
                    reason: "PruneFailed",
                    message: failed.message(),
                    superseded: false,
                });
            }
        }
        self.memory.lock().entry(key.clone()).or_default().inventory = Some(now_applied);
        if let Some(fault) = prune_fault {
            return Ok(Err(fault));
        }
        Ok(Ok(Report {
            outcomes,
            deleted,
            digest: built.digest.clone(),
        }))
    }

    /// Objects in stages that were applied before the failure are told, so that nobody has to guess.
    fn apply_failed(&self, ks: &Kustomization, failed: &Failed) -> Fault {
        let done = changes(&failed.done, &[]);
        if !done.is_empty() {
            self.recorder
                .normal(&self.reference(ks), "Progressing", "Apply", &done);
        }
        Fault {
            reason: "ReconciliationFailed",
            message: failed.message(),
            superseded: false,
        }
    }

    /// Whether the prune budget forbids this revision.
    async fn budget(&self, key: &Key, ks: &Kustomization, stale: &[(ObjectId, String)]) -> Option<String> {
        let annotation = ks.annotations().get(plan::PRUNE_MAX)?;
        if !ks.spec.prune {
            return None;
        }
        let mut deletions = 0;
        for (id, api_version) in stale {
            if let Ok((Prune::Delete, ..)) = self.applier.plan_prune(id, api_version, key).await {
                deletions += 1;
            }
        }
        plan::over_budget(Some(annotation), deletions)
    }

    /// The objects of a revision: from memory while all that the last build read is the same, built otherwise.
    async fn built(
        &self,
        key: &Key,
        ks: &Arc<Kustomization>,
        snapshot: &Arc<Snapshot>,
    ) -> Result<Arc<Built>, Error> {
        let variables = variables::resolve(&self.client, key, &ks.spec).await?;
        let last = self.memory.lock().get(key).and_then(|m| m.built.clone());
        let (owned_key, ks, snapshot) = (key.clone(), ks.clone(), snapshot.clone());
        let build = tokio::task::spawn_blocking(move || {
            if let Some(last) = last
                && last.recipe == build::recipe(&owned_key, &ks.spec, variables.as_ref())
                && last.reads.holds(&snapshot)?
            {
                return Ok(last);
            }
            build::build(&snapshot, &owned_key, &ks.spec, variables.as_ref()).map(Arc::new)
        });
        let built = build.await.map_err(|e| {
            Error::Build(format!(
                "the build ended abnormally ({e}); this is a defect of Serin"
            ))
        })??;
        tracing::debug!(kustomization = %key, objects = built.objects.len(), reads = built.reads.len(), "build done");
        self.memory.lock().entry(key.clone()).or_default().built = Some(built.clone());
        Ok(built)
    }

    fn report(&self, key: &Key, ks: &Kustomization, inputs: &Inputs, report: &Report) {
        let lines = report.lines();
        if !lines.is_empty() {
            self.recorder
                .normal(&self.reference(ks), "Progressing", "Apply", &lines);
        }
        let before = self
            .memory
            .lock()
            .get(key)
            .and_then(|m| m.applied.as_ref().map(|a| a.inputs.revision.clone()));
        if !lines.is_empty() || before.as_ref() != Some(&inputs.revision) {
            let what = What::Applied {
                created: report.named(Did::Created),
                configured: report.named(Did::Configured),
                deleted: report.deleted.iter().map(ToString::to_string).collect(),
                unchanged: report.named(Did::Unchanged).len(),
            };
            self.timeline
                .tell(format!("Kustomization/{key}"), &inputs.revision, what);
        }
    }

    fn remember(&self, key: &Key, inputs: &Inputs, report: Report, started: Instant, times: &Times) {
        let changed = report
            .outcomes
            .iter()
            .any(|o| matches!(o.did, Did::Created | Did::Configured));
        let objects = report
            .outcomes
            .into_iter()
            .map(|o| {
                let tracked = Tracked {
                    skipped: o.did == Did::Skipped,
                    accepted: o.accepted,
                    state: None,
                    desired: o.desired,
                };
                (tracked.desired.id.clone(), tracked)
            })
            .collect();
        let mut all = self.memory.lock();
        let memory = all.entry(key.clone()).or_default();
        let passed = memory.health.is_some_and(|h| h.passed) && memory.failure.is_none();
        memory.failure = None;
        memory.applied = Some(Applied {
            inputs: inputs.clone(),
            digest: report.digest,
            objects,
            started,
        });
        // Something changed: health is open again, with a deadline of its own.
        memory.health = Some(super::memory::HealthWait {
            since: started,
            deadline: started + times.timeout,
            passed: passed && !changed,
        });
    }
}

/// Whether a build brings definitions of kinds.
fn defines(built: &Built) -> bool {
    built
        .objects
        .iter()
        .any(|d| d.id.kind == "CustomResourceDefinition")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_the_defaults_of_flux() {
        let mut spec = KustomizationSpec {
            interval: "10m".into(),
            ..Default::default()
        };
        let times = Times::of(&spec);
        assert_eq!(
            (times.retry, times.timeout),
            (Duration::from_secs(600), Duration::from_secs(570))
        );
        spec.interval = "40s".into();
        assert_eq!(Times::of(&spec).timeout, Duration::from_secs(30));
        spec.retry_interval = Some("5s".into());
        spec.timeout = Some("2m".into());
        let times = Times::of(&spec);
        assert_eq!(
            (times.retry, times.timeout),
            (Duration::from_secs(5), Duration::from_secs(120))
        );
    }
}
