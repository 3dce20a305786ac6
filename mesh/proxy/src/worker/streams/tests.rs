//! Both sides of a stream, in one process.

use std::future::poll_fn;

use h2::server::SendResponse;
use http::{Request, Response};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;

/// The two ends of one stream, as a client and a server have them. The connections are driven by tasks of their own.
async fn stream(
    request: Request<()>,
) -> (
    SendStream<Bytes>,
    h2::client::ResponseFuture,
    RecvStream,
    SendResponse<Bytes>,
) {
    let (near, far) = tokio::io::duplex(64 * 1024);
    let (client, server) = tokio::join!(h2::client::handshake(near), h2::server::handshake(far));
    let (sender, connection) = client.unwrap();
    tokio::spawn(connection);
    let mut server = server.unwrap();
    let (answer, send) = sender
        .ready()
        .await
        .unwrap()
        .send_request(request, false)
        .unwrap();
    let (request, respond) = server.accept().await.unwrap().unwrap();
    tokio::spawn(async move { poll_fn(|cx| server.poll_closed(cx)).await });
    (send, answer, request.into_body(), respond)
}

fn post() -> Request<()> {
    Request::post("http://a/").body(()).unwrap()
}

/// A body without end, or that fails.
struct Endless {
    taken: usize,
    fails: Option<BodyError>,
}

impl Body for Endless {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = self.get_mut();
        this.taken += 1;
        Poll::Ready(Some(match this.fails.take() {
            Some(error) => Err(error),
            None => Ok(Frame::data(Bytes::from(vec![0; 40_000]))),
        }))
    }
}

#[tokio::test]
async fn a_chunk_is_taken_from_its_source_when_the_one_before_it_has_been_handed_over() {
    let (send, _answer, mut received, _respond) = stream(post()).await;
    let body = Endless {
        taken: 0,
        fails: None,
    };
    let mut pump = Pump::new(send, body);
    let mut window = 0;
    while window < 65_535 {
        tokio::select! {
            biased;
            _ = poll_fn(|cx| pump.poll(cx)) => panic!("it has no end"),
            data = received.data() => window += data.unwrap().unwrap().len(),
        }
    }
    // One that fits the window, one that fits in part and one that waits.
    assert_eq!(pump.body.taken, 3);
    received.flow_control().release_capacity(window).unwrap();
    tokio::select! {
        biased;
        _ = poll_fn(|cx| pump.poll(cx)) => panic!("it has no end"),
        data = received.data() => assert!(data.unwrap().is_ok()),
    }
}

#[tokio::test]
async fn what_waits_for_its_window_when_the_last_chunk_was_handed_over_arrives_all_the_same() {
    for request_ended in [true, false] {
        let (mut send, answer, received, mut respond) = stream(post()).await;
        if request_ended {
            send.send_data(Bytes::new(), true).unwrap();
        }
        let out = respond.send_response(Response::new(()), false).unwrap();
        let whole = http_body_util::Full::new(Bytes::from(vec![1; 200_000]));
        let whole = http_body_util::BodyExt::map_err(whole, |never| match never {});
        let mut pump = Pump::new(out, whole);
        poll_fn(|cx| pump.poll(cx)).await;
        // As the task of a stream does when it has ended.
        drop((pump, respond, received));
        let (head, body) = answer.await.unwrap().into_parts();
        let mut body = Received::of_response(body, &head.headers, None, Watcher::Nobody);
        let mut got = 0;
        while let Some(frame) = poll_fn(|cx| body.poll_frame(cx)).await {
            got += frame.unwrap().into_data().unwrap().len();
        }
        assert_eq!(got, 200_000, "the request has ended: {request_ended}");
    }
}

#[tokio::test]
async fn a_body_that_fails_resets_its_stream_for_the_reason_that_it_brings() {
    let given: BodyError = Box::new(h2::Error::from(Reason::CANCEL));
    for (error, reason) in [
        (given, Reason::CANCEL),
        (BodyError::from("cut off"), Reason::INTERNAL_ERROR),
    ] {
        let (send, _answer, received, _respond) = stream(post()).await;
        let body = Endless {
            taken: 0,
            fails: Some(error),
        };
        let mut pump = Pump::new(send, body);
        poll_fn(|cx| pump.poll(cx)).await;
        let mut received = Received::of_response(received, &HeaderMap::new(), None, Watcher::Nobody);
        let told = poll_fn(|cx| received.poll_frame(cx)).await.unwrap();
        assert_eq!(told.unwrap_err().reason(), Some(reason));
        assert!(received.is_end_stream());
    }
}

#[tokio::test]
async fn what_is_reset_without_an_error_ends_there_unless_more_was_announced() {
    for announced in [None, Some(10)] {
        let (_send, answer, _received, mut respond) = stream(post()).await;
        let mut head = Response::builder();
        if let Some(length) = announced {
            head = head.header("content-length", length);
        }
        let mut body = respond.send_response(head.body(()).unwrap(), false).unwrap();
        body.send_data(Bytes::from_static(b"four"), false).unwrap();
        let (head, answered) = answer.await.unwrap().into_parts();
        let mut received = Received::of_response(answered, &head.headers, None, Watcher::Nobody);
        assert_eq!(received.size_hint().exact(), announced);
        let frame = poll_fn(|cx| received.poll_frame(cx)).await.unwrap().unwrap();
        assert_eq!(frame.into_data().unwrap(), "four");
        body.send_reset(Reason::NO_ERROR);
        let end = poll_fn(|cx| received.poll_frame(cx)).await;
        assert_eq!(end.is_some_and(|end| end.is_err()), announced.is_some());
    }
}

#[tokio::test]
async fn a_tunnel_carries_more_than_its_windows_both_ways_and_ends_by_halves() {
    let request = Request::connect("a:80").body(()).unwrap();
    let (send, answer, received, mut respond) = stream(request).await;
    let back = respond.send_response(Response::new(()), false).unwrap();
    let mut near = TunnelIo::new(send, answer.await.unwrap().into_body());
    let mut far = TunnelIo::new(back, received);
    let sent: Vec<u8> = (0..300_000u32).map(|at| at as u8).collect();
    let echo = async {
        let mut got = vec![0; sent.len()];
        far.read_exact(&mut got).await.unwrap();
        assert_eq!(far.read(&mut [0; 1]).await.unwrap(), 0, "its end");
        far.write_all(&got).await.unwrap();
        far.shutdown().await.unwrap();
    };
    let (read, write) = tokio::io::split(&mut near);
    let ask = async {
        let (mut read, mut write) = (read, write);
        write.write_all(&sent).await.unwrap();
        write.shutdown().await.unwrap();
        assert_eq!(
            write.write(b"x").await.unwrap_err().kind(),
            io::ErrorKind::BrokenPipe
        );
        let mut got = Vec::new();
        read.read_to_end(&mut got).await.unwrap();
        got
    };
    let ((), got) = tokio::join!(echo, ask);
    assert!(got == sent);
}

#[test]
fn what_http2_does_not_know_is_not_sent() {
    let headers = || {
        let mut headers = HeaderMap::new();
        for name in ["connection", "keep-alive", "upgrade", "x-own", "accept"] {
            headers.insert(name, http::HeaderValue::from_static("x-own"));
        }
        headers.insert("te", http::HeaderValue::from_static("trailers, gzip"));
        headers
    };
    let names = |request| {
        let mut headers = headers();
        strip(&mut headers, request);
        let mut names: Vec<_> = headers.keys().map(|name| name.as_str().to_owned()).collect();
        names.sort();
        names
    };
    assert_eq!(names(true), ["accept", "te"]);
    assert_eq!(names(false), ["accept"]);
}
