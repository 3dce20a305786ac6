//! Authorities and certificates, made for each test, and the messages that carry them.

use std::sync::Arc;
use std::time::Duration;

use prost::{Message, Name};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose, RevokedCertParams, SanType,
    SerialNumber,
};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::envoy::extensions::transport_sockets::tls::v3 as tls;
use serin_xds::pb::envoy::r#type::matcher::v3 as matcher;
use serin_xds::pb::google::protobuf as google;

use super::fixture::any;

/// An authority that signs.
pub(crate) struct Authority {
    params: CertificateParams,
    key: KeyPair,
    pub(crate) pem: String,
}

/// A certificate with its key.
#[derive(Clone)]
pub(crate) struct Issued {
    pub(crate) chain: String,
    pub(crate) key: String,
    pub(crate) serial: Vec<u8>,
}

impl Issued {
    pub(crate) fn der(&self) -> (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>) {
        (
            CertificateDer::pem_slice_iter(self.chain.as_bytes())
                .collect::<Result<_, _>>()
                .unwrap(),
            PrivateKeyDer::from_pem_slice(self.key.as_bytes()).unwrap(),
        )
    }

    pub(crate) fn message(&self) -> tls::TlsCertificate {
        tls::TlsCertificate {
            certificate_chain: inline(&self.chain),
            private_key: inline(&self.key),
            ..Default::default()
        }
    }

    pub(crate) fn secret(&self, name: &str) -> tls::Secret {
        tls::Secret {
            name: name.into(),
            r#type: Some(tls::secret::Type::TlsCertificate(self.message())),
        }
    }
}

pub(crate) fn inline(text: &str) -> Option<core::DataSource> {
    Some(core::DataSource {
        specifier: Some(core::data_source::Specifier::InlineString(text.into())),
        ..Default::default()
    })
}

impl Authority {
    pub(crate) fn new(name: &str) -> Self {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let key = KeyPair::generate().unwrap();
        let pem = params.self_signed(&key).unwrap().pem();
        Self { params, key, pem }
    }

    /// A certificate for these names: a SPIFFE id if there is a `://` in it.
    pub(crate) fn issue(&self, names: &[&str]) -> Issued {
        self.issue_with(names, |_| {})
    }

    /// One that has expired.
    pub(crate) fn issue_expired(&self, names: &[&str]) -> Issued {
        self.issue_with(names, |params| {
            params.not_before = rcgen::date_time_ymd(2020, 1, 1);
            params.not_after = rcgen::date_time_ymd(2020, 2, 1);
        })
    }

    pub(crate) fn issue_with(&self, names: &[&str], change: impl FnOnce(&mut CertificateParams)) -> Issued {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = names
            .iter()
            .map(|name| {
                if name.contains("://") {
                    SanType::URI((*name).try_into().unwrap())
                } else {
                    SanType::DnsName((*name).try_into().unwrap())
                }
            })
            .collect();
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        let mut serial = [0; 8];
        aws_lc_rs::rand::fill(&mut serial).unwrap();
        serial[0] &= 0x7f;
        serial[0] |= 0x01;
        params.serial_number = Some(SerialNumber::from(serial.to_vec()));
        change(&mut params);
        let key = KeyPair::generate().unwrap();
        let issuer = Issuer::from_params(&self.params, &self.key);
        let made = params.signed_by(&key, &issuer).unwrap();
        Issued {
            chain: made.pem(),
            key: key.serialize_pem(),
            serial: serial.to_vec(),
        }
    }

    /// A list that revokes these certificates.
    pub(crate) fn revoke(&self, revoked: &[&Issued]) -> String {
        let now = std::time::SystemTime::now();
        let list = CertificateRevocationListParams {
            this_update: (now - Duration::from_secs(3600)).into(),
            next_update: (now + Duration::from_secs(3600)).into(),
            crl_number: SerialNumber::from(1u64),
            issuing_distribution_point: None,
            revoked_certs: revoked
                .iter()
                .map(|issued| RevokedCertParams {
                    serial_number: SerialNumber::from(issued.serial.clone()),
                    revocation_time: (now - Duration::from_secs(60)).into(),
                    reason_code: None,
                    invalidity_date: None,
                })
                .collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        let issuer = Issuer::from_params(&self.params, &self.key);
        list.signed_by(&issuer).unwrap().pem().unwrap()
    }

    /// The authority as a validation context.
    pub(crate) fn context(&self) -> tls::CertificateValidationContext {
        tls::CertificateValidationContext {
            trusted_ca: inline(&self.pem),
            ..Default::default()
        }
    }

    /// A client of rustls that believes this authority.
    pub(crate) fn client(&self) -> ClientBuilder {
        let mut roots = rustls::RootCertStore::empty();
        for der in CertificateDer::pem_slice_iter(self.pem.as_bytes()) {
            roots.add(der.unwrap()).unwrap();
        }
        ClientBuilder {
            roots,
            identity: None,
            alpn: Vec::new(),
            versions: vec![&rustls::version::TLS13, &rustls::version::TLS12],
        }
    }
}

/// What a client of rustls is made of.
#[derive(Clone)]
pub(crate) struct ClientBuilder {
    roots: rustls::RootCertStore,
    identity: Option<Issued>,
    alpn: Vec<Vec<u8>>,
    versions: Vec<&'static rustls::SupportedProtocolVersion>,
}

impl ClientBuilder {
    pub(crate) fn identity(mut self, issued: &Issued) -> Self {
        self.identity = Some(issued.clone());
        self
    }

    pub(crate) fn alpn(mut self, names: &[&str]) -> Self {
        self.alpn = names.iter().map(|name| name.as_bytes().to_vec()).collect();
        self
    }

    pub(crate) fn only(mut self, version: &'static rustls::SupportedProtocolVersion) -> Self {
        self.versions = vec![version];
        self
    }

    /// A client that believes any server: what is tested is whom the server believes.
    pub(crate) fn build_unverified(self) -> Arc<rustls::ClientConfig> {
        let mut config = Arc::unwrap_or_clone(self.build());
        config
            .dangerous()
            .set_certificate_verifier(Arc::new(AnyServer(provider())));
        Arc::new(config)
    }

    pub(crate) fn build(self) -> Arc<rustls::ClientConfig> {
        let builder = rustls::ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&self.versions)
            .unwrap()
            .with_root_certificates(self.roots);
        let mut config = match self.identity {
            None => builder.with_no_client_auth(),
            Some(issued) => {
                let (chain, key) = issued.der();
                builder.with_client_auth_cert(chain, key).unwrap()
            }
        };
        config.alpn_protocols = self.alpn;
        Arc::new(config)
    }
}

#[derive(Debug)]
struct AnyServer(Arc<rustls::crypto::CryptoProvider>);

impl rustls::client::danger::ServerCertVerifier for AnyServer {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &rustls::pki_types::ServerName<'_>,
        _: &[u8],
        _: rustls::pki_types::UnixTime,
    ) -> Result<rustls::client::danger::ServerCertVerified, rustls::Error> {
        Ok(rustls::client::danger::ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Ok(rustls::client::danger::HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Ok(rustls::client::danger::HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

pub(crate) fn provider() -> Arc<rustls::crypto::CryptoProvider> {
    let mut provider = rustls::crypto::aws_lc_rs::default_provider();
    use rustls::crypto::aws_lc_rs::kx_group::{X25519, X25519MLKEM768};
    provider.kx_groups = vec![X25519MLKEM768, X25519];
    Arc::new(provider)
}

pub(crate) fn validation_secret(name: &str, context: tls::CertificateValidationContext) -> tls::Secret {
    tls::Secret {
        name: name.into(),
        r#type: Some(tls::secret::Type::ValidationContext(context)),
    }
}

/// A reference to a secret that the control plane brings.
pub(crate) fn by_sds(name: &str) -> tls::SdsSecretConfig {
    tls::SdsSecretConfig {
        name: name.into(),
        sds_config: Some(core::ConfigSource {
            config_source_specifier: Some(core::config_source::ConfigSourceSpecifier::Ads(
                core::AggregatedConfigSource {},
            )),
            ..Default::default()
        }),
    }
}

pub(crate) fn named(kind: tls::subject_alt_name_matcher::SanType, name: &str) -> tls::SubjectAltNameMatcher {
    tls::SubjectAltNameMatcher {
        san_type: kind as i32,
        matcher: Some(matcher::StringMatcher {
            match_pattern: Some(matcher::string_matcher::MatchPattern::Exact(name.into())),
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// Only this SPIFFE id is believed.
pub(crate) fn only_uri(
    mut context: tls::CertificateValidationContext,
    id: &str,
) -> tls::CertificateValidationContext {
    context.match_typed_subject_alt_names = vec![named(tls::subject_alt_name_matcher::SanType::Uri, id)];
    context
}

pub(crate) fn common(
    identity: Option<&Issued>,
    validation: Option<tls::CertificateValidationContext>,
    alpn: &[&str],
) -> tls::CommonTlsContext {
    tls::CommonTlsContext {
        tls_certificates: identity.iter().map(|issued| issued.message()).collect(),
        validation_context_type: validation
            .map(tls::common_tls_context::ValidationContextType::ValidationContext),
        alpn_protocols: alpn.iter().map(|name| (*name).to_owned()).collect(),
        ..Default::default()
    }
}

/// The same from secrets `identity` and `trust` that come by SDS.
pub(crate) fn common_by_sds(identity: &str, trust: Option<&str>, alpn: &[&str]) -> tls::CommonTlsContext {
    tls::CommonTlsContext {
        tls_certificate_sds_secret_configs: vec![by_sds(identity)],
        validation_context_type: trust.map(|name| {
            tls::common_tls_context::ValidationContextType::ValidationContextSdsSecretConfig(by_sds(name))
        }),
        alpn_protocols: alpn.iter().map(|name| (*name).to_owned()).collect(),
        ..Default::default()
    }
}

pub(crate) fn server_socket(common: tls::CommonTlsContext, mutual: bool) -> Option<core::TransportSocket> {
    socket(&tls::DownstreamTlsContext {
        common_tls_context: Some(common),
        require_client_certificate: Some(google::BoolValue { value: mutual }),
        ..Default::default()
    })
}

pub(crate) fn client_socket(common: tls::CommonTlsContext, sni: &str) -> Option<core::TransportSocket> {
    socket(&tls::UpstreamTlsContext {
        common_tls_context: Some(common),
        sni: sni.into(),
        ..Default::default()
    })
}

pub(crate) fn socket<M: Message + Name>(config: &M) -> Option<core::TransportSocket> {
    Some(core::TransportSocket {
        name: "envoy.transport_sockets.tls".into(),
        config_type: Some(core::transport_socket::ConfigType::TypedConfig(any(config))),
    })
}
