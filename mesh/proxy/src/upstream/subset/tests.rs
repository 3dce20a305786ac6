use std::sync::Arc;

use proptest::prelude::*;
use serin_xds::pb::envoy::config::cluster::v3 as cluster;
use serin_xds::pb::google::protobuf as google;

use super::*;
use crate::config::convert::Address;
use crate::config::endpoint::{Endpoint, Locality, Special};

type Message = cluster::cluster::LbSubsetConfig;
type Pick = cluster::cluster::lb_subset_config::LbSubsetSelector;

fn text(value: &str) -> google::Value {
    google::Value {
        kind: Some(google::value::Kind::StringValue(value.into())),
    }
}

fn metadata(pairs: &[(&str, &str)]) -> google::Struct {
    google::Struct {
        fields: pairs
            .iter()
            .map(|(key, value)| ((*key).to_owned(), text(value)))
            .collect(),
    }
}

fn selector(keys: &[&str], fallback: i32, fewer: &[&str]) -> Pick {
    Pick {
        keys: keys.iter().map(|key| (*key).to_owned()).collect(),
        fallback_policy: fallback,
        fallback_keys_subset: fewer.iter().map(|key| (*key).to_owned()).collect(),
        ..Default::default()
    }
}

struct Fixture {
    cluster: Cluster,
    whole: Balancer,
    subsets: SubsetBalancer,
}

fn fixture(config: Message, hosts: &[google::Struct]) -> Fixture {
    let message = cluster::Cluster {
        name: "c".into(),
        lb_subset_config: Some(config),
        ..Default::default()
    };
    let cluster = Cluster::compile(&message, &mut Default::default(), None).unwrap();
    let all: Vec<_> = hosts
        .iter()
        .enumerate()
        .map(|(index, metadata)| {
            Arc::new(Endpoint {
                text: index.to_string().into(),
                special: Some(Arc::new(Special {
                    lb_metadata: Some(metadata.clone()),
                    ..Special::default()
                })),
                ..Endpoint::at(Address::Tcp(([10, 0, 0, 1], index as u16).into()))
            })
        })
        .collect();
    let set = EndpointSet {
        priorities: vec![
            vec![Locality {
                weight: 1,
                zone: Box::default(),
                members: 0..all.len(),
            }]
            .into(),
        ]
        .into(),
        all: all.into(),
        overprovisioning: 140,
        drop: None,
    };
    let hosts: Vec<_> = set
        .all
        .iter()
        .map(|endpoint| Rc::new(Host::new(endpoint.clone())))
        .collect();
    let whole = Balancer::new(&cluster, &set, &hosts);
    let subsets = SubsetBalancer::new(cluster.subsets.as_ref().unwrap(), &cluster, &set, &hosts);
    Fixture {
        cluster,
        whole,
        subsets,
    }
}

impl Fixture {
    /// The hosts that requests with these criteria reach.
    fn reached(&self, criteria: Option<&google::Struct>) -> String {
        let criteria = criteria.map(Criteria::of_struct);
        let wish = Wish {
            criteria: criteria.as_ref(),
            ..Default::default()
        };
        let rules = self.cluster.subsets.as_ref().unwrap();
        let mut found = std::collections::BTreeSet::new();
        for _ in 0..40 {
            if let Some(host) = self.subsets.pick(rules, &self.cluster, &self.whole, &wish).0 {
                found.insert(host.endpoint.text.to_string());
            }
        }
        found.into_iter().collect()
    }
}

fn three() -> Vec<google::Struct> {
    vec![
        metadata(&[("version", "v1"), ("stage", "prod")]),
        metadata(&[("version", "v2"), ("stage", "prod")]),
        metadata(&[("version", "v2"), ("stage", "dev")]),
    ]
}

#[test]
fn requests_reach_the_endpoints_with_the_keys_and_values_that_their_route_asks_for() {
    let fixture = fixture(
        Message {
            fallback_policy: 0,
            subset_selectors: vec![
                selector(&["version"], 0, &[]),
                selector(&["stage", "version"], 0, &[]),
            ],
            ..Default::default()
        },
        &three(),
    );
    let cases: [(&[(&str, &str)], &str); 5] = [
        (&[("version", "v1")], "0"),
        (&[("version", "v2")], "12"),
        (&[("version", "v2"), ("stage", "dev")], "2"),
        (&[("version", "v3")], ""),
        // No selector has this key alone.
        (&[("stage", "prod")], ""),
    ];
    for (asked, expected) in cases {
        assert_eq!(fixture.reached(Some(&metadata(asked))), expected, "{asked:?}");
    }
    assert_eq!(
        fixture.reached(None),
        "",
        "no fallback for requests without criteria"
    );
}

#[test]
fn what_no_group_has_falls_back_as_the_cluster_says() {
    let with = |fallback_policy| {
        fixture(
            Message {
                fallback_policy,
                default_subset: Some(metadata(&[("stage", "prod")])),
                subset_selectors: vec![selector(&["version"], 0, &[])],
                ..Default::default()
            },
            &three(),
        )
    };
    let missing = metadata(&[("version", "v9")]);
    assert_eq!(with(0).reached(Some(&missing)), "");
    assert_eq!(with(1).reached(Some(&missing)), "012");
    assert_eq!(with(2).reached(Some(&missing)), "01");
    assert_eq!(with(2).reached(None), "01");
    assert_eq!(with(2).reached(Some(&metadata(&[("version", "v2")]))), "12");
}

#[test]
fn a_selectors_own_fallback_wins_and_may_ask_for_fewer_keys() {
    let fixture = fixture(
        Message {
            fallback_policy: 1,
            subset_selectors: vec![
                selector(&["version"], 1, &[]),
                selector(&["stage", "version"], 4, &["version"]),
            ],
            ..Default::default()
        },
        &three(),
    );
    let both = |stage, version| metadata(&[("stage", stage), ("version", version)]);
    assert_eq!(fixture.reached(Some(&both("test", "v2"))), "12");
    // Neither with both keys nor with one; that selector wants no fallback.
    assert_eq!(fixture.reached(Some(&both("test", "v9"))), "");
    assert_eq!(
        fixture.reached(Some(&metadata(&[("colour", "red")]))),
        "012",
        "the cluster's fallback where no selector has the keys"
    );
}

#[test]
fn lists_stand_for_their_elements_and_alternatives_are_tried_in_order() {
    let list = |values: &[&str]| google::Value {
        kind: Some(google::value::Kind::ListValue(google::ListValue {
            values: values.iter().map(|value| text(value)).collect(),
        })),
    };
    let mut several = google::Struct::default();
    several.fields.insert("version".into(), list(&["v1", "v2"]));
    let fixture = fixture(
        Message {
            list_as_any: true,
            metadata_fallback_policy: 1,
            subset_selectors: vec![selector(&["version"], 0, &[])],
            ..Default::default()
        },
        &[several, metadata(&[("version", "v2")])],
    );
    assert_eq!(fixture.reached(Some(&metadata(&[("version", "v1")]))), "0");
    assert_eq!(fixture.reached(Some(&metadata(&[("version", "v2")]))), "01");
    let alternative = |version| google::Value {
        kind: Some(google::value::Kind::StructValue(metadata(&[(
            "version", version,
        )]))),
    };
    let mut asked = google::Struct::default();
    asked.fields.insert(
        "fallback_list".into(),
        google::Value {
            kind: Some(google::value::Kind::ListValue(google::ListValue {
                values: vec![alternative("v9"), alternative("v1"), alternative("v2")],
            })),
        },
    );
    assert_eq!(fixture.reached(Some(&asked)), "0");
}

#[test]
fn one_host_per_group_is_the_first_and_anybody_stands_in_when_a_group_is_down() {
    let mut single = selector(&["version"], 0, &[]);
    single.single_host_per_subset = true;
    let one = fixture(
        Message {
            subset_selectors: vec![single],
            ..Default::default()
        },
        &three(),
    );
    assert_eq!(one.reached(Some(&metadata(&[("version", "v2")]))), "1");
    let refused = Subsets::compile(&Message {
        subset_selectors: vec![Pick {
            keys: vec!["a".into(), "b".into()],
            single_host_per_subset: true,
            ..Default::default()
        }],
        ..Default::default()
    });
    assert_eq!(refused.unwrap_err().path, "subset_selectors");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn a_group_holds_exactly_the_endpoints_that_fit(
        hosts in proptest::collection::vec((0u8..3, 0u8..3), 1..12),
        asked in (0u8..3, 0u8..3),
    ) {
        let of = |(a, b): (u8, u8)| metadata(&[("a", &a.to_string()), ("b", &b.to_string())]);
        let structs: Vec<_> = hosts.iter().copied().map(of).collect();
        let fixture = fixture(
            Message { subset_selectors: vec![selector(&["b", "a"], 0, &[])], ..Default::default() },
            &structs,
        );
        let criteria = Criteria::of_struct(&of(asked));
        let fitting = hosts.iter().filter(|host| **host == asked).count();
        let wish = Wish { criteria: Some(&criteria), ..Default::default() };
        let rules = fixture.cluster.subsets.as_ref().unwrap();
        let mut found = std::collections::BTreeSet::new();
        for _ in 0..hosts.len() * 2 {
            match fixture.subsets.pick(rules, &fixture.cluster, &fixture.whole, &wish).0 {
                None => prop_assert_eq!(fitting, 0),
                Some(host) => {
                    prop_assert!(criteria.fits(host.endpoint.lb_metadata(), false));
                    found.insert(host.endpoint.text.clone());
                }
            }
        }
        prop_assert_eq!(found.len(), fitting);
    }
}
