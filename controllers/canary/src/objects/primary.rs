//! The primary Deployment: a copy of the target under another name, with its own label, ConfigMaps and Secrets.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::core::v1::PodTemplateSpec;
use serde_json::{Map, Value, json};

use super::configs::{Kind, Reference, Tracked, for_each_reference, list};
use super::{Blueprint, Ownership};

/// Annotation of the pod template that makes a promotion roll the pods.
const FLAGGER_ID: &str = "flagger-id";
/// Metadata of GitOps tools says who manages the target; it must not make them manage the copy.
const NEVER_COPIED: [&str; 3] = [
    "toolkit.fluxcd.io",
    "deployment.kubernetes.io/",
    "kubectl.kubernetes.io/last-applied-configuration",
];

impl Blueprint<'_> {
    /// The primary. At creation the target's annotations come along; at a promotion, as in Flagger, only those with an
    /// included prefix.
    pub fn primary(
        &self,
        tracked: &BTreeMap<Reference, Tracked>,
        id: &str,
        replicas: i32,
        creating: bool,
    ) -> Value {
        let target = &self.target.metadata;
        let mut labels = self.included(target.labels.as_ref());
        labels.insert(self.label_key.clone(), self.primary_label_value());
        let annotations = if creating {
            allowed(target.annotations.as_ref()).collect()
        } else {
            self.included(target.annotations.as_ref())
        };
        let mut metadata = self.metadata(&self.primary_name(), Ownership::Ours);
        metadata.insert("labels".to_owned(), json!(labels));
        if !annotations.is_empty() {
            metadata.insert("annotations".to_owned(), json!(annotations));
        }
        let source = self.target.spec.clone().unwrap_or_default();
        let mut spec = Map::new();
        let mut put = |name: &str, value: Option<Value>| {
            if let Some(value) = value {
                spec.insert(name.to_owned(), value);
            }
        };
        put(
            "progressDeadlineSeconds",
            source.progress_deadline_seconds.map(Value::from),
        );
        put("minReadySeconds", source.min_ready_seconds.map(Value::from));
        put(
            "revisionHistoryLimit",
            source.revision_history_limit.map(Value::from),
        );
        put("replicas", Some(json!(replicas)));
        put(
            "strategy",
            source.strategy.as_ref().map(|strategy| json!(strategy)),
        );
        put(
            "selector",
            Some(json!({"matchLabels": {&self.label_key: self.primary_label_value()}})),
        );
        put("template", Some(self.template(&source.template, tracked, id)));
        json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": metadata, "spec": spec})
    }

    fn template(&self, source: &PodTemplateSpec, tracked: &BTreeMap<Reference, Tracked>, id: &str) -> Value {
        let mut template = serde_json::to_value(source).unwrap_or_default();
        let metadata = source.metadata.clone().unwrap_or_default();
        let mut labels = metadata.labels.unwrap_or_default();
        labels.insert(self.label_key.clone(), self.primary_label_value());
        let mut annotations = metadata.annotations.unwrap_or_default();
        annotations.insert(FLAGGER_ID.to_owned(), id.to_owned());
        template["metadata"] = json!({"labels": labels, "annotations": annotations});
        let names: BTreeSet<(Kind, &str)> = tracked
            .keys()
            .map(|reference| (reference.kind, reference.name.as_str()))
            .collect();
        for_each_reference(&mut template, &mut |kind, name, _| {
            if names.contains(&(kind, name.as_str())) {
                name.push_str("-primary");
            }
        });
        self.spread(&mut template);
        template
    }

    /// Rules that keep the target's pods apart must keep the primary's pods apart.
    fn spread(&self, template: &mut Value) {
        const ANTI: &str = "/spec/affinity/podAntiAffinity";
        for (terms, selector) in [
            (
                format!("{ANTI}/preferredDuringSchedulingIgnoredDuringExecution"),
                "/podAffinityTerm/labelSelector",
            ),
            (
                format!("{ANTI}/requiredDuringSchedulingIgnoredDuringExecution"),
                "/labelSelector",
            ),
            ("/spec/topologySpreadConstraints".to_owned(), "/labelSelector"),
        ] {
            for term in list(template, &terms) {
                if let Some(selector) = term.pointer_mut(selector) {
                    self.rename(selector);
                }
            }
        }
    }

    fn rename(&self, selector: &mut Value) {
        let primary = Value::from(self.primary_label_value());
        if let Some(value) = selector
            .get_mut("matchLabels")
            .and_then(|labels| labels.get_mut(&self.label_key))
            && *value == self.label_value.as_str()
        {
            *value = primary.clone();
        }
        for expression in list(selector, "/matchExpressions") {
            if expression["key"] != self.label_key.as_str() {
                continue;
            }
            for value in list(expression, "/values") {
                if *value == self.label_value.as_str() {
                    *value = primary.clone();
                }
            }
        }
    }

    fn included(&self, map: Option<&BTreeMap<String, String>>) -> BTreeMap<String, String> {
        let prefixes = &self.options.include_label_prefixes;
        allowed(map)
            .filter(|(key, _)| {
                prefixes
                    .iter()
                    .any(|prefix| prefix == "*" || key.starts_with(prefix.as_str()))
            })
            .collect()
    }
}

pub(super) fn allowed(map: Option<&BTreeMap<String, String>>) -> impl Iterator<Item = (String, String)> + '_ {
    map.into_iter()
        .flatten()
        .filter(|(key, _)| !NEVER_COPIED.iter().any(|never| key.contains(never)))
        .map(|(key, value)| (key.clone(), value.clone()))
}
