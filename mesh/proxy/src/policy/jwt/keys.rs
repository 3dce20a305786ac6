//! JSON Web Keys (RFC 7517, 7518) and the verification of signatures (RFC 7515) with them.

use aws_lc_rs::{hmac, signature};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::Deserialize;

/// Keys that one document may have.
const MAX_KEYS: usize = 1000;

/// A signature algorithm.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // RFC 7518's names
pub enum Algorithm {
    Rs256,
    Rs384,
    Rs512,
    Ps256,
    Ps384,
    Ps512,
    Es256,
    Es384,
    Es512,
    EdDsa,
    Hs256,
    Hs384,
    Hs512,
}

impl Algorithm {
    /// By its name; `none` is not among them.
    pub fn of_name(name: &str) -> Option<Self> {
        Some(match name {
            "RS256" => Self::Rs256,
            "RS384" => Self::Rs384,
            "RS512" => Self::Rs512,
            "PS256" => Self::Ps256,
            "PS384" => Self::Ps384,
            "PS512" => Self::Ps512,
            "ES256" => Self::Es256,
            "ES384" => Self::Es384,
            "ES512" => Self::Es512,
            "EdDSA" => Self::EdDsa,
            "HS256" => Self::Hs256,
            "HS384" => Self::Hs384,
            "HS512" => Self::Hs512,
            _ => return None,
        })
    }
}

#[derive(Deserialize)]
struct Document {
    keys: Vec<serde_json::Value>,
}

#[derive(Deserialize)]
struct Jwk {
    kty: String,
    #[serde(default)]
    kid: Option<String>,
    #[serde(default)]
    alg: Option<String>,
    #[serde(default)]
    n: String,
    #[serde(default)]
    e: String,
    #[serde(default)]
    crv: String,
    #[serde(default)]
    x: String,
    #[serde(default)]
    y: String,
    #[serde(default)]
    k: String,
}

#[derive(Debug)]
enum Material {
    Rsa { n: Vec<u8>, e: Vec<u8> },
    P256(Vec<u8>),
    P384(Vec<u8>),
    P521(Vec<u8>),
    Ed25519(Vec<u8>),
    Secret(Vec<u8>),
}

#[derive(Debug)]
struct Key {
    id: Option<Box<str>>,
    algorithm: Option<Algorithm>,
    material: Material,
}

/// The keys of an issuer.
#[derive(Debug)]
pub struct KeySet(Vec<Key>);

/// Why a signature was not accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rejected {
    /// No key has the token's id and can do its algorithm.
    NoKey,
    /// Keys were tried, none fits.
    Wrong,
}

impl KeySet {
    /// Reads a document `{"keys": [...]}`. Keys that nobody here can use are left out; a document without any other
    /// one is an error.
    pub fn parse(document: &[u8]) -> Result<Self, String> {
        let document: Document =
            serde_json::from_slice(document).map_err(|error| format!("Jwks is an invalid JSON: {error}"))?;
        let keys: Vec<Key> = document
            .keys
            .into_iter()
            .take(MAX_KEYS)
            .filter_map(|key| serde_json::from_value::<Jwk>(key).ok())
            .filter_map(|key| Key::of(&key))
            .collect();
        if keys.is_empty() {
            return Err("Jwks doesn't have any valid public key".to_owned());
        }
        Ok(Self(keys))
    }

    /// Whether some key has that id.
    pub fn knows(&self, id: Option<&str>) -> bool {
        id.is_none_or(|id| {
            self.0
                .iter()
                .any(|key| key.id.as_deref().is_none_or(|own| own == id))
        })
    }

    /// Verifies the signature of `message`.
    pub fn verify(
        &self,
        algorithm: Algorithm,
        id: Option<&str>,
        message: &[u8],
        signature: &[u8],
    ) -> Result<(), Rejected> {
        let mut result = Err(Rejected::NoKey);
        for key in &self.0 {
            let same_id = match (id, key.id.as_deref()) {
                (Some(wanted), Some(own)) => wanted == own,
                _ => true,
            };
            if !same_id || key.algorithm.is_some_and(|own| own != algorithm) {
                continue;
            }
            match key.verify(algorithm, message, signature) {
                Some(true) => return Ok(()),
                Some(false) => result = Err(Rejected::Wrong),
                None => {}
            }
        }
        result
    }
}

fn bytes(text: &str) -> Option<Vec<u8>> {
    let text = text.trim_end_matches('=');
    URL_SAFE_NO_PAD
        .decode(text)
        .ok()
        .filter(|bytes| !bytes.is_empty())
}

/// An uncompressed point.
fn point(key: &Jwk, width: usize) -> Option<Vec<u8>> {
    let (x, y) = (bytes(&key.x)?, bytes(&key.y)?);
    if x.len() > width || y.len() > width {
        return None;
    }
    let mut out = vec![4; 1];
    for part in [x, y] {
        out.resize(out.len() + width - part.len(), 0);
        out.extend(part);
    }
    Some(out)
}

impl Key {
    fn of(from: &Jwk) -> Option<Self> {
        let material = match (from.kty.as_str(), from.crv.as_str()) {
            ("RSA", _) => Material::Rsa {
                n: bytes(&from.n)?,
                e: bytes(&from.e)?,
            },
            ("EC", "P-256") => Material::P256(point(from, 32)?),
            ("EC", "P-384") => Material::P384(point(from, 48)?),
            ("EC", "P-521") => Material::P521(point(from, 66)?),
            ("OKP", "Ed25519") => Material::Ed25519(bytes(&from.x)?),
            ("oct", _) => Material::Secret(bytes(&from.k)?),
            _ => return None,
        };
        let algorithm = match from.alg.as_deref() {
            None | Some("") => None,
            Some(name) => Some(Algorithm::of_name(name)?),
        };
        Some(Self {
            id: from.kid.as_deref().map(Into::into),
            algorithm,
            material,
        })
    }

    /// Whether the signature is right; `None` if the key is of another kind.
    fn verify(&self, algorithm: Algorithm, message: &[u8], given: &[u8]) -> Option<bool> {
        let ok = match (&self.material, algorithm) {
            (Material::Rsa { n, e }, algorithm) => {
                let parameters = match algorithm {
                    Algorithm::Rs256 => &signature::RSA_PKCS1_2048_8192_SHA256,
                    Algorithm::Rs384 => &signature::RSA_PKCS1_2048_8192_SHA384,
                    Algorithm::Rs512 => &signature::RSA_PKCS1_2048_8192_SHA512,
                    Algorithm::Ps256 => &signature::RSA_PSS_2048_8192_SHA256,
                    Algorithm::Ps384 => &signature::RSA_PSS_2048_8192_SHA384,
                    Algorithm::Ps512 => &signature::RSA_PSS_2048_8192_SHA512,
                    _ => return None,
                };
                let key = signature::RsaPublicKeyComponents { n, e };
                key.verify(parameters, message, given).is_ok()
            }
            (Material::P256(point), Algorithm::Es256) => {
                unparsed(&signature::ECDSA_P256_SHA256_FIXED, point, message, given)
            }
            (Material::P384(point), Algorithm::Es384) => {
                unparsed(&signature::ECDSA_P384_SHA384_FIXED, point, message, given)
            }
            (Material::P521(point), Algorithm::Es512) => {
                unparsed(&signature::ECDSA_P521_SHA512_FIXED, point, message, given)
            }
            (Material::Ed25519(key), Algorithm::EdDsa) => unparsed(&signature::ED25519, key, message, given),
            (Material::Secret(secret), algorithm) => {
                let kind = match algorithm {
                    Algorithm::Hs256 => hmac::HMAC_SHA256,
                    Algorithm::Hs384 => hmac::HMAC_SHA384,
                    Algorithm::Hs512 => hmac::HMAC_SHA512,
                    _ => return None,
                };
                hmac::verify(&hmac::Key::new(kind, secret), message, given).is_ok()
            }
            _ => return None,
        };
        Some(ok)
    }
}

fn unparsed(
    algorithm: &'static dyn signature::VerificationAlgorithm,
    key: &[u8],
    message: &[u8],
    given: &[u8],
) -> bool {
    signature::UnparsedPublicKey::new(algorithm, key)
        .verify(message, given)
        .is_ok()
}
