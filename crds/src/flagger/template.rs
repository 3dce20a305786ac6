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
