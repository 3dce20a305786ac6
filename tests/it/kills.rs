//! `kill -9` of the server in every phase of a rollout, under load.

use std::process::Child;

use serde_json::Value;

use crate::cluster::KernelState;
use crate::delivery::{Delivery, HOST, NAMESPACE, RATE};
use crate::traffic::{Traffic, kill_if_there};

/// A delivery whose server is killed again and again.
struct Killing {
    delivery: Delivery,
    /// The `serin up` of the last start; its server may be killed before it is ready.
    starting: Option<Child>,
}

impl Killing {
    /// Kills the server the moment the Canary's status satisfies the predicate, and starts the next one.
    fn when(&mut self, what: &str, wanted: impl FnMut(&Value) -> bool) {
        self.delivery.canary(what, wanted);
        self.kill();
    }

    /// Kills the server the moment an event with this text is stored, and starts the next one.
    fn when_told(&mut self, text: &str) {
        self.delivery
            .api
            .until_all("Event", NAMESPACE, &format!("say {text:?}"), |events| {
                events.iter().any(|event| event["message"] == text)
            });
        self.kill();
    }

    fn kill(&mut self) {
        self.delivery.cluster.kill_server();
        self.ready();
        self.starting = Some(self.delivery.cluster.begin_up());
    }

    /// Waits for the last start.
    fn ready(&mut self) {
        if let Some(mut starting) = self.starting.take() {
            // It fails if its server was killed while starting; the next one has to cope.
            let _ = starting.wait();
        }
    }
}

impl Drop for Killing {
    fn drop(&mut self) {
        // Before the cluster is taken down.
        self.ready();
    }
}

fn live(status: &Value, weight: i64) -> bool {
    status["weightLive"]["weight"] == weight && status["weightLive"]["live"] == true
}

/// Weights of the steps of the last run, first one first.
fn steps(status: &Value) -> Vec<i64> {
    let history = status["history"].as_array().unwrap();
    history
        .iter()
        .map(|step| step["weight"].as_i64().unwrap())
        .collect()
}

#[test]
fn a_server_killed_in_every_phase_of_a_rollout_goes_on_and_nothing_is_lost_or_doubled() {
    let Some(delivery) = Delivery::prepare("[20, 60]", "1s") else {
        return;
    };
    let before = KernelState::read();
    delivery.sync();
    let mut killing = Killing {
        delivery,
        starting: None,
    };
    killing.when("initialize", |status| status["phase"] == "Initializing");
    killing.delivery.settled("Initialized");
    killing.ready();
    killing.delivery.reachable();
    let gateway = killing.delivery.pods("istio-system");

    let traffic = Traffic::start(&killing.delivery.cluster, HOST, RATE);
    killing.delivery.release("2.0.0", 0);
    killing.when("progress without a weight", |status| {
        status["phase"] == "Progressing" && status["canaryWeight"].as_i64().unwrap_or(0) == 0
    });
    killing.when_told("Advance podinfo.shop canary weight 20");
    killing.when("want 60 %", |status| status["canaryWeight"] == 60);
    // Pods and their traffic depend on the node's process as little as on the server's.
    killing
        .delivery
        .canary("have 60 % live", |status| live(status, 60));
    for pid in killing.delivery.cluster.processes_with("node") {
        kill_if_there(pid);
    }
    killing.kill();
    killing.when("promote", |status| status["phase"] == "Promoting");
    killing.when("finalise", |status| status["phase"] == "Finalising");
    let status = killing.delivery.settled("Succeeded");
    killing.ready();
    assert_eq!(
        killing.delivery.primary_image(),
        "serin.dev/examples/podinfo:2.0.0"
    );
    let taken = steps(&status);
    assert_eq!(&taken[..2], [20, 60], "each step is told once: {status}");
    assert!(
        taken[2..].iter().all(|weight| *weight == 0) && taken.len() <= 3,
        "{status}"
    );
    told_once(&killing.delivery, 1);
    killing.delivery.only_the_primary_is_left();

    killing.delivery.release("3.0.0", 50);
    killing.when("have 20 % of the bad version live", |status| live(status, 20));
    killing.when("roll back", |status| status["phase"] == "Failed");
    killing.delivery.canary("be rolled back", |status| {
        status["phase"] == "Failed" && live(status, 0)
    });
    killing.ready();
    killing.delivery.only_the_primary_is_left();
    assert_eq!(
        killing.delivery.primary_image(),
        "serin.dev/examples/podinfo:2.0.0"
    );
    told_once(&killing.delivery, 2);
    let told = traffic.stop();
    told.nothing_was_lost();
    for version in ["1.0.0", "2.0.0", "3.0.0"] {
        assert!(
            told.answered_by(version) > 0,
            "{version} had its share: {}",
            told.0
        );
    }
    assert_eq!(
        killing.delivery.pods("istio-system"),
        gateway,
        "the gateway's pod was never started again"
    );

    killing.delivery.cluster.kill_server();
    killing.delivery.cluster.serin(&["down", "--purge"]);
    assert_eq!(
        killing.delivery.cluster.processes(),
        [].into(),
        "no process is left"
    );
    assert_eq!(KernelState::read(), before, "nothing is left in the kernel");
}

/// No event about the rollout was told more often than there were runs. A kill may take the last one with it.
#[track_caller]
fn told_once(delivery: &Delivery, runs: u64) {
    let told = delivery.events();
    for (text, count) in &told {
        let step = [
            "New revision detected! Scaling up",
            "Starting canary analysis",
            "Advance ",
            "Copying ",
            "Promotion completed",
            "Rolling back",
            "Canary failed",
        ]
        .iter()
        .any(|start| text.starts_with(start));
        assert!(
            !step || *count <= runs,
            "{text:?} was told {count} times in {runs} runs: {told:?}"
        );
    }
}
