//! Statistics of updates, of subsets and zones, of the admin port and the runtime, each with the event that moves it, and
//! beside Envoy where it can be brought to the same; and the labels that the bootstrap asks for.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use serin_proxy::control::admin::{AdminPort, Port};
use serin_xds::pb::envoy::config::cluster::v3 as cluster;
use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::envoy::config::listener::v3 as listener;
use serin_xds::pb::envoy::extensions::filters::http::header_mutation::v3 as header_mutation;
use serin_xds::pb::envoy::extensions::filters::network::http_connection_manager::v3 as hcm;
use serin_xds::server::Event;
use serin_xds::{Resource, ResourceType};
use tokio_util::sync::CancellationToken;

use crate::fixture::*;
use crate::interop_ads::{Pair, ads_source, from_ads, resource, router};
use crate::statistics::{backend, config, idle_clusters};
use crate::twins::{Started, Twins};

/// Every number of `/stats` by name.
async fn all(admin: SocketAddr) -> BTreeMap<String, String> {
    let text = get(admin, "/stats").await.2;
    text.lines()
        .filter_map(|line| line.split_once(": "))
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect()
}

fn number_of(stats: &BTreeMap<String, String>, name: &str) -> u64 {
    let value = stats.get(name).unwrap_or_else(|| panic!("no {name}"));
    value.parse().unwrap_or_else(|_| panic!("{name}: {value}"))
}

/// Names that both count of updates, but for times.
const UPDATES: &str = r"^(cluster_manager\.cds|listener_manager\.lds|http\.test\.rds\.main|cluster\.c|extension_config_discovery\.http_filter\.added)\.(update_(attempt|success|failure|rejected|empty|no_rebuild)|config_(reload|fail)|version|membership_change)$|^extension_config_discovery.*init_fetch_timeout$";

/// Waits until both say the same of updates, and `done`; what they say last.
async fn agreed(
    what: &str,
    [ours, theirs]: [SocketAddr; 2],
    done: impl Fn(&BTreeMap<String, String>) -> bool,
) -> BTreeMap<String, String> {
    let names = regex::Regex::new(UPDATES).unwrap();
    let mut last = String::new();
    for _ in 0..400 {
        let (ours, theirs) = (all(ours).await, all(theirs).await);
        let shown = |stats: &BTreeMap<String, String>| -> BTreeMap<String, String> {
            let wanted = stats.iter().filter(|(name, _)| names.is_match(name));
            wanted
                .map(|(name, value)| (name.clone(), value.clone()))
                .collect()
        };
        let own = shown(&ours);
        let mut other = shown(&theirs);
        // Of what comes incrementally Envoy takes no update for an empty one.
        other.retain(|name, _| own.contains_key(name) || !name.ends_with("main.update_empty"));
        if own == other && done(&ours) {
            return own;
        }
        last = format!("ours {own:#?}\ntheirs {other:#?}");
        tokio::time::sleep(std::time::Duration::from_millis(25)).await;
    }
    panic!("{what}: {last}");
}

fn discovered(name: &str) -> cluster::Cluster {
    cluster::Cluster {
        eds_cluster_config: Some(cluster::cluster::EdsClusterConfig {
            eds_config: ads_source(),
            ..Default::default()
        }),
        ..eds_cluster(name)
    }
}

fn routes(domains: &[&str]) -> Resource {
    let hosts = domains.iter().enumerate().map(|(index, domain)| {
        host(
            &format!("v{index}"),
            domain,
            vec![prefix_route("/", to_cluster("c"))],
        )
    });
    let message = serin_xds::pb::envoy::config::route::v3::RouteConfiguration {
        name: "main".into(),
        virtual_hosts: hosts.collect(),
        ..Default::default()
    };
    resource(ResourceType::Route, "main", &message)
}

fn endpoints(hosts: &[SocketAddr]) -> Resource {
    let hosts: Vec<_> = hosts.iter().map(|at| (*at, "")).collect();
    resource(ResourceType::Endpoints, "c", &assignment("c", &hosts))
}

/// A filter whose configuration is a resource.
fn added() -> hcm::HttpFilter {
    let source = core::ExtensionConfigSource {
        config_source: ads_source(),
        type_urls: vec![any(&header_mutation::HeaderMutation::default()).type_url],
        ..Default::default()
    };
    hcm::HttpFilter {
        name: "added".into(),
        config_type: Some(hcm::http_filter::ConfigType::ConfigDiscovery(source)),
        ..Default::default()
    }
}

fn extension<M: prost::Message + prost::Name>(message: &M) -> Resource {
    let extension = core::TypedExtensionConfig {
        name: "added".into(),
        typed_config: Some(any(message)),
    };
    resource(ResourceType::Extension, "added", &extension)
}

async fn admin_of(harness: &Harness) -> (SocketAddr, CancellationToken) {
    let port = AdminPort::bind(&harness.proxy, "127.0.0.1:0".parse().unwrap(), Port::Admin).unwrap();
    let at = port.address().unwrap();
    let cancel = CancellationToken::new();
    tokio::spawn(port.serve(harness.proxy.clone(), CancellationToken::new(), cancel.clone()));
    (at, cancel)
}

#[tokio::test]
async fn envoy_and_serin_proxy_count_the_same_updates_of_the_same_control_plane() {
    let backend = Backend::named("b").await;
    let mut http = manager("main");
    from_ads(&mut http);
    http.http_filters = vec![added(), router()];
    let listener = listener_of("l", core::TrafficDirection::Outbound, vec![http_chain(&http)]);
    let resources = vec![
        resource(ResourceType::Cluster, "c", &discovered("c")),
        endpoints(&[backend.address]),
        resource(ResourceType::Listener, "l", &listener),
        routes(&["*"]),
        extension(&header_mutation::HeaderMutation::default()),
    ];
    let Some(mut pair) = Pair::start(resources).await else {
        return;
    };
    pair.listener("l").await;
    let (ours, cancel) = admin_of(&pair.harness).await;
    let both = [ours, pair.envoy.admin().expect("its listener is there")];
    let is = |name: &'static str, value: u64| {
        move |stats: &BTreeMap<String, String>| number_of(stats, name) == value
    };
    let rds = "http.test.rds.main.config_reload";
    agreed("the first ones", both, is(rds, 1)).await;
    let source = pair.ads.source.clone();
    let nowhere = closed_port().await;
    source.put_all([endpoints(&[backend.address, nowhere])]);
    agreed("more endpoints", both, is("cluster.c.membership_change", 2)).await;
    source.put_all([routes(&["a", "*"])]);
    agreed("other routes", both, is(rds, 2)).await;
    // Twice the same domain.
    source.put_all([routes(&["a", "a"])]);
    let refused = "http.test.rds.main.update_rejected";
    agreed("routes that are refused", both, is(refused, 1)).await;
    source.put_all([routes(&["b"])]);
    agreed("routes that are taken again", both, is(rds, 3)).await;
    // Not of the type that the manager names.
    source.put_all([extension(&listener::Listener::default())]);
    let refused = "extension_config_discovery.http_filter.added.config_fail";
    agreed("a filter that is refused", both, is(refused, 1)).await;
    let mutations = header_mutation::HeaderMutation {
        most_specific_header_mutations_wins: true,
        ..Default::default()
    };
    source.put_all([extension(&mutations)]);
    let taken = "extension_config_discovery.http_filter.added.config_reload";
    agreed("a filter that is taken", both, is(taken, 2)).await;
    let bare = listener_of("bare", core::TrafficDirection::Outbound, Vec::new());
    let bare = listener::Listener { ..bare };
    source.put_all([resource(ResourceType::Listener, "bare", &bare)]);
    let refused = "listener_manager.lds.update_rejected";
    agreed("a listener that is refused", both, is(refused, 1)).await;
    source.put_all([resource(ResourceType::Cluster, "d", &discovered("d"))]);
    source.remove(ResourceType::Listener, "bare");
    let last = agreed("another cluster", both, is("cluster_manager.cluster_added", 2)).await;
    assert!(last.len() >= 30, "{last:#?}");
    let mut refused = BTreeSet::new();
    while let Ok((_, event)) = pair.ads.events.try_recv() {
        if let Event::Refused(resource, _) = event {
            refused.insert(resource.name.to_string());
        }
    }
    assert_eq!(
        refused,
        BTreeSet::from(["added".to_owned(), "bare".to_owned(), "main".to_owned()])
    );
    cancel.cancel();
    pair.stop().await;
}

#[tokio::test]
async fn streams_that_fail_count_for_everything_that_is_asked_for() {
    use serin_proxy::control::xds::follow;
    use serin_xds::client::Endpoint;
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("xds.sock");
    let ads = crate::ads::Ads::start(&socket).unwrap();
    let http = manager("main");
    let listener = listener_of("l", core::TrafficDirection::Outbound, vec![http_chain(&http)]);
    ads.source.put_all([
        resource(ResourceType::Cluster, "c", &eds_cluster("c")),
        endpoints(&[closed_port().await]),
        resource(ResourceType::Listener, "l", &listener),
        routes(&["*"]),
    ]);
    let harness = Harness::start();
    let cancel = CancellationToken::new();
    let following = tokio::spawn(follow(
        harness.proxy.clone(),
        Endpoint::Unix(socket.clone()),
        cancel.clone(),
    ));
    let (admin, stop) = admin_of(&harness).await;
    let until = async |what: &str, done: &dyn Fn(&BTreeMap<String, String>) -> bool| {
        soon(what, async {
            loop {
                let stats = all(admin).await;
                if done(&stats) {
                    return stats;
                }
                tokio::task::yield_now().await;
            }
        })
        .await
    };
    let success = "http.test.rds.main.update_success";
    let stats = until("routes", &|stats| {
        stats.contains_key(success)
            && number_of(stats, success) == 1
            && number_of(stats, "cluster.c.update_success") == 1
    })
    .await;
    for place in ["cluster_manager.cds", "http.test.rds.main", "cluster.c"] {
        assert_eq!(
            number_of(&stats, &format!("{place}.update_failure")),
            0,
            "{place}"
        );
        // When it came, and what of: the server does not name its states.
        assert!(
            number_of(&stats, &format!("{place}.update_time")) > 1_700_000_000_000,
            "{place}"
        );
        assert_eq!(
            number_of(&stats, &format!("{place}.version")),
            0xEF46_DB37_51D8_E999,
            "{place}"
        );
    }
    drop(ads);
    std::fs::remove_file(&socket).unwrap();
    let lost = "cluster_manager.cds.update_failure";
    let stats = until("a stream that fails", &|stats| number_of(stats, lost) > 0).await;
    for place in [
        "cluster_manager.cds",
        "listener_manager.lds",
        "http.test.rds.main",
        "cluster.c",
    ] {
        let of = |name: &str| number_of(&stats, &format!("{place}.update_{name}"));
        assert_eq!(of("failure"), number_of(&stats, lost), "{place}");
        assert_eq!(
            of("attempt"),
            1 + of("success") + of("rejected") + of("failure"),
            "{place}"
        );
    }
    cancel.cancel();
    stop.cancel();
    soon("the end of following", following).await.unwrap();
}

#[tokio::test]
async fn subsets_count_as_they_come_and_go_with_their_endpoints() {
    let harness = Harness::start();
    let (admin, cancel) = admin_of(&harness).await;
    let mut message = eds_cluster("c");
    message.lb_subset_config = Some(cluster::cluster::LbSubsetConfig {
        subset_selectors: vec![cluster::cluster::lb_subset_config::LbSubsetSelector {
            keys: vec!["version".into()],
            ..Default::default()
        }],
        ..Default::default()
    });
    harness.put(ResourceType::Cluster, "c", &message).await;
    let of = |versions: &[&str]| {
        let at = "127.0.0.1:9".parse().unwrap();
        let hosts: Vec<_> = versions.iter().map(|_| (at, "")).collect();
        let mut message = assignment("c", &hosts);
        for (endpoint, version) in message.endpoints[0].lb_endpoints.iter_mut().zip(versions) {
            endpoint.metadata = Some(core::Metadata {
                filter_metadata: [("envoy.lb".to_owned(), string_struct(&[("version", version)]))].into(),
                ..Default::default()
            });
        }
        message
    };
    for (versions, counts) in [
        (&["v1", "v1", "v2"][..], [2, 2, 0]),
        (&["v1"], [1, 2, 1]),
        (&["v1", "v3"], [2, 3, 1]),
        (&[], [0, 3, 3]),
    ] {
        harness.put(ResourceType::Endpoints, "c", &of(versions)).await;
        let stats = all(admin).await;
        let shown = ["active", "created", "removed"]
            .map(|name| number_of(&stats, &format!("cluster.c.lb_subsets_{name}")));
        assert_eq!(shown, counts, "{versions:?}");
    }
    harness.remove(ResourceType::Endpoints, "c").await;
    assert_eq!(number_of(&all(admin).await, "cluster.c.update_empty"), 1);
    cancel.cancel();
    harness.proxy.stop().await;
}

#[tokio::test]
async fn the_runtime_counts_what_it_takes_and_what_it_cannot() {
    let admin = free_port().await;
    let text = idle_clusters(0, "layered_runtime: { layers: [ { name: s, static_layer: { a: 1 } }, { name: admin, admin_layer: {} } ] }\n")
        .replace("static_resources:\n  clusters:\n", "");
    let started = Started::from(&text, admin).await;
    let before = all(admin).await;
    let request = http::Request::post("/runtime_modify?b=2").header("host", "a");
    let (status, _, body) = send(admin, request.body(Default::default()).unwrap()).await;
    assert_eq!(status, 200, "{body}");
    let after = all(admin).await;
    for (name, more) in [
        ("runtime.load_success", 1),
        ("runtime.load_error", 0),
        ("runtime.override_dir_exists", 0),
        ("runtime.override_dir_not_exists", 1),
        ("runtime.num_keys", 1),
        ("runtime.num_layers", 0),
    ] {
        assert_eq!(number_of(&after, name), number_of(&before, name) + more, "{name}");
    }
    started.stop().await;
}

/// Both with the file of [`crate::statistics`] and `more` of the bootstrap.
async fn both_with(more: &str) -> Option<Twins> {
    let backend = backend().await;
    Twins::start(3, |place| config(place, backend) + more).await
}

#[tokio::test]
async fn the_admin_ports_own_statistics_are_those_of_envoys() {
    let Some(both) = both_with("").await else { return };
    let mut differences = Vec::new();
    for at in both.places().map(|place| place.admin) {
        let before = all(at).await;
        for path in ["/server_info", "/listeners", "/nothing"] {
            get(at, path).await;
        }
        let after = all(at).await;
        let more: BTreeMap<String, f64> = after
            .iter()
            .filter(|(name, _)| name.starts_with("http.admin.") || name.starts_with("listener.admin."))
            .filter_map(|(name, value)| {
                let value: f64 = value.parse().ok()?;
                let before: f64 = before.get(name)?.parse().ok()?;
                Some((name.clone(), value - before))
            })
            .collect();
        differences.push(more);
    }
    let [ours, theirs] = &differences[..] else {
        unreachable!()
    };
    assert!(ours.len() > 20, "{ours:?}");
    for (name, more) in ours {
        // What has ended is seen a moment later.
        if !name.ends_with("_active") && !name.ends_with("_destroy") {
            assert_eq!(Some(more), theirs.get(name), "{name}");
        }
    }
    assert_eq!(ours["http.admin.downstream_rq_4xx"], 1.0);
    both.stop().await;
}

/// Series of Prometheus: names and sorted labels, of counters and gauges.
fn series(text: &str) -> BTreeSet<String> {
    let simple: BTreeSet<&str> = text
        .lines()
        .filter_map(|line| line.strip_prefix("# TYPE "))
        .filter(|line| !line.ends_with(" histogram"))
        .filter_map(|line| line.split(' ').next())
        .collect();
    text.lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| {
            let (series, _) = line.rsplit_once(' ')?;
            let (name, labels) = series.split_once('{').unwrap_or((series, "}"));
            if !simple.contains(name) {
                return None;
            }
            let mut labels: Vec<_> = labels
                .trim_end_matches('}')
                .split("\",")
                .map(|label| label.trim_end_matches('"'))
                .collect();
            labels.sort_unstable();
            Some(format!("{name} {}", labels.join(" ")))
        })
        .collect()
}

#[tokio::test]
async fn labels_that_the_bootstrap_asks_for_are_extracted_as_envoy_extracts_them() {
    let own = regex::Regex::new(
        // Envoy makes classes of answers with the first of them, this of drops where they are configured, and labels
        // its generation before there are any.
        "^(serin_|istio_)|_rq_[1-5]?xx|_drop_overload|_tcp_(bytes_|none_)?downstream_cx_active|_ssl_|http2|_hot_restart_generation|_admin|12[0-9_.]+",
    )
    .unwrap();
    for more in [
        "",
        "stats_config: { stats_tags: [ { tag_name: mine, fixed_value: here }, { tag_name: kind, regex: '^cluster\\.((g|d).+?\\.)' }, \
         { tag_name: code, regex: '_rq(_(\\d{3}))$' } ] }\n",
        "stats_config: { use_all_default_tags: false, stats_tags: [ { tag_name: cluster_name, regex: '^cluster\\.((.+?)\\.)' }, \
         { tag_name: envoy.http_conn_manager_prefix } ] }\n",
    ] {
        let Some(both) = both_with(more).await else {
            return;
        };
        let mut found = Vec::new();
        for place in both.places() {
            let http = place.listeners[0];
            for path in ["/ok", "/fails", "/nowhere"] {
                get(http, path).await;
            }
            let text = get(place.admin, "/stats/prometheus").await.2;
            let text = text
                .replace(&format!("127.0.0.1_{}", http.port()), "HTTP")
                .replace(&format!("127_0_0_1_{}", http.port()), "HTTP");
            found.push(series(&text));
        }
        let [ours, theirs] = &found[..] else {
            unreachable!()
        };
        let common = ours.intersection(theirs).count();
        assert!(
            common > 900,
            "{common} of {} and {}: {more}",
            ours.len(),
            theirs.len()
        );
        // Of clusters everything but what is listed is there in Envoy, by the same name and labels.
        let strange: Vec<_> = ours
            .difference(theirs)
            .filter(|series| !own.is_match(series))
            .collect();
        assert!(strange.is_empty(), "{more}\n{strange:#?}");
        both.stop().await;
    }
}
