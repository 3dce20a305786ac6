//! The HTTP front: paths to verbs, bodies in and out.

pub(crate) mod accept;
pub(crate) mod apply;
pub(crate) mod before;
pub(crate) mod body;
pub(crate) mod delete;
pub(crate) mod quoted;
pub(crate) mod read;
pub(crate) mod request;
pub(crate) mod respond;
pub(crate) mod reviews;
pub(crate) mod roots;
pub(crate) mod subresources;
pub(crate) mod watch;
pub(crate) mod write;
pub(crate) mod yaml;

use std::sync::Arc;

use axum::body::Body;
use http::{Method, Request, Response};

use crate::auth::{Trust, User};
use crate::error::{ApiError, ApiResult, Details};
use crate::hub::Hub;
use request::{Call, Target};

/// Longest request body, as Kubernetes has it.
pub(crate) const MAX_BODY: usize = 3 << 20;

/// Serve one request.
pub(crate) async fn handle(hub: Arc<Hub>, trust: Trust, request: Request<Body>) -> Response<Body> {
    let (parts, body) = request.into_parts();
    match serve(hub, trust, parts, body).await {
        Ok(response) => response,
        Err(error) => respond::failure(&error),
    }
}

async fn serve(
    hub: Arc<Hub>,
    trust: Trust,
    parts: http::request::Parts,
    body: Body,
) -> ApiResult<Response<Body>> {
    let path = parts.uri.path().to_owned();
    let user = trust.identify(&parts.headers)?;
    let registry = hub.registry();
    if let Some(answer) = roots::serve(&hub, &registry, &parts, &path, &user)? {
        return Ok(answer);
    }
    if user.is_anonymous() {
        return Err(anonymous(&user, &parts.method, &path));
    }
    reviews::check_impersonation(&parts)?;
    let body = match reviews::serve(&hub, &parts, &path, &user, body).await? {
        Ok(answer) => return Ok(answer),
        Err(body) => body,
    };
    let (target, watch_prefix) = Target::parse(&path, &registry)?;
    let call = Call::new(target, &parts, user, watch_prefix)?;
    let method = parts.method.clone();
    if call.target.subresource == "scale"
        || call.target.subresource == "log"
        || call.target.subresource == "finalize"
        || call.target.subresource == "binding"
    {
        return subresources::serve(&hub, &call, &method, body).await;
    }
    if let Some(refusal) = subresources::refused(&call.target.subresource) {
        return Err(refusal);
    }
    let collection = call.target.name.is_empty();
    match (method, collection) {
        (Method::GET | Method::HEAD, true) if call.wants_watch() => watch::serve(hub, call).await,
        (Method::GET | Method::HEAD, false) if call.is_watch_path() => watch::serve(hub, call).await,
        (Method::GET | Method::HEAD, true) => read::list(&hub, &call).await,
        (Method::GET | Method::HEAD, false) => read::get(&hub, &call).await,
        (Method::POST, true) => write::create(&hub, &call, body).await,
        (Method::PUT, false) => write::replace(&hub, &call, body).await,
        (Method::PATCH, false) => write::patch(&hub, &call, body).await,
        (Method::DELETE, false) => delete::one(&hub, &call, body).await,
        (Method::DELETE, true) => delete::collection(&hub, &call, body).await,
        (method, _) => Err(method_not_allowed(&call, &method)),
    }
}

pub(crate) fn method_not_allowed(call: &Call, method: &Method) -> ApiError {
    let kind = &call.target.kind;
    if kind.is_custom() {
        let verb = match *method {
            Method::POST => "create",
            Method::PUT => "update",
            Method::PATCH => "patch",
            Method::DELETE => "delete",
            _ => "get",
        };
        let what = crate::error::qualified(&kind.group, &kind.plural);
        return ApiError::new(
            405,
            "MethodNotAllowed",
            format!("{verb} is not supported on resources of kind \"{what}\""),
        )
        .with_details(&kind.group, &kind.plural, "");
    }
    let mut error = ApiError::new(
        405,
        "MethodNotAllowed",
        "the server does not allow this method on the requested resource",
    );
    error.details = Some(Details::default());
    error
}

fn anonymous(user: &User, method: &Method, path: &str) -> ApiError {
    let verb = method.as_str().to_lowercase();
    let mut error = ApiError::new(
        403,
        "Forbidden",
        format!("forbidden: User \"{}\" cannot {verb} path \"{path}\"", user.name),
    );
    error.details = Some(Details::default());
    error
}
