//! The whole control plane between an API server in miniature and a real client.

mod removal;

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use futures::StreamExt;
use http::{Method, Request, Response};
use parking_lot::Mutex;
use serde_json::{Value, json};
use serin_xds::client::{AdsClient, AdsClientConfig, BackoffRange, Deliveries, Endpoint, Interest};
use serin_xds::pb::envoy::config::core::v3::Node;
use serin_xds::{FEATURE_VHDS, Refusal, ResourceType};
use tokio::sync::{broadcast, watch};
use tokio_util::sync::CancellationToken;

use super::{Control, ControlOptions};
use crate::ledger::Liveness;

/// Lists, watches and status writes of any kind; nothing else.
#[derive(Clone)]
struct Api(Arc<Store>);

struct Store {
    objects: Mutex<BTreeMap<(String, String), Value>>,
    events: broadcast::Sender<(String, Value)>,
    /// Statuses as written last, by `plural/name`.
    statuses: watch::Sender<BTreeMap<String, Value>>,
}

impl Api {
    fn new() -> Self {
        let store = Store {
            objects: Mutex::default(),
            events: broadcast::channel(256).0,
            statuses: watch::channel(BTreeMap::new()).0,
        };
        Self(Arc::new(store))
    }

    fn client(&self) -> kube::Client {
        let api = self.clone();
        serin_kit::client::over_service(tower::service_fn(move |request: Request<kube::client::Body>| {
            let api = api.clone();
            async move { Ok::<_, Infallible>(api.answer(request).await) }
        }))
    }

    async fn answer(&self, request: Request<kube::client::Body>) -> Response<Body> {
        let path: Vec<String> = request
            .uri()
            .path()
            .trim_matches('/')
            .split('/')
            .map(String::from)
            .collect();
        if request.method() == Method::PATCH {
            let [.., plural, name, _status] = path.as_slice() else {
                panic!("{path:?}")
            };
            let patch = request.into_body().collect_bytes().await.unwrap();
            let patch: Value = serde_json::from_slice(&patch).unwrap();
            let object = self
                .0
                .objects
                .lock()
                .get_mut(&(plural.clone(), name.clone()))
                .map(|object| {
                    object["status"] = patch["status"].clone();
                    object.clone()
                });
            let Some(object) = object else {
                let status =
                    json!({"kind": "Status", "status": "Failure", "reason": "NotFound", "code": 404});
                return Response::builder()
                    .status(404)
                    .body(Body::from(status.to_string()))
                    .unwrap();
            };
            self.0.statuses.send_modify(|all| {
                all.insert(format!("{plural}/{name}"), patch["status"].clone());
            });
            let _ = self
                .0
                .events
                .send((plural.clone(), json!({"type": "MODIFIED", "object": object})));
            return Response::new(Body::from(object.to_string()));
        }
        let plural = path.last().unwrap().clone();
        if request.uri().query().unwrap_or_default().contains("watch=true") {
            let events = tokio_stream::wrappers::BroadcastStream::new(self.0.events.subscribe());
            let lines = events.filter_map(move |event| {
                let (kind, event) = event.unwrap();
                let line = (kind == plural).then(|| Ok::<_, Infallible>(format!("{event}\n")));
                async move { line }
            });
            return Response::new(Body::from_stream(lines));
        }
        let items: Vec<Value> = {
            let objects = self.0.objects.lock();
            objects
                .iter()
                .filter(|((kind, _), _)| *kind == plural)
                .map(|(_, object)| object.clone())
                .collect()
        };
        let list =
            json!({"kind": "List", "apiVersion": "v1", "metadata": {"resourceVersion": "1"}, "items": items});
        Response::new(Body::from(list.to_string()))
    }

    fn put(&self, plural: &str, api_version: &str, kind: &str, name: &str, generation: i64, rest: Value) {
        let mut object = json!({
            "apiVersion": api_version, "kind": kind,
            "metadata": {"name": name, "namespace": "prod", "generation": generation, "uid": name, "resourceVersion": "1"},
        });
        for (key, value) in rest.as_object().unwrap() {
            if key == "metadata" {
                for (key, value) in value.as_object().unwrap() {
                    object["metadata"][key] = value.clone();
                }
            } else {
                object[key] = value.clone();
            }
        }
        let key = (plural.to_string(), name.to_string());
        let old = self.0.objects.lock().insert(key, object.clone());
        if let Some(status) = old.as_ref().and_then(|old| old.get("status")) {
            object["status"] = status.clone();
        }
        let kind = if old.is_some() { "MODIFIED" } else { "ADDED" };
        let _ = self
            .0
            .events
            .send((plural.to_string(), json!({"type": kind, "object": object})));
    }

    fn virtual_service(&self, generation: i64, http: Value) {
        let spec = json!({"spec": {"hosts": ["reviews"], "http": http}});
        self.put(
            "virtualservices",
            "networking.istio.io/v1",
            "VirtualService",
            "reviews",
            generation,
            spec,
        );
    }

    async fn condition(&self, type_: &str, status: &str, part_of_message: &str) {
        let mut statuses = self.0.statuses.subscribe();
        let found = statuses.wait_for(|all| {
            let conditions = all
                .get("virtualservices/reviews")
                .and_then(|status| status["conditions"].as_array());
            conditions.is_some_and(|conditions| {
                conditions.iter().any(|condition| {
                    condition["type"] == type_
                        && condition["status"] == status
                        && condition["message"].as_str().unwrap().contains(part_of_message)
                })
            })
        });
        if tokio::time::timeout(Duration::from_secs(20), found)
            .await
            .is_err()
        {
            panic!(
                "no condition {type_}={status} with {part_of_message:?}: {:?}",
                self.0.statuses.borrow()
            );
        }
    }
}

fn world() -> Api {
    let api = Api::new();
    let service = json!({"spec": {"clusterIP": "10.96.0.10", "clusterIPs": ["10.96.0.10"], "selector": {"app": "reviews"},
        "ports": [{"name": "http", "port": 9080, "targetPort": 9080, "protocol": "TCP"}]}});
    api.put("services", "v1", "Service", "reviews", 0, service);
    let slice = json!({
        "metadata": {"labels": {"kubernetes.io/service-name": "reviews"}},
        "addressType": "IPv4", "ports": [{"name": "http", "port": 9080, "protocol": "TCP"}],
        "endpoints": [{"addresses": ["10.1.0.7"], "conditions": {"ready": true}}],
    });
    api.put(
        "endpointslices",
        "discovery.k8s.io/v1",
        "EndpointSlice",
        "reviews-1",
        0,
        slice,
    );
    api.virtual_service(1, json!([{"route": [{"destination": {"host": "reviews"}}]}]));
    api
}

fn proxy(socket: &Path, cancel: &CancellationToken) -> (AdsClient, tokio::task::JoinHandle<()>) {
    let config = AdsClientConfig {
        endpoint: Endpoint::Unix(socket.into()),
        node: Node {
            id: "sidecar~10.1.0.9~productpage.prod~prod.svc.cluster.local".into(),
            client_features: vec![FEATURE_VHDS.into()],
            ..Node::default()
        },
        backoff: BackoffRange {
            initial: Duration::from_millis(10),
            max: Duration::from_millis(50),
        },
    };
    let (client, deliveries) = AdsClient::spawn(config, cancel.clone());
    for resource_type in ResourceType::ALL {
        client.set_interest(resource_type, Interest::all());
    }
    (client, tokio::spawn(obey(deliveries)))
}

/// Takes everything but hosts with a header of the wrong sort.
async fn obey(mut deliveries: Deliveries) {
    while let Some(delivery) = deliveries.recv().await {
        let bad = delivery
            .upserted
            .iter()
            .filter(|one| one.body.windows(9).any(|part| part == b"x-refused"));
        let refusals = bad
            .map(|one| Refusal::new(one.name.clone(), "header x-refused is not for you"))
            .collect();
        delivery.answer(refusals);
    }
}

struct Running {
    control: tokio::task::JoinHandle<Result<(), super::ControlError>>,
    ledger: crate::ledger::Ledger,
    cancel: CancellationToken,
}

fn start(api: &Api, socket: &Path) -> Running {
    let control = Control::new(ControlOptions {
        socket: Some(socket.into()),
        ..ControlOptions::default()
    });
    let ledger = control.ledger().clone();
    let cancel = CancellationToken::new();
    let control = tokio::spawn(control.run(api.client(), cancel.clone()));
    Running {
        control,
        ledger,
        cancel,
    }
}

impl Running {
    async fn until(&self, generation: i64, matches: impl Fn(&Liveness) -> bool) -> Liveness {
        let mut watch = self.ledger.watch("VirtualService/prod/reviews", generation);
        match tokio::time::timeout(Duration::from_secs(20), watch.wait_for(matches)).await {
            Ok(found) => found.unwrap().clone(),
            Err(elapsed) => panic!(
                "{elapsed}: {:?}",
                self.ledger.report("VirtualService/prod/reviews")
            ),
        }
    }

    async fn stop(self) {
        self.cancel.cancel();
        self.control.await.unwrap().unwrap();
    }
}

#[tokio::test]
async fn a_rule_becomes_live_and_its_status_says_how_live_refused_or_invalid_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("xds.sock");
    let api = world();
    let running = start(&api, &socket);
    let cancel = CancellationToken::new();
    let (client, consumer) = proxy(&socket, &cancel);
    let live = running.until(1, |seen| seen.needed == 1 && seen.is_live()).await;
    assert_eq!(live.to_string(), "1/1 proxies");
    api.condition("Live", "True", "1/1 proxies").await;
    api.condition("Accepted", "True", "").await;
    api.condition("ResolvedRefs", "True", "").await;

    let route = |header: &str| json!([{"headers": {"request": {"set": {header: "1"}}}, "route": [{"destination": {"host": "reviews"}}]}]);
    api.virtual_service(2, route("x-taken"));
    running.until(2, Liveness::is_live).await;

    api.virtual_service(3, route("x-refused"));
    running.until(3, |seen| seen.refused == 1).await;
    api.condition(
        "Live",
        "False",
        "VHDS 9080/reviews.prod.svc.cluster.local:9080: header x-refused is not for you",
    )
    .await;

    let nothing = json!([{"route": [
        {"destination": {"host": "reviews"}, "weight": 0}, {"destination": {"host": "reviews"}, "weight": 0}]}]);
    api.virtual_service(4, nothing);
    running.until(4, |seen| seen.rejected.is_some()).await;
    api.condition("Accepted", "False", "spec.http[0]").await;

    api.virtual_service(5, json!([{"route": [{"destination": {"host": "nowhere"}}]}]));
    running.until(5, Liveness::is_live).await;
    api.condition("ResolvedRefs", "False", "nowhere").await;
    api.condition("Live", "True", "1/1 proxies").await;
    cancel.cancel();
    client.join().await;
    consumer.await.unwrap();
    running.stop().await;
    assert!(!socket.exists(), "the socket is removed");
}

#[tokio::test]
async fn after_a_restart_a_proxy_that_holds_everything_counts_without_being_sent_anything() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("xds.sock");
    let api = world();
    let running = start(&api, &socket);
    let cancel = CancellationToken::new();
    let config = AdsClientConfig {
        endpoint: Endpoint::Unix(socket.clone()),
        node: Node {
            id: "sidecar~10.1.0.9~a.prod~x".into(),
            client_features: vec![FEATURE_VHDS.into()],
            ..Node::default()
        },
        backoff: BackoffRange {
            initial: Duration::from_millis(10),
            max: Duration::from_millis(50),
        },
    };
    let (client, mut deliveries) = AdsClient::spawn(config, cancel.clone());
    for resource_type in ResourceType::ALL {
        client.set_interest(resource_type, Interest::all());
    }
    let (received, mut count) = watch::channel((0, 0));
    let consumer = tokio::spawn(async move {
        while let Some(delivery) = deliveries.recv().await {
            received.send_modify(|(messages, resources)| {
                *messages += 1;
                *resources += delivery.upserted.len() + delivery.removed.len();
            });
            delivery.accept();
        }
    });
    running.until(1, |seen| seen.needed == 1 && seen.is_live()).await;
    // All five types have been answered before the restart.
    let before = *count.wait_for(|(messages, _)| *messages >= 5).await.unwrap();
    running.stop().await;

    let running = start(&api, &socket);
    let live = running.until(1, |seen| seen.needed == 1 && seen.is_live()).await;
    assert_eq!(live.acked, 1);
    count
        .wait_for(|(messages, _)| *messages >= before.0 + 5)
        .await
        .unwrap();
    assert_eq!(count.borrow().1, before.1, "what is held was sent again");
    cancel.cancel();
    client.join().await;
    consumer.await.unwrap();
    running.stop().await;
}

#[tokio::test]
async fn without_a_listener_or_with_a_path_that_cannot_be_used_it_says_so() {
    let api = world();
    let error = Control::new(ControlOptions::default())
        .run(api.client(), CancellationToken::new())
        .await;
    assert!(
        error
            .unwrap_err()
            .to_string()
            .contains("socket path or an address")
    );
    let options = ControlOptions {
        socket: Some("/proc/no/such/xds.sock".into()),
        ..ControlOptions::default()
    };
    let error = Control::new(options)
        .run(api.client(), CancellationToken::new())
        .await;
    assert!(error.unwrap_err().to_string().contains("/proc/no/such/xds.sock"));
}

#[tokio::test]
async fn it_stops_although_a_proxy_streams_metrics() {
    use serin_xds::pb::envoy::service::metrics::v3::metrics_service_client::MetricsServiceClient;
    use serin_xds::pb::envoy::service::metrics::v3::{
        StreamMetricsMessage, stream_metrics_message::Identifier,
    };

    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("xds.sock");
    let api = world();
    let running = start(&api, &socket);
    let cancel = CancellationToken::new();
    let (client, consumer) = proxy(&socket, &cancel);
    running.until(1, Liveness::is_live).await;
    let channel = serin_xds::client::channel(&Endpoint::Unix(socket)).await.unwrap();
    let node = Node {
        id: "sidecar~10.1.0.9~a.prod~x".into(),
        ..Node::default()
    };
    let first = StreamMetricsMessage {
        identifier: Some(Identifier { node: Some(node) }),
        ..StreamMetricsMessage::default()
    };
    let messages = futures::stream::iter([first]).chain(futures::stream::pending());
    let call = tokio::spawn(async move { MetricsServiceClient::new(channel).stream_metrics(messages).await });
    let stopped = tokio::time::timeout(Duration::from_secs(20), running.stop()).await;
    assert!(
        stopped.is_ok(),
        "the metrics stream kept the control plane from stopping"
    );
    call.await.unwrap().ok();
    cancel.cancel();
    client.join().await;
    consumer.await.unwrap();
}
