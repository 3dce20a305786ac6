use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::envoy::config::route::v3::route_match::PathSpecifier;

use serin_xds::pb::envoy::config::cluster::v3 as pb_cluster;
use serin_xds::pb::envoy::config::endpoint::v3 as pb_endpoint;
use serin_xds::pb::envoy::config::route::v3 as pb_route;

use super::*;
use crate::config::table::RouteTable;

fn host(name: &str, domain: &str, cluster: &str) -> pb_route::VirtualHost {
    pb_route::VirtualHost {
        name: name.into(),
        domains: vec![domain.into()],
        routes: vec![pb_route::Route {
            r#match: Some(pb_route::RouteMatch {
                path_specifier: Some(PathSpecifier::Prefix("/".into())),
                ..Default::default()
            }),
            action: Some(pb_route::route::Action::Route(pb_route::RouteAction {
                cluster_specifier: Some(pb_route::route_action::ClusterSpecifier::Cluster(cluster.into())),
                ..Default::default()
            })),
            ..Default::default()
        }],
        ..Default::default()
    }
}

fn put(
    store: &mut Store,
    resource_type: ResourceType,
    name: &str,
    message: &impl Message,
) -> Vec<(Box<str>, Refusal)> {
    let body = message.encode_to_vec();
    store.apply(resource_type, &[Update { name, body: &body }], &[])
}

fn vhds_config(name: &str) -> pb_route::RouteConfiguration {
    pb_route::RouteConfiguration {
        name: name.into(),
        vhds: Some(pb_route::Vhds::default()),
        ..Default::default()
    }
}

fn table(store: &Store, name: &str) -> Arc<RouteTable> {
    store
        .routes()
        .find(|(have, ..)| &***have == name)
        .unwrap()
        .1
        .unwrap()
}

#[test]
fn a_virtual_host_resource_is_replaced_without_touching_table_or_other_hosts() {
    let mut store = Store::new(1);
    assert!(put(&mut store, ResourceType::Route, "80", &vhds_config("80")).is_empty());
    assert!(
        put(
            &mut store,
            ResourceType::VirtualHost,
            "80/a:80",
            &host("a:80", "a", "v1")
        )
        .is_empty()
    );
    assert!(
        put(
            &mut store,
            ResourceType::VirtualHost,
            "80/b:80",
            &host("b:80", "b", "v1")
        )
        .is_empty()
    );
    let before = table(&store, "80");
    let other = before.find("b").unwrap().load();
    let one = before.find("a").unwrap().load();

    assert!(
        put(
            &mut store,
            ResourceType::VirtualHost,
            "80/a:80",
            &host("a:80", "a", "v2")
        )
        .is_empty()
    );

    let after = table(&store, "80");
    assert!(Arc::ptr_eq(&before, &after), "the table was rebuilt");
    assert!(
        Arc::ptr_eq(&other, &after.find("b").unwrap().load()),
        "the other host was replaced"
    );
    assert!(
        !Arc::ptr_eq(&one, &after.find("a").unwrap().load()),
        "the host was not replaced"
    );
}

#[test]
fn virtual_hosts_that_arrive_before_their_route_configuration_wait_for_it() {
    let mut store = Store::new(1);
    assert!(
        put(
            &mut store,
            ResourceType::VirtualHost,
            "80/a:80",
            &host("a:80", "a", "v1")
        )
        .is_empty()
    );
    assert!(put(&mut store, ResourceType::Route, "80", &vhds_config("80")).is_empty());
    assert!(table(&store, "80").find("a").is_some());
}

#[test]
fn a_refused_resource_leaves_the_last_good_one_and_the_rest_of_the_batch_goes_live() {
    let mut store = Store::new(1);
    put(&mut store, ResourceType::Route, "80", &vhds_config("80"));
    put(
        &mut store,
        ResourceType::VirtualHost,
        "80/a:80",
        &host("a:80", "a", "v1"),
    );
    let good = table(&store, "80").find("a").unwrap().load();

    let mut bad = host("a:80", "a", "v2");
    bad.rate_limits.push(pb_route::RateLimit::default());
    let bad = bad.encode_to_vec();
    let fine = host("b:80", "b", "v1").encode_to_vec();
    let refused = store.apply(
        ResourceType::VirtualHost,
        &[
            Update {
                name: "80/a:80",
                body: &bad,
            },
            Update {
                name: "80/b:80",
                body: &fine,
            },
        ],
        &[],
    );
    assert_eq!(refused.len(), 1);
    assert_eq!(&*refused[0].0, "80/a:80");
    assert_eq!(refused[0].1.path, "rate_limits[0].actions");
    assert!(Arc::ptr_eq(&good, &table(&store, "80").find("a").unwrap().load()));
    assert!(table(&store, "80").find("b").is_some());
}

#[test]
fn a_domain_conflict_refuses_the_later_host_only() {
    let mut store = Store::new(1);
    put(&mut store, ResourceType::Route, "80", &vhds_config("80"));
    put(
        &mut store,
        ResourceType::VirtualHost,
        "80/a",
        &host("a", "same", "v1"),
    );
    let refused = put(
        &mut store,
        ResourceType::VirtualHost,
        "80/b",
        &host("b", "same", "v1"),
    );
    assert_eq!(&*refused[0].0, "80/b");
    assert_eq!(&*table(&store, "80").find("same").unwrap().load().name, "a");
}

#[test]
fn bytes_that_are_no_message_are_refused_for_every_type() {
    for resource_type in ResourceType::ALL {
        let mut store = Store::new(1);
        let refused = store.apply(
            resource_type,
            &[Update {
                name: "80/x",
                body: &[0xFF, 0xFF, 0xFF],
            }],
            &[],
        );
        assert_eq!(refused.len(), 1, "{resource_type:?}");
    }
}

fn endpoints(name: &str, ports: &[u32]) -> pb_endpoint::ClusterLoadAssignment {
    pb_endpoint::ClusterLoadAssignment {
        cluster_name: name.into(),
        endpoints: vec![pb_endpoint::LocalityLbEndpoints {
            lb_endpoints: ports
                .iter()
                .map(|port| pb_endpoint::LbEndpoint {
                    host_identifier: Some(pb_endpoint::lb_endpoint::HostIdentifier::Endpoint(
                        pb_endpoint::Endpoint {
                            address: Some(core::Address {
                                address: Some(core::address::Address::SocketAddress(core::SocketAddress {
                                    address: "127.0.0.1".into(),
                                    port_specifier: Some(core::socket_address::PortSpecifier::PortValue(
                                        *port,
                                    )),
                                    ..Default::default()
                                })),
                            }),
                            ..Default::default()
                        },
                    )),
                    ..Default::default()
                })
                .collect(),
            ..Default::default()
        }],
        ..Default::default()
    }
}

fn eds_cluster(name: &str) -> pb_cluster::Cluster {
    pb_cluster::Cluster {
        name: name.into(),
        cluster_discovery_type: Some(pb_cluster::cluster::ClusterDiscoveryType::Type(
            pb_cluster::cluster::DiscoveryType::Eds as i32,
        )),
        ..Default::default()
    }
}

#[test]
fn hosts_keep_their_record_over_endpoint_updates() {
    let mut store = Store::new(1);
    put(&mut store, ResourceType::Cluster, "c", &eds_cluster("c"));
    assert_eq!(store.cold(), ["endpoints c"]);
    put(&mut store, ResourceType::Endpoints, "c", &endpoints("c", &[1, 2]));
    assert!(store.cold().is_empty());
    let slot = store.clusters().next().unwrap().clone();
    let state = slot.endpoints().unwrap().all[1].state.clone();
    put(&mut store, ResourceType::Endpoints, "c", &endpoints("c", &[2, 3]));
    assert!(Arc::ptr_eq(&state, &slot.endpoints().unwrap().all[0].state));
}

#[test]
fn a_cluster_that_comes_back_finds_no_old_endpoints() {
    let mut store = Store::new(1);
    put(&mut store, ResourceType::Cluster, "c", &eds_cluster("c"));
    put(&mut store, ResourceType::Endpoints, "c", &endpoints("c", &[1]));
    store.apply(ResourceType::Cluster, &[], &["c"]);
    assert_eq!(store.eds_names().count(), 0);
    put(&mut store, ResourceType::Cluster, "c", &eds_cluster("c"));
    assert_eq!(store.cold(), ["endpoints c"]);
    assert!(store.clusters().next().unwrap().endpoints().is_none());
}
