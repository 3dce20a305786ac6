//! One pass over one Kustomization: gate, build, plan, apply, prune; then [`super::settle`].

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
use super::memory::{Failure, Inputs};
use super::work::{Fault, Then};
use super::{Kustomizations, REQUESTED_AT, STATUS_MANAGER, index, refused};
use crate::error::Error;
use crate::key::Key;
use crate::queue::{Urgency, jittered};
use crate::source::tree::Snapshot;
use crate::timeline::What;

/// What makes the API server wait for us before an object goes.
pub(super) const FINALIZER: &str = "finalizers.fluxcd.io";
/// Flux's values: the timeout is the interval less half a minute, and at least half a minute.
const TIMEOUT_MARGIN: Duration = Duration::from_secs(30);
/// An interval that cannot be read is the CRD's example value, so that the object is looked at again.
const INTERVAL_DEFAULT: Duration = Duration::from_secs(600);
/// After a failure that may pass by itself: the API server was busy or away, a definition is still to come.
const RETRY_SOON: Duration = Duration::from_secs(5);
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
            Gate::Quiet => {
                self.queue
                    .push_at(key, Instant::now() + Times::of(&ks.spec).retry);
                Ok(())
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
            (None, Some(object)) if object.status.as_ref().is_some_and(|s| s.artifact.is_some()) => {
                Source::Recovering
            }
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
                Err(_) => Ok(Err(Fault::new("ReconciliationFailed", format!("revision {} was not applied within the timeout of {} s", inputs.revision, times.timeout.as_secs())))),
            },
            // Dropping the work between two requests is safe: what it may have written is in the inventory.
            () = superseded.cancelled() => Ok(Err(Fault::superseded())),
        };
        let ks = self.status.newest(ks);
        match result? {
            Ok(report) => {
                self.report(key, &ks, &inputs, &report);
                self.remember(key, &inputs, report, started, times);
                self.settle(key, &ks, refused, times, &inputs).await
            }
            Err(fault) if fault.then == Then::Supersede => {
                self.queue.push(key, Urgency::High);
                Ok(())
            }
            Err(fault) => self.fail(key, &ks, refused, times, &inputs, &fault).await,
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
        fault: &Fault,
    ) -> Result<(), Error> {
        let Fault {
            reason,
            message,
            then,
        } = fault;
        let pause = if *then == Then::RetrySoon {
            times.retry.min(RETRY_SOON)
        } else {
            times.retry
        };
        let retry_at = Instant::now() + pause;
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
            known.is_some_and(|c| c.status == "False" && c.reason == *reason && c.message == *message);
        if !repeated {
            self.recorder
                .warning(&self.reference(ks), reason, "Reconcile", message);
            let what = What::Failed {
                reason: (*reason).to_string(),
                message: message.clone(),
            };
            self.timeline
                .tell(format!("Kustomization/{key}"), &inputs.revision, what);
        }
        self.write(ks, refused, |e| {
            e.failed(reason, message, *then == Then::Unhealthy);
            e.status.last_attempted_revision = Some(inputs.revision.clone());
            e.status.last_handled_reconcile_at.clone_from(&inputs.requested);
        })
        .await
        .map(drop)
    }
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
