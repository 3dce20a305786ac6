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

fn aborted(fault: &Fault, abort: FaultAbort) -> LocalReply {
    let mut reply = LocalReply::new(StatusCode::OK, Flags::FAULT_INJECTED, "fault_filter_abort", "");
    reply.body = fault.body.clone();
    match abort {
        FaultAbort::Http(status) => reply.status = status,
        // Who does not speak gRPC is told 200 (Envoy).
        FaultAbort::Grpc(status) => reply.grpc_status = Some(status),
    }
    reply
}

#[cfg(test)]
mod tests {
    use serin_xds::pb::envoy::extensions::filters::http::fault::v3 as pb;
    use serin_xds::pb::envoy::r#type::v3::FractionalPercent;

    use super::*;

    #[test]
    fn a_grpc_status_is_an_http_status_of_200() {
        let message = pb::HttpFault {
            abort: Some(pb::FaultAbort {
                percentage: Some(FractionalPercent {
                    numerator: 100,
                    denominator: 0,
                }),
                error_type: Some(pb::fault_abort::ErrorType::GrpcStatus(14)),
                ..Default::default()
            }),
            ..Default::default()
        };
        let fault = Fault::compile(&message).unwrap().unwrap();
        let reply = aborted(&fault, FaultAbort::Grpc(14));
        assert_eq!((reply.status, reply.grpc_status), (StatusCode::OK, Some(14)));
        let unavailable = FaultAbort::Http(StatusCode::SERVICE_UNAVAILABLE);
        assert_eq!(
            aborted(&fault, unavailable).status,
            StatusCode::SERVICE_UNAVAILABLE
        );
    }
}
