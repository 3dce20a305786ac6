//! Carrying a plan out: staged server-side apply, deletion, and the field managers that stand in the way.
//!
//! Inside a stage every change is first tried (`dryRun`), and nothing is written unless all tries pass: a broken
//! object among good ones leaves the cluster as it was. A lone change is not tried first, since there is nothing to
//! keep consistent with. Requests run [`PARALLEL`] at a time. Dropping the future between two requests is safe: the
//! inventory was written before.

pub(crate) mod discovery;
pub(crate) mod live;
mod refusals;
mod whereabouts;

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use futures::stream;
use kube::api::{DeleteParams, Patch, PatchParams, Preconditions, PropagationPolicy, ValidationDirective};
use serde_json::{Value, json};

use self::discovery::{Discovery, Served};
use self::live::Live;
use self::refusals::{is_immutable, object_error};
use crate::error::Error;
use crate::health::{self, State};
use crate::key::{Key, ObjectId};
use crate::plan::{self, Accepted, Action, Desired, FIELD_MANAGER, LiveObject, Prune, STAGES, Stage, fields};
use crate::source::tree::Snapshot;

/// Requests under way at a time for one Kustomization. Flux has 4.
const PARALLEL: usize = 8;
/// How long a definition or a namespace may take to become usable. Flux' value.
const STAGE_TIMEOUT: Duration = Duration::from_secs(60);
/// How long a forced deletion may take before the object is created again.
const RECREATE_TIMEOUT: Duration = Duration::from_secs(60);
/// How long a definition that is established may take to show up in discovery.
const DISCOVERY_TIMEOUT: Duration = Duration::from_secs(10);

/// What became of one desired object.
#[derive(Debug, Clone)]
pub(crate) struct Outcome {
    pub(crate) desired: Arc<Desired>,
    pub(crate) did: Did,
    pub(crate) accepted: Option<Accepted>,
}

/// Flux's words for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Did {
    Created,
    Configured,
    Unchanged,
    Skipped,
}

impl Did {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Configured => "configured",
            Self::Unchanged => "unchanged",
            Self::Skipped => "skipped",
        }
    }
}

/// One desired object with what is to be done.
#[derive(Debug, Clone)]
pub(crate) struct Step {
    pub(crate) desired: Arc<Desired>,
    pub(crate) served: Served,
    pub(crate) live: Option<Arc<LiveObject>>,
    pub(crate) action: Action,
}

/// Failures of several objects, with what was done before them.
#[derive(Debug)]
pub(crate) struct Failed {
    pub(crate) errors: Vec<Error>,
    pub(crate) done: Vec<Outcome>,
}

impl Failed {
    /// Tells refusals with the line of the field that they name, where that is in the file that the object comes from.
    /// Blocks on reading files.
    pub(crate) fn locate(&mut self, snapshot: &Snapshot) {
        for error in &mut self.errors {
            let Error::Object {
                reason,
                origin: Some(origin),
                ..
            } = error
            else {
                continue;
            };
            let Some((file, begin)) = origin.rsplit_once(':') else {
                continue;
            };
            let Ok(begin) = begin.parse() else { continue };
            let Ok(Some(bytes)) = snapshot.read(file) else {
                continue;
            };
            let line = whereabouts::line(&String::from_utf8_lossy(&bytes), file, begin, reason);
            *origin = format!("{file}:{line}");
        }
    }

    /// All errors, one a line.
    pub(crate) fn message(&self) -> String {
        let mut lines: Vec<String> = self.errors.iter().map(ToString::to_string).collect();
        lines.dedup();
        lines.join("\n")
    }
}

/// Talks to the API server on behalf of Kustomizations. Cloning is cheap.
#[derive(Clone)]
pub(crate) struct Applier {
    pub(crate) discovery: Discovery,
    pub(crate) live: Live,
}

/// What the caller remembers of earlier answers.
pub(crate) type Known<'a> = dyn Fn(&ObjectId) -> Option<Accepted> + Send + Sync + 'a;

impl Applier {
    pub(crate) fn new(discovery: Discovery, live: Live) -> Self {
        Self { discovery, live }
    }

    /// What is live of an object: from the shared watch, or, where no owner label is on it, from the API server.
    async fn look(&self, served: &Served, id: &ObjectId) -> Result<Option<Arc<LiveObject>>, Error> {
        self.live.ensure(served).await?;
        if let Some(live) = self.live.get(id) {
            return Ok(Some(live));
        }
        let api = self.discovery.api(served, &id.namespace);
        match api.get_opt(&id.name).await {
            Ok(None) => Ok(None),
            Ok(Some(object)) => Ok(serde_json::to_value(object)
                .ok()
                .map(|v| Arc::new(LiveObject::new(v)))),
            Err(e) => Err(object_error(id, "get", None, &e)),
        }
    }

    /// Plans the objects of one stage. No request is made for objects that the watch knows.
    pub(crate) async fn plan_stage(
        &self,
        stage: Stage,
        objects: &[Arc<Desired>],
        known: &Known<'_>,
    ) -> Result<Vec<Step>, Failed> {
        let mut of_stage: Vec<Arc<Desired>> = objects
            .iter()
            .filter(|d| plan::stage(&d.id) == stage)
            .cloned()
            .collect();
        of_stage.sort_by(|a, b| {
            plan::rank(&a.id)
                .cmp(&plan::rank(&b.id))
                .then_with(|| a.id.cmp(&b.id))
        });
        let plan_one = |desired: Arc<Desired>| async move {
            let served = self.served_soon(&desired).await?;
            check_scope(&desired, &served)?;
            let live = self.look(&served, &desired.id).await?;
            let accepted = known(&desired.id);
            let action = plan::decide(&desired, live.as_deref(), accepted.as_ref());
            Ok(Step {
                desired,
                served,
                live,
                action,
            })
        };
        let planned: Vec<Result<Step, Error>> = stream::iter(of_stage)
            .map(plan_one)
            .buffered(PARALLEL)
            .collect()
            .await;
        let (mut steps, mut errors) = (Vec::new(), Vec::new());
        for step in planned {
            match step {
                Ok(step) => steps.push(step),
                Err(error) => errors.push(error),
            }
        }
        if errors.is_empty() {
            Ok(steps)
        } else {
            Err(Failed {
                errors,
                done: Vec::new(),
            })
        }
    }

    /// A definition applied a moment ago may not be in discovery yet; a kind that nothing defines fails at once.
    async fn served_soon(&self, desired: &Desired) -> Result<Served, Error> {
        match self.discovery.served(&desired.id, &desired.api_version).await {
            Err(Error::NoKind { .. }) if self.defined(&desired.id) => {}
            other => return other,
        }
        let deadline = tokio::time::Instant::now() + DISCOVERY_TIMEOUT;
        loop {
            // Discovery documents cannot be watched. This happens only for a kind whose definition was just applied.
            tokio::time::sleep(Duration::from_millis(50)).await;
            self.discovery.forget(&desired.api_version);
            match self.discovery.served(&desired.id, &desired.api_version).await {
                Err(Error::NoKind { .. }) if tokio::time::Instant::now() < deadline => {}
                other => return other,
            }
        }
    }

    /// Whether a definition of ours, established, defines the kind of `id`.
    fn defined(&self, id: &ObjectId) -> bool {
        self.live
            .any("apiextensions.k8s.io", "CustomResourceDefinition", |crd| {
                crd.value
                    .pointer("/spec/group")
                    .is_some_and(|g| *g == id.group.as_str())
                    && crd
                        .value
                        .pointer("/spec/names/kind")
                        .is_some_and(|k| *k == id.kind.as_str())
                    && health::assess(&crd.value, jiff::Timestamp::now()).state == State::Current
            })
    }

    /// Carries the steps of one stage out. `force`: recreate on immutable changes.
    pub(crate) async fn run_stage(&self, steps: Vec<Step>, force: bool) -> Result<Vec<Outcome>, Failed> {
        let changes = steps
            .iter()
            .filter(|s| matches!(s.action, Action::Create | Action::Configure))
            .count();
        let steps = if changes > 1 {
            self.try_all(steps, force).await?
        } else {
            steps
        };
        let outcomes: Vec<Result<Outcome, Error>> = stream::iter(steps)
            .map(|step| self.carry_out(step, force))
            .buffered(PARALLEL)
            .collect()
            .await;
        let (mut done, mut errors) = (Vec::new(), Vec::new());
        for outcome in outcomes {
            match outcome {
                Ok(outcome) => done.push(outcome),
                Err(error) => errors.push(error),
            }
        }
        if errors.is_empty() {
            Ok(done)
        } else {
            Err(Failed { errors, done })
        }
    }

    /// Tries every change; those that the server says are none become `Unchanged`.
    async fn try_all(&self, steps: Vec<Step>, force: bool) -> Result<Vec<Step>, Failed> {
        let try_one = |mut step: Step| async move {
            if !matches!(step.action, Action::Create | Action::Configure) {
                return Ok(step);
            }
            match self.patch(&step, true).await {
                Ok(answer) => {
                    let same = step
                        .live
                        .as_ref()
                        .is_some_and(|live| same_content(&live.value, &answer.value));
                    if same && !takes_over(&step) {
                        step.action = Action::Unchanged;
                    }
                    Ok(step)
                }
                Err(e) if recreates(&step, force, &e) => Ok(step),
                Err(e) => Err(object_error(
                    &step.desired.id,
                    "dry-run",
                    step.desired.origin.as_deref(),
                    &e,
                )),
            }
        };
        let tried: Vec<Result<Step, Error>> = stream::iter(steps)
            .map(try_one)
            .buffered(PARALLEL)
            .collect()
            .await;
        let (mut good, mut errors) = (Vec::new(), Vec::new());
        for step in tried {
            match step {
                Ok(step) => good.push(step),
                Err(error) => errors.push(error),
            }
        }
        if errors.is_empty() {
            Ok(good)
        } else {
            Err(Failed {
                errors,
                done: Vec::new(),
            })
        }
    }

    async fn carry_out(&self, step: Step, force: bool) -> Result<Outcome, Error> {
        let did = match step.action {
            Action::Unchanged => Did::Unchanged,
            Action::Skip(_) => Did::Skipped,
            Action::Create | Action::Configure => return self.write(step, force).await,
        };
        let accepted = if did == Did::Unchanged {
            step.live
                .as_deref()
                .and_then(|live| accepted(&step.desired, live))
        } else {
            None
        };
        Ok(Outcome {
            desired: step.desired,
            did,
            accepted,
        })
    }

    async fn write(&self, step: Step, force: bool) -> Result<Outcome, Error> {
        let id = &step.desired.id;
        let origin = step.desired.origin.as_deref();
        if takes_over(&step) {
            self.take_over(&step).await?;
        }
        let answer = match self.patch(&step, false).await {
            Ok(answer) => answer,
            Err(e) if recreates(&step, force, &e) => {
                self.delete_and_wait(&step).await?;
                self.patch(&step, false)
                    .await
                    .map_err(|e| object_error(id, "apply", origin, &e))?
            }
            Err(e) => return Err(object_error(id, "apply", origin, &e)),
        };
        let did = match &step.live {
            None => Did::Created,
            Some(live) if live.resource_version == answer.resource_version => Did::Unchanged,
            Some(_) => Did::Configured,
        };
        let accepted = accepted(&step.desired, &answer);
        self.live.put(id, answer);
        Ok(Outcome {
            desired: step.desired,
            did,
            accepted,
        })
    }

    /// Server-side apply. Unknown fields are errors: what nobody reads is a mistake in the manifest.
    async fn patch(&self, step: &Step, dry_run: bool) -> Result<LiveObject, kube::Error> {
        let desired = &step.desired;
        let api = self.discovery.api(&step.served, &desired.id.namespace);
        let value = plan::effective(&desired.value, step.live.as_deref());
        let mut params = PatchParams::apply(FIELD_MANAGER).force();
        params.dry_run = dry_run;
        params.field_validation = Some(ValidationDirective::Strict);
        let answer = api
            .patch(&desired.id.name, &params, &Patch::Apply(&*value))
            .await?;
        serde_json::to_value(answer)
            .map(LiveObject::new)
            .map_err(kube::Error::SerdeError)
    }

    /// Takes the fields that kubectl (or a non-apply write of ours) holds, and removes kubectl's annotation.
    async fn take_over(&self, step: &Step) -> Result<(), Error> {
        let id = &step.desired.id;
        let api = self.discovery.api(&step.served, &id.namespace);
        let failed = |e: kube::Error| object_error(id, "take over of fields", None, &e);
        let Some(object) = api.get_opt(&id.name).await.map_err(failed)? else {
            return Ok(());
        };
        let Ok(object) = serde_json::to_value(object) else {
            return Ok(());
        };
        let mut operations = vec![
            json!({"op": "test", "path": "/metadata/resourceVersion", "value": object["metadata"]["resourceVersion"]}),
        ];
        operations.push(
            json!({"op": "replace", "path": "/metadata/managedFields", "value": plan::taken_over(&object)}),
        );
        if object
            .pointer("/metadata/annotations/kubectl.kubernetes.io~1last-applied-configuration")
            .is_some()
        {
            operations.push(json!({"op": "remove", "path": "/metadata/annotations/kubectl.kubernetes.io~1last-applied-configuration"}));
        }
        let patch = serde_json::from_value(Value::Array(operations))
            .map_err(|e| failed(kube::Error::SerdeError(e)))?;
        let params = PatchParams {
            field_manager: Some(FIELD_MANAGER.into()),
            ..Default::default()
        };
        api.patch(&id.name, &params, &Patch::<Value>::Json(patch))
            .await
            .map(drop)
            .map_err(failed)
    }

    async fn delete_and_wait(&self, step: &Step) -> Result<(), Error> {
        let id = &step.desired.id;
        let uid = step
            .live
            .as_ref()
            .and_then(|l| l.value.pointer("/metadata/uid"))
            .cloned();
        self.delete(id, &step.served, step.live.as_deref()).await?;
        let gone =
            |live: Option<&LiveObject>| live.and_then(|l| l.value.pointer("/metadata/uid")).cloned() != uid;
        match tokio::time::timeout(RECREATE_TIMEOUT, self.live.wait(id, gone)).await {
            Ok(result) => result,
            Err(_) => Err(Error::Deadline {
                what: format!("{id} was to be recreated and is still being deleted (finalizers?), not gone"),
                after: RECREATE_TIMEOUT,
            }),
        }
    }

    /// Deletes in the background. An object that is gone or was replaced is no error.
    async fn delete(&self, id: &ObjectId, served: &Served, live: Option<&LiveObject>) -> Result<(), Error> {
        let api = self.discovery.api(served, &id.namespace);
        let uid = live
            .and_then(|l| l.value.pointer("/metadata/uid"))
            .and_then(Value::as_str)
            .map(str::to_string);
        let params = DeleteParams {
            propagation_policy: Some(PropagationPolicy::Background),
            preconditions: uid.map(|uid| Preconditions {
                uid: Some(uid),
                resource_version: None,
            }),
            ..Default::default()
        };
        match api.delete(&id.name, &params).await {
            Ok(_) => Ok(()),
            Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
            Err(e) => Err(object_error(id, "delete", None, &e)),
        }
    }

    /// Applies all stages in order, waiting between them until what the next needs is usable. `planned` hears of every
    /// stage's plan before it is carried out.
    pub(crate) async fn apply_all(
        &self,
        objects: &[Arc<Desired>],
        known: &Known<'_>,
        force: bool,
        first: Vec<(Stage, Vec<Step>)>,
    ) -> Result<Vec<Outcome>, Failed> {
        let mut done = Vec::new();
        let mut ready: std::collections::HashMap<Stage, Vec<Step>> = first.into_iter().collect();
        for stage in STAGES {
            let steps = match ready.remove(&stage) {
                Some(steps) => Ok(steps),
                None => self.plan_stage(stage, objects, known).await,
            };
            let result = match steps {
                Ok(steps) => self.run_stage(steps, force).await,
                Err(failed) => Err(failed),
            };
            match result {
                Ok(outcomes) => {
                    if stage != Stage::Rest {
                        let changed: Vec<&Outcome> = outcomes
                            .iter()
                            .filter(|o| matches!(o.did, Did::Created | Did::Configured))
                            .collect();
                        if let Err(error) = self.usable(&changed).await {
                            done.extend(outcomes);
                            return Err(Failed {
                                errors: vec![error],
                                done,
                            });
                        }
                    }
                    done.extend(outcomes);
                }
                Err(mut failed) => {
                    done.append(&mut failed.done);
                    failed.done = done;
                    return Err(failed);
                }
            }
        }
        Ok(done)
    }

    /// Waits until what a stage changed is settled.
    async fn usable(&self, changed: &[&Outcome]) -> Result<(), Error> {
        let deadline = tokio::time::Instant::now() + STAGE_TIMEOUT;
        for outcome in changed {
            let id = &outcome.desired.id;
            let settled = |live: Option<&LiveObject>| {
                live.is_some_and(|l| {
                    matches!(
                        health::assess(&l.value, jiff::Timestamp::now()).state,
                        State::Current | State::Failed
                    )
                })
            };
            tokio::time::timeout_at(deadline, self.live.wait(id, settled))
                .await
                .map_err(|_| Error::Deadline {
                    what: format!("{id} was applied and did not become usable"),
                    after: STAGE_TIMEOUT,
                })??;
            if id.kind == "CustomResourceDefinition"
                && let Some(group) = outcome
                    .desired
                    .value
                    .pointer("/spec/group")
                    .and_then(Value::as_str)
            {
                self.discovery.forget_group(group);
            }
        }
        Ok(())
    }

    /// Deletes what is stale and ours, last applied first. Gives what was deleted, and what could not be and stays.
    pub(crate) async fn prune(&self, stale: &[(ObjectId, String)], owner: &Key) -> Pruned {
        let mut order: Vec<&(ObjectId, String)> = stale.iter().collect();
        order.sort_by(|(a, _), (b, _)| {
            plan::stage(b)
                .cmp(&plan::stage(a))
                .then(plan::rank(b).cmp(&plan::rank(a)))
                .then_with(|| b.cmp(a))
        });
        let mut pruned = Pruned::default();
        for (id, api_version) in order {
            match self.prune_one(id, api_version, owner).await {
                Ok(Prune::Delete) => pruned.deleted.push(id.clone()),
                Ok(Prune::Gone) => {}
                Ok(Prune::Keep(reason)) => pruned.kept.push((id.clone(), reason)),
                Err(error) => {
                    pruned.failed.push((id.clone(), api_version.clone()));
                    pruned.errors.push(error);
                }
            }
        }
        pruned
    }

    /// The verdict for each stale object, without acting.
    pub(crate) async fn plan_prune(
        &self,
        id: &ObjectId,
        api_version: &str,
        owner: &Key,
    ) -> Result<(Prune, Option<Served>, Option<Arc<LiveObject>>), Error> {
        let served = match self.discovery.served(id, api_version).await {
            // Its definition is gone, and all objects with it.
            Err(Error::NoKind { .. }) => return Ok((Prune::Gone, None, None)),
            other => other?,
        };
        let live = self.look(&served, id).await?;
        Ok((plan::prune(live.as_deref(), owner), Some(served), live))
    }

    async fn prune_one(&self, id: &ObjectId, api_version: &str, owner: &Key) -> Result<Prune, Error> {
        let (verdict, served, live) = self.plan_prune(id, api_version, owner).await?;
        if let (Prune::Delete, Some(served)) = (verdict, served) {
            self.delete(id, &served, live.as_deref()).await?;
        }
        Ok(verdict)
    }
}

/// What pruning did.
#[derive(Debug, Default)]
pub(crate) struct Pruned {
    pub(crate) deleted: Vec<ObjectId>,
    pub(crate) kept: Vec<(ObjectId, &'static str)>,
    /// Refused deletions: they stay in the inventory.
    pub(crate) failed: Vec<(ObjectId, String)>,
    pub(crate) errors: Vec<Error>,
}

fn check_scope(desired: &Desired, served: &Served) -> Result<(), Error> {
    let id = &desired.id;
    let from = desired
        .origin
        .as_deref()
        .map(|o| format!(" (from {o})"))
        .unwrap_or_default();
    if served.namespaced && id.namespace.is_empty() {
        return Err(Error::Spec(format!(
            "{id} namespace not specified{from}; set metadata.namespace or spec.targetNamespace"
        )));
    }
    Ok(())
}

fn accepted(desired: &Desired, live: &LiveObject) -> Option<Accepted> {
    let owned = live.owned.as_ref()?;
    Some(Accepted {
        desired: desired.digest,
        projection: fields::projection(&live.value, owned),
    })
}

fn takes_over(step: &Step) -> bool {
    step.live.as_ref().is_some_and(|l| l.foreign) && !step.desired.merges()
}

/// Whether two answers of the server describe the same object, apart from bookkeeping.
fn same_content(live: &Value, answer: &Value) -> bool {
    let strip = |v: &Value| {
        let mut v = v.clone();
        if let Some(root) = v.as_object_mut() {
            root.remove("status");
            if let Some(metadata) = root.get_mut("metadata").and_then(Value::as_object_mut) {
                for field in ["managedFields", "resourceVersion", "generation"] {
                    metadata.remove(field);
                }
            }
        }
        v
    };
    strip(live) == strip(answer)
}

/// A change that the server refuses because a field cannot change, on an object that may be recreated.
fn recreates(step: &Step, force: bool, error: &kube::Error) -> bool {
    let exists = step.live.is_some();
    exists && (force || step.desired.forced()) && is_immutable(error)
}
