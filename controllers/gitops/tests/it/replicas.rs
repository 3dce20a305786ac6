//! Two replicas of the controllers at one API server, of which one leads, until it is killed in the middle of its work.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures::StreamExt as _;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::ConfigMap;
use kube::api::WatchEvent;
use parking_lot::Mutex;
use serde_json::json;
use serin_gitops::Context;
use serin_kit::leader::{self, Elector, Timing};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::cluster::{Cluster, NS, config_map};

const LEASE: &str = "serin-controllers";
const OBJECTS: usize = 40;
const DEADLINE: Duration = Duration::from_secs(30);

/// A replica in a runtime of its own, so that it can be killed as a process is: everything of it stops where it is.
struct Replica {
    runtime: tokio::runtime::Runtime,
    /// From this many changes of ConfigMaps on it stands still, until it is killed.
    stands_still: Arc<AtomicUsize>,
    killed: std::sync::mpsc::Sender<()>,
    /// What it has written so far.
    writes: watch::Receiver<Vec<String>>,
}

impl Replica {
    fn start(cluster: &Cluster, name: &str) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let (noted, writes) = watch::channel(Vec::new());
        let _inside = runtime.enter();
        let stands_still = Arc::new(AtomicUsize::new(usize::MAX));
        let (killed, never) = std::sync::mpsc::channel::<()>();
        let (never, limit) = (Arc::new(Mutex::new(never)), stands_still.clone());
        let client = cluster.another_client(move |write| {
            let mut changes = 0;
            noted.send_modify(|all| {
                all.push(write);
                changes = all.iter().filter(|write| write.contains("/configmaps/")).count();
            });
            if changes >= limit.load(Ordering::SeqCst) {
                let _ = never.lock().recv();
            }
        });
        let timing = Timing {
            lease_duration: Duration::from_secs(1),
            renew_deadline: Duration::from_millis(700),
            retry_period: Duration::from_millis(100),
        };
        let context = Context::new(client.clone(), cluster.dir.path().join(name));
        let elector = Elector::new(client, NS, LEASE, name, timing).unwrap();
        runtime.spawn(async move {
            let cancel = CancellationToken::new();
            let (leads, _election) = elector.start(cancel.clone());
            leader::while_leading(leads, &cancel, |term| serin_gitops::run(context.clone(), term)).await
        });
        Self {
            runtime,
            stands_still,
            killed,
            writes,
        }
    }

    fn kill(self) -> watch::Receiver<Vec<String>> {
        self.runtime.shutdown_background();
        // A thread that stands still does so for ever: let go, it would first finish what it has begun.
        std::mem::forget(self.killed);
        self.writes
    }
}

async fn lease(cluster: &Cluster) -> (String, i32) {
    let lease = cluster.api::<Lease>(NS).get(LEASE).await.unwrap();
    let spec = lease.spec.unwrap();
    (
        spec.holder_identity.unwrap_or_default(),
        spec.lease_transitions.unwrap_or(0),
    )
}

fn files(value: &str) -> Vec<(String, String)> {
    (0..OBJECTS)
        .map(|n| (format!("deploy/{n}.yaml"), config_map(&format!("c{n}"), value)))
        .collect()
}

fn push(repo: &crate::cluster::Repository, files: &[(String, String)]) -> String {
    let files: Vec<(&str, &str)> = files.iter().map(|(path, text)| (&**path, &**text)).collect();
    repo.push(&files)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_two_replicas_one_acts_and_when_it_is_killed_half_way_the_other_goes_on_and_nothing_is_done_twice()
{
    let mut cluster = Cluster::start().await;
    cluster.stop_controllers().await;
    let repo = cluster.repository("app");
    let first = push(&repo, &files("1"));
    cluster.source("app", &repo).await;
    cluster.kustomization("app", json!({})).await;
    let mut replicas = BTreeMap::from(["a", "b"].map(|name| (name, Replica::start(&cluster, name))));
    cluster.applied("app", &first).await;

    let (leading, transitions) = lease(&cluster).await;
    let mut leader = replicas.remove(leading.as_str()).unwrap();
    let (_, standby) = replicas.pop_first().unwrap();
    let idle = standby.writes.borrow().clone();
    assert!(
        idle.iter().all(|write| write.contains("/leases")),
        "the other one acts too: {idle:?}"
    );

    // Every change of a ConfigMap from here on.
    let maps = cluster.api::<ConfigMap>("prod");
    let from = maps
        .list(&Default::default())
        .await
        .unwrap()
        .metadata
        .resource_version
        .unwrap();
    let mut changes = std::pin::pin!(maps.watch(&Default::default(), &from).await.unwrap());
    let changes_of = |all: &Vec<String>| all.iter().filter(|write| write.contains("/configmaps/")).count();
    let limit = changes_of(&leader.writes.borrow()) + OBJECTS + 5;
    leader.stands_still.store(limit, Ordering::SeqCst);
    let second = push(&repo, &files("2"));
    let working = leader.writes.wait_for(|all| changes_of(all) >= limit);
    // The trial of all of them, and some that are meant.
    tokio::time::timeout(DEADLINE, working).await.unwrap().unwrap();
    let dead = leader.kill();

    cluster.applied("app", &second).await;
    let written = dead.borrow().len();
    let (leads_now, transitions_now) = lease(&cluster).await;
    assert_ne!(leads_now, leading);
    assert_eq!(transitions_now, transitions + 1);
    let mut seen: BTreeMap<String, usize> = BTreeMap::new();
    while seen.len() < OBJECTS {
        let next = tokio::time::timeout(DEADLINE, changes.next()).await.unwrap();
        match next.unwrap().unwrap() {
            WatchEvent::Modified(map) => *seen.entry(map.metadata.name.unwrap()).or_default() += 1,
            other => panic!("{other:?}"),
        }
    }
    // What the killed one had done is recognised as done; a change that comes after this push would come after a second one.
    let third = push(&repo, &files("2")[..OBJECTS - 1]);
    let last = cluster.applied("app", &third).await;
    loop {
        let next = tokio::time::timeout(DEADLINE, changes.next()).await.unwrap();
        match next.unwrap().unwrap() {
            WatchEvent::Modified(map) => *seen.entry(map.metadata.name.unwrap()).or_default() += 1,
            WatchEvent::Deleted(_) => break,
            other => panic!("{other:?}"),
        }
    }
    assert!(
        seen.values().all(|changes| *changes == 1),
        "each was changed once: {seen:?}"
    );
    let inventory = last.status.unwrap().inventory.unwrap().entries;
    assert_eq!(inventory.len(), OBJECTS - 1);
    assert_eq!(dead.borrow().len(), written, "the dead one writes nothing");
    standby.kill();
    cluster.stop().await;
}
