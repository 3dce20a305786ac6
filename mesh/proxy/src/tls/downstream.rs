//! A `DownstreamTlsContext`, compiled, and the server's handshake.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use rustls::server::{ClientHello, NoServerSessionStorage, ProducesTickets, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::{HandshakeKind, ServerConfig};
use serin_xds::pb::envoy::extensions::transport_sockets::tls::v3 as tls;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::LazyConfigAcceptor;
use tokio_rustls::server::TlsStream;

use super::certificate::Certificate;
use super::context::Common;
use super::info::{ConnectionTls, Part};
use super::rebuilt::Rebuilt;
use super::secret::{Identity, Kind, Secret, SecretSlot};
use super::stats::{TlsStats, count};
use super::table::SecretTable;
use super::tickets::Ticketer;
use super::validation::dns_matches;
use super::verify::Verifier;
use crate::config::convert::{self, required};
use crate::error::{Refusal, Within};

/// Seconds for which a ticket is good when nothing is said.
const TICKET_LIFETIME: u32 = 12 * 60 * 60;

/// How sessions are resumed without state.
#[derive(Debug)]
enum Tickets {
    Off,
    Own,
    Given(Arc<SecretSlot>),
}

/// See the module.
#[derive(Debug)]
pub struct DownstreamTls {
    common: Common,
    require_certificate: bool,
    require_sni: bool,
    tickets: Tickets,
    ticket_lifetime: Option<u32>,
    stateful: bool,
    prefer_client_ciphers: bool,
    stats: Arc<TlsStats>,
    built: Rebuilt<Built>,
}

/// What was built from the secrets of one moment.
#[derive(Debug)]
struct Built {
    config: Arc<ServerConfig>,
    /// For clients whose ALPN has nothing in common with ours.
    without_alpn: Arc<ServerConfig>,
    identities: Arc<[Arc<Identity>]>,
    validates: bool,
}

impl DownstreamTls {
    /// Compiles the message. Counters go to `stats`.
    pub fn compile(
        from: &tls::DownstreamTlsContext,
        secrets: &mut SecretTable,
        stats: Arc<TlsStats>,
    ) -> Result<Self, Refusal> {
        use tls::downstream_tls_context::{OcspStaplePolicy, SessionTicketKeysType};
        let common = required(from.common_tls_context.as_ref(), "common_tls_context")?;
        let common = Common::compile(common, secrets).within("common_tls_context")?;
        if !common.has_identity() {
            return Err(Refusal::new(
                "common_tls_context.tls_certificates",
                "a server needs a certificate",
            ));
        }
        if from.ocsp_staple_policy != OcspStaplePolicy::LenientStapling as i32 {
            return Err(Refusal::new(
                "ocsp_staple_policy",
                "only LENIENT_STAPLING is supported",
            ));
        }
        let tickets = match &from.session_ticket_keys_type {
            None | Some(SessionTicketKeysType::DisableStatelessSessionResumption(false)) => Tickets::Own,
            Some(SessionTicketKeysType::DisableStatelessSessionResumption(true)) => Tickets::Off,
            Some(SessionTicketKeysType::SessionTicketKeys(keys)) => Tickets::Given(
                secrets
                    .inline(tls::secret::Type::SessionTicketKeys(keys.clone()))
                    .within("session_ticket_keys")?,
            ),
            Some(SessionTicketKeysType::SessionTicketKeysSdsSecretConfig(config)) => Tickets::Given(
                secrets
                    .reference(config, Kind::Tickets)
                    .within("session_ticket_keys_sds_secret_config")?,
            ),
        };
        let given = |value: &Option<serin_xds::pb::google::protobuf::BoolValue>| {
            value.as_ref().is_some_and(|value| value.value)
        };
        Ok(Self {
            common,
            require_certificate: given(&from.require_client_certificate),
            require_sni: given(&from.require_sni),
            tickets,
            ticket_lifetime: convert::timeout(from.session_timeout.as_ref())
                .within("session_timeout")?
                .map(|limit| u32::try_from(limit.as_secs()).unwrap_or(u32::MAX)),
            stateful: !from.disable_stateful_session_resumption,
            prefer_client_ciphers: from.prefer_client_ciphers,
            stats,
            built: Rebuilt::default(),
        })
    }

    /// The slots of its secrets.
    pub fn secrets(&self) -> impl Iterator<Item = &Arc<SecretSlot>> {
        let tickets = match &self.tickets {
            Tickets::Given(slot) => Some(slot),
            Tickets::Off | Tickets::Own => None,
        };
        self.common.slots().chain(tickets)
    }

    fn version(&self) -> u64 {
        self.secrets().map(|slot| slot.version()).sum()
    }

    fn current(&self) -> Option<Arc<Built>> {
        self.built.current(
            self.version(),
            || self.build(),
            || count(&self.stats.context_updated),
        )
    }

    fn build(&self) -> Option<Built> {
        let identities: Arc<[Arc<Identity>]> = self.common.identities()?.into();
        let validation = self.common.validation()?;
        let mandatory = self.require_certificate
            || validation
                .as_ref()
                .is_some_and(|validation| validation.needs_certificate());
        let asks = mandatory
            || validation
                .as_ref()
                .is_some_and(|validation| validation.checks_anything());
        let validates = validation
            .as_ref()
            .is_some_and(|validation| validation.checks_anything());
        let builder = ServerConfig::builder_with_provider(self.common.provider.clone())
            .with_protocol_versions(&self.common.versions)
            .ok()?;
        let builder = if asks {
            builder.with_client_cert_verifier(Arc::new(Verifier {
                hints: validation
                    .as_ref()
                    .map_or_else(Vec::new, |validation| validation.authority_names()),
                validation,
                algorithms: self.common.provider.signature_verification_algorithms,
                stats: self.stats.clone(),
                mandatory,
                check_name: false,
            }))
        } else {
            builder.with_no_client_auth()
        };
        let mut config = builder.with_cert_resolver(Arc::new(Resolver(identities.clone())));
        config.alpn_protocols.clone_from(&self.common.alpn);
        config.ignore_client_order = !self.prefer_client_ciphers;
        if !self.stateful {
            config.session_storage = Arc::new(NoServerSessionStorage {});
        }
        config.ticketer = match &self.tickets {
            Tickets::Off => {
                config.send_tls13_tickets = if self.stateful {
                    config.send_tls13_tickets
                } else {
                    0
                };
                config.ticketer
            }
            Tickets::Own => match self.ticket_lifetime {
                None => aws_lc_ticketer()?,
                Some(lifetime) => Arc::new(Ticketer::random(lifetime).ok()?),
            },
            Tickets::Given(slot) => match &*slot.get()? {
                Secret::Tickets(keys) => {
                    Arc::new(Ticketer::new(keys, self.ticket_lifetime.unwrap_or(TICKET_LIFETIME)).ok()?)
                }
                _ => return None,
            },
        };
        let mut without_alpn = config.clone();
        without_alpn.alpn_protocols.clear();
        Some(Built {
            config: Arc::new(config),
            without_alpn: Arc::new(without_alpn),
            identities,
            validates,
        })
    }

    /// Does the server's part of a handshake within `limit`.
    pub async fn accept<S>(&self, stream: S, limit: Duration) -> io::Result<(TlsStream<S>, ConnectionTls)>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let Some(built) = self.current() else {
            count(&self.stats.secrets_not_ready);
            return Err(io::Error::other(
                "TLS_error: the secrets of the listener have not arrived yet",
            ));
        };
        let result = tokio::time::timeout(limit, self.handshake(&built, stream))
            .await
            .unwrap_or_else(|_| {
                Err(io::Error::new(
                    io::ErrorKind::TimedOut,
                    "TLS_error: handshake timeout",
                ))
            });
        match &result {
            Ok((_, facts)) => {
                count(&self.stats.handshake);
                self.stats.negotiated(facts.version, facts.cipher, facts.group);
                if facts.resumed {
                    count(&self.stats.session_reused);
                }
                if facts.peer.is_none() {
                    count(&self.stats.no_certificate);
                }
            }
            Err(error) => count_failure(&self.stats, error),
        }
        result
    }

    async fn handshake<S>(&self, built: &Built, stream: S) -> io::Result<(TlsStream<S>, ConnectionTls)>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let start = LazyConfigAcceptor::new(rustls::server::Acceptor::default(), stream).await?;
        let hello = start.client_hello();
        if self.require_sni && hello.server_name().is_none() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "TLS_error: the client named no server and require_sni is set",
            ));
        }
        let server_name = hello
            .server_name()
            .map(|name| Box::from(name.to_ascii_lowercase()));
        let local = choose(&built.identities, &hello).map(|identity| identity.leaf.clone());
        let common_alpn = hello.alpn().is_some_and(|mut offered| {
            offered.any(|offered| self.common.alpn.iter().any(|ours| ours == offered))
        });
        let config = if common_alpn {
            &built.config
        } else {
            &built.without_alpn
        };
        let stream = start.into_stream(config.clone()).await?;
        let connection = stream.get_ref().1;
        let facts = ConnectionTls::of(Part::Server, connection, server_name, built.validates, local);
        if connection.handshake_kind() == Some(HandshakeKind::Resumed) {
            expired_meanwhile(facts.peer.as_deref(), &self.stats)?;
        }
        Ok((stream, facts))
    }
}

fn aws_lc_ticketer() -> Option<Arc<dyn ProducesTickets>> {
    rustls::crypto::aws_lc_rs::Ticketer::new().ok()
}

/// A resumed session is not verified again by rustls; what can have changed without a new configuration is the time.
pub(super) fn expired_meanwhile(peer: Option<&Certificate>, stats: &TlsStats) -> io::Result<()> {
    let now = rustls_pki_types::UnixTime::now().as_secs();
    match peer {
        Some(peer) if i64::try_from(now).unwrap_or(i64::MAX) > peer.not_after => {
            count(&stats.fail_verify_error);
            Err(io::Error::new(
                io::ErrorKind::PermissionDenied,
                "TLS_error: CERTIFICATE_VERIFY_FAILED: certificate has expired",
            ))
        }
        _ => Ok(()),
    }
}

/// Counts a failed handshake, unless the verifier has done so.
pub(super) fn count_failure(stats: &TlsStats, error: &io::Error) {
    match error
        .get_ref()
        .and_then(|inner| inner.downcast_ref::<rustls::Error>())
    {
        Some(rustls::Error::NoCertificatesPresented) => count(&stats.fail_verify_no_cert),
        Some(rustls::Error::InvalidCertificate(_)) => {}
        _ if error.kind() == io::ErrorKind::PermissionDenied => {}
        _ => count(&stats.connection_error),
    }
}

/// Chooses among several certificates: one whose names cover the server name and whose key the client can verify, else
/// the first that the client can verify.
fn choose<'a>(identities: &'a [Arc<Identity>], hello: &ClientHello<'_>) -> Option<&'a Arc<Identity>> {
    let usable = |identity: &&Arc<Identity>| {
        identity
            .key
            .key
            .choose_scheme(hello.signature_schemes())
            .is_some()
    };
    let named = |identity: &&Arc<Identity>| {
        hello
            .server_name()
            .is_some_and(|name| identity.leaf.dns_sans.iter().any(|san| dns_matches(san, name)))
    };
    if let [only] = identities {
        return Some(only);
    }
    identities
        .iter()
        .find(|identity| named(identity) && usable(identity))
        .or_else(|| identities.iter().find(usable))
}

#[derive(Debug)]
struct Resolver(Arc<[Arc<Identity>]>);

impl ResolvesServerCert for Resolver {
    fn resolve(&self, client_hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        choose(&self.0, &client_hello).map(|identity| identity.key.clone())
    }
}
