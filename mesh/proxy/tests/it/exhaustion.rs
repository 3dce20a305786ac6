//! A process that runs out of file descriptors: it pauses, says so, and goes on when there are some again.

use std::net::SocketAddr;

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
    /// And how many requests it has made.
    Http2(RawClient, u32),
}

impl Client {
    async fn connect(at: SocketAddr, http2: bool) -> Self {
        if http2 {
            return Self::Http2(RawClient::connect(at, &[]).await, 0);
        }
        Self::Http1(soon("a connection", TcpStream::connect(at)).await.unwrap())
    }

    async fn ask(&mut self) {
        match self {
            Self::Http1(stream) => stream
                .write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
                .await
                .unwrap(),
            Self::Http2(client, asked) => {
                client.get(2 * *asked + 1, &request("GET", "/", &[])).await;
                *asked += 1;
            }
        }
    }

    /// The status of the answer to what was asked last.
    async fn answer(&mut self) -> u16 {
        match self {
            Self::Http1(stream) => {
                let mut answer = Vec::new();
                let length = loop {
                    let text = String::from_utf8_lossy(&answer);
                    if let Some((head, body)) = text.split_once("\r\n\r\n") {
                        let (_, length) = head.split_once("content-length: ").unwrap();
                        let length: usize = length.lines().next().unwrap().parse().unwrap();
                        if body.len() == length {
                            break length;
                        }
                    }
                    let count = soon("an answer", stream.read_buf(&mut answer)).await;
                    assert!(count.expect("nobody is cut off") > 0, "nobody is cut off");
                };
                assert!(length > 0);
                String::from_utf8_lossy(&answer[9..12]).parse().unwrap()
            }
            Self::Http2(client, asked) => match client.fate(2 * *asked - 1).await {
                Fate::Status(status) => status,
                other => panic!("nobody is cut off, and no stream: {other:?}"),
            },
        }
    }
}

/// A process that may have this many descriptors, whose errors are told in a file.
struct Poor {
    at: SocketAddr,
    log: std::path::PathBuf,
    child: tokio::process::Child,
    _backend: Backend,
    _folder: tempfile::TempDir,
}

const DESCRIPTORS: usize = 48;

impl Poor {
    async fn start(http2: bool) -> Self {
        let backend = Backend::named("b").await;
        let at = free_port().await;
        let folder = tempfile::tempdir().unwrap();
        let (config, log) = (folder.path().join("proxy.yaml"), folder.path().join("log"));
        let text = CONFIG
            .replace("BACKEND", &backend.address.port().to_string())
            .replace("OPTIONS", if http2 { "http2_protocol_options: {}," } else { "" })
            .replace("PORT", &at.port().to_string());
        std::fs::write(&config, text).unwrap();
        let child = tokio::process::Command::new("sh")
            .arg("-c")
            .arg(format!(
                r#"ulimit -n {DESCRIPTORS}; exec "$0" --config "$1" --concurrency 1"#
            ))
            .arg(env!("CARGO_BIN_EXE_serin-proxy"))
            .arg(&config)
            .stderr(std::fs::File::create(&log).unwrap())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        soon("the listener", async {
            while TcpStream::connect(at).await.is_err() {
                tokio::task::yield_now().await;
            }
        })
        .await;
        Self {
            at,
            log,
            child,
            _backend: backend,
            _folder: folder,
        }
    }

    /// How many descriptors it has open.
    fn descriptors(&self) -> usize {
        let path = format!("/proc/{}/fd", self.child.id().unwrap());
        std::fs::read_dir(path).unwrap().count()
    }

    /// Waits until so many are open, or fewer.
    async fn at_most(&self, descriptors: usize) {
        soon("descriptors that are closed", async {
            while self.descriptors() > descriptors {
                tokio::time::sleep(std::time::Duration::from_millis(10)).await;
            }
        })
        .await;
    }

    async fn ends(mut self) {
        assert!(self.child.try_wait().unwrap().is_none(), "the process lives");
        self.child.kill().await.unwrap();
    }
}

async fn out_of_descriptors(http2: bool) {
    let proxy = Poor::start(http2).await;
    let at = proxy.at;
    assert_eq!(get(at, "/").await.0, 200);
    let before = proxy.descriptors();
    // More clients than descriptors: the kernel holds the rest in its queue.
    let mut clients = Vec::new();
    for _ in 0..80 {
        let mut client = Client::connect(at, http2).await;
        client.ask().await;
        clients.push(client);
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
    // Connections to the backend that are kept for the next request end by themselves.
    proxy.at_most(before).await;
    proxy.ends().await;
}

async fn no_descriptor_for_the_endpoint(http2: bool) {
    let proxy = Poor::start(http2).await;
    let at = proxy.at;
    let before = proxy.descriptors();
    // One that is in, and has not asked yet.
    let mut client = Client::connect(at, http2).await;
    let mut others = Vec::new();
    soon("a process without descriptors", async {
        while proxy.descriptors() < DESCRIPTORS {
            others.push(TcpStream::connect(at).await.unwrap());
        }
    })
    .await;
    client.ask().await;
    assert_eq!(client.answer().await, 503);
    let line = soon("a line of the log", async {
        loop {
            let text = std::fs::read_to_string(&proxy.log).unwrap();
            if let Some(line) = text.lines().find(|line| line.contains("\"response_code\"")) {
                return line.to_owned();
            }
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    })
    .await;
    let line: serde_json::Value = serde_json::from_str(&line).unwrap();
    assert_eq!(line["response_code"], 503, "{line}");
    assert_eq!(line["response_flags"], "UF", "{line}");
    assert_eq!(
        line["response_code_details"], "upstream_reset_before_response_started{connection_failure}",
        "{line}"
    );
    let reason = line["upstream_transport_failure_reason"].as_str().unwrap();
    assert!(reason.contains("Too many open files"), "{line}");
    // It can be asked again, and is answered once there is a descriptor.
    drop(others);
    soon("an answer", async {
        loop {
            client.ask().await;
            if client.answer().await == 200 {
                return;
            }
        }
    })
    .await;
    drop(client);
    proxy.at_most(before).await;
    proxy.ends().await;
}

#[tokio::test]
async fn a_request_that_finds_no_descriptor_for_its_endpoint_is_told_so() {
    for http2 in [false, true] {
        no_descriptor_for_the_endpoint(http2).await;
    }
}

#[tokio::test]
async fn a_proxy_without_file_descriptors_serves_again_when_it_has_some() {
    out_of_descriptors(false).await;
}

#[tokio::test]
async fn a_proxy_without_file_descriptors_serves_http2_again_when_it_has_some() {
    out_of_descriptors(true).await;
}
