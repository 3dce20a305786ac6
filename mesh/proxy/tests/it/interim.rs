//! Interim answers (1xx).

use std::future::poll_fn;
use std::net::SocketAddr;

use bytes::Bytes;
use h2::RecvStream;
use h2::client::{ResponseFuture, SendRequest};
use h2::server::SendResponse;
use http::{Request, Response, StatusCode};
use http_body_util::Full;
use serin_xds::ResourceType;
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
    harness.route_all_to("c").await;
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
    to_endpoint(endpoint, false, passes).await
}

async fn to_endpoint(endpoint: SocketAddr, http2: bool, passes: bool) -> (Harness, SocketAddr) {
    let harness = Harness::start();
    if http2 {
        harness
            .put(ResourceType::Cluster, "c", &speaking_h2(eds_cluster("c")))
            .await;
        harness.endpoints("c", &[endpoint]).await;
    } else {
        harness.cluster("c", &[endpoint]).await;
    }
    harness.route_all_to("c").await;
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
async fn clients_over_http_1_0_and_where_it_is_not_asked_for_get_the_answer_alone() {
    let (endpoint, task) = scripted(HINTS, 0, DONE).await;
    let (harness, at) = passing(endpoint, true).await;
    let mut client = TcpStream::connect(at).await.unwrap();
    client
        .write_all(b"GET / HTTP/1.0\r\nhost: a\r\nconnection: keep-alive\r\n\r\n")
        .await
        .unwrap();
    let answer = read_until(&mut client, "ok").await;
    assert!(answer.starts_with("HTTP/1.0 200 "), "{answer}");
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

fn interim(status: u16, link: Option<&'static str>) -> Response<()> {
    let mut answer = Response::builder().status(status);
    if let Some(link) = link {
        answer = answer.header("link", link);
    }
    answer.body(()).unwrap()
}

/// Reads a body to its end.
async fn content(stream: &mut RecvStream) -> String {
    let mut read = Vec::new();
    while let Some(data) = stream.data().await {
        let data = data.unwrap();
        stream.flow_control().release_capacity(data.len()).unwrap();
        read.extend_from_slice(&data);
    }
    String::from_utf8(read).unwrap()
}

/// An endpoint over HTTP/2 that does this with every request.
async fn h2_endpoint<F>(
    serve: impl Fn(Request<RecvStream>, SendResponse<Bytes>) -> F + Send + 'static,
) -> SocketAddr
where
    F: Future<Output = ()> + Send + 'static,
{
    let socket = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = socket.local_addr().unwrap();
    tokio::spawn(async move {
        let (stream, _) = socket.accept().await.unwrap();
        let mut connection = h2::server::handshake(stream).await.unwrap();
        let mut served = tokio::task::JoinSet::new();
        while let Some(Ok((request, respond))) = connection.accept().await {
            served.spawn(serve(request, respond));
        }
    });
    at
}

/// Answers with the body `ok`.
fn answer_ok(respond: &mut SendResponse<Bytes>) {
    let mut body = respond.send_response(Response::new(()), false).unwrap();
    body.send_data(Bytes::from_static(b"ok"), true).unwrap();
}

/// An endpoint that hints twice and then answers.
async fn hinting(http2: bool) -> SocketAddr {
    if !http2 {
        const HINTS: &[u8] = b"HTTP/1.1 102 Processing\r\n\r\n\
            HTTP/1.1 103 Early Hints\r\nlink: </a.css>\r\nconnection: x-own\r\nx-own: 1\r\n\r\n\
            HTTP/1.1 103 Early Hints\r\nlink: </b.css>\r\n\r\n";
        return scripted(HINTS, 0, DONE).await.0;
    }
    h2_endpoint(|_, mut respond| async move {
        for answer in [
            interim(102, None),
            interim(103, Some("</a.css>")),
            interim(103, Some("</b.css>")),
        ] {
            respond.send_informational(answer).unwrap();
        }
        answer_ok(&mut respond);
    })
    .await
}

async fn h2_direct(at: SocketAddr) -> SendRequest<Bytes> {
    let stream = TcpStream::connect(at).await.unwrap();
    let (sender, connection) = h2::client::handshake(stream).await.unwrap();
    tokio::spawn(connection);
    sender.ready().await.unwrap()
}

/// What comes before the final answer, each with its status and `link`, and the status and body of that.
async fn everything(mut answer: ResponseFuture) -> (Vec<(u16, String)>, StatusCode, String) {
    let mut interims = Vec::new();
    while let Some(next) = soon("an answer", poll_fn(|cx| answer.poll_informational(cx))).await {
        let next = next.unwrap();
        assert!(next.headers().get("x-own").is_none());
        let link = next
            .headers()
            .get("link")
            .map_or("", |link| link.to_str().unwrap());
        interims.push((next.status().as_u16(), link.to_owned()));
    }
    let (head, mut body) = soon("the final answer", answer).await.unwrap().into_parts();
    (interims, head.status, content(&mut body).await)
}

fn get() -> Request<()> {
    Request::get("http://a/").body(()).unwrap()
}

fn expecting() -> Request<()> {
    Request::post("http://a/")
        .header("expect", "100-continue")
        .body(())
        .unwrap()
}

#[tokio::test]
async fn early_hints_pass_in_every_combination_of_versions_in_their_order() {
    for endpoint2 in [false, true] {
        let (_harness, at) = to_endpoint(hinting(endpoint2).await, endpoint2, true).await;
        let mut client = h2_direct(at).await;
        for _ in 0..2 {
            let (answer, _) = client.send_request(get(), true).unwrap();
            let (interims, status, body) = everything(answer).await;
            let expected = [(102, ""), (103, "</a.css>"), (103, "</b.css>")];
            assert_eq!(interims, expected.map(|(status, link)| (status, link.to_owned())));
            assert_eq!((status.as_u16(), body.as_str()), (200, "ok"));
            client = client.ready().await.unwrap();
        }
        let (_harness, at) = to_endpoint(hinting(endpoint2).await, endpoint2, true).await;
        let mut client = TcpStream::connect(at).await.unwrap();
        client
            .write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
            .await
            .unwrap();
        for expected in [
            "HTTP/1.1 102 Processing\r\n\r\n",
            "HTTP/1.1 103 Early Hints\r\nlink: </a.css>\r\n\r\n",
            "HTTP/1.1 103 Early Hints\r\nlink: </b.css>\r\n\r\n",
        ] {
            assert_eq!(read_until(&mut client, "\r\n\r\n").await, expected);
        }
        // Over HTTP/2 no length was given.
        let end = if endpoint2 { "ok\r\n0\r\n\r\n" } else { "ok" };
        let answer = read_until(&mut client, end).await;
        assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    }
}

#[tokio::test]
async fn interim_answers_reach_an_http2_client_while_its_request_is_still_being_sent() {
    // The endpoint answers only when it has a body, and the client sends it only after it has the hints.
    let after_body = h2_endpoint(|request, mut respond| async move {
        respond
            .send_informational(interim(103, Some("</a.css>")))
            .unwrap();
        assert_eq!(content(&mut request.into_body()).await, "body");
        answer_ok(&mut respond);
    })
    .await;
    let (_harness, at) = to_endpoint(after_body, true, true).await;
    let mut client = h2_direct(at).await;
    let (mut answer, mut body) = client
        .send_request(Request::post("http://a/").body(()).unwrap(), false)
        .unwrap();
    let hint = soon("a hint", poll_fn(|cx| answer.poll_informational(cx))).await;
    assert_eq!(hint.unwrap().unwrap().status(), 103);
    body.send_data(Bytes::from_static(b"body"), true).unwrap();
    let (interims, status, _) = everything(answer).await;
    assert_eq!((interims, status.as_u16()), (vec![], 200));
    // An answer that does not wait for the body follows its hints as well.
    let early = h2_endpoint(|_, mut respond| async move {
        respond
            .send_informational(interim(103, Some("</a.css>")))
            .unwrap();
        answer_ok(&mut respond);
    })
    .await;
    let (harness, at) = to_endpoint(early, true, true).await;
    let mut client = h2_direct(at).await;
    let (answer, body) = client
        .send_request(Request::post("http://a/").body(()).unwrap(), false)
        .unwrap();
    let (interims, status, _) = everything(answer).await;
    assert_eq!((interims.len(), status.as_u16()), (1, 200));
    drop((body, client));
    soon("the end of all requests", async {
        while harness.proxy.tasks().await > 1 {
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    })
    .await;
}

#[tokio::test]
async fn the_endpoint_decides_whether_an_http2_client_that_expects_100_may_send_its_body() {
    for endpoint2 in [false, true] {
        let endpoint = if endpoint2 {
            h2_endpoint(|request, mut respond| async move {
                assert_eq!(request.headers()["expect"], "100-continue");
                respond.send_informational(interim(100, None)).unwrap();
                assert_eq!(content(&mut request.into_body()).await, "body");
                answer_ok(&mut respond);
            })
            .await
        } else {
            // The head and the chunk of a body whose length is not known, and its end.
            scripted(
                b"HTTP/1.1 100 Continue\r\n\r\n",
                b"4\r\nbody\r\n0\r\n\r\n".len(),
                DONE,
            )
            .await
            .0
        };
        let (_harness, at) = to_endpoint(endpoint, endpoint2, true).await;
        let mut client = h2_direct(at).await;
        let (mut answer, mut body) = client.send_request(expecting(), false).unwrap();
        let next = soon("100", poll_fn(|cx| answer.poll_informational(cx))).await;
        assert_eq!(next.unwrap().unwrap().status(), 100);
        body.send_data(Bytes::from_static(b"body"), true).unwrap();
        let (interims, status, body) = everything(answer).await;
        assert!(interims.is_empty(), "once only: {interims:?}");
        assert_eq!((status.as_u16(), body.as_str()), (200, "ok"));
    }
}

#[tokio::test]
async fn a_refusal_reaches_an_http2_client_instead_of_100_and_silence_counts_as_100_after_a_while() {
    let endpoint = h2_endpoint(|request, mut respond| async move {
        if request.uri().path() == "/refused" {
            let refused = Response::builder().status(417).body(()).unwrap();
            respond.send_response(refused, true).unwrap();
        } else {
            assert_eq!(content(&mut request.into_body()).await, "body");
            answer_ok(&mut respond);
        }
    })
    .await;
    let (_harness, at) = to_endpoint(endpoint, true, true).await;
    let mut client = h2_direct(at).await;
    let mut refused = expecting();
    *refused.uri_mut() = "http://a/refused".parse().unwrap();
    let (answer, _body) = client.send_request(refused, false).unwrap();
    let (interims, status, _) = everything(answer).await;
    assert_eq!((interims, status.as_u16()), (vec![], 417));
    let mut client = client.ready().await.unwrap();
    let (mut answer, mut body) = client.send_request(expecting(), false).unwrap();
    let next = soon("100", poll_fn(|cx| answer.poll_informational(cx))).await;
    assert_eq!(next.unwrap().unwrap().status(), 100);
    body.send_data(Bytes::from_static(b"body"), true).unwrap();
    assert_eq!(everything(answer).await.1, 200);
}

#[tokio::test]
async fn where_it_is_not_asked_for_an_http2_client_gets_the_proxys_own_100_and_no_hints() {
    let endpoint = h2_endpoint(|request, mut respond| async move {
        assert!(request.headers().get("expect").is_none());
        respond
            .send_informational(interim(103, Some("</a.css>")))
            .unwrap();
        let _ = content(&mut request.into_body()).await;
        answer_ok(&mut respond);
    })
    .await;
    let (_harness, at) = to_endpoint(endpoint, true, false).await;
    let mut client = h2_direct(at).await;
    let (mut answer, mut body) = client.send_request(expecting(), false).unwrap();
    let next = soon("100", poll_fn(|cx| answer.poll_informational(cx))).await;
    assert_eq!(next.unwrap().unwrap().status(), 100);
    body.send_data(Bytes::from_static(b"body"), true).unwrap();
    let (interims, status, _) = everything(answer).await;
    assert_eq!((interims, status.as_u16()), (vec![], 200));
    let mut client = client.ready().await.unwrap();
    let (answer, _) = client.send_request(get(), true).unwrap();
    let (interims, status, _) = everything(answer).await;
    assert_eq!((interims, status.as_u16()), (vec![], 200));
}

#[tokio::test]
async fn a_101_that_nobody_asked_for_is_no_answer_over_either_version() {
    for endpoint2 in [false, true] {
        for passes in [false, true] {
            let endpoint = if endpoint2 {
                h2_endpoint(|_, mut respond| async move {
                    respond.send_informational(interim(101, None)).unwrap();
                    answer_ok(&mut respond);
                })
                .await
            } else {
                let switching =
                    b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: own\r\n\r\n";
                scripted(switching, 1, b"").await.0
            };
            let (_harness, at) = to_endpoint(endpoint, endpoint2, passes).await;
            let mut client = h2_direct(at).await;
            let (answer, _) = client.send_request(get(), true).unwrap();
            let (interims, status, _) = everything(answer).await;
            assert_eq!((interims, status.as_u16()), (vec![], 502), "HTTP/2: {endpoint2}");
        }
    }
}

#[tokio::test]
async fn an_endpoint_that_hints_without_end_is_heard_up_to_a_limit_by_http2_clients_too() {
    let endpoint = h2_endpoint(|_, mut respond| async move {
        for _ in 0..200 {
            respond
                .send_informational(interim(103, Some("</a.css>")))
                .unwrap();
        }
        answer_ok(&mut respond);
    })
    .await;
    let (_harness, at) = to_endpoint(endpoint, true, true).await;
    let mut client = h2_direct(at).await;
    let (answer, _) = client.send_request(get(), true).unwrap();
    let (interims, status, _) = everything(answer).await;
    assert_eq!((interims.len(), status.as_u16()), (64, 200));
}
