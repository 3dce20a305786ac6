//! What outlives what, and that nothing is left in the end.

use k8s_openapi::api::core::v1::{Pod, Service};
use kube::api::{Api, DeleteParams};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

use crate::cluster::{Cluster, condition, create, processes_of};

fn kill_node(cluster: &Cluster) {
    let pid = serin_workloads::node::running(&cluster.state).unwrap();
    kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
    while serin_workloads::node::running(&cluster.state).is_some() {
        std::thread::yield_now();
    }
}

fn container_id_and_restarts(pod: &Pod) -> (Option<String>, i32) {
    let status = pod.status.clone().unwrap().container_statuses.unwrap()[0].clone();
    (status.container_id, status.restart_count)
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_outlive_a_killed_node_and_the_next_one_adopts_them() {
    let Some(cluster) = Cluster::start().await else {
        return;
    };
    let services: Api<Service> = cluster.api();
    create(&services, json!({"metadata": {"name": "web"}, "spec": {"selector": {"app": "web"}, "ports": [{"port": 80, "targetPort": 8080}]}})).await;
    let spec = json!({"terminationGracePeriodSeconds": 1, "containers": [{"name": "c", "image": "test/serve:1", "args": ["8080"],
        "readinessProbe": {"tcpSocket": {"port": 8080}}}]});
    let before = cluster.pod("web", spec.clone(), condition("Ready")).await;
    let doomed = cluster.pod("doomed", spec, condition("Ready")).await;
    let address = before.status.clone().unwrap().pod_ip.unwrap();
    let fetch =
        format!("exec 3<>/dev/tcp/{address}/8080 && printf 'GET / HTTP/1.0\\r\\n\\r\\n' >&3 && cat <&3");
    let (reached, first) = cluster.in_node(&format!("bash -c \"{fetch}\""));
    // The server closes at once; whether `cat` then sees an end or a reset is chance.
    assert!(reached || first.contains("200 OK"), "{first}");

    kill_node(&cluster);
    // Deleted while no node is there.
    let pods: Api<Pod> = cluster.api();
    pods.delete("doomed", &DeleteParams::default()).await.unwrap();
    cluster.spawn_node();
    cluster.gone(&pods, "doomed").await;
    assert!(
        !cluster
            .state
            .join("node/pods")
            .join(doomed.metadata.uid.unwrap())
            .exists()
    );

    let (reached, second) = cluster.in_node(&format!("bash -c \"{fetch}\""));
    assert!(reached || second.contains("200 OK"), "{second}");
    let answer = |text: &str| {
        text.lines()
            .find(|line| line.starts_with("pod="))
            .map(str::to_owned)
    };
    assert_eq!(answer(&first), answer(&second), "the very same process answers");
    let after = pods.get("web").await.unwrap();
    assert_eq!(
        container_id_and_restarts(&before),
        container_id_and_restarts(&after)
    );
    // The next node is in charge: it stops the pod it adopted.
    pods.delete("web", &DeleteParams::default()).await.unwrap();
    cluster.gone(&pods, "web").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_whose_shim_was_killed_is_started_anew() {
    let Some(cluster) = Cluster::start().await else {
        return;
    };
    let spec = json!({"terminationGracePeriodSeconds": 1, "containers": [{"name": "c", "image": "test/sh:1", "args": ["exec sleep 600"]}]});
    let pod = cluster.pod("p", spec, condition("Ready")).await;
    let record = std::fs::read(
        cluster
            .state
            .join("node/pods")
            .join(pod.metadata.uid.unwrap())
            .join("shim.json"),
    )
    .unwrap();
    let record: serde_json::Value = serde_json::from_slice(&record).unwrap();
    let shim = record["shim"]["pid"].as_i64().unwrap();
    let container = record["containers"][0]["pid"].as_i64().unwrap();
    kill(Pid::from_raw(i32::try_from(shim).unwrap()), Signal::SIGKILL).unwrap();
    let pods: Api<Pod> = cluster.api();
    let restarted = |pod: Option<&Pod>| {
        pod.and_then(|pod| pod.status.as_ref()?.container_statuses.as_ref()?.first().cloned())
            .is_some_and(|status| status.restart_count == 1 && status.ready)
    };
    cluster.until(&pods, "p", restarted).await;
    // It may still be listed until init has reaped it.
    let stat = std::fs::read_to_string(format!("/proc/{container}/stat")).unwrap_or_default();
    assert!(
        stat.is_empty() || stat.contains(") Z "),
        "the container outlived its shim: {stat}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn after_teardown_nothing_is_left_whatever_was_killed_before() {
    let mounts = || {
        std::fs::read_to_string("/proc/self/mountinfo")
            .unwrap()
            .lines()
            .count()
    };
    let interfaces = || std::fs::read_dir("/sys/class/net").unwrap().count();
    let before = (mounts(), interfaces());
    let Some(cluster) = Cluster::start().await else {
        return;
    };
    // It ignores SIGTERM, and leaves children that ask for nothing.
    let spec = json!({"containers": [{"name": "c", "image": "test/sh:1",
        "args": ["trap '' TERM; (setsid sleep 600 &) ; sleep 600"],
        "volumeMounts": [{"name": "m", "mountPath": "/data/m"}]}],
        "volumes": [{"name": "m", "emptyDir": {"medium": "Memory"}}]});
    cluster.pod("stubborn", spec.clone(), condition("Ready")).await;
    let orphan = cluster.pod("orphan", spec, condition("Ready")).await;
    let record = std::fs::read(
        cluster
            .state
            .join("node/pods")
            .join(orphan.metadata.uid.unwrap())
            .join("shim.json"),
    )
    .unwrap();
    let record: serde_json::Value = serde_json::from_slice(&record).unwrap();
    kill_node(&cluster);
    kill(
        Pid::from_raw(i32::try_from(record["shim"]["pid"].as_i64().unwrap()).unwrap()),
        Signal::SIGKILL,
    )
    .unwrap();
    assert!(
        !processes_of(&cluster.state).is_empty(),
        "the test looks for the wrong thing"
    );
    let state = cluster.state.clone();
    tokio::task::spawn_blocking(move || serin_workloads::teardown(&state).unwrap())
        .await
        .unwrap();
    assert_eq!(processes_of(&cluster.state), Vec::<i32>::new());
    assert!(!cluster.state.join("node").exists());
    assert_eq!((mounts(), interfaces()), before);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_node_and_its_pods_outlive_the_server_and_serve_the_next_one() {
    let Some(mut cluster) = Cluster::start().await else {
        return;
    };
    let spec = json!({"terminationGracePeriodSeconds": 1, "containers": [{"name": "c", "image": "test/serve:1", "args": ["8080"],
        "readinessProbe": {"tcpSocket": {"port": 8080}}}]});
    let before = cluster.pod("first", spec.clone(), condition("Ready")).await;
    let node = serin_workloads::node::running(&cluster.state);
    cluster.restart_server().await;
    // The next `serin up` finds the node running and keeps it.
    assert_eq!(Some(cluster.spawn_node()), node);
    cluster.pod("second", spec, condition("Ready")).await;
    let pods: Api<Pod> = cluster.api();
    let after = pods.get("first").await.unwrap();
    assert_eq!(
        container_id_and_restarts(&before),
        container_id_and_restarts(&after)
    );
    pods.delete("first", &DeleteParams::default()).await.unwrap();
    cluster.gone(&pods, "first").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_without_privileges_runs_pods_in_a_user_namespace_and_adopts_them() {
    let Some(cluster) = Cluster::start_as(Some(65_534)).await else {
        return;
    };
    let services: Api<Service> = cluster.api();
    create(&services, json!({"metadata": {"name": "web"}, "spec": {"selector": {"app": "web"}, "ports": [{"port": 80, "targetPort": 8080}]}})).await;
    let spec = json!({"terminationGracePeriodSeconds": 1, "volumes": [{"name": "v", "emptyDir": {}}],
        "containers": [{"name": "c", "image": "test/serve:1", "args": ["8080"],
            "volumeMounts": [{"name": "v", "mountPath": "/opt/not/there"}],
            "readinessProbe": {"tcpSocket": {"port": 8080}}}]});
    let before = cluster.pod("web", spec, condition("Ready")).await;
    let client = json!({"restartPolicy": "Never", "terminationGracePeriodSeconds": 1, "containers": [
        {"name": "c", "image": "test/sh:1", "command": ["/bin/bash", "-c",
            "until (exec 3<>/dev/tcp/web/80 && printf 'GET / HTTP/1.0\\r\\n\\r\\n' >&3 && cat <&3 | grep -o pod=web); do sleep 0.05; done"]}]});
    let client = cluster
        .pod("client", client, crate::cluster::phase("Succeeded"))
        .await;
    assert!(cluster.log(&client, "c").await.ends_with("pod=web\n"));
    kill_node(&cluster);
    cluster.spawn_node();
    let pods: Api<Pod> = cluster.api();
    pods.delete("client", &DeleteParams::default()).await.unwrap();
    cluster.gone(&pods, "client").await;
    let after = pods.get("web").await.unwrap();
    assert_eq!(
        container_id_and_restarts(&before),
        container_id_and_restarts(&after)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_handed_over_listener_answers_without_the_node_and_passes_on_to_the_next_pod_after_it() {
    let Some(cluster) = Cluster::start().await else {
        return;
    };
    let port = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let services: Api<Service> = cluster.api();
    create(&services, json!({"metadata": {"name": "gateway", "annotations": {"serin.dev/host-port": format!("80:{port}")}},
        "spec": {"type": "LoadBalancer", "selector": {"role": "gateway"}, "ports": [{"port": 80, "targetPort": 8080}]}})).await;
    let pods: Api<Pod> = cluster.api();
    let gateway = |name: &str| {
        json!({"metadata": {"name": name, "labels": {"role": "gateway"},
        "annotations": {"serin.dev/listeners": "8080"}},
        "spec": {"terminationGracePeriodSeconds": 1, "containers": [{"name": "c", "image": "test/serve:1", "args": ["8080"]}]}})
    };
    create(&pods, gateway("one")).await;
    cluster.until(&pods, "one", condition("Ready")).await;
    let get = || async {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let mut stream = tokio::net::TcpStream::connect(("127.0.0.1", port)).await.unwrap();
        stream.write_all(b"GET / HTTP/1.0\r\n\r\n").await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    };
    assert!(get().await.contains("pod=one"));
    kill_node(&cluster);
    assert!(get().await.contains("pod=one"), "it needs no node to accept");
    cluster.spawn_node();
    create(&pods, gateway("two")).await;
    cluster.until(&pods, "two", condition("Ready")).await;
    pods.delete("one", &DeleteParams::default()).await.unwrap();
    cluster.gone(&pods, "one").await;
    assert!(get().await.contains("pod=two"));
}
