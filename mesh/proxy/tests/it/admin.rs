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
    let text = get(admin, "/clusters").await.2;
    assert!(
        text.contains(&format!("c::{}::health_flags::healthy\n", backend.address)),
        "{text}"
    );
    assert!(text.contains("c::default_priority::max_connections::"), "{text}");
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
            "type.googleapis.com/envoy.admin.v3.ClustersConfigDump",
            "type.googleapis.com/envoy.admin.v3.ListenersConfigDump",
            "type.googleapis.com/envoy.admin.v3.RoutesConfigDump",
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
    assert_eq!(post(admin, "/reset_counters").await.0, 501);
    assert_eq!(post(admin, "/drain_listeners?inboundonly&graceful").await.0, 501);
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
