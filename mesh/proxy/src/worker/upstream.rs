//! Forwarding: cluster, endpoint, connection, attempts, response.

use std::borrow::Cow;
use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use bytes::Bytes;
use http::request::Parts;
use http::uri::{Authority, Scheme};
use http::{HeaderMap, HeaderName, HeaderValue, Response, StatusCode, Version};
use tokio::time::Instant;

use super::asked::Times;
use super::attempts::{Permit, X_ATTEMPT_COUNT, attempts};
use super::body::{Inbound, RequestSource};
use super::exchange::Exchange;
use super::filters;
use super::hedge::hedged;
use super::http::Downstream;
use super::interim::Waiting;
use super::local::{Body, LocalReply};
use super::logging;
use super::mirror::mirror;
use super::prepare::prepare;
use super::request::{Routed, view};
use super::respond::{Answer, respond, respond_waiting};
use super::scene::ResponseScene;
use super::tunnel::{self, Tunnel};
use crate::config::cluster::UpstreamHttp;
use crate::config::hash::{Hashed, request_hash};
use crate::config::retry::RetryPolicy;
use crate::config::route::{Action, Forward, HostRewrite, Target, TargetCluster, Targets};
use crate::config::slot::{ClusterSlot, Directory};
use crate::config::subset::{Criteria, METADATA};
use crate::config::virtual_cluster::VirtualCluster;
use crate::metrics::clusters::ClusterCells;
use crate::metrics::events::{ClusterEvent, HttpEvent};
use crate::metrics::flags::Flags;
use crate::random;
use crate::upstream::cluster::WorkerCluster;
use crate::upstream::connect::{ConnectOptions, Speaking};

static X_OVERLOADED: HeaderName = HeaderName::from_static("x-envoy-overloaded");

/// Everything that stays the same over the attempts.
pub(super) struct Plan<'a> {
    pub(super) conn: &'a Rc<Downstream>,
    pub(super) cluster: &'a Rc<WorkerCluster>,
    pub(super) routed: &'a Routed,
    pub(super) forward: &'a Forward,
    /// The request's body.
    pub(super) source: Option<&'a Rc<RefCell<RequestSource>>>,
    pub(super) speaking: Speaking,
    /// Of connections that are made for this request only, or for those like it.
    pub(super) options: ConnectOptions,
    /// Whether and when to try again: the route's policy, or what the request has made of it.
    pub(super) retry: Option<&'a RetryPolicy>,
    /// What the endpoint is told of them.
    pub(super) times: Times,
    pub(super) deadline: Option<Instant>,
    /// Whether that is the end of the stream's time and not of the route's.
    pub(super) by_stream: bool,
    pub(super) hash: Option<u64>,
    /// That the client is given, so that its next requests find the same endpoint.
    pub(super) cookies: Vec<HeaderValue>,
    /// The subset that the request wants.
    pub(super) criteria: Option<&'a Criteria>,
    pub(super) auto_host: bool,
    /// What the client called the authority, for an upstream that is given the same one.
    pub(super) authority: Option<Authority>,
    /// The scheme that the endpoint is told.
    pub(super) scheme: Scheme,
    /// Where interim answers go to a client over HTTP/2.
    pub(super) interims: Option<Arc<Waiting>>,
}

impl Plan<'_> {
    /// Where what happens is counted for the cluster.
    pub(super) fn cells(&self) -> &ClusterCells {
        self.cluster.cells(&self.conn.worker.recorder)
    }

    /// Something rare has happened to the cluster.
    pub(super) fn note(&self, event: ClusterEvent) {
        self.cluster.slot.counted.note(event);
    }
}

/// Sends a reply of our own to a request that had a route: what the route does to responses is done to it first, then the
/// reply's own fields are set.
pub(super) fn decline(
    mut exchange: Box<Exchange>,
    routed: &Routed,
    target: Option<&Target>,
    parts: &Parts,
    request: Option<&HeaderMap>,
    mut reply: LocalReply,
) -> Response<Body> {
    reply.foretell(&mut exchange);
    let scene = ResponseScene {
        request: request.unwrap_or(&parts.headers),
        ..ResponseScene::of(&exchange, parts)
    };
    let mut headers = HeaderMap::new();
    routed.mutate_response(&mut headers, target, &scene);
    for name in reply.headers.keys() {
        headers.remove(name);
    }
    headers.extend(std::mem::take(&mut reply.headers));
    // What the connection manager decides is not the router's answer.
    let of_router = reply.details != "max_duration_timeout";
    if of_router && routed.host.attempt_count_in_response && exchange.attempts > 0 {
        headers.insert(X_ATTEMPT_COUNT.clone(), HeaderValue::from(exchange.attempts));
    }
    reply.headers = headers;
    reply.send(exchange)
}

/// Sends a request on and brings the response back.
pub(super) async fn forward(
    mut exchange: Box<Exchange>,
    routed: Routed,
    mut parts: Box<Parts>,
    incoming: Option<Inbound>,
    mut tunnel: Option<Tunnel>,
) -> Response<Body> {
    let conn = exchange.conn.clone();
    let Action::Forward(forward) = &routed.route.action else {
        return not_forwarding().send(exchange);
    };
    let found = destination(&conn, forward, &routed, &parts);
    let target = match &found {
        Ok(found) => found.target,
        Err(missing) => missing.target,
    };
    let entered = enter(&mut exchange, &routed, forward, found, &parts, tunnel.as_ref());
    let (cluster, permit) = match entered {
        Ok(entered) => entered,
        Err(reply) => return decline(exchange, &routed, target, &parts, None, reply),
    };
    let hashed = hash(&exchange, forward, &parts);
    let criteria = target
        .and_then(|target| target.criteria.as_deref())
        .or(forward.criteria.as_deref());
    let noted = noted_criteria(&exchange, criteria, &cluster);
    if let Some(reply) = disobeyed(&conn, &parts.headers) {
        return decline(exchange, &routed, target, &parts, None, reply);
    }
    let times = Times::of(forward, &conn.manager.router, exchange.grpc, &mut parts.headers);
    let speaking = speaking(cluster.config.http, parts.version, tunnel.as_ref());
    if let Err(reply) = prepare(&exchange, &routed, forward, target, &mut parts) {
        return decline(exchange, &routed, target, &parts, None, reply);
    }
    let retries = retries(&routed, forward, &times, &mut parts.headers);
    let retry = retries.policy();
    logging::keep_sent(&mut exchange, &parts);
    filters::keep_request(&mut exchange, &parts);
    let request_headers = headers_for_response(&routed, target, &parts);
    let source = body_source(&mut exchange, forward, retry, incoming);
    let deadline = deadline(&mut exchange, forward, &times, &parts.headers);
    let plan = Plan {
        conn: &conn,
        cluster: &cluster,
        routed: &routed,
        forward,
        source: source.as_ref(),
        speaking,
        options: connect_options(&exchange, &cluster, forward, speaking, &parts),
        retry,
        times,
        deadline,
        by_stream: exchange.stream_limited,
        hash: hashed.hash,
        cookies: hashed.cookies,
        criteria: noted.as_ref().or(criteria),
        auto_host: matches!(forward.host_rewrite.as_deref(), Some(HostRewrite::Auto)),
        authority: exchange.uri.authority().cloned(),
        scheme: exchange.scheme.clone(),
        interims: exchange.interims.take(),
    };
    if forward.connect_tcp
        && let Some(tunnel) = tunnel.take_if(|tunnel| tunnel.is_connect())
    {
        return match Box::pin(tunnel.join_tcp(exchange, &plan, permit)).await {
            Ok(response) => response,
            Err((exchange, reply)) => {
                conn.decide_upgrade(false);
                decline(exchange, &routed, target, &parts, request_headers.as_ref(), reply)
            }
        };
    }
    let mirror_head = (!forward.mirrors.is_empty()).then(|| Parts::clone(&parts));
    let outcome = if times.hedge && tunnel.is_none() {
        Box::pin(hedged(&plan, &mut exchange, &mut parts)).await
    } else {
        attempts(&plan, &mut exchange, &mut parts, tunnel.as_ref()).await
    };
    if let Some(head) = mirror_head {
        mirror(&conn, forward, head, source.as_ref());
    }
    let (response, lease, active) = match outcome {
        Ok(success) => success,
        Err(reply) => {
            conn.decide_upgrade(false);
            let mut reply = if reply.details == "overflow" {
                overflow(&conn)
            } else {
                reply
            };
            if times.no_content && reply.flags.has(Flags::UPSTREAM_TIMEOUT) {
                reply.status = StatusCode::NO_CONTENT;
                reply.body = Bytes::new();
            }
            return decline(exchange, &routed, target, &parts, request_headers.as_ref(), reply);
        }
    };
    drop(permit);
    exchange.upstream_local = lease.local();
    if let Some(tunnel) = tunnel {
        if tunnel.granted(response.status(), lease.is_http2()) {
            return tunnel.join_http(exchange, response, lease, active);
        }
        conn.decide_upgrade(false);
    }
    let answer = Answer {
        plan: &plan,
        target,
        request_headers,
        parts: &parts,
        response,
        lease,
        active,
    };
    if filters::waits(&exchange) {
        // Boxed: every request's future would carry its state.
        return Box::pin(respond_waiting(exchange, answer)).await;
    }
    respond(exchange, answer)
}

fn not_forwarding() -> LocalReply {
    LocalReply::new(
        StatusCode::INTERNAL_SERVER_ERROR,
        Flags::LOCAL_RESET,
        "not_forwarding",
        "",
    )
}

/// What a request must pass at its cluster: the cluster, and the request's place under the limit of requests.
fn enter(
    exchange: &mut Exchange,
    routed: &Routed,
    forward: &Forward,
    found: Result<Destination<'_>, Missing<'_, '_>>,
    parts: &Parts,
    tunnel: Option<&Tunnel>,
) -> Result<(Rc<WorkerCluster>, Permit), LocalReply> {
    let slot = match found {
        Ok(found) => found.slot,
        Err(missing) => {
            exchange.cluster_name = missing.name.map(Arc::from);
            logging::keep_sent(exchange, parts);
            return Err(no_cluster(&exchange.conn, forward));
        }
    };
    let kinds = &routed.host.virtual_clusters;
    if !kinds.is_empty() {
        exchange.virtual_cluster = VirtualCluster::find(kinds, &view(parts)).cloned();
    }
    if tunnel.is_some_and(|tunnel| refuses(forward, tunnel)) {
        exchange.conn.note(HttpEvent::RqNoUpgrade);
        exchange.conn.decide_upgrade(false);
        return Err(tunnel::refused());
    }
    exchange.cluster_name = Some(slot.name.clone());
    let Some(cluster) = exchange.conn.worker.cluster(&slot) else {
        logging::keep_sent(exchange, parts);
        return Err(no_cluster(&exchange.conn, forward));
    };
    exchange.cluster = Some(cluster.clone());
    let priority = forward.priority;
    let cells = cluster.cells(&exchange.conn.worker.recorder);
    cells.began.add(1);
    let limit = cluster.config.limits.of(priority).requests;
    let Some(permit) = Permit::take(&slot, priority, |level| &level.requests, limit) else {
        cells.pending_overflow.add(1);
        return Err(overflow(&exchange.conn));
    };
    if cluster.drops(random::next()) {
        slot.counted.note(ClusterEvent::RqDropOverload);
        return Err(LocalReply::new(
            StatusCode::SERVICE_UNAVAILABLE,
            Flags::DROP_OVERLOAD,
            "drop_overload",
            "drop overload",
        ));
    }
    Ok((cluster, permit))
}

/// Whether the route forbids an upgrade that the listener allows.
fn refuses(forward: &Forward, tunnel: &Tunnel) -> bool {
    forward
        .upgrades
        .iter()
        .any(|(protocol, enabled)| !enabled && **protocol == *tunnel.protocol())
}

/// What the request hashes to, and the cookies that its client is given for that.
fn hash(exchange: &Exchange, forward: &Forward, parts: &Parts) -> Hashed {
    if forward.hash.is_empty() {
        return Hashed::default();
    }
    let conn = &exchange.conn;
    let state = &filters::metadata(exchange).state;
    request_hash(&forward.hash, &view(parts), exchange.remote, conn.local, state)
}

/// What the route asks of endpoints together with what filters have noted under the same name, where they have.
fn noted_criteria(
    exchange: &Exchange,
    of_route: Option<&Criteria>,
    cluster: &WorkerCluster,
) -> Option<Criteria> {
    cluster.config.subsets.as_ref()?;
    let noted = exchange.policy.as_ref()?.metadata.get(METADATA)?;
    Some(Criteria::default_of(of_route).with(noted))
}

/// The fields of the request as they are sent, where something will read them: that is what operations on the response
/// read (Envoy).
fn headers_for_response(routed: &Routed, target: Option<&Target>, parts: &Parts) -> Option<HeaderMap> {
    let wanted = target.is_some_and(|target| !target.response_headers.is_empty())
        || !routed.route.response_headers.is_empty()
        || !routed.host.response_headers.is_empty()
        || !routed.table.response_headers.is_empty();
    wanted.then(|| parts.headers.clone())
}

/// Where the request's body comes from.
fn body_source(
    exchange: &mut Exchange,
    forward: &Forward,
    retry: Option<&RetryPolicy>,
    incoming: Option<Inbound>,
) -> Option<Rc<RefCell<RequestSource>>> {
    let source = incoming.map(|incoming| {
        let retries = retry.is_some_and(|policy| policy.attempts > 0);
        let keep = retries || !forward.mirrors.is_empty();
        let idle = exchange.conn.manager.stream_idle_timeout;
        let idle = forward.idle_timeout.unwrap_or(idle);
        RequestSource::new(incoming, if keep { forward.request_buffer } else { 0 }, idle)
    });
    if let (Some(tap), Some(source)) = (&exchange.tap, &source) {
        source.borrow_mut().capture(tap.capture());
    }
    exchange.source.clone_from(&source);
    source
}

/// What a connection must be like that is made for this request.
fn connect_options(
    exchange: &Exchange,
    cluster: &WorkerCluster,
    forward: &Forward,
    speaking: Speaking,
    parts: &Parts,
) -> ConnectOptions {
    let conn = &exchange.conn;
    let state = &filters::metadata(exchange).state;
    let config = &cluster.config;
    let mut options = config.connect_options(Some(&parts.headers), state, conn.remote, conn.local);
    options.priority = forward.priority;
    if options.alpn.is_none()
        && config.alpn_overridable
        && let Some(names) = &conn.manager.alpn
    {
        options.alpn = names.offer(speaking, parts.version).cloned();
    }
    options
}

/// Where a request goes.
struct Destination<'a> {
    slot: Cow<'a, Arc<ClusterSlot>>,
    /// Where the route has several.
    target: Option<&'a Target>,
}

/// There is no such cluster.
struct Missing<'a, 'p> {
    /// As far as it has a name.
    name: Option<&'p str>,
    target: Option<&'a Target>,
}

/// The cluster that the route names, or the field of the request that it says.
fn destination<'a, 'p>(
    conn: &Downstream,
    forward: &'a Forward,
    routed: &'a Routed,
    parts: &'p Parts,
) -> Result<Destination<'a>, Missing<'a, 'p>> {
    let fixed = |slot, target| {
        Ok(Destination {
            slot: Cow::Borrowed(slot),
            target,
        })
    };
    let named = |field: &HeaderName, directory: &Directory, target| {
        let name = parts.headers.get(field).and_then(|value| value.to_str().ok());
        match name.and_then(|name| directory.find(name)) {
            Some(slot) => Ok(Destination {
                slot: Cow::Owned(slot),
                target,
            }),
            None => Err(Missing { name, target }),
        }
    };
    match &forward.targets {
        Targets::One(slot) => fixed(slot, None),
        Targets::Named(field, directory) => named(field, directory, None),
        Targets::Weighted(targets, weights, turn) => {
            let target = match routed.target() {
                Some(target) => target,
                None => &targets[weights.pick(turn.next(conn.worker.id))],
            };
            match &target.cluster {
                TargetCluster::Fixed(slot) => fixed(slot, Some(target)),
                TargetCluster::Named(field, directory) => named(field, directory, Some(target)),
            }
        }
        Targets::Empty => Err(Missing {
            name: None,
            target: None,
        }),
    }
}

fn no_cluster(conn: &Downstream, forward: &Forward) -> LocalReply {
    conn.note(HttpEvent::NoCluster);
    conn.decide_upgrade(false);
    LocalReply::new(
        forward.cluster_not_found,
        Flags::NO_CLUSTER,
        "cluster_not_found",
        "",
    )
}

fn overflow(conn: &Downstream) -> LocalReply {
    let mut reply = LocalReply::new(
        StatusCode::SERVICE_UNAVAILABLE,
        Flags::UPSTREAM_OVERFLOW,
        "upstream_reset_before_response_started{overflow}",
        "upstream connect error or disconnect/reset before headers. reset reason: overflow",
    );
    if !conn.manager.router.suppress_envoy_headers {
        reply
            .headers
            .insert(X_OVERLOADED.clone(), HeaderValue::from_static("true"));
    }
    reply
}

/// Whether and when a request is tried again.
enum Retries<'a> {
    /// As its route says.
    OfRoute(Option<&'a RetryPolicy>),
    /// As it asks for itself.
    Asked(Option<Box<RetryPolicy>>),
}

impl Retries<'_> {
    fn policy(&self) -> Option<&RetryPolicy> {
        match self {
            Self::OfRoute(policy) => *policy,
            Self::Asked(policy) => policy.as_deref(),
        }
    }
}

/// What the route says of retries, and what the request asks, whose fields are taken off.
fn retries<'a>(routed: &Routed, forward: &'a Forward, times: &Times, headers: &mut HeaderMap) -> Retries<'a> {
    // What the route adds may ask for retries as well (Envoy).
    let adds = [
        &routed.route.request_headers,
        &routed.host.request_headers,
        &routed.table.request_headers,
    ];
    let may_ask = times.asks || adds.iter().any(|ops| !ops.is_empty());
    if !may_ask || !headers.keys().any(|name| RetryPolicy::is_asked_by(name.as_str())) {
        return Retries::OfRoute(forward.retry.as_deref());
    }
    Retries::Asked(RetryPolicy::asked(forward.retry.as_deref(), headers).map(Box::new))
}

/// An answer to a request that asks for something in a field which is checked, and cannot be understood.
fn disobeyed(conn: &Downstream, headers: &HeaderMap) -> Option<LocalReply> {
    let (name, value) = conn.manager.router.disobeyed(headers)?;
    let mut reply = LocalReply::new(
        StatusCode::BAD_REQUEST,
        Flags::INVALID_ENVOY_HEADERS,
        format!("request_headers_failed_strict_check{{{name}}}"),
        "",
    );
    reply.body = format!("invalid header '{name}' with value '{value}'").into();
    Some(reply)
}

/// What is spoken with the endpoint.
fn speaking(cluster: UpstreamHttp, client: Version, tunnel: Option<&Tunnel>) -> Speaking {
    match cluster {
        UpstreamHttp::Http2 => Speaking::Http2,
        UpstreamHttp::Downstream if client == Version::HTTP_2 => Speaking::Http2,
        // What ALPN would choose cannot be known before it is asked for.
        _ if tunnel.is_some() => Speaking::Http1,
        UpstreamHttp::Http1 | UpstreamHttp::Downstream => Speaking::Http1,
        UpstreamHttp::Auto => Speaking::Either,
    }
}

/// When the request must have ended: after its route's time or its stream's, whichever is over first.
fn deadline(
    exchange: &mut Exchange,
    forward: &Forward,
    times: &Times,
    headers: &HeaderMap,
) -> Option<Instant> {
    let mut stream_limit = forward
        .stream_limit_of(headers)
        .or(exchange.conn.manager.max_stream_duration);
    if let Some(asked) = times.stream
        && stream_limit.is_none_or(|limit| asked < limit)
    {
        exchange.stream_asked = true;
        stream_limit = Some(asked);
    }
    let route = times.route.map(|timeout| Instant::now() + timeout);
    let stream = stream_limit.map(|limit| Instant::from_std(exchange.started) + limit);
    match (route, stream) {
        (Some(route), Some(stream)) => {
            exchange.stream_limited = stream < route;
            exchange.stream_asked &= exchange.stream_limited;
            Some(route.min(stream))
        }
        (None, Some(stream)) => {
            exchange.stream_limited = true;
            Some(stream)
        }
        (route, None) => route,
    }
}
