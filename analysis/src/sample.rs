//! What was measured: request counts and durations of one arm over one interval.

use serde::{Deserialize, Serialize};

/// Which of the two releases a measurement is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Arm {
    /// The release under test.
    Canary,
    /// The release that serves everybody else.
    Primary,
}

/// A histogram of durations: `counts[i]` observations were at most `bounds_ms[i]` and more than the bound before; the
/// last count, one longer than the bounds, is what exceeded them all. Not cumulative.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Histogram {
    /// Upper bounds in milliseconds, ascending.
    pub bounds_ms: Vec<f64>,
    /// Observations per bucket; one more than there are bounds.
    pub counts: Vec<u64>,
}

impl Histogram {
    /// An empty histogram with these bounds.
    pub fn new(bounds_ms: Vec<f64>) -> Self {
        let counts = vec![0; bounds_ms.len() + 1];
        Self { bounds_ms, counts }
    }

    /// All observations.
    pub fn total(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// Adds another histogram. Returns false, adding nothing, when the bounds differ.
    pub fn add(&mut self, other: &Histogram) -> bool {
        if other.counts.is_empty() {
            return true;
        }
        if self.counts.is_empty() {
            *self = other.clone();
            return true;
        }
        if self.bounds_ms != other.bounds_ms {
            return false;
        }
        for (mine, theirs) in self.counts.iter_mut().zip(&other.counts) {
            *mine += theirs;
        }
        true
    }

    /// Observations that took longer than `bound_ms`, which must be one of the bounds.
    pub fn above(&self, bound_ms: f64) -> u64 {
        let from = self.bounds_ms.partition_point(|bound| *bound <= bound_ms);
        self.counts.iter().skip(from).sum()
    }

    /// The quantile `q` (0 to 1) in milliseconds, interpolated linearly inside its bucket as Prometheus'
    /// `histogram_quantile` does; the highest bound when it lies beyond all of them; `None` without observations.
    pub fn quantile(&self, q: f64) -> Option<f64> {
        let total = self.total();
        if total == 0 || self.bounds_ms.is_empty() {
            return None;
        }
        let rank = q.clamp(0.0, 1.0) * total as f64;
        let mut below = 0.0;
        for (index, (&count, &bound)) in self.counts.iter().zip(&self.bounds_ms).enumerate() {
            let count = count as f64;
            if count > 0.0 && below + count >= rank {
                let lower = if index == 0 {
                    0.0
                } else {
                    self.bounds_ms[index - 1]
                };
                return Some(lower + (bound - lower) * ((rank - below) / count).clamp(0.0, 1.0));
            }
            below += count;
        }
        self.bounds_ms.last().copied()
    }
}

/// Requests of one arm over one interval, as the callers saw them.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Counts {
    /// Requests that were answered or failed.
    pub requests: u64,
    /// Those that count as errors: an HTTP status of 500 and above, a gRPC status that a server is to blame for, no
    /// answer at all.
    pub errors: u64,
    /// The errors by what they are; a source that does not tell them apart leaves all at zero.
    #[serde(default, skip_serializing_if = "ErrorClasses::is_empty")]
    pub classes: ErrorClasses,
    /// How many distinct clients the errors are of, where the source tells clients apart: one that repeats a failing request
    /// is one client.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error_clients: Option<u64>,
    /// How long they took.
    #[serde(default, skip_serializing_if = "histogram_is_empty")]
    pub latency: Histogram,
}

/// Errors by what they are. One error is in one class.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorClasses {
    /// An HTTP status of 500 and above that the workload answered.
    #[serde(default)]
    pub http_5xx: u64,
    /// A gRPC status that a server is to blame for.
    #[serde(default)]
    pub grpc: u64,
    /// No answer: refused, reset or timed out on the way, or nobody there.
    #[serde(default)]
    pub connection: u64,
}

impl ErrorClasses {
    fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Adds another interval.
    pub fn add(&mut self, other: &Self) {
        self.http_5xx += other.http_5xx;
        self.grpc += other.grpc;
        self.connection += other.connection;
    }
}

/// Which errors are counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum ErrorClass {
    /// All of them.
    #[default]
    Any,
    /// [`ErrorClasses::http_5xx`].
    Http5xx,
    /// [`ErrorClasses::grpc`].
    Grpc,
    /// [`ErrorClasses::connection`].
    Connection,
    /// All of them, but those of one client within an interval count once ([`Counts::error_clients`]). A source that does
    /// not tell clients apart has every error counted.
    ByClient,
}

fn histogram_is_empty(histogram: &Histogram) -> bool {
    histogram.counts.is_empty()
}

impl Counts {
    /// Adds another interval. A histogram with other bounds is left out.
    pub fn add(&mut self, other: &Counts) {
        self.requests += other.requests;
        // What one interval does not tell counts as it is; clients of two intervals may be the same, and are counted twice.
        if self.error_clients.is_some() || other.error_clients.is_some() {
            let clients = |counts: &Counts| counts.error_clients.unwrap_or(counts.errors);
            self.error_clients = Some(clients(self) + clients(other));
        }
        self.errors += other.errors;
        self.classes.add(&other.classes);
        self.latency.add(&other.latency);
    }

    /// Errors of a class; never more than there were requests.
    pub fn errors_of(&self, class: ErrorClass) -> u64 {
        let errors = match class {
            ErrorClass::Any => self.errors,
            ErrorClass::Http5xx => self.classes.http_5xx,
            ErrorClass::Grpc => self.classes.grpc,
            ErrorClass::Connection => self.classes.connection,
            ErrorClass::ByClient => self.error_clients.unwrap_or(self.errors),
        };
        errors.min(self.requests)
    }

    /// Share of requests without an error in percent, `None` without requests.
    pub fn success_rate_percent(&self) -> Option<f64> {
        (self.requests > 0)
            .then(|| 100.0 * (self.requests - self.errors.min(self.requests)) as f64 / self.requests as f64)
    }
}

/// Both arms over the same interval.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// End of the interval, milliseconds since the Unix epoch.
    pub at_ms: i64,
    /// Nothing in it happened before, milliseconds since the Unix epoch, where the source knows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from_ms: Option<i64>,
    /// The release under test.
    pub canary: Counts,
    /// The release that serves everybody else.
    pub primary: Counts,
}

impl Sample {
    /// Adds a later interval.
    pub fn add(&mut self, later: &Sample) {
        self.at_ms = self.at_ms.max(later.at_ms);
        self.from_ms = self.from_ms.zip(later.from_ms).map(|(one, two)| one.min(two));
        self.canary.add(&later.canary);
        self.primary.add(&later.primary);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quantile_is_interpolated_inside_its_bucket() {
        let histogram = Histogram {
            bounds_ms: vec![10.0, 20.0, 40.0],
            counts: vec![50, 50, 0, 0],
        };
        assert_eq!(histogram.quantile(0.5), Some(10.0));
        assert_eq!(histogram.quantile(0.75), Some(15.0));
        assert_eq!(histogram.quantile(1.0), Some(20.0));
    }

    #[test]
    fn a_quantile_beyond_the_last_bound_is_the_last_bound() {
        let histogram = Histogram {
            bounds_ms: vec![10.0],
            counts: vec![1, 99],
        };
        assert_eq!(histogram.quantile(0.99), Some(10.0));
        assert_eq!(Histogram::new(vec![1.0]).quantile(0.5), None);
    }

    #[test]
    fn histograms_with_other_bounds_are_not_mixed() {
        let mut histogram = Histogram::new(vec![1.0]);
        assert!(!histogram.add(&Histogram {
            bounds_ms: vec![2.0],
            counts: vec![3, 0]
        }));
        assert_eq!(histogram.total(), 0);
    }

    #[test]
    fn a_client_that_repeats_its_errors_counts_once_where_clients_are_told_apart() {
        let mut counts = Counts {
            requests: 10,
            errors: 6,
            error_clients: Some(1),
            ..Counts::default()
        };
        assert_eq!(counts.errors_of(ErrorClass::ByClient), 1);
        counts.add(&Counts {
            requests: 10,
            errors: 2,
            ..Counts::default()
        });
        assert_eq!(counts.errors_of(ErrorClass::ByClient), 3);
        assert_eq!(counts.errors_of(ErrorClass::Any), 8);
    }

    #[test]
    fn the_success_rate_of_no_requests_is_unknown() {
        assert_eq!(Counts::default().success_rate_percent(), None);
        let counts = Counts {
            requests: 200,
            errors: 3,
            ..Counts::default()
        };
        assert_eq!(counts.success_rate_percent(), Some(98.5));
    }
}
