//! A control plane that does exactly what the test says: every request is shown to the test, and every response is the
//! test's. For what a server of ours never does.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use futures::Stream;
use prost::Message;
use serin_xds::ResourceType;
use serin_xds::pb::envoy::service::discovery::v3::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Resource};
use serin_xds::pb::google::protobuf as google;
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::mpsc;
use tonic::Status;

use crate::fixture::*;

#[path = "../../../xds/tests/it/scripted.rs"]
mod service;

/// One stream of a proxy.
pub(crate) struct Link {
    stream: service::Opened,
    seen: Vec<DeltaDiscoveryRequest>,
    nonce: u32,
}

/// A resource of a response.
pub(crate) fn resource<M: Message>(
    resource_type: ResourceType,
    name: &str,
    version: &str,
    message: &M,
) -> Resource {
    Resource {
        name: name.into(),
        version: version.into(),
        resource: Some(google::Any {
            type_url: resource_type.type_url().into(),
            value: message.encode_to_vec(),
        }),
        ..Default::default()
    }
}

impl Link {
    /// The next request that `wanted` is true of; those before it are kept in order.
    pub(crate) async fn request(
        &mut self,
        what: &str,
        wanted: impl Fn(&DeltaDiscoveryRequest) -> bool,
    ) -> DeltaDiscoveryRequest {
        if let Some(at) = self.seen.iter().position(&wanted) {
            return self.seen.remove(at);
        }
        soon(what, async {
            loop {
                let request = self
                    .stream
                    .requests
                    .message()
                    .await
                    .unwrap()
                    .unwrap_or_else(|| panic!("{what}: the proxy ended the stream"));
                if wanted(&request) {
                    return request;
                }
                self.seen.push(request);
            }
        })
        .await
    }

    /// Waits until `name` is subscribed to.
    pub(crate) async fn subscribed(
        &mut self,
        resource_type: ResourceType,
        name: &str,
    ) -> DeltaDiscoveryRequest {
        self.request(&format!("a subscription to {name}"), |request| {
            request.type_url == resource_type.type_url()
                && request.resource_names_subscribe.iter().any(|have| have == name)
        })
        .await
    }

    /// Whether there was a request about that type, of those seen so far that nobody has waited for.
    pub(crate) fn has_asked_for(&self, resource_type: ResourceType) -> bool {
        let url = resource_type.type_url();
        self.seen.iter().any(|request| request.type_url == url)
    }

    /// Waits until `name` is given up.
    pub(crate) async fn given_up(&mut self, resource_type: ResourceType, name: &str) {
        self.request(&format!("the end of the subscription to {name}"), |request| {
            request.type_url == resource_type.type_url()
                && request.resource_names_unsubscribe.iter().any(|have| have == name)
        })
        .await;
    }

    /// Sends a response as it is.
    pub(crate) fn raw(&self, response: DeltaDiscoveryResponse) {
        let _ = self.stream.responses.send(Ok(response));
    }

    /// Ends the stream with a status.
    pub(crate) fn fail(&self, status: Status) {
        let _ = self.stream.responses.send(Err(status));
    }

    /// Sends a response; its nonce.
    pub(crate) fn send(
        &mut self,
        resource_type: ResourceType,
        resources: Vec<Resource>,
        removed: &[&str],
    ) -> String {
        self.nonce += 1;
        let nonce = format!("n{}", self.nonce);
        self.raw(DeltaDiscoveryResponse {
            type_url: resource_type.type_url().into(),
            resources,
            removed_resources: removed.iter().map(|name| (*name).to_owned()).collect(),
            nonce: nonce.clone(),
            ..Default::default()
        });
        nonce
    }

    /// Waits for the answer to a response; what it refused.
    pub(crate) async fn answer(&mut self, nonce: &str) -> Option<String> {
        self.request(&format!("an answer to {nonce}"), |request| {
            request.response_nonce == nonce
        })
        .await
        .error_detail
        .map(|status| status.message)
    }

    /// Sends a response and waits until it has been taken.
    pub(crate) async fn put(&mut self, resource_type: ResourceType, resources: Vec<Resource>) {
        let nonce = self.send(resource_type, resources, &[]);
        assert_eq!(self.answer(&nonce).await, None);
    }
}

/// The server; it ends when dropped.
pub(crate) struct Scripted {
    streams: mpsc::UnboundedReceiver<service::Opened>,
    pub(crate) socket: PathBuf,
    task: tokio::task::JoinHandle<()>,
}

impl Scripted {
    pub(crate) fn start(directory: &Path) -> Self {
        let socket = directory.join("scripted.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let incoming = futures::stream::poll_fn(move |cx| {
            listener
                .poll_accept(cx)
                .map(|accepted| Some(accepted.map(|(stream, _)| stream)))
        });
        Self::serve(socket, incoming)
    }

    /// The same over TCP.
    pub(crate) async fn start_tcp() -> (Self, SocketAddr) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let incoming = tonic::transport::server::TcpIncoming::from(listener);
        (Self::serve(PathBuf::new(), incoming), address)
    }

    fn serve<S>(socket: PathBuf, incoming: impl Stream<Item = std::io::Result<S>> + Send + 'static) -> Self
    where
        S: tokio::io::AsyncRead
            + tokio::io::AsyncWrite
            + tonic::transport::server::Connected
            + Unpin
            + Send
            + 'static,
    {
        let (service, streams) = service::service(true);
        let router = tonic::transport::Server::builder().add_service(service);
        let task = tokio::spawn(async move {
            let _ = router.serve_with_incoming(incoming).await;
        });
        Self {
            streams,
            socket,
            task,
        }
    }

    /// The next stream of a proxy.
    pub(crate) async fn link(&mut self) -> Link {
        Link {
            stream: soon("a stream", self.streams.recv()).await.unwrap(),
            seen: Vec::new(),
            nonce: 0,
        }
    }
}

impl Drop for Scripted {
    fn drop(&mut self) {
        self.task.abort();
    }
}
