//! CONNECT, upgrades, and upgrades over HTTP/2, between any two of HTTP/1, HTTP/2 and plain TCP.

use std::net::SocketAddr;

use bytes::Bytes;
use http::{Method, Request, Version};
use http_body_util::{Empty, Full};
use hyper::ext::Protocol;
use hyper_util::rt::{TokioExecutor, TokioIo};
use serin_xds::ResourceType;
use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::envoy::config::route::v3 as route;
use serin_xds::pb::envoy::extensions::filters::network::http_connection_manager::v3 as hcm;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::fixture::*;

/// Says back what it hears, after `greeting`.
async fn echo(greeting: &'static [u8]) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let _ = stream.write_all(greeting).await;
                let (mut read, mut write) = stream.split();
                let _ = tokio::io::copy(&mut read, &mut write).await;
            });
        }
    });
    at
}

/// A WebSocket server over HTTP/1 that wants a key, and then says back what it hears.
async fn websocket_server() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    head.push(stream.read_u8().await?);
                }
                let head = String::from_utf8_lossy(&head).to_ascii_lowercase();
                let good = head.starts_with("get /chat?room=1 http/1.1")
                    && head.contains("\r\nupgrade: websocket\r\n")
                    && head.contains("\r\nsec-websocket-key: ");
                let answer: &[u8] = if good {
                    b"HTTP/1.1 101 Switching Protocols\r\nconnection: Upgrade\r\nupgrade: websocket\r\n\
                      sec-websocket-accept: from-the-server\r\n\r\n"
                } else {
                    b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n"
                };
                stream.write_all(answer).await?;
                let (mut read, mut write) = stream.split();
                tokio::io::copy(&mut read, &mut write).await
            });
        }
    });
    at
}

/// The bytes come back.
async fn says_back<S: AsyncRead + AsyncWrite + Unpin>(stream: &mut S) {
    for word in ["hello", "again"] {
        stream.write_all(word.as_bytes()).await.unwrap();
        stream.flush().await.unwrap();
        let mut heard = vec![0; word.len()];
        soon("the echo", stream.read_exact(&mut heard)).await.unwrap();
        assert_eq!(heard, word.as_bytes());
    }
}

fn upgrading(protocols: &[&str]) -> hcm::HttpConnectionManager {
    hcm::HttpConnectionManager {
        upgrade_configs: protocols
            .iter()
            .map(|protocol| hcm::http_connection_manager::UpgradeConfig {
                upgrade_type: (*protocol).into(),
                ..Default::default()
            })
            .collect(),
        http2_protocol_options: Some(core::Http2ProtocolOptions {
            allow_connect: true,
            ..Default::default()
        }),
        ..manager("80")
    }
}

/// A route for CONNECT to `cluster`, which ends here if `terminate`.
fn connect_route(cluster: &str, terminate: bool) -> route::Route {
    let mut out = prefix_route(
        "/",
        route::RouteAction {
            upgrade_configs: vec![route::route_action::UpgradeConfig {
                upgrade_type: "CONNECT".into(),
                connect_config: terminate.then(Default::default),
                ..Default::default()
            }],
            ..to_cluster(cluster)
        },
    );
    out.r#match = Some(route::RouteMatch {
        path_specifier: Some(route::route_match::PathSpecifier::ConnectMatcher(
            Default::default(),
        )),
        ..Default::default()
    });
    out
}

/// A proxy with these routes, whose cluster `c` is at `upstream`, over HTTP/2 if so.
async fn proxy(
    protocols: &[&str],
    routes: Vec<route::Route>,
    upstream: SocketAddr,
    http2: bool,
) -> (Harness, SocketAddr) {
    let harness = Harness::start();
    let cluster = eds_cluster("c");
    let cluster = if http2 { speaking_h2(cluster) } else { cluster };
    harness.put(ResourceType::Cluster, "c", &cluster).await;
    harness.endpoints("c", &[upstream]).await;
    harness.routes(vec![host("all", "*", routes)]).await;
    let at = harness
        .listen(&upgrading(protocols), core::TrafficDirection::Outbound)
        .await;
    (harness, at)
}

/// A head over HTTP/1, and what is answered to it.
async fn ask(at: SocketAddr, head: &str) -> (TcpStream, String) {
    let mut stream = TcpStream::connect(at).await.unwrap();
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    while !answer.ends_with(b"\r\n\r\n") {
        answer.push(soon("an answer", stream.read_u8()).await.unwrap());
    }
    (stream, String::from_utf8(answer).unwrap().to_ascii_lowercase())
}

const CONNECT: &str = "CONNECT db:5432 HTTP/1.1\r\nHost: db:5432\r\n\r\n";

/// CONNECT over HTTP/2; the tunnel if it is granted, else the status.
async fn connect_over_h2(
    at: SocketAddr,
    request: Request<Empty<Bytes>>,
) -> Result<TokioIo<hyper::upgrade::Upgraded>, u16> {
    let stream = TcpStream::connect(at).await.unwrap();
    let (mut sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream))
            .await
            .unwrap();
    tokio::spawn(connection);
    soon("the connection", sender.ready()).await.unwrap();
    let mut response = soon("an answer", sender.send_request(request)).await.unwrap();
    if !response.status().is_success() {
        return Err(response.status().as_u16());
    }
    let upgraded = soon("the tunnel", hyper::upgrade::on(&mut response))
        .await
        .unwrap();
    // The connection lives as long as somebody can send on it.
    tokio::spawn(async move {
        let _kept = sender;
        std::future::pending::<()>().await
    });
    Ok(TokioIo::new(upgraded))
}

fn connect_request() -> Request<Empty<Bytes>> {
    Request::builder()
        .method(Method::CONNECT)
        .uri("db:5432")
        .version(Version::HTTP_2)
        .body(Empty::new())
        .unwrap()
}

fn websocket_request() -> Request<Empty<Bytes>> {
    let mut request = Request::builder()
        .method(Method::CONNECT)
        .uri("http://reviews/chat?room=1")
        .version(Version::HTTP_2)
        .body(Empty::new())
        .unwrap();
    request
        .extensions_mut()
        .insert(Protocol::from_static("websocket"));
    request
}

#[tokio::test]
async fn connect_ends_at_the_tcp_connection_of_an_endpoint_from_http1_and_http2() {
    let (harness, at) = proxy(
        &["CONNECT"],
        vec![connect_route("c", true)],
        echo(b"server first\n").await,
        false,
    )
    .await;
    let (mut stream, answer) = ask(at, CONNECT).await;
    assert!(answer.starts_with("http/1.1 200 "), "{answer}");
    assert!(
        !answer.contains("content-length") && !answer.contains("transfer-encoding"),
        "{answer}"
    );
    let mut greeting = [0; 13];
    soon("the greeting", stream.read_exact(&mut greeting))
        .await
        .unwrap();
    assert_eq!(&greeting, b"server first\n");
    says_back(&mut stream).await;
    let mut tunnel = connect_over_h2(at, connect_request()).await.unwrap();
    soon("the greeting", tunnel.read_exact(&mut greeting))
        .await
        .unwrap();
    says_back(&mut tunnel).await;
    // Ends are passed on, and what was counted is one request each.
    drop((stream, tunnel));
    soon("the records", async {
        while harness.counter("istio_requests_total", &[("response_code", "200")]) < 2.0 {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

#[tokio::test]
async fn a_connect_that_is_not_granted_is_answered_and_nothing_follows_it() {
    let nobody = closed_port().await;
    let (_harness, at) = proxy(&["CONNECT"], vec![connect_route("c", true)], nobody, false).await;
    // What comes after may be meant for the tunnel: it must never be taken for a request.
    let answer = raw(
        at,
        format!("{CONNECT}GET /secret HTTP/1.1\r\nHost: a\r\n\r\n").as_bytes(),
    )
    .await;
    let lower = answer.to_ascii_lowercase();
    assert!(
        lower.starts_with("http/1.1 503 ") && lower.contains("connection: close"),
        "{answer}"
    );
    assert_eq!(lower.matches("http/1.1 ").count(), 1, "{answer}");
    assert_eq!(connect_over_h2(at, connect_request()).await.unwrap_err(), 503);
    // Without a route for it, and with content, which CONNECT has not.
    let (_harness, at) = proxy(
        &["CONNECT"],
        vec![prefix_route("/", to_cluster("c"))],
        nobody,
        false,
    )
    .await;
    assert!(raw(at, CONNECT.as_bytes()).await.starts_with("HTTP/1.1 404 "));
    let content = "CONNECT a:1 HTTP/1.1\r\nHost: a:1\r\nContent-Length: 5\r\n\r\nhello";
    assert!(raw(at, content.as_bytes()).await.starts_with("HTTP/1.1 405 "));
    assert_eq!(connect_over_h2(at, connect_request()).await.unwrap_err(), 404);
}

#[tokio::test]
async fn connect_is_passed_on_over_http1_and_http2_to_a_proxy_that_ends_it() {
    let (_end, end) = proxy(
        &["CONNECT"],
        vec![connect_route("c", true)],
        echo(b"").await,
        false,
    )
    .await;
    for http2 in [false, true] {
        let (_harness, at) = proxy(&["CONNECT"], vec![connect_route("c", false)], end, http2).await;
        let (mut stream, answer) = ask(at, CONNECT).await;
        assert!(answer.starts_with("http/1.1 200 "), "{answer}");
        says_back(&mut stream).await;
        let mut tunnel = connect_over_h2(at, connect_request()).await.unwrap();
        says_back(&mut tunnel).await;
    }
}

#[tokio::test]
async fn a_tcp_listener_reaches_an_endpoint_through_a_proxy_that_ends_its_connect_over_both_versions() {
    use serin_xds::pb::envoy::config::listener::v3 as listener;
    use serin_xds::pb::envoy::extensions::filters::network::tcp_proxy::v3 as tcp_proxy;
    let (_end, end) = proxy(
        &["CONNECT"],
        vec![connect_route("c", true)],
        echo(b"").await,
        false,
    )
    .await;
    let tunnelled = tcp_proxy::TcpProxy {
        stat_prefix: "t".into(),
        cluster_specifier: Some(tcp_proxy::tcp_proxy::ClusterSpecifier::Cluster("end".into())),
        tunneling_config: Some(tcp_proxy::tcp_proxy::TunnelingConfig {
            hostname: "reviews:80".into(),
            ..Default::default()
        }),
        ..Default::default()
    };
    for http2 in [false, true] {
        let harness = Harness::start();
        let cluster = eds_cluster("end");
        let cluster = if http2 { speaking_h2(cluster) } else { cluster };
        harness.put(ResourceType::Cluster, "end", &cluster).await;
        harness.endpoints("end", &[end]).await;
        let chain = listener::FilterChain {
            filters: vec![network_filter(
                "envoy.filters.network.tcp_proxy",
                Some(any(&tunnelled)),
            )],
            ..Default::default()
        };
        let message = listener_of("l", core::TrafficDirection::Outbound, vec![chain]);
        harness.put(ResourceType::Listener, "l", &message).await;
        let at = harness.proxy.listener_address("l").unwrap();
        for _ in 0..3 {
            let mut stream = TcpStream::connect(at).await.unwrap();
            says_back(&mut stream).await;
        }
        let connections = harness.counter(
            "envoy_cluster_upstream_cx_total",
            &[("envoy_cluster_name", "end")],
        );
        assert_eq!(connections, if http2 { 1.0 } else { 3.0 });
    }
}

#[tokio::test]
async fn websockets_pass_between_http1_and_http2_both_ways() {
    let server = websocket_server().await;
    let routes = || vec![prefix_route("/chat", to_cluster("c"))];
    // The second proxy is reached over HTTP/2 by the first and reaches the server over HTTP/1.
    let (_second, second) = proxy(&["websocket"], routes(), server, false).await;
    let (_first, first) = proxy(&["websocket"], routes(), second, true).await;
    for at in [second, first] {
        let mut tunnel = connect_over_h2(at, websocket_request()).await.unwrap();
        says_back(&mut tunnel).await;
        let (mut stream, answer) = ask(
            at,
            "GET /chat?room=1 HTTP/1.1\r\nHost: reviews\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
             Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n",
        )
        .await;
        assert!(answer.starts_with("http/1.1 101 "), "{answer}");
        assert!(answer.contains("\r\nupgrade: websocket\r\n"), "{answer}");
        assert!(answer.contains("\r\nsec-websocket-accept: "), "{answer}");
        says_back(&mut stream).await;
    }
    // What the server refuses is an ordinary answer.
    let mut refused = websocket_request();
    *refused.uri_mut() = "http://reviews/chat?room=2".parse().unwrap();
    assert_eq!(connect_over_h2(first, refused).await.unwrap_err(), 400);
}

#[tokio::test]
async fn a_route_may_forbid_an_upgrade_that_the_listener_allows() {
    let mut forbidden = to_cluster("c");
    forbidden.upgrade_configs = vec![route::route_action::UpgradeConfig {
        upgrade_type: "websocket".into(),
        enabled: Some(serin_xds::pb::google::protobuf::BoolValue { value: false }),
        ..Default::default()
    }];
    let server = websocket_server().await;
    let (_harness, at) = proxy(
        &["websocket"],
        vec![prefix_route("/chat", forbidden)],
        server,
        false,
    )
    .await;
    assert_eq!(connect_over_h2(at, websocket_request()).await.unwrap_err(), 403);
    let request = Request::get("/chat?room=1")
        .header("host", "reviews")
        .header("connection", "upgrade")
        .header("upgrade", "websocket")
        .body(Full::from(""))
        .unwrap();
    assert_eq!(send(at, request).await.0, 403);
}

#[tokio::test]
async fn a_line_is_written_when_a_request_comes_when_its_tunnel_is_granted_and_when_it_ends() {
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("log");
    let harness = Harness::start();
    harness.put(ResourceType::Cluster, "c", &eds_cluster("c")).await;
    harness.endpoints("c", &[echo(b"server first\n").await]).await;
    harness
        .routes(vec![host("all", "*", vec![connect_route("c", true)])])
        .await;
    let mut manager = upgrading(&["CONNECT"]);
    let line = "%ACCESS_LOG_TYPE% %RESPONSE_CODE% %UPSTREAM_CLUSTER%\n";
    manager.access_log = vec![file_log(log.to_str().unwrap(), line)];
    manager.access_log_options = Some(hcm::http_connection_manager::HcmAccessLogOptions {
        flush_access_log_on_new_request: true,
        flush_log_on_tunnel_successfully_established: true,
        ..Default::default()
    });
    let at = harness.listen(&manager, core::TrafficDirection::Outbound).await;
    let (mut stream, answer) = ask(at, CONNECT).await;
    assert!(answer.starts_with("http/1.1 200 "), "{answer}");
    let mut greeting = [0; 13];
    soon("the greeting", stream.read_exact(&mut greeting))
        .await
        .unwrap();
    let expected = [
        "DownstreamStart 0 c",
        "DownstreamTunnelSuccessfullyEstablished 200 c",
        "DownstreamEnd 200 c",
    ];
    assert_eq!(crate::late_heads::lines(&log, 2).await, expected[..2]);
    drop(stream);
    assert_eq!(crate::late_heads::lines(&log, 3).await, expected);
}

#[tokio::test]
async fn lines_of_a_tunnel_that_lasts_tell_what_its_client_has_been_sent() {
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("log");
    let harness = Harness::start();
    harness.put(ResourceType::Cluster, "c", &eds_cluster("c")).await;
    harness.endpoints("c", &[echo(b"server first\n").await]).await;
    harness
        .routes(vec![host("all", "*", vec![connect_route("c", true)])])
        .await;
    let mut manager = upgrading(&["CONNECT"]);
    let line = "%ACCESS_LOG_TYPE% %RESPONSE_CODE% %BYTES_SENT%\n";
    manager.access_log = vec![file_log(log.to_str().unwrap(), line)];
    manager.access_log_flush_interval = millis(50);
    let at = harness.listen(&manager, core::TrafficDirection::Outbound).await;
    let (mut stream, _) = ask(at, CONNECT).await;
    let mut greeting = [0; 13];
    soon("the greeting", stream.read_exact(&mut greeting))
        .await
        .unwrap();
    soon("a line about the tunnel", async {
        loop {
            let lines = crate::late_heads::lines(&log, 1).await;
            if lines.iter().any(|line| line == "DownstreamPeriodic 200 13") {
                break;
            }
            tokio::task::yield_now().await;
        }
    })
    .await;
    drop(stream);
    soon("the last line", async {
        while crate::late_heads::lines(&log, 1).await.last().unwrap() != "DownstreamEnd 200 13" {
            tokio::task::yield_now().await;
        }
    })
    .await;
}
