//! The controller's own metrics, with Flagger's names, labels and values.
//!
//! | metric | labels | value |
//! |---|---|---|
//! | `flagger_info` | version, mesh_provider | 1 |
//! | `flagger_canary_total` | namespace | Canaries |
//! | `flagger_canary_status` | name, namespace | 0 running, 2 failed, 1 anything else |
//! | `flagger_canary_weight` | workload, namespace | per cent, of primary and target |
//! | `flagger_canary_metric_analysis` | name, namespace, metric | last value |
//! | `flagger_canary_duration_seconds` | name, namespace | histogram of the rounds of a run, which is what Flagger measures too |
//! | `flagger_canary_successes_total`, `flagger_canary_failures_total` | name, namespace, deployment_strategy, analysis_status | runs |
//!
//! `name` is the target's name, as in Flagger. A Canary that is deleted takes its gauges with it (Flagger keeps them until it
//! is restarted); counters stay.

use std::sync::atomic::AtomicU64;
use std::time::Duration;

use serin_crds::flagger::{CanaryPhase, CanaryStatus};
use serin_kit::metrics::prometheus_client;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

/// The default buckets of Prometheus' Go client, in seconds.
const BUCKETS: [f64; 11] = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];

/// The only strategy that there is yet.
const STRATEGY: &str = "canary";

type Value = Gauge<f64, AtomicU64>;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Info {
    version: String,
    mesh_provider: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Namespace {
    namespace: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Named {
    name: String,
    namespace: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Workload {
    workload: String,
    namespace: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Analysis {
    name: String,
    namespace: String,
    metric: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Outcome {
    name: String,
    namespace: String,
    deployment_strategy: String,
    analysis_status: String,
}

/// Handles to all of them; clones share the values.
#[derive(Clone, Debug)]
pub struct Metrics {
    info: Family<Info, Gauge>,
    total: Family<Namespace, Gauge>,
    status: Family<Named, Gauge>,
    weight: Family<Workload, Gauge>,
    analysis: Family<Analysis, Value>,
    duration: Family<Named, Histogram, fn() -> Histogram>,
    successes: Family<Outcome, Counter>,
    failures: Family<Outcome, Counter>,
}

impl Default for Metrics {
    fn default() -> Self {
        let metrics = Self {
            info: Family::default(),
            total: Family::default(),
            status: Family::default(),
            weight: Family::default(),
            analysis: Family::default(),
            duration: Family::new_with_constructor(|| Histogram::new(BUCKETS)),
            successes: Family::default(),
            failures: Family::default(),
        };
        let info = Info {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            mesh_provider: "istio".to_owned(),
        };
        metrics.info.get_or_create(&info).set(1);
        metrics
    }
}

/// Whose values they are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Subject {
    pub(crate) namespace: String,
    pub(crate) target: String,
    pub(crate) primary: String,
}

impl Subject {
    fn named(&self) -> Named {
        Named {
            name: self.target.clone(),
            namespace: self.namespace.clone(),
        }
    }

    fn workload(&self, workload: &str) -> Workload {
        Workload {
            workload: workload.to_owned(),
            namespace: self.namespace.clone(),
        }
    }

    fn analysis(&self, metric: &str) -> Analysis {
        Analysis {
            name: self.target.clone(),
            namespace: self.namespace.clone(),
            metric: metric.to_owned(),
        }
    }
}

impl Metrics {
    /// Makes them part of what a process shows.
    pub fn register(&self, registry: &mut Registry) {
        let flagger = registry.sub_registry_with_prefix("flagger");
        flagger.register(
            "info",
            "Flagger version and mesh provider information",
            self.info.clone(),
        );
        flagger.register(
            "canary_total",
            "Total number of canary object",
            self.total.clone(),
        );
        flagger.register(
            "canary_status",
            "Last canary analysis result",
            self.status.clone(),
        );
        flagger.register(
            "canary_weight",
            "The virtual service destination weight current value",
            self.weight.clone(),
        );
        flagger.register(
            "canary_metric_analysis",
            "Last canary analysis result per different metrics",
            self.analysis.clone(),
        );
        flagger.register(
            "canary_duration_seconds",
            "Seconds spent performing canary analysis",
            self.duration.clone(),
        );
        flagger.register(
            "canary_successes",
            "Total number of successful canary deployments",
            self.successes.clone(),
        );
        flagger.register(
            "canary_failures",
            "Total number of failed canary deployments",
            self.failures.clone(),
        );
    }

    /// How many Canaries a namespace has.
    pub(crate) fn count(&self, namespace: &str, canaries: usize) {
        let labels = Namespace {
            namespace: namespace.to_owned(),
        };
        if canaries == 0 {
            self.total.remove(&labels);
        } else {
            let canaries = i64::try_from(canaries).unwrap_or(i64::MAX);
            self.total.get_or_create(&labels).set(canaries);
        }
    }

    /// One round of a controller, from the status before to the status after it.
    pub(crate) fn round(
        &self,
        subject: &Subject,
        before: &CanaryStatus,
        after: &CanaryStatus,
        skipped_analysis: bool,
        took: Duration,
    ) {
        let phase = after.phase.clone().unwrap_or_default();
        let code = match phase {
            CanaryPhase::Progressing => 0,
            CanaryPhase::Failed => 2,
            _ => 1,
        };
        self.status.get_or_create(&subject.named()).set(code);
        let canary = i64::from(after.canary_weight.unwrap_or(0));
        self.weight
            .get_or_create(&subject.workload(&subject.target))
            .set(canary);
        self.weight
            .get_or_create(&subject.workload(&subject.primary))
            .set(100 - canary);
        for metric in &after.metrics {
            if let Some(value) = metric.value {
                self.analysis
                    .get_or_create(&subject.analysis(&metric.name))
                    .set(value);
            }
        }
        let in_run = matches!(
            before.phase,
            Some(CanaryPhase::Progressing | CanaryPhase::Promoting | CanaryPhase::Finalising)
        );
        if !in_run {
            return;
        }
        self.duration
            .get_or_create(&subject.named())
            .observe(took.as_secs_f64());
        let counted = match phase {
            CanaryPhase::Succeeded => &self.successes,
            CanaryPhase::Failed => &self.failures,
            _ => return,
        };
        let outcome = Outcome {
            name: subject.target.clone(),
            namespace: subject.namespace.clone(),
            deployment_strategy: STRATEGY.to_owned(),
            analysis_status: if skipped_analysis { "skipped" } else { "completed" }.to_owned(),
        };
        counted.get_or_create(&outcome).inc();
    }

    /// The Canary is gone, and its gauges with it.
    pub(crate) fn forget(&self, subject: &Subject, metrics: impl IntoIterator<Item = String>) {
        self.status.remove(&subject.named());
        self.duration.remove(&subject.named());
        for workload in [&subject.target, &subject.primary] {
            self.weight.remove(&subject.workload(workload));
        }
        for metric in metrics {
            self.analysis.remove(&subject.analysis(&metric));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serin_crds::flagger::MetricStatus;

    fn subject() -> Subject {
        Subject {
            namespace: "test".to_owned(),
            target: "podinfo".to_owned(),
            primary: "podinfo-primary".to_owned(),
        }
    }

    fn status(phase: CanaryPhase, weight: i32) -> CanaryStatus {
        CanaryStatus {
            phase: Some(phase),
            canary_weight: Some(weight),
            metrics: vec![MetricStatus {
                name: "request-success-rate".to_owned(),
                value: Some(99.5),
                ..MetricStatus::default()
            }],
            ..CanaryStatus::default()
        }
    }

    fn shown(metrics: &Metrics) -> Vec<String> {
        let mut registry = Registry::default();
        metrics.register(&mut registry);
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        text.lines()
            .filter(|line| !line.starts_with('#') && !line.contains("_bucket"))
            .map(str::to_owned)
            .collect()
    }

    #[test]
    fn metrics_have_flaggers_names_labels_and_values() {
        let metrics = Metrics::default();
        metrics.count("test", 2);
        let (running, failed) = (
            status(CanaryPhase::Progressing, 25),
            status(CanaryPhase::Failed, 0),
        );
        let took = Duration::from_millis(20);
        metrics.round(&subject(), &running, &running, false, took);
        let mut lines = shown(&metrics);
        lines.sort();
        let version = env!("CARGO_PKG_VERSION");
        assert_eq!(
            lines,
            [
                "flagger_canary_duration_seconds_count{name=\"podinfo\",namespace=\"test\"} 1",
                "flagger_canary_duration_seconds_sum{name=\"podinfo\",namespace=\"test\"} 0.02",
                "flagger_canary_metric_analysis{name=\"podinfo\",namespace=\"test\",metric=\"request-success-rate\"} 99.5",
                "flagger_canary_status{name=\"podinfo\",namespace=\"test\"} 0",
                "flagger_canary_total{namespace=\"test\"} 2",
                "flagger_canary_weight{workload=\"podinfo\",namespace=\"test\"} 25",
                "flagger_canary_weight{workload=\"podinfo-primary\",namespace=\"test\"} 75",
                &format!("flagger_info{{version=\"{version}\",mesh_provider=\"istio\"}} 1"),
            ]
        );
        metrics.round(&subject(), &running, &failed, false, took);
        let lines = shown(&metrics);
        assert!(lines.contains(&"flagger_canary_status{name=\"podinfo\",namespace=\"test\"} 2".to_owned()));
        assert!(lines.contains(&"flagger_canary_failures_total{name=\"podinfo\",namespace=\"test\",deployment_strategy=\"canary\",analysis_status=\"completed\"} 1".to_owned()), "{lines:#?}");
        // At rest nothing is counted again.
        metrics.round(&subject(), &failed, &failed, false, took);
        assert_eq!(shown(&metrics), lines);
    }

    #[test]
    fn a_promotion_without_analysis_counts_as_skipped() {
        let metrics = Metrics::default();
        let (before, after) = (
            status(CanaryPhase::Finalising, 0),
            status(CanaryPhase::Succeeded, 0),
        );
        metrics.round(&subject(), &before, &after, true, Duration::ZERO);
        let lines = shown(&metrics);
        assert!(lines.contains(&"flagger_canary_successes_total{name=\"podinfo\",namespace=\"test\",deployment_strategy=\"canary\",analysis_status=\"skipped\"} 1".to_owned()), "{lines:#?}");
        assert!(lines.contains(&"flagger_canary_status{name=\"podinfo\",namespace=\"test\"} 1".to_owned()));
    }

    #[test]
    fn a_canary_that_is_gone_takes_its_gauges_with_it() {
        let metrics = Metrics::default();
        let running = status(CanaryPhase::Progressing, 25);
        metrics.count("test", 1);
        metrics.round(&subject(), &running, &running, false, Duration::ZERO);
        metrics.forget(&subject(), ["request-success-rate".to_owned()]);
        metrics.count("test", 0);
        assert_eq!(
            shown(&metrics).len(),
            1,
            "only flagger_info: {:#?}",
            shown(&metrics)
        );
    }
}
