//! What the machine does to us: a full disk, a git server that hangs, proxies that do not answer.

use std::fs::File;
use std::io::Write as _;
use std::path::Path;

use serde_json::{Value, json};

use crate::api::{condition, is, message};
use crate::cluster::{KernelState, TestCluster};
use crate::delivery::{APPLICATION, Delivery, HOST, NAMESPACE, RATE};
use crate::http::GitServer;
use crate::repository::Repository;
use crate::traffic::{Traffic, signal};

/// A file that takes all the room there is.
fn fill(directory: &Path) -> std::path::PathBuf {
    let path = directory.join("filler");
    let mut file = File::create(&path).unwrap();
    let block = vec![1; 4096];
    while file.write_all(&block).is_ok() {}
    // What a partial write left room for.
    while file.write_all(&[1]).is_ok() {}
    path
}

fn applied(commit: &str) -> impl Fn(&Value) -> bool {
    move |object| {
        is(object, "Ready", "True")
            && object["status"]["lastAppliedRevision"]
                .as_str()
                .is_some_and(|revision| revision.ends_with(commit))
    }
}

#[test]
fn a_full_disk_is_said_in_conditions_and_answers_traffic_goes_on_and_room_is_all_it_takes_to_recover() {
    let Some(cluster) = TestCluster::with_small_file_systems(&["", "git"], 32) else {
        return;
    };
    let before = KernelState::read();
    let Some(delivery) = Delivery::start_on(cluster, "[50]", "1s") else {
        return;
    };
    let api = &delivery.api;
    let cluster = &delivery.cluster;
    let traffic = Traffic::start(cluster, HOST, RATE);

    // The git cache has no room.
    let filler = fill(&cluster.inside(&cluster.directory().join("git")));
    let commit = delivery.release("1.1.0", 0);
    let source = api.until("GitRepository", NAMESPACE, "shop", "say so", |object| {
        is(object, "Ready", "False")
    });
    let told = message(&source, "Ready");
    assert!(told.contains("full"), "{}: {told}", condition(&source, "Ready"));
    std::fs::remove_file(filler).unwrap();
    api.until(
        "Kustomization",
        NAMESPACE,
        "shop",
        "go on when there is room",
        applied(&commit),
    );
    delivery.settled("Succeeded");

    // Nothing has room: no write is durable, so none is accepted; everything that runs goes on.
    let filler = fill(&cluster.inside(&cluster.directory()));
    let write = |name: &str| {
        api.try_apply(&format!(
            "{{apiVersion: v1, kind: ConfigMap, metadata: {{name: {name}, namespace: shop}}, data: {{text: '{}'}}}}",
            "x".repeat(100_000)
        ))
    };
    let refused = write("first").unwrap_err();
    assert!(
        refused.code >= 500 && refused.message.contains("No space left on device"),
        "{refused:?}"
    );
    assert_eq!(delivery.primary_image(), "serin.dev/examples/podinfo:1.1.0");
    let commit = delivery.release("1.2.0", 0);
    let refused = write("second").unwrap_err();
    assert!(refused.message.contains("No space left on device"), "{refused:?}");
    std::fs::remove_file(filler).unwrap();
    api.until(
        "Kustomization",
        NAMESPACE,
        "shop",
        "go on when there is room",
        applied(&commit),
    );
    delivery.canary("promote 1.2.0", |_| delivery.primary_image().ends_with(":1.2.0"));
    delivery.settled("Succeeded");
    traffic.stop().nothing_was_lost();

    // What was answered is there after a kill, and a disk that is full again does not keep `down` from clearing up.
    write("third").unwrap();
    cluster.kill_server();
    cluster.up();
    assert_eq!(
        api.get("ConfigMap", NAMESPACE, "third")["metadata"]["name"],
        "third"
    );
    fill(&cluster.inside(&cluster.directory()));
    cluster.serin(&["down"]);
    assert_eq!(cluster.processes(), [].into(), "no process is left");
    assert_eq!(KernelState::read(), before, "nothing is left in the kernel");
}

#[test]
fn a_git_server_that_hangs_is_said_within_the_timeout_and_keeps_no_other_source_waiting() {
    let Some(cluster) = TestCluster::new() else { return };
    cluster.up();
    let api = cluster.api();
    let config = |name: &str, text: &str| {
        format!(
            "apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: {name}, namespace: shop}}\ndata: {{text: {text}}}\n"
        )
    };
    let fast = Repository::create(
        &cluster.home().join("fast"),
        &[("config.yaml", &config("fast", "one"))],
    );
    let slow = Repository::create(
        &cluster.home().join("slow"),
        &[("config.yaml", &config("slow", "one"))],
    );
    let server = GitServer::start(&cluster.home().join("slow"), true);
    api.apply(
        "{apiVersion: v1, kind: Namespace, metadata: {name: shop}}\n---\n\
         {apiVersion: source.toolkit.fluxcd.io/v1, kind: GitRepository, metadata: {name: slow, namespace: shop}, spec: {interval: 1m, timeout: 2s, url: 'URL', ref: {branch: main}}}"
            .replace("URL", &server.url("repository.git"))
            .as_str(),
    );
    let sync = "{apiVersion: kustomize.toolkit.fluxcd.io/v1, kind: Kustomization, metadata: {name: NAME, namespace: shop}, spec: {interval: 10m, path: ./, prune: true, sourceRef: {kind: GitRepository, name: NAME}}}";
    api.apply(&sync.replace("NAME", "slow"));
    api.apply(
        &"{apiVersion: source.toolkit.fluxcd.io/v1, kind: GitRepository, metadata: {name: fast, namespace: shop}, spec: {interval: 1m, url: 'URL', ref: {branch: main}}}"
            .replace("URL", &fast.url()),
    );
    api.apply(&sync.replace("NAME", "fast"));
    let commit = fast.push(&[("config.yaml", &config("fast", "two"))]);
    api.until(
        "Kustomization",
        "shop",
        "fast",
        "be applied meanwhile",
        applied(&commit),
    );

    let source = api.until("GitRepository", "shop", "slow", "give up", |object| {
        is(object, "Ready", "False")
    });
    let told = message(&source, "Ready");
    assert!(
        server.hanging() > 0 && told.contains("2 s (spec.timeout)"),
        "the timeout is named: {}",
        condition(&source, "Ready")
    );
    let waiting = api.get("Kustomization", "shop", "slow");
    assert!(
        message(&waiting, "Ready").contains("slow"),
        "the Kustomization says what it waits for: {}",
        condition(&waiting, "Ready")
    );

    server.recover();
    let commit = slow.push(&[("config.yaml", &config("slow", "two"))]);
    api.until(
        "Kustomization",
        "shop",
        "slow",
        "be applied by itself",
        applied(&commit),
    );
}

/// The processes of a program inside the pods whose names start so.
fn proxies_of(cluster: &TestCluster, pod: &str) -> Vec<u32> {
    let needle = format!("POD_NAME={pod}");
    cluster
        .processes()
        .into_iter()
        .filter(|pid| {
            let read = |file: &str| std::fs::read(format!("/proc/{pid}/{file}")).unwrap_or_default();
            let program = read("cmdline");
            let program = program.split(|byte| *byte == 0).next().unwrap_or_default();
            program.ends_with(b"serin-proxy")
                && read("environ")
                    .split(|byte| *byte == 0)
                    .any(|variable| variable.starts_with(needle.as_bytes()))
        })
        .collect()
}

const CALLER: &str = "
apiVersion: apps/v1
kind: Deployment
metadata: {name: caller, namespace: shop}
spec:
  replicas: 1
  selector: {matchLabels: {app: caller}}
  template:
    metadata: {labels: {app: caller}}
    spec:
      containers: [{name: caller, image: 'serin.dev/examples/podinfo:1.0.0', ports: [{name: http, containerPort: 9898}]}]
";

#[test]
fn a_proxy_that_stops_answering_is_counted_the_rollout_waits_for_it_and_goes_on_with_it() {
    let Some(delivery) = Delivery::start("[20, 60]", "1s") else {
        return;
    };
    let (api, cluster) = (&delivery.api, &delivery.cluster);
    api.apply(CALLER);
    api.until("Deployment", NAMESPACE, "caller", "be available", |object| {
        is(object, "Available", "True")
    });
    delivery.reachable();
    let traffic = Traffic::start(cluster, HOST, RATE);
    let suspended = proxies_of(cluster, "caller-");
    assert_eq!(suspended.len(), 1, "the caller has a proxy");

    signal("STOP", suspended[0]);
    delivery.release("2.0.0", 0);
    let waiting = delivery.canary("wait for the proxy", |status| {
        status["canaryWeight"] == 20
            && status["weightLive"]["live"] != true
            && status["message"] == "weight 20 is live in 3 of 4 proxies"
    });
    assert_eq!(
        (&waiting["weightLive"]["acked"], &waiting["weightLive"]["needed"]),
        (&json!(3), &json!(4))
    );
    let route = api.until(
        "VirtualService",
        NAMESPACE,
        APPLICATION,
        "say who is waited for",
        |object| message(object, "Live").contains("caller-"),
    );
    eprintln!("canary: {}", waiting["message"]);
    eprintln!("route: {}", message(&route, "Live"));
    assert_eq!(condition(&route, "Live")["reason"], "Propagating");
    assert_eq!(waiting["phase"], "Progressing");
    signal("CONT", suspended[0]);
    delivery.canary("be live with it", |status| status["weightLive"]["live"] == true);

    // A proxy that dies is not waited for; its pod makes another.
    signal("KILL", suspended[0]);
    delivery.settled("Succeeded");
    api.until_all("Pod", NAMESPACE, "be well again", |pods| {
        pods.iter().all(|pod| is(pod, "Ready", "True"))
            && pods.iter().any(|pod| {
                let containers = pod["status"]["containerStatuses"].as_array();
                let init = pod["status"]["initContainerStatuses"].as_array();
                containers
                    .into_iter()
                    .chain(init)
                    .flatten()
                    .any(|container| container["restartCount"].as_u64() > Some(0))
            })
    });
    let told = traffic.stop();
    told.nothing_was_lost();
    assert_eq!(json!(told.0["failed_by_app"]), 0);
}
