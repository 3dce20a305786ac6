//! What a TLS connection was negotiated to and who is at its other end.

use std::sync::Arc;

use rustls_pki_types::CertificateDer;

use super::certificate::Certificate;
use super::context::{cipher_name, group_name};
use crate::metrics::peer::Principals;

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
    /// Who both sides are, for metrics; only with mutual TLS.
    pub principals: Option<Arc<Principals>>,
}

/// Our part in a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    /// We accepted it.
    Server,
    /// We made it.
    Client,
}

impl ConnectionTls {
    /// Of a handshake that is over. `validates` says whether the peer's certificate was checked at all.
    pub(super) fn of(
        part: Part,
        state: &rustls::CommonState,
        server_name: Option<Box<str>>,
        validates: bool,
        local: Option<Arc<Certificate>>,
    ) -> Self {
        let chain = state.peer_certificates().unwrap_or_default();
        // rustls has read it; a certificate that we cannot read has no names, so it stands for nobody.
        let peer = chain
            .first()
            .and_then(|leaf| Certificate::parse(leaf).ok())
            .map(Arc::new);
        let mut out = Self {
            server_name,
            alpn: state
                .alpn_protocol()
                .map(|name| String::from_utf8_lossy(name).into()),
            version: match state.protocol_version() {
                Some(rustls::ProtocolVersion::TLSv1_2) => "TLSv1.2",
                Some(rustls::ProtocolVersion::TLSv1_3) => "TLSv1.3",
                _ => "unknown",
            },
            cipher: state
                .negotiated_cipher_suite()
                .map_or("UNKNOWN", |suite| cipher_name(suite.suite())),
            group: state
                .negotiated_key_exchange_group()
                .map_or("unknown", |group| group_name(group.name())),
            resumed: state.handshake_kind() == Some(rustls::HandshakeKind::Resumed),
            peer_validated: validates && peer.is_some(),
            peer,
            peer_chain: chain.into(),
            local,
            principals: None,
        };
        if out.is_mutual()
            && let (Some(peer), Some(local)) = (out.peer_principal(), out.local_principal())
        {
            out.principals = Some(match part {
                Part::Server => Principals::new(peer, local),
                Part::Client => Principals::new(local, peer),
            });
        }
        out
    }

    /// Whether both sides have shown a certificate and the peer's was verified.
    pub fn is_mutual(&self) -> bool {
        self.peer.is_some() && self.peer_validated && self.local.is_some()
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
