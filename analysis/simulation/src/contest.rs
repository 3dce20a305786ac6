//! Who takes part: Serin's judges and the rules of others.

use serin_analysis::judge::errors::{self, Errors};
use serin_analysis::judges::Metric as JudgedMetric;
use serin_analysis::{ErrorClass, Judges, Sample, judges};

use crate::rules::argo::Argo;
use crate::rules::flagger::Flagger;
use crate::rules::kayenta::{Kayenta, Metric};
use crate::scenario::{Mitigation, Scenario};

/// Highest probability of a false rollback that Serin's judges promise here.
pub const ALPHA: f64 = 0.01;

/// What a contestant says after a second.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    /// Roll back.
    Bad,
    /// Shown to be within the tolerance.
    Good,
    /// Neither.
    Undecided,
}

/// Somebody who looks at every second and may say something.
pub trait Contestant {
    /// Sees what was reported of a second, the first of which is 1.
    fn observe(&mut self, second: u64, sample: &Sample) -> Call;

    /// The controller dies and goes on from what it has stored. Those who store nothing are left alone.
    fn restart(&mut self) {}
}

/// A contestant before the start.
#[derive(Clone, Copy)]
pub struct Entry {
    /// Its name in the tables.
    pub name: &'static str,
    /// Whether it is Serin's, with a promise to keep; then warm-ups are left out for it.
    pub ours: bool,
    /// Most runs that it takes part in: some are slow, and only a promise needs many.
    pub runs_max: u64,
    /// A fresh one.
    pub make: fn(&Scenario) -> Box<dyn Contestant>,
}

/// The comparison of errors alone. Its samples carry what counts as an error, and nothing else.
struct OfErrors {
    class: ErrorClass,
    judge: Errors,
    options: errors::Options,
    /// Counts of one arm that wait for the other's.
    unpaired: Sample,
}

impl OfErrors {
    fn boxed(scenario: &Scenario, tolerance: f64) -> Box<dyn Contestant> {
        let class = match scenario.mitigation {
            Mitigation::ByClient => ErrorClass::ByClient,
            Mitigation::None | Mitigation::WarmUp => ErrorClass::Any,
        };
        Box::new(Self {
            class,
            judge: Errors::of(class),
            options: errors::Options {
                alpha: ALPHA,
                tolerance,
            },
            unpaired: Sample::default(),
        })
    }
}

impl Contestant for OfErrors {
    fn observe(&mut self, _: u64, sample: &Sample) -> Call {
        self.unpaired.at_ms = sample.at_ms;
        for (waiting, new) in [
            (&mut self.unpaired.canary, &sample.canary),
            (&mut self.unpaired.primary, &sample.primary),
        ] {
            waiting.requests += new.requests;
            waiting.errors += new.errors_of(self.class);
        }
        if self.unpaired.canary.requests > 0 && self.unpaired.primary.requests > 0 {
            let batch = std::mem::take(&mut self.unpaired);
            self.judge.observe(&batch, &self.options);
        }
        let test = self.judge.test();
        let bound = (1.0 / ALPHA).ln();
        if test.log_peak() >= bound {
            Call::Bad
        } else if test.log_peak_for() >= bound {
            Call::Good
        } else {
            Call::Undecided
        }
    }

    fn restart(&mut self) {
        self.judge = stored(&self.judge);
    }
}

/// Several metrics with one alpha, as the controller runs them.
struct Together {
    judges: Judges,
    options: judges::Options,
}

impl Together {
    /// Of these metrics, equally; of the default ones if there are none.
    fn boxed(scenario: &Scenario, metrics: &[&str], tolerance: f64) -> Box<dyn Contestant> {
        let metrics = metrics.iter().filter_map(|name| JudgedMetric::by_name(name));
        Self::of(scenario, metrics.collect(), tolerance)
    }

    fn weighing(scenario: &Scenario, metrics: &[(&str, f64)], tolerance: f64) -> Box<dyn Contestant> {
        let weighed = |(name, weight): &(&str, f64)| Some(JudgedMetric::by_name(name)?.weighing(*weight));
        Self::of(scenario, metrics.iter().filter_map(weighed).collect(), tolerance)
    }

    fn of(scenario: &Scenario, metrics: Vec<JudgedMetric>, tolerance: f64) -> Box<dyn Contestant> {
        let mut options = judges::Options {
            alpha: ALPHA,
            tolerance,
            ..judges::Options::default()
        };
        if !metrics.is_empty() {
            options.metrics = metrics;
        }
        if scenario.mitigation == Mitigation::ByClient
            && let Some(metric) = JudgedMetric::by_name("errors-by-client")
        {
            for known in options.metrics.iter_mut().filter(|known| known.name == "errors") {
                (known.name, known.kind) = (metric.name.clone(), metric.kind);
            }
        }
        Box::new(Self {
            judges: Judges::default(),
            options,
        })
    }
}

impl Contestant for Together {
    fn observe(&mut self, _: u64, sample: &Sample) -> Call {
        // The configured weight only matters for the check of the split, which is not asked here.
        self.judges.observe(sample, 10.0, &self.options);
        if self.judges.is_bad(&self.options) {
            Call::Bad
        } else {
            Call::Undecided
        }
    }

    fn restart(&mut self) {
        self.judges = stored(&self.judges);
    }
}

/// Through JSON and back, as a status is.
pub(crate) fn stored<T: Clone + serde::Serialize + serde::de::DeserializeOwned>(state: &T) -> T {
    let read = serde_json::to_string(state)
        .ok()
        .and_then(|text| serde_json::from_str(&text).ok());
    read.unwrap_or_else(|| state.clone())
}

/// Runs of Kayenta's judge, whose every analysis sorts all points some sixty times.
pub const KAYENTA_RUNS: u64 = 1000;
/// Runs of everybody for whom nothing is promised, or who takes part as a part of the default too: enough to compare.
pub const OTHER_RUNS: u64 = 2000;

pub(crate) const fn other(name: &'static str, make: fn(&Scenario) -> Box<dyn Contestant>) -> Entry {
    Entry {
        name,
        ours: false,
        runs_max: OTHER_RUNS,
        make,
    }
}

pub(crate) const fn ours(name: &'static str, make: fn(&Scenario) -> Box<dyn Contestant>) -> Entry {
    Entry {
        ours: true,
        runs_max: u64::MAX,
        ..other(name, make)
    }
}

/// Serin without any configuration: errors and p99, tolerance 1.5.
pub const DEFAULT: &str = "Serin, default";
/// With the distribution of latencies as well: what a service whose requests take long enough may choose.
pub const WITH_DISTRIBUTION: &str = "Serin, errors 6, p99 1, latency 1";
/// The names of Serin's error judges, by tolerance.
pub const ERRORS_DEFAULT: &str = "Serin, errors, tolerance 1.5";
/// See [`ERRORS_DEFAULT`].
pub const ERRORS_STRICT: &str = "Serin, errors, tolerance 1";
/// A high tolerance, which is a mitigation of errors that are not independent.
pub const ERRORS_LAX: &str = "Serin, errors, tolerance 3";
/// The likelihood ratio of the canary's true rate, which nobody knows: it cannot be bettered by much.
pub const ORACLE: &str = "a test that knows the canary's rate, tolerance 1.5";

/// Those who judge errors.
pub fn of_errors() -> Vec<Entry> {
    vec![
        ours(ERRORS_DEFAULT, |scenario| OfErrors::boxed(scenario, 1.5)),
        ours(ERRORS_STRICT, |scenario| OfErrors::boxed(scenario, 1.0)),
        ours(ERRORS_LAX, |scenario| OfErrors::boxed(scenario, 3.0)),
        ours(DEFAULT, |scenario| Together::boxed(scenario, &[], 1.5)),
        other("Flagger, 60 s, threshold 5", |_| Box::new(Flagger::new(60, 5))),
        other("Flagger, 10 s, threshold 1", |_| Box::new(Flagger::new(10, 1))),
        other("Argo, 60 s, failureLimit 0", |_| Box::new(Argo::new(60, 0))),
        other("Argo, 10 s, failureLimit 2", |_| Box::new(Argo::new(10, 2))),
        Entry {
            runs_max: KAYENTA_RUNS,
            ..other("Kayenta, every 10 min", |_| {
                Box::new(Kayenta::new(Metric::Errors, 600))
            })
        },
    ]
}

/// Those who judge errors of a canary that is worse, and one who knows by how much.
pub fn of_regressions() -> Vec<Entry> {
    let mut entries = of_errors();
    entries.push(other(ORACLE, |scenario| {
        Box::new(Oracle {
            tolerance: 1.5,
            ratio: scenario.canary / scenario.base,
            log: 0.0,
        })
    }));
    entries
}

/// The likelihood ratio of the canary's true rate ratio against the tolerance: what is left to gain for any other mixture.
struct Oracle {
    tolerance: f64,
    ratio: f64,
    log: f64,
}

impl Contestant for Oracle {
    fn observe(&mut self, _: u64, sample: &Sample) -> Call {
        let (canary, primary) = (sample.canary.requests as f64, sample.primary.requests as f64);
        if canary > 0.0 && primary > 0.0 {
            let share = canary / (canary + primary);
            let bad = (sample.canary.errors + sample.primary.errors) as f64;
            let mean = |ratio: f64| (share * ratio + 1.0 - share).ln();
            self.log += sample.canary.errors as f64 * (self.ratio / self.tolerance).ln()
                - bad * (mean(self.ratio) - mean(self.tolerance));
        }
        if self.log >= (1.0 / ALPHA).ln() {
            Call::Bad
        } else {
            Call::Undecided
        }
    }
}

/// The name of Serin's latency judge with its default tolerance.
pub const LATENCY_DEFAULT: &str = "Serin, p99, tolerance 1.5";
/// The same without tolerance.
pub const LATENCY_STRICT: &str = "Serin, p99, tolerance 1";

/// Those who judge latency.
pub fn of_latency() -> Vec<Entry> {
    vec![
        Entry {
            runs_max: OTHER_RUNS,
            ..ours(LATENCY_DEFAULT, |scenario| {
                Together::boxed(scenario, &["latency-p99"], 1.5)
            })
        },
        ours(LATENCY_STRICT, |scenario| {
            Together::boxed(scenario, &["latency-p99"], 1.0)
        }),
        ours("Serin, p90, tolerance 1", |scenario| {
            Together::boxed(scenario, &["latency-p90"], 1.0)
        }),
        ours("Serin, p50, tolerance 1", |scenario| {
            Together::boxed(scenario, &["latency-p50"], 1.0)
        }),
        Entry {
            runs_max: OTHER_RUNS,
            ..ours("Serin, distribution, tolerance 1.5", |scenario| {
                Together::boxed(scenario, &["latency"], 1.5)
            })
        },
        ours("Serin, distribution, tolerance 1", |scenario| {
            Together::boxed(scenario, &["latency"], 1.0)
        }),
        ours(WITH_DISTRIBUTION, |scenario| {
            Together::weighing(
                scenario,
                &[("errors", 6.0), ("latency-p99", 1.0), ("latency", 1.0)],
                1.5,
            )
        }),
        other("Flagger, 60 s, threshold 5", |_| Box::new(Flagger::new(60, 5))),
        other("Argo, 60 s, failureLimit 0", |_| Box::new(Argo::new(60, 0))),
        Entry {
            runs_max: KAYENTA_RUNS,
            ..other("Kayenta, every 10 min", |_| {
                Box::new(Kayenta::new(Metric::Duration, 600))
            })
        },
    ]
}
