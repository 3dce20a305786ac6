//! External authorisation on the worker: what is sent, who is asked, what becomes of the answer.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use http::request::Parts;
use http::uri::Uri;
use http::{HeaderValue, StatusCode, header};
use serin_xds::pb::envoy::service::auth::v3::CheckRequest;

use super::buffer::too_large;
use super::facts::facts;
use super::{Encode, Passed, metadata, state};
use crate::metrics::flags::Flags;
use crate::policy::ext_authz::{
    self, Allowed, BodySettings, CheckScene, DEFAULT_TIMEOUT, Denied, ExtAuthz, NAMESPACE, PerRouteAuthz,
    Service, Settings, Verdict, is_valid, read_grpc,
};
use crate::policy::per_route::Override;
use crate::random;
use crate::worker::body::{Ahead, Inbound};
use crate::worker::call::{CallError, call, grpc};
use crate::worker::exchange::{Exchange, protocol_text};
use crate::worker::local::LocalReply;
use crate::worker::request::Routed;

/// Asks about a request.
pub(super) async fn ask(
    exchange: &mut Exchange,
    authz: &ExtAuthz,
    own: Option<&Override>,
    routed: &Routed,
    parts: &mut Parts,
    body: &mut Option<Inbound>,
) -> super::Verdict {
    let worker = exchange.conn.worker.clone();
    let settings = match own {
        Some(Override::ExtAuthz(PerRouteAuthz::Disabled)) => return Ok(Passed::On),
        Some(Override::ExtAuthz(PerRouteAuthz::Settings(settings))) => Some(&**settings),
        _ => None,
    };
    if !authz.applies(metadata(exchange), random::next(), worker.id) {
        return if authz.deny_at_disable {
            Err(refusal(authz.status_on_error, "ext_authz_denied"))
        } else {
            Ok(Passed::On)
        };
    }
    let content = match authz.wanted_body(settings) {
        None => Content::default(),
        Some(wanted) => read_body(body, wanted, exchange.conn.manager.stream_idle_timeout).await?,
    };
    let service = settings.and_then(|settings| settings.service.as_ref());
    let verdict = match service.unwrap_or(&authz.service) {
        Service::Grpc(target) => {
            let question = grpc_question(exchange, authz, settings, routed, parts, content);
            match grpc(&worker, target, ext_authz::PATH, &question, DEFAULT_TIMEOUT).await {
                Ok(answer) if authz.validates && !is_valid(&answer) => {
                    return Err(invalid(authz, worker.id));
                }
                Ok(answer) => read_grpc(answer),
                Err(error) => failed(&error),
            }
        }
        Service::Http(service) => {
            let question = {
                let facts = facts(exchange, parts);
                service.question(&facts, content.bytes, authz, content.partial)
            };
            match question {
                None => Verdict::Failed,
                Some(question) => {
                    let target = &service.target;
                    match call(&worker, &target.cluster, question, false, target.timeout).await {
                        Ok(answer) => service.read(&answer.head, answer.body),
                        Err(error) => failed(&error),
                    }
                }
            }
        }
    };
    authz.count(&verdict, worker.id);
    match verdict {
        Verdict::Allowed(allowed) => allow(exchange, authz, *allowed, parts),
        Verdict::Denied(denied) => Err(deny(exchange, *denied)),
        Verdict::Failed if authz.failure_allows => {
            if authz.failure_marks {
                parts.headers.insert(
                    "x-envoy-auth-failure-mode-allowed",
                    HeaderValue::from_static("true"),
                );
            }
            Ok(Passed::On)
        }
        Verdict::Failed => Err(refusal(authz.status_on_error, "ext_authz_error")),
    }
}

fn refusal(status: StatusCode, details: &'static str) -> LocalReply {
    LocalReply::new(status, Flags::UNAUTHORIZED, details, "")
}

/// The question for a service by gRPC.
fn grpc_question(
    exchange: &Exchange,
    authz: &ExtAuthz,
    settings: Option<&Settings>,
    routed: &Routed,
    parts: &Parts,
    content: Content,
) -> CheckRequest {
    let tls = exchange.conn.tls.as_ref();
    let id = exchange.request_id.as_ref();
    let scene = CheckScene {
        route: routed.route.metadata.as_deref(),
        path: parts.uri.path_and_query().map_or("/", |path| path.as_str()),
        id: id.and_then(|id| id.to_str().ok()).unwrap_or(""),
        protocol: protocol_text(parts.version),
        size: announced(parts),
        time: SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default(),
        certificate: tls.and_then(|tls| tls.peer.as_ref()).map(|peer| &peer.der),
        session: tls.map(|_| exchange.conn.server_name().unwrap_or("")),
        extensions: settings.map(|settings| &settings.extensions),
    };
    let facts = facts(exchange, parts);
    authz.question(&facts, &scene, content.bytes, content.raw, content.partial)
}

/// Changes an allowed request as the service says.
fn allow(
    exchange: &mut Exchange,
    authz: &ExtAuthz,
    mut allowed: Allowed,
    parts: &mut Parts,
) -> super::Verdict {
    if !authz.restrict(&mut allowed) {
        return Err(invalid(authz, exchange.conn.worker.id));
    }
    let changed = !allowed.set.is_empty() || !allowed.remove.is_empty();
    for name in &allowed.remove {
        parts.headers.remove(name);
    }
    ext_authz::apply(&allowed.set, &mut parts.headers);
    change_query(parts, &allowed.query_set, &allowed.query_remove);
    if !allowed.response.is_empty() {
        state(exchange).encode.push(Encode::Fields(allowed.response));
    }
    if let Some(fields) = allowed.metadata {
        state(exchange).metadata.merge(NAMESPACE, fields);
    }
    Ok(Passed::rerouted_if(authz.clear_route && changed))
}

/// The answer to a request that the service denies.
fn deny(exchange: &mut Exchange, denied: Denied) -> LocalReply {
    if let Some(fields) = denied.metadata {
        state(exchange).metadata.merge(NAMESPACE, fields);
    }
    let mut reply = refusal(denied.status, "ext_authz_denied");
    ext_authz::apply(&denied.headers, &mut reply.headers);
    reply.headers.remove(header::CONTENT_LENGTH);
    reply.body = denied.body;
    reply
}

/// The answer asks for what must not or cannot be done.
fn invalid(authz: &ExtAuthz, worker: usize) -> LocalReply {
    authz.count_invalid(worker);
    LocalReply::new(
        StatusCode::INTERNAL_SERVER_ERROR,
        Flags::UNAUTHORIZED,
        "ext_authz_invalid",
        "",
    )
}

fn failed(error: &CallError) -> Verdict {
    tracing::debug!(%error, "the authorisation service failed");
    Verdict::Failed
}

/// The announced length of the body, or -1.
fn announced(parts: &Parts) -> i64 {
    parts
        .headers
        .get(header::CONTENT_LENGTH)
        .and_then(|value| value.to_str().ok())
        .and_then(|text| text.parse().ok())
        .unwrap_or(-1)
}

/// The content that the service is shown.
#[derive(Default)]
struct Content {
    bytes: Bytes,
    /// Whether there is more of it; `None` where the service wants none.
    partial: Option<bool>,
    /// Whether it is shown as bytes and not as text.
    raw: bool,
}

/// Reads as much of the body as the service wants.
async fn read_body(
    body: &mut Option<Inbound>,
    wanted: BodySettings,
    idle: Option<Duration>,
) -> Result<Content, LocalReply> {
    let content = |bytes, partial| Content {
        bytes,
        partial: Some(partial),
        raw: wanted.raw,
    };
    let Some(inbound) = body else {
        return Ok(content(Bytes::new(), false));
    };
    match inbound.read_ahead(wanted.limit, idle).await {
        Err(error) => Err(LocalReply::of_body(&error)),
        Ok(Ahead::Whole) if inbound.held() <= wanted.limit => {
            Ok(content(inbound.first_bytes(wanted.limit), false))
        }
        Ok(_) if wanted.partial => Ok(content(inbound.first_bytes(wanted.limit), true)),
        Ok(_) => Err(too_large()),
    }
}

fn change_query(parts: &mut Parts, set: &[(String, String)], remove: &[String]) {
    if set.is_empty() && remove.is_empty() {
        return;
    }
    let name = |pair: &str| pair.split_once('=').map_or(pair, |(name, _)| name).to_owned();
    let mut pairs: Vec<String> = parts
        .uri
        .query()
        .unwrap_or("")
        .split('&')
        .filter(|pair| {
            let name = name(pair);
            !pair.is_empty() && !remove.contains(&name) && !set.iter().any(|(key, _)| *key == name)
        })
        .map(str::to_owned)
        .collect();
    pairs.extend(set.iter().map(|(key, value)| format!("{key}={value}")));
    let target = if pairs.is_empty() {
        parts.uri.path().to_owned()
    } else {
        format!("{}?{}", parts.uri.path(), pairs.join("&"))
    };
    // What the service sends may be no query; then the request goes on with its own.
    if let Ok(uri) = target.parse::<Uri>() {
        parts.uri = uri;
    }
}
