//! What came of a try: for outlier detection, for counters, and for whether there is another one.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use http::{HeaderMap, HeaderValue, Response};

use super::Tried;
use crate::config::listener::Direction;
use crate::config::retry::{Outcome, RetryPolicy};
use crate::hygiene::fields::{Present, connection_has};
use crate::metrics::events::ClusterEvent;
use crate::random;
use crate::upstream::cluster::Host;
use crate::upstream::outlier::Event;
use crate::upstream::pool::ConnectError;
use crate::worker::exchange::GRPC_STATUS;
use crate::worker::failure::{Failure, X_UNPROCESSED};
use crate::worker::upstream::Plan;

/// Takes note of a try; `None` where nothing more may be tried.
pub(in crate::worker) fn judge<'r>(plan: &Plan<'_>, host: &Host, tried: &'r Tried) -> Option<Outcome<'r>> {
    match tried {
        Ok((response, _)) => Some(judge_response(plan, host, response)),
        Err(failure) => judge_failure(plan, host, failure),
    }
}

fn judge_response<'r, B>(plan: &Plan<'_>, host: &Host, response: &'r Response<B>) -> Outcome<'r> {
    let present = Present::of(response.headers());
    record(plan, host, Event::Status(status_for_outliers(response, present)));
    if present.has(Present::CONNECTION) && connection_has(response.headers(), "close") {
        plan.note(ClusterEvent::CxCloseNotify);
    }
    // Believed from any next hop: whoever answered says that nobody acted on the request.
    let nobody_acted = plan.conn.direction != Direction::Inbound
        && present.has(Present::SERIN)
        && unprocessed(response.headers());
    if nobody_acted {
        Outcome::Refused
    } else {
        Outcome::Response(response.status(), response.headers())
    }
}

fn judge_failure(plan: &Plan<'_>, host: &Host, failure: &Failure) -> Option<Outcome<'static>> {
    if blames_host(failure) {
        record(plan, host, Event::LocalFailure);
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

/// Whether a failure says something about the host's health.
fn blames_host(failure: &Failure) -> bool {
    match failure {
        Failure::Client | Failure::Connect(ConnectError::Overflow) => false,
        // Most likely closed while idle.
        Failure::Reset { reused, stream, .. } => !reused || *stream,
        Failure::Connect(_) | Failure::Refused { .. } | Failure::PerTryTimeout | Failure::Timeout => true,
    }
}

fn record(plan: &Plan<'_>, host: &Host, event: Event) {
    if plan.cluster.record(host, event) {
        plan.conn.worker.recorder.counters().ejections.add(1);
    }
}

/// Counts how an attempt has failed.
pub(super) fn note_failure(plan: &Plan<'_>, failure: &Failure) {
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

/// Whether the next hop is a proxy that could not reach its application: by its own mark, or by the flag of a
/// connection failure on a response that it made itself.
fn unprocessed(headers: &HeaderMap) -> bool {
    headers.contains_key(&X_UNPROCESSED)
        || headers
            .get("x-serin-response-flags")
            .and_then(|flags| flags.to_str().ok())
            .is_some_and(|flags| flags.split(',').any(|flag| flag == "UF"))
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

/// The wait that a response asks for.
pub(in crate::worker) fn asked_wait(policy: &RetryPolicy, outcome: &Outcome<'_>) -> Option<Duration> {
    if !policy.heeds_asked_waits() {
        return None;
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    policy.asked_wait(outcome, now.map_or(0, |now| now.as_secs()), random::next())
}
