//! Weights that follow from what hosts report of their load (`client_side_weighted_round_robin`), also beside Envoy.

use std::net::SocketAddr;

use serin_xds::ResourceType;
use serin_xds::pb::envoy::config::cluster::v3 as cluster;
use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::envoy::config::route::v3 as route;
use serin_xds::pb::envoy::extensions::load_balancing_policies::client_side_weighted_round_robin::v3 as policy;
use serin_xds::pb::google::protobuf as google;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use crate::fixture::*;
use crate::interop_ads::{Pair, from_ads, resource, router};

/// Answers with its name and these fields, or with these fields as trailers.
async fn reporting(name: &'static str, field: &'static str, in_trailers: bool) -> SocketAddr {
    let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = socket.local_addr().unwrap();
    let answer = if in_trailers {
        format!("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\n{name}\r\n0\r\n{field}\r\n\r\n")
    } else {
        format!("HTTP/1.1 200 OK\r\ncontent-length: 1\r\n{field}\r\n\r\n{name}")
    };
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = socket.accept().await {
            let answer = answer.clone();
            tokio::spawn(async move {
                let mut heard = Vec::new();
                let mut chunk = [0; 1024];
                while let Ok(count @ 1..) = stream.read(&mut chunk).await {
                    heard.extend(&chunk[..count]);
                    if heard.ends_with(b"\r\n\r\n") {
                        heard.clear();
                        if stream.write_all(answer.as_bytes()).await.is_err() {
                            return;
                        }
                    }
                }
            });
        }
    });
    at
}

/// A cluster of one host that is twice as busy as the other for the same work, and one that says nothing.
async fn resources(in_trailers: bool) -> Vec<serin_xds::Resource> {
    let busy = "endpoint-load-metrics: TEXT rps_fractional=100,application_utilization=0.8";
    let idle = "endpoint-load-metrics: JSON {\"rps_fractional\": 100, \"cpu_utilization\": 0.4}";
    let hosts = [
        (reporting("b", busy, in_trailers).await, ""),
        (reporting("i", idle, in_trailers).await, ""),
    ];
    let rules = policy::ClientSideWeightedRoundRobin {
        blackout_period: Some(google::Duration::default()),
        weight_update_period: millis(100),
        ..Default::default()
    };
    let mut message = eds_cluster("c");
    message.cluster_discovery_type = None;
    message.eds_cluster_config = None;
    message.load_assignment = Some(assignment("c", &hosts));
    message.load_balancing_policy = Some(cluster::LoadBalancingPolicy {
        policies: vec![cluster::load_balancing_policy::Policy {
            typed_extension_config: Some(core::TypedExtensionConfig {
                name: "envoy.load_balancing_policies.client_side_weighted_round_robin".into(),
                typed_config: Some(any(&rules)),
            }),
        }],
    });
    let mut manager = manager("80");
    from_ads(&mut manager);
    manager.http_filters = vec![router()];
    if let Some(options) = &mut manager.http_protocol_options {
        options.enable_trailers = true;
    }
    let listener = listener_of("l", core::TrafficDirection::Outbound, vec![http_chain(&manager)]);
    let routes = route::RouteConfiguration {
        name: "80".into(),
        virtual_hosts: vec![host("all", "*", vec![prefix_route("/", to_cluster("c"))])],
        ..Default::default()
    };
    vec![
        resource(ResourceType::Cluster, "c", &message),
        resource(ResourceType::Listener, "l", &listener),
        resource(ResourceType::Route, "80", &routes),
    ]
}

/// Asks until of 30 requests in a row the idle host has had twice as many as the busy one.
async fn until_weighted(at: SocketAddr) {
    soon("weights", async {
        loop {
            let mut idle = 0;
            for _ in 0..30 {
                let (status, _, body) = get(at, "/").await;
                assert_eq!(status, 200);
                idle += usize::from(body == "i");
            }
            if idle == 20 {
                return;
            }
        }
    })
    .await;
}

#[tokio::test]
async fn a_host_that_reports_to_be_half_as_busy_gets_twice_as_many_requests() {
    for in_trailers in [false, true] {
        let harness = Harness::start();
        for one in resources(in_trailers).await {
            harness.put_resource(&one).await;
        }
        let at = harness.proxy.listener_address("l").unwrap();
        until_weighted(at).await;
        // It stays so.
        let mut idle = 0;
        for _ in 0..300 {
            idle += usize::from(get(at, "/").await.2 == "i");
        }
        assert!((199..=201).contains(&idle), "{idle} of 300");
    }
}

#[tokio::test]
async fn envoy_weighs_hosts_by_their_reports_alike() {
    let Some(pair) = Pair::start(resources(false).await).await else {
        return;
    };
    for at in pair.listener("l").await {
        until_weighted(at).await;
    }
    pair.stop().await;
}
