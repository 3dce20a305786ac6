//! The kinds that run something.

use jiff::{SignedDuration, Timestamp};
use serde_json::Value;

use super::{Health, State, condition, number, said};

/// How long a Pod may be unschedulable before it counts as failed: a node or a volume may just be coming up.
/// kstatus' value.
const SCHEDULE_WINDOW: SignedDuration = SignedDuration::from_secs(15);

fn replicas_wanted(object: &Value) -> i64 {
    // The API server's default for Deployments, ReplicaSets and StatefulSets.
    number(object, "/spec/replicas").unwrap_or(1)
}

fn status(object: &Value, field: &str) -> i64 {
    number(object, &format!("/status/{field}")).unwrap_or(0)
}

/// The first of `(what is counted, count, wanted)` that falls short, as a sentence.
fn short(counts: &[(&str, i64, i64)]) -> Option<Health> {
    counts
        .iter()
        .find(|(_, have, want)| have < want)
        .map(|(what, have, want)| Health::progress(format!("{what}: {have}/{want}")))
}

pub(super) fn deployment(object: &Value) -> Health {
    let mut new_available = object.pointer("/spec/progressDeadlineSeconds").is_none();
    if let Some(c) = condition(object, "Progressing") {
        if c.reason == "ProgressDeadlineExceeded" {
            return Health::failed(said(&c, "progress deadline exceeded"));
        }
        new_available |= c.status == "True" && c.reason == "NewReplicaSetAvailable";
    }
    let wanted = replicas_wanted(object);
    let (replicas, updated) = (status(object, "replicas"), status(object, "updatedReplicas"));
    let counts = [("replicas", replicas, wanted), ("updated", updated, wanted)];
    if let Some(health) = short(&counts) {
        return health;
    }
    if replicas > updated {
        return Health::progress(format!(
            "pending termination of old replicas: {}",
            replicas - updated
        ));
    }
    let counts = [
        ("available", status(object, "availableReplicas"), updated),
        ("ready", status(object, "readyReplicas"), wanted),
    ];
    if let Some(health) = short(&counts) {
        return health;
    }
    if !new_available {
        return Health::progress("the new ReplicaSet is not available yet");
    }
    match condition(object, "Available") {
        Some(c) if c.status == "True" => Health::current(),
        _ => Health::progress("not available"),
    }
}

pub(super) fn replica_set(object: &Value) -> Health {
    if let Some(c) = condition(object, "ReplicaFailure")
        && c.status == "True"
    {
        return Health::progress(said(&c, "replica failure"));
    }
    let wanted = replicas_wanted(object);
    let counts = [
        ("labelled", status(object, "fullyLabeledReplicas"), wanted),
        ("available", status(object, "availableReplicas"), wanted),
        ("ready", status(object, "readyReplicas"), wanted),
    ];
    if let Some(health) = short(&counts) {
        return health;
    }
    let replicas = status(object, "replicas");
    if replicas > wanted {
        return Health::progress(format!("pending termination: {}", replicas - wanted));
    }
    Health::current()
}

pub(super) fn stateful_set(object: &Value) -> Health {
    if object
        .pointer("/spec/updateStrategy/type")
        .is_some_and(|t| t == "OnDelete")
    {
        return Health::current();
    }
    let wanted = replicas_wanted(object);
    let replicas = status(object, "replicas");
    let counts = [
        ("replicas", replicas, wanted),
        ("ready", status(object, "readyReplicas"), wanted),
    ];
    if let Some(health) = short(&counts) {
        return health;
    }
    if replicas > wanted {
        return Health::progress(format!("pending termination: {}", replicas - wanted));
    }
    let partition = number(object, "/spec/updateStrategy/rollingUpdate/partition").unwrap_or(0);
    if partition > 0 {
        return short(&[("updated", status(object, "updatedReplicas"), wanted - partition)])
            .unwrap_or_else(Health::current);
    }
    if let Some(health) = short(&[("current", status(object, "currentReplicas"), wanted)]) {
        return health;
    }
    if object.pointer("/status/currentRevision") != object.pointer("/status/updateRevision") {
        return Health::progress("waiting for the pods of the new revision");
    }
    Health::current()
}

pub(super) fn daemon_set(object: &Value) -> Health {
    if number(object, "/status/observedGeneration").is_none() {
        return Health::progress("not observed yet");
    }
    let Some(wanted) = number(object, "/status/desiredNumberScheduled") else {
        return Health::progress("number of nodes not known yet");
    };
    let counts = [
        ("scheduled", status(object, "currentNumberScheduled"), wanted),
        ("updated", status(object, "updatedNumberScheduled"), wanted),
        ("available", status(object, "numberAvailable"), wanted),
        ("ready", status(object, "numberReady"), wanted),
    ];
    short(&counts).unwrap_or_else(Health::current)
}

pub(super) fn pod(object: &Value, now: Timestamp) -> Health {
    let phase = object
        .pointer("/status/phase")
        .and_then(Value::as_str)
        .unwrap_or_default();
    let crashing = || {
        let statuses = object.pointer("/status/containerStatuses")?.as_array()?;
        statuses.iter().find_map(|c| {
            (c.pointer("/state/waiting/reason")? == "CrashLoopBackOff")
                .then(|| c["name"].as_str().unwrap_or_default())
        })
    };
    match phase {
        "Succeeded" => Health::current(),
        "Failed" => {
            let why = object
                .pointer("/status/message")
                .or_else(|| object.pointer("/status/reason"));
            Health::failed(why.and_then(Value::as_str).unwrap_or("the pod failed"))
        }
        "Running" if condition(object, "Ready").is_some_and(|c| c.status == "True") => Health::current(),
        "Running" | "Pending" => {
            if let Some(container) = crashing() {
                return Health::failed(format!("container {container} is in CrashLoopBackOff"));
            }
            match condition(object, "PodScheduled") {
                Some(c) if c.status == "False" && c.reason == "Unschedulable" => {
                    let deadline = c.since.unwrap_or(now) + SCHEDULE_WINDOW;
                    if now >= deadline {
                        return Health::failed(said(&c, "unschedulable"));
                    }
                    Health {
                        look_again: Some(deadline),
                        ..Health::progress(said(&c, "not scheduled yet"))
                    }
                }
                _ if phase == "Running" => Health::progress("running and not ready"),
                _ => Health::progress("pending"),
            }
        }
        "" => Health::progress("not observed yet"),
        other => Health::new(State::InProgress, format!("phase {other}")),
    }
}

pub(super) fn job(object: &Value) -> Health {
    let holds = |type_: &str| condition(object, type_).filter(|c| c.status == "True");
    if let Some(c) = holds("Failed") {
        return Health::failed(said(&c, "the job failed"));
    }
    if holds("Complete").is_some() || holds("Suspended").is_some() {
        return Health::current();
    }
    if status(object, "active") > 0 {
        Health::progress("running")
    } else {
        Health::progress("not started yet")
    }
}
