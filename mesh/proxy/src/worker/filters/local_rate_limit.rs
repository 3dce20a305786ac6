//! The local rate limit of requests.

use std::sync::Arc;

use http::request::Parts;
use http::{HeaderValue, header};

use super::descriptors::{Entries, describe};
use super::{Encode, X_RATELIMIT_LIMIT, X_RATELIMIT_REMAINING, X_RATELIMIT_RESET, state};
use crate::clock;
use crate::metrics::flags::Flags;
use crate::policy::ext_authz::{Field, How};
use crate::policy::local_rate_limit::LocalRateLimit;
use crate::random;
use crate::worker::exchange::Exchange;
use crate::worker::http::Downstream;
use crate::worker::local::LocalReply;
use crate::worker::request::Routed;
use crate::worker::scene::{RequestScene, ResponseScene};

/// `x-ratelimit-*` of draft 03.
fn limit_fields(limit: u32, remaining: u32, reset_s: u64) -> Vec<Field> {
    vec![
        (X_RATELIMIT_LIMIT.clone(), HeaderValue::from(limit), How::Set),
        (
            X_RATELIMIT_REMAINING.clone(),
            HeaderValue::from(remaining),
            How::Set,
        ),
        (X_RATELIMIT_RESET.clone(), HeaderValue::from(reset_s), How::Set),
    ]
}

/// Takes a token of the buckets that a request falls into.
pub(super) fn limit_locally(
    conn: &Downstream,
    exchange: &mut Exchange,
    limit: &Arc<LocalRateLimit>,
    routed: &Routed,
    parts: &mut Parts,
) -> Result<(), LocalReply> {
    if !limit.enabled.hit(random::next()) {
        return Ok(());
    }
    let now = clock::now_ms();
    let descriptors = if limit.wants_descriptors() {
        let entries = Entries::of(routed, &limit.own, limit.stage, limit.virtual_host);
        describe(conn, exchange, routed, parts, &entries, false)
    } else {
        Vec::new()
    };
    let own = limit.per_connection.then(|| conn.buckets_of(limit, now));
    let verdict = limit.judge(&descriptors, own.as_deref(), now, conn.worker.id);
    if verdict.headers.unwrap_or(limit.headers) {
        let fields = limit_fields(verdict.limit, verdict.remaining, verdict.reset_s);
        state(exchange).encode.push(Encode::Fields(fields));
    }
    if !verdict.limited {
        return Ok(());
    }
    if !limit.enforced.hit(random::next()) {
        if !limit.request_headers.is_empty() {
            let cluster = routed.known_cluster(conn.worker.id, &parts.headers);
            let scene = RequestScene {
                exchange: &*exchange,
                uri: &parts.uri,
                cluster: cluster.as_deref(),
            };
            limit.request_headers.apply(&mut parts.headers, &scene);
        }
        return Ok(());
    }
    limit.count_enforced(conn.worker.id);
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
            .insert(header::RETRY_AFTER, HeaderValue::from(verdict.reset_s));
    }
    reply.foretell(exchange);
    let scene = ResponseScene::of(exchange, parts);
    limit.response_headers.apply(&mut reply.headers, &scene);
    Err(reply)
}
