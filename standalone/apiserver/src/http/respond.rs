//! Answers.

use axum::body::Body;
use bytes::Bytes;
use http::{HeaderValue, Response, StatusCode, header};
use serde_json::{Value, json};

use super::accept::{Accepted, Form};
use crate::error::ApiError;

/// An answer with a JSON body that is already encoded.
pub(crate) fn bytes(
    code: u16,
    body: Bytes,
    content_type: &'static str,
    warnings: &[String],
) -> Response<Body> {
    let mut response = Response::new(Body::from(body));
    *response.status_mut() = StatusCode::from_u16(code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    headers.insert(
        header::CACHE_CONTROL,
        HeaderValue::from_static("no-cache, private"),
    );
    for warning in warnings {
        let text: String = warning
            .chars()
            .map(|c| if c.is_control() { ' ' } else { c })
            .collect();
        let quoted = text.replace('\\', "\\\\").replace('"', "\\\"");
        if let Ok(value) = HeaderValue::from_bytes(format!("299 - \"{quoted}\"").as_bytes()) {
            headers.append(header::WARNING, value);
        }
    }
    response
}

pub(crate) fn json(code: u16, value: &Value, warnings: &[String]) -> Response<Body> {
    bytes(
        code,
        serde_json::to_vec(value).unwrap_or_default().into(),
        "application/json",
        warnings,
    )
}

pub(crate) fn text(code: u16, body: impl Into<String>) -> Response<Body> {
    bytes(code, Bytes::from(body.into()), "text/plain; charset=utf-8", &[])
}

/// An object in the accepted encoding.
pub(crate) fn value(code: u16, value: &Value, accepted: Accepted, warnings: &[String]) -> Response<Body> {
    if accepted.yaml {
        let text = super::yaml::text(value);
        return bytes(code, Bytes::from(text), "application/yaml", warnings);
    }
    json(code, value, warnings)
}

pub(crate) fn failure(error: &ApiError) -> Response<Body> {
    if error.reason == crate::error::PAGE {
        return text(error.code, error.message.clone());
    }
    let mut response = json(error.code, &error.to_status(), &error.warnings);
    let seconds = error
        .retry_after
        .or_else(|| error.details.as_ref().and_then(|d| d.retry_after_seconds));
    if let Some(seconds) = seconds {
        response
            .headers_mut()
            .insert(header::RETRY_AFTER, HeaderValue::from(seconds));
    }
    if error.code == 401 {
        response
            .headers_mut()
            .insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    }
    response
}

/// `PartialObjectMetadata` of an object.
pub(crate) fn partial(object: &Value) -> Value {
    json!({
        "kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1",
        "metadata": object.get("metadata").cloned().unwrap_or_else(|| json!({})),
    })
}

/// One object in the form that was asked for; `table` makes the Table of it.
pub(crate) fn object(
    code: u16,
    object: &Value,
    accepted: Accepted,
    warnings: &[String],
    table: impl FnOnce(&Value) -> Value,
) -> Response<Body> {
    match accepted.form {
        Form::Object => value(code, object, accepted, warnings),
        Form::Metadata => value(code, &partial(object), accepted, warnings),
        Form::Table => value(code, &table(object), accepted, warnings),
    }
}
