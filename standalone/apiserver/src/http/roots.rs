//! Paths that are not resources: health, version, discovery, OpenAPI.

use axum::body::Body;
use bytes::Bytes;
use http::request::Parts;
use http::{HeaderValue, Method, Response, header};
use serde_json::{Value, json};

use super::request::Query;
use super::respond;
use crate::auth::User;
use crate::discovery;
use crate::error::{ApiError, ApiResult};
use crate::hub::Hub;
use crate::kinds::Registry;

/// The Kubernetes version whose API this server speaks.
pub(crate) const VERSION: &str = "v1.35.4";

const AGGREGATED: &str = "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList";

/// Answer a path that is not a resource; `None` hands the request on.
pub(crate) fn serve(
    hub: &Hub,
    registry: &Registry,
    parts: &Parts,
    path: &str,
    user: &User,
) -> ApiResult<Option<Response<Body>>> {
    let trimmed = path.trim_matches('/');
    let segments: Vec<&str> = trimmed.split('/').collect();
    let is_root = matches!(
        segments.as_slice(),
        ["" | "api" | "apis" | "version" | "healthz" | "readyz" | "livez" | "metrics" | "openapi", ..] if !matches!(segments.as_slice(), ["api", _, _, ..] | ["apis", _, _, _, ..])
    );
    if !is_root {
        return Ok(None);
    }
    if parts.method != Method::GET && parts.method != Method::HEAD {
        return Ok(None);
    }
    let health = matches!(segments.first(), Some(&("healthz" | "readyz" | "livez")));
    if user.is_anonymous() && !health && trimmed != "version" {
        return Err(super::anonymous(user, &parts.method, path));
    }
    let accept = parts
        .headers
        .get(header::ACCEPT)
        .and_then(|v| v.to_str().ok())
        .unwrap_or_default();
    Ok(Some(match segments.as_slice() {
        ["healthz" | "readyz" | "livez", ..] => match health_check(hub, &segments, parts) {
            Ok(text) => respond::text(200, text),
            Err(error) => error,
        },
        ["version"] => respond::bytes(
            200,
            // Indented, as people look at it with `kubectl get --raw`.
            serde_json::to_vec_pretty(&version()).unwrap_or_default().into(),
            "application/json",
            &[],
        ),
        [""] => respond::json(200, &json!({"paths": discovery::root_paths(registry)}), &[]),
        ["metrics"] => respond::text(200, metrics(hub)),
        ["api"] if accepts_aggregated(accept) => aggregated(hub, &discovery::aggregated(registry, true)),
        ["apis"] if accepts_aggregated(accept) => aggregated(hub, &discovery::aggregated(registry, false)),
        ["api"] => respond::json(
            200,
            &json!({"kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": [{"clientCIDR": "0.0.0.0/0", "serverAddress": "localhost"}]}),
            &[],
        ),
        ["apis"] => respond::json(200, &discovery::group_list(registry), &[]),
        ["apis", group] => respond::json(
            200,
            &discovery::group(registry, group).ok_or_else(ApiError::no_such_path)?,
            &[],
        ),
        ["api", version] => respond::json(
            200,
            &discovery::resources(registry, "", version).ok_or_else(ApiError::no_such_path)?,
            &[],
        ),
        ["apis", group, version] => respond::json(
            200,
            &discovery::resources(registry, group, version).ok_or_else(ApiError::no_such_path)?,
            &[],
        ),
        ["openapi", "v2"] => crate::openapi::version_two(parts.headers.get(http::header::ACCEPT)),
        ["openapi", "v3"] => respond::json(200, &crate::openapi::index(registry), &[]),
        ["openapi", "v3", rest @ ..] => {
            let document = crate::openapi::document(registry, rest).ok_or_else(ApiError::no_such_path)?;
            let mut response = respond::json(200, &document, &[]);
            if Query::parse(parts.uri.query().unwrap_or_default())
                .get("hash")
                .is_some()
            {
                response.headers_mut().insert(
                    header::CACHE_CONTROL,
                    HeaderValue::from_static("public, immutable"),
                );
            }
            response
        }
        _ => return Err(ApiError::no_such_path()),
    }))
}

fn health_check(hub: &Hub, segments: &[&str], parts: &Parts) -> Result<String, Response<Body>> {
    let checks = ["ping", "log", "storage"];
    let kind = segments.first().copied().unwrap_or_default();
    let storage = hub.log.as_ref().and_then(crate::log::Log::failure);
    if let Some(check) = segments.get(1) {
        if !checks.contains(check) {
            return Err(respond::failure(&ApiError::page_not_found()));
        }
        return match (*check, &storage) {
            ("storage", Some(failure)) => {
                Err(respond::text(500, format!("internal server error: {failure}\n")))
            }
            _ => Ok("ok".to_owned()),
        };
    }
    let verbose = Query::parse(parts.uri.query().unwrap_or_default())
        .get("verbose")
        .is_some();
    if storage.is_none() && !verbose {
        return Ok("ok".to_owned());
    }
    let mut out = String::new();
    for check in checks {
        let failed = check == "storage" && storage.is_some();
        out.push_str(&format!(
            "[{}]{check} {}\n",
            if failed { '-' } else { '+' },
            if failed { "failed" } else { "ok" }
        ));
    }
    match storage {
        None => {
            out.push_str(&format!("{kind} check passed\n"));
            Ok(out)
        }
        Some(_) => {
            out.push_str(&format!("{kind} check failed\n"));
            Err(respond::text(500, out))
        }
    }
}

fn version() -> Value {
    json!({
        "major": "1", "minor": "35", "emulationMajor": "1", "emulationMinor": "35", "minCompatibilityMajor": "1", "minCompatibilityMinor": "34",
        "gitVersion": VERSION, "gitCommit": "", "gitTreeState": "", "buildDate": "1970-01-01T00:00:00Z",
        "goVersion": "", "compiler": "rustc", "platform": format!("linux/{}", if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" }),
    })
}

fn accepts_aggregated(accept: &str) -> bool {
    // The client lists v2, v2beta1 and plain JSON; v2 is what it prefers.
    accept.split(',').any(|range| {
        let range = range.replace(' ', "");
        range.contains("as=APIGroupDiscoveryList") && range.contains("v=v2") && !range.contains("v=v2beta1")
    })
}

fn aggregated(hub: &Hub, document: &Value) -> Response<Body> {
    let mut response = respond::bytes(200, Bytes::from(document.to_string()), AGGREGATED, &[]);
    let version = hub.registry_version.load(std::sync::atomic::Ordering::Relaxed);
    let headers = response.headers_mut();
    if let Ok(tag) = HeaderValue::from_str(&format!("\"{version}\"")) {
        headers.insert(header::ETAG, tag);
    }
    headers.insert(header::VARY, HeaderValue::from_static("Accept"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("public"));
    response
}

fn metrics(hub: &Hub) -> String {
    let watchers = hub.watchers.load(std::sync::atomic::Ordering::Relaxed);
    let registry = hub.registry();
    let store = hub.store.lock();
    let mut out = String::from("# TYPE apiserver_storage_objects gauge\n");
    for kind in registry.all() {
        if registry
            .by_resource(&kind.resource)
            .is_some_and(|k| k.group == kind.group)
        {
            out.push_str(&format!(
                "apiserver_storage_objects{{resource=\"{}\"}} {}\n",
                crate::error::qualified(&kind.group, &kind.plural),
                store.count(&kind.resource)
            ));
        }
    }
    out.push_str(&format!(
        "# TYPE apiserver_watchers gauge\napiserver_watchers {watchers}\n"
    ));
    out.push_str(&format!(
        "# TYPE apiserver_resource_version counter\napiserver_resource_version {}\n",
        store.rv()
    ));
    out
}
