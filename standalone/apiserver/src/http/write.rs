//! Creating, replacing and patching objects: one pipeline for all of them.
//!
//! body → fit to the type → system fields → defaults → admission → field ownership → validation → commit.
//! A patch that loses a race is computed again from the newer object; a replacement is a conflict.

use axum::body::Body;
use http::Response;
use serde_json::{Value, json};

use super::apply::applied;
use super::before::{check_preconditions, name_new, namespace_is_open, read_patch, taken};
use super::body::{self, Document, Fit};
use super::request::Call;
use super::{accept, respond};
use crate::admission::{AdmissionRequest, Denied, Operation};
use crate::apply::managers::{self, Write};
use crate::error::{ApiError, ApiResult};
use crate::hub::{CommitError, Hub, MODIFY_ATTEMPTS};
use crate::kinds::Kind;
use crate::patch;
use crate::store::{Expect, Lost, Stored};
use crate::{defaults, meta, strategy, table, time, validate, versions};

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
        let step = compute(hub, call, &change, current.as_deref(), &key).await?;
        let (object, warnings) = match step {
            Step::Unchanged(object, warnings) => {
                return Ok(Outcome {
                    object,
                    created: false,
                    warnings,
                });
            }
            Step::Write(object, warnings) => (object, warnings),
            Step::Remove(object, warnings) => {
                let rv = current.as_ref().map_or(0, |c| c.rv);
                if call.dry_run() {
                    return Ok(Outcome {
                        object,
                        created: false,
                        warnings,
                    });
                }
                match hub
                    .remove(
                        &kind.resource,
                        &key,
                        {
                            // Watchers see the object as it was stored last.
                            current.as_ref().map_or(Value::Null, |c| c.value.clone())
                        },
                        rv,
                    )
                    .await
                {
                    Ok(event) => {
                        after_removal(hub, kind, &event.object.value);
                        // The answer is the object as it would have been written, under its last version.
                        return Ok(Outcome {
                            object,
                            created: false,
                            warnings,
                        });
                    }
                    Err(CommitError::Storage(text)) => return Err(Hub::storage_error(&text)),
                    Err(CommitError::Lost(_)) => continue,
                }
            }
        };
        let created = current.is_none();
        if call.dry_run() && created && hub.get(kind, &key).is_some() {
            return Err(taken(hub, kind, &key));
        }
        if call.dry_run() {
            return Ok(Outcome {
                object,
                created,
                warnings,
            });
        }
        let expect = current.as_ref().map_or(Expect::Absent, |c| Expect::At(c.rv));
        match hub
            .put(&kind.resource, &key, versions::to_hub(kind, object), expect)
            .await
        {
            Ok(event) => {
                if kind.is("", "services") {
                    let old = event.previous.as_ref().map(|p| &p.value);
                    hub.addresses.lock().replace(old, &event.object.value);
                }
                return Ok(Outcome {
                    object: versions::from_hub(kind, target.version(), &event.object.value),
                    created,
                    warnings,
                });
            }
            Err(CommitError::Storage(text)) => return Err(Hub::storage_error(&text)),
            Err(CommitError::Lost(lost)) => match (&change, lost) {
                (Change::Create(_), Lost::Exists) => return Err(taken(hub, kind, &key)),
                (Change::Replace(document), _)
                    if !meta::text(&document.value, "resourceVersion").is_empty() =>
                {
                    return Err(ApiError::modified(&kind.group, &kind.plural, &target.name));
                }
                _ => {}
            },
        }
    }
    Err(ApiError::modified(&kind.group, &kind.plural, &target.name))
}

enum Step {
    Write(Value, Vec<String>),
    Unchanged(Value, Vec<String>),
    /// The last finalizer is gone.
    Remove(Value, Vec<String>),
}

async fn compute(
    hub: &Hub,
    call: &Call,
    change: &Change,
    current: Option<&Stored>,
    key: &str,
) -> ApiResult<Step> {
    let target = &call.target;
    let kind = &target.kind;
    let version = target.version();
    let name = key.rsplit('/').next().unwrap_or(key);
    let live = current.map(|c| versions::from_hub(kind, version, &c.value));
    let now = time::seconds(hub.clock.now());
    let manager = call.manager();
    let api_version = target.api_version();
    let reset = strategy::reset_fields(kind, &target.subresource);
    let write = Write {
        schema: &version.schema,
        zero: &version.zero,
        api_version: &api_version,
        subresource: &target.subresource,
        manager: &manager,
        now: &now,
        reset,
    };
    let mut warnings = super::read::warnings(call);
    let (mut object, applied) = edited(call, change, live.as_ref(), &write, &mut warnings)?;
    if live.is_none() {
        let metadata = meta::metadata_mut(&mut object);
        for field in ["deletionTimestamp", "deletionGracePeriodSeconds", "selfLink"] {
            metadata.remove(field);
        }
    }
    set_identity(call, &mut object, name);
    check_preconditions(call, change, &object, live.as_ref(), name)?;
    let operation = if live.is_some() {
        Operation::Update
    } else {
        Operation::Create
    };
    defaults::apply(kind, &mut object, live.as_ref());
    // Owned is what the client sent and the type's own defaults; what follows is the server's.
    if !applied {
        managers::update(&write, live.as_ref(), &mut object);
    }
    match &live {
        None => {
            namespace_is_open(hub, call, name)?;
            strategy::prepare_create(kind, &mut object, &now, || hub.clock.uid());
        }
        Some(live) => strategy::prepare_update(kind, version, &target.subresource, &mut object, live),
    }
    defaults::admit(kind, &mut object, live.as_ref());
    if live.is_none() {
        defaults::plugins(hub, kind, name, &mut object)?;
        if kind.is("", "pods") {
            strategy::stamp_conditions(&mut object, &now);
        }
    }
    if let Some(admission) = hub
        .admission
        .as_ref()
        .filter(|a| a.wants(&kind.group, &kind.plural))
    {
        let mut request = admission_request(
            call,
            operation,
            object.clone(),
            live.clone().unwrap_or(Value::Null),
            call.dry_run(),
        );
        request.name = name.to_owned();
        if let Some(mutated) = admission
            .admit(&request)
            .await
            .map_err(|d| denied(call, name, &d))?
        {
            let fields = meta::metadata(&object).get("managedFields").cloned();
            let document = Document::of(mutated);
            let (mut fitted, _) = body::fit(call, document, Fit::Body)?;
            if let Some(fields) = fields {
                meta::metadata_mut(&mut fitted).insert("managedFields".into(), fields);
            }
            object = fitted;
            set_identity(call, &mut object, name);
            defaults::apply(kind, &mut object, live.as_ref());
        }
    }
    defaults::resolve(hub, kind, &mut object, live.as_ref())
        .map_err(|errors| ApiError::invalid(&kind.group, &kind.kind, name, &errors))?;
    if !kind.is_custom() {
        // No definition is without versions: what is refused is named as it was sent.
        let no_versions = meta::at(&object, "spec.versions").is_some_and(|v| *v == json!([]));
        crate::schema::conform::empty_required_to_null(&version.schema, &mut object);
        if no_versions && kind.is("apiextensions.k8s.io", "customresourcedefinitions") {
            meta::member_object(&mut object, "spec").insert("versions".into(), json!([]));
        }
    }
    if let Some(live) = &live {
        strategy::bump_generation(kind, version, &mut object, live);
        let rv = meta::metadata(live)
            .get("resourceVersion")
            .cloned()
            .unwrap_or_default();
        meta::metadata_mut(&mut object).insert("resourceVersion".into(), rv);
    }
    let errors = validate::object(kind, version, &object, live.as_ref(), &target.subresource);
    if !errors.is_empty() {
        // Both kinds of Event are one kind to those who check them.
        let group = if kind.is("events.k8s.io", "events") {
            ""
        } else {
            &*kind.group
        };
        return Err(ApiError::invalid(group, &kind.kind, name, &errors).with_warnings(warnings));
    }
    warnings.extend(validate::warnings::of(kind, &object, live.as_ref()));
    if let Some(live) = live {
        if managers::same_but_times(&object, &live) {
            return Ok(Step::Unchanged(live, warnings));
        }
        if strategy::is_finished(kind, &object) {
            return Ok(Step::Remove(object, warnings));
        }
    }
    Ok(Step::Write(object, warnings))
}

/// The edited object, and whether its managedFields are settled already (server-side apply).
fn edited(
    call: &Call,
    change: &Change,
    live: Option<&Value>,
    write: &Write<'_>,
    warnings: &mut Vec<String>,
) -> ApiResult<(Value, bool)> {
    let target = &call.target;
    let kind = &target.kind;
    let existing = || live.ok_or_else(|| target.not_found());
    let take = |document: &Document| Document {
        value: document.value.clone(),
        remarks: document.remarks.clone(),
        source: document.source.clone(),
    };
    let schema = write.schema;
    let quotation = || super::quoted::of(change, live, schema, kind.is_custom());
    let patched = Fit::Patched(&quotation);
    let (document, how) = match change {
        Change::Create(document) => (take(document), Fit::Body),
        Change::Replace(document) => {
            if live.is_none()
                && !(target.subresource.is_empty()
                    && kind.row().is_some_and(crate::kinds::Row::creates_on_update))
            {
                return Err(target.not_found());
            }
            (take(document), Fit::Body)
        }
        Change::Json(document) => {
            let mut value = existing()?.clone();
            patch::json::apply(&mut value, &document.value).map_err(|failure| json_failure(&failure))?;
            if !value.is_object() {
                let what = "the document is no object any more".to_owned();
                return Err(json_failure(&patch::json::Failure::Operation(what)));
            }
            let document = Document {
                remarks: document.remarks.clone(),
                ..Document::of(value)
            };
            (document, patched)
        }
        Change::Merge(document) => {
            let mut value = existing()?.clone();
            if !document.value.is_object() {
                return Err(ApiError::bad_request(format!(
                    "error decoding patch: json: cannot unmarshal {} into Go value of type map[string]interface {{}}",
                    meta::type_word(&document.value)
                )));
            }
            patch::merge::apply(&mut value, &document.value);
            let remarks = document.remarks.clone();
            (
                Document {
                    value,
                    remarks,
                    source: document.source.clone(),
                },
                patched,
            )
        }
        Change::Strategic(document) => {
            let mut value = existing()?.clone();
            patch::strategic::apply(&mut value, &document.value, write.schema)
                .map_err(ApiError::plain_internal)?;
            let remarks = document.remarks.clone();
            (
                Document {
                    value,
                    remarks,
                    source: document.source.clone(),
                },
                patched,
            )
        }
        Change::Apply { config, force } => {
            return applied(call, config, *force, live, write, warnings).map(|object| (object, true));
        }
    };
    // An empty list clears ownership; the decoder would not tell it from an absent one.
    let cleared = meta::metadata(&document.value)
        .get("managedFields")
        .and_then(Value::as_array)
        .is_some_and(Vec::is_empty);
    let (mut value, more) = body::fit(call, document, how)?;
    if cleared && live.is_some() {
        meta::metadata_mut(&mut value).insert("managedFields".into(), json!([{}]));
    }
    warnings.extend(more);
    Ok((value, false))
}

fn json_failure(failure: &patch::json::Failure) -> ApiError {
    match failure {
        patch::json::Failure::Malformed(text) => {
            ApiError::bad_request(format!("error decoding patch: {text}"))
        }
        patch::json::Failure::TooMany(n) => ApiError::new(
            413,
            "RequestEntityTooLarge",
            format!(
                "The allowed maximum operations in a JSON patch is {}, got {n}",
                patch::json::MAX_OPERATIONS
            ),
        ),
        patch::json::Failure::Operation(text) => {
            let mut error = ApiError::new(
                422,
                "Invalid",
                "the server rejected our request due to an error in our request",
            );
            error.details = Some(crate::error::Details::default());
            tracing::debug!(reason = text, "JSON patch does not apply");
            error
        }
    }
}

/// Identity comes from the path, whatever the body or a patch says.
fn set_identity(call: &Call, object: &mut Value, name: &str) {
    let target = &call.target;
    let map = meta::as_object_mut(object);
    map.insert("kind".into(), json!(&*target.kind.kind));
    map.insert("apiVersion".into(), json!(target.api_version()));
    let metadata = meta::metadata_mut(object);
    if !metadata.contains_key("name") {
        metadata.insert("name".into(), json!(name));
    }
    if target.kind.namespaced {
        metadata.insert("namespace".into(), json!(target.namespace));
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
