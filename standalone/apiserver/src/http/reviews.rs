//! What a caller may ask about itself: who it is, and what it may do. Every token is an administrator, so that the answer is yes.

use axum::body::Body;
use http::request::Parts;
use http::{Method, Response};
use serde_json::{Value, json};

use super::{body, respond};
use crate::auth::User;
use crate::error::{ApiError, ApiResult};
use crate::hub::Hub;
use crate::time;

/// Headers with which a caller asks to be taken for somebody else.
const IMPERSONATION: [&str; 3] = ["impersonate-user", "impersonate-group", "impersonate-uid"];

/// Refuses to take a caller for somebody else: to go on as the caller itself would do what that one may not do.
pub(crate) fn check_impersonation(parts: &Parts) -> ApiResult<()> {
    match IMPERSONATION
        .iter()
        .find(|name| parts.headers.contains_key(**name))
    {
        Some(header) => Err(ApiError::bad_request(format!(
            "impersonation ({header}) is not supported by this server, where every token is an administrator; leave it out"
        ))),
        None => Ok(()),
    }
}

/// Answers a review; hands everything else back.
pub(crate) async fn serve(
    hub: &Hub,
    parts: &Parts,
    path: &str,
    user: &User,
    request: Body,
) -> ApiResult<Result<Response<Body>, Body>> {
    let kind = match (&parts.method, path.trim_matches('/')) {
        (&Method::POST, "apis/authorization.k8s.io/v1/selfsubjectaccessreviews") => "SelfSubjectAccessReview",
        (&Method::POST, "apis/authorization.k8s.io/v1/selfsubjectrulesreviews") => "SelfSubjectRulesReview",
        (&Method::POST, "apis/authentication.k8s.io/v1/selfsubjectreviews") => "SelfSubjectReview",
        _ => return Ok(Err(request)),
    };
    let bytes = body::read(request).await?;
    // The question does not change the answer; it is given back where it can be read.
    let asked: Value = serde_json::from_slice(&bytes).unwrap_or_default();
    let spec = asked.get("spec").cloned().unwrap_or_else(|| json!({}));
    let answer = match kind {
        "SelfSubjectAccessReview" => {
            json!({"kind": kind, "apiVersion": "authorization.k8s.io/v1", "metadata": {}, "spec": spec,
            "status": {"allowed": true, "reason": "every token is an administrator"}})
        }
        "SelfSubjectRulesReview" => {
            json!({"kind": kind, "apiVersion": "authorization.k8s.io/v1", "metadata": {}, "spec": spec,
            "status": {"resourceRules": [{"verbs": ["*"], "apiGroups": ["*"], "resources": ["*"]}],
                "nonResourceRules": [{"verbs": ["*"], "nonResourceURLs": ["*"]}], "incomplete": false}})
        }
        _ => {
            let now = time::seconds(hub.clock.now());
            json!({"kind": kind, "apiVersion": "authentication.k8s.io/v1", "metadata": {"creationTimestamp": now},
                "status": {"userInfo": {"username": user.name, "groups": user.groups}}})
        }
    };
    Ok(Ok(respond::json(201, &answer, &[])))
}
