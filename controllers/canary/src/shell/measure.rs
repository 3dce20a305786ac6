//! Measurements of one run: a subscription to the metric source, the window of the current weight, the evidence.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use futures::future::BoxFuture;
use futures::stream::BoxStream;
use jiff::{SignedDuration, Timestamp};
use serin_analysis::judge::watch::{self, Watch};
use serin_analysis::sample::{Counts, Sample};
use serin_analysis::{Judges, MetricSource, Query};
use tokio::time::Instant;

use crate::observed::{Measured, Traffic};
use crate::plan::Plan;

/// Samples kept: an hour at one a second. Longer windows than that are cut.
const SAMPLES_MAX: usize = 3600;
/// Wait before a source that is not available is asked again.
const RETRY: Duration = Duration::from_secs(1);
/// How far back a sample may reach that does not say: proxies report once a second, and reports of several are collected.
const REPORT_LAG_MS: i64 = 2_000;
/// How long a subscription may take.
const SUBSCRIBE_TIMEOUT: Duration = Duration::from_secs(5);

/// Nothing in the sample happened before.
fn begins_ms(sample: &Sample) -> i64 {
    sample
        .from_ms
        .unwrap_or_else(|| sample.at_ms.saturating_sub(REPORT_LAG_MS))
}

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
    /// The run that `judges` belong to.
    run: Option<Timestamp>,
    judges: Judges,
    /// Since when requests to the canary are requests to this run's revision; `None` while it has had no traffic.
    revision_from_ms: Option<i64>,
    /// The share that was given to the canary last, in percent.
    weight: i32,
    traffic: Traffic,
    first_sample_ms: Option<i64>,
    watching: Option<Watching>,
}

/// The watch after a promotion: one batch per second.
struct Watching {
    since: Timestamp,
    options: watch::Options,
    detector: Watch,
    /// The second that is being collected, with its requests and errors.
    second: Option<(i64, u64, u64)>,
}

impl Watching {
    /// A second counts when a later one has begun: proxies report one after the other.
    fn take(&mut self, sample: &Sample) {
        // What was asked before the promotion was complete may be reported a moment after.
        if begins_ms(sample) < self.since.as_millisecond() {
            return;
        }
        let (now, primary) = (sample.at_ms.div_euclid(1000), &sample.primary);
        match &mut self.second {
            Some((second, requests, errors)) if now <= *second => {
                *requests = requests.saturating_add(primary.requests);
                *errors = errors.saturating_add(primary.errors);
            }
            collected => {
                if let Some((_, requests, errors)) =
                    collected.replace((now, primary.requests, primary.errors))
                {
                    self.detector.observe(requests, errors, &self.options);
                }
            }
        }
    }
}

impl Measuring {
    /// Begins with the evidence of the run, or goes on with it.
    pub(crate) fn run(&mut self, run: Option<Timestamp>, evidence: impl FnOnce() -> Option<Judges>) {
        if self.run != run {
            self.run = run;
            self.judges = evidence().unwrap_or_default();
            self.window = None;
            self.samples.clear();
            self.traffic = Traffic::default();
            self.first_sample_ms = None;
        }
    }

    /// Tells which requests are this revision's: those in samples that begin when it had got a weight and a former revision
    /// had none any more.
    pub(crate) fn revision(&mut self, first_weight: Option<Timestamp>, former_until: Option<Timestamp>) {
        let former = former_until.map_or(i64::MIN, Timestamp::as_millisecond);
        self.revision_from_ms = first_weight.map(|first| first.as_millisecond().max(former));
    }

    /// Watches what the primary serves since then, from where the detector stood.
    pub(crate) fn watch(
        &mut self,
        since: Timestamp,
        options: watch::Options,
        detector: impl FnOnce() -> Option<Watch>,
    ) {
        match &mut self.watching {
            Some(watching) if watching.since == since => watching.options = options,
            watching => {
                *watching = Some(Watching {
                    since,
                    options,
                    detector: detector().unwrap_or_default(),
                    second: None,
                });
            }
        }
    }

    /// Sets the window that is measured: samples from before do not count.
    pub(crate) fn window(&mut self, window: Option<Timestamp>, weight: i32) {
        self.weight = weight;
        if self.window != window {
            self.window = window;
            self.samples.clear();
            if window.is_some() {
                self.judges.begin_step();
            }
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

    fn take(&mut self, mut sample: Sample, plan: Option<&Plan>) {
        if let Some(watching) = &mut self.watching {
            return watching.take(&sample);
        }
        if self.run.is_none() {
            return;
        }
        if self.revision_from_ms.is_none_or(|from| begins_ms(&sample) < from) {
            // Late reports of a former revision's canary, or of one that should have no traffic at all.
            sample.canary = Counts::default();
            self.count(&sample);
            self.judges.learn_primary(&sample.primary);
            return;
        }
        self.count(&sample);
        if let Some(comparison) = plan.and_then(|plan| plan.comparison.as_ref()) {
            self.judges
                .observe(&sample, f64::from(self.weight), &comparison.options);
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

    fn count(&mut self, sample: &Sample) {
        let first = *self.first_sample_ms.get_or_insert(sample.at_ms);
        let traffic = &mut self.traffic;
        traffic.requests = traffic
            .requests
            .saturating_add(sample.canary.requests)
            .saturating_add(sample.primary.requests);
        traffic.primary = traffic.primary.saturating_add(sample.primary.requests);
        traffic.primary_errors = traffic.primary_errors.saturating_add(sample.primary.errors);
        traffic.milliseconds = traffic.milliseconds.max(sample.at_ms.saturating_sub(first));
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
            judges: self.judges.clone(),
            watch: self.watching.as_ref().map(|watching| watching.detector.clone()),
            step_requests: self.samples.iter().map(|sample| sample.canary.requests).sum(),
            traffic: self.traffic,
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
            from_ms: None,
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
        measuring.revision(Some(at(95)), None);
        measuring.take(sample(99, 1), Some(&plan));
        measuring.window(Some(at(100)), 10);
        for second in 99..=110 {
            measuring.take(sample(second, 10), Some(&plan));
        }
        assert_eq!(measuring.measured(&plan, at(103)).windows[0].requests, 110);
        assert_eq!(measuring.measured(&plan, at(110)).windows[0].requests, 60);
        measuring.window(Some(at(111)), 20);
        assert_eq!(measuring.measured(&plan, at(112)).windows[0].requests, 0);
    }

    #[test]
    fn late_reports_of_a_former_revisions_canary_are_not_this_runs() {
        let plan = plan();
        let failing = |second: i64| {
            let mut sample = sample(second, 100);
            sample.canary.errors = 100;
            sample
        };
        let mut measuring = Measuring::default();
        measuring.run(Some(at(10)), || None);
        // Before this revision had any traffic.
        measuring.revision(None, Some(at(12)));
        measuring.take(failing(11), Some(&plan));
        // The former canary answered until second 12; this one has its first weight since second 13.
        measuring.revision(Some(at(13)), Some(at(12)));
        measuring.window(Some(at(13)), 10);
        measuring.take(failing(13), Some(&plan));
        // It says how far back it reaches: half a second before the first weight.
        let mut reaching_back = failing(14);
        reaching_back.from_ms = Some(12_500);
        measuring.take(reaching_back, Some(&plan));
        let measured = measuring.measured(&plan, at(14));
        assert_eq!((measured.judges.totals().canary, measured.step_requests), (0, 0));
        assert_eq!(measured.windows[0].requests, 0);
        let mut own = sample(14, 50);
        own.from_ms = Some(13_000);
        measuring.take(own, Some(&plan));
        let measured = measuring.measured(&plan, at(15));
        assert_eq!(
            (measured.judges.totals().canary, measured.step_requests),
            (50, 50)
        );
        assert_eq!(measured.judges.totals().canary_errors, 0);
        assert_eq!(
            measured.traffic.primary, 350,
            "the primary's are the same service's throughout"
        );
    }

    #[test]
    fn the_evidence_of_a_run_outlives_its_windows_and_ends_with_the_run() {
        let plan = plan();
        let mut measuring = Measuring::default();
        measuring.run(Some(at(1)), || None);
        measuring.revision(Some(at(1)), None);
        measuring.take(sample(3, 10), Some(&plan));
        measuring.window(Some(at(5)), 10);
        measuring.run(Some(at(1)), || None);
        assert_eq!(measuring.measured(&plan, at(6)).judges.totals().canary, 10);
        measuring.run(Some(at(7)), || None);
        assert_eq!(measuring.measured(&plan, at(8)).judges, Judges::default());
    }
}
