use http::HeaderMap;
use route::route_match::PathSpecifier;

use super::*;

fn forward(cluster: &str) -> Option<route::route::Action> {
    Some(route::route::Action::Route(route::RouteAction {
        cluster_specifier: Some(route::route_action::ClusterSpecifier::Cluster(cluster.into())),
        ..Default::default()
    }))
}

fn path_route(name: &str, path: PathSpecifier) -> route::Route {
    route::Route {
        name: name.into(),
        r#match: Some(route::RouteMatch {
            path_specifier: Some(path),
            ..Default::default()
        }),
        action: forward("c"),
        ..Default::default()
    }
}

fn compile(routes: Vec<route::Route>) -> Result<VirtualHost, Refusal> {
    let mut slots = Slots::default();
    let mut context = Context {
        slots: &mut slots,
        workers: 1,
        seed: 0,
    };
    let host = route::VirtualHost {
        name: "h".into(),
        domains: vec!["*".into()],
        routes,
        ..Default::default()
    };
    VirtualHost::compile(&host, &mut context)
}

fn view<'a>(path: &'a str, headers: &'a HeaderMap) -> RequestView<'a> {
    RequestView {
        method: "GET",
        path,
        query: Some("q=1"),
        authority: Some("h:8080"),
        scheme: Some("http"),
        headers,
    }
}

#[test]
fn paths_match_exactly_by_prefix_by_separated_prefix_and_by_regex_in_order() {
    let regex = matcher::RegexMatcher {
        regex: "/r[0-9]+".into(),
        ..Default::default()
    };
    let host = compile(vec![
        path_route("exact", PathSpecifier::Path("/exact".into())),
        path_route("separated", PathSpecifier::PathSeparatedPrefix("/sep".into())),
        path_route("regex", PathSpecifier::SafeRegex(regex)),
        path_route("prefix", PathSpecifier::Prefix("/pre".into())),
        path_route("rest", PathSpecifier::Prefix("/".into())),
    ])
    .unwrap();
    let headers = HeaderMap::new();
    for (path, expected) in [
        ("/exact", "exact"),
        ("/exact/", "rest"),
        ("/sep", "separated"),
        ("/sep/x", "separated"),
        ("/sepx", "rest"),
        ("/r12", "regex"),
        ("/r12x", "rest"),
        ("/prefixed", "prefix"),
        ("/", "rest"),
    ] {
        assert_eq!(
            &*host.find(&view(path, &headers), || 0).unwrap().name,
            expected,
            "{path}"
        );
    }
}

#[test]
fn prefixes_are_rewritten_and_regex_groups_substituted() {
    let mut prefix = path_route("prefix", PathSpecifier::Prefix("/old/".into()));
    let Some(route::route::Action::Route(action)) = &mut prefix.action else {
        unreachable!()
    };
    action.prefix_rewrite = "/new/".into();
    let mut regex = path_route("regex", PathSpecifier::Prefix("/".into()));
    let Some(route::route::Action::Route(action)) = &mut regex.action else {
        unreachable!()
    };
    action.regex_rewrite = Some(matcher::RegexMatchAndSubstitute {
        pattern: Some(matcher::RegexMatcher {
            regex: "^/v([0-9])/(.*)$".into(),
            ..Default::default()
        }),
        substitution: r"/\2/$\1".into(),
    });
    let host = compile(vec![prefix, regex]).unwrap();
    let headers = HeaderMap::new();
    for (path, expected) in [("/old/x/y", "/new/x/y"), ("/v1/a", "/a/$1"), ("/plain", "/plain")] {
        let route = host.find(&view(path, &headers), || 0).unwrap();
        let Action::Forward(forward) = &route.action else {
            unreachable!()
        };
        assert_eq!(route.rewritten(forward.rewrite.as_ref().unwrap(), path), expected);
    }
}

#[test]
fn redirects_keep_what_they_do_not_change() {
    use route::redirect_action::{PathRewriteSpecifier, SchemeRewriteSpecifier};
    let cases = [
        (route::RedirectAction::default(), "http://h:8080/a?q=1"),
        (
            route::RedirectAction {
                host_redirect: "new".into(),
                ..Default::default()
            },
            "http://new/a?q=1",
        ),
        (
            route::RedirectAction {
                scheme_rewrite_specifier: Some(SchemeRewriteSpecifier::HttpsRedirect(true)),
                port_redirect: 443,
                strip_query: true,
                ..Default::default()
            },
            "https://h:443/a",
        ),
        (
            route::RedirectAction {
                path_rewrite_specifier: Some(PathRewriteSpecifier::PrefixRewrite("/b".into())),
                port_redirect: 81,
                ..Default::default()
            },
            "http://h:81/b?q=1",
        ),
        (
            route::RedirectAction {
                path_rewrite_specifier: Some(PathRewriteSpecifier::PathRedirect("/b".into())),
                ..Default::default()
            },
            "http://h:8080/b?q=1",
        ),
        (
            route::RedirectAction {
                path_rewrite_specifier: Some(PathRewriteSpecifier::PathRedirect("/b?own".into())),
                strip_query: true,
                ..Default::default()
            },
            "http://h:8080/b?own",
        ),
    ];
    for (message, expected) in cases {
        let mut route = path_route("r", PathSpecifier::Prefix("/a".into()));
        route.action = Some(route::route::Action::Redirect(message));
        let host = compile(vec![route]).unwrap();
        let headers = HeaderMap::new();
        let request = view("/a", &headers);
        let route = host.find(&request, || 0).unwrap();
        let Action::Redirect(redirect) = &route.action else {
            unreachable!()
        };
        let target = match redirect.rewrite() {
            None => "/a?q=1".to_owned(),
            Some(rewrite) => format!("{}?q=1", route.rewritten(rewrite, "/a")),
        };
        let location = Route::location(Some(redirect), &request, &target);
        assert_eq!(location, expected);
    }
}

#[test]
fn what_cannot_be_honoured_is_refused_with_its_path() {
    let mut hedged = path_route("r", PathSpecifier::Prefix("/".into()));
    let Some(route::route::Action::Route(action)) = &mut hedged.action else {
        unreachable!()
    };
    action.hedge_policy = Some(route::HedgePolicy {
        initial_requests: Some(serin_xds::pb::google::protobuf::UInt32Value { value: 2 }),
        ..Default::default()
    });
    assert_eq!(
        compile(vec![hedged]).unwrap_err().path,
        "routes[0].route.hedge_policy.initial_requests"
    );

    let zero = route::Route {
        action: Some(route::route::Action::Route(route::RouteAction {
            cluster_specifier: Some(route::route_action::ClusterSpecifier::WeightedClusters(
                route::WeightedCluster {
                    clusters: vec![route::weighted_cluster::ClusterWeight {
                        name: "a".into(),
                        ..Default::default()
                    }],
                    ..Default::default()
                },
            )),
            ..Default::default()
        })),
        ..path_route("r", PathSpecifier::Prefix("/".into()))
    };
    let error = compile(vec![zero]).unwrap_err();
    assert_eq!(
        error.to_string(),
        "routes[0].route.weighted_clusters.clusters: the weights add up to zero"
    );

    let limited = route::Route {
        request_body_buffer_limit: Some(serin_xds::pb::google::protobuf::UInt64Value { value: 1 }),
        ..path_route("r", PathSpecifier::Prefix("/".into()))
    };
    assert_eq!(
        compile(vec![limited]).unwrap_err().path,
        "routes[0].request_body_buffer_limit"
    );
    let mut slots = Slots::default();
    let mut context = Context {
        slots: &mut slots,
        workers: 1,
        seed: 0,
    };
    let told = route::VirtualHost {
        name: "h".into(),
        domains: vec!["*".into()],
        include_is_timeout_retry_header: true,
        ..Default::default()
    };
    let refused = VirtualHost::compile(&told, &mut context).unwrap_err();
    assert_eq!(refused.path, "include_is_timeout_retry_header");
}

#[test]
fn grpc_is_told_by_its_content_type() {
    for (value, expected) in [
        ("application/grpc", true),
        ("application/grpc+proto", true),
        ("application/grpc-web", false),
        ("text/plain", false),
    ] {
        let mut headers = HeaderMap::new();
        headers.insert("content-type", HeaderValue::from_static(value));
        assert_eq!(is_grpc(&headers), expected, "{value}");
    }
}
