//! Where the mesh meets the rollouts: its ack ledger is their source of liveness, its telemetry their source of
//! measurements. Neither crate knows the other; this is the seam between them.

use futures::stream::{self, BoxStream, StreamExt as _};
use serin_canary::traffic::{Liveness, LivenessSource};
use serin_control::ledger::Ledger;

/// Liveness of routes, out of the ack ledger.
pub(crate) struct LedgerLiveness {
    ledger: Ledger,
}

impl LedgerLiveness {
    /// Reads `ledger`.
    pub(crate) fn new(ledger: Ledger) -> Self {
        Self { ledger }
    }
}

impl LivenessSource for LedgerLiveness {
    fn watch(&self, object: &str, generation: i64) -> BoxStream<'static, Liveness> {
        let receiver = self.ledger.watch(object, generation);
        stream::unfold((receiver, true), |(mut receiver, first)| async move {
            if !first {
                receiver.changed().await.ok()?;
            }
            let now = receiver.borrow_and_update().clone();
            Some((translate(&now), (receiver, false)))
        })
        .boxed()
    }
}

fn translate(liveness: &serin_control::ledger::Liveness) -> Liveness {
    let count = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
    let refusals = liveness.refusals.first().map(|refused| refused.reason.to_string());
    // What the control plane itself refuses reaches no proxy: for a rollout that is a refusal like any other.
    let rejected = liveness.rejected.as_ref().map(ToString::to_string);
    Liveness {
        generation: liveness.generation,
        known: liveness.observed || rejected.is_some(),
        needed: count(liveness.needed),
        sent: count(liveness.sent),
        acked: count(liveness.acked),
        refused: count(liveness.refused).max(u32::from(rejected.is_some())),
        reason: rejected.or(refusals),
    }
}
