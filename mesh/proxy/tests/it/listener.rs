//! What listeners do before the filters: addresses, PROXY protocol, limits, balance, passthrough by server name; and what
//! TLS means for requests.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use http::{HeaderMap, Request};
use http_body_util::Full;
use serin_xds::ResourceType;
use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::envoy::config::listener::v3 as listener;
use serin_xds::pb::envoy::extensions::filters::listener::proxy_protocol::v3 as proxy_protocol_in;
use serin_xds::pb::envoy::extensions::filters::network::connection_limit::v3 as connection_limit;
use serin_xds::pb::envoy::extensions::filters::network::http_connection_manager::v3 as hcm;
use serin_xds::pb::envoy::extensions::transport_sockets::proxy_protocol::v3 as proxy_protocol_out;
use serin_xds::pb::google::protobuf as google;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::certificates::{Authority, client_socket, common, server_socket, socket};
use super::fixture::{
    Backend, Harness, address, any, eds_cluster, get, h2_client, http_chain, listener_of, manager,
    network_filter, prefix_route, soon, tcp_filter, to_cluster,
};
use super::tls::{handshake, request_on, tls_get};

pub(crate) fn tcp_chain(cluster: &str) -> listener::FilterChain {
    listener::FilterChain {
        filters: vec![tcp_filter(cluster)],
        ..Default::default()
    }
}

fn for_names(mut chain: listener::FilterChain, names: &[&str]) -> listener::FilterChain {
    chain.filter_chain_match = Some(listener::FilterChainMatch {
        server_names: names.iter().map(|name| (*name).to_owned()).collect(),
        ..Default::default()
    });
    chain
}

async fn listen(harness: &Harness, message: &listener::Listener) -> SocketAddr {
    harness.put(ResourceType::Listener, &message.name, message).await;
    harness.proxy.listener_address(&message.name).expect("bound")
}

/// Says its name and then what it hears, once a connection.
pub(crate) async fn greeter(name: &'static str) -> SocketAddr {
    let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = socket.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = socket.accept().await {
            tokio::spawn(async move {
                stream.write_all(name.as_bytes()).await.unwrap();
                let mut heard = [0; 256];
                while let Ok(count @ 1..) = stream.read(&mut heard).await {
                    if stream.write_all(&heard[..count]).await.is_err() {
                        return;
                    }
                }
            });
        }
    });
    at
}

/// What is answered to these bytes; nothing also where the connection is reset.
pub(crate) async fn answer_to(at: SocketAddr, bytes: &[u8]) -> String {
    let mut stream = TcpStream::connect(at).await.unwrap();
    let mut answer = Vec::new();
    let work = async {
        // Whoever is turned away may find the connection closed while writing.
        let _ = stream.write_all(bytes).await;
        let _ = stream.read_to_end(&mut answer).await;
    };
    soon("the end of the connection", work).await;
    String::from_utf8_lossy(&answer).into_owned()
}

#[tokio::test]
async fn a_listener_serves_all_of_its_addresses() {
    let backend = Backend::named("hello").await;
    let harness = Harness::start_with(2);
    harness.cluster("c", &[backend.address]).await;
    harness.route_all_to("c").await;
    let mut message = listener_of(
        "l",
        core::TrafficDirection::Outbound,
        vec![http_chain(&manager("80"))],
    );
    message.additional_addresses = vec![
        listener::AdditionalAddress {
            address: address("127.0.0.2:0".parse().unwrap()),
            ..Default::default()
        },
        listener::AdditionalAddress {
            address: address("[::1]:0".parse().unwrap()),
            ..Default::default()
        },
    ];
    listen(&harness, &message).await;
    let addresses = harness.proxy.listener_addresses("l");
    assert_eq!(addresses.len(), 3);
    for at in addresses {
        for _ in 0..4 {
            assert_eq!(get(at, "/").await.0, 200, "{at}");
        }
    }
    harness.remove(ResourceType::Listener, "l").await;
    assert!(harness.proxy.listener_addresses("l").is_empty());
}

#[tokio::test]
async fn tls_passes_through_by_server_name_and_is_ended_where_a_chain_says_so() {
    let authority = Authority::new("ca");
    let backend = Backend::named("ended here").await;
    let harness = Harness::start();
    harness.cluster("c", &[backend.address]).await;
    harness.route_all_to("c").await;
    // What is passed through ends in another listener of the proxy.
    let inner = authority.issue(&["db.example", "inner.example"]);
    let mut chain = tcp_chain("greeter");
    chain.transport_socket = server_socket(common(Some(&inner), None, &[]), false);
    let inside = listen(
        &harness,
        &listener_of("inside", core::TrafficDirection::Inbound, vec![chain]),
    )
    .await;
    harness.cluster("greeter", &[greeter("welcome").await]).await;
    harness.cluster("inside", &[inside]).await;
    harness.cluster("y.db.example", &[inside]).await;
    let mut ended = for_names(http_chain(&manager("80")), &["shop.example"]);
    let shop = authority.issue(&["shop.example"]);
    ended.transport_socket = server_socket(common(Some(&shop), None, &["http/1.1"]), false);
    let passed = for_names(tcp_chain("inside"), &["*.example"]);
    // As an east-west gateway does it: the name is the cluster.
    let mut by_name = for_names(tcp_chain("BlackHoleCluster"), &["*.db.example"]);
    by_name
        .filters
        .insert(0, network_filter("envoy.filters.network.sni_cluster", None));
    let at = listen(
        &harness,
        &listener_of(
            "l",
            core::TrafficDirection::Outbound,
            vec![ended, passed, by_name],
        ),
    )
    .await;
    let client = authority.client().build();
    assert_eq!(
        tls_get(at, &client, "shop.example", "/").await.unwrap().2,
        "ended here"
    );
    let mut stream = handshake(at, &client, "inner.example").await.unwrap();
    assert_eq!(
        stream.get_ref().1.peer_certificates().unwrap()[0],
        inner.der().0[0]
    );
    let mut heard = [0; 7];
    soon("the greeting", stream.read_exact(&mut heard)).await.unwrap();
    assert_eq!(&heard, b"welcome");
    stream.write_all(b"and back").await.unwrap();
    let mut heard = [0; 8];
    soon("the echo", stream.read_exact(&mut heard)).await.unwrap();
    assert_eq!(&heard, b"and back");
    // No chain, and a name for which there is no cluster.
    assert!(handshake(at, &client, "elsewhere.test").await.is_err());
    assert!(handshake(at, &client, "x.db.example").await.is_err());
}

#[tokio::test]
async fn the_server_name_chooses_the_cluster_of_that_name() {
    let authority = Authority::new("ca");
    let harness = Harness::start();
    let name = "outbound-80.reviews.prod";
    let issued = authority.issue(&[name]);
    let mut chain = tcp_chain("greeter");
    chain.transport_socket = server_socket(common(Some(&issued), None, &[]), false);
    let inside = listen(
        &harness,
        &listener_of("inside", core::TrafficDirection::Inbound, vec![chain]),
    )
    .await;
    harness.cluster("greeter", &[greeter("welcome").await]).await;
    harness.cluster(name, &[inside]).await;
    let mut chain = tcp_chain("BlackHoleCluster");
    chain
        .filters
        .insert(0, network_filter("envoy.filters.network.sni_cluster", None));
    let mut message = listener_of("l", core::TrafficDirection::Outbound, vec![chain]);
    message.listener_filters = vec![listener::ListenerFilter {
        name: "envoy.filters.listener.tls_inspector".into(),
        ..Default::default()
    }];
    let at = listen(&harness, &message).await;
    let client = authority.client().build();
    let mut stream = handshake(at, &client, name).await.unwrap();
    let mut heard = [0; 7];
    soon("the greeting", stream.read_exact(&mut heard)).await.unwrap();
    assert_eq!(&heard, b"welcome");
    assert!(handshake(at, &client, "unknown.prod").await.is_err());
}

#[tokio::test]
async fn bytes_travel_with_mutual_tls_from_proxy_to_proxy_and_half_closes_arrive() {
    let authority = Authority::new("ca");
    let server = authority.issue(&["spiffe://td/server"]);
    let client = authority.issue(&["spiffe://td/client"]);
    let inbound = Harness::start();
    let mut chain = tcp_chain("app");
    chain.transport_socket =
        server_socket(common(Some(&server), Some(authority.context()), &["istio"]), true);
    let inside = listen(
        &inbound,
        &listener_of("in", core::TrafficDirection::Inbound, vec![chain]),
    )
    .await;
    // Answers only when all has been said.
    let app = TcpListener::bind("127.0.0.1:0").await.unwrap();
    inbound.cluster("app", &[app.local_addr().unwrap()]).await;
    let served = tokio::spawn(async move {
        let (mut stream, _) = app.accept().await.unwrap();
        let mut heard = Vec::new();
        stream.read_to_end(&mut heard).await.unwrap();
        heard.reverse();
        stream.write_all(&heard).await.unwrap();
    });
    let outbound = Harness::start();
    let mut cluster = eds_cluster("c");
    cluster.transport_socket = client_socket(
        common(Some(&client), Some(authority.context()), &["istio"]),
        "app.prod",
    );
    outbound.put(ResourceType::Cluster, "c", &cluster).await;
    outbound.endpoints("c", &[inside]).await;
    let at = listen(
        &outbound,
        &listener_of("out", core::TrafficDirection::Outbound, vec![tcp_chain("c")]),
    )
    .await;
    let mut stream = TcpStream::connect(at).await.unwrap();
    let said: Vec<u8> = (0..500_000u32).map(|number| (number % 251) as u8).collect();
    let (mut from, mut to) = stream.split();
    let write = async {
        to.write_all(&said).await.unwrap();
        to.shutdown().await.unwrap();
    };
    let mut heard = Vec::new();
    let read = async { from.read_to_end(&mut heard).await.unwrap() };
    soon("the answer", futures::future::join(write, read)).await;
    heard.reverse();
    assert!(heard == said, "{} bytes of {}", heard.len(), said.len());
    soon("the server", served).await.unwrap();
    let labels = [
        ("connection_security_policy", "mutual_tls"),
        ("source_principal", "spiffe://td/client"),
    ];
    soon("the metrics", async {
        while inbound.counter("istio_tcp_connections_opened_total", &labels) < 1.0 {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

fn with_proxy_protocol(
    mut message: listener::Listener,
    config: &proxy_protocol_in::ProxyProtocol,
) -> listener::Listener {
    message.listener_filters.insert(
        0,
        listener::ListenerFilter {
            name: "envoy.filters.listener.proxy_protocol".into(),
            config_type: Some(listener::listener_filter::ConfigType::TypedConfig(any(config))),
            ..Default::default()
        },
    );
    message
}

#[tokio::test]
async fn clients_are_who_the_proxy_protocol_says_and_endpoints_are_told() {
    let mut backend = Backend::named("hello").await;
    let harness = Harness::start();
    harness.cluster("c", &[backend.address]).await;
    harness.route_all_to("c").await;
    let mut edge = manager("80");
    edge.use_remote_address = Some(google::BoolValue { value: true });
    let message = listener_of("in", core::TrafficDirection::Outbound, vec![http_chain(&edge)]);
    let inner = listen(&harness, &with_proxy_protocol(message, &Default::default())).await;
    let request = b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n";
    for header in [
        &b"PROXY TCP4 203.0.113.7 10.0.0.1 1234 80\r\n"[..],
        b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c\xcb\0\x71\x07\x0a\0\0\x01\x04\xd2\0\x50",
    ] {
        let answer = answer_to(inner, &[header, request].concat()).await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        assert_eq!(backend.next().await.headers["x-forwarded-for"], "203.0.113.7");
    }
    // Without a header, or with a broken one, nothing is served.
    for bad in [&request[..], b"PROXY TCP4 1 2 3 4\r\nGET / HTTP/1.1\r\n\r\n"] {
        assert_eq!(answer_to(inner, bad).await, "");
    }
    // Two proxies in a row: the first one tells the second one.
    let mut cluster = eds_cluster("front");
    cluster.transport_socket = Some(core::TransportSocket {
        name: "envoy.transport_sockets.upstream_proxy_protocol".into(),
        config_type: Some(core::transport_socket::ConfigType::TypedConfig(any(
            &proxy_protocol_out::ProxyProtocolUpstreamTransport {
                config: Some(core::ProxyProtocolConfig {
                    version: core::proxy_protocol_config::Version::V2 as i32,
                    ..Default::default()
                }),
                ..Default::default()
            },
        ))),
    });
    harness.put(ResourceType::Cluster, "front", &cluster).await;
    harness.endpoints("front", &[inner]).await;
    let plain = listener_of("l", core::TrafficDirection::Outbound, vec![tcp_chain("front")]);
    let config = proxy_protocol_in::ProxyProtocol {
        allow_requests_without_proxy_protocol: true,
        ..Default::default()
    };
    let outer = listen(&harness, &with_proxy_protocol(plain, &config)).await;
    let header = b"PROXY TCP4 203.0.113.9 10.0.0.1 1234 80\r\n";
    for (bytes, client) in [
        ([&header[..], request].concat(), "203.0.113.9"),
        (request.to_vec(), "127.0.0.1"),
    ] {
        let answer = answer_to(outer, &bytes).await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        assert_eq!(backend.next().await.headers["x-forwarded-for"], client);
    }
}

#[tokio::test]
async fn more_connections_than_the_limit_are_turned_away() {
    let backend = Backend::named("hello").await;
    let mut harness = Harness::start_with(2);
    harness.cluster("c", &[backend.address]).await;
    harness.route_all_to("c").await;
    let mut chain = http_chain(&manager("80"));
    let config = connection_limit::ConnectionLimit {
        stat_prefix: "limit".into(),
        max_connections: Some(google::UInt64Value { value: 2 }),
        ..Default::default()
    };
    chain.filters.insert(
        0,
        network_filter("envoy.filters.network.connection_limit", Some(any(&config))),
    );
    let at = listen(
        &harness,
        &listener_of("l", core::TrafficDirection::Outbound, vec![chain]),
    )
    .await;
    let mut held = Vec::new();
    for _ in 0..2 {
        let mut client = h2_client(at).await;
        let request = Request::get("http://a/").body(Full::default()).unwrap();
        let response = soon("an answer", client.send_request(request)).await.unwrap();
        assert_eq!(response.status(), 200);
        held.push(client);
    }
    assert_eq!(answer_to(at, b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await, "");
    let line = harness.line().await;
    assert_eq!(line["downstream_transport_failure_reason"], "connection_limit");
    held.pop();
    soon("a free place", async {
        loop {
            let answer = answer_to(at, b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").await;
            if answer.starts_with("HTTP/1.1 200") {
                return;
            }
        }
    })
    .await;
}

#[tokio::test]
async fn exact_balance_gives_every_worker_as_many_connections() {
    let backend = Backend::named("hello").await;
    let harness = Harness::start_with(3);
    harness.cluster("c", &[backend.address]).await;
    harness.route_all_to("c").await;
    let mut message = listener_of(
        "l",
        core::TrafficDirection::Outbound,
        vec![http_chain(&manager("80"))],
    );
    use listener::listener::connection_balance_config::{BalanceType, ExactBalance};
    message.connection_balance_config = Some(listener::listener::ConnectionBalanceConfig {
        balance_type: Some(BalanceType::ExactBalance(ExactBalance {})),
    });
    let at = listen(&harness, &message).await;
    let mut clients = Vec::new();
    for _ in 0..9 {
        let mut client = h2_client(at).await;
        let request = Request::get("http://a/").body(Full::default()).unwrap();
        let response = soon("an answer", client.send_request(request)).await.unwrap();
        assert_eq!(response.status(), 200);
        clients.push(client);
    }
    let (_, shards) = harness.proxy.shards();
    let of_each: Vec<u64> = shards
        .iter()
        .map(|shard| shard.counters.connections.get() - shard.counters.connections_closed.get())
        .collect();
    assert_eq!(of_each, [3, 3, 3]);
}

fn field(headers: &HeaderMap) -> Option<String> {
    let value = headers.get("x-forwarded-client-cert")?;
    Some(value.to_str().unwrap().to_owned())
}

#[tokio::test]
async fn the_next_hop_is_told_who_the_client_proved_to_be() {
    use hcm::http_connection_manager::{ForwardClientCertDetails as Mode, SetCurrentClientCertDetails};
    let authority = Authority::new("ca");
    let mut backend = Backend::named("hello").await;
    let harness = Harness::start();
    harness.cluster("c", &[backend.address]).await;
    harness.route_all_to("c").await;
    let server = authority.issue(&["reviews", "spiffe://td/server"]);
    let issued = authority.issue(&["spiffe://td/client", "client.example"]);
    let client = authority.client().identity(&issued).build();
    let stranger = authority.client().build();
    let hash: String = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, &issued.der().0[0])
        .as_ref()
        .iter()
        .fold(String::new(), |text, byte| text + &format!("{byte:02x}"));
    let ours =
        format!("By=spiffe://td/server;Hash={hash};Subject=\"\";URI=spiffe://td/client;DNS=client.example");
    for (mode, mutual, wanted) in [
        (Mode::Sanitize, true, None),
        (Mode::ForwardOnly, true, Some("By=x".to_owned())),
        (Mode::ForwardOnly, false, None),
        (Mode::AppendForward, true, Some(format!("By=x,{ours}"))),
        (Mode::SanitizeSet, true, Some(ours.clone())),
        (Mode::SanitizeSet, false, None),
        (Mode::AlwaysForwardOnly, false, Some("By=x".to_owned())),
    ] {
        let mut manager = manager("80");
        manager.forward_client_cert_details = mode as i32;
        manager.set_current_client_cert_details = Some(SetCurrentClientCertDetails {
            subject: Some(google::BoolValue { value: true }),
            uri: true,
            dns: true,
            ..Default::default()
        });
        let mut chain = http_chain(&manager);
        chain.transport_socket = server_socket(
            common(Some(&server), Some(authority.context()), &["http/1.1"]),
            false,
        );
        let at = listen(
            &harness,
            &listener_of("l", core::TrafficDirection::Inbound, vec![chain]),
        )
        .await;
        let mut stream = handshake(at, if mutual { &client } else { &stranger }, "reviews")
            .await
            .unwrap();
        stream
            .write_all(
                b"GET / HTTP/1.1\r\nhost: reviews\r\nx-forwarded-client-cert: By=x\r\nconnection: close\r\n\r\n",
            )
            .await
            .unwrap();
        let mut answer = Vec::new();
        soon("the answer", stream.read_to_end(&mut answer)).await.unwrap();
        let seen = backend.next().await;
        assert_eq!(field(&seen.headers), wanted, "{mode:?} {mutual}");
        assert_eq!(seen.headers["x-forwarded-proto"], "https");
    }
}

#[tokio::test]
async fn a_request_for_a_host_of_another_chain_is_misdirected() {
    let authority = Authority::new("ca");
    let backend = Backend::named("hello").await;
    let harness = Harness::start();
    harness.cluster("c", &[backend.address]).await;
    harness.route_all_to("c").await;
    let issued = authority.issue(&["a.example", "b.example", "c.example"]);
    let chain = |names: &[&str]| {
        let mut chain = for_names(http_chain(&manager("80")), names);
        chain.transport_socket = server_socket(common(Some(&issued), None, &["h2", "http/1.1"]), false);
        chain
    };
    let at = listen(
        &harness,
        &listener_of(
            "l",
            core::TrafficDirection::Outbound,
            vec![
                chain(&["a.example", "*.a.example"]),
                chain(&["b.example"]),
                chain(&[]),
            ],
        ),
    )
    .await;
    for alpn in ["h2", "http/1.1"] {
        let client = authority.client().alpn(&[alpn]).build();
        for (name, authority, status) in [
            ("a.example", "a.example", 200),
            ("a.example", "A.example:443", 200),
            ("a.example", "x.a.example", 200),
            ("a.example", "b.example", 421),
            ("b.example", "a.example", 421),
            // A chain for any name serves any host.
            ("c.example", "b.example", 200),
        ] {
            let stream = handshake(at, &client, name).await.unwrap();
            let answer = request_on(stream, authority, "/").await.unwrap();
            assert_eq!(answer.0, status, "{alpn}: {authority} over {name}");
        }
    }
}

#[tokio::test]
async fn certificates_and_counters_are_shown_as_envoy_shows_them() {
    let authority = Authority::new("ca");
    let backend = Backend::named("hello").await;
    let harness = Harness::start();
    harness.cluster("c", &[backend.address]).await;
    harness.route_all_to("c").await;
    let issued = authority.issue(&["shop.example", "spiffe://td/shop"]);
    let mut chain = http_chain(&manager("80"));
    chain.transport_socket = server_socket(common(Some(&issued), Some(authority.context()), &[]), false);
    let at = listen(
        &harness,
        &listener_of("l", core::TrafficDirection::Outbound, vec![chain]),
    )
    .await;
    handshake(at, &authority.client().build(), "shop.example")
        .await
        .unwrap();
    let port = serin_proxy::control::admin::AdminPort::bind(
        &harness.proxy,
        "127.0.0.1:0".parse().unwrap(),
        serin_proxy::control::admin::Port::Admin,
    )
    .unwrap();
    let admin = port.address().unwrap();
    let cancel = tokio_util::sync::CancellationToken::new();
    let served = tokio::spawn(port.serve(harness.proxy.clone(), cancel.clone(), cancel.clone()));
    let (status, _, body) = get(admin, "/certs").await;
    assert_eq!(status, 200);
    let body: serde_json::Value = serde_json::from_str(&body).unwrap();
    let mut kinds = BTreeMap::new();
    for certificate in body["certificates"].as_array().unwrap() {
        for kind in ["ca_cert", "cert_chain"] {
            for detail in certificate[kind].as_array().unwrap() {
                kinds.insert(kind, detail.clone());
            }
        }
    }
    let serial: String = issued
        .serial
        .iter()
        .fold(String::new(), |text, byte| text + &format!("{byte:02x}"));
    assert_eq!(kinds["cert_chain"]["serial_number"], serial);
    assert_eq!(
        kinds["cert_chain"]["subject_alt_names"],
        serde_json::json!([{ "dns": "shop.example" }, { "uri": "spiffe://td/shop" }])
    );
    assert!(kinds["ca_cert"]["days_until_expiration"].is_string());
    assert!(kinds["ca_cert"]["expiration_time"].is_string());
    // The client is done with its handshake a little before the server.
    soon("the handshake's counter", async {
        loop {
            let (_, _, text) = get(admin, "/stats/prometheus").await;
            if text.contains("envoy_listener_ssl_handshake{envoy_listener_address=\"l\"} 1") {
                return;
            }
        }
    })
    .await;
    cancel.cancel();
    served.await.unwrap();
}

#[tokio::test]
async fn what_listeners_cannot_do_is_refused_by_name() {
    let harness = Harness::start();
    let base = || listener_of("l", core::TrafficDirection::Outbound, vec![tcp_chain("c")]);
    let rules = proxy_protocol_in::ProxyProtocol {
        rules: vec![Default::default()],
        ..Default::default()
    };
    let mut same = base();
    same.filter_chains.push(tcp_chain("c"));
    let mut wildcard = base();
    wildcard.filter_chains = vec![for_names(tcp_chain("c"), &["a*.example"])];
    let mut starttls = base();
    starttls.filter_chains[0].transport_socket =
        socket(&serin_xds::pb::envoy::extensions::transport_sockets::tls::v3::UpstreamTlsContext::default());
    let mut none = base();
    none.filter_chains[0].filters.insert(
        0,
        network_filter(
            "envoy.filters.network.connection_limit",
            Some(any(&connection_limit::ConnectionLimit::default())),
        ),
    );
    for (message, path) in [
        (
            with_proxy_protocol(base(), &rules),
            "listener_filters[0].typed_config.rules[0].on_tlv_present.key",
        ),
        (same, "filter_chains[1].filter_chain_match"),
        (wildcard, "filter_chains[0].filter_chain_match.server_names"),
        (starttls, "filter_chains[0].transport_socket.typed_config"),
        (none, "filter_chains[0].filters[0].max_connections"),
    ] {
        let refusal = harness
            .try_put(ResourceType::Listener, "l", &message)
            .await
            .expect("refused");
        assert!(refusal.starts_with(path), "{refusal}");
    }
}

#[tokio::test]
async fn an_endpoint_is_reached_at_the_address_that_answers() {
    let backend = Backend::named("hello").await;
    let harness = Harness::start();
    harness.put(ResourceType::Cluster, "c", &eds_cluster("c")).await;
    let closed = super::fixture::closed_port().await;
    let mut message = super::fixture::assignment("c", &[(closed, "")]);
    use serin_xds::pb::envoy::config::endpoint::v3 as endpoint;
    if let Some(endpoint::lb_endpoint::HostIdentifier::Endpoint(one)) =
        &mut message.endpoints[0].lb_endpoints[0].host_identifier
    {
        one.additional_addresses = vec![endpoint::endpoint::AdditionalAddress {
            address: address(backend.address),
        }];
    }
    harness.put(ResourceType::Endpoints, "c", &message).await;
    let at = harness.serve(vec![prefix_route("/", to_cluster("c"))]).await;
    assert_eq!(get(at, "/").await.0, 200);
}
