//! What is removed too early reaches no proxy before the rule that no longer names it.

use serin_xds::client::Delivery;
use tokio::sync::mpsc;

use super::*;

/// A proxy whose answers about virtual hosts are given by the test, from `hold` on; notes what it hears, in order.
struct Slow {
    heard: watch::Receiver<Vec<String>>,
    held: mpsc::UnboundedReceiver<Delivery>,
    hold: watch::Sender<bool>,
    client: AdsClient,
    consumer: tokio::task::JoinHandle<()>,
}

fn slow(socket: &Path, name: &str, cancel: &CancellationToken) -> Slow {
    let config = AdsClientConfig {
        endpoint: Endpoint::Unix(socket.into()),
        node: Node {
            id: format!("sidecar~10.1.0.9~{name}.prod~prod.svc.cluster.local"),
            client_features: vec![FEATURE_VHDS.into()],
            ..Node::default()
        },
        backoff: BackoffRange {
            initial: Duration::from_millis(10),
            max: Duration::from_millis(50),
        },
    };
    let (client, mut deliveries) = AdsClient::spawn(config, cancel.clone());
    for resource_type in ResourceType::ALL {
        client.set_interest(resource_type, Interest::all());
    }
    let (noted, heard) = watch::channel(Vec::new());
    let (to_test, held) = mpsc::unbounded_channel();
    let (hold, holding) = watch::channel(false);
    let consumer = tokio::spawn(async move {
        while let Some(delivery) = deliveries.recv().await {
            let kind = delivery.resource_type.abbreviation();
            noted.send_modify(|all| {
                all.extend(
                    delivery
                        .upserted
                        .iter()
                        .map(|one| format!("{kind} +{}", one.name)),
                );
                all.extend(delivery.removed.iter().map(|name| format!("{kind} -{name}")));
            });
            if delivery.resource_type == ResourceType::VirtualHost && *holding.borrow() {
                let _ = to_test.send(delivery);
            } else {
                delivery.accept();
            }
        }
    });
    Slow {
        heard,
        held,
        hold,
        client,
        consumer,
    }
}

fn subsets(api: &Api, generation: i64, names: &[&str]) {
    let subsets: Vec<Value> = names
        .iter()
        .map(|name| json!({"name": name, "labels": {"version": name}}))
        .collect();
    let spec = json!({"spec": {"host": "reviews", "subsets": subsets}});
    api.put(
        "destinationrules",
        "networking.istio.io/v1",
        "DestinationRule",
        "reviews",
        generation,
        spec,
    );
}

#[tokio::test]
async fn a_subset_removed_too_early_stays_with_each_proxy_until_that_proxy_has_the_rule_that_no_longer_names_it()
 {
    const GONE: &str = "CDS -outbound|9080|v2|reviews.prod.svc.cluster.local";
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("xds.sock");
    let api = world();
    subsets(&api, 1, &["v2"]);
    let to = |destination: Value| json!([{"route": [{"destination": destination}]}]);
    api.virtual_service(2, to(json!({"host": "reviews", "subset": "v2"})));
    let running = start(&api, &socket);
    let cancel = CancellationToken::new();
    let mut quick = slow(&socket, "quick", &cancel);
    let mut late = slow(&socket, "late", &cancel);
    running.until(2, |seen| seen.needed == 2 && seen.is_live()).await;

    late.hold.send_replace(true);
    subsets(&api, 2, &[]);
    // Whatever the control plane has to say of it has been said once a later change of another object has arrived.
    let other = json!({"spec": {"clusterIP": "10.96.0.11", "ports": [{"name": "http", "port": 9080, "protocol": "TCP"}]}});
    api.put("services", "v1", "Service", "other", 0, other);
    let deadline = Duration::from_secs(20);
    let heard = quick
        .heard
        .wait_for(|all| all.iter().any(|one| one.contains("+outbound|9080||other")));
    tokio::time::timeout(deadline, heard).await.unwrap().unwrap();
    assert!(
        !quick.heard.borrow().iter().any(|one| one == GONE),
        "rules name it still"
    );

    api.virtual_service(3, to(json!({"host": "reviews"})));
    let gone = quick.heard.wait_for(|all| all.iter().any(|one| one == GONE));
    tokio::time::timeout(deadline, gone).await.unwrap().unwrap();
    // The other one has been told of the rule and has not taken it yet.
    let mut waiting = Vec::new();
    while !waiting
        .iter()
        .any(|one: &Delivery| one.upserted.iter().any(|one| one.name.contains("reviews")))
    {
        waiting.push(
            tokio::time::timeout(deadline, late.held.recv())
                .await
                .unwrap()
                .unwrap(),
        );
        if waiting
            .last()
            .unwrap()
            .upserted
            .iter()
            .all(|one| !one.name.contains("reviews"))
        {
            waiting.pop().unwrap().accept();
        }
    }
    assert!(
        !late.heard.borrow().iter().any(|one| one == GONE),
        "it runs with the old rule"
    );
    late.hold.send_replace(false);
    waiting.into_iter().for_each(Delivery::accept);
    let gone = late.heard.wait_for(|all| all.iter().any(|one| one == GONE));
    tokio::time::timeout(deadline, gone).await.unwrap().unwrap();
    running.until(3, |seen| seen.needed == 2 && seen.is_live()).await;

    cancel.cancel();
    for proxy in [quick, late] {
        proxy.client.join().await;
        proxy.consumer.await.unwrap();
    }
    running.stop().await;
}
