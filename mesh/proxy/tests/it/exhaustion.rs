//! A process that runs out of file descriptors: it pauses, says so, and goes on when there are some again.

use std::process::Stdio;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::fixture::*;

const CONFIG: &str = r#"
static_resources:
  clusters:
  - { name: c, type: STATIC, connect_timeout: 1s, load_assignment: { cluster_name: c, endpoints: [ { lb_endpoints: [ { endpoint: { address: { socket_address: { address: 127.0.0.1, port_value: BACKEND } } } } ] } ] } }
  listeners:
  - name: main
    address: { socket_address: { address: 127.0.0.1, port_value: PORT } }
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: http
          route_config: { name: r, virtual_hosts: [ { name: all, domains: ["*"], routes: [ { match: { prefix: / }, route: { cluster: c } } ] } ] }
          http_filters: [ { name: envoy.filters.http.router } ]
"#;

#[tokio::test]
async fn a_proxy_without_file_descriptors_serves_again_when_it_has_some() {
    let backend = Backend::named("b").await;
    let at = free_port().await;
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("proxy.yaml");
    let text = CONFIG
        .replace("BACKEND", &backend.address.port().to_string())
        .replace("PORT", &at.port().to_string());
    std::fs::write(&config, text).unwrap();
    let mut child = tokio::process::Command::new("sh")
        .args(["-c", r#"ulimit -n 48; exec "$0" --config "$1" --concurrency 1"#])
        .arg(env!("CARGO_BIN_EXE_serin-proxy"))
        .arg(&config)
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    soon("the listener", async {
        while TcpStream::connect(at).await.is_err() {
            tokio::task::yield_now().await;
        }
    })
    .await;
    assert_eq!(get(at, "/").await.0, 200);
    // More clients than descriptors: the kernel holds the rest in its queue.
    let mut clients = Vec::new();
    for _ in 0..80 {
        let mut stream = soon("a connection", TcpStream::connect(at)).await.unwrap();
        stream
            .write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
            .await
            .unwrap();
        clients.push(stream);
    }
    // The first is served, or told that there is no connection to be had; nobody is cut off.
    let mut answer = Vec::new();
    soon("an answer to the first", async {
        while !answer.windows(4).any(|window| window == b"\r\n\r\n") {
            assert!(
                clients[0].read_buf(&mut answer).await.unwrap() > 0,
                "nobody is cut off"
            );
        }
    })
    .await;
    let answer = String::from_utf8_lossy(&answer).into_owned();
    if !answer.starts_with("HTTP/1.1 200") {
        assert!(answer.starts_with("HTTP/1.1 503"), "{answer}");
        assert!(
            answer.contains("x-serin-response-flags: UF"),
            "no connection to the application could be made: {answer}"
        );
    }
    drop(clients);
    let again = async {
        while get(at, "/").await.0 != 200 {
            tokio::task::yield_now().await;
        }
    };
    soon("a proxy that serves again", again).await;
    // Not one by one only: the descriptors of those who are gone are there again.
    let many = (0..8).map(|_| get(at, "/"));
    for (status, ..) in futures::future::join_all(many).await {
        assert_eq!(status, 200);
    }
    assert!(child.try_wait().unwrap().is_none(), "the process lives");
    child.kill().await.unwrap();
}
