//! JWT authentication: which tokens a request needs, where they are, and what becomes of their claims.
//!
//! [`JwtAuthn`] is the compiled filter: rules by path, each with a [`Requirement`]; a [`Provider`] says what its tokens are
//! like. [`token`] reads, [`keys`] verifies, [`jwks`] keeps the issuers' keys. Verification is pure; the caller brings keys and
//! time.

pub mod jwks;
pub mod keys;
mod places;
mod provider;
mod requirement;
pub mod token;

use std::sync::Arc;

use serin_xds::pb::envoy::extensions::filters::http::jwt_authn::v3 as jwt;

pub use self::places::{Found, Place, Places};
pub use self::provider::Provider;
pub use self::requirement::{Instead, Requirement};

use self::token::Token;
use super::stats::Counter;
use crate::config::convert::{each, required};
use crate::config::matchers::RequestView;
use crate::config::route::{Context, RouteFacts, RouteMatch};
use crate::config::runtime::Runtime;
use crate::error::{Refusal, Within};

/// Namespace of payloads.
pub const NAMESPACE: &str = "envoy.filters.http.jwt_authn";

/// The compiled filter.
#[derive(Debug)]
pub struct JwtAuthn {
    /// Providers, by index.
    pub providers: Box<[Arc<Provider>]>,
    /// Where any of them looks for tokens.
    pub places: Places,
    rules: Box<[Rule]>,
    named: Box<[(Box<str>, Requirement)]>,
    by_state: Option<StateRules>,
    /// CORS preflights pass.
    pub bypass_preflight: bool,
    /// Denials say nothing.
    pub strip_failure: bool,
    /// How many requests passed.
    pub allowed: Arc<Counter>,
    /// How many were denied.
    pub denied: Arc<Counter>,
    /// How many preflights were let through.
    pub bypassed: Arc<Counter>,
}

#[derive(Debug)]
struct Rule {
    matches: RouteMatch,
    /// `None` asks for nothing.
    requirement: Option<Requirement>,
}

/// What a route says about the filter.
#[derive(Debug)]
pub enum PerRouteJwt {
    /// Nothing is asked for.
    Disabled,
    /// The requirement of that name.
    Named(Box<str>),
}

impl PerRouteJwt {
    /// Compiles the message.
    pub(crate) fn compile(from: &jwt::PerRouteConfig) -> Result<Self, Refusal> {
        use jwt::per_route_config::RequirementSpecifier;
        match &from.requirement_specifier {
            Some(RequirementSpecifier::Disabled(true)) => Ok(Self::Disabled),
            Some(RequirementSpecifier::Disabled(false)) => Err(Refusal::new("disabled", "must be true")),
            Some(RequirementSpecifier::RequirementName(name)) => Ok(Self::Named(name.as_str().into())),
            None => Err(Refusal::new("requirement_specifier", "is missing")),
        }
    }
}

impl JwtAuthn {
    /// Compiles the message.
    pub(crate) fn compile(
        from: &jwt::JwtAuthentication,
        prefix: &str,
        context: &mut Context<'_>,
    ) -> Result<Self, Refusal> {
        let mut names: Vec<&String> = from.providers.keys().collect();
        names.sort_unstable();
        let providers = names
            .iter()
            .map(|name| {
                Provider::compile(name, &from.providers[*name], context)
                    .map(Arc::new)
                    .within(format!("providers[{name:?}]"))
            })
            .collect::<Result<Box<[_]>, _>>()?;
        let mut named_keys: Vec<&String> = from.requirement_map.keys().collect();
        named_keys.sort_unstable();
        let named = named_keys
            .into_iter()
            .map(|name| {
                Requirement::compile(&from.requirement_map[name], &names)
                    .map(|requirement| (name.as_str().into(), requirement))
                    .within(format!("requirement_map[{name:?}]"))
            })
            .collect::<Result<_, _>>()?;
        let runtime = &mut context.slots.runtime;
        let rules = each(&from.rules, "rules", |rule| {
            Rule::compile(rule, from, &names, runtime)
        })?;
        let by_state = from
            .filter_state_rules
            .as_ref()
            .map(|rules| StateRules::compile(rules, &names).within("filter_state_rules"))
            .transpose()?;
        let (workers, registry) = context.counters();
        let labels = [
            ("envoy_http_conn_manager_prefix", prefix),
            ("prefix", from.stat_prefix.as_str()),
        ];
        Ok(Self {
            by_state,
            places: Places::compile(names.iter().map(|name| &from.providers[*name]).enumerate())?,
            providers,
            rules,
            named,
            bypass_preflight: from.bypass_cors_preflight,
            strip_failure: from.strip_failure_response,
            allowed: registry.counter(workers, "envoy_http_jwt_authn_allowed", &labels),
            denied: registry.counter(workers, "envoy_http_jwt_authn_denied", &labels),
            bypassed: registry.counter(workers, "envoy_http_jwt_authn_cors_preflight_bypassed", &labels),
        })
    }

    /// What a request must bring, by the first rule that matches it, else by what the filter state says.
    pub fn requirement(
        &self,
        request: &RequestView<'_>,
        facts: &RouteFacts<'_>,
        random: &impl Fn() -> u64,
    ) -> Option<&Requirement> {
        let rule = self
            .rules
            .iter()
            .find(|rule| rule.matches.test_with(request, facts, random));
        if let Some(rule) = rule {
            return rule.requirement.as_ref();
        }
        let rules = self.by_state.as_ref()?;
        let wanted = facts.metadata?.state.get(&rules.key)?;
        rules
            .requirements
            .iter()
            .find(|(value, _)| **value == *wanted)
            .map(|(_, requirement)| requirement)
    }

    /// Whose token it is: the provider of its issuer, else one for any issuer.
    pub fn provider_of(&self, token: &Token) -> Option<&Arc<Provider>> {
        let of = |issuer: &str| self.providers.iter().find(|provider| *provider.issuer == *issuer);
        of(token.issuer()).or_else(|| of(""))
    }

    /// The requirement that a route names. A route that names one that does not exist denies the request.
    pub fn named(&self, name: &str) -> Option<&Requirement> {
        self.named
            .iter()
            .find(|(own, _)| **own == *name)
            .map(|(_, requirement)| requirement)
    }
}

/// `filter_state_rules`: the text of an object chooses what a request must bring.
#[derive(Debug)]
struct StateRules {
    key: Box<str>,
    requirements: Box<[(Box<str>, Requirement)]>,
}

impl StateRules {
    fn compile(from: &jwt::FilterStateRule, providers: &[&String]) -> Result<Self, Refusal> {
        if from.name.is_empty() {
            return Err(Refusal::new("name", "is missing"));
        }
        let mut values: Vec<&String> = from.requires.keys().collect();
        values.sort_unstable();
        let requirements = values
            .into_iter()
            .map(|value| {
                let requirement = Requirement::compile(&from.requires[value], providers)
                    .within(format!("requires[{value:?}]"))?;
                Ok((value.as_str().into(), requirement))
            })
            .collect::<Result<_, Refusal>>()?;
        Ok(Self {
            key: from.name.as_str().into(),
            requirements,
        })
    }
}

impl Rule {
    fn compile(
        from: &jwt::RequirementRule,
        all: &jwt::JwtAuthentication,
        providers: &[&String],
        runtime: &mut Runtime,
    ) -> Result<Self, Refusal> {
        use jwt::requirement_rule::RequirementType;
        let matches = required(from.r#match.as_ref(), "match")?;
        let requirement = match &from.requirement_type {
            None => None,
            Some(RequirementType::Requires(requirement)) if requirement.requires_type.is_none() => None,
            Some(RequirementType::Requires(requirement)) => {
                Some(Requirement::compile(requirement, providers).within("requires")?)
            }
            Some(RequirementType::RequirementName(name)) => {
                let requirement = all.requirement_map.get(name).ok_or_else(|| {
                    Refusal::new("requirement_name", format!("there is no requirement {name:?}"))
                })?;
                Some(Requirement::compile(requirement, providers).within("requirement_name")?)
            }
        };
        Ok(Self {
            matches: RouteMatch::compile(matches, runtime).within("match")?,
            requirement,
        })
    }
}

#[cfg(test)]
mod tests;
