//! Watches ReplicaSets and carries out [`super::replicaset::decide`].

use std::collections::HashMap;
use std::sync::Arc;

use futures::future::BoxFuture;
use futures::{FutureExt, StreamExt, stream};
use jiff::Timestamp;
use k8s_openapi::api::apps::v1::ReplicaSet;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{DeleteParams, Patch, PatchParams, PostParams, Preconditions};
use kube::{Api, Resource, ResourceExt};
use serde_json::json;
use serin_kit::events::Recorder;
use tokio_util::sync::CancellationToken;

use super::Shared;
use super::queue::Queue;
use super::replicaset::decide;
use super::template;
use crate::Error;
use crate::mirror::{Change, Key, key};

/// Requests in flight for one ReplicaSet.
const PARALLEL: usize = 8;

struct Controller {
    shared: Shared,
    recorder: Recorder,
    /// Why the last step of a ReplicaSet failed: reason and message.
    failures: parking_lot::Mutex<HashMap<Key, (&'static str, String)>>,
}

fn owner(pod: &Pod) -> Option<Key> {
    let owner = pod
        .owner_references()
        .iter()
        .find(|owner| owner.controller == Some(true) && owner.kind == "ReplicaSet")?;
    Some((pod.namespace().unwrap_or_default(), owner.name.clone()))
}

pub(crate) async fn run(shared: Shared, recorder: Recorder, cancel: CancellationToken) {
    let mut sets = shared.replica_sets.changes();
    let mut pods = shared.pods.changes();
    let controller = Controller {
        shared,
        recorder,
        failures: parking_lot::Mutex::default(),
    };
    let mut queue = Queue::default();
    queue.add_all(controller.everything());
    loop {
        while !cancel.is_cancelled()
            && let Some(key) = queue.pop()
        {
            let outcome = controller.sync(&key).await;
            queue.settle(key, "sync a ReplicaSet", outcome);
        }
        tokio::select! {
            () = cancel.cancelled() => return,
            () = queue.wait() => {}
            change = sets.next() => match change {
                Change::Applied(set) => queue.add(key(set.as_ref())),
                Change::Deleted(set) => {
                    controller.failures.lock().remove(&key(set.as_ref()));
                }
                Change::Resync => queue.add_all(controller.everything()),
            },
            change = pods.next() => match change {
                Change::Applied(pod) | Change::Deleted(pod) => queue.add_all(controller.sets_of(&pod)),
                Change::Resync => queue.add_all(controller.everything()),
            },
        }
    }
}

impl Controller {
    fn everything(&self) -> Vec<Key> {
        self.shared
            .replica_sets
            .all()
            .iter()
            .map(|set| key(set.as_ref()))
            .collect()
    }

    /// The ReplicaSet of a pod; of an orphan all that might adopt it.
    fn sets_of(&self, pod: &Pod) -> Vec<Key> {
        if let Some(owner) = owner(pod) {
            return vec![owner];
        }
        if pod
            .owner_references()
            .iter()
            .any(|owner| owner.controller == Some(true))
        {
            return Vec::new();
        }
        self.shared
            .replica_sets
            .in_namespace(&pod.namespace().unwrap_or_default())
            .iter()
            .filter(|set| {
                set.spec
                    .as_ref()
                    .is_some_and(|spec| template::selects(&spec.selector, pod.labels()))
            })
            .map(|set| key(set.as_ref()))
            .collect()
    }

    async fn sync(&self, key: &Key) -> Result<Option<std::time::Duration>, Error> {
        let Some(set) = self.shared.replica_sets.get(&key.0, &key.1) else {
            return Ok(None);
        };
        let mut pods = self.controlled(&set).await?;
        let decision = decide(
            &set,
            &pods.iter().map(AsRef::as_ref).collect::<Vec<_>>(),
            None,
            Timestamp::now(),
        );
        // Pods that go may be the first that is heard of the end of their ReplicaSet.
        if decision.create > 0
            && pods.iter().any(|pod| pod.metadata.deletion_timestamp.is_some())
            && !self.shared.still_has(set.as_ref()).await?
        {
            return Ok(None);
        }
        let mut result = Ok(());
        if decision.create > 0 {
            result = self.create(&set, decision.create).await;
        } else if !decision.delete.is_empty() {
            result = self.delete(&set, &decision.delete).await;
        }
        let failure = match &result {
            Ok(()) => {
                self.failures.lock().remove(key);
                None
            }
            Err(error) => {
                let reason = if decision.create > 0 {
                    "FailedCreate"
                } else {
                    "FailedDelete"
                };
                // kube's error repeats the request; the server's words are what the user knows.
                let message = match error {
                    Error::Api { source, .. } => match source.as_ref() {
                        kube::Error::Api(status) => status.message.clone(),
                        other => other.to_string(),
                    },
                    other => other.to_string(),
                };
                self.failures
                    .lock()
                    .insert(key.clone(), (reason, message.clone()));
                Some((reason, message))
            }
        };
        // The pods as they are now: those just created are known already.
        if decision.create > 0 || !decision.delete.is_empty() {
            pods = self.controlled(&set).await?;
        }
        let set = self.shared.replica_sets.get(&key.0, &key.1).unwrap_or(set);
        let failure = failure
            .as_ref()
            .map(|(reason, message)| (*reason, message.as_str()));
        let after = decide(
            &set,
            &pods.iter().map(AsRef::as_ref).collect::<Vec<_>>(),
            failure,
            Timestamp::now(),
        );
        if set.status.as_ref() != Some(&after.status) {
            let api: Api<ReplicaSet> = Api::namespaced(self.shared.client.clone(), &key.0);
            let mut object = set.as_ref().clone();
            object.status = Some(after.status.clone());
            let written = api
                .replace_status(&key.1, &PostParams::default(), &object)
                .await
                .map_err(|error| {
                    Error::api(
                        format!("write the status of ReplicaSet {}/{}", key.0, key.1),
                        error,
                    )
                })?;
            self.shared.replica_sets.note(written);
        }
        result.map(|()| after.wake_after)
    }

    /// The pods that a ReplicaSet controls. Orphans that it selects are adopted, pods whose labels were changed are
    /// let go.
    async fn controlled(&self, set: &ReplicaSet) -> Result<Vec<Arc<Pod>>, Error> {
        let namespace = set.namespace().unwrap_or_default();
        let Some(selector) = set.spec.as_ref().map(|spec| &spec.selector) else {
            return Ok(Vec::new());
        };
        let uid = set.uid().unwrap_or_default();
        let api: Api<Pod> = Api::namespaced(self.shared.client.clone(), &namespace);
        let mut controlled = Vec::new();
        for pod in self.shared.pods.in_namespace(&namespace) {
            let controller = pod
                .owner_references()
                .iter()
                .find(|owner| owner.controller == Some(true));
            let selected = template::selects(selector, pod.labels());
            match controller {
                Some(owner) if owner.uid == uid && selected => controlled.push(pod),
                Some(owner) if owner.uid == uid && pod.metadata.deletion_timestamp.is_none() => {
                    let owners: Vec<_> = pod
                        .owner_references()
                        .iter()
                        .filter(|owner| owner.uid != uid)
                        .cloned()
                        .collect();
                    let patch = json!({"metadata": {"uid": pod.uid(), "ownerReferences": owners}});
                    match api
                        .patch(&pod.name_any(), &PatchParams::default(), &Patch::Merge(&patch))
                        .await
                    {
                        Ok(written) => self.shared.pods.note(written),
                        Err(kube::Error::Api(status)) if status.code == 404 => {}
                        Err(error) => {
                            return Err(Error::api(format!("release pod {}", pod.name_any()), error));
                        }
                    }
                }
                None if selected
                    && template::is_active(&pod)
                    && set.metadata.deletion_timestamp.is_none() =>
                {
                    let mut owners = pod.owner_references().to_vec();
                    owners.extend(owner_of(set));
                    let patch = json!({"metadata": {"uid": pod.uid(), "ownerReferences": owners}});
                    match api
                        .patch(&pod.name_any(), &PatchParams::default(), &Patch::Merge(&patch))
                        .await
                    {
                        Ok(written) => {
                            self.shared.pods.note(written.clone());
                            controlled.push(Arc::new(written));
                        }
                        Err(kube::Error::Api(status)) if status.code == 404 => {}
                        Err(error) => return Err(Error::api(format!("adopt pod {}", pod.name_any()), error)),
                    }
                }
                _ => {}
            }
        }
        Ok(controlled)
    }

    async fn create(&self, set: &ReplicaSet, count: usize) -> Result<(), Error> {
        let namespace = set.namespace().unwrap_or_default();
        let api: Api<Pod> = Api::namespaced(self.shared.client.clone(), &namespace);
        let (Some(template), Some(owner)) = (
            set.spec.as_ref().and_then(|spec| spec.template.as_ref()),
            owner_of(set),
        ) else {
            return Ok(());
        };
        let pod = template::pod(template, owner, &namespace);
        let about = set.object_ref(&());
        // One first: if the API refuses it, it refuses all of them.
        let (mut left, mut batch) = (count, 1);
        while left > 0 {
            let size = batch.min(left);
            let requests: Vec<BoxFuture<'static, Result<Pod, kube::Error>>> = (0..size)
                .map(|_| {
                    let (api, pod) = (api.clone(), pod.clone());
                    async move { api.create(&PostParams::default(), &pod).await }.boxed()
                })
                .collect();
            let results: Vec<_> = stream::iter(requests).buffer_unordered(PARALLEL).collect().await;
            for result in results {
                match result {
                    Ok(created) => {
                        let note = format!("Created pod: {}", created.name_any());
                        self.recorder.normal(&about, "SuccessfulCreate", "Create", &note);
                        self.shared.pods.note(created);
                    }
                    Err(error) => {
                        let text = match &error {
                            kube::Error::Api(status) => status.message.clone(),
                            other => other.to_string(),
                        };
                        self.recorder.warning(
                            &about,
                            "FailedCreate",
                            "Create",
                            &format!("Error creating: {text}"),
                        );
                        return Err(Error::api(
                            format!("create a pod of ReplicaSet {namespace}/{}", set.name_any()),
                            error,
                        ));
                    }
                }
            }
            left -= size;
            batch = size * 2;
        }
        Ok(())
    }

    async fn delete(&self, set: &ReplicaSet, names: &[String]) -> Result<(), Error> {
        let namespace = set.namespace().unwrap_or_default();
        let api: Api<Pod> = Api::namespaced(self.shared.client.clone(), &namespace);
        let about = set.object_ref(&());
        let requests: Vec<BoxFuture<'static, (String, Result<Option<Pod>, kube::Error>)>> = names
            .iter()
            .map(|name| {
                let uid = self.shared.pods.get(&namespace, name).and_then(|pod| pod.uid());
                let parameters = DeleteParams {
                    preconditions: uid.map(|uid| Preconditions {
                        uid: Some(uid),
                        resource_version: None,
                    }),
                    ..DeleteParams::default()
                };
                let (api, name) = (api.clone(), name.clone());
                async move {
                    let result = api.delete(&name, &parameters).await.map(|answer| answer.left());
                    (name, result)
                }
                .boxed()
            })
            .collect();
        let results: Vec<_> = stream::iter(requests).buffer_unordered(PARALLEL).collect().await;
        for (name, result) in results {
            match result {
                Ok(Some(pod)) if pod.metadata.deletion_timestamp.is_some() => {
                    self.recorder.normal(
                        &about,
                        "SuccessfulDelete",
                        "Delete",
                        &format!("Deleted pod: {name}"),
                    );
                    // A pod without a node is gone at once; the answer is then its last state.
                    let unassigned = pod
                        .spec
                        .as_ref()
                        .and_then(|spec| spec.node_name.as_ref())
                        .is_none();
                    if unassigned {
                        self.shared.pods.note_deleted(&pod)
                    } else {
                        self.shared.pods.note(pod)
                    }
                }
                Ok(_) => {
                    self.recorder.normal(
                        &about,
                        "SuccessfulDelete",
                        "Delete",
                        &format!("Deleted pod: {name}"),
                    );
                    if let Some(pod) = self.shared.pods.get(&namespace, &name) {
                        self.shared.pods.note_deleted(&pod);
                    }
                }
                Err(kube::Error::Api(status)) if status.code == 404 || status.code == 409 => {}
                Err(error) => return Err(Error::api(format!("delete pod {namespace}/{name}"), error)),
            }
        }
        Ok(())
    }
}

fn owner_of(set: &ReplicaSet) -> Option<k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference> {
    set.controller_owner_ref(&()).map(|mut owner| {
        owner.block_owner_deletion = Some(true);
        owner
    })
}
