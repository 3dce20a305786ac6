//! The server's shell: one task per stream, which reads requests and minds deadlines. Responses are produced wherever a
//! change arrives (a request, or a change of the view) without waking anybody in between.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use envoy_types::pb::envoy::config::core::v3::Node;
use envoy_types::pb::envoy::service::discovery::v3::aggregated_discovery_service_server::{
    AggregatedDiscoveryService, AggregatedDiscoveryServiceServer,
};
use envoy_types::pb::envoy::service::discovery::v3::{
    DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, DiscoveryResponse,
};
use parking_lot::Mutex;
use tokio::sync::{Notify, mpsc};
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::{Request, Status, Streaming};
use tracing::{debug, info};

use super::connection::{Connection, Event, Options, Response};
use super::{delta, sotw};
use crate::FEATURE_VHDS;
use crate::resource::{Change, Resource};

/// Responses that may wait for the transport. At most one per type is outstanding, so this is never reached.
const RESPONSES: usize = 8;

/// Largest request that is read: the versions of a large mesh, stated on reconnect.
const MAX_REQUEST_BYTES: usize = 16 * 1024 * 1024;

/// How long a client may take for its first request.
const FIRST_REQUEST_TIMEOUT: Duration = Duration::from_secs(30);

/// Identifies a stream, unique in the life of the process.
pub type ClientId = u64;

/// Who knows the views of clients and wants to know what becomes of them.
pub trait Source: Send + Sync + 'static {
    /// A client has connected. It is answered once [`Client::load`] has been called, now or later.
    fn connect(&self, client: Arc<Client>);

    /// What happened on a client's connection, in order. Called with the connection locked: it must be quick and must
    /// not call the client.
    fn observe(&self, client: ClientId, events: &[Event]);

    /// The client is gone.
    fn disconnect(&self, client: ClientId);
}

/// A connected client.
pub struct Client {
    id: ClientId,
    node: Node,
    source: Arc<dyn Source>,
    started: Instant,
    stream: Mutex<Stream>,
    /// Wakes the stream's task to look at its deadline again, or to end.
    wake: Notify,
}

struct Stream {
    connection: Connection,
    sink: Sink,
    closed: Option<Status>,
}

/// Where responses go, in the variant that the client speaks.
enum Sink {
    Delta(mpsc::Sender<Result<DeltaDiscoveryResponse, Status>>),
    Sotw(mpsc::Sender<Result<DiscoveryResponse, Status>>),
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Client")
            .field("id", &self.id)
            .field("node", &self.node.id)
            .finish_non_exhaustive()
    }
}

impl Client {
    /// Identifies the stream.
    pub fn id(&self) -> ClientId {
        self.id
    }

    /// Who the client says it is.
    pub fn node(&self) -> &Node {
        &self.node
    }

    /// Gives the client its whole view; once.
    pub fn load(&self, view: impl IntoIterator<Item = Arc<Resource>>) {
        self.with(|connection| connection.load(view));
    }

    /// Changes of the view that belong together. They are on their way when this returns, as far as the client's
    /// acknowledgements allow.
    pub fn apply(&self, changes: impl IntoIterator<Item = Change>) {
        self.with(|connection| connection.apply(changes));
    }

    /// Ends the stream; the client will come back.
    pub fn close(&self, status: Status) {
        self.stream.lock().closed.get_or_insert(status);
        self.wake.notify_one();
    }

    fn with<T>(&self, change: impl FnOnce(&mut Connection) -> T) -> T {
        let now = self.started.elapsed();
        let mut stream = self.stream.lock();
        let deadline = stream.connection.deadline();
        let result = change(&mut stream.connection);
        stream.pump(now);
        let events = stream.connection.take_events();
        if !events.is_empty() {
            self.source.observe(self.id, &events);
        }
        if stream.connection.deadline() != deadline || stream.closed.is_some() {
            self.wake.notify_one();
        }
        result
    }

    /// When the stream's task must act even if nothing happens; the error if it must end.
    fn deadline(&self) -> Result<Option<Instant>, Status> {
        let stream = self.stream.lock();
        match &stream.closed {
            Some(status) => Err(status.clone()),
            None => Ok(stream
                .connection
                .deadline()
                .map(|deadline| self.started + deadline)),
        }
    }

    /// Says why the stream ends, if the transport still listens.
    fn fail(&self, status: Status) {
        match &self.stream.lock().sink {
            Sink::Delta(sink) => drop(sink.try_send(Err(status))),
            Sink::Sotw(sink) => drop(sink.try_send(Err(status))),
        }
    }
}

impl Stream {
    fn pump(&mut self, now: Duration) {
        while let Some(response) = self.connection.poll(now) {
            if !self.sink.send(&mut self.connection, &response) {
                self.closed
                    .get_or_insert(Status::unavailable("the transport does not take responses"));
                return;
            }
        }
    }
}

impl Sink {
    /// Whether the transport took it.
    fn send(&self, connection: &mut Connection, response: &Response) -> bool {
        match self {
            Self::Delta(sink) => sink.try_send(Ok(delta::response(response))).is_ok(),
            Self::Sotw(sink) => match sotw::response(connection, response) {
                Some(message) => sink.try_send(Ok(message)).is_ok(),
                None => true,
            },
        }
    }
}

/// The aggregated discovery service over a [`Source`].
#[derive(Clone)]
pub struct AdsServer {
    source: Arc<dyn Source>,
    options: Options,
    tasks: TaskTracker,
    cancel: CancellationToken,
    next_id: Arc<AtomicU64>,
}

impl std::fmt::Debug for AdsServer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AdsServer")
            .field("options", &self.options)
            .finish_non_exhaustive()
    }
}

impl AdsServer {
    /// A server whose streams end when `cancel` is cancelled.
    pub fn new(source: Arc<dyn Source>, options: Options, cancel: CancellationToken) -> Self {
        Self {
            source,
            options,
            tasks: TaskTracker::new(),
            cancel,
            next_id: Arc::new(AtomicU64::new(1)),
        }
    }

    /// The gRPC service, for a tonic router.
    pub fn service(&self) -> AggregatedDiscoveryServiceServer<Self> {
        AggregatedDiscoveryServiceServer::new(self.clone()).max_decoding_message_size(MAX_REQUEST_BYTES)
    }

    /// Waits until all streams have ended, after cancellation.
    pub async fn drained(&self) {
        self.tasks.close();
        self.tasks.wait().await;
    }

    fn spawn<R: WireRequest>(&self, mut requests: Streaming<R>, sink: Sink) {
        let server = self.clone();
        self.tasks.spawn(Box::pin(async move {
            let first = tokio::select! {
                () = server.cancel.cancelled() => return,
                first = tokio::time::timeout(FIRST_REQUEST_TIMEOUT, requests.message()) => first,
            };
            let Ok(Ok(Some(mut first))) = first else { return };
            let node = first.take_node();
            let named = node.is_some();
            let client = Arc::new(server.client(node.unwrap_or_default(), sink));
            if !named {
                client.fail(Status::invalid_argument(
                    "the first request on a stream must carry a node",
                ));
                return;
            }
            server.source.connect(client.clone());
            let _gone = Gone(client.clone());
            info!(client = client.id, node = client.node.id, "client connected");
            let end = server.serve(&client, first, requests).await;
            info!(
                client = client.id,
                node = client.node.id,
                reason = end.message(),
                "client disconnected"
            );
            client.fail(end);
        }));
    }

    fn client(&self, node: Node, sink: Sink) -> Client {
        let ours = node.client_features.iter().any(|feature| feature == FEATURE_VHDS);
        // Envoy waits for the endpoints of a changed cluster; ours does not.
        let options = Options {
            endpoints_follow_clusters: !ours,
            ..self.options
        };
        Client {
            id: self.next_id.fetch_add(1, Ordering::Relaxed),
            node,
            source: self.source.clone(),
            started: Instant::now(),
            stream: Mutex::new(Stream {
                connection: Connection::new(options),
                sink,
                closed: None,
            }),
            wake: Notify::new(),
        }
    }

    async fn serve<R: WireRequest>(&self, client: &Client, first: R, mut requests: Streaming<R>) -> Status {
        client.with(|connection| first.apply(connection));
        loop {
            let deadline = match client.deadline() {
                Ok(deadline) => deadline,
                Err(status) => return status,
            };
            let timer = async {
                match deadline {
                    Some(deadline) => tokio::time::sleep_until(deadline).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = self.cancel.cancelled() => return Status::unavailable("the control plane is shutting down"),
                () = client.wake.notified() => {}
                () = timer => client.with(|_| ()),
                request = requests.message() => match request {
                    Ok(Some(request)) => {
                        debug!(client = client.id, request = %request.describe(), "request");
                        client.with(|connection| request.apply(connection));
                    }
                    Ok(None) => return Status::ok("closed by the client"),
                    Err(status) => return status,
                },
            }
        }
    }
}

/// Tells the source that a client is gone, however its task ends.
struct Gone(Arc<Client>);

impl Drop for Gone {
    fn drop(&mut self) {
        self.0.source.disconnect(self.0.id);
    }
}

/// The requests of both variants, as the shell sees them.
trait WireRequest: Send + 'static {
    fn take_node(&mut self) -> Option<Node>;
    fn apply(&self, connection: &mut Connection);
    fn describe(&self) -> String;
}

impl WireRequest for DeltaDiscoveryRequest {
    fn take_node(&mut self) -> Option<Node> {
        self.node.take()
    }

    fn apply(&self, connection: &mut Connection) {
        delta::receive(connection, self);
    }

    fn describe(&self) -> String {
        let short = self.type_url.rsplit('.').next().unwrap_or_default();
        match &self.error_detail {
            Some(status) => format!(
                "{short} nonce {:?} refused: {}",
                self.response_nonce, status.message
            ),
            None => format!(
                "{short} nonce {:?} +{} -{}",
                self.response_nonce,
                self.resource_names_subscribe.len(),
                self.resource_names_unsubscribe.len()
            ),
        }
    }
}

impl WireRequest for DiscoveryRequest {
    fn take_node(&mut self) -> Option<Node> {
        self.node.take()
    }

    fn apply(&self, connection: &mut Connection) {
        sotw::receive(connection, self);
    }

    fn describe(&self) -> String {
        let short = self.type_url.rsplit('.').next().unwrap_or_default();
        match &self.error_detail {
            Some(status) => format!(
                "{short} nonce {:?} refused: {}",
                self.response_nonce, status.message
            ),
            None => format!(
                "{short} nonce {:?}, {} names",
                self.response_nonce,
                self.resource_names.len()
            ),
        }
    }
}

#[tonic::async_trait]
impl AggregatedDiscoveryService for AdsServer {
    type StreamAggregatedResourcesStream = ReceiverStream<Result<DiscoveryResponse, Status>>;
    type DeltaAggregatedResourcesStream = ReceiverStream<Result<DeltaDiscoveryResponse, Status>>;

    async fn stream_aggregated_resources(
        &self,
        request: Request<Streaming<DiscoveryRequest>>,
    ) -> Result<tonic::Response<Self::StreamAggregatedResourcesStream>, Status> {
        let (sink, responses) = mpsc::channel(RESPONSES);
        self.spawn(request.into_inner(), Sink::Sotw(sink));
        Ok(tonic::Response::new(ReceiverStream::new(responses)))
    }

    async fn delta_aggregated_resources(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<tonic::Response<Self::DeltaAggregatedResourcesStream>, Status> {
        let (sink, responses) = mpsc::channel(RESPONSES);
        self.spawn(request.into_inner(), Sink::Delta(sink));
        Ok(tonic::Response::new(ReceiverStream::new(responses)))
    }
}
