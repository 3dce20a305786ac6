//! What policies may look at: the connection, who is at its other end, the request, and what filters have said before.

use std::net::SocketAddr;

use super::metadata::Metadata;
use crate::config::matchers::{HeaderMatch, RequestView};
use crate::tls::info::ConnectionTls;

/// What the peer's certificate says, after it was verified.
#[derive(Clone, Copy, Debug)]
pub struct PeerIdentity<'a> {
    /// URI names, in the certificate's order; in a mesh the first one is the SPIFFE identity.
    pub uri_sans: &'a [Box<str>],
    /// DNS names.
    pub dns_sans: &'a [Box<str>],
    /// Subject, as RFC 2253 writes it.
    pub subject: &'a str,
}

impl<'a> PeerIdentity<'a> {
    /// Who is at the other end of a connection; nobody without a certificate that was verified.
    pub fn of(tls: &'a ConnectionTls) -> Option<Self> {
        let certificate = tls.peer.as_deref().filter(|_| tls.peer_validated)?;
        Some(Self {
            uri_sans: &certificate.uri_sans,
            dns_sans: &certificate.dns_sans,
            subject: &certificate.subject,
        })
    }

    /// The name that stands for the peer: first URI name, else first DNS name, else subject (Envoy's order).
    pub fn principal(&self) -> &'a str {
        self.uri_sans
            .first()
            .or(self.dns_sans.first())
            .map_or(self.subject, |name| name)
    }
}

/// See the module.
#[derive(Clone, Copy, Debug)]
pub struct Facts<'a> {
    /// Who opened the connection to us.
    pub direct_remote: SocketAddr,
    /// Who opened it in the first place, by the PROXY protocol where a listener believes it.
    pub source: SocketAddr,
    /// Where it wanted to go.
    pub local: SocketAddr,
    /// Server name of the TLS handshake.
    pub server_name: Option<&'a str>,
    /// The verified peer, if there is one.
    pub peer: Option<PeerIdentity<'a>>,
    /// The request; absent for network filters.
    pub request: Option<RequestView<'a>>,
    /// The client: who opened the connection, or whom a trusted hop names (without a port).
    pub remote: SocketAddr,
    /// What filters have said.
    pub metadata: &'a Metadata,
}

impl Facts<'_> {
    /// Whether the request has such a field.
    pub fn has(&self, field: &HeaderMatch) -> bool {
        self.request
            .as_ref()
            .is_some_and(|request| field.matches(request))
    }

    /// The path of the request.
    pub fn path(&self) -> Option<&str> {
        self.request.as_ref().map(|request| request.path)
    }
}
