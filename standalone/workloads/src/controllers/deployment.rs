//! What a Deployment does next: pure. One decision is one step of Kubernetes' deployment controller; the step's
//! effects come back as events and lead to the next.

use std::collections::BTreeMap;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::apps::v1::{
    Deployment, DeploymentCondition, DeploymentStatus, ReplicaSet, ReplicaSetSpec,
};
use k8s_openapi::api::core::v1::{Pod, PodTemplateSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta, Time};
use kube::{Resource, ResourceExt};

use super::rollout::{
    DESIRED_REPLICAS, MAX_REPLICAS, REVISION, REVISION_HISTORY, actual, available, fences, grow_new,
    is_recreate, number, proportional, shrink_old, spec_replicas, wanted,
};
use super::template::{self, HASH_LABEL};

/// Annotations that are not copied to ReplicaSets.
const NOT_COPIED: [&str; 6] = [
    "kubectl.kubernetes.io/last-applied-configuration",
    REVISION,
    REVISION_HISTORY,
    DESIRED_REPLICAS,
    MAX_REPLICAS,
    "deprecated.deployment.rollback.to",
];

/// What the decision looks at.
pub(crate) struct Observed<'a> {
    pub(crate) deployment: &'a Deployment,
    /// The ReplicaSets that it controls.
    pub(crate) sets: &'a [&'a ReplicaSet],
    /// Pods that the old ReplicaSets still have, for Recreate: anything not completed.
    pub(crate) old_pods: &'a dyn Fn(&ReplicaSet) -> Vec<&'a Pod>,
}

/// A write.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Action {
    Create(Box<ReplicaSet>),
    /// Set size and annotations of the ReplicaSet of this name.
    Update {
        name: String,
        replicas: Option<(i32, i32)>,
        annotations: BTreeMap<String, String>,
        min_ready_seconds: Option<i32>,
    },
    Delete(String),
    /// The Deployment's own revision annotation.
    SetRevision(String),
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Decision {
    pub(crate) actions: Vec<Action>,
    pub(crate) status: DeploymentStatus,
    pub(crate) wake_after: Option<Duration>,
}

const PROGRESSING: &str = "Progressing";
const AVAILABLE: &str = "Available";
const REPLICA_FAILURE: &str = "ReplicaFailure";

/// Decides one step.
pub(crate) fn decide(observed: &Observed<'_>, now: Timestamp) -> Decision {
    let deployment = observed.deployment;
    let spec = deployment.spec.as_ref();
    let mut status = deployment.status.clone().unwrap_or_default();
    let mut decision = Decision::default();
    let Some(template) = spec.map(|spec| &spec.template) else {
        return decision;
    };
    let mut sets: Vec<&ReplicaSet> = observed.sets.to_vec();
    sets.sort_by(|a, b| {
        let created = |set: &ReplicaSet| set.creation_timestamp().map(|time| time.0);
        created(a)
            .cmp(&created(b))
            .then_with(|| a.name_any().cmp(&b.name_any()))
    });
    let new = sets
        .iter()
        .copied()
        .find(|set| template_of(set).is_some_and(|own| template::equal(own, template)));
    let old: Vec<&ReplicaSet> = sets
        .iter()
        .copied()
        .filter(|set| new.is_none_or(|new| new.name_any() != set.name_any()))
        .collect();

    if deployment.metadata.deletion_timestamp.is_some() {
        decision.status = finish_status(
            deployment,
            &sets,
            new,
            status,
            false,
            now,
            &mut decision.wake_after,
        );
        return decision;
    }
    let paused = spec.and_then(|spec| spec.paused).unwrap_or(false);
    note_pause(deployment, paused, &mut status, now);
    let scaling = sets
        .iter()
        .filter(|set| spec_replicas(set) > 0)
        .any(|set| number(set, DESIRED_REPLICAS).is_some_and(|desired| desired != wanted(deployment)));
    if paused || scaling {
        if let Some(new) = new {
            adjust_new(deployment, new, &old, &mut decision.actions);
        }
        scale(deployment, &sets, new, &old, &mut decision.actions);
        if paused {
            clean_up(deployment, &old, &mut decision.actions);
        }
        decision.status = finish_status(
            deployment,
            &sets,
            new,
            status,
            true,
            now,
            &mut decision.wake_after,
        );
        return decision;
    }
    if is_recreate(deployment) {
        recreate(observed, new, &old, &mut status, &mut decision.actions, now);
    } else {
        roll(
            deployment,
            &sets,
            new,
            &old,
            &mut status,
            &mut decision.actions,
            now,
        );
    }
    if complete(deployment, &counted(deployment, &sets, new, &status)) {
        clean_up(deployment, &old, &mut decision.actions);
    }
    decision.status = finish_status(
        deployment,
        &sets,
        new,
        status,
        false,
        now,
        &mut decision.wake_after,
    );
    decision
}

fn template_of(set: &ReplicaSet) -> Option<&PodTemplateSpec> {
    set.spec.as_ref()?.template.as_ref()
}

fn roll(
    deployment: &Deployment,
    sets: &[&ReplicaSet],
    new: Option<&ReplicaSet>,
    old: &[&ReplicaSet],
    status: &mut DeploymentStatus,
    actions: &mut Vec<Action>,
    now: Timestamp,
) {
    let Some(new) = new else {
        create_new(deployment, sets, old, status, actions, now);
        return;
    };
    note_found(deployment, new, status, now);
    let size = grow_new(deployment, new, sets);
    if size != spec_replicas(new) {
        adjust_new(deployment, new, old, actions);
        resize(deployment, new, size, actions);
        return;
    }
    adjust_new(deployment, new, old, actions);
    for (position, size) in shrink_old(deployment, old, new) {
        resize(deployment, old[position], size, actions);
    }
}

fn recreate(
    observed: &Observed<'_>,
    new: Option<&ReplicaSet>,
    old: &[&ReplicaSet],
    status: &mut DeploymentStatus,
    actions: &mut Vec<Action>,
    now: Timestamp,
) {
    let deployment = observed.deployment;
    let active: Vec<&ReplicaSet> = old.iter().copied().filter(|set| spec_replicas(set) > 0).collect();
    if !active.is_empty() {
        for set in active {
            resize(deployment, set, 0, actions);
        }
        return;
    }
    if old
        .iter()
        .any(|set| (observed.old_pods)(set).iter().any(|pod| !template::is_done(pod)))
    {
        return;
    }
    match new {
        None => create_new(deployment, observed.sets, old, status, actions, now),
        Some(new) => {
            note_found(deployment, new, status, now);
            adjust_new(deployment, new, old, actions);
            if spec_replicas(new) != wanted(deployment) {
                resize(deployment, new, wanted(deployment), actions);
            }
        }
    }
}

/// Sizes when the number of replicas changed, or the Deployment is paused: no new template is rolled out.
fn scale(
    deployment: &Deployment,
    sets: &[&ReplicaSet],
    new: Option<&ReplicaSet>,
    old: &[&ReplicaSet],
    actions: &mut Vec<Action>,
) {
    let active: Vec<&ReplicaSet> = sets
        .iter()
        .copied()
        .filter(|set| spec_replicas(set) > 0)
        .collect();
    let only = match active.as_slice() {
        [] => new.or_else(|| old.last().copied()),
        [only] => Some(*only),
        _ => None,
    };
    if let Some(only) = only {
        if spec_replicas(only) != wanted(deployment) || outdated(deployment, only) {
            resize(deployment, only, wanted(deployment), actions);
        }
        return;
    }
    let saturated = new.is_some_and(|new| {
        spec_replicas(new) == wanted(deployment)
            && number(new, DESIRED_REPLICAS) == Some(wanted(deployment))
            && available(new) == wanted(deployment)
    });
    if saturated {
        for set in old.iter().filter(|set| spec_replicas(set) > 0) {
            resize(deployment, set, 0, actions);
        }
        return;
    }
    if !is_recreate(deployment) {
        for (position, size) in proportional(deployment, &active) {
            resize(deployment, active[position], size, actions);
        }
    }
}

fn size_annotations(deployment: &Deployment) -> BTreeMap<String, String> {
    let replicas = wanted(deployment);
    BTreeMap::from([
        (DESIRED_REPLICAS.to_owned(), replicas.to_string()),
        (
            MAX_REPLICAS.to_owned(),
            (replicas + fences(deployment).0).to_string(),
        ),
    ])
}

fn outdated(deployment: &Deployment, set: &ReplicaSet) -> bool {
    size_annotations(deployment)
        .iter()
        .any(|(key, value)| set.annotations().get(key) != Some(value))
}

/// One update per ReplicaSet and step: sizes and annotations together.
fn update(actions: &mut Vec<Action>, set: &ReplicaSet) -> usize {
    let name = set.name_any();
    if let Some(position) = actions
        .iter()
        .position(|action| matches!(action, Action::Update { name: known, .. } if *known == name))
    {
        return position;
    }
    actions.push(Action::Update {
        name,
        replicas: None,
        annotations: BTreeMap::new(),
        min_ready_seconds: None,
    });
    actions.len() - 1
}

fn resize(deployment: &Deployment, set: &ReplicaSet, size: i32, actions: &mut Vec<Action>) {
    if size == spec_replicas(set) && !outdated(deployment, set) {
        return;
    }
    let position = update(actions, set);
    if let Action::Update {
        replicas,
        annotations,
        ..
    } = &mut actions[position]
    {
        *replicas = (size != spec_replicas(set)).then_some((spec_replicas(set), size));
        annotations.extend(size_annotations(deployment));
    }
}

fn next_revision(old: &[&ReplicaSet]) -> i64 {
    old.iter()
        .filter_map(|set| set.annotations().get(REVISION)?.parse::<i64>().ok())
        .max()
        .unwrap_or(0)
        + 1
}

fn copied(deployment: &Deployment) -> BTreeMap<String, String> {
    deployment
        .annotations()
        .iter()
        .filter(|(key, _)| !NOT_COPIED.contains(&key.as_str()))
        .map(|(key, value)| (key.clone(), value.clone()))
        .collect()
}

/// Revision, copied annotations and minReadySeconds of the current ReplicaSet; the Deployment's own revision.
fn adjust_new(deployment: &Deployment, new: &ReplicaSet, old: &[&ReplicaSet], actions: &mut Vec<Action>) {
    let mut changes: BTreeMap<String, String> = copied(deployment)
        .into_iter()
        .filter(|(key, value)| new.annotations().get(key) != Some(value))
        .collect();
    let next = next_revision(old);
    let known = new.annotations().get(REVISION);
    let current = known
        .and_then(|revision| revision.parse::<i64>().ok())
        .unwrap_or(0);
    let revision = current.max(next);
    if current < next {
        changes.insert(REVISION.to_owned(), next.to_string());
        if let Some(known) = known.filter(|known| !known.is_empty()) {
            let history = new.annotations().get(REVISION_HISTORY);
            let history = history.map_or_else(|| known.clone(), |history| format!("{history},{known}"));
            changes.insert(REVISION_HISTORY.to_owned(), history);
        }
    }
    let min_ready = deployment
        .spec
        .as_ref()
        .and_then(|spec| spec.min_ready_seconds)
        .unwrap_or(0);
    let own_min_ready = new
        .spec
        .as_ref()
        .and_then(|spec| spec.min_ready_seconds)
        .unwrap_or(0);
    if !changes.is_empty() || min_ready != own_min_ready {
        let position = update(actions, new);
        if let Action::Update {
            annotations,
            min_ready_seconds,
            ..
        } = &mut actions[position]
        {
            annotations.extend(changes);
            *min_ready_seconds = (min_ready != own_min_ready).then_some(min_ready);
        }
    }
    set_revision(deployment, revision, actions);
}

fn set_revision(deployment: &Deployment, revision: i64, actions: &mut Vec<Action>) {
    let revision = revision.to_string();
    if deployment.annotations().get(REVISION) != Some(&revision) {
        actions.push(Action::SetRevision(revision));
    }
}

fn create_new(
    deployment: &Deployment,
    sets: &[&ReplicaSet],
    old: &[&ReplicaSet],
    status: &mut DeploymentStatus,
    actions: &mut Vec<Action>,
    now: Timestamp,
) {
    let Some(spec) = &deployment.spec else { return };
    // A ReplicaSet of this name with another template: count up until the name is free.
    let mut hash = template::hash(&spec.template, status.collision_count);
    let mut name = format!("{}-{hash}", deployment.name_any());
    while sets.iter().any(|set| set.name_any() == name) {
        status.collision_count = Some(status.collision_count.unwrap_or(0) + 1);
        hash = template::hash(&spec.template, status.collision_count);
        name = format!("{}-{hash}", deployment.name_any());
    }
    let mut template = spec.template.clone();
    let metadata = template.metadata.get_or_insert_default();
    metadata
        .labels
        .get_or_insert_default()
        .insert(HASH_LABEL.to_owned(), hash.clone());
    let labels = metadata.labels.clone();
    let mut selector: LabelSelector = spec.selector.clone();
    selector
        .match_labels
        .get_or_insert_default()
        .insert(HASH_LABEL.to_owned(), hash);
    let revision = next_revision(old);
    let mut annotations = copied(deployment);
    annotations.extend(size_annotations(deployment));
    annotations.insert(REVISION.to_owned(), revision.to_string());
    let mut set = ReplicaSet {
        metadata: ObjectMeta {
            name: Some(name.clone()),
            namespace: deployment.namespace(),
            labels,
            annotations: Some(annotations),
            owner_references: deployment.controller_owner_ref(&()).map(|owner| {
                vec![k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference {
                    block_owner_deletion: Some(true),
                    ..owner
                }]
            }),
            ..ObjectMeta::default()
        },
        spec: Some(ReplicaSetSpec {
            replicas: Some(0),
            selector,
            template: Some(template),
            min_ready_seconds: spec.min_ready_seconds,
        }),
        status: None,
    };
    let mut all: Vec<&ReplicaSet> = sets.to_vec();
    let counted = set.clone();
    all.push(&counted);
    let size = grow_new(deployment, &counted, &all);
    if let Some(spec) = &mut set.spec {
        spec.replicas = Some(size);
    }
    actions.push(Action::Create(Box::new(set)));
    set_revision(deployment, revision, actions);
    if has_deadline(deployment) {
        let message = format!("Created new replica set \"{name}\"");
        set_condition(status, PROGRESSING, "True", "NewReplicaSetCreated", &message, now);
    }
}

fn note_found(deployment: &Deployment, new: &ReplicaSet, status: &mut DeploymentStatus, now: Timestamp) {
    if has_deadline(deployment) && condition(status, PROGRESSING).is_none() {
        let message = format!("Found new replica set \"{}\"", new.name_any());
        set_condition(status, PROGRESSING, "True", "FoundNewReplicaSet", &message, now);
    }
}

fn note_pause(deployment: &Deployment, paused: bool, status: &mut DeploymentStatus, now: Timestamp) {
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

/// Old ReplicaSets beyond `revisionHistoryLimit`, oldest revision first.
fn clean_up(deployment: &Deployment, old: &[&ReplicaSet], actions: &mut Vec<Action>) {
    let Some(limit) = deployment
        .spec
        .as_ref()
        .and_then(|spec| spec.revision_history_limit)
    else {
        return;
    };
    let mut old: Vec<&&ReplicaSet> = old
        .iter()
        .filter(|set| set.metadata.deletion_timestamp.is_none())
        .collect();
    let surplus = old.len().saturating_sub(usize::try_from(limit).unwrap_or(0));
    old.sort_by_key(|set| {
        set.annotations()
            .get(REVISION)
            .and_then(|r| r.parse::<i64>().ok())
            .unwrap_or(0)
    });
    for set in old.into_iter().take(surplus) {
        let settled =
            set.status.as_ref().and_then(|status| status.observed_generation) >= set.metadata.generation;
        if actual(set) == 0 && spec_replicas(set) == 0 && settled {
            actions.push(Action::Delete(set.name_any()));
        }
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

fn counted(
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

fn complete(deployment: &Deployment, status: &DeploymentStatus) -> bool {
    let replicas = wanted(deployment);
    status.updated_replicas.unwrap_or(0) == replicas
        && status.replicas.unwrap_or(0) == replicas
        && status.available_replicas.unwrap_or(0) == replicas
        && status.observed_generation >= deployment.metadata.generation
}

/// Counts and conditions. `scaling`: Progressing stays as it is.
fn finish_status(
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

fn condition<'a>(status: &'a DeploymentStatus, type_: &str) -> Option<&'a DeploymentCondition> {
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

#[cfg(test)]
mod tests;
