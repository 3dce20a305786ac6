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
