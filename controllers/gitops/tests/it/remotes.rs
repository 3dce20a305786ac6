//! A git server over http: git's own `http-backend` behind a small web server. Skipped where git is not installed.

use std::collections::HashMap;
use std::net::SocketAddr;
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
use parking_lot::Mutex;
use serde_json::json;
use serin_crds::flux::source::GitRepository;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

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
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
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

/// A listener for connections with TLS.
struct Encrypted {
    listener: TcpListener,
    acceptor: TlsAcceptor,
}

impl axum::serve::Listener for Encrypted {
    type Io = TlsStream<TcpStream>;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        loop {
            let (stream, address) = self.listener.accept().await.unwrap();
            // A client that does not trust the certificate goes away.
            if let Ok(stream) = self.acceptor.accept(stream).await {
                return (stream, address);
            }
        }
    }

    fn local_addr(&self) -> std::io::Result<Self::Addr> {
        self.listener.local_addr()
    }
}

/// Serves the repositories with TLS as `git.example.invalid`; gives the port and the certificate of the authority.
async fn serve_encrypted(cluster: &Cluster, authorization: String) -> (SocketAddr, String) {
    let mut parameters = rcgen::CertificateParams::default();
    parameters.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let authority =
        rcgen::CertifiedIssuer::self_signed(parameters, rcgen::KeyPair::generate().unwrap()).unwrap();
    let key = rcgen::KeyPair::generate().unwrap();
    let leaf = rcgen::CertificateParams::new(vec!["git.example.invalid".to_owned()])
        .unwrap()
        .signed_by(&key, &authority)
        .unwrap();
    let provider = Arc::new(tokio_rustls::rustls::crypto::aws_lc_rs::default_provider());
    let config = tokio_rustls::rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![leaf.der().clone()], key.serialize_der().try_into().unwrap())
        .unwrap();
    let listener = Encrypted {
        listener: TcpListener::bind("127.0.0.1:0").await.unwrap(),
        acceptor: TlsAcceptor::from(Arc::new(config)),
    };
    let address = listener.listener.local_addr().unwrap();
    let router = Router::new().fallback(backend).with_state(Served {
        root: cluster.dir.path().to_path_buf(),
        authorization: Some(authorization),
        sent_bytes: Arc::default(),
    });
    // Ends with the test's runtime.
    tokio::spawn(async move { axum::serve(listener, router).await });
    (address, authority.pem())
}

/// A proxy that opens tunnels to `to`, whatever host is asked for, for those who say `authorization`; gives its address
/// and the hosts that were asked for.
async fn tunnels(to: SocketAddr, authorization: String) -> (SocketAddr, Arc<Mutex<Vec<String>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let asked = Arc::<Mutex<Vec<String>>>::default();
    let noted = asked.clone();
    tokio::spawn(async move {
        loop {
            let (client, _) = listener.accept().await.unwrap();
            let (authorization, noted) = (authorization.clone(), noted.clone());
            tokio::spawn(async move {
                let mut client = BufReader::new(client);
                loop {
                    let mut head = String::new();
                    while !head.ends_with("\r\n\r\n") {
                        if client.read_line(&mut head).await.unwrap_or(0) == 0 {
                            return;
                        }
                    }
                    if head.contains(&format!("Proxy-Authorization: {authorization}\r\n")) {
                        noted.lock().push(head.lines().next().unwrap().to_owned());
                        break;
                    }
                    let refusal = "HTTP/1.1 407 Proxy Authentication Required\r\nProxy-Authenticate: Basic realm=proxy\r\nContent-Length: 0\r\n\r\n";
                    client.write_all(refusal.as_bytes()).await.unwrap();
                }
                let mut server = TcpStream::connect(to).await.unwrap();
                client.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await.unwrap();
                let _ = tokio::io::copy_bidirectional(&mut client, &mut server).await;
            });
        }
    });
    (address, asked)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_repository_behind_https_is_fetched_through_the_proxy_of_its_secret() {
    if !git_is_here() {
        return;
    }
    let basic = |who: &str| {
        let encoded = base64::engine::general_purpose::STANDARD.encode(who);
        format!("Basic {encoded}")
    };
    let cluster = Cluster::start().await;
    let repo = cluster.repository("app");
    let first = repo.push(&[("a.yaml", &config_map("a", "1"))]);
    let (server, authority) = serve_encrypted(&cluster, basic("user:secret")).await;
    let (proxy, asked) = tunnels(server, basic("through:p@ss/word")).await;
    let secret = |name: &str, data: serde_json::Value| json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name, "namespace": NS}, "stringData": data});
    let user = json!({"username": "user", "password": "secret", "ca.crt": authority});
    cluster.create(secret("git", user)).await;
    // Nobody but the proxy knows this host.
    let https = "https://git.example.invalid/app";
    let through = |url: &str, secret: &str| json!({"url": url, "interval": "10m", "ref": {"branch": "main"}, "secretRef": {"name": "git"}, "proxySecretRef": {"name": secret}});
    for (name, url, data, wanted) in [
        (
            "socks",
            https,
            json!({"address": "socks5://127.0.0.1:1"}),
            "socks5 is not honoured",
        ),
        ("nowhere", https, json!({"host": "x"}), "has no key 'address'"),
        (
            "unencrypted",
            "http://git.example.invalid/app",
            json!({"address": format!("http://{proxy}")}),
            "spec.proxySecretRef is honoured for https",
        ),
        (
            "stranger",
            https,
            json!({"address": format!("http://{proxy}"), "username": "through", "password": "wrong"}),
            "proxy",
        ),
    ] {
        cluster.create(secret(name, data)).await;
        let mut spec = through(url, name);
        if url != https {
            spec.as_object_mut().unwrap().remove("secretRef");
        }
        source(&cluster, name, spec).await;
        let refused = cluster
            .git(name, "refused", |g| {
                condition(g, "Ready").is_some_and(|(s, ..)| s == "False")
            })
            .await;
        let message = condition(&refused, "Ready").unwrap().2;
        assert!(
            message.contains(wanted) && !message.contains("wrong"),
            "{name}: {message}"
        );
    }
    assert!(asked.lock().is_empty(), "nobody has come through yet");
    let data = json!({"address": format!("http://{proxy}"), "username": "through", "password": "p@ss/word"});
    cluster.create(secret("proxy", data)).await;
    source(&cluster, "app", through(https, "proxy")).await;
    cluster.git("app", "fetched", at(&first)).await;
    assert!(
        asked
            .lock()
            .iter()
            .all(|line| line == "CONNECT git.example.invalid:443 HTTP/1.1"),
        "{asked:?}"
    );
    cluster.stop().await;
}
