//! External authorization: what a service is told of a request, over gRPC and HTTP, and what its answers do.

use http::Response;
use http_body_util::Full;
use serde_json::{Value, json};
use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::envoy::service::auth::v3 as auth;
use serin_xds::pb::envoy::r#type::v3 as envoy_type;
use serin_xds::pb::google::protobuf as google;
use serin_xds::pb::google::rpc;
use tonic::Status;

use super::policies::{ask, every_end, filter};
use super::random::Rng;
use super::script::World;
use super::{Setup, assert_none, cluster, compare_all, requests_each, script, seeds};
use crate::fixture::Backend;

const AUTHZ: &str = "type.googleapis.com/envoy.extensions.filters.http.ext_authz.v3.ExtAuthz";
const PER_ROUTE: &str = "type.googleapis.com/envoy.extensions.filters.http.ext_authz.v3.ExtAuthzPerRoute";

fn names(rng: &mut Rng) -> Value {
    let patterns = rng.some(1, 3, |rng| match rng.below(4) {
        0 => json!({ "prefix": "x-" }),
        1 => json!({ "exact": rng.pick(&["x-k", "X-M", ":path", ":method", "cookie", "host"]) }),
        2 => json!({ "suffix": "k" }),
        _ => json!({ "safe_regex": { "regex": "[a-z-]*" }}),
    });
    json!({ "patterns": patterns })
}

/// `pack_as_bytes` is the filter's in Envoy, also where a route says something else.
fn with_body(rng: &mut Rng) -> Value {
    json!({
        "max_request_bytes": rng.pick(&[4, 16, 4096]),
        "allow_partial_message": rng.chance(50),
    })
}

/// What both kinds of services know.
fn common(rng: &mut Rng) -> Value {
    let mut out = json!({ "@type": AUTHZ, "transport_api_version": "V3" });
    let mut maybe = |rng: &mut Rng, percent: usize, name: &str, value: Value| {
        if rng.chance(percent) {
            out[name] = value;
        }
    };
    maybe(rng, 50, "failure_mode_allow", json!(true));
    maybe(rng, 50, "failure_mode_allow_header_add", json!(true));
    let mut body = with_body(rng);
    body["pack_as_bytes"] = json!(rng.chance(40));
    maybe(rng, 40, "with_request_body", body);
    maybe(rng, 30, "clear_route_cache", json!(true));
    let status = rng.pick(&["ServiceUnavailable", "BadGateway", "OK"]);
    maybe(rng, 40, "status_on_error", json!({ "code": status }));
    maybe(rng, 40, "validate_mutations", json!(true));
    let allowed = names(rng);
    maybe(rng, 30, "allowed_headers", allowed);
    let disallowed = names(rng);
    maybe(rng, 20, "disallowed_headers", disallowed);
    let rules =
        json!({ "disallow_expression": { "regex": "x-k|x-new" }, "disallow_is_error": rng.chance(50) });
    maybe(rng, 20, "decoder_header_mutation_rules", rules);
    out
}

fn over_grpc(rng: &mut Rng) -> Value {
    let mut out = common(rng);
    out["grpc_service"] = json!({ "envoy_grpc": { "cluster_name": "authz" }, "timeout": "1s" });
    let mut maybe = |rng: &mut Rng, percent: usize, name: &str, value: Value| {
        if rng.chance(percent) {
            out[name] = value;
        }
    };
    maybe(rng, 50, "metadata_context_namespaces", json!(["set", "none"]));
    maybe(rng, 40, "route_metadata_context_namespaces", json!(["set"]));
    maybe(rng, 50, "include_peer_certificate", json!(true));
    maybe(rng, 50, "include_tls_session", json!(true));
    maybe(rng, 20, "encode_raw_headers", json!(true));
    out
}

fn over_http(rng: &mut Rng) -> Value {
    let mut out = common(rng);
    let mut service = json!({ "server_uri": { "uri": "http://authz.test/base", "cluster": "authz-http", "timeout": "0.4s" } });
    if rng.chance(60) {
        service["path_prefix"] = json!(rng.pick(&["/check", "/c/"]));
    }
    if rng.chance(50) {
        let mut request = json!({});
        if rng.chance(60) {
            request["headers_to_add"] =
                json!([ { "key": rng.pick(&["x-added", "x-k", "authorization"]), "value": "%REQ(x-m)%v" } ]);
        }
        service["authorization_request"] = request;
    }
    let mut response = json!({});
    // What the service was asked is told to the endpoint and to the client.
    let with = |rng: &mut Rng| {
        let mut out = vec![json!({ "exact": "x-asked" })];
        out.extend(rng.some(
            0,
            2,
            |rng| json!({ "exact": rng.pick(&["x-k", "x-new", "x-multi", "set-cookie", "x-hidden"]) }),
        ));
        json!({ "patterns": out })
    };
    for name in [
        "allowed_upstream_headers",
        "allowed_upstream_headers_to_append",
        "allowed_client_headers",
        "allowed_client_headers_on_success",
        "dynamic_metadata_from_headers",
    ] {
        if name == "allowed_upstream_headers" || rng.chance(50) {
            response[name] = with(rng);
        }
    }
    service["authorization_response"] = response;
    out["http_service"] = service;
    // Envoy cannot ask without them.
    let patterns = out.pointer_mut("/disallowed_headers/patterns");
    if let Some(Value::Array(patterns)) = patterns {
        patterns.retain(|one| one["exact"] != ":path" && one["exact"] != ":method");
    }
    out
}

fn per_route(rng: &mut Rng, of_filter: Option<&Value>) -> Value {
    if rng.chance(20) {
        return json!({ "@type": PER_ROUTE, "disabled": true });
    }
    let mut settings = json!({});
    if rng.chance(70) {
        settings["context_extensions"] = json!({ "one": "1", "two": rng.pick(&["2", ""]) });
    }
    match rng.below(4) {
        0 => settings["disable_request_body_buffering"] = json!(true),
        1 => settings["with_request_body"] = of_filter.map_or_else(|| with_body(rng), Value::clone),
        _ => {}
    }
    json!({ "@type": PER_ROUTE, "check_settings": settings })
}

fn generated(world: &World, seed: u64, each: usize, grpc: bool) -> Setup {
    let mut rng = Rng::new(seed);
    let authz = if grpc {
        over_grpc(&mut rng)
    } else {
        over_http(&mut rng)
    };
    let set = json!({
        "@type": "type.googleapis.com/envoy.extensions.filters.http.set_metadata.v3.Config",
        "metadata": [ { "metadata_namespace": "set", "value": { "s": "v", "n": 5, "b": true } } ],
    });
    let mut table = every_end();
    for host in table["virtual_hosts"].as_array_mut().unwrap() {
        for route in host["routes"].as_array_mut().unwrap() {
            if rng.chance(30) {
                route["typed_per_filter_config"] =
                    json!({ "authz": per_route(&mut rng, authz.get("with_request_body")) });
            }
            if rng.chance(30) {
                route["metadata"] = json!({ "filter_metadata": { "set": { "r": "of-route" } } });
            }
        }
    }
    let fields = [
        ("x-k", "one"),
        ("x-k", "two"),
        ("x-m", "one"),
        ("x-m", ""),
        ("x-multi", "a"),
        ("cookie", "c=1"),
        ("cookie", "d=2"),
        ("content-type", "application/grpc"),
        ("content-type", "text/plain"),
        ("x-envoy-auth-partial-body", "forged"),
        ("authorization", "Basic x"),
        ("x-forwarded-for", "1.2.3.4"),
    ];
    let mut asks = Vec::new();
    for number in 0..each {
        let path = rng.pick(&[
            "/forward",
            "/forward/x",
            "/direct",
            "/redirect",
            "/missing",
            "/none",
        ]);
        let query = rng.pick(&["", "", "?q=1", "?q=1&r=2&q=3", "?e=%20x&r", "?"]);
        let mut some = rng.some(0, 4, |rng| rng.pick(&fields));
        let mut seen = std::collections::BTreeSet::new();
        some.retain(|(name, _)| matches!(*name, "x-k" | "x-multi") || seen.insert(*name));
        // What is no field is said to those only who look at it: what Envoy does with the rest is listed.
        let validates = authz.get("validate_mutations").is_some();
        let case = format!("{}{seed}-{number}", if validates { "zv" } else { "z" });
        let target = format!("{path}/{case}{query}");
        let mut one = ask(case, "a.test", &target, &some);
        if rng.chance(40) {
            one.method = rng.pick(&["POST", "PUT"]);
            one.body = "content".repeat(rng.pick(&[0, 1, 3]));
        }
        if grpc {
            one.who = rng.below(world.people().len());
        }
        asks.push(one);
    }
    Setup {
        name: format!("authz-{seed}"),
        manager: json!({ "stat_prefix": "p", "server_name": "gate", "http_filters": [
            filter("set", set), filter("authz", authz) ] }),
        table,
        asks,
        more: "%DYNAMIC_METADATA(envoy.filters.http.ext_authz:told)% %DYNAMIC_METADATA(envoy.filters.http.ext_authz:x-new)%",
        tls: grpc.then(|| world.tls()),
    }
}

/// What was asked, in one line.
fn told(question: &auth::CheckRequest) -> String {
    let all = question.attributes.clone().unwrap_or_default();
    let peer = |peer: Option<auth::attribute_context::Peer>| {
        let peer = peer.unwrap_or_default();
        format!(
            "service={} labels={} principal={} certificate={}",
            peer.service,
            sorted_labels(&peer),
            peer.principal,
            peer.certificate.len(),
        )
    };
    let request = all.request.clone().unwrap_or_default();
    let timed = request.time.as_ref().is_some_and(|time| time.seconds > 0);
    let http = request.http.unwrap_or_default();
    let fields = script::fields(
        http.headers
            .iter()
            .map(|(name, value)| (name.as_str(), value.clone())),
    );
    let raw = http.header_map.as_ref().map(|map| {
        script::fields(map.headers.iter().map(|field| {
            let value = if field.raw_value.is_empty() {
                field.value.clone()
            } else {
                String::from_utf8_lossy(&field.raw_value).into_owned()
            };
            (field.key.as_str(), value)
        }))
    });
    let out = format!(
        "from ({}) to ({}) timed={timed} id={} {} {} host={} scheme={} fragment={} query={} size={} {} body={:?} raw={:?} \
         fields=({fields}) map=({raw:?}) extensions=({}) metadata=({}) of-route=({}) tls={:?}",
        peer(all.source),
        peer(all.destination),
        !http.id.is_empty(),
        http.method,
        http.path,
        http.host,
        http.scheme,
        http.fragment,
        http.query,
        http.size,
        http.protocol,
        http.body,
        http.raw_body,
        script::sorted(&all.context_extensions.into_iter().collect()),
        script::metadata(all.metadata_context.as_ref()),
        script::metadata(all.route_metadata_context.as_ref()),
        all.tls_session.map(|session| session.sni),
    );
    script::field_text(&out)
}

fn sorted_labels(peer: &auth::attribute_context::Peer) -> String {
    let mut out: Vec<String> = peer
        .labels
        .iter()
        .map(|(name, value)| format!("{name}:{value}"))
        .collect();
    out.sort_unstable();
    out.join(",")
}

fn option(rng: &mut Rng, key: &str, value: &str) -> core::HeaderValueOption {
    let mut out = core::HeaderValueOption {
        header: None,
        append: rng.chance(30).then(|| google::BoolValue {
            value: rng.chance(50),
        }),
        append_action: rng.below(4) as i32,
        keep_empty_value: rng.chance(20),
    };
    // What a request has once is replaced.
    if key.starts_with(':') || key == "host" {
        (out.append, out.append_action) = (None, 2);
    }
    let how = match &out.append {
        Some(append) => format!("-{}", append.value),
        None => format!("-{}", out.append_action),
    };
    out.header = Some(core::HeaderValue {
        key: key.into(),
        value: if key.starts_with("x-") && !value.is_empty() {
            format!("{value}{how}")
        } else {
            value.into()
        },
        ..Default::default()
    });
    out
}

const CHANGES: [(&str, &str); 14] = [
    ("x-k", "changed"),
    ("x-k", "again"),
    ("x-new", "n"),
    ("X-New", "upper"),
    ("x-multi", "m"),
    ("x-empty", ""),
    ("cookie", "e=3"),
    ("host", "evil"),
    (":authority", "other.test"),
    (":path", "/forward/changed?y=1"),
    (":path", "/direct"),
    ("x-envoy-internal", "true"),
    ("bad name", "v"),
    ("x-bad", "a\nb"),
];

fn changes(rng: &mut Rng, most: usize, path: &str) -> Vec<core::HeaderValueOption> {
    rng.some(0, most, |rng| {
        // Those that are no fields are seldom.
        let count = if path.contains("/zv") && rng.chance(15) {
            CHANGES.len()
        } else {
            12
        };
        let (key, value) = CHANGES[rng.below(count)];
        option(rng, key, value)
    })
}

fn answer(question: &auth::CheckRequest) -> Option<Result<auth::CheckResponse, Status>> {
    let told = told(question);
    let request = question.attributes.clone()?.request?.http?;
    // By the path, which tells the case.
    let path = request.path.split('?').next()?;
    // Whoever asks whether the listener is there.
    if path == "/ready" {
        return Some(Ok(auth::CheckResponse::default()));
    }
    let mut rng = script::chosen_by(path);
    match rng.below(24) {
        0 => return Some(Err(Status::unavailable("not now"))),
        1 => return Some(Err(Status::permission_denied("no"))),
        2 if rng.chance(20) => return None,
        3 => return Some(Ok(auth::CheckResponse::default())),
        4 => {
            return Some(Ok(auth::CheckResponse {
                status: Some(rpc::Status {
                    code: rng.pick(&[7, 16, 14]),
                    ..Default::default()
                }),
                ..Default::default()
            }));
        }
        _ => {}
    }
    let asked = |rng: &mut Rng| core::HeaderValueOption {
        append: None,
        append_action: 2,
        header: Some(core::HeaderValue {
            key: "x-asked".into(),
            value: told.clone(),
            ..Default::default()
        }),
        ..option(rng, "x-asked", "")
    };
    let allows = rng.chance(65);
    let mut out = auth::CheckResponse {
        status: Some(rpc::Status {
            code: if allows { 0 } else { rng.pick(&[7, 7, 16]) },
            ..Default::default()
        }),
        ..Default::default()
    };
    if rng.chance(40) {
        let value = google::Value {
            kind: Some(google::value::Kind::StringValue("this".into())),
        };
        out.dynamic_metadata = Some(google::Struct {
            fields: [("told".to_owned(), value)].into_iter().collect(),
        });
    }
    out.http_response = Some(if allows {
        let mut headers = changes(&mut rng, 3, path);
        headers.push(asked(&mut rng));
        let parameter = |rng: &mut Rng| core::QueryParameter {
            key: rng.pick(&["q", "new", "r"]).into(),
            value: rng.pick(&["set", "", "a%20b"]).into(),
        };
        auth::check_response::HttpResponse::OkResponse(auth::OkHttpResponse {
            headers,
            headers_to_remove: rng.some(0, 2, |rng| {
                rng.pick(&[
                    "x-k", "x-multi", "x-absent", "host", ":path", "cookie", "bad name",
                ])
                .to_owned()
            }),
            response_headers_to_add: changes(&mut rng, 2, path)
                .into_iter()
                .filter(|one| {
                    !one.header
                        .as_ref()
                        .is_some_and(|header| header.key.starts_with(':'))
                })
                .collect(),
            query_parameters_to_set: if rng.chance(25) {
                rng.some(1, 2, parameter)
            } else {
                Vec::new()
            },
            query_parameters_to_remove: if rng.chance(25) {
                rng.some(1, 2, |rng| rng.pick(&["q", "r", "none"]).to_owned())
            } else {
                Vec::new()
            },
            ..Default::default()
        })
    } else {
        let mut headers: Vec<_> = changes(&mut rng, 3, path)
            .into_iter()
            .filter(|one| {
                !one.header
                    .as_ref()
                    .is_some_and(|header| header.key.starts_with(':'))
            })
            .collect();
        headers.push(asked(&mut rng));
        let status = rng.pick(&[0, 401, 403, 302, 503, 200, 418]);
        auth::check_response::HttpResponse::DeniedResponse(auth::DeniedHttpResponse {
            status: rng.chance(80).then_some(envoy_type::HttpStatus { code: status }),
            headers,
            body: rng.pick(&["", "because", "<html>"]).into(),
        })
    });
    script::tell(&told, &out);
    Some(Ok(out))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_authorization_service_over_grpc_is_told_the_same_and_obeyed_alike_by_envoy_and_serin_proxy() {
    let (each, world) = (requests_each(40), World::new());
    let (at, _served) = script::authorization(answer).await;
    let clusters = [script::grpc_cluster("authz", at)];
    let made = |seed| generated(&world, seed, each, true);
    if let Some((count, differences)) = compare_all(seeds(0..20, &[119]), made, &clusters).await {
        assert_none(count, &differences);
    }
}

/// An HTTP server that says what it was asked, and decides by it.
async fn http_service() -> Backend {
    Backend::answering(|seen| {
        let fields = script::fields(seen.headers.iter().map(|(name, value)| {
            (
                name.as_str(),
                String::from_utf8_lossy(value.as_bytes()).into_owned(),
            )
        }));
        let body = String::from_utf8_lossy(&seen.body);
        let told = script::field_text(&format!("{} {} {body:?} {fields}", seen.method, seen.path));
        let mut rng = script::chosen_by(seen.path.split('?').next().unwrap_or_default());
        let status: u16 = rng.pick(&[200, 200, 200, 200, 200, 401, 403, 302, 500, 503, 404, 204]);
        // Whoever asks whether the listener is there gets in.
        let status = if seen.path.ends_with("/ready") {
            200
        } else {
            status
        };
        let mut out = Response::builder().status(status).header("x-asked", told);
        let mut located = false;
        for (name, value) in rng.some(0, 3, |rng| {
            rng.pick(&[
                ("x-k", "changed"),
                ("x-new", "n"),
                ("x-new", "o"),
                ("x-multi", "m"),
                ("set-cookie", "s=1"),
                ("location", "/elsewhere"),
                ("x-hidden", "h"),
                ("www-authenticate", "Basic"),
            ])
        }) {
            // Of two places Envoy makes one that is none.
            if name != "location" || !std::mem::replace(&mut located, true) {
                out = out.header(name, value);
            }
        }
        if rng.chance(30) {
            out = out.header("content-type", "text/told");
        }
        let body = if status == 204 {
            ""
        } else {
            rng.pick(&["", "because"])
        };
        out.body(Full::from(body)).unwrap()
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_authorization_service_over_http_is_told_the_same_and_obeyed_alike_by_envoy_and_serin_proxy() {
    let (each, world) = (requests_each(40), World::new());
    let service = http_service().await;
    let clusters = [cluster("authz-http", service.address)];
    let made = |seed| generated(&world, seed, each, false);
    if let Some((count, differences)) = compare_all(seeds(0..20, &[119]), made, &clusters).await {
        assert_none(count, &differences);
    }
}
