//! Health and readiness in the user's own words: CEL, as `spec.healthCheckExprs` and `spec.dependsOn[].readyExpr`.

use std::sync::Arc;

use cel::{Context, Program, Value as Cel};
use serde_json::Value;
use serin_crds::flux::kustomize::CustomHealthCheck;

use super::{Health, State};
use crate::key::group_version;

/// One expression, compiled.
#[derive(Clone)]
pub(crate) struct Expression {
    program: Arc<Program>,
    text: String,
}

impl std::fmt::Debug for Expression {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.text)
    }
}

impl Expression {
    /// Compiles; the error is a sentence with the expression in it.
    pub(crate) fn compile(text: &str) -> Result<Self, String> {
        let program = Program::compile(text)
            .map_err(|e| format!("failed to parse the CEL expression '{text}': {e}"))?;
        Ok(Self {
            program: Arc::new(program),
            text: text.to_string(),
        })
    }

    /// Evaluates to true or false with these variables.
    pub(crate) fn holds(&self, variables: &[(&str, &Value)]) -> Result<bool, String> {
        let mut context = Context::default();
        for (name, value) in variables {
            let value = cel::to_value(value).map_err(|e| format!("CEL variable {name}: {e}"))?;
            context.add_variable_from_value(*name, value);
        }
        match self.program.execute(&context) {
            Ok(Cel::Bool(answer)) => Ok(answer),
            Ok(_) => Err(format!("the CEL expression '{}' gives no boolean", self.text)),
            Err(e) => Err(format!(
                "failed to evaluate the CEL expression '{}': {e}",
                self.text
            )),
        }
    }
}

/// The rules of one Kustomization.
#[derive(Debug, Clone, Default)]
pub(crate) struct Rules(Vec<Rule>);

#[derive(Debug, Clone)]
struct Rule {
    group: String,
    /// `None`: every kind of the group.
    kind: Option<String>,
    in_progress: Option<Expression>,
    failed: Option<Expression>,
    current: Expression,
}

impl Rules {
    pub(crate) fn compile(checks: &[CustomHealthCheck]) -> Result<Self, String> {
        let option = |text: &Option<String>| {
            text.as_deref()
                .filter(|t| !t.is_empty())
                .map(Expression::compile)
                .transpose()
        };
        checks
            .iter()
            .map(|check| {
                Ok(Rule {
                    group: group_version(&check.api_version).0.to_string(),
                    kind: check.kind.clone().filter(|k| !k.is_empty()),
                    in_progress: option(&check.in_progress)?,
                    failed: option(&check.failed)?,
                    current: Expression::compile(&check.current)?,
                })
            })
            .collect::<Result<_, _>>()
            .map(Rules)
    }

    /// Judges an object by the rule for its kind; `None` if there is none. A rule for the kind beats one for the group.
    /// An expression that cannot be evaluated yet (the status has no such field) does not hold.
    pub(crate) fn assess(&self, object: &Value) -> Option<Health> {
        let group = object["apiVersion"].as_str().map_or("", |v| group_version(v).0);
        let kind = object["kind"].as_str().unwrap_or_default();
        let of_group = |rule: &&Rule| rule.group == group;
        let rule = self
            .0
            .iter()
            .filter(of_group)
            .find(|r| r.kind.as_deref() == Some(kind))
            .or_else(|| self.0.iter().filter(of_group).find(|r| r.kind.is_none()))?;
        if object
            .pointer("/metadata/deletionTimestamp")
            .is_some_and(|v| !v.is_null())
        {
            return Some(Health::new(State::Terminating, "being deleted"));
        }
        if let Some(early) = super::generic(object).filter(|h| h.message.starts_with("generation")) {
            return Some(early);
        }
        let variables: Vec<(&str, &Value)> =
            object.as_object()?.iter().map(|(k, v)| (k.as_str(), v)).collect();
        let holds = |expression: &Expression| expression.holds(&variables).unwrap_or(false);
        if rule.in_progress.as_ref().is_some_and(holds) {
            return Some(Health::progress("in progress by spec.healthCheckExprs"));
        }
        if rule.failed.as_ref().is_some_and(holds) {
            return Some(Health::failed("failed by spec.healthCheckExprs"));
        }
        if holds(&rule.current) {
            return Some(Health::current());
        }
        Some(Health::progress("not current by spec.healthCheckExprs"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn check(kind: Option<&str>, current: &str) -> CustomHealthCheck {
        CustomHealthCheck {
            api_version: "example.com/v1".into(),
            kind: kind.map(Into::into),
            in_progress: Some("status.phase == 'Working'".into()),
            failed: Some("status.phase == 'Broken'".into()),
            current: current.into(),
        }
    }

    #[test]
    fn expressions_judge_in_the_order_in_progress_failed_current() {
        let rules = Rules::compile(&[
            check(Some("Thing"), "status.phase == 'Done'"),
            check(None, "true"),
        ])
        .unwrap();
        let thing = |kind: &str, phase: &str| json!({"apiVersion": "example.com/v2", "kind": kind, "status": {"phase": phase}});
        let state = |object: &Value| rules.assess(object).map(|h| h.state);
        assert_eq!(state(&thing("Thing", "Working")), Some(State::InProgress));
        assert_eq!(state(&thing("Thing", "Broken")), Some(State::Failed));
        assert_eq!(state(&thing("Thing", "Done")), Some(State::Current));
        assert_eq!(state(&thing("Thing", "Other")), Some(State::InProgress));
        assert_eq!(
            state(&thing("Another", "Other")),
            Some(State::Current),
            "the rule for the whole group"
        );
        assert_eq!(
            state(&json!({"apiVersion": "example.com/v1", "kind": "Thing"})),
            Some(State::InProgress),
            "no status yet"
        );
        assert_eq!(
            state(&json!({"apiVersion": "other.com/v1", "kind": "Thing"})),
            None
        );
    }

    #[test]
    fn a_bad_expression_is_quoted() {
        assert!(
            Rules::compile(&[check(None, "status.phase ==")])
                .unwrap_err()
                .contains("'status.phase =='")
        );
    }
}
