//! What is taken away before the last rule that names it.
//!
//! Somebody deletes a subset, a Service or a ServiceEntry a moment before the VirtualService that still sends requests to it (kinds are
//! watched apart, and people delete in any order). Taken in at once, those requests would be answered with 503 until the other change is
//! seen. So the removal waits: everything else that the change says is in effect at once, what it takes away stays. As soon as no rule
//! names it, or after [`WARMING`], it is taken in, and every proxy hears of it after the rules: its connection
//! sends removals once the changes before them are acknowledged. After that it means what it means in Istio: 503.
//!
//! The mirror of [`crate::warming`], and pure like it. Nothing lingers before the world is complete. Limits: endpoints that
//! stop being ready go at once, since nothing answers there; the deletion of a whole EndpointSlice waits with its Service.

use std::collections::BTreeMap;
use std::time::Duration;

use serin_model::{Change, Kind, Object, ObjectKey};
use tracing::{debug, info};

use crate::translate::Intake;
use crate::warming::WARMING;

/// The removals that wait.
#[derive(Debug, Default)]
pub(crate) struct Lingering {
    held: BTreeMap<ObjectKey, Held>,
}

#[derive(Debug)]
struct Held {
    change: Change,
    until: Duration,
}

impl Lingering {
    /// What of a change is taken in now; the whole of it is kept if that is less.
    pub(crate) fn at_once(
        &mut self,
        intake: &mut Intake<'_>,
        change: Change,
        now: Duration,
    ) -> Option<Change> {
        let key = match &change {
            Change::Apply(object) => object.key(),
            Change::Delete(key) => key.clone(),
        };
        // A newer change of the object takes the place of the one that waits, and waits no longer.
        let before = self.held.remove(&key).map(|held| held.until);
        let until = match key.kind {
            Kind::EndpointSlice => match &change {
                Change::Delete(_) => self.service_goes(intake, &key),
                Change::Apply(_) => None,
            },
            _ => {
                let losses = intake.bereaves(&change);
                (!losses.is_empty()).then(|| {
                    debug!(object = %key, ?losses, "kept while rules name it");
                    before.unwrap_or(now + WARMING)
                })
            }
        };
        let Some(until) = until.filter(|until| *until > now) else {
            return Some(change);
        };
        let held = Held {
            change: change.clone(),
            until,
        };
        self.held.insert(key, held);
        match change {
            Change::Apply(Object::DestinationRule(new)) => {
                let whole = intake.model().with_dropped_subsets(&new)?;
                Some(Change::Apply(Object::DestinationRule(whole)))
            }
            Change::Apply(_) | Change::Delete(_) => None,
        }
    }

    /// Until when the Service of a slice lingers.
    fn service_goes(&self, intake: &Intake<'_>, slice: &ObjectKey) -> Option<Duration> {
        let service = intake.model().service_of_slice(slice)?;
        self.held.get(&service).map(|held| held.until)
    }

    /// Takes in what no rule names any more and what has waited long enough; says what that was.
    pub(crate) fn settle(&mut self, intake: &mut Intake<'_>, now: Duration) -> Vec<ObjectKey> {
        // Slices are sorted after the Service that they go with by `Kind`, or are looked at again at their time.
        let mut settled = Vec::new();
        for (key, held) in std::mem::take(&mut self.held) {
            let expired = held.until <= now;
            let waits = !expired
                && match key.kind {
                    Kind::EndpointSlice => self.service_goes(intake, &key).is_some(),
                    _ => !intake.bereaves(&held.change).is_empty(),
                };
            if waits {
                self.held.insert(key, held);
                continue;
            }
            if expired && key.kind != Kind::EndpointSlice {
                info!(object = %key, "taken away although rules still name it");
            }
            intake.take(held.change);
            settled.push(key);
        }
        settled
    }

    /// Whether a change of this object waits.
    pub(crate) fn holds(&self, key: &ObjectKey) -> bool {
        self.held.contains_key(key)
    }

    /// When the first one has waited long enough.
    pub(crate) fn wake_at(&self) -> Option<Duration> {
        self.held.values().map(|held| held.until).min()
    }
}
