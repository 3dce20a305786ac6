//! Pods of a canary that died, watched only while a run is on: a Canary at rest holds no Pod in memory.

use std::collections::BTreeMap;

use futures::StreamExt;
use futures::stream::BoxStream;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, Event};
use kube::{Api, ResourceExt};

use crate::observed::DeadPod;

/// Pods whose deaths are remembered; one is enough to stop a run.
const REMEMBERED_MAX: usize = 64;

pub(crate) struct DeadPods {
    selector: String,
    events: BoxStream<'static, watcher::Result<Event<Pod>>>,
    dead: BTreeMap<String, DeadPod>,
}

impl DeadPods {
    pub(crate) fn watch(client: kube::Client, namespace: &str, selector: String) -> Self {
        let api: Api<Pod> = Api::namespaced(client, namespace);
        let config = watcher::Config::default().labels(&selector);
        Self {
            selector,
            events: watcher::watcher(api, config).default_backoff().boxed(),
            dead: BTreeMap::new(),
        }
    }

    pub(crate) fn selector(&self) -> &str {
        &self.selector
    }

    pub(crate) fn list(&self) -> Vec<DeadPod> {
        self.dead.values().cloned().collect()
    }

    /// Waits until another death is known.
    pub(crate) async fn next(&mut self) {
        loop {
            match self.events.next().await {
                Some(Ok(Event::Apply(pod) | Event::InitApply(pod))) => {
                    if let Some(dead) = death(&pod)
                        && self.dead.get(&dead.name) != Some(&dead)
                        && (self.dead.len() < REMEMBERED_MAX || self.dead.contains_key(&dead.name))
                    {
                        self.dead.insert(dead.name.clone(), dead);
                        return;
                    }
                }
                Some(Ok(_)) => {}
                Some(Err(error)) => tracing::warn!(%error, "watch of canary pods failed; it is tried again"),
                // The stream of a watcher has no end; if it had one, there would be nothing more to hear.
                None => std::future::pending().await,
            }
        }
    }
}

/// The last death of a container in a pod that was not asked to go.
fn death(pod: &Pod) -> Option<DeadPod> {
    if pod.metadata.deletion_timestamp.is_some() {
        return None;
    }
    let status = pod.status.as_ref()?;
    let name = pod.name_any();
    let last = status
        .container_statuses
        .iter()
        .flatten()
        .filter_map(|container| {
            let state = container
                .state
                .as_ref()
                .and_then(|state| state.terminated.as_ref());
            let before = container
                .last_state
                .as_ref()
                .and_then(|state| state.terminated.as_ref());
            let terminated = state.or(before)?;
            let at = terminated.finished_at.as_ref()?.0;
            let why = terminated
                .reason
                .as_deref()
                .filter(|why| *why != "Error" && *why != "Completed");
            let reason = match why {
                Some(why) => format!("container {} was {why}", container.name),
                None => format!(
                    "container {} exited with code {}",
                    container.name, terminated.exit_code
                ),
            };
            Some(DeadPod {
                name: name.clone(),
                reason,
                at,
            })
        })
        .max_by_key(|dead| dead.at);
    if last.is_some() {
        return last;
    }
    // An evicted pod may have no container status at all.
    (status.phase.as_deref() == Some("Failed")).then(|| DeadPod {
        reason: status.reason.clone().unwrap_or_else(|| "it failed".to_owned()),
        name,
        at: status.start_time.as_ref().map_or(Timestamp::MIN, |start| start.0),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn pod(status: serde_json::Value) -> Pod {
        serde_json::from_value(json!({"metadata": {"name": "p"}, "status": status})).unwrap()
    }

    #[test]
    fn a_container_that_exited_is_a_death_and_a_running_one_is_not() {
        let running = pod(
            json!({"containerStatuses": [{"name": "app", "image": "", "imageID": "", "ready": true,
            "restartCount": 0, "state": {"running": {"startedAt": "2026-01-01T00:00:00Z"}}}]}),
        );
        assert_eq!(death(&running), None);
        let crashed = pod(
            json!({"containerStatuses": [{"name": "app", "image": "", "imageID": "", "ready": false,
            "restartCount": 1, "state": {"running": {"startedAt": "2026-01-01T00:00:09Z"}},
            "lastState": {"terminated": {"exitCode": 3, "reason": "Error", "finishedAt": "2026-01-01T00:00:08Z"}}}]}),
        );
        let dead = death(&crashed).unwrap();
        assert_eq!(dead.reason, "container app exited with code 3");
        assert_eq!(dead.at.to_string(), "2026-01-01T00:00:08Z");
    }

    #[test]
    fn a_pod_that_was_asked_to_go_did_not_die() {
        let mut gone = pod(json!({"phase": "Failed"}));
        gone.metadata.deletion_timestamp = Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(
            Timestamp::UNIX_EPOCH,
        ));
        assert_eq!(death(&gone), None);
    }
}
