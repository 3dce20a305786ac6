//! The admin port: what tools read there, and its switches.

use std::net::SocketAddr;

use http::Request;
use http_body_util::Full;
use serde_json::Value;
use serin_proxy::control::admin::{AdminPort, Port};
use tokio_util::sync::CancellationToken;

use crate::fixture::*;

/// A proxy that has served one request, and its admin port.
async fn served() -> (Harness, Backend, SocketAddr, SocketAddr, CancellationToken) {
    let harness = Harness::start();
    let backend = Backend::named("b").await;
    harness.cluster("c", &[backend.address]).await;
    let at = harness
        .serve(vec![
            prefix_route("/none", to_cluster("none")),
            prefix_route("/", to_cluster("c")),
        ])
        .await;
    harness.proxy.set_ready();
    let port = AdminPort::bind(&harness.proxy, "127.0.0.1:0".parse().unwrap(), Port::Admin).unwrap();
    let admin = port.address().unwrap();
    let cancel = CancellationToken::new();
    tokio::spawn(port.serve(harness.proxy.clone(), CancellationToken::new(), cancel.clone()));
    assert_eq!(get(at, "/").await.0, 200);
    (harness, backend, at, admin, cancel)
}

async fn json(admin: SocketAddr, path: &str) -> Value {
    let (status, headers, body) = get(admin, path).await;
    assert_eq!(status, 200, "{path}: {body}");
    assert_eq!(headers["content-type"], "application/json", "{path}");
    serde_json::from_str(&body).unwrap()
}

async fn post(admin: SocketAddr, path: &str) -> (u16, String) {
    let request = Request::post(path)
        .header("host", "a")
        .body(Full::from(""))
        .unwrap();
    let (status, _, body) = send(admin, request).await;
    (status, body)
}

#[tokio::test]
async fn clusters_listeners_memory_and_server_info_have_envoys_shapes() {
    let (_harness, backend, at, admin, cancel) = served().await;
    let clusters = json(admin, "/clusters?format=json").await;
    let cluster = &clusters["cluster_statuses"][0];
    assert_eq!(cluster["name"], "c");
    assert!(cluster["circuit_breakers"]["thresholds"][0]["max_retries"].is_u64());
    let host = &cluster["host_statuses"][0];
    assert_eq!(
        host["address"]["socket_address"]["port_value"],
        u64::from(backend.address.port())
    );
    assert_eq!(host["health_status"]["eds_health_status"], "HEALTHY");
    let stat = |name: &str| {
        let stats = host["stats"].as_array().unwrap();
        stats.iter().find(|one| one["name"] == name).unwrap().clone()
    };
    assert_eq!(stat("rq_total")["value"], "1");
    assert_eq!(stat("rq_success")["value"], "1");
    assert_eq!(stat("rq_error")["value"], "0");
    assert_eq!(stat("cx_total")["value"], "1");
    assert_eq!(stat("cx_active")["type"], "GAUGE");
    let text = get(admin, "/clusters").await.2;
    assert!(
        text.contains(&format!("c::{}::health_flags::healthy\n", backend.address)),
        "{text}"
    );
    assert!(text.contains("c::default_priority::max_connections::"), "{text}");
    for line in ["rq_total::1", "rq_active::0", "cx_connect_fail::0", "priority::0"] {
        assert!(
            text.contains(&format!("c::{}::{line}\n", backend.address)),
            "{line}\n{text}"
        );
    }
    let listeners = json(admin, "/listeners?format=json").await;
    assert_eq!(
        listeners["listener_statuses"][0]["local_address"]["socket_address"]["port_value"],
        u64::from(at.port())
    );
    let memory = json(admin, "/memory").await;
    assert!(
        memory["total_physical_bytes"]
            .as_str()
            .unwrap()
            .parse::<u64>()
            .unwrap()
            > 100_000
    );
    let info = json(admin, "/server_info").await;
    assert_eq!(
        (&info["state"], &info["command_line_options"]["concurrency"]),
        (&"LIVE".into(), &1.into())
    );
    assert!(info["uptime_current_epoch"].as_str().unwrap().ends_with('s'));
    cancel.cancel();
}

#[tokio::test]
async fn config_dump_has_envoys_sections_and_can_be_narrowed() {
    let (_harness, _backend, _at, admin, cancel) = served().await;
    let dump = json(admin, "/config_dump").await;
    let sections: Vec<_> = dump["configs"]
        .as_array()
        .unwrap()
        .iter()
        .map(|section| section["@type"].clone())
        .collect();
    assert_eq!(
        sections,
        [
            "type.googleapis.com/envoy.admin.v3.BootstrapConfigDump",
            "type.googleapis.com/envoy.admin.v3.ClustersConfigDump",
            "type.googleapis.com/envoy.admin.v3.ListenersConfigDump",
            "type.googleapis.com/envoy.admin.v3.RoutesConfigDump",
            "type.googleapis.com/envoy.admin.v3.SecretsConfigDump",
        ]
    );
    let clusters = json(
        admin,
        "/config_dump?resource=dynamic_active_clusters&name_regex=%5Ec$",
    )
    .await;
    assert_eq!(clusters["configs"][0]["cluster"]["type"], "EDS");
    let none = json(
        admin,
        "/config_dump?resource=dynamic_active_clusters&name_regex=x",
    )
    .await;
    assert_eq!(none["configs"].as_array().unwrap().len(), 0);
    assert_eq!(get(admin, "/config_dump?resource=nothing").await.0, 404);
    assert_eq!(get(admin, "/config_dump?mask=name").await.0, 400);
    assert_eq!(get(admin, "/config_dump?name_regex=%5B").await.0, 400);
    cancel.cancel();
}

#[tokio::test]
async fn statistics_have_envoys_names_and_can_be_filtered() {
    let (_harness, _backend, at, admin, cancel) = served().await;
    assert_eq!(get(at, "/none").await.0, 503);
    let text = get(admin, "/stats").await.2;
    let address = format!("listener.{}_0", at.ip());
    for line in [
        "cluster.c.upstream_rq_total: 1",
        "cluster.c.upstream_rq_completed: 1",
        "cluster.c.upstream_rq_2xx: 1",
        "cluster.c.upstream_rq_5xx: 0",
        "cluster.c.membership_healthy: 1",
        "http.test.downstream_rq_total: 2",
        "http.test.downstream_rq_2xx: 1",
        "http.test.downstream_rq_5xx: 1",
        "http.test.downstream_cx_total: 2",
        &format!("{address}.downstream_cx_total: 2"),
        "server.live: 1",
        "server.concurrency: 1",
        "listener_manager.workers_started: 1",
    ] {
        assert!(text.lines().any(|own| own == line), "{line}\n{text}");
    }
    let used = get(
        admin,
        "/stats?usedonly&filter=%5Ecluster%5C.c%5C.upstream_rq_%5B0-9%5Dxx",
    )
    .await
    .2;
    assert_eq!(used, "cluster.c.upstream_rq_2xx: 1\n");
    let stats = json(admin, "/stats?format=json&filter=server.live").await;
    assert_eq!(
        stats["stats"],
        serde_json::json!([{"name": "server.live", "value": 1.0}])
    );
    let histograms = json(admin, "/stats?format=json&type=Histograms").await;
    assert!(histograms["stats"][0]["histograms"]["computed_quantiles"][0]["name"].is_string());
    assert_eq!(get(admin, "/stats?filter=%5B").await.0, 400);
    assert_eq!(get(admin, "/stats?format=xml").await.0, 400);
    cancel.cancel();
}

#[tokio::test]
async fn prometheus_gets_the_format_that_it_accepts() {
    let (_harness, _backend, _at, admin, cancel) = served().await;
    let accepting = async |accept: &str| {
        let request = Request::get("/stats/prometheus?filter=upstream_rq_total")
            .header("host", "a")
            .header("accept", accept)
            .body(Full::from(""))
            .unwrap();
        let (status, headers, body) = send(admin, request).await;
        assert_eq!(status, 200);
        (headers["content-type"].to_str().unwrap().to_owned(), body)
    };
    let sample = "envoy_cluster_upstream_rq_total{envoy_cluster_name=\"c\"} 1\n";
    let (kind, body) = accepting("text/plain").await;
    assert!(kind.starts_with("text/plain; version=0.0.4"), "{kind}");
    assert!(body.contains(sample) && !body.contains("# EOF"), "{body}");
    let (kind, body) = accepting("application/openmetrics-text; version=1.0.0").await;
    assert!(
        kind.starts_with("application/openmetrics-text; version=1.0.0"),
        "{kind}"
    );
    assert!(body.contains(sample) && body.ends_with("# EOF\n"), "{body}");
    let (kind, body) = accepting(
        "application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;encoding=delimited",
    )
    .await;
    assert!(kind.starts_with("application/vnd.google.protobuf"), "{kind}");
    // What it decodes to is shown beside the encoder.
    assert!(body.contains("envoy_cluster_upstream_rq_total"), "{body}");
    cancel.cancel();
}

#[tokio::test]
async fn readiness_can_be_failed_on_purpose_and_what_is_not_there_is_refused() {
    let (_harness, _backend, _at, admin, cancel) = served().await;
    assert_eq!(get(admin, "/ready").await.2, "LIVE\n");
    assert_eq!(get(admin, "/healthcheck/fail").await.0, 405);
    assert_eq!(post(admin, "/healthcheck/fail").await.0, 200);
    let (status, _, body) = get(admin, "/ready").await;
    assert_eq!((status, &*body), (503, "DRAINING\n"));
    assert_eq!(post(admin, "/healthcheck/ok").await.0, 200);
    assert_eq!(get(admin, "/ready").await.0, 200);
    assert_eq!(get(admin, "/reset_counters").await.0, 405);
    assert_eq!(post(admin, "/drain_listeners?skip_exit").await.0, 400);
    cancel.cancel();
}

#[tokio::test]
async fn levels_of_the_log_are_changed_while_the_process_runs() {
    let admin = free_port().await;
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("bootstrap.yaml");
    let text = format!(
        "admin: {{address: {{socket_address: {{address: 127.0.0.1, port_value: {}}}}}}}\n",
        admin.port()
    );
    std::fs::write(&path, text).unwrap();
    let _child = tokio::process::Command::new(env!("CARGO_BIN_EXE_serin-proxy"))
        .args(["--concurrency", "1", "--config"])
        .arg(&path)
        .env("RUST_LOG", "warn")
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    soon("the admin port", async {
        while tokio::net::TcpStream::connect(admin).await.is_err() {
            tokio::task::yield_now().await;
        }
    })
    .await;
    assert!(get(admin, "/logging").await.2.contains("  worker: warning\n"));
    assert_eq!(get(admin, "/logging?level=debug").await.0, 405);
    let (status, shown) = post(admin, "/logging?paths=worker:debug").await;
    assert_eq!(status, 200);
    assert!(
        shown.contains("  worker: debug\n") && shown.contains("  tls: warning\n"),
        "{shown}"
    );
    assert_eq!(post(admin, "/logging?level=loud").await.0, 400);
    assert!(get(admin, "/logging").await.2.contains("  worker: debug\n"));
}

/// Waits until a line of `/stats` is there.
async fn told(admin: SocketAddr, line: &str) {
    soon(line, async {
        while !get(admin, "/stats").await.2.lines().any(|own| own == line) {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

#[tokio::test]
async fn connections_requests_and_their_times_are_counted_by_cluster_listener_and_manager() {
    let (harness, _backend, at, admin, cancel) = served().await;
    let missing = closed_port().await;
    harness.cluster("gone", &[missing]).await;
    harness
        .routes(vec![host(
            "all",
            "*",
            vec![
                prefix_route("/gone", to_cluster("gone")),
                prefix_route("/", to_cluster("c")),
            ],
        )])
        .await;
    assert_eq!(get(at, "/gone").await.0, 503);
    assert_eq!(get(at, "/").await.0, 200);
    let listener = format!("listener.{}_0", at.ip());
    for line in [
        "cluster.c.upstream_rq_total: 2",
        "cluster.c.upstream_rq_200: 2",
        "cluster.c.upstream_rq_active: 0",
        "cluster.c.upstream_cx_total: 1",
        "cluster.c.upstream_cx_active: 1",
        "cluster.c.upstream_cx_http1_total: 1",
        "cluster.c.upstream_cx_http2_total: 0",
        "cluster.c.upstream_cx_connect_fail: 0",
        "cluster.c.upstream_rq_pending_total: 1",
        "cluster.c.upstream_rq_pending_active: 0",
        "cluster.gone.upstream_cx_total: 1",
        "cluster.gone.upstream_cx_connect_fail: 1",
        "cluster.gone.upstream_cx_connect_timeout: 0",
        "cluster.gone.upstream_cx_destroy: 1",
        "cluster.gone.upstream_cx_active: 0",
        "cluster.gone.upstream_rq_503: 1",
        "cluster.gone.upstream_rq_5xx: 1",
        "http.test.downstream_rq_completed: 3",
        "http.test.downstream_rq_active: 0",
        "http.test.downstream_cx_http1_total: 3",
        "http.test.downstream_cx_http2_total: 0",
        "http.test.downstream_cx_active: 0",
        &format!("{listener}.downstream_cx_active: 0"),
        &format!("{listener}.downstream_cx_destroy: 3"),
    ] {
        told(admin, line).await;
    }
    let histogram = async |name: &str| {
        let path = format!("/stats?format=json&histogram_buckets=detailed&filter=%5E{name}%24");
        let stats = json(admin, &path).await;
        let details = stats["stats"][0]["histograms"]["details"]
            .as_array()
            .unwrap()
            .clone();
        let totals = details[0]["totals"].as_array().unwrap().clone();
        totals
            .iter()
            .map(|bucket| bucket["count"].as_u64().unwrap())
            .sum::<u64>()
    };
    for (name, count) in [
        ("cluster.c.upstream_rq_time", 2),
        ("cluster.c.upstream_cx_connect_ms", 1),
        ("cluster.c.upstream_cx_length_ms", 0),
        ("http.test.downstream_rq_time", 3),
        ("http.test.downstream_cx_length_ms", 3),
        (&format!("{listener}.downstream_cx_length_ms"), 3),
    ] {
        assert_eq!(histogram(name).await, count, "{name}");
    }
    // A response of 1 byte and its head; a request's head.
    for name in ["upstream_cx_rx_bytes_total", "upstream_cx_tx_bytes_total"] {
        let bytes = harness.counter(&format!("envoy_cluster_{name}"), &[("envoy_cluster_name", "c")]);
        assert!(bytes > 50.0, "{name}: {bytes}");
    }
    let prometheus = get(admin, "/stats/prometheus").await.2;
    for line in [
        "envoy_cluster_upstream_rq{envoy_response_code=\"200\",envoy_cluster_name=\"c\"} 2",
        "envoy_cluster_upstream_cx_total{envoy_cluster_name=\"c\"} 1",
        "envoy_cluster_upstream_rq_time_count{envoy_cluster_name=\"c\"} 2",
        "envoy_http_downstream_rq_xx{envoy_response_code_class=\"2\",envoy_http_conn_manager_prefix=\"test\"} 2",
    ] {
        assert!(prometheus.lines().any(|own| own == line), "{line}\n{prometheus}");
    }
    assert_eq!(get(admin, "/stats?histogram_buckets=all").await.0, 400);
    cancel.cancel();
}

#[tokio::test]
async fn high_priority_has_circuit_breakers_of_its_own_which_statistics_show() {
    use serin_xds::pb::envoy::config::cluster::v3 as cluster;
    let (harness, _backend, at, admin, cancel) = served().await;
    let thresholds = |priority, requests| cluster::circuit_breakers::Thresholds {
        priority,
        max_requests: number(requests),
        track_remaining: true,
        ..Default::default()
    };
    let mut limited = eds_cluster("c");
    limited.circuit_breakers = Some(cluster::CircuitBreakers {
        thresholds: vec![thresholds(0, 0), thresholds(1, 5)],
        ..Default::default()
    });
    harness.put(serin_xds::ResourceType::Cluster, "c", &limited).await;
    let mut high = to_cluster("c");
    high.priority = 1;
    harness
        .routes(vec![host(
            "all",
            "*",
            vec![prefix_route("/high", high), prefix_route("/", to_cluster("c"))],
        )])
        .await;
    assert_eq!(get(at, "/").await.0, 503);
    assert_eq!(get(at, "/high").await.0, 200);
    for line in [
        "cluster.c.circuit_breakers.default.rq_open: 1",
        "cluster.c.circuit_breakers.default.remaining_rq: 0",
        "cluster.c.circuit_breakers.high.rq_open: 0",
        "cluster.c.circuit_breakers.high.remaining_rq: 5",
        "cluster.c.circuit_breakers.high.remaining_cx: 1023",
        "cluster.c.upstream_rq_pending_overflow: 1",
    ] {
        told(admin, line).await;
    }
    let clusters = json(admin, "/clusters?format=json").await;
    let shown = &clusters["cluster_statuses"][0]["circuit_breakers"]["thresholds"];
    assert_eq!(
        (&shown[0]["max_requests"], &shown[1]["max_requests"]),
        (&0.into(), &5.into())
    );
    assert_eq!(shown[1]["priority"], "HIGH");
    let text = get(admin, "/clusters").await.2;
    assert!(text.contains("c::high_priority::max_requests::5\n"), "{text}");
    cancel.cancel();
}

#[tokio::test]
async fn config_dump_holds_resources_whole_and_a_mask_leaves_what_it_names() {
    use serin_xds::ResourceType;
    let (harness, _backend, _at, admin, cancel) = served().await;
    let mut vhds = host("found", "found.example", vec![prefix_route("/", to_cluster("c"))]);
    vhds.include_request_attempt_count = true;
    harness.put(ResourceType::VirtualHost, "80/found", &vhds).await;
    let dump = json(admin, "/config_dump?include_eds").await;
    let sections = dump["configs"].as_array().unwrap();
    assert_eq!(sections.len(), 6);
    let section = |kind: &str| {
        let name = format!("type.googleapis.com/envoy.admin.v3.{kind}ConfigDump");
        sections.iter().find(|section| section["@type"] == name).unwrap()
    };
    let cluster = &section("Clusters")["dynamic_active_clusters"][0]["cluster"];
    assert_eq!(cluster["connect_timeout"], "2s");
    assert_eq!(
        cluster["metadata"]["filter_metadata"]["istio"]["services"][0]["name"],
        "reviews"
    );
    let listener = &section("Listeners")["dynamic_listeners"][0]["active_state"]["listener"];
    let manager = &listener["filter_chains"][0]["filters"][0]["typed_config"];
    assert_eq!(manager["upgrade_configs"][0]["upgrade_type"], "websocket");
    assert_eq!(manager["rds"]["route_config_name"], "80");
    let hosts = &section("Routes")["dynamic_route_configs"][0]["route_config"]["virtual_hosts"];
    assert_eq!(hosts[0]["routes"][0]["route"]["cluster"], "none");
    assert_eq!(hosts[1]["include_request_attempt_count"], true);
    let endpoints = &section("Endpoints")["dynamic_endpoint_configs"][0]["endpoint_config"];
    assert_eq!(endpoints["cluster_name"], "c");
    // Without whole messages Envoy's own reader would refuse it.
    assert_eq!(
        cluster["@type"],
        "type.googleapis.com/envoy.config.cluster.v3.Cluster"
    );

    let masked = json(admin, "/config_dump?mask=dynamic_active_clusters").await;
    assert_eq!(masked["configs"].as_array().unwrap().len(), 1);
    let masked = json(
        admin,
        "/config_dump?resource=dynamic_active_clusters&mask=cluster.name,cluster.type",
    )
    .await;
    assert_eq!(
        masked["configs"][0]["cluster"],
        serde_json::json!({"@type": cluster["@type"], "name": "c", "type": "EDS"})
    );
    harness.remove(ResourceType::Cluster, "c").await;
    let gone = json(admin, "/config_dump?resource=dynamic_active_clusters").await;
    assert_eq!(gone["configs"].as_array().unwrap().len(), 0);
    cancel.cancel();
}

#[tokio::test]
async fn counters_are_shown_from_zero_after_a_reset() {
    let (_harness, _backend, at, admin, cancel) = served().await;
    told(admin, "cluster.c.upstream_rq_total: 1").await;
    told(admin, "http.test.downstream_cx_destroy: 1").await;
    assert_eq!(post(admin, "/reset_counters").await.0, 200);
    told(admin, "cluster.c.upstream_rq_total: 0").await;
    told(admin, "cluster.c.upstream_rq_200: 0").await;
    told(admin, "cluster.c.membership_total: 1").await;
    assert_eq!(get(at, "/").await.0, 200);
    told(admin, "cluster.c.upstream_rq_total: 1").await;
    told(admin, "http.test.downstream_rq_completed: 1").await;
    cancel.cancel();
}

#[tokio::test]
async fn inbound_listeners_drain_alone_gracefully_or_at_once() {
    use serin_xds::ResourceType;
    use serin_xds::pb::envoy::config::core::v3::TrafficDirection;
    let (harness, _backend, at, admin, cancel) = served().await;
    let inbound = async |name: &str| {
        let listener = listener_of(name, TrafficDirection::Inbound, vec![http_chain(&manager("80"))]);
        harness.put(ResourceType::Listener, name, &listener).await;
        harness.proxy.listener_address(name).unwrap()
    };
    let first = inbound("in").await;
    harness.proxy.set_drain_time(std::time::Duration::from_millis(50));
    assert_eq!(get(first, "/").await.0, 200);
    assert_eq!(post(admin, "/drain_listeners?inboundonly&graceful").await.0, 200);
    soon("the end of the inbound listener", async {
        while tokio::net::TcpStream::connect(first).await.is_ok() {
            tokio::task::yield_now().await;
        }
    })
    .await;
    let second = inbound("in2").await;
    assert_eq!(get(second, "/").await.0, 200);
    assert_eq!(post(admin, "/drain_listeners?inboundonly").await.0, 200);
    soon("the end of the other one", async {
        while tokio::net::TcpStream::connect(second).await.is_ok() {
            tokio::task::yield_now().await;
        }
    })
    .await;
    let (status, headers, _) = get(at, "/").await;
    assert_eq!(status, 200, "outbound listeners serve on");
    assert!(!headers.contains_key("connection"));
    assert_eq!(get(admin, "/ready").await.0, 200);
    cancel.cancel();
}

#[tokio::test]
async fn a_graceful_drain_that_skips_the_end_discourages_clients_and_serves_on() {
    let (harness, _backend, at, admin, cancel) = served().await;
    harness.proxy.set_drain_time(std::time::Duration::ZERO);
    assert_eq!(post(admin, "/drain_listeners?graceful&skip_exit").await.0, 200);
    soon("the drain", async {
        while harness.proxy.is_ready() {
            tokio::task::yield_now().await;
        }
    })
    .await;
    for _ in 0..3 {
        let (status, headers, _) = get(at, "/").await;
        assert_eq!(status, 200);
        assert_eq!(headers["connection"], "close");
    }
    cancel.cancel();
}

#[tokio::test]
async fn an_endpoint_that_fails_is_told_from_the_others_by_its_counters() {
    let (harness, _backend, at, admin, cancel) = served().await;
    let bad = Backend::answering(|_| {
        let mut response = http::Response::new(Full::from("bad"));
        *response.status_mut() = http::StatusCode::SERVICE_UNAVAILABLE;
        response
    })
    .await;
    harness.cluster("c", &[bad.address, closed_port().await]).await;
    let count = |text: &str, name: &str| -> Vec<u64> {
        let lines = text.lines().filter(|line| line.starts_with("c::127."));
        let values = lines.filter_map(|line| line.split_once(&format!("::{name}::")));
        values.map(|(_, value)| value.parse().unwrap()).collect()
    };
    // Until both have been tried.
    for sent in 1..1_000 {
        assert_eq!(get(at, "/").await.0, 503);
        let text = get(admin, "/clusters").await.2;
        assert_eq!(count(&text, "rq_total").iter().sum::<u64>(), sent, "{text}");
        assert_eq!(count(&text, "rq_error"), count(&text, "rq_total"), "{text}");
        assert_eq!(count(&text, "rq_success"), [0, 0], "{text}");
        assert_eq!(count(&text, "cx_connect_fail")[0], 0, "{text}");
        if count(&text, "rq_total").iter().all(|count| *count > 0) {
            assert!(count(&text, "cx_connect_fail")[1] > 0, "{text}");
            cancel.cancel();
            return;
        }
    }
    panic!("one of two endpoints is never tried");
}

#[tokio::test]
async fn config_dump_says_which_version_is_in_use_since_when_and_what_was_refused_since() {
    use serin_xds::ResourceType;
    use serin_xds::client::Endpoint;
    use serin_xds::server::Event;
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("xds.sock");
    let mut ads = crate::ads::Ads::start(&socket).unwrap();
    let harness = Harness::start();
    let port = AdminPort::bind(&harness.proxy, "127.0.0.1:0".parse().unwrap(), Port::Admin).unwrap();
    let admin = port.address().unwrap();
    let cancel = CancellationToken::new();
    tokio::spawn(port.serve(harness.proxy.clone(), CancellationToken::new(), cancel.clone()));
    let follower =
        serin_proxy::control::xds::follow(harness.proxy.clone(), Endpoint::Unix(socket), cancel.clone());
    tokio::spawn(follower);
    let told = |event: &Event, refused: bool| match event {
        Event::Held(held) => !refused && held.resource_type == ResourceType::Cluster,
        Event::Refused(..) => refused,
        _ => false,
    };
    let good = crate::fixture::eds_cluster("c");
    let mut bad = good.clone();
    bad.lb_policy =
        serin_xds::pb::envoy::config::cluster::v3::cluster::LbPolicy::LoadBalancingPolicyConfig as i32;
    let never = serin_xds::pb::envoy::config::cluster::v3::Cluster {
        name: "never".into(),
        ..bad.clone()
    };
    let mut versions = Vec::new();
    for (name, message, refused) in [("c", &good, false), ("c", &bad, true), ("never", &never, true)] {
        let resource = serin_xds::Resource::new(ResourceType::Cluster, name, message, []);
        versions.push(resource.version.to_string());
        ads.source.put_all([resource]);
        let event = async { while !told(&ads.events.recv().await.unwrap().1, refused) {} };
        soon("what the proxy says of it", event).await;
    }
    let dump = json(admin, "/config_dump?resource=dynamic_active_clusters").await;
    let entries = dump["configs"].as_array().unwrap();
    assert_eq!(entries.len(), 2, "{dump}");
    assert_eq!(entries[0]["version_info"], *versions[0]);
    assert_eq!(entries[0]["cluster"]["name"], "c");
    let since = entries[0]["last_updated"].as_str().unwrap();
    assert!(
        since.len() == 24 && since.starts_with("20") && since.ends_with('Z'),
        "{since}"
    );
    let failed = &entries[0]["error_state"];
    assert_eq!(failed["version_info"], *versions[1]);
    assert_eq!(failed["failed_configuration"]["name"], "c");
    assert!(
        failed["last_update_attempt"].as_str().unwrap() >= since,
        "{failed}"
    );
    assert!(!failed["details"].as_str().unwrap().is_empty());
    assert!(entries[1]["cluster"].is_null(), "nothing of it was ever taken");
    assert_eq!(entries[1]["error_state"]["failed_configuration"]["name"], "never");
    cancel.cancel();
}
