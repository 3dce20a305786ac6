//! Small conversions of protobuf values that every compiler of this module needs.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use http::StatusCode;
use prost::Message;
use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::envoy::r#type::v3 as envoy_type;
use serin_xds::pb::google::protobuf as google;

use crate::error::{Refusal, Within};

/// A list of messages, each compiled; a refusal names its place in `field`.
pub(crate) fn each<'a, M: 'a, T, L: FromIterator<T>>(
    from: impl IntoIterator<Item = &'a M>,
    field: &str,
    mut compile: impl FnMut(&'a M) -> Result<T, Refusal>,
) -> Result<L, Refusal> {
    from.into_iter()
        .enumerate()
        .map(|(index, message)| compile(message).within(format!("{field}[{index}]")))
        .collect()
}

/// The value of a field that has to be there.
pub(crate) fn required<'a, T>(from: Option<&'a T>, field: &str) -> Result<&'a T, Refusal> {
    from.ok_or_else(|| Refusal::new(field, "is missing"))
}

/// Refuses the first field that is present although nothing here can honour it.
pub(crate) fn refuse_present(fields: &[(&str, bool)], reason: &str) -> Result<(), Refusal> {
    match fields.iter().find(|(_, present)| *present) {
        Some((field, _)) => Err(Refusal::new(*field, reason)),
        None => Ok(()),
    }
}

/// A status of HTTP.
pub(crate) fn status_code(from: &envoy_type::HttpStatus) -> Result<StatusCode, Refusal> {
    u16::try_from(from.code)
        .ok()
        .and_then(|code| StatusCode::from_u16(code).ok())
        .ok_or_else(|| Refusal::new("", format!("{} is no HTTP status", from.code)))
}

/// The status of denials in field `field`. Envoy's rule: those below 400 are ignored.
pub(crate) fn denial_status(
    from: Option<&envoy_type::HttpStatus>,
    default: StatusCode,
    field: &str,
) -> Result<StatusCode, Refusal> {
    match from {
        Some(status) if status.code >= 400 => status_code(status).within(field),
        Some(_) | None => Ok(default),
    }
}

/// A protobuf duration; negative ones are refused.
pub(crate) fn duration(from: &google::Duration) -> Result<Duration, Refusal> {
    let seconds =
        u64::try_from(from.seconds).map_err(|_| Refusal::new("", "a duration must not be negative"))?;
    let nanos = u32::try_from(from.nanos).map_err(|_| Refusal::new("", "a duration must not be negative"))?;
    Ok(Duration::new(seconds, nanos.min(999_999_999)))
}

/// A duration for which zero means "off".
pub(crate) fn timeout(from: Option<&google::Duration>) -> Result<Option<Duration>, Refusal> {
    from.map(duration)
        .transpose()
        .map(|value| value.filter(|value| !value.is_zero()))
}

/// Decodes the message of an `Any` after checking its type.
pub(crate) fn unpack<M: Message + Default>(any: &google::Any, type_name: &str) -> Result<M, Refusal> {
    if any.type_url.rsplit('/').next() != Some(type_name) {
        return Err(Refusal::new(
            "typed_config",
            format!("expected {type_name}, found {}", any.type_url),
        ));
    }
    M::decode(any.value.as_slice())
        .map_err(|error| Refusal::new("typed_config", format!("{type_name}: {error}")))
}

/// Where something listens or connects.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Address {
    /// Address and port.
    Tcp(SocketAddr),
    /// Name and port, to be resolved.
    Name(Box<str>, u16),
    /// Unix socket.
    Pipe(Box<str>),
}

impl std::fmt::Display for Address {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Name(name, port) => write!(f, "{name}:{port}"),
            Self::Pipe(path) => f.write_str(path),
        }
    }
}

/// An `Address` message.
pub(crate) fn address(from: Option<&core::Address>) -> Result<Address, Refusal> {
    use core::address::Address as Kind;
    match from.and_then(|address| address.address.as_ref()) {
        None => Err(Refusal::new("address", "is missing")),
        Some(Kind::SocketAddress(socket)) => socket_address(socket),
        Some(Kind::Pipe(pipe)) => Ok(Address::Pipe(pipe.path.as_str().into())),
        Some(Kind::EnvoyInternalAddress(_)) => Err(Refusal::new(
            "address.envoy_internal_address",
            "internal listeners are not supported",
        )),
    }
}

/// The message of an address.
pub(crate) fn address_of(at: SocketAddr) -> Option<core::Address> {
    use core::socket_address::PortSpecifier;
    Some(core::Address {
        address: Some(core::address::Address::SocketAddress(core::SocketAddress {
            address: at.ip().to_string(),
            port_specifier: Some(PortSpecifier::PortValue(u32::from(at.port()))),
            ..Default::default()
        })),
    })
}

/// A `SocketAddress` message.
pub(crate) fn socket_address(from: &core::SocketAddress) -> Result<Address, Refusal> {
    use core::socket_address::PortSpecifier;
    if from.protocol != core::socket_address::Protocol::Tcp as i32 {
        return Err(Refusal::new("socket_address.protocol", "only TCP is supported"));
    }
    let port = match &from.port_specifier {
        Some(PortSpecifier::PortValue(port)) => u16::try_from(*port)
            .map_err(|_| Refusal::new("socket_address.port_value", format!("{port} is not a port")))?,
        Some(PortSpecifier::NamedPort(_)) => {
            return Err(Refusal::new(
                "socket_address.named_port",
                "named ports are not supported",
            ));
        }
        None => 0,
    };
    match from.address.parse::<IpAddr>() {
        Ok(ip) => Ok(Address::Tcp(SocketAddr::new(ip, port))),
        Err(_) if from.address.is_empty() => Err(Refusal::new("socket_address.address", "is empty")),
        Err(_) => Ok(Address::Name(from.address.as_str().into(), port)),
    }
}

/// A share of something, kept as parts per million so that a decision is one integer comparison.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fraction(u32);

impl Fraction {
    /// Everything.
    pub const ALL: Self = Self(1_000_000);
    /// Nothing.
    pub const NONE: Self = Self(0);

    /// From the message; absent means `absent`.
    pub(crate) fn compile(
        from: Option<&envoy_type::FractionalPercent>,
        absent: Self,
    ) -> Result<Self, Refusal> {
        let Some(from) = from else { return Ok(absent) };
        use envoy_type::fractional_percent::DenominatorType;
        let scale = match DenominatorType::try_from(from.denominator) {
            Ok(DenominatorType::Hundred) => 10_000,
            Ok(DenominatorType::TenThousand) => 100,
            Ok(DenominatorType::Million) => 1,
            Err(_) => {
                return Err(Refusal::new(
                    "denominator",
                    format!("{} is unknown", from.denominator),
                ));
            }
        };
        Ok(Self(from.numerator.saturating_mul(scale).min(1_000_000)))
    }

    /// In parts of a million.
    pub fn millionths(self) -> u32 {
        self.0
    }

    /// From parts of a million.
    pub fn of_millionths(parts: u32) -> Self {
        Self(parts.min(1_000_000))
    }

    /// Of a percentage.
    pub fn of_percent(percent: f64) -> Self {
        Self((percent.clamp(0.0, 100.0) * 10_000.0).round() as u32)
    }

    /// Whether a uniform draw falls within the share.
    pub fn hit(self, random: u64) -> bool {
        // Multiply-shift instead of modulo: unbiased to 2^-44 and no division.
        (((random >> 32) * 1_000_000) >> 32) < u64::from(self.0)
    }

    /// Whether nothing falls within it.
    pub fn is_none(self) -> bool {
        self.0 == 0
    }
}

/// Metadata as it came. It is read where a log or a header names it, which is seldom, and there are many endpoints.
#[derive(Debug)]
pub struct EncodedMetadata(Box<[u8]>);

impl EncodedMetadata {
    /// Of a message that says something.
    pub(crate) fn of(from: Option<&core::Metadata>) -> Option<Self> {
        let from = from.filter(|metadata| !metadata.filter_metadata.is_empty())?;
        let plain = core::Metadata {
            filter_metadata: from.filter_metadata.clone(),
            ..Default::default()
        };
        Some(Self(prost::Message::encode_to_vec(&plain).into()))
    }

    /// The value at `namespace`, `key`, `key`, …; the whole namespace where there is no key.
    pub(crate) fn find(&self, path: &[Box<str>]) -> Option<serde_json::Value> {
        let metadata: core::Metadata = prost::Message::decode(&*self.0).ok()?;
        let (namespace, keys) = path.split_first()?;
        let fields = metadata.filter_metadata.get(&**namespace)?;
        let Some((first, rest)) = keys.split_first() else {
            return Some(crate::policy::metadata::struct_to_json(fields));
        };
        let mut value = fields.fields.get(&**first)?;
        for key in rest {
            value = match &value.kind {
                Some(google::value::Kind::StructValue(inner)) => inner.fields.get(&**key)?,
                _ => return None,
            };
        }
        Some(crate::policy::metadata::to_json(value))
    }
}

/// A string at `filter_metadata[filter][key]`.
pub(crate) fn metadata_string<'a>(
    metadata: Option<&'a core::Metadata>,
    filter: &str,
    key: &str,
) -> Option<&'a str> {
    match metadata?
        .filter_metadata
        .get(filter)?
        .fields
        .get(key)?
        .kind
        .as_ref()?
    {
        google::value::Kind::StringValue(value) => Some(value),
        _ => None,
    }
}
