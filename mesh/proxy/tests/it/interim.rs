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
