//! A server of the incremental protocol that does exactly what the test says: every stream is the test's, with the requests
//! on it and the responses. `serin-proxy`'s tests use this file as well; it depends on nothing of the tests.

use std::pin::Pin;

use futures::Stream;
use serin_xds::pb::envoy::service::discovery::v3::aggregated_discovery_service_server::{
    AggregatedDiscoveryService, AggregatedDiscoveryServiceServer,
};
use serin_xds::pb::envoy::service::discovery::v3::{
    DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, DiscoveryResponse,
};
use tokio::sync::mpsc;
use tonic::{Request, Response, Status, Streaming};

type Reply<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// What clients ask on a stream, and where answers go.
pub(crate) struct Opened {
    #[allow(dead_code)] // where it is only held, so that the stream stays open
    pub(crate) requests: Streaming<DeltaDiscoveryRequest>,
    /// The stream ends when it is dropped.
    pub(crate) responses: mpsc::UnboundedSender<Result<DeltaDiscoveryResponse, Status>>,
}

#[derive(Clone)]
struct Service {
    opened: mpsc::UnboundedSender<Opened>,
    opens: bool,
}

/// The service, and the streams that clients open; where it does not `open` them, clients wait.
pub(crate) fn service(
    opens: bool,
) -> (
    AggregatedDiscoveryServiceServer<impl AggregatedDiscoveryService>,
    mpsc::UnboundedReceiver<Opened>,
) {
    let (opened, streams) = mpsc::unbounded_channel();
    (
        AggregatedDiscoveryServiceServer::new(Service { opened, opens }),
        streams,
    )
}

#[tonic::async_trait]
impl AggregatedDiscoveryService for Service {
    type StreamAggregatedResourcesStream = Reply<DiscoveryResponse>;
    type DeltaAggregatedResourcesStream = Reply<DeltaDiscoveryResponse>;

    async fn stream_aggregated_resources(
        &self,
        _: Request<Streaming<DiscoveryRequest>>,
    ) -> Result<Response<Self::StreamAggregatedResourcesStream>, Status> {
        Err(Status::unimplemented("incremental only"))
    }

    async fn delta_aggregated_resources(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaAggregatedResourcesStream>, Status> {
        if !self.opens {
            std::future::pending::<()>().await;
        }
        let (responses, mut outgoing) = mpsc::unbounded_channel();
        let _ = self.opened.send(Opened {
            requests: request.into_inner(),
            responses,
        });
        Ok(Response::new(Box::pin(futures::stream::poll_fn(move |cx| {
            outgoing.poll_recv(cx)
        }))))
    }
}
