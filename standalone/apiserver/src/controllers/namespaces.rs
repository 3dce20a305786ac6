//! Namespaces: the `default` ServiceAccount of each, and emptying those that are being deleted.

use std::sync::Arc;

use serde_json::{Value, json};

use super::Follower;
use crate::error::{ApiError, ApiResult};
use crate::hub::{CommitError, Hub, MODIFY_ATTEMPTS};
use crate::store::{Expect, Lost};
use crate::{meta, time};

pub(crate) const RESOURCE: &str = "/namespaces";
const ACCOUNTS: &str = "/serviceaccounts";
/// Namespaces that always exist.
const STANDARD: [&str; 4] = ["default", "kube-system", "kube-public", "kube-node-lease"];

/// Make the standard namespaces at the first start.
pub(crate) async fn bootstrap(hub: &Hub) -> ApiResult<()> {
    for name in STANDARD {
        let now = time::seconds(hub.clock.now());
        let object = json!({
            "kind": "Namespace", "apiVersion": "v1",
            "metadata": {"name": name, "uid": hub.clock.uid(), "creationTimestamp": now, "labels": {"kubernetes.io/metadata.name": name}},
            "spec": {"finalizers": ["kubernetes"]}, "status": {"phase": "Active"},
        });
        match hub.put(&RESOURCE.into(), name, object, Expect::Absent).await {
            Ok(_) | Err(CommitError::Lost(_)) => {}
            Err(CommitError::Storage(text)) => return Err(Hub::storage_error(&text)),
        }
        ensure_account(hub, name).await;
    }
    Ok(())
}

pub(crate) async fn run(hub: Arc<Hub>) {
    let mut namespaces = Follower::new(RESOURCE);
    let mut accounts = Follower::new(ACCOUNTS);
    let mut any = hub.any.subscribe();
    let mut terminating: std::collections::BTreeSet<String> = std::collections::BTreeSet::new();
    loop {
        any.mark_unchanged();
        for seen in namespaces.changes(&hub) {
            let name = meta::name(&seen.object.value).to_owned();
            if seen.deleted {
                terminating.remove(&name);
            } else if meta::is_terminating(&seen.object.value) {
                terminating.insert(name);
            } else {
                ensure_account(&hub, &name).await;
            }
        }
        for seen in accounts.changes(&hub) {
            if seen.deleted && meta::name(&seen.object.value) == "default" {
                ensure_account(&hub, meta::namespace(&seen.object.value)).await;
            }
        }
        for name in terminating.clone() {
            if let Err(error) = empty(&hub, &name).await {
                tracing::warn!(
                    namespace = name,
                    error = error.message,
                    "emptying a namespace that is being deleted"
                );
            }
        }
        tokio::select! {
            changed = any.changed() => if changed.is_err() { return },
            () = hub.shutdown.cancelled() => return,
        }
    }
}

async fn ensure_account(hub: &Hub, namespace: &str) {
    let key = crate::store::key(namespace, "default");
    let open = hub
        .get_at(RESOURCE, namespace)
        .is_some_and(|n| !meta::is_terminating(&n.value));
    if !open || hub.get_at(ACCOUNTS, &key).is_some() {
        return;
    }
    let now = time::seconds(hub.clock.now());
    let object = json!({
        "kind": "ServiceAccount", "apiVersion": "v1",
        "metadata": {"name": "default", "namespace": namespace, "uid": hub.clock.uid(), "creationTimestamp": now},
    });
    if let Err(CommitError::Storage(error)) = hub.put(&ACCOUNTS.into(), &key, object, Expect::Absent).await {
        tracing::warn!(namespace, error, "creating the default ServiceAccount");
    }
}

/// Delete what a terminating namespace holds; when nothing is left, let it go.
async fn empty(hub: &Hub, namespace: &str) -> ApiResult<()> {
    let prefix = format!("{namespace}/");
    let registry = hub.registry();
    let now = time::seconds(hub.clock.now());
    let mut kinds: Vec<_> = registry
        .all()
        .filter(|k| k.namespaced && &*k.group != "events.k8s.io")
        .cloned()
        .collect();
    // Pods go after what would make them again.
    kinds.sort_by_key(|k| k.is("", "pods"));
    let mut remaining: Vec<(String, usize)> = Vec::new();
    let mut held: std::collections::BTreeMap<String, usize> = std::collections::BTreeMap::new();
    for kind in kinds {
        let objects = hub
            .store
            .lock()
            .list(&kind.resource, &prefix, None, None, |_| true)
            .items;
        for object in &objects {
            let key = format!("{prefix}{}", meta::name(&object.value));
            let has_finalizers = meta::finalizers(&object.value).next().is_some();
            let running = kind.is("", "pods")
                && !meta::str_at(&object.value, "spec.nodeName").is_empty()
                && !matches!(
                    meta::str_at(&object.value, "status.phase"),
                    "Succeeded" | "Failed"
                );
            let result = if !has_finalizers && !running {
                hub.remove(&kind.resource, &key, object.value.clone(), object.rv)
                    .await
                    .map(|event| {
                        crate::http::write::after_removal(hub, &kind, &event.object.value);
                    })
            } else if meta::is_terminating(&object.value) {
                Ok(())
            } else {
                let mut marked = object.value.clone();
                let grace = if running {
                    meta::int_at(&marked, "spec.terminationGracePeriodSeconds").unwrap_or(30)
                } else {
                    0
                };
                let at = hub
                    .clock
                    .now()
                    .checked_add(jiff::SignedDuration::from_secs(grace))
                    .map_or_else(|_| now.clone(), time::seconds);
                let metadata = meta::metadata_mut(&mut marked);
                metadata.insert("deletionTimestamp".into(), json!(at));
                metadata.insert("deletionGracePeriodSeconds".into(), json!(grace));
                hub.put(&kind.resource, &key, marked, Expect::At(object.rv))
                    .await
                    .map(drop)
            };
            if let Err(CommitError::Storage(text)) = result {
                return Err(Hub::storage_error(&text));
            }
        }
        let left = hub
            .store
            .lock()
            .list(&kind.resource, &prefix, None, None, |_| true)
            .items;
        if !left.is_empty() {
            // Kubernetes writes the dot also for the core group.
            remaining.push((format!("{}.{}", kind.plural, kind.group), left.len()));
            for object in &left {
                for finalizer in meta::finalizers(&object.value) {
                    *held.entry(finalizer.to_owned()).or_default() += 1;
                }
            }
        }
    }
    if remaining.is_empty() {
        let finalizers = hub.get_at(RESOURCE, namespace).map(|n| {
            meta::list_at(&n.value, "spec.finalizers")
                .iter()
                .filter(|f| *f != &json!("kubernetes"))
                .cloned()
                .collect::<Vec<_>>()
        });
        if let Some(finalizers) = finalizers {
            match set_finalizers(hub, namespace, Some(Value::Array(finalizers))).await {
                Ok(_) => {}
                Err(error) if error.reason == "NotFound" => {}
                Err(error) => return Err(error),
            }
        }
        return Ok(());
    }
    write_conditions(hub, namespace, &remaining, &held, &now).await
}

async fn write_conditions(
    hub: &Hub,
    namespace: &str,
    remaining: &[(String, usize)],
    held: &std::collections::BTreeMap<String, usize>,
    now: &str,
) -> ApiResult<()> {
    let resources: Vec<String> = remaining
        .iter()
        .map(|(r, n)| format!("{r} has {n} resource instances"))
        .collect();
    let finalizers: Vec<String> = held
        .iter()
        .map(|(f, n)| format!("{f} in {n} resource instances"))
        .collect();
    let conditions = [
        (
            "NamespaceDeletionDiscoveryFailure",
            "False",
            "ResourcesDiscovered",
            "All resources successfully discovered".to_owned(),
        ),
        (
            "NamespaceDeletionGroupVersionParsingFailure",
            "False",
            "ParsedGroupVersions",
            "All legacy kube types successfully parsed".to_owned(),
        ),
        (
            "NamespaceDeletionContentFailure",
            "False",
            "ContentDeleted",
            "All content successfully deleted, may be waiting on finalization".to_owned(),
        ),
        (
            "NamespaceContentRemaining",
            "True",
            "SomeResourcesRemain",
            format!("Some resources are remaining: {}", resources.join(", ")),
        ),
        if finalizers.is_empty() {
            (
                "NamespaceFinalizersRemaining",
                "False",
                "ContentHasNoFinalizers",
                "All content-preserving finalizers finished".to_owned(),
            )
        } else {
            (
                "NamespaceFinalizersRemaining",
                "True",
                "SomeFinalizersRemain",
                format!(
                    "Some content in the namespace has finalizers remaining: {}",
                    finalizers.join(", ")
                ),
            )
        },
    ];
    let edit = |object: &Value| {
        let mut next = object.clone();
        let status = meta::member_object(&mut next, "status");
        status.insert("phase".into(), json!("Terminating"));
        let list = status.entry("conditions").or_insert_with(|| json!([]));
        let Value::Array(list) = list else { return None };
        for (kind, state, reason, message) in &conditions {
            let fresh = json!({"type": kind, "status": state, "lastTransitionTime": now, "reason": reason, "message": message});
            match list.iter_mut().find(|c| c.get("type") == Some(&json!(kind))) {
                Some(old)
                    if old.get("status") == Some(&json!(state))
                        && old.get("message") == Some(&json!(message)) => {}
                Some(old) => *old = fresh,
                None => list.push(fresh),
            }
        }
        Some(next)
    };
    hub.modify(
        &RESOURCE.into(),
        namespace,
        "kube-controller-manager",
        "status",
        edit,
    )
    .await
    .map(drop)
}

/// Replace `spec.finalizers`; a terminating namespace without any goes.
pub(crate) async fn set_finalizers(
    hub: &Hub,
    namespace: &str,
    finalizers: Option<Value>,
) -> ApiResult<Value> {
    for _ in 0..MODIFY_ATTEMPTS {
        let Some(current) = hub.get_at(RESOURCE, namespace) else {
            return Err(ApiError::not_found("", "namespaces", namespace));
        };
        let mut next = current.value.clone();
        let spec = meta::member_object(&mut next, "spec");
        match finalizers.as_ref().and_then(Value::as_array) {
            Some(list) if !list.is_empty() => {
                spec.insert("finalizers".into(), json!(list));
            }
            _ => {
                spec.remove("finalizers");
            }
        }
        let done = meta::is_terminating(&next)
            && meta::list_at(&next, "spec.finalizers").is_empty()
            && meta::finalizers(&next).next().is_none();
        let result = if done {
            hub.remove(&RESOURCE.into(), namespace, next, current.rv).await
        } else if next == current.value {
            return Ok(next);
        } else {
            hub.put(&RESOURCE.into(), namespace, next, Expect::At(current.rv))
                .await
        };
        match result {
            Ok(event) => return Ok(event.object.value.clone()),
            Err(CommitError::Lost(Lost::Missing)) => {
                return Err(ApiError::not_found("", "namespaces", namespace));
            }
            Err(CommitError::Lost(_)) => {}
            Err(CommitError::Storage(text)) => return Err(Hub::storage_error(&text)),
        }
    }
    Err(ApiError::modified("", "namespaces", namespace))
}
