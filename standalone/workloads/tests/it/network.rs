//! Pods, Services, DNS and listeners.

use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{Pod, Service};
use kube::api::{Api, DeleteParams, Patch, PatchParams};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::cluster::{Cluster, DEADLINE, condition, create};

fn server(port: &str) -> serde_json::Value {
    json!({"terminationGracePeriodSeconds": 1, "containers": [{"name": "c", "image": "test/serve:1", "args": [port],
        "ports": [{"name": "http", "containerPort": port.parse::<u16>().unwrap()}],
        "readinessProbe": {"tcpSocket": {"port": "http"}}}]})
}

async fn get(address: &str) -> std::io::Result<String> {
    let mut stream = TcpStream::connect(address).await?;
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n").await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    if answer.is_empty() {
        Err(std::io::ErrorKind::UnexpectedEof.into())
    } else {
        Ok(answer)
    }
}

/// Tries until it works: what is waited for is asynchronous by nature (rules of the kernel, a listener).
async fn eventually(address: &str) -> String {
    let trying = async {
        loop {
            if let Ok(answer) = get(address).await {
                return answer;
            }
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(DEADLINE, trying).await.expect("no answer")
}

fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_reaches_a_service_by_name_also_one_that_it_backs_itself() {
    let Some(cluster) = Cluster::start().await else {
        return;
    };
    let services: Api<Service> = cluster.api();
    create(
        &services,
        json!({"metadata": {"name": "web"}, "spec": {"selector": {"app": "web"},
        "ports": [{"name": "http", "port": 80, "targetPort": "http"}]}}),
    )
    .await;
    create(&services, json!({"metadata": {"name": "none"}, "spec": {"selector": {"app": "nobody"}, "ports": [{"port": 80}]}})).await;
    cluster.pod("web", server("8080"), condition("Ready")).await;
    // python and curl may be missing: /bin/bash can open TCP connections itself.
    let script = r"
fetch() { exec 3<>/dev/tcp/$1/80 && printf 'GET / HTTP/1.0\r\n\r\n' >&3 && cat <&3 2>/dev/null; }
until fetch web | grep -q pod=web; do sleep 0.05; done
fetch web.t.svc.cluster.local | grep -o 'pod=web'
getent ahostsv4 web | head -1 | cut -d' ' -f1
getent hosts nothing.t.svc.cluster.local || echo no such name
if (exec 3<>/dev/tcp/none/80) 2>/dev/null; then echo reached; else echo refused; fi
";
    let spec = json!({"restartPolicy": "Never", "terminationGracePeriodSeconds": 1, "containers": [
        {"name": "c", "image": "test/sh:1", "command": ["/bin/bash", "-c", script]}]});
    let client = cluster
        .pod("client", spec, crate::cluster::phase("Succeeded"))
        .await;
    let address = services
        .get("web")
        .await
        .unwrap()
        .spec
        .unwrap()
        .cluster_ip
        .unwrap();
    assert_eq!(
        cluster.log(&client, "c").await,
        format!("pod=web\n{address}\nno such name\nrefused\n")
    );
    // Hairpin: the only endpoint asks for itself through the Service.
    let own = json!({"restartPolicy": "Never", "terminationGracePeriodSeconds": 1, "containers": [
        {"name": "s", "image": "test/serve:1", "args": ["8080"], "ports": [{"name": "http", "containerPort": 8080}]},
        {"name": "c", "image": "test/sh:1", "command": ["/bin/bash", "-c",
            "until (exec 3<>/dev/tcp/mirror/80 && printf 'GET / HTTP/1.0\\r\\n\\r\\n' >&3 && cat <&3 | grep -o pod=self); do sleep 0.05; done"]}]});
    create(
        &services,
        json!({"metadata": {"name": "mirror"}, "spec": {"selector": {"app": "self"},
        "ports": [{"name": "http", "port": 80, "targetPort": "http"}]}}),
    )
    .await;
    let done = |pod: Option<&Pod>| {
        pod.and_then(|pod| pod.status.as_ref()?.container_statuses.clone())
            .is_some_and(|all| {
                all.iter().any(|status| {
                    status.name == "c"
                        && status
                            .state
                            .as_ref()
                            .is_some_and(|state| state.terminated.is_some())
                })
            })
    };
    let pod = cluster.pod("self", own, done).await;
    assert!(cluster.log(&pod, "c").await.ends_with("pod=self\n"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_load_balancer_is_a_host_listener_forwarded_or_handed_over_without_a_gap() {
    let Some(cluster) = Cluster::start().await else {
        return;
    };
    let services: Api<Service> = cluster.api();
    let (plain, handed) = (free_port(), free_port());
    let service = |name: &str, port: u16| {
        json!({"metadata": {"name": name, "annotations": {"serin.dev/host-port": format!("80:{port}")}},
               "spec": {"type": "LoadBalancer", "selector": {"app": name}, "ports": [{"port": 80, "targetPort": 8080}]}})
    };
    create(&services, service("plain", plain)).await;
    create(&services, service("gateway", handed)).await;
    cluster.pod("plain", server("8080"), condition("Ready")).await;
    assert!(
        eventually(&format!("127.0.0.1:{plain}"))
            .await
            .contains("pod=plain")
    );
    let published = |service: Option<&Service>| {
        service
            .and_then(|service| {
                service
                    .status
                    .as_ref()?
                    .load_balancer
                    .as_ref()?
                    .ingress
                    .as_ref()?
                    .first()
                    .cloned()
            })
            .is_some_and(|ingress| ingress.ip.as_deref() == Some("127.0.0.1"))
    };
    cluster.until(&services, "plain", published).await;

    let deployments: Api<Deployment> = cluster.api();
    create(&deployments, json!({"metadata": {"name": "gateway"}, "spec": {"selector": {"matchLabels": {"app": "gateway"}},
        "template": {"metadata": {"labels": {"app": "gateway"}, "annotations": {"serin.dev/listeners": "8080"}},
            "spec": {"terminationGracePeriodSeconds": 1, "containers": [{"name": "c", "image": "test/serve:1", "args": ["8080"]}]}}}}))
    .await;
    let answer = eventually(&format!("127.0.0.1:{handed}")).await;
    assert!(answer.contains("pod=gateway-"), "{answer}");
    // Replacing the pod refuses nobody: the socket is the same.
    let patch = json!({"spec": {"template": {"metadata": {"annotations": {"restarted": "yes"}}}}});
    deployments
        .patch("gateway", &PatchParams::default(), &Patch::Merge(&patch))
        .await
        .unwrap();
    let complete = |deployment: Option<&Deployment>| {
        deployment
            .and_then(|deployment| deployment.status.as_ref())
            .is_some_and(|status| {
                status.observed_generation == Some(2)
                    && status.updated_replicas == Some(1)
                    && status.replicas == Some(1)
                    && status.terminating_replicas == Some(0)
            })
    };
    cluster.until(&deployments, "gateway", complete).await;
    assert_ne!(eventually(&format!("127.0.0.1:{handed}")).await, answer);
    services.delete("plain", &DeleteParams::default()).await.unwrap();
    let closed = async {
        while TcpStream::connect(("127.0.0.1", plain)).await.is_ok() {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(DEADLINE, closed)
        .await
        .expect("the listener of a deleted Service stays open");
}
