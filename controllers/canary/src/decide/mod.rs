//! The decision function: what is seen, what is wanted, where the rollout stands and what time it is, in; the next
//! status and the actions that lead there, out. Pure.
//!
//! The promises, each kept by construction here and checked over generated histories in the tests:
//!
//! - *Abort sets weight 0 first, unconditionally*: no action stands in front of it, nothing is waited for.
//! - A weight is only ever given to what is ready: canary pods available, endpoints there, and never while a reason to
//!   abort stands.
//! - Within a run the share of the canary never falls before its end, and grows only after a window in which every proxy
//!   that needs the weight had it.
//! - The canary is scaled down only when no proxy sends it anything any more (or [`DRAIN_DEADLINE`] has passed).
//! - The primary is never scaled here, and changed only by a promotion, or by what takes a promotion back.
//! - *No data* halts: it is neither a failed check nor a passed one.
//!
//! Every action is idempotent, and actions come before the status that reports them. So a controller that dies in
//! between decides the same again.

#[cfg(test)]
mod comparison_tests;
mod finalize;
#[cfg(test)]
mod golden;
mod power;
mod progress;
mod promote;
#[cfg(test)]
mod simulation;
mod status;
#[cfg(test)]
mod tests;
pub(crate) mod watch;
#[cfg(test)]
mod watch_tests;

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use serin_crds::flagger::{CanaryPhase, CanaryStatus, RunStatus, StepOutcome};

use crate::observed::{Observed, Readiness, Workload};
use crate::plan::Plan;
use crate::traffic::Split;

pub(crate) use status::{COMPARISON_STATE, VALUES_STATE, micro};

/// How long a withdrawn weight may take to leave the last proxy before the pods behind it go anyway. Pods drain for
/// themselves (30 s termination grace period by default), so this only has to cover a proxy that is slow to hear.
pub const DRAIN_DEADLINE: Duration = Duration::from_secs(30);

/// Something to do, in the order given. Each is idempotent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Make the route object carry this split.
    SetWeight(Split),
    /// Set the target's replicas.
    ScaleTarget(i32),
    /// Create the primary and its ConfigMaps and Secrets from the target, or bring what of it is missing back.
    CreatePrimary {
        /// Value of the annotation `flagger-id`.
        id: String,
        /// Replicas that it has then.
        replicas: i32,
    },
    /// Copy the target's template, ConfigMaps and Secrets to the primary.
    PromotePrimary {
        /// Value of the annotation `flagger-id`.
        id: String,
        /// Replicas that it has then.
        replicas: i32,
    },
    /// Keep the primary as it is, with its ConfigMaps and Secrets, for [`Action::RestorePrimary`].
    KeepFormer {
        /// Its annotation `flagger-id`; another primary is not kept.
        former: String,
        /// The `flagger-id` of the revision that it makes room for.
        replaced_by: String,
    },
    /// Bring the primary back that was kept.
    RestorePrimary {
        /// Its annotation `flagger-id`.
        id: String,
    },
    /// Write the Services of primary and canary.
    ApplyServices,
    /// Point the apex Service to the primary.
    ApplyApex,
    /// Write the DestinationRules.
    ApplyRules,
    /// Put our finalizer on the Canary.
    AddFinalizer,
    /// Take our finalizer off the Canary.
    RemoveFinalizer,
    /// Point the apex Service back to the target, as it was before, if it was not ours.
    RevertApex,
    /// Give the route object back as it was before, if it was not ours.
    RevertRoute,
}

/// A Kubernetes event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// Whether its type is `Warning`.
    pub warning: bool,
    /// Its text, in Flagger's words where Flagger has it.
    pub message: String,
}

/// What follows.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Decision {
    /// The status that holds once the actions are done.
    pub status: CanaryStatus,
    /// What to do, in this order.
    pub actions: Vec<Action>,
    /// What to tell.
    pub events: Vec<Event>,
    /// When to decide again at the latest, whatever happens.
    pub wake_at: Option<Timestamp>,
}

/// The workings of one decision.
struct Deciding<'a> {
    seen: &'a Observed,
    plan: &'a Plan,
    now: Timestamp,
    status: CanaryStatus,
    actions: Vec<Action>,
    events: Vec<Event>,
    wake_at: Option<Timestamp>,
}

/// Decides. See the module documentation for what it promises.
pub fn decide(seen: &Observed, plan: &Plan, status: &CanaryStatus, now: Timestamp) -> Decision {
    let mut deciding = Deciding {
        seen,
        plan,
        now,
        status: status.clone(),
        actions: Vec::new(),
        events: Vec::new(),
        wake_at: None,
    };
    deciding.status.message = None;
    deciding.status.observed_generation = Some(seen.generation);
    deciding.run();
    status::finish(&mut deciding, status);
    Decision {
        status: deciding.status,
        actions: deciding.actions,
        events: deciding.events,
        wake_at: deciding.wake_at,
    }
}

impl<'a> Deciding<'a> {
    fn run(&mut self) {
        if self.seen.deleting {
            return self.finalize();
        }
        if self.plan.revert_on_deletion != self.seen.has_finalizer {
            let change = if self.plan.revert_on_deletion {
                Action::AddFinalizer
            } else {
                Action::RemoveFinalizer
            };
            self.actions.push(change);
        }
        if self.plan.is_refused() {
            // Traffic that nobody would watch must not stay on a canary.
            self.withdraw();
            return self.wait_for("the spec is refused; see the condition FullyHonoured");
        }
        if let Some(rival) = &self.seen.rival {
            self.withdraw();
            return self.wait_for(format!(
                "Canary {rival} rolls out the same target; delete one of the two"
            ));
        }
        if self.plan.suspend {
            if let Some(run) = self.status.run.as_mut() {
                // What is measured while nobody may act on it is not held against, or for, the release.
                run.window_started_at = None;
            }
            return self.wait_for("suspended; weights stay where they are");
        }
        if self.seen.target.is_none() {
            self.withdraw();
            return self.wait_for(format!(
                "Deployment {} does not exist",
                self.full(&self.plan.target)
            ));
        }
        match self.phase() {
            CanaryPhase::Unset | CanaryPhase::Initializing => self.initialize(),
            CanaryPhase::Initialized
            | CanaryPhase::Succeeded
            | CanaryPhase::Failed
            | CanaryPhase::Waiting
            | CanaryPhase::Terminating
            | CanaryPhase::Terminated
            | CanaryPhase::Other(_) => self.rest(),
            CanaryPhase::Progressing | CanaryPhase::WaitingPromotion => self.progress(),
            CanaryPhase::Promoting => self.promoting(),
            CanaryPhase::Finalising => self.finalising(),
        }
    }

    /// First run: primary, Services and route come into being; then the target goes to zero.
    fn initialize(&mut self) {
        self.set_phase(CanaryPhase::Initializing);
        if self.is_blocked() {
            return;
        }
        self.keep_objects();
        let (Some(target), Some(primary)) = (self.target(), self.seen.primary.as_ref()) else {
            return self.wait_for(format!("{} is being created", self.full(&self.plan.primary())));
        };
        match primary.readiness(self.plan.primary_ready_percent) {
            Readiness::Ready if primary.available > 0 || primary.replicas == 0 => {}
            Readiness::Ready => return self.wait_for(format!("{} has no available pod", primary.name)),
            Readiness::NotYet(reason) | Readiness::Never(reason) => {
                return self.wait_for(format!("{} not ready: {reason}", primary.name));
            }
        }
        self.keep_routing();
        self.route_to(Split::PRIMARY);
        let in_place = self.seen.apex_in_place && self.seen.rules_in_place;
        if !in_place || !self.is_drained() {
            return self.wait_for("traffic moves to the primary");
        }
        let (hash, replicas) = (target.template_hash.clone(), target.replicas);
        if replicas > 0 {
            self.actions.push(Action::ScaleTarget(0));
        }
        self.status.last_applied_spec = Some(hash.clone());
        self.status.last_promoted_spec = Some(hash);
        self.status.tracked_configs = Some(self.seen.configs.clone());
        self.status.run = None;
        self.set_weight_status(0);
        self.set_phase(CanaryPhase::Initialized);
        self.tell(format!("Initialization done! {}", self.own_name()));
    }

    /// No run: objects are kept as they should be, leftovers of the last run are cleared, and a new revision starts one.
    fn rest(&mut self) {
        if self.is_blocked() {
            return;
        }
        self.keep_objects();
        self.keep_routing();
        // A failed promotion leaves everything on the canary until a person has repaired the primary.
        let promotion_failed = self.phase() == CanaryPhase::Failed && self.status.canary_weight == Some(100);
        let target = self.target().cloned().unwrap_or_default();
        if promotion_failed && target.available > 0 {
            self.route_to(Split::CANARY);
        } else {
            self.route_to(Split::PRIMARY);
        }
        if self.is_new_revision(&target.template_hash) {
            return self.start_run();
        }
        if self.phase() == CanaryPhase::Failed
            && self.status.last_promoted_spec.as_ref() == Some(&target.template_hash)
        {
            // The promoted revision was restored: the same bad revision after this is a new one.
            self.status.last_applied_spec = Some(target.template_hash.clone());
        }
        if self.status.run.is_some() && !promotion_failed {
            if !self.is_drained() {
                return;
            }
            if target.replicas > 0 {
                self.actions.push(Action::ScaleTarget(0));
            }
            self.status.run = None;
        }
        self.watch();
    }

    fn start_run(&mut self) {
        let Some(target) = self.target() else {
            return;
        };
        let Some(primary) = self.seen.primary.as_ref() else {
            return;
        };
        if let Readiness::NotYet(reason) | Readiness::Never(reason) =
            primary.readiness(self.plan.primary_ready_percent)
        {
            return self.wait_for(format!("{} not ready: {reason}", primary.name));
        }
        let replicas = primary.replicas.max(1);
        if target.replicas == 0 {
            self.actions.push(Action::ScaleTarget(replicas));
        }
        self.tell(format!("New revision detected! Scaling up {}", target.name));
        self.begin(&target.template_hash);
    }

    /// When the last proxy had learnt that the former run's canary gets no more traffic; `None` if it never got any. A push
    /// that comes right after a promotion or a rollback finds requests to the former canary that are not reported yet.
    fn former_traffic_left(&self) -> Option<MicroTime> {
        let history = &self.status.history;
        if history.iter().all(|step| step.weight == 0) {
            return None;
        }
        let left = history.last().filter(|step| step.weight == 0);
        left.and_then(|step| step.live_at.clone())
            .or_else(|| micro(self.now))
    }

    /// Zeroes what belongs to a run and starts one for the revision.
    fn begin(&mut self, hash: &str) {
        self.status.last_applied_spec = Some(hash.to_owned());
        self.status.tracked_configs = Some(self.seen.configs.clone());
        self.status.failed_checks = Some(0);
        self.status.iterations = Some(0);
        self.status.metrics.clear();
        self.status.watch = None;
        let left = self.former_traffic_left();
        self.status.history.clear();
        self.status.weight_live = None;
        let routed = self.seen.route.as_ref().and_then(|route| route.split);
        let had_traffic = self.weight() > 0
            || routed.is_some_and(|split| split.canary() > 0)
            || self
                .status
                .run
                .as_ref()
                .is_some_and(|run| run.former_traffic_until.is_some());
        self.status.run = Some(RunStatus {
            started_at: micro(self.now),
            waiting_since: micro(self.now),
            former_traffic_until: if had_traffic { micro(self.now) } else { left },
            ..RunStatus::default()
        });
        self.set_weight_status(0);
        self.set_phase(CanaryPhase::Progressing);
    }

    /// Services and primary exist and are as they should be. The primary's template is left alone.
    fn keep_objects(&mut self) {
        if !self.seen.services_in_place {
            self.actions.push(Action::ApplyServices);
        }
        if self.seen.primary.is_none()
            && let Some(target) = self.target()
        {
            if let Some(id) = self.brought_back() {
                return self.actions.push(Action::RestorePrimary { id });
            }
            let id = revision_id(&self.seen.name, &target.template_hash, &self.seen.configs);
            // Later the target is at rest at zero, and a lost primary must not come back without pods.
            let replicas = match self.phase() {
                CanaryPhase::Unset | CanaryPhase::Initializing => target.replicas,
                _ => target.replicas.max(1),
            };
            self.actions.push(Action::CreatePrimary { id, replicas });
        }
    }

    /// The apex Service points to the primary, and the DestinationRules are there.
    fn keep_routing(&mut self) {
        if !self.seen.apex_in_place {
            self.actions.push(Action::ApplyApex);
        }
        if !self.seen.rules_in_place {
            self.actions.push(Action::ApplyRules);
        }
    }

    /// The action that copies the target's revision to the primary, with as many pods as the target was given.
    fn promotion(&self, id: String) -> Action {
        let replicas = |workload: Option<&Workload>| {
            workload
                .map(|workload| workload.replicas)
                .filter(|count| *count > 0)
        };
        let replicas = replicas(self.target())
            .or(replicas(self.seen.primary.as_ref()))
            .unwrap_or(1);
        Action::PromotePrimary { id, replicas }
    }

    fn is_blocked(&mut self) -> bool {
        if let Some(reason) = self.seen.blocked.clone() {
            self.withdraw();
            self.wait_for(reason);
            return true;
        }
        false
    }

    fn is_new_revision(&self, hash: &str) -> bool {
        let same = |known: &Option<String>| known.as_deref() == Some(hash);
        let template = !same(&self.status.last_applied_spec) && !same(&self.status.last_promoted_spec);
        template || self.configs_changed()
    }

    fn configs_changed(&self) -> bool {
        self.status
            .tracked_configs
            .as_ref()
            .is_some_and(|tracked| *tracked != self.seen.configs)
    }

    // ---- small words -------------------------------------------------------------------------------------------

    fn phase(&self) -> CanaryPhase {
        self.status.phase.clone().unwrap_or_default()
    }

    fn weight(&self) -> i32 {
        self.status.canary_weight.unwrap_or(0)
    }

    fn target(&self) -> Option<&'a Workload> {
        self.seen.target.as_ref()
    }

    fn own_name(&self) -> String {
        self.full(&self.seen.name)
    }

    fn full(&self, name: &str) -> String {
        format!("{name}.{}", self.seen.namespace)
    }

    fn tell(&mut self, message: String) {
        self.events.push(Event {
            warning: false,
            message,
        });
    }

    fn warn(&mut self, message: String) {
        self.events.push(Event {
            warning: true,
            message,
        });
    }

    fn wait_for(&mut self, what: impl Into<String>) {
        self.status.message = Some(what.into());
    }

    fn wake_after(&mut self, since: Timestamp, duration: Duration) {
        let at = after(since, duration);
        self.wake_at = Some(self.wake_at.map_or(at, |earlier| earlier.min(at)));
    }

    /// Makes the route carry a split, unless it does.
    fn route_to(&mut self, split: Split) {
        let carries = self
            .seen
            .route
            .as_ref()
            .is_some_and(|route| route.in_place && route.split == Some(split));
        if !carries {
            self.actions.push(Action::SetWeight(split));
        }
    }

    /// Takes the canary's traffic away at once, whatever else is wrong. In front of every other action.
    fn withdraw(&mut self) {
        let carried = self.seen.route.as_ref().map(|route| route.split);
        let has_traffic = match carried {
            Some(Some(split)) => split.canary() > 0,
            // A route that we cannot read is only ours to set right while a run is on.
            Some(None) => self.weight() > 0,
            None => false,
        };
        // Nothing to fall back on: a failed promotion stays where it is.
        let promotion_failed = self.phase() == CanaryPhase::Failed;
        if (has_traffic || self.weight() > 0) && !promotion_failed {
            self.actions.insert(0, Action::SetWeight(Split::PRIMARY));
            self.set_weight_status(0);
            self.end_step(StepOutcome::Restarted);
            if let Some(run) = self.status.run.as_mut() {
                run.window_started_at = None;
            }
        }
    }

    /// Whether every proxy knows the route's current split, or has had long enough to.
    fn is_drained(&mut self) -> bool {
        let Some(route) = self.seen.route.as_ref() else {
            return false;
        };
        if !route.in_place || route.split != Some(Split::PRIMARY) {
            self.mark_step_start();
            return false;
        }
        if self.live_now() {
            self.step_is_live();
            self.end_step(StepOutcome::Passed);
            return true;
        }
        let since = self.mark_step_start();
        if self.now >= after(since, DRAIN_DEADLINE) {
            self.end_step(StepOutcome::Passed);
            return true;
        }
        self.wake_after(since, DRAIN_DEADLINE);
        false
    }

    /// When the wait for the current weight began; now, if it had not.
    fn mark_step_start(&mut self) -> Timestamp {
        let now = micro(self.now);
        let run = self.status.run.get_or_insert_default();
        run.step_started_at
            .get_or_insert_with(|| now.unwrap_or_else(|| self.now.into()))
            .0
    }

    /// Whether the generation that the route object has now is live everywhere.
    fn live_now(&self) -> bool {
        match (&self.seen.route, &self.seen.liveness) {
            (Some(route), Some(live)) => live.generation == route.generation && live.is_live(),
            _ => false,
        }
    }
}

/// The annotation `flagger-id` of a primary made from this revision. Flagger writes a random UUID; a function of the
/// revision makes the copy idempotent, and still rolls the pods when only a ConfigMap changed.
pub fn revision_id(
    canary: &str,
    template_hash: &str,
    configs: &std::collections::BTreeMap<String, String>,
) -> String {
    use sha2::Digest;
    let mut hasher = sha2::Sha256::new();
    for part in [canary, template_hash] {
        hasher.update(part.as_bytes());
        hasher.update([0]);
    }
    for (name, hash) in configs {
        hasher.update(name.as_bytes());
        hasher.update([0]);
        hasher.update(hash.as_bytes());
        hasher.update([0]);
    }
    let digest = hasher.finalize();
    let hex = crate::hex(&digest[..16]);
    // RFC 9562 version 8: a UUID whose bits are our own business.
    format!(
        "{}-{}-8{}-8{}-{}",
        &hex[..8],
        &hex[8..12],
        &hex[13..16],
        &hex[17..20],
        &hex[20..32]
    )
}

fn after(since: Timestamp, duration: Duration) -> Timestamp {
    let duration = SignedDuration::try_from(duration).unwrap_or(SignedDuration::MAX);
    since.checked_add(duration).unwrap_or(Timestamp::MAX)
}
