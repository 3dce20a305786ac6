//! The global rate limit on the worker.

use std::sync::Arc;

use bytes::Bytes;
use http::request::Parts;
use http::{HeaderName, HeaderValue, StatusCode, header};

use super::super::call::grpc;
use super::super::request::Routed;
use super::super::scene::ResponseScene;
use super::descriptors::{Entries, describe};
use super::{
    Encode, Exchange, LocalReply, X_RATELIMIT_LIMIT, X_RATELIMIT_REMAINING, X_RATELIMIT_RESET, find,
    metadata, state,
};
use crate::metrics::flags::Flags;
use crate::policy::descriptors::VirtualHostLimits;
use crate::policy::ext_authz::{How, apply};
use crate::policy::filter_state::Factory;
use crate::policy::per_route::Override;
use crate::policy::rate_limit::{PATH, PerRouteLimit, RateLimit};
use crate::random;

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
    let own = match find(&later.routed, &later.name) {
        Some(Override::RateLimit(own)) => Some(own),
        _ => None,
    };
    let limit = &later.limit;
    let entries = own
        .map(|own| &*own.own)
        .filter(|own| !own.is_empty())
        .unwrap_or(&limit.own);
    let hosts = own.map_or(VirtualHostLimits::Override, |own| own.virtual_host);
    let found = Entries::of(&later.routed, entries, limit.stage, hosts);
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

/// Asks the service about a request.
pub(super) async fn ask(
    exchange: &mut Exchange,
    limit: &Arc<RateLimit>,
    own: Option<&PerRouteLimit>,
    name: &str,
    routed: &Routed,
    parts: &mut Parts,
) -> Result<(), LocalReply> {
    let conn = exchange.conn.clone();
    let internal = parts
        .headers
        .get("x-envoy-internal")
        .is_some_and(|value| value.as_bytes() == b"true");
    // Envoy asks about nothing that it does not forward, nor about what it has no cluster for.
    if routed.known_cluster(conn.worker.id, &parts.headers).is_none() {
        return Ok(());
    }
    if !limit.enabled.hit(random::next()) || !limit.concerns(internal) {
        return Ok(());
    }
    let entries = own
        .map(|own| &*own.own)
        .filter(|own| !own.is_empty())
        .unwrap_or(&limit.own);
    let hosts = own.map_or(VirtualHostLimits::Override, |own| own.virtual_host);
    let found = Entries::of(routed, entries, limit.stage, hosts);
    if found.at_end() {
        let later = Later {
            limit: limit.clone(),
            name: name.into(),
            routed: routed.clone_arcs(),
            parts: parts.clone(),
        };
        state(exchange).later.push(later);
    }
    let descriptors = describe(&conn, exchange, routed, parts, &found, false);
    if descriptors.is_empty() {
        return Ok(());
    }
    let told: Vec<_> = descriptors.iter().map(|descriptor| descriptor.headers).collect();
    let mut question = limit.question(descriptors, own.and_then(|own| own.domain.as_deref()));
    let addend = metadata(exchange).state.known(Factory::HitsAddend);
    if let Some(addend) = addend.and_then(|text| text.parse::<u64>().ok()) {
        question.hits_addend = u32::try_from(addend).unwrap_or(u32::MAX);
    }
    let worker = &conn.worker;
    let said = match grpc(worker, &limit.service, PATH, &question, limit.timeout).await {
        Ok(answer) => limit.read(answer, &told, worker.id),
        Err(error) => {
            tracing::debug!(%error, "the rate limit service failed");
            let denies = limit.failure_denies.hit(random::next());
            limit.count_error(!denies, worker.id);
            if !denies {
                return Ok(());
            }
            return Err(LocalReply::new(
                limit.status_on_error,
                Flags::RATE_LIMIT_SERVICE,
                "rate_limiter_error",
                "",
            ));
        }
    };
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
        fields.push((X_RATELIMIT_LIMIT.clone(), text, How::Append));
        fields.push((
            X_RATELIMIT_REMAINING.clone(),
            HeaderValue::from(remaining),
            How::Append,
        ));
        fields.push((X_RATELIMIT_RESET.clone(), HeaderValue::from(reset), How::Append));
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
        return Ok(());
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
