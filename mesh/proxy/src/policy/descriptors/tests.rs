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
        remote: "10.1.2.3:5".parse().unwrap(),
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
