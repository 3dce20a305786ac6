//! The response of an upstream as it goes to the client.

use http::request::Parts;
use http::response::Parts as Head;
use http::{HeaderName, HeaderValue, Response, Version, header};
use http_body::Body as _;

use super::attempts::X_ATTEMPT_COUNT;
use super::body::ResponseBody;
use super::exchange::Exchange;
use super::failure::X_UNPROCESSED;
use super::filters;
use super::incoming::Incoming;
use super::local::Body;
use super::logging;
use super::request::{PEER_METADATA, PEER_METADATA_ID, X_REQUEST_ID};
use super::scene::ResponseScene;
use super::upstream::Plan;
use super::watch::{Limits, Watch};
use crate::config::listener::Direction;
use crate::config::route::Target;
use crate::hygiene::fields::{Present, join_repeated, strip_present};
use crate::metrics::flags::Flags;
use crate::policy::compressor::Encoder;
use crate::upstream::cluster::Active;
use crate::upstream::pool::Lease;

static X_UPSTREAM_TIME: HeaderName = HeaderName::from_static("x-envoy-upstream-service-time");

/// An upstream's response, and what it is answered with.
pub(super) struct Answer<'a> {
    pub(super) plan: &'a Plan<'a>,
    /// The weighted cluster that was chosen.
    pub(super) target: Option<&'a Target>,
    /// The client's fields, where operations on the response read them.
    pub(super) request_headers: Option<http::HeaderMap>,
    /// The request as it was sent.
    pub(super) parts: &'a Parts,
    pub(super) response: Response<Incoming>,
    pub(super) lease: Lease,
    pub(super) active: Active,
}

/// The response as it goes to the client.
pub(super) fn respond(mut exchange: Box<Exchange>, answer: Answer<'_>) -> Response<Body> {
    let (mut ready, mut head) = answer.prepare(&mut exchange);
    if exchange.policy.is_some() {
        ready.encoder = filters::encode(&mut exchange, &mut head, ready.has_body());
    }
    ready.send(exchange, head)
}

/// The same where a filter must wait for a service before the response goes on.
pub(super) async fn respond_waiting(mut exchange: Box<Exchange>, answer: Answer<'_>) -> Response<Body> {
    let Answer {
        plan, target, parts, ..
    } = answer;
    let (mut ready, mut head) = answer.prepare(&mut exchange);
    match filters::encode_waiting(&mut exchange, &mut head, ready.has_body()).await {
        Ok(encoder) => {
            ready.encoder = encoder;
            ready.send(exchange, head)
        }
        Err(reply) => super::upstream::decline(exchange, plan.routed, target, parts, None, reply),
    }
}

impl<'a> Answer<'a> {
    /// What the proxy itself does to the head of a response.
    fn prepare(self, exchange: &mut Exchange) -> (Ready<'a>, Head) {
        let Self {
            plan,
            target,
            request_headers,
            parts,
            response,
            lease,
            active,
        } = self;
        let conn = plan.conn;
        if let Some(source) = &exchange.source {
            source.borrow_mut().answered = true;
        }
        let (mut head, incoming) = response.into_parts();
        if let Some(host) = &exchange.host {
            plan.cluster.note_load(host, &head.headers);
        }
        let present = Present::of(&head.headers);
        strip_present(&mut head.headers, present);
        join_repeated(&mut head.headers, true);
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
        if !conn.manager.router.suppress_envoy_headers {
            head.headers
                .insert(X_UPSTREAM_TIME.clone(), small_number(elapsed));
        }
        if plan.routed.host.attempt_count_in_response {
            head.headers
                .insert(X_ATTEMPT_COUNT.clone(), HeaderValue::from(exchange.attempts));
        }
        if conn.manager.request_id_in_response
            && let Some(id) = &exchange.request_id
        {
            head.headers.insert(X_REQUEST_ID.clone(), id.clone());
        }
        exchange.code = head.status.as_u16();
        exchange.details = "via_upstream".into();
        let changed = request_headers.is_some();
        if let Some(request) = &request_headers {
            let scene = ResponseScene {
                request,
                ..ResponseScene::of(exchange, parts)
            };
            plan.routed.mutate_response(&mut head.headers, target, &scene);
        }
        if changed || present.has(Present::GRPC_STATUS) {
            exchange.note_grpc_status(&head.headers);
        }
        let ready = Ready {
            plan,
            incoming,
            encoder: None,
            lease,
            active,
        };
        (ready, head)
    }
}

/// A response whose head is as the client gets it.
struct Ready<'a> {
    plan: &'a Plan<'a>,
    incoming: Incoming,
    encoder: Option<Encoder>,
    lease: Lease,
    active: Active,
}

impl Ready<'_> {
    fn has_body(&self) -> bool {
        !self.incoming.is_end_stream()
    }

    fn send(self, mut exchange: Box<Exchange>, mut head: Head) -> Response<Body> {
        let has_body = self.has_body();
        let Self {
            plan,
            incoming,
            encoder,
            lease,
            active,
        } = self;
        let conn = plan.conn;
        logging::keep_response(&mut exchange, &head.headers, true);
        if has_body && exchange.policy.is_some() {
            filters::keep_head(&mut exchange, &head.headers);
        }
        conn.dress(&mut head.headers, exchange.version);
        if let Some(tap) = &mut exchange.tap {
            tap.response(head.status, &head.headers);
        }
        head.version = Version::HTTP_11;
        if exchange.version == Version::HTTP_2 {
            head.version = Version::HTTP_2;
        } else if !exchange.is_received() {
            head.headers
                .insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        let deadline = plan.deadline.map(|at| {
            if plan.by_stream {
                (at, Flags::MAX_STREAM_DURATION, "max_duration_timeout")
            } else {
                (at, Flags::UPSTREAM_TIMEOUT, "response_timeout")
            }
        });
        let idle = plan
            .forward
            .idle_timeout
            .unwrap_or(conn.manager.stream_idle_timeout);
        let max_requests = plan.cluster.config.max_requests_per_connection;
        // A response without a body needs no timers.
        let limits = if has_body {
            Limits::new(deadline, idle)
        } else {
            Limits::default()
        };
        let rate = filters::response_rate(&exchange);
        let watch = Watch::new(exchange, limits, lease, max_requests, active);
        let body = ResponseBody::upstream(incoming, watch);
        let body = match encoder {
            None => body,
            Some(encoder) => body.encoded(encoder),
        };
        let body = match rate {
            None => body,
            Some(rate) => body.throttled(rate),
        };
        Response::from_parts(head, body)
    }
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
