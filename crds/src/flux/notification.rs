//! `notification.toolkit.fluxcd.io`: events out (Provider, Alert: v1beta3) and webhooks in (Receiver: v1).

use crate::{Duration, LocalObjectReference, open_enum};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// A service that events are sent to.
///
/// Also the source of the `Provider` kind (derived).
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[kube(
    group = "notification.toolkit.fluxcd.io",
    version = "v1beta3",
    kind = "Provider",
    plural = "providers",
    namespaced,
    derive = "PartialEq",
    derive = "Default",
    category = "all",
    category = "fluxcd",
    category = "fluxcd-notifications",
    printcolumn = r#"{"name":"Age","type":"date","jsonPath":".metadata.creationTimestamp"}"#
)]
#[schemars(extend("x-kubernetes-validations" = [{"message": "spec.commitStatusExpr is only supported for the 'github', 'gitlab', 'gitea', 'bitbucketserver', 'bitbucket', 'azuredevops' provider types", "rule": "self.type == 'github' || self.type == 'gitlab' || self.type == 'gitea' || self.type == 'bitbucketserver' || self.type == 'bitbucket' || self.type == 'azuredevops' || !has(self.commitStatusExpr)"}]))]
pub struct ProviderSpec {
    /// The service.
    pub r#type: ProviderType,
    /// Deprecated, not used.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub interval: Option<Duration>,
    /// Address of the service; the Secret's `address` wins.
    #[schemars(length(max = 2048))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub address: Option<String>,
    /// Channel to post to.
    #[schemars(length(max = 2048))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub channel: Option<String>,
    /// Name to post as.
    #[schemars(length(max = 2048))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub username: Option<String>,
    /// Deadline of one delivery. Default 15 s.
    #[schemars(regex(pattern = r"^([0-9]+(\.[0-9]+)?(ms|s|m))+$"))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timeout: Option<Duration>,
    /// Deprecated: address of a proxy; `proxySecretRef` is its successor.
    #[schemars(length(max = 2048), regex(pattern = r"^(http|https)://.*$"))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub proxy: Option<String>,
    /// Secret with `address` and optionally `username`, `password` of a proxy.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub proxy_secret_ref: Option<LocalObjectReference>,
    /// Secret with the credentials (`token`, `address`, `headers`, ...).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub secret_ref: Option<LocalObjectReference>,
    /// Secret with `ca.crt`, `tls.crt`, `tls.key`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cert_secret_ref: Option<LocalObjectReference>,
    /// Service account for workload identity.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub service_account_name: Option<String>,
    /// CEL over `event`, `provider`, `alert` that gives the id of a commit status; git services only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub commit_status_expr: Option<String>,
    /// Sends nothing. Default false.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub suspend: Option<bool>,
}

open_enum! {
    /// Services that a Provider can deliver to.
    pub enum ProviderType {
        /// `generic`
        Generic = "generic",
        /// `generic-hmac`
        GenericHmac = "generic-hmac",
        /// `slack`
        Slack = "slack",
        /// `discord`
        Discord = "discord",
        /// `msteams`
        Msteams = "msteams",
        /// `rocket`
        Rocket = "rocket",
        /// `github`
        Github = "github",
        /// `gitlab`
        Gitlab = "gitlab",
        /// `gitea`
        Gitea = "gitea",
        /// `giteapullrequestcomment`
        Giteapullrequestcomment = "giteapullrequestcomment",
        /// `bitbucketserver`
        Bitbucketserver = "bitbucketserver",
        /// `bitbucket`
        Bitbucket = "bitbucket",
        /// `azuredevops`
        Azuredevops = "azuredevops",
        /// `googlechat`
        Googlechat = "googlechat",
        /// `googlepubsub`
        Googlepubsub = "googlepubsub",
        /// `webex`
        Webex = "webex",
        /// `sentry`
        Sentry = "sentry",
        /// `azureeventhub`
        Azureeventhub = "azureeventhub",
        /// `telegram`
        Telegram = "telegram",
        /// `lark`
        Lark = "lark",
        /// `matrix`
        Matrix = "matrix",
        /// `opsgenie`
        Opsgenie = "opsgenie",
        /// `alertmanager`
        Alertmanager = "alertmanager",
        /// `grafana`
        Grafana = "grafana",
        /// `githubdispatch`
        Githubdispatch = "githubdispatch",
        /// `githubpullrequestcomment`
        Githubpullrequestcomment = "githubpullrequestcomment",
        /// `gitlabmergerequestcomment`
        Gitlabmergerequestcomment = "gitlabmergerequestcomment",
        /// `pagerduty`
        Pagerduty = "pagerduty",
        /// `datadog`
        Datadog = "datadog",
        /// `nats`
        Nats = "nats",
        /// `zulip`
        Zulip = "zulip",
        /// `otel`
        Otel = "otel",
        /// `zoom`
        Zoom = "zoom",
        /// `incident.io`
        IncidentIo = "incident.io",
    }
}
open_enum! {
    /// Least severity that an Alert passes on.
    pub enum EventSeverity {
        /// `info`
        Info = "info",
        /// `error`
        Error = "error",
    }
}
open_enum! {
    /// Kinds that events come from and that webhooks reconcile.
    pub enum WatchedKind {
        /// `GitRepository`
        GitRepository = "GitRepository",
        /// `Bucket`
        Bucket = "Bucket",
        /// `Kustomization`
        Kustomization = "Kustomization",
        /// `HelmRelease`
        HelmRelease = "HelmRelease",
        /// `HelmChart`
        HelmChart = "HelmChart",
        /// `HelmRepository`
        HelmRepository = "HelmRepository",
        /// `ImageRepository`
        ImageRepository = "ImageRepository",
        /// `ImagePolicy`
        ImagePolicy = "ImagePolicy",
        /// `ImageUpdateAutomation`
        ImageUpdateAutomation = "ImageUpdateAutomation",
        /// `OCIRepository`
        OciRepository = "OCIRepository",
        /// `ArtifactGenerator`
        ArtifactGenerator = "ArtifactGenerator",
        /// `ExternalArtifact`
        ExternalArtifact = "ExternalArtifact",
    }
}
open_enum! {
    /// Who calls the webhook, and how the payload is authenticated.
    pub enum ReceiverType {
        /// `generic`
        Generic = "generic",
        /// `generic-hmac`
        GenericHmac = "generic-hmac",
        /// `generic-oidc`
        GenericOidc = "generic-oidc",
        /// `github`
        Github = "github",
        /// `gitlab`
        Gitlab = "gitlab",
        /// `bitbucket`
        Bitbucket = "bitbucket",
        /// `harbor`
        Harbor = "harbor",
        /// `dockerhub`
        Dockerhub = "dockerhub",
        /// `quay`
        Quay = "quay",
        /// `gcr`
        Gcr = "gcr",
        /// `nexus`
        Nexus = "nexus",
        /// `acr`
        Acr = "acr",
        /// `cdevents`
        Cdevents = "cdevents",
    }
}

/// Which events go to which Provider.
///
/// Also the source of the `Alert` kind (derived).
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[kube(
    group = "notification.toolkit.fluxcd.io",
    version = "v1beta3",
    kind = "Alert",
    plural = "alerts",
    namespaced,
    derive = "PartialEq",
    derive = "Default",
    category = "all",
    category = "fluxcd",
    category = "fluxcd-notifications",
    printcolumn = r#"{"name":"Age","type":"date","jsonPath":".metadata.creationTimestamp"}"#
)]
pub struct AlertSpec {
    /// The Provider, in the same namespace.
    pub provider_ref: LocalObjectReference,
    /// Objects whose events are passed on.
    pub event_sources: Vec<CrossNamespaceObjectReference>,
    /// Least severity. Default `info`.
    #[schemars(extend("default" = "info"))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub event_severity: Option<EventSeverity>,
    /// Regular expressions, one of which the message must match.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub inclusion_list: Vec<String>,
    /// Regular expressions, none of which the message may match.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub exclusion_list: Vec<String>,
    /// Metadata added to every event.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub event_metadata: BTreeMap<String, String>,
    /// Deprecated: text added to every event.
    #[schemars(length(max = 255))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub summary: Option<String>,
    /// Passes nothing on. Default false.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub suspend: Option<bool>,
}

/// Objects that events come from.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct CrossNamespaceObjectReference {
    /// API version.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub api_version: Option<String>,
    /// Kind.
    pub kind: WatchedKind,
    /// Name, or `*` for all.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,
    /// Namespace. Default: that of the referring object.
    #[schemars(length(min = 1, max = 253))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
    /// Labels that must all be there; only with name `*`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub match_labels: BTreeMap<String, String>,
}

/// A webhook that makes objects reconcile at once.
///
/// Also the source of the `Receiver` kind (derived).
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[kube(
    group = "notification.toolkit.fluxcd.io",
    version = "v1",
    kind = "Receiver",
    plural = "receivers",
    namespaced,
    status = "ReceiverStatus",
    derive = "PartialEq",
    derive = "Default",
    category = "all",
    category = "fluxcd",
    category = "fluxcd-notifications",
    printcolumn = r#"{"name":"Age","type":"date","jsonPath":".metadata.creationTimestamp"}"#,
    printcolumn = r#"{"name":"Ready","type":"string","jsonPath":".status.conditions[?(@.type==\"Ready\")].status"}"#,
    printcolumn = r#"{"name":"Status","type":"string","jsonPath":".status.conditions[?(@.type==\"Ready\")].message"}"#
)]
#[schemars(extend("x-kubernetes-validations" = [{"message": "generic-oidc receivers must define at least one oidcProvider", "rule": "self.type != 'generic-oidc' || (has(self.oidcProviders) && size(self.oidcProviders) > 0)"}, {"message": "oidcProviders can only be set when type is generic-oidc", "rule": "self.type == 'generic-oidc' || !has(self.oidcProviders) || size(self.oidcProviders) == 0"}, {"message": "secretRef cannot be set when type is generic-oidc", "rule": "self.type != 'generic-oidc' || !has(self.secretRef)"}, {"message": "secretRef is required when type is not generic-oidc", "rule": "self.type == 'generic-oidc' || has(self.secretRef)"}]))]
pub struct ReceiverSpec {
    /// Who calls.
    pub r#type: ReceiverType,
    /// What is reconciled by a call.
    pub resources: Vec<ReceiverResource>,
    /// Upper bound between two reconciliations of the Receiver itself. Default 10 m.
    #[schemars(extend("default" = "10m"))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub interval: Option<Duration>,
    /// Events that count, for callers that name them in a header. Empty: all.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub events: Vec<String>,
    /// CEL over `res`, `req` (and `claims`) that picks among `resources`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub resource_filter: Option<String>,
    /// Secret with `token`; it authenticates the caller and goes into the path. Required but for
    /// `generic-oidc`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub secret_ref: Option<LocalObjectReference>,
    /// Issuers whose tokens are accepted; only with `generic-oidc`.
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["issuerURL"]))]
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub oidc_providers: Vec<OidcProvider>,
    /// Answers nothing. Default false.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub suspend: Option<bool>,
}

/// Objects that a webhook reconciles.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ReceiverResource {
    /// API version.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub api_version: Option<String>,
    /// Kind.
    pub kind: WatchedKind,
    /// Name, or `*` for all.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,
    /// Namespace. Default: that of the Receiver.
    #[schemars(length(min = 1, max = 253))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
    /// Labels that must all be there; only with name `*`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub match_labels: BTreeMap<String, String>,
    /// CEL over `res`, `req` for this entry only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub filter: Option<String>,
}

/// An issuer of tokens.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct OidcProvider {
    /// Address of the issuer; its discovery document is fetched from there.
    #[schemars(regex(pattern = r"^https?://"))]
    #[serde(rename = "issuerURL")]
    pub issuer_url: String,
    /// Audience that a token must have. Default `notification-controller`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub audience: Option<String>,
    /// CEL values that `validations` may use.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub variables: Vec<OidcVariable>,
    /// CEL rules over the claims; all must hold.
    #[schemars(length(min = 1))]
    pub validations: Vec<OidcValidation>,
}

/// A named CEL value.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct OidcVariable {
    /// Its name.
    pub name: String,
    /// CEL expression.
    pub expression: String,
}

/// A CEL rule.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct OidcValidation {
    /// CEL expression that must be true.
    pub expression: String,
    /// Text of the refusal.
    pub message: String,
}

/// What is known of the Receiver.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("default" = {"observedGeneration": -1}))]
pub struct ReceiverStatus {
    /// Generation of the spec that `conditions` speak of.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Ready, Reconciling, Stalled.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<Condition>,
    /// Path of the webhook: `/hook/` and the SHA-256 of token, name and namespace.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub webhook_path: Option<String>,
    /// Value of the annotation `reconcile.fluxcd.io/requestedAt` that was handled last.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_handled_reconcile_at: Option<String>,
}
