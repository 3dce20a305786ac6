//! One try on one host.

use std::cell::{Cell, RefCell};
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;

use http::Response;
use http::request::Parts;
use tokio::time::Instant;

use super::head::{build, give_back};
use super::permit::Permit;
use crate::tls::info::ConnectionTls;
use crate::upstream::cluster::Host;
use crate::upstream::pool::{ConnectError, Lease, Pool, Unanswered};
use crate::worker::body::RequestSource;
use crate::worker::exchange::Sent;
use crate::worker::failure::Failure;
use crate::worker::incoming::Incoming;
use crate::worker::interim::{self, Waiting};
use crate::worker::tunnel::Tunnel;
use crate::worker::upstream::Plan;

/// What came of a try: a response and the connection that it comes over.
pub(in crate::worker) type Tried = Result<(Response<Incoming>, Lease), Failure>;

/// Whether a further attempt may follow.
#[derive(Clone, Copy)]
pub(in crate::worker) struct Again {
    /// By the route's retry policy.
    pub(in crate::worker) by_policy: bool,
    /// Because the connection had been used before and may have been closed while idle.
    pub(in crate::worker) quietly: bool,
}

/// What belongs to one try.
pub(in crate::worker) struct Try<'a> {
    /// Counted from 1.
    pub(in crate::worker) number: u32,
    pub(in crate::worker) tunnel: Option<&'a Tunnel>,
    pub(in crate::worker) again: Again,
    /// When the try is given up.
    pub(in crate::worker) per_try: Option<Instant>,
    /// Where TLS of its connection is noted.
    pub(in crate::worker) tls: &'a RefCell<Option<Arc<ConnectionTls>>>,
}

/// Sends the request to a host and waits for the head of its answer.
pub(in crate::worker) async fn attempt(
    plan: &Plan<'_>,
    parts: &RefCell<&mut Parts>,
    try_of: &Try<'_>,
    host: &Host,
    sent_on: &Cell<Sent>,
) -> Tried {
    let (source, per_try) = (plan.source, try_of.per_try);
    let pool = host.pool.variant(&plan.options);
    let lease = match pool.reuse(plan.speaking, &plan.cluster.config) {
        Some(lease) => lease,
        // Boxed: rare, and large.
        None => Box::pin(connect(plan, &pool, host, per_try)).await?,
    };
    sent_on.set(if lease.is_http2() {
        Sent::Http2
    } else {
        Sent::Http1
    });
    plan.cells().total.add(1);
    *try_of.tls.borrow_mut() = lease.tls().cloned();
    let mut request = build(plan, &mut parts.borrow_mut(), try_of, host, &lease);
    let door = match try_of.tunnel {
        None => interim::door(plan),
        Some(_) => None,
    };
    let mut tell = None;
    if plan.conn.manager.interim_answers {
        tell = interim::prepare(&mut request, source, door.as_ref());
    }
    let reused = lease.reused();
    let door = door.as_deref().map(|door| (door, source));
    // What [`Lease::send`] does, but with nothing that holds the request while it waits. The answer is pinned here: each
    // function that it went to by value would keep room for it twice, and whoever makes this future copies all of that.
    let sent = match &lease {
        Lease::Http1(connection, _) => {
            let answer = connection.handle.send(&mut request, tell);
            give_back(plan, &mut parts.borrow_mut(), try_of, &lease, request);
            answered(plan, per_try, door, pin!(answer)).await?
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
        _ if source.is_some_and(|source| source.borrow().fault.is_some()) => Err(Failure::Client),
        // Nobody has asked for another protocol.
        Ok(response) if response.status().is_informational() && try_of.tunnel.is_none() => {
            Err(Failure::of_informational(response.status()))
        }
        Ok(response) => Ok((response, lease)),
        Err(unanswered) => Err(Failure::of_unanswered(&unanswered, reused)),
    }
}

/// A connection of its own, if there may be one more that waits for one.
async fn connect(
    plan: &Plan<'_>,
    pool: &Rc<Pool>,
    host: &Host,
    per_try: Option<Instant>,
) -> Result<Lease, Failure> {
    let (cluster, priority) = (plan.cluster, plan.forward.priority);
    let limit = cluster.config.limits.of(priority).pending;
    let Some(_pending) = Permit::take(&cluster.slot, priority, |level| &level.pending, limit) else {
        plan.cells().pending_overflow.add(1);
        return Err(Failure::Connect(ConnectError::Overflow));
    };
    plan.cells().pending.add(1);
    let wanted = cluster.wanted(&plan.conn.worker, host, plan.speaking, &plan.options);
    bounded(plan, per_try, pool.acquire(wanted))
        .await?
        .map_err(Failure::Connect)
}

/// Waits for an answer, and lets interim ones pass where there is a door.
async fn answered<T>(
    plan: &Plan<'_>,
    per_try: Option<Instant>,
    door: Option<(&Waiting, Option<&Rc<RefCell<RequestSource>>>)>,
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
