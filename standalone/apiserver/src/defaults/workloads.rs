//! Deployments and their kin, Jobs, claims, and the small ones.

use serde_json::{Map, Value, json};

use super::{pods, set};
use crate::meta;

fn pod_template(spec: &mut Map<String, Value>) {
    pods::template(meta::as_object_mut(
        spec.entry("template").or_insert_with(|| json!({})),
    ));
}

pub(crate) fn apply(plural: &str, object: &mut Value) {
    match plural {
        "deployments" => deployment(meta::member_object(object, "spec")),
        "replicasets" | "replicationcontrollers" => {
            let spec = meta::member_object(object, "spec");
            set(spec, "replicas", json!(1));
            pod_template(spec);
            if plural == "replicationcontrollers" {
                labels_of_template(object);
            }
        }
        "statefulsets" => {
            let spec = meta::member_object(object, "spec");
            set(spec, "podManagementPolicy", json!("OrderedReady"));
            set(spec, "replicas", json!(1));
            set(spec, "revisionHistoryLimit", json!(10));
            set(
                spec,
                "persistentVolumeClaimRetentionPolicy",
                json!({"whenDeleted": "Retain", "whenScaled": "Retain"}),
            );
            let strategy = meta::as_object_mut(spec.entry("updateStrategy").or_insert_with(|| json!({})));
            set(strategy, "type", json!("RollingUpdate"));
            if strategy.get("type") == Some(&json!("RollingUpdate")) {
                set(strategy, "rollingUpdate", json!({}));
                if let Some(rolling) = strategy.get_mut("rollingUpdate").and_then(Value::as_object_mut) {
                    set(rolling, "partition", json!(0));
                }
            }
            pod_template(spec);
            for claim in spec
                .get_mut("volumeClaimTemplates")
                .and_then(Value::as_array_mut)
                .into_iter()
                .flatten()
            {
                let map = meta::as_object_mut(claim);
                set(map, "apiVersion", json!("v1"));
                set(map, "kind", json!("PersistentVolumeClaim"));
                let inner = meta::as_object_mut(map.entry("spec").or_insert_with(|| json!({})));
                set(inner, "volumeMode", json!("Filesystem"));
                map.insert("status".into(), json!({"phase": "Pending"}));
            }
        }
        "daemonsets" => {
            let spec = meta::member_object(object, "spec");
            set(spec, "revisionHistoryLimit", json!(10));
            let strategy = meta::as_object_mut(spec.entry("updateStrategy").or_insert_with(|| json!({})));
            set(strategy, "type", json!("RollingUpdate"));
            if strategy.get("type") == Some(&json!("RollingUpdate")) {
                set(strategy, "rollingUpdate", json!({}));
                if let Some(rolling) = strategy.get_mut("rollingUpdate").and_then(Value::as_object_mut) {
                    set(rolling, "maxUnavailable", json!(1));
                    set(rolling, "maxSurge", json!(0));
                }
            }
            pod_template(spec);
            let metadata = meta::metadata_mut(object);
            let annotations = meta::as_object_mut(metadata.entry("annotations").or_insert_with(|| json!({})));
            set(
                annotations,
                "deprecated.daemonset.template.generation",
                json!("1"),
            );
        }
        "jobs" => job(object),
        "cronjobs" => {
            let spec = meta::member_object(object, "spec");
            set(spec, "concurrencyPolicy", json!("Allow"));
            set(spec, "suspend", json!(false));
            set(spec, "successfulJobsHistoryLimit", json!(3));
            set(spec, "failedJobsHistoryLimit", json!(1));
            let template = meta::as_object_mut(spec.entry("jobTemplate").or_insert_with(|| json!({})));
            set(template, "metadata", json!({}));
            pod_template(meta::as_object_mut(
                template.entry("spec").or_insert_with(|| json!({})),
            ));
        }
        _ => {}
    }
}

fn deployment(spec: &mut Map<String, Value>) {
    set(spec, "replicas", json!(1));
    set(spec, "revisionHistoryLimit", json!(10));
    set(spec, "progressDeadlineSeconds", json!(600));
    let strategy = meta::as_object_mut(spec.entry("strategy").or_insert_with(|| json!({})));
    set(strategy, "type", json!("RollingUpdate"));
    if strategy.get("type") == Some(&json!("RollingUpdate")) {
        set(strategy, "rollingUpdate", json!({}));
        if let Some(rolling) = strategy.get_mut("rollingUpdate").and_then(Value::as_object_mut) {
            set(rolling, "maxUnavailable", json!("25%"));
            set(rolling, "maxSurge", json!("25%"));
        }
    }
    pod_template(spec);
}

fn job(object: &mut Value) {
    let spec = meta::member_object(object, "spec");
    if spec.get("completions").is_none() && spec.get("parallelism").is_none() {
        spec.insert("completions".into(), json!(1));
    }
    set(spec, "parallelism", json!(1));
    set(spec, "backoffLimit", json!(6));
    set(spec, "completionMode", json!("NonIndexed"));
    set(spec, "suspend", json!(false));
    set(spec, "manualSelector", json!(false));
    set(
        spec,
        "podReplacementPolicy",
        json!(if spec.contains_key("podFailurePolicy") {
            "Failed"
        } else {
            "TerminatingOrFailed"
        }),
    );
    pod_template(spec);
    labels_of_template(object);
}

/// A Job without labels has those of its template.
fn labels_of_template(object: &mut Value) {
    let labels = meta::at(object, "spec.template.metadata.labels")
        .filter(|l| !crate::schema::is_go_zero(l))
        .cloned();
    let metadata = meta::metadata_mut(object);
    if let Some(labels) = labels.filter(|_| metadata.get("labels").is_none_or(crate::schema::is_go_zero)) {
        metadata.insert("labels".into(), labels);
    }
}

/// The selector of a Job and the labels of its pods are made from its uid.
pub(crate) fn job_created(object: &mut Value, live: Option<&Value>) {
    let (uid, name) = (meta::uid(object).to_owned(), meta::name(object).to_owned());
    let spec = meta::member_object(object, "spec");
    if live.is_none() {
        let manual = spec.get("manualSelector") == Some(&Value::Bool(true));
        if !manual && !uid.is_empty() {
            let template = meta::as_object_mut(spec.entry("template").or_insert_with(|| json!({})));
            let metadata = meta::as_object_mut(template.entry("metadata").or_insert_with(|| json!({})));
            let labels = meta::as_object_mut(metadata.entry("labels").or_insert_with(|| json!({})));
            for (key, value) in [
                ("controller-uid", &uid),
                ("batch.kubernetes.io/controller-uid", &uid),
                ("job-name", &name),
                ("batch.kubernetes.io/job-name", &name),
            ] {
                labels.insert(key.into(), json!(value));
            }
            spec.insert(
                "selector".into(),
                json!({"matchLabels": {"batch.kubernetes.io/controller-uid": uid}}),
            );
        }
    }
    labels_of_template(object);
}

/// Claims and volumes are held by a finalizer while they are in use.
pub(crate) fn protected(object: &mut Value, live: Option<&Value>, finalizer: &str) {
    if live.is_none() {
        let created = meta::text(object, "creationTimestamp").to_owned();
        let status = if finalizer.ends_with("/pv-protection") {
            json!({"phase": "Pending", "lastPhaseTransitionTime": created})
        } else {
            json!({"phase": "Pending"})
        };
        meta::as_object_mut(object).insert("status".into(), status);
        let finalizers = meta::metadata_mut(object)
            .entry("finalizers")
            .or_insert_with(|| json!([]));
        if let Value::Array(list) = finalizers
            && !list.contains(&json!(finalizer))
        {
            list.push(json!(finalizer));
        }
    }
}

pub(crate) fn volume(object: &mut Value) {
    let spec = meta::member_object(object, "spec");
    set(spec, "persistentVolumeReclaimPolicy", json!("Retain"));
    set(spec, "volumeMode", json!("Filesystem"));
    if let Some(host) = spec.get_mut("hostPath").and_then(Value::as_object_mut) {
        set(host, "type", json!(""));
    }
}

/// Of a container's limits each default follows from the next: max, default, defaultRequest, min.
pub(crate) fn limit_range(object: &mut Value) {
    let spec = meta::member_object(object, "spec");
    for item in spec
        .get_mut("limits")
        .and_then(Value::as_array_mut)
        .into_iter()
        .flatten()
    {
        let item = meta::as_object_mut(item);
        if item.get("type").and_then(Value::as_str) != Some("Container") {
            continue;
        }
        for (from, to) in [
            ("max", "default"),
            ("default", "defaultRequest"),
            ("min", "defaultRequest"),
        ] {
            if let Some(values) = item.get(from).and_then(Value::as_object).cloned() {
                let target = meta::as_object_mut(item.entry(to).or_insert_with(|| json!({})));
                for (name, value) in values {
                    target.entry(name).or_insert(value);
                }
            }
        }
    }
}

/// Counts that Go writes even when they are 0.
pub(crate) fn counters(plural: &str, object: &mut Value, live: Option<&Value>) {
    if live.is_none() {
        let status = if plural == "statefulsets" {
            json!({"replicas": 0, "availableReplicas": 0})
        } else {
            json!({"replicas": 0})
        };
        meta::as_object_mut(object).insert("status".into(), status);
    }
}

pub(crate) fn network_policy(object: &mut Value) {
    let spec = meta::member_object(object, "spec");
    if spec.get("policyTypes").is_none() {
        let mut types = vec![json!("Ingress")];
        if spec
            .get("egress")
            .and_then(Value::as_array)
            .is_some_and(|e| !e.is_empty())
        {
            types.push(json!("Egress"));
        }
        spec.insert("policyTypes".into(), Value::Array(types));
    }
    for direction in ["ingress", "egress"] {
        for rule in spec
            .get_mut(direction)
            .and_then(Value::as_array_mut)
            .into_iter()
            .flatten()
        {
            for port in rule
                .get_mut("ports")
                .and_then(Value::as_array_mut)
                .into_iter()
                .flatten()
            {
                set(meta::as_object_mut(port), "protocol", json!("TCP"));
            }
        }
    }
}

pub(crate) fn role_binding(object: &mut Value) {
    let map = meta::as_object_mut(object);
    if let Some(role) = map.get_mut("roleRef").and_then(Value::as_object_mut)
        && role
            .get("apiGroup")
            .and_then(Value::as_str)
            .unwrap_or_default()
            .is_empty()
    {
        role.insert("apiGroup".into(), json!("rbac.authorization.k8s.io"));
    }
    for subject in map
        .get_mut("subjects")
        .and_then(Value::as_array_mut)
        .into_iter()
        .flatten()
    {
        let subject = meta::as_object_mut(subject);
        if matches!(
            subject.get("kind").and_then(Value::as_str),
            Some("User" | "Group")
        ) {
            set(subject, "apiGroup", json!("rbac.authorization.k8s.io"));
        }
    }
}

pub(crate) fn autoscaler(object: &mut Value) {
    let spec = meta::member_object(object, "spec");
    set(spec, "minReplicas", json!(1));
    if spec
        .get("metrics")
        .and_then(Value::as_array)
        .is_none_or(Vec::is_empty)
    {
        spec.insert(
            "metrics".into(),
            json!([{"type": "Resource", "resource": {"name": "cpu", "target": {"type": "Utilization", "averageUtilization": 80}}}]),
        );
    }
}
