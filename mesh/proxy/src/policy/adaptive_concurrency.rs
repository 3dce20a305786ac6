//! Adaptive concurrency (`envoy.filters.http.adaptive_concurrency`): a limit on requests at a time that follows the
//! latency, by Envoy's gradient controller.
//!
//! From time to time the limit is lowered to almost nothing and the latency measured then is what the service needs when
//! it is idle (`minRTT`). Otherwise, once an interval, the latency of the interval is compared with it:
//! `limit = limit * clamp(minRTT * (1 + buffer) / sampleRTT, 0.5, 2) + sqrt(limit)`. Requests beyond the limit are
//! refused. The clock is an argument; what is shared between workers is two counters and, once a request has ended, a
//! lock around the samples.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use http::StatusCode;
use parking_lot::Mutex;
use serin_xds::pb::envoy::extensions::filters::http::adaptive_concurrency::v3 as pb;

use crate::config::convert::{self, required};
use crate::error::{Refusal, Within};

/// Samples of an interval that are kept; what comes after them counts no more.
const MAX_SAMPLES: usize = 16 * 1024;
/// Intervals at the least limit after which the latency of the idle service is measured anew (Envoy).
const STUCK: u32 = 5;

/// The configuration.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Rules {
    percentile: f64,
    interval_ms: u64,
    least: u32,
    most: u32,
    /// `None` where the latency of the idle service is given.
    measure: Option<Measure>,
    fixed: Option<Duration>,
    buffer: f64,
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Measure {
    every_ms: u64,
    requests: usize,
    jitter: f64,
    concurrency: u32,
}

/// What is decided between requests.
#[derive(Debug)]
struct State {
    samples: Vec<u32>,
    /// Microseconds; 0 while it has not been measured.
    idle: f64,
    /// Whether the idle service is being measured, and the limit from before.
    measuring: Option<u32>,
    interval_ends: u64,
    measure_at: u64,
    stuck: u32,
}

/// The compiled filter.
#[derive(Debug)]
pub struct AdaptiveConcurrency {
    enabled: bool,
    /// Of requests that are refused.
    pub status: StatusCode,
    rules: Rules,
    limit: AtomicU32,
    active: AtomicU32,
    state: Mutex<State>,
}

impl AdaptiveConcurrency {
    /// Compiles the message.
    pub(crate) fn compile(from: &pb::AdaptiveConcurrency) -> Result<Self, Refusal> {
        use pb::adaptive_concurrency::ConcurrencyControllerConfig;
        let path = "gradient_controller_config";
        let Some(ConcurrencyControllerConfig::GradientControllerConfig(config)) =
            &from.concurrency_controller_config
        else {
            return Err(Refusal::new(path, "is missing"));
        };
        let rules = Rules::compile(config).within(path)?;
        let status = from
            .concurrency_limit_exceeded_status
            .as_ref()
            .and_then(|status| u16::try_from(status.code).ok())
            // Envoy: anything that is no error becomes 503.
            .filter(|code| (400..600).contains(code))
            .and_then(|code| StatusCode::from_u16(code).ok())
            .unwrap_or(StatusCode::SERVICE_UNAVAILABLE);
        Ok(Self {
            enabled: from
                .enabled
                .as_ref()
                .is_none_or(|flag| flag.default_value.as_ref().is_none_or(|value| value.value)),
            status,
            limit: AtomicU32::new(match rules.measure {
                Some(measure) => measure.concurrency,
                None => rules.least,
            }),
            active: AtomicU32::new(0),
            state: Mutex::new(State {
                samples: Vec::new(),
                idle: rules.fixed.map_or(0.0, |fixed| fixed.as_micros() as f64),
                measuring: rules.measure.map(|_| rules.least),
                interval_ends: 0,
                measure_at: u64::MAX,
                stuck: 0,
            }),
            rules,
        })
    }

    /// Whether it does anything.
    pub fn enabled(&self) -> bool {
        self.enabled
    }

    /// A place for a request, to be given back by [`Self::leave`]; false when there is none.
    pub fn enter(&self) -> bool {
        let limit = self.limit.load(Ordering::Relaxed);
        if self.active.fetch_add(1, Ordering::Relaxed) >= limit {
            self.active.fetch_sub(1, Ordering::Relaxed);
            return false;
        }
        true
    }

    /// A request has ended after `latency`, or, without one, was broken off. `random` is for the jitter.
    pub fn leave(&self, latency: Option<Duration>, now_ms: u64, random: u64) {
        self.active.fetch_sub(1, Ordering::Relaxed);
        if let Some(latency) = latency {
            let micros = u32::try_from(latency.as_micros()).unwrap_or(u32::MAX);
            self.sample(micros, now_ms, random);
        }
    }

    /// The limit now.
    pub fn limit(&self) -> u32 {
        self.limit.load(Ordering::Relaxed)
    }

    fn sample(&self, micros: u32, now_ms: u64, random: u64) {
        let mut state = self.state.lock();
        let state = &mut *state;
        if state.samples.len() < MAX_SAMPLES {
            state.samples.push(micros);
        }
        if let (Some(before), Some(measure)) = (state.measuring, self.rules.measure) {
            if state.samples.len() >= measure.requests {
                state.idle = f64::from(percentile(&mut state.samples, self.rules.percentile)).max(1.0);
                state.samples.clear();
                state.measuring = None;
                state.stuck = 0;
                state.interval_ends = now_ms + self.rules.interval_ms;
                let jitter = measure.every_ms as f64 * measure.jitter * (random as f64 / u64::MAX as f64);
                state.measure_at = now_ms + measure.every_ms + jitter as u64;
                self.limit.store(before, Ordering::Relaxed);
            }
            return;
        }
        if state.interval_ends == 0 {
            state.interval_ends = now_ms + self.rules.interval_ms;
        }
        if now_ms < state.interval_ends {
            return;
        }
        let sample = f64::from(percentile(&mut state.samples, self.rules.percentile)).max(1.0);
        state.samples.clear();
        state.interval_ends = now_ms + self.rules.interval_ms;
        let before = self.limit.load(Ordering::Relaxed);
        let next = self.rules.next(before, state.idle, sample);
        state.stuck = if next == self.rules.least {
            state.stuck + 1
        } else {
            0
        };
        let measure = self
            .rules
            .measure
            .filter(|_| now_ms >= state.measure_at || state.stuck >= STUCK);
        match measure {
            Some(measure) => {
                state.measuring = Some(next);
                self.limit.store(measure.concurrency, Ordering::Relaxed);
            }
            None => self.limit.store(next, Ordering::Relaxed),
        }
    }
}

impl Rules {
    fn compile(from: &pb::GradientControllerConfig) -> Result<Self, Refusal> {
        let limits = required(from.concurrency_limit_params.as_ref(), "concurrency_limit_params")?;
        let idle = required(from.min_rtt_calc_params.as_ref(), "min_rtt_calc_params")?;
        let number = |given: &Option<serin_xds::pb::google::protobuf::UInt32Value>, default: u32| {
            given.as_ref().map_or(default, |value| value.value).max(1)
        };
        let percent = |given: &Option<serin_xds::pb::envoy::r#type::v3::Percent>, default: f64| {
            given.as_ref().map_or(default, |value| value.value) / 100.0
        };
        let interval = convert::timeout(limits.concurrency_update_interval.as_ref())
            .within("concurrency_limit_params.concurrency_update_interval")?
            .ok_or_else(|| {
                Refusal::new(
                    "concurrency_limit_params.concurrency_update_interval",
                    "is missing",
                )
            })?;
        let every = convert::timeout(idle.interval.as_ref()).within("min_rtt_calc_params.interval")?;
        let fixed = convert::timeout(idle.fixed_value.as_ref()).within("min_rtt_calc_params.fixed_value")?;
        if every.is_some() == fixed.is_some() {
            return Err(Refusal::new(
                "min_rtt_calc_params",
                "needs either interval or fixed_value",
            ));
        }
        Ok(Self {
            percentile: percent(&from.sample_aggregate_percentile, 50.0).clamp(0.0, 1.0),
            interval_ms: (interval.as_millis() as u64).max(1),
            least: number(&limits.min_concurrency_limit, 3),
            most: number(&limits.max_concurrency_limit, 1000),
            measure: every.map(|every| Measure {
                every_ms: (every.as_millis() as u64).max(1),
                requests: number(&idle.request_count, 50) as usize,
                jitter: percent(&idle.jitter, 15.0),
                concurrency: number(&idle.min_concurrency, 3),
            }),
            fixed,
            buffer: percent(&idle.buffer, 25.0),
        })
    }

    /// The limit that follows `before` when the idle service takes `idle` and the present one `sample`.
    fn next(&self, before: u32, idle: f64, sample: f64) -> u32 {
        let gradient = (idle * (1.0 + self.buffer) / sample).clamp(0.5, 2.0);
        let limit = f64::from(before) * gradient;
        let limit = limit + limit.sqrt();
        (limit as u32).clamp(self.least, self.most)
    }
}

/// The sample at `share` of the way from the least to the largest.
fn percentile(samples: &mut [u32], share: f64) -> u32 {
    if samples.is_empty() {
        return 0;
    }
    let index = (share * (samples.len() - 1) as f64).round() as usize;
    *samples.select_nth_unstable(index).1
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serin_xds::pb::envoy::r#type::v3 as envoy_type;
    use serin_xds::pb::google::protobuf as google;

    use super::*;

    fn millis(value: i32) -> Option<google::Duration> {
        Some(google::Duration {
            seconds: 0,
            nanos: value * 1_000_000,
        })
    }

    fn message(fixed: bool) -> pb::AdaptiveConcurrency {
        use pb::gradient_controller_config::{
            ConcurrencyLimitCalculationParams, MinimumRttCalculationParams,
        };
        let number = |value| Some(google::UInt32Value { value });
        pb::AdaptiveConcurrency {
            concurrency_controller_config: Some(
                pb::adaptive_concurrency::ConcurrencyControllerConfig::GradientControllerConfig(
                    pb::GradientControllerConfig {
                        sample_aggregate_percentile: Some(envoy_type::Percent { value: 90.0 }),
                        concurrency_limit_params: Some(ConcurrencyLimitCalculationParams {
                            max_concurrency_limit: number(100),
                            concurrency_update_interval: millis(100),
                            min_concurrency_limit: None,
                        }),
                        min_rtt_calc_params: Some(MinimumRttCalculationParams {
                            interval: if fixed { None } else { millis(900) },
                            fixed_value: if fixed { millis(10) } else { None },
                            request_count: number(5),
                            ..Default::default()
                        }),
                    },
                ),
            ),
            ..Default::default()
        }
    }

    #[test]
    fn the_limit_grows_while_answers_are_as_fast_as_idle_and_shrinks_when_they_slow_down() {
        let filter = AdaptiveConcurrency::compile(&message(true)).unwrap();
        let mut now = 1_000;
        let mut run = |micros: u32, intervals: u32| {
            for _ in 0..intervals {
                for _ in 0..10 {
                    filter.sample(micros, now, 0);
                }
                now += 101;
                filter.sample(micros, now, 0);
            }
            filter.limit()
        };
        assert_eq!(run(10_000, 20), 100, "the maximum");
        let slower = run(100_000, 3);
        assert!((3..60).contains(&slower), "{slower}");
        assert_eq!(run(1_000_000, 20), 3, "the minimum");
    }

    #[test]
    fn the_idle_service_is_measured_at_a_low_limit_first_and_again_later() {
        let filter = AdaptiveConcurrency::compile(&message(false)).unwrap();
        assert_eq!(filter.limit(), 3);
        let held: Vec<_> = (0..5).map(|_| filter.enter()).collect();
        assert_eq!(held, [true, true, true, false, false]);
        for _ in 0..3 {
            filter.leave(None, 0, 0);
        }
        for _ in 0..5 {
            assert!(filter.enter());
            filter.leave(Some(Duration::from_millis(10)), 1_000, 0);
        }
        assert!(filter.state.lock().measuring.is_none());
        assert_eq!(filter.state.lock().idle, 10_000.0);
        for step in 1..10 {
            filter.sample(10_000, 1_000 + step * 101, 0);
        }
        assert!(
            filter.state.lock().measuring.is_some(),
            "900 ms later it is measured again"
        );
        assert_eq!(filter.limit(), 3);
    }

    #[test]
    fn either_an_interval_or_a_fixed_latency_is_needed() {
        let mut neither = message(true);
        if let Some(pb::adaptive_concurrency::ConcurrencyControllerConfig::GradientControllerConfig(config)) =
            &mut neither.concurrency_controller_config
        {
            config.min_rtt_calc_params = Some(Default::default());
        }
        assert_eq!(
            AdaptiveConcurrency::compile(&neither).unwrap_err().path,
            "gradient_controller_config.min_rtt_calc_params"
        );
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn the_limit_stays_within_its_bounds_and_as_many_requests_as_it_says_are_let_in(
            samples in proptest::collection::vec((1u32..1_000_000, 0u64..300), 1..200),
        ) {
            let filter = AdaptiveConcurrency::compile(&message(false)).unwrap();
            let mut now = 0;
            for (micros, gap) in samples {
                now += gap;
                filter.sample(micros, now, u64::from(micros));
                prop_assert!((3..=100).contains(&filter.limit()), "{}", filter.limit());
            }
            let limit = filter.limit();
            let let_in = (0..limit + 10).filter(|_| filter.enter()).count();
            prop_assert_eq!(let_in, limit as usize);
        }
    }
}
