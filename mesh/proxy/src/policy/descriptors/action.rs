//! The actions of an entry: what of a request becomes a key and its value.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use http::HeaderName;
use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::envoy::config::route::v3 as route;
use serin_xds::pb::google::protobuf as google;
use serin_xds::pb::google::protobuf::value::Kind;

use super::Scene;
use crate::config::convert::{each, required};
use crate::config::listener::Cidr;
use crate::config::matchers::{HeaderMatch, QueryMatch, RequestView, percent_decoded};
use crate::error::{Refusal, Within};
use crate::observe::format::Template;
use crate::observe::record::Wants;
use crate::policy::metadata::Key;

/// The value of a descriptor.
#[derive(Debug)]
pub(super) enum Text {
    Fixed(Box<str>),
    /// A format, and what counts where it says nothing.
    Format(Template, Box<str>),
}

impl Text {
    fn compile(text: &str, default: &str, wants: &mut Wants) -> Result<Self, Refusal> {
        if text.contains('%') {
            let template = Template::parse(text, true, wants).within("descriptor_value")?;
            return Ok(Self::Format(template, default.into()));
        }
        Ok(Self::Fixed(if text.is_empty() { default } else { text }.into()))
    }

    fn value(&self, scene: &Scene<'_>) -> Box<str> {
        match self {
            Self::Fixed(text) => text.clone(),
            Self::Format(template, default) => {
                let mut out = String::new();
                if let Some(record) = scene.record {
                    template.write(record, &mut out);
                }
                if out.is_empty() {
                    default.clone()
                } else {
                    out.into()
                }
            }
        }
    }
}

/// A compiled `RateLimit.Action`.
#[derive(Debug)]
pub(super) enum Action {
    SourceCluster,
    DestinationCluster,
    Header {
        name: HeaderKey,
        key: Box<str>,
        absent: Absent,
    },
    Query {
        parameter: Box<str>,
        key: Box<str>,
        absent: Absent,
    },
    RemoteAddress,
    /// Lengths of the prefixes that stay.
    MaskedRemoteAddress {
        v4: u8,
        v6: u8,
    },
    Text {
        key: Box<str>,
        value: Text,
        when: Option<Condition>,
    },
    Metadata {
        of: Noted,
        path: Key,
        key: Box<str>,
        default: Box<str>,
        absent: Absent,
    },
}

#[derive(Debug)]
pub(super) enum HeaderKey {
    Path,
    Method,
    Authority,
    Field(HeaderName),
}

/// What it means that a request does not have what an action asks for (`skip_if_absent`).
#[derive(Clone, Copy, Debug)]
pub(super) enum Absent {
    /// The action adds nothing.
    Skip,
    /// The entry does not apply.
    Stop,
}

impl Absent {
    fn of(skip_if_absent: bool) -> Self {
        if skip_if_absent { Self::Skip } else { Self::Stop }
    }
}

/// Whose metadata is meant.
#[derive(Clone, Copy, Debug)]
pub(super) enum Noted {
    /// That of the request, which filters have set.
    ByFilters,
    /// That of its route.
    OfRoute,
}

/// What a request must be, or must not be, for the entry to apply.
#[derive(Debug)]
pub(super) struct Condition {
    test: Test,
    expected: bool,
}

#[derive(Debug)]
enum Test {
    Headers(Box<[HeaderMatch]>),
    Query(Box<[QueryMatch]>),
    Addresses(Box<[Cidr]>),
}

impl Condition {
    fn of(test: Test, expect_match: Option<&google::BoolValue>) -> Self {
        Self {
            test,
            expected: expect_match.is_none_or(|value| value.value),
        }
    }

    fn holds(&self, request: &RequestView<'_>, scene: &Scene<'_>) -> bool {
        let matched = match &self.test {
            Test::Headers(all) => all.iter().all(|header| header.matches(request)),
            Test::Query(all) => all.iter().all(|parameter| parameter.matches(request.query)),
            Test::Addresses(any) => {
                let remote = scene.facts.remote.ip();
                any.iter().any(|range| range.contains(remote))
            }
        };
        matched == self.expected
    }
}

/// What an action says of a request.
pub(super) enum Outcome {
    Entry(Box<str>, Box<str>),
    /// Nothing.
    Skip,
    /// The entry does not apply.
    Stop,
}

impl Outcome {
    /// One that is there may be empty.
    fn found(key: &str, value: Option<&str>, absent: Absent) -> Self {
        match (value, absent) {
            (Some(value), _) => Self::Entry(key.into(), value.into()),
            (_, Absent::Skip) => Self::Skip,
            (_, Absent::Stop) => Self::Stop,
        }
    }
}

impl Action {
    /// Whether it says what a format says.
    pub(super) fn has_format(&self) -> bool {
        matches!(
            self,
            Self::Text {
                value: Text::Format(..),
                ..
            }
        )
    }

    pub(super) fn compile(from: &route::rate_limit::Action, wants: &mut Wants) -> Result<Self, Refusal> {
        use route::rate_limit::action::ActionSpecifier as Spec;
        Ok(
            match required(from.action_specifier.as_ref(), "action_specifier")? {
                Spec::SourceCluster(_) => Self::SourceCluster,
                Spec::DestinationCluster(_) => Self::DestinationCluster,
                Spec::RequestHeaders(header) => Self::Header {
                    name: HeaderKey::compile(&header.header_name).within("request_headers")?,
                    key: header.descriptor_key.as_str().into(),
                    absent: Absent::of(header.skip_if_absent),
                },
                Spec::QueryParameters(query) => Self::Query {
                    parameter: query.query_parameter_name.as_str().into(),
                    key: query.descriptor_key.as_str().into(),
                    absent: Absent::of(query.skip_if_absent),
                },
                Spec::RemoteAddress(_) => Self::RemoteAddress,
                Spec::MaskedRemoteAddress(masked) => Self::MaskedRemoteAddress {
                    v4: prefix(masked.v4_prefix_mask_len.as_ref(), 32).within("masked_remote_address")?,
                    v6: prefix(masked.v6_prefix_mask_len.as_ref(), 128).within("masked_remote_address")?,
                },
                Spec::GenericKey(key) => Self::Text {
                    key: or_default(&key.descriptor_key, "generic_key"),
                    value: Text::compile(&key.descriptor_value, &key.default_value, wants)
                        .within("generic_key")?,
                    when: None,
                },
                Spec::HeaderValueMatch(value) => {
                    Self::header_value(value, wants).within("header_value_match")?
                }
                Spec::QueryParameterValueMatch(value) => {
                    Self::query_value(value, wants).within("query_parameter_value_match")?
                }
                Spec::RemoteAddressMatch(value) => {
                    Self::remote_address(value, wants).within("remote_address_match")?
                }
                Spec::DynamicMetadata(metadata) => Self::Metadata {
                    of: Noted::ByFilters,
                    path: Key::compile(metadata.metadata_key.as_ref()).within("dynamic_metadata")?,
                    key: metadata.descriptor_key.as_str().into(),
                    default: metadata.default_value.as_str().into(),
                    absent: Absent::Stop,
                },
                Spec::Metadata(metadata) => Self::metadata(metadata).within("metadata")?,
                Spec::Extension(extension) => {
                    return Err(Refusal::new(
                        "extension",
                        format!("the descriptor {:?} is not supported", extension.name),
                    ));
                }
            },
        )
    }

    fn header_value(
        from: &route::rate_limit::action::HeaderValueMatch,
        wants: &mut Wants,
    ) -> Result<Self, Refusal> {
        let headers = each(&from.headers, "headers", HeaderMatch::compile)?;
        Ok(Self::Text {
            key: or_default(&from.descriptor_key, "header_match"),
            value: Text::compile(&from.descriptor_value, &from.default_value, wants)?,
            when: Some(Condition::of(Test::Headers(headers), from.expect_match.as_ref())),
        })
    }

    fn query_value(
        from: &route::rate_limit::action::QueryParameterValueMatch,
        wants: &mut Wants,
    ) -> Result<Self, Refusal> {
        let parameters = each(&from.query_parameters, "query_parameters", QueryMatch::compile)?;
        Ok(Self::Text {
            key: or_default(&from.descriptor_key, "query_match"),
            value: Text::compile(&from.descriptor_value, &from.default_value, wants)?,
            when: Some(Condition::of(Test::Query(parameters), from.expect_match.as_ref())),
        })
    }

    fn remote_address(
        from: &route::rate_limit::action::RemoteAddressMatch,
        wants: &mut Wants,
    ) -> Result<Self, Refusal> {
        let matcher = required(from.address_matcher.as_ref(), "address_matcher")?;
        let ranges = each(&matcher.ranges, "address_matcher.ranges", |range| {
            Cidr::compile(&core::CidrRange {
                address_prefix: range.address_prefix.clone(),
                prefix_len: range.prefix_len,
            })
        })?;
        Ok(Self::Text {
            key: or_default(&from.descriptor_key, "remote_address_match"),
            value: Text::compile(&from.descriptor_value, &from.default_value, wants)?,
            when: Some(Condition {
                test: Test::Addresses(ranges),
                expected: !matcher.invert_match,
            }),
        })
    }

    fn metadata(from: &route::rate_limit::action::MetaData) -> Result<Self, Refusal> {
        use route::rate_limit::action::meta_data::Source;
        let of = match Source::try_from(from.source) {
            Ok(Source::Dynamic) => Noted::ByFilters,
            Ok(Source::RouteEntry) => Noted::OfRoute,
            Ok(Source::ClusterEntry | Source::ClusterLocalityEntry) | Err(_) => {
                return Err(Refusal::new(
                    "source",
                    "only DYNAMIC and ROUTE_ENTRY are supported",
                ));
            }
        };
        Ok(Self::Metadata {
            of,
            path: Key::compile(from.metadata_key.as_ref())?,
            key: from.descriptor_key.as_str().into(),
            default: from.default_value.as_str().into(),
            absent: Absent::of(from.skip_if_absent),
        })
    }

    /// What it says of a request.
    pub(super) fn apply(&self, scene: &Scene<'_>) -> Outcome {
        let facts = scene.facts;
        let Some(request) = &facts.request else {
            return Outcome::Stop;
        };
        match self {
            Self::SourceCluster => Outcome::found("source_cluster", Some(scene.source_cluster), Absent::Stop),
            Self::DestinationCluster => Outcome::found(
                "destination_cluster",
                Some(scene.destination_cluster),
                Absent::Stop,
            ),
            Self::Header { name, key, absent } => match name {
                HeaderKey::Method => Outcome::found(key, Some(request.method), *absent),
                HeaderKey::Authority => Outcome::found(key, Some(request.authority()), *absent),
                HeaderKey::Path => match request.query {
                    None => Outcome::found(key, Some(request.path), *absent),
                    Some(query) => Outcome::found(key, Some(&format!("{}?{query}", request.path)), *absent),
                },
                HeaderKey::Field(name) => {
                    let value = request.headers.get(name).and_then(|value| value.to_str().ok());
                    Outcome::found(key, value, *absent)
                }
            },
            Self::Query {
                parameter,
                key,
                absent,
            } => {
                let value = request.query.and_then(|query| {
                    query
                        .split('&')
                        .map(|pair| pair.split_once('=').unwrap_or((pair, "")))
                        .find_map(|(name, value)| {
                            (percent_decoded(name) == **parameter).then(|| percent_decoded(value))
                        })
                });
                Outcome::found(key, value.as_deref(), *absent)
            }
            Self::RemoteAddress => {
                Outcome::Entry("remote_address".into(), facts.remote.ip().to_string().into())
            }
            Self::MaskedRemoteAddress { v4, v6 } => Outcome::Entry(
                "masked_remote_address".into(),
                masked(facts.remote.ip(), *v4, *v6).into(),
            ),
            Self::Text { key, value, when } => {
                if when.as_ref().is_some_and(|when| !when.holds(request, scene)) {
                    return Outcome::Stop;
                }
                match value.value(scene) {
                    empty if empty.is_empty() => Outcome::Stop,
                    text => Outcome::Entry(key.clone(), text),
                }
            }
            Self::Metadata {
                of,
                path,
                key,
                default,
                absent,
            } => {
                let metadata = match of {
                    Noted::ByFilters => Some(facts.metadata),
                    Noted::OfRoute => scene.route,
                };
                let found = metadata.and_then(|metadata| path.find(metadata));
                let value = match found.and_then(|value| value.kind.as_ref()) {
                    Some(Kind::StringValue(text)) => text.as_str(),
                    _ => &**default,
                };
                Outcome::found(key, Some(value).filter(|value| !value.is_empty()), *absent)
            }
        }
    }
}

impl HeaderKey {
    fn compile(name: &str) -> Result<Self, Refusal> {
        Ok(match name {
            ":path" => Self::Path,
            ":method" => Self::Method,
            ":authority" => Self::Authority,
            name if name.eq_ignore_ascii_case("host") => Self::Authority,
            name => Self::Field(
                HeaderName::from_bytes(name.as_bytes())
                    .map_err(|_| Refusal::new("header_name", format!("{name:?} is not a header name")))?,
            ),
        })
    }
}

fn or_default(text: &str, default: &str) -> Box<str> {
    if text.is_empty() { default } else { text }.into()
}

/// The length of a prefix that stays; without one all of it.
fn prefix(from: Option<&google::UInt32Value>, widest: u8) -> Result<u8, Refusal> {
    match from {
        None => Ok(widest),
        Some(length) => u8::try_from(length.value)
            .ok()
            .filter(|length| *length <= widest)
            .ok_or_else(|| Refusal::new("", format!("/{} is too long", length.value))),
    }
}

fn masked(address: IpAddr, v4: u8, v6: u8) -> String {
    match address {
        IpAddr::V4(address) => {
            let bits = u32::from(address) & u32::MAX.checked_shl(32 - u32::from(v4)).unwrap_or(0);
            format!("{}/{v4}", Ipv4Addr::from(bits))
        }
        IpAddr::V6(address) => {
            let bits = u128::from(address) & u128::MAX.checked_shl(128 - u32::from(v6)).unwrap_or(0);
            format!("{}/{v6}", Ipv6Addr::from(bits))
        }
    }
}
