//! Access rules as matcher trees.

use serin_xds::ResourceType;
use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::envoy::config::rbac::v3 as rbac;
use serin_xds::pb::envoy::extensions::filters::http::rbac::v3 as http_rbac;
use serin_xds::pb::envoy::extensions::matching::common_inputs::network::v3 as network_inputs;
use serin_xds::pb::envoy::r#type::matcher::v3 as matcher;
use serin_xds::pb::xds::core::v3::TypedExtensionConfig;
use serin_xds::pb::xds::r#type::matcher::v3 as xds;
use xds::matcher::matcher_list::predicate::single_predicate::Matcher::CustomMatch as Custom;

use super::*;

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

fn field_matcher(
    input: Option<TypedExtensionConfig>,
    test: xds::matcher::matcher_list::predicate::single_predicate::Matcher,
    found: xds::matcher::OnMatch,
) -> xds::matcher::matcher_list::FieldMatcher {
    use xds::matcher::matcher_list::predicate;
    xds::matcher::matcher_list::FieldMatcher {
        predicate: Some(xds::matcher::matcher_list::Predicate {
            match_type: Some(predicate::MatchType::SinglePredicate(
                predicate::SinglePredicate {
                    input,
                    matcher: Some(test),
                },
            )),
        }),
        on_match: Some(found),
    }
}

fn list_of(matchers: Vec<xds::matcher::matcher_list::FieldMatcher>) -> xds::Matcher {
    xds::Matcher {
        matcher_type: Some(xds::matcher::MatcherType::MatcherList(
            xds::matcher::MatcherList { matchers },
        )),
        on_no_match: None,
    }
}

fn by_tree(tree: xds::Matcher) -> hcm::HttpFilter {
    http_filter(
        "envoy.filters.http.rbac",
        Some(any(&http_rbac::Rbac {
            matcher: Some(tree),
            ..Default::default()
        })),
    )
}

#[tokio::test]
async fn a_match_that_keeps_matching_or_leads_nowhere_is_none() {
    use rbac::rbac::Action;
    let keeping = |name: &str, value: &str, action| {
        let mut matcher = field(name, value, action);
        matcher.on_match.as_mut().unwrap().keep_matching = true;
        matcher
    };
    let nested = |inner: xds::Matcher, value: &str| {
        let mut matcher = field("x-tenant", value, Action::Allow);
        matcher.on_match = Some(xds::matcher::OnMatch {
            on_match: Some(xds::matcher::on_match::OnMatch::Matcher(Box::new(inner))),
            ..Default::default()
        });
        matcher
    };
    let tree = list_of(vec![
        keeping("x-tenant", "red", Action::Allow),
        nested(list_of(vec![field("x-role", "boss", Action::Allow)]), "blue"),
        field("x-tenant", "red", Action::Deny),
        field("x-late", "yes", Action::Allow),
    ]);
    let (harness, _backend, at) = served(vec![by_tree(tree)], to_c()).await;
    let ask = async |at, fields: &[(&str, &str)]| get_with(at, "/", fields).await.0;
    assert_eq!(ask(at, &[("x-tenant", "red"), ("x-late", "yes")]).await, 403);
    assert_eq!(ask(at, &[("x-tenant", "blue"), ("x-role", "boss")]).await, 200);
    assert_eq!(ask(at, &[("x-tenant", "blue")]).await, 403);
    assert_eq!(ask(at, &[("x-tenant", "blue"), ("x-late", "yes")]).await, 200);
    // A shorter prefix counts where the longer one keeps matching.
    let mut keep = leads_to("self", Action::Allow);
    keep.keep_matching = true;
    let map = [
        ("127.".to_owned(), leads_to("near", Action::Deny)),
        ("127.0.0.1".to_owned(), keep),
    ]
    .into();
    let by_address = xds::Matcher {
        matcher_type: Some(xds::matcher::MatcherType::MatcherTree(
            xds::matcher::MatcherTree {
                input: typed(&network_inputs::SourceIpInput {}),
                tree_type: Some(xds::matcher::matcher_tree::TreeType::PrefixMatchMap(
                    xds::matcher::matcher_tree::MatchMap { map },
                )),
            },
        )),
        on_no_match: Some(Box::new(leads_to("rest", Action::Allow))),
    };
    let manager = manager_with(vec![by_tree(by_address)]);
    let at = harness.listen(&manager, core::TrafficDirection::Outbound).await;
    assert_eq!(ask(at, &[]).await, 403);
}

#[tokio::test]
async fn custom_matchers_look_at_addresses_metadata_state_queries_and_expressions() {
    use rbac::rbac::Action;
    use serin_xds::pb::envoy::extensions::filters::http::set_metadata::v3 as set_metadata;
    use serin_xds::pb::envoy::extensions::matching::input_matchers;
    use xds::matcher::matcher_list::predicate::single_predicate::Matcher::ValueMatch;
    let range = |prefix: &str, length| core::CidrRange {
        address_prefix: prefix.into(),
        prefix_len: number(length),
    };
    let by_ip = |ranges| {
        Custom(
            typed(&input_matchers::ip::v3::Ip {
                cidr_ranges: ranges,
                stat_prefix: "ip".into(),
            })
            .unwrap(),
        )
    };
    let exactly = |text: &str| {
        ValueMatch(xds::StringMatcher {
            match_pattern: Some(xds::string_matcher::MatchPattern::Exact(text.into())),
            ..Default::default()
        })
    };
    let noted = typed(&network_inputs::DynamicMetadataInput {
        filter: "noted".into(),
        path: vec![network_inputs::dynamic_metadata_input::PathSegment {
            segment: Some(network_inputs::dynamic_metadata_input::path_segment::Segment::Key("level".into())),
        }],
    });
    let value_is = |text: &str| {
        Custom(
            typed(&input_matchers::metadata::v3::Metadata {
                value: Some(matcher::ValueMatcher {
                    match_pattern: Some(matcher::value_matcher::MatchPattern::StringMatch(exact(text))),
                }),
                invert: false,
            })
            .unwrap(),
        )
    };
    let named = |type_name: &str, message: &[u8]| TypedExtensionConfig {
        name: "custom".into(),
        typed_config: Some(google::Any {
            type_url: format!("type.googleapis.com/{type_name}"),
            value: message.to_vec(),
        }),
    };
    // A `CelMatcher` whose `expr_match.cel_expr_string` is the text.
    let expression = |text: &str| {
        let inner = [&[0x2a, text.len() as u8][..], text.as_bytes()].concat();
        let message = [&[0x0a, inner.len() as u8][..], &inner].concat();
        Custom(named("xds.type.matcher.v3.CelMatcher", &message))
    };
    let attributes = Some(named("xds.type.matcher.v3.HttpAttributesCelMatchInput", b""));
    let query = typed(&matcher::HttpRequestQueryParamMatchInput {
        query_param: "user".into(),
    });
    let state = typed(&network_inputs::FilterStateInput {
        key: "tenant".into(),
        field: String::new(),
    });
    let source = || typed(&network_inputs::SourceIpInput {});
    let allow = || leads_to("a", Action::Allow);
    let notes = http_filter(
        "envoy.filters.http.set_metadata",
        Some(any(&set_metadata::Config {
            metadata: vec![set_metadata::Metadata {
                metadata_namespace: "noted".into(),
                value: Some(string_struct(&[("level", "high")])),
                ..Default::default()
            }],
            ..Default::default()
        })),
    );
    let objects = super::filter_state::on_requests(vec![super::filter_state::object(
        "tenant",
        "envoy.string",
        "%REQ(x-tenant)%",
    )]);
    let harness = Harness::start();
    let backend = Backend::named("ok").await;
    harness.cluster("c", &[backend.address]).await;
    harness.routes(to_c()).await;
    for (name, one, expected) in [
        (
            "near",
            field_matcher(source(), by_ip(vec![range("127.0.0.0", 8)]), allow()),
            200,
        ),
        (
            "far",
            field_matcher(source(), by_ip(vec![range("10.0.0.0", 8)]), allow()),
            403,
        ),
        (
            "metadata",
            field_matcher(noted.clone(), value_is("high"), allow()),
            200,
        ),
        (
            "other metadata",
            field_matcher(noted, value_is("low"), allow()),
            403,
        ),
        (
            "query",
            field_matcher(query.clone(), exactly("ann b"), allow()),
            200,
        ),
        ("other query", field_matcher(query, exactly("ann"), allow()), 403),
        (
            "state",
            field_matcher(state.clone(), exactly("blue"), allow()),
            200,
        ),
        ("other state", field_matcher(state, exactly("red"), allow()), 403),
        (
            "expression",
            field_matcher(
                attributes.clone(),
                expression("filter_state['tenant'] == b'blue'"),
                allow(),
            ),
            200,
        ),
        (
            "other expression",
            field_matcher(attributes, expression("request.method == 'PUT'"), allow()),
            403,
        ),
    ] {
        let chain = vec![notes.clone(), objects.clone(), by_tree(list_of(vec![one]))];
        let at = harness
            .listen(&manager_with(chain), core::TrafficDirection::Outbound)
            .await;
        let got = get_with(at, "/?q=1&user=ann%20b", &[("x-tenant", "blue")])
            .await
            .0;
        assert_eq!(got, expected, "{name}");
    }
}

#[tokio::test]
async fn the_narrowest_range_of_addresses_decides_and_an_exclusive_one_alone() {
    use rbac::rbac::Action;
    // `IPMatcher.IPRangeMatcher`: ranges, on_match, exclusive.
    let entry = |ranges: &[(&str, u32)], found: &xds::matcher::OnMatch, exclusive: bool| {
        let mut out = Vec::new();
        for (prefix, length) in ranges {
            let range = serin_xds::pb::xds::core::v3::CidrRange {
                address_prefix: (*prefix).into(),
                prefix_len: number(*length),
            };
            prost::encoding::message::encode(1, &range, &mut out);
        }
        prost::encoding::message::encode(2, found, &mut out);
        prost::encoding::bool::encode(3, &exclusive, &mut out);
        out
    };
    let keep = xds::matcher::OnMatch {
        keep_matching: true,
        ..leads_to("keep", Action::Allow)
    };
    let (allow, deny) = (leads_to("a", Action::Allow), leads_to("d", Action::Deny));
    let (harness, _backend, _at) = served(vec![], to_c()).await;
    for (entries, expected) in [
        (
            vec![
                entry(&[("127.0.0.0", 8)], &deny, false),
                entry(&[("10.0.0.0", 8), ("127.0.0.1", 32)], &allow, false),
            ],
            200,
        ),
        (
            vec![
                entry(&[("127.0.0.1", 32)], &keep, false),
                entry(&[("127.0.0.0", 8)], &allow, false),
            ],
            200,
        ),
        (
            vec![
                entry(&[("127.0.0.1", 32)], &keep, true),
                entry(&[("127.0.0.0", 8)], &allow, false),
            ],
            403,
        ),
        (vec![entry(&[("10.0.0.0", 8)], &allow, false)], 403),
    ] {
        let mut message = Vec::new();
        for entry in &entries {
            prost::encoding::bytes::encode(1, entry, &mut message);
        }
        let tree = xds::Matcher {
            matcher_type: Some(xds::matcher::MatcherType::MatcherTree(
                xds::matcher::MatcherTree {
                    input: typed(&network_inputs::SourceIpInput {}),
                    tree_type: Some(xds::matcher::matcher_tree::TreeType::CustomMatch(
                        TypedExtensionConfig {
                            name: "ip".into(),
                            typed_config: Some(google::Any {
                                type_url: "type.googleapis.com/xds.type.matcher.v3.IPMatcher".into(),
                                value: message,
                            }),
                        },
                    )),
                },
            )),
            on_no_match: None,
        };
        let at = harness
            .listen(
                &manager_with(vec![by_tree(tree)]),
                core::TrafficDirection::Outbound,
            )
            .await;
        assert_eq!(get(at, "/").await.0, expected);
    }
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
    let unknown = list_of(vec![field_matcher(
        typed(&network_inputs::SourceIpInput {}),
        Custom(TypedExtensionConfig {
            name: "some.matcher".into(),
            typed_config: None,
        }),
        leads_to("x", Action::Allow),
    )]);
    let manager = manager_with(vec![with(unknown)]);
    let listener = listener_of("l", core::TrafficDirection::Outbound, vec![http_chain(&manager)]);
    let refusal = harness
        .try_put(ResourceType::Listener, "l", &listener)
        .await
        .unwrap();
    assert!(
        refusal.contains("matcher_list.matchers[0].predicate.single_predicate.custom_match")
            && refusal.contains("some.matcher"),
        "{refusal}"
    );
    assert!(
        harness.log.try_recv().is_err(),
        "denials have no flag and are no errors"
    );
}
