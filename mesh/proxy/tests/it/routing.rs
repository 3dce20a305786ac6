//! Routes that look at more than path and headers, and clusters that requests name themselves.

use http::Request;
use http_body_util::Full;
use serin_xds::ResourceType;
use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::envoy::config::route::v3 as route;
use serin_xds::pb::envoy::extensions::path;
use serin_xds::pb::envoy::r#type::matcher::v3 as matcher;
use serin_xds::pb::google::protobuf as google;

use crate::certificates::{Authority, common, server_socket};
use crate::fixture::*;
use crate::tls::tls_get;

const CLIENT: &str = "spiffe://cluster.local/ns/edge/sa/client";
const SERVER: &str = "spiffe://cluster.local/ns/prod/sa/reviews";

fn extension(name: &str, config: google::Any) -> Option<core::TypedExtensionConfig> {
    Some(core::TypedExtensionConfig {
        name: name.into(),
        typed_config: Some(config),
    })
}

fn template_route(template: &str, rewrite: Option<&str>) -> route::Route {
    let action = route::RouteAction {
        path_rewrite_policy: rewrite.and_then(|rewrite| {
            extension(
                "envoy.path.rewrite.uri_template.uri_template_rewriter",
                any(&path::rewrite::uri_template::v3::UriTemplateRewriteConfig {
                    path_template_rewrite: rewrite.into(),
                }),
            )
        }),
        ..to_cluster("c")
    };
    let mut out = prefix_route("/", action);
    out.r#match = Some(route::RouteMatch {
        path_specifier: extension(
            "envoy.path.match.uri_template.uri_template_matcher",
            any(&path::r#match::uri_template::v3::UriTemplateMatchConfig {
                path_template: template.into(),
            }),
        )
        .map(route::route_match::PathSpecifier::PathMatchPolicy),
        ..Default::default()
    });
    out
}

#[tokio::test]
async fn path_templates_choose_the_route_and_their_variables_make_the_new_path() {
    let mut backend = Backend::named("ok").await;
    let harness = Harness::start();
    harness.cluster("c", &[backend.address]).await;
    let at = harness
        .serve(vec![
            template_route("/users/{id}/photos/{rest=**}", Some("/p/{rest}/of/{id}")),
            template_route("/users/*", None),
        ])
        .await;
    for (path, expected) in [
        ("/users/7/photos/a/b.png?x=1", Some("/p/a/b.png/of/7?x=1")),
        ("/users/7", Some("/users/7")),
        ("/users/7/other", None),
    ] {
        let code = get(at, path).await.0;
        match expected {
            None => assert_eq!(code, 404, "{path}"),
            Some(expected) => {
                assert_eq!(
                    (code, backend.next().await.path.as_str()),
                    (200, expected),
                    "{path}"
                );
            }
        }
    }
    let wrong = route::RouteConfiguration {
        name: "80".into(),
        virtual_hosts: vec![host(
            "all",
            "*",
            vec![template_route("/users/{id}", Some("/p/{name}"))],
        )],
        ..Default::default()
    };
    let refused = harness.try_put(ResourceType::Route, "80", &wrong).await.unwrap();
    assert!(
        refused.contains("path_rewrite_policy") && refused.contains("no variable"),
        "{refused}"
    );
}

#[tokio::test]
async fn a_cookie_or_a_named_cluster_decides_where_a_request_goes() {
    let (stable, canary) = (Backend::named("stable").await, Backend::named("canary").await);
    let harness = Harness::start();
    harness.cluster("stable", &[stable.address]).await;
    harness.cluster("canary", &[canary.address]).await;
    let mut by_cookie = prefix_route("/c", to_cluster("canary"));
    if let Some(matches) = &mut by_cookie.r#match {
        matches.cookies = vec![route::CookieMatcher {
            name: "who".into(),
            string_match: Some(matcher::StringMatcher {
                match_pattern: Some(matcher::string_matcher::MatchPattern::Exact("tester".into())),
                ..Default::default()
            }),
            invert_match: false,
        }];
    }
    let by_header = route::RouteAction {
        cluster_specifier: Some(route::route_action::ClusterSpecifier::ClusterHeader(
            "x-cluster".into(),
        )),
        ..to_cluster("")
    };
    let at = harness
        .serve(vec![
            by_cookie,
            prefix_route("/c", to_cluster("stable")),
            prefix_route("/h", by_header),
        ])
        .await;
    let ask = async |path: &str, name: &str, value: &str| {
        let request = Request::get(path)
            .header("host", "reviews")
            .header(name, value)
            .body(Full::from(""))
            .unwrap();
        let (code, _, body) = send(at, request).await;
        (code, body)
    };
    assert_eq!(
        ask("/c", "cookie", "a=b; who=tester").await,
        (200, "canary".into())
    );
    assert_eq!(ask("/c", "cookie", "who=user").await, (200, "stable".into()));
    assert_eq!(ask("/c", "x-none", "").await, (200, "stable".into()));
    assert_eq!(ask("/h", "x-cluster", "canary").await, (200, "canary".into()));
    assert_eq!(ask("/h", "x-cluster", "stable").await, (200, "stable".into()));
    for (name, value) in [("x-cluster", "nobody"), ("x-none", "")] {
        assert_eq!(ask("/h", name, value).await.0, 503, "{name}: {value}");
    }
    // A cluster that comes later is found by the requests that come after it.
    harness.cluster("late", &[canary.address]).await;
    assert_eq!(ask("/h", "x-cluster", "late").await, (200, "canary".into()));
}

#[tokio::test]
async fn the_clients_certificate_decides_which_route_it_gets() {
    let authority = Authority::new("ca");
    let (known, unknown) = (Backend::named("known").await, Backend::named("unknown").await);
    let harness = Harness::start();
    harness.cluster("known", &[known.address]).await;
    harness.cluster("unknown", &[unknown.address]).await;
    let mut with_certificate = prefix_route("/", to_cluster("known"));
    if let Some(matches) = &mut with_certificate.r#match {
        matches.tls_context = Some(route::route_match::TlsContextMatchOptions {
            presented: Some(google::BoolValue { value: true }),
            validated: Some(google::BoolValue { value: true }),
        });
    }
    harness
        .routes(vec![host(
            "all",
            "*",
            vec![with_certificate, prefix_route("/", to_cluster("unknown"))],
        )])
        .await;
    let mut chain = http_chain(&manager("80"));
    chain.transport_socket = server_socket(
        common(
            Some(&authority.issue(&[SERVER, "reviews"])),
            Some(authority.context()),
            &[],
        ),
        false,
    );
    harness
        .put(
            ResourceType::Listener,
            "l",
            &listener_of("l", core::TrafficDirection::Inbound, vec![chain]),
        )
        .await;
    let at = harness.proxy.listener_address("l").unwrap();
    let plain = authority.client().build();
    let proven = authority.client().identity(&authority.issue(&[CLIENT])).build();
    for (client, expected) in [(plain, "unknown"), (proven, "known")] {
        let (code, _, body) = tls_get(at, &client, "reviews", "/").await.unwrap();
        assert_eq!((code, body.as_str()), (200, expected));
    }
}

#[tokio::test]
async fn a_weighted_cluster_may_be_the_one_that_a_field_names() {
    let (fixed, named) = (Backend::named("fixed").await, Backend::named("named").await);
    let harness = Harness::start();
    harness.cluster("fixed", &[fixed.address]).await;
    harness.cluster("named", &[named.address]).await;
    let mut action = to_weighted(&[("fixed", 1), ("", 1)]);
    if let Some(route::route_action::ClusterSpecifier::WeightedClusters(weighted)) =
        &mut action.cluster_specifier
    {
        weighted.clusters[1].cluster_header = "x-cluster".into();
    }
    let at = harness.serve(vec![prefix_route("/", action)]).await;
    let ask = async |name: &str| {
        let request = Request::get("/")
            .header("host", "reviews")
            .header("x-cluster", name)
            .body(Full::from(""))
            .unwrap();
        let (code, _, body) = send(at, request).await;
        (code, body)
    };
    let mut answers = Vec::new();
    for _ in 0..10 {
        answers.push(ask("named").await.1);
    }
    for name in ["fixed", "named"] {
        assert_eq!(
            answers.iter().filter(|answer| *answer == name).count(),
            5,
            "{answers:?}"
        );
    }
    let mut missing = vec![ask("none").await.0, ask("none").await.0];
    missing.sort_unstable();
    assert_eq!(
        missing,
        [200, 503],
        "one that does not exist is not answered for by the other"
    );
}
