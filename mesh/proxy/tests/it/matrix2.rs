//! The behaviour table's HTTP/2 counterpart, and floods: raw frames against the real listener.

use std::net::SocketAddr;

use http::Response;
use http_body_util::Full;

use crate::fixture::*;
use crate::frames::*;

async fn setup() -> (Harness, Backend, SocketAddr) {
    let harness = Harness::start();
    let backend = Backend::named("b").await;
    harness.cluster("c", &[backend.address]).await;
    let at = harness.serve(vec![prefix_route("/", to_cluster("c"))]).await;
    (harness, backend, at)
}

/// Sends one request head (and nothing else); what became of it.
async fn fate_of(at: SocketAddr, block: &[u8]) -> Fate {
    let mut client = RawClient::connect(at, &[]).await;
    client.get(1, block).await;
    client.fate(1).await
}

#[tokio::test]
async fn malformed_http2_requests_are_refused_and_never_forwarded() {
    let (_harness, backend, at) = setup().await;
    let with = |more: &[(&str, &str)]| request("GET", "/", more);
    let pseudo = |fields: &[(&str, &str)]| block(fields);
    let many: Vec<_> = (0..101).map(|_| ("x", "1")).collect();
    let large = "x".repeat(15_000);
    let large: Vec<_> = ["a", "b", "c", "d", "e"].map(|name| (name, large.as_str())).to_vec();
    let attacks: Vec<(&str, Vec<u8>)> = vec![
        ("upper case in a name", with(&[("X-Upper", "1")])),
        ("CR in a value", with(&[("x", "a\rb")])),
        ("LF in a value", with(&[("x", "a\nb")])),
        ("CRLF that would be a second request", with(&[("x", "a\r\n\r\nGET /evil HTTP/1.1\r\nhost: a\r\n\r\n")])),
        ("NUL in a value", with(&[("x", "a\0b")])),
        ("control character in a value", with(&[("x", "a\x01b")])),
        ("colon in a name", with(&[("x:y", "1")])),
        ("space in a name", with(&[("x y", "1")])),
        ("CRLF in a name", with(&[("x\r\ny", "1")])),
        ("empty name", with(&[("", "1")])),
        ("unknown pseudo field", with(&[(":evil", "1")])),
        ("pseudo field of a response", with(&[(":status", "200")])),
        (
            "pseudo field after a regular one",
            pseudo(&[(":method", "GET"), (":scheme", "http"), ("x", "1"), (":authority", "a"), (":path", "/")]),
        ),
        (
            "two paths",
            pseudo(&[(":method", "GET"), (":scheme", "http"), (":authority", "a"), (":path", "/"), (":path", "/b")]),
        ),
        (
            "two authorities",
            pseudo(&[
                (":method", "GET"),
                (":scheme", "http"),
                (":authority", "a"),
                (":authority", "b"),
                (":path", "/"),
            ]),
        ),
        (
            "two methods",
            pseudo(&[
                (":method", "GET"),
                (":method", "POST"),
                (":scheme", "http"),
                (":authority", "a"),
                (":path", "/"),
            ]),
        ),
        ("no method", pseudo(&[(":scheme", "http"), (":authority", "a"), (":path", "/")])),
        ("no scheme", pseudo(&[(":method", "GET"), (":authority", "a"), (":path", "/")])),
        ("no path", pseudo(&[(":method", "GET"), (":scheme", "http"), (":authority", "a")])),
        ("no authority and no host", pseudo(&[(":method", "GET"), (":scheme", "http"), (":path", "/")])),
        ("empty path", request("GET", "", &[])),
        ("path without a slash", request("GET", "evil", &[])),
        ("path in absolute form", request("GET", "http://evil/", &[])),
        ("space in the path", request("GET", "/a b", &[])),
        ("CRLF in the path", request("GET", "/ HTTP/1.1\r\nx: y", &[])),
        ("method that is no token", request("G ET", "/", &[])),
        ("CRLF in the method", request("GET / HTTP/1.1\r\nx", "/", &[])),
        ("path above the root", request("GET", "/a/../../etc", &[])),
        ("escaped NUL in the path", request("GET", "/a%00b", &[])),
        ("connection field", with(&[("connection", "close")])),
        ("keep-alive field", with(&[("keep-alive", "timeout=5")])),
        ("proxy-connection field", with(&[("proxy-connection", "close")])),
        ("transfer-encoding field", with(&[("transfer-encoding", "chunked")])),
        ("upgrade field", with(&[("upgrade", "h2c")])),
        ("te other than trailers", with(&[("te", "gzip")])),
        ("host that differs from authority", with(&[("host", "other")])),
        ("content-length with no body", with(&[("content-length", "5")])),
        ("two content-lengths", with(&[("content-length", "0"), ("content-length", "5")])),
        ("content-length with plus", with(&[("content-length", "+0")])),
        ("connect", pseudo(&[(":method", "CONNECT"), (":authority", "a:1")])),
        (
            "extended connect",
            pseudo(&[
                (":method", "CONNECT"),
                (":protocol", "websocket"),
                (":scheme", "http"),
                (":authority", "a"),
                (":path", "/"),
            ]),
        ),
        (
            "userinfo in the authority",
            pseudo(&[(":method", "GET"), (":scheme", "http"), (":authority", "u@a"), (":path", "/")]),
        ),
        (
            "authority with a slash",
            pseudo(&[(":method", "GET"), (":scheme", "http"), (":authority", "a/b"), (":path", "/")]),
        ),
        ("more than 100 fields", with(&many)),
    ];
    for (name, block) in attacks {
        let fate = fate_of(at, &block).await;
        assert!(fate.refused(), "{name}: {fate:?}");
        assert_eq!(backend.hits(), 0, "{name} was forwarded");
    }
    // Larger than a frame, so with CONTINUATION.
    let block = with(&large);
    let mut client = RawClient::connect(at, &[]).await;
    let (first, rest) = block.split_at(16_000);
    client.send(&frame(HEADERS, END_STREAM, 1, first)).await;
    let mut parts = rest.chunks(16_000).peekable();
    while let Some(part) = parts.next() {
        let flags = if parts.peek().is_none() { END_HEADERS } else { 0 };
        client.send(&frame(CONTINUATION, flags, 1, part)).await;
    }
    let fate = client.fate(1).await;
    assert!(fate.refused(), "75 KB of fields: {fate:?}");
    assert_eq!(backend.hits(), 0);
}

#[tokio::test]
async fn an_http2_body_that_is_not_as_long_as_it_says_is_never_a_success() {
    let (_harness, _backend, at) = setup().await;
    for (name, length, parts) in [
        ("shorter", "10", vec!["abc"]),
        ("longer", "2", vec!["abc"]),
        ("longer in the second frame", "4", vec!["abc", "def"]),
    ] {
        let mut client = RawClient::connect(at, &[]).await;
        let head = request("POST", "/", &[("content-length", length)]);
        client.send(&frame(HEADERS, END_HEADERS, 1, &head)).await;
        let last = parts.len() - 1;
        for (index, part) in parts.into_iter().enumerate() {
            let flags = if index == last { END_STREAM } else { 0 };
            client.send(&frame(DATA, flags, 1, part.as_bytes())).await;
        }
        let fate = client.fate(1).await;
        assert!(fate.refused(), "{name}: {fate:?}");
    }
}

#[tokio::test]
async fn pseudo_fields_in_http2_trailers_change_nothing_and_ordinary_trailers_pass() {
    let (_harness, mut backend, at) = setup().await;
    let mut client = RawClient::connect(at, &[]).await;
    client
        .send(&frame(HEADERS, END_HEADERS, 1, &request("POST", "/", &[("te", "trailers")])))
        .await;
    client.send(&frame(DATA, 0, 1, b"abc")).await;
    let trailers = block(&[(":path", "/evil"), ("x", "1")]);
    client
        .send(&frame(HEADERS, END_HEADERS | END_STREAM, 1, &trailers))
        .await;
    // h2 takes pseudo fields off trailers; what matters is that they change nothing.
    if client.fate(1).await == Fate::Status(200) {
        assert_eq!(backend.next().await.path, "/");
    }
    let mut client = RawClient::connect(at, &[]).await;
    client
        .send(&frame(HEADERS, END_HEADERS, 1, &request("POST", "/ok", &[("te", "trailers")])))
        .await;
    client.send(&frame(DATA, 0, 1, b"abc")).await;
    client
        .send(&frame(HEADERS, END_HEADERS | END_STREAM, 1, &block(&[("x-sum", "1")])))
        .await;
    assert_eq!(client.fate(1).await, Fate::Status(200));
    loop {
        let seen = backend.next().await;
        if seen.path == "/ok" {
            assert_eq!(seen.headers["te"], "trailers");
            assert_eq!(&seen.body[..], b"abc");
            break;
        }
    }
}

#[tokio::test]
async fn a_path_is_normalised_before_routing_in_http2_as_well() {
    use serin_xds::pb::envoy::config::route::v3 as route;
    let (harness, backend, at) = setup().await;
    let forbidden = route::Route {
        action: Some(route::route::Action::DirectResponse(route::DirectResponseAction {
            status: 403,
            ..Default::default()
        })),
        ..prefix_route("/admin", to_cluster("c"))
    };
    harness
        .routes(vec![host("all", "*", vec![forbidden, prefix_route("/", to_cluster("c"))])])
        .await;
    for path in ["/x/../admin", "/%2e/admin", "/x/%2E%2E/admin/y"] {
        assert_eq!(fate_of(at, &request("GET", path, &[])).await, Fate::Status(403), "{path}");
    }
    assert_eq!(backend.hits(), 0);
}

/// The connection survives nothing, the proxy everything.
async fn still_serves(at: SocketAddr) {
    let (status, _, body) = get(at, "/").await;
    assert_eq!((status, &*body), (200, "b"));
}

#[tokio::test]
async fn rapid_reset_ends_the_connection_and_costs_the_backend_little() {
    let (_harness, backend, at) = setup().await;
    let mut client = RawClient::connect(at, &[]).await;
    let mut attack = Vec::new();
    for index in 0..3_000u32 {
        let stream = index * 2 + 1;
        attack.extend(frame(
            HEADERS,
            END_HEADERS | END_STREAM,
            stream,
            &request("GET", "/", &[]),
        ));
        attack.extend(frame(RST_STREAM, 0, stream, &8u32.to_be_bytes()));
    }
    client.try_send(&attack).await;
    let end = client.end().await;
    assert!(matches!(end, Some(11) | None), "ENHANCE_YOUR_CALM or gone: {end:?}");
    assert!(backend.hits() < 1_000, "{} of 3,000 reached the backend", backend.hits());
    still_serves(at).await;
}

#[tokio::test]
async fn made_you_reset_ends_the_connection() {
    let (_harness, _backend, at) = setup().await;
    let mut client = RawClient::connect(at, &[]).await;
    let mut sent = true;
    for index in 0..4_000u32 {
        let stream = index * 2 + 1;
        let mut attack = frame(
            HEADERS,
            END_HEADERS | END_STREAM,
            stream,
            &request("GET", "/", &[]),
        );
        // A window update of nothing makes the server reset the stream (CVE-2025-8671).
        attack.extend(frame(WINDOW_UPDATE, 0, stream, &0u32.to_be_bytes()));
        sent = client.try_send(&attack).await;
        if !sent {
            break;
        }
    }
    let end = client.end().await;
    assert!(!sent || end.is_some_and(|code| code != 0), "{sent} {end:?}");
    still_serves(at).await;
}

#[tokio::test]
async fn a_continuation_flood_ends_the_connection() {
    let (_harness, backend, at) = setup().await;
    for size in [0usize, 1, 4_000] {
        let mut client = RawClient::connect(at, &[]).await;
        client.send(&frame(HEADERS, END_STREAM, 1, &request("GET", "/", &[]))).await;
        let mut part = Vec::new();
        if size > 0 {
            literal(&mut part, b"x", &vec![b'y'; size]);
        }
        let flood = frame(CONTINUATION, 0, 1, &part).repeat(100);
        let mut frames = 0;
        while frames < 20_000 && client.try_send(&flood).await {
            frames += 100;
        }
        let end = client.end().await;
        assert!(end != Some(0), "{size}: {end:?}");
    }
    assert_eq!(backend.hits(), 0);
    still_serves(at).await;
}

#[tokio::test]
async fn an_hpack_bomb_is_refused() {
    let (_harness, backend, at) = setup().await;
    let mut client = RawClient::connect(at, &[]).await;
    let mut bomb = request("GET", "/", &[]);
    // 3,900 bytes into the dynamic table, then 15,000 references of one byte each: 58 MB if anyone expands them.
    indexed_literal(&mut bomb, b"x", &[b'y'; 3_900]);
    bomb.extend([0xbe].repeat(15_000 - bomb.len()));
    client.get(1, &bomb).await;
    let fate = client.fate(1).await;
    assert!(fate.refused(), "{fate:?}");
    assert_eq!(backend.hits(), 0);
    still_serves(at).await;
}

#[tokio::test]
async fn a_dynamic_table_may_not_grow_beyond_its_limit() {
    let (_harness, backend, at) = setup().await;
    // Size update to 1 MiB; the server allows 4,096.
    let mut block = vec![0x3f, 0xe1, 0xff, 0x3f];
    block.extend(request("GET", "/", &[]));
    let fate = fate_of(at, &block).await;
    assert!(matches!(fate, Fate::Goaway(1 | 9) | Fate::Closed), "{fate:?}");
    assert_eq!(backend.hits(), 0);
}

#[tokio::test]
async fn floods_of_small_frames_do_not_keep_others_from_being_served() {
    let (_harness, _backend, at) = setup().await;
    let open = frame(HEADERS, END_HEADERS, 1, &request("POST", "/", &[]));
    let floods: Vec<(&str, Vec<u8>)> = vec![
        ("PING", frame(PING, 0, 0, &[0; 8])),
        ("SETTINGS", frame(SETTINGS, 0, 0, &[0, 4, 0, 1, 0, 0])),
        ("empty SETTINGS", frame(SETTINGS, 0, 0, &[])),
        ("PRIORITY", frame(PRIORITY, 0, 3, &[0, 0, 0, 0, 1])),
        ("WINDOW_UPDATE", frame(WINDOW_UPDATE, 0, 0, &1u32.to_be_bytes())),
        ("empty DATA", frame(DATA, 0, 1, &[])),
        ("unknown frames", frame(0xfa, 0, 0, &[0; 8])),
    ];
    for (name, one) in floods {
        let mut client = RawClient::connect(at, &[]).await;
        client.send(&open).await;
        // Nothing is read: answers to the flood pile up, at the proxy for as long as it lets them.
        let flood = one.repeat(1_000);
        for _ in 0..30 {
            let written = tokio::time::timeout(std::time::Duration::from_millis(500), client.try_send(&flood));
            if !written.await.is_ok_and(|written| written) {
                break;
            }
        }
        eprintln!("flood of {name}");
        still_serves(at).await;
        drop(client);
        still_serves(at).await;
    }
}

#[tokio::test]
async fn a_client_that_opens_no_window_makes_the_proxy_hold_little() {
    let harness = Harness::start();
    let body = bytes::Bytes::from(vec![b'x'; 1 << 20]);
    let backend = Backend::answering(move |_| Response::new(Full::from(body.clone()))).await;
    harness.cluster("c", &[backend.address]).await;
    let at = harness.serve(vec![prefix_route("/", to_cluster("c"))]).await;
    // SETTINGS_INITIAL_WINDOW_SIZE 0.
    let mut client = RawClient::connect(at, &[0, 4, 0, 0, 0, 0]).await;
    let before = resident();
    for index in 0..100u32 {
        client.get(index * 2 + 1, &request("GET", "/", &[])).await;
    }
    let mut heads = 0;
    while heads < 100 {
        let frame = client.next().await.expect("the connection lives");
        assert_ne!(frame.kind, DATA, "no window, no data");
        heads += usize::from(frame.kind == HEADERS);
    }
    // 100 responses of 1 MiB wait at their backend, which lives in this process too and holds one body for all.
    let grown = resident().saturating_sub(before);
    assert!(grown < 64 << 20, "{} MiB", grown >> 20);
}

/// Resident memory of this process, bytes.
fn resident() -> usize {
    let text = std::fs::read_to_string("/proc/self/statm").unwrap();
    text.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
}

#[tokio::test]
async fn streams_beyond_the_limit_are_refused_and_those_within_answered() {
    let (_harness, _backend, at) = setup().await;
    let mut client = RawClient::connect(at, &[]).await;
    let mut limit = None;
    while limit.is_none() {
        let frame = client.next().await.expect("SETTINGS");
        if frame.kind == SETTINGS && frame.flags & ACK == 0 {
            let found = frame.payload.chunks(6).find(|entry| entry[..2] == [0, 3]);
            limit = found.map(|entry| u32::from_be_bytes([entry[2], entry[3], entry[4], entry[5]]));
        }
    }
    let limit = limit.unwrap();
    assert!(limit <= 100, "{limit}");
    for index in 0..=limit {
        client
            .send(&frame(HEADERS, END_HEADERS, index * 2 + 1, &request("POST", "/", &[])))
            .await;
    }
    assert_eq!(client.fate(limit * 2 + 1).await, Fate::Reset(7), "REFUSED_STREAM");
    client.send(&frame(DATA, END_STREAM, 1, b"x")).await;
    assert_eq!(client.fate(1).await, Fate::Status(200));
}

#[tokio::test]
async fn a_second_head_that_is_not_trailers_ends_the_stream_only() {
    let (_harness, _backend, at) = setup().await;
    let mut client = RawClient::connect(at, &[]).await;
    let head = request("POST", "/", &[]);
    client.send(&frame(HEADERS, END_HEADERS, 1, &head)).await;
    client.send(&frame(HEADERS, END_HEADERS, 1, &head)).await;
    assert!(client.fate(1).await.refused());
    still_serves(at).await;
}
