//! Clusters, compiled.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use serin_xds::pb::envoy::config::cluster::v3 as cluster;
use serin_xds::pb::envoy::config::core::v3 as core;

use super::balancing::{Balancing, Hashing, ZoneAware};
pub use super::balancing::{LbPolicy, SlowStart};
use super::convert::{self, each};
use super::discovery::compile_discovery;
pub use super::discovery::{Discovery, Family};
use super::endpoint::Endpoint;
use super::health_check::{HealthCheck, MAX_CHECKS};
use super::http2::Http2Options;
use super::outlier::compile_outlier;
pub use super::outlier::{FailurePercentage, Outlier, SuccessRate};
use super::subset::Subsets;
use super::table::strip_port;
use super::transport_socket::{SocketMatch, UpstreamSocket};
pub use super::upstream_http::{Breakers, Limits, Priority, UpstreamHttp};
use super::upstream_http::{compile_http, compile_limits, http_options, http2_options};
use crate::error::{Refusal, Within};
use crate::metrics::peer::ServiceIdentity;
use crate::policy::filter_state::{Factory, FilterState};
use crate::tls::secret::SecretSlot;
use crate::tls::table::{SecretTable, Side};
use crate::upstream::connect::ConnectOptions;

/// Envoy's connect timeout when none is given.
const DEFAULT_CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Envoy's idle timeout of upstream connections.
const DEFAULT_IDLE_TIMEOUT: Duration = Duration::from_secs(3600);

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
    /// How reports of hosts become weights, where the policy goes by them.
    pub reporting: Option<Arc<super::balancing::reported::Reporting>>,
    /// Whether locality weights count.
    pub locality_weighted: bool,
    /// Whether zones count.
    pub zone_aware: Option<ZoneAware>,
    /// Names and limits of consistent hashing.
    pub hashing: Hashing,
    /// Groups of endpoints.
    pub subsets: Option<Box<Subsets>>,
    /// Percent of healthy hosts below which health is ignored.
    pub panic_threshold: f64,
    /// Protocol.
    pub http: UpstreamHttp,
    /// Circuit breakers.
    pub limits: Breakers,
    /// Outlier detection.
    pub outlier: Option<Box<Outlier>>,
    /// Active health checks.
    pub health_checks: Box<[HealthCheck]>,
    /// How new hosts begin.
    pub slow_start: Option<SlowStart>,
    /// Source address of connections.
    pub bind: Option<IpAddr>,
    /// Idle connections are closed after this.
    pub idle_timeout: Duration,
    /// Connections take no more requests after this.
    pub max_connection_duration: Option<Duration>,
    /// Connections are closed after this many requests; 0 for no limit.
    pub max_requests_per_connection: u32,
    /// TCP keepalive: idle time, interval, probes.
    pub keepalive: Option<(Duration, Duration, u32)>,
    /// HTTP/2: what endpoints may send, and whether they are asked if they live.
    pub http2: Http2Options,
    /// HTTP/2 streams per connection that we use at most.
    pub max_streams: u32,
    /// Which service it is (`istio.services`).
    pub service: Option<Arc<ServiceIdentity>>,
    /// What logs and headers may say of it.
    pub metadata: Option<convert::EncodedMetadata>,
    /// How connections are dressed unless an entry of `sockets` fits the endpoint.
    pub socket: Arc<UpstreamSocket>,
    /// `transport_socket_matches`.
    pub sockets: Box<[SocketMatch]>,
    /// The server name is the request's host, or this field of it.
    pub auto_sni: Option<http::HeaderName>,
    /// Whether `istio.alpn` says what TLS offers; the cluster's metadata may forbid it.
    pub alpn_overridable: bool,
    /// Its own endpoints as they came, where they are names that are resolved again and again.
    pub to_resolve: Option<Box<serin_xds::pb::envoy::config::endpoint::v3::ClusterLoadAssignment>>,
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
        let has_tls =
            sockets.default.tls.is_some() || sockets.matches.iter().any(|entry| entry.socket.tls.is_some());
        let balancing = Balancing::compile(from)?;
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
            to_resolve: match (&discovery, &from.load_assignment) {
                (Discovery::Dns { .. }, Some(own)) => Some(Box::new(own.clone())),
                _ => None,
            },
            discovery,
            connect_timeout: convert::timeout(from.connect_timeout.as_ref())
                .within("connect_timeout")?
                .unwrap_or(DEFAULT_CONNECT_TIMEOUT),
            lb: balancing.lb,
            locality_weighted: balancing.locality_weighted,
            zone_aware: balancing.zone_aware,
            hashing: balancing.hashing,
            reporting: balancing.reporting,
            subsets: balancing.subsets,
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
                .within("outlier_detection")?
                .map(Box::new),
            health_checks: compile_health_checks(from)?,
            slow_start: balancing.slow_start,
            bind: compile_bind(from)?,
            idle_timeout,
            max_connection_duration: convert::timeout(
                common
                    .as_ref()
                    .and_then(|options| options.max_connection_duration.as_ref()),
            )
            .within("max_connection_duration")?,
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
            http2: Http2Options::compile(http2_options(from).as_ref(), None)
                .within("http2_protocol_options")?,
            max_streams: http2_options(from)
                .and_then(|options| options.max_concurrent_streams)
                .map_or(1024, |value| value.value.max(1)),
            service: ServiceIdentity::of_cluster(from.metadata.as_ref()),
            metadata: convert::EncodedMetadata::of(from.metadata.as_ref()),
            socket: sockets.default,
            sockets: sockets.matches,
            auto_sni: sockets.auto_sni,
            alpn_overridable: has_tls
                && convert::metadata_string(from.metadata.as_ref(), "istio", "alpn_override")
                    != Some("false"),
        })
    }

    /// How connections to `endpoint` are dressed.
    pub fn socket_for(&self, endpoint: &Endpoint) -> &Arc<UpstreamSocket> {
        self.sockets
            .iter()
            .find(|entry| entry.fits(endpoint.socket_metadata()))
            .map_or(&self.socket, |entry| &entry.socket)
    }

    /// Options of connections for a request with these headers, or for a connection, from `source` to `destination`, for
    /// which filters have set this state. What they say goes before what the cluster says.
    pub fn connect_options(
        &self,
        headers: Option<&http::HeaderMap>,
        state: &FilterState,
        source: SocketAddr,
        destination: SocketAddr,
    ) -> ConnectOptions {
        let tells = self.tells_clients();
        let mut out = ConnectOptions {
            between: tells.then_some((source, destination)),
            tlvs: state.tlvs.clone().filter(|_| tells),
            ..ConnectOptions::default()
        };
        if !state.is_empty() {
            let known = |factory| state.known(factory).map(Box::from);
            out.server_name = known(Factory::ServerName);
            out.peer_names = known(Factory::PeerNames);
            out.alpn = state
                .known(Factory::Protocols)
                .map(|names| names.split(',').map(|name| name.as_bytes().to_vec()).collect());
            out.shared = state.shared();
        }
        if out.server_name.is_none() {
            out.server_name = headers.and_then(|headers| self.request_server_name(headers));
        }
        out
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
                default: UpstreamSocket::plain(),
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
    let preconnects = from.preconnect_policy.as_ref().is_some_and(|policy| {
        let ratios = [
            policy.per_upstream_preconnect_ratio.as_ref(),
            policy.predictive_preconnect_ratio.as_ref(),
        ];
        ratios.into_iter().flatten().any(|ratio| ratio.value > 1.0)
    });
    let unsupported = [
        (
            "preconnect_policy",
            preconnects,
            "no connections are made ahead of requests; leave it out or set its ratios to 1",
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

fn compile_health_checks(from: &cluster::Cluster) -> Result<Box<[HealthCheck]>, Refusal> {
    if from.health_checks.len() > MAX_CHECKS {
        return Err(Refusal::new(
            "health_checks",
            format!("more than {MAX_CHECKS} are not supported"),
        ));
    }
    each(&from.health_checks, "health_checks", HealthCheck::compile)
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
        assert_eq!(cluster.limits, Breakers::default());
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
}
