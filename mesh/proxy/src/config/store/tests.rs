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

/// A virtual host of the route configuration `80`, all of whose requests go to `cluster`.
fn put_host(store: &mut Store, name: &str, domain: &str, cluster: &str) -> Vec<(Box<str>, Refusal)> {
    let key = format!("80/{name}");
    put(
        store,
        ResourceType::VirtualHost,
        &key,
        &host(name, domain, cluster),
    )
}

#[test]
fn a_virtual_host_resource_is_replaced_without_touching_table_or_other_hosts() {
    let mut store = Store::new(1);
    assert!(put(&mut store, ResourceType::Route, "80", &vhds_config("80")).is_empty());
    assert!(put_host(&mut store, "a:80", "a", "v1").is_empty());
    assert!(put_host(&mut store, "b:80", "b", "v1").is_empty());
    let before = table(&store, "80");
    let other = before.find("b").unwrap().load();
    let one = before.find("a").unwrap().load();

    assert!(put_host(&mut store, "a:80", "a", "v2").is_empty());

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
    assert!(put_host(&mut store, "a:80", "a", "v1").is_empty());
    assert!(put(&mut store, ResourceType::Route, "80", &vhds_config("80")).is_empty());
    assert!(table(&store, "80").find("a").is_some());
}

#[test]
fn a_refused_resource_leaves_the_last_good_one_and_the_rest_of_the_batch_goes_live() {
    let mut store = Store::new(1);
    put(&mut store, ResourceType::Route, "80", &vhds_config("80"));
    put_host(&mut store, "a:80", "a", "v1");
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
    put_host(&mut store, "a", "same", "v1");
    let refused = put_host(&mut store, "b", "same", "v1");
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
fn endpoints_for_which_no_update_follows_in_their_time_are_given_up() {
    use crate::metrics::events::ClusterEvent;
    use serin_xds::pb::google::protobuf::Duration as Time;
    let mut store = Store::new(1);
    put(&mut store, ResourceType::Cluster, "c", &eds_cluster("c"));
    let lasting = |seconds: i64| {
        let mut message = endpoints("c", &[1, 2]);
        message.policy = Some(pb_endpoint::cluster_load_assignment::Policy {
            endpoint_stale_after: Some(Time { seconds, nanos: 0 }),
            ..Default::default()
        });
        message
    };
    let slot = store.clusters().next().unwrap().clone();
    let left = |slot: &ClusterSlot| slot.endpoints().map_or(0, |set| set.all.len());
    let counts = |slot: &ClusterSlot| {
        [ClusterEvent::AssignmentTimeout, ClusterEvent::AssignmentStale].map(|event| slot.counted.get(event))
    };
    let now = crate::clock::now_ms();
    put(&mut store, ResourceType::Endpoints, "c", &lasting(60));
    store.end_stale(now + 59_000);
    assert_eq!((left(&slot), counts(&slot)), (2, [1, 0]));
    // One that follows begins anew, and one that says nothing ends the waiting.
    put(&mut store, ResourceType::Endpoints, "c", &lasting(600));
    store.end_stale(now + 300_000);
    assert_eq!((left(&slot), counts(&slot)), (2, [2, 0]));
    put(&mut store, ResourceType::Endpoints, "c", &endpoints("c", &[1]));
    store.end_stale(now + 10_000_000);
    assert_eq!((left(&slot), counts(&slot)), (1, [2, 0]));
    put(&mut store, ResourceType::Endpoints, "c", &lasting(60));
    store.end_stale(crate::clock::now_ms() + 60_000);
    store.end_stale(crate::clock::now_ms() + 120_000);
    assert_eq!((left(&slot), counts(&slot)), (0, [3, 1]));
    // The cluster that takes its place does not find them either.
    put(&mut store, ResourceType::Cluster, "c", &eds_cluster("c"));
    assert_eq!(left(&slot), 0);
    put(&mut store, ResourceType::Endpoints, "c", &lasting(-1));
    assert_eq!(left(&slot), 0, "no time is negative");
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

fn config(name: &str, hosts: Vec<pb_route::VirtualHost>) -> pb_route::RouteConfiguration {
    pb_route::RouteConfiguration {
        name: name.into(),
        virtual_hosts: hosts,
        ..Default::default()
    }
}

#[test]
fn a_route_configuration_of_which_one_host_changes_keeps_its_table_and_the_other_hosts() {
    let mut store = Store::new(1);
    let hosts = |weight: &str| vec![host("a", "a", "v1"), host("b", "b", weight), host("c", "c", "v1")];
    put(&mut store, ResourceType::Route, "80", &config("80", hosts("v1")));
    let before = table(&store, "80");
    let of = |table: &RouteTable, domain: &str| table.find(domain).unwrap().load();
    let loaded = ["a", "b", "c"].map(|domain| of(&before, domain));

    assert!(put(&mut store, ResourceType::Route, "80", &config("80", hosts("v2"))).is_empty());

    let after = table(&store, "80");
    assert!(Arc::ptr_eq(&before, &after), "the table was rebuilt");
    let same = ["a", "b", "c"].map(|domain| {
        let index = usize::from(domain.as_bytes()[0] - b'a');
        Arc::ptr_eq(&loaded[index], &of(&after, domain))
    });
    assert_eq!(same, [true, false, true]);
    // One that comes first moves all others, which stay what they are.
    let mut more = hosts("v2");
    more.insert(0, host("d", "d", "v1"));
    assert!(put(&mut store, ResourceType::Route, "80", &config("80", more)).is_empty());
    let third = table(&store, "80");
    assert!(Arc::ptr_eq(&of(&after, "b"), &of(&third, "b")));
    assert!(third.find("d").is_some() && after.find("d").is_none());
}

#[test]
fn a_domain_may_move_between_hosts_of_one_batch_and_a_host_that_is_refused_keeps_its_own() {
    let mut store = Store::new(1);
    put(&mut store, ResourceType::Route, "80", &vhds_config("80"));
    for (name, domain) in [("80/a", "one"), ("80/b", "two")] {
        put(
            &mut store,
            ResourceType::VirtualHost,
            name,
            &host(name, domain, "v1"),
        );
    }
    let (a, b) = (
        host("80/a", "two", "v1").encode_to_vec(),
        host("80/b", "one", "v1").encode_to_vec(),
    );
    let batch = [
        Update {
            name: "80/a",
            body: &a,
        },
        Update {
            name: "80/b",
            body: &b,
        },
    ];
    assert!(store.apply(ResourceType::VirtualHost, &batch, &[]).is_empty());
    let holder = |store: &Store, domain: &str| {
        let table = table(store, "80");
        table.find(domain).map(|host| host.load().name.to_string())
    };
    assert_eq!(holder(&store, "one").as_deref(), Some("80/b"));
    assert_eq!(holder(&store, "two").as_deref(), Some("80/a"));
    let refused = put(
        &mut store,
        ResourceType::VirtualHost,
        "80/a",
        &host("80/a", "one", "v1"),
    );
    assert_eq!(&*refused[0].0, "80/a");
    assert_eq!(
        holder(&store, "two").as_deref(),
        Some("80/a"),
        "the last good one stays"
    );
}

#[test]
fn a_host_of_the_route_configuration_takes_its_domain_from_one_that_came_by_itself() {
    let mut store = Store::new(1);
    put(&mut store, ResourceType::Route, "80", &vhds_config("80"));
    put_host(&mut store, "x", "same", "v1");
    let mut with_own = config("80", vec![host("own", "same", "v1")]);
    with_own.vhds = Some(pb_route::Vhds::default());
    let refused = put(&mut store, ResourceType::Route, "80", &with_own);
    assert_eq!(&*refused[0].0, "80/x");
    assert_eq!(&*table(&store, "80").find("same").unwrap().load().name, "own");
    assert!(store.wants_virtual_hosts());
    store.apply(ResourceType::Route, &[], &["80"]);
    assert!(!store.wants_virtual_hosts());
}

#[test]
fn a_cluster_that_changes_its_eds_name_asks_for_the_new_one_and_leaves_the_old_one() {
    let mut store = Store::new(1);
    let named = |eds: &str| pb_cluster::Cluster {
        eds_cluster_config: Some(pb_cluster::cluster::EdsClusterConfig {
            service_name: eds.into(),
            ..Default::default()
        }),
        ..eds_cluster("c")
    };
    put(&mut store, ResourceType::Cluster, "c", &named("one"));
    put(
        &mut store,
        ResourceType::Endpoints,
        "one",
        &endpoints("one", &[1]),
    );
    assert!(store.is_complete());
    put(&mut store, ResourceType::Cluster, "c", &named("two"));
    assert!(
        store.eds_names().eq(["one", "two"]),
        "the old ones serve meanwhile"
    );
    assert_eq!(store.cold(), ["endpoints two"]);
    assert!(!store.is_complete());
    put(
        &mut store,
        ResourceType::Endpoints,
        "two",
        &endpoints("two", &[2]),
    );
    assert!(store.is_complete());
    assert!(store.eds_names().eq(["two"]));
    let kept: Vec<_> = store.assignments().map(|(name, _)| name.to_string()).collect();
    assert_eq!(kept, ["two"], "nobody uses the old ones");
}

mod histories {
    use proptest::prelude::*;

    use super::*;

    /// A host by number, with some domains of a few, leading somewhere.
    fn hosts() -> impl Strategy<Value = Vec<(u8, u8, u8)>> {
        proptest::collection::vec((0u8..6, 0u8..64, 0u8..3), 0..5)
    }

    fn message(hosts: &[(u8, u8, u8)]) -> pb_route::RouteConfiguration {
        let one = |(name, domains, to): &(u8, u8, u8)| pb_route::VirtualHost {
            domains: (0..6)
                .filter(|bit| *bit == *name || domains >> bit & 1 == 1)
                .map(|bit| ["a", "b", "*.c", "d.*", "*", "e"][usize::from(bit)].to_owned())
                .collect(),
            // The name tells where it leads, so that answers do.
            ..host(&format!("h{name}-{to}"), "", "c")
        };
        config("80", hosts.iter().map(one).collect())
    }

    fn answers(store: &Store) -> Vec<Option<Vec<u8>>> {
        let table = store
            .routes()
            .find(|(name, ..)| &***name == "80")
            .and_then(|(_, table, _)| table);
        ["a", "b", "x.c", "d.x", "e", "other"]
            .map(|authority| {
                let found = table.as_ref()?.find(authority)?.load();
                Some(format!("{} {:?}", found.name, found.domains).into_bytes())
            })
            .into()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(128))]

        #[test]
        fn after_any_changes_requests_are_routed_as_by_the_last_configuration_that_was_taken(
            updates in proptest::collection::vec(hosts(), 1..8)
        ) {
            let mut store = Store::new(1);
            let mut last = None;
            for hosts in &updates {
                let message = message(hosts);
                let refused = !put(&mut store, ResourceType::Route, "80", &message).is_empty();
                let mut fresh = Store::new(1);
                let refused_anyway = !put(&mut fresh, ResourceType::Route, "80", &message).is_empty();
                prop_assert_eq!(refused, refused_anyway);
                if !refused {
                    last = Some(fresh);
                }
                let expected = last.as_ref().map(answers).unwrap_or_else(|| vec![None; 6]);
                prop_assert_eq!(answers(&store), expected);
            }
        }
    }
}
