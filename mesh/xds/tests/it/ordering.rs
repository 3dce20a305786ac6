//! Make before break: what a resource refers to is there, acknowledged, before the resource is.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use proptest::prelude::*;
use serin_xds::client::Interest;
use serin_xds::server::connection::Connection;
use serin_xds::server::{Event, Options};
use serin_xds::{Change, ResourceType};

use crate::support::{Link, resource};
use ResourceType::{Cluster, Endpoints, Listener, Route, VirtualHost};

fn upsert(resource_type: ResourceType, name: &str, content: &str) -> Change {
    Change::Upsert(resource(resource_type, name, content))
}

fn link() -> Link {
    let mut link = Link::new();
    for resource_type in ResourceType::ALL {
        link.set_interest(resource_type, Interest::all());
    }
    link.quiesce();
    link.log.clear();
    link
}

#[test]
fn a_transaction_arrives_in_dependency_order_and_removals_come_last() {
    let mut link = link();
    link.apply(vec![
        upsert(Cluster, "old", "1"),
        upsert(Endpoints, "old", "1"),
        upsert(VirtualHost, "h", "old"),
    ]);
    link.quiesce();
    link.log.clear();
    link.apply(vec![
        Change::Remove(Cluster, "old".into()),
        Change::Remove(Endpoints, "old".into()),
        upsert(VirtualHost, "h", "new"),
        upsert(Endpoints, "new", "1"),
        upsert(Cluster, "new", "1"),
    ]);
    link.quiesce();
    assert_eq!(
        link.log,
        [
            "Cluster new",
            "ClusterLoadAssignment new",
            "VirtualHost h",
            "Cluster old",
            "ClusterLoadAssignment old"
        ]
    );
}

#[test]
fn a_lone_change_of_a_route_waits_for_nothing() {
    let mut link = link();
    link.apply(vec![upsert(Endpoints, "a", "1")]);
    // The endpoints are outstanding, unanswered; a route that changed with or before them would wait, this one is
    // newer, so it waits for them too, but for nothing that comes later.
    link.apply(vec![upsert(VirtualHost, "h", "1")]);
    link.apply(vec![upsert(Endpoints, "a", "2")]);
    assert!(link.deliver_to_client(false) && link.settle() && link.deliver_to_server(false));
    while link.deliver_to_client(false) {}
    assert_eq!(link.log[0], "ClusterLoadAssignment a");
    assert!(
        link.log.contains(&"VirtualHost h".to_string()),
        "starved by later churn: {:?}",
        link.log
    );
}

#[test]
fn a_client_that_does_not_acknowledge_is_sent_the_rest_after_the_patience() {
    let mut server = Connection::new(Options::default());
    server.load([]);
    for resource_type in ResourceType::ALL {
        server.subscribe(resource_type, true, []);
    }
    let mut now = Duration::ZERO;
    while let Some(response) = server.poll(now) {
        server.answer(response.resource_type, response.nonce, None);
    }
    server.apply(vec![upsert(Cluster, "c", "1"), upsert(VirtualHost, "h", "c")]);
    assert_eq!(
        server.poll(now).map(|response| response.resource_type),
        Some(Cluster)
    );
    assert!(server.poll(now).is_none());
    let deadline = server.deadline().expect("something waits");
    assert_eq!(deadline, Options::default().patience);
    now = deadline.saturating_sub(Duration::from_millis(1));
    assert!(server.poll(now).is_none());
    assert_eq!(
        server.poll(deadline).map(|response| response.resource_type),
        Some(VirtualHost)
    );
}

#[test]
fn endpoints_of_a_changed_cluster_are_sent_again_to_those_who_forget_them() {
    for forgets in [true, false] {
        let mut server = Connection::new(Options {
            endpoints_follow_clusters: forgets,
            ..Options::default()
        });
        server.load([resource(Cluster, "c", "1"), resource(Endpoints, "c", "1")]);
        for resource_type in [Cluster, Endpoints] {
            server.subscribe(resource_type, true, []);
        }
        let sent = |server: &mut Connection| {
            let mut sent = Vec::new();
            while let Some(response) = server.poll(Duration::ZERO) {
                sent.push(response.resource_type);
                server.answer(response.resource_type, response.nonce, None);
            }
            sent
        };
        assert_eq!(sent(&mut server), [Cluster, Endpoints]);
        server.apply(vec![upsert(Cluster, "c", "2")]);
        let wanted: &[ResourceType] = if forgets {
            &[Cluster, Endpoints]
        } else {
            &[Cluster]
        };
        assert_eq!(sent(&mut server), wanted, "{forgets}");
    }
}

#[test]
fn routes_wait_until_endpoints_of_new_clusters_have_been_asked_for_and_taken() {
    let mut server = Connection::new(Options::default());
    server.load([]);
    server.subscribe(Cluster, true, []);
    server.subscribe(VirtualHost, true, []);
    let now = Duration::ZERO;
    while let Some(response) = server.poll(now) {
        server.answer(response.resource_type, response.nonce, None);
    }
    server.apply(vec![
        upsert(Cluster, "c", "1"),
        upsert(Endpoints, "c", "1"),
        upsert(VirtualHost, "h", "c"),
    ]);
    let clusters = server.poll(now).unwrap();
    server.answer(Cluster, clusters.nonce, None);
    assert!(
        server.poll(now).is_none(),
        "the route must wait for the endpoints to be asked for"
    );
    server.subscribe(Endpoints, false, ["c"]);
    let endpoints = server.poll(now).unwrap();
    assert_eq!(endpoints.resource_type, Endpoints);
    assert!(
        server.poll(now).is_none(),
        "the route must wait for the endpoints to be taken"
    );
    server.answer(Endpoints, endpoints.nonce, None);
    assert_eq!(
        server.poll(now).map(|response| response.resource_type),
        Some(VirtualHost)
    );
}

#[test]
fn a_refusal_in_prose_is_pinned_to_its_resource_and_the_rest_is_sent_again() {
    let mut server = Connection::new(Options::default());
    server.load(["a", "b", "c", "d"].map(|name| resource(Cluster, name, "1")));
    server.subscribe(Cluster, true, []);
    let now = Duration::ZERO;
    // The client refuses whatever contains "c", without a word that helps.
    let mut rounds = 0;
    while let Some(response) = server.poll(now) {
        rounds += 1;
        assert!(rounds < 20, "never converges");
        let bad = response.upserted.iter().any(|resource| &*resource.name == "c");
        server.answer(
            Cluster,
            response.nonce,
            bad.then_some("Proto constraint validation failed"),
        );
    }
    let (mut held, mut refused) = (BTreeSet::new(), BTreeSet::new());
    for event in server.take_events() {
        match event {
            Event::Held(resource) => drop(held.insert(resource.name.to_string())),
            Event::Refused(resource, _) => drop(refused.insert(resource.name.to_string())),
            _ => {}
        }
    }
    assert_eq!(held, ["a", "b", "d"].map(String::from).into());
    assert_eq!(refused, ["c".to_string()].into());
}

#[test]
fn a_large_view_is_split_over_responses() {
    let mut server = Connection::new(Options {
        max_response_bytes: 1000,
        ..Options::default()
    });
    let large = "x".repeat(400);
    server.load((0..10).map(|index| resource(Cluster, &format!("c{index}"), &large)));
    server.subscribe(Cluster, true, []);
    let mut sizes = Vec::new();
    while let Some(response) = server.poll(Duration::ZERO) {
        sizes.push(response.upserted.len());
        server.answer(Cluster, response.nonce, None);
    }
    assert_eq!(sizes, [2, 2, 2, 2, 2]);
}

#[test]
fn names_that_do_not_exist_are_answered_as_removed_and_later_come_by_themselves() {
    let mut server = Connection::new(Options::default());
    server.load([]);
    server.subscribe(Route, false, ["80"]);
    let response = server.poll(Duration::ZERO).unwrap();
    assert_eq!(response.removed, [Arc::from("80")]);
    server.answer(Route, response.nonce, None);
    assert!(server.poll(Duration::ZERO).is_none());
    server.apply(vec![upsert(Route, "80", "1")]);
    assert_eq!(server.poll(Duration::ZERO).unwrap().upserted.len(), 1);
}

#[test]
fn asking_again_for_a_held_name_is_answered() {
    let mut server = Connection::new(Options::default());
    server.load([resource(Route, "80", "1")]);
    server.subscribe(Route, false, ["80"]);
    let response = server.poll(Duration::ZERO).unwrap();
    server.answer(Route, response.nonce, None);
    server.subscribe(Route, false, ["80"]);
    assert_eq!(server.poll(Duration::ZERO).unwrap().upserted.len(), 1);
}

/// Views in which host `h` refers to one cluster at a time, whose endpoints exist exactly while the cluster does.
fn move_to(from: Option<u8>, to: u8) -> Vec<Change> {
    let mut changes = vec![
        upsert(VirtualHost, "h", &format!("c{to}")),
        upsert(Cluster, &format!("c{to}"), "1"),
        upsert(Endpoints, &format!("c{to}"), "1"),
        upsert(Listener, "0.0.0.0_80", "1"),
    ];
    if let Some(from) = from.filter(|from| *from != to) {
        changes.push(Change::Remove(Cluster, format!("c{from}").into()));
        changes.push(Change::Remove(Endpoints, format!("c{from}").into()));
    }
    changes
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn a_host_never_refers_to_a_cluster_that_the_proxy_does_not_have(
        moves in proptest::collection::vec((0..4u8, proptest::collection::vec(0..3u8, 0..6)), 1..30)
    ) {
        let mut link = link();
        let mut current = None;
        let check = |link: &Link| {
            let host = link.running.get(&(VirtualHost, "h".into()));
            for target in 0..4 {
                let cluster: Arc<str> = format!("c{target}").into();
                if host == Some(&resource(VirtualHost, "h", &cluster).version) {
                    prop_assert!(link.running.contains_key(&(Cluster, cluster.clone())), "503 NC: {:?}", link.log);
                    prop_assert!(link.running.contains_key(&(Endpoints, cluster)), "503 UH: {:?}", link.log);
                }
            }
            Ok(())
        };
        for (target, deliveries) in moves {
            link.apply(move_to(current, target));
            current = Some(target);
            check(&link)?;
            for delivery in deliveries {
                match delivery {
                    0 => link.deliver_to_client(false),
                    1 => link.settle(),
                    _ => link.deliver_to_server(false),
                };
                check(&link)?;
            }
        }
        while link.deliver_to_client(false) || link.settle() || link.deliver_to_server(false) {
            check(&link)?;
        }
    }
}
