//! What istiod sends for the same objects, case by case.
//!
//! `parity.tsv` says for each case, proxy and kind whether ours is equal, and where it is not, why. It only ever gets better: a case that
//! is equal must stay so, and one that has become equal must be written down.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use serde_json::{Map, Value};
use serin_model::MeshConfig;
use serin_xds::resource::{Resource, ResourceType};

use super::super::Translator;
use super::{json, world};
use crate::proxy_identity::{Features, Locality, Proxy, ProxyKind};

const AREAS: [&str; 8] = [
    "VirtualService",
    "DestinationRule",
    "Gateway",
    "ServiceEntry",
    "Sidecar",
    "Kubernetes Service",
    "Protocol selection",
    "Combination",
];

pub(super) fn recorded() -> Option<PathBuf> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/data/istiod-recorded");
    if dir.exists() {
        return Some(dir);
    }
    eprintln!("SKIPPED: ../shared is not here (istiod-recorded)");
    None
}

pub(super) fn read_json(path: &Path) -> Value {
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

pub(super) fn proxy(nodes: &Value, name: &str) -> Proxy {
    let node = &nodes[name];
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let id = text(&node["id"]);
    Proxy {
        kind: if id.starts_with("router") {
            ProxyKind::Router
        } else {
            ProxyKind::Sidecar
        },
        name: text(&node["metadata"]["NAME"]),
        namespace: text(&node["metadata"]["NAMESPACE"]),
        labels: serde_json::from_value(node["metadata"]["LABELS"].clone()).unwrap(),
        ips: vec![text(&node["metadata"]["INSTANCE_IPS"]).parse().unwrap()],
        service_account: text(&node["metadata"]["SERVICE_ACCOUNT"]),
        workload: text(&node["metadata"]["WORKLOAD_NAME"]),
        locality: Locality {
            region: text(&node["locality"]["region"]),
            zone: text(&node["locality"]["zone"]),
            sub_zone: String::new(),
        },
        dns_domain: "svc.cluster.local".into(),
        features: Features::default(),
        id,
    }
}

fn type_name(resource: &Resource) -> &'static str {
    resource
        .resource_type
        .type_url()
        .trim_start_matches("type.googleapis.com/")
}

fn ours(translator: &mut Translator, proxy: &Proxy) -> Resources {
    let mut out: BTreeMap<&'static str, BTreeMap<String, Value>> = BTreeMap::new();
    for resource in translator.resources_for(proxy) {
        let kind = match resource.resource_type {
            ResourceType::Cluster => "clusters",
            ResourceType::Endpoints => "endpoints",
            ResourceType::Listener => "listeners",
            ResourceType::Route => "routes",
            ResourceType::Secret => "secrets",
            ResourceType::VirtualHost => panic!("hosts are inline here"),
            ResourceType::Extension | ResourceType::Runtime => panic!("nothing of ours uses them"),
        };
        let value = json::message(type_name(&resource), &resource.body);
        out.entry(kind)
            .or_default()
            .insert(resource.name.to_string(), value);
    }
    out
}

/// What istiod sent: the baseline and the case's difference.
fn theirs(dir: &Path, case: &str, proxy: &str) -> BTreeMap<&'static str, BTreeMap<String, Value>> {
    let baseline = read_json(&dir.join(format!("baseline/{proxy}.json")));
    let difference = if case == "baseline" {
        Value::Null
    } else {
        read_json(&dir.join(format!("{case}/{proxy}.json")))
    };
    ["clusters", "endpoints", "listeners", "routes"]
        .into_iter()
        .map(|kind| {
            let mut all: BTreeMap<String, Value> =
                serde_json::from_value(baseline[kind].clone()).unwrap_or_default();
            for part in ["added", "changed"] {
                for (name, value) in difference[kind][part].as_object().into_iter().flatten() {
                    all.insert(name.clone(), value.clone());
                }
            }
            for name in difference[kind]["removed"].as_array().into_iter().flatten() {
                all.remove(name.as_str().unwrap());
            }
            (kind, all)
        })
        .collect()
}

/// Filters and fields that belong to later kinds, or to telemetry that our proxy does without.
const LEFT_ASIDE: [&str; 9] = [
    "transportSocketMatches", // the mesh's own TLS
    "tracing",
    "decorator",
    "requestHeadersToAddForTracing",
    "accessLog",
    "envoy.transport_socket_match",
    "typedDnsResolverConfig", // Envoy's default resolver
    "altStatName",
    "statPrefix",
];
const FILTERS_LEFT_ASIDE: [&str; 4] = [
    "istio.metadata_exchange",
    "istio.stats",
    "envoy.filters.http.grpc_stats",
    "istio.alpn",
];

fn normal(value: &Value) -> Value {
    match value {
        Value::Object(fields) => {
            let mut out = Map::new();
            for (name, value) in fields {
                if LEFT_ASIDE.contains(&name.as_str()) {
                    continue;
                }
                // Certificates of the mesh's own come with its own issue.
                if name == "transportSocket" && value.to_string().contains("istio-peer-exchange") {
                    continue;
                }
                let value = normal(value);
                let emptied = (name == "filters" && value.as_array().is_some_and(Vec::is_empty))
                    || (name == "filterChainMatch" && value.as_object().is_some_and(Map::is_empty));
                if !emptied {
                    out.insert(name.clone(), value);
                }
            }
            Value::Object(out)
        }
        Value::Array(items) => Value::Array(
            items
                .iter()
                .filter(|item| {
                    !item["name"]
                        .as_str()
                        .is_some_and(|name| FILTERS_LEFT_ASIDE.contains(&name))
                })
                // Chains for the mesh's own TLS.
                .filter(|item| {
                    !item["filterChainMatch"]["applicationProtocols"]
                        .as_array()
                        .is_some_and(|protocols| {
                            protocols
                                .iter()
                                .any(|protocol| protocol.as_str().unwrap().starts_with("istio"))
                        })
                })
                .map(normal)
                .collect(),
        ),
        other => other.clone(),
    }
}

/// One virtual host for each domain: istiod joins hosts with equal routes, which means the same.
fn by_domain(value: Value) -> Value {
    match value {
        Value::Object(mut fields) => {
            if let Some(Value::Array(hosts)) = fields.remove("virtualHosts") {
                let mut single = Map::new();
                for host in hosts {
                    for domain in host["domains"].as_array().cloned().unwrap_or_default() {
                        let mut host = host.clone();
                        let fields = host.as_object_mut().unwrap();
                        fields.remove("domains");
                        // A name is not compared: joined hosts have the first one's.
                        fields.remove("name");
                        single.insert(domain.as_str().unwrap().to_owned(), host);
                    }
                }
                fields.insert("virtualHosts".to_owned(), Value::Object(single));
            }
            Value::Object(fields)
        }
        other => other,
    }
}

/// Lists in which order has no meaning: filter chains are chosen by their conditions, headers must all match.
const UNORDERED: [&str; 7] = [
    "domains",
    "queryParameters",
    "headers",
    "endpoints",
    "lbEndpoints",
    "services",
    "filterChains",
];

fn unordered(mut value: Value) -> Value {
    fn walk(value: &mut Value) {
        match value {
            Value::Object(fields) => {
                for (name, value) in fields.iter_mut() {
                    walk(value);
                    let unordered = UNORDERED.contains(&name.as_str());
                    if let Some(list) = value.as_array_mut().filter(|_| unordered) {
                        list.sort_by_key(ToString::to_string);
                    }
                }
            }
            Value::Array(items) => items.iter_mut().for_each(walk),
            _ => {}
        }
    }
    walk(&mut value);
    value
}

/// Where two values differ first, as a path with both sides.
fn difference(ours: &Value, theirs: &Value, path: &str, out: &mut Vec<String>) {
    match (ours, theirs) {
        (Value::Object(a), Value::Object(b)) => {
            for name in a.keys().chain(b.keys().filter(|name| !a.contains_key(*name))) {
                match (a.get(name), b.get(name)) {
                    (Some(a), Some(b)) => difference(a, b, &format!("{path}.{name}"), out),
                    (Some(a), None) => out.push(format!("{path}.{name}: only ours: {a}")),
                    (None, Some(b)) => out.push(format!("{path}.{name}: only theirs: {b}")),
                    (None, None) => {}
                }
            }
        }
        (Value::Array(a), Value::Array(b)) if a.len() == b.len() => {
            for (index, (a, b)) in a.iter().zip(b).enumerate() {
                difference(a, b, &format!("{path}[{index}]"), out);
            }
        }
        (a, b) if a == b => {}
        (a, b) => out.push(format!("{path}: ours {a}\n        theirs {b}")),
    }
}

fn compare(ours: &BTreeMap<String, Value>, theirs: &BTreeMap<String, Value>) -> Vec<String> {
    let mut out = Vec::new();
    for name in ours
        .keys()
        .chain(theirs.keys().filter(|name| !ours.contains_key(*name)))
    {
        match (ours.get(name), theirs.get(name)) {
            (Some(a), Some(b)) => {
                let shape = |value: &Value| unordered(by_domain(normal(value)));
                difference(&shape(a), &shape(b), name, &mut out);
            }
            (Some(_), None) => out.push(format!("{name}: only ours")),
            (None, Some(_)) => out.push(format!("{name}: only theirs")),
            (None, None) => {}
        }
    }
    out
}

/// The recorded cases of our kinds, with the files of their worlds.
pub(super) fn cases(dir: &Path) -> Vec<(String, Vec<PathBuf>)> {
    let index = std::fs::read_to_string(dir.join("index.tsv")).unwrap();
    let named = index
        .lines()
        .skip(1)
        .map(|line| line.split('\t').collect::<Vec<_>>())
        .filter(|row| AREAS.contains(&row[1]))
        .map(|row| row[0].to_owned())
        .filter(|case| !dir.join(case).join("rejected.txt").exists());
    std::iter::once("baseline".to_owned())
        .chain(named)
        .map(|case| {
            let mut files = vec![dir.join("baseline/config.yaml")];
            if case != "baseline" {
                files.push(dir.join(&case).join("config.yaml"));
            }
            (case, files)
        })
        .collect()
}

type Resources = BTreeMap<&'static str, BTreeMap<String, Value>>;

/// What we send to each proxy in each case; translated once for all tests.
pub(super) fn worlds() -> Option<&'static [(String, Resources)]> {
    static WORLDS: LazyLock<Option<Vec<(String, Resources)>>> = LazyLock::new(translate_worlds);
    WORLDS.as_deref()
}

fn translate_worlds() -> Option<Vec<(String, Resources)>> {
    let dir = recorded()?;
    let nodes = read_json(&dir.join("baseline/nodes.json"));
    let mut all = Vec::new();
    for (case, files) in cases(&dir) {
        let mut translator = Translator::new(MeshConfig::default());
        translator.apply_all(
            world::kubernetes_service()
                .into_iter()
                .chain(world::changes(&files)),
        );
        for name in ["client", "server", "ingress"] {
            all.push((
                format!("{case} {name}"),
                ours(&mut translator, &proxy(&nodes, name)),
            ));
        }
    }
    Some(all)
}

#[test]
fn what_we_send_equals_what_istiod_sends_but_for_the_listed_differences() {
    let Some(dir) = recorded() else { return };
    let listed: BTreeMap<String, String> = include_str!("parity.tsv")
        .lines()
        .filter(|line| !line.starts_with('#') && !line.is_empty())
        .map(|line| line.split_once('\t').expect("a line is a case and a reason"))
        .map(|(case, reason)| (case.to_owned(), reason.to_owned()))
        .collect();
    let only = std::env::var("PARITY_CASE").ok();
    let (mut worse, mut better, mut equal, mut total) = (Vec::new(), Vec::new(), 0, 0);
    for (id, ours) in worlds().unwrap() {
        let (case, name) = id.split_once(' ').unwrap();
        if only.as_deref().is_some_and(|only| only != case) {
            continue;
        }
        for (kind, theirs) in theirs(&dir, case, name) {
            let empty = BTreeMap::new();
            let found = compare(ours.get(kind).unwrap_or(&empty), &theirs);
            let id = format!("{id} {kind}");
            total += 1;
            equal += usize::from(found.is_empty());
            match (found.is_empty(), listed.contains_key(&id)) {
                (true, true) => better.push(id),
                (false, false) => {
                    let shown = if only.is_some() { 200 } else { 2 };
                    let found: Vec<String> = found.into_iter().take(shown).collect();
                    worse.push(format!("{id}\n    {}", found.join("\n    ")));
                }
                (true, false) | (false, true) => {}
            }
        }
    }
    println!("{equal} of {total} equal");
    assert!(
        worse.is_empty(),
        "{} differ and are not listed ({equal} of {total} equal):\n{}",
        worse.len(),
        worse.join("\n")
    );
    assert!(
        better.is_empty(),
        "equal now, take them off the list:\n{}",
        better.join("\n")
    );
}
