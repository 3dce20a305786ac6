//! Request bodies: read within bounds, decoded by content type, fitted to the kind's type.

use std::fmt::Write as _;

use axum::body::Body;
use bytes::Bytes;
use http_body_util::BodyExt as _;
use serde_json::Value;

use super::MAX_BODY;
use super::request::{Call, FieldValidation};
use crate::crd::prune;
use crate::error::{ApiError, ApiResult};
use crate::schema::{conform, json as reader, syntax};

/// At most this many warnings are sent.
const MAX_WARNINGS: usize = 1000;

impl Document {
    /// Another value, about which the same is to be said.
    pub(crate) fn with(&self, value: Value) -> Self {
        Self {
            value,
            remarks: self.remarks.clone(),
            source: self.source.clone(),
        }
    }

    pub(crate) fn of(value: Value) -> Self {
        Self {
            value,
            ..Self::default()
        }
    }

    /// Put paths into the order in which their last parts stand in the text.
    fn in_order(&self, mut paths: Vec<String>) -> Vec<String> {
        if paths.len() < 2 {
            return paths;
        }
        let text = String::from_utf8_lossy(&self.source);
        paths.sort_by_cached_key(|path| {
            let last = path.rsplit('.').next().unwrap_or(path);
            let name = last.split('[').next().unwrap_or(last);
            text.find(&format!("{name:?}"))
                .or_else(|| text.find(&format!("{name}:")))
                .unwrap_or(usize::MAX)
        });
        paths
    }
}

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
#[derive(Clone, Debug, Default)]
pub(crate) struct Document {
    pub(crate) value: Value,
    /// Duplicate and unknown fields, as `duplicate field "a"`.
    pub(crate) remarks: Vec<String>,
    /// The text it was read from: unknown fields are reported in its order.
    pub(crate) source: Bytes,
}

const ACCEPTED: &str = "application/json, application/yaml, application/vnd.kubernetes.protobuf";

/// Decode a whole object of a POST or PUT.
pub(crate) fn decode(call: &Call, bytes: &Bytes) -> ApiResult<Document> {
    let content_type = call.header("content-type");
    let media = content_type.split(';').next().unwrap_or_default().trim();
    match media {
        "" | "application/json" | "*/*" => whole(call, json_document(bytes)),
        "application/yaml" => whole(call, yaml_document(bytes)),
        "application/vnd.kubernetes.protobuf" => {
            let value = crate::protobuf::decode(bytes, &call.target.kind.kind).map_err(|unsupported| {
                ApiError::unsupported_media_type(format!(
                    "the body of the request was in application/vnd.kubernetes.protobuf, which this server reads only for {}: {unsupported}; send application/json",
                    crate::protobuf::KINDS.join(", ")
                ))
            })?;
            Ok(Document::of(value))
        }
        other => Err(ApiError::unsupported_media_type(format!(
            "the body of the request was in an unknown format - accepted media types include: {ACCEPTED}"
        )))
        .inspect_err(|_e| {
            tracing::debug!(content_type = other, "refused a request body");
        }),
    }
}

/// A whole object: it has to be one, or null, which is an empty one.
fn whole(call: &Call, document: ApiResult<Document>) -> ApiResult<Document> {
    let prefix = format!(
        "the object provided is unrecognized (must be of type {}): ",
        call.target.kind.kind
    );
    let mut document = document.map_err(|mut e| {
        e.message = format!("{prefix}{}", e.message);
        e
    })?;
    let mut into = "Go value of type struct { APIVersion string \"json:\\\"apiVersion,omitempty\\\"\"; Kind string \"json:\\\"kind,omitempty\\\"\" }".to_owned();
    let kind = match &document.value {
        Value::Object(map) => {
            let wrong = ["apiVersion", "kind"].iter().find_map(|k| {
                map.get(*k)
                    .filter(|v| !v.is_string() && !v.is_null())
                    .map(|v| (k, v))
            });
            let Some((field, value)) = wrong else {
                return Ok(document);
            };
            into = format!("Go struct field .{field} of type string");
            crate::meta::type_word(value)
        }
        Value::Null => {
            document.value = Value::Object(serde_json::Map::new());
            return Ok(document);
        }
        Value::Array(_) => "array",
        Value::String(_) => "string",
        Value::Number(_) => "number",
        Value::Bool(_) => "bool",
    };
    Err(ApiError::bad_request(format!(
        "{prefix}couldn't get version/kind; json parse error: json: cannot unmarshal {kind} into {into} ({})",
        shown(&document.source)
    )))
}

pub(crate) fn json_document(bytes: &Bytes) -> ApiResult<Document> {
    let decoded = reader::decode(bytes).map_err(|e| {
        let text = syntax::complaint(bytes).unwrap_or_else(|| e.to_string());
        ApiError::bad_request(format!(
            "couldn't get version/kind; json parse error: {text} ({})",
            shown(bytes)
        ))
    })?;
    Ok(Document {
        value: decoded.value,
        remarks: decoded
            .duplicates
            .iter()
            .map(|d| format!("duplicate field {d:?}"))
            .collect(),
        source: bytes.clone(),
    })
}

/// The beginning of a body as Kubernetes quotes it: text for what looks like JSON, hexadecimal otherwise.
fn shown(bytes: &[u8]) -> String {
    const LENGTH: usize = 30;
    if bytes.is_empty() {
        return "<empty>".to_owned();
    }
    let head = bytes.get(..LENGTH.min(bytes.len())).unwrap_or_default();
    let more = if bytes.len() > LENGTH { " ..." } else { "" };
    if bytes.starts_with(b"{") {
        format!("{}{more}", String::from_utf8_lossy(head))
    } else {
        let mut out = String::new();
        for b in head {
            let _ = write!(out, "{b:02x}");
        }
        out + more
    }
}

pub(crate) fn yaml_document(bytes: &Bytes) -> ApiResult<Document> {
    let text = String::from_utf8_lossy(bytes);
    // A JSON document is YAML too, and by far the more common.
    if text.trim_start().starts_with('{')
        && let Ok(document) = json_document(bytes)
    {
        return Ok(document);
    }
    let decoded = reader::decode_yaml(&text)
        .map_err(|e| ApiError::bad_request(format!("error converting YAML to JSON: yaml: {e}")))?;
    let mut remarks = Vec::new();
    if !decoded.duplicates.is_empty() {
        remarks.extend(
            reader::repeated_keys(&text)
                .iter()
                .map(|(line, key)| format!("line {line}: key {key:?} already set in map")),
        );
        if remarks.is_empty() {
            remarks.extend(
                decoded
                    .duplicates
                    .iter()
                    .map(|d| format!("duplicate field {d:?}")),
            );
        }
    }
    // Kubernetes reads YAML by way of sorted JSON, so unknown fields come in the order of their names.
    Ok(Document {
        remarks,
        ..Document::of(decoded.value)
    })
}

/// Fit a document to the type of the call: drop and report unknown fields, refuse values of a wrong type, default.
/// Returns the warnings to send.
pub(crate) fn fit(call: &Call, document: Document, how: Fit<'_>) -> ApiResult<(Value, Vec<String>)> {
    let kind = &call.target.kind;
    let version = call.target.version();
    let mut document = document;
    let mut remarks = std::mem::take(&mut document.remarks);
    let mut value = document.value.take();
    if kind.is_custom() {
        let mut unknown = Vec::new();
        prune::prune(&version.schema, &mut value, &mut unknown);
        unknown.sort();
        remarks.extend(unknown.iter().map(|u| format!("unknown field {u:?}")));
        prune::default(&version.schema, &mut value);
    } else {
        let (conformed, report) = conform::conform(&version.schema, value);
        if let Some(error) = report.error {
            if let Fit::Patched(quotation) = how {
                return Err(patched_error(quotation(), &error));
            }
            return Err(ApiError::bad_request(format!(
                "{} in version {:?} cannot be handled as a {}: {error}",
                kind.kind, &*call.target.version, kind.kind
            )));
        }
        value = conformed;
        remarks.extend(
            document
                .in_order(report.unknown)
                .iter()
                .map(|u| format!("unknown field {u:?}")),
        );
    }
    let mut warnings = Vec::new();
    if !remarks.is_empty() {
        match call.field_validation() {
            FieldValidation::Ignore => {}
            FieldValidation::Warn => warnings.extend(remarks.into_iter().take(MAX_WARNINGS)),
            FieldValidation::Strict => {
                let mut list = remarks.join(", ");
                if list.starts_with("line ") {
                    list.insert_str(0, "yaml: unmarshal errors:\n  ");
                }
                return Err(match how {
                    Fit::Body => ApiError::bad_request(format!(
                        "{} in version {:?} cannot be handled as a {}: strict decoding error: {list}",
                        kind.kind, &*call.target.version, kind.kind
                    )),
                    Fit::Patched(quotation) => {
                        patched_error(quotation(), &format!("strict decoding error: {list}"))
                    }
                });
            }
        }
    }
    Ok((value, warnings))
}

/// A patch whose outcome does not fit the type.
fn patched_error(quotation: String, text: &str) -> ApiError {
    let error = crate::error::FieldError::invalid("patch", &Value::String(quotation), text);
    ApiError::invalid("", "", "", &[error])
}

/// Where a document came from, which decides how a strict failure is worded.
#[derive(Clone, Copy)]
pub(crate) enum Fit<'a> {
    Body,
    /// Of a patch; how a failure quotes it.
    Patched(&'a dyn Fn() -> String),
}

/// The body's own apiVersion and kind must be those of the path.
pub(crate) fn check_type(call: &Call, value: &Value) -> ApiResult<()> {
    let text = |key: &str| value.get(key).and_then(Value::as_str).unwrap_or_default();
    let (api_version, kind) = (text("apiVersion"), text("kind"));
    let wanted = call.target.api_version();
    if (!api_version.is_empty() && api_version != wanted)
        || (!kind.is_empty() && kind != &*call.target.kind.kind)
    {
        if call.target.kind.is_custom() && api_version == wanted {
            let error = crate::error::FieldError::invalid(
                "kind",
                &Value::String(kind.to_owned()),
                format!("must be {}", call.target.kind.kind),
            );
            return Err(ApiError::invalid(
                &call.target.kind.group,
                kind,
                crate::meta::name(value),
                &[error],
            ));
        }
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
