//! Judges that need no comparison by counts: an absolute guard, and the rules for one number per minute.

use std::sync::LazyLock;

use serin_analysis::judge::group_sequential::{Plan, Spending};
use serin_analysis::judge::guard::{self, Guard};
use serin_analysis::judge::mann_whitney::{Direction, EffectSize};
use serin_analysis::judge::threshold::{Builtin, Range};
use serin_analysis::judge::values::{Rule, Values};
use serin_analysis::judge::{flagger, hysteresis, mann_whitney};
use serin_analysis::{Counts, Sample};

use crate::contest::{ALPHA, Call, Contestant, Entry, KAYENTA_RUNS, other, ours, stored};
use crate::rules::SUCCESS_MIN;
use crate::rules::flagger::Flagger;

/// The share of errors that the absolute judges are given as their limit.
const LIMIT: f64 = 0.01;

/// The same in every run, and a tenth of a second to compute.
static SIXTY_LOOKS: LazyLock<Plan> = LazyLock::new(|| Plan::new(60, ALPHA, Spending::ObrienFleming));

/// Those who hold the canary against a limit, or its numbers per minute against the primary's.
pub fn of_absolute() -> Vec<Entry> {
    vec![
        ours("Serin, guard at 1 %", |_| {
            Box::new(Guarded {
                guard: Guard::default(),
                options: guard::Options::new(LIMIT, None, ALPHA),
            })
        }),
        other("Serin, group-sequential, 60 looks", |_| {
            PerMinute::boxed(Rule::GroupSequential {
                plan: SIXTY_LOOKS.clone(),
                higher_is_worse: true,
            })
        }),
        Entry {
            runs_max: KAYENTA_RUNS,
            ..other("Serin, Mann-Whitney every 10 min", |_| {
                let options = mann_whitney::Options::new(Direction::Increase, EffectSize::MeanRatio);
                PerMinute::boxed(Rule::MannWhitney(options))
            })
        },
        other("Serin, range with hysteresis of 3", |_| {
            PerMinute::boxed(Rule::Range(hysteresis::Options {
                failures: 3,
                ..hysteresis::Options::plain(Range {
                    min: None,
                    max: Some(100.0 * LIMIT),
                })
            }))
        }),
        other("Serin, Flagger's rule, 60 s, threshold 5", |_| {
            Box::new(AsFlagger::new())
        }),
        other("Flagger, 60 s, threshold 5", |_| Box::new(Flagger::new(60, 5))),
    ]
}

struct Guarded {
    guard: Guard,
    options: guard::Options,
}

impl Contestant for Guarded {
    fn observe(&mut self, _: u64, sample: &Sample) -> Call {
        let counts = &sample.canary;
        self.guard.observe(counts.requests, counts.errors, &self.options);
        if self.guard.log_peak() >= (1.0 / self.options.alpha).ln() {
            Call::Bad
        } else {
            Call::Undecided
        }
    }

    fn restart(&mut self) {
        self.guard = stored(&self.guard);
    }
}

/// A rule for values: percent of failing requests of each arm, minute by minute.
struct PerMinute {
    minute: Sample,
    values: Values,
    rule: Rule,
}

impl PerMinute {
    fn boxed(rule: Rule) -> Box<dyn Contestant> {
        Box::new(Self {
            minute: Sample::default(),
            values: Values::default(),
            rule,
        })
    }
}

impl Contestant for PerMinute {
    fn observe(&mut self, second: u64, sample: &Sample) -> Call {
        self.minute.add(sample);
        if !second.is_multiple_of(60) {
            return Call::Undecided;
        }
        let minute = std::mem::take(&mut self.minute);
        let failing = |counts: &Counts| counts.success_rate_percent().map(|rate| 100.0 - rate);
        if let Some(canary) = failing(&minute.canary) {
            self.values.observe(canary, failing(&minute.primary), &self.rule);
        }
        // Kayenta's test takes milliseconds and is asked as often as Kayenta.
        let asked = !matches!(self.rule, Rule::MannWhitney(_)) || second.is_multiple_of(600);
        if asked && self.values.verdict(&self.rule).is_bad() {
            Call::Bad
        } else {
            Call::Undecided
        }
    }

    fn restart(&mut self) {
        self.values = stored(&self.values);
    }
}

/// Flagger's rule as Serin has it, beside the harness' own: they must agree.
struct AsFlagger {
    judge: flagger::Flagger,
    options: flagger::Options,
}

impl AsFlagger {
    fn new() -> Self {
        Self {
            judge: flagger::Flagger::default(),
            options: flagger::Options {
                interval_ms: 60_000,
                threshold: 5,
                metrics: vec![flagger::Metric {
                    builtin: Builtin::RequestSuccessRate,
                    range: Range {
                        min: Some(SUCCESS_MIN),
                        max: None,
                    },
                    window_ms: 60_000,
                }],
            },
        }
    }
}

impl Contestant for AsFlagger {
    fn observe(&mut self, _: u64, sample: &Sample) -> Call {
        self.judge.observe(sample, &self.options);
        if self.judge.verdict(&self.options).is_bad() {
            Call::Bad
        } else {
            Call::Undecided
        }
    }
}
