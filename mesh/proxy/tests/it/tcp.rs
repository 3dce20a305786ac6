//! TCP proxying and protocol detection.

use serin_xds::ResourceType;
use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::envoy::config::listener::v3 as listener;
use serin_xds::pb::envoy::extensions::filters::network::tcp_proxy::v3 as tcp_proxy;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::fixture::*;

fn tcp_chain(cluster: &str) -> listener::FilterChain {
    let proxy = tcp_proxy::TcpProxy {
        stat_prefix: cluster.into(),
        cluster_specifier: Some(tcp_proxy::tcp_proxy::ClusterSpecifier::Cluster(cluster.into())),
        ..Default::default()
    };
    listener::FilterChain {
        filters: vec![
            network_filter("istio.stats", None),
            network_filter("envoy.filters.network.tcp_proxy", Some(any(&proxy))),
        ],
        ..Default::default()
    }
}

/// A listener that detects HTTP and passes everything else on, with detection limits switched off as istiod sends it.
async fn detecting(harness: &Harness) -> std::net::SocketAddr {
    detecting_before(harness, tcp_chain("tcp")).await
}

async fn detecting_before(harness: &Harness, otherwise: listener::FilterChain) -> std::net::SocketAddr {
    let mut http = http_chain(&manager("80"));
    http.filter_chain_match = Some(listener::FilterChainMatch {
        transport_protocol: "raw_buffer".into(),
        application_protocols: vec!["http/1.1".into(), "h2c".into()],
        ..Default::default()
    });
    let mut message = listener_of("l", core::TrafficDirection::Outbound, vec![http]);
    message.default_filter_chain = Some(otherwise);
    message.listener_filters = vec![listener::ListenerFilter {
        name: "envoy.filters.listener.http_inspector".into(),
        ..Default::default()
    }];
    message.listener_filters_timeout = millis(0);
    message.continue_on_listener_filters_timeout = true;
    harness.put(ResourceType::Listener, "l", &message).await;
    harness.proxy.listener_address("l").unwrap()
}

#[tokio::test]
async fn bytes_pass_both_ways_half_closes_are_kept_and_counted() {
    let harness = Harness::start();
    let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
    harness.cluster("tcp", &[socket.local_addr().unwrap()]).await;
    let message = listener_of("l", core::TrafficDirection::Outbound, vec![tcp_chain("tcp")]);
    harness.put(ResourceType::Listener, "l", &message).await;
    let at = harness.proxy.listener_address("l").unwrap();
    let server = tokio::spawn(async move {
        let (mut stream, _) = socket.accept().await.unwrap();
        let mut all = Vec::new();
        stream.read_to_end(&mut all).await.unwrap();
        // The client has closed its side; the answer must still arrive.
        stream.write_all(&all).await.unwrap();
        all.len()
    });
    let mut client = TcpStream::connect(at).await.unwrap();
    let sent = vec![7u8; 1_000_000];
    client.write_all(&sent).await.unwrap();
    client.shutdown().await.unwrap();
    let mut back = Vec::new();
    soon("the answer", client.read_to_end(&mut back)).await.unwrap();
    assert_eq!((back.len(), server.await.unwrap()), (sent.len(), sent.len()));
    let labels = [
        ("reporter", "source"),
        ("destination_workload", "reviews-v1"),
        ("request_protocol", "tcp"),
    ];
    for name in ["istio_tcp_sent_bytes_total", "istio_tcp_received_bytes_total"] {
        assert_eq!(harness.counter(name, &labels), 1_000_000.0, "{name}");
    }
    assert_eq!(
        harness.counter("istio_tcp_connections_opened_total", &labels),
        1.0
    );
}

#[tokio::test]
async fn http_is_detected_and_anything_else_goes_on_as_bytes() {
    let harness = Harness::start();
    let http = Backend::named("http").await;
    let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
    harness.cluster("h", &[http.address]).await;
    harness.cluster("tcp", &[socket.local_addr().unwrap()]).await;
    harness.route_all_to("h").await;
    let at = detecting(&harness).await;
    assert_eq!(get(at, "/").await.2, "http");
    let mut client = TcpStream::connect(at).await.unwrap();
    client.write_all(b"\x00\x01binary").await.unwrap();
    let (mut server, _) = soon("the connection", socket.accept()).await.unwrap();
    let mut bytes = [0u8; 8];
    soon("the bytes", server.read_exact(&mut bytes)).await.unwrap();
    assert_eq!(&bytes, b"\x00\x01binary");
}

#[tokio::test]
async fn a_server_that_speaks_first_is_heard_and_a_slow_http_client_still_gets_http() {
    let harness = Harness::start();
    let http = Backend::named("http").await;
    let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
    harness.cluster("h", &[http.address]).await;
    harness.cluster("tcp", &[socket.local_addr().unwrap()]).await;
    harness.route_all_to("h").await;
    let at = detecting(&harness).await;
    // The client says nothing; when detection gives up, the server is asked and greets.
    let mut client = TcpStream::connect(at).await.unwrap();
    let (mut server, _) = soon("the connection", socket.accept()).await.unwrap();
    server.write_all(b"220 hello\r\n").await.unwrap();
    let mut greeting = [0u8; 11];
    soon("the greeting", client.read_exact(&mut greeting))
        .await
        .unwrap();
    assert_eq!(&greeting, b"220 hello\r\n");
    // Here the server stays silent and the client speaks HTTP after detection gave up.
    let mut slow = TcpStream::connect(at).await.unwrap();
    let (_silent, _) = soon("the speculative connection", socket.accept()).await.unwrap();
    slow.write_all(b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
        .await
        .unwrap();
    let mut answer = String::new();
    soon("an answer", slow.read_to_string(&mut answer)).await.unwrap();
    assert!(answer.ends_with("http"), "{answer}");
}

#[tokio::test]
async fn a_server_that_speaks_first_is_not_heard_by_whom_the_rules_deny() {
    use serin_xds::pb::envoy::config::rbac::v3 as rbac;
    use serin_xds::pb::envoy::extensions::filters::network::rbac::v3 as network_rbac;
    let harness = Harness::start();
    let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
    harness.cluster("tcp", &[socket.local_addr().unwrap()]).await;
    harness.route_all_to("tcp").await;
    let mut denied = tcp_chain("tcp");
    denied.filters.insert(
        0,
        network_filter(
            "envoy.filters.network.rbac",
            Some(any(&network_rbac::Rbac {
                rules: Some(rbac::Rbac::default()),
                stat_prefix: "r".into(),
                ..Default::default()
            })),
        ),
    );
    let at = detecting_before(&harness, denied).await;
    let mut client = TcpStream::connect(at).await.unwrap();
    let (mut server, _) = soon("the speculative connection", socket.accept()).await.unwrap();
    server.write_all(b"220 hello\r\n").await.unwrap();
    let mut heard = String::new();
    soon("the end", client.read_to_string(&mut heard)).await.unwrap();
    assert_eq!(heard, "");
    assert_eq!(
        harness.counter("envoy_rbac_denied", &[("envoy_tcp_prefix", "r")]),
        1.0
    );
}

#[tokio::test]
async fn a_connection_without_a_chain_is_closed_and_logged_as_nr() {
    let mut harness = Harness::start();
    let mut chain = tcp_chain("tcp");
    chain.filter_chain_match = Some(listener::FilterChainMatch {
        destination_port: number(1),
        ..Default::default()
    });
    let message = listener_of("l", core::TrafficDirection::Outbound, vec![chain]);
    harness.put(ResourceType::Listener, "l", &message).await;
    let at = harness.proxy.listener_address("l").unwrap();
    assert_eq!(raw(at, b"").await, "");
    assert_eq!(harness.line().await["response_flags"], "NR");
}

#[tokio::test]
async fn a_slow_http_client_is_served_also_where_the_tcp_upstream_does_not_exist() {
    let mut harness = Harness::start();
    let http = Backend::named("http").await;
    harness.cluster("h", &[http.address]).await;
    harness.cluster("tcp", &[closed_port().await]).await;
    harness.route_all_to("h").await;
    let at = detecting(&harness).await;
    let mut slow = TcpStream::connect(at).await.unwrap();
    // Detection has given up once the TCP upstream has been tried.
    soon("the attempt", async {
        while harness.counter("serin_proxy_upstream_connect_failures_total", &[]) == 0.0 {
            tokio::task::yield_now().await;
        }
    })
    .await;
    slow.write_all(b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
        .await
        .unwrap();
    let mut answer = String::new();
    soon("an answer", slow.read_to_string(&mut answer)).await.unwrap();
    assert!(answer.ends_with("http"), "{answer}");
    assert!(
        harness.log.try_recv().is_err(),
        "the attempt was logged as a failure"
    );
}

#[tokio::test]
async fn tcp_connections_are_carried_on_within_a_connect() {
    use tcp_proxy::tcp_proxy::TunnelingConfig;
    let harness = Harness::start();
    let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
    harness.cluster("tcp", &[socket.local_addr().unwrap()]).await;
    let tunnelled = |use_post| tcp_proxy::TcpProxy {
        stat_prefix: "t".into(),
        cluster_specifier: Some(tcp_proxy::tcp_proxy::ClusterSpecifier::Cluster("tcp".into())),
        max_connect_attempts: number(2),
        tunneling_config: Some(TunnelingConfig {
            hostname: "db.example:5432".into(),
            use_post,
            headers_to_add: vec![core::HeaderValueOption {
                header: Some(core::HeaderValue {
                    key: "x-from".into(),
                    value: "%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%".into(),
                    ..Default::default()
                }),
                ..Default::default()
            }],
            ..Default::default()
        }),
        ..Default::default()
    };
    let message = |use_post| {
        let chain = listener::FilterChain {
            filters: vec![network_filter(
                "envoy.filters.network.tcp_proxy",
                Some(any(&tunnelled(use_post))),
            )],
            ..Default::default()
        };
        listener_of("l", core::TrafficDirection::Outbound, vec![chain])
    };
    let refusal = harness.try_put(ResourceType::Listener, "l", &message(true)).await;
    assert!(refusal.unwrap().contains("tunneling_config.use_post"));
    harness.put(ResourceType::Listener, "l", &message(false)).await;
    let at = harness.proxy.listener_address("l").unwrap();
    // The first is refused; the second is granted, with the server's first words in the same packet.
    let server = tokio::spawn(async move {
        let mut heads = Vec::new();
        for answer in [
            &b"HTTP/1.1 403 Forbidden\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"[..],
            b"HTTP/1.1 200 Connected\r\n\r\nwelcome",
        ] {
            let (mut stream, _) = socket.accept().await.unwrap();
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                head.push(stream.read_u8().await.unwrap());
            }
            heads.push(String::from_utf8(head).unwrap());
            stream.write_all(answer).await.unwrap();
            if heads.len() == 2 {
                let mut all = Vec::new();
                stream.read_to_end(&mut all).await.unwrap();
                stream.write_all(&all).await.unwrap();
            }
        }
        heads
    });
    let mut client = TcpStream::connect(at).await.unwrap();
    client.write_all(b"question").await.unwrap();
    client.shutdown().await.unwrap();
    let mut answer = String::new();
    soon("the answer", client.read_to_string(&mut answer))
        .await
        .unwrap();
    assert_eq!(answer, "welcomequestion");
    for head in soon("the server", server).await.unwrap() {
        assert!(head.starts_with("CONNECT db.example:5432 HTTP/1.1\r\n"), "{head}");
        assert!(
            head.contains("host: db.example:5432\r\n") && head.contains("x-from: 127.0.0.1\r\n"),
            "{head}"
        );
    }
}
