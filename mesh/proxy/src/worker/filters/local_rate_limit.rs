//! The local rate limit of requests.

use std::sync::Arc;

use http::request::Parts;
use http::{HeaderValue, header};

use super::descriptors::{Entries, describe, limit_fields};
use super::{Encode, Passed, Verdict, state};
use crate::clock;
use crate::metrics::flags::Flags;
use crate::policy::local_rate_limit::LocalRateLimit;
use crate::policy::per_route::Override;
use crate::random;
use crate::worker::exchange::Exchange;
use crate::worker::local::LocalReply;
use crate::worker::request::Routed;
use crate::worker::scene::{RequestScene, ResponseScene};

/// Takes a token of the buckets that a request falls into: the route's, or else the chain's.
pub(super) fn limit(
    exchange: &mut Exchange,
    chain: Option<&Arc<LocalRateLimit>>,
    own: Option<&Override>,
    routed: &Routed,
    parts: &mut Parts,
) -> Verdict {
    let limit = match own {
        Some(Override::LocalRateLimit(own)) => Some(own),
        _ => chain,
    };
    let Some(limit) = limit else {
        return Ok(Passed::On);
    };
    if !limit.enabled.hit(random::next()) {
        return Ok(Passed::On);
    }
    let now = clock::now_ms();
    let conn = &exchange.conn;
    let descriptors = if limit.wants_descriptors() {
        let entries = Entries::of(routed, &limit.own, limit.stage, limit.virtual_host);
        describe(conn, exchange, routed, parts, &entries, false)
    } else {
        Vec::new()
    };
    let own = limit.per_connection.then(|| conn.buckets_of(limit, now));
    let judged = limit.judge(&descriptors, own.as_deref(), now, conn.worker.id);
    if judged.headers.unwrap_or(limit.headers) {
        let (most, reset_s) = (HeaderValue::from(judged.limit), judged.reset_s.into());
        let fields = limit_fields(most, judged.remaining, reset_s);
        state(exchange).encode.push(Encode::Fields(fields.into()));
    }
    if !judged.limited {
        return Ok(Passed::On);
    }
    if !limit.enforced.hit(random::next()) {
        mark(exchange, limit, routed, parts);
        return Ok(Passed::On);
    }
    limit.count_enforced(exchange.conn.worker.id);
    Err(refusal(exchange, limit, judged.reset_s, parts))
}

/// Marks a request that is over a limit which is not enforced.
fn mark(exchange: &Exchange, limit: &LocalRateLimit, routed: &Routed, parts: &mut Parts) {
    if limit.request_headers.is_empty() {
        return;
    }
    let cluster = routed.known_cluster(exchange.conn.worker.id, &parts.headers);
    let scene = RequestScene {
        exchange,
        uri: &parts.uri,
        cluster: cluster.as_deref(),
    };
    limit.request_headers.apply(&mut parts.headers, &scene);
}

fn refusal(exchange: &mut Exchange, limit: &LocalRateLimit, reset_s: u64, parts: &Parts) -> LocalReply {
    let mut reply = LocalReply::new(
        limit.status,
        Flags::RATE_LIMITED,
        "local_rate_limited",
        "local_rate_limited",
    );
    reply.grpc_status = limit.resource_exhausted.then_some(8).filter(|_| exchange.grpc);
    if limit.retry_after {
        reply
            .headers
            .insert(header::RETRY_AFTER, HeaderValue::from(reset_s));
    }
    reply.foretell(exchange);
    let scene = ResponseScene::of(exchange, parts);
    limit.response_headers.apply(&mut reply.headers, &scene);
    reply
}
