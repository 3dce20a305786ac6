//! Hedging (`hedge_on_per_try_timeout`): a try that takes too long goes on while another is made beside it, and the
//! first good answer wins.
//!
//! As in Envoy a further try counts as a retry: the policy's number and the cluster's retry limit hold for it. A bad
//! answer is passed over as long as another try is running. The losers are dropped with their connections.

use std::cell::RefCell;
use std::pin::Pin;
use std::rc::Rc;

use futures::StreamExt as _;
use futures::stream::FuturesUnordered;
use http::request::Parts;
use tokio::time::Instant;

use super::attempts::{
    Again, Avoid, Permit, Success, Try, asked_wait, attempt, attempts, judge, no_healthy_upstream,
    take_retry_permit,
};
use super::body::RequestSource;
use super::exchange::{Exchange, Sent};
use super::failure::{Failure, final_reply};
use super::local::LocalReply;
use super::request::{Routed, view};
use super::upstream::Plan;
use crate::metrics::events::ClusterEvent;
use crate::metrics::flags::Flags;
use crate::random;
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
    routed: &Routed,
    exchange: &mut Exchange,
    parts: &mut Parts,
    source: Option<&Rc<RefCell<RequestSource>>>,
) -> Result<Success, LocalReply> {
    let policy = plan.forward.retry.as_deref();
    let policy = policy.filter(|policy| policy.applies_to(&view(parts)));
    let Some((policy, patience)) = policy.and_then(|policy| Some((policy, policy.per_try_timeout?))) else {
        return attempts(plan, routed, exchange, parts, source, None).await;
    };
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
        exchange.sent_on = Sent::Http1;
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
                routed,
                number,
                source,
                tunnel: None,
                // Another try may come at any time.
                again: Again {
                    by_policy: true,
                    quietly: false,
                },
                per_try: None,
                tls,
            };
            let mut sent_on = Sent::Not;
            let result = attempt(plan, parts, &try_of, &one.host, &mut sent_on).await;
            (one, result)
        });
        let mut soft = Instant::now() + patience;
        let wait = loop {
            let may_retry = retries < policy.attempts;
            tokio::select! {
                Some((one, result)) = running.next() => {
                    if result.is_ok() {
                        cluster.observe(&one.host, one.began.elapsed());
                    }
                    let wait = match judge(plan, &one.host, &result) {
                        None => return settle(exchange, one, result, tls),
                        Some(outcome) if !policy.wants(&outcome) => {
                            return settle(exchange, one, result, tls);
                        }
                        Some(outcome) => asked_wait(policy, &outcome),
                    };
                    if !running.is_empty() {
                        continue;
                    }
                    let replayable = source.is_none_or(|source| source.borrow().can_replay());
                    if !may_retry || !replayable {
                        if may_retry {
                            plan.note(ClusterEvent::RetryAbandoned);
                        } else {
                            plan.note(ClusterEvent::RetryLimit);
                            exchange.flags.add(Flags::RETRY_LIMIT);
                        }
                        return settle(exchange, one, result, tls);
                    }
                    let Some(taken) = take_retry_permit(plan) else {
                        exchange.flags.add(Flags::UPSTREAM_OVERFLOW);
                        return settle(exchange, one, result, tls);
                    };
                    permit = Some(taken);
                    break Some(wait.unwrap_or_else(|| policy.back_off(retries + 1, random::next())));
                }
                () = tokio::time::sleep_until(soft), if may_retry => {
                    // Envoy's time for a try starts when the request is complete.
                    let complete = source.is_none_or(|source| {
                        let source = source.borrow();
                        source.ended() && source.can_replay()
                    });
                    match complete.then(|| take_retry_permit(plan)).flatten() {
                        Some(taken) => {
                            permit = Some(taken);
                            break None;
                        }
                        None => soft = Instant::now() + patience,
                    }
                }
            }
        };
        retries += 1;
        plan.conn.worker.recorder.counters().retries.add(1);
        plan.cells().retries.add(1);
        if let Some(wait) = wait {
            match plan.deadline {
                Some(deadline) => tokio::time::sleep_until((Instant::now() + wait).min(deadline)).await,
                None => tokio::time::sleep(wait).await,
            }
        }
    }
}

/// The end of it: this try decides, and what else is running is dropped.
fn settle(
    exchange: &mut Exchange,
    one: Running,
    result: Result<
        (
            http::Response<super::incoming::Incoming>,
            crate::upstream::pool::Lease,
        ),
        Failure,
    >,
    tls: &RefCell<Option<std::sync::Arc<crate::tls::info::ConnectionTls>>>,
) -> Result<Success, LocalReply> {
    drop(one.permit);
    exchange.host = Some(one.host);
    match result {
        Ok((response, lease)) => {
            exchange.upstream_tls = lease.tls().cloned();
            Ok((response, lease, one.active))
        }
        Err(failure) => {
            exchange.upstream_tls = tls.borrow().clone();
            Err(final_reply(exchange, Some(failure)))
        }
    }
}
