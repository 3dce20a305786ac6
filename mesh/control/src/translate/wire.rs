//! Small builders for the messages that every other file here needs.

use std::collections::HashMap;
use std::time::Duration;

use serin_model::Provenance;
use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::envoy::r#type::matcher::v3 as matcher;
use serin_xds::pb::envoy::r#type::v3 as ty;
use serin_xds::pb::google::protobuf as wkt;
use serin_xds::resource::Origin;

use prost::{Message, Name};

pub(super) fn duration(value: Duration) -> wkt::Duration {
    wkt::Duration {
        seconds: i64::try_from(value.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(value.subsec_nanos()).unwrap_or(0),
    }
}

pub(super) fn seconds(value: i64) -> wkt::Duration {
    wkt::Duration {
        seconds: value,
        nanos: 0,
    }
}

pub(super) fn uint32(value: u32) -> wkt::UInt32Value {
    wkt::UInt32Value { value }
}

pub(super) fn boolean(value: bool) -> wkt::BoolValue {
    wkt::BoolValue { value }
}

pub(super) fn any<M: Message + Name>(message: &M) -> wkt::Any {
    wkt::Any {
        type_url: M::type_url(),
        value: message.encode_to_vec(),
    }
}

pub(super) fn text(value: &str) -> wkt::Value {
    wkt::Value {
        kind: Some(wkt::value::Kind::StringValue(value.to_owned())),
    }
}

pub(super) fn flag(value: bool) -> wkt::Value {
    wkt::Value {
        kind: Some(wkt::value::Kind::BoolValue(value)),
    }
}

pub(super) fn structure(fields: impl IntoIterator<Item = (&'static str, wkt::Value)>) -> wkt::Struct {
    wkt::Struct {
        fields: fields
            .into_iter()
            .map(|(name, value)| (name.to_owned(), value))
            .collect(),
    }
}

pub(super) fn list(values: Vec<wkt::Value>) -> wkt::Value {
    wkt::Value {
        kind: Some(wkt::value::Kind::ListValue(wkt::ListValue { values })),
    }
}

pub(super) fn object(fields: impl IntoIterator<Item = (&'static str, wkt::Value)>) -> wkt::Value {
    wkt::Value {
        kind: Some(wkt::value::Kind::StructValue(structure(fields))),
    }
}

/// Filter metadata of one namespace.
pub(super) fn metadata(name: &str, content: wkt::Struct) -> core::Metadata {
    core::Metadata {
        filter_metadata: HashMap::from([(name.to_owned(), content)]),
        ..Default::default()
    }
}

/// `istio.config`: the object that a route or cluster was made from, in the form that Istio's tools expect.
pub(super) fn config_path(origin: &Provenance) -> String {
    let kind = match origin.object.kind {
        serin_model::Kind::VirtualService => "virtual-service",
        serin_model::Kind::DestinationRule => "destination-rule",
        serin_model::Kind::Gateway => "gateway",
        serin_model::Kind::ServiceEntry => "service-entry",
        serin_model::Kind::Sidecar => "sidecar",
        serin_model::Kind::Service
        | serin_model::Kind::EndpointSlice
        | serin_model::Kind::Pod
        | serin_model::Kind::Node => "service",
    };
    format!(
        "/apis/networking.istio.io/v1/namespaces/{}/{kind}/{}",
        origin.object.namespace, origin.object.name
    )
}

pub(super) fn origin(provenance: &Provenance) -> Origin {
    Origin {
        object: provenance.object.to_string().into(),
        generation: provenance.generation,
    }
}

/// Configuration over the aggregated stream, awaited without limit.
pub(super) fn ads() -> core::ConfigSource {
    core::ConfigSource {
        initial_fetch_timeout: Some(seconds(0)),
        resource_api_version: core::ApiVersion::V3 as i32,
        config_source_specifier: Some(core::config_source::ConfigSourceSpecifier::Ads(Default::default())),
        ..Default::default()
    }
}

pub(super) fn address(ip: &str, port: u32) -> core::Address {
    core::Address {
        address: Some(core::address::Address::SocketAddress(socket(ip, port))),
    }
}

pub(super) fn socket(ip: &str, port: u32) -> core::SocketAddress {
    core::SocketAddress {
        address: ip.to_owned(),
        port_specifier: Some(core::socket_address::PortSpecifier::PortValue(port)),
        ..Default::default()
    }
}

pub(super) fn regex(expression: &str) -> matcher::RegexMatcher {
    matcher::RegexMatcher {
        regex: expression.to_owned(),
        ..Default::default()
    }
}

/// A share in percent, as millionths (Istio's `translatePercentToFractionalPercent`).
pub(super) fn fraction(percent: f64) -> ty::FractionalPercent {
    ty::FractionalPercent {
        // Rounded: 33.3 % is not representable and must not become 332,999 millionths.
        numerator: (percent * 10_000.0).round() as u32,
        denominator: ty::fractional_percent::DenominatorType::Million as i32,
    }
}

/// A whole percentage.
pub(super) fn hundredths(percent: u32) -> ty::FractionalPercent {
    ty::FractionalPercent {
        numerator: percent,
        denominator: ty::fractional_percent::DenominatorType::Hundred as i32,
    }
}
