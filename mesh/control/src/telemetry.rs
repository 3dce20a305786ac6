//! Measurements from the proxies: what they stream over `MetricsService`, added up per workload for who subscribes.
//!
//! Each proxy sends the cumulative values of its `istio_*` series about once a second, on the listener that serves xDS.
//! [`intake::Baseline`] (pure) turns them into increments; the increments of a subscribed workload are collected over all
//! proxies and handed out as [`Sample`]s: as soon as there is something, several proxies' worth at a time, at most five a
//! second. Each request is in exactly one sample per reporter. A proxy also reports at once when its routes have changed, so
//! that what it counted before a change and after it are in different reports; [`Sample::from_ms`] tells how far back a
//! sample may reach.
//!
//! What is not counted: what happened before a proxy's first message on its first stream (that message is the
//! baseline), and what a proxy counted between its last message and its death.
//!
//! Limits: [`intake::MAX_SERIES`] series per proxy; a subscriber that does not read finds it all in one later sample.

pub mod intake;
mod service;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use parking_lot::Mutex;
use tokio::sync::{Notify, mpsc};
use tokio_util::sync::CancellationToken;

use intake::{Baseline, Dimensions, Increment};

/// Upper bounds of `istio_request_duration_milliseconds`, Istio's defaults; one more bucket is beyond them all.
pub const DURATION_BOUNDS_MS: [f64; 19] = [
    0.5, 1.0, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0, 1000.0, 2500.0, 5000.0, 10000.0, 30000.0, 60000.0,
    300000.0, 600000.0, 1800000.0, 3600000.0,
];

/// How long increments of several proxies are collected before a sample goes out.
const COLLECT: Duration = Duration::from_millis(50);
/// Shortest time between two samples.
const SPACING: Duration = Duration::from_millis(200);
/// Samples that may wait for a subscriber.
const SAMPLES: usize = 8;
/// How long a proxy's last values are kept for its return.
const PARKED: Duration = Duration::from_secs(60);
/// Most proxies whose last values are kept for their return.
const MAX_PARKED: usize = 1024;

/// Who reports a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Reporter {
    /// The caller's proxy: it sees what failed on the way, too.
    Source,
    /// The called workload's proxy.
    Destination,
}

/// A workload whose requests are measured.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct WorkloadKey {
    /// Its namespace.
    pub namespace: Arc<str>,
    /// Its name (`destination_workload`), for example of a Deployment.
    pub workload: Arc<str>,
    /// Also count requests to this service (`destination_service_name`) that never reached any workload, as when it has
    /// no endpoints.
    pub service: Option<Arc<str>>,
}

/// Durations of requests; not cumulative.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Durations {
    /// Observations per bucket of [`DURATION_BOUNDS_MS`]; the last one is beyond them all.
    pub counts: [u64; 20],
    /// Sum in milliseconds.
    pub sum_ms: f64,
}

/// Requests with equal properties.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// What they have in common.
    pub dimensions: Arc<Dimensions>,
    /// How many.
    pub requests: u64,
    /// How long they took.
    pub durations: Durations,
}

/// What was new of one workload.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sample {
    /// Nothing in it was counted before, milliseconds since the Unix epoch: when each proxy that it is of had reported last.
    pub from_ms: i64,
    /// When it was put together, milliseconds since the Unix epoch.
    pub at_ms: i64,
    /// Requests, by their properties.
    pub rows: Vec<Row>,
}

impl Sample {
    /// Requests as one reporter saw them, and how many of them were errors.
    pub fn requests_and_errors(&self, reporter: Reporter) -> (u64, u64) {
        let rows = self.rows.iter().filter(|row| row.dimensions.reporter == reporter);
        rows.fold((0, 0), |(requests, errors), row| {
            (
                requests + row.requests,
                errors
                    + if row.dimensions.is_error() {
                        row.requests
                    } else {
                        0
                    },
            )
        })
    }
}

/// The collection point. Cloning shares it.
#[derive(Clone, Debug, Default)]
pub struct Telemetry {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    arrived: Notify,
}

#[derive(Debug, Default)]
struct State {
    next_id: u64,
    subscriptions: HashMap<u64, Subscription>,
    /// Namespace and workload → subscriptions; so also for services.
    by_workload: HashMap<(Arc<str>, Arc<str>), Vec<u64>>,
    by_service: HashMap<(Arc<str>, Arc<str>), Vec<u64>>,
    parked: HashMap<String, (tokio::time::Instant, Baseline)>,
    /// The newest stream of each connected proxy; an older one that ends late has nothing to say any more.
    newest: HashMap<String, u64>,
    dropped_series: u64,
}

#[derive(Debug)]
struct Subscription {
    key: WorkloadKey,
    sender: mpsc::Sender<Sample>,
    /// The earliest time that anything in `rows` may be of.
    from_ms: i64,
    rows: HashMap<Arc<Dimensions>, (u64, Durations)>,
}

impl Telemetry {
    /// An empty collection point; [`Telemetry::run`] must run for samples to go out.
    pub fn new() -> Self {
        Self::default()
    }

    /// Samples of a workload from now on, while there is traffic. Dropping the receiver ends the subscription.
    pub fn subscribe(&self, key: WorkloadKey) -> mpsc::Receiver<Sample> {
        let (sender, receiver) = mpsc::channel(SAMPLES);
        let mut state = self.shared.state.lock();
        state.sweep();
        state.next_id += 1;
        let id = state.next_id;
        state
            .by_workload
            .entry((key.namespace.clone(), key.workload.clone()))
            .or_default()
            .push(id);
        if let Some(service) = &key.service {
            state
                .by_service
                .entry((key.namespace.clone(), service.clone()))
                .or_default()
                .push(id);
        }
        state.subscriptions.insert(
            id,
            Subscription {
                key,
                sender,
                from_ms: i64::MAX,
                rows: HashMap::new(),
            },
        );
        receiver
    }

    /// Series that were left out because a proxy had too many.
    pub fn dropped_series(&self) -> u64 {
        self.shared.state.lock().dropped_series
    }

    /// Hands out samples until cancelled. Does nothing while nothing arrives.
    pub async fn run(&self, cancel: CancellationToken) {
        loop {
            tokio::select! {
                () = cancel.cancelled() => return,
                () = self.shared.arrived.notified() => {}
            }
            tokio::select! {
                () = cancel.cancelled() => return,
                () = tokio::time::sleep(COLLECT) => {}
            }
            self.hand_out();
            tokio::select! {
                () = cancel.cancelled() => return,
                () = tokio::time::sleep(SPACING.saturating_sub(COLLECT)) => {}
            }
        }
    }

    fn hand_out(&self) {
        let mut state = self.shared.state.lock();
        state.sweep();
        for subscription in state
            .subscriptions
            .values_mut()
            .filter(|subscription| !subscription.rows.is_empty())
        {
            // A subscriber that does not keep up finds it all in a later sample.
            let Ok(permit) = subscription.sender.try_reserve() else {
                self.shared.arrived.notify_one();
                continue;
            };
            let mut rows: Vec<Row> = subscription
                .rows
                .drain()
                .map(|(dimensions, (requests, durations))| Row {
                    dimensions,
                    requests,
                    durations,
                })
                .collect();
            rows.sort_unstable_by(|one, two| one.dimensions.cmp(&two.dimensions));
            permit.send(Sample {
                from_ms: std::mem::replace(&mut subscription.from_ms, i64::MAX),
                at_ms: now_ms(),
                rows,
            });
        }
    }

    /// A stream opens: its number, and the last values of a proxy that was here before.
    fn resume(&self, node: &str) -> (u64, Baseline) {
        let mut state = self.shared.state.lock();
        state.next_id += 1;
        let id = state.next_id;
        state.newest.insert(node.to_owned(), id);
        let now = tokio::time::Instant::now();
        state.parked.retain(|_, (since, _)| now < *since + PARKED);
        let parked = state.parked.remove(node).map(|(_, baseline)| baseline);
        (id, parked.unwrap_or_default())
    }

    /// A stream has ended.
    fn park(&self, id: u64, node: String, baseline: Baseline) {
        let mut state = self.shared.state.lock();
        state.dropped_series += baseline.dropped();
        if state.newest.get(&node) != Some(&id) {
            return;
        }
        state.newest.remove(&node);
        if state.parked.len() < MAX_PARKED {
            state.parked.insert(node, (tokio::time::Instant::now(), baseline));
        }
    }

    /// Takes what a proxy counted since `from_ms`.
    fn add(&self, increments: Vec<Increment>, from_ms: i64) {
        if increments.is_empty() {
            return;
        }
        let mut state = self.shared.state.lock();
        let mut any = false;
        for increment in increments {
            any |= state.add(&increment, from_ms);
        }
        drop(state);
        if any {
            self.shared.arrived.notify_one();
        }
    }
}

impl State {
    fn add(&mut self, increment: &Increment, from_ms: i64) -> bool {
        let dimensions = &increment.dimensions;
        let (map, name) = if dimensions.reached_a_workload() {
            (&self.by_workload, &dimensions.workload)
        } else {
            (&self.by_service, &dimensions.service)
        };
        let Some(ids) = map.get(&(dimensions.namespace.clone(), name.clone())) else {
            return false;
        };
        for id in ids {
            let Some(subscription) = self.subscriptions.get_mut(id) else {
                continue;
            };
            subscription.from_ms = subscription.from_ms.min(from_ms);
            let (requests, durations) = subscription.rows.entry(dimensions.clone()).or_default();
            *requests += increment.requests;
            for (total, new) in durations.counts.iter_mut().zip(increment.durations.counts) {
                *total += new;
            }
            durations.sum_ms += increment.durations.sum_ms;
        }
        true
    }

    /// Forgets subscriptions whose receiver is gone.
    fn sweep(&mut self) {
        let Self {
            subscriptions,
            by_workload,
            by_service,
            ..
        } = self;
        subscriptions.retain(|id, subscription| {
            if !subscription.sender.is_closed() {
                return true;
            }
            let key = &subscription.key;
            remove(by_workload, &(key.namespace.clone(), key.workload.clone()), *id);
            if let Some(service) = &key.service {
                remove(by_service, &(key.namespace.clone(), service.clone()), *id);
            }
            false
        });
    }
}

/// Milliseconds since the Unix epoch.
fn now_ms() -> i64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    i64::try_from(now.unwrap_or_default().as_millis()).unwrap_or(i64::MAX)
}

fn remove(map: &mut HashMap<(Arc<str>, Arc<str>), Vec<u64>>, key: &(Arc<str>, Arc<str>), id: u64) {
    if let Some(ids) = map.get_mut(key) {
        ids.retain(|other| *other != id);
        if ids.is_empty() {
            map.remove(key);
        }
    }
}
