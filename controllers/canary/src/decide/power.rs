//! What is worth knowing of a comparison besides its verdict, as conditions and, where something is wrong, an event: are the
//! steps long enough to find anything, and does the mesh split as configured? It never changes what a run does.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use serin_analysis::planner::{self, Goal};
use serin_crds::flagger::CanaryCondition;

use super::{Deciding, micro};

/// Type of the condition on the length of the steps.
const LONG_ENOUGH: &str = "StepsLongEnough";
/// Type of the condition on the split.
const SPLIT: &str = "SplitAsConfigured";
/// Traffic that must have been seen before anything is said about it, in milliseconds.
const SEEN_MIN_MS: i64 = 5_000;

impl Deciding<'_> {
    /// Once per step, as soon as enough traffic was seen.
    pub(super) fn consider_power(&mut self) {
        let Some(comparison) = &self.plan.comparison else {
            return;
        };
        let traffic = self.seen.measured.traffic;
        let run = self.status.run.get_or_insert_default();
        let done = match (&run.planned_at, &run.step_started_at) {
            (Some(planned), Some(step)) => planned.0 >= step.0,
            (Some(_), None) => true,
            (None, _) => false,
        };
        if done || traffic.milliseconds < SEEN_MIN_MS || traffic.primary == 0 {
            return;
        }
        run.planned_at = micro(self.now);
        let per_second = traffic.requests as f64 * 1000.0 / traffic.milliseconds as f64;
        let error_rate = traffic.primary_errors as f64 / traffic.primary as f64;
        let options = &comparison.options;
        // The metric that errors are judged by; without one, the strictest alpha of all.
        let alpha = options
            .metrics
            .iter()
            .find(|metric| metric.name.starts_with("errors"))
            .map_or(options.alpha, |metric| options.alpha_of(metric));
        let goal = Goal {
            alpha,
            tolerance: options.tolerance,
            ratio: planner::ratio_worth_finding(error_rate, comparison.expected_ratio),
        };
        let interval = self.plan.interval.as_secs_f64();
        let weights: Vec<f64> = self.plan.steps.iter().map(|weight| f64::from(*weight)).collect();
        let steps = planner::plan(per_second, error_rate, &weights, interval, &goal);
        let warning = planner::warning(&steps, per_second, error_rate, interval, &goal);
        let current = f64::from(self.weight());
        let message = match &warning {
            Some(warning) => warning.clone(),
            None => {
                let needed = steps
                    .iter()
                    .find(|step| step.weight_percent == current)
                    .and_then(|step| step.seconds_to_find);
                let needed = needed.map_or_else(String::new, |seconds| {
                    format!(", {seconds:.0} s at weight {current}")
                });
                format!(
                    "at {per_second:.0} requests/s, {:.1} times the primary's errors are found within the steps{needed}",
                    goal.ratio
                )
            }
        };
        let reason = if warning.is_none() {
            "Planned"
        } else {
            "StepsTooShort"
        };
        self.set_condition(LONG_ENOUGH, warning.is_none(), reason, message);
    }

    /// Says when requests are not split as the weight says. What the judges compare are counts, so they stay right.
    pub(super) fn consider_split(&mut self) {
        if self.plan.comparison.is_none() {
            return;
        }
        let verdict = self.seen.measured.judges.split(f64::from(self.weight()));
        let was_wrong = self
            .status
            .conditions
            .iter()
            .any(|condition| condition.r#type == SPLIT && condition.status == "False");
        if verdict.is_bad() {
            self.set_condition(SPLIT, false, "WrongSplit", verdict.explanation().to_owned());
        } else if was_wrong && verdict.evidence().is_some() {
            self.set_condition(SPLIT, true, "NothingWrong", verdict.explanation().to_owned());
        }
    }

    fn set_condition(&mut self, kind: &str, holds: bool, reason: &str, message: String) {
        let status = if holds { "True" } else { "False" };
        let known = self
            .status
            .conditions
            .iter()
            .position(|condition| condition.r#type == kind);
        let before = known.map(|index| self.status.conditions.remove(index));
        let same = before.as_ref().is_some_and(|before| before.status == status);
        if same && kind == SPLIT {
            // Its counts change every second; that is not worth a write.
            self.status.conditions.extend(before);
            return;
        }
        if !holds && !same {
            let canary = self.own_name();
            self.warn(format!("Analysis of {canary}: {message}"));
        }
        if same {
            // What changes every second is not worth a write.
            self.status.conditions.extend(before);
            return;
        }
        let now = Time(self.now);
        let since = before
            .filter(|_| same)
            .and_then(|before| before.last_transition_time)
            .unwrap_or_else(|| now.clone());
        self.status.conditions.push(CanaryCondition {
            r#type: kind.to_owned(),
            status: status.to_owned(),
            reason: reason.to_owned(),
            message: Some(message),
            last_update_time: Some(now),
            last_transition_time: Some(since),
            observed_generation: Some(self.seen.generation),
        });
    }
}
