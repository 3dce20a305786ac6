//! Consistent hashing: the same key finds the same host through Envoy and through serin-proxy.

use serde_json::{Value, json};

use super::client::{Ask, Client};
use super::{Setup, assert_none, clusters, differences, echo, resources};
use crate::fixture::*;

pub(super) const HOSTS: [&str; 7] = ["h0", "h1", "h2", "h3", "h4", "h5", "h6"];
const KEYS: usize = 300;

/// Where the seven hosts are, and how they are.
#[derive(Clone, Copy)]
pub(super) enum Where {
    /// In two localities.
    Localities,
    /// The same, with `hash_key`.
    Keyed,
    /// In these priorities, from the first host on: a letter a host, `h`ealthy or `u`nhealthy.
    Priorities(&'static [&'static str]),
}

/// Seven hosts with weights from 1 to 4, which hashing knows by their address, or by `hash_key`.
pub(super) fn hosts(name: &str, backends: &[Backend], how: Where, more: &Value) -> Value {
    let endpoint = |index: usize| {
        let at = backends[index].address;
        let mut out = json!({
            "endpoint": {
                "hostname": format!("{}.hosts.test", HOSTS[index]),
                "address": { "socket_address": { "address": at.ip().to_string(), "port_value": at.port() } },
            },
            "load_balancing_weight": 1 + index % 4,
        });
        if let Where::Keyed = how {
            out["metadata"] = json!({ "filter_metadata": { "envoy.lb": { "hash_key": HOSTS[index] } } });
        }
        out
    };
    let locality = |zone: &str, weight: usize, range: std::ops::Range<usize>| {
        json!({
            "locality": { "zone": zone },
            "load_balancing_weight": weight,
            "lb_endpoints": range.map(endpoint).collect::<Vec<_>>(),
        })
    };
    let localities = match how {
        Where::Localities | Where::Keyed => vec![locality("one", 3, 0..4), locality("two", 1, 4..7)],
        Where::Priorities(levels) => {
            let mut first = 0;
            let mut level = |(priority, states): (usize, &&str)| {
                let mut out = locality("one", 1, first..first + states.len());
                out["priority"] = json!(priority);
                for (index, state) in states.chars().enumerate() {
                    out["lb_endpoints"][index]["health_status"] = json!(match state {
                        'u' => "UNHEALTHY",
                        _ => "HEALTHY",
                    });
                }
                first += states.len();
                out
            };
            levels.iter().enumerate().map(&mut level).collect()
        }
    };
    let mut out = json!({
        "name": name, "type": "STATIC", "connect_timeout": "2s",
        "load_assignment": { "cluster_name": name, "endpoints": localities },
    });
    for (key, value) in more.as_object().unwrap() {
        out[key] = value.clone();
    }
    out
}

/// The policy of that name in `load_balancing_policy`.
pub(super) fn newer(name: &str, mut config: Value) -> Value {
    config["@type"] = json!(format!(
        "type.googleapis.com/envoy.extensions.load_balancing_policies.{name}"
    ));
    json!({ "load_balancing_policy": { "policies": [ { "typed_extension_config": {
        "name": "policy", "typed_config": config } } ] } })
}

fn balancers() -> Vec<(&'static str, Where, Value)> {
    use Where::{Keyed, Localities, Priorities};
    let named = json!({ "use_hostname_for_hashing": true });
    vec![
        ("ring", Localities, json!({ "lb_policy": "RING_HASH" })),
        (
            "ring-small",
            Localities,
            json!({ "lb_policy": "RING_HASH", "ring_hash_lb_config": { "minimum_ring_size": 10, "maximum_ring_size": 25 } }),
        ),
        (
            "ring-murmur",
            Localities,
            json!({ "lb_policy": "RING_HASH", "ring_hash_lb_config": { "hash_function": "MURMUR_HASH_2" } }),
        ),
        ("ring-keyed", Keyed, json!({ "lb_policy": "RING_HASH" })),
        (
            "ring-localities",
            Localities,
            json!({ "lb_policy": "RING_HASH", "common_lb_config": { "locality_weighted_lb_config": {} } }),
        ),
        (
            "ring-newer",
            Localities,
            newer("ring_hash.v3.RingHash", json!({ "minimum_ring_size": 333 })),
        ),
        ("maglev", Localities, json!({ "lb_policy": "MAGLEV" })),
        (
            "maglev-small",
            Localities,
            json!({ "lb_policy": "MAGLEV", "maglev_lb_config": { "table_size": 251 } }),
        ),
        ("maglev-keyed", Keyed, json!({ "lb_policy": "MAGLEV" })),
        (
            "maglev-localities",
            Localities,
            json!({ "lb_policy": "MAGLEV", "common_lb_config": { "locality_weighted_lb_config": {} } }),
        ),
        (
            "maglev-newer",
            Localities,
            newer("maglev.v3.Maglev", json!({ "table_size": 1021 })),
        ),
        (
            "ring-newer-hostnames",
            Localities,
            newer(
                "ring_hash.v3.RingHash",
                json!({ "consistent_hashing_lb_config": named }),
            ),
        ),
        (
            "maglev-newer-hostnames",
            Localities,
            newer(
                "maglev.v3.Maglev",
                json!({ "consistent_hashing_lb_config": named }),
            ),
        ),
        (
            "ring-priorities",
            Priorities(&["huh", "hu", "hh"]),
            json!({ "lb_policy": "RING_HASH" }),
        ),
        (
            "maglev-priorities",
            Priorities(&["huh", "hu", "hh"]),
            json!({ "lb_policy": "MAGLEV" }),
        ),
        (
            "ring-panic",
            Priorities(&["huuu", "uuu"]),
            json!({ "lb_policy": "RING_HASH" }),
        ),
        (
            "maglev-all-out",
            Priorities(&["uuuu", "uuu"]),
            json!({ "lb_policy": "MAGLEV" }),
        ),
    ]
}

pub(super) fn by_header() -> Value {
    json!([ { "header": { "header_name": "x-key" } } ])
}

fn policies() -> Vec<(&'static str, Value)> {
    let header = |name: &str| json!({ "header": { "header_name": name } });
    vec![
        ("several-values", json!([header("x-several")])),
        (
            "rewritten",
            json!([ { "header": { "header_name": "x-key", "regex_rewrite": {
                "pattern": { "regex": "key-([0-9])" }, "substitution": "\\1." } } } ]),
        ),
        (
            "several-rewritten",
            json!([ { "header": { "header_name": "x-several", "regex_rewrite": {
                "pattern": { "regex": "[0-9]$" }, "substitution": "" } } } ]),
        ),
        ("cookie", json!([ { "cookie": { "name": "k" } } ])),
        ("query", json!([ { "query_parameter": { "name": "q" } } ])),
        ("query-bare", json!([ { "query_parameter": { "name": "bare" } } ])),
        (
            "source",
            json!([ { "connection_properties": { "source_ip": true } } ]),
        ),
        ("state", json!([ { "filter_state": { "key": "hash.key" } } ])),
        (
            "combined",
            json!([header("x-key"), header("x-few"), { "connection_properties": { "source_ip": true } }]),
        ),
        (
            "terminal",
            json!([ { "header": { "header_name": "x-key" }, "terminal": true }, header("x-few") ]),
        ),
        (
            "terminal-passed",
            json!([ { "header": { "header_name": "x-some" }, "terminal": true }, header("x-key") ]),
        ),
        (
            "terminal-empty",
            json!([header("x-key"), { "header": { "header_name": "x-absent" }, "terminal": true }, header("x-few")]),
        ),
    ]
}

pub(super) fn route(prefix: &str, cluster: &str, policy: &Value) -> Value {
    json!({ "match": { "prefix": format!("/{prefix}/") }, "route": { "cluster": cluster, "hash_policy": policy, "timeout": "0s" } })
}

fn ask(path: &str, number: usize) -> Ask {
    let key = format!("key-{number}");
    let mut fields = vec![
        ("host".to_owned(), "a.test".to_owned()),
        ("x-case".to_owned(), format!("{path}-{number}")),
        ("x-key".to_owned(), key.clone()),
        ("x-few".to_owned(), format!("few-{}", number % 7)),
        ("cookie".to_owned(), format!("a=b; k={key}")),
        ("x-several".to_owned(), format!("z-{number}")),
        ("x-several".to_owned(), format!("a-{}", number % 13)),
    ];
    if number.is_multiple_of(3) {
        fields.push(("x-some".to_owned(), format!("some-{number}")));
    }
    Ask {
        case: format!("{path}-{number}"),
        method: "GET",
        target: format!("/{path}/x?p=1&bare&q={key}"),
        fields,
        body: String::new(),
        who: 0,
    }
}

pub(super) fn setup(name: &str, routes: Vec<Value>, asks: Vec<Ask>) -> Setup {
    Setup {
        name: name.to_owned(),
        manager: json!({
            "stat_prefix": "hash",
            "server_name": "gate",
            "http_filters": [ { "name": "state", "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.filters.http.set_filter_state.v3.Config",
                "on_request_headers": [ { "object_key": "hash.key", "factory_key": "envoy.hashable_string",
                    "format_string": { "text_format_source": { "inline_string": "%REQ(x-key)%" } } } ] } } ],
        }),
        table: json!({ "virtual_hosts": [ { "name": "all", "domains": ["*"], "routes": routes } ] }),
        asks,
        more: "%UPSTREAM_HOST%",
        tls: None,
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_find_the_same_hosts_through_envoy_and_serin_proxy_whatever_is_hashed_and_however() {
    let mut backends = Vec::new();
    for name in HOSTS {
        backends.push(echo(name).await);
    }
    let (mut routes, mut more, mut asks) = (Vec::new(), Vec::new(), Vec::new());
    for (name, how, config) in balancers() {
        more.push(hosts(name, &backends, how, &config));
        routes.push(route(name, name, &by_header()));
        asks.extend((0..KEYS).map(|number| ask(name, number)));
    }
    for (name, policy) in policies() {
        for cluster in ["ring", "maglev"] {
            let path = format!("{name}-{cluster}");
            routes.push(route(&path, cluster, &policy));
            asks.extend((0..KEYS / 10).map(|number| ask(&path, number)));
        }
    }
    let count = asks.len();
    if let Some(differences) = differences(vec![setup("hash", routes, asks)], more).await {
        assert_none(count, &differences);
    }
}

/// Which of seven hosts with the hash keys `h0` to `h6` and weights 1, 2, 3, 4, 1, 2, 3 Envoy 1.40 chose for the values
/// `key-0`, `key-1`, … of a field: what was seen, kept for machines without Envoy.
const RING_KEYED: &str = "032661243264166211663523330122611513565401232326500166223636";
const MAGLEV_KEYED: &str = "261061436243635256435046232262213502366651620251221366636601";

#[tokio::test]
async fn keys_find_the_hosts_that_envoy_was_seen_to_choose() {
    let mut backends = Vec::new();
    for name in HOSTS {
        backends.push(echo(name).await);
    }
    let mut harness = Harness::start();
    let (mut routes, mut more) = (Vec::new(), Vec::new());
    for (name, how, config) in balancers()
        .into_iter()
        .filter(|(_, how, _)| matches!(how, Where::Keyed))
    {
        more.push(hosts(name, &backends, how, &config));
        routes.push(route(name, name, &by_header()));
    }
    let setup = setup("recorded", routes, Vec::new());
    let mut all = clusters(&more);
    all.extend(resources(&setup, "/dev/null"));
    for one in all {
        let update = serin_proxy::config::store::Update {
            name: &one.name,
            body: &one.body,
        };
        let refused = harness.proxy.apply(one.resource_type, &[update], &[]).await;
        assert!(refused.is_empty(), "{refused:?}");
    }
    let at = harness.proxy.listener_address("recorded").unwrap();
    let mut client = Client::new(at);
    for (name, recorded) in [("ring-keyed", RING_KEYED), ("maglev-keyed", MAGLEV_KEYED)] {
        let mut seen = String::new();
        for number in 0..60 {
            let answer = client.ask(&ask(name, number)).await;
            seen.push_str(answer.headers["x-backend"][0].strip_prefix('h').unwrap());
        }
        assert_eq!(seen, recorded, "{name}");
    }
    harness.log.close();
}
