//! What is shared by all requests of a cluster, counted against its limits.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::config::cluster::Priority;
use crate::config::slot::{ClusterSlot, Level};
use crate::worker::upstream::Plan;

/// Counts something shared against a limit; nothing is written when there is no limit.
pub(in crate::worker) struct Permit(Option<(Arc<ClusterSlot>, Priority, fn(&Level) -> &AtomicU32)>);

impl Permit {
    pub(in crate::worker) fn take(
        slot: &Arc<ClusterSlot>,
        priority: Priority,
        which: fn(&Level) -> &AtomicU32,
        limit: u32,
    ) -> Option<Self> {
        if limit == u32::MAX {
            return Some(Self(None));
        }
        let used = which(slot.usage.of(priority));
        if used.fetch_add(1, Ordering::Relaxed) >= limit {
            used.fetch_sub(1, Ordering::Relaxed);
            return None;
        }
        Some(Self(Some((slot.clone(), priority, which))))
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        if let Some((slot, priority, which)) = &self.0 {
            which(slot.usage.of(*priority)).fetch_sub(1, Ordering::Relaxed);
        }
    }
}

/// What a retry needs, unless there are too many.
pub(in crate::worker) fn take_retry_permit(plan: &Plan<'_>) -> Option<Permit> {
    let (slot, priority) = (&plan.cluster.slot, plan.forward.priority);
    let active = slot.usage.of(priority).requests.load(Ordering::Relaxed);
    let limit = plan.cluster.config.limits.of(priority).retry_limit(active);
    let permit = Permit::take(slot, priority, |level| &level.retries, limit);
    if permit.is_none() {
        plan.cells().retry_overflow.add(1);
    }
    permit
}
