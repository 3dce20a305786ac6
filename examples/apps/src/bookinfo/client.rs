//! Calling another bookinfo service, passing on what belongs to the request: tracing and identity headers.

use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Method, Request, StatusCode, header::HOST};
use http_body_util::{BodyExt, Empty};
use hyper_util::client::legacy::{Client, connect::HttpConnector};
use hyper_util::rt::TokioExecutor;

/// Headers that bookinfo passes on, so that traces hold together and rules on users work further down.
const PASSED_ON: [&str; 17] = [
    "x-request-id",
    "x-ot-span-context",
    "x-datadog-trace-id",
    "x-datadog-parent-id",
    "x-datadog-sampling-priority",
    "traceparent",
    "tracestate",
    "x-cloud-trace-context",
    "grpc-trace-bin",
    "sw8",
    "x-b3-traceid",
    "x-b3-spanid",
    "x-b3-parentspanid",
    "x-b3-sampled",
    "x-b3-flags",
    "end-user",
    "user-agent",
];

/// A pooled HTTP client.
#[derive(Clone, Debug)]
pub(crate) struct Caller {
    client: Client<HttpConnector, Empty<Bytes>>,
}

impl Caller {
    pub(crate) fn new() -> Self {
        Self {
            client: Client::builder(TokioExecutor::new()).build_http(),
        }
    }

    /// GETs `http://authority/path`. `None` when there was no answer within `timeout`.
    pub(crate) async fn get(
        &self,
        authority: &str,
        path: &str,
        incoming: &HeaderMap,
        timeout: Duration,
    ) -> Option<(StatusCode, Bytes)> {
        let mut request = Request::builder()
            .method(Method::GET)
            .uri(format!("http://{authority}{path}"))
            .header(HOST, authority.trim_end_matches(":80"))
            .body(Empty::new())
            .ok()?;
        for name in PASSED_ON {
            for value in incoming.get_all(name) {
                request.headers_mut().append(name, value.clone());
            }
        }
        let call = async {
            let response = self.client.request(request).await.ok()?;
            let status = response.status();
            Some((status, response.into_body().collect().await.ok()?.to_bytes()))
        };
        tokio::time::timeout(timeout, call).await.ok().flatten()
    }
}
