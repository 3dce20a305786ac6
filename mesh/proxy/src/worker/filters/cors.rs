//! CORS: what the levels say together, preflights, and the fields of other responses.

use std::sync::Arc;

use http::StatusCode;
use http::request::Parts;

use super::levels::levels;
use super::{Encode, Passed, Verdict, state};
use crate::config::route::Action;
use crate::metrics::flags::Flags;
use crate::policy::cors::{Cors, CorsVerdict};
use crate::policy::per_route::Override;
use crate::random;
use crate::worker::exchange::Exchange;
use crate::worker::local::LocalReply;
use crate::worker::request::Routed;

/// The rules for a request, if any level or the chain has some. Of routes that answer themselves they say nothing (Envoy's
/// rule). Of each field the most specific level counts that says something of it.
pub(super) fn rules(chain: Option<&Arc<Cors>>, routed: &Routed, name: &str) -> Option<Arc<Cors>> {
    if !matches!(routed.route.action, Action::Forward(_)) {
        return None;
    }
    let mut found = levels(routed)
        .into_iter()
        .flatten()
        .filter_map(|level| match level.get(name) {
            Some(Override::Cors(cors)) => Some(cors),
            _ => level.cors.as_ref(),
        });
    match found.next() {
        None => chain.cloned(),
        Some(first) => Some(found.fold(first.clone(), |all, next| Arc::new(all.or(next)))),
    }
}

/// Answers a preflight; otherwise the response is marked for the request's origin.
pub(super) fn judge_origin(exchange: &mut Exchange, cors: &Arc<Cors>, parts: &Parts) -> Verdict {
    if !cors.applies(random::next) {
        return Ok(Passed::On);
    }
    match cors.judge(&parts.method, &parts.headers) {
        CorsVerdict::None => Ok(Passed::On),
        CorsVerdict::Actual(origin) => {
            state(exchange).encode.push(Encode::Cors(cors.clone(), origin));
            Ok(Passed::On)
        }
        CorsVerdict::Preflight(headers) => {
            let mut reply = LocalReply::new(StatusCode::OK, Flags::default(), "cors_response", "");
            reply.headers = *headers;
            reply.plain = true;
            Err(reply)
        }
    }
}
