//! The garbage collector: dependents go with their owners.
//!
//! A graph of owners by uid is kept from the store's journal of all kinds. When an owner goes, its dependents are looked at: one without a
//! living owner is deleted (background). `foregroundDeletion` holds an owner until its blocking dependents are gone, `orphan` until the
//! dependents no longer name it.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use serde_json::{Value, json};

use crate::http::delete::{FOREGROUND, ORPHAN};
use crate::hub::{CommitError, Hub, MODIFY_ATTEMPTS};
use crate::kinds::{ResourceId, split_group_version};
use crate::store::Expect;
use crate::{meta, time};

/// Where an object is stored.
type Place = (ResourceId, Arc<str>);

#[derive(Default)]
struct Graph {
    /// Every object by uid.
    objects: HashMap<String, Place>,
    /// Dependents of an owner's uid, by place.
    dependents: HashMap<String, BTreeSet<Place>>,
    /// Owners that a place named when it was last seen.
    owners: HashMap<Place, (String, Vec<String>)>,
}

impl Graph {
    fn seen(&mut self, place: &Place, object: &Value) {
        self.gone(place);
        let uid = meta::uid(object).to_owned();
        let owners: Vec<String> = meta::owners(object).into_iter().map(|o| o.uid).collect();
        for owner in &owners {
            self.dependents
                .entry(owner.clone())
                .or_default()
                .insert(place.clone());
        }
        self.objects.insert(uid.clone(), place.clone());
        self.owners.insert(place.clone(), (uid, owners));
    }

    fn gone(&mut self, place: &Place) {
        if let Some((uid, owners)) = self.owners.remove(place) {
            if self.objects.get(&uid) == Some(place) {
                self.objects.remove(&uid);
            }
            for owner in owners {
                if let Some(set) = self.dependents.get_mut(&owner) {
                    set.remove(place);
                    if set.is_empty() {
                        self.dependents.remove(&owner);
                    }
                }
            }
        }
    }
}

pub(crate) async fn run(hub: Arc<Hub>) {
    let mut any = hub.any.subscribe();
    let mut graph = Graph::default();
    let mut position: Option<u64> = None;
    let mut work: BTreeSet<Place> = BTreeSet::new();
    loop {
        any.mark_unchanged();
        read(&hub, &mut graph, &mut position, &mut work).await;
        // Deletions cause further events; they are read at the next turn.
        for place in std::mem::take(&mut work) {
            attend(&hub, &graph, &place).await;
        }
        tokio::select! {
            changed = any.changed() => if changed.is_err() { return },
            () = hub.shutdown.cancelled() => return,
        }
    }
}

async fn read(hub: &Hub, graph: &mut Graph, position: &mut Option<u64>, work: &mut BTreeSet<Place>) {
    let mut removed: HashSet<ResourceId> = HashSet::new();
    {
        let store = hub.store.lock();
        match position.and_then(|p| store.journal_after(p)) {
            Some(entries) => {
                for (resource, event) in entries {
                    let place = (resource.clone(), event.key.clone());
                    if event.change == crate::store::Change::Deleted {
                        let uid = meta::uid(&event.object.value).to_owned();
                        let owners = meta::owners(&event.object.value);
                        graph.gone(&place);
                        // Its dependents lost an owner; its owners may have waited for it.
                        work.extend(graph.dependents.get(&uid).into_iter().flatten().cloned());
                        work.extend(owners.iter().filter_map(|o| graph.objects.get(&o.uid).cloned()));
                        removed.insert(resource);
                    } else {
                        graph.seen(&place, &event.object.value);
                        if needs_look(&event.object.value) {
                            work.insert(place.clone());
                        }
                        // A dependent that no longer names its owner may free it.
                        if let Some(previous) = &event.previous {
                            let owners = meta::owners(&previous.value);
                            work.extend(owners.iter().filter_map(|o| graph.objects.get(&o.uid).cloned()));
                        }
                    }
                }
            }
            None => {
                *graph = Graph::default();
                for (resource, key, object) in store.all() {
                    let place = (resource.clone(), key.clone());
                    graph.seen(&place, &object.value);
                    if needs_look(&object.value) {
                        work.insert(place);
                    }
                }
            }
        }
        *position = Some(store.rv());
    }
    for resource in removed {
        let registry = hub.registry();
        if let Some(kind) = registry.by_resource(&resource).filter(|k| k.is_custom()) {
            super::crds::object_removed(hub, &kind.group, &kind.plural).await;
        }
    }
}

fn needs_look(object: &Value) -> bool {
    !meta::metadata(object)
        .get("ownerReferences")
        .is_none_or(Value::is_null)
        || (meta::is_terminating(object) && meta::finalizers(object).any(|f| f == FOREGROUND || f == ORPHAN))
}

async fn attend(hub: &Hub, graph: &Graph, place: &Place) {
    let Some(current) = hub.get_at(&place.0, &place.1) else {
        return;
    };
    let object = &current.value;
    if meta::is_terminating(object) {
        if meta::finalizers(object).any(|f| f == ORPHAN) {
            orphan_dependents(hub, graph, object).await;
            remove_finalizer(hub, place, ORPHAN).await;
        } else if meta::finalizers(object).any(|f| f == FOREGROUND) {
            foreground(hub, graph, place, object).await;
        }
    }
    collect(hub, graph, place, object).await;
}

/// Delete an object none of whose owners lives.
async fn collect(hub: &Hub, graph: &Graph, place: &Place, object: &Value) {
    let owners = meta::owners(object);
    if owners.is_empty() || meta::is_terminating(object) {
        return;
    }
    let registry = hub.registry();
    let mut solid = false;
    let mut dangling: Vec<String> = Vec::new();
    let mut waiting: Vec<String> = Vec::new();
    for owner in &owners {
        let (group, _) = split_group_version(&owner.api_version);
        let Some(kind) = registry.by_kind(group, &owner.kind) else {
            // An unknown kind cannot be looked up: the owner may live.
            solid = true;
            continue;
        };
        let namespace = if kind.namespaced {
            meta::namespace(object)
        } else {
            ""
        };
        let found = hub.get_at(&kind.resource, &crate::store::key(namespace, &owner.name));
        match found.filter(|o| meta::uid(&o.value) == owner.uid) {
            None => dangling.push(owner.uid.clone()),
            Some(o)
                if meta::is_terminating(&o.value) && meta::finalizers(&o.value).any(|f| f == FOREGROUND) =>
            {
                waiting.push(owner.uid.clone())
            }
            Some(_) => solid = true,
        }
    }
    if solid {
        if dangling.is_empty() && waiting.is_empty() {
            return;
        }
        dangling.extend(waiting);
        drop_owners(hub, place, &dangling).await;
        return;
    }
    if dangling.is_empty() && waiting.is_empty() {
        return;
    }
    // What waits in the foreground passes its manner of deletion on, to whoever has dependents to wait for.
    let waits = !waiting.is_empty() && graph.dependents.contains_key(meta::uid(object));
    delete(hub, place, waits.then_some(FOREGROUND)).await;
}

/// Delete the dependents; the owner goes when no blocking one is left.
async fn foreground(hub: &Hub, graph: &Graph, place: &Place, owner: &Value) {
    let uid = meta::uid(owner);
    for dependent in graph.dependents.get(uid).into_iter().flatten() {
        if let Some(object) = hub.get_at(&dependent.0, &dependent.1) {
            collect(hub, graph, dependent, &object.value).await;
        }
    }
    let blocked = graph.dependents.get(uid).into_iter().flatten().any(|d| {
        hub.get_at(&d.0, &d.1)
            .is_some_and(|o| meta::owners(&o.value).iter().any(|r| r.uid == uid && r.blocks))
    });
    if !blocked {
        remove_finalizer(hub, place, FOREGROUND).await;
    }
}

async fn orphan_dependents(hub: &Hub, graph: &Graph, owner: &Value) {
    let uid = meta::uid(owner).to_owned();
    for dependent in graph.dependents.get(&uid).into_iter().flatten() {
        drop_owners(hub, dependent, std::slice::from_ref(&uid)).await;
    }
}

async fn drop_owners(hub: &Hub, place: &Place, uids: &[String]) {
    let edit = |object: &Value| {
        let mut next = object.clone();
        let metadata = meta::metadata_mut(&mut next);
        let list = metadata.get_mut("ownerReferences")?.as_array_mut()?;
        list.retain(|r| {
            !uids
                .iter()
                .any(|u| r.get("uid").and_then(Value::as_str) == Some(u))
        });
        if list.is_empty() {
            metadata.remove("ownerReferences");
        }
        Some(next)
    };
    if let Err(error) = hub
        .modify(&place.0, &place.1, "kube-controller-manager", "", edit)
        .await
    {
        tracing::warn!(object = %place.1, resource = %place.0, error = error.message, "removing an owner reference");
    }
}

async fn remove_finalizer(hub: &Hub, place: &Place, finalizer: &str) {
    for _ in 0..MODIFY_ATTEMPTS {
        let Some(current) = hub.get_at(&place.0, &place.1) else {
            return;
        };
        let left: Vec<String> = meta::finalizers(&current.value)
            .filter(|f| *f != finalizer)
            .map(str::to_owned)
            .collect();
        let mut next = current.value.clone();
        let metadata = meta::metadata_mut(&mut next);
        if left.is_empty() {
            metadata.remove("finalizers");
        } else {
            metadata.insert("finalizers".into(), json!(left));
        }
        let registry = hub.registry();
        let finished = registry
            .by_resource(&place.0)
            .is_some_and(|k| crate::strategy::is_finished(k, &next));
        let result = if finished {
            hub.remove(&place.0, &place.1, next, current.rv).await
        } else {
            hub.put(&place.0, &place.1, next, Expect::At(current.rv)).await
        };
        match result {
            Ok(_) => return,
            Err(CommitError::Lost(_)) => {}
            Err(CommitError::Storage(error)) => {
                tracing::warn!(object = %place.1, resource = %place.0, error, "removing a finalizer");
                return;
            }
        }
    }
}

/// Delete on behalf of a gone owner.
async fn delete(hub: &Hub, place: &Place, policy: Option<&str>) {
    for _ in 0..MODIFY_ATTEMPTS {
        let Some(current) = hub.get_at(&place.0, &place.1) else {
            return;
        };
        if meta::is_terminating(&current.value) {
            return;
        }
        let registry = hub.registry();
        let Some(kind) = registry.by_resource(&place.0) else {
            return;
        };
        let mut finalizers: Vec<String> = meta::finalizers(&current.value).map(str::to_owned).collect();
        finalizers.extend(policy.map(str::to_owned));
        let running = kind.is("", "pods")
            && !meta::str_at(&current.value, "spec.nodeName").is_empty()
            && !matches!(
                meta::str_at(&current.value, "status.phase"),
                "Succeeded" | "Failed"
            );
        let result = if finalizers.is_empty() && !running {
            hub.remove(&place.0, &place.1, current.value.clone(), current.rv)
                .await
                .map(|event| {
                    crate::http::write::after_removal(hub, kind, &event.object.value);
                })
        } else {
            let mut marked = current.value.clone();
            let grace = if running {
                meta::int_at(&marked, "spec.terminationGracePeriodSeconds").unwrap_or(30)
            } else {
                0
            };
            let now = hub.clock.now();
            let at = now
                .checked_add(jiff::SignedDuration::from_secs(grace))
                .unwrap_or(now);
            let metadata = meta::metadata_mut(&mut marked);
            metadata.insert("deletionTimestamp".into(), json!(time::seconds(at)));
            metadata.insert("deletionGracePeriodSeconds".into(), json!(grace));
            if let Some(generation) = metadata.get("generation").and_then(Value::as_i64) {
                metadata.insert("generation".into(), json!(generation + 1));
            }
            if !finalizers.is_empty() {
                metadata.insert("finalizers".into(), json!(finalizers));
            }
            hub.put(&place.0, &place.1, marked, Expect::At(current.rv))
                .await
                .map(drop)
        };
        match result {
            Ok(()) => return,
            Err(CommitError::Lost(_)) => {}
            Err(CommitError::Storage(error)) => {
                tracing::warn!(object = %place.1, resource = %place.0, error, "deleting a dependent of an object that is gone");
                return;
            }
        }
    }
}
