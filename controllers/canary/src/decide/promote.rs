//! After the last check: the primary takes the revision over, traffic moves back, the canary goes.

use serin_crds::flagger::{CanaryPhase, StepOutcome};

use super::{Action, Deciding, after, micro, revision_id};
use crate::observed::Readiness;
use crate::traffic::Split;

impl Deciding<'_> {
    /// The primary rolls to the new revision. The canary keeps its share meanwhile.
    pub(super) fn promoting(&mut self) {
        let Some(target) = self.target() else {
            return;
        };
        let superseded = self.status.last_applied_spec.as_deref() != Some(&target.template_hash);
        let primary_serves = self
            .seen
            .primary
            .as_ref()
            .is_some_and(|primary| primary.available > 0);
        if (superseded && primary_serves) || target.available == 0 {
            // Pods of a revision that nobody judged are rolling in behind the weight (or none are left): take it away.
            // The primary goes on with what was promoted.
            self.withdraw();
        } else {
            self.route_to(Split::of_canary(self.weight()));
        }
        if self.seen.blocked.is_none() {
            self.keep_objects();
        }
        let id = revision_id(
            &self.seen.name,
            self.status.last_applied_spec.as_deref().unwrap_or_default(),
            &self.status.tracked_configs.clone().unwrap_or_default(),
        );
        let Some(primary) = self.seen.primary.clone() else {
            return self.wait_for(format!("{} is being created", self.full(&self.plan.primary())));
        };
        if primary.promoted_id.as_deref() != Some(&id) {
            if superseded || self.configs_changed() {
                // What was to be promoted exists nowhere any more.
                self.tell(format!(
                    "New revision detected! Restarting analysis for {}",
                    target.name
                ));
                return self.begin(&target.template_hash);
            }
            self.keep_former(&id);
            let promotion = self.promotion(id);
            self.actions.push(promotion);
            return self.wait_for(format!("{} takes the revision over", primary.name));
        }
        let now = self.now;
        match primary.readiness(self.plan.primary_ready_percent) {
            Readiness::Ready if primary.available > 0 || primary.replicas == 0 => {}
            Readiness::Ready => return self.wait_for(format!("{} has no available pod", primary.name)),
            Readiness::Never(reason) => return self.promotion_failed(&primary.name, &reason),
            Readiness::NotYet(reason) => {
                // Flagger counts its deadline only while nothing is available, so a primary whose old pods still serve
                // is waited for until the Deployment itself gives up.
                if primary.available == 0 {
                    let run = self.status.run.get_or_insert_default();
                    let since = run.waiting_since.get_or_insert_with(|| now.into()).0;
                    if now >= after(since, self.plan.progress_deadline) {
                        return self.promotion_failed(&primary.name, &reason);
                    }
                    self.wake_after(since, self.plan.progress_deadline);
                } else if let Some(run) = self.status.run.as_mut() {
                    run.waiting_since = None;
                }
                return self.wait_for(format!("{} not ready: {reason}", primary.name));
            }
        }
        if self.plan.skip_analysis || self.plan.promotion_step == 0 || self.weight() == 0 {
            return self.all_to_primary();
        }
        self.step_back();
    }

    /// `stepWeightPromotion`: the primary's share grows by one step per interval.
    fn step_back(&mut self) {
        let weight = self.weight();
        let run = self.status.run.get_or_insert_default();
        let stepped = run.window_started_at.as_ref().map(|at| at.0);
        if let Some(stepped) = stepped {
            self.route_to(Split::of_canary(weight));
            if self.now < after(stepped, self.plan.interval) {
                self.wake_after(stepped, self.plan.interval);
                return self.wait_for(format!("primary weight {}", 100 - weight));
            }
        }
        let next = (weight - self.plan.promotion_step).max(0);
        let canary = self.own_name();
        self.tell(format!("Advance {canary} primary weight {}", 100 - next));
        if next == 0 {
            return self.finalise();
        }
        // A route that is being repaired above must not stand behind the step.
        self.actions
            .retain(|action| !matches!(action, Action::SetWeight(_)));
        self.actions.push(Action::SetWeight(Split::of_canary(next)));
        self.end_step(StepOutcome::Promoted);
        self.begin_step(next);
        let now = micro(self.now);
        self.status.run.get_or_insert_default().window_started_at = now;
        self.wake_after(self.now, self.plan.interval);
    }

    fn all_to_primary(&mut self) {
        self.tell("Routing all traffic to primary".to_owned());
        self.finalise();
    }

    fn finalise(&mut self) {
        self.actions
            .retain(|action| !matches!(action, Action::SetWeight(_)));
        self.route_to(Split::PRIMARY);
        self.end_step(StepOutcome::Promoted);
        self.begin_step(0);
        self.set_phase(CanaryPhase::Finalising);
        self.wait_for("traffic leaves the canary");
    }

    /// Nothing goes to the canary any more: it is scaled down.
    pub(super) fn finalising(&mut self) {
        if self.seen.blocked.is_none() {
            self.keep_objects();
        }
        self.route_to(Split::PRIMARY);
        if !self.is_drained() {
            return self.wait_for("traffic leaves the canary");
        }
        let Some(target) = self.target() else {
            return;
        };
        let former_spec = self.status.last_promoted_spec.clone();
        self.status
            .last_promoted_spec
            .clone_from(&self.status.last_applied_spec);
        self.begin_watch(former_spec);
        // A revision that was pushed meanwhile needs the pods at once again.
        if target.replicas > 0 && !self.is_new_revision(&target.template_hash) {
            self.actions.push(Action::ScaleTarget(0));
        }
        self.status.run = None;
        self.set_phase(CanaryPhase::Succeeded);
        let text = if self.plan.skip_analysis {
            format!(
                "Promotion completed! Canary analysis was skipped for {}",
                self.own_name()
            )
        } else {
            format!("Promotion completed! Scaling down {}", target.name)
        };
        self.tell(text);
    }

    /// The primary cannot take the revision over, and the canary has it: all traffic goes there, for a person to repair.
    fn promotion_failed(&mut self, primary: &str, reason: &str) {
        let message = format!("{primary} not ready: {reason}");
        let target = self.target().cloned().unwrap_or_default();
        self.warn(format!(
            "Promotion of {} failed, primary not ready: {message}",
            self.own_name()
        ));
        self.end_step(StepOutcome::Failed);
        // Only what is ready gets traffic.
        let superseded = self.status.last_applied_spec.as_deref() != Some(&target.template_hash);
        let to_canary = target.can_serve(self.plan.canary_ready_percent) && !superseded;
        self.actions
            .retain(|action| !matches!(action, Action::SetWeight(_)));
        let split = if to_canary { Split::CANARY } else { Split::PRIMARY };
        self.actions.insert(0, Action::SetWeight(split));
        self.set_weight_status(split.canary());
        self.status.failed_checks = Some(0);
        self.status.run = None;
        self.set_phase(CanaryPhase::Failed);
        self.status.message = Some(format!("promotion failed: {message}"));
    }
}
