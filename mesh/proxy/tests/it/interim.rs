//! Interim answers (1xx).

use http::Response;
use http_body_util::Full;
use serin_xds::pb::envoy::config::core::v3::TrafficDirection;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::fixture::*;

async fn read_until(stream: &mut TcpStream, end: &str) -> String {
    let mut read = Vec::new();
    while !read.ends_with(end.as_bytes()) {
        let byte = soon("a byte", stream.read_u8()).await.unwrap();
        read.push(byte);
    }
    String::from_utf8(read).unwrap()
}

/// istiod asks for `proxy_100_continue` on every listener, so it must not be refused.
#[tokio::test]
async fn a_client_that_expects_100_continue_gets_it_and_then_the_answer_to_its_body() {
    let harness = Harness::start();
    let backend = Backend::answering(|seen: &Seen| Response::new(Full::from(seen.body.clone()))).await;
    harness.cluster("c", &[backend.address]).await;
    harness
        .routes(vec![host("all", "*", vec![prefix_route("/", to_cluster("c"))])])
        .await;
    let mut manager = manager("80");
    manager.proxy_100_continue = true;
    let at = harness.listen(&manager, TrafficDirection::Outbound).await;
    let mut client = TcpStream::connect(at).await.unwrap();
    client
        .write_all(b"POST / HTTP/1.1\r\nhost: a\r\nexpect: 100-continue\r\ncontent-length: 4\r\n\r\n")
        .await
        .unwrap();
    let interim = read_until(&mut client, "\r\n\r\n").await;
    assert!(interim.starts_with("HTTP/1.1 100 "), "{interim}");
    client.write_all(b"body").await.unwrap();
    let answer = read_until(&mut client, "body").await;
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
}

/// An endpoint that reads a head, writes `first`, waits for `gate` bytes of a body, and writes `second`.
async fn scripted(
    first: &'static [u8],
    body: usize,
    second: &'static [u8],
) -> (std::net::SocketAddr, tokio::task::JoinHandle<Vec<String>>) {
    let socket = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = socket.local_addr().unwrap();
    let task = tokio::spawn(async move {
        let (mut stream, _) = socket.accept().await.unwrap();
        let mut heads = Vec::new();
        // As many exchanges as the client asks for.
        while let Ok(head) = head(&mut stream).await {
            heads.push(head);
            stream.write_all(first).await.unwrap();
            let mut content = vec![0; body];
            if stream.read_exact(&mut content).await.is_err() {
                break;
            }
            stream.write_all(second).await.unwrap();
        }
        heads
    });
    (at, task)
}

async fn head(stream: &mut TcpStream) -> std::io::Result<String> {
    let mut read = Vec::new();
    while !read.ends_with(b"\r\n\r\n") {
        read.push(stream.read_u8().await?);
    }
    Ok(String::from_utf8(read).unwrap())
}

async fn passing(endpoint: std::net::SocketAddr, passes: bool) -> (Harness, std::net::SocketAddr) {
    let harness = Harness::start();
    harness.cluster("c", &[endpoint]).await;
    harness
        .routes(vec![host("all", "*", vec![prefix_route("/", to_cluster("c"))])])
        .await;
    let mut manager = manager("80");
    manager.proxy_100_continue = passes;
    let at = harness.listen(&manager, TrafficDirection::Outbound).await;
    (harness, at)
}

const HINTS: &[u8] = b"HTTP/1.1 102 Processing\r\n\r\n\
    HTTP/1.1 103 Early Hints\r\nlink: </a.css>; rel=preload\r\nconnection: x-own\r\nx-own: 1\r\n\r\n";
const DONE: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";

#[tokio::test]
async fn early_hints_reach_an_http1_client_before_the_answer_and_pipelined_answers_stay_in_order() {
    let (endpoint, _task) = scripted(HINTS, 0, DONE).await;
    let (_harness, at) = passing(endpoint, true).await;
    let mut client = TcpStream::connect(at).await.unwrap();
    let request = b"GET / HTTP/1.1\r\nhost: a\r\n\r\n";
    client.write_all(&[&request[..], request].concat()).await.unwrap();
    for _ in 0..2 {
        let processing = read_until(&mut client, "\r\n\r\n").await;
        assert_eq!(processing, "HTTP/1.1 102 Processing\r\n\r\n");
        let hints = read_until(&mut client, "\r\n\r\n").await;
        assert_eq!(
            hints,
            "HTTP/1.1 103 Early Hints\r\nlink: </a.css>; rel=preload\r\n\r\n"
        );
        let answer = read_until(&mut client, "ok").await;
        assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    }
}

#[tokio::test]
async fn early_hints_arrive_while_the_answer_is_still_being_made() {
    // The endpoint answers only when it has a body, and the client sends it only after it has the hints.
    let (endpoint, _task) = scripted(HINTS, 4, DONE).await;
    let (_harness, at) = passing(endpoint, true).await;
    let mut client = TcpStream::connect(at).await.unwrap();
    client
        .write_all(b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 4\r\n\r\n")
        .await
        .unwrap();
    read_until(&mut client, "rel=preload\r\n\r\n").await;
    client.write_all(b"body").await.unwrap();
    read_until(&mut client, "ok").await;
}

#[tokio::test]
async fn clients_over_http_1_0_and_http_2_and_where_it_is_not_asked_for_get_the_answer_alone() {
    let (endpoint, task) = scripted(HINTS, 0, DONE).await;
    let (harness, at) = passing(endpoint, true).await;
    let mut client = TcpStream::connect(at).await.unwrap();
    client
        .write_all(b"GET / HTTP/1.0\r\nhost: a\r\nconnection: keep-alive\r\n\r\n")
        .await
        .unwrap();
    let answer = read_until(&mut client, "ok").await;
    assert!(answer.starts_with("HTTP/1.0 200 "), "{answer}");
    let mut client = h2_client(at).await;
    let request = http::Request::get("http://a/").body(Full::default()).unwrap();
    assert_eq!(client.send_request(request).await.unwrap().status(), 200);
    drop(harness);
    task.abort();
    let (endpoint, _task) = scripted(HINTS, 0, DONE).await;
    let (_harness, at) = passing(endpoint, false).await;
    let mut client = TcpStream::connect(at).await.unwrap();
    client
        .write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
        .await
        .unwrap();
    let answer = read_until(&mut client, "ok").await;
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
}

const EXPECTING: &[u8] = b"POST / HTTP/1.1\r\nhost: a\r\nexpect: 100-continue\r\ncontent-length: 4\r\n\r\n";

#[tokio::test]
async fn the_endpoint_decides_whether_a_client_that_expects_100_may_send_its_body() {
    const LAST: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\nok";
    let (endpoint, task) = scripted(b"HTTP/1.1 100 Continue\r\n\r\n", 4, LAST).await;
    let (_harness, at) = passing(endpoint, true).await;
    let mut client = TcpStream::connect(at).await.unwrap();
    client.write_all(EXPECTING).await.unwrap();
    let interim = read_until(&mut client, "\r\n\r\n").await;
    assert!(interim.starts_with("HTTP/1.1 100 "), "{interim}");
    client.write_all(b"body").await.unwrap();
    let answer = read_until(&mut client, "ok").await;
    assert!(answer.starts_with("HTTP/1.1 200 "), "once only: {answer}");
    let heads = soon("the end of the endpoint", task).await.unwrap();
    assert!(heads[0].contains("expect: 100-continue\r\n"), "{heads:?}");
}

#[tokio::test]
async fn a_refusal_of_the_endpoint_reaches_the_client_instead_of_100_and_nothing_is_left_behind() {
    const REFUSED: &[u8] =
        b"HTTP/1.1 417 Expectation Failed\r\ncontent-length: 2\r\nconnection: close\r\n\r\nno";
    let (endpoint, _task) = scripted(REFUSED, 1, b"").await;
    let (harness, at) = passing(endpoint, true).await;
    let mut client = TcpStream::connect(at).await.unwrap();
    client.write_all(EXPECTING).await.unwrap();
    let answer = read_until(&mut client, "no").await;
    assert!(answer.starts_with("HTTP/1.1 417 "), "{answer}");
    drop(client);
    soon("the end of all tasks", async {
        while harness.proxy.tasks().await > 0 {
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    })
    .await;
}

#[tokio::test]
async fn a_client_whose_endpoint_knows_nothing_of_100_is_told_to_go_on_after_a_while() {
    let (endpoint, _task) = scripted(b"", 4, DONE).await;
    let (_harness, at) = passing(endpoint, true).await;
    let mut client = TcpStream::connect(at).await.unwrap();
    client.write_all(EXPECTING).await.unwrap();
    let interim = read_until(&mut client, "\r\n\r\n").await;
    assert!(interim.starts_with("HTTP/1.1 100 "), "{interim}");
    client.write_all(b"body").await.unwrap();
    read_until(&mut client, "ok").await;
}
