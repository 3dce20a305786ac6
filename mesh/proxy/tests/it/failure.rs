//! Upstreams and clients that misbehave: what the user sees, and that nothing is left behind.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use http::Request;
use http_body_util::Full;
use serin_xds::ResourceType;
use serin_xds::pb::envoy::config::cluster::v3 as cluster;
use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::envoy::config::route::v3 as route;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::fixture::*;

/// How an upstream ends a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ending {
    Close,
    Reset,
    /// Not at all, until the other side does.
    Hang,
}

/// What an upstream does with its next request.
#[derive(Clone, Debug)]
struct Act {
    answer: Vec<u8>,
    ending: Option<Ending>,
}

type Script = dyn Fn(&str) -> Act + Send + Sync;

/// An upstream that reads heads and does with them what the script says, given the head.
struct Upstream {
    at: SocketAddr,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Upstream {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Upstream {
    async fn start(script: impl Fn(&str) -> Act + Send + Sync + 'static) -> Self {
        let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = socket.local_addr().unwrap();
        let script: Arc<Script> = Arc::new(script);
        let task = tokio::spawn(async move {
            let mut connections = tokio::task::JoinSet::new();
            while let Ok((stream, _)) = socket.accept().await {
                connections.spawn(play(stream, script.clone()));
            }
        });
        Self { at, task }
    }
}

async fn play(mut stream: TcpStream, script: Arc<Script>) {
    stream.set_nodelay(true).unwrap();
    let mut held = Vec::new();
    loop {
        let end = loop {
            if let Some(end) = held.windows(4).position(|window| window == b"\r\n\r\n") {
                break end + 4;
            }
            let mut chunk = [0u8; 4096];
            match stream.read(&mut chunk).await {
                Ok(0) | Err(_) => return,
                Ok(count) => held.extend(&chunk[..count]),
            }
        };
        let head = String::from_utf8_lossy(&held[..end]).into_owned();
        held.drain(..end);
        let act = script(&head);
        if stream.write_all(&act.answer).await.is_err() {
            return;
        }
        match act.ending {
            None => {}
            Some(Ending::Close) => return,
            Some(Ending::Reset) => {
                socket2::SockRef::from(&stream)
                    .set_linger(Some(std::time::Duration::ZERO))
                    .unwrap();
                return;
            }
            Some(Ending::Hang) => {
                let mut rest = Vec::new();
                let _ = stream.read_to_end(&mut rest).await;
                return;
            }
        }
    }
}

fn act(answer: impl Into<Vec<u8>>, ending: impl Into<Option<Ending>>) -> Act {
    Act {
        answer: answer.into(),
        ending: ending.into(),
    }
}

/// A cluster whose use is counted, because it has limits.
pub(crate) fn counted_cluster(name: &str) -> cluster::Cluster {
    cluster::Cluster {
        circuit_breakers: Some(cluster::CircuitBreakers {
            thresholds: vec![cluster::circuit_breakers::Thresholds {
                max_connections: number(1_000),
                max_pending_requests: number(1_000),
                max_requests: number(1_000),
                max_retries: number(1_000),
                ..Default::default()
            }],
            ..Default::default()
        }),
        ..eds_cluster(name)
    }
}

async fn setup(upstream: SocketAddr, action: route::RouteAction) -> (Harness, SocketAddr) {
    let harness = Harness::start();
    let at = harness
        .serve_cluster(&counted_cluster("c"), &[upstream], action)
        .await;
    (harness, at)
}

/// Waits until nothing is left of anything: no connection, no task, no permit.
pub(crate) async fn nothing_is_left(harness: &Harness) {
    let clean = async {
        loop {
            let (requests, pending, connections, retries) = harness.proxy.store(|store| {
                let slot = store.clusters().find(|slot| &*slot.name == "c").unwrap();
                let usage = slot.usage.of(serin_proxy::config::cluster::Priority::Default);
                (
                    usage.requests.load(Ordering::SeqCst),
                    usage.pending.load(Ordering::SeqCst),
                    usage.connections.load(Ordering::SeqCst),
                    usage.retries.load(Ordering::SeqCst),
                )
            });
            let open = harness.proxy.connections().await;
            let tasks = harness.proxy.tasks().await;
            if (requests, pending, connections, retries, open, tasks) == (0, 0, 0, 0, 0, 0) {
                return;
            }
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    };
    soon("the end of every connection, task and permit", clean).await;
}

/// The log's next line tells of a request that ended like this.
pub(crate) async fn told(harness: &mut Harness, flags: &str, details: &str) {
    let line = harness.line().await;
    let text = |key: &str| line[key].as_str().unwrap_or_default();
    assert_eq!(
        (text("response_flags"), text("response_code_details")),
        (flags, details),
        "{line}"
    );
}

/// How an upstream that closes the connection instead of an answer is told.
pub(crate) const CLOSED: &str = "upstream_reset_before_response_started{connection_termination}";
/// How a client that is gone is told.
pub(crate) const GONE: &str = "downstream_remote_disconnect";

/// Reads until what was read ends with `end`.
async fn read_until(stream: &mut TcpStream, end: &str) -> String {
    let mut answer = String::new();
    while !answer.ends_with(end) {
        let mut chunk = [0u8; 4096];
        let count = soon("an answer", stream.read(&mut chunk)).await.unwrap();
        assert!(count > 0, "{answer}");
        answer.push_str(&String::from_utf8_lossy(&chunk[..count]));
    }
    answer
}

#[tokio::test]
async fn an_upstream_that_breaks_off_at_any_byte_is_answered_or_broken_off_and_leaves_nothing() {
    const ANSWER: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\nx-one: 1\r\n\r\nhello";
    let head = ANSWER.len() - 5;
    let upstream = Upstream::start(move |request| {
        let number = |name: &str| -> usize {
            let at = request.find(name).unwrap() + name.len();
            request[at..]
                .split_once("\r\n")
                .unwrap()
                .0
                .trim()
                .parse()
                .unwrap()
        };
        let ending = if number("x-reset:") == 1 {
            Ending::Reset
        } else {
            Ending::Close
        };
        act(&ANSWER[..number("x-cut:")], ending)
    })
    .await;
    let (mut harness, at) = setup(upstream.at, to_cluster("c")).await;
    for reset in [0, 1] {
        for cut in 0..=ANSWER.len() {
            let what = format!("cut at {cut}, reset {reset}");
            let request = format!(
                "GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\nx-cut: {cut}\r\nx-reset: {reset}\r\n\r\n"
            );
            let mut stream = TcpStream::connect(at).await.unwrap();
            stream.write_all(request.as_bytes()).await.unwrap();
            let mut answer = Vec::new();
            // A response that was broken off may reach the client as a reset.
            let _ = soon("the end of the answer", stream.read_to_end(&mut answer)).await;
            let answer = String::from_utf8_lossy(&answer).into_owned();
            if cut == ANSWER.len() && reset == 0 {
                assert!(
                    answer.starts_with("HTTP/1.1 200 ") && answer.ends_with("hello"),
                    "{what}: {answer}"
                );
                continue;
            }
            if cut >= head {
                // The reset may overtake the bytes before it.
                let whole = answer.starts_with("HTTP/1.1 200 ") && answer.ends_with("hello");
                let broken = !answer.ends_with("hello")
                    && (answer.is_empty()
                        || answer.starts_with("HTTP/1.1 200 ")
                        || answer.starts_with("HTTP/1.1 503 "));
                assert!((cut == ANSWER.len() && whole) || broken, "{what}: {answer}");
                if whole {
                    continue;
                }
            } else {
                assert!(answer.starts_with("HTTP/1.1 503 "), "{what}: {answer}");
                assert!(answer.contains("x-serin-response-flags: UC"), "{what}: {answer}");
            }
            let line = harness.line().await;
            assert_eq!(line["response_flags"], "UC", "{what}");
            let details = line["response_code_details"].as_str().unwrap();
            let expected = if cut < head {
                "upstream_reset_before_response_started{connection_termination}"
            } else {
                "connection_termination}"
            };
            assert!(details.ends_with(expected), "{what}: {details}");
        }
    }
    nothing_is_left(&harness).await;
}

#[tokio::test]
async fn an_upstream_that_never_answers_is_given_up_after_the_route_timeout() {
    let upstream = Upstream::start(|_| act("", Ending::Hang)).await;
    let action = route::RouteAction {
        timeout: millis(150),
        ..to_cluster("c")
    };
    let (mut harness, at) = setup(upstream.at, action).await;
    for _ in 0..3 {
        let (status, headers, _) = get(at, "/").await;
        assert_eq!(
            (status, headers["x-serin-response-flags"].to_str().unwrap()),
            (504, "UT")
        );
        told(&mut harness, "UT", "response_timeout").await;
    }
    nothing_is_left(&harness).await;
}

#[tokio::test]
async fn an_early_answer_reaches_the_client_and_the_rest_of_its_request_is_not_waited_for() {
    // An endpoint that ends its connection, and one that would read on.
    for (ending, more) in [(Ending::Close, "connection: close\r\n"), (Ending::Hang, "")] {
        let upstream = Upstream::start(move |_| {
            let answer = format!("HTTP/1.1 413 Too Large\r\ncontent-length: 3\r\n{more}\r\nbig");
            act(answer, ending)
        })
        .await;
        let (harness, at) = setup(upstream.at, to_cluster("c")).await;
        let mut stream = TcpStream::connect(at).await.unwrap();
        stream
            .write_all(b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 1000000\r\n\r\nbegin")
            .await
            .unwrap();
        // The client sends no more and reads on: the end comes all the same.
        let mut answer = String::new();
        soon("the end", stream.read_to_string(&mut answer)).await.unwrap();
        assert!(
            answer.starts_with("HTTP/1.1 413 ") && answer.ends_with("\r\n\r\nbig"),
            "{answer}"
        );
        // Nothing can follow a request that is not read to its end.
        assert!(answer.contains("\r\nconnection: close\r\n"), "{answer}");
        drop(stream);
        nothing_is_left(&harness).await;
    }
}

#[tokio::test]
async fn an_answer_of_the_proxys_own_that_does_not_wait_for_the_request_says_that_it_is_the_last() {
    let harness = Harness::start();
    let at = harness
        .serve(vec![prefix_route("/", to_cluster("nowhere"))])
        .await;
    let mut stream = TcpStream::connect(at).await.unwrap();
    for (request, last) in [
        ("GET / HTTP/1.1\r\nhost: a\r\n\r\n", false),
        (
            "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 1000000\r\n\r\nbegin",
            true,
        ),
    ] {
        stream.write_all(request.as_bytes()).await.unwrap();
        let answer = read_until(&mut stream, "\r\n\r\n").await;
        assert!(answer.starts_with("HTTP/1.1 503 "), "{answer}");
        assert_eq!(answer.contains("\r\nconnection: close\r\n"), last, "{answer}");
    }
}

#[tokio::test]
async fn the_connection_of_a_request_that_was_read_to_its_end_stays_open() {
    let backend = Backend::named("ok").await;
    let (_harness, at) = setup(backend.address, to_cluster("c")).await;
    let mut stream = TcpStream::connect(at).await.unwrap();
    for body in [
        "content-length: 5\r\n\r\nhello",
        "transfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    ] {
        stream
            .write_all(format!("POST / HTTP/1.1\r\nhost: a\r\n{body}").as_bytes())
            .await
            .unwrap();
        let answer = read_until(&mut stream, "\r\n\r\nok").await;
        assert!(!answer.contains("connection: close"), "{answer}");
    }
}

#[tokio::test]
async fn a_second_answer_that_nobody_asked_for_reaches_nobody() {
    let upstream = Upstream::start(|head| {
        let path = head.split(' ').nth(1).unwrap_or_default();
        let answer = |text: &str| format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{text}", text.len());
        act(format!("{}{}", answer(path), answer("/evil")), None)
    })
    .await;
    let (harness, at) = setup(upstream.at, to_cluster("c")).await;
    let mut client = TcpStream::connect(at).await.unwrap();
    for number in 0..30 {
        let path = format!("/{number:04}");
        client
            .write_all(format!("GET {path} HTTP/1.1\r\nhost: a\r\n\r\n").as_bytes())
            .await
            .unwrap();
        let answer = read_until(&mut client, &path).await;
        assert!(
            answer.starts_with("HTTP/1.1 200 ") && !answer.contains("/evil"),
            "{answer}"
        );
    }
    drop(client);
    drop(upstream);
    nothing_is_left(&harness).await;
}

#[tokio::test]
async fn idle_connections_that_the_upstream_closes_as_we_write_cost_no_request() {
    // Every second request finds its connection closed as it arrives, unanswered.
    let closing = Upstream::start({
        let count = std::sync::atomic::AtomicUsize::new(0);
        move |_| match count.fetch_add(1, Ordering::SeqCst) % 2 {
            0 => act("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok", None),
            _ => act("", Ending::Close),
        }
    })
    .await;
    let (harness, at) = setup(closing.at, to_cluster("c")).await;
    for method in ["GET", "PUT", "DELETE"] {
        for _ in 0..20 {
            let request = Request::builder()
                .method(method)
                .uri("/")
                .header("host", "a")
                .body(Full::from(""))
                .unwrap();
            let (status, _, body) = send(at, request).await;
            assert_eq!((status, &*body), (200, "ok"), "{method}");
        }
    }
    drop(closing);
    nothing_is_left(&harness).await;
}

#[tokio::test]
async fn a_request_that_may_have_been_acted_on_is_not_sent_twice_unless_it_is_idempotent() {
    let counted = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let upstream = Upstream::start({
        let counted = counted.clone();
        move |head| {
            if head.starts_with("GET") {
                return act("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok", None);
            }
            counted.fetch_add(1, Ordering::SeqCst);
            act("", Ending::Close)
        }
    })
    .await;
    let (mut harness, at) = setup(upstream.at, to_cluster("c")).await;
    assert_eq!(get(at, "/").await.0, 200);
    let request = Request::post("/")
        .header("host", "a")
        .body(Full::from("x"))
        .unwrap();
    let (status, headers, _) = send(at, request).await;
    assert_eq!(
        (status, headers["x-serin-response-flags"].to_str().unwrap()),
        (503, "UC")
    );
    told(&mut harness, "UC", CLOSED).await;
    assert_eq!(counted.load(Ordering::SeqCst), 1);
    drop(upstream);
    nothing_is_left(&harness).await;
}

#[tokio::test]
async fn clients_that_vanish_at_any_moment_leave_nothing() {
    let upstream = Upstream::start(|head| {
        if head.starts_with("GET /hang") {
            return act("", Ending::Hang);
        }
        // A response without an end.
        act(
            "HTTP/1.1 200 OK\r\ncontent-length: 1000000\r\n\r\nbegin",
            Ending::Hang,
        )
    })
    .await;
    let (mut harness, at) = setup(upstream.at, to_cluster("c")).await;
    let stages: [&[u8]; 5] = [
        b"",
        b"GET / HT",
        b"GET /hang HTTP/1.1\r\nhost: a\r\n\r\n",
        b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 100\r\n\r\nhalf",
        b"GET /begun HTTP/1.1\r\nhost: a\r\n\r\n",
    ];
    for (stage, bytes) in stages.into_iter().enumerate() {
        for reset in [false, true] {
            let mut stream = TcpStream::connect(at).await.unwrap();
            stream.write_all(bytes).await.unwrap();
            if stage >= 3 {
                let mut answer = [0u8; 12];
                soon("the head of the answer", stream.read_exact(&mut answer))
                    .await
                    .unwrap();
            } else if stage == 2 {
                let arrived = async {
                    while harness.proxy.tasks().await < 2 {
                        tokio::time::sleep(std::time::Duration::from_millis(2)).await;
                    }
                };
                soon("the upstream connection", arrived).await;
            }
            if reset {
                socket2::SockRef::from(&stream)
                    .set_linger(Some(std::time::Duration::ZERO))
                    .unwrap();
            }
            drop(stream);
            if stage >= 2 {
                told(&mut harness, "DC", GONE).await;
            }
            nothing_is_left(&harness).await;
        }
    }
}

#[tokio::test]
async fn an_http2_client_that_resets_its_streams_cancels_them_upstream() {
    let upstream = Upstream::start(|_| act("", Ending::Hang)).await;
    let (mut harness, at) = setup(upstream.at, to_cluster("c")).await;
    let mut client = h2_client(at).await;
    let requests: Vec<_> = (0..20)
        .map(|_| {
            let request = Request::get("http://a/").body(Full::from("")).unwrap();
            tokio::spawn(client.send_request(request))
        })
        .collect();
    let busy = async {
        while harness.proxy.tasks().await < 21 {
            tokio::time::sleep(std::time::Duration::from_millis(2)).await;
        }
    };
    soon("twenty upstream connections", busy).await;
    for request in requests {
        request.abort();
    }
    for _ in 0..20 {
        told(&mut harness, "DC", GONE).await;
    }
    drop(client);
    nothing_is_left(&harness).await;
}

#[tokio::test]
async fn a_slow_reader_holds_back_its_upstream_and_not_the_proxys_memory() {
    let sent = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = socket.local_addr().unwrap();
    let counted = sent.clone();
    let task = tokio::spawn(async move {
        let (mut stream, _) = socket.accept().await.unwrap();
        let mut chunk = vec![0u8; 65_536];
        let _ = stream.read(&mut chunk).await;
        stream
            .write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 1000000000\r\n\r\n")
            .await
            .unwrap();
        while stream.write_all(&chunk).await.is_ok() {
            counted.fetch_add(chunk.len(), Ordering::SeqCst);
        }
    });
    let (harness, at) = setup(address, to_cluster("c")).await;
    let mut client = TcpStream::connect(at).await.unwrap();
    client
        .write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
        .await
        .unwrap();
    // The client reads nothing: the upstream must come to a stand once every buffer between is full.
    let stands = async {
        let mut last = usize::MAX;
        loop {
            tokio::time::sleep(std::time::Duration::from_millis(150)).await;
            let now = sent.load(Ordering::SeqCst);
            if now == last && now > 0 {
                return now;
            }
            last = now;
        }
    };
    let held = soon("the upstream to come to a stand", stands).await;
    assert!(
        held < 64 << 20,
        "{held} bytes are on their way to a client that does not read"
    );
    drop(client);
    nothing_is_left(&harness).await;
    task.abort();
}

#[tokio::test]
async fn a_body_that_stalls_is_given_up_after_the_stream_idle_timeout() {
    let upstream = Upstream::start(|_| act("", Ending::Hang)).await;
    let mut harness = Harness::start();
    harness
        .put(ResourceType::Cluster, "c", &counted_cluster("c"))
        .await;
    harness.endpoints("c", &[upstream.at]).await;
    harness
        .routes(vec![host("all", "*", vec![prefix_route("/", to_cluster("c"))])])
        .await;
    let mut manager = manager("80");
    manager.stream_idle_timeout = millis(150);
    let at = harness.listen(&manager, core::TrafficDirection::Outbound).await;
    let answer = raw(
        at,
        b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 10\r\n\r\nhalf",
    )
    .await;
    assert!(answer.starts_with("HTTP/1.1 408 "), "{answer}");
    told(&mut harness, "SI", "stream_idle_timeout").await;
    nothing_is_left(&harness).await;
}
