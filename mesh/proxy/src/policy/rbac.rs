//! Role-based access control: who may do what, as Envoy's `RBAC` message says it.
//!
//! A policy matches if any of its permissions and any of its principals do, and its condition holds. Policies are asked in the order of their
//! names. ALLOW lets through what a policy matches, DENY what none does, LOG everything and tells the access log. Shadow
//! rules are judged and counted, never enforced. A denial names its policy, which in a mesh names the rule
//! (`ns[a]-policy[b]-rule[0]`). Instead of policies there may be a matcher `tree`, whose actions have names.
//!
//! [`Engine`] judges policies, `tree` a matcher tree; `rules` is the filter that asks them.

mod permission;
mod principal;
mod rules;
mod tree;

use std::sync::Arc;

use serin_xds::pb::envoy::config::rbac::v3 as rbac;
use serin_xds::pb::envoy::r#type::matcher::v3::PathMatcher;
use serin_xds::pb::envoy::r#type::matcher::v3::path_matcher::Rule as PathRule;

pub use self::rules::Rules;

use self::permission::Permission;
use self::principal::Principal;
use super::cel::Expression;
use super::facts::Facts;
use super::metadata::MetadataMatch;
use crate::config::convert::{each, required};
use crate::config::matchers::StringMatch;
use crate::error::{Refusal, Within};

/// Namespace of what shadow rules say.
pub const NAMESPACE: &str = "envoy.filters.http.rbac";
/// The same for network filters.
pub const NETWORK_NAMESPACE: &str = "envoy.filters.network.rbac";

/// What a match means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// What matches passes.
    Allow,
    /// What matches is denied.
    Deny,
    /// Everything passes; what matches is to be logged.
    Log,
}

/// A compiled `RBAC` message.
#[derive(Debug)]
pub struct Engine {
    action: Action,
    policies: Box<[Policy]>,
}

#[derive(Debug)]
struct Policy {
    name: Arc<str>,
    permissions: Box<[Permission]>,
    principals: Box<[Principal]>,
    condition: Option<Expression>,
}

/// What an engine says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    /// Whether the request passes.
    pub allowed: bool,
    /// The policy that matched, or the action of a matcher tree.
    pub policy: Option<Arc<str>>,
    /// Whether the request is to be logged, where that was asked.
    pub logged: Option<bool>,
}

impl Engine {
    /// Compiles the message.
    pub(crate) fn compile(from: &rbac::Rbac) -> Result<Self, Refusal> {
        let action = match rbac::rbac::Action::try_from(from.action) {
            Ok(rbac::rbac::Action::Allow) => Action::Allow,
            Ok(rbac::rbac::Action::Deny) => Action::Deny,
            Ok(rbac::rbac::Action::Log) => Action::Log,
            Err(_) => return Err(Refusal::new("action", format!("{} is unknown", from.action))),
        };
        // Loggers that may be left out are.
        if from.audit_logging_options.as_ref().is_some_and(|options| {
            options.audit_condition != 0 && options.logger_configs.iter().any(|one| !one.is_optional)
        }) {
            return Err(Refusal::new(
                "audit_logging_options",
                "audit loggers are not supported",
            ));
        }
        let mut names: Vec<_> = from.policies.keys().collect();
        names.sort_unstable();
        let policies = names
            .into_iter()
            .map(|name| Policy::compile(name, &from.policies[name]).within(format!("policies[{name:?}]")))
            .collect::<Result<_, _>>()?;
        Ok(Self { action, policies })
    }

    /// What a match means here.
    pub fn action(&self) -> Action {
        self.action
    }

    /// Judges.
    pub fn judge(&self, facts: &Facts<'_>) -> Decision {
        let policy = self.policies.iter().find(|policy| policy.matches(facts));
        let matched = policy.is_some();
        Decision {
            allowed: match self.action {
                Action::Allow => matched,
                Action::Deny => !matched,
                Action::Log => true,
            },
            policy: policy.map(|policy| policy.name.clone()),
            logged: (self.action == Action::Log).then_some(matched),
        }
    }
}

impl Policy {
    fn compile(name: &str, from: &rbac::Policy) -> Result<Self, Refusal> {
        // Conversions and joined texts are always there.
        if from
            .cel_config
            .as_ref()
            .is_some_and(|config| config.enable_string_functions)
        {
            return Err(Refusal::new(
                "cel_config.enable_string_functions",
                "not supported",
            ));
        }
        let checked = from.checked_condition.as_ref();
        let condition = match (&from.condition, checked) {
            (Some(expression), _) => Some(("condition", expression)),
            (None, Some(checked)) => match &checked.expr {
                Some(expression) => Some(("checked_condition", expression)),
                None => return Err(Refusal::new("checked_condition.expr", "is missing")),
            },
            (None, None) => None,
        };
        Ok(Self {
            name: name.into(),
            permissions: each(&from.permissions, "permissions", Permission::compile)?,
            principals: each(&from.principals, "principals", Principal::compile)?,
            condition: condition
                .map(|(field, expression)| Expression::of_message(expression, None).within(field))
                .transpose()?,
        })
    }

    fn matches(&self, facts: &Facts<'_>) -> bool {
        self.permissions
            .iter()
            .any(|permission| permission.matches(facts))
            && self.principals.iter().any(|principal| principal.matches(facts))
            && self
                .condition
                .as_ref()
                .is_none_or(|condition| condition.holds(facts))
    }
}

fn path_match(from: &PathMatcher) -> Result<StringMatch, Refusal> {
    let PathRule::Path(path) = required(from.rule.as_ref(), "url_path.path")?;
    StringMatch::compile(path).within("url_path.path")
}

fn sourced(from: &rbac::SourcedMetadata) -> Result<MetadataMatch, Refusal> {
    if from.metadata_source != rbac::MetadataSource::Dynamic as i32 {
        return Err(Refusal::new(
            "sourced_metadata.metadata_source",
            "only dynamic metadata is supported",
        ));
    }
    let message = required(
        from.metadata_matcher.as_ref(),
        "sourced_metadata.metadata_matcher",
    )?;
    MetadataMatch::compile(message).within("sourced_metadata.metadata_matcher")
}

#[cfg(test)]
mod tests;
