//! What is settled before a write: the kind of patch, the name of a new object, preconditions, the namespace.

use bytes::Bytes;
use serde_json::{Value, json};

use super::body::{self, Document, Fit};
use super::request::{Call, FieldValidation};
use super::write::{Change, check_namespace};
use crate::error::{ApiError, ApiResult, Cause, FieldError};
use crate::hub::Hub;
use crate::kinds::Kind;
use crate::meta;

/// Settle the name of a new object; returns its key.
pub(crate) fn name_new(hub: &Hub, call: &Call, value: &mut Value) -> ApiResult<String> {
    let target = &call.target;
    let kind = &target.kind;
    if !value.is_object() {
        *value = json!({});
    }
    check_namespace(call, value)?;
    if value
        .get("metadata")
        .is_some_and(|m| !m.is_object() && !m.is_null())
        || value
            .get("metadata")
            .and_then(|m| m.get("name"))
            .is_some_and(|n| !n.is_string() && !n.is_null())
    {
        // Let the decoder say what is wrong with it.
        let document = Document::of(value.clone());
        body::fit(call, document, Fit::Body)?;
    }
    let metadata = meta::metadata_mut(value);
    let text = |m: &serde_json::Map<String, Value>, k: &str| {
        m.get(k).and_then(Value::as_str).unwrap_or_default().to_owned()
    };
    let mut name = text(metadata, "name");
    if name.is_empty() {
        let prefix = text(metadata, "generateName");
        if !prefix.is_empty() {
            let cut = prefix.char_indices().nth(58).map_or(prefix.len(), |(i, _)| i);
            name = format!("{}{}", &prefix[..cut], hub.clock.suffix(5));
            metadata.insert("name".into(), json!(name));
        }
    }
    if !text(metadata, "resourceVersion").is_empty() {
        return Err(ApiError::plain_internal(
            "resourceVersion should not be set on objects to be created",
        ));
    }
    if kind.namespaced {
        metadata.insert("namespace".into(), json!(target.namespace));
    } else {
        metadata.remove("namespace");
    }
    if name.is_empty() {
        return Err(ApiError::invalid(
            &kind.group,
            &kind.kind,
            "",
            &[FieldError::required(
                "metadata.name",
                "name or generateName is required",
            )],
        ));
    }
    Ok(crate::store::key(&target.namespace, &name))
}

/// The name is in use.
pub(crate) fn taken(hub: &Hub, kind: &Kind, key: &str) -> ApiError {
    let mut error =
        ApiError::already_exists(&kind.group, &kind.plural, key.rsplit('/').next().unwrap_or(key));
    if hub.get(kind, key).is_some_and(|o| meta::is_terminating(&o.value)) {
        error.message = format!("object is being deleted: {}", error.message);
    }
    error
}

pub(crate) fn check_preconditions(
    call: &Call,
    change: &Change,
    object: &Value,
    live: Option<&Value>,
    name: &str,
) -> ApiResult<()> {
    let kind = &call.target.kind;
    let given = meta::text(object, "resourceVersion");
    let given_uid = meta::uid(object);
    let Some(live) = live else {
        if matches!(change, Change::Apply { .. }) && !given_uid.is_empty() {
            return Err(ApiError::conflict(
                &kind.group,
                &kind.plural,
                name,
                &format!(
                    "uid mismatch: the provided object specified uid {given_uid}, and no existing object was found"
                ),
            ));
        }
        return Ok(());
    };
    if meta::name(object) != meta::name(live) {
        return Err(ApiError::bad_request(format!(
            "the name of the object ({}) does not match the name on the URL ({name})",
            meta::name(object)
        )));
    }
    if !given_uid.is_empty() && given_uid != meta::uid(live) {
        return Err(ApiError::conflict(
            &kind.group,
            &kind.plural,
            name,
            &format!(
                "StorageError: invalid object, Code: 4, Key: /registry/{}/{}, ResourceVersion: 0, AdditionalErrorMsg: Precondition failed: UID in precondition: {given_uid}, UID in object meta: {}",
                kind.plural,
                call.target.key(),
                meta::uid(live)
            ),
        ));
    }
    if given.is_empty() || given == "0" {
        let unconditional = kind.row().is_some_and(crate::kinds::Row::unconditional_update);
        if matches!(change, Change::Replace(_)) && !unconditional {
            return Err(ApiError::invalid(
                &kind.group,
                &kind.plural,
                name,
                &[FieldError::invalid(
                    "metadata.resourceVersion",
                    &json!("0").as_str().map_or(Value::Null, |_| json!(0)),
                    "must be specified for an update",
                )],
            ));
        }
        if given == "0" && matches!(change, Change::Apply { .. }) {
            return Err(ApiError::modified(&kind.group, &kind.plural, name));
        }
        return Ok(());
    }
    if given.parse::<u64>().is_err() {
        return Err(ApiError::plain_internal(format!(
            "strconv.ParseUint: parsing {given:?}: invalid syntax"
        )));
    }
    if given != meta::text(live, "resourceVersion") {
        return Err(ApiError::modified(&kind.group, &kind.plural, name));
    }
    Ok(())
}

/// New objects need a namespace that exists and is not on its way out.
pub(crate) fn namespace_is_open(hub: &Hub, call: &Call, name: &str) -> ApiResult<()> {
    let target = &call.target;
    if !target.kind.namespaced {
        return Ok(());
    }
    let Some(namespace) = hub.get_at("/namespaces", &target.namespace) else {
        return Err(ApiError::not_found("", "namespaces", &target.namespace));
    };
    if meta::is_terminating(&namespace.value) {
        let why = format!(
            "unable to create new content in namespace {} because it is being terminated",
            target.namespace
        );
        return Err(
            ApiError::forbidden(&target.kind.group, &target.kind.plural, name, &why).with_causes(vec![
                Cause {
                    reason: "NamespaceTerminating".into(),
                    message: format!("namespace {} is being terminated", target.namespace),
                    field: "metadata.namespace".into(),
                },
            ]),
        );
    }
    Ok(())
}

pub(crate) fn read_patch(call: &Call, media: &str, bytes: Bytes) -> ApiResult<Change> {
    let force = !call.query.text("force").is_empty();
    let option_errors = |field: &str, text: &str| {
        ApiError::invalid(
            "meta.k8s.io",
            "PatchOptions",
            "",
            &[FieldError::forbidden(field, text)],
        )
    };
    if force && media != "application/apply-patch+yaml" {
        return Err(option_errors("force", "may not be specified for non-apply patch"));
    }
    let decode = |bytes: &Bytes| body::json_document(bytes).map_err(|_| bad_patch_json(bytes));
    match media {
        "application/json-patch+json" => {
            let mut document = decode(&bytes)?;
            for remark in &mut document.remarks {
                remark.insert_str(0, "json patch ");
            }
            Ok(Change::Json(document))
        }
        "application/merge-patch+json" => {
            let document = decode(&bytes)?;
            if document.value.is_null() {
                return Err(ApiError::bad_request("Invalid JSON Patch"));
            }
            Ok(Change::Merge(document))
        }
        "application/strategic-merge-patch+json" if !call.target.kind.is_custom() => {
            // Kubernetes says nothing here of what it was decoding.
            let mut document = decode(&bytes).map_err(|mut e| {
                if let Some(rest) = e.message.strip_prefix("error decoding patch: ") {
                    e.message = rest.to_owned();
                }
                e
            })?;
            if document.value.is_null() {
                document.value = json!({});
            }
            Ok(Change::Strategic(document))
        }
        "application/apply-patch+yaml" => {
            if call.query.text("fieldManager").is_empty() {
                return Err(ApiError::invalid(
                    "meta.k8s.io",
                    "PatchOptions",
                    "",
                    &[FieldError::required(
                        "fieldManager",
                        "is required for apply patch",
                    )],
                ));
            }
            let config = body::yaml_document(&bytes)
                .map_err(|e| ApiError::bad_request(format!("error decoding YAML: {}", e.message)))?;
            if call.field_validation() == FieldValidation::Strict
                && let Some(repeated) = config.remarks.iter().find(|remark| remark.starts_with("line "))
            {
                return Err(ApiError::bad_request(format!(
                    "error strict decoding YAML: error converting YAML to JSON: yaml: unmarshal errors:\n  {repeated}"
                )));
            }
            if !config.value.is_object() {
                return Err(ApiError::bad_request(format!(
                    "error decoding YAML: error unmarshaling JSON: while decoding JSON: json: cannot unmarshal {} into Go value of type map[string]interface {{}}",
                    crate::meta::type_word(&config.value)
                )));
            }
            Ok(Change::Apply {
                config,
                force: call.query.flag("force"),
            })
        }
        _ => {
            let mut error = ApiError::unsupported_media_type("415: Unsupported Media Type");
            error.details = Some(crate::error::Details::default());
            Err(error)
        }
    }
}

pub(crate) fn bad_patch_json(bytes: &Bytes) -> ApiError {
    match crate::schema::json::decode(bytes) {
        Err(error) if error.is_eof() => {
            ApiError::bad_request("error decoding patch: unexpected end of JSON input")
        }
        Err(error) => {
            let text = crate::schema::syntax::complaint(bytes).unwrap_or_else(|| error.to_string());
            ApiError::bad_request(format!("error decoding patch: {text}"))
        }
        Ok(_) => ApiError::bad_request("error decoding patch"),
    }
}
