//! Driven by a control plane over a real socket: readiness, per-resource refusals, virtual hosts one by one, the last
//! good configuration, metrics streamed back.

use std::path::Path;
use std::sync::Arc;

use serin_proxy::control::xds::follow;
use serin_proxy::metrics::push::Pusher;
use serin_xds::ResourceType;
use serin_xds::client::Endpoint;
use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::envoy::config::route::v3 as route;
use serin_xds::pb::envoy::service::metrics::v3::metrics_service_server::{
    MetricsService, MetricsServiceServer,
};
use serin_xds::pb::envoy::service::metrics::v3::{StreamMetricsMessage, StreamMetricsResponse};
use serin_xds::server::{AdsServer, ClientId, Event, Options};
use tokio::net::UnixListener;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::ads::OneView;
use crate::fixture::*;

#[derive(Clone)]
struct Intake(mpsc::UnboundedSender<StreamMetricsMessage>);

#[tonic::async_trait]
impl MetricsService for Intake {
    async fn stream_metrics(
        &self,
        request: tonic::Request<tonic::Streaming<StreamMetricsMessage>>,
    ) -> Result<tonic::Response<StreamMetricsResponse>, tonic::Status> {
        let mut stream = request.into_inner();
        while let Some(message) = stream.message().await? {
            let _ = self.0.send(message);
        }
        Ok(tonic::Response::new(StreamMetricsResponse {}))
    }
}

struct ControlPlane {
    source: Arc<OneView>,
    events: mpsc::UnboundedReceiver<(ClientId, Event)>,
    metrics: mpsc::UnboundedReceiver<StreamMetricsMessage>,
    task: tokio::task::JoinHandle<()>,
    cancel: CancellationToken,
}

impl ControlPlane {
    fn start(socket: &Path) -> Self {
        let (source, events) = OneView::new();
        let cancel = CancellationToken::new();
        let ads = AdsServer::new(source.clone(), Options::default(), cancel.clone());
        let (sender, metrics) = mpsc::unbounded_channel();
        let listener = UnixListener::bind(socket).unwrap();
        let incoming = futures::stream::poll_fn(move |cx| {
            listener
                .poll_accept(cx)
                .map(|accepted| Some(accepted.map(|(stream, _)| stream)))
        });
        let router = tonic::transport::Server::builder()
            .add_service(ads.service())
            .add_service(MetricsServiceServer::new(Intake(sender)));
        let task = tokio::spawn(async move {
            let _ = router.serve_with_incoming(incoming).await;
        });
        Self {
            source,
            events,
            metrics,
            task,
            cancel,
        }
    }

    /// Waits until the proxy holds the present version of a resource.
    async fn held(&mut self, name: &str) {
        soon(&format!("{name} acknowledged"), async {
            loop {
                if let Some((_, Event::Held(resource))) = self.events.recv().await
                    && &*resource.name == name
                {
                    return;
                }
            }
        })
        .await;
    }

    /// Waits until the proxy refuses a resource; the reason.
    async fn refused(&mut self, name: &str) -> String {
        soon(&format!("{name} refused"), async {
            loop {
                if let Some((_, Event::Refused(resource, reason))) = self.events.recv().await
                    && &*resource.name == name
                {
                    return reason.to_string();
                }
            }
        })
        .await
    }

    /// The whole configuration of a one-route gateway.
    fn serve(&self, backend: std::net::SocketAddr) {
        let source = &self.source;
        source.put(ResourceType::Cluster, "c", &eds_cluster("c"));
        source.put(
            ResourceType::Endpoints,
            "c",
            &assignment("c", &[(backend, "w;n;s;r;k")]),
        );
        source.put(
            ResourceType::Listener,
            "l",
            &listener_of(
                "l",
                core::TrafficDirection::Outbound,
                vec![http_chain(&manager("80"))],
            ),
        );
        let config = route::RouteConfiguration {
            name: "80".into(),
            vhds: Some(route::Vhds::default()),
            ..Default::default()
        };
        source.put(ResourceType::Route, "80", &config);
        source.put(
            ResourceType::VirtualHost,
            "80/all",
            &host("all", "*", vec![prefix_route("/", to_cluster("c"))]),
        );
    }
}

impl Drop for ControlPlane {
    fn drop(&mut self) {
        self.cancel.cancel();
        self.task.abort();
    }
}

async fn ready(harness: &Harness) {
    soon("readiness", async {
        while !harness.proxy.is_ready() {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

#[tokio::test]
async fn the_proxy_is_ready_once_the_first_full_configuration_is_live_and_takes_one_virtual_host_at_a_time() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("xds.sock");
    let harness = Harness::start();
    let mut control = ControlPlane::start(&socket);
    let backend = Backend::named("b").await;
    control.serve(backend.address);
    let cancel = CancellationToken::new();
    assert!(!harness.proxy.is_ready());
    let follower = tokio::spawn(follow(
        harness.proxy.clone(),
        Endpoint::Unix(socket),
        cancel.clone(),
    ));
    ready(&harness).await;
    let at = harness.proxy.listener_address("l").unwrap();
    assert_eq!(get(at, "/").await.2, "b");

    let other = Backend::named("other").await;
    control.source.put(ResourceType::Cluster, "d", &eds_cluster("d"));
    control.source.put(
        ResourceType::Endpoints,
        "d",
        &assignment("d", &[(other.address, "")]),
    );
    control.source.put(
        ResourceType::VirtualHost,
        "80/all",
        &host("all", "*", vec![prefix_route("/", to_cluster("d"))]),
    );
    control.held("80/all").await;
    control.held("80/all").await;
    // Acknowledged means live: the very next request goes there.
    assert_eq!(get(at, "/").await.2, "other");
    cancel.cancel();
    soon("the follower's end", follower).await.unwrap();
}

#[tokio::test]
async fn one_refused_resource_is_named_and_the_last_good_one_goes_on() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("xds.sock");
    let harness = Harness::start();
    let mut control = ControlPlane::start(&socket);
    let backend = Backend::named("b").await;
    control.serve(backend.address);
    let cancel = CancellationToken::new();
    let follower = tokio::spawn(follow(
        harness.proxy.clone(),
        Endpoint::Unix(socket),
        cancel.clone(),
    ));
    ready(&harness).await;
    let at = harness.proxy.listener_address("l").unwrap();
    let mut bad = host("all", "*", vec![prefix_route("/", to_cluster("c"))]);
    bad.rate_limits.push(route::RateLimit::default());
    control.source.put(ResourceType::VirtualHost, "80/all", &bad);
    let reason = control.refused("80/all").await;
    assert!(reason.contains("rate_limits"), "{reason}");
    assert_eq!(get(at, "/").await.2, "b");
    // Correcting it is taken.
    let mut good = host("all", "*", vec![prefix_route("/", to_cluster("c"))]);
    good.include_request_attempt_count = true;
    control.source.put(ResourceType::VirtualHost, "80/all", &good);
    control.held("80/all").await;
    cancel.cancel();
    soon("the follower's end", follower).await.unwrap();
}

#[tokio::test]
async fn without_its_control_plane_the_proxy_serves_on_and_catches_up_when_it_is_back() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("xds.sock");
    let harness = Harness::start();
    let control = ControlPlane::start(&socket);
    let backend = Backend::named("b").await;
    control.serve(backend.address);
    let cancel = CancellationToken::new();
    let follower = tokio::spawn(follow(
        harness.proxy.clone(),
        Endpoint::Unix(socket.clone()),
        cancel.clone(),
    ));
    ready(&harness).await;
    let at = harness.proxy.listener_address("l").unwrap();
    drop(control);
    std::fs::remove_file(&socket).unwrap();
    assert_eq!(get(at, "/").await.2, "b");
    let second = Backend::named("second").await;
    let mut control = ControlPlane::start(&socket);
    control.serve(second.address);
    control.held("c").await;
    soon("the new endpoint", async {
        while get(at, "/").await.2 != "second" {
            tokio::task::yield_now().await;
        }
    })
    .await;
    assert!(harness.proxy.is_ready());
    cancel.cancel();
    soon("the follower's end", follower).await.unwrap();
}

#[tokio::test]
async fn measurements_are_streamed_to_the_control_plane_with_the_nodes_identity() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("xds.sock");
    let harness = Harness::start();
    let mut control = ControlPlane::start(&socket);
    let backend = Backend::named("b").await;
    harness.cluster("c", &[backend.address]).await;
    let at = harness.serve(vec![prefix_route("/", to_cluster("c"))]).await;
    let cancel = CancellationToken::new();
    let (own, shards) = harness.proxy.shards();
    let pusher = Pusher {
        endpoint: Endpoint::Unix(socket),
        node: harness.proxy.node.clone(),
        own,
        shards,
        rerouted: harness.proxy.rerouted(),
    };
    let task = tokio::spawn(pusher.run(cancel.clone()));
    let first = soon("the first message", control.metrics.recv()).await.unwrap();
    assert_eq!(first.identifier.unwrap().node.unwrap().id, harness.proxy.node.id);
    for _ in 0..3 {
        get(at, "/").await;
    }
    let total = soon("the counter", async {
        loop {
            let message = control.metrics.recv().await.unwrap();
            let family = message
                .envoy_metrics
                .into_iter()
                .find(|family| family.name() == "istio_requests_total");
            if let Some(family) = family {
                let value = family.metric[0].counter.as_ref().unwrap().value();
                if value >= 3.0 {
                    return (value, family.metric[0].label.clone());
                }
            }
        }
    })
    .await;
    assert_eq!(total.0, 3.0);
    assert!(
        total
            .1
            .iter()
            .any(|pair| pair.name() == "destination_workload" && pair.value() == "reviews-v1")
    );
    // A tick with nothing new tells nothing; a change of routes does, since what came before is of the routes before.
    let table = route::RouteConfiguration {
        name: "new".into(),
        ..Default::default()
    };
    harness.put(ResourceType::Route, "new", &table).await;
    soon("an empty report", async {
        while !control.metrics.recv().await.unwrap().envoy_metrics.is_empty() {}
    })
    .await;
    cancel.cancel();
    soon("the end of the pusher", task).await.unwrap();
}

#[tokio::test]
async fn a_gateway_that_nothing_is_meant_for_is_ready_once_it_has_been_told_so() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("xds.sock");
    let harness = Harness::start();
    let control = ControlPlane::start(&socket);
    control.source.put(ResourceType::Cluster, "c", &eds_cluster("c"));
    control
        .source
        .put(ResourceType::Endpoints, "c", &assignment("c", &[]));
    let cancel = CancellationToken::new();
    let follower = tokio::spawn(follow(
        harness.proxy.clone(),
        Endpoint::Unix(socket),
        cancel.clone(),
    ));
    ready(&harness).await;
    cancel.cancel();
    soon("the follower's end", follower).await.unwrap();
}

#[tokio::test]
async fn a_listener_whose_routes_have_no_virtual_host_yet_does_not_hold_readiness_up() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("xds.sock");
    let harness = Harness::start();
    let control = ControlPlane::start(&socket);
    let source = &control.source;
    source.put(
        ResourceType::Listener,
        "l",
        &listener_of(
            "l",
            core::TrafficDirection::Outbound,
            vec![http_chain(&manager("80"))],
        ),
    );
    let config = route::RouteConfiguration {
        name: "80".into(),
        vhds: Some(route::Vhds::default()),
        ..Default::default()
    };
    source.put(ResourceType::Route, "80", &config);
    let cancel = CancellationToken::new();
    let follower = tokio::spawn(follow(
        harness.proxy.clone(),
        Endpoint::Unix(socket),
        cancel.clone(),
    ));
    ready(&harness).await;
    let at = harness.proxy.listener_address("l").unwrap();
    assert_eq!(get(at, "/").await.0, 404);
    cancel.cancel();
    soon("the follower's end", follower).await.unwrap();
}
