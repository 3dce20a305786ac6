//! Secrets: certificates with keys, validation contexts, ticket keys; read, checked, and held in slots that rotate.

use std::borrow::Cow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

use arc_swap::ArcSwapOption;
use parking_lot::Mutex;
use rustls::sign::CertifiedKey;
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::envoy::extensions::transport_sockets::tls::v3 as tls;

use super::certificate::Certificate;
use super::validation::Validation;
use crate::config::convert::{each, refuse_present};
use crate::error::{Refusal, Within};

/// Bytes of a file that are read at most: certificates and lists are far smaller.
const MAX_FILE: u64 = 8 * 1024 * 1024;

/// The bytes that a data source stands for.
pub(crate) fn read_source(from: &core::DataSource) -> Result<Vec<u8>, Refusal> {
    use core::data_source::Specifier;
    match &from.specifier {
        Some(Specifier::InlineBytes(bytes)) => Ok(bytes.clone()),
        Some(Specifier::InlineString(text)) => Ok(text.clone().into_bytes()),
        Some(Specifier::Filename(path)) => read_file(Path::new(path)),
        Some(Specifier::EnvironmentVariable(name)) => std::env::var(name)
            .map(String::into_bytes)
            .map_err(|_| Refusal::new("environment_variable", format!("{name} is not set"))),
        None => Err(Refusal::new("", "the data source is empty")),
    }
}

fn read_file(path: &Path) -> Result<Vec<u8>, Refusal> {
    let failed = |reason: String| Refusal::new("filename", format!("{}: {reason}", path.display()));
    let length = std::fs::metadata(path)
        .map_err(|error| failed(error.to_string()))?
        .len();
    if length > MAX_FILE {
        return Err(failed(format!("{length} bytes are too many")));
    }
    std::fs::read(path).map_err(|error| failed(error.to_string()))
}

/// A certificate chain with its private key.
#[derive(Debug)]
pub struct Identity {
    /// As rustls wants it.
    pub key: Arc<CertifiedKey>,
    /// The first certificate of the chain.
    pub leaf: Arc<Certificate>,
    /// All of it, for admin output.
    pub chain: Vec<Certificate>,
}

/// A secret.
#[derive(Debug)]
pub enum Secret {
    /// A `TlsCertificate`.
    Identity(Arc<Identity>),
    /// A `CertificateValidationContext`; the message is kept to be merged with defaults.
    Validation(Box<tls::CertificateValidationContext>, Arc<Validation>),
    /// `TlsSessionTicketKeys`.
    Tickets(Vec<Vec<u8>>),
}

/// What a secret is used as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// See [`Secret::Identity`].
    Identity,
    /// See [`Secret::Validation`].
    Validation,
    /// See [`Secret::Tickets`].
    Tickets,
}

impl Kind {
    /// The field of the `Secret` message.
    pub fn field(self) -> &'static str {
        match self {
            Self::Identity => "tls_certificate",
            Self::Validation => "validation_context",
            Self::Tickets => "session_ticket_keys",
        }
    }
}

impl Secret {
    /// Compiles the message and checks that it can be used at `now`.
    pub fn compile(from: &tls::Secret, now: UnixTime) -> Result<Self, Refusal> {
        use tls::secret::Type;
        match &from.r#type {
            Some(Type::TlsCertificate(certificate)) => compile_identity(certificate, now)
                .map(|identity| Self::Identity(Arc::new(identity)))
                .within("tls_certificate"),
            Some(Type::ValidationContext(context)) => Validation::compile(context)
                .map(|compiled| Self::Validation(Box::new(context.clone()), Arc::new(compiled)))
                .within("validation_context"),
            Some(Type::SessionTicketKeys(keys)) => {
                let keys = each(&keys.keys, "keys", read_source)
                    .and_then(|keys: Vec<_>| super::tickets::Ticketer::new(&keys, 0).map(|_| keys))
                    .within("session_ticket_keys")?;
                Ok(Self::Tickets(keys))
            }
            Some(Type::GenericSecret(_)) => Err(Refusal::new("generic_secret", "nothing here uses one")),
            None => Err(Refusal::new("", "the secret is empty")),
        }
    }

    /// What it can be used as.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Identity(_) => Kind::Identity,
            Self::Validation(..) => Kind::Validation,
            Self::Tickets(_) => Kind::Tickets,
        }
    }
}

fn compile_identity(from: &tls::TlsCertificate, now: UnixTime) -> Result<Identity, Refusal> {
    refuse_present(
        &[
            ("private_key_provider", from.private_key_provider.is_some()),
            ("pkcs12", from.pkcs12.is_some()),
            ("password", from.password.is_some()),
            (
                "signed_certificate_timestamp",
                !from.signed_certificate_timestamp.is_empty(),
            ),
            ("tls_params", from.tls_params.is_some()),
        ],
        "not supported",
    )?;
    let required = |source: Option<&core::DataSource>, field: &'static str| {
        read_source(source.ok_or_else(|| Refusal::new("", "is missing"))?).within(field)
    };
    let chain_pem = required(from.certificate_chain.as_ref(), "certificate_chain")
        .within_if_missing("certificate_chain")?;
    let key_pem = required(from.private_key.as_ref(), "private_key").within_if_missing("private_key")?;
    let in_chain = |reason: String| Refusal::new("certificate_chain", reason);
    let chain: Vec<CertificateDer<'static>> = CertificateDer::pem_slice_iter(&chain_pem)
        .collect::<Result<_, _>>()
        .map_err(|error| in_chain(error.to_string()))?;
    let parsed = chain
        .iter()
        .map(Certificate::parse)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| in_chain(error.to_string()))?;
    let leaf = parsed
        .first()
        .cloned()
        .ok_or_else(|| in_chain("no PEM certificate found".into()))?;
    if i64::try_from(now.as_secs()).unwrap_or(i64::MAX) > leaf.not_after {
        return Err(in_chain(format!(
            "the certificate of {} expired at {}; give one that is valid",
            leaf.principal(),
            super::certificate::timestamp(leaf.not_after),
        )));
    }
    let in_key = |reason: String| Refusal::new("private_key", reason);
    let key = PrivateKeyDer::from_pem_slice(&key_pem).map_err(|error| in_key(error.to_string()))?;
    let key = rustls::crypto::aws_lc_rs::sign::any_supported_type(&key)
        .map_err(|error| in_key(error.to_string()))?;
    let mut certified = CertifiedKey::new(chain, key);
    certified.keys_match().map_err(|_| {
        in_key(format!(
            "does not belong to the certificate of {}",
            leaf.principal()
        ))
    })?;
    if let Some(staple) = &from.ocsp_staple {
        certified.ocsp = Some(read_source(staple).within("ocsp_staple")?);
    }
    Ok(Identity {
        key: Arc::new(certified),
        leaf: Arc::new(leaf),
        chain: parsed,
    })
}

/// Gives a refusal without a path the name of the field.
trait WithinIfMissing<T> {
    fn within_if_missing(self, field: &str) -> Result<T, Refusal>;
}

impl<T> WithinIfMissing<T> for Result<T, Refusal> {
    fn within_if_missing(self, field: &str) -> Result<T, Refusal> {
        self.map_err(|refusal| {
            if refusal.path.is_empty() {
                refusal.within(field)
            } else {
                refusal
            }
        })
    }
}

/// What tells one state of a file from another.
type Stamp = Option<(SystemTime, u64)>;

/// Where the message of such a secret is.
#[derive(Debug)]
enum Origin {
    /// In the context.
    Context(Box<tls::Secret>),
    /// Under a name in a file with a `DiscoveryResponse` (SDS by `path_config_source`).
    File(PathBuf, Box<str>),
}

impl Origin {
    fn message(&self) -> Result<Cow<'_, tls::Secret>, Refusal> {
        match self {
            Self::Context(message) => Ok(Cow::Borrowed(message)),
            Self::File(path, name) => {
                let bytes = read_file(path).within("path_config_source")?;
                let text = String::from_utf8_lossy(&bytes);
                crate::bootstrap::discovered_secrets(&text)
                    .and_then(|secrets| {
                        secrets
                            .into_iter()
                            .find(|secret| *secret.name == **name)
                            .ok_or_else(|| Refusal::new("resources", format!("there is no secret {name}")))
                    })
                    .map(Cow::Owned)
                    .within(path.display().to_string())
            }
        }
    }

    /// The files that `message` was, or is to be, made from, as they are now.
    fn stamps(&self, message: &tls::Secret) -> Vec<(PathBuf, Stamp)> {
        let own = match self {
            Self::Context(_) => None,
            Self::File(path, _) => Some(path.clone()),
        };
        own.into_iter()
            .chain(files_of(message))
            .map(|path| {
                let seen = stamp(&path);
                (path, seen)
            })
            .collect()
    }
}

/// A secret that is part of a context, with the files that it was read from.
#[derive(Debug)]
struct OfFiles {
    origin: Origin,
    seen: Mutex<Vec<(PathBuf, Stamp)>>,
}

/// A secret by name; its content rotates.
#[derive(Debug)]
pub struct SecretSlot {
    /// Its name; empty for those that are part of a context.
    pub name: Box<str>,
    /// What it is used as.
    pub kind: Kind,
    /// Whether the control plane is asked for it.
    pub discovered: bool,
    files: Option<OfFiles>,
    value: ArcSwapOption<Secret>,
    version: AtomicU64,
}

impl SecretSlot {
    /// A slot for a secret that may arrive later.
    pub(super) fn named(name: &str, kind: Kind, discovered: bool) -> Self {
        Self {
            name: name.into(),
            kind,
            discovered,
            files: None,
            value: ArcSwapOption::empty(),
            version: AtomicU64::new(0),
        }
    }

    /// A slot for a secret that is part of a context; if it comes from files they can be [read again](Self::reload).
    pub(super) fn inline(message: tls::Secret, now: UnixTime) -> Result<Self, Refusal> {
        Self::of_origin("", Origin::Context(Box::new(message)), now)
    }

    /// A slot for the secret of that name in a file.
    pub(super) fn in_file(path: &str, name: &str, now: UnixTime) -> Result<Self, Refusal> {
        Self::of_origin(name, Origin::File(path.into(), name.into()), now)
    }

    fn of_origin(name: &str, origin: Origin, now: UnixTime) -> Result<Self, Refusal> {
        // Stamped before reading: a file that changes in between is read again.
        let message = origin.message()?;
        let seen = origin.stamps(&message);
        let secret = Secret::compile(&message, now)?;
        drop(message);
        let slot = Self {
            files: (!seen.is_empty()).then(|| OfFiles {
                origin,
                seen: Mutex::new(seen),
            }),
            ..Self::named(name, secret.kind(), false)
        };
        slot.set(Arc::new(secret));
        Ok(slot)
    }

    /// The secret, if it has arrived.
    pub fn get(&self) -> Option<Arc<Secret>> {
        self.value.load_full()
    }

    /// Changes whenever the secret does.
    pub fn version(&self) -> u64 {
        self.version.load(Ordering::Acquire)
    }

    pub(super) fn set(&self, secret: Arc<Secret>) {
        self.value.store(Some(secret));
        self.version.fetch_add(1, Ordering::Release);
    }

    /// Whether it comes from files.
    pub fn has_files(&self) -> bool {
        self.files.is_some()
    }

    /// Reads the files again if one has changed; a state that cannot be used is told and the last good one stays.
    pub fn reload(&self, now: UnixTime) -> Result<bool, Refusal> {
        let Some(files) = &self.files else {
            return Ok(false);
        };
        let mut seen = files.seen.lock();
        let current: Vec<_> = seen.iter().map(|(path, _)| (path.clone(), stamp(path))).collect();
        if *seen == current {
            return Ok(false);
        }
        *seen = current;
        let message = files.origin.message()?;
        *seen = files.origin.stamps(&message);
        drop(seen);
        self.set(Arc::new(Secret::compile(&message, now)?));
        Ok(true)
    }
}

fn stamp(path: &Path) -> Stamp {
    let metadata = std::fs::metadata(path).ok()?;
    Some((metadata.modified().ok()?, metadata.len()))
}

fn files_of(from: &tls::Secret) -> Vec<PathBuf> {
    use tls::secret::Type;
    let sources: Vec<Option<&core::DataSource>> = match &from.r#type {
        Some(Type::TlsCertificate(certificate)) => vec![
            certificate.certificate_chain.as_ref(),
            certificate.private_key.as_ref(),
            certificate.ocsp_staple.as_ref(),
        ],
        Some(Type::ValidationContext(context)) => vec![context.trusted_ca.as_ref(), context.crl.as_ref()],
        Some(Type::SessionTicketKeys(keys)) => keys.keys.iter().map(Some).collect(),
        Some(Type::GenericSecret(_)) | None => Vec::new(),
    };
    sources
        .into_iter()
        .flatten()
        .filter_map(|source| match &source.specifier {
            Some(core::data_source::Specifier::Filename(path)) => Some(PathBuf::from(path)),
            _ => None,
        })
        .collect()
}
