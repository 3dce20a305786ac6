//! External processing of heads: what a service is told of requests and responses, and what its answers do.

use std::net::SocketAddr;
use std::pin::Pin;

use futures::Stream;
use serde_json::{Value, json};
use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::envoy::service::ext_proc::v3 as service;
use serin_xds::pb::envoy::r#type::v3 as envoy_type;
use serin_xds::pb::google::protobuf as google;
use service::external_processor_server::{ExternalProcessor, ExternalProcessorServer};
use service::processing_request::Request;
use service::processing_response::Response;
use tonic::transport::Server;
use tonic::{Status, Streaming};

use super::policies::{ask, every_end, filter};
use super::random::Rng;
use super::{Setup, assert_none, compare_all, requests_each, script, seeds};
use crate::policies::services::{Served, serve};

const PROC: &str = "type.googleapis.com/envoy.extensions.filters.http.ext_proc.v3.ExternalProcessor";
const PER_ROUTE: &str = "type.googleapis.com/envoy.extensions.filters.http.ext_proc.v3.ExtProcPerRoute";

/// What becomes of a message.
enum Said {
    Answer(Box<service::ProcessingResponse>),
    Fails(Status),
    Nothing,
    Ends,
}

struct Processor;

#[tonic::async_trait]
impl ExternalProcessor for Processor {
    type ProcessStream = Pin<Box<dyn Stream<Item = Result<service::ProcessingResponse, Status>> + Send>>;

    async fn process(
        &self,
        call: tonic::Request<Streaming<service::ProcessingRequest>>,
    ) -> Result<tonic::Response<Self::ProcessStream>, Status> {
        let state = (call.into_inner(), String::new(), false);
        let answers = futures::stream::unfold(state, |(mut questions, mut case, over)| async move {
            if over {
                return None;
            }
            loop {
                let question = questions.message().await.ok()??;
                if let Some(named) = case_of(&question) {
                    case = named;
                }
                match answer(&question, &case) {
                    Said::Answer(answer) => return Some((Ok(*answer), (questions, case, false))),
                    Said::Fails(status) => return Some((Err(status), (questions, case, true))),
                    Said::Nothing => {}
                    Said::Ends => return None,
                }
            }
        });
        Ok(tonic::Response::new(Box::pin(answers)))
    }
}

async fn processor() -> (SocketAddr, Served) {
    serve(Server::builder().add_service(ExternalProcessorServer::new(Processor))).await
}

fn value_of(field: &core::HeaderValue) -> String {
    if field.raw_value.is_empty() {
        field.value.clone()
    } else {
        String::from_utf8_lossy(&field.raw_value).into_owned()
    }
}

fn case_of(question: &service::ProcessingRequest) -> Option<String> {
    let Some(Request::RequestHeaders(head)) = &question.request else {
        return None;
    };
    let fields = &head.headers.as_ref()?.headers;
    fields.iter().find(|field| field.key == "x-case").map(value_of)
}

/// What was told, in one line.
fn told(question: &service::ProcessingRequest) -> String {
    let (about, head) = match &question.request {
        Some(Request::RequestHeaders(head)) => ("request", head.clone()),
        Some(Request::ResponseHeaders(head)) => ("response", head.clone()),
        other => return script::field_text(&format!("{other:?}")),
    };
    let all = head.headers.unwrap_or_default().headers;
    // When, how long it took and how long it is differ from proxy to proxy.
    let fields = script::fields(
        all.iter()
            .filter(|field| {
                about == "request"
                    || !matches!(
                        &*field.key,
                        "date"
                            | "x-envoy-upstream-service-time"
                            | "x-serin-response-flags"
                            | "content-length"
                            | "connection"
                    )
            })
            .map(|field| (field.key.as_str(), value_of(field))),
    );
    let mut attributes: Vec<String> = question
        .attributes
        .iter()
        .map(|(name, fields)| format!("{name}:{}", script::of_struct(fields)))
        .collect();
    attributes.sort_unstable();
    let out = format!(
        "{about} ends={} fields=({fields}) attributes={attributes:?} metadata=({}) config={:?} observes={}",
        head.end_of_stream,
        script::metadata(question.metadata_context.as_ref()),
        question.protocol_config.is_some(),
        question.observability_mode,
    );
    script::field_text(&out)
}

const CHANGES: [(&str, &str); 16] = [
    ("x-k", "changed"),
    ("x-k", "again"),
    ("x-new", "n"),
    ("X-New", "upper"),
    ("x-multi", "m"),
    ("x-secret", "t"),
    ("x-empty", ""),
    ("cookie", "e=3"),
    ("host", "evil"),
    (":authority", "other.test"),
    (":path", "/forward/changed?y=1"),
    (":status", "418"),
    ("x-envoy-own", "o"),
    ("bad name", "v"),
    ("x-bad", "a\nb"),
    (":status", "none"),
];

fn option(rng: &mut Rng, key: &str, value: &str) -> core::HeaderValueOption {
    let mut out = core::HeaderValueOption {
        header: None,
        append: rng.chance(30).then(|| google::BoolValue {
            value: rng.chance(50),
        }),
        append_action: rng.below(4) as i32,
        keep_empty_value: rng.chance(20),
    };
    // What a head has once is replaced.
    if key.starts_with(':') || key == "host" {
        (out.append, out.append_action) = (None, 2);
    }
    let how = match &out.append {
        Some(append) => format!("-{}", append.value),
        None => format!("-{}", out.append_action),
    };
    let value = if key.starts_with("x-") && !value.is_empty() {
        format!("{value}{how}")
    } else {
        value.into()
    };
    out.header = Some(core::HeaderValue {
        key: key.into(),
        raw_value: value.into_bytes(),
        ..Default::default()
    });
    out
}

/// What cannot be done is asked for only where the message is not an answer to the client: of that one Envoy does a part.
fn mutation(rng: &mut Rng, asked: (&str, &str), immediate: bool) -> service::HeaderMutation {
    let mut set_headers = rng.some(0, 3, |rng| {
        // Those that are no fields are seldom.
        let count = if !immediate && rng.chance(15) {
            CHANGES.len()
        } else {
            13
        };
        let (key, value) = CHANGES[rng.below(count)];
        option(rng, key, value)
    });
    set_headers.push(core::HeaderValueOption {
        header: Some(core::HeaderValue {
            key: asked.0.into(),
            raw_value: asked.1.as_bytes().to_vec(),
            ..Default::default()
        }),
        append_action: 2,
        ..Default::default()
    });
    service::HeaderMutation {
        set_headers,
        remove_headers: rng
            .some(0, 2, |rng| {
                rng.pick(&[
                    "x-k",
                    "x-multi",
                    "x-absent",
                    "x-secret",
                    "cookie",
                    "host",
                    ":path",
                    "x-envoy-own",
                    "bad name",
                ])
                .to_owned()
            })
            .into_iter()
            .filter(|name| !immediate || name != "bad name")
            .collect(),
    }
}

fn answer(question: &service::ProcessingRequest, case: &str) -> Said {
    let told = told(question);
    let is_request = matches!(question.request, Some(Request::RequestHeaders(_)));
    // Where the request was not shown, by what is.
    let by = if case.is_empty() { &told } else { case };
    let mut rng = script::chosen_by(&format!("{by} {is_request}"));
    match rng.below(30) {
        0 => return Said::Fails(Status::unavailable("not now")),
        1 => return Said::Fails(Status::permission_denied("no")),
        2 if rng.chance(20) => return Said::Nothing,
        3 => return Said::Ends,
        _ => {}
    }
    let asked = if is_request { "x-asked" } else { "x-answered" };
    let mut out = service::ProcessingResponse::default();
    if rng.chance(25) {
        let value = google::Value {
            kind: Some(google::value::Kind::StructValue(google::Struct {
                fields: [(
                    "told".to_owned(),
                    google::Value {
                        kind: Some(google::value::Kind::StringValue("this".into())),
                    },
                )]
                .into_iter()
                .collect(),
            })),
        };
        let namespace = rng.pick(&["taken", "refused"]);
        out.dynamic_metadata = Some(google::Struct {
            fields: [(namespace.to_owned(), value)].into_iter().collect(),
        });
    }
    let common = |rng: &mut Rng| service::HeadersResponse {
        response: Some(service::CommonResponse {
            header_mutation: Some(mutation(rng, (asked, &told), false)),
            clear_route_cache: rng.chance(30),
            ..Default::default()
        }),
    };
    out.response = Some(match rng.below(20) {
        // Of something else.
        0 if is_request => Response::ResponseHeaders(common(&mut rng)),
        0 => Response::RequestHeaders(common(&mut rng)),
        1..=3 => {
            let status = rng.pick(&[200, 401, 403, 302, 503, 429]);
            Response::ImmediateResponse(service::ImmediateResponse {
                status: Some(envoy_type::HttpStatus { code: status }),
                headers: rng.chance(70).then(|| mutation(&mut rng, (asked, &told), true)),
                body: rng.pick(&["", "because", "<html>"]).into(),
                grpc_status: rng.chance(40).then_some(service::GrpcStatus { status: 9 }),
                details: rng.pick(&["", "why", "why not"]).into(),
            })
        }
        4 => {
            let empty = service::HeadersResponse::default();
            if is_request {
                Response::RequestHeaders(empty)
            } else {
                Response::ResponseHeaders(empty)
            }
        }
        _ if is_request => Response::RequestHeaders(common(&mut rng)),
        _ => Response::ResponseHeaders(common(&mut rng)),
    });
    if rng.chance(15) {
        use serin_xds::pb::envoy::extensions::filters::http::ext_proc::v3 as config;
        out.mode_override = Some(config::ProcessingMode {
            response_header_mode: config::processing_mode::HeaderSendMode::Skip as i32,
            ..Default::default()
        });
    }
    script::tell(&format!("{case} {told}"), &out);
    Said::Answer(Box::new(out))
}

fn names(rng: &mut Rng) -> Value {
    // The case is always told: what is answered depends on it.
    let mut patterns = vec![json!({ "exact": "x-case" })];
    patterns.extend(rng.some(1, 3, |rng| match rng.below(3) {
        0 => json!({ "prefix": ":" }),
        1 => json!({ "exact": rng.pick(&["x-k", "x-multi", "cookie", "host", "x-secret"]) }),
        _ => json!({ "safe_regex": { "regex": "[a-z-]*" }}),
    }));
    json!({ "patterns": patterns })
}

fn mode(rng: &mut Rng) -> Value {
    json!({
        "request_header_mode": rng.pick(&["DEFAULT", "SEND", "SEND", "SEND"]),
        "response_header_mode": rng.pick(&["DEFAULT", "SEND", "SKIP"]),
        "request_trailer_mode": "SKIP",
        "response_trailer_mode": "SKIP",
    })
}

fn generated(seed: u64, each: usize) -> Setup {
    let mut rng = Rng::new(seed);
    let mut proc = json!({
        "@type": PROC,
        "grpc_service": { "envoy_grpc": { "cluster_name": "proc" } },
        "message_timeout": "1s",
        "processing_mode": mode(&mut rng),
    });
    let mut maybe = |rng: &mut Rng, percent: usize, name: &str, value: Value| {
        if rng.chance(percent) {
            proc[name] = value;
        }
    };
    maybe(&mut rng, 50, "failure_mode_allow", json!(true));
    maybe(&mut rng, 20, "disable_immediate_response", json!(true));
    maybe(&mut rng, 30, "allow_mode_override", json!(true));
    let action = rng.pick(&["CLEAR", "RETAIN"]);
    maybe(&mut rng, 30, "route_cache_action", json!(action));
    let mut rules = json!({});
    for flag in [
        "allow_all_routing",
        "allow_envoy",
        "disallow_system",
        "disallow_all",
        "none",
    ] {
        if rng.chance(25) && flag != "none" {
            rules[flag] = json!(true);
        }
    }
    if rng.chance(30) {
        rules["allow_expression"] = json!({ "regex": "x-(asked|answered|k)" });
    }
    if rng.chance(30) {
        rules["disallow_expression"] = json!({ "regex": "x-k|cookie" });
    }
    maybe(&mut rng, 50, "mutation_rules", rules);
    let mut forward = json!({});
    if rng.chance(60) {
        forward["allowed_headers"] = names(&mut rng);
    }
    if rng.chance(30) {
        forward["disallowed_headers"] =
            json!({ "patterns": [ { "exact": rng.pick(&["x-k", ":path", "cookie"]) } ] });
    }
    maybe(&mut rng, 40, "forward_rules", forward);
    maybe(
        &mut rng,
        30,
        "request_attributes",
        json!(["request.path", "request.method", "request.host"]),
    );
    maybe(
        &mut rng,
        30,
        "response_attributes",
        json!(["response.code", "xds.cluster_name"]),
    );
    maybe(
        &mut rng,
        50,
        "metadata_options",
        json!({ "forwarding_namespaces": { "untyped": ["set", "none"] }, "receiving_namespaces": { "untyped": ["taken"] } }),
    );
    let status = rng.pick(&["ServiceUnavailable", "Forbidden"]);
    maybe(&mut rng, 30, "status_on_error", json!({ "code": status }));
    let set = json!({
        "@type": "type.googleapis.com/envoy.extensions.filters.http.set_metadata.v3.Config",
        "metadata": [ { "metadata_namespace": "set", "value": { "s": "v", "n": 5, "b": true } } ],
    });
    let mut table = every_end();
    for host in table["virtual_hosts"].as_array_mut().unwrap() {
        for route in host["routes"].as_array_mut().unwrap() {
            match rng.below(8) {
                0 => {
                    route["typed_per_filter_config"] =
                        json!({ "proc": { "@type": PER_ROUTE, "disabled": true } });
                }
                1 => {
                    route["typed_per_filter_config"] = json!({ "proc": { "@type": PER_ROUTE, "overrides": { "processing_mode": mode(&mut rng) } } });
                }
                _ => {}
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
        ("content-type", "application/grpc"),
        ("x-envoy-own", "mine"),
        ("x-forwarded-for", "1.2.3.4"),
        ("x-want", "503"),
        ("x-want", "204"),
    ];
    let mut asks = Vec::new();
    for number in 0..each {
        let path = rng.pick(&[
            "/forward",
            "/forward/x?q=1",
            "/direct",
            "/redirect?r",
            "/missing",
            "/none",
        ]);
        let mut some = rng.some(0, 4, |rng| rng.pick(&fields));
        let mut seen = std::collections::BTreeSet::new();
        some.retain(|(name, _)| matches!(*name, "x-k" | "x-multi") || seen.insert(*name));
        let mut one = ask(format!("e{seed}-{number}"), "a.test", path, &some);
        match rng.below(10) {
            0..=2 => {
                one.method = "POST";
                one.body = "content".into();
            }
            3 => one.method = "HEAD",
            _ => {}
        }
        asks.push(one);
    }
    Setup {
        name: format!("proc-{seed}"),
        manager: json!({ "stat_prefix": "p", "server_name": "gate", "http_filters": [
            filter("set", set), filter("proc", proc) ] }),
        table,
        asks,
        more: "%DYNAMIC_METADATA(taken:told)% %DYNAMIC_METADATA(refused:told)%",
        tls: None,
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_processor_of_heads_is_told_the_same_and_obeyed_alike_by_envoy_and_serin_proxy() {
    let each = requests_each(40);
    let (at, _served) = processor().await;
    let clusters = [script::grpc_cluster("proc", at)];
    if let Some((count, differences)) =
        compare_all(seeds(0..20, &[118, 124]), |seed| generated(seed, each), &clusters).await
    {
        assert_none(count, &differences);
    }
}
