//! Counting, and showing the counts.

use std::collections::BTreeMap;
use std::time::Duration;

use hdrhistogram::Histogram;
use serde::Serialize;

use super::outcome::{Failure, Outcome};

/// Groups (versions) beyond this many are counted together as `other`.
const GROUPS_MAX: usize = 64;
/// Latencies are kept from 1 µs to this, in microseconds, with three significant digits.
const LATENCY_MAX_US: u64 = 120_000_000;

/// What became of the requests.
#[derive(Clone, Debug)]
pub(crate) struct Counters {
    /// Requests that became due and were started.
    pub(crate) sent: u64,
    /// Requests that got an answer of whatever status.
    pub(crate) answered: u64,
    /// Answers of 500 and above that the application gave itself.
    pub(crate) failed_by_app: u64,
    /// Requests that failed between, by response flag or by why there was no answer.
    pub(crate) failed_by_system: BTreeMap<String, u64>,
    /// By value of the header to group by.
    pub(crate) groups: BTreeMap<String, Group>,
    /// Answers by status.
    pub(crate) statuses: BTreeMap<u16, u64>,
    latency_us: Histogram<u64>,
}

/// Counts of one group of answers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Group {
    /// Answers.
    pub(crate) answered: u64,
    /// Those of 500 and above that the application gave itself.
    pub(crate) failed_by_app: u64,
    /// When the first such failure was seen, in microseconds since the load started.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) first_failure_us: Option<u64>,
}

impl Default for Counters {
    fn default() -> Self {
        Self {
            sent: 0,
            answered: 0,
            failed_by_app: 0,
            failed_by_system: BTreeMap::new(),
            groups: BTreeMap::new(),
            statuses: BTreeMap::new(),
            // The bounds are constants that the histogram accepts; an auto-resizing one is the same but for memory.
            latency_us: Histogram::new_with_bounds(1, LATENCY_MAX_US, 3).unwrap_or_else(|_| {
                Histogram::new(3).unwrap_or_else(|_| unreachable!("3 digits are allowed"))
            }),
        }
    }
}

impl Counters {
    pub(super) fn record(&mut self, outcome: &Outcome, latency: Duration, since_start: Duration) {
        self.latency_us
            .saturating_record(u64::try_from(latency.as_micros()).unwrap_or(u64::MAX).max(1));
        if let Some(status) = outcome.status {
            self.answered += 1;
            *self.statuses.entry(status.as_u16()).or_default() += 1;
        }
        let by_application = outcome.failure == Some(Failure::Application);
        match &outcome.failure {
            Some(Failure::Application) => self.failed_by_app += 1,
            Some(Failure::System(flag)) => *self.failed_by_system.entry(flag.clone()).or_default() += 1,
            None => {}
        }
        if let Some(name) = &outcome.group {
            let name = if self.groups.len() < GROUPS_MAX || self.groups.contains_key(name) {
                name
            } else {
                "other"
            };
            let group = self.groups.entry(name.to_owned()).or_default();
            group.answered += 1;
            if by_application {
                group.failed_by_app += 1;
                group
                    .first_failure_us
                    .get_or_insert(u64::try_from(since_start.as_micros()).unwrap_or(u64::MAX));
            }
        }
    }

    /// Requests that failed for another reason than the application's own answer.
    pub(crate) fn failed_by_system_total(&self) -> u64 {
        self.failed_by_system.values().sum()
    }

    /// Latency at a quantile, in milliseconds, from when requests were due.
    pub(crate) fn latency_ms(&self, quantile: f64) -> f64 {
        self.latency_us.value_at_quantile(quantile) as f64 / 1000.0
    }
}

/// What `serin load` prints.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    url: String,
    rate_wanted: f64,
    rate_sent: f64,
    seconds: f64,
    sent: u64,
    answered: u64,
    failed_by_app: u64,
    failed_by_system: u64,
    failed_by_system_by_flag: BTreeMap<String, u64>,
    statuses: BTreeMap<u16, u64>,
    groups: BTreeMap<String, Group>,
    latency_ms: BTreeMap<&'static str, f64>,
}

impl Report {
    /// A report of a load that took `elapsed`.
    pub(crate) fn new(url: String, rate_wanted: f64, elapsed: Duration, counters: &Counters) -> Self {
        let quantiles = [
            ("p50", 0.5),
            ("p90", 0.9),
            ("p99", 0.99),
            ("p99.9", 0.999),
            ("max", 1.0),
        ];
        Self {
            url,
            rate_wanted,
            rate_sent: counters.sent as f64 / elapsed.as_secs_f64().max(f64::EPSILON),
            seconds: elapsed.as_secs_f64(),
            sent: counters.sent,
            answered: counters.answered,
            failed_by_app: counters.failed_by_app,
            failed_by_system: counters.failed_by_system_total(),
            failed_by_system_by_flag: counters.failed_by_system.clone(),
            statuses: counters.statuses.clone(),
            groups: counters.groups.clone(),
            latency_ms: quantiles
                .into_iter()
                .map(|(name, q)| (name, counters.latency_ms(q)))
                .collect(),
        }
    }

    /// Whether every request was answered, whatever the application said.
    pub(crate) fn is_clean(&self) -> bool {
        self.failed_by_system == 0
    }

    /// The report for a person.
    pub(crate) fn to_text(&self) -> String {
        use std::fmt::Write as _;
        let mut text = String::new();
        let _ = writeln!(
            text,
            "{} requests to {} in {:.1} s ({:.1} a second, wanted {:.1})",
            self.sent, self.url, self.seconds, self.rate_sent, self.rate_wanted
        );
        let _ = writeln!(
            text,
            "{} answered, {} failed by the application, {} failed by the system",
            self.answered, self.failed_by_app, self.failed_by_system
        );
        for (flag, count) in &self.failed_by_system_by_flag {
            let _ = writeln!(text, "  {count} × {flag}");
        }
        for (name, group) in &self.groups {
            let _ = writeln!(
                text,
                "  {name}: {} answered, {} failed",
                group.answered, group.failed_by_app
            );
        }
        text.push_str("latency from when due:");
        for (name, value) in &self.latency_ms {
            let _ = write!(text, "  {name} {value:.2} ms");
        }
        text
    }
}
