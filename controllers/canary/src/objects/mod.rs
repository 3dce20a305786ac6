//! The objects that a Canary generates, as Flagger writes them. Pure: objects in, objects out.
//!
//! Everything is built as JSON for server-side apply. [`covers`] tells whether a live object already has all that is
//! wanted, so that nothing is written that is there.

pub mod configs;
pub mod former;
#[cfg(test)]
mod golden;
mod primary;
mod route;
mod services;

use std::collections::BTreeMap;

use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::ResourceExt;
use serde_json::{Map, Value, json};
use serin_crds::flagger::{Canary, CanaryService};

pub use route::split_of;
pub use services::without_takeover;

/// Label keys that can tell a Deployment's pods apart, in order of preference (Flagger's `-selector-labels`).
pub const SELECTOR_LABELS: [&str; 3] = ["app", "name", "app.kubernetes.io/name"];
/// Where a taken-over object keeps what it was (Flagger's annotation).
pub const ORIGINAL: &str = "flagger.kubernetes.io/original-configuration";
/// Tells GitOps tools to leave an object alone: they would fight over it.
const OPT_OUT: [(&str, &str); 2] = [
    ("helm.toolkit.fluxcd.io/driftDetection", "disabled"),
    ("kustomize.toolkit.fluxcd.io/reconcile", "disabled"),
];

/// Options that are the same for all Canaries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// Label keys to look for in a target's selector, in order.
    pub selector_labels: Vec<String>,
    /// Prefixes of labels that are copied from the target to the primary; `*` is every label.
    pub include_label_prefixes: Vec<String>,
    /// Whether ConfigMaps and Secrets are tracked and copied.
    pub config_tracking: bool,
    /// Whether references to MetricTemplates of other namespaces are refused (Flagger's `-no-cross-namespace-refs`).
    pub no_cross_namespace_refs: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            selector_labels: SELECTOR_LABELS.map(str::to_owned).to_vec(),
            include_label_prefixes: Vec::new(),
            config_tracking: true,
            no_cross_namespace_refs: false,
        }
    }
}

/// Whose an existing object is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ownership {
    /// It does not exist, or this Canary made it.
    Ours,
    /// Somebody made it before the Canary came; it is taken over and can be given back.
    Taken,
}

/// A Canary and its target, ready to generate objects.
pub struct Blueprint<'a> {
    canary: &'a Canary,
    target: &'a Deployment,
    service: CanaryService,
    options: &'a Options,
    namespace: String,
    apex: String,
    label_key: String,
    label_value: String,
}

impl<'a> Blueprint<'a> {
    /// Fails with a sentence for the user when the target has no label that could tell primary and canary apart.
    pub fn new(canary: &'a Canary, target: &'a Deployment, options: &'a Options) -> Result<Self, String> {
        let namespace = canary.namespace().unwrap_or_default();
        let empty = BTreeMap::new();
        let selector = target
            .spec
            .as_ref()
            .and_then(|spec| spec.selector.match_labels.as_ref())
            .unwrap_or(&empty);
        let (label_key, label_value) = options
            .selector_labels
            .iter()
            .find_map(|key| selector.get_key_value(key))
            .ok_or_else(|| {
                format!(
                    "Deployment {}.{namespace}: spec.selector.matchLabels must contain one of {}",
                    target.name_any(),
                    options.selector_labels.join(", ")
                )
            })?;
        let service = canary.spec.service.clone().unwrap_or_default();
        Ok(Self {
            apex: service
                .name
                .clone()
                .unwrap_or_else(|| canary.spec.target_ref.name.clone()),
            service,
            label_key: label_key.clone(),
            label_value: label_value.clone(),
            canary,
            target,
            options,
            namespace,
        })
    }

    /// Name of the apex Service and of the route.
    pub fn apex_name(&self) -> &str {
        &self.apex
    }

    /// The label selector of the target's pods, for a watch.
    pub fn target_selector(&self) -> String {
        format!("{}={}", self.label_key, self.label_value)
    }

    fn primary_name(&self) -> String {
        format!("{}-primary", self.target.name_any())
    }

    fn primary_label_value(&self) -> String {
        format!("{}-primary", self.label_value)
    }

    fn owner_references(&self) -> Value {
        json!([{
            "apiVersion": "flagger.app/v1beta1",
            "kind": "Canary",
            "name": self.canary.name_any(),
            "uid": self.canary.uid().unwrap_or_default(),
            "controller": true,
            "blockOwnerDeletion": true,
        }])
    }

    fn metadata(&self, name: &str, ownership: Ownership) -> Map<String, Value> {
        let mut metadata = Map::new();
        metadata.insert("name".to_owned(), json!(name));
        metadata.insert("namespace".to_owned(), json!(self.namespace));
        if ownership == Ownership::Ours {
            metadata.insert("ownerReferences".to_owned(), self.owner_references());
        }
        metadata
    }

    /// Whether an object with this metadata was made by this Canary.
    pub fn ownership(&self, metadata: Option<&ObjectMeta>) -> Ownership {
        match metadata {
            None => Ownership::Ours,
            Some(metadata) if is_owned(metadata, self.canary.uid().as_deref()) => Ownership::Ours,
            Some(_) => Ownership::Taken,
        }
    }
}

/// Whether an object is controlled by the owner with this uid.
pub fn is_owned(metadata: &ObjectMeta, uid: Option<&str>) -> bool {
    metadata
        .owner_references
        .iter()
        .flatten()
        .any(|owner| Some(owner.uid.as_str()) == uid)
}

fn opt_out(annotations: &mut BTreeMap<String, String>) {
    annotations.extend(OPT_OUT.map(|(key, value)| (key.to_owned(), value.to_owned())));
}

fn or_none<T: serde::Serialize>(value: &T) -> Option<Value> {
    let value = serde_json::to_value(value).ok()?;
    let empty = match &value {
        Value::Null => true,
        Value::Array(items) => items.is_empty(),
        Value::Object(map) => map.is_empty(),
        _ => false,
    };
    (!empty).then_some(value)
}

/// Whether `live` has everything that `wanted` has: every field, lists of the same length with every element covered in
/// its place. Owners may be more than wanted. An empty list or map is covered by its absence.
pub fn covers(live: &Value, wanted: &Value) -> bool {
    match (live, wanted) {
        (Value::Object(live), Value::Object(wanted)) => {
            wanted.iter().all(|(key, wanted)| match live.get(key) {
                Some(Value::Array(owners)) if key == "ownerReferences" => {
                    wanted.as_array().is_none_or(|wanted| {
                        wanted
                            .iter()
                            .all(|one| owners.iter().any(|owner| covers(owner, one)))
                    })
                }
                Some(live) => covers(live, wanted),
                None => is_empty(wanted),
            })
        }
        (Value::Array(live), Value::Array(wanted)) => {
            live.len() == wanted.len() && live.iter().zip(wanted).all(|(live, wanted)| covers(live, wanted))
        }
        (Value::Number(live), Value::Number(wanted)) => live.as_f64() == wanted.as_f64(),
        (live, wanted) => live == wanted,
    }
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Array(items) => items.is_empty(),
        Value::Object(map) => map.values().all(is_empty),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_object_with_more_than_is_wanted_is_covered_and_one_with_less_is_not() {
        let live = json!({"a": 1, "b": {"c": [{"d": 1, "e": 2}], "x": 9}});
        assert!(covers(&live, &json!({"b": {"c": [{"d": 1}]}})));
        assert!(covers(&live, &json!({"b": {"new": []}})));
        assert!(!covers(&live, &json!({"b": {"c": [{"d": 2}]}})));
        assert!(!covers(&live, &json!({"b": {"c": [{"d": 1}, {"d": 2}]}})));
        assert!(!covers(&live, &json!({"z": 1})));
    }

    #[test]
    fn a_second_owner_is_no_reason_to_write() {
        let live = json!({"ownerReferences": [{"uid": "other"}, {"uid": "u", "controller": true}]});
        assert!(covers(&live, &json!({"ownerReferences": [{"uid": "u"}]})));
        assert!(!covers(&live, &json!({"ownerReferences": [{"uid": "v"}]})));
    }
}
