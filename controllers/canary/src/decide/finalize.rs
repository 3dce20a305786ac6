//! Deletion of a Canary that gives everything back (`revertOnDeletion`).

use serin_crds::flagger::CanaryPhase;

use super::{Action, Deciding, after, micro};
use crate::observed::Readiness;

impl Deciding<'_> {
    /// The target gets its pods back, then the apex Service and the route are given back, then the Canary may go (and
    /// with it, by garbage collection, what it owned). Traffic is never without a backend in between.
    pub(super) fn finalize(&mut self) {
        if !self.seen.has_finalizer {
            return;
        }
        if self.phase() != CanaryPhase::Terminating {
            self.set_phase(CanaryPhase::Terminating);
            self.tell(format!("Terminating canary {}", self.own_name()));
            let now = micro(self.now);
            let run = self.status.run.get_or_insert_default();
            run.waiting_since = now;
        }
        if let Some(target) = self.target().cloned() {
            if target.replicas == 0 {
                let replicas = self
                    .seen
                    .primary
                    .as_ref()
                    .map_or(1, |primary| primary.replicas.max(1));
                self.actions.push(Action::ScaleTarget(replicas));
                return self.wait_for(format!("{} is scaled up", target.name));
            }
            if !target.can_serve(100) {
                let now = self.now;
                let run = self.status.run.get_or_insert_default();
                let since = run.waiting_since.get_or_insert_with(|| now.into()).0;
                // A target that never becomes ready must not keep its Canary, and the namespace, for ever.
                if now < after(since, self.plan.progress_deadline) {
                    self.wake_after(since, self.plan.progress_deadline);
                    let reason = match target.readiness(100) {
                        Readiness::Ready => "no pod is available".to_owned(),
                        Readiness::NotYet(reason) | Readiness::Never(reason) => reason,
                    };
                    return self.wait_for(format!("{} not ready: {reason}", target.name));
                }
            }
        }
        self.actions
            .extend([Action::RevertApex, Action::RevertRoute, Action::RemoveFinalizer]);
        self.tell(format!("Terminated canary {}", self.own_name()));
    }
}
