//! The verifiers that rustls asks, for both sides.

use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{WebPkiSupportedAlgorithms, verify_tls12_signature, verify_tls13_signature};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, OtherError, SignatureScheme,
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use webpki::{EndEntityCert, KeyUsage};

use super::stats::{TlsStats, count};
use super::validation::{Unverified, Validation};

/// Verifies peers by a [`Validation`]; counts what fails.
#[derive(Debug)]
pub struct Verifier {
    /// Without one every peer is believed.
    pub validation: Option<Arc<Validation>>,
    /// Signatures that are understood.
    pub algorithms: WebPkiSupportedAlgorithms,
    /// Counters of the listener or cluster.
    pub stats: Arc<TlsStats>,
    /// Servers only: a client without a certificate is refused.
    pub mandatory: bool,
    /// Clients only: the server's certificate must also be valid for the name that was asked for.
    pub check_name: bool,
    /// Servers only: authorities named to clients.
    pub hints: Vec<DistinguishedName>,
}

impl Verifier {
    fn check(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        usage: KeyUsage,
        now: UnixTime,
    ) -> Result<(), Error> {
        let Some(validation) = &self.validation else {
            return Ok(());
        };
        validation
            .verify(leaf, intermediates, usage, self.algorithms.all, now)
            .map_err(|failure| self.failed(failure))
    }

    fn failed(&self, failure: Unverified) -> Error {
        let (counter, kind) = match &failure {
            Unverified::Chain(reason) => (&self.stats.fail_verify_error, alert_of(reason)),
            Unverified::San(_) => (&self.stats.fail_verify_san, None),
            Unverified::Hash => (&self.stats.fail_verify_cert_hash, None),
        };
        count(counter);
        tracing::debug!(%failure, "peer not verified");
        Error::InvalidCertificate(
            kind.unwrap_or_else(|| CertificateError::Other(OtherError(Arc::new(failure)))),
        )
    }
}

/// The error whose alert tells the peer most; the reason is logged and counted by us.
fn alert_of(reason: &str) -> Option<CertificateError> {
    let starts = |text: &str| reason.starts_with(text);
    if starts("certificate has expired") {
        Some(CertificateError::Expired)
    } else if starts("certificate revoked") {
        Some(CertificateError::Revoked)
    } else if starts("unable to get local issuer") {
        Some(CertificateError::UnknownIssuer)
    } else {
        None
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.check(end_entity, intermediates, KeyUsage::server_auth(), now)?;
        if self.check_name {
            EndEntityCert::try_from(end_entity)
                .and_then(|certificate| certificate.verify_is_valid_for_subject_name(server_name))
                .map_err(|_| {
                    self.failed(Unverified::San(format!("not valid for {}", server_name.to_str())))
                })?;
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, cert, dss, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

impl ClientCertVerifier for Verifier {
    fn client_auth_mandatory(&self) -> bool {
        self.mandatory
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &self.hints
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.check(end_entity, intermediates, KeyUsage::client_auth(), now)?;
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, cert, dss, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}
