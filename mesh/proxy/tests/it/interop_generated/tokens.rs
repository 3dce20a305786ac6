//! Tokens: which requirements (`provider_name`, any, all, missing, missing or failed) let which requests pass, and what
//! endpoints are told of them, also of several tokens in one request. Each provider has an issuer, since among several without
//! one Envoy takes any.

use std::collections::BTreeMap;
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use super::policies::{ask, every_end, filter};
use super::random::Rng;
use super::{Setup, assert_none, compare, compare_all, requests_each, seeds};
use crate::policies::jwt::Issuer;

const JWT: &str = "type.googleapis.com/envoy.extensions.filters.http.jwt_authn.v3.JwtAuthentication";

fn requirement(rng: &mut Rng, depth: usize) -> Value {
    match rng.below(if depth == 0 { 6 } else { 9 }) {
        0..=2 => json!({ "provider_name": rng.pick(&["me", "you", "third"]) }),
        3 => json!({ "provider_and_audiences": {
            "provider_name": rng.pick(&["me", "you"]), "audiences": [rng.pick(&["x", "y"])] } }),
        4 => json!({ "allow_missing": {} }),
        5 => json!({ "allow_missing_or_failed": {} }),
        6 | 7 => {
            json!({ "requires_any": { "requirements": rng.some(2, 3, |rng| requirement(rng, depth - 1)) } })
        }
        _ => json!({ "requires_all": { "requirements": rng.some(2, 3, |rng| requirement(rng, depth - 1)) } }),
    }
}

fn provider(rng: &mut Rng, issuer: &str, keys: &Issuer) -> Value {
    let mut out = json!({ "local_jwks": { "inline_string": keys.jwks() } });
    out["issuer"] = json!(issuer);
    if rng.chance(40) {
        out["audiences"] = json!([rng.pick(&["x", "y"])]);
    }
    for (name, value) in [
        ("require_expiration", json!(true)),
        ("max_lifetime", json!("7200s")),
        ("subjects", json!({ "exact": "s" })),
    ] {
        if rng.chance(10) {
            out[name] = value;
        }
    }
    if rng.chance(40) {
        out["forward"] = json!(true);
    }
    if rng.chance(30) {
        out["from_headers"] =
            json!([ { "name": "x-jwt", "value_prefix": rng.pick(&["Bearer ", "Bearer ", ""]) } ]);
    }
    if rng.chance(30) {
        out["from_params"] = json!(["token"]);
    }
    if rng.chance(30) {
        out["from_cookies"] = json!(["jwt"]);
    }
    if rng.chance(30) {
        out["forward_payload_header"] = json!("x-payload");
    }
    if rng.chance(50) {
        out["payload_in_metadata"] = json!("payload");
    }
    if rng.chance(40) {
        out["claim_to_headers"] = json!([
            { "header_name": "x-sub", "claim_name": "sub" },
            { "header_name": "x-deep", "claim_name": "deep.name" },
        ]);
    }
    out
}

fn tokens(me: &Issuer, you: &Issuer) -> Vec<String> {
    let claims = |issuer: &str, audience: &str| json!({ "iss": issuer, "aud": audience, "sub": "s", "deep": { "name": "n" }, "exp": 4_000_000_000u64 });
    let mut expired = claims("me", "x");
    expired["exp"] = json!(1_000_000);
    // It has lived for long, and has an hour left.
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    let mut soon = claims("me", "x");
    soon["nbf"] = json!(1_000_000);
    soon["exp"] = json!(now + 3600);
    let mut early = claims("me", "x");
    early["nbf"] = json!(4_000_000_000u64);
    vec![
        me.token(&claims("me", "x")),
        me.token(&claims("me", "y")),
        you.token(&claims("you", "x")),
        you.token(&claims("you", "y")),
        you.token(&claims("me", "x")),
        me.token(&claims("other", "x")),
        me.token(&json!({ "iss": "me", "aud": ["x", "y"] })),
        me.token(
            &json!({ "iss": "me", "aud": "x", "sub": "s", "nbf": 3_999_999_000u64, "exp": 4_000_000_000u64 }),
        ),
        me.token(&expired),
        me.token(&early),
        "bm8.bm8.bm8".into(),
        "nothing".into(),
    ]
}

/// Puts one of the tokens somewhere into a request. Parameters and cookies have one value each, since Envoy looks at the first
/// one only, and parameters are in the order in which Envoy leaves those that stay.
fn bring(
    rng: &mut Rng,
    tokens: &[String],
    fields: &mut Vec<(&str, String)>,
    query: &mut BTreeMap<&str, String>,
) {
    let token = &tokens[rng.below(tokens.len())];
    match rng.below(12) {
        0 => fields.push(("authorization", "Basic x".into())),
        1 => fields.push(("authorization", token.clone())),
        2..=4 => fields.push(("authorization", format!("Bearer {token}"))),
        5 => fields.push(("x-jwt", token.clone())),
        6 => fields.push(("x-jwt", format!("Bearer {token}"))),
        7 => drop(query.insert("access_token", token.clone())),
        8 | 9 => drop(query.insert("token", token.clone())),
        _ if fields.iter().any(|(name, _)| *name == "cookie") => {}
        _ => fields.push(("cookie", format!("a=b; jwt={token}; c=d"))),
    }
}

fn generated(seed: u64, each: usize) -> Setup {
    let mut rng = Rng::new(seed);
    let (me, you) = (Issuer::new("one"), Issuer::new("two"));
    let mut rules = Vec::new();
    for prefix in ["/forward/a", "/forward/b", "/direct"] {
        if rng.chance(80) {
            rules.push(json!({ "match": { "prefix": prefix }, "requires": requirement(&mut rng, 2) }));
        } else {
            rules.push(json!({ "match": { "prefix": prefix } }));
        }
    }
    if rng.chance(50) {
        rules.push(json!({ "match": { "prefix": "/" }, "requires": requirement(&mut rng, 1) }));
    }
    let config = json!({
        "@type": JWT,
        "providers": {
            "me": provider(&mut rng, "me", &me),
            "you": provider(&mut rng, "you", &you),
            "third": provider(&mut rng, "other", &me),
        },
        "rules": &rules,
        "bypass_cors_preflight": rng.chance(50),
    });
    let tokens = tokens(&me, &you);
    let mut asks = Vec::new();
    for number in 0..each {
        let (mut fields, mut query) = (Vec::new(), BTreeMap::from([("p", "1".to_owned())]));
        let several = if rng.chance(50) { 1 } else { 4 };
        let brought = rng.below(several + 1);
        for _ in 0..brought {
            bring(&mut rng, &tokens, &mut fields, &mut query);
        }
        if rng.chance(15) {
            fields.push(("x-payload", "forged".into()));
        }
        if rng.chance(15) {
            fields.push(("x-sub", "forged".into()));
        }
        let path = rng.pick(&[
            "/forward/a",
            "/forward/b",
            "/direct",
            "/forward",
            "/redirect",
            "/none",
        ]);
        let query: Vec<String> = query
            .iter()
            .map(|(name, value)| format!("{name}={value}"))
            .collect();
        let target = format!("{path}?{}", query.join("&"));
        let fields: Vec<(&str, &str)> = fields.iter().map(|(name, value)| (*name, &**value)).collect();
        // Marked for what is pardoned there.
        let rule = rules
            .iter()
            .find(|rule| path.starts_with(rule["match"]["prefix"].as_str().unwrap()));
        let optional = rule.is_some_and(|rule| rule.to_string().contains("\"allow_missing\""));
        let mark = if optional && brought > 1 {
            compare::SEVERAL_OPTIONAL
        } else {
            ""
        };
        let mut one = ask(format!("j{seed}-{number}{mark}"), "a.test", &target, &fields);
        if rng.chance(10) {
            one.method = "OPTIONS";
            one.fields.push(("origin".into(), "http://a".into()));
            one.fields
                .push(("access-control-request-method".into(), "PUT".into()));
        }
        asks.push(one);
    }
    Setup {
        name: format!("tokens-{seed}"),
        manager: json!({ "stat_prefix": "p", "server_name": "gate", "http_filters": [filter("jwt", config)] }),
        table: every_end(),
        asks,
        more: "%DYNAMIC_METADATA(envoy.filters.http.jwt_authn:payload:sub)%",
        tls: None,
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn generated_requirements_of_tokens_are_met_by_the_same_requests_as_in_envoy() {
    let each = requests_each(40);
    if let Some((count, differences)) =
        compare_all(seeds(0..60, &[]), |seed| generated(seed, each), &[]).await
    {
        assert_none(count, &differences);
    }
}
