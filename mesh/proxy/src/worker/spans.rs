//! Traces on the worker: a context for each request, a span when it ends, batches for the collector.

use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use http::request::Parts;
use http::{HeaderName, HeaderValue, Method, Request, Uri, header};

use super::Worker;
use super::call::{call, grpc};
use super::exchange::{Exchange, protocol_text};
use super::filters;
use super::request::X_REQUEST_ID;
use crate::config::listener::Direction;
use crate::hygiene::fields::never_again;
use crate::metrics::events::HttpEvent;
use crate::observe::export::{
    BATCH, Collector, Exporter, FLUSH, OTLP_PATH, Span, datadog_bytes, otlp_bytes, to_otlp, zipkin_bytes,
};
use crate::observe::trace::{Context, Reason};
use crate::observe::tracer::{Tracer, span_name};
use crate::policy::service::HttpTarget;
use crate::random;

/// Limit of a gRPC call to a collector that has none of its own.
const TIMEOUT: Duration = Duration::from_secs(5);

/// The span of a request that runs.
#[derive(Debug)]
pub struct SpanState {
    context: Context,
    parent: Option<u64>,
    tags: Vec<(String, String)>,
    /// The trace's id as text, for access logs.
    pub trace: String,
}

impl SpanState {
    /// Whether the trace is recorded.
    pub fn recorded(&self) -> bool {
        self.context.sampled == Some(true)
    }
}

/// Gives a request its place in a trace, and tells the next hop.
pub(super) fn begin(exchange: &mut Exchange, parts: &mut Parts) {
    let conn = exchange.conn.clone();
    let Some(tracer) = conn.manager.tracer.as_deref() else {
        return;
    };
    let id = exchange.request_id.clone();
    let reason = tracer.decide(
        id.as_ref().map(HeaderValue::as_bytes),
        &parts.headers,
        &random::next,
    );
    conn.note(match reason {
        Reason::None => HttpEvent::NotTraced,
        Reason::Sampled => HttpEvent::TracedRandomly,
        Reason::Forced => HttpEvent::TracedByService,
        Reason::Client => HttpEvent::TracedByClient,
    });
    let (context, parent) = tracer.begin(&parts.headers, reason, &random::next);
    // The id tells later hops what was decided here.
    if let Some(mut packed) = id.as_ref().and_then(|id| reason_of(context, reason).pack(id)) {
        never_again(&mut packed);
        parts.headers.insert(X_REQUEST_ID.clone(), packed.clone());
        exchange.request_id = Some(packed);
    }
    if !tracer.silent {
        context.write(tracer.propagation, parent, &mut parts.headers);
    }
    let tags = if context.sampled == Some(true) {
        head_tags(tracer, exchange, parts)
    } else {
        Vec::new()
    };
    exchange.span = Some(Box::new(SpanState {
        context,
        parent,
        tags,
        trace: format!("{:032x}", context.trace),
    }));
}

fn reason_of(context: Context, reason: Reason) -> Reason {
    match (context.sampled, reason) {
        (Some(true), Reason::None) => Reason::Sampled,
        (Some(true), reason) => reason,
        _ => Reason::None,
    }
}

fn head_tags(tracer: &Tracer, exchange: &Exchange, parts: &Parts) -> Vec<(String, String)> {
    let text = |name: &HeaderName| {
        parts
            .headers
            .get(name)
            .map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned())
            .unwrap_or_default()
    };
    let authority = text(&header::HOST);
    let path = parts.uri.path_and_query().map_or("/", |path| path.as_str());
    let mut end = path.len().min(tracer.max_path);
    while !path.is_char_boundary(end) {
        end -= 1;
    }
    let mut tags = vec![
        ("component".to_owned(), "proxy".to_owned()),
        ("guid:x-request-id".to_owned(), text(&X_REQUEST_ID)),
        (
            "http.url".to_owned(),
            format!("http://{authority}{}", &path[..end]),
        ),
        ("http.method".to_owned(), parts.method.to_string()),
        (
            "http.protocol".to_owned(),
            protocol_text(parts.version).to_owned(),
        ),
        ("user_agent".to_owned(), text(&header::USER_AGENT)),
        ("downstream_cluster".to_owned(), "-".to_owned()),
        ("peer.address".to_owned(), exchange.conn.direct.ip().to_string()),
        (
            "node_id".to_owned(),
            String::from_utf8_lossy(exchange.conn.worker.shared.peer_id.as_bytes()).into_owned(),
        ),
    ];
    tags.extend(tracer.request_tags(&parts.headers));
    tags
}

/// Ends the span of a request.
pub(super) fn finish(exchange: &mut Exchange) {
    let conn = exchange.conn.clone();
    let (Some(tracer), Some(mut state)) = (conn.manager.tracer.as_deref(), exchange.span.take()) else {
        return;
    };
    if !state.recorded() {
        return;
    }
    let mut tags = std::mem::take(&mut state.tags);
    let mut tag = |key: &str, value: String| tags.push((key.to_owned(), value));
    tag("http.status_code", exchange.code.to_string());
    tag("request_size", exchange.received().to_string());
    tag("response_size", exchange.sent.to_string());
    tag("response_flags", exchange.flags.to_string());
    if let Some(cluster) = &exchange.cluster_name {
        tag("upstream_cluster", cluster.to_string());
        tag("upstream_cluster.name", cluster.to_string());
    }
    if let Some(status) = exchange.grpc_status {
        tag("grpc.status_code", status.to_string());
    }
    tracer.metadata_tags(filters::metadata(exchange), &mut tags);
    let duration = exchange.started.elapsed();
    let authority = exchange
        .authority
        .as_ref()
        .and_then(|value| value.to_str().ok())
        .unwrap_or("");
    let span = Span {
        trace: state.context.trace,
        id: state.context.span,
        parent: state.parent,
        name: span_name(conn.direction, authority),
        client: conn.direction != Direction::Inbound,
        start: SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default()
            .saturating_sub(duration),
        duration,
        tags,
        error: exchange.code >= 500 || exchange.code == 0,
        local: conn.local,
    };
    if tracer.exporter.add(span, conn.worker.id) {
        flush_later(&conn.worker, &tracer.exporter);
    }
}

/// Sends what has gathered in a moment, batch by batch.
fn flush_later(worker: &Rc<Worker>, exporter: &Arc<Exporter>) {
    let (on, exporter) = (worker.clone(), exporter.clone());
    worker.tasks.spawn_local(async move {
        loop {
            tokio::time::sleep(FLUSH).await;
            loop {
                let spans = exporter.take();
                if spans.is_empty() {
                    return;
                }
                let more = spans.len() == BATCH;
                send(&on, &exporter, &spans).await;
                if !more {
                    break;
                }
            }
        }
    });
}

async fn send(worker: &Worker, exporter: &Exporter, spans: &[Span]) {
    let service = if exporter.service.is_empty() {
        &worker.shared.cluster
    } else {
        &exporter.service
    };
    let result = match &exporter.collector {
        Collector::OtlpGrpc(target) => {
            let message = to_otlp(service, spans);
            grpc::<()>(worker, target, OTLP_PATH, &message, TIMEOUT).await
        }
        Collector::OtlpHttp(target, fields) => {
            let body = otlp_bytes(service, spans);
            post(
                worker,
                target,
                Method::POST,
                "application/x-protobuf",
                body,
                fields,
            )
            .await
        }
        Collector::Zipkin(target, wide) => {
            let body = zipkin_bytes(service, spans, *wide);
            post(worker, target, Method::POST, "application/json", body, &[]).await
        }
        Collector::Datadog(target) => {
            let body = datadog_bytes(service, spans);
            let count = [(
                HeaderName::from_static("x-datadog-trace-count"),
                HeaderValue::from(spans.len()),
            )];
            post(worker, target, Method::PUT, "application/msgpack", body, &count).await
        }
    };
    let counter = match &result {
        Ok(()) => &exporter.sent,
        Err(error) => {
            tracing::debug!(%error, "spans were not taken");
            &exporter.dropped
        }
    };
    for _ in spans {
        counter.add(worker.id);
    }
}

/// Sends a body to an HTTP service, which must take it.
pub(super) async fn post(
    worker: &Worker,
    target: &HttpTarget,
    method: Method,
    content_type: &'static str,
    body: Bytes,
    fields: &[(HeaderName, HeaderValue)],
) -> Result<(), super::call::CallError> {
    let mut request = Request::new(body);
    *request.method_mut() = method;
    *request.uri_mut() = Uri::from(target.path.clone());
    let headers = request.headers_mut();
    headers.insert(header::HOST, target.authority.clone());
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    for (name, value) in fields {
        headers.insert(name, value.clone());
    }
    let answer = call(worker, &target.cluster, request, false, target.timeout).await?;
    if answer.head.status.is_success() {
        Ok(())
    } else {
        Err(super::call::CallError::Answer(
            target.cluster.name.clone(),
            "not a success",
        ))
    }
}
