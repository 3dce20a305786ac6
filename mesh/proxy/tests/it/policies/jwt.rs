//! JWT authentication.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use aws_lc_rs::signature::{self, KeyPair};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use http::Response;
use serde_json::{Value, json};
use serin_xds::pb::envoy::config::rbac::v3 as rbac;
use serin_xds::pb::envoy::extensions::filters::http::{jwt_authn::v3 as jwt, rbac::v3 as http_rbac};

use super::*;

pub(crate) struct Issuer {
    pair: signature::EcdsaKeyPair,
    id: &'static str,
}

impl Issuer {
    pub(crate) fn new(id: &'static str) -> Self {
        Self {
            pair: signature::EcdsaKeyPair::generate(&signature::ECDSA_P256_SHA256_FIXED_SIGNING).unwrap(),
            id,
        }
    }

    pub(crate) fn jwks(&self) -> String {
        let point = self.pair.public_key().as_ref();
        let x = URL_SAFE_NO_PAD.encode(&point[1..33]);
        let y = URL_SAFE_NO_PAD.encode(&point[33..]);
        json!({"keys": [{"kty": "EC", "crv": "P-256", "kid": self.id, "x": x, "y": y}]}).to_string()
    }

    pub(crate) fn token(&self, claims: &Value) -> String {
        let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
        let message = format!(
            "{}.{}",
            part(&json!({"alg": "ES256", "kid": self.id})),
            part(claims)
        );
        let random = aws_lc_rs::rand::SystemRandom::new();
        let signature = self.pair.sign(&random, message.as_bytes()).unwrap();
        format!("{message}.{}", URL_SAFE_NO_PAD.encode(signature.as_ref()))
    }
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()
}

fn local(issuer: &Issuer) -> jwt::JwtProvider {
    jwt::JwtProvider {
        issuer: "me".into(),
        payload_in_metadata: "payload".into(),
        claim_to_headers: vec![jwt::JwtClaimToHeader {
            header_name: "x-sub".into(),
            claim_name: "sub".into(),
            ..Default::default()
        }],
        jwks_source_specifier: Some(jwt::jwt_provider::JwksSourceSpecifier::LocalJwks(
            core::DataSource {
                specifier: Some(core::data_source::Specifier::InlineString(issuer.jwks())),
                ..Default::default()
            },
        )),
        ..Default::default()
    }
}

fn needs(kind: jwt::jwt_requirement::RequiresType) -> jwt::JwtRequirement {
    jwt::JwtRequirement {
        requires_type: Some(kind),
    }
}

fn provider_named(name: &str) -> jwt::JwtRequirement {
    needs(jwt::jwt_requirement::RequiresType::ProviderName(name.into()))
}

fn rule(prefix: &str, requirement: Option<jwt::JwtRequirement>) -> jwt::RequirementRule {
    jwt::RequirementRule {
        r#match: Some(route::RouteMatch {
            path_specifier: Some(route::route_match::PathSpecifier::Prefix(prefix.into())),
            ..Default::default()
        }),
        requirement_type: requirement.map(jwt::requirement_rule::RequirementType::Requires),
    }
}

fn filter(provider: jwt::JwtProvider, rules: Vec<jwt::RequirementRule>) -> hcm::HttpFilter {
    http_filter(
        "envoy.filters.http.jwt_authn",
        Some(any(&jwt::JwtAuthentication {
            providers: [("p".to_owned(), provider)].into(),
            rules,
            bypass_cors_preflight: true,
            ..Default::default()
        })),
    )
}

#[tokio::test]
async fn what_the_filter_state_says_chooses_what_a_request_must_bring() {
    let issuer = Issuer::new("one");
    let mut by_state = jwt::JwtAuthentication {
        providers: [("p".to_owned(), local(&issuer))].into(),
        rules: vec![rule("/open", None)],
        filter_state_rules: Some(jwt::FilterStateRule {
            name: "wants".into(),
            requires: [("token".to_owned(), provider_named("p"))].into(),
        }),
        ..Default::default()
    };
    let of =
        |message: &jwt::JwtAuthentication| http_filter("envoy.filters.http.jwt_authn", Some(any(message)));
    let state = || {
        super::filter_state::on_requests(vec![super::filter_state::object(
            "wants",
            "envoy.string",
            "%REQ(x-wants)%",
        )])
    };
    let (harness, _backend, at) = served(vec![state(), of(&by_state)], to_c()).await;
    let token = issuer.token(&json!({"iss": "me", "exp": now() + 60}));
    let wants = ("x-wants", "token");
    assert_eq!(get_with(at, "/", &[wants]).await.0, 401);
    assert_eq!(
        get_with(at, "/open", &[wants]).await.0,
        200,
        "a rule counts first"
    );
    assert_eq!(get_with(at, "/", &[("x-wants", "nothing")]).await.0, 200);
    assert_eq!(get(at, "/").await.0, 200);
    let bearer = format!("Bearer {token}");
    assert_eq!(
        get_with(at, "/", &[wants, ("authorization", &bearer)]).await.0,
        200
    );
    // Rules may look at the state as well.
    let mut on_state = rule("/", Some(provider_named("p")));
    on_state.r#match.as_mut().unwrap().filter_state = vec![matcher::FilterStateMatcher {
        key: "wants".into(),
        matcher: Some(matcher::filter_state_matcher::Matcher::StringMatch(exact(
            "token",
        ))),
    }];
    by_state.rules = vec![on_state];
    by_state.filter_state_rules = None;
    let manager = manager_with(vec![state(), of(&by_state)]);
    let at = harness.listen(&manager, core::TrafficDirection::Outbound).await;
    assert_eq!(get_with(at, "/", &[wants]).await.0, 401);
    assert_eq!(get(at, "/").await.0, 200);
}

async fn with_token(at: SocketAddr, path: &str, token: &str) -> (u16, HeaderMap, String) {
    get_with(
        at,
        path,
        &[("authorization", &format!("Bearer {token}")), ("x-sub", "forged")],
    )
    .await
}

#[tokio::test]
async fn requests_need_a_good_token_where_the_rules_say_so() {
    let issuer = Issuer::new("k");
    let optional = needs(jwt::jwt_requirement::RequiresType::RequiresAny(
        jwt::JwtRequirementOrList {
            requirements: vec![
                provider_named("p"),
                needs(jwt::jwt_requirement::RequiresType::AllowMissing(google::Empty {})),
            ],
        },
    ));
    let lenient = needs(jwt::jwt_requirement::RequiresType::AllowMissingOrFailed(
        google::Empty {},
    ));
    let rules = vec![
        rule("/open", None),
        rule("/optional", Some(optional)),
        rule("/lenient", Some(lenient)),
        rule("/", Some(provider_named("p"))),
    ];
    let (mut harness, mut backend, at) = served(vec![filter(local(&issuer), rules)], to_c()).await;
    let good = issuer.token(&json!({"iss": "me", "sub": "bob", "exp": now() + 600}));
    let expired = issuer.token(&json!({"iss": "me", "exp": now() - 600}));
    let foreign = Issuer::new("k").token(&json!({"iss": "me", "sub": "bob"}));
    let stranger = issuer.token(&json!({"iss": "nobody", "sub": "bob"}));

    let (status, headers, body) = get(at, "/x").await;
    assert_eq!((status, &*body), (401, "Jwt is missing"));
    assert_eq!(headers["www-authenticate"], "Bearer realm=\"http://reviews/x\"");
    assert!(
        harness.log.try_recv().is_err(),
        "a 401 is the client's error, not ours"
    );
    assert_eq!(with_token(at, "/x", &good).await.0, 200);
    let seen = backend.next().await;
    assert_eq!(seen.headers["x-sub"], "bob");
    assert!(
        !seen.headers.contains_key("authorization"),
        "not forwarded unless told so"
    );
    for (token, text) in [(&expired, "Jwt is expired"), (&foreign, "Jwt verification fails")] {
        let (status, headers, body) = with_token(at, "/x", token).await;
        assert_eq!((status, &*body), (401, text));
        assert!(
            headers["www-authenticate"]
                .to_str()
                .unwrap()
                .ends_with("error=\"invalid_token\"")
        );
    }
    for (path, token, expected) in [
        ("/open", "", 200),
        ("/optional", "", 200),
        ("/optional", &good, 200),
        ("/optional", &expired, 401),
        ("/optional", &stranger, 401),
        ("/lenient", &expired, 200),
        ("/lenient", &stranger, 200),
    ] {
        let status = if token.is_empty() {
            get_with(at, path, &[("x-sub", "forged")]).await.0
        } else {
            with_token(at, path, token).await.0
        };
        assert_eq!(status, expected, "{path}");
        if status == 200 {
            let seen = backend.next().await;
            assert_ne!(
                seen.headers.get("x-sub").map(|value| value.as_bytes()),
                Some(&b"forged"[..]),
                "{path}"
            );
        }
    }
    let preflight = http::Request::options("/x")
        .header("host", "a")
        .header("origin", "https://a")
        .header("access-control-request-method", "GET")
        .body(Full::from(""))
        .unwrap();
    assert_eq!(send(at, preflight).await.0, 200);
}

#[tokio::test]
async fn claims_decide_in_rbac() {
    let issuer = Issuer::new("k");
    let path = ["payload", "groups"].map(|key| matcher::metadata_matcher::PathSegment {
        segment: Some(matcher::metadata_matcher::path_segment::Segment::Key(key.into())),
    });
    let in_group = matcher::MetadataMatcher {
        filter: "envoy.filters.http.jwt_authn".into(),
        path: path.to_vec(),
        value: Some(matcher::ValueMatcher {
            match_pattern: Some(matcher::value_matcher::MatchPattern::ListMatch(Box::new(
                matcher::ListMatcher {
                    match_pattern: Some(matcher::list_matcher::MatchPattern::OneOf(Box::new(
                        matcher::ValueMatcher {
                            match_pattern: Some(matcher::value_matcher::MatchPattern::StringMatch(exact(
                                "admins",
                            ))),
                        },
                    ))),
                },
            ))),
        }),
        invert: false,
    };
    let allow = rbac::Rbac {
        policies: [(
            "p".to_owned(),
            rbac::Policy {
                permissions: vec![rbac::Permission {
                    rule: Some(rbac::permission::Rule::Any(true)),
                }],
                principals: vec![rbac::Principal {
                    identifier: Some(rbac::principal::Identifier::Metadata(in_group)),
                }],
                ..Default::default()
            },
        )]
        .into(),
        ..Default::default()
    };
    let judge = http_filter(
        "envoy.filters.http.rbac",
        Some(any(&http_rbac::Rbac {
            rules: Some(allow),
            ..Default::default()
        })),
    );
    let authenticate = filter(local(&issuer), vec![rule("/", Some(provider_named("p")))]);
    let (_harness, _backend, at) = served(vec![authenticate, judge], to_c()).await;
    let token = |groups: &[&str]| issuer.token(&json!({"iss": "me", "groups": groups}));
    assert_eq!(with_token(at, "/", &token(&["users", "admins"])).await.0, 200);
    assert_eq!(with_token(at, "/", &token(&["users"])).await.0, 403);
}

#[tokio::test]
async fn claims_can_choose_the_route() {
    let issuer = Issuer::new("k");
    let mut provider = local(&issuer);
    provider.clear_route_cache = true;
    let mut bobs = prefix_route("/", to_cluster("d"));
    bobs.r#match.as_mut().unwrap().headers = vec![route::HeaderMatcher {
        name: "x-sub".into(),
        header_match_specifier: Some(route::header_matcher::HeaderMatchSpecifier::ExactMatch(
            "bob".into(),
        )),
        ..Default::default()
    }];
    let hosts = vec![host("all", "*", vec![bobs, prefix_route("/", to_cluster("c"))])];
    let (harness, _backend, at) = served(
        vec![filter(provider, vec![rule("/", Some(provider_named("p")))])],
        hosts,
    )
    .await;
    let other = Backend::named("bobs").await;
    harness.cluster("d", &[other.address]).await;
    let token = |sub: &str| issuer.token(&json!({"iss": "me", "sub": sub}));
    assert_eq!(with_token(at, "/", &token("bob")).await.2, "bobs");
    assert_eq!(with_token(at, "/", &token("eve")).await.2, "ok");
}

#[tokio::test]
async fn metadata_of_a_filter_can_choose_the_route() {
    let issuer = Issuer::new("k");
    // The claims are in the metadata below `payload`.
    let mut provider = local(&issuer);
    provider.clear_route_cache = true;
    let key = |name: &str| matcher::metadata_matcher::PathSegment {
        segment: Some(matcher::metadata_matcher::path_segment::Segment::Key(name.into())),
    };
    let mut bobs = prefix_route("/", to_cluster("d"));
    bobs.r#match.as_mut().unwrap().dynamic_metadata = vec![matcher::MetadataMatcher {
        filter: "envoy.filters.http.jwt_authn".into(),
        path: vec![key("payload"), key("sub")],
        value: Some(matcher::ValueMatcher {
            match_pattern: Some(matcher::value_matcher::MatchPattern::StringMatch(exact("bob"))),
        }),
        invert: false,
    }];
    let hosts = vec![host("all", "*", vec![bobs, prefix_route("/", to_cluster("c"))])];
    let authenticate = filter(provider, vec![rule("/", Some(provider_named("p")))]);
    let (harness, _backend, at) = served(vec![authenticate], hosts).await;
    let other = Backend::named("bobs").await;
    harness.cluster("d", &[other.address]).await;
    let token = |sub: &str| issuer.token(&json!({"iss": "me", "sub": sub}));
    assert_eq!(with_token(at, "/", &token("bob")).await.2, "bobs");
    assert_eq!(with_token(at, "/", &token("eve")).await.2, "ok");
}

#[tokio::test]
async fn remote_keys_are_fetched_once_and_a_failed_fetch_denies() {
    let issuer = Arc::new(Issuer::new("k"));
    let mut provider = local(&issuer);
    provider.jwks_source_specifier = Some(jwt::jwt_provider::JwksSourceSpecifier::RemoteJwks(
        jwt::RemoteJwks {
            http_uri: Some(core::HttpUri {
                uri: "http://issuer.example/keys".into(),
                timeout: millis(5000),
                http_upstream_type: Some(core::http_uri::HttpUpstreamType::Cluster("svc".into())),
            }),
            ..Default::default()
        },
    ));
    let filters = vec![filter(provider, vec![rule("/", Some(provider_named("p")))])];
    let (harness, _backend, at) = served(filters.clone(), to_c()).await;
    let good = issuer.token(&json!({"iss": "me", "sub": "bob"}));
    let (status, _, body) = with_token(at, "/", &good).await;
    assert_eq!((status, &*body), (401, "Jwks remote fetch is failed"));

    let up = Arc::new(AtomicBool::new(true));
    let (keys, serving) = (issuer.jwks(), up.clone());
    let mut service = Backend::answering(move |_| {
        if serving.load(Ordering::SeqCst) {
            Response::new(Full::from(keys.clone()))
        } else {
            crate::fixture::status(500)
        }
    })
    .await;
    harness.cluster("svc", &[service.address]).await;
    // A new configuration has not failed yet.
    let at = harness
        .listen(&manager_with(filters), core::TrafficDirection::Outbound)
        .await;
    let all = futures::future::join_all((0..5).map(|_| with_token(at, "/", &good))).await;
    assert!(all.iter().all(|(status, ..)| *status == 200), "{all:?}");
    let asked = service.next().await;
    assert_eq!(
        (&*asked.path, asked.headers["host"].as_bytes()),
        ("/keys", &b"issuer.example"[..])
    );
    assert_eq!(service.hits(), 1, "fetched once for all");
    up.store(false, Ordering::SeqCst);
    assert_eq!(with_token(at, "/", &good).await.0, 200, "kept");
}

#[tokio::test]
async fn keys_are_fetched_before_any_request_where_the_provider_says_so_and_tried_again() {
    let issuer = Arc::new(Issuer::new("k"));
    let mut provider = local(&issuer);
    provider.jwks_source_specifier = Some(jwt::jwt_provider::JwksSourceSpecifier::RemoteJwks(
        jwt::RemoteJwks {
            http_uri: Some(core::HttpUri {
                uri: "http://issuer.example/keys".into(),
                timeout: millis(5000),
                http_upstream_type: Some(core::http_uri::HttpUpstreamType::Cluster("svc".into())),
            }),
            async_fetch: Some(jwt::JwksAsyncFetch::default()),
            retry_policy: Some(core::RetryPolicy {
                num_retries: number(2),
                retry_back_off: Some(core::BackoffStrategy {
                    base_interval: millis(1),
                    max_interval: millis(2),
                }),
                ..Default::default()
            }),
            ..Default::default()
        },
    ));
    let keys = issuer.jwks();
    let asked = std::sync::atomic::AtomicUsize::new(0);
    let mut service = Backend::answering(move |_| match asked.fetch_add(1, Ordering::SeqCst) {
        0 | 1 => crate::fixture::status(500),
        _ => Response::new(Full::from(keys.clone())),
    })
    .await;
    let harness = Harness::start();
    let backend = Backend::named("ok").await;
    harness.cluster("c", &[backend.address]).await;
    harness.cluster("svc", &[service.address]).await;
    harness.routes(to_c()).await;
    let filters = vec![filter(provider, vec![rule("/", Some(provider_named("p")))])];
    let at = harness
        .listen(&manager_with(filters), core::TrafficDirection::Outbound)
        .await;
    // Nobody has asked for anything yet.
    for _ in 0..3 {
        service.next().await;
    }
    let good = issuer.token(&json!({"iss": "me", "sub": "bob"}));
    assert_eq!(with_token(at, "/", &good).await.0, 200);
    assert_eq!(service.hits(), 3);
}

#[tokio::test]
async fn a_route_asks_for_another_requirement_or_none() {
    let issuer = Issuer::new("k");
    let per_route = |specifier| {
        [(
            "envoy.filters.http.jwt_authn".to_owned(),
            any(&jwt::PerRouteConfig {
                requirement_specifier: Some(specifier),
            }),
        )]
    };
    let mut free = prefix_route("/free", to_cluster("c"));
    free.typed_per_filter_config =
        per_route(jwt::per_route_config::RequirementSpecifier::Disabled(true)).into();
    let mut named = prefix_route("/named", to_cluster("c"));
    named.typed_per_filter_config = per_route(jwt::per_route_config::RequirementSpecifier::RequirementName(
        "strict".into(),
    ))
    .into();
    let mut unknown = prefix_route("/unknown", to_cluster("c"));
    unknown.typed_per_filter_config = per_route(
        jwt::per_route_config::RequirementSpecifier::RequirementName("none".into()),
    )
    .into();
    let hosts = vec![host(
        "all",
        "*",
        vec![free, named, unknown, prefix_route("/", to_cluster("c"))],
    )];
    let filter = http_filter(
        "envoy.filters.http.jwt_authn",
        Some(any(&jwt::JwtAuthentication {
            providers: [("p".to_owned(), local(&issuer))].into(),
            rules: vec![rule("/free", Some(provider_named("p")))],
            requirement_map: [("strict".to_owned(), provider_named("p"))].into(),
            ..Default::default()
        })),
    );
    let (_harness, _backend, at) = served(vec![filter], hosts).await;
    for (path, expected) in [("/free", 200), ("/named", 401), ("/unknown", 403), ("/", 200)] {
        assert_eq!(get(at, path).await.0, expected, "{path}");
    }
}
