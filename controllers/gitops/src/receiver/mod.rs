//! `Receiver` objects: webhooks that make sources look at once.
//!
//! The path of a webhook is `/hook/` and the SHA-256 of token, name and namespace, as Flux's. A call is authenticated
//! before anything is done with it; its effect is the annotation `reconcile.fluxcd.io/requestedAt` on the targets, so
//! that a call may arrive at any replica. The router answers on every replica; statuses are written by the leader.

mod verify;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, Path, State};
use axum::routing::post;
use http::{HeaderMap, StatusCode};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Secret;
use kube::api::{ListParams, Patch, PatchParams};
use kube::core::DynamicObject;
use kube::{Api, Client, ResourceExt as _};
use parking_lot::RwLock;
use serde_json::{Value, json};
use serin_crds::flux::notification::{Receiver, ReceiverResource, ReceiverStatus};
use serin_kit::cache::{Cache, Change};
use serin_kit::condition::{self, Status, Wanted};
use serin_kit::unhonoured::{self, Field};
use sha2::{Digest, Sha256};
use tokio::sync::Semaphore;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::apply::discovery::Discovery;
use crate::error::{Error, server_words};
use crate::health::expressions::Expression;
use crate::key::{Key, ObjectId};
use crate::queue::{Queue, Urgency, jittered};
use crate::reconcile::REQUESTED_AT;
use crate::source::credentials::{Redacted, hex};
use crate::status::StatusWriter;

/// Flux's bound on a payload.
const BODY_MAX_BYTES: usize = 3 << 20;
/// Calls handled at a time; more are told to come back.
const CALLS_MAX: usize = 64;
/// How long one call may take to read and to act on.
const CALL_TIMEOUT: Duration = Duration::from_secs(30);
/// Objects that one call may touch, against a `*` over a huge cluster.
const TARGETS_MAX: usize = 1_000;
const INTERVAL_DEFAULT: Duration = Duration::from_secs(600);
const STATUS_MANAGER: &str = "gotk-notification-controller";

/// One webhook that answers.
struct Route {
    key: Key,
    token: Redacted,
    receiver: Arc<Receiver>,
    filter: Option<Expression>,
    filters: Vec<Option<Expression>>,
}

/// The webhooks. Cloning shares them.
#[derive(Clone)]
pub struct Receivers {
    inner: Arc<Inner>,
}

struct Inner {
    client: Client,
    discovery: Discovery,
    cache: Cache<Receiver>,
    routes: RwLock<HashMap<String, Arc<Route>>>,
    queue: Queue,
    status: StatusWriter<Receiver>,
    calls: Semaphore,
}

/// The digest in a webhook's path.
fn path_digest(token: &str, key: &Key) -> String {
    hex(&Sha256::digest(format!("{token}{}{}", key.name, key.namespace)))
}

impl Receivers {
    /// Starts watching `Receiver` objects. Nothing happens before [`Receivers::run`].
    pub fn new(client: Client, cancel: CancellationToken) -> Self {
        let inner = Inner {
            discovery: Discovery::new(client.clone()),
            cache: Cache::start(Api::all(client.clone()), cancel),
            routes: RwLock::default(),
            queue: Queue::default(),
            status: StatusWriter::new(client.clone(), STATUS_MANAGER),
            calls: Semaphore::new(CALLS_MAX),
            client,
        };
        Self {
            inner: Arc::new(inner),
        }
    }

    /// The endpoint, to be served wherever webhooks may arrive: `POST /hook/<digest>`.
    pub fn router(&self) -> Router {
        Router::new()
            .route("/hook/{digest}", post(call))
            .layer(DefaultBodyLimit::max(BODY_MAX_BYTES))
            .with_state(self.inner.clone())
    }

    /// Keeps routes and statuses up to date until `cancel`.
    pub async fn run(&self, cancel: CancellationToken) {
        let mut changes = self.inner.cache.changes();
        for receiver in self.inner.cache.list() {
            self.inner.queue.push(&Key::of(receiver.as_ref()), Urgency::High);
        }
        loop {
            tokio::select! {
                () = cancel.cancelled() => return,
                change = changes.next() => match change {
                    Some(Change::Applied(r) | Change::Deleted(r)) => {
                        if self.inner.concerns(&r) {
                            self.inner.queue.push(&Key::of(r.as_ref()), Urgency::High);
                        }
                    }
                    Some(Change::Resync) => {
                        for receiver in self.inner.cache.list() {
                            self.inner.queue.push(&Key::of(receiver.as_ref()), Urgency::High);
                        }
                    }
                    None => return,
                },
                key = self.inner.queue.next() => {
                    self.inner.reconcile(&key).await;
                    self.inner.queue.done(&key);
                }
            }
        }
    }
}

impl Inner {
    /// Whether a change is more than our own status write.
    fn concerns(&self, receiver: &Receiver) -> bool {
        let key = Key::of(receiver);
        let routes = self.routes.read();
        let known = routes.values().find(|r| r.key == key);
        known.is_none_or(|r| {
            r.receiver.metadata.generation != receiver.metadata.generation
                || r.receiver.annotations().get(REQUESTED_AT) != receiver.annotations().get(REQUESTED_AT)
                || self.cache.get(Some(&key.namespace), &key.name).is_none()
        })
    }

    async fn reconcile(&self, key: &Key) {
        let Some(receiver) = self.cache.get(Some(&key.namespace), &key.name) else {
            self.routes.write().retain(|_, r| r.key != *key);
            self.status.forget(key);
            self.queue.cancel_at(key);
            return;
        };
        let receiver = self.status.newest(receiver);
        if receiver.spec.suspend == Some(true) {
            self.routes.write().retain(|_, r| r.key != *key);
            return;
        }
        let interval = receiver
            .spec
            .interval
            .as_ref()
            .map_or(INTERVAL_DEFAULT, |i| i.parse_or(INTERVAL_DEFAULT));
        self.queue.push_at(key, Instant::now() + jittered(interval, key));
        let route = self.route(key, &receiver).await;
        let outcome = self.install(key, route);
        if let Err(error) = self.say(&receiver, outcome).await {
            tracing::warn!(receiver = %key, %error, "status not written");
            self.queue.push_at(key, Instant::now() + Duration::from_secs(2));
        }
    }

    /// Puts a route in place of the one that the Receiver had; gives its path.
    fn install(&self, key: &Key, route: Result<Route, String>) -> Result<String, String> {
        let mut routes = self.routes.write();
        routes.retain(|_, r| r.key != *key);
        let route = route?;
        let digest = path_digest(&route.token.0, key);
        routes.insert(digest.clone(), Arc::new(route));
        Ok(format!("/hook/{digest}"))
    }

    async fn route(&self, key: &Key, receiver: &Arc<Receiver>) -> Result<Route, String> {
        let spec = &receiver.spec;
        if !verify::supported(&spec.r#type) {
            return Err(format!(
                "spec.type '{}' is not served yet; generic, generic-hmac, github and gitlab are",
                spec.r#type
            ));
        }
        let compile = |text: &Option<String>| {
            text.as_deref()
                .filter(|t| !t.is_empty())
                .map(Expression::compile)
                .transpose()
        };
        let filter = compile(&spec.resource_filter)?;
        let filters = spec
            .resources
            .iter()
            .map(|r| compile(&r.filter))
            .collect::<Result<_, _>>()?;
        let name = spec
            .secret_ref
            .as_ref()
            .map(|r| r.name.clone())
            .ok_or("spec.secretRef is required: a Secret with the key 'token'")?;
        let api: Api<Secret> = Api::namespaced(self.client.clone(), &key.namespace);
        let secret = api
            .get_opt(&name)
            .await
            .map_err(|e| format!("Secret '{}/{name}': {}", key.namespace, server_words(&e)))?;
        let token = secret
            .and_then(|s| s.data?.get("token").map(|t| t.0.clone()))
            .and_then(|t| String::from_utf8(t).ok())
            .filter(|t| !t.is_empty())
            .ok_or_else(|| {
                format!(
                    "Secret '{}/{name}' is missing or has no key 'token'",
                    key.namespace
                )
            })?;
        Ok(Route {
            key: key.clone(),
            token: Redacted(token),
            receiver: receiver.clone(),
            filter,
            filters,
        })
    }

    async fn say(&self, receiver: &Arc<Receiver>, outcome: Result<String, String>) -> Result<(), Error> {
        let old = receiver.status.clone().unwrap_or_default();
        let mut new: ReceiverStatus = old.clone();
        let now = Timestamp::now();
        let generation = receiver.metadata.generation;
        let mut set = |type_: &str, status: Status, reason: &str, message: &str| {
            condition::set(
                &mut new.conditions,
                &Wanted {
                    type_,
                    status,
                    reason,
                    message,
                    observed_generation: generation,
                },
                now,
            );
        };
        let mut refused = Vec::new();
        match &outcome {
            Ok(path) => {
                set(
                    "Ready",
                    Status::True,
                    "Succeeded",
                    &format!("Receiver initialized for path: {path}"),
                );
                condition::remove(&mut new.conditions, "Stalled");
                new.webhook_path = Some(path.clone());
            }
            Err(message) => {
                set("Ready", Status::False, "ValidationFailed", message);
                set("Stalled", Status::True, "ValidationFailed", message);
                if !verify::supported(&receiver.spec.r#type) {
                    refused.push(Field::refused("spec.type", message.clone()));
                }
                new.webhook_path = None;
            }
        }
        unhonoured::set(&mut new.conditions, &refused, generation, now);
        new.observed_generation = generation;
        new.last_handled_reconcile_at = receiver.annotations().get(REQUESTED_AT).cloned();
        self.status.write(receiver, &old, &new).await.map(drop)
    }

    /// Annotates what an authenticated call asks for. Gives how many objects were told.
    async fn notify(&self, route: &Route, headers: &HeaderMap, body: &[u8]) -> Result<usize, Error> {
        let request = request_variable(headers, body);
        let mut told = 0;
        for (resource, filter) in route.receiver.spec.resources.iter().zip(&route.filters) {
            for (api, object) in self.targets(&route.key, resource).await? {
                let value = serde_json::to_value(&object).unwrap_or(Value::Null);
                let passes = [&route.filter, filter]
                    .into_iter()
                    .flatten()
                    .all(|e| e.holds(&[("res", &value), ("req", &request)]).unwrap_or(false));
                if !passes {
                    continue;
                }
                let patch =
                    json!({"metadata": {"annotations": {(REQUESTED_AT): Timestamp::now().to_string()}}});
                let params = PatchParams {
                    field_manager: Some(STATUS_MANAGER.into()),
                    ..Default::default()
                };
                api.patch_metadata(&object.name_any(), &params, &Patch::Merge(patch))
                    .await
                    .map_err(|e| {
                        Error::api(format!("annotate {} {}", resource.kind, object.name_any()), e)
                    })?;
                told += 1;
                if told >= TARGETS_MAX {
                    return Ok(told);
                }
            }
        }
        Ok(told)
    }

    async fn targets(
        &self,
        key: &Key,
        resource: &ReceiverResource,
    ) -> Result<Vec<(Api<DynamicObject>, DynamicObject)>, Error> {
        let kind = resource.kind.to_string();
        let api_version = resource
            .api_version
            .clone()
            .unwrap_or_else(|| version_of(&kind).to_string());
        let namespace = resource
            .namespace
            .clone()
            .unwrap_or_else(|| key.namespace.clone());
        let id = ObjectId {
            group: crate::key::group_version(&api_version).0.to_string(),
            kind,
            namespace: namespace.clone(),
            name: resource.name.clone(),
        };
        let served = self.discovery.served(&id, &api_version).await?;
        let api = self.discovery.api(&served, &namespace);
        let failed = |e: kube::Error| Error::api(format!("read {id}, a target of Receiver {key}"), e);
        if resource.name == "*" {
            let selector: Vec<String> = resource
                .match_labels
                .iter()
                .map(|(k, v)| format!("{k}={v}"))
                .collect();
            let list = api
                .list(&ListParams::default().labels(&selector.join(",")))
                .await
                .map_err(failed)?;
            return Ok(list.items.into_iter().map(|o| (api.clone(), o)).collect());
        }
        Ok(api
            .get_opt(&resource.name)
            .await
            .map_err(failed)?
            .map(|o| (api.clone(), o))
            .into_iter()
            .collect())
    }
}

fn version_of(kind: &str) -> &'static str {
    match kind {
        "Kustomization" => "kustomize.toolkit.fluxcd.io/v1",
        "HelmRelease" => "helm.toolkit.fluxcd.io/v2",
        "ImageRepository" | "ImagePolicy" | "ImageUpdateAutomation" => "image.toolkit.fluxcd.io/v1",
        _ => "source.toolkit.fluxcd.io/v1",
    }
}

/// `req` in filters: the body as JSON where it is, and the headers.
fn request_variable(headers: &HeaderMap, body: &[u8]) -> Value {
    let headers: BTreeMap<String, String> = headers
        .iter()
        .filter_map(|(k, v)| Some((k.as_str().to_string(), v.to_str().ok()?.to_string())))
        .collect();
    let body: Value = serde_json::from_slice(body).unwrap_or(Value::Null);
    json!({"headers": headers, "body": body})
}

async fn call(
    State(inner): State<Arc<Inner>>,
    Path(digest): Path<String>,
    headers: HeaderMap,
    body: Bytes,
) -> StatusCode {
    let Ok(_permit) = inner.calls.try_acquire() else {
        return StatusCode::TOO_MANY_REQUESTS;
    };
    let Some(route) = inner.routes.read().get(&digest).cloned() else {
        return StatusCode::NOT_FOUND;
    };
    let spec = &route.receiver.spec;
    if let Err(refusal) = verify::check(
        &spec.r#type,
        route.token.0.as_bytes(),
        &spec.events,
        &headers,
        &body,
    ) {
        tracing::warn!(receiver = %route.key, ?refusal, "webhook call refused");
        return StatusCode::BAD_REQUEST;
    }
    match tokio::time::timeout(CALL_TIMEOUT, inner.notify(&route, &headers, &body)).await {
        Ok(Ok(told)) => {
            tracing::debug!(receiver = %route.key, told, "webhook handled");
            StatusCode::OK
        }
        Ok(Err(error)) => {
            tracing::warn!(receiver = %route.key, %error, "webhook not handled");
            StatusCode::INTERNAL_SERVER_ERROR
        }
        Err(_) => StatusCode::GATEWAY_TIMEOUT,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_path_is_the_digest_of_token_name_and_namespace() {
        // printf %s tokenrecvns | sha256sum
        let want = hex(&Sha256::digest(b"tokenrecvns"));
        assert_eq!(path_digest("token", &Key::new("ns", "recv")), want);
    }

    #[test]
    fn filters_see_headers_and_a_json_body() {
        let mut headers = HeaderMap::new();
        headers.insert("x-github-event", "push".parse().unwrap());
        let request = request_variable(&headers, br#"{"ref": "refs/heads/main"}"#);
        let expression = Expression::compile(
            "req.body.ref == 'refs/heads/main' && req.headers['x-github-event'] == 'push'",
        )
        .unwrap();
        assert_eq!(expression.holds(&[("req", &request)]), Ok(true));
        assert_eq!(request_variable(&headers, b"not json")["body"], Value::Null);
    }
}
