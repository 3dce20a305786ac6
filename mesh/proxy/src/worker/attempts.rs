//! Attempts: endpoint, connection, request, and whether there is another one.
//!
//! The loop and its decision ([`Course`]) are here. `attempt` is one try on one host, `head` what it sends, `judge` what came of
//! it; `avoid` is what the next try asks of the balancer, `permit` what it must get of the cluster's limits.

mod attempt;
mod avoid;
mod head;
mod judge;
mod permit;

pub(super) use attempt::{Again, Tried, Try, attempt};
pub(super) use avoid::Avoid;
pub(super) use head::X_ATTEMPT_COUNT;
pub(super) use judge::{asked_wait, judge};
pub(super) use permit::{Permit, take_retry_permit};

use std::cell::RefCell;
use std::time::Duration;

use http::request::Parts;
use http::{Method, Response, StatusCode};
use http_body::Body as _;
use tokio::time::Instant;

use self::judge::note_failure;
use super::exchange::{Exchange, Sent};
use super::failure::{Failure, final_reply};
use super::incoming::Incoming;
use super::intervals;
use super::local::LocalReply;
use super::request::view;
use super::tunnel::Tunnel;
use super::upstream::Plan;
use crate::config::retry::{Outcome, RetryPolicy};
use crate::metrics::events::ClusterEvent;
use crate::metrics::flags::Flags;
use crate::random;
use crate::upstream::balance::Wish;
use crate::upstream::cluster::{Active, Host};
use crate::upstream::pool::Lease;

/// Attempts that are made again without asking the retry policy, because the connection was closed while idle or the
/// request was provably not sent: nothing has happened yet as far as the client is concerned.
const MAX_UNSENT: u32 = 5;

/// Retries beyond the policy's number for attempts that the next hop says nobody acted on.
const MAX_REFUSED: u32 = 3;

pub(super) type Success = (Response<Incoming>, Lease, Active);

/// Tries until there is a response or nothing more may be tried.
pub(super) async fn attempts(
    plan: &Plan<'_>,
    exchange: &mut Exchange,
    parts: &mut Parts,
    tunnel: Option<&Tunnel>,
) -> Result<Success, LocalReply> {
    let mut course = Course::new(plan, parts, tunnel);
    let parts = RefCell::new(parts);
    loop {
        let Some(host) = plan.cluster.pick(&course.wish(plan), Some(plan.conn.local)) else {
            plan.note(ClusterEvent::CxNoneHealthy);
            return Err(no_healthy_upstream());
        };
        exchange.attempts += 1;
        exchange.sent_on.set(Sent::Not);
        exchange.host = Some(host.clone());
        let active = Active::on(&host);
        let began = plan.cluster.measures().then(Instant::now);
        let tls = RefCell::default();
        let try_of = Try {
            number: exchange.attempts,
            tunnel,
            again: course.again(),
            per_try: course.per_try(),
            tls: &tls,
        };
        let tried = match exchange.intervals.take() {
            None => attempt(plan, &parts, &try_of, &host, &exchange.sent_on).await,
            Some(mut intervals) => {
                let trying = attempt(plan, &parts, &try_of, &host, &exchange.sent_on);
                let tried = Box::pin(intervals::meanwhile(exchange, &mut intervals, trying)).await;
                exchange.intervals = Some(intervals);
                tried
            }
        };
        exchange.upstream_tls = tls.into_inner();
        if exchange.sent_on.get() == Sent::Http2 {
            note_reset(plan, &tried);
        }
        if let Some(began) = began.filter(|_| tried.is_ok()) {
            plan.cluster.observe(&host, began.elapsed());
        }
        let next = course.next(plan, exchange, &host, &tried, &parts.borrow().method);
        let Next::Again { wait } = next else {
            return match tried {
                Ok((response, lease)) => Ok((response, lease, active)),
                Err(failure) => Err(final_reply(exchange, failure)),
            };
        };
        give_up(plan, tried);
        course.avoid.add(host, course.policy);
        // Boxed: few requests wait, and every request's future would carry the timer.
        if let Some(wait) = wait
            && !Box::pin(back_off(plan, wait)).await
        {
            return Err(late(plan, exchange));
        }
    }
}

/// What follows a try.
enum Next {
    /// Its result is the request's.
    Done,
    /// Another one, after this time; at once where nothing was sent.
    Again { wait: Option<Duration> },
}

/// What the tries of a request have come to.
struct Course<'p> {
    policy: Option<&'p RetryPolicy>,
    /// The time of each try.
    per_try: Option<Duration>,
    avoid: Avoid,
    /// By the policy.
    retries: u32,
    /// Made again because nothing had been sent.
    unsent: u32,
    /// Retries that the policy's number does not include, since nobody had acted on the request.
    refused: u32,
    /// Of the last retry, for as long as it runs.
    permit: Option<Permit>,
}

impl<'p> Course<'p> {
    fn new(plan: &Plan<'p>, parts: &Parts, tunnel: Option<&Tunnel>) -> Self {
        let policy = plan.retry;
        Self {
            per_try: plan.times.per_try.filter(|_| tunnel.is_none()),
            policy: policy.filter(|policy| tunnel.is_none() && policy.applies_to(&view(parts))),
            avoid: Avoid::default(),
            retries: 0,
            unsent: 0,
            refused: 0,
            permit: None,
        }
    }

    fn wish<'a>(&'a self, plan: &Plan<'a>) -> Wish<'a> {
        self.avoid.wish(plan, self.policy, self.unsent > 0)
    }

    /// Whether the policy allows one more. What nobody acted on may be sent once more often: while pods are replaced,
    /// several may be on their way out.
    fn may_retry(&self) -> bool {
        self.policy
            .is_some_and(|policy| self.retries < policy.attempts + self.refused)
    }

    fn again(&self) -> Again {
        Again {
            by_policy: self.may_retry(),
            quietly: self.unsent < MAX_UNSENT,
        }
    }

    /// When a try that begins now is given up.
    fn per_try(&self) -> Option<Instant> {
        Some(Instant::now() + self.per_try?)
    }

    /// Whether nothing has happened as far as the client is concerned. A reused connection that broke before a response
    /// was most likely closed while idle; the request is sent again, unless it may have been acted on and is not idempotent
    /// (RFC 9110 section 9.2.2). One that came as the peer had said goodbye was not acted on.
    fn is_quiet(&self, tried: &Tried, method: &Method) -> bool {
        match tried {
            Err(Failure::Reset {
                sent,
                reused,
                stream: false,
                ..
            }) => *reused && (!sent || is_idempotent(method)) && self.unsent < MAX_UNSENT,
            Err(Failure::Refused { leaving: true }) => self.unsent < MAX_UNSENT,
            _ => false,
        }
    }

    /// Takes note of a try and decides what follows it.
    fn next(
        &mut self,
        plan: &Plan<'_>,
        exchange: &mut Exchange,
        host: &Host,
        tried: &Tried,
        method: &Method,
    ) -> Next {
        let Some(outcome) = judge(plan, host, tried) else {
            return Next::Done;
        };
        let quietly = self.is_quiet(tried, method);
        let wanted = self.policy.is_some_and(|policy| policy.wants(&outcome));
        let may_retry = self.may_retry();
        if quietly || (wanted && may_retry) {
            let replayable = plan.source.is_none_or(|source| source.borrow().can_replay());
            if replayable && plan.deadline.is_none_or(|deadline| Instant::now() < deadline) {
                return self.repeat(plan, exchange, &outcome, quietly);
            }
            if wanted && may_retry && !replayable {
                plan.note(ClusterEvent::RetryAbandoned);
            }
        }
        if wanted && !may_retry {
            plan.note(ClusterEvent::RetryLimit);
            exchange.flags.add(Flags::RETRY_LIMIT);
        }
        if let Some(source) = plan.source
            && plan.forward.mirrors.is_empty()
        {
            source.borrow_mut().stop_keeping();
        }
        Next::Done
    }

    /// One more, unless the cluster has too many retries as it is.
    fn repeat(
        &mut self,
        plan: &Plan<'_>,
        exchange: &mut Exchange,
        outcome: &Outcome<'_>,
        quietly: bool,
    ) -> Next {
        let Some(policy) = self.policy.filter(|_| !quietly) else {
            self.unsent += 1;
            return Next::Again { wait: None };
        };
        let Some(permit) = take_retry_permit(plan) else {
            exchange.flags.add(Flags::UPSTREAM_OVERFLOW);
            return Next::Done;
        };
        self.permit.replace(permit);
        self.retries += 1;
        if matches!(outcome, Outcome::Refused) && self.refused < MAX_REFUSED {
            self.refused += 1;
        }
        plan.conn.worker.recorder.counters().retries.add(1);
        plan.cells().retries.add(1);
        let asked = asked_wait(policy, outcome);
        plan.note(match asked {
            Some(_) => ClusterEvent::RetryAsked,
            None => ClusterEvent::RetryBackoff,
        });
        let wait = asked.unwrap_or_else(|| policy.back_off(self.retries, random::next()));
        Next::Again { wait: Some(wait) }
    }
}

/// Waits before a further try, for which it is too late if this is false.
pub(super) async fn back_off(plan: &Plan<'_>, wait: Duration) -> bool {
    let until = Instant::now() + wait;
    let end = plan.deadline.filter(|deadline| *deadline <= until);
    tokio::time::sleep_until(end.unwrap_or(until)).await;
    end.is_none()
}

/// The reply when the request's time has passed between two tries.
pub(super) fn late(plan: &Plan<'_>, exchange: &mut Exchange) -> LocalReply {
    note_failure(plan, &Failure::Timeout);
    final_reply(exchange, Failure::Timeout)
}

/// Counts a stream of HTTP/2 that was given up before its answer.
fn note_reset(plan: &Plan<'_>, tried: &Tried) {
    if let Err(Failure::PerTryTimeout | Failure::Timeout | Failure::Client) = tried {
        plan.note(ClusterEvent::RqTxReset);
    }
}

/// Drops the result of a try; where nothing is left of it its connection serves on.
fn give_up(plan: &Plan<'_>, tried: Tried) {
    if let Ok((response, lease)) = tried
        && response.body().is_end_stream()
    {
        lease.release(
            plan.cluster.config.max_requests_per_connection,
            std::time::Instant::now(),
        );
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

fn is_idempotent(method: &Method) -> bool {
    matches!(
        *method,
        Method::GET | Method::HEAD | Method::OPTIONS | Method::PUT | Method::DELETE | Method::TRACE
    )
}
