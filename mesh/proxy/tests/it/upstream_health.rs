//! Active health checks against real servers: HTTP, TCP, gRPC.

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};

use bytes::Bytes;
use http::{Response, StatusCode};
use http_body_util::{BodyExt, Full, StreamBody};
use serin_proxy::control::health;
use serin_xds::ResourceType;
use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::envoy::config::core::v3::health_check as pb;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_util::sync::CancellationToken;

use crate::fixture::*;

fn check(checker: pb::HealthChecker) -> core::HealthCheck {
    core::HealthCheck {
        timeout: millis(2000),
        interval: millis(10),
        no_traffic_interval: millis(10),
        unhealthy_threshold: number(2),
        healthy_threshold: number(2),
        health_checker: Some(checker),
        ..Default::default()
    }
}

fn http_check() -> core::HealthCheck {
    check(pb::HealthChecker::HttpHealthCheck(pb::HttpHealthCheck {
        path: "/healthz".into(),
        host: "checked.example".into(),
        ..Default::default()
    }))
}

/// A proxy whose cluster `c` has the check, with health checking running.
async fn serving(
    check: core::HealthCheck,
    endpoints: &[std::net::SocketAddr],
) -> (Harness, std::net::SocketAddr, CancellationToken) {
    let harness = Harness::start();
    let mut cluster = eds_cluster("c");
    cluster.health_checks = vec![check];
    harness.put(ResourceType::Cluster, "c", &cluster).await;
    harness.endpoints("c", endpoints).await;
    let at = harness.serve(vec![prefix_route("/", to_cluster("c"))]).await;
    let cancel = CancellationToken::new();
    tokio::spawn(health::run(harness.proxy.clone(), cancel.clone()));
    (harness, at, cancel)
}

/// Waits until ten requests in a row were answered by exactly those.
async fn served_by(at: std::net::SocketAddr, wanted: &[&str]) {
    soon(&format!("service by {wanted:?} alone"), async {
        loop {
            let mut bodies = std::collections::BTreeSet::new();
            for _ in 0..20 {
                bodies.insert(get(at, "/").await.2);
            }
            if bodies.iter().map(String::as_str).eq(wanted.iter().copied()) {
                return;
            }
        }
    })
    .await;
}

/// Answers its name, and at `/healthz` the status that it is set to.
async fn checked(name: &'static str, health: u16) -> (Backend, Arc<AtomicU16>) {
    let status = Arc::new(AtomicU16::new(health));
    let now = status.clone();
    let backend = Backend::answering(move |seen| {
        let mut response = Response::new(Full::from(name));
        if seen.path == "/healthz" {
            *response.status_mut() = StatusCode::from_u16(now.load(Ordering::SeqCst)).unwrap();
        }
        response
    })
    .await;
    (backend, status)
}

#[tokio::test]
async fn a_host_that_fails_its_http_check_gets_no_requests_until_it_passes_again() {
    let (mut one, _) = checked("one", 200).await;
    let (two, health) = checked("two", 200).await;
    let (_harness, at, cancel) = serving(http_check(), &[one.address, two.address]).await;
    served_by(at, &["one", "two"]).await;
    let probe = loop {
        let seen = one.next().await;
        if seen.path == "/healthz" {
            break seen;
        }
    };
    assert_eq!(probe.headers["host"], "checked.example");
    assert_eq!(probe.headers["user-agent"], "Envoy/HC");
    health.store(503, Ordering::SeqCst);
    served_by(at, &["one"]).await;
    health.store(200, Ordering::SeqCst);
    served_by(at, &["one", "two"]).await;
    cancel.cancel();
}

#[tokio::test]
async fn a_host_where_nobody_listens_is_left_out_by_a_tcp_check() {
    let one = Backend::named("one").await;
    let gone = closed_port().await;
    let tcp = check(pb::HealthChecker::TcpHealthCheck(pb::TcpHealthCheck::default()));
    let two = Backend::named("two").await;
    let (_harness, at, cancel) = serving(tcp, &[one.address, two.address, gone]).await;
    served_by(at, &["one", "two"]).await;
    cancel.cancel();
}

#[tokio::test]
async fn a_tcp_check_sends_its_bytes_and_wants_the_answer() {
    let socket = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = socket.local_addr().unwrap();
    let (asked, mut questions) = tokio::sync::mpsc::channel(16);
    let server = tokio::spawn(async move {
        loop {
            let (mut stream, _) = socket.accept().await.unwrap();
            let mut question = [0; 4];
            stream.read_exact(&mut question).await.unwrap();
            stream.write_all(b"+PONG\r\n").await.unwrap();
            // Full when the test has seen enough.
            let _ = asked.try_send(question);
        }
    });
    let payload = |text: &str| pb::Payload {
        payload: Some(pb::payload::Payload::Text(text.into())),
    };
    let tcp = check(pb::HealthChecker::TcpHealthCheck(pb::TcpHealthCheck {
        send: Some(payload("50494e47")),
        receive: vec![payload("504f4e47")],
        ..Default::default()
    }));
    let (harness, _at, cancel) = serving(tcp, &[address]).await;
    assert_eq!(soon("a check", questions.recv()).await, Some(*b"PING"));
    soon("the host to be found healthy", async {
        let usable = || {
            harness.proxy.store(|store| {
                store
                    .clusters()
                    .filter_map(|slot| slot.endpoints())
                    .all(|set| set.all.iter().all(|endpoint| endpoint.usable(1)))
            })
        };
        while !usable() {
            questions.recv().await;
        }
    })
    .await;
    cancel.cancel();
    server.abort();
}

#[tokio::test]
async fn a_grpc_check_asks_the_health_service_and_believes_serving_only() {
    let status = Arc::new(AtomicU16::new(2));
    let (asked, mut questions) = tokio::sync::mpsc::channel(64);
    let socket = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = socket.local_addr().unwrap();
    let now = status.clone();
    let server = tokio::spawn(async move {
        loop {
            let (stream, _) = socket.accept().await.unwrap();
            let (now, asked) = (now.clone(), asked.clone());
            tokio::spawn(async move {
                let service =
                    hyper::service::service_fn(move |request: http::Request<hyper::body::Incoming>| {
                        let (now, asked) = (now.clone(), asked.clone());
                        async move {
                            let path = request.uri().path().to_owned();
                            let told = request.headers().get("x-check").cloned();
                            let body = request.into_body().collect().await.unwrap().to_bytes();
                            let _ = asked.try_send((path, body, told));
                            let message =
                                Bytes::from(vec![0, 0, 0, 0, 2, 8, now.load(Ordering::SeqCst) as u8]);
                            let mut trailers = http::HeaderMap::new();
                            trailers.insert("grpc-status", http::HeaderValue::from_static("0"));
                            let frames = [
                                Ok::<_, std::convert::Infallible>(http_body::Frame::data(message)),
                                Ok(http_body::Frame::trailers(trailers)),
                            ];
                            Ok::<_, std::convert::Infallible>(Response::new(StreamBody::new(
                                futures::stream::iter(frames),
                            )))
                        }
                    });
                let _ = hyper::server::conn::http2::Builder::new(hyper_util::rt::TokioExecutor::new())
                    .serve_connection(hyper_util::rt::TokioIo::new(stream), service)
                    .await;
            });
        }
    });
    let grpc = check(pb::HealthChecker::GrpcHealthCheck(pb::GrpcHealthCheck {
        service_name: "shop.Cart".into(),
        initial_metadata: vec![core::HeaderValueOption {
            header: Some(core::HeaderValue {
                key: "x-check".into(),
                value: "yes".into(),
                ..Default::default()
            }),
            ..Default::default()
        }],
        ..Default::default()
    }));
    let (harness, _at, cancel) = serving(grpc, &[address]).await;
    let (path, body, told) = soon("a check", questions.recv()).await.unwrap();
    assert_eq!(path, "/grpc.health.v1.Health/Check");
    assert_eq!(told.unwrap(), "yes");
    assert_eq!(&body[..], b"\0\0\0\0\x0b\x0a\x09shop.Cart");
    let usable = || {
        harness.proxy.store(|store| {
            store
                .clusters()
                .filter_map(|slot| slot.endpoints())
                .all(|set| set.all.iter().all(|endpoint| endpoint.usable(1)))
        })
    };
    questions.recv().await;
    assert!(!usable(), "NOT_SERVING is no pass");
    status.store(1, Ordering::SeqCst);
    soon("the host to be found healthy", async {
        while !usable() {
            questions.recv().await;
        }
    })
    .await;
    cancel.cancel();
    server.abort();
}

#[tokio::test]
async fn a_host_may_opt_out_of_checks_or_be_checked_at_another_port() {
    let (one, _) = checked("one", 500).await;
    let (two, _) = checked("two", 500).await;
    let (health, _) = checked("health", 200).await;
    let harness = Harness::start();
    let mut cluster = eds_cluster("c");
    cluster.health_checks = vec![http_check()];
    harness.put(ResourceType::Cluster, "c", &cluster).await;
    let mut assignment = assignment("c", &[(one.address, ""), (two.address, "")]);
    for (entry, (disable, port)) in assignment.endpoints[0]
        .lb_endpoints
        .iter_mut()
        .zip([(true, 0), (false, health.address.port())])
    {
        let Some(serin_xds::pb::envoy::config::endpoint::v3::lb_endpoint::HostIdentifier::Endpoint(endpoint)) =
            &mut entry.host_identifier
        else {
            panic!("an endpoint");
        };
        endpoint.health_check_config = Some(
            serin_xds::pb::envoy::config::endpoint::v3::endpoint::HealthCheckConfig {
                disable_active_health_check: disable,
                port_value: u32::from(port),
                ..Default::default()
            },
        );
    }
    harness.put(ResourceType::Endpoints, "c", &assignment).await;
    let at = harness.serve(vec![prefix_route("/", to_cluster("c"))]).await;
    let cancel = CancellationToken::new();
    tokio::spawn(health::run(harness.proxy.clone(), cancel.clone()));
    served_by(at, &["one", "two"]).await;
    assert!(health.hits() > 0);
    cancel.cancel();
}
