//! The client's shell: one task that keeps the stream open and moves messages between it and [`ClientState`].

use std::hash::{BuildHasher, Hasher};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use envoy_types::pb::envoy::config::core::v3::Node;
use envoy_types::pb::envoy::service::discovery::v3::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use envoy_types::pb::envoy::service::discovery::v3::{
    DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, DiscoveryResponse,
};
use envoy_types::pb::envoy::service::secret::v3::secret_discovery_service_client::SecretDiscoveryServiceClient;
use futures::stream::{FuturesUnordered, StreamExt};
use parking_lot::Mutex;
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;
use tonic::{Code, Status, Streaming};
use tracing::{debug, info, warn};

use super::backoff::{Backoff, BackoffRange};
use super::state::{ClientState, Incoming, Interest, NameChanges, ProtocolError, Receipt, Received};
use super::transport::{Endpoint, EndpointError, channel};
use crate::refusal::Refusal;
use crate::resource::ResourceType;

/// Largest response that is read: a large mesh's clusters from a server that sends them all at once.
const MAX_RESPONSE_BYTES: usize = 64 * 1024 * 1024;

/// Deliveries that may wait for the consumer; beyond it the stream is not read, which holds the server back.
const DELIVERIES: usize = 8;

/// Requests that may wait for the transport.
const REQUESTS: usize = 64;

/// How long a server may take to open the stream. Servers that answer lazily do so with the first response.
const OPEN_TIMEOUT: Duration = Duration::from_secs(20);

/// Longest wait between attempts to reach a Unix socket: the control plane is on this machine, an attempt costs next to
/// nothing, and a rollout waits for the proxy's return.
pub const MAX_UNIX_WAIT: Duration = Duration::from_secs(2);

/// How long a stream must have lived for the next failure to be a first one again. A server that answers and breaks off at
/// once is waited for longer and longer, as one that does not answer.
pub const STABLE_AFTER: Duration = Duration::from_secs(10);

/// Which service is asked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Service {
    /// The aggregated one (ADS), incrementally where the server knows how.
    #[default]
    Aggregated,
    /// That of secrets alone (SDS), as `api_config_source` says it.
    Secrets {
        /// Incrementally (`DELTA_GRPC`); else state of the world (`GRPC`).
        delta: bool,
    },
}

/// How an [`AdsClient`] finds and addresses its control plane.
#[derive(Clone, Debug)]
pub struct AdsClientConfig {
    /// Where the control plane listens.
    pub endpoint: Endpoint,
    /// Who this client is; sent with the first request of each stream.
    pub node: Node,
    /// Waits between attempts; over a Unix socket at most [`MAX_UNIX_WAIT`].
    pub backoff: BackoffRange,
}

/// How the connection to the control plane stands.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ConnectionState {
    /// A stream is open and the server has answered on it.
    pub connected: bool,
    /// Streams that have been opened since the start.
    pub streams: u64,
    /// Why the last one ended or could not be opened.
    pub last_error: Option<Arc<str>>,
}

/// A change to the configuration, to be answered.
///
/// Dropping it unanswered refuses all of it: nobody can say that it took effect.
#[derive(Debug)]
pub struct Delivery {
    /// Type of all resources in it.
    pub resource_type: ResourceType,
    /// New or changed resources. Empty together with `removed` when the server says that nothing differs.
    pub upserted: Vec<Received>,
    /// Names of resources that exist no more (or never did, for names that were asked for).
    pub removed: Vec<Arc<str>>,
    /// What the server calls the state that this is of (`system_version_info`, `version_info`); it may say nothing.
    pub version: Box<str>,
    reply: Option<oneshot::Sender<Vec<Refusal>>>,
}

impl Delivery {
    /// Everything took effect.
    pub fn accept(self) {
        self.answer(Vec::new());
    }

    /// Everything but `refusals` took effect; what is refused keeps its last good version.
    pub fn answer(mut self, refusals: Vec<Refusal>) {
        if let Some(reply) = self.reply.take() {
            let _ = reply.send(refusals); // the client may have been shut down meanwhile
        }
    }
}

/// Where an [`AdsClient`] puts its deliveries, in the order in which they arrived.
pub type Deliveries = mpsc::Receiver<Delivery>;

/// A handle to the client's task; see [`AdsClient::spawn`].
#[derive(Debug)]
pub struct AdsClient {
    shared: Arc<Shared>,
    state: watch::Receiver<ConnectionState>,
    task: JoinHandle<()>,
}

/// What was said about a type's interest since the client's task looked: the last whole one, and names after it.
#[derive(Debug, Default)]
struct Said {
    whole: Option<Interest>,
    names: NameChanges,
}

#[derive(Debug, Default)]
struct Shared {
    said: Mutex<[Said; ResourceType::COUNT]>,
    changed: Notify,
}

impl AdsClient {
    /// Starts the client's task, which ends when `cancel` is cancelled or the deliveries are dropped.
    pub fn spawn(config: AdsClientConfig, cancel: CancellationToken) -> (Self, Deliveries) {
        Self::spawn_for(Service::Aggregated, config, cancel)
    }

    /// The same for another service.
    pub fn spawn_for(
        service: Service,
        config: AdsClientConfig,
        cancel: CancellationToken,
    ) -> (Self, Deliveries) {
        let shared = Arc::new(Shared::default());
        let (deliveries, receiver) = mpsc::channel(DELIVERIES);
        let (state_sender, state) = watch::channel(ConnectionState::default());
        let worker = Worker {
            client: ClientState::new(config.node),
            endpoint: config.endpoint,
            service,
            shared: shared.clone(),
            deliveries,
            state: state_sender,
            cancel,
        };
        let mut backoff = config.backoff;
        if matches!(worker.endpoint, Endpoint::Unix(_)) {
            backoff.max = backoff.max.min(MAX_UNIX_WAIT);
        }
        let task = tokio::spawn(Box::pin(worker.run(Backoff::new(backoff))));
        (Self { shared, state, task }, receiver)
    }

    /// States what is wanted of a type from now on, in place of what was wanted before. Returns at once.
    ///
    /// What is no longer wanted is forgotten without a delivery: the caller knows.
    pub fn set_interest(&self, resource_type: ResourceType, interest: Interest) {
        self.shared.said.lock()[resource_type.index()] = Said {
            whole: Some(interest),
            names: NameChanges::default(),
        };
        self.shared.changed.notify_one();
    }

    /// States which names are wanted too from now on, and which are not any more. Costs what has changed, where
    /// [`Self::set_interest`] compares all names.
    pub fn change_interest(&self, resource_type: ResourceType, changes: NameChanges) {
        if !changes.is_empty() {
            self.shared.said.lock()[resource_type.index()]
                .names
                .merge(changes);
            self.shared.changed.notify_one();
        }
    }

    /// Asks for one more resource by name (on demand), beside what is wanted already.
    pub fn want(&self, resource_type: ResourceType, name: impl Into<Arc<str>>) {
        let mut changes = NameChanges::default();
        changes.add(name);
        self.change_interest(resource_type, changes);
    }

    /// How the connection stands, now and from now on.
    pub fn connection(&self) -> watch::Receiver<ConnectionState> {
        self.state.clone()
    }

    /// Waits for the end of the client's task, after its cancellation.
    pub async fn join(self) {
        let _ = self.task.await; // a panic in it has been reported by the runtime already
    }
}

/// A verdict on its way back from the consumer.
type Verdict = Pin<Box<dyn Future<Output = (Receipt, Vec<Refusal>)> + Send>>;

/// Why a stream ended.
#[derive(Debug, thiserror::Error)]
enum StreamEnd {
    #[error(transparent)]
    Connect(#[from] EndpointError),
    #[error("the control plane ended the stream: {0}")]
    Status(#[source] Box<Status>),
    #[error("the control plane closed the stream")]
    Closed,
    #[error("the control plane did not open the stream within {} s", OPEN_TIMEOUT.as_secs())]
    OpenTimeout,
    #[error("this client was shut down")]
    Shutdown,
}

impl From<Status> for StreamEnd {
    fn from(status: Status) -> Self {
        Self::Status(Box::new(status))
    }
}

struct Worker {
    client: ClientState,
    endpoint: Endpoint,
    service: Service,
    shared: Arc<Shared>,
    deliveries: mpsc::Sender<Delivery>,
    state: watch::Sender<ConnectionState>,
    cancel: CancellationToken,
}

impl Worker {
    async fn run(mut self, mut backoff: Backoff) {
        loop {
            let end = self.connect_and_follow(&mut backoff).await;
            let message: Arc<str> = chain(&end).into();
            self.state.send_modify(|state| {
                state.connected = false;
                state.last_error = Some(message.clone());
            });
            if matches!(end, StreamEnd::Shutdown) {
                return;
            }
            let wait = backoff.next(random());
            info!(control_plane = %self.endpoint, error = %message, retry_in_ms = wait.as_millis(), "not connected");
            tokio::select! {
                () = self.cancel.cancelled() => return,
                () = tokio::time::sleep(wait) => {}
            }
        }
    }

    async fn connect_and_follow(&mut self, backoff: &mut Backoff) -> StreamEnd {
        let channel = tokio::select! {
            () = self.cancel.cancelled() => return StreamEnd::Shutdown,
            channel = channel(&self.endpoint) => match channel {
                Ok(channel) => channel,
                Err(error) => return error.into(),
            },
        };
        if self.service == (Service::Secrets { delta: false }) {
            return self.follow::<Sotw>(channel, backoff).await;
        }
        match self.follow::<Delta>(channel.clone(), backoff).await {
            StreamEnd::Status(status) if status.code() == Code::Unimplemented => {
                debug!(control_plane = %self.endpoint, "no incremental variant; falling back to state of the world");
                self.follow::<Sotw>(channel, backoff).await
            }
            end => end,
        }
    }

    /// Opens a stream and serves it until it ends.
    async fn follow<V: Variant>(&mut self, channel: Channel, backoff: &mut Backoff) -> StreamEnd {
        let mut verdicts = FuturesUnordered::new();
        let end = match Box::pin(self.serve::<V>(channel, backoff, &mut verdicts)).await {
            Ok(never) => match never {},
            Err(end) => end,
        };
        // What the consumer still works on must be settled before the next stream states what is held.
        while !self.deliveries.is_closed() {
            tokio::select! {
                () = self.cancel.cancelled() => break,
                verdict = verdicts.next() => match verdict {
                    Some((receipt, refusals)) => { V::settle(&mut self.client, &receipt, refusals); }
                    None => break,
                },
            }
        }
        end
    }

    async fn serve<V: Variant>(
        &mut self,
        channel: Channel,
        backoff: &mut Backoff,
        verdicts: &mut FuturesUnordered<Verdict>,
    ) -> Result<std::convert::Infallible, StreamEnd> {
        self.client.connected();
        let (requests, outgoing) = mpsc::channel(REQUESTS);
        let shared = self.shared.clone();
        let cancel = self.cancel.clone();
        // The first requests are queued before the stream is opened: some servers open it with their first response.
        self.ask::<V>(&requests).await?;
        let mut opening = Box::pin(V::open(self.service, channel, outgoing));
        let deadline = tokio::time::sleep(OPEN_TIMEOUT);
        tokio::pin!(deadline);
        let mut responses = loop {
            tokio::select! {
                () = cancel.cancelled() => return Err(StreamEnd::Shutdown),
                () = &mut deadline => return Err(StreamEnd::OpenTimeout),
                () = shared.changed.notified() => self.ask::<V>(&requests).await?,
                stream = &mut opening => break stream?,
            }
        };
        self.state.send_modify(|state| state.streams += 1);
        let stable_at = tokio::time::Instant::now() + STABLE_AFTER;
        let mut answered = false;
        loop {
            if answered && tokio::time::Instant::now() >= stable_at {
                backoff.reset();
            }
            tokio::select! {
                () = cancel.cancelled() => return Err(StreamEnd::Shutdown),
                () = self.deliveries.closed() => return Err(StreamEnd::Shutdown),
                () = shared.changed.notified() => self.ask::<V>(&requests).await?,
                Some((receipt, refusals)) = verdicts.next() => {
                    for refusal in &refusals {
                        warn!(resource = %refusal.name, reason = %refusal.reason, "refused");
                    }
                    let request = V::settle(&mut self.client, &receipt, refusals);
                    requests.send(request).await.map_err(|_| StreamEnd::Closed)?;
                }
                // Reading goes on only while the consumer keeps up.
                response = responses.message(), if verdicts.len() < DELIVERIES => {
                    // Also of a stream that ends after a quiet hour.
                    if answered && tokio::time::Instant::now() >= stable_at {
                        backoff.reset();
                    }
                    let response = response?.ok_or(StreamEnd::Closed)?;
                    answered = true;
                    self.state.send_if_modified(|state| !std::mem::replace(&mut state.connected, true));
                    match V::receive(&mut self.client, response) {
                        Ok((incoming, receipt)) => {
                            let verdict = self.deliver(incoming, receipt).await?;
                            verdicts.push(verdict);
                        }
                        Err(error) => warn!(control_plane = %self.endpoint, %error, "response ignored"),
                    }
                }
            }
        }
    }

    async fn ask<V: Variant>(&mut self, requests: &mpsc::Sender<V::Request>) -> Result<(), StreamEnd> {
        let said = std::mem::take(&mut *self.shared.said.lock());
        for (resource_type, said) in ResourceType::ALL.into_iter().zip(said) {
            if let Some(interest) = said.whole {
                self.client.set_interest(resource_type, interest);
            }
            self.client.change_interest(resource_type, said.names);
        }
        while let Some(request) = V::next_request(&mut self.client) {
            requests.send(request).await.map_err(|_| StreamEnd::Closed)?;
        }
        Ok(())
    }

    async fn deliver(&mut self, incoming: Incoming, receipt: Receipt) -> Result<Verdict, StreamEnd> {
        let (reply, answer) = oneshot::channel();
        let delivery = Delivery {
            resource_type: receipt.resource_type,
            upserted: incoming.upserted,
            removed: incoming.removed,
            version: incoming.version,
            reply: Some(reply),
        };
        let names: Vec<_> = delivery.upserted.iter().map(|one| one.name.clone()).collect();
        self.deliveries
            .send(delivery)
            .await
            .map_err(|_| StreamEnd::Shutdown)?;
        Ok(Box::pin(async move {
            let refusals = answer.await.unwrap_or_else(|_| {
                names
                    .into_iter()
                    .map(|name| Refusal::new(name, "the proxy dropped it unprocessed"))
                    .collect()
            });
            (receipt, refusals)
        }))
    }
}

/// The two variants of the protocol, as the shell sees them.
trait Variant: Send + 'static {
    type Request: Send + 'static;
    type Response: Send + 'static;

    fn open(
        service: Service,
        channel: Channel,
        requests: mpsc::Receiver<Self::Request>,
    ) -> impl Future<Output = Result<Streaming<Self::Response>, Status>> + Send;
    fn next_request(client: &mut ClientState) -> Option<Self::Request>;
    fn receive(
        client: &mut ClientState,
        response: Self::Response,
    ) -> Result<(Incoming, Receipt), ProtocolError>;
    fn settle(client: &mut ClientState, receipt: &Receipt, refusals: Vec<Refusal>) -> Self::Request;
}

struct Delta;
struct Sotw;

impl Variant for Delta {
    type Request = DeltaDiscoveryRequest;
    type Response = DeltaDiscoveryResponse;

    async fn open(
        service: Service,
        channel: Channel,
        requests: mpsc::Receiver<Self::Request>,
    ) -> Result<Streaming<Self::Response>, Status> {
        let requests = ReceiverStream::new(requests);
        let response = match service {
            Service::Aggregated => {
                let client = AggregatedDiscoveryServiceClient::new(channel);
                let mut client = client.max_decoding_message_size(MAX_RESPONSE_BYTES);
                client.delta_aggregated_resources(requests).await?
            }
            Service::Secrets { .. } => {
                let client = SecretDiscoveryServiceClient::new(channel);
                let mut client = client.max_decoding_message_size(MAX_RESPONSE_BYTES);
                client.delta_secrets(requests).await?
            }
        };
        Ok(response.into_inner())
    }

    fn next_request(client: &mut ClientState) -> Option<Self::Request> {
        client.next_delta_request()
    }

    fn receive(
        client: &mut ClientState,
        response: Self::Response,
    ) -> Result<(Incoming, Receipt), ProtocolError> {
        client.receive_delta(response)
    }

    fn settle(client: &mut ClientState, receipt: &Receipt, refusals: Vec<Refusal>) -> Self::Request {
        client.settle_delta(receipt, refusals)
    }
}

impl Variant for Sotw {
    type Request = DiscoveryRequest;
    type Response = DiscoveryResponse;

    async fn open(
        service: Service,
        channel: Channel,
        requests: mpsc::Receiver<Self::Request>,
    ) -> Result<Streaming<Self::Response>, Status> {
        let requests = ReceiverStream::new(requests);
        let response = match service {
            Service::Aggregated => {
                let client = AggregatedDiscoveryServiceClient::new(channel);
                let mut client = client.max_decoding_message_size(MAX_RESPONSE_BYTES);
                client.stream_aggregated_resources(requests).await?
            }
            Service::Secrets { .. } => {
                let client = SecretDiscoveryServiceClient::new(channel);
                let mut client = client.max_decoding_message_size(MAX_RESPONSE_BYTES);
                client.stream_secrets(requests).await?
            }
        };
        Ok(response.into_inner())
    }

    fn next_request(client: &mut ClientState) -> Option<Self::Request> {
        client.next_sotw_request()
    }

    fn receive(
        client: &mut ClientState,
        response: Self::Response,
    ) -> Result<(Incoming, Receipt), ProtocolError> {
        client.receive_sotw(response)
    }

    fn settle(client: &mut ClientState, receipt: &Receipt, refusals: Vec<Refusal>) -> Self::Request {
        client.settle_sotw(receipt, refusals)
    }
}

/// Uniform in 0..1. The standard library's hash keys are the operating system's randomness; jitter needs no better.
fn random() -> f64 {
    let bits = std::collections::hash_map::RandomState::new()
        .build_hasher()
        .finish();
    (bits >> 11) as f64 / (1u64 << 53) as f64
}

/// An error and its causes in one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}
