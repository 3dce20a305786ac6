//! May a Kustomization proceed, and if not, what does it say? The decision before any work, as a pure function.

use std::sync::Arc;

use serde_json::Value;
use serin_crds::flux::kustomize::Kustomization;
use serin_kit::condition;
use serin_kit::unhonoured::{self, Field};

use crate::health::expressions::Expression;
use crate::key::Key;
use crate::source::tree::Snapshot;

/// How the source stands.
pub(crate) enum Source {
    /// There is no such object.
    Missing,
    /// It has no artifact (yet); its own words.
    NoArtifact(String),
    /// It has one by its status, and after a start it is not in memory yet.
    Recovering,
    Ready(Arc<Snapshot>),
}

/// One entry of `spec.dependsOn`.
pub(crate) struct Dependency {
    pub(crate) key: Key,
    pub(crate) object: Option<Arc<Kustomization>>,
    /// Whether it builds from the same source.
    pub(crate) same_source: bool,
    pub(crate) ready_expr: Option<String>,
}

/// All that the decision is made from.
pub(crate) struct Observed<'a> {
    pub(crate) object: &'a Kustomization,
    pub(crate) refused: &'a [Field],
    pub(crate) cycle: Option<Vec<Key>>,
    pub(crate) source_name: String,
    pub(crate) source: Source,
    pub(crate) dependencies: Vec<Dependency>,
}

/// The decision.
pub(crate) enum Gate {
    /// Nothing will change until the object itself does.
    Stalled {
        reason: &'static str,
        message: String,
    },
    /// What was said before still holds; an event opens the gate.
    Quiet,
    /// The condition says why; an event or the retry interval opens the gate.
    Waiting {
        reason: &'static str,
        message: String,
    },
    Open(Arc<Snapshot>),
}

/// Decides.
pub(crate) fn decide(observed: Observed<'_>) -> Gate {
    if unhonoured::refuses(observed.refused) {
        return Gate::Stalled {
            reason: "FieldsRefused",
            message: unhonoured::message(observed.refused),
        };
    }
    if let Some(cycle) = &observed.cycle {
        let path: Vec<String> = cycle.iter().map(ToString::to_string).collect();
        return Gate::Stalled {
            reason: "DependencyNotReady",
            message: format!("dependency cycle: {}", path.join(" -> ")),
        };
    }
    for dependency in &observed.dependencies {
        if let Some(text) = &dependency.ready_expr
            && let Err(message) = Expression::compile(text)
        {
            return Gate::Stalled {
                reason: "InvalidCELExpression",
                message,
            };
        }
    }
    let snapshot = match observed.source {
        Source::Missing => {
            return Gate::Waiting {
                reason: "ArtifactFailed",
                message: format!("Source '{}' not found", observed.source_name),
            };
        }
        Source::NoArtifact(words) => {
            let because = if words.is_empty() {
                String::new()
            } else {
                format!(": {words}")
            };
            return Gate::Waiting {
                reason: "ArtifactFailed",
                message: format!(
                    "Source '{}' is not ready, artifact not found{because}",
                    observed.source_name
                ),
            };
        }
        Source::Recovering => {
            let status = observed.object.status.as_ref();
            if status.is_some_and(|s| s.observed_generation == observed.object.metadata.generation) {
                return Gate::Quiet;
            }
            return Gate::Waiting {
                reason: "ArtifactFailed",
                message: format!(
                    "Source '{}' is not ready, its artifact is being read again",
                    observed.source_name
                ),
            };
        }
        Source::Ready(snapshot) => snapshot,
    };
    for dependency in &observed.dependencies {
        if let Err(message) = ready(observed.object, dependency, &snapshot.revision) {
            return Gate::Waiting {
                reason: "DependencyNotReady",
                message,
            };
        }
    }
    Gate::Open(snapshot)
}

/// Whether a dependency is ready on what is needed; else a sentence.
fn ready(object: &Kustomization, dependency: &Dependency, revision: &str) -> Result<(), String> {
    let key = &dependency.key;
    let Some(dep) = &dependency.object else {
        return Err(format!("dependency '{key}' not found"));
    };
    if let Some(text) = &dependency.ready_expr {
        let json = |o: &Kustomization| serde_json::to_value(o).unwrap_or(Value::Null);
        let (this, that) = (json(object), json(dep));
        return match Expression::compile(text).and_then(|e| e.holds(&[("self", &this), ("dep", &that)])) {
            Ok(true) => Ok(()),
            Ok(false) => Err(format!("dependency '{key}' is not ready according to readyExpr")),
            Err(words) => Err(format!("dependency '{key}': {words}")),
        };
    }
    let none = Vec::new();
    let status = dep.status.as_ref();
    let conditions = status.map_or(&none, |s| &s.conditions);
    let observed = status.and_then(|s| s.observed_generation) == dep.metadata.generation;
    if !observed || !condition::is_true(conditions, "Ready") {
        return Err(format!("dependency '{key}' is not ready"));
    }
    if dependency.same_source && status.and_then(|s| s.last_applied_revision.as_deref()) != Some(revision) {
        return Err(format!("dependency '{key}' revision is not up to date"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
    use serin_crds::flux::kustomize::{KustomizationSpec, KustomizationStatus};

    fn ks(ready: bool, observed: i64, revision: &str) -> Arc<Kustomization> {
        let mut ks = Kustomization::new("dep", KustomizationSpec::default());
        ks.metadata.generation = Some(2);
        let condition = Condition {
            type_: "Ready".into(),
            status: if ready { "True" } else { "False" }.into(),
            reason: "R".into(),
            message: String::new(),
            observed_generation: None,
            last_transition_time: Time(jiff::Timestamp::UNIX_EPOCH),
        };
        ks.status = Some(KustomizationStatus {
            observed_generation: Some(observed),
            conditions: vec![condition],
            last_applied_revision: Some(revision.into()),
            ..Default::default()
        });
        Arc::new(ks)
    }

    fn dependency(
        object: Option<Arc<Kustomization>>,
        same_source: bool,
        ready_expr: Option<&str>,
    ) -> Dependency {
        Dependency {
            key: Key::new("ns", "dep"),
            object,
            same_source,
            ready_expr: ready_expr.map(Into::into),
        }
    }

    #[test]
    fn a_dependency_is_ready_only_on_its_own_generation_and_the_needed_revision() {
        let me = ks(true, 2, "r1");
        let check = |d: Dependency| ready(&me, &d, "r1");
        assert_eq!(check(dependency(Some(ks(true, 2, "r1")), true, None)), Ok(()));
        assert_eq!(
            check(dependency(Some(ks(true, 2, "r0")), false, None)),
            Ok(()),
            "another source has other revisions"
        );
        for (d, part) in [
            (dependency(None, true, None), "not found"),
            (dependency(Some(ks(false, 2, "r1")), true, None), "is not ready"),
            (dependency(Some(ks(true, 1, "r1")), true, None), "is not ready"),
            (
                dependency(Some(ks(true, 2, "r0")), true, None),
                "revision is not up to date",
            ),
        ] {
            let words = check(d).unwrap_err();
            assert!(words.contains(part), "{words}");
        }
    }

    #[test]
    fn a_ready_expression_replaces_the_built_in_check() {
        let me = ks(true, 2, "r1");
        let old = || Some(ks(false, 1, "r0"));
        assert_eq!(
            ready(
                &me,
                &dependency(old(), true, Some("dep.status.lastAppliedRevision == 'r0'")),
                "r1"
            ),
            Ok(())
        );
        assert!(
            ready(
                &me,
                &dependency(old(), true, Some("self.status.lastAppliedRevision == 'r0'")),
                "r1"
            )
            .is_err()
        );
    }

    fn observed<'a>(object: &'a Kustomization, refused: &'a [Field]) -> Observed<'a> {
        Observed {
            object,
            refused,
            cycle: None,
            source_name: "GitRepository/ns/app".into(),
            source: Source::Missing,
            dependencies: Vec::new(),
        }
    }

    #[test]
    fn what_cannot_mend_itself_is_stalled_and_the_rest_waits() {
        let me = ks(true, 2, "r1");
        let gate = decide(observed(&me, &[Field::refused("spec.x", "no")]));
        assert!(matches!(
            gate,
            Gate::Stalled {
                reason: "FieldsRefused",
                ..
            }
        ));
        let mut cyclic = observed(&me, &[]);
        cyclic.cycle = Some(vec![
            Key::new("ns", "a"),
            Key::new("ns", "b"),
            Key::new("ns", "a"),
        ]);
        assert!(
            matches!(decide(cyclic), Gate::Stalled { message, .. } if message == "dependency cycle: ns/a -> ns/b -> ns/a")
        );
        let mut cel = observed(&me, &[]);
        cel.dependencies = vec![dependency(None, false, Some("dep.status =="))];
        assert!(matches!(
            decide(cel),
            Gate::Stalled {
                reason: "InvalidCELExpression",
                ..
            }
        ));
        assert!(
            matches!(decide(observed(&me, &[])), Gate::Waiting { reason: "ArtifactFailed", message } if message.contains("not found"))
        );
        let mut empty = observed(&me, &[]);
        empty.source = Source::NoArtifact("branch 'x' not found".into());
        assert!(
            matches!(decide(empty), Gate::Waiting { message, .. } if message.ends_with("artifact not found: branch 'x' not found"))
        );
    }

    #[test]
    fn after_a_start_nothing_is_unsaid_while_the_source_reads_its_artifact_again() {
        let me = ks(true, 2, "r1");
        let mut recovering = observed(&me, &[]);
        recovering.source = Source::Recovering;
        assert!(matches!(decide(recovering), Gate::Quiet));
        let changed = ks(true, 1, "r1");
        let mut recovering = observed(&changed, &[]);
        recovering.source = Source::Recovering;
        assert!(matches!(decide(recovering), Gate::Waiting { .. }));
    }
}
