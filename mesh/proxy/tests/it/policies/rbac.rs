//! Role-based access control.

use serin_xds::ResourceType;
use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::envoy::config::rbac::v3 as rbac;
use serin_xds::pb::envoy::extensions::filters::http::rbac::v3 as http_rbac;
use serin_xds::pb::envoy::extensions::filters::network::rbac::v3 as network_rbac;
use serin_xds::pb::envoy::extensions::filters::network::tcp_proxy::v3 as tcp;
use serin_xds::pb::envoy::extensions::matching::common_inputs::network::v3 as network_inputs;
use serin_xds::pb::envoy::r#type::matcher::v3 as matcher;
use serin_xds::pb::xds::core::v3::TypedExtensionConfig;
use serin_xds::pb::xds::r#type::matcher::v3 as xds;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::*;

fn any_principal() -> rbac::Principal {
    rbac::Principal {
        identifier: Some(rbac::principal::Identifier::Any(true)),
    }
}

fn path_is(path: &str) -> rbac::Permission {
    rbac::Permission {
        rule: Some(rbac::permission::Rule::UrlPath(matcher::PathMatcher {
            rule: Some(matcher::path_matcher::Rule::Path(exact(path))),
        })),
    }
}

pub(crate) fn rules(action: rbac::rbac::Action, name: &str, permission: rbac::Permission) -> rbac::Rbac {
    rbac::Rbac {
        action: action as i32,
        policies: [(
            name.to_owned(),
            rbac::Policy {
                permissions: vec![permission],
                principals: vec![any_principal()],
                ..Default::default()
            },
        )]
        .into(),
        ..Default::default()
    }
}

fn filter(rules: Option<rbac::Rbac>, shadow: Option<rbac::Rbac>) -> hcm::HttpFilter {
    http_filter(
        "envoy.filters.http.rbac",
        Some(any(&http_rbac::Rbac {
            rules,
            shadow_rules: shadow,
            shadow_rules_stat_prefix: "dry_".into(),
            ..Default::default()
        })),
    )
}

#[tokio::test]
async fn a_denied_request_gets_403_and_the_log_names_the_policy_and_rule() {
    let deny = rules(
        rbac::rbac::Action::Deny,
        "ns[a]-policy[p]-rule[0]",
        path_is("/admin"),
    );
    let (mut harness, mut backend, at) = served(vec![filter(Some(deny), None)], to_c()).await;
    assert_eq!(get(at, "/open").await.0, 200);
    backend.next().await;
    let (status, headers, body) = get(at, "/admin").await;
    assert_eq!((status, &*body), (403, "RBAC: access denied"));
    assert_eq!(headers["content-type"], "text/plain");
    assert_eq!(backend.hits(), 1, "the application was not asked");
    assert_eq!(harness.counter("envoy_http_rbac_denied", &[]), 1.0);
    assert_eq!(harness.counter("envoy_http_rbac_allowed", &[]), 1.0);
    let _ = &mut harness;
}

#[tokio::test]
async fn what_no_allow_policy_matches_is_denied_also_on_normalised_paths() {
    let allow = rules(rbac::rbac::Action::Allow, "p", path_is("/open"));
    let (_harness, backend, at) = served(vec![filter(Some(allow), None)], to_c()).await;
    assert_eq!(get(at, "/open").await.0, 200);
    assert_eq!(
        get(at, "/x/../open").await.0,
        200,
        "the path is judged as it is forwarded"
    );
    assert_eq!(get(at, "/open/../secret").await.0, 403);
    assert_eq!(backend.hits(), 2);
}

#[tokio::test]
async fn shadow_rules_deny_nobody_and_are_counted() {
    let deny = rules(rbac::rbac::Action::Deny, "p", path_is("/admin"));
    let (harness, _backend, at) = served(vec![filter(None, Some(deny))], to_c()).await;
    assert_eq!(get(at, "/admin").await.0, 200);
    assert_eq!(
        harness.counter("envoy_http_rbac_shadow_denied", &[("prefix", "dry_")]),
        1.0
    );
    assert_eq!(harness.counter("envoy_http_rbac_denied", &[]), 0.0);
}

#[tokio::test]
async fn a_route_has_rules_of_its_own_or_none() {
    let deny_all = || {
        rules(
            rbac::rbac::Action::Deny,
            "all",
            rbac::Permission {
                rule: Some(rbac::permission::Rule::Any(true)),
            },
        )
    };
    let mut free = prefix_route("/free", to_cluster("c"));
    free.typed_per_filter_config = [(
        "envoy.filters.http.rbac".to_owned(),
        any(&http_rbac::RbacPerRoute { rbac: None }),
    )]
    .into();
    let mut own = prefix_route("/own", to_cluster("c"));
    own.typed_per_filter_config = [(
        "envoy.filters.http.rbac".to_owned(),
        any(&http_rbac::RbacPerRoute {
            rbac: Some(http_rbac::Rbac {
                rules: Some(rules(rbac::rbac::Action::Allow, "p", path_is("/own/yes"))),
                ..Default::default()
            }),
        }),
    )]
    .into();
    let hosts = vec![host(
        "all",
        "*",
        vec![free, own, prefix_route("/", to_cluster("c"))],
    )];
    let (_harness, _backend, at) = served(vec![filter(Some(deny_all()), None)], hosts).await;
    for (path, expected) in [("/", 403), ("/free", 200), ("/own/yes", 200), ("/own/no", 403)] {
        assert_eq!(get(at, path).await.0, expected, "{path}");
    }
}

#[tokio::test]
async fn grpc_requests_are_denied_with_permission_denied() {
    let deny = rules(rbac::rbac::Action::Deny, "p", path_is("/s/M"));
    let (_harness, _backend, at) = served(vec![filter(Some(deny), None)], to_c()).await;
    let (status, headers, _) = get_with(at, "/s/M", &[("content-type", "application/grpc")]).await;
    assert_eq!((status, headers["grpc-status"].as_bytes()), (200, &b"7"[..]));
}

#[tokio::test]
async fn connections_are_judged_before_their_bytes_go_on() {
    let mut harness = Harness::start();
    let mut backend = Backend::named("ok").await;
    harness.cluster("c", &[backend.address]).await;
    let listen = |name: &'static str, address: &'static str| {
        let from_somewhere = rbac::Rbac {
            action: rbac::rbac::Action::Allow as i32,
            policies: [(
                "ns[a]-policy[p]-rule[0]".to_owned(),
                rbac::Policy {
                    permissions: vec![rbac::Permission {
                        rule: Some(rbac::permission::Rule::Any(true)),
                    }],
                    principals: vec![rbac::Principal {
                        identifier: Some(rbac::principal::Identifier::DirectRemoteIp(core::CidrRange {
                            address_prefix: address.into(),
                            prefix_len: number(32),
                        })),
                    }],
                    ..Default::default()
                },
            )]
            .into(),
            ..Default::default()
        };
        let chain = serin_xds::pb::envoy::config::listener::v3::FilterChain {
            filters: vec![
                network_filter(
                    "envoy.filters.network.rbac",
                    Some(any(&network_rbac::Rbac {
                        rules: Some(from_somewhere),
                        stat_prefix: name.into(),
                        ..Default::default()
                    })),
                ),
                network_filter(
                    "envoy.filters.network.tcp_proxy",
                    Some(any(&tcp::TcpProxy {
                        cluster_specifier: Some(tcp::tcp_proxy::ClusterSpecifier::Cluster("c".into())),
                        ..Default::default()
                    })),
                ),
            ],
            ..Default::default()
        };
        listener_of(name, core::TrafficDirection::Inbound, vec![chain])
    };
    for (name, address) in [("open", "127.0.0.1"), ("shut", "10.9.9.9")] {
        harness
            .put(ResourceType::Listener, name, &listen(name, address))
            .await;
    }
    let request = b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n";
    let answer = raw(harness.proxy.listener_address("open").unwrap(), request).await;
    assert!(answer.ends_with("ok"), "{answer}");
    backend.next().await;
    let mut shut = TcpStream::connect(harness.proxy.listener_address("shut").unwrap())
        .await
        .unwrap();
    // The proxy may have closed before the bytes arrive.
    let _ = shut.write_all(request).await;
    let mut rest = Vec::new();
    let _ = soon("the end", shut.read_to_end(&mut rest)).await;
    assert!(rest.is_empty());
    assert_eq!(backend.hits(), 1);
    let line = harness.line().await;
    assert_eq!(
        line["connection_termination_details"],
        "rbac_access_denied_matched_policy[none]"
    );
    assert_eq!(
        harness.counter("envoy_rbac_denied", &[("envoy_tcp_prefix", "shut")]),
        1.0
    );
}

#[tokio::test]
async fn a_matcher_that_cannot_be_judged_is_refused_and_the_old_rules_stay() {
    let deny = rules(rbac::rbac::Action::Deny, "p", path_is("/admin"));
    let (harness, _backend, at) = served(vec![filter(Some(deny), None)], to_c()).await;
    let open = rules(
        rbac::rbac::Action::Allow,
        "p",
        rbac::Permission {
            rule: Some(rbac::permission::Rule::Matcher(core::TypedExtensionConfig {
                name: "some.matcher".into(),
                typed_config: None,
            })),
        },
    );
    let manager = manager_with(vec![filter(Some(open), None)]);
    let listener = listener_of("l", core::TrafficDirection::Outbound, vec![http_chain(&manager)]);
    let refusal = harness
        .try_put(ResourceType::Listener, "l", &listener)
        .await
        .unwrap();
    assert!(
        refusal.contains("http_filters[0].rules.policies[\"p\"].permissions[0].matcher"),
        "{refusal}"
    );
    assert_eq!(get(at, "/admin").await.0, 403);
}

#[tokio::test]
async fn a_condition_decides_beside_permissions_and_principals() {
    use expr::expr::ExprKind;
    use serin_xds::pb::google::api::expr::v1alpha1 as expr;
    let of = |kind| expr::Expr {
        id: 0,
        expr_kind: Some(kind),
    };
    let select = |operand: &str, field: &str| {
        of(ExprKind::SelectExpr(Box::new(expr::expr::Select {
            operand: Some(Box::new(of(ExprKind::IdentExpr(expr::expr::Ident {
                name: operand.into(),
            })))),
            field: field.into(),
            test_only: false,
        })))
    };
    let text = |text: &str| {
        of(ExprKind::ConstExpr(expr::Constant {
            constant_kind: Some(expr::constant::ConstantKind::StringValue(text.into())),
        }))
    };
    let call = |function: &str, args: Vec<expr::Expr>| {
        of(ExprKind::CallExpr(Box::new(expr::expr::Call {
            target: None,
            function: function.into(),
            args,
        })))
    };
    let mut deny = rules(rbac::rbac::Action::Deny, "red", path_is("/admin"));
    let tenant = call("_[_]", vec![select("request", "headers"), text("x-tenant")]);
    deny.policies.get_mut("red").unwrap().condition = Some(call("_==_", vec![tenant, text("red")]));
    let (harness, _backend, at) = served(vec![filter(Some(deny.clone()), None)], to_c()).await;
    assert_eq!(get_with(at, "/admin", &[("x-tenant", "red")]).await.0, 403);
    assert_eq!(get_with(at, "/admin", &[("x-tenant", "blue")]).await.0, 200);
    assert_eq!(get_with(at, "/admin", &[]).await.0, 200);
    assert_eq!(get_with(at, "/", &[("x-tenant", "red")]).await.0, 200);

    let colour = call("_==_", vec![select("request", "colour"), text("red")]);
    deny.policies.get_mut("red").unwrap().condition = Some(colour);
    let manager = manager_with(vec![filter(Some(deny), None)]);
    let listener = listener_of("l", core::TrafficDirection::Outbound, vec![http_chain(&manager)]);
    let refusal = harness
        .try_put(ResourceType::Listener, "l", &listener)
        .await
        .unwrap();
    assert!(
        refusal.contains("policies[\"red\"].condition") && refusal.contains("request.colour"),
        "{refusal}"
    );
}

/// A header's input, an equal text, and the action that follows.
fn field(header: &str, text: &str, action: rbac::rbac::Action) -> xds::matcher::matcher_list::FieldMatcher {
    use xds::matcher::matcher_list::predicate::{MatchType, SinglePredicate, single_predicate};
    xds::matcher::matcher_list::FieldMatcher {
        predicate: Some(xds::matcher::matcher_list::Predicate {
            match_type: Some(MatchType::SinglePredicate(SinglePredicate {
                input: typed(&matcher::HttpRequestHeaderMatchInput {
                    header_name: header.into(),
                }),
                matcher: Some(single_predicate::Matcher::ValueMatch(xds::StringMatcher {
                    match_pattern: Some(xds::string_matcher::MatchPattern::Exact(text.into())),
                    ..Default::default()
                })),
            })),
        }),
        on_match: Some(leads_to(text, action)),
    }
}

fn leads_to(name: &str, action: rbac::rbac::Action) -> xds::matcher::OnMatch {
    xds::matcher::OnMatch {
        keep_matching: false,
        on_match: typed(&rbac::Action {
            name: name.into(),
            action: action as i32,
        })
        .map(xds::matcher::on_match::OnMatch::Action),
    }
}

fn typed<M: prost::Message + prost::Name>(message: &M) -> Option<TypedExtensionConfig> {
    Some(TypedExtensionConfig {
        name: "typed".into(),
        typed_config: Some(any(message)),
    })
}

#[tokio::test]
async fn a_matcher_tree_decides_by_its_first_match_and_denies_what_nothing_matches() {
    use rbac::rbac::Action;
    let tree = xds::Matcher {
        matcher_type: Some(xds::matcher::MatcherType::MatcherList(
            xds::matcher::MatcherList {
                matchers: vec![
                    field("x-tenant", "red", Action::Deny),
                    field("x-tenant", "blue", Action::Allow),
                    field("x-role", "boss", Action::Allow),
                ],
            },
        )),
        on_no_match: None,
    };
    let with = |tree: xds::Matcher| {
        http_filter(
            "envoy.filters.http.rbac",
            Some(any(&http_rbac::Rbac {
                matcher: Some(tree),
                ..Default::default()
            })),
        )
    };
    let (mut harness, _backend, at) = served(vec![with(tree)], to_c()).await;
    assert_eq!(get_with(at, "/", &[("x-tenant", "blue")]).await.0, 200);
    assert_eq!(
        get_with(at, "/", &[("x-tenant", "red"), ("x-role", "boss")])
            .await
            .0,
        403
    );
    assert_eq!(get_with(at, "/", &[("x-role", "boss")]).await.0, 200);
    assert_eq!(get(at, "/").await.0, 403);
    let mut map = std::collections::HashMap::new();
    map.insert("127.".to_owned(), leads_to("near", Action::Deny));
    map.insert("127.0.0.1".to_owned(), leads_to("self", Action::Allow));
    let by_address = xds::Matcher {
        matcher_type: Some(xds::matcher::MatcherType::MatcherTree(
            xds::matcher::MatcherTree {
                input: typed(&network_inputs::SourceIpInput {}),
                tree_type: Some(xds::matcher::matcher_tree::TreeType::PrefixMatchMap(
                    xds::matcher::matcher_tree::MatchMap { map },
                )),
            },
        )),
        on_no_match: None,
    };
    let at = harness
        .listen(
            &manager_with(vec![with(by_address)]),
            core::TrafficDirection::Outbound,
        )
        .await;
    assert_eq!(get(at, "/").await.0, 200, "the longest prefix decides");
    let unknown = xds::Matcher {
        matcher_type: None,
        on_no_match: Some(Box::new(xds::matcher::OnMatch {
            keep_matching: true,
            ..leads_to("x", Action::Allow)
        })),
    };
    let manager = manager_with(vec![with(unknown)]);
    let listener = listener_of("l", core::TrafficDirection::Outbound, vec![http_chain(&manager)]);
    let refusal = harness
        .try_put(ResourceType::Listener, "l", &listener)
        .await
        .unwrap();
    assert!(
        refusal.contains("matcher.on_no_match.on_match.keep_matching"),
        "{refusal}"
    );
    assert!(
        harness.log.try_recv().is_err(),
        "denials have no flag and are no errors"
    );
}
