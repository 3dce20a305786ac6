//! Access logs on the worker: what is kept of a request while it runs, and the record when it ends.

use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use http::request::Parts;
use http::uri::PathAndQuery;
use http::{HeaderMap, Method, Uri, header};

use super::Worker;
use super::call::grpc_bytes;
use super::exchange::{Exchange, protocol_text};
use super::filters;
use super::local::grpc_of_http;
use super::request::view;
use super::spans;
use crate::config::cluster::UpstreamHttp;
use crate::config::matchers::RequestView;
use crate::config::virtual_cluster::Counted;
use crate::observe::access_log::AccessLogs;
use crate::observe::batch::{Batches, Destination};
use crate::observe::record::{Kept, LogType, Record, Wants};
use crate::random;

/// Limit of a call to a log service, where it says none.
const TIMEOUT: Duration = Duration::from_secs(5);

/// What a request keeps for its log lines. Most keep nothing: made when there is something.
#[derive(Debug, Default)]
pub struct LogState {
    kept: Kept,
}

/// The status of a gRPC call that ended without one: what its HTTP status means.
fn of_call(exchange: &Exchange) -> Option<u8> {
    let status = http::StatusCode::from_u16(exchange.code).ok()?;
    exchange
        .grpc
        .then(|| u8::try_from(grpc_of_http(status)).ok())
        .flatten()
}

fn logs(exchange: &Exchange) -> Option<&AccessLogs> {
    exchange.conn.manager.logs.as_deref()
}

/// Keeps what the logs want of a request as it arrived.
pub(super) fn keep_request(exchange: &mut Exchange, parts: &Parts) {
    let Some(logs) = exchange.conn.manager.logs.as_deref() else {
        return;
    };
    if logs.wants.looks_at_requests() || changed_path(exchange, &parts.uri).is_some() {
        let mut state = exchange.log.take().unwrap_or_default();
        keep(&logs.wants, exchange, &view(parts), &parts.uri, &mut state);
        exchange.log = Some(state);
    }
}

/// The same as it is sent on: who asks has been seen.
pub(super) fn keep_sent(exchange: &mut Exchange, parts: &Parts) {
    let Some(logs) = exchange.conn.manager.logs.as_deref() else {
        return;
    };
    if logs.wants.looks_at_requests()
        || changed_path(exchange, &parts.uri).is_some()
        || changed_authority(exchange, &parts.headers).is_some()
        || exchange.log.is_some()
    {
        let mut state = exchange.log.take().unwrap_or_default();
        keep(&logs.wants, exchange, &view(parts), &parts.uri, &mut state);
        exchange.log = Some(state);
    }
}

fn keep(wants: &Wants, exchange: &Exchange, request: &RequestView<'_>, uri: &Uri, state: &mut LogState) {
    wants.keep_request(request, &mut state.kept);
    state.kept.path = changed_path(exchange, uri).map(|path| path.as_str().into());
    state.kept.authority = changed_authority(exchange, request.headers).map(Into::into);
}

/// The authority, where it is no longer what the client sent.
fn changed_authority<'a>(exchange: &Exchange, headers: &'a HeaderMap) -> Option<&'a str> {
    let value = headers.get(header::HOST);
    value
        .filter(|value| exchange.authority.as_ref() != Some(value))?
        .to_str()
        .ok()
}

impl LogState {
    /// Keeps what is wanted of a response.
    pub(super) fn keep_response(&mut self, wants: &Wants, headers: &HeaderMap) {
        wants.keep_response(headers, &mut self.kept);
    }

    /// Keeps what is wanted of trailers.
    pub(super) fn keep_trailers(&mut self, wants: &Wants, trailers: &HeaderMap) {
        wants.keep_trailers(trailers, &mut self.kept);
    }
}

/// Path and query, where they are no longer what the client sent.
fn changed_path<'a>(exchange: &Exchange, uri: &'a Uri) -> Option<&'a PathAndQuery> {
    let path = uri.path_and_query();
    path.filter(|path| exchange.uri.path_and_query() != Some(path))
}

/// What is known of a request while filters see it, for formats that are written then.
pub(super) fn meanwhile(
    wants: &Wants,
    exchange: &Exchange,
    request: &RequestView<'_>,
    uri: &Uri,
) -> LogState {
    let mut state = LogState::default();
    keep(wants, exchange, request, uri, &mut state);
    state
}

/// Keeps what the logs want of a response.
pub(super) fn keep_response(exchange: &mut Exchange, headers: &HeaderMap, from_upstream: bool) {
    let Some(logs) = exchange.conn.manager.logs.as_deref() else {
        return;
    };
    if from_upstream {
        exchange.answered = Some(Instant::now());
    }
    if logs.wants.looks_at_responses() {
        let state = exchange.log.get_or_insert_default();
        logs.wants.keep_response(headers, &mut state.kept);
    }
}

/// Keeps what the logs want of the trailers.
pub(super) fn keep_trailers(exchange: &mut Exchange, trailers: &HeaderMap) {
    if let Some(logs) = exchange.conn.manager.logs.as_deref()
        && logs.wants.looks_at_responses()
    {
        let state = exchange.log.get_or_insert_default();
        logs.wants.keep_trailers(trailers, &mut state.kept);
    }
}

fn text(value: Option<&http::HeaderValue>) -> Option<std::borrow::Cow<'_, str>> {
    value.map(|value| match value.to_str() {
        Ok(text) => text.into(),
        Err(_) => String::from_utf8_lossy(value.as_bytes()),
    })
}

/// Writes the lines of a request that ended after `took`; `false` if no access log is configured.
pub(super) fn write(exchange: &Exchange, took: Duration) -> bool {
    let Some(logs) = logs(exchange) else {
        return false;
    };
    if !logs.may_write(exchange.code, took, exchange.flags) {
        return true;
    }
    let none = LogState::default();
    let state = exchange.log.as_deref().unwrap_or(&none);
    let worker = &exchange.conn.worker;
    record_after(exchange, state, took, |record| {
        logs.write(record, &random::next, worker.id, |batches| {
            flush_later(worker, batches);
        });
    });
    true
}

/// Writes lines of a request that goes on.
pub(super) fn write_meanwhile(exchange: &Exchange, kind: LogType) {
    let Some(logs) = logs(exchange) else {
        return;
    };
    let none = LogState::default();
    let state = exchange.log.as_deref().unwrap_or(&none);
    let worker = &exchange.conn.worker;
    with_record(exchange, state, |record| {
        let record = Record {
            kind,
            request: record.request.filter(|_| !exchange.unread),
            ..*record
        };
        logs.write(&record, &random::next, worker.id, |batches| {
            flush_later(worker, batches);
        });
    });
}

/// Shows what is known of a request as logs see it.
pub(super) fn with_record<T>(
    exchange: &Exchange,
    state: &LogState,
    show: impl FnOnce(&Record<'_>) -> T,
) -> T {
    record_after(exchange, state, exchange.started.elapsed(), show)
}

fn record_after<T>(
    exchange: &Exchange,
    state: &LogState,
    duration: Duration,
    show: impl FnOnce(&Record<'_>) -> T,
) -> T {
    let conn = &exchange.conn;
    let since = |at: Instant| at.saturating_duration_since(exchange.started);
    let start = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .saturating_sub(duration);
    let authority = text(exchange.authority.as_ref());
    let request_id = text(exchange.request_id.as_ref());
    let request = match &exchange.source {
        None => Some(Duration::ZERO),
        Some(source) => source.borrow().ended_at.map(since),
    };
    let spoken = exchange.cluster.as_ref().filter(|_| exchange.host.is_some());
    let upstream_protocol = spoken.and_then(|cluster| match cluster.config.http {
        UpstreamHttp::Http2 => Some("HTTP/2"),
        UpstreamHttp::Http1 => Some("HTTP/1.1"),
        UpstreamHttp::Downstream => Some(protocol_text(exchange.version)),
        // Agreed on per connection, and not told.
        UpstreamHttp::Auto => None,
    });
    let record = Record {
        kind: LogType::DownstreamEnd,
        start,
        duration,
        request,
        response: exchange.answered.map(since),
        kept: &state.kept,
        method: exchange.method_text().unwrap_or(""),
        path: exchange.path_text().unwrap_or(""),
        authority: authority.as_deref().unwrap_or(""),
        scheme: exchange.scheme.as_str(),
        protocol: protocol_text(exchange.version),
        upstream_protocol,
        request_id: request_id.as_deref(),
        code: exchange.code,
        details: &exchange.details,
        termination: "",
        local_close: "",
        downstream_failure: None,
        grpc_status: exchange.grpc_status.or_else(|| of_call(exchange)),
        flags: exchange.flags,
        received: exchange.received(),
        sent: exchange.sent,
        attempts: exchange.attempts,
        upstream_host: exchange.host.as_ref().map(|host| &*host.endpoint.text),
        upstream_local: exchange.upstream_local,
        virtual_cluster: exchange.virtual_cluster.as_deref().and_then(Counted::name),
        upstream_cluster: exchange.cluster_name.as_deref().or(exchange.routed.as_deref()),
        upstream_failure: exchange.failure.as_deref(),
        route: exchange.route.as_ref().map(|route| &*route.name),
        direct_remote: conn.direct,
        remote: exchange.remote,
        local: conn.local,
        server_name: conn.server_name(),
        peer: conn.peer_identity(),
        downstream_tls: conn.tls.as_deref(),
        upstream_tls: exchange.upstream_tls.as_deref(),
        upstream_name: exchange.host.as_ref().map(|host| host.endpoint.hostname()),
        upstream_metadata: exchange
            .host
            .as_ref()
            .and_then(|host| host.endpoint.metadata.as_ref()),
        cluster_metadata: exchange
            .cluster
            .as_ref()
            .and_then(|cluster| cluster.config.metadata.as_ref()),
        tls: conn.tls.as_ref().map(|tls| (tls.version, tls.cipher)),
        metadata: filters::metadata(exchange),
        connection: conn.id,
        trace: exchange.span.as_ref().map(|span| (&*span.trace, span.recorded())),
    };
    show(&record)
}

/// Sends what waits for a log service, after a while or once there is enough of it.
pub(super) fn flush_later(worker: &Rc<Worker>, batches: &Arc<Batches>) {
    let (own, batches) = (worker.clone(), batches.clone());
    worker.tasks.spawn_local(async move {
        loop {
            tokio::select! {
                () = tokio::time::sleep(batches.interval) => {}
                () = batches.full() => {}
                () = own.closing() => {}
            }
            let Some(batch) = batches.take(&own.shared.node) else {
                return;
            };
            let result = match &batches.target {
                Destination::Grpc(target) => {
                    let timeout = target.timeout.unwrap_or(TIMEOUT);
                    grpc_bytes(&own, target, batches.path(), &batch.message, timeout)
                        .await
                        .map(drop)
                }
                Destination::Http(target, fields) => {
                    let body = batch.message.clone().into();
                    spans::post(&own, target, Method::POST, "application/x-protobuf", body, fields).await
                }
            };
            if let Err(error) = &result {
                tracing::debug!(%error, entries = batch.entries, "access log entries were not taken");
            }
            batches.count(&batch, result.is_ok(), own.id);
        }
    });
}
