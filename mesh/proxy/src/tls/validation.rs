//! A `CertificateValidationContext`, compiled: which peers are believed.

mod san;
mod spiffe;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::sync::{Arc, Weak};

use base64::Engine as _;
use parking_lot::Mutex;
use rustls::DistinguishedName;
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{
    CertificateDer, CertificateRevocationListDer, SignatureVerificationAlgorithm, TrustAnchor, UnixTime,
};
use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::envoy::extensions::transport_sockets::tls::v3 as tls;
use webpki::{
    BorrowedCertRevocationList, CertRevocationList, EndEntityCert, ExpirationPolicy, KeyUsage,
    RevocationCheckDepth, RevocationOptionsBuilder,
};

use self::san::SanMatch;
pub use self::san::dns_matches;
use super::certificate::Certificate;
use super::secret::read_source;
use crate::config::convert::refuse_present;
use crate::error::{Refusal, Within};

/// Authorities that are believed.
#[derive(Debug, Default)]
pub struct Roots {
    anchors: Vec<TrustAnchor<'static>>,
    /// The certificates, for admin output and for peers that show one of them as their own.
    pub certificates: Vec<Certificate>,
}

impl Roots {
    /// From PEM; every certificate in it.
    pub fn from_pem(pem: &[u8]) -> Result<Self, Refusal> {
        let mut roots = Self::default();
        for (index, der) in CertificateDer::pem_slice_iter(pem).enumerate() {
            let bad = |reason: String| Refusal::new("", format!("certificate {}: {reason}", index + 1));
            let der = der.map_err(|error| bad(error.to_string()))?;
            roots.add(der).map_err(bad)?;
        }
        if roots.anchors.is_empty() {
            return Err(Refusal::new("", "no PEM certificate found"));
        }
        Ok(roots)
    }

    /// Those of the system, or of `SSL_CERT_FILE` and `SSL_CERT_DIR`. They are read once for all that use them at a
    /// time: some 140 certificates.
    pub fn of_system() -> Result<Arc<Self>, Refusal> {
        static SHARED: Mutex<Weak<Roots>> = Mutex::new(Weak::new());
        let mut shared = SHARED.lock();
        if let Some(known) = shared.upgrade() {
            return Ok(known);
        }
        let found = rustls_native_certs::load_native_certs();
        let mut roots = Self::default();
        for der in found.certs {
            // One that cannot be read (there are very old ones) is passed over, as in every other user of the store.
            let _ = roots.add(der);
        }
        if roots.anchors.is_empty() {
            let reason = found
                .errors
                .first()
                .map_or_else(|| "there are none".to_owned(), ToString::to_string);
            return Err(Refusal::new("", format!("no system root certificates: {reason}")));
        }
        let roots = Arc::new(roots);
        *shared = Arc::downgrade(&roots);
        Ok(roots)
    }

    fn add(&mut self, der: CertificateDer<'static>) -> Result<(), String> {
        let anchor = webpki::anchor_from_trusted_cert(&der).map_err(|error| error.to_string())?;
        self.anchors.push(anchor.to_owned());
        self.certificates
            .push(Certificate::parse(&der).map_err(|error| error.to_string())?);
        Ok(())
    }
}

/// Why a peer is not believed. The text goes to logs and `upstream_transport_failure_reason`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unverified {
    /// The chain does not lead to a trusted authority, or is expired, revoked, malformed.
    #[error("CERTIFICATE_VERIFY_FAILED: {0}")]
    Chain(String),
    /// No subject alternative name matches.
    #[error("CERTIFICATE_VERIFY_FAILED: verify cert failed: verify SAN list: {0}")]
    San(String),
    /// Neither the certificate's nor its key's hash is one of those wanted.
    #[error("CERTIFICATE_VERIFY_FAILED: verify cert failed: cert hash and spki")]
    Hash,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Validation {
    /// Authorities for any peer.
    pub roots: Option<Arc<Roots>>,
    /// Authorities by SPIFFE trust domain.
    pub trust_domains: Option<HashMap<Box<str>, Roots>>,
    sans: Vec<SanMatch>,
    hashes: Vec<[u8; 32]>,
    keys: Vec<[u8; 32]>,
    revoked: Vec<CertRevocationList<'static>>,
    only_leaf_revocation: bool,
    accept_untrusted: bool,
    allow_expired: bool,
    max_depth: Option<usize>,
    /// Whether authorities are named to clients.
    pub suppress_names: bool,
}

impl Validation {
    /// Compiles the message; data sources are read.
    pub fn compile(from: &tls::CertificateValidationContext) -> Result<Self, Refusal> {
        refuse_present(
            &[
                (
                    "ca_certificate_provider_instance",
                    from.ca_certificate_provider_instance.is_some(),
                ),
                (
                    "require_signed_certificate_timestamp",
                    from.require_signed_certificate_timestamp
                        .as_ref()
                        .is_some_and(|value| value.value),
                ),
            ],
            "not supported",
        )?;
        let mut out = Self {
            roots: match source(from.trusted_ca.as_ref(), "trusted_ca")? {
                Some(pem) => Some(Arc::new(Roots::from_pem(&pem).within("trusted_ca")?)),
                // Envoy: the system's count only where no others are named.
                None if from.system_root_certs.is_some() => {
                    Some(Roots::of_system().within("system_root_certs")?)
                }
                None => None,
            },
            only_leaf_revocation: from.only_verify_leaf_cert_crl,
            accept_untrusted: from.trust_chain_verification
                == tls::certificate_validation_context::TrustChainVerification::AcceptUntrusted as i32,
            allow_expired: from.allow_expired_certificate,
            max_depth: from.max_verify_depth.as_ref().map(|depth| depth.value as usize),
            suppress_names: from.suppress_client_ca_list,
            ..Self::default()
        };
        for (index, matcher) in from.match_typed_subject_alt_names.iter().enumerate() {
            out.sans
                .push(SanMatch::compile(matcher).within(format!("match_typed_subject_alt_names[{index}]"))?);
        }
        for (index, matcher) in from.match_subject_alt_names.iter().enumerate() {
            out.sans
                .push(SanMatch::of_any_kind(matcher).within(format!("match_subject_alt_names[{index}]"))?);
        }
        for (index, text) in from.verify_certificate_hash.iter().enumerate() {
            out.hashes
                .push(hash_of_hex(text).within(format!("verify_certificate_hash[{index}]"))?);
        }
        for (index, text) in from.verify_certificate_spki.iter().enumerate() {
            let bytes = base64::engine::general_purpose::STANDARD.decode(text).ok();
            let key = bytes.and_then(|bytes| bytes.try_into().ok()).ok_or_else(|| {
                Refusal::new(
                    format!("verify_certificate_spki[{index}]"),
                    "is not the base64 of a SHA-256",
                )
            })?;
            out.keys.push(key);
        }
        if let Some(pem) = source(from.crl.as_ref(), "crl")? {
            out.revoked = revocation_lists(&pem).within("crl")?;
        }
        if let Some(custom) = &from.custom_validator_config {
            out.trust_domains = Some(spiffe::compile(custom).within("custom_validator_config")?);
        }
        if !out.sans.is_empty() && out.roots.is_none() && out.trust_domains.is_none() {
            return Err(Refusal::new(
                "match_typed_subject_alt_names",
                "names mean nothing without an authority: set trusted_ca",
            ));
        }
        if !out.revoked.is_empty() && out.roots.is_none() && out.trust_domains.is_none() {
            return Err(Refusal::new("crl", "a revocation list needs trusted_ca"));
        }
        Ok(out)
    }

    /// Whether matchers of names can be honoured, for contexts that get their authority later.
    pub(super) fn check_names(
        typed: &[tls::SubjectAltNameMatcher],
        any: &[serin_xds::pb::envoy::r#type::matcher::v3::StringMatcher],
    ) -> Result<(), Refusal> {
        for (index, matcher) in typed.iter().enumerate() {
            SanMatch::compile(matcher).within(format!("match_typed_subject_alt_names[{index}]"))?;
        }
        for (index, matcher) in any.iter().enumerate() {
            SanMatch::of_any_kind(matcher).within(format!("match_subject_alt_names[{index}]"))?;
        }
        Ok(())
    }

    /// Whether a peer must prove anything at all.
    pub fn checks_anything(&self) -> bool {
        self.roots.is_some()
            || self.trust_domains.is_some()
            || !self.hashes.is_empty()
            || !self.keys.is_empty()
    }

    /// Whether a peer must show a certificate even if the context does not say so (Envoy's rule).
    pub fn needs_certificate(&self) -> bool {
        !self.hashes.is_empty() || !self.keys.is_empty() || !self.sans.is_empty()
    }

    /// The names of the authorities, for the server's request for a certificate.
    pub fn authority_names(&self) -> Vec<DistinguishedName> {
        if self.suppress_names {
            return Vec::new();
        }
        let domains = self.trust_domains.iter().flat_map(HashMap::values);
        self.roots
            .as_deref()
            .into_iter()
            .chain(domains)
            .flat_map(|roots| &roots.anchors)
            .map(|anchor| DistinguishedName::in_sequence(&anchor.subject))
            .collect()
    }

    /// Every authority certificate, for admin output.
    pub fn authorities(&self) -> impl Iterator<Item = &Certificate> {
        let domains = self.trust_domains.iter().flat_map(HashMap::values);
        self.roots
            .as_deref()
            .into_iter()
            .chain(domains)
            .flat_map(|roots| &roots.certificates)
    }

    /// Whether the peer with this chain is believed at `now`.
    pub fn verify(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        usage: KeyUsage,
        algorithms: &[&dyn SignatureVerificationAlgorithm],
        now: UnixTime,
    ) -> Result<(), Unverified> {
        if !self.checks_anything() {
            return Ok(());
        }
        let certificate = Certificate::parse(leaf).map_err(|error| Unverified::Chain(error.to_string()))?;
        let roots = match &self.trust_domains {
            Some(domains) => Some(spiffe::roots(domains, &certificate)?),
            None => self.roots.as_deref(),
        };
        if let Some(roots) = roots {
            let result = self.verify_chain(roots, &certificate, leaf, intermediates, usage, algorithms, now);
            if !self.accept_untrusted {
                result?;
            }
        }
        if !self.sans.is_empty() && !self.sans.iter().any(|matcher| matcher.matches(&certificate)) {
            return Err(Unverified::San(format!(
                "the peer is {}",
                certificate.principal()
            )));
        }
        let pinned = !self.hashes.is_empty() || !self.keys.is_empty();
        if pinned
            && !self.hashes.contains(&certificate.sha256)
            && !self.keys.contains(&certificate.spki_sha256)
        {
            return Err(Unverified::Hash);
        }
        Ok(())
    }

    fn verify_chain(
        &self,
        roots: &Roots,
        certificate: &Certificate,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        usage: KeyUsage,
        algorithms: &[&dyn SignatureVerificationAlgorithm],
        now: UnixTime,
    ) -> Result<(), Unverified> {
        let failed = |error: &dyn std::fmt::Display| Unverified::Chain(describe(error, certificate));
        let now = if self.allow_expired {
            clamp(now, certificate, intermediates)
        } else {
            now
        };
        // A peer that shows a certificate which is itself trusted needs no path.
        if roots
            .certificates
            .iter()
            .any(|root| root.der.as_ref() == leaf.as_ref())
            && self.revoked.is_empty()
        {
            let now = i64::try_from(now.as_secs()).unwrap_or(i64::MAX);
            return if now < certificate.not_before {
                Err(failed(&"certificate is not yet valid"))
            } else if now > certificate.not_after {
                Err(failed(&"certificate has expired"))
            } else {
                Ok(())
            };
        }
        let end_entity = EndEntityCert::try_from(leaf).map_err(|error| failed(&error))?;
        let lists: Vec<&CertRevocationList<'_>> = self.revoked.iter().collect();
        let revocation = RevocationOptionsBuilder::new(&lists).ok().map(|options| {
            options
                .with_depth(if self.only_leaf_revocation {
                    RevocationCheckDepth::EndEntity
                } else {
                    RevocationCheckDepth::Chain
                })
                .with_expiration_policy(if self.allow_expired {
                    ExpirationPolicy::Ignore
                } else {
                    ExpirationPolicy::Enforce
                })
                .build()
        });
        let path = end_entity
            .verify_for_usage(
                algorithms,
                &roots.anchors,
                intermediates,
                now,
                usage,
                revocation,
                None,
            )
            .map_err(|error| failed(&error))?;
        match self.max_depth {
            Some(depth) if path.intermediate_certificates().count() > depth => {
                Err(failed(&"certificate chain too long"))
            }
            _ => Ok(()),
        }
    }
}

/// The time at which none of the peer's certificates has expired yet.
fn clamp(now: UnixTime, leaf: &Certificate, intermediates: &[CertificateDer<'_>]) -> UnixTime {
    let earliest = intermediates
        .iter()
        .filter_map(|der| Certificate::parse(der).ok())
        .map(|certificate| certificate.not_after)
        .fold(leaf.not_after, i64::min);
    let earliest = std::time::Duration::from_secs(u64::try_from(earliest).unwrap_or(0));
    UnixTime::since_unix_epoch(earliest.min(std::time::Duration::from_secs(now.as_secs())))
}

/// webpki's names of failures, in an operator's words.
const NAMES: [(&str, &str); 7] = [
    ("CertExpired", "certificate has expired"),
    ("CertNotValidYet", "certificate is not yet valid"),
    ("CertRevoked", "certificate revoked"),
    ("UnknownIssuer", "unable to get local issuer certificate"),
    ("UnknownRevocationStatus", "unable to get certificate CRL"),
    ("CrlExpired", "CRL has expired"),
    ("RequiredEkuNotFound", "unsuitable certificate purpose"),
];

/// A failure by its name, with what an operator wants to know.
fn describe(error: &dyn std::fmt::Display, certificate: &Certificate) -> String {
    let text = error.to_string();
    let known = NAMES.iter().find(|(name, _)| text.starts_with(name));
    let plain = known.map_or(&*text, |(_, plain)| plain);
    format!(
        "{plain} (peer {}, serial {})",
        certificate.principal(),
        certificate.serial
    )
}

fn source(from: Option<&core::DataSource>, field: &str) -> Result<Option<Vec<u8>>, Refusal> {
    from.map(read_source).transpose().within(field)
}

fn hash_of_hex(text: &str) -> Result<[u8; 32], Refusal> {
    let digits: String = text.chars().filter(|character| *character != ':').collect();
    let bad = || Refusal::new("", "is not the hexadecimal of a SHA-256");
    if digits.len() != 64 || !digits.is_ascii() {
        return Err(bad());
    }
    let mut out = [0; 32];
    for (index, byte) in out.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&digits[index * 2..index * 2 + 2], 16).map_err(|_| bad())?;
    }
    Ok(out)
}

fn revocation_lists(pem: &[u8]) -> Result<Vec<CertRevocationList<'static>>, Refusal> {
    let mut out = Vec::new();
    for (index, der) in CertificateRevocationListDer::pem_slice_iter(pem).enumerate() {
        let bad = |reason: String| Refusal::new("", format!("list {}: {reason}", index + 1));
        let der = der.map_err(|error| bad(error.to_string()))?;
        let list = BorrowedCertRevocationList::from_der(&der)
            .and_then(|list| list.to_owned())
            .map_err(|error| bad(error.to_string()))?;
        out.push(list.into());
    }
    if out.is_empty() {
        return Err(Refusal::new("", "no PEM revocation list found"));
    }
    Ok(out)
}
