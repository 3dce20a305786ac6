//! Counters per gRPC method.

use serin_proxy::metrics::collect::Value;
use serin_xds::ResourceType;
use serin_xds::pb::envoy::extensions::filters::http::grpc_stats::v3 as grpc_stats;

use super::*;

#[tokio::test]
async fn calls_are_counted_by_cluster_service_and_method_with_their_messages() {
    let backend = Backend::answering(|seen| {
        let mut response = http::Response::new(Full::from(&b"\0\0\0\0\x01a\0\0\0\0\0"[..]));
        let headers = response.headers_mut();
        headers.insert("content-type", "application/grpc".parse().unwrap());
        let status = if seen.path.ends_with("Buy") { "0" } else { "5" };
        headers.insert("grpc-status", status.parse().unwrap());
        response
    })
    .await;
    let harness = Harness::start();
    harness
        .put(ResourceType::Cluster, "c", &speaking_h2(eds_cluster("c")))
        .await;
    harness.endpoints("c", &[backend.address]).await;
    harness.routes(to_c()).await;
    let stats = http_filter(
        "envoy.filters.http.grpc_stats",
        Some(any(&grpc_stats::FilterConfig {
            per_method_stat_specifier: Some(
                grpc_stats::filter_config::PerMethodStatSpecifier::StatsForAllMethods(google::BoolValue {
                    value: true,
                }),
            ),
            enable_upstream_stats: true,
            ..Default::default()
        })),
    );
    let at = harness
        .listen(&manager_with(vec![stats]), core::TrafficDirection::Outbound)
        .await;
    for path in ["/shop.Till/Buy", "/shop.Till/Look"] {
        let request = Request::post(path)
            .header("host", "reviews")
            .header("content-type", "application/grpc")
            .body(Full::from(&b"\0\0\0\0\x02ab"[..]))
            .unwrap();
        assert_eq!(send(at, request).await.0, 200);
    }
    let count = |name: &str, method: &str| {
        let labels = [
            ("envoy_cluster_name", "c"),
            ("envoy_grpc_bridge_service", "shop.Till"),
            ("envoy_grpc_bridge_method", method),
        ];
        harness.counter(&format!("envoy_cluster_grpc_{name}"), &labels)
    };
    soon("the counts", async {
        while count("total", "Look") < 1.0 {
            tokio::task::yield_now().await;
        }
    })
    .await;
    assert_eq!(
        (
            count("success", "Buy"),
            count("failure", "Buy"),
            count("0", "Buy")
        ),
        (1.0, 0.0, 1.0)
    );
    assert_eq!(
        (
            count("success", "Look"),
            count("failure", "Look"),
            count("5", "Look")
        ),
        (0.0, 1.0, 1.0)
    );
    assert_eq!(count("request_message_count", "Buy"), 1.0);
    assert_eq!(count("response_message_count", "Buy"), 2.0);
    let families = harness.proxy.metrics();
    let times = families
        .iter()
        .find(|family| family.name == "envoy_cluster_grpc_upstream_rq_time")
        .expect("times of calls");
    for (labels, value) in &times.metrics {
        let Value::Histogram(times) = value else {
            panic!("{labels:?} is no histogram");
        };
        assert_eq!(times.count(), 1, "{labels:?}");
    }
    assert_eq!(times.metrics.len(), 2);
}
