//! The control plane, the endpoints, and what changes.
//!
//! `plain` and `secure` are listeners with the same routes. `/1` goes to endpoints over HTTP/1, one of which breaks answers
//! off; `/2` over HTTP/2; `/3` over mutual TLS and HTTP/2 to the proxy's own listener `secure`, and there to `/1`; `/t` to a
//! cluster that is there half of the time.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::Response;
use http_body_util::Full;
use serin_xds::ResourceType;
use serin_xds::pb::envoy::config::cluster::v3 as cluster;
use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::envoy::config::route::v3 as route;
use serin_xds::server::Event;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use crate::ads::Ads;
use crate::certificates::{Authority, client_socket, common_by_sds, server_socket, validation_secret};
use crate::fixture::{
    Backend, address, assignment, eds_cluster, free_port, host, http_chain, istio_retries, listener_of,
    manager, millis, prefix_route, speaking_h2, to_cluster,
};

const GATE: &str = "gate.example";
const CLIENT: &str = "spiffe://cluster.local/ns/edge/sa/client";
/// Bytes of the large answer.
const LARGE: usize = 400_000;

pub(crate) struct Arrangement {
    ads: Ads,
    authority: Authority,
    pub(crate) plain: SocketAddr,
    pub(crate) secure: SocketAddr,
    pub(crate) admin: SocketAddr,
    http1: SocketAddr,
    http2: SocketAddr,
    moody: SocketAddr,
    folder: tempfile::TempDir,
    _tasks: tokio::task::JoinSet<()>,
}

/// An answer as small or large as the path asks for.
async fn endpoint(tasks: &mut tokio::task::JoinSet<()>) -> SocketAddr {
    let large = Bytes::from(vec![b'x'; LARGE]);
    let mut backend = Backend::answering(move |seen| {
        let body = if seen.path.contains("large") {
            large.clone()
        } else {
            Bytes::from_static(b"ok")
        };
        Response::new(Full::from(body))
    })
    .await;
    let at = backend.address;
    // What it saw is of no interest, and must not pile up.
    tasks.spawn(async move { while backend.seen.recv().await.is_some() {} });
    at
}

/// Answers, but breaks every 31st off.
async fn moody(tasks: &mut tokio::task::JoinSet<()>) -> anyhow::Result<SocketAddr> {
    let socket = TcpListener::bind("127.0.0.1:0").await?;
    let at = socket.local_addr()?;
    tasks.spawn(async move {
        let mut connections = tokio::task::JoinSet::new();
        let mut number = 0u32;
        while let Ok((mut stream, _)) = socket.accept().await {
            number = number.wrapping_add(7);
            let mut count = number;
            connections.spawn(async move {
                let mut chunk = vec![0u8; 16 * 1024];
                while let Ok(read) = stream.read(&mut chunk).await {
                    count = count.wrapping_add(1);
                    let breaks = count.is_multiple_of(31);
                    let answer: &[u8] = if breaks {
                        b"HTTP/1.1 200 OK\r\ncontent-length: 200\r\n\r\nhalf"
                    } else {
                        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
                    };
                    if read == 0 || stream.write_all(answer).await.is_err() || breaks {
                        return;
                    }
                }
            });
            while connections.try_join_next().is_some() {}
        }
    });
    Ok(at)
}

impl Arrangement {
    pub(crate) async fn start() -> anyhow::Result<Self> {
        let folder = tempfile::tempdir()?;
        let mut tasks = tokio::task::JoinSet::new();
        let arrangement = Self {
            ads: Ads::start(&folder.path().join("xds.sock"))?,
            authority: Authority::new("ca"),
            plain: free_port().await,
            secure: free_port().await,
            admin: free_port().await,
            http1: endpoint(&mut tasks).await,
            http2: endpoint(&mut tasks).await,
            moody: moody(&mut tasks).await?,
            folder,
            _tasks: tasks,
        };
        let source = &arrangement.ads.source;
        source.put(ResourceType::Cluster, "one", &eds_cluster("one"));
        source.put(ResourceType::Cluster, "two", &speaking_h2(eds_cluster("two")));
        source.put(
            ResourceType::Cluster,
            "three",
            &cluster::Cluster {
                transport_socket: client_socket(common_by_sds("client", Some("trust"), &["h2"]), GATE),
                ..speaking_h2(eds_cluster("three"))
            },
        );
        source.put(
            ResourceType::Endpoints,
            "two",
            &assignment("two", &[(arrangement.http2, "")]),
        );
        source.put(
            ResourceType::Endpoints,
            "three",
            &assignment("three", &[(arrangement.secure, "")]),
        );
        arrangement.endpoints(0);
        arrangement.certificates();
        source.put(
            ResourceType::Secret,
            "trust",
            &validation_secret("trust", arrangement.authority.context()),
        );
        arrangement.routes(0);
        arrangement.listeners(0);
        Ok(arrangement)
    }

    /// The file that the proxy starts with.
    pub(crate) fn bootstrap(&self) -> PathBuf {
        let path = self.folder.path().join("bootstrap.yaml");
        let text = format!(
            "admin: {{ address: {{ socket_address: {{ address: 127.0.0.1, port_value: {} }} }} }}\n{}",
            self.admin.port(),
            self.ads.bootstrap("soak", false)
        );
        // A file that is not there is told by the proxy.
        let _ = std::fs::write(&path, text);
        path
    }

    /// A client that shows a certificate and speaks what the listener prefers.
    pub(crate) fn client_tls(&self) -> Arc<rustls::ClientConfig> {
        let client = self.authority.issue(&[CLIENT]);
        self.authority
            .client()
            .identity(&client)
            .alpn(&["h2", "http/1.1"])
            .build()
    }

    fn endpoints(&self, change: u32) {
        let all = [(self.http1, ""), (self.moody, "")];
        let some = match change % 3 {
            0 => &all[..],
            1 => &all[..1],
            _ => &all[1..],
        };
        let source = &self.ads.source;
        source.put(ResourceType::Endpoints, "one", &assignment("one", some));
    }

    fn certificates(&self) {
        for (name, identity) in [("server", GATE), ("client", CLIENT)] {
            let issued = self.authority.issue(&[identity]);
            self.ads
                .source
                .put(ResourceType::Secret, name, &issued.secret(name));
        }
    }

    fn routes(&self, change: u32) {
        let mut one = to_cluster("one");
        one.retry_policy = istio_retries();
        one.timeout = millis(20_000);
        let mut three = to_cluster("three");
        three.prefix_rewrite = "/1".into();
        let mut hosts: Vec<_> = (0..20)
            .map(|index| {
                host(
                    &format!("h{index}"),
                    &format!("h{index}-{change}.example"),
                    vec![prefix_route("/", one.clone())],
                )
            })
            .collect();
        let routes = vec![
            prefix_route("/1", one),
            prefix_route("/2", to_cluster("two")),
            prefix_route("/3", three),
            prefix_route("/t", to_cluster(&format!("t{}", change % 10))),
        ];
        hosts.push(host("all", "*", routes));
        let table = route::RouteConfiguration {
            name: "80".into(),
            virtual_hosts: hosts,
            ..Default::default()
        };
        self.ads.source.put(ResourceType::Route, "80", &table);
    }

    /// `change` shows in a timeout that nothing reaches: the listener is another one.
    fn listeners(&self, change: u32) {
        let mut manager = manager("80");
        manager.stream_idle_timeout = millis(60_000 + u64::from(change % 100));
        for (name, at, socket) in [
            ("plain", self.plain, None),
            (
                "secure",
                self.secure,
                server_socket(common_by_sds("server", Some("trust"), &["h2", "http/1.1"]), true),
            ),
        ] {
            let mut chain = http_chain(&manager);
            chain.transport_socket = socket;
            let mut message = listener_of(name, core::TrafficDirection::Outbound, vec![chain]);
            message.address = address(at);
            self.ads.source.put(ResourceType::Listener, name, &message);
        }
    }

    /// The next change of each kind whose turn it is.
    pub(crate) fn change(&mut self, number: u32) {
        self.routes(number);
        if number.is_multiple_of(3) {
            self.endpoints(number / 3);
        }
        let source = &self.ads.source;
        // A cluster that comes, and one that goes.
        let name = format!("t{}", number % 10);
        if (number / 10).is_multiple_of(2) {
            source.put(ResourceType::Cluster, &name, &eds_cluster(&name));
            source.put(
                ResourceType::Endpoints,
                &name,
                &assignment(&name, &[(self.http1, "")]),
            );
        } else {
            source.remove(ResourceType::Cluster, &name);
            source.remove(ResourceType::Endpoints, &name);
        }
        if number.is_multiple_of(40) {
            self.certificates();
        }
        if number.is_multiple_of(150) {
            self.listeners(number / 150);
        }
    }

    /// The end of the cluster whose endpoint is the proxy itself, so that its connections are not taken for clients'.
    pub(crate) fn end(&self) {
        self.ads.source.remove(ResourceType::Cluster, "three");
        self.ads.source.remove(ResourceType::Endpoints, "three");
    }

    /// What the proxy refused.
    pub(crate) fn refusals(&mut self) -> Vec<String> {
        let mut out = Vec::new();
        while let Ok((_, event)) = self.ads.events.try_recv() {
            if let Event::Refused(resource, reason) = event {
                out.push(format!("{}: {reason}", resource.name));
            }
        }
        out
    }
}

/// How long anything may take.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);
