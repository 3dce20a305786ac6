//! How often a server that misbehaves is tried again, in simulated time over connections in memory.

use std::time::Duration;

use serin_xds::ResourceType;
use serin_xds::client::{
    AdsClient, AdsClientConfig, BackoffRange, Dialer, Endpoint, Interest, Io, STABLE_AFTER,
};
use serin_xds::pb::envoy::service::discovery::v3::DeltaDiscoveryResponse;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::scripted::service;

/// What the server does with each stream.
#[derive(Clone, Copy, Debug)]
enum Manner {
    /// Answers once, goes on for that long, and breaks off.
    BreaksOffAfter(Duration),
    /// Does not even open the stream.
    NeverAnswers,
}

/// When a client tried to connect, the first `count` times.
async fn attempts(manner: Manner, count: usize) -> Vec<Duration> {
    let (dialed, mut dials) = mpsc::unbounded_channel();
    let (accept, mut accepted) = mpsc::unbounded_channel();
    let (service, mut streams) = service(!matches!(manner, Manner::NeverAnswers));
    let answering = tokio::spawn(async move {
        while let (Some(stream), Manner::BreaksOffAfter(time)) = (streams.recv().await, manner) {
            let first = DeltaDiscoveryResponse {
                type_url: ResourceType::Cluster.type_url().into(),
                nonce: "1".into(),
                ..Default::default()
            };
            let _ = stream.responses.send(Ok(first));
            tokio::time::sleep(time).await;
        }
    });
    let server = tokio::spawn(
        tonic::transport::Server::builder()
            .add_service(service)
            .serve_with_incoming(futures::stream::poll_fn(move |cx| {
                accepted
                    .poll_recv(cx)
                    .map(|next| next.map(Ok::<_, std::io::Error>))
            })),
    );
    let began = Instant::now();
    let dialer = Dialer::new("memory", move || {
        let (near, far) = tokio::io::duplex(1 << 16);
        let _ = dialed.send(began.elapsed());
        let _ = accept.send(far);
        Box::pin(async move { Ok(Box::new(near) as Box<dyn Io>) })
    });
    let cancel = CancellationToken::new();
    let config = AdsClientConfig {
        endpoint: Endpoint::Dialed(dialer),
        node: Default::default(),
        backoff: BackoffRange::default(),
    };
    let (client, mut deliveries) = AdsClient::spawn(config, cancel.clone());
    client.set_interest(ResourceType::Cluster, Interest::all());
    let taking = tokio::spawn(async move {
        while let Some(delivery) = deliveries.recv().await {
            delivery.accept();
        }
    });
    let mut out = Vec::new();
    while out.len() < count {
        out.push(dials.recv().await.unwrap());
    }
    cancel.cancel();
    client.join().await;
    taking.await.unwrap();
    server.abort();
    answering.abort();
    out
}

fn gaps(times: &[Duration]) -> Vec<Duration> {
    times
        .windows(2)
        .map(|pair| pair[1].saturating_sub(pair[0]))
        .collect()
}

#[tokio::test(start_paused = true)]
async fn a_server_that_answers_and_breaks_off_is_waited_for_longer_and_longer_and_never_in_step() {
    let manner = Manner::BreaksOffAfter(Duration::ZERO);
    let (one, other) = (attempts(manner, 16).await, attempts(manner, 16).await);
    for times in [&one, &other] {
        let gaps = gaps(times);
        assert!(
            gaps.iter().all(|gap| *gap <= Duration::from_secs(31)),
            "waits are bounded: {gaps:?}"
        );
        // From the seventh failure on the ceiling is 30 s, of which at least a tenth is waited.
        assert!(
            gaps[7..].iter().all(|gap| *gap >= Duration::from_secs(3)),
            "a storm: {gaps:?}"
        );
    }
    assert_ne!(gaps(&one), gaps(&other), "waits are drawn");
}

#[tokio::test(start_paused = true)]
async fn after_a_stream_that_lasted_the_next_attempt_comes_at_once() {
    let lived = STABLE_AFTER + Duration::from_secs(1);
    let times = attempts(Manner::BreaksOffAfter(lived), 8).await;
    for gap in gaps(&times) {
        assert!(
            gap <= lived + Duration::from_millis(600),
            "{gap:?} after a stream of {lived:?}"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn a_server_that_never_opens_the_stream_is_left_and_tried_again() {
    let times = attempts(Manner::NeverAnswers, 4).await;
    for gap in gaps(&times) {
        assert!(
            gap >= Duration::from_secs(20) && gap <= Duration::from_secs(51),
            "{gap:?}"
        );
    }
}
