//! A `CommonTlsContext`, compiled: what both sides have.

use std::sync::Arc;

use prost::Message as _;
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::{CipherSuite, NamedGroup, SupportedCipherSuite, SupportedProtocolVersion};
use serin_xds::pb::envoy::extensions::transport_sockets::tls::v3 as tls;

use super::secret::{Identity, Kind, Secret, SecretSlot};
use super::table::SecretTable;
use super::validation::Validation;
use crate::config::convert::refuse_present;
use crate::error::{Refusal, Within};

/// Where the rules for peers come from.
#[derive(Debug)]
enum Trust {
    /// None: every peer is believed.
    Nobody,
    /// One secret.
    Secret(Arc<SecretSlot>),
    /// A secret on top of defaults.
    Combined(Box<tls::CertificateValidationContext>, Arc<SecretSlot>),
}

/// See the module.
#[derive(Debug)]
pub(super) struct Common {
    identities: Vec<Arc<SecretSlot>>,
    trust: Trust,
    /// Application protocols, most wanted first.
    pub(super) alpn: Vec<Vec<u8>>,
    /// Cipher suites and groups.
    pub(super) provider: Arc<CryptoProvider>,
    /// TLS versions.
    pub(super) versions: Vec<&'static SupportedProtocolVersion>,
}

impl Common {
    pub(super) fn compile(from: &tls::CommonTlsContext, secrets: &mut SecretTable) -> Result<Self, Refusal> {
        use tls::common_tls_context::ValidationContextType;
        refuse_present(
            &[
                (
                    "tls_certificate_provider_instance",
                    from.tls_certificate_provider_instance.is_some(),
                ),
                (
                    "custom_tls_certificate_selector",
                    from.custom_tls_certificate_selector.is_some(),
                ),
                (
                    "tls_certificate_certificate_provider",
                    from.tls_certificate_certificate_provider.is_some()
                        || from.tls_certificate_certificate_provider_instance.is_some(),
                ),
                ("custom_handshaker", from.custom_handshaker.is_some()),
                ("key_log", from.key_log.is_some()),
            ],
            "not supported",
        )?;
        let mut identities = Vec::new();
        for (index, certificate) in from.tls_certificates.iter().enumerate() {
            let slot = secrets
                .inline(tls::secret::Type::TlsCertificate(certificate.clone()))
                .within(format!("tls_certificates[{index}]"))?;
            identities.push(slot);
        }
        for (index, config) in from.tls_certificate_sds_secret_configs.iter().enumerate() {
            let slot = secrets
                .reference(config, Kind::Identity)
                .within(format!("tls_certificate_sds_secret_configs[{index}]"))?;
            identities.push(slot);
        }
        let trust = match &from.validation_context_type {
            None => Trust::Nobody,
            Some(ValidationContextType::ValidationContext(context)) => Trust::Secret(
                secrets
                    .inline(tls::secret::Type::ValidationContext(context.clone()))
                    .within("validation_context")?,
            ),
            Some(ValidationContextType::ValidationContextSdsSecretConfig(config)) => Trust::Secret(
                secrets
                    .reference(config, Kind::Validation)
                    .within("validation_context_sds_secret_config")?,
            ),
            Some(ValidationContextType::CombinedValidationContext(combined)) => {
                let path = "combined_validation_context";
                let config = combined
                    .validation_context_sds_secret_config
                    .as_ref()
                    .ok_or_else(|| {
                        Refusal::new(
                            format!("{path}.validation_context_sds_secret_config"),
                            "is missing",
                        )
                    })?;
                let default = combined.default_validation_context.clone().unwrap_or_default();
                check_default(&default).within(path)?;
                let slot = secrets.reference(config, Kind::Validation).within(path)?;
                Trust::Combined(Box::new(default), slot)
            }
            Some(_) => {
                return Err(Refusal::new(
                    "validation_context_type",
                    "certificate providers are not supported",
                ));
            }
        };
        let parameters = from.tls_params.clone().unwrap_or_default();
        let (provider, versions) = compile_parameters(&parameters).within("tls_params")?;
        Ok(Self {
            identities,
            trust,
            alpn: from
                .alpn_protocols
                .iter()
                .map(|name| name.as_bytes().to_vec())
                .collect(),
            provider: Arc::new(provider),
            versions,
        })
    }

    /// The slots of its secrets.
    pub(super) fn slots(&self) -> impl Iterator<Item = &Arc<SecretSlot>> {
        let trust = match &self.trust {
            Trust::Nobody => None,
            Trust::Secret(slot) | Trust::Combined(_, slot) => Some(slot),
        };
        self.identities.iter().chain(trust)
    }

    /// Changes whenever one of its secrets does: versions only grow.
    pub(super) fn version(&self) -> u64 {
        self.slots().map(|slot| slot.version()).sum()
    }

    /// Whether there is any identity, arrived or not.
    pub(super) fn has_identity(&self) -> bool {
        !self.identities.is_empty()
    }

    /// Its identities; `None` while one is missing.
    pub(super) fn identities(&self) -> Option<Vec<Arc<Identity>>> {
        self.identities
            .iter()
            .map(|slot| match &*slot.get()? {
                Secret::Identity(identity) => Some(identity.clone()),
                _ => None,
            })
            .collect()
    }

    /// The rules for peers; `None` while they are missing, `Some(None)` if there are none.
    #[allow(clippy::option_option)] // missing and none are different answers, and both callers start with `?`
    pub(super) fn validation(&self) -> Option<Option<Arc<Validation>>> {
        match &self.trust {
            Trust::Nobody => Some(None),
            Trust::Secret(slot) => match &*slot.get()? {
                Secret::Validation(_, compiled) => Some(Some(compiled.clone())),
                _ => None,
            },
            Trust::Combined(default, slot) => match &*slot.get()? {
                Secret::Validation(message, _) => {
                    let mut merged = (**default).clone();
                    merged.merge(message.encode_to_vec().as_slice()).ok()?;
                    match Validation::compile(&merged) {
                        Ok(compiled) => Some(Some(Arc::new(compiled))),
                        Err(refusal) => {
                            tracing::warn!(secret = %slot.name, %refusal, "validation context does not fit its defaults");
                            None
                        }
                    }
                }
                _ => None,
            },
        }
    }
}

/// Defaults are only compiled together with their secret; what is wrong with them alone must be said now. They may lack
/// the authority that the secret brings.
fn check_default(default: &tls::CertificateValidationContext) -> Result<(), Refusal> {
    let mut alone = default.clone();
    alone.crl = None;
    let names = std::mem::take(&mut alone.match_typed_subject_alt_names);
    let old_names = std::mem::take(&mut alone.match_subject_alt_names);
    Validation::compile(&alone)
        .and_then(|_| Validation::check_names(&names, &old_names))
        .within("default_validation_context")
}

fn compile_parameters(
    from: &tls::TlsParameters,
) -> Result<(CryptoProvider, Vec<&'static SupportedProtocolVersion>), Refusal> {
    use tls::tls_parameters::TlsProtocol;
    if !from.signature_algorithms.is_empty() {
        return Err(Refusal::new("signature_algorithms", "not supported"));
    }
    if !from.compliance_policies.is_empty() {
        return Err(Refusal::new("compliance_policies", "not supported"));
    }
    let version = |number: i32, field: &str, auto: u8| match TlsProtocol::try_from(number) {
        Ok(TlsProtocol::TlsAuto) => Ok(auto),
        Ok(TlsProtocol::TlSv12) => Ok(2),
        Ok(TlsProtocol::TlSv13) => Ok(3),
        Ok(TlsProtocol::TlSv10 | TlsProtocol::TlSv11) => {
            Err(Refusal::new(field, "TLS 1.0 and 1.1 are not supported"))
        }
        Err(_) => Err(Refusal::new(field, format!("{number} is unknown"))),
    };
    let least = version(
        from.tls_minimum_protocol_version,
        "tls_minimum_protocol_version",
        2,
    )?;
    let most = version(
        from.tls_maximum_protocol_version,
        "tls_maximum_protocol_version",
        3,
    )?;
    let versions: Vec<_> = [(2, &rustls::version::TLS12), (3, &rustls::version::TLS13)]
        .into_iter()
        .filter(|(number, _)| (least..=most).contains(number))
        .map(|(_, version)| version)
        .collect();
    if versions.is_empty() {
        return Err(Refusal::new(
            "tls_minimum_protocol_version",
            "is above the maximum",
        ));
    }
    let mut provider = aws_lc_rs::default_provider();
    if !from.cipher_suites.is_empty() {
        provider.cipher_suites = chosen_suites(&from.cipher_suites).within("cipher_suites")?;
    }
    provider.kx_groups = if from.ecdh_curves.is_empty() {
        use aws_lc_rs::kx_group::{SECP256R1, SECP384R1, X25519, X25519MLKEM768};
        vec![X25519MLKEM768, X25519, SECP256R1, SECP384R1]
    } else {
        chosen_groups(&from.ecdh_curves).within("ecdh_curves")?
    };
    Ok((provider, versions))
}

/// Suites by OpenSSL's names; `[A|B]` are equal alternatives. As in Envoy the list rules TLS 1.2 only.
fn chosen_suites(names: &[String]) -> Result<Vec<SupportedCipherSuite>, Refusal> {
    /// What BoringSSL has and rustls has not: static RSA and CBC.
    const LEFT_OUT: [&str; 10] = [
        "AES128-GCM-SHA256",
        "AES256-GCM-SHA384",
        "AES128-SHA",
        "AES256-SHA",
        "ECDHE-ECDSA-AES128-SHA",
        "ECDHE-RSA-AES128-SHA",
        "ECDHE-ECDSA-AES256-SHA",
        "ECDHE-RSA-AES256-SHA",
        "ECDHE-RSA-AES128-SHA256",
        "DES-CBC3-SHA",
    ];
    let all = aws_lc_rs::ALL_CIPHER_SUITES;
    let mut out: Vec<SupportedCipherSuite> = all
        .iter()
        .copied()
        .filter(|suite| suite.tls13().is_some())
        .collect();
    let before = out.len();
    let parts = names
        .iter()
        .flat_map(|name| name.trim_matches(['[', ']']).split(['|', ':']));
    for name in parts {
        match all.iter().find(|suite| cipher_name(suite.suite()) == name) {
            Some(suite) if suite.tls13().is_none() => out.push(*suite),
            Some(_) => {}
            None if LEFT_OUT.contains(&name) => {}
            None => return Err(Refusal::new("", format!("{name} is unknown"))),
        }
    }
    if out.len() == before {
        return Err(Refusal::new("", "none of these suites is supported"));
    }
    Ok(out)
}

fn chosen_groups(names: &[String]) -> Result<Vec<&'static dyn rustls::crypto::SupportedKxGroup>, Refusal> {
    use aws_lc_rs::kx_group::{SECP256R1, SECP384R1, X25519, X25519MLKEM768};
    let mut out: Vec<&'static dyn rustls::crypto::SupportedKxGroup> = Vec::new();
    for name in names.iter().flat_map(|name| name.split(':')) {
        out.push(match name {
            "X25519MLKEM768" => X25519MLKEM768,
            "X25519" => X25519,
            "P-256" => SECP256R1,
            "P-384" => SECP384R1,
            "P-521" | "X25519Kyber768Draft00" => continue,
            other => return Err(Refusal::new("", format!("{other} is unknown"))),
        });
    }
    if out.is_empty() {
        return Err(Refusal::new("", "none of these curves is supported"));
    }
    Ok(out)
}

/// OpenSSL's name of a suite.
pub(super) fn cipher_name(suite: CipherSuite) -> &'static str {
    match suite {
        CipherSuite::TLS13_AES_128_GCM_SHA256 => "TLS_AES_128_GCM_SHA256",
        CipherSuite::TLS13_AES_256_GCM_SHA384 => "TLS_AES_256_GCM_SHA384",
        CipherSuite::TLS13_CHACHA20_POLY1305_SHA256 => "TLS_CHACHA20_POLY1305_SHA256",
        CipherSuite::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256 => "ECDHE-ECDSA-AES128-GCM-SHA256",
        CipherSuite::TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384 => "ECDHE-ECDSA-AES256-GCM-SHA384",
        CipherSuite::TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256 => "ECDHE-ECDSA-CHACHA20-POLY1305",
        CipherSuite::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256 => "ECDHE-RSA-AES128-GCM-SHA256",
        CipherSuite::TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384 => "ECDHE-RSA-AES256-GCM-SHA384",
        CipherSuite::TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256 => "ECDHE-RSA-CHACHA20-POLY1305",
        _ => "UNKNOWN",
    }
}

/// The usual name of a group.
pub(super) fn group_name(group: NamedGroup) -> &'static str {
    match group {
        NamedGroup::X25519MLKEM768 => "X25519MLKEM768",
        NamedGroup::X25519 => "X25519",
        NamedGroup::secp256r1 => "P-256",
        NamedGroup::secp384r1 => "P-384",
        _ => "unknown",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn suites_that_nobody_should_use_are_passed_over_and_unknown_ones_refused() {
        let names = |list: &[&str]| list.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        let suites = chosen_suites(&names(&["[ECDHE-RSA-AES128-GCM-SHA256|AES128-SHA]"])).unwrap();
        let tls12: Vec<_> = suites.iter().filter(|suite| suite.tls13().is_none()).collect();
        assert_eq!(tls12.len(), 1);
        assert!(chosen_suites(&names(&["AES128-SHA"])).is_err());
        assert!(chosen_suites(&names(&["ROT13"])).is_err());
    }

    #[test]
    fn versions_before_1_2_are_refused_and_the_default_is_1_2_and_1_3() {
        use tls::tls_parameters::TlsProtocol;
        let (provider, versions) = compile_parameters(&tls::TlsParameters::default()).unwrap();
        assert_eq!(versions.len(), 2);
        assert_eq!(provider.kx_groups[0].name(), NamedGroup::X25519MLKEM768);
        let old = tls::TlsParameters {
            tls_minimum_protocol_version: TlsProtocol::TlSv11 as i32,
            ..Default::default()
        };
        assert_eq!(
            compile_parameters(&old).unwrap_err().path,
            "tls_minimum_protocol_version"
        );
    }
}
