//! After an apply: is what was applied healthy, and is the Kustomization ready? Runs again whenever an object's health
//! changes; makes no request unless `spec.healthChecks` names objects of others.

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use serde_json::Value;
use serin_crds::flux::kustomize::Kustomization;
use serin_kit::unhonoured::Field;
use tokio::time::Instant;

use super::memory::{HealthWait, Inputs};
use super::pass::Times;
use super::work::{Fault, Then};
use super::{Kustomizations, conditions};
use crate::error::Error;
use crate::health::expressions::Rules;
use crate::health::{self, Health, State};
use crate::key::{Key, ObjectId, group_version};
use crate::timeline::What;

/// How often objects of others are looked at while they are waited for. Objects of ours are watched.
const FOREIGN_POLL: Duration = Duration::from_secs(2);

/// The health of everything that counts.
#[derive(Debug, Default)]
struct Verdict {
    failed: Vec<String>,
    open: Vec<String>,
    /// Look again then, although nothing may change.
    again: Option<Duration>,
}

impl Verdict {
    fn add(&mut self, id: &ObjectId, health: &Health, now: Timestamp) {
        let line = format!("{id} status: '{}': {}", health.state.as_str(), health.message);
        match health.state {
            State::Current => {}
            State::Failed => self.failed.push(line),
            State::InProgress | State::Terminating | State::NotFound => self.open.push(line),
        }
        if let Some(at) = health.look_again {
            let wait = Duration::try_from(at.duration_since(now))
                .unwrap_or_default()
                .max(Duration::from_millis(100));
            self.again = Some(self.again.map_or(wait, |a| a.min(wait)));
        }
    }

    /// What it means for a Kustomization that waits.
    fn next(&self, wait: &HealthWait, now: Instant) -> Next {
        let waited = seconds(now.duration_since(wait.since));
        let failed = |why: &str, lines: &[String]| {
            let lines = lines.join(", ");
            Next::Unhealthy(format!("health check failed after {waited}: {why}: [{lines}]"))
        };
        if !self.failed.is_empty() {
            return failed("failed early due to stalled resources", &self.failed);
        }
        if self.open.is_empty() {
            return Next::Ready(Some(format!("Health check passed in {waited}")));
        }
        if wait.passed {
            // Healthy once; a rollout that starts by itself (a canary, an autoscaler) does not take readiness away.
            return Next::Ready(Some("Health check passed".to_owned()));
        }
        if now >= wait.deadline {
            return failed("timeout waiting for", &self.open);
        }
        Next::Wait(
            self.again
                .map_or(wait.deadline, |again| (now + again).min(wait.deadline)),
        )
    }
}

/// What follows from the health of what was applied.
enum Next {
    /// Ready, with what is said of the checks, if there were any.
    Ready(Option<String>),
    Unhealthy(String),
    /// Until something happens, or this time.
    Wait(Instant),
}

fn seconds(duration: Duration) -> String {
    format!("{:.1}s", duration.as_secs_f64())
}

impl Kustomizations {
    /// Looks at health and writes the outcome; sets the appointment.
    pub(super) async fn settle(
        &self,
        key: &Key,
        ks: &Arc<Kustomization>,
        refused: &[Field],
        times: &Times,
        inputs: &Inputs,
    ) -> Result<(), Error> {
        let now = Instant::now();
        let (wait, started, digest, full_at, was_failing) = {
            let all = self.memory.lock();
            let Some(memory) = all.get(key) else { return Ok(()) };
            let (Some(applied), Some(wait)) = (&memory.applied, memory.health) else {
                return Ok(());
            };
            (
                wait,
                applied.started,
                applied.digest.clone(),
                memory.full_at.unwrap_or(now + times.interval),
                memory.failure.clone(),
            )
        };
        let checks = ks.spec.wait == Some(true) || !ks.spec.health_checks.is_empty();
        let next = if checks {
            match self.verdict(key, ks).await {
                Ok(verdict) => verdict.next(&wait, now),
                Err(message) => {
                    return self
                        .write(ks, refused, |e| e.stalled("InvalidCELExpression", &message))
                        .await
                        .map(drop);
                }
            }
        } else {
            Next::Ready(None)
        };
        match next {
            Next::Ready(message) => {
                if message.is_some() {
                    let passed = HealthWait { passed: true, ..wait };
                    self.memory.lock().entry(key.clone()).or_default().health = Some(passed);
                }
                let message = message.as_deref();
                self.ready(key, ks, refused, inputs, &digest, message, started, full_at)
                    .await
            }
            Next::Unhealthy(message) => {
                let already = was_failing.is_some();
                self.unhealthy(key, ks, refused, times, inputs, &message, already)
                    .await
            }
            Next::Wait(until) => {
                self.queue.push_at(key, until);
                let message = format!(
                    "Running health checks for revision {} with a timeout of {}s",
                    inputs.revision,
                    times.timeout.as_secs()
                );
                self.write(ks, refused, |e| {
                    e.waiting_for_health(&message);
                    e.status.last_attempted_revision = Some(inputs.revision.clone());
                })
                .await
                .map(drop)
            }
        }
    }

    async fn unhealthy(
        &self,
        key: &Key,
        ks: &Arc<Kustomization>,
        refused: &[Field],
        times: &Times,
        inputs: &Inputs,
        message: &str,
        already: bool,
    ) -> Result<(), Error> {
        if already {
            // Said before; the retry stands. Objects that recover wake this again.
            let retry_at = self
                .memory
                .lock()
                .get(key)
                .and_then(|m| m.failure.as_ref().map(|f| f.retry_at));
            if let Some(at) = retry_at {
                self.queue.push_at(key, at);
            }
            return Ok(());
        }
        let fault = Fault {
            reason: "HealthCheckFailed",
            message: message.to_string(),
            then: Then::Unhealthy,
        };
        self.fail(key, ks, refused, times, inputs, &fault).await
    }

    async fn ready(
        &self,
        key: &Key,
        ks: &Arc<Kustomization>,
        refused: &[Field],
        inputs: &Inputs,
        digest: &str,
        healthy: Option<&str>,
        started: Instant,
        full_at: Instant,
    ) -> Result<(), Error> {
        let changed;
        {
            let mut all = self.memory.lock();
            let memory = all.entry(key.clone()).or_default();
            memory.failure = None;
            changed = memory.applied.as_ref().is_some_and(|a| a.changed);
            self.queue.push_at(
                key,
                if memory.drift {
                    memory.drift_pause.next(Instant::now())
                } else {
                    full_at
                },
            );
        }
        let status = ks.status.as_ref();
        let was_ready = status
            .is_some_and(|s| conditions::ready_reason(&s.conditions) == Some("ReconciliationSucceeded"));
        let news = !was_ready
            || status.and_then(|s| s.last_applied_revision.as_deref()) != Some(inputs.revision.as_str());
        let took = started.elapsed();
        self.write(ks, refused, |e| {
            e.ready(&inputs.revision, healthy);
            e.status.last_applied_revision = Some(inputs.revision.clone());
            e.status.last_attempted_revision = Some(inputs.revision.clone());
            e.status.last_handled_reconcile_at.clone_from(&inputs.requested);
            if news {
                e.record(digest, &inputs.revision, took, "ReconciliationSucceeded");
            }
        })
        .await?;
        if news {
            // Hundreds of objects that only note a revision are not news.
            if changed || !was_ready {
                let note = format!(
                    "Reconciliation finished in {}, revision {}",
                    seconds(took),
                    inputs.revision
                );
                self.recorder
                    .normal(&self.reference(ks), "ReconciliationSucceeded", "Reconcile", &note);
            }
            self.timeline
                .tell(format!("Kustomization/{key}"), &inputs.revision, What::Ready);
        }
        Ok(())
    }

    async fn verdict(&self, key: &Key, ks: &Kustomization) -> Result<Verdict, String> {
        let rules = Rules::compile(&ks.spec.health_check_exprs)?;
        let now = Timestamp::now();
        let mut verdict = Verdict::default();
        let judge = |object: &Value| {
            rules
                .assess(object)
                .unwrap_or_else(|| health::assess(object, now))
        };
        if ks.spec.wait == Some(true) {
            let mut all = self.memory.lock();
            let Some(applied) = all.get_mut(key).and_then(|m| m.applied.as_mut()) else {
                return Ok(verdict);
            };
            for (id, tracked) in applied.objects.iter_mut().filter(|(_, t)| !t.skipped) {
                // Waiting for its own readiness it would never be ready.
                if id.kind == "Kustomization" && id.name == key.name && id.namespace == key.namespace {
                    continue;
                }
                let live = self.applier.live.get(id);
                tracked.state = live.as_ref().map(|l| health::assess(&l.value, now).state);
                let health = match &live {
                    Some(live) => judge(&live.value),
                    None if expires(&tracked.desired.value) => Health::current(),
                    None => Health::new(State::NotFound, "not found"),
                };
                verdict.add(id, &health, now);
            }
            drop(all);
            verdict.failed.sort();
            verdict.open.sort();
            return Ok(verdict);
        }
        for check in &ks.spec.health_checks {
            let api_version = check
                .api_version
                .clone()
                .unwrap_or_else(|| default_version(&check.kind).to_string());
            let id = ObjectId {
                group: group_version(&api_version).0.to_string(),
                kind: check.kind.clone(),
                namespace: check.namespace.clone().unwrap_or_default(),
                name: check.name.clone(),
            };
            let health = match self.applier.live.get(&id) {
                Some(live) => judge(&live.value),
                None => {
                    verdict.again = Some(verdict.again.map_or(FOREIGN_POLL, |a| a.min(FOREIGN_POLL)));
                    match self.foreign(&id, &api_version).await {
                        Ok(Some(object)) => judge(&object),
                        Ok(None) => Health::new(State::NotFound, "not found"),
                        Err(error) => Health::progress(error.to_string()),
                    }
                }
            };
            verdict.add(&id, &health, now);
        }
        Ok(verdict)
    }

    async fn foreign(&self, id: &ObjectId, api_version: &str) -> Result<Option<Value>, Error> {
        let served = self.applier.discovery.served(id, api_version).await?;
        let object = self
            .applier
            .discovery
            .api(&served, &id.namespace)
            .get_opt(&id.name)
            .await;
        let object = object.map_err(|e| Error::api(format!("get {id}"), e))?;
        Ok(object.and_then(|o| serde_json::to_value(o).ok()))
    }
}

/// A Job that removes itself has completed when it is gone.
fn expires(desired: &Value) -> bool {
    desired["kind"] == "Job"
        && desired
            .pointer("/spec/ttlSecondsAfterFinished")
            .is_some_and(|v| !v.is_null())
}

/// `healthChecks` may leave the version out for kinds that everyone knows.
fn default_version(kind: &str) -> &'static str {
    match kind {
        "Deployment" | "StatefulSet" | "DaemonSet" | "ReplicaSet" => "apps/v1",
        "Job" | "CronJob" => "batch/v1",
        "CustomResourceDefinition" => "apiextensions.k8s.io/v1",
        "Kustomization" => "kustomize.toolkit.fluxcd.io/v1",
        "HelmRelease" => "helm.toolkit.fluxcd.io/v2",
        "Canary" => "flagger.app/v1beta1",
        _ => "v1",
    }
}
