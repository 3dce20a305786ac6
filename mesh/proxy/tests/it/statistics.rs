//! Statistics: those that operators know from Envoy, each at what it counts; and Envoy with the same file and the same
//! requests, which must count the same.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::fixture::*;
use crate::twins::{Place, Started, Twins};

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
              - match: { path: /last }
                route: { cluster: last }
              - match: { path: /unbound }
                route: { cluster: unbound }
              - match: { path: /grouped }
                route: { cluster: grouped, metadata_match: { filter_metadata: { envoy.lb: { v: a } } } }
              - match: { path: /ungrouped }
                route: { cluster: grouped, metadata_match: { filter_metadata: { envoy.lb: { v: c } } } }
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
  - { name: unbound, type: STATIC, connect_timeout: 1s, upstream_bind_config: { source_address: { address: 192.0.2.77, port_value: 0 } }, load_assignment: { cluster_name: unbound, endpoints: [ { lb_endpoints: [ { endpoint: { address: { socket_address: { address: 127.0.0.1, port_value: BACKEND } } } } ] } ] } }
  - { name: grouped, type: STATIC, connect_timeout: 1s, lb_subset_config: { fallback_policy: ANY_ENDPOINT, subset_selectors: [ { keys: [ v ] } ] }, load_assignment: { cluster_name: grouped, endpoints: [ { lb_endpoints: [ { metadata: { filter_metadata: { envoy.lb: { v: a } } }, endpoint: { address: { socket_address: { address: 127.0.0.1, port_value: BACKEND } } } } ] } ] } }
  - { name: empty, type: STATIC, connect_timeout: 1s, load_assignment: { cluster_name: empty } }
  - { name: idle, type: STATIC, connect_timeout: 1s, circuit_breakers: { thresholds: [ { max_connections: 7, track_remaining: true } ] }, load_assignment: { cluster_name: idle, endpoints: [ { lb_endpoints: [ { endpoint: { address: { socket_address: { address: 127.0.0.1, port_value: 1 } } } } ] } ] } }
"#;

/// Clusters of the one backend.
const CLUSTERS: [&str; 10] = [
    "good", "last", "slow", "waits", "breaks", "cut", "garbled", "fails", "recovers", "hangs",
];

/// Three listeners: HTTP, TCP, and one that nothing fits.
pub(crate) fn config(place: &Place, backend: SocketAddr) -> String {
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
        .replace("ADMIN", &place.admin.port().to_string())
        .replace("UNMATCHED", &place.listeners[2].port().to_string())
        .replace("TCP }", &format!("{} }}", place.listeners[1].port()))
        .replace("HTTP }", &format!("{} }}", place.listeners[0].port()))
        .replace("CLUSTERS\n", &clusters.concat())
        .replace("BACKEND", &backend.port().to_string())
}

/// A backend that does what the path says.
pub(crate) async fn backend() -> SocketAddr {
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
            "/last" => b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nok",
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
        if path == "/last" {
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
async fn everything(place: &Place) {
    let [http, tcp, unmatched] = place.listeners[..] else {
        panic!("three listeners");
    };
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
        ("/last", 200),
        ("/unbound", 503),
        ("/grouped", 200),
        ("/ungrouped", 200),
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
async fn numbers(place: &Place) -> BTreeMap<String, String> {
    let mut out = place.numbers("/stats").await;
    out.retain(|_, value| value.parse::<f64>().is_ok());
    // How many values histograms have: what is not above the last bound.
    let path = "/stats?type=Histograms&histogram_buckets=cumulative&filter=upstream_rq_per_cx";
    for line in get(place.admin, path).await.2.lines() {
        if let (Some((name, _)), Some((_, count))) = (line.split_once(':'), line.rsplit_once(',')) {
            out.insert(format!("{name}.count"), count.trim_end_matches(')').to_owned());
        }
    }
    out
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
        r"\.lb_subsets_(active|created|removed)$",
        "Envoy counts each subset once for each of its threads",
    ),
    (
        r"^runtime\.(load_success|override_dir_not_exists)$",
        "Envoy takes its layers twice when it starts",
    ),
    (
        r"^(http|listener)\.admin\.",
        "who has been asked how often whether it is ready",
    ),
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
    static PARTS: std::sync::LazyLock<Vec<regex::Regex>> = std::sync::LazyLock::new(|| {
        let given = DIFFERENT.iter().filter(|(_, reason)| !reason.is_empty());
        given.map(|(part, _)| regex::Regex::new(part).unwrap()).collect()
    });
    PARTS.iter().any(|part| part.is_match(name))
}

#[tokio::test]
async fn envoy_and_serin_proxy_count_the_same_of_the_same_requests() {
    let backend = backend().await;
    let Some(twins) = Twins::start(3, |place| config(place, backend)).await else {
        return;
    };
    for place in twins.places() {
        everything(place).await;
    }
    let (_, both) = twins.agree(numbers, is_pardoned).await;
    assert!(both > 600, "{both}");
    twins.stop().await;
}

/// A file with clusters that nobody uses.
pub(crate) fn idle_clusters(count: usize, more: &str) -> String {
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
        let started = Started::from(&idle_clusters(count, more), admin).await;
        let (status, _, text) = get(admin, path).await;
        assert_eq!(status, 200);
        started.stop().await;
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
    let started = Started::from(&idle_clusters(COUNT, ""), admin).await;
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
    started.stop().await;
}
