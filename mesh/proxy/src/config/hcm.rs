//! The HTTP connection manager, compiled.

use std::sync::Arc;
use std::time::Duration;

use http::HeaderValue;
use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::envoy::extensions::filters::network::http_connection_manager::v3 as hcm;

use super::alpn::AlpnOverrides;
use super::client_cert::ClientCert;
use super::convert::{self, each, refuse_present};
use super::http2::Http2Options;
use super::listener::Direction;
use super::origin::Origin;
use super::route::Context;
use super::router::RouterOptions;
use super::slot::RouteSlot;
use super::table::RouteTable;
use crate::error::{Refusal, Within};
use crate::observe::access_log::{self, AccessLogs};
use crate::observe::tracer::Tracer;
use crate::policy::chain::Chain;
use crate::policy::header_mutation::HeaderMutation;
use crate::policy::stats::Traffic;
use crate::worker::CONNECT;

/// Envoy's limit of silence on a stream when none is given.
const DEFAULT_STREAM_IDLE: Duration = Duration::from_secs(300);
/// Envoy's limit of silence on a connection without requests.
const DEFAULT_CONNECTION_IDLE: Duration = Duration::from_secs(3600);
/// Envoy's limit of a request head.
const DEFAULT_HEADERS_KB: u32 = 60;

/// Which protocol the client speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Codec {
    /// Told by the first bytes.
    Auto,
    /// HTTP/1.
    Http1,
    /// HTTP/2.
    Http2,
}

/// What becomes of the `server` response header.
#[derive(Clone, Debug)]
pub enum ServerHeader {
    /// Always ours.
    Overwrite(HeaderValue),
    /// Ours where there is none.
    AppendIfAbsent(HeaderValue),
    /// The upstream's.
    PassThrough,
}

/// Slashes that are percent-encoded in the path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EscapedSlashes {
    /// Left as they are.
    Keep,
    /// 400.
    Reject,
    /// Decoded, and the client told to use the result.
    Redirect,
    /// Decoded and forwarded.
    Forward,
}

/// Header fields of clients whose names have underscores, which some servers take for dashes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Underscores {
    /// Handed on.
    Keep,
    /// 400.
    Reject,
    /// Taken off.
    Drop,
}

/// Where routes come from.
#[derive(Debug)]
pub enum Routes {
    /// A named route configuration.
    Rds(Arc<RouteSlot>),
    /// The listener's own.
    Inline(Arc<RouteTable>),
}

/// A compiled connection manager.
#[derive(Debug)]
pub struct HttpManager {
    /// For admin output.
    pub stat_prefix: Box<str>,
    /// Connections and requests.
    pub traffic: Traffic,
    /// Protocol.
    pub codec: Codec,
    /// Side, for metrics.
    pub direction: Direction,
    /// Routes.
    pub routes: Routes,
    /// The HTTP filters before the router.
    pub filters: Chain,
    /// Whether requests may wait for their virtual host (the on-demand filter).
    pub waits_for_hosts: bool,
    /// Tracing, where somebody collects.
    pub tracer: Option<Box<Tracer>>,
    /// Access logs; without them only errors are told.
    pub logs: Option<Box<AccessLogs>>,
    /// Lines are written of requests that have come, too.
    pub logs_start: bool,
    /// And of tunnels that have been granted.
    pub logs_tunnels: bool,
    /// Changes of a request's fields before anybody looks at them.
    pub early: Box<[HeaderMutation]>,
    /// How often lines are written of requests that go on.
    pub log_interval: Option<Duration>,
    /// `istio.alpn`: what TLS towards endpoints offers.
    pub alpn: Option<Box<AlpnOverrides>>,
    /// Whether Istio's metrics are kept.
    pub stats: bool,
    /// Unknown destinations are not named after the Host header.
    pub disable_host_fallback: bool,
    /// Whether peer metadata headers are exchanged.
    pub metadata_exchange: bool,
    /// Limit of silence on a stream.
    pub stream_idle_timeout: Option<Duration>,
    /// Limit for the whole request to arrive.
    pub request_timeout: Option<Duration>,
    /// Limit for the request head to arrive.
    pub headers_timeout: Option<Duration>,
    /// Limit of silence between requests.
    pub idle_timeout: Option<Duration>,
    /// Connections are asked to end after this.
    pub max_connection_duration: Option<Duration>,
    /// Streams are ended after this.
    pub max_stream_duration: Option<Duration>,
    /// Connections are asked to end after this many requests; 0 for no limit.
    pub max_requests_per_connection: u32,
    /// Bytes of a request head.
    pub max_head: usize,
    /// Header fields of a request.
    pub max_header_count: usize,
    /// HTTP/2 streams at a time.
    pub max_streams: u32,
    /// HTTP/2 stream window.
    pub stream_window: u32,
    /// HTTP/2 connection window.
    pub connection_window: u32,
    /// HTTP/2: what clients may send, and whether they are asked if they live.
    pub http2: Http2Options,
    /// How the router behaves.
    pub router: RouterOptions,
    /// Who requests are from, and what is told of it.
    pub origin: Origin,
    /// `x-forwarded-client-cert`.
    pub client_cert: ClientCert,
    /// `x-request-id` is made when absent.
    pub generate_request_id: bool,
    /// `x-request-id` of outside clients is kept.
    pub preserve_request_id: bool,
    /// `x-request-id` is put on every response.
    pub request_id_in_response: bool,
    /// `server` header.
    pub server: ServerHeader,
    /// `.` and `..` are resolved.
    pub normalize_path: bool,
    /// `//` becomes `/`.
    pub merge_slashes: bool,
    /// `%2F` and `%5C`.
    pub escaped_slashes: EscapedSlashes,
    /// `_` in names of header fields.
    pub underscores: Underscores,
    /// Upgrades that are let through (`websocket`), lower case.
    pub upgrades: Box<[Box<str>]>,
    /// Whether CONNECT is among them.
    pub connect: bool,
    /// Whether clients over HTTP/2 may upgrade (`allow_connect`).
    pub extended_connect: bool,
    /// HTTP/1.0 requests without `Host` go to this authority.
    pub default_host: Box<str>,
    /// The port is taken off the authority before routing.
    pub strip_port: bool,
    /// Interim answers of endpoints are passed on (`proxy_100_continue`).
    pub interim_answers: bool,
}

impl Routes {
    fn compile(from: &hcm::HttpConnectionManager, context: &mut Context<'_>) -> Result<Self, Refusal> {
        use hcm::http_connection_manager::RouteSpecifier;
        Ok(match &from.route_specifier {
            Some(RouteSpecifier::Rds(rds)) => Self::Rds(context.slots.route(&rds.route_config_name)),
            Some(RouteSpecifier::RouteConfig(config)) => {
                let table = super::store::compile_inline_routes(config, context).within("route_config")?;
                Self::Inline(Arc::new(table))
            }
            Some(RouteSpecifier::ScopedRoutes(_)) => {
                return Err(Refusal::new("scoped_routes", "not supported"));
            }
            None => return Err(Refusal::new("route_specifier", "is missing")),
        })
    }
}

impl Codec {
    fn compile(from: i32) -> Result<Self, Refusal> {
        use hcm::http_connection_manager::CodecType;
        Ok(match CodecType::try_from(from) {
            Ok(CodecType::Auto) => Self::Auto,
            Ok(CodecType::Http1) => Self::Http1,
            Ok(CodecType::Http2) => Self::Http2,
            Ok(CodecType::Http3) | Err(_) => {
                return Err(Refusal::new("codec_type", "HTTP/3 is not supported"));
            }
        })
    }
}

impl EscapedSlashes {
    fn compile(from: i32) -> Result<Self, Refusal> {
        Ok(match from {
            0 | 1 => Self::Keep,
            2 => Self::Reject,
            3 => Self::Redirect,
            4 => Self::Forward,
            other => {
                return Err(Refusal::new(
                    "path_with_escaped_slashes_action",
                    format!("{other} is unknown"),
                ));
            }
        })
    }
}

impl Underscores {
    fn compile(from: i32) -> Result<Self, Refusal> {
        use core::http_protocol_options::HeadersWithUnderscoresAction as Action;
        match Action::try_from(from) {
            Ok(Action::Allow) => Ok(Self::Keep),
            Ok(Action::RejectRequest) => Ok(Self::Reject),
            Ok(Action::DropHeader) => Ok(Self::Drop),
            Err(_) => Err(Refusal::new(
                "common_http_protocol_options.headers_with_underscores_action",
                format!("{from} is unknown"),
            )),
        }
    }
}

impl HttpManager {
    /// The name of its route configuration, if it is not inline.
    pub fn rds_name(&self) -> Option<Arc<str>> {
        match &self.routes {
            Routes::Rds(slot) => Some(slot.name.clone()),
            Routes::Inline(_) => None,
        }
    }

    /// The routes as they are now.
    pub fn table(&self) -> Option<Arc<RouteTable>> {
        match &self.routes {
            Routes::Rds(slot) => slot.table(),
            Routes::Inline(table) => Some(table.clone()),
        }
    }

    pub(super) fn compile(
        from: &hcm::HttpConnectionManager,
        direction: Direction,
        listener: &str,
        context: &mut Context<'_>,
    ) -> Result<Self, Refusal> {
        refuse_unsupported(from)?;
        let routes = Routes::compile(from, context)?;
        let common = from.common_http_protocol_options.as_ref();
        let http1 = from.http_protocol_options.as_ref();
        let http2 = from.http2_protocol_options.as_ref();
        let flag = |value: &Option<serin_xds::pb::google::protobuf::BoolValue>, default: bool| {
            value.as_ref().map_or(default, |value| value.value)
        };
        let (workers, registry) = context.counters();
        let traffic = registry.traffic_of(workers, listener, &from.stat_prefix);
        let mut out = Self {
            stat_prefix: from.stat_prefix.as_str().into(),
            traffic,
            codec: Codec::compile(from.codec_type)?,
            direction,
            routes,
            filters: Chain::default(),
            waits_for_hosts: false,
            tracer: Tracer::compile(from.tracing.as_ref(), &from.stat_prefix, context)?,
            logs: AccessLogs::compile(&from.access_log, context)?.map(Box::new),
            logs_start: from.flush_access_log_on_new_request
                || from
                    .access_log_options
                    .as_ref()
                    .is_some_and(|options| options.flush_access_log_on_new_request),
            log_interval: log_interval(from)?.filter(|_| !from.access_log.is_empty()),
            logs_tunnels: from
                .access_log_options
                .as_ref()
                .is_some_and(|options| options.flush_log_on_tunnel_successfully_established),
            alpn: None,
            stats: false,
            disable_host_fallback: false,
            metadata_exchange: false,
            stream_idle_timeout: match &from.stream_idle_timeout {
                None => Some(DEFAULT_STREAM_IDLE),
                given => convert::timeout(given.as_ref()).within("stream_idle_timeout")?,
            },
            request_timeout: convert::timeout(from.request_timeout.as_ref()).within("request_timeout")?,
            headers_timeout: convert::timeout(from.request_headers_timeout.as_ref())
                .within("request_headers_timeout")?,
            idle_timeout: match common.and_then(|options| options.idle_timeout.as_ref()) {
                None => Some(DEFAULT_CONNECTION_IDLE),
                given => convert::timeout(given).within("common_http_protocol_options.idle_timeout")?,
            },
            max_connection_duration: convert::timeout(
                common.and_then(|options| options.max_connection_duration.as_ref()),
            )
            .within("common_http_protocol_options.max_connection_duration")?,
            max_stream_duration: convert::timeout(
                common.and_then(|options| options.max_stream_duration.as_ref()),
            )
            .within("common_http_protocol_options.max_stream_duration")?,
            max_requests_per_connection: common
                .and_then(|options| options.max_requests_per_connection.as_ref())
                .map_or(0, |value| value.value),
            max_head: from
                .max_request_headers_kb
                .as_ref()
                .map_or(DEFAULT_HEADERS_KB, |value| value.value.clamp(1, 8192))
                as usize
                * 1024,
            max_header_count: common
                .and_then(|options| options.max_headers_count.as_ref())
                .map_or(100, |value| value.value.clamp(1, 4096)) as usize,
            // Lower than Envoy's 1,024: h2 keeps state for each, and Rapid Reset multiplies by it.
            max_streams: http2
                .and_then(|options| options.max_concurrent_streams.as_ref())
                .map_or(100, |value| value.value.max(1)),
            stream_window: http2
                .and_then(|options| options.initial_stream_window_size.as_ref())
                .map_or(256 * 1024, |value| value.value),
            connection_window: http2
                .and_then(|options| options.initial_connection_window_size.as_ref())
                .map_or(1024 * 1024, |value| value.value),
            http2: Http2Options::compile(
                http2,
                from.stream_error_on_invalid_http_message
                    .as_ref()
                    .filter(|_| from.codec_type != hcm::http_connection_manager::CodecType::Http1 as i32)
                    .map(|value| value.value),
            )
            .within("http2_protocol_options")?,
            router: RouterOptions::default(),
            origin: Origin::compile(from)?,
            early: each(
                &from.early_header_mutation_extensions,
                "early_header_mutation_extensions",
                HeaderMutation::compile_early,
            )?,
            client_cert: ClientCert::compile(from)?,
            generate_request_id: flag(&from.generate_request_id, true),
            preserve_request_id: from.preserve_external_request_id,
            request_id_in_response: from.always_set_request_id_in_response,
            server: server_header(from)?,
            normalize_path: flag(&from.normalize_path, false),
            merge_slashes: from.merge_slashes,
            escaped_slashes: EscapedSlashes::compile(from.path_with_escaped_slashes_action)?,
            underscores: Underscores::compile(
                common.map_or(0, |options| options.headers_with_underscores_action),
            )?,
            upgrades: from
                .upgrade_configs
                .iter()
                .filter(|upgrade| upgrade.enabled.as_ref().is_none_or(|value| value.value))
                .map(|upgrade| upgrade.upgrade_type.to_ascii_lowercase().into())
                .collect(),
            connect: false,
            extended_connect: http2.is_some_and(|options| options.allow_connect),
            default_host: http1
                .map_or("", |options| options.default_host_for_http_10.as_str())
                .into(),
            interim_answers: from.proxy_100_continue,
            strip_port: from.strip_matching_host_port
                || matches!(
                    from.strip_port_mode,
                    Some(hcm::http_connection_manager::StripPortMode::StripAnyHostPort(
                        true
                    ))
                ),
        };
        out.connect = out.upgrades.iter().any(|upgrade| **upgrade == *CONNECT);
        if from
            .upgrade_configs
            .iter()
            .any(|upgrade| !upgrade.filters.is_empty())
        {
            return Err(Refusal::new(
                "upgrade_configs",
                "filters of their own are not supported: those of the chain apply",
            ));
        }
        out.add_filters(&from.http_filters, context)?;
        Ok(out)
    }

    fn add_filters(&mut self, filters: &[hcm::HttpFilter], context: &mut Context<'_>) -> Result<(), Refusal> {
        // Istio's own filters say what to measure and exchange; a control plane that sends none of them (ours, which
        // serves Envoy as well) gets both.
        let implicit = !filters.iter().any(|filter| filter.name.starts_with("istio."));
        (self.stats, self.metadata_exchange) = (implicit, implicit);
        let mut routed = false;
        for (index, filter) in filters.iter().enumerate() {
            let path = format!("http_filters[{index}]");
            if routed {
                return Err(Refusal::new(path, "no filter may follow the router"));
            }
            match self.add_filter(filter, context) {
                Ok(router) => routed = router,
                Err(_) if filter.is_optional => {}
                Err(refusal) => return Err(refusal.within(path)),
            }
        }
        self.waits_for_hosts = self.filters.waits_for_hosts();
        if !routed {
            return Err(Refusal::new("http_filters", "the router filter is missing"));
        }
        Ok(())
    }

    /// Whether the filter was the router.
    fn add_filter(&mut self, filter: &hcm::HttpFilter, context: &mut Context<'_>) -> Result<bool, Refusal> {
        let any = match &filter.config_type {
            Some(hcm::http_filter::ConfigType::TypedConfig(any)) => Some(any),
            Some(hcm::http_filter::ConfigType::ConfigDiscovery(_))
                if filter.name == "envoy.filters.http.router" || filter.name.starts_with("istio.") =>
            {
                return Err(Refusal::new(
                    "config_discovery",
                    "this filter cannot be configured by extension discovery",
                ));
            }
            Some(hcm::http_filter::ConfigType::ConfigDiscovery(_)) | None => None,
        };
        // As all filters of Envoy it is known by its configuration's type; where that says nothing, by its name.
        let is_router = match any.map_or("", |any| any.type_url.rsplit('/').next().unwrap_or_default()) {
            "" | "google.protobuf.Empty" => filter.name == "envoy.filters.http.router",
            known => known == "envoy.extensions.filters.http.router.v3.Router",
        };
        if is_router {
            self.router = RouterOptions::compile(any)?;
            return Ok(true);
        }
        match filter.name.as_str() {
            _ if filter.disabled && filter.name.starts_with("istio.") => {}
            "istio.metadata_exchange" => self.metadata_exchange = true,
            "istio.stats" => {
                self.stats = true;
                self.disable_host_fallback = any.is_some_and(|any| {
                    any.type_url.ends_with("stats.PluginConfig") && plugin_disables_host(any)
                });
            }
            "istio.alpn" => self.alpn = Some(Box::new(AlpnOverrides::compile(any)?)),
            _ => self.filters.add(filter, &self.stat_prefix, context)?,
        }
        Ok(false)
    }
}

/// `disable_host_header_fallback` of Istio's `stats.PluginConfig`, field 6 of a message whose type is not in Envoy's
/// protobuf set; read from the wire because that is the only field that changes what we do.
fn plugin_disables_host(any: &serin_xds::pb::google::protobuf::Any) -> bool {
    #[derive(Clone, PartialEq, prost::Message)]
    struct PluginConfig {
        #[prost(bool, tag = "6")]
        disable_host_header_fallback: bool,
    }
    <PluginConfig as prost::Message>::decode(any.value.as_slice())
        .is_ok_and(|config| config.disable_host_header_fallback)
}

/// How often the log tells of a request that lasts.
fn log_interval(from: &hcm::HttpConnectionManager) -> Result<Option<Duration>, Refusal> {
    let options = from.access_log_options.as_ref();
    let of_options = options.and_then(|options| options.access_log_flush_interval.as_ref());
    access_log::interval(of_options.or(from.access_log_flush_interval.as_ref()))
}

/// What a manager may say that nothing here can honour.
fn refuse_unsupported(from: &hcm::HttpConnectionManager) -> Result<(), Refusal> {
    refuse_present(
        &[
            ("local_reply_config", from.local_reply_config.is_some()),
            (
                "path_normalization_options",
                from.path_normalization_options.is_some(),
            ),
            ("proxy_status_config", from.proxy_status_config.is_some()),
            (
                "represent_ipv4_remote_address_as_ipv4_mapped_ipv6",
                from.represent_ipv4_remote_address_as_ipv4_mapped_ipv6,
            ),
            ("strip_trailing_host_dot", from.strip_trailing_host_dot),
            ("stream_flush_timeout", from.stream_flush_timeout.is_some()),
            ("append_local_overload", from.append_local_overload),
            (
                "http1_safe_max_connection_duration",
                from.http1_safe_max_connection_duration,
            ),
            (
                "typed_header_validation_config",
                from.typed_header_validation_config.is_some(),
            ),
            (
                "forward_client_cert_matcher",
                from.forward_client_cert_matcher.is_some(),
            ),
        ],
        "not supported",
    )
}

fn server_header(from: &hcm::HttpConnectionManager) -> Result<ServerHeader, Refusal> {
    use hcm::http_connection_manager::ServerHeaderTransformation;
    let name = if from.server_name.is_empty() {
        "serin"
    } else {
        &from.server_name
    };
    let value =
        HeaderValue::from_str(name).map_err(|_| Refusal::new("server_name", "is not a header value"))?;
    Ok(
        match ServerHeaderTransformation::try_from(from.server_header_transformation) {
            Ok(ServerHeaderTransformation::Overwrite) => ServerHeader::Overwrite(value),
            Ok(ServerHeaderTransformation::AppendIfAbsent) => ServerHeader::AppendIfAbsent(value),
            Ok(ServerHeaderTransformation::PassThrough) => ServerHeader::PassThrough,
            Err(_) => return Err(Refusal::new("server_header_transformation", "is unknown")),
        },
    )
}
