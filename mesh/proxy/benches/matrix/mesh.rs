//! A sidecar's full configuration as xDS resources, the same for serin-proxy and Envoy, served by our own ADS server.
//!
//! 100 virtual hosts, a weighted route with a retry policy, outlier detection and circuit breakers, two RBAC filters (a
//! DENY and an ALLOW one, as istiod makes of AuthorizationPolicies), a local rate limit, request ids, standard metrics
//! (`istio.stats`, which a stock Envoy does not have and leaves out; it keeps its own), and a JSON access log for errors.

use prost::{Message, Name};
use serin_xds::pb::envoy::config::accesslog::v3 as accesslog;
use serin_xds::pb::envoy::config::cluster::v3 as cluster;
use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::envoy::config::endpoint::v3 as endpoint;
use serin_xds::pb::envoy::config::listener::v3 as listener;
use serin_xds::pb::envoy::config::rbac::v3 as rbac;
use serin_xds::pb::envoy::config::route::v3 as route;
use serin_xds::pb::envoy::extensions::access_loggers::file::v3 as file;
use serin_xds::pb::envoy::extensions::filters::http::local_ratelimit::v3 as local;
use serin_xds::pb::envoy::extensions::filters::http::rbac::v3 as http_rbac;
use serin_xds::pb::envoy::extensions::filters::http::router::v3 as router;
use serin_xds::pb::envoy::extensions::filters::network::http_connection_manager::v3 as hcm;
use serin_xds::pb::envoy::extensions::filters::network::tcp_proxy::v3 as tcp;
use serin_xds::pb::envoy::extensions::transport_sockets::tls::v3 as tls;
use serin_xds::pb::envoy::extensions::upstreams::http::v3 as upstreams;
use serin_xds::pb::envoy::r#type::matcher::v3 as matcher;
use serin_xds::pb::envoy::r#type::v3 as types;
use serin_xds::pb::google::protobuf as google;
use serin_xds::{Resource, ResourceType};

use crate::certificates::{Authority, Issued, client_socket, common, only_uri, server_socket};
use crate::fixture::{any, millis, number};
use crate::peers::Backend;

/// Who the sidecar and the backend say they are.
const CLIENT: &str = "spiffe://cluster.local/ns/edge/sa/client";
const SERVER: &str = "spiffe://cluster.local/ns/prod/sa/backend";

/// What the backend speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Up {
    Http1,
    Http2,
    MutualHttp1,
    MutualHttp2,
    Grpc,
    Bytes,
    MutualBytes,
}

/// What clients speak.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Down {
    Plain,
    Tls,
    /// TLS that asks for the client's certificate.
    Mutual,
}

/// A sidecar.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mesh {
    pub(crate) down: Down,
    pub(crate) up: Up,
    /// Clusters and virtual hosts beside those in use.
    pub(crate) clusters: usize,
    /// Endpoints of a second cluster of the weighted route (of which none is asked: its weight is 0), and of the first in
    /// a lower priority.
    pub(crate) hosts: usize,
    /// Virtual hosts as resources of their own (VHDS).
    pub(crate) by_host: bool,
}

impl Mesh {
    pub(crate) const fn new(down: Down, up: Up) -> Self {
        Self {
            down,
            up,
            clusters: 0,
            hosts: 0,
            by_host: false,
        }
    }
}

/// Who signs, and what was signed.
pub(crate) struct Identities {
    authority: Authority,
    pub(crate) server: Issued,
    pub(crate) client: Issued,
    sidecar: Issued,
}

impl Identities {
    pub(crate) fn new() -> Self {
        let authority = Authority::new("bench");
        Self {
            server: authority.issue(&["backend", SERVER]),
            client: authority.issue(&[CLIENT]),
            sidecar: authority.issue(&["localhost", CLIENT]),
            authority,
        }
    }

    pub(crate) fn root(&self) -> &str {
        &self.authority.pem
    }
}

fn ads() -> Option<core::ConfigSource> {
    Some(core::ConfigSource {
        resource_api_version: core::ApiVersion::V3 as i32,
        config_source_specifier: Some(core::config_source::ConfigSourceSpecifier::Ads(
            core::AggregatedConfigSource {},
        )),
        ..Default::default()
    })
}

fn address(ip: &str, port: u16) -> Option<core::Address> {
    Some(core::Address {
        address: Some(core::address::Address::SocketAddress(core::SocketAddress {
            address: ip.into(),
            port_specifier: Some(core::socket_address::PortSpecifier::PortValue(u32::from(port))),
            ..Default::default()
        })),
    })
}

fn typed<M: Message + Name>(name: &str, message: &M) -> hcm::HttpFilter {
    hcm::HttpFilter {
        name: name.into(),
        config_type: Some(hcm::http_filter::ConfigType::TypedConfig(any(message))),
        ..Default::default()
    }
}

fn resource<M: Message>(resource_type: ResourceType, name: &str, message: &M) -> Resource {
    Resource::new(resource_type, name, message, [])
}

/// With TLS 1.3 only: Envoy's default towards upstreams ends at 1.2.
fn tls13(mut common: tls::CommonTlsContext) -> tls::CommonTlsContext {
    let version = tls::tls_parameters::TlsProtocol::TlSv13 as i32;
    common.tls_params = Some(tls::TlsParameters {
        tls_minimum_protocol_version: version,
        tls_maximum_protocol_version: version,
        ..Default::default()
    });
    common
}

fn cluster_of(mesh: &Mesh, name: &str, identities: &Identities) -> cluster::Cluster {
    let http2 = matches!(mesh.up, Up::Http2 | Up::MutualHttp2 | Up::Grpc);
    let mutual = matches!(mesh.up, Up::MutualHttp1 | Up::MutualHttp2 | Up::MutualBytes);
    let mut out = cluster::Cluster {
        name: name.into(),
        cluster_discovery_type: Some(cluster::cluster::ClusterDiscoveryType::Type(
            cluster::cluster::DiscoveryType::Eds as i32,
        )),
        eds_cluster_config: Some(cluster::cluster::EdsClusterConfig {
            eds_config: ads(),
            ..Default::default()
        }),
        lb_policy: cluster::cluster::LbPolicy::LeastRequest as i32,
        connect_timeout: millis(1000),
        outlier_detection: Some(cluster::OutlierDetection {
            consecutive_5xx: number(5),
            base_ejection_time: millis(30_000),
            ..Default::default()
        }),
        circuit_breakers: Some(cluster::CircuitBreakers {
            thresholds: vec![cluster::circuit_breakers::Thresholds {
                max_connections: number(10_000),
                max_pending_requests: number(10_000),
                max_requests: number(10_000),
                ..Default::default()
            }],
            ..Default::default()
        }),
        // Who the service is, as istiod says it.
        metadata: crate::fixture::eds_cluster(name).metadata,
        ..Default::default()
    };
    if http2 {
        use upstreams::http_protocol_options::explicit_http_config::ProtocolConfig;
        use upstreams::http_protocol_options::{ExplicitHttpConfig, UpstreamProtocolOptions};
        let options = upstreams::HttpProtocolOptions {
            upstream_protocol_options: Some(UpstreamProtocolOptions::ExplicitHttpConfig(
                ExplicitHttpConfig {
                    protocol_config: Some(ProtocolConfig::Http2ProtocolOptions(
                        core::Http2ProtocolOptions::default(),
                    )),
                },
            )),
            ..Default::default()
        };
        out.typed_extension_protocol_options = [(
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions".to_owned(),
            any(&options),
        )]
        .into();
    }
    if mutual {
        let alpn: &[&str] = match mesh.up {
            Up::MutualHttp2 => &["h2"],
            Up::MutualHttp1 => &["http/1.1"],
            _ => &[],
        };
        let context = only_uri(identities.authority.context(), SERVER);
        out.transport_socket = client_socket(
            tls13(common(Some(&identities.sidecar), Some(context), alpn)),
            "backend",
        );
    }
    out
}

fn endpoints_of(name: &str, port: u16, hosts: usize) -> endpoint::ClusterLoadAssignment {
    let one = |ip: &str, port| endpoint::LbEndpoint {
        host_identifier: Some(endpoint::lb_endpoint::HostIdentifier::Endpoint(
            endpoint::Endpoint {
                address: address(ip, port),
                ..Default::default()
            },
        )),
        ..Default::default()
    };
    let mut localities = vec![endpoint::LocalityLbEndpoints {
        lb_endpoints: vec![one("127.0.0.1", port)],
        ..Default::default()
    }];
    if hosts > 0 {
        localities.push(endpoint::LocalityLbEndpoints {
            priority: 1,
            lb_endpoints: (0..hosts)
                .map(|index| {
                    one(
                        &format!("10.{}.{}.{}", index >> 16, index >> 8 & 255, index & 255),
                        80,
                    )
                })
                .collect(),
            ..Default::default()
        });
    }
    endpoint::ClusterLoadAssignment {
        cluster_name: name.into(),
        endpoints: localities,
        ..Default::default()
    }
}

fn permission(rule: rbac::permission::Rule) -> rbac::Permission {
    rbac::Permission { rule: Some(rule) }
}

fn path(pattern: matcher::string_matcher::MatchPattern) -> rbac::Permission {
    permission(rbac::permission::Rule::UrlPath(matcher::PathMatcher {
        rule: Some(matcher::path_matcher::Rule::Path(matcher::StringMatcher {
            match_pattern: Some(pattern),
            ..Default::default()
        })),
    }))
}

fn method(name: &str) -> rbac::Permission {
    permission(rbac::permission::Rule::Header(route::HeaderMatcher {
        name: ":method".into(),
        header_match_specifier: Some(route::header_matcher::HeaderMatchSpecifier::StringMatch(
            matcher::StringMatcher {
                match_pattern: Some(matcher::string_matcher::MatchPattern::Exact(name.into())),
                ..Default::default()
            },
        )),
        ..Default::default()
    }))
}

fn policies(action: rbac::rbac::Action, list: Vec<(&str, Vec<rbac::Permission>)>) -> http_rbac::Rbac {
    let everyone = rbac::Principal {
        identifier: Some(rbac::principal::Identifier::Any(true)),
    };
    http_rbac::Rbac {
        rules: Some(rbac::Rbac {
            action: action as i32,
            policies: list
                .into_iter()
                .map(|(name, all)| {
                    let rule = permission(rbac::permission::Rule::AndRules(rbac::permission::Set {
                        rules: all,
                    }));
                    let policy = rbac::Policy {
                        permissions: vec![rule],
                        principals: vec![everyone.clone()],
                        ..Default::default()
                    };
                    (name.to_owned(), policy)
                })
                .collect(),
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn filters() -> Vec<hcm::HttpFilter> {
    use matcher::string_matcher::MatchPattern::{Exact, Prefix};
    let everything = Some(core::RuntimeFractionalPercent {
        default_value: Some(types::FractionalPercent {
            numerator: 100,
            denominator: types::fractional_percent::DenominatorType::Hundred as i32,
        }),
        ..Default::default()
    });
    let limit = local::LocalRateLimit {
        stat_prefix: "local".into(),
        token_bucket: Some(types::TokenBucket {
            max_tokens: 1_000_000_000,
            tokens_per_fill: number(1_000_000_000),
            fill_interval: millis(1000),
        }),
        filter_enabled: everything.clone(),
        filter_enforced: everything,
        ..Default::default()
    };
    let deny = policies(
        rbac::rbac::Action::Deny,
        vec![("no-admin", vec![path(Exact("/admin".into()))])],
    );
    let allow = policies(
        rbac::rbac::Action::Allow,
        vec![
            ("health", vec![path(Exact("/health".into())), method("GET")]),
            ("post", vec![path(Prefix("/".into())), method("POST")]),
            ("read", vec![path(Prefix("/".into())), method("GET")]),
        ],
    );
    // A stock Envoy does not have it.
    let stats = hcm::HttpFilter {
        name: "istio.stats".into(),
        is_optional: true,
        config_type: Some(hcm::http_filter::ConfigType::TypedConfig(google::Any {
            type_url: "type.googleapis.com/stats.PluginConfig".into(),
            value: Vec::new(),
        })),
        ..Default::default()
    };
    vec![
        typed("envoy.filters.http.rbac", &deny),
        typed("envoy.filters.http.rbac.allow", &allow),
        typed("envoy.filters.http.local_ratelimit", &limit),
        stats,
        typed("envoy.filters.http.router", &router::Router::default()),
    ]
}

fn errors_as_json() -> accesslog::AccessLog {
    let text = |value: &str| google::Value {
        kind: Some(google::value::Kind::StringValue(value.into())),
    };
    let format = google::Struct {
        fields: [
            ("path", "%REQ(:PATH)%"),
            ("code", "%RESPONSE_CODE%"),
            ("flags", "%RESPONSE_FLAGS%"),
            ("details", "%RESPONSE_CODE_DETAILS%"),
            ("upstream", "%UPSTREAM_HOST%"),
        ]
        .map(|(key, value)| (key.to_owned(), text(value)))
        .into(),
    };
    #[allow(deprecated)]
    let file = file::FileAccessLog {
        path: "/dev/null".into(),
        access_log_format: Some(file::file_access_log::AccessLogFormat::LogFormat(
            core::SubstitutionFormatString {
                format: Some(core::substitution_format_string::Format::JsonFormat(format)),
                ..Default::default()
            },
        )),
    };
    accesslog::AccessLog {
        name: "envoy.access_loggers.file".into(),
        filter: Some(accesslog::AccessLogFilter {
            filter_specifier: Some(accesslog::access_log_filter::FilterSpecifier::StatusCodeFilter(
                accesslog::StatusCodeFilter {
                    comparison: Some(accesslog::ComparisonFilter {
                        op: accesslog::comparison_filter::Op::Ge as i32,
                        value: Some(core::RuntimeUInt32 {
                            default_value: 500,
                            runtime_key: "errors".into(),
                        }),
                    }),
                },
            )),
        }),
        config_type: Some(accesslog::access_log::ConfigType::TypedConfig(any(&file))),
    }
}

fn listener_of(mesh: &Mesh, port: u16, identities: &Identities) -> listener::Listener {
    let (name, config) = match mesh.up {
        Up::Bytes | Up::MutualBytes => (
            "envoy.filters.network.tcp_proxy",
            any(&tcp::TcpProxy {
                stat_prefix: "tcp".into(),
                cluster_specifier: Some(tcp::tcp_proxy::ClusterSpecifier::Cluster("main".into())),
                ..Default::default()
            }),
        ),
        _ => (
            "envoy.filters.network.http_connection_manager",
            any(&hcm::HttpConnectionManager {
                stat_prefix: "http".into(),
                http_filters: filters(),
                route_specifier: Some(hcm::http_connection_manager::RouteSpecifier::Rds(hcm::Rds {
                    route_config_name: "main".into(),
                    config_source: ads(),
                })),
                access_log: vec![errors_as_json()],
                normalize_path: Some(google::BoolValue { value: true }),
                ..Default::default()
            }),
        ),
    };
    let alpn: &[&str] = match mesh.up {
        Up::Bytes | Up::MutualBytes => &[],
        _ => &["h2", "http/1.1"],
    };
    let own = Some(&identities.sidecar);
    let transport_socket = match mesh.down {
        Down::Plain => None,
        Down::Tls => server_socket(tls13(common(own, None, alpn)), false),
        Down::Mutual => server_socket(
            tls13(common(own, Some(identities.authority.context()), alpn)),
            true,
        ),
    };
    listener::Listener {
        name: "main".into(),
        address: address("127.0.0.1", port),
        traffic_direction: core::TrafficDirection::Outbound as i32,
        filter_chains: vec![listener::FilterChain {
            filters: vec![listener::Filter {
                name: name.into(),
                config_type: Some(listener::filter::ConfigType::TypedConfig(config)),
            }],
            transport_socket,
            ..Default::default()
        }],
        ..Default::default()
    }
}

/// The virtual hosts for the clusters beside those in use.
fn others(mesh: &Mesh) -> Vec<route::VirtualHost> {
    (0..mesh.clusters.max(100))
        .map(|index| {
            let to = if index < mesh.clusters {
                format!("c{index}")
            } else {
                "main".to_owned()
            };
            route::VirtualHost {
                name: format!("h{index}"),
                domains: vec![
                    format!("svc-{index}.ns.svc.cluster.local"),
                    format!("svc-{index}.ns:80"),
                ],
                routes: vec![leading_to(route::route_action::ClusterSpecifier::Cluster(to))],
                ..Default::default()
            }
        })
        .collect()
}

fn leading_to(specifier: route::route_action::ClusterSpecifier) -> route::Route {
    let prefix = || {
        Some(route::RouteMatch {
            path_specifier: Some(route::route_match::PathSpecifier::Prefix("/".into())),
            ..Default::default()
        })
    };
    route::Route {
        r#match: prefix(),
        action: Some(route::route::Action::Route(route::RouteAction {
            cluster_specifier: Some(specifier),
            timeout: millis(15_000),
            retry_policy: Some(route::RetryPolicy {
                retry_on: "connect-failure,refused-stream,reset".into(),
                num_retries: number(2),
                ..Default::default()
            }),
            ..Default::default()
        })),
        ..Default::default()
    }
}

/// The virtual host whose route is weighted, with this share (of 100) for `canary`.
fn weighted(canary: u32) -> route::VirtualHost {
    let clusters = route::WeightedCluster {
        clusters: [("main", 100 - canary), ("canary", canary)]
            .map(|(name, weight)| route::weighted_cluster::ClusterWeight {
                name: name.into(),
                weight: number(weight),
                ..Default::default()
            })
            .into(),
        ..Default::default()
    };
    route::VirtualHost {
        name: "rest".into(),
        domains: vec!["*".into()],
        routes: vec![leading_to(
            route::route_action::ClusterSpecifier::WeightedClusters(clusters),
        )],
        ..Default::default()
    }
}

/// What changes when the share of `canary` does: the whole route configuration, or one virtual host.
pub(crate) fn routes(mesh: &Mesh, canary: u32) -> Resource {
    if mesh.by_host {
        return resource(ResourceType::VirtualHost, "main/rest", &weighted(canary));
    }
    let mut hosts = others(mesh);
    hosts.push(weighted(canary));
    let table = route::RouteConfiguration {
        name: "main".into(),
        virtual_hosts: hosts,
        ..Default::default()
    };
    resource(ResourceType::Route, "main", &table)
}

/// Everything that a proxy listening on `port` needs.
pub(crate) fn resources(mesh: &Mesh, port: u16, backend: &Backend, identities: &Identities) -> Vec<Resource> {
    let to = backend.port_of(mesh.up);
    let mut out = Vec::new();
    for name in ["main", "canary"] {
        out.push(resource(
            ResourceType::Cluster,
            name,
            &cluster_of(mesh, name, identities),
        ));
        out.push(resource(
            ResourceType::Endpoints,
            name,
            &endpoints_of(name, to, mesh.hosts),
        ));
    }
    for index in 0..mesh.clusters {
        let name = format!("c{index}");
        out.push(resource(
            ResourceType::Cluster,
            &name,
            &cluster_of(mesh, &name, identities),
        ));
        out.push(resource(
            ResourceType::Endpoints,
            &name,
            &endpoints_of(&name, to, 0),
        ));
    }
    out.push(resource(
        ResourceType::Listener,
        "main",
        &listener_of(mesh, port, identities),
    ));
    if !matches!(mesh.up, Up::Bytes | Up::MutualBytes) {
        out.push(routes(mesh, 10));
        if mesh.by_host {
            let table = route::RouteConfiguration {
                name: "main".into(),
                vhds: Some(route::Vhds { config_source: ads() }),
                ..Default::default()
            };
            out.push(resource(ResourceType::Route, "main", &table));
            for host in others(mesh) {
                let name = format!("main/{}", host.name);
                out.push(resource(ResourceType::VirtualHost, &name, &host));
            }
        }
    }
    out
}
