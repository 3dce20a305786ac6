//! Filter state: objects by key that filters set on a connection or a request, for rules, routes, logs, hashing and a few
//! settings of the proxy itself.
//!
//! An object is what its factory makes of a text; one that a listener filter sets may have fields. Some keys mean something to the proxy, and only objects of their own
//! factory do (`envoy.tcp_proxy.cluster`). What is set on a connection is seen by all of its requests; what is set on a
//! request ends with it.
//!
//! Objects that are shared with upstream connections (`ONCE`, `TRANSITIVE`: there are no connections within the proxy to tell
//! them apart) decide, where they may be hashed, which requests share connections: those with the same objects, as in Envoy.

use std::net::IpAddr;
use std::sync::Arc;

use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::envoy::extensions::filters::common::set_filter_state::v3 as common;
use serin_xds::pb::envoy::extensions::filters::http::set_filter_state::v3 as http_filter;
use serin_xds::pb::envoy::extensions::filters::network::set_filter_state::v3 as network_filter;
use serin_xds::pb::envoy::r#type::matcher::v3 as matcher;

use serin_xds::pb::google::protobuf::{Struct, value::Kind};

use super::metadata::struct_to_json;
use crate::config::convert::each;
use crate::config::listener::Cidr;
use crate::config::matchers::StringMatch;
use crate::error::{Refusal, Within};
use crate::observe::format::Format;
use crate::observe::record::{Record, Wants};
use crate::upstream::proxy_header::Tlvs;

/// What makes objects of texts, and so what they can be used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Factory {
    /// `envoy.string`: any text.
    Text,
    /// `envoy.hashable_string`: any text, also for hash policies.
    Hashable,
    /// `envoy.network.ip`: an address.
    Address,
    /// `envoy.tcp_proxy.cluster`: where a TCP proxy sends its connection.
    TcpCluster,
    /// `envoy.tcp_proxy.disable_tunneling`: whether a TCP proxy that tunnels does not.
    NoTunneling,
    /// `envoy.network.upstream_server_name`: the server name of upstream TLS connections.
    ServerName,
    /// `envoy.network.upstream_subject_alt_names`: the names of which upstream TLS peers must have one.
    PeerNames,
    /// `envoy.network.application_protocols`: what upstream TLS connections offer.
    Protocols,
    /// `envoy.ratelimit.hits_addend`: what a request counts at the rate limit service.
    HitsAddend,
}

const FACTORIES: [(&str, Factory); 9] = [
    ("envoy.string", Factory::Text),
    ("envoy.hashable_string", Factory::Hashable),
    ("envoy.network.ip", Factory::Address),
    ("envoy.tcp_proxy.cluster", Factory::TcpCluster),
    ("envoy.tcp_proxy.disable_tunneling", Factory::NoTunneling),
    ("envoy.network.upstream_server_name", Factory::ServerName),
    ("envoy.network.upstream_subject_alt_names", Factory::PeerNames),
    ("envoy.network.application_protocols", Factory::Protocols),
    ("envoy.ratelimit.hits_addend", Factory::HitsAddend),
];

impl Factory {
    fn find(name: &str) -> Option<Self> {
        FACTORIES
            .iter()
            .find(|(own, _)| *own == name)
            .map(|(_, factory)| *factory)
    }

    /// The key under which its objects mean something to the proxy, which is its own name.
    fn key(self) -> &'static str {
        FACTORIES
            .iter()
            .find(|(_, own)| *own == self)
            .map_or("", |(name, _)| name)
    }

    /// Whether it can make something of the text.
    fn takes(self, text: &str) -> bool {
        match self {
            Self::Text | Self::Hashable => true,
            Self::Address => text.parse::<IpAddr>().is_ok(),
            Self::TcpCluster | Self::ServerName | Self::PeerNames => !text.is_empty(),
            Self::Protocols => text.split(',').all(|name| (1..=255).contains(&name.len())),
            Self::NoTunneling => matches!(text, "true" | "false"),
            Self::HitsAddend => text.parse::<u64>().is_ok(),
        }
    }
}

#[derive(Clone, Debug, PartialEq)]
struct Object {
    key: Arc<str>,
    value: Box<str>,
    factory: Factory,
    read_only: bool,
    /// Whether upstream connections have it.
    shared: bool,
    /// What it consists of, where it does.
    fields: Option<Arc<Struct>>,
}

/// What a filter tells of itself.
#[derive(Clone, Debug, PartialEq)]
pub struct Report {
    /// By which it is asked for.
    pub key: Box<str>,
    /// Its text, where it has one.
    pub plain: Option<Box<str>>,
    /// Its text as JSON.
    pub typed: Option<Box<str>>,
    /// What it consists of.
    pub fields: Struct,
}

/// See the module. A list, because there are one or two objects.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct FilterState {
    objects: Vec<Object>,
    reports: Vec<Report>,
    /// What the PROXY protocol has said that endpoints may be told.
    pub tlvs: Option<Tlvs>,
}

/// Shared objects that may be hashed, by key, in their order.
pub type Shared = Box<[(Arc<str>, Box<str>)]>;

impl FilterState {
    /// None.
    pub const EMPTY: Self = Self {
        objects: Vec::new(),
        reports: Vec::new(),
        tlvs: None,
    };

    /// Whether there is nothing.
    pub fn is_empty(&self) -> bool {
        self.objects.is_empty() && self.reports.is_empty()
    }

    /// The text of an object.
    pub fn get(&self, key: &str) -> Option<&str> {
        match self.find(key) {
            Some(object) => Some(&object.value),
            None => self.reported(key)?.plain.as_deref(),
        }
    }

    /// What a filter tells of itself under this key.
    pub fn reported(&self, key: &str) -> Option<&Report> {
        self.reports.iter().find(|report| *report.key == *key)
    }

    /// A filter tells of itself.
    pub(crate) fn report(&mut self, report: Report) {
        self.reports.retain(|own| own.key != report.key);
        self.reports.push(report);
    }

    fn find(&self, key: &str) -> Option<&Object> {
        self.objects.iter().find(|object| *object.key == *key)
    }

    /// The object that means something to the proxy under its factory's own key.
    pub fn known(&self, factory: Factory) -> Option<&str> {
        self.find(factory.key())
            .filter(|object| object.factory == factory)
            .map(|object| &*object.value)
    }

    /// The text of an object that may be hashed.
    pub fn hashable(&self, key: &str) -> Option<&str> {
        self.find(key)
            .filter(|object| object.factory == Factory::Hashable)
            .map(|object| &*object.value)
    }

    /// A field of an object that has fields.
    pub fn field(&self, key: &str, field: &str) -> Option<&str> {
        match &self.fields(key)?.fields.get(field)?.kind {
            Some(Kind::StringValue(text)) => Some(text),
            _ => None,
        }
    }

    /// The fields of an object.
    pub fn fields(&self, key: &str) -> Option<&Struct> {
        match self.find(key) {
            Some(object) => object.fields.as_deref(),
            None => self.reported(key).map(|report| &report.fields),
        }
    }

    /// Sets an object that has fields; its text is JSON.
    pub(crate) fn set_fields(&mut self, key: &str, fields: Struct) {
        self.set(Object {
            key: key.into(),
            value: struct_to_json(&fields).to_string().into(),
            factory: Factory::Text,
            read_only: false,
            shared: false,
            fields: Some(Arc::new(fields)),
        });
    }

    /// The objects by which connections to endpoints are told apart.
    pub fn shared(&self) -> Shared {
        self.objects
            .iter()
            .filter(|object| object.shared && object.factory == Factory::Hashable)
            .map(|object| (object.key.clone(), object.value.clone()))
            .collect()
    }

    fn set(&mut self, object: Object) {
        match self.objects.iter_mut().find(|own| own.key == object.key) {
            Some(own) if own.read_only => {}
            Some(own) => *own = object,
            None => self.objects.push(object),
        }
    }
}

/// One `FilterStateValue`.
#[derive(Debug)]
struct Setting {
    key: Arc<str>,
    factory: Factory,
    format: Format,
    skip_if_empty: bool,
    read_only: bool,
    shared: bool,
}

/// Objects that a filter sets, and what must be kept of a request to make them.
#[derive(Debug, Default)]
pub struct Settings {
    settings: Box<[Setting]>,
    /// Fields that the formats name.
    pub wants: Wants,
}

impl Settings {
    /// Compiles the list.
    pub(crate) fn compile(from: &[common::FilterStateValue], field: &str) -> Result<Self, Refusal> {
        let mut wants = Wants::default();
        let settings = each(from, field, |value| Setting::compile(value, &mut wants))?;
        Ok(Self { settings, wants })
    }

    /// How many objects it sets.
    pub fn len(&self) -> usize {
        self.settings.len()
    }

    /// Whether it sets nothing.
    pub fn is_empty(&self) -> bool {
        self.settings.is_empty()
    }

    /// What one of them is for this request or connection. Each may name those before it.
    pub fn make(&self, index: usize, record: &Record<'_>) -> Option<Made> {
        let setting = self.settings.get(index)?;
        let mut value = String::new();
        setting.format.write(record, &mut value);
        if matches!(setting.format, Format::Json(..)) {
            // The line feed is that of a log.
            value.pop();
        }
        if (value.is_empty() && setting.skip_if_empty) || !setting.factory.takes(&value) {
            return None;
        }
        Some(Made(Object {
            key: setting.key.clone(),
            value: value.into(),
            factory: setting.factory,
            read_only: setting.read_only,
            shared: setting.shared,
            fields: None,
        }))
    }
}

/// The HTTP filter's message.
#[derive(Debug)]
pub struct SetFilterState {
    /// What it sets when a request's head has come.
    pub settings: Settings,
    /// Whether the route is searched again.
    pub reroutes: bool,
}

impl SetFilterState {
    /// Compiles the message.
    pub(crate) fn compile(from: &http_filter::Config) -> Result<Self, Refusal> {
        Ok(Self {
            settings: Settings::compile(&from.on_request_headers, "on_request_headers")?,
            reroutes: from.clear_route_cache,
        })
    }
}

/// The network filter's message.
#[derive(Debug)]
pub struct SetConnectionState {
    /// What it sets on every connection.
    pub connected: Settings,
    /// What it sets on those with TLS that we end, after the others.
    pub handshaken: Settings,
}

impl SetConnectionState {
    /// Compiles the message.
    pub(crate) fn compile(from: &network_filter::Config) -> Result<Self, Refusal> {
        if !from.on_downstream_data.is_empty() {
            return Err(Refusal::new("on_downstream_data", "not supported"));
        }
        Ok(Self {
            connected: Settings::compile(&from.on_new_connection, "on_new_connection")?,
            handshaken: Settings::compile(&from.on_downstream_tls_handshake, "on_downstream_tls_handshake")?,
        })
    }
}

/// An object that was made and is to be set.
#[derive(Debug)]
pub struct Made(Object);

impl Made {
    /// Sets it. One that may only be read stays what it is.
    pub fn set(self, state: &mut FilterState) {
        state.set(self.0);
    }
}

impl Setting {
    fn compile(from: &common::FilterStateValue, wants: &mut Wants) -> Result<Self, Refusal> {
        let Some(common::filter_state_value::Key::ObjectKey(key)) = &from.key else {
            return Err(Refusal::new("object_key", "is missing"));
        };
        if key.is_empty() {
            return Err(Refusal::new("object_key", "is missing"));
        }
        let (field, name) = if from.factory_key.is_empty() {
            ("object_key", key)
        } else {
            ("factory_key", &from.factory_key)
        };
        let factory = Factory::find(name)
            .ok_or_else(|| Refusal::new(field, format!("there is no object factory {name:?}")))?;
        use common::filter_state_value::SharedWithUpstream;
        let shared = match SharedWithUpstream::try_from(from.shared_with_upstream) {
            Ok(SharedWithUpstream::None) => false,
            Ok(SharedWithUpstream::Once | SharedWithUpstream::Transitive) => true,
            Err(_) => {
                return Err(Refusal::new(
                    "shared_with_upstream",
                    format!("{} is unknown", from.shared_with_upstream),
                ));
            }
        };
        let Some(common::filter_state_value::Value::FormatString(format)) = &from.value else {
            return Err(Refusal::new("format_string", "is missing"));
        };
        #[allow(deprecated)] // still read by Envoy
        let read_only = from.read_only;
        Ok(Self {
            key: key.as_str().into(),
            factory,
            format: Format::compile(Some(format), wants).within("format_string")?,
            skip_if_empty: from.skip_if_empty,
            read_only,
            shared,
        })
    }
}

/// A `FilterStateMatcher`: nothing matches an object that is not there.
#[derive(Clone, Debug)]
pub struct StateMatch {
    key: Box<str>,
    test: Test,
}

#[derive(Clone, Debug)]
enum Test {
    Text(StringMatch),
    Address(Box<[Cidr]>, bool),
}

impl StateMatch {
    /// Compiles the message.
    pub(crate) fn compile(from: &matcher::FilterStateMatcher) -> Result<Self, Refusal> {
        use matcher::filter_state_matcher::Matcher;
        if from.key.is_empty() {
            return Err(Refusal::new("key", "is missing"));
        }
        let test = match &from.matcher {
            Some(Matcher::StringMatch(test)) => {
                Test::Text(StringMatch::compile(test).within("string_match")?)
            }
            Some(Matcher::AddressMatch(test)) => {
                let ranges = test.ranges.iter().enumerate().map(|(index, range)| {
                    compile_range(range).within(format!("address_match.ranges[{index}]"))
                });
                Test::Address(ranges.collect::<Result<_, _>>()?, test.invert_match)
            }
            None => return Err(Refusal::new("matcher", "is missing")),
        };
        Ok(Self {
            key: from.key.as_str().into(),
            test,
        })
    }

    /// Whether the object is as asked.
    pub fn matches(&self, state: &FilterState) -> bool {
        state.get(&self.key).is_some_and(|value| self.test_of(value))
    }

    /// Whether a text is as asked.
    pub fn test_of(&self, value: &str) -> bool {
        match &self.test {
            Test::Text(test) => test.matches(value),
            Test::Address(ranges, invert) => value
                .parse()
                .is_ok_and(|address| ranges.iter().any(|range| range.contains(address)) != *invert),
        }
    }
}

fn compile_range(from: &serin_xds::pb::xds::core::v3::CidrRange) -> Result<Cidr, Refusal> {
    Cidr::compile(&core::CidrRange {
        address_prefix: from.address_prefix.clone(),
        prefix_len: from.prefix_len,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn object(key: &str, value: &str, factory: Factory, read_only: bool) -> Object {
        Object {
            key: key.into(),
            value: value.into(),
            factory,
            read_only,
            shared: false,
            fields: None,
        }
    }

    #[test]
    fn only_objects_of_their_own_factory_mean_something_under_a_known_key() {
        let mut state = FilterState::default();
        state.set(object("envoy.tcp_proxy.cluster", "a", Factory::Text, false));
        assert_eq!(state.known(Factory::TcpCluster), None);
        assert_eq!(state.get("envoy.tcp_proxy.cluster"), Some("a"));
        state.set(object("envoy.tcp_proxy.cluster", "b", Factory::TcpCluster, true));
        state.set(object("envoy.tcp_proxy.cluster", "c", Factory::TcpCluster, false));
        assert_eq!(state.known(Factory::TcpCluster), Some("b"));
        assert_eq!(state.hashable("envoy.tcp_proxy.cluster"), None);
    }

    #[test]
    fn a_factory_makes_nothing_of_a_text_that_is_not_its_own_kind() {
        for (factory, good, bad) in [
            (Factory::Address, "::1", "localhost"),
            (Factory::HitsAddend, "0", "-1"),
            (Factory::NoTunneling, "true", "1"),
            (Factory::ServerName, "a.example", ""),
            (Factory::PeerNames, "a.example,b.example", ""),
            (Factory::Protocols, "h2,http/1.1", "h2,,http/1.1"),
        ] {
            assert!(factory.takes(good) && !factory.takes(bad), "{factory:?}");
        }
    }

    #[test]
    fn addresses_match_by_range_and_what_is_none_never() {
        let message = |invert| matcher::FilterStateMatcher {
            key: "client".into(),
            matcher: Some(matcher::filter_state_matcher::Matcher::AddressMatch(
                matcher::AddressMatcher {
                    ranges: vec![serin_xds::pb::xds::core::v3::CidrRange {
                        address_prefix: "10.0.0.0".into(),
                        prefix_len: Some(serin_xds::pb::google::protobuf::UInt32Value { value: 8 }),
                    }],
                    invert_match: invert,
                },
            )),
        };
        for invert in [false, true] {
            let test = StateMatch::compile(&message(invert)).unwrap();
            for (value, expected) in [("10.1.2.3", !invert), ("11.0.0.1", invert), ("blue", false)] {
                let mut state = FilterState::default();
                assert!(!test.matches(&state));
                state.set(object("client", value, Factory::Text, false));
                assert_eq!(test.matches(&state), expected, "{value} {invert}");
            }
        }
    }
}
