//! Creating, replacing and patching objects: one pipeline for all of them.
//!
//! body → fit to the type → system fields → defaults → admission → field ownership → validation → commit.
//! A patch that loses a race is computed again from the newer object; a replacement is a conflict.

mod compute;

use axum::body::Body;
use http::Response;
use serde_json::Value;

use compute::{Step, compute};

use super::before::{name_new, read_patch, taken};
use super::body::{self, Document};
use super::request::Call;
use super::{accept, respond};
use crate::admission::{AdmissionRequest, Denied, Operation};
use crate::error::{ApiError, ApiResult};
use crate::hub::{CommitError, Hub, MODIFY_ATTEMPTS};
use crate::kinds::Kind;
use crate::store::{Expect, Lost, Stored};
use crate::{meta, table, versions};

/// A write in progress: how the new object is made from the present one.
pub(crate) enum Change {
    Create(Document),
    Replace(Document),
    Json(Document),
    Merge(Document),
    Strategic(Document),
    Apply { config: Document, force: bool },
}

pub(crate) async fn create(hub: &Hub, call: &Call, request_body: Body) -> ApiResult<Response<Body>> {
    call.check_write_options("CreateOptions")?;
    let target = &call.target;
    if target.kind.namespaced && target.namespace.is_empty() {
        return Err(super::method_not_allowed(call, &http::Method::POST));
    }
    let accepted = accept::negotiate(call.header("accept"))?;
    let bytes = body::read(request_body).await?;
    let document = body::decode(call, &bytes)?;
    body::check_type(call, &document.value)?;
    let outcome = run(hub, call, Change::Create(document)).await?;
    Ok(answer(hub, call, accepted, &outcome))
}

pub(crate) async fn replace(hub: &Hub, call: &Call, request_body: Body) -> ApiResult<Response<Body>> {
    call.check_write_options("UpdateOptions")?;
    let accepted = accept::negotiate(call.header("accept"))?;
    let bytes = body::read(request_body).await?;
    let document = body::decode(call, &bytes)?;
    body::check_type(call, &document.value)?;
    let name = meta::name(&document.value);
    if name != call.target.name {
        return Err(if name.is_empty() {
            ApiError::bad_request("the name of the object (based on the object metadata) was undeterminable: name must be provided".to_string())
        } else {
            ApiError::bad_request(format!(
                "the name of the object ({name}) does not match the name on the URL ({})",
                call.target.name
            ))
        });
    }
    check_namespace(call, &document.value)?;
    let outcome = run(hub, call, Change::Replace(document)).await?;
    Ok(answer(hub, call, accepted, &outcome))
}

pub(crate) async fn patch(hub: &Hub, call: &Call, request_body: Body) -> ApiResult<Response<Body>> {
    let content_type = call.header("content-type").to_owned();
    let media = content_type.split(';').next().unwrap_or_default().trim();
    let accepted = accept::negotiate(call.header("accept"))?;
    call.check_write_options("PatchOptions")?;
    let change = read_patch(call, media, body::read(request_body).await?)?;
    let outcome = run(hub, call, change).await?;
    Ok(answer(hub, call, accepted, &outcome))
}

/// The object as it now is, in the version of the call.
pub(crate) struct Outcome {
    pub(crate) object: Value,
    pub(crate) created: bool,
    pub(crate) warnings: Vec<String>,
}

fn answer(hub: &Hub, call: &Call, accepted: accept::Accepted, outcome: &Outcome) -> Response<Body> {
    let code = if outcome.created { 201 } else { 200 };
    let target = &call.target;
    let now = hub.clock.now();
    respond::object(code, &outcome.object, accepted, &outcome.warnings, |o| {
        table::of_one(
            &target.kind,
            target.version(),
            o,
            call.query.text("includeObject"),
            now,
        )
    })
}

pub(crate) fn check_namespace(call: &Call, value: &Value) -> ApiResult<()> {
    let target = &call.target;
    let given = meta::namespace(value);
    if target.kind.namespaced {
        if !given.is_empty() && given != target.namespace {
            return Err(ApiError::bad_request(
                "the namespace of the provided object does not match the namespace sent on the request",
            ));
        }
    } else if !given.is_empty() {
        return Err(ApiError::bad_request("namespace can not be set for cluster-scoped resources").tap());
    }
    Ok(())
}

impl ApiError {
    fn tap(self) -> Self {
        ApiError {
            message: "the namespace of the provided object does not match the namespace sent on the request"
                .into(),
            ..self
        }
    }
}

/// Carry a change through, again when another writer was faster.
pub(crate) async fn run(hub: &Hub, call: &Call, change: Change) -> ApiResult<Outcome> {
    let target = &call.target;
    let kind = &target.kind;
    let mut change = change;
    let mut key = target.key();
    if let Change::Create(document) = &mut change {
        key = name_new(hub, call, &mut document.value)?;
    }
    for _ in 0..MODIFY_ATTEMPTS {
        // A new object is checked before it is known whether its name is taken, as Kubernetes does.
        let current = match &change {
            Change::Create(_) => None,
            _ => hub.get(kind, &key),
        };
        let current = current.as_deref();
        let lost = match compute(hub, call, &change, current, &key).await? {
            Step::Unchanged(object, warnings) => {
                return Ok(Outcome {
                    object,
                    created: false,
                    warnings,
                });
            }
            Step::Remove(object, warnings) => {
                if remove(hub, call, &key, current).await? {
                    // The answer is the object as it would have been written, under its last version.
                    return Ok(Outcome {
                        object,
                        created: false,
                        warnings,
                    });
                }
                continue;
            }
            Step::Write(object, warnings) => match put(hub, call, &key, current, object).await? {
                Ok(object) => {
                    return Ok(Outcome {
                        object,
                        created: current.is_none(),
                        warnings,
                    });
                }
                Err(lost) => lost,
            },
        };
        match (&change, lost) {
            (Change::Create(_), Lost::Exists) => return Err(taken(hub, kind, &key)),
            (Change::Replace(document), _) if !meta::text(&document.value, "resourceVersion").is_empty() => {
                break;
            }
            _ => {}
        }
    }
    Err(ApiError::modified(&kind.group, &kind.plural, &target.name))
}

/// Removes an object whose last finalizer is gone; `false` says that another writer was faster.
async fn remove(hub: &Hub, call: &Call, key: &str, current: Option<&Stored>) -> ApiResult<bool> {
    if call.dry_run() {
        return Ok(true);
    }
    let kind = &call.target.kind;
    // Watchers see the object as it was stored last.
    let (last, rv) = current.map_or((Value::Null, 0), |c| (c.value.clone(), c.rv));
    match hub.remove(&kind.resource, key, last, rv).await {
        Ok(event) => {
            after_removal(hub, kind, &event.object.value);
            Ok(true)
        }
        Err(CommitError::Storage(text)) => Err(Hub::storage_error(&text)),
        Err(CommitError::Lost(_)) => Ok(false),
    }
}

/// Stores an object: as it is stored then, or how another writer was faster.
async fn put(
    hub: &Hub,
    call: &Call,
    key: &str,
    current: Option<&Stored>,
    object: Value,
) -> ApiResult<Result<Value, Lost>> {
    let kind = &call.target.kind;
    if call.dry_run() {
        if current.is_none() && hub.get(kind, key).is_some() {
            return Err(taken(hub, kind, key));
        }
        return Ok(Ok(object));
    }
    let expect = current.map_or(Expect::Absent, |c| Expect::At(c.rv));
    let object = versions::to_hub(kind, object);
    match hub.put(&kind.resource, key, object, expect).await {
        Ok(event) => {
            if kind.is("", "services") {
                let old = event.previous.as_ref().map(|p| &p.value);
                hub.addresses.lock().replace(old, &event.object.value);
            }
            let version = call.target.version();
            Ok(Ok(versions::from_hub(kind, version, &event.object.value)))
        }
        Err(CommitError::Storage(text)) => Err(Hub::storage_error(&text)),
        Err(CommitError::Lost(lost)) => Ok(Err(lost)),
    }
}

pub(crate) fn admission_request(
    call: &Call,
    operation: Operation,
    object: Value,
    old_object: Value,
    dry_run: bool,
) -> AdmissionRequest {
    let target = &call.target;
    AdmissionRequest {
        operation,
        group: target.kind.group.to_string(),
        version: target.version.to_string(),
        kind: target.kind.kind.to_string(),
        resource: target.kind.plural.to_string(),
        subresource: target.subresource.clone(),
        namespace: target.namespace.clone(),
        name: target.name.clone(),
        user: call.user.name.clone(),
        object,
        old_object,
        dry_run,
    }
}

pub(crate) fn denied(call: &Call, name: &str, denied: &Denied) -> ApiError {
    let kind = &call.target.kind;
    if denied.code == 403 {
        return ApiError::forbidden(&kind.group, &kind.plural, name, &denied.message);
    }
    ApiError::new(
        denied.code,
        if denied.code == 422 { "Invalid" } else { "" },
        denied.message.clone(),
    )
    .with_details(&kind.group, &kind.plural, name)
}

/// What an object held is free again.
pub(crate) fn after_removal(hub: &Hub, kind: &Kind, object: &Value) {
    if kind.is("", "services") {
        hub.addresses.lock().release(object);
    }
}
