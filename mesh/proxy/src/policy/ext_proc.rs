//! External processing, header modes: a service sees the heads of request and response and may change them, or answer.
//!
//! This module says what is sent (`messages`) and what the answers mean; the stream is the worker's part. Bodies and
//! trailers are never sent: modes that ask for that are refused. Responses that the proxy makes itself are shown like any
//! other, also where an earlier filter answered before the request came here (Envoy's rule); those that the service has made
//! are not.

mod messages;
mod mode;
mod namespaces;
mod per_route;

use std::sync::Arc;
use std::time::Duration;

use http::StatusCode;
use serin_xds::pb::envoy::extensions::filters::http::ext_proc::v3 as filter;

pub use self::messages::{About, Answer, Changes, Immediate, Question, Rejected, Wrong, told};
pub use self::mode::Mode;
pub use self::namespaces::Namespaces;
pub use self::per_route::PerRouteProc;

use self::mode::of_response;
use super::cel::Attribute;
use super::ext_authz::matchers;
use super::mutation_rules::MutationRules;
use super::service::GrpcTarget;
use super::stats::Counter;
use crate::config::convert::{self, refuse_present};
use crate::config::matchers::StringMatch;
use crate::config::route::Context;
use crate::error::{Refusal, Within};

/// The method that is called.
pub const PATH: &str = "/envoy.service.ext_proc.v3.ExternalProcessor/Process";
/// Envoy's limit for each message.
const DEFAULT_TIMEOUT: Duration = Duration::from_millis(200);
/// Envoy's time for which a stream that observes stays open after its request.
const DEFAULT_CLOSE: Duration = Duration::from_secs(5);
/// Whether the route is searched again after the service changed a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum RouteCache {
    AsAsked,
    Clear,
    Retain,
}

impl RouteCache {
    fn compile(from: &filter::ExternalProcessor) -> Result<Self, Refusal> {
        use filter::external_processor::RouteCacheAction;
        Ok(match RouteCacheAction::try_from(from.route_cache_action) {
            Ok(RouteCacheAction::Default) if from.disable_clear_route_cache => Self::Retain,
            Ok(RouteCacheAction::Default) => Self::AsAsked,
            Ok(_) if from.disable_clear_route_cache => {
                return Err(Refusal::new(
                    "route_cache_action",
                    "cannot be combined with disable_clear_route_cache",
                ));
            }
            Ok(RouteCacheAction::Clear) => Self::Clear,
            Ok(RouteCacheAction::Retain) => Self::Retain,
            Err(_) => return Err(Refusal::new("route_cache_action", "is unknown")),
        })
    }
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

impl ExtProc {
    /// Compiles the message.
    pub(crate) fn compile(
        from: &filter::ExternalProcessor,
        prefix: &str,
        context: &mut Context<'_>,
    ) -> Result<Self, Refusal> {
        refuse_present(
            &[
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
            ],
            "not supported",
        )?;
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
                .map(|status| convert::status_code(status).within("status_on_error"))
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
            route: RouteCache::compile(from)?,
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

    /// The status of a failure; `status_on_error` is for those that are no timeouts.
    pub fn error_status(&self, timeout: bool) -> StatusCode {
        if timeout {
            return StatusCode::GATEWAY_TIMEOUT;
        }
        self.status_on_error.unwrap_or(StatusCode::INTERNAL_SERVER_ERROR)
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
