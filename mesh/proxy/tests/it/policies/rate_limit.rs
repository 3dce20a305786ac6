//! Local rate limits of requests and connections.

use serin_xds::ResourceType;
use serin_xds::pb::envoy::config::route::v3::rate_limit::{Action, action};
use serin_xds::pb::envoy::extensions::common::ratelimit::v3 as common;
use serin_xds::pb::envoy::extensions::filters::http::local_ratelimit::v3 as local;
use serin_xds::pb::envoy::extensions::filters::network::local_ratelimit::v3 as network;

use super::*;

fn limit(tokens: u32) -> local::LocalRateLimit {
    local::LocalRateLimit {
        stat_prefix: "l".into(),
        token_bucket: bucket(tokens),
        filter_enabled: percent(100),
        filter_enforced: percent(100),
        response_headers_to_add: vec![add_header("x-local-rate-limit", "true")],
        ..Default::default()
    }
}

fn filter(limit: &local::LocalRateLimit) -> hcm::HttpFilter {
    http_filter("envoy.filters.http.local_ratelimit", Some(any(limit)))
}

/// Entries that name the user of a request.
fn by_user() -> Vec<route::RateLimit> {
    vec![route::RateLimit {
        actions: vec![Action {
            action_specifier: Some(action::ActionSpecifier::RequestHeaders(action::RequestHeaders {
                header_name: "x-user".into(),
                descriptor_key: "user".into(),
                skip_if_absent: false,
            })),
        }],
        ..Default::default()
    }]
}

#[tokio::test]
async fn requests_over_the_local_limit_get_429_with_headers_and_flag() {
    let mut message = limit(2);
    message.enable_x_ratelimit_headers = common::XRateLimitHeadersRfcVersion::DraftVersion03 as i32;
    let (mut harness, backend, at) = served(vec![filter(&message)], to_c()).await;
    let (status, headers, _) = get(at, "/").await;
    assert_eq!(
        (
            status,
            &headers["x-ratelimit-limit"],
            &headers["x-ratelimit-remaining"]
        ),
        (200, &2.into(), &1.into())
    );
    assert_eq!(get(at, "/").await.0, 200);
    let (status, headers, body) = get(at, "/").await;
    assert_eq!((status, &*body), (429, "local_rate_limited"));
    assert_eq!(headers["x-local-rate-limit"], "true");
    assert_eq!(headers["x-ratelimit-remaining"], "0");
    assert_eq!(backend.hits(), 2);
    let line = harness.line().await;
    assert_eq!(
        (&line["response_flags"], &line["response_code_details"]),
        (&"RL".into(), &"local_rate_limited".into())
    );
    let labels = [("envoy_local_http_ratelimit_prefix", "l")];
    for (name, expected) in [
        ("enabled", 3.0),
        ("ok", 2.0),
        ("rate_limited", 1.0),
        ("enforced", 1.0),
    ] {
        assert_eq!(
            harness.counter(&format!("envoy_http_local_rate_limit_{name}"), &labels),
            expected,
            "{name}"
        );
    }
}

#[tokio::test]
async fn a_limit_that_is_not_enforced_marks_the_request_and_lets_it_pass() {
    let mut message = limit(1);
    message.filter_enforced = percent(0);
    message.request_headers_to_add_when_not_enforced = vec![add_header("x-over", "yes")];
    let (harness, mut backend, at) = served(vec![filter(&message)], to_c()).await;
    get(at, "/").await;
    assert!(!backend.next().await.headers.contains_key("x-over"));
    assert_eq!(get(at, "/").await.0, 200);
    assert_eq!(backend.next().await.headers["x-over"], "yes");
    assert_eq!(
        harness.counter("envoy_http_local_rate_limit_rate_limited", &[]),
        1.0
    );
    assert_eq!(harness.counter("envoy_http_local_rate_limit_enforced", &[]), 0.0);
}

#[tokio::test]
async fn descriptors_of_route_and_host_choose_the_bucket() {
    let mut message = limit(1000);
    message.descriptors = vec![common::LocalRateLimitDescriptor {
        entries: vec![common::rate_limit_descriptor::Entry {
            key: "user".into(),
            value: String::new(),
        }],
        token_bucket: bucket(1),
        shadow_mode: false,
    }];
    let mut action = to_cluster("c");
    action.rate_limits = by_user();
    let of_route = prefix_route("/route", action);
    let mut all = host("all", "*", vec![of_route, prefix_route("/", to_cluster("c"))]);
    all.rate_limits = by_user();
    let (_harness, _backend, at) = served(vec![filter(&message)], vec![all]).await;
    for path in ["/route", "/host"] {
        let user = path.trim_start_matches('/');
        assert_eq!(get_with(at, path, &[("x-user", user)]).await.0, 200, "{path}");
        assert_eq!(get_with(at, path, &[("x-user", user)]).await.0, 429, "{path}");
        assert_eq!(
            get_with(at, path, &[("x-user", &format!("other-{user}"))])
                .await
                .0,
            200,
            "{path}"
        );
        assert_eq!(get(at, path).await.0, 200, "no user, no descriptor");
    }
}

#[tokio::test]
async fn a_route_has_a_limit_of_its_own() {
    let none = http_filter(
        "envoy.filters.http.local_ratelimit",
        Some(any(&local::LocalRateLimit {
            stat_prefix: "chain".into(),
            ..Default::default()
        })),
    );
    let mut limited = prefix_route("/limited", to_cluster("c"));
    limited.typed_per_filter_config =
        [("envoy.filters.http.local_ratelimit".to_owned(), any(&limit(1)))].into();
    let hosts = vec![host(
        "all",
        "*",
        vec![limited, prefix_route("/", to_cluster("c"))],
    )];
    let (_harness, _backend, at) = served(vec![none], hosts).await;
    assert_eq!(get(at, "/limited").await.0, 200);
    assert_eq!(get(at, "/limited").await.0, 429);
    for _ in 0..5 {
        assert_eq!(get(at, "/").await.0, 200);
    }
}

#[tokio::test]
async fn each_connection_can_have_a_bucket_of_its_own() {
    let mut message = limit(1);
    message.local_rate_limit_per_downstream_connection = true;
    let (_harness, _backend, at) = served(vec![filter(&message)], to_c()).await;
    let two = b"GET / HTTP/1.1\r\nhost: a\r\n\r\nGET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n";
    for _ in 0..2 {
        let answers = raw(at, two).await;
        let statuses: Vec<_> = answers
            .split("HTTP/1.1 ")
            .skip(1)
            .map(|answer| &answer[..3])
            .collect();
        assert_eq!(statuses, ["200", "429"], "{answers}");
    }
}

#[tokio::test]
async fn grpc_requests_over_the_limit_get_unavailable_or_resource_exhausted() {
    for (exhausted, expected) in [(false, "14"), (true, "8")] {
        let mut message = limit(1);
        message.rate_limited_as_resource_exhausted = exhausted;
        let (_harness, _backend, at) = served(vec![filter(&message)], to_c()).await;
        get(at, "/").await;
        let (_, headers, _) = get_with(at, "/s/M", &[("content-type", "application/grpc")]).await;
        assert_eq!(headers["grpc-status"], expected);
    }
}

#[tokio::test]
async fn connections_over_the_limit_are_closed() {
    let harness = Harness::start();
    let backend = Backend::named("ok").await;
    harness.cluster("c", &[backend.address]).await;
    let chain = serin_xds::pb::envoy::config::listener::v3::FilterChain {
        filters: vec![
            network_filter(
                "envoy.filters.network.local_ratelimit",
                Some(any(&network::LocalRateLimit {
                    stat_prefix: "conns".into(),
                    token_bucket: bucket(1),
                    ..Default::default()
                })),
            ),
            tcp_filter("c"),
        ],
        ..Default::default()
    };
    let listener = listener_of("tcp", core::TrafficDirection::Outbound, vec![chain]);
    harness.put(ResourceType::Listener, "tcp", &listener).await;
    let at = harness.proxy.listener_address("tcp").unwrap();
    let request = b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n";
    assert!(raw(at, request).await.ends_with("ok"));
    let mut second = tokio::net::TcpStream::connect(at).await.unwrap();
    let mut rest = Vec::new();
    let _ = soon(
        "the end",
        tokio::io::AsyncReadExt::read_to_end(&mut second, &mut rest),
    )
    .await;
    assert!(rest.is_empty());
    assert_eq!(
        harness.counter(
            "envoy_local_rate_limit_rate_limited",
            &[("envoy_local_ratelimit_prefix", "conns")]
        ),
        1.0
    );
}

mod global {
    //! The rate limit service.

    use serin_xds::pb::envoy::config::ratelimit::v3 as config;
    use serin_xds::pb::envoy::extensions::filters::http::ratelimit::v3 as ratelimit;
    use serin_xds::pb::envoy::service::ratelimit::v3 as service;
    use tonic::Status;
    use tonic::transport::Server;

    use super::super::services::{Asked, serve, service_cluster};
    use super::*;

    fn message() -> ratelimit::RateLimit {
        ratelimit::RateLimit {
            domain: "d".into(),
            timeout: millis(5000),
            rate_limit_service: Some(config::RateLimitServiceConfig {
                grpc_service: Some(core::GrpcService {
                    target_specifier: Some(core::grpc_service::TargetSpecifier::EnvoyGrpc(
                        core::grpc_service::EnvoyGrpc {
                            cluster_name: "svc".into(),
                            ..Default::default()
                        },
                    )),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            enable_x_ratelimit_headers: 1,
            ..Default::default()
        }
    }

    fn filter(message: &ratelimit::RateLimit) -> hcm::HttpFilter {
        http_filter("envoy.filters.http.ratelimit", Some(any(message)))
    }

    fn routes() -> Vec<route::VirtualHost> {
        let mut action = to_cluster("c");
        action.rate_limits = by_user();
        vec![host("all", "*", vec![prefix_route("/", action)])]
    }

    fn generic(value: &str, default: &str) -> route::RateLimit {
        route::RateLimit {
            actions: vec![Action {
                action_specifier: Some(action::ActionSpecifier::GenericKey(action::GenericKey {
                    descriptor_value: value.into(),
                    default_value: default.into(),
                    ..Default::default()
                })),
            }],
            ..Default::default()
        }
    }

    /// A service that lets everything pass, with these entries on the only route.
    async fn asked(
        filters: Vec<hcm::HttpFilter>,
        limits: Vec<route::RateLimit>,
    ) -> (
        Harness,
        Backend,
        SocketAddr,
        std::sync::Arc<parking_lot::Mutex<Vec<service::RateLimitRequest>>>,
        super::super::services::Served,
    ) {
        use service::rate_limit_response::{Code, DescriptorStatus, RateLimit, rate_limit::Unit};
        let limiter = Asked::new(|question: &service::RateLimitRequest| {
            let status = |limit| DescriptorStatus {
                code: Code::Ok as i32,
                current_limit: Some(RateLimit {
                    requests_per_unit: limit,
                    unit: Unit::Minute as i32,
                    ..Default::default()
                }),
                limit_remaining: limit - 1,
                ..Default::default()
            };
            Ok(service::RateLimitResponse {
                overall_code: Code::Ok as i32,
                statuses: (0..question.descriptors.len() as u32)
                    .map(|index| status(10 + index))
                    .collect(),
                ..Default::default()
            })
        });
        let seen = limiter.seen.clone();
        let (at_service, server) = serve(Server::builder().add_service(
            service::rate_limit_service_server::RateLimitServiceServer::new(limiter),
        ))
        .await;
        let mut action = to_cluster("c");
        action.rate_limits = limits;
        let hosts = vec![host("all", "*", vec![prefix_route("/", action)])];
        let chain = filters.into_iter().chain([filter(&message())]).collect();
        let (harness, backend, at) = served(chain, hosts).await;
        service_cluster(&harness, at_service).await;
        (harness, backend, at, seen, server)
    }

    fn values(question: &service::RateLimitRequest) -> Vec<&str> {
        let entries = question.descriptors.iter().flat_map(|one| &one.entries);
        entries.map(|entry| entry.value.as_str()).collect()
    }

    #[tokio::test]
    async fn formats_make_the_values_and_the_weights_of_descriptors() {
        let mut weighed = generic("%REQ(x-user)%/%REQ(:METHOD)%", "");
        weighed.hits_addend = Some(route::rate_limit::HitsAddend {
            format: "%REQ(x-cost)%".into(),
            ..Default::default()
        });
        let limits = vec![weighed, generic("%REQ(x-user)%", "nobody")];
        let state = super::super::filter_state::on_requests(vec![super::super::filter_state::object(
            "envoy.ratelimit.hits_addend",
            "",
            "%REQ(x-all)%",
        )]);
        let (_harness, _backend, at, seen, _server) = asked(vec![state], limits).await;
        let fields = [("x-user", "bob"), ("x-cost", "7"), ("x-all", "3")];
        assert_eq!(get_with(at, "/", &fields).await.0, 200);
        // Without a number the entry does not apply; without a user there is a default.
        assert_eq!(get_with(at, "/", &[("x-cost", "many")]).await.0, 200);
        let seen = seen.lock();
        assert_eq!(values(&seen[0]), ["bob/GET", "bob"]);
        assert_eq!(seen[0].descriptors[0].hits_addend.as_ref().unwrap().value, 7);
        assert_eq!(seen[0].hits_addend, 3);
        assert_eq!(values(&seen[1]), ["nobody"]);
        assert_eq!(seen[1].hits_addend, 0);
    }

    #[tokio::test]
    async fn the_service_is_told_of_a_request_when_it_has_ended() {
        let mut done = generic("%REQ(:PATH)% %RESPONSE_CODE%", "");
        done.apply_on_stream_done = true;
        done.hits_addend = Some(route::rate_limit::HitsAddend {
            format: "%BYTES_SENT%".into(),
            ..Default::default()
        });
        let (_harness, _backend, at, seen, _server) = asked(vec![], vec![done]).await;
        assert_eq!(get(at, "/done").await.0, 200);
        soon("the question", async {
            while seen.lock().is_empty() {
                tokio::task::yield_now().await;
            }
        })
        .await;
        let seen = seen.lock();
        assert_eq!(values(&seen[0]), ["/done 200"]);
        assert_eq!(seen[0].descriptors[0].hits_addend.as_ref().unwrap().value, 2);
    }

    #[tokio::test]
    async fn descriptors_say_themselves_whether_their_limit_is_told() {
        let with = |value: &str, option: i32| route::RateLimit {
            x_ratelimit_option: option,
            ..generic(value, "")
        };
        let (_harness, _backend, at, _seen, _server) = asked(vec![], vec![with("a", 0), with("b", 1)]).await;
        assert_eq!(get(at, "/").await.1["x-ratelimit-limit"], "10, 10;w=60");
        // The one with the least left decides whether anything is told.
        let (_harness, _backend, at, _seen, _server) = asked(vec![], vec![with("a", 1), with("b", 0)]).await;
        assert!(!get(at, "/").await.1.contains_key("x-ratelimit-limit"));
        let (_harness, _backend, at, _seen, _server) = asked(vec![], vec![with("a", 1), with("b", 1)]).await;
        assert!(!get(at, "/").await.1.contains_key("x-ratelimit-limit"));
        // The local limit likewise: its filter tells nothing, one of its descriptors does.
        let mut message = limit(1000);
        message.descriptors = vec![common::LocalRateLimitDescriptor {
            entries: vec![common::rate_limit_descriptor::Entry {
                key: "generic_key".into(),
                value: "a".into(),
            }],
            token_bucket: bucket(5),
            shadow_mode: false,
        }];
        message.rate_limits = vec![with("a", 2)];
        let (_harness, _backend, at) = served(vec![super::filter(&message)], to_c()).await;
        assert_eq!(get(at, "/").await.1["x-ratelimit-limit"], "5");
    }

    #[tokio::test]
    async fn the_service_decides_by_the_descriptors_of_the_request() {
        use service::rate_limit_response::{Code, DescriptorStatus, RateLimit, rate_limit::Unit};
        let limiter = Asked::new(|question: &service::RateLimitRequest| {
            let over = question.descriptors[0].entries[0].value == "greedy";
            let code = if over { Code::OverLimit } else { Code::Ok } as i32;
            Ok(service::RateLimitResponse {
                overall_code: code,
                statuses: vec![DescriptorStatus {
                    code,
                    current_limit: Some(RateLimit {
                        name: String::new(),
                        requests_per_unit: 10,
                        unit: Unit::Minute as i32,
                    }),
                    limit_remaining: 3,
                    duration_until_reset: Some(google::Duration { seconds: 7, nanos: 0 }),
                    ..Default::default()
                }],
                request_headers_to_add: vec![core::HeaderValue {
                    key: "x-tier".into(),
                    value: "gold".into(),
                    ..Default::default()
                }],
                ..Default::default()
            })
        });
        let seen = limiter.seen.clone();
        let (at_service, _server) = serve(Server::builder().add_service(
            service::rate_limit_service_server::RateLimitServiceServer::new(limiter),
        ))
        .await;
        let (mut harness, mut backend, at) = served(vec![filter(&message())], routes()).await;
        service_cluster(&harness, at_service).await;
        let (status, headers, _) = get_with(at, "/", &[("x-user", "bob")]).await;
        assert_eq!(status, 200);
        assert_eq!(headers["x-ratelimit-limit"], "10, 10;w=60");
        assert_eq!(
            (&headers["x-ratelimit-remaining"], &headers["x-ratelimit-reset"]),
            (&3.into(), &7.into())
        );
        assert_eq!(backend.next().await.headers["x-tier"], "gold");
        let question = seen.lock()[0].clone();
        assert_eq!(
            (&*question.domain, &*question.descriptors[0].entries[0].key),
            ("d", "user")
        );
        let (status, headers, _) = get_with(at, "/", &[("x-user", "greedy")]).await;
        assert_eq!(
            (status, headers["x-envoy-ratelimited"].as_bytes()),
            (429, &b"true"[..])
        );
        let line = harness.line().await;
        assert_eq!(
            (&line["response_flags"], &line["response_code_details"]),
            (&"RL".into(), &"request_rate_limited".into())
        );
        assert_eq!(get(at, "/").await.0, 200, "without a descriptor nobody is asked");
        assert_eq!(seen.lock().len(), 2);
        assert_eq!(harness.counter("envoy_cluster_ratelimit_over_limit", &[]), 1.0);
    }

    #[tokio::test]
    async fn a_failing_service_lets_requests_through_unless_told_otherwise() {
        let limiter = Asked::new(|_: &service::RateLimitRequest| Err(Status::internal("broken")));
        let (at_service, _server) = serve(Server::builder().add_service(
            service::rate_limit_service_server::RateLimitServiceServer::new(limiter),
        ))
        .await;
        let (mut harness, _backend, at) = served(vec![filter(&message())], routes()).await;
        service_cluster(&harness, at_service).await;
        assert_eq!(get_with(at, "/", &[("x-user", "bob")]).await.0, 200);
        assert!(
            harness.log.try_recv().is_err(),
            "nothing went wrong for a request that passed"
        );
        let mut strict = message();
        strict.failure_mode_deny = true;
        let at = harness
            .listen(
                &manager_with(vec![filter(&strict)]),
                core::TrafficDirection::Outbound,
            )
            .await;
        assert_eq!(get_with(at, "/", &[("x-user", "bob")]).await.0, 500);
        let line = harness.line().await;
        assert_eq!(line["response_code_details"], "rate_limiter_error");
    }
}

/// Entries that name the tier that is noted of a route, or nobody's.
fn by_tier() -> Vec<route::RateLimit> {
    use serin_xds::pb::envoy::r#type::metadata::v3 as metadata;
    let segment = metadata::metadata_key::path_segment::Segment::Key("tier".into());
    vec![route::RateLimit {
        actions: vec![Action {
            action_specifier: Some(action::ActionSpecifier::Metadata(action::MetaData {
                descriptor_key: "tier".into(),
                metadata_key: Some(metadata::MetadataKey {
                    key: "shop".into(),
                    path: vec![metadata::metadata_key::PathSegment {
                        segment: Some(segment),
                    }],
                }),
                source: action::meta_data::Source::RouteEntry as i32,
                skip_if_absent: true,
                ..Default::default()
            })),
        }],
        ..Default::default()
    }]
}

#[tokio::test]
async fn what_is_noted_of_a_route_chooses_the_bucket() {
    let mut message = limit(1000);
    message.descriptors = vec![common::LocalRateLimitDescriptor {
        entries: vec![common::rate_limit_descriptor::Entry {
            key: "tier".into(),
            value: "free".into(),
        }],
        token_bucket: bucket(1),
        shadow_mode: false,
    }];
    message.rate_limits = by_tier();
    let noted = |prefix: &str, tier: &str| {
        let mut route = prefix_route(prefix, to_cluster("c"));
        route.metadata = Some(core::Metadata {
            filter_metadata: [("shop".to_owned(), string_struct(&[("tier", tier)]))].into(),
            ..Default::default()
        });
        route
    };
    let routes = vec![
        noted("/free", "free"),
        noted("/gold", "gold"),
        prefix_route("/", to_cluster("c")),
    ];
    let (_harness, _backend, at) = served(vec![filter(&message)], vec![host("all", "*", routes)]).await;
    assert_eq!(get(at, "/free").await.0, 200);
    assert_eq!(get(at, "/free").await.0, 429);
    for path in ["/gold", "/"] {
        for _ in 0..3 {
            assert_eq!(get(at, path).await.0, 200, "{path}");
        }
    }
}

#[tokio::test]
async fn members_of_a_cluster_share_a_limit_evenly() {
    use serin_proxy::control::{Options, Proxy};
    let mut message = limit(6);
    message.local_cluster_rate_limit = Some(common::LocalClusterRateLimit {});
    // Who does not know its cluster cannot know its share.
    let harness = Harness::start();
    let chain = http_chain(&manager_with(vec![filter(&message)]));
    let listener = listener_of("l", core::TrafficDirection::Outbound, vec![chain]);
    let refused = harness
        .try_put(ResourceType::Listener, "l", &listener)
        .await
        .unwrap();
    assert!(refused.contains("local_cluster_rate_limit: needs"), "{refused}");
    let (proxy, log) = Proxy::start(Options {
        concurrency: 1,
        local_cluster: Some("local".into()),
        ..Default::default()
    })
    .unwrap();
    let harness = Harness { proxy, log };
    let backend = Backend::named("ok").await;
    harness.cluster("c", &[backend.address]).await;
    harness.routes(to_c()).await;
    let member: Vec<std::net::SocketAddr> = (1..=3).map(|last| ([10, 0, 0, last], 80).into()).collect();
    harness.cluster("local", &member).await;
    let at = harness
        .listen(
            &manager_with(vec![filter(&message)]),
            core::TrafficDirection::Outbound,
        )
        .await;
    // A third of six.
    for expected in [200, 200, 429] {
        assert_eq!(get(at, "/").await.0, expected);
    }
    // Alone it has all of what is left.
    harness.endpoints("local", &member[..1]).await;
    message.stat_prefix = "alone".into();
    let at = {
        let chain = http_chain(&manager_with(vec![filter(&message)]));
        let listener = listener_of("alone", core::TrafficDirection::Outbound, vec![chain]);
        harness.put(ResourceType::Listener, "alone", &listener).await;
        harness.proxy.listener_address("alone").unwrap()
    };
    for _ in 0..6 {
        assert_eq!(get(at, "/").await.0, 200);
    }
    assert_eq!(get(at, "/").await.0, 429);
}

#[tokio::test]
async fn filters_of_one_key_and_one_filling_share_their_bucket() {
    let harness = Harness::start();
    let backend = Backend::named("ok").await;
    harness.cluster("c", &[backend.address]).await;
    let mut chains = Vec::new();
    for (name, key, tokens) in [("a", "k", 2), ("b", "k", 2), ("c", "k", 3), ("d", "", 2)] {
        let limit = network::LocalRateLimit {
            stat_prefix: name.into(),
            token_bucket: bucket(tokens),
            share_key: key.into(),
            ..Default::default()
        };
        let mut chain = crate::listener::tcp_chain("c");
        chain.filters.insert(
            0,
            network_filter("envoy.filters.network.local_ratelimit", Some(any(&limit))),
        );
        chains.push((
            name,
            listener_of(name, core::TrafficDirection::Outbound, vec![chain]),
        ));
    }
    let request = b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n";
    let mut passed = Vec::new();
    for (name, listener) in &chains {
        harness.put(ResourceType::Listener, name, listener).await;
    }
    for (name, tries) in [("a", 1), ("b", 2), ("c", 4), ("d", 3)] {
        let at = harness.proxy.listener_address(name).unwrap();
        let mut count = 0;
        for _ in 0..tries {
            count += usize::from(crate::listener::answer_to(at, request).await.ends_with("ok"));
        }
        passed.push(count);
    }
    assert_eq!(passed, [1, 1, 3, 2]);
}
