//! A request's place among those let in at a time.

use std::cell::Cell;
use std::sync::Arc;
use std::time::Duration;

use super::{Passed, Verdict, state};
use crate::clock;
use crate::metrics::flags::Flags;
use crate::policy::adaptive_concurrency::AdaptiveConcurrency;
use crate::random;
use crate::worker::exchange::Exchange;
use crate::worker::local::LocalReply;

/// A request's place under an adaptive limit, until it is dropped.
pub(super) struct Place {
    limit: Arc<AdaptiveConcurrency>,
    /// Once it has been answered.
    latency: Cell<Option<Duration>>,
}

impl Place {
    /// The request has been answered after this time.
    pub(super) fn answered_after(&self, latency: Duration) {
        self.latency.set(Some(latency));
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.limit
            .leave(self.latency.get(), clock::now_ms(), random::next());
    }
}

/// Takes a place for a request, or refuses it.
pub(super) fn take_place(exchange: &mut Exchange, limit: &Arc<AdaptiveConcurrency>) -> Verdict {
    if !limit.enabled() {
        return Ok(Passed::On);
    }
    if !limit.enter() {
        return Err(LocalReply::new(
            limit.status,
            Flags::default(),
            "reached_concurrency_limit",
            "reached concurrency limit",
        ));
    }
    state(exchange).place = Some(Place {
        limit: limit.clone(),
        latency: Cell::new(None),
    });
    Ok(Passed::On)
}
