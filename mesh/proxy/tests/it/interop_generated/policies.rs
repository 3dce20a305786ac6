//! Policies: what filters answer before, after and instead of routes, and what they make of requests.

use serde_json::{Value, json};

use super::client::Ask;
use super::random::Rng;
use super::{Setup, assert_none, compare_all, differences, requests_each, seeds};
use crate::policies::jwt::Issuer;

const RBAC: &str = "type.googleapis.com/envoy.extensions.filters.http.rbac.v3.RBAC";
const LIMIT: &str = "type.googleapis.com/envoy.extensions.filters.http.local_ratelimit.v3.LocalRateLimit";
const JWT: &str = "type.googleapis.com/envoy.extensions.filters.http.jwt_authn.v3.JwtAuthentication";
const AUTHZ: &str = "type.googleapis.com/envoy.extensions.filters.http.ext_authz.v3.ExtAuthz";
const MUTATION: &str = "type.googleapis.com/envoy.extensions.filters.http.header_mutation.v3.HeaderMutation";

pub(crate) fn filter(name: &str, config: Value) -> Value {
    json!({ "name": name, "typed_config": config })
}

/// Every kind of answer that is not an endpoint's, beside one that is.
pub(crate) fn every_end() -> Value {
    json!({ "virtual_hosts": [
        { "name": "a", "domains": ["a.test"], "routes": [
            { "match": { "prefix": "/forward" }, "route": { "cluster": "a" } },
            { "match": { "prefix": "/redirect" }, "redirect": { "path_redirect": "/to" } },
            { "match": { "prefix": "/direct" }, "direct_response": { "status": 203, "body": { "inline_string": "said" } },
              "response_headers_to_add": [ { "header": { "key": "x-route", "value": "r" } } ] },
            { "match": { "prefix": "/missing" }, "route": { "cluster": "missing" } },
        ], "response_headers_to_add": [ { "header": { "key": "x-host", "value": "h" } } ] },
        { "name": "tls", "domains": ["tls.test"], "require_tls": "ALL", "routes": [
            { "match": { "prefix": "/" }, "route": { "cluster": "a" } } ] },
        { "name": "external", "domains": ["external.test"], "require_tls": "EXTERNAL_ONLY", "routes": [
            { "match": { "prefix": "/" }, "route": { "cluster": "a" } } ] },
    ], "response_headers_to_add": [ { "header": { "key": "x-table", "value": "t" } } ] })
}

pub(crate) fn ask(case: String, host: &str, target: &str, fields: &[(&str, &str)]) -> Ask {
    let mut all = vec![
        ("host".to_owned(), host.to_owned()),
        ("x-case".to_owned(), case.clone()),
    ];
    all.extend(
        fields
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned())),
    );
    Ask {
        case,
        method: "GET",
        target: target.into(),
        fields: all,
        body: String::new(),
        who: 0,
    }
}

fn asks(name: &str, fields: &[&[(&str, &str)]]) -> Vec<Ask> {
    let mut out = Vec::new();
    for (host, target) in [
        ("a.test", "/forward"),
        ("a.test", "/redirect"),
        ("a.test", "/direct"),
        ("a.test", "/missing"),
        ("a.test", "/none"),
        ("none.test", "/"),
        ("tls.test", "/x?q=1"),
        ("external.test", "/x"),
    ] {
        for fields in fields {
            out.push(ask(format!("{name}-{}", out.len()), host, target, fields));
        }
    }
    out
}

fn setup(name: &str, filters: Vec<Value>, asks: Vec<Ask>) -> Setup {
    Setup {
        name: name.into(),
        manager: json!({ "stat_prefix": "p", "server_name": "gate", "http_filters": filters }),
        table: every_end(),
        asks,
        // Of the rules that are enforced nothing is noted (listed).
        more: "%DYNAMIC_METADATA(envoy.filters.http.rbac:shadow_effective_policy_id)% \
               %DYNAMIC_METADATA(envoy.filters.http.rbac:shadow_engine_result)% \
               %DYNAMIC_METADATA(envoy.filters.http.rbac:shadow_shadow_effective_policy_id)% \
               %DYNAMIC_METADATA(envoy.filters.http.rbac:shadow_shadow_engine_result)% \
               %DYNAMIC_METADATA(envoy.filters.http.jwt_authn:payload:sub)%",
        tls: None,
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn filters_see_requests_that_nobody_answers_before_they_get_their_404_as_in_envoy() {
    let header =
        |name: &str, value: &str| json!({ "header": { "name": name, "string_match": { "exact": value } } });
    let rbac = filter(
        "rbac",
        json!({ "@type": RBAC, "rules": { "action": "DENY", "policies": { "no": {
            "permissions": [ header("x-deny", "1") ], "principals": [ { "any": true } ] } } } }),
    );
    let mutation = filter(
        "mutation",
        json!({ "@type": MUTATION, "mutations": {
            "request_mutations": [ { "append": { "header": { "key": "x-q", "value": "%REQ(x-deny)%q" } } } ],
            "response_mutations": [ { "append": { "header": { "key": "x-r", "value": "%RESPONSE_CODE% %ROUTE_NAME%" } } } ] } }),
    );
    let fault = filter(
        "fault",
        json!({ "@type": "type.googleapis.com/envoy.extensions.filters.http.fault.v3.HTTPFault",
            "abort": { "header_abort": {}, "percentage": { "numerator": 100, "denominator": "HUNDRED" } } }),
    );
    let limit = |tokens: u32| {
        filter(
            "limit",
            json!({ "@type": LIMIT, "stat_prefix": "l",
                "token_bucket": { "max_tokens": tokens, "tokens_per_fill": 1, "fill_interval": "3600s" },
                "filter_enabled": { "default_value": { "numerator": 100, "denominator": "HUNDRED" } },
                "filter_enforced": { "default_value": { "numerator": 100, "denominator": "HUNDRED" } },
                "enable_x_ratelimit_headers": "DRAFT_VERSION_03" }),
        )
    };
    let issuer = Issuer::new("one");
    let jwt = filter(
        "jwt",
        json!({ "@type": JWT, "providers": { "me": { "issuer": "me",
            "local_jwks": { "inline_string": issuer.jwks() }, "payload_in_metadata": "payload" } },
            "rules": [ { "match": { "prefix": "/" }, "requires": { "provider_name": "me" } } ] }),
    );
    let token = format!("Bearer {}", issuer.token(&json!({ "iss": "me", "sub": "u" })));
    let authz = filter(
        "authz",
        json!({ "@type": AUTHZ, "http_service": {
            "server_uri": { "uri": "http://b.test", "cluster": "b", "timeout": "5s" },
            "authorization_request": { "allowed_headers": { "patterns": [ { "exact": "x-want" } ] } } } }),
    );
    let plain: &[&[(&str, &str)]] = &[
        &[],
        &[("x-deny", "1")],
        &[("x-envoy-fault-abort-request", "418")],
        &[("content-type", "application/grpc")],
        &[("content-type", "application/grpc"), ("x-deny", "1")],
    ];
    let setups = vec![
        setup(
            "several",
            vec![fault, rbac, mutation.clone()],
            asks("several", plain),
        ),
        setup(
            "limited",
            vec![limit(9), mutation.clone()],
            asks("limited", &[&[], &[]]),
        ),
        setup(
            "jwt",
            vec![jwt, mutation.clone()],
            asks(
                "jwt",
                &[
                    &[],
                    &[("authorization", &token)],
                    &[("authorization", "Bearer a.b.c")],
                    &[("authorization", "Basic x")],
                ],
            ),
        ),
        setup(
            "authz",
            vec![authz, mutation],
            asks("authz", &[&[], &[("x-want", "403")], &[("x-want", "302")]]),
        ),
    ];
    let count = setups.iter().map(|setup| setup.asks.len()).sum();
    if let Some(differences) = differences(setups, Vec::new()).await {
        assert_none(count, &differences);
    }
}

fn text(rng: &mut Rng) -> Value {
    match rng.below(5) {
        0 => json!({ "exact": rng.pick(&["one", "/forward", "a.test"]) }),
        1 => json!({ "prefix": rng.pick(&["o", "/f", "/d", "a"]) }),
        2 => json!({ "suffix": rng.pick(&["e", "t", "d"]), "ignore_case": rng.chance(50) }),
        3 => json!({ "contains": rng.pick(&["n", "r", "TEST"]), "ignore_case": rng.chance(50) }),
        _ => json!({ "safe_regex": { "regex": rng.pick(&["o.*", "/(forward|direct)", ".+"]) } }),
    }
}

fn header(rng: &mut Rng) -> Value {
    let mut out = json!({ "name": rng.pick(&["x-k", "x-m", ":path", ":method", ":authority", "x-absent"]) });
    match rng.below(3) {
        0 => out["present_match"] = json!(rng.chance(70)),
        1 => out["range_match"] = json!({ "start": 1, "end": 6 }),
        _ => out["string_match"] = text(rng),
    }
    if rng.chance(20) {
        out["invert_match"] = json!(true);
    }
    if rng.chance(20) {
        out["treat_missing_header_as_empty"] = json!(true);
    }
    out
}

fn metadata(rng: &mut Rng) -> Value {
    let value = match rng.below(3) {
        0 => json!({ "string_match": { "exact": "v" } }),
        1 => json!({ "present_match": true }),
        _ => {
            json!({ "or_match": { "value_matchers": [ { "double_match": { "exact": 5.0 } }, { "bool_match": true } ] } })
        }
    };
    json!({ "filter": "set", "path": [ { "key": rng.pick(&["s", "n", "b", "none"]) } ], "value": value, "invert": rng.chance(20) })
}

fn permission(rng: &mut Rng, depth: usize) -> Value {
    match rng.below(if depth == 0 { 7 } else { 10 }) {
        0 => json!({ "any": true }),
        1 | 2 => json!({ "header": header(rng) }),
        3 => json!({ "url_path": { "path": text(rng) } }),
        4 => json!({ "metadata": metadata(rng) }),
        5 => {
            json!({ "destination_ip": { "address_prefix": rng.pick(&["127.0.0.0", "10.0.0.0"]), "prefix_len": 8 } })
        }
        6 => json!({ "requested_server_name": { "exact": rng.pick(&["", "x"]) } }),
        7 => json!({ "and_rules": { "rules": rng.some(1, 3, |rng| permission(rng, depth - 1)) } }),
        8 => json!({ "or_rules": { "rules": rng.some(1, 3, |rng| permission(rng, depth - 1)) } }),
        _ => json!({ "not_rule": permission(rng, depth - 1) }),
    }
}

fn principal(rng: &mut Rng, depth: usize) -> Value {
    let range =
        |rng: &mut Rng| json!({ "address_prefix": rng.pick(&["127.0.0.1", "1.2.3.0"]), "prefix_len": 24 });
    match rng.below(if depth == 0 { 8 } else { 11 }) {
        0 => json!({ "any": true }),
        1 | 2 => json!({ "header": header(rng) }),
        3 => json!({ "url_path": { "path": text(rng) } }),
        4 => json!({ "metadata": metadata(rng) }),
        5 => json!({ "direct_remote_ip": range(rng) }),
        6 => json!({ "remote_ip": range(rng) }),
        7 => json!({ "authenticated": {} }),
        8 => json!({ "and_ids": { "ids": rng.some(1, 3, |rng| principal(rng, depth - 1)) } }),
        9 => json!({ "or_ids": { "ids": rng.some(1, 3, |rng| principal(rng, depth - 1)) } }),
        _ => json!({ "not_id": principal(rng, depth - 1) }),
    }
}

fn rules(rng: &mut Rng) -> Value {
    let mut policies = serde_json::Map::new();
    for name in ["first", "second", "third"].into_iter().take(1 + rng.below(3)) {
        let policy = json!({
            "permissions": rng.some(1, 2, |rng| permission(rng, 2)),
            "principals": rng.some(1, 2, |rng| principal(rng, 2)),
        });
        policies.insert(name.into(), policy);
    }
    json!({ "action": rng.pick(&["ALLOW", "DENY", "DENY", "LOG"]), "policies": policies })
}

fn generated(seed: u64, each: usize) -> Setup {
    let mut rng = Rng::new(seed);
    let mut rbac = json!({ "@type": RBAC, "rules": rules(&mut rng) });
    if rng.chance(40) {
        rbac["shadow_rules"] = rules(&mut rng);
        if rng.chance(50) {
            rbac["shadow_rules_stat_prefix"] = json!("shadow_");
        }
    }
    let set = json!({
        "@type": "type.googleapis.com/envoy.extensions.filters.http.set_metadata.v3.Config",
        "metadata": [ { "metadata_namespace": "set", "value": { "s": "v", "n": 5, "b": true } } ],
    });
    let buffer = json!({ "@type": "type.googleapis.com/envoy.extensions.filters.http.buffer.v3.Buffer",
        "max_request_bytes": 64 });
    let compressor = json!({
        "@type": "type.googleapis.com/envoy.extensions.filters.http.compressor.v3.Compressor",
        "response_direction_config": { "common_config": { "min_content_length": rng.pick(&[30, 5000]),
            "content_type": ["text/x-echo"] } },
        "compressor_library": { "name": "gzip", "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.compression.gzip.compressor.v3.Gzip" } },
    });
    let mut out = setup(
        &format!("policies-{seed}"),
        vec![
            filter("compressor", compressor),
            filter("set", set),
            filter("rbac", rbac),
            filter("buffer", buffer),
        ],
        Vec::new(),
    );
    if rng.chance(50) {
        out.manager["use_remote_address"] = json!(true);
    }
    let fields = [
        ("x-k", "one"),
        ("x-k", "5"),
        ("x-k", "ONE"),
        ("x-k", ""),
        ("x-m", "one"),
        ("x-m", "o,e"),
        ("x-forwarded-for", "1.2.3.4"),
        ("x-forwarded-for", "1.2.3.4, 5.6.7.8"),
        ("accept-encoding", "gzip"),
        ("accept-encoding", "gzip;q=0, *"),
        ("accept-encoding", "br, identity"),
        ("accept-encoding", "*;q=0.5"),
    ];
    for number in 0..each {
        let (host, target) = rng.pick(&[
            ("a.test", "/forward"),
            ("a.test", "/forward/x?q=1"),
            ("a.test", "/direct"),
            ("a.test", "/redirect"),
            ("none.test", "/"),
        ]);
        let some = rng.some(0, 3, |rng| rng.pick(&fields));
        let mut one = ask(format!("p{seed}-{number}"), host, target, &some);
        // Several would be one in Envoy, which hands them on as one.
        let mut seen = false;
        one.fields
            .retain(|(name, _)| name != "accept-encoding" || !std::mem::replace(&mut seen, true));
        let mut seen = false;
        one.fields
            .retain(|(name, _)| name != "x-forwarded-for" || !std::mem::replace(&mut seen, true));
        if rng.chance(30) {
            one.method = "POST";
            one.body = "x".repeat(rng.pick(&[1, 64, 65, 200]));
        }
        out.asks.push(one);
    }
    out
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn generated_policies_judge_generated_requests_as_envoy_does() {
    let each = requests_each(40);
    let found = compare_all(seeds(0..20, &[]), |seed| generated(seed, each), &[]).await;
    if let Some((count, differences)) = found {
        assert_none(count, &differences);
    }
}
