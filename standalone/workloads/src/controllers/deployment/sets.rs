//! What a step does to ReplicaSets: a new one, sizes, revisions and annotations, old ones beyond the limit. Pure.

use std::collections::BTreeMap;

use jiff::Timestamp;
use k8s_openapi::api::apps::v1::{Deployment, DeploymentStatus, ReplicaSet, ReplicaSetSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta};
use kube::{Resource, ResourceExt};

use super::Action;
use super::status::note_created;
use crate::controllers::rollout::{
    DESIRED_REPLICAS, MAX_REPLICAS, REVISION, REVISION_HISTORY, actual, fences, grow_new, spec_replicas,
    wanted,
};
use crate::controllers::template::{self, HASH_LABEL};

/// Annotations that are not copied to ReplicaSets.
const NOT_COPIED: [&str; 6] = [
    "kubectl.kubernetes.io/last-applied-configuration",
    REVISION,
    REVISION_HISTORY,
    DESIRED_REPLICAS,
    MAX_REPLICAS,
    "deprecated.deployment.rollback.to",
];

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

pub(super) fn outdated(deployment: &Deployment, set: &ReplicaSet) -> bool {
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

pub(super) fn resize(deployment: &Deployment, set: &ReplicaSet, size: i32, actions: &mut Vec<Action>) {
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
pub(super) fn adjust_new(
    deployment: &Deployment,
    new: &ReplicaSet,
    old: &[&ReplicaSet],
    actions: &mut Vec<Action>,
) {
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

pub(super) fn create_new(
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
    note_created(deployment, &name, status, now);
}

/// Old ReplicaSets beyond `revisionHistoryLimit`, oldest revision first.
pub(super) fn clean_up(deployment: &Deployment, old: &[&ReplicaSet], actions: &mut Vec<Action>) {
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
