//! Request bodies: read within bounds, decoded by content type, fitted to the kind's type.

use axum::body::Body;
use bytes::Bytes;
use http_body_util::BodyExt as _;
use serde_json::Value;

use super::MAX_BODY;
use super::request::{Call, FieldValidation};
use crate::crd::prune;
use crate::error::{ApiError, ApiResult};
use crate::schema::{conform, json as reader};

/// At most this many warnings are sent.
const MAX_WARNINGS: usize = 1000;

pub(crate) async fn read(body: Body) -> ApiResult<Bytes> {
    match http_body_util::Limited::new(body, MAX_BODY).collect().await {
        Ok(collected) => Ok(collected.to_bytes()),
        Err(error) if error.downcast_ref::<http_body_util::LengthLimitError>().is_some() => {
            Err(ApiError::new(
                413,
                "RequestEntityTooLarge",
                format!("Request entity too large: limit is {MAX_BODY}"),
            ))
        }
        Err(error) => Err(ApiError::bad_request(format!(
            "reading the request body: {error}"
        ))),
    }
}

/// A decoded document with what is to be said about it.
#[derive(Debug, Default)]
pub(crate) struct Document {
    pub(crate) value: Value,
    /// Duplicate and unknown fields, as `duplicate field "a"`.
    pub(crate) remarks: Vec<String>,
}

const ACCEPTED: &str = "application/json, application/yaml, application/vnd.kubernetes.protobuf";

/// Decode a whole object of a POST or PUT.
pub(crate) fn decode(call: &Call, bytes: &Bytes) -> ApiResult<Document> {
    let content_type = call.header("content-type");
    let media = content_type.split(';').next().unwrap_or_default().trim();
    match media {
        "" | "application/json" | "*/*" => json_document(bytes),
        "application/yaml" => yaml_document(bytes),
        "application/vnd.kubernetes.protobuf" => {
            let value = crate::protobuf::decode(bytes, &call.target.kind.kind).map_err(|unsupported| {
                ApiError::unsupported_media_type(format!(
                    "the body of the request was in application/vnd.kubernetes.protobuf, which this server reads only for {}: {unsupported}; send application/json",
                    crate::protobuf::KINDS.join(", ")
                ))
            })?;
            Ok(Document {
                value,
                remarks: Vec::new(),
            })
        }
        other => Err(ApiError::unsupported_media_type(format!(
            "the body of the request was in an unknown format - accepted media types include: {ACCEPTED}"
        )))
        .map_err(|e| {
            tracing::debug!(content_type = other, "refused a request body");
            e
        }),
    }
}

pub(crate) fn json_document(bytes: &[u8]) -> ApiResult<Document> {
    let decoded = reader::decode(bytes)
        .map_err(|e| ApiError::bad_request(format!("couldn't get version/kind; json parse error: {e}")))?;
    Ok(Document {
        value: decoded.value,
        remarks: decoded
            .duplicates
            .iter()
            .map(|d| format!("duplicate field {d:?}"))
            .collect(),
    })
}

pub(crate) fn yaml_document(bytes: &[u8]) -> ApiResult<Document> {
    let text = String::from_utf8_lossy(bytes);
    // A JSON document is YAML too, and by far the more common.
    if text.trim_start().starts_with('{') {
        if let Ok(document) = json_document(bytes) {
            return Ok(document);
        }
    }
    let value: Value = serde_yaml::from_str(&text)
        .map_err(|e| ApiError::bad_request(format!("error converting YAML to JSON: yaml: {e}")))?;
    Ok(Document {
        value,
        remarks: Vec::new(),
    })
}

/// Fit a document to the type of the call: drop and report unknown fields, refuse values of a wrong type, default.
/// Returns the warnings to send.
pub(crate) fn fit(call: &Call, document: Document, how: Fit) -> ApiResult<(Value, Vec<String>)> {
    let kind = &call.target.kind;
    let version = call.target.version();
    let mut remarks = document.remarks;
    let mut value = document.value;
    if kind.is_custom() {
        let mut unknown = Vec::new();
        prune::prune(&version.schema, &mut value, &mut unknown);
        unknown.sort();
        remarks.extend(unknown.iter().map(|u| format!("unknown field {u:?}")));
        prune::default(&version.schema, &mut value);
    } else {
        let (conformed, report) = conform::conform(&version.schema, value);
        if let Some(error) = report.error {
            return Err(ApiError::bad_request(format!(
                "{} in version {:?} cannot be handled as a {}: {error}",
                kind.kind, &*call.target.version, kind.kind
            )));
        }
        value = conformed;
        remarks.extend(report.unknown.iter().map(|u| format!("unknown field {u:?}")));
    }
    let mut warnings = Vec::new();
    if !remarks.is_empty() {
        match call.field_validation() {
            FieldValidation::Ignore => {}
            FieldValidation::Warn => warnings.extend(remarks.into_iter().take(MAX_WARNINGS)),
            FieldValidation::Strict => {
                let list = remarks.join(", ");
                return Err(match how {
                    Fit::Body => ApiError::bad_request(format!(
                        "{} in version {:?} cannot be handled as a {}: strict decoding error: {list}",
                        kind.kind, &*call.target.version, kind.kind
                    )),
                    Fit::Patched => {
                        let error = crate::error::FieldError::invalid(
                            "patch",
                            &Value::String(String::new()),
                            format!("strict decoding error: {list}"),
                        );
                        let mut invalid = ApiError::invalid(&kind.group, &kind.kind, &call.target.name, &[]);
                        let _ = error;
                        invalid.code = 422;
                        invalid.message = format!(
                            " \"\" is invalid: patch: Invalid value: \"\": strict decoding error: {list}"
                        );
                        invalid
                    }
                });
            }
        }
    }
    Ok((value, warnings))
}

/// Where a document came from, which decides how a strict failure is worded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fit {
    Body,
    Patched,
}

/// The body's own apiVersion and kind must be those of the path.
pub(crate) fn check_type(call: &Call, value: &Value) -> ApiResult<()> {
    let text = |key: &str| value.get(key).and_then(Value::as_str).unwrap_or_default();
    let (api_version, kind) = (text("apiVersion"), text("kind"));
    let wanted = call.target.api_version();
    if (!api_version.is_empty() && api_version != wanted)
        || (!kind.is_empty() && kind != &*call.target.kind.kind)
    {
        if api_version == wanted || api_version.is_empty() {
            return Err(ApiError::bad_request(format!(
                "{kind} in version {:?} cannot be handled as a {}: no kind {kind:?} is registered for version {wanted:?} in scheme \"k8s.io/apiserver\"",
                &*call.target.version, call.target.kind.kind
            )));
        }
        return Err(ApiError::bad_request(format!(
            "the API version in the data ({api_version}) does not match the expected API version ({wanted})"
        )));
    }
    Ok(())
}
