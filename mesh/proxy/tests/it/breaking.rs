//! Upstreams that break off at any byte of any kind of answer: sized, chunked, behind an interim answer, with trailers, over
//! TLS, as HTTP/2 frames. What the client gets is the whole answer, an error with its flag and details, or an answer that
//! is broken off where it can see it; never a whole one that is not; and nothing is left.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;

use crate::certificates::{Authority, client_socket, common, provider};
use crate::failure::{counted_cluster, nothing_is_left};
use crate::fixture::*;

/// An upstream that sends the first `cut` bytes of an answer to the first request of each connection, and ends it.
struct Breaking {
    at: SocketAddr,
    cut: Arc<AtomicUsize>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Breaking {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Breaking {
    /// `wait` is what the request ends with.
    async fn start(answer: Vec<u8>, wait: &'static [u8], tls: Option<TlsAcceptor>) -> Self {
        let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = socket.local_addr().unwrap();
        let cut = Arc::new(AtomicUsize::new(0));
        let (wanted, answer) = (cut.clone(), Arc::new(answer));
        let task = tokio::spawn(async move {
            let mut connections = tokio::task::JoinSet::new();
            while let Ok((stream, _)) = socket.accept().await {
                let (cut, answer, tls) = (wanted.load(Ordering::SeqCst), answer.clone(), tls.clone());
                connections.spawn(async move {
                    match tls {
                        None => play(stream, &answer[..cut], wait).await,
                        Some(tls) => {
                            if let Ok(stream) = tls.accept(stream).await {
                                play(stream, &answer[..cut], wait).await;
                            }
                        }
                    }
                });
            }
        });
        Self { at, cut, task }
    }
}

async fn play(mut stream: impl AsyncRead + AsyncWrite + Unpin, answer: &[u8], wait: &[u8]) {
    let mut held = Vec::new();
    while !held.windows(wait.len()).any(|window| window == wait) {
        match stream.read_buf(&mut held).await {
            Ok(count) if count > 0 => {}
            _ => return,
        }
    }
    let _ = stream.write_all(answer).await;
    let _ = stream.shutdown().await;
    // Until the proxy has let go as well, so that nothing that it sends is answered by a reset.
    let _ = tokio::io::copy(&mut stream, &mut tokio::io::sink()).await;
}

/// What a client makes of the bytes: a whole answer, or not.
fn whole(answer: &str) -> bool {
    let Some((head, body)) = answer.split_once("\r\n\r\n") else {
        return false;
    };
    let head = head.to_ascii_lowercase();
    if head.contains("transfer-encoding: chunked") {
        return body.ends_with("0\r\n\r\n") || body.contains("\r\n0\r\n");
    }
    match head
        .split("content-length: ")
        .nth(1)
        .and_then(|rest| rest.lines().next())
    {
        Some(length) => length.trim().parse() == Ok(body.len()),
        // Ended by the connection: whoever reads it cannot tell.
        None => true,
    }
}

/// Cuts the answer at every byte. `head` is how many bytes there are to the end of the final head, `least` how many make a
/// whole answer.
async fn every_cut(
    name: &str,
    answer: &[u8],
    (head, least): (usize, usize),
    upstream: Breaking,
    mut cluster: serin_xds::pb::envoy::config::cluster::v3::Cluster,
) {
    let mut harness = Harness::start();
    cluster.name = "c".into();
    let at = harness
        .serve_cluster(&cluster, &[upstream.at], to_cluster("c"))
        .await;
    for cut in 0..=answer.len() {
        upstream.cut.store(cut, Ordering::SeqCst);
        let what = format!("{name}, cut at {cut} of {}", answer.len());
        let mut stream = TcpStream::connect(at).await.unwrap();
        stream
            .write_all(b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
            .await
            .unwrap();
        let mut bytes = Vec::new();
        let _ = soon("the end of the answer", stream.read_to_end(&mut bytes)).await;
        let text = String::from_utf8_lossy(&bytes).into_owned();
        if cut >= least {
            // What the client sees is chunked anew: "hello" may come as two chunks.
            let text = text.replace("\r\n2\r\n", "");
            assert!(
                text.starts_with("HTTP/1.1 200 ") && whole(&text) && text.contains("hello"),
                "{what}: {text}"
            );
            continue;
        }
        let line = harness.line().await;
        let details = line["response_code_details"].as_str().unwrap();
        assert_eq!(line["response_flags"], "UC", "{what}: {line}");
        if cut < head {
            assert!(text.starts_with("HTTP/1.1 503 "), "{what}: {text}");
            assert!(text.contains("x-serin-response-flags: UC"), "{what}: {text}");
            assert!(
                details.starts_with("upstream_reset_before_response_started{"),
                "{what}: {details}"
            );
        } else {
            // The head may have been on its way already, or not.
            let seen =
                text.is_empty() || text.starts_with("HTTP/1.1 200 ") || text.starts_with("HTTP/1.1 503 ");
            assert!(
                seen && !(text.starts_with("HTTP/1.1 200 ") && whole(&text)),
                "{what}: {text}"
            );
            assert!(details.contains("connection_termination"), "{what}: {details}");
        }
    }
    drop(upstream);
    nothing_is_left(&harness).await;
}

fn after(answer: &[u8], part: &str) -> usize {
    let text = String::from_utf8_lossy(answer);
    text.rfind(part).unwrap() + part.len()
}

#[tokio::test]
async fn http1_answers_of_every_framing_that_end_at_any_byte_are_never_taken_for_whole_ones() {
    let sized = "HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello";
    let chunked = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nhel\r\n2;x\r\nlo\r\n0\r\n\r\n";
    let trailers = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\nx-end: 1\r\n\r\n";
    let interim =
        "HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello";
    for (name, answer, head_end) in [
        ("sized", sized, "\r\n\r\nhello"),
        ("chunked", chunked, "chunked\r\n\r\n"),
        ("with trailers", trailers, "chunked\r\n\r\n"),
        ("after an interim answer", interim, "\r\n\r\nhello"),
    ] {
        let bytes = answer.as_bytes();
        let head = after(bytes, head_end) - if head_end.ends_with("hello") { 5 } else { 0 };
        let upstream = Breaking::start(bytes.to_vec(), b"\r\n\r\n", None).await;
        Box::pin(every_cut(
            name,
            bytes,
            (head, bytes.len()),
            upstream,
            counted_cluster("c"),
        ))
        .await;
    }
}

#[tokio::test]
async fn answers_over_tls_that_end_at_any_byte_are_never_taken_for_whole_ones() {
    let authority = Authority::new("ca");
    let server = authority.issue(&["backend"]);
    let (chain, key) = server.der();
    let config = rustls::ServerConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .unwrap();
    let answer = b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello";
    let upstream = Breaking::start(
        answer.to_vec(),
        b"\r\n\r\n",
        Some(TlsAcceptor::from(Arc::new(config))),
    )
    .await;
    let mut cluster = counted_cluster("c");
    cluster.transport_socket = client_socket(common(None, Some(authority.context()), &[]), "backend");
    Box::pin(every_cut(
        "over TLS",
        answer,
        (answer.len() - 5, answer.len()),
        upstream,
        cluster,
    ))
    .await;
}

#[tokio::test]
async fn http2_answers_that_end_at_any_byte_are_never_taken_for_whole_ones() {
    // SETTINGS, its acknowledgement, HEADERS (:status 200 by index, content-length 5), DATA with the end of the stream.
    let mut answer = vec![0, 0, 0, 4, 0, 0, 0, 0, 0];
    answer.extend([0, 0, 0, 4, 1, 0, 0, 0, 0]);
    let block = [&[0x88, 0x5c, 0x01][..], b"5"].concat();
    answer.extend([0, 0, block.len() as u8, 1, 4, 0, 0, 0, 1]);
    answer.extend(&block);
    let head = answer.len();
    answer.extend([0, 0, 5, 0, 1, 0, 0, 0, 1]);
    answer.extend(b"hello");
    // The request's HEADERS frame ends headers and stream: flags 5, stream 1.
    let upstream = Breaking::start(answer.clone(), &[1, 5, 0, 0, 0, 1], None).await;
    let cluster = speaking_h2(counted_cluster("c"));
    Box::pin(every_cut(
        "HTTP/2",
        &answer,
        (head, answer.len()),
        upstream,
        cluster,
    ))
    .await;
}
