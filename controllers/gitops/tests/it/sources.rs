//! Git servers: good, hanging and gone.

use std::net::TcpListener;
use std::time::Duration;

use axum::body::Body;
use http::{Request, StatusCode};
use serde_json::json;
use serin_crds::flux::notification::Receiver;
use serin_crds::flux::source::GitRepository;
use serin_gitops::Receivers;
use tokio_util::sync::CancellationToken;
use tower::ServiceExt as _;

use crate::cluster::{Cluster, NS, condition, config_map, until};

#[tokio::test]
async fn a_server_that_never_answers_does_not_hold_up_other_sources() {
    let cluster = Cluster::start().await;
    // Accepts connections by its backlog and never reads.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/repo.git", silent.local_addr().unwrap());
    for i in 0..12 {
        cluster
            .create(json!({"apiVersion": "source.toolkit.fluxcd.io/v1", "kind": "GitRepository",
                "metadata": {"name": format!("hanging-{i}"), "namespace": NS}, "spec": {"url": url, "interval": "10m", "timeout": "1s"}}))
            .await;
    }
    let repo = cluster.repository("app");
    let revision = repo.push(&[("deploy/a.yaml", &config_map("a", "1"))]);
    cluster.source("app", &repo).await;
    cluster.kustomization("app", json!({})).await;
    cluster.applied("app", &revision).await;
    let hanging = cluster
        .git("hanging-0", "timed out", |g| {
            condition(g, "FetchFailed").is_some_and(|(s, ..)| s == "True")
        })
        .await;
    let (status, _, message) = condition(&hanging, "Ready").unwrap();
    assert_eq!(status, "False");
    assert!(message.contains("no answer within 1 s"), "{message}");
    cluster.stop().await;
}

#[tokio::test]
async fn a_repository_that_vanishes_is_stale_and_a_restart_still_knows_its_last_revision() {
    let mut cluster = Cluster::start().await;
    let repo = cluster.repository("app");
    let revision = repo.push(&[("deploy/a.yaml", &config_map("a", "1"))]);
    cluster.source("app", &repo).await;
    cluster.kustomization("app", json!({})).await;
    cluster.applied("app", &revision).await;
    cluster.stop_controllers().await;
    std::fs::rename(repo.path(), cluster.dir.path().join("elsewhere")).unwrap();
    cluster.start_controllers();
    let source = cluster
        .git("app", "stale", |g| condition(g, "FetchFailed").is_some())
        .await;
    assert_eq!(source.status.unwrap().artifact.unwrap().revision, revision);
    // Built from the cache: what is missing comes back although the repository is away.
    let api = cluster.api::<k8s_openapi::api::core::v1::ConfigMap>("prod");
    api.delete("a", &Default::default()).await.unwrap();
    until(
        api,
        "a",
        "there again",
        |m: Option<&k8s_openapi::api::core::v1::ConfigMap>| m.is_some(),
    )
    .await;
    std::fs::rename(cluster.dir.path().join("elsewhere"), repo.path()).unwrap();
    let request = json!({"metadata": {"annotations": {"reconcile.fluxcd.io/requestedAt": "again"}}});
    cluster.merge::<GitRepository>(NS, "app", request).await;
    cluster
        .git("app", "ready again", |g| {
            condition(g, "Ready").is_some_and(|(s, ..)| s == "True")
        })
        .await;
    cluster.stop().await;
}

#[tokio::test]
async fn references_that_do_not_exist_and_specs_that_cannot_work_say_so() {
    let cluster = Cluster::start().await;
    let repo = cluster.repository("app");
    repo.push(&[("a.yaml", "x")]);
    let path = repo.path().display().to_string();
    for (name, spec, part, stalled) in [
        (
            "branch",
            json!({"url": path, "interval": "10m", "ref": {"branch": "prod"}}),
            "branch 'prod' not found; there is main",
            false,
        ),
        (
            "range",
            json!({"url": path, "interval": "10m", "ref": {"semver": "abc"}}),
            "'abc' in the semver range",
            true,
        ),
        (
            "ssh",
            json!({"url": "ssh://git@127.0.0.1/x", "interval": "10m"}),
            "spec.secretRef is required",
            true,
        ),
        (
            "secret",
            json!({"url": "https://127.0.0.1/x", "interval": "10m", "secretRef": {"name": "none"}}),
            "Secret 'flux-system/none': not found",
            false,
        ),
        (
            "verify",
            json!({"url": path, "interval": "10m", "verify": {"secretRef": {"name": "keys"}}}),
            "spec.verify is refused",
            true,
        ),
    ] {
        cluster
            .create(json!({"apiVersion": "source.toolkit.fluxcd.io/v1", "kind": "GitRepository", "metadata": {"name": name, "namespace": NS}, "spec": spec}))
            .await;
        let source = cluster
            .git(name, "not ready", |g| {
                condition(g, "Ready").is_some_and(|(s, ..)| s == "False")
            })
            .await;
        let message = condition(&source, "Ready").unwrap().2;
        assert!(message.contains(part), "{message}");
        assert_eq!(condition(&source, "Stalled").is_some(), stalled, "{name}");
    }
    cluster.stop().await;
}

#[tokio::test]
async fn a_webhook_makes_its_sources_look_at_once_and_strangers_get_nothing() {
    let cluster = Cluster::start().await;
    let repo = cluster.repository("app");
    repo.push(&[("deploy/a.yaml", &config_map("a", "1"))]);
    cluster.source("app", &repo).await;
    cluster
        .git("app", "ready", |g| {
            condition(g, "Ready").is_some_and(|(s, ..)| s == "True")
        })
        .await;
    cluster.create(json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "hook", "namespace": NS}, "stringData": {"token": "t0ken"}})).await;
    cluster
        .create(json!({"apiVersion": "notification.toolkit.fluxcd.io/v1", "kind": "Receiver", "metadata": {"name": "hook", "namespace": NS},
            "spec": {"type": "generic-hmac", "secretRef": {"name": "hook"}, "resources": [{"kind": "GitRepository", "name": "app"}]}}))
        .await;
    let cancel = CancellationToken::new();
    let receivers = Receivers::new(cluster.client.clone(), cancel.clone());
    let running = {
        let (receivers, cancel) = (receivers.clone(), cancel.clone());
        tokio::spawn(async move { receivers.run(cancel).await })
    };
    let receiver = until(cluster.api(NS), "hook", "ready", |r: Option<&Receiver>| {
        r.is_some_and(|r| r.status.as_ref().is_some_and(|s| s.webhook_path.is_some()))
    })
    .await
    .unwrap();
    let path = receiver.status.unwrap().webhook_path.unwrap();
    let call = |path: String, signature: Option<String>, body: &'static [u8]| {
        let router = receivers.router();
        async move {
            let mut request = Request::post(path);
            if let Some(signature) = signature {
                request = request.header("X-Signature", signature);
            }
            router
                .oneshot(request.body(Body::from(body)).unwrap())
                .await
                .unwrap()
                .status()
        }
    };
    let key = aws_lc_rs::hmac::Key::new(aws_lc_rs::hmac::HMAC_SHA256, b"t0ken");
    let tag = aws_lc_rs::hmac::sign(&key, b"{}");
    let mut signature = "sha256=".to_string();
    for byte in tag.as_ref() {
        signature.push_str(&format!("{byte:02x}"));
    }
    assert_eq!(call(path.clone(), None, b"{}").await, StatusCode::BAD_REQUEST);
    assert_eq!(
        call(path.clone(), Some(signature.clone()), b"{ }").await,
        StatusCode::BAD_REQUEST
    );
    assert_eq!(
        call("/hook/0123".into(), Some(signature.clone()), b"{}").await,
        StatusCode::NOT_FOUND
    );
    static LARGE: [u8; 4 << 20] = [b'x'; 4 << 20];
    assert_eq!(
        call(path.clone(), Some(signature.clone()), &LARGE).await,
        StatusCode::PAYLOAD_TOO_LARGE
    );
    let before = cluster.api::<GitRepository>(NS).get("app").await.unwrap();
    assert!(
        before.metadata.annotations.is_none(),
        "no refused call has an effect"
    );
    assert_eq!(call(path, Some(signature), b"{}").await, StatusCode::OK);
    cluster
        .git("app", "handling the call", |g| {
            g.status
                .as_ref()
                .is_some_and(|s| s.last_handled_reconcile_at.is_some())
        })
        .await;
    cancel.cancel();
    tokio::time::timeout(Duration::from_secs(10), running)
        .await
        .unwrap()
        .unwrap();
    cluster.stop().await;
}

#[tokio::test]
async fn a_suspended_source_stays_where_it_is_until_it_is_resumed() {
    let cluster = Cluster::start().await;
    let repo = cluster.repository("app");
    let first = repo.push(&[("a.yaml", &config_map("a", "1"))]);
    let at = |revision: &str| {
        let revision = revision.to_owned();
        move |g: &GitRepository| {
            let artifact = g.status.as_ref().and_then(|s| s.artifact.as_ref());
            artifact.is_some_and(|a| a.revision == revision)
        }
    };
    for name in ["app", "other"] {
        cluster.source(name, &repo).await;
        cluster.git(name, "at the first revision", at(&first)).await;
    }
    let suspend = |yes: bool| json!({"spec": {"suspend": yes}, "metadata": {"annotations": {"reconcile.fluxcd.io/requestedAt": "now"}}});
    cluster.merge::<GitRepository>(NS, "app", suspend(true)).await;
    let second = repo.push(&[("a.yaml", &config_map("a", "2"))]);
    cluster.git("other", "at the second revision", at(&second)).await;
    let suspended = cluster.api::<GitRepository>(NS).get("app").await.unwrap();
    assert!(at(&first)(&suspended), "{suspended:?}");
    assert_eq!(suspended.status.unwrap().last_handled_reconcile_at, None);
    cluster.merge::<GitRepository>(NS, "app", suspend(false)).await;
    let resumed = cluster.git("app", "at the second revision", at(&second)).await;
    assert_eq!(
        resumed.status.unwrap().last_handled_reconcile_at.as_deref(),
        Some("now")
    );
    cluster.stop().await;
}

#[tokio::test]
async fn a_suspended_receiver_answers_nobody_until_it_is_resumed() {
    let cluster = Cluster::start().await;
    let repo = cluster.repository("app");
    repo.push(&[("deploy/a.yaml", &config_map("a", "1"))]);
    cluster.source("app", &repo).await;
    cluster.create(json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "hook", "namespace": NS}, "stringData": {"token": "t0ken"}})).await;
    cluster
        .create(json!({"apiVersion": "notification.toolkit.fluxcd.io/v1", "kind": "Receiver", "metadata": {"name": "hook", "namespace": NS},
            "spec": {"type": "generic", "interval": "1m", "suspend": true, "secretRef": {"name": "hook"}, "resources": [{"kind": "GitRepository", "name": "app"}]}}))
        .await;
    let cancel = CancellationToken::new();
    let receivers = Receivers::new(cluster.client.clone(), cancel.clone());
    let running = {
        let (receivers, cancel) = (receivers.clone(), cancel.clone());
        tokio::spawn(async move { receivers.run(cancel).await })
    };
    let suspend = |yes: bool| json!({"spec": {"suspend": yes}});
    let hook: Receiver = cluster.merge(NS, "hook", suspend(false)).await;
    assert!(hook.status.is_none_or(|s| s.webhook_path.is_none()));
    let receiver = until(cluster.api(NS), "hook", "ready", |r: Option<&Receiver>| {
        r.is_some_and(|r| r.status.as_ref().is_some_and(|s| s.webhook_path.is_some()))
    })
    .await
    .unwrap();
    let path = receiver.status.unwrap().webhook_path.unwrap();
    let call = || async {
        let request = Request::post(path.as_str()).body(Body::empty()).unwrap();
        receivers.router().oneshot(request).await.unwrap().status()
    };
    assert_eq!(call().await, StatusCode::OK);
    cluster.merge::<Receiver>(NS, "hook", suspend(true)).await;
    let becomes = |wanted: StatusCode| async move {
        while call().await != wanted {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), becomes(StatusCode::NOT_FOUND))
        .await
        .expect("a suspended receiver is gone");
    cluster.merge::<Receiver>(NS, "hook", suspend(false)).await;
    tokio::time::timeout(Duration::from_secs(10), becomes(StatusCode::OK))
        .await
        .expect("a resumed receiver answers");
    cancel.cancel();
    tokio::time::timeout(Duration::from_secs(10), running)
        .await
        .unwrap()
        .unwrap();
    cluster.stop().await;
}

#[tokio::test]
async fn the_cache_of_a_source_goes_with_it_and_a_shared_one_stays() {
    let cluster = Cluster::start().await;
    let (one, two) = (cluster.repository("one"), cluster.repository("two"));
    for repo in [&one, &two] {
        repo.push(&[("a.yaml", "x: 1")]);
    }
    for (name, repo) in [("a", &one), ("b", &one), ("c", &two)] {
        cluster.source(name, repo).await;
        cluster
            .git(name, "ready", |g| {
                condition(g, "Ready").is_some_and(|(s, ..)| s == "True")
            })
            .await;
    }
    let caches = || {
        std::fs::read_dir(cluster.dir.path().join("cache"))
            .unwrap()
            .count()
    };
    assert_eq!(caches(), 2, "sources of one repository share a cache");
    let directory = cluster.dir.path().join("cache");
    let (send, events) = std::sync::mpsc::channel();
    let mut watcher = notify::recommended_watcher(move |_| {
        let _ = send.send(());
    })
    .unwrap();
    notify::Watcher::watch(&mut watcher, &directory, notify::RecursiveMode::NonRecursive).unwrap();
    let api = cluster.api::<GitRepository>(NS);
    for name in ["a", "c"] {
        api.delete(name, &kube::api::DeleteParams::default())
            .await
            .unwrap();
    }
    let gone = tokio::task::spawn_blocking(move || {
        while std::fs::read_dir(&directory).unwrap().count() > 1 {
            events.recv_timeout(Duration::from_secs(30)).unwrap();
        }
    });
    gone.await.unwrap();
    assert_eq!(caches(), 1);
    cluster.stop().await;
}
