//! Istio's metrics: labels, peers, exposition.

use base64::Engine;
use http::Request;
use http_body_util::Full;
use prost::Message;
use serin_proxy::metrics::text;
use serin_xds::pb::envoy::config::core::v3 as core;

use crate::fixture::*;

#[tokio::test]
async fn the_source_side_reports_with_istios_exact_labels() {
    let harness = Harness::start();
    let backend = Backend::named("12345").await;
    harness
        .cluster("outbound|80||reviews.prod.svc.cluster.local", &[backend.address])
        .await;
    let action = to_cluster("outbound|80||reviews.prod.svc.cluster.local");
    let at = harness.serve(vec![prefix_route("/", action)]).await;
    let request = Request::post("/")
        .header("host", "reviews")
        .body(Full::from("123"))
        .unwrap();
    assert_eq!(send(at, request).await.0, 200);
    let text = text::write(&harness.proxy.metrics());
    let line = text
        .lines()
        .find(|line| line.starts_with("istio_requests_total{"))
        .expect("the counter");
    let expected = [
        ("reporter", "source"),
        ("source_workload", "gate-v9"),
        ("source_canonical_service", "gate"),
        ("source_canonical_revision", "v9"),
        ("source_workload_namespace", "edge"),
        ("source_principal", "unknown"),
        ("source_app", "gate"),
        ("source_version", "v9"),
        ("source_cluster", "k"),
        ("destination_workload", "reviews-v1"),
        ("destination_workload_namespace", "prod"),
        ("destination_principal", "unknown"),
        ("destination_app", "reviews"),
        ("destination_version", "v1"),
        ("destination_service", "reviews.prod.svc.cluster.local"),
        ("destination_canonical_service", "reviews"),
        ("destination_canonical_revision", "v1"),
        ("destination_service_name", "reviews"),
        ("destination_service_namespace", "prod"),
        ("destination_cluster", "k"),
        ("request_protocol", "http"),
        ("response_code", "200"),
        ("grpc_response_status", ""),
        ("response_flags", "-"),
        ("connection_security_policy", "unknown"),
    ];
    for (name, value) in expected {
        assert!(
            line.contains(&format!("{name}=\"{value}\"")),
            "{name}={value} is not in {line}"
        );
    }
    assert_eq!(line.matches("=\"").count(), expected.len(), "{line}");
    assert!(line.ends_with("} 1"), "{line}");
    let sum = |name: &str| {
        let start = format!("{name}_sum{{");
        text.lines()
            .find(|line| line.starts_with(&start))
            .and_then(|line| line.rsplit(' ').next())
            .map(str::to_owned)
    };
    assert_eq!(sum("istio_request_bytes").as_deref(), Some("3"));
    assert_eq!(sum("istio_response_bytes").as_deref(), Some("5"));
    assert!(text.contains("istio_request_duration_milliseconds_bucket{"));
}

#[tokio::test]
async fn the_destination_side_learns_its_peer_from_the_metadata_header_and_keeps_it_from_the_application() {
    let harness = Harness::start();
    let mut backend = Backend::named("b").await;
    harness.cluster("inbound|8080||", &[backend.address]).await;
    harness
        .routes(vec![host(
            "all",
            "*",
            vec![prefix_route("/", to_cluster("inbound|8080||"))],
        )])
        .await;
    let at = harness
        .listen(&manager("80"), core::TrafficDirection::Inbound)
        .await;
    let peer = string_struct(&[("WORKLOAD_NAME", "web-v1"), ("NAMESPACE", "shop")]);
    let header = base64::engine::general_purpose::STANDARD.encode(peer.encode_to_vec());
    let request = Request::get("/")
        .header("host", "reviews")
        .header("x-envoy-peer-metadata", header)
        .header("x-envoy-peer-metadata-id", "sidecar~1~web.shop~d")
        .body(Full::from(""))
        .unwrap();
    assert_eq!(send(at, request).await.0, 200);
    let labels = [
        ("reporter", "destination"),
        ("source_workload", "web-v1"),
        ("source_workload_namespace", "shop"),
        ("destination_workload", "gate-v9"),
        ("connection_security_policy", "none"),
    ];
    assert_eq!(harness.counter("istio_requests_total", &labels), 1.0);
    let seen = backend.next().await;
    assert!(!seen.headers.contains_key("x-envoy-peer-metadata"));
    assert_eq!(get(at, "/").await.0, 200);
    assert_eq!(
        harness.counter("istio_requests_total", &[("source_workload", "unknown")]),
        1.0
    );
}

#[tokio::test]
async fn the_source_side_tells_its_peer_who_it_is() {
    let harness = Harness::start();
    let mut backend = Backend::named("b").await;
    harness.cluster("c", &[backend.address]).await;
    let at = harness.serve(vec![prefix_route("/", to_cluster("c"))]).await;
    get(at, "/").await;
    let seen = backend.next().await;
    let workload =
        serin_proxy::metrics::peer::Workload::of_header(seen.headers["x-envoy-peer-metadata"].as_bytes())
            .unwrap();
    assert_eq!((&*workload.name, &*workload.namespace), ("gate-v9", "edge"));
    assert_eq!(
        seen.headers["x-envoy-peer-metadata-id"],
        "router~10.0.0.1~gate-0.edge~edge.svc.cluster.local"
    );
}

#[tokio::test]
async fn a_client_that_goes_away_is_counted_as_dc() {
    let mut harness = Harness::start();
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    harness.cluster("c", &[silent.local_addr().unwrap()]).await;
    let at = harness.serve(vec![prefix_route("/", to_cluster("c"))]).await;
    let waiting = tokio::spawn(raw(at, b"GET / HTTP/1.1\r\nhost: a\r\n\r\n"));
    let (_held, _) = soon("the request", silent.accept()).await.unwrap();
    waiting.abort();
    let line = harness.line().await;
    assert_eq!(
        (line["response_flags"].as_str(), line["response_code"].as_u64()),
        (Some("DC"), Some(0))
    );
    assert_eq!(
        harness.counter(
            "istio_requests_total",
            &[("response_flags", "DC"), ("response_code", "0")]
        ),
        1.0
    );
}
