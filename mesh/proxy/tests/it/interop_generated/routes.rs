//! Route configurations and connection managers, made of the fields that `docs/supported/proxy.md` calls honoured.

use serde_json::{Value, json};

use super::random::Rng;

const DOMAINS: [&str; 12] = [
    "a.test",
    "a.test:8080",
    "b.test",
    "*.test",
    "*.b.test",
    "*-x.test",
    "api.*",
    "api.b.*",
    "[::1]:80",
    "*",
    "127.0.0.1",
    "other.org",
];

const PREFIXES: [&str; 12] = [
    "/", "/a", "/a/", "/A", "/api", "/api/", "/api/v1", "/a//b", "/%61", "/x", "", "/a;p",
];

const EXACT: [&str; 10] = [
    "/", "/a", "/A", "/a/b", "/api/v1", "/a//b", "/a%2Fb", "/a;p=1", "/~a", "/api/v1/",
];

const EXPRESSIONS: [&str; 9] = [
    "/a.*",
    "/api/v[0-9]+",
    "/(a|api)/.*",
    ".*\\.html",
    "/[a-z]+",
    "(?i)/A/.*",
    "/api/v1(/.*)?",
    "/a/[^/]+",
    "/.*b",
];

const TEMPLATES: [&str; 6] = [
    "/api/{version}/users/{id}",
    "/api/**",
    "/a/*",
    "/a/{rest=**}",
    "/{one}/{two}",
    "/api/{version=v1}/**",
];

const NAMES: [&str; 7] = [
    "x-k",
    "x-n",
    "x-multi",
    "x-absent",
    "content-type",
    "X-K",
    "user-agent",
];

const SET: [&str; 8] = [
    "x-k",
    "x-multi",
    "x-new",
    "X-Other",
    "user-agent",
    "x-n",
    "x-want-not",
    "x-empty",
];

const SET_RESPONSE: [&str; 8] = [
    "x-new",
    "x-multi",
    "x-backend",
    "X-Other",
    "server",
    "content-type",
    "x-secret",
    "vary",
];

const VALUES: [&str; 30] = [
    "plain",
    "plain",
    "other",
    "",
    "100%%",
    "%PROTOCOL%",
    "%REQ(x-k)%",
    "[%REQ(x-k)%]",
    "%REQ(x-absent)%",
    "%REQ(x-absent?x-k)%",
    "%REQ(x-k):2%",
    "%REQ(:path)%",
    "%REQ(:method)% %REQ(:authority)%",
    "%ROUTE_NAME%",
    "%UPSTREAM_CLUSTER%",
    "%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%",
    "%DOWNSTREAM_LOCAL_ADDRESS_WITHOUT_PORT%",
    "%DOWNSTREAM_DIRECT_REMOTE_ADDRESS_WITHOUT_PORT%",
    "%DYNAMIC_METADATA(none:key)%",
    "%FILTER_STATE(none:PLAIN)%",
    "%START_TIME(%Y)%",
    "%REQUESTED_SERVER_NAME%",
    "%DOWNSTREAM_TLS_VERSION%",
    "%VIRTUAL_CLUSTER_NAME%",
    "%RESPONSE_FLAGS%",
    "%RESPONSE_CODE%",
    "%RESPONSE_CODE_DETAILS%",
    "%UPSTREAM_METADATA(none:key)%",
    "%CLUSTER_METADATA(none:key)%",
    "%REQ(x-multi)%",
];

fn string_match(rng: &mut Rng) -> Value {
    let texts = ["one", "o", "ONE", "5", "a", "two", "b", "text", ""];
    // Envoy refuses empty ones of these kinds.
    let text = |rng: &mut Rng| rng.pick(&texts[..8]);
    let mut out = match rng.below(5) {
        0 => json!({ "exact": rng.pick(&texts) }),
        1 => json!({ "prefix": text(rng) }),
        2 => json!({ "suffix": text(rng) }),
        3 => json!({ "contains": text(rng) }),
        _ => {
            return json!({ "safe_regex": { "regex": rng.pick(&["o.*", ".*", "[0-9]+", "(one|two).*", ".+", "a,b"]) } });
        }
    };
    if rng.chance(30) {
        out["ignore_case"] = json!(true);
    }
    out
}

fn header_match(rng: &mut Rng) -> Value {
    let name = match rng.below(10) {
        0 => rng.pick(&[":method", ":path", ":authority", ":scheme", "host", "cookie"]),
        _ => rng.pick(&NAMES),
    };
    let mut out = json!({ "name": name });
    match rng.below(9) {
        0 => out["range_match"] = json!({ "start": rng.pick(&[-5, 0, 5]), "end": rng.pick(&[6, 10, 11]) }),
        1 => out["present_match"] = json!(rng.chance(60)),
        2 => out["exact_match"] = json!(rng.pick(&["one", "5", "a", "GET"])),
        3 => out["prefix_match"] = json!(rng.pick(&["o", "t", "-"])),
        4 => out["suffix_match"] = json!(rng.pick(&["e", "b", "0"])),
        5 => out["contains_match"] = json!(rng.pick(&["n", ",", "w"])),
        6 => out["safe_regex_match"] = json!({ "regex": rng.pick(&["o.*", "[0-9]", "-?[0-9]+", "a(,b)?"]) }),
        7 if rng.chance(30) => {}
        _ => out["string_match"] = string_match(rng),
    }
    if rng.chance(25) {
        out["invert_match"] = json!(true);
    }
    if rng.chance(25) {
        out["treat_missing_header_as_empty"] = json!(true);
    }
    out
}

fn query_match(rng: &mut Rng) -> Value {
    let mut out = json!({ "name": rng.pick(&["q", "n", "e", "Q"]) });
    match rng.below(3) {
        0 => out["present_match"] = json!(rng.chance(60)),
        1 => {
            out["string_match"] = json!({ "exact": rng.pick(&["1", "abc", "2", " x", "%20x"]) });
        }
        _ => out["string_match"] = string_match(rng),
    }
    out
}

/// How a route finds its path.
#[derive(Clone, Copy, PartialEq)]
enum Path {
    Prefix,
    Template,
    Other,
}

fn matches(rng: &mut Rng) -> (Value, Path) {
    let (mut out, path) = match rng.below(10) {
        0..=3 => (json!({ "prefix": rng.pick(&PREFIXES) }), Path::Prefix),
        4 | 5 => (json!({ "path": rng.pick(&EXACT) }), Path::Other),
        6 => (
            json!({ "path_separated_prefix": rng.pick(&["/a", "/api", "/api/v1", "/A", "/a/b"]) }),
            Path::Prefix,
        ),
        7 | 8 => (
            json!({ "safe_regex": { "regex": rng.pick(&EXPRESSIONS) } }),
            Path::Other,
        ),
        _ => (
            json!({ "path_match_policy": { "name": "template", "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.path.match.uri_template.v3.UriTemplateMatchConfig",
                "path_template": rng.pick(&TEMPLATES) } } }),
            Path::Template,
        ),
    };
    if path != Path::Template && rng.chance(20) {
        out["case_sensitive"] = json!(false);
    }
    if rng.chance(40) {
        out["headers"] = json!(rng.some(1, 2, header_match));
    }
    if rng.chance(15) {
        out["query_parameters"] = json!(rng.some(1, 2, query_match));
    }
    if rng.chance(4) {
        out["grpc"] = json!({});
    }
    if rng.chance(6) {
        let numerator = rng.pick(&[0, 100]);
        out["runtime_fraction"] =
            json!({ "default_value": { "numerator": numerator, "denominator": "HUNDRED" } });
    }
    (out, path)
}

fn header_option(rng: &mut Rng, names: &[&'static str]) -> Value {
    let mut out = json!({ "header": { "key": rng.pick(names), "value": rng.pick(&VALUES) } });
    if rng.chance(60) {
        out["append_action"] = json!(rng.pick(&[
            "APPEND_IF_EXISTS_OR_ADD",
            "ADD_IF_ABSENT",
            "OVERWRITE_IF_EXISTS_OR_ADD",
            "OVERWRITE_IF_EXISTS",
        ]));
    } else if rng.chance(30) {
        out["append"] = json!(rng.chance(50));
    }
    if rng.chance(20) {
        out["keep_empty_value"] = json!(true);
    }
    out
}

/// Header operations of one level.
fn dress(rng: &mut Rng, level: &mut Value, percent: usize) {
    if rng.chance(percent) {
        level["request_headers_to_add"] = json!(rng.some(1, 3, |rng| header_option(rng, &SET)));
    }
    if rng.chance(percent / 2) {
        level["request_headers_to_remove"] = json!(rng.some(1, 2, |rng| rng.pick(&[
            "x-k",
            "x-multi",
            "X-N",
            "user-agent",
            "x-absent"
        ])));
    }
    if rng.chance(percent) {
        level["response_headers_to_add"] = json!(rng.some(1, 3, |rng| header_option(rng, &SET_RESPONSE)));
    }
    if rng.chance(percent / 2) {
        level["response_headers_to_remove"] = json!(rng.some(1, 2, |rng| {
            rng.pick(&["x-secret", "x-multi", "server", "x-absent", "vary"])
        }));
    }
}

fn substitution(rng: &mut Rng) -> Value {
    let (regex, with) = rng.pick(&[
        ("^/a", "/z"),
        ("/([a-z]+)/([a-z0-9]+)", "/\\2/\\1"),
        ("b", "B"),
        ("^/api(/v[0-9]+)?(.*)$", "\\2/end\\1"),
        ("[0-9]", "#"),
        ("^(.*)$", "/pre\\0"),
        ("/$", ""),
    ]);
    json!({ "pattern": { "regex": regex }, "substitution": with })
}

fn forward(rng: &mut Rng, path: Path) -> Value {
    let mut out = json!({ "timeout": "10s" });
    match rng.below(10) {
        0..=4 => out["cluster"] = json!(rng.pick(&["a", "b"])),
        5 => {
            out["cluster"] = json!("missing");
            if rng.chance(50) {
                out["cluster_not_found_response_code"] =
                    json!(rng.pick(&["NOT_FOUND", "SERVICE_UNAVAILABLE", "INTERNAL_SERVER_ERROR"]));
            }
        }
        6 => out["cluster_header"] = json!("x-cluster"),
        _ => {
            let (first, second) = if rng.chance(50) { (100, 0) } else { (0, 1) };
            let mut clusters = vec![
                json!({ "name": "a", "weight": first }),
                json!({ "name": "b", "weight": second }),
            ];
            for cluster in &mut clusters {
                dress(rng, cluster, 30);
                if rng.chance(15) {
                    cluster["host_rewrite_literal"] = json!("weighted.test");
                }
            }
            out["weighted_clusters"] = json!({ "clusters": clusters });
        }
    }
    match rng.below(8) {
        0 | 1 if path != Path::Template => {
            out["prefix_rewrite"] = json!(rng.pick(&["/", "/new", "/new/", "/a?x=1", ""]))
        }
        2 | 3 => out["regex_rewrite"] = substitution(rng),
        4 if path == Path::Template => {
            out["path_rewrite_policy"] = json!({ "name": "rewrite", "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.path.rewrite.uri_template.v3.UriTemplateRewriteConfig",
                "path_template_rewrite": "/fixed/path" } });
        }
        _ => {}
    }
    match rng.below(12) {
        0 => out["host_rewrite_literal"] = json!("inner.test"),
        1 => out["host_rewrite_header"] = json!(rng.pick(&["x-k", "x-absent"])),
        2 => {
            out["host_rewrite_path_regex"] =
                json!({ "pattern": { "regex": "^/([a-z]+).*$" }, "substitution": "\\1.path" });
        }
        _ => {}
    }
    if rng.chance(20) {
        out["append_x_forwarded_host"] = json!(true);
    }
    if rng.chance(25) {
        out["retry_policy"] = json!({
            "retry_on": rng.pick(&["5xx", "gateway-error", "retriable-4xx", "retriable-status-codes", "connect-failure", "5xx,reset"]),
            "num_retries": rng.pick(&[0, 1, 2]),
            "retriable_status_codes": [404],
            "retry_back_off": { "base_interval": "0.001s", "max_interval": "0.002s" },
        });
    }
    out
}

fn redirect(rng: &mut Rng, path: Path) -> Value {
    let mut out = json!({});
    match rng.below(4) {
        0 => out["https_redirect"] = json!(true),
        1 => out["scheme_redirect"] = json!(rng.pick(&["https", "http", "foo"])),
        _ => {}
    }
    if rng.chance(30) {
        out["host_redirect"] = json!(rng.pick(&["to.test", "to.test:99"]));
    }
    if rng.chance(20) {
        out["port_redirect"] = json!(rng.pick(&[80, 443, 8443]));
    }
    match rng.below(6) {
        0 => out["path_redirect"] = json!(rng.pick(&["/there", "/there?x=1", "/"])),
        1 if path != Path::Template => out["prefix_rewrite"] = json!(rng.pick(&["/moved", "/"])),
        2 => out["regex_rewrite"] = substitution(rng),
        _ => {}
    }
    if rng.chance(50) {
        out["response_code"] = json!(rng.pick(&[
            "MOVED_PERMANENTLY",
            "FOUND",
            "SEE_OTHER",
            "TEMPORARY_REDIRECT",
            "PERMANENT_REDIRECT",
        ]));
    }
    if rng.chance(30) {
        out["strip_query"] = json!(true);
    }
    out
}

fn mutations(rng: &mut Rng, per_route: bool) -> Value {
    let one = |rng: &mut Rng, names: &[&'static str]| match rng.below(4) {
        0 => json!({ "remove": rng.pick(names) }),
        1 => json!({ "remove_on_match": { "key_matcher": { "prefix": rng.pick(&["x-m", "x-s", "x-k"]) } } }),
        _ => json!({ "append": header_option(rng, names) }),
    };
    let inner = json!({
        "request_mutations": rng.some(0, 2, |rng| one(rng, &SET[..5])),
        "response_mutations": rng.some(0, 2, |rng| one(rng, &SET_RESPONSE[..4])),
    });
    let kind = if per_route {
        "HeaderMutationPerRoute"
    } else {
        "HeaderMutation"
    };
    let mut out = json!({
        "@type": format!("type.googleapis.com/envoy.extensions.filters.http.header_mutation.v3.{kind}"),
        "mutations": inner,
    });
    if !per_route && rng.chance(40) {
        out["most_specific_header_mutations_wins"] = json!(true);
    }
    out
}

fn cors(rng: &mut Rng) -> Value {
    let mut out = json!({
        "@type": "type.googleapis.com/envoy.extensions.filters.http.cors.v3.CorsPolicy",
        "allow_origin_string_match": [ { "exact": "http://good.test" } ],
        "allow_methods": "GET, PUT",
    });
    if rng.chance(40) {
        out["allow_headers"] = json!("x-k");
    }
    if rng.chance(40) {
        out["expose_headers"] = json!("x-secret");
    }
    if rng.chance(40) {
        out["max_age"] = json!("60");
    }
    if rng.chance(40) {
        out["allow_credentials"] = json!(rng.chance(60));
    }
    if rng.chance(30) {
        out["forward_not_matching_preflights"] = json!(rng.chance(50));
    }
    out
}

fn fault(rng: &mut Rng) -> Value {
    let mut out = json!({
        "@type": "type.googleapis.com/envoy.extensions.filters.http.fault.v3.HTTPFault",
        "abort": {
            "http_status": rng.pick(&[418, 503]),
            "percentage": { "numerator": 100, "denominator": "HUNDRED" },
        },
    });
    if rng.chance(60) {
        out["headers"] = json!([header_match(rng)]);
    }
    out
}

/// What a level says about the filters of the chain.
fn overrides(rng: &mut Rng, level: &mut Value, percent: usize) {
    let mut out = json!({});
    if rng.chance(percent) {
        out["mutation"] = mutations(rng, true);
    }
    if rng.chance(percent) {
        out["envoy.filters.http.cors"] = cors(rng);
    }
    if rng.chance(percent / 3) {
        out["envoy.filters.http.fault"] = fault(rng);
    }
    if rng.chance(percent / 4) {
        let name = rng.pick(&["mutation", "envoy.filters.http.cors", "envoy.filters.http.fault"]);
        out[name] = json!({
            "@type": "type.googleapis.com/envoy.config.route.v3.FilterConfig",
            "disabled": true,
        });
    }
    level["typed_per_filter_config"] = out;
}

fn route(rng: &mut Rng, name: String) -> Value {
    let (matching, path) = matches(rng);
    let mut out = json!({ "match": matching });
    if rng.chance(80) {
        out["name"] = json!(name);
    }
    match rng.below(10) {
        0 | 1 => out["redirect"] = redirect(rng, path),
        2 => {
            out["direct_response"] = json!({
                "status": rng.pick(&[200, 204, 301, 404, 418, 503]),
                "body": { "inline_string": rng.pick(&["said", "said so"]) },
            });
        }
        _ => out["route"] = forward(rng, path),
    }
    dress(rng, &mut out, 35);
    overrides(rng, &mut out, 10);
    out
}

/// A route configuration.
pub(crate) fn table(rng: &mut Rng) -> Value {
    let mut left: Vec<&str> = DOMAINS.to_vec();
    let mut hosts = Vec::new();
    for index in 0..2 + rng.below(4) {
        let domains: Vec<&str> = rng.some(1, 2, |rng| {
            let at = rng.below(left.len());
            left.remove(at)
        });
        let mut host = json!({
            "name": format!("host-{index}"),
            "domains": domains,
            "routes": rng.some(1, 7, |rng| rng.next())
                .into_iter()
                .enumerate()
                .map(|(number, seed)| route(&mut Rng::new(seed), format!("route-{index}-{number}")))
                .collect::<Vec<_>>(),
        });
        dress(rng, &mut host, 30);
        overrides(rng, &mut host, 8);
        if rng.chance(30) {
            host["include_request_attempt_count"] = json!(true);
        }
        if rng.chance(20) {
            host["include_attempt_count_in_response"] = json!(true);
        }
        if rng.chance(6) {
            host["require_tls"] = json!(rng.pick(&["ALL", "EXTERNAL_ONLY"]));
        }
        if rng.chance(15) {
            host["retry_policy"] = json!({ "retry_on": "5xx", "num_retries": 1, "retry_back_off": { "base_interval": "0.001s" } });
        }
        hosts.push(host);
    }
    let mut out = json!({ "virtual_hosts": hosts });
    dress(rng, &mut out, 40);
    overrides(rng, &mut out, 8);
    if rng.chance(50) {
        out["most_specific_header_mutations_wins"] = json!(true);
    }
    if rng.chance(25) {
        out["ignore_port_in_host_matching"] = json!(true);
    }
    out
}

/// A connection manager without routes, access log and router.
pub(crate) fn manager(rng: &mut Rng) -> Value {
    let mut out = json!({
        "stat_prefix": "generated",
        "server_name": "gate",
        "http_filters": [
            { "name": "envoy.filters.http.cors", "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.filters.http.cors.v3.Cors" } },
            { "name": "envoy.filters.http.fault", "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.filters.http.fault.v3.HTTPFault" } },
            { "name": "mutation", "typed_config": mutations(rng, false) },
        ],
    });
    for (name, percent) in [
        ("use_remote_address", 50),
        ("normalize_path", 60),
        ("merge_slashes", 30),
        ("preserve_external_request_id", 20),
        ("strip_any_host_port", 15),
        ("skip_xff_append", 10),
        ("always_set_request_id_in_response", 10),
    ] {
        if rng.chance(percent) {
            out[name] = json!(true);
        }
    }
    if rng.chance(30) {
        out["path_with_escaped_slashes_action"] = json!(rng.pick(&[
            "KEEP_UNCHANGED",
            "REJECT_REQUEST",
            "UNESCAPE_AND_REDIRECT",
            "UNESCAPE_AND_FORWARD",
        ]));
    }
    if rng.chance(30) {
        out["server_header_transformation"] =
            json!(rng.pick(&["OVERWRITE", "APPEND_IF_ABSENT", "PASS_THROUGH"]));
    }
    out
}
