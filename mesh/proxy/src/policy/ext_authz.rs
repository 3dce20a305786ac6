//! External authorisation: a service decides over gRPC or HTTP whether a request passes.
//!
//! This module says what is asked and what the answer means; asking is the worker's part.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderName, HeaderValue, Request, StatusCode, Uri, header};
use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::envoy::extensions::filters::http::ext_authz::v3 as filter;
use serin_xds::pb::envoy::service::auth::v3 as auth;
use serin_xds::pb::envoy::r#type::matcher::v3 as matcher;
use serin_xds::pb::google::protobuf as google;

use super::facts::Facts;
use super::local_rate_limit::denial_status;
use super::metadata::{Metadata, MetadataMatch};
use super::service::{GrpcTarget, HttpTarget, header_pair};
use super::stats::Counter;
use crate::config::convert::{self, Fraction};
use crate::config::matchers::StringMatch;
use crate::config::route::Context;
use crate::error::{Refusal, Within};

/// The method that is called.
pub const PATH: &str = "/envoy.service.auth.v3.Authorization/Check";
/// Namespace of what a service tells.
pub const NAMESPACE: &str = "envoy.filters.http.ext_authz";
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
    pub enabled: Fraction,
    /// It is asked only for requests with such metadata.
    pub enabled_metadata: Option<MetadataMatch>,
    /// Requests for which it is not asked are denied.
    pub deny_at_disable: bool,
    allowed: Option<Box<[StringMatch]>>,
    disallowed: Box<[StringMatch]>,
    namespaces: Box<[Box<str>]>,
    counters: Counters,
}

#[derive(Debug)]
struct Counters {
    ok: Arc<Counter>,
    denied: Arc<Counter>,
    error: Arc<Counter>,
    failure_allowed: Arc<Counter>,
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

/// A compiled `HttpService`.
#[derive(Debug)]
pub struct HttpService {
    /// Where it is.
    pub target: HttpTarget,
    prefix: Box<str>,
    path: Option<Box<str>>,
    request: Option<Box<[StringMatch]>>,
    add: Box<[(HeaderName, HeaderValue)]>,
    upstream: Box<[StringMatch]>,
    upstream_append: Box<[StringMatch]>,
    client: Option<Box<[StringMatch]>>,
    client_on_success: Box<[StringMatch]>,
    metadata: Box<[StringMatch]>,
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

/// How a field is set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    /// In place of what was there.
    Set,
    /// Beside what was there.
    Append,
    /// Where nothing was there.
    IfAbsent,
    /// Where something was there.
    IfPresent,
}

/// A field to be set.
pub type Field = (HeaderName, HeaderValue, How);

/// What the service said.
#[derive(Debug)]
pub enum Verdict {
    /// The request passes.
    Allowed(Box<Allowed>),
    /// It is answered with this.
    Denied(Box<Denied>),
    /// The service failed.
    Failed,
}

/// Changes to a request that passes.
#[derive(Debug, Default)]
pub struct Allowed {
    /// Fields of the request.
    pub set: Vec<Field>,
    /// Fields taken off the request.
    pub remove: Vec<HeaderName>,
    /// Fields of the response.
    pub response: Vec<Field>,
    /// Query parameters to set.
    pub query_set: Vec<(String, String)>,
    /// Query parameters to remove.
    pub query_remove: Vec<String>,
    /// For later filters.
    pub metadata: Option<google::Struct>,
}

/// The answer to a request that does not pass.
#[derive(Debug)]
pub struct Denied {
    /// Status.
    pub status: StatusCode,
    /// Fields.
    pub headers: Vec<Field>,
    /// Body.
    pub body: Bytes,
    /// For the access log.
    pub metadata: Option<google::Struct>,
}

fn matchers(
    from: Option<&matcher::ListStringMatcher>,
    field: &str,
) -> Result<Option<Box<[StringMatch]>>, Refusal> {
    from.map(|list| {
        list.patterns
            .iter()
            .enumerate()
            .map(|(index, pattern)| {
                StringMatch::compile(pattern).within(format!("{field}.patterns[{index}]"))
            })
            .collect()
    })
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

impl HttpService {
    fn compile(from: &filter::HttpService, context: &mut Context<'_>) -> Result<Self, Refusal> {
        let request = from.authorization_request.as_ref();
        let response = from.authorization_response.as_ref();
        let of_response = |list: Option<&matcher::ListStringMatcher>, field: &str| {
            matchers(list, field).within("authorization_response")
        };
        if !from.path_prefix.is_empty() && !from.path_override.is_empty() {
            return Err(Refusal::new(
                "path_override",
                "cannot be combined with path_prefix",
            ));
        }
        Ok(Self {
            target: HttpTarget::compile(from.server_uri.as_ref(), context).within("server_uri")?,
            prefix: from.path_prefix.as_str().into(),
            path: (!from.path_override.is_empty()).then(|| from.path_override.as_str().into()),
            request: matchers(
                request.and_then(|request| request.allowed_headers.as_ref()),
                "allowed_headers",
            )
            .within("authorization_request")?,
            add: request
                .into_iter()
                .flat_map(|request| &request.headers_to_add)
                .map(header_pair)
                .collect::<Result<_, _>>()
                .within("authorization_request.headers_to_add")?,
            upstream: of_response(
                response.and_then(|response| response.allowed_upstream_headers.as_ref()),
                "allowed_upstream_headers",
            )?
            .unwrap_or_default(),
            upstream_append: of_response(
                response.and_then(|response| response.allowed_upstream_headers_to_append.as_ref()),
                "allowed_upstream_headers_to_append",
            )?
            .unwrap_or_default(),
            client: of_response(
                response.and_then(|response| response.allowed_client_headers.as_ref()),
                "allowed_client_headers",
            )?,
            client_on_success: of_response(
                response.and_then(|response| response.allowed_client_headers_on_success.as_ref()),
                "allowed_client_headers_on_success",
            )?
            .unwrap_or_default(),
            metadata: of_response(
                response.and_then(|response| response.dynamic_metadata_from_headers.as_ref()),
                "dynamic_metadata_from_headers",
            )?
            .unwrap_or_default(),
        })
    }

    /// The request to the service; `allowed` and `disallowed` are the filter's lists.
    pub fn question(
        &self,
        facts: &Facts<'_>,
        body: Bytes,
        authz: &ExtAuthz,
        partial: Option<bool>,
    ) -> Option<Request<Bytes>> {
        let request = facts.request.as_ref()?;
        let path = match (&self.path, request.query) {
            (Some(path), _) => path.to_string(),
            (None, None) => format!("{}{}", self.prefix, request.path),
            (None, Some(query)) => format!("{}{}?{query}", self.prefix, request.path),
        };
        let mut out = Request::new(body);
        *out.method_mut() = request.method.parse().ok()?;
        *out.uri_mut() = Uri::from(path.parse::<PathAndQuery>().ok()?);
        let headers = out.headers_mut();
        for (name, value) in request.headers {
            let text = name.as_str();
            let wanted = match (&authz.allowed, &self.request) {
                (None, None) => false,
                (filter, own) => {
                    filter.as_deref().is_some_and(|list| any(list, text))
                        || own.as_deref().is_some_and(|list| any(list, text))
                }
            };
            let always = *name == header::AUTHORIZATION || *name == header::HOST;
            let framing = *name == header::CONTENT_LENGTH || *name == header::TRANSFER_ENCODING;
            if (wanted || always) && !framing && !any(&authz.disallowed, text) {
                headers.append(name.clone(), value.clone());
            }
        }
        headers
            .entry(header::HOST)
            .or_insert_with(|| self.target.authority.clone());
        for (name, value) in &self.add {
            headers.insert(name, value.clone());
        }
        if let Some(partial) = partial {
            headers.insert(
                "x-envoy-auth-partial-body",
                HeaderValue::from_static(if partial { "true" } else { "false" }),
            );
        }
        if out.body().is_empty() && out.method() != http::Method::GET && out.method() != http::Method::HEAD {
            out.headers_mut()
                .insert(header::CONTENT_LENGTH, HeaderValue::from_static("0"));
        }
        Some(out)
    }

    /// What an answer means.
    pub fn read(&self, head: &http::response::Parts, body: Bytes) -> Verdict {
        let hop = |name: &HeaderName| {
            *name == header::CONNECTION
                || *name == header::TRANSFER_ENCODING
                || *name == header::CONTENT_LENGTH
        };
        let fields = |matchers: &[StringMatch], how: How| -> Vec<Field> {
            head.headers
                .iter()
                .filter(|(name, _)| !hop(name) && any(matchers, name.as_str()))
                .map(|(name, value)| (name.clone(), value.clone(), how))
                .collect()
        };
        if head.status == StatusCode::OK {
            let mut metadata = google::Struct::default();
            for (name, value) in &head.headers {
                if any(&self.metadata, name.as_str()) {
                    let text = String::from_utf8_lossy(value.as_bytes()).into_owned();
                    metadata
                        .fields
                        .insert(name.to_string(), super::metadata::text(text));
                }
            }
            let mut set = fields(&self.upstream, How::Set);
            set.extend(fields(&self.upstream_append, How::Append));
            return Verdict::Allowed(Box::new(Allowed {
                set,
                response: fields(&self.client_on_success, How::Set),
                metadata: (!metadata.fields.is_empty()).then_some(metadata),
                ..Default::default()
            }));
        }
        if head.status.is_server_error() {
            return Verdict::Failed;
        }
        let headers = head
            .headers
            .iter()
            .filter(|(name, _)| {
                let always = matches!(**name, header::WWW_AUTHENTICATE | header::LOCATION);
                !hop(name)
                    && self
                        .client
                        .as_deref()
                        .is_none_or(|list| always || any(list, name.as_str()))
            })
            .map(|(name, value)| (name.clone(), value.clone(), How::Append))
            .collect();
        Verdict::Denied(Box::new(Denied {
            status: head.status,
            headers,
            body,
            metadata: None,
        }))
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
        let unsupported = [
            ("validate_mutations", from.validate_mutations),
            (
                "decoder_header_mutation_rules",
                from.decoder_header_mutation_rules.is_some(),
            ),
            (
                "typed_metadata_context_namespaces",
                !from.typed_metadata_context_namespaces.is_empty(),
            ),
            (
                "route_metadata_context_namespaces",
                !from.route_metadata_context_namespaces.is_empty(),
            ),
            (
                "route_typed_metadata_context_namespaces",
                !from.route_typed_metadata_context_namespaces.is_empty(),
            ),
            ("include_peer_certificate", from.include_peer_certificate),
            ("include_tls_session", from.include_tls_session),
            ("encode_raw_headers", from.encode_raw_headers),
            (
                "bootstrap_metadata_labels_key",
                !from.bootstrap_metadata_labels_key.is_empty(),
            ),
            ("shadow_mode", from.shadow_mode),
        ];
        if let Some((field, _)) = unsupported.iter().find(|(_, present)| *present) {
            return Err(Refusal::new(*field, "not supported"));
        }
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
            status_on_error: denial_status(from.status_on_error.as_ref(), StatusCode::FORBIDDEN)?,
            clear_route: from.clear_route_cache,
            enabled: convert::runtime_fraction(from.filter_enabled.as_ref(), Fraction::ALL)
                .within("filter_enabled")?,
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
            counters: Counters {
                ok: counter("envoy_http_ext_authz_ok"),
                denied: counter("envoy_http_ext_authz_denied"),
                error: counter("envoy_http_ext_authz_error"),
                failure_allowed: counter("envoy_http_ext_authz_failure_mode_allowed"),
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

    /// Counts a verdict.
    pub fn count(&self, verdict: &Verdict, worker: usize) {
        match verdict {
            Verdict::Allowed(_) => self.counters.ok.add(worker),
            Verdict::Denied(_) => self.counters.denied.add(worker),
            Verdict::Failed => {
                self.counters.error.add(worker);
                if self.failure_allows {
                    self.counters.failure_allowed.add(worker);
                }
            }
        }
    }

    /// The question for a gRPC service.
    pub fn question(
        &self,
        facts: &Facts<'_>,
        scene: &CheckScene<'_>,
        body: Bytes,
        settings: BodySettings,
        partial: Option<bool>,
    ) -> auth::CheckRequest {
        use auth::attribute_context::{HttpRequest, Peer, Request};
        let address = |at: std::net::SocketAddr| {
            Some(core::Address {
                address: Some(core::address::Address::SocketAddress(core::SocketAddress {
                    address: at.ip().to_string(),
                    port_specifier: Some(core::socket_address::PortSpecifier::PortValue(u32::from(
                        at.port(),
                    ))),
                    ..Default::default()
                })),
            })
        };
        let request = facts.request.as_ref().map(|request| {
            let mut headers = self.header_map(request.headers);
            if let Some(partial) = partial {
                headers.insert("x-envoy-auth-partial-body".into(), partial.to_string());
            }
            for (name, value) in [
                (":method", request.method),
                (":authority", request.authority),
                (":scheme", request.scheme),
                (":path", scene.path),
            ] {
                if self.passes(name) {
                    headers.insert(name.into(), value.into());
                }
            }
            HttpRequest {
                id: scene.id.to_owned(),
                method: request.method.into(),
                headers,
                path: scene.path.to_owned(),
                host: request.authority.into(),
                scheme: request.scheme.into(),
                size: scene.size,
                protocol: scene.protocol.into(),
                body: if settings.raw {
                    String::new()
                } else {
                    String::from_utf8_lossy(&body).into_owned()
                },
                raw_body: if settings.raw { body.to_vec() } else { Vec::new() },
                ..Default::default()
            }
        });
        let metadata: HashMap<String, google::Struct> = self
            .namespaces
            .iter()
            .filter_map(|name| Some((name.to_string(), facts.metadata.get(name)?.clone())))
            .collect();
        auth::CheckRequest {
            attributes: Some(auth::AttributeContext {
                source: Some(Peer {
                    address: address(std::net::SocketAddr::new(
                        facts.remote(),
                        facts.direct_remote.port(),
                    )),
                    principal: facts.peer.map_or("", |peer| peer.principal()).to_owned(),
                    ..Default::default()
                }),
                destination: Some(Peer {
                    address: address(facts.local),
                    ..Default::default()
                }),
                request: Some(Request {
                    time: Some(google::Timestamp {
                        seconds: scene.time.as_secs() as i64,
                        nanos: scene.time.subsec_nanos() as i32,
                    }),
                    http: request,
                }),
                context_extensions: scene.extensions.cloned().unwrap_or_default(),
                metadata_context: Some(core::Metadata {
                    filter_metadata: metadata,
                    ..Default::default()
                }),
                ..Default::default()
            }),
        }
    }

    fn passes(&self, name: &str) -> bool {
        self.allowed.as_deref().is_none_or(|list| any(list, name)) && !any(&self.disallowed, name)
    }

    /// Fields by name; values of repeated ones are joined with commas.
    fn header_map(&self, headers: &HeaderMap) -> HashMap<String, String> {
        let mut out: HashMap<String, String> = HashMap::with_capacity(headers.len() + 4);
        for (name, value) in headers {
            if *name == header::HOST || !self.passes(name.as_str()) {
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

/// What a question says beside the facts.
#[derive(Clone, Copy, Debug)]
pub struct CheckScene<'a> {
    /// Path with query.
    pub path: &'a str,
    /// `x-request-id`.
    pub id: &'a str,
    /// `HTTP/1.1` and so on.
    pub protocol: &'a str,
    /// Bytes of the body as the client announced them, or -1.
    pub size: i64,
    /// Since 1970.
    pub time: Duration,
    /// The route's `context_extensions`.
    pub extensions: Option<&'a HashMap<String, String>>,
}

fn field(from: &core::HeaderValueOption) -> Option<Field> {
    use core::header_value_option::HeaderAppendAction;
    let (name, value) = header_pair(from.header.as_ref()?).ok()?;
    let how = match (&from.append, HeaderAppendAction::try_from(from.append_action)) {
        (Some(append), _) if append.value => How::Append,
        (Some(_), _) => How::Set,
        // In this API a field without any of the two is set, unlike in routes.
        (None, Ok(HeaderAppendAction::AppendIfExistsOrAdd)) => How::Set,
        (None, Ok(HeaderAppendAction::AddIfAbsent)) => How::IfAbsent,
        (None, Ok(HeaderAppendAction::OverwriteIfExists)) => How::IfPresent,
        (None, _) => How::Set,
    };
    Some((name, value, how))
}

/// What the answer of a gRPC service means. Fields that are none are left out.
pub fn read_grpc(from: auth::CheckResponse) -> Verdict {
    use auth::check_response::HttpResponse;
    let code = from.status.as_ref().map_or(0, |status| status.code);
    let fields = |list: &[core::HeaderValueOption]| list.iter().filter_map(field).collect();
    match from.http_response {
        Some(HttpResponse::OkResponse(ok)) if code == 0 => Verdict::Allowed(Box::new(Allowed {
            set: fields(&ok.headers),
            remove: ok
                .headers_to_remove
                .iter()
                .filter_map(|name| HeaderName::from_bytes(name.as_bytes()).ok())
                .filter(|name| *name != header::HOST)
                .collect(),
            response: fields(&ok.response_headers_to_add),
            query_set: ok
                .query_parameters_to_set
                .into_iter()
                .map(|parameter| (parameter.key, parameter.value))
                .collect(),
            query_remove: ok.query_parameters_to_remove,
            metadata: from.dynamic_metadata.or(ok.dynamic_metadata),
        })),
        _ if code == 0 => Verdict::Allowed(Box::new(Allowed {
            metadata: from.dynamic_metadata,
            ..Default::default()
        })),
        Some(HttpResponse::ErrorResponse(_)) => Verdict::Failed,
        other => {
            let denied = match other {
                Some(HttpResponse::DeniedResponse(denied)) => denied,
                _ => auth::DeniedHttpResponse::default(),
            };
            let status = denied
                .status
                .as_ref()
                .and_then(|status| u16::try_from(status.code).ok())
                .and_then(|code| StatusCode::from_u16(code).ok())
                .unwrap_or(StatusCode::FORBIDDEN);
            Verdict::Denied(Box::new(Denied {
                status,
                headers: fields(&denied.headers),
                body: denied.body.into(),
                metadata: from.dynamic_metadata,
            }))
        }
    }
}

/// Sets fields.
pub fn apply(fields: &[Field], headers: &mut HeaderMap) {
    for (name, value, how) in fields {
        match how {
            How::Set => {
                headers.insert(name, value.clone());
            }
            How::Append => {
                headers.append(name, value.clone());
            }
            How::IfAbsent => {
                headers.entry(name).or_insert_with(|| value.clone());
            }
            How::IfPresent => {
                if headers.contains_key(name) {
                    headers.insert(name, value.clone());
                }
            }
        }
    }
}
