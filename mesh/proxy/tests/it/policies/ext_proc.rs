//! External processing over gRPC streams, played by a service that answers as told.

use std::pin::Pin;
use std::sync::Arc;

use futures::Stream;
use parking_lot::Mutex;
use serin_xds::ResourceType;
use serin_xds::pb::envoy::extensions::filters::http::ext_proc::v3 as ext_proc;
use serin_xds::pb::envoy::extensions::filters::http::rbac::v3 as http_rbac;
use serin_xds::pb::envoy::service::ext_proc::v3 as service;
use service::external_processor_server::{ExternalProcessor, ExternalProcessorServer};
use service::{processing_request, processing_response};
use tonic::transport::Server;
use tonic::{Request as Call, Response as Reply, Status, Streaming};

use super::services::{Served, serve, service_cluster};
use super::*;

type Answers = dyn Fn(&service::ProcessingRequest) -> Option<service::ProcessingResponse> + Send + Sync;

/// Answers as told; `None` never answers.
struct Processor {
    seen: Arc<Mutex<Vec<service::ProcessingRequest>>>,
    answer: Arc<Answers>,
}

#[tonic::async_trait]
impl ExternalProcessor for Processor {
    type ProcessStream = Pin<Box<dyn Stream<Item = Result<service::ProcessingResponse, Status>> + Send>>;

    async fn process(
        &self,
        call: Call<Streaming<service::ProcessingRequest>>,
    ) -> Result<Reply<Self::ProcessStream>, Status> {
        let (seen, answer) = (self.seen.clone(), self.answer.clone());
        let answers = futures::stream::unfold(call.into_inner(), move |mut questions| {
            let (seen, answer) = (seen.clone(), answer.clone());
            async move {
                loop {
                    let question = questions.message().await.ok()??;
                    let answered = answer(&question);
                    seen.lock().push(question);
                    if let Some(answered) = answered {
                        return Some((Ok(answered), questions));
                    }
                }
            }
        });
        Ok(Reply::new(Box::pin(answers)))
    }
}

pub(super) fn over_grpc() -> ext_proc::ExternalProcessor {
    ext_proc::ExternalProcessor {
        grpc_service: Some(core::GrpcService {
            target_specifier: Some(core::grpc_service::TargetSpecifier::EnvoyGrpc(
                core::grpc_service::EnvoyGrpc {
                    cluster_name: "svc".into(),
                    ..Default::default()
                },
            )),
            ..Default::default()
        }),
        message_timeout: millis(5000),
        ..Default::default()
    }
}

pub(super) fn filter(message: &ext_proc::ExternalProcessor) -> hcm::HttpFilter {
    http_filter("envoy.filters.http.ext_proc", Some(any(message)))
}

async fn processed(
    message: &ext_proc::ExternalProcessor,
    hosts: Vec<route::VirtualHost>,
    answer: impl Fn(&service::ProcessingRequest) -> Option<service::ProcessingResponse> + Send + Sync + 'static,
) -> (
    Harness,
    Backend,
    SocketAddr,
    Arc<Mutex<Vec<service::ProcessingRequest>>>,
    Served,
) {
    let seen = Arc::default();
    let processor = Processor {
        seen: Arc::clone(&seen),
        answer: Arc::new(answer),
    };
    let (at_service, server) =
        serve(Server::builder().add_service(ExternalProcessorServer::new(processor))).await;
    let (harness, backend, at) = served(vec![filter(message)], hosts).await;
    service_cluster(&harness, at_service).await;
    (harness, backend, at, seen, server)
}

fn changing(set: &[(&str, &str)], remove: &[&str]) -> service::HeadersResponse {
    service::HeadersResponse {
        response: Some(service::CommonResponse {
            header_mutation: Some(service::HeaderMutation {
                set_headers: set.iter().map(|(key, value)| add_header(key, value)).collect(),
                remove_headers: remove.iter().map(|name| (*name).to_owned()).collect(),
            }),
            ..Default::default()
        }),
    }
}

fn answer(response: processing_response::Response) -> Option<service::ProcessingResponse> {
    Some(service::ProcessingResponse {
        response: Some(response),
        ..Default::default()
    })
}

/// Passes both heads unchanged.
pub(super) fn pass(question: &service::ProcessingRequest) -> Option<service::ProcessingResponse> {
    answer(match question.request.as_ref()? {
        processing_request::Request::RequestHeaders(_) => {
            processing_response::Response::RequestHeaders(changing(&[], &[]))
        }
        _ => processing_response::Response::ResponseHeaders(changing(&[], &[])),
    })
}

#[tokio::test]
async fn a_processor_sees_both_heads_of_a_request_on_one_stream_and_changes_them() {
    let (harness, mut backend, at, seen, _server) =
        processed(&over_grpc(), to_c(), |question| {
            match question.request.as_ref()? {
                processing_request::Request::RequestHeaders(_) => {
                    answer(processing_response::Response::RequestHeaders(changing(
                        &[("x-user", "bob"), (":path", "/changed?a=1"), ("host", "evil")],
                        &["x-secret"],
                    )))
                }
                _ => answer(processing_response::Response::ResponseHeaders(changing(
                    &[("x-checked", "yes"), (":status", "202")],
                    &["x-envoy-upstream-service-time"],
                ))),
            }
        })
        .await;
    let (status, headers, body) = get_with(at, "/a", &[("x-secret", "1"), ("x-id", "7")]).await;
    assert_eq!((status, &*body), (202, "ok"));
    assert_eq!(headers["x-checked"], "yes");
    assert!(
        headers.contains_key("x-envoy-upstream-service-time"),
        "not among what may be taken off"
    );
    let rejected = harness.counter("envoy_http_ext_proc_rejected_header_mutations", &[]);
    assert_eq!(rejected, 2.0);
    let request = backend.next().await;
    assert_eq!(
        (&*request.path, &request.headers["x-user"]),
        ("/changed?a=1", &"bob".parse().unwrap())
    );
    assert!(!request.headers.contains_key("x-secret"));
    assert_eq!(
        request.headers["host"], "reviews",
        "not among what may be changed"
    );
    let seen = seen.lock();
    let Some(processing_request::Request::RequestHeaders(head)) = &seen[0].request else {
        panic!("{:?}", seen[0]);
    };
    assert!(head.end_of_stream);
    let fields = &head.headers.as_ref().unwrap().headers;
    let field = |name: &str| {
        let found = fields.iter().find(|field| field.key == name);
        found.map(|field| String::from_utf8_lossy(&field.raw_value).into_owned())
    };
    assert_eq!(field(":path").as_deref(), Some("/a"));
    assert_eq!(field(":authority").as_deref(), Some("reviews"));
    assert_eq!(field("x-id").as_deref(), Some("7"));
    let Some(processing_request::Request::ResponseHeaders(head)) = &seen[1].request else {
        panic!("{:?}", seen[1]);
    };
    assert_eq!(head.headers.as_ref().unwrap().headers[0].key, ":status");
    assert!(!head.end_of_stream);
    // What will be sent is said once.
    assert!(seen[0].protocol_config.is_some() && seen[1].protocol_config.is_none());
}

/// Nobody passes.
fn deny_all() -> hcm::HttpFilter {
    let message = http_rbac::Rbac {
        rules: Some(Default::default()),
        ..Default::default()
    };
    http_filter("envoy.filters.http.rbac", Some(any(&message)))
}

fn direct(path: &str) -> route::Route {
    let mut route = prefix_route(path, route::RouteAction::default());
    route.action = Some(route::route::Action::DirectResponse(
        route::DirectResponseAction {
            status: 201,
            body: Some(core::DataSource {
                specifier: Some(core::data_source::Specifier::InlineString("made here".into())),
                ..Default::default()
            }),
            ..Default::default()
        },
    ));
    route
}

#[tokio::test]
async fn a_processor_sees_and_changes_what_the_proxy_answers_itself() {
    let hosts = vec![host(
        "all",
        "*",
        vec![direct("/direct"), prefix_route("/none", to_cluster("missing"))],
    )];
    let (mut harness, _backend, at, seen, _server) = processed(&over_grpc(), hosts.clone(), |question| {
        match question.request.as_ref()? {
            processing_request::Request::RequestHeaders(_) => pass(question),
            _ => answer(processing_response::Response::ResponseHeaders(changing(
                &[("x-checked", "yes"), (":status", "418")],
                &[],
            ))),
        }
    })
    .await;
    let status_seen = |index: usize| match &seen.lock()[index].request {
        Some(processing_request::Request::ResponseHeaders(head)) => {
            let field = head.headers.as_ref().unwrap().headers[0].clone();
            assert_eq!(field.key, ":status");
            String::from_utf8(field.raw_value).unwrap()
        }
        other => panic!("{other:?}"),
    };
    let (status, headers, body) = get(at, "/direct").await;
    assert_eq!(
        (status, &*body, &headers["x-checked"]),
        (418, "made here", &"yes".parse().unwrap())
    );
    assert_eq!(status_seen(1), "201");
    let (status, headers, _) = get(at, "/none").await;
    assert_eq!((status, &headers["x-checked"]), (418, &"yes".parse().unwrap()));
    assert_eq!(status_seen(3), "503");
    let line = harness.line().await;
    assert_eq!(
        (&line["response_code"], &line["response_flags"]),
        (&418.into(), &"NC".into())
    );
    // Denied by a filter after it, and by one before it, in which case it sees the response only.
    let processor = filter(&over_grpc());
    for (filters, messages) in [
        (vec![processor.clone(), deny_all()], 2),
        (vec![deny_all(), processor], 1),
    ] {
        let at = harness
            .listen(&manager_with(filters), core::TrafficDirection::Outbound)
            .await;
        let before = seen.lock().len();
        let (status, headers, body) = get(at, "/direct").await;
        assert_eq!(
            (status, &*body, &headers["x-checked"]),
            (418, "RBAC: access denied", &"yes".parse().unwrap())
        );
        assert_eq!(seen.lock().len(), before + messages);
        assert_eq!(status_seen(before + messages - 1), "403");
    }
    // One that does not want responses sees none of the proxy's either.
    let mut blind = over_grpc();
    blind.processing_mode = Some(ext_proc::ProcessingMode {
        response_header_mode: ext_proc::processing_mode::HeaderSendMode::Skip as i32,
        ..Default::default()
    });
    let at = harness
        .listen(
            &manager_with(vec![filter(&blind), deny_all()]),
            core::TrafficDirection::Outbound,
        )
        .await;
    assert_eq!(get(at, "/direct").await.0, 403);
}

#[tokio::test]
async fn several_processors_see_a_reply_in_turn_and_what_the_last_one_says_instead() {
    let hosts = vec![host("all", "*", vec![direct("/")])];
    let (harness, _backend, _at, seen, _server) = processed(&over_grpc(), hosts, |question| {
        match question.request.as_ref()? {
            processing_request::Request::RequestHeaders(_) => pass(question),
            processing_request::Request::ResponseHeaders(head) => {
                let status = &head.headers.as_ref()?.headers[0].raw_value;
                if &**status == b"201" {
                    return answer(processing_response::Response::ImmediateResponse(
                        service::ImmediateResponse {
                            status: Some(envoy_type::HttpStatus { code: 409 }),
                            body: b"instead".to_vec(),
                            ..Default::default()
                        },
                    ));
                }
                answer(processing_response::Response::ResponseHeaders(changing(
                    &[("x-seen", "409")],
                    &[],
                )))
            }
            _ => None,
        }
    })
    .await;
    let two = vec![filter(&over_grpc()), filter(&over_grpc())];
    let at = harness
        .listen(&manager_with(two), core::TrafficDirection::Outbound)
        .await;
    let (status, headers, body) = get(at, "/").await;
    assert_eq!(
        (status, &*body, &headers["x-seen"]),
        (409, "instead", &"409".parse().unwrap())
    );
    assert_eq!(seen.lock().len(), 4);
}

#[tokio::test]
async fn a_processor_answers_itself_before_and_after_the_upstream() {
    let immediate = |code: i32, body: &str| {
        answer(processing_response::Response::ImmediateResponse(
            service::ImmediateResponse {
                status: Some(envoy_type::HttpStatus { code }),
                headers: Some(service::HeaderMutation {
                    set_headers: vec![add_header("x-why", "because")],
                    ..Default::default()
                }),
                body: body.as_bytes().to_vec(),
                details: "not today".into(),
                ..Default::default()
            },
        ))
    };
    let (mut harness, backend, at, _seen, _server) = processed(&over_grpc(), to_c(), move |question| {
        match question.request.as_ref()? {
            processing_request::Request::RequestHeaders(head) => {
                let fields = &head.headers.as_ref()?.headers;
                let early = fields.iter().any(|field| field.raw_value == b"/early");
                if early {
                    immediate(503, "go away")
                } else {
                    pass(question)
                }
            }
            _ => immediate(409, "too late"),
        }
    })
    .await;
    let (status, headers, body) = get(at, "/early").await;
    assert_eq!(
        (status, &*body, &headers["x-why"]),
        (503, "go away", &"because".parse().unwrap())
    );
    assert_eq!(backend.hits(), 0);
    assert_eq!(harness.line().await["response_code_details"], "not_today");
    let (status, headers, body) = get(at, "/").await;
    assert_eq!(
        (status, &*body, &headers["x-why"]),
        (409, "too late", &"because".parse().unwrap())
    );
    assert_eq!(backend.hits(), 1);
}

#[tokio::test]
async fn a_processor_that_fails_or_says_nothing_fails_requests_unless_told_otherwise() {
    // Nobody listens.
    let (harness, _backend, at) = served(vec![filter(&over_grpc())], to_c()).await;
    service_cluster(&harness, closed_port().await).await;
    assert_eq!(get(at, "/").await.0, 500);
    let mut lenient = over_grpc();
    lenient.failure_mode_allow = true;
    let at = harness
        .listen(
            &manager_with(vec![filter(&lenient)]),
            core::TrafficDirection::Outbound,
        )
        .await;
    assert_eq!(get(at, "/").await.0, 200);
    assert_eq!(
        harness.counter("envoy_http_ext_proc_failure_mode_allowed", &[]),
        1.0
    );
    // It listens, and never answers.
    let mut hasty = over_grpc();
    hasty.message_timeout = millis(50);
    let (mut harness, _backend, at, _seen, _server) = processed(&hasty, to_c(), |_| None).await;
    assert_eq!(get(at, "/").await.0, 504);
    assert_eq!(
        harness.line().await["response_code_details"],
        "ext_proc_error_per-message_timeout_exceeded"
    );
    assert_eq!(harness.counter("envoy_http_ext_proc_message_timeouts", &[]), 1.0);
}

#[tokio::test]
async fn an_answer_to_something_else_is_a_failure() {
    let (mut harness, _backend, at, _seen, _server) = processed(&over_grpc(), to_c(), |_| {
        answer(processing_response::Response::ResponseHeaders(changing(&[], &[])))
    })
    .await;
    assert_eq!(get(at, "/").await.0, 500);
    assert_eq!(harness.line().await["response_code_details"], "spurious_message");
}

#[tokio::test]
async fn routes_choose_what_the_processor_sees_and_metadata_reaches_later_filters() {
    let mut silent = prefix_route("/off", to_cluster("c"));
    let per_route = |value| {
        [(
            "envoy.filters.http.ext_proc".to_owned(),
            any(&ext_proc::ExtProcPerRoute {
                r#override: Some(value),
            }),
        )]
        .into()
    };
    silent.typed_per_filter_config = per_route(ext_proc::ext_proc_per_route::Override::Disabled(true));
    let mut half = prefix_route("/half", to_cluster("c"));
    half.typed_per_filter_config = per_route(ext_proc::ext_proc_per_route::Override::Overrides(
        ext_proc::ExtProcOverrides {
            processing_mode: Some(ext_proc::ProcessingMode {
                request_header_mode: ext_proc::processing_mode::HeaderSendMode::Skip as i32,
                ..Default::default()
            }),
            ..Default::default()
        },
    ));
    let hosts = vec![host(
        "all",
        "*",
        vec![silent, half, prefix_route("/", to_cluster("c"))],
    )];
    let (_harness, _backend, at, seen, _server) = processed(&over_grpc(), hosts, pass).await;
    assert_eq!(get(at, "/off").await.0, 200);
    assert!(seen.lock().is_empty());
    assert_eq!(get(at, "/half").await.0, 200);
    assert!(matches!(
        seen.lock()[..],
        [service::ProcessingRequest {
            request: Some(processing_request::Request::ResponseHeaders(_)),
            ..
        }]
    ));
    assert_eq!(get(at, "/").await.0, 200);
    assert_eq!(seen.lock().len(), 3);
}

#[tokio::test]
async fn bodies_trailers_and_other_modes_are_refused_by_name() {
    let harness = Harness::start();
    let refused = async |message: ext_proc::ExternalProcessor| {
        let manager = manager_with(vec![filter(&message)]);
        let listener = listener_of("l", core::TrafficDirection::Outbound, vec![http_chain(&manager)]);
        harness
            .try_put(ResourceType::Listener, "l", &listener)
            .await
            .expect("refused")
    };
    let with = |change: fn(&mut ext_proc::ProcessingMode)| {
        let mut mode = ext_proc::ProcessingMode::default();
        change(&mut mode);
        ext_proc::ExternalProcessor {
            processing_mode: Some(mode),
            ..over_grpc()
        }
    };
    let cases = [
        (
            with(|mode| mode.request_body_mode = 2),
            "processing_mode.request_body_mode",
        ),
        (
            with(|mode| mode.response_body_mode = 1),
            "processing_mode.response_body_mode",
        ),
        (
            with(|mode| mode.response_trailer_mode = 1),
            "processing_mode.response_trailer_mode",
        ),
        (
            ext_proc::ExternalProcessor {
                deferred_close_timeout: millis(1),
                ..over_grpc()
            },
            "deferred_close_timeout",
        ),
        (
            ext_proc::ExternalProcessor {
                request_attributes: vec!["request.path".into(), "response.code".into()],
                ..over_grpc()
            },
            "request_attributes",
        ),
        (
            ext_proc::ExternalProcessor {
                grpc_service: None,
                ..over_grpc()
            },
            "grpc_service",
        ),
    ];
    for (message, field) in cases {
        let refusal = refused(message).await;
        assert!(refusal.contains(field), "{refusal}");
    }
}

#[tokio::test]
async fn a_processor_may_say_that_it_does_not_want_the_response_where_that_is_allowed() {
    for (allowed, modes, messages) in [
        (true, vec![], 1),
        (true, vec![ext_proc::ProcessingMode::default()], 2),
        (false, vec![], 2),
    ] {
        let filter = ext_proc::ExternalProcessor {
            allow_mode_override: allowed,
            allowed_override_modes: modes,
            ..over_grpc()
        };
        let (_harness, _backend, at, seen, _server) = processed(&filter, to_c(), |question| {
            let mut answered = pass(question)?;
            answered.mode_override = Some(ext_proc::ProcessingMode {
                response_header_mode: ext_proc::processing_mode::HeaderSendMode::Skip as i32,
                ..Default::default()
            });
            Some(answered)
        })
        .await;
        assert_eq!(get(at, "/a").await.0, 200);
        assert_eq!(seen.lock().len(), messages);
    }
}

#[tokio::test]
async fn attributes_are_told_beside_the_heads() {
    use serin_xds::pb::google::protobuf::value::Kind;
    let filter = ext_proc::ExternalProcessor {
        request_attributes: vec![
            "request.url_path".into(),
            "destination.port".into(),
            "request.referer".into(),
        ],
        response_attributes: vec!["response.code".into(), "xds.cluster_name".into()],
        ..over_grpc()
    };
    let (_harness, _backend, at, seen, _server) = processed(&filter, to_c(), pass).await;
    assert_eq!(get(at, "/a?b=1").await.0, 200);
    let seen = seen.lock();
    let told = |index: usize| {
        let fields = &seen[index].attributes["envoy.filters.http.ext_proc"].fields;
        let mut all: Vec<_> = fields
            .iter()
            .map(|(name, value)| (name.clone(), value.kind.clone().unwrap()))
            .collect();
        all.sort_by(|(a, _), (b, _)| a.cmp(b));
        all
    };
    assert_eq!(
        told(0),
        [
            (
                "destination.port".to_owned(),
                Kind::NumberValue(f64::from(at.port()))
            ),
            ("request.url_path".to_owned(), Kind::StringValue("/a".into())),
        ]
    );
    assert_eq!(
        told(1),
        [
            ("response.code".to_owned(), Kind::NumberValue(200.0)),
            ("xds.cluster_name".to_owned(), Kind::StringValue("c".into())),
        ]
    );
}

#[tokio::test]
async fn an_observing_processor_sees_both_heads_and_nobody_waits_for_it() {
    let filter = ext_proc::ExternalProcessor {
        observability_mode: true,
        deferred_close_timeout: millis(200),
        ..over_grpc()
    };
    // It answers nothing to the first, and something that must not be heeded to the second.
    let (harness, _backend, at, seen, _server) =
        processed(&filter, to_c(), |question| match question.request.as_ref()? {
            processing_request::Request::RequestHeaders(_) => None,
            _ => answer(processing_response::Response::ResponseHeaders(changing(
                &[(":status", "500")],
                &[],
            ))),
        })
        .await;
    assert_eq!(get(at, "/a").await.0, 200);
    soon("both heads", async {
        while seen.lock().len() < 2 {
            tokio::task::yield_now().await;
        }
    })
    .await;
    assert!(seen.lock().iter().all(|question| question.observability_mode));
    soon("the end of the stream", async {
        while harness.counter("envoy_http_ext_proc_stream_msgs_received", &[]) < 1.0 {
            tokio::task::yield_now().await;
        }
    })
    .await;
}
