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

/// A write that is published at once.
fn put(
    store: &mut Store,
    resource: &ResourceId,
    key: &str,
    value: Value,
    expect: Expect,
) -> Result<Arc<Event>, Lost> {
    let event = store.put(resource, key, value, expect)?;
    store.publish(event.rv);
    Ok(event)
}

fn remove(
    store: &mut Store,
    resource: &ResourceId,
    key: &str,
    last: Value,
    rv: u64,
) -> Result<Arc<Event>, Lost> {
    let event = store.remove(resource, key, last, rv)?;
    store.publish(event.rv);
    Ok(event)
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
                    let event = put(&mut store, &resource, &key, json!({"metadata": {"name": k.to_string()}, "v": v}), expect).expect("committed");
                    prop_assert!(event.rv > last_rv);
                    last_rv = event.rv;
                    model.insert(key, *v);
                }
                Step::Remove(k) => {
                    let key = format!("n/{k}");
                    if let Some(rv) = store.get(&resource, &key).map(|o| o.rv) {
                        let event = remove(&mut store, &resource, &key, json!({"metadata": {}}), rv).expect("committed");
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
        put(
            &mut store,
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
        put(
            &mut store,
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
    let event = put(
        &mut store,
        &resource,
        "n/a",
        json!({"metadata": {}}),
        Expect::Absent,
    )
    .expect("committed");
    assert!(matches!(
        put(
            &mut store,
            &resource,
            "n/a",
            json!({"metadata": {}}),
            Expect::Absent
        ),
        Err(Lost::Exists)
    ));
    assert!(matches!(
        put(
            &mut store,
            &resource,
            "n/a",
            json!({"metadata": {}}),
            Expect::At(event.rv + 1)
        ),
        Err(Lost::Changed)
    ));
    assert!(matches!(
        remove(&mut store, &resource, "n/b", json!({}), 1),
        Err(Lost::Missing)
    ));
}

/// What a list at a version shows: names and values in order, and whether there is more.
fn shown(page: &Page) -> (Vec<(String, u64)>, bool) {
    let items = page.items.iter();
    (
        items
            .map(|o| {
                (
                    o.value["k"].as_str().unwrap().to_owned(),
                    o.value["v"].as_u64().unwrap(),
                )
            })
            .collect(),
        page.next_after.is_some(),
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// A list at any former version is what a list was then, page by page, whatever happened since.
    #[test]
    fn a_list_at_an_older_version_is_the_list_of_then(steps in steps(), limit in 1..4usize, from in 0..60usize) {
        let resource: ResourceId = "/configmaps".into();
        let mut store = Store::new(1);
        let mut former: Vec<(u64, Vec<(String, u64)>)> = Vec::new();
        for step in &steps {
            let now = shown(&store.list(&resource, "n/", None, None, |_| true)).0;
            former.push((store.rv(), now));
            match step {
                Step::Put(k, v) => {
                    let key = format!("n/{k}");
                    let expect = store.get(&resource, &key).map_or(Expect::Absent, |o| Expect::At(o.rv));
                    let object = json!({"metadata": {"name": k.to_string()}, "k": k.to_string(), "v": v});
                    put(&mut store, &resource, &key, object, expect).expect("committed");
                }
                Step::Remove(k) => {
                    let key = format!("n/{k}");
                    if let Some(rv) = store.get(&resource, &key).map(|o| o.rv) {
                        remove(&mut store, &resource, &key, json!({"metadata": {}}), rv).expect("committed");
                    }
                }
            }
        }
        for (rv, then) in former.iter().skip(from) {
            let mut found = Vec::new();
            let mut after: Option<Arc<str>> = None;
            loop {
                let page = store.list_at(&resource, "n/", after.as_deref(), Some(limit), *rv, |_| true).expect("in the history");
                let (items, more) = shown(&page);
                prop_assert!(items.len() <= limit && page.rv == *rv);
                let so_far = found.len();
                found.extend(items);
                prop_assert_eq!(page.remaining, then.len() - found.len());
                prop_assert!(!more || found.len() > so_far, "a page that does not go on");
                match page.next_after.clone() {
                    Some(next) => after = Some(next),
                    None => break,
                }
            }
            prop_assert_eq!(&found, then);
        }
    }
}

#[test]
fn a_list_from_before_the_history_is_told_so() {
    let resource: ResourceId = "/configmaps".into();
    let mut store = Store::new(1);
    let first = put(
        &mut store,
        &resource,
        "n/a",
        json!({"metadata": {}}),
        Expect::Absent,
    )
    .expect("committed");
    put(
        &mut store,
        &resource,
        "n/b",
        json!({"metadata": {}}),
        Expect::Absent,
    )
    .expect("committed");
    assert_eq!(
        store
            .list_at(&resource, "", None, None, first.rv, |_| true)
            .expect("known")
            .items
            .len(),
        1
    );
    store.compact();
    assert!(
        store
            .list_at(&resource, "", None, None, first.rv, |_| true)
            .is_none()
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Readers have the state up to the published version and nothing of what is staged after it; writers have to expect the last
    /// staged one.
    #[test]
    fn what_is_staged_is_seen_by_nobody_until_it_is_published(
        steps in prop::collection::vec((0..4u8, any::<u8>(), 0..4u8, prop::option::of(0..6u64)), 0..60),
    ) {
        let resource: ResourceId = "/configmaps".into();
        let mut store = Store::new(1);
        let mut head: BTreeMap<String, u64> = BTreeMap::new();
        let mut states: Vec<(u64, BTreeMap<String, u64>)> = vec![(1, head.clone())];
        for (k, v, what, publish) in steps {
            let key = format!("n/{k}");
            match (what, head.get(&key).copied()) {
                (0, Some(rv)) => {
                    store.remove(&resource, &key, json!({"metadata": {}}), rv).expect("it expects the staged state");
                    head.remove(&key);
                    states.push((store.head, head.clone()));
                }
                (0, None) => {
                    let lost = store.remove(&resource, &key, json!({"metadata": {}}), 1);
                    prop_assert!(matches!(lost, Err(Lost::Missing)));
                }
                (_, current) => {
                    let expect = current.map_or(Expect::Absent, Expect::At);
                    let event = store.put(&resource, &key, json!({"metadata": {}, "v": v}), expect).expect("it expects the staged state");
                    head.insert(key.clone(), event.rv);
                    states.push((store.head, head.clone()));
                    let again = store.put(&resource, &key, json!({}), expect);
                    prop_assert!(again.is_err(), "a writer that has not seen the staged write loses");
                    prop_assert_eq!(store.staged_at(&resource, &key), Some(event.rv));
                }
            }
            if let Some(behind) = publish {
                store.publish(store.head.saturating_sub(behind));
            }
            let seen: BTreeMap<String, u64> = store.tables.get(&resource).into_iter().flat_map(|t| &t.objects)
                .map(|(k, o)| (k.to_string(), o.rv)).collect();
            let expected = states.iter().rev().find(|(rv, _)| *rv <= store.rv()).map(|(_, state)| state);
            prop_assert_eq!(Some(&seen), expected);
            let newest = store.events_after(&resource, 1).expect("history").last().map_or(1, |e| e.rv);
            prop_assert!(newest <= store.rv());
        }
        store.publish(u64::MAX);
        prop_assert!(store.staged.is_empty() && store.tables.values().all(|t| t.ahead.is_empty()));
    }
}
