//! Both ends over real sockets.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use serin_xds::client::{AdsClient, AdsClientConfig, BackoffRange, Deliveries, Endpoint, Interest};
use serin_xds::pb::envoy::config::core::v3::Node;
use serin_xds::pb::envoy::service::discovery::v3::aggregated_discovery_service_server::{
    AggregatedDiscoveryService, AggregatedDiscoveryServiceServer,
};
use serin_xds::pb::envoy::service::discovery::v3::{DeltaDiscoveryRequest, DiscoveryRequest};
use serin_xds::server::{AdsServer, Client, ClientId, Event, Options, Source};
use serin_xds::{Change, Refusal, Resource, ResourceType};
use tokio::net::UnixListener;
use tokio::sync::mpsc;
use tokio_stream::wrappers::UnixListenerStream;
use tokio_util::sync::CancellationToken;

use crate::support::resource;

/// A control plane with one view for everybody.
#[derive(Default)]
pub(crate) struct OneView {
    pub(crate) view: Mutex<BTreeMap<(ResourceType, Arc<str>), Arc<Resource>>>,
    pub(crate) clients: Mutex<BTreeMap<ClientId, Arc<Client>>>,
    pub(crate) events: Mutex<Option<mpsc::UnboundedSender<Event>>>,
}

impl OneView {
    pub(crate) fn new() -> (Arc<Self>, mpsc::UnboundedReceiver<Event>) {
        let (sender, receiver) = mpsc::unbounded_channel();
        let source = Self::default();
        *source.events.lock() = Some(sender);
        (Arc::new(source), receiver)
    }

    pub(crate) fn apply(&self, changes: Vec<Change>) {
        let mut view = self.view.lock();
        for change in &changes {
            match change {
                Change::Upsert(one) => drop(view.insert((one.resource_type, one.name.clone()), one.clone())),
                Change::Remove(ty, name) => drop(view.remove(&(*ty, name.clone()))),
            }
        }
        for client in self.clients.lock().values() {
            client.apply(changes.clone());
        }
    }
}

impl Source for OneView {
    fn connect(&self, client: Arc<Client>) {
        let view = self.view.lock();
        client.load(view.values().cloned());
        self.clients.lock().insert(client.id(), client);
    }

    fn observe(&self, _: ClientId, events: &[Event]) {
        if let Some(sender) = self.events.lock().as_ref() {
            for event in events {
                let _ = sender.send(event.clone());
            }
        }
    }

    fn disconnect(&self, client: ClientId) {
        self.clients.lock().remove(&client);
    }
}

pub(crate) struct Server {
    cancel: CancellationToken,
    ads: AdsServer,
    task: tokio::task::JoinHandle<()>,
}

impl Server {
    pub(crate) fn start(source: Arc<OneView>, socket: &std::path::Path) -> Self {
        let cancel = CancellationToken::new();
        let ads = AdsServer::new(source, Options::default(), cancel.clone());
        let incoming = UnixListenerStream::new(UnixListener::bind(socket).unwrap());
        let router = tonic::transport::Server::builder().add_service(ads.service());
        let shutdown = cancel.clone().cancelled_owned();
        let task = tokio::spawn(async move {
            router
                .serve_with_incoming_shutdown(incoming, shutdown)
                .await
                .unwrap();
        });
        Self { cancel, ads, task }
    }

    pub(crate) async fn stop(self) {
        self.cancel.cancel();
        self.ads.drained().await;
        self.task.await.unwrap();
    }
}

fn client(socket: &std::path::Path, cancel: &CancellationToken) -> (AdsClient, Deliveries) {
    let config = AdsClientConfig {
        endpoint: Endpoint::Unix(socket.into()),
        node: Node {
            id: "sidecar~10.0.0.1~a.b~c".into(),
            ..Node::default()
        },
        backoff: BackoffRange {
            initial: Duration::from_millis(10),
            max: Duration::from_millis(50),
        },
    };
    AdsClient::spawn(config, cancel.clone())
}

async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    match tokio::time::timeout(Duration::from_secs(20), future).await {
        Ok(value) => value,
        Err(elapsed) => panic!("{what}: {elapsed}"),
    }
}

async fn event(
    events: &mut mpsc::UnboundedReceiver<Event>,
    what: &str,
    matches: impl Fn(&Event) -> bool,
) -> Event {
    within(what, async {
        loop {
            let event = events.recv().await.expect("the source lives");
            if matches(&event) {
                return event;
            }
        }
    })
    .await
}

#[tokio::test]
async fn acceptances_and_refusals_reach_the_server_by_name_and_a_reconnect_sends_only_the_difference() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("xds.sock");
    let (source, mut events) = OneView::new();
    let host = |name: &str, content: &str| Change::Upsert(resource(ResourceType::VirtualHost, name, content));
    source.apply(vec![host("80/a", "1"), host("80/b", "1")]);
    let server = Server::start(source.clone(), &socket);
    let cancel = CancellationToken::new();
    let (client, mut deliveries) = client(&socket, &cancel);
    client.set_interest(ResourceType::VirtualHost, Interest::all());

    let first = within("first delivery", deliveries.recv()).await.unwrap();
    assert_eq!(first.upserted.len(), 2);
    first.answer(vec![Refusal::new("80/b", "no such filter")]);
    let refused = event(&mut events, "refusal", |event| {
        matches!(event, Event::Refused(..))
    })
    .await;
    let Event::Refused(resource, reason) = refused else {
        unreachable!()
    };
    assert_eq!((&*resource.name, &*reason), ("80/b", "no such filter"));

    source.apply(vec![host("80/b", "2")]);
    let second = within("corrected delivery", deliveries.recv()).await.unwrap();
    assert_eq!(second.upserted.len(), 1);
    second.accept();
    event(
        &mut events,
        "acceptance",
        |event| matches!(event, Event::Held(one) if &*one.name == "80/b"),
    )
    .await;

    // The control plane restarts with a view that differs in one host.
    server.stop().await;
    source.apply(vec![host("80/a", "3")]);
    std::fs::remove_file(&socket).unwrap();
    let server = Server::start(source.clone(), &socket);
    let third = within("delivery after the restart", deliveries.recv())
        .await
        .unwrap();
    let names: Vec<_> = third.upserted.iter().map(|one| one.name.as_ref()).collect();
    assert_eq!(names, ["80/a"]);
    third.accept();
    event(
        &mut events,
        "acceptance",
        |event| matches!(event, Event::Held(one) if &*one.name == "80/a"),
    )
    .await;

    let mut connection = client.connection();
    let state = within("state", connection.wait_for(|state| state.connected))
        .await
        .unwrap()
        .clone();
    assert_eq!(state.streams, 2);
    cancel.cancel();
    within("client", client.join()).await;
    server.stop().await;
}

#[tokio::test]
async fn a_delivery_that_is_dropped_unanswered_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("xds.sock");
    let (source, mut events) = OneView::new();
    source.apply(vec![Change::Upsert(resource(ResourceType::Cluster, "c", "1"))]);
    let server = Server::start(source, &socket);
    let cancel = CancellationToken::new();
    let (client, mut deliveries) = client(&socket, &cancel);
    client.set_interest(ResourceType::Cluster, Interest::all());
    drop(within("delivery", deliveries.recv()).await);
    event(&mut events, "refusal", |event| {
        matches!(event, Event::Refused(..))
    })
    .await;
    cancel.cancel();
    within("client", client.join()).await;
    server.stop().await;
}

#[tokio::test]
async fn a_client_waits_for_a_control_plane_that_is_not_there_yet() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("xds.sock");
    let cancel = CancellationToken::new();
    let (client, mut deliveries) = client(&socket, &cancel);
    client.set_interest(ResourceType::Cluster, Interest::all());
    let mut connection = client.connection();
    within("failure", connection.wait_for(|state| state.last_error.is_some()))
        .await
        .unwrap();
    let (source, _events) = OneView::new();
    let server = Server::start(source, &socket);
    let delivery = within("delivery", deliveries.recv()).await.unwrap();
    assert!(
        delivery.upserted.is_empty(),
        "an empty view is answered all the same"
    );
    delivery.accept();
    cancel.cancel();
    within("client", client.join()).await;
    server.stop().await;
}

/// A server of the older variant alone.
struct WorldOnly(AdsServer);

#[tonic::async_trait]
impl AggregatedDiscoveryService for WorldOnly {
    type StreamAggregatedResourcesStream =
        <AdsServer as AggregatedDiscoveryService>::StreamAggregatedResourcesStream;
    type DeltaAggregatedResourcesStream =
        <AdsServer as AggregatedDiscoveryService>::DeltaAggregatedResourcesStream;

    async fn stream_aggregated_resources(
        &self,
        request: tonic::Request<tonic::Streaming<DiscoveryRequest>>,
    ) -> Result<tonic::Response<Self::StreamAggregatedResourcesStream>, tonic::Status> {
        self.0.stream_aggregated_resources(request).await
    }

    async fn delta_aggregated_resources(
        &self,
        _: tonic::Request<tonic::Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<tonic::Response<Self::DeltaAggregatedResourcesStream>, tonic::Status> {
        Err(tonic::Status::unimplemented(
            "method DeltaAggregatedResources not implemented",
        ))
    }
}

#[tokio::test]
async fn a_server_that_knows_only_the_state_of_the_world_is_followed_all_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("xds.sock");
    let (source, mut events) = OneView::new();
    let cluster = |name: &str, content: &str| Change::Upsert(resource(ResourceType::Cluster, name, content));
    let route = |content: &str| Change::Upsert(resource(ResourceType::Route, "80", content));
    source.apply(vec![cluster("a", "1"), cluster("b", "1"), route("1")]);
    let cancel = CancellationToken::new();
    let ads = AdsServer::new(source.clone(), Options::default(), cancel.clone());
    let incoming = UnixListenerStream::new(UnixListener::bind(&socket).unwrap());
    let service = AggregatedDiscoveryServiceServer::new(WorldOnly(ads.clone()));
    let router = tonic::transport::Server::builder().add_service(service);
    let shutdown = cancel.clone().cancelled_owned();
    let server = tokio::spawn(async move {
        router
            .serve_with_incoming_shutdown(incoming, shutdown)
            .await
            .unwrap()
    });

    let stop = CancellationToken::new();
    let (client, mut deliveries) = client(&socket, &stop);
    client.set_interest(ResourceType::Cluster, Interest::all());
    client.set_interest(ResourceType::Route, Interest::names(["80"]));
    let first = within("clusters", deliveries.recv()).await.unwrap();
    assert_eq!(
        (first.resource_type, first.upserted.len()),
        (ResourceType::Cluster, 2)
    );
    first.accept();
    let routes = within("routes", deliveries.recv()).await.unwrap();
    assert_eq!(
        (routes.resource_type, routes.upserted.len()),
        (ResourceType::Route, 1)
    );
    routes.accept();
    event(
        &mut events,
        "route held",
        |event| matches!(event, Event::Held(one) if &*one.name == "80"),
    )
    .await;

    // What did not change is not delivered again, although the server sends it; what is absent is gone.
    source.apply(vec![
        cluster("c", "bad"),
        Change::Remove(ResourceType::Cluster, "b".into()),
    ]);
    let (mut upserted, mut removed) = (Vec::new(), Vec::new());
    while upserted.is_empty() || removed.is_empty() {
        let next = within("the difference", deliveries.recv()).await.unwrap();
        upserted.extend(next.upserted.iter().map(|one| one.name.to_string()));
        removed.extend(next.removed.iter().map(ToString::to_string));
        let refusals = next
            .upserted
            .iter()
            .map(|one| Refusal::new(one.name.clone(), "no"))
            .collect();
        next.answer(refusals);
    }
    assert!(upserted.iter().all(|name| name == "c"), "{upserted:?}");
    assert_eq!(removed, ["b"]);
    event(
        &mut events,
        "refusal",
        |event| matches!(event, Event::Refused(one, _) if &*one.name == "c"),
    )
    .await;
    stop.cancel();
    within("client", client.join()).await;
    cancel.cancel();
    ads.drained().await;
    server.await.unwrap();
}
