//! Errors of the canary against those of the primary: [`super::ratio`] over counts, and the sentence that says it.

use serde::{Deserialize, Serialize};

use super::ratio::{Batch, Grid, MIXTURE_COST, RatioTest, growth};
use crate::sample::{ErrorClass, Sample};
use crate::text;
use crate::verdict::{Evidence, Missing, Verdict};

/// What the comparison promises.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Options {
    /// Highest probability with which a release that is within the tolerance is ever called bad, and with which one beyond
    /// it is called good in a step.
    pub alpha: f64,
    /// The ratio of the canary's error rate to the primary's that is still tolerated, at least 1.
    pub tolerance: f64,
}

impl Default for Options {
    /// One healthy release in a hundred, and half as many errors again as the primary has.
    fn default() -> Self {
        Self {
            alpha: 0.01,
            tolerance: 1.5,
        }
    }
}

/// The evidence so far. Batches with one arm alone count for the totals only: pair them first ([`crate::Judges`] does).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Errors {
    /// Which errors count.
    #[serde(default)]
    class: ErrorClass,
    test: RatioTest,
    clock: Clock,
}

/// How long a judge has watched, to tell how long more at this rate.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Clock {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    first_ms: Option<i64>,
    #[serde(default)]
    last_ms: i64,
}

impl Clock {
    pub(crate) fn tick(&mut self, at_ms: i64) {
        let first = *self.first_ms.get_or_insert(at_ms);
        self.last_ms = self.last_ms.max(at_ms).max(first);
    }

    /// Seconds watched; the first sample stands for a second of its own.
    pub(crate) fn seconds(&self) -> f64 {
        self.first_ms.map_or(0.0, |first| {
            self.last_ms.saturating_sub(first) as f64 / 1000.0 + 1.0
        })
    }
}

impl Errors {
    /// A judge of one class of errors; [`Errors::default`] judges all of them.
    pub fn of(class: ErrorClass) -> Self {
        Self {
            class,
            ..Self::default()
        }
    }

    /// `E`, the evidence against the canary now; 1 at the start.
    pub fn evidence(&self, options: &Options) -> f64 {
        self.test.log_evidence(options.tolerance, &Grid::ERRORS).exp()
    }

    /// Takes in one interval of both arms. O(1).
    pub fn observe(&mut self, sample: &Sample, options: &Options) {
        self.clock.tick(sample.at_ms);
        let batch = Batch {
            canary: sample.canary.requests,
            canary_bad: sample.canary.errors_of(self.class),
            primary: sample.primary.requests,
            primary_bad: sample.primary.errors_of(self.class),
        };
        self.test.observe(&batch, options.tolerance, &Grid::ERRORS);
    }

    /// A new step begins: what speaks for the canary starts anew.
    pub fn begin_step(&mut self) {
        self.test.begin_step();
    }

    /// The engine, for combinations and status.
    pub const fn test(&self) -> &RatioTest {
        &self.test
    }

    /// The verdict so far. `Bad` is final.
    pub fn verdict(&self, options: &Options) -> Verdict {
        let totals = self.test.totals();
        if totals.canary == 0 {
            return Verdict::NoData {
                explanation: "no requests to the canary yet".to_owned(),
            };
        }
        if totals.primary == 0 {
            return Verdict::NoData {
                explanation: "no requests to the primary, so there is nothing to compare with".to_owned(),
            };
        }
        let what = match self.class {
            ErrorClass::Any => "fails",
            ErrorClass::Http5xx => "answers 5xx to",
            ErrorClass::Grpc => "answers a gRPC error to",
            ErrorClass::Connection => "does not answer",
            ErrorClass::ByClient => "fails, a client counted once,",
        };
        let facts = format!(
            "canary {what} {} of {} requests, primary {} of {}",
            text::percent(totals.canary_bad, totals.canary),
            text::count(totals.canary),
            text::percent(totals.primary_bad, totals.primary),
            text::count(totals.primary),
        );
        let grid = &Grid::ERRORS;
        ratio_verdict(&self.test, &facts, options.alpha, options.tolerance, grid, || {
            missing(
                &self.test,
                &self.clock,
                options.alpha,
                options.tolerance,
                &Grid::ERRORS,
                "errors",
            )
        })
    }
}

/// The verdict of a ratio test with its sentence.
pub(crate) fn ratio_verdict(
    test: &RatioTest,
    facts: &str,
    alpha: f64,
    tolerance: f64,
    grid: &Grid,
    missing: impl FnOnce() -> Missing,
) -> Verdict {
    let bound = 1.0 / alpha;
    let evidence = |log: f64, explanation: String| Evidence {
        value: log.min(700.0).exp(),
        bound,
        samples: test.totals().canary,
        alpha: Some(alpha),
        explanation,
    };
    if test.log_peak() >= bound.ln() {
        let text = format!("{facts}; {}", text::promise(alpha));
        return Verdict::Bad(evidence(test.log_peak(), text));
    }
    if test.log_peak_for() >= bound.ln() {
        let text = format!(
            "{facts}; shown to be within {} times the primary's",
            text::short(tolerance)
        );
        return Verdict::Good(evidence(test.log_peak_for(), text));
    }
    let missing = missing();
    let wait = missing.seconds.map_or(String::new(), |seconds| {
        format!(", {} at this rate", text::seconds(seconds))
    });
    Verdict::Undecided {
        evidence: evidence(
            test.log_evidence(tolerance, grid),
            format!("{facts}; undecided, missing {}{wait}", missing.what),
        ),
        missing,
    }
}

/// What a test still needs to show that the canary is within the tolerance, if it equals the primary.
pub(crate) fn missing(
    test: &RatioTest,
    clock: &Clock,
    alpha: f64,
    tolerance: f64,
    grid: &Grid,
    events: &str,
) -> Missing {
    let totals = test.totals();
    if !totals.has_both() || totals.canary_bad + totals.primary_bad == 0 {
        return Missing {
            what: format!("{events} to compare: there is none on either side"),
            seconds: None,
        };
    }
    if tolerance <= 1.0 {
        return Missing {
            what:
                "a tolerance above 1: a canary that only equals the primary can never be shown to be better"
                    .to_owned(),
            seconds: None,
        };
    }
    // Half an event, so that a primary that has had none yet does not make the wait infinite.
    let rate = (totals.primary_bad as f64 + 0.5) / (totals.primary as f64 + 1.0);
    let per_request = growth(rate, totals.share(), 1.0, tolerance, grid);
    let needed = (1.0 / alpha).ln() + MIXTURE_COST - test.log_evidence_for().max(0.0);
    let requests = (needed / per_request).max(1.0);
    let per_second = totals.canary as f64 / clock.seconds();
    Missing {
        what: format!("about {} more canary requests", text::count(round_up(requests))),
        seconds: (per_second > 0.0 && requests.is_finite()).then(|| requests / per_second),
    }
}

/// To two significant digits: an estimate should look like one.
fn round_up(number: f64) -> u64 {
    let scale = 10f64.powi((number.log10().floor() as i32 - 1).max(0));
    ((number / scale).ceil() * scale) as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Random;
    use crate::sample::{Counts, ErrorClasses};

    fn counts(requests: u64, errors: u64) -> Counts {
        Counts {
            requests,
            errors,
            ..Counts::default()
        }
    }

    fn sample(second: i64, canary: (u64, u64), primary: (u64, u64)) -> Sample {
        Sample {
            at_ms: second * 1000,
            from_ms: None,
            canary: counts(canary.0, canary.1),
            primary: counts(primary.0, primary.1),
        }
    }

    #[test]
    fn thirty_percent_errors_against_none_are_called_bad_within_two_dozen_canary_requests() {
        let mut errors = Errors::default();
        let options = Options::default();
        let mut requests = 0;
        let mut random = Random::new(7);
        while !errors.verdict(&options).is_bad() && requests < 100 {
            errors.observe(&sample(0, (2, random.binomial(2, 0.3)), (18, 0)), &options);
            requests += 2;
        }
        assert!(requests <= 24, "took {requests} canary requests");
    }

    #[test]
    fn an_outage_that_hits_both_arms_alike_is_not_held_against_the_canary() {
        let mut errors = Errors::default();
        let options = Options::default();
        for second in 0..100 {
            errors.observe(&sample(second, (10, 5), (90, 45)), &options);
        }
        assert!(!errors.verdict(&options).is_bad());
    }

    #[test]
    fn a_bad_verdict_is_one_sentence_that_names_both_arms_and_the_promise() {
        let mut errors = Errors::default();
        let options = Options::default();
        errors.observe(&sample(0, (1204, 49), (10_911, 22)), &options);
        assert_eq!(
            errors.verdict(&options).explanation(),
            "canary fails 4.1 % of 1,204 requests, primary 0.2 % of 10,911; at most 1 in 100 healthy releases would ever look this bad"
        );
    }

    #[test]
    fn an_undecided_verdict_says_what_is_missing_and_how_long_that_takes_at_this_rate() {
        let mut errors = Errors::default();
        let options = Options::default();
        for second in 0..10 {
            errors.observe(&sample(second, (100, 1), (900, 9)), &options);
        }
        let verdict = errors.verdict(&options);
        let missing = verdict.missing().unwrap();
        let told = missing.seconds.unwrap();
        assert!(missing.what.contains("more canary requests"), "{}", missing.what);
        // And that is about how long it then takes.
        let mut random = Random::new(3);
        let mut second = 10;
        while !errors.verdict(&options).is_good() {
            let one = sample(
                second,
                (100, random.binomial(100, 0.01)),
                (900, random.binomial(900, 0.01)),
            );
            errors.observe(&one, &options);
            second += 1;
        }
        let took = (second - 10) as f64;
        assert!(
            took < 4.0 * told && told < 4.0 * took,
            "told {told} s, took {took} s"
        );
    }

    #[test]
    fn without_any_error_it_stays_undecided_and_says_why() {
        let mut errors = Errors::default();
        let options = Options::default();
        errors.observe(&sample(0, (1000, 0), (9000, 0)), &options);
        let verdict = errors.verdict(&options);
        assert_eq!(verdict.word(), "undecided");
        assert_eq!(verdict.missing().unwrap().seconds, None);
        assert!(
            verdict.explanation().contains("none on either side"),
            "{}",
            verdict.explanation()
        );
    }

    #[test]
    fn no_canary_requests_are_no_data() {
        assert_eq!(Errors::default().verdict(&Options::default()).word(), "no data");
    }

    #[test]
    fn a_class_of_errors_is_judged_alone() {
        let options = Options::default();
        let mut one = sample(0, (200, 60), (1800, 540));
        one.canary.classes = ErrorClasses {
            http_5xx: 20,
            grpc: 0,
            connection: 40,
        };
        one.primary.classes = ErrorClasses {
            http_5xx: 540,
            grpc: 0,
            connection: 0,
        };
        let (mut connection, mut any) = (Errors::of(ErrorClass::Connection), Errors::default());
        connection.observe(&one, &options);
        any.observe(&one, &options);
        assert!(connection.verdict(&options).is_bad());
        assert!(
            connection
                .verdict(&options)
                .explanation()
                .starts_with("canary does not answer 20 % of 200")
        );
        assert!(!any.verdict(&options).is_bad());
    }

    #[test]
    fn each_step_must_show_anew_that_it_is_within_the_tolerance() {
        let mut errors = Errors::default();
        let options = Options::default();
        errors.observe(&sample(0, (100_000, 1000), (900_000, 9000)), &options);
        assert!(errors.verdict(&options).is_good());
        errors.begin_step();
        assert_eq!(errors.verdict(&options).word(), "undecided");
    }
}
