//! Bad input, and what goes on running meanwhile.

use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use kube::api::{Patch, PatchParams};
use serde_json::json;
use serin_crds::flux::kustomize::Kustomization;

use crate::cluster::{Cluster, NS, condition, config_map, until};

#[tokio::test]
async fn bad_manifests_are_told_by_file_and_reason_and_what_ran_keeps_running() {
    let cluster = Cluster::start().await;
    let repo = cluster.repository("app");
    let good = config_map("a", "1");
    let first = repo.push(&[("deploy/a.yaml", &good)]);
    cluster.source("app", &repo).await;
    cluster
        .kustomization("app", json!({"retryInterval": "10m"}))
        .await;
    cluster.applied("app", &first).await;
    let changed = config_map("a", "2");
    let unknown_field = "apiVersion: apps/v1\nkind: Deployment\nmetadata:\n  name: web\n  namespace: prod\nspec:\n  replica: 2\n  selector:\n    matchLabels: {app: web}\n  template:\n    metadata:\n      labels: {app: web}\n    spec:\n      containers:\n      - name: app\n        image: x\n";
    let overlay = "resources:\n- a.yaml\n- ../nowhere\n";
    let cases: &[(&[(&str, &str)], &str, &[&str])] = &[
        (
            &[
                ("deploy/a.yaml", &changed),
                (
                    "deploy/b.yaml",
                    "apiVersion: v1\nkind: ConfigMap\n  bad: indent\n",
                ),
            ],
            "BuildFailed",
            &["deploy/b.yaml:3", "mapping"],
        ),
        (
            &[
                ("deploy/a.yaml", &changed),
                ("deploy/kustomization.yaml", overlay),
            ],
            "BuildFailed",
            &["nowhere"],
        ),
        (
            &[("deploy/a.yaml", &changed), ("deploy/web.yaml", unknown_field)],
            "ReconciliationFailed",
            &["Deployment/prod/web", "replica", "deploy/web.yaml:7"],
        ),
        (
            &[("other/a.yaml", &changed)],
            "BuildFailed",
            &["kustomization path not found", "deploy"],
        ),
    ];
    for (files, reason, parts) in cases {
        let revision = repo.push(files);
        let ks = cluster
            .ks("app", &format!("refusing {files:?}"), move |k| {
                k.status.as_ref().and_then(|s| s.last_attempted_revision.as_ref()) == Some(&revision)
                    && condition(k, "Ready").is_some_and(|(s, ..)| s == "False")
            })
            .await;
        let (_, got, message) = condition(&ks, "Ready").unwrap();
        assert_eq!(got, *reason, "{message}");
        for part in *parts {
            assert!(message.contains(part), "'{part}' is not in: {message}");
        }
        assert_eq!(
            ks.status.unwrap().last_applied_revision.as_deref(),
            Some(first.as_str())
        );
        assert_eq!(
            cluster.config_map("a").await.unwrap().data.unwrap()["key"],
            "1",
            "nothing of a bad revision is applied"
        );
    }
    let last = repo.push(&[("deploy/a.yaml", &changed)]);
    cluster.applied("app", &last).await;
    assert_eq!(cluster.config_map("a").await.unwrap().data.unwrap()["key"], "2");
    cluster.stop().await;
}

#[tokio::test]
async fn what_is_not_honoured_is_refused_by_name_and_a_cycle_is_told_as_a_path() {
    let cluster = Cluster::start().await;
    let repo = cluster.repository("app");
    repo.push(&[("deploy/a.yaml", &config_map("a", "1"))]);
    cluster.source("app", &repo).await;
    cluster
        .kustomization("tenant", json!({"serviceAccountName": "someone"}))
        .await;
    let message = cluster.not_ready("tenant", "FieldsRefused").await;
    assert!(
        message.contains("spec.serviceAccountName is refused"),
        "{message}"
    );
    let ks = cluster.api::<Kustomization>(NS).get("tenant").await.unwrap();
    assert_eq!(condition(&ks, "FullyHonoured").unwrap().0, "False");
    assert_eq!(condition(&ks, "Stalled").unwrap().0, "True");
    cluster
        .kustomization("x", json!({"dependsOn": [{"name": "y"}]}))
        .await;
    cluster
        .kustomization("y", json!({"dependsOn": [{"name": "x"}]}))
        .await;
    let ks = cluster
        .ks("y", "in a cycle", |k| condition(k, "Stalled").is_some())
        .await;
    assert_eq!(
        condition(&ks, "Ready").unwrap().2,
        "dependency cycle: flux-system/y -> flux-system/x -> flux-system/y"
    );
    assert!(cluster.config_map("a").await.is_none());
    cluster.stop().await;
}

#[tokio::test]
async fn an_immutable_change_fails_and_is_made_by_recreation_where_that_is_allowed() {
    let cluster = Cluster::start().await;
    let repo = cluster.repository("app");
    let secret = |value: &str, annotations: &str| {
        format!(
            "apiVersion: v1\nkind: Secret\nmetadata:\n  name: s\n  namespace: prod\n{annotations}immutable: true\nstringData:\n  k: {value}\n"
        )
    };
    let first = repo.push(&[("deploy/s.yaml", &secret("one", ""))]);
    cluster.source("app", &repo).await;
    cluster
        .kustomization("app", json!({"retryInterval": "10m"}))
        .await;
    cluster.applied("app", &first).await;
    let before = cluster.api::<Secret>("prod").get("s").await.unwrap();
    repo.push(&[("deploy/s.yaml", &secret("two", ""))]);
    let message = cluster.not_ready("app", "ReconciliationFailed").await;
    assert!(
        message.contains("Secret/prod/s") && message.contains("immutable"),
        "{message}"
    );
    let third = repo.push(&[(
        "deploy/s.yaml",
        &secret(
            "two",
            "  annotations:\n    kustomize.toolkit.fluxcd.io/force: enabled\n",
        ),
    )]);
    cluster.applied("app", &third).await;
    let after = cluster.api::<Secret>("prod").get("s").await.unwrap();
    assert_ne!(after.metadata.uid, before.metadata.uid);
    assert_eq!(after.data.unwrap()["k"].0, b"two");
    cluster.stop().await;
}

#[tokio::test]
async fn a_prune_budget_stops_a_revision_that_would_delete_too_much() {
    let cluster = Cluster::start().await;
    let repo = cluster.repository("app");
    let maps: Vec<(String, String)> = ["a", "b", "c"]
        .iter()
        .map(|n| (format!("deploy/{n}.yaml"), config_map(n, "1")))
        .collect();
    let files: Vec<(&str, &str)> = maps.iter().map(|(p, c)| (p.as_str(), c.as_str())).collect();
    let first = repo.push(&files);
    cluster.source("app", &repo).await;
    cluster.kustomization("app", json!({})).await;
    cluster
        .merge::<Kustomization>(
            NS,
            "app",
            json!({"metadata": {"annotations": {"serin.dev/prune-max": "1"}}}),
        )
        .await;
    cluster.applied("app", &first).await;
    repo.push(&files[..1]);
    let message = cluster.not_ready("app", "PruneFailed").await;
    assert!(message.contains("would delete 2 objects"), "{message}");
    assert!(cluster.config_map("c").await.is_some());
    let third = repo.push(&files[..2]);
    cluster.applied("app", &third).await;
    assert!(cluster.config_map("c").await.is_none());
    cluster.stop().await;
}

#[tokio::test]
async fn fields_that_kubectl_set_are_taken_over_by_git() {
    let cluster = Cluster::start().await;
    let repo = cluster.repository("app");
    let by_hand = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "a", "namespace": "prod"}, "data": {"key": "hand", "extra": "hand"}});
    let params = PatchParams {
        field_manager: Some("kubectl".into()),
        ..PatchParams::apply("kubectl")
    };
    cluster
        .api::<ConfigMap>("prod")
        .patch("a", &params, &Patch::Apply(&by_hand))
        .await
        .unwrap();
    let revision = repo.push(&[("deploy/a.yaml", &config_map("a", "git"))]);
    cluster.source("app", &repo).await;
    cluster.kustomization("app", json!({})).await;
    cluster.applied("app", &revision).await;
    let a = until(cluster.api("prod"), "a", "as in git", |m: Option<&ConfigMap>| {
        m.and_then(|m| m.data.clone())
            .is_some_and(|d| d.get("key").map(String::as_str) == Some("git") && d.len() == 1)
    })
    .await
    .unwrap();
    assert_eq!(
        a.data.unwrap().get("extra"),
        None,
        "what kubectl set and git does not is removed"
    );
    let managers: Vec<String> = a
        .metadata
        .managed_fields
        .unwrap_or_default()
        .into_iter()
        .filter_map(|m| m.manager)
        .collect();
    assert!(!managers.contains(&"kubectl".to_string()), "{managers:?}");
    cluster.stop().await;
}
