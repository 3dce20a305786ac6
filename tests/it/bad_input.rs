//! Commits that cannot be built or applied: the Kustomization says what is wrong where, and what ran keeps running.

use crate::api::{condition, is, message};
use crate::delivery::{Delivery, HOST, NAMESPACE, RATE, deployment};
use crate::traffic::Traffic;

/// A commit that cannot work, and what the condition must say of it.
struct Bad<'a> {
    what: &'a str,
    files: Vec<(&'a str, String)>,
    reason: &'a str,
    says: &'a [&'a str],
}

#[test]
fn a_commit_that_cannot_work_is_told_with_file_line_and_reason_and_what_ran_keeps_running() {
    let Some(delivery) = Delivery::start("[50]", "1s") else {
        return;
    };
    let traffic = Traffic::start(&delivery.cluster, HOST, RATE);
    let pods = delivery.pods(NAMESPACE);
    let status = delivery.settled("Initialized");
    let kustomization = |resources: &str| {
        format!(
            "apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\nnamespace: shop\nresources: {resources}\n"
        )
    };
    let bad = [
        Bad {
            what: "a manifest with a syntax error",
            files: vec![(
                "app/deployment.yaml",
                deployment("2.0.0", 0).replace("      containers:\n", "      containers: [\n"),
            )],
            reason: "BuildFailed",
            says: &["malformed YAML", "app/deployment.yaml:12"],
        },
        Bad {
            what: "an unknown field of the kustomization",
            files: vec![(
                "app/kustomization.yaml",
                kustomization("[deployment.yaml, canary.yaml]") + "resuorces: []\n",
            )],
            reason: "BuildFailed",
            says: &["unknown field \"resuorces\"", "app/kustomization.yaml:5"],
        },
        Bad {
            what: "an unknown field of a manifest",
            files: vec![(
                "app/deployment.yaml",
                deployment("2.0.0", 0).replace(
                    "  progressDeadlineSeconds: 60\n",
                    "  progressDeadlineSecond: 60\n",
                ),
            )],
            reason: "ReconciliationFailed",
            says: &[
                "Deployment/shop/podinfo",
                "progressDeadlineSecond",
                "app/deployment.yaml:6",
            ],
        },
        Bad {
            what: "a missing base",
            files: vec![(
                "app/kustomization.yaml",
                kustomization("[deployment.yaml, canary.yaml, ../base]"),
            )],
            reason: "BuildFailed",
            says: &["app/kustomization.yaml:4", "../base"],
        },
        Bad {
            what: "a cycle",
            files: vec![
                (
                    "app/kustomization.yaml",
                    kustomization("[deployment.yaml, canary.yaml, ../base]"),
                ),
                ("base/kustomization.yaml", kustomization("[../app]")),
            ],
            reason: "BuildFailed",
            says: &["base/kustomization.yaml:4", "cycle"],
        },
    ];
    for Bad {
        what,
        files,
        reason,
        says,
    } in bad
    {
        let files: Vec<(&str, &str)> = files.iter().map(|(path, text)| (*path, text.as_str())).collect();
        let commit = delivery.repository.push(&files);
        let object = delivery.api.until(
            "Kustomization",
            NAMESPACE,
            "shop",
            &format!("refuse {what}"),
            |object| {
                is(object, "Ready", "False")
                    && object["status"]["lastAttemptedRevision"]
                        .as_str()
                        .is_some_and(|revision| revision.ends_with(&commit))
            },
        );
        let told = message(&object, "Ready");
        eprintln!("{what}: {}: {told}", condition(&object, "Ready")["reason"]);
        assert_eq!(condition(&object, "Ready")["reason"], reason, "{what}: {told}");
        for part in says {
            assert!(told.contains(part), "{what}: {part:?} is not in {told:?}");
        }

        let commit = delivery.repository.revert();
        delivery.api.until(
            "Kustomization",
            NAMESPACE,
            "shop",
            &format!("converge after the revert of {what}"),
            |object| {
                is(object, "Ready", "True")
                    && object["status"]["lastAppliedRevision"]
                        .as_str()
                        .is_some_and(|revision| revision.ends_with(&commit))
            },
        );
    }
    assert_eq!(delivery.pods(NAMESPACE), pods, "the pods are the same");
    let after = delivery.settled("Initialized");
    assert_eq!(
        after["lastTransitionTime"], status["lastTransitionTime"],
        "no rollout was begun"
    );
    let told = traffic.stop();
    told.nothing_was_lost();
    assert_eq!(
        Some(told.answered_by("1.0.0")),
        told.0["answered"].as_u64(),
        "{}",
        told.0
    );
}
