//! A git server over http: git's own `http-backend` behind a small web server. Skipped where git is not installed.

use std::collections::HashMap;
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::response::Response;
use base64::Engine as _;
use http::{HeaderMap, Method, StatusCode, Uri};
use serde_json::json;
use serin_crds::flux::source::GitRepository;
use tokio::io::AsyncWriteExt as _;

use crate::cluster::{Cluster, NS, Repository, condition, config_map};

#[derive(Clone)]
struct Served {
    root: PathBuf,
    /// `Basic …` or `Bearer …`; everything else gets 401.
    authorization: Option<String>,
    sent_bytes: Arc<AtomicU64>,
}

fn git_is_here() -> bool {
    let here = std::process::Command::new("git")
        .arg("--version")
        .stdout(Stdio::null())
        .status()
        .is_ok_and(|s| s.success());
    if !here {
        eprintln!("SKIPPED: git over http, the program git is not here");
    }
    here
}

async fn backend(
    State(served): State<Served>,
    method: Method,
    uri: Uri,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    let given = headers.get("authorization").and_then(|v| v.to_str().ok());
    if served.authorization.is_some() && given != served.authorization.as_deref() {
        return Response::builder()
            .status(StatusCode::UNAUTHORIZED)
            .header("WWW-Authenticate", "Basic realm=git")
            .body(Body::empty())
            .unwrap();
    }
    let header = |name: &str| {
        headers
            .get(name)
            .and_then(|v| v.to_str().ok())
            .unwrap_or_default()
            .to_string()
    };
    let environment: HashMap<&str, String> = HashMap::from([
        ("GIT_PROJECT_ROOT", served.root.display().to_string()),
        ("GIT_HTTP_EXPORT_ALL", "1".into()),
        ("GIT_CONFIG_GLOBAL", "/dev/null".into()),
        ("REQUEST_METHOD", method.to_string()),
        ("PATH_INFO", uri.path().into()),
        ("QUERY_STRING", uri.query().unwrap_or_default().into()),
        ("CONTENT_TYPE", header("content-type")),
        ("HTTP_CONTENT_ENCODING", header("content-encoding")),
        ("GIT_PROTOCOL", header("git-protocol")),
    ]);
    let mut child = tokio::process::Command::new("git")
        .arg("http-backend")
        .envs(environment)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let mut input = child.stdin.take().unwrap();
    input.write_all(&body).await.unwrap();
    drop(input);
    let output = child.wait_with_output().await.unwrap().stdout;
    let end = output.windows(4).position(|w| w == b"\r\n\r\n").unwrap();
    let mut response = Response::builder();
    for line in String::from_utf8_lossy(&output[..end]).lines() {
        let (name, value) = line.split_once(": ").unwrap();
        response = if name == "Status" {
            response.status(value[..3].parse::<u16>().unwrap())
        } else {
            response.header(name, value)
        };
    }
    served
        .sent_bytes
        .fetch_add((output.len() - end) as u64, Ordering::SeqCst);
    response.body(Body::from(output[end + 4..].to_vec())).unwrap()
}

/// Serves the repositories in the cluster's directory; gives the address and the count of bytes sent.
async fn serve(cluster: &Cluster, authorization: Option<String>) -> (String, Arc<AtomicU64>) {
    let sent_bytes = Arc::new(AtomicU64::new(0));
    let served = Served {
        root: cluster.dir.path().to_path_buf(),
        authorization,
        sent_bytes: sent_bytes.clone(),
    };
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let router = Router::new().fallback(backend).with_state(served);
    // Ends with the test's runtime.
    tokio::spawn(async move { axum::serve(listener, router).await });
    (format!("http://{address}"), sent_bytes)
}

async fn source(cluster: &Cluster, name: &str, spec: serde_json::Value) {
    cluster
        .create(json!({"apiVersion": "source.toolkit.fluxcd.io/v1", "kind": "GitRepository", "metadata": {"name": name, "namespace": NS}, "spec": spec}))
        .await;
}

fn at(revision: &str) -> impl Fn(&GitRepository) -> bool + Clone {
    let revision = revision.to_string();
    move |g| {
        g.status
            .as_ref()
            .and_then(|s| s.artifact.as_ref())
            .is_some_and(|a| a.revision == revision)
    }
}

fn noise(seed: u64) -> String {
    let mut state = seed;
    let mut text = String::new();
    for _ in 0..4000 {
        state = state
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        text.push_str(&format!("{:x}\n", state >> 20));
    }
    text
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_repository_behind_http_is_fetched_one_commit_deep_and_then_incrementally() {
    if !git_is_here() {
        return;
    }
    let cluster = Cluster::start().await;
    let repo = cluster.repository("app");
    let old = noise(1);
    // History that nobody needs: were it fetched, it would show in the bytes.
    for seed in 10..15 {
        repo.push(&[
            ("deploy/a.yaml", &config_map("a", "0")),
            ("large.txt", &noise(seed)),
        ]);
    }
    let first = repo.push(&[("deploy/a.yaml", &config_map("a", "1")), ("large.txt", &old)]);
    let (url, sent) = serve(&cluster, None).await;
    source(
        &cluster,
        "app",
        json!({"url": format!("{url}/app"), "interval": "10m", "ref": {"branch": "main"}}),
    )
    .await;
    cluster.kustomization("app", json!({})).await;
    cluster.applied("app", &first).await;
    let after_first = sent.load(Ordering::SeqCst);
    assert!(
        after_first < 2 * old.len() as u64,
        "{after_first} bytes for a commit of {}",
        old.len()
    );

    let second = repo.push(&[("deploy/a.yaml", &config_map("a", "2")), ("large.txt", &old)]);
    let ask = json!({"metadata": {"annotations": {"reconcile.fluxcd.io/requestedAt": "1"}}});
    cluster.merge::<GitRepository>(NS, "app", ask).await;
    cluster.applied("app", &second).await;
    let for_second = sent.load(Ordering::SeqCst) - after_first;
    assert!(for_second < 5_000, "{for_second} bytes for a small change");
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tags_ranges_commits_and_names_are_fetched_over_http() {
    if !git_is_here() {
        return;
    }
    let cluster = Cluster::start().await;
    let repo = cluster.repository("app");
    let ids: Vec<String> = ["1", "2", "3"]
        .iter()
        .map(|v| {
            repo.push(&[("a.yaml", &config_map("a", v))])
                .split_once(':')
                .unwrap()
                .1
                .to_string()
        })
        .collect();
    tag(&repo, "v1.0.0", &ids[0], false);
    tag(&repo, "v1.1.0", &ids[1], true);
    tag(&repo, "v2.0.0-rc.1", &ids[2], false);
    for (name, reference, revision) in [
        ("tag", json!({"tag": "v1.0.0"}), format!("v1.0.0@sha1:{}", ids[0])),
        (
            "semver",
            json!({"semver": ">=1.0.0"}),
            format!("v1.1.0@sha1:{}", ids[1]),
        ),
        (
            "prerelease",
            json!({"semver": ">=1.0.0-0"}),
            format!("v2.0.0-rc.1@sha1:{}", ids[2]),
        ),
        ("commit", json!({"commit": ids[0]}), format!("sha1:{}", ids[0])),
        (
            "commit-of-branch",
            json!({"commit": ids[1], "branch": "main"}),
            format!("main@sha1:{}", ids[1]),
        ),
        (
            "name",
            json!({"name": "refs/heads/main"}),
            format!("refs/heads/main@sha1:{}", ids[2]),
        ),
    ] {
        // An address of its own, so that no source finds the commits of another in the cache.
        let (url, _) = serve(&cluster, None).await;
        source(
            &cluster,
            name,
            json!({"url": format!("{url}/app"), "interval": "10m", "ref": reference}),
        )
        .await;
        cluster.git(name, &format!("at {revision}"), at(&revision)).await;
    }
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tokens_open_a_closed_server_and_passwords_never_go_over_plain_http() {
    if !git_is_here() {
        return;
    }
    let cluster = Cluster::start().await;
    let repo = cluster.repository("app");
    repo.push(&[("a.yaml", &config_map("a", "1"))]);
    let basic = format!(
        "Basic {}",
        base64::engine::general_purpose::STANDARD.encode("user:secret")
    );
    let (url, _) = serve(&cluster, Some(basic)).await;
    source(
        &cluster,
        "closed",
        json!({"url": format!("{url}/app"), "interval": "10m", "ref": {"branch": "main"}}),
    )
    .await;
    let closed = cluster
        .git("closed", "refused", |g| condition(g, "FetchFailed").is_some())
        .await;
    let message = condition(&closed, "Ready").unwrap().2;
    assert!(message.contains("asks for credentials"), "{message}");
    cluster
        .create(json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "basic", "namespace": NS}, "stringData": {"username": "user", "password": "secret"}}))
        .await;
    let spec = json!({"url": format!("{url}/app"), "interval": "10m", "ref": {"branch": "main"}, "secretRef": {"name": "basic"}});
    source(&cluster, "plain", spec).await;
    let plain = cluster
        .git("plain", "refused", |g| condition(g, "FetchFailed").is_some())
        .await;
    let message = condition(&plain, "Ready").unwrap().2;
    assert!(
        message.contains("plain http") && !message.contains("secret\""),
        "{message}"
    );
    cluster.stop().await;
}

fn tag(repo: &Repository, name: &str, commit: &str, annotated: bool) {
    let git = git2::Repository::open_bare(repo.path()).unwrap();
    let target = git
        .find_object(git2::Oid::from_str(commit).unwrap(), None)
        .unwrap();
    if annotated {
        let who = git2::Signature::now("Ada", "ada@example.com").unwrap();
        git.tag(name, &target, &who, "a release", false).unwrap();
    } else {
        git.tag_lightweight(name, &target, false).unwrap();
    }
}
