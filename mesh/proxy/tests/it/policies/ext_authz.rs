//! External authorisation over gRPC and HTTP.

use http::{Request, Response};
use serin_xds::pb::envoy::extensions::filters::http::{buffer::v3 as buffer, ext_authz::v3 as authz};
use serin_xds::pb::envoy::service::auth::v3 as auth;
use serin_xds::pb::google::rpc;
use tonic::transport::Server;

use super::services::{Asked, serve, service_cluster};
use super::*;
use crate::failure::told;

pub(super) fn over_grpc() -> authz::ExtAuthz {
    authz::ExtAuthz {
        services: Some(authz::ext_authz::Services::GrpcService(core::GrpcService {
            target_specifier: Some(core::grpc_service::TargetSpecifier::EnvoyGrpc(
                core::grpc_service::EnvoyGrpc {
                    cluster_name: "svc".into(),
                    ..Default::default()
                },
            )),
            timeout: millis(5000),
            ..Default::default()
        })),
        ..Default::default()
    }
}

fn over_http() -> authz::ExtAuthz {
    authz::ExtAuthz {
        services: Some(authz::ext_authz::Services::HttpService(authz::HttpService {
            server_uri: Some(core::HttpUri {
                uri: "http://authz.example/".into(),
                timeout: millis(5000),
                http_upstream_type: Some(core::http_uri::HttpUpstreamType::Cluster("svc".into())),
            }),
            path_prefix: "/check".into(),
            authorization_response: Some(authz::AuthorizationResponse {
                allowed_upstream_headers: Some(matcher::ListStringMatcher {
                    patterns: vec![exact("x-user")],
                }),
                allowed_client_headers_on_success: Some(matcher::ListStringMatcher {
                    patterns: vec![exact("set-cookie")],
                }),
                ..Default::default()
            }),
            ..Default::default()
        })),
        ..Default::default()
    }
}

pub(super) fn filter(message: &authz::ExtAuthz) -> hcm::HttpFilter {
    http_filter("envoy.filters.http.ext_authz", Some(any(message)))
}

pub(super) fn allowed(ok: auth::OkHttpResponse) -> auth::CheckResponse {
    auth::CheckResponse {
        status: Some(rpc::Status::default()),
        http_response: Some(auth::check_response::HttpResponse::OkResponse(ok)),
        ..Default::default()
    }
}

pub(super) fn denied(code: i32, body: &str) -> auth::CheckResponse {
    auth::CheckResponse {
        status: Some(rpc::Status {
            code: 7,
            ..Default::default()
        }),
        http_response: Some(auth::check_response::HttpResponse::DeniedResponse(
            auth::DeniedHttpResponse {
                status: Some(envoy_type::HttpStatus { code }),
                headers: vec![add_header("x-why", "because")],
                body: body.into(),
            },
        )),
        ..Default::default()
    }
}

fn post(path: &str, body: &str) -> Request<Full<bytes::Bytes>> {
    Request::post(path)
        .header("host", "reviews")
        .header("x-id", "7")
        .body(Full::from(body.to_owned()))
        .unwrap()
}

/// The request that a service is asked about.
pub(super) fn http_of(question: &auth::CheckRequest) -> auth::attribute_context::HttpRequest {
    let request = question.attributes.clone().unwrap().request.unwrap();
    request.http.unwrap()
}

#[tokio::test]
async fn changes_that_are_invalid_or_not_allowed_are_left_out_or_fail_the_request() {
    use serin_xds::pb::envoy::config::common::mutation_rules::v3 as rules;
    let service = Asked::new(|question: &auth::CheckRequest| {
        let http = http_of(question);
        Ok(match &*http.path {
            "/bad" => allowed(auth::OkHttpResponse {
                headers: vec![add_header("x-bad", "a\nb")],
                ..Default::default()
            }),
            "/query" => allowed(auth::OkHttpResponse {
                query_parameters_to_set: vec![core::QueryParameter {
                    key: "a".into(),
                    value: "b c".into(),
                }],
                ..Default::default()
            }),
            _ => allowed(auth::OkHttpResponse {
                headers: vec![add_header("x-user", "bob"), add_header("x-secret", "1")],
                headers_to_remove: vec!["x-id".into(), "x-keep".into()],
                ..Default::default()
            }),
        })
    });
    let (at_service, _server) =
        serve(Server::builder().add_service(auth::authorization_server::AuthorizationServer::new(service)))
            .await;
    let regex = |text: &str| {
        Some(matcher::RegexMatcher {
            regex: text.into(),
            ..Default::default()
        })
    };
    let mut message = over_grpc();
    message.validate_mutations = true;
    let restricted = rules::HeaderMutationRules {
        disallow_expression: regex("x-secret|x-keep"),
        ..Default::default()
    };
    message.decoder_header_mutation_rules = Some(restricted.clone());
    let (mut harness, mut backend, at) = served(vec![filter(&message)], to_c()).await;
    service_cluster(&harness, at_service).await;
    let fields = [("x-id", "7"), ("x-keep", "8")];
    assert_eq!(get_with(at, "/", &fields).await.0, 200);
    let request = backend.next().await;
    assert_eq!(request.headers["x-user"], "bob");
    assert_eq!(request.headers["x-keep"], "8");
    assert!(!request.headers.contains_key("x-id") && !request.headers.contains_key("x-secret"));
    for path in ["/bad", "/query"] {
        assert_eq!(get(at, path).await.0, 500, "{path}");
        assert_eq!(harness.line().await["response_code_details"], "ext_authz_invalid");
    }
    assert_eq!(harness.counter("envoy_http_ext_authz_invalid", &[]), 2.0);
    let mut strict = restricted;
    strict.disallow_is_error = Some(google::BoolValue { value: true });
    message.decoder_header_mutation_rules = Some(strict);
    let at = harness
        .listen(
            &manager_with(vec![filter(&message)]),
            core::TrafficDirection::Outbound,
        )
        .await;
    assert_eq!(get(at, "/").await.0, 500);
}

#[tokio::test]
async fn a_service_is_told_fields_as_they_came_where_it_wants_that() {
    let service = Asked::new(|_: &auth::CheckRequest| Ok(allowed(auth::OkHttpResponse::default())));
    let seen = service.seen.clone();
    let (at_service, _server) =
        serve(Server::builder().add_service(auth::authorization_server::AuthorizationServer::new(service)))
            .await;
    let mut message = over_grpc();
    message.encode_raw_headers = true;
    let (harness, _backend, at) = served(vec![filter(&message)], to_c()).await;
    service_cluster(&harness, at_service).await;
    assert_eq!(get_with(at, "/a", &[("x-id", "7"), ("x-id", "8")]).await.0, 200);
    let question = seen.lock()[0].clone();
    let http = question.attributes.unwrap().request.unwrap().http.unwrap();
    assert!(http.headers.is_empty());
    let all = http.header_map.unwrap().headers;
    let values = |name: &str| -> Vec<String> {
        all.iter()
            .filter(|field| field.key == name)
            .map(|field| String::from_utf8(field.raw_value.clone()).unwrap())
            .collect()
    };
    assert_eq!(values("x-id"), ["7", "8"]);
    assert_eq!(values(":path"), ["/a"]);
    assert_eq!(values(":authority"), ["reviews"]);
}

#[tokio::test]
async fn a_grpc_service_sees_the_request_and_decides_and_changes_it() {
    let service = Asked::new(|question: &auth::CheckRequest| {
        let http = http_of(question);
        Ok(match &*http.path {
            "/no" => denied(401, "who are you"),
            _ => allowed(auth::OkHttpResponse {
                headers: vec![add_header("x-user", "bob")],
                headers_to_remove: vec!["x-id".into()],
                response_headers_to_add: vec![add_header("x-checked", "yes")],
                query_parameters_to_remove: vec!["secret".into()],
                ..Default::default()
            }),
        })
    });
    let seen = service.seen.clone();
    let (at_service, _server) =
        serve(Server::builder().add_service(auth::authorization_server::AuthorizationServer::new(service)))
            .await;
    let mut message = over_grpc();
    message.with_request_body = Some(authz::BufferSettings {
        max_request_bytes: 4,
        allow_partial_message: true,
        pack_as_bytes: false,
    });
    message.route_metadata_context_namespaces = vec!["shop".into(), "none".into()];
    let mut route = prefix_route("/", to_cluster("c"));
    let noted = |tier: &str| string_struct(&[("tier", tier)]);
    route.metadata = Some(core::Metadata {
        filter_metadata: [("shop".to_owned(), noted("free")), ("own".to_owned(), noted("x"))].into(),
        ..Default::default()
    });
    route.typed_per_filter_config = [(
        "envoy.filters.http.ext_authz".to_owned(),
        any(&authz::ExtAuthzPerRoute {
            r#override: Some(authz::ext_authz_per_route::Override::CheckSettings(
                authz::CheckSettings {
                    context_extensions: [("route".to_owned(), "main".to_owned())].into(),
                    ..Default::default()
                },
            )),
        }),
    )]
    .into();
    let (mut harness, mut backend, at) =
        served(vec![filter(&message)], vec![host("all", "*", vec![route])]).await;
    service_cluster(&harness, at_service).await;

    let (status, headers, _) = send(at, post("/yes?a=1&secret=2", "0123456789")).await;
    assert_eq!((status, headers["x-checked"].as_bytes()), (200, &b"yes"[..]));
    let request = backend.next().await;
    assert_eq!(
        (&*request.path, &request.body[..]),
        ("/yes?a=1", &b"0123456789"[..]),
        "the body goes on whole"
    );
    assert_eq!(request.headers["x-user"], "bob");
    assert!(!request.headers.contains_key("x-id"));
    let question = seen.lock()[0].attributes.clone().unwrap();
    let http = question.request.unwrap().http.unwrap();
    assert_eq!(
        (&*http.method, &*http.host, &*http.body),
        ("POST", "reviews", "0123")
    );
    assert_eq!(
        (
            &*http.headers["x-id"],
            &*http.headers["x-envoy-auth-partial-body"]
        ),
        ("7", "true")
    );
    assert_eq!(question.context_extensions["route"], "main");
    let of_route = question.route_metadata_context.unwrap().filter_metadata;
    assert_eq!(of_route, [("shop".to_owned(), noted("free"))].into());

    let (status, headers, body) = send(at, post("/no", "")).await;
    assert_eq!(
        (status, headers["x-why"].as_bytes(), &*body),
        (401, &b"because"[..], "who are you")
    );
    assert_eq!(backend.hits(), 1);
    let line = harness.line().await;
    assert_eq!(
        (&line["response_flags"], &line["response_code_details"]),
        (&"UAEX".into(), &"ext_authz_denied".into())
    );
    assert_eq!(harness.counter("envoy_http_ext_authz_denied", &[]), 1.0);
}

#[tokio::test]
async fn an_http_service_allows_with_200_and_its_other_answers_reach_the_client() {
    let (harness, mut backend, at) = served(vec![filter(&over_http())], to_c()).await;
    let mut service = Backend::answering(|seen| {
        let mut response = Response::new(Full::from("go away"));
        let headers = response.headers_mut();
        headers.insert("x-user", "bob".parse().unwrap());
        headers.insert("set-cookie", "a=b".parse().unwrap());
        if seen.path.ends_with("/no") {
            *response.status_mut() = http::StatusCode::UNAUTHORIZED;
        }
        response
    })
    .await;
    harness.cluster("svc", &[service.address]).await;
    let (status, headers, _) = get_with(at, "/yes?a=1", &[("authorization", "t"), ("x-other", "1")]).await;
    assert_eq!((status, headers["set-cookie"].as_bytes()), (200, &b"a=b"[..]));
    assert_eq!(backend.next().await.headers["x-user"], "bob");
    let asked = service.next().await;
    assert_eq!(
        (&*asked.path, asked.headers["authorization"].as_bytes()),
        ("/check/yes?a=1", &b"t"[..])
    );
    assert!(!asked.headers.contains_key("x-other"), "only what is allowed");
    let (status, _, body) = get(at, "/no").await;
    assert_eq!((status, &*body), (401, "go away"));
    assert_eq!(backend.hits(), 1);
}

#[tokio::test]
async fn a_failing_service_denies_or_allows_as_configured() {
    let (harness, mut backend, at) = served(vec![filter(&over_grpc())], to_c()).await;
    assert_eq!(get(at, "/").await.0, 403, "no cluster");
    let mut message = over_grpc();
    message.status_on_error = Some(envoy_type::HttpStatus { code: 503 });
    let at = harness
        .listen(
            &manager_with(vec![filter(&message)]),
            core::TrafficDirection::Outbound,
        )
        .await;
    service_cluster(&harness, closed_port().await).await;
    assert_eq!(get(at, "/").await.0, 503);
    assert_eq!(backend.hits(), 0);
    message.failure_mode_allow = true;
    message.failure_mode_allow_header_add = true;
    let at = harness
        .listen(
            &manager_with(vec![filter(&message)]),
            core::TrafficDirection::Outbound,
        )
        .await;
    assert_eq!(get(at, "/").await.0, 200);
    assert_eq!(
        backend.next().await.headers["x-envoy-auth-failure-mode-allowed"],
        "true"
    );
}

#[tokio::test]
async fn a_route_asks_nobody_where_it_says_so() {
    let mut free = prefix_route("/free", to_cluster("c"));
    free.typed_per_filter_config = [(
        "envoy.filters.http.ext_authz".to_owned(),
        any(&authz::ExtAuthzPerRoute {
            r#override: Some(authz::ext_authz_per_route::Override::Disabled(true)),
        }),
    )]
    .into();
    let hosts = vec![host("all", "*", vec![free, prefix_route("/", to_cluster("c"))])];
    let (_harness, _backend, at) = served(vec![filter(&over_grpc())], hosts).await;
    assert_eq!(get(at, "/free").await.0, 200);
    assert_eq!(get(at, "/").await.0, 403);
}

#[tokio::test]
async fn a_body_over_the_limit_is_refused_with_413() {
    let mut message = over_grpc();
    message.with_request_body = Some(authz::BufferSettings {
        max_request_bytes: 4,
        ..Default::default()
    });
    let (_harness, backend, at) = served(vec![filter(&message)], to_c()).await;
    assert_eq!(send(at, post("/", "01234")).await.0, 413);
    let hold = http_filter(
        "envoy.filters.http.buffer",
        Some(any(&buffer::Buffer {
            max_request_bytes: number(4),
        })),
    );
    assert_eq!(backend.hits(), 0);
    let (_harness, mut backend, at) = served(vec![hold], to_c()).await;
    assert_eq!(send(at, post("/", "01234")).await.0, 413);
    let chunked = b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\nconnection: close\r\n\r\n2\r\nab\r\n2\r\ncd\r\n0\r\n\r\n";
    let answer = raw(at, chunked).await;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    let request = backend.next().await;
    assert_eq!(
        (&request.body[..], request.headers["content-length"].as_bytes()),
        (&b"abcd"[..], &b"4"[..])
    );
}

#[tokio::test]
async fn a_body_that_stalls_while_a_filter_holds_it_is_answered_408() {
    let mut asking = over_grpc();
    asking.with_request_body = Some(authz::BufferSettings {
        max_request_bytes: 100,
        ..Default::default()
    });
    let hold = http_filter(
        "envoy.filters.http.buffer",
        Some(any(&buffer::Buffer {
            max_request_bytes: number(100),
        })),
    );
    for held in [hold, filter(&asking)] {
        let mut harness = Harness::start();
        let backend = Backend::named("ok").await;
        harness.cluster("c", &[backend.address]).await;
        harness.routes(to_c()).await;
        let mut manager = manager_with(vec![held]);
        manager.stream_idle_timeout = millis(150);
        let at = harness.listen(&manager, core::TrafficDirection::Outbound).await;
        for framing in [
            "content-length: 10\r\n\r\nhalf",
            "transfer-encoding: chunked\r\n\r\n4\r\nhalf\r\n",
        ] {
            let request = format!("POST / HTTP/1.1\r\nhost: a\r\n{framing}");
            let answer = raw(at, request.as_bytes()).await;
            assert!(answer.starts_with("HTTP/1.1 408 "), "{answer}");
            assert!(answer.ends_with("\r\n\r\nstream timeout"), "{answer}");
            told(&mut harness, "SI", "stream_idle_timeout").await;
        }
        assert_eq!(backend.hits(), 0);
    }
}
