//! Requests on their way, and answers that do not wait for them.

use super::*;

#[tokio::test]
async fn a_request_is_written_with_what_is_ready_of_its_body_in_one_piece() {
    locally(async {
        let mut pair = Pair::new().await;
        let body = UpstreamBody::Full(Some(Bytes::from_static(b"hello")));
        let mut answering = pin!(pair.handle.send(&mut request(body), None));
        assert!(look(answering.as_mut()).is_pending());
        assert_eq!(pair.heard(), "POST /x HTTP/1.1\r\ncontent-length: 5\r\n\r\nhello");
    })
    .await;
}

#[tokio::test]
async fn an_early_answer_is_read_while_the_request_goes_on_and_the_connection_serves_again_when_it_is_sent() {
    locally(async {
        let mut pair = Pair::new().await;
        let (sender, messages) = mpsc::channel(4);
        let mut answering = pin!(
            pair.handle
                .send(&mut request(UpstreamBody::Messages(messages)), None)
        );
        assert!(look(answering.as_mut()).is_pending());
        assert!(pair.heard().ends_with("transfer-encoding: chunked\r\n\r\n"));
        pair.peer.write_all(SHORT.as_bytes()).unwrap();
        let answer = answering.await.unwrap();
        assert_eq!(pair.tasks.len(), 2, "the rest is sent by a task of its own");
        assert_eq!(text(answer.into_body()).await.unwrap(), "ok");
        assert!(pair.handle.rest() && !pair.handle.is_ready());
        sender.send(Bytes::from_static(b"more")).await.unwrap();
        drop(sender);
        while pair.tasks.len() > 1 {
            tokio::task::yield_now().await;
        }
        assert_eq!(pair.heard(), "4\r\nmore\r\n0\r\n\r\n");
        assert!(pair.handle.is_ready());
        assert_eq!(pair.exchange(SHORT).await, "ok");
    })
    .await;
}

#[tokio::test]
async fn an_answer_that_came_before_the_endpoint_stopped_reading_is_not_lost() {
    locally(async {
        // The head of the answer is read before the writing fails, or after.
        for late in [false, true] {
            let mut pair = Pair::new().await;
            let (sender, messages) = mpsc::channel(4);
            let mut answering = pin!(
                pair.handle
                    .send(&mut request(UpstreamBody::Messages(messages)), None)
            );
            assert!(look(answering.as_mut()).is_pending());
            pair.heard();
            let answer = SHORT.replace("200", "413");
            pair.peer.write_all(answer.as_bytes()).unwrap();
            if late {
                pair.peer.shutdown(std::net::Shutdown::Both).unwrap();
                sender.try_send(Bytes::from_static(b"more")).unwrap();
                assert!(look(answering.as_mut()).is_pending());
                assert!(pair.handle.conn.state.borrow().unwritten.is_some());
            }
            let answer = answering.await.unwrap();
            assert_eq!(answer.status(), StatusCode::PAYLOAD_TOO_LARGE);
            if !late {
                pair.peer.shutdown(std::net::Shutdown::Both).unwrap();
                sender.try_send(Bytes::from_static(b"more")).unwrap();
                while pair.tasks.len() > 1 {
                    tokio::task::yield_now().await;
                }
            }
            assert_eq!(text(answer.into_body()).await.unwrap(), "ok");
            assert!(!pair.handle.rest());
        }
    })
    .await;
}

/// The body of a request that breaks off when its source is let go.
async fn breaking() -> (Rc<RefCell<RequestSource>>, UpstreamBody, Pair) {
    // Of a client that sends nothing.
    let other = Pair::new().await;
    let framing = crate::http1::decode::Framing::Length(9);
    let incoming = Incoming::Answer(Body::new(other.handle.conn.clone(), framing));
    let source = RequestSource::new(Inbound::new(incoming), 0, None);
    let body = UpstreamBody::stream(&source);
    (source, body, other)
}

#[tokio::test]
async fn a_request_that_breaks_off_ends_the_connection_and_its_answer() {
    locally(async {
        let pair = Pair::new().await;
        let (source, body, _client) = breaking().await;
        let mut answering = pin!(pair.handle.send(&mut request(body), None));
        assert!(look(answering.as_mut()).is_pending());
        source.borrow_mut().let_go();
        assert!(matches!(failure(answering.await), (Error::Body(_), false)));
        pair.is_closed_soon().await;

        let mut pair = Pair::new().await;
        let (source, body, _client) = breaking().await;
        let mut answering = pin!(pair.handle.send(&mut request(body), None));
        assert!(look(answering.as_mut()).is_pending());
        pair.heard();
        let answer = "HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nok";
        pair.peer.write_all(answer.as_bytes()).unwrap();
        let answer = answering.await.unwrap();
        let mut reading = pin!(text(answer.into_body()));
        assert!(look(reading.as_mut()).is_pending());
        tokio::task::yield_now().await;
        source.borrow_mut().let_go();
        let read = tokio::time::timeout(Duration::from_secs(10), reading).await;
        assert!(read.expect("woken").is_err());
        pair.is_closed_soon().await;
    })
    .await;
}

#[tokio::test]
async fn interim_answers_are_told_in_order_and_not_kept() {
    const COUNT: usize = 10_000;
    locally(async {
        let pair = Pair::new().await;
        let told = Arc::new(AtomicUsize::new(0));
        let tell: Tell = {
            let told = told.clone();
            Box::new(move |status, _| {
                assert_eq!(status, StatusCode::EARLY_HINTS);
                told.fetch_add(1, Ordering::Relaxed);
            })
        };
        let mut answering = pin!(pair.handle.send(&mut request(UpstreamBody::Empty), Some(tell)));
        assert!(look(answering.as_mut()).is_pending());
        let mut peer = pair.peer.try_clone().unwrap();
        let endpoint = std::thread::spawn(move || {
            let hints = "HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n";
            for _ in 0..COUNT {
                peer.write_all(hints.as_bytes()).unwrap();
            }
            peer.write_all(SHORT.as_bytes()).unwrap();
        });
        let answer = poll_fn(|cx| {
            let polled = answering.as_mut().poll(cx);
            assert!(pair.handle.conn.state.borrow().input.buf.len() < 64 * 1024);
            polled
        });
        assert_eq!(text(answer.await.unwrap().into_body()).await.unwrap(), "ok");
        endpoint.join().unwrap();
        assert_eq!(told.load(Ordering::Relaxed), COUNT);
        assert!(pair.handle.rest());
    })
    .await;
}

#[tokio::test]
async fn a_body_of_any_length_arrives_whole_however_slowly_it_is_taken() {
    locally(async {
        for length in [1, 4 * 1024, 4 * 1024 + 1, 40 * 1024, 3_000_000] {
            let mut pair = Pair::new().await;
            let sent: Vec<u8> = (0..length).map(|at| (at % 251) as u8).collect();
            let mut peer = pair.peer.try_clone().unwrap();
            let endpoint = std::thread::spawn(move || {
                let (mut heard, mut bytes) = (Vec::new(), [0; 5000]);
                let begin = |heard: &[u8]| heard.windows(4).position(|window| window == b"\r\n\r\n");
                while begin(&heard).is_none_or(|at| heard.len() < at + 4 + length) {
                    let count = peer.read(&mut bytes).unwrap();
                    heard.extend_from_slice(&bytes[..count]);
                }
                peer.write_all(SHORT.as_bytes()).unwrap();
                heard
            });
            let body = UpstreamBody::Full(Some(sent.clone().into()));
            let answer = pair.handle.send(&mut request(body), None).await.unwrap();
            assert_eq!(text(answer.into_body()).await.unwrap(), "ok");
            assert!(endpoint.join().unwrap().ends_with(&sent));
            assert!(pair.handle.rest() && pair.handle.is_ready());
            // The body has let nothing wait.
            assert_eq!(pair.exchange(SHORT).await, "ok");
        }
    })
    .await;
}

#[tokio::test]
async fn an_answer_that_comes_in_two_parts_is_read_as_one_that_comes_whole() {
    const ANSWER: &[u8] = b"HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\nHTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n\
        3;x=1\r\nabc\r\n2\r\nde\r\n0\r\nafter: 1\r\n\r\n";
    locally(async {
        let mut pair = Pair::new().await;
        for cut in 1..ANSWER.len() {
            let answering = pair.get();
            let reading = tokio::task::spawn_local(async move {
                let body = answering.await.unwrap().into_body().collect().await.unwrap();
                let trailers = body.trailers().cloned();
                (body.to_bytes(), trailers)
            });
            tokio::task::yield_now().await;
            pair.heard();
            pair.peer.write_all(&ANSWER[..cut]).unwrap();
            for _ in 0..3 {
                tokio::task::yield_now().await;
            }
            pair.peer.write_all(&ANSWER[cut..]).unwrap();
            let (body, trailers) = reading.await.unwrap();
            assert_eq!(body, "abcde", "{cut}");
            assert_eq!(trailers.unwrap()["after"], "1", "{cut}");
            assert!(pair.handle.rest() && pair.handle.is_ready());
        }
    })
    .await;
}
