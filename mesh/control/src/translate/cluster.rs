//! Services and policies → `envoy.config.cluster.v3.Cluster`, with Istio's names and defaults.

#![allow(deprecated)] // istiod sends these fields and Envoy 1.40 reads them; their successors are not everywhere yet

use std::time::Duration;

use serin_crds::istio::{
    ClientTlsMode, ConnectionPoolSettings, H2UpgradePolicy, LoadBalancerSettings, OutlierDetection, SimpleLb,
    TrafficPolicy,
};
use serin_model::{HostPolicy, Port, Resolution, Service};
use serin_xds::pb::envoy::config::cluster::v3 as pb;
use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::envoy::extensions::transport_sockets::tls::v3 as tls;
use serin_xds::pb::envoy::extensions::upstreams::http::v3 as upstream;
use serin_xds::pb::envoy::r#type::v3 as ty;
use serin_xds::pb::google::protobuf as wkt;

use super::wire;

/// Limit for connecting; Istio's default (Envoy's is 5 s).
const CONNECT_TIMEOUT: i64 = 10;
/// Limits that are not set are off.
const UNLIMITED: u32 = u32::MAX;
/// Minimum ring size; Istio's and Envoy's default.
const RING_SIZE: u64 = 1024;
/// How often names are resolved; Istio's default.
const DNS_REFRESH: i64 = 60;
/// Idle time of passed-through connections. They are many and short.
const PASSTHROUGH_IDLE: i64 = 300;
/// Address that inbound connections to the application are made from, so that interception can tell them.
const INBOUND_SOURCE: &str = "127.0.0.6";
/// Inbound clusters are never cleaned up: the one host is the application.
const NEVER: i64 = 9_223_372_035;

const HTTP_OPTIONS: &str = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions";

/// `outbound|80|v1|reviews.default.svc.cluster.local`
pub(super) fn name(port: u16, subset: &str, host: &str) -> String {
    format!("outbound|{port}|{subset}|{host}")
}

/// Who the clusters are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Side {
    Sidecar,
    Router,
}

/// The cluster of a port of a service, or of one of its subsets. None where the service needs none.
pub(super) fn outbound(
    service: &Service,
    port: &Port,
    subset: Option<&str>,
    policy: Option<&HostPolicy>,
    side: Side,
) -> pb::Cluster {
    let name = name(port.number, subset.unwrap_or(""), &service.host);
    let traffic = policy
        .map(|policy| policy.for_port(subset, port.number))
        .unwrap_or_default();
    let mut cluster = base(&name);
    let discovery = discovery(service, &traffic, side);
    cluster.cluster_discovery_type = Some(pb::cluster::ClusterDiscoveryType::Type(discovery as i32));
    match discovery {
        pb::cluster::DiscoveryType::Eds => {
            cluster.eds_cluster_config = Some(pb::cluster::EdsClusterConfig {
                eds_config: Some(wire::ads()),
                service_name: name.clone(),
            });
        }
        pb::cluster::DiscoveryType::StrictDns | pb::cluster::DiscoveryType::LogicalDns => {
            cluster.dns_lookup_family = pb::cluster::DnsLookupFamily::V4Only as i32;
            cluster.dns_refresh_rate = Some(wire::seconds(DNS_REFRESH));
            cluster.dns_jitter = Some(wire::duration(Duration::from_millis(100)));
            cluster.respect_dns_ttl = true;
        }
        pb::cluster::DiscoveryType::OriginalDst | pb::cluster::DiscoveryType::Static => {}
    }
    cluster.common_lb_config = Some(pb::cluster::CommonLbConfig {
        // No panic mode: better 503 than requests to endpoints that are known to be broken.
        healthy_panic_threshold: Some(ty::Percent { value: 0.0 }),
        ..Default::default()
    });
    if discovery == pb::cluster::DiscoveryType::OriginalDst {
        cluster.lb_policy = pb::cluster::LbPolicy::ClusterProvided as i32;
    } else {
        load_balancer(
            &mut cluster,
            traffic.load_balancer.as_ref(),
            traffic.outlier_detection.is_some(),
        );
    }
    zone_aware(&mut cluster, service);
    connection_pool(&mut cluster, traffic.connection_pool.as_ref());
    http_options(
        &mut cluster,
        port.protocol,
        traffic.connection_pool.as_ref(),
        side,
    );
    retry_budget(&mut cluster, &traffic);
    if let Some(outlier) = &traffic.outlier_detection {
        outlier_detection(&mut cluster, outlier);
    }
    let own_tls = traffic
        .tls
        .as_ref()
        .is_some_and(|tls| matches!(tls.mode, Some(ClientTlsMode::Simple | ClientTlsMode::Mutual)));
    cluster.metadata = Some(metadata(service, subset, policy, own_tls));
    client_tls(&mut cluster, &traffic, port);
    cluster
}

/// How endpoints are found: by the service, unless the policy passes connections through.
pub(super) fn discovery(
    service: &Service,
    traffic: &TrafficPolicy,
    side: Side,
) -> pb::cluster::DiscoveryType {
    let passthrough = traffic.load_balancer.as_ref().and_then(|lb| lb.simple) == Some(SimpleLb::Passthrough);
    match service.resolution {
        Resolution::Dns => pb::cluster::DiscoveryType::StrictDns,
        Resolution::DnsRoundRobin => pb::cluster::DiscoveryType::LogicalDns,
        // A gateway has no address that its caller asked for, so it picks an endpoint of a headless Service itself.
        Resolution::Passthrough if service.kubernetes && side == Side::Router => {
            pb::cluster::DiscoveryType::Eds
        }
        Resolution::Passthrough => pb::cluster::DiscoveryType::OriginalDst,
        Resolution::Endpoints | Resolution::Alias if passthrough => pb::cluster::DiscoveryType::OriginalDst,
        Resolution::Endpoints | Resolution::Alias => pb::cluster::DiscoveryType::Eds,
    }
}

fn base(name: &str) -> pb::Cluster {
    pb::Cluster {
        name: name.to_owned(),
        // The semicolon ends the name in statistics, where the next part follows a dot.
        alt_stat_name: format!("{name};"),
        connect_timeout: Some(wire::seconds(CONNECT_TIMEOUT)),
        circuit_breakers: Some(pb::CircuitBreakers {
            thresholds: vec![unlimited()],
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn unlimited() -> pb::circuit_breakers::Thresholds {
    pb::circuit_breakers::Thresholds {
        max_connections: Some(wire::uint32(UNLIMITED)),
        max_pending_requests: Some(wire::uint32(UNLIMITED)),
        max_requests: Some(wire::uint32(UNLIMITED)),
        max_retries: Some(wire::uint32(UNLIMITED)),
        ..Default::default()
    }
}

fn metadata(
    service: &Service,
    subset: Option<&str>,
    policy: Option<&HostPolicy>,
    overrides_alpn: bool,
) -> core::Metadata {
    let mut fields = vec![("services", services([service]))];
    if let Some(origin) = policy.and_then(|policy| policy.provenance.first()) {
        fields.push(("config", wire::text(&wire::config_path(origin))));
    }
    if let Some(subset) = subset {
        fields.push(("subset", wire::text(subset)));
    }
    if service.external {
        fields.push(("external", wire::flag(true)));
    }
    if overrides_alpn {
        // The destination speaks its own TLS: nobody must offer it the mesh's protocols.
        fields.push(("alpn_override", wire::text("false")));
    }
    wire::metadata("istio", wire::structure(fields))
}

fn services<'a>(services: impl IntoIterator<Item = &'a Service>) -> wkt::Value {
    wire::list(
        services
            .into_iter()
            .map(|service| {
                wire::object([
                    ("host", wire::text(&service.host)),
                    ("name", wire::text(&service.name)),
                    ("namespace", wire::text(&service.namespace)),
                ])
            })
            .collect(),
    )
}

fn load_balancer(cluster: &mut pb::Cluster, settings: Option<&LoadBalancerSettings>, ejecting: bool) {
    use pb::cluster::LbPolicy;
    let slow_start = settings.and_then(slow_start);
    if let Some(hash) = settings.and_then(|settings| settings.consistent_hash.as_ref()) {
        if let Some(maglev) = &hash.maglev {
            cluster.lb_policy = LbPolicy::Maglev as i32;
            cluster.lb_config = maglev.table_size.map(|size| {
                pb::cluster::LbConfig::MaglevLbConfig(pb::cluster::MaglevLbConfig {
                    table_size: Some(wkt::UInt64Value { value: size }),
                })
            });
        } else {
            let size = hash
                .ring_hash
                .as_ref()
                .and_then(|ring| ring.minimum_ring_size)
                .or(hash.minimum_ring_size);
            cluster.lb_policy = LbPolicy::RingHash as i32;
            cluster.lb_config = Some(pb::cluster::LbConfig::RingHashLbConfig(
                pb::cluster::RingHashLbConfig {
                    minimum_ring_size: Some(wkt::UInt64Value {
                        value: size.unwrap_or(RING_SIZE),
                    }),
                    ..Default::default()
                },
            ));
        }
    } else {
        match settings
            .and_then(|settings| settings.simple)
            .unwrap_or(SimpleLb::Unspecified)
        {
            SimpleLb::Random => cluster.lb_policy = LbPolicy::Random as i32,
            SimpleLb::RoundRobin => {
                cluster.lb_policy = LbPolicy::RoundRobin as i32;
                cluster.lb_config = slow_start.map(|slow_start| {
                    pb::cluster::LbConfig::RoundRobinLbConfig(pb::cluster::RoundRobinLbConfig {
                        slow_start_config: Some(slow_start),
                    })
                });
            }
            SimpleLb::Unspecified | SimpleLb::LeastConn | SimpleLb::LeastRequest | SimpleLb::Passthrough => {
                cluster.lb_policy = LbPolicy::LeastRequest as i32;
                cluster.lb_config = slow_start.map(|slow_start| {
                    pb::cluster::LbConfig::LeastRequestLbConfig(pb::cluster::LeastRequestLbConfig {
                        slow_start_config: Some(slow_start),
                        ..Default::default()
                    })
                });
            }
        }
    }
    let locality = settings.and_then(|settings| settings.locality_lb_setting.as_ref());
    let weighted = |locality: &serin_crds::istio::LocalityLbSetting| {
        locality.enabled != Some(false) && (ejecting || !locality.distribute.is_empty())
    };
    if locality.is_some_and(weighted)
        && let Some(common) = &mut cluster.common_lb_config
    {
        common.locality_config_specifier = Some(
            pb::cluster::common_lb_config::LocalityConfigSpecifier::LocalityWeightedLbConfig(
                Default::default(),
            ),
        );
    }
}

/// What the Service's topology mode asks for, unless its locality settings say more.
fn zone_aware(cluster: &mut pb::Cluster, service: &Service) {
    use pb::cluster::common_lb_config::LocalityConfigSpecifier;
    if service.topology_aware
        && let Some(common) = &mut cluster.common_lb_config
    {
        common
            .locality_config_specifier
            .get_or_insert_with(|| LocalityConfigSpecifier::ZoneAwareLbConfig(Default::default()));
    }
}

fn slow_start(settings: &LoadBalancerSettings) -> Option<pb::cluster::SlowStartConfig> {
    if let Some(warmup) = &settings.warmup {
        return Some(pb::cluster::SlowStartConfig {
            slow_start_window: warmup.duration.parse().ok().map(wire::duration),
            aggression: Some(core::RuntimeDouble {
                default_value: warmup.aggression.map_or(1.0, |aggression| aggression.0),
                // Envoy demands a key; this one is never looked up, for there is no runtime layer.
                runtime_key: "(".to_owned(),
            }),
            min_weight_percent: Some(ty::Percent {
                value: warmup.minimum_percent.map_or(10.0, |percent| percent.0),
            }),
        });
    }
    let window = settings.warmup_duration_secs.as_ref()?.parse().ok()?;
    Some(pb::cluster::SlowStartConfig {
        slow_start_window: Some(wire::duration(window)),
        ..Default::default()
    })
}

fn limit(value: Option<i32>) -> Option<wkt::UInt32Value> {
    value
        .and_then(|value| u32::try_from(value).ok())
        .filter(|value| *value > 0)
        .map(wire::uint32)
}

fn connection_pool(cluster: &mut pb::Cluster, pool: Option<&ConnectionPoolSettings>) {
    let Some(pool) = pool else { return };
    let mut thresholds = unlimited();
    if let Some(http) = &pool.http {
        thresholds.max_pending_requests =
            limit(http.http1_max_pending_requests).or(thresholds.max_pending_requests);
        thresholds.max_requests = limit(http.http2_max_requests).or(thresholds.max_requests);
        thresholds.max_retries = limit(http.max_retries).or(thresholds.max_retries);
    }
    if let Some(tcp) = &pool.tcp {
        thresholds.max_connections = limit(tcp.max_connections).or(thresholds.max_connections);
        if let Some(timeout) = tcp
            .connect_timeout
            .as_ref()
            .and_then(|timeout| timeout.parse().ok())
        {
            cluster.connect_timeout = Some(wire::duration(timeout));
        }
        if let Some(keepalive) = &tcp.tcp_keepalive {
            let whole = |value: Option<&serin_crds::istio::Duration>| {
                let seconds = value?.parse().ok()?.as_secs();
                u32::try_from(seconds).ok().map(wire::uint32)
            };
            let settings = core::TcpKeepalive {
                keepalive_probes: keepalive.probes.filter(|probes| *probes > 0).map(wire::uint32),
                keepalive_time: whole(keepalive.time.as_ref()),
                keepalive_interval: whole(keepalive.interval.as_ref()),
            };
            cluster.upstream_connection_options = Some(pb::UpstreamConnectionOptions {
                tcp_keepalive: Some(settings),
                ..Default::default()
            });
        }
    }
    cluster.circuit_breakers = Some(pb::CircuitBreakers {
        thresholds: vec![thresholds],
        ..Default::default()
    });
}

fn retry_budget(cluster: &mut pb::Cluster, traffic: &TrafficPolicy) {
    let Some(budget) = &traffic.retry_budget else {
        return;
    };
    if let Some(threshold) = cluster
        .circuit_breakers
        .as_mut()
        .and_then(|breakers| breakers.thresholds.first_mut())
    {
        threshold.retry_budget = Some(pb::circuit_breakers::thresholds::RetryBudget {
            budget_percent: Some(ty::Percent {
                value: budget.percent.map_or(20.0, |percent| percent.0),
            }),
            min_retry_concurrency: budget.min_retry_concurrency.map(wire::uint32),
            budget_interval: budget
                .budget_interval
                .as_ref()
                .and_then(|interval| interval.parse().ok())
                .map(wire::duration),
        });
    }
}

/// HTTP towards the endpoints: as the port says, as the policy says, or as the caller speaks where that is found out per connection.
fn http_options(
    cluster: &mut pb::Cluster,
    spoken: serin_model::Protocol,
    pool: Option<&ConnectionPoolSettings>,
    side: Side,
) {
    use upstream::http_protocol_options::explicit_http_config::ProtocolConfig;
    use upstream::http_protocol_options::{
        ExplicitHttpConfig, UpstreamProtocolOptions, UseDownstreamHttpConfig,
    };
    let auto = spoken == serin_model::Protocol::Auto;
    let http = pool.and_then(|pool| pool.http.as_ref());
    let parsed = |value: Option<&serin_crds::istio::Duration>| {
        value.and_then(|value| value.parse().ok()).map(wire::duration)
    };
    let common = core::HttpProtocolOptions {
        idle_timeout: parsed(http.and_then(|http| http.idle_timeout.as_ref())),
        max_connection_duration: parsed(
            pool.and_then(|pool| pool.tcp.as_ref())
                .and_then(|tcp| tcp.max_connection_duration.as_ref()),
        ),
        max_requests_per_connection: limit(http.and_then(|http| http.max_requests_per_connection)),
        ..Default::default()
    };
    let mut http2 = core::Http2ProtocolOptions {
        max_concurrent_streams: limit(http.and_then(|http| http.max_concurrent_streams)),
        ..Default::default()
    };
    if let Some(ping) = http.and_then(|http| http.http2_keep_alive.as_ref()) {
        http2.connection_keepalive = Some(core::KeepaliveSettings {
            interval: parsed(ping.interval.as_ref()),
            timeout: parsed(ping.timeout.as_ref()),
            ..Default::default()
        });
    }
    // What a sidecar finds out per connection stays as it came.
    let upgrade = (!auto || side == Side::Router)
        && http.and_then(|http| http.h2_upgrade_policy) == Some(H2UpgradePolicy::Upgrade);
    let as_caller = http.is_some_and(|http| http.use_client_protocol == Some(true));
    let protocol = if as_caller || (auto && side == Side::Sidecar && !upgrade) {
        UpstreamProtocolOptions::UseDownstreamProtocolConfig(UseDownstreamHttpConfig {
            http_protocol_options: Some(Default::default()),
            http2_protocol_options: Some(if auto { Default::default() } else { http2 }),
            ..Default::default()
        })
    } else if spoken.is_http2() || upgrade {
        UpstreamProtocolOptions::ExplicitHttpConfig(ExplicitHttpConfig {
            protocol_config: Some(ProtocolConfig::Http2ProtocolOptions(http2)),
        })
    } else if common == core::HttpProtocolOptions::default() {
        return;
    } else {
        UpstreamProtocolOptions::ExplicitHttpConfig(ExplicitHttpConfig {
            protocol_config: Some(ProtocolConfig::HttpProtocolOptions(Default::default())),
        })
    };
    set_http_options(
        cluster,
        (common != core::HttpProtocolOptions::default()).then_some(common),
        protocol,
    );
}

fn set_http_options(
    cluster: &mut pb::Cluster,
    common: Option<core::HttpProtocolOptions>,
    protocol: upstream::http_protocol_options::UpstreamProtocolOptions,
) {
    let options = upstream::HttpProtocolOptions {
        common_http_protocol_options: common,
        upstream_protocol_options: Some(protocol),
        ..Default::default()
    };
    cluster
        .typed_extension_protocol_options
        .insert(HTTP_OPTIONS.to_owned(), wire::any(&options));
}

fn outlier_detection(cluster: &mut pb::Cluster, from: &OutlierDetection) {
    let parsed = |value: Option<&serin_crds::istio::Duration>| {
        value.and_then(|value| value.parse().ok()).map(wire::duration)
    };
    let percent = |value: Option<i32>| {
        value
            .and_then(|value| u32::try_from(value).ok())
            .filter(|value| *value > 0)
            .map(wire::uint32)
    };
    // A count of 0 switches its kind of ejection off; any other switches it fully on.
    let enforcing = |count: Option<u32>| count.map(|count| wire::uint32(if count > 0 { 100 } else { 0 }));
    let count = |count: Option<u32>| count.map(wire::uint32);
    let mut out = pb::OutlierDetection {
        consecutive_5xx: count(from.consecutive_5xx_errors),
        enforcing_consecutive_5xx: enforcing(from.consecutive_5xx_errors),
        consecutive_gateway_failure: count(from.consecutive_gateway_errors),
        enforcing_consecutive_gateway_failure: enforcing(from.consecutive_gateway_errors),
        interval: parsed(from.interval.as_ref()),
        base_ejection_time: parsed(from.base_ejection_time.as_ref()),
        max_ejection_percent: percent(from.max_ejection_percent),
        // Success-rate ejection depends on traffic in ways that nobody expects; off, as in Istio.
        enforcing_success_rate: Some(wire::uint32(0)),
        ..Default::default()
    };
    if from.split_external_local_origin_errors == Some(true) {
        out.split_external_local_origin_errors = true;
        if let Some(failures) = from
            .consecutive_local_origin_failures
            .filter(|failures| *failures > 0)
        {
            out.consecutive_local_origin_failure = Some(wire::uint32(failures));
            out.enforcing_consecutive_local_origin_failure = Some(wire::uint32(100));
        }
        out.enforcing_local_origin_success_rate = Some(wire::uint32(0));
    }
    cluster.outlier_detection = Some(out);
    if let (Some(percent), Some(common)) = (
        from.min_health_percent.filter(|percent| *percent > 0),
        cluster.common_lb_config.as_mut(),
    ) {
        common.healthy_panic_threshold = Some(ty::Percent {
            value: f64::from(percent),
        });
    }
}

/// TLS towards the endpoints by certificates given as files, or by the system's authorities. The mesh's own TLS comes with its issue.
fn client_tls(cluster: &mut pb::Cluster, traffic: &TrafficPolicy, port: &Port) {
    let Some(settings) = &traffic.tls else { return };
    if !matches!(settings.mode, Some(ClientTlsMode::Simple | ClientTlsMode::Mutual))
        || settings.credential_name.is_some()
    {
        return;
    }
    let file = |path: &str| core::DataSource {
        specifier: Some(core::data_source::Specifier::Filename(path.to_owned())),
        ..Default::default()
    };
    let mut common = tls::CommonTlsContext {
        tls_params: Some(tls::TlsParameters {
            tls_minimum_protocol_version: tls::tls_parameters::TlsProtocol::TlSv12 as i32,
            tls_maximum_protocol_version: tls::tls_parameters::TlsProtocol::TlSv13 as i32,
            ..Default::default()
        }),
        ..Default::default()
    };
    if port.protocol.is_http2() {
        common.alpn_protocols = vec!["h2".to_owned()];
    }
    if let (Some(certificate), Some(key)) = (&settings.client_certificate, &settings.private_key) {
        common.tls_certificates = vec![tls::TlsCertificate {
            certificate_chain: Some(file(certificate)),
            private_key: Some(file(key)),
            ..Default::default()
        }];
    }
    if settings.insecure_skip_verify != Some(true) {
        let mut validation = tls::CertificateValidationContext {
            match_typed_subject_alt_names: settings
                .subject_alt_names
                .iter()
                .map(|name| tls::SubjectAltNameMatcher {
                    san_type: if name.starts_with("spiffe://") {
                        tls::subject_alt_name_matcher::SanType::Uri as i32
                    } else {
                        tls::subject_alt_name_matcher::SanType::Dns as i32
                    },
                    matcher: Some(serin_xds::pb::envoy::r#type::matcher::v3::StringMatcher {
                        match_pattern: Some(
                            serin_xds::pb::envoy::r#type::matcher::v3::string_matcher::MatchPattern::Exact(
                                name.clone(),
                            ),
                        ),
                        ..Default::default()
                    }),
                    ..Default::default()
                })
                .collect(),
            ..Default::default()
        };
        match &settings.ca_certificates {
            // Istio's name of the system's own authorities.
            Some(path) if path != "system" => validation.trusted_ca = Some(file(path)),
            Some(_) | None => validation.system_root_certs = Some(Default::default()),
        }
        validation.crl = settings.ca_crl.as_deref().map(file);
        common.validation_context_type = Some(
            tls::common_tls_context::ValidationContextType::ValidationContext(validation),
        );
    }
    cluster.transport_socket = Some(core::TransportSocket {
        name: "envoy.transport_sockets.tls".to_owned(),
        config_type: Some(core::transport_socket::ConfigType::TypedConfig(wire::any(
            &tls::UpstreamTlsContext {
                common_tls_context: Some(common),
                sni: settings.sni.clone().unwrap_or_default(),
                ..Default::default()
            },
        ))),
    });
}

/// The cluster towards the application behind a port: `inbound|8080||`.
///
/// Of the policy of the first service, limits and retry budget hold on this side too.
pub(super) fn inbound(
    target: u16,
    protocol: serin_model::Protocol,
    services_of: &[&Service],
    policy: Option<&HostPolicy>,
    service_port: u16,
) -> pb::Cluster {
    let mut cluster = base(&format!("inbound|{target}||"));
    cluster.cluster_discovery_type = Some(pb::cluster::ClusterDiscoveryType::Type(
        pb::cluster::DiscoveryType::OriginalDst as i32,
    ));
    cluster.lb_policy = pb::cluster::LbPolicy::ClusterProvided as i32;
    cluster.cleanup_interval = Some(wire::seconds(NEVER));
    cluster.upstream_bind_config = Some(inbound_source());
    cluster.common_lb_config = Some(Default::default());
    let traffic = policy
        .map(|policy| policy.for_port(None, service_port))
        .unwrap_or_default();
    connection_pool(&mut cluster, traffic.connection_pool.as_ref());
    retry_budget(&mut cluster, &traffic);
    // How the application is spoken to is for its port to say.
    let mut pool = traffic.connection_pool.clone();
    if let Some(http) = pool.as_mut().and_then(|pool| pool.http.as_mut()) {
        http.h2_upgrade_policy = None;
        http.use_client_protocol = None;
    }
    http_options(&mut cluster, protocol, pool.as_ref(), Side::Sidecar);
    let mut fields = vec![("services", services(services_of.iter().copied()))];
    if let Some(origin) = policy
        .filter(|policy| policy.policy.is_some())
        .and_then(|policy| policy.provenance.first())
    {
        fields.push(("config", wire::text(&wire::config_path(origin))));
    }
    cluster.metadata = Some(wire::metadata("istio", wire::structure(fields)));
    cluster
}

fn inbound_source() -> core::BindConfig {
    core::BindConfig {
        source_address: Some(wire::socket(INBOUND_SOURCE, 0)),
        ..Default::default()
    }
}

/// Clusters that every proxy of a side has: nothing, anything, and undeclared inbound ports.
pub(super) fn builtin(side: Side) -> Vec<pb::Cluster> {
    let black_hole = pb::Cluster {
        name: "BlackHoleCluster".to_owned(),
        alt_stat_name: "BlackHoleCluster;".to_owned(),
        cluster_discovery_type: Some(pb::cluster::ClusterDiscoveryType::Type(
            pb::cluster::DiscoveryType::Static as i32,
        )),
        connect_timeout: Some(wire::seconds(CONNECT_TIMEOUT)),
        ..Default::default()
    };
    match side {
        Side::Router => vec![black_hole],
        Side::Sidecar => {
            let mut inbound = passthrough("InboundPassthroughCluster");
            inbound.upstream_bind_config = Some(inbound_source());
            vec![black_hole, passthrough("PassthroughCluster"), inbound]
        }
    }
}

fn passthrough(name: &str) -> pb::Cluster {
    use upstream::http_protocol_options::{UpstreamProtocolOptions, UseDownstreamHttpConfig};
    let mut cluster = base(name);
    "PassthroughCluster;".clone_into(&mut cluster.alt_stat_name);
    cluster.cluster_discovery_type = Some(pb::cluster::ClusterDiscoveryType::Type(
        pb::cluster::DiscoveryType::OriginalDst as i32,
    ));
    cluster.lb_policy = pb::cluster::LbPolicy::ClusterProvided as i32;
    set_http_options(
        &mut cluster,
        Some(core::HttpProtocolOptions {
            idle_timeout: Some(wire::seconds(PASSTHROUGH_IDLE)),
            ..Default::default()
        }),
        UpstreamProtocolOptions::UseDownstreamProtocolConfig(UseDownstreamHttpConfig {
            http_protocol_options: Some(Default::default()),
            http2_protocol_options: Some(Default::default()),
            ..Default::default()
        }),
    );
    cluster
}
