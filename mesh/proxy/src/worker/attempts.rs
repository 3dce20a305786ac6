//! Attempts: endpoint, connection, request, and whether there is another one.

use std::cell::RefCell;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use http::request::Parts;
use http::uri::Scheme;
use http::{HeaderName, HeaderValue, Method, Request, Response, StatusCode, Uri, Version, header};
use http_body::Body as _;
use tokio::time::Instant;

use super::body::{RequestSource, UpstreamBody};
use super::exchange::{Exchange, GRPC_STATUS, Sent};
use super::failure::{
    Failure, broke_protocol, final_reply, full_text, refused_by_peer, stream_reset_by_peer,
};
use super::incoming::Incoming;
use super::interim::{self, Door};
use super::local::LocalReply;
use super::request::{Routed, X_UNPROCESSED, view};
use super::tunnel::Tunnel;
use super::upstream::Plan;
use crate::config::cluster::Priority;
use crate::config::listener::Direction;
use crate::config::retry::{Outcome, RetryPolicy};
use crate::config::slot::{ClusterSlot, Level};
use crate::hygiene::fields::{Present, connection_has};
use crate::metrics::events::ClusterEvent;
use crate::metrics::flags::Flags;
use crate::random;
use crate::tls::info::ConnectionTls;
use crate::upstream::balance::Wish;
use crate::upstream::cluster::{Active, Host};
use crate::upstream::outlier::Event;
use crate::upstream::pool::{ConnectError, Lease, Unanswered, http1_send};

pub(super) static X_ATTEMPT_COUNT: HeaderName = HeaderName::from_static("x-envoy-attempt-count");

/// Attempts that are made again without asking the retry policy, because the connection was closed while idle or the
/// request was provably not sent: nothing has happened yet as far as the client is concerned.
const MAX_UNSENT: u32 = 5;

/// Retries beyond the policy's number for attempts that the next hop says nobody acted on.
const MAX_REFUSED: u32 = 3;

/// Counts something shared against a limit; nothing is written when there is no limit.
pub(super) struct Permit(Option<(Arc<ClusterSlot>, Priority, fn(&Level) -> &AtomicU32)>);

impl Permit {
    pub(super) fn take(
        slot: &Arc<ClusterSlot>,
        priority: Priority,
        which: fn(&Level) -> &AtomicU32,
        limit: u32,
    ) -> Option<Self> {
        if limit == u32::MAX {
            return Some(Self(None));
        }
        let used = which(slot.usage.of(priority));
        if used.fetch_add(1, Ordering::Relaxed) >= limit {
            used.fetch_sub(1, Ordering::Relaxed);
            return None;
        }
        Some(Self(Some((slot.clone(), priority, which))))
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        if let Some((slot, priority, which)) = &self.0 {
            which(slot.usage.of(*priority)).fetch_sub(1, Ordering::Relaxed);
        }
    }
}

/// Whether a further attempt may follow.
#[derive(Clone, Copy)]
pub(super) struct Again {
    /// By the route's retry policy.
    pub(super) by_policy: bool,
    /// Because the connection had been used before and may have been closed while idle.
    pub(super) quietly: bool,
}

pub(super) type Success = (Response<Incoming>, Lease, Active);

/// Tries until there is a response or nothing more may be tried.
pub(super) async fn attempts(
    plan: &Plan<'_>,
    routed: &Routed,
    exchange: &mut Exchange,
    parts: &mut Parts,
    source: Option<&Rc<RefCell<RequestSource>>>,
    tunnel: Option<&Tunnel>,
) -> Result<Success, LocalReply> {
    let cluster = plan.cluster;
    let policy = plan
        .forward
        .retry
        .as_deref()
        .filter(|policy| tunnel.is_none() && policy.applies_to(&view(parts)));
    let mut avoid = Avoid::default();
    let parts = RefCell::new(parts);
    let mut retries = 0;
    let mut unsent = 0;
    let mut refused = 0;
    let mut retry_permit: Option<Permit> = None;
    loop {
        let wish = avoid.wish(plan, policy, unsent > 0);
        let Some(host) = cluster.pick(&wish, Some(plan.conn.local)) else {
            plan.note(ClusterEvent::CxNoneHealthy);
            return Err(no_healthy_upstream());
        };
        exchange.attempts += 1;
        exchange.sent_on = Sent::Not;
        exchange.host = Some(host.clone());
        let active = Active::on(&host);
        // What nobody acted on may be sent once more often: while pods are replaced, several may be on their way out.
        let may_retry = policy.is_some_and(|policy| retries < policy.attempts + refused);
        let again = Again {
            by_policy: may_retry,
            quietly: unsent < MAX_UNSENT,
        };
        let began = cluster.measures().then(Instant::now);
        let tls = RefCell::default();
        let try_of = Try {
            routed,
            number: exchange.attempts,
            source,
            tunnel,
            again,
            per_try: policy
                .and_then(|policy| policy.per_try_timeout)
                .map(|limit| Instant::now() + limit),
            tls: &tls,
        };
        let result = attempt(plan, &parts, &try_of, &host, &mut exchange.sent_on).await;
        exchange.upstream_tls = tls.into_inner();
        if exchange.sent_on == Sent::Http2
            && matches!(
                &result,
                Err(Failure::PerTryTimeout | Failure::Timeout | Failure::Client)
            )
        {
            plan.note(ClusterEvent::RqTxReset);
        }
        if let Some(began) = began.filter(|_| result.is_ok()) {
            cluster.observe(&host, began.elapsed());
        }
        let replayable = source.is_none_or(|source| source.borrow().can_replay());
        let outcome = match judge(plan, &host, &result) {
            Some(outcome) => outcome,
            None => return Err(final_reply(exchange, result.err())),
        };
        // A reused connection that broke before a response was most likely closed while idle; the request is sent
        // again, unless it may have been acted on and is not idempotent (RFC 9110 section 9.2.2).
        // One that came as the peer had said goodbye was not acted on.
        let quietly = match &result {
            Err(Failure::Reset {
                sent,
                reused,
                stream: false,
                ..
            }) => *reused && (!sent || is_idempotent(&parts.borrow().method)) && unsent < MAX_UNSENT,
            Err(Failure::Refused { leaving: true }) => unsent < MAX_UNSENT,
            _ => false,
        };
        let wanted = may_retry && policy.is_some_and(|policy| policy.wants(&outcome));
        let used_up = !may_retry && policy.is_some_and(|policy| policy.wants(&outcome));
        let in_time = || plan.deadline.is_none_or(|deadline| Instant::now() < deadline);
        if !(replayable && (quietly || wanted) && in_time()) {
            if used_up {
                plan.note(ClusterEvent::RetryLimit);
                exchange.flags.add(Flags::RETRY_LIMIT);
            } else if wanted && !replayable {
                plan.note(ClusterEvent::RetryAbandoned);
            }
            if let Some(source) = source
                && plan.forward.mirrors.is_empty()
            {
                source.borrow_mut().stop_keeping();
            }
            return match result {
                Ok((response, lease)) => Ok((response, lease, active)),
                Err(failure) => Err(final_reply(exchange, Some(failure))),
            };
        }
        if quietly {
            unsent += 1;
        } else {
            let Some(permit) = take_retry_permit(plan) else {
                exchange.flags.add(Flags::UPSTREAM_OVERFLOW);
                return match result {
                    Ok((response, lease)) => Ok((response, lease, active)),
                    Err(failure) => Err(final_reply(exchange, Some(failure))),
                };
            };
            retry_permit.replace(permit);
            retries += 1;
            if matches!(outcome, Outcome::Refused) && refused < MAX_REFUSED {
                refused += 1;
            }
            plan.conn.worker.recorder.counters().retries.add(1);
            plan.cells().retries.add(1);
        }
        let asked = policy.and_then(|policy| asked_wait(policy, &outcome));
        match result {
            // Nothing is left of it: the connection serves on.
            Ok((response, lease)) if response.body().is_end_stream() => {
                lease.release(
                    cluster.config.max_requests_per_connection,
                    std::time::Instant::now(),
                );
            }
            dropped => drop(dropped),
        }
        avoid.add(host, policy);
        if !quietly && let Some(policy) = policy {
            plan.note(match asked {
                Some(_) => ClusterEvent::RetryAsked,
                None => ClusterEvent::RetryBackoff,
            });
            let wait = asked.unwrap_or_else(|| policy.back_off(retries, random::next()));
            let until = Instant::now() + wait;
            let until = plan.deadline.map_or(until, |deadline| until.min(deadline));
            // Boxed: few requests wait, and every request's future would carry the timer.
            Box::pin(tokio::time::sleep_until(until)).await;
        }
    }
}

/// What a retry avoids.
#[derive(Default)]
pub(super) struct Avoid {
    tried: Vec<Rc<Host>>,
    priorities: u128,
    /// Of tries since priorities were last avoided.
    fresh: u128,
    tries: u32,
}

impl Avoid {
    /// What the next try asks of the balancer.
    pub(super) fn wish<'a>(
        &'a self,
        plan: &Plan<'a>,
        policy: Option<&'a RetryPolicy>,
        was_unsent: bool,
    ) -> Wish<'a> {
        let avoids = policy.is_some_and(|policy| policy.previous_hosts) || was_unsent;
        Wish {
            hash: plan.hash,
            criteria: plan.criteria,
            tried: if avoids { &self.tried } else { &[] },
            attempts: policy.map_or(1, |policy| policy.host_selection_attempts),
            tried_priorities: self.priorities,
            // Not for the first try.
            rules: policy
                .filter(|_| self.tries > 0)
                .and_then(|policy| policy.hosts.as_ref()),
            ..Wish::default()
        }
    }

    /// Takes note of a try.
    pub(super) fn add(&mut self, host: Rc<Host>, policy: Option<&RetryPolicy>) {
        self.tries += 1;
        if let Some(every) = policy.and_then(|policy| policy.priorities_every) {
            self.fresh |= 1u128.checked_shl(host.priority).unwrap_or(0);
            if self.tries.is_multiple_of(every) {
                self.priorities |= std::mem::take(&mut self.fresh);
            }
        }
        self.tried.push(host);
    }
}

pub(super) fn no_healthy_upstream() -> LocalReply {
    LocalReply::new(
        StatusCode::SERVICE_UNAVAILABLE,
        Flags::NO_HEALTHY_UPSTREAM,
        "no_healthy_upstream",
        "no healthy upstream",
    )
}

/// The wait that a response asks for.
pub(super) fn asked_wait(policy: &RetryPolicy, outcome: &Outcome<'_>) -> Option<std::time::Duration> {
    if !policy.heeds_asked_waits() {
        return None;
    }
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    policy.asked_wait(outcome, now.map_or(0, |now| now.as_secs()), random::next())
}

/// What came of a try, for outlier detection and for retries; `None` where nothing more may be tried.
pub(super) fn judge<'r>(
    plan: &Plan<'_>,
    host: &Host,
    result: &'r Result<(Response<Incoming>, Lease), Failure>,
) -> Option<Outcome<'r>> {
    let cluster = plan.cluster;
    match result {
        Ok((response, _)) => {
            let status = response.status();
            let present = Present::of(response.headers());
            let ejected = cluster.record(host, Event::Status(status_for_outliers(response, present)));
            note_ejection(plan, ejected);
            if present.has(Present::CONNECTION) && connection_has(response.headers(), "close") {
                plan.note(ClusterEvent::CxCloseNotify);
            }
            // Believed from any next hop: whoever answered says that nobody acted on the request.
            let nobody_acted = plan.conn.direction != Direction::Inbound
                && present.has(Present::SERIN)
                && unprocessed(response.headers());
            Some(if nobody_acted {
                Outcome::Refused
            } else {
                Outcome::Response(status, response.headers())
            })
        }
        Err(failure) => {
            if !matches!(
                failure,
                Failure::Client | Failure::Connect(ConnectError::Overflow)
            ) {
                // A connection closed while idle says nothing about the host's health.
                let stale = matches!(
                    failure,
                    Failure::Reset {
                        reused: true,
                        stream: false,
                        ..
                    }
                );
                if !stale {
                    let ejected = cluster.record(host, Event::LocalFailure);
                    note_ejection(plan, ejected);
                }
            }
            if matches!(failure, Failure::PerTryTimeout | Failure::Timeout) {
                host.endpoint.state.counted.timed_out();
            }
            note_failure(plan, failure);
            match failure {
                Failure::Connect(ConnectError::Overflow) | Failure::Client | Failure::Timeout => None,
                Failure::Connect(_) => Some(Outcome::ConnectFailure),
                Failure::Refused { .. } => Some(Outcome::Refused),
                Failure::Reset { sent, .. } => Some(Outcome::Reset { sent: *sent }),
                Failure::PerTryTimeout => Some(Outcome::PerTryTimeout),
            }
        }
    }
}

/// What belongs to one try.
pub(super) struct Try<'a> {
    pub(super) routed: &'a Routed,
    /// Counted from 1.
    pub(super) number: u32,
    pub(super) source: Option<&'a Rc<RefCell<RequestSource>>>,
    pub(super) tunnel: Option<&'a Tunnel>,
    pub(super) again: Again,
    /// When the try is given up.
    pub(super) per_try: Option<Instant>,
    /// Where TLS of its connection is noted.
    pub(super) tls: &'a RefCell<Option<Arc<ConnectionTls>>>,
}

/// Whether the next hop is a proxy that could not reach its application: by its own mark, or by the flag of a
/// connection failure on a response that it made itself.
fn unprocessed(headers: &http::HeaderMap) -> bool {
    headers.contains_key(&X_UNPROCESSED)
        || headers
            .get("x-serin-response-flags")
            .and_then(|flags| flags.to_str().ok())
            .is_some_and(|flags| flags.split(',').any(|flag| flag == "UF"))
}

/// Counts how an attempt has failed.
fn note_failure(plan: &Plan<'_>, failure: &Failure) {
    match failure {
        Failure::PerTryTimeout => plan.cells().per_try_timeouts.add(1),
        Failure::Timeout if plan.by_stream => plan.note(ClusterEvent::RqMaxDuration),
        Failure::Timeout => plan.cells().timeouts.add(1),
        Failure::Connect(ConnectError::Overflow) => {}
        Failure::Connect(_) => plan.note(ClusterEvent::RqPendingFailure),
        Failure::Refused { .. } => plan.note(ClusterEvent::RqRxReset),
        Failure::Reset { protocol: true, .. } => plan.note(ClusterEvent::CxProtocolError),
        Failure::Reset { stream: true, .. } => plan.note(ClusterEvent::RqRxReset),
        Failure::Reset { .. } | Failure::Client => {}
    }
}

fn note_ejection(plan: &Plan<'_>, ejected: bool) {
    if ejected {
        plan.conn.worker.recorder.counters().ejections.add(1);
    }
}

/// gRPC answers 200 always; its own status counts, by the HTTP status that means the same.
fn status_for_outliers<B>(response: &Response<B>, present: Present) -> u16 {
    if !present.has(Present::GRPC_STATUS) {
        return response.status().as_u16();
    }
    match response.headers().get(&GRPC_STATUS).map(HeaderValue::as_bytes) {
        Some(b"2" | b"13" | b"15") => 500,
        Some(b"14") => 503,
        Some(b"4") => 504,
        _ => response.status().as_u16(),
    }
}

pub(super) fn take_retry_permit(plan: &Plan<'_>) -> Option<Permit> {
    let (slot, priority) = (&plan.cluster.slot, plan.forward.priority);
    let active = slot.usage.of(priority).requests.load(Ordering::Relaxed);
    let limit = plan.cluster.config.limits.of(priority).retry_limit(active);
    let permit = Permit::take(slot, priority, |level| &level.retries, limit);
    if permit.is_none() {
        plan.cells().retry_overflow.add(1);
    }
    permit
}

fn is_idempotent(method: &Method) -> bool {
    matches!(
        *method,
        Method::GET | Method::HEAD | Method::OPTIONS | Method::PUT | Method::DELETE | Method::TRACE
    )
}

/// One try on one host.
pub(super) async fn attempt(
    plan: &Plan<'_>,
    parts: &RefCell<&mut Parts>,
    try_of: &Try<'_>,
    host: &Host,
    sent_on: &mut Sent,
) -> Result<(Response<Incoming>, Lease), Failure> {
    let cluster = plan.cluster;
    let worker = &plan.conn.worker;
    let (source, per_try) = (try_of.source, try_of.per_try);
    let pool = host.pool.variant(&plan.options);
    let mut lease = match pool.reuse(plan.speaking, &cluster.config) {
        Some(lease) => lease,
        None => {
            let priority = plan.forward.priority;
            let pending = Permit::take(
                &cluster.slot,
                priority,
                |level| &level.pending,
                cluster.config.limits.of(priority).pending,
            );
            let Some(pending) = pending else {
                plan.cells().pending_overflow.add(1);
                return Err(Failure::Connect(ConnectError::Overflow));
            };
            plan.cells().pending.add(1);
            let acquire = pool.acquire(cluster.wanted(worker, host, plan.speaking, &plan.options));
            // Boxed: rare, and large.
            let lease = Box::pin(bounded(plan, per_try, acquire))
                .await?
                .map_err(Failure::Connect)?;
            drop(pending);
            lease
        }
    };
    *sent_on = if lease.is_http2() {
        Sent::Http2
    } else {
        Sent::Http1
    };
    plan.cells().total.add(1);
    *try_of.tls.borrow_mut() = lease.tls().cloned();
    let mut request = build(plan, &mut parts.borrow_mut(), try_of, host, &lease);
    let door = match try_of.tunnel {
        None => Door::of(plan, parts.borrow().version),
        Some(_) => None,
    };
    let mut tell = None;
    if plan.conn.manager.interim_answers {
        tell = interim::prepare(&mut request, source, door.as_ref());
    }
    let reused = lease.reused();
    let door = door.as_ref().map(|door| (door, source));
    // What [`Lease::send`] does, but with nothing that holds the request while it waits. The answer is pinned here: each
    // function that it went to by value would keep room for it twice, and whoever makes this future copies all of that.
    let sent = match &mut lease {
        Lease::Http1(connection, _) => {
            let answer = pin!(http1_send(&mut connection.sender, request, tell));
            let answer = answered(plan, per_try, door, answer).await?;
            answer
                .map(|response| response.map(Incoming::Http1))
                .map_err(Unanswered::from)
        }
        Lease::Http2(stream) => match stream.send(request, tell) {
            Ok(answer) => answered(plan, per_try, door, pin!(answer))
                .await?
                .map_err(Unanswered::from),
            Err(unanswered) => Err(unanswered),
        },
    };
    match sent {
        // The client broke the protocol within the body: an early answer is not one to what it sent.
        Ok(_) if source.is_some_and(|source| source.borrow().fault.is_some()) => Err(Failure::Client),
        // Nobody has asked for another protocol.
        Ok(response) if response.status().is_informational() && try_of.tunnel.is_none() => {
            Err(Failure::Reset {
                sent: true,
                reused: false,
                protocol: true,
                stream: false,
                text: format!("the final answer is {}", response.status()),
            })
        }
        Ok(response) => Ok((response, lease)),
        Err(Unanswered { error, unsent }) => {
            if source.is_some_and(|source| source.borrow().fault.is_some()) {
                return Err(Failure::Client);
            }
            if let Some(leaving) = refused_by_peer(&error) {
                return Err(Failure::Refused { leaving });
            }
            Err(Failure::Reset {
                sent: !unsent,
                reused,
                protocol: broke_protocol(&error),
                stream: stream_reset_by_peer(&error),
                text: full_text(&error),
            })
        }
    }
}

/// Waits for an answer, and lets interim ones pass where there is a door.
async fn answered<T>(
    plan: &Plan<'_>,
    per_try: Option<Instant>,
    door: Option<(&Door, Option<&Rc<RefCell<RequestSource>>>)>,
    answer: impl Future<Output = T>,
) -> Result<T, Failure> {
    match door {
        None => bounded(plan, per_try, answer).await,
        // Boxed: rare, and every request's future would carry its timer.
        Some((door, Some(source))) if source.borrow().is_held() => {
            let answer = Box::pin(interim::pass_held(door, source, answer));
            bounded(plan, per_try, answer).await
        }
        Some((door, _)) => bounded(plan, per_try, interim::pass(door, answer)).await,
    }
}

/// Waits for `work` up to the nearer of the two limits.
async fn bounded<T>(
    plan: &Plan<'_>,
    per_try: Option<Instant>,
    work: impl Future<Output = T>,
) -> Result<T, Failure> {
    let (limit, failure) = match (plan.deadline, per_try) {
        (None, None) => return Ok(work.await),
        (Some(deadline), Some(per_try)) if per_try < deadline => (per_try, Failure::PerTryTimeout),
        (Some(deadline), _) => (deadline, Failure::Timeout),
        (None, Some(per_try)) => (per_try, Failure::PerTryTimeout),
    };
    plan.conn.alarms.within(limit, work).await.ok_or(failure)
}

/// The request as it goes to `host`.
fn build(
    plan: &Plan<'_>,
    parts: &mut Parts,
    try_of: &Try<'_>,
    host: &Host,
    lease: &Lease,
) -> Request<UpstreamBody> {
    let (source, again) = (try_of.source, try_of.again);
    // A copy of the head is kept only if a further attempt is possible.
    let again = again.by_policy || (lease.reused() && again.quietly);
    let mut request = Request::new(match source {
        None => UpstreamBody::Empty,
        Some(source) => UpstreamBody::stream(source),
    });
    *request.method_mut() = parts.method.clone();
    *request.headers_mut() = if again {
        parts.headers.clone()
    } else {
        std::mem::take(&mut parts.headers)
    };
    let uri = parts.uri.clone();
    let headers = request.headers_mut();
    if plan.auto_host
        && !host.endpoint.hostname().is_empty()
        && let Ok(value) = HeaderValue::from_str(host.endpoint.hostname())
    {
        headers.insert(header::HOST, value);
    }
    if try_of.routed.host.attempt_count {
        headers.insert(X_ATTEMPT_COUNT.clone(), HeaderValue::from(try_of.number));
    }
    if lease.is_http2() {
        let host = headers.remove(header::HOST);
        let authority = host
            .as_ref()
            .and_then(|value| value.to_str().ok())
            .filter(|host| !host.is_empty());
        let path = uri
            .path_and_query()
            .cloned()
            .unwrap_or_else(|| http::uri::PathAndQuery::from_static("/"));
        let scheme = if plan.conn.tls.is_some() { "https" } else { "http" };
        let authority = authority.unwrap_or("unknown");
        // Parsed once, where it is what the client sent.
        let absolute = match &plan.authority {
            Some(known) if known.as_str() == authority => {
                let mut whole = http::uri::Parts::default();
                whole.scheme = Some(if plan.conn.tls.is_some() {
                    Scheme::HTTPS
                } else {
                    Scheme::HTTP
                });
                whole.authority = Some(known.clone());
                whole.path_and_query = Some(path);
                Uri::from_parts(whole).ok()
            }
            _ => Uri::builder()
                .scheme(scheme)
                .authority(authority)
                .path_and_query(path)
                .build()
                .ok(),
        };
        *request.uri_mut() = absolute.unwrap_or(uri);
        *request.version_mut() = Version::HTTP_2;
        if let Some(tunnel) = try_of.tunnel {
            tunnel.write(&mut request, true, authority, scheme);
        }
    } else {
        // hyper drops a body of unknown length from methods that usually have none, unless it is told.
        if source.is_some()
            && !headers.contains_key(header::CONTENT_LENGTH)
            && matches!(parts.method, Method::GET | Method::HEAD)
        {
            headers.insert(header::TRANSFER_ENCODING, HeaderValue::from_static("chunked"));
        }
        let host = try_of.tunnel.and_then(|_| headers.get(header::HOST).cloned());
        *request.uri_mut() = uri;
        *request.version_mut() = Version::HTTP_11;
        if let Some(tunnel) = try_of.tunnel {
            let authority = host.as_ref().and_then(|host| host.to_str().ok()).unwrap_or("");
            tunnel.write(&mut request, false, authority, "http");
        }
    }
    request
}
