//! Access rules with conditions of CEL, and as matcher trees, over mutual TLS: who is allowed, and by what.

use serde_json::{Value, json};

use super::policies::{ask, every_end, filter};
use super::random::Rng;
use super::script::World;
use super::{Setup, assert_none, cel, compare_all, requests_each, seeds};

const RBAC: &str = "type.googleapis.com/envoy.extensions.filters.http.rbac.v3.RBAC";

fn with_conditions(rng: &mut Rng) -> Value {
    let mut policies = serde_json::Map::new();
    for name in ["first", "second", "third"].into_iter().take(1 + rng.below(3)) {
        let policy = json!({
            "permissions": [ { "any": true } ],
            "principals": [ { "any": true } ],
            "condition": cel::boolean(rng, 3),
        });
        policies.insert(name.into(), policy);
    }
    json!({ "action": rng.pick(&["ALLOW", "DENY", "DENY"]), "policies": policies })
}

fn typed(name: &str, config: Value) -> Value {
    let mut config = config;
    config["@type"] = json!(format!("type.googleapis.com/{name}"));
    json!({ "name": "typed", "typed_config": config })
}

/// What a text is taken from.
fn input(rng: &mut Rng) -> Value {
    let network = |name: &str| {
        typed(
            &format!("envoy.extensions.matching.common_inputs.network.v3.{name}"),
            json!({}),
        )
    };
    let ssl = |name: &str| {
        typed(
            &format!("envoy.extensions.matching.common_inputs.ssl.v3.{name}"),
            json!({}),
        )
    };
    match rng.below(12) {
        0..=3 => typed(
            "envoy.type.matcher.v3.HttpRequestHeaderMatchInput",
            json!({ "header_name": rng.pick(&["x-k", "x-m", ":path", ":method", ":authority", "X-K", "x-absent"]) }),
        ),
        // Envoy knows no queries here.
        4..=6 => network(rng.pick(&["SourceIPInput", "DestinationIPInput", "DirectSourceIPInput"])),
        7 => network("ServerNameInput"),
        8 | 9 => ssl(rng.pick(&["UriSanInput", "DnsSanInput"])),
        _ => ssl("SubjectInput"),
    }
}

const TEXTS: [&str; 16] = [
    "one",
    "o",
    "/forward",
    "/f",
    "GET",
    "G",
    "a.test",
    "127.0.0.1",
    "127.",
    "1",
    "a.example",
    "spiffe://cluster.local/ns/a/sa/one",
    "spiffe://",
    "one.example",
    "two.example",
    "CN=three",
];

fn text(rng: &mut Rng) -> Value {
    let some = rng.pick(&TEXTS);
    let mut out = match rng.below(6) {
        0 | 1 => json!({ "exact": some }),
        2 => json!({ "prefix": some }),
        3 => json!({ "suffix": rng.pick(&["e", "one", "t", ".1"]) }),
        4 => json!({ "contains": rng.pick(&["n", "A", "."]) }),
        _ => {
            return json!({ "safe_regex": { "google_re2": {}, "regex": rng.pick(&["o.*", "/(forward|direct).*", ".+", ".*"]) } });
        }
    };
    if rng.chance(20) {
        out["ignore_case"] = json!(true);
    }
    out
}

fn single(rng: &mut Rng) -> Value {
    match rng.below(10) {
        0 | 1 => json!({ "single_predicate": {
            "input": typed("xds.type.matcher.v3.HttpAttributesCelMatchInput", json!({})),
            "custom_match": typed("xds.type.matcher.v3.CelMatcher", json!({
                "expr_match": { "cel_expr_parsed": { "expr": cel::boolean(rng, 2) } } })) } }),
        2 => {
            let inner = typed(
                "envoy.extensions.matching.common_inputs.network.v3.SourceIPInput",
                json!({}),
            );
            json!({ "single_predicate": { "input": inner, "custom_match": typed(
                "envoy.extensions.matching.input_matchers.ip.v3.Ip",
                json!({ "stat_prefix": "ip", "cidr_ranges": [
                    { "address_prefix": rng.pick(&["127.0.0.0", "10.0.0.0"]), "prefix_len": 8 } ] })) } })
        }
        _ => json!({ "single_predicate": { "input": input(rng), "value_match": text(rng) } }),
    }
}

fn predicate(rng: &mut Rng, depth: usize) -> Value {
    match rng.below(if depth == 0 { 5 } else { 8 }) {
        0..=4 => single(rng),
        5 => json!({ "and_matcher": { "predicate": rng.some(2, 3, |rng| predicate(rng, depth - 1)) } }),
        6 => json!({ "or_matcher": { "predicate": rng.some(2, 3, |rng| predicate(rng, depth - 1)) } }),
        _ => json!({ "not_matcher": predicate(rng, depth - 1) }),
    }
}

/// Envoy knows no `keep_matching` here.
fn found(rng: &mut Rng, depth: usize) -> Value {
    if depth > 0 && rng.chance(30) {
        json!({ "matcher": tree(rng, depth - 1) })
    } else {
        json!({ "action": typed("envoy.config.rbac.v3.Action", json!({
            "name": rng.pick(&["p1", "p2", "p3", "p4"]),
            "action": rng.pick(&["ALLOW", "DENY", "ALLOW", "LOG"]) })) })
    }
}

fn tree(rng: &mut Rng, depth: usize) -> Value {
    let mut out = if rng.chance(60) {
        let matchers = rng.some(
            1,
            3,
            |rng| json!({ "predicate": predicate(rng, 2), "on_match": found(rng, depth) }),
        );
        json!({ "matcher_list": { "matchers": matchers } })
    } else {
        let kind = rng.below(5);
        let mut map = serde_json::Map::new();
        for _ in 0..=rng.below(4) {
            map.insert(rng.pick(&TEXTS).into(), found(rng, depth));
        }
        match kind {
            0 | 1 => json!({ "matcher_tree": { "input": input(rng), "exact_match_map": { "map": map } } }),
            2 | 3 => json!({ "matcher_tree": { "input": input(rng), "prefix_match_map": { "map": map } } }),
            _ => {
                let ranges = rng.some(1, 3, |rng| {
                    let ranges = rng.some(1, 2, |rng| {
                        let (prefix, length) = rng.pick(&[
                            ("127.0.0.0", 8),
                            ("127.0.0.1", 32),
                            ("10.0.0.0", 8),
                            ("0.0.0.0", 0),
                        ]);
                        json!({ "address_prefix": prefix, "prefix_len": length })
                    });
                    json!({ "ranges": ranges, "on_match": found(rng, depth), "exclusive": rng.chance(20) })
                });
                let source = typed(
                    "envoy.extensions.matching.common_inputs.network.v3.SourceIPInput",
                    json!({}),
                );
                json!({ "matcher_tree": { "input": source, "custom_match": typed(
                    "xds.type.matcher.v3.IPMatcher", json!({ "range_matchers": ranges })) } })
            }
        }
    };
    if rng.chance(60) {
        out["on_no_match"] = found(rng, depth);
    }
    out
}

fn generated(world: &World, seed: u64, each: usize, trees: bool) -> Setup {
    let mut rng = Rng::new(seed);
    let mut rbac = json!({ "@type": RBAC });
    let (own, shadow) = if trees {
        ("matcher", "shadow_matcher")
    } else {
        ("rules", "shadow_rules")
    };
    let make = |rng: &mut Rng| if trees { tree(rng, 2) } else { with_conditions(rng) };
    rbac[own] = make(&mut rng);
    if rng.chance(60) {
        rbac[shadow] = make(&mut rng);
    }
    let set = json!({
        "@type": "type.googleapis.com/envoy.extensions.filters.http.set_metadata.v3.Config",
        "metadata": [ { "metadata_namespace": "set", "value": { "s": "v", "n": 5, "b": true } } ],
    });
    let fields = [
        ("x-k", "one"),
        ("x-k", "5"),
        ("x-k", "ONE"),
        ("x-k", ""),
        ("x-m", "one"),
        ("x-m", "o"),
        ("user-agent", "t"),
        ("referer", "one"),
        ("cookie", "c=1"),
    ];
    let mut asks = Vec::new();
    for number in 0..each {
        let (host, target) = rng.pick(&[
            ("a.test", "/forward"),
            ("a.test", "/forward/x?q=1"),
            ("a.test", "/forward?q=one&q=2"),
            ("a.test", "/direct"),
            ("A.test", "/forward/One?"),
            ("none.test", "/"),
        ]);
        let some = rng.some(0, 3, |rng| rng.pick(&fields));
        let mut one = ask(format!("x{seed}-{number}"), host, target, &some);
        let mut seen = false;
        one.fields
            .retain(|(name, _)| name != "user-agent" || !std::mem::replace(&mut seen, true));
        if rng.chance(30) {
            one.method = "POST";
            one.body = "x".into();
        }
        one.who = rng.below(world.people().len());
        asks.push(one);
    }
    Setup {
        name: format!("access-{seed}"),
        manager: json!({ "stat_prefix": "p", "server_name": "gate", "http_filters": [
            filter("set", set), filter("rbac", rbac) ] }),
        table: every_end(),
        asks,
        more: "%DYNAMIC_METADATA(envoy.filters.http.rbac:shadow_effective_policy_id)% \
               %DYNAMIC_METADATA(envoy.filters.http.rbac:shadow_engine_result)%",
        tls: Some(world.tls()),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn generated_conditions_of_cel_allow_and_deny_the_same_requests_as_in_envoy() {
    let (each, world) = (requests_each(40), World::new());
    let made = |seed| generated(&world, seed, each, false);
    if let Some((count, differences)) = compare_all(seeds(0..20, &[112]), made, &[]).await {
        assert_none(count, &differences);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn generated_matcher_trees_allow_and_deny_the_same_requests_as_in_envoy() {
    let (each, world) = (requests_each(40), World::new());
    let made = |seed| generated(&world, seed, each, true);
    if let Some((count, differences)) = compare_all(seeds(0..20, &[237]), made, &[]).await {
        assert_none(count, &differences);
    }
}
