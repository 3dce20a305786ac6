//! Envoy and serin-proxy on one ADS server: the same resources, the same requests, the same answers; and the same hosts
//! chosen, as far as chance allows.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use futures::stream::{self, StreamExt};
use http::Request;
use http_body_util::{BodyExt, Full};
use hyper_util::rt::TokioIo;
use prost::Message;
use serin_proxy::bootstrap::file;
use serin_proxy::control::xds::follow;
use serin_xds::client::Endpoint;
use serin_xds::pb::envoy::config::accesslog::v3 as accesslog;
use serin_xds::pb::envoy::config::cluster::v3 as cluster;
use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::envoy::config::endpoint::v3 as endpoint;
use serin_xds::pb::envoy::config::listener::v3 as listener;
use serin_xds::pb::envoy::config::route::v3 as route;
use serin_xds::pb::envoy::extensions::access_loggers::file::v3 as log_file;
use serin_xds::pb::envoy::extensions::filters::http::router::v3 as router;
use serin_xds::pb::envoy::extensions::filters::network::http_connection_manager::v3 as hcm;
use serin_xds::server::Event;
use serin_xds::{Resource, ResourceType};
use tokio::net::TcpStream;
use tokio_util::sync::CancellationToken;

use crate::ads::Ads;
use crate::envoy::{self, Envoy};
use crate::fixture::*;
use crate::interop::{CONFIG, Seen, ask, backend, cases, pardoned};

/// Both proxies on one control plane.
pub(crate) struct Pair {
    pub(crate) ads: Ads,
    pub(crate) envoy: Envoy,
    harness: Harness,
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

/// The router by its type: Envoy wants it.
pub(crate) fn router() -> hcm::HttpFilter {
    http_filter("envoy.filters.http.router", Some(any(&router::Router::default())))
}

/// The file of the interoperation test as resources: listener, routes, clusters and endpoints each for themselves.
fn by_ads(text: &str, log: &str) -> Vec<Resource> {
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
                out.push(resource(ResourceType::Cluster, &one.name, &message));
                out.push(resource(ResourceType::Endpoints, &one.name, &assignment));
            }
            ResourceType::Listener => {
                let mut message = listener::Listener::decode(&*one.body).unwrap();
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
    let line = "%REQ(X-CASE)% %RESPONSE_CODE% %RESPONSE_FLAGS% %RESPONSE_CODE_DETAILS% %UPSTREAM_CLUSTER% %ROUTE_NAME%\n";
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

/// Details that say the same in other words.
fn pardoned_details(line: &str) -> String {
    // What went wrong with the connection is told by Envoy's transport in its own words.
    let cut = line.split('{').next().unwrap_or_default();
    cut.to_owned()
}

#[tokio::test]
async fn one_ads_server_drives_envoy_and_serin_proxy_and_they_answer_and_log_alike() {
    let (a, b) = (backend("a").await, backend("b").await);
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("access.log");
    let text = CONFIG
        .replace("PORT", "0")
        .replace("{A}", &a.address.port().to_string())
        .replace("{B}", &b.address.port().to_string())
        .replace("{SLOW}", &silent.local_addr().unwrap().port().to_string());
    let Some(pair) = Pair::start(by_ads(&text, log.to_str().unwrap())).await else {
        return;
    };
    let at = pair.listener("http").await;
    for at in at {
        soon("routes", async {
            while get(at, "/").await.0 == 404 && get_host(at, "a.example", "/exact").await.0 != 200 {
                tokio::time::sleep(std::time::Duration::from_millis(10)).await;
            }
        })
        .await;
    }
    let cases = cases();
    assert!(cases.len() >= 300, "{}", cases.len());
    let answers: Vec<[Seen; 2]> = stream::iter(&cases)
        .map(|case| async move {
            let mut pair = Vec::new();
            for (who, at) in ["ours", "theirs"].into_iter().zip(at) {
                let text = String::from_utf8(case.bytes.clone()).unwrap();
                let bytes = text.replace("X-Case: ", &format!("X-Case: {who}-"));
                let (status, headers, body) = ask(at, bytes.as_bytes(), case.head)
                    .await
                    .unwrap_or_else(|| panic!("{} was not answered by {who}", case.name));
                pair.push(Seen {
                    status,
                    headers,
                    body,
                    flags: String::new(),
                });
            }
            <[Seen; 2]>::try_from(pair).unwrap()
        })
        .buffered(16)
        .collect()
        .await;
    let lines = soon("the access log", async {
        loop {
            let text = std::fs::read_to_string(&log).unwrap_or_default();
            let lines: BTreeMap<String, String> = text
                .lines()
                .filter_map(|line| line.split_once(' '))
                .filter(|(case, _)| case.contains('-') && case.len() > 1)
                .map(|(case, rest)| (case.to_owned(), rest.to_owned()))
                .collect();
            if lines.len() >= cases.len() * 2 {
                break lines;
            }
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    })
    .await;
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
    assert!(
        differences.is_empty(),
        "{} of {} differ:\n{}",
        differences.len(),
        cases.len(),
        differences.join("\n")
    );
    pair.stop().await;
}

async fn get_host(at: SocketAddr, host: &str, path: &str) -> (u16, http::HeaderMap, String) {
    let request = Request::get(path)
        .header("host", host)
        .body(Full::from(""))
        .unwrap();
    send(at, request).await
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

/// How often each backend answers of `count` requests for `path`, each with another key.
async fn spread(at: SocketAddr, path: &str, count: usize) -> BTreeMap<String, usize> {
    let stream = TcpStream::connect(at).await.unwrap();
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .unwrap();
    let task = tokio::spawn(connection);
    let mut out = BTreeMap::new();
    for index in 0..count {
        let request = Request::get(path)
            .header("host", "a")
            .header("x-key", format!("key-{index}"))
            .body(Full::<bytes::Bytes>::default())
            .unwrap();
        let response = soon("a response", sender.send_request(request)).await.unwrap();
        assert_eq!(response.status(), 200, "{path}");
        let body = response.into_body().collect().await.unwrap().to_bytes();
        *out.entry(String::from_utf8(body.to_vec()).unwrap()).or_insert(0) += 1;
    }
    task.abort();
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
    let percent = |counts: &BTreeMap<String, usize>, count: usize| {
        all.map(|name| counts.get(name).copied().unwrap_or(0) as f64 * 100.0 / count as f64)
    };
    let split = ("split", LbPolicy::RoundRobin, &[][..], [20., 20., 20., 40.]);
    const COUNT: usize = 400;
    for (name, _, _, expected) in clusters.iter().chain([&split]) {
        let [ours, theirs] = [
            spread(at[0], &format!("/{name}"), COUNT).await,
            spread(at[1], &format!("/{name}"), COUNT).await,
        ]
        .map(|counts| percent(&counts, COUNT));
        for (who, shares) in [("ours", ours), ("theirs", theirs)] {
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
    // Hashes: which host a key has differs (other functions), but it keeps it, and all hosts have keys.
    for name in ["ring-hash", "maglev"] {
        for (who, at) in ["ours", "theirs"].into_iter().zip(at) {
            let path = format!("/{name}");
            let first = spread(at, &path, 100).await;
            assert_eq!(
                first,
                spread(at, &path, 100).await,
                "{name}, {who}: the same keys, the same hosts"
            );
            assert_eq!(
                first.keys().collect::<BTreeSet<_>>().len(),
                4,
                "{name}, {who}: {first:?}"
            );
        }
    }
    pair.stop().await;
}
