//! Transport sockets: what is between TCP and the filters, on both sides.

use std::collections::BTreeMap;
use std::sync::{Arc, LazyLock};

use prost::Message as _;
use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::envoy::extensions::transport_sockets::proxy_protocol::v3 as proxy_protocol;
use serin_xds::pb::envoy::extensions::transport_sockets::tls::v3 as tls;
use serin_xds::pb::google::protobuf as google;

use super::convert;
use super::listener_filters::{Pass, type_of};
use crate::error::{Refusal, Within};
use crate::tls::downstream::DownstreamTls;
use crate::tls::stats::TlsStats;
use crate::tls::table::{SecretTable, Side};
use crate::tls::upstream::UpstreamTls;
use crate::upstream::proxy_header::{Tlv, Tlvs};

const DOWNSTREAM_TLS: &str = "envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext";
const UPSTREAM_TLS: &str = "envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext";
const RAW: &str = "envoy.extensions.transport_sockets.raw_buffer.v3.RawBuffer";
const PROXY_PROTOCOL: &str =
    "envoy.extensions.transport_sockets.proxy_protocol.v3.ProxyProtocolUpstreamTransport";

/// The configuration of a transport socket; `None` for plain bytes.
fn config(from: &core::TransportSocket) -> Result<Option<(&google::Any, &str)>, Refusal> {
    use core::transport_socket::ConfigType;
    match &from.config_type {
        Some(ConfigType::TypedConfig(any)) => {
            let name = any.type_url.rsplit('/').next().unwrap_or_default();
            Ok((name != RAW).then_some((any, name)))
        }
        None if from.name.ends_with("raw_buffer") => Ok(None),
        None => Err(Refusal::new(
            "typed_config",
            format!("{:?} needs a configuration", from.name),
        )),
    }
}

/// What a filter chain's transport socket does; `None` for plain bytes.
pub(super) fn downstream(
    from: Option<&core::TransportSocket>,
    secrets: &mut SecretTable,
    listener: &str,
) -> Result<Option<Arc<DownstreamTls>>, Refusal> {
    let Some((any, name)) = from.map(config).transpose()?.flatten() else {
        return Ok(None);
    };
    if name != DOWNSTREAM_TLS {
        return Err(Refusal::new(
            "typed_config",
            format!("{name} is not supported by listeners"),
        ));
    }
    let message: tls::DownstreamTlsContext = convert::unpack(any, DOWNSTREAM_TLS)?;
    let stats = secrets.stats(Side::Listener, listener);
    DownstreamTls::compile(&message, secrets, stats).map(|tls| Some(Arc::new(tls)))
}

/// Version of the PROXY protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProxyVersion {
    /// Text.
    V1,
    /// Binary.
    V2,
}

/// The PROXY protocol header that endpoints get.
#[derive(Debug)]
pub struct ProxyHeader {
    /// Its version.
    pub version: ProxyVersion,
    /// Which of the values by type that came with the client are passed on.
    pass: Pass,
    /// Values by type that every connection has.
    added: Box<[Tlv]>,
}

impl ProxyHeader {
    fn compile(from: &core::ProxyProtocolConfig) -> Result<Self, Refusal> {
        use core::proxy_protocol_config::Version;
        Ok(Self {
            version: match Version::try_from(from.version) {
                Ok(Version::V1) => ProxyVersion::V1,
                Ok(Version::V2) => ProxyVersion::V2,
                Err(_) => return Err(Refusal::new("version", format!("{} is unknown", from.version))),
            },
            pass: Pass::compile(from.pass_through_tlvs.as_ref()).within("pass_through_tlvs")?,
            added: compile_tlvs(&from.added_tlvs).within("added_tlvs")?,
        })
    }

    /// The values by type of a connection: the host's own, then those of the configuration, then what the client brought;
    /// a type that one of them has is not looked for in the others (Envoy).
    pub fn tlvs(&self, own: &[Tlv], brought: Option<&Tlvs>) -> Vec<Tlv> {
        let mut out: Vec<Tlv> = own.to_vec();
        let has = |all: &[Tlv], kind| all.iter().any(|tlv: &Tlv| tlv.kind == kind);
        out.extend(self.added.iter().filter(|tlv| !has(own, tlv.kind)).cloned());
        let added = out.len();
        for tlv in brought.into_iter().flat_map(|tlvs| tlvs.iter()) {
            if self.pass.has(tlv.kind) && !has(&out[..added], tlv.kind) {
                out.push(tlv.clone());
            }
        }
        out
    }
}

/// Values by type of a configuration.
pub(super) fn compile_tlvs(from: &[core::TlvEntry]) -> Result<Box<[Tlv]>, Refusal> {
    from.iter()
        .enumerate()
        .map(|(index, entry)| {
            let path = |field: &str| format!("[{index}].{field}");
            if entry.format_string.is_some() {
                return Err(Refusal::new(
                    path("format_string"),
                    "not supported: the value must be fixed",
                ));
            }
            if entry.value.is_empty() || entry.value.len() > usize::from(u16::MAX) {
                return Err(Refusal::new(path("value"), "must have 1 to 65535 bytes"));
            }
            Ok(Tlv {
                kind: type_of(entry.r#type).within(path("type"))?,
                value: entry.value.as_slice().into(),
            })
        })
        .collect()
}

/// How connections to endpoints are dressed.
#[derive(Debug, Default)]
pub struct UpstreamSocket {
    /// The message, to see whether a new configuration is the same.
    source: Vec<u8>,
    /// A PROXY protocol header goes first.
    pub proxy_protocol: Option<ProxyHeader>,
    /// Then TLS.
    pub tls: Option<UpstreamTls>,
}

/// The one of all clusters that say nothing.
static PLAIN: LazyLock<Arc<UpstreamSocket>> = LazyLock::new(Arc::default);

impl UpstreamSocket {
    /// Plain TCP. All of those are one, which a mesh has as many of as clusters.
    pub(super) fn plain() -> Arc<Self> {
        PLAIN.clone()
    }

    /// Whether connections of the one may serve the other.
    pub fn is_same(&self, other: &Self) -> bool {
        std::ptr::eq(self, other) || self.source == other.source
    }

    /// Compiles the message; one that is the same as one of `known` is taken over with its sessions.
    pub(super) fn compile(
        from: Option<&core::TransportSocket>,
        check_name: bool,
        secrets: &mut SecretTable,
        stats: &Arc<TlsStats>,
        known: &[Arc<Self>],
    ) -> Result<Arc<Self>, Refusal> {
        let Some(from) = from else {
            return Ok(Self::plain());
        };
        let mut source = from.encode_to_vec();
        source.push(u8::from(check_name));
        if let Some(same) = known.iter().find(|socket| socket.source == source) {
            return Ok(same.clone());
        }
        let mut out = Self {
            source,
            ..Self::default()
        };
        out.add(from, check_name, secrets, stats)?;
        if out.tls.is_none() && out.proxy_protocol.is_none() {
            return Ok(Self::plain());
        }
        Ok(Arc::new(out))
    }

    fn add(
        &mut self,
        from: &core::TransportSocket,
        check_name: bool,
        secrets: &mut SecretTable,
        stats: &Arc<TlsStats>,
    ) -> Result<(), Refusal> {
        let Some((any, name)) = config(from)? else {
            return Ok(());
        };
        match name {
            UPSTREAM_TLS => {
                let message: tls::UpstreamTlsContext = convert::unpack(any, UPSTREAM_TLS)?;
                self.tls = Some(UpstreamTls::compile(
                    &message,
                    check_name,
                    secrets,
                    stats.clone(),
                )?);
            }
            PROXY_PROTOCOL if self.proxy_protocol.is_none() => {
                let message: proxy_protocol::ProxyProtocolUpstreamTransport =
                    convert::unpack(any, PROXY_PROTOCOL)?;
                let config = message.config.unwrap_or_default();
                self.proxy_protocol = Some(ProxyHeader::compile(&config).within("config")?);
                if let Some(inner) = &message.transport_socket {
                    self.add(inner, check_name, secrets, stats)
                        .within("transport_socket")?;
                }
            }
            other => {
                return Err(Refusal::new(
                    "typed_config",
                    format!("{other} is not supported by clusters"),
                ));
            }
        }
        Ok(())
    }
}

/// An entry of `transport_socket_matches`.
#[derive(Debug)]
pub struct SocketMatch {
    /// Its name.
    pub name: Box<str>,
    criteria: BTreeMap<String, google::Value>,
    /// What fitting endpoints get.
    pub socket: Arc<UpstreamSocket>,
}

impl SocketMatch {
    pub(super) fn new(name: &str, criteria: Option<&google::Struct>, socket: Arc<UpstreamSocket>) -> Self {
        Self {
            name: name.into(),
            criteria: criteria
                .into_iter()
                .flat_map(|criteria| &criteria.fields)
                .map(|(key, value)| (key.clone(), value.clone()))
                .collect(),
            socket,
        }
    }

    /// Whether an endpoint with this `envoy.transport_socket_match` metadata fits: every criterion is in it.
    pub fn fits(&self, metadata: Option<&google::Struct>) -> bool {
        self.criteria
            .iter()
            .all(|(key, value)| metadata.and_then(|metadata| metadata.fields.get(key)) == Some(value))
    }
}
