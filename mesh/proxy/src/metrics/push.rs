//! Streaming metrics to the control plane: Envoy's `MetricsService`, once a second, cumulative values, and only the
//! series that changed since they were last sent on this stream. Also as soon as routes have changed, even with nothing to
//! tell: what was counted until then is of the routes before, which whoever compares two releases must know.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use serin_xds::client::{Endpoint, channel};
use serin_xds::pb::envoy::config::core::v3::Node;
use serin_xds::pb::envoy::service::metrics::v3::metrics_service_client::MetricsServiceClient;
use serin_xds::pb::envoy::service::metrics::v3::{StreamMetricsMessage, stream_metrics_message::Identifier};
use serin_xds::pb::io::prometheus::client as prometheus;
use tokio::sync::{Notify, mpsc};
use tokio_util::sync::CancellationToken;

use super::buckets::Settings;
use super::collect::{Family, Labels, Value, collect};
use super::peer::Workload;
use super::series::Shard;

/// How often changed series are sent.
const INTERVAL: Duration = Duration::from_secs(1);
/// Shortest time between two messages that changes of routes are the cause of.
const APART: Duration = Duration::from_millis(50);
/// Turns of the control thread that a change's acknowledgement takes to its socket, and some.
const HOPS: usize = 8;
/// Waits between attempts to open the stream.
const RETRY: Duration = Duration::from_secs(1);

/// What the pusher needs.
#[derive(Clone, Debug)]
pub struct Pusher {
    /// Where the control plane is.
    pub endpoint: Endpoint,
    /// Who we are.
    pub node: Node,
    /// Who we are, for labels.
    pub own: Arc<Workload>,
    /// What is read.
    pub shards: Arc<[Arc<Shard>]>,
    /// Told when routes have changed.
    pub rerouted: Arc<Notify>,
}

/// Which series have been sent with which count on the present stream.
#[derive(Debug, Default)]
pub struct Sent(HashMap<(&'static str, Labels), u64, foldhash::fast::RandomState>);

impl Sent {
    /// The families of Istio's metrics whose series changed since the last call, as wire messages.
    pub fn changed(&mut self, families: &[Family], timestamp_ms: i64) -> Vec<prometheus::MetricFamily> {
        let istio = || families.iter().filter(|family| family.name.starts_with("istio_"));
        let mut out = Vec::new();
        for family in istio() {
            let mut metric = Vec::new();
            for (labels, value) in &family.metrics {
                let mark = match value {
                    Value::Counter(value) | Value::Gauge(value) => value.to_bits(),
                    Value::Whole(value) => *value,
                    Value::Histogram(histogram) => histogram.count(),
                };
                let last = self.0.get_mut(&(family.name, labels.clone()));
                match last {
                    Some(last) if *last == mark => continue,
                    Some(last) => *last = mark,
                    None => {
                        self.0.insert((family.name, labels.clone()), mark);
                    }
                }
                metric.push(encode(labels, value, Some(timestamp_ms)));
            }
            if let Some(first) = metric.first() {
                let kind = if first.histogram.is_some() {
                    prometheus::MetricType::Histogram
                } else {
                    prometheus::MetricType::Counter
                };
                out.push(prometheus::MetricFamily {
                    name: Some(family.name.to_owned()),
                    r#type: Some(kind as i32),
                    metric,
                    ..Default::default()
                });
            }
        }
        let present: usize = istio().map(|family| family.metrics.len()).sum();
        if self.0.len() > present {
            // Series have ended; one that comes back is new, whatever its count.
            let names: HashSet<(&str, &Labels)> = istio()
                .flat_map(|family| family.metrics.iter().map(|(labels, _)| (family.name, labels)))
                .collect();
            self.0
                .retain(|(name, labels), _| names.contains(&(*name, labels)));
        }
        out
    }
}

/// A series as a message.
pub(super) fn encode(labels: &Labels, value: &Value, timestamp_ms: Option<i64>) -> prometheus::Metric {
    let mut metric = prometheus::Metric {
        label: labels
            .iter()
            .map(|(name, value)| prometheus::LabelPair {
                name: Some((*name).to_owned()),
                value: Some(value.clone()),
            })
            .collect(),
        timestamp_ms,
        ..Default::default()
    };
    match value {
        Value::Counter(value) => {
            metric.counter = Some(prometheus::Counter {
                value: Some(*value),
                ..Default::default()
            });
        }
        Value::Gauge(value) => metric.gauge = Some(prometheus::Gauge { value: Some(*value) }),
        Value::Whole(value) => {
            metric.gauge = Some(prometheus::Gauge {
                value: Some(*value as f64),
            });
        }
        Value::Histogram(histogram) => {
            let mut cumulative = 0;
            let above = (f64::INFINITY, histogram.above().1);
            let bucket = histogram.shown().chain([above]).map(|(bound, count)| {
                cumulative += count;
                prometheus::Bucket {
                    cumulative_count: Some(cumulative),
                    upper_bound: Some(bound),
                    ..Default::default()
                }
            });
            metric.histogram = Some(prometheus::Histogram {
                bucket: bucket.collect(),
                sample_count: Some(histogram.count()),
                sample_sum: Some(histogram.sum),
                ..Default::default()
            });
        }
    }
    metric
}

impl Pusher {
    /// Streams until cancelled; a stream that ends is opened again.
    pub async fn run(self, cancel: CancellationToken) {
        let mut reported = false;
        loop {
            let end = tokio::select! {
                () = cancel.cancelled() => return,
                end = self.stream() => end,
            };
            if !reported {
                tracing::debug!(control_plane = %self.endpoint, error = %end, "metrics stream ended; will go on trying");
                reported = true;
            }
            tokio::select! {
                () = cancel.cancelled() => return,
                () = tokio::time::sleep(RETRY) => {}
            }
        }
    }

    async fn stream(&self) -> String {
        let channel = match channel(&self.endpoint).await {
            Ok(channel) => channel,
            Err(error) => return error.to_string(),
        };
        let (sender, receiver) = mpsc::channel(4);
        let mut client = MetricsServiceClient::new(channel);
        let feed = async {
            let mut sent = Sent::default();
            let mut identifier = Some(Identifier {
                node: Some(self.node.clone()),
            });
            let mut ticks = tokio::time::interval(INTERVAL);
            ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
            let mut last = tokio::time::Instant::now();
            loop {
                let rerouted = tokio::select! {
                    _ = ticks.tick() => false,
                    () = self.rerouted.notified() => {
                        tokio::time::sleep_until(last + APART).await;
                        // The change is acknowledged first: collecting takes the longer the more series there are.
                        for _ in 0..HOPS {
                            tokio::task::yield_now().await;
                        }
                        true
                    }
                };
                last = tokio::time::Instant::now();
                let now = SystemTime::now()
                    .duration_since(SystemTime::UNIX_EPOCH)
                    .unwrap_or_default();
                let mut families = collect(&self.own, &self.shards);
                // By the default bounds, which all proxies have.
                Settings::default().apply(&mut families);
                let families = sent.changed(&families, now.as_millis() as i64);
                // The first message goes out even when empty: it says who we are.
                if families.is_empty() && identifier.is_none() && !rerouted {
                    continue;
                }
                let message = StreamMetricsMessage {
                    identifier: identifier.take(),
                    envoy_metrics: families,
                };
                if sender.send(message).await.is_err() {
                    return;
                }
            }
        };
        let call = client.stream_metrics(tokio_stream_of(receiver));
        tokio::select! {
            () = feed => "the control plane closed the stream".to_owned(),
            result = call => match result {
                Ok(_) => "the control plane closed the stream".to_owned(),
                Err(status) => status.to_string(),
            },
        }
    }
}

fn tokio_stream_of<T>(mut receiver: mpsc::Receiver<T>) -> impl futures::Stream<Item = T> {
    futures::stream::poll_fn(move |cx| receiver.poll_recv(cx))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_series_that_changed_are_sent_again() {
        let family = |a: f64, b: f64| {
            vec![Family {
                name: "istio_requests_total",
                help: "",
                metrics: vec![
                    (vec![("x", "a".into())], Value::Counter(a)),
                    (vec![("x", "b".into())], Value::Counter(b)),
                ],
            }]
        };
        let mut sent = Sent::default();
        assert_eq!(sent.changed(&family(1.0, 1.0), 5)[0].metric.len(), 2);
        assert!(sent.changed(&family(1.0, 1.0), 6).is_empty());
        let changed = sent.changed(&family(1.0, 2.0), 7);
        assert_eq!(changed[0].metric.len(), 1);
        assert_eq!(changed[0].metric[0].label[0].value.as_deref(), Some("b"));
        assert_eq!(changed[0].metric[0].counter.as_ref().unwrap().value, Some(2.0));
        assert!(sent.changed(&[], 8).is_empty());
        assert_eq!(
            sent.changed(&family(1.0, 2.0), 9)[0].metric.len(),
            2,
            "ended and come back"
        );
    }
}
