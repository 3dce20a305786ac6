//! An issuer of tokens: what it asks of them, and what becomes of a good one.

use std::collections::HashMap;
use std::sync::Arc;

use base64::Engine;
use base64::engine::general_purpose::{URL_SAFE, URL_SAFE_NO_PAD};
use http::{HeaderMap, HeaderName, HeaderValue};
use parking_lot::Mutex;
use serde_json::Value;
use serin_xds::pb::envoy::extensions::filters::http::jwt_authn::v3 as jwt;

use super::NAMESPACE;
use super::jwks::Source;
use super::keys::KeySet;
use super::places::{Place, Places};
use super::token::{Failure, Token};
use crate::config::convert::{self, each};
use crate::config::matchers::StringMatch;
use crate::config::route::Context;
use crate::error::{Refusal, Within};
use crate::policy::metadata::{Metadata, of_json};

/// Envoy's allowance for clocks that differ, in seconds.
const DEFAULT_SKEW: u32 = 60;
/// Envoy's number of cached tokens, and the size up to which they are cached.
const CACHE_TOKENS: u32 = 100;
const CACHE_BYTES: u32 = 4096;
/// Tokens that a provider may cache, whatever it asks for.
const MAX_CACHE_TOKENS: usize = 100_000;

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
    /// What may be left of a token's life.
    max_lifetime_s: Option<u64>,
    /// Its keys.
    pub source: Source,
    /// Whether its tokens stay in the request.
    pub forward: bool,
    /// Where its tokens are.
    pub places: Places,
    forward_payload: Option<ForwardPayload>,
    claims: Box<[ClaimField]>,
    payload_in_metadata: Box<str>,
    header_in_metadata: Box<str>,
    failure_in_metadata: Box<str>,
    space_delimited: Box<[Box<str>]>,
    skew_s: u64,
    /// The route is searched again once claims have become fields.
    pub clear_route: bool,
    cache: Option<Cache>,
}

/// `forward_payload_header`.
#[derive(Debug)]
struct ForwardPayload {
    name: HeaderName,
    /// base64url with padding (`pad_forward_payload_header`).
    padded: bool,
}

/// `claim_to_headers`: a claim that becomes a field.
#[derive(Debug)]
struct ClaimField {
    name: HeaderName,
    path: Box<[Box<str>]>,
}

type Verified = HashMap<Box<str>, (Arc<Token>, Arc<KeySet>), foldhash::fast::RandomState>;

/// Tokens whose signature was verified, and with which keys, by their text.
#[derive(Debug)]
struct Cache {
    tokens: Mutex<Verified>,
    size: usize,
    max_bytes: usize,
}

impl ClaimField {
    fn compile(from: &jwt::JwtClaimToHeader) -> Result<Self, Refusal> {
        let path = if from.claim_path.is_empty() {
            from.claim_name.split('.').map(Into::into).collect()
        } else {
            from.claim_path
                .iter()
                .map(|segment| segment.key.as_str().into())
                .collect()
        };
        Ok(Self {
            name: header_name(&from.header_name)?,
            path,
        })
    }
}

impl Cache {
    fn new(from: &jwt::JwtCacheConfig) -> Self {
        let or = |value: u32, default: u32| if value == 0 { default } else { value } as usize;
        Self {
            tokens: Mutex::default(),
            size: or(from.jwt_cache_size, CACHE_TOKENS).min(MAX_CACHE_TOKENS),
            max_bytes: or(from.jwt_max_token_size, CACHE_BYTES),
        }
    }

    fn find(&self, text: &str) -> Option<(Arc<Token>, Arc<KeySet>)> {
        self.tokens.lock().get(text).cloned()
    }

    fn keep(&self, text: &str, token: &Arc<Token>, keys: &Arc<KeySet>) {
        if text.len() > self.max_bytes {
            return;
        }
        let mut tokens = self.tokens.lock();
        if tokens.len() >= self.size {
            // Which one goes does not matter much: a token that is used comes back with its next request.
            let any = tokens.keys().next().cloned();
            if let Some(any) = any {
                tokens.remove(&any);
            }
        }
        tokens.insert(text.into(), (token.clone(), keys.clone()));
    }
}

impl Provider {
    pub(super) fn compile(
        name: &str,
        from: &jwt::JwtProvider,
        context: &mut Context<'_>,
    ) -> Result<Self, Refusal> {
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
            places: Places::compile(std::iter::once((0, from)))?,
            forward_payload: match from.forward_payload_header.as_str() {
                "" => None,
                name => Some(ForwardPayload {
                    name: header_name(name).within("forward_payload_header")?,
                    padded: from.pad_forward_payload_header,
                }),
            },
            claims: each(&from.claim_to_headers, "claim_to_headers", ClaimField::compile)?,
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
            cache: from.jwt_cache_config.as_ref().map(Cache::new),
        })
    }

    /// Fields that only this filter may set: a client's are taken off before.
    pub fn sanitize(&self, headers: &mut HeaderMap) {
        if let Some(payload) = &self.forward_payload {
            headers.remove(&payload.name);
        }
        for claim in &self.claims {
            headers.remove(&claim.name);
        }
    }

    /// Reads a token and checks everything but its signature. Keys with which the signature was verified before are
    /// returned as well.
    pub fn read(
        &self,
        text: &str,
        audiences: Option<&[Box<str>]>,
        now_s: u64,
    ) -> Result<(Arc<Token>, Option<Arc<KeySet>>), Failure> {
        let cached = self.cache.as_ref().and_then(|cache| cache.find(text));
        let (token, verified) = match cached {
            Some((token, keys)) => (token, Some(keys)),
            None => (Arc::new(Token::parse(text)?), None),
        };
        if !self.issuer.is_empty() && token.issuer() != &*self.issuer {
            return Err(Failure::UnknownIssuer);
        }
        token.check_time(now_s, self.skew_s)?;
        token.check_audience(audiences.unwrap_or(&self.audiences))?;
        let subject = self.subjects.as_ref();
        if subject.is_some_and(|subjects| !subjects.matches(token.subject())) || !self.lives(&token, now_s) {
            return Err(Failure::Verification);
        }
        Ok((token, verified))
    }

    /// Whether the token ends, and soon enough: what is left of its life counts, not when it began (Envoy).
    fn lives(&self, token: &Token, now_s: u64) -> bool {
        if !self.require_expiration && self.max_lifetime_s.is_none() {
            return true;
        }
        let until = token.time("exp").filter(|until| *until > 0);
        until.is_some_and(|until| {
            self.max_lifetime_s
                .is_none_or(|limit| until.saturating_sub(now_s) <= limit)
        })
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
        if let Some(cache) = &self.cache {
            cache.keep(text, token, keys);
        }
        Ok(())
    }

    /// Makes of a good token what the provider says: fields, beside those of other good tokens, metadata, and its removal
    /// from the request. A new query, if the token was taken out of it, is returned.
    pub fn accept(
        &self,
        token: &Token,
        place: Place<'_>,
        headers: &mut HeaderMap,
        query: Option<&str>,
        metadata: &mut Metadata,
    ) -> Option<String> {
        for claim in &self.claims {
            if let Some(value) = token.claim(&claim.path).and_then(field_value) {
                headers.append(&claim.name, value);
            }
        }
        if let Some(payload) = &self.forward_payload {
            let bytes = URL_SAFE_NO_PAD
                .decode(token.payload.trim_end_matches('='))
                .unwrap_or_default();
            let text = if payload.padded {
                URL_SAFE.encode(bytes)
            } else {
                URL_SAFE_NO_PAD.encode(bytes)
            };
            if let Ok(value) = HeaderValue::from_str(&text) {
                headers.append(&payload.name, value);
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
        place.take_out(headers, query)
    }

    /// Writes down why a token was not accepted, where the provider asks for it.
    pub fn note_failure(&self, failure: Failure, metadata: &mut Metadata) {
        if !self.failure_in_metadata.is_empty() {
            let status = serde_json::json!({ "code": 16, "message": failure.to_string() });
            metadata.set(NAMESPACE, &self.failure_in_metadata, of_json(&status));
        }
    }
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

pub(super) fn texts(list: &[String]) -> Box<[Box<str>]> {
    list.iter().map(|text| text.as_str().into()).collect()
}

pub(super) fn header_name(text: &str) -> Result<HeaderName, Refusal> {
    HeaderName::from_bytes(text.as_bytes())
        .map_err(|_| Refusal::new("", format!("{text:?} is not a header name")))
}
