//! A `CertificateValidationContext`, compiled: which peers are believed.

use std::collections::HashMap;
use std::net::IpAddr;
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

use super::certificate::Certificate;
use super::secret::read_source;
use crate::config::convert;
use crate::config::matchers::StringMatch;
use crate::error::{Refusal, Within};

const SPIFFE_VALIDATOR: &str = "envoy.extensions.transport_sockets.tls.v3.SPIFFECertValidatorConfig";

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

/// Which kind of name a matcher looks at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum SanKind {
    Email,
    Dns,
    Uri,
    Ip,
    Any,
}

#[derive(Debug)]
struct SanMatch {
    kind: SanKind,
    matcher: StringMatch,
    /// For exact DNS names: a certificate's wildcard matches as well.
    dns: Option<Box<str>>,
}

impl SanMatch {
    fn matches(&self, certificate: &Certificate) -> bool {
        let kind = |kind| self.kind == kind || self.kind == SanKind::Any;
        let any = |names: &[Box<str>]| names.iter().any(|name| self.matcher.matches(name));
        (kind(SanKind::Uri) && any(&certificate.uri_sans))
            || (kind(SanKind::Email) && any(&certificate.email_sans))
            || (kind(SanKind::Dns)
                && match &self.dns {
                    Some(name) => certificate.dns_sans.iter().any(|san| dns_matches(san, name)),
                    None => any(&certificate.dns_sans),
                })
            || (kind(SanKind::Ip)
                && certificate
                    .ip_sans
                    .iter()
                    .any(|address: &IpAddr| self.matcher.matches(&address.to_string())))
    }
}

/// Whether the certificate's DNS name, perhaps with `*` as its first label, covers `name`.
pub fn dns_matches(san: &str, name: &str) -> bool {
    match san.strip_prefix("*.") {
        None => san.eq_ignore_ascii_case(name),
        Some(suffix) => name
            .split_once('.')
            .is_some_and(|(label, rest)| !label.is_empty() && rest.eq_ignore_ascii_case(suffix)),
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
        let unsupported = [
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
        ];
        if let Some((field, _)) = unsupported.iter().find(|(_, present)| *present) {
            return Err(Refusal::new(*field, "not supported"));
        }
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
                .push(compile_san(matcher).within(format!("match_typed_subject_alt_names[{index}]"))?);
        }
        for (index, matcher) in from.match_subject_alt_names.iter().enumerate() {
            out.sans.push(SanMatch {
                kind: SanKind::Any,
                matcher: StringMatch::compile(matcher).within(format!("match_subject_alt_names[{index}]"))?,
                dns: exact(matcher),
            });
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
            out.trust_domains = Some(compile_spiffe(custom).within("custom_validator_config")?);
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
            compile_san(matcher).within(format!("match_typed_subject_alt_names[{index}]"))?;
        }
        for (index, matcher) in any.iter().enumerate() {
            StringMatch::compile(matcher).within(format!("match_subject_alt_names[{index}]"))?;
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
            Some(domains) => Some(spiffe_roots(domains, &certificate)?),
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

/// webpki's names of failures, with what an operator wants to know.
fn describe(error: &dyn std::fmt::Display, certificate: &Certificate) -> String {
    let text = error.to_string();
    let plain = if text.starts_with("CertExpired") {
        "certificate has expired"
    } else if text.starts_with("CertNotValidYet") {
        "certificate is not yet valid"
    } else if text.starts_with("CertRevoked") {
        "certificate revoked"
    } else if text.starts_with("UnknownIssuer") {
        "unable to get local issuer certificate"
    } else if text.starts_with("UnknownRevocationStatus") {
        "unable to get certificate CRL"
    } else if text.starts_with("CrlExpired") {
        "CRL has expired"
    } else if text.starts_with("RequiredEkuNotFound") {
        "unsuitable certificate purpose"
    } else {
        &text
    };
    format!(
        "{plain} (peer {}, serial {})",
        certificate.principal(),
        certificate.serial
    )
}

/// The authorities of the peer's trust domain, after the rules of an X.509-SVID: one URI name, of the scheme `spiffe`,
/// and no right to sign.
fn spiffe_roots<'a>(
    domains: &'a HashMap<Box<str>, Roots>,
    certificate: &Certificate,
) -> Result<&'a Roots, Unverified> {
    let bad = |reason: &str| Unverified::Chain(format!("{reason} (peer {})", certificate.principal()));
    let [uri] = &*certificate.uri_sans else {
        return Err(bad("an X.509-SVID has exactly one URI SAN"));
    };
    if certificate.is_authority || certificate.may_sign {
        return Err(bad("an X.509-SVID must not be an authority's"));
    }
    let domain = uri
        .strip_prefix("spiffe://")
        .and_then(|rest| rest.split('/').next())
        .filter(|domain| !domain.is_empty())
        .ok_or_else(|| bad("the URI SAN is no SPIFFE id"))?;
    domains
        .get(domain)
        .ok_or_else(|| bad("no trust bundle for the trust domain"))
}

fn source(from: Option<&core::DataSource>, field: &str) -> Result<Option<Vec<u8>>, Refusal> {
    from.map(read_source).transpose().within(field)
}

fn exact(from: &serin_xds::pb::envoy::r#type::matcher::v3::StringMatcher) -> Option<Box<str>> {
    use serin_xds::pb::envoy::r#type::matcher::v3::string_matcher::MatchPattern;
    match &from.match_pattern {
        Some(MatchPattern::Exact(name)) => Some(name.as_str().into()),
        _ => None,
    }
}

fn compile_san(from: &tls::SubjectAltNameMatcher) -> Result<SanMatch, Refusal> {
    use tls::subject_alt_name_matcher::SanType;
    let kind = match SanType::try_from(from.san_type) {
        Ok(SanType::Email) => SanKind::Email,
        Ok(SanType::Dns) => SanKind::Dns,
        Ok(SanType::Uri) => SanKind::Uri,
        Ok(SanType::IpAddress) => SanKind::Ip,
        Ok(SanType::OtherName | SanType::Unspecified) | Err(_) => {
            return Err(Refusal::new(
                "san_type",
                "only EMAIL, DNS, URI and IP_ADDRESS are supported",
            ));
        }
    };
    let matcher = from
        .matcher
        .as_ref()
        .ok_or_else(|| Refusal::new("matcher", "is missing"))?;
    Ok(SanMatch {
        kind,
        matcher: StringMatch::compile(matcher).within("matcher")?,
        dns: exact(matcher).filter(|_| kind == SanKind::Dns),
    })
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

fn compile_spiffe(from: &core::TypedExtensionConfig) -> Result<HashMap<Box<str>, Roots>, Refusal> {
    let any = from
        .typed_config
        .as_ref()
        .ok_or_else(|| Refusal::new("typed_config", "is missing"))?;
    let message: tls::SpiffeCertValidatorConfig = convert::unpack(any, SPIFFE_VALIDATOR)?;
    let mut domains = HashMap::new();
    for (index, domain) in message.trust_domains.iter().enumerate() {
        let path = format!("trust_domains[{index}]");
        if !domain.workload_trust_domain.is_empty() {
            return Err(Refusal::new(
                format!("{path}.workload_trust_domain"),
                "not supported",
            ));
        }
        let pem = source(domain.trust_bundle.as_ref(), "trust_bundle")
            .within(&path)?
            .ok_or_else(|| Refusal::new(format!("{path}.trust_bundle"), "is missing"))?;
        let roots = Roots::from_pem(&pem).within(format!("{path}.trust_bundle"))?;
        if domains.insert(Box::from(domain.name.as_str()), roots).is_some() {
            return Err(Refusal::new(path, format!("{} occurs twice", domain.name)));
        }
    }
    if let Some(json) = source(message.trust_bundles.as_ref(), "trust_bundles")? {
        if !domains.is_empty() {
            return Err(Refusal::new(
                "trust_bundles",
                "and trust_domains exclude each other",
            ));
        }
        domains = trust_bundles(&json).within("trust_bundles")?;
    }
    if domains.is_empty() {
        return Err(Refusal::new("trust_domains", "there is none"));
    }
    Ok(domains)
}

/// `{"trust_domains": {"<name>": {"keys": [{"use": "x509-svid", "x5c": ["<base64>"]}]}}}`
fn trust_bundles(json: &[u8]) -> Result<HashMap<Box<str>, Roots>, Refusal> {
    #[derive(serde::Deserialize)]
    struct Bundles {
        trust_domains: HashMap<String, Bundle>,
    }
    #[derive(serde::Deserialize)]
    struct Bundle {
        keys: Vec<Key>,
    }
    #[derive(serde::Deserialize)]
    struct Key {
        #[serde(rename = "use", default)]
        purpose: String,
        #[serde(default)]
        x5c: Vec<String>,
    }
    let bundles: Bundles = serde_json::from_slice(json)
        .map_err(|error| Refusal::new("", format!("not a bundle map: {error}")))?;
    let mut out = HashMap::new();
    for (name, bundle) in bundles.trust_domains {
        let mut roots = Roots::default();
        let keys = bundle.keys.iter().filter(|key| key.purpose == "x509-svid");
        for encoded in keys.flat_map(|key| &key.x5c) {
            let der = base64::engine::general_purpose::STANDARD
                .decode(encoded)
                .map_err(|error| Refusal::new(&*name, error.to_string()))?;
            roots
                .add(CertificateDer::from(der))
                .map_err(|reason| Refusal::new(&*name, reason))?;
        }
        if roots.anchors.is_empty() {
            return Err(Refusal::new(name, "no x509-svid authority"));
        }
        out.insert(name.into(), roots);
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, KeyUsagePurpose};
    use serin_xds::pb::google::protobuf::UInt32Value;

    use super::super::certificate::hex;
    use super::*;

    struct Made {
        root: String,
        leaf: CertificateDer<'static>,
        intermediate: CertificateDer<'static>,
    }

    /// A root, an authority below it, and a leaf that was valid in January 2020.
    fn made() -> Made {
        let authority = |name: &str| {
            let mut params = CertificateParams::default();
            params.distinguished_name.push(rcgen::DnType::CommonName, name);
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
            (params, KeyPair::generate().unwrap())
        };
        let (root, root_key) = authority("root");
        let (below, below_key) = authority("below");
        let mut leaf = CertificateParams::new(vec!["a.example".to_owned()]).unwrap();
        leaf.not_before = rcgen::date_time_ymd(2020, 1, 1);
        leaf.not_after = rcgen::date_time_ymd(2020, 2, 1);
        let leaf_key = KeyPair::generate().unwrap();
        Made {
            root: root.self_signed(&root_key).unwrap().pem(),
            intermediate: below
                .signed_by(&below_key, &Issuer::from_params(&root, &root_key))
                .unwrap()
                .der()
                .clone(),
            leaf: leaf
                .signed_by(&leaf_key, &Issuer::from_params(&below, &below_key))
                .unwrap()
                .der()
                .clone(),
        }
    }

    fn text(pem: &str) -> Option<core::DataSource> {
        Some(core::DataSource {
            specifier: Some(core::data_source::Specifier::InlineString(pem.into())),
            ..Default::default()
        })
    }

    fn verify(made: &Made, context: &tls::CertificateValidationContext, year: u64) -> Result<(), Unverified> {
        let algorithms = rustls::crypto::aws_lc_rs::default_provider().signature_verification_algorithms;
        let now = std::time::Duration::from_secs((year - 1970) * 31_557_600 + 10 * 86_400);
        Validation::compile(context).unwrap().verify(
            &made.leaf,
            std::slice::from_ref(&made.intermediate),
            KeyUsage::server_auth(),
            algorithms.all,
            UnixTime::since_unix_epoch(now),
        )
    }

    #[test]
    fn expiry_depth_and_untrusted_chains_are_judged_as_the_context_says() {
        let made = made();
        let mut context = tls::CertificateValidationContext {
            trusted_ca: text(&made.root),
            ..Default::default()
        };
        assert_eq!(verify(&made, &context, 2020), Ok(()));
        assert!(
            matches!(verify(&made, &context, 2022), Err(Unverified::Chain(reason)) if reason.contains("expired"))
        );
        context.allow_expired_certificate = true;
        assert_eq!(verify(&made, &context, 2022), Ok(()));
        context.max_verify_depth = Some(UInt32Value { value: 0 });
        assert!(
            matches!(verify(&made, &context, 2020), Err(Unverified::Chain(reason)) if reason.contains("too long"))
        );
        context.trust_chain_verification =
            tls::certificate_validation_context::TrustChainVerification::AcceptUntrusted as i32;
        assert_eq!(verify(&made, &context, 2020), Ok(()));
    }

    #[test]
    fn a_pinned_certificate_or_key_is_believed_and_no_other() {
        let made = made();
        let certificate = Certificate::parse(&made.leaf).unwrap();
        let hash = hex(&certificate.sha256);
        let key = base64::engine::general_purpose::STANDARD.encode(certificate.spki_sha256);
        let pinned = |hashes: &[&str], keys: &[&str]| tls::CertificateValidationContext {
            verify_certificate_hash: hashes.iter().map(|hash| (*hash).to_owned()).collect(),
            verify_certificate_spki: keys.iter().map(|key| (*key).to_owned()).collect(),
            ..Default::default()
        };
        let zeros = "00".repeat(32);
        assert_eq!(verify(&made, &pinned(&[&hash], &[]), 2020), Ok(()));
        assert_eq!(verify(&made, &pinned(&[&zeros], &[&key]), 2020), Ok(()));
        assert_eq!(
            verify(&made, &pinned(&[&zeros], &[]), 2020),
            Err(Unverified::Hash)
        );
        assert!(Validation::compile(&pinned(&["xyz"], &[])).is_err());
        assert!(Validation::compile(&pinned(&[], &["AAAA"])).is_err());
    }

    #[test]
    fn a_wildcard_covers_one_label() {
        assert!(dns_matches("*.example", "a.example"));
        assert!(!dns_matches("*.example", "a.b.example"));
        assert!(!dns_matches("*.example", "example"));
        assert!(dns_matches("A.example", "a.EXAMPLE"));
    }
}
