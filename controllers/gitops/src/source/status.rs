//! The status of a `GitRepository` in Flux's words. Pure.

use std::collections::BTreeMap;
use std::sync::Arc;

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use serin_crds::flux::source::{
    Artifact, GitProvider, GitRepository, GitRepositorySpec, GitRepositoryStatus,
};
use serin_kit::condition::{self, Status, Wanted as WantedCondition};
use serin_kit::unhonoured::Field;

use super::git::Fetched;
use super::tree::Snapshot;
use crate::error::Error;
use crate::key::Key;

/// Why a look failed: what the condition says, and whether trying again can help.
pub(super) struct Fault {
    pub(super) reason: &'static str,
    pub(super) message: String,
    pub(super) terminal: bool,
}

impl From<Error> for Fault {
    fn from(error: Error) -> Self {
        let reason = match &error {
            Error::Git { .. }
            | Error::GitTimeout { .. }
            | Error::GitExhausted { .. }
            | Error::Reference { .. } => "GitOperationFailed",
            Error::Referred { .. } => "AuthenticationFailed",
            _ => "GitOperationFailed",
        };
        Self {
            reason,
            message: error.to_string(),
            terminal: false,
        }
    }
}

impl Fault {
    pub(super) fn terminal(reason: &'static str, message: String) -> Self {
        Self {
            reason,
            message,
            terminal: true,
        }
    }
}

/// Fields that are read and not honoured.
pub(super) fn refused(spec: &GitRepositorySpec) -> Vec<Field> {
    let mut fields = Vec::new();
    if spec.verify.is_some() {
        fields.push(Field::refused("spec.verify", "signatures are not checked yet, and an unchecked revision must not pass for a checked one; remove it to accept unsigned commits"));
    }
    if spec.recurse_submodules == Some(true) {
        fields.push(Field::refused(
            "spec.recurseSubmodules",
            "submodules are not fetched yet; make the other repository a GitRepository of its own",
        ));
    }
    if !spec.include.is_empty() {
        fields.push(Field::refused(
            "spec.include",
            "other repositories are not laid into the tree yet; give them a Kustomization of their own",
        ));
    }
    if spec.provider.as_ref().is_some_and(|p| *p != GitProvider::Generic) {
        fields.push(Field::refused(
            "spec.provider",
            "only 'generic' is honoured; put a token into the Secret of spec.secretRef",
        ));
    }
    if spec.service_account_name.is_some() {
        fields.push(Field::refused(
            "spec.serviceAccountName",
            "workload identity is not honoured; put a token into the Secret of spec.secretRef",
        ));
    }
    fields
}

/// The status after a look. Pure.
pub(super) fn describe(
    status: &mut GitRepositoryStatus,
    object: &GitRepository,
    key: &Key,
    result: &Result<(Arc<Snapshot>, Fetched), Fault>,
    requested: Option<String>,
    now: Timestamp,
) {
    let generation = object.metadata.generation;
    let set = |conditions: &mut Vec<Condition>, type_: &str, status: Status, reason: &str, message: &str| {
        condition::set(
            conditions,
            &WantedCondition {
                type_,
                status,
                reason,
                message,
                observed_generation: generation,
            },
            now,
        );
    };
    match result {
        Ok((snapshot, fetched)) => {
            let message = format!("stored artifact for revision '{}'", snapshot.revision);
            for gone in ["FetchFailed", "Reconciling", "Stalled", "ArtifactOutdated"] {
                condition::remove(&mut status.conditions, gone);
            }
            set(
                &mut status.conditions,
                "ArtifactInStorage",
                Status::True,
                "Succeeded",
                &message,
            );
            set(
                &mut status.conditions,
                "Ready",
                Status::True,
                "Succeeded",
                &message,
            );
            let same = status
                .artifact
                .as_ref()
                .is_some_and(|a| a.revision == snapshot.revision && a.digest == snapshot.digest);
            if !same {
                let path = format!("gitrepository/{}/{}/{}", key.namespace, key.name, snapshot.commit);
                status.artifact = Some(Artifact {
                    url: format!("serin://{path}"),
                    path,
                    revision: snapshot.revision.clone(),
                    digest: snapshot.digest.clone(),
                    last_update_time: Time(now),
                    size: None,
                    metadata: BTreeMap::from([
                        (
                            "org.opencontainers.image.revision".to_string(),
                            fetched.revision.clone(),
                        ),
                        (
                            "org.opencontainers.image.authors".to_string(),
                            fetched.author.clone(),
                        ),
                        (
                            "org.opencontainers.image.title".to_string(),
                            fetched.subject.clone(),
                        ),
                    ]),
                });
            }
            status.observed_ignore.clone_from(&object.spec.ignore);
            status
                .observed_sparse_checkout
                .clone_from(&object.spec.sparse_checkout);
        }
        Err(fault) => {
            set(
                &mut status.conditions,
                "FetchFailed",
                Status::True,
                fault.reason,
                &fault.message,
            );
            set(
                &mut status.conditions,
                "Ready",
                Status::False,
                fault.reason,
                &fault.message,
            );
            if fault.terminal {
                condition::remove(&mut status.conditions, "Reconciling");
                set(
                    &mut status.conditions,
                    "Stalled",
                    Status::True,
                    fault.reason,
                    &fault.message,
                );
            } else {
                condition::remove(&mut status.conditions, "Stalled");
                set(
                    &mut status.conditions,
                    "Reconciling",
                    Status::True,
                    "ProgressingWithRetry",
                    "the last revision stays in use; trying again",
                );
            }
        }
    }
    status.observed_generation = generation;
    status.last_handled_reconcile_at = requested;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_that_would_be_a_false_promise_are_refused() {
        let spec = GitRepositorySpec {
            verify: Some(Default::default()),
            recurse_submodules: Some(true),
            include: vec![Default::default()],
            provider: Some(GitProvider::Github),
            service_account_name: Some("x".into()),
            ..Default::default()
        };
        assert_eq!(refused(&spec).len(), 5);
        assert!(
            refused(&GitRepositorySpec {
                provider: Some(GitProvider::Generic),
                ..Default::default()
            })
            .is_empty()
        );
    }

    #[test]
    fn a_failure_keeps_the_artifact_and_a_terminal_one_stalls() {
        let object = GitRepository::new("app", GitRepositorySpec::default());
        let artifact = Artifact {
            path: "p".into(),
            url: "u".into(),
            revision: "main@sha1:1".into(),
            digest: "sha256:1".into(),
            last_update_time: Time(Timestamp::UNIX_EPOCH),
            size: None,
            metadata: BTreeMap::new(),
        };
        let mut status = GitRepositoryStatus {
            artifact: Some(artifact.clone()),
            ..Default::default()
        };
        let key = Key::new("ns", "app");
        let fault = |terminal| {
            Err(Fault {
                reason: "GitOperationFailed",
                message: "away".into(),
                terminal,
            })
        };
        describe(
            &mut status,
            &object,
            &key,
            &fault(false),
            None,
            Timestamp::UNIX_EPOCH,
        );
        assert_eq!(status.artifact, Some(artifact));
        assert!(
            condition::is_true(&status.conditions, "FetchFailed")
                && condition::is_true(&status.conditions, "Reconciling")
        );
        describe(
            &mut status,
            &object,
            &key,
            &fault(true),
            None,
            Timestamp::UNIX_EPOCH,
        );
        assert!(
            condition::is_true(&status.conditions, "Stalled")
                && !condition::is_true(&status.conditions, "Reconciling")
        );
    }
}
