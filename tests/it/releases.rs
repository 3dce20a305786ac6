//! What a developer does in the middle of things: a push during a rollout, a revert.

use std::collections::BTreeSet;

use crate::api::is;
use crate::delivery::{Delivery, HOST, NAMESPACE, RATE};
use crate::traffic::Traffic;

#[test]
fn a_push_in_the_middle_of_a_rollout_restarts_the_analysis_and_a_reverted_release_converges() {
    let Some(delivery) = Delivery::start("[20, 60]", "1s") else {
        return;
    };
    let traffic = Traffic::start(&delivery.cluster, HOST, RATE);

    delivery.release("2.0.0", 0);
    let run = delivery.canary("want 60 %", |status| status["canaryWeight"] == 60);
    delivery.release("2.1.0", 0);
    let mut weights = BTreeSet::new();
    let again = delivery.canary("start again", |status| {
        weights.insert(status["canaryWeight"].as_i64().unwrap_or(0));
        status["lastAppliedSpec"] != run["lastAppliedSpec"] && status["canaryWeight"] == 20
    });
    assert!(
        weights.contains(&0),
        "the weight was taken back first: {weights:?}"
    );
    assert_eq!(again["phase"], "Progressing");
    assert_ne!(again["run"]["startedAt"], run["run"]["startedAt"]);
    delivery.settled("Succeeded");
    assert_eq!(delivery.primary_image(), "serin.dev/examples/podinfo:2.1.0");
    let told = delivery.events();
    assert_eq!(
        told.get("New revision detected! Restarting analysis for podinfo.shop"),
        Some(&1),
        "{told:?}"
    );
    assert_eq!(
        told.get("Advance podinfo.shop canary weight 20"),
        Some(&2),
        "{told:?}"
    );
    assert_eq!(
        told.get("Copying podinfo.shop template spec to podinfo-primary.shop"),
        Some(&1),
        "2.0.0 was never promoted: {told:?}"
    );

    delivery.release("3.0.0", 50);
    let failed = delivery.settled("Failed");
    let commit = delivery.repository.revert();
    delivery
        .api
        .until("Kustomization", NAMESPACE, "shop", "apply the revert", |object| {
            is(object, "Ready", "True")
                && object["status"]["lastAppliedRevision"]
                    .as_str()
                    .is_some_and(|revision| revision.ends_with(&commit))
        });
    // As in Flagger, what is promoted already is not rolled out again; the failure stays told until the next revision.
    assert_ne!(failed["lastAppliedSpec"], failed["lastPromotedSpec"]);
    let status = delivery.canary("converge", |status| {
        status["lastAppliedSpec"] == status["lastPromotedSpec"]
    });
    assert_eq!(status["lastPromotedSpec"], failed["lastPromotedSpec"], "{status}");
    delivery.only_the_primary_is_left();
    assert_eq!(delivery.primary_image(), "serin.dev/examples/podinfo:2.1.0");
    let told = traffic.stop();
    told.nothing_was_lost();
    assert!(
        told.answered_by("2.0.0") > 0 && told.answered_by("3.0.0") > 0,
        "{}",
        told.0
    );
}
