//! DELETE of one object and of a collection.

use axum::body::Body;
use http::Response;
use serde_json::{Map, Value, json};

use super::body;
use super::read::Selection;
use super::request::{Call, Query};
use super::{accept, respond};
use crate::admission::Operation;
use crate::error::{ApiError, ApiResult, FieldError};
use crate::hub::{CommitError, Hub, MODIFY_ATTEMPTS};
use crate::store::{Expect, Lost, Stored};
use crate::{meta, table, time, versions};

pub(crate) const FOREGROUND: &str = "foregroundDeletion";
pub(crate) const ORPHAN: &str = "orphan";

/// What a client asks of a deletion.
#[derive(Debug, Default, Clone)]
pub(crate) struct DeleteOptions {
    grace_seconds: Option<i64>,
    policy: Option<String>,
    orphan_dependents: Option<bool>,
    uid: Option<String>,
    resource_version: Option<String>,
    dry_run: bool,
}

impl DeleteOptions {
    fn parse(call: &Call, body: &bytes::Bytes) -> ApiResult<Self> {
        let mut options = Self::from_query(&call.query)?;
        if !body.is_empty() {
            let media = call.header("content-type");
            let media = media.split(';').next().unwrap_or_default().trim();
            let value = match media {
                "" | "application/json" => body::json_document(body)?.value,
                "application/yaml" => body::yaml_document(body)?.value,
                "application/vnd.kubernetes.protobuf" => {
                    crate::protobuf::decode(body, "DeleteOptions").map_err(ApiError::bad_request)?
                }
                _ => {
                    return Err(ApiError::unsupported_media_type(
                        "the body of the request was in an unknown format - accepted media types include: application/json, application/yaml, application/vnd.kubernetes.protobuf",
                    ));
                }
            };
            options.grace_seconds = value
                .get("gracePeriodSeconds")
                .and_then(Value::as_i64)
                .or(options.grace_seconds);
            options.policy = value
                .get("propagationPolicy")
                .and_then(Value::as_str)
                .map(str::to_owned)
                .or(options.policy);
            options.orphan_dependents = value
                .get("orphanDependents")
                .and_then(Value::as_bool)
                .or(options.orphan_dependents);
            let condition = |key: &str| {
                meta::at(&value, "preconditions")
                    .and_then(|p| p.get(key))
                    .and_then(Value::as_str)
                    .map(str::to_owned)
            };
            options.uid = condition("uid");
            options.resource_version = condition("resourceVersion");
            options.dry_run |= !meta::list_at(&value, "dryRun").is_empty();
        }
        let mut errors = Vec::new();
        if options.policy.is_some() && options.orphan_dependents.is_some() {
            errors.push(FieldError::invalid(
                "propagationPolicy",
                &json!(options.policy),
                "orphanDependents and deletionPropagation cannot be both set",
            ));
        }
        if let Some(policy) = &options.policy
            && !matches!(policy.as_str(), "Foreground" | "Background" | "Orphan" | "")
        {
            let mut e = FieldError::not_supported(
                "propagationPolicy",
                &json!(policy),
                &["Foreground", "Background", "Orphan", "nil"],
            );
            e.detail = "supported values: \"Foreground\", \"Background\", \"Orphan\", \"nil\"".into();
            errors.push(e);
        }
        if errors.is_empty() {
            Ok(options)
        } else {
            Err(ApiError::invalid("", "DeleteOptions", "", &errors))
        }
    }

    fn from_query(query: &Query) -> ApiResult<Self> {
        let grace = query.text("gracePeriodSeconds");
        Ok(Self {
            grace_seconds: if grace.is_empty() {
                None
            } else {
                Some(grace.parse().map_err(|_| {
                    ApiError::bad_request(format!("strconv.ParseInt: parsing {grace:?}: invalid syntax"))
                })?)
            },
            policy: query.get("propagationPolicy").map(str::to_owned),
            orphan_dependents: query.get("orphanDependents").map(|v| v == "true"),
            dry_run: !query.text("dryRun").is_empty(),
            ..Self::default()
        })
    }
}

pub(crate) async fn one(hub: &Hub, call: &Call, request_body: Body) -> ApiResult<Response<Body>> {
    let accepted = accept::negotiate(call.header("accept"))?;
    let bytes = body::read(request_body).await?;
    let options = DeleteOptions::parse(call, &bytes)?;
    let mut warnings = super::read::warnings(call);
    let target = &call.target;
    if target.kind.is("batch", "jobs") && options.policy.is_none() && options.orphan_dependents.is_none() {
        warnings.push("child pods are preserved by default when jobs are deleted; set propagationPolicy=Background to remove them or set propagationPolicy=Orphan to suppress this warning".into());
    }
    let (last, gone) = delete_object(hub, call, &target.key(), &options).await?;
    let answers_object = !gone
        || target
            .kind
            .row()
            .is_some_and(crate::kinds::Row::delete_answers_object);
    if answers_object {
        let object = versions::from_hub(&target.kind, target.version(), &last);
        let now = hub.clock.now();
        return Ok(respond::object(200, &object, accepted, &warnings, |o| {
            table::of_one(
                &target.kind,
                target.version(),
                o,
                call.query.text("includeObject"),
                now,
            )
        }));
    }
    let mut details = Map::new();
    details.insert("name".into(), json!(target.name));
    if !target.kind.group.is_empty() {
        details.insert("group".into(), json!(&*target.kind.group));
    }
    details.insert("kind".into(), json!(&*target.kind.plural));
    details.insert("uid".into(), json!(meta::uid(&last)));
    let status = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "details": details});
    Ok(respond::value(200, &status, accepted, &warnings))
}

/// What a deletion does to the object.
enum Outcome {
    Remove(Value),
    Mark(Value),
    /// Already being deleted: nothing to write.
    Keep,
}

/// Delete one object as far as its finalizers and grace period allow. Returns its last state and whether it is gone.
async fn delete_object(
    hub: &Hub,
    call: &Call,
    key: &str,
    options: &DeleteOptions,
) -> ApiResult<(Value, bool)> {
    let kind = &call.target.kind;
    let name = key.rsplit('/').next().unwrap_or(key).to_owned();
    let not_found = || ApiError::not_found(&kind.group, &kind.plural, &name);
    if kind.is("", "namespaces") && matches!(name.as_str(), "default" | "kube-system" | "kube-public") {
        return Err(ApiError::forbidden(
            "",
            "namespaces",
            &name,
            "this namespace may not be deleted",
        ));
    }
    for _ in 0..MODIFY_ATTEMPTS {
        let current = hub.get(kind, key).ok_or_else(not_found)?;
        preconditions(call, &name, &current, options)?;
        if let Some(admission) = hub
            .admission
            .as_ref()
            .filter(|a| a.wants(&kind.group, &kind.plural))
        {
            let mut request = super::write::admission_request(
                call,
                Operation::Delete,
                Value::Null,
                current.value.clone(),
                options.dry_run,
            );
            request.name.clone_from(&name);
            admission
                .admit(&request)
                .await
                .map_err(|d| super::write::denied(call, &name, &d))?;
        }
        let now = time::seconds(hub.clock.now());
        let outcome = decide(call, &current.value, options, &now);
        if options.dry_run {
            return Ok(match outcome {
                Outcome::Remove(last) => (last, true),
                Outcome::Mark(marked) => (marked, false),
                Outcome::Keep => (current.value.clone(), false),
            });
        }
        let result = match outcome {
            Outcome::Keep => return Ok((current.value.clone(), false)),
            Outcome::Remove(last) => hub
                .remove(&kind.resource, key, last, current.rv)
                .await
                .map(|e| (e, true)),
            Outcome::Mark(marked) => hub
                .put(&kind.resource, key, marked, Expect::At(current.rv))
                .await
                .map(|e| (e, false)),
        };
        match result {
            Ok((event, gone)) => {
                if gone {
                    super::write::after_removal(hub, kind, &event.object.value);
                    // The answer shows the object as it was; a pod as it went, under a version of its own.
                    let answer = if kind.is("", "pods") {
                        event.object.value.clone()
                    } else {
                        current.value.clone()
                    };
                    return Ok((answer, true));
                }
                return Ok((event.object.value.clone(), false));
            }
            Err(CommitError::Lost(Lost::Missing)) => return Err(not_found()),
            Err(CommitError::Lost(_)) => {}
            Err(CommitError::Storage(text)) => return Err(Hub::storage_error(&text)),
        }
    }
    Err(ApiError::modified(&kind.group, &kind.plural, &name))
}

fn preconditions(call: &Call, name: &str, current: &Stored, options: &DeleteOptions) -> ApiResult<()> {
    let kind = &call.target.kind;
    if let Some(uid) = options.uid.as_deref().filter(|u| *u != meta::uid(&current.value)) {
        return Err(ApiError::conflict(
            &kind.group,
            &kind.plural,
            name,
            &format!(
                "the UID in the precondition ({uid}) does not match the UID in record ({}). The object might have been deleted and then recreated",
                meta::uid(&current.value)
            ),
        ));
    }
    if let Some(rv) = options
        .resource_version
        .as_deref()
        .filter(|rv| *rv != current.rv.to_string())
    {
        return Err(ApiError::conflict(
            &kind.group,
            &kind.plural,
            name,
            &format!(
                "the ResourceVersion in the precondition ({rv}) does not match the ResourceVersion in record ({}). The object might have been modified",
                current.rv
            ),
        ));
    }
    Ok(())
}

fn decide(call: &Call, current: &Value, options: &DeleteOptions, now: &str) -> Outcome {
    let kind = &call.target.kind;
    let mut object = current.clone();
    // Which of the collector's finalizers the client's wish amounts to.
    let policy = match (options.policy.as_deref(), options.orphan_dependents) {
        (Some("Foreground"), _) => Some(FOREGROUND),
        (Some("Orphan"), _) | (None, Some(true)) => Some(ORPHAN),
        (Some("Background"), _) | (None, Some(false)) => None,
        // Without a wish the finalizers that are there stay; Jobs orphan by default.
        _ if meta::finalizers(current).any(|f| f == FOREGROUND) => Some(FOREGROUND),
        _ if meta::finalizers(current).any(|f| f == ORPHAN) => Some(ORPHAN),
        _ if kind.is("batch", "jobs") => Some(ORPHAN),
        _ => None,
    };
    let mut finalizers: Vec<String> = meta::finalizers(current)
        .filter(|f| *f != FOREGROUND && *f != ORPHAN)
        .map(str::to_owned)
        .collect();
    if let Some(policy) = policy {
        finalizers.push(policy.to_owned());
    }
    let terminating = meta::is_terminating(current);
    let is_definition = kind.is("apiextensions.k8s.io", "customresourcedefinitions");
    if is_definition && !terminating && !finalizers.iter().any(|f| f == crate::controllers::crds::CLEANUP) {
        // Its objects go first.
        finalizers.push(crate::controllers::crds::CLEANUP.to_owned());
        let status = meta::member_object(&mut object, "status");
        if let Value::Array(list) = status.entry("conditions").or_insert_with(|| json!([])) {
            list.push(json!({"type": "Terminating", "status": "True", "lastTransitionTime": now,
                "reason": "InstanceDeletionPending", "message": "CustomResourceDefinition marked for deletion; CustomResource deletion will begin soon"}));
        }
    }
    let grace = grace_seconds(call, current, options);
    let is_namespace = kind.is("", "namespaces");
    let namespace_busy = is_namespace && !meta::list_at(current, "spec.finalizers").is_empty();
    if finalizers.is_empty() && grace == 0 && !namespace_busy {
        if kind.is("", "pods") && !terminating {
            // Pods always go through their grace period, even one of 0 seconds.
            let metadata = meta::metadata_mut(&mut object);
            metadata.insert("deletionTimestamp".into(), json!(now));
            metadata.insert("deletionGracePeriodSeconds".into(), json!(0));
            if let Some(generation) = metadata.get("generation").and_then(Value::as_i64) {
                metadata.insert("generation".into(), json!(generation + 1));
            }
        }
        return Outcome::Remove(object);
    }
    let metadata = meta::metadata_mut(&mut object);
    if finalizers.is_empty() {
        metadata.remove("finalizers");
    } else {
        metadata.insert("finalizers".into(), json!(finalizers));
    }
    let old_grace = meta::metadata(current)
        .get("deletionGracePeriodSeconds")
        .and_then(Value::as_i64);
    if !terminating {
        let metadata = meta::metadata_mut(&mut object);
        let at = time::parse(now).and_then(|t| t.checked_add(jiff::SignedDuration::from_secs(grace)).ok());
        metadata.insert(
            "deletionTimestamp".into(),
            json!(at.map_or_else(|| now.to_owned(), time::seconds)),
        );
        metadata.insert("deletionGracePeriodSeconds".into(), json!(grace));
        let counted = &*call.target.kind.group != "apiextensions.k8s.io";
        if let Some(generation) = metadata
            .get("generation")
            .and_then(Value::as_i64)
            .filter(|_| counted)
        {
            metadata.insert("generation".into(), json!(generation + 1));
        }
        if is_definition {
            metadata.remove("deletionGracePeriodSeconds");
        }
        if is_namespace {
            meta::member_object(&mut object, "status").insert("phase".into(), json!("Terminating"));
            let metadata = meta::metadata_mut(&mut object);
            metadata.remove("deletionGracePeriodSeconds");
        }
    } else if old_grace.is_some_and(|old| grace < old) {
        let metadata = meta::metadata_mut(&mut object);
        metadata.insert("deletionGracePeriodSeconds".into(), json!(grace));
        let at = time::parse(now).and_then(|t| t.checked_add(jiff::SignedDuration::from_secs(grace)).ok());
        metadata.insert(
            "deletionTimestamp".into(),
            json!(at.map_or_else(|| now.to_owned(), time::seconds)),
        );
    }
    if object == *current {
        Outcome::Keep
    } else {
        Outcome::Mark(object)
    }
}

/// Only pods that a node runs are given time to stop.
fn grace_seconds(call: &Call, current: &Value, options: &DeleteOptions) -> i64 {
    if !call.target.kind.is("", "pods") {
        return 0;
    }
    let phase = meta::str_at(current, "status.phase");
    if meta::str_at(current, "spec.nodeName").is_empty() || matches!(phase, "Succeeded" | "Failed") {
        return 0;
    }
    let old = meta::metadata(current)
        .get("deletionGracePeriodSeconds")
        .and_then(Value::as_i64);
    let asked = options
        .grace_seconds
        .or(old)
        .or_else(|| meta::int_at(current, "spec.terminationGracePeriodSeconds"))
        .unwrap_or(30)
        .max(0);
    old.map_or(asked, |old| asked.min(old))
}

pub(crate) async fn collection(hub: &Hub, call: &Call, request_body: Body) -> ApiResult<Response<Body>> {
    if call.target.kind.is("", "namespaces")
        || (call.target.kind.namespaced && call.target.namespace.is_empty())
    {
        return Err(super::method_not_allowed(call, &http::Method::DELETE));
    }
    let accepted = accept::negotiate(call.header("accept"))?;
    super::read::check_list_options(call)?;
    let bytes = body::read(request_body).await?;
    let options = DeleteOptions::parse(call, &bytes)?;
    let selection = Selection::of(call)?;
    let limit = call.query.text("limit").parse::<usize>().ok().filter(|l| *l > 0);
    let target = &call.target;
    let (keys, rv) = {
        let store = hub.store.lock();
        let page = store.list(&target.kind.resource, &selection.prefix, None, limit, |o| {
            selection.holds(o)
        });
        let keys: Vec<String> = page
            .items
            .iter()
            .map(|o| crate::store::key(meta::namespace(&o.value), meta::name(&o.value)))
            .collect();
        (keys, page.rv)
    };
    let mut items = Vec::with_capacity(keys.len());
    for key in keys {
        match delete_object(hub, call, &key, &options).await {
            Ok((last, _)) => items.push(versions::from_hub(&target.kind, target.version(), &last)),
            Err(error) if error.reason == "NotFound" => {}
            Err(error) => return Err(error),
        }
    }
    if accepted.form == accept::Form::Metadata {
        let items: Vec<Value> = items.iter().map(respond::partial).collect();
        let list = json!({"kind": "PartialObjectMetadataList", "apiVersion": "meta.k8s.io/v1", "metadata": {"resourceVersion": rv.to_string()}, "items": items});
        return Ok(respond::value(200, &list, accepted, &super::read::warnings(call)));
    }
    if !target.kind.is_custom() {
        for item in &mut items {
            if let Some(map) = item.as_object_mut() {
                map.remove("kind");
                map.remove("apiVersion");
            }
        }
    }
    let list = json!({"kind": target.kind.list_kind, "apiVersion": target.api_version(), "metadata": {"resourceVersion": rv.to_string()}, "items": items});
    Ok(respond::value(200, &list, accepted, &super::read::warnings(call)))
}
