//! Binds pods to the node. There is one; what a scheduler decides here is whether a pod may run there at all.

use k8s_openapi::api::core::v1::{Binding, Node, ObjectReference, Pod, PodCondition};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use kube::api::{Patch, PatchParams, PostParams};
use kube::{Api, Resource, ResourceExt};
use serde_json::json;
use serin_kit::events::Recorder;
use tokio_util::sync::CancellationToken;

use super::Shared;
use super::queue::Queue;
use crate::Error;
use crate::mirror::{Change, Key, key};

/// The scheduler that pods name by default.
const NAME: &str = "default-scheduler";

struct Scheduler {
    shared: Shared,
    recorder: Recorder,
}

/// Whether a pod waits for this scheduler.
fn is_waiting(pod: &Pod) -> bool {
    let Some(spec) = &pod.spec else { return false };
    spec.node_name.as_deref().unwrap_or_default().is_empty()
        && pod.metadata.deletion_timestamp.is_none()
        && spec.scheduler_name.as_deref().unwrap_or(NAME) == NAME
        && spec.scheduling_gates.as_ref().is_none_or(Vec::is_empty)
        && !matches!(
            pod.status.as_ref().and_then(|status| status.phase.as_deref()),
            Some("Succeeded" | "Failed")
        )
}

/// The node for a pod, or why there is none, in kube-scheduler's words.
fn choose<'a>(pod: &Pod, nodes: &'a [std::sync::Arc<Node>]) -> Result<&'a Node, String> {
    let (mut unready, mut unschedulable, mut mismatched) = (0, 0, 0);
    for node in nodes {
        let ready = node
            .status
            .iter()
            .flat_map(|status| status.conditions.iter().flatten())
            .any(|condition| condition.type_ == "Ready" && condition.status == "True");
        let wanted = pod.spec.as_ref().and_then(|spec| spec.node_selector.as_ref());
        let matches = wanted.is_none_or(|wanted| {
            wanted
                .iter()
                .all(|(key, value)| node.labels().get(key) == Some(value))
        });
        if !ready {
            unready += 1;
        } else if node
            .spec
            .as_ref()
            .and_then(|spec| spec.unschedulable)
            .unwrap_or(false)
        {
            unschedulable += 1;
        } else if !matches {
            mismatched += 1;
        } else {
            return Ok(node);
        }
    }
    let reasons: Vec<String> = [
        (mismatched, "node(s) didn't match Pod's node affinity/selector"),
        (unready, "node(s) were not ready"),
        (unschedulable, "node(s) were unschedulable"),
    ]
    .iter()
    .filter(|(count, _)| *count > 0)
    .map(|(count, reason)| format!("{count} {reason}"))
    .collect();
    Err(if nodes.is_empty() {
        "no nodes available to schedule pods".to_owned()
    } else {
        format!("0/{} nodes are available: {}.", nodes.len(), reasons.join(", "))
    })
}

pub(crate) async fn run(shared: Shared, recorder: Recorder, cancel: CancellationToken) {
    let mut pods = shared.pods.changes();
    let mut nodes = shared.nodes.changes();
    let scheduler = Scheduler { shared, recorder };
    let mut queue = Queue::default();
    queue.add_all(scheduler.waiting());
    loop {
        while !cancel.is_cancelled()
            && let Some(key) = queue.pop()
        {
            let outcome = scheduler.schedule(&key).await.map(|()| None);
            queue.settle(key, "schedule a pod", outcome);
        }
        tokio::select! {
            () = cancel.cancelled() => return,
            () = queue.wait() => {}
            change = pods.next() => match change {
                Change::Applied(pod) if is_waiting(&pod) && !already_refused(&pod) => queue.add(key(pod.as_ref())),
                Change::Applied(_) | Change::Deleted(_) => {}
                Change::Resync => queue.add_all(scheduler.waiting()),
            },
            // A node that became ready, or got a label, may take who waits.
            _ = nodes.next() => queue.add_all(scheduler.waiting()),
        }
    }
}

/// Whether the refusal was written already; looking again would only repeat it. A change of the nodes looks again.
fn already_refused(pod: &Pod) -> bool {
    pod.status
        .iter()
        .flat_map(|status| status.conditions.iter().flatten())
        .any(|condition| {
            condition.type_ == "PodScheduled" && condition.reason.as_deref() == Some("Unschedulable")
        })
}

impl Scheduler {
    fn waiting(&self) -> Vec<Key> {
        self.shared
            .pods
            .all()
            .iter()
            .filter(|pod| is_waiting(pod))
            .map(|pod| key(pod.as_ref()))
            .collect()
    }

    async fn schedule(&self, key: &Key) -> Result<(), Error> {
        let Some(pod) = self.shared.pods.get(&key.0, &key.1).filter(|pod| is_waiting(pod)) else {
            return Ok(());
        };
        let api: Api<Pod> = Api::namespaced(self.shared.client.clone(), &key.0);
        let about = pod.object_ref(&());
        let nodes = self.shared.nodes.all();
        match choose(&pod, &nodes) {
            Ok(node) => {
                let node = node.name_any();
                let binding = Binding {
                    metadata: ObjectMeta {
                        name: Some(key.1.clone()),
                        namespace: Some(key.0.clone()),
                        uid: pod.uid(),
                        ..ObjectMeta::default()
                    },
                    target: ObjectReference {
                        api_version: Some("v1".to_owned()),
                        kind: Some("Node".to_owned()),
                        name: Some(node.clone()),
                        ..ObjectReference::default()
                    },
                };
                let result: Result<serde_json::Value, kube::Error> = api
                    .create_subresource("binding", &key.1, &PostParams::default(), &binding)
                    .await;
                match result {
                    Ok(_) => {
                        let note = format!("Successfully assigned {}/{} to {node}", key.0, key.1);
                        self.recorder.normal(&about, "Scheduled", "Binding", &note);
                        Ok(())
                    }
                    // Bound by somebody else, or gone.
                    Err(kube::Error::Api(status)) if status.code == 409 || status.code == 404 => Ok(()),
                    Err(error) => Err(Error::api(format!("bind pod {}/{}", key.0, key.1), error)),
                }
            }
            Err(reason) => self.refuse(&pod, &api, &reason).await,
        }
    }

    async fn refuse(&self, pod: &Pod, api: &Api<Pod>, reason: &str) -> Result<(), Error> {
        let same = pod
            .status
            .iter()
            .flat_map(|status| status.conditions.iter().flatten())
            .any(|condition| {
                condition.type_ == "PodScheduled" && condition.message.as_deref() == Some(reason)
            });
        if same {
            return Ok(());
        }
        self.recorder
            .warning(&pod.object_ref(&()), "FailedScheduling", "Scheduling", reason);
        let condition = PodCondition {
            type_: "PodScheduled".to_owned(),
            status: "False".to_owned(),
            reason: Some("Unschedulable".to_owned()),
            message: Some(reason.to_owned()),
            last_transition_time: Some(Time(jiff::Timestamp::now())),
            ..PodCondition::default()
        };
        // With the version that was looked at: whoever has bound it meanwhile must not be told the opposite.
        let patch = json!({"metadata": {"uid": pod.uid(), "resourceVersion": pod.resource_version()},
                           "status": {"conditions": [condition]}});
        let written = api
            .patch_status(
                &pod.name_any(),
                &PatchParams::default(),
                &Patch::Strategic(&patch),
            )
            .await
            .map_err(|error| Error::api(format!("write the status of pod {}", pod.name_any()), error))?;
        self.shared.pods.note(written);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    fn node(ready: bool, labels: serde_json::Value) -> Arc<Node> {
        Arc::new(
            serde_json::from_value(json!({"metadata": {"name": "n", "labels": labels},
                "status": {"conditions": [{"type": "Ready", "status": if ready { "True" } else { "False" }}]}}))
            .unwrap(),
        )
    }

    fn pod(spec: serde_json::Value) -> Pod {
        serde_json::from_value(json!({"metadata": {"name": "p"}, "spec": spec})).unwrap()
    }

    #[test]
    fn a_pod_goes_to_a_ready_node_that_its_selector_matches() {
        let picky = pod(json!({"containers": [], "nodeSelector": {"disk": "ssd"}}));
        assert!(choose(&picky, &[node(true, json!({"disk": "ssd"}))]).is_ok());
        assert_eq!(
            choose(&picky, &[node(true, json!({}))]).unwrap_err(),
            "0/1 nodes are available: 1 node(s) didn't match Pod's node affinity/selector."
        );
        assert_eq!(
            choose(&picky, &[]).unwrap_err(),
            "no nodes available to schedule pods"
        );
        assert!(
            choose(&picky, &[node(false, json!({}))])
                .unwrap_err()
                .contains("not ready")
        );
    }

    #[test]
    fn bound_foreign_gated_and_deleted_pods_are_left_alone() {
        assert!(is_waiting(&pod(json!({"containers": []}))));
        assert!(!is_waiting(&pod(json!({"containers": [], "nodeName": "n"}))));
        assert!(!is_waiting(&pod(
            json!({"containers": [], "schedulerName": "other"})
        )));
        assert!(!is_waiting(&pod(
            json!({"containers": [], "schedulingGates": [{"name": "wait"}]})
        )));
    }
}
