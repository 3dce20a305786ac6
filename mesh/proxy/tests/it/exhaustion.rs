//! A process that runs out of file descriptors: it pauses, says so, and goes on when there are some again.

use std::net::SocketAddr;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use futures::stream::FuturesUnordered;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use crate::fixture::*;
use crate::frames::{Fate, RawClient, request};

const CONFIG: &str = r#"
static_resources:
  clusters:
  - { name: c, type: STATIC, connect_timeout: 1s, common_http_protocol_options: { idle_timeout: 0.3s }, OPTIONS load_assignment: { cluster_name: c, endpoints: [ { lb_endpoints: [ { endpoint: { address: { socket_address: { address: 127.0.0.1, port_value: BACKEND } } } } ] } ] } }
  listeners:
  - name: main
    address: { socket_address: { address: 127.0.0.1, port_value: LISTEN } }
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: http
          route_config: { name: r, virtual_hosts: [ { name: all, domains: ["*"], routes: [ { match: { prefix: / }, route: { cluster: c } } ] } ] }
          http_filters: [ { name: envoy.filters.http.router } ]
          access_log:
          - name: envoy.access_loggers.file
            typed_config:
              "@type": type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog
              path: LOG
              log_format: { text_format_source: { inline_string: "%RESPONSE_CODE% %RESPONSE_FLAGS% %RESPONSE_CODE_DETAILS% %UPSTREAM_TRANSPORT_FAILURE_REASON%\n" } }
"#;

/// How many descriptors the process may have.
const LIMIT: usize = 48;

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

/// A process with few descriptors.
struct Poor {
    child: tokio::process::Child,
    at: SocketAddr,
    folder: tempfile::TempDir,
}

impl Poor {
    async fn start(backend: SocketAddr, http2: bool) -> Self {
        let at = free_port().await;
        let folder = tempfile::tempdir().unwrap();
        let config = folder.path().join("proxy.yaml");
        let text = CONFIG
            .replace("BACKEND", &backend.port().to_string())
            .replace("OPTIONS", if http2 { "http2_protocol_options: {}," } else { "" })
            .replace("LOG", folder.path().join("log").to_str().unwrap())
            .replace("LISTEN", &at.port().to_string());
        std::fs::write(&config, text).unwrap();
        let child = tokio::process::Command::new("sh")
            .args(["-c", r#"ulimit -n "$2"; exec "$0" --config "$1" --concurrency 1"#])
            .arg(env!("CARGO_BIN_EXE_serin-proxy"))
            .arg(&config)
            .arg(LIMIT.to_string())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        soon("the listener", async {
            while TcpStream::connect(at).await.is_err() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
        .await;
        Self { child, at, folder }
    }

    /// How many descriptors it has open.
    fn descriptors(&self) -> usize {
        let pid = self.child.id().unwrap();
        std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count()
    }
}

async fn out_of_descriptors(http2: bool) {
    let backend = Backend::named("b").await;
    let mut proxy = Poor::start(backend.address, http2).await;
    let at = proxy.at;
    assert_eq!(get(at, "/").await.0, 200);
    let before = proxy.descriptors();
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
            tokio::time::sleep(Duration::from_millis(5)).await;
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
        while proxy.descriptors() > before {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
    assert!(proxy.child.try_wait().unwrap().is_none(), "the process lives");
    proxy.child.kill().await.unwrap();
}

#[tokio::test]
async fn a_proxy_without_file_descriptors_serves_again_when_it_has_some() {
    out_of_descriptors(false).await;
}

#[tokio::test]
async fn a_proxy_without_file_descriptors_serves_http2_again_when_it_has_some() {
    out_of_descriptors(true).await;
}

/// Answers each request, and ends its connection, once it is allowed to.
async fn holding() -> (SocketAddr, Arc<Semaphore>, JoinSet<()>) {
    let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = socket.local_addr().unwrap();
    let allowed = Arc::new(Semaphore::new(0));
    let permits = allowed.clone();
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        let mut connections = JoinSet::new();
        while let Ok((mut stream, _)) = socket.accept().await {
            let permits = permits.clone();
            connections.spawn(async move {
                let _ = read_head(&mut stream).await;
                permits.acquire().await.unwrap().forget();
                let answer = b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 0\r\n\r\n";
                let _ = stream.write_all(answer).await;
            });
        }
    });
    (at, allowed, tasks)
}

/// Reads up to the end of a head, or of the stream.
async fn read_head(stream: &mut TcpStream) -> String {
    let mut head = Vec::new();
    while !head.windows(4).any(|end| end == b"\r\n\r\n") {
        if !matches!(stream.read_buf(&mut head).await, Ok(count) if count > 0) {
            break;
        }
    }
    String::from_utf8_lossy(&head).into_owned()
}

#[tokio::test]
async fn a_request_for_which_no_descriptor_is_left_is_answered_503_and_the_log_says_why() {
    let (backend, allowed, _tasks) = holding().await;
    let mut proxy = Poor::start(backend, false).await;
    let mut answers = FuturesUnordered::new();
    for _ in 0..80 {
        let mut stream = TcpStream::connect(proxy.at).await.unwrap();
        stream
            .write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
            .await
            .unwrap();
        answers.push(async move {
            let answer = read_head(&mut stream).await;
            (answer, stream)
        });
    }
    soon("the last descriptor to be taken", async {
        while proxy.descriptors() < LIMIT {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
    // One that comes free goes to a client that waits, and there is none for its way to the backend.
    allowed.add_permits(1);
    let mut kept = Vec::new();
    let refused = loop {
        let (answer, stream) = soon("an answer of the proxy's own", answers.next())
            .await
            .unwrap();
        if !answer.starts_with("HTTP/1.1 200 ") {
            break answer;
        }
        kept.push(stream);
    };
    assert!(refused.starts_with("HTTP/1.1 503 "), "{refused}");
    assert!(
        refused.contains("\r\nx-serin-response-flags: UF\r\n"),
        "{refused}"
    );
    let log = proxy.folder.path().join("log");
    let line = soon("a line of the log", async {
        loop {
            let text = std::fs::read_to_string(&log).unwrap();
            if let Some(line) = text
                .split_inclusive('\n')
                .find(|line| line.starts_with("503 ") && line.ends_with('\n'))
            {
                return line.to_owned();
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
    assert!(
        line.starts_with("503 UF upstream_reset_before_response_started{connection_failure} "),
        "{line}"
    );
    assert!(line.contains("os error 24"), "{line}");
    drop((kept, answers));
    allowed.add_permits(1_000);
    soon("a proxy that serves again", async {
        while get(proxy.at, "/").await.0 != 200 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
    proxy.child.kill().await.unwrap();
}
