//! What a Deployment's status says: counts, conditions and the progress deadline, in Kubernetes' words. Pure.

use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::apps::v1::{Deployment, DeploymentCondition, DeploymentStatus, ReplicaSet};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::ResourceExt;

use crate::controllers::rollout::{actual, available, fences, spec_replicas, wanted};

const PROGRESSING: &str = "Progressing";
const AVAILABLE: &str = "Available";
const REPLICA_FAILURE: &str = "ReplicaFailure";

pub(super) fn note_created(
    deployment: &Deployment,
    name: &str,
    status: &mut DeploymentStatus,
    now: Timestamp,
) {
    if has_deadline(deployment) {
        let message = format!("Created new replica set \"{name}\"");
        set_condition(status, PROGRESSING, "True", "NewReplicaSetCreated", &message, now);
    }
}

pub(super) fn note_found(
    deployment: &Deployment,
    new: &ReplicaSet,
    status: &mut DeploymentStatus,
    now: Timestamp,
) {
    if has_deadline(deployment) && condition(status, PROGRESSING).is_none() {
        let message = format!("Found new replica set \"{}\"", new.name_any());
        set_condition(status, PROGRESSING, "True", "FoundNewReplicaSet", &message, now);
    }
}

pub(super) fn note_pause(
    deployment: &Deployment,
    paused: bool,
    status: &mut DeploymentStatus,
    now: Timestamp,
) {
    if !has_deadline(deployment) {
        return;
    }
    let reason = condition(status, PROGRESSING)
        .and_then(|condition| condition.reason.clone())
        .unwrap_or_default();
    if reason == "ProgressDeadlineExceeded" {
        return;
    }
    if paused && reason != "DeploymentPaused" {
        set_condition(
            status,
            PROGRESSING,
            "Unknown",
            "DeploymentPaused",
            "Deployment is paused",
            now,
        );
    } else if !paused && reason == "DeploymentPaused" {
        set_condition(
            status,
            PROGRESSING,
            "Unknown",
            "DeploymentResumed",
            "Deployment is resumed",
            now,
        );
    }
}

fn has_deadline(deployment: &Deployment) -> bool {
    deadline_seconds(deployment) != i32::MAX
}

fn deadline_seconds(deployment: &Deployment) -> i32 {
    deployment
        .spec
        .as_ref()
        .and_then(|spec| spec.progress_deadline_seconds)
        .unwrap_or(600)
}

pub(super) fn counted(
    deployment: &Deployment,
    sets: &[&ReplicaSet],
    new: Option<&ReplicaSet>,
    known: &DeploymentStatus,
) -> DeploymentStatus {
    let sum = |of: fn(&ReplicaSet) -> i32| sets.iter().map(|set| of(set)).sum::<i32>();
    let positive = |number: i32| (number > 0).then_some(number);
    let available = sum(available);
    DeploymentStatus {
        observed_generation: deployment.metadata.generation,
        replicas: positive(sum(actual)),
        updated_replicas: positive(new.map_or(0, actual)),
        ready_replicas: positive(sum(|set| {
            set.status
                .as_ref()
                .and_then(|status| status.ready_replicas)
                .unwrap_or(0)
        })),
        available_replicas: positive(available),
        unavailable_replicas: positive(sum(spec_replicas) - available),
        terminating_replicas: Some(sum(|set| {
            set.status
                .as_ref()
                .and_then(|status| status.terminating_replicas)
                .unwrap_or(0)
        })),
        collision_count: known.collision_count,
        conditions: known.conditions.clone(),
    }
}

pub(super) fn complete(deployment: &Deployment, status: &DeploymentStatus) -> bool {
    let replicas = wanted(deployment);
    status.updated_replicas.unwrap_or(0) == replicas
        && status.replicas.unwrap_or(0) == replicas
        && status.available_replicas.unwrap_or(0) == replicas
        && status.observed_generation >= deployment.metadata.generation
}

/// Counts and conditions. `scaling`: Progressing stays as it is.
pub(super) fn finish_status(
    deployment: &Deployment,
    sets: &[&ReplicaSet],
    new: Option<&ReplicaSet>,
    known: DeploymentStatus,
    scaling: bool,
    now: Timestamp,
    wake_after: &mut Option<Duration>,
) -> DeploymentStatus {
    let before = deployment.status.clone().unwrap_or_default();
    let mut status = counted(deployment, sets, new, &known);
    let (_, max_unavailable) = fences(deployment);
    if status.available_replicas.unwrap_or(0) >= wanted(deployment) - max_unavailable {
        set_condition(
            &mut status,
            AVAILABLE,
            "True",
            "MinimumReplicasAvailable",
            "Deployment has minimum availability.",
            now,
        );
    } else {
        set_condition(
            &mut status,
            AVAILABLE,
            "False",
            "MinimumReplicasUnavailable",
            "Deployment does not have minimum availability.",
            now,
        );
    }
    if !has_deadline(deployment) {
        status
            .conditions
            .get_or_insert_default()
            .retain(|condition| condition.type_ != PROGRESSING);
    }
    let reason = condition(&status, PROGRESSING)
        .and_then(|condition| condition.reason.clone())
        .unwrap_or_default();
    let settled = status.replicas == status.updated_replicas && reason == "NewReplicaSetAvailable";
    let named = new.map_or_else(
        || format!("Deployment \"{}\"", deployment.name_any()),
        |new| format!("ReplicaSet \"{}\"", new.name_any()),
    );
    if has_deadline(deployment) && !settled && !scaling {
        if complete(deployment, &status) {
            let message = format!("{named} has successfully progressed.");
            set_condition(
                &mut status,
                PROGRESSING,
                "True",
                "NewReplicaSetAvailable",
                &message,
                now,
            );
        } else if progressed(&before, &status) {
            let message = format!("{named} is progressing.");
            renew_condition(&mut status, PROGRESSING, "ReplicaSetUpdated", &message, now);
        } else {
            check_deadline(deployment, &mut status, &named, now, wake_after);
        }
    }
    let failure = sets.iter().find_map(|set| {
        let conditions = set.status.as_ref()?.conditions.as_ref()?;
        conditions
            .iter()
            .find(|condition| condition.type_ == REPLICA_FAILURE && condition.status == "True")
            .cloned()
    });
    match failure {
        Some(failure) => set_condition(
            &mut status,
            REPLICA_FAILURE,
            "True",
            &failure.reason.unwrap_or_default(),
            &failure.message.unwrap_or_default(),
            now,
        ),
        None => status
            .conditions
            .get_or_insert_default()
            .retain(|condition| condition.type_ != REPLICA_FAILURE),
    }
    status
}

fn progressed(before: &DeploymentStatus, after: &DeploymentStatus) -> bool {
    let number = |value: Option<i32>| value.unwrap_or(0);
    let old = |status: &DeploymentStatus| number(status.replicas) - number(status.updated_replicas);
    number(after.updated_replicas) > number(before.updated_replicas)
        || old(after) < old(before)
        || number(after.ready_replicas) > number(before.ready_replicas)
        || number(after.available_replicas) > number(before.available_replicas)
}

fn check_deadline(
    deployment: &Deployment,
    status: &mut DeploymentStatus,
    named: &str,
    now: Timestamp,
    wake_after: &mut Option<Duration>,
) {
    let Some(progressing) = condition(status, PROGRESSING) else {
        return;
    };
    let reason = progressing.reason.as_deref().unwrap_or_default();
    let paused = deployment
        .spec
        .as_ref()
        .and_then(|spec| spec.paused)
        .unwrap_or(false);
    if reason == "ProgressDeadlineExceeded" || reason == "NewReplicaSetAvailable" || paused {
        return;
    }
    let from = progressing.last_update_time.as_ref().map_or(now, |time| time.0);
    let deadline = from + Duration::from_secs(deadline_seconds(deployment).max(0).unsigned_abs().into());
    if now > deadline {
        let message = format!("{named} has timed out progressing.");
        set_condition(
            status,
            PROGRESSING,
            "False",
            "ProgressDeadlineExceeded",
            &message,
            now,
        );
    } else {
        // Times are stored in seconds: a second later it has passed for sure.
        let left = Duration::try_from(deadline.duration_since(now)).unwrap_or_default();
        *wake_after = Some(left + Duration::from_secs(1));
    }
}

pub(super) fn condition<'a>(status: &'a DeploymentStatus, type_: &str) -> Option<&'a DeploymentCondition> {
    status
        .conditions
        .iter()
        .flatten()
        .find(|condition| condition.type_ == type_)
}

fn seconds(now: Timestamp) -> Time {
    Time(Timestamp::from_second(now.as_second()).unwrap_or(now))
}

/// Sets a condition unless status and reason are the same already, as Kubernetes does.
fn set_condition(
    status: &mut DeploymentStatus,
    type_: &str,
    value: &str,
    reason: &str,
    message: &str,
    now: Timestamp,
) {
    let same = condition(status, type_)
        .is_some_and(|known| known.status == value && known.reason.as_deref() == Some(reason));
    if !same {
        replace_condition(status, type_, value, reason, message, now);
    }
}

/// Sets Progressing=True again although it is so: its update time is what the deadline counts from.
fn renew_condition(status: &mut DeploymentStatus, type_: &str, reason: &str, message: &str, now: Timestamp) {
    replace_condition(status, type_, "True", reason, message, now);
}

fn replace_condition(
    status: &mut DeploymentStatus,
    type_: &str,
    value: &str,
    reason: &str,
    message: &str,
    now: Timestamp,
) {
    let since = condition(status, type_)
        .filter(|known| known.status == value)
        .and_then(|known| known.last_transition_time.clone())
        .unwrap_or_else(|| seconds(now));
    let conditions = status.conditions.get_or_insert_default();
    conditions.retain(|condition| condition.type_ != type_);
    conditions.push(DeploymentCondition {
        type_: type_.to_owned(),
        status: value.to_owned(),
        reason: Some(reason.to_owned()),
        message: Some(message.to_owned()),
        last_transition_time: Some(since),
        last_update_time: Some(seconds(now)),
    });
}
