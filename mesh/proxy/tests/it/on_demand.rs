//! Virtual hosts and clusters that are asked for when a request needs them.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::Request;
use http_body_util::Full;
use serin_proxy::config::on_demand::Limits;
use serin_proxy::control::xds::follow;
use serin_proxy::control::{Options, Proxy};
use serin_xds::ResourceType;
use serin_xds::client::Endpoint;
use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::envoy::config::listener::v3 as listener;
use serin_xds::pb::envoy::config::route::v3 as route;
use serin_xds::pb::envoy::extensions::filters::http::on_demand::v3 as on_demand;
use serin_xds::pb::envoy::extensions::filters::network::http_connection_manager::v3 as hcm;
use serin_xds::pb::envoy::extensions::filters::network::tcp_proxy::v3 as tcp;
use serin_xds::pb::envoy::service::discovery::v3::Resource;
use tokio_util::sync::CancellationToken;

use crate::fixture::*;
use crate::scripted::{Link, Scripted, resource};

fn aggregated() -> Option<core::ConfigSource> {
    Some(core::ConfigSource {
        config_source_specifier: Some(core::config_source::ConfigSourceSpecifier::Ads(
            core::AggregatedConfigSource {},
        )),
        ..Default::default()
    })
}

fn clusters(timeout_ms: u64) -> Option<on_demand::OnDemandCds> {
    Some(on_demand::OnDemandCds {
        source: aggregated(),
        timeout: millis(timeout_ms),
        ..Default::default()
    })
}

/// A connection manager with the on-demand filter.
fn manager_on_demand(odcds: Option<on_demand::OnDemandCds>) -> hcm::HttpConnectionManager {
    let mut manager = manager("80");
    let filter = http_filter(
        "envoy.filters.http.on_demand",
        Some(any(&on_demand::OnDemand { odcds })),
    );
    manager.http_filters.insert(0, filter);
    manager
}

/// A proxy that follows a scripted control plane.
struct Followed {
    proxy: Arc<Proxy>,
    control: Scripted,
    log: tokio::sync::mpsc::Receiver<String>,
    cancel: CancellationToken,
    _directory: tempfile::TempDir,
}

impl Followed {
    async fn start(limits: Limits) -> (Self, Link) {
        let directory = tempfile::tempdir().unwrap();
        let mut control = Scripted::start(directory.path());
        let (proxy, log) = Proxy::start(Options {
            concurrency: 1,
            on_demand: limits,
            ..Default::default()
        })
        .unwrap();
        let cancel = CancellationToken::new();
        let endpoint = Endpoint::Unix(control.socket.clone());
        tokio::spawn(follow(proxy.clone(), endpoint, cancel.clone()));
        let link = control.link().await;
        let out = Self {
            proxy,
            control,
            log,
            cancel,
            _directory: directory,
        };
        (out, link)
    }

    /// A proxy that serves the manager and the route configuration in front of a backend of its own.
    async fn serving(
        limits: Limits,
        manager: &hcm::HttpConnectionManager,
        routes: route::RouteConfiguration,
    ) -> (Self, Link, Backend, SocketAddr) {
        let (proxy, mut link) = Self::start(limits).await;
        let backend = Backend::named("b").await;
        let at = proxy.configure(&mut link, backend.address, manager, routes).await;
        (proxy, link, backend, at)
    }

    /// Configures a listener with the manager, a cluster `c` and the route configuration.
    async fn configure(
        &self,
        link: &mut Link,
        backend: SocketAddr,
        manager: &hcm::HttpConnectionManager,
        routes: route::RouteConfiguration,
    ) -> SocketAddr {
        let cluster = resource(ResourceType::Cluster, "c", "1", &eds_cluster("c"));
        link.put(ResourceType::Cluster, vec![cluster]).await;
        link.subscribed(ResourceType::Endpoints, "c").await;
        let endpoints = resource(
            ResourceType::Endpoints,
            "c",
            "1",
            &assignment("c", &[(backend, "")]),
        );
        link.put(ResourceType::Endpoints, vec![endpoints]).await;
        let listener = listener_of("l", core::TrafficDirection::Outbound, vec![http_chain(manager)]);
        let listener = resource(ResourceType::Listener, "l", "1", &listener);
        link.put(ResourceType::Listener, vec![listener]).await;
        link.subscribed(ResourceType::Route, "80").await;
        link.put(
            ResourceType::Route,
            vec![resource(ResourceType::Route, "80", "1", &routes)],
        )
        .await;
        self.proxy.listener_address("l").unwrap()
    }
}

impl Drop for Followed {
    fn drop(&mut self) {
        self.cancel.cancel();
    }
}

fn discovering() -> route::RouteConfiguration {
    route::RouteConfiguration {
        name: "80".into(),
        vhds: Some(route::Vhds {
            config_source: aggregated(),
        }),
        ..Default::default()
    }
}

/// A virtual host as a server answers for it: named otherwise, with what it was asked for as aliases.
fn answered(name: &str, domain: &str, aliases: &[&str]) -> Resource {
    let message = host(name, domain, vec![prefix_route("/", to_cluster("c"))]);
    Resource {
        aliases: aliases.iter().map(|alias| (*alias).to_owned()).collect(),
        ..resource(ResourceType::VirtualHost, &format!("80/{name}"), "1", &message)
    }
}

async fn get_host(at: SocketAddr, host: &str) -> (u16, String) {
    let request = Request::get("/")
        .header("host", host)
        .body(Full::<Bytes>::default());
    let (status, _, body) = send(at, request.unwrap()).await;
    (status, body)
}

/// Somebody who comes second, and waits as well.
async fn second<T: Send + 'static>(
    proxy: &Followed,
    work: impl Future<Output = T> + Send + 'static,
) -> tokio::task::JoinHandle<T> {
    let one = tokio::spawn(work);
    while proxy.proxy.on_demand().waiting() < 2 {
        tokio::task::yield_now().await;
    }
    one
}

/// Sends the cluster that somebody waits for once it is asked for, waits for `between`, and then sends its endpoint.
async fn deliver<T, B>(
    link: &mut Link,
    at: SocketAddr,
    waiting: &tokio::task::JoinHandle<T>,
    between: impl Future<Output = B>,
) -> B {
    link.subscribed(ResourceType::Cluster, "late").await;
    let cluster = resource(ResourceType::Cluster, "late", "1", &eds_cluster("late"));
    link.put(ResourceType::Cluster, vec![cluster]).await;
    link.subscribed(ResourceType::Endpoints, "late").await;
    let between = soon("what happens in between", between).await;
    assert!(!waiting.is_finished(), "it has no endpoints yet");
    let endpoints = assignment("late", &[(at, "")]);
    link.put(
        ResourceType::Endpoints,
        vec![resource(ResourceType::Endpoints, "late", "1", &endpoints)],
    )
    .await;
    between
}

#[tokio::test]
async fn a_request_for_an_unknown_host_waits_for_its_virtual_host_and_is_routed() {
    let (proxy, mut link, _backend, at) =
        Followed::serving(Limits::default(), &manager_on_demand(None), discovering()).await;
    // Like Envoy, everything that the server has for it is asked for first.
    link.subscribed(ResourceType::VirtualHost, "*").await;
    let waiting: Vec<_> = (0..3)
        .map(|_| tokio::spawn(get_host(at, "Reviews.Example:80")))
        .collect();
    let request = link
        .subscribed(ResourceType::VirtualHost, "80/reviews.example:80")
        .await;
    assert_eq!(request.resource_names_subscribe.len(), 1);
    let on_demand = proxy.proxy.on_demand();
    soon("three requests that wait", async {
        while on_demand.waiting() < 3 {
            tokio::task::yield_now().await;
        }
    })
    .await;
    link.put(
        ResourceType::VirtualHost,
        vec![answered(
            "reviews",
            "reviews.example:80",
            &["80/reviews.example:80"],
        )],
    )
    .await;
    for one in waiting {
        assert_eq!(one.await.unwrap(), (200, "b".to_owned()));
    }
    assert_eq!(on_demand.waiting(), 0);
    // From now on nothing waits, and the same host under another name is one more question.
    assert_eq!(get_host(at, "reviews.example:80").await.0, 200);
}

#[tokio::test]
async fn a_host_that_the_control_plane_does_not_know_is_404_at_once_until_it_comes_into_being() {
    let (mut proxy, mut link, _backend, at) =
        Followed::serving(Limits::default(), &manager_on_demand(None), discovering()).await;
    // Servers say so by a resource without a body, or by its removal.
    for (host, by_removal) in [("none", false), ("gone", true)] {
        let waiting = tokio::spawn(get_host(at, host));
        let name = format!("80/{host}");
        link.subscribed(ResourceType::VirtualHost, &name).await;
        if by_removal {
            link.send(ResourceType::VirtualHost, Vec::new(), &[&name]);
        } else {
            let absent = Resource {
                name: name.clone(),
                aliases: vec![name.clone()],
                ..Default::default()
            };
            link.send(ResourceType::VirtualHost, vec![absent], &[]);
        }
        assert_eq!(waiting.await.unwrap().0, 404, "{host}");
        let line: serde_json::Value =
            serde_json::from_str(&soon("a line", proxy.log.recv()).await.unwrap()).unwrap();
        assert_eq!(line["response_flags"], "NR");
        assert_eq!(line["response_code_details"], "route_not_found");
        // Nobody is asked again: it is subscribed to.
        assert_eq!(get_host(at, host).await.0, 404);
    }
    link.put(
        ResourceType::VirtualHost,
        vec![answered("late", "none", &["80/none"])],
    )
    .await;
    assert_eq!(get_host(at, "none").await.0, 200);
}

#[tokio::test]
async fn a_virtual_host_that_does_not_come_in_time_is_404_and_nothing_is_left_behind() {
    let limits = Limits {
        host_timeout: Duration::from_millis(50),
        waiting: 1,
        ..Limits::default()
    };
    let (proxy, mut link, _backend, at) =
        Followed::serving(limits, &manager_on_demand(None), discovering()).await;
    assert_eq!(get_host(at, "never").await.0, 404);
    link.subscribed(ResourceType::VirtualHost, "80/never").await;
    assert_eq!(proxy.proxy.on_demand().waiting(), 0);
    // A client that goes away gives its place back.
    let impatient = tokio::spawn(async move { get_host(at, "impatient").await });
    link.subscribed(ResourceType::VirtualHost, "80/impatient").await;
    impatient.abort();
    soon("the place", async {
        while proxy.proxy.on_demand().waiting() > 0 {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

#[tokio::test]
async fn more_requests_than_may_wait_are_404_at_once() {
    let limits = Limits {
        waiting: 1,
        ..Limits::default()
    };
    let (_proxy, mut link, _backend, at) =
        Followed::serving(limits, &manager_on_demand(None), discovering()).await;
    let waiting = tokio::spawn(get_host(at, "a"));
    link.subscribed(ResourceType::VirtualHost, "80/a").await;
    assert_eq!(get_host(at, "b").await.0, 404);
    link.put(ResourceType::VirtualHost, vec![answered("a", "a", &["80/a"])])
        .await;
    assert_eq!(waiting.await.unwrap().0, 200);
}

#[tokio::test]
async fn without_the_filter_no_request_waits() {
    let (proxy, _link, _backend, at) =
        Followed::serving(Limits::default(), &manager("80"), discovering()).await;
    assert_eq!(get_host(at, "a").await.0, 404);
    assert!(
        proxy
            .proxy
            .on_demand()
            .names(serin_proxy::config::on_demand::Wanted::VirtualHost)
            .is_empty()
    );
}

#[tokio::test]
async fn a_virtual_host_that_nobody_uses_is_given_up_and_asked_for_again() {
    let limits = Limits {
        idle: Duration::from_millis(100),
        ..Limits::default()
    };
    let (_proxy, mut link, _backend, at) =
        Followed::serving(limits, &manager_on_demand(None), discovering()).await;
    for round in 0..2 {
        let waiting = tokio::spawn(get_host(at, "a"));
        link.subscribed(ResourceType::VirtualHost, "80/a").await;
        // The same version both times: what was given up is not held any more.
        link.put(ResourceType::VirtualHost, vec![answered("host", "a", &["80/a"])])
            .await;
        assert_eq!(waiting.await.unwrap().0, 200, "round {round}");
        link.given_up(ResourceType::VirtualHost, "80/a").await;
    }
}

fn by_header() -> route::RouteConfiguration {
    let action = route::RouteAction {
        cluster_specifier: Some(route::route_action::ClusterSpecifier::ClusterHeader(
            "x-cluster".into(),
        )),
        ..Default::default()
    };
    route::RouteConfiguration {
        name: "80".into(),
        virtual_hosts: vec![host("all", "*", vec![prefix_route("/", action)])],
        ..Default::default()
    }
}

async fn get_cluster(at: SocketAddr, cluster: &str) -> (u16, String) {
    let request = Request::get("/")
        .header("host", "a")
        .header("x-cluster", cluster)
        .body(Full::<Bytes>::default());
    let (status, _, body) = send(at, request.unwrap()).await;
    (status, body)
}

#[tokio::test]
async fn a_request_for_an_unknown_cluster_waits_for_it_and_its_endpoints() {
    let (proxy, mut link) = Followed::start(Limits::default()).await;
    let (backend, late) = (Backend::named("b").await, Backend::named("late").await);
    let at = proxy
        .configure(
            &mut link,
            backend.address,
            &manager_on_demand(clusters(15_000)),
            by_header(),
        )
        .await;
    assert_eq!(get_cluster(at, "c").await, (200, "b".to_owned()));
    let waiting = tokio::spawn(get_cluster(at, "late"));
    let between = second(&proxy, get_cluster(at, "late"));
    let between = deliver(&mut link, late.address, &waiting, between).await;
    for one in [waiting, between] {
        assert_eq!(one.await.unwrap(), (200, "late".to_owned()));
    }
}

#[tokio::test]
async fn a_connection_waits_for_its_cluster_where_its_proxy_says_so() {
    let (proxy, mut link) = Followed::start(Limits::default()).await;
    let late = Backend::named("late").await;
    let waits = |timeout_ms| tcp::TcpProxy {
        cluster_specifier: Some(tcp::tcp_proxy::ClusterSpecifier::Cluster("late".into())),
        on_demand: Some(tcp::tcp_proxy::OnDemand {
            odcds_config: aggregated(),
            timeout: millis(timeout_ms),
            ..Default::default()
        }),
        ..Default::default()
    };
    for (name, timeout) in [("long", 15_000), ("short", 50)] {
        let chain = listener::FilterChain {
            filters: vec![network_filter(
                "envoy.filters.network.tcp_proxy",
                Some(any(&waits(timeout))),
            )],
            ..Default::default()
        };
        let message = listener_of(name, core::TrafficDirection::Outbound, vec![chain]);
        link.put(
            ResourceType::Listener,
            vec![resource(ResourceType::Listener, name, "1", &message)],
        )
        .await;
    }
    // Not in time: closed.
    let short = proxy.proxy.listener_address("short").unwrap();
    assert_eq!(raw(short, b"").await, "");
    let at = proxy.proxy.listener_address("long").unwrap();
    let request = b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n";
    let waiting = tokio::spawn(raw(at, request));
    // One that comes when the cluster is there and its endpoints are not waits as well.
    let between = second(&proxy, raw(at, request));
    let between = deliver(&mut link, late.address, &waiting, between).await;
    for one in [waiting, between] {
        assert!(one.await.unwrap().ends_with("late"));
    }
}

#[tokio::test]
async fn a_cluster_that_does_not_exist_or_does_not_come_in_time_is_503_nc() {
    let (mut proxy, mut link, _backend, at) =
        Followed::serving(Limits::default(), &manager_on_demand(clusters(50)), by_header()).await;
    // Not in time.
    assert_eq!(get_cluster(at, "never").await.0, 503);
    link.subscribed(ResourceType::Cluster, "never").await;
    // Known not to exist.
    let waiting = tokio::spawn(get_cluster(at, "none"));
    link.subscribed(ResourceType::Cluster, "none").await;
    link.send(ResourceType::Cluster, Vec::new(), &["none"]);
    assert_eq!(waiting.await.unwrap().0, 503);
    for _ in 0..2 {
        let line: serde_json::Value =
            serde_json::from_str(&soon("a line", proxy.log.recv()).await.unwrap()).unwrap();
        assert_eq!(line["response_flags"], "NC");
        assert_eq!(line["response_code_details"], "cluster_not_found");
    }
    // Refused by this proxy: the reason goes back, and the request does not wait for the limit.
    let waiting = tokio::spawn(get_cluster(at, "bad"));
    link.subscribed(ResourceType::Cluster, "bad").await;
    let mut bad = eds_cluster("bad");
    bad.lb_policy = 99;
    let nonce = link.send(
        ResourceType::Cluster,
        vec![resource(ResourceType::Cluster, "bad", "1", &bad)],
        &[],
    );
    assert!(link.answer(&nonce).await.unwrap().contains("lb_policy"));
    assert_eq!(waiting.await.unwrap().0, 503);
}

#[tokio::test]
async fn routes_may_switch_clusters_on_demand_on_and_off() {
    let (proxy, mut link) = Followed::start(Limits::default()).await;
    let (backend, late) = (Backend::named("b").await, Backend::named("late").await);
    let per_route = |odcds| {
        let config = on_demand::PerRouteConfig { odcds };
        [("envoy.filters.http.on_demand".to_owned(), any(&config))].into()
    };
    let mut waits = prefix_route("/waits", to_weighted(&[("late", 1), ("late", 1)]));
    waits.typed_per_filter_config = per_route(clusters(15_000));
    let mut does_not = prefix_route("/", to_cluster("missing"));
    does_not.typed_per_filter_config = per_route(None);
    let routes = route::RouteConfiguration {
        name: "80".into(),
        virtual_hosts: vec![host("all", "*", vec![waits, does_not])],
        ..Default::default()
    };
    let at = proxy
        .configure(
            &mut link,
            backend.address,
            &manager_on_demand(clusters(15_000)),
            routes,
        )
        .await;
    assert_eq!(get(at, "/").await.0, 503);
    let waiting = tokio::spawn(get(at, "/waits"));
    link.subscribed(ResourceType::Cluster, "late").await;
    let mut cluster = eds_cluster("late");
    cluster.cluster_discovery_type = None;
    cluster.load_assignment = Some(assignment("late", &[(late.address, "")]));
    let cluster = resource(ResourceType::Cluster, "late", "1", &cluster);
    link.put(ResourceType::Cluster, vec![cluster]).await;
    assert_eq!(waiting.await.unwrap().2, "late");
    assert!(
        !proxy
            .proxy
            .on_demand()
            .names(serin_proxy::config::on_demand::Wanted::Cluster)
            .contains("missing")
    );
}

#[tokio::test]
async fn a_cluster_that_is_used_stays_and_one_that_is_not_is_given_up() {
    let limits = Limits {
        idle: Duration::from_millis(200),
        ..Limits::default()
    };
    let (_proxy, mut link, backend, at) =
        Followed::serving(limits, &manager_on_demand(clusters(15_000)), by_header()).await;
    for name in ["used", "idle"] {
        let waiting = tokio::spawn(get_cluster(at, name));
        link.subscribed(ResourceType::Cluster, name).await;
        let mut cluster = eds_cluster(name);
        cluster.cluster_discovery_type = None;
        cluster.load_assignment = Some(assignment(name, &[(backend.address, "")]));
        let cluster = resource(ResourceType::Cluster, name, "1", &cluster);
        link.put(ResourceType::Cluster, vec![cluster]).await;
        assert_eq!(waiting.await.unwrap().0, 200);
    }
    let using = async {
        loop {
            assert_eq!(get_cluster(at, "used").await.0, 200);
        }
    };
    tokio::select! {
        () = link.given_up(ResourceType::Cluster, "idle") => {}
        () = using => {}
    }
    assert_eq!(get_cluster(at, "used").await.0, 200);
    // What is part of everything was not asked for by name, and is never given up.
    assert_eq!(get_cluster(at, "c").await.0, 200);
}

#[tokio::test]
async fn when_the_control_plane_is_left_nobody_waits_and_what_came_stays() {
    let (proxy, mut link, _backend, at) =
        Followed::serving(Limits::default(), &manager_on_demand(None), discovering()).await;
    let came = tokio::spawn(get_host(at, "a"));
    link.subscribed(ResourceType::VirtualHost, "80/a").await;
    link.put(ResourceType::VirtualHost, vec![answered("a", "a", &["80/a"])])
        .await;
    assert_eq!(came.await.unwrap().0, 200);
    let waiting = tokio::spawn(get_host(at, "b"));
    link.subscribed(ResourceType::VirtualHost, "80/b").await;
    proxy.cancel.cancel();
    assert_eq!(waiting.await.unwrap().0, 404);
    assert_eq!(get_host(at, "a").await.0, 200);
    assert_eq!(get_host(at, "c").await.0, 404);
    drop(proxy);
}

#[tokio::test]
async fn a_new_stream_asks_again_for_what_requests_wait_for() {
    let (mut proxy, mut link, _backend, at) =
        Followed::serving(Limits::default(), &manager_on_demand(None), discovering()).await;
    let waiting = tokio::spawn(get_host(at, "a"));
    link.subscribed(ResourceType::VirtualHost, "80/a").await;
    drop(link);
    let mut link = proxy.control.link().await;
    link.subscribed(ResourceType::VirtualHost, "80/a").await;
    link.put(ResourceType::VirtualHost, vec![answered("a", "a", &["80/a"])])
        .await;
    assert_eq!(waiting.await.unwrap().0, 200);
}

#[tokio::test]
async fn sources_of_clusters_on_demand_other_than_the_aggregated_stream_are_refused_by_name() {
    let harness = Harness::start();
    let odcds = on_demand::OnDemandCds {
        source: Some(core::ConfigSource {
            config_source_specifier: Some(core::config_source::ConfigSourceSpecifier::Path("/a".into())),
            ..Default::default()
        }),
        ..Default::default()
    };
    for (odcds, path) in [
        (odcds, "odcds.source: only ads"),
        (on_demand::OnDemandCds::default(), "odcds.source: is missing"),
        (
            on_demand::OnDemandCds {
                resources_locator: "xdstp://a".into(),
                ..clusters(1).unwrap()
            },
            "odcds.resources_locator",
        ),
    ] {
        let listener = listener_of(
            "l",
            core::TrafficDirection::Outbound,
            vec![http_chain(&manager_on_demand(Some(odcds)))],
        );
        let refused = harness.try_put(ResourceType::Listener, "l", &listener).await;
        assert!(refused.as_ref().unwrap().contains(path), "{refused:?}");
    }
}
