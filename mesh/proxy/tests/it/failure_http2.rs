//! HTTP/2 endpoints and clients that misbehave, frame by frame: the counterpart of [`crate::failure`]. What the user sees
//! (status, flag, details), and that no connection, task or permit is left behind.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use http::Request;
use http_body_util::Full;
use parking_lot::Mutex;
use serin_xds::pb::envoy::config::route::v3 as route;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;

use crate::failure::{CLOSED, GONE, counted_cluster, nothing_is_left, told};
use crate::fixture::*;
use crate::frames::{
    DATA, END_HEADERS, END_STREAM, Frame, GOAWAY, HEADERS, PREFACE, RST_STREAM, RawClient, SETTINGS, block,
    frame, request,
};

const NO_ERROR: u32 = 0;
const CANCEL: u32 = 8;
const REFUSED_STREAM: u32 = 7;

/// An endpoint whose connections the test drives, in the order in which they come.
struct Endpoint {
    at: SocketAddr,
    connections: mpsc::UnboundedReceiver<RawClient>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Endpoint {
    async fn start() -> Self {
        let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = socket.local_addr().unwrap();
        let (sender, connections) = mpsc::unbounded_channel();
        let task = tokio::spawn(async move {
            while let Ok((stream, _)) = socket.accept().await {
                if let Ok(connection) = RawClient::accepted(stream, &[]).await
                    && sender.send(connection).is_err()
                {
                    return;
                }
            }
        });
        Self {
            at,
            connections,
            task,
        }
    }

    async fn connection(&mut self) -> RawClient {
        soon("a connection to the endpoint", self.connections.recv())
            .await
            .unwrap()
    }
}

/// An endpoint that does the same to every connection.
async fn each<F>(play: impl Fn(RawClient) -> F + Clone + Send + 'static) -> Endpoint
where
    F: Future<Output = ()> + Send + 'static,
{
    let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = socket.local_addr().unwrap();
    let task = tokio::spawn(async move {
        let mut running = tokio::task::JoinSet::new();
        while let Ok((stream, _)) = socket.accept().await {
            let play = play.clone();
            running.spawn(async move {
                if let Ok(connection) = RawClient::accepted(stream, &[]).await {
                    play(connection).await;
                }
            });
        }
    });
    Endpoint {
        at,
        connections: mpsc::unbounded_channel().1,
        task,
    }
}

/// The next request's stream, and whether it is whole.
async fn asked(connection: &mut RawClient) -> Option<(u32, bool)> {
    loop {
        let frame = connection.listen().await?;
        if frame.kind == HEADERS {
            return Some((frame.stream, frame.flags & END_STREAM != 0));
        }
    }
}

/// Waits for a frame of this kind on this stream.
async fn heard(connection: &mut RawClient, kind: u8, stream: u32) -> Frame {
    soon("a frame", async {
        loop {
            let frame = connection.listen().await.expect("the connection lives");
            if frame.kind == kind && frame.stream == stream {
                return frame;
            }
        }
    })
    .await
}

fn head(stream: u32, status: &str, end: bool) -> Vec<u8> {
    let flags = END_HEADERS | if end { END_STREAM } else { 0 };
    frame(HEADERS, flags, stream, &block(&[(":status", status)]))
}

fn whole(stream: u32, text: &str) -> Vec<u8> {
    [
        head(stream, "200", false),
        frame(DATA, END_STREAM, stream, text.as_bytes()),
    ]
    .concat()
}

fn reset(stream: u32, code: u32) -> Vec<u8> {
    frame(RST_STREAM, 0, stream, &code.to_be_bytes())
}

fn goaway(last: u32, code: u32) -> Vec<u8> {
    frame(GOAWAY, 0, 0, &[last.to_be_bytes(), code.to_be_bytes()].concat())
}

async fn setup(endpoint: SocketAddr, action: route::RouteAction) -> (Harness, SocketAddr) {
    let harness = Harness::start();
    let at = harness
        .serve_cluster(&speaking_h2(counted_cluster("c")), &[endpoint], action)
        .await;
    (harness, at)
}

fn flags(headers: &http::HeaderMap) -> &str {
    headers
        .get("x-serin-response-flags")
        .map_or("-", |value| value.to_str().unwrap())
}

fn post(path: &str, body: &'static str) -> Request<Full<Bytes>> {
    Request::post(path)
        .header("host", "a")
        .body(Full::from(body))
        .unwrap()
}

#[tokio::test]
async fn an_http2_endpoint_that_answers_before_it_has_the_body_is_heard_and_the_rest_is_not_waited_for() {
    // It may say that it needs no more (RFC 9113 section 8.1), or leave that to the other side.
    for says_so in [true, false] {
        let mut endpoint = Endpoint::start().await;
        let (harness, at) = setup(endpoint.at, to_cluster("c")).await;
        let mut client = TcpStream::connect(at).await.unwrap();
        client
            .write_all(b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 1000000\r\n\r\nbegin")
            .await
            .unwrap();
        let mut connection = endpoint.connection().await;
        let (stream, is_whole) = soon("the request", asked(&mut connection)).await.unwrap();
        assert!(!is_whole);
        connection.send(&head(stream, "413", true)).await;
        if says_so {
            connection.send(&reset(stream, NO_ERROR)).await;
        }
        let mut answer = [0u8; 12];
        soon("the early answer", client.read_exact(&mut answer))
            .await
            .unwrap();
        assert_eq!(&answer, b"HTTP/1.1 413");
        drop(client);
        if !says_so {
            // The stream does not stay half open on the connection that others use.
            heard(&mut connection, RST_STREAM, stream).await;
        }
        drop(connection);
        drop(endpoint);
        nothing_is_left(&harness).await;
    }
}

#[tokio::test]
async fn an_http2_endpoint_that_never_answers_is_given_up_and_its_connection_goes_on() {
    let mut endpoint = Endpoint::start().await;
    let action = route::RouteAction {
        timeout: millis(150),
        ..to_cluster("c")
    };
    let (mut harness, at) = setup(endpoint.at, action).await;
    let lost = tokio::spawn(async move { get(at, "/lost").await });
    let mut connection = endpoint.connection().await;
    let (stream, _) = soon("the request", asked(&mut connection)).await.unwrap();
    assert_eq!(heard(&mut connection, RST_STREAM, stream).await.code(), CANCEL);
    let (status, headers, _) = soon("the timeout", lost).await.unwrap();
    assert_eq!((status, flags(&headers)), (504, "UT"));
    told(&mut harness, "UT", "response_timeout").await;
    // An answer that comes too late is nobody's.
    connection.send(&whole(stream, "late")).await;
    let next = tokio::spawn(async move { get(at, "/next").await });
    let (stream, _) = soon("the next request", asked(&mut connection)).await.unwrap();
    connection.send(&whole(stream, "next")).await;
    let (status, _, body) = soon("the answer", next).await.unwrap();
    assert_eq!((status, &*body), (200, "next"));
    drop(connection);
    drop(endpoint);
    nothing_is_left(&harness).await;
}

#[tokio::test]
async fn an_endpoint_that_should_speak_http2_and_says_nothing_is_given_up_after_the_route_timeout() {
    let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let action = route::RouteAction {
        timeout: millis(150),
        ..to_cluster("c")
    };
    let (mut harness, at) = setup(socket.local_addr().unwrap(), action).await;
    let (status, headers, _) = get(at, "/").await;
    assert_eq!((status, flags(&headers)), (504, "UT"));
    told(&mut harness, "UT", "response_timeout").await;
    drop(socket);
    harness.endpoints("c", &[]).await;
    nothing_is_left(&harness).await;
}

#[tokio::test]
async fn a_second_http2_answer_that_nobody_asked_for_reaches_nobody() {
    for evil in ["after the end", "instead of trailers", "on a stream of nobody"] {
        let endpoint = each(move |mut connection| async move {
            while let Some((stream, _)) = asked(&mut connection).await {
                let second = |stream| {
                    [
                        head(stream, "200", false),
                        frame(DATA, END_STREAM, stream, b"evil"),
                    ]
                    .concat()
                };
                let answer = match evil {
                    "after the end" => [whole(stream, "good"), second(stream)].concat(),
                    "instead of trailers" => [
                        head(stream, "200", false),
                        frame(DATA, 0, stream, b"good"),
                        second(stream),
                    ]
                    .concat(),
                    _ => [whole(stream, "good"), second(stream + 2)].concat(),
                };
                connection.send(&answer).await;
            }
        })
        .await;
        let (harness, at) = setup(endpoint.at, to_cluster("c")).await;
        let mut good = 0;
        for _ in 0..20 {
            let bytes = raw_until_close(at).await;
            assert!(!bytes.contains("evil"), "{evil}: {bytes}");
            good += usize::from(bytes.starts_with("HTTP/1.1 200 ") && bytes.contains("good"));
        }
        if evil == "after the end" || evil == "on a stream of nobody" {
            assert!(good >= 10, "{evil}: {good} of 20 answers arrived");
        }
        drop(endpoint);
        nothing_is_left(&harness).await;
    }
}

/// A request in a connection of its own, and what comes back, whole or not.
async fn raw_until_close(at: SocketAddr) -> String {
    let mut client = TcpStream::connect(at).await.unwrap();
    client
        .write_all(b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
        .await
        .unwrap();
    let mut bytes = Vec::new();
    let _ = soon("the end of the answer", client.read_to_end(&mut bytes)).await;
    String::from_utf8_lossy(&bytes).into_owned()
}

#[tokio::test]
async fn a_goaway_as_we_write_costs_no_request_that_the_endpoint_did_not_take() {
    // Every second request of a connection comes when the endpoint has just said that it takes no more.
    let taken = Arc::new(AtomicUsize::new(0));
    let counted = taken.clone();
    let endpoint = each(move |mut connection| {
        let counted = counted.clone();
        async move {
            let mut last = 0;
            while let Some((stream, _)) = asked(&mut connection).await {
                if last > 0 {
                    connection.send(&goaway(last, NO_ERROR)).await;
                    return;
                }
                last = stream;
                counted.fetch_add(1, Ordering::SeqCst);
                connection.send(&whole(stream, "ok")).await;
            }
        }
    })
    .await;
    // What has content is kept for a second time where the route retries.
    let retrying = route::RouteAction {
        retry_policy: istio_retries(),
        ..to_cluster("c")
    };
    let (harness, at) = setup(endpoint.at, to_cluster("c")).await;
    harness
        .routes(vec![host(
            "all",
            "*",
            vec![
                prefix_route("/retry", retrying),
                prefix_route("/", to_cluster("c")),
            ],
        )])
        .await;
    let mut sent = 0;
    for (method, path, body) in [
        ("GET", "/", ""),
        ("POST", "/", ""),
        ("DELETE", "/", ""),
        ("POST", "/retry", "body"),
    ] {
        for number in 0..10 {
            let request = Request::builder()
                .method(method)
                .uri(path)
                .header("host", "a")
                .body(Full::from(body))
                .unwrap();
            let (status, _, body) = send(at, request).await;
            assert_eq!((status, &*body), (200, "ok"), "{method} {path} {number}");
            sent += 1;
        }
    }
    assert_eq!(taken.load(Ordering::SeqCst), sent, "each was acted on once");
    drop(endpoint);
    nothing_is_left(&harness).await;
}

#[tokio::test]
async fn a_stream_that_a_goaway_includes_is_answered_and_later_ones_take_another_connection() {
    let mut endpoint = Endpoint::start().await;
    let (harness, at) = setup(endpoint.at, to_cluster("c")).await;
    let first = tokio::spawn(async move { send(at, post("/first", "body")).await });
    let mut leaving = endpoint.connection().await;
    let (stream, _) = soon("the request", asked(&mut leaving)).await.unwrap();
    leaving.send(&goaway(stream, NO_ERROR)).await;
    // What comes now may have been on its way, and then is not taken; it must be answered all the same.
    let second = tokio::spawn(async move { get(at, "/second").await });
    let mut fresh = endpoint.connection().await;
    let (other, _) = soon("the second request", asked(&mut fresh)).await.unwrap();
    fresh.send(&whole(other, "second")).await;
    let (status, _, body) = soon("the second answer", second).await.unwrap();
    assert_eq!((status, &*body), (200, "second"));
    leaving.send(&whole(stream, "first")).await;
    let (status, _, body) = soon("the first answer", first).await.unwrap();
    assert_eq!((status, &*body), (200, "first"));
    drop((leaving, fresh, endpoint));
    nothing_is_left(&harness).await;
}

#[tokio::test]
async fn http2_connections_that_the_endpoint_closes_as_we_write_cost_no_idempotent_request() {
    let endpoint = each(|mut connection| async move {
        let mut requests = 0;
        while let Some((stream, _)) = asked(&mut connection).await {
            requests += 1;
            if requests == 2 {
                return;
            }
            connection.send(&whole(stream, "ok")).await;
        }
    })
    .await;
    let (mut harness, at) = setup(endpoint.at, to_cluster("c")).await;
    for method in ["GET", "PUT", "DELETE"] {
        for number in 0..20 {
            let request = Request::builder()
                .method(method)
                .uri("/")
                .header("host", "a")
                .body(Full::from(""))
                .unwrap();
            let (status, _, body) = send(at, request).await;
            assert_eq!((status, &*body), (200, "ok"), "{method} {number}");
        }
    }
    // One that may have been acted on is not sent twice.
    let answers = [send(at, post("/", "x")).await, send(at, post("/", "x")).await];
    assert!(
        answers
            .iter()
            .any(|(status, headers, _)| (*status, flags(headers)) == (503, "UC")),
        "{answers:?}"
    );
    told(&mut harness, "UC", CLOSED).await;
    drop(endpoint);
    nothing_is_left(&harness).await;
}

#[tokio::test]
async fn a_stream_that_the_endpoint_resets_with_any_code_at_any_time_is_an_error_and_not_the_connections_end()
{
    let to_do = Arc::new(Mutex::new((NO_ERROR, "behind")));
    let connections = Arc::new(AtomicUsize::new(0));
    let endpoint = each({
        let (to_do, connections) = (to_do.clone(), connections.clone());
        move |mut connection| {
            connections.fetch_add(1, Ordering::SeqCst);
            let to_do = to_do.clone();
            async move {
                while let Some((stream, _)) = asked(&mut connection).await {
                    let (code, when) = *to_do.lock();
                    let bytes = match when {
                        "before" => reset(stream, code),
                        "within" => [
                            head(stream, "200", false),
                            frame(DATA, 0, stream, b"half"),
                            reset(stream, code),
                        ]
                        .concat(),
                        _ => [whole(stream, "whole"), reset(stream, code)].concat(),
                    };
                    connection.send(&bytes).await;
                }
            }
        }
    })
    .await;
    let (mut harness, at) = setup(endpoint.at, to_cluster("c")).await;
    for code in 0..14 {
        for when in ["before", "within", "behind"] {
            *to_do.lock() = (code, when);
            let what = format!("code {code} {when}");
            let reason = if code == REFUSED_STREAM {
                "remote_refused_stream_reset"
            } else {
                "remote_reset"
            };
            let answer = raw_until_close(at).await;
            match when {
                "before" => {
                    assert!(answer.starts_with("HTTP/1.1 503 "), "{what}: {answer}");
                    let details = format!("upstream_reset_before_response_started{{{reason}}}");
                    told(&mut harness, "UR", &details).await;
                }
                // Said after a whole answer (RFC 9113 section 8.1), and this one has no length that it would lack.
                "within" if code == NO_ERROR => {}
                "within" => {
                    // Chunked towards the client: only the last chunk says that it is whole.
                    assert!(!answer.ends_with("0\r\n\r\n"), "{what}: {answer}");
                    let details = format!("upstream_reset_after_response_started{{{reason}}}");
                    told(&mut harness, "UR", &details).await;
                }
                _ => assert!(answer.contains("whole"), "{what}: {answer}"),
            }
        }
    }
    assert_eq!(connections.load(Ordering::SeqCst), 1, "the connection goes on");
    drop(endpoint);
    nothing_is_left(&harness).await;
}

#[tokio::test]
async fn an_http2_endpoint_that_resets_the_connection_at_any_byte_is_never_taken_for_one_that_answered() {
    let answer: Vec<u8> = [frame(SETTINGS, 1, 0, &[]), whole(1, "hello")].concat();
    let answer_length = answer.len();
    let cut = Arc::new(AtomicUsize::new(0));
    let endpoint = each({
        let cut = cut.clone();
        move |mut connection| {
            let bytes = answer[..cut.load(Ordering::SeqCst)].to_vec();
            async move {
                if asked(&mut connection).await.is_some() {
                    connection.send(&bytes).await;
                    connection.reset();
                }
            }
        }
    })
    .await;
    let (mut harness, at) = setup(endpoint.at, to_cluster("c")).await;
    for count in 0..=answer_length {
        cut.store(count, Ordering::SeqCst);
        let answer = raw_until_close(at).await;
        let is_whole = answer.starts_with("HTTP/1.1 200 ") && answer.ends_with("5\r\nhello\r\n0\r\n\r\n");
        if count < answer_length {
            assert!(!is_whole, "cut at {count}: {answer}");
        }
        if !is_whole {
            // A reset may overtake the bytes before it.
            assert!(
                answer.is_empty()
                    || answer.starts_with("HTTP/1.1 503 ")
                    || answer.starts_with("HTTP/1.1 200 "),
                "cut at {count}: {answer}"
            );
            let line = harness.line().await;
            let details = line["response_code_details"].as_str().unwrap();
            assert_eq!(line["response_flags"], "UC", "cut at {count}: {line}");
            assert!(
                details.starts_with("upstream_reset_") && details.ends_with("{connection_termination}"),
                "cut at {count}: {line}"
            );
        }
    }
    drop(endpoint);
    nothing_is_left(&harness).await;
}

/// What a client says for a path, cut at every byte, and the client gone: in good order or with a reset, at once or once
/// its request has reached the endpoint. `say` also tells how much of it makes a request.
async fn vanishing(say: impl Fn(&str) -> (Vec<u8>, usize), http2: bool) {
    // A head is waited for, and never answered.
    let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let upstream = socket.local_addr().unwrap();
    let (sender, mut heads) = mpsc::unbounded_channel();
    let task = tokio::spawn(async move {
        let mut connections = tokio::task::JoinSet::new();
        while let Ok((mut stream, _)) = socket.accept().await {
            let sender = sender.clone();
            connections.spawn(async move {
                let mut held = Vec::new();
                let mut heard = false;
                while matches!(stream.read_buf(&mut held).await, Ok(count) if count > 0) {
                    if !heard && held.windows(4).any(|window| window == b"\r\n\r\n") {
                        heard = true;
                        let _ = sender.send(String::from_utf8_lossy(&held).into_owned());
                    }
                }
            });
        }
    });
    let mut arrival = async |path: &str| {
        let wanted = format!("POST {path} HTTP/1.1");
        let heard = async { while !heads.recv().await.unwrap().starts_with(&wanted) {} };
        soon("the request at the endpoint", heard).await;
    };
    let mut harness = Harness::start();
    let at = harness
        .serve_cluster(&counted_cluster("c"), &[upstream], to_cluster("c"))
        .await;
    let come = async |bytes: &[u8]| {
        let mut client = TcpStream::connect(at).await.unwrap();
        client.write_all(bytes).await.unwrap();
        if http2 && bytes.len() >= PREFACE.len() {
            // The proxy has begun.
            let mut settings = [0; 9];
            soon("the proxy's SETTINGS", client.read_exact(&mut settings))
                .await
                .unwrap();
        }
        client
    };
    for (abrupt, how) in [(false, "closed"), (true, "reset")] {
        let leave = |client: TcpStream| {
            if abrupt {
                socket2::SockRef::from(&client)
                    .set_linger(Some(std::time::Duration::ZERO))
                    .unwrap();
            }
        };
        let (bytes, head) = say(&format!("/{how}/at-once"));
        for cut in 0..=bytes.len() {
            leave(come(&bytes[..cut]).await);
        }
        // Connections are accepted in order: with the last one's request every other has been.
        let last = format!("/{how}/last");
        let client = come(&say(&last).0).await;
        arrival(&last).await;
        leave(client);
        nothing_is_left(&harness).await;
        // What came before the end was read, and each request in it is told.
        let mut told = 0;
        while let Ok(line) = harness.log.try_recv() {
            gone(&serde_json::from_str(&line).unwrap());
            told += 1;
        }
        assert_eq!(told, bytes.len() - head + 2, "{how}");
        for cut in head..=bytes.len() {
            let path = format!("/{how}/{cut}");
            let (bytes, more) = say(&path);
            let client = come(&bytes[..cut - head + more]).await;
            arrival(&path).await;
            leave(client);
            gone(&harness.line().await);
        }
        nothing_is_left(&harness).await;
        assert!(harness.log.try_recv().is_err(), "each is told once");
    }
    task.abort();
}

/// The line tells of a request whose client is gone; a body that ended too early is the client's doing as well.
fn gone(line: &serde_json::Value) {
    let text = |key: &str| line[key].as_str().unwrap_or_default();
    assert_eq!(
        (text("response_flags"), text("response_code_details")),
        ("DC", GONE),
        "{line}"
    );
}

#[tokio::test]
async fn http2_clients_that_vanish_at_any_byte_leave_nothing() {
    let say = |path: &str| {
        let block = request("POST", path, &[("content-length", "10")]);
        let mut bytes = [
            PREFACE.to_vec(),
            frame(SETTINGS, 0, 0, &[]),
            frame(HEADERS, END_HEADERS, 1, &block),
        ]
        .concat();
        let head = bytes.len();
        bytes.extend(frame(DATA, 0, 1, b"half "));
        bytes.extend(frame(DATA, END_STREAM, 1, b"whole"));
        (bytes, head)
    };
    vanishing(say, true).await;
}

#[tokio::test]
async fn http1_clients_that_vanish_at_any_byte_leave_nothing() {
    let say = |path: &str| {
        let mut bytes =
            format!("POST {path} HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n").into_bytes();
        let head = bytes.len();
        bytes.extend(b"5\r\nhello\r\n0\r\nx-end: 1\r\n\r\n");
        (bytes, head)
    };
    vanishing(say, false).await;
}

#[tokio::test]
async fn an_http2_client_that_is_gone_cancels_its_streams_at_an_http2_endpoint() {
    let mut endpoint = Endpoint::start().await;
    let (mut harness, at) = setup(endpoint.at, to_cluster("c")).await;
    let mut client = RawClient::connect(at, &[]).await;
    for stream in [1, 3, 5] {
        client.get(stream, &request("GET", "/", &[])).await;
    }
    let mut connection = endpoint.connection().await;
    let mut streams = Vec::new();
    for _ in 0..3 {
        streams.push(soon("a request", asked(&mut connection)).await.unwrap().0);
    }
    // One by one, then the rest with the connection.
    client.send(&reset(3, CANCEL)).await;
    heard(&mut connection, RST_STREAM, streams[1]).await;
    client.reset();
    let mut cancelled = Vec::new();
    while cancelled.len() < 2 {
        let frame = soon("a cancellation", connection.listen()).await.unwrap();
        if frame.kind == RST_STREAM {
            cancelled.push(frame.stream);
        }
    }
    cancelled.sort_unstable();
    assert_eq!(cancelled, [streams[0], streams[2]]);
    for _ in 0..3 {
        told(&mut harness, "DC", GONE).await;
    }
    drop((connection, endpoint));
    nothing_is_left(&harness).await;
}
