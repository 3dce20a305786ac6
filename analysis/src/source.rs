//! Where measurements come from.

use async_trait::async_trait;
use futures::stream::BoxStream;

use crate::sample::Sample;

/// Which two workloads to measure.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Query {
    /// Their namespace.
    pub namespace: String,
    /// Name of the Deployment under test, for example `podinfo` (Flagger calls it the target).
    pub canary_workload: String,
    /// Name of the Deployment that serves everybody else, for example `podinfo-primary`.
    pub primary_workload: String,
    /// The Service whose requests count, for example `podinfo`.
    pub service: String,
}

/// Why there are no measurements. Never a verdict: see [`crate::verdict::Verdict::NoData`].
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// The source cannot be reached or does not answer in time.
    #[error("metric source {source_name} is not available: {reason}")]
    Unavailable {
        /// Which source.
        source_name: String,
        /// What happened, without credentials.
        reason: String,
    },
    /// The source answered something that is not a measurement.
    #[error("metric source {source_name} answered something else than a number: {reason}")]
    NotANumber {
        /// Which source.
        source_name: String,
        /// What it answered.
        reason: String,
    },
}

/// Something that measures two workloads continuously.
///
/// The embedded mesh implements it with the counts that the proxies stream each second.
#[async_trait]
pub trait MetricSource: Send + Sync {
    /// Name for messages, for example `mesh`.
    fn name(&self) -> &str;

    /// Samples from now on, about one a second while there is traffic, each covering only what is new since the one
    /// before. Dropping the stream ends the subscription.
    async fn subscribe(&self, query: &Query) -> Result<BoxStream<'static, Sample>, SourceError>;
}
