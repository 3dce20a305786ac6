//! Role-based access control.

use serin_xds::ResourceType;
use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::envoy::config::rbac::v3 as rbac;
use serin_xds::pb::envoy::extensions::filters::http::rbac::v3 as http_rbac;
use serin_xds::pb::envoy::extensions::filters::network::rbac::v3 as network_rbac;
use serin_xds::pb::envoy::r#type::matcher::v3 as matcher;
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
                tcp_filter("c"),
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
#[tokio::test]
async fn a_denied_connection_is_kept_for_as_long_as_the_rules_say() {
    let harness = Harness::start();
    harness.cluster("c", &[closed_port().await]).await;
    let listen = async |name: &str, delay: Option<google::Duration>, continuous: bool| {
        let chain = serin_xds::pb::envoy::config::listener::v3::FilterChain {
            filters: vec![
                network_filter(
                    "envoy.filters.network.rbac",
                    Some(any(&network_rbac::Rbac {
                        rules: Some(rbac::Rbac::default()),
                        stat_prefix: name.into(),
                        delay_deny: delay,
                        enforcement_type: i32::from(continuous),
                        ..Default::default()
                    })),
                ),
                tcp_filter("c"),
            ],
            ..Default::default()
        };
        let message = listener_of(name, core::TrafficDirection::Inbound, vec![chain]);
        harness.put(ResourceType::Listener, name, &message).await;
        harness.proxy.listener_address(name).unwrap()
    };
    let long = TcpStream::connect(listen("long", millis(3_600_000), false).await)
        .await
        .unwrap();
    soon("the denial", async {
        while harness.counter("envoy_rbac_denied", &[("envoy_tcp_prefix", "long")]) < 1.0 {
            tokio::task::yield_now().await;
        }
    })
    .await;
    // One that came later, judged continuously, is closed at once.
    assert_eq!(raw(listen("none", None, true).await, b"").await, "");
    let mut byte = [0];
    assert_eq!(
        long.try_read(&mut byte).unwrap_err().kind(),
        std::io::ErrorKind::WouldBlock
    );
    assert_eq!(raw(listen("short", millis(20), false).await, b"").await, "");
}
