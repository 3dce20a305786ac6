//! Who takes part: Serin's judges and the rules of others.

use serin_analysis::judge::errors::{self, Errors};
use serin_analysis::judges::Metric as JudgedMetric;
use serin_analysis::{ErrorClass, Judges, Sample, judges};

use crate::rules::argo::Argo;
use crate::rules::flagger::Flagger;
use crate::rules::kayenta::{Kayenta, Metric};

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
    /// Most runs that it takes part in: some are slow.
    pub runs_max: u64,
    /// A fresh one.
    pub make: fn() -> Box<dyn Contestant>,
}

/// The comparison of errors alone.
struct OfErrors {
    judge: Errors,
    options: errors::Options,
    /// Counts of one arm that wait for the other's.
    unpaired: Sample,
}

impl OfErrors {
    fn boxed(tolerance: f64) -> Box<dyn Contestant> {
        Box::new(Self {
            judge: Errors::of(ErrorClass::Any),
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
            waiting.errors += new.errors;
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
    fn boxed(metrics: &[&str], tolerance: f64) -> Box<dyn Contestant> {
        let mut options = judges::Options {
            alpha: ALPHA,
            tolerance,
            ..judges::Options::default()
        };
        if !metrics.is_empty() {
            options.metrics = metrics
                .iter()
                .filter_map(|name| JudgedMetric::by_name(name))
                .collect();
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
fn stored<T: Clone + serde::Serialize + serde::de::DeserializeOwned>(state: &T) -> T {
    let read = serde_json::to_string(state)
        .ok()
        .and_then(|text| serde_json::from_str(&text).ok());
    read.unwrap_or_else(|| state.clone())
}

/// Runs of Kayenta's judge, whose every analysis sorts all points some sixty times.
const KAYENTA_RUNS: u64 = 2000;

const fn other(name: &'static str, make: fn() -> Box<dyn Contestant>) -> Entry {
    Entry {
        name,
        ours: false,
        runs_max: u64::MAX,
        make,
    }
}

const fn ours(name: &'static str, make: fn() -> Box<dyn Contestant>) -> Entry {
    Entry {
        ours: true,
        ..other(name, make)
    }
}

/// Serin without any configuration: errors and p99, tolerance 1.5, alpha shared three to one.
pub const DEFAULT: &str = "Serin, default";
/// The names of Serin's error judges, by tolerance.
pub const ERRORS_DEFAULT: &str = "Serin, errors, tolerance 1.5";
/// See [`ERRORS_DEFAULT`].
pub const ERRORS_STRICT: &str = "Serin, errors, tolerance 1";

/// Those who judge errors.
pub fn of_errors() -> Vec<Entry> {
    vec![
        ours(ERRORS_DEFAULT, || OfErrors::boxed(1.5)),
        ours(ERRORS_STRICT, || OfErrors::boxed(1.0)),
        ours(DEFAULT, || Together::boxed(&[], 1.5)),
        other("Flagger, 60 s, threshold 5", || Box::new(Flagger::new(60, 5))),
        other("Flagger, 10 s, threshold 1", || Box::new(Flagger::new(10, 1))),
        other("Argo, 60 s, failureLimit 0", || Box::new(Argo::new(60, 0))),
        other("Argo, 10 s, failureLimit 2", || Box::new(Argo::new(10, 2))),
        Entry {
            runs_max: KAYENTA_RUNS,
            ..other("Kayenta, every 10 min", || {
                Box::new(Kayenta::new(Metric::Errors, 600))
            })
        },
    ]
}

/// The name of Serin's latency judge with its default tolerance.
pub const LATENCY_DEFAULT: &str = "Serin, p99, tolerance 1.5";
/// The same without tolerance.
pub const LATENCY_STRICT: &str = "Serin, p99, tolerance 1";

/// Those who judge latency.
pub fn of_latency() -> Vec<Entry> {
    vec![
        ours(LATENCY_DEFAULT, || Together::boxed(&["latency-p99"], 1.5)),
        ours(LATENCY_STRICT, || Together::boxed(&["latency-p99"], 1.0)),
        ours("Serin, distribution, tolerance 1.5", || {
            Together::boxed(&["latency"], 1.5)
        }),
        ours(DEFAULT, || Together::boxed(&[], 1.5)),
        other("Flagger, 60 s, threshold 5", || Box::new(Flagger::new(60, 5))),
        other("Argo, 60 s, failureLimit 0", || Box::new(Argo::new(60, 0))),
        Entry {
            runs_max: KAYENTA_RUNS,
            ..other("Kayenta, every 10 min", || {
                Box::new(Kayenta::new(Metric::Duration, 600))
            })
        },
    ]
}
