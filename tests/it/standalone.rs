//! `serin up`, `kill -9`, `serin down`, and kubectl, with real processes and namespaces.

use std::io::{Read as _, Write as _};
use std::process::Command;

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
            let found = cluster.processes_with(word);
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

/// `POST` to an address on this machine; the status code of the answer.
fn post(address: &str, path: &str, headers: &str, body: &str) -> String {
    let mut stream = std::net::TcpStream::connect(address.trim_start_matches("http://")).unwrap();
    stream
        .set_read_timeout(Some(std::time::Duration::from_secs(20)))
        .unwrap();
    write!(
        stream,
        "POST {path} HTTP/1.1\r\nHost: hooks\r\nConnection: close\r\nContent-Length: {}\r\n{headers}\r\n{body}",
        body.len()
    )
    .unwrap();
    let mut answer = String::new();
    let _ = stream.read_to_string(&mut answer);
    answer.split(' ').nth(1).unwrap_or("no answer").to_owned()
}

/// `X-Signature` of a body under the token `t0ken`, by the system's openssl.
fn signature(body: &str) -> Option<String> {
    let mut child = Command::new("openssl")
        .args(["dgst", "-sha256", "-hmac", "t0ken", "-r"])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .ok()?;
    child.stdin.take()?.write_all(body.as_bytes()).ok()?;
    let output = child.wait_with_output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    Some(format!(
        "X-Signature: sha256={}\r\n",
        text.split_whitespace().next()?
    ))
}

#[test]
fn a_signed_webhook_at_the_port_of_the_cluster_makes_a_source_look_at_once() {
    let Some(cluster) = TestCluster::new() else { return };
    let Some(signed) = signature("{}") else {
        eprintln!("SKIPPED: openssl is not here");
        return;
    };
    let repository = tempfile::tempdir().unwrap();
    let git = |arguments: &[&str]| {
        let output = Command::new("git")
            .args(["-c", "user.name=t", "-c", "user.email=t@example.com"])
            .args(arguments)
            .current_dir(repository.path())
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
    };
    git(&["init", "-q", "-b", "main"]);
    std::fs::write(
        repository.path().join("a.yaml"),
        "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: a, namespace: default}\n",
    )
    .unwrap();
    git(&["add", "."]);
    git(&["commit", "-q", "-m", "one"]);
    cluster.up();
    let manifests = format!(
        "apiVersion: v1\nkind: Secret\nmetadata: {{name: hook, namespace: default}}\nstringData: {{token: t0ken}}\n---\n\
         apiVersion: source.toolkit.fluxcd.io/v1\nkind: GitRepository\nmetadata: {{name: app, namespace: default}}\nspec: {{interval: 1h, url: '{}', ref: {{branch: main}}}}\n---\n\
         apiVersion: notification.toolkit.fluxcd.io/v1\nkind: Receiver\nmetadata: {{name: hook, namespace: default}}\nspec: {{type: generic-hmac, secretRef: {{name: hook}}, resources: [{{kind: GitRepository, name: app}}]}}\n",
        repository.path().display()
    );
    if cluster
        .kubectl_ok(&["apply", "-f", "-"], Some(&manifests))
        .is_none()
    {
        return;
    }
    let ok = |arguments: &[&str]| cluster.kubectl_ok(arguments, None).unwrap();
    for object in ["receiver/hook", "gitrepository/app"] {
        ok(&["wait", "--for=condition=Ready", object, "--timeout=30s"]);
    }
    let path = ok(&["get", "receiver", "hook", "-o", "jsonpath={.status.webhookPath}"]);
    let status: Value = serde_json::from_str(&cluster.serin(&["status", "-o", "json"])).unwrap();
    let address = status["webhooks"]
        .as_str()
        .expect("the status tells the address")
        .to_owned();

    assert_eq!(post(&address, &path, "X-Signature: sha256=00\r\n", "{}"), "400");
    assert_eq!(post(&address, "/hook/nobody", &signed, "{}"), "404");
    assert_eq!(post(&address, &path, &signed, "{}"), "200");
    let requested = ok(&[
        "get",
        "gitrepository",
        "app",
        "-o",
        "jsonpath={.metadata.annotations.reconcile\\.fluxcd\\.io/requestedAt}",
    ]);
    assert!(!requested.is_empty(), "the call asks the source to look");
    ok(&[
        "wait",
        &format!("--for=jsonpath={{.status.lastHandledReconcileAt}}={requested}"),
        "gitrepository/app",
        "--timeout=30s",
    ]);
}

#[test]
fn a_cluster_is_taken_down_however_little_of_it_has_begun() {
    let Some(cluster) = TestCluster::new() else { return };
    let before = KernelState::read();
    // From before the command has done anything to after everything runs.
    for milliseconds in [0, 5, 20, 60, 150, 300] {
        let mut up = cluster.begin_up();
        let begun = cluster.directory().join("server.lock");
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
        // Whoever holds the lock has written so; an `up` that comes to it later simply comes after `down`.
        let is_held = || std::fs::metadata(&begun).is_ok_and(|file| file.len() > 0);
        while !is_held() && up.try_wait().unwrap().is_none() {
            assert!(std::time::Instant::now() < deadline, "nothing is begun");
            std::thread::yield_now();
        }
        // Not a wait for something: the moment at which the other command comes.
        let (_never, moment) = std::sync::mpsc::channel::<()>();
        moment
            .recv_timeout(std::time::Duration::from_millis(milliseconds))
            .unwrap_err();
        cluster.serin(&["down", "--purge"]);
        up.wait().unwrap();
        assert!(
            !cluster.directory().exists(),
            "{milliseconds} ms: something was made after it was taken down"
        );
        assert!(
            cluster.processes().is_empty(),
            "{milliseconds} ms: {:?}",
            cluster.processes()
        );
        assert_eq!(KernelState::read(), before, "{milliseconds} ms");
    }
}
