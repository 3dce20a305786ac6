//! Envoy and serin-proxy beside each other with generated configurations and generated requests: what the client gets, what
//! the endpoint sees and what both write to one access log must be equal.
//!
//! Everything is made from seeds, so that a difference can be looked at again. `SERIN_GENERATED_SEEDS=100..400` asks for
//! other seeds than those of the suite, `SERIN_GENERATED_REQUESTS=100` for more requests each, and
//! `SERIN_GENERATED_DUMP=<folder>` writes the configurations that were refused or told differences. What is pardoned is in
//! [`pardoned`], and with its reason in `docs/supported/proxy-envoy-differences.md`.

mod access;
mod authorization;
mod cel;
mod client;
mod compare;
mod filters;
mod hash;
mod hash_kept;
mod limits;
mod policies;
mod processing;
mod random;
mod requests;
mod routes;
mod script;
mod tokens;

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;

use futures::stream::{self, StreamExt};
use http::Response;
use http_body_util::Full;
use prost::Message;
use serde_json::{Value, json};
use serin_proxy::bootstrap::file;
use serin_xds::pb::envoy::config::listener::v3 as listener;
use serin_xds::pb::envoy::extensions::filters::network::http_connection_manager::v3 as hcm;
use serin_xds::server::Event;
use serin_xds::{Resource, ResourceType};

use self::client::{Answer, Ask, Client};
use self::compare::{Difference, summary};
use self::random::Rng;
use crate::fixture::*;
use crate::interop::whole_lines;
use crate::interop_ads::{Pair, ads_source, resource};

/// What both proxies are given, and what they are asked.
struct Setup {
    name: String,
    /// Without routes, access log and router.
    manager: Value,
    table: Value,
    asks: Vec<Ask>,
    /// What the line of the log says beside the usual, by commands.
    more: &'static str,
    /// How it speaks TLS, if it does.
    tls: Option<Tls>,
}

/// How a setup speaks TLS.
struct Tls {
    /// `transport_socket` of its listener.
    socket: Value,
    /// Who asks.
    people: Vec<client::Who>,
}

impl Setup {
    fn people(&self) -> &[client::Who] {
        self.tls.as_ref().map_or(&[], |tls| &tls.people)
    }
}

/// What the log says of each request, by both.
const LINE: &str = "%DOWNSTREAM_LOCAL_PORT% %REQ(X-CASE)% code=%RESPONSE_CODE% flags=%RESPONSE_FLAGS% \
                    details=%RESPONSE_CODE_DETAILS% route=%ROUTE_NAME% cluster=%UPSTREAM_CLUSTER% \
                    path=%REQ(:PATH)% was=%REQ(X-ENVOY-ORIGINAL-PATH)% host=%REQ(:AUTHORITY)% method=%REQ(:METHOD)% \
                    attempts=%UPSTREAM_REQUEST_ATTEMPT_COUNT% received=%BYTES_RECEIVED% sent=%BYTES_SENT% \
                    type=%RESP(CONTENT-TYPE)% grpc=%GRPC_STATUS_NUMBER%";

/// Says what it was asked, field by field.
async fn echo(name: &'static str) -> Backend {
    Backend::answering(move |seen| {
        let mut lines: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for (key, value) in &seen.headers {
            lines
                .entry(key.as_str())
                .or_default()
                .push(value.to_str().unwrap_or("?"));
        }
        let fields: Vec<String> = lines
            .iter()
            .map(|(key, values)| format!("{key}: {}\n", values.join(" | ")))
            .collect();
        let text = format!(
            "{name} {} {}\n{}{}",
            seen.method,
            seen.path,
            fields.concat(),
            String::from_utf8_lossy(&seen.body)
        );
        let status: u16 = seen
            .headers
            .get("x-want")
            .and_then(|value| value.to_str().ok()?.parse().ok())
            .unwrap_or(200);
        let body = if matches!(status, 204 | 304) {
            Full::default()
        } else {
            Full::from(text)
        };
        Response::builder()
            .status(status)
            .header("x-secret", "s")
            .header("x-backend", name)
            .header("x-multi", "r1")
            .header("x-multi", "r2")
            .header("server", "backend")
            .header("content-type", "text/x-echo")
            .body(body)
            .unwrap()
    })
    .await
}

/// A cluster with this endpoint.
fn cluster(name: &str, at: SocketAddr) -> Value {
    json!({
        "name": name, "type": "STATIC", "connect_timeout": "2s",
        "load_assignment": { "cluster_name": name, "endpoints": [ { "lb_endpoints": [ { "endpoint": { "address": {
            "socket_address": { "address": at.ip().to_string(), "port_value": at.port() } } } } ] } ] },
    })
}

/// The resources of a setup: its listener, and its routes under the same name.
fn resources(setup: &Setup, log: &str) -> Vec<Resource> {
    let mut table = setup.table.clone();
    table["name"] = json!(setup.name);
    let ready = json!({
        "name": "ready", "domains": ["ready.test"],
        "routes": [ { "match": { "prefix": "/" }, "direct_response": { "status": 200 } } ],
    });
    table["virtual_hosts"].as_array_mut().unwrap().push(ready);
    let mut manager = setup.manager.clone();
    manager["@type"] = json!(
        "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager"
    );
    manager["http_filters"].as_array_mut().unwrap().push(json!({
        "name": "envoy.filters.http.router",
        "typed_config": { "@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router" },
    }));
    // Each writes a file of its own: lines of two processes would end up within each other.
    let logger = |path: String, key: &str, share: u32| {
        json!({
            "name": "envoy.access_loggers.file",
            "filter": { "runtime_filter": { "runtime_key": key, "percent_sampled": { "numerator": share } } },
            "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog",
                "path": path,
                "log_format": { "text_format_source": { "inline_string": format!("{LINE} {}\n", setup.more) } },
            },
        })
    };
    manager["access_log"] = json!([
        logger(log.to_owned(), "interop.ours", 100),
        logger(format!("{log}.theirs"), "interop.theirs", 0),
    ]);
    manager["route_config"] = table;
    let mut chain = json!({ "filters": [ {
        "name": "envoy.filters.network.http_connection_manager", "typed_config": manager } ] });
    if let Some(tls) = &setup.tls {
        chain["transport_socket"] = tls.socket.clone();
    }
    let mut filters = Vec::new();
    if setup.tls.is_some() {
        // Without it Envoy does not know the server name that its clients ask for; ours does.
        filters.push(json!({ "name": "inspector", "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.filters.listener.tls_inspector.v3.TlsInspector" } }));
    }
    let text = json!({ "static_resources": { "listeners": [ {
        "name": setup.name,
        "address": { "socket_address": { "address": "127.0.0.1", "port_value": 0 } },
        "listener_filters": filters,
        "filter_chains": [chain],
    } ] } });
    let plan =
        file::parse(&text.to_string(), 1).unwrap_or_else(|error| panic!("{}: {error}\n{text:#}", setup.name));
    let mut out = Vec::new();
    for one in plan.static_resources {
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
        *config = any(&manager);
        out.push(resource(ResourceType::Listener, &one.name, &message));
    }
    out
}

/// Clusters, by the same way.
fn clusters(list: &[Value]) -> Vec<Resource> {
    let text = json!({ "static_resources": { "clusters": list } });
    let plan = file::parse(&text.to_string(), 1).unwrap_or_else(|error| panic!("{error}\n{text:#}"));
    plan.static_resources
        .into_iter()
        .map(|one| {
            let message = serin_xds::pb::envoy::config::cluster::v3::Cluster::decode(&*one.body).unwrap();
            resource(ResourceType::Cluster, &one.name, &message)
        })
        .collect()
}

/// Waits until the routes of a setup are there.
async fn until_ready(at: SocketAddr, people: &[client::Who]) {
    loop {
        let ready = Ask {
            case: "ready".into(),
            method: "GET",
            target: "/ready".into(),
            fields: vec![("host".into(), "ready.test".into())],
            body: String::new(),
            who: 0,
        };
        let status = Client::of(at, people).ask(&ready).await.status;
        if status != 404 && status != 0 {
            return;
        }
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
}

/// Asks both, and tells what differs.
async fn differences(setups: Vec<Setup>, more: Vec<Value>) -> Option<Vec<Difference>> {
    crate::envoy::program()?;
    let (a, b) = (echo("a").await, echo("b").await);
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("access.log");
    let mut list = vec![cluster("a", a.address), cluster("b", b.address)];
    list.extend(more);
    let mut all = clusters(&list);
    for setup in &setups {
        all.extend(resources(setup, log.to_str().unwrap()));
    }
    let mut pair = Pair::start(all).await?;
    let mut out = Vec::new();
    // Whoever is refused by one only is a difference; by both, a waste.
    let mut refused: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let mut places: HashMap<String, [SocketAddr; 2]> = HashMap::new();
    let mut late = Vec::new();
    for setup in &setups {
        let found = async {
            let at = pair.listener(&setup.name).await;
            for at in at {
                until_ready(at, setup.people()).await;
            }
            at
        };
        if let Ok(at) = tokio::time::timeout(std::time::Duration::from_secs(5), found).await {
            places.insert(setup.name.clone(), at);
        } else {
            late.push(setup.name.clone());
        }
        while let Ok((client, event)) = pair.ads.events.try_recv() {
            if let Event::Refused(resource, reason) = event {
                let text = format!("{client:?}: {reason}");
                refused.entry(resource.name.to_string()).or_default().push(text);
            }
        }
    }
    for name in late.iter().filter(|name| !refused.contains_key(*name)) {
        out.push(Difference::of_setup(format!("{name} was never ready\n")));
    }
    for (name, reasons) in &refused {
        out.push(Difference::of_setup(format!(
            "{name} was refused: {reasons:#?}\n"
        )));
    }
    let pairs: Vec<(&Setup, &Ask, [Answer; 2])> = stream::iter(&setups)
        .filter_map(|setup| {
            let at = places.get(&setup.name).copied();
            async move { Some((setup, at?)) }
        })
        .map(|(setup, at)| async move {
            let mut clients = at.map(|at| Client::of(at, setup.people()));
            let mut out = Vec::new();
            for ask in &setup.asks {
                let [ours, theirs] = &mut clients;
                out.push((setup, ask, [ours.ask(ask).await, theirs.ask(ask).await]));
            }
            out
        })
        .buffered(6)
        .collect::<Vec<_>>()
        .await
        .into_iter()
        .flatten()
        .collect();
    let lines = read_log(&log, &pairs, &places).await;
    let mut told = std::collections::BTreeSet::new();
    for (setup, ask, answers) in pairs {
        let line = |index: usize| {
            let port = places[&setup.name][index].port().to_string();
            lines.get(&(port, ask.case.clone()))
        };
        if let Some(found) = Difference::find(&setup.name, ask, answers, [line(0), line(1)]) {
            told.insert(setup.name.clone());
            out.push(found);
        }
    }
    if let Some(folder) = std::env::var_os("SERIN_GENERATED_DUMP") {
        for setup in setups
            .iter()
            .filter(|setup| told.contains(&setup.name) || refused.contains_key(&setup.name))
        {
            let text = format!("{:#}", json!({ "manager": setup.manager, "table": setup.table }));
            let path = std::path::Path::new(&folder).join(format!("{}.json", setup.name));
            std::fs::write(path, text).unwrap();
        }
    }
    pair.stop().await;
    Some(out)
}

type Lines = HashMap<(String, String), String>;

/// The lines of both, by port and case. What never comes is missing.
async fn read_log(
    log: &std::path::Path,
    pairs: &[(&Setup, &Ask, [Answer; 2])],
    places: &HashMap<String, [SocketAddr; 2]>,
) -> Lines {
    let mut lines = Lines::new();
    let read = async {
        loop {
            let mut text = whole_lines(log);
            text.push_str(&whole_lines(&log.with_extension("log.theirs")));
            lines = text
                .lines()
                .filter_map(|line| {
                    let (port, rest) = line.split_once(' ')?;
                    let (case, rest) = rest.split_once(' ')?;
                    Some(((port.to_owned(), case.to_owned()), rest.to_owned()))
                })
                .collect();
            let all = pairs.iter().all(|(setup, ask, _)| {
                places[&setup.name]
                    .iter()
                    .all(|at| lines.contains_key(&(at.port().to_string(), ask.case.clone())))
            });
            if all {
                return;
            }
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
    };
    let _ = tokio::time::timeout(std::time::Duration::from_secs(3), read).await;
    lines
}

/// The seeds to try: those of the suite and `further` ones that have told differences once, unless the environment names others.
fn seeds(usual: std::ops::Range<u64>, further: &[u64]) -> Vec<u64> {
    let named = std::env::var("SERIN_GENERATED_SEEDS").ok();
    let named = named.and_then(|text| {
        let (from, to) = text.split_once("..")?;
        Some((from.parse().ok()?..to.parse().ok()?).collect())
    });
    named.unwrap_or_else(|| usual.chain(further.iter().copied()).collect())
}

fn requests_each(usual: usize) -> usize {
    let named = std::env::var("SERIN_GENERATED_REQUESTS").ok();
    named.and_then(|text| text.parse().ok()).unwrap_or(usual)
}

/// Many setups by the dozen, so that no proxy has too many listeners.
async fn compare_all(
    seeds: Vec<u64>,
    setup: impl Fn(u64) -> Setup,
    more: &[Value],
) -> Option<(usize, Vec<Difference>)> {
    let mut out = Vec::new();
    let mut count = 0;
    for some in seeds.chunks(100) {
        let setups: Vec<Setup> = some.iter().map(|seed| setup(*seed)).collect();
        count += setups.iter().map(|setup| setup.asks.len()).sum::<usize>();
        out.extend(differences(setups, more.to_vec()).await?);
    }
    Some((count, out))
}

fn assert_none(count: usize, differences: &[Difference]) {
    assert!(count > 0, "nothing was asked");
    assert!(
        differences.is_empty(),
        "{} of {count} differ:\n{}",
        differences.len(),
        summary(differences)
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn generated_routes_answer_generated_requests_as_envoy_does() {
    let each = requests_each(60);
    let setup = |seed: u64| {
        let mut rng = Rng::new(seed);
        let (manager, table) = (routes::manager(&mut rng), routes::table(&mut rng));
        Setup {
            name: format!("routes-{seed}"),
            manager,
            table,
            asks: (0..each)
                .map(|number| requests::request(&mut rng, format!("s{seed}-{number}")))
                .collect(),
            more: "",
            tls: None,
        }
    };
    let Some((count, differences)) = compare_all(seeds(0..20, &[]), setup, &[]).await else {
        return;
    };
    assert_none(count, &differences);
}
