//! External authorisation on the worker: what is sent, who is asked, what becomes of the answer.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use http::request::Parts;
use http::uri::Uri;
use http::{HeaderMap, HeaderValue, StatusCode, header};
use prost::Message as _;
use serin_xds::pb::envoy::service::auth::v3::{CheckRequest, CheckResponse};
use serin_xds::pb::google::protobuf::Struct;

use super::buffer::too_large;
use super::facts::facts;
use super::{Encode, Passed, metadata, state};
use crate::config::headers::Scene;
use crate::hygiene::query::{Names, Query};
use crate::metrics::flags::Flags;
use crate::observe::record::{Record, Wants};
use crate::policy::ext_authz::{
    self, Allowed, Asked, BodySettings, CheckScene, DEFAULT_TIMEOUT, Decision, Denied, ExtAuthz, HttpService,
    NAMESPACE, PerRouteAuthz, Service, Settings, Verdict, is_valid, read_grpc,
};
use crate::policy::filter_state::Report;
use crate::policy::per_route::Override;
use crate::random;
use crate::worker::body::{Ahead, Inbound};
use crate::worker::call::{CallError, call, grpc};
use crate::worker::exchange::{Exchange, protocol_text};
use crate::worker::local::LocalReply;
use crate::worker::request::Routed;
use crate::worker::scene::RequestScene;

/// Bytes before a message of gRPC.
const PREFIX: usize = 5;

/// Asks about a request.
pub(super) async fn ask(
    exchange: &mut Exchange,
    (authz, name): (&ExtAuthz, &str),
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
        return not_asked(exchange, authz, name);
    }
    let content = match authz.wanted_body(settings) {
        None => Content::default(),
        Some(wanted) => read_body(body, wanted, exchange.conn.manager.stream_idle_timeout).await?,
    };
    let service = settings.and_then(|settings| settings.service.as_ref());
    let service = service.unwrap_or(&authz.service);
    let began = authz.reports.then(Instant::now);
    let mut bytes = None;
    let verdict = match service {
        Service::Grpc(target) => {
            let question = grpc_question(exchange, authz, settings, routed, parts, content);
            let answer =
                grpc::<CheckResponse>(&worker, target, ext_authz::PATH, &question, DEFAULT_TIMEOUT).await;
            if authz.reports {
                let received = answer.as_ref().map_or(0, |answer| PREFIX + answer.encoded_len());
                bytes = Some((PREFIX + question.encoded_len(), received));
            }
            match answer {
                Ok(answer) if authz.validates && !is_valid(&answer) => {
                    tell_asked(exchange, name, began, bytes);
                    note(exchange, answer.dynamic_metadata);
                    authz.count_invalid(worker.id);
                    return unusable(exchange, authz, name);
                }
                Ok(answer) => read_grpc(answer),
                Err(error) => failed(&error),
            }
        }
        Service::Http(service) => {
            let asking = Asking { exchange, parts };
            ask_over_http(&asking, authz, service, content).await
        }
    };
    authz.count(&verdict, worker.id);
    tell_asked(exchange, name, began, bytes);
    if authz.shadow {
        pass_anyway(
            exchange,
            authz,
            name,
            &verdict,
            matches!(service, Service::Http(_)),
        );
    }
    match verdict {
        Verdict::Allowed(allowed) => allow(exchange, (authz, name), *allowed, parts),
        Verdict::Denied(denied) if authz.shadow => {
            note(exchange, denied.metadata);
            Ok(Passed::On)
        }
        Verdict::Failed if authz.shadow => Ok(Passed::On),
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

/// What becomes of a request that the service is not asked about.
fn not_asked(exchange: &mut Exchange, authz: &ExtAuthz, name: &str) -> super::Verdict {
    if !authz.deny_at_disable {
        return Ok(Passed::On);
    }
    if !authz.shadow {
        return Err(refusal(authz.status_on_error, "ext_authz_denied"));
    }
    authz.count_shadow_denied(exchange.conn.worker.id);
    exchange.flags.add(Flags::UNAUTHORIZED);
    keep(exchange, Decision::unasked(authz.status_on_error).report(name));
    Ok(Passed::On)
}

/// Asks a service over HTTP.
async fn ask_over_http(
    asking: &Asking<'_>,
    authz: &ExtAuthz,
    service: &HttpService,
    content: Content,
) -> Verdict {
    let question = {
        let facts = facts(asking.exchange, asking.parts);
        let mut added = HeaderMap::new();
        service.add.apply(&mut added, asking);
        service.question(&facts, content.bytes, authz, content.partial, added)
    };
    let Some(question) = question else {
        return Verdict::Failed;
    };
    let target = &service.target;
    let worker = asking.exchange.conn.worker.clone();
    match call(&worker, &target.cluster, question, false, target.timeout).await {
        Ok(answer) => service.read(&answer.head, answer.body),
        Err(error) => failed(&error),
    }
}

/// Keeps what the filter tells of itself.
fn keep(exchange: &mut Exchange, report: Report) {
    state(exchange).metadata.state.report(report);
}

/// Keeps how a service was asked, where that is told: since when, and what was said.
fn tell_asked(exchange: &mut Exchange, name: &str, began: Option<Instant>, bytes: Option<(usize, usize)>) {
    if let Some(began) = began {
        let took = began.elapsed();
        keep(exchange, Asked { took, bytes }.report(name));
    }
}

/// Keeps what a service has decided about a request that passes whatever that is.
fn pass_anyway(exchange: &mut Exchange, authz: &ExtAuthz, name: &str, verdict: &Verdict, over_http: bool) {
    let worker = exchange.conn.worker.id;
    let decision = match verdict {
        Verdict::Allowed(_) => Decision::ALLOWED,
        Verdict::Denied(denied) => {
            authz.count_shadow_denied(worker);
            Decision::denied(denied, over_http)
        }
        Verdict::Failed => {
            authz.count_shadow_error(worker);
            Decision::failed(authz.status_on_error)
        }
    };
    keep(exchange, decision.report(name));
}

/// What a service tells later filters and the log.
fn note(exchange: &mut Exchange, told: Option<Struct>) {
    if let Some(fields) = told {
        state(exchange).metadata.merge(NAMESPACE, fields);
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
        size: i64::try_from(content.received).unwrap_or(i64::MAX),
        own_principal: tls.and_then(|tls| tls.local_principal()),
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
    (authz, name): (&ExtAuthz, &str),
    mut allowed: Allowed,
    parts: &mut Parts,
) -> super::Verdict {
    note(exchange, allowed.metadata.take());
    if !authz.restrict(&mut allowed) {
        authz.count_invalid(exchange.conn.worker.id);
        return unusable(exchange, authz, name);
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
    Ok(Passed::rerouted_if(authz.clear_route && changed))
}

/// The answer to a request that the service denies.
fn deny(exchange: &mut Exchange, denied: Denied) -> LocalReply {
    note(exchange, denied.metadata);
    let mut reply = refusal(denied.status, "ext_authz_denied");
    ext_authz::apply_denied(&denied.headers, &mut reply.headers);
    reply.headers.remove(header::CONTENT_LENGTH);
    reply.body = denied.body;
    reply
}

/// The answer asks for what must not or cannot be done.
fn unusable(exchange: &mut Exchange, authz: &ExtAuthz, name: &str) -> super::Verdict {
    let status = StatusCode::INTERNAL_SERVER_ERROR;
    if !authz.shadow {
        return Err(refusal(status, "ext_authz_invalid"));
    }
    authz.count_shadow_error(exchange.conn.worker.id);
    keep(exchange, Decision::failed(status).report(name));
    Ok(Passed::On)
}

fn failed(error: &CallError) -> Verdict {
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

/// The content that the service is shown.
#[derive(Default)]
struct Content {
    bytes: Bytes,
    /// Bytes of it that have come.
    received: usize,
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
    let Some(inbound) = body else {
        return Ok(Content::default());
    };
    let content = |inbound: &Inbound, partial| Content {
        bytes: inbound.first_bytes(wanted.limit),
        received: inbound.held(),
        partial: Some(partial),
        raw: wanted.raw,
    };
    match inbound.read_ahead(wanted.limit, idle).await {
        Err(error) => Err(LocalReply::of_body(&error)),
        Ok(Ahead::Whole) if inbound.held() <= wanted.limit => Ok(content(inbound, false)),
        Ok(_) if wanted.partial => Ok(content(inbound, true)),
        Ok(_) => Err(too_large()),
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
    let set: Vec<(String, String)> = set
        .iter()
        .map(|(name, value)| (escaped(name), escaped(value)))
        .collect();
    let mut query = Query::of(&parts.uri, Names::AsSent);
    for (name, value) in &set {
        query.set(name, name, value);
    }
    for name in remove {
        query.remove(name);
    }
    // What the service sends may be no query; then the request goes on with its own.
    if let Some(uri) = query.target(parts.uri.path()) {
        parts.uri = uri;
    }
}
