//! Resources, backends and clients for the tests.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use prost::{Message, Name};
use serin_proxy::config::store::Update;
use serin_proxy::control::{Options, Proxy};
use serin_xds::ResourceType;
use serin_xds::pb::envoy::config::accesslog::v3 as accesslog;
use serin_xds::pb::envoy::config::cluster::v3 as cluster;
use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::envoy::config::endpoint::v3 as endpoint;
use serin_xds::pb::envoy::config::listener::v3 as listener;
use serin_xds::pb::envoy::config::route::v3 as route;
use serin_xds::pb::envoy::extensions::access_loggers::file::v3 as log_file;
use serin_xds::pb::envoy::extensions::filters::network::http_connection_manager::v3 as hcm;
use serin_xds::pb::envoy::extensions::filters::network::tcp_proxy::v3 as tcp_proxy;
use serin_xds::pb::google::protobuf as google;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;

/// Nothing in these tests takes this long; what does, hangs.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) async fn soon<T>(what: &str, work: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, work)
        .await
        .unwrap_or_else(|_| panic!("{what} did not happen"))
}

pub(crate) fn any<M: Message + Name>(message: &M) -> google::Any {
    google::Any {
        type_url: M::type_url(),
        value: message.encode_to_vec(),
    }
}

pub(crate) fn number(value: u32) -> Option<google::UInt32Value> {
    Some(google::UInt32Value { value })
}

pub(crate) fn millis(value: u64) -> Option<google::Duration> {
    Some(google::Duration {
        seconds: (value / 1000) as i64,
        nanos: (value % 1000 * 1_000_000) as i32,
    })
}

pub(crate) fn address(address: SocketAddr) -> Option<core::Address> {
    Some(core::Address {
        address: Some(core::address::Address::SocketAddress(core::SocketAddress {
            address: address.ip().to_string(),
            port_specifier: Some(core::socket_address::PortSpecifier::PortValue(u32::from(
                address.port(),
            ))),
            ..Default::default()
        })),
    })
}

pub(crate) fn string_struct(pairs: &[(&str, &str)]) -> google::Struct {
    let value = |text: &str| google::Value {
        kind: Some(google::value::Kind::StringValue(text.into())),
    };
    google::Struct {
        fields: pairs
            .iter()
            .map(|(key, text)| ((*key).to_owned(), value(text)))
            .collect(),
    }
}

pub(crate) fn assignment(name: &str, endpoints: &[(SocketAddr, &str)]) -> endpoint::ClusterLoadAssignment {
    let lb_endpoints = endpoints
        .iter()
        .map(|(at, workload)| endpoint::LbEndpoint {
            host_identifier: Some(endpoint::lb_endpoint::HostIdentifier::Endpoint(
                endpoint::Endpoint {
                    address: address(*at),
                    ..Default::default()
                },
            )),
            metadata: (!workload.is_empty()).then(|| core::Metadata {
                filter_metadata: [("istio".to_owned(), string_struct(&[("workload", workload)]))].into(),
                ..Default::default()
            }),
            ..Default::default()
        })
        .collect();
    endpoint::ClusterLoadAssignment {
        cluster_name: name.into(),
        endpoints: vec![endpoint::LocalityLbEndpoints {
            lb_endpoints,
            ..Default::default()
        }],
        ..Default::default()
    }
}

pub(crate) fn eds_cluster(name: &str) -> cluster::Cluster {
    cluster::Cluster {
        name: name.into(),
        cluster_discovery_type: Some(cluster::cluster::ClusterDiscoveryType::Type(
            cluster::cluster::DiscoveryType::Eds as i32,
        )),
        lb_policy: cluster::cluster::LbPolicy::LeastRequest as i32,
        connect_timeout: millis(2000),
        metadata: Some(core::Metadata {
            filter_metadata: [(
                "istio".to_owned(),
                google::Struct {
                    fields: [(
                        "services".to_owned(),
                        google::Value {
                            kind: Some(google::value::Kind::ListValue(google::ListValue {
                                values: vec![google::Value {
                                    kind: Some(google::value::Kind::StructValue(string_struct(&[
                                        ("host", "reviews.prod.svc.cluster.local"),
                                        ("name", "reviews"),
                                        ("namespace", "prod"),
                                    ]))),
                                }],
                            })),
                        },
                    )]
                    .into(),
                },
            )]
            .into(),
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// The cluster speaks HTTP/2 with prior knowledge.
pub(crate) fn speaking_h2(mut cluster: cluster::Cluster) -> cluster::Cluster {
    cluster.http2_protocol_options = Some(core::Http2ProtocolOptions::default());
    cluster
}

pub(crate) fn to_cluster(name: &str) -> route::RouteAction {
    route::RouteAction {
        cluster_specifier: Some(route::route_action::ClusterSpecifier::Cluster(name.into())),
        timeout: millis(0),
        ..Default::default()
    }
}

pub(crate) fn to_weighted(clusters: &[(&str, u32)]) -> route::RouteAction {
    route::RouteAction {
        cluster_specifier: Some(route::route_action::ClusterSpecifier::WeightedClusters(
            route::WeightedCluster {
                clusters: clusters
                    .iter()
                    .map(|(name, weight)| route::weighted_cluster::ClusterWeight {
                        name: (*name).into(),
                        weight: number(*weight),
                        ..Default::default()
                    })
                    .collect(),
                ..Default::default()
            },
        )),
        timeout: millis(0),
        ..Default::default()
    }
}

/// Istio's default retry policy.
pub(crate) fn istio_retries() -> Option<route::RetryPolicy> {
    Some(route::RetryPolicy {
        retry_on: "connect-failure,refused-stream,unavailable,cancelled,retriable-status-codes".into(),
        num_retries: number(2),
        retry_host_predicate: vec![route::retry_policy::RetryHostPredicate {
            name: "envoy.retry_host_predicates.previous_hosts".into(),
            config_type: None,
        }],
        host_selection_retry_max_attempts: 5,
        ..Default::default()
    })
}

pub(crate) fn prefix_route(prefix: &str, action: route::RouteAction) -> route::Route {
    route::Route {
        name: "r".into(),
        r#match: Some(route::RouteMatch {
            path_specifier: Some(route::route_match::PathSpecifier::Prefix(prefix.into())),
            ..Default::default()
        }),
        action: Some(route::route::Action::Route(action)),
        ..Default::default()
    }
}

pub(crate) fn host(name: &str, domain: &str, routes: Vec<route::Route>) -> route::VirtualHost {
    route::VirtualHost {
        name: name.into(),
        domains: vec![domain.into()],
        routes,
        ..Default::default()
    }
}

pub(crate) fn http_filter(name: &str, config: Option<google::Any>) -> hcm::HttpFilter {
    hcm::HttpFilter {
        name: name.into(),
        config_type: config.map(hcm::http_filter::ConfigType::TypedConfig),
        ..Default::default()
    }
}

/// A connection manager as our control plane sets it up, with routes by RDS.
pub(crate) fn manager(routes: &str) -> hcm::HttpConnectionManager {
    hcm::HttpConnectionManager {
        stat_prefix: "test".into(),
        http_filters: vec![
            http_filter("envoy.filters.http.fault", None),
            http_filter("envoy.filters.http.cors", None),
            http_filter("envoy.filters.http.router", None),
        ],
        route_specifier: Some(hcm::http_connection_manager::RouteSpecifier::Rds(hcm::Rds {
            route_config_name: routes.into(),
            ..Default::default()
        })),
        upgrade_configs: vec![hcm::http_connection_manager::UpgradeConfig {
            upgrade_type: "websocket".into(),
            ..Default::default()
        }],
        normalize_path: Some(google::BoolValue { value: true }),
        ..Default::default()
    }
}

/// An access log that writes lines of this format to a file.
pub(crate) fn file_log(path: &str, line: &str) -> accesslog::AccessLog {
    accesslog::AccessLog {
        name: "envoy.access_loggers.file".into(),
        config_type: Some(accesslog::access_log::ConfigType::TypedConfig(any(
            &log_file::FileAccessLog {
                path: path.into(),
                access_log_format: Some(log_file::file_access_log::AccessLogFormat::LogFormat(
                    core::SubstitutionFormatString {
                        format: Some(core::substitution_format_string::Format::TextFormatSource(
                            core::DataSource {
                                specifier: Some(core::data_source::Specifier::InlineString(line.into())),
                                ..Default::default()
                            },
                        )),
                        ..Default::default()
                    },
                )),
            },
        ))),
        ..Default::default()
    }
}

pub(crate) fn network_filter(name: &str, config: Option<google::Any>) -> listener::Filter {
    listener::Filter {
        name: name.into(),
        config_type: config.map(listener::filter::ConfigType::TypedConfig),
    }
}

/// The filter that joins connections with endpoints of a cluster.
pub(crate) fn tcp_filter(cluster: &str) -> listener::Filter {
    let proxy = tcp_proxy::TcpProxy {
        stat_prefix: "t".into(),
        cluster_specifier: Some(tcp_proxy::tcp_proxy::ClusterSpecifier::Cluster(cluster.into())),
        ..Default::default()
    };
    network_filter("envoy.filters.network.tcp_proxy", Some(any(&proxy)))
}

pub(crate) fn http_chain(manager: &hcm::HttpConnectionManager) -> listener::FilterChain {
    listener::FilterChain {
        filters: vec![network_filter(
            "envoy.filters.network.http_connection_manager",
            Some(any(manager)),
        )],
        ..Default::default()
    }
}

pub(crate) fn listener_of(
    name: &str,
    direction: core::TrafficDirection,
    chains: Vec<listener::FilterChain>,
) -> listener::Listener {
    listener::Listener {
        name: name.into(),
        address: address("127.0.0.1:0".parse().unwrap()),
        filter_chains: chains,
        traffic_direction: direction as i32,
        ..Default::default()
    }
}

/// A proxy and the lines of its access log.
pub(crate) struct Harness {
    pub(crate) proxy: Arc<Proxy>,
    pub(crate) log: mpsc::Receiver<String>,
}

impl Harness {
    pub(crate) fn start() -> Self {
        Self::start_with(1)
    }

    pub(crate) fn start_with(concurrency: usize) -> Self {
        let labels = google::Value {
            kind: Some(google::value::Kind::StructValue(string_struct(&[
                ("app", "gate"),
                ("version", "v9"),
            ]))),
        };
        let mut metadata = string_struct(&[
            ("WORKLOAD_NAME", "gate-v9"),
            ("NAMESPACE", "edge"),
            ("CLUSTER_ID", "k"),
        ]);
        metadata.fields.insert("LABELS".into(), labels);
        let node = core::Node {
            id: "router~10.0.0.1~gate-0.edge~edge.svc.cluster.local".into(),
            metadata: Some(metadata),
            client_features: vec!["serin.vhds".into()],
            ..Default::default()
        };
        let (proxy, log) = Proxy::start(Options {
            node,
            concurrency,
            ..Default::default()
        })
        .expect("workers start");
        Self { proxy, log }
    }

    pub(crate) async fn try_put<M: Message>(
        &self,
        resource_type: ResourceType,
        name: &str,
        message: &M,
    ) -> Option<String> {
        let body = message.encode_to_vec();
        let refused = self
            .proxy
            .apply(resource_type, &[Update { name, body: &body }], &[])
            .await;
        refused.into_iter().next().map(|(_, refusal)| refusal.to_string())
    }

    pub(crate) async fn put<M: Message>(&self, resource_type: ResourceType, name: &str, message: &M) {
        assert_eq!(
            self.try_put(resource_type, name, message).await,
            None,
            "{name} was refused"
        );
    }

    /// One that a control plane would send.
    pub(crate) async fn put_resource(&self, resource: &serin_xds::Resource) {
        let update = Update {
            name: &resource.name,
            body: &resource.body,
        };
        let refused = self.proxy.apply(resource.resource_type, &[update], &[]).await;
        assert!(refused.is_empty(), "{}: {refused:?}", resource.name);
    }

    pub(crate) async fn remove(&self, resource_type: ResourceType, name: &str) {
        assert!(self.proxy.apply(resource_type, &[], &[name]).await.is_empty());
    }

    pub(crate) async fn cluster(&self, name: &str, endpoints: &[SocketAddr]) {
        self.put(ResourceType::Cluster, name, &eds_cluster(name)).await;
        self.endpoints(name, endpoints).await;
    }

    pub(crate) async fn endpoints(&self, name: &str, endpoints: &[SocketAddr]) {
        let named: Vec<_> = endpoints
            .iter()
            .map(|at| (*at, "reviews-v1;prod;reviews;v1;k"))
            .collect();
        self.put(ResourceType::Endpoints, name, &assignment(name, &named))
            .await;
    }

    /// Routes named `80` for any host, and a listener for them.
    pub(crate) async fn serve(&self, routes: Vec<route::Route>) -> SocketAddr {
        self.routes(vec![host("all", "*", routes)]).await;
        self.listen(&manager("80"), core::TrafficDirection::Outbound)
            .await
    }

    /// A listener that sends everything to this cluster, as the action says.
    pub(crate) async fn serve_cluster(
        &self,
        cluster: &cluster::Cluster,
        endpoints: &[SocketAddr],
        action: route::RouteAction,
    ) -> SocketAddr {
        self.put(ResourceType::Cluster, &cluster.name, cluster).await;
        self.endpoints(&cluster.name, endpoints).await;
        self.serve(vec![prefix_route("/", action)]).await
    }

    /// Every request goes to that cluster.
    pub(crate) async fn route_all_to(&self, cluster: &str) {
        self.routes(vec![host(
            "all",
            "*",
            vec![prefix_route("/", to_cluster(cluster))],
        )])
        .await;
    }

    pub(crate) async fn routes(&self, virtual_hosts: Vec<route::VirtualHost>) {
        let config = route::RouteConfiguration {
            name: "80".into(),
            virtual_hosts,
            ..Default::default()
        };
        self.put(ResourceType::Route, "80", &config).await;
    }

    pub(crate) async fn listen(
        &self,
        manager: &hcm::HttpConnectionManager,
        direction: core::TrafficDirection,
    ) -> SocketAddr {
        self.put(
            ResourceType::Listener,
            "l",
            &listener_of("l", direction, vec![http_chain(manager)]),
        )
        .await;
        self.proxy.listener_address("l").expect("bound")
    }

    /// The value of the only series of `name` whose labels contain all of `labels`, or 0.
    pub(crate) fn counter(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        let families = self.proxy.metrics();
        let mut sum = 0.0;
        for family in families.iter().filter(|family| family.name == name) {
            for (have, value) in &family.metrics {
                let fits = labels
                    .iter()
                    .all(|(key, text)| have.iter().any(|(k, v)| k == key && v == text));
                if fits && let serin_proxy::metrics::collect::Value::Counter(value) = value {
                    sum += value;
                }
            }
        }
        sum
    }

    /// The next line of the access log as JSON.
    pub(crate) async fn line(&mut self) -> serde_json::Value {
        let line = soon("an access log line", self.log.recv())
            .await
            .expect("the log is open");
        serde_json::from_str(&line).expect("a JSON line")
    }
}

/// What a backend saw of a request.
#[derive(Clone, Debug)]
pub(crate) struct Seen {
    pub(crate) method: String,
    pub(crate) path: String,
    /// Of HTTP/2 and of absolute targets.
    pub(crate) authority: Option<String>,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
}

type Answer = dyn Fn(&Seen) -> Response<Full<Bytes>> + Send + Sync;

/// An HTTP server that speaks both versions and answers what it is told.
pub(crate) struct Backend {
    pub(crate) address: SocketAddr,
    pub(crate) hits: Arc<AtomicUsize>,
    pub(crate) seen: mpsc::UnboundedReceiver<Seen>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Backend {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Backend {
    /// Answers its own name.
    pub(crate) async fn named(name: &'static str) -> Self {
        Self::answering(move |_| Response::new(Full::from(name))).await
    }

    pub(crate) async fn answering(
        answer: impl Fn(&Seen) -> Response<Full<Bytes>> + Send + Sync + 'static,
    ) -> Self {
        let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = socket.local_addr().unwrap();
        let hits = Arc::new(AtomicUsize::new(0));
        let (sender, seen) = mpsc::unbounded_channel();
        let answer: Arc<Answer> = Arc::new(answer);
        let counted = hits.clone();
        let task = tokio::spawn(async move {
            let mut connections = tokio::task::JoinSet::new();
            loop {
                let Ok((stream, _)) = socket.accept().await else {
                    return;
                };
                let (answer, counted, sender) = (answer.clone(), counted.clone(), sender.clone());
                connections.spawn(async move {
                    let service = service_fn(move |request: Request<Incoming>| {
                        let (answer, counted, sender) = (answer.clone(), counted.clone(), sender.clone());
                        async move {
                            counted.fetch_add(1, Ordering::SeqCst);
                            let (parts, body) = request.into_parts();
                            // Who never got the whole request does not answer it.
                            let body = body.collect().await?.to_bytes();
                            let seen = Seen {
                                method: parts.method.to_string(),
                                path: parts.uri.path_and_query().unwrap().to_string(),
                                authority: parts.uri.authority().map(ToString::to_string),
                                headers: parts.headers,
                                body,
                            };
                            let response = answer(&seen);
                            let _ = sender.send(seen);
                            Ok::<_, hyper::Error>(response)
                        }
                    });
                    let _ = hyper_util::server::conn::auto::Builder::new(TokioExecutor::new())
                        .serve_connection(TokioIo::new(stream), service)
                        .await;
                });
            }
        });
        Self {
            address,
            hits,
            seen,
            task,
        }
    }

    pub(crate) fn hits(&self) -> usize {
        self.hits.load(Ordering::SeqCst)
    }

    pub(crate) async fn next(&mut self) -> Seen {
        soon("a request at the backend", self.seen.recv()).await.unwrap()
    }
}

/// An address where nobody listens, and where no other test can come to listen.
pub(crate) async fn closed_port() -> SocketAddr {
    SocketAddr::from(([127, 99, 0, 1], 1))
}

/// A port where nobody listens, for a program that is to be told one. Below the ports that the kernel deals out, so that no
/// connection and no listener of another test takes it meanwhile; each only once, and other processes begin elsewhere.
pub(crate) async fn free_port() -> SocketAddr {
    const LOWEST: usize = 12_000;
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    let dealt = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").unwrap_or_default();
    let end = dealt
        .split_whitespace()
        .next()
        .and_then(|low| low.parse().ok())
        .filter(|end| *end > LOWEST + 1_000)
        .unwrap_or(32_768);
    let first = std::process::id() as usize * 61;
    loop {
        let offset = (first + NEXT.fetch_add(1, Ordering::SeqCst)) % (end - LOWEST);
        let at = SocketAddr::from(([127, 0, 0, 1], (LOWEST + offset) as u16));
        if TcpListener::bind(at).await.is_ok() {
            return at;
        }
    }
}

pub(crate) fn status(code: u16) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::from(""));
    *response.status_mut() = StatusCode::from_u16(code).unwrap();
    response
}

/// One request over a fresh HTTP/1 connection.
pub(crate) async fn get(at: SocketAddr, path: &str) -> (u16, HeaderMap, String) {
    send(
        at,
        Request::get(path)
            .header("host", "reviews")
            .body(Full::from(""))
            .unwrap(),
    )
    .await
}

pub(crate) async fn send(at: SocketAddr, request: Request<Full<Bytes>>) -> (u16, HeaderMap, String) {
    let stream = soon("a connection", TcpStream::connect(at)).await.unwrap();
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .unwrap();
    let task = tokio::spawn(connection);
    let response = soon("a response", sender.send_request(request)).await.unwrap();
    let (parts, body) = response.into_parts();
    let body = soon("a response body", body.collect()).await.unwrap().to_bytes();
    task.abort();
    (
        parts.status.as_u16(),
        parts.headers,
        String::from_utf8_lossy(&body).into_owned(),
    )
}

/// An HTTP/2 client connection.
pub(crate) async fn h2_client(at: SocketAddr) -> hyper::client::conn::http2::SendRequest<Full<Bytes>> {
    let stream = TcpStream::connect(at).await.unwrap();
    let (sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream))
            .await
            .unwrap();
    tokio::spawn(connection);
    sender
}

/// Writes bytes and reads until the peer closes.
pub(crate) async fn raw(at: SocketAddr, bytes: &[u8]) -> String {
    let mut stream = TcpStream::connect(at).await.unwrap();
    stream.write_all(bytes).await.unwrap();
    let mut answer = Vec::new();
    soon("the end of the connection", stream.read_to_end(&mut answer))
        .await
        .unwrap();
    String::from_utf8_lossy(&answer).into_owned()
}
