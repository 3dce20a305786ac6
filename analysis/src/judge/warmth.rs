//! Sanity: is there enough traffic, and is the canary warm? A process that has just started is slower than itself a minute
//! later; what it does until then is not held against it.
//!
//! The canary's requests are taken in groups; in each, the share that is slower than the primary's running p90 is
//! counted. The canary is warm as soon as a group is no better than the one before it, beyond chance (1.64 standard
//! deviations, one-sided 5 %): it has stopped getting faster. Also when `longest` has passed: a canary that gets faster for
//! ever is judged all the same. Errors count from the beginning, unless asked otherwise.
//!
//! Excluding what came before depends on the excluded data alone, so what is judged afterwards stays valid.

use serde::{Deserialize, Serialize};

use super::running::{Running, coarse};
use crate::sample::Sample;

/// Canary requests per group.
const GROUP: u64 = 50;
/// One-sided 95 %.
const BEYOND_CHANCE: f64 = 1.645;

/// When a canary counts as warm.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Options {
    /// It is never warm before this, in milliseconds since its first request.
    pub shortest_ms: i64,
    /// It is always warm after this.
    pub longest_ms: i64,
    /// Whether errors do not count before either: for canaries whose cold caches make requests fail.
    #[serde(default)]
    pub errors: bool,
}

impl Options {
    /// No warm-up: warm from the first request on.
    pub const NONE: Self = Self {
        shortest_ms: 0,
        longest_ms: 0,
        errors: false,
    };
}

/// Whether the canary is warm.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Warmth {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    first_ms: Option<i64>,
    group: (u64, u64),
    #[serde(default, skip_serializing_if = "Option::is_none")]
    previous: Option<(u64, u64)>,
    warm: bool,
}

impl Warmth {
    /// Takes in one interval and tells whether its durations count: the canary was warm before it.
    pub fn observe(&mut self, sample: &Sample, primary: &Running, options: &Options) -> bool {
        if options.longest_ms <= 0 {
            self.warm = true;
        }
        let was_warm = self.warm;
        let latency = coarse(&sample.canary.latency);
        let requests = latency.total();
        if self.warm || (requests == 0 && sample.canary.requests == 0) {
            return was_warm;
        }
        let first = *self.first_ms.get_or_insert(sample.at_ms);
        let age = sample.at_ms.saturating_sub(first);
        if age >= options.longest_ms {
            self.warm = true;
            return was_warm;
        }
        let bound = primary
            .matches(&latency)
            .then(|| primary.survival().bound_near(0.9))
            .flatten();
        let Some((index, _)) = bound else {
            return was_warm;
        };
        self.group.0 += requests;
        self.group.1 += latency.counts.iter().skip(index + 1).sum::<u64>();
        if self.group.0 < GROUP {
            return was_warm;
        }
        let now = std::mem::take(&mut self.group);
        if let Some(before) = self.previous.replace(now)
            && age >= options.shortest_ms
        {
            self.warm = !is_lower(now, before);
        }
        was_warm
    }

    /// Whether the canary is warm now.
    pub const fn is_warm(&self) -> bool {
        self.warm
    }
}

/// Whether the share of the first is lower beyond chance.
fn is_lower((n, x): (u64, u64), (before_n, before_x): (u64, u64)) -> bool {
    let (n, x, before_n, before_x) = (n as f64, x as f64, before_n as f64, before_x as f64);
    let pooled = (x + before_x) / (n + before_n);
    let deviation = (pooled * (1.0 - pooled) * (1.0 / n + 1.0 / before_n)).sqrt();
    before_x / before_n - x / n > BEYOND_CHANCE * deviation
}

/// Requests of each arm below which no comparison is worth showing.
pub const ENOUGH: u64 = 20;

/// What is missing for a comparison at all, if anything.
pub fn too_little(canary: u64, primary: u64) -> Option<String> {
    let missing = |arm: &str, requests: u64| {
        format!(
            "only {requests} requests to the {arm}; a comparison starts to tell something from {ENOUGH} on"
        )
    };
    if canary < ENOUGH {
        Some(missing("canary", canary))
    } else if primary < ENOUGH {
        Some(missing("primary", primary))
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::super::quantile::tests::{histogram, log_normal};
    use super::*;
    use crate::random::Random;

    fn warm_after(cold_seconds: i64, options: &Options) -> Option<i64> {
        let mut random = Random::new(8);
        let mut running = Running::default();
        let mut warmth = Warmth::default();
        running.remember(&histogram(&mut random, 2000, log_normal(0.5, 1.0)).latency);
        (0..200).find(|second| {
            // Ten times as slow at first, and each second a little less.
            let factor = (10.0 * (1.0 - *second as f64 / cold_seconds as f64)).max(1.0);
            let sample = Sample {
                at_ms: second * 1000,
                from_ms: None,
                canary: histogram(&mut random, 30, log_normal(0.5, factor)),
                primary: histogram(&mut random, 300, log_normal(0.5, 1.0)),
            };
            warmth.observe(&sample, &running, options)
        })
    }

    #[test]
    fn a_canary_is_warm_when_it_has_stopped_getting_faster() {
        let options = Options {
            shortest_ms: 5000,
            longest_ms: 120_000,
            errors: false,
        };
        let warm = warm_after(1, &options).unwrap();
        assert!((5..20).contains(&warm), "{warm}");
    }

    #[test]
    fn it_is_never_warm_too_early_and_always_at_last() {
        let early = Options {
            shortest_ms: 30_000,
            longest_ms: 120_000,
            errors: false,
        };
        assert!(warm_after(1, &early).unwrap() >= 30);
        let late = Options {
            shortest_ms: 0,
            longest_ms: 10_000,
            errors: false,
        };
        assert!(warm_after(100, &late).unwrap() <= 12);
        assert_eq!(warm_after(100, &Options::NONE), Some(0));
    }

    #[test]
    fn too_little_traffic_is_named_with_the_arm_that_lacks_it() {
        assert!(too_little(3, 1000).unwrap().contains("3 requests to the canary"));
        assert!(too_little(30, 1).unwrap().contains("primary"));
        assert_eq!(too_little(20, 20), None);
    }
}
