//! External processing, header modes: a service sees the heads of request and response and may change them, or answer.
//!
//! This module says what is sent and what the answers mean; the stream is the worker's part. Bodies and trailers are
//! never sent: modes that ask for that are refused. Responses that the proxy makes itself are shown like any other, also
//! where an earlier filter answered before the request came here (Envoy's rule); those that the service has made are not.

mod namespaces;

use std::sync::Arc;
use std::time::Duration;

use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::envoy::extensions::filters::http::ext_proc::v3 as filter;
use serin_xds::pb::envoy::service::ext_proc::v3 as service;
use serin_xds::pb::google::protobuf as google;

use self::namespaces::taken;
use super::cel::{Attribute, Value};
use super::ext_authz::{Field, field, matchers};
use super::metadata::Metadata;
use super::mutation_rules::MutationRules;
use super::service::{GrpcTarget, header_pair};
use super::stats::Counter;
use crate::config::convert;
use crate::config::matchers::StringMatch;
use crate::config::route::Context;
use crate::error::{Refusal, Within};

pub use self::namespaces::Namespaces;

/// The method that is called.
pub const PATH: &str = "/envoy.service.ext_proc.v3.ExternalProcessor/Process";
/// Envoy's limit for each message.
const DEFAULT_TIMEOUT: Duration = Duration::from_millis(200);

/// Envoy's time for which a stream that observes stays open after its request.
const DEFAULT_CLOSE: Duration = Duration::from_secs(5);
/// Under this name attributes are sent.
const NAME: &str = "envoy.filters.http.ext_proc";

/// A mode without its request's head, which has been sent when a mode is overridden.
fn of_response(mode: filter::ProcessingMode) -> filter::ProcessingMode {
    filter::ProcessingMode {
        request_header_mode: 0,
        ..mode
    }
}

/// Attributes by name, of those that are known in time.
fn attributes(
    names: &[String],
    known: impl Fn(Attribute, bool) -> bool,
) -> Result<Box<[(Box<str>, Attribute)]>, Refusal> {
    names
        .iter()
        .map(|name| match Attribute::find(name) {
            Some((attribute, at_end)) if known(attribute, at_end) => Ok((name.as_str().into(), attribute)),
            _ => Err(Refusal::new("", format!("{name} is not known here"))),
        })
        .collect()
}

/// The values of attributes that are there.
pub fn told<'a>(
    wanted: &[(Box<str>, Attribute)],
    mut value: impl FnMut(Attribute) -> Option<Value<'a>>,
) -> google::Struct {
    use google::value::Kind;
    let fields = wanted.iter().filter_map(|(name, attribute)| {
        let kind = match value(*attribute)? {
            Value::Text(text) => Kind::StringValue(text.into_owned()),
            Value::Int(number) => Kind::NumberValue(number as f64),
            Value::Uint(number) => Kind::NumberValue(number as f64),
            Value::Bool(value) => Kind::BoolValue(value),
            _ => return None,
        };
        Some((name.to_string(), google::Value { kind: Some(kind) }))
    });
    google::Struct {
        fields: fields.collect(),
    }
}

/// Which heads are sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mode {
    /// Of requests.
    pub request: bool,
    /// Of responses.
    pub response: bool,
}

/// Whether the route is searched again after the service changed a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum RouteCache {
    AsAsked,
    Clear,
    Retain,
}

/// The compiled filter.
#[derive(Debug)]
pub struct ExtProc {
    /// Whom to ask.
    pub target: GrpcTarget,
    /// What it sees.
    pub mode: Mode,
    /// A failing service lets messages through.
    pub failure_allows: bool,
    /// Limit for each message.
    pub timeout: Duration,
    status_on_error: Option<StatusCode>,
    rules: MutationRules,
    allowed: Option<Box<[StringMatch]>>,
    disallowed: Box<[StringMatch]>,
    no_immediate: bool,
    route: RouteCache,
    /// What the service may ask for at most, once for each message; `None` if it may not ask.
    max_timeout: Option<Duration>,
    /// Metadata that it is told, and that it may set.
    pub namespaces: Arc<Namespaces>,
    /// The service may say what it wants to see of the response; if not empty, only one of these.
    mode_override: Option<Box<[filter::ProcessingMode]>>,
    /// Nobody waits for answers, and none changes anything; streams end that long after their request.
    pub observing: Option<Duration>,
    /// Streams that are open only because they observe.
    pub observed: std::sync::atomic::AtomicUsize,
    /// What is told of requests beside their heads.
    pub request_attributes: Box<[(Box<str>, Attribute)]>,
    /// What is told of responses beside their heads.
    pub response_attributes: Box<[(Box<str>, Attribute)]>,
    /// What happened.
    pub counters: Counters,
}

/// Envoy's counters of the filter.
#[derive(Debug)]
#[allow(missing_docs)] // Envoy's names
pub struct Counters {
    pub streams_started: Arc<Counter>,
    pub streams_failed: Arc<Counter>,
    pub messages_sent: Arc<Counter>,
    pub messages_received: Arc<Counter>,
    pub spurious_messages: Arc<Counter>,
    pub failure_allowed: Arc<Counter>,
    pub timeouts: Arc<Counter>,
    pub rejected_mutations: Arc<Counter>,
    pub overridden_timeouts: Arc<Counter>,
    pub ignored_overrides: Arc<Counter>,
}

/// What a route says (`ExtProcPerRoute`).
#[derive(Debug)]
pub enum PerRouteProc {
    /// Nobody is asked.
    Disabled,
    /// It is asked like this.
    Settings {
        /// What it sees.
        mode: Option<Mode>,
        /// Another service.
        target: Option<Box<GrpcTarget>>,
        /// Another failure mode.
        failure_allows: Option<bool>,
        /// Other metadata.
        namespaces: Option<Arc<Namespaces>>,
        /// Fields of its calls, in place of those of the same name.
        fields: Box<[(HeaderName, HeaderValue)]>,
    },
}

impl Mode {
    fn compile(from: Option<&filter::ProcessingMode>) -> Result<Self, Refusal> {
        let from = from.copied().unwrap_or_default();
        for (field, mode) in [
            ("request_body_mode", from.request_body_mode),
            ("response_body_mode", from.response_body_mode),
        ] {
            if mode != filter::processing_mode::BodySendMode::None as i32 {
                return Err(Refusal::new(
                    field,
                    "only NONE is supported: bodies are not sent to processors",
                ));
            }
        }
        // By default trailers are not sent.
        let send = filter::processing_mode::HeaderSendMode::Send as i32;
        for (field, mode) in [
            ("request_trailer_mode", from.request_trailer_mode),
            ("response_trailer_mode", from.response_trailer_mode),
        ] {
            if mode == send {
                return Err(Refusal::new(field, "SEND is not supported"));
            }
        }
        let skip = filter::processing_mode::HeaderSendMode::Skip as i32;
        Ok(Self {
            request: from.request_header_mode != skip,
            response: from.response_header_mode != skip,
        })
    }
}

impl PerRouteProc {
    /// Compiles the message.
    pub(crate) fn compile(
        from: &filter::ExtProcPerRoute,
        context: &mut Context<'_>,
    ) -> Result<Self, Refusal> {
        use filter::ext_proc_per_route::Override;
        let from = match &from.r#override {
            Some(Override::Disabled(true)) => return Ok(Self::Disabled),
            Some(Override::Disabled(false)) => return Err(Refusal::new("disabled", "must be true")),
            Some(Override::Overrides(overrides)) => overrides,
            None => return Err(Refusal::new("override", "is missing")),
        };
        let unsupported = [
            ("async_mode", from.async_mode),
            ("request_attributes", !from.request_attributes.is_empty()),
            ("response_attributes", !from.response_attributes.is_empty()),
            (
                "processing_request_modifier",
                from.processing_request_modifier.is_some(),
            ),
        ];
        if let Some((field, _)) = unsupported.iter().find(|(_, present)| *present) {
            return Err(Refusal::new(format!("overrides.{field}"), "not supported"));
        }
        Ok(Self::Settings {
            mode: from
                .processing_mode
                .as_ref()
                .map(|mode| Mode::compile(Some(mode)).within("overrides.processing_mode"))
                .transpose()?,
            target: from
                .grpc_service
                .as_ref()
                .map(|service| GrpcTarget::compile(Some(service), context).map(Box::new))
                .transpose()
                .within("overrides.grpc_service")?,
            failure_allows: from.failure_mode_allow.as_ref().map(|value| value.value),
            namespaces: from
                .metadata_options
                .as_ref()
                .map(|options| Namespaces::compile(Some(options)).map(Arc::new))
                .transpose()
                .within("overrides.metadata_options")?,
            fields: from
                .grpc_initial_metadata
                .iter()
                .enumerate()
                .map(|(index, field)| {
                    header_pair(field).within(format!("overrides.grpc_initial_metadata[{index}]"))
                })
                .collect::<Result<_, _>>()?,
        })
    }
}

/// What an answer means for a head.
#[derive(Debug)]
pub enum Answer {
    /// It comes later: within that time from now, where the service may say so.
    Later(Option<Duration>),
    /// It goes on with these changes.
    Continue(Changes),
    /// The client gets this instead.
    Immediate(Box<Immediate>),
}

/// Changes to a head.
#[derive(Debug, Default)]
pub struct Changes {
    /// Fields to set.
    pub set: Vec<Field>,
    /// Fields to take off.
    pub remove: Vec<HeaderName>,
    /// `:path` of a request.
    pub path: Option<String>,
    /// `:status` of a response.
    pub status: Option<StatusCode>,
    /// For later filters, by namespace.
    pub metadata: Vec<(Box<str>, google::Struct)>,
    /// The route is searched again.
    pub reroute: bool,
    /// What the service wants to see from now on, where it may say so.
    pub mode: Option<Mode>,
}

/// An answer of the service to the client.
#[derive(Debug)]
pub struct Immediate {
    /// Status.
    pub status: StatusCode,
    /// Fields.
    pub headers: Vec<Field>,
    /// Body.
    pub body: Vec<u8>,
    /// gRPC status.
    pub grpc_status: Option<u32>,
    /// Response code details, where the service gives some.
    pub details: String,
}

/// Why an answer cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Wrong {
    /// An answer to something else.
    #[error("spurious_message")]
    Spurious,
    /// It asks for what the proxy does not do.
    #[error("unsupported_response")]
    Unsupported,
    /// A change that is not allowed, where that is an error.
    #[error("invalid_header_mutation")]
    Mutation,
}

/// Which head an answer is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum About {
    /// The request's.
    Request,
    /// The response's.
    Response,
}

impl ExtProc {
    /// Compiles the message.
    pub(crate) fn compile(
        from: &filter::ExternalProcessor,
        prefix: &str,
        context: &mut Context<'_>,
    ) -> Result<Self, Refusal> {
        let unsupported = [
            ("http_service", from.http_service.is_some()),
            ("filter_metadata", from.filter_metadata.is_some()),
            (
                "deferred_close_timeout",
                from.deferred_close_timeout.is_some() && !from.observability_mode,
            ),
            (
                "send_body_without_waiting_for_header_response",
                from.send_body_without_waiting_for_header_response,
            ),
            (
                "processing_request_modifier",
                from.processing_request_modifier.is_some(),
            ),
            ("on_processing_response", from.on_processing_response.is_some()),
            ("allow_content_length_header", from.allow_content_length_header),
        ];
        if let Some((field, _)) = unsupported.iter().find(|(_, present)| *present) {
            return Err(Refusal::new(*field, "not supported"));
        }
        use filter::external_processor::RouteCacheAction;
        let route = match RouteCacheAction::try_from(from.route_cache_action) {
            Ok(RouteCacheAction::Default) if from.disable_clear_route_cache => RouteCache::Retain,
            Ok(RouteCacheAction::Default) => RouteCache::AsAsked,
            Ok(_) if from.disable_clear_route_cache => {
                return Err(Refusal::new(
                    "route_cache_action",
                    "cannot be combined with disable_clear_route_cache",
                ));
            }
            Ok(RouteCacheAction::Clear) => RouteCache::Clear,
            Ok(RouteCacheAction::Retain) => RouteCache::Retain,
            Err(_) => return Err(Refusal::new("route_cache_action", "is unknown")),
        };
        let forward = from.forward_rules.as_ref();
        let target = GrpcTarget::compile(from.grpc_service.as_ref(), context).within("grpc_service")?;
        let closing =
            convert::timeout(from.deferred_close_timeout.as_ref()).within("deferred_close_timeout")?;
        let (workers, registry) = context.counters();
        let labels = [
            ("envoy_http_conn_manager_prefix", prefix),
            ("prefix", from.stat_prefix.as_str()),
        ];
        let mut counter = |name| registry.counter(workers, name, &labels);
        Ok(Self {
            target,
            mode: Mode::compile(from.processing_mode.as_ref()).within("processing_mode")?,
            failure_allows: from.failure_mode_allow,
            timeout: convert::timeout(from.message_timeout.as_ref())
                .within("message_timeout")?
                .unwrap_or(DEFAULT_TIMEOUT),
            status_on_error: from
                .status_on_error
                .as_ref()
                .map(|status| {
                    u16::try_from(status.code)
                        .ok()
                        .and_then(|code| StatusCode::from_u16(code).ok())
                        .ok_or_else(|| {
                            Refusal::new("status_on_error", format!("{} is no HTTP status", status.code))
                        })
                })
                .transpose()?,
            rules: MutationRules::compile(from.mutation_rules.as_ref()).within("mutation_rules")?,
            allowed: matchers(
                forward.and_then(|rules| rules.allowed_headers.as_ref()),
                "allowed_headers",
            )
            .within("forward_rules")?,
            disallowed: matchers(
                forward.and_then(|rules| rules.disallowed_headers.as_ref()),
                "disallowed_headers",
            )
            .within("forward_rules")?
            .unwrap_or_default(),
            no_immediate: from.disable_immediate_response,
            route,
            max_timeout: convert::timeout(from.max_message_timeout.as_ref()).within("max_message_timeout")?,
            namespaces: Arc::new(
                Namespaces::compile(from.metadata_options.as_ref()).within("metadata_options")?,
            ),
            mode_override: from.allow_mode_override.then(|| {
                let modes = from.allowed_override_modes.iter();
                modes.map(|mode| of_response(*mode)).collect()
            }),
            observing: from.observability_mode.then(|| closing.unwrap_or(DEFAULT_CLOSE)),
            observed: std::sync::atomic::AtomicUsize::new(0),
            request_attributes: attributes(&from.request_attributes, |_, at_end| !at_end)
                .within("request_attributes")?,
            response_attributes: attributes(&from.response_attributes, |attribute, _| {
                matches!(
                    attribute,
                    Attribute::ResponseCode
                        | Attribute::ClusterName
                        | Attribute::RouteName
                        | Attribute::UpstreamAddress
                )
            })
            .within("response_attributes")?,
            counters: Counters {
                streams_started: counter("envoy_http_ext_proc_streams_started"),
                streams_failed: counter("envoy_http_ext_proc_streams_failed"),
                messages_sent: counter("envoy_http_ext_proc_stream_msgs_sent"),
                messages_received: counter("envoy_http_ext_proc_stream_msgs_received"),
                spurious_messages: counter("envoy_http_ext_proc_spurious_msgs_received"),
                failure_allowed: counter("envoy_http_ext_proc_failure_mode_allowed"),
                timeouts: counter("envoy_http_ext_proc_message_timeouts"),
                rejected_mutations: counter("envoy_http_ext_proc_rejected_header_mutations"),
                overridden_timeouts: counter("envoy_http_ext_proc_override_message_timeout_received"),
                ignored_overrides: counter("envoy_http_ext_proc_override_message_timeout_ignored"),
            },
        })
    }

    /// The status of a failure.
    pub fn error_status(&self, timeout: bool) -> StatusCode {
        self.status_on_error.unwrap_or(if timeout {
            StatusCode::GATEWAY_TIMEOUT
        } else {
            StatusCode::INTERNAL_SERVER_ERROR
        })
    }

    /// The message about a head; `system` are its pseudo fields. The `first` of a stream says what will be sent.
    pub fn question(
        &self,
        about: About,
        first: bool,
        namespaces: &Namespaces,
        system: &[(&str, &str)],
        headers: &HeaderMap,
        ends: bool,
        metadata: &Metadata,
        attributes: google::Struct,
    ) -> service::ProcessingRequest {
        use service::processing_request::Request;
        let passes = |name: &str| {
            let any = |list: &[StringMatch]| list.iter().any(|matcher| matcher.matches(name));
            self.allowed.as_deref().is_none_or(any) && !any(&self.disallowed)
        };
        let entry = |name: &str, value: &[u8]| core::HeaderValue {
            key: name.to_owned(),
            raw_value: value.to_vec(),
            ..Default::default()
        };
        let fields = headers
            .iter()
            .filter(|(name, _)| **name != header::HOST)
            .map(|(name, value)| (name.as_str(), value.as_bytes()));
        let headers = system
            .iter()
            .map(|(name, value)| (*name, value.as_bytes()))
            .chain(fields)
            .filter(|(name, _)| passes(name))
            .map(|(name, value)| entry(name, value))
            .collect();
        let headers = service::HttpHeaders {
            headers: Some(core::HeaderMap { headers }),
            end_of_stream: ends,
            ..Default::default()
        };
        let filter_metadata: std::collections::HashMap<_, _> = namespaces
            .sent
            .iter()
            .filter_map(|name| Some((name.to_string(), metadata.get(name)?.clone())))
            .collect();
        let attributes = if attributes.fields.is_empty() {
            Default::default()
        } else {
            [(NAME.to_owned(), attributes)].into()
        };
        service::ProcessingRequest {
            attributes,
            observability_mode: self.observing.is_some(),
            // Bodies are never sent, which is what the defaults say.
            protocol_config: first.then(service::ProtocolConfiguration::default),
            metadata_context: (!filter_metadata.is_empty()).then(|| core::Metadata {
                filter_metadata,
                ..Default::default()
            }),
            request: Some(match about {
                About::Request => Request::RequestHeaders(headers),
                About::Response => Request::ResponseHeaders(headers),
            }),
            ..Default::default()
        }
    }

    /// What an answer about a head means.
    pub fn read(
        &self,
        about: About,
        namespaces: &Namespaces,
        from: service::ProcessingResponse,
        worker: usize,
    ) -> Result<Answer, Wrong> {
        use service::processing_response::Response;
        if let Some(asked) = &from.override_message_timeout {
            // Nothing else of such a message counts.
            let asked = convert::duration(asked).ok().filter(|asked| {
                *asked >= Duration::from_millis(1) && self.max_timeout.is_some_and(|most| *asked <= most)
            });
            return Ok(Answer::Later(asked));
        }
        let metadata = taken(&namespaces.taken, from.dynamic_metadata);
        let from_mode = from.mode_override;
        let answer = match (about, from.response) {
            (About::Request, Some(Response::RequestHeaders(answer)))
            | (About::Response, Some(Response::ResponseHeaders(answer))) => {
                answer.response.unwrap_or_default()
            }
            (_, Some(Response::ImmediateResponse(answer))) if !self.no_immediate => {
                return self.immediate(answer, worker);
            }
            (_, Some(Response::StreamedImmediateResponse(_))) => return Err(Wrong::Unsupported),
            _ => {
                self.counters.spurious_messages.add(worker);
                return Err(Wrong::Spurious);
            }
        };
        let replaces = service::common_response::ResponseStatus::ContinueAndReplace as i32;
        if answer.status == replaces || answer.body_mutation.is_some() || answer.trailers.is_some() {
            return Err(Wrong::Unsupported);
        }
        let mut changes = self.changes(answer.header_mutation.as_ref(), about, worker)?;
        changes.metadata = metadata;
        if about == About::Request
            && let Some(mode) = &from_mode
        {
            changes.mode = self.overridden(mode)?;
        }
        changes.reroute = about == About::Request
            && match self.route {
                RouteCache::AsAsked => answer.clear_route_cache,
                RouteCache::Clear => true,
                RouteCache::Retain => false,
            };
        Ok(Answer::Continue(changes))
    }

    /// What a service may want to see from now on; nothing where it may not say so.
    fn overridden(&self, mode: &filter::ProcessingMode) -> Result<Option<Mode>, Wrong> {
        let Some(allowed) = &self.mode_override else {
            return Ok(None);
        };
        if !allowed.is_empty() && !allowed.contains(&of_response(*mode)) {
            return Ok(None);
        }
        Mode::compile(Some(mode))
            .map(Some)
            .map_err(|_| Wrong::Unsupported)
    }

    fn immediate(&self, from: service::ImmediateResponse, worker: usize) -> Result<Answer, Wrong> {
        let status = from
            .status
            .and_then(|status| u16::try_from(status.code).ok())
            .and_then(|code| StatusCode::from_u16(code).ok())
            .unwrap_or(StatusCode::OK);
        let changes = self.changes(from.headers.as_ref(), About::Response, worker)?;
        Ok(Answer::Immediate(Box::new(Immediate {
            status,
            headers: changes.set,
            body: from.body,
            grpc_status: from.grpc_status.map(|status| status.status),
            details: from.details,
        })))
    }

    /// Fields that may not be changed are left out, or fail the message.
    fn changes(
        &self,
        from: Option<&service::HeaderMutation>,
        about: About,
        worker: usize,
    ) -> Result<Changes, Wrong> {
        let mut out = Changes::default();
        let Some(from) = from else { return Ok(out) };
        let rejected = || {
            self.counters.rejected_mutations.add(worker);
            if self.rules.is_error {
                Err(Wrong::Mutation)
            } else {
                Ok(())
            }
        };
        for name in &from.remove_headers {
            match HeaderName::from_bytes(name.as_bytes()) {
                Ok(name) if self.rules.allows_removal(&name) => out.remove.push(name),
                _ => rejected()?,
            }
        }
        for option in &from.set_headers {
            let Some(given) = &option.header else { continue };
            let name = given.key.to_ascii_lowercase();
            let text = if given.raw_value.is_empty() {
                given.value.as_bytes()
            } else {
                &given.raw_value
            };
            // The length is the message's own: bodies are not changed.
            if !self.rules.allows(&name) || name == "content-length" || name == "transfer-encoding" {
                rejected()?;
                continue;
            }
            let text = String::from_utf8_lossy(text);
            match (&*name, about) {
                (":path", About::Request) => out.path = Some(text.into_owned()),
                (":status", About::Response) => match text.parse().ok().map(StatusCode::from_u16) {
                    Some(Ok(status)) => out.status = Some(status),
                    _ => rejected()?,
                },
                (":authority" | "host", About::Request) => match HeaderValue::from_str(&text) {
                    Ok(value) => out.set.push((header::HOST, value, super::ext_authz::How::Set)),
                    Err(_) => rejected()?,
                },
                _ => match field(option) {
                    Some(field) => out.set.push(field),
                    None => rejected()?,
                },
            }
        }
        Ok(out)
    }
}
