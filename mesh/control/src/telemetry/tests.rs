use proptest::prelude::*;
use serin_xds::pb::envoy::config::core::v3::Node;
use serin_xds::pb::envoy::service::metrics::v3::metrics_service_client::MetricsServiceClient;
use serin_xds::pb::envoy::service::metrics::v3::{StreamMetricsMessage, stream_metrics_message::Identifier};
use serin_xds::pb::io::prometheus::client::{Bucket, Counter, Histogram, LabelPair, Metric, MetricFamily};
use tokio::net::UnixListener;
use tokio::sync::mpsc;
use tokio_stream::wrappers::{ReceiverStream, UnixListenerStream};
use tokio_util::sync::CancellationToken;

use super::intake::Baseline;
use super::{DURATION_BOUNDS_MS, Reporter, Telemetry, WorkloadKey};

fn labels(extra: &[(&str, &str)]) -> Vec<LabelPair> {
    let mut all = vec![
        ("reporter", "destination"),
        ("destination_workload", "podinfo"),
        ("destination_workload_namespace", "prod"),
        ("destination_service_name", "podinfo"),
        ("destination_service_namespace", "prod"),
        ("destination_canonical_revision", "v2"),
        ("source_workload", "gateway"),
        ("source_workload_namespace", "istio-system"),
        ("response_code", "200"),
        ("response_flags", "-"),
    ];
    for (name, value) in extra {
        all.retain(|(other, _)| other != name);
        all.push((name, value));
    }
    all.into_iter()
        .map(|(name, value)| LabelPair {
            name: Some(name.into()),
            value: Some(value.into()),
        })
        .collect()
}

fn requests(series: &[(&[(&str, &str)], f64)]) -> MetricFamily {
    MetricFamily {
        name: Some("istio_requests_total".into()),
        metric: series
            .iter()
            .map(|(extra, value)| Metric {
                label: labels(extra),
                counter: Some(Counter {
                    value: Some(*value),
                    ..Counter::default()
                }),
                ..Metric::default()
            })
            .collect(),
        ..MetricFamily::default()
    }
}

/// A histogram with these observations.
fn durations(observed_ms: &[f64]) -> MetricFamily {
    let bucket = DURATION_BOUNDS_MS
        .into_iter()
        .chain([f64::INFINITY])
        .map(|bound| Bucket {
            cumulative_count: Some(observed_ms.iter().filter(|value| **value <= bound).count() as u64),
            upper_bound: Some(bound),
            ..Bucket::default()
        });
    let histogram = Histogram {
        bucket: bucket.collect(),
        sample_count: Some(observed_ms.len() as u64),
        sample_sum: Some(observed_ms.iter().sum()),
        ..Histogram::default()
    };
    MetricFamily {
        name: Some("istio_request_duration_milliseconds".into()),
        metric: vec![Metric {
            label: labels(&[]),
            histogram: Some(histogram),
            ..Metric::default()
        }],
        ..MetricFamily::default()
    }
}

fn total(baseline: &mut Baseline, families: &[MetricFamily]) -> u64 {
    baseline
        .take(families)
        .iter()
        .map(|increment| increment.requests)
        .sum()
}

#[test]
fn the_first_message_is_the_baseline_and_each_later_one_counts_what_is_new() {
    let mut baseline = Baseline::default();
    assert_eq!(total(&mut baseline, &[requests(&[(&[], 100.0)])]), 0);
    assert_eq!(total(&mut baseline, &[requests(&[(&[], 130.0)])]), 30);
    assert_eq!(total(&mut baseline, &[requests(&[(&[], 130.0)])]), 0);
    // A series that was not there before is new as a whole.
    assert_eq!(
        total(&mut baseline, &[requests(&[(&[("response_code", "503")], 7.0)])]),
        7
    );
}

#[test]
fn a_counter_that_went_down_started_anew() {
    let mut baseline = Baseline::default();
    total(&mut baseline, &[requests(&[(&[], 100.0)])]);
    assert_eq!(total(&mut baseline, &[requests(&[(&[], 4.0)])]), 4);
    assert_eq!(total(&mut baseline, &[requests(&[(&[], f64::NAN)])]), 0);
}

#[test]
fn durations_are_increments_per_bucket() {
    let mut baseline = Baseline::default();
    baseline.take(&[durations(&[3.0])]);
    let increments = baseline.take(&[durations(&[3.0, 3.0, 40.0, 9e9])]);
    let new = &increments[0].durations;
    assert_eq!((new.counts[2], new.counts[5], new.counts[19]), (1, 1, 1));
    assert_eq!(new.counts.iter().sum::<u64>(), 3);
    assert_eq!(new.sum_ms, 43.0 + 9e9);
    // A restarted proxy's histogram is all new.
    let again = baseline.take(&[durations(&[3.0])]);
    assert_eq!(again[0].durations.counts[2], 1);
}

#[test]
fn the_order_of_labels_does_not_make_another_series() {
    let mut baseline = Baseline::default();
    total(&mut baseline, &[requests(&[(&[], 1.0)])]);
    let mut family = requests(&[(&[], 3.0)]);
    family.metric[0].label.reverse();
    assert_eq!(total(&mut baseline, &[family]), 2);
}

#[test]
fn errors_are_server_errors_missing_answers_and_grpc_statuses_but_not_callers_that_left() {
    let table: &[(&[(&str, &str)], bool)] = &[
        (&[], false),
        (&[("response_code", "404")], false),
        (&[("response_code", "500")], true),
        (&[("response_code", "503"), ("response_flags", "UH")], true),
        (&[("response_code", "0"), ("response_flags", "UF")], true),
        (&[("response_code", "0"), ("response_flags", "DC")], false),
        (&[("grpc_response_status", "14")], true),
        (&[("grpc_response_status", "5")], false),
        (&[("grpc_response_status", "0")], false),
    ];
    for (extra, error) in table {
        let mut baseline = Baseline::default();
        baseline.take(&[]);
        let increments = baseline.take(&[requests(&[(extra, 1.0)])]);
        assert_eq!(increments[0].dimensions.is_error(), *error, "{extra:?}");
    }
}

#[test]
fn a_proxy_with_too_many_series_costs_bounded_memory() {
    let mut baseline = Baseline::default();
    baseline.take(&[]);
    for index in 0..super::intake::MAX_SERIES + 5 {
        let revision = format!("v{index}");
        baseline.take(&[requests(&[(
            &[("destination_canonical_revision", &revision)],
            1.0,
        )])]);
    }
    assert_eq!(baseline.dropped(), 5);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn increments_add_up_to_what_was_counted_whatever_restarts_came_between(
        lives in proptest::collection::vec(proptest::collection::vec(0..50u32, 1..6), 1..5)
    ) {
        let mut baseline = Baseline::default();
        baseline.take(&[]);
        let (mut expected, mut counted, mut last) = (0u64, 0u64, 0u64);
        for life in lives {
            let mut value = 0u64;
            for gain in life {
                value += u64::from(gain);
                // A restart shows only as a lower value; one that has overtaken the old value meanwhile hides.
                expected += if value < last { value } else { value - last };
                last = value;
                counted += total(&mut baseline, &[requests(&[(&[], value as f64)])]);
            }
        }
        prop_assert_eq!(counted, expected);
    }
}

fn podinfo() -> WorkloadKey {
    WorkloadKey {
        namespace: "prod".into(),
        workload: "podinfo".into(),
        service: Some("podinfo-canary".into()),
    }
}

#[tokio::test(start_paused = true)]
async fn a_subscriber_gets_its_workloads_requests_once_and_those_that_never_arrived() {
    let telemetry = Telemetry::new();
    let cancel = CancellationToken::new();
    let runner = tokio::spawn({
        let (telemetry, cancel) = (telemetry.clone(), cancel.clone());
        async move { telemetry.run(cancel).await }
    });
    let mut samples = telemetry.subscribe(podinfo());
    let mut proxies = [Baseline::default(), Baseline::default()];
    let mut from = 4_000;
    for baseline in &mut proxies {
        baseline.take(&[]);
        telemetry.add(
            baseline.take(&[
                requests(&[
                    (&[], 90.0),
                    (&[("response_code", "500")], 10.0),
                    (&[("destination_workload", "other")], 1000.0),
                    (
                        &[
                            ("reporter", "source"),
                            ("destination_workload", "unknown"),
                            ("destination_service_name", "podinfo-canary"),
                            ("response_code", "503"),
                            ("response_flags", "UH"),
                        ],
                        5.0,
                    ),
                ]),
                durations(&[3.0, 3.0]),
            ]),
            from,
        );
        from += 500;
    }
    let sample = samples.recv().await.unwrap();
    assert_eq!(sample.from_ms, 4_000, "as far back as the earliest report in it");
    assert_eq!(sample.requests_and_errors(Reporter::Destination), (200, 20));
    assert_eq!(sample.requests_and_errors(Reporter::Source), (10, 10));
    let observed: u64 = sample
        .rows
        .iter()
        .map(|row| row.durations.counts.iter().sum::<u64>())
        .sum();
    assert_eq!(observed, 4);
    assert_eq!(&*sample.rows[0].dimensions.revision, "v2");

    // Nothing twice: the next sample has only what is new.
    telemetry.add(proxies[0].take(&[requests(&[(&[], 91.0)])]), 5_000);
    let next = samples.recv().await.unwrap();
    assert_eq!(next.from_ms, 5_000);
    assert_eq!(next.requests_and_errors(Reporter::Destination), (1, 0));
    drop(samples);
    telemetry.add(proxies[0].take(&[requests(&[(&[], 95.0)])]), 6_000);
    tokio::time::sleep(std::time::Duration::from_secs(1)).await;
    assert!(
        telemetry.shared.state.lock().subscriptions.is_empty(),
        "a dropped subscription is forgotten"
    );
    cancel.cancel();
    runner.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_subscriber_that_does_not_read_finds_everything_later() {
    let telemetry = Telemetry::new();
    let cancel = CancellationToken::new();
    let runner = tokio::spawn({
        let (telemetry, cancel) = (telemetry.clone(), cancel.clone());
        async move { telemetry.run(cancel).await }
    });
    let mut samples = telemetry.subscribe(podinfo());
    let mut baseline = Baseline::default();
    baseline.take(&[]);
    for second in 1..=30 {
        telemetry.add(baseline.take(&[requests(&[(&[], f64::from(second))])]), 0);
        tokio::time::sleep(std::time::Duration::from_secs(1)).await;
    }
    let mut counted = 0;
    while counted < 30 {
        counted += samples
            .recv()
            .await
            .unwrap()
            .requests_and_errors(Reporter::Destination)
            .0;
    }
    assert_eq!(counted, 30);
    cancel.cancel();
    runner.await.unwrap();
}

#[tokio::test]
async fn a_proxy_that_comes_back_goes_on_where_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("xds.sock");
    let telemetry = Telemetry::new();
    let cancel = CancellationToken::new();
    let tasks = tokio_util::task::TaskTracker::new();
    let incoming = UnixListenerStream::new(UnixListener::bind(&socket).unwrap());
    let router = tonic::transport::Server::builder().add_service(telemetry.service(cancel.clone()));
    let shutdown = cancel.clone().cancelled_owned();
    tasks.spawn(async move {
        router
            .serve_with_incoming_shutdown(incoming, shutdown)
            .await
            .unwrap()
    });
    let run = (telemetry.clone(), cancel.clone());
    tasks.spawn(async move { run.0.run(run.1).await });
    let mut samples = telemetry.subscribe(podinfo());

    let endpoint = serin_xds::client::Endpoint::Unix(socket);
    let mut counted = 0;
    // 5 requests before the first stream are history; 3 on it, 2 while away and 1 on the second stream are not.
    for values in [[5.0, 8.0], [10.0, 11.0]] {
        let channel = serin_xds::client::channel(&endpoint).await.unwrap();
        let (sender, receiver) = mpsc::channel(4);
        let mut client = MetricsServiceClient::new(channel);
        let call = tokio::spawn(async move { client.stream_metrics(ReceiverStream::new(receiver)).await });
        let node = Node {
            id: "sidecar~10.0.0.1~p.prod~x".into(),
            ..Node::default()
        };
        let mut identifier = Some(Identifier { node: Some(node) });
        for value in values {
            let envoy_metrics = vec![requests(&[(&[], value)])];
            sender
                .send(StreamMetricsMessage {
                    identifier: identifier.take(),
                    envoy_metrics,
                })
                .await
                .unwrap();
        }
        drop(sender);
        call.await.unwrap().unwrap();
    }
    let deadline = tokio::time::sleep(std::time::Duration::from_secs(20));
    tokio::pin!(deadline);
    while counted < 6 {
        tokio::select! {
            sample = samples.recv() => counted += sample.unwrap().requests_and_errors(Reporter::Destination).0,
            () = &mut deadline => panic!("only {counted} of 6 requests arrived"),
        }
    }
    assert_eq!(counted, 6);
    cancel.cancel();
    tasks.close();
    tasks.wait().await;
}

#[tokio::test]
async fn a_stream_that_does_not_say_whose_it_is_is_refused() {
    let telemetry = Telemetry::new();
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("xds.sock");
    let incoming = UnixListenerStream::new(UnixListener::bind(&socket).unwrap());
    let cancel = CancellationToken::new();
    let shutdown = cancel.clone().cancelled_owned();
    let router = tonic::transport::Server::builder().add_service(telemetry.service(cancel.clone()));
    let server = tokio::spawn(async move { router.serve_with_incoming_shutdown(incoming, shutdown).await });
    let channel = serin_xds::client::channel(&serin_xds::client::Endpoint::Unix(socket))
        .await
        .unwrap();
    let messages = futures::stream::iter([StreamMetricsMessage::default()]);
    let status = MetricsServiceClient::new(channel)
        .stream_metrics(messages)
        .await
        .unwrap_err();
    assert_eq!(status.code(), tonic::Code::InvalidArgument);
    cancel.cancel();
    server.await.unwrap().unwrap();
}
