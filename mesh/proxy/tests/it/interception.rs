//! Interception between two real network namespaces. Needs root and nft; said, and skipped, without.

use std::net::SocketAddr;
use std::process::Command;
use std::sync::mpsc;

use http_body_util::Full;
use serin_xds::ResourceType;
use serin_xds::pb::envoy::config::cluster::v3 as cluster;
use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::envoy::config::listener::v3 as listener;
use serin_xds::pb::envoy::config::route::v3 as route;
use serin_xds::pb::envoy::extensions::filters::network::http_connection_manager::v3 as hcm;
use serin_xds::pb::google::protobuf as google;
use tokio::net::TcpListener;

use crate::fixture::*;

fn ip(arguments: &str) -> bool {
    Command::new("ip")
        .args(arguments.split(' '))
        .status()
        .is_ok_and(|status| status.success())
}

/// Two namespaces joined by a pair of interfaces; removed when dropped, also by a panic.
struct Namespaces {
    client: String,
    server: String,
}

impl Drop for Namespaces {
    fn drop(&mut self) {
        for name in [&self.client, &self.server] {
            ip(&format!("netns del {name}"));
        }
    }
}

impl Namespaces {
    fn new() -> Option<Self> {
        let pid = std::process::id();
        let names = Self {
            client: format!("serin-c{pid}"),
            server: format!("serin-s{pid}"),
        };
        let (c, s) = (&names.client, &names.server);
        let (vc, vs) = (format!("sc{pid}"), format!("ss{pid}"));
        let steps = [
            format!("netns add {c}"),
            format!("netns add {s}"),
            format!("link add {vc} type veth peer name {vs}"),
            format!("link set {vc} netns {c}"),
            format!("link set {vs} netns {s}"),
            format!("-n {c} addr add 10.231.0.1/24 dev {vc}"),
            format!("-n {s} addr add 10.231.0.2/24 dev {vs}"),
            format!("-n {c} addr add fd23::1/64 dev {vc} nodad"),
            format!("-n {s} addr add fd23::2/64 dev {vs} nodad"),
            format!("-n {c} link set lo up"),
            format!("-n {s} link set lo up"),
            format!("-n {c} link set {vc} up"),
            format!("-n {s} link set {vs} up"),
        ];
        steps.iter().all(|step| ip(step)).then_some(names)
    }

    fn intercept(name: &str) -> bool {
        // Twice: the second run replaces the first.
        (0..2).all(|_| {
            Command::new("ip")
                .args([
                    "netns",
                    "exec",
                    name,
                    env!("CARGO_BIN_EXE_serin-proxy"),
                    "intercept",
                ])
                .status()
                .is_ok_and(|status| status.success())
        })
    }
}

/// Runs `work` on a thread of its own within a namespace; threads that it starts are in it as well.
fn within<T: Send + 'static>(
    name: &str,
    work: impl AsyncFnOnce() -> T + Send + 'static,
) -> std::thread::JoinHandle<T> {
    let file = std::fs::File::open(format!("/run/netns/{name}")).unwrap();
    std::thread::spawn(move || {
        nix::sched::setns(file, nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap()
            .block_on(work())
    })
}

fn original_dst(name: &str, bind: Option<&str>) -> cluster::Cluster {
    cluster::Cluster {
        name: name.into(),
        cluster_discovery_type: Some(cluster::cluster::ClusterDiscoveryType::Type(
            cluster::cluster::DiscoveryType::OriginalDst as i32,
        )),
        lb_policy: cluster::cluster::LbPolicy::ClusterProvided as i32,
        upstream_bind_config: bind.map(|source| core::BindConfig {
            source_address: Some(core::SocketAddress {
                address: source.into(),
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn routed_to(cluster: &str) -> hcm::HttpConnectionManager {
    let config = route::RouteConfiguration {
        name: "inline".into(),
        virtual_hosts: vec![host("all", "*", vec![prefix_route("/", to_cluster(cluster))])],
        ..Default::default()
    };
    hcm::HttpConnectionManager {
        route_specifier: Some(hcm::http_connection_manager::RouteSpecifier::RouteConfig(config)),
        ..manager("unused")
    }
}

fn on(mut message: listener::Listener, at: &str) -> listener::Listener {
    message.address = address(at.parse().unwrap());
    message
}

#[test]
fn requests_between_namespaces_pass_both_proxies_over_ipv4_and_ipv6() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("SKIPPED: interception needs root to make network namespaces");
        return;
    }
    if Command::new("nft").arg("--version").output().is_err() || !std::path::Path::new("/run").exists() {
        eprintln!("SKIPPED: nft (package nftables) is not here");
        return;
    }
    let Some(namespaces) = Namespaces::new() else {
        eprintln!("SKIPPED: network namespaces cannot be made here");
        return;
    };
    assert!(
        Namespaces::intercept(&namespaces.server),
        "intercept in the server's namespace"
    );
    assert!(
        Namespaces::intercept(&namespaces.client),
        "intercept in the client's namespace"
    );
    let (up, server_up) = mpsc::channel();
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let server = within(&namespaces.server, async move || {
        let harness = Harness::start();
        let app = TcpListener::bind("[::]:8080").await.unwrap();
        let (peers, mut seen_peers) = tokio::sync::mpsc::unbounded_channel();
        let serve = tokio::spawn(async move {
            loop {
                let (stream, peer) = app.accept().await.unwrap();
                peers.send(peer.ip().to_canonical()).unwrap();
                tokio::spawn(async move {
                    let service = hyper::service::service_fn(|_| async {
                        Ok::<_, std::convert::Infallible>(http::Response::new(Full::<bytes::Bytes>::from(
                            "app",
                        )))
                    });
                    let io = hyper_util::rt::TokioIo::new(stream);
                    let _ = hyper::server::conn::http1::Builder::new()
                        .serve_connection(io, service)
                        .await;
                });
            }
        });
        harness
            .put(
                ResourceType::Cluster,
                "inbound|8080||",
                &original_dst("inbound|8080||", Some("127.0.0.6")),
            )
            .await;
        let message = listener_of(
            "virtualInbound",
            core::TrafficDirection::Inbound,
            vec![http_chain(&routed_to("inbound|8080||"))],
        );
        let mut message = on(message, "[::]:15006");
        message.listener_filters = vec![listener::ListenerFilter {
            name: "envoy.filters.listener.original_dst".into(),
            ..Default::default()
        }];
        harness
            .put(ResourceType::Listener, "virtualInbound", &message)
            .await;
        up.send(()).unwrap();
        stopped.await.unwrap();
        serve.abort();
        let mut peers = Vec::new();
        while let Ok(peer) = seen_peers.try_recv() {
            peers.push(peer);
        }
        (
            harness.counter(
                "istio_requests_total",
                &[("reporter", "destination"), ("response_code", "200")],
            ),
            peers,
        )
    });
    server_up.recv_timeout(PATIENCE).expect("the server's side is up");
    let client = within(&namespaces.client, async move || {
        let harness = Harness::start();
        harness
            .put(
                ResourceType::Cluster,
                "PassthroughCluster",
                &original_dst("PassthroughCluster", None),
            )
            .await;
        let message = listener_of(
            "virtualOutbound",
            core::TrafficDirection::Outbound,
            vec![http_chain(&routed_to("nowhere"))],
        );
        let mut message = on(message, "[::]:15001");
        message.use_original_dst = Some(google::BoolValue { value: true });
        harness
            .put(ResourceType::Listener, "virtualOutbound", &message)
            .await;
        let message = listener_of(
            "0.0.0.0_8080",
            core::TrafficDirection::Outbound,
            vec![http_chain(&routed_to("PassthroughCluster"))],
        );
        let mut message = on(message, "0.0.0.0:8080");
        message.bind_to_port = Some(google::BoolValue { value: false });
        harness
            .put(ResourceType::Listener, "0.0.0.0_8080", &message)
            .await;
        let mut answers = Vec::new();
        for at in ["10.231.0.2:8080", "[fd23::2]:8080"] {
            answers.push(get(at.parse::<SocketAddr>().unwrap(), "/").await);
        }
        // A port that no listener stands for goes to virtualOutbound itself, whose cluster does not exist.
        answers.push(get("10.231.0.2:9999".parse().unwrap(), "/").await);
        (
            answers,
            harness.counter(
                "istio_requests_total",
                &[("reporter", "source"), ("response_code", "200")],
            ),
        )
    });
    let (answers, reported) = client.join().expect("the client's side");
    stop.send(()).unwrap();
    let (received, peers) = server.join().expect("the server's side");
    for (status, _, body) in &answers[..2] {
        assert_eq!((*status, body.as_str()), (200, "app"));
    }
    assert_eq!(answers[2].0, 503);
    assert_eq!(
        (reported, received),
        (2.0, 2.0),
        "both proxies counted both requests"
    );
    assert!(
        peers.contains(&"127.0.0.6".parse().unwrap()),
        "the application saw {peers:?}"
    );
    assert_eq!(peers.len(), 2);
}
