use http::HeaderMap;
use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::envoy::config::route::v3 as route;
use serin_xds::pb::envoy::r#type::matcher::v3 as matcher;
use serin_xds::pb::google::protobuf::UInt32Value;

use serin_xds::pb::envoy::extensions::path::r#match::uri_template::v3 as template;
use serin_xds::pb::envoy::extensions::rbac::principals::mtls_authenticated::v3 as mtls_authenticated;
use serin_xds::pb::envoy::extensions::transport_sockets::tls::v3 as tls;

use super::principal::PEER_PRINCIPAL;
use super::rules::denial_details;
use super::*;
use crate::config::matchers::RequestView;
use crate::policy::facts::PeerIdentity;
use crate::policy::metadata::{Metadata, text};

fn cidr(address: &str, length: u32) -> core::CidrRange {
    core::CidrRange {
        address_prefix: address.into(),
        prefix_len: Some(UInt32Value { value: length }),
    }
}

fn exact(text: &str) -> matcher::StringMatcher {
    matcher::StringMatcher {
        match_pattern: Some(matcher::string_matcher::MatchPattern::Exact(text.into())),
        ..Default::default()
    }
}

fn path(text: &str) -> matcher::PathMatcher {
    matcher::PathMatcher {
        rule: Some(matcher::path_matcher::Rule::Path(exact(text))),
    }
}

fn header(name: &str, value: &str) -> route::HeaderMatcher {
    route::HeaderMatcher {
        name: name.into(),
        header_match_specifier: Some(route::header_matcher::HeaderMatchSpecifier::ExactMatch(
            value.into(),
        )),
        ..Default::default()
    }
}

fn permission(rule: rbac::permission::Rule) -> rbac::Permission {
    rbac::Permission { rule: Some(rule) }
}

fn principal(identifier: rbac::principal::Identifier) -> rbac::Principal {
    rbac::Principal {
        identifier: Some(identifier),
    }
}

fn any_permission() -> rbac::Permission {
    permission(rbac::permission::Rule::Any(true))
}

fn any_principal() -> rbac::Principal {
    principal(rbac::principal::Identifier::Any(true))
}

fn policy(permissions: Vec<rbac::Permission>, principals: Vec<rbac::Principal>) -> rbac::Policy {
    rbac::Policy {
        permissions,
        principals,
        ..Default::default()
    }
}

fn engine(action: rbac::rbac::Action, policies: Vec<(&str, rbac::Policy)>) -> Engine {
    Engine::compile(&rbac::Rbac {
        action: action as i32,
        policies: policies
            .into_iter()
            .map(|(name, policy)| (name.to_owned(), policy))
            .collect(),
        ..Default::default()
    })
    .unwrap()
}

struct World {
    headers: HeaderMap,
    metadata: Metadata,
    uri_sans: Vec<Box<str>>,
    dns_sans: Vec<Box<str>>,
}

impl World {
    fn new() -> Self {
        let mut headers = HeaderMap::new();
        headers.insert("x-user", "bob".parse().unwrap());
        let mut metadata = Metadata::default();
        metadata.set("jwt", "sub", text("bob"));
        Self {
            headers,
            metadata,
            uri_sans: vec!["spiffe://td/ns/a/sa/b".into()],
            dns_sans: vec!["b.a".into()],
        }
    }

    fn facts(&self) -> Facts<'_> {
        Facts {
            direct_remote: "10.0.0.1:5000".parse().unwrap(),
            source: "10.0.0.1:5000".parse().unwrap(),
            local: "10.1.0.2:8080".parse().unwrap(),
            server_name: Some("shop.example"),
            peer: Some(PeerIdentity {
                uri_sans: &self.uri_sans,
                dns_sans: &self.dns_sans,
                subject: "CN=b",
            }),
            request: Some(RequestView {
                method: "GET",
                path: "/a/b",
                query: Some("q=1"),
                authority: Some("shop.example"),
                scheme: Some("https"),
                headers: &self.headers,
            }),
            remote: "9.9.9.9:0".parse().unwrap(),
            metadata: &self.metadata,
        }
    }
}

fn sub_is(value: &str) -> matcher::MetadataMatcher {
    matcher::MetadataMatcher {
        filter: "jwt".into(),
        path: vec![matcher::metadata_matcher::PathSegment {
            segment: Some(matcher::metadata_matcher::path_segment::Segment::Key(
                "sub".into(),
            )),
        }],
        value: Some(matcher::ValueMatcher {
            match_pattern: Some(matcher::value_matcher::MatchPattern::StringMatch(exact(value))),
        }),
        invert: false,
    }
}

#[test]
fn every_permission_is_decided_as_envoy_decides_it() {
    use rbac::permission::{Rule, Set};
    let world = World::new();
    let range =
        |start, end| Rule::DestinationPortRange(serin_xds::pb::envoy::r#type::v3::Int32Range { start, end });
    let set = |rules: Vec<Rule>| Set {
        rules: rules.into_iter().map(permission).collect(),
    };
    let template = |text: &str| {
        Rule::UriTemplate(core::TypedExtensionConfig {
            name: "t".into(),
            typed_config: Some(serin_xds::pb::google::protobuf::Any {
                type_url:
                    "type.googleapis.com/envoy.extensions.path.match.uri_template.v3.UriTemplateMatchConfig"
                        .into(),
                value: prost::Message::encode_to_vec(&template::UriTemplateMatchConfig {
                    path_template: text.into(),
                }),
            }),
        })
    };
    let cases = [
        ("any", Rule::Any(true), true),
        ("path", Rule::UrlPath(path("/a/b")), true),
        ("path with query", Rule::UrlPath(path("/a/b?q=1")), false),
        ("header", Rule::Header(header("x-user", "bob")), true),
        ("method", Rule::Header(header(":method", "POST")), false),
        ("destination ip", Rule::DestinationIp(cidr("10.1.0.0", 16)), true),
        ("other ip", Rule::DestinationIp(cidr("10.2.0.0", 16)), false),
        ("port", Rule::DestinationPort(8080), true),
        ("other port", Rule::DestinationPort(80), false),
        ("port range", range(8080, 8081), true),
        ("end of port range", range(80, 8080), false),
        (
            "server name",
            Rule::RequestedServerName(exact("shop.example")),
            true,
        ),
        ("metadata", Rule::Metadata(sub_is("bob")), true),
        ("metadata of another", Rule::Metadata(sub_is("eve")), false),
        ("template", template("/a/*"), true),
        ("other template", template("/*"), false),
        (
            "and",
            Rule::AndRules(set(vec![Rule::Any(true), Rule::DestinationPort(80)])),
            false,
        ),
        (
            "or",
            Rule::OrRules(set(vec![Rule::DestinationPort(80), Rule::Any(true)])),
            true,
        ),
        (
            "not",
            Rule::NotRule(Box::new(permission(Rule::DestinationPort(80)))),
            true,
        ),
    ];
    for (name, rule, expected) in cases {
        let engine = engine(
            rbac::rbac::Action::Allow,
            vec![("p", policy(vec![permission(rule)], vec![any_principal()]))],
        );
        assert_eq!(engine.judge(&world.facts()).allowed, expected, "{name}");
    }
}

#[test]
fn every_principal_is_decided_as_envoy_decides_it() {
    use rbac::principal::{Authenticated, Identifier, Set};
    let world = World::new();
    let named = |name: &str| {
        Identifier::Authenticated(Authenticated {
            principal_name: Some(exact(name)),
        })
    };
    let set = |ids: Vec<Identifier>| Set {
        ids: ids.into_iter().map(principal).collect(),
    };
    let state = Identifier::FilterState(matcher::FilterStateMatcher {
        key: PEER_PRINCIPAL.into(),
        matcher: Some(matcher::filter_state_matcher::Matcher::StringMatch(exact(
            "spiffe://td/ns/a/sa/b",
        ))),
    });
    let mutual = |san: Option<(i32, &str)>| {
        let message = mtls_authenticated::Config {
            san_matcher: san.map(|(kind, name)| tls::SubjectAltNameMatcher {
                san_type: kind,
                matcher: Some(exact(name)),
                ..Default::default()
            }),
            any_validated_client_certificate: san.is_none(),
        };
        Identifier::Custom(core::TypedExtensionConfig {
            name: "mtls".into(),
            typed_config: Some(serin_xds::pb::google::protobuf::Any {
                type_url: "type.googleapis.com/envoy.extensions.rbac.principals.mtls_authenticated.v3.Config"
                    .into(),
                value: prost::Message::encode_to_vec(&message),
            }),
        })
    };
    let cases = [
        ("any", Identifier::Any(true), true),
        ("mutual TLS", mutual(None), true),
        (
            "mutual TLS by URI",
            mutual(Some((3, "spiffe://td/ns/a/sa/b"))),
            true,
        ),
        (
            "mutual TLS by another URI",
            mutual(Some((3, "spiffe://td/ns/a/sa/c"))),
            false,
        ),
        // Unlike `authenticated`, each kind of name counts by itself.
        ("mutual TLS by a DNS name", mutual(Some((2, "b.a"))), true),
        ("identity", named("spiffe://td/ns/a/sa/b"), true),
        ("a DNS name where there is a URI", named("b.a"), false),
        (
            "anybody with a certificate",
            Identifier::Authenticated(Authenticated { principal_name: None }),
            true,
        ),
        ("source ip", Identifier::SourceIp(cidr("10.0.0.1", 32)), true),
        (
            "direct remote ip",
            Identifier::DirectRemoteIp(cidr("9.9.9.9", 32)),
            false,
        ),
        ("remote ip", Identifier::RemoteIp(cidr("9.9.9.9", 32)), true),
        ("header", Identifier::Header(header("x-user", "eve")), false),
        ("path", Identifier::UrlPath(path("/a/b")), true),
        ("metadata", Identifier::Metadata(sub_is("bob")), true),
        ("filter state", state, true),
        (
            "and",
            Identifier::AndIds(set(vec![Identifier::Any(true), named("x")])),
            false,
        ),
        (
            "or",
            Identifier::OrIds(set(vec![named("x"), Identifier::Any(true)])),
            true,
        ),
        ("not", Identifier::NotId(Box::new(principal(named("x")))), true),
    ];
    for (name, identifier, expected) in cases {
        let engine = engine(
            rbac::rbac::Action::Allow,
            vec![("p", policy(vec![any_permission()], vec![principal(identifier)]))],
        );
        assert_eq!(engine.judge(&world.facts()).allowed, expected, "{name}");
    }
    let mut plain = world.facts();
    plain.peer = None;
    let anybody = Identifier::Authenticated(Authenticated { principal_name: None });
    let engine = engine(
        rbac::rbac::Action::Allow,
        vec![("p", policy(vec![any_permission()], vec![principal(anybody)]))],
    );
    assert!(
        !engine.judge(&plain).allowed,
        "nobody is authenticated without a certificate"
    );
}

#[test]
fn allow_without_policies_denies_all_and_deny_without_policies_denies_none() {
    let world = World::new();
    let judge = |action| engine(action, Vec::new()).judge(&world.facts()).allowed;
    assert!(!judge(rbac::rbac::Action::Allow));
    assert!(judge(rbac::rbac::Action::Deny));
    assert!(judge(rbac::rbac::Action::Log));
}

#[test]
fn the_first_policy_by_name_is_the_one_that_is_named() {
    let world = World::new();
    let all = || policy(vec![any_permission()], vec![any_principal()]);
    let decision = engine(rbac::rbac::Action::Deny, vec![("b", all()), ("a x", all())]).judge(&world.facts());
    assert_eq!(decision.policy.as_deref(), Some("a x"));
    assert_eq!(
        denial_details(decision.policy.as_deref()),
        "rbac_access_denied_matched_policy[a_x]"
    );
}

#[test]
fn what_rbac_cannot_judge_is_refused_by_name() {
    let refused = |permission: rbac::Permission, principal: rbac::Principal| {
        let message = rbac::Rbac {
            policies: [("p".to_owned(), policy(vec![permission], vec![principal]))].into(),
            ..Default::default()
        };
        Engine::compile(&message).unwrap_err().to_string()
    };
    let extension = core::TypedExtensionConfig {
        name: "some.matcher".into(),
        typed_config: None,
    };
    let error = refused(
        permission(rbac::permission::Rule::Matcher(extension)),
        any_principal(),
    );
    assert!(
        error.contains("policies[\"p\"].permissions[0].matcher") && error.contains("some.matcher"),
        "{error}"
    );
    let state = principal(rbac::principal::Identifier::FilterState(
        matcher::FilterStateMatcher {
            key: "other".into(),
            ..Default::default()
        },
    ));
    let error = refused(any_permission(), state);
    assert!(error.contains("principals[0].filter_state"), "{error}");
}
