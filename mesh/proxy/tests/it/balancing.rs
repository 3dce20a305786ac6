//! Who gets a request: subsets, zones, cookies, latency, priorities, and what retries avoid.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use http::Request;
use http_body_util::Full;
use prost::Message;
use serin_proxy::control::{Options, Proxy};
use serin_xds::ResourceType;
use serin_xds::pb::envoy::config::cluster::v3 as cluster;
use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::envoy::config::endpoint::v3 as endpoint;
use serin_xds::pb::envoy::config::route::v3 as route;
use serin_xds::pb::envoy::extensions::load_balancing_policies as policies;
use serin_xds::pb::google::protobuf as google;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use crate::fixture::*;

pub(crate) fn lb_metadata(pairs: &[(&str, &str)]) -> Option<core::Metadata> {
    Some(core::Metadata {
        filter_metadata: [("envoy.lb".to_owned(), string_struct(pairs))].into(),
        ..Default::default()
    })
}

pub(crate) fn lb_endpoint(at: SocketAddr, metadata: Option<core::Metadata>) -> endpoint::LbEndpoint {
    endpoint::LbEndpoint {
        host_identifier: Some(endpoint::lb_endpoint::HostIdentifier::Endpoint(
            endpoint::Endpoint {
                address: address(at),
                ..Default::default()
            },
        )),
        metadata,
        ..Default::default()
    }
}

/// Endpoints by locality: priority, zone, endpoints.
pub(crate) fn localities(
    name: &str,
    groups: Vec<(u32, &str, Vec<endpoint::LbEndpoint>)>,
) -> endpoint::ClusterLoadAssignment {
    endpoint::ClusterLoadAssignment {
        cluster_name: name.into(),
        endpoints: groups
            .into_iter()
            .map(|(priority, zone, lb_endpoints)| endpoint::LocalityLbEndpoints {
                locality: Some(core::Locality {
                    region: "r".into(),
                    zone: zone.into(),
                    sub_zone: String::new(),
                }),
                priority,
                lb_endpoints,
                ..Default::default()
            })
            .collect(),
        ..Default::default()
    }
}

/// A route for requests with `x-want: <value>`.
pub(crate) fn wanting(value: &str, action: route::RouteAction) -> route::Route {
    use route::header_matcher::HeaderMatchSpecifier;
    let mut route = prefix_route("/", action);
    if let Some(matches) = &mut route.r#match {
        matches.headers = vec![route::HeaderMatcher {
            name: "x-want".into(),
            header_match_specifier: Some(HeaderMatchSpecifier::ExactMatch(value.into())),
            ..Default::default()
        }];
    }
    route
}

pub(crate) async fn get_with(at: SocketAddr, fields: &[(&str, &str)]) -> (u16, http::HeaderMap, String) {
    let mut request = Request::get("/").header("host", "reviews");
    for (name, value) in fields {
        request = request.header(*name, *value);
    }
    send(at, request.body(Full::from("")).unwrap()).await
}

/// How often each answer came for `count` requests.
pub(crate) async fn answers(
    at: SocketAddr,
    fields: &[(&str, &str)],
    count: usize,
) -> BTreeMap<String, usize> {
    let mut out = BTreeMap::new();
    for _ in 0..count {
        let (status, _, body) = get_with(at, fields).await;
        let key = if status == 200 { body } else { status.to_string() };
        *out.entry(key).or_default() += 1;
    }
    out
}

pub(crate) fn only(body: &str, count: usize) -> BTreeMap<String, usize> {
    [(body.to_owned(), count)].into()
}

/// A cluster with a subset for each version.
fn by_version() -> cluster::Cluster {
    cluster::Cluster {
        lb_subset_config: Some(cluster::cluster::LbSubsetConfig {
            subset_selectors: vec![cluster::cluster::lb_subset_config::LbSubsetSelector {
                keys: vec!["version".into()],
                ..Default::default()
            }],
            ..Default::default()
        }),
        ..eds_cluster("c")
    }
}

#[tokio::test]
async fn requests_reach_the_subset_that_their_route_or_weighted_cluster_asks_for() {
    let (v1, v2) = (Backend::named("v1").await, Backend::named("v2").await);
    let harness = Harness::start();
    let subsets = by_version();
    harness.put(ResourceType::Cluster, "c", &subsets).await;
    let endpoints = |second: &str| {
        localities(
            "c",
            vec![(
                0,
                "a",
                vec![
                    lb_endpoint(v1.address, lb_metadata(&[("version", "v1")])),
                    lb_endpoint(v2.address, lb_metadata(&[("version", second)])),
                ],
            )],
        )
    };
    harness.put(ResourceType::Endpoints, "c", &endpoints("v2")).await;
    let asking = |version: &str| route::RouteAction {
        metadata_match: lb_metadata(&[("version", version)]),
        ..to_cluster("c")
    };
    let mut weighted = to_weighted(&[("c", 1)]);
    weighted.metadata_match = lb_metadata(&[("version", "v1")]);
    if let Some(route::route_action::ClusterSpecifier::WeightedClusters(clusters)) =
        &mut weighted.cluster_specifier
    {
        clusters.clusters[0].metadata_match = lb_metadata(&[("version", "v2")]);
    }
    let at = harness
        .serve(vec![
            wanting("v1", asking("v1")),
            wanting("v2", asking("v2")),
            wanting("v3", asking("v3")),
            wanting("weighted", weighted),
            prefix_route("/", to_cluster("c")),
        ])
        .await;
    assert_eq!(answers(at, &[("x-want", "v1")], 6).await, only("v1", 6));
    assert_eq!(answers(at, &[("x-want", "v2")], 6).await, only("v2", 6));
    assert_eq!(answers(at, &[("x-want", "weighted")], 6).await, only("v2", 6));
    assert_eq!(answers(at, &[("x-want", "v3")], 2).await, only("503", 2));
    assert_eq!(answers(at, &[], 2).await, only("503", 2), "no fallback");
    // An endpoint that changes its metadata changes its subset, on the connections that it has.
    harness.put(ResourceType::Endpoints, "c", &endpoints("v3")).await;
    assert_eq!(answers(at, &[("x-want", "v3")], 4).await, only("v2", 4));
    assert_eq!(answers(at, &[("x-want", "v2")], 2).await, only("503", 2));
}

/// A proxy in zone `a` that is a member of the cluster `local`.
fn zoned() -> Harness {
    let (proxy, log) = Proxy::start(Options {
        node: core::Node {
            id: "n".into(),
            locality: Some(core::Locality {
                region: "r".into(),
                zone: "a".into(),
                sub_zone: String::new(),
            }),
            ..Default::default()
        },
        concurrency: 1,
        local_cluster: Some("local".into()),
        ..Default::default()
    })
    .expect("workers start");
    Harness { proxy, log }
}

/// A cluster whose zones count from two hosts on.
fn zone_aware(name: &str) -> cluster::Cluster {
    cluster::Cluster {
        lb_policy: cluster::cluster::LbPolicy::RoundRobin as i32,
        common_lb_config: Some(cluster::cluster::CommonLbConfig {
            locality_config_specifier: Some(
                cluster::cluster::common_lb_config::LocalityConfigSpecifier::ZoneAwareLbConfig(
                    cluster::cluster::common_lb_config::ZoneAwareLbConfig {
                        min_cluster_size: Some(google::UInt64Value { value: 2 }),
                        ..Default::default()
                    },
                ),
            ),
            ..Default::default()
        }),
        ..eds_cluster(name)
    }
}

#[tokio::test]
async fn requests_stay_in_the_proxys_zone_as_far_as_it_can_carry_them() {
    let (near, far) = (Backend::named("near").await, Backend::named("far").await);
    let harness = zoned();
    let zone_aware = zone_aware("c");
    harness.put(ResourceType::Cluster, "c", &zone_aware).await;
    harness
        .put(ResourceType::Cluster, "local", &eds_cluster("local"))
        .await;
    let nowhere = closed_port().await;
    let callers = |here: usize, there: usize| {
        let many = |count: usize, first: u16| {
            (0..count as u16)
                .map(|n| lb_endpoint(SocketAddr::new(nowhere.ip(), first + n), None))
                .collect()
        };
        localities("local", vec![(0, "a", many(here, 1)), (0, "b", many(there, 100))])
    };
    let hosts = localities(
        "c",
        vec![
            (0, "a", vec![lb_endpoint(near.address, None)]),
            (0, "b", vec![lb_endpoint(far.address, None)]),
        ],
    );
    harness.put(ResourceType::Endpoints, "c", &hosts).await;
    harness
        .put(ResourceType::Endpoints, "local", &callers(1, 1))
        .await;
    let at = harness.serve(vec![prefix_route("/", to_cluster("c"))]).await;
    assert_eq!(answers(at, &[], 20).await, only("near", 20));
    // All callers are here now and half of the hosts: half of the requests must leave.
    harness
        .put(ResourceType::Endpoints, "local", &callers(4, 0))
        .await;
    let spread = answers(at, &[], 100).await;
    assert!(
        (25..75).contains(&spread["near"]) && spread["near"] + spread["far"] == 100,
        "{spread:?}"
    );
    let counted = |name: &str| {
        let name = format!("envoy_cluster_lb_zone_{name}");
        harness.counter(&name, &[("envoy_cluster_name", "c")]) as usize
    };
    assert_eq!(counted("routing_all_directly"), 20);
    assert_eq!(counted("routing_sampled"), spread["near"]);
    assert_eq!(counted("routing_cross_zone"), spread["far"]);
    assert_eq!(counted("no_capacity_left"), 0);
    assert_eq!(counted("cluster_too_small"), 0);
    // One host is less than the two that zones are for.
    let alone = localities("c", vec![(0, "a", vec![lb_endpoint(near.address, None)])]);
    harness.put(ResourceType::Endpoints, "c", &alone).await;
    assert_eq!(answers(at, &[], 2).await, only("near", 2));
    assert_eq!(counted("cluster_too_small"), 1);
}

#[tokio::test]
async fn a_proxy_that_is_told_no_local_cluster_finds_its_own_by_its_address() {
    let (near, far) = (Backend::named("near").await, Backend::named("far").await);
    let own: SocketAddr = "127.99.0.7:8080".parse().unwrap();
    let (proxy, log) = Proxy::start(Options {
        concurrency: 1,
        own_address: Some(own.ip()),
        ..Default::default()
    })
    .expect("workers start");
    let harness = Harness { proxy, log };
    let zone_aware = zone_aware("c");
    harness.put(ResourceType::Cluster, "c", &zone_aware).await;
    let hosts = localities(
        "c",
        vec![
            (0, "a", vec![lb_endpoint(near.address, None)]),
            (0, "b", vec![lb_endpoint(far.address, None)]),
        ],
    );
    harness.put(ResourceType::Endpoints, "c", &hosts).await;
    let at = harness.serve(vec![prefix_route("/", to_cluster("c"))]).await;
    let spread = answers(at, &[], 20).await;
    assert_eq!(
        (spread["near"], spread["far"]),
        (10, 10),
        "nobody knows where it is"
    );
    // The service that it belongs to, in its subset as well; a port of its own counts for nothing.
    for name in [
        "outbound|80|v1|me.prod.svc",
        "outbound|80||me.prod.svc",
        "inbound|8080||",
    ] {
        harness.put(ResourceType::Cluster, name, &eds_cluster(name)).await;
        let other: SocketAddr = "127.99.0.8:8080".parse().unwrap();
        let members = localities(
            name,
            vec![
                (0, "a", vec![lb_endpoint(own, None)]),
                (0, "b", vec![lb_endpoint(other, None)]),
            ],
        );
        harness.put(ResourceType::Endpoints, name, &members).await;
    }
    assert_eq!(answers(at, &[], 20).await, only("near", 20));
    // It moves to where nobody of `c` is, and out of all services.
    let elsewhere = localities(
        "outbound|80||me.prod.svc",
        vec![(0, "z", vec![lb_endpoint(own, None)])],
    );
    harness
        .put(ResourceType::Endpoints, "outbound|80||me.prod.svc", &elsewhere)
        .await;
    assert_eq!(answers(at, &[], 20).await["far"], 10);
    harness
        .remove(ResourceType::Cluster, "outbound|80||me.prod.svc")
        .await;
    assert_eq!(answers(at, &[], 20).await, only("near", 20), "its subset is left");
    harness
        .remove(ResourceType::Endpoints, "outbound|80|v1|me.prod.svc")
        .await;
    assert_eq!(answers(at, &[], 20).await["far"], 10);
}

#[tokio::test]
async fn a_client_is_given_a_cookie_that_brings_it_back_to_the_same_endpoint() {
    let mut backends = Vec::new();
    for name in ["a", "b", "c", "d"] {
        backends.push(Backend::named(name).await);
    }
    let harness = Harness::start();
    let ring = cluster::Cluster {
        lb_policy: cluster::cluster::LbPolicy::RingHash as i32,
        ..eds_cluster("c")
    };
    harness.put(ResourceType::Cluster, "c", &ring).await;
    let addresses: Vec<_> = backends.iter().map(|backend| backend.address).collect();
    harness.endpoints("c", &addresses).await;
    use route::route_action::hash_policy::{Cookie, PolicySpecifier};
    let at = harness
        .serve(vec![prefix_route(
            "/",
            route::RouteAction {
                hash_policy: vec![route::route_action::HashPolicy {
                    policy_specifier: Some(PolicySpecifier::Cookie(Cookie {
                        name: "sticky".into(),
                        ttl: millis(3_600_000),
                        path: "/".into(),
                        ..Default::default()
                    })),
                    terminal: false,
                }],
                ..to_cluster("c")
            },
        )])
        .await;
    let mut seen = std::collections::BTreeSet::new();
    for _ in 0..12 {
        let (_, headers, first) = get_with(at, &[]).await;
        let cookie = headers["set-cookie"].to_str().unwrap();
        assert!(cookie.ends_with("; Max-Age=3600; Path=/; HttpOnly"), "{cookie}");
        let pair = cookie.split(';').next().unwrap();
        for _ in 0..3 {
            let (_, headers, body) = get_with(at, &[("cookie", pair)]).await;
            assert_eq!(body, first);
            assert!(!headers.contains_key("set-cookie"), "it has one already");
        }
        seen.insert(first);
    }
    assert!(seen.len() > 1, "clients are spread");
}

/// A server that takes `latency` for each answer.
async fn slow(name: &'static str, latency: Duration) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut held = Vec::new();
                loop {
                    let mut chunk = [0; 1024];
                    match stream.read(&mut chunk).await {
                        Ok(0) | Err(_) => return,
                        Ok(count) => held.extend_from_slice(&chunk[..count]),
                    }
                    if held.ends_with(b"\r\n\r\n") {
                        held.clear();
                        // What a slow service takes.
                        tokio::time::sleep(latency).await;
                        let answer =
                            format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{name}", name.len());
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

#[derive(Clone, PartialEq, prost::Message)]
struct PeakEwma {
    #[prost(message, optional, tag = "1")]
    decay_time: Option<google::Duration>,
}

#[tokio::test]
async fn peak_ewma_by_load_balancing_policy_sends_requests_where_answers_are_fast() {
    let fast = Backend::named("fast").await;
    let slow = slow("slow", Duration::from_millis(700)).await;
    let harness = Harness::start();
    let policy = |name: &str, value: Vec<u8>| cluster::load_balancing_policy::Policy {
        typed_extension_config: Some(core::TypedExtensionConfig {
            name: name.into(),
            typed_config: Some(google::Any {
                type_url: format!("type.googleapis.com/envoy.extensions.load_balancing_policies.{name}"),
                value,
            }),
        }),
    };
    let ewma = PeakEwma {
        decay_time: millis(600_000),
    };
    let cluster = cluster::Cluster {
        load_balancing_policy: Some(cluster::LoadBalancingPolicy {
            policies: vec![
                policy("somebody_elses.v3.Policy", Vec::new()),
                policy("peak_ewma.v3alpha.PeakEwma", ewma.encode_to_vec()),
                policy(
                    "random.v3.Random",
                    policies::random::v3::Random::default().encode_to_vec(),
                ),
            ],
        }),
        ..eds_cluster("c")
    };
    let at = harness
        .serve_cluster(&cluster, &[fast.address, slow], to_cluster("c"))
        .await;
    // Until both are known.
    soon("an answer of the slow one", async {
        while get(at, "/").await.2 != "slow" {}
    })
    .await;
    let spread = answers(at, &[], 40).await;
    // Five draws out of six hosts may all hit the slow one, once in dozens of requests.
    assert!(spread["fast"] >= 30, "{spread:?}");
}

#[tokio::test]
async fn connections_that_have_lived_long_enough_take_no_more_requests() {
    let backend = Backend::named("a").await;
    for http2 in [false, true] {
        let harness = Harness::start();
        let lived = |nanos| core::HttpProtocolOptions {
            max_connection_duration: Some(google::Duration { seconds: 0, nanos }),
            ..Default::default()
        };
        let with = |options| {
            let cluster = cluster::Cluster {
                common_http_protocol_options: options,
                ..eds_cluster("c")
            };
            if http2 { speaking_h2(cluster) } else { cluster }
        };
        let at = harness
            .serve_cluster(&with(None), &[backend.address], to_cluster("c"))
            .await;
        let made = || harness.counter("serin_proxy_upstream_connections_total", &[]);
        for _ in 0..3 {
            assert_eq!(get(at, "/").await.0, 200);
        }
        assert_eq!(made(), 1.0, "they are used again");
        harness
            .put(ResourceType::Cluster, "c", &with(Some(lived(1))))
            .await;
        for _ in 0..3 {
            assert_eq!(get(at, "/").await.0, 200);
        }
        assert_eq!(made(), 4.0, "a nanosecond is over by the next request");
    }
}

#[tokio::test]
async fn tcp_connections_reach_the_subset_that_their_proxy_or_weighted_cluster_asks_for() {
    use serin_xds::pb::envoy::extensions::filters::network::tcp_proxy::v3 as tcp;
    let greeting = async |text: &'static str| {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = listener.local_addr().unwrap();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let _ = stream.write_all(text.as_bytes()).await;
            }
        });
        at
    };
    let (v1, v2) = (greeting("v1").await, greeting("v2").await);
    let harness = Harness::start();
    let subsets = by_version();
    harness.put(ResourceType::Cluster, "c", &subsets).await;
    let endpoints = vec![
        lb_endpoint(v1, lb_metadata(&[("version", "v1")])),
        lb_endpoint(v2, lb_metadata(&[("version", "v2")])),
    ];
    harness
        .put(
            ResourceType::Endpoints,
            "c",
            &localities("c", vec![(0, "a", endpoints)]),
        )
        .await;
    let weighted = tcp::tcp_proxy::WeightedCluster {
        clusters: vec![tcp::tcp_proxy::weighted_cluster::ClusterWeight {
            name: "c".into(),
            weight: 1,
            metadata_match: lb_metadata(&[("version", "v2")]),
        }],
    };
    for (name, specifier, expected) in [
        ("one", tcp::tcp_proxy::ClusterSpecifier::Cluster("c".into()), "v1"),
        (
            "weighted",
            tcp::tcp_proxy::ClusterSpecifier::WeightedClusters(weighted),
            "v2",
        ),
    ] {
        let proxy = tcp::TcpProxy {
            stat_prefix: "t".into(),
            metadata_match: lb_metadata(&[("version", "v1")]),
            cluster_specifier: Some(specifier),
            ..Default::default()
        };
        let chain = serin_xds::pb::envoy::config::listener::v3::FilterChain {
            filters: vec![network_filter(
                "envoy.filters.network.tcp_proxy",
                Some(any(&proxy)),
            )],
            ..Default::default()
        };
        harness
            .put(
                ResourceType::Listener,
                name,
                &listener_of(name, core::TrafficDirection::Outbound, vec![chain]),
            )
            .await;
        let at = harness.proxy.listener_address(name).unwrap();
        for _ in 0..4 {
            assert_eq!(raw(at, b"").await, expected);
        }
    }
}

#[tokio::test]
async fn the_share_of_requests_that_endpoints_say_is_dropped_and_told_as_such() {
    use serin_xds::pb::envoy::r#type::v3 as kind;
    let backend = Backend::named("b").await;
    let mut harness = Harness::start();
    let at = harness
        .serve_cluster(&eds_cluster("c"), &[backend.address], to_cluster("c"))
        .await;
    for (percent, wanted) in [(100, 503), (0, 200)] {
        let mut endpoints = assignment("c", &[(backend.address, "")]);
        endpoints.policy = Some(endpoint::cluster_load_assignment::Policy {
            drop_overloads: vec![endpoint::cluster_load_assignment::policy::DropOverload {
                category: "lb".into(),
                drop_percentage: Some(kind::FractionalPercent {
                    numerator: percent,
                    denominator: kind::fractional_percent::DenominatorType::Hundred as i32,
                }),
            }],
            ..Default::default()
        });
        harness.put(ResourceType::Endpoints, "c", &endpoints).await;
        assert_eq!(get(at, "/").await.0, wanted, "{percent} %");
        // Failures are logged.
        if wanted == 503 {
            let line = harness.line().await;
            assert_eq!(line["response_flags"], "DO", "{line}");
            assert_eq!(line["response_code_details"], "drop_overload", "{line}");
        }
    }
    assert_eq!(backend.hits(), 1);
}
