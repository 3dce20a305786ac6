use super::*;
use serde_json::json;

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(second).unwrap()
}

fn state(object: &Value) -> State {
    assess(object, at(1000)).state
}

fn object(api_version: &str, kind: &str, spec: Value, status: Value) -> Value {
    json!({"apiVersion": api_version, "kind": kind, "metadata": {"name": "x", "generation": 2}, "spec": spec, "status": status})
}

fn settled_deployment() -> Value {
    object(
        "apps/v1",
        "Deployment",
        json!({"replicas": 2, "progressDeadlineSeconds": 600}),
        json!({"observedGeneration": 2, "replicas": 2, "updatedReplicas": 2, "readyReplicas": 2, "availableReplicas": 2,
               "conditions": [{"type": "Available", "status": "True"}, {"type": "Progressing", "status": "True", "reason": "NewReplicaSetAvailable"}]}),
    )
}

#[test]
fn a_deployment_is_current_only_when_every_count_and_condition_agrees() {
    assert_eq!(state(&settled_deployment()), State::Current);
    let changes: &[(&str, Value, State)] = &[
        ("/status/observedGeneration", json!(1), State::InProgress),
        ("/status/replicas", json!(3), State::InProgress),
        ("/status/updatedReplicas", json!(1), State::InProgress),
        ("/status/readyReplicas", json!(1), State::InProgress),
        ("/status/availableReplicas", json!(1), State::InProgress),
        ("/status/conditions/0/status", json!("False"), State::InProgress),
        (
            "/status/conditions/1/reason",
            json!("ReplicaSetUpdated"),
            State::InProgress,
        ),
        (
            "/status/conditions/1/reason",
            json!("ProgressDeadlineExceeded"),
            State::Failed,
        ),
        (
            "/metadata",
            json!({"deletionTimestamp": "2026-01-01T00:00:00Z"}),
            State::Terminating,
        ),
    ];
    for (pointer, value, want) in changes {
        let mut changed = settled_deployment();
        *changed.pointer_mut(pointer).unwrap() = value.clone();
        assert_eq!(state(&changed), *want, "{pointer} = {value}");
    }
}

#[test]
fn every_kind_is_judged_by_its_own_rule() {
    let stateful = |status: Value| object("apps/v1", "StatefulSet", json!({"replicas": 2}), status);
    let daemon = |status: Value| object("apps/v1", "DaemonSet", json!({}), status);
    let crd = |conditions: Value| {
        object(
            "apiextensions.k8s.io/v1",
            "CustomResourceDefinition",
            json!({}),
            json!({"conditions": conditions}),
        )
    };
    let cases = vec![
        (
            stateful(
                json!({"replicas": 2, "readyReplicas": 2, "currentReplicas": 2, "currentRevision": "a", "updateRevision": "a"}),
            ),
            State::Current,
        ),
        (
            stateful(
                json!({"replicas": 2, "readyReplicas": 2, "currentReplicas": 2, "currentRevision": "a", "updateRevision": "b"}),
            ),
            State::InProgress,
        ),
        (stateful(json!({"replicas": 1})), State::InProgress),
        (
            object(
                "apps/v1",
                "StatefulSet",
                json!({"updateStrategy": {"type": "OnDelete"}}),
                json!({}),
            ),
            State::Current,
        ),
        (
            object(
                "apps/v1",
                "StatefulSet",
                json!({"replicas": 3, "updateStrategy": {"rollingUpdate": {"partition": 2}}}),
                json!({"replicas": 3, "readyReplicas": 3, "updatedReplicas": 1}),
            ),
            State::Current,
        ),
        (daemon(json!({})), State::InProgress),
        (
            daemon(
                json!({"observedGeneration": 2, "desiredNumberScheduled": 1, "currentNumberScheduled": 1, "updatedNumberScheduled": 1, "numberAvailable": 1, "numberReady": 1}),
            ),
            State::Current,
        ),
        (
            daemon(json!({"observedGeneration": 2, "desiredNumberScheduled": 0})),
            State::Current,
        ),
        (
            object(
                "apps/v1",
                "ReplicaSet",
                json!({"replicas": 1}),
                json!({"replicas": 1, "fullyLabeledReplicas": 1, "availableReplicas": 1, "readyReplicas": 1}),
            ),
            State::Current,
        ),
        (
            object(
                "apps/v1",
                "ReplicaSet",
                json!({"replicas": 1}),
                json!({"conditions": [{"type": "ReplicaFailure", "status": "True"}]}),
            ),
            State::InProgress,
        ),
        (
            object(
                "v1",
                "Pod",
                json!({}),
                json!({"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]}),
            ),
            State::Current,
        ),
        (
            object(
                "v1",
                "Pod",
                json!({}),
                json!({"phase": "Running", "containerStatuses": [{"name": "a", "state": {"waiting": {"reason": "CrashLoopBackOff"}}}]}),
            ),
            State::Failed,
        ),
        (
            object("v1", "Pod", json!({}), json!({"phase": "Succeeded"})),
            State::Current,
        ),
        (
            object(
                "v1",
                "Pod",
                json!({}),
                json!({"phase": "Failed", "reason": "Evicted"}),
            ),
            State::Failed,
        ),
        (
            object(
                "batch/v1",
                "Job",
                json!({}),
                json!({"active": 1, "startTime": "2026-01-01T00:00:00Z"}),
            ),
            State::InProgress,
        ),
        (
            object(
                "batch/v1",
                "Job",
                json!({}),
                json!({"conditions": [{"type": "Complete", "status": "True"}]}),
            ),
            State::Current,
        ),
        (
            object(
                "batch/v1",
                "Job",
                json!({}),
                json!({"conditions": [{"type": "Suspended", "status": "True"}]}),
            ),
            State::Current,
        ),
        (
            object(
                "batch/v1",
                "Job",
                json!({}),
                json!({"conditions": [{"type": "Failed", "status": "True"}]}),
            ),
            State::Failed,
        ),
        (
            object(
                "v1",
                "PersistentVolumeClaim",
                json!({}),
                json!({"phase": "Pending"}),
            ),
            State::InProgress,
        ),
        (
            object(
                "v1",
                "PersistentVolumeClaim",
                json!({}),
                json!({"phase": "Bound"}),
            ),
            State::Current,
        ),
        (
            object("v1", "Service", json!({"type": "LoadBalancer"}), json!({})),
            State::InProgress,
        ),
        (
            object(
                "v1",
                "Service",
                json!({"type": "LoadBalancer", "clusterIP": "10.0.0.1"}),
                json!({}),
            ),
            State::Current,
        ),
        (object("v1", "Service", json!({}), json!({})), State::Current),
        (
            crd(json!([{"type": "Established", "status": "True"}])),
            State::Current,
        ),
        (
            crd(json!([{"type": "Established", "status": "False", "reason": "Installing"}])),
            State::InProgress,
        ),
        (
            crd(json!([{"type": "NamesAccepted", "status": "False"}])),
            State::Failed,
        ),
        (
            object("example.com/v1", "Thing", json!({}), json!({})),
            State::Current,
        ),
        (
            object(
                "example.com/v1",
                "Thing",
                json!({}),
                json!({"conditions": [{"type": "Ready", "status": "False"}]}),
            ),
            State::InProgress,
        ),
        (
            object(
                "example.com/v1",
                "Thing",
                json!({}),
                json!({"conditions": [{"type": "Ready", "status": "True"}]}),
            ),
            State::Current,
        ),
        (
            object(
                "example.com/v1",
                "Thing",
                json!({}),
                json!({"conditions": [{"type": "Stalled", "status": "True"}]}),
            ),
            State::Failed,
        ),
        (
            object(
                "example.com/v1",
                "Thing",
                json!({}),
                json!({"conditions": [{"type": "Reconciling", "status": "True"}, {"type": "Ready", "status": "True"}]}),
            ),
            State::InProgress,
        ),
        (object("v1", "ConfigMap", json!({}), json!({})), State::Current),
    ];
    for (object, want) in cases {
        assert_eq!(state(&object), want, "{object}");
    }
}

#[test]
fn an_unschedulable_pod_gets_fifteen_seconds_before_it_has_failed() {
    let since = at(1000).to_string();
    let pod = object(
        "v1",
        "Pod",
        json!({}),
        json!({"phase": "Pending", "conditions": [
        {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/1 nodes", "lastTransitionTime": since}]}),
    );
    let early = assess(&pod, at(1010));
    assert_eq!(
        (early.state, early.look_again),
        (State::InProgress, Some(at(1015)))
    );
    let late = assess(&pod, at(1015));
    assert_eq!((late.state, late.message.as_str()), (State::Failed, "0/1 nodes"));
}
