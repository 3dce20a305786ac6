//! The messages of a bootstrap file that this proxy knows, field by field.

use prost::{Message, Name};
use serin_xds::pb::envoy::config::cluster::v3 as cluster;
use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::envoy::config::endpoint::v3 as endpoint;
use serin_xds::pb::envoy::config::listener::v3 as listener;
use serin_xds::pb::envoy::extensions::filters::network::http_connection_manager::v3 as hcm;
use serin_xds::pb::envoy::extensions::filters::network::tcp_proxy::v3 as tcp;
use serin_xds::pb::google::protobuf as google;

use super::fields::Fields;
use super::routes::route_configuration;
use crate::error::Refusal;

fn any<M: Message + Name>(message: &M) -> google::Any {
    google::Any {
        type_url: M::type_url(),
        value: message.encode_to_vec(),
    }
}

/// The type of a `typed_config`.
fn type_of(fields: &Fields<'_>) -> Result<String, Refusal> {
    Ok(fields
        .text("@type")?
        .rsplit('/')
        .next()
        .unwrap_or_default()
        .to_owned())
}

pub(super) fn address(fields: &Fields<'_>) -> Result<core::Address, Refusal> {
    use core::address::Address;
    let socket = fields.message("socket_address", |fields| {
        fields.choice("protocol", &[("TCP", 0)])?;
        Ok(core::SocketAddress {
            address: fields.text("address")?,
            port_specifier: fields
                .number("port_value")?
                .map(core::socket_address::PortSpecifier::PortValue),
            ..Default::default()
        })
    })?;
    let pipe = fields.message("pipe", |fields| {
        Ok(core::Pipe {
            path: fields.text("path")?,
            ..Default::default()
        })
    })?;
    Ok(core::Address {
        address: socket.map(Address::SocketAddress).or(pipe.map(Address::Pipe)),
    })
}

fn assignment(fields: &Fields<'_>) -> Result<endpoint::ClusterLoadAssignment, Refusal> {
    Ok(endpoint::ClusterLoadAssignment {
        cluster_name: fields.text("cluster_name")?,
        endpoints: fields.list("endpoints", |fields| {
            Ok(endpoint::LocalityLbEndpoints {
                priority: fields.number("priority")?.unwrap_or_default(),
                load_balancing_weight: fields.wrapped("load_balancing_weight")?,
                lb_endpoints: fields.list("lb_endpoints", lb_endpoint)?,
                ..Default::default()
            })
        })?,
        ..Default::default()
    })
}

fn lb_endpoint(fields: &Fields<'_>) -> Result<endpoint::LbEndpoint, Refusal> {
    let inner = fields.message("endpoint", |fields| {
        Ok(endpoint::Endpoint {
            address: fields.message("address", address)?,
            hostname: fields.text("hostname")?,
            ..Default::default()
        })
    })?;
    Ok(endpoint::LbEndpoint {
        load_balancing_weight: fields.wrapped("load_balancing_weight")?,
        host_identifier: inner.map(endpoint::lb_endpoint::HostIdentifier::Endpoint),
        ..Default::default()
    })
}

pub(super) fn cluster(fields: &Fields<'_>) -> Result<cluster::Cluster, Refusal> {
    const TYPES: [(&str, i32); 5] = [
        ("STATIC", 0),
        ("STRICT_DNS", 1),
        ("LOGICAL_DNS", 2),
        ("EDS", 3),
        ("ORIGINAL_DST", 4),
    ];
    const POLICIES: [(&str, i32); 6] = [
        ("ROUND_ROBIN", 0),
        ("LEAST_REQUEST", 1),
        ("RING_HASH", 2),
        ("RANDOM", 3),
        ("MAGLEV", 5),
        ("CLUSTER_PROVIDED", 6),
    ];
    let family = [
        ("AUTO", 0),
        ("V4_ONLY", 1),
        ("V6_ONLY", 2),
        ("V4_PREFERRED", 3),
        ("ALL", 4),
    ];
    Ok(cluster::Cluster {
        name: fields.text("name")?,
        cluster_discovery_type: fields
            .choice("type", &TYPES)?
            .map(cluster::cluster::ClusterDiscoveryType::Type),
        lb_policy: fields.choice("lb_policy", &POLICIES)?.unwrap_or_default(),
        connect_timeout: fields.duration("connect_timeout")?,
        dns_refresh_rate: fields.duration("dns_refresh_rate")?,
        dns_lookup_family: fields.choice("dns_lookup_family", &family)?.unwrap_or_default(),
        load_assignment: fields.message("load_assignment", assignment)?,
        http2_protocol_options: fields.message("http2_protocol_options", http2_options)?,
        circuit_breakers: fields.message("circuit_breakers", |fields| {
            Ok(cluster::CircuitBreakers {
                thresholds: fields.list("thresholds", |fields| {
                    Ok(cluster::circuit_breakers::Thresholds {
                        max_connections: fields.wrapped("max_connections")?,
                        max_pending_requests: fields.wrapped("max_pending_requests")?,
                        max_requests: fields.wrapped("max_requests")?,
                        max_retries: fields.wrapped("max_retries")?,
                        ..Default::default()
                    })
                })?,
                ..Default::default()
            })
        })?,
        outlier_detection: fields.message("outlier_detection", |fields| {
            Ok(cluster::OutlierDetection {
                consecutive_5xx: fields.wrapped("consecutive_5xx")?,
                consecutive_gateway_failure: fields.wrapped("consecutive_gateway_failure")?,
                enforcing_consecutive_gateway_failure: fields
                    .wrapped("enforcing_consecutive_gateway_failure")?,
                base_ejection_time: fields.duration("base_ejection_time")?,
                max_ejection_time: fields.duration("max_ejection_time")?,
                max_ejection_percent: fields.wrapped("max_ejection_percent")?,
                ..Default::default()
            })
        })?,
        ..Default::default()
    })
}

fn http2_options(fields: &Fields<'_>) -> Result<core::Http2ProtocolOptions, Refusal> {
    Ok(core::Http2ProtocolOptions {
        max_concurrent_streams: fields.wrapped("max_concurrent_streams")?,
        initial_stream_window_size: fields.wrapped("initial_stream_window_size")?,
        initial_connection_window_size: fields.wrapped("initial_connection_window_size")?,
        ..Default::default()
    })
}

pub(super) fn listener(fields: &Fields<'_>) -> Result<listener::Listener, Refusal> {
    let direction = [("UNSPECIFIED", 0), ("INBOUND", 1), ("OUTBOUND", 2)];
    Ok(listener::Listener {
        name: fields.text("name")?,
        address: fields.message("address", address)?,
        use_original_dst: fields.maybe_flag("use_original_dst")?,
        bind_to_port: fields.maybe_flag("bind_to_port")?,
        traffic_direction: fields
            .choice("traffic_direction", &direction)?
            .unwrap_or_default(),
        listener_filters_timeout: fields.duration("listener_filters_timeout")?,
        continue_on_listener_filters_timeout: fields.flag("continue_on_listener_filters_timeout")?,
        listener_filters: fields.list("listener_filters", |fields| {
            fields.message("typed_config", type_of)?;
            Ok(listener::ListenerFilter {
                name: fields.text("name")?,
                ..Default::default()
            })
        })?,
        filter_chains: fields.list("filter_chains", filter_chain)?,
        default_filter_chain: fields.message("default_filter_chain", filter_chain)?,
        ..Default::default()
    })
}

fn filter_chain(fields: &Fields<'_>) -> Result<listener::FilterChain, Refusal> {
    Ok(listener::FilterChain {
        name: fields.text("name")?,
        filter_chain_match: fields.message("filter_chain_match", |fields| {
            Ok(listener::FilterChainMatch {
                destination_port: fields.wrapped("destination_port")?,
                server_names: fields.texts("server_names")?,
                transport_protocol: fields.text("transport_protocol")?,
                application_protocols: fields.texts("application_protocols")?,
                ..Default::default()
            })
        })?,
        filters: fields.list("filters", |fields| {
            let typed = fields.message("typed_config", |fields| {
                Ok(match type_of(fields)?.as_str() {
                    "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager" => {
                        any(&manager(fields)?)
                    }
                    "envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy" => any(&tcp_proxy(fields)?),
                    other => return Err(Refusal::new("@type", format!("{other} is not supported"))),
                })
            })?;
            Ok(listener::Filter {
                name: fields.text("name")?,
                config_type: typed.map(listener::filter::ConfigType::TypedConfig),
            })
        })?,
        ..Default::default()
    })
}

fn tcp_proxy(fields: &Fields<'_>) -> Result<tcp::TcpProxy, Refusal> {
    use tcp::tcp_proxy::{ClusterSpecifier, WeightedCluster, weighted_cluster::ClusterWeight};
    let weighted = fields.message("weighted_clusters", |fields| {
        let clusters = fields.list("clusters", |fields| {
            Ok(ClusterWeight {
                name: fields.text("name")?,
                weight: fields.number("weight")?.unwrap_or_default(),
                ..Default::default()
            })
        })?;
        Ok(WeightedCluster { clusters })
    })?;
    let cluster = fields.text("cluster")?;
    Ok(tcp::TcpProxy {
        stat_prefix: fields.text("stat_prefix")?,
        idle_timeout: fields.duration("idle_timeout")?,
        max_connect_attempts: fields.wrapped("max_connect_attempts")?,
        cluster_specifier: Some(weighted.map_or(
            ClusterSpecifier::Cluster(cluster),
            ClusterSpecifier::WeightedClusters,
        )),
        ..Default::default()
    })
}

fn manager(fields: &Fields<'_>) -> Result<hcm::HttpConnectionManager, Refusal> {
    use hcm::http_connection_manager::RouteSpecifier;
    let transformation = [("OVERWRITE", 0), ("APPEND_IF_ABSENT", 1), ("PASS_THROUGH", 2)];
    let slashes = [
        ("KEEP_UNCHANGED", 1),
        ("REJECT_REQUEST", 2),
        ("UNESCAPE_AND_REDIRECT", 3),
        ("UNESCAPE_AND_FORWARD", 4),
    ];
    let inline = fields
        .message("route_config", route_configuration)?
        .map(RouteSpecifier::RouteConfig);
    let rds = fields.message("rds", |fields| {
        fields.get("config_source");
        Ok(RouteSpecifier::Rds(hcm::Rds {
            route_config_name: fields.text("route_config_name")?,
            ..Default::default()
        }))
    })?;
    Ok(hcm::HttpConnectionManager {
        stat_prefix: fields.text("stat_prefix")?,
        codec_type: fields
            .choice("codec_type", &[("AUTO", 0), ("HTTP1", 1), ("HTTP2", 2)])?
            .unwrap_or_default(),
        route_specifier: inline.or(rds),
        http_filters: fields.list("http_filters", |fields| {
            fields.message("typed_config", type_of)?;
            Ok(hcm::HttpFilter {
                name: fields.text("name")?,
                ..Default::default()
            })
        })?,
        http2_protocol_options: fields.message("http2_protocol_options", http2_options)?,
        common_http_protocol_options: fields.message("common_http_protocol_options", |fields| {
            Ok(core::HttpProtocolOptions {
                idle_timeout: fields.duration("idle_timeout")?,
                max_connection_duration: fields.duration("max_connection_duration")?,
                max_stream_duration: fields.duration("max_stream_duration")?,
                max_headers_count: fields.wrapped("max_headers_count")?,
                max_requests_per_connection: fields.wrapped("max_requests_per_connection")?,
                ..Default::default()
            })
        })?,
        server_name: fields.text("server_name")?,
        server_header_transformation: fields
            .choice("server_header_transformation", &transformation)?
            .unwrap_or_default(),
        max_request_headers_kb: fields.wrapped("max_request_headers_kb")?,
        stream_idle_timeout: fields.duration("stream_idle_timeout")?,
        request_headers_timeout: fields.duration("request_headers_timeout")?,
        use_remote_address: fields.maybe_flag("use_remote_address")?,
        generate_request_id: fields.maybe_flag("generate_request_id")?,
        normalize_path: fields.maybe_flag("normalize_path")?,
        merge_slashes: fields.flag("merge_slashes")?,
        path_with_escaped_slashes_action: fields
            .choice("path_with_escaped_slashes_action", &slashes)?
            .unwrap_or_default(),
        upgrade_configs: fields.list("upgrade_configs", |fields| {
            Ok(hcm::http_connection_manager::UpgradeConfig {
                upgrade_type: fields.text("upgrade_type")?,
                ..Default::default()
            })
        })?,
        ..Default::default()
    })
}
