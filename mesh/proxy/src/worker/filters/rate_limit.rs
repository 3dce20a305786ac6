//! The global rate limit on the worker.

use std::sync::Arc;

use bytes::Bytes;
use http::request::Parts;
use http::{HeaderName, HeaderValue, StatusCode, header};

use super::descriptors::{Entries, describe, limit_fields};
use super::levels::find;
use super::{Encode, Passed, Verdict, metadata, state};
use crate::metrics::flags::Flags;
use crate::policy::descriptors::VirtualHostLimits;
use crate::policy::ext_authz::{How, apply};
use crate::policy::filter_state::Factory;
use crate::policy::per_route::Override;
use crate::policy::rate_limit::{PATH, PerRouteLimit, RateLimit, Said};
use crate::random;
use crate::worker::call::{CallError, grpc};
use crate::worker::exchange::Exchange;
use crate::worker::local::LocalReply;
use crate::worker::request::Routed;
use crate::worker::scene::ResponseScene;

static X_ENVOY_RATELIMITED: HeaderName = HeaderName::from_static("x-envoy-ratelimited");

/// A request of which the service is told when it has ended.
pub(super) struct Later {
    limit: Arc<RateLimit>,
    /// The filter's.
    name: Box<str>,
    routed: Routed,
    parts: Parts,
}

/// Tells the services of a request that has ended; nobody waits for what they say.
pub(super) fn tell(exchange: &Exchange, later: &Later) {
    let conn = &exchange.conn;
    let own = of_route(find(&later.routed, &later.name));
    let limit = &later.limit;
    let found = entries(limit, own, &later.routed);
    let descriptors = describe(conn, exchange, &later.routed, &later.parts, &found, true);
    if descriptors.is_empty() {
        return;
    }
    let question = limit.question(descriptors, own.and_then(|own| own.domain.as_deref()));
    let (worker, limit) = (conn.worker.clone(), limit.clone());
    conn.worker.tasks.spawn_local(async move {
        // Bounded by its time limit.
        match grpc(&worker, &limit.service, PATH, &question, limit.timeout).await {
            Ok(answer) => drop(limit.read(answer, &[], worker.id)),
            Err(error) => {
                tracing::debug!(%error, "the rate limit service was not told of a request that has ended");
                limit.count_error(true, worker.id);
            }
        }
    });
}

/// What the route says of the limit.
fn of_route(own: Option<&Override>) -> Option<&PerRouteLimit> {
    match own {
        Some(Override::RateLimit(own)) => Some(own),
        _ => None,
    }
}

/// The entries by which a request is described.
fn entries<'a>(limit: &'a RateLimit, own: Option<&'a PerRouteLimit>, routed: &'a Routed) -> Entries<'a> {
    let entries = own
        .map(|own| &*own.own)
        .filter(|own| !own.is_empty())
        .unwrap_or(&limit.own);
    let hosts = own.map_or(VirtualHostLimits::Override, |own| own.virtual_host);
    Entries::of(routed, entries, limit.stage, hosts)
}

/// Asks the service about a request.
pub(super) async fn ask(
    exchange: &mut Exchange,
    limit: &Arc<RateLimit>,
    own: Option<&Override>,
    name: &str,
    routed: &Routed,
    parts: &mut Parts,
) -> Verdict {
    let own = of_route(own);
    let conn = exchange.conn.clone();
    let internal = parts
        .headers
        .get("x-envoy-internal")
        .is_some_and(|value| value.as_bytes() == b"true");
    // Envoy asks about nothing that it does not forward, nor about what it has no cluster for.
    if routed.known_cluster(conn.worker.id, &parts.headers).is_none() {
        return Ok(Passed::On);
    }
    if !limit.enabled.hit(random::next()) || !limit.concerns(internal) {
        return Ok(Passed::On);
    }
    let found = entries(limit, own, routed);
    if found.at_end() {
        let later = Later {
            limit: limit.clone(),
            name: name.into(),
            routed: routed.clone(),
            parts: parts.clone(),
        };
        state(exchange).later.push(later);
    }
    let descriptors = describe(&conn, exchange, routed, parts, &found, false);
    if descriptors.is_empty() {
        return Ok(Passed::On);
    }
    let told: Vec<_> = descriptors.iter().map(|descriptor| descriptor.headers).collect();
    let mut question = limit.question(descriptors, own.and_then(|own| own.domain.as_deref()));
    let addend = metadata(exchange).state.known(Factory::HitsAddend);
    if let Some(addend) = addend.and_then(|text| text.parse::<u64>().ok()) {
        question.hits_addend = u32::try_from(addend).unwrap_or(u32::MAX);
    }
    let worker = &conn.worker;
    match grpc(worker, &limit.service, PATH, &question, limit.timeout).await {
        Ok(answer) => obey(exchange, limit, limit.read(answer, &told, worker.id), parts),
        Err(error) => unasked(exchange, limit, &error),
    }
}

/// What becomes of a request that the service has said nothing of.
fn unasked(exchange: &mut Exchange, limit: &RateLimit, error: &CallError) -> Verdict {
    tracing::debug!(%error, "the rate limit service failed");
    let denies = limit.failure_denies.hit(random::next());
    limit.count_error(!denies, exchange.conn.worker.id);
    if !denies {
        return Ok(Passed::On);
    }
    Err(LocalReply::new(
        limit.status_on_error,
        Flags::RATE_LIMIT_SERVICE,
        "rate_limiter_error",
        "",
    ))
}

/// Does what the service has said.
fn obey(exchange: &mut Exchange, limit: &RateLimit, said: Said, parts: &mut Parts) -> Verdict {
    if let Some(fields) = said.metadata {
        state(exchange).metadata.merge(&limit.metadata_namespace, fields);
    }
    let mut fields: Vec<_> = said
        .response_headers
        .into_iter()
        .map(|(name, value)| {
            // There is one type of content.
            let how = if name == header::CONTENT_TYPE {
                How::Set
            } else {
                How::Append
            };
            (name, value, how)
        })
        .collect();
    if let Some((text, remaining, reset)) = said.limit
        && let Ok(text) = HeaderValue::from_str(&text)
    {
        // Beside what the service itself says of it.
        let own = limit_fields(text, remaining, reset.into());
        fields.extend(own.map(|(name, value, _)| (name, value, How::Append)));
    }
    if !said.over || !limit.enforced.hit(random::next()) {
        if !fields.is_empty() {
            state(exchange).encode.push(Encode::Fields(fields));
        }
        for (name, value) in said.request_headers {
            // A request for two hosts would be refused by whoever reads it next.
            if name != header::HOST {
                parts.headers.append(name, value);
            }
        }
        return Ok(Passed::On);
    }
    let mut reply = LocalReply::new(limit.status, Flags::RATE_LIMITED, "request_rate_limited", "");
    reply.body = Bytes::from(said.body);
    reply.grpc_status = limit.resource_exhausted.then_some(8).filter(|_| exchange.grpc);
    if limit.mark {
        reply
            .headers
            .insert(X_ENVOY_RATELIMITED.clone(), HeaderValue::from_static("true"));
    }
    apply(&fields, &mut reply.headers);
    if limit.retry_after
        && limit.status == StatusCode::TOO_MANY_REQUESTS
        && !reply.headers.contains_key(header::RETRY_AFTER)
        && let Some(reset) = said.retry_after
    {
        reply
            .headers
            .insert(header::RETRY_AFTER, HeaderValue::from(reset));
    }
    reply.foretell(exchange);
    let scene = ResponseScene::of(exchange, parts);
    limit.response_headers.apply(&mut reply.headers, &scene);
    Err(reply)
}
