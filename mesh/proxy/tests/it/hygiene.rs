//! Attacks on the protocol, as bytes. Each is answered as the behaviour table says and reaches no backend.

use http::{HeaderValue, Request};
use http_body_util::Full;
use serin_xds::ResourceType;
use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::envoy::config::core::v3::http_protocol_options::HeadersWithUnderscoresAction;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::fixture::*;

async fn setup() -> (Harness, Backend, std::net::SocketAddr) {
    let harness = Harness::start();
    let backend = Backend::named("b").await;
    harness.cluster("c", &[backend.address]).await;
    let at = harness.serve(vec![prefix_route("/", to_cluster("c"))]).await;
    (harness, backend, at)
}

#[tokio::test]
async fn ambiguous_requests_are_refused_and_never_forwarded() {
    let (mut harness, backend, at) = setup().await;
    let cases: &[(&str, &str, u16, &str)] = &[
        (
            "cl_te",
            "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nG",
            400,
            "http1.content_length_and_chunked_not_allowed",
        ),
        (
            "te_cl",
            "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n0\r\n\r\n",
            400,
            "http1.content_length_and_chunked_not_allowed",
        ),
        (
            "two_lengths_same",
            "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nContent-Length: 3\r\n\r\nabc",
            400,
            "http1.several_content_lengths",
        ),
        (
            "length_list",
            "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3, 3\r\n\r\nabc",
            400,
            "http1.invalid_content_length",
        ),
        (
            "te_unknown",
            "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: xchunked\r\n\r\n",
            501,
            "http1.invalid_transfer_encoding",
        ),
        (
            "te_gzip_chunked",
            "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
            501,
            "http1.invalid_transfer_encoding",
        ),
        (
            "te_twice",
            "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n",
            400,
            "http1.transfer_encoding_not_allowed",
        ),
        (
            "te_http10",
            "POST / HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n",
            400,
            "http1.transfer_encoding_not_allowed",
        ),
        (
            "space_before_colon",
            "GET / HTTP/1.1\r\nHost : a\r\n\r\n",
            400,
            "http1.invalid_header_line",
        ),
        (
            "obs_fold",
            "GET / HTTP/1.1\r\nHost: a\r\nX: 1\r\n 2\r\n\r\n",
            400,
            "http1.obs_fold",
        ),
        (
            "bare_lf",
            "GET / HTTP/1.1\nHost: a\n\n",
            400,
            "http1.bare_line_feed",
        ),
        (
            "bare_cr",
            "GET / HTTP/1.1\r\nHost: a\r\nX: a\rb\r\n\r\n",
            400,
            "http1.invalid_header_line",
        ),
        (
            "two_hosts",
            "GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
            400,
            "http1.several_hosts",
        ),
        (
            "no_host",
            "GET / HTTP/1.1\r\nX: 1\r\n\r\n",
            400,
            "missing_host_header",
        ),
        (
            "bad_host",
            "GET / HTTP/1.1\r\nHost: a/b\r\n\r\n",
            400,
            "http1.invalid_host",
        ),
        (
            "version_1_2",
            "GET / HTTP/1.2\r\nHost: a\r\n\r\n",
            505,
            "http1.unsupported_version",
        ),
        (
            "connect",
            "CONNECT a:1 HTTP/1.1\r\nHost: a:1\r\n\r\n",
            405,
            "http1.connect_not_allowed",
        ),
        (
            "path_above_root",
            "GET /a/../../etc HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
            400,
            "path_normalization_failed",
        ),
    ];
    for (name, bytes, code, details) in cases {
        let answer = raw(at, bytes.as_bytes()).await;
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {code} ")),
            "{name}: {answer}"
        );
        let line = harness.line().await;
        assert_eq!(line["response_code_details"], *details, "{name}");
        let flags = if line["response_code_details"] == "path_normalization_failed" {
            "-"
        } else {
            "DPE"
        };
        assert_eq!(line["response_flags"], flags, "{name}");
    }
    assert_eq!(backend.hits(), 0);
    let many = "x: 1\r\n".repeat(101);
    let answer = raw(at, format!("GET / HTTP/1.1\r\nHost: a\r\n{many}\r\n").as_bytes()).await;
    assert!(answer.starts_with("HTTP/1.1 431 "), "{answer}");
    let long = "x".repeat(70_000);
    let answer = raw(
        at,
        format!("GET / HTTP/1.1\r\nHost: a\r\nX: {long}\r\n\r\n").as_bytes(),
    )
    .await;
    assert!(answer.starts_with("HTTP/1.1 431 "), "{answer}");
    assert_eq!(backend.hits(), 0);
}

#[tokio::test]
async fn a_bad_request_behind_a_good_one_is_answered_in_its_turn() {
    let (_harness, backend, at) = setup().await;
    let answer = raw(
        at,
        b"GET /1 HTTP/1.1\r\nHost: a\r\n\r\nPOST /2 HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
    )
    .await;
    let (ok, bad) = (answer.find("HTTP/1.1 200 "), answer.find("HTTP/1.1 400 "));
    assert!(ok.is_some() && ok < bad, "{answer}");
    assert_eq!(backend.hits(), 1);
}

#[tokio::test]
async fn loose_chunks_break_the_request_off() {
    let (_harness, _backend, at) = setup().await;
    let head = "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n";
    for body in [
        "5\nhello\r\n0\r\n\r\n",
        "5\r\nhello\n0\r\n\r\n",
        "5\r\nhelloX\r\n0\r\n\r\n",
    ] {
        let answer = raw(at, format!("{head}{body}").as_bytes()).await;
        assert!(!answer.contains(" 200 "), "{body:?}: {answer}");
    }
}

#[tokio::test]
async fn an_absolute_target_wins_over_host_and_is_made_origin_form() {
    let (_harness, mut backend, at) = setup().await;
    let answer = raw(
        at,
        b"GET http://inner:81/p?q HTTP/1.1\r\nHost: outer\r\nConnection: close\r\n\r\n",
    )
    .await;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    let seen = backend.next().await;
    assert_eq!(
        (seen.path.as_str(), seen.headers["host"].to_str().unwrap()),
        ("/p?q", "inner:81")
    );
}

#[tokio::test]
async fn trailers_that_would_change_the_framing_are_not_forwarded() {
    let (_harness, mut backend, at) = setup().await;
    let answer = raw(
        at,
        b"POST / HTTP/1.1\r\nHost: a\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n3;ext=1\r\nabc\r\n0\r\nContent-Length: 99\r\n\r\n",
    )
    .await;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    assert_eq!(&backend.next().await.body[..], b"abc");
}

#[tokio::test]
async fn http2_with_differing_host_and_authority_is_refused() {
    let (_harness, backend, at) = setup().await;
    let mut client = h2_client(at).await;
    let request = Request::get("http://one/")
        .header("host", "two")
        .body(Full::from(""))
        .unwrap();
    let response = soon("a response", client.send_request(request)).await.unwrap();
    assert_eq!(response.status(), 400);
    assert_eq!(backend.hits(), 0);
}

/// A listener before a backend that does this about underscores in names.
async fn with_underscores(action: HeadersWithUnderscoresAction) -> (Harness, Backend, std::net::SocketAddr) {
    let (harness, backend, _) = setup().await;
    let mut manager = manager("80");
    manager.common_http_protocol_options = Some(core::HttpProtocolOptions {
        headers_with_underscores_action: action as i32,
        ..Default::default()
    });
    harness.remove(ResourceType::Listener, "l").await;
    let at = harness.listen(&manager, core::TrafficDirection::Outbound).await;
    (harness, backend, at)
}

#[tokio::test]
async fn names_with_underscores_are_kept_refused_or_taken_off_as_the_listener_says() {
    const REQUEST: &[u8] = b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\nx-a: 1\r\nx_a: 2\r\n\r\n";
    let over_http2 = async |at| {
        let mut client = h2_client(at).await;
        let request = Request::get("http://a/")
            .header("x_a", "2")
            .body(Full::from(""))
            .unwrap();
        let response = soon("a response", client.send_request(request)).await.unwrap();
        response.status()
    };

    let (_harness, mut backend, at) = with_underscores(HeadersWithUnderscoresAction::Allow).await;
    assert!(raw(at, REQUEST).await.starts_with("HTTP/1.1 200"));
    assert_eq!(backend.next().await.headers["x_a"], "2");
    assert_eq!(over_http2(at).await, 200);
    assert_eq!(backend.next().await.headers["x_a"], "2");

    let (_harness, mut backend, at) = with_underscores(HeadersWithUnderscoresAction::DropHeader).await;
    assert!(raw(at, REQUEST).await.starts_with("HTTP/1.1 200"));
    let seen = backend.next().await.headers;
    assert_eq!(
        (seen.get("x_a"), &seen["x-a"]),
        (None, &HeaderValue::from_static("1"))
    );
    assert_eq!(over_http2(at).await, 200);
    assert_eq!(backend.next().await.headers.get("x_a"), None);

    let (mut harness, backend, at) = with_underscores(HeadersWithUnderscoresAction::RejectRequest).await;
    assert!(raw(at, REQUEST).await.starts_with("HTTP/1.1 400"));
    let line = harness.line().await;
    assert_eq!(line["response_code_details"], "http1.unexpected_underscore");
    assert_eq!(line["response_flags"], "DPE");
    assert_eq!(over_http2(at).await, 400);
    let line = harness.line().await;
    assert_eq!(line["response_code_details"], "http2.unexpected_underscore");
    assert_eq!(backend.hits(), 0, "nothing was forwarded");
}

#[tokio::test]
async fn an_upgrade_that_is_not_allowed_is_refused() {
    let (_harness, backend, at) = setup().await;
    let answer = raw(
        at,
        b"GET / HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: foo\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
    )
    .await;
    assert!(answer.starts_with("HTTP/1.1 403"), "{answer}");
    assert!(
        answer.contains("HTTP/1.1 200"),
        "the next request is served: {answer}"
    );
    assert_eq!(backend.hits(), 1);
}

#[tokio::test]
async fn a_head_that_comes_byte_by_byte_is_served() {
    let (_harness, _backend, at) = setup().await;
    let mut stream = TcpStream::connect(at).await.unwrap();
    stream.set_nodelay(true).unwrap();
    for byte in b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n" {
        stream.write_all(&[*byte]).await.unwrap();
        tokio::task::yield_now().await;
    }
    let mut answer = String::new();
    soon("an answer", stream.read_to_string(&mut answer))
        .await
        .unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
}
