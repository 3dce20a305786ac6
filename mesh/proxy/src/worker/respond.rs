//! The response of an upstream as it goes to the client.

use http::request::Parts;
use http::response::Parts as Head;
use http::{HeaderName, HeaderValue, Response, Version, header};
use http_body::Body as _;
use tokio::time::Instant;

use super::attempts::X_ATTEMPT_COUNT;
use super::body::ResponseBody;
use super::exchange::{Exchange, Limits, Watch};
use super::filters;
use super::incoming::Incoming;
use super::local::Body;
use super::logging;
use super::request::{PEER_METADATA, PEER_METADATA_ID, Routed, X_REQUEST_ID, X_UNPROCESSED, variables};
use super::upstream::Plan;
use crate::config::headers::Variables;
use crate::config::listener::Direction;
use crate::config::route::Target;
use crate::hygiene::fields::{Present, strip_present};
use crate::metrics::flags::Flags;
use crate::policy::compressor::Encoder;
use crate::upstream::cluster::Active;
use crate::upstream::pool::Lease;

static X_UPSTREAM_TIME: HeaderName = HeaderName::from_static("x-envoy-upstream-service-time");

/// The response as it goes to the client.
pub(super) fn respond(
    mut exchange: Box<Exchange>,
    plan: &Plan<'_>,
    routed: &Routed,
    target: Option<&Target>,
    request_headers: Option<http::HeaderMap>,
    parts: &Parts,
    response: Response<Incoming>,
    lease: Lease,
    active: Active,
) -> Response<Body> {
    let (mut head, incoming) = prepare(
        &mut exchange,
        plan,
        routed,
        target,
        request_headers,
        parts,
        response,
    );
    let encoder = if exchange.policy.is_some() {
        let has_body = !incoming.is_end_stream();
        filters::encode(&mut exchange, &mut head, has_body)
    } else {
        None
    };
    finish(exchange, plan, head, incoming, encoder, lease, active)
}

/// The same where a filter must wait for a service before the response goes on.
pub(super) async fn respond_waiting(
    mut exchange: Box<Exchange>,
    plan: &Plan<'_>,
    routed: &Routed,
    target: Option<&Target>,
    request_headers: Option<http::HeaderMap>,
    parts: &Parts,
    response: Response<Incoming>,
    lease: Lease,
    active: Active,
) -> Response<Body> {
    let (mut head, incoming) = prepare(
        &mut exchange,
        plan,
        routed,
        target,
        request_headers,
        parts,
        response,
    );
    let has_body = !incoming.is_end_stream();
    match filters::encode_waiting(&mut exchange, &mut head, has_body).await {
        Ok(encoder) => finish(exchange, plan, head, incoming, encoder, lease, active),
        Err(reply) => reply.send(exchange),
    }
}

/// What the proxy itself does to the head of a response.
fn prepare(
    exchange: &mut Exchange,
    plan: &Plan<'_>,
    routed: &Routed,
    target: Option<&Target>,
    request_headers: Option<http::HeaderMap>,
    parts: &Parts,
    response: Response<Incoming>,
) -> (Head, Incoming) {
    let conn = plan.conn;
    if let Some(source) = &exchange.source {
        source.borrow_mut().answered = true;
    }
    let (mut head, incoming) = response.into_parts();
    let present = Present::of(&head.headers);
    strip_present(&mut head.headers, present);
    if present.has(Present::PEER) {
        head.headers.remove(&PEER_METADATA);
        head.headers.remove(&PEER_METADATA_ID);
    }
    if present.has(Present::SERIN) && conn.direction != Direction::Inbound {
        head.headers.remove(&X_UNPROCESSED);
    }
    for cookie in &plan.cookies {
        head.headers.append(header::SET_COOKIE, cookie.clone());
    }
    let elapsed = exchange.started.elapsed().as_millis() as u64;
    head.headers
        .insert(X_UPSTREAM_TIME.clone(), small_number(elapsed));
    if routed.host.attempt_count_in_response {
        head.headers
            .insert(X_ATTEMPT_COUNT.clone(), HeaderValue::from(exchange.attempts));
    }
    if conn.manager.request_id_in_response
        && let Some(id) = &exchange.request_id
    {
        head.headers.insert(X_REQUEST_ID.clone(), id.clone());
    }
    let target_ops = target
        .map(|target| &target.response_headers)
        .filter(|ops| !ops.is_empty());
    if request_headers.is_some() || target_ops.is_some() {
        let host = exchange.host.clone();
        let variables = Variables {
            upstream_cluster: &plan.cluster.slot.name,
            upstream_host: host.as_ref().map(|host| &*host.endpoint.text),
            ..variables(conn, parts, &routed.route)
        };
        let request = request_headers.unwrap_or_default();
        if let Some(ops) = target_ops {
            ops.apply(&mut head.headers, Some(&request), &variables);
        }
        routed.mutate_response(&mut head.headers, &request, &variables);
    }
    exchange.code = head.status.as_u16();
    exchange.details = "via_upstream".into();
    exchange.note_grpc_status(&head.headers);
    (head, incoming)
}

/// A number as a field's value; the usual ones are not written out each time.
fn small_number(number: u64) -> HeaderValue {
    const SMALL: [&str; 10] = ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"];
    let small = usize::try_from(number).ok().and_then(|index| SMALL.get(index));
    small.map_or_else(
        || HeaderValue::from(number),
        |text| HeaderValue::from_static(text),
    )
}

fn finish(
    mut exchange: Box<Exchange>,
    plan: &Plan<'_>,
    mut head: Head,
    incoming: Incoming,
    encoder: Option<Encoder>,
    lease: Lease,
    active: Active,
) -> Response<Body> {
    let conn = plan.conn;
    logging::keep_response(&mut exchange, &head.headers, true);
    conn.dress(&mut head.headers, exchange.version);
    if let Some(tap) = &mut exchange.tap {
        tap.response(head.status, &head.headers);
    }
    head.version = Version::HTTP_11;
    if exchange.version == Version::HTTP_2 {
        head.version = Version::HTTP_2;
    }
    let stream_limit = plan
        .forward
        .max_stream_duration
        .or(conn.manager.max_stream_duration);
    let deadline = match (plan.deadline, stream_limit) {
        (Some(at), _) => Some((at, Flags::UPSTREAM_TIMEOUT, "response_timeout")),
        (None, Some(limit)) => {
            let at = Instant::from_std(exchange.started) + limit;
            Some((
                at,
                Flags::MAX_STREAM_DURATION,
                "upstream_max_stream_duration_reached",
            ))
        }
        (None, None) => None,
    };
    let idle = plan
        .forward
        .idle_timeout
        .unwrap_or(conn.manager.stream_idle_timeout);
    let max_requests = plan.cluster.config.max_requests_per_connection;
    // A response without a body needs no timers.
    let limits = if incoming.is_end_stream() {
        Limits::default()
    } else {
        Limits::new(deadline, idle)
    };
    let watch = Watch::new(exchange, limits, lease, max_requests, active);
    let body = ResponseBody::upstream(incoming, watch);
    let body = match encoder {
        None => body,
        Some(encoder) => body.encoded(encoder),
    };
    Response::from_parts(head, body)
}
