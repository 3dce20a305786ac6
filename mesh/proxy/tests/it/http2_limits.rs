//! What HTTP/2 peers may send and how long they may say nothing: floods of frames without use, header blocks that never end,
//! and pings that are not answered, by the limits of listeners and clusters.

use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use http::Request;
use http_body_util::Full;
use serin_xds::ResourceType;
use serin_xds::pb::envoy::config::cluster::v3 as cluster;
use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::envoy::config::route::v3 as route;
use serin_xds::pb::envoy::extensions::filters::network::http_connection_manager::v3 as hcm;
use serin_xds::pb::google::protobuf as google;
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpStream};

use crate::failure::{counted_cluster, nothing_is_left};
use crate::fixture::*;
use crate::frames::*;
use crate::interop_ads::{Pair, resource, router};
use crate::late_heads::{hurried, lines, logged_to};

const ENHANCE_YOUR_CALM: u32 = 11;

/// A connection manager that answers everything itself.
fn answering(options: core::Http2ProtocolOptions) -> hcm::HttpConnectionManager {
    let direct = route::Route {
        action: Some(route::route::Action::DirectResponse(
            route::DirectResponseAction {
                status: 200,
                ..Default::default()
            },
        )),
        ..prefix_route("/", to_cluster("nowhere"))
    };
    hcm::HttpConnectionManager {
        http2_protocol_options: Some(options),
        http_filters: vec![router()],
        route_specifier: Some(hcm::http_connection_manager::RouteSpecifier::RouteConfig(
            route::RouteConfiguration {
                name: "80".into(),
                virtual_hosts: vec![host("all", "*", vec![direct])],
                ..Default::default()
            },
        )),
        ..manager("80")
    }
}

/// Frames without use, and how many of each a client may send that has been answered once.
fn floods() -> Vec<(&'static str, Vec<u8>, usize)> {
    vec![
        ("PRIORITY", frame(PRIORITY, 0, 3, &[0, 0, 0, 0, 1]), 6),
        // 5 + 2 * (1 stream + 2 * no DATA).
        (
            "WINDOW_UPDATE",
            frame(WINDOW_UPDATE, 0, 0, &1u32.to_be_bytes()),
            7,
        ),
        ("empty DATA", frame(DATA, 0, 3, &[]), 2),
    ]
}

fn limits() -> core::Http2ProtocolOptions {
    core::Http2ProtocolOptions {
        max_consecutive_inbound_frames_with_empty_payload: number(2),
        max_inbound_priority_frames_per_stream: number(3),
        max_inbound_window_update_frames_per_data_frame_sent: number(2),
        ..Default::default()
    }
}

/// Whether a connection lives on after so many frames.
async fn survives(at: SocketAddr, flood: &[u8], count: usize) -> (bool, Option<u32>) {
    let mut client = RawClient::connect(at, &[]).await;
    client.get(1, &request("GET", "/", &[])).await;
    assert!(matches!(client.fate(1).await, Fate::Status(200 | 204)));
    client
        .send(&frame(HEADERS, END_HEADERS, 3, &request("POST", "/", &[])))
        .await;
    // Its answer comes before its content.
    client.send(&flood.repeat(count)).await;
    client.send(&frame(PING, 0, 0, b"stillup?")).await;
    let mut goaway = None;
    while let Some(found) = client.next().await {
        match found.kind {
            PING if found.flags & ACK != 0 => return (true, None),
            GOAWAY => goaway = Some(found.code()),
            _ => {}
        }
    }
    (false, goaway)
}

#[tokio::test]
async fn floods_of_frames_without_use_end_their_connection_at_the_limits_of_the_listener() {
    let harness = Harness::start();
    let at = harness
        .listen(&answering(limits()), core::TrafficDirection::Outbound)
        .await;
    for (name, one, most) in floods() {
        // What is sent of a second stream allows more: heads that were answered are counted.
        let most = match name {
            "PRIORITY" => most + 3,
            "WINDOW_UPDATE" => most + 2,
            _ => most,
        };
        let (lives, _) = survives(at, &one, most.min(2)).await;
        assert!(lives, "{name}: few");
        let ended = survives(at, &one, most + 1).await;
        assert_eq!(ended, (false, Some(ENHANCE_YOUR_CALM)), "{name}: too many");
        // Nobody else is hurt.
        let mut other = RawClient::connect(at, &[]).await;
        other.get(1, &request("GET", "/", &[])).await;
        assert_eq!(other.fate(1).await, Fate::Status(200));
    }
    assert!(harness.counter("envoy_http_downstream_cx_protocol_error", &[]) >= 3.0);
}

#[tokio::test]
async fn a_client_that_resets_faster_than_the_listener_allows_is_told_to_calm_down() {
    let harness = Harness::start();
    let options = core::Http2ProtocolOptions {
        stream_reset_burst: Some(google::UInt64Value { value: 3 }),
        stream_reset_rate: Some(google::UInt64Value { value: 1 }),
        ..Default::default()
    };
    let at = harness
        .listen(&answering(options), core::TrafficDirection::Outbound)
        .await;
    for (count, code) in [(3u32, None), (6, Some(ENHANCE_YOUR_CALM))] {
        let mut client = RawClient::connect(at, &[]).await;
        let mut goaway = None;
        let mut alive = false;
        for index in 0..count {
            let stream = index * 2 + 1;
            client
                .send(&frame(HEADERS, END_HEADERS, stream, &request("POST", "/", &[])))
                .await;
            client
                .send(&frame(RST_STREAM, 0, stream, &8u32.to_be_bytes()))
                .await;
        }
        client.send(&frame(PING, 0, 0, b"stillup?")).await;
        while let Some(found) = client.next().await {
            match found.kind {
                PING if found.flags & ACK != 0 => {
                    alive = true;
                    break;
                }
                GOAWAY => goaway = Some(found.code()),
                _ => {}
            }
        }
        assert_eq!((alive, goaway), (code.is_none(), code), "{count} resets");
    }
}

#[tokio::test]
async fn a_flood_of_frames_without_use_is_borne_for_as_long_by_envoy_as_by_serin_proxy() {
    // It answers requests once they are whole, so that the second stream stays open, and with no DATA.
    let backend = Backend::answering(|_| status(204)).await;
    let mut manager = answering(limits());
    if let Some(hcm::http_connection_manager::RouteSpecifier::RouteConfig(routes)) =
        &mut manager.route_specifier
    {
        routes.virtual_hosts = vec![host("all", "*", vec![prefix_route("/", to_cluster("c"))])];
    }
    let cluster = cluster::Cluster {
        name: "c".into(),
        connect_timeout: millis(1000),
        load_assignment: Some(assignment("c", &[(backend.address, "")])),
        ..Default::default()
    };
    let listener = listener_of("l", core::TrafficDirection::Outbound, vec![http_chain(&manager)]);
    let resources = vec![
        resource(ResourceType::Cluster, "c", &cluster),
        resource(ResourceType::Listener, "l", &listener),
    ];
    let Some(pair) = Pair::start(resources).await else {
        return;
    };
    let mut borne = Vec::new();
    for at in pair.listener("l").await {
        let mut own = Vec::new();
        for (name, one, _) in floods() {
            let mut most = 0;
            while most < 40 && survives(at, &one, most + 1).await.0 {
                most += 1;
            }
            own.push((name, most));
        }
        borne.push(own);
    }
    assert_eq!(borne[0], borne[1]);
    assert!(borne[0].iter().all(|(_, most)| *most < 40), "{borne:?}");
    pair.stop().await;
}

#[tokio::test]
async fn a_header_block_that_never_ends_is_answered_408_and_its_connection_ends() {
    let backend = Backend::named("b").await;
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("log");
    let (harness, at) = hurried(&backend, &log).await;
    let half = request("GET", "/", &[]);
    for (index, dripping) in [false, true].into_iter().enumerate() {
        let mut client = RawClient::connect(at, &[]).await;
        // A request before it is answered as ever.
        client.get(1, &half).await;
        assert_eq!(client.fate(1).await, Fate::Status(200));
        client.send(&frame(HEADERS, END_STREAM, 3, &half)).await;
        let (mut status, mut text, mut code) = (None, Vec::new(), None);
        let watched = async {
            loop {
                tokio::select! {
                    found = client.listen() => match found {
                        Some(found) if found.kind == HEADERS && found.stream == 3 => {
                            assert_eq!(&found.payload[..5], b"\x08\x03408");
                            status = Some(408);
                        }
                        Some(found) if found.kind == DATA && found.stream == 3 => text = found.payload,
                        Some(found) if found.kind == GOAWAY => code = Some(found.code()),
                        Some(_) => {}
                        None => return,
                    },
                    () = tokio::time::sleep(Duration::from_millis(60)), if dripping => {
                        let more = block(&[("x", "y")]);
                        if !client.try_send(&frame(CONTINUATION, 0, 3, &more)).await {
                            return;
                        }
                    }
                }
            }
        };
        soon("the end of a connection", watched).await;
        assert_eq!((status, &text[..]), (Some(408), &b"request header timeout"[..]));
        assert_eq!(code, Some(ENHANCE_YOUR_CALM));
        let told = lines(&log, 2 * (index + 1)).await;
        assert_eq!(
            told[2 * index + 1],
            "- - - HTTP/2 408 - request_header_timeout 0 22 -"
        );
    }
    assert_eq!(backend.hits(), 2);
    assert_eq!(
        harness.counter("envoy_http_downstream_rq_header_timeout", &[]),
        2.0
    );
    drop(backend);
    nothing_is_left(&harness).await;
}

#[tokio::test]
async fn a_header_block_that_never_ends_is_answered_and_logged_by_envoy_and_serin_proxy_alike() {
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("log");
    let mut manager = answering(core::Http2ProtocolOptions::default());
    manager.request_headers_timeout = millis(200);
    manager.access_log = vec![logged_to(&log)];
    let listener = listener_of("l", core::TrafficDirection::Outbound, vec![http_chain(&manager)]);
    let Some(pair) = Pair::start(vec![resource(ResourceType::Listener, "l", &listener)]).await else {
        return;
    };
    let mut seen = Vec::new();
    for (index, at) in pair.listener("l").await.into_iter().enumerate() {
        let mut client = RawClient::connect(at, &[]).await;
        client
            .send(&frame(HEADERS, END_STREAM, 1, &request("GET", "/", &[])))
            .await;
        let mut text = Vec::new();
        while text.is_empty() {
            // Nothing may come between the frames of a block, not even an acknowledgement.
            let found = soon("a frame", client.overhear()).await.expect("an answer");
            if found.kind == DATA {
                assert_eq!((found.stream, found.flags & END_STREAM), (1, END_STREAM));
                text = found.payload;
            }
        }
        seen.push((text, lines(&log, index + 1).await.pop()));
    }
    assert_eq!(seen[0], seen[1]);
    pair.stop().await;
}

fn pinging(interval: u64, timeout: u64) -> Option<core::KeepaliveSettings> {
    Some(core::KeepaliveSettings {
        interval: millis(interval),
        timeout: millis(timeout),
        ..Default::default()
    })
}

#[tokio::test]
async fn a_client_that_answers_pings_stays_and_one_that_does_not_is_let_go() {
    let harness = Harness::start();
    let options = core::Http2ProtocolOptions {
        connection_keepalive: pinging(20, 100),
        ..Default::default()
    };
    let at = harness
        .listen(&answering(options), core::TrafficDirection::Outbound)
        .await;
    let mut answers = RawClient::connect(at, &[]).await;
    let mut pings = 0;
    while pings < 10 {
        let found = answers.next().await.expect("a client that answers stays");
        pings += usize::from(is_ping(&found));
    }
    answers.get(1, &request("GET", "/", &[])).await;
    assert_eq!(answers.fate(1).await, Fate::Status(200));
    let mut silent = RawClient::connect(at, &[]).await;
    // Whatever it says counts, as long as it says something.
    for _ in 0..20 {
        silent.send(&frame(PING, ACK, 0, b"notyours")).await;
        silent.send(&frame(0xfa, 0, 0, &[0; 8])).await;
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let mut asked = 0;
    let end = async {
        while let Some(found) = silent.overhear().await {
            asked += usize::from(found.kind == PING);
        }
    };
    soon("the end of a client that says nothing", end).await;
    assert_eq!(asked, 1, "an answer is waited for before the next is asked for");
}

/// An endpoint whose connections come one by one, each after its preface.
struct Endpoint(TcpListener);

impl Endpoint {
    async fn start() -> (Self, SocketAddr) {
        let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = socket.local_addr().unwrap();
        (Self(socket), at)
    }

    async fn next(&self) -> RawClient {
        let (stream, _) = soon("a connection", self.0.accept()).await.unwrap();
        soon("a preface", RawClient::accepted(stream, &[])).await.unwrap()
    }
}

async fn towards(endpoint: SocketAddr, keepalive: Option<core::KeepaliveSettings>) -> (Harness, SocketAddr) {
    let harness = Harness::start();
    let mut cluster = counted_cluster("c");
    cluster.http2_protocol_options = Some(core::Http2ProtocolOptions {
        connection_keepalive: keepalive,
        ..Default::default()
    });
    let at = harness
        .serve_cluster(&cluster, &[endpoint], to_cluster("c"))
        .await;
    (harness, at)
}

fn get_request() -> Request<Full<Bytes>> {
    Request::get("/")
        .header("host", "a")
        .body(Full::default())
        .unwrap()
}

fn answer_ok(stream: u32) -> Vec<u8> {
    frame(
        HEADERS,
        END_HEADERS | END_STREAM,
        stream,
        &block(&[(":status", "200")]),
    )
}

#[tokio::test]
async fn an_endpoint_that_does_not_answer_pings_loses_its_connection_and_one_that_does_keeps_it() {
    let (endpoint, to) = Endpoint::start().await;
    let (harness, at) = towards(to, pinging(20, 100)).await;
    let asking = tokio::spawn(send(at, get_request()));
    let mut connection = endpoint.next().await;
    let (mut pings, mut stream) = (0, 0);
    while pings < 5 || stream == 0 {
        let found = connection
            .next()
            .await
            .expect("an endpoint that answers keeps its connection");
        pings += usize::from(is_ping(&found));
        if found.kind == HEADERS {
            stream = found.stream;
        }
    }
    connection.send(&answer_ok(stream)).await;
    assert_eq!(soon("an answer", asking).await.unwrap().0, 200);
    // From now on it says nothing more.
    let asking = tokio::spawn(send(at, get_request()));
    let end = async { while connection.overhear().await.is_some() {} };
    soon("the end of the connection", end).await;
    // Its request is sent again, since it may be: on another connection.
    let mut other = endpoint.next().await;
    answer_next(&mut other).await;
    assert_eq!(soon("an answer", asking).await.unwrap().0, 200);
    drop((other, connection, endpoint));
    nothing_is_left(&harness).await;
}

#[tokio::test]
async fn a_connection_that_was_quiet_is_pinged_ahead_of_its_next_stream() {
    let (endpoint, to) = Endpoint::start().await;
    let (_harness, at) = towards(
        to,
        Some(core::KeepaliveSettings {
            timeout: millis(10_000),
            connection_idle_interval: millis(50),
            ..Default::default()
        }),
    )
    .await;
    let first = tokio::spawn(send(at, get_request()));
    let mut connection = endpoint.next().await;
    let pings = answer_next(&mut connection).await;
    assert_eq!(pings, 0, "a connection that has just been made is not asked");
    assert_eq!(soon("an answer", first).await.unwrap().0, 200);
    tokio::time::sleep(Duration::from_millis(100)).await;
    let second = tokio::spawn(send(at, get_request()));
    let mut pings = answer_next(&mut connection).await;
    assert_eq!(soon("an answer", second).await.unwrap().0, 200);
    // It may come a moment after the stream: neither waits for the other.
    while pings == 0 {
        pings += usize::from(is_ping(&connection.next().await.unwrap()));
    }
}

fn is_ping(found: &Frame) -> bool {
    found.kind == PING && found.flags & ACK == 0
}

/// Answers the next request; how many pings came before it.
async fn answer_next(connection: &mut RawClient) -> usize {
    let mut pings = 0;
    loop {
        let found = connection.next().await.unwrap();
        pings += usize::from(is_ping(&found));
        if found.kind == HEADERS {
            connection.send(&answer_ok(found.stream)).await;
            return pings;
        }
    }
}

#[tokio::test]
async fn an_endpoint_that_floods_loses_its_connection() {
    let (endpoint, to) = Endpoint::start().await;
    let (_harness, at) = towards(to, None).await;
    let asking = tokio::spawn(send(at, get_request()));
    let mut connection = endpoint.next().await;
    loop {
        if connection.next().await.unwrap().kind == HEADERS {
            break;
        }
    }
    connection
        .send(&frame(WINDOW_UPDATE, 0, 0, &1u32.to_be_bytes()).repeat(100))
        .await;
    let end = async { while connection.overhear().await.is_some() {} };
    soon("the end of the connection", end).await;
    drop((connection, endpoint));
    assert_eq!(soon("an answer", asking).await.unwrap().0, 503);
}

#[tokio::test]
async fn a_connection_that_says_nothing_before_its_first_frame_is_not_judged() {
    let harness = Harness::start();
    let at = harness
        .listen(
            &answering(core::Http2ProtocolOptions::default()),
            core::TrafficDirection::Outbound,
        )
        .await;
    // The preface in pieces: none of its bytes are taken for the head of a frame.
    let mut stream = TcpStream::connect(at).await.unwrap();
    for piece in [&PREFACE[..10], &PREFACE[10..], &frame(SETTINGS, 0, 0, &[])] {
        stream.write_all(piece).await.unwrap();
        tokio::task::yield_now().await;
    }
    drop(stream);
    let mut client = RawClient::connect(at, &[]).await;
    client.get(1, &request("GET", "/", &[])).await;
    assert_eq!(client.fate(1).await, Fate::Status(200));
}
