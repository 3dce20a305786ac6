//! Measurements of one run: a subscription to the metric source, the window of the current weight, the evidence.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use futures::future::BoxFuture;
use futures::stream::BoxStream;
use jiff::{SignedDuration, Timestamp};
use serin_analysis::judge::comparison::{Comparison, Options};
use serin_analysis::sample::{Counts, Sample};
use serin_analysis::{MetricSource, Query};
use tokio::time::Instant;

use crate::observed::Measured;
use crate::plan::Plan;

/// Samples kept: an hour at one a second. Longer windows than that are cut.
const SAMPLES_MAX: usize = 3600;
/// Wait before a source that is not available is asked again.
const RETRY: Duration = Duration::from_secs(1);
/// How long counts of one arm wait for counts of the other.
const UNPAIRED_MAX_MS: i64 = 10_000;
/// How long a subscription may take.
const SUBSCRIBE_TIMEOUT: Duration = Duration::from_secs(5);

type Samples = BoxStream<'static, Sample>;

/// Where the subscription stands. Nothing here is ever waited for by a decision.
#[derive(Default)]
enum Subscription {
    #[default]
    None,
    Asking(BoxFuture<'static, Result<Samples, String>>),
    Open(Samples),
    /// It failed; asked again at this time.
    Waiting(Instant),
}

#[derive(Default)]
pub(crate) struct Measuring {
    subscription: Subscription,
    /// When the current subscription began.
    since: Option<Timestamp>,
    error: Option<String>,
    /// The window that `samples` belong to.
    window: Option<Timestamp>,
    samples: VecDeque<Sample>,
    /// The run that `comparison` belongs to.
    run: Option<Timestamp>,
    comparison: Comparison,
    /// Counts that the comparison has not seen, because one of the arms is missing in them.
    unpaired: Option<Sample>,
}

impl Measuring {
    /// Begins with the evidence of the run, or goes on with it.
    pub(crate) fn run(&mut self, run: Option<Timestamp>, evidence: impl FnOnce() -> Option<Comparison>) {
        if self.run != run {
            self.run = run;
            self.comparison = evidence().unwrap_or_default();
            self.unpaired = None;
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

    /// Subscribes where there is no subscription. Does not wait for the source.
    pub(crate) fn ensure(&mut self, source: &Arc<dyn MetricSource>, query: &Query) {
        let due = match &self.subscription {
            Subscription::None => true,
            Subscription::Waiting(at) => Instant::now() >= *at,
            Subscription::Asking(_) | Subscription::Open(_) => false,
        };
        if !due {
            return;
        }
        let (source, query) = (source.clone(), query.clone());
        self.subscription = Subscription::Asking(Box::pin(async move {
            match tokio::time::timeout(SUBSCRIBE_TIMEOUT, source.subscribe(&query)).await {
                Ok(Ok(stream)) => Ok(stream),
                Ok(Err(error)) => Err(error.to_string()),
                Err(_) => Err(format!("metric source {} does not answer", source.name())),
            }
        }));
    }

    fn failed(&mut self, error: String) {
        self.since = None;
        self.error = Some(error);
        self.subscription = Subscription::Waiting(Instant::now() + RETRY);
    }

    /// Ends the subscription.
    pub(crate) fn stop(&mut self) {
        *self = Self::default();
    }

    /// Waits until there is something new, and takes it in.
    pub(crate) async fn next(&mut self, plan: Option<&Plan>, now: impl Fn() -> Timestamp) {
        match &mut self.subscription {
            Subscription::None => std::future::pending().await,
            Subscription::Waiting(at) => tokio::time::sleep_until(*at).await,
            Subscription::Asking(asking) => match asking.await {
                Ok(stream) => {
                    self.subscription = Subscription::Open(stream);
                    self.since = Some(now());
                    self.error = None;
                }
                Err(error) => self.failed(error),
            },
            Subscription::Open(stream) => match stream.next().await {
                Some(sample) => self.take(sample, plan),
                None => self.failed("the metric source ended the subscription".to_owned()),
            },
        }
    }

    fn take(&mut self, sample: Sample, plan: Option<&Plan>) {
        if let Some(options) = plan.and_then(|plan| plan.comparison.as_ref())
            && self.run.is_some()
        {
            self.compare(&sample, options);
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

    /// Feeds the comparison with batches that have both arms. A source may report the arms one after the other, and with
    /// little traffic one of them may be silent for a while. When a batch is complete depends on how many requests
    /// there were and never on how they went, so the evidence stays what it promises to be.
    fn compare(&mut self, sample: &Sample, options: &Options) {
        let bare = |counts: &Counts| Counts {
            requests: counts.requests,
            errors: counts.errors,
            ..Counts::default()
        };
        let sample = Sample {
            at_ms: sample.at_ms,
            canary: bare(&sample.canary),
            primary: bare(&sample.primary),
        };
        let began = self
            .unpaired
            .as_ref()
            .map_or(sample.at_ms, |unpaired| unpaired.at_ms);
        let mut batch = self.unpaired.take().unwrap_or_default();
        batch.add(&sample);
        if batch.canary.requests > 0 && batch.primary.requests > 0 {
            self.comparison.observe(&batch, options);
        } else if sample.at_ms.saturating_sub(began) < UNPAIRED_MAX_MS {
            self.unpaired = Some(Sample {
                at_ms: began,
                ..batch
            });
        } else {
            // Too long ago to be held against what comes now; it counts for the totals only.
            self.comparison.observe(&batch, options);
        }
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
            primary: Counts {
                requests,
                ..Counts::default()
            },
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
    fn arms_that_are_reported_one_after_the_other_are_compared_as_one_batch() {
        let plan = plan();
        let counts = |requests, errors| Counts {
            requests,
            errors,
            ..Counts::default()
        };
        let (mut apart, mut together) = (Measuring::default(), Measuring::default());
        for measuring in [&mut apart, &mut together] {
            measuring.run(Some(at(1)), || None);
        }
        for second in 2..8 {
            let at_ms = second * 1000;
            let (canary, primary) = (counts(10, 3), counts(40, 0));
            apart.take(
                Sample {
                    at_ms,
                    canary: canary.clone(),
                    ..Sample::default()
                },
                Some(&plan),
            );
            apart.take(
                Sample {
                    at_ms,
                    primary: primary.clone(),
                    ..Sample::default()
                },
                Some(&plan),
            );
            together.take(
                Sample {
                    at_ms,
                    canary,
                    primary,
                },
                Some(&plan),
            );
        }
        let verdict = |measuring: &Measuring| {
            measuring
                .measured(&plan, at(9))
                .comparison
                .verdict(&plan.comparison.unwrap())
        };
        assert!(verdict(&apart).is_bad());
        assert_eq!(verdict(&apart), verdict(&together));
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
