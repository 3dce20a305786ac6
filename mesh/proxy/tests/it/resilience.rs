//! What happens when endpoints fail or are slow: what retries avoid and wait for, hedging, adaptive concurrency.

use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use http::Response;
use http_body_util::Full;
use serin_xds::ResourceType;
use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::envoy::config::route::v3 as route;
use serin_xds::pb::envoy::extensions::retry;
use serin_xds::pb::google::protobuf as google;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use crate::balancing::{answers, get_with, lb_endpoint, lb_metadata, localities, only, wanting};
use crate::fixture::*;

fn retries(count: u32) -> route::RetryPolicy {
    route::RetryPolicy {
        retry_on: "5xx".into(),
        num_retries: number(count),
        retry_back_off: Some(route::retry_policy::RetryBackOff {
            base_interval: millis(1),
            max_interval: millis(2),
        }),
        ..Default::default()
    }
}

fn with_retries(policy: route::RetryPolicy) -> route::RouteAction {
    route::RouteAction {
        retry_policy: Some(policy),
        ..to_cluster("c")
    }
}

#[tokio::test]
async fn a_retry_leaves_the_priority_that_failed_and_hosts_that_it_must_not_use() {
    let failing = Backend::answering(|_| status(503)).await;
    let good = Backend::named("good").await;
    let harness = Harness::start();
    harness.put(ResourceType::Cluster, "c", &eds_cluster("c")).await;
    let by_priority = localities(
        "c",
        vec![
            (0, "a", vec![lb_endpoint(failing.address, None)]),
            (1, "a", vec![lb_endpoint(good.address, None)]),
        ],
    );
    harness.put(ResourceType::Endpoints, "c", &by_priority).await;
    let leaving = route::RetryPolicy {
        retry_priority: Some(route::retry_policy::RetryPriority {
            name: "envoy.retry_priorities.previous_priorities".into(),
            config_type: Some(route::retry_policy::retry_priority::ConfigType::TypedConfig(any(
                &retry::priority::previous_priorities::v3::PreviousPrioritiesConfig { update_frequency: 1 },
            ))),
        }),
        ..retries(1)
    };
    let predicate = |name: &str, config: Option<google::Any>| route::retry_policy::RetryHostPredicate {
        name: name.into(),
        config_type: config.map(route::retry_policy::retry_host_predicate::ConfigType::TypedConfig),
    };
    let omitting = route::RetryPolicy {
        retry_host_predicate: vec![predicate(
            "envoy.retry_host_predicates.omit_host_metadata",
            Some(any(
                &retry::host::omit_host_metadata::v3::OmitHostMetadataConfig {
                    metadata_match: lb_metadata(&[("stage", "bad")]),
                },
            )),
        )],
        host_selection_retry_max_attempts: 10,
        ..retries(1)
    };
    let at = harness
        .serve(vec![
            wanting("leave", with_retries(leaving)),
            wanting("stay", with_retries(retries(1))),
            wanting("omit", with_retries(omitting)),
        ])
        .await;
    assert_eq!(answers(at, &[("x-want", "leave")], 10).await, only("good", 10));
    assert_eq!(answers(at, &[("x-want", "stay")], 10).await, only("503", 10));
    // Now both are of one priority, and the failing one is marked.
    let marked = localities(
        "c",
        vec![(
            0,
            "a",
            vec![
                lb_endpoint(failing.address, lb_metadata(&[("stage", "bad")])),
                lb_endpoint(good.address, None),
            ],
        )],
    );
    harness.put(ResourceType::Endpoints, "c", &marked).await;
    assert_eq!(answers(at, &[("x-want", "omit")], 20).await, only("good", 20));
}

#[tokio::test]
async fn a_retry_waits_for_as_long_as_the_response_asks() {
    let busy = Backend::answering(|_| {
        let mut response = Response::new(Full::<Bytes>::from(""));
        *response.status_mut() = http::StatusCode::TOO_MANY_REQUESTS;
        response
            .headers_mut()
            .insert("x-envoy-ratelimited", http::HeaderValue::from_static("true"));
        response
            .headers_mut()
            .insert("retry-after", http::HeaderValue::from_static("100"));
        response
    })
    .await;
    let harness = Harness::start();
    harness.cluster("c", &[busy.address]).await;
    let waiting = |header: &str| route::RouteAction {
        timeout: millis(300),
        ..with_retries(route::RetryPolicy {
            retry_on: "envoy-ratelimited".into(),
            rate_limited_retry_back_off: Some(route::retry_policy::RateLimitedRetryBackOff {
                reset_headers: vec![route::retry_policy::ResetHeader {
                    name: header.into(),
                    format: 0,
                }],
                ..Default::default()
            }),
            ..retries(2)
        })
    };
    let at = harness
        .serve(vec![
            wanting("asked", waiting("retry-after")),
            wanting("other", waiting("x-other")),
        ])
        .await;
    // A hundred seconds are more than the request has: one try, and then its time is over.
    let (code, _, _) = get_with(at, &[("x-want", "asked")]).await;
    assert_eq!((code, busy.hits()), (504, 1));
    // Without the field the usual back-off holds.
    let (code, _, _) = get_with(at, &[("x-want", "other")]).await;
    assert_eq!((code, busy.hits()), (429, 4));
}

/// A server whose answers are given by hand: each request comes out with the means to answer it.
async fn by_hand() -> (
    SocketAddr,
    tokio::sync::mpsc::UnboundedReceiver<tokio::sync::oneshot::Sender<&'static str>>,
) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = listener.local_addr().unwrap();
    let (sender, receiver) = tokio::sync::mpsc::unbounded_channel();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let sender = sender.clone();
            tokio::spawn(async move {
                let mut held = Vec::new();
                while !held.ends_with(b"\r\n\r\n") {
                    let mut chunk = [0; 1024];
                    match stream.read(&mut chunk).await {
                        Ok(0) | Err(_) => return,
                        Ok(count) => held.extend_from_slice(&chunk[..count]),
                    }
                }
                let (give, answer) = tokio::sync::oneshot::channel::<&'static str>();
                if sender.send(give).is_err() {
                    return;
                }
                let Ok(body) = answer.await else { return };
                let answer = format!(
                    "HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}",
                    body.len()
                );
                let _ = stream.write_all(answer.as_bytes()).await;
            });
        }
    });
    (at, receiver)
}

#[tokio::test]
async fn a_try_that_takes_too_long_is_hedged_and_the_first_answer_of_either_wins() {
    let (at_hand, mut requests) = by_hand().await;
    let harness = Harness::start();
    harness.cluster("c", &[at_hand]).await;
    let hedging = route::RouteAction {
        hedge_policy: Some(route::HedgePolicy {
            hedge_on_per_try_timeout: true,
            ..Default::default()
        }),
        ..with_retries(route::RetryPolicy {
            per_try_timeout: millis(60),
            ..retries(1)
        })
    };
    let at = harness.serve(vec![prefix_route("/", hedging)]).await;
    // The first try is still there when the second has begun: both can answer.
    for winner in [0, 1] {
        let client = tokio::spawn(async move { get(at, "/").await });
        let first = soon("the first try", requests.recv()).await.unwrap();
        let second = soon("the second beside it", requests.recv()).await.unwrap();
        assert!(!first.is_closed(), "the first goes on");
        let mut tries = [Some(first), Some(second)];
        tries[winner]
            .take()
            .unwrap()
            .send(["first", "second"][winner])
            .unwrap();
        let (code, _, body) = soon("the answer", client).await.unwrap();
        assert_eq!((code, body.as_str()), (200, ["first", "second"][winner]));
        assert!(requests.try_recv().is_err(), "one retry, one hedge");
    }
    assert_eq!(
        harness.counter("istio_requests_total", &[("response_code", "200")]),
        2.0
    );
}

#[tokio::test]
async fn adaptive_concurrency_lets_in_as_many_as_its_limit_and_refuses_the_others() {
    use pb::gradient_controller_config::{ConcurrencyLimitCalculationParams, MinimumRttCalculationParams};
    use serin_xds::pb::envoy::extensions::filters::http::adaptive_concurrency::v3 as pb;
    let (at_hand, mut requests) = by_hand().await;
    let harness = Harness::start();
    harness.cluster("c", &[at_hand]).await;
    harness.route_all_to("c").await;
    let mut manager = manager("80");
    manager.http_filters.insert(
        0,
        http_filter(
            "envoy.filters.http.adaptive_concurrency",
            Some(any(&pb::AdaptiveConcurrency {
                concurrency_controller_config: Some(
                    pb::adaptive_concurrency::ConcurrencyControllerConfig::GradientControllerConfig(
                        pb::GradientControllerConfig {
                            concurrency_limit_params: Some(ConcurrencyLimitCalculationParams {
                                concurrency_update_interval: millis(100),
                                ..Default::default()
                            }),
                            min_rtt_calc_params: Some(MinimumRttCalculationParams {
                                interval: millis(60_000),
                                min_concurrency: number(2),
                                ..Default::default()
                            }),
                            ..Default::default()
                        },
                    ),
                ),
                ..Default::default()
            })),
        ),
    );
    let at = harness.listen(&manager, core::TrafficDirection::Outbound).await;
    // The service is being measured: two at a time.
    let clients: Vec<_> = (0..2)
        .map(|_| tokio::spawn(async move { get(at, "/").await }))
        .collect();
    let held = [
        soon("the first", requests.recv()).await.unwrap(),
        soon("the second", requests.recv()).await.unwrap(),
    ];
    let (code, _, body) = get(at, "/").await;
    assert_eq!((code, body.as_str()), (503, "reached concurrency limit"));
    for give in held {
        give.send("done").unwrap();
    }
    for client in clients {
        assert_eq!(soon("an answer", client).await.unwrap().0, 200);
    }
    // Their places are free again.
    soon("another answer", async {
        loop {
            let client = tokio::spawn(async move { get(at, "/").await });
            tokio::select! {
                Some(give) = requests.recv() => {
                    give.send("done").unwrap();
                    assert_eq!(client.await.unwrap().0, 200);
                    return;
                }
                () = tokio::time::sleep(Duration::from_millis(20)) => {}
            }
        }
    })
    .await;
}
