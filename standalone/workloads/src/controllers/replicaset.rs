//! What a ReplicaSet does next: pure.

use std::cmp::Ordering;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::apps::v1::{ReplicaSet, ReplicaSetCondition, ReplicaSetStatus};
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::ResourceExt;

use super::rollout::spec_replicas;
use super::template::{is_active, is_done, ready_since};

/// The annotation that says which pods to delete first: lower goes first.
const DELETION_COST: &str = "controller.kubernetes.io/pod-deletion-cost";
/// Most pods created or deleted in one step; Kubernetes' burst.
const BURST: usize = 500;

/// See the module.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Decision {
    /// How many pods to create.
    pub(crate) create: usize,
    /// Names of pods to delete, first to go first.
    pub(crate) delete: Vec<String>,
    pub(crate) status: ReplicaSetStatus,
    pub(crate) wake_after: Option<Duration>,
}

/// Decides one step. `pods` are those that it controls; `failure` is why the last step did not work (reason, message).
pub(crate) fn decide(
    set: &ReplicaSet,
    pods: &[&Pod],
    failure: Option<(&str, &str)>,
    now: Timestamp,
) -> Decision {
    let mut decision = Decision::default();
    let active: Vec<&Pod> = pods.iter().copied().filter(|pod| is_active(pod)).collect();
    let wanted = usize::try_from(spec_replicas(set)).unwrap_or(0);
    if set.metadata.deletion_timestamp.is_none() {
        if active.len() < wanted {
            decision.create = (wanted - active.len()).min(BURST);
        } else if active.len() > wanted {
            let mut ranked = active.clone();
            ranked.sort_by(|a, b| compare(a, b));
            decision.delete = ranked
                .iter()
                .take((active.len() - wanted).min(BURST))
                .map(|pod| pod.name_any())
                .collect();
        }
    }
    let min_ready = Duration::from_secs(
        set.spec
            .as_ref()
            .and_then(|spec| spec.min_ready_seconds)
            .unwrap_or(0)
            .max(0)
            .unsigned_abs()
            .into(),
    );
    let labels = set
        .spec
        .as_ref()
        .and_then(|spec| spec.template.as_ref()?.metadata.as_ref()?.labels.clone())
        .unwrap_or_default();
    let (mut ready, mut available) = (0, 0);
    for since in active.iter().filter_map(|pod| ready_since(pod)) {
        ready += 1;
        let at = since + min_ready;
        if min_ready.is_zero() || at <= now {
            available += 1;
        } else {
            // Times are in whole seconds.
            let left = Duration::try_from(at.duration_since(now)).unwrap_or_default();
            decision.wake_after = Some(
                decision
                    .wake_after
                    .map_or(left, |known: Duration| known.min(left)),
            );
        }
    }
    let fully = active
        .iter()
        .filter(|pod| {
            labels
                .iter()
                .all(|(key, value)| pod.labels().get(key) == Some(value))
        })
        .count();
    let positive = |number: usize| (number > 0).then_some(number as i32);
    let terminating = pods
        .iter()
        .filter(|pod| pod.metadata.deletion_timestamp.is_some() && !is_done(pod))
        .count();
    let before = set.status.clone().unwrap_or_default();
    decision.status = ReplicaSetStatus {
        replicas: active.len() as i32,
        fully_labeled_replicas: positive(fully),
        ready_replicas: positive(ready),
        available_replicas: positive(available),
        terminating_replicas: Some(terminating as i32),
        observed_generation: set.metadata.generation,
        conditions: conditions(before.conditions, failure, now),
    };
    decision
}

fn conditions(
    known: Option<Vec<ReplicaSetCondition>>,
    failure: Option<(&str, &str)>,
    now: Timestamp,
) -> Option<Vec<ReplicaSetCondition>> {
    let mut conditions = known.unwrap_or_default();
    match failure {
        None => conditions.retain(|condition| condition.type_ != "ReplicaFailure"),
        Some((reason, message)) => {
            if !conditions
                .iter()
                .any(|condition| condition.type_ == "ReplicaFailure" && condition.status == "True")
            {
                conditions.push(ReplicaSetCondition {
                    type_: "ReplicaFailure".to_owned(),
                    status: "True".to_owned(),
                    reason: Some(reason.to_owned()),
                    message: Some(message.to_owned()),
                    last_transition_time: Some(Time(Timestamp::from_second(now.as_second()).unwrap_or(now))),
                });
            }
        }
    }
    (!conditions.is_empty()).then_some(conditions)
}

/// Kubernetes' order of deletion: unassigned, pending, not ready, cheap, recently ready, often restarted, young.
fn compare(a: &Pod, b: &Pod) -> Ordering {
    let assigned = |pod: &Pod| {
        pod.spec
            .as_ref()
            .and_then(|spec| spec.node_name.as_ref())
            .is_some()
    };
    let phase = |pod: &Pod| match pod.status.as_ref().and_then(|status| status.phase.as_deref()) {
        Some("Running") => 2,
        Some("Unknown") => 1,
        _ => 0,
    };
    let cost = |pod: &Pod| {
        pod.annotations()
            .get(DELETION_COST)
            .and_then(|cost| cost.parse::<i32>().ok())
            .unwrap_or(0)
    };
    let restarts = |pod: &Pod| {
        let statuses = pod
            .status
            .iter()
            .flat_map(|status| status.container_statuses.iter().flatten());
        statuses.map(|status| status.restart_count).max().unwrap_or(0)
    };
    let created = |pod: &Pod| pod.creation_timestamp().map(|time| time.0);
    assigned(a)
        .cmp(&assigned(b))
        .then_with(|| phase(a).cmp(&phase(b)))
        .then_with(|| ready_since(a).is_some().cmp(&ready_since(b).is_some()))
        .then_with(|| cost(a).cmp(&cost(b)))
        .then_with(|| ready_since(b).cmp(&ready_since(a)))
        .then_with(|| restarts(b).cmp(&restarts(a)))
        .then_with(|| created(b).cmp(&created(a)))
        .then_with(|| a.name_any().cmp(&b.name_any()))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn set(replicas: i32, min_ready: i32) -> ReplicaSet {
        serde_json::from_value(
            json!({"metadata": {"name": "s", "generation": 3}, "spec": {"replicas": replicas, "selector": {},
            "minReadySeconds": min_ready, "template": {"metadata": {"labels": {"app": "x"}}}}}),
        )
        .unwrap()
    }

    fn pod(name: &str, value: serde_json::Value) -> Pod {
        let mut object =
            json!({"metadata": {"name": name, "labels": {"app": "x"}}, "spec": {"containers": []}});
        fn merge(into: &mut serde_json::Value, from: serde_json::Value) {
            match (into, from) {
                (serde_json::Value::Object(into), serde_json::Value::Object(from)) => {
                    for (key, value) in from {
                        merge(into.entry(key).or_insert(serde_json::Value::Null), value);
                    }
                }
                (into, from) => *into = from,
            }
        }
        merge(&mut object, value);
        serde_json::from_value(object).unwrap()
    }

    fn ready(name: &str, since: &str) -> Pod {
        pod(
            name,
            json!({"spec": {"nodeName": "n"}, "status": {"phase": "Running",
            "conditions": [{"type": "Ready", "status": "True", "lastTransitionTime": since}]}}),
        )
    }

    fn now() -> Timestamp {
        "2026-01-01T00:01:00Z".parse().unwrap()
    }

    #[test]
    fn missing_pods_are_created_and_completed_or_terminating_ones_do_not_count() {
        let pods = [
            pod("a", json!({})),
            pod("done", json!({"status": {"phase": "Failed"}})),
            pod(
                "going",
                json!({"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}}),
            ),
        ];
        let decision = decide(&set(3, 0), &pods.iter().collect::<Vec<_>>(), None, now());
        assert_eq!((decision.create, decision.delete.len()), (2, 0));
        assert_eq!(decision.status.replicas, 1);
        assert_eq!(decision.status.terminating_replicas, Some(1));
        assert_eq!(decision.status.observed_generation, Some(3));
    }

    #[test]
    fn the_least_useful_pods_are_deleted_first() {
        let pods = [
            ready("old", "2026-01-01T00:00:01Z"),
            ready("recent", "2026-01-01T00:00:30Z"),
            pod(
                "pending",
                json!({"spec": {"nodeName": "n"}, "status": {"phase": "Pending"}}),
            ),
            pod("unassigned", json!({"status": {"phase": "Pending"}})),
            pod(
                "unready",
                json!({"spec": {"nodeName": "n"}, "status": {"phase": "Running"}}),
            ),
        ];
        let decision = decide(&set(1, 0), &pods.iter().collect::<Vec<_>>(), None, now());
        assert_eq!(decision.delete, ["unassigned", "pending", "unready", "recent"]);
    }

    #[test]
    fn availability_waits_for_min_ready_seconds_and_wakes_for_it() {
        let pods = [
            ready("a", "2026-01-01T00:00:55Z"),
            ready("b", "2026-01-01T00:00:01Z"),
        ];
        let decision = decide(&set(2, 10), &pods.iter().collect::<Vec<_>>(), None, now());
        assert_eq!(
            (decision.status.ready_replicas, decision.status.available_replicas),
            (Some(2), Some(1))
        );
        assert_eq!(decision.wake_after, Some(Duration::from_secs(5)));
    }

    #[test]
    fn a_failure_to_create_is_a_condition_until_it_is_over() {
        let mut set = set(1, 0);
        let decision = decide(&set, &[], Some(("FailedCreate", "quota")), now());
        let condition = &decision.status.conditions.as_ref().unwrap()[0];
        assert_eq!(
            (condition.type_.as_str(), condition.message.as_deref()),
            ("ReplicaFailure", Some("quota"))
        );
        set.status = Some(decision.status);
        assert_eq!(decide(&set, &[], None, now()).status.conditions, None);
    }
}
