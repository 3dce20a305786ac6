//! The gRPC side: Envoy's `MetricsService`.

use serin_xds::pb::envoy::service::metrics::v3::metrics_service_server::{
    MetricsService, MetricsServiceServer,
};
use serin_xds::pb::envoy::service::metrics::v3::{StreamMetricsMessage, StreamMetricsResponse};
use tonic::{Request, Response, Status, Streaming};
use tracing::debug;

use super::Telemetry;
use super::intake::Baseline;

/// Largest message that is read.
const MAX_MESSAGE_BYTES: usize = 16 * 1024 * 1024;

impl Telemetry {
    /// The gRPC service, for a tonic router.
    pub fn service(&self) -> MetricsServiceServer<Self> {
        MetricsServiceServer::new(self.clone()).max_decoding_message_size(MAX_MESSAGE_BYTES)
    }
}

/// Parks the baseline of a proxy when its stream ends, however it ends.
struct Stream {
    telemetry: Telemetry,
    id: u64,
    node: String,
    baseline: Baseline,
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.telemetry.park(
            self.id,
            std::mem::take(&mut self.node),
            std::mem::take(&mut self.baseline),
        );
    }
}

#[tonic::async_trait]
impl MetricsService for Telemetry {
    async fn stream_metrics(
        &self,
        request: Request<Streaming<StreamMetricsMessage>>,
    ) -> Result<Response<StreamMetricsResponse>, Status> {
        let mut messages = request.into_inner();
        let first = messages
            .message()
            .await?
            .ok_or_else(|| Status::invalid_argument("the stream is empty"))?;
        let node = first
            .identifier
            .as_ref()
            .and_then(|identifier| identifier.node.as_ref());
        let node = node.ok_or_else(|| Status::invalid_argument("the first message must carry the node"))?;
        let (id, baseline) = self.resume(&node.id);
        debug!(node = node.id, "metrics stream opened");
        let mut stream = Stream {
            telemetry: self.clone(),
            id,
            node: node.id.clone(),
            baseline,
        };
        self.add(stream.baseline.take(&first.envoy_metrics));
        while let Some(message) = messages.message().await? {
            self.add(stream.baseline.take(&message.envoy_metrics));
        }
        Ok(Response::new(StreamMetricsResponse {}))
    }
}
