//! Hedging (`hedge_on_per_try_timeout`): a try that takes too long goes on while another is made beside it, and the
//! first good answer wins.
//!
//! As in Envoy a further try counts as a retry: the policy's number and the cluster's retry limit hold for it. A bad
//! answer is passed over as long as another try is running. The losers are dropped with their connections.

use std::cell::{Cell, RefCell};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use futures::stream::FuturesUnordered;
use http::request::Parts;
use tokio::time::Instant;

use super::attempts::{
    Again, Avoid, Permit, Success, Tried, Try, asked_wait, attempt, attempts, back_off, judge, late,
    no_healthy_upstream, take_retry_permit,
};
use super::exchange::{Exchange, Sent};
use super::failure::final_reply;
use super::intervals::{self, Intervals};
use super::local::LocalReply;
use super::request::view;
use super::upstream::Plan;
use crate::config::retry::RetryPolicy;
use crate::metrics::events::ClusterEvent;
use crate::metrics::flags::Flags;
use crate::random;
use crate::tls::info::ConnectionTls;
use crate::upstream::cluster::{Active, Host};

/// A running try.
struct Running {
    host: Rc<Host>,
    active: Active,
    /// Of a retry, for as long as it runs.
    permit: Option<Permit>,
    began: Instant,
}

/// Tries until there is a good response or nothing more may be tried. Without a limit for each try this is
/// [`attempts`].
pub(super) async fn hedged(
    plan: &Plan<'_>,
    exchange: &mut Exchange,
    parts: &mut Parts,
) -> Result<Success, LocalReply> {
    let policy = plan.retry.filter(|policy| policy.applies_to(&view(parts)));
    let Some((policy, patience)) = policy.and_then(|policy| Some((policy, plan.times.per_try?))) else {
        return attempts(plan, exchange, parts, None).await;
    };
    let mut intervals = exchange.intervals.take();
    let outcome = race(
        plan,
        exchange,
        parts,
        (policy, patience),
        intervals.as_deref_mut(),
    )
    .await;
    exchange.intervals = intervals;
    outcome
}

/// The same where each try has a limit.
async fn race(
    plan: &Plan<'_>,
    exchange: &mut Exchange,
    parts: &mut Parts,
    (policy, patience): (&RetryPolicy, Duration),
    mut intervals: Option<&mut Intervals>,
) -> Result<Success, LocalReply> {
    let cluster = plan.cluster;
    let parts = RefCell::new(parts);
    let tls = RefCell::default();
    let mut avoid = Avoid::default();
    let mut retries = 0;
    let mut permit: Option<Permit> = None;
    let mut running = FuturesUnordered::new();
    loop {
        let Some(host) = cluster.pick(&avoid.wish(plan, Some(policy), false), Some(plan.conn.local)) else {
            if running.is_empty() {
                plan.note(ClusterEvent::CxNoneHealthy);
                return Err(no_healthy_upstream());
            }
            // Nobody to hedge with: what runs decides.
            drop(permit);
            match Pin::new(&mut running).next().await {
                Some((one, result)) => {
                    return settle(exchange, one, result, &tls);
                }
                None => return Err(no_healthy_upstream()),
            }
        };
        exchange.attempts += 1;
        exchange.sent_on.set(Sent::Http1);
        let number = exchange.attempts;
        let one = Running {
            active: Active::on(&host),
            host: host.clone(),
            permit: permit.take(),
            began: Instant::now(),
        };
        avoid.add(host, Some(policy));
        let (parts, tls) = (&parts, &tls);
        running.push(async move {
            let try_of = Try {
                number,
                tunnel: None,
                // Another try may come at any time.
                again: Again {
                    by_policy: true,
                    quietly: false,
                },
                per_try: None,
                tls,
            };
            let sent_on = Cell::new(Sent::Not);
            let result = attempt(plan, parts, &try_of, &one.host, &sent_on).await;
            (one, result)
        });
        let mut soft = Instant::now() + patience;
        let wait = loop {
            let may_retry = retries < policy.attempts;
            tokio::select! {
                Some((one, tried)) = running.next() => {
                    if tried.is_ok() {
                        cluster.observe(&one.host, one.began.elapsed());
                    }
                    match weigh(plan, exchange, policy, &one, &tried, may_retry, running.len()) {
                        Weighed::Decides => return settle(exchange, one, tried, tls),
                        Weighed::PassedOver => {}
                        Weighed::Again { taken, asked } => {
                            permit = Some(taken);
                            break Some(asked.unwrap_or_else(|| policy.back_off(retries + 1, random::next())));
                        }
                    }
                }
                () = intervals::due(intervals.as_deref_mut()) => intervals::write(exchange),
                () = tokio::time::sleep_until(soft), if may_retry => {
                    permit = beside(plan);
                    if permit.is_some() {
                        break None;
                    }
                    soft = Instant::now() + patience;
                }
            }
        };
        retries += 1;
        plan.conn.worker.recorder.counters().retries.add(1);
        plan.cells().retries.add(1);
        if let Some(wait) = wait
            && !back_off(plan, wait).await
        {
            return Err(late(plan, exchange));
        }
    }
}

/// What the end of a try means.
enum Weighed {
    /// Its result is the request's.
    Decides,
    /// It was bad, and others are running.
    PassedOver,
    /// It was bad and the last: there is another one, after the time that the response asks for, if it does.
    Again { taken: Permit, asked: Option<Duration> },
}

/// Judges a try that has ended while `others` are running.
fn weigh(
    plan: &Plan<'_>,
    exchange: &mut Exchange,
    policy: &RetryPolicy,
    one: &Running,
    tried: &Tried,
    may_retry: bool,
    others: usize,
) -> Weighed {
    let asked = match judge(plan, &one.host, tried) {
        Some(outcome) if policy.wants(&outcome) => asked_wait(policy, &outcome),
        Some(_) | None => return Weighed::Decides,
    };
    if others > 0 {
        return Weighed::PassedOver;
    }
    if !may_retry {
        plan.note(ClusterEvent::RetryLimit);
        exchange.flags.add(Flags::RETRY_LIMIT);
        return Weighed::Decides;
    }
    if !plan.source.is_none_or(|source| source.borrow().can_replay()) {
        plan.note(ClusterEvent::RetryAbandoned);
        return Weighed::Decides;
    }
    match take_retry_permit(plan) {
        Some(taken) => Weighed::Again { taken, asked },
        None => {
            exchange.flags.add(Flags::UPSTREAM_OVERFLOW);
            Weighed::Decides
        }
    }
}

/// What another try beside the running ones needs, where it may be made now. Envoy's time for a try starts when the
/// request is complete.
fn beside(plan: &Plan<'_>) -> Option<Permit> {
    let complete = plan.source.is_none_or(|source| {
        let source = source.borrow();
        source.ended() && source.can_replay()
    });
    complete.then(|| take_retry_permit(plan)).flatten()
}

/// The end of it: this try decides, and what else is running is dropped.
fn settle(
    exchange: &mut Exchange,
    one: Running,
    tried: Tried,
    tls: &RefCell<Option<Arc<ConnectionTls>>>,
) -> Result<Success, LocalReply> {
    drop(one.permit);
    exchange.host = Some(one.host);
    match tried {
        Ok((response, lease)) => {
            exchange.upstream_tls = lease.tls().cloned();
            Ok((response, lease, one.active))
        }
        Err(failure) => {
            exchange.upstream_tls = tls.borrow().clone();
            Err(final_reply(exchange, failure))
        }
    }
}
