//! Who takes part: Serin's judges and the rules of others.

use serin_analysis::Sample;
use serin_analysis::judge::comparison::{Comparison, Options};

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

struct Errors {
    judge: Comparison,
    options: Options,
}

impl Errors {
    fn boxed(tolerance: f64) -> Box<dyn Contestant> {
        Box::new(Self {
            judge: Comparison::default(),
            options: Options {
                alpha: ALPHA,
                tolerance,
            },
        })
    }
}

impl Contestant for Errors {
    fn observe(&mut self, _: u64, sample: &Sample) -> Call {
        self.judge.observe(sample, &self.options);
        if self.judge.evidence() >= 1.0 / ALPHA {
            Call::Bad
        } else {
            Call::Undecided
        }
    }

    fn restart(&mut self) {
        self.judge = stored(&self.judge);
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

/// The names of Serin's error judges, by tolerance.
pub const ERRORS_DEFAULT: &str = "Serin, errors, tolerance 1.5";
/// See [`ERRORS_DEFAULT`].
pub const ERRORS_STRICT: &str = "Serin, errors, tolerance 1";

/// Those who judge errors.
pub fn of_errors() -> Vec<Entry> {
    vec![
        Entry {
            ours: true,
            ..other(ERRORS_DEFAULT, || Errors::boxed(1.5))
        },
        Entry {
            ours: true,
            ..other(ERRORS_STRICT, || Errors::boxed(1.0))
        },
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

/// Those who judge latency.
pub fn of_latency() -> Vec<Entry> {
    vec![
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
