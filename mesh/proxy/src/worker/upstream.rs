//! Forwarding: cluster, endpoint, connection, attempts, response.

use std::borrow::Cow;
use std::rc::Rc;
use std::sync::Arc;

use http::request::Parts;
use http::uri::Authority;
use http::{HeaderMap, HeaderName, HeaderValue, Response, StatusCode, Version};
use tokio::time::Instant;

use super::attempts::{Permit, attempts};
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
    pub(super) forward: &'a Forward,
    pub(super) speaking: Speaking,
    /// Of connections that are made for this request only, or for those like it.
    pub(super) options: ConnectOptions,
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
    reply.headers = headers;
    reply.send(exchange)
}

/// Sends a request on and brings the response back.
pub(super) async fn forward(
    mut exchange: Box<Exchange>,
    routed: Routed,
    mut parts: Box<Parts>,
    incoming: Option<Inbound>,
    tunnel: Option<Tunnel>,
) -> Response<Body> {
    let conn = exchange.conn.clone();
    let Action::Forward(forward) = &routed.route.action else {
        return LocalReply::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            Flags::LOCAL_RESET,
            "not_forwarding",
            "",
        )
        .send(exchange);
    };
    let Destination { slot, target } = match destination(&conn, forward, &routed, &parts) {
        Ok(found) => found,
        Err(Missing { name, target }) => {
            exchange.cluster_name = name.map(Arc::from);
            logging::keep_sent(&mut exchange, &parts);
            let reply = no_cluster(&conn, forward);
            return decline(exchange, &routed, target, &parts, None, reply);
        }
    };
    if !routed.host.virtual_clusters.is_empty() {
        exchange.virtual_cluster =
            VirtualCluster::find(&routed.host.virtual_clusters, &view(&parts)).cloned();
    }
    if let Some(tunnel) = &tunnel
        && forward
            .upgrades
            .iter()
            .any(|(protocol, enabled)| !enabled && **protocol == *tunnel.protocol())
    {
        conn.note(HttpEvent::RqNoUpgrade);
        conn.decide_upgrade(false);
        return decline(exchange, &routed, target, &parts, None, tunnel::refused());
    }
    exchange.cluster_name = Some(slot.name.clone());
    let Some(cluster) = conn.worker.cluster(&slot) else {
        logging::keep_sent(&mut exchange, &parts);
        let reply = no_cluster(&conn, forward);
        return decline(exchange, &routed, target, &parts, None, reply);
    };
    exchange.cluster = Some(cluster.clone());
    let priority = forward.priority;
    let cells = cluster.cells(&conn.worker.recorder);
    cells.began.add(1);
    let limit = cluster.config.limits.of(priority).requests;
    let Some(permit) = Permit::take(&slot, priority, |level| &level.requests, limit) else {
        cells.pending_overflow.add(1);
        return decline(exchange, &routed, target, &parts, None, overflow());
    };
    if cluster.drops(random::next()) {
        slot.counted.note(ClusterEvent::RqDropOverload);
        let reply = LocalReply::new(
            StatusCode::SERVICE_UNAVAILABLE,
            Flags::DROP_OVERLOAD,
            "drop_overload",
            "drop overload",
        );
        return decline(exchange, &routed, target, &parts, None, reply);
    }
    let hashed = if forward.hash.is_empty() {
        Hashed::default()
    } else {
        request_hash(
            &forward.hash,
            &view(&parts),
            conn.remote,
            conn.local,
            &filters::metadata(&exchange).state,
        )
    };
    let criteria = target
        .and_then(|target| target.criteria.as_deref())
        .or(forward.criteria.as_deref());
    // What filters have noted under the same name adds to what the route asks for.
    let noted = exchange
        .policy
        .as_ref()
        .filter(|_| cluster.config.subsets.is_some())
        .and_then(|policy| policy.metadata.get(METADATA))
        .map(|noted| Criteria::default_of(criteria).with(noted));
    let criteria = noted.as_ref().or(criteria);
    let speaking = speaking(cluster.config.http, parts.version, tunnel.as_ref());
    if let Err(reply) = prepare(&exchange, &routed, forward, target, &mut parts) {
        return decline(exchange, &routed, target, &parts, None, reply);
    }
    logging::keep_sent(&mut exchange, &parts);
    filters::keep_request(&mut exchange, &parts);
    let target_answers = target.is_some_and(|target| !target.response_headers.is_empty());
    // As they are sent: that is what operations on the response read (Envoy).
    let request_headers = (target_answers
        || !routed.route.response_headers.is_empty()
        || !routed.host.response_headers.is_empty()
        || !routed.table.response_headers.is_empty())
    .then(|| parts.headers.clone());
    let source = incoming.map(|incoming| {
        let retries = forward.retry.as_ref().is_some_and(|policy| policy.attempts > 0);
        let keep = retries || !forward.mirrors.is_empty();
        let idle = forward.idle_timeout.unwrap_or(conn.manager.stream_idle_timeout);
        RequestSource::new(incoming, if keep { forward.request_buffer } else { 0 }, idle)
    });
    if let (Some(tap), Some(source)) = (&exchange.tap, &source) {
        source.borrow_mut().capture(tap.capture());
    }
    exchange.source.clone_from(&source);
    let deadline = deadline(&mut exchange, forward, &mut parts.headers);
    let state = &filters::metadata(&exchange).state;
    let options = cluster
        .config
        .connect_options(Some(&parts.headers), state, conn.remote, conn.local);
    let plan = Plan {
        conn: &conn,
        cluster: &cluster,
        forward,
        speaking,
        options: ConnectOptions {
            alpn: options.alpn.or_else(|| {
                conn.manager
                    .alpn
                    .as_ref()
                    .filter(|_| cluster.config.alpn_overridable)
                    .and_then(|names| names.offer(speaking, parts.version).cloned())
            }),
            priority,
            ..options
        },
        deadline,
        by_stream: exchange.stream_limited,
        hash: hashed.hash,
        cookies: hashed.cookies,
        criteria,
        auto_host: matches!(forward.host_rewrite, Some(HostRewrite::Auto)),
        authority: exchange.uri.authority().cloned(),
        interims: exchange.interims.take(),
    };
    if forward.connect_tcp && tunnel.as_ref().is_some_and(Tunnel::is_connect) {
        let Some(tunnel) = tunnel else {
            return decline(exchange, &routed, target, &parts, None, tunnel::refused());
        };
        return match Box::pin(tunnel.join_tcp(exchange, &plan, permit)).await {
            Ok(response) => response,
            Err((exchange, reply)) => {
                conn.decide_upgrade(false);
                decline(exchange, &routed, target, &parts, request_headers.as_ref(), reply)
            }
        };
    }
    let mirror_head = (!forward.mirrors.is_empty()).then(|| Parts::clone(&parts));
    let outcome = if forward.hedge && tunnel.is_none() {
        Box::pin(hedged(&plan, &routed, &mut exchange, &mut parts, source.as_ref())).await
    } else {
        attempts(
            &plan,
            &routed,
            &mut exchange,
            &mut parts,
            source.as_ref(),
            tunnel.as_ref(),
        )
        .await
    };
    if let Some(head) = mirror_head {
        mirror(&conn, forward, head, source.as_ref());
    }
    let (response, lease, active) = match outcome {
        Ok(success) => success,
        Err(reply) => {
            conn.decide_upgrade(false);
            let reply = if reply.details == "overflow" {
                overflow()
            } else {
                reply
            };
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
        routed: &routed,
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

fn overflow() -> LocalReply {
    let mut reply = LocalReply::new(
        StatusCode::SERVICE_UNAVAILABLE,
        Flags::UPSTREAM_OVERFLOW,
        "upstream_reset_before_response_started{overflow}",
        "upstream connect error or disconnect/reset before headers. reset reason: overflow",
    );
    reply
        .headers
        .insert(X_OVERLOADED.clone(), HeaderValue::from_static("true"));
    reply
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
fn deadline(exchange: &mut Exchange, forward: &Forward, headers: &mut HeaderMap) -> Option<Instant> {
    let timeout = forward.timeout_of(exchange.grpc, headers);
    let stream_limit = forward
        .stream_limit_of(headers)
        .or(exchange.conn.manager.max_stream_duration);
    let route = timeout.map(|timeout| Instant::now() + timeout);
    let stream = stream_limit.map(|limit| Instant::from_std(exchange.started) + limit);
    match (route, stream) {
        (Some(route), Some(stream)) => {
            exchange.stream_limited = stream < route;
            Some(route.min(stream))
        }
        (None, Some(stream)) => {
            exchange.stream_limited = true;
            Some(stream)
        }
        (route, None) => route,
    }
}
