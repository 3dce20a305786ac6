//! The world as the pump asks it: what a proxy hears of rules that come before what they refer to.

use serde_json::{Value, json};
use serin_xds::pb::envoy::config::core::v3::Node;
use serin_xds::{FEATURE_VHDS, ResourceType};

use super::*;

const RULES: &str = "VirtualService/prod/reviews";

fn object(kind: &str, value: Value) -> Change {
    fn read<K: serde::de::DeserializeOwned>(value: Value) -> Arc<K> {
        Arc::new(serde_json::from_value(value).unwrap())
    }
    Change::Apply(match kind {
        "Service" => Object::Service(read(value)),
        "DestinationRule" => Object::DestinationRule(read(value)),
        "VirtualService" => Object::VirtualService(read(value)),
        other => panic!("{other}"),
    })
}

fn service() -> Change {
    object(
        "Service",
        json!({"metadata": {"name": "reviews", "namespace": "prod"},
            "spec": {"clusterIP": "10.96.0.9", "ports": [{"name": "http", "port": 80}]}}),
    )
}

fn subset() -> Change {
    object(
        "DestinationRule",
        json!({"metadata": {"name": "reviews", "namespace": "prod", "generation": 1, "uid": "d"},
            "spec": {"host": "reviews", "subsets": [{"name": "v2", "labels": {"version": "v2"}}]}}),
    )
}

fn rules(generation: i64, destination: Value) -> Change {
    object(
        "VirtualService",
        json!({"metadata": {"name": "reviews", "namespace": "prod", "generation": generation, "uid": "v"},
            "spec": {"hosts": ["reviews"], "http": [{"route": [{"destination": destination}]}]}}),
    )
}

fn to_subset(generation: i64) -> Change {
    rules(generation, json!({"host": "reviews", "subset": "v2"}))
}

fn proxy() -> Proxy {
    Proxy::from_node(&Node {
        id: "sidecar~10.0.0.1~p.prod~prod.svc.cluster.local".into(),
        client_features: vec![FEATURE_VHDS.into()],
        ..Node::default()
    })
    .unwrap()
}

/// A world with the service and one proxy, complete.
fn world() -> (MeshWorld, Proxy) {
    let mut world = MeshWorld::new(MeshConfig::default());
    world.apply(vec![service()], Duration::ZERO);
    world.complete();
    let proxy = proxy();
    world.resources_for(&proxy);
    (world, proxy)
}

/// The types of what the proxy hears, and the verdicts.
fn heard(world: &MeshWorld, proxy: &Proxy, applied: &Applied<Touched>) -> (Vec<ResourceType>, Vec<String>) {
    let changes = world.changes_for(proxy, &applied.touched);
    let types = changes.iter().map(|change| match change {
        xds::Change::Upsert(resource) => resource.resource_type,
        xds::Change::Remove(resource_type, _) => *resource_type,
    });
    let verdicts = applied.verdicts.iter().map(|verdict| match verdict {
        Verdict::Taken { object, generation } => format!("{object} {generation}"),
        Verdict::Refused { object, .. } => format!("{object} refused"),
        Verdict::Deleted { object } => format!("{object} deleted"),
    });
    (types.collect(), verdicts.collect())
}

const fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

#[test]
fn a_rule_seen_before_its_subset_goes_out_with_it_and_nothing_before() {
    let (mut world, proxy) = world();
    let early = world.apply(vec![to_subset(1)], ms(10));
    assert_eq!(
        heard(&world, &proxy, &early),
        (vec![], vec![]),
        "what was in effect stays"
    );
    let note = world.note(RULES).unwrap();
    assert!(note.unresolved[0].contains("subset v2"), "{note:?}");
    assert_eq!(world.wake_at(), Some(ms(1010)));

    let both = world.apply(vec![subset()], ms(13));
    let (types, mut verdicts) = heard(&world, &proxy, &both);
    verdicts.sort();
    assert!(
        types.contains(&ResourceType::Cluster) && types.contains(&ResourceType::VirtualHost),
        "{types:?}"
    );
    assert_eq!(
        verdicts,
        ["DestinationRule/prod/reviews 1", "VirtualService/prod/reviews 1"]
    );
    assert!(world.note(RULES).unwrap().unresolved.is_empty());
    assert_eq!(world.wake_at(), None);
}

#[test]
fn of_changes_that_come_together_the_order_does_not_matter() {
    let (mut world, proxy) = world();
    let applied = world.apply(vec![to_subset(1), subset()], ms(10));
    let (types, verdicts) = heard(&world, &proxy, &applied);
    assert!(types.contains(&ResourceType::VirtualHost), "{types:?}");
    assert_eq!(verdicts.len(), 2);
    assert_eq!(world.wake_at(), None);
}

#[test]
fn a_rule_whose_subset_never_comes_is_taken_as_istio_takes_it() {
    let (mut world, proxy) = world();
    world.apply(vec![rules(1, json!({"host": "reviews"}))], ms(0));
    world.apply(vec![to_subset(2)], ms(10));
    let still = world.apply(vec![], ms(1009));
    assert_eq!(heard(&world, &proxy, &still), (vec![], vec![]));
    let taken = world.apply(vec![], ms(1010));
    let (types, verdicts) = heard(&world, &proxy, &taken);
    assert_eq!(
        (types, verdicts),
        (vec![ResourceType::VirtualHost], vec![format!("{RULES} 2")])
    );
    assert!(
        world.note(RULES).unwrap().unresolved[0].contains("subset v2"),
        "and it is named still"
    );
}

#[test]
fn a_newer_version_takes_the_place_of_one_that_waits_and_a_deletion_ends_it() {
    let (mut world, proxy) = world();
    world.apply(vec![to_subset(1)], ms(10));
    let newer = world.apply(vec![rules(2, json!({"host": "reviews"}))], ms(20));
    let (types, verdicts) = heard(&world, &proxy, &newer);
    assert_eq!(
        (types, verdicts),
        (vec![ResourceType::VirtualHost], vec![format!("{RULES} 2")])
    );
    assert_eq!(world.wake_at(), None);

    world.apply(vec![to_subset(3)], ms(30));
    let key = ObjectKey::new(Kind::VirtualService, "prod", "reviews");
    let deleted = world.apply(vec![Change::Delete(key)], ms(40));
    let (_, verdicts) = heard(&world, &proxy, &deleted);
    assert_eq!(verdicts, [format!("{RULES} deleted")]);
    assert_eq!(world.wake_at(), None);
}

#[test]
fn after_a_restart_nothing_waits_for_what_was_never_there() {
    let mut world = MeshWorld::new(MeshConfig::default());
    let applied = world.apply(vec![service(), to_subset(4)], Duration::ZERO);
    assert_eq!(applied.verdicts.len(), 1);
    world.complete();
    assert_eq!(world.wake_at(), None);
}

/// A world in which rules send requests to the subset v2, known to the proxy.
fn world_with_rules() -> (MeshWorld, Proxy) {
    let (mut world, proxy) = world();
    world.apply(vec![subset(), to_subset(1)], ms(0));
    world.resources_for(&proxy);
    (world, proxy)
}

fn subsets(generation: i64, names: &[&str]) -> Change {
    let subsets: Vec<Value> = names
        .iter()
        .map(|name| json!({"name": name, "labels": {"version": name}}))
        .collect();
    object(
        "DestinationRule",
        json!({"metadata": {"name": "reviews", "namespace": "prod", "generation": generation, "uid": "d"},
            "spec": {"host": "reviews", "subsets": subsets}}),
    )
}

/// Names of clusters that the proxy is given and loses.
fn clusters(world: &MeshWorld, proxy: &Proxy, applied: &Applied<Touched>) -> (Vec<String>, Vec<String>) {
    let (mut given, mut lost) = (Vec::new(), Vec::new());
    for change in world.changes_for(proxy, &applied.touched) {
        match change {
            xds::Change::Upsert(one) if one.resource_type == ResourceType::Cluster => {
                given.push(one.name.to_string())
            }
            xds::Change::Remove(ResourceType::Cluster, name) => lost.push(name.to_string()),
            _ => {}
        }
    }
    (given, lost)
}

#[test]
fn a_subset_deleted_before_the_rule_that_names_it_goes_with_that_rule() {
    let (mut world, proxy) = world_with_rules();
    let key = ObjectKey::new(Kind::DestinationRule, "prod", "reviews");
    let early = world.apply(vec![Change::Delete(key)], ms(10));
    assert_eq!(
        heard(&world, &proxy, &early),
        (vec![], vec![]),
        "what was in effect stays"
    );
    assert_eq!(world.wake_at(), Some(ms(1010)));

    let after = world.apply(vec![rules(2, json!({"host": "reviews"}))], ms(300));
    let (_, lost) = clusters(&world, &proxy, &after);
    assert!(lost.iter().any(|name| name.contains("|v2|")), "{lost:?}");
    let (_, mut verdicts) = heard(&world, &proxy, &after);
    verdicts.sort();
    assert_eq!(
        verdicts,
        [
            "DestinationRule/prod/reviews deleted",
            "VirtualService/prod/reviews 2"
        ]
    );
    assert_eq!(world.wake_at(), None);
}

#[test]
fn of_a_rule_that_drops_one_subset_and_adds_another_the_addition_is_in_effect_at_once() {
    let (mut world, proxy) = world_with_rules();
    let swapped = world.apply(vec![subsets(2, &["v3"])], ms(10));
    let (given, lost) = clusters(&world, &proxy, &swapped);
    assert!(given.iter().any(|name| name.contains("|v3|")), "{given:?}");
    assert!(lost.is_empty(), "{lost:?}");
    let (_, verdicts) = heard(&world, &proxy, &swapped);
    assert!(
        verdicts.is_empty(),
        "it is not in effect as a whole: {verdicts:?}"
    );

    let moved = world.apply(vec![rules(2, json!({"host": "reviews", "subset": "v3"}))], ms(20));
    let (_, lost) = clusters(&world, &proxy, &moved);
    assert!(lost.iter().any(|name| name.contains("|v2|")), "{lost:?}");
    let (_, mut verdicts) = heard(&world, &proxy, &moved);
    verdicts.sort();
    assert_eq!(
        verdicts,
        ["DestinationRule/prod/reviews 2", "VirtualService/prod/reviews 2"]
    );

    // The same in one batch and in the wrong order waits for nothing.
    let (mut world, proxy) = world_with_rules();
    let both = vec![
        subsets(2, &["v3"]),
        rules(2, json!({"host": "reviews", "subset": "v3"})),
    ];
    let both = world.apply(both, ms(10));
    let (given, lost) = clusters(&world, &proxy, &both);
    assert!(
        given[0].contains("|v3|") && lost[0].contains("|v2|"),
        "{given:?} {lost:?}"
    );
    assert_eq!(world.wake_at(), None);
}

#[test]
fn what_rules_go_on_naming_is_taken_away_after_a_second_and_what_comes_back_was_never_gone() {
    let (mut world, proxy) = world_with_rules();
    let gone = || Change::Delete(ObjectKey::new(Kind::Service, "prod", "reviews"));
    let kept = world.apply(vec![gone()], ms(10));
    assert_eq!(heard(&world, &proxy, &kept), (vec![], vec![]));
    let back = world.apply(vec![service()], ms(200));
    assert_eq!(heard(&world, &proxy, &back).0, []);
    assert_eq!(world.wake_at(), None);

    world.apply(vec![gone()], ms(300));
    let kept = world.apply(vec![], ms(1299));
    assert_eq!(heard(&world, &proxy, &kept), (vec![], vec![]));
    let taken = world.apply(vec![], ms(1300));
    assert!(!clusters(&world, &proxy, &taken).1.is_empty());
    assert!(world.note(RULES).unwrap().unresolved[0].contains("does not exist"));
    assert_eq!(world.wake_at(), None);
}
