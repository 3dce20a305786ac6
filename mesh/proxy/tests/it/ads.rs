//! A control plane with one view for everybody, on a Unix socket: what Envoy and serin-proxy are both driven by.
//!
//! The benchmark includes this file as well; it depends on nothing of the tests.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use parking_lot::Mutex;
use serin_xds::server::{AdsServer, Client, ClientId, Event, Options, Source};
use serin_xds::{Change, Resource, ResourceType};
use tokio::net::UnixListener;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

/// The view, and who holds it.
#[derive(Default)]
pub(crate) struct OneView {
    view: Mutex<BTreeMap<(ResourceType, Arc<str>), Arc<Resource>>>,
    clients: Mutex<BTreeMap<ClientId, Arc<Client>>>,
    events: Mutex<Option<mpsc::UnboundedSender<(ClientId, Event)>>>,
}

impl OneView {
    pub(crate) fn new() -> (Arc<Self>, mpsc::UnboundedReceiver<(ClientId, Event)>) {
        let (sender, events) = mpsc::unbounded_channel();
        let source = Arc::new(Self::default());
        *source.events.lock() = Some(sender);
        (source, events)
    }

    pub(crate) fn put<M: prost::Message>(&self, resource_type: ResourceType, name: &str, message: &M) {
        self.put_all([Resource::new(resource_type, name, message, [])]);
    }

    /// Changes that belong together.
    pub(crate) fn put_all(&self, resources: impl IntoIterator<Item = Resource>) {
        let resources: Vec<Arc<Resource>> = resources.into_iter().map(Arc::new).collect();
        let mut view = self.view.lock();
        for resource in &resources {
            view.insert((resource.resource_type, resource.name.clone()), resource.clone());
        }
        for client in self.clients.lock().values() {
            client.apply(resources.iter().cloned().map(Change::Upsert));
        }
    }

    /// What nobody should have any more.
    #[allow(dead_code)] // not by the benchmark
    pub(crate) fn remove(&self, resource_type: ResourceType, name: &str) {
        let name: Arc<str> = name.into();
        let mut view = self.view.lock();
        view.remove(&(resource_type, name.clone()));
        for client in self.clients.lock().values() {
            client.apply([Change::Remove(resource_type, name.clone())]);
        }
    }
}

impl Source for OneView {
    fn connect(&self, client: Arc<Client>) {
        let view = self.view.lock();
        client.load(view.values().cloned());
        self.clients.lock().insert(client.id(), client);
    }

    fn observe(&self, client: ClientId, events: &[Event]) {
        if let Some(sender) = self.events.lock().as_ref() {
            for event in events {
                let _ = sender.send((client, event.clone()));
            }
        }
    }

    fn disconnect(&self, client: ClientId) {
        self.clients.lock().remove(&client);
    }
}

/// The server; it ends when dropped.
pub(crate) struct Ads {
    pub(crate) source: Arc<OneView>,
    pub(crate) events: mpsc::UnboundedReceiver<(ClientId, Event)>,
    /// Where it is, as an address of the bootstrap file.
    place: String,
    cancel: CancellationToken,
    task: tokio::task::JoinHandle<()>,
}

impl Ads {
    pub(crate) fn start(socket: &Path) -> std::io::Result<Self> {
        let listener = UnixListener::bind(socket)?;
        let incoming = futures::stream::poll_fn(move |cx| {
            listener
                .poll_accept(cx)
                .map(|accepted| Some(accepted.map(|(stream, _)| stream)))
        });
        let place = format!("{{ pipe: {{ path: \"{}\" }} }}", socket.display());
        Ok(Self::serve(incoming, place))
    }

    /// Serves these connections, which are made to `place`.
    pub(crate) fn serve<C>(
        incoming: impl futures::Stream<Item = std::io::Result<C>> + Send + 'static,
        place: String,
    ) -> Self
    where
        C: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
        C: tonic::transport::server::Connected,
    {
        let (source, events) = OneView::new();
        let cancel = CancellationToken::new();
        let ads = AdsServer::new(source.clone(), Options::default(), cancel.clone());
        let router = tonic::transport::Server::builder().add_service(ads.service());
        let task = tokio::spawn(async move {
            let _ = router.serve_with_incoming(incoming).await;
        });
        Self {
            source,
            events,
            place,
            cancel,
            task,
        }
    }

    /// A bootstrap file that follows this server: the same for both proxies, but for how HTTP/2 is asked of a cluster.
    pub(crate) fn bootstrap(&self, node: &str, envoy: bool) -> String {
        let http2 = if envoy {
            "typed_extension_protocol_options: { envoy.extensions.upstreams.http.v3.HttpProtocolOptions: { \"@type\": \
             type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions, explicit_http_config: { \
             http2_protocol_options: {} } } }"
        } else {
            "http2_protocol_options: {}"
        };
        format!(
            "node: {{ id: {node}, cluster: mesh }}
dynamic_resources:
  ads_config: {{ api_type: DELTA_GRPC, transport_api_version: V3, grpc_services: [ {{ envoy_grpc: {{ cluster_name: xds }} }} ] }}
  cds_config: {{ resource_api_version: V3, ads: {{}} }}
  lds_config: {{ resource_api_version: V3, ads: {{}} }}
static_resources:
  clusters:
  - name: xds
    type: STATIC
    connect_timeout: 5s
    {http2}
    load_assignment:
      cluster_name: xds
      endpoints: [ {{ lb_endpoints: [ {{ endpoint: {{ address: {} }} }} ] }} ]
",
            self.place
        )
    }
}

impl Drop for Ads {
    fn drop(&mut self) {
        self.cancel.cancel();
        self.task.abort();
    }
}
