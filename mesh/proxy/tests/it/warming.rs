//! What waits until it is whole: listeners for their routes, clusters for their endpoints. What was there before serves meanwhile.
//! (Secrets: `tls_secrets`; filters: `discovered_filters`; the runtime: `runtime_start`.)

use std::net::SocketAddr;

use http::Request;
use http_body_util::Full;
use serin_xds::ResourceType;
use serin_xds::pb::envoy::config::cluster::v3 as cluster;
use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::envoy::config::listener::v3 as listener;
use serin_xds::pb::envoy::config::route::v3 as route;

use crate::fixture::*;

/// A listener by these routes, anywhere.
fn listener_by(name: &str, routes: &str) -> listener::Listener {
    let chains = vec![http_chain(&manager(routes))];
    let mut out = listener_of(name, core::TrafficDirection::Outbound, chains);
    out.address = address("127.0.0.1:0".parse().unwrap());
    out
}

fn routes_to(name: &str, cluster: &str) -> route::RouteConfiguration {
    route::RouteConfiguration {
        name: name.into(),
        virtual_hosts: vec![host("all", "*", vec![prefix_route("/", to_cluster(cluster))])],
        ..Default::default()
    }
}

/// The answer on a connection of its own.
async fn answer(at: SocketAddr) -> (u16, String) {
    let (status, _, body) = get(at, "/").await;
    (status, body)
}

#[tokio::test]
async fn a_listener_waits_for_its_routes_and_the_one_before_serves_meanwhile() {
    let (old, new) = (Backend::named("old").await, Backend::named("new").await);
    let harness = Harness::start();
    harness.cluster("old", &[old.address]).await;
    harness.cluster("new", &[new.address]).await;
    let table = routes_to("first", "old");
    harness.put(ResourceType::Route, "first", &table).await;
    harness
        .put(ResourceType::Listener, "l", &listener_by("l", "first"))
        .await;
    let at = harness.proxy.listener_address("l").expect("bound");
    let mut kept = h2_client(at).await;
    assert_eq!(answer(at).await, (200, "old".to_owned()));

    harness
        .put(ResourceType::Listener, "l", &listener_by("l", "second"))
        .await;
    harness
        .put(ResourceType::Listener, "m", &listener_by("m", "second"))
        .await;
    assert_eq!(harness.proxy.store(|store| store.cold()), ["routes second"]);
    assert_eq!(harness.proxy.store(|store| store.warming_count()), (0, 2));
    assert_eq!(answer(at).await, (200, "old".to_owned()));
    assert_eq!(
        harness.proxy.listener_address("m"),
        None,
        "it has nothing to serve by"
    );
    // Others change meanwhile, and nothing waits for less.
    harness
        .put(ResourceType::Route, "first", &routes_to("first", "old"))
        .await;
    assert_eq!(answer(at).await, (200, "old".to_owned()));

    let table = routes_to("second", "new");
    harness.put(ResourceType::Route, "second", &table).await;
    assert_eq!(harness.proxy.store(|store| store.warming_count()), (0, 0));
    for name in ["l", "m"] {
        let at = harness.proxy.listener_address(name).expect("bound");
        assert_eq!(answer(at).await, (200, "new".to_owned()), "{name}");
    }
    // A connection from before is served by what it was accepted by.
    let request = Request::get("http://a/").body(Full::from("")).unwrap();
    let response = soon("an answer", kept.send_request(request)).await.unwrap();
    assert_eq!(response.status(), 200);
}

#[tokio::test]
async fn a_listener_whose_routes_do_not_come_serves_after_a_while_or_when_there_are_none() {
    let harness = Harness::start();
    harness
        .put(ResourceType::Listener, "l", &listener_by("l", "never"))
        .await;
    harness
        .put(ResourceType::Listener, "m", &listener_by("m", "none"))
        .await;
    harness.proxy.tend_secrets(1).await;
    assert_eq!(harness.proxy.listener_address("l"), None);
    // The control plane says that there is no such table.
    harness.remove(ResourceType::Route, "none").await;
    let at = harness.proxy.listener_address("m").expect("bound");
    assert_eq!(answer(at).await.0, 404);
    assert_eq!(harness.proxy.listener_address("l"), None);
    harness.proxy.tend_secrets(u64::MAX).await;
    let at = harness.proxy.listener_address("l").expect("bound");
    assert_eq!(answer(at).await.0, 404);
}

#[tokio::test]
async fn a_listener_that_is_removed_while_it_waits_asks_for_its_routes_no_longer() {
    let harness = Harness::start();
    harness
        .put(ResourceType::Listener, "l", &listener_by("l", "late"))
        .await;
    harness.remove(ResourceType::Listener, "l").await;
    assert!(harness.proxy.store(|store| store.is_complete()));
    harness
        .put(ResourceType::Route, "late", &routes_to("late", "c"))
        .await;
    assert_eq!(harness.proxy.listener_address("l"), None);
}

#[tokio::test]
async fn a_cluster_whose_endpoints_have_another_name_keeps_those_it_has_until_they_come() {
    let (old, new) = (Backend::named("old").await, Backend::named("new").await);
    let harness = Harness::start();
    harness.cluster("c", &[old.address]).await;
    let at = harness.serve(vec![prefix_route("/", to_cluster("c"))]).await;
    assert_eq!(answer(at).await, (200, "old".to_owned()));

    let mut renamed = eds_cluster("c");
    renamed.eds_cluster_config = Some(cluster::cluster::EdsClusterConfig {
        service_name: "elsewhere".into(),
        ..renamed.eds_cluster_config.unwrap_or_default()
    });
    harness.put(ResourceType::Cluster, "c", &renamed).await;
    assert_eq!(harness.proxy.store(|store| store.cold()), ["endpoints elsewhere"]);
    assert_eq!(harness.proxy.store(|store| store.warming_count()), (1, 0));
    assert_eq!(answer(at).await, (200, "old".to_owned()));
    harness.endpoints("elsewhere", &[new.address]).await;
    assert_eq!(harness.proxy.store(|store| store.warming_count()), (0, 0));
    assert_eq!(answer(at).await, (200, "new".to_owned()));

    // One that does not get any is taken after a while, with the endpoints that were good last.
    harness.put(ResourceType::Cluster, "c", &eds_cluster("c")).await;
    assert_eq!(harness.proxy.store(|store| store.warming_count()), (1, 0));
    harness.proxy.tend_secrets(u64::MAX).await;
    assert_eq!(harness.proxy.store(|store| store.warming_count()), (0, 0));
    assert_eq!(answer(at).await, (200, "new".to_owned()));
}
