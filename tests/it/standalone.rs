//! `serin up`, `kill -9`, `serin down`, and kubectl, with real processes and namespaces.

use serde_json::Value;

use crate::api::is;
use crate::cluster::{KernelState, TestCluster};
use crate::traffic::kill_if_there;

/// A Deployment with its Service and a route at the gateway, all in one namespace with injection.
const APPLICATION: &str = r"
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {istio-injection: enabled}}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: web, namespace: shop}
spec:
  replicas: 2
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      containers:
        - name: web
          image: ghcr.io/stefanprodan/podinfo:6.7.0
          command: [./podinfo, --port=9898]
          ports: [{name: http, containerPort: 9898}]
          readinessProbe: {httpGet: {path: /readyz, port: http}, periodSeconds: 1}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec:
  selector: {app: web}
  ports: [{name: http, port: 80, targetPort: http}]
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: web, namespace: shop}
spec:
  hosts: [web.example.com]
  gateways: [istio-system/public]
  http:
    - route: [{destination: {host: web, port: {number: 80}}}]
";

fn pods(cluster: &TestCluster, namespace: &str) -> Option<Vec<(String, String)>> {
    let text = cluster.kubectl_ok(&["-n", namespace, "get", "pods", "-o", "json"], None)?;
    let list: Value = serde_json::from_str(&text).unwrap();
    let mut pods: Vec<(String, String)> = list["items"]
        .as_array()
        .unwrap()
        .iter()
        .map(|pod| {
            let text = |value: &Value| value.as_str().unwrap_or("").to_owned();
            (
                text(&pod["metadata"]["name"]),
                text(&pod["status"]["containerStatuses"][0]["containerID"]),
            )
        })
        .collect();
    pods.sort();
    Some(pods)
}

#[test]
fn pods_outlive_a_killed_server_and_nothing_outlives_down() {
    let Some(cluster) = TestCluster::new() else { return };
    let before = KernelState::read();
    cluster.up();
    if cluster
        .kubectl_ok(&["apply", "-f", "-"], Some(APPLICATION))
        .is_none()
    {
        return;
    }
    cluster.serin(&[
        "wait",
        "deploy/web",
        "-n",
        "shop",
        "--for=available",
        "--timeout",
        "30s",
    ]);
    cluster.serin(&["wait", "vs/web", "-n", "shop", "--for=live", "--timeout", "30s"]);
    let served = cluster.load("web.example.com", "/", 100, "500ms");
    assert_eq!(
        (
            served["failed_by_system"].as_u64(),
            served["statuses"]["200"].as_u64()
        ),
        (Some(0), Some(50))
    );
    let pods_before = pods(&cluster, "shop").unwrap();

    cluster.kill_server();
    let served = cluster.load("web.example.com", "/", 100, "500ms");
    assert_eq!(
        served["statuses"]["200"], 50,
        "traffic does not notice that the server is gone: {served}"
    );

    cluster.up();
    cluster.serin(&["wait", "vs/web", "-n", "shop", "--for=live", "--timeout", "30s"]);
    assert_eq!(
        pods(&cluster, "shop").unwrap(),
        pods_before,
        "the pods were adopted, not started again"
    );
    let served = cluster.load("web.example.com", "/", 100, "500ms");
    assert_eq!(served["statuses"]["200"], 50, "{served}");

    cluster.kill_server();
    cluster.serin(&["down", "--purge"]);
    assert_eq!(cluster.processes(), [].into(), "no process is left");
    assert_eq!(
        KernelState::read(),
        before,
        "no interface, namespace, mount or rule is left"
    );
}

/// Processes of the cluster whose command line has this word.
fn processes_with(cluster: &TestCluster, word: &str) -> Vec<u32> {
    let has = |pid: &u32| {
        std::fs::read(format!("/proc/{pid}/cmdline"))
            .unwrap_or_default()
            .split(|byte| *byte == 0)
            .any(|argument| argument.ends_with(word.as_bytes()))
    };
    cluster.processes().into_iter().filter(has).collect()
}

#[test]
fn whatever_of_a_cluster_was_killed_down_leaves_nothing() {
    let Some(cluster) = TestCluster::new() else { return };
    let before = KernelState::read();
    for killed in [
        &["server"][..],
        &["node"],
        &["shim"],
        &["serin-proxy"],
        &["server", "node"],
        &["server", "node", "shim"],
        &["server", "node", "shim", "serin-proxy"],
    ] {
        cluster.up();
        cluster.api().until(
            "Deployment",
            "istio-system",
            "istio-ingressgateway",
            "be available",
            |gateway| is(gateway, "Available", "True"),
        );
        let victims = killed.iter().map(|word| {
            let found = processes_with(&cluster, word);
            assert!(!found.is_empty(), "there is a {word}");
            found
        });
        // All found before the first is killed: some take others with them.
        for pid in victims.collect::<Vec<_>>().concat() {
            kill_if_there(pid);
        }
        cluster.serin(&["down", "--purge"]);
        assert_eq!(
            cluster.processes(),
            [].into(),
            "no process is left after {killed:?} were killed"
        );
        assert_eq!(
            KernelState::read(),
            before,
            "nothing is left in the kernel after {killed:?} were killed"
        );
    }
}

#[test]
fn kubectl_gets_describes_applies_follows_logs_waits_and_deletes() {
    let Some(cluster) = TestCluster::new() else { return };
    cluster.up();
    if cluster
        .kubectl_ok(&["apply", "-f", "-"], Some(APPLICATION))
        .is_none()
    {
        return;
    }
    let ok = |arguments: &[&str]| cluster.kubectl_ok(arguments, None).unwrap();
    ok(&[
        "-n",
        "shop",
        "rollout",
        "status",
        "deployment/web",
        "--timeout=30s",
    ]);
    ok(&[
        "-n",
        "shop",
        "wait",
        "--for=condition=Available",
        "deployment/web",
        "--timeout=30s",
    ]);
    let table = ok(&["-n", "shop", "get", "deployments"]);
    assert!(table.contains("READY") && table.contains("2/2"), "{table}");
    assert!(ok(&["get", "pods", "-A", "-o", "wide"]).contains("istio-ingressgateway"));
    assert!(ok(&["-n", "shop", "describe", "deployment", "web"]).contains("ScalingReplicaSet"));
    assert!(ok(&["-n", "shop", "logs", "deployment/web", "-c", "web"]).contains("listening on port 9898"));
    let server_side = cluster.kubectl_ok(
        &[
            "apply",
            "--server-side",
            "--field-manager=tester",
            "--force-conflicts",
            "-f",
            "-",
        ],
        Some(APPLICATION),
    );
    assert!(server_side.unwrap().contains("serverside-applied"));
    assert!(ok(&["-n", "shop", "get", "virtualservice", "web", "-o", "yaml"]).contains("web.example.com"));
    ok(&["-n", "shop", "delete", "deployment", "web", "--timeout=40s"]);
    ok(&[
        "-n",
        "shop",
        "wait",
        "--for=delete",
        "pod",
        "-l",
        "app=web",
        "--timeout=40s",
    ]);
    ok(&["delete", "namespace", "shop", "--timeout=60s"]);
}

#[test]
fn an_image_that_nobody_knows_is_said_to_be_missing_with_the_remedy() {
    let Some(cluster) = TestCluster::new() else { return };
    cluster.up();
    let pod = r#"{"apiVersion":"v1","kind":"Pod","metadata":{"name":"lost"},"spec":{"containers":[{"name":"c","image":"example.com/unknown:1"}]}}"#;
    if cluster.kubectl_ok(&["apply", "-f", "-"], Some(pod)).is_none() {
        return;
    }
    let waiting = "jsonpath={.status.containerStatuses[0].state.waiting.reason}";
    let reason = cluster.kubectl_ok(
        &[
            "wait",
            "pod/lost",
            "--for",
            &format!("{waiting}=ErrImagePull"),
            "--timeout=20s",
        ],
        None,
    );
    assert!(reason.is_some());
    let described = cluster.kubectl_ok(&["describe", "pod", "lost"], None).unwrap();
    assert!(described.contains("serin image add"), "{described}");
    cluster.serin(&[
        "image",
        "add",
        "example.com/unknown:1",
        "serin-example",
        "--",
        "podinfo",
    ]);
    cluster.serin(&["wait", "pod/lost", "--for=ready", "--timeout", "60s"]);
}
