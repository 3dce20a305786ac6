//! `networking.istio.io`: VirtualService, DestinationRule, Gateway, ServiceEntry, Sidecar.
//!
//! The Rust types are those of version `v1`; `v1beta1` and `v1alpha3` have the same shape and are read by the same types, and what we
//! write is always `v1`. Names, enums and units are verbatim; durations and numbers keep their spelling, so that an object is
//! written back as it was read. [`validate`] holds the rules that a schema cannot state; [`crds`] the definitions that a cluster needs.
//!
//! Limits: conditions in `status` are metav1 conditions (Istio's deprecated `lastProbeTime` is not kept).

mod common;
mod destination_rule;
mod gateway;
mod service_entry;
mod sidecar;
#[cfg(test)]
mod tests;
pub mod validate;
mod virtual_service;

pub use common::*;
pub use destination_rule::*;
pub use gateway::*;
pub use service_entry::*;
pub use sidecar::*;
pub use virtual_service::*;

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::CustomResourceExt;

/// The API group of all kinds here.
pub const GROUP: &str = "networking.istio.io";

/// The versions that are served; the first is the one that is stored.
pub const VERSIONS: [&str; 3] = ["v1", "v1beta1", "v1alpha3"];

/// The custom resource definitions of the kinds, each served in all of [`VERSIONS`].
pub fn crds() -> Vec<CustomResourceDefinition> {
    [
        VirtualService::crd(),
        DestinationRule::crd(),
        Gateway::crd(),
        ServiceEntry::crd(),
        Sidecar::crd(),
    ]
    .into_iter()
    .map(in_all_versions)
    .collect()
}

/// The derive macro writes one version; the others have the same schema and need no conversion.
fn in_all_versions(mut crd: CustomResourceDefinition) -> CustomResourceDefinition {
    crd.spec.names.list_kind = Some(format!("{}List", crd.spec.names.kind));
    if let Some(stored) = crd.spec.versions.first().cloned() {
        crd.spec.versions = VERSIONS
            .iter()
            .enumerate()
            .map(|(index, version)| {
                let mut served = stored.clone();
                (*version).clone_into(&mut served.name);
                served.storage = index == 0;
                served
            })
            .collect();
    }
    crd
}
