//! MetricTemplate and AlertProvider.

use super::CanaryCondition;
use crate::{LocalObjectReference, open_enum};
use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// A query against a metric provider.
///
/// Also the source of the `MetricTemplate` kind (derived).
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[kube(
    group = "flagger.app",
    version = "v1beta1",
    kind = "MetricTemplate",
    plural = "metrictemplates",
    namespaced,
    status = "MetricTemplateStatus",
    derive = "PartialEq",
    derive = "Default",
    category = "all",
    printcolumn = r#"{"name":"Provider","type":"string","jsonPath":".spec.provider.type"}"#
)]
pub struct MetricTemplateSpec {
    /// Who is asked.
    pub provider: MetricTemplateProvider,
    /// Go template of the query; knows `name`, `namespace`, `target`, `service`, `ingress`, `route`,
    /// `interval`, `variables`.
    pub query: String,
    /// Ours: how the values are judged besides the range that the Canary gives. Default: by the range alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub comparison: Option<TemplateComparison>,
}

/// Ours: how the values of a MetricTemplate are judged. The Canary's `thresholdRange` holds besides; with `Range` it is what
/// the hysteresis is about.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct TemplateComparison {
    /// The rule. Default `Range`. The others ask the same query for the primary too, with `target` being the primary's
    /// name, so the query must contain `{{ target }}`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub judge: Option<TemplateJudge>,
    /// `Range`: values in a row outside the range that fail the metric. Default 1.
    #[schemars(range(min = 1, max = 1000))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub failures: Option<i32>,
    /// `Range`: values in a row inside the range, by the margin, that heal it. Default 1.
    #[schemars(range(min = 1, max = 1000))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub recoveries: Option<i32>,
    /// `Range`: how far inside the range a value must be to heal, in the metric's unit. Default 0.
    #[schemars(range(min = 0.0))]
    #[serde(
        default,
        skip_serializing_if = "Option::is_none",
        serialize_with = "crate::number::optional"
    )]
    pub margin: Option<f64>,
    /// Which deviations from the primary are worse. Default `Increase`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub direction: Option<Deviation>,
    /// `MannWhitney`: how a deviation is measured. Default `MeanRatio`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub effect_size: Option<TemplateEffectSize>,
    /// `MannWhitney`: an increase counts from this effect size on. Default: no effect (1 for `MeanRatio`, 0.5 for `Cles`).
    #[serde(
        default,
        skip_serializing_if = "Option::is_none",
        serialize_with = "crate::number::optional"
    )]
    pub allowed_increase: Option<f64>,
    /// `MannWhitney`: a decrease counts up to this effect size. Default: no effect.
    #[serde(
        default,
        skip_serializing_if = "Option::is_none",
        serialize_with = "crate::number::optional"
    )]
    pub allowed_decrease: Option<f64>,
    /// `GroupSequential`: highest probability with which a metric that is not worse ever fails. Default 0.01.
    #[schemars(range(min = 0.000001, max = 0.5))]
    #[serde(
        default,
        skip_serializing_if = "Option::is_none",
        serialize_with = "crate::number::optional"
    )]
    pub alpha: Option<f64>,
    /// `GroupSequential`: number of checks in the whole run. Default 20.
    #[schemars(range(min = 1, max = 100))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub looks: Option<i32>,
    /// `GroupSequential`: how alpha is spent over the looks. Default `ObrienFleming`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub spending: Option<TemplateSpending>,
}

open_enum! {
    /// Rules for values.
    pub enum TemplateJudge {
        /// They must stay in the range, with hysteresis.
        Range = "Range",
        /// They must not deviate from the primary's by the Mann-Whitney test, as Kayenta judges. No bound over several
        /// checks.
        MannWhitney = "MannWhitney",
        /// They must not be worse than the primary's on average, with a bound over a known number of checks.
        GroupSequential = "GroupSequential",
    }
}
open_enum! {
    /// Deviations from the primary.
    pub enum Deviation {
        /// Higher is worse.
        Increase = "Increase",
        /// Lower is worse.
        Decrease = "Decrease",
        /// Both are (not with `GroupSequential`).
        Either = "Either",
    }
}
open_enum! {
    /// Effect sizes.
    pub enum TemplateEffectSize {
        /// Mean of the canary's values over that of the primary's.
        MeanRatio = "MeanRatio",
        /// Share of pairs in which the canary's value is higher.
        Cles = "Cles",
    }
}
open_enum! {
    /// Spending functions.
    pub enum TemplateSpending {
        /// Little at first, most at the end.
        ObrienFleming = "ObrienFleming",
        /// About the same at every look.
        Pocock = "Pocock",
    }
}

/// Who is asked.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct MetricTemplateProvider {
    /// Kind of provider.
    pub r#type: MetricProviderType,
    /// Its address.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub address: Option<String>,
    /// Headers sent along, each with its values.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub headers: BTreeMap<String, Vec<String>>,
    /// Secret with credentials; keys depend on the type.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub secret_ref: Option<LocalObjectReference>,
    /// Region (cloudwatch).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub region: Option<String>,
    /// Does not verify the certificate. Default false.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub insecure_skip_verify: Option<bool>,
}

open_enum! {
    /// Metric providers.
    pub enum MetricProviderType {
        /// `prometheus`
        Prometheus = "prometheus",
        /// `influxdb`
        Influxdb = "influxdb",
        /// `datadog`
        Datadog = "datadog",
        /// `externalmetrics`
        Externalmetrics = "externalmetrics",
        /// `stackdriver`
        Stackdriver = "stackdriver",
        /// `cloudwatch`
        Cloudwatch = "cloudwatch",
        /// `newrelic`
        Newrelic = "newrelic",
        /// `graphite`
        Graphite = "graphite",
        /// `dynatrace`
        Dynatrace = "dynatrace",
        /// `keptn`
        Keptn = "keptn",
        /// `splunk`
        Splunk = "splunk",
        /// Ours: `web`, any service that answers with JSON; the query is a JSONPath.
        Web = "web",
        /// Ours: `job`, a Kubernetes Job; the query is its manifest.
        Job = "job",
    }
}
open_enum! {
    /// Chats.
    pub enum AlertProviderType {
        /// `slack`
        Slack = "slack",
        /// `msteams`
        Msteams = "msteams",
        /// `discord`
        Discord = "discord",
        /// `rocket`
        Rocket = "rocket",
        /// `gchat`
        Gchat = "gchat",
    }
}

/// Status of a MetricTemplate.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct MetricTemplateStatus {
    /// Conditions.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<CanaryCondition>,
}

/// A chat that alerts are sent to.
///
/// Also the source of the `AlertProvider` kind (derived).
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[kube(
    group = "flagger.app",
    version = "v1beta1",
    kind = "AlertProvider",
    plural = "alertproviders",
    namespaced,
    status = "AlertProviderStatus",
    derive = "PartialEq",
    derive = "Default",
    category = "all",
    printcolumn = r#"{"name":"Type","type":"string","jsonPath":".spec.type"}"#
)]
#[schemars(extend("oneOf" = [{"required": ["type", "address"]}, {"required": ["type", "secretRef"]}]))]
pub struct AlertProviderSpec {
    /// The chat.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub r#type: Option<AlertProviderType>,
    /// Channel. Default `general`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub channel: Option<String>,
    /// Name to post as. Default `flagger`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub username: Option<String>,
    /// Webhook address.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub address: Option<String>,
    /// Address of a proxy.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub proxy: Option<String>,
    /// Secret with `address`, and for Slack optionally `token`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub secret_ref: Option<LocalObjectReference>,
}

/// Status of an AlertProvider.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AlertProviderStatus {
    /// Conditions.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<CanaryCondition>,
}
