//! Statistics: those that operators know from Envoy, each at what it counts; and Envoy with the same file and the same
//! requests, which must count the same.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use serin_proxy::bootstrap::file;
use serin_proxy::control::Proxy;
use serin_proxy::control::admin::{AdminPort, Port};
use serin_proxy::control::run::apply_static;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;

use crate::envoy;
use crate::fixture::*;
use crate::interop::wait_for;

const CONFIG: &str = r#"
admin: { address: { socket_address: { address: 127.0.0.1, port_value: ADMIN } } }
node: { id: counted, cluster: counted }
static_resources:
  listeners:
  - name: tcp
    address: { socket_address: { address: 127.0.0.1, port_value: TCP } }
    filter_chains:
    - filters:
      - name: envoy.filters.network.tcp_proxy
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy
          stat_prefix: bytes
          cluster: good
  - name: unmatched
    address: { socket_address: { address: 127.0.0.1, port_value: UNMATCHED } }
    filter_chains:
    - filter_chain_match: { source_prefix_ranges: [ { address_prefix: 192.0.2.0, prefix_len: 24 } ] }
      filters:
      - name: envoy.filters.network.tcp_proxy
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy
          stat_prefix: none
          cluster: good
  - name: http
    address: { socket_address: { address: 127.0.0.1, port_value: HTTP } }
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: in
          codec_type: AUTO
          use_remote_address: true
          normalize_path: true
          path_with_escaped_slashes_action: UNESCAPE_AND_REDIRECT
          delayed_close_timeout: 0s
          max_request_headers_kb: 8
          common_http_protocol_options: { idle_timeout: 1s }
          upgrade_configs: [ { upgrade_type: websocket } ]
          http_filters:
          - name: envoy.filters.http.router
            typed_config: { "@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router }
          route_config:
            name: main
            validate_clusters: false
            virtual_hosts:
            - name: all
              domains: ["*"]
              routes:
              - match: { path: /direct }
                direct_response: { status: 200, body: { inline_string: direct } }
              - match: { path: /moved }
                redirect: { path_redirect: /elsewhere }
              - match: { path: /unknown }
                route: { cluster: unknown }
              - match: { path: /dead }
                route: { cluster: dead }
              - match: { path: /empty }
                route: { cluster: empty }
              - match: { path: /slow }
                route: { cluster: slow, timeout: 0.3s }
              - match: { path: /waits }
                route: { cluster: waits, timeout: 30s }
              - match: { path: /breaks }
                route: { cluster: breaks }
              - match: { path: /cut }
                route: { cluster: cut }
              - match: { path: /garbled }
                route: { cluster: garbled }
              - match: { path: /fails }
                route: { cluster: fails, retry_policy: { retry_on: "5xx", num_retries: 2 } }
              - match: { path: /recovers }
                route: { cluster: recovers, retry_policy: { retry_on: "5xx", num_retries: 2 } }
              - match: { path: /hangs }
                route: { cluster: hangs, timeout: 10s, retry_policy: { retry_on: "5xx", num_retries: 1, per_try_timeout: 0.2s } }
              - match: { path: /talk }
                route: { cluster: good }
              - match: { path: /ok }
                route: { cluster: good }
  clusters:
CLUSTERS
  - { name: dead, type: STATIC, connect_timeout: 1s, load_assignment: { cluster_name: dead, endpoints: [ { lb_endpoints: [ { endpoint: { address: { socket_address: { address: 127.99.0.1, port_value: 1 } } } } ] } ] } }
  - { name: empty, type: STATIC, connect_timeout: 1s, load_assignment: { cluster_name: empty } }
  - { name: idle, type: STATIC, connect_timeout: 1s, circuit_breakers: { thresholds: [ { max_connections: 7, track_remaining: true } ] }, load_assignment: { cluster_name: idle, endpoints: [ { lb_endpoints: [ { endpoint: { address: { socket_address: { address: 127.0.0.1, port_value: 1 } } } } ] } ] } }
"#;

/// Clusters of the one backend.
const CLUSTERS: [&str; 9] = [
    "good", "slow", "waits", "breaks", "cut", "garbled", "fails", "recovers", "hangs",
];

fn config(admin: SocketAddr, listeners: [SocketAddr; 3], backend: SocketAddr) -> String {
    let clusters: Vec<String> = CLUSTERS
        .iter()
        .map(|name| {
            format!(
                "  - {{ name: {name}, type: STATIC, connect_timeout: 1s, load_assignment: {{ cluster_name: {name}, endpoints: \
                 [ {{ lb_endpoints: [ {{ endpoint: {{ address: {{ socket_address: {{ address: 127.0.0.1, port_value: {} }} }} }} }} ] }} ] }} }}\n",
                backend.port()
            )
        })
        .collect();
    CONFIG
        .replace("ADMIN", &admin.port().to_string())
        .replace("UNMATCHED", &listeners[2].port().to_string())
        .replace("TCP }", &format!("{} }}", listeners[1].port()))
        .replace("HTTP }", &format!("{} }}", listeners[0].port()))
        .replace("CLUSTERS\n", &clusters.concat())
}

/// A backend that does what the path says.
async fn backend() -> SocketAddr {
    let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = socket.local_addr().unwrap();
    tokio::spawn(async move {
        let tried = Arc::new(std::sync::atomic::AtomicU32::new(0));
        loop {
            let Ok((stream, _)) = socket.accept().await else {
                return;
            };
            tokio::spawn(serve(stream, tried.clone()));
        }
    });
    address
}

async fn serve(mut stream: TcpStream, tried: Arc<std::sync::atomic::AtomicU32>) {
    let mut raw = Vec::new();
    loop {
        let Some(end) = raw.windows(4).position(|window| window == b"\r\n\r\n") else {
            match stream.read_buf(&mut raw).await {
                Ok(count) if count > 0 => continue,
                _ => return,
            }
        };
        let head = String::from_utf8_lossy(&raw[..end]).into_owned();
        raw.drain(..end + 4);
        let path = head.split(' ').nth(1).unwrap_or_default().to_owned();
        let answer: &[u8] = match path.as_str() {
            "/slow" | "/waits" | "/hangs" => {
                // Until whoever waits gives up.
                let _ = stream.read_buf(&mut raw).await;
                return;
            }
            "/breaks" => return,
            "/cut" => {
                let _ = stream
                    .write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhalf")
                    .await;
                return;
            }
            "/garbled" => b"what do you want\r\n\r\n",
            "/fails" => b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n",
            // Each proxy asks twice.
            "/recovers"
                if tried
                    .fetch_add(1, std::sync::atomic::Ordering::Relaxed)
                    .is_multiple_of(2) =>
            {
                b"HTTP/1.1 500 Internal Server Error\r\ncontent-length: 0\r\n\r\n"
            }
            "/talk" => {
                b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n"
            }
            _ => b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok",
        };
        if stream.write_all(answer).await.is_err() {
            return;
        }
        if path == "/talk" {
            let _ = stream.read_buf(&mut raw).await;
            return;
        }
    }
}

/// The head of an answer, and as much of its body as its length says.
async fn answer(stream: &mut TcpStream) -> String {
    let mut raw = Vec::new();
    loop {
        let text = String::from_utf8_lossy(&raw).into_owned();
        if let Some((head, body)) = text.split_once("\r\n\r\n") {
            let length = head
                .to_ascii_lowercase()
                .split("content-length: ")
                .nth(1)
                .and_then(|rest| rest.lines().next()?.parse().ok())
                .unwrap_or(0);
            if body.len() >= length {
                return text;
            }
        }
        match soon("an answer", stream.read_buf(&mut raw)).await {
            Ok(count) if count > 0 => {}
            _ => return String::from_utf8_lossy(&raw).into_owned(),
        }
    }
}

async fn ask(at: SocketAddr, bytes: &str) -> String {
    let mut stream = TcpStream::connect(at).await.unwrap();
    stream.write_all(bytes.as_bytes()).await.unwrap();
    answer(&mut stream).await
}

/// Everything that happens, to one proxy.
async fn everything(http: SocketAddr, tcp: SocketAddr, unmatched: SocketAddr) {
    let plain = |path: &str| format!("GET {path} HTTP/1.1\r\nhost: a\r\n\r\n");
    for (path, status) in [
        ("/ok", 200),
        ("/ok", 200),
        ("/direct", 200),
        ("/moved", 301),
        ("/nowhere", 404),
        ("/unknown", 503),
        ("/dead", 503),
        ("/empty", 503),
        ("/slow", 504),
        ("/breaks", 503),
        ("/cut", 200),
        ("/garbled", 502),
        ("/fails", 503),
        ("/recovers", 200),
        ("/hangs", 504),
        ("/a%2Fb", 307),
    ] {
        let text = ask(http, &plain(path)).await;
        assert!(
            text.starts_with(&format!("HTTP/1.1 {status} ")),
            "{path} at {http}: {text}"
        );
    }
    for (bytes, status) in [
        (
            "GET /ok HTTP/1.1\r\nhost: a\r\ncontent-length: x\r\n\r\n".to_owned(),
            400,
        ),
        (
            format!("GET /ok HTTP/1.1\r\nhost: a\r\nx: {}\r\n\r\n", "y".repeat(20_000)),
            431,
        ),
        (
            "GET /ok HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: other\r\n\r\n".to_owned(),
            403,
        ),
    ] {
        let text = ask(http, &bytes).await;
        assert!(
            text.starts_with(&format!("HTTP/1.1 {status} ")),
            "{status} at {http}: {text}"
        );
    }
    // A tunnel.
    let mut stream = TcpStream::connect(http).await.unwrap();
    let upgrade = "GET /talk HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: websocket\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\nsec-websocket-version: 13\r\n\r\n";
    stream.write_all(upgrade.as_bytes()).await.unwrap();
    assert!(answer(&mut stream).await.starts_with("HTTP/1.1 101 "));
    drop(stream);
    // Two requests on one connection, which is then idle for too long.
    let mut kept = TcpStream::connect(http).await.unwrap();
    for _ in 0..2 {
        kept.write_all(plain("/ok").as_bytes()).await.unwrap();
        answer(&mut kept).await;
    }
    let mut rest = Vec::new();
    soon("the end of an idle connection", kept.read_to_end(&mut rest))
        .await
        .unwrap();
    drop(kept);
    // Given up while it is waited for.
    let mut stream = TcpStream::connect(http).await.unwrap();
    stream.write_all(plain("/waits").as_bytes()).await.unwrap();
    tokio::time::sleep(Duration::from_millis(300)).await;
    drop(stream);
    // Bytes.
    let mut stream = TcpStream::connect(tcp).await.unwrap();
    stream.write_all(plain("/ok").as_bytes()).await.unwrap();
    assert!(answer(&mut stream).await.starts_with("HTTP/1.1 200 "));
    drop(stream);
    let mut stream = TcpStream::connect(unmatched).await.unwrap();
    let _ = stream.read_to_end(&mut rest).await;
}

/// Numbers by name, with the listeners' ports taken out.
async fn numbers(admin: SocketAddr, listeners: [SocketAddr; 3]) -> BTreeMap<String, String> {
    let mut text = get(admin, "/stats").await.2;
    for (listener, name) in listeners.iter().zip(["HTTP", "TCP", "UNMATCHED"]) {
        text = text.replace(&format!("127.0.0.1_{}", listener.port()), name);
    }
    text.lines()
        .filter_map(|line| line.split_once(": "))
        .filter(|(_, value)| value.parse::<f64>().is_ok())
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect()
}

/// What differs, and why.
const DIFFERENT: &[(&str, &str)] = &[
    (
        r"^http\.in\.downstream_cx_destroy_(local|remote)$",
        "after a refused head both sides close, and who is first is chance",
    ),
    (
        r"_cx_tx_bytes_total$",
        "heads hold other fields: no x-envoy-expected-rq-timeout-ms, flags on local answers",
    ),
    (r"^server\.(memory_|uptime|version)", "of the process"),
    (
        r"downstream_rq_(rx_reset|response_before_rq_complete)$",
        "Envoy resets requests whose head it has refused as well, tunnels that end, and what it has broken off itself",
    ),
    (
        r"rq_reset_after_downstream_response_started$",
        "Envoy leaves out answers that break the protocol of HTTP/1 after their head",
    ),
];

fn is_pardoned(name: &str) -> bool {
    DIFFERENT
        .iter()
        .any(|(part, reason)| !reason.is_empty() && regex::Regex::new(part).unwrap().is_match(name))
}

#[tokio::test]
async fn envoy_and_serin_proxy_count_the_same_of_the_same_requests() {
    let Some(program) = envoy::program() else { return };
    let backend = backend().await;
    let folder = tempfile::tempdir().unwrap();
    let mut places = Vec::new();
    for _ in 0..2 {
        let mut four = Vec::new();
        for _ in 0..4 {
            four.push(free_port().await);
        }
        places.push((four[0], [four[1], four[2], four[3]]));
    }
    let path = folder.path().join("envoy.yaml");
    std::fs::write(&path, config(places[1].0, places[1].1, backend)).unwrap();
    let mut child = envoy::command(&program, &path).spawn().unwrap();
    let plan = file::parse(&config(places[0].0, places[0].1, backend), 1).unwrap();
    let (proxy, _log) = Proxy::start(plan.options).unwrap();
    apply_static(&proxy, &plan.static_resources).await.unwrap();
    proxy.set_ready();
    let port = AdminPort::bind(&proxy, places[0].0, Port::Admin).unwrap();
    let cancel = CancellationToken::new();
    let admin = tokio::spawn(port.serve(proxy.clone(), CancellationToken::new(), cancel.clone()));
    // Envoy's own: a look at a listener is a connection that counts.
    wait_for(places[1].0).await;
    let live = async {
        while get(places[1].0, "/ready").await.0 != 200 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    soon("Envoy", live).await;
    for (_, [http, tcp, unmatched]) in &places {
        everything(*http, *tcp, *unmatched).await;
    }
    let mut differences = Vec::new();
    let mut both = 0;
    // Ends are counted a moment later.
    for _ in 0..40 {
        let ours = numbers(places[0].0, places[0].1).await;
        let theirs = numbers(places[1].0, places[1].1).await;
        both = ours.keys().filter(|name| theirs.contains_key(*name)).count();
        differences = ours
            .iter()
            .filter(|(name, _)| !is_pardoned(name))
            .filter_map(|(name, value)| {
                let other = theirs.get(name)?;
                (other != value).then(|| format!("{name}: ours {value}, theirs {other}"))
            })
            .collect();
        if differences.is_empty() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert!(
        differences.is_empty(),
        "{} of {both} differ:\n{}",
        differences.len(),
        differences.join("\n")
    );
    assert!(both > 600, "{both}");
    child.kill().await.unwrap();
    cancel.cancel();
    admin.await.unwrap();
    proxy.stop().await;
}

/// A proxy from a file's text, its admin port, and what ends that.
async fn started(
    text: &str,
    admin: SocketAddr,
) -> (Arc<Proxy>, CancellationToken, tokio::task::JoinHandle<()>) {
    let plan = file::parse(text, 1).unwrap();
    let (proxy, _log) = Proxy::start(plan.options).unwrap();
    apply_static(&proxy, &plan.static_resources).await.unwrap();
    proxy.set_ready();
    let port = AdminPort::bind(&proxy, admin, Port::Admin).unwrap();
    let cancel = CancellationToken::new();
    let served = tokio::spawn(port.serve(proxy.clone(), CancellationToken::new(), cancel.clone()));
    (proxy, cancel, served)
}

/// A file with clusters that nobody uses.
fn idle_clusters(count: usize, more: &str) -> String {
    let clusters: Vec<String> = (0..count)
        .map(|index| {
            format!(
                "  - {{ name: c{index}, type: STATIC, outlier_detection: {{}}, load_assignment: {{ cluster_name: c{index}, endpoints: \
                 [ {{ lb_endpoints: [ {{ endpoint: {{ address: {{ socket_address: {{ address: 127.0.0.1, port_value: 1 }} }} }} }} ] }} ] }} }}\n"
            )
        })
        .collect();
    format!(
        "node: {{ id: idle, cluster: idle }}\nstatic_resources:\n  clusters:\n{}{more}",
        clusters.concat()
    )
}

#[tokio::test]
async fn clusters_that_nobody_has_used_are_shown_whole_or_as_the_bootstrap_says() {
    let shown = async |count: usize, more: &str, path: &str| {
        let admin = free_port().await;
        let (proxy, cancel, served) = started(&idle_clusters(count, more), admin).await;
        let (status, _, text) = get(admin, path).await;
        assert_eq!(status, 200);
        cancel.cancel();
        served.await.unwrap();
        proxy.stop().await;
        text
    };
    let all = shown(2, "", "/stats").await;
    for line in [
        "cluster.c1.membership_healthy: 1",
        "cluster.c1.membership_total: 1",
        "cluster.c1.membership_change: 1",
        "cluster.c1.upstream_rq_total: 0",
        "cluster.c1.upstream_cx_connect_fail: 0",
        "cluster.c1.outlier_detection.ejections_active: 0",
        "cluster.c1.outlier_detection.ejections_enforced_total: 0",
        "cluster.c1.circuit_breakers.default.cx_open: 0",
        "cluster_manager.cluster_added: 2",
    ] {
        assert!(all.lines().any(|own| own == line), "{line}\n{all}");
    }
    assert!(!all.contains("cluster.c1.health_check."), "it has no checks");
    let used = shown(2, "", "/stats?usedonly").await;
    assert!(
        used.contains("cluster.c1.membership_healthy: 1\n") && !used.contains("upstream_rq_total"),
        "{used}"
    );
    let deferred = shown(
        2,
        "deferred_stat_options: { enable_deferred_creation_stats: true }\n",
        "/stats",
    )
    .await;
    assert!(
        deferred.contains("cluster.c1.membership_healthy: 1\n"),
        "{deferred}"
    );
    assert!(!deferred.contains("cluster.c1.upstream_rq_total"), "{deferred}");
    let matcher = "stats_config: { stats_matcher: { inclusion_list: { patterns: [ { suffix: membership_healthy }, { prefix: server } ] } } }\n";
    let some = shown(2, matcher, "/stats").await;
    let names: Vec<_> = some.lines().filter_map(|line| line.split(':').next()).collect();
    assert!(
        names.contains(&"cluster.c0.membership_healthy") && names.contains(&"server.live"),
        "{some}"
    );
    assert!(
        names.iter().all(|name| name.ends_with("membership_healthy")
            || name.starts_with("server.")
            || name.starts_with("serin_")),
        "{some}"
    );
}

#[tokio::test]
async fn statistics_of_many_clusters_come_in_pieces_that_hold_everything_once() {
    const COUNT: usize = 300;
    let admin = free_port().await;
    let (proxy, cancel, served) = started(&idle_clusters(COUNT, ""), admin).await;
    let text = get(admin, "/stats").await.2;
    let healthy = text
        .lines()
        .filter(|line| line.ends_with(".membership_healthy: 1"))
        .count();
    assert_eq!(healthy, COUNT);
    let mut names: Vec<_> = text.lines().collect();
    let lines = names.len();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), lines, "nothing is there twice");
    let json: serde_json::Value = serde_json::from_str(&get(admin, "/stats?format=json").await.2).unwrap();
    let entries = json["stats"].as_array().unwrap();
    assert_eq!(
        entries.iter().filter(|entry| entry["name"].is_string()).count(),
        lines - text.matches(": P0(").count() - text.matches("No recorded values").count()
    );
    let prometheus = get(admin, "/stats/prometheus").await.2;
    let families: Vec<_> = prometheus
        .lines()
        .filter(|line| line.starts_with("# TYPE "))
        .collect();
    let mut once = families.clone();
    once.sort_unstable();
    once.dedup();
    assert_eq!(once.len(), families.len(), "all series of a family are together");
    let series = "envoy_cluster_membership_healthy{";
    assert_eq!(prometheus.matches(series).count(), COUNT);
    let one = get(admin, "/stats?filter=%5Ecluster%5C.c77%5C.membership_healthy%24")
        .await
        .2;
    assert_eq!(one, "cluster.c77.membership_healthy: 1\n");
    cancel.cancel();
    served.await.unwrap();
    proxy.stop().await;
}

#[tokio::test]
async fn the_dump_tells_the_bootstrap_and_what_is_of_it_apart_from_what_came_later() {
    let (admin, backend) = (free_port().await, backend().await);
    let listeners = [free_port().await, free_port().await, free_port().await];
    let (proxy, cancel, served) = started(&config(admin, listeners, backend), admin).await;
    let cluster = serin_xds::pb::envoy::config::cluster::v3::Cluster {
        name: "later".into(),
        ..Default::default()
    };
    let body = prost::Message::encode_to_vec(&cluster);
    let update = serin_proxy::config::store::Update {
        name: "later",
        body: &body,
    };
    assert!(
        proxy
            .apply(serin_xds::ResourceType::Cluster, &[update], &[])
            .await
            .is_empty()
    );
    let dump: serde_json::Value =
        serde_json::from_str(&get(admin, "/config_dump?include_eds").await.2).unwrap();
    let section = |kind: &str| {
        let name = format!("type.googleapis.com/envoy.admin.v3.{kind}ConfigDump");
        let sections = dump["configs"].as_array().unwrap();
        sections
            .iter()
            .find(|section| section["@type"] == name)
            .unwrap()
            .clone()
    };
    let names = |list: &serde_json::Value, field: &str| -> Vec<String> {
        let entries = list.as_array().unwrap().iter();
        entries
            .map(|entry| entry[field]["name"].as_str().unwrap().to_owned())
            .collect()
    };
    let bootstrap = section("Bootstrap");
    assert_eq!(bootstrap["bootstrap"]["node"]["id"], "counted");
    assert_eq!(
        bootstrap["bootstrap"]["admin"]["address"]["socket_address"]["port_value"],
        u64::from(admin.port())
    );
    assert_eq!(
        bootstrap["bootstrap"]["static_resources"]["listeners"]
            .as_array()
            .unwrap()
            .len(),
        3
    );
    assert!(bootstrap["last_updated"].as_str().unwrap().ends_with('Z'));
    let clusters = section("Clusters");
    assert_eq!(names(&clusters["static_clusters"], "cluster").len(), 12);
    assert!(clusters["static_clusters"][0]["version_info"].is_null());
    assert_eq!(names(&clusters["dynamic_active_clusters"], "cluster"), ["later"]);
    assert_eq!(
        names(&section("Listeners")["static_listeners"], "listener"),
        ["http", "tcp", "unmatched"]
    );
    assert_eq!(
        names(&section("Routes")["static_route_configs"], "route_config"),
        ["main"]
    );
    let endpoints = section("Endpoints");
    assert_eq!(
        endpoints["static_endpoint_configs"][0]["endpoint_config"]["cluster_name"],
        "breaks"
    );
    let listeners: serde_json::Value = serde_json::from_str(
        &get(admin, "/config_dump?resource=static_listeners&name_regex=tcp")
            .await
            .2,
    )
    .unwrap();
    assert_eq!(listeners["configs"].as_array().unwrap().len(), 1);
    cancel.cancel();
    served.await.unwrap();
    proxy.stop().await;
}

#[tokio::test]
async fn the_admin_port_answers_as_envoys_does_where_tools_look() {
    let admin = free_port().await;
    let (proxy, cancel, served) = started(&idle_clusters(1, ""), admin).await;
    let help = get(admin, "/help").await.2;
    assert!(help.starts_with("admin commands are:\n  /: "), "{help}");
    assert!(
        help.contains("\n  /quitquitquit (POST): ") && help.contains("\n      usedonly: "),
        "{help}"
    );
    let (status, _, text) = get(admin, "/nothing").await;
    assert_eq!((status, text), (404, format!("invalid path. {help}")));
    let (status, _, text) = get(admin, "/quitquitquit").await;
    assert_eq!((status, &*text), (405, "Method GET not allowed, POST required."));
    assert_eq!(get(admin, "/hot_restart_version").await.2, "serin.1");
    assert_eq!(get(admin, "/init_dump").await.2, "{}\n");
    let info: serde_json::Value = serde_json::from_str(&get(admin, "/server_info").await.2).unwrap();
    assert_eq!(info["version"].as_str().unwrap().split('/').count(), 5);
    assert_eq!(info["node"]["id"], "idle");
    assert_eq!(info["node"]["user_agent_name"], "serin-proxy");
    for option in [
        "concurrency",
        "config_path",
        "log_level",
        "drain_time",
        "mode",
        "disable_hot_restart",
    ] {
        assert!(!info["command_line_options"][option].is_null(), "{option}");
    }
    cancel.cancel();
    served.await.unwrap();
    proxy.stop().await;
}

#[tokio::test]
async fn what_is_waited_for_before_readiness_is_told() {
    let harness = Harness::start();
    let port = AdminPort::bind(&harness.proxy, "127.0.0.1:0".parse().unwrap(), Port::Admin).unwrap();
    let admin = port.address().unwrap();
    let cancel = CancellationToken::new();
    tokio::spawn(port.serve(harness.proxy.clone(), CancellationToken::new(), cancel.clone()));
    harness
        .put(serin_xds::ResourceType::Cluster, "c", &eds_cluster("c"))
        .await;
    let dump: serde_json::Value = serde_json::from_str(&get(admin, "/init_dump").await.2).unwrap();
    assert_eq!(
        dump["unready_targets_dumps"],
        serde_json::json!([{ "name": "server", "target_names": ["endpoints c"] }])
    );
    assert_eq!(get(admin, "/init_dump?mask=listener").await.2, "{}\n");
    cancel.cancel();
}

#[tokio::test]
async fn the_documented_example_runs_alone_and_its_commands_say_what_the_document_says() {
    let root = concat!(env!("CARGO_MANIFEST_DIR"), "/../..");
    let document = std::fs::read_to_string(format!("{root}/docs/supported/proxy.md")).unwrap();
    let mut example = std::fs::read_to_string(format!("{root}/mesh/proxy/example/bootstrap.yaml")).unwrap();
    let commands: Vec<(String, String)> = document
        .lines()
        .filter(|line| line.starts_with("curl "))
        .filter_map(|line| line.split_once(" # "))
        .map(|(command, says)| (command.trim().to_owned(), says.trim().to_owned()))
        .collect();
    assert!(commands.len() >= 5, "{commands:?}");
    let (v1, v2) = (Backend::named("one").await, Backend::named("two").await);
    let ports = [
        ("8080", free_port().await.port()),
        ("15000", free_port().await.port()),
        ("9081", v1.address.port()),
        ("9082", v2.address.port()),
    ];
    let moved = |text: &str| {
        let mut text = text.to_owned();
        for (port, here) in ports {
            text = text.replace(port, &here.to_string());
        }
        text
    };
    example = moved(&example);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("example.yaml");
    std::fs::write(&path, example).unwrap();
    let mut child = tokio::process::Command::new(env!("CARGO_BIN_EXE_serin-proxy"))
        .args(["--concurrency", "1", "--config"])
        .arg(&path)
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    wait_for(SocketAddr::from(([127, 0, 0, 1], ports[0].1))).await;
    for (command, says) in commands {
        let run = tokio::process::Command::new("sh")
            .arg("-c")
            .arg(moved(&command))
            .output();
        let output = soon(&command, run).await.unwrap();
        if output.status.code() == Some(127) {
            eprintln!("SKIPPED: no curl");
            break;
        }
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(text.contains(&*moved(&says)), "{command}: {text}");
    }
    child.kill().await.unwrap();
}
