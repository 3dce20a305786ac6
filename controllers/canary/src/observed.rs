//! What is seen of the world: one plain struct, filled from watch caches by the shell, read by `decide`.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serin_analysis::Judges;
use serin_analysis::judge::watch::Watch;
use serin_analysis::sample::Counts;

use crate::templates::Reading;
use crate::traffic::{Liveness, Split};

/// Everything that a decision rests on.
#[derive(Clone, Debug, Default)]
pub struct Observed {
    /// Name of the Canary.
    pub name: String,
    /// Namespace of the Canary.
    pub namespace: String,
    /// Generation of the Canary.
    pub generation: i64,
    /// Whether the Canary is being deleted.
    pub deleting: bool,
    /// Whether our finalizer is on the Canary.
    pub has_finalizer: bool,
    /// The Deployment under test, if it exists.
    pub target: Option<Workload>,
    /// The Deployment that serves everybody else, if it exists.
    pub primary: Option<Workload>,
    /// Why the primary cannot be derived from the target (no usable selector label, a missing ConfigMap), if so.
    pub blocked: Option<String>,
    /// Hash of every tracked ConfigMap and Secret of the target, by `configmap/<name>` or `secret/<name>`.
    pub configs: BTreeMap<String, String>,
    /// Whether the Services of primary and canary are as they should be.
    pub services_in_place: bool,
    /// Whether the apex Service points to the primary and is otherwise as it should be.
    pub apex_in_place: bool,
    /// Whether the DestinationRules are as they should be.
    pub rules_in_place: bool,
    /// The route object, if it exists.
    pub route: Option<RouteState>,
    /// How live the route object's current generation is, as far as known.
    pub liveness: Option<Liveness>,
    /// Ready endpoints of the canary Service; `None` where endpoints are not watched.
    pub canary_endpoints: Option<usize>,
    /// Pods of the canary that died.
    pub dead_pods: Vec<DeadPod>,
    /// What was measured since the current weight is live.
    pub measured: Measured,
    /// What metric providers last said, in the order of the plan's templates.
    pub readings: Vec<Option<Reading>>,
    /// The state of their rules, by metric, to be kept in the status.
    pub values: std::collections::BTreeMap<String, serin_analysis::judge::values::Values>,
    /// The primary that was kept when it was last overwritten.
    pub former: Option<Former>,
    /// Another Canary that rolls out the same target and came first.
    pub rival: Option<String>,
}

/// A primary that was kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Former {
    /// Its annotation `flagger-id`.
    pub id: String,
    /// That of the primary that took its place.
    pub replaced_by: String,
}

/// A Deployment, as far as a rollout cares.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Workload {
    /// `<name>.<namespace>`, as Flagger's messages name it.
    pub name: String,
    /// `metadata.generation`.
    pub generation: i64,
    /// `status.observedGeneration`.
    pub observed_generation: i64,
    /// `spec.replicas`.
    pub replicas: i32,
    /// `status.replicas`: pods of all revisions.
    pub total: i32,
    /// `status.updatedReplicas`: pods of the current revision.
    pub updated: i32,
    /// `status.availableReplicas`.
    pub available: i32,
    /// Whether the Deployment itself gave up (`Progressing=False`, reason `ProgressDeadlineExceeded`).
    pub deadline_exceeded: bool,
    /// Hash of the pod template.
    pub template_hash: String,
    /// The annotation `flagger-id` of the pod template, which names what a primary was promoted from.
    pub promoted_id: Option<String>,
}

/// Whether a workload can take traffic.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Readiness {
    /// It can.
    Ready,
    /// It cannot yet.
    NotYet(String),
    /// The Deployment has given up; waiting does not help.
    Never(String),
}

impl Workload {
    /// Flagger's rule: everything is rolled out and `percent` of the updated pods are available.
    pub fn readiness(&self, percent: i32) -> Readiness {
        let waiting = |text: String| Readiness::NotYet(format!("waiting for rollout to finish: {text}"));
        if self.observed_generation < self.generation {
            return waiting("observed deployment generation less than desired generation".to_owned());
        }
        if self.deadline_exceeded {
            let name = self.name.split('.').next().unwrap_or(&self.name);
            return Readiness::Never(format!("deployment {name:?} exceeded its progress deadline"));
        }
        if self.updated < self.replicas {
            return waiting(format!(
                "{} out of {} new replicas have been updated",
                self.updated, self.replicas
            ));
        }
        if self.total > self.updated {
            return waiting(format!(
                "{} old replicas are pending termination",
                self.total - self.updated
            ));
        }
        // 64 bits: 100 times a count that a hostile status may set to i32::MAX.
        if i64::from(self.available) * 100 < i64::from(percent) * i64::from(self.updated) {
            return waiting(format!(
                "{} of {} (readyThreshold {percent}%) updated replicas are available",
                self.available, self.updated
            ));
        }
        Readiness::Ready
    }

    /// Whether it is rolled out, wanted, and has at least one pod to send requests to.
    pub fn can_serve(&self, percent: i32) -> bool {
        self.replicas > 0 && self.available > 0 && self.readiness(percent) == Readiness::Ready
    }
}

/// The route object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RouteState {
    /// Its `metadata.generation`.
    pub generation: i64,
    /// The split that it carries; `None` when it carries something else.
    pub split: Option<Split>,
    /// Whether everything but the weights is as it should be.
    pub in_place: bool,
}

/// A pod of the canary that died.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeadPod {
    /// Its name.
    pub name: String,
    /// What happened, for example `container app exited with code 1`.
    pub reason: String,
    /// When, to the second.
    pub at: Timestamp,
}

/// Measurements since the current weight is live.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Measured {
    /// Since when this process has been measuring; a window that opened before is only complete from here on.
    pub since: Option<Timestamp>,
    /// Canary requests within each metric's window, in the order of the plan.
    pub windows: Vec<Counts>,
    /// The evidence of this run.
    pub judges: Judges,
    /// The detector of the watch after a promotion, where that is on.
    pub watch: Option<Watch>,
    /// Requests to the canary since the current weight is live.
    pub step_requests: u64,
    /// What was seen of the service's traffic in this run.
    pub traffic: Traffic,
    /// Why nothing can be measured, if so.
    pub error: Option<String>,
}

/// The service's traffic in this run, both arms, from the moment of the subscription.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Requests to both.
    pub requests: u64,
    /// Requests to the primary.
    pub primary: u64,
    /// Those of them that failed.
    pub primary_errors: u64,
    /// Over this many milliseconds.
    pub milliseconds: i64,
}
