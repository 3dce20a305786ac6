//! Compression of responses.

use std::io::Read;

use http::Response;
use serin_xds::pb::envoy::extensions::compression::brotli::compressor::v3::Brotli;
use serin_xds::pb::envoy::extensions::compression::gzip::compressor::v3::Gzip;
use serin_xds::pb::envoy::extensions::compression::zstd::compressor::v3::Zstd;
use serin_xds::pb::envoy::extensions::filters::http::compressor::v3 as compressor;

use super::*;

fn filter(name: &str, library: google::Any) -> hcm::HttpFilter {
    http_filter(
        name,
        Some(any(&compressor::Compressor {
            compressor_library: Some(core::TypedExtensionConfig {
                name: "library".into(),
                typed_config: Some(library),
            }),
            ..Default::default()
        })),
    )
}

/// The response's fields and its decoded body.
async fn fetch(at: SocketAddr, path: &str, accepted: &str) -> (HeaderMap, Vec<u8>) {
    let stream = tokio::net::TcpStream::connect(at).await.unwrap();
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(hyper_util::rt::TokioIo::new(stream))
            .await
            .unwrap();
    let task = tokio::spawn(connection);
    let request = http::Request::get(path)
        .header("host", "a")
        .header("accept-encoding", accepted)
        .body(Full::<bytes::Bytes>::from(""))
        .unwrap();
    let response = soon("a response", sender.send_request(request)).await.unwrap();
    let (head, body) = response.into_parts();
    let body = soon("a body", http_body_util::BodyExt::collect(body))
        .await
        .unwrap()
        .to_bytes();
    task.abort();
    let mut decoded = Vec::new();
    match head
        .headers
        .get("content-encoding")
        .map(|value| value.to_str().unwrap())
    {
        Some("gzip") => flate2::read::GzDecoder::new(&body[..])
            .read_to_end(&mut decoded)
            .unwrap(),
        Some("br") => brotli::Decompressor::new(&body[..], 4096)
            .read_to_end(&mut decoded)
            .unwrap(),
        Some("zstd") => zstd::stream::read::Decoder::new(&body[..])
            .unwrap()
            .read_to_end(&mut decoded)
            .unwrap(),
        _ => body.as_ref().read_to_end(&mut decoded).unwrap(),
    };
    (head.headers, decoded)
}

#[tokio::test]
async fn a_response_is_encoded_as_the_client_wants_it_most() {
    let filters = vec![
        filter("gzip", any(&Gzip::default())),
        filter("br", any(&Brotli::default())),
        filter("zstd", any(&Zstd::default())),
    ];
    let harness = Harness::start();
    let long = "serin ".repeat(10_000);
    let answer = long.clone();
    let backend = Backend::answering(move |seen| {
        let body = if seen.path == "/short" {
            "tiny".to_owned()
        } else {
            answer.clone()
        };
        let mut response = Response::new(Full::from(body));
        response
            .headers_mut()
            .insert("content-type", "text/plain".parse().unwrap());
        response.headers_mut().insert("etag", "\"e\"".parse().unwrap());
        response
    })
    .await;
    harness.cluster("c", &[backend.address]).await;
    harness.routes(to_c()).await;
    let at = harness
        .listen(&manager_with(filters), core::TrafficDirection::Outbound)
        .await;
    for (accepted, expected) in [
        ("gzip", Some("gzip")),
        ("gzip, br, zstd", Some("gzip")),
        ("gzip;q=0.5, br;q=0.7, zstd;q=0.6", Some("br")),
        ("zstd", Some("zstd")),
        ("deflate", None),
    ] {
        let (headers, body) = fetch(at, "/", accepted).await;
        let given = headers
            .get("content-encoding")
            .map(|value| value.to_str().unwrap());
        assert_eq!(given, expected, "{accepted}");
        assert_eq!(body, long.as_bytes(), "{accepted}");
        assert_eq!(headers["vary"], "Accept-Encoding", "{accepted}");
        assert_eq!(headers.contains_key("etag"), expected.is_none(), "{accepted}");
    }
    let (headers, body) = fetch(at, "/short", "gzip").await;
    assert!(!headers.contains_key("content-encoding"));
    assert_eq!(body, b"tiny");
}
