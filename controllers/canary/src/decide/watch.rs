//! After a promotion: what the primary serves is watched for a while, and an alarm takes the promotion back.
//!
//! What is normal is what the run has shown of the primary before, times the tolerance. Before the primary is overwritten it
//! is kept, with its ConfigMaps and Secrets, in a Secret of the Canary ([`Action::KeepFormer`]); an alarm applies that again.
//! The target still has the revision that was taken back: git says so, and nothing here argues with git. The Canary is
//! `Failed`, the primary serves what it served before, and the next revision starts a run against it.
//!
//! A controller that dies after it took the promotion back, and before the status says so, finds the primary with the
//! former `flagger-id`, and concludes the same.

use serin_analysis::judge::watch::{self, Watch, upper_rate};
use serin_crds::flagger::{CanaryPhase, CanaryStatus, Evidence, Former, WatchStatus};

use super::{Action, Deciding, after, micro};
use crate::plan::WatchPlan;

/// Key of the detector's state in `status.watch.evidence`.
pub(crate) const WATCH_STATE: &str = "watch";
/// Probability with which the primary's true rate of errors lies above what is taken for normal, before the tolerance.
const NORMAL_ALPHA: f64 = 0.05;

/// What the detector is given; `None` where nothing is watched (any more).
pub(crate) fn options(status: &CanaryStatus, plan: &WatchPlan) -> Option<watch::Options> {
    let watch = status.watch.as_ref()?;
    watch.evidence.as_ref()?;
    let normal = watch.former.normal_error_rate? / 100.0;
    Some(watch::Options::each_second(normal, plan.false_alarms_per_day))
}

/// The detector as it was when the status was last written.
pub(crate) fn detector(status: &CanaryStatus) -> Option<Watch> {
    let state = status
        .watch
        .as_ref()?
        .evidence
        .as_ref()?
        .judges
        .get(WATCH_STATE)?;
    serde_json::from_value(state.clone()).ok()
}

fn evidence(detector: &Watch) -> Option<Evidence> {
    let state = serde_json::to_value(detector).ok()?;
    Some(Evidence {
        judges: [(WATCH_STATE.to_owned(), state)].into(),
    })
}

impl Deciding<'_> {
    fn watch_plan(&self) -> Option<WatchPlan> {
        self.plan.comparison.as_ref()?.watch
    }

    /// Before the primary takes over the revision `id`: keeps what it is now, and what is normal for it.
    pub(super) fn keep_former(&mut self, id: &str) {
        let (Some(_), Some(primary)) = (self.watch_plan(), self.seen.primary.as_ref()) else {
            return;
        };
        if self.plan.skip_analysis {
            return;
        }
        let former = if primary.promoted_id.as_deref() == Some(id) {
            // It was overwritten already, by a controller that died before it could say so.
            let kept = self.seen.former.as_ref().filter(|kept| kept.replaced_by == id);
            kept.map(|kept| kept.id.clone())
        } else {
            if let Some(former) = primary.promoted_id.clone() {
                self.actions.push(Action::KeepFormer {
                    former,
                    replaced_by: id.to_owned(),
                });
            }
            primary.promoted_id.clone()
        };
        let normal = self.normal_error_rate();
        let run = self.status.run.get_or_insert_default();
        run.former.former_id = former;
        if run.former.normal_error_rate.is_none() {
            run.former.normal_error_rate = normal;
        }
    }

    /// In percent; `None` where nothing was seen of the primary.
    fn normal_error_rate(&self) -> Option<f64> {
        let tolerance = self.plan.comparison.as_ref()?.options.tolerance;
        let totals = self.seen.measured.judges.totals();
        (totals.primary > 0).then(|| {
            let rate = tolerance * upper_rate(totals.primary, totals.primary_errors, NORMAL_ALPHA);
            // A hundred times more digits than anyone can tell apart.
            (rate.min(0.99) * 1e8).round() / 1e6
        })
    }

    /// The promotion is complete: from now on it is watched.
    pub(super) fn begin_watch(&mut self, former_spec: Option<String>) {
        self.status.watch = None;
        let (Some(plan), Some(run)) = (self.watch_plan(), self.status.run.as_ref()) else {
            return;
        };
        if self.plan.skip_analysis {
            return;
        }
        let Some(normal) = run.former.normal_error_rate else {
            return self.warn(format!(
                "The promotion of {} is not watched: no requests to the primary were seen during the run",
                self.own_name()
            ));
        };
        self.status.watch = Some(WatchStatus {
            started_at: micro(self.now),
            until: micro(after(self.now, plan.duration)),
            former: Former {
                normal_error_rate: Some(normal),
                former_id: run.former.former_id.clone(),
            },
            former_spec,
            evidence: evidence(&Watch::default()),
            ..WatchStatus::default()
        });
    }

    /// Looks at what the promoted primary has served.
    pub(super) fn watch(&mut self) {
        let Some(mut watch) = self.status.watch.clone() else {
            return;
        };
        if self.phase() != CanaryPhase::Succeeded || watch.evidence.is_none() {
            return;
        }
        let Some((plan, options)) = self
            .watch_plan()
            .and_then(|plan| Some((plan, options(&self.status, &plan)?)))
        else {
            // It was switched off.
            self.status.watch = None;
            return;
        };
        let primary = self.seen.primary.as_ref();
        let promoted = primary.and_then(|primary| primary.promoted_id.clone());
        if watch.former.former_id.is_some() && promoted == watch.former.former_id {
            return self.taken_back(watch);
        }
        let detector = self
            .seen
            .measured
            .watch
            .clone()
            .or_else(|| detector(&self.status));
        let detector = detector.unwrap_or_default();
        watch.message = Some(detector.verdict(&options).explanation().to_owned());
        if detector.is_alarmed() {
            return self.alarmed(watch, promoted, plan);
        }
        let until = watch.until.as_ref().map_or(self.now, |until| until.0);
        if self.now >= until {
            watch.evidence = None;
            self.status.watch = Some(watch);
            return;
        }
        watch.evidence = evidence(&detector);
        self.status.watch = Some(watch);
        self.wake_at = Some(self.wake_at.map_or(until, |earlier| earlier.min(until)));
    }

    fn alarmed(&mut self, mut watch: WatchStatus, promoted: Option<String>, plan: WatchPlan) {
        watch.alarmed_at = micro(self.now);
        let seen = watch.message.clone().unwrap_or_default();
        let primary = self.full(&self.plan.primary());
        let kept = self.seen.former.as_ref();
        let former = kept
            .filter(|kept| {
                watch.former.former_id.as_ref() == Some(&kept.id)
                    && promoted.as_ref() == Some(&kept.replaced_by)
            })
            .map(|kept| kept.id.clone());
        match (plan.rollback, former) {
            (true, Some(id)) => {
                self.actions.push(Action::RestorePrimary { id });
                self.taken_back(watch);
            }
            (rollback, _) => {
                let why = if rollback {
                    "what it served before is not kept"
                } else {
                    "watch.rollback is false"
                };
                self.warn(format!(
                    "{primary} is worse since its promotion: {seen}; not taken back: {why}"
                ));
                watch.evidence = None;
                self.status.watch = Some(watch);
            }
        }
    }

    fn taken_back(&mut self, mut watch: WatchStatus) {
        if watch.alarmed_at.is_none() {
            watch.alarmed_at = micro(self.now);
        }
        let seen = watch.message.clone().unwrap_or_default();
        self.warn(format!(
            "Rolling back {} to the revision before its promotion: {seen}",
            self.full(&self.plan.primary())
        ));
        self.status.last_promoted_spec.clone_from(&watch.former_spec);
        self.status.failed_checks = Some(0);
        watch.evidence = None;
        self.status.watch = Some(watch);
        self.set_phase(CanaryPhase::Failed);
        self.status.message = Some(format!("rolled back after the promotion: {seen}"));
    }

    /// What a lost primary is made from: what was brought back, if the last promotion was taken back.
    pub(super) fn brought_back(&self) -> Option<String> {
        let watch = self.status.watch.as_ref()?;
        let former = watch.former.former_id.clone()?;
        let kept = self.seen.former.as_ref().is_some_and(|kept| kept.id == former);
        (self.phase() == CanaryPhase::Failed && watch.alarmed_at.is_some() && kept).then_some(former)
    }
}
