use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use serin_xds::client::{AdsClient, AdsClientConfig, BackoffRange, Deliveries, Endpoint, Interest};
use serin_xds::pb::envoy::config::core::v3::Node;
use serin_xds::{Change, FEATURE_VHDS, Origin, Refusal, Resource, ResourceType};
use tokio::net::UnixListener;
use tokio::sync::mpsc;
use tokio_stream::wrappers::UnixListenerStream;
use tokio_util::sync::CancellationToken;

use super::{Applied, CHANGES, Input, Note, Pump, Verdict, World};
use crate::ledger::{Ledger, Liveness};
use crate::proxy_identity::Proxy;

/// A world in which each object is one virtual host for every proxy of its namespace.
#[derive(Default)]
struct Hosts(BTreeMap<(String, String), Arc<Resource>>);

/// `(namespace, name, generation, weight)`; no weight deletes.
type HostChange = (&'static str, &'static str, i64, Option<&'static str>);

impl World for Hosts {
    type Change = HostChange;
    type Touched = Vec<(String, Change)>;

    fn apply(&mut self, changes: Vec<HostChange>, _: Duration) -> Applied<Self::Touched> {
        let mut touched = Vec::new();
        let mut verdicts = Vec::new();
        for (namespace, name, generation, weight) in changes {
            let object: Arc<str> = format!("VirtualService/{namespace}/{name}").into();
            let key = (namespace.to_string(), name.to_string());
            match weight {
                Some("invalid") => {
                    verdicts.push(Verdict::Refused {
                        object,
                        generation,
                        reason: "weights sum to zero".into(),
                    });
                }
                Some(weight) => {
                    let origins = [Origin {
                        object: object.clone(),
                        generation,
                    }];
                    let body = weight.as_bytes().to_vec().into();
                    let resource = Arc::new(Resource::from_encoded(
                        ResourceType::VirtualHost,
                        name,
                        body,
                        origins,
                    ));
                    self.0.insert(key, resource.clone());
                    touched.push((namespace.to_string(), Change::Upsert(resource)));
                    verdicts.push(Verdict::Taken { object, generation });
                }
                None => {
                    self.0.remove(&key);
                    touched.push((
                        namespace.to_string(),
                        Change::Remove(ResourceType::VirtualHost, name.into()),
                    ));
                    verdicts.push(Verdict::Deleted { object });
                }
            }
        }
        Applied {
            touched,
            verdicts,
            notes_changed: false,
        }
    }

    fn resources_for(&mut self, proxy: &Proxy) -> Vec<Arc<Resource>> {
        self.0
            .iter()
            .filter(|((ns, _), _)| *ns == proxy.namespace)
            .map(|(_, one)| one.clone())
            .collect()
    }

    fn changes_for(&self, proxy: &Proxy, touched: &Self::Touched) -> Vec<Change> {
        touched
            .iter()
            .filter(|(ns, _)| *ns == proxy.namespace)
            .map(|(_, change)| change.clone())
            .collect()
    }

    fn forget(&mut self, _: &str) {}

    fn note(&self, _: &str) -> Option<Note> {
        None
    }

    fn noted(&self) -> Vec<Arc<str>> {
        Vec::new()
    }
}

struct Plane {
    ledger: Ledger,
    inputs: mpsc::Sender<Input<HostChange>>,
    cancel: CancellationToken,
    tasks: tokio_util::task::TaskTracker,
    socket: std::path::PathBuf,
    _dir: tempfile::TempDir,
}

impl Plane {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("xds.sock");
        let cancel = CancellationToken::new();
        let ledger = Ledger::new();
        let (pump, server) = Pump::new(Hosts::default(), ledger.clone(), cancel.clone());
        let (inputs, receiver) = mpsc::channel(CHANGES);
        let tasks = tokio_util::task::TaskTracker::new();
        tasks.spawn(pump.run(receiver, cancel.clone()));
        let incoming = UnixListenerStream::new(UnixListener::bind(&socket).unwrap());
        let router = tonic::transport::Server::builder().add_service(server.service());
        let shutdown = cancel.clone().cancelled_owned();
        tasks.spawn(async move {
            router
                .serve_with_incoming_shutdown(incoming, shutdown)
                .await
                .unwrap()
        });
        Self {
            ledger,
            inputs,
            cancel,
            tasks,
            socket,
            _dir: dir,
        }
    }

    async fn change(&self, change: HostChange) {
        self.inputs.send(Input::Changes(vec![change])).await.unwrap();
    }

    async fn until(
        &self,
        name: &str,
        generation: i64,
        what: &str,
        matches: impl Fn(&Liveness) -> bool,
    ) -> Liveness {
        let mut watch = self
            .ledger
            .watch(&format!("VirtualService/prod/{name}"), generation);
        match tokio::time::timeout(Duration::from_secs(20), watch.wait_for(matches)).await {
            Ok(found) => found.unwrap().clone(),
            Err(elapsed) => {
                panic!(
                    "never {what}, {elapsed}: {:?}",
                    self.ledger.report(&format!("VirtualService/prod/{name}"))
                )
            }
        }
    }

    async fn stop(self) {
        self.cancel.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }
}

fn proxy(socket: &Path, id: &str, cancel: &CancellationToken) -> (AdsClient, Deliveries) {
    let config = AdsClientConfig {
        endpoint: Endpoint::Unix(socket.into()),
        node: Node {
            id: id.into(),
            client_features: vec![FEATURE_VHDS.into()],
            ..Node::default()
        },
        backoff: BackoffRange {
            initial: Duration::from_millis(10),
            max: Duration::from_millis(50),
        },
    };
    let (client, deliveries) = AdsClient::spawn(config, cancel.clone());
    client.set_interest(ResourceType::VirtualHost, Interest::all());
    (client, deliveries)
}

/// Takes everything but what contains `bad`.
fn obey(mut deliveries: Deliveries) -> tokio::task::JoinHandle<()> {
    tokio::spawn(async move {
        while let Some(delivery) = deliveries.recv().await {
            let refusals = delivery
                .upserted
                .iter()
                .filter(|one| one.body.starts_with(b"bad"));
            let refusals = refusals
                .map(|one| Refusal::new(one.name.clone(), "bad weight"))
                .collect();
            delivery.answer(refusals);
        }
    })
}

#[tokio::test]
async fn a_weight_is_live_once_all_proxies_of_its_namespace_have_taken_it_and_a_refusal_shows_on_the_object()
{
    let plane = Plane::start();
    let cancel = CancellationToken::new();
    plane.change(("prod", "reviews", 1, Some("weight 0"))).await;
    plane.inputs.send(Input::Synced).await.unwrap();
    let mut proxies = Vec::new();
    for index in 0..3 {
        let (client, deliveries) = proxy(
            &plane.socket,
            &format!("sidecar~10.0.0.{index}~p{index}.prod~x"),
            &cancel,
        );
        proxies.push((client, obey(deliveries)));
    }
    let (stranger, deliveries) = proxy(&plane.socket, "sidecar~10.0.9.9~other.test~x", &cancel);
    proxies.push((stranger, obey(deliveries)));
    plane
        .until("reviews", 1, "live", |seen| seen.needed == 3 && seen.is_live())
        .await;

    plane.change(("prod", "reviews", 2, Some("weight 5"))).await;
    let live = plane.until("reviews", 2, "live", Liveness::is_live).await;
    assert_eq!((live.needed, live.acked), (3, 3));

    plane.change(("prod", "reviews", 3, Some("bad"))).await;
    let refused = plane
        .until("reviews", 3, "refused by all", |seen| seen.refused == 3)
        .await;
    assert_eq!(&*refused.refusals[0].reason, "bad weight");

    plane.change(("prod", "reviews", 4, Some("invalid"))).await;
    let rejected = plane
        .until("reviews", 4, "rejected", |seen| seen.rejected.is_some())
        .await;
    assert!(rejected.is_refused());

    plane.change(("prod", "reviews", 5, Some("weight 0"))).await;
    plane.until("reviews", 5, "live again", Liveness::is_live).await;
    plane.change(("prod", "reviews", 5, None)).await;
    plane
        .until("reviews", 5, "forgotten", |seen| !seen.observed)
        .await;
    cancel.cancel();
    for (client, consumer) in proxies {
        client.join().await;
        consumer.await.unwrap();
    }
    plane.stop().await;
}

#[tokio::test]
async fn nobody_is_served_before_the_world_is_complete() {
    let plane = Plane::start();
    let cancel = CancellationToken::new();
    let (client, mut deliveries) = proxy(&plane.socket, "sidecar~10.0.0.1~p.prod~x", &cancel);
    let mut connection = client.connection();
    connection.wait_for(|state| state.streams == 1).await.unwrap();
    plane.change(("prod", "reviews", 1, Some("weight 0"))).await;
    plane.until("reviews", 1, "observed", |seen| seen.observed).await;
    assert!(deliveries.try_recv().is_err(), "served from a half-known world");
    plane.inputs.send(Input::Synced).await.unwrap();
    let first = tokio::time::timeout(Duration::from_secs(20), deliveries.recv())
        .await
        .unwrap()
        .unwrap();
    assert_eq!(first.upserted.len(), 1);
    first.accept();
    plane
        .until("reviews", 1, "live", |seen| seen.needed == 1 && seen.is_live())
        .await;
    cancel.cancel();
    client.join().await;
    plane
        .until("reviews", 1, "without the proxy that left", |seen| {
            seen.needed == 0
        })
        .await;
    plane.stop().await;
}

#[tokio::test]
async fn a_client_that_is_no_proxy_is_turned_away_with_the_reason() {
    let plane = Plane::start();
    let cancel = CancellationToken::new();
    let (client, _deliveries) = proxy(&plane.socket, "curl", &cancel);
    let mut connection = client.connection();
    let turned_away = connection.wait_for(|state| {
        state
            .last_error
            .as_ref()
            .is_some_and(|error| error.contains("four parts type~ip~pod.namespace~domain"))
    });
    tokio::time::timeout(Duration::from_secs(20), turned_away)
        .await
        .unwrap()
        .unwrap();
    cancel.cancel();
    client.join().await;
    plane.stop().await;
}

#[tokio::test(start_paused = true)]
async fn after_a_crash_nothing_counts_as_live_before_the_proxies_have_had_time_to_return() {
    let cancel = CancellationToken::new();
    let ledger = Ledger::new();
    let (pump, _server) = Pump::new(Hosts::default(), ledger.clone(), cancel.clone());
    let pump = pump.with_return_grace(Duration::from_secs(3));
    let (inputs, receiver) = mpsc::channel::<Input<HostChange>>(CHANGES);
    let runner = tokio::spawn(pump.run(receiver, cancel.clone()));
    inputs
        .send(Input::Changes(vec![("prod", "reviews", 1, Some("weight 0"))]))
        .await
        .unwrap();
    inputs.send(Input::Synced).await.unwrap();
    let object = "VirtualService/prod/reviews";
    tokio::time::sleep(Duration::from_millis(2900)).await;
    assert!(!ledger.liveness(object, 1).is_live(), "nobody is back yet");
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert!(ledger.liveness(object, 1).is_live());
    cancel.cancel();
    runner.await.unwrap();
}
