//! Envoy and serin-proxy on one ADS server, asked the same over each wire: HTTP/1 and HTTP/2, plain and TLS, towards clients
//! and towards endpoints, and gRPC with its trailers. Answers must be equal, and what both write to their access logs.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::stream::{self, StreamExt};
use http::{HeaderMap, Request, Response};
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http2::SendRequest;
use hyper_util::rt::{TokioExecutor, TokioIo};
use prost::Message;
use serin_proxy::bootstrap::file;
use serin_xds::pb::envoy::config::accesslog::v3 as accesslog;
use serin_xds::pb::envoy::config::cluster::v3 as cluster;
use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::envoy::config::listener::v3 as listener;
use serin_xds::pb::envoy::extensions::filters::listener::tls_inspector::v3 as tls_inspector;
use serin_xds::pb::envoy::extensions::filters::network::http_connection_manager::v3 as hcm;
use serin_xds::pb::envoy::extensions::upstreams::http::v3 as upstream_http;
use serin_xds::{Resource, ResourceType};
use tokio::net::{TcpListener, TcpStream};

use crate::certificates::{Authority, Issued, client_socket, common, server_socket};
use crate::fixture::*;
use crate::interop::{COMPARED, CONFIG, Case, Seen, ask, backend, cases, pardoned};
use crate::interop_ads::{Pair, ads_source, resource, router};
use crate::tls::handshake;
use crate::tls_upstream::Front;

const GATE: &str = "gate.example";
const SERVER: &str = "backend.example";
const CLIENT: &str = "spiffe://cluster.local/ns/edge/sa/client";

/// What is spoken on both sides.
#[derive(Clone, Copy)]
struct Wire {
    http2: bool,
    tls: bool,
}

/// Who believes whom.
struct Trust {
    authority: Authority,
    gate: Issued,
    server: Issued,
    client: Issued,
}

impl Trust {
    fn new() -> Self {
        let authority = Authority::new("ca");
        Self {
            gate: authority.issue(&[GATE]),
            server: authority.issue(&[SERVER]),
            client: authority.issue(&[CLIENT]),
            authority,
        }
    }
}

impl Wire {
    fn alpn(self) -> &'static [&'static str] {
        if self.http2 { &["h2"] } else { &["http/1.1"] }
    }

    /// How the listener ends TLS: clients show a certificate.
    fn downstream(self, trust: &Trust) -> Option<core::TransportSocket> {
        let context = common(Some(&trust.gate), Some(trust.authority.context()), self.alpn());
        self.tls.then(|| server_socket(context, true)).flatten()
    }

    /// What clusters speak.
    fn dress(self, trust: &Trust, message: &mut cluster::Cluster) {
        use upstream_http::http_protocol_options::explicit_http_config::ProtocolConfig;
        use upstream_http::http_protocol_options::{ExplicitHttpConfig, UpstreamProtocolOptions};
        if self.tls {
            let context = common(Some(&trust.client), Some(trust.authority.context()), self.alpn());
            message.transport_socket = client_socket(context, SERVER);
        }
        if self.http2 {
            let options = upstream_http::HttpProtocolOptions {
                upstream_protocol_options: Some(UpstreamProtocolOptions::ExplicitHttpConfig(
                    ExplicitHttpConfig {
                        protocol_config: Some(ProtocolConfig::Http2ProtocolOptions(
                            core::Http2ProtocolOptions::default(),
                        )),
                    },
                )),
                ..Default::default()
            };
            message.typed_extension_protocol_options.insert(
                "envoy.extensions.upstreams.http.v3.HttpProtocolOptions".into(),
                any(&options),
            );
        }
    }

    /// An endpoint in front of a plain server.
    async fn front(self, trust: &Trust, behind: SocketAddr) -> (SocketAddr, Option<Front>) {
        if !self.tls {
            return (behind, None);
        }
        let front = Front::start(&trust.server, Some(&trust.authority), self.alpn(), behind).await;
        (front.address, Some(front))
    }
}

/// The file of the interoperation test as resources: listener, routes, clusters and endpoints each for themselves.
fn by_ads(text: &str, log: &str, wire: Wire, trust: &Trust) -> Vec<Resource> {
    let plan = file::parse(text, 1).unwrap();
    let mut out = Vec::new();
    for one in plan.static_resources {
        match one.resource_type {
            ResourceType::Cluster => {
                let mut message = cluster::Cluster::decode(&*one.body).unwrap();
                let assignment = message.load_assignment.take().unwrap();
                message.cluster_discovery_type = Some(cluster::cluster::ClusterDiscoveryType::Type(
                    cluster::cluster::DiscoveryType::Eds as i32,
                ));
                message.eds_cluster_config = Some(cluster::cluster::EdsClusterConfig {
                    eds_config: ads_source(),
                    ..Default::default()
                });
                wire.dress(trust, &mut message);
                out.push(resource(ResourceType::Cluster, &one.name, &message));
                out.push(resource(ResourceType::Endpoints, &one.name, &assignment));
            }
            ResourceType::Listener => {
                let mut message = listener::Listener::decode(&*one.body).unwrap();
                message.filter_chains[0].transport_socket = wire.downstream(trust);
                if wire.tls {
                    // Envoy knows the server name of the log from it.
                    message.listener_filters = vec![listener::ListenerFilter {
                        name: "envoy.filters.listener.tls_inspector".into(),
                        config_type: Some(listener::listener_filter::ConfigType::TypedConfig(any(
                            &tls_inspector::TlsInspector::default(),
                        ))),
                        ..Default::default()
                    }];
                }
                let filter = &mut message.filter_chains[0].filters[0];
                let Some(listener::filter::ConfigType::TypedConfig(config)) = &mut filter.config_type else {
                    panic!("no configuration");
                };
                let mut manager = hcm::HttpConnectionManager::decode(&*config.value).unwrap();
                use hcm::http_connection_manager::RouteSpecifier;
                let Some(RouteSpecifier::RouteConfig(table)) = manager.route_specifier.take() else {
                    panic!("no routes");
                };
                out.push(resource(ResourceType::Route, &table.name, &table));
                manager.route_specifier = Some(RouteSpecifier::Rds(hcm::Rds {
                    route_config_name: table.name,
                    config_source: ads_source(),
                }));
                manager.http_filters = vec![router()];
                manager.access_log = vec![access_log(log)];
                *config = any(&manager);
                out.push(resource(ResourceType::Listener, &one.name, &message));
            }
            other => panic!("{other:?}"),
        }
    }
    out
}

fn access_log(path: &str) -> accesslog::AccessLog {
    let line = "%REQ(X-CASE)% %RESPONSE_CODE% %RESPONSE_FLAGS% %RESPONSE_CODE_DETAILS% %UPSTREAM_CLUSTER% %ROUTE_NAME% \
                %PROTOCOL% %REQUESTED_SERVER_NAME% %DOWNSTREAM_TLS_VERSION% %DOWNSTREAM_PEER_URI_SAN% %GRPC_STATUS% \
                %TRAILER(X-END)%\n";
    file_log(path, line)
}

/// A line without what says the same in other words: what went wrong with a connection is told by Envoy's transport in its
/// own, in braces.
fn pardoned_details(line: &str) -> String {
    match (line.find('{'), line.rfind('}')) {
        (Some(from), Some(to)) => format!("{}{}", &line[..from], &line[to + 1..]),
        _ => line.to_owned(),
    }
}

/// How a proxy is asked.
enum Asker {
    /// Each in a connection of its own.
    Http1(SocketAddr, Option<Arc<rustls::ClientConfig>>),
    /// All in one.
    Http2(SendRequest<Full<Bytes>>, &'static str),
}

impl Asker {
    async fn new(wire: Wire, trust: &Trust, at: SocketAddr) -> Self {
        let config = wire.tls.then(|| {
            let client = trust.authority.client().identity(&trust.client);
            client.alpn(wire.alpn()).build()
        });
        match (wire.http2, config) {
            (false, config) => Self::Http1(at, config),
            (true, None) => Self::Http2(h2_client(at).await, "http"),
            (true, Some(config)) => {
                let io = TokioIo::new(handshake(at, &config, GATE).await.unwrap());
                let (sender, connection) = hyper::client::conn::http2::handshake(TokioExecutor::new(), io)
                    .await
                    .unwrap();
                tokio::spawn(connection);
                Self::Http2(sender, "https")
            }
        }
    }

    async fn ask(&self, case: &Case, bytes: &[u8]) -> Option<Seen> {
        let (status, headers, body) = match self {
            Self::Http1(at, None) => ask(TcpStream::connect(at).await.unwrap(), bytes, case.head).await?,
            Self::Http1(at, Some(config)) => {
                ask(handshake(*at, config, GATE).await.unwrap(), bytes, case.head).await?
            }
            Self::Http2(sender, scheme) => {
                let request = over_http2(bytes, scheme);
                let sent = sender.clone().send_request(request);
                let (parts, body) = soon("an answer", sent).await.ok()?.into_parts();
                let headers = parts
                    .headers
                    .iter()
                    .filter(|(name, _)| COMPARED.contains(&name.as_str()))
                    .map(|(name, value)| (name.to_string(), value.to_str().unwrap().to_owned()))
                    .collect();
                let body = soon("a body", body.collect()).await.ok()?.to_bytes();
                let body = String::from_utf8_lossy(&body).into_owned();
                (parts.status.as_u16(), headers, body)
            }
        };
        Some(Seen {
            status,
            headers,
            body,
            flags: String::new(),
        })
    }
}

/// A request of HTTP/1 as one of HTTP/2, without the fields that it does not know.
fn over_http2(bytes: &[u8], scheme: &str) -> Request<Full<Bytes>> {
    let text = String::from_utf8(bytes.to_vec()).unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    let mut lines = head.lines();
    let mut first = lines.next().unwrap().split(' ');
    let (method, path) = (first.next().unwrap(), first.next().unwrap());
    let fields: Vec<(String, &str)> = lines
        .filter_map(|line| line.split_once(':'))
        .map(|(name, value)| (name.to_ascii_lowercase(), value.trim()))
        .collect();
    let host = fields.iter().find(|(name, _)| name == "host").unwrap().1;
    let mut request = Request::builder()
        .method(method)
        .uri(format!("{scheme}://{host}{path}"));
    for (name, value) in &fields {
        let of_http1 = ["host", "connection", "keep-alive", "proxy-connection"].contains(&name.as_str())
            || (name == "te" && *value != "trailers");
        if !of_http1 {
            request = request.header(name, *value);
        }
    }
    request.body(Full::from(body.to_owned())).unwrap()
}

/// Lines of the access log by case.
async fn logged(log: &std::path::Path, count: usize) -> BTreeMap<String, String> {
    soon("the access log", async {
        loop {
            let text = std::fs::read_to_string(log).unwrap_or_default();
            let lines: BTreeMap<String, String> = text
                .lines()
                .filter_map(|line| line.split_once(' '))
                .filter(|(case, _)| case.contains('-') && case.len() > 1)
                .map(|(case, rest)| (case.to_owned(), rest.to_owned()))
                .collect();
            if lines.len() >= count {
                return lines;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await
}

fn all_alike(differences: &[String], count: usize) {
    assert!(
        differences.is_empty(),
        "{} of {count} differ:\n{}",
        differences.len(),
        differences.join("\n")
    );
}

/// The three hundred requests on this wire.
async fn ordinary_requests_are_alike(wire: Wire) {
    let trust = Trust::new();
    let (a, b) = (backend("a").await, backend("b").await);
    let fronts = [
        wire.front(&trust, a.address).await,
        wire.front(&trust, b.address).await,
    ];
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("access.log");
    let text = CONFIG
        .replace("PORT", "0")
        .replace("{A}", &fronts[0].0.port().to_string())
        .replace("{B}", &fronts[1].0.port().to_string())
        .replace("{SLOW}", &silent.local_addr().unwrap().port().to_string());
    let resources = by_ads(&text, log.to_str().unwrap(), wire, &trust);
    let Some(pair) = Pair::start(resources).await else {
        return;
    };
    let mut askers = Vec::new();
    let ready = Case {
        name: "ready".into(),
        bytes: b"GET /exact HTTP/1.1\r\nHost: a.example\r\nConnection: close\r\n\r\n".to_vec(),
        head: false,
    };
    for at in pair.listener("http").await {
        let asker = Asker::new(wire, &trust, at).await;
        soon("routes", async {
            while asker.ask(&ready, &ready.bytes).await.map(|seen| seen.status) != Some(200) {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        })
        .await;
        askers.push(asker);
    }
    let cases = cases();
    assert!(cases.len() >= 300, "{}", cases.len());
    let askers = &askers;
    let answers: Vec<[Seen; 2]> = stream::iter(&cases)
        .map(|case| async move {
            let mut pair = Vec::new();
            for (who, asker) in ["ours", "theirs"].into_iter().zip(askers) {
                let text = String::from_utf8(case.bytes.clone()).unwrap();
                let bytes = text.replace("X-Case: ", &format!("X-Case: {who}-"));
                let seen = asker.ask(case, bytes.as_bytes()).await;
                pair.push(seen.unwrap_or_else(|| panic!("{} was not answered by {who}", case.name)));
            }
            <[Seen; 2]>::try_from(pair).unwrap()
        })
        .buffered(16)
        .collect()
        .await;
    let lines = logged(&log, cases.len() * 2).await;
    let mut differences = Vec::new();
    for (case, [ours, theirs]) in cases.iter().zip(answers) {
        let id = case.name.split(':').next().unwrap();
        let logged = |who: &str| pardoned_details(&lines[&format!("{who}-{id}")]);
        let pair = [(ours, logged("ours")), (theirs, logged("theirs"))];
        let [ours, theirs] = pair.map(|(seen, line)| {
            let mut seen = pardoned(case, seen);
            seen.flags = line;
            seen
        });
        if ours != theirs {
            differences.push(format!("{}\n   ours   {ours:?}\n   theirs {theirs:?}", case.name));
        }
    }
    all_alike(&differences, cases.len());
    pair.stop().await;
}

#[tokio::test]
async fn one_ads_server_drives_envoy_and_serin_proxy_and_they_answer_and_log_alike() {
    ordinary_requests_are_alike(Wire {
        http2: false,
        tls: false,
    })
    .await;
}

#[tokio::test]
async fn http2_on_both_sides_is_answered_and_logged_alike_by_envoy_and_serin_proxy() {
    ordinary_requests_are_alike(Wire {
        http2: true,
        tls: false,
    })
    .await;
}

#[tokio::test]
async fn mutual_tls_on_both_sides_is_answered_and_logged_alike_by_envoy_and_serin_proxy() {
    ordinary_requests_are_alike(Wire {
        http2: false,
        tls: true,
    })
    .await;
}

#[tokio::test]
async fn http2_over_mutual_tls_on_both_sides_is_answered_and_logged_alike_by_envoy_and_serin_proxy() {
    ordinary_requests_are_alike(Wire {
        http2: true,
        tls: true,
    })
    .await;
}

const CALLS: &str = r#"
node: { id: interop, cluster: interop }
static_resources:
  listeners:
  - name: http
    address: { socket_address: { address: 127.0.0.1, port_value: 0 } }
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: http
          use_remote_address: true
          http_filters: []
          route_config:
            name: main
            virtual_hosts:
            - name: all
              domains: ["*"]
              routes:
              - match: { prefix: /direct }
                direct_response: { status: 403, body: { inline_string: "not you" } }
              - match: { prefix: /redirect }
                redirect: { path_redirect: /there }
              - match: { prefix: /dead }
                route: { cluster: dead }
              - match: { prefix: /empty }
                route: { cluster: empty }
              - match: { prefix: /nobody }
                route: { cluster: nobody }
              - match: { prefix: /slow }
                route: { cluster: slow, timeout: 0.3s }
              - match: { prefix: /s/Unavailable }
                route: { cluster: g, retry_policy: { retry_on: "unavailable", num_retries: 2 } }
              - match: { prefix: /s/Deadline }
                route: { cluster: slow, timeout: 5s, max_stream_duration: { grpc_timeout_header_max: 1s } }
              - match: { prefix: /s/ }
                route: { cluster: g }
  clusters:
  - { name: g, type: STATIC, connect_timeout: 1s, load_assignment: { cluster_name: g, endpoints: [ { lb_endpoints: [ { endpoint: { address: { socket_address: { address: 127.0.0.1, port_value: {G} } } } } ] } ] } }
  - { name: slow, type: STATIC, connect_timeout: 20s, load_assignment: { cluster_name: slow, endpoints: [ { lb_endpoints: [ { endpoint: { address: { socket_address: { address: 127.0.0.1, port_value: {SLOW} } } } } ] } ] } }
  - { name: dead, type: STATIC, connect_timeout: 1s, load_assignment: { cluster_name: dead, endpoints: [ { lb_endpoints: [ { endpoint: { address: { socket_address: { address: 127.99.0.1, port_value: 1 } } } } ] } ] } }
  - { name: empty, type: STATIC, connect_timeout: 1s, load_assignment: { cluster_name: empty } }
"#;

/// What a gRPC server says to a method.
struct Said {
    status: u16,
    fields: &'static [(&'static str, &'static str)],
    /// Whether what it was sent comes back.
    echo: bool,
    trailers: &'static [(&'static str, &'static str)],
}

fn said(path: &str) -> Said {
    const KIND: (&str, &str) = ("content-type", "application/grpc");
    let (status, fields, echo, trailers): (u16, &'static [_], bool, &'static [_]) = match path {
        "/s/Echo" => (200, &[KIND], true, &[("grpc-status", "0"), ("x-end", "yes")]),
        "/s/Missing" => (
            200,
            &[KIND, ("grpc-status", "5"), ("grpc-message", "no such thing")],
            false,
            &[],
        ),
        "/s/Late" => (
            200,
            &[KIND],
            true,
            &[("grpc-status", "13"), ("grpc-message", "late"), ("x-end", "late")],
        ),
        "/s/NoStatus" => (200, &[KIND], true, &[]),
        "/s/Unavailable" => (200, &[KIND, ("grpc-status", "14")], false, &[]),
        "/s/Http503" => (503, &[("content-type", "text/plain")], true, &[]),
        "/s/Own" => (200, &[KIND], true, &[("grpc-status", "77")]),
        _ => (200, &[KIND, ("grpc-status", "12")], false, &[]),
    };
    Said {
        status,
        fields,
        echo,
        trailers,
    }
}

fn fields(of: &[(&'static str, &'static str)]) -> HeaderMap {
    of.iter()
        .map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap()))
        .collect::<HeaderMap>()
}

/// A gRPC server without gRPC: it says what [`said`] has.
async fn callee() -> (SocketAddr, tokio::task::JoinHandle<()>) {
    let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = socket.local_addr().unwrap();
    let task = tokio::spawn(async move {
        let mut connections = tokio::task::JoinSet::new();
        while let Ok((stream, _)) = socket.accept().await {
            let service = hyper::service::service_fn(|request: Request<hyper::body::Incoming>| async {
                let said = said(request.uri().path());
                let sent = request.into_body().collect().await?.to_bytes();
                let back = if said.echo { sent } else { Bytes::new() };
                let trailers = (!said.trailers.is_empty()).then(|| Ok(fields(said.trailers)));
                let body = Full::new(back).with_trailers(std::future::ready(trailers));
                let mut response = Response::new(body);
                *response.status_mut() = said.status.try_into().unwrap();
                *response.headers_mut() = fields(said.fields);
                Ok::<_, hyper::Error>(response)
            });
            connections.spawn(async move {
                let _ = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
                    .serve_connection(TokioIo::new(stream), service)
                    .await;
            });
        }
    });
    (at, task)
}

/// A call's answer: status, fields, messages, trailers.
type Called = (u16, BTreeMap<String, String>, Bytes, BTreeMap<String, String>);

async fn call(
    sender: &SendRequest<Full<Bytes>>,
    scheme: &str,
    case: &str,
    path: &str,
    body: Bytes,
) -> Called {
    let shown = |fields: &HeaderMap| -> BTreeMap<String, String> {
        fields
            .iter()
            .map(|(name, value)| (name.to_string(), value.to_str().unwrap().to_owned()))
            .filter(|(name, _)| {
                [
                    "location",
                    "content-type",
                    "content-length",
                    "x-end",
                    "grpc-status",
                    "grpc-message",
                ]
                .contains(&name.as_str())
            })
            .collect()
    };
    let mut request = Request::post(format!("{scheme}://api.example{path}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .header("x-case", case);
    if path.starts_with("/s/Deadline") {
        request = request.header("grpc-timeout", "200m");
    }
    let sent = sender
        .clone()
        .send_request(request.body(Full::new(body)).unwrap());
    let (parts, body) = soon("an answer to a call", sent).await.unwrap().into_parts();
    let whole = soon("the end of a call", body.collect()).await.unwrap();
    let trailers = whole.trailers().map(shown).unwrap_or_default();
    (
        parts.status.as_u16(),
        shown(&parts.headers),
        whole.to_bytes(),
        trailers,
    )
}

#[tokio::test]
async fn grpc_calls_end_alike_with_the_same_trailers_through_envoy_and_serin_proxy() {
    for tls in [false, true] {
        let (wire, trust) = (Wire { http2: true, tls }, Trust::new());
        let (callee, task) = callee().await;
        let (front, _front) = wire.front(&trust, callee).await;
        let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("access.log");
        let text = CALLS
            .replace("{G}", &front.port().to_string())
            .replace("{SLOW}", &silent.local_addr().unwrap().port().to_string());
        let resources = by_ads(&text, log.to_str().unwrap(), wire, &trust);
        let Some(pair) = Pair::start(resources).await else {
            return;
        };
        let mut senders = Vec::new();
        for at in pair.listener("http").await {
            let Asker::Http2(sender, scheme) = Asker::new(wire, &trust, at).await else {
                unreachable!("calls are HTTP/2");
            };
            soon("routes", async {
                let ready = || call(&sender, scheme, "-", "/s/Echo", Bytes::new());
                while !ready().await.3.contains_key("grpc-status") {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
            })
            .await;
            senders.push((sender, scheme));
        }
        let message = |size: usize| {
            let mut bytes = vec![0];
            bytes.extend((size as u32).to_be_bytes());
            bytes.resize(size + 5, b'm');
            Bytes::from(bytes)
        };
        let mut cases = Vec::new();
        for path in [
            "/s/Echo",
            "/s/Missing",
            "/s/Late",
            "/s/NoStatus",
            "/s/Unavailable",
            "/s/Http503",
            "/s/Own",
            "/s/Else",
            "/s/Deadline",
            "/direct",
            "/redirect",
            "/dead",
            "/empty",
            "/nobody",
            "/slow",
            "/none",
        ] {
            cases.push((path, message(3)));
        }
        cases.push(("/s/Echo", Bytes::new()));
        // More than a window.
        cases.push(("/s/Echo", message(300_000)));
        cases.push(("/s/Late", message(300_000)));
        let mut answers = Vec::new();
        for (index, (path, body)) in cases.iter().enumerate() {
            let mut pair = Vec::new();
            for (who, (sender, scheme)) in ["ours", "theirs"].into_iter().zip(&senders) {
                pair.push(call(sender, scheme, &format!("{who}-{index}"), path, body.clone()).await);
            }
            answers.push(<[Called; 2]>::try_from(pair).unwrap());
        }
        let lines = logged(&log, cases.len() * 2).await;
        let mut differences = Vec::new();
        for (index, ((path, _), [mut ours, mut theirs])) in cases.iter().zip(answers).enumerate() {
            // The name of a cluster that is not there is what one looks for: ours tells it.
            let logged = |who: &str| {
                let line = pardoned_details(&lines[&format!("{who}-{index}")]);
                line.replace("cluster_not_found nobody", "cluster_not_found -")
            };
            let logs = [logged("ours"), logged("theirs")];
            for seen in [&mut ours, &mut theirs] {
                // Which transport's reason there is, is worded differently.
                if let Some(text) = seen.1.get_mut("grpc-message")
                    && text.starts_with("upstream connect error")
                {
                    text.truncate("upstream connect error".len());
                }
            }
            if ours != theirs || logs[0] != logs[1] {
                let short =
                    |seen: &Called| format!("{} {:?} {} bytes {:?}", seen.0, seen.1, seen.2.len(), seen.3);
                differences.push(format!(
                    "{index} {path}\n   ours   {} {}\n   theirs {} {}",
                    short(&ours),
                    logs[0],
                    short(&theirs),
                    logs[1]
                ));
            }
        }
        all_alike(&differences, cases.len());
        pair.stop().await;
        task.abort();
    }
}
