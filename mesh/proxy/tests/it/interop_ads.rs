//! Envoy and serin-proxy on one ADS server ([`crate::interop_wire`] asks them), and the hosts that they choose: the same
//! ones as often, as far as chance allows.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use futures::stream::{self, StreamExt};
use http::Request;
use http_body_util::{BodyExt, Full};
use hyper_util::rt::TokioIo;
use prost::Message;
use serin_proxy::control::xds::follow;
use serin_xds::client::Endpoint;
use serin_xds::pb::envoy::config::cluster::v3 as cluster;
use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::envoy::config::endpoint::v3 as endpoint;
use serin_xds::pb::envoy::config::route::v3 as route;
use serin_xds::pb::envoy::extensions::filters::http::router::v3 as router;
use serin_xds::pb::envoy::extensions::filters::network::http_connection_manager::v3 as hcm;
use serin_xds::server::Event;
use serin_xds::{Resource, ResourceType};
use tokio::net::TcpStream;
use tokio_util::sync::CancellationToken;

use crate::ads::Ads;
use crate::envoy::{self, Envoy};
use crate::fixture::*;

/// Both proxies on one control plane.
pub(crate) struct Pair {
    pub(crate) ads: Ads,
    pub(crate) envoy: Envoy,
    pub(crate) harness: Harness,
    cancel: CancellationToken,
    follower: tokio::task::JoinHandle<()>,
    _folder: tempfile::TempDir,
}

impl Pair {
    /// Nothing without Envoy.
    pub(crate) async fn start(resources: Vec<Resource>) -> Option<Self> {
        let program = envoy::program()?;
        let folder = tempfile::tempdir().unwrap();
        let ads = Ads::start(&folder.path().join("xds.sock")).unwrap();
        ads.source.put_all(resources);
        let envoy = Envoy::follow(&program, &ads).await;
        let harness = Harness::start();
        let cancel = CancellationToken::new();
        let follower = tokio::spawn(follow(
            harness.proxy.clone(),
            Endpoint::Unix(folder.path().join("xds.sock")),
            cancel.clone(),
        ));
        Some(Self {
            ads,
            envoy,
            harness,
            cancel,
            follower,
            _folder: folder,
        })
    }

    /// Where ours and theirs listen, once both do.
    pub(crate) async fn listener(&self, name: &str) -> [SocketAddr; 2] {
        let ours = async {
            loop {
                if let Some(at) = self.harness.proxy.listener_address(name) {
                    return at;
                }
                tokio::time::sleep(std::time::Duration::from_millis(10)).await;
            }
        };
        let ours = soon(&format!("our listener {name}"), ours).await;
        [ours, self.envoy.listener(name).await]
    }

    /// Whatever was refused was refused by both or by nobody, and here by nobody.
    pub(crate) fn no_refusals(&mut self) {
        while let Ok((_, event)) = self.ads.events.try_recv() {
            if let Event::Refused(resource, reason) = event {
                panic!("{} was refused: {reason}", resource.name);
            }
        }
    }

    pub(crate) async fn stop(mut self) {
        self.no_refusals();
        self.cancel.cancel();
        soon("the end of following", self.follower).await.unwrap();
        self.envoy.stop().await;
    }
}

pub(crate) fn ads_source() -> Option<core::ConfigSource> {
    Some(core::ConfigSource {
        resource_api_version: core::ApiVersion::V3 as i32,
        config_source_specifier: Some(core::config_source::ConfigSourceSpecifier::Ads(
            core::AggregatedConfigSource {},
        )),
        ..Default::default()
    })
}

pub(crate) fn resource<M: Message>(resource_type: ResourceType, name: &str, message: &M) -> Resource {
    Resource::new(resource_type, name, message, [])
}

/// Says where routes come from: Envoy wants to know.
pub(crate) fn from_ads(manager: &mut hcm::HttpConnectionManager) {
    if let Some(hcm::http_connection_manager::RouteSpecifier::Rds(rds)) = &mut manager.route_specifier {
        rds.config_source = ads_source();
    }
}

/// The router by its type: Envoy wants it.
pub(crate) fn router() -> hcm::HttpFilter {
    http_filter("envoy.filters.http.router", Some(any(&router::Router::default())))
}

/// A cluster by EDS with these hosts: address, weight, priority, locality, whether it is well.
fn choosing(
    name: &str,
    policy: cluster::cluster::LbPolicy,
    hosts: &[(SocketAddr, u32, u32, &str, bool)],
) -> Vec<Resource> {
    let mut localities: BTreeMap<(u32, &str), Vec<endpoint::LbEndpoint>> = BTreeMap::new();
    for (at, weight, priority, zone, well) in hosts {
        localities
            .entry((*priority, zone))
            .or_default()
            .push(endpoint::LbEndpoint {
                host_identifier: Some(endpoint::lb_endpoint::HostIdentifier::Endpoint(
                    endpoint::Endpoint {
                        address: address(*at),
                        ..Default::default()
                    },
                )),
                load_balancing_weight: number(*weight),
                health_status: if *well {
                    core::HealthStatus::Healthy as i32
                } else {
                    core::HealthStatus::Unhealthy as i32
                },
                ..Default::default()
            });
    }
    let by_locality = hosts
        .iter()
        .any(|(_, _, _, zone, _)| zone.starts_with("weighted"));
    let assignment = endpoint::ClusterLoadAssignment {
        cluster_name: name.into(),
        endpoints: localities
            .into_iter()
            .map(|((priority, zone), lb_endpoints)| endpoint::LocalityLbEndpoints {
                locality: Some(core::Locality {
                    zone: zone.into(),
                    ..Default::default()
                }),
                // `weighted-3` has weight 3.
                load_balancing_weight: zone
                    .rsplit_once('-')
                    .and_then(|(_, weight)| number(weight.parse().ok()?)),
                priority,
                lb_endpoints,
                ..Default::default()
            })
            .collect(),
        ..Default::default()
    };
    let mut message = cluster::Cluster {
        name: name.into(),
        cluster_discovery_type: Some(cluster::cluster::ClusterDiscoveryType::Type(
            cluster::cluster::DiscoveryType::Eds as i32,
        )),
        eds_cluster_config: Some(cluster::cluster::EdsClusterConfig {
            eds_config: ads_source(),
            ..Default::default()
        }),
        lb_policy: policy as i32,
        connect_timeout: millis(1000),
        ..Default::default()
    };
    if by_locality {
        message.common_lb_config = Some(cluster::cluster::CommonLbConfig {
            locality_config_specifier: Some(
                cluster::cluster::common_lb_config::LocalityConfigSpecifier::LocalityWeightedLbConfig(
                    cluster::cluster::common_lb_config::LocalityWeightedLbConfig {},
                ),
            ),
            ..Default::default()
        });
    }
    vec![
        resource(ResourceType::Cluster, name, &message),
        resource(ResourceType::Endpoints, name, &assignment),
    ]
}

/// Who answers each of `count` requests for `path`, each with another key.
async fn choices(at: SocketAddr, path: &str, count: usize) -> Vec<String> {
    let stream = TcpStream::connect(at).await.unwrap();
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .unwrap();
    let task = tokio::spawn(connection);
    let mut out = Vec::new();
    for index in 0..count {
        let request = Request::get(path)
            .header("host", "a")
            .header("x-key", format!("key-{index}"))
            .body(Full::<bytes::Bytes>::default())
            .unwrap();
        let response = soon("a response", sender.send_request(request)).await.unwrap();
        assert_eq!(response.status(), 200, "{path}");
        let body = response.into_body().collect().await.unwrap().to_bytes();
        out.push(String::from_utf8(body.to_vec()).unwrap());
    }
    task.abort();
    out
}

/// The same over HTTP/2, twenty at a time.
async fn choices_of_streams(at: SocketAddr, path: &str, count: usize) -> Vec<String> {
    let sender = h2_client(at).await;
    let asked = (0..count).map(|index| {
        let request = Request::get(format!("http://a{path}"))
            .header("x-key", format!("key-{index}"))
            .body(Full::default())
            .unwrap();
        let mut sender = sender.clone();
        async move {
            let response = soon("a response", sender.send_request(request)).await.unwrap();
            assert_eq!(response.status(), 200, "{path}");
            let body = response.into_body().collect().await.unwrap().to_bytes();
            String::from_utf8(body.to_vec()).unwrap()
        }
    });
    stream::iter(asked).buffered(20).collect().await
}

/// How often each backend answered.
fn spread(choices: &[String]) -> BTreeMap<&str, usize> {
    let mut out = BTreeMap::new();
    for name in choices {
        *out.entry(name.as_str()).or_insert(0) += 1;
    }
    out
}

#[tokio::test]
async fn hosts_are_chosen_in_the_same_shares_by_envoy_and_serin_proxy() {
    use cluster::cluster::LbPolicy;
    let mut hosts = Vec::new();
    for name in ["h0", "h1", "h2", "h3"] {
        hosts.push(Backend::named(name).await);
    }
    let host = |index: usize, weight, priority, zone, well| {
        let backend: &Backend = &hosts[index];
        (backend.address, weight, priority, zone, well)
    };
    let even: Vec<_> = (0..4).map(|index| host(index, 1, 0, "", true)).collect();
    let uneven: Vec<_> = (0..4)
        .map(|index| host(index, index as u32 + 1, 0, "", true))
        .collect();
    let failed_over = vec![
        host(0, 1, 0, "", false),
        host(1, 1, 0, "", false),
        host(2, 1, 1, "", true),
        host(3, 1, 1, "", true),
    ];
    // 1.4 × half of priority 0 is 70 %.
    let half = vec![
        host(0, 1, 0, "", true),
        host(1, 1, 0, "", false),
        host(2, 1, 1, "", true),
        host(3, 1, 1, "", true),
    ];
    let zones = vec![
        host(0, 1, 0, "weighted-1", true),
        host(1, 1, 0, "weighted-3", true),
    ];
    let mut resources = Vec::new();
    // The expected shares, in percent.
    let clusters: [(&str, LbPolicy, &[(SocketAddr, u32, u32, &str, bool)], [f64; 4]); 8] = [
        ("round-robin", LbPolicy::RoundRobin, &even, [25., 25., 25., 25.]),
        ("weighted", LbPolicy::RoundRobin, &uneven, [10., 20., 30., 40.]),
        (
            "least-request",
            LbPolicy::LeastRequest,
            &even,
            [25., 25., 25., 25.],
        ),
        ("random", LbPolicy::Random, &even, [25., 25., 25., 25.]),
        (
            "failed-over",
            LbPolicy::RoundRobin,
            &failed_over,
            [0., 0., 50., 50.],
        ),
        (
            "overprovisioned",
            LbPolicy::RoundRobin,
            &half,
            [70., 0., 15., 15.],
        ),
        ("zones", LbPolicy::RoundRobin, &zones, [25., 75., 0., 0.]),
        (
            "canary",
            LbPolicy::RoundRobin,
            &[host(3, 1, 0, "", true)],
            [0., 0., 0., 100.],
        ),
    ];
    let mut routes = Vec::new();
    for (name, policy, list, _) in &clusters {
        resources.extend(choosing(name, *policy, list));
        routes.push(prefix_route(&format!("/{name}"), to_cluster(name)));
    }
    for (name, policy) in [("ring-hash", LbPolicy::RingHash), ("maglev", LbPolicy::Maglev)] {
        resources.extend(choosing(name, policy, &even));
        let mut action = to_cluster(name);
        action.hash_policy = vec![route::route_action::HashPolicy {
            policy_specifier: Some(route::route_action::hash_policy::PolicySpecifier::Header(
                route::route_action::hash_policy::Header {
                    header_name: "x-key".into(),
                    ..Default::default()
                },
            )),
            ..Default::default()
        }];
        routes.push(prefix_route(&format!("/{name}"), action));
    }
    routes.push(prefix_route(
        "/split",
        to_weighted(&[("round-robin", 80), ("canary", 20)]),
    ));
    let mut with_source = manager("main");
    with_source.http_filters = vec![router()];
    with_source.route_specifier = Some(hcm::http_connection_manager::RouteSpecifier::Rds(hcm::Rds {
        route_config_name: "main".into(),
        config_source: ads_source(),
    }));
    resources.push(resource(
        ResourceType::Route,
        "main",
        &route::RouteConfiguration {
            name: "main".into(),
            virtual_hosts: vec![crate::fixture::host("all", "*", routes)],
            ..Default::default()
        },
    ));
    resources.push(resource(
        ResourceType::Listener,
        "l",
        &listener_of(
            "l",
            core::TrafficDirection::Outbound,
            vec![http_chain(&with_source)],
        ),
    ));
    let Some(pair) = Pair::start(resources).await else {
        return;
    };
    let at = pair.listener("l").await;
    for at in at {
        soon("routes", async {
            while get(at, "/canary").await.0 != 200 {
                tokio::time::sleep(std::time::Duration::from_millis(10)).await;
            }
        })
        .await;
    }
    let all = ["h0", "h1", "h2", "h3"];
    let percent = |choices: Vec<String>| {
        let counts = spread(&choices);
        all.map(|name| counts.get(name).copied().unwrap_or(0) as f64 * 100.0 / COUNT as f64)
    };
    let split = ("split", LbPolicy::RoundRobin, &[][..], [20., 20., 20., 40.]);
    const COUNT: usize = 400;
    for (name, _, _, expected) in clusters.iter().chain([&split]) {
        let path = format!("/{name}");
        let shares = [
            ("ours", percent(choices(at[0], &path, COUNT).await)),
            ("theirs", percent(choices(at[1], &path, COUNT).await)),
            (
                "ours, HTTP/2",
                percent(choices_of_streams(at[0], &path, COUNT).await),
            ),
            (
                "theirs, HTTP/2",
                percent(choices_of_streams(at[1], &path, COUNT).await),
            ),
        ];
        for (who, shares) in shares {
            for (share, wanted) in shares.iter().zip(expected) {
                // Four standard deviations of a fair draw of this size, where there is a draw at all.
                let chance = 400.0 * (wanted / 100.0 * (1.0 - wanted / 100.0) / COUNT as f64).sqrt();
                assert!(
                    (share - wanted).abs() <= chance.max(0.5),
                    "{name}, {who}: {shares:?} of {expected:?}"
                );
            }
        }
    }
    // Hashes: a key has the same host through both and over HTTP/1 and HTTP/2, and when a host goes, most keys of the others
    // stay where they are.
    for (name, policy) in [("ring-hash", LbPolicy::RingHash), ("maglev", LbPolicy::Maglev)] {
        let path = format!("/{name}");
        let mut before = Vec::new();
        for (who, at) in ["ours", "theirs"].into_iter().zip(at) {
            let first = choices(at, &path, COUNT).await;
            assert_eq!(
                first,
                choices_of_streams(at, &path, COUNT).await,
                "{name}, {who}: the same keys, the same hosts"
            );
            for (host, share) in all.iter().zip(percent(first.clone())) {
                // Rings are uneven: 1,024 places for four hosts, and chance on top.
                assert!(
                    (share - 25.0).abs() <= 12.0,
                    "{name}, {who}: {host} has {share} %"
                );
            }
            before.push(first);
        }
        assert_eq!(before[0], before[1], "{name}: the same keys, the same hosts");
        pair.ads.source.put_all(choosing(name, policy, &even[..3]));
        for ((who, at), before) in ["ours", "theirs"].into_iter().zip(at).zip(before) {
            let after = soon("the end of a host", async {
                loop {
                    let now = choices(at, &path, COUNT).await;
                    if !now.iter().any(|host| host == "h3") {
                        return now;
                    }
                }
            })
            .await;
            let kept = before.iter().filter(|host| *host != "h3").count();
            let moved = before
                .iter()
                .zip(&after)
                .filter(|(before, after)| *before != "h3" && before != after)
                .count();
            // With fewer hosts each has more places of a ring, which take keys as well.
            let most = if name == "maglev" { kept / 5 } else { kept / 3 };
            assert!(moved <= most, "{name}, {who}: {moved} of {kept} keys moved");
        }
    }
    pair.stop().await;
}
