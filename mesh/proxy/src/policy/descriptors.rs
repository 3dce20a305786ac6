//! Rate limit descriptors: what the `rate_limits` of routes and virtual hosts make of a request.
//!
//! Each entry is a list of actions, each action gives a key and a value, or says that the entry does not apply.

use std::net::IpAddr;

use http::HeaderName;
use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::envoy::config::route::v3 as route;
use serin_xds::pb::google::protobuf::value::Kind;

use super::facts::Facts;
use super::metadata::{Key, Metadata};
use crate::config::listener::Cidr;
use crate::config::matchers::{HeaderMatch, QueryMatch};
use crate::error::{Refusal, Within};
use crate::observe::format::Template;
use crate::observe::record::{Record, Wants};

/// A limit that a request brings with it for the rate limit service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LimitOverride {
    /// Requests.
    pub requests_per_unit: u32,
    /// Per this (`RateLimitUnit`).
    pub unit: i32,
}

/// Keys and values that name a limit, the most general one first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Descriptor {
    /// Keys and values.
    pub entries: Vec<(Box<str>, Box<str>)>,
    /// Its own limit.
    pub limit: Option<LimitOverride>,
    /// How many hits the request counts for.
    pub hits: Option<u64>,
    /// Whether `x-ratelimit-*` is sent for it, where it says so itself.
    pub headers: Option<bool>,
}

/// What actions may look at, beside the facts.
#[derive(Clone, Copy, Debug)]
pub struct Scene<'a> {
    /// What is noted of its route.
    pub route: Option<&'a Metadata>,
    /// Who, what, from where.
    pub facts: &'a Facts<'a>,
    /// Name of the cluster that the request goes to.
    pub destination_cluster: &'a str,
    /// Name of the cluster that this proxy belongs to (`node.cluster`).
    pub source_cluster: &'a str,
    /// What is known of the request, where formats want it.
    pub record: Option<&'a Record<'a>>,
}

/// A compiled `RateLimit` of a route.
#[derive(Debug)]
pub struct RateLimitEntry {
    /// Filters of this stage use it.
    pub stage: u32,
    /// It is asked about when the request has ended, and nobody waits for the answer.
    pub at_end: bool,
    actions: Box<[Action]>,
    limit: Option<Limit>,
    hits: Option<Hits>,
    headers: Option<bool>,
    /// Fields that its formats name.
    wants: Option<Box<Wants>>,
}

#[derive(Debug)]
enum Hits {
    Fixed(u64),
    Format(Template),
}

/// Envoy's limit of what a format may say.
const MAX_HITS: f64 = 1e9;

/// The value of a descriptor.
#[derive(Debug)]
enum Text {
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

#[derive(Debug)]
enum Limit {
    Fixed(LimitOverride),
    Metadata(Key),
}

#[derive(Debug)]
enum Action {
    SourceCluster,
    DestinationCluster,
    Header(HeaderKey, Box<str>, bool),
    Query(Box<str>, Box<str>, bool),
    RemoteAddress,
    MaskedRemoteAddress(u8, u8),
    Fixed(Box<str>, Text),
    HeaderMatch(Box<str>, Text, bool, Box<[HeaderMatch]>),
    QueryMatch(Box<str>, Text, bool, Box<[QueryMatch]>),
    AddressMatch(Box<str>, Text, bool, Box<[Cidr]>),
    Metadata(Box<str>, Key, Box<str>, bool, bool),
}

#[derive(Debug)]
enum HeaderKey {
    Path,
    Method,
    Authority,
    Field(HeaderName),
}

/// Compiles a list of entries.
pub(crate) fn compile_all(from: &[route::RateLimit]) -> Result<Box<[RateLimitEntry]>, Refusal> {
    from.iter()
        .enumerate()
        .map(|(index, entry)| RateLimitEntry::compile(entry).within(format!("rate_limits[{index}]")))
        .collect()
}

impl RateLimitEntry {
    fn compile(from: &route::RateLimit) -> Result<Self, Refusal> {
        use route::rate_limit::XRateLimitOption;
        let headers = match XRateLimitOption::try_from(from.x_ratelimit_option) {
            Ok(XRateLimitOption::Unspecified) => None,
            Ok(XRateLimitOption::Off) => Some(false),
            Ok(XRateLimitOption::DraftVersion03) => Some(true),
            Err(_) => return Err(Refusal::new("x_ratelimit_option", "is unknown")),
        };
        let mut wants = Wants::default();
        if from.actions.is_empty() {
            return Err(Refusal::new("actions", "an entry needs an action"));
        }
        let stage = from.stage.as_ref().map_or(0, |value| value.value);
        if stage > 10 {
            return Err(Refusal::new("stage", format!("{stage} is above 10")));
        }
        use route::rate_limit::r#override::OverrideSpecifier;
        let limit = match from
            .limit
            .as_ref()
            .and_then(|limit| limit.override_specifier.as_ref())
        {
            None => None,
            Some(OverrideSpecifier::RateLimit(limit)) => Some(Limit::Fixed(LimitOverride {
                requests_per_unit: limit.requests_per_unit,
                unit: limit.unit,
            })),
            Some(OverrideSpecifier::DynamicMetadata(metadata)) => Some(Limit::Metadata(
                Key::compile(metadata.metadata_key.as_ref()).within("limit.dynamic_metadata")?,
            )),
        };
        let hits = match &from.hits_addend {
            None => None,
            Some(addend) if addend.is_negative_hits => {
                return Err(Refusal::new("hits_addend.is_negative_hits", "not supported"));
            }
            Some(addend) if addend.number.is_some() && !addend.format.is_empty() => {
                return Err(Refusal::new(
                    "hits_addend",
                    "number and format exclude each other",
                ));
            }
            Some(addend) if !addend.format.is_empty() => {
                let template = Template::parse(&addend.format, true, &mut wants);
                Some(Hits::Format(template.within("hits_addend.format")?))
            }
            Some(addend) => addend.number.as_ref().map(|number| Hits::Fixed(number.value)),
        };
        let actions = from
            .actions
            .iter()
            .enumerate()
            .map(|(index, action)| Action::compile(action, &mut wants).within(format!("actions[{index}]")))
            .collect::<Result<Box<[_]>, _>>()?;
        if wants.looks_at_responses() {
            return Err(Refusal::new(
                "",
                "formats of descriptors may not name fields of responses",
            ));
        }
        let formats = matches!(hits, Some(Hits::Format(_))) || actions.iter().any(Action::has_format);
        Ok(Self {
            at_end: from.apply_on_stream_done,
            headers,
            wants: formats.then(|| Box::new(wants)),
            stage,
            actions,
            limit,
            hits,
        })
    }

    /// Whether an action needs the name of the destination cluster.
    pub fn needs_cluster(&self) -> bool {
        self.actions
            .iter()
            .any(|action| matches!(action, Action::DestinationCluster))
    }

    /// Fields that its formats name, if it has any.
    pub fn wants(&self) -> Option<&Wants> {
        self.wants.as_deref()
    }

    /// The descriptor of a request; `None` if an action says that the entry does not apply.
    pub fn describe(&self, scene: &Scene<'_>) -> Option<Descriptor> {
        let mut entries = Vec::with_capacity(self.actions.len());
        for action in &self.actions {
            match action.apply(scene) {
                Outcome::Entry(key, value) => entries.push((key, value)),
                Outcome::Skip => {}
                Outcome::Stop => return None,
            }
        }
        let hits = match &self.hits {
            None => None,
            Some(Hits::Fixed(hits)) => Some(*hits),
            // A number that is none makes the entry one that does not apply, as in Envoy.
            Some(Hits::Format(template)) => {
                let mut text = String::new();
                template.write(scene.record?, &mut text);
                let hits: f64 = text.parse().ok()?;
                Some((0.0..=MAX_HITS).contains(&hits).then_some(hits as u64)?)
            }
        };
        Some(Descriptor {
            entries,
            limit: self.limit.as_ref().and_then(|limit| limit.resolve(scene)),
            hits,
            headers: self.headers,
        })
        .filter(|descriptor| !descriptor.entries.is_empty())
    }
}

impl Limit {
    fn resolve(&self, scene: &Scene<'_>) -> Option<LimitOverride> {
        match self {
            Self::Fixed(limit) => Some(*limit),
            Self::Metadata(key) => {
                let Some(Kind::StructValue(fields)) = &key.find(scene.facts.metadata)?.kind else {
                    return None;
                };
                let Some(Kind::NumberValue(requests)) = &fields.fields.get("requests_per_unit")?.kind else {
                    return None;
                };
                let Some(Kind::StringValue(unit)) = &fields.fields.get("unit")?.kind else {
                    return None;
                };
                let unit = serin_xds::pb::envoy::r#type::v3::RateLimitUnit::from_str_name(unit)?;
                Some(LimitOverride {
                    requests_per_unit: *requests as u32,
                    unit: unit as i32,
                })
            }
        }
    }
}

enum Outcome {
    Entry(Box<str>, Box<str>),
    /// The action adds nothing.
    Skip,
    /// The entry does not apply.
    Stop,
}

fn or_default(text: &str, default: &str) -> Box<str> {
    if text.is_empty() { default } else { text }.into()
}

fn mask(value: Option<&serin_xds::pb::google::protobuf::UInt32Value>, widest: u8) -> Result<u8, Refusal> {
    match value {
        None => Ok(widest),
        Some(value) => u8::try_from(value.value)
            .ok()
            .filter(|length| *length <= widest)
            .ok_or_else(|| Refusal::new("masked_remote_address", format!("/{} is too long", value.value))),
    }
}

impl Action {
    fn has_format(&self) -> bool {
        match self {
            Self::Fixed(_, text)
            | Self::HeaderMatch(_, text, ..)
            | Self::QueryMatch(_, text, ..)
            | Self::AddressMatch(_, text, ..) => matches!(text, Text::Format(..)),
            _ => false,
        }
    }

    fn compile(from: &route::rate_limit::Action, wants: &mut Wants) -> Result<Self, Refusal> {
        use route::rate_limit::action::ActionSpecifier as Spec;
        let spec = from
            .action_specifier
            .as_ref()
            .ok_or_else(|| Refusal::new("action_specifier", "is missing"))?;
        let expect = |value: &Option<serin_xds::pb::google::protobuf::BoolValue>| {
            value.as_ref().is_none_or(|value| value.value)
        };
        Ok(match spec {
            Spec::SourceCluster(_) => Self::SourceCluster,
            Spec::DestinationCluster(_) => Self::DestinationCluster,
            Spec::RequestHeaders(header) => {
                let key = match &*header.header_name {
                    ":path" => HeaderKey::Path,
                    ":method" => HeaderKey::Method,
                    ":authority" => HeaderKey::Authority,
                    name if name.eq_ignore_ascii_case("host") => HeaderKey::Authority,
                    name => HeaderKey::Field(HeaderName::from_bytes(name.as_bytes()).map_err(|_| {
                        Refusal::new(
                            "request_headers.header_name",
                            format!("{name:?} is not a header name"),
                        )
                    })?),
                };
                Self::Header(key, header.descriptor_key.as_str().into(), header.skip_if_absent)
            }
            Spec::QueryParameters(query) => Self::Query(
                query.query_parameter_name.as_str().into(),
                query.descriptor_key.as_str().into(),
                query.skip_if_absent,
            ),
            Spec::RemoteAddress(_) => Self::RemoteAddress,
            Spec::MaskedRemoteAddress(masked) => Self::MaskedRemoteAddress(
                mask(masked.v4_prefix_mask_len.as_ref(), 32)?,
                mask(masked.v6_prefix_mask_len.as_ref(), 128)?,
            ),
            Spec::GenericKey(key) => Self::Fixed(
                or_default(&key.descriptor_key, "generic_key"),
                Text::compile(&key.descriptor_value, &key.default_value, wants).within("generic_key")?,
            ),
            Spec::HeaderValueMatch(value) => Self::HeaderMatch(
                or_default(&value.descriptor_key, "header_match"),
                Text::compile(&value.descriptor_value, &value.default_value, wants)
                    .within("header_value_match")?,
                expect(&value.expect_match),
                value
                    .headers
                    .iter()
                    .enumerate()
                    .map(|(index, header)| {
                        HeaderMatch::compile(header).within(format!("header_value_match.headers[{index}]"))
                    })
                    .collect::<Result<_, _>>()?,
            ),
            Spec::QueryParameterValueMatch(value) => Self::QueryMatch(
                or_default(&value.descriptor_key, "query_match"),
                Text::compile(&value.descriptor_value, &value.default_value, wants)
                    .within("query_parameter_value_match")?,
                expect(&value.expect_match),
                value
                    .query_parameters
                    .iter()
                    .map(QueryMatch::compile)
                    .collect::<Result<_, _>>()
                    .within("query_parameter_value_match.query_parameters")?,
            ),
            Spec::RemoteAddressMatch(value) => {
                let matcher = value
                    .address_matcher
                    .as_ref()
                    .ok_or_else(|| Refusal::new("remote_address_match.address_matcher", "is missing"))?;
                Self::AddressMatch(
                    or_default(&value.descriptor_key, "remote_address_match"),
                    Text::compile(&value.descriptor_value, &value.default_value, wants)
                        .within("remote_address_match")?,
                    !matcher.invert_match,
                    matcher
                        .ranges
                        .iter()
                        .map(|range| {
                            Cidr::compile(&core::CidrRange {
                                address_prefix: range.address_prefix.clone(),
                                prefix_len: range.prefix_len,
                            })
                        })
                        .collect::<Result<_, _>>()
                        .within("remote_address_match.address_matcher.ranges")?,
                )
            }
            Spec::DynamicMetadata(metadata) => Self::Metadata(
                metadata.descriptor_key.as_str().into(),
                Key::compile(metadata.metadata_key.as_ref()).within("dynamic_metadata")?,
                metadata.default_value.as_str().into(),
                false,
                false,
            ),
            Spec::Metadata(metadata) => {
                use route::rate_limit::action::meta_data::Source;
                let of_route = match Source::try_from(metadata.source) {
                    Ok(Source::Dynamic) => false,
                    Ok(Source::RouteEntry) => true,
                    Ok(Source::ClusterEntry | Source::ClusterLocalityEntry) | Err(_) => {
                        return Err(Refusal::new(
                            "metadata.source",
                            "only DYNAMIC and ROUTE_ENTRY are supported",
                        ));
                    }
                };
                Self::Metadata(
                    metadata.descriptor_key.as_str().into(),
                    Key::compile(metadata.metadata_key.as_ref()).within("metadata")?,
                    metadata.default_value.as_str().into(),
                    metadata.skip_if_absent,
                    of_route,
                )
            }
            Spec::Extension(extension) => {
                return Err(Refusal::new(
                    "extension",
                    format!("the descriptor {:?} is not supported", extension.name),
                ));
            }
        })
    }

    fn apply(&self, scene: &Scene<'_>) -> Outcome {
        let facts = scene.facts;
        let Some(request) = &facts.request else {
            return Outcome::Stop;
        };
        let found = |key: &str, value: Option<&str>, skip: bool| match value {
            Some(value) if !value.is_empty() => Outcome::Entry(key.into(), value.into()),
            _ if skip => Outcome::Skip,
            _ => Outcome::Stop,
        };
        let when = |matched: bool, key: &str, value: &Text| {
            if !matched {
                return Outcome::Stop;
            }
            match value.value(scene) {
                empty if empty.is_empty() => Outcome::Stop,
                text => Outcome::Entry(key.into(), text),
            }
        };
        match self {
            Self::SourceCluster => found("source_cluster", Some(scene.source_cluster), false),
            Self::DestinationCluster => found("destination_cluster", Some(scene.destination_cluster), false),
            Self::Header(HeaderKey::Method, key, skip) => found(key, Some(request.method), *skip),
            Self::Header(HeaderKey::Authority, key, skip) => found(key, Some(request.authority()), *skip),
            Self::Header(HeaderKey::Path, key, skip) => match request.query {
                None => found(key, Some(request.path), *skip),
                Some(query) => found(key, Some(&format!("{}?{query}", request.path)), *skip),
            },
            Self::Header(HeaderKey::Field(name), key, skip) => {
                let value = request.headers.get(name).and_then(|value| value.to_str().ok());
                found(key, value, *skip)
            }
            Self::Query(name, key, skip) => {
                let value = request.query.and_then(|query| {
                    query
                        .split('&')
                        .filter_map(|pair| pair.split_once('='))
                        .find_map(|(parameter, value)| (parameter == &**name).then_some(value))
                });
                found(key, value, *skip)
            }
            Self::RemoteAddress => Outcome::Entry("remote_address".into(), facts.remote().to_string().into()),
            Self::MaskedRemoteAddress(v4, v6) => Outcome::Entry(
                "masked_remote_address".into(),
                masked(facts.remote(), *v4, *v6).into(),
            ),
            Self::Fixed(key, value) => when(true, key, value),
            Self::HeaderMatch(key, value, expected, headers) => {
                let matched = headers.iter().all(|header| header.matches(request));
                when(matched == *expected, key, value)
            }
            Self::QueryMatch(key, value, expected, parameters) => {
                let matched = parameters
                    .iter()
                    .all(|parameter| parameter.matches(request.query));
                when(matched == *expected, key, value)
            }
            Self::AddressMatch(key, value, expected, ranges) => {
                let remote = facts.remote();
                let matched = ranges.iter().any(|range| range.contains(remote));
                when(matched == *expected, key, value)
            }
            Self::Metadata(key, path, default, skip, of_route) => {
                let of_filters = (!of_route).then_some(facts.metadata);
                let value = of_filters
                    .or(scene.route.filter(|_| *of_route))
                    .and_then(|metadata| path.find(metadata));
                let value = match value.and_then(|value| value.kind.as_ref()) {
                    Some(Kind::StringValue(text)) => Some(text.as_str()),
                    _ => None,
                };
                found(key, value.or((!default.is_empty()).then_some(&**default)), *skip)
            }
        }
    }
}

fn masked(address: IpAddr, v4: u8, v6: u8) -> String {
    match address {
        IpAddr::V4(address) => {
            let bits = u32::from(address) & u32::MAX.checked_shl(32 - u32::from(v4)).unwrap_or(0);
            format!("{}/{v4}", std::net::Ipv4Addr::from(bits))
        }
        IpAddr::V6(address) => {
            let bits = u128::from(address) & u128::MAX.checked_shl(128 - u32::from(v6)).unwrap_or(0);
            format!("{}/{v6}", std::net::Ipv6Addr::from(bits))
        }
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderMap;
    use serin_xds::pb::envoy::r#type::metadata::v3 as metadata_pb;
    use serin_xds::pb::google::protobuf::{BoolValue, UInt32Value};

    use super::*;
    use crate::config::matchers::RequestView;
    use crate::policy::metadata::text;
    use route::rate_limit::action::{self, ActionSpecifier as Spec};

    fn describe(specs: Vec<Spec>) -> Option<Vec<(String, String)>> {
        let mut headers = HeaderMap::new();
        headers.insert("x-user", "bob".parse().unwrap());
        let mut metadata = Metadata::default();
        metadata.set("ns", "tier", text("gold"));
        let mut noted = Metadata::default();
        noted.set("ns", "tier", text("of the route"));
        let facts = Facts {
            direct_remote: "10.1.2.3:5".parse().unwrap(),
            source: "10.1.2.3:5".parse().unwrap(),
            local: "10.0.0.2:80".parse().unwrap(),
            server_name: None,
            peer: None,
            request: Some(RequestView {
                method: "GET",
                path: "/a",
                query: Some("k=v&n"),
                authority: Some("shop"),
                scheme: Some("http"),
                headers: &headers,
            }),
            forwarded: false,
            metadata: &metadata,
        };
        let entry = RateLimitEntry::compile(&route::RateLimit {
            actions: specs
                .into_iter()
                .map(|spec| route::rate_limit::Action {
                    action_specifier: Some(spec),
                })
                .collect(),
            ..Default::default()
        })
        .unwrap();
        let scene = Scene {
            facts: &facts,
            route: Some(&noted),
            destination_cluster: "out",
            source_cluster: "me",
            record: None,
        };
        let descriptor = entry.describe(&scene)?;
        Some(
            descriptor
                .entries
                .into_iter()
                .map(|(key, value)| (key.into(), value.into()))
                .collect(),
        )
    }

    fn one(spec: Spec) -> Option<(String, String)> {
        describe(vec![spec]).map(|mut entries| entries.remove(0))
    }

    #[test]
    fn every_action_gives_the_key_and_value_that_envoy_gives() {
        let header = |name: &str, skip| {
            Spec::RequestHeaders(action::RequestHeaders {
                header_name: name.into(),
                descriptor_key: "h".into(),
                skip_if_absent: skip,
            })
        };
        let user_is = |value: &str, expect| {
            Spec::HeaderValueMatch(action::HeaderValueMatch {
                descriptor_value: "vip".into(),
                expect_match: Some(BoolValue { value: expect }),
                headers: vec![route::HeaderMatcher {
                    name: "x-user".into(),
                    header_match_specifier: Some(route::header_matcher::HeaderMatchSpecifier::ExactMatch(
                        value.into(),
                    )),
                    ..Default::default()
                }],
                ..Default::default()
            })
        };
        let tier = |field: &str, default: &str| {
            Spec::Metadata(action::MetaData {
                descriptor_key: "tier".into(),
                metadata_key: Some(metadata_pb::MetadataKey {
                    key: "ns".into(),
                    path: vec![metadata_pb::metadata_key::PathSegment {
                        segment: Some(metadata_pb::metadata_key::path_segment::Segment::Key(
                            field.into(),
                        )),
                    }],
                }),
                default_value: default.into(),
                ..Default::default()
            })
        };
        let generic = Spec::GenericKey(action::GenericKey {
            descriptor_value: "v".into(),
            ..Default::default()
        });
        let query = Spec::QueryParameters(action::QueryParameters {
            query_parameter_name: "k".into(),
            descriptor_key: "q".into(),
            skip_if_absent: false,
        });
        let masked = Spec::MaskedRemoteAddress(action::MaskedRemoteAddress {
            v4_prefix_mask_len: Some(UInt32Value { value: 16 }),
            v6_prefix_mask_len: None,
        });
        let pair = |key: &str, value: &str| Some((key.to_owned(), value.to_owned()));
        let cases = [
            (
                Spec::SourceCluster(action::SourceCluster {}),
                pair("source_cluster", "me"),
            ),
            (
                Spec::DestinationCluster(action::DestinationCluster {}),
                pair("destination_cluster", "out"),
            ),
            (
                Spec::RemoteAddress(action::RemoteAddress {}),
                pair("remote_address", "10.1.2.3"),
            ),
            (masked, pair("masked_remote_address", "10.1.0.0/16")),
            (generic.clone(), pair("generic_key", "v")),
            (header("x-user", false), pair("h", "bob")),
            (header(":path", false), pair("h", "/a?k=v&n")),
            (header("x-none", false), None),
            (query, pair("q", "v")),
            (user_is("bob", true), pair("header_match", "vip")),
            (user_is("eve", true), None),
            (user_is("eve", false), pair("header_match", "vip")),
            (tier("tier", ""), pair("tier", "gold")),
            (tier("other", "none"), pair("tier", "none")),
            (tier("other", ""), None),
        ];
        for (index, (spec, expected)) in cases.into_iter().enumerate() {
            assert_eq!(one(spec), expected, "case {index}");
        }
        // A header that may be absent is left out; the rest of the entry stays.
        let entries = describe(vec![header("x-none", true), generic]).unwrap();
        assert_eq!(entries, [("generic_key".to_owned(), "v".to_owned())]);
    }
}
