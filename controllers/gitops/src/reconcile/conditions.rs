//! The status of a Kustomization in Flux's words. Pure: status in, status out, time as an argument.

use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use serin_crds::flux::kustomize::{KustomizationStatus, Snapshot as History};
use serin_kit::condition::{self, Status, Wanted};

/// Flux caps messages at this many characters.
const MESSAGE_MAX: usize = 20_000;
/// Entries of the history, as Flux.
const HISTORY_MAX: usize = 5;

/// A status being worked on.
pub(crate) struct Edit<'a> {
    pub(crate) status: &'a mut KustomizationStatus,
    pub(crate) generation: Option<i64>,
    pub(crate) now: Timestamp,
}

impl Edit<'_> {
    fn set(&mut self, type_: &str, status: Status, reason: &str, message: &str) {
        let message: String = if message.chars().count() > MESSAGE_MAX {
            message.chars().take(MESSAGE_MAX).collect()
        } else {
            message.to_string()
        };
        let wanted = Wanted {
            type_,
            status,
            reason,
            message: &message,
            observed_generation: self.generation,
        };
        condition::set(&mut self.status.conditions, &wanted, self.now);
    }

    fn remove(&mut self, type_: &str) {
        condition::remove(&mut self.status.conditions, type_);
    }

    /// Work is under way.
    pub(crate) fn progressing(&mut self, message: &str) {
        self.remove("Stalled");
        self.set("Reconciling", Status::True, "Progressing", message);
        self.set(
            "Ready",
            Status::Unknown,
            "Progressing",
            "Reconciliation in progress",
        );
    }

    /// Applied, and waiting for health.
    pub(crate) fn waiting_for_health(&mut self, message: &str) {
        self.remove("Stalled");
        self.set("Reconciling", Status::True, "Progressing", message);
        self.set("Ready", Status::Unknown, "Progressing", message);
        self.set("Healthy", Status::Unknown, "Progressing", message);
    }

    /// Everything is as the revision asks.
    pub(crate) fn ready(&mut self, revision: &str, healthy: Option<&str>) {
        self.remove("Stalled");
        self.remove("Reconciling");
        match healthy {
            Some(message) => {
                // A pass that finds everything healthy again does not rewrite how long the first took.
                if !condition::is_true(&self.status.conditions, "Healthy") {
                    self.set("Healthy", Status::True, "Succeeded", message);
                } else {
                    let held = condition::get(&self.status.conditions, "Healthy")
                        .map(|c| c.message.clone())
                        .unwrap_or_default();
                    self.set("Healthy", Status::True, "Succeeded", &held);
                }
            }
            None => self.remove("Healthy"),
        }
        self.set(
            "Ready",
            Status::True,
            "ReconciliationSucceeded",
            &format!("Applied revision: {revision}"),
        );
        self.status.observed_generation = self.generation;
    }

    /// An attempt failed and will be made again.
    pub(crate) fn failed(&mut self, reason: &str, message: &str, unhealthy: bool) {
        self.remove("Stalled");
        self.set("Ready", Status::False, reason, message);
        self.set(
            "Reconciling",
            Status::True,
            "ProgressingWithRetry",
            &first_line(message),
        );
        if unhealthy {
            self.set("Healthy", Status::False, reason, message);
        }
        self.status.observed_generation = self.generation;
    }

    /// Nothing will change until the object does.
    pub(crate) fn stalled(&mut self, reason: &str, message: &str) {
        self.remove("Reconciling");
        self.set("Stalled", Status::True, reason, message);
        self.set("Ready", Status::False, reason, message);
        self.status.observed_generation = self.generation;
    }

    /// Notes a result that was applied: newest first, each digest once, five at most.
    pub(crate) fn record(&mut self, digest: &str, revision: &str, took: Duration, outcome: &str) {
        let duration = serin_crds::Duration::from(Duration::from_millis(
            u64::try_from(took.as_millis()).unwrap_or(u64::MAX).max(1),
        ));
        let now = Time(self.now);
        let metadata = [("revision".to_string(), revision.to_string())].into();
        let history = &mut self.status.history;
        let mut entry = match history.iter().position(|h| h.digest == digest) {
            Some(at) => history.remove(at),
            None => History {
                digest: digest.to_string(),
                first_reconciled: now.clone(),
                last_reconciled: now.clone(),
                last_reconciled_duration: duration.clone(),
                last_reconciled_status: String::new(),
                total_reconciliations: 0,
                metadata: Default::default(),
            },
        };
        entry.last_reconciled = now;
        entry.last_reconciled_duration = duration;
        entry.last_reconciled_status = outcome.to_string();
        entry.total_reconciliations += 1;
        entry.metadata = metadata;
        history.insert(0, entry);
        history.truncate(HISTORY_MAX);
    }
}

fn first_line(text: &str) -> String {
    text.lines().next().unwrap_or_default().to_string()
}

/// The reason of `Ready`, if it is there.
pub(crate) fn ready_reason(conditions: &[Condition]) -> Option<&str> {
    condition::get(conditions, "Ready").map(|c| c.reason.as_str())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status_of(steps: impl Fn(&mut Edit<'_>)) -> KustomizationStatus {
        let mut status = KustomizationStatus::default();
        steps(&mut Edit {
            status: &mut status,
            generation: Some(3),
            now: Timestamp::UNIX_EPOCH,
        });
        status
    }

    fn shape(status: &KustomizationStatus) -> Vec<String> {
        let mut all: Vec<String> = status
            .conditions
            .iter()
            .map(|c| format!("{}={} {}", c.type_, c.status, c.reason))
            .collect();
        all.sort();
        all
    }

    #[test]
    fn conditions_tell_each_phase_as_flux_does() {
        assert_eq!(
            shape(&status_of(|e| e.progressing("x"))),
            ["Ready=Unknown Progressing", "Reconciling=True Progressing"]
        );
        let done = status_of(|e| {
            e.progressing("x");
            e.waiting_for_health("y");
            e.ready("main@sha1:1", Some("Health check passed in 1s"));
        });
        assert_eq!(
            shape(&done),
            ["Healthy=True Succeeded", "Ready=True ReconciliationSucceeded"]
        );
        assert_eq!(done.observed_generation, Some(3));
        let failed = status_of(|e| e.failed("BuildFailed", "a\nb", false));
        assert_eq!(
            shape(&failed),
            ["Ready=False BuildFailed", "Reconciling=True ProgressingWithRetry"]
        );
        let stalled = status_of(|e| {
            e.progressing("x");
            e.stalled("InvalidCELExpression", "z");
        });
        assert_eq!(
            shape(&stalled),
            [
                "Ready=False InvalidCELExpression",
                "Stalled=True InvalidCELExpression"
            ]
        );
    }

    #[test]
    fn the_history_keeps_five_results_newest_first_and_each_once() {
        let status = status_of(|e| {
            for digest in ["a", "b", "c", "d", "e", "f", "c"] {
                e.record(
                    digest,
                    "main@sha1:1",
                    Duration::from_millis(20),
                    "ReconciliationSucceeded",
                );
            }
        });
        let digests: Vec<&str> = status.history.iter().map(|h| h.digest.as_str()).collect();
        assert_eq!(digests, ["c", "f", "e", "d", "b"]);
        assert_eq!(status.history[0].total_reconciliations, 2);
    }
}
