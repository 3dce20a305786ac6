//! External authorisation on the worker: what is sent, who is asked, what becomes of the answer.

use std::time::{SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use http::request::Parts;
use http::uri::Uri;
use http::{HeaderValue, StatusCode, header};

use super::super::body::{Ahead, Inbound};
use super::super::call::{call, grpc};
use super::super::exchange::protocol_text;
use super::{Encode, Exchange, LocalReply, facts, metadata, state};
use crate::metrics::flags::Flags;
use crate::policy::ext_authz::{
    self, BodySettings, CheckScene, DEFAULT_TIMEOUT, ExtAuthz, NAMESPACE, PerRouteAuthz, Service, Verdict,
    is_valid, read_grpc,
};
use crate::random;
use crate::worker::request::Routed;

/// Asks about a request. `Ok(true)` says that the route is to be searched again.
pub(super) async fn ask(
    exchange: &mut Exchange,
    authz: &ExtAuthz,
    own: Option<&PerRouteAuthz>,
    routed: &Routed,
    parts: &mut Parts,
    body: &mut Option<Inbound>,
) -> Result<bool, LocalReply> {
    let worker = exchange.conn.worker.clone();
    let settings = match own {
        Some(PerRouteAuthz::Disabled) => return Ok(false),
        Some(PerRouteAuthz::Settings(settings)) => Some(&**settings),
        None => None,
    };
    if !authz.applies(metadata(exchange), random::next(), worker.id) {
        return if authz.deny_at_disable {
            Err(LocalReply::new(
                authz.status_on_error,
                Flags::UNAUTHORIZED,
                "ext_authz_denied",
                "",
            ))
        } else {
            Ok(false)
        };
    }
    let wanted = match settings {
        Some(settings) if settings.no_body => None,
        Some(settings) => settings.body.or(authz.body),
        None => authz.body,
    };
    let (sent, partial) = match wanted {
        None => (Bytes::new(), None),
        Some(wanted) => read_body(body, wanted, exchange.conn.manager.stream_idle_timeout).await?,
    };
    let service = settings
        .and_then(|settings| settings.service.as_ref())
        .unwrap_or(&authz.service);
    let verdict = {
        let conn = exchange.conn.clone();
        let facts = facts(exchange, parts);
        match service {
            Service::Grpc(target) => {
                let scene = CheckScene {
                    route: routed.route.metadata.as_deref(),
                    path: parts.uri.path_and_query().map_or("/", |path| path.as_str()),
                    id: exchange
                        .request_id
                        .as_ref()
                        .and_then(|id| id.to_str().ok())
                        .unwrap_or(""),
                    protocol: protocol_text(parts.version),
                    size: announced(parts),
                    time: SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default(),
                    certificate: conn
                        .tls
                        .as_ref()
                        .and_then(|tls| tls.peer.as_ref())
                        .map(|peer| &peer.der),
                    session: conn.tls.as_ref().map(|_| conn.server_name().unwrap_or("")),
                    extensions: settings.map(|settings| &settings.extensions),
                };
                let raw = wanted.unwrap_or(BodySettings {
                    limit: 0,
                    partial: false,
                    raw: false,
                });
                let question = authz.question(&facts, &scene, sent, raw, partial);
                match grpc(&worker, target, ext_authz::PATH, &question, DEFAULT_TIMEOUT).await {
                    Ok(answer) if authz.validates && !is_valid(&answer) => {
                        return Err(invalid(authz, worker.id));
                    }
                    Ok(answer) => read_grpc(answer),
                    Err(error) => failed(&error),
                }
            }
            Service::Http(service) => match service.question(&facts, sent, authz, partial) {
                None => Verdict::Failed,
                Some(question) => {
                    let target = &service.target;
                    match call(&worker, &target.cluster, question, false, target.timeout).await {
                        Ok(answer) => service.read(&answer.head, answer.body),
                        Err(error) => failed(&error),
                    }
                }
            },
        }
    };
    authz.count(&verdict, worker.id);
    match verdict {
        Verdict::Allowed(mut allowed) => {
            if !authz.restrict(&mut allowed) {
                return Err(invalid(authz, worker.id));
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
            Ok(authz.clear_route && changed)
        }
        Verdict::Denied(denied) => {
            if let Some(fields) = denied.metadata {
                state(exchange).metadata.merge(NAMESPACE, fields);
            }
            let mut reply = LocalReply::new(denied.status, Flags::UNAUTHORIZED, "ext_authz_denied", "");
            ext_authz::apply(&denied.headers, &mut reply.headers);
            reply.headers.remove(header::CONTENT_LENGTH);
            reply.body = denied.body;
            Err(reply)
        }
        Verdict::Failed if authz.failure_allows => {
            if authz.failure_marks {
                parts.headers.insert(
                    "x-envoy-auth-failure-mode-allowed",
                    HeaderValue::from_static("true"),
                );
            }
            Ok(false)
        }
        Verdict::Failed => Err(LocalReply::new(
            authz.status_on_error,
            Flags::UNAUTHORIZED,
            "ext_authz_error",
            "",
        )),
    }
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

fn failed(error: &super::super::call::CallError) -> Verdict {
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

async fn read_body(
    body: &mut Option<Inbound>,
    wanted: BodySettings,
    idle: Option<std::time::Duration>,
) -> Result<(Bytes, Option<bool>), LocalReply> {
    let Some(inbound) = body else {
        return Ok((Bytes::new(), Some(false)));
    };
    match inbound.read_ahead(wanted.limit, idle).await {
        Err(error) => Err(LocalReply::of_body(&error)),
        Ok(Ahead::Whole) if inbound.held() <= wanted.limit => {
            Ok((inbound.first_bytes(wanted.limit), Some(false)))
        }
        Ok(_) if wanted.partial => Ok((inbound.first_bytes(wanted.limit), Some(true))),
        Ok(_) => Err(super::too_large()),
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
