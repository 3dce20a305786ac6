//! Values by type (TLVs) of PROXY protocol headers: taken from clients, handed on to endpoints, also beside Envoy; and what
//! else the filter state says of upstream connections.

use std::net::SocketAddr;

use serin_xds::ResourceType;
use serin_xds::pb::envoy::config::cluster::v3 as cluster;
use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::envoy::config::listener::v3 as listener;
use serin_xds::pb::envoy::config::route::v3 as route;
use serin_xds::pb::envoy::extensions::filters::common::set_filter_state::v3 as common;
use serin_xds::pb::envoy::extensions::filters::http::set_filter_state::v3 as http_state;
use serin_xds::pb::envoy::extensions::filters::listener::proxy_protocol::v3 as proxy_in;
use serin_xds::pb::envoy::extensions::filters::network::set_filter_state::v3 as set_state;
use serin_xds::pb::envoy::extensions::transport_sockets::proxy_protocol::v3 as proxy_out;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::certificates::{Authority, client_socket, common as common_tls, server_socket};
use crate::fixture::*;
use crate::interop_ads::{Pair, from_ads, resource, router};
use crate::listener::{greeter, tcp_chain};

/// A header of version 2 from 203.0.113.7 to 10.0.0.1 (or one of the sender itself), with these values by type.
fn header(command: u8, tlvs: &[(u8, &[u8])]) -> Vec<u8> {
    let mut rest = if command == 1 {
        vec![203, 0, 113, 7, 10, 0, 0, 1, 4, 210, 0, 80]
    } else {
        Vec::new()
    };
    rest.extend(listed(tlvs));
    let mut out = b"\r\n\r\n\0\r\nQUIT\n".to_vec();
    out.extend([0x20 | command, if command == 1 { 0x11 } else { 0 }]);
    out.extend((rest.len() as u16).to_be_bytes());
    out.extend(rest);
    out
}

fn listed(tlvs: &[(u8, &[u8])]) -> Vec<u8> {
    let mut out = Vec::new();
    for (kind, value) in tlvs {
        out.push(*kind);
        out.extend((value.len() as u16).to_be_bytes());
        out.extend(*value);
    }
    out
}

fn rule(kind: u32, key: &str, base64: bool) -> proxy_in::proxy_protocol::Rule {
    use proxy_in::proxy_protocol::key_value_pair::ValueStringEncoding;
    let encoding = if base64 {
        ValueStringEncoding::Base64
    } else {
        ValueStringEncoding::Unspecified
    };
    proxy_in::proxy_protocol::Rule {
        tlv_type: kind,
        on_tlv_present: Some(proxy_in::proxy_protocol::KeyValuePair {
            key: key.into(),
            value_string_encoding: encoding as i32,
            ..Default::default()
        }),
    }
}

fn before(config: &proxy_in::ProxyProtocol) -> listener::ListenerFilter {
    listener::ListenerFilter {
        name: "envoy.filters.listener.proxy_protocol".into(),
        config_type: Some(listener::listener_filter::ConfigType::TypedConfig(any(config))),
        ..Default::default()
    }
}

/// Sets an object of a connection.
fn setting(key: &str, factory: &str, format: &str) -> common::FilterStateValue {
    common::FilterStateValue {
        key: Some(common::filter_state_value::Key::ObjectKey(key.into())),
        factory_key: factory.into(),
        value: Some(common::filter_state_value::Value::FormatString(
            core::SubstitutionFormatString {
                format: Some(core::substitution_format_string::Format::TextFormatSource(
                    core::DataSource {
                        specifier: Some(core::data_source::Specifier::InlineString(format.into())),
                        ..Default::default()
                    },
                )),
                omit_empty_values: true,
                ..Default::default()
            },
        )),
        skip_if_empty: true,
        ..Default::default()
    }
}

fn stating(values: Vec<common::FilterStateValue>) -> listener::Filter {
    let config = set_state::Config {
        on_new_connection: values,
        ..Default::default()
    };
    network_filter("envoy.filters.network.set_filter_state", Some(any(&config)))
}

/// A listener that takes headers so, and lets this format say where connections go.
fn choosing(name: &str, config: &proxy_in::ProxyProtocol, format: &str) -> listener::Listener {
    let mut chain = tcp_chain("other");
    chain
        .filters
        .insert(0, stating(vec![setting("envoy.tcp_proxy.cluster", "", format)]));
    let mut message = listener_of(name, core::TrafficDirection::Outbound, vec![chain]);
    message.listener_filters = vec![before(config)];
    message
}

fn fixed(name: &str, at: SocketAddr) -> cluster::Cluster {
    let mut out = eds_cluster(name);
    out.cluster_discovery_type = None;
    out.eds_cluster_config = None;
    out.load_assignment = Some(assignment(name, &[(at, "")]));
    out
}

/// Everything that is answered to these bytes, until the end or as much as `enough`.
async fn answer(at: SocketAddr, bytes: &[u8], enough: usize) -> String {
    let mut stream = TcpStream::connect(at).await.unwrap();
    let mut out = Vec::new();
    let work = async {
        let _ = stream.write_all(bytes).await;
        while out.len() < enough {
            let mut chunk = [0; 512];
            match stream.read(&mut chunk).await {
                Ok(count @ 1..) => out.extend(&chunk[..count]),
                Ok(_) | Err(_) => return,
            }
        }
    };
    soon("an answer", work).await;
    String::from_utf8_lossy(&out).into_owned()
}

/// Receiving cases: listener, bytes, who greets.
fn receiving() -> Vec<(&'static str, Vec<u8>, &'static str)> {
    let (on_behalf, own) = (1, 0);
    vec![
        ("noted", header(on_behalf, &[(0xe0, b"plain")]), "1"),
        (
            "noted",
            header(on_behalf, &[(0x02, b"x"), (0xe0, b"a\xffb")]),
            "2",
        ),
        ("noted", header(on_behalf, &[(0xe1, b"plain")]), "0"),
        ("noted", header(on_behalf, &[]), "0"),
        // One of several.
        (
            "noted",
            header(on_behalf, &[(0xe0, b"plain"), (0xe0, b"a\xffb")]),
            "1",
        ),
        ("noted", header(own, &[(0xe0, b"plain")]), "1"),
        (
            "noted",
            b"PROXY TCP4 203.0.113.7 10.0.0.1 1234 80\r\n".to_vec(),
            "0",
        ),
        ("coded", header(on_behalf, &[(0xe0, b"plain")]), "3"),
        ("stated", header(on_behalf, &[(0xe0, b"plain")]), "1"),
        ("stated", header(on_behalf, &[(0x01, b"plain")]), "0"),
        // No list of values.
        (
            "noted",
            {
                let mut bytes = header(on_behalf, &[(0xe0, b"plain")]);
                let at = bytes.len() - 6;
                bytes[at] = 9;
                bytes
            },
            "",
        ),
        (
            "passed",
            {
                let mut bytes = header(on_behalf, &[(0xe0, b"")]);
                let at = bytes.len() - 1;
                bytes[at] = 9;
                bytes
            },
            "",
        ),
    ]
}

async fn receivers() -> Vec<serin_xds::Resource> {
    let mut resources = Vec::new();
    for (name, greeting) in [("other", "0"), ("plain", "1"), ("a!b", "2"), ("cGxhaW4=", "3")] {
        let message = fixed(name, greeter(greeting).await);
        resources.push(resource(ResourceType::Cluster, name, &message));
    }
    let rules = |base64, in_state: bool| proxy_in::ProxyProtocol {
        rules: vec![rule(0xe0, "id", base64)],
        tlv_location: i32::from(in_state),
        ..Default::default()
    };
    let noted = "%DYNAMIC_METADATA(envoy.filters.listener.proxy_protocol:id)%";
    for message in [
        choosing("noted", &rules(false, false), noted),
        choosing("coded", &rules(true, false), noted),
        choosing(
            "stated",
            &rules(false, true),
            "%FILTER_STATE(envoy.network.proxy_protocol.tlv:FIELD:id)%",
        ),
        choosing("passed", &proxy_in::ProxyProtocol::default(), noted),
    ] {
        resources.push(resource(ResourceType::Listener, &message.name, &message));
    }
    resources
}

#[tokio::test]
async fn what_a_proxy_header_says_by_type_is_known_to_rules_and_formats() {
    let harness = Harness::start();
    for one in receivers().await {
        harness.put_resource(&one).await;
    }
    for (name, bytes, expected) in receiving() {
        let at = harness.proxy.listener_address(name).unwrap();
        assert_eq!(answer(at, &bytes, 1).await, expected, "{name} {bytes:?}");
    }
}

#[tokio::test]
async fn envoy_takes_values_of_proxy_headers_alike() {
    let Some(pair) = Pair::start(receivers().await).await else {
        return;
    };
    for (name, bytes, expected) in receiving() {
        for (who, at) in ["serin-proxy", "Envoy"]
            .into_iter()
            .zip(pair.listener(name).await)
        {
            // Behind a header for the sender itself Envoy finds values or does not, by chance.
            if who == "Envoy" && bytes.get(12) == Some(&0x20) {
                continue;
            }
            assert_eq!(answer(at, &bytes, 1).await, expected, "{who}: {name} {bytes:?}");
        }
    }
    pair.stop().await;
}

/// Says what of a PROXY protocol header of version 2 follows the addresses, as numbers.
async fn reading() -> SocketAddr {
    let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = socket.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = socket.accept().await {
            tokio::spawn(async move {
                let mut head = [0; 16];
                stream.read_exact(&mut head).await.ok()?;
                let mut rest = vec![0; usize::from(u16::from_be_bytes([head[14], head[15]]))];
                stream.read_exact(&mut rest).await.ok()?;
                let text = format!("{:?}", rest.get(12..).unwrap_or_default());
                stream.write_all(text.as_bytes()).await.ok()
            });
        }
    });
    at
}

/// A cluster whose endpoints are told so.
fn told(
    name: &str,
    at: SocketAddr,
    config: core::ProxyProtocolConfig,
    own: &[core::TlvEntry],
) -> cluster::Cluster {
    let mut out = fixed(name, at);
    let inner = core::TransportSocket {
        name: "envoy.transport_sockets.raw_buffer".into(),
        config_type: Some(core::transport_socket::ConfigType::TypedConfig(any(
            &serin_xds::pb::envoy::extensions::transport_sockets::raw_buffer::v3::RawBuffer {},
        ))),
    };
    out.transport_socket = Some(core::TransportSocket {
        name: "envoy.transport_sockets.upstream_proxy_protocol".into(),
        config_type: Some(core::transport_socket::ConfigType::TypedConfig(any(
            &proxy_out::ProxyProtocolUpstreamTransport {
                config: Some(config),
                transport_socket: Some(inner),
                ..Default::default()
            },
        ))),
    });
    if !own.is_empty() {
        let host = core::PerHostConfig {
            added_tlvs: own.to_vec(),
        };
        if let Some(assignment) = &mut out.load_assignment {
            assignment.endpoints[0].lb_endpoints[0].metadata = Some(core::Metadata {
                typed_filter_metadata: [("envoy.transport_sockets.proxy_protocol".to_owned(), any(&host))]
                    .into(),
                ..Default::default()
            });
        }
    }
    out
}

fn entry(kind: u32, value: &[u8]) -> core::TlvEntry {
    core::TlvEntry {
        r#type: kind,
        value: value.to_vec(),
        ..Default::default()
    }
}

fn passing(all: bool, kinds: &[u32]) -> Option<core::ProxyProtocolPassThroughTlVs> {
    Some(core::ProxyProtocolPassThroughTlVs {
        match_type: i32::from(!all),
        tlv_type: kinds.to_vec(),
    })
}

/// Sending cases: listener, what the client brings, what the endpoint is told.
fn sending() -> Vec<(&'static str, Vec<u8>, Vec<u8>)> {
    let brought: &[(u8, &[u8])] = &[
        (0xd1, b"one"),
        (0xe1, b"brought"),
        (0xd1, b"two"),
        (0xd2, b"three"),
    ];
    vec![
        ("all", header(1, brought), listed(brought)),
        (
            "some",
            header(1, brought),
            listed(&[(0xd1, b"one"), (0xd1, b"two")]),
        ),
        ("none", header(1, brought), Vec::new()),
        (
            "added",
            header(1, brought),
            listed(&[
                (0xe2, b"host"),
                (0xe1, b"fixed"),
                (0xd1, b"one"),
                (0xd1, b"two"),
                (0xd2, b"three"),
            ]),
        ),
        (
            "added",
            header(1, &[]),
            listed(&[(0xe2, b"host"), (0xe1, b"fixed")]),
        ),
    ]
}

async fn senders() -> Vec<serin_xds::Resource> {
    let at = reading().await;
    let v2 = |pass, added: &[core::TlvEntry]| core::ProxyProtocolConfig {
        version: core::proxy_protocol_config::Version::V2 as i32,
        pass_through_tlvs: pass,
        added_tlvs: added.to_vec(),
    };
    let clusters = [
        told("all", at, v2(passing(true, &[]), &[]), &[]),
        told("some", at, v2(passing(false, &[0xd1, 0xe9]), &[]), &[]),
        told("none", at, v2(None, &[]), &[]),
        told(
            "added",
            at,
            v2(passing(true, &[]), &[entry(0xe1, b"fixed"), entry(0xe2, b"lost")]),
            &[entry(0xe2, b"host")],
        ),
    ];
    let mut resources = Vec::new();
    let take = proxy_in::ProxyProtocol {
        pass_through_tlvs: passing(true, &[]),
        ..Default::default()
    };
    for cluster in clusters {
        let name = cluster.name.clone();
        let chain = tcp_chain(&name);
        let mut message = listener_of(&name, core::TrafficDirection::Outbound, vec![chain]);
        message.listener_filters = vec![before(&take)];
        resources.push(resource(ResourceType::Cluster, &name, &cluster));
        resources.push(resource(ResourceType::Listener, &name, &message));
    }
    resources
}

#[tokio::test]
async fn endpoints_are_told_values_by_type_of_the_configuration_their_own_and_the_clients() {
    let harness = Harness::start();
    for one in senders().await {
        harness.put_resource(&one).await;
    }
    for (name, bytes, expected) in sending() {
        let at = harness.proxy.listener_address(name).unwrap();
        assert_eq!(
            answer(at, &bytes, usize::MAX).await,
            format!("{expected:?}"),
            "{name}"
        );
    }
}

#[tokio::test]
async fn envoy_tells_endpoints_the_same_values_by_type() {
    let Some(pair) = Pair::start(senders().await).await else {
        return;
    };
    for (name, bytes, expected) in sending() {
        for at in pair.listener(name).await {
            assert_eq!(
                answer(at, &bytes, usize::MAX).await,
                format!("{expected:?}"),
                "{name}"
            );
        }
    }
    pair.stop().await;
}

#[tokio::test]
async fn values_by_type_that_cannot_be_honoured_are_refused_with_their_path() {
    let harness = Harness::start();
    let at: SocketAddr = "127.0.0.1:1".parse().unwrap();
    let config = |added: Vec<core::TlvEntry>, pass| core::ProxyProtocolConfig {
        version: 1,
        added_tlvs: added,
        pass_through_tlvs: pass,
    };
    let formatted = core::TlvEntry {
        r#type: 1,
        format_string: Some(core::SubstitutionFormatString::default()),
        ..Default::default()
    };
    let socket = "transport_socket.typed_config.config.";
    let socket = socket.replace("typed_config.", "");
    for (config, path) in [
        (config(vec![formatted], None), "added_tlvs[0].format_string"),
        (config(vec![entry(256, b"a")], None), "added_tlvs[0].type"),
        (config(vec![entry(1, b"")], None), "added_tlvs[0].value"),
        (
            config(Vec::new(), passing(false, &[256])),
            "pass_through_tlvs.tlv_type",
        ),
    ] {
        let message = told("c", at, config, &[]);
        let refused = harness
            .try_put(ResourceType::Cluster, "c", &message)
            .await
            .unwrap();
        assert!(refused.starts_with(&format!("{socket}{path}")), "{refused}");
    }
    let mut message = choosing("l", &proxy_in::ProxyProtocol::default(), "%PROTOCOL%");
    for (config, path) in [
        (
            proxy_in::ProxyProtocol {
                rules: vec![rule(1, "", false)],
                ..Default::default()
            },
            "rules[0].on_tlv_present.key",
        ),
        (
            proxy_in::ProxyProtocol {
                rules: vec![rule(256, "a", false)],
                ..Default::default()
            },
            "rules[0].tlv_type",
        ),
        (
            proxy_in::ProxyProtocol {
                tlv_location: 7,
                ..Default::default()
            },
            "tlv_location",
        ),
    ] {
        message.listener_filters = vec![before(&config)];
        let refused = harness
            .try_put(ResourceType::Listener, "l", &message)
            .await
            .unwrap();
        let expected = format!("listener_filters[0].typed_config.{path}");
        assert!(refused.starts_with(&expected), "{refused}");
    }
}

/// Answers every request with the number of its connection, counted from where it is asked.
async fn numbering() -> SocketAddr {
    let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = socket.local_addr().unwrap();
    tokio::spawn(async move {
        for number in 0.. {
            let (mut stream, _) = socket.accept().await.unwrap();
            tokio::spawn(async move {
                let mut heard = Vec::new();
                let mut chunk = [0; 1024];
                while let Ok(count @ 1..) = stream.read(&mut chunk).await {
                    heard.extend(&chunk[..count]);
                    if heard.ends_with(b"\r\n\r\n") {
                        heard.clear();
                        let text = format!("{number}");
                        let answer =
                            format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{text}", text.len());
                        if stream.write_all(answer.as_bytes()).await.is_err() {
                            return;
                        }
                    }
                }
            });
        }
    });
    at
}

/// A listener `name` over HTTP that sets this object of each request and sends everything to `cluster`.
fn http_setting(name: &str, cluster: &str, value: common::FilterStateValue) -> Vec<serin_xds::Resource> {
    let config = http_state::Config {
        on_request_headers: vec![value],
        ..Default::default()
    };
    let mut manager = manager(name);
    from_ads(&mut manager);
    manager.http_filters = vec![
        http_filter("envoy.filters.http.set_filter_state", Some(any(&config))),
        router(),
    ];
    let listener = listener_of(name, core::TrafficDirection::Outbound, vec![http_chain(&manager)]);
    let routes = route::RouteConfiguration {
        name: name.into(),
        virtual_hosts: vec![host("all", "*", vec![prefix_route("/", to_cluster(cluster))])],
        ..Default::default()
    };
    vec![
        resource(ResourceType::Listener, name, &listener),
        resource(ResourceType::Route, name, &routes),
    ]
}

fn tenant(factory: &str, shared: common::filter_state_value::SharedWithUpstream) -> common::FilterStateValue {
    common::FilterStateValue {
        shared_with_upstream: shared as i32,
        ..setting("tenant", factory, "%REQ(x-tenant)%")
    }
}

/// Where tenants share connections, and where they do not.
async fn tenants() -> Vec<serin_xds::Resource> {
    use common::filter_state_value::SharedWithUpstream as Share;
    let mut out = Vec::new();
    for (name, factory, shared) in [
        ("own", "envoy.hashable_string", Share::None),
        ("once", "envoy.hashable_string", Share::Once),
        ("transitive", "envoy.hashable_string", Share::Transitive),
        ("text", "envoy.string", Share::Once),
    ] {
        let cluster = fixed(name, numbering().await);
        out.push(resource(ResourceType::Cluster, name, &cluster));
        out.extend(http_setting(name, name, tenant(factory, shared)));
    }
    out
}

/// Which requests of these tenants, one after the other, had the same connection: its first request's place for each.
async fn connections(at: SocketAddr) -> Vec<usize> {
    let mut seen: Vec<String> = Vec::new();
    for tenant in ["a", "b", "a", "", "b", ""] {
        let request = http::Request::get("/")
            .header("host", "a")
            .header("x-tenant", tenant)
            .body(http_body_util::Full::default());
        let (status, _, body) = send(at, request.unwrap()).await;
        assert_eq!(status, 200);
        seen.push(body);
    }
    seen.iter()
        .map(|own| seen.iter().position(|other| other == own).unwrap())
        .collect()
}

const TENANTS: [(&str, [usize; 6]); 4] = [
    ("own", [0; 6]),
    ("once", [0, 1, 0, 3, 1, 3]),
    ("transitive", [0, 1, 0, 3, 1, 3]),
    ("text", [0; 6]),
];

#[tokio::test]
async fn requests_share_connections_with_those_of_the_same_shared_objects() {
    let harness = Harness::start();
    for one in tenants().await {
        harness.put_resource(&one).await;
    }
    for (name, expected) in TENANTS {
        let at = harness.proxy.listener_address(name).unwrap();
        assert_eq!(connections(at).await, expected, "{name}");
    }
}

#[tokio::test]
async fn envoy_keeps_connections_of_shared_objects_apart_alike() {
    let Some(pair) = Pair::start(tenants().await).await else {
        return;
    };
    for (name, expected) in TENANTS {
        for at in pair.listener(name).await {
            assert_eq!(connections(at).await, expected, "{name}");
        }
    }
    pair.stop().await;
}

#[tokio::test]
async fn the_filter_state_says_who_an_endpoint_must_be_and_which_protocols_it_is_offered() {
    let authority = Authority::new("ca");
    let server = authority.issue(&["spiffe://td/server", "app.prod"]);
    let harness = Harness::start();
    // An endpoint that says what ALPN has agreed on.
    let backend = Harness::start();
    let mut chain = tcp_chain("greeter");
    chain.transport_socket = server_socket(
        common_tls(Some(&server), None, &["h2", "http/1.1", "mine"]),
        false,
    );
    backend
        .put(
            ResourceType::Cluster,
            "greeter",
            &fixed("greeter", greeter("hello").await),
        )
        .await;
    let message = listener_of("in", core::TrafficDirection::Inbound, vec![chain]);
    backend.put(ResourceType::Listener, "in", &message).await;
    let inside = backend.proxy.listener_address("in").unwrap();
    let mut cluster = fixed("c", inside);
    cluster.transport_socket = client_socket(common_tls(None, Some(authority.context()), &[]), "app.prod");
    harness.put(ResourceType::Cluster, "c", &cluster).await;
    for (name, names, expected) in [
        ("good", "spiffe://td/other,spiffe://td/server", "hello"),
        ("dns", "app.prod", "hello"),
        ("bad", "spiffe://td/other", ""),
    ] {
        let mut chain = tcp_chain("c");
        let key = "envoy.network.upstream_subject_alt_names";
        chain.filters.insert(0, stating(vec![setting(key, "", names)]));
        let message = listener_of(name, core::TrafficDirection::Outbound, vec![chain]);
        harness.put(ResourceType::Listener, name, &message).await;
        let at = harness.proxy.listener_address(name).unwrap();
        assert_eq!(answer(at, b"", expected.len().max(1)).await, expected, "{name}");
    }
    let failed = harness.counter(
        "envoy_cluster_ssl_fail_verify_san",
        &[("envoy_cluster_name", "c")],
    );
    assert_eq!(failed, 1.0);
    // What is offered.
    let at = harness.proxy.listener_address("good").unwrap();
    let mut chain = tcp_chain("c");
    let key = "envoy.network.application_protocols";
    chain
        .filters
        .insert(0, stating(vec![setting(key, "", "unknown,mine")]));
    let mut offering = listener_of("good", core::TrafficDirection::Outbound, vec![chain]);
    offering.access_log = Vec::new();
    harness.put(ResourceType::Listener, "good", &offering).await;
    let mut only_mine = tcp_chain("greeter");
    only_mine.transport_socket = server_socket(common_tls(Some(&server), None, &["mine"]), false);
    only_mine.filter_chain_match = Some(listener::FilterChainMatch {
        application_protocols: vec!["mine".into()],
        ..Default::default()
    });
    let message = listener_of("in", core::TrafficDirection::Inbound, vec![only_mine]);
    backend.put(ResourceType::Listener, "in", &message).await;
    assert_eq!(answer(at, b"", 5).await, "hello");
    let dns = harness.proxy.listener_address("dns").unwrap();
    assert_eq!(
        answer(dns, b"", 1).await,
        "",
        "without the protocol no chain fits"
    );
}
