//! A run: readiness, steps, checks, and every reason to stop.

use jiff::Timestamp;
use serin_analysis::judge::threshold::{self, Builtin};
use serin_analysis::verdict::{Policy, Verdict};
use serin_crds::flagger::{CanaryPhase, MetricStatus, StepOutcome, StepStatus};

use super::{Action, Deciding, after, micro, revision_id};
use crate::observed::{Readiness, Workload};
use crate::plan::{Advance, MetricPlan};
use crate::templates;
use crate::traffic::Split;

/// Name of the comparison in `status.metrics`.
pub(crate) const COMPARISON: &str = "comparison";
/// Steps that are kept in the status.
const HISTORY_MAX: usize = 64;

/// What the metrics of a step say.
#[derive(Default)]
struct Judged {
    /// The first failure, in Flagger's words.
    failure: Option<String>,
    /// The first lack of data, and what follows from it.
    missing: Option<(String, Policy)>,
    /// Everything is within its bounds, and the comparison has shown that the canary is within its tolerance.
    is_good: bool,
    /// What the comparison says.
    undecided: Option<String>,
}

impl Judged {
    /// Of several lacks the strictest policy counts.
    fn miss(&mut self, explanation: &str, policy: Policy) {
        let strictness = |policy: Policy| match policy {
            Policy::Pass => 0,
            Policy::Hold => 1,
            Policy::Extend => 2,
            Policy::Fail => 3,
        };
        let stricter = self
            .missing
            .as_ref()
            .is_none_or(|(_, known)| strictness(policy) > strictness(*known));
        if stricter {
            self.missing = Some((explanation.to_owned(), policy));
        }
    }
}

impl Deciding<'_> {
    pub(super) fn progress(&mut self) {
        let Some(target) = self.target() else {
            return;
        };
        // The state of a run that another controller (Flagger) began has no record of ours.
        self.status.run.get_or_insert_default();

        if self.seen.blocked.is_none()
            && (self.status.last_applied_spec.as_deref() != Some(&target.template_hash)
                || self.configs_changed())
        {
            return self.restart(&target.template_hash, &target.name, target.replicas);
        }
        if let Some(reason) = self.reason_to_abort() {
            let canary = self.own_name();
            self.warn(format!("Rolling back {canary} {reason}"));
            return self.abort(&reason);
        }
        if self.is_blocked() {
            return;
        }
        self.keep_objects();
        self.keep_routing();
        // Whatever others made of it: nothing but the wanted share goes to the canary, also while it waits for its pods.
        self.route_to(Split::of_canary(self.weight()));
        if target.replicas == 0 {
            // Somebody else's write, or a crash between the scale-up and the status.
            let replicas = self
                .seen
                .primary
                .as_ref()
                .map_or(1, |primary| primary.replicas.max(1));
            self.actions.push(Action::ScaleTarget(replicas));
        }
        let Some(primary) = self.seen.primary.as_ref() else {
            return self.hold(format!("{} is being created", self.full(&self.plan.primary())));
        };
        match primary.readiness(self.plan.primary_ready_percent) {
            Readiness::Ready => {}
            Readiness::NotYet(reason) => return self.wait_for_primary(primary, &reason),
            Readiness::Never(reason) => return self.primary_is_lost(primary, &reason),
        }
        if !self.canary_is_ready() {
            return;
        }
        if self.plan.skip_analysis {
            return self.promote();
        }
        if self.seen.canary_endpoints == Some(0) {
            return self.hold(format!(
                "{} has no ready endpoint yet",
                self.full(&format!("{}-canary", self.plan.apex))
            ));
        }
        if self.weight() == 0 {
            if self.former_traffic_remains() {
                return self.hold("traffic leaves the former revision".to_owned());
            }
            self.tell(format!("Starting canary analysis for {}", target.name));
            return self.advance();
        }
        if self
            .actions
            .iter()
            .any(|action| matches!(action, Action::SetWeight(_)))
        {
            return self.wait_for("the weight is written");
        }
        if !self.is_live() {
            return;
        }
        self.check();
    }

    /// Everything that stops a run without waiting for an interval.
    fn reason_to_abort(&self) -> Option<String> {
        let target = self.target()?;
        let weight = self.weight();
        if weight > 0 {
            let since = self
                .status
                .history
                .first()
                .and_then(|step| step.started_at.as_ref());
            // Times of deaths have whole seconds.
            let since = since.map_or(Timestamp::MIN, |since| {
                Timestamp::from_second(since.0.as_second()).unwrap_or(since.0)
            });
            if let Some(dead) = self.seen.dead_pods.iter().find(|dead| dead.at >= since) {
                return Some(format!("pod {} died: {}", dead.name, dead.reason));
            }
            if target.replicas == 0 {
                return Some(format!("{} was scaled to zero", target.name));
            }
            if target.available == 0 {
                return Some("no canary pod is available any more".to_owned());
            }
            let current = self.seen.route.as_ref().map(|route| route.generation);
            if let Some(live) = self.seen.liveness.as_ref()
                && live.known
                && live.refused > 0
                && current == Some(live.generation)
            {
                let reason = live.reason.as_deref().unwrap_or("no reason given");
                return Some(format!(
                    "{} proxies refused weight {weight}: {reason}",
                    live.refused
                ));
            }
            if let Some(comparison) = &self.plan.comparison
                && let Verdict::Bad(evidence) = self.seen.measured.judges.verdict(&comparison.options).verdict
            {
                return Some(evidence.explanation);
            }
        }
        None
    }

    /// Ends a run: the weight goes first and nothing is waited for. Pods are scaled down when nobody uses them.
    pub(super) fn abort(&mut self, reason: &str) {
        self.actions.clear();
        self.actions.push(Action::SetWeight(Split::PRIMARY));
        let canary = self.own_name();
        self.warn(format!("Canary failed! Scaling down {canary}"));
        self.judge_all();
        self.end_step(StepOutcome::Failed);
        self.status.failed_checks = Some(0);
        self.begin_step(0);
        self.status.run.get_or_insert_default().waiting_since = None;
        self.set_phase(CanaryPhase::Failed);
        self.status.message = Some(format!("rolled back: {reason}"));
    }

    /// Whether proxies may still send requests to the canary as if it were the former revision. What they report is not
    /// to be held against this one.
    fn former_traffic_remains(&mut self) -> bool {
        let had = self
            .status
            .run
            .as_ref()
            .is_some_and(|run| run.former_traffic_until.is_some());
        if !had || self.is_drained() {
            return false;
        }
        let now = micro(self.now);
        self.status.run.get_or_insert_default().former_traffic_until = now;
        true
    }

    fn restart(&mut self, hash: &str, name: &str, replicas: i32) {
        self.actions.clear();
        self.actions.push(Action::SetWeight(Split::PRIMARY));
        if replicas == 0 {
            let replicas = self
                .seen
                .primary
                .as_ref()
                .map_or(1, |primary| primary.replicas.max(1));
            self.actions.push(Action::ScaleTarget(replicas));
        }
        self.tell(format!("New revision detected! Restarting analysis for {name}"));
        self.begin(hash);
    }

    /// Waits without going on. The weight stays, and what is measured meanwhile is not a window.
    fn hold(&mut self, reason: String) {
        if let Some(run) = self.status.run.as_mut() {
            run.window_started_at = None;
        }
        self.wait_for(reason);
    }

    /// The run stands while the primary is not ready. As in Flagger the deadline counts while none of its pods is
    /// available; while some still serve, the Deployment's own deadline decides.
    fn wait_for_primary(&mut self, primary: &Workload, reason: &str) {
        let now = self.now;
        let run = self.status.run.get_or_insert_default();
        if primary.available > 0 {
            run.waiting_since = None;
        } else {
            let since = run.waiting_since.get_or_insert_with(|| now.into()).0;
            if now >= after(since, self.plan.progress_deadline) {
                return self.primary_is_lost(primary, reason);
            }
            self.wake_after(since, self.plan.progress_deadline);
        }
        self.hold(format!("{} not ready: {reason}", primary.name));
    }

    fn primary_is_lost(&mut self, primary: &Workload, reason: &str) {
        let message = format!("{} not ready: {reason}", primary.name);
        let canary = self.own_name();
        self.warn(format!("Rolling back {canary} {message}"));
        self.abort(&message);
    }

    fn canary_is_ready(&mut self) -> bool {
        let Some(target) = self.target() else {
            return false;
        };
        let (reason, never) = match target.readiness(self.plan.canary_ready_percent) {
            Readiness::Ready if target.can_serve(self.plan.canary_ready_percent) => {
                if let Some(run) = self.status.run.as_mut() {
                    run.waiting_since = None;
                }
                return true;
            }
            Readiness::Ready => (
                "waiting for rollout to finish: no pod is available".to_owned(),
                false,
            ),
            Readiness::NotYet(reason) => (reason, false),
            Readiness::Never(reason) => (reason, true),
        };
        let now = self.now;
        let since = self
            .status
            .run
            .get_or_insert_default()
            .waiting_since
            .get_or_insert_with(|| now.into())
            .0;
        let message = format!("canary deployment {} not ready: {reason}", target.name);
        if never || now >= after(since, self.plan.progress_deadline) {
            self.warn(message.clone());
            self.abort(&message);
            return false;
        }
        self.wake_after(since, self.plan.progress_deadline);
        self.hold(message);
        false
    }

    /// The next step, or the promotion after the last.
    fn advance(&mut self) {
        let Some(next) = self.plan.next_step(self.weight()) else {
            self.end_step(StepOutcome::Passed);
            return self.promote();
        };
        self.end_step(StepOutcome::Passed);
        self.actions
            .retain(|action| !matches!(action, Action::SetWeight(_)));
        self.actions.push(Action::SetWeight(Split::of_canary(next)));
        let canary = self.own_name();
        self.tell(format!("Advance {canary} canary weight {next}"));
        self.begin_step(next);
        self.wait_for(format!("weight {next} goes out to the proxies"));
    }

    /// Records that another weight is wanted from now on.
    pub(super) fn begin_step(&mut self, weight: i32) {
        self.set_weight_status(weight);
        if self.status.history.len() >= HISTORY_MAX {
            // The first step stays: it says since when there has been traffic.
            self.status.history.remove(1);
        }
        self.status.history.push(StepStatus {
            weight,
            started_at: micro(self.now),
            outcome: Some(StepOutcome::Running),
            ..StepStatus::default()
        });
        self.status.weight_live = None;
        let now = micro(self.now);
        let run = self.status.run.get_or_insert_default();
        run.step_started_at = now;
        run.window_started_at = None;
        run.checked_at = None;
        run.extended = None;
    }

    /// Records when the current step's weight was live everywhere for the first time.
    pub(super) fn step_is_live(&mut self) {
        let now = micro(self.now);
        let weight = self.weight();
        if let Some(step) = self.status.history.last_mut()
            && step.live_at.is_none()
            && step.weight == weight
        {
            step.live_at = now;
        }
    }

    /// Whether the current weight is live; opens the measurement window when it becomes so.
    fn is_live(&mut self) -> bool {
        let now = micro(self.now);
        if self.live_now() {
            let run = self.status.run.get_or_insert_default();
            if run.window_started_at.is_none() {
                run.window_started_at = now;
                run.checked_at = None;
            }
            self.step_is_live();
            return true;
        }
        // Was live and is not any more: a proxy joined, or the route was rewritten. The window stays open for the
        // proxies that have it; only a weight that was never live is waited for.
        if self
            .status
            .run
            .as_ref()
            .is_some_and(|run| run.window_started_at.is_some())
        {
            return true;
        }
        let since = self.mark_step_start();
        let weight = self.weight();
        if self.now >= after(since, self.plan.progress_deadline) {
            let reason = self.live_text(weight);
            let canary = self.own_name();
            self.warn(format!("Rolling back {canary} {reason}"));
            self.abort(&reason);
            return false;
        }
        self.wake_after(since, self.plan.progress_deadline);
        let text = self.live_text(weight);
        self.wait_for(text);
        false
    }

    fn live_text(&self, weight: i32) -> String {
        match self.seen.liveness.as_ref().filter(|live| live.known) {
            Some(live) => format!(
                "weight {weight} is live in {} of {} proxies",
                live.acked, live.needed
            ),
            None => format!("weight {weight} is not known to the mesh yet"),
        }
    }

    /// Judges the window when it is complete, or before when that is wanted and enough is known.
    fn check(&mut self) {
        self.consider_power();
        self.consider_split();
        let judged = self.judge_all();
        let opened = templates::opened(&self.status, self.seen.measured.since).unwrap_or(self.now);
        let due = after(opened, self.plan.interval);
        if self.now < due {
            if judged.is_good && self.advance_policy() == Advance::Early {
                return self.advance();
            }
            self.wake_after(opened, self.plan.interval);
            return self.wait_for(format!("measuring at weight {}", self.weight()));
        }
        if let Some(metric) = self.unanswered(due) {
            return self.wait_for(format!("asking for {metric}"));
        }
        self.status.run.get_or_insert_default().checked_at = micro(self.now);
        self.wake_after(self.now, self.plan.interval);
        if let Some(failure) = judged.failure {
            return self.failed_check(failure);
        }
        if let Some((missing, policy)) = judged.missing {
            return match policy {
                Policy::Hold => self.wait_for(format!("halted, not enough data: {missing}")),
                Policy::Extend if self.extend() => {
                    self.wait_for(format!("prolonged, not enough data: {missing}"));
                }
                Policy::Extend | Policy::Fail => self.failed_check(missing),
                Policy::Pass => self.advance(),
            };
        }
        if self.advance_policy() == Advance::WhenGood && !judged.is_good && self.extend() {
            return self.wait_for(format!(
                "not yet shown to be within the tolerance: {}",
                judged.undecided.unwrap_or_default()
            ));
        }
        self.advance();
    }

    /// The first metric whose provider has not answered since the check is due. It will: every question has a deadline.
    fn unanswered(&self, due: Timestamp) -> Option<String> {
        let readings = |index: usize| self.seen.readings.get(index).and_then(Option::as_ref);
        let mut metrics = self.plan.templates.iter().enumerate();
        metrics
            .find(|(index, _)| templates::answered(readings(*index), due).is_none())
            .map(|(_, metric)| metric.name.clone())
    }

    fn advance_policy(&self) -> Advance {
        self.plan
            .comparison
            .as_ref()
            .map_or(Advance::AtInterval, |comparison| comparison.advance)
    }

    /// Prolongs the step by an interval, as often as the plan allows.
    fn extend(&mut self) -> bool {
        let limit = self
            .plan
            .comparison
            .as_ref()
            .map_or(0, |comparison| comparison.extend_limit);
        let run = self.status.run.get_or_insert_default();
        let extended = run.extended.unwrap_or(0);
        if extended >= limit {
            return false;
        }
        run.extended = Some(extended + 1);
        true
    }

    fn failed_check(&mut self, failure: String) {
        let failed = self.status.failed_checks.unwrap_or(0).saturating_add(1);
        self.status.failed_checks = Some(failed);
        if let Some(step) = self.status.history.last_mut() {
            step.failed_checks = Some(step.failed_checks.unwrap_or(0).saturating_add(1));
        }
        let canary = self.own_name();
        self.warn(format!("Halt {canary} advancement {failure}"));
        if failed >= self.plan.threshold {
            let reason = format!("failed checks threshold reached {failed}");
            self.warn(format!("Rolling back {canary} {reason}"));
            return self.abort(&format!("{reason}: {failure}"));
        }
        self.wait_for(failure);
    }

    /// Judges every metric and writes the verdicts into the status.
    fn judge_all(&mut self) -> Judged {
        let measured = &self.seen.measured;
        let mut metrics = Vec::new();
        let mut judged = Judged::default();
        let empty = serin_analysis::sample::Counts::default();
        let comparison = self.plan.comparison.as_ref();
        let (on_no_data, on_provider_error) = comparison.map_or((Policy::Hold, Policy::Hold), |comparison| {
            (comparison.on_no_data, comparison.on_provider_error)
        });
        let mut all_within = true;
        for (index, metric) in self.plan.metrics.iter().enumerate() {
            let window = measured.windows.get(index).unwrap_or(&empty);
            let verdict = match &measured.error {
                Some(error) => Verdict::ProviderError {
                    explanation: error.clone(),
                },
                None => threshold::judge(metric.builtin, metric.range, window),
            };
            match &verdict {
                Verdict::Bad(evidence) if judged.failure.is_none() => {
                    judged.failure = Some(halt_text(metric, evidence.value));
                }
                Verdict::NoData { explanation } => judged.miss(explanation, on_no_data),
                Verdict::ProviderError { explanation } => judged.miss(explanation, on_provider_error),
                Verdict::Bad(_) | Verdict::Good(_) | Verdict::Undecided { .. } => {}
            }
            all_within &= verdict.is_good();
            metrics.push(metric_status(&metric.name, &verdict));
        }
        for (index, metric) in self.plan.templates.iter().enumerate() {
            let reading = self.seen.readings.get(index).and_then(Option::as_ref);
            let verdict = templates::judge(metric, reading);
            match &verdict {
                Verdict::Bad(evidence) if judged.failure.is_none() => {
                    judged.failure = Some(templates::halt_text(metric, evidence));
                }
                Verdict::NoData { explanation } => judged.miss(explanation, on_no_data),
                Verdict::ProviderError { explanation } => judged.miss(explanation, on_provider_error),
                Verdict::Bad(_) | Verdict::Good(_) | Verdict::Undecided { .. } => {}
            }
            all_within &= verdict.is_good();
            metrics.push(metric_status(&metric.name, &verdict));
        }
        if let Some(comparison) = comparison {
            let mut combined = measured.judges.verdict(&comparison.options);
            if let Some(error) = &measured.error {
                judged.miss(error, on_provider_error);
                if !combined.verdict.is_bad() {
                    combined.verdict = Verdict::ProviderError {
                        explanation: error.clone(),
                    };
                }
            } else if measured.step_requests == 0 && self.weight() > 0 {
                let explanation = format!("no requests to the canary at weight {}", self.weight());
                judged.miss(&explanation, on_no_data);
            }
            judged.is_good = all_within && combined.verdict.is_good();
            judged.undecided = Some(combined.verdict.explanation().to_owned());
            metrics.extend(
                combined
                    .metrics
                    .iter()
                    .map(|metric| metric_status(&metric.name, &metric.verdict)),
            );
            let mut whole = metric_status(COMPARISON, &combined.verdict);
            whole.alpha = Some(comparison.options.alpha);
            metrics.push(whole);
        }
        self.status.metrics = metrics;
        judged
    }

    /// Copies the revision to the primary.
    fn promote(&mut self) {
        let Some(target) = self.target() else {
            return;
        };
        let id = revision_id(&self.seen.name, &target.template_hash, &self.seen.configs);
        self.keep_former(&id);
        let promotion = self.promotion(id);
        self.actions.push(promotion);
        self.tell(format!(
            "Copying {} template spec to {}",
            target.name,
            self.full(&self.plan.primary())
        ));
        let now = micro(self.now);
        let run = self.status.run.get_or_insert_default();
        run.step_started_at = now;
        run.window_started_at = None;
        run.waiting_since = None;
        self.set_phase(CanaryPhase::Promoting);
    }

    pub(super) fn end_step(&mut self, outcome: StepOutcome) {
        let now = micro(self.now);
        if let Some(step) = self.status.history.last_mut()
            && step.ended_at.is_none()
        {
            step.ended_at = now;
            step.outcome = Some(outcome);
        }
    }
}

fn metric_status(name: &str, verdict: &Verdict) -> MetricStatus {
    let evidence = verdict.evidence();
    // JSON has no infinity.
    let finite = |value: Option<f64>| value.filter(|value| value.is_finite());
    MetricStatus {
        name: name.to_owned(),
        value: finite(evidence.map(|evidence| evidence.value)),
        bound: finite(evidence.map(|evidence| evidence.bound)),
        samples: evidence.map(|evidence| i64::try_from(evidence.samples).unwrap_or(i64::MAX)),
        verdict: verdict.word().to_owned(),
        alpha: evidence.and_then(|evidence| evidence.alpha),
        remaining_seconds: verdict
            .missing()
            .and_then(|missing| missing.seconds)
            .filter(|seconds| seconds.is_finite())
            .map(|seconds| seconds.min(1e9) as i64),
        message: Some(verdict.explanation().to_owned()),
    }
}

/// Why a check failed, as Flagger words it.
fn halt_text(metric: &MetricPlan, value: f64) -> String {
    let below = metric.range.min.filter(|min| value < *min);
    let (sign, bound) = match below {
        Some(min) => ("<", min),
        None => (">", metric.range.max.unwrap_or(f64::INFINITY)),
    };
    match metric.builtin {
        Builtin::RequestSuccessRate => format!("success rate {value:.2}% {sign} {bound}%"),
        Builtin::RequestDuration => {
            let text = |ms: f64| {
                let duration =
                    std::time::Duration::try_from_secs_f64(ms.max(0.0) / 1000.0).unwrap_or_default();
                serin_crds::Duration::from(std::time::Duration::from_micros(
                    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX),
                ))
            };
            format!("request duration {} {sign} {}", text(value), text(bound))
        }
    }
}
