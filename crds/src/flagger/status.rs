//! `status` of a Canary: Flagger's fields, and ours, which tell what was measured and when.

use crate::open_enum;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, Time};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

open_enum! {
    /// Where a rollout stands.
    pub enum CanaryPhase {
        /// ``
        Unset = "",
        /// `Initializing`
        Initializing = "Initializing",
        /// `Initialized`
        Initialized = "Initialized",
        /// `Waiting`
        Waiting = "Waiting",
        /// `Progressing`
        Progressing = "Progressing",
        /// `WaitingPromotion`
        WaitingPromotion = "WaitingPromotion",
        /// `Promoting`
        Promoting = "Promoting",
        /// `Finalising`
        Finalising = "Finalising",
        /// `Succeeded`
        Succeeded = "Succeeded",
        /// `Failed`
        Failed = "Failed",
        /// `Terminating`
        Terminating = "Terminating",
        /// `Terminated`
        Terminated = "Terminated",
    }
}

/// Where the rollout stands.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct CanaryStatus {
    /// The phase.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub phase: Option<CanaryPhase>,
    /// Failed checks of this run.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub failed_checks: Option<i32>,
    /// Share of the canary that is wanted now, in percent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub canary_weight: Option<i32>,
    /// Checks done of a blue/green or A/B rollout.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub iterations: Option<i32>,
    /// Hash of every tracked ConfigMap and Secret, by `configmap/<name>` or `secret/<name>`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tracked_configs: Option<BTreeMap<String, String>>,
    /// Hash of the target's template that was seen last.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_applied_spec: Option<String>,
    /// Hash of the target's template that was promoted last.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_promoted_spec: Option<String>,
    /// When the status last changed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_transition_time: Option<Time>,
    /// Value of the canary's cookie.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub session_affinity_cookie: Option<String>,
    /// Value of the primary's cookie.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub primary_session_affinity_cookie: Option<String>,
    /// Value of the canary's cookie in the run before.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub previous_session_affinity_cookie: Option<String>,
    /// `Promoted`, and ours (`FullyHonoured`).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<CanaryCondition>,
    /// Ours: generation of the spec that this status speaks of.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Ours: the last judgement of each metric, in the order of the spec.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub metrics: Vec<MetricStatus>,
    /// Ours: the steps of this run (or the last one), oldest first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub history: Vec<StepStatus>,
    /// Ours: how far the wanted weight is live in the proxies.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub weight_live: Option<WeightLive>,
    /// Ours: what a controller needs to continue this run after a restart.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub run: Option<RunStatus>,
    /// Ours: the watch after the last promotion.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub watch: Option<WatchStatus>,
    /// Ours: one sentence on what is being waited for, or why the last run ended.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
}

/// A condition in Flagger's form.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct CanaryCondition {
    /// `Promoted`.
    pub r#type: String,
    /// `True`, `False` or `Unknown`.
    pub status: String,
    /// The phase.
    pub reason: String,
    /// One sentence.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// When it was written last.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_update_time: Option<Time>,
    /// When `status` changed last.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_transition_time: Option<Time>,
    /// Ours: generation of the spec that it speaks of.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
}

/// The last judgement of one metric.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct MetricStatus {
    /// Name of the metric; `comparison` is what all compared metrics together say.
    pub name: String,
    /// Measured value, in the metric's unit.
    #[serde(
        default,
        skip_serializing_if = "Option::is_none",
        serialize_with = "crate::number::optional"
    )]
    pub value: Option<f64>,
    /// Bound that it was held against.
    #[serde(
        default,
        skip_serializing_if = "Option::is_none",
        serialize_with = "crate::number::optional"
    )]
    pub bound: Option<f64>,
    /// Canary requests that the value rests on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub samples: Option<i64>,
    /// `good`, `bad`, `undecided`, `no data` or `provider error`.
    pub verdict: String,
    /// Highest probability with which this metric ever stops a release that is within the tolerance; absent for a fixed
    /// threshold, which promises nothing.
    #[serde(
        default,
        skip_serializing_if = "Option::is_none",
        serialize_with = "crate::number::optional"
    )]
    pub alpha: Option<f64>,
    /// How much longer an undecided metric needs at the current traffic, in seconds, if that can be told.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub remaining_seconds: Option<i64>,
    /// One sentence that explains the verdict.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
}

/// One step of a run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct StepStatus {
    /// Share of the canary, in percent.
    pub weight: i32,
    /// When the weight was wanted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub started_at: Option<MicroTime>,
    /// When every proxy that needs it had it; the measurement starts here.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub live_at: Option<MicroTime>,
    /// When the step was over.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ended_at: Option<MicroTime>,
    /// How it ended.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub outcome: Option<StepOutcome>,
    /// Failed checks during this step.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub failed_checks: Option<i32>,
}

open_enum! {
    /// How a step ended.
    pub enum StepOutcome {
        /// `Running`
        Running = "Running",
        /// `Passed`
        Passed = "Passed",
        /// `Failed`
        Failed = "Failed",
        /// `Restarted`
        Restarted = "Restarted",
        /// `Promoted`
        Promoted = "Promoted",
        /// `Superseded`
        Superseded = "Superseded",
    }
}

/// How far a weight is live in the proxies.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct WeightLive {
    /// Share of the canary, in percent.
    pub weight: i32,
    /// Generation of the route object that carries it.
    pub generation: i64,
    /// Proxies that need it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub needed: Option<i32>,
    /// Proxies that it was sent to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sent: Option<i32>,
    /// Proxies that have it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub acked: Option<i32>,
    /// Proxies that refused it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub refused: Option<i32>,
    /// The first refusal, in the proxy's words.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Whether every proxy that needs it has it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub live: Option<bool>,
}

/// What a controller needs to continue a run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RunStatus {
    /// When the run started.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub started_at: Option<MicroTime>,
    /// Since when a workload that is not available is being waited for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub waiting_since: Option<MicroTime>,
    /// When the current weight was wanted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub step_started_at: Option<MicroTime>,
    /// Since when the current weight is live and measured.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub window_started_at: Option<MicroTime>,
    /// When the current step was last checked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub checked_at: Option<MicroTime>,
    /// Until when a former revision's canary may have had traffic: what is measured until shortly after that is not this
    /// run's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub former_traffic_until: Option<MicroTime>,
    /// When it was last planned how long the steps must be.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub planned_at: Option<MicroTime>,
    /// Intervals by which the current step was prolonged.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub extended: Option<i32>,
    /// The primary that the run replaces.
    #[serde(flatten)]
    pub former: Former,
    /// State of the judges.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub evidence: Option<Evidence>,
}

/// A primary that a promotion replaces, as far as the watch after it needs to know.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Former {
    /// Its error rate, which counts as normal after the promotion, in percent.
    #[serde(
        default,
        skip_serializing_if = "Option::is_none",
        serialize_with = "crate::number::optional"
    )]
    pub normal_error_rate: Option<f64>,
    /// Its `flagger-id`; an alarm brings that one back.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub former_id: Option<String>,
}

/// The watch after a promotion.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct WatchStatus {
    /// When the promotion was complete.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub started_at: Option<MicroTime>,
    /// Until when an alarm takes the promotion back.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub until: Option<MicroTime>,
    /// When the alarm went off.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub alarmed_at: Option<MicroTime>,
    /// The primary that the promotion replaced.
    #[serde(flatten)]
    pub former: Former,
    /// Hash of the target's template that was promoted before.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub former_spec: Option<String>,
    /// One sentence on what was seen.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// State of the detector, while it watches.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub evidence: Option<Evidence>,
}

/// State of the judges: a few numbers per metric, valid at any time.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-preserve-unknown-fields" = true))]
pub struct Evidence {
    /// By judge.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty", flatten)]
    pub judges: BTreeMap<String, serde_json::Value>,
}
