//! `metadata.managedFields`: which manager set which fields, kept through every write, and the apply operation itself.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use super::fieldset::FieldSet;
use super::typed::{self, Comparison};
use crate::meta;
use crate::schema::Schema;

/// More Update managers than this are merged into [`ANCIENT`], as Kubernetes does.
const MAX_UPDATE_MANAGERS: usize = 10;
const ANCIENT: &str = "ancient-changes";
/// Who owns what was there before the first apply to an object without managedFields.
const BEFORE_FIRST_APPLY: &str = "before-first-apply";
pub(crate) const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";
/// The manager whose conflicts with client-side apply are forgiven.
const KUBECTL: &str = "kubectl";

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Operation {
    Apply,
    Update,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct ManagerId {
    operation: Operation,
    manager: String,
    /// Empty for appliers: they are the same manager in every version.
    api_version: String,
    subresource: String,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Owned {
    set: FieldSet,
    api_version: String,
    time: Option<String>,
}

type Managers = BTreeMap<ManagerId, Owned>;

/// What a write says about itself.
pub(crate) struct Write<'a> {
    pub(crate) schema: &'a Schema,
    /// The type's empty object, which a new object is compared with.
    pub(crate) zero: &'a Value,
    pub(crate) api_version: &'a str,
    /// Empty for the main endpoint.
    pub(crate) subresource: &'a str,
    pub(crate) manager: &'a str,
    /// RFC 3339, whole seconds.
    pub(crate) now: &'a str,
    /// Dotted paths that this endpoint cannot change, hence cannot own.
    pub(crate) reset: &'a [&'a str],
}

/// Why an apply was refused.
#[derive(Debug)]
pub(crate) enum ApplyError {
    /// One manager text and field path per conflict.
    Conflicts(Vec<(String, String)>),
    /// The configuration does not fit the type.
    Typed(String),
    BadLive(String),
}

fn decode(object: &Value) -> Option<Managers> {
    let entries = meta::metadata(object).get("managedFields")?.as_array()?;
    let mut out = Managers::new();
    for entry in entries {
        let get = |k: &str| {
            entry
                .get(k)
                .and_then(Value::as_str)
                .unwrap_or_default()
                .to_owned()
        };
        let operation = match get("operation").as_str() {
            "Apply" => Operation::Apply,
            "Update" => Operation::Update,
            _ => return None,
        };
        if get("apiVersion").is_empty() {
            return None;
        }
        let set = match entry.get("fieldsV1") {
            Some(fields) => FieldSet::from_json(fields)?,
            None => FieldSet::default(),
        };
        let id = ManagerId {
            operation,
            manager: get("manager"),
            api_version: if operation == Operation::Apply {
                String::new()
            } else {
                get("apiVersion")
            },
            subresource: get("subresource"),
        };
        let time = entry.get("time").and_then(Value::as_str).map(str::to_owned);
        out.entry(id)
            .and_modify(|o| o.set = o.set.clone().union(&set))
            .or_insert(Owned {
                set,
                api_version: get("apiVersion"),
                time,
            });
    }
    Some(out)
}

fn encode(object: &mut Value, managers: &Managers) {
    let mut entries: Vec<(&ManagerId, &Owned)> = managers.iter().filter(|(_, o)| !o.set.is_empty()).collect();
    entries.sort_by(|(a, ao), (b, bo)| {
        (a.operation, &ao.time, &a.manager, &a.api_version, &a.subresource).cmp(&(
            b.operation,
            &bo.time,
            &b.manager,
            &b.api_version,
            &b.subresource,
        ))
    });
    let list: Vec<Value> = entries
        .into_iter()
        .map(|(id, owned)| {
            let mut m = Map::new();
            m.insert("manager".into(), json!(id.manager));
            m.insert(
                "operation".into(),
                json!(match id.operation {
                    Operation::Apply => "Apply",
                    Operation::Update => "Update",
                }),
            );
            m.insert("apiVersion".into(), json!(owned.api_version));
            if let Some(time) = &owned.time {
                m.insert("time".into(), json!(time));
            }
            m.insert("fieldsType".into(), json!("FieldsV1"));
            m.insert("fieldsV1".into(), owned.set.to_json());
            if !id.subresource.is_empty() {
                m.insert("subresource".into(), json!(id.subresource));
            }
            Value::Object(m)
        })
        .collect();
    let metadata = meta::metadata_mut(object);
    if list.is_empty() {
        metadata.remove("managedFields");
    } else {
        metadata.insert("managedFields".into(), Value::Array(list));
    }
}

fn bare(object: &Value) -> Value {
    let mut out = object.clone();
    meta::metadata_mut(&mut out).remove("managedFields");
    out
}

/// Paths that nobody owns: identity and what the server itself writes.
fn strip(set: &FieldSet) -> FieldSet {
    let mut gone = FieldSet::default();
    let path = |steps: &[&str]| {
        steps
            .iter()
            .map(|s| format!("f:{s}").into())
            .collect::<Vec<Box<str>>>()
    };
    for top in ["apiVersion", "kind", "metadata"] {
        gone.insert(&path(&[top]));
    }
    for field in [
        "name",
        "namespace",
        "creationTimestamp",
        "selfLink",
        "uid",
        "clusterName",
        "generation",
        "managedFields",
        "resourceVersion",
    ] {
        gone.insert(&path(&["metadata", field]));
    }
    set.difference(&gone)
}

fn reset_set(reset: &[&str]) -> FieldSet {
    let mut set = FieldSet::default();
    for dotted in reset {
        let path: Vec<Box<str>> = dotted.split('.').map(|s| format!("f:{s}").into()).collect();
        set.insert(&path);
    }
    set
}

fn is_reset(object: &Value) -> bool {
    meta::metadata(object)
        .get("managedFields")
        .and_then(Value::as_array)
        .is_some_and(|l| l.len() == 1 && l.first().and_then(Value::as_object).is_some_and(Map::is_empty))
}

/// Bring managedFields of `new` up to date after any write but an apply.
pub(crate) fn update(write: &Write<'_>, live: Option<&Value>, new: &mut Value) {
    let mut managers = if is_reset(new) {
        Managers::new()
    } else {
        match decode(new) {
            Some(managers) if !managers.is_empty() => managers,
            _ => live.and_then(decode).unwrap_or_default(),
        }
    };
    meta::metadata_mut(new).remove("managedFields");
    if managers.is_empty() && live.is_some() {
        // Ownership was cleared: tracking begins again with the next apply.
        return;
    }
    let before = live.map_or_else(|| write.zero.clone(), bare);
    take_over(write, &mut managers, &before, new);
    cap(&mut managers);
    encode(new, &managers);
}

/// Give what changed between `before` and `after` to the writer.
fn take_over(write: &Write<'_>, managers: &mut Managers, before: &Value, after: &Value) {
    let change = typed::compare(write.schema, before, after).without(&reset_set(write.reset));
    let touched = change.added.clone().union(&change.modified);
    yield_to(managers, None, &touched, &change);
    let own = strip(&touched);
    if !own.is_empty() {
        let id = ManagerId {
            operation: Operation::Update,
            manager: write.manager.to_owned(),
            api_version: write.api_version.to_owned(),
            subresource: write.subresource.to_owned(),
        };
        let entry = managers.entry(id).or_insert(Owned {
            set: FieldSet::default(),
            api_version: write.api_version.to_owned(),
            time: None,
        });
        entry.set = std::mem::take(&mut entry.set).union(&own);
        // Kubernetes writes no time for what goes through scale.
        entry.time = (write.subresource != "scale").then(|| write.now.to_owned());
    }
    managers.retain(|_, o| !o.set.is_empty());
}

/// Everybody but `keeper` loses what was touched or removed.
fn yield_to(managers: &mut Managers, keeper: Option<&ManagerId>, touched: &FieldSet, change: &Comparison) {
    for (id, owned) in managers.iter_mut() {
        if Some(id) != keeper {
            owned.set = owned.set.difference(touched);
        }
        owned.set = owned.set.difference(&change.removed);
    }
}

fn cap(managers: &mut Managers) {
    let mut updaters: Vec<(Option<String>, ManagerId)> = managers
        .iter()
        .filter(|(id, _)| id.operation == Operation::Update)
        .map(|(id, o)| (o.time.clone(), id.clone()))
        .collect();
    let mut count = updaters.len();
    if count <= MAX_UPDATE_MANAGERS {
        return;
    }
    updaters.sort();
    let mut first_of_version: BTreeMap<String, ManagerId> = BTreeMap::new();
    for (time, id) in updaters {
        if count <= MAX_UPDATE_MANAGERS {
            break;
        }
        let bucket = ManagerId {
            operation: Operation::Update,
            manager: ANCIENT.to_owned(),
            api_version: id.api_version.clone(),
            subresource: String::new(),
        };
        let Some(first) = first_of_version.get(&id.api_version) else {
            first_of_version.insert(id.api_version.clone(), id);
            continue;
        };
        if !managers.contains_key(&bucket)
            && let Some(owned) = managers.remove(first)
        {
            managers.insert(bucket.clone(), owned);
        }
        if bucket == id {
            continue;
        }
        if let Some(merged) = managers.remove(&id) {
            if let Some(into) = managers.get_mut(&bucket) {
                into.set = std::mem::take(&mut into.set).union(&merged.set);
                into.time = time;
            }
            count -= 1;
        }
    }
}

/// Merge `config` into the live object (`None`: it does not exist) as `write.manager`.
pub(crate) fn apply(
    write: &Write<'_>,
    live: Option<&Value>,
    config: &Value,
    as_sent: &Value,
    force: bool,
) -> Result<Value, ApplyError> {
    let before = live.map_or_else(|| write.zero.clone(), bare);
    let mut managers = live.and_then(decode).unwrap_or_default();
    if managers.is_empty() && live.is_some() {
        let zero = write.zero.clone();
        let first = Write {
            manager: BEFORE_FIRST_APPLY,
            schema: write.schema,
            zero: write.zero,
            ..*write
        };
        take_over(&first, &mut managers, &zero, &before);
    }
    let mut outcome = merge_config(write, &managers, &before, config, force);
    if let (Err(ApplyError::Conflicts(conflicts)), true) = (&outcome, write.manager == KUBECTL) {
        let allowed = last_applied_set(write.schema, &before);
        let left: Vec<(String, String)> = conflicts
            .iter()
            .filter(|(_, path)| !allowed.contains(path))
            .cloned()
            .collect();
        outcome = if left.is_empty() {
            merge_config(write, &managers, &before, config, true)
        } else {
            Err(ApplyError::Conflicts(left))
        };
    }
    let (mut object, managers) = outcome?;
    if write.manager == KUBECTL && meta::annotation(&object, LAST_APPLIED).is_some() {
        let mut applied = bare(as_sent);
        if let Some(annotations) = meta::metadata_mut(&mut applied)
            .get_mut("annotations")
            .and_then(Value::as_object_mut)
        {
            annotations.remove(LAST_APPLIED);
        }
        let annotations = meta::metadata_mut(&mut object)
            .entry("annotations")
            .or_insert_with(|| Value::Object(Map::new()));
        meta::as_object_mut(annotations).insert(LAST_APPLIED.into(), Value::String(format!("{applied}\n")));
    }
    encode(&mut object, &managers);
    Ok(object)
}

fn last_applied_set(schema: &Schema, live: &Value) -> Vec<String> {
    meta::annotation(live, LAST_APPLIED)
        .and_then(|text| serde_json::from_str::<Value>(text).ok())
        .and_then(|applied| typed::field_set(schema, &applied).ok())
        .map(|set| set.paths())
        .unwrap_or_default()
}

fn merge_config(
    write: &Write<'_>,
    managers: &Managers,
    before: &Value,
    config: &Value,
    force: bool,
) -> Result<(Value, Managers), ApplyError> {
    let mut managers = managers.clone();
    typed::field_set(write.schema, before).map_err(ApplyError::BadLive)?;
    let wanted = typed::field_set(write.schema, config).map_err(ApplyError::Typed)?;
    let set = strip(&wanted).recursive_difference(&reset_set(write.reset));
    let merged = typed::merge(write.schema, before, config);
    let id = ManagerId {
        operation: Operation::Apply,
        manager: write.manager.to_owned(),
        api_version: String::new(),
        subresource: write.subresource.to_owned(),
    };
    let last = managers.get(&id).cloned();
    managers.insert(
        id.clone(),
        Owned {
            set,
            api_version: write.api_version.to_owned(),
            time: last.as_ref().and_then(|l| l.time.clone()),
        },
    );
    let object = match &last {
        Some(last) if !last.set.is_empty() => prune(write.schema, &merged, &managers, &last.set)?,
        _ => merged,
    };
    let change = typed::compare(write.schema, before, &object).without(&reset_set(write.reset));
    let touched = change.added.clone().union(&change.modified);
    let mut conflicts = Vec::new();
    for (other, owned) in &managers {
        if *other != id {
            let text = show_manager(other);
            conflicts.extend(
                owned
                    .set
                    .intersection(&touched)
                    .paths()
                    .into_iter()
                    .map(|path| (text.clone(), path)),
            );
        }
    }
    if !force && !conflicts.is_empty() {
        return Err(ApplyError::Conflicts(conflicts));
    }
    yield_to(&mut managers, Some(&id), &touched, &change);
    if let Some(own) = managers.get_mut(&id) {
        // An apply that changes nothing about the object leaves the time alone, also of a new owner.
        if !change.is_same() {
            own.time = Some(write.now.to_owned());
        }
    }
    managers.retain(|_, o| !o.set.is_empty());
    Ok((object, managers))
}

/// Remove what this manager owned before and nobody owns now.
fn prune(schema: &Schema, merged: &Value, managers: &Managers, last: &FieldSet) -> Result<Value, ApplyError> {
    let sets = |v: &Value| {
        typed::field_set(schema, v)
            .map(|s| typed::with_named_fields(schema, &s))
            .map_err(ApplyError::Typed)
    };
    let last_named = typed::with_named_fields(schema, last);
    let pruned = typed::remove(schema, merged, &last_named);
    let managed = managers
        .values()
        .fold(FieldSet::default(), |all, o| all.union(&o.set));
    let managed = typed::with_named_fields(schema, &managed);
    let merged_set = sets(merged)?;
    let gone = merged_set.difference(&sets(&pruned)?).difference(&managed);
    let pruned = typed::remove(schema, merged, &gone);
    let dangling = merged_set.difference(&sets(&pruned)?).intersection(&last_named);
    Ok(typed::remove(schema, merged, &dangling))
}

fn show_manager(id: &ManagerId) -> String {
    let mut text = format!("{:?}", id.manager);
    if !id.subresource.is_empty() {
        text.push_str(&format!(" with subresource {:?}", id.subresource));
    }
    if id.operation == Operation::Update {
        text.push_str(&format!(" using {}", id.api_version));
    }
    text
}

/// Whether two objects differ in nothing but times of managedFields and the resourceVersion.
pub(crate) fn same_but_times(a: &Value, b: &Value) -> bool {
    let (Some(a), Some(b)) = (a.as_object(), b.as_object()) else {
        return a == b;
    };
    a.len() == b.len()
        && a.iter().all(|(key, x)| match b.get(key) {
            Some(y) if key == "metadata" => same_metadata(x, y),
            Some(y) => x == y,
            None => false,
        })
}

fn same_metadata(a: &Value, b: &Value) -> bool {
    let skip = |k: &str| k == "resourceVersion" || k == "managedFields";
    let (Some(x), Some(y)) = (a.as_object(), b.as_object()) else {
        return a == b;
    };
    x.iter()
        .filter(|(k, _)| !skip(k))
        .all(|(k, v)| y.get(k) == Some(v))
        && y.keys().filter(|k| !skip(k)).all(|k| x.contains_key(k))
        && {
            let timeless = |m: &Map<String, Value>| -> Vec<Value> {
                m.get("managedFields")
                    .and_then(Value::as_array)
                    .into_iter()
                    .flatten()
                    .map(|e| {
                        let mut e = e.clone();
                        if let Some(e) = e.as_object_mut() {
                            e.remove("time");
                        }
                        e
                    })
                    .collect()
            };
            let (p, q) = (timeless(x), timeless(y));
            p.len() == q.len() && p.iter().all(|e| q.contains(e))
        }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schema::{builtin, zero_value};

    fn write<'a>(schema: &'a Schema, zero: &'a Value, manager: &'a str) -> Write<'a> {
        Write {
            schema,
            zero,
            api_version: "v1",
            subresource: "",
            manager,
            now: "2026-01-01T00:00:00Z",
            reset: &["status"],
        }
    }

    #[test]
    fn an_apply_removes_what_its_manager_no_longer_sends() {
        let schema = builtin("core.v1.ConfigMap");
        let zero = zero_value(&schema);
        let w = write(&schema, &zero, "m");
        let one = apply(
            &w,
            None,
            &json!({"data": {"a": "1", "b": "2"}}),
            &Value::Null,
            false,
        )
        .expect("applies");
        let two = apply(&w, Some(&one), &json!({"data": {"b": "2"}}), &Value::Null, false).expect("applies");
        assert_eq!(two["data"], json!({"b": "2"}));
    }

    #[test]
    fn a_field_of_another_applier_is_a_conflict_until_forced() {
        let schema = builtin("core.v1.ConfigMap");
        let zero = zero_value(&schema);
        let one = apply(
            &write(&schema, &zero, "m1"),
            None,
            &json!({"data": {"a": "1"}}),
            &Value::Null,
            false,
        )
        .expect("applies");
        let other = write(&schema, &zero, "m2");
        match apply(
            &other,
            Some(&one),
            &json!({"data": {"a": "2"}}),
            &Value::Null,
            false,
        ) {
            Err(ApplyError::Conflicts(c)) => assert_eq!(c, [("\"m1\"".to_owned(), ".data.a".to_owned())]),
            wrong => panic!("expected a conflict, got {wrong:?}"),
        }
        let two = apply(
            &other,
            Some(&one),
            &json!({"data": {"a": "2"}}),
            &Value::Null,
            true,
        )
        .expect("forced");
        assert_eq!(two["metadata"]["managedFields"].as_array().map(Vec::len), Some(1));
        assert_eq!(two["metadata"]["managedFields"][0]["manager"], "m2");
    }

    #[test]
    fn applying_the_same_again_changes_nothing() {
        let schema = builtin("apps.v1.Deployment");
        let zero = zero_value(&schema);
        let w = write(&schema, &zero, "m");
        let config = json!({"spec": {"replicas": 1, "template": {"spec": {"containers": [{"name": "c", "image": "i"}]}}}});
        let one = apply(&w, None, &config, &Value::Null, false).expect("applies");
        let two = apply(&w, Some(&one), &config, &Value::Null, false).expect("applies");
        assert!(same_but_times(&one, &two));
    }

    #[test]
    fn an_update_takes_fields_from_their_owner() {
        let schema = builtin("core.v1.ConfigMap");
        let zero = zero_value(&schema);
        let one = apply(
            &write(&schema, &zero, "m1"),
            None,
            &json!({"data": {"a": "1", "b": "1"}}),
            &Value::Null,
            false,
        )
        .expect("applies");
        let mut two = one.clone();
        two["data"]["b"] = json!("5");
        update(&write(&schema, &zero, "upd"), Some(&one), &mut two);
        let entries = two["metadata"]["managedFields"].as_array().expect("entries");
        assert_eq!(entries[0]["fieldsV1"], json!({"f:data": {"f:a": {}}}));
        assert_eq!(entries[1]["fieldsV1"], json!({"f:data": {"f:b": {}}}));
    }
}
