//! A Kustomization goes: what happens to what it applied, by `spec.deletionPolicy`.

use std::sync::Arc;

use jiff::Timestamp;
use kube::ResourceExt as _;
use serin_crds::flux::kustomize::{DeletionPolicy, Kustomization, KustomizationSpec};
use tokio::time::Instant;

use super::Kustomizations;
use super::pass::{FINALIZER, Times};
use crate::apply::Failed;
use crate::error::Error;
use crate::key::Key;
use crate::plan::inventory;

/// What deletion does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    /// Everything stays.
    Leave,
    Delete,
    /// And wait until it is gone.
    DeleteAndWait,
}

fn fate(spec: &KustomizationSpec) -> Fate {
    if spec.suspend == Some(true) {
        return Fate::Leave;
    }
    match spec
        .deletion_policy
        .as_ref()
        .unwrap_or(&DeletionPolicy::MirrorPrune)
    {
        DeletionPolicy::Orphan => Fate::Leave,
        DeletionPolicy::Delete => Fate::Delete,
        DeletionPolicy::WaitForTermination => Fate::DeleteAndWait,
        DeletionPolicy::MirrorPrune if spec.prune => Fate::Delete,
        // An unknown policy must not delete.
        DeletionPolicy::MirrorPrune | DeletionPolicy::Other(_) => Fate::Leave,
    }
}

impl Kustomizations {
    pub(super) async fn finalize(&self, key: &Key, ks: &Arc<Kustomization>) -> Result<(), Error> {
        if !ks.finalizers().iter().any(|f| f == FINALIZER) {
            return Ok(());
        }
        let times = Times::of(&ks.spec);
        let fate = fate(&ks.spec);
        if fate != Fate::Leave {
            self.memory.lock().entry(key.clone()).or_default().finalizing = true;
            let all = inventory::objects(ks.status.as_ref().and_then(|s| s.inventory.as_ref()));
            let pruned = self.applier.prune(&all, key).await;
            if !pruned.deleted.is_empty() {
                let lines: Vec<String> = pruned.deleted.iter().map(|id| format!("{id} deleted")).collect();
                self.recorder.normal(
                    &self.reference(ks),
                    "ReconciliationSucceeded",
                    "Delete",
                    &lines.join("\n"),
                );
            }
            if !pruned.errors.is_empty() {
                let message = Failed {
                    errors: pruned.errors,
                    done: Vec::new(),
                }
                .message();
                self.recorder
                    .warning(&self.reference(ks), "PruneFailed", "Delete", &message);
                self.queue.push_at(
                    key,
                    Instant::now() + times.retry.min(std::time::Duration::from_secs(10)),
                );
                return self
                    .write(ks, &[], |e| e.failed("PruneFailed", &message, false))
                    .await
                    .map(drop);
            }
            if fate == Fate::DeleteAndWait {
                let left: Vec<String> = all
                    .iter()
                    .filter(|(id, _)| self.applier.live.get(id).and_then(|l| l.owner()).as_ref() == Some(key))
                    .map(|(id, _)| id.to_string())
                    .collect();
                let waited =
                    ks.metadata.deletion_timestamp.as_ref().and_then(|t| {
                        std::time::Duration::try_from(Timestamp::now().duration_since(t.0)).ok()
                    });
                let over = waited.is_some_and(|w| w >= times.timeout);
                if !left.is_empty() && !over {
                    let rest = times.timeout.saturating_sub(waited.unwrap_or_default());
                    self.queue.push_at(key, Instant::now() + rest);
                    return Ok(());
                }
                if !left.is_empty() {
                    let message = format!("gave up waiting for the termination of {}", left.join(", "));
                    self.recorder
                        .warning(&self.reference(ks), "PruneFailed", "Delete", &message);
                }
            }
        }
        let rest: Vec<String> = ks
            .finalizers()
            .iter()
            .filter(|f| *f != FINALIZER)
            .cloned()
            .collect();
        match self.patch_finalizers(key, ks, &rest).await {
            Err(Error::Api { source, .. }) if matches!(*source, kube::Error::Api(ref s) if s.code == 404) => {
            }
            other => drop(other?),
        }
        self.memory.lock().remove(key);
        self.status.forget(key);
        self.queue.cancel_at(key);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_deletion_policy_decides_and_a_suspended_or_unknown_one_leaves_everything() {
        let spec = |policy: Option<&str>, prune: bool, suspend: bool| KustomizationSpec {
            prune,
            suspend: Some(suspend),
            deletion_policy: policy.map(|p| DeletionPolicy::from(p.to_string())),
            ..Default::default()
        };
        for (policy, prune, suspend, want) in [
            (None, true, false, Fate::Delete),
            (None, false, false, Fate::Leave),
            (Some("MirrorPrune"), true, false, Fate::Delete),
            (Some("Delete"), false, false, Fate::Delete),
            (Some("WaitForTermination"), false, false, Fate::DeleteAndWait),
            (Some("Orphan"), true, false, Fate::Leave),
            (Some("Delete"), true, true, Fate::Leave),
            (Some("Somehow"), true, false, Fate::Leave),
        ] {
            assert_eq!(
                fate(&spec(policy, prune, suspend)),
                want,
                "{policy:?} {prune} {suspend}"
            );
        }
    }
}
