use proptest::prelude::*;
use prost::Message as _;
use serde_json::json;
use serin_xds::pb::envoy::config::cluster::v3 as cluster;
use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::envoy::config::route::v3 as route;
use serin_xds::pb::google::protobuf as google;

use super::*;

fn read<M: prost::Message + Default>(name: &str, value: &Value) -> Result<M, Refusal> {
    encode(&Schema::load(), name, value).map(|bytes| M::decode(bytes.as_slice()).unwrap())
}

#[test]
fn every_kind_of_value_arrives_where_the_generated_types_expect_it() {
    let value = json!({
        "name": "c",
        "type": "EDS",
        "connectTimeout": "0.25s",
        "per_connection_buffer_limit_bytes": 32768,
        "lb_policy": 5,
        "common_lb_config": {"healthy_panic_threshold": {"value": 12.5}},
        "maglev_lb_config": {"table_size": "65537"},
        "metadata": {"filter_metadata": {"envoy.lb": {"a": [1, "x", null, true, {"b": {}}]}}},
        "upstream_connection_options": null,
        "typed_extension_protocol_options": {
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
                "explicit_http_config": {"http2_protocol_options": {"max_concurrent_streams": 7}}
            }
        },
        "load_assignment": {"cluster_name": "c", "endpoints": [
            {"lb_endpoints": [{"endpoint": {"address": {"pipe": {"path": "/a", "mode": 511}}}}]}
        ]}
    });
    let got: cluster::Cluster = read("envoy.config.cluster.v3.Cluster", &value).unwrap();
    use cluster::cluster::{ClusterDiscoveryType, LbConfig};
    assert_eq!(got.name, "c");
    assert_eq!(got.cluster_discovery_type, Some(ClusterDiscoveryType::Type(3)));
    assert_eq!(got.connect_timeout.unwrap().nanos, 250_000_000);
    assert_eq!(got.per_connection_buffer_limit_bytes.unwrap().value, 32_768);
    assert_eq!(got.lb_policy, 5);
    let common = got.common_lb_config.unwrap();
    assert_eq!(common.healthy_panic_threshold.unwrap().value, 12.5);
    let Some(LbConfig::MaglevLbConfig(maglev)) = got.lb_config else {
        panic!("{:?}", got.lb_config)
    };
    assert_eq!(maglev.table_size.unwrap().value, 65_537);
    let lb = &got.metadata.unwrap().filter_metadata["envoy.lb"].fields["a"];
    let Some(google::value::Kind::ListValue(list)) = &lb.kind else {
        panic!("{lb:?}")
    };
    let kinds: Vec<_> = list
        .values
        .iter()
        .map(|value| value.kind.clone().unwrap())
        .collect();
    use google::value::Kind as V;
    assert_eq!(
        kinds[..4],
        [
            V::NumberValue(1.0),
            V::StringValue("x".into()),
            V::NullValue(0),
            V::BoolValue(true)
        ]
    );
    let any = got.typed_extension_protocol_options.values().next().unwrap();
    assert_eq!(
        any.type_url,
        "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
    );
    let options = serin_xds::pb::envoy::extensions::upstreams::http::v3::HttpProtocolOptions::decode(
        any.value.as_slice(),
    )
    .unwrap();
    assert!(options.upstream_protocol_options.is_some());
    let assignment = got.load_assignment.unwrap();
    assert_eq!(assignment.endpoints[0].lb_endpoints.len(), 1);
}

#[test]
fn what_protobufs_reader_would_refuse_is_refused_with_its_path() {
    let cases = [
        (json!({"nam": "x"}), "nam"),
        (json!({"name": 5}), "name"),
        (json!({"connect_timeout": "5m"}), "connect_timeout"),
        (json!({"connect_timeout": "1.s"}), "connect_timeout"),
        (json!({"type": "EDS", "cluster_type": {"name": "x"}}), "type"),
        (json!({"name": "a", "Name": "b"}), "Name"),
        (
            json!({"connect_timeout": "1s", "connectTimeout": "1s"}),
            "connect_timeout",
        ),
        (
            json!({"circuit_breakers": {"thresholds": [{}, {"max_requests": -1}]}}),
            "circuit_breakers.thresholds[1].max_requests",
        ),
        (
            json!({"typed_extension_protocol_options": {"a": {"x": 1}}}),
            "typed_extension_protocol_options.a.@type",
        ),
        (json!({"load_assignment": []}), "load_assignment"),
        (json!({"health_checks": {}}), "health_checks"),
    ];
    for (value, path) in cases {
        let refusal = read::<cluster::Cluster>("envoy.config.cluster.v3.Cluster", &value).unwrap_err();
        assert_eq!(refusal.path, path, "{value}");
    }
}

#[test]
fn bytes_and_text_keep_what_they_hold() {
    let source: core::DataSource = read(
        "envoy.config.core.v3.DataSource",
        &json!({"inline_bytes": "AP/+"}),
    )
    .unwrap();
    assert_eq!(
        source.specifier,
        Some(core::data_source::Specifier::InlineBytes(vec![0, 255, 254]))
    );
    let direct: route::DirectResponseAction = read(
        "envoy.config.route.v3.DirectResponseAction",
        &json!({"status": 200, "body": {"inline_string": "a\u{e4}\n"}}),
    )
    .unwrap();
    assert_eq!(direct.status, 200);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn durations_and_numbers_come_back_as_they_were_written(
        seconds in 0i64..1_000_000,
        nanos in 0i32..1_000_000_000,
        weight in any::<u32>(),
    ) {
        let value = json!({
            "connect_timeout": format!("{seconds}.{nanos:09}s"),
            "max_requests_per_connection": weight,
        });
        let got: cluster::Cluster = read("envoy.config.cluster.v3.Cluster", &value).unwrap();
        let timeout = got.connect_timeout.unwrap();
        prop_assert_eq!((timeout.seconds, timeout.nanos), (seconds, nanos));
        prop_assert_eq!(got.max_requests_per_connection.unwrap().value, weight);
    }

    #[test]
    fn no_document_makes_bytes_that_the_generated_types_cannot_read(
        key in "[a-z_]{1,12}",
        number in any::<f64>(),
        text in ".{0,8}",
    ) {
        for value in [
            json!({&key: number}),
            json!({"name": text, &key: [&text]}),
            json!({"metadata": {"filter_metadata": {&key: {&text: number}}}}),
        ] {
            if let Ok(bytes) = encode(&Schema::load(), "envoy.config.cluster.v3.Cluster", &value) {
                prop_assert!(cluster::Cluster::decode(bytes.as_slice()).is_ok(), "{}", value);
            }
        }
    }
}
