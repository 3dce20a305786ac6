use std::convert::Infallible;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use tokio::net::TcpListener;

use super::*;

/// A server that speaks both protocols; `/bad` fails and `/flag` fails as a proxy would.
async fn server() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let service = service_fn(|request: Request<Incoming>| async move {
                    let answer = Response::builder().header("x-version", "1");
                    let answer = match request.uri().path() {
                        "/bad" => answer.status(500),
                        "/flag" => answer.status(503).header("x-serin-response-flags", "UH"),
                        _ => answer,
                    };
                    Ok::<_, Infallible>(answer.body(Full::new(Bytes::from_static(b"hello"))).unwrap())
                });
                let _ = auto::Builder::new(TokioExecutor::new())
                    .serve_connection(TokioIo::new(stream), service)
                    .await;
            });
        }
    });
    port
}

async fn run(path: &str, protocol: Protocol) -> Counters {
    let port = server().await;
    let mut plan = Plan::new(format!("http://127.0.0.1:{port}{path}").parse().unwrap(), 500.0).unwrap();
    plan.duration = Some(Duration::from_millis(100));
    plan.protocol = protocol;
    plan.group_by = Some(HeaderName::from_static("x-version"));
    Load::start(plan, CancellationToken::new())
        .finish()
        .await
        .unwrap()
}

#[tokio::test]
async fn every_request_of_the_schedule_is_sent_and_answered_over_both_protocols() {
    for protocol in [Protocol::Http1, Protocol::Http2] {
        let counters = run("/", protocol).await;
        assert_eq!((counters.sent, counters.answered), (50, 50), "{protocol:?}");
        assert_eq!(counters.failed_by_system_total(), 0);
        assert_eq!(counters.groups["1"].answered, 50);
    }
}

#[tokio::test]
async fn failures_are_attributed_to_the_application_or_to_the_system() {
    let counters = run("/bad", Protocol::Http1).await;
    assert_eq!(
        (counters.failed_by_app, counters.failed_by_system_total()),
        (50, 0)
    );
    assert!(counters.groups["1"].first_failure_us.is_some());
    let counters = run("/flag", Protocol::Http1).await;
    assert_eq!(counters.failed_by_system["UH"], 50);
    assert_eq!(counters.failed_by_app, 0);
}

#[tokio::test]
async fn a_server_that_is_not_there_is_the_systems_failure() {
    let mut plan = Plan::new("http://127.0.0.1:1/".parse().unwrap(), 100.0).unwrap();
    plan.duration = Some(Duration::from_millis(50));
    let counters = Load::start(plan, CancellationToken::new())
        .finish()
        .await
        .unwrap();
    assert_eq!(counters.failed_by_system["connect"], 5);
}

#[test]
fn a_url_without_a_host_and_a_rate_of_zero_are_refused() {
    assert!(Plan::new("/path".parse().unwrap(), 1.0).is_err());
    assert!(Plan::new("http://localhost/".parse().unwrap(), 0.0).is_err());
}
