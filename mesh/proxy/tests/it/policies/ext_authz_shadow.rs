//! Authorisation that is listened to and not obeyed, over gRPC, and what is told of the calls.

use serin_xds::pb::envoy::config::common::mutation_rules::v3 as mutation;
use serin_xds::pb::envoy::extensions::filters::http::header_mutation::v3 as header_mutation;
use serin_xds::pb::envoy::service::auth::v3 as auth;
use tonic::Status;
use tonic::transport::Server;

use super::ext_authz::{allowed, denied, filter, http_of, over_grpc};
use super::services::{Asked, serve, service_cluster};
use super::*;

/// A filter that shows the endpoint what filters have told of themselves.
fn showing(fields: &[(&str, &str)]) -> hcm::HttpFilter {
    let append = |(name, value): &(&str, &str)| mutation::HeaderMutation {
        action: Some(mutation::header_mutation::Action::Append(add_header(name, value))),
    };
    http_filter(
        "envoy.filters.http.header_mutation",
        Some(any(&header_mutation::HeaderMutation {
            mutations: Some(header_mutation::Mutations {
                request_mutations: fields.iter().map(append).collect(),
                ..Default::default()
            }),
            ..Default::default()
        })),
    )
}

#[tokio::test]
async fn requests_pass_whatever_a_service_says_that_is_only_listened_to_and_later_filters_know_it() {
    let service = Asked::new(|question: &auth::CheckRequest| match &*http_of(question).path {
        "/deny" => Ok(denied(418, "no")),
        "/fail" => Err(Status::internal("broken")),
        "/bad" => Ok(allowed(auth::OkHttpResponse {
            headers: vec![add_header("x-bad", "a\nb")],
            ..Default::default()
        })),
        _ => Ok(allowed(auth::OkHttpResponse {
            headers: vec![add_header("x-user", "bob")],
            ..Default::default()
        })),
    });
    let (at_service, _server) =
        serve(Server::builder().add_service(auth::authorization_server::AuthorizationServer::new(service)))
            .await;
    let mut message = over_grpc();
    message.shadow_mode = true;
    message.emit_filter_state_stats = true;
    message.validate_mutations = true;
    let name = "envoy.filters.http.ext_authz";
    let of = |rest: &str| format!("%FILTER_STATE({name}{rest})%");
    let shown = showing(&[
        ("x-said", &of(".shadow:PLAIN")),
        ("x-result", &of(".shadow:FIELD:check_result")),
        ("x-took", &of(":FIELD:latency_us")),
        ("x-sent", &of(":FIELD:bytesSent")),
        ("x-received", &of(":FIELD:bytesReceived")),
    ]);
    let (harness, mut backend, at) = served(vec![filter(&message), shown], to_c()).await;
    service_cluster(&harness, at_service).await;
    for (path, result, said) in [
        ("/", "OK", r#"{"check_result":"OK","status_code":200}"#),
        (
            "/deny",
            "DENIED",
            r#"{"check_result":"DENIED","status_code":418,"response_headers":[{"key":"x-why","value":"because"}]}"#,
        ),
        ("/fail", "ERROR", r#"{"check_result":"ERROR","status_code":403}"#),
        ("/bad", "ERROR", r#"{"check_result":"ERROR","status_code":500}"#),
    ] {
        assert_eq!(get(at, path).await.0, 200, "{path}");
        let headers = backend.next().await.headers;
        assert_eq!(headers["x-said"], said, "{path}");
        assert_eq!(headers["x-result"], result, "{path}");
        assert_eq!(headers.contains_key("x-user"), path == "/", "{path}");
        let answered = path != "/fail";
        assert_eq!(
            headers.get("x-received").is_some_and(|bytes| bytes != "0"),
            answered,
            "{path}"
        );
        for field in ["x-took", "x-sent"] {
            let number = headers
                .get(field)
                .and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
            assert!(number.is_some_and(|number| number > 0), "{path} {field}");
        }
    }
    let counted = |name: &str| harness.counter(&format!("envoy_http_ext_authz_{name}"), &[]);
    assert_eq!(
        [
            "ok",
            "denied",
            "error",
            "invalid",
            "shadow_denied",
            "shadow_error"
        ]
        .map(counted),
        [1.0, 1.0, 1.0, 1.0, 1.0, 2.0]
    );
}
