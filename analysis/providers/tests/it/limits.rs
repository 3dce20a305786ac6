//! Deadlines, retries, bounds, certificates, redirects.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use rustls::ServerConfig;
use rustls::pki_types::PrivatePkcs8KeyDer;
use serde_json::json;
use serin_providers::{ANSWER_MAX, Config, Connector, Environment, Error, Limits};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;

use crate::server::{Server, ok};
use crate::{ask, config, query};

fn one() -> String {
    json!({"status": "success", "data": {"resultType": "vector", "result": [{"value": [1, "1"]}]}})
        .to_string()
}

/// Answers the first `failures` requests with a status.
async fn failing(status: u16, failures: usize) -> Server {
    let count = AtomicUsize::new(0);
    Server::start(move |_| {
        if count.fetch_add(1, Ordering::SeqCst) < failures {
            (
                status,
                vec![("retry-after", "0".to_owned())],
                "not now".to_owned(),
            )
        } else {
            ok(one())
        }
    })
    .await
}

#[tokio::test]
async fn what_passes_is_tried_again_and_what_does_not_is_not() {
    let server = failing(503, 2).await;
    assert_eq!(
        query(&config("prometheus", &server.address, &[]), "q")
            .await
            .unwrap(),
        1.0
    );
    assert_eq!(server.seen().len(), 3);
    let server = failing(429, 3).await;
    let error = query(&config("prometheus", &server.address, &[]), "q")
        .await
        .unwrap_err();
    assert!(matches!(error, Error::Status { status: 429, .. }), "{error}");
    assert_eq!(server.seen().len(), 3);
    for status in [400, 401, 403, 404, 500] {
        let server = failing(status, 1).await;
        let error = query(&config("prometheus", &server.address, &[]), "q")
            .await
            .unwrap_err();
        assert!(
            matches!(&error, Error::Status { excerpt, .. } if excerpt == "not now"),
            "{error}"
        );
        assert_eq!(server.seen().len(), 1, "{status}");
    }
}

#[tokio::test]
async fn retries_of_one_host_have_a_budget() {
    let server = failing(503, usize::MAX).await;
    let connector = Connector::new(Limits::default(), Environment::default(), None).unwrap();
    let config = config("prometheus", &server.address, &[]);
    for _ in 0..20 {
        connector.query(&config, &ask("q")).await.unwrap_err();
    }
    // 20 first attempts, and the ten retries of the budget.
    assert_eq!(server.seen().len(), 30);
}

#[tokio::test(start_paused = true)]
async fn a_provider_that_never_answers_is_given_up_at_its_deadline() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let error = query(&config("prometheus", &address, &[]), "q")
        .await
        .unwrap_err();
    assert!(matches!(error, Error::Timeout { seconds: 5, .. }), "{error}");
    let error = query(&config("influxdb", &address, &[]), "q").await.unwrap_err();
    assert!(matches!(error, Error::Timeout { seconds: 15, .. }), "{error}");
}

#[tokio::test]
async fn a_provider_that_is_not_there_is_named_without_the_query() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    drop(listener);
    let error = query(&config("prometheus", &address, &[]), "hush{a=\"b\"}")
        .await
        .unwrap_err();
    let text = error.to_string();
    assert!(matches!(error, Error::Unreachable { .. }), "{text}");
    assert!(
        text.contains(address.trim_start_matches("http://")) && !text.contains("hush"),
        "{text}"
    );
}

#[tokio::test]
async fn an_answer_without_end_is_cut_off() {
    let server = Server::start(|_| ok("x".repeat(ANSWER_MAX + 1))).await;
    let error = query(&config("prometheus", &server.address, &[]), "q")
        .await
        .unwrap_err();
    assert!(error.to_string().contains("longer than"), "{error}");
}

#[tokio::test]
async fn a_secret_that_the_answer_repeats_is_not_in_the_error() {
    let server = Server::start(|seen| {
        (
            403,
            Vec::new(),
            format!("no: {}", seen.header("authorization")[0]),
        )
    })
    .await;
    let config = config("prometheus", &server.address, &[("token", "hush-hush")]);
    let text = query(&config, "q").await.unwrap_err().to_string();
    assert!(text.contains("Bearer ***") && !text.contains("hush"), "{text}");
}

#[tokio::test]
async fn credentials_do_not_follow_a_redirect_to_another_origin() {
    let other = Server::answering(one()).await;
    let target = format!("{}/api/v1/query", other.address);
    let server = Server::start(move |_| (302, vec![("location", target.clone())], String::new())).await;
    let config = config("prometheus", &server.address, &[("token", "hush-hush")]);
    let error = query(&config, "q").await.unwrap_err();
    assert!(error.to_string().contains("redirect"), "{error}");
    assert!(other.seen().is_empty());
    let server = Server::start(|seen| match seen.path.as_str() {
        "/moved" => ok(one()),
        _ => (307, vec![("location", "/moved".to_owned())], String::new()),
    })
    .await;
    assert_eq!(
        query(&crate::config("prometheus", &server.address, &[]), "q")
            .await
            .unwrap(),
        1.0
    );
}

#[tokio::test]
async fn requests_to_one_host_are_bounded() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let (open, highest) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let (arrived, release) = (Arc::new(Notify::new()), Arc::new(tokio::sync::Semaphore::new(0)));
    let mut tasks = JoinSet::new();
    let (counting, peak, told, gate) = (open.clone(), highest.clone(), arrived.clone(), release.clone());
    tasks.spawn(async move {
        let mut connections = JoinSet::new();
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let (counting, peak, told, gate) = (counting.clone(), peak.clone(), told.clone(), gate.clone());
            connections.spawn(async move {
                let mut buffer = [0; 4096];
                // One read is one request: they are short.
                while stream.read(&mut buffer).await.unwrap_or(0) > 0 {
                    peak.fetch_max(counting.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                    told.notify_one();
                    gate.acquire().await.unwrap().forget();
                    counting.fetch_sub(1, Ordering::SeqCst);
                    let body = one();
                    let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len());
                    stream.write_all(head.as_bytes()).await.unwrap();
                }
            });
        }
    });
    let limits = Limits {
        requests: 10,
        requests_per_host: 2,
    };
    let connector = Connector::new(limits, Environment::default(), None).unwrap();
    let config = config("prometheus", &address, &[]);
    let mut queries = JoinSet::new();
    for _ in 0..6 {
        let (connector, config) = (connector.clone(), config.clone());
        queries.spawn(async move { connector.query(&config, &ask("q")).await.unwrap() });
    }
    arrived.notified().await;
    release.add_permits(6);
    assert_eq!(queries.join_all().await, [1.0; 6]);
    assert!(highest.load(Ordering::SeqCst) <= 2);
}

#[tokio::test]
async fn a_certificate_that_nobody_vouches_for_is_refused_unless_the_template_says_so() {
    let made = rcgen::generate_simple_self_signed(vec!["127.0.0.1".to_owned()]).unwrap();
    let key = PrivatePkcs8KeyDer::from(made.signing_key.serialize_der());
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let tls = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![made.cert.der().clone()], key.into())
        .unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("https://{}", listener.local_addr().unwrap());
    let acceptor = TlsAcceptor::from(Arc::new(tls));
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            // The client that does not trust us hangs up in the handshake.
            let Ok(mut stream) = acceptor.accept(stream).await else {
                continue;
            };
            let mut buffer = [0; 4096];
            if stream.read(&mut buffer).await.unwrap_or(0) > 0 {
                let body = one();
                let head = format!(
                    "HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}",
                    body.len()
                );
                stream.write_all(head.as_bytes()).await.unwrap();
                let _ = stream.shutdown().await;
            }
        }
    });
    let verifying = config("prometheus", &address, &[]);
    let error = query(&verifying, "q").await.unwrap_err();
    assert!(
        error.to_string().to_lowercase().contains("certificate"),
        "{error}"
    );
    let trusting = Config {
        insecure_skip_verify: true,
        ..verifying
    };
    assert_eq!(query(&trusting, "q").await.unwrap(), 1.0);
}
