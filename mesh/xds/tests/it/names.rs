//! Names that are asked for beside everything, and the resources that answer them.

use std::time::Duration;

use serin_xds::Change;
use serin_xds::ResourceType::{Cluster, Endpoints, VirtualHost};
use serin_xds::client::state::ClientState;
use serin_xds::client::{Interest, NameChanges};
use serin_xds::pb::envoy::service::discovery::v3::{DeltaDiscoveryResponse, Resource};
use serin_xds::pb::google::protobuf::Any;
use serin_xds::server::Options;
use serin_xds::server::connection::Connection;

use crate::support::{Link, resource};

fn everything_and(names: &[&str]) -> Interest {
    Interest {
        all: true,
        ..Interest::names(names.iter().copied())
    }
}

fn host(name: &str, aliases: &[&str]) -> Resource {
    Resource {
        name: name.into(),
        version: "1".into(),
        aliases: aliases.iter().map(|alias| (*alias).to_owned()).collect(),
        resource: Some(Any {
            type_url: VirtualHost.type_url().into(),
            value: vec![1],
        }),
        ..Resource::default()
    }
}

/// A client that is interested in everything and these names, and has said so.
fn client(names: &[&str]) -> ClientState {
    let mut client = ClientState::new(Default::default());
    client.set_interest(VirtualHost, everything_and(names));
    while client.next_delta_request().is_some() {}
    client
}

/// Names of what a response brings, all of which is accepted.
fn take(client: &mut ClientState, resources: Vec<Resource>) -> Vec<String> {
    let response = DeltaDiscoveryResponse {
        type_url: VirtualHost.type_url().into(),
        nonce: "1".into(),
        resources,
        ..Default::default()
    };
    let (incoming, receipt) = client.receive_delta(response).unwrap();
    client.settle_delta(&receipt, Vec::new());
    incoming.upserted.iter().map(|one| one.name.to_string()).collect()
}

#[test]
fn a_resource_that_is_held_answers_another_of_its_names_and_goes_with_the_last_of_them() {
    let mut client = client(&["80/a"]);
    assert_eq!(take(&mut client, vec![host("80/host", &["80/a"])]), ["80/host"]);
    assert!(
        take(&mut client, vec![host("80/host", &["80/a"])]).is_empty(),
        "nothing new"
    );
    client.set_interest(VirtualHost, everything_and(&["80/a", "80/b"]));
    let again = host("80/host", &["80/a", "80/b"]);
    assert_eq!(take(&mut client, vec![again]), ["80/host"], "it answers 80/b");
    client.set_interest(VirtualHost, everything_and(&["80/b"]));
    assert_eq!(client.held(VirtualHost).count(), 1, "80/b stands for it");
    client.set_interest(VirtualHost, everything_and(&[]));
    assert_eq!(client.held(VirtualHost).count(), 0);
    client.set_interest(VirtualHost, everything_and(&["80/a"]));
    assert_eq!(take(&mut client, vec![host("80/host", &["80/a"])]), ["80/host"]);
}

#[test]
fn a_name_that_is_given_up_while_everything_is_wanted_is_sent_again_if_it_is_part_of_that() {
    let mut server = Connection::new(Options::default());
    server.load([resource(Cluster, "c", "1")]);
    server.subscribe(Cluster, true, ["c", "none"]);
    let first = server.poll(Duration::ZERO).unwrap();
    assert_eq!((first.upserted.len(), &*first.removed), (1, &["none".into()][..]));
    server.answer(Cluster, first.nonce, None);
    server.unsubscribe(Cluster, false, ["c", "none"]);
    let second = server.poll(Duration::ZERO).unwrap();
    assert_eq!(second.upserted.len(), 1, "the client has dropped it");
    server.answer(Cluster, second.nonce, None);
    assert!(server.poll(Duration::ZERO).is_none());
}

#[test]
fn a_name_that_is_given_up_while_its_resource_is_under_way_is_sent_again() {
    let mut server = Connection::new(Options::default());
    server.load([resource(Cluster, "c", "1")]);
    server.subscribe(Cluster, true, ["c"]);
    let first = server.poll(Duration::ZERO).unwrap();
    server.unsubscribe(Cluster, false, ["c"]);
    server.answer(Cluster, first.nonce, None);
    assert_eq!(server.poll(Duration::ZERO).unwrap().upserted.len(), 1);
}

#[test]
fn a_name_that_is_given_up_and_wanted_again_at_once_comes_again_also_if_its_resource_is_on_its_way() {
    for on_its_way in 0..4 {
        let mut link = Link::new();
        link.apply(vec![Change::Upsert(resource(Endpoints, "a", "1"))]);
        link.set_interest(Endpoints, Interest::names(["a", "b"]));
        // Nothing has happened yet, the server has sent it, it is with the consumer, or the server knows that it is held.
        let steps: [fn(&mut Link); 3] = [
            |link| assert!(link.deliver_to_server(false)),
            |link| assert!(link.deliver_to_client(false)),
            |link| {
                link.settle();
                link.deliver_to_server(false);
            },
        ];
        for step in steps.iter().take(on_its_way) {
            step(&mut link);
        }
        link.renew(Endpoints, &["a"]);
        link.quiesce();
        let key = (Endpoints, "a".into());
        assert!(link.running.contains_key(&key), "after {on_its_way} steps");
        assert_eq!(link.client.held(Endpoints).count(), 1, "after {on_its_way} steps");
        link.log.clear();
        link.quiesce();
        assert!(link.log.is_empty(), "{:?}", link.log);
    }
}

#[test]
fn changes_of_names_ask_for_what_is_new_and_give_up_what_is_gone() {
    let mut client = ClientState::new(Default::default());
    let change = |added: &[&str], removed: &[&str]| {
        let mut changes = NameChanges::default();
        for name in added {
            changes.add(*name);
        }
        for name in removed {
            changes.remove(*name);
        }
        changes
    };
    client.change_interest(Endpoints, change(&["a", "b"], &[]));
    let first = client.next_delta_request().unwrap();
    assert_eq!(first.resource_names_subscribe, ["a", "b"]);
    client.change_interest(Endpoints, change(&["c"], &["a"]));
    client.change_interest(Endpoints, change(&["d"], &["c", "never"]));
    let second = client.next_delta_request().unwrap();
    assert_eq!(second.resource_names_subscribe, ["d"]);
    assert_eq!(second.resource_names_unsubscribe, ["a"]);
    assert!(client.next_delta_request().is_none());
    assert!(
        client
            .interest(Endpoints)
            .names
            .iter()
            .map(|name| &**name)
            .eq(["b", "d"])
    );
}

#[test]
fn what_was_on_its_way_as_its_name_was_given_up_for_everything_is_taken_back_if_it_is_gone() {
    for gone_before in [true, false] {
        let mut link = Link::new();
        link.set_interest(Endpoints, Interest::names(["a"]));
        link.apply(vec![Change::Upsert(resource(Endpoints, "a", "good"))]);
        while link.deliver_to_server(false) {}
        let remove = |link: &mut Link| link.apply(vec![Change::Remove(Endpoints, "a".into())]);
        // The response is on its way. Its client no longer asks for the name, but for everything.
        if gone_before {
            remove(&mut link);
        }
        link.set_interest(Endpoints, Interest::all());
        while link.deliver_to_server(false) {}
        if !gone_before {
            remove(&mut link);
        }
        link.quiesce();
        assert!(link.running.is_empty(), "{gone_before}: {:?}", link.running);
        assert!(link.believed.is_empty(), "{gone_before}: {:?}", link.believed);
    }
}
