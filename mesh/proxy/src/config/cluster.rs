//! Clusters, compiled.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use serin_xds::pb::envoy::config::cluster::v3 as cluster;
use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::envoy::extensions::upstreams::http::v3 as upstream_http;

use super::convert;
use super::health_check::{HealthCheck, MAX_CHECKS};
use super::endpoint::Endpoint;
use super::table::strip_port;
use super::transport_socket::{SocketMatch, UpstreamSocket};
use crate::error::{Refusal, Within};
use crate::metrics::peer::ServiceIdentity;
use crate::tls::secret::SecretSlot;
use crate::tls::table::{SecretTable, Side};
use crate::upstream::connect::ConnectOptions;

/// Envoy's connect timeout when none is given.
const DEFAULT_CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Envoy's idle timeout of upstream connections.
const DEFAULT_IDLE_TIMEOUT: Duration = Duration::from_secs(3600);
/// How often names are resolved again when nothing else is said (Envoy's default).
const DEFAULT_DNS_REFRESH: Duration = Duration::from_secs(5);
const HTTP_OPTIONS: &str = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions";

/// Where the endpoints come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Discovery {
    /// From the cluster itself.
    Static,
    /// From EDS under this name.
    Eds(Box<str>),
    /// Names of the cluster's own assignment are resolved again and again.
    Dns {
        /// Only the first address is used, and old connections are kept.
        logical: bool,
        /// Interval.
        refresh: Duration,
        /// Which addresses count.
        family: Family,
    },
    /// The address that the client wanted to reach; the port may be replaced.
    OriginalDst {
        /// Replacement of the port.
        port: Option<u16>,
    },
}

/// Which of a name's addresses are used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// IPv4 only.
    V4,
    /// IPv6 only.
    V6,
    /// IPv4, or IPv6 when there is none.
    V4First,
    /// IPv6, or IPv4 when there is none (Envoy's AUTO).
    V6First,
    /// Both.
    All,
}

impl Family {
    /// The addresses that count.
    pub fn choose(self, mut addresses: Vec<std::net::SocketAddr>) -> Vec<std::net::SocketAddr> {
        let (v4, v6) = (
            addresses.iter().any(|a| a.is_ipv4()),
            addresses.iter().any(|a| a.is_ipv6()),
        );
        match self {
            Self::V4 => addresses.retain(|a| a.is_ipv4()),
            Self::V6 => addresses.retain(|a| a.is_ipv6()),
            Self::V4First if v4 => addresses.retain(|a| a.is_ipv4()),
            Self::V6First if v6 => addresses.retain(|a| a.is_ipv6()),
            Self::V4First | Self::V6First | Self::All => {}
        }
        addresses
    }
}

/// How an endpoint is chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LbPolicy {
    /// In turn, by weight.
    RoundRobin,
    /// The one with fewer requests on their way, of that many drawn at random.
    LeastRequest {
        /// How many are drawn.
        choices: u32,
    },
    /// At random, by weight.
    Random,
    /// Consistent hashing on a ring of at least that many points.
    RingHash {
        /// Points.
        minimum: u64,
    },
    /// Consistent hashing by a Maglev table.
    Maglev {
        /// Entries.
        size: u64,
    },
}

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

/// Outlier detection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outlier {
    /// 5xx in a row; `None` when not enforced.
    pub consecutive_5xx: Option<u32>,
    /// Gateway errors in a row.
    pub consecutive_gateway: Option<u32>,
    /// Local failures in a row (split mode only).
    pub consecutive_local: Option<u32>,
    /// Local failures are counted apart.
    pub split_local: bool,
    /// First ejection.
    pub base_ejection: Duration,
    /// Longest ejection.
    pub max_ejection: Duration,
    /// Of all hosts.
    pub max_ejection_percent: u32,
    /// One host may always be ejected.
    pub always_one: bool,
    /// How often hosts are compared with each other.
    pub interval: Duration,
    /// A host whose success rate is that far below the others'.
    pub success_rate: Option<SuccessRate>,
    /// A host that fails that often.
    pub failure_percentage: Option<FailurePercentage>,
    /// A passed active check ends an ejection.
    pub uneject_on_check: bool,
}

impl Outlier {
    /// Whether hosts are compared with each other at all.
    pub fn compares(&self) -> bool {
        self.success_rate.is_some() || self.failure_percentage.is_some()
    }
}

/// Ejection by success rate: below `mean - stdev * factor` of the hosts with enough requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SuccessRate {
    /// Hosts with enough requests that it takes.
    pub minimum_hosts: u32,
    /// Requests of an interval that it takes.
    pub request_volume: u32,
    /// In thousandths of a standard deviation.
    pub stdev_factor: u32,
    /// Whether it applies to answers, and to local failures (split mode).
    pub enforced: (bool, bool),
}

/// Ejection by failure percentage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FailurePercentage {
    /// Percent of failures from which on a host goes.
    pub threshold: u32,
    /// Hosts with enough requests that it takes.
    pub minimum_hosts: u32,
    /// Requests of an interval that it takes.
    pub request_volume: u32,
    /// Whether it applies to answers, and to local failures (split mode).
    pub enforced: (bool, bool),
}

/// New hosts get their share little by little.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SlowStart {
    /// How long it takes.
    pub window: Duration,
    /// Exponent of the curve; 1 is a straight line.
    pub aggression: f64,
    /// Least share, of 1.
    pub least: f64,
}

impl SlowStart {
    /// The part of its weight that a host has after `age`.
    pub fn factor(&self, age: Duration) -> f64 {
        if age >= self.window {
            return 1.0;
        }
        // Envoy's curve: (age / window) ^ (1 / aggression).
        let share = age.as_secs_f64() / self.window.as_secs_f64();
        share.powf(1.0 / self.aggression).clamp(self.least, 1.0)
    }
}

/// A compiled cluster.
#[derive(Debug)]
pub struct Cluster {
    /// Its name.
    pub name: Arc<str>,
    /// Where its endpoints come from.
    pub discovery: Discovery,
    /// Limit for a connection to be made.
    pub connect_timeout: Duration,
    /// Balancer.
    pub lb: LbPolicy,
    /// Whether locality weights count.
    pub locality_weighted: bool,
    /// Percent of healthy hosts below which health is ignored.
    pub panic_threshold: f64,
    /// Protocol.
    pub http: UpstreamHttp,
    /// Limits.
    pub limits: Limits,
    /// Limits of high priority requests are not kept apart; see the crate docs.
    pub outlier: Option<Outlier>,
    /// Active health checks.
    pub health_checks: Box<[HealthCheck]>,
    /// How new hosts begin.
    pub slow_start: Option<SlowStart>,
    /// Source address of connections.
    pub bind: Option<IpAddr>,
    /// Idle connections are closed after this.
    pub idle_timeout: Duration,
    /// Connections are closed after this many requests; 0 for no limit.
    pub max_requests_per_connection: u32,
    /// TCP keepalive: idle time, interval, probes.
    pub keepalive: Option<(Duration, Duration, u32)>,
    /// HTTP/2 streams per connection that we use at most.
    pub max_streams: u32,
    /// Which service it is (`istio.services`).
    pub service: Option<Arc<ServiceIdentity>>,
    /// How connections are dressed unless an entry of `sockets` fits the endpoint.
    pub socket: Arc<UpstreamSocket>,
    /// `transport_socket_matches`.
    pub sockets: Box<[SocketMatch]>,
    /// The server name is the request's host, or this field of it.
    pub auto_sni: Option<http::HeaderName>,
    /// Its own endpoints (static and DNS).
    pub load_assignment: Option<serin_xds::pb::envoy::config::endpoint::v3::ClusterLoadAssignment>,
}

impl Cluster {
    /// Whether a passed active check ends an ejection.
    pub fn unejects_on_check(&self) -> bool {
        self.outlier
            .as_ref()
            .is_some_and(|outlier| outlier.uneject_on_check)
    }

    /// Compiles the message; sockets that `previous` has as well are taken over.
    pub(crate) fn compile(
        from: &cluster::Cluster,
        secrets: &mut SecretTable,
        previous: Option<&Self>,
    ) -> Result<Self, Refusal> {
        refuse_unsupported(from)?;
        let (http, common) = compile_http(from)?;
        let sockets = Sockets::compile(from, secrets, previous)?;
        let (lb, locality_weighted) = compile_lb(from)?;
        let discovery = compile_discovery(from)?;
        let common_lb = from.common_lb_config.as_ref();
        let idle_timeout = match common.as_ref().and_then(|options| options.idle_timeout.as_ref()) {
            None => DEFAULT_IDLE_TIMEOUT,
            // Zero switches the timer off.
            Some(value) => {
                let value = convert::duration(value).within("idle_timeout")?;
                if value.is_zero() { Duration::MAX } else { value }
            }
        };
        let max_requests = common
            .as_ref()
            .and_then(|options| options.max_requests_per_connection.as_ref())
            .or(from.max_requests_per_connection.as_ref());
        Ok(Self {
            name: from.name.as_str().into(),
            discovery,
            connect_timeout: convert::timeout(from.connect_timeout.as_ref())
                .within("connect_timeout")?
                .unwrap_or(DEFAULT_CONNECT_TIMEOUT),
            lb,
            locality_weighted,
            panic_threshold: common_lb
                .and_then(|config| config.healthy_panic_threshold.as_ref())
                .map_or(50.0, |percent| percent.value),
            http,
            limits: compile_limits(from)?,
            outlier: from
                .outlier_detection
                .as_ref()
                .map(compile_outlier)
                .transpose()
                .within("outlier_detection")?,
            health_checks: compile_health_checks(from)?,
            slow_start: compile_slow_start(from)?,
            bind: compile_bind(from)?,
            idle_timeout,
            max_requests_per_connection: max_requests.map_or(0, |value| value.value),
            keepalive: from
                .upstream_connection_options
                .as_ref()
                .and_then(|options| options.tcp_keepalive.as_ref())
                .map(|keepalive| {
                    // Linux's own defaults where nothing is said.
                    let seconds = |value: &Option<serin_xds::pb::google::protobuf::UInt32Value>, default| {
                        Duration::from_secs(u64::from(value.as_ref().map_or(default, |value| value.value)))
                    };
                    (
                        seconds(&keepalive.keepalive_time, 7200),
                        seconds(&keepalive.keepalive_interval, 75),
                        keepalive.keepalive_probes.as_ref().map_or(9, |value| value.value),
                    )
                }),
            max_streams: http2_options(from)
                .and_then(|options| options.max_concurrent_streams)
                .map_or(1024, |value| value.value.max(1)),
            service: ServiceIdentity::of_cluster(from.metadata.as_ref()),
            socket: sockets.default,
            sockets: sockets.matches,
            auto_sni: sockets.auto_sni,
            load_assignment: from.load_assignment.clone(),
        })
    }

    /// How connections to `endpoint` are dressed.
    pub fn socket_for(&self, endpoint: &Endpoint) -> &Arc<UpstreamSocket> {
        self.sockets
            .iter()
            .find(|entry| entry.fits(endpoint.socket_metadata.as_ref()))
            .map_or(&self.socket, |entry| &entry.socket)
    }

    /// Options of connections for a request with these headers, from `source` to `destination`.
    pub fn connect_options(
        &self,
        headers: &http::HeaderMap,
        source: SocketAddr,
        destination: SocketAddr,
    ) -> ConnectOptions {
        ConnectOptions {
            server_name: self.request_server_name(headers),
            between: self.tells_clients().then_some((source, destination)),
        }
    }

    /// The server name that follows the request, where the cluster wants that.
    pub fn request_server_name(&self, headers: &http::HeaderMap) -> Option<Box<str>> {
        let value = headers.get(self.auto_sni.as_ref()?)?.to_str().ok()?;
        let name = strip_port(value);
        let is_address = name.parse::<IpAddr>().is_ok() || name.starts_with('[');
        (!is_address && !name.is_empty()).then(|| name.to_ascii_lowercase().into())
    }

    /// Whether endpoints are told who the client is, so that connections cannot be shared between clients.
    pub fn tells_clients(&self) -> bool {
        self.socket.proxy_protocol.is_some()
            || self
                .sockets
                .iter()
                .any(|entry| entry.socket.proxy_protocol.is_some())
    }

    /// The slots of secrets that it needs.
    pub fn secrets(&self) -> impl Iterator<Item = &Arc<SecretSlot>> {
        std::iter::once(&self.socket)
            .chain(self.sockets.iter().map(|entry| &entry.socket))
            .filter_map(|socket| socket.tls.as_ref())
            .flat_map(|tls| tls.secrets())
    }
}

/// The transport sockets of a cluster.
struct Sockets {
    default: Arc<UpstreamSocket>,
    matches: Box<[SocketMatch]>,
    auto_sni: Option<http::HeaderName>,
}

impl Sockets {
    fn compile(
        from: &cluster::Cluster,
        secrets: &mut SecretTable,
        previous: Option<&Cluster>,
    ) -> Result<Self, Refusal> {
        let known: Vec<_> = previous
            .into_iter()
            .flat_map(|old| std::iter::once(&old.socket).chain(old.sockets.iter().map(|entry| &entry.socket)))
            .cloned()
            .collect();
        let options = http_options(from)?.and_then(|options| options.upstream_http_protocol_options);
        let options = options
            .or_else(|| from.upstream_http_protocol_options.clone())
            .unwrap_or_default();
        let auto_sni = if !options.override_auto_sni_header.is_empty() {
            Some(
                options
                    .override_auto_sni_header
                    .parse()
                    .map_err(|_| Refusal::new("override_auto_sni_header", "is not the name of a header"))?,
            )
        } else {
            options.auto_sni.then_some(http::header::HOST)
        };
        if from.transport_socket.is_none() && from.transport_socket_matches.is_empty() {
            return Ok(Self {
                default: Arc::default(),
                matches: Box::default(),
                auto_sni,
            });
        }
        let stats = secrets.stats(Side::Cluster, &from.name);
        let mut compile = |socket: Option<&core::TransportSocket>| {
            UpstreamSocket::compile(socket, options.auto_san_validation, secrets, &stats, &known)
        };
        let default = compile(from.transport_socket.as_ref()).within("transport_socket")?;
        let matches = from
            .transport_socket_matches
            .iter()
            .enumerate()
            .map(|(index, entry)| {
                compile(entry.transport_socket.as_ref())
                    .map(|socket| SocketMatch::new(&entry.name, entry.r#match.as_ref(), socket))
                    .within(format!("transport_socket_matches[{index}].transport_socket"))
            })
            .collect::<Result<_, _>>()?;
        Ok(Self {
            default,
            matches,
            auto_sni,
        })
    }
}

fn refuse_unsupported(from: &cluster::Cluster) -> Result<(), Refusal> {
    let unsupported = [
        (
            "lb_subset_config",
            from.lb_subset_config.is_some(),
            "subsets are clusters of their own here",
        ),
        (
            "load_balancing_policy",
            from.load_balancing_policy.is_some(),
            "use lb_policy",
        ),
        (
            "queuing_policies",
            from.queuing_policies.is_some(),
            "not supported",
        ),
        ("upstream_config", from.upstream_config.is_some(), "not supported"),
        (
            "connection_pool_per_downstream_connection",
            from.connection_pool_per_downstream_connection,
            "not supported yet",
        ),
    ];
    match unsupported.iter().find(|(_, present, _)| *present) {
        Some((field, _, reason)) => Err(Refusal::new(*field, *reason)),
        None => Ok(()),
    }
}

fn compile_discovery(from: &cluster::Cluster) -> Result<Discovery, Refusal> {
    use cluster::cluster::{ClusterDiscoveryType, DiscoveryType, LbConfig};
    let kind = match &from.cluster_discovery_type {
        None => DiscoveryType::Static,
        Some(ClusterDiscoveryType::Type(number)) => DiscoveryType::try_from(*number)
            .map_err(|_| Refusal::new("type", format!("{number} is unknown")))?,
        Some(ClusterDiscoveryType::ClusterType(custom)) => {
            return Err(Refusal::new(
                "cluster_type",
                format!("{:?} is not supported", custom.name),
            ));
        }
    };
    Ok(match kind {
        DiscoveryType::Static => Discovery::Static,
        DiscoveryType::Eds => {
            let service = from
                .eds_cluster_config
                .as_ref()
                .map_or("", |config| config.service_name.as_str());
            Discovery::Eds(
                if service.is_empty() {
                    from.name.as_str()
                } else {
                    service
                }
                .into(),
            )
        }
        DiscoveryType::StrictDns | DiscoveryType::LogicalDns => Discovery::Dns {
            logical: kind == DiscoveryType::LogicalDns,
            family: match cluster::cluster::DnsLookupFamily::try_from(from.dns_lookup_family) {
                Ok(cluster::cluster::DnsLookupFamily::V4Only) => Family::V4,
                Ok(cluster::cluster::DnsLookupFamily::V6Only) => Family::V6,
                Ok(cluster::cluster::DnsLookupFamily::V4Preferred) => Family::V4First,
                Ok(cluster::cluster::DnsLookupFamily::All) => Family::All,
                Ok(cluster::cluster::DnsLookupFamily::Auto) | Err(_) => Family::V6First,
            },
            refresh: convert::timeout(from.dns_refresh_rate.as_ref())
                .within("dns_refresh_rate")?
                .unwrap_or(DEFAULT_DNS_REFRESH),
        },
        DiscoveryType::OriginalDst => {
            let mut port = None;
            if let Some(LbConfig::OriginalDstLbConfig(config)) = &from.lb_config {
                if config.use_http_header || config.metadata_key.is_some() {
                    return Err(Refusal::new(
                        "original_dst_lb_config",
                        "destinations named by headers or metadata are not supported",
                    ));
                }
                port = config
                    .upstream_port_override
                    .as_ref()
                    .and_then(|port| u16::try_from(port.value).ok());
            }
            Discovery::OriginalDst { port }
        }
    })
}

fn compile_lb(from: &cluster::Cluster) -> Result<(LbPolicy, bool), Refusal> {
    use cluster::cluster::{LbConfig, LbPolicy as Policy, common_lb_config::LocalityConfigSpecifier};
    let policy = match Policy::try_from(from.lb_policy) {
        Ok(Policy::RoundRobin | Policy::ClusterProvided) => LbPolicy::RoundRobin,
        Ok(Policy::LeastRequest) => {
            let mut choices = 2;
            if let Some(LbConfig::LeastRequestLbConfig(config)) = &from.lb_config {
                choices = config
                    .choice_count
                    .as_ref()
                    .map_or(2, |count| count.value.clamp(2, 16));
            }
            LbPolicy::LeastRequest { choices }
        }
        Ok(Policy::Random) => LbPolicy::Random,
        Ok(Policy::RingHash) => {
            let mut minimum = 1024;
            if let Some(LbConfig::RingHashLbConfig(config)) = &from.lb_config {
                minimum = config
                    .minimum_ring_size
                    .as_ref()
                    .map_or(1024, |size| size.value.clamp(1, 1 << 20));
            }
            LbPolicy::RingHash { minimum }
        }
        Ok(Policy::Maglev) => {
            let mut size = 65_537;
            if let Some(LbConfig::MaglevLbConfig(config)) = &from.lb_config {
                size = config
                    .table_size
                    .as_ref()
                    .map_or(65_537, |size| size.value.clamp(2, 5_000_011));
            }
            LbPolicy::Maglev { size }
        }
        Ok(Policy::LoadBalancingPolicyConfig) => {
            return Err(Refusal::new(
                "lb_policy",
                "load_balancing_policy is not supported, use lb_policy",
            ));
        }
        Err(_) => {
            return Err(Refusal::new(
                "lb_policy",
                format!("{} is unknown", from.lb_policy),
            ));
        }
    };
    let specifier = from
        .common_lb_config
        .as_ref()
        .and_then(|config| config.locality_config_specifier.as_ref());
    let weighted = matches!(
        specifier,
        Some(LocalityConfigSpecifier::LocalityWeightedLbConfig(_))
    );
    Ok((policy, weighted))
}

fn compile_slow_start(from: &cluster::Cluster) -> Result<Option<SlowStart>, Refusal> {
    use cluster::cluster::LbConfig;
    let config = match &from.lb_config {
        Some(LbConfig::LeastRequestLbConfig(config)) => config.slow_start_config.as_ref(),
        Some(LbConfig::RoundRobinLbConfig(config)) => config.slow_start_config.as_ref(),
        _ => None,
    };
    let Some(config) = config else { return Ok(None) };
    let Some(window) = convert::timeout(config.slow_start_window.as_ref()).within("slow_start_window")?
    else {
        return Ok(None);
    };
    let aggression = config
        .aggression
        .as_ref()
        .map_or(1.0, |value| value.default_value);
    if !(aggression.is_finite() && aggression > 0.0) {
        return Err(Refusal::new(
            "slow_start_config.aggression",
            format!("{aggression} is not above zero"),
        ));
    }
    Ok(Some(SlowStart {
        window,
        aggression,
        least: config
            .min_weight_percent
            .as_ref()
            .map_or(0.1, |percent| (percent.value / 100.0).clamp(0.0, 1.0)),
    }))
}

fn compile_health_checks(from: &cluster::Cluster) -> Result<Box<[HealthCheck]>, Refusal> {
    if from.health_checks.len() > MAX_CHECKS {
        return Err(Refusal::new(
            "health_checks",
            format!("more than {MAX_CHECKS} are not supported"),
        ));
    }
    from.health_checks
        .iter()
        .enumerate()
        .map(|(index, check)| HealthCheck::compile(check).within(format!("health_checks[{index}]")))
        .collect()
}

fn http_options(from: &cluster::Cluster) -> Result<Option<upstream_http::HttpProtocolOptions>, Refusal> {
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

fn compile_http(
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

fn http2_options(from: &cluster::Cluster) -> Option<core::Http2ProtocolOptions> {
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

fn compile_limits(from: &cluster::Cluster) -> Result<Limits, Refusal> {
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

fn compile_outlier(from: &cluster::OutlierDetection) -> Result<Outlier, Refusal> {
    let value = |given: &Option<serin_xds::pb::google::protobuf::UInt32Value>, default: u32| {
        given.as_ref().map_or(default, |value| value.value)
    };
    // A counter is enforced with the given probability; ours are enforced always or never.
    let enforced = |threshold: u32, percent: u32| (percent > 0 && threshold > 0).then_some(threshold);
    let split = from.split_external_local_origin_errors;
    let rate = (
        value(&from.enforcing_success_rate, 100) > 0,
        split && value(&from.enforcing_local_origin_success_rate, 100) > 0,
    );
    let percentage = (
        value(&from.enforcing_failure_percentage, 0) > 0,
        split && value(&from.enforcing_failure_percentage_local_origin, 0) > 0,
    );
    let base = convert::timeout(from.base_ejection_time.as_ref())
        .within("base_ejection_time")?
        .unwrap_or(Duration::from_secs(30));
    let max = convert::timeout(from.max_ejection_time.as_ref())
        .within("max_ejection_time")?
        .unwrap_or(Duration::from_secs(300).max(base));
    Ok(Outlier {
        consecutive_5xx: enforced(
            value(&from.consecutive_5xx, 5),
            value(&from.enforcing_consecutive_5xx, 100),
        ),
        consecutive_gateway: enforced(
            value(&from.consecutive_gateway_failure, 5),
            value(&from.enforcing_consecutive_gateway_failure, 0),
        ),
        consecutive_local: enforced(
            value(&from.consecutive_local_origin_failure, 5),
            value(&from.enforcing_consecutive_local_origin_failure, 100),
        ),
        split_local: from.split_external_local_origin_errors,
        base_ejection: base,
        max_ejection: max,
        max_ejection_percent: value(&from.max_ejection_percent, 10).min(100),
        always_one: from
            .always_eject_one_host
            .as_ref()
            .is_some_and(|value| value.value),
        interval: convert::timeout(from.interval.as_ref())
            .within("interval")?
            .unwrap_or(Duration::from_secs(10)),
        success_rate: (rate.0 || rate.1).then(|| SuccessRate {
            minimum_hosts: value(&from.success_rate_minimum_hosts, 5),
            request_volume: value(&from.success_rate_request_volume, 100),
            stdev_factor: value(&from.success_rate_stdev_factor, 1900),
            enforced: rate,
        }),
        failure_percentage: (percentage.0 || percentage.1).then(|| FailurePercentage {
            threshold: value(&from.failure_percentage_threshold, 85),
            minimum_hosts: value(&from.failure_percentage_minimum_hosts, 5),
            request_volume: value(&from.failure_percentage_request_volume, 50),
            enforced: percentage,
        }),
        uneject_on_check: from
            .successful_active_health_check_uneject_host
            .as_ref()
            .is_none_or(|value| value.value),
    })
}

fn compile_bind(from: &cluster::Cluster) -> Result<Option<IpAddr>, Refusal> {
    let Some(source) = from
        .upstream_bind_config
        .as_ref()
        .and_then(|bind| bind.source_address.as_ref())
    else {
        return Ok(None);
    };
    source.address.parse().map(Some).map_err(|_| {
        Refusal::new(
            "upstream_bind_config.source_address",
            format!("{:?} is no address", source.address),
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn compiled(message: &cluster::Cluster) -> Result<Cluster, Refusal> {
        Cluster::compile(message, &mut SecretTable::default(), None)
    }

    #[test]
    fn what_a_cluster_does_not_say_is_envoys_default() {
        let cluster = compiled(&cluster::Cluster {
            name: "c".into(),
            ..Default::default()
        })
        .unwrap();
        assert_eq!(cluster.limits, Limits::default());
        assert_eq!(cluster.connect_timeout, Duration::from_secs(5));
        assert_eq!(cluster.lb, LbPolicy::RoundRobin);
        assert_eq!(cluster.http, UpstreamHttp::Http1);
        assert!(cluster.outlier.is_none());
    }

    #[test]
    fn an_eds_cluster_asks_for_its_service_name_or_its_own() {
        let mut message = cluster::Cluster {
            name: "outbound|80||a".into(),
            cluster_discovery_type: Some(cluster::cluster::ClusterDiscoveryType::Type(
                cluster::cluster::DiscoveryType::Eds as i32,
            )),
            ..Default::default()
        };
        assert_eq!(
            compiled(&message).unwrap().discovery,
            Discovery::Eds("outbound|80||a".into())
        );
        message.eds_cluster_config = Some(cluster::cluster::EdsClusterConfig {
            service_name: "other".into(),
            ..Default::default()
        });
        assert_eq!(
            compiled(&message).unwrap().discovery,
            Discovery::Eds("other".into())
        );
    }

    #[test]
    fn a_transport_socket_that_is_not_known_is_refused_by_name() {
        let message = cluster::Cluster {
            name: "c".into(),
            transport_socket: Some(core::TransportSocket {
                name: "envoy.transport_sockets.starttls".into(),
                ..Default::default()
            }),
            ..Default::default()
        };
        assert_eq!(
            compiled(&message).unwrap_err().path,
            "transport_socket.typed_config"
        );
    }

    #[test]
    fn istios_outlier_detection_without_fields_ejects_after_five_5xx() {
        let outlier = compile_outlier(&cluster::OutlierDetection {
            enforcing_success_rate: Some(serin_xds::pb::google::protobuf::UInt32Value { value: 0 }),
            ..Default::default()
        })
        .unwrap();
        assert_eq!(outlier.consecutive_5xx, Some(5));
        assert_eq!(outlier.consecutive_gateway, None);
        assert_eq!(outlier.max_ejection_percent, 10);
    }
}
