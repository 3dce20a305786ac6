//! Watches Deployments and carries out [`super::deployment::decide`].

use std::sync::Arc;

use jiff::Timestamp;
use k8s_openapi::api::apps::v1::{Deployment, ReplicaSet};
use k8s_openapi::api::core::v1::{ObjectReference, Pod};
use kube::api::{DeleteParams, Patch, PatchParams, PostParams};
use kube::{Api, Resource, ResourceExt};
use serde_json::json;
use serin_kit::events::Recorder;
use tokio_util::sync::CancellationToken;

use super::Shared;
use super::deployment::{Action, Decision, Observed, decide};
use super::queue::Queue;
use super::template;
use crate::Error;
use crate::mirror::{Change, Key, key};

struct Controller {
    shared: Shared,
    recorder: Recorder,
}

/// The key of the Deployment that controls a ReplicaSet.
fn owner(set: &ReplicaSet) -> Option<Key> {
    let owner = set
        .owner_references()
        .iter()
        .find(|owner| owner.controller == Some(true) && owner.kind == "Deployment")?;
    Some((set.namespace().unwrap_or_default(), owner.name.clone()))
}

pub(crate) async fn run(shared: Shared, recorder: Recorder, cancel: CancellationToken) {
    let mut deployments = shared.deployments.changes();
    let mut sets = shared.replica_sets.changes();
    let mut pods = shared.pods.changes();
    let controller = Controller { shared, recorder };
    let mut queue = Queue::default();
    queue.add_all(
        controller
            .shared
            .deployments
            .all()
            .iter()
            .map(|object| key(object.as_ref())),
    );
    loop {
        while !cancel.is_cancelled()
            && let Some(key) = queue.pop()
        {
            let outcome = controller
                .sync(&key)
                .await
                .map(|decision| decision.and_then(|decision| decision.wake_after));
            queue.settle(key, "sync a Deployment", outcome);
        }
        tokio::select! {
            () = cancel.cancelled() => return,
            () = queue.wait() => {}
            change = deployments.next() => match change {
                Change::Applied(object) => queue.add(key(object.as_ref())),
                Change::Deleted(_) => {}
                Change::Resync => {
                    queue.add_all(controller.shared.deployments.all().iter().map(|object| key(object.as_ref())));
                }
            },
            change = sets.next() => match change {
                Change::Applied(set) | Change::Deleted(set) => {
                    queue.add_all(owner(&set));
                }
                Change::Resync => {
                    queue.add_all(controller.shared.replica_sets.all().iter().filter_map(|set| owner(set)));
                }
            },
            // Recreate waits for the end of old pods.
            change = pods.next() => if let Change::Deleted(pod) = change {
                queue.add_all(controller.owner_of_pod(&pod));
            },
        }
    }
}

impl Controller {
    fn owner_of_pod(&self, pod: &Pod) -> Option<Key> {
        let owner_of = pod
            .owner_references()
            .iter()
            .find(|owner| owner.controller == Some(true))?;
        let set = self
            .shared
            .replica_sets
            .get(&pod.namespace().unwrap_or_default(), &owner_of.name)?;
        owner(&set)
    }

    async fn sync(&self, key: &Key) -> Result<Option<Decision>, Error> {
        let Some(deployment) = self.shared.deployments.get(&key.0, &key.1) else {
            return Ok(None);
        };
        let uid = deployment.uid().unwrap_or_default();
        let in_namespace = self.shared.replica_sets.in_namespace(&key.0);
        let controlled = |set: &ReplicaSet| {
            set.owner_references()
                .iter()
                .any(|owner| owner.controller == Some(true) && owner.uid == uid)
        };
        let mut sets: Vec<Arc<ReplicaSet>> = in_namespace
            .iter()
            .filter(|set| controlled(set))
            .cloned()
            .collect();
        if deployment.metadata.deletion_timestamp.is_none() {
            for orphan in in_namespace.iter().filter(|set| adoptable(&deployment, set)) {
                sets.push(Arc::new(self.adopt(&deployment, orphan).await?));
            }
        }
        let sets: Vec<&ReplicaSet> = sets.iter().map(AsRef::as_ref).collect();
        let pods = self.shared.pods.in_namespace(&key.0);
        let old_pods = |set: &ReplicaSet| -> Vec<&Pod> {
            let uid = set.uid();
            pods.iter()
                .map(AsRef::as_ref)
                .filter(|pod: &&Pod| {
                    pod.owner_references()
                        .iter()
                        .any(|owner| Some(&owner.uid) == uid.as_ref())
                })
                .collect()
        };
        let decision = decide(
            &Observed {
                deployment: &deployment,
                sets: &sets,
                old_pods: &old_pods,
            },
            Timestamp::now(),
        );
        // A ReplicaSet that goes may be the first that is heard of the end of its Deployment.
        if decision
            .actions
            .iter()
            .any(|action| matches!(action, Action::Create(_)))
            && !self.shared.still_has(deployment.as_ref()).await?
        {
            return Ok(None);
        }
        let about = deployment.object_ref(&());
        for action in &decision.actions {
            self.act(&deployment, &about, action, &sets).await?;
        }
        if deployment.status.as_ref() != Some(&decision.status) {
            self.write_status(&deployment, &decision).await?;
        }
        Ok(Some(decision))
    }

    async fn act(
        &self,
        deployment: &Deployment,
        about: &ObjectReference,
        action: &Action,
        sets: &[&ReplicaSet],
    ) -> Result<(), Error> {
        let namespace = deployment.namespace().unwrap_or_default();
        let api: Api<ReplicaSet> = Api::namespaced(self.shared.client.clone(), &namespace);
        match action {
            Action::Create(set) => {
                let name = set.name_any();
                match api.create(&PostParams::default(), set).await {
                    Ok(created) => {
                        self.scaled(about, &name, 0, super::rollout::spec_replicas(&created));
                        self.shared.replica_sets.note(created);
                    }
                    Err(kube::Error::Api(status)) if status.reason == "AlreadyExists" => {
                        return self.on_name_taken(deployment, set, &api).await;
                    }
                    Err(error) => {
                        let note = format!("Failed to create new replica set \"{name}\": {error}");
                        self.recorder
                            .warning(about, "ReplicaSetCreateError", "Create", &note);
                        return Err(Error::api(format!("create ReplicaSet {namespace}/{name}"), error));
                    }
                }
            }
            Action::Update {
                name,
                replicas,
                annotations,
                min_ready_seconds,
            } => {
                let mut spec = serde_json::Map::new();
                if let Some((_, to)) = replicas {
                    spec.insert("replicas".to_owned(), json!(to));
                }
                if let Some(seconds) = min_ready_seconds {
                    spec.insert("minReadySeconds".to_owned(), json!(seconds));
                }
                let mut patch = json!({"metadata": {"annotations": annotations}, "spec": spec});
                // What was decided on is what is changed: a size is never set on top of somebody else's.
                if let Some(known) = sets.iter().find(|set| set.name_any() == *name) {
                    patch["metadata"]["resourceVersion"] = json!(known.resource_version());
                }
                let written = api
                    .patch(name, &PatchParams::default(), &Patch::Merge(&patch))
                    .await
                    .map_err(|error| Error::api(format!("update ReplicaSet {namespace}/{name}"), error))?;
                self.shared.replica_sets.note(written);
                if let Some((from, to)) = replicas {
                    self.scaled(about, name, *from, *to);
                }
            }
            Action::Delete(name) => match api.delete(name, &DeleteParams::background()).await {
                Ok(_) => {}
                Err(kube::Error::Api(status)) if status.code == 404 => {}
                Err(error) => return Err(Error::api(format!("delete ReplicaSet {namespace}/{name}"), error)),
            },
            Action::SetRevision(revision) => {
                let api: Api<Deployment> = Api::namespaced(self.shared.client.clone(), &namespace);
                let patch = json!({"metadata": {"annotations": {super::rollout::REVISION: revision}}});
                let name = deployment.name_any();
                let written = api
                    .patch(&name, &PatchParams::default(), &Patch::Merge(&patch))
                    .await
                    .map_err(|error| Error::api(format!("annotate Deployment {namespace}/{name}"), error))?;
                self.shared.deployments.note(written);
            }
        }
        Ok(())
    }

    fn scaled(&self, about: &ObjectReference, name: &str, from: i32, to: i32) {
        if from != to {
            let direction = if to > from { "up" } else { "down" };
            let note = format!("Scaled {direction} replica set {name} from {from} to {to}");
            self.recorder.normal(about, "ScalingReplicaSet", "Scale", &note);
        }
    }

    /// The name exists: it is ours and merely not seen yet, or a hash collision, which the status counts.
    async fn on_name_taken(
        &self,
        deployment: &Deployment,
        set: &ReplicaSet,
        api: &Api<ReplicaSet>,
    ) -> Result<(), Error> {
        let name = set.name_any();
        let known = api
            .get(&name)
            .await
            .map_err(|error| Error::api(format!("read ReplicaSet {name}"), error))?;
        let ours = known
            .owner_references()
            .iter()
            .any(|owner| Some(&owner.uid) == deployment.uid().as_ref());
        let template = |set: &ReplicaSet| set.spec.as_ref().and_then(|spec| spec.template.clone());
        let same = template(&known)
            .zip(template(set))
            .is_some_and(|(a, b)| template::equal(&a, &b));
        if ours && same {
            self.shared.replica_sets.note(known);
            return Ok(());
        }
        let count = deployment
            .status
            .as_ref()
            .and_then(|status| status.collision_count)
            .unwrap_or(0)
            + 1;
        let patch = json!({"status": {"collisionCount": count}});
        let api: Api<Deployment> = Api::namespaced(
            self.shared.client.clone(),
            &deployment.namespace().unwrap_or_default(),
        );
        let written = api
            .patch_status(
                &deployment.name_any(),
                &PatchParams::default(),
                &Patch::Merge(&patch),
            )
            .await
            .map_err(|error| {
                Error::api(
                    format!("count a name collision of {}", deployment.name_any()),
                    error,
                )
            })?;
        self.shared.deployments.note(written);
        Ok(())
    }

    async fn adopt(&self, deployment: &Deployment, set: &ReplicaSet) -> Result<ReplicaSet, Error> {
        let api: Api<ReplicaSet> =
            Api::namespaced(self.shared.client.clone(), &set.namespace().unwrap_or_default());
        let owner = deployment.controller_owner_ref(&()).map(|mut owner| {
            owner.block_owner_deletion = Some(true);
            owner
        });
        let mut owners = set.owner_references().to_vec();
        owners.extend(owner);
        let patch = json!({"metadata": {"uid": set.uid(), "ownerReferences": owners}});
        let name = set.name_any();
        let adopted = api
            .patch(&name, &PatchParams::default(), &Patch::Merge(&patch))
            .await
            .map_err(|error| Error::api(format!("adopt ReplicaSet {name}"), error))?;
        self.shared.replica_sets.note(adopted.clone());
        Ok(adopted)
    }

    async fn write_status(&self, deployment: &Deployment, decision: &Decision) -> Result<(), Error> {
        let name = deployment.name_any();
        let namespace = deployment.namespace().unwrap_or_default();
        let api: Api<Deployment> = Api::namespaced(self.shared.client.clone(), &namespace);
        // The latest known version: actions above may have written annotations.
        let mut object = self
            .shared
            .deployments
            .get(&namespace, &name)
            .map_or_else(|| deployment.clone(), |d| (*d).clone());
        object.status = Some(decision.status.clone());
        object.metadata.managed_fields = None;
        let written = api
            .replace_status(&name, &PostParams::default(), &object)
            .await
            .map_err(|error| {
                Error::api(
                    format!("write the status of Deployment {namespace}/{name}"),
                    error,
                )
            })?;
        self.shared.deployments.note(written);
        Ok(())
    }
}

/// Nobody's, and selected.
fn adoptable(deployment: &Deployment, set: &ReplicaSet) -> bool {
    set.metadata.deletion_timestamp.is_none()
        && set
            .owner_references()
            .iter()
            .all(|owner| owner.controller != Some(true))
        && deployment
            .spec
            .as_ref()
            .is_some_and(|spec| super::template::selects(&spec.selector, set.labels()))
}
