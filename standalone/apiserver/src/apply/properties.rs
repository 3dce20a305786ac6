//! Server-side apply against a plain model: who owns what, what conflicts, what goes and what stays.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use serde_json::{Map, Value, json};

use super::managers::{ApplyError, Write, apply, same_but_times, update};
use crate::schema::{Schema, builtin, zero_value};

/// One write to a ConfigMap.
#[derive(Debug, Clone)]
enum Step {
    /// Manager, what it wants, whether it insists.
    Apply(u8, BTreeMap<u8, u8>, bool),
    /// Manager, what the data is to be.
    Update(u8, BTreeMap<u8, u8>),
}

fn data() -> impl Strategy<Value = BTreeMap<u8, u8>> {
    prop::collection::btree_map(0..5u8, 0..3u8, 0..5)
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    prop::collection::vec(
        prop_oneof![
            3 => (0..3u8, data(), any::<bool>()).prop_map(|(m, d, f)| Step::Apply(m, d, f)),
            1 => (0..2u8, data()).prop_map(|(m, d)| Step::Update(m, d)),
        ],
        1..20,
    )
}

fn object(data: &BTreeMap<u8, u8>) -> Value {
    let data: Map<String, Value> = data
        .iter()
        .map(|(k, v)| (format!("k{k}"), json!(v.to_string())))
        .collect();
    json!({"metadata": {"name": "c"}, "data": data})
}

/// An object that somebody applied: from one that nobody does, updates are not followed (as in Kubernetes).
fn anchored(schema: &Schema, zero: &Value) -> Value {
    let config = json!({"metadata": {"name": "c", "labels": {"anchor": "1"}}});
    apply(&write(schema, zero, "anchor"), None, &config, &Value::Null, false).expect("applies")
}

/// The model: values, and the managers that own each.
#[derive(Debug, Clone, Default, PartialEq)]
struct Owned {
    values: BTreeMap<String, String>,
    owners: BTreeMap<String, BTreeSet<String>>,
}

impl Owned {
    fn of(object: &Value) -> Self {
        let mut owned = Self::default();
        for (key, value) in object["data"].as_object().into_iter().flatten() {
            owned
                .values
                .insert(key.clone(), value.as_str().expect("text").to_owned());
        }
        for entry in object["metadata"]["managedFields"]
            .as_array()
            .into_iter()
            .flatten()
        {
            let who = format!(
                "{}:{}",
                entry["operation"].as_str().unwrap(),
                entry["manager"].as_str().unwrap()
            );
            for key in entry["fieldsV1"]["f:data"]
                .as_object()
                .into_iter()
                .flatten()
                .map(|(key, _)| key)
            {
                if let Some(key) = key.strip_prefix("f:") {
                    owned
                        .owners
                        .entry(key.to_owned())
                        .or_default()
                        .insert(who.clone());
                }
            }
        }
        owned
    }

    /// Keys that others own with another value.
    fn conflicts(&self, who: &str, wanted: &BTreeMap<String, String>) -> BTreeSet<String> {
        let of_others = |key: &String| {
            self.owners
                .get(key)
                .is_some_and(|owners| owners.iter().any(|o| o != who))
        };
        wanted
            .iter()
            .filter(|(key, value)| {
                self.values.get(*key).is_some_and(|known| known != *value) && of_others(key)
            })
            .map(|(key, _)| key.clone())
            .collect()
    }

    fn apply(&mut self, who: &str, wanted: &BTreeMap<String, String>) {
        let owned_before: Vec<String> = self
            .owners
            .iter()
            .filter(|(_, owners)| owners.contains(who))
            .map(|(key, _)| key.clone())
            .collect();
        for (key, value) in wanted {
            if self.values.get(key) != Some(value) {
                self.owners.remove(key);
            }
            self.values.insert(key.clone(), value.clone());
            self.owners.entry(key.clone()).or_default().insert(who.to_owned());
        }
        for key in owned_before.into_iter().filter(|key| !wanted.contains_key(key)) {
            let owners = self.owners.entry(key.clone()).or_default();
            owners.remove(who);
            if owners.is_empty() {
                self.owners.remove(&key);
                self.values.remove(&key);
            }
        }
    }

    fn update(&mut self, who: &str, new: &BTreeMap<String, String>) {
        for (key, value) in new {
            if self.values.get(key) != Some(value) {
                self.owners.insert(key.clone(), [who.to_owned()].into());
            }
        }
        self.owners.retain(|key, _| new.contains_key(key));
        self.values.clone_from(new);
    }
}

fn text(data: &BTreeMap<u8, u8>) -> BTreeMap<String, String> {
    data.iter()
        .map(|(k, v)| (format!("k{k}"), v.to_string()))
        .collect()
}

fn write<'a>(schema: &'a Schema, zero: &'a Value, manager: &'a str) -> Write<'a> {
    Write {
        schema,
        zero,
        api_version: "v1",
        subresource: "",
        manager,
        now: "2026-01-01T00:00:00Z",
        reset: &[],
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    /// Values and owners are those of the model after every write; conflicts are exactly the model's, and change nothing.
    #[test]
    fn values_owners_and_conflicts_are_those_of_the_model(steps in steps()) {
        let schema = builtin("core.v1.ConfigMap");
        let zero = zero_value(&schema);
        let mut live = Some(anchored(&schema, &zero));
        let mut model = Owned::default();
        for step in &steps {
            match step {
                Step::Apply(manager, wanted, force) => {
                    let name = format!("m{manager}");
                    let who = format!("Apply:{name}");
                    let w = write(&schema, &zero, &name);
                    let outcome = apply(&w, live.as_ref(), &object(wanted), &Value::Null, *force);
                    let conflicts = model.conflicts(&who, &text(wanted));
                    match outcome {
                        Ok(object) => {
                            prop_assert!(conflicts.is_empty() || *force, "{step:?} should conflict: {conflicts:?}");
                            model.apply(&who, &text(wanted));
                            live = Some(object);
                        }
                        Err(ApplyError::Conflicts(found)) => {
                            prop_assert!(!force);
                            let found: BTreeSet<String> = found.into_iter().map(|(_, path)| path.trim_start_matches(".data.").to_owned()).collect();
                            prop_assert_eq!(found, conflicts);
                        }
                        Err(other) => prop_assert!(false, "{other:?}"),
                    }
                }
                Step::Update(manager, data) => {
                    let name = format!("u{manager}");
                    let w = write(&schema, &zero, &name);
                    let mut new = object(data);
                    new["metadata"]["labels"] = json!({"anchor": "1"});
                    if let Some(fields) = live.as_ref().and_then(|l| l["metadata"].get("managedFields")) {
                        new["metadata"]["managedFields"] = fields.clone();
                    }
                    update(&w, live.as_ref(), &mut new);
                    model.update(&format!("Update:{name}"), &text(data));
                    live = Some(new);
                }
            }
            let found = live.as_ref().map(Owned::of).unwrap_or_default();
            prop_assert_eq!(&found, &model, "after {:?}", step);
            prop_assert!(model.values.keys().all(|key| model.owners.contains_key(key)), "a field that nobody owns");
        }
    }

    /// The same configuration again changes nothing at all.
    #[test]
    fn an_apply_is_idempotent(steps in steps(), manager in 0..3u8, wanted in data()) {
        let schema = builtin("core.v1.ConfigMap");
        let zero = zero_value(&schema);
        let mut live: Option<Value> = None;
        for step in &steps {
            if let Step::Apply(manager, wanted, _) = step {
                let name = format!("m{manager}");
                live = Some(apply(&write(&schema, &zero, &name), live.as_ref(), &object(wanted), &Value::Null, true).expect("forced"));
            }
        }
        let name = format!("m{manager}");
        let w = write(&schema, &zero, &name);
        let once = apply(&w, live.as_ref(), &object(&wanted), &Value::Null, true).expect("forced");
        let twice = apply(&w, Some(&once), &object(&wanted), &Value::Null, false).expect("no conflict with oneself or with equal values");
        prop_assert!(same_but_times(&once, &twice), "{once}\n{twice}");
    }

    /// Managers with nothing in common come to the same object in any order.
    #[test]
    fn the_order_of_managers_with_disjoint_fields_does_not_matter(values in prop::collection::vec(0..3u8, 6), order in Just(vec![0u8, 1, 2]).prop_shuffle()) {
        let schema = builtin("core.v1.ConfigMap");
        let zero = zero_value(&schema);
        let run = |order: &[u8]| {
            let mut live: Option<Value> = None;
            for manager in order {
                let own: BTreeMap<u8, u8> = (0..2).map(|i| (manager * 2 + i, values[usize::from(manager * 2 + i)])).collect();
                let name = format!("m{manager}");
                live = Some(apply(&write(&schema, &zero, &name), live.as_ref(), &object(&own), &Value::Null, false).expect("nothing in common"));
            }
            Owned::of(&live.expect("applied"))
        };
        prop_assert_eq!(run(&order), run(&[0, 1, 2]));
    }

    /// Items of lists that merge by key belong to whoever applied them, as fields do.
    #[test]
    fn list_items_are_owned_by_key(mine in prop::collection::btree_set(0..5u8, 1..4), theirs in prop::collection::btree_set(5..9u8, 1..4), kept in 0..4usize) {
        let schema = builtin("apps.v1.Deployment");
        let zero = zero_value(&schema);
        let config = |names: &mut dyn Iterator<Item = u8>| {
            let env: Vec<Value> = names.map(|n| json!({"name": format!("V{n}"), "value": n.to_string()})).collect();
            json!({"metadata": {"name": "d"}, "spec": {"selector": {"matchLabels": {"a": "b"}}, "template": {"spec": {"containers": [{"name": "c", "env": env}]}}}})
        };
        let env = |object: &Value| -> BTreeSet<String> {
            object["spec"]["template"]["spec"]["containers"][0]["env"].as_array().into_iter().flatten().map(|e| e["name"].as_str().unwrap().to_owned()).collect()
        };
        let (a, b) = (write(&schema, &zero, "a"), write(&schema, &zero, "b"));
        let one = apply(&a, None, &config(&mut mine.iter().copied()), &Value::Null, false).expect("applies");
        let two = apply(&b, Some(&one), &config(&mut theirs.iter().copied()), &Value::Null, false).expect("other items, same selector");
        let all: BTreeSet<String> = mine.iter().chain(&theirs).map(|n| format!("V{n}")).collect();
        prop_assert_eq!(env(&two), all);
        let fewer: Vec<u8> = mine.iter().copied().take(kept).collect();
        let three = apply(&a, Some(&two), &config(&mut fewer.iter().copied()), &Value::Null, false).expect("its own");
        let left: BTreeSet<String> = fewer.iter().chain(&theirs).map(|n| format!("V{n}")).collect();
        prop_assert_eq!(env(&three), left);
    }
}
