use std::convert::Infallible;

use http_body_util::BodyExt;
use hyper_util::rt::TokioIo;
use tokio::io::AsyncWriteExt;

use super::*;
use crate::worker::incoming::Incoming;

/// A request's body, as only hyper can make it.
async fn incoming() -> Incoming {
    let (mut client, server) = tokio::io::duplex(1024);
    let (sender, mut received) = tokio::sync::mpsc::channel(1);
    let service = hyper::service::service_fn(move |request: http::Request<hyper::body::Incoming>| {
        let sender = sender.clone();
        async move {
            sender.send(request.into_body()).await.unwrap();
            std::future::pending::<Result<http::Response<String>, Infallible>>().await
        }
    });
    let connection = hyper::server::conn::http1::Builder::new();
    tokio::spawn(async move { connection.serve_connection(TokioIo::new(server), service).await });
    client
        .write_all(b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\n\r\n")
        .await
        .unwrap();
    Incoming::Http1(received.recv().await.unwrap())
}

async fn next(body: &mut UpstreamBody) -> Option<Bytes> {
    let frame = body.frame().await?.unwrap();
    Some(frame.into_data().unwrap())
}

#[tokio::test]
async fn an_answer_that_comes_before_a_repeated_body_was_sent_cuts_nothing_out_of_it() {
    let mut inbound = Inbound::new(incoming().await);
    inbound.ahead = ["a", "b", "c", "d"]
        .map(|text| Frame::data(Bytes::from(text)))
        .into();
    inbound.ended = true;
    let source = RequestSource::new(inbound, 100, None);
    let mut first = UpstreamBody::stream(&source);
    for expected in ["a", "b", "c"] {
        assert_eq!(next(&mut first).await.unwrap(), expected);
    }
    drop(first);
    let mut second = UpstreamBody::stream(&source);
    assert_eq!(next(&mut second).await.unwrap(), "a");
    source.borrow_mut().stop_keeping();
    for expected in ["b", "c", "d"] {
        assert_eq!(next(&mut second).await.unwrap(), expected);
    }
    assert_eq!(next(&mut second).await, None);
    assert!(source.borrow().kept.is_empty(), "and nothing is held any longer");
}
