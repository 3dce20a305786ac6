//! Where the mesh meets the rollouts: its ack ledger is their source of liveness, its telemetry their source of
//! measurements. Neither crate knows the other; this is the seam between them.

use async_trait::async_trait;
use futures::stream::{self, BoxStream, StreamExt as _};
use serin_analysis::{Counts, Histogram, MetricSource, Query, Sample, SourceError};
use serin_canary::traffic::{Liveness, LivenessSource};
use serin_control::ledger::Ledger;
use serin_control::telemetry::{self, DURATION_BOUNDS_MS, Reporter, Telemetry, WorkloadKey};
use tokio_stream::wrappers::ReceiverStream;

/// Liveness of routes, out of the ack ledger.
pub(crate) struct LedgerLiveness {
    ledger: Ledger,
}

impl LedgerLiveness {
    /// Reads `ledger`.
    pub(crate) fn new(ledger: Ledger) -> Self {
        Self { ledger }
    }
}

impl LivenessSource for LedgerLiveness {
    fn watch(&self, object: &str, generation: i64) -> BoxStream<'static, Liveness> {
        let receiver = self.ledger.watch(object, generation);
        stream::unfold((receiver, true), |(mut receiver, first)| async move {
            if !first {
                receiver.changed().await.ok()?;
            }
            let now = receiver.borrow_and_update().clone();
            Some((translate(&now), (receiver, false)))
        })
        .boxed()
    }
}

fn translate(liveness: &serin_control::ledger::Liveness) -> Liveness {
    let count = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
    let refusals = liveness
        .refusals
        .first()
        .map(|refused| refused.reason.to_string());
    // What the control plane itself refuses reaches no proxy: for a rollout that is a refusal like any other.
    let rejected = liveness.rejected.as_ref().map(ToString::to_string);
    Liveness {
        generation: liveness.generation,
        known: liveness.observed || rejected.is_some(),
        needed: count(liveness.needed),
        sent: count(liveness.sent),
        acked: count(liveness.acked),
        refused: count(liveness.refused).max(u32::from(rejected.is_some())),
        reason: rejected.or(refusals),
    }
}

/// Measurements of workloads, out of what the proxies stream.
///
/// What counts is what the callers' proxies saw (`reporter="source"`): they also see what never reached a pod, and a
/// caller without a proxy is not subject to weights anyway.
pub(crate) struct MeshMetrics {
    telemetry: Telemetry,
}

impl MeshMetrics {
    /// Reads `telemetry`.
    pub(crate) fn new(telemetry: Telemetry) -> Self {
        Self { telemetry }
    }

    fn arm(&self, query: &Query, workload: &str) -> BoxStream<'static, (Sample, Counts)> {
        let key = WorkloadKey {
            namespace: query.namespace.as_str().into(),
            workload: workload.into(),
            service: None,
        };
        let samples = ReceiverStream::new(self.telemetry.subscribe(key));
        samples
            .map(|sample| {
                let times = Sample {
                    at_ms: sample.at_ms,
                    from_ms: Some(sample.from_ms),
                    ..Sample::default()
                };
                (times, counts(&sample))
            })
            .boxed()
    }
}

#[async_trait]
impl MetricSource for MeshMetrics {
    fn name(&self) -> &'static str {
        "mesh"
    }

    async fn subscribe(&self, query: &Query) -> Result<BoxStream<'static, Sample>, SourceError> {
        let canary = self.arm(query, &query.canary_workload);
        let primary = self.arm(query, &query.primary_workload);
        let canary = canary.map(|(times, canary)| Sample { canary, ..times });
        let primary = primary.map(|(times, primary)| Sample { primary, ..times });
        Ok(stream::select(canary, primary).boxed())
    }
}

fn counts(sample: &telemetry::Sample) -> Counts {
    let mut counts = Counts {
        latency: Histogram::new(DURATION_BOUNDS_MS.to_vec()),
        ..Counts::default()
    };
    let rows = sample.rows.iter();
    for row in rows.filter(|row| row.dimensions.reporter == Reporter::Source) {
        counts.requests += row.requests;
        for (total, new) in counts.latency.counts.iter_mut().zip(row.durations.counts) {
            *total += new;
        }
        if !row.dimensions.is_error() {
            continue;
        }
        counts.errors += row.requests;
        let dimensions = &row.dimensions;
        // A proxy that answers in the workload's stead says so by a flag.
        let answered = dimensions.response_code != 0 && matches!(&*dimensions.response_flags, "-" | "");
        let class = if !answered {
            &mut counts.classes.connection
        } else if dimensions.response_class() == 5 {
            &mut counts.classes.http_5xx
        } else {
            &mut counts.classes.grpc
        };
        *class += row.requests;
    }
    counts
}
