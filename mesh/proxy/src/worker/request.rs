//! The request path: hygiene, identity, routing, filters, action.
//!
//! `admit` refuses what no request may look like, `identify` says who asks, `routed` is what was decided about a request and
//! how its route is found. What is synchronous is a function, so that the future of a request holds no more than it waits with.

mod admit;
mod identify;
mod routed;

pub(super) use identify::{PEER_METADATA, PEER_METADATA_ID, X_REQUEST_ID, append_via};
pub(super) use routed::{Routed, find_route};

use std::rc::Rc;
use std::sync::Arc;

use http::request::Parts;
use http::{HeaderMap, Response, StatusCode, Version};
use http_body::Body as _;

use super::answer::answer;
use super::body::Inbound;
use super::exchange::Exchange;
use super::filters;
use super::http::Downstream;
use super::incoming::Incoming;
use super::interim::Waiting;
use super::local::{Body, LocalReply};
use super::logging;
use super::spans;
use super::tap;
use super::tunnel::{self, Tunnel};
use super::upstream;
use crate::config::matchers::RequestView;
use crate::config::route::{Action, is_grpc};
use crate::config::table::RouteTable;
use crate::hygiene::fields::{Present, join_repeated};
use crate::metrics::events::HttpEvent;
use crate::metrics::flags::Flags;
use crate::observe::record::LogType;
use crate::overload;
use crate::random;

/// Why a connection is broken off instead of answered.
#[derive(Debug, thiserror::Error)]
#[error("the connection is broken off")]
pub struct Broken;

/// Serves one request. Its head is boxed, since it goes from function to function, and each would copy its two hundred
/// bytes. Interim answers go to `interims` where the client speaks HTTP/2 and may have them.
pub(super) async fn handle(
    conn: Rc<Downstream>,
    mut parts: Box<Parts>,
    incoming: Incoming,
    interims: Option<Arc<Waiting>>,
) -> Result<Response<Body>, Broken> {
    conn.request_began(parts.version == Version::HTTP_2);
    let mut exchange = Exchange::new(
        conn.clone(),
        parts.method.clone(),
        parts.uri.clone(),
        parts.version,
    );
    exchange.interims = interims;
    exchange.grpc = is_grpc(&parts.headers);
    exchange.unread = !incoming.is_end_stream();
    join_repeated(&mut parts.headers, false);
    let present = Present::of(&parts.headers);
    let tunnel = match enter(&conn, &mut exchange, &mut parts, present) {
        Ok(tunnel) => tunnel,
        Err(reply) => return Ok(turn_away(exchange, &parts, reply).await),
    };
    let present = if conn.manager.early.is_empty() {
        present
    } else {
        identify::change_early(&exchange, &mut parts)
    };
    if let Err(reply) = identify::identify(&mut exchange, &mut parts, present) {
        conn.decide_upgrade(false);
        return Ok(turn_away(exchange, &parts, reply).await);
    }
    tap::arrive(&mut exchange, &conn.worker.shared.tap, &parts);
    spans::begin(&mut exchange, &mut parts);
    logging::keep_request(&mut exchange, &parts);
    let mut outbox = None;
    // Boxed: the future of a request lives as long as the request, and most of it is here. Two boxes, one after the other:
    // within the first, the second would be copied twice.
    let response = match Box::pin(route(conn, exchange, parts, incoming, tunnel, &mut outbox)).await {
        Err(response) => response,
        Ok(Onward {
            exchange,
            routed,
            parts,
            body,
            tunnel,
        }) => Box::pin(upstream::forward(exchange, routed, parts, body, tunnel)).await,
    };
    Ok(match outbox.and_then(|outbox| outbox.take()) {
        None => response,
        Some((exchange, reply)) => Box::pin(reply.send_waiting(exchange)).await,
    })
}

/// What a request must pass before anybody asks where it goes; the tunnel that it asks for.
fn enter(
    conn: &Downstream,
    exchange: &mut Exchange,
    parts: &mut Parts,
    present: Present,
) -> Result<Option<Tunnel>, LocalReply> {
    if let Err(reply) = admit::admit(conn, exchange, parts) {
        conn.worker.recorder.counters().refused_requests.add(1);
        return Err(reply);
    }
    let tunnel = tunnel::take(conn, parts, present)?;
    let overload = &conn.worker.shared.overload;
    if overload.hits(overload::Action::StopAcceptingRequests, random::next) {
        conn.decide_upgrade(false);
        conn.note(HttpEvent::RqOverload);
        return Err(LocalReply::new(
            StatusCode::SERVICE_UNAVAILABLE,
            Flags::OVERLOAD,
            "overload",
            "envoy overloaded",
        ));
    }
    Ok(tunnel)
}

/// Answers a request that never gets as far as to a route: it is logged like others, and filters see the answer.
async fn turn_away(mut exchange: Box<Exchange>, parts: &Parts, reply: LocalReply) -> Response<Body> {
    exchange.request_id = parts.headers.get(&X_REQUEST_ID).cloned();
    logging::keep_request(&mut exchange, parts);
    filters::pass_by_all(&mut exchange, parts);
    filters::keep_request(&mut exchange, parts);
    let outbox = filters::outbox(&exchange);
    let response = reply.send(exchange);
    match outbox.and_then(|outbox| outbox.take()) {
        None => response,
        // Boxed: seldom.
        Some((exchange, reply)) => Box::pin(reply.send_waiting(exchange)).await,
    }
}

/// A view of a request for matchers.
pub(super) fn view(parts: &Parts) -> RequestView<'_> {
    RequestView {
        method: parts.method.as_str(),
        path: parts.uri.path(),
        query: parts.uri.query(),
        // Looked up where somebody asks: few matchers do.
        authority: None,
        scheme: None,
        headers: &parts.headers,
    }
}

/// Takes off the fields that only internal clients may send; whether there were any.
fn keep_for_internal(table: &RouteTable, headers: &mut HeaderMap) -> bool {
    let mut any = false;
    for name in &table.internal_only {
        any |= headers.remove(name).is_some();
    }
    any
}

/// A request that is to be sent on.
struct Onward {
    exchange: Box<Exchange>,
    routed: Routed,
    parts: Box<Parts>,
    body: Option<Inbound>,
    tunnel: Option<Tunnel>,
}

/// Finds the route of a request and lets the request pass the filters; the response, if that is ours to give.
async fn route(
    conn: Rc<Downstream>,
    mut exchange: Box<Exchange>,
    mut parts: Box<Parts>,
    incoming: Incoming,
    tunnel: Option<Tunnel>,
    outbox: &mut Option<filters::Outbox>,
) -> Result<Onward, Response<Body>> {
    if conn.tls.is_some() && !conn.serves(view(&parts).authority()) {
        conn.decide_upgrade(false);
        let reply = LocalReply::new(
            StatusCode::MISDIRECTED_REQUEST,
            Flags::NO_ROUTE,
            "misdirected_request",
            "this connection was made for another host",
        );
        return Err(reply.send(exchange));
    }
    let mut routed = find_route(&conn, &parts, &conn.noted);
    if !routed.is_found()
        && conn.manager.waits_for_hosts
        && Box::pin(filters::on_demand::virtual_host(&conn, &parts)).await
    {
        routed = find_route(&conn, &parts, &conn.noted);
    }
    if !exchange.internal && keep_for_internal(&routed.table, &mut parts.headers) {
        routed = find_route(&conn, &parts, &conn.noted);
    }
    exchange.route = routed.configured();
    if conn.manager.logs_start {
        note_cluster(&mut exchange, &routed, &parts);
        logging::write_meanwhile(&exchange, LogType::DownstreamStart);
    }
    let mut body = (tunnel.is_none() && !incoming.is_end_stream()).then(|| Inbound::new(incoming));
    if !conn.manager.filters.filters.is_empty() {
        routed.choose(conn.worker.id);
        note_cluster(&mut exchange, &routed, &parts);
        let passed = filters::decode(&conn, &mut exchange, &mut routed, &mut parts, &mut body).await;
        exchange.unread = body.as_ref().is_some_and(|body| !body.is_whole());
        *outbox = filters::outbox(&exchange);
        filters::keep_request(&mut exchange, &parts);
        if let Err(reply) = passed {
            return Err(answer_for_filter(exchange, &mut routed, &parts, reply));
        }
    }
    conn.manager.traffic.routed(conn.worker.id);
    if let Action::Forward(_) = &routed.route.action {
        return Ok(Onward {
            exchange,
            routed,
            parts,
            body,
            tunnel,
        });
    }
    conn.decide_upgrade(false);
    Err(answer(exchange, &routed, &mut parts))
}

/// Notes the cluster of a request that filters may answer, where a log may tell it.
fn note_cluster(exchange: &mut Exchange, routed: &Routed, parts: &Parts) {
    if exchange.conn.manager.logs.is_some() {
        exchange.routed = routed.known_cluster(exchange.conn.worker.id, &parts.headers);
    }
}

/// Sends what a filter answers instead of the route.
fn answer_for_filter(
    mut exchange: Box<Exchange>,
    routed: &mut Routed,
    parts: &Parts,
    reply: LocalReply,
) -> Response<Body> {
    exchange.conn.decide_upgrade(false);
    logging::keep_sent(&mut exchange, parts);
    routed.expect(exchange.conn.worker.id);
    note_cluster(&mut exchange, routed, parts);
    // What a route that forwards does to responses is done to those of filters as well, but not to what CORS says.
    match &routed.route.action {
        Action::Forward(_) if reply.details != "cors_response" => {
            upstream::decline(exchange, routed, routed.target(), parts, None, reply)
        }
        _ => reply.send(exchange),
    }
}
