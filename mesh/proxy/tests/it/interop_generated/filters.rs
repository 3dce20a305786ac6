//! Filters that decide by themselves: faults, CORS, compression, buffering and local rate limits.

use serde_json::{Value, json};

use super::policies::{ask, every_end, filter};
use super::random::Rng;
use super::{Setup, assert_none, compare_all, requests_each, seeds};

fn named(name: &str, config: Value) -> Value {
    let mut config = config;
    config["@type"] = json!(format!(
        "type.googleapis.com/envoy.extensions.filters.http.{name}"
    ));
    config
}

fn all_or_none(rng: &mut Rng) -> Value {
    json!({ "numerator": rng.pick(&[0, 100, 100]), "denominator": "HUNDRED" })
}

fn fault(rng: &mut Rng) -> Value {
    let mut out = json!({});
    if rng.chance(80) {
        let mut abort = match rng.below(3) {
            0 => json!({ "http_status": rng.pick(&[503, 418, 200]) }),
            1 => json!({ "grpc_status": rng.pick(&[14, 0, 7]) }),
            _ => json!({ "header_abort": {} }),
        };
        abort["percentage"] = all_or_none(rng);
        out["abort"] = abort;
    }
    if rng.chance(30) {
        out["delay"] = if rng.chance(50) {
            json!({ "fixed_delay": "0.002s", "percentage": all_or_none(rng) })
        } else {
            json!({ "header_delay": {}, "percentage": all_or_none(rng) })
        };
    }
    if rng.chance(40) {
        out["headers"] = json!([ { "name": "x-k", "string_match": { "exact": rng.pick(&["one", "5"]) }, "invert_match": rng.chance(30) } ]);
    }
    if rng.chance(20) {
        out["upstream_cluster"] = json!(rng.pick(&["a", "b", "missing"]));
    }
    if rng.chance(20) {
        out["max_active_faults"] = json!(rng.pick(&[0, 5]));
    }
    named("fault.v3.HTTPFault", out)
}

fn cors(rng: &mut Rng) -> Value {
    let mut out = json!({});
    let origins = rng.some(0, 2, |rng| match rng.below(4) {
        0 => json!({ "exact": "http://good.test" }),
        1 => json!({ "prefix": "http://g" }),
        2 => json!({ "safe_regex": { "regex": "http://.*\\.test" } }),
        _ => json!({ "exact": "*" }),
    });
    out["allow_origin_string_match"] = json!(origins);
    for (name, value) in [
        ("allow_methods", "GET,PUT"),
        ("allow_headers", "x-k,x-m"),
        ("expose_headers", "x-secret"),
        ("max_age", "600"),
    ] {
        if rng.chance(50) {
            out[name] = json!(value);
        }
    }
    if rng.chance(50) {
        out["allow_credentials"] = json!(rng.chance(70));
    }
    if rng.chance(40) {
        out["forward_not_matching_preflights"] = json!(rng.chance(50));
    }
    if rng.chance(30) {
        out["filter_enabled"] = json!({ "default_value": all_or_none(rng) });
    }
    if rng.chance(20) {
        out["shadow_enabled"] = json!({ "default_value": all_or_none(rng) });
    }
    named("cors.v3.CorsPolicy", out)
}

fn compressor(rng: &mut Rng) -> Value {
    let mut common = json!({ "min_content_length": rng.pick(&[30, 5000]) });
    if rng.chance(60) {
        common["content_type"] =
            json!(rng.pick(&[["text/x-echo", "text/plain"], ["text/html", "text/plain"]]));
    } else {
        common["content_type"] = json!(["text/x-echo"]);
    }
    let mut response = json!({ "common_config": common });
    if rng.chance(30) {
        response["disable_on_etag_header"] = json!(true);
    }
    if rng.chance(30) {
        response["remove_accept_encoding_header"] = json!(true);
    }
    if rng.chance(20) {
        response["uncompressible_response_codes"] = json!([rng.pick(&[503, 404])]);
    }
    let mut out = json!({ "response_direction_config": response });
    out["compressor_library"] = match rng.below(3) {
        0 => json!({ "name": "gzip", "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.compression.gzip.compressor.v3.Gzip" } }),
        1 => json!({ "name": "brotli", "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.compression.brotli.compressor.v3.Brotli" } }),
        _ => json!({ "name": "zstd", "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.compression.zstd.compressor.v3.Zstd" } }),
    };
    named("compressor.v3.Compressor", out)
}

fn local_limit(rng: &mut Rng) -> Value {
    let bucket =
        |tokens: u32| json!({ "max_tokens": tokens, "tokens_per_fill": 1, "fill_interval": "3600s" });
    let always = json!({ "default_value": { "numerator": 100, "denominator": "HUNDRED" } });
    let mut out = json!({
        "stat_prefix": "l",
        "token_bucket": bucket(rng.pick(&[12, 100])),
        "filter_enabled": always,
        "filter_enforced": always,
    });
    if rng.chance(60) {
        let mut descriptors: Vec<Value> = rng.some(1, 3, |rng| {
            let entries = match rng.below(3) {
                0 => json!([ { "key": "field", "value": rng.pick(&["one", "5"]) } ]),
                1 => json!([ { "key": "generic_key", "value": "fixed" } ]),
                _ => {
                    json!([ { "key": "generic_key", "value": "fixed" }, { "key": "field", "value": "one" } ])
                }
            };
            json!({ "entries": entries, "token_bucket": bucket(rng.pick(&[1, 3, 9])) })
        });
        // Envoy refuses two of the same.
        let mut seen = std::collections::BTreeSet::new();
        descriptors.retain(|one| seen.insert(one["entries"].to_string()));
        out["descriptors"] = json!(descriptors);
        let list = json!(rng.some(1, 3, |rng| match rng.below(3) {
            0 => json!({ "actions": [ { "request_headers": { "header_name": "x-k", "descriptor_key": "field" } } ] }),
            1 => json!({ "actions": [ { "generic_key": { "descriptor_value": "fixed" } } ] }),
            _ => json!({ "actions": [ { "generic_key": { "descriptor_value": "fixed" } },
                { "request_headers": { "header_name": "x-k", "descriptor_key": "field" } } ] }),
        }));
        // Of several descriptors Envoy tells another one's limit.
        out["rate_limits"] = json!([list[0]]);
    }
    if rng.chance(50) {
        out["enable_x_ratelimit_headers"] = json!("DRAFT_VERSION_03");
    }
    if rng.chance(40) {
        out["status"] = json!({ "code": rng.pick(&["ServiceUnavailable", "OK", "Forbidden"]) });
    }
    if rng.chance(30) {
        out["rate_limited_as_resource_exhausted"] = json!(true);
    }
    if rng.chance(30) {
        out["response_headers_to_add"] =
            json!([ { "header": { "key": "x-limited", "value": "%RESPONSE_CODE%" } } ]);
    }
    if rng.chance(30) {
        out["request_headers_to_add_when_not_enforced"] =
            json!([ { "header": { "key": "x-would", "value": "limit" } } ]);
    }
    if rng.chance(30) {
        out["always_consume_default_token_bucket"] = json!(rng.chance(50));
    }
    named("local_ratelimit.v3.LocalRateLimit", out)
}

fn generated(seed: u64, each: usize) -> Setup {
    let mut rng = Rng::new(seed);
    let mut filters = vec![filter("cors", named("cors.v3.Cors", json!({})))];
    if rng.chance(50) {
        filters.push(filter("compressor", compressor(&mut rng)));
    }
    if rng.chance(40) {
        filters.push(filter("fault", fault(&mut rng)));
    }
    if rng.chance(40) {
        filters.push(filter("limit", local_limit(&mut rng)));
    }
    if rng.chance(40) {
        filters.push(filter(
            "buffer",
            named(
                "buffer.v3.Buffer",
                json!({ "max_request_bytes": rng.pick(&[7, 64]) }),
            ),
        ));
    }
    let mut table = every_end();
    // Of hosts or of routes: what of both counts is another story.
    let by_host = rng.chance(50);
    for host in table["virtual_hosts"].as_array_mut().unwrap() {
        let mut own = serde_json::Map::new();
        if by_host && rng.chance(80) {
            own.insert("cors".into(), cors(&mut rng));
        }
        host["typed_per_filter_config"] = Value::Object(own);
        for route in host["routes"].as_array_mut().unwrap() {
            let mut own = serde_json::Map::new();
            if !by_host && rng.chance(60) {
                own.insert("cors".into(), cors(&mut rng));
            }
            if rng.chance(15) {
                own.insert("fault".into(), fault(&mut rng));
            }
            if rng.chance(15) {
                own.insert(
                    "buffer".into(),
                    named("buffer.v3.BufferPerRoute", json!({ "disabled": true })),
                );
            }
            route["typed_per_filter_config"] = Value::Object(own);
        }
    }
    let fields = [
        ("x-k", "one"),
        ("x-k", "5"),
        ("x-envoy-fault-abort-request", "418"),
        ("x-envoy-fault-abort-request", "99"),
        ("x-envoy-fault-abort-request", "none"),
        ("x-envoy-fault-abort-grpc-request", "7"),
        ("x-envoy-fault-abort-request-percentage", "0"),
        ("x-envoy-fault-abort-request-percentage", "100"),
        ("x-envoy-fault-delay-request", "1"),
        ("content-type", "application/grpc"),
        ("accept-encoding", "gzip"),
        ("accept-encoding", "gzip;q=0, br"),
        ("accept-encoding", "br;q=0.5, gzip;q=0.4, zstd"),
        ("accept-encoding", "*"),
        ("accept-encoding", "identity"),
        ("accept-encoding", "deflate, gzip;q=1.0, *;q=0"),
        ("accept-encoding", ""),
    ];
    let mut asks = Vec::new();
    for number in 0..each {
        let path = rng.pick(&[
            "/forward",
            "/forward/x?q=1",
            "/direct",
            "/redirect",
            "/missing",
            "/none",
        ]);
        let mut some = rng.some(0, 4, |rng| rng.pick(&fields));
        let mut seen = std::collections::BTreeSet::new();
        some.retain(|(name, _)| seen.insert(*name));
        let mut one = ask(format!("f{seed}-{number}"), "a.test", path, &some);
        match rng.below(10) {
            0 | 1 => {
                one.method = "POST";
                one.body = "x".repeat(rng.pick(&[1, 7, 8, 65]));
            }
            2 => one.method = "HEAD",
            _ => {}
        }
        if rng.chance(40) {
            let origin = rng.pick(&["http://good.test", "http://bad.org", "null", "http://g"]);
            one.fields.push(("origin".into(), origin.into()));
            if rng.chance(50) {
                one.method = "OPTIONS";
                one.body.clear();
                if rng.chance(80) {
                    one.fields.push((
                        "access-control-request-method".into(),
                        rng.pick(&["PUT", "GET", ""]).into(),
                    ));
                }
                if rng.chance(40) {
                    one.fields
                        .push(("access-control-request-headers".into(), "x-k".into()));
                }
            }
        }
        asks.push(one);
    }
    Setup {
        name: format!("filters-{seed}"),
        manager: json!({ "stat_prefix": "p", "server_name": "gate", "http_filters": filters }),
        table,
        asks,
        more: "",
        tls: None,
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn generated_faults_cors_compression_and_local_limits_answer_as_in_envoy() {
    let each = requests_each(40);
    if let Some((count, differences)) =
        compare_all(seeds(0..40, &[]), |seed| generated(seed, each), &[]).await
    {
        assert_none(count, &differences);
    }
}
