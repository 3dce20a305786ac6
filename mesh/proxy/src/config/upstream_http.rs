//! Which HTTP a cluster's endpoints speak, and its circuit breakers.

use serin_xds::pb::envoy::config::cluster::v3 as cluster;
use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::envoy::extensions::upstreams::http::v3 as upstream_http;

use super::convert;
use crate::error::{Refusal, Within};

const HTTP_OPTIONS: &str = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions";

/// HTTP towards the endpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UpstreamHttp {
    /// HTTP/1.1.
    Http1,
    /// HTTP/2 with prior knowledge.
    Http2,
    /// What the client spoke.
    Downstream,
    /// What ALPN agrees on.
    Auto,
}

/// Circuit breaker limits; `u32::MAX` is none.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Limits {
    /// Connections.
    pub connections: u32,
    /// Requests waiting for a connection.
    pub pending: u32,
    /// Requests.
    pub requests: u32,
    /// Retries at a time.
    pub retries: u32,
    /// Percent of active requests that may be retries, with a floor; replaces `retries`.
    pub retry_budget: Option<(f64, u32)>,
}

impl Default for Limits {
    fn default() -> Self {
        // Envoy's defaults.
        Self {
            connections: 1024,
            pending: 1024,
            requests: 1024,
            retries: 3,
            retry_budget: None,
        }
    }
}

pub(super) fn http_options(
    from: &cluster::Cluster,
) -> Result<Option<upstream_http::HttpProtocolOptions>, Refusal> {
    let mut options = None;
    for (name, any) in &from.typed_extension_protocol_options {
        if name == HTTP_OPTIONS {
            options = Some(convert::unpack(any, HTTP_OPTIONS).within("typed_extension_protocol_options")?);
        } else {
            return Err(Refusal::new(
                "typed_extension_protocol_options",
                format!("{name} is not supported"),
            ));
        }
    }
    Ok(options)
}

pub(super) fn compile_http(
    from: &cluster::Cluster,
) -> Result<(UpstreamHttp, Option<core::HttpProtocolOptions>), Refusal> {
    use upstream_http::http_protocol_options::{
        UpstreamProtocolOptions, explicit_http_config::ProtocolConfig,
    };
    let Some(options) = http_options(from)? else {
        let http = if from.protocol_selection
            == cluster::cluster::ClusterProtocolSelection::UseDownstreamProtocol as i32
        {
            UpstreamHttp::Downstream
        } else if from.http2_protocol_options.is_some() {
            UpstreamHttp::Http2
        } else {
            UpstreamHttp::Http1
        };
        return Ok((http, from.common_http_protocol_options));
    };
    if options
        .http_filters
        .iter()
        .any(|filter| !filter.name.ends_with("upstream_codec"))
    {
        return Err(Refusal::new("http_filters", "upstream filters are not supported"));
    }
    let http = match &options.upstream_protocol_options {
        Some(UpstreamProtocolOptions::ExplicitHttpConfig(explicit)) => match &explicit.protocol_config {
            Some(ProtocolConfig::Http2ProtocolOptions(_)) => UpstreamHttp::Http2,
            Some(ProtocolConfig::Http3ProtocolOptions(_)) => {
                return Err(Refusal::new("http3_protocol_options", "HTTP/3 is not supported"));
            }
            Some(ProtocolConfig::HttpProtocolOptions(_)) | None => UpstreamHttp::Http1,
        },
        Some(UpstreamProtocolOptions::UseDownstreamProtocolConfig(_)) => UpstreamHttp::Downstream,
        Some(UpstreamProtocolOptions::AutoConfig(_)) => UpstreamHttp::Auto,
        None => UpstreamHttp::Http1,
    };
    Ok((http, options.common_http_protocol_options))
}

pub(super) fn http2_options(from: &cluster::Cluster) -> Option<core::Http2ProtocolOptions> {
    use upstream_http::http_protocol_options::{
        UpstreamProtocolOptions, explicit_http_config::ProtocolConfig,
    };
    match http_options(from)
        .ok()?
        .and_then(|options| options.upstream_protocol_options)
    {
        Some(UpstreamProtocolOptions::ExplicitHttpConfig(explicit)) => match explicit.protocol_config {
            Some(ProtocolConfig::Http2ProtocolOptions(options)) => Some(options),
            _ => None,
        },
        Some(UpstreamProtocolOptions::UseDownstreamProtocolConfig(config)) => config.http2_protocol_options,
        _ => from.http2_protocol_options.clone(),
    }
}

pub(super) fn compile_limits(from: &cluster::Cluster) -> Result<Limits, Refusal> {
    let mut limits = Limits::default();
    let Some(breakers) = &from.circuit_breakers else {
        return Ok(limits);
    };
    if !breakers.per_host_thresholds.is_empty() {
        return Err(Refusal::new(
            "circuit_breakers.per_host_thresholds",
            "not supported yet",
        ));
    }
    // Priority 0 is DEFAULT; thresholds of HIGH only matter to routes that ask for it, and ours use the default ones.
    for threshold in breakers
        .thresholds
        .iter()
        .filter(|threshold| threshold.priority == 0)
    {
        let value = |given: &Option<serin_xds::pb::google::protobuf::UInt32Value>, default| {
            given.as_ref().map_or(default, |value| value.value)
        };
        limits = Limits {
            connections: value(&threshold.max_connections, limits.connections),
            pending: value(&threshold.max_pending_requests, limits.pending),
            requests: value(&threshold.max_requests, limits.requests),
            retries: value(&threshold.max_retries, limits.retries),
            retry_budget: threshold.retry_budget.as_ref().map(|budget| {
                (
                    budget
                        .budget_percent
                        .as_ref()
                        .map_or(20.0, |percent| percent.value),
                    budget
                        .min_retry_concurrency
                        .as_ref()
                        .map_or(3, |value| value.value),
                )
            }),
        };
    }
    Ok(limits)
}
