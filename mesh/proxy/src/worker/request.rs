//! The request path: hygiene, identity, routing, filters, action.

use std::rc::Rc;
use std::sync::{Arc, LazyLock};

use http::request::Parts;
use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Response, StatusCode, Uri, Version, header};
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
use crate::config::hcm::Underscores;
use crate::config::headers::{HeaderOps, Scene};
use crate::config::listener::Direction;
use crate::config::matchers::RequestView;
use crate::config::route::{Action, Route, RouteFacts, Target, TargetCluster, Targets, VirtualHost, is_grpc};
use crate::config::slot::Directory;
use crate::config::table::RouteTable;
use crate::hygiene::fields::{Present, join_repeated, never_again};
use crate::hygiene::path::{Normalized, normalize};
use crate::hygiene::scan::{Violation, valid_host};
use crate::metrics::events::{CodecEvent, HttpEvent};
use crate::metrics::flags::Flags;
use crate::metrics::peer::{METADATA_HEADER, METADATA_ID_HEADER};
use crate::overload;
use crate::policy::metadata::Metadata;
use crate::random;

pub(super) static X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
pub(super) static X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
static X_EXTERNAL_ADDRESS: HeaderName = HeaderName::from_static("x-envoy-external-address");
static X_FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
pub(super) static PEER_METADATA: HeaderName = HeaderName::from_static(METADATA_HEADER);
pub(super) static PEER_METADATA_ID: HeaderName = HeaderName::from_static(METADATA_ID_HEADER);
/// Says on a response that the request was not processed and may be sent again, whatever its method. Set by an inbound
/// proxy that could not reach its application; believed by the client's proxy, taken off before anyone else sees it.
pub(super) static X_UNPROCESSED: HeaderName = HeaderName::from_static("x-serin-unprocessed");
/// Fields by which clients could steer an Envoy; taken from outside clients only as text.
const INTERNAL_FIELDS: [&str; 12] = [
    "x-envoy-internal",
    "x-envoy-retry-on",
    "x-envoy-retry-grpc-on",
    "x-envoy-max-retries",
    "x-envoy-upstream-rq-timeout-ms",
    "x-envoy-upstream-rq-per-try-timeout-ms",
    "x-envoy-upstream-alt-stat-name",
    "x-envoy-decorator-operation",
    "x-envoy-hedge-on-per-try-timeout",
    "x-envoy-attempt-count",
    "x-envoy-original-path",
    "x-serin-unprocessed",
];

/// What was decided about a request, for those that act on it.
pub(super) struct Routed {
    pub table: Arc<RouteTable>,
    pub host: Arc<VirtualHost>,
    pub route: Arc<Route>,
    /// The weighted cluster, where it was chosen before the filters ran.
    pub chosen: Option<usize>,
}

/// What stands for a route that there is not, and says nothing to any filter (Envoy's rule).
struct Instead {
    table: Arc<RouteTable>,
    host: Arc<VirtualHost>,
    nobody: Arc<Route>,
    tls: Arc<Route>,
}

static INSTEAD: LazyLock<Instead> = LazyLock::new(|| Instead {
    table: Arc::new(RouteTable::empty()),
    host: Arc::new(VirtualHost::empty("")),
    nobody: Arc::new(Route::instead(Action::Nobody)),
    tls: Arc::new(Route::instead(Action::Tls)),
});

impl Routed {
    /// For a request that nobody answers: filters see it all the same, then it gets its 404.
    pub(super) fn nobody() -> Self {
        Self::without_route(&INSTEAD.nobody)
    }

    fn without_route(route: &Arc<Route>) -> Self {
        Self {
            table: INSTEAD.table.clone(),
            host: INSTEAD.host.clone(),
            route: route.clone(),
            chosen: None,
        }
    }

    /// Whether somebody answers.
    pub(super) fn is_found(&self) -> bool {
        !matches!(self.route.action, Action::Nobody)
    }

    /// The route, where it is one of the configuration.
    pub(super) fn configured(&self) -> Option<Arc<Route>> {
        match self.route.action {
            Action::Nobody | Action::Tls => None,
            Action::Forward(_) | Action::Redirect(_) | Action::Direct(_) => Some(self.route.clone()),
        }
    }

    /// The weighted cluster, if it has been chosen.
    pub(super) fn target(&self) -> Option<&Target> {
        match (&self.route.action, self.chosen) {
            (Action::Forward(forward), Some(index)) => match &forward.targets {
                Targets::Weighted(targets, ..) => targets.get(index),
                Targets::One(_) | Targets::Named(..) | Targets::Empty => None,
            },
            _ => None,
        }
    }

    /// The cluster that the request goes to, as far as it is known.
    pub(super) fn cluster_name(&self) -> &str {
        if let Some(target) = self.target() {
            return match &target.cluster {
                TargetCluster::Fixed(slot) => &slot.name,
                TargetCluster::Named(..) => "",
            };
        }
        match &self.route.action {
            Action::Forward(forward) => match &forward.targets {
                Targets::One(slot) => &slot.name,
                Targets::Weighted(..) | Targets::Named(..) | Targets::Empty => "",
            },
            Action::Redirect(_) | Action::Direct(_) | Action::Nobody | Action::Tls => "",
        }
    }

    /// The weighted cluster whose turn it would be.
    pub(super) fn expected(&self, worker: usize) -> Option<usize> {
        match &self.route.action {
            Action::Forward(forward) => match &forward.targets {
                Targets::Weighted(_, weights, turn) => Some(weights.pick(turn.peek(worker))),
                Targets::One(_) | Targets::Named(..) | Targets::Empty => None,
            },
            Action::Redirect(_) | Action::Direct(_) | Action::Nobody | Action::Tls => None,
        }
    }

    /// What the levels of the configuration do to fields, in the order in which they do it: the weighted cluster first, and
    /// whoever has the last word last (Envoy).
    pub(super) fn header_levels<'a>(
        &'a self,
        target: Option<&'a HeaderOps>,
        of: fn(&'a Route, &'a VirtualHost, &'a RouteTable) -> [&'a HeaderOps; 3],
    ) -> impl Iterator<Item = &'a HeaderOps> {
        let mut levels = of(&self.route, &self.host, &self.table);
        if self.table.most_specific_wins {
            levels.reverse();
        }
        target.into_iter().chain(levels).filter(|ops| !ops.is_empty())
    }

    /// Mutations of a response, of whatever made it.
    pub(super) fn mutate_response(
        &self,
        headers: &mut HeaderMap,
        target: Option<&Target>,
        scene: &dyn Scene,
    ) {
        let target = target.map(|target| &target.response_headers);
        let levels = self.header_levels(target, |route, host, table| {
            [
                &route.response_headers,
                &host.response_headers,
                &table.response_headers,
            ]
        });
        for ops in levels {
            ops.apply(headers, scene);
        }
    }

    /// The cluster that the request would go to as things are, if there is that cluster.
    pub(super) fn known_cluster(&self, worker: usize, headers: &HeaderMap) -> Option<Arc<str>> {
        let Action::Forward(forward) = &self.route.action else {
            return None;
        };
        let named = |field: &HeaderName, directory: &Directory| {
            let slot = directory.find(headers.get(field)?.to_str().ok()?)?;
            slot.exists().then(|| slot.name.clone())
        };
        let slot = match &forward.targets {
            Targets::One(slot) => slot,
            Targets::Weighted(targets, ..) => {
                let index = self.chosen.or_else(|| self.expected(worker))?;
                match &targets.get(index)?.cluster {
                    TargetCluster::Fixed(slot) => slot,
                    TargetCluster::Named(field, directory) => return named(field, directory),
                }
            }
            Targets::Named(field, directory) => return named(field, directory),
            Targets::Empty => return None,
        };
        slot.exists().then(|| slot.name.clone())
    }
}

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
    if let Err(reply) = admit(&conn, &mut exchange, &mut parts) {
        conn.worker.recorder.counters().refused_requests.add(1);
        return Ok(turn_away(exchange, &parts, present, reply).await);
    }
    let tunnel = match tunnel::take(&conn, &mut parts, present) {
        Ok(tunnel) => tunnel,
        Err(reply) => return Ok(turn_away(exchange, &parts, present, reply).await),
    };
    if conn
        .worker
        .shared
        .overload
        .hits(overload::Action::StopAcceptingRequests, random::next)
    {
        conn.decide_upgrade(false);
        conn.note(HttpEvent::RqOverload);
        let reply = LocalReply::new(
            StatusCode::SERVICE_UNAVAILABLE,
            Flags::OVERLOAD,
            "overload",
            "envoy overloaded",
        );
        return Ok(turn_away(exchange, &parts, present, reply).await);
    }
    identify(&conn, &mut exchange, &mut parts, present);
    tap::arrive(&mut exchange, &conn.worker.shared.tap, &parts);
    spans::begin(&mut exchange, &mut parts);
    logging::keep_request(&mut exchange, &parts, present);
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

/// Answers a request that never gets as far as to a route: it is logged like others, and filters see the answer.
async fn turn_away(
    mut exchange: Box<Exchange>,
    parts: &Parts,
    present: Present,
    reply: LocalReply,
) -> Response<Body> {
    exchange.request_id = parts.headers.get(&X_REQUEST_ID).cloned();
    logging::keep_request(&mut exchange, parts, present);
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

/// The hygiene rules that need a parsed head: target forms, authority, path.
fn admit(conn: &Downstream, exchange: &mut Exchange, parts: &mut Parts) -> Result<(), LocalReply> {
    let refuse = |status: StatusCode, details| {
        let mut reply = LocalReply::new(status, Flags::DOWNSTREAM_PROTOCOL_ERROR, details, "");
        reply.close = true;
        reply
    };
    if let Some(violation) = conn.gate.violation(conn.request_number()) {
        exchange.headless = true;
        if violation == Violation::Unfinished {
            return Err(LocalReply::of_late_head());
        }
        conn.note(HttpEvent::CxProtocolError);
        let status = StatusCode::from_u16(violation.status()).unwrap_or(StatusCode::BAD_REQUEST);
        return Err(refuse(status, violation.details()));
    }
    if parts.method == Method::CONNECT && !tunnel::may_connect(conn, parts) {
        return Err(refuse(StatusCode::METHOD_NOT_ALLOWED, "connect_not_allowed"));
    }
    let bad = |details| refuse(StatusCode::BAD_REQUEST, details);
    let of_version = |http1, http2| match parts.version {
        Version::HTTP_2 => http2,
        _ => http1,
    };
    match conn.manager.underscores {
        Underscores::Keep => {}
        Underscores::Drop => {
            let dropped = drop_underscores(&mut parts.headers);
            conn.note_codec(
                of_version(CodecEvent::Http1Dropped, CodecEvent::Http2Dropped),
                dropped,
            );
        }
        Underscores::Reject if parts.headers.keys().any(has_underscore) => {
            conn.note_codec(
                of_version(CodecEvent::Http1Rejected, CodecEvent::Http2Rejected),
                1,
            );
            return Err(bad(match parts.version {
                Version::HTTP_2 => "http2.unexpected_underscore",
                _ => "http1.unexpected_underscore",
            }));
        }
        Underscores::Reject => {}
    }
    // The authority of the target wins over Host (RFC 9112 section 3.2.2, RFC 9113 section 8.3.1).
    if let Some(authority) = parts.uri.authority() {
        if authority.as_str().contains('@') || !valid_host(authority.as_str().as_bytes()) {
            return Err(bad("invalid_authority"));
        }
        let value = HeaderValue::from_str(authority.as_str()).map_err(|_| bad("invalid_authority"))?;
        if parts.version == Version::HTTP_2
            && parts
                .headers
                .get(header::HOST)
                .is_some_and(|host| !host.as_bytes().eq_ignore_ascii_case(value.as_bytes()))
        {
            return Err(bad("host_and_authority_differ"));
        }
        parts.headers.insert(header::HOST, value);
    } else if parts.headers.get(header::HOST).is_none() {
        if parts.version == Version::HTTP_10 && !conn.manager.default_host.is_empty() {
            let value =
                HeaderValue::from_str(&conn.manager.default_host).map_err(|_| bad("invalid_authority"))?;
            parts.headers.insert(header::HOST, value);
        } else if parts.version == Version::HTTP_2 {
            return Err(bad("missing_host_header"));
        }
    } else if parts.version == Version::HTTP_2
        && !parts
            .headers
            .get(header::HOST)
            .is_some_and(|host| valid_host(host.as_bytes()))
    {
        return Err(bad("invalid_authority"));
    }
    exchange.authority = parts.headers.get(header::HOST).cloned();
    normalize_target(conn, exchange.grpc, parts)?;
    if conn.manager.strip_port
        && let Some(host) = parts
            .headers
            .get(header::HOST)
            .and_then(|value| value.to_str().ok())
    {
        let stripped = crate::config::table::strip_port(host);
        if stripped.len() < host.len()
            && let Ok(value) = HeaderValue::from_str(stripped)
        {
            exchange.authority = Some(value.clone());
            parts.headers.insert(header::HOST, value);
        }
    }
    Ok(())
}

fn has_underscore(name: &HeaderName) -> bool {
    name.as_str().contains('_')
}

/// Returns how many fields there were.
fn drop_underscores(headers: &mut HeaderMap) -> u64 {
    let names: Vec<_> = headers
        .keys()
        .filter(|name| has_underscore(name))
        .cloned()
        .collect();
    let before = headers.len();
    for name in names {
        headers.remove(name);
    }
    (before - headers.len()) as u64
}

/// Makes the target origin-form with a normalised path.
fn normalize_target(conn: &Downstream, grpc: bool, parts: &mut Parts) -> Result<(), LocalReply> {
    let path = parts.uri.path();
    if path.is_empty() && parts.method == Method::CONNECT {
        return Ok(());
    }
    if path == "*" {
        return if parts.method == Method::OPTIONS {
            Ok(())
        } else {
            Err(LocalReply::new(
                StatusCode::BAD_REQUEST,
                Flags::DOWNSTREAM_PROTOCOL_ERROR,
                "invalid_path",
                "",
            ))
        };
    }
    let manager = &conn.manager;
    let normalized = normalize(
        path,
        manager.normalize_path,
        manager.merge_slashes,
        manager.escaped_slashes,
    );
    let with_query = |path: &str, parts: &Parts| match parts.uri.query() {
        Some(query) => format!("{path}?{query}"),
        None => path.to_owned(),
    };
    let invalid = |details| {
        LocalReply::new(
            StatusCode::BAD_REQUEST,
            Flags::DOWNSTREAM_PROTOCOL_ERROR,
            details,
            "",
        )
    };
    let target = match &normalized {
        // Callers by gRPC follow no redirects.
        Normalized::Redirect(path) if !grpc => {
            conn.note(HttpEvent::RqPathRedirected);
            let target = with_query(path, parts);
            let location = HeaderValue::from_str(&target);
            let location = location.map_err(|_| invalid("path_normalization_failed"))?;
            parts.uri = target.parse().map_err(|_| invalid("path_normalization_failed"))?;
            let mut reply = LocalReply::new(
                StatusCode::TEMPORARY_REDIRECT,
                Flags::default(),
                "path_normalization_failed",
                "",
            );
            reply.headers.insert(header::LOCATION, location);
            return Err(reply);
        }
        Normalized::Redirect(_) | Normalized::Refused(_) => {
            conn.note(HttpEvent::RqPathRefused);
            let seen = match &normalized {
                Normalized::Redirect(path) => with_query(path, parts),
                Normalized::Path(path) | Normalized::Refused(path) => with_query(path, parts),
            };
            if let Ok(uri) = seen.parse() {
                parts.uri = uri;
            }
            return Err(LocalReply::new(
                StatusCode::BAD_REQUEST,
                Flags::default(),
                "path_normalization_failed",
                "",
            ));
        }
        Normalized::Path(std::borrow::Cow::Owned(path)) => with_query(path, parts).parse(),
        // Already origin-form, the usual case for HTTP/1: nothing is rebuilt.
        Normalized::Path(std::borrow::Cow::Borrowed(_))
            if parts.uri.authority().is_none() && parts.uri.scheme().is_none() =>
        {
            return Ok(());
        }
        Normalized::Path(std::borrow::Cow::Borrowed(_)) => Ok(parts
            .uri
            .path_and_query()
            .cloned()
            .unwrap_or_else(|| PathAndQuery::from_static("/"))),
    };
    parts.uri = target.map(Uri::from).map_err(|_| invalid("invalid_path"))?;
    Ok(())
}

/// Who asks, and the fields that say so to the next hop. `present` was found in the head as it came.
fn identify(conn: &Downstream, exchange: &mut Exchange, parts: &mut Parts, present: Present) {
    let headers = &mut parts.headers;
    let manager = &conn.manager;
    let exchanged = manager.metadata_exchange || conn.direction == Direction::Inbound;
    if exchanged && present.has(Present::PEER) {
        let metadata = headers.remove(&PEER_METADATA);
        headers.remove(&PEER_METADATA_ID);
        if conn.direction == Direction::Inbound {
            exchange.peer = metadata.and_then(|value| conn.worker.peer(&value));
        }
    }
    let certificate = present.has(Present::CLIENT_CERT);
    manager
        .client_cert
        .apply(headers, conn.tls.as_deref(), certificate);
    let scheme = HeaderValue::from_static(if conn.tls.is_some() { "https" } else { "http" });
    if manager.use_remote_address {
        if present.has(Present::OWN) {
            for name in INTERNAL_FIELDS {
                headers.remove(name);
            }
        }
        let value = match headers
            .get(&X_FORWARDED_FOR)
            .and_then(|value| value.to_str().ok())
        {
            Some(before) => HeaderValue::try_from(format!("{before},{}", conn.remote.ip().to_canonical())),
            None => Ok(conn.remote_text().clone()),
        };
        if let Ok(value) = value
            && !manager.skip_forwarded_for
        {
            headers.insert(X_FORWARDED_FOR.clone(), value);
        }
        headers.insert(X_FORWARDED_PROTO.clone(), scheme);
        headers.insert(X_EXTERNAL_ADDRESS.clone(), conn.remote_text().clone());
    } else if !present.has(Present::FORWARDED_PROTO) {
        headers.insert(X_FORWARDED_PROTO.clone(), scheme);
    } else {
        // `connection` may have taken it off.
        headers.entry(X_FORWARDED_PROTO.clone()).or_insert(scheme);
    }
    if manager.generate_request_id {
        let known = present.has(Present::REQUEST_ID);
        let value = match known.then(|| headers.get_mut(&X_REQUEST_ID)).flatten() {
            Some(value) if !manager.use_remote_address || manager.preserve_request_id => {
                never_again(value);
                value.clone()
            }
            _ => {
                let fresh = HeaderValue::from_bytes(&random::uuid());
                let mut value = fresh.unwrap_or(HeaderValue::from_static("-"));
                never_again(&mut value);
                headers.insert(X_REQUEST_ID.clone(), value.clone());
                value
            }
        };
        exchange.request_id = Some(value);
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

/// The route of a request; `metadata` is what filters have noted so far.
pub(super) fn find_route(conn: &Downstream, parts: &Parts, metadata: &Metadata) -> Routed {
    configured_route(conn, parts, metadata).unwrap_or_else(Routed::nobody)
}

fn configured_route(conn: &Downstream, parts: &Parts, metadata: &Metadata) -> Option<Routed> {
    let table = conn.manager.table()?;
    let view = view(parts);
    let slot = table.find(view.authority())?;
    if conn.manager.waits_for_hosts {
        slot.mark_used();
    }
    let host = slot.load();
    if host.require_tls && view.scheme() != "https" {
        return Some(Routed::without_route(&INSTEAD.tls));
    }
    let facts = RouteFacts {
        tls: conn.tls.as_deref(),
        metadata: Some(metadata),
    };
    let route = host.find_with(&view, &facts, random::next)?.clone();
    Some(Routed {
        table,
        host,
        route,
        chosen: None,
    })
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
    exchange.route = routed.configured();
    let mut body = (tunnel.is_none() && !incoming.is_end_stream()).then(|| Inbound::new(incoming));
    if !conn.manager.filters.filters.is_empty() {
        filters::choose_target(&conn, &mut routed);
        if conn.manager.logs.is_some() {
            exchange.routed = routed.known_cluster(conn.worker.id, &parts.headers);
        }
        let passed = filters::decode(&conn, &mut exchange, &mut routed, &mut parts, &mut body).await;
        exchange.unread = body.as_ref().is_some_and(|body| !body.is_whole());
        *outbox = filters::outbox(&exchange);
        filters::keep_request(&mut exchange, &parts);
        if let Err(reply) = passed {
            conn.decide_upgrade(false);
            logging::keep_sent(&mut exchange, &parts);
            filters::expect_target(&conn, &mut routed);
            if conn.manager.logs.is_some() {
                exchange.routed = routed.known_cluster(conn.worker.id, &parts.headers);
            }
            // What a route that forwards does to responses is done to those of filters as well, but not to what CORS says.
            return Err(match &routed.route.action {
                Action::Forward(_) if reply.details != "cors_preflight" => {
                    upstream::decline(exchange, &routed, routed.target(), &parts, None, reply)
                }
                _ => reply.send(exchange),
            });
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

impl Routed {
    pub(super) fn clone_arcs(&self) -> Self {
        Self {
            table: self.table.clone(),
            host: self.host.clone(),
            route: self.route.clone(),
            chosen: self.chosen,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_field_that_outside_clients_may_not_send_is_seen_by_the_look_at_their_heads() {
        for name in INTERNAL_FIELDS {
            let mut headers = HeaderMap::new();
            headers.insert(name, HeaderValue::from_static("1"));
            assert!(Present::of(&headers).has(Present::OWN), "{name}");
        }
        assert!(!Present::of(&HeaderMap::new()).has(Present::OWN));
    }
}
