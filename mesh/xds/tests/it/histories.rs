//! Generated histories: changes, partial delivery, repeated messages, refusals, lost streams, changing interests.

use std::sync::Arc;

use proptest::prelude::*;
use serin_xds::client::Interest;
use serin_xds::{Change, ResourceType};

use crate::support::{Link, resource};

#[derive(Clone, Debug)]
enum Step {
    /// One transaction: (type, name, new content or removal).
    Change(Vec<(usize, u8, Option<u8>)>),
    ToServer {
        repeated: bool,
    },
    ToClient {
        repeated: bool,
    },
    Settle,
    Reconnect {
        load_after: usize,
    },
    Interest {
        resource_type: usize,
        all: bool,
        names: Vec<u8>,
    },
    Wait(u16),
}

fn name(index: u8) -> Arc<str> {
    format!("r{index}").into()
}

/// Two of ten contents are refused.
fn content(index: u8) -> String {
    if index < 2 {
        format!("bad{index}")
    } else {
        format!("good{index}")
    }
}

fn step() -> impl Strategy<Value = Step> {
    let change = (0..6usize, 0..6u8, proptest::option::weighted(0.8, 0..10u8));
    prop_oneof![
        4 => proptest::collection::vec(change, 1..4).prop_map(Step::Change),
        5 => proptest::bool::weighted(0.1).prop_map(|repeated| Step::ToServer { repeated }),
        5 => proptest::bool::weighted(0.1).prop_map(|repeated| Step::ToClient { repeated }),
        5 => Just(Step::Settle),
        1 => (0..7usize).prop_map(|load_after| Step::Reconnect { load_after }),
        1 => (0..6usize, proptest::bool::weighted(0.2), proptest::collection::vec(0..6u8, 0..4))
            .prop_map(|(resource_type, all, names)| Step::Interest { resource_type, all, names }),
        1 => (0..3000u16).prop_map(Step::Wait),
    ]
}

fn changes(change: &[(usize, u8, Option<u8>)]) -> Vec<Change> {
    change
        .iter()
        .map(|(ty, index, new)| {
            let resource_type = ResourceType::ALL[*ty];
            match new {
                Some(new) => Change::Upsert(resource(resource_type, &name(*index), &content(*new))),
                None => Change::Remove(resource_type, name(*index)),
            }
        })
        .collect()
}

fn without_refusals(mut step: Step) -> Step {
    if let Step::Change(changes) = &mut step {
        changes
            .iter_mut()
            .filter_map(|(_, _, content)| content.as_mut())
            .for_each(|content| *content += 2);
    }
    step
}

fn run(steps: &[Step]) -> Link {
    let mut link = Link::new();
    for resource_type in [
        ResourceType::Cluster,
        ResourceType::Listener,
        ResourceType::VirtualHost,
    ] {
        link.set_interest(resource_type, Interest::all());
    }
    for resource_type in [ResourceType::Endpoints, ResourceType::Route] {
        link.set_interest(resource_type, Interest::names(["r0", "r1", "r2"]));
    }
    for step in steps {
        match step {
            Step::Change(change) => link.apply(changes(change)),
            Step::ToServer { repeated } => drop(link.deliver_to_server(*repeated)),
            Step::ToClient { repeated } => drop(link.deliver_to_client(*repeated)),
            Step::Settle => drop(link.settle()),
            Step::Reconnect { load_after } => link.reconnect(*load_after),
            Step::Interest {
                resource_type,
                all,
                names,
            } => {
                let mut interest = Interest::names(names.iter().map(|index| name(*index)));
                interest.all = *all;
                link.set_interest(ResourceType::ALL[*resource_type], interest);
            }
            Step::Wait(millis) => {
                link.now += std::time::Duration::from_millis((*millis).into());
                link.apply(Vec::new());
            }
        }
    }
    link
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn after_any_history_the_proxy_runs_with_its_view_and_the_server_knows_it(
        steps in proptest::collection::vec(step(), 0..80)
    ) {
        let mut link = run(&steps);
        link.quiesce();
        for resource_type in ResourceType::ALL {
            let interest = link.client.interest(resource_type).clone();
            for index in 0..6 {
                let name = name(index);
                let key = (resource_type, name.clone());
                let wanted = link.view.get(&key).map(|resource| resource.version.clone());
                let running = link.running.get(&key).cloned();
                let held = link.client.held(resource_type).find(|(held, _)| **held == name);
                prop_assert_eq!(&running, &held.map(|(_, version)| version.clone()), "held is what runs: {:?}", key);
                // A version that was stated on reconnect and is not the wanted one is known by its version only.
                let stated = link.refused.contains_key(&key) && !link.believed.contains_key(&key);
                if !stated {
                    prop_assert_eq!(&link.believed.get(&key).cloned(), &running, "acked is what runs: {:?}", key);
                }
                if !interest.all && !interest.names.contains(&name) {
                    prop_assert_eq!(running, None, "not wanted: {:?}", key);
                } else if wanted != running {
                    // Only a refusal explains a difference, and the server knows of it.
                    prop_assert!(wanted.is_some(), "not removed: {:?}", key);
                    prop_assert_eq!(link.refused.get(&key).cloned(), wanted, "neither held nor refused: {:?}", key);
                }
            }
        }
    }

    #[test]
    fn a_quiet_proxy_is_sent_nothing_when_it_reconnects_or_nothing_changes(
        steps in proptest::collection::vec(step(), 0..60)
    ) {
        // Refusals are not stated on reconnect and are tried once more, so there are none here.
        let steps_len = steps.len();
        let mut link = run(&steps.into_iter().map(without_refusals).collect::<Vec<_>>());
        link.quiesce();
        let same: Vec<_> = link.view.values().cloned().map(Change::Upsert).collect();
        link.log.clear();
        link.apply(same);
        link.quiesce();
        prop_assert_eq!(&link.log, &Vec::<String>::new(), "an unchanged view was sent");

        link.reconnect(steps_len % 7);
        link.quiesce();
        // The first answer of each type is owed even when it is empty. Names that were asked for and do not exist
        // are answered too.
        for line in &link.log {
            for sent in line.split(' ').skip(1).filter(|sent| !sent.is_empty()) {
                let exists = link.view.keys().any(|(ty, name)| {
                    line.split(' ').next() == ty.type_url().rsplit('.').next() && **name == *sent
                });
                prop_assert!(!exists, "{} was sent again: {:?}", sent, link.log);
            }
        }
    }

    #[test]
    fn a_refused_version_is_not_sent_again_until_its_content_changes(
        steps in proptest::collection::vec(step(), 0..40), bad in 0..2u8, good in 2..10u8
    ) {
        let mut link = run(&steps);
        link.set_interest(ResourceType::VirtualHost, Interest::all());
        let at = |ty: ResourceType| ResourceType::ALL.iter().position(|one| *one == ty).unwrap();
        let (host, cluster) = (at(ResourceType::VirtualHost), at(ResourceType::Cluster));
        link.apply(changes(&[(host, 0, Some(bad))]));
        link.quiesce();
        link.log.clear();
        link.apply(changes(&[(host, 0, Some(bad)), (cluster, 5, Some(good))]));
        link.quiesce();
        let hosts = |link: &Link| link.log.iter().filter(|line| line.starts_with("VirtualHost r0")).count();
        prop_assert_eq!(hosts(&link), 0, "{:?}", link.log);
        link.apply(changes(&[(host, 0, Some(good))]));
        link.quiesce();
        let key = (ResourceType::VirtualHost, name(0));
        prop_assert_eq!(link.running.get(&key), Some(&link.view[&key].version));
    }
}
