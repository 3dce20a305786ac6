//! Rate limit descriptors: what a service is asked about which requests, and what its answers do.

use serde_json::{Value, json};
use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::envoy::service::ratelimit::v3 as service;
use serin_xds::pb::google::protobuf as google;
use service::rate_limit_response::{Code, DescriptorStatus, RateLimit};
use tonic::Status;

use super::policies::{ask, filter};
use super::random::Rng;
use super::{Setup, assert_none, compare_all, requests_each, script, seeds};

const LIMIT: &str = "type.googleapis.com/envoy.extensions.filters.http.ratelimit.v3.RateLimit";
const PER_ROUTE: &str = "type.googleapis.com/envoy.extensions.filters.http.ratelimit.v3.RateLimitPerRoute";

fn value(rng: &mut Rng) -> &'static str {
    rng.pick(&[
        "fixed",
        "fixed",
        "%REQ(x-k)%",
        "a-%REQ(x-m)%-b",
        "%REQ(:path)%",
        "%PROTOCOL%",
    ])
}

fn text_match(rng: &mut Rng) -> Value {
    match rng.below(3) {
        0 => json!({ "exact": rng.pick(&["one", "1", "5"]) }),
        1 => json!({ "prefix": rng.pick(&["o", "1"]) }),
        _ => json!({ "safe_regex": { "regex": rng.pick(&["o.*", "[0-9]+"]) } }),
    }
}

fn key(rng: &mut Rng, out: &mut Value) {
    if rng.chance(40) {
        out["descriptor_key"] = json!(rng.pick(&["key", "other"]));
    }
    if rng.chance(30) {
        out["default_value"] = json!("default");
    }
}

fn metadata_key(rng: &mut Rng, namespace: &str) -> Value {
    let path = match rng.below(4) {
        0 => json!([ { "key": "s" } ]),
        1 => json!([ { "key": "n" } ]),
        2 => json!([ { "key": "deep" }, { "key": "s" } ]),
        _ => json!([ { "key": "none" } ]),
    };
    json!({ "key": namespace, "path": path })
}

fn action(rng: &mut Rng) -> Value {
    match rng.below(14) {
        0 => json!({ "source_cluster": {} }),
        1 => json!({ "destination_cluster": {} }),
        2 | 3 => json!({ "request_headers": {
            "header_name": rng.pick(&["x-k", "x-m", ":path", ":method", ":authority", "x-absent"]),
            "descriptor_key": "field", "skip_if_absent": rng.chance(50) } }),
        4 => json!({ "query_parameters": {
            "query_parameter_name": rng.pick(&["q", "e", "none"]), "descriptor_key": "query", "skip_if_absent": rng.chance(50) } }),
        5 => json!({ "remote_address": {} }),
        6 => json!({ "masked_remote_address": { "v4_prefix_mask_len": rng.pick(&[0, 8, 24]) } }),
        7 | 8 => {
            let mut out = json!({ "descriptor_value": value(rng) });
            key(rng, &mut out);
            json!({ "generic_key": out })
        }
        9 => {
            let mut header = json!({ "name": rng.pick(&["x-k", "x-m", "x-absent", ":method"]) });
            if rng.chance(70) {
                header["string_match"] = text_match(rng);
            } else {
                header["present_match"] = json!(true);
            }
            let mut out = json!({ "descriptor_value": value(rng), "headers": [header] });
            if rng.chance(40) {
                out["expect_match"] = json!(rng.chance(50));
            }
            key(rng, &mut out);
            json!({ "header_value_match": out })
        }
        10 => {
            let parameter = if rng.chance(70) {
                json!({ "name": "q", "string_match": text_match(rng) })
            } else {
                json!({ "name": rng.pick(&["q", "none"]), "present_match": true })
            };
            let mut out = json!({ "descriptor_value": value(rng), "query_parameters": [parameter] });
            if rng.chance(40) {
                out["expect_match"] = json!(rng.chance(50));
            }
            key(rng, &mut out);
            json!({ "query_parameter_value_match": out })
        }
        11 => {
            let mut out = json!({ "descriptor_value": value(rng), "address_matcher": {
                "ranges": [ { "address_prefix": rng.pick(&["127.0.0.0", "1.2.3.0"]), "prefix_len": 8 } ],
                "invert_match": rng.chance(30) } });
            key(rng, &mut out);
            json!({ "remote_address_match": out })
        }
        _ => {
            let from_route = rng.chance(50);
            let mut out = json!({
                "descriptor_key": "noted",
                "metadata_key": metadata_key(rng, "set"),
                "source": if from_route { "ROUTE_ENTRY" } else { "DYNAMIC" },
                "skip_if_absent": rng.chance(40),
            });
            if rng.chance(40) {
                out["default_value"] = json!("default");
            }
            json!({ "metadata": out })
        }
    }
}

/// Envoy knows stages where routes say them only, and weights where filters say them.
fn entry(rng: &mut Rng, of_filter: bool) -> Value {
    let mut out = json!({ "actions": rng.some(1, 3, action) });
    if !of_filter && rng.chance(30) {
        out["stage"] = json!(1);
    }
    if rng.chance(20) {
        out["limit"] = if rng.chance(50) {
            json!({ "rate_limit": { "requests_per_unit": 7, "unit": rng.pick(&["SECOND", "MONTH"]) } })
        } else {
            json!({ "dynamic_metadata": { "metadata_key": { "key": "set", "path": [ { "key": rng.pick(&["limit", "none"]) } ] } } })
        };
    }
    if of_filter && rng.chance(30) {
        out["hits_addend"] = match rng.below(3) {
            0 => json!({ "number": 3 }),
            1 => json!({ "format": "%REQ(x-hits)%" }),
            _ => json!({ "format": "%BYTES_RECEIVED%" }),
        };
    }
    if rng.chance(20) {
        out["x_ratelimit_option"] = json!(rng.pick(&["OFF", "DRAFT_VERSION_03"]));
    }
    out
}

fn entries(rng: &mut Rng, of_filter: bool) -> Value {
    json!(rng.some(1, 3, |rng| entry(rng, of_filter)))
}

fn manager(rng: &mut Rng) -> Value {
    let mut limit = json!({
        "@type": LIMIT,
        "domain": "d",
        "timeout": "1s",
        "rate_limit_service": {
            "grpc_service": { "envoy_grpc": { "cluster_name": "limits" } },
            "transport_api_version": "V3",
        },
    });
    let mut maybe = |rng: &mut Rng, percent: usize, name: &str, value: Value| {
        if rng.chance(percent) {
            limit[name] = value;
        }
    };
    maybe(rng, 30, "stage", json!(1));
    maybe(rng, 50, "failure_mode_deny", json!(true));
    maybe(rng, 30, "rate_limited_as_resource_exhausted", json!(true));
    maybe(rng, 60, "enable_x_ratelimit_headers", json!("DRAFT_VERSION_03"));
    maybe(rng, 30, "disable_x_envoy_ratelimited_header", json!(true));
    let status = rng.pick(&["ServiceUnavailable", "Forbidden", "OK", "BadRequest"]);
    maybe(rng, 40, "rate_limited_status", json!({ "code": status }));
    let status = rng.pick(&["ServiceUnavailable", "TooManyRequests"]);
    maybe(rng, 40, "status_on_error", json!({ "code": status }));
    let action = rng.pick(&[
        "APPEND_IF_EXISTS_OR_ADD",
        "OVERWRITE_IF_EXISTS_OR_ADD",
        "ADD_IF_ABSENT",
    ]);
    let added = json!([ { "header": { "key": rng.pick(&["x-over", "x-told", "content-type"]), "value": "%RESPONSE_CODE% %REQ(x-k)%" }, "append_action": action } ]);
    maybe(rng, 40, "response_headers_to_add", added);
    let own = entries(rng, true);
    maybe(rng, 20, "rate_limits", own);
    maybe(rng, 40, "enable_retry_after_header", json!(true));
    let kind = rng.pick(&["internal", "external", "both"]);
    maybe(rng, 30, "request_type", json!(kind));
    let set = json!({
        "@type": "type.googleapis.com/envoy.extensions.filters.http.set_metadata.v3.Config",
        "metadata": [ { "metadata_namespace": "set", "value": {
            "s": "v", "n": 5, "deep": { "s": "inner" }, "limit": { "requests_per_unit": 42, "unit": "HOUR" } } } ],
    });
    let mut out = json!({ "stat_prefix": "p", "server_name": "gate", "http_filters": [
        filter("set", set), filter("limit", limit) ] });
    if rng.chance(50) {
        out["use_remote_address"] = json!(true);
    }
    out
}

fn per_route(rng: &mut Rng) -> Value {
    let mut out = json!({ "@type": PER_ROUTE });
    if rng.chance(60) {
        out["vh_rate_limits"] = json!(rng.pick(&["OVERRIDE", "INCLUDE", "IGNORE"]));
    }
    if rng.chance(40) {
        out["rate_limits"] = entries(rng, true);
    }
    if rng.chance(30) {
        out["domain"] = json!("own");
    }
    out
}

fn table(rng: &mut Rng) -> Value {
    let mut routes = Vec::new();
    for prefix in ["/a", "/b", "/direct", "/missing", "/"] {
        let mut one = json!({ "match": { "prefix": prefix } });
        if prefix == "/direct" {
            one["direct_response"] = json!({ "status": 203, "body": { "inline_string": "said" } });
        } else {
            let cluster = if prefix == "/missing" {
                "missing"
            } else {
                rng.pick(&["a", "b"])
            };
            one["route"] = json!({ "cluster": cluster });
            if rng.chance(60) {
                one["route"]["rate_limits"] = entries(rng, false);
            }
            if rng.chance(30) {
                one["route"]["include_vh_rate_limits"] = json!(true);
            }
        }
        if rng.chance(40) {
            one["metadata"] = json!({ "filter_metadata": { "set": { "s": "of-route", "n": 7 } } });
        }
        if rng.chance(40) {
            one["typed_per_filter_config"] = json!({ "limit": per_route(rng) });
        }
        routes.push(one);
    }
    let mut host = json!({ "name": "all", "domains": ["*"], "routes": routes });
    if rng.chance(70) {
        host["rate_limits"] = entries(rng, false);
    }
    if rng.chance(15) {
        host["typed_per_filter_config"] = json!({ "limit": per_route(rng) });
    }
    json!({ "virtual_hosts": [host] })
}

fn generated(seed: u64, each: usize) -> Setup {
    let mut rng = Rng::new(seed);
    let (manager, table) = (manager(&mut rng), table(&mut rng));
    let fields = [
        ("x-k", "one"),
        ("x-k", "5"),
        ("x-m", "one"),
        ("x-m", ""),
        ("x-hits", "4"),
        ("x-hits", "-1"),
        ("x-hits", "many"),
        ("content-type", "application/grpc"),
        ("x-forwarded-for", "1.2.3.4"),
        ("x-told", "before"),
    ];
    let mut asks = Vec::new();
    for number in 0..each {
        let path = rng.pick(&["/a", "/a", "/b", "/b", "/direct", "/missing", "/other"]);
        let query = rng.pick(&["", "", "?q=1", "?q=one&q=2", "?q=&e=%20x", "?e=x"]);
        let mut some = rng.some(0, 4, |rng| rng.pick(&fields));
        let mut seen = std::collections::BTreeSet::new();
        some.retain(|(name, _)| *name == "x-m" || seen.insert(*name));
        let mut one = ask(
            format!("r{seed}-{number}"),
            rng.pick(&["a.test", "b.test"]),
            &format!("{path}{query}"),
            &some,
        );
        if rng.chance(20) {
            one.method = "POST";
            one.body = "content".into();
        }
        asks.push(one);
    }
    Setup {
        name: format!("limits-{seed}"),
        manager,
        table,
        asks,
        more: "%DYNAMIC_METADATA(envoy.filters.http.ratelimit:told)%",
        tls: None,
    }
}

/// What was asked, in one line.
fn told(question: &service::RateLimitRequest) -> String {
    let mut out = format!("domain={} hits={}", question.domain, question.hits_addend);
    for one in &question.descriptors {
        let entries: Vec<String> = one
            .entries
            .iter()
            // Ours has no name in tests.
            .map(|entry| match &*entry.key {
                "source_cluster" => "source_cluster".to_owned(),
                key => format!("{key}={}", entry.value),
            })
            .collect();
        let limit = one
            .limit
            .as_ref()
            .map(|limit| (limit.requests_per_unit, limit.unit));
        let hits = one.hits_addend.as_ref().map(|hits| hits.value);
        out.push_str(&format!(" ({} limit={limit:?} hits={hits:?})", entries.join(",")));
    }
    // What clients of the loopback are called differs (listed).
    script::field_text(&out)
}

fn answer(question: &service::RateLimitRequest) -> Option<Result<service::RateLimitResponse, Status>> {
    let told = told(question);
    let mut rng = script::chosen_by(&told);
    match rng.below(20) {
        0 => return Some(Err(Status::unavailable("not now"))),
        1 => return Some(Err(Status::resource_exhausted("too many"))),
        2 if rng.chance(20) => return None,
        _ => {}
    }
    let field = |key: &str, value: &str| core::HeaderValue {
        key: key.into(),
        value: value.into(),
        ..Default::default()
    };
    let over = rng.chance(50);
    let mut out = service::RateLimitResponse {
        overall_code: match rng.below(12) {
            0 => Code::Unknown,
            _ if over => Code::OverLimit,
            _ => Code::Ok,
        } as i32,
        response_headers_to_add: vec![field("x-asked-as", &told)],
        request_headers_to_add: vec![field("x-asked", &told)],
        ..Default::default()
    };
    for one in &question.descriptors {
        if rng.chance(20) {
            continue;
        }
        let current = RateLimit {
            name: rng.pick(&["", "named"]).into(),
            requests_per_unit: rng.pick(&[1, 10, 100]),
            unit: rng.below(8) as i32,
        };
        out.statuses.push(DescriptorStatus {
            code: if over { Code::OverLimit } else { Code::Ok } as i32,
            current_limit: rng.chance(80).then_some(current),
            limit_remaining: rng.pick(&[0, 0, 3, one.entries.len() as u32]),
            duration_until_reset: rng.chance(70).then_some(google::Duration {
                seconds: rng.pick(&[0, 5, 50]),
                nanos: rng.pick(&[0, 500_000_000]),
            }),
            ..Default::default()
        });
    }
    let statuses: Vec<_> = out
        .statuses
        .iter()
        .map(|one| {
            let reset = one
                .duration_until_reset
                .as_ref()
                .map(|reset| (reset.seconds, reset.nanos));
            (one.code, one.current_limit.is_some(), one.limit_remaining, reset)
        })
        .collect();
    out.response_headers_to_add
        .push(field("x-statuses", &format!("{} {statuses:?}", out.overall_code)));
    // Envoy adds a second type of content to what endpoints answer.
    if out.overall_code == Code::OverLimit as i32 && rng.chance(15) {
        out.response_headers_to_add
            .push(field("content-type", "text/limited"));
    }
    if rng.chance(30) {
        let (name, value) = rng.pick(&[
            ("x-told", "again"),
            ("x-secret", "mine"),
            ("x-ratelimit-limit", "own"),
            ("x-multi", "r3"),
        ]);
        out.response_headers_to_add.push(field(name, value));
    }
    if rng.chance(30) {
        let (name, value) = rng.pick(&[("x-k", "added"), ("x-told", "added"), ("cookie", "added=1")]);
        out.request_headers_to_add.push(field(name, value));
    }
    if rng.chance(30) {
        out.raw_body = b"because".to_vec();
    }
    if rng.chance(30) {
        let value = google::Value {
            kind: Some(google::value::Kind::StringValue("this".into())),
        };
        out.dynamic_metadata = Some(google::Struct {
            fields: [("told".to_owned(), value)].into_iter().collect(),
        });
    }
    script::tell(&told, &out);
    Some(Ok(out))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rate_limit_service_is_asked_the_same_and_obeyed_alike_by_envoy_and_serin_proxy() {
    let each = requests_each(40);
    let (at, _served) = script::limits(answer).await;
    let clusters = [script::grpc_cluster("limits", at)];
    if let Some((count, differences)) =
        compare_all(seeds(0..20, &[111]), |seed| generated(seed, each), &clusters).await
    {
        assert_none(count, &differences);
    }
}
