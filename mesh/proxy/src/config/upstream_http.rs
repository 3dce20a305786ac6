//! Which HTTP a cluster's endpoints speak, and its circuit breakers.

use serin_xds::pb::envoy::config::cluster::v3 as cluster;
use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::envoy::extensions::upstreams::http::v3 as upstream_http;

use super::convert;
use crate::error::{Refusal, Within};
use crate::tls::upstream::Speaking;

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

impl UpstreamHttp {
    /// What the proxy's own requests speak, which follow no client's.
    pub fn for_own_requests(self) -> Speaking {
        match self {
            Self::Http2 => Speaking::Http2,
            Self::Auto => Speaking::Either,
            Self::Http1 | Self::Downstream => Speaking::Http1,
        }
    }
}

/// Priority of a request, by its route: each has circuit breakers of its own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Priority {
    /// `DEFAULT`.
    #[default]
    Default = 0,
    /// `HIGH`.
    High = 1,
}

impl Priority {
    /// Both, with their names in statistics.
    pub const ALL: [(Self, &'static str); 2] = [(Self::Default, "default"), (Self::High, "high")];

    /// A `RoutingPriority`.
    pub(crate) fn compile(from: i32) -> Result<Self, Refusal> {
        match from {
            0 => Ok(Self::Default),
            1 => Ok(Self::High),
            other => Err(Refusal::new("priority", format!("{other} is unknown"))),
        }
    }
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
    /// Percent of active requests that may be retries, with a floor; replaces `retries`. On unless the cluster gives a
    /// number of retries.
    pub retry_budget: Option<(f64, u32)>,
    /// Whether statistics say what is left.
    pub track_remaining: bool,
}

/// The limits of each priority.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Breakers([Limits; 2]);

impl Breakers {
    /// Those of requests of that priority.
    pub fn of(&self, priority: Priority) -> &Limits {
        &self.0[priority as usize]
    }
}

impl Default for Limits {
    fn default() -> Self {
        // Envoy's defaults.
        Self {
            connections: 1024,
            pending: 1024,
            requests: 1024,
            retries: 3,
            // Stricter than Envoy under load, and more generous with many requests: see `RETRY_BUDGET`.
            retry_budget: Some(RETRY_BUDGET),
            track_remaining: false,
        }
    }
}

/// Retries at a time where the cluster says nothing: 20 % of the active requests, at least 3. A fixed number either
/// lets a large service's retries multiply its load or starves a busy one's.
const RETRY_BUDGET: (f64, u32) = (20.0, 3);

impl Limits {
    /// Retries that there may be at a time beside `active` requests.
    pub fn retry_limit(&self, active: u32) -> u32 {
        match self.retry_budget {
            None => self.retries,
            Some((percent, floor)) => ((f64::from(active) * percent / 100.0) as u32).max(floor),
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

pub(super) fn compile_limits(from: &cluster::Cluster) -> Result<Breakers, Refusal> {
    let mut all = Breakers::default();
    let Some(breakers) = &from.circuit_breakers else {
        return Ok(all);
    };
    if !breakers.per_host_thresholds.is_empty() {
        return Err(Refusal::new(
            "circuit_breakers.per_host_thresholds",
            "not supported yet",
        ));
    }
    let mut seen = [false; 2];
    for (index, threshold) in breakers.thresholds.iter().enumerate() {
        let priority =
            Priority::compile(threshold.priority).within(format!("circuit_breakers.thresholds[{index}]"))?;
        // The first of a priority counts, as in Envoy.
        if std::mem::replace(&mut seen[priority as usize], true) {
            continue;
        }
        if threshold.max_connection_pools.is_some() {
            return Err(Refusal::new(
                format!("circuit_breakers.thresholds[{index}].max_connection_pools"),
                "not supported: pools go with their endpoints",
            ));
        }
        let limits = &mut all.0[priority as usize];
        let value = |given: &Option<serin_xds::pb::google::protobuf::UInt32Value>, default| {
            given.as_ref().map_or(default, |value| value.value)
        };
        *limits = Limits {
            connections: value(&threshold.max_connections, limits.connections),
            pending: value(&threshold.max_pending_requests, limits.pending),
            requests: value(&threshold.max_requests, limits.requests),
            retries: value(&threshold.max_retries, limits.retries),
            retry_budget: match &threshold.retry_budget {
                Some(budget) => Some((
                    budget
                        .budget_percent
                        .as_ref()
                        .map_or(RETRY_BUDGET.0, |percent| percent.value),
                    budget
                        .min_retry_concurrency
                        .as_ref()
                        .map_or(RETRY_BUDGET.1, |value| value.value),
                )),
                None if threshold.max_retries.is_some() => None,
                None => limits.retry_budget,
            },
            track_remaining: threshold.track_remaining,
        };
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retries_have_a_budget_unless_the_cluster_gives_a_number() {
        let limits = |max_retries: Option<u32>, budget: Option<(f64, u32)>| {
            let number = |value| serin_xds::pb::google::protobuf::UInt32Value { value };
            let thresholds = cluster::circuit_breakers::Thresholds {
                max_retries: max_retries.map(number),
                retry_budget: budget.map(|(percent, floor)| {
                    cluster::circuit_breakers::thresholds::RetryBudget {
                        budget_percent: Some(serin_xds::pb::envoy::r#type::v3::Percent { value: percent }),
                        min_retry_concurrency: Some(number(floor)),
                        ..Default::default()
                    }
                }),
                ..Default::default()
            };
            compile_limits(&cluster::Cluster {
                circuit_breakers: Some(cluster::CircuitBreakers {
                    thresholds: vec![thresholds],
                    ..Default::default()
                }),
                ..Default::default()
            })
            .unwrap()
            .of(Priority::Default)
            .to_owned()
        };
        let default = limits(None, None);
        assert_eq!((default.retry_limit(0), default.retry_limit(100)), (3, 20));
        let fixed = limits(Some(7), None);
        assert_eq!((fixed.retry_limit(0), fixed.retry_limit(100)), (7, 7));
        let given = limits(Some(7), Some((50.0, 1)));
        assert_eq!((given.retry_limit(0), given.retry_limit(100)), (1, 50));
    }
}
