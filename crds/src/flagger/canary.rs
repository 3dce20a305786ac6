//! The Canary: what is rolled out, how its traffic is shaped, how it is judged.

use super::{CanaryAnalysis, CanaryService, CanaryStatus};
use crate::open_enum;
use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// A workload whose new revisions get traffic step by step while they are measured.
///
/// Also the source of the `Canary` kind (derived).
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[kube(
    group = "flagger.app",
    version = "v1beta1",
    kind = "Canary",
    plural = "canaries",
    singular = "canary",
    namespaced,
    status = "CanaryStatus",
    derive = "PartialEq",
    derive = "Default",
    category = "all",
    printcolumn = r#"{"name":"Status","type":"string","jsonPath":".status.phase"}"#,
    printcolumn = r#"{"name":"Weight","type":"string","jsonPath":".status.canaryWeight"}"#,
    printcolumn = r#"{"name":"Suspended","type":"boolean","jsonPath":".spec.suspend","priority":1}"#,
    printcolumn = r#"{"name":"FailedChecks","type":"string","jsonPath":".status.failedChecks","priority":1}"#,
    printcolumn = r#"{"name":"Interval","type":"string","jsonPath":".spec.analysis.interval","priority":1}"#,
    printcolumn = r#"{"name":"Mirror","type":"boolean","jsonPath":".spec.analysis.mirror","priority":1}"#,
    printcolumn = r#"{"name":"StepWeight","type":"string","jsonPath":".spec.analysis.stepWeight","priority":1}"#,
    printcolumn = r#"{"name":"StepWeights","type":"string","jsonPath":".spec.analysis.stepWeights","priority":1}"#,
    printcolumn = r#"{"name":"MaxWeight","type":"string","jsonPath":".spec.analysis.maxWeight","priority":1}"#,
    printcolumn = r#"{"name":"LastTransitionTime","type":"string","jsonPath":".status.lastTransitionTime"}"#
)]
pub struct CanarySpec {
    /// Router or mesh that shifts the traffic. Default: the controller's (`istio`).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub provider: Option<Provider>,
    /// Prometheus that the built-in metrics are asked from. Default: the mesh's own counts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub metrics_server: Option<String>,
    /// Seconds that a workload which is not available is waited for. Default 600.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub progress_deadline_seconds: Option<i32>,
    /// The workload whose template changes are rolled out.
    pub target_ref: TargetRef,
    /// Its autoscaler, which is copied for the primary.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub autoscaler_ref: Option<AutoscalerRef>,
    /// Ingress to copy (providers nginx, skipper).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ingress_ref: Option<IngressRef>,
    /// ApisixRoute to copy (provider apisix).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub route_ref: Option<RouteRef>,
    /// Upstream whose settings are copied (provider gloo).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub upstream_ref: Option<UpstreamRef>,
    /// Services and routes to generate. Without it there is no port to serve.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub service: Option<CanaryService>,
    /// Steps, bounds and hooks.
    pub analysis: CanaryAnalysis,
    /// Promotes without judging. Default false.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub skip_analysis: Option<bool>,
    /// Gives the objects back as they were when the Canary is deleted (finalizer `finalizer.flagger.app`).
    /// Default false.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub revert_on_deletion: Option<bool>,
    /// Stops everything where it is; weights stay. Default false.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub suspend: Option<bool>,
}

open_enum! {
    /// Routers and meshes.
    pub enum Provider {
        /// `istio`
        Istio = "istio",
        /// `apisix`
        Apisix = "apisix",
        /// `appmesh`
        Appmesh = "appmesh",
        /// `appmesh:v1beta2`
        AppmeshV1beta2 = "appmesh:v1beta2",
        /// `contour`
        Contour = "contour",
        /// `gatewayapi:v1`
        GatewayapiV1 = "gatewayapi:v1",
        /// `gatewayapi:v1beta1`
        GatewayapiV1beta1 = "gatewayapi:v1beta1",
        /// `gloo`
        Gloo = "gloo",
        /// `knative`
        Knative = "knative",
        /// `kubernetes`
        Kubernetes = "kubernetes",
        /// `kuma`
        Kuma = "kuma",
        /// `linkerd`
        Linkerd = "linkerd",
        /// `nginx`
        Nginx = "nginx",
        /// `osm`
        Osm = "osm",
        /// `skipper`
        Skipper = "skipper",
        /// `smi:v1alpha1`
        SmiV1alpha1 = "smi:v1alpha1",
        /// `smi:v1alpha2`
        SmiV1alpha2 = "smi:v1alpha2",
        /// `smi:v1alpha3`
        SmiV1alpha3 = "smi:v1alpha3",
        /// `traefik`
        Traefik = "traefik",
    }
}
open_enum! {
    /// Kinds that a Canary can roll out.
    pub enum TargetKind {
        /// `Deployment`
        Deployment = "Deployment",
        /// `DaemonSet`
        DaemonSet = "DaemonSet",
        /// `Service`
        Service = "Service",
    }
}
open_enum! {
    /// Kinds of autoscaler.
    pub enum AutoscalerKind {
        /// `HorizontalPodAutoscaler`
        HorizontalPodAutoscaler = "HorizontalPodAutoscaler",
        /// `ScaledObject`
        ScaledObject = "ScaledObject",
    }
}

/// The workload, in the Canary's namespace.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct TargetRef {
    /// API version, for example `apps/v1`.
    pub api_version: String,
    /// Kind.
    pub kind: TargetKind,
    /// Name.
    pub name: String,
}

/// The autoscaler of the target.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AutoscalerRef {
    /// API version, for example `autoscaling/v2`.
    pub api_version: String,
    /// Kind.
    pub kind: AutoscalerKind,
    /// Name.
    pub name: String,
    /// KEDA: query of the primary's copy, by trigger name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub primary_scaler_queries: BTreeMap<String, String>,
    /// Bounds of the primary's copy. Default: those of the original.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub primary_scaler_replicas: Option<ScalerReplicas>,
}

/// Bounds of a scaler.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ScalerReplicas {
    /// Fewest replicas.
    #[schemars(range(min = 1))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_replicas: Option<i32>,
    /// Most replicas.
    #[schemars(range(min = 1))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_replicas: Option<i32>,
}

/// An Ingress.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct IngressRef {
    /// API version, for example `networking.k8s.io/v1`.
    pub api_version: String,
    /// `Ingress`.
    #[schemars(extend("enum" = ["Ingress"]))]
    pub kind: String,
    /// Name.
    pub name: String,
}

/// An ApisixRoute.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RouteRef {
    /// API version.
    pub api_version: String,
    /// `ApisixRoute`.
    #[schemars(extend("enum" = ["ApisixRoute"]))]
    pub kind: String,
    /// Name.
    pub name: String,
}

/// A Gloo Upstream.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct UpstreamRef {
    /// API version.
    pub api_version: String,
    /// `Upstream`.
    #[schemars(extend("enum" = ["Upstream"]))]
    pub kind: String,
    /// Name.
    pub name: String,
    /// Namespace. Default: the Canary's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
}
