//! Order, overrides and refusals of the chain; filters that only change fields.

use serin_xds::ResourceType;
use serin_xds::pb::envoy::config::common::mutation_rules::v3 as mutation;
use serin_xds::pb::envoy::config::rbac::v3 as rbac;
use serin_xds::pb::envoy::extensions::filters::http::{
    cors::v3 as cors, fault::v3 as fault, header_mutation::v3 as header_mutation, rbac::v3 as http_rbac,
    set_metadata::v3 as set_metadata,
};

use super::*;

fn append(key: &str, value: &str) -> mutation::HeaderMutation {
    mutation::HeaderMutation {
        action: Some(mutation::header_mutation::Action::Append(add_header(key, value))),
    }
}

fn mutations(
    request: Vec<mutation::HeaderMutation>,
    response: Vec<mutation::HeaderMutation>,
) -> header_mutation::Mutations {
    header_mutation::Mutations {
        request_mutations: request,
        response_mutations: response,
        ..Default::default()
    }
}

fn mutating(mutations: header_mutation::Mutations) -> hcm::HttpFilter {
    http_filter(
        "envoy.filters.http.header_mutation",
        Some(any(&header_mutation::HeaderMutation {
            mutations: Some(mutations),
            ..Default::default()
        })),
    )
}

fn aborting(status: u32) -> hcm::HttpFilter {
    http_filter(
        "envoy.filters.http.fault",
        Some(any(&fault::HttpFault {
            abort: Some(fault::FaultAbort {
                percentage: Some(envoy_type::FractionalPercent {
                    numerator: 100,
                    denominator: 0,
                }),
                error_type: Some(fault::fault_abort::ErrorType::HttpStatus(status)),
                ..Default::default()
            }),
            ..Default::default()
        })),
    )
}

fn off() -> google::Any {
    any(&route::FilterConfig {
        disabled: true,
        ..Default::default()
    })
}

#[tokio::test]
async fn mutations_of_the_chain_and_of_every_level_reach_both_sides() {
    let own = |value: &str| {
        any(&header_mutation::HeaderMutationPerRoute {
            mutations: Some(mutations(
                vec![append("x-level", value)],
                vec![append("x-out", value)],
            )),
        })
    };
    let name = || "envoy.filters.http.header_mutation".to_owned();
    let mut special = prefix_route("/special", to_cluster("c"));
    special.typed_per_filter_config = [(name(), own("route"))].into();
    let mut all = host("all", "*", vec![special, prefix_route("/", to_cluster("c"))]);
    all.typed_per_filter_config = [(name(), own("host"))].into();
    let filter = mutating(mutations(
        vec![
            append("x-level", "chain"),
            append("x-from", "%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%"),
        ],
        vec![append("x-out", "chain"), append("x-asked", "%REQ(x-ask)%")],
    ));
    let (_harness, mut backend, at) = served(vec![filter], vec![all]).await;
    let (_, headers, _) = get_with(at, "/", &[("x-ask", "me")]).await;
    assert_eq!(
        (&headers["x-out"], &headers["x-asked"]),
        (&"host".parse().unwrap(), &"me".parse().unwrap())
    );
    let seen = backend.next().await;
    assert_eq!(seen.headers["x-level"], "host");
    assert_eq!(seen.headers["x-from"], "127.0.0.1");
    // Unless told otherwise the least specific level is applied last.
    get(at, "/special").await;
    assert_eq!(backend.next().await.headers["x-level"], "host");
}

#[tokio::test]
async fn faults_are_asked_for_by_header_and_only_so_many_at_a_time() {
    use serin_xds::pb::envoy::extensions::filters::common::fault::v3 as common;
    use serin_xds::pb::envoy::extensions::filters::http::fault::v3 as fault;
    let all = Some(envoy_type::FractionalPercent {
        numerator: 100,
        denominator: 0,
    });
    let message = fault::HttpFault {
        delay: Some(common::FaultDelay {
            percentage: all,
            fault_delay_secifier: Some(common::fault_delay::FaultDelaySecifier::HeaderDelay(
                common::fault_delay::HeaderDelay {},
            )),
        }),
        abort: Some(fault::FaultAbort {
            percentage: all,
            error_type: Some(fault::fault_abort::ErrorType::HeaderAbort(
                fault::fault_abort::HeaderAbort {},
            )),
            response_body: "as you wish".into(),
        }),
        max_active_faults: number(1),
        ..Default::default()
    };
    let filter = http_filter("envoy.filters.http.fault", Some(any(&message)));
    let (mut harness, _backend, at) = served(vec![filter], to_c()).await;
    assert_eq!(get(at, "/").await.0, 200);
    let abort = [("x-envoy-fault-abort-request", "418")];
    let (status, _, body) = get_with(at, "/", &abort).await;
    assert_eq!((status, &*body), (418, "as you wish"));
    assert_eq!(harness.line().await["response_flags"], "FI");
    // One waits for an hour; while it does nobody else's wish is granted.
    let request = b"GET / HTTP/1.1\r\nhost: a\r\nx-envoy-fault-delay-request: 3600000\r\n\r\n";
    let mut waiting = tokio::net::TcpStream::connect(at).await.unwrap();
    tokio::io::AsyncWriteExt::write_all(&mut waiting, request)
        .await
        .unwrap();
    soon("the other's fault", async {
        while get_with(at, "/", &abort).await.0 != 200 {}
    })
    .await;
    drop(waiting);
    soon("the end of the other's fault", async {
        while get_with(at, "/", &abort).await.0 != 418 {}
    })
    .await;
}

#[tokio::test]
async fn filters_run_in_their_order_and_a_reply_of_the_proxy_passes_them_back() {
    let late = mutating(mutations(Vec::new(), vec![append("x-out", "mutated")]));
    let (_harness, backend, at) = served(vec![aborting(418), late], to_c()).await;
    let (status, headers, _) = get(at, "/").await;
    assert_eq!((status, headers["x-out"].as_bytes()), (418, &b"mutated"[..]));
    assert_eq!(backend.hits(), 0);
}

#[tokio::test]
async fn mutations_that_are_switched_off_leave_a_reply_of_the_proxy_alone() {
    let mut off = mutating(mutations(Vec::new(), vec![append("x-out", "mutated")]));
    off.disabled = true;
    let (_harness, _backend, at) = served(vec![aborting(418), off], to_c()).await;
    let (status, headers, _) = get(at, "/").await;
    assert_eq!((status, headers.get("x-out")), (418, None));
}

#[tokio::test]
async fn a_filter_can_be_switched_off_by_a_route_and_on_by_a_route() {
    let mut off_by_default = aborting(418);
    off_by_default.disabled = true;
    off_by_default.name = "second".into();
    let mut plain = prefix_route("/plain", to_cluster("c"));
    plain.typed_per_filter_config = [("envoy.filters.http.fault".to_owned(), off())].into();
    let mut second = prefix_route("/second", to_cluster("c"));
    second.typed_per_filter_config = [
        ("envoy.filters.http.fault".to_owned(), off()),
        ("second".to_owned(), any(&route::FilterConfig::default())),
    ]
    .into();
    let hosts = vec![host(
        "all",
        "*",
        vec![plain, second, prefix_route("/", to_cluster("c"))],
    )];
    let (_harness, _backend, at) = served(vec![aborting(417), off_by_default], hosts).await;
    for (path, expected) in [("/", 417), ("/plain", 200), ("/second", 418)] {
        assert_eq!(get(at, path).await.0, expected, "{path}");
    }
}

#[tokio::test]
async fn a_weighted_cluster_and_a_route_configuration_configure_filters_too() {
    let mut action = to_weighted(&[("c", 1), ("d", 1)]);
    let Some(route::route_action::ClusterSpecifier::WeightedClusters(weighted)) =
        &mut action.cluster_specifier
    else {
        panic!("weighted");
    };
    weighted.clusters[1].typed_per_filter_config = [("envoy.filters.http.fault".to_owned(), off())].into();
    let (harness, backend, at) = served(
        vec![aborting(417)],
        vec![host("all", "*", vec![prefix_route("/", action)])],
    )
    .await;
    let other = Backend::named("d").await;
    harness.cluster("d", &[other.address]).await;
    let mut statuses = Vec::new();
    for _ in 0..10 {
        statuses.push(get(at, "/").await.0);
    }
    assert_eq!(statuses.iter().filter(|status| **status == 200).count(), 5);
    assert_eq!(
        (backend.hits(), other.hits()),
        (0, 5),
        "the target that filters saw is the one that is used"
    );
    let config = route::RouteConfiguration {
        name: "80".into(),
        virtual_hosts: to_c(),
        typed_per_filter_config: [("envoy.filters.http.fault".to_owned(), off())].into(),
        ..Default::default()
    };
    harness.put(ResourceType::Route, "80", &config).await;
    assert_eq!(get(at, "/").await.0, 200);
}

#[tokio::test]
async fn metadata_of_one_filter_is_seen_by_the_next() {
    let metadata = http_filter(
        "envoy.filters.http.set_metadata",
        Some(any(&set_metadata::Config {
            metadata: vec![set_metadata::Metadata {
                metadata_namespace: "ns".into(),
                value: Some(string_struct(&[("tier", "gold")])),
                ..Default::default()
            }],
            ..Default::default()
        })),
    );
    let tier = matcher::MetadataMatcher {
        filter: "ns".into(),
        path: vec![matcher::metadata_matcher::PathSegment {
            segment: Some(matcher::metadata_matcher::path_segment::Segment::Key(
                "tier".into(),
            )),
        }],
        value: Some(matcher::ValueMatcher {
            match_pattern: Some(matcher::value_matcher::MatchPattern::StringMatch(exact("gold"))),
        }),
        invert: false,
    };
    let allow = super::rbac::rules(
        rbac::rbac::Action::Allow,
        "p",
        rbac::Permission {
            rule: Some(rbac::permission::Rule::Metadata(tier)),
        },
    );
    let judge = http_filter(
        "envoy.filters.http.rbac",
        Some(any(&http_rbac::Rbac {
            rules: Some(allow),
            ..Default::default()
        })),
    );
    let told = mutating(mutations(
        Vec::new(),
        vec![append("x-tier", "%DYNAMIC_METADATA(ns:tier)%")],
    ));
    let (_harness, _backend, at) = served(vec![metadata, judge.clone(), told], to_c()).await;
    let (status, headers, _) = get(at, "/").await;
    assert_eq!((status, &headers["x-tier"]), (200, &"gold".parse().unwrap()));
    let (_harness, _backend, at) = served(vec![judge], to_c()).await;
    assert_eq!(get(at, "/").await.0, 403);
}

#[tokio::test]
async fn cors_of_the_route_wins_and_decorates_what_the_application_answers() {
    let policy = |origin: &str| cors::CorsPolicy {
        allow_origin_string_match: vec![exact(origin)],
        expose_headers: "x-seen".into(),
        ..Default::default()
    };
    let mut own = prefix_route("/own", to_cluster("c"));
    own.typed_per_filter_config = [(
        "envoy.filters.http.cors".to_owned(),
        any(&policy("https://route")),
    )]
    .into();
    let mut all = host("all", "*", vec![own, prefix_route("/", to_cluster("c"))]);
    all.typed_per_filter_config =
        [("envoy.filters.http.cors".to_owned(), any(&policy("https://host")))].into();
    let filter = http_filter("envoy.filters.http.cors", Some(any(&cors::Cors {})));
    let (_harness, _backend, at) = served(vec![filter], vec![all]).await;
    for (path, origin, allowed) in [
        ("/own", "https://route", true),
        ("/own", "https://host", false),
        ("/", "https://host", true),
        ("/", "https://route", false),
    ] {
        let (_, headers, _) = get_with(at, path, &[("origin", origin)]).await;
        let given = headers
            .get("access-control-allow-origin")
            .map(|value| value.to_str().unwrap());
        assert_eq!(given, allowed.then_some(origin), "{path} {origin}");
    }
}

#[tokio::test]
async fn a_filter_that_the_proxy_does_not_have_is_refused_by_name_unless_it_is_optional() {
    let harness = Harness::start();
    let mut lua = http_filter("envoy.filters.http.lua", None);
    let listener = |filter: &hcm::HttpFilter| {
        let manager = manager_with(vec![filter.clone()]);
        listener_of("l", core::TrafficDirection::Outbound, vec![http_chain(&manager)])
    };
    let refusal = harness
        .try_put(ResourceType::Listener, "l", &listener(&lua))
        .await
        .unwrap();
    assert!(refusal.contains("envoy.filters.http.lua"), "{refusal}");
    lua.is_optional = true;
    assert_eq!(
        harness
            .try_put(ResourceType::Listener, "l", &listener(&lua))
            .await,
        None
    );
}
