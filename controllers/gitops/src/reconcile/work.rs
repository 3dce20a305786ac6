//! The work of a pass: build, plan, apply, prune, and what is told and remembered of it.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use kube::ResourceExt as _;
use serin_crds::flux::kustomize::{Kustomization, ResourceInventory};
use serin_kit::unhonoured::Field;
use tokio::time::Instant;

use super::memory::{Applied, HealthWait, Inputs, Tracked};
use super::pass::Times;
use super::{Kustomizations, decryption, variables};
use crate::apply::{Did, Failed, Known, Outcome, Step};
use crate::build::{self, Built};
use crate::error::Error;
use crate::key::{Key, ObjectId};
use crate::plan::{self, Accepted, Action, Prune, STAGES, Stage, inventory};
use crate::source::tree::Snapshot;
use crate::timeline::What;

/// Why an attempt failed: the condition's reason and message, and what follows.
pub(super) struct Fault {
    pub(super) reason: &'static str,
    pub(super) message: String,
    pub(super) then: Then,
}

/// What follows from a failed attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Then {
    /// Try again after `spec.retryInterval`.
    Retry,
    /// The cluster may be in order again in a moment.
    RetrySoon,
    /// As `Retry`; what was applied is not healthy.
    Unhealthy,
    /// A newer revision is there; nothing is said.
    Supersede,
}

impl Fault {
    pub(super) fn new(reason: &'static str, message: impl Into<String>) -> Self {
        Self {
            reason,
            message: message.into(),
            then: Then::Retry,
        }
    }

    /// What the API server refused, with the lines that it is about.
    async fn of_apply(reason: &'static str, mut failed: Failed, snapshot: &Arc<Snapshot>) -> Self {
        let soon = failed.errors.iter().any(Error::may_pass);
        let snapshot = snapshot.clone();
        let located = tokio::task::spawn_blocking(move || {
            failed.locate(&snapshot);
            failed.message()
        });
        // It fails only when the runtime shuts down, and then nobody reads the message.
        let message = located.await.unwrap_or_default();
        Self {
            reason,
            message,
            then: if soon { Then::RetrySoon } else { Then::Retry },
        }
    }

    fn of_build(error: &Error) -> Self {
        Self {
            reason: "BuildFailed",
            message: error.to_string(),
            then: if error.may_pass() {
                Then::RetrySoon
            } else {
                Then::Retry
            },
        }
    }

    pub(super) fn superseded() -> Self {
        Self {
            reason: "Progressing",
            message: String::new(),
            then: Then::Supersede,
        }
    }
}

/// What an attempt did, for events and the timeline.
pub(super) struct Report {
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

/// Objects that were applied once and are part of it no more.
fn stale(old: &[(ObjectId, String)], built: &Built) -> Vec<(ObjectId, String)> {
    let wanted: HashSet<&ObjectId> = built.objects.iter().map(|d| &d.id).collect();
    old.iter()
        .filter(|(id, _)| !wanted.contains(id))
        .cloned()
        .collect()
}

/// Whether applying makes a difference, as far as it is planned.
fn changes_anything(planned: &[(Stage, Vec<Step>)]) -> bool {
    planned.len() < STAGES.len()
        || planned
            .iter()
            .flat_map(|(_, steps)| steps)
            .any(|step| matches!(step.action, Action::Create | Action::Configure))
}

/// The inventory of what was built, and of `others`.
fn inventory_of(built: &Built, others: &[(ObjectId, String)]) -> ResourceInventory {
    inventory::of(
        built
            .objects
            .iter()
            .map(|d| (&d.id, d.api_version.as_str()))
            .chain(others.iter().map(|(id, version)| (id, version.as_str()))),
    )
}

impl Kustomizations {
    /// Build, plan, apply, prune. The outer error is the API server refusing a status write.
    pub(super) async fn work(
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
            Err(error) => return Ok(Err(Fault::of_build(&error))),
        };
        let accepted = self.accepted(key);
        let known = |id: &ObjectId| accepted.get(id).copied();
        let planned = match self.planned(&built, &known).await {
            Ok(planned) => planned,
            Err(failed) => {
                return Ok(Err(
                    Fault::of_apply("ReconciliationFailed", failed, snapshot).await
                ));
            }
        };
        let old = inventory::objects(ks.status.as_ref().and_then(|s| s.inventory.as_ref()));
        let stale = stale(&old, &built);
        if let Some(words) = self.budget(key, ks, &stale).await {
            return Ok(Err(Fault::new("PruneFailed", words)));
        }
        self.memory.lock().entry(key.clone()).or_default().inventory = None;
        if !stale.is_empty() || changes_anything(&planned) {
            // Written before anything is applied: whatever dies from here on, the inventory knows every object.
            let ahead = inventory_of(&built, &old);
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
        let applied = self
            .applier
            .apply_all(&built.objects, &known, force, planned)
            .await;
        let outcomes = match applied {
            Ok(outcomes) => outcomes,
            Err(failed) => return Ok(Err(self.apply_failed(ks, failed, snapshot).await)),
        };
        let mut report = Report {
            outcomes,
            deleted: Vec::new(),
            digest: built.digest.clone(),
        };
        let mut left = Vec::new();
        let mut fault = None;
        if ks.spec.prune && !stale.is_empty() {
            let pruned = self.applier.prune(&stale, key).await;
            for (id, reason) in &pruned.kept {
                tracing::info!(kustomization = %key, object = %id, reason, "not pruned");
            }
            report.deleted = pruned.deleted;
            left = pruned.failed;
            if !pruned.errors.is_empty() {
                let failed = Failed {
                    errors: pruned.errors,
                    done: Vec::new(),
                };
                fault = Some(Fault::of_apply("PruneFailed", failed, snapshot).await);
            }
        }
        let now_applied = inventory_of(&built, &left);
        self.memory.lock().entry(key.clone()).or_default().inventory = Some(now_applied);
        Ok(fault.map_or(Ok(report), Err))
    }

    /// What the cluster had accepted of each object when it was applied last.
    fn accepted(&self, key: &Key) -> HashMap<ObjectId, Accepted> {
        let all = self.memory.lock();
        let applied = all.get(key).and_then(|m| m.applied.as_ref());
        let objects = applied.into_iter().flat_map(|a| &a.objects);
        objects
            .filter_map(|(id, t)| Some((id.clone(), t.accepted?)))
            .collect()
    }

    /// The steps of every stage whose kinds are known by now.
    async fn planned(&self, built: &Built, known: &Known<'_>) -> Result<Vec<(Stage, Vec<Step>)>, Failed> {
        let mut planned = Vec::new();
        for stage in STAGES {
            match self.applier.plan_stage(stage, &built.objects, known).await {
                Ok(steps) => planned.push((stage, steps)),
                // A kind that an earlier stage defines; planned again when that stage is done.
                Err(failed)
                    if stage != Stage::Definitions
                        && failed.errors.iter().all(|e| matches!(e, Error::NoKind { .. }))
                        && defines(built) => {}
                Err(failed) => return Err(failed),
            }
        }
        Ok(planned)
    }

    /// Objects in stages that were applied before the failure are told, so that nobody has to guess.
    async fn apply_failed(&self, ks: &Kustomization, failed: Failed, snapshot: &Arc<Snapshot>) -> Fault {
        let done = changes(&failed.done, &[]);
        if !done.is_empty() {
            self.recorder
                .normal(&self.reference(ks), "Progressing", "Apply", &done);
        }
        Fault::of_apply("ReconciliationFailed", failed, snapshot).await
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
        let decryption = decryption::resolve(&self.client, key, &ks.spec).await?;
        let last = self.memory.lock().get(key).and_then(|m| m.built.clone());
        let (owned_key, ks, snapshot) = (key.clone(), ks.clone(), snapshot.clone());
        let build = tokio::task::spawn_blocking(move || {
            if let Some(last) = last
                && last.recipe == build::recipe(&owned_key, &ks.spec, variables.as_ref(), decryption.as_ref())
                && last.reads.holds(&snapshot)?
            {
                return Ok(last);
            }
            build::build(
                &snapshot,
                &owned_key,
                &ks.spec,
                variables.as_ref(),
                decryption.as_ref(),
            )
            .map(Arc::new)
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

    pub(super) fn report(&self, key: &Key, ks: &Kustomization, inputs: &Inputs, report: &Report) {
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

    pub(super) fn remember(
        &self,
        key: &Key,
        inputs: &Inputs,
        report: Report,
        started: Instant,
        times: &Times,
    ) {
        let changed = !report.deleted.is_empty()
            || report
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
            changed,
        });
        // Something changed: health is open again, with a deadline of its own.
        memory.health = Some(HealthWait {
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
