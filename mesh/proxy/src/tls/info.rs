//! What a TLS connection was negotiated to and who is at its other end.

use std::sync::Arc;

use rustls_pki_types::CertificateDer;

use super::certificate::Certificate;

/// The facts of an established TLS connection. Shared by everything that happens on it: access policies
/// (`authenticated.principal_name`), headers (`x-forwarded-client-cert`), metrics (`source_principal`,
/// `connection_security_policy`) and logs (`DOWNSTREAM_TLS_VERSION`, `DOWNSTREAM_PEER_URI_SAN`, …).
#[derive(Clone, Debug)]
pub struct ConnectionTls {
    /// The server name that the client asked for, lower case.
    pub server_name: Option<Box<str>>,
    /// The application protocol agreed on.
    pub alpn: Option<Box<str>>,
    /// `TLSv1.2` or `TLSv1.3`.
    pub version: &'static str,
    /// The cipher suite, as OpenSSL names it.
    pub cipher: &'static str,
    /// The key exchange group, as IANA names it.
    pub group: &'static str,
    /// Whether an earlier session was resumed.
    pub resumed: bool,
    /// The peer's certificate, where it gave one.
    pub peer: Option<Arc<Certificate>>,
    /// Whether the peer's certificate was verified against a trusted authority, hash or key.
    pub peer_validated: bool,
    /// The whole chain that the peer sent, its own certificate first.
    pub peer_chain: Arc<[CertificateDer<'static>]>,
    /// Our own certificate.
    pub local: Option<Arc<Certificate>>,
}

impl ConnectionTls {
    /// Whether both sides have shown a certificate and the peer's was verified.
    pub fn is_mutual(&self) -> bool {
        self.peer.is_some() && self.peer_validated
    }

    /// Who the peer is, if it has proved it: see [`Certificate::principal`].
    pub fn peer_principal(&self) -> Option<&str> {
        self.peer
            .as_deref()
            .filter(|_| self.peer_validated)
            .map(Certificate::principal)
    }

    /// Who we are on this connection.
    pub fn local_principal(&self) -> Option<&str> {
        self.local.as_deref().map(Certificate::principal)
    }
}
