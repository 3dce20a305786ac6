//! A self-signed authority with a serving certificate, and kubeconfig files.

use std::net::IpAddr;
use std::sync::Arc;

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, SanType,
};
use rustls::ServerConfig;
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};

use crate::error::Error;

/// An authority and a certificate for serving, as PEM. Keep it with the cluster so that kubeconfig files stay valid.
#[derive(Clone)]
pub struct Certificates {
    /// Certificate of the authority, for clients.
    pub authority_pem: String,
    /// Serving certificate.
    pub certificate_pem: String,
    /// Private key of the serving certificate.
    pub key_pem: String,
}

impl std::fmt::Debug for Certificates {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Certificates").finish_non_exhaustive()
    }
}

fn failed(action: &'static str) -> impl FnOnce(rcgen::Error) -> Error {
    move |error| Error::Certificate {
        action,
        reason: error.to_string(),
    }
}

impl Certificates {
    /// Make a new authority and a certificate for these addresses, besides `localhost`, `kubernetes` and its longer names.
    /// The authority's key is not kept: it can sign nothing else.
    pub fn generate(cluster: &str, addresses: &[IpAddr]) -> Result<Self, Error> {
        let name = |common: String| {
            let mut name = DistinguishedName::new();
            name.push(DnType::CommonName, common);
            name
        };
        let authority_key = KeyPair::generate().map_err(failed("making the key of the authority"))?;
        let mut authority = CertificateParams::default();
        authority.distinguished_name = name(format!("serin-{cluster}-ca"));
        authority.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        authority.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
        let authority_certificate = authority
            .self_signed(&authority_key)
            .map_err(failed("signing the authority"))?;
        let issuer = Issuer::from_params(&authority, &authority_key);
        let key = KeyPair::generate().map_err(failed("making the serving key"))?;
        let mut serving = CertificateParams::new(vec![
            "localhost".to_owned(),
            "kubernetes".to_owned(),
            "kubernetes.default".to_owned(),
            "kubernetes.default.svc".to_owned(),
            "kubernetes.default.svc.cluster.local".to_owned(),
        ])
        .map_err(failed("naming the serving certificate"))?;
        serving.distinguished_name = name("serin-apiserver".to_owned());
        serving
            .subject_alt_names
            .extend(addresses.iter().map(|a| SanType::IpAddress(*a)));
        serving.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        serving.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        serving.use_authority_key_identifier_extension = true;
        let certificate = serving
            .signed_by(&key, &issuer)
            .map_err(failed("signing the serving certificate"))?;
        Ok(Self {
            authority_pem: authority_certificate.pem(),
            certificate_pem: certificate.pem(),
            key_pem: key.serialize_pem(),
        })
    }

    pub(crate) fn server_config(&self) -> Result<Arc<ServerConfig>, Error> {
        let bad = |reason: String| Error::Certificate {
            action: "reading the serving certificate",
            reason,
        };
        let chain: Vec<CertificateDer<'static>> =
            CertificateDer::pem_slice_iter(self.certificate_pem.as_bytes())
                .collect::<Result<_, _>>()
                .map_err(|e| bad(e.to_string()))?;
        let key = PrivateKeyDer::from_pem_slice(self.key_pem.as_bytes()).map_err(|e| bad(e.to_string()))?;
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|e| bad(e.to_string()))?
            .with_no_client_auth()
            .with_single_cert(chain, key)
            .map_err(|e| bad(e.to_string()))?;
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Ok(Arc::new(config))
    }
}

/// A kubeconfig file with one cluster, user and context of the given name.
pub fn kubeconfig(cluster: &str, server: std::net::SocketAddr, authority_pem: &str, token: &str) -> String {
    use base64::Engine as _;
    let authority = base64::engine::general_purpose::STANDARD.encode(authority_pem);
    let quote = |s: &str| serde_json::Value::String(s.to_owned()).to_string();
    let name = quote(cluster);
    format!(
        "apiVersion: v1\nkind: Config\ncurrent-context: {name}\nclusters:\n- name: {name}\n  cluster:\n    server: https://{server}\n    certificate-authority-data: {authority}\nusers:\n- name: {name}\n  user:\n    token: {}\ncontexts:\n- name: {name}\n  context:\n    cluster: {name}\n    user: {name}\n",
        quote(token)
    )
}
