//! What a Deployment does next: pure. One decision is one step of Kubernetes' deployment controller; the step's
//! effects come back as events and lead to the next. Here is which step it is; [`sets`] writes ReplicaSets, [`status`] tells.

mod sets;
mod status;

use std::collections::BTreeMap;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::apps::v1::{Deployment, DeploymentStatus, ReplicaSet};
use k8s_openapi::api::core::v1::{Pod, PodTemplateSpec};
use kube::ResourceExt;

use super::rollout::{
    DESIRED_REPLICAS, available, grow_new, is_recreate, number, proportional, shrink_old, spec_replicas,
    wanted,
};
use super::template;
use sets::{adjust_new, clean_up, create_new, outdated, resize};
use status::{complete, counted, finish_status, note_found, note_pause};

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

#[cfg(test)]
mod tests;
