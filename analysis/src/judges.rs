//! All judges of one run: which metrics, one overall alpha, one state to keep, one verdict.
//!
//! Samples of the two arms may arrive one after the other; they are paired here before any judge sees them. When a batch is
//! complete depends on how many requests there were and never on how they went, so the evidence stays what it promises.
//!
//! The overall alpha is divided by weights; each metric holds its share. The evidence of all comparisons together,
//! `Σ v_j E_j`, is an e-process too, whatever the dependence between the metrics: it may stop a release that no metric alone
//! would stop, at no cost.

use serde::{Deserialize, Serialize};

use crate::judge::ratio::Grid;
use crate::judge::running::{Durations, Running};
use crate::judge::warmth::{self, Warmth};
use crate::judge::{distribution, errors, guard, quantile, split};
use crate::math::log_sum_exp;
use crate::sample::{Counts, ErrorClass, Sample};
use crate::text;
use crate::verdict::{Combined, Evidence, MetricVerdict, Policy, Verdict, combine};

/// How long counts of one arm wait for counts of the other, in milliseconds. Older ones say nothing about what comes now.
const UNPAIRED_MAX_MS: i64 = 10_000;

/// What a metric measures.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", tag = "kind")]
pub enum Kind {
    /// Errors of a class, against the primary's.
    Errors {
        /// Which errors.
        #[serde(default)]
        class: ErrorClass,
    },
    /// Latency at a quantile, against the primary's.
    Latency {
        /// Above 0, below 1.
        quantile: f64,
    },
    /// The whole distribution of latencies, against the primary's.
    Distribution,
    /// The canary's error rate alone: an absolute guard.
    ErrorRate {
        /// The acceptable share of errors.
        acceptable: f64,
        /// The share that must be found; three times as much if not given.
        #[serde(default)]
        unacceptable: Option<f64>,
    },
    /// The canary's latency alone: at most `1 − quantile` of the requests may take longer than the bound.
    LatencyBound {
        /// Above 0, below 1.
        quantile: f64,
        /// In milliseconds.
        bound_ms: f64,
    },
}

/// A metric of the comparison.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Metric {
    /// Its name in status and verdicts.
    pub name: String,
    /// What it measures.
    #[serde(flatten)]
    pub kind: Kind,
    /// Its part of alpha, in relation to the other weights; above 0.
    pub weight: f64,
    /// Its own tolerance, where it differs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tolerance: Option<f64>,
}

impl Metric {
    /// A metric by its name: `errors`, `errors-5xx`, `errors-grpc`, `errors-connection`, `errors-by-client`, `latency-p50`
    /// (or any other percentile), `latency` (the whole distribution).
    pub fn by_name(name: &str) -> Option<Self> {
        let kind = match name {
            "errors" => Kind::Errors {
                class: ErrorClass::Any,
            },
            "errors-5xx" => Kind::Errors {
                class: ErrorClass::Http5xx,
            },
            "errors-grpc" => Kind::Errors {
                class: ErrorClass::Grpc,
            },
            "errors-connection" => Kind::Errors {
                class: ErrorClass::Connection,
            },
            "errors-by-client" => Kind::Errors {
                class: ErrorClass::ByClient,
            },
            "latency" => Kind::Distribution,
            _ => {
                let percentile: f64 = name.strip_prefix("latency-p")?.parse().ok()?;
                if !(percentile > 0.0 && percentile < 100.0) {
                    return None;
                }
                Kind::Latency {
                    quantile: percentile / 100.0,
                }
            }
        };
        Some(Self {
            name: name.to_owned(),
            kind,
            weight: 1.0,
            tolerance: None,
        })
    }

    /// The same with another weight.
    pub fn weighing(mut self, weight: f64) -> Self {
        self.weight = weight;
        self
    }
}

/// What a run is judged by. [`Default`] is what applies without any configuration.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Options {
    /// Highest probability with which a release within the tolerance is ever stopped, all metrics together.
    pub alpha: f64,
    /// The ratio canary : primary that is still tolerated, at least 1.
    pub tolerance: f64,
    /// The metrics, in order.
    pub metrics: Vec<Metric>,
    /// How long the durations of a canary that has just started may be left out.
    pub warm_up: warmth::Options,
    /// What happens where there is nothing to measure.
    pub on_no_data: Policy,
    /// What happens where the source fails.
    pub on_provider_error: Policy,
}

impl Default for Options {
    /// One healthy release in a hundred; half as many errors again, and half as high odds of being slow again, as the
    /// primary; errors and p99, three to one. The whole distribution is not among them: where a request takes a
    /// millisecond, a canary with a tenth of the traffic is truly slower by tenths of that, its connections and caches
    /// being colder, and that is no reason to stop it.
    fn default() -> Self {
        Self {
            alpha: 0.01,
            tolerance: 1.5,
            metrics: ["errors", "latency-p99"]
                .into_iter()
                .filter_map(Metric::by_name)
                .zip([3.0, 1.0])
                .map(|(metric, weight)| metric.weighing(weight))
                .collect(),
            warm_up: warmth::Options::NONE,
            on_no_data: Policy::Hold,
            on_provider_error: Policy::Hold,
        }
    }
}

impl Options {
    /// A metric's share of alpha, 0 to 1.
    pub fn share(&self, metric: &Metric) -> f64 {
        let all: f64 = self.metrics.iter().map(|metric| metric.weight.max(0.0)).sum();
        if all > 0.0 {
            (metric.weight.max(0.0) / all).max(1e-6)
        } else {
            1.0 / self.metrics.len().max(1) as f64
        }
    }

    /// A metric's alpha.
    pub fn alpha_of(&self, metric: &Metric) -> f64 {
        self.alpha * self.share(metric)
    }

    /// A metric's tolerance.
    pub fn tolerance_of(&self, metric: &Metric) -> f64 {
        metric.tolerance.unwrap_or(self.tolerance).max(1.0)
    }

    fn errors(&self, metric: &Metric) -> errors::Options {
        errors::Options {
            alpha: self.alpha_of(metric),
            tolerance: self.tolerance_of(metric),
        }
    }

    fn latency(&self, metric: &Metric, quantile: f64) -> quantile::Options {
        quantile::Options {
            alpha: self.alpha_of(metric),
            tolerance: self.tolerance_of(metric),
            quantile,
        }
    }

    fn distribution(&self, metric: &Metric) -> distribution::Options {
        distribution::Options {
            alpha: self.alpha_of(metric),
            tolerance: self.tolerance_of(metric),
        }
    }

    fn guard(&self, metric: &Metric, acceptable: f64, unacceptable: Option<f64>) -> guard::Options {
        guard::Options::new(acceptable, unacceptable, self.alpha_of(metric))
    }
}

/// The state of one metric's judge.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
enum State {
    Errors(errors::Errors),
    Latency(quantile::Latency),
    Distribution(distribution::Distribution),
    Guard(guard::Guard),
}

impl State {
    fn of(kind: Kind) -> Self {
        match kind {
            Kind::Errors { class } => Self::Errors(errors::Errors::of(class)),
            Kind::Latency { .. } => Self::Latency(Default::default()),
            Kind::Distribution => Self::Distribution(Default::default()),
            Kind::ErrorRate { .. } | Kind::LatencyBound { .. } => Self::Guard(Default::default()),
        }
    }

    fn log_evidence(&self, metric: &Metric, options: &Options) -> f64 {
        match (self, metric.kind) {
            (Self::Errors(errors), _) => errors
                .test()
                .log_evidence(options.tolerance_of(metric), &Grid::ERRORS),
            (Self::Latency(latency), Kind::Latency { quantile }) => {
                let tolerance = options.latency(metric, quantile).share_tolerance();
                latency.test().log_evidence(tolerance, &Grid::SLOW)
            }
            (Self::Latency(_), _) => 0.0,
            (Self::Distribution(distribution), _) => distribution.log_evidence(),
            (Self::Guard(guard), _) => guard.log_evidence(),
        }
    }

    /// What the evidence does not exceed, without its logarithms.
    fn log_ceiling(&self) -> f64 {
        match self {
            Self::Errors(errors) => errors.test().log_ceiling(),
            Self::Latency(latency) => latency.test().log_ceiling(),
            Self::Distribution(distribution) => distribution.log_ceiling(),
            Self::Guard(guard) => guard.log_evidence(),
        }
    }

    const fn log_peak(&self) -> f64 {
        match self {
            Self::Errors(errors) => errors.test().log_peak(),
            Self::Latency(latency) => latency.test().log_peak(),
            Self::Distribution(distribution) => distribution.log_peak(),
            Self::Guard(guard) => guard.log_peak(),
        }
    }

    const fn fits(&self, kind: Kind) -> bool {
        matches!(
            (self, kind),
            (Self::Errors(_), Kind::Errors { .. })
                | (Self::Latency(_), Kind::Latency { .. })
                | (Self::Distribution(_), Kind::Distribution)
                | (Self::Guard(_), Kind::ErrorRate { .. } | Kind::LatencyBound { .. })
        )
    }
}

/// The evidence of a run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Judges {
    /// By metric name.
    states: Vec<(String, State)>,
    /// The highest `ln Σ v_j E_j` so far.
    peak: f64,
    #[serde(default)]
    primary: Running,
    #[serde(default)]
    warmth: Warmth,
    #[serde(default)]
    split: split::Split,
    /// Totals of the run.
    totals: Totals,
    /// What waits for the other arm. Not kept over a restart: what is lost is lost whatever it said.
    #[serde(skip)]
    unpaired: Option<Sample>,
}

/// Requests of the run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Totals {
    /// To the canary.
    pub canary: u64,
    /// Those that failed.
    pub canary_errors: u64,
    /// To the primary.
    pub primary: u64,
    /// Those that failed.
    pub primary_errors: u64,
}

impl Judges {
    /// Takes in one interval; `weight_percent` is the weight that was live. O(metrics × buckets).
    pub fn observe(&mut self, sample: &Sample, weight_percent: f64, options: &Options) {
        self.align(options);
        let began = self
            .unpaired
            .as_ref()
            .map_or(sample.at_ms, |waiting| waiting.at_ms);
        let batch = match self.unpaired.take() {
            None => std::borrow::Cow::Borrowed(sample),
            Some(mut waiting) => {
                waiting.add(sample);
                std::borrow::Cow::Owned(waiting)
            }
        };
        let both = batch.canary.requests > 0 && batch.primary.requests > 0;
        if !both && sample.at_ms.saturating_sub(began) < UNPAIRED_MAX_MS {
            let mut batch = batch.into_owned();
            batch.at_ms = began;
            self.unpaired = Some(batch);
            return;
        }
        self.batch(&batch, weight_percent, options);
    }

    /// What is known of the primary before the canary gets traffic: it makes the judges of latency ready at once.
    pub fn learn_primary(&mut self, primary: &Counts) {
        self.primary
            .remember(&crate::judge::running::coarse(&primary.latency));
    }

    fn batch(&mut self, batch: &Sample, weight_percent: f64, options: &Options) {
        self.totals.canary += batch.canary.requests;
        self.totals.canary_errors += batch.canary.errors;
        self.totals.primary += batch.primary.requests;
        self.totals.primary_errors += batch.primary.errors;
        self.split
            .observe(batch.canary.requests, batch.primary.requests, weight_percent);
        let warm = self.warmth.observe(batch, &self.primary, &options.warm_up);
        let of_durations = |metric: &Metric| matches!(metric.kind, Kind::Latency { .. } | Kind::Distribution);
        let durations =
            (warm && options.metrics.iter().any(of_durations)).then(|| Durations::of(batch, &self.primary));
        for (metric, (_, state)) in options.metrics.iter().zip(&mut self.states) {
            match (metric.kind, state) {
                (Kind::Errors { .. }, State::Errors(errors)) if warm || !options.warm_up.errors => {
                    errors.observe(batch, &options.errors(metric));
                }
                (Kind::Latency { quantile }, State::Latency(latency)) => {
                    if let Some(durations) = &durations {
                        latency.observe(batch.at_ms, durations, &options.latency(metric, quantile));
                    }
                }
                (Kind::Distribution, State::Distribution(distribution)) => {
                    if let Some(durations) = &durations {
                        distribution.observe(durations, &options.distribution(metric));
                    }
                }
                (
                    Kind::ErrorRate {
                        acceptable,
                        unacceptable,
                    },
                    State::Guard(guard),
                ) => guard.observe(
                    batch.canary.requests,
                    batch.canary.errors,
                    &options.guard(metric, acceptable, unacceptable),
                ),
                (Kind::LatencyBound { quantile, bound_ms }, State::Guard(guard)) if warm => {
                    let latency = &batch.canary.latency;
                    // The first bucket bound that is not below the configured one: never stricter than asked for.
                    if let Some(bound) = latency.bounds_ms.iter().find(|bound| **bound >= bound_ms) {
                        let options = options.guard(metric, 1.0 - quantile, None);
                        guard.observe(latency.total(), latency.above(*bound), &options);
                    }
                }
                _ => {}
            }
        }
        self.learn_primary(&batch.primary);
        // A weighted mean never exceeds its largest part: most of the time there is nothing to add up.
        if self
            .states
            .iter()
            .any(|(_, state)| state.log_ceiling() > self.peak)
        {
            self.peak = self.peak.max(self.log_evidence(options));
        }
    }

    /// A step with another weight begins: that it is within the tolerance must be shown again.
    pub fn begin_step(&mut self) {
        self.split.begin_step();
        for (_, state) in &mut self.states {
            match state {
                State::Errors(errors) => errors.begin_step(),
                State::Latency(latency) => latency.begin_step(),
                State::Distribution(distribution) => distribution.begin_step(),
                State::Guard(guard) => guard.begin_step(),
            }
        }
    }

    /// Makes the states those of the options: a metric that came in the middle of a run begins with nothing.
    fn align(&mut self, options: &Options) {
        let aligned = self.states.len() == options.metrics.len()
            && self
                .states
                .iter()
                .zip(&options.metrics)
                .all(|((name, state), metric)| *name == metric.name && state.fits(metric.kind));
        if aligned {
            return;
        }
        let mut old = std::mem::take(&mut self.states);
        self.states = options
            .metrics
            .iter()
            .map(|metric| {
                let known = old
                    .iter()
                    .position(|(name, state)| *name == metric.name && state.fits(metric.kind));
                match known {
                    Some(index) => old.swap_remove(index),
                    None => (metric.name.clone(), State::of(metric.kind)),
                }
            })
            .collect();
    }

    /// `ln Σ v_j E_j` of all metrics now.
    fn log_evidence(&self, options: &Options) -> f64 {
        let states = options.metrics.iter().zip(&self.states);
        log_sum_exp(
            states.map(|(metric, (_, state))| (options.share(metric), state.log_evidence(metric, options))),
        )
    }

    /// Requests of the run.
    pub const fn totals(&self) -> &Totals {
        &self.totals
    }

    /// Whether the mesh splits as configured.
    pub fn split(&self, weight_percent: f64) -> Verdict {
        self.split.verdict(weight_percent)
    }

    /// Whether the canary's durations count already.
    pub const fn is_warm(&self) -> bool {
        self.warmth.is_warm()
    }

    /// Whether [`Judges::verdict`] would be bad, without its sentences: for those who look at thousands a second.
    pub fn is_bad(&self, options: &Options) -> bool {
        let reached = |peak: f64, alpha: f64| peak >= (1.0 / alpha).ln();
        let mut metrics = options.metrics.iter().zip(&self.states);
        reached(self.peak, options.alpha)
            || metrics.any(|(metric, (_, state))| reached(state.log_peak(), options.alpha_of(metric)))
    }

    /// The verdict on the release so far. `Bad` is final.
    pub fn verdict(&self, options: &Options) -> Combined {
        let metrics: Vec<MetricVerdict> = options
            .metrics
            .iter()
            .map(|metric| {
                let known = self
                    .states
                    .iter()
                    .find(|(name, state)| *name == metric.name && state.fits(metric.kind));
                let verdict = match known {
                    Some((_, state)) => self.metric(metric, state, options),
                    None => self.metric(metric, &State::of(metric.kind), options),
                };
                MetricVerdict {
                    name: metric.name.clone(),
                    weight: options.share(metric),
                    verdict,
                }
            })
            .collect();
        let mut combined = combine(metrics, options.on_no_data, options.on_provider_error);
        if let Verdict::Undecided { evidence, .. } = &mut combined.verdict
            && let Some(text) = warmth::too_little(self.totals.canary, self.totals.primary)
        {
            evidence.explanation = text;
        }
        let bound = 1.0 / options.alpha;
        if combined.verdict.is_bad() {
            // Each metric promises its share; together they promise the whole.
            if let Verdict::Bad(evidence) = &mut combined.verdict
                && let Some(alpha) = evidence.alpha
            {
                evidence.explanation = evidence
                    .explanation
                    .replace(&text::promise(alpha), &text::promise(options.alpha));
            }
        } else if self.peak >= bound.ln() {
            let strongest = combined
                .metrics
                .iter()
                .filter_map(|metric| metric.verdict.evidence())
                .max_by(|one, other| one.value.total_cmp(&other.value));
            let facts = strongest.map_or("", |evidence| {
                evidence.explanation.split(';').next().unwrap_or_default()
            });
            combined.verdict = Verdict::Bad(Evidence {
                value: self.peak.min(700.0).exp(),
                bound,
                samples: self.totals.canary,
                alpha: Some(options.alpha),
                explanation: format!(
                    "all metrics together speak against the canary, first of all: {facts}; {}",
                    text::promise(options.alpha)
                ),
            });
        }
        combined
    }

    fn metric(&self, metric: &Metric, state: &State, options: &Options) -> Verdict {
        let verdict = match (metric.kind, state) {
            (Kind::Errors { .. }, State::Errors(errors)) => errors.verdict(&options.errors(metric)),
            (Kind::Latency { quantile }, State::Latency(latency)) => {
                latency.verdict(&options.latency(metric, quantile))
            }
            (Kind::Distribution, State::Distribution(distribution)) => {
                distribution.verdict(&options.distribution(metric))
            }
            (
                Kind::ErrorRate {
                    acceptable,
                    unacceptable,
                },
                State::Guard(guard),
            ) => guard.verdict(&options.guard(metric, acceptable, unacceptable), "fails"),
            (Kind::LatencyBound { quantile, bound_ms }, State::Guard(guard)) => guard.verdict(
                &options.guard(metric, 1.0 - quantile, None),
                &format!("takes longer than {} ms in", text::short(bound_ms)),
            ),
            _ => Verdict::NoData {
                explanation: format!("{} has no evidence yet", metric.name),
            },
        };
        let waits_for = match metric.kind {
            Kind::Latency { .. } | Kind::Distribution | Kind::LatencyBound { .. } => Some("durations"),
            Kind::Errors { .. } if options.warm_up.errors => Some("errors"),
            _ => None,
        };
        let waits_for = waits_for.filter(|_| !self.warmth.is_warm() && self.totals.canary > 0);
        match (verdict, waits_for) {
            (Verdict::NoData { .. }, Some(what)) => Verdict::NoData {
                explanation: format!("the canary is still warming up; its {what} do not count yet"),
            },
            (verdict, _) => verdict,
        }
    }
}

#[cfg(test)]
mod tests;
