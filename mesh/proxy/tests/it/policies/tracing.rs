//! Traces: contexts passed on, spans reported.

use serin_xds::pb::envoy::config::trace::v3 as trace;
use serin_xds::pb::envoy::r#type::tracing::v3 as tag;

use super::*;

const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";

fn tracing(provider: google::Any, random: f64) -> hcm::http_connection_manager::Tracing {
    hcm::http_connection_manager::Tracing {
        random_sampling: Some(envoy_type::Percent { value: random }),
        provider: Some(trace::tracing::Http {
            name: "provider".into(),
            config_type: Some(trace::tracing::http::ConfigType::TypedConfig(provider)),
        }),
        custom_tags: vec![tag::CustomTag {
            tag: "tenant".into(),
            r#type: Some(tag::custom_tag::Type::RequestHeader(tag::custom_tag::Header {
                name: "x-tenant".into(),
                default_value: "nobody".into(),
            })),
        }],
        ..Default::default()
    }
}

fn zipkin() -> google::Any {
    any(&trace::ZipkinConfig {
        collector_cluster: "collector".into(),
        collector_endpoint: "/api/v2/spans".into(),
        collector_endpoint_version: trace::zipkin_config::CollectorEndpointVersion::HttpJson as i32,
        ..Default::default()
    })
}

fn otlp() -> google::Any {
    any(&trace::OpenTelemetryConfig {
        http_service: Some(core::HttpService {
            http_uri: Some(core::HttpUri {
                uri: "http://collector.example/v1/traces".into(),
                timeout: millis(5000),
                http_upstream_type: Some(core::http_uri::HttpUpstreamType::Cluster("collector".into())),
            }),
            ..Default::default()
        }),
        service_name: "shop".into(),
        ..Default::default()
    })
}

async fn traced(provider: google::Any, random: f64) -> (Harness, Backend, Backend, SocketAddr) {
    let harness = Harness::start();
    let backend = Backend::named("ok").await;
    let collector = Backend::named("").await;
    harness.cluster("c", &[backend.address]).await;
    harness.cluster("collector", &[collector.address]).await;
    harness.routes(to_c()).await;
    let mut manager = manager("80");
    manager.tracing = Some(tracing(provider, random));
    let at = harness.listen(&manager, core::TrafficDirection::Inbound).await;
    (harness, backend, collector, at)
}

#[tokio::test]
async fn a_sampled_request_is_reported_to_zipkin_with_its_tags() {
    let (harness, mut backend, mut collector, at) = traced(zipkin(), 0.0).await;
    let (status, ..) = get_with(
        at,
        "/a",
        &[
            ("x-b3-traceid", TRACE),
            ("x-b3-spanid", "b7ad6b7169203331"),
            ("x-b3-sampled", "1"),
            ("x-tenant", "acme"),
        ],
    )
    .await;
    assert_eq!(status, 200);
    let seen = backend.next().await;
    assert_eq!(seen.headers["x-b3-traceid"], TRACE);
    assert_eq!(seen.headers["x-b3-parentspanid"], "b7ad6b7169203331");
    let report = collector.next().await;
    assert_eq!((&*report.method, &*report.path), ("POST", "/api/v2/spans"));
    let spans: serde_json::Value = serde_json::from_slice(&report.body).unwrap();
    let span = &spans[0];
    assert_eq!(
        (&span["traceId"], &span["parentId"]),
        (&TRACE.into(), &"b7ad6b7169203331".into())
    );
    assert_eq!(span["id"], seen.headers["x-b3-spanid"].to_str().unwrap());
    assert_eq!(
        (&span["kind"], &span["name"]),
        (&"SERVER".into(), &"ingress".into())
    );
    let tags = &span["tags"];
    assert_eq!(
        (&tags["http.status_code"], &tags["tenant"]),
        (&"200".into(), &"acme".into())
    );
    assert_eq!(tags["upstream_cluster"], "c");
    soon("the count of spans", async {
        while harness.counter("envoy_tracing_spans_sent", &[]) < 1.0 {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

#[tokio::test]
async fn w3c_contexts_are_continued_and_what_is_not_sampled_is_not_reported() {
    let (_harness, mut backend, mut collector, at) = traced(otlp(), 0.0).await;
    let parent = |flags: &str| format!("00-{TRACE}-b7ad6b7169203331-{flags}");
    get_with(
        at,
        "/quiet",
        &[("traceparent", &parent("00")), ("tracestate", "k=v")],
    )
    .await;
    let seen = backend.next().await;
    let passed = seen.headers["traceparent"].to_str().unwrap();
    assert!(
        passed.starts_with(&format!("00-{TRACE}-")) && passed.ends_with("-00"),
        "{passed}"
    );
    assert!(!passed.contains("b7ad6b7169203331"), "a span of its own");
    assert_eq!(seen.headers["tracestate"], "k=v");
    get_with(at, "/loud", &[("traceparent", &parent("01"))]).await;
    backend.next().await;
    let report = collector.next().await;
    assert_eq!(
        (&*report.path, report.headers["content-type"].as_bytes()),
        ("/v1/traces", &b"application/x-protobuf"[..])
    );
    let text = String::from_utf8_lossy(&report.body);
    assert!(
        text.contains("/loud") && text.contains("shop") && !text.contains("/quiet"),
        "{text}"
    );
}

#[tokio::test]
async fn chance_decides_where_nobody_else_did_and_the_request_id_says_so() {
    for (share, character) in [(100.0, '9'), (0.0, '4')] {
        let (_harness, mut backend, _collector, at) = traced(otlp(), share).await;
        get(at, "/").await;
        let seen = backend.next().await;
        let id = seen.headers["x-request-id"].to_str().unwrap();
        assert_eq!(id.chars().nth(14), Some(character), "{id}");
        let flags = if share > 0.0 { "-01" } else { "-00" };
        assert!(seen.headers["traceparent"].to_str().unwrap().ends_with(flags));
    }
}
