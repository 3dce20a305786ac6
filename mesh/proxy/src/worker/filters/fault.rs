//! Faults that are injected.

use std::sync::Arc;
use std::time::Duration;

use http::StatusCode;
use http::request::Parts;

use super::{Passed, Verdict, state};
use crate::metrics::flags::Flags;
use crate::policy::fault::{Decision, Fault, FaultAbort};
use crate::policy::per_route::Override;
use crate::random;
use crate::worker::exchange::Exchange;
use crate::worker::local::LocalReply;
use crate::worker::request::view;

/// The longest delay: what is told to wait for ever ends some day.
const MAX_DELAY: Duration = Duration::from_secs(3600);

/// The fault that the route asks for, or else the chain.
pub(super) fn of<'a>(chain: Option<&'a Arc<Fault>>, own: Option<&'a Override>) -> Option<&'a Arc<Fault>> {
    match own {
        None | Some(Override::Enabled) => chain,
        Some(Override::Fault(own)) => own.as_ref(),
        Some(_) => None,
    }
}

/// Delays, and the reply of an abort.
pub(super) async fn inject(
    exchange: &mut Exchange,
    fault: &Arc<Fault>,
    cluster: &str,
    parts: &Parts,
) -> Verdict {
    let decision = fault.decide(&view(parts), cluster, random::next);
    if decision == Decision::default() {
        return Ok(Passed::On);
    }
    let Some(active) = fault.begin() else {
        return Ok(Passed::On);
    };
    let state = state(exchange);
    state.fault = Some(active);
    state.rate = decision.rate;
    if let Some(delay) = decision.delay {
        exchange.flags.add(Flags::DELAY_INJECTED);
        // Boxed, because few requests wait and every request's future would carry the timer.
        Box::pin(tokio::time::sleep(delay.min(MAX_DELAY))).await;
    }
    match decision.abort {
        None => Ok(Passed::On),
        Some(abort) => Err(aborted(fault, abort)),
    }
}

/// The HTTP status of a gRPC status, as Envoy maps them.
fn http_of_grpc(status: u32) -> StatusCode {
    match status {
        0 => StatusCode::OK,
        // The client has gone (nginx).
        1 => StatusCode::from_u16(499).unwrap_or(StatusCode::BAD_REQUEST),
        3 | 9 | 11 => StatusCode::BAD_REQUEST,
        4 => StatusCode::GATEWAY_TIMEOUT,
        5 => StatusCode::NOT_FOUND,
        6 | 10 => StatusCode::CONFLICT,
        7 => StatusCode::FORBIDDEN,
        8 => StatusCode::TOO_MANY_REQUESTS,
        12 => StatusCode::NOT_IMPLEMENTED,
        14 => StatusCode::SERVICE_UNAVAILABLE,
        16 => StatusCode::UNAUTHORIZED,
        _ => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

fn aborted(fault: &Fault, abort: FaultAbort) -> LocalReply {
    let mut reply = LocalReply::new(StatusCode::OK, Flags::FAULT_INJECTED, "fault_filter_abort", "");
    reply.body = fault.body.clone();
    match abort {
        FaultAbort::Http(status) => reply.status = status,
        FaultAbort::Grpc(status) => {
            reply.grpc_status = Some(status);
            // Who does not speak gRPC is told the same as an HTTP status.
            reply.status = http_of_grpc(status);
        }
    }
    reply
}
