//! The gRPC side: Envoy's `MetricsService`.

use serin_xds::pb::envoy::service::metrics::v3::metrics_service_server::{
    MetricsService, MetricsServiceServer,
};
use serin_xds::pb::envoy::service::metrics::v3::{StreamMetricsMessage, StreamMetricsResponse};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};
use tracing::debug;

use super::Telemetry;
use super::intake::Baseline;

/// Largest message that is read.
const MAX_MESSAGE_BYTES: usize = 16 * 1024 * 1024;

impl Telemetry {
    /// The gRPC service, for a tonic router. Its streams end when `cancel` is cancelled.
    pub fn service(&self, cancel: CancellationToken) -> MetricsServiceServer<Intake> {
        let intake = Intake {
            telemetry: self.clone(),
            cancel,
        };
        MetricsServiceServer::new(intake).max_decoding_message_size(MAX_MESSAGE_BYTES)
    }
}

/// The service's implementation.
#[derive(Debug)]
pub struct Intake {
    telemetry: Telemetry,
    cancel: CancellationToken,
}

/// Parks the baseline of a proxy when its stream ends, however it ends.
struct Stream {
    telemetry: Telemetry,
    id: u64,
    node: String,
    baseline: Baseline,
}

impl Stream {
    fn take(&mut self, message: &StreamMetricsMessage) {
        let from_ms = self.baseline.heard(super::now_ms());
        self.telemetry
            .add(self.baseline.take(&message.envoy_metrics), from_ms);
    }
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
impl MetricsService for Intake {
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
        let (id, baseline) = self.telemetry.resume(&node.id);
        debug!(node = node.id, "metrics stream opened");
        let mut stream = Stream {
            telemetry: self.telemetry.clone(),
            id,
            node: node.id.clone(),
            baseline,
        };
        stream.take(&first);
        loop {
            let message = tokio::select! {
                () = self.cancel.cancelled() => break,
                message = messages.message() => message?,
            };
            let Some(message) = message else { break };
            stream.take(&message);
        }
        Ok(Response::new(StreamMetricsResponse {}))
    }
}
