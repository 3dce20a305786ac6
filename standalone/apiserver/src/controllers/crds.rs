//! CustomResourceDefinitions: conditions, and the registry that requests are answered from, which changes as a definition is
//! published. Deleting one deletes its objects.

use std::sync::Arc;

use serde_json::{Value, json};

use super::Follower;
use crate::crd::definition;
use crate::hub::Hub;
use crate::meta::{self, str_at};
use crate::store::{Change, Event};
use crate::time;

pub(crate) const RESOURCE: &str = "apiextensions.k8s.io/customresourcedefinitions";
/// Held by a CRD while its objects are being removed.
pub(crate) const CLEANUP: &str = "customresourcecleanup.apiextensions.k8s.io";

/// Take over what is stored, before the first request.
pub(crate) fn restore(hub: &Hub) {
    let stored: Vec<Value> = {
        let store = hub.store.lock();
        store
            .list(RESOURCE, "", None, None, |_| true)
            .items
            .iter()
            .map(|o| o.value.clone())
            .collect()
    };
    for crd in &stored {
        serve(hub, crd);
    }
}

/// Requests are answered by this definition from now on, if it is established.
fn serve(hub: &Hub, crd: &Value) {
    if definition::condition_is_true(crd, "Established") {
        let kind = Arc::new(definition::to_kind(crd));
        hub.change_registry(|r| r.insert(kind));
    }
}

/// Takes over what is about to be published.
pub(crate) fn take_over(hub: &Hub, event: &Event) {
    let crd = &event.object.value;
    if event.change == Change::Deleted {
        hub.change_registry(|r| r.remove(str_at(crd, "spec.group"), str_at(crd, "spec.names.plural")));
    } else {
        serve(hub, crd);
    }
}

pub(crate) async fn run(hub: Arc<Hub>) {
    let mut follower = Follower::new(RESOURCE);
    let mut wake = hub.subscribe(follower.resource());
    loop {
        wake.mark_unchanged();
        for seen in follower.changes(&hub) {
            if seen.deleted {
                // A name that was in conflict may be free now.
                reconcile_group(&hub, str_at(&seen.object.value, "spec.group")).await;
                continue;
            }
            settle(&hub, meta::name(&seen.object.value)).await;
        }
        tokio::select! {
            changed = wake.changed() => if changed.is_err() { return },
            () = hub.shutdown.cancelled() => return,
        }
    }
}

async fn reconcile_group(hub: &Hub, group: &str) {
    let names: Vec<String> = {
        let store = hub.store.lock();
        store
            .list(RESOURCE, "", None, None, |o| {
                str_at(&o.value, "spec.group") == group
            })
            .items
            .iter()
            .map(|o| meta::name(&o.value).to_owned())
            .collect()
    };
    for name in names {
        settle(hub, &name).await;
    }
}

/// Bring one CRD to rest: finalizer, conditions; or its end.
async fn settle(hub: &Hub, name: &str) {
    // NamesAccepted first, then Established: two writes, as watchers of real CRDs see them.
    for _ in 0..3 {
        let Some(current) = hub.get_at(RESOURCE, name) else {
            return;
        };
        if meta::is_terminating(&current.value) {
            terminate(hub, name).await;
            return;
        }
        let now = time::seconds(hub.clock.now());
        let others = hub.store.lock().list(RESOURCE, "", None, None, |_| true).items;
        let registry = hub.registry();
        let edit = |crd: &Value| -> Option<Value> {
            let others: Vec<&Value> = others
                .iter()
                .map(|o| &o.value)
                .filter(|o| str_at(o, "spec.group") == str_at(crd, "spec.group"))
                .collect();
            let mut next = crd.clone();
            let status = definition::reconcile(crd, &registry, &others, &now);
            meta::as_object_mut(&mut next).insert("status".into(), status);
            Some(next)
        };
        match hub
            .modify(&RESOURCE.into(), name, "kube-apiserver", "status", edit)
            .await
        {
            Ok(Some(_)) => {}
            Ok(None) => break,
            Err(error) => {
                tracing::warn!(
                    crd = name,
                    error = error.message,
                    "writing the conditions of a CustomResourceDefinition"
                );
                return;
            }
        }
    }
}

/// Remove the objects of a CRD that is being deleted, then let it go.
async fn terminate(hub: &Hub, name: &str) {
    let Some(crd) = hub.get_at(RESOURCE, name) else {
        return;
    };
    let resource: crate::kinds::ResourceId = format!(
        "{}/{}",
        str_at(&crd.value, "spec.group"),
        str_at(&crd.value, "spec.names.plural")
    )
    .into();
    let now = time::seconds(hub.clock.now());
    say_in_progress(hub, name, &now).await;
    let objects = hub.store.lock().list(&resource, "", None, None, |_| true).items;
    for object in &objects {
        let key = crate::store::key(meta::namespace(&object.value), meta::name(&object.value));
        let result = if meta::finalizers(&object.value).next().is_none() {
            hub.remove(&resource, &key, object.value.clone(), object.rv)
                .await
                .map(drop)
        } else if meta::is_terminating(&object.value) {
            Ok(())
        } else {
            let mut marked = object.value.clone();
            let metadata = meta::metadata_mut(&mut marked);
            metadata.insert("deletionTimestamp".into(), json!(now));
            metadata.insert("deletionGracePeriodSeconds".into(), json!(0));
            hub.put(&resource, &key, marked, crate::store::Expect::At(object.rv))
                .await
                .map(drop)
        };
        if let Err(error) = result {
            tracing::debug!(
                crd = name,
                object = key,
                ?error,
                "removing an object of a deleted CustomResourceDefinition"
            );
        }
    }
    if hub.store.lock().count(&resource) > 0 {
        return;
    }
    // Nothing left: take the finalizer off, and with it the CRD. Watchers see it as it was stored last.
    for _ in 0..crate::hub::MODIFY_ATTEMPTS {
        let Some(current) = hub.get_at(RESOURCE, name) else {
            return;
        };
        let mut last = current.value.clone();
        let left: Vec<String> = meta::finalizers(&last)
            .filter(|f| *f != CLEANUP)
            .map(str::to_owned)
            .collect();
        let result = if left.is_empty() {
            hub.remove(&RESOURCE.into(), name, last, current.rv).await
        } else {
            if left.len() == meta::finalizers(&current.value).count() {
                return;
            }
            meta::metadata_mut(&mut last).insert("finalizers".into(), json!(left));
            hub.put(&RESOURCE.into(), name, last, crate::store::Expect::At(current.rv))
                .await
        };
        match result {
            Ok(_) => return,
            Err(crate::hub::CommitError::Lost(_)) => {}
            Err(crate::hub::CommitError::Storage(error)) => {
                tracing::warn!(crd = name, error, "removing a CustomResourceDefinition");
                return;
            }
        }
    }
}

/// The condition of a CRD whose objects are being removed.
async fn say_in_progress(hub: &Hub, name: &str, now: &str) {
    let set = |crd: &Value| {
        let mut next = crd.clone();
        let status = meta::member_object(&mut next, "status");
        let conditions = status.entry("conditions").or_insert_with(|| json!([]));
        let Value::Array(list) = conditions else {
            return None;
        };
        let reason = json!("InstanceDeletionInProgress");
        let known = list
            .iter_mut()
            .find(|c| c.get("type") == Some(&json!("Terminating")));
        let said = json!({"type": "Terminating", "status": "True", "lastTransitionTime": now, "reason": reason,
            "message": "CustomResource deletion is in progress"});
        match known {
            Some(known) if known.get("reason") == Some(&reason) => return None,
            Some(known) => *known = said,
            None => list.push(said),
        }
        Some(next)
    };
    if let Err(error) = hub
        .modify(&RESOURCE.into(), name, "kube-apiserver", "status", set)
        .await
    {
        tracing::warn!(
            crd = name,
            error = error.message,
            "marking a CustomResourceDefinition as terminating"
        );
    }
}

/// An object of a terminating CRD went away: look again.
pub(crate) async fn object_removed(hub: &Hub, group: &str, plural: &str) {
    let name = format!("{plural}.{group}");
    if hub
        .get_at(RESOURCE, &name)
        .is_some_and(|c| meta::is_terminating(&c.value))
    {
        terminate(hub, &name).await;
    }
}
