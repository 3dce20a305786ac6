//! `spec.analysis`: steps, bounds, hooks.

use super::StringMatch;
use crate::open_enum;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// How a new revision gets traffic and how it is judged.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("oneOf" = [{"required": ["interval", "threshold", "iterations"]}, {"required": ["interval", "threshold", "stepWeight"]}, {"required": ["interval", "threshold", "stepWeights"]}]))]
pub struct CanaryAnalysis {
    /// Length of one step's measurement window, for example `30s`. Default 60 s. Windows below 10 s are
    /// honoured (Flagger raises them to 10 s).
    #[schemars(regex(pattern = r"^[0-9]+(m|s)"))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub interval: Option<String>,
    /// Number of checks of a blue/green or A/B rollout. 0: a weighted rollout.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub iterations: Option<i32>,
    /// Failed checks of one run after which it is rolled back. Default 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub threshold: Option<i32>,
    /// Highest share of the canary, in percent; then it is promoted. Default 100; not looked at with
    /// `stepWeights`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_weight: Option<i32>,
    /// Growth of the share per step, in percent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub step_weight: Option<i32>,
    /// Shares, in percent, in order; the last is the highest.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub step_weights: Vec<i32>,
    /// Growth of the primary's share per step after promotion, in percent. 0: all at once.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub step_weight_promotion: Option<i32>,
    /// Copies requests to the canary before the first step. Default false.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mirror: Option<bool>,
    /// Share of the requests that is copied, in percent. Default: all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mirror_weight: Option<i32>,
    /// Percent of the primary's pods that must be available. Default 100.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub primary_ready_threshold: Option<i32>,
    /// Percent of the canary's pods that must be available. Default 100.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub canary_ready_threshold: Option<i32>,
    /// A/B: requests that go to the canary.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub r#match: Vec<AnalysisMatchRequest>,
    /// What is measured, in order; the first failure ends a check.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub metrics: Vec<CanaryMetric>,
    /// Who is told.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub alerts: Vec<CanaryAlert>,
    /// Hooks and gates.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub webhooks: Vec<CanaryWebhook>,
    /// Keeps a client at the revision it met.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub session_affinity: Option<SessionAffinity>,
    /// Ours: the sequential comparison of canary against primary, which stops a bad release within seconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub comparison: Option<Comparison>,
}

/// Ours: options of the sequential comparison of canary against primary.
///
/// Without any of them errors, the p99 latency and the whole distribution of latencies are compared, with an overall alpha of 1 % and a tolerance of 1.5.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Comparison {
    /// Whether a statistical verdict may stop the rollout. Default true.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub enabled: Option<bool>,
    /// Highest probability with which a release within the tolerance is ever stopped, over the whole run and all metrics
    /// together. Default 0.01.
    #[schemars(range(min = 0.000001, max = 0.5))]
    #[serde(
        default,
        skip_serializing_if = "Option::is_none",
        serialize_with = "crate::number::optional"
    )]
    pub alpha: Option<f64>,
    /// Ratio of the canary's error rate (and of its odds of being slow) to the primary's that is still tolerated, at
    /// least 1. Default 1.5.
    #[schemars(range(min = 1.0))]
    #[serde(
        default,
        skip_serializing_if = "Option::is_none",
        serialize_with = "crate::number::optional"
    )]
    pub tolerance: Option<f64>,
    /// What is compared. Default: `errors` with weight 3 and `latency-p99` with weight 1.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub metrics: Vec<ComparisonMetric>,
    /// Highest acceptable error rate of the canary, in percent, whatever the primary's is: for when both are bad. Default:
    /// no such guard.
    #[schemars(range(min = 0.000001, max = 90.0))]
    #[serde(
        default,
        skip_serializing_if = "Option::is_none",
        serialize_with = "crate::number::optional"
    )]
    pub max_error_rate: Option<f64>,
    /// Highest acceptable latencies of the canary, whatever the primary's are.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub max_latency: Vec<LatencyBound>,
    /// How long the durations of a canary that has just started may be left out, for example `2m`; it ends as soon as the
    /// canary has stopped getting faster. Errors count from the beginning, see `warmUpErrors`. Default: not at all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub warm_up: Option<String>,
    /// Whether the comparison leaves out errors as well during `warmUp`: for canaries whose cold caches make requests fail.
    /// `maxErrorRate` and Flagger's metrics count them all the same. Default `false`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub warm_up_errors: Option<bool>,
    /// When a step that nothing speaks against may go on. Default `AtInterval`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub advance: Option<AdvancePolicy>,
    /// What happens where there is nothing to measure. Default `Hold`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub on_no_data: Option<MissingPolicy>,
    /// What happens where the metric source fails. Default `Hold`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub on_provider_error: Option<MissingPolicy>,
    /// Intervals by which a step is prolonged at most: by the policy `Extend`, and by `advance: WhenGood` before time is
    /// up. Default 3.
    #[schemars(range(min = 1, max = 1000))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub extend_limit: Option<i32>,
    /// Ratio of errors, canary to primary, that the steps should be long enough to find, or an error rate of 1 % if that is
    /// more; where they are not, the condition `StepsLongEnough` and an event say so. Default 4.
    #[schemars(range(min = 1.1))]
    #[serde(
        default,
        skip_serializing_if = "Option::is_none",
        serialize_with = "crate::number::optional"
    )]
    pub expected_ratio: Option<f64>,
    /// Watches what the promoted primary serves, and takes the promotion back when it fails more than the former one did.
    /// Default: no watch.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub watch: Option<PromotionWatch>,
}

/// Ours: the watch after a promotion.
///
/// What is normal is what the run has shown of the primary, times the tolerance. An alarm sets the primary back to the
/// revision before; the Canary is `Failed` until the next revision.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PromotionWatch {
    /// How long after the promotion an alarm takes it back, for example `30m`. Default `1h`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub duration: Option<String>,
    /// False alarms per day on average, at most, while nothing is worse than normal. Default 0.1.
    #[schemars(range(min = 0.0001, max = 100.0))]
    #[serde(
        default,
        skip_serializing_if = "Option::is_none",
        serialize_with = "crate::number::optional"
    )]
    pub false_alarms_per_day: Option<f64>,
    /// Whether an alarm takes the promotion back; otherwise it is only told. Default true.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rollback: Option<bool>,
}

/// One compared quantity.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ComparisonMetric {
    /// `errors` (all), `errors-5xx`, `errors-grpc`, `errors-connection`; `latency-p99` (or any other percentile);
    /// `latency` (the whole distribution).
    pub name: String,
    /// Its part of alpha, in relation to the other weights, above 0. Default 1.
    #[serde(
        default,
        skip_serializing_if = "Option::is_none",
        serialize_with = "crate::number::optional"
    )]
    pub weight: Option<f64>,
    /// Its own tolerance. Default: that of the comparison.
    #[schemars(range(min = 1.0))]
    #[serde(
        default,
        skip_serializing_if = "Option::is_none",
        serialize_with = "crate::number::optional"
    )]
    pub tolerance: Option<f64>,
}

/// A bound on a percentile of the latency.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct LatencyBound {
    /// Which percentile, above 0 and below 100, for example 99.
    #[schemars(range(min = 0.1, max = 99.999))]
    #[serde(serialize_with = "crate::number::plain")]
    pub percentile: f64,
    /// What it may be at most, in milliseconds.
    #[schemars(range(min = 0.001))]
    #[serde(serialize_with = "crate::number::plain")]
    pub milliseconds: f64,
}

open_enum! {
    /// When a step that nothing speaks against may go on.
    pub enum AdvancePolicy {
        /// When its interval is over.
        AtInterval = "AtInterval",
        /// When its interval is over and the canary was shown to be within the tolerance; after `extendLimit` more
        /// intervals also without.
        WhenGood = "WhenGood",
        /// As soon as the canary was shown to be within the tolerance, at the latest when its interval is over.
        Early = "Early",
    }
}
open_enum! {
    /// What happens where data is missing.
    pub enum MissingPolicy {
        /// The step waits.
        Hold = "Hold",
        /// The step waits for `extendLimit` intervals; then each interval counts as a failed check.
        Extend = "Extend",
        /// It counts as a failed check, as with Flagger.
        Fail = "Fail",
        /// The metric is left out.
        Pass = "Pass",
    }
}

/// One measured quantity and its bounds.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct CanaryMetric {
    /// `request-success-rate` (percent), `request-duration` (p99 in milliseconds), or a name of one's own
    /// together with `templateRef`.
    pub name: String,
    /// Window that the value is computed over. Default `1m`.
    #[schemars(regex(pattern = r"^[0-9]+(m|s)"))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub interval: Option<String>,
    /// Bounds, both inclusive.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub threshold_range: Option<ThresholdRange>,
    /// Deprecated: the lower bound of a success rate, the upper bound of anything else.
    #[serde(
        default,
        skip_serializing_if = "Option::is_none",
        serialize_with = "crate::number::optional"
    )]
    pub threshold: Option<f64>,
    /// Deprecated: a PromQL query.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub query: Option<String>,
    /// The MetricTemplate to ask.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub template_ref: Option<CrossNamespaceObjectReference>,
    /// Values for `{{ variables.x }}` of the template.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub template_variables: BTreeMap<String, String>,
}

/// Bounds, both inclusive.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ThresholdRange {
    /// Least accepted value.
    #[serde(
        default,
        skip_serializing_if = "Option::is_none",
        serialize_with = "crate::number::optional"
    )]
    pub min: Option<f64>,
    /// Highest accepted value.
    #[serde(
        default,
        skip_serializing_if = "Option::is_none",
        serialize_with = "crate::number::optional"
    )]
    pub max: Option<f64>,
}

/// An object by name, possibly in another namespace.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct CrossNamespaceObjectReference {
    /// Name.
    pub name: String,
    /// Namespace. Default: the Canary's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
}

open_enum! {
    /// Least severity that an alert passes on.
    pub enum AlertSeverity {
        /// ``
        Unset = "",
        /// `info`
        Info = "info",
        /// `warn`
        Warn = "warn",
        /// `error`
        Error = "error",
    }
}
open_enum! {
    /// When a webhook is called.
    pub enum HookType {
        /// ``
        Unset = "",
        /// `confirm-rollout`
        ConfirmRollout = "confirm-rollout",
        /// `pre-rollout`
        PreRollout = "pre-rollout",
        /// `rollout`
        Rollout = "rollout",
        /// `confirm-promotion`
        ConfirmPromotion = "confirm-promotion",
        /// `post-rollout`
        PostRollout = "post-rollout",
        /// `event`
        Event = "event",
        /// `rollback`
        Rollback = "rollback",
        /// `confirm-traffic-increase`
        ConfirmTrafficIncrease = "confirm-traffic-increase",
    }
}
open_enum! {
    /// The cookie attribute `SameSite`.
    pub enum SameSite {
        /// `Strict`
        Strict = "Strict",
        /// `Lax`
        Lax = "Lax",
        /// `None`
        None = "None",
    }
}

/// Somebody to tell.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct CanaryAlert {
    /// Name, for people.
    pub name: String,
    /// Least severity. Default `info`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub severity: Option<AlertSeverity>,
    /// The AlertProvider.
    pub provider_ref: CrossNamespaceObjectReference,
}

/// A hook or gate.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct CanaryWebhook {
    /// Name, for people.
    pub name: String,
    /// When it is called. Default `rollout`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub r#type: Option<HookType>,
    /// Address that is posted to.
    pub url: String,
    /// Tells nobody about this hook. Default false.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mute_alert: Option<bool>,
    /// Deadline of one attempt. Default `10s`.
    #[schemars(regex(pattern = r"^[0-9]+(m|s)"))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timeout: Option<String>,
    /// Attempts after the first. Default 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub retries: Option<i32>,
    /// Does not verify the certificate. Default false.
    #[serde(rename = "disableTLS", skip_serializing_if = "Option::is_none")]
    pub disable_tls: Option<bool>,
    /// Sent along.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub metadata: BTreeMap<String, String>,
}

/// Cookies that keep a client at the revision it met.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct SessionAffinity {
    /// Cookie of the canary.
    pub cookie_name: String,
    /// Cookie of the primary. Default: none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub primary_cookie_name: Option<String>,
    /// Cookie attribute `Domain`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub domain: Option<String>,
    /// Cookie attribute `HttpOnly`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub http_only: Option<bool>,
    /// Lifetime of the canary's cookie in seconds. Default 86400.
    #[schemars(extend("default" = 86400))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_age: Option<i32>,
    /// Cookie attribute `Partitioned`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub partitioned: Option<bool>,
    /// Cookie attribute `Path`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    /// Cookie attribute `SameSite`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub same_site: Option<SameSite>,
    /// Cookie attribute `Secure`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub secure: Option<bool>,
}

/// Requests of an A/B rollout that go to the canary; all given fields must match.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AnalysisMatchRequest {
    /// Headers, by lower-case name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub headers: BTreeMap<String, AnalysisStringMatch>,
    /// Query parameters, by name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub query_params: BTreeMap<String, StringMatch>,
    /// Labels of the caller.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub source_labels: BTreeMap<String, String>,
}

/// A match on text; exactly one field is set.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AnalysisStringMatch {
    /// Equal to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exact: Option<String>,
    /// Starts with.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prefix: Option<String>,
    /// Ends with.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub suffix: Option<String>,
    /// RE2 expression that matches the whole text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub regex: Option<String>,
}
