//! How the new object is made from the present one, up to the point where it is stored.

use serde_json::{Value, json};

use super::{Change, admission_request, denied};
use crate::admission::Operation;
use crate::apply::managers::{self, Write};
use crate::error::{ApiError, ApiResult};
use crate::http::apply::applied;
use crate::http::before::{check_preconditions, namespace_is_open};
use crate::http::body::{self, Document, Fit};
use crate::http::request::Call;
use crate::hub::Hub;
use crate::kinds::Kind;
use crate::patch;
use crate::store::Stored;
use crate::{defaults, meta, strategy, time, validate, versions};

/// What is to be done, with the warnings of the way to it.
pub(super) enum Step {
    Write(Value, Vec<String>),
    Unchanged(Value, Vec<String>),
    /// The last finalizer is gone.
    Remove(Value, Vec<String>),
}

/// See the module.
pub(super) async fn compute(
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
    let write = Write {
        schema: &version.schema,
        zero: &version.zero,
        api_version: &target.api_version(),
        subresource: &target.subresource,
        manager: &call.manager(),
        now: &now,
        reset: strategy::reset_fields(kind, &target.subresource),
    };
    let mut warnings = crate::http::read::warnings(call);
    let (mut object, applied) = edited(call, change, live.as_ref(), &write, &mut warnings)?;
    if live.is_none() {
        let metadata = meta::metadata_mut(&mut object);
        for field in ["deletionTimestamp", "deletionGracePeriodSeconds", "selfLink"] {
            metadata.remove(field);
        }
    }
    set_identity(call, &mut object, name);
    check_preconditions(call, change, &object, live.as_ref(), name)?;
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
    admit(hub, call, name, &mut object, live.as_ref()).await?;
    defaults::resolve(hub, kind, &mut object, live.as_ref())
        .map_err(|errors| ApiError::invalid(&kind.group, &kind.kind, name, &errors))?;
    fill_required(call, &mut object);
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
        return Err(ApiError::invalid(checked_as(kind), &kind.kind, name, &errors).with_warnings(warnings));
    }
    warnings.extend(validate::warnings::of(kind, &object, live.as_ref()));
    Ok(match live {
        Some(live) if managers::same_but_times(&object, &live) => Step::Unchanged(live, warnings),
        Some(_) if strategy::is_finished(kind, &object) => Step::Remove(object, warnings),
        _ => Step::Write(object, warnings),
    })
}

/// Lets whoever is asked about objects of this kind change or deny it.
async fn admit(
    hub: &Hub,
    call: &Call,
    name: &str,
    object: &mut Value,
    live: Option<&Value>,
) -> ApiResult<()> {
    let kind = &call.target.kind;
    let admission = hub.admission.as_ref();
    let Some(admission) = admission.filter(|a| a.wants(&kind.group, &kind.plural)) else {
        return Ok(());
    };
    let operation = match live {
        Some(_) => Operation::Update,
        None => Operation::Create,
    };
    let old = live.cloned().unwrap_or(Value::Null);
    let mut request = admission_request(call, operation, object.clone(), old, call.dry_run());
    request.name = name.to_owned();
    let answer = admission.admit(&request).await;
    if let Some(mutated) = answer.map_err(|d| denied(call, name, &d))? {
        let fields = meta::metadata(object).get("managedFields").cloned();
        let (mut fitted, _) = body::fit(call, Document::of(mutated), Fit::Body)?;
        if let Some(fields) = fields {
            meta::metadata_mut(&mut fitted).insert("managedFields".into(), fields);
        }
        *object = fitted;
        set_identity(call, object, name);
        defaults::apply(kind, object, live);
    }
    Ok(())
}

/// What a built-in type must have is there, if empty, as Go's types write it.
fn fill_required(call: &Call, object: &mut Value) {
    let kind = &call.target.kind;
    if kind.is_custom() {
        return;
    }
    // No definition is without versions: what is refused is named as it was sent.
    let no_versions = meta::at(object, "spec.versions").is_some_and(|v| *v == json!([]));
    crate::schema::conform::empty_required_to_null(&call.target.version().schema, object);
    if no_versions && kind.is("apiextensions.k8s.io", "customresourcedefinitions") {
        meta::member_object(object, "spec").insert("versions".into(), json!([]));
    }
}

/// The group under which a kind's errors are told: both kinds of Event are one kind to those who check them.
fn checked_as(kind: &Kind) -> &str {
    if kind.is("events.k8s.io", "events") {
        ""
    } else {
        &kind.group
    }
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
    let existing = || live.cloned().ok_or_else(|| target.not_found());
    let quotation = || crate::http::quoted::of(change, live, write.schema, kind.is_custom());
    let patched = Fit::Patched(&quotation);
    let (document, how) = match change {
        Change::Create(document) => (document.clone(), Fit::Body),
        Change::Replace(document) => {
            let creates =
                target.subresource.is_empty() && kind.row().is_some_and(crate::kinds::Row::creates_on_update);
            if live.is_none() && !creates {
                return Err(target.not_found());
            }
            (document.clone(), Fit::Body)
        }
        Change::Json(document) => (json_patched(existing()?, document)?, patched),
        Change::Merge(document) => (merge_patched(existing()?, document)?, patched),
        Change::Strategic(document) => {
            let mut value = existing()?;
            patch::strategic::apply(&mut value, &document.value, write.schema)
                .map_err(ApiError::plain_internal)?;
            (document.with(value), patched)
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

fn json_patched(mut value: Value, document: &Document) -> ApiResult<Document> {
    patch::json::apply(&mut value, &document.value).map_err(|failure| json_failure(&failure))?;
    if !value.is_object() {
        let what = "the document is no object any more".to_owned();
        return Err(json_failure(&patch::json::Failure::Operation(what)));
    }
    Ok(Document {
        remarks: document.remarks.clone(),
        ..Document::of(value)
    })
}

fn merge_patched(mut value: Value, document: &Document) -> ApiResult<Document> {
    if !document.value.is_object() {
        return Err(ApiError::bad_request(format!(
            "error decoding patch: json: cannot unmarshal {} into Go value of type map[string]interface {{}}",
            meta::type_word(&document.value)
        )));
    }
    patch::merge::apply(&mut value, &document.value);
    Ok(document.with(value))
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
