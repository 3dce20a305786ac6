//! `scale`, `log`, `finalize` and `binding`; what is refused.

use axum::body::Body;
use bytes::Bytes;
use futures::StreamExt as _;
use http::{HeaderValue, Method, Response, header};
use serde_json::{Map, Value, json};

use super::body::{self, Document};
use super::request::Call;
use super::write::{self, Change};
use super::{accept, respond};
use crate::admission::LogOptions;
use crate::error::{ApiError, ApiResult, FieldError};
use crate::hub::{CommitError, Hub};
use crate::kinds::ScalePaths;
use crate::meta;
use crate::selector::LabelSelector;
use crate::store::Expect;

/// Subresources of pods that exist in Kubernetes and not here.
pub(crate) fn refused(subresource: &str) -> Option<ApiError> {
    let why = match subresource {
        "exec" | "attach" | "portforward" => {
            "streams into containers are not supported by this server; use the container's own ports and logs"
        }
        "ephemeralcontainers" => "ephemeral containers are not supported by this server",
        "resize" => "resizing of running pods is not supported by this server; replace the pod",
        "eviction" => "evictions are not supported by this server; delete the pod",
        "proxy" => "proxying to pods is not supported by this server",
        _ => return None,
    };
    Some(ApiError::new(
        501,
        "NotImplemented",
        format!("pods/{subresource}: {why}"),
    ))
}

pub(crate) async fn serve(
    hub: &Hub,
    call: &Call,
    method: &Method,
    request_body: Body,
) -> ApiResult<Response<Body>> {
    match (call.target.subresource.as_str(), method) {
        ("log", &Method::GET) => log(hub, call).await,
        ("scale", &Method::GET) => {
            let accepted = accept::negotiate(call.header("accept"))?;
            let stored = hub
                .get(&call.target.kind, &call.target.key())
                .ok_or_else(|| call.target.not_found())?;
            let scale = scale_of(call, &stored.value)?;
            Ok(respond::value(200, &scale, accepted, &[]))
        }
        ("scale", &Method::PUT | &Method::PATCH) => write_scale(hub, call, method, request_body).await,
        ("finalize", &Method::PUT) => finalize(hub, call, request_body).await,
        ("binding", &Method::POST) => bind(hub, call, request_body).await,
        (_, method) => Err(super::method_not_allowed(call, method)),
    }
}

fn paths(call: &Call) -> ApiResult<&ScalePaths> {
    call.target
        .version()
        .scale
        .as_ref()
        .ok_or_else(ApiError::no_such_path)
}

/// The `autoscaling/v1` Scale of an object.
fn scale_of(call: &Call, object: &Value) -> ApiResult<Value> {
    let paths = paths(call)?;
    let custom = call.target.kind.is_custom();
    let spec = meta::int_at(object, &paths.spec);
    if spec.is_none() && custom {
        return Err(ApiError::internal(format!(
            "the spec replicas field {:?} does not exist",
            paths.spec
        )));
    }
    let mut metadata = Map::new();
    for field in ["name", "namespace", "uid", "resourceVersion", "creationTimestamp"] {
        if let Some(value) = meta::metadata(object).get(field) {
            metadata.insert(field.into(), value.clone());
        }
    }
    let mut scale_spec = Map::new();
    let replicas = spec.unwrap_or(0);
    if replicas != 0 {
        scale_spec.insert("replicas".into(), json!(replicas));
    }
    let mut status = json!({"replicas": meta::int_at(object, &paths.status).unwrap_or(0)});
    let selector = match &paths.selector {
        Some(path) => meta::str_at(object, path).to_owned(),
        None if custom => String::new(),
        None => selector_text(meta::at(object, "spec.selector").unwrap_or(&Value::Null)),
    };
    if !selector.is_empty() {
        status["selector"] = json!(selector);
    }
    Ok(
        json!({"kind": "Scale", "apiVersion": "autoscaling/v1", "metadata": metadata, "spec": scale_spec, "status": status}),
    )
}

/// A selector as `a=b,c in (d)`.
pub(crate) fn selector_text(selector: &Value) -> String {
    let plain = selector.get("matchLabels").is_none() && selector.get("matchExpressions").is_none();
    let labels = if plain {
        Some(selector)
    } else {
        selector.get("matchLabels")
    };
    let mut parts: Vec<String> = labels
        .and_then(Value::as_object)
        .into_iter()
        .flatten()
        .map(|(k, v)| format!("{k}={}", v.as_str().unwrap_or_default()))
        .collect();
    parts.sort();
    for e in meta::list_at(selector, "matchExpressions") {
        let key = meta::str_at(e, "key");
        let values: Vec<&str> = meta::list_at(e, "values")
            .iter()
            .filter_map(Value::as_str)
            .collect();
        parts.push(match meta::str_at(e, "operator") {
            "In" => format!("{key} in ({})", values.join(",")),
            "NotIn" => format!("{key} notin ({})", values.join(",")),
            "Exists" => key.to_owned(),
            _ => format!("!{key}"),
        });
    }
    let text = parts.join(",");
    debug_assert!(LabelSelector::parse(&text).is_ok());
    text
}

async fn write_scale(
    hub: &Hub,
    call: &Call,
    method: &Method,
    request_body: Body,
) -> ApiResult<Response<Body>> {
    call.check_write_options(if method == Method::PUT {
        "UpdateOptions"
    } else {
        "PatchOptions"
    })?;
    let accepted = accept::negotiate(call.header("accept"))?;
    let bytes = body::read(request_body).await?;
    let target = &call.target;
    let stored = hub
        .get(&target.kind, &target.key())
        .ok_or_else(|| target.not_found())?;
    let mut scale = scale_of(call, &stored.value)?;
    let media = call
        .header("content-type")
        .split(';')
        .next()
        .unwrap_or_default()
        .trim()
        .to_owned();
    let mut precondition = None;
    if method == Method::PUT {
        let document = body::json_document(&bytes)?;
        if meta::str_at(&document.value, "kind") != "Scale" {
            return Err(ApiError::bad_request(format!(
                "wrong object passed to Scale update: {}",
                meta::str_at(&document.value, "kind")
            )));
        }
        let name = meta::name(&document.value);
        if !name.is_empty() && name != target.name {
            return Err(ApiError::bad_request(format!(
                "the name of the object ({name}) does not match the name on the URL ({})",
                target.name
            )));
        }
        scale = document.value;
    } else {
        match media.as_str() {
            "application/merge-patch+json" | "application/strategic-merge-patch+json" => {
                crate::patch::merge::apply(&mut scale, &body::json_document(&bytes)?.value);
            }
            "application/json-patch+json" => {
                crate::patch::json::apply(&mut scale, &body::json_document(&bytes)?.value).map_err(|_| {
                    ApiError::new(
                        422,
                        "Invalid",
                        "the server rejected our request due to an error in our request",
                    )
                })?;
            }
            "application/apply-patch+yaml" => {
                crate::patch::merge::apply(&mut scale, &body::yaml_document(&bytes)?.value);
            }
            _ => {
                return Err(ApiError::unsupported_media_type(
                    "the body of the request was in an unknown format - accepted media types include: application/json-patch+json, application/merge-patch+json, application/strategic-merge-patch+json, application/apply-patch+yaml",
                ));
            }
        }
    }
    let given = meta::text(&scale, "resourceVersion");
    if !given.is_empty() {
        if given != stored.rv.to_string() {
            return Err(ApiError::modified(
                &target.kind.group,
                &target.kind.plural,
                &target.name,
            ));
        }
        precondition = Some(given.to_owned());
    }
    let replicas = meta::int_at(&scale, "spec.replicas").unwrap_or(0);
    if replicas < 0 {
        let (group, kind) = if target.kind.is_custom() {
            (&*target.kind.group, &*target.kind.kind)
        } else {
            ("autoscaling", "Scale")
        };
        return Err(ApiError::invalid(
            group,
            kind,
            &target.name,
            &[FieldError::invalid(
                if target.kind.is_custom() {
                    paths(call)?.spec.clone()
                } else {
                    "spec.replicas".to_owned()
                },
                &json!(replicas),
                if target.kind.is_custom() {
                    "should be a non-negative integer"
                } else {
                    "must be greater than or equal to 0"
                },
            )],
        ));
    }
    let paths = paths(call)?;
    // The write itself is a merge patch of the one field, owned as the scale subresource.
    let mut change = json!(replicas);
    for part in paths.spec.split('.').filter(|p| !p.is_empty()).rev() {
        change = json!({ part: change });
    }
    if let Some(rv) = precondition {
        change["metadata"] = json!({"resourceVersion": rv});
    }
    let outcome = write::run(hub, call, Change::Merge(Document::of(change))).await?;
    let scale = scale_of(call, &outcome.object)?;
    Ok(respond::value(200, &scale, accepted, &outcome.warnings))
}

/// Namespaces: replace `spec.finalizers`; without any the namespace goes.
async fn finalize(hub: &Hub, call: &Call, request_body: Body) -> ApiResult<Response<Body>> {
    let accepted = accept::negotiate(call.header("accept"))?;
    let bytes = body::read(request_body).await?;
    let document = body::decode(call, &bytes)?;
    body::check_type(call, &document.value)?;
    let finalizers = meta::at(&document.value, "spec.finalizers").cloned();
    let given = meta::text(&document.value, "resourceVersion").to_owned();
    let key = call.target.key();
    let current = hub
        .get(&call.target.kind, &key)
        .ok_or_else(|| call.target.not_found())?;
    if !given.is_empty() && given != current.rv.to_string() {
        return Err(ApiError::modified("", "namespaces", &call.target.name));
    }
    let last = crate::controllers::namespaces::set_finalizers(hub, &key, finalizers).await?;
    Ok(respond::value(200, &last, accepted, &[]))
}

/// Pods: gives an unbound pod its node, once, as kube-scheduler asks for it.
async fn bind(hub: &Hub, call: &Call, request_body: Body) -> ApiResult<Response<Body>> {
    let accepted = accept::negotiate(call.header("accept"))?;
    let bytes = body::read(request_body).await?;
    let binding = body::json_document(&bytes)?.value;
    let target = &call.target;
    let node = meta::str_at(&binding, "target.name");
    if node.is_empty() {
        let missing = FieldError::required("target.name", "");
        return Err(ApiError::invalid("", "Binding", &target.name, &[missing]));
    }
    let wanted_uid = meta::text(&binding, "uid");
    let key = target.key();
    let conflict = |why: String| {
        ApiError::new(
            409,
            "Conflict",
            format!(
                "Operation cannot be fulfilled on pods/binding \"{}\": {why}",
                target.name
            ),
        )
    };
    for _ in 0..crate::hub::MODIFY_ATTEMPTS {
        let current = hub.get(&target.kind, &key).ok_or_else(|| target.not_found())?;
        let uid = meta::text(&current.value, "uid");
        if !wanted_uid.is_empty() && wanted_uid != uid {
            return Err(conflict(format!(
                "Precondition failed: UID in precondition: {wanted_uid}, UID in object meta: {uid}"
            )));
        }
        if !meta::text(&current.value, "deletionTimestamp").is_empty() {
            return Err(conflict(format!(
                "pod {} is being deleted, cannot be assigned to a host",
                target.name
            )));
        }
        let bound = meta::str_at(&current.value, "spec.nodeName");
        if !bound.is_empty() {
            return Err(conflict(format!(
                "pod {} is already assigned to node \"{bound}\"",
                target.name
            )));
        }
        let mut pod = current.value.clone();
        pod["spec"]["nodeName"] = json!(node);
        let condition = json!({
            "type": "PodScheduled",
            "status": "True",
            "lastProbeTime": null,
            "lastTransitionTime": crate::time::seconds(hub.clock.now()),
        });
        match pod["status"]["conditions"].as_array_mut() {
            Some(conditions) => {
                conditions.retain(|condition| condition["type"] != "PodScheduled");
                conditions.push(condition);
            }
            None => pod["status"]["conditions"] = json!([condition]),
        }
        match hub
            .put(&target.kind.resource, &key, pod, Expect::At(current.rv))
            .await
        {
            Ok(_) => {
                let status = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "code": 201});
                return Ok(respond::value(201, &status, accepted, &[]));
            }
            Err(CommitError::Storage(text)) => return Err(Hub::storage_error(&text)),
            Err(CommitError::Lost(_)) => {}
        }
    }
    Err(conflict("the pod changed too often; please try again".to_owned()))
}

async fn log(hub: &Hub, call: &Call) -> ApiResult<Response<Body>> {
    let target = &call.target;
    let stored = hub
        .get(&target.kind, &target.key())
        .ok_or_else(|| target.not_found())?;
    let pod = &stored.value;
    let q = &call.query;
    let number = |key: &str| -> ApiResult<Option<u64>> {
        match q.text(key) {
            "" => Ok(None),
            text => text.parse().map(Some).map_err(|_| {
                ApiError::bad_request(format!("{key}: {text:?} is not a number of the expected range"))
            }),
        }
    };
    let containers: Vec<&str> = meta::list_at(pod, "spec.containers")
        .iter()
        .map(|c| meta::str_at(c, "name"))
        .collect();
    let inits: Vec<&str> = meta::list_at(pod, "spec.initContainers")
        .iter()
        .map(|c| meta::str_at(c, "name"))
        .collect();
    let container = match q.text("container") {
        "" => match containers.as_slice() {
            [one] => (*one).to_owned(),
            many => {
                let init = if inits.is_empty() {
                    String::new()
                } else {
                    format!(" or one of the init containers: [{}]", inits.join(" "))
                };
                return Err(ApiError::bad_request(format!(
                    "a container name must be specified for pod {}, choose one of: [{}]{init}",
                    target.name,
                    many.join(" ")
                )));
            }
        },
        name if containers.contains(&name) || inits.contains(&name) => name.to_owned(),
        name => {
            return Err(ApiError::bad_request(format!(
                "container {name} is not valid for pod {}",
                target.name
            )));
        }
    };
    if meta::str_at(pod, "spec.nodeName").is_empty() {
        // Not running anywhere yet: nothing to show.
        return Ok(respond::bytes(204, Bytes::new(), "text/plain", &[]));
    }
    let Some(logs) = &hub.pod_logs else {
        return Err(ApiError::new(
            501,
            "NotImplemented",
            "pods/log: this server runs without a source of logs",
        ));
    };
    let since_time = q.text("sinceTime");
    let options = LogOptions {
        container,
        follow: q.flag("follow"),
        previous: q.flag("previous"),
        timestamps: q.flag("timestamps"),
        tail_lines: number("tailLines")?,
        since_seconds: number("sinceSeconds")?,
        since_time: (!since_time.is_empty()).then(|| since_time.to_owned()),
        limit_bytes: number("limitBytes")?,
    };
    let stream = logs
        .logs(&target.namespace, pod, options)
        .await
        .map_err(ApiError::bad_request)?;
    let shutdown = hub.shutdown.clone();
    let stream = stream.take_until(async move { shutdown.cancelled().await });
    let mut response = Response::new(Body::from_stream(stream));
    response
        .headers_mut()
        .insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain"));
    Ok(response)
}
