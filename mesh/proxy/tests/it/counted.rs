//! Statistics that nothing else moves, each by its own event, beside Envoy: health checks, listener filters, streams and
//! connections that last too long.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::fixture::*;
use crate::statistics::backend;
use crate::twins::{Place, Twins};

const CONFIG: &str = r#"
admin: { address: { socket_address: { address: 127.0.0.1, port_value: ADMIN } } }
node: { id: counted, cluster: counted }
static_resources:
  listeners:
  - name: announced
    address: { socket_address: { address: 127.0.0.1, port_value: PORT0 } }
    listener_filters:
    - name: envoy.filters.listener.proxy_protocol
      typed_config: { "@type": type.googleapis.com/envoy.extensions.filters.listener.proxy_protocol.v3.ProxyProtocol }
    filter_chains: [ { filters: [ TCP ] } ]
  - name: inspected
    address: { socket_address: { address: 127.0.0.1, port_value: PORT1 } }
    listener_filters_timeout: 0.3s
    listener_filters:
    - name: envoy.filters.listener.tls_inspector
      typed_config: { "@type": type.googleapis.com/envoy.extensions.filters.listener.tls_inspector.v3.TlsInspector }
    filter_chains: [ { filters: [ TCP ] } ]
  - name: http
    address: { socket_address: { address: 127.0.0.1, port_value: PORT2 } }
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: in
          http_filters:
          - name: envoy.filters.http.router
            typed_config: { "@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router }
          route_config:
            name: main
            virtual_hosts:
            - name: all
              domains: ["*"]
              routes:
              - { match: { path: /waits }, route: { cluster: lasting, timeout: 0s, max_stream_duration: { max_stream_duration: 0.2s } } }
              - { match: { prefix: / }, route: { cluster: aging } }
  clusters:
CLUSTERS"#;

const TCP: &str = r#"{ name: envoy.filters.network.tcp_proxy, typed_config: { "@type": type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy, stat_prefix: bytes, cluster: aging } }"#;

fn cluster(name: &str, at: SocketAddr, more: &str) -> String {
    format!(
        "  - {{ name: {name}, type: STATIC, connect_timeout: 1s, {more} load_assignment: {{ cluster_name: {name}, endpoints: \
         [ {{ lb_endpoints: [ {{ endpoint: {{ address: {{ socket_address: {{ address: 127.0.0.1, port_value: {} }} }} }} }} ] }} ] }} }}\n",
        at.port()
    )
}

/// A check that is made once, as far as this test sees.
fn checked(check: &str) -> String {
    format!(
        "health_checks: [ {{ timeout: 1s, interval: 3600s, no_traffic_interval: 3600s, unhealthy_interval: 3600s, \
         unhealthy_edge_interval: 3600s, healthy_edge_interval: 3600s, no_traffic_healthy_interval: 3600s, \
         unhealthy_threshold: 1, healthy_threshold: 1, {check} }} ],"
    )
}

fn config(place: &Place, backend: SocketAddr, nowhere: SocketAddr) -> String {
    let clusters = [
        cluster(
            "aging",
            backend,
            "typed_extension_protocol_options: { envoy.extensions.upstreams.http.v3.HttpProtocolOptions: \
            { \"@type\": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions, \
            common_http_protocol_options: { max_connection_duration: 0.3s }, explicit_http_config: { http_protocol_options: {} } } },",
        ),
        cluster("lasting", backend, ""),
        cluster("well", backend, &checked("http_health_check: { path: /ok }")),
        cluster("ill", backend, &checked("http_health_check: { path: /fails }")),
        cluster("gone", nowhere, &checked("http_health_check: { path: /ok }")),
        cluster("cut", backend, &checked("http_health_check: { path: /breaks }")),
        cluster(
            "named",
            backend,
            &checked("http_health_check: { path: /ok, service_name_matcher: { prefix: named } }"),
        ),
        cluster("open", backend, &checked("tcp_health_check: {}")),
        cluster("shut", nowhere, &checked("tcp_health_check: {}")),
    ];
    let mut out = CONFIG
        .trim_start()
        .replace("CLUSTERS", &clusters.concat())
        .replace("TCP", TCP)
        .replace("ADMIN", &place.admin.port().to_string());
    for (index, at) in place.listeners.iter().enumerate() {
        out = out.replace(&format!("PORT{index}"), &at.port().to_string());
    }
    out
}

async fn connect(at: SocketAddr, bytes: &[u8]) -> TcpStream {
    let mut stream = TcpStream::connect(at).await.unwrap();
    stream.write_all(bytes).await.unwrap();
    stream
}

/// Everything that happens, to one proxy.
async fn everything(place: &Place) {
    let [announced, inspected, http] = place.listeners[..] else {
        panic!("three listeners");
    };
    // No header of the PROXY protocol, a broken one, a good one, and a client that goes in the middle of one.
    for (bytes, ends) in [
        (&b"GET / HTTP/1.1\r\nhost: a\r\n\r\n"[..], true),
        (b"PROXY TCP4 a b c d\r\n", true),
        (
            b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\nGET /ok HTTP/1.1\r\nhost: a\r\n\r\n",
            false,
        ),
        (b"PROXY TCP4 192", false),
    ] {
        let mut stream = connect(announced, bytes).await;
        if ends {
            let _ = soon("the end of a connection", stream.read(&mut [0])).await;
        } else if bytes.ends_with(b"\r\n\r\n") {
            let mut head = [0; 12];
            soon("an answer", stream.read_exact(&mut head)).await.unwrap();
        }
    }
    // A client that says nothing and goes, and one that says nothing for too long.
    drop(connect(inspected, b"").await);
    let mut silent = connect(inspected, b"").await;
    let _ = soon("the end of a silent connection", silent.read(&mut [0])).await;
    // One that resets the connection.
    let reset = connect(inspected, b"").await;
    socket2::SockRef::from(&reset)
        .set_linger(Some(std::time::Duration::ZERO))
        .unwrap();
    drop(reset);
    // A stream that lasts too long.
    let mut stream = connect(http, b"GET /waits HTTP/1.1\r\nhost: a\r\n\r\n").await;
    let mut head = [0; 12];
    soon("an answer", stream.read_exact(&mut head)).await.unwrap();
    assert!(
        head.starts_with(b"HTTP/1.1 50"),
        "{}",
        String::from_utf8_lossy(&head)
    );
    // A connection to an endpoint that becomes too old between two requests.
    for _ in 0..2 {
        let mut stream = connect(http, b"GET /ok HTTP/1.1\r\nhost: a\r\n\r\n").await;
        soon("an answer", stream.read_exact(&mut head)).await.unwrap();
        assert!(head.starts_with(b"HTTP/1.1 200"));
        tokio::time::sleep(std::time::Duration::from_millis(400)).await;
    }
}

/// Which numbers differ, and why.
fn is_pardoned(name: &str) -> bool {
    // Envoy ends an idle connection when it is too old, and this proxy when it would be used again or has been idle too long.
    name == "cluster.aging.upstream_cx_max_duration_reached"
        // Envoy does not count the limit of a route, whose requests end with 504 all the same.
        || name == "cluster.lasting.upstream_rq_max_duration_reached"
}

async fn numbers(place: &Place) -> BTreeMap<String, String> {
    let mut numbers = place.numbers("/stats").await;
    let parts = [
        ".health_check.",
        ".membership_healthy",
        "listener_filter_",
        "no_filter_chain_match",
        "pre_cx_timeout",
        "max_duration_reached",
    ];
    numbers.retain(|name, _| {
        !name.starts_with("listener.admin") && parts.iter().any(|part| name.contains(part))
    });
    numbers
}

#[tokio::test]
async fn what_nothing_else_moves_is_counted_by_its_own_event_as_in_envoy() {
    let (backend, nowhere) = (backend().await, closed_port().await);
    let Some(twins) = Twins::start(3, |place| config(place, backend, nowhere)).await else {
        return;
    };
    for place in twins.places() {
        everything(place).await;
    }
    let (ours, both) = twins.agree(numbers, is_pardoned).await;
    assert!(both > 60, "{both}");
    for (name, expected) in [
        ("cluster.well.health_check.attempt", "1"),
        ("cluster.well.health_check.success", "1"),
        ("cluster.ill.health_check.failure", "1"),
        ("cluster.ill.health_check.network_failure", "0"),
        ("cluster.ill.membership_healthy", "0"),
        ("cluster.gone.health_check.network_failure", "1"),
        ("cluster.cut.health_check.network_failure", "1"),
        ("cluster.named.health_check.verify_cluster", "1"),
        ("cluster.named.health_check.success", "0"),
        ("cluster.open.health_check.success", "1"),
        ("cluster.shut.health_check.failure", "1"),
        ("cluster.lasting.upstream_rq_max_duration_reached", "1"),
        ("listener.L0.downstream_listener_filter_error", "0"),
        ("listener.L1.downstream_listener_filter_error", "1"),
        ("listener.L0.downstream_listener_filter_remote_close", "1"),
        ("listener.L1.downstream_listener_filter_remote_close", "1"),
        ("listener.L1.downstream_pre_cx_timeout", "1"),
    ] {
        assert_eq!(ours.get(name).map(String::as_str), Some(expected), "{name}");
    }
    twins.stop().await;
}

#[tokio::test]
async fn histograms_have_the_buckets_that_the_bootstrap_gives_their_names_as_in_envoy() {
    let more = "stats_config: { histogram_bucket_settings: [ { match: { exact: cluster.aging.upstream_rq_time }, buckets: [ 3, 600000, 0.25 ] }, \
        { match: { prefix: cluster.lasting }, buckets: [ 10000 ] }, { match: { suffix: downstream_cx_length_ms }, buckets: [ 7, 9000 ] } ] }\n";
    let (backend, nowhere) = (backend().await, closed_port().await);
    let Some(twins) = Twins::start(3, |place| config(place, backend, nowhere) + more).await else {
        return;
    };
    let mut found = Vec::new();
    let bounds = regex::Regex::new(r#"^(envoy_[a-z_]+)_bucket\{(.*?),?le="([^"]*)"\} (\d+)$"#).unwrap();
    for place in twins.places() {
        for _ in 0..3 {
            assert_eq!(get(place.listeners[2], "/ok").await.0, 200);
        }
        get(place.listeners[2], "/waits").await;
        // Envoy merges what its workers have seen every few seconds.
        let seen = async {
            loop {
                let text = get(place.admin, "/stats/prometheus").await.2;
                let all: BTreeMap<(String, String), Vec<(String, u64)>> = text
                    .lines()
                    .filter_map(|line| bounds.captures(line))
                    .fold(BTreeMap::new(), |mut all, found| {
                        let key = (found[1].to_owned(), found[2].replace("127.0.0.1_", ""));
                        let entry: &mut Vec<_> = all.entry(key).or_default();
                        entry.push((found[3].to_owned(), found[4].parse().unwrap()));
                        all
                    });
                let last = |cluster: &str| {
                    let key = (
                        "envoy_cluster_upstream_rq_time".to_owned(),
                        format!("envoy_cluster_name=\"{cluster}\""),
                    );
                    all.get(&key)
                        .and_then(|buckets| buckets.last())
                        .map(|last| last.1)
                };
                if last("aging") == Some(3) {
                    return all;
                }
                tokio::time::sleep(std::time::Duration::from_millis(50)).await;
            }
        };
        found.push(soon("histograms", seen).await);
        let cumulative = get(
            place.admin,
            "/stats?type=Histograms&histogram_buckets=cumulative&filter=cluster.aging.upstream_rq_time",
        );
        let line = cumulative.await.2;
        let parts: Vec<_> = line.split_whitespace().collect();
        assert_eq!(parts.len(), 4, "{line}");
        assert!(
            parts[0] == "cluster.aging.upstream_rq_time:"
                && parts[1].starts_with("B0.25(")
                && parts[3].starts_with("B600000(")
                && parts[3].ends_with(",3)"),
            "{line}"
        );
    }
    let le =
        |all: &BTreeMap<(String, String), Vec<(String, u64)>>, family: &str, labels: &str| -> Vec<String> {
            let found = all
                .iter()
                .find(|((name, of), _)| name == family && of.contains(labels));
            found
                .map(|(_, buckets)| buckets.iter().map(|bucket| bucket.0.clone()).collect())
                .unwrap_or_default()
        };
    for (family, labels, expected) in [
        (
            "envoy_cluster_upstream_rq_time",
            "\"aging\"",
            &["0.25", "3", "600000", "+Inf"][..],
        ),
        (
            "envoy_cluster_upstream_cx_connect_ms",
            "\"lasting\"",
            &["10000", "+Inf"],
        ),
        (
            "envoy_cluster_upstream_cx_length_ms",
            "\"lasting\"",
            &["10000", "+Inf"],
        ),
        (
            "envoy_http_downstream_cx_length_ms",
            "\"in\"",
            &["7", "9000", "+Inf"],
        ),
    ] {
        for all in &found {
            assert_eq!(le(all, family, labels), expected, "{family} {labels}");
        }
    }
    // What no entry fits has the default ones.
    assert_eq!(
        le(&found[0], "envoy_cluster_upstream_cx_connect_ms", "\"aging\"").len(),
        20
    );
    assert_eq!(
        le(&found[0], "envoy_cluster_upstream_cx_connect_ms", "\"aging\""),
        le(&found[1], "envoy_cluster_upstream_cx_connect_ms", "\"aging\"")
    );
    twins.stop().await;
}
