//! From a push to applied, healthy objects.

use futures::StreamExt as _;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{ConfigMap, Event};
use kube::api::{DeleteParams, Patch, PatchParams};
use kube::runtime::watcher;
use serde_json::json;
use serin_crds::flux::kustomize::Kustomization;
use serin_gitops::What;

use crate::cluster::{Cluster, NS, condition, config_map, deployment, settle, until};

#[tokio::test]
async fn a_push_is_seen_and_applied_and_what_left_the_repository_is_pruned() {
    let mut cluster = Cluster::start().await;
    let repo = cluster.repository("app");
    let first = repo.push(&[
        ("deploy/a.yaml", &config_map("a", "1")),
        ("deploy/b.yaml", &config_map("b", "1")),
        ("deploy/sub/c.yml", &config_map("c", "1")),
    ]);
    cluster.source("app", &repo).await;
    cluster.kustomization("app", json!({})).await;
    let ks = cluster.applied("app", &first).await;
    let status = ks.status.unwrap();
    let ids: Vec<String> = status
        .inventory
        .unwrap()
        .entries
        .into_iter()
        .map(|e| e.id)
        .collect();
    assert_eq!(
        ids,
        ["prod_a__ConfigMap", "prod_b__ConfigMap", "prod_c__ConfigMap"]
    );
    assert_eq!(status.history.len(), 1);
    let a = cluster.config_map("a").await.unwrap();
    let labels = a.metadata.labels.clone().unwrap();
    assert_eq!(labels["kustomize.toolkit.fluxcd.io/name"], "app");
    assert_eq!(labels["kustomize.toolkit.fluxcd.io/namespace"], NS);

    let second = repo.push(&[
        ("deploy/a.yaml", &config_map("a", "1")),
        ("deploy/c.yml", &config_map("c", "2")),
    ]);
    let moment = cluster
        .moment("applied", |m| {
            m.revision == second && matches!(m.what, What::Applied { .. })
        })
        .await;
    let What::Applied {
        created,
        configured,
        deleted,
        unchanged,
    } = moment.what
    else {
        unreachable!()
    };
    assert_eq!(
        (created.len(), configured, deleted, unchanged),
        (
            0,
            vec!["ConfigMap/prod/c".to_string()],
            vec!["ConfigMap/prod/b".to_string()],
            1
        )
    );
    let ks = cluster.applied("app", &second).await;
    assert_eq!(ks.status.unwrap().inventory.unwrap().entries.len(), 2);
    assert!(cluster.config_map("b").await.is_none());
    let after = cluster.config_map("a").await.unwrap();
    assert_eq!(
        after.metadata.resource_version, a.metadata.resource_version,
        "an unchanged object is not written"
    );
    cluster.stop().await;
}

#[tokio::test]
async fn waiting_for_health_ends_by_an_event_and_a_newer_revision_supersedes_it() {
    let cluster = Cluster::start().await;
    let repo = cluster.repository("app");
    repo.push(&[("deploy/web.yaml", &deployment("web", "web:broken"))]);
    cluster.source("app", &repo).await;
    cluster
        .kustomization("app", json!({"wait": true, "timeout": "10m"}))
        .await;
    cluster
        .ks("app", "waiting for health", |k| {
            condition(k, "Healthy").is_some_and(|(s, ..)| s == "Unknown")
        })
        .await;

    let second = repo.push(&[("deploy/web.yaml", &deployment("web", "web:2"))]);
    let api = cluster.api::<Deployment>("prod");
    until(
        api,
        "web",
        "changed while the first revision was waited for",
        |d: Option<&Deployment>| {
            let image = d.and_then(|d| {
                d.spec.as_ref()?.template.spec.as_ref()?.containers[0]
                    .image
                    .clone()
            });
            image.as_deref() == Some("web:2")
        },
    )
    .await;
    settle(&cluster, "web").await;
    let ks = cluster.applied("app", &second).await;
    assert_eq!(condition(&ks, "Healthy").unwrap().0, "True");
    assert_eq!(condition(&ks, "Reconciling"), None);
    cluster.stop().await;
}

#[tokio::test]
async fn an_object_that_fails_makes_its_kustomization_unhealthy_and_its_recovery_makes_it_ready() {
    let cluster = Cluster::start().await;
    let repo = cluster.repository("app");
    let revision = repo.push(&[("deploy/web.yaml", &deployment("web", "web:1"))]);
    cluster.source("app", &repo).await;
    cluster.kustomization("app", json!({"wait": true})).await;
    cluster
        .ks("app", "waiting for health", |k| condition(k, "Healthy").is_some())
        .await;
    let api = cluster.api::<Deployment>("prod");
    let generation = api.get("web").await.unwrap().metadata.generation;
    let stuck = json!({"status": {"observedGeneration": generation, "conditions": [
        {"type": "Progressing", "status": "False", "reason": "ProgressDeadlineExceeded", "message": "no progress"}]}});
    api.patch_status("web", &PatchParams::default(), &Patch::Merge(stuck))
        .await
        .unwrap();
    let message = cluster.not_ready("app", "HealthCheckFailed").await;
    assert!(
        message.contains("Deployment/prod/web status: 'Failed': no progress"),
        "{message}"
    );
    settle(&cluster, "web").await;
    cluster.applied("app", &revision).await;
    cluster.stop().await;
}

#[tokio::test]
async fn dependencies_are_applied_in_order_each_on_the_same_revision() {
    let mut cluster = Cluster::start().await;
    let repo = cluster.repository("app");
    let names = ["one", "two", "three", "four", "five"];
    let files = |value: &str| -> Vec<(String, String)> {
        names
            .iter()
            .map(|n| (format!("{n}/map.yaml"), config_map(n, value)))
            .collect()
    };
    let push = |value: &str| {
        let files = files(value);
        let files: Vec<(&str, &str)> = files.iter().map(|(p, c)| (p.as_str(), c.as_str())).collect();
        repo.push(&files)
    };
    let first = push("1");
    cluster.source("app", &repo).await;
    for (i, name) in names.iter().enumerate().rev() {
        let depends = if i == 0 {
            json!([])
        } else {
            json!([{"name": names[i - 1]}])
        };
        cluster
            .kustomization(name, json!({"path": name, "dependsOn": depends}))
            .await;
    }
    cluster.applied("five", &first).await;
    let second = push("2");
    cluster.applied("five", &second).await;
    let mut order = Vec::new();
    while order.len() < names.len() {
        let moment = cluster
            .moment("applied", |m| {
                m.revision == second && matches!(m.what, What::Applied { .. })
            })
            .await;
        order.push(moment.object.rsplit('/').next().unwrap().to_string());
    }
    assert_eq!(order, names);
    cluster.stop().await;
}

#[tokio::test]
async fn drift_is_corrected_and_a_deleted_object_comes_back() {
    let cluster = Cluster::start().await;
    let repo = cluster.repository("app");
    let revision = repo.push(&[
        ("deploy/a.yaml", &config_map("a", "git")),
        ("deploy/b.yaml", &config_map("b", "git")),
    ]);
    cluster.source("app", &repo).await;
    cluster.kustomization("app", json!({})).await;
    cluster.applied("app", &revision).await;
    let value_is = |want: &'static str| {
        move |m: Option<&ConfigMap>| {
            m.and_then(|m| m.data.as_ref()?.get("key").cloned()).as_deref() == Some(want)
        }
    };
    cluster
        .merge::<ConfigMap>("prod", "a", json!({"data": {"key": "by hand", "theirs": "kept"}}))
        .await;
    let a = until(cluster.api("prod"), "a", "what git says", value_is("git"))
        .await
        .unwrap();
    assert_eq!(
        a.data.unwrap().get("theirs").map(String::as_str),
        Some("kept"),
        "what git does not speak of is left alone"
    );
    cluster
        .api::<ConfigMap>("prod")
        .delete("b", &DeleteParams::default())
        .await
        .unwrap();
    until(cluster.api("prod"), "b", "there again", value_is("git")).await;
    cluster.stop().await;
}

#[tokio::test]
async fn a_revision_that_changes_nothing_here_writes_no_object_and_a_restart_writes_nothing() {
    let mut cluster = Cluster::start().await;
    let repo = cluster.repository("app");
    let map = config_map("a", "1");
    let first = repo.push(&[("deploy/a.yaml", &map), ("other/x.yaml", "a: 1")]);
    cluster.source("app", &repo).await;
    cluster.kustomization("app", json!({})).await;
    cluster.applied("app", &first).await;
    let before = cluster.config_map("a").await.unwrap();
    let second = repo.push(&[("deploy/a.yaml", &map), ("other/x.yaml", "a: 2")]);
    let ks = cluster.applied("app", &second).await;
    assert_eq!(ks.status.unwrap().history.len(), 1, "the same result");
    assert_eq!(
        cluster.config_map("a").await.unwrap().metadata.resource_version,
        before.metadata.resource_version
    );

    cluster.stop_controllers().await;
    cluster.writes.lock().clear();
    cluster.start_controllers();
    let moment = cluster
        .moment("applied after the restart", |m| {
            matches!(m.what, What::Applied { .. })
        })
        .await;
    assert!(
        matches!(moment.what, What::Applied { unchanged: 1, .. }),
        "{moment:?}"
    );
    cluster.stop_controllers().await;
    assert_eq!(
        *cluster.writes.lock(),
        Vec::<String>::new(),
        "everything was as it should be"
    );
    cluster.stop().await;
}

#[tokio::test]
async fn definitions_are_established_before_their_objects_are_applied() {
    let cluster = Cluster::start().await;
    let repo = cluster.repository("app");
    let definition = "apiVersion: apiextensions.k8s.io/v1\nkind: CustomResourceDefinition\nmetadata:\n  name: things.example.com\nspec:\n  group: example.com\n  names: {kind: Thing, plural: things}\n  scope: Namespaced\n  versions:\n  - name: v1\n    served: true\n    storage: true\n    schema:\n      openAPIV3Schema:\n        type: object\n        properties:\n          spec:\n            type: object\n            properties:\n              size: {type: integer}\n";
    let thing = "apiVersion: example.com/v1\nkind: Thing\nmetadata:\n  name: one\n  namespace: fresh\nspec:\n  size: 3\n";
    let namespace = "apiVersion: v1\nkind: Namespace\nmetadata:\n  name: fresh\n";
    let revision = repo.push(&[
        ("deploy/a-thing.yaml", thing),
        ("deploy/definition.yaml", definition),
        ("deploy/namespace.yaml", namespace),
    ]);
    cluster.source("app", &repo).await;
    cluster.kustomization("app", json!({})).await;
    let ks = cluster.applied("app", &revision).await;
    let ids: Vec<String> = ks
        .status
        .unwrap()
        .inventory
        .unwrap()
        .entries
        .into_iter()
        .map(|e| e.id)
        .collect();
    assert_eq!(
        ids,
        [
            "_fresh__Namespace",
            "_things.example.com_apiextensions.k8s.io_CustomResourceDefinition",
            "fresh_one_example.com_Thing"
        ]
    );
    cluster.stop().await;
}

#[tokio::test]
async fn deleting_a_kustomization_prunes_unless_the_policy_orphans_or_an_object_is_protected() {
    let cluster = Cluster::start().await;
    let repo = cluster.repository("app");
    let kept = config_map("kept", "1").replace(
        "  namespace: prod\n",
        "  namespace: prod\n  annotations:\n    kustomize.toolkit.fluxcd.io/prune: disabled\n",
    );
    let revision = repo.push(&[
        ("one/a.yaml", &config_map("a", "1")),
        ("one/kept.yaml", &kept),
        ("two/b.yaml", &config_map("b", "1")),
    ]);
    cluster.source("app", &repo).await;
    cluster.kustomization("one", json!({"path": "one"})).await;
    cluster
        .kustomization("two", json!({"path": "two", "deletionPolicy": "Orphan"}))
        .await;
    cluster.applied("one", &revision).await;
    cluster.applied("two", &revision).await;
    let api = cluster.api::<Kustomization>(NS);
    for name in ["one", "two"] {
        api.delete(name, &DeleteParams::default()).await.unwrap();
        until(api.clone(), name, "gone", |k: Option<&Kustomization>| k.is_none()).await;
    }
    assert!(cluster.config_map("a").await.is_none());
    assert!(cluster.config_map("kept").await.is_some());
    assert!(cluster.config_map("b").await.is_some());
    cluster.stop().await;
}

#[tokio::test]
async fn variables_come_from_the_spec_and_from_config_maps_and_follow_their_changes() {
    let cluster = Cluster::start().await;
    let repo = cluster.repository("app");
    let revision = repo.push(&[("deploy/a.yaml", &config_map("a", "${color} ${size:=small}"))]);
    cluster.source("app", &repo).await;
    cluster
        .create(
            json!({"apiVersion": "v1", "kind": "ConfigMap", "data": {"color": "red"},
        "metadata": {"name": "vars", "namespace": NS, "labels": {"reconcile.fluxcd.io/watch": "Enabled"}}}),
        )
        .await;
    cluster
        .kustomization(
            "app",
            json!({"postBuild": {"substituteFrom": [{"kind": "ConfigMap", "name": "vars"}]}}),
        )
        .await;
    cluster.applied("app", &revision).await;
    let value = |m: Option<&ConfigMap>| m.and_then(|m| m.data.as_ref()?.get("key").cloned());
    assert_eq!(
        value(cluster.config_map("a").await.as_ref()).as_deref(),
        Some("red small")
    );
    cluster
        .merge::<ConfigMap>(NS, "vars", json!({"data": {"color": "blue"}}))
        .await;
    until(
        cluster.api("prod"),
        "a",
        "substituted anew",
        |m: Option<&ConfigMap>| value(m).as_deref() == Some("blue small"),
    )
    .await;
    cluster.stop().await;
}

#[tokio::test]
async fn a_request_by_annotation_is_handled_and_echoed_and_a_suspended_object_rests() {
    let cluster = Cluster::start().await;
    let repo = cluster.repository("app");
    let first = repo.push(&[("deploy/a.yaml", &config_map("a", "1"))]);
    cluster.source("app", &repo).await;
    cluster.kustomization("app", json!({})).await;
    cluster.applied("app", &first).await;
    let request = |at: &str| json!({"metadata": {"annotations": {"reconcile.fluxcd.io/requestedAt": at}}});
    cluster.merge::<Kustomization>(NS, "app", request("now")).await;
    let handled = |at: &'static str| {
        move |k: &Kustomization| {
            k.status
                .as_ref()
                .and_then(|s| s.last_handled_reconcile_at.as_deref())
                == Some(at)
        }
    };
    cluster.ks("app", "handled", handled("now")).await;
    cluster
        .merge::<Kustomization>(NS, "app", json!({"spec": {"suspend": true}}))
        .await;
    let second = repo.push(&[("deploy/a.yaml", &config_map("a", "2"))]);
    cluster
        .git("app", "at the second revision", move |g| {
            g.status
                .as_ref()
                .and_then(|s| s.artifact.as_ref())
                .is_some_and(|a| a.revision == second)
        })
        .await;
    assert_eq!(cluster.config_map("a").await.unwrap().data.unwrap()["key"], "1");
    cluster
        .merge::<Kustomization>(NS, "app", json!({"spec": {"suspend": false}}))
        .await;
    until(
        cluster.api("prod"),
        "a",
        "applied after resuming",
        |m: Option<&ConfigMap>| m.and_then(|m| m.data.as_ref()?.get("key").cloned()).as_deref() == Some("2"),
    )
    .await;
    cluster.stop().await;
}

#[tokio::test]
async fn events_tell_what_a_revision_changed_and_one_that_changed_nothing_is_told_by_none() {
    let cluster = Cluster::start().await;
    let repo = cluster.repository("app");
    let first = repo.push(&[("deploy/a.yaml", &config_map("a", "1"))]);
    cluster.source("app", &repo).await;
    cluster.kustomization("app", json!({})).await;
    cluster.applied("app", &first).await;
    let idle = repo.push(&[("deploy/a.yaml", &config_map("a", "1")), ("README", "words")]);
    cluster.applied("app", &idle).await;
    let last = repo.push(&[("deploy/b.yaml", &config_map("b", "1"))]);
    cluster.applied("app", &last).await;
    let told = |event: &Event| {
        (event.involved_object.kind.as_deref() == Some("Kustomization")).then(|| {
            (
                event.reason.clone().unwrap_or_default(),
                event.message.clone().unwrap_or_default(),
            )
        })
    };
    let mut events = Vec::new();
    let mut watch = std::pin::pin!(watcher(cluster.api::<Event>(NS), watcher::Config::default()));
    let all = async {
        while let Some(event) = watch.next().await {
            if let Ok(watcher::Event::Apply(event) | watcher::Event::InitApply(event)) = event {
                events.extend(told(&event));
            }
            let succeeded = events.iter().filter(|(r, _)| r == "ReconciliationSucceeded");
            if succeeded.count() == 2 {
                break;
            }
        }
    };
    tokio::time::timeout(std::time::Duration::from_secs(30), all)
        .await
        .expect("both revisions are told");
    let changes: Vec<&str> = events
        .iter()
        .filter(|(reason, _)| reason == "Progressing")
        .map(|(_, message)| message.as_str())
        .collect();
    assert_eq!(
        changes,
        [
            "ConfigMap/prod/a created",
            "ConfigMap/prod/b created\nConfigMap/prod/a deleted"
        ],
        "{events:#?}"
    );
    assert!(
        events.iter().all(|(_, message)| !message.contains(&idle)),
        "{events:#?}"
    );
    cluster.stop().await;
}

#[tokio::test]
async fn health_is_looked_at_where_it_is_asked_for_and_by_expressions() {
    let cluster = Cluster::start().await;
    let repo = cluster.repository("app");
    let map = config_map("a", "starting");
    let first = repo.push(&[
        ("deploy/a.yaml", &map),
        ("deploy/web.yaml", &deployment("web", "web:1")),
    ]);
    cluster.source("app", &repo).await;
    let check = json!([{"apiVersion": "apps/v1", "kind": "Deployment", "name": "web", "namespace": "prod"}]);
    cluster
        .kustomization("listed", json!({"healthChecks": check}))
        .await;
    cluster
        .ks("listed", "waiting for health", |k| {
            condition(k, "Healthy").is_some()
        })
        .await;
    settle(&cluster, "web").await;
    cluster.applied("listed", &first).await;

    // The same objects, handed over, judged by the user's words.
    let words = json!([{"apiVersion": "v1", "kind": "ConfigMap", "current": "data.key == 'done'", "failed": "data.key == 'broken'"}]);
    cluster
        .merge::<Kustomization>(NS, "listed", json!({"spec": {"suspend": true}}))
        .await;
    cluster
        .kustomization("judged", json!({"wait": true, "healthCheckExprs": words}))
        .await;
    cluster
        .ks("judged", "waiting for health", |k| {
            condition(k, "Healthy").is_some()
        })
        .await;
    repo.push(&[
        ("deploy/a.yaml", &config_map("a", "broken")),
        ("deploy/web.yaml", &deployment("web", "web:1")),
    ]);
    let message = cluster.not_ready("judged", "HealthCheckFailed").await;
    assert!(message.contains("ConfigMap/prod/a status: 'Failed'"), "{message}");
    let done = repo.push(&[
        ("deploy/a.yaml", &config_map("a", "done")),
        ("deploy/web.yaml", &deployment("web", "web:1")),
    ]);
    cluster.applied("judged", &done).await;
    cluster.stop().await;
}

#[tokio::test]
async fn a_deletion_that_waits_for_termination_ends_when_the_last_object_is_gone() {
    let cluster = Cluster::start().await;
    let repo = cluster.repository("app");
    let held = config_map("a", "1").replace(
        "  namespace: prod\n",
        "  namespace: prod\n  finalizers: [example.com/hold]\n",
    );
    let revision = repo.push(&[("deploy/a.yaml", &held)]);
    cluster.source("app", &repo).await;
    cluster
        .kustomization(
            "app",
            json!({"deletionPolicy": "WaitForTermination", "timeout": "10m"}),
        )
        .await;
    cluster.applied("app", &revision).await;
    let api = cluster.api::<Kustomization>(NS);
    api.delete("app", &DeleteParams::default()).await.unwrap();
    until(
        cluster.api("prod"),
        "a",
        "being deleted",
        |m: Option<&ConfigMap>| m.is_some_and(|m| m.metadata.deletion_timestamp.is_some()),
    )
    .await;
    assert!(api.get_opt("app").await.unwrap().is_some(), "it waits");
    cluster
        .merge::<ConfigMap>("prod", "a", json!({"metadata": {"finalizers": null}}))
        .await;
    until(api, "app", "gone", |k: Option<&Kustomization>| k.is_none()).await;
    cluster.stop().await;
}

#[tokio::test]
async fn a_controller_that_dies_in_the_middle_of_an_apply_leaves_nothing_unknown() {
    let mut cluster = Cluster::start().await;
    let repo = cluster.repository("app");
    let maps: Vec<(String, String)> = (0..60)
        .map(|i| (format!("deploy/m{i}.yaml"), config_map(&format!("m{i}"), "1")))
        .collect();
    let files: Vec<(&str, &str)> = maps.iter().map(|(p, c)| (p.as_str(), c.as_str())).collect();
    repo.push(&files);
    cluster.source("app", &repo).await;
    cluster.kustomization("app", json!({})).await;
    until(
        cluster.api("prod"),
        "m59",
        "there, with others missing",
        |m: Option<&ConfigMap>| m.is_some(),
    )
    .await;
    cluster.stop_controllers().await;
    let api = cluster.api::<ConfigMap>("prod");
    let ks = cluster.api::<Kustomization>(NS).get("app").await.unwrap();
    let known = ks.status.unwrap().inventory.unwrap().entries;
    let labelled = kube::api::ListParams::default().labels("kustomize.toolkit.fluxcd.io/name=app");
    for map in api.list(&labelled).await.unwrap() {
        let id = format!("prod_{}__ConfigMap", map.metadata.name.unwrap());
        assert!(
            known.iter().any(|e| e.id == id),
            "{id} was applied and is not in the inventory"
        );
    }
    let last = repo.push(&files[..3]);
    cluster.start_controllers();
    cluster.applied("app", &last).await;
    assert_eq!(
        api.list(&labelled).await.unwrap().items.len(),
        3,
        "what the dead controller applied is pruned"
    );
    cluster.stop().await;
}

#[tokio::test]
async fn a_controller_that_scales_a_workload_is_not_fought_and_a_person_is_corrected() {
    let cluster = Cluster::start().await;
    let repo = cluster.repository("app");
    let web = |image: &str| {
        deployment("web", image).replace("spec:\n  selector", "spec:\n  replicas: 2\n  selector")
    };
    let first = repo.push(&[("deploy/web.yaml", &web("web:1"))]);
    cluster.source("app", &repo).await;
    cluster.kustomization("app", json!({})).await;
    cluster.applied("app", &first).await;
    let api = cluster.api::<Deployment>("prod");
    let scale = |manager: &'static str, replicas: i32| {
        let params = PatchParams {
            field_manager: Some(manager.into()),
            ..Default::default()
        };
        let api = api.clone();
        async move {
            api.patch(
                "web",
                &params,
                &Patch::Merge(json!({"spec": {"replicas": replicas}})),
            )
            .await
            .unwrap()
        }
    };
    let has = |replicas: i32, image: &'static str| {
        move |d: Option<&Deployment>| {
            let spec = d.and_then(|d| d.spec.as_ref());
            spec.is_some_and(|s| {
                s.replicas == Some(replicas)
                    && s.template.spec.as_ref().unwrap().containers[0].image.as_deref() == Some(image)
            })
        }
    };
    scale("kubectl-edit", 7).await;
    until(api.clone(), "web", "as git says", has(2, "web:1")).await;
    scale("canary-controller", 0).await;
    let second = repo.push(&[("deploy/web.yaml", &web("web:2"))]);
    cluster.applied("app", &second).await;
    until(api.clone(), "web", "changed but for its scale", has(0, "web:2")).await;
    cluster.stop().await;
}
