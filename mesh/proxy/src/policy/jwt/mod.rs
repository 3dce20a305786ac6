//! JWT authentication: which tokens a request needs, where they are, and what becomes of their claims.
//!
//! [`JwtAuthn`] is the compiled filter: rules by path, each with a [`Requirement`]. [`token`] reads, [`keys`] verifies,
//! [`jwks`] keeps the issuers' keys. Verification is pure; the caller brings keys and time.

pub mod jwks;
pub mod keys;
pub mod token;

use std::sync::Arc;

use base64::Engine;
use base64::engine::general_purpose::{URL_SAFE, URL_SAFE_NO_PAD};
use http::{HeaderMap, HeaderName, HeaderValue, header};
use parking_lot::Mutex;
use serde_json::Value;
use serin_xds::pb::envoy::extensions::filters::http::jwt_authn::v3 as jwt;

use self::jwks::Source;
use self::keys::KeySet;
use self::token::{Failure, Token};
use super::metadata::{Metadata, of_json};
use super::stats::Counter;
use crate::config::convert;
use crate::config::matchers::{RequestView, StringMatch};
use crate::config::route::{Context, RouteFacts, RouteMatch};
use crate::config::runtime::Runtime;
use crate::error::{Refusal, Within};

/// Namespace of payloads.
pub const NAMESPACE: &str = "envoy.filters.http.jwt_authn";
/// Envoy's allowance for clocks that differ, in seconds.
const DEFAULT_SKEW: u32 = 60;
/// Envoy's number of cached tokens, and the size up to which they are cached.
const CACHE_TOKENS: u32 = 100;
const CACHE_BYTES: u32 = 4096;
/// Tokens that one request may bring for a provider.
const MAX_TOKENS: usize = 8;

/// The compiled filter.
#[derive(Debug)]
pub struct JwtAuthn {
    /// Providers, by index.
    pub providers: Box<[Arc<Provider>]>,
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

/// What a request must bring.
#[derive(Debug)]
pub enum Requirement {
    /// A token of a provider, for one of these audiences where they are not the provider's own.
    Provider(usize, Option<Box<[Box<str>]>>),
    /// One of these.
    Any(Box<[Requirement]>),
    /// All of these.
    All(Box<[Requirement]>),
    /// No token, or a good one.
    AllowMissing,
    /// Anything; good tokens are used.
    AllowMissingOrFailed,
}

/// Who issues tokens.
#[derive(Debug)]
pub struct Provider {
    /// Its name.
    pub name: Box<str>,
    /// Its issuer; empty for any.
    pub issuer: Box<str>,
    audiences: Box<[Box<str>]>,
    subjects: Option<StringMatch>,
    require_expiration: bool,
    max_lifetime_s: Option<u64>,
    /// Its keys.
    pub source: Source,
    forward: bool,
    headers: Box<[(HeaderName, Box<str>)]>,
    parameters: Box<[Box<str>]>,
    cookies: Box<[Box<str>]>,
    forward_payload: Option<(HeaderName, bool)>,
    claims: Box<[(HeaderName, Box<[Box<str>]>)]>,
    payload_in_metadata: Box<str>,
    header_in_metadata: Box<str>,
    failure_in_metadata: Box<str>,
    space_delimited: Box<[Box<str>]>,
    skew_s: u64,
    /// The route is searched again once claims have become fields.
    pub clear_route: bool,
    cache: Option<Cache>,
}

type Verified = std::collections::HashMap<Box<str>, (Arc<Token>, Arc<KeySet>), foldhash::fast::RandomState>;

/// Tokens whose signature was verified, and with which keys, by their text.
#[derive(Debug)]
struct Cache {
    tokens: Mutex<Verified>,
    size: usize,
    max_bytes: usize,
}

/// A token found in a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// Its text.
    pub text: String,
    /// Where it was.
    pub place: Place,
}

/// Where a token was.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// In that field.
    Header(HeaderName),
    /// In that query parameter.
    Parameter(Box<str>),
    /// In that cookie.
    Cookie,
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
        let rules = from
            .rules
            .iter()
            .enumerate()
            .map(|(index, rule)| {
                Rule::compile(rule, from, &names, &mut context.slots.runtime)
                    .within(format!("rules[{index}]"))
            })
            .collect::<Result<_, _>>()?;
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
        let matches = from
            .r#match
            .as_ref()
            .ok_or_else(|| Refusal::new("match", "is missing"))?;
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

impl Requirement {
    fn compile(from: &jwt::JwtRequirement, providers: &[&String]) -> Result<Self, Refusal> {
        use jwt::jwt_requirement::RequiresType;
        let provider = |name: &String| {
            providers
                .iter()
                .position(|own| *own == name)
                .ok_or_else(|| Refusal::new("provider_name", format!("there is no provider {name:?}")))
        };
        let list = |list: &[jwt::JwtRequirement], field: &str| {
            list.iter()
                .enumerate()
                .map(|(index, inner)| {
                    Self::compile(inner, providers).within(format!("{field}.requirements[{index}]"))
                })
                .collect::<Result<Box<[_]>, _>>()
        };
        match &from.requires_type {
            None => Err(Refusal::new("requires_type", "is missing")),
            Some(RequiresType::ProviderName(name)) => Ok(Self::Provider(provider(name)?, None)),
            Some(RequiresType::ProviderAndAudiences(both)) => Ok(Self::Provider(
                provider(&both.provider_name).within("provider_and_audiences")?,
                Some(
                    both.audiences
                        .iter()
                        .map(|audience| audience.as_str().into())
                        .collect(),
                ),
            )),
            Some(RequiresType::RequiresAny(any)) => Ok(Self::Any(list(&any.requirements, "requires_any")?)),
            Some(RequiresType::RequiresAll(all)) => Ok(Self::All(list(&all.requirements, "requires_all")?)),
            Some(RequiresType::AllowMissing(_)) => Ok(Self::AllowMissing),
            Some(RequiresType::AllowMissingOrFailed(_)) => Ok(Self::AllowMissingOrFailed),
            Some(RequiresType::ExtractOnlyWithoutValidation(_)) => Err(Refusal::new(
                "extract_only_without_validation",
                "not supported: claims that nobody verified would look like those that were",
            )),
        }
    }
}

fn header_name(text: &str, field: &str) -> Result<HeaderName, Refusal> {
    HeaderName::from_bytes(text.as_bytes())
        .map_err(|_| Refusal::new(field, format!("{text:?} is not a header name")))
}

impl Provider {
    fn compile(name: &str, from: &jwt::JwtProvider, context: &mut Context<'_>) -> Result<Self, Refusal> {
        let texts = |list: &[String]| {
            list.iter()
                .map(|text| text.as_str().into())
                .collect::<Box<[Box<str>]>>()
        };
        let mut headers: Vec<(HeaderName, Box<str>)> = from
            .from_headers
            .iter()
            .map(|header| {
                Ok((
                    header_name(&header.name, "from_headers")?,
                    header.value_prefix.as_str().into(),
                ))
            })
            .collect::<Result<_, Refusal>>()?;
        let mut parameters = texts(&from.from_params);
        let cookies = texts(&from.from_cookies);
        if headers.is_empty() && parameters.is_empty() && cookies.is_empty() {
            headers.push((header::AUTHORIZATION, "Bearer ".into()));
            parameters = Box::new(["access_token".into()]);
        }
        let claims = from
            .claim_to_headers
            .iter()
            .enumerate()
            .map(|(index, claim)| {
                let path: Box<[Box<str>]> = if claim.claim_path.is_empty() {
                    claim.claim_name.split('.').map(Into::into).collect()
                } else {
                    claim
                        .claim_path
                        .iter()
                        .map(|segment| segment.key.as_str().into())
                        .collect()
                };
                Ok((
                    header_name(&claim.header_name, &format!("claim_to_headers[{index}]"))?,
                    path,
                ))
            })
            .collect::<Result<_, Refusal>>()?;
        let cache = from.jwt_cache_config.as_ref().map(|config| {
            let or = |value: u32, default: u32| if value == 0 { default } else { value } as usize;
            Cache {
                tokens: Mutex::default(),
                size: or(config.jwt_cache_size, CACHE_TOKENS).min(100_000),
                max_bytes: or(config.jwt_max_token_size, CACHE_BYTES),
            }
        });
        Ok(Self {
            name: name.into(),
            issuer: from.issuer.as_str().into(),
            audiences: texts(&from.audiences),
            subjects: from
                .subjects
                .as_ref()
                .map(StringMatch::compile)
                .transpose()
                .within("subjects")?,
            require_expiration: from.require_expiration,
            max_lifetime_s: convert::timeout(from.max_lifetime.as_ref())
                .within("max_lifetime")?
                .map(|limit| limit.as_secs()),
            source: Source::compile(from.jwks_source_specifier.as_ref(), name, context)?,
            forward: from.forward,
            headers: headers.into(),
            parameters,
            cookies,
            forward_payload: match from.forward_payload_header.as_str() {
                "" => None,
                name => Some((
                    header_name(name, "forward_payload_header")?,
                    from.pad_forward_payload_header,
                )),
            },
            claims,
            payload_in_metadata: from.payload_in_metadata.as_str().into(),
            header_in_metadata: from.header_in_metadata.as_str().into(),
            failure_in_metadata: from.failed_status_in_metadata.as_str().into(),
            space_delimited: from
                .normalize_payload_in_metadata
                .as_ref()
                .map_or_else(Box::default, |normalize| texts(&normalize.space_delimited_claims)),
            skew_s: u64::from(if from.clock_skew_seconds == 0 {
                DEFAULT_SKEW
            } else {
                from.clock_skew_seconds
            }),
            clear_route: from.clear_route_cache,
            cache,
        })
    }

    /// Fields that only this filter may set: a client's are taken off before.
    pub fn sanitize(&self, headers: &mut HeaderMap) {
        if let Some((name, _)) = &self.forward_payload {
            headers.remove(name);
        }
        for (name, _) in &self.claims {
            headers.remove(name);
        }
    }

    /// The tokens that a request brings for this provider.
    pub fn extract(&self, headers: &HeaderMap, query: Option<&str>) -> Vec<Found> {
        let mut out = Vec::new();
        for (name, prefix) in &self.headers {
            for value in headers.get_all(name) {
                let Ok(text) = value.to_str() else { continue };
                let token = match text.find(&**prefix) {
                    _ if prefix.is_empty() => text.trim(),
                    Some(at) => {
                        let rest = text[at + prefix.len()..].trim_start();
                        let end = rest
                            .find(|char: char| !(char.is_ascii_alphanumeric() || "-_.=".contains(char)))
                            .unwrap_or(rest.len());
                        &rest[..end]
                    }
                    None => continue,
                };
                if !token.is_empty() {
                    out.push(Found {
                        text: token.to_owned(),
                        place: Place::Header(name.clone()),
                    });
                }
            }
        }
        for (name, value) in query.into_iter().flat_map(pairs) {
            if self.parameters.iter().any(|parameter| **parameter == *name) && !value.is_empty() {
                out.push(Found {
                    text: value.to_owned(),
                    place: Place::Parameter(name.into()),
                });
            }
        }
        if !self.cookies.is_empty() {
            let all = headers
                .get_all(header::COOKIE)
                .iter()
                .filter_map(|value| value.to_str().ok());
            for (name, value) in all
                .flat_map(|text| text.split(';'))
                .filter_map(|pair| pair.trim().split_once('='))
            {
                if self.cookies.iter().any(|cookie| **cookie == *name) {
                    out.push(Found {
                        text: value.trim_matches('"').to_owned(),
                        place: Place::Cookie,
                    });
                }
            }
        }
        out.truncate(MAX_TOKENS);
        out
    }

    /// Reads a token and checks everything but its signature. Keys with which the signature was verified before are
    /// returned as well.
    pub fn read(
        &self,
        text: &str,
        audiences: Option<&[Box<str>]>,
        now_s: u64,
    ) -> Result<(Arc<Token>, Option<Arc<KeySet>>), Failure> {
        let cached = self
            .cache
            .as_ref()
            .and_then(|cache| cache.tokens.lock().get(text).cloned());
        let (token, verified) = match cached {
            Some((token, keys)) => (token, Some(keys)),
            None => (Arc::new(Token::parse(text)?), None),
        };
        if !self.issuer.is_empty() && token.issuer() != &*self.issuer {
            return Err(Failure::UnknownIssuer);
        }
        token.check_time(now_s, self.skew_s)?;
        if self.require_expiration && token.time("exp").is_none() {
            return Err(Failure::NoExpiration);
        }
        if let Some(limit) = self.max_lifetime_s {
            let from = token.time("nbf").or(token.time("iat")).unwrap_or(now_s);
            let until = token.time("exp").ok_or(Failure::NoExpiration)?;
            if until.saturating_sub(from) > limit {
                return Err(Failure::Lifetime);
            }
        }
        if let Some(subjects) = &self.subjects
            && !subjects.matches(token.subject())
        {
            return Err(Failure::Subject);
        }
        token.check_audience(audiences.unwrap_or(&self.audiences))?;
        Ok((token, verified))
    }

    /// Verifies a token's signature, unless these very keys did before, and remembers it if it is good.
    pub fn verify(
        &self,
        text: &str,
        token: &Arc<Token>,
        verified: Option<&Arc<KeySet>>,
        keys: &Arc<KeySet>,
    ) -> Result<(), Failure> {
        if verified.is_some_and(|before| Arc::ptr_eq(before, keys)) {
            return Ok(());
        }
        token.check_signature(keys)?;
        if let Some(cache) = &self.cache
            && text.len() <= cache.max_bytes
        {
            let mut tokens = cache.tokens.lock();
            if tokens.len() >= cache.size {
                // Which one goes does not matter much: a token that is used comes back with its next request.
                let any = tokens.keys().next().cloned();
                if let Some(any) = any {
                    tokens.remove(&any);
                }
            }
            tokens.insert(text.into(), (token.clone(), keys.clone()));
        }
        Ok(())
    }

    /// Makes of a good token what the provider says: fields, metadata, and its removal from the request. A new query,
    /// if the token was taken out of it, is returned.
    pub fn accept(
        &self,
        token: &Token,
        place: &Place,
        headers: &mut HeaderMap,
        query: Option<&str>,
        metadata: &mut Metadata,
    ) -> Option<String> {
        for (name, path) in &self.claims {
            if let Some(value) = token.claim(path).and_then(field_value) {
                headers.insert(name, value);
            }
        }
        if let Some((name, pad)) = &self.forward_payload {
            let bytes = URL_SAFE_NO_PAD
                .decode(token.payload.trim_end_matches('='))
                .unwrap_or_default();
            let text = if *pad {
                URL_SAFE.encode(bytes)
            } else {
                URL_SAFE_NO_PAD.encode(bytes)
            };
            if let Ok(value) = HeaderValue::from_str(&text) {
                headers.insert(name, value);
            }
        }
        if !self.payload_in_metadata.is_empty() {
            let mut claims = token.claims.clone();
            for name in &self.space_delimited {
                if let Some(claim) = claims.get_mut(&**name)
                    && let Some(text) = claim.as_str()
                {
                    *claim = text
                        .split_ascii_whitespace()
                        .map(|part| Value::from(part.to_owned()))
                        .collect();
                }
            }
            metadata.set(
                NAMESPACE,
                &self.payload_in_metadata,
                of_json(&Value::Object(claims)),
            );
        }
        if !self.header_in_metadata.is_empty() {
            metadata.set(
                NAMESPACE,
                &self.header_in_metadata,
                of_json(&Value::Object(token.header.clone())),
            );
        }
        if self.forward {
            return None;
        }
        match place {
            Place::Header(name) => {
                headers.remove(name);
                None
            }
            Place::Parameter(name) => query.map(|query| {
                let kept: Vec<&str> = query
                    .split('&')
                    .filter(|pair| pair.split_once('=').map_or(*pair, |(key, _)| key) != &**name)
                    .collect();
                kept.join("&")
            }),
            // As in Envoy: the other cookies of the field stay, and with them this one.
            Place::Cookie => None,
        }
    }

    /// Writes down why a token was not accepted, where the provider asks for it.
    pub fn note_failure(&self, failure: Failure, metadata: &mut Metadata) {
        if !self.failure_in_metadata.is_empty() {
            let status = serde_json::json!({ "code": 16, "message": failure.to_string() });
            metadata.set(NAMESPACE, &self.failure_in_metadata, of_json(&status));
        }
    }
}

fn pairs(query: &str) -> impl Iterator<Item = (&str, &str)> {
    query.split('&').filter_map(|pair| pair.split_once('='))
}

/// A claim as a field's value: texts, numbers and truth values as they are, everything else as base64url of its JSON.
fn field_value(claim: &Value) -> Option<HeaderValue> {
    let text = match claim {
        Value::Null => return None,
        Value::String(text) => text.clone(),
        Value::Bool(_) | Value::Number(_) => claim.to_string(),
        Value::Array(_) | Value::Object(_) => URL_SAFE_NO_PAD.encode(claim.to_string()),
    };
    HeaderValue::from_str(&text).ok()
}

#[cfg(test)]
mod tests;
