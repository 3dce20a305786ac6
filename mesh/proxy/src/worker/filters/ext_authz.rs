//! External authorisation on the worker: what is sent, who is asked, what becomes of the answer.

use std::collections::BTreeMap;
use std::time::{SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use http::request::Parts;
use http::uri::Uri;
use http::{HeaderMap, HeaderValue, StatusCode, header};

use super::super::body::{Ahead, Inbound};
use super::super::call::{call, grpc};
use super::super::exchange::protocol_text;
use super::super::scene::RequestScene;
use super::{Encode, Exchange, LocalReply, facts, metadata, state};
use crate::config::headers::Scene;
use crate::metrics::flags::Flags;
use crate::observe::record::{Record, Wants};
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
    let received = body.as_ref().map_or(0, Inbound::held);
    let service = settings
        .and_then(|settings| settings.service.as_ref())
        .unwrap_or(&authz.service);
    let verdict = {
        let conn = exchange.conn.clone();
        let facts = facts(&conn, parts, metadata(exchange));
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
                    size: i64::try_from(received).unwrap_or(i64::MAX),
                    own_principal: conn.tls.as_ref().and_then(|tls| tls.local_principal()),
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
                        if let Some(fields) = answer.dynamic_metadata {
                            state(exchange).metadata.merge(NAMESPACE, fields);
                        }
                        return Err(invalid(authz, worker.id));
                    }
                    Ok(answer) => read_grpc(answer),
                    Err(error) => failed(&error),
                }
            }
            Service::Http(service) => match {
                let mut added = HeaderMap::new();
                service.add.apply(&mut added, &Asking { exchange, parts });
                service.question(&facts, sent, authz, partial, added)
            } {
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
            if let Some(fields) = allowed.metadata.take() {
                state(exchange).metadata.merge(NAMESPACE, fields);
            }
            if !authz.restrict(&mut allowed) {
                return Err(invalid(authz, worker.id));
            }
            let changed = !allowed.set.is_empty()
                || !allowed.remove.is_empty()
                || allowed.path.is_some()
                || !allowed.query_set.is_empty()
                || !allowed.query_remove.is_empty();
            ext_authz::apply(&allowed.set, &mut parts.headers);
            for name in &allowed.remove {
                parts.headers.remove(name);
            }
            // What the service sends may be no path; then the request goes on with its own.
            if let Some(path) = &allowed.path
                && path.starts_with('/')
                && let Ok(uri) = path.parse::<Uri>()
            {
                parts.uri = uri;
            }
            change_query(parts, &allowed.query_set, &allowed.query_remove);
            if !allowed.response.is_empty() {
                state(exchange).encode.push(Encode::Fields(allowed.response));
            }
            Ok(authz.clear_route && changed)
        }
        Verdict::Denied(denied) => {
            if let Some(fields) = denied.metadata {
                state(exchange).metadata.merge(NAMESPACE, fields);
            }
            let mut reply = LocalReply::new(denied.status, Flags::UNAUTHORIZED, "ext_authz_denied", "");
            ext_authz::apply_denied(&denied.headers, &mut reply.headers);
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

/// A question that is being made: what its fields are made of is the request.
struct Asking<'a> {
    exchange: &'a Exchange,
    parts: &'a Parts,
}

impl Scene for Asking<'_> {
    fn show(&self, wants: &Wants, _: &HeaderMap, to: &mut dyn FnMut(&Record<'_>)) {
        let scene = RequestScene {
            exchange: self.exchange,
            uri: &self.parts.uri,
            cluster: None,
        };
        scene.show(wants, &self.parts.headers, to);
    }
}

async fn read_body(
    body: &mut Option<Inbound>,
    wanted: BodySettings,
    idle: Option<std::time::Duration>,
) -> Result<(Bytes, Option<bool>), LocalReply> {
    let Some(inbound) = body else {
        return Ok((Bytes::new(), None));
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

/// A part of a query without what would be no part of it for whoever reads it next.
fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_graphic() && !matches!(byte, b'#' | b'"' | b'<' | b'>') {
            out.push(char::from(byte));
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}

fn change_query(parts: &mut Parts, set: &[(String, String)], remove: &[String]) {
    if set.is_empty() && remove.is_empty() {
        return;
    }
    // By name, as Envoy has them; of a name that is set the first value is.
    let mut all: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for pair in parts
        .uri
        .query()
        .unwrap_or("")
        .split('&')
        .filter(|pair| !pair.is_empty())
    {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        all.entry(name).or_default().push(value);
    }
    let set: Vec<(String, String)> = set
        .iter()
        .map(|(name, value)| (escaped(name), escaped(value)))
        .collect();
    for (name, value) in &set {
        all.insert(name, vec![value]);
    }
    for name in remove {
        all.remove(name.as_str());
    }
    let pairs: Vec<String> = all
        .iter()
        .flat_map(|(name, values)| values.iter().map(move |value| format!("{name}={value}")))
        .collect();
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
