//! Checks before an object is stored, with the wording of Kubernetes' validation.

mod events;
mod metadata;
mod pods;
mod services;
pub(crate) mod warnings;
mod workloads;

use serde_json::Value;

use crate::crd;
use crate::error::FieldError;
use crate::kinds::{Kind, Version};

/// Everything wrong with `object`, in the order in which Kubernetes reports it.
pub(crate) fn object(
    kind: &Kind,
    version: &Version,
    object: &Value,
    live: Option<&Value>,
    subresource: &str,
) -> Vec<FieldError> {
    let mut errors = metadata::check(kind, object, live);
    if kind.is_custom() {
        errors.extend(crd::validate::validate(&version.schema, object, live));
        return errors;
    }
    if subresource == "status" {
        return errors;
    }
    match kind.row().map(|r| (r.group, r.plural)) {
        Some(("", "pods")) => pods::check(object, live, &mut errors),
        Some(("", "services")) => services::check(object, live, &mut errors),
        Some(("", "configmaps" | "secrets")) => workloads::data(object, live, &mut errors),
        Some(("events.k8s.io", "events")) if live.is_none() => events::check(object, &mut errors),
        Some(("apps", _)) => workloads::check(kind, object, live, &mut errors),
        Some(("batch", _)) => workloads::check(kind, object, live, &mut errors),
        Some(("apiextensions.k8s.io", _)) => errors.extend(crd::definition::validate(object, live)),
        _ => {}
    }
    errors
}
