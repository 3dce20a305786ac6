//! Measurements of one run: a subscription to the metric source, the window of the current weight, the evidence.

use std::collections::VecDeque;
use std::time::Duration;

use futures::StreamExt;
use futures::stream::BoxStream;
use jiff::{SignedDuration, Timestamp};
use serin_analysis::judge::comparison::Comparison;
use serin_analysis::sample::{Counts, Sample};
use serin_analysis::{MetricSource, Query};
use tokio::time::Instant;

use crate::observed::Measured;
use crate::plan::Plan;

/// Samples kept: an hour at one a second. Longer windows than that are cut.
const SAMPLES_MAX: usize = 3600;
/// Wait before a source that is not available is asked again.
const RETRY: Duration = Duration::from_secs(1);
/// How long a subscription may take.
const SUBSCRIBE_TIMEOUT: Duration = Duration::from_secs(5);

#[derive(Default)]
pub(crate) struct Measuring {
    stream: Option<BoxStream<'static, Sample>>,
    /// When the current subscription began.
    since: Option<Timestamp>,
    retry_at: Option<Instant>,
    error: Option<String>,
    /// The window that `samples` belong to.
    window: Option<Timestamp>,
    samples: VecDeque<Sample>,
    /// The run that `comparison` belongs to.
    run: Option<Timestamp>,
    comparison: Comparison,
}

impl Measuring {
    /// Begins with the evidence of the run, or goes on with it.
    pub(crate) fn run(&mut self, run: Option<Timestamp>, evidence: impl FnOnce() -> Option<Comparison>) {
        if self.run != run {
            self.run = run;
            self.comparison = evidence().unwrap_or_default();
            self.window = None;
            self.samples.clear();
        }
    }

    /// Sets the window that is measured: samples from before do not count.
    pub(crate) fn window(&mut self, window: Option<Timestamp>) {
        if self.window != window {
            self.window = window;
            self.samples.clear();
        }
    }

    /// Subscribes where there is no subscription.
    pub(crate) async fn ensure(&mut self, source: &dyn MetricSource, query: &Query, now: Timestamp) {
        if self.stream.is_some() || self.retry_at.is_some_and(|at| Instant::now() < at) {
            return;
        }
        let subscribed = tokio::time::timeout(SUBSCRIBE_TIMEOUT, source.subscribe(query)).await;
        match subscribed {
            Ok(Ok(stream)) => {
                self.stream = Some(stream);
                self.since = Some(now);
                self.retry_at = None;
                self.error = None;
            }
            Ok(Err(error)) => self.failed(error.to_string()),
            Err(_) => self.failed(format!("metric source {} does not answer", source.name())),
        }
    }

    fn failed(&mut self, error: String) {
        self.stream = None;
        self.since = None;
        self.error = Some(error);
        self.retry_at = Some(Instant::now() + RETRY);
    }

    /// Ends the subscription.
    pub(crate) fn stop(&mut self) {
        *self = Self::default();
    }

    /// Waits for the next sample and takes it in.
    pub(crate) async fn next(&mut self, plan: Option<&Plan>) {
        let Some(stream) = self.stream.as_mut() else {
            match self.retry_at {
                Some(at) => tokio::time::sleep_until(at).await,
                None => std::future::pending().await,
            }
            return;
        };
        match stream.next().await {
            Some(sample) => self.take(sample, plan),
            None => self.failed("the metric source ended the subscription".to_owned()),
        }
    }

    fn take(&mut self, sample: Sample, plan: Option<&Plan>) {
        if let Some(options) = plan.and_then(|plan| plan.comparison.as_ref())
            && self.run.is_some()
        {
            self.comparison.observe(&sample, options);
        }
        let Some(window) = self.window else { return };
        if sample.at_ms < window.as_millisecond() {
            return;
        }
        if self.samples.len() >= SAMPLES_MAX {
            self.samples.pop_front();
        }
        self.samples.push_back(sample);
    }

    /// What is known now.
    pub(crate) fn measured(&self, plan: &Plan, now: Timestamp) -> Measured {
        let windows = plan
            .metrics
            .iter()
            .map(|metric| {
                let reach = SignedDuration::try_from(metric.window).unwrap_or(SignedDuration::MAX);
                let from = now.checked_sub(reach).unwrap_or(Timestamp::MIN).as_millisecond();
                let mut counts = Counts::default();
                for sample in self
                    .samples
                    .iter()
                    .rev()
                    .take_while(|sample| sample.at_ms >= from)
                {
                    counts.add(&sample.canary);
                }
                counts
            })
            .collect();
        Measured {
            since: self.since,
            windows,
            comparison: self.comparison.clone(),
            error: self.error.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn plan() -> Plan {
        let spec = json!({
            "targetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": "a"},
            "service": {"port": 80},
            "analysis": {"stepWeight": 10, "metrics": [{"name": "request-success-rate", "interval": "5s"}]},
        });
        Plan::new(&serde_json::from_value(spec).unwrap())
    }

    fn sample(second: i64, requests: u64) -> Sample {
        Sample {
            at_ms: second * 1000,
            canary: Counts {
                requests,
                ..Counts::default()
            },
            ..Sample::default()
        }
    }

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    #[test]
    fn a_metric_sees_its_own_window_and_nothing_from_before_the_weight_was_live() {
        let plan = plan();
        let mut measuring = Measuring::default();
        measuring.run(Some(at(90)), || None);
        measuring.take(sample(99, 1), Some(&plan));
        measuring.window(Some(at(100)));
        for second in 99..=110 {
            measuring.take(sample(second, 10), Some(&plan));
        }
        assert_eq!(measuring.measured(&plan, at(103)).windows[0].requests, 110);
        assert_eq!(measuring.measured(&plan, at(110)).windows[0].requests, 60);
        measuring.window(Some(at(111)));
        assert_eq!(measuring.measured(&plan, at(112)).windows[0].requests, 0);
    }

    #[test]
    fn the_evidence_of_a_run_outlives_its_windows_and_ends_with_the_run() {
        let plan = plan();
        let mut measuring = Measuring::default();
        measuring.run(Some(at(1)), || None);
        measuring.take(sample(2, 10), Some(&plan));
        measuring.window(Some(at(5)));
        measuring.run(Some(at(1)), || None);
        assert_ne!(measuring.measured(&plan, at(6)).comparison, Comparison::default());
        measuring.run(Some(at(7)), || None);
        assert_eq!(measuring.measured(&plan, at(8)).comparison, Comparison::default());
    }
}
