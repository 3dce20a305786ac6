//! Network filters and listener filters whose configuration is a resource of its own (ECDS), also beside Envoy.

use std::net::SocketAddr;

use serin_xds::ResourceType;
use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::envoy::config::listener::v3 as listener;
use serin_xds::pb::envoy::config::rbac::v3 as rbac_rules;
use serin_xds::pb::envoy::extensions::filters::listener::http_inspector::v3 as http_inspector;
use serin_xds::pb::envoy::extensions::filters::listener::proxy_protocol::v3 as proxy_protocol;
use serin_xds::pb::envoy::extensions::filters::network::rbac::v3 as rbac;
use serin_xds::pb::envoy::extensions::filters::network::tcp_proxy::v3 as tcp_proxy;
use serin_xds::pb::google::protobuf as google;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::fixture::*;
use crate::interop_ads::{Pair, ads_source, resource};
use crate::listener::{answer_to, greeter, tcp_chain};

/// A guard that lets everybody in, or nobody.
fn guard(open: bool) -> google::Any {
    any(&rbac::Rbac {
        stat_prefix: "guard".into(),
        rules: (!open).then(rbac_rules::Rbac::default),
        ..Default::default()
    })
}

fn tcp_to(cluster: &str) -> google::Any {
    any(&tcp_proxy::TcpProxy {
        stat_prefix: "t".into(),
        cluster_specifier: Some(tcp_proxy::tcp_proxy::ClusterSpecifier::Cluster(cluster.into())),
        ..Default::default()
    })
}

/// Where the configuration comes from that has one of these types.
fn source(types: &[&google::Any], default: Option<google::Any>) -> core::ExtensionConfigSource {
    core::ExtensionConfigSource {
        config_source: ads_source().map(|source| core::ConfigSource {
            initial_fetch_timeout: millis(100),
            ..source
        }),
        apply_default_config_without_warming: default.is_some(),
        default_config: default,
        type_urls: types.iter().map(|any| any.type_url.clone()).collect(),
    }
}

fn network(name: &str, source: core::ExtensionConfigSource) -> listener::Filter {
    listener::Filter {
        name: name.into(),
        config_type: Some(listener::filter::ConfigType::ConfigDiscovery(source)),
    }
}

fn extension(name: &str, config: google::Any) -> core::TypedExtensionConfig {
    core::TypedExtensionConfig {
        name: name.into(),
        typed_config: Some(config),
    }
}

/// A listener whose only chain has these filters.
fn listener_with(name: &str, filters: Vec<listener::Filter>) -> listener::Listener {
    let mut chain = tcp_chain("greeter");
    chain.filters = filters;
    listener_of(name, core::TrafficDirection::Outbound, vec![chain])
}

fn guarded(name: &str, default: Option<google::Any>) -> listener::Listener {
    let mut filters = tcp_chain("greeter").filters;
    filters.insert(0, network("guard", source(&[&guard(true)], default)));
    listener_with(name, filters)
}

/// The first byte that is said, or nothing.
async fn heard(at: SocketAddr) -> Option<u8> {
    let mut stream = TcpStream::connect(at).await.unwrap();
    // A policy of Envoy looks when the client has spoken.
    let _ = stream.write_all(&[b'?'; 64]).await;
    let mut byte = [0];
    match soon("a greeting or the end", stream.read(&mut byte)).await {
        Ok(1) => Some(byte[0]),
        Ok(_) | Err(_) => None,
    }
}

/// Asks until the answer is as expected: configuration takes its time.
async fn until(what: &str, at: SocketAddr, expected: Option<u8>) {
    soon(what, async {
        while heard(at).await != expected {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

#[tokio::test]
async fn a_network_filter_comes_by_discovery_and_an_update_is_for_connections_to_come() {
    let harness = Harness::start();
    harness.cluster("greeter", &[greeter("welcome").await]).await;
    harness
        .put(ResourceType::Listener, "l", &guarded("l", None))
        .await;
    assert_eq!(harness.proxy.listener_address("l"), None, "it waits");
    let put = async |config| {
        let message = extension("guard", config);
        harness.try_put(ResourceType::Extension, "guard", &message).await
    };
    assert_eq!(put(guard(true)).await, None);
    let at = harness.proxy.listener_address("l").unwrap();
    let mut old = TcpStream::connect(at).await.unwrap();
    let mut greeting = [0; 7];
    soon("a greeting", old.read_exact(&mut greeting)).await.unwrap();
    assert_eq!(put(guard(false)).await, None);
    assert_eq!(heard(at).await, None);
    old.write_all(b"still").await.unwrap();
    let mut echo = [0; 5];
    soon("an echo", old.read_exact(&mut echo)).await.unwrap();
    assert_eq!(&echo, b"still");
    // What cannot be used is refused, and the last good one stays.
    let refused = put(tcp_to("greeter")).await.unwrap();
    assert!(refused.contains("type_urls"), "{refused}");
    let wrong = any(&rbac::Rbac {
        enforcement_type: 9,
        ..Default::default()
    });
    let refused = put(wrong).await.unwrap();
    assert!(refused.contains("enforcement_type"), "{refused}");
    assert_eq!(heard(at).await, None);
    assert_eq!(put(guard(true)).await, None);
    assert_eq!(heard(at).await, Some(b'w'));
    // Without it, and without a default, connections are closed and counted.
    harness.remove(ResourceType::Extension, "guard").await;
    assert_eq!(heard(at).await, None);
    let missing = "envoy_listener_network_extension_config_missing";
    assert!(harness.counter(missing, &[]) >= 1.0);
}

#[tokio::test]
async fn a_network_filter_that_does_not_come_is_its_default() {
    let harness = Harness::start();
    harness.cluster("greeter", &[greeter("welcome").await]).await;
    let message = guarded("at-once", Some(guard(false)));
    harness.put(ResourceType::Listener, "at-once", &message).await;
    let at = harness.proxy.listener_address("at-once").unwrap();
    assert_eq!(heard(at).await, None);
    let mut message = guarded("later", Some(guard(false)));
    if let Some(listener::filter::ConfigType::ConfigDiscovery(source)) =
        &mut message.filter_chains[0].filters[0].config_type
    {
        source.apply_default_config_without_warming = false;
    }
    harness.put(ResourceType::Listener, "later", &message).await;
    assert_eq!(harness.proxy.listener_address("later"), None);
    harness.proxy.tend_secrets(1_000_000).await;
    let later = harness.proxy.listener_address("later").unwrap();
    assert_eq!(heard(later).await, None);
    let message = extension("guard", guard(true));
    harness.put(ResourceType::Extension, "guard", &message).await;
    for at in [at, later] {
        assert_eq!(heard(at).await, Some(b'w'));
    }
    harness.remove(ResourceType::Extension, "guard").await;
    assert_eq!(heard(later).await, None);
}

#[tokio::test]
async fn the_end_of_a_chain_may_come_by_discovery_and_nothing_else_may_be_in_its_place() {
    let harness = Harness::start();
    harness.cluster("a", &[greeter("a").await]).await;
    harness.cluster("b", &[greeter("b").await]).await;
    let last = listener_with(
        "l",
        vec![network("end", source(&[&tcp_to(""), &guard(true)], None))],
    );
    harness.put(ResourceType::Listener, "l", &last).await;
    let put = async |config| {
        let message = extension("end", config);
        harness.try_put(ResourceType::Extension, "end", &message).await
    };
    let refused = put(guard(true)).await.unwrap();
    assert!(refused.contains("ends its chain"), "{refused}");
    for cluster in ["a", "b"] {
        assert_eq!(put(tcp_to(cluster)).await, None);
        let at = harness.proxy.listener_address("l").unwrap();
        assert_eq!(heard(at).await, Some(cluster.as_bytes()[0]));
    }
    // In another place the same is no use.
    let mut filters = tcp_chain("a").filters;
    filters.insert(0, network("end", source(&[&tcp_to("")], None)));
    let refused = harness
        .try_put(ResourceType::Listener, "m", &listener_with("m", filters))
        .await
        .unwrap();
    assert!(refused.contains("must be the last of its chain"), "{refused}");
    // A connection manager's filters may come by themselves, itself not.
    let of_manager = any(&manager("80"));
    let source = source(&[&of_manager], Some(of_manager.clone()));
    let refused = harness
        .try_put(
            ResourceType::Listener,
            "n",
            &listener_with("n", vec![network("manager", source)]),
        )
        .await
        .unwrap();
    let expected = "filter_chains[0].filters[0].config_discovery.default_config.typed_config";
    assert!(refused.starts_with(expected), "{refused}");
}

/// A listener filter by discovery, for one of these types.
fn before(name: &str, source: core::ExtensionConfigSource) -> listener::ListenerFilter {
    listener::ListenerFilter {
        name: name.into(),
        config_type: Some(listener::listener_filter::ConfigType::ConfigDiscovery(source)),
        ..Default::default()
    }
}

fn told(optional: bool) -> google::Any {
    any(&proxy_protocol::ProxyProtocol {
        allow_requests_without_proxy_protocol: optional,
        ..Default::default()
    })
}

#[tokio::test]
async fn a_listener_filter_comes_by_discovery_and_without_it_connections_are_closed() {
    let mut backend = Backend::named("hello").await;
    let harness = Harness::start();
    harness.cluster("c", &[backend.address]).await;
    harness.route_all_to("c").await;
    let mut edge = manager("80");
    edge.use_remote_address = Some(google::BoolValue { value: true });
    let mut message = listener_of("l", core::TrafficDirection::Outbound, vec![http_chain(&edge)]);
    let types = [&told(true), &any(&http_inspector::HttpInspector::default())];
    message.listener_filters = vec![before("first", source(&types, None))];
    harness.put(ResourceType::Listener, "l", &message).await;
    assert_eq!(harness.proxy.listener_address("l"), None, "it waits");
    let put = async |config| {
        let message = extension("first", config);
        harness.try_put(ResourceType::Extension, "first", &message).await
    };
    assert_eq!(put(told(false)).await, None);
    let at = harness.proxy.listener_address("l").unwrap();
    let request = &b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n"[..];
    let with_header = [b"PROXY TCP4 203.0.113.7 10.0.0.1 1234 80\r\n", request].concat();
    assert_eq!(answer_to(at, request).await, "");
    let answer = answer_to(at, &with_header).await;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    assert_eq!(backend.next().await.headers["x-forwarded-for"], "203.0.113.7");
    // Another filter in its place: headers are not looked for any more.
    assert_eq!(put(any(&http_inspector::HttpInspector::default())).await, None);
    let answer = answer_to(at, request).await;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    assert_eq!(backend.next().await.headers["x-forwarded-for"], "127.0.0.1");
    let refused = put(guard(true)).await.unwrap();
    assert!(refused.contains("type_urls"), "{refused}");
    harness.remove(ResourceType::Extension, "first").await;
    assert_eq!(answer_to(at, request).await, "");
    let missing = "envoy_listener_extension_config_missing";
    assert_eq!(harness.counter(missing, &[]), 1.0);
    assert_eq!(put(told(true)).await, None);
    assert!(answer_to(at, request).await.starts_with("HTTP/1.1 200"));
}

#[tokio::test]
async fn discovery_of_filters_below_http_that_cannot_be_honoured_is_refused_with_its_path() {
    let harness = Harness::start();
    let mut message = listener_of("l", core::TrafficDirection::Outbound, vec![tcp_chain("c")]);
    message.listener_filters = vec![before("first", source(&[], None))];
    let refused = harness
        .try_put(ResourceType::Listener, "l", &message)
        .await
        .unwrap();
    assert!(
        refused.starts_with("listener_filters[0].config_discovery.type_urls"),
        "{refused}"
    );
    // Off for some ports, where it cannot be.
    message.listener_filters = vec![before("first", source(&[&told(true)], Some(told(true))))];
    message.listener_filters[0].filter_disabled = Some(listener::ListenerFilterChainMatchPredicate {
        rule: Some(listener::listener_filter_chain_match_predicate::Rule::AnyMatch(
            true,
        )),
    });
    let refused = harness
        .try_put(ResourceType::Listener, "l", &message)
        .await
        .unwrap();
    assert!(refused.contains("filter_disabled"), "{refused}");
    let mut wrong = guarded("l", Some(guard(true)));
    if let Some(listener::filter::ConfigType::ConfigDiscovery(source)) =
        &mut wrong.filter_chains[0].filters[0].config_type
    {
        source.config_source = None;
    }
    let refused = harness
        .try_put(ResourceType::Listener, "l", &wrong)
        .await
        .unwrap();
    let expected = "filter_chains[0].filters[0].config_discovery.config_source";
    assert!(refused.starts_with(expected), "{refused}");
}

#[tokio::test]
async fn envoy_takes_network_and_listener_filters_by_discovery_alike() {
    let mut cluster = eds_cluster("greeter");
    cluster.cluster_discovery_type = None;
    cluster.eds_cluster_config = None;
    cluster.load_assignment = Some(assignment("greeter", &[(greeter("welcome").await, "")]));
    let mut message = guarded("l", Some(guard(false)));
    message.listener_filters = vec![before("first", source(&[&told(true)], Some(told(true))))];
    let resources = vec![
        resource(ResourceType::Cluster, "greeter", &cluster),
        resource(ResourceType::Listener, "l", &message),
    ];
    let Some(pair) = Pair::start(resources).await else {
        return;
    };
    let both = pair.listener("l").await;
    for at in both {
        until("the default", at, None).await;
    }
    let put = |name: &str, config| {
        let message = extension(name, config);
        pair.ads.source.put(ResourceType::Extension, name, &message);
    };
    put("guard", guard(true));
    for at in both {
        until("the guard", at, Some(b'w')).await;
    }
    put("first", told(false));
    for at in both {
        until("the header that must be", at, None).await;
        assert!(answer_with_header(at).await.starts_with('w'));
    }
    pair.ads.source.remove(ResourceType::Extension, "first");
    for at in both {
        until("the default again", at, Some(b'w')).await;
    }
    pair.ads.source.remove(ResourceType::Extension, "guard");
    for at in both {
        until("the default guard again", at, None).await;
    }
    pair.stop().await;
}

/// What is heard after a header of the PROXY protocol.
async fn answer_with_header(at: SocketAddr) -> String {
    let mut stream = TcpStream::connect(at).await.unwrap();
    let header = b"PROXY TCP4 203.0.113.7 10.0.0.1 1234 80\r\n?";
    stream.write_all(header).await.unwrap();
    let mut text = [0; 7];
    soon("a greeting", stream.read_exact(&mut text)).await.unwrap();
    String::from_utf8_lossy(&text).into_owned()
}
