//! A JSON Web Token, read but not believed.

use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use base64::{Engine, alphabet};
use serde_json::{Map, Value};

use super::keys::Algorithm;

/// Why a token is not accepted. The texts are Envoy's, which clients and operators know.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // the texts say it
pub enum Failure {
    #[error("Jwt is missing")]
    Missing,
    #[error("Jwt is not in the form of Header.Payload.Signature with two dots and 3 sections")]
    Form,
    #[error("Jwt header is an invalid Base64url encoded")]
    HeaderBase64,
    #[error("Jwt header is an invalid JSON")]
    HeaderJson,
    #[error("Jwt header [alg] field is required and must be a string")]
    NoAlgorithm,
    #[error("Jwt header [alg] is not supported")]
    Algorithm,
    #[error("Jwt header [kid] field must be a string")]
    KeyId,
    #[error("Jwt payload is an invalid Base64url encoded")]
    PayloadBase64,
    #[error("Jwt payload is an invalid JSON")]
    PayloadJson,
    #[error("Jwt signature is an invalid Base64url encoded")]
    SignatureBase64,
    #[error("Jwt payload [iss] field must be a string")]
    IssuerType,
    #[error("Jwt payload [aud] field must be a string or string list")]
    AudienceType,
    #[error("Jwt payload [exp] field must be a number and not negative")]
    TimeType,
    #[error("Jwt is expired")]
    Expired,
    #[error("Jwt not yet valid")]
    NotYet,
    #[error("Jwt issuer is not configured")]
    UnknownIssuer,
    #[error("Audiences in Jwt are not allowed")]
    Audience,
    #[error("Jwks remote fetch is failed")]
    Fetch,
    #[error("Jwks doesn't have key to match kid or alg from Jwt")]
    NoKey,
    #[error("Jwt verification fails")]
    Verification,
}

impl Failure {
    /// Whether there was no token, or none of an issuer that is looked for.
    pub fn is_missing(self) -> bool {
        matches!(self, Self::Missing | Self::UnknownIssuer)
    }
}

/// See the module.
#[derive(Clone, Debug)]
pub struct Token {
    /// Header.
    pub header: Map<String, Value>,
    /// Claims.
    pub claims: Map<String, Value>,
    /// The payload as it was sent.
    pub payload: Box<str>,
    /// How it is signed.
    pub algorithm: Algorithm,
    /// Which key is said to have signed it.
    pub key_id: Option<String>,
    signed: Box<str>,
    signature: Vec<u8>,
}

/// As Envoy reads it: with padding or without, whatever the bits are that belong to no byte.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &alphabet::URL_SAFE,
    GeneralPurposeConfig::new()
        .with_decode_padding_mode(DecodePaddingMode::Indifferent)
        .with_decode_allow_trailing_bits(true),
);

/// White space within it does not matter (Envoy).
fn base64(text: &str) -> Option<Vec<u8>> {
    let text = text.trim_end_matches('=');
    if !text.contains(|char: char| char.is_ascii_whitespace()) {
        return BASE64.decode(text).ok();
    }
    let dense: String = text.split_ascii_whitespace().collect();
    BASE64.decode(dense).ok()
}

impl Token {
    /// Reads the compact form.
    pub fn parse(text: &str) -> Result<Self, Failure> {
        let mut parts = text.split('.');
        let (Some(header), Some(payload), Some(signature), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(Failure::Form);
        };
        let header_bytes = base64(header).ok_or(Failure::HeaderBase64)?;
        let header_fields: Map<String, Value> =
            serde_json::from_slice(&header_bytes).map_err(|_| Failure::HeaderJson)?;
        let algorithm = header_fields
            .get("alg")
            .and_then(Value::as_str)
            .ok_or(Failure::NoAlgorithm)?;
        let algorithm = Algorithm::of_name(algorithm).ok_or(Failure::Algorithm)?;
        // Extensions that must be understood (RFC 7515 section 4.1.11); none is.
        if header_fields.contains_key("crit") {
            return Err(Failure::Algorithm);
        }
        let key_id = match header_fields.get("kid") {
            None => None,
            Some(Value::String(id)) => Some(id.clone()),
            Some(_) => return Err(Failure::KeyId),
        };
        let payload_bytes = base64(payload).ok_or(Failure::PayloadBase64)?;
        let claims: Map<String, Value> =
            serde_json::from_slice(&payload_bytes).map_err(|_| Failure::PayloadJson)?;
        if claims.get("iss").is_some_and(|issuer| !issuer.is_string()) {
            return Err(Failure::IssuerType);
        }
        for field in ["exp", "nbf", "iat"] {
            if claims
                .get(field)
                .is_some_and(|time| time.as_f64().is_none_or(|time| time < 0.0))
            {
                return Err(Failure::TimeType);
            }
        }
        Ok(Self {
            header: header_fields,
            claims,
            payload: payload.into(),
            algorithm,
            key_id,
            signed: text[..header.len() + 1 + payload.len()].into(),
            signature: base64(signature).ok_or(Failure::SignatureBase64)?,
        })
    }

    /// Its issuer.
    pub fn issuer(&self) -> &str {
        self.claims.get("iss").and_then(Value::as_str).unwrap_or("")
    }

    /// Its subject.
    pub fn subject(&self) -> &str {
        self.claims.get("sub").and_then(Value::as_str).unwrap_or("")
    }

    /// A time claim, in seconds since 1970.
    pub fn time(&self, claim: &str) -> Option<u64> {
        self.claims
            .get(claim)
            .and_then(Value::as_f64)
            .map(|time| time as u64)
    }

    /// Checks that `now` (seconds since 1970) is within its time, give or take `skew` seconds.
    pub fn check_time(&self, now: u64, skew: u64) -> Result<(), Failure> {
        if self
            .time("nbf")
            .is_some_and(|from| from > now.saturating_add(skew))
        {
            return Err(Failure::NotYet);
        }
        if self
            .time("exp")
            .is_some_and(|until| until > 0 && until.saturating_add(skew) < now)
        {
            return Err(Failure::Expired);
        }
        Ok(())
    }

    /// Checks that it is meant for one of `audiences`, if any are asked for. A scheme and a slash at the end do not
    /// matter (Envoy's rule).
    pub fn check_audience(&self, audiences: &[Box<str>]) -> Result<(), Failure> {
        if audiences.is_empty() {
            return Ok(());
        }
        let wanted = |given: &str| audiences.iter().any(|audience| bare(audience) == bare(given));
        let ok = match self.claims.get("aud") {
            Some(Value::String(one)) => wanted(one),
            Some(Value::Array(list)) => list.iter().filter_map(Value::as_str).any(wanted),
            None => false,
            Some(_) => return Err(Failure::AudienceType),
        };
        ok.then_some(()).ok_or(Failure::Audience)
    }

    /// Verifies the signature.
    pub fn check_signature(&self, keys: &super::keys::KeySet) -> Result<(), Failure> {
        use super::keys::Rejected;
        keys.verify(
            self.algorithm,
            self.key_id.as_deref(),
            self.signed.as_bytes(),
            &self.signature,
        )
        .map_err(|rejected| match rejected {
            Rejected::NoKey => Failure::NoKey,
            Rejected::Wrong => Failure::Verification,
        })
    }

    /// A claim, its name's parts separated by dots where it is nested.
    pub fn claim(&self, path: &[Box<str>]) -> Option<&Value> {
        let mut parts = path.iter();
        let mut value = self.claims.get(&**parts.next()?)?;
        for part in parts {
            value = value.get(&**part)?;
        }
        Some(value)
    }
}

fn bare(audience: &str) -> &str {
    let audience = audience
        .strip_prefix("https://")
        .or_else(|| audience.strip_prefix("http://"))
        .unwrap_or(audience);
    audience.strip_suffix('/').unwrap_or(audience)
}
