use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use proptest::prelude::*;
use serin_xds::server::Event;
use serin_xds::{Origin, Resource, ResourceType};

use super::book::Book;
use super::{Ledger, ProxyStand};

const VS: &str = "VirtualService/prod/reviews";

fn host(content: &str, generation: i64) -> Arc<Resource> {
    named("80/reviews", content, &[(VS, generation)])
}

fn named(name: &str, content: &str, origins: &[(&str, i64)]) -> Arc<Resource> {
    let origins: Vec<_> = origins
        .iter()
        .map(|(object, generation)| Origin {
            object: Arc::from(*object),
            generation: *generation,
        })
        .collect();
    let body = content.as_bytes().to_vec().into();
    Arc::new(Resource::from_encoded(
        ResourceType::VirtualHost,
        name,
        body,
        origins,
    ))
}

fn gone(name: &str) -> Event {
    Event::Gone(ResourceType::VirtualHost, name.into())
}

fn unwanted(name: &str) -> Event {
    Event::Unwanted(ResourceType::VirtualHost, name.into())
}

fn give(book: &mut Book, client: u64, resource: &Arc<Resource>) {
    book.record(
        client,
        &[Event::Wanted(resource.clone()), Event::Sent(resource.clone())],
        at(1),
    );
}

fn take(book: &mut Book, client: u64, resource: &Arc<Resource>) {
    book.record(client, &[Event::Held(resource.clone())], at(2));
}

fn at(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

fn vs() -> Arc<str> {
    VS.into()
}

/// A book in which `clients` proxies run with generation 1.
fn live(clients: u64) -> Book {
    let mut book = Book::default();
    let one = host("weight 0", 1);
    for client in 1..=clients {
        book.connect(client, &format!("sidecar~10.0.0.{client}~p{client}.prod~x"));
        give(&mut book, client, &one);
        take(&mut book, client, &one);
    }
    book.observe(&vs(), 1, at(1));
    assert!(book.liveness(VS, 1).is_live());
    book
}

#[test]
fn a_generation_is_live_when_every_proxy_that_needs_it_has_taken_it_and_not_when_it_was_sent() {
    let mut book = live(3);
    book.connect(9, "sidecar~10.0.0.9~other.prod~x"); // needs nothing of it
    let two = host("weight 5", 2);
    (1..=3).for_each(|client| give(&mut book, client, &two));
    book.observe(&vs(), 2, at(1));
    let sent = book.liveness(VS, 2);
    assert_eq!(
        (sent.needed, sent.sent, sent.acked, sent.is_live()),
        (3, 3, 0, false)
    );
    take(&mut book, 1, &two);
    take(&mut book, 3, &two);
    let nearly = book.liveness(VS, 2);
    assert_eq!(
        (nearly.acked, nearly.slowest.as_deref()),
        (2, Some("sidecar~10.0.0.2~p2.prod~x"))
    );
    assert_eq!(
        nearly.to_string(),
        "2/3 proxies; waiting for sidecar~10.0.0.2~p2.prod~x"
    );
    take(&mut book, 2, &two);
    let done = book.liveness(VS, 2);
    assert!(done.is_live());
    assert_eq!(
        (done.to_string().as_str(), done.live_after),
        ("3/3 proxies", Some(at(1)))
    );
}

#[test]
fn a_generation_that_changed_no_content_is_live_at_once() {
    let mut book = live(2);
    // The resource comes again with newer origins and the same content: nothing is sent.
    for client in 1..=2 {
        let same = host("weight 0", 2);
        book.record(client, &[Event::Wanted(same.clone()), Event::Held(same)], at(1));
    }
    book.observe(&vs(), 2, at(1));
    assert!(book.liveness(VS, 2).is_live());
    // Nor does a generation that touched no resource at all need anything.
    book.observe(&vs(), 3, at(2));
    assert!(book.liveness(VS, 3).is_live());
}

#[test]
fn before_it_is_translated_a_generation_is_not_live_whatever_the_counts() {
    let book = live(2);
    let early = book.liveness(VS, 2);
    assert!(!early.observed && !early.is_live());
    assert!(!book.liveness("VirtualService/prod/unknown", 1).is_live());
}

#[test]
fn a_refusal_names_proxy_resource_and_reason_and_is_healed_by_the_next_content() {
    let mut book = live(2);
    let bad = host("bad", 2);
    give(&mut book, 1, &bad);
    give(&mut book, 2, &bad);
    book.observe(&vs(), 2, at(1));
    take(&mut book, 2, &bad);
    book.record(1, &[Event::Refused(bad.clone(), "no such cluster".into())], at(2));
    let refused = book.liveness(VS, 2);
    assert_eq!(
        (
            refused.refused,
            refused.acked,
            refused.is_live(),
            refused.is_refused()
        ),
        (1, 1, false, true)
    );
    assert_eq!(
        refused.to_string(),
        "1/2 proxies; refused by 1, first by sidecar~10.0.0.1~p1.prod~x: VHDS 80/reviews: no such cluster"
    );
    assert!(matches!(book.report(VS).proxies[0].2, ProxyStand::Refused(_)));
    // The same content at a newer generation is as bad as before, without being sent.
    book.record(1, &[Event::Wanted(host("bad", 3))], at(3));
    book.observe(&vs(), 3, at(3));
    assert!(book.liveness(VS, 3).is_refused());
    let good = host("good", 4);
    (1..=2).for_each(|client| give(&mut book, client, &good));
    book.observe(&vs(), 4, at(4));
    assert!(!book.liveness(VS, 4).is_refused());
    (1..=2).for_each(|client| take(&mut book, client, &good));
    assert!(book.liveness(VS, 4).is_live());
}

#[test]
fn a_gone_proxy_is_not_needed_and_a_returning_one_counts_by_what_it_holds() {
    let mut book = live(3);
    let two = host("weight 5", 2);
    (1..=3).for_each(|client| give(&mut book, client, &two));
    book.observe(&vs(), 2, at(1));
    take(&mut book, 1, &two);
    take(&mut book, 2, &two);
    book.disconnect(3);
    assert!(book.liveness(VS, 2).is_live());
    // It comes back with the old weight …
    book.connect(4, "sidecar~10.0.0.3~p3.prod~x");
    book.record(4, &[Event::Wanted(two.clone())], at(3));
    let back = book.liveness(VS, 2);
    assert_eq!((back.needed, back.sent, back.acked), (3, 2, 2));
    // … and another one with the new one.
    book.disconnect(2);
    book.connect(5, "sidecar~10.0.0.2~p2.prod~x");
    book.record(5, &[Event::Wanted(two.clone()), Event::Held(two.clone())], at(3));
    assert_eq!(book.liveness(VS, 2).acked, 2);
    book.record(4, &[Event::Sent(two.clone()), Event::Held(two)], at(4));
    assert!(book.liveness(VS, 2).is_live());
}

#[test]
fn an_overtaken_generation_is_acked_by_whoever_acked_the_newer_one() {
    let mut book = live(2);
    let (two, three) = (host("weight 5", 2), host("weight 10", 3));
    (1..=2).for_each(|client| give(&mut book, client, &two));
    book.observe(&vs(), 2, at(1));
    take(&mut book, 1, &two);
    (1..=2).for_each(|client| give(&mut book, client, &three));
    book.observe(&vs(), 3, at(2));
    assert_eq!(
        book.liveness(VS, 2).acked,
        1,
        "the proxy that took 2 still counts for it"
    );
    take(&mut book, 2, &three);
    assert!(book.liveness(VS, 2).is_live());
    assert!(!book.liveness(VS, 3).is_live());
}

#[test]
fn what_has_to_go_counts_until_it_is_gone() {
    let mut book = live(2);
    // Generation 2 routes another host: the old one loses its routes, in one proxy it is removed altogether.
    let plain = named("80/reviews", "no routes", &[]);
    book.record(
        1,
        &[Event::Wanted(plain.clone()), Event::Sent(plain.clone())],
        at(1),
    );
    book.record(2, &[unwanted("80/reviews")], at(1));
    book.observe(&vs(), 2, at(1));
    assert_eq!(
        (book.liveness(VS, 2).needed, book.liveness(VS, 2).is_live()),
        (2, false)
    );
    book.record(1, &[Event::Held(plain)], at(2));
    assert!(!book.liveness(VS, 2).is_live());
    book.record(2, &[gone("80/reviews")], at(2));
    let done = book.liveness(VS, 2);
    assert!(done.is_live());
    assert_eq!(done.to_string(), "no connected proxy needs it");
}

#[test]
fn a_deleted_object_is_forgotten_once_no_proxy_has_anything_of_it_and_starts_anew_when_created_again() {
    let mut book = live(1);
    book.forget(&vs());
    book.record(1, &[unwanted("80/reviews"), gone("80/reviews")], at(2));
    assert!(!book.liveness(VS, 1).observed, "forgotten");

    let mut book = live(1);
    book.observe(&vs(), 7, at(2));
    assert!(book.liveness(VS, 7).is_live());
    // Deleted and created again between two looks: generation 1 again, of other content.
    let new = host("new", 1);
    give(&mut book, 1, &new);
    book.observe(&vs(), 1, at(3));
    assert!(!book.liveness(VS, 1).is_live());
    take(&mut book, 1, &new);
    assert!(book.liveness(VS, 1).is_live());
}

#[test]
fn a_generation_refused_by_the_control_plane_says_so_and_the_next_good_one_clears_it() {
    let mut book = live(1);
    book.reject(&vs(), 2, "spec.http[0]: weights sum to zero", at(1));
    let rejected = book.liveness(VS, 2);
    assert!(rejected.is_refused() && !rejected.is_live());
    assert!(rejected.to_string().contains("weights sum to zero"));
    assert!(
        book.liveness(VS, 1).rejected.is_some(),
        "watchers of older generations hear of it too"
    );
    book.observe(&vs(), 3, at(2));
    assert!(book.liveness(VS, 3).is_live());
}

#[tokio::test]
async fn watchers_hear_of_every_step_without_polling() {
    let ledger = Ledger::new();
    let mut watch = ledger.watch(VS, 1);
    assert!(!watch.borrow_and_update().observed);
    ledger.connect(1, "sidecar~10.0.0.1~p1.prod~x");
    let one = host("weight 0", 1);
    ledger.record(1, &[Event::Wanted(one.clone()), Event::Sent(one.clone())]);
    ledger.observe(&vs(), 1);
    let seen = watch
        .wait_for(|liveness| liveness.observed && liveness.sent == 1)
        .await
        .unwrap()
        .clone();
    assert!(!seen.is_live());
    ledger.record(1, &[Event::Held(one)]);
    assert!(watch.wait_for(|liveness| liveness.is_live()).await.is_ok());
    assert_eq!(ledger.changes().await, HashSet::from([vs()]));
    assert_eq!(ledger.objects().len(), 1);
    assert_eq!(ledger.proxies()[0].pending, 0);
}

#[derive(Clone, Debug)]
enum Step {
    Connect(u64),
    Disconnect(u64),
    Want {
        client: u64,
        name: u8,
        content: u8,
        origins: Vec<(u8, i64)>,
    },
    Unwant {
        client: u64,
        name: u8,
    },
    Sent {
        client: u64,
        name: u8,
    },
    Held {
        client: u64,
        name: u8,
    },
    Refused {
        client: u64,
        name: u8,
    },
    Gone {
        client: u64,
        name: u8,
    },
    Observe {
        object: u8,
        generation: i64,
    },
}

fn step() -> impl Strategy<Value = Step> {
    let client = 0..3u64;
    let name = 0..3u8;
    prop_oneof![
        1 => client.clone().prop_map(Step::Connect),
        1 => client.clone().prop_map(Step::Disconnect),
        6 => (client.clone(), name.clone(), 0..3u8, proptest::collection::vec((0..2u8, 1..5i64), 0..3))
            .prop_map(|(client, name, content, origins)| Step::Want { client, name, content, origins }),
        2 => (client.clone(), name.clone()).prop_map(|(client, name)| Step::Unwant { client, name }),
        4 => (client.clone(), name.clone()).prop_map(|(client, name)| Step::Sent { client, name }),
        6 => (client.clone(), name.clone()).prop_map(|(client, name)| Step::Held { client, name }),
        2 => (client.clone(), name.clone()).prop_map(|(client, name)| Step::Refused { client, name }),
        2 => (client, name).prop_map(|(client, name)| Step::Gone { client, name }),
        2 => (0..2u8, 1..6i64).prop_map(|(object, generation)| Step::Observe { object, generation }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn running_counts_equal_counts_made_from_scratch(steps in proptest::collection::vec(step(), 0..80)) {
        let mut book = Book::default();
        let mut last: std::collections::HashMap<(u64, u8), Arc<Resource>> = Default::default();
        for (second, step) in steps.iter().enumerate() {
            let now = at(second as u64);
            let name = |index: &u8| format!("80/h{index}");
            let of = |client: &u64, name: &u8| last.get(&(*client, *name)).cloned();
            match step {
                Step::Connect(client) => {
                    book.disconnect(*client);
                    book.connect(*client, &format!("p{client}"));
                }
                Step::Disconnect(client) => drop(book.disconnect(*client)),
                Step::Want { client, name: index, content, origins } => {
                    let origins: Vec<_> = origins.iter().map(|(object, generation)| (format!("o{object}"), *generation)).collect();
                    let origins: Vec<_> = origins.iter().map(|(object, generation)| (object.as_str(), *generation)).collect();
                    let resource = named(&name(index), &content.to_string(), &origins);
                    last.insert((*client, *index), resource.clone());
                    book.record(*client, &[Event::Wanted(resource)], now);
                }
                Step::Unwant { client, name: index } => drop(book.record(*client, &[unwanted(&name(index))], now)),
                Step::Gone { client, name: index } => drop(book.record(*client, &[gone(&name(index))], now)),
                Step::Sent { client, name } => drop(of(client, name).map(|one| book.record(*client, &[Event::Sent(one)], now))),
                Step::Held { client, name } => drop(of(client, name).map(|one| book.record(*client, &[Event::Held(one)], now))),
                Step::Refused { client, name } => {
                    drop(of(client, name).map(|one| book.record(*client, &[Event::Refused(one, "no".into())], now)));
                }
                Step::Observe { object, generation } => {
                    drop(book.observe(&format!("o{object}").into(), *generation, now));
                }
            }
            for object in ["o0", "o1"] {
                let running = book.liveness(object, 1);
                let counted = book.count_from_scratch(object);
                prop_assert_eq!((running.needed, running.sent, running.refused), counted, "{} after {:?}", object, step);
                prop_assert!(running.acked <= running.needed);
            }
        }
        for client in 0..3 {
            book.disconnect(client);
        }
        prop_assert_eq!(book.liveness("o0", 1).needed, 0);
    }
}
