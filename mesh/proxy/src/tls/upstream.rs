//! An `UpstreamTlsContext`, compiled, and the client's handshake.

use std::io;
use std::net::IpAddr;
use std::sync::Arc;

use rustls::client::Resumption;
use rustls::sign::SingleCertAndKey;
use rustls::{CertificateError, ClientConfig, HandshakeKind};
use rustls_pki_types::ServerName;
use serin_xds::pb::envoy::extensions::transport_sockets::tls::v3 as tls;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::certificate::Certificate;
use super::context::Common;
use super::downstream::{count_failure, expired_meanwhile};
use super::info::{ConnectionTls, Part};
use super::rebuilt::Rebuilt;
use super::secret::SecretSlot;
use super::stats::{TlsStats, count};
use super::table::SecretTable;
use super::validation::dns_matches;
use super::verify::Verifier;
use crate::error::{Refusal, Within};

/// Server names whose sessions are kept when nothing is said; Envoy keeps one session.
const SESSIONS: usize = 32;

/// What a connection will carry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Speaking {
    /// Anything.
    Bytes,
    /// HTTP/1.1.
    Http1,
    /// HTTP/2.
    Http2,
    /// One of the two, as ALPN decides.
    Either,
}

/// See the module.
#[derive(Debug)]
pub struct UpstreamTls {
    common: Common,
    server_name: Option<Box<str>>,
    /// The endpoint's host name is the server name.
    pub auto_host_sni: bool,
    check_name: bool,
    sessions: usize,
    stats: Arc<TlsStats>,
    built: Rebuilt<Built>,
}

#[derive(Debug)]
struct Built {
    config: Arc<ClientConfig>,
    local: Option<Arc<Certificate>>,
    validates: bool,
}

impl UpstreamTls {
    /// Compiles the message. `check_name` asks that the server's certificate is valid for the name that was sent.
    pub fn compile(
        from: &tls::UpstreamTlsContext,
        check_name: bool,
        secrets: &mut SecretTable,
        stats: Arc<TlsStats>,
    ) -> Result<Self, Refusal> {
        if from.allow_renegotiation {
            return Err(Refusal::new("allow_renegotiation", "not supported, and unsafe"));
        }
        let common = from.common_tls_context.clone().unwrap_or_default();
        let common = Common::compile(&common, secrets).within("common_tls_context")?;
        if common
            .slots()
            .filter(|slot| slot.kind == super::secret::Kind::Identity)
            .count()
            > 1
        {
            return Err(Refusal::new(
                "common_tls_context.tls_certificates",
                "a client has one certificate",
            ));
        }
        if let Err(error) = ServerName::try_from(from.sni.as_str())
            && !from.sni.is_empty()
        {
            return Err(Refusal::new("sni", format!("{:?}: {error}", from.sni)));
        }
        Ok(Self {
            common,
            server_name: Some(from.sni.as_str())
                .filter(|name| !name.is_empty())
                .map(Box::from),
            auto_host_sni: from.auto_host_sni,
            check_name: check_name || from.auto_sni_san_validation,
            sessions: from
                .max_session_keys
                .as_ref()
                .map_or(SESSIONS, |keys| keys.value as usize),
            stats,
            built: Rebuilt::default(),
        })
    }

    /// The slots of its secrets.
    pub fn secrets(&self) -> impl Iterator<Item = &Arc<SecretSlot>> {
        self.common.slots()
    }

    /// What is offered instead of the context's protocols: those that fit what will be spoken, or what stands for it
    /// where the context has none.
    fn alpn_for(&self, speaking: Speaking) -> Option<Vec<Vec<u8>>> {
        const H2: &[u8] = b"h2";
        const HTTP1: &[u8] = b"http/1.1";
        let without = |other: &[u8]| {
            let fits: Vec<_> = self
                .common
                .alpn
                .iter()
                .filter(|name| *name != other)
                .cloned()
                .collect();
            (fits.len() < self.common.alpn.len()).then_some(fits)
        };
        let fallback = |list: &[&[u8]]| Some(list.iter().map(|name| name.to_vec()).collect());
        match (speaking, self.common.alpn.is_empty()) {
            (Speaking::Bytes, _) | (Speaking::Either, false) => None,
            (Speaking::Http1, true) => fallback(&[HTTP1]),
            (Speaking::Http2, true) => fallback(&[H2]),
            (Speaking::Either, true) => fallback(&[H2, HTTP1]),
            (Speaking::Http1, false) => without(H2),
            (Speaking::Http2, false) => without(HTTP1),
        }
    }

    fn current(&self) -> Option<Arc<Built>> {
        self.built.current(
            self.common.version(),
            || self.build(),
            || count(&self.stats.context_updated),
        )
    }

    fn build(&self) -> Option<Built> {
        let identities = self.common.identities()?;
        let validation = self.common.validation()?;
        let validates = validation
            .as_ref()
            .is_some_and(|validation| validation.checks_anything());
        let builder = ClientConfig::builder_with_provider(self.common.provider.clone())
            .with_protocol_versions(&self.common.versions)
            .ok()?
            .dangerous()
            // Not less safe than rustls' own: it does the same with more rules, or what the operator asked for.
            .with_custom_certificate_verifier(Arc::new(Verifier {
                validation,
                algorithms: self.common.provider.signature_verification_algorithms,
                stats: self.stats.clone(),
                mandatory: true,
                check_name: self.check_name,
                hints: Vec::new(),
            }));
        let mut config = match identities.first() {
            Some(identity) => {
                let key = rustls::sign::CertifiedKey::clone(&identity.key);
                builder.with_client_cert_resolver(Arc::new(SingleCertAndKey::from(key)))
            }
            None => builder.with_no_client_auth(),
        };
        config.alpn_protocols.clone_from(&self.common.alpn);
        config.resumption = match self.sessions {
            0 => Resumption::disabled(),
            sessions => Resumption::in_memory_sessions(sessions),
        };
        Some(Built {
            config: Arc::new(config),
            local: identities.first().map(|identity| identity.leaf.clone()),
            validates,
        })
    }

    /// Does the client's part of a handshake. The server name is `server_name`, else the context's, else none: then
    /// sessions are kept by `address`. `alpn` is offered instead of what the context says. The caller bounds the time.
    pub async fn connect<S>(
        &self,
        stream: S,
        server_name: Option<&str>,
        address: IpAddr,
        speaking: Speaking,
        alpn: Option<&[Vec<u8>]>,
    ) -> io::Result<(TlsStream<S>, ConnectionTls)>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let Some(built) = self.current() else {
            count(&self.stats.secrets_not_ready);
            return Err(io::Error::other(
                "TLS_error: the secrets of the cluster have not arrived yet",
            ));
        };
        let wanted = server_name.or(self.server_name.as_deref());
        let name = match wanted {
            None => ServerName::from(address),
            Some(name) => ServerName::try_from(name.to_owned())
                .map_err(|_| io::Error::other(format!("TLS_error: {name:?} cannot be a server name")))?,
        };
        let sent = match &name {
            ServerName::DnsName(name) => Some(Box::from(name.as_ref())),
            _ => None,
        };
        let connector = TlsConnector::from(built.config.clone());
        let offered = alpn.map_or_else(|| self.alpn_for(speaking), |names| Some(names.to_vec()));
        let result = match offered {
            Some(alpn) => connector.with_alpn(alpn).connect(name, stream).await,
            None => connector.connect(name, stream).await,
        };
        let stream = result.map_err(|error| {
            count_failure(&self.stats, &error);
            readable(error)
        })?;
        let connection = stream.get_ref().1;
        let facts = ConnectionTls::of(
            Part::Client,
            connection,
            sent,
            built.validates,
            built.local.clone(),
        );
        if connection.handshake_kind() == Some(HandshakeKind::Resumed) {
            expired_meanwhile(facts.peer.as_deref(), &self.stats)?;
            count(&self.stats.session_reused);
        }
        count(&self.stats.handshake);
        self.stats.negotiated(facts.version, facts.cipher, facts.group);
        Ok((stream, facts))
    }
}

impl UpstreamTls {
    /// Whether the peer of a connection that was made has one of these names, separated by commas, in its certificate.
    pub fn must_be(&self, facts: &ConnectionTls, names: &str) -> io::Result<()> {
        let known = facts.peer.as_ref().filter(|_| facts.peer_validated);
        let has = |name: &str| {
            known.is_some_and(|peer| {
                peer.uri_sans.iter().any(|san| **san == *name)
                    || peer.dns_sans.iter().any(|san| dns_matches(san, name))
                    || peer.ip_sans.iter().any(|san| name.parse() == Ok(*san))
            })
        };
        if names.split(',').any(has) {
            return Ok(());
        }
        count(&self.stats.fail_verify_san);
        Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            format!(
                "TLS_error: CERTIFICATE_VERIFY_FAILED: the certificate has none of the names {names} that the filter state asks for"
            ),
        ))
    }
}

/// The reason of our verifier, or what rustls said, in the form that operators know from Envoy.
fn readable(error: io::Error) -> io::Error {
    let text = match error
        .get_ref()
        .and_then(|inner| inner.downcast_ref::<rustls::Error>())
    {
        Some(rustls::Error::InvalidCertificate(CertificateError::Other(reason))) => reason.to_string(),
        Some(rustls::Error::InvalidCertificate(reason)) => {
            let text = match reason {
                CertificateError::Expired => "certificate has expired".to_owned(),
                CertificateError::Revoked => "certificate revoked".to_owned(),
                CertificateError::UnknownIssuer => "unable to get local issuer certificate".to_owned(),
                other => other.to_string(),
            };
            format!("CERTIFICATE_VERIFY_FAILED: {text}")
        }
        Some(other) => other.to_string(),
        None => error.to_string(),
    };
    io::Error::new(error.kind(), format!("TLS_error: {text}"))
}
