use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use serde_json::json;

use super::status::condition;
use super::*;
use crate::controllers::rollout::{MAX_REPLICAS, REVISION, REVISION_HISTORY};
use crate::controllers::template::HASH_LABEL;

fn now(second: i64) -> Timestamp {
    Timestamp::from_second(1_767_225_600 + second).unwrap()
}

fn deployment(replicas: i32, image: &str) -> Deployment {
    serde_json::from_value(json!({
        "metadata": {"name": "d", "namespace": "n", "uid": "u", "generation": 1},
        "spec": {"replicas": replicas, "selector": {"matchLabels": {"app": "w"}},
                 "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": "25%", "maxUnavailable": "25%"}},
                 "revisionHistoryLimit": 10, "progressDeadlineSeconds": 600,
                 "template": {"metadata": {"labels": {"app": "w"}}, "spec": {"containers": [{"name": "c", "image": image}]}}},
    }))
    .unwrap()
}

/// A cluster of one Deployment: carries out decisions, and makes pods available one by one.
struct World {
    deployment: Deployment,
    sets: Vec<ReplicaSet>,
    second: i64,
    created: usize,
}

impl World {
    fn new(deployment: Deployment) -> Self {
        Self {
            deployment,
            sets: Vec::new(),
            second: 0,
            created: 0,
        }
    }

    fn step(&mut self) -> bool {
        let sets: Vec<&ReplicaSet> = self.sets.iter().collect();
        let decision = decide(
            &Observed {
                deployment: &self.deployment,
                sets: &sets,
                old_pods: &|_| Vec::new(),
            },
            now(self.second),
        );
        let changed =
            !decision.actions.is_empty() || self.deployment.status.as_ref() != Some(&decision.status);
        self.deployment.status = Some(decision.status);
        for action in decision.actions {
            match action {
                Action::Create(set) => {
                    let mut set = *set;
                    self.created += 1;
                    set.metadata.uid = Some(format!("uid-{}", self.created));
                    set.metadata.creation_timestamp = Some(Time(now(i64::try_from(self.created).unwrap())));
                    set.metadata.generation = Some(1);
                    self.sets.push(set);
                }
                Action::Update {
                    name,
                    replicas,
                    annotations,
                    ..
                } => {
                    let set = self.sets.iter_mut().find(|set| set.name_any() == name).unwrap();
                    set.metadata
                        .annotations
                        .get_or_insert_default()
                        .extend(annotations);
                    if let Some((from, to)) = replicas {
                        assert_eq!(from, spec_replicas(set));
                        set.spec.as_mut().unwrap().replicas = Some(to);
                    }
                }
                Action::Delete(name) => self.sets.retain(|set| set.name_any() != name),
                Action::SetRevision(revision) => {
                    self.deployment
                        .metadata
                        .annotations
                        .get_or_insert_default()
                        .insert(REVISION.to_owned(), revision);
                }
            }
        }
        for set in &mut self.sets {
            let size = spec_replicas(set);
            let kept = available(set).min(size);
            let status = set.status.get_or_insert_default();
            status.replicas = size;
            status.ready_replicas = Some(kept);
            status.available_replicas = Some(kept);
            status.observed_generation = set.metadata.generation;
        }
        changed
    }

    fn settle(&mut self) {
        for _ in 0..100 {
            if !self.step() {
                return;
            }
        }
        panic!("does not settle: {:?}", self.deployment.status);
    }

    /// Makes one pod available, of the ReplicaSet that lacks most; whether there was one.
    fn pod_ready(&mut self) -> bool {
        self.second += 1;
        let Some(set) = self
            .sets
            .iter_mut()
            .find(|set| available(set) < spec_replicas(set))
        else {
            return false;
        };
        let status = set.status.as_mut().unwrap();
        let more = Some(status.available_replicas.unwrap_or(0) + 1);
        (status.available_replicas, status.ready_replicas) = (more, more);
        true
    }

    fn condition(&self, type_: &str) -> (String, String) {
        let status = self.deployment.status.as_ref().unwrap();
        let found = condition(status, type_).unwrap();
        (found.status.clone(), found.reason.clone().unwrap())
    }

    fn sizes(&self) -> Vec<i32> {
        self.sets.iter().map(spec_replicas).collect()
    }
}

fn pair(a: &str, b: &str) -> (String, String) {
    (a.to_owned(), b.to_owned())
}

#[test]
fn a_new_deployment_creates_its_replica_set_and_is_complete_when_all_pods_are_available() {
    let mut world = World::new(deployment(3, "i:1"));
    world.settle();
    assert_eq!(world.sizes(), [3]);
    assert_eq!(
        world.condition("Available"),
        pair("False", "MinimumReplicasUnavailable")
    );
    let annotations = world.sets[0].annotations().clone();
    assert_eq!(annotations[DESIRED_REPLICAS], "3");
    assert_eq!(annotations[MAX_REPLICAS], "4");
    assert_eq!(annotations[REVISION], "1");
    assert_eq!(world.deployment.annotations()[REVISION], "1");
    assert_eq!(world.sets[0].labels()[HASH_LABEL], world.sets[0].name_any()[2..]);
    while world.pod_ready() {
        world.settle();
    }
    assert_eq!(
        world.condition("Available"),
        pair("True", "MinimumReplicasAvailable")
    );
    assert_eq!(
        world.condition("Progressing"),
        pair("True", "NewReplicaSetAvailable")
    );
}

#[test]
fn a_new_image_is_rolled_out_within_the_fences_as_the_recorded_controller_does() {
    let mut world = World::new(deployment(4, "i:1"));
    world.settle();
    while world.pod_ready() {
        world.settle();
    }
    world.deployment.spec.as_mut().unwrap().template = deployment(4, "i:2").spec.unwrap().template;
    world.deployment.metadata.generation = Some(2);
    world.settle();
    // maxSurge 1 and maxUnavailable 1 of 4.
    assert_eq!(world.sizes(), [3, 2]);
    assert_eq!(
        world.condition("Available"),
        pair("True", "MinimumReplicasAvailable")
    );
    let mut seen = vec![world.sizes()];
    while world.pod_ready() {
        world.settle();
        seen.push(world.sizes());
    }
    assert_eq!(seen.last().unwrap(), &[0, 4]);
    assert_eq!(
        world.condition("Progressing"),
        pair("True", "NewReplicaSetAvailable")
    );
    assert_eq!(world.deployment.annotations()[REVISION], "2");
    // Going back takes the old ReplicaSet again under a new revision and remembers the old one.
    world.deployment.spec.as_mut().unwrap().template = deployment(4, "i:1").spec.unwrap().template;
    world.deployment.metadata.generation = Some(3);
    world.settle();
    assert_eq!(world.sets.len(), 2);
    assert_eq!(world.sets[0].annotations()[REVISION], "3");
    assert_eq!(world.sets[0].annotations()[REVISION_HISTORY], "1");
}

#[test]
fn recreate_takes_all_old_pods_down_before_it_creates_new_ones() {
    let mut object = deployment(2, "i:1");
    object.spec.as_mut().unwrap().strategy =
        Some(serde_json::from_value(json!({"type": "Recreate"})).unwrap());
    let mut world = World::new(object);
    world.settle();
    while world.pod_ready() {
        world.settle();
    }
    world.deployment.spec.as_mut().unwrap().template = deployment(2, "i:2").spec.unwrap().template;
    world.step();
    assert_eq!(world.sizes(), [0]);
    let pod: Pod = serde_json::from_value(json!({"metadata": {"name": "p"}})).unwrap();
    let sets: Vec<&ReplicaSet> = world.sets.iter().collect();
    let waiting = decide(
        &Observed {
            deployment: &world.deployment,
            sets: &sets,
            old_pods: &|_| vec![&pod],
        },
        now(9),
    );
    assert!(waiting.actions.is_empty(), "an old pod still runs");
    world.settle();
    assert_eq!(world.sizes(), [0, 2]);
}

#[test]
fn a_rollout_that_stands_still_exceeds_its_deadline_and_says_so() {
    let mut object = deployment(1, "i:1");
    object.spec.as_mut().unwrap().progress_deadline_seconds = Some(60);
    let mut world = World::new(object);
    world.settle();
    let sets: Vec<&ReplicaSet> = world.sets.iter().collect();
    let observed = Observed {
        deployment: &world.deployment,
        sets: &sets,
        old_pods: &|_| Vec::new(),
    };
    let waiting = decide(&observed, now(10));
    assert_eq!(waiting.wake_after, Some(Duration::from_secs(51)));
    world.second = 62;
    world.settle();
    assert_eq!(
        world.condition("Progressing"),
        pair("False", "ProgressDeadlineExceeded")
    );
    // It is not the end: pods that come later still count.
    world.pod_ready();
    world.settle();
    assert_eq!(
        world.condition("Progressing"),
        pair("True", "NewReplicaSetAvailable")
    );
}

#[test]
fn a_paused_deployment_scales_but_does_not_roll_out() {
    let mut world = World::new(deployment(2, "i:1"));
    world.settle();
    while world.pod_ready() {
        world.settle();
    }
    world.deployment.spec.as_mut().unwrap().paused = Some(true);
    world.deployment.spec.as_mut().unwrap().template = deployment(2, "i:2").spec.unwrap().template;
    world.deployment.spec.as_mut().unwrap().replicas = Some(5);
    world.settle();
    assert_eq!(world.sizes(), [5]);
    assert_eq!(
        world.condition("Progressing"),
        pair("Unknown", "DeploymentPaused")
    );
    world.deployment.spec.as_mut().unwrap().paused = Some(false);
    world.settle();
    assert_eq!(world.sets.len(), 2);
}

#[test]
fn scaling_in_the_middle_of_a_rollout_is_proportional() {
    let mut world = World::new(deployment(10, "i:1"));
    world.settle();
    while world.pod_ready() {
        world.settle();
    }
    world.deployment.spec.as_mut().unwrap().template = deployment(10, "i:2").spec.unwrap().template;
    world.settle();
    assert_eq!(world.sizes(), [8, 5]);
    world.deployment.spec.as_mut().unwrap().replicas = Some(20);
    world.settle();
    let sizes = world.sizes();
    assert_eq!(sizes.iter().sum::<i32>(), 25, "{sizes:?}");
    assert!(sizes[0] > sizes[1], "{sizes:?}");
}

#[test]
fn old_replica_sets_beyond_the_history_limit_are_deleted() {
    let mut object = deployment(1, "i:0");
    object.spec.as_mut().unwrap().revision_history_limit = Some(2);
    let mut world = World::new(object);
    for version in 0..6 {
        world.deployment.spec.as_mut().unwrap().template =
            deployment(1, &format!("i:{version}")).spec.unwrap().template;
        world.settle();
        while world.pod_ready() {
            world.settle();
        }
        world.settle();
    }
    assert_eq!(world.sets.len(), 3);
    assert_eq!(world.deployment.annotations()[REVISION], "6");
}
