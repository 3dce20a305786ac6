//! The `proxy_protocol` listener filter: which headers are taken, and what becomes of their values by type.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::envoy::extensions::filters::listener::proxy_protocol::v3 as proxy_protocol;
use serin_xds::pb::google::protobuf as google;

use crate::config::convert::{self, each};
use crate::config::transport_socket::ProxyVersion;
use crate::error::{Refusal, Within};
use crate::policy::metadata::{Metadata, text};
use crate::upstream::proxy_header::{Tlv, Tlvs};

/// Where values go when a rule names no other namespace.
const NAMESPACE: &str = "envoy.filters.listener.proxy_protocol";
/// The object of the filter state that has them as its fields.
const STATE_KEY: &str = "envoy.network.proxy_protocol.tlv";

/// See the module.
#[derive(Debug, Default)]
pub struct ProxyProtocol {
    /// Connections without a header are served as they are.
    pub optional: bool,
    no_v1: bool,
    no_v2: bool,
    rules: Box<[Rule]>,
    in_state: bool,
    pass: Pass,
}

/// Which values by type are passed on to endpoints.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) enum Pass {
    /// None.
    #[default]
    None,
    /// All.
    All,
    /// These.
    Some(Box<[u8]>),
}

impl Pass {
    /// Compiles the message.
    pub(crate) fn compile(from: Option<&core::ProxyProtocolPassThroughTlVs>) -> Result<Self, Refusal> {
        use core::proxy_protocol_pass_through_tl_vs::PassTlVsMatchType;
        let Some(from) = from else {
            return Ok(Self::None);
        };
        match PassTlVsMatchType::try_from(from.match_type) {
            Ok(PassTlVsMatchType::IncludeAll) => Ok(Self::All),
            Ok(PassTlVsMatchType::Include) => from
                .tlv_type
                .iter()
                .map(|kind| type_of(*kind).within("tlv_type"))
                .collect::<Result<_, _>>()
                .map(Self::Some),
            Err(_) => Err(Refusal::new(
                "match_type",
                format!("{} is unknown", from.match_type),
            )),
        }
    }

    /// Whether values of that type are.
    pub(crate) fn has(&self, kind: u8) -> bool {
        match self {
            Self::None => false,
            Self::All => true,
            Self::Some(kinds) => kinds.contains(&kind),
        }
    }
}

/// A type is a byte.
pub(crate) fn type_of(number: u32) -> Result<u8, Refusal> {
    u8::try_from(number).map_err(|_| Refusal::new("", format!("{number} is above 255")))
}

#[derive(Debug)]
struct Rule {
    kind: u8,
    namespace: Box<str>,
    key: Box<str>,
    base64: bool,
}

impl Rule {
    fn compile(from: &proxy_protocol::proxy_protocol::Rule) -> Result<Self, Refusal> {
        use proxy_protocol::proxy_protocol::key_value_pair::ValueStringEncoding;
        let kind = type_of(from.tlv_type).within("tlv_type")?;
        let pair = from
            .on_tlv_present
            .as_ref()
            .filter(|pair| !pair.key.is_empty())
            .ok_or_else(|| Refusal::new("on_tlv_present.key", "is missing"))?;
        let base64 = match ValueStringEncoding::try_from(pair.value_string_encoding) {
            Ok(ValueStringEncoding::Unspecified | ValueStringEncoding::SanitizedUtf8) => false,
            Ok(ValueStringEncoding::Base64) => true,
            Err(_) => {
                return Err(Refusal::new(
                    "on_tlv_present.value_string_encoding",
                    format!("{} is unknown", pair.value_string_encoding),
                ));
            }
        };
        Ok(Self {
            kind,
            namespace: match pair.metadata_namespace.as_str() {
                "" => NAMESPACE,
                given => given,
            }
            .into(),
            key: pair.key.as_str().into(),
            base64,
        })
    }

    fn write(&self, value: &[u8]) -> String {
        if self.base64 {
            STANDARD.encode(value)
        } else {
            sanitized(value)
        }
    }
}

/// As UTF-8: each byte that is none becomes `!`, as in Envoy.
fn sanitized(mut bytes: &[u8]) -> String {
    let mut out = String::with_capacity(bytes.len());
    loop {
        match std::str::from_utf8(bytes) {
            Ok(rest) => {
                out.push_str(rest);
                return out;
            }
            Err(error) => {
                let (good, bad) = bytes.split_at(error.valid_up_to());
                out.push_str(&String::from_utf8_lossy(good));
                out.push('!');
                bytes = &bad[1..];
            }
        }
    }
}

impl ProxyProtocol {
    pub(super) fn compile(any: Option<&google::Any>) -> Result<Self, Refusal> {
        use proxy_protocol::proxy_protocol::TlvLocation;
        let Some(any) = any else {
            return Ok(Self::default());
        };
        let from: proxy_protocol::ProxyProtocol = convert::unpack(
            any,
            "envoy.extensions.filters.listener.proxy_protocol.v3.ProxyProtocol",
        )?;
        let in_state = match TlvLocation::try_from(from.tlv_location) {
            Ok(TlvLocation::DynamicMetadata) => false,
            Ok(TlvLocation::FilterState) => true,
            Err(_) => {
                return Err(Refusal::new(
                    "tlv_location",
                    format!("{} is unknown", from.tlv_location),
                ));
            }
        };
        // V1 is 0, V2 is 1.
        Ok(Self {
            optional: from.allow_requests_without_proxy_protocol,
            no_v1: from.disallowed_versions.contains(&0),
            no_v2: from.disallowed_versions.contains(&1),
            rules: each(&from.rules, "rules", Rule::compile)?,
            in_state,
            pass: Pass::compile(from.pass_through_tlvs.as_ref()).within("pass_through_tlvs")?,
        })
    }

    /// Whether headers of that version are taken.
    pub fn allows(&self, version: ProxyVersion) -> bool {
        match version {
            ProxyVersion::V1 => !self.no_v1,
            ProxyVersion::V2 => !self.no_v2,
        }
    }

    /// Keeps of a header's values by type what the rules say.
    pub fn keep(&self, tlvs: &[(u8, &[u8])], metadata: &mut Metadata) {
        let mut fields = google::Struct::default();
        for (kind, value) in tlvs {
            if let Some(rule) = self.rules.iter().find(|rule| rule.kind == *kind) {
                let value = text(rule.write(value));
                if self.in_state {
                    // Here the last.
                    fields.fields.insert(rule.key.to_string(), value);
                } else {
                    // Of several the first counts (Envoy).
                    let place = metadata.entry(&rule.namespace).fields.entry(rule.key.to_string());
                    place.or_insert(value);
                }
            }
        }
        if !fields.fields.is_empty() {
            metadata.state.set_fields(STATE_KEY, fields);
        }
        let passed: Tlvs = tlvs
            .iter()
            .filter(|(kind, _)| self.pass.has(*kind))
            .map(|(kind, value)| Tlv {
                kind: *kind,
                value: (*value).into(),
            })
            .collect();
        if !passed.is_empty() {
            metadata.state.tlvs = Some(passed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_that_are_no_utf8_become_marks_one_by_one() {
        for (bytes, expected) in [
            (&b"plain"[..], "plain"),
            (b"a\xffb", "a!b"),
            (b"\xe2\x82", "!!"),
            ("gr\u{fc}n".as_bytes(), "gr\u{fc}n"),
            (b"", ""),
        ] {
            assert_eq!(sanitized(bytes), expected, "{bytes:?}");
        }
    }
}
