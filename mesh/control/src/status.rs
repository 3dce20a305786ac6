//! What the ledger and the model know, as conditions on the user's objects.
//!
//! | condition | True | False | Unknown |
//! |---|---|---|---|
//! | `Accepted` | it breaks no rule | `Invalid`: a rule, named; the last valid version stays in effect | |
//! | `ResolvedRefs` | everything it refers to is there | `RefNotFound`: what is missing; requests to it get 503 | |
//! | `Live` | every proxy that needs it runs with it | `Refused`: the proxy, the resource and its words; `Invalid` | `Propagating`: 38/40 proxies and who is waited for |
//! | `FullyHonoured` | (not written) | a field is set and not acted on | |
//!
//! Only the leader writes. Writes are coalesced: changes within half a second become one write, and a status that would
//! stay the same is not written. A write that fails is tried again with the next round.

#[cfg(test)]
mod tests;

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::Api;
use serde_json::json;
use serin_crds::istio::{DestinationRule, Gateway, ServiceEntry, Sidecar, VirtualService};
use serin_kit::condition::{self, Status, Wanted};
use serin_kit::{apply, unhonoured};
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::ads::{Note, Query};
use crate::ledger::{Ledger, Liveness};

/// Field manager of the statuses.
pub const FIELD_MANAGER: &str = "serin-mesh";

/// The condition that says whether every proxy that needs an object runs with it.
pub const LIVE: &str = "Live";

/// Changes of this long become one write.
const COALESCE: Duration = Duration::from_millis(500);

/// How long a change settles before it is written: most generations are live by then, and one write says it all.
const SETTLE: Duration = Duration::from_millis(100);

/// How long to wait before a failed write is tried again.
const RETRY: Duration = Duration::from_secs(5);

/// Objects asked about at once: the pump answers between pushes and must not be kept from them.
const CHUNK: usize = 64;

/// Writes statuses; see the module's documentation.
pub struct Writer {
    client: kube::Client,
    ledger: Ledger,
    pump: mpsc::Sender<Query>,
    leader: Option<watch::Receiver<bool>>,
    /// What was written last, for objects whose own watch event may still be on its way.
    written: HashMap<Arc<str>, Vec<Condition>>,
}

impl std::fmt::Debug for Writer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Writer")
            .field("written", &self.written.len())
            .finish_non_exhaustive()
    }
}

impl Writer {
    /// A writer for the objects that `ledger` reports as changed.
    pub fn new(
        client: kube::Client,
        ledger: Ledger,
        pump: mpsc::Sender<Query>,
        leader: Option<watch::Receiver<bool>>,
    ) -> Self {
        Self {
            client,
            ledger,
            pump,
            leader,
            written: HashMap::new(),
        }
    }

    /// Writes until cancelled.
    pub async fn run(mut self, cancel: CancellationToken) {
        let mut failed: HashSet<Arc<str>> = HashSet::new();
        loop {
            let retry = async {
                if failed.is_empty() {
                    std::future::pending::<()>().await;
                }
                tokio::time::sleep(RETRY).await;
            };
            let mut objects = tokio::select! {
                () = cancel.cancelled() => return,
                () = retry => HashSet::new(),
                changed = self.ledger.changes() => changed,
            };
            objects.extend(failed.drain());
            if !self.is_leader() {
                // Whoever leads later must look at everything anyway: it keeps what it hears of until then.
                tokio::select! {
                    () = cancel.cancelled() => return,
                    () = self.leads() => {}
                }
            }
            tokio::select! {
                () = cancel.cancelled() => return,
                () = tokio::time::sleep(SETTLE) => objects.extend(self.ledger.take_changes()),
            }
            tokio::select! {
                () = cancel.cancelled() => return,
                failures = self.write_all(objects) => failed = failures,
            }
            tokio::select! {
                () = cancel.cancelled() => return,
                () = tokio::time::sleep(COALESCE) => {}
            }
        }
    }

    fn is_leader(&self) -> bool {
        self.leader.as_ref().is_none_or(|leader| *leader.borrow())
    }

    async fn leads(&mut self) {
        if let Some(leader) = &mut self.leader
            && leader.wait_for(|leads| *leads).await.is_err()
        {
            std::future::pending::<()>().await; // whoever decided is gone: never
        }
    }

    async fn write_all(&mut self, objects: HashSet<Arc<str>>) -> HashSet<Arc<str>> {
        let mut failed = HashSet::new();
        let objects: Vec<_> = objects.into_iter().collect();
        for chunk in objects.chunks(CHUNK) {
            let (reply, answer) = oneshot::channel();
            if self
                .pump
                .send(Query {
                    objects: chunk.to_vec(),
                    reply,
                })
                .await
                .is_err()
            {
                return failed;
            }
            let Ok(notes) = answer.await else { return failed };
            let known: HashSet<_> = notes.iter().map(|(object, _)| object.clone()).collect();
            self.written
                .retain(|object, _| known.contains(object) || !chunk.contains(object));
            for (object, note) in notes {
                if let Err(error) = self.write(&object, note).await {
                    warn!(%error, "status not written; will try again");
                    failed.insert(object);
                }
            }
        }
        failed
    }

    async fn write(&mut self, object: &Arc<str>, note: Note) -> Result<(), serin_kit::Error> {
        let liveness = self.ledger.liveness(object, note.generation);
        let mut wanted = self.written.get(object).unwrap_or(&note.conditions).clone();
        conditions(&mut wanted, &note, &liveness, Timestamp::now());
        if wanted == note.conditions {
            self.written.remove(object);
            return Ok(());
        }
        if self.written.get(object) == Some(&wanted) {
            return Ok(()); // written; the watch has not told us yet
        }
        let status = json!({"conditions": wanted, "observedGeneration": note.generation});
        match note.kind {
            "VirtualService" => self.apply::<VirtualService>(&note, &status).await?,
            "DestinationRule" => self.apply::<DestinationRule>(&note, &status).await?,
            "Gateway" => self.apply::<Gateway>(&note, &status).await?,
            "ServiceEntry" => self.apply::<ServiceEntry>(&note, &status).await?,
            "Sidecar" => self.apply::<Sidecar>(&note, &status).await?,
            _ => {}
        }
        self.written.insert(object.clone(), wanted);
        Ok(())
    }

    async fn apply<K>(&self, note: &Note, status: &serde_json::Value) -> Result<(), serin_kit::Error>
    where
        K: kube::Resource<Scope = kube::core::NamespaceResourceScope>
            + serde::de::DeserializeOwned
            + Clone
            + std::fmt::Debug,
        K::DynamicType: Default,
    {
        let api: Api<K> = Api::namespaced(self.client.clone(), &note.namespace);
        match apply::apply_status(&api, FIELD_MANAGER, Some(&note.namespace), &note.name, status).await {
            // Deleted meanwhile: nobody is left to tell.
            Err(serin_kit::Error::Write { source, .. }) if is_not_found(&source) => Ok(()),
            other => other.map(drop),
        }
    }
}

fn is_not_found(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == 404)
}

/// Brings the conditions up to date. Pure; see the module's table.
pub fn conditions(conditions: &mut Vec<Condition>, note: &Note, liveness: &Liveness, now: Timestamp) {
    let mut set = |type_, status, reason, message: &str| {
        let observed_generation = Some(note.generation);
        condition::set(
            conditions,
            &Wanted {
                type_,
                status,
                reason,
                message,
                observed_generation,
            },
            now,
        );
    };
    if note.refused.is_empty() {
        set("Accepted", Status::True, "Accepted", "");
    } else {
        set("Accepted", Status::False, "Invalid", &note.refused.join("; "));
    }
    if note.unresolved.is_empty() {
        set("ResolvedRefs", Status::True, "ResolvedRefs", "");
    } else {
        set(
            "ResolvedRefs",
            Status::False,
            "RefNotFound",
            &note.unresolved.join("; "),
        );
    }
    let message = liveness.to_string();
    let (status, reason) = if liveness.rejected.is_some() || !note.refused.is_empty() {
        (Status::False, "Invalid")
    } else if liveness.refused > 0 {
        (Status::False, "Refused")
    } else if liveness.is_live() && liveness.needed == 0 {
        (Status::True, "NotNeeded")
    } else if liveness.is_live() {
        (Status::True, "Live")
    } else {
        (Status::Unknown, "Propagating")
    };
    set(LIVE, status, reason, &message);
    unhonoured::set(conditions, &note.unhonoured, Some(note.generation), now);
}
