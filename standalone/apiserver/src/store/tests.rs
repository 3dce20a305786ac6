//! The store against a plain model.

use std::collections::BTreeMap;

use proptest::prelude::*;
use serde_json::json;

use super::*;

#[derive(Debug, Clone)]
enum Step {
    Put(u8, u8),
    Remove(u8),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    prop::collection::vec(
        prop_oneof![
            (0..6u8, any::<u8>()).prop_map(|(k, v)| Step::Put(k, v)),
            (0..6u8).prop_map(Step::Remove)
        ],
        0..60,
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whoever lists at any point and follows the events from there ends up with the same objects; versions only grow.
    #[test]
    fn a_list_and_the_events_after_it_make_the_present_state(steps in steps(), look_at in 0..60usize) {
        let resource: ResourceId = "/configmaps".into();
        let mut store = Store::new(1);
        let mut model: BTreeMap<String, u8> = BTreeMap::new();
        let mut follower: Option<(BTreeMap<String, u8>, u64)> = None;
        let mut last_rv = store.rv();
        for (i, step) in steps.iter().enumerate() {
            if i == look_at {
                follower = Some((model.clone(), store.rv()));
            }
            match step {
                Step::Put(k, v) => {
                    let key = format!("n/{k}");
                    let expect = store.get(&resource, &key).map_or(Expect::Absent, |o| Expect::At(o.rv));
                    let event = store.put(&resource, &key, json!({"metadata": {"name": k.to_string()}, "v": v}), expect).expect("committed");
                    prop_assert!(event.rv > last_rv);
                    last_rv = event.rv;
                    model.insert(key, *v);
                }
                Step::Remove(k) => {
                    let key = format!("n/{k}");
                    if let Some(rv) = store.get(&resource, &key).map(|o| o.rv) {
                        let event = store.remove(&resource, &key, json!({"metadata": {}}), rv).expect("committed");
                        prop_assert!(event.rv > last_rv);
                        last_rv = event.rv;
                        model.remove(&key);
                    }
                }
            }
        }
        if let Some((mut seen, rv)) = follower {
            for event in store.events_after(&resource, rv).expect("history reaches back") {
                match event.change {
                    Change::Deleted => { seen.remove(&*event.key); }
                    _ => { seen.insert(event.key.to_string(), u8::try_from(event.object.value["v"].as_u64().expect("a number")).expect("small")); }
                }
            }
            prop_assert_eq!(seen, model);
        }
    }
}

#[test]
fn a_version_from_before_the_history_is_told_so() {
    let resource: ResourceId = "/configmaps".into();
    let mut store = Store::new(1);
    store.set_history_limit(3);
    for i in 0..10 {
        store
            .put(
                &resource,
                &format!("n/{i}"),
                json!({"metadata": {}}),
                Expect::Absent,
            )
            .expect("committed");
    }
    assert!(store.events_after(&resource, 2).is_none());
    let rv = store.rv();
    assert_eq!(store.events_after(&resource, rv - 3).map(|e| e.len()), Some(3));
    store.compact();
    assert!(store.events_after(&resource, rv - 1).is_none());
    assert_eq!(store.events_after(&resource, rv).map(|e| e.len()), Some(0));
}

#[test]
fn pages_follow_each_other_without_gaps() {
    let resource: ResourceId = "/configmaps".into();
    let mut store = Store::new(1);
    for i in 0..7 {
        store
            .put(
                &resource,
                &format!("n/{i}"),
                json!({"metadata": {"name": i.to_string()}}),
                Expect::Absent,
            )
            .expect("committed");
    }
    let mut names = Vec::new();
    let mut after: Option<Arc<str>> = None;
    loop {
        let page = store.list(&resource, "n/", after.as_deref(), Some(3), |_| true);
        names.extend(page.items.iter().map(|o| meta::name(&o.value).to_owned()));
        match page.next_after {
            Some(next) => after = Some(next),
            None => break,
        }
    }
    assert_eq!(names, ["0", "1", "2", "3", "4", "5", "6"]);
}

#[test]
fn a_write_that_expects_another_state_is_lost() {
    let resource: ResourceId = "/configmaps".into();
    let mut store = Store::new(1);
    let event = store
        .put(&resource, "n/a", json!({"metadata": {}}), Expect::Absent)
        .expect("committed");
    assert!(matches!(
        store.put(&resource, "n/a", json!({"metadata": {}}), Expect::Absent),
        Err(Lost::Exists)
    ));
    assert!(matches!(
        store.put(
            &resource,
            "n/a",
            json!({"metadata": {}}),
            Expect::At(event.rv + 1)
        ),
        Err(Lost::Changed)
    ));
    assert!(matches!(
        store.remove(&resource, "n/b", json!({}), 1),
        Err(Lost::Missing)
    ));
}
