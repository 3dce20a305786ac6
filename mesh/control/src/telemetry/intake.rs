//! From cumulative series of one proxy to increments. Pure.

use std::collections::HashMap;
use std::hash::BuildHasher;
use std::sync::Arc;

use serin_xds::pb::io::prometheus::client::{Histogram, LabelPair, Metric, MetricFamily};

use super::{DURATION_BOUNDS_MS, Durations, Reporter};

/// Most series that are followed per proxy; the rest is counted as dropped.
pub const MAX_SERIES: usize = 10_000;

const REQUESTS: &str = "istio_requests_total";
const DURATIONS: &str = "istio_request_duration_milliseconds";

/// What Istio's metrics say when they do not know.
const UNKNOWN: &str = "unknown";

/// gRPC status codes that a server is to blame for: unknown, deadline exceeded, unimplemented, internal, unavailable,
/// data loss.
const GRPC_ERRORS: [&str; 6] = ["2", "4", "12", "13", "14", "15"];

/// What requests that are counted together have in common.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Dimensions {
    /// Whose proxy counted them.
    pub reporter: Reporter,
    /// Namespace of the called workload, or of the called service if no workload was reached.
    pub namespace: Arc<str>,
    /// The called workload; `unknown` if none was reached.
    pub workload: Arc<str>,
    /// `destination_canonical_revision`, for example `v2`.
    pub revision: Arc<str>,
    /// `destination_service_name`.
    pub service: Arc<str>,
    /// Namespace of the caller.
    pub source_namespace: Arc<str>,
    /// The calling workload.
    pub source_workload: Arc<str>,
    /// HTTP status; 0 if there was no answer.
    pub response_code: u16,
    /// gRPC status as a number; empty for other protocols.
    pub grpc_status: Arc<str>,
    /// Envoy's flags, for example `UH`; `-` if there are none.
    pub response_flags: Arc<str>,
}

impl Dimensions {
    /// Whether any workload was reached.
    pub fn reached_a_workload(&self) -> bool {
        &*self.workload != UNKNOWN && !self.workload.is_empty()
    }

    /// 1 to 5 for 1xx to 5xx; 0 if there was no answer.
    pub fn response_class(&self) -> u16 {
        self.response_code / 100
    }

    /// Whether the called side is to blame: 5xx, no answer at all, or a gRPC status of that sort. A caller that went away
    /// (`DC`) is nobody's error.
    pub fn is_error(&self) -> bool {
        let went_away = self.response_flags.split(',').any(|flag| flag == "DC");
        (self.response_code == 0 && !went_away)
            || self.response_class() == 5
            || GRPC_ERRORS.contains(&&*self.grpc_status)
    }

    fn of(labels: &[LabelPair]) -> Option<Self> {
        let get = |name: &str| {
            labels
                .iter()
                .find(|pair| pair.name() == name)
                .map(|pair| Arc::from(pair.value()))
        };
        let text = |name: &str| get(name).unwrap_or_else(|| UNKNOWN.into());
        let workload: Arc<str> = text("destination_workload");
        let reached = &*workload != UNKNOWN && !workload.is_empty();
        let namespace = if reached {
            "destination_workload_namespace"
        } else {
            "destination_service_namespace"
        };
        Some(Self {
            reporter: match &*text("reporter") {
                "source" => Reporter::Source,
                "destination" => Reporter::Destination,
                _ => return None,
            },
            namespace: text(namespace),
            workload,
            revision: text("destination_canonical_revision"),
            service: text("destination_service_name"),
            source_namespace: text("source_workload_namespace"),
            source_workload: text("source_workload"),
            response_code: text("response_code").parse().unwrap_or(0),
            grpc_status: get("grpc_response_status").unwrap_or_default(),
            response_flags: get("response_flags").unwrap_or_else(|| "-".into()),
        })
    }
}

/// What is new.
#[derive(Clone, Debug, PartialEq)]
pub struct Increment {
    /// Of what.
    pub dimensions: Arc<Dimensions>,
    /// Requests.
    pub requests: u64,
    /// Durations.
    pub durations: Durations,
}

/// The last values of one proxy.
#[derive(Debug, Default)]
pub struct Baseline {
    /// Whether a message has been seen: the first one says what was before.
    seen: bool,
    /// When the last message came, milliseconds since the Unix epoch.
    heard_ms: i64,
    series: HashMap<u64, Series, foldhash::fast::FixedState>,
    dropped: u64,
}

#[derive(Debug)]
struct Series {
    dimensions: Arc<Dimensions>,
    last: Last,
}

#[derive(Debug)]
enum Last {
    Requests(u64),
    Durations(Durations),
}

impl Baseline {
    /// A message comes now: returns when the one before came, which is since when its increments may have been counted.
    pub fn heard(&mut self, now_ms: i64) -> i64 {
        std::mem::replace(&mut self.heard_ms, now_ms)
    }

    /// Series left out because there are more than [`MAX_SERIES`].
    pub fn dropped(&self) -> u64 {
        self.dropped
    }

    /// Takes in a message and returns what is new in it. The first message of a proxy's life here is all baseline.
    pub fn take(&mut self, families: &[MetricFamily]) -> Vec<Increment> {
        let first = !std::mem::replace(&mut self.seen, true);
        let mut increments = Vec::new();
        for family in families {
            let is_durations = match family.name() {
                REQUESTS => false,
                DURATIONS => true,
                _ => continue,
            };
            for metric in &family.metric {
                let new = if is_durations {
                    self.durations(metric)
                } else {
                    self.requests(metric)
                };
                increments.extend(new.filter(|_| !first));
            }
        }
        increments
    }

    fn requests(&mut self, metric: &Metric) -> Option<Increment> {
        let value = metric.counter.as_ref()?.value();
        // Counters travel as floating point numbers.
        let value = if value.is_finite() && value >= 0.0 {
            value as u64
        } else {
            return None;
        };
        let series = self.series(REQUESTS, &metric.label, || Last::Requests(0))?;
        let Last::Requests(last) = &mut series.last else {
            return None;
        };
        let requests = since(*last, value);
        *last = value;
        (requests > 0).then(|| Increment {
            dimensions: series.dimensions.clone(),
            requests,
            durations: Durations::default(),
        })
    }

    fn durations(&mut self, metric: &Metric) -> Option<Increment> {
        let value = spread(metric.histogram.as_ref()?);
        let series = self.series(DURATIONS, &metric.label, || Last::Durations(Durations::default()))?;
        let Last::Durations(last) = &mut series.last else {
            return None;
        };
        let reset = value.counts.iter().sum::<u64>() < last.counts.iter().sum::<u64>();
        let mut durations = value.clone();
        if !reset {
            for (new, last) in durations.counts.iter_mut().zip(last.counts) {
                *new = new.saturating_sub(last);
            }
            durations.sum_ms = (value.sum_ms - last.sum_ms).max(0.0);
        }
        *last = value;
        (durations.counts.iter().any(|count| *count > 0)).then(|| Increment {
            dimensions: series.dimensions.clone(),
            requests: 0,
            durations,
        })
    }

    fn series(
        &mut self,
        family: &str,
        labels: &[LabelPair],
        new: impl FnOnce() -> Last,
    ) -> Option<&mut Series> {
        let key = key(family, labels);
        let full = self.series.len() >= MAX_SERIES;
        match self.series.entry(key) {
            std::collections::hash_map::Entry::Occupied(entry) => Some(entry.into_mut()),
            std::collections::hash_map::Entry::Vacant(_) if full => {
                self.dropped += 1;
                None
            }
            std::collections::hash_map::Entry::Vacant(entry) => {
                let dimensions = Arc::new(Dimensions::of(labels)?);
                Some(entry.insert(Series {
                    dimensions,
                    last: new(),
                }))
            }
        }
    }
}

/// What a counter gained; one that is lower than before started anew.
fn since(last: u64, value: u64) -> u64 {
    if value < last { value } else { value - last }
}

/// The series' identity, whatever the order of its labels. 64 bits: ten thousand series collide once in 3e11.
fn key(family: &str, labels: &[LabelPair]) -> u64 {
    let state = foldhash::fast::FixedState::with_seed(0x5e71);
    let hash = |name: &str, value: &str| state.hash_one((name, value));
    labels.iter().fold(hash(family, ""), |sum, pair| {
        sum.wrapping_add(hash(pair.name(), pair.value()))
    })
}

/// A histogram in our buckets. One with other bounds is spread conservatively: upwards.
fn spread(histogram: &Histogram) -> Durations {
    let mut durations = Durations {
        sum_ms: histogram.sample_sum(),
        ..Durations::default()
    };
    let mut below = 0;
    for bucket in &histogram.bucket {
        let count = bucket.cumulative_count().saturating_sub(below);
        below = below.max(bucket.cumulative_count());
        let index = DURATION_BOUNDS_MS
            .iter()
            .position(|bound| bucket.upper_bound() <= *bound);
        durations.counts[index.unwrap_or(DURATION_BOUNDS_MS.len())] += count;
    }
    durations.counts[DURATION_BOUNDS_MS.len()] += histogram.sample_count().saturating_sub(below);
    durations
}
