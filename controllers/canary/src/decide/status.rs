//! The fields of the status that follow from others: the `Promoted` condition, times, how live the weight is.

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, MicroTime, Time};
use serin_crds::flagger::{CanaryCondition, CanaryPhase, CanaryStatus, Evidence, WeightLive};
use serin_kit::unhonoured;

use super::Deciding;

/// Key of the judges' state in `status.run.evidence`. Another name than that of earlier releases, whose state is another.
pub(crate) const COMPARISON_STATE: &str = "judges";
/// Key of the state of the templates' rules.
pub(crate) const VALUES_STATE: &str = "values";

/// A time for the status.
#[allow(clippy::unnecessary_wraps)] // all fields of the status are optional
pub(crate) fn micro(at: Timestamp) -> Option<MicroTime> {
    Some(MicroTime(at))
}

impl Deciding<'_> {
    pub(super) fn set_phase(&mut self, phase: CanaryPhase) {
        self.status.phase = Some(phase);
    }

    pub(super) fn set_weight_status(&mut self, weight: i32) {
        self.status.canary_weight = Some(weight);
        self.status.iterations.get_or_insert(0);
        self.status.failed_checks.get_or_insert(0);
    }
}

/// Completes the status after a decision.
pub(super) fn finish(deciding: &mut Deciding<'_>, before: &CanaryStatus) {
    let now = deciding.now;
    let phase = deciding.phase();
    if phase != CanaryPhase::Unset {
        deciding.set_weight_status(deciding.weight());
        promoted(&mut deciding.status, &phase, now);
    }
    unhonoured_condition(deciding, now);
    weight_live(deciding);
    if let Some(run) = deciding.status.run.as_mut() {
        let running = phase == CanaryPhase::Progressing;
        let mut judges = std::collections::BTreeMap::new();
        if deciding.plan.comparison.is_some()
            && let Ok(state) = serde_json::to_value(&deciding.seen.measured.judges)
        {
            judges.insert(COMPARISON_STATE.to_owned(), state);
        }
        if !deciding.seen.values.is_empty()
            && let Ok(state) = serde_json::to_value(&deciding.seen.values)
        {
            judges.insert(VALUES_STATE.to_owned(), state);
        }
        run.evidence = (running && !judges.is_empty() && !deciding.status.history.is_empty())
            .then_some(Evidence { judges });
    }
    if deciding.status.message.is_none() && phase == CanaryPhase::Failed && before.phase == Some(phase) {
        // Why the last run failed is worth knowing until the next one.
        deciding.status.message.clone_from(&before.message);
    }
    // Flagger's `lastTransitionTime` moves whenever the status is written with another content.
    let moved = before.phase != deciding.status.phase
        || before.canary_weight != deciding.status.canary_weight
        || before.failed_checks != deciding.status.failed_checks
        || before.last_applied_spec != deciding.status.last_applied_spec;
    if moved {
        deciding.status.last_transition_time = Some(Time(now));
    }
}

fn promoted(status: &mut CanaryStatus, phase: &CanaryPhase, now: Timestamp) {
    let (holds, message) = match phase {
        CanaryPhase::Unset | CanaryPhase::Initializing => {
            ("Unknown", "New Deployment detected, starting initialization.")
        }
        CanaryPhase::Initialized => ("True", "Deployment initialization completed."),
        CanaryPhase::Waiting => ("Unknown", "Waiting for approval."),
        CanaryPhase::Progressing => ("Unknown", "New revision detected, progressing canary analysis."),
        CanaryPhase::WaitingPromotion => ("Unknown", "Waiting for approval."),
        CanaryPhase::Promoting => (
            "Unknown",
            "Canary analysis completed, starting primary rolling update.",
        ),
        CanaryPhase::Finalising => (
            "Unknown",
            "Canary analysis completed, routing all traffic to primary.",
        ),
        CanaryPhase::Succeeded => (
            "True",
            "Canary analysis completed successfully, promotion finished.",
        ),
        CanaryPhase::Failed => ("False", "Canary analysis failed, Deployment scaled to zero."),
        CanaryPhase::Terminating | CanaryPhase::Terminated => {
            ("Unknown", "Canary deleted, giving the objects back.")
        }
        CanaryPhase::Other(_) => ("Unknown", "Phase of another version."),
    };
    let reason = phase.as_str();
    let current = status
        .conditions
        .iter_mut()
        .find(|condition| condition.r#type == "Promoted");
    match current {
        Some(condition) => {
            if condition.status != holds {
                condition.last_transition_time = Some(Time(now));
            }
            if condition.reason != reason || condition.status != holds {
                condition.last_update_time = Some(Time(now));
            }
            holds.clone_into(&mut condition.status);
            reason.clone_into(&mut condition.reason);
            condition.message = Some(message.to_owned());
        }
        None => status.conditions.insert(
            0,
            CanaryCondition {
                r#type: "Promoted".to_owned(),
                status: holds.to_owned(),
                reason: reason.to_owned(),
                message: Some(message.to_owned()),
                last_update_time: Some(Time(now)),
                last_transition_time: Some(Time(now)),
                observed_generation: None,
            },
        ),
    }
}

/// `FullyHonoured`, by the one mechanism of all controllers, in Flagger's form of a condition.
fn unhonoured_condition(deciding: &mut Deciding<'_>, now: Timestamp) {
    let conditions = &mut deciding.status.conditions;
    let current = conditions
        .iter()
        .position(|condition| condition.r#type == unhonoured::CONDITION);
    let mut list: Vec<Condition> = current
        .map(|index| &conditions[index])
        .map(|condition| Condition {
            type_: condition.r#type.clone(),
            status: condition.status.clone(),
            reason: condition.reason.clone(),
            message: condition.message.clone().unwrap_or_default(),
            observed_generation: condition.observed_generation,
            last_transition_time: condition.last_transition_time.clone().unwrap_or(Time(now)),
        })
        .into_iter()
        .collect();
    if !unhonoured::set(
        &mut list,
        &deciding.plan.unhonoured,
        Some(deciding.seen.generation),
        now,
    ) {
        return;
    }
    conditions.retain(|condition| condition.r#type != unhonoured::CONDITION);
    conditions.extend(list.into_iter().map(|condition| CanaryCondition {
        r#type: condition.type_,
        status: condition.status,
        reason: condition.reason,
        message: Some(condition.message),
        last_update_time: Some(Time(now)),
        last_transition_time: Some(condition.last_transition_time),
        observed_generation: condition.observed_generation,
    }));
}

fn weight_live(deciding: &mut Deciding<'_>) {
    let Some(route) = deciding.seen.route.as_ref() else {
        return;
    };
    let (Some(split), Some(live)) = (route.split, deciding.seen.liveness.as_ref()) else {
        return;
    };
    // Speaks of the wanted weight only: what is seen of the one before is history.
    if split.canary() != deciding.weight() || live.generation != route.generation {
        return;
    }
    let count = |count: u32| Some(i32::try_from(count).unwrap_or(i32::MAX));
    deciding.status.weight_live = Some(WeightLive {
        weight: split.canary(),
        generation: route.generation,
        needed: count(live.needed),
        sent: count(live.sent),
        acked: count(live.acked),
        refused: count(live.refused),
        reason: live.reason.clone(),
        live: Some(live.is_live()),
    });
}
