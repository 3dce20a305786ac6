//! Listeners: what sidecars capture, what workloads receive, what gateways open.
//!
//! Only the filters that routing needs are there: fault, cors and router. Mutual TLS, authorization, telemetry and ALPN filters belong
//! to later kinds; our own proxy derives its telemetry from metadata instead of from filters.

use std::net::IpAddr;

use serin_model::Protocol;
use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::envoy::config::listener::v3 as pb;
use serin_xds::pb::envoy::config::route::v3 as route_pb;
use serin_xds::pb::envoy::extensions::filters::http::cors::v3::Cors;
use serin_xds::pb::envoy::extensions::filters::http::fault::v3::HttpFault;
use serin_xds::pb::envoy::extensions::filters::http::router::v3::Router;
use serin_xds::pb::envoy::extensions::filters::listener::http_inspector::v3::HttpInspector;
use serin_xds::pb::envoy::extensions::filters::listener::original_dst::v3::OriginalDst;
use serin_xds::pb::envoy::extensions::filters::listener::tls_inspector::v3::TlsInspector;
use serin_xds::pb::envoy::extensions::filters::network::http_connection_manager::v3 as hcm;
use serin_xds::pb::envoy::extensions::filters::network::tcp_proxy::v3 as tcp;
use serin_xds::pb::envoy::extensions::request_id::uuid::v3::UuidRequestIdConfig;
use serin_xds::pb::envoy::r#type::v3 as ty;

use super::{route, wire};

/// Where interception sends outbound connections.
pub(super) const OUTBOUND_PORT: u16 = 15001;
/// Where interception sends inbound connections.
pub(super) const INBOUND_PORT: u16 = 15006;
/// Limit for finding out the transport of a connection.
const TRANSPORT_TIMEOUT: i64 = 15;

/// What the HTTP inspector says of plain HTTP.
const PLAIN_HTTP: [&str; 2] = ["http/1.1", "h2c"];

const TCP_PROXY: &str = "envoy.filters.network.tcp_proxy";
const HTTP_MANAGER: &str = "envoy.filters.network.http_connection_manager";

/// One weighted destination of connections.
pub(super) struct Destination {
    pub(super) cluster: String,
    pub(super) weight: u32,
}

/// What a policy says about captured connections.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct ConnectionLimits {
    /// Idle time after which connections are closed.
    pub(super) idle_timeout: Option<std::time::Duration>,
    /// Age at which connections are closed.
    pub(super) max_duration: Option<std::time::Duration>,
    /// Endpoints are chosen by the source address.
    pub(super) by_source: bool,
}

/// The TCP part of a listener.
pub(super) struct TcpChain {
    pub(super) matches: Option<pb::FilterChainMatch>,
    pub(super) destinations: Vec<Destination>,
    /// The object that the chain was made from, if it was a rule.
    pub(super) origin: Option<serin_model::Provenance>,
    /// What the policy of the first destination says about connections.
    pub(super) limits: ConnectionLimits,
    pub(super) name: String,
}

fn filter(name: &str, config: serin_xds::pb::google::protobuf::Any) -> pb::Filter {
    pb::Filter {
        name: name.to_owned(),
        config_type: Some(pb::filter::ConfigType::TypedConfig(config)),
    }
}

fn tcp_proxy(chain: &TcpChain) -> pb::Filter {
    let specifier = match chain.destinations.as_slice() {
        [only] => tcp::tcp_proxy::ClusterSpecifier::Cluster(only.cluster.clone()),
        several => tcp::tcp_proxy::ClusterSpecifier::WeightedClusters(tcp::tcp_proxy::WeightedCluster {
            clusters: several
                .iter()
                .filter(|destination| destination.weight > 0)
                .map(|destination| tcp::tcp_proxy::weighted_cluster::ClusterWeight {
                    name: destination.cluster.clone(),
                    weight: destination.weight,
                    ..Default::default()
                })
                .collect(),
        }),
    };
    let stat_prefix = chain
        .destinations
        .first()
        .map(|first| first.cluster.clone())
        .unwrap_or_default();
    filter(
        TCP_PROXY,
        wire::any(&tcp::TcpProxy {
            stat_prefix,
            idle_timeout: chain.limits.idle_timeout.map(wire::duration),
            max_downstream_connection_duration: chain.limits.max_duration.map(wire::duration),
            hash_policy: chain
                .limits
                .by_source
                .then(|| ty::HashPolicy {
                    policy_specifier: Some(ty::hash_policy::PolicySpecifier::SourceIp(Default::default())),
                })
                .into_iter()
                .collect(),
            cluster_specifier: Some(specifier),
            ..Default::default()
        }),
    )
}

fn http_filters() -> Vec<hcm::HttpFilter> {
    let filter = |name: &str, config| hcm::HttpFilter {
        name: name.to_owned(),
        config_type: Some(hcm::http_filter::ConfigType::TypedConfig(config)),
        ..Default::default()
    };
    vec![
        filter("envoy.filters.http.fault", wire::any(&HttpFault::default())),
        filter("envoy.filters.http.cors", wire::any(&Cors {})),
        filter("envoy.filters.http.router", wire::any(&Router::default())),
    ]
}

fn manager(
    stat_prefix: String,
    routes: hcm::http_connection_manager::RouteSpecifier,
) -> hcm::HttpConnectionManager {
    hcm::HttpConnectionManager {
        stat_prefix,
        route_specifier: Some(routes),
        http_filters: http_filters(),
        // Streams live as long as their route allows.
        stream_idle_timeout: Some(wire::seconds(0)),
        use_remote_address: Some(wire::boolean(false)),
        proxy_100_continue: true,
        upgrade_configs: vec![hcm::http_connection_manager::UpgradeConfig {
            upgrade_type: "websocket".to_owned(),
            ..Default::default()
        }],
        normalize_path: Some(wire::boolean(true)),
        path_with_escaped_slashes_action:
            hcm::http_connection_manager::PathWithEscapedSlashesAction::KeepUnchanged as i32,
        request_id_extension: Some(hcm::RequestIdExtension {
            typed_config: Some(wire::any(&UuidRequestIdConfig {
                use_request_id_for_trace_sampling: Some(wire::boolean(true)),
                ..Default::default()
            })),
        }),
        ..Default::default()
    }
}

fn rds(name: &str) -> hcm::http_connection_manager::RouteSpecifier {
    hcm::http_connection_manager::RouteSpecifier::Rds(hcm::Rds {
        config_source: Some(wire::ads()),
        route_config_name: name.to_owned(),
    })
}

fn plain_http() -> pb::FilterChainMatch {
    pb::FilterChainMatch {
        transport_protocol: "raw_buffer".to_owned(),
        application_protocols: PLAIN_HTTP.map(str::to_owned).to_vec(),
        ..Default::default()
    }
}

fn listener_filter(name: &str, config: serin_xds::pb::google::protobuf::Any) -> pb::ListenerFilter {
    pb::ListenerFilter {
        name: name.to_owned(),
        config_type: Some(pb::listener_filter::ConfigType::TypedConfig(config)),
        ..Default::default()
    }
}

fn http_inspector() -> pb::ListenerFilter {
    listener_filter(
        "envoy.filters.listener.http_inspector",
        wire::any(&HttpInspector::default()),
    )
}

fn tls_inspector() -> pb::ListenerFilter {
    listener_filter(
        "envoy.filters.listener.tls_inspector",
        wire::any(&TlsInspector {
            initial_read_buffer_size: Some(wire::uint32(512)),
            ..Default::default()
        }),
    )
}

/// A listener that captures by address and does not bind; connections come to it from 15001.
fn captured(address: &str, port: u16) -> pb::Listener {
    pb::Listener {
        name: format!("{address}_{port}"),
        address: Some(wire::address(address, u32::from(port))),
        bind_to_port: Some(wire::boolean(false)),
        traffic_direction: core::TrafficDirection::Outbound as i32,
        listener_filters_timeout: Some(wire::seconds(0)),
        continue_on_listener_filters_timeout: true,
        ..Default::default()
    }
}

fn http_chain(listener: &str, route: &str) -> pb::FilterChain {
    pb::FilterChain {
        filter_chain_match: Some(plain_http()),
        filters: vec![filter(
            HTTP_MANAGER,
            wire::any(&manager(format!("outbound_{listener};"), rds(route))),
        )],
        transport_socket_connect_timeout: Some(wire::seconds(TRANSPORT_TIMEOUT)),
        ..Default::default()
    }
}

fn tcp_chain(chain: &TcpChain, timeout: bool) -> pb::FilterChain {
    pb::FilterChain {
        filter_chain_match: chain.matches.clone(),
        filters: vec![tcp_proxy(chain)],
        transport_socket_connect_timeout: timeout.then(|| wire::seconds(TRANSPORT_TIMEOUT)),
        name: chain.name.clone(),
        metadata: chain.origin.as_ref().map(|origin| {
            wire::metadata(
                "istio",
                wire::structure([("config", wire::text(&wire::config_path(origin)))]),
            )
        }),
        ..Default::default()
    }
}

/// The chain for what the registry does not know.
pub(super) fn unknown(registry_only: bool, name: &str, matches: Option<pb::FilterChainMatch>) -> TcpChain {
    let cluster = if registry_only {
        "BlackHoleCluster"
    } else {
        "PassthroughCluster"
    };
    TcpChain {
        matches,
        destinations: vec![Destination {
            cluster: cluster.to_owned(),
            weight: 1,
        }],
        limits: ConnectionLimits::default(),
        origin: None,
        name: name.to_owned(),
    }
}

/// `0.0.0.0_<port>`: all HTTP services of a port share it; the host decides.
pub(super) fn http(address: &str, port: u16, route: &str, registry_only: bool) -> pb::Listener {
    let mut listener = captured(address, port);
    listener.filter_chains = vec![http_chain(&listener.name, route)];
    listener.default_filter_chain = Some(tcp_chain(
        &unknown(registry_only, "PassthroughFilterChain", Some(Default::default())),
        false,
    ));
    listener.listener_filters = vec![http_inspector()];
    listener
}

/// `<address>_<port>` of a port whose protocol is found out per connection.
pub(super) fn sniffed(address: &str, port: u16, route: &str, fallback: &TcpChain) -> pb::Listener {
    let mut listener = captured(address, port);
    listener.filter_chains = vec![http_chain(&listener.name, route)];
    listener.default_filter_chain = Some(tcp_chain(fallback, true));
    listener.listener_filters = vec![http_inspector()];
    listener
}

/// `<address>_<port>` of a TCP port. Chains with conditions come first; `sni` says that some of them look at the server name.
pub(super) fn tcp(address: &str, port: u16, chains: &[TcpChain], sni: bool) -> pb::Listener {
    let mut listener = captured(address, port);
    let (conditional, rest): (Vec<&TcpChain>, Vec<&TcpChain>) =
        chains.iter().partition(|chain| chain.matches.is_some());
    if conditional.is_empty() {
        listener.filter_chains = rest.iter().map(|chain| tcp_chain(chain, true)).collect();
    } else {
        listener.filter_chains = conditional.iter().map(|chain| tcp_chain(chain, true)).collect();
        // What no condition takes; for unknown destinations it is named like everywhere.
        listener.default_filter_chain = rest.first().map(|chain| tcp_chain(chain, chain.name.is_empty()));
    }
    if sni {
        listener.listener_filters = vec![tls_inspector()];
    }
    listener
}

/// `virtualOutbound` on 15001: hands connections to the listener of their original destination, or deals with unknown ones.
pub(super) fn virtual_outbound(registry_only: bool) -> pb::Listener {
    let own = pb::FilterChainMatch {
        destination_port: Some(wire::uint32(u32::from(OUTBOUND_PORT))),
        ..Default::default()
    };
    pb::Listener {
        name: "virtualOutbound".to_owned(),
        address: Some(wire::address("0.0.0.0", u32::from(OUTBOUND_PORT))),
        filter_chains: vec![
            // A connection to 15001 itself would go round in circles.
            tcp_chain(&unknown(true, "virtualOutbound-blackhole", Some(own)), false),
            tcp_chain(
                &unknown(registry_only, "virtualOutbound-catchall-tcp", None),
                false,
            ),
        ],
        use_original_dst: Some(wire::boolean(true)),
        traffic_direction: core::TrafficDirection::Outbound as i32,
        max_connections_to_accept_per_socket_event: Some(wire::uint32(1)),
        ..Default::default()
    }
}

/// A port that a workload receives on.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct InboundPort {
    /// Port of the application.
    pub(super) target: u16,
    /// What it speaks.
    pub(super) protocol: Protocol,
    /// Port of the first service that leads there.
    pub(super) service_port: u16,
    /// Services that lead there by the same port, senior first.
    pub(super) hosts: Vec<std::sync::Arc<str>>,
}

fn inbound_manager(
    protocol: Protocol,
    stat_prefix: &str,
    route_name: &str,
    cluster: &str,
    port: u16,
    operation: &str,
) -> pb::Filter {
    let mut inbound = route::inbound_route(cluster, protocol);
    inbound.decorator = Some(route_pb::Decorator {
        operation: operation.to_owned(),
        ..Default::default()
    });
    let mut manager = manager(
        format!("{stat_prefix};"),
        hcm::http_connection_manager::RouteSpecifier::RouteConfig(route_pb::RouteConfiguration {
            name: route_name.to_owned(),
            virtual_hosts: vec![route_pb::VirtualHost {
                name: format!("inbound|http|{port}"),
                domains: vec!["*".to_owned()],
                routes: vec![inbound],
                ..Default::default()
            }],
            validate_clusters: Some(wire::boolean(false)),
            ..Default::default()
        }),
    );
    if protocol.is_http2() {
        manager.http2_protocol_options = Some(Default::default());
    }
    manager.server_name = "istio-envoy".to_owned();
    manager.forward_client_cert_details =
        hcm::http_connection_manager::ForwardClientCertDetails::AppendForward as i32;
    manager.set_current_client_cert_details =
        Some(hcm::http_connection_manager::SetCurrentClientCertDetails {
            subject: Some(wire::boolean(true)),
            dns: true,
            uri: true,
            ..Default::default()
        });
    filter(HTTP_MANAGER, wire::any(&manager))
}

/// `virtualInbound` on 15006: a set of chains for each declared port, and for all others.
pub(super) fn virtual_inbound(ports: &[InboundPort]) -> pb::Listener {
    let to = |cluster: &str| TcpChain {
        matches: None,
        destinations: vec![Destination {
            cluster: cluster.to_owned(),
            weight: 1,
        }],
        limits: ConnectionLimits::default(),
        origin: None,
        name: String::new(),
    };
    let mut chains = vec![pb::FilterChain {
        filter_chain_match: Some(pb::FilterChainMatch {
            destination_port: Some(wire::uint32(u32::from(INBOUND_PORT))),
            ..Default::default()
        }),
        filters: vec![tcp_proxy(&to("BlackHoleCluster"))],
        name: "virtualInbound-blackhole".to_owned(),
        ..Default::default()
    }];
    let passthrough = "InboundPassthroughCluster";
    let http = inbound_manager(Protocol::Auto, passthrough, passthrough, passthrough, 0, ":0/*");
    chains.push(pb::FilterChain {
        filter_chain_match: Some(plain_http()),
        filters: vec![http],
        name: "virtualInbound-catchall-http".to_owned(),
        ..Default::default()
    });
    for transport in ["raw_buffer", "tls"] {
        chains.push(pb::FilterChain {
            filter_chain_match: Some(pb::FilterChainMatch {
                transport_protocol: transport.to_owned(),
                ..Default::default()
            }),
            filters: vec![tcp_proxy(&to(passthrough))],
            name: "virtualInbound".to_owned(),
            ..Default::default()
        });
    }
    for port in ports {
        inbound_chains(port, &mut chains);
    }
    pb::Listener {
        name: "virtualInbound".to_owned(),
        address: Some(wire::address("0.0.0.0", u32::from(INBOUND_PORT))),
        filter_chains: chains,
        listener_filters: inbound_inspectors(ports),
        listener_filters_timeout: Some(wire::seconds(0)),
        continue_on_listener_filters_timeout: true,
        traffic_direction: core::TrafficDirection::Inbound as i32,
        max_connections_to_accept_per_socket_event: Some(wire::uint32(1)),
        ..Default::default()
    }
}

fn inbound_chains(port: &InboundPort, chains: &mut Vec<pb::FilterChain>) {
    let name = format!("0.0.0.0_{}", port.target);
    let cluster = format!("inbound|{}||", port.target);
    let operation = format!(
        "{}:{}/*",
        port.hosts.first().map_or("", |host| host),
        port.service_port
    );
    let mut push = |transport: &str, http_only: bool, filters: Vec<pb::Filter>| {
        let mut matches = if http_only {
            plain_http()
        } else {
            pb::FilterChainMatch::default()
        };
        matches.destination_port = Some(wire::uint32(u32::from(port.target)));
        transport.clone_into(&mut matches.transport_protocol);
        chains.push(pb::FilterChain {
            filter_chain_match: Some(matches),
            filters,
            name: name.clone(),
            ..Default::default()
        });
    };
    let http = || {
        vec![inbound_manager(
            port.protocol,
            &format!("inbound_{name}"),
            &cluster,
            &cluster,
            port.service_port,
            &operation,
        )]
    };
    let tcp = || {
        vec![tcp_proxy(&TcpChain {
            matches: None,
            destinations: vec![Destination {
                cluster: cluster.clone(),
                weight: 1,
            }],
            limits: ConnectionLimits::default(),
            origin: None,
            name: String::new(),
        })]
    };
    if port.protocol.is_http() {
        push("raw_buffer", false, http());
    } else if port.protocol == Protocol::Auto {
        push("raw_buffer", true, http());
        push("raw_buffer", false, tcp());
        push("tls", false, tcp());
    } else {
        push("tls", false, tcp());
        push("raw_buffer", false, tcp());
    }
}

/// Inspectors look only where a chain depends on what they find: a server-first protocol must not wait for the client.
fn inbound_inspectors(ports: &[InboundPort]) -> Vec<pb::ListenerFilter> {
    use pb::listener_filter_chain_match_predicate::{MatchSet, Rule};
    let range = |port: u16| pb::ListenerFilterChainMatchPredicate {
        rule: Some(Rule::DestinationPortRange(ty::Int32Range {
            start: i32::from(port),
            end: i32::from(port) + 1,
        })),
    };
    let mut http = http_inspector();
    let mut declared: Vec<u16> = ports
        .iter()
        .filter(|port| port.protocol != Protocol::Auto)
        .map(|port| port.target)
        .chain([INBOUND_PORT])
        .collect();
    declared.sort_unstable();
    http.filter_disabled = Some(match declared.as_slice() {
        [only] => range(*only),
        several => pb::ListenerFilterChainMatchPredicate {
            rule: Some(Rule::OrMatch(MatchSet {
                rules: several.iter().map(|port| range(*port)).collect(),
            })),
        },
    });
    let mut tls = tls_inspector();
    tls.filter_disabled = Some(range(INBOUND_PORT));
    vec![
        listener_filter("envoy.filters.listener.original_dst", wire::any(&OriginalDst {})),
        tls,
        http,
    ]
}

/// A gateway's plain HTTP port.
pub(super) fn gateway_http(address: &str, port: u16, route: &str) -> pb::Listener {
    let name = format!("{address}_{port}");
    let mut manager = manager(format!("outbound_{name};"), rds(route));
    manager.http_protocol_options = Some(Default::default());
    manager.server_name = "istio-envoy".to_owned();
    // The peer is the client: its address is what X-Forwarded-For gets.
    manager.use_remote_address = Some(wire::boolean(true));
    manager.forward_client_cert_details =
        hcm::http_connection_manager::ForwardClientCertDetails::SanitizeSet as i32;
    manager.set_current_client_cert_details =
        Some(hcm::http_connection_manager::SetCurrentClientCertDetails {
            subject: Some(wire::boolean(true)),
            cert: true,
            dns: true,
            uri: true,
            ..Default::default()
        });
    pb::Listener {
        name,
        address: Some(wire::address(address, u32::from(port))),
        filter_chains: vec![pb::FilterChain {
            filters: vec![filter(HTTP_MANAGER, wire::any(&manager))],
            transport_socket_connect_timeout: Some(wire::seconds(TRANSPORT_TIMEOUT)),
            ..Default::default()
        }],
        traffic_direction: core::TrafficDirection::Outbound as i32,
        max_connections_to_accept_per_socket_event: Some(wire::uint32(1)),
        ..Default::default()
    }
}

/// A gateway's TCP port.
pub(super) fn gateway_tcp(address: &str, port: u16, chains: &[TcpChain]) -> pb::Listener {
    pb::Listener {
        name: format!("{address}_{port}"),
        address: Some(wire::address(address, u32::from(port))),
        filter_chains: chains.iter().map(|chain| tcp_chain(chain, true)).collect(),
        traffic_direction: core::TrafficDirection::Outbound as i32,
        max_connections_to_accept_per_socket_event: Some(wire::uint32(1)),
        ..Default::default()
    }
}

/// A condition on destination addresses, for chains of TCP routes.
pub(super) fn ranges(subnets: &[String]) -> Vec<core::CidrRange> {
    subnets
        .iter()
        .filter_map(|subnet| {
            let (address, length) = subnet
                .split_once('/')
                .map_or((subnet.as_str(), None), |(a, l)| (a, l.parse().ok()));
            let ip: IpAddr = address.parse().ok()?;
            let full = if ip.is_ipv4() { 32 } else { 128 };
            Some(core::CidrRange {
                address_prefix: address.to_owned(),
                prefix_len: Some(wire::uint32(length.unwrap_or(full))),
            })
        })
        .collect()
}
