//! A process that runs out of file descriptors: it pauses, says so, and goes on when there are some again.

use std::net::SocketAddr;
use std::process::Stdio;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::fixture::*;
use crate::frames::{Fate, RawClient, request};

const CONFIG: &str = r#"
static_resources:
  clusters:
  - { name: c, type: STATIC, connect_timeout: 1s, common_http_protocol_options: { idle_timeout: 0.3s }, OPTIONS load_assignment: { cluster_name: c, endpoints: [ { lb_endpoints: [ { endpoint: { address: { socket_address: { address: 127.0.0.1, port_value: BACKEND } } } } ] } ] } }
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

/// A client that has asked and does not go.
enum Client {
    Http1(TcpStream),
    Http2(RawClient),
}

impl Client {
    async fn ask(at: SocketAddr, http2: bool) -> Self {
        if http2 {
            let mut client = RawClient::connect(at, &[]).await;
            client.get(1, &request("GET", "/", &[])).await;
            return Self::Http2(client);
        }
        let mut stream = soon("a connection", TcpStream::connect(at)).await.unwrap();
        stream
            .write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
            .await
            .unwrap();
        Self::Http1(stream)
    }

    /// The status of the answer.
    async fn answer(&mut self) -> u16 {
        match self {
            Self::Http1(stream) => {
                let mut answer = [0; 12];
                soon("an answer to the first", stream.read_exact(&mut answer))
                    .await
                    .expect("nobody is cut off");
                String::from_utf8_lossy(&answer[9..]).parse().unwrap()
            }
            Self::Http2(client) => match client.fate(1).await {
                Fate::Status(status) => status,
                other => panic!("nobody is cut off, and no stream: {other:?}"),
            },
        }
    }
}

/// How many descriptors a process has open.
fn descriptors(pid: u32) -> usize {
    std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count()
}

async fn out_of_descriptors(http2: bool) {
    let backend = Backend::named("b").await;
    let at = free_port().await;
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("proxy.yaml");
    let text = CONFIG
        .replace("BACKEND", &backend.address.port().to_string())
        .replace("OPTIONS", if http2 { "http2_protocol_options: {}," } else { "" })
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
    let before = descriptors(child.id().unwrap());
    // More clients than descriptors: the kernel holds the rest in its queue.
    let mut clients = Vec::new();
    for _ in 0..80 {
        clients.push(Client::ask(at, http2).await);
    }
    // The first is served, or told that there is no connection to be had; nobody is cut off.
    let status = clients[0].answer().await;
    assert!([200, 503].contains(&status), "{status}");
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
    soon("descriptors as before", async {
        // Connections to the backend that are kept for the next request end by themselves.
        while descriptors(child.id().unwrap()) > before {
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    })
    .await;
    assert!(child.try_wait().unwrap().is_none(), "the process lives");
    child.kill().await.unwrap();
}

#[tokio::test]
async fn a_proxy_without_file_descriptors_serves_again_when_it_has_some() {
    out_of_descriptors(false).await;
}

#[tokio::test]
async fn a_proxy_without_file_descriptors_serves_http2_again_when_it_has_some() {
    out_of_descriptors(true).await;
}
