//! What the controller remembers of a Kustomization between two passes. All of it can be lost: after a restart the
//! first pass builds, compares with what is live, and is back where it was.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use serin_crds::flux::kustomize::ResourceInventory;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::build::Built;
use crate::health::State;
use crate::key::ObjectId;
use crate::plan::{Accepted, Desired};

/// The first pause between two corrections of drift. Somebody who writes the same field again and again is met with
/// growing pauses, not with a war of writes.
const DRIFT_PAUSE_MIN: Duration = Duration::from_secs(1);
/// The longest pause.
const DRIFT_PAUSE_MAX: Duration = Duration::from_secs(300);

/// What a pass was made from. Equal inputs give an equal result.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Inputs {
    pub(crate) revision: String,
    /// Digest of the artifact's visible content.
    pub(crate) content: String,
    pub(crate) generation: Option<i64>,
    /// `reconcile.fluxcd.io/requestedAt`.
    pub(crate) requested: Option<String>,
}

/// One object that was applied.
#[derive(Debug, Clone)]
pub(crate) struct Tracked {
    pub(crate) desired: Arc<Desired>,
    pub(crate) accepted: Option<Accepted>,
    /// An annotation kept our hands off; its health is not looked at.
    pub(crate) skipped: bool,
    /// Its health at the last look.
    pub(crate) state: Option<State>,
}

/// The last pass that applied everything.
#[derive(Debug)]
pub(crate) struct Applied {
    pub(crate) inputs: Inputs,
    pub(crate) digest: String,
    pub(crate) objects: HashMap<ObjectId, Tracked>,
    pub(crate) started: Instant,
    /// Whether the pass wrote any object.
    pub(crate) changed: bool,
}

/// A wait for health.
#[derive(Debug, Clone, Copy)]
pub(crate) struct HealthWait {
    pub(crate) since: Instant,
    pub(crate) deadline: Instant,
    /// Everything was healthy once; from then on only a failure counts.
    pub(crate) passed: bool,
}

/// The last pass that failed.
#[derive(Debug, Clone)]
pub(crate) struct Failure {
    pub(crate) inputs: Inputs,
    pub(crate) retry_at: Instant,
}

/// Pauses between corrections of drift.
#[derive(Debug, Default)]
pub(crate) struct DriftPause {
    last: Option<Instant>,
    pause: Duration,
}

impl DriftPause {
    /// When the next correction may be made; `now` for a first or rare one.
    pub(crate) fn next(&self, now: Instant) -> Instant {
        self.last.map_or(now, |last| (last + self.pause).max(now))
    }

    /// A correction is made now. One that comes long after the last starts over with the shortest pause.
    pub(crate) fn corrected(&mut self, now: Instant) {
        let calm = self
            .last
            .is_none_or(|last| now.duration_since(last) > DRIFT_PAUSE_MAX.max(self.pause * 4));
        self.pause = if calm {
            DRIFT_PAUSE_MIN
        } else {
            (self.pause * 2).min(DRIFT_PAUSE_MAX)
        };
        self.last = Some(now);
    }
}

/// Everything remembered of one Kustomization.
#[derive(Debug, Default)]
pub(crate) struct Memory {
    pub(crate) built: Option<Arc<Built>>,
    pub(crate) applied: Option<Applied>,
    pub(crate) failure: Option<Failure>,
    pub(crate) health: Option<HealthWait>,
    /// An applied object is not what it should be.
    pub(crate) drift: bool,
    pub(crate) drift_pause: DriftPause,
    /// A ConfigMap or Secret with variables changed.
    pub(crate) variables_changed: bool,
    /// When the interval asks for a full pass.
    pub(crate) full_at: Option<Instant>,
    /// Being deleted and waiting for objects to go.
    pub(crate) finalizing: bool,
    /// The inventory after the last apply; every status write from then on carries it. `None` while an apply is under way
    /// (the status then holds the union of old and new) and before the first.
    pub(crate) inventory: Option<ResourceInventory>,
    /// Cancelled when a newer revision makes the running pass pointless.
    pub(crate) superseded: CancellationToken,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn repeated_drift_is_corrected_with_growing_pauses_and_rare_drift_at_once() {
        let start = Instant::now();
        let mut pause = DriftPause::default();
        assert_eq!(pause.next(start), start);
        let mut at = start;
        let mut pauses = Vec::new();
        for _ in 0..12 {
            pause.corrected(at);
            let next = pause.next(at);
            pauses.push((next - at).as_secs());
            at = next;
        }
        assert_eq!(&pauses[..4], [1, 2, 4, 8]);
        assert_eq!(pauses.last(), Some(&300));
        let later = at + Duration::from_secs(3600);
        assert_eq!(pause.next(later), later);
        pause.corrected(later);
        assert_eq!(pause.next(later), later + Duration::from_secs(1));
    }
}
