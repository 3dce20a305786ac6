//! The body of a server-side apply: checked, merged, its conflicts told.

use serde_json::{Value, json};

use super::body::{self, Document, Fit};
use super::request::Call;
use super::write::check_namespace;
use crate::apply::managers::{self, ApplyError, Write};
use crate::error::{ApiError, ApiResult, Cause};
use crate::meta;

pub(crate) fn applied(
    call: &Call,
    config: &Document,
    force: bool,
    live: Option<&Value>,
    write: &Write<'_>,
    warnings: &mut Vec<String>,
) -> ApiResult<Value> {
    let target = &call.target;
    let kind = &target.kind;
    if live.is_none() && !target.subresource.is_empty() {
        return Err(target.not_found());
    }
    let as_sent = &config.value;
    let mut value = config.value.clone();
    let text = |v: &Value, key: &str| v.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
    let (api_version, given_kind) = (text(&value, "apiVersion"), text(&value, "kind"));
    if api_version != write.api_version || given_kind != *kind.kind {
        return Err(ApiError::bad_request(format!(
            "invalid object type: {}, Kind={given_kind}",
            gv(&api_version)
        )));
    }
    if meta::metadata(&value).contains_key("managedFields") {
        return Err(ApiError::bad_request("metadata.managedFields must be nil"));
    }
    let name = meta::name(&value).to_owned();
    if name.is_empty() {
        return Err(ApiError::bad_request(format!(
            "the name of the object ({} based on URL) was undeterminable: name must be provided",
            target.name
        )));
    }
    if name != target.name {
        return Err(ApiError::bad_request(format!(
            "the name of the object ({name}) does not match the name on the URL ({})",
            target.name
        )));
    }
    check_namespace(call, &value)?;
    let metadata = meta::metadata_mut(&mut value);
    metadata.remove("creationTimestamp");
    metadata.insert("name".into(), json!(target.name));
    if kind.namespaced {
        metadata.insert("namespace".into(), json!(target.namespace));
    }
    // Types are checked before ownership; what the type lacks is an error of its own kind.
    if !kind.is_custom() {
        let (_, report) = crate::schema::conform::conform(write.schema, value.clone());
        if let Some(unknown) = report.unknown.first() {
            return Err(typed_error(
                call,
                as_sent,
                &format!(".{unknown}: field not declared in schema"),
            ));
        }
        if let Some(error) = report.typed.or(report.error) {
            return Err(typed_error(call, as_sent, &error));
        }
    } else {
        let document = Document {
            value,
            remarks: config.remarks.clone(),
            source: config.source.clone(),
        };
        let mut unknown = Vec::new();
        let mut pruned = document.value;
        crate::crd::prune::prune(write.schema, &mut pruned, &mut unknown);
        if let Some(unknown) = unknown.first() {
            return Err(typed_error(
                call,
                as_sent,
                &format!(".{unknown}: field not declared in schema"),
            ));
        }
        value = pruned;
    }
    let object = managers::apply(write, live, &value, as_sent, force).map_err(|error| match error {
        ApplyError::Conflicts(conflicts) => conflict_error(&conflicts),
        ApplyError::Typed(text) => typed_error(call, as_sent, &text),
        ApplyError::BadLive(text) => {
            ApiError::plain_internal(format!("failed to create typed live object: {text}"))
        }
    })?;
    let fields = meta::metadata(&object).get("managedFields").cloned();
    let document = Document {
        value: object,
        remarks: config.remarks.clone(),
        source: config.source.clone(),
    };
    let (mut fitted, more) = body::fit(call, document, Fit::Patched(&String::new))?;
    warnings.extend(more);
    if let Some(fields) = fields {
        meta::metadata_mut(&mut fitted).insert("managedFields".into(), fields);
    }
    Ok(fitted)
}

fn typed_error(call: &Call, sent: &Value, text: &str) -> ApiError {
    let target = &call.target;
    ApiError::plain_internal(format!(
        "failed to create typed patch object ({}/{}; {}, Kind={}): {text}",
        meta::namespace(sent),
        meta::name(sent),
        gv(&target.api_version()),
        target.kind.kind
    ))
}

/// Go prints a group and version with the slash even where there is no group.
fn gv(api_version: &str) -> String {
    match api_version {
        "" => "/".to_owned(),
        text if text.contains('/') => text.to_owned(),
        core => format!("/{core}"),
    }
}

fn conflict_error(conflicts: &[(String, String)]) -> ApiError {
    let mut by_manager: Vec<(&str, Vec<&str>)> = Vec::new();
    for (manager, path) in conflicts {
        match by_manager.iter_mut().find(|(m, _)| m == manager) {
            Some((_, paths)) => paths.push(path),
            None => by_manager.push((manager, vec![path])),
        }
    }
    by_manager.sort();
    let mut lines = Vec::new();
    for (manager, paths) in &by_manager {
        match paths.as_slice() {
            [one] if by_manager.len() == 1 => lines.push(format!("conflict with {manager}: {one}")),
            many => lines.push(format!("conflicts with {manager}:\n- {}", many.join("\n- "))),
        }
    }
    let plural = if conflicts.len() == 1 {
        "conflict"
    } else {
        "conflicts"
    };
    let message = format!(
        "Apply failed with {} {plural}: {}",
        conflicts.len(),
        lines.join("\n")
    );
    let mut causes: Vec<Cause> = conflicts
        .iter()
        .map(|(manager, path)| Cause {
            reason: "FieldManagerConflict".into(),
            message: format!("conflict with {manager}"),
            field: path.clone(),
        })
        .collect();
    causes.sort_by(|a, b| (&a.field, &a.message).cmp(&(&b.field, &b.message)));
    ApiError::new(409, "Conflict", message).with_causes(causes)
}
