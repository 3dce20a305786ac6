//! External authorisation: a service decides over gRPC or HTTP whether a request passes.
//!
//! This module says what is asked and what the answer means; asking is the worker's part.

mod answer;
mod http_service;
mod shadow;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, StatusCode, header};
use rustls_pki_types::CertificateDer;
use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::envoy::extensions::filters::http::ext_authz::v3 as filter;
use serin_xds::pb::envoy::service::auth::v3 as auth;
use serin_xds::pb::envoy::r#type::matcher::v3 as matcher;
use serin_xds::pb::google::protobuf as google;

use super::facts::Facts;
use super::metadata::{Metadata, MetadataMatch};
use super::mutation_rules::MutationRules;
use super::service::GrpcTarget;
use super::stats::Counter;
use crate::config::client_cert::encoded;
use crate::config::convert::{self, Fraction, each, refuse_present};
use crate::config::matchers::StringMatch;
use crate::config::route::Context;
use crate::config::runtime::RuntimeFraction;
use crate::error::{Refusal, Within};

pub use answer::{Allowed, Denied, Field, How, Verdict, apply, apply_denied, is_valid, read_grpc};
pub use http_service::HttpService;
pub use shadow::{Asked, Decision};

/// The method that is called.
pub const PATH: &str = "/envoy.service.auth.v3.Authorization/Check";
/// Namespace of what a service tells.
pub const NAMESPACE: &str = "envoy.filters.http.ext_authz";
/// Says whether the body of a question is a part of the request's.
pub(super) const PARTIAL_BODY: &str = "x-envoy-auth-partial-body";
/// Envoy's limit of a call.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_millis(200);

/// The compiled filter.
#[derive(Debug)]
pub struct ExtAuthz {
    /// Whom to ask.
    pub service: Service,
    /// How much of the body is sent.
    pub body: Option<BodySettings>,
    /// A failing service lets requests through.
    pub failure_allows: bool,
    /// Such requests are marked.
    pub failure_marks: bool,
    /// Status when the service fails and that denies.
    pub status_on_error: StatusCode,
    /// The route is searched again after the service changed fields.
    pub clear_route: bool,
    /// Share of requests for which the service is asked.
    pub enabled: RuntimeFraction,
    /// It is asked only for requests with such metadata.
    pub enabled_metadata: Option<MetadataMatch>,
    /// Requests for which it is not asked are denied.
    pub deny_at_disable: bool,
    allowed: Option<Box<[StringMatch]>>,
    disallowed: Box<[StringMatch]>,
    namespaces: Box<[Box<str>]>,
    /// The same of what is noted of routes.
    route_namespaces: Box<[Box<str>]>,
    /// What of a request the service may change; anything without them.
    rules: Option<MutationRules>,
    /// Changes that are none make the answer one that must not be used.
    pub validates: bool,
    tells_certificate: bool,
    tells_session: bool,
    raw_headers: bool,
    /// Requests pass whatever the service says.
    pub shadow: bool,
    /// How it was asked is kept.
    pub reports: bool,
    counters: Counters,
}

#[derive(Debug)]
struct Counters {
    invalid: Arc<Counter>,
    ok: Arc<Counter>,
    denied: Arc<Counter>,
    error: Arc<Counter>,
    failure_allowed: Arc<Counter>,
    shadow_denied: Arc<Counter>,
    shadow_error: Arc<Counter>,
    disabled: Arc<Counter>,
}

/// Whom to ask.
#[derive(Debug)]
pub enum Service {
    /// `envoy.service.auth.v3.Authorization`.
    Grpc(GrpcTarget),
    /// An HTTP server: 200 allows, everything else denies.
    Http(Box<HttpService>),
}

/// `with_request_body`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BodySettings {
    /// Bytes at most.
    pub limit: usize,
    /// Longer bodies are sent in part, instead of refused with 413.
    pub partial: bool,
    /// As bytes instead of as text.
    pub raw: bool,
}

/// What a route says (`ExtAuthzPerRoute`).
#[derive(Debug)]
pub enum PerRouteAuthz {
    /// Nobody is asked.
    Disabled,
    /// It is asked like this.
    Settings(Box<Settings>),
}

/// `CheckSettings`.
#[derive(Debug, Default)]
pub struct Settings {
    /// For the service.
    pub extensions: HashMap<String, String>,
    /// The body is not sent.
    pub no_body: bool,
    /// Or sent like this.
    pub body: Option<BodySettings>,
    /// Another service.
    pub service: Option<Service>,
}

/// Matchers of names.
pub(super) fn matchers(
    from: Option<&matcher::ListStringMatcher>,
    field: &str,
) -> Result<Option<Box<[StringMatch]>>, Refusal> {
    from.map(|list| each(&list.patterns, &format!("{field}.patterns"), StringMatch::compile))
        .transpose()
}

fn any(matchers: &[StringMatch], name: &str) -> bool {
    matchers.iter().any(|matcher| matcher.matches(name))
}

impl BodySettings {
    fn compile(from: &filter::BufferSettings) -> Result<Self, Refusal> {
        if from.max_request_bytes == 0 {
            return Err(Refusal::new("max_request_bytes", "must be above zero"));
        }
        Ok(Self {
            limit: from.max_request_bytes as usize,
            partial: from.allow_partial_message,
            raw: from.pack_as_bytes,
        })
    }
}

impl Service {
    fn grpc(from: &core::GrpcService, context: &mut Context<'_>) -> Result<Self, Refusal> {
        GrpcTarget::compile(Some(from), context)
            .map(Self::Grpc)
            .within("grpc_service")
    }

    fn http(from: &filter::HttpService, context: &mut Context<'_>) -> Result<Self, Refusal> {
        HttpService::compile(from, context)
            .map(|service| Self::Http(Box::new(service)))
            .within("http_service")
    }
}

impl PerRouteAuthz {
    /// Compiles the message.
    pub(crate) fn compile(
        from: &filter::ExtAuthzPerRoute,
        context: &mut Context<'_>,
    ) -> Result<Self, Refusal> {
        use filter::ext_authz_per_route::Override;
        match &from.r#override {
            Some(Override::Disabled(true)) => Ok(Self::Disabled),
            Some(Override::Disabled(false)) => Err(Refusal::new("disabled", "must be true")),
            Some(Override::CheckSettings(settings)) => {
                use filter::check_settings::ServiceOverride;
                let service = match &settings.service_override {
                    None => None,
                    Some(ServiceOverride::GrpcService(service)) => Some(Service::grpc(service, context)?),
                    Some(ServiceOverride::HttpService(service)) => Some(Service::http(service, context)?),
                };
                Ok(Self::Settings(Box::new(Settings {
                    extensions: settings.context_extensions.clone().into_iter().collect(),
                    no_body: settings.disable_request_body_buffering,
                    body: settings
                        .with_request_body
                        .as_ref()
                        .map(BodySettings::compile)
                        .transpose()
                        .within("check_settings.with_request_body")?,
                    service,
                })))
            }
            None => Err(Refusal::new("override", "is missing")),
        }
    }
}

impl ExtAuthz {
    /// Compiles the message.
    pub(crate) fn compile(
        from: &filter::ExtAuthz,
        prefix: &str,
        context: &mut Context<'_>,
    ) -> Result<Self, Refusal> {
        refuse_present(
            &[
                (
                    "typed_metadata_context_namespaces",
                    !from.typed_metadata_context_namespaces.is_empty(),
                ),
                (
                    "route_typed_metadata_context_namespaces",
                    !from.route_typed_metadata_context_namespaces.is_empty(),
                ),
                (
                    "bootstrap_metadata_labels_key",
                    !from.bootstrap_metadata_labels_key.is_empty(),
                ),
                (
                    "enable_dynamic_metadata_ingestion",
                    from.enable_dynamic_metadata_ingestion
                        .as_ref()
                        .is_some_and(|value| !value.value),
                ),
            ],
            "not supported",
        )?;
        let service = match &from.services {
            Some(filter::ext_authz::Services::GrpcService(service)) => Service::grpc(service, context)?,
            Some(filter::ext_authz::Services::HttpService(service)) => Service::http(service, context)?,
            None => {
                return Err(Refusal::new(
                    "services",
                    "grpc_service or http_service is missing",
                ));
            }
        };
        let enabled = context
            .slots
            .runtime
            .fraction(from.filter_enabled.as_ref(), Fraction::ALL)
            .within("filter_enabled")?;
        let (workers, registry) = context.counters();
        let labels = [
            ("envoy_http_conn_manager_prefix", prefix),
            ("prefix", from.stat_prefix.as_str()),
        ];
        let mut counter = |name| registry.counter(workers, name, &labels);
        Ok(Self {
            service,
            body: from
                .with_request_body
                .as_ref()
                .map(BodySettings::compile)
                .transpose()
                .within("with_request_body")?,
            failure_allows: from.failure_mode_allow,
            failure_marks: from.failure_mode_allow_header_add,
            status_on_error: from
                .status_on_error
                .as_ref()
                .map(convert::status_code)
                .transpose()
                .within("status_on_error")?
                .unwrap_or(StatusCode::FORBIDDEN),
            clear_route: from.clear_route_cache,
            enabled,
            enabled_metadata: from
                .filter_enabled_metadata
                .as_ref()
                .map(MetadataMatch::compile)
                .transpose()
                .within("filter_enabled_metadata")?,
            deny_at_disable: from
                .deny_at_disable
                .as_ref()
                .and_then(|flag| flag.default_value.as_ref())
                .is_some_and(|value| value.value),
            allowed: matchers(from.allowed_headers.as_ref(), "allowed_headers")?,
            disallowed: matchers(from.disallowed_headers.as_ref(), "disallowed_headers")?.unwrap_or_default(),
            namespaces: from
                .metadata_context_namespaces
                .iter()
                .map(|name| name.as_str().into())
                .collect(),
            route_namespaces: from
                .route_metadata_context_namespaces
                .iter()
                .map(|name| name.as_str().into())
                .collect(),
            rules: from
                .decoder_header_mutation_rules
                .as_ref()
                .map(|rules| MutationRules::compile(Some(rules)))
                .transpose()
                .within("decoder_header_mutation_rules")?,
            validates: from.validate_mutations,
            tells_certificate: from.include_peer_certificate,
            tells_session: from.include_tls_session,
            raw_headers: from.encode_raw_headers,
            shadow: from.shadow_mode,
            reports: from.emit_filter_state_stats,
            counters: Counters {
                invalid: counter("envoy_http_ext_authz_invalid"),
                ok: counter("envoy_http_ext_authz_ok"),
                denied: counter("envoy_http_ext_authz_denied"),
                error: counter("envoy_http_ext_authz_error"),
                failure_allowed: counter("envoy_http_ext_authz_failure_mode_allowed"),
                shadow_denied: counter("envoy_http_ext_authz_shadow_denied"),
                shadow_error: counter("envoy_http_ext_authz_shadow_error"),
                disabled: counter("envoy_http_ext_authz_disabled"),
            },
        })
    }

    /// Whether the service is asked about a request.
    pub fn applies(&self, metadata: &Metadata, random: u64, worker: usize) -> bool {
        let applies = self.enabled.hit(random)
            && self
                .enabled_metadata
                .as_ref()
                .is_none_or(|matcher| matcher.matches(metadata));
        if !applies {
            self.counters.disabled.add(worker);
        }
        applies
    }

    /// Leaves out, of the changes to a request, those that the rules do not allow. `false` if that makes the answer one that
    /// must not be used.
    pub fn restrict(&self, allowed: &mut Allowed) -> bool {
        let Some(rules) = &self.rules else { return true };
        let count = |allowed: &Allowed| {
            allowed.set.len() + allowed.remove.len() + usize::from(allowed.path.is_some())
        };
        let before = count(allowed);
        allowed.set.retain(|(name, ..)| rules.allows(name.as_str()));
        allowed.remove.retain(|name| rules.allows_removal(name));
        allowed.path = allowed.path.take().filter(|_| rules.allows(":path"));
        !rules.is_error || (before == count(allowed) && !allowed.removes_needed)
    }

    /// Counts an answer that must not be used.
    pub fn count_invalid(&self, worker: usize) {
        self.counters.invalid.add(worker);
    }

    /// Counts a verdict.
    pub fn count(&self, verdict: &Verdict, worker: usize) {
        match verdict {
            Verdict::Allowed(_) => self.counters.ok.add(worker),
            Verdict::Denied(_) => self.counters.denied.add(worker),
            Verdict::Failed => {
                self.counters.error.add(worker);
                if self.failure_allows && !self.shadow {
                    self.counters.failure_allowed.add(worker);
                }
            }
        }
    }

    /// Counts a request that has passed although the service denied it.
    pub fn count_shadow_denied(&self, worker: usize) {
        self.counters.shadow_denied.add(worker);
    }

    /// Counts a request that has passed although the service failed.
    pub fn count_shadow_error(&self, worker: usize) {
        self.counters.shadow_error.add(worker);
    }

    /// How much of a request's body the service is shown, where its route says this.
    pub fn wanted_body(&self, of_route: Option<&Settings>) -> Option<BodySettings> {
        match of_route {
            Some(settings) if settings.no_body => None,
            Some(settings) => settings.body.or(self.body),
            None => self.body,
        }
    }

    /// The question for a gRPC service. `raw` content goes as bytes and not as text; `partial` says whether there is more
    /// of it.
    pub fn question(
        &self,
        facts: &Facts<'_>,
        scene: &CheckScene<'_>,
        body: Bytes,
        raw: bool,
        partial: Option<bool>,
    ) -> auth::CheckRequest {
        use auth::attribute_context::{HttpRequest, Peer, Request};
        let request = facts.request.as_ref().map(|request| {
            let system = [
                (":method", request.method),
                (":authority", request.authority()),
                (":scheme", request.scheme()),
                (":path", scene.path),
            ];
            let partial = partial.map(|partial| partial.to_string());
            let (mut headers, mut raw_headers) = (HashMap::new(), None);
            if self.raw_headers {
                raw_headers = Some(self.raw_map(&system, request.headers, partial.as_deref()));
            } else {
                headers = self.header_map(request.headers);
                if let Some(partial) = partial {
                    headers.insert(PARTIAL_BODY.into(), partial);
                }
                for (name, value) in system {
                    if self.passes(name) {
                        headers.insert(name.into(), value.into());
                    }
                }
            }
            HttpRequest {
                id: scene.id.to_owned(),
                method: request.method.into(),
                headers,
                header_map: raw_headers,
                path: scene.path.to_owned(),
                host: request.authority().into(),
                scheme: request.scheme().into(),
                size: scene.size,
                protocol: scene.protocol.into(),
                body: if raw {
                    String::new()
                } else {
                    String::from_utf8_lossy(&body).into_owned()
                },
                raw_body: if raw { body.to_vec() } else { Vec::new() },
                ..Default::default()
            }
        });
        let told = |names: &[Box<str>], metadata: &Metadata| -> HashMap<String, google::Struct> {
            let each = names.iter();
            each.filter_map(|name| Some((name.to_string(), metadata.get(name)?.clone())))
                .collect()
        };
        let metadata = told(&self.namespaces, facts.metadata);
        let of_route = match scene.route {
            Some(noted) => told(&self.route_namespaces, noted),
            None => HashMap::new(),
        };
        auth::CheckRequest {
            attributes: Some(auth::AttributeContext {
                source: Some(Peer {
                    // Who is connected, whoever that asks for (Envoy).
                    address: convert::address_of(facts.source),
                    principal: facts.peer.map_or("", |peer| peer.principal()).to_owned(),
                    certificate: scene
                        .certificate
                        .filter(|_| self.tells_certificate)
                        .map_or_else(String::new, |der| encoded(std::slice::from_ref(der))),
                    ..Default::default()
                }),
                destination: Some(Peer {
                    address: convert::address_of(facts.local),
                    principal: scene.own_principal.unwrap_or("").to_owned(),
                    ..Default::default()
                }),
                request: Some(Request {
                    time: Some(google::Timestamp {
                        seconds: scene.time.as_secs() as i64,
                        nanos: scene.time.subsec_nanos() as i32,
                    }),
                    http: request,
                }),
                tls_session: scene
                    .session
                    .filter(|_| self.tells_session)
                    .map(|sni| auth::attribute_context::TlsSession { sni: sni.to_owned() }),
                context_extensions: scene.extensions.cloned().unwrap_or_default(),
                metadata_context: Some(core::Metadata {
                    filter_metadata: metadata,
                    ..Default::default()
                }),
                route_metadata_context: Some(core::Metadata {
                    filter_metadata: of_route,
                    ..Default::default()
                }),
            }),
        }
    }

    fn passes(&self, name: &str) -> bool {
        self.allowed.as_deref().is_none_or(|list| any(list, name)) && !any(&self.disallowed, name)
    }

    /// Fields as they came, each by itself.
    fn raw_map(
        &self,
        system: &[(&str, &str)],
        headers: &HeaderMap,
        partial: Option<&str>,
    ) -> core::HeaderMap {
        let partial = partial.map(|text| (PARTIAL_BODY, text.as_bytes()));
        let own = system.iter().map(|(name, value)| (*name, value.as_bytes()));
        let fields = headers
            .iter()
            .filter(|(name, _)| !is_ours(name))
            .map(|(name, value)| (name.as_str(), value.as_bytes()));
        core::HeaderMap {
            headers: own
                .chain(fields)
                .filter(|(name, _)| self.passes(name))
                .chain(partial)
                .map(|(name, value)| core::HeaderValue {
                    key: name.to_owned(),
                    raw_value: value.to_vec(),
                    ..Default::default()
                })
                .collect(),
        }
    }

    /// Fields by name; values of repeated ones are joined with commas.
    fn header_map(&self, headers: &HeaderMap) -> HashMap<String, String> {
        let mut out: HashMap<String, String> = HashMap::with_capacity(headers.len() + 4);
        for (name, value) in headers {
            if is_ours(name) || !self.passes(name.as_str()) {
                continue;
            }
            let text = String::from_utf8_lossy(value.as_bytes());
            out.entry(name.as_str().to_owned())
                .and_modify(|old| {
                    old.push(',');
                    old.push_str(&text);
                })
                .or_insert_with(|| text.into_owned());
        }
        out
    }
}

/// Whether the question says that itself; what the client says of it would be taken for ours.
fn is_ours(name: &http::HeaderName) -> bool {
    *name == header::HOST || name.as_str() == PARTIAL_BODY
}

/// What a question says beside the facts.
#[derive(Clone, Copy, Debug)]
pub struct CheckScene<'a> {
    /// What is noted of the request's route.
    pub route: Option<&'a Metadata>,
    /// Path with query.
    pub path: &'a str,
    /// `x-request-id`.
    pub id: &'a str,
    /// `HTTP/1.1` and so on.
    pub protocol: &'a str,
    /// Bytes of the body that have come.
    pub size: i64,
    /// Who we are on the client's connection.
    pub own_principal: Option<&'a str>,
    /// Since 1970.
    pub time: Duration,
    /// The client's certificate.
    pub certificate: Option<&'a CertificateDer<'static>>,
    /// Server name of the client's TLS session, empty if it gave none; `None` without TLS.
    pub session: Option<&'a str>,
    /// The route's `context_extensions`.
    pub extensions: Option<&'a HashMap<String, String>>,
}
