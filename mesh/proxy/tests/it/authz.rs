//! The RBAC filters that Istio makes of AuthorizationPolicies, judged by Envoy and by serin-proxy: the same requests by the
//! same clients must be allowed and denied. The filters are real ones (`../shared/data/istio/authz-to-envoy`), requests
//! are made of the names, paths and values that occur in them, the clients' certificates as well.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use futures::stream::{self, StreamExt};
use serde_json::Value;
use serin_xds::ResourceType;
use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::envoy::config::rbac::v3 as rbac;
use serin_xds::pb::envoy::config::route::v3 as route;
use serin_xds::pb::envoy::extensions::filters::http::rbac::v3 as http_rbac;
use serin_xds::pb::envoy::extensions::filters::network::http_connection_manager::v3 as hcm;
use serin_xds::pb::envoy::extensions::filters::network::rbac::v3 as network_rbac;
use serin_xds::pb::envoy::extensions::filters::network::tcp_proxy::v3 as tcp_proxy;
use serin_xds::pb::envoy::extensions::path::r#match::uri_template::v3 as uri_template;
use serin_xds::pb::envoy::r#type::matcher::v3 as matcher;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::certificates::{Authority, common, server_socket};
use crate::fixture::*;
use crate::fuzz::Random;
use crate::interop_ads::{Pair, resource, router};
use crate::tls::handshake;

/// Requests for each case.
const REQUESTS: usize = 60;

fn data() -> Option<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/data/istio/authz-to-envoy");
    if !folder.is_dir() {
        eprintln!("SKIPPED: authorization as Istio configures it: ../shared is not here");
        return None;
    }
    Some(folder)
}

// The messages, from their JSON form.

fn list<'a>(value: &'a Value, key: &str) -> impl Iterator<Item = &'a Value> {
    value[key].as_array().into_iter().flatten()
}

fn text(value: &Value, key: &str) -> String {
    value[key].as_str().unwrap_or_default().to_owned()
}

fn string(value: &Value) -> matcher::StringMatcher {
    use matcher::string_matcher::MatchPattern;
    let pattern = [
        ("exact", MatchPattern::Exact as fn(String) -> MatchPattern),
        ("prefix", MatchPattern::Prefix),
        ("suffix", MatchPattern::Suffix),
        ("contains", MatchPattern::Contains),
    ]
    .into_iter()
    .find_map(|(key, make)| value[key].as_str().map(|text| make(text.to_owned())));
    let regex = || {
        MatchPattern::SafeRegex(matcher::RegexMatcher {
            regex: text(&value["safeRegex"], "regex"),
            ..Default::default()
        })
    };
    matcher::StringMatcher {
        match_pattern: Some(pattern.unwrap_or_else(regex)),
        ignore_case: value["ignoreCase"] == true,
    }
}

fn header(value: &Value) -> route::HeaderMatcher {
    use route::header_matcher::HeaderMatchSpecifier;
    route::HeaderMatcher {
        name: text(value, "name"),
        invert_match: value["invertMatch"] == true,
        header_match_specifier: Some(match value["presentMatch"].as_bool() {
            Some(present) => HeaderMatchSpecifier::PresentMatch(present),
            None => HeaderMatchSpecifier::StringMatch(string(&value["stringMatch"])),
        }),
        ..Default::default()
    }
}

fn path(value: &Value) -> matcher::PathMatcher {
    matcher::PathMatcher {
        rule: Some(matcher::path_matcher::Rule::Path(string(&value["path"]))),
    }
}

fn range(value: &Value) -> core::CidrRange {
    core::CidrRange {
        address_prefix: text(value, "addressPrefix"),
        prefix_len: number(value["prefixLen"].as_u64().unwrap_or(0) as u32),
    }
}

fn metadata_value(value: &Value) -> matcher::ValueMatcher {
    use matcher::value_matcher::MatchPattern;
    let pattern = if value["stringMatch"].is_object() {
        MatchPattern::StringMatch(string(&value["stringMatch"]))
    } else if value["listMatch"].is_object() {
        MatchPattern::ListMatch(Box::new(matcher::ListMatcher {
            match_pattern: Some(matcher::list_matcher::MatchPattern::OneOf(Box::new(
                metadata_value(&value["listMatch"]["oneOf"]),
            ))),
        }))
    } else if value["orMatch"].is_object() {
        MatchPattern::OrMatch(matcher::OrMatcher {
            value_matchers: list(&value["orMatch"], "valueMatchers")
                .map(metadata_value)
                .collect(),
        })
    } else {
        panic!("a value matcher that this test does not know: {value}");
    };
    matcher::ValueMatcher {
        match_pattern: Some(pattern),
    }
}

fn metadata(value: &Value) -> matcher::MetadataMatcher {
    use matcher::metadata_matcher::{PathSegment, path_segment::Segment};
    matcher::MetadataMatcher {
        filter: text(value, "filter"),
        path: list(value, "path")
            .map(|segment| PathSegment {
                segment: Some(Segment::Key(text(segment, "key"))),
            })
            .collect(),
        value: Some(metadata_value(&value["value"])),
        invert: value["invert"] == true,
    }
}

fn permission(value: &Value) -> rbac::Permission {
    use rbac::permission::{Rule, Set};
    let (key, inner) = value.as_object().unwrap().iter().next().unwrap();
    let set = || Set {
        rules: list(inner, "rules").map(permission).collect(),
    };
    rbac::Permission {
        rule: Some(match key.as_str() {
            "any" => Rule::Any(true),
            "andRules" => Rule::AndRules(set()),
            "orRules" => Rule::OrRules(set()),
            "notRule" => Rule::NotRule(Box::new(permission(inner))),
            "header" => Rule::Header(header(inner)),
            "urlPath" => Rule::UrlPath(path(inner)),
            "destinationIp" => Rule::DestinationIp(range(inner)),
            "destinationPort" => Rule::DestinationPort(inner.as_u64().unwrap() as u32),
            "metadata" => Rule::Metadata(metadata(inner)),
            "requestedServerName" => Rule::RequestedServerName(string(inner)),
            "uriTemplate" => Rule::UriTemplate(core::TypedExtensionConfig {
                name: text(inner, "name"),
                typed_config: Some(any(&uri_template::UriTemplateMatchConfig {
                    path_template: text(&inner["typedConfig"], "pathTemplate"),
                })),
            }),
            other => panic!("a permission that this test does not know: {other}"),
        }),
    }
}

fn principal(value: &Value) -> rbac::Principal {
    use rbac::principal::{Authenticated, Identifier, Set};
    let (key, inner) = value.as_object().unwrap().iter().next().unwrap();
    let set = || Set {
        ids: list(inner, "ids").map(principal).collect(),
    };
    rbac::Principal {
        identifier: Some(match key.as_str() {
            "any" => Identifier::Any(true),
            "andIds" => Identifier::AndIds(set()),
            "orIds" => Identifier::OrIds(set()),
            "notId" => Identifier::NotId(Box::new(principal(inner))),
            "authenticated" => Identifier::Authenticated(Authenticated {
                principal_name: inner["principalName"]
                    .is_object()
                    .then(|| string(&inner["principalName"])),
            }),
            "directRemoteIp" => Identifier::DirectRemoteIp(range(inner)),
            "remoteIp" => Identifier::RemoteIp(range(inner)),
            "header" => Identifier::Header(header(inner)),
            "metadata" => Identifier::Metadata(metadata(inner)),
            other => panic!("a principal that this test does not know: {other}"),
        }),
    }
}

fn rules(value: &Value) -> Option<rbac::Rbac> {
    let value = value.as_object()?;
    let action = match value.get("action").and_then(Value::as_str) {
        None | Some("ALLOW") => rbac::rbac::Action::Allow,
        Some("DENY") => rbac::rbac::Action::Deny,
        Some("LOG") => rbac::rbac::Action::Log,
        Some(other) => panic!("an action that this test does not know: {other}"),
    };
    let policies = value.get("policies").and_then(Value::as_object);
    Some(rbac::Rbac {
        action: action as i32,
        policies: policies
            .into_iter()
            .flatten()
            .map(|(name, policy)| {
                let policy = rbac::Policy {
                    permissions: list(policy, "permissions").map(permission).collect(),
                    principals: list(policy, "principals").map(principal).collect(),
                    ..Default::default()
                };
                (name.clone(), policy)
            })
            .collect(),
        ..Default::default()
    })
}

/// What occurs in filters, as material for requests.
#[derive(Clone, Debug, Default)]
struct Material {
    paths: BTreeSet<String>,
    hosts: BTreeSet<String>,
    headers: BTreeSet<(String, String)>,
    identities: BTreeSet<String>,
    addresses: BTreeSet<String>,
    names: BTreeSet<String>,
}

/// Texts that a matcher takes, roughly; that it does not take them all does no harm.
fn examples(value: &Value) -> Vec<String> {
    let mut out = Vec::new();
    if let Some(exact) = value["exact"].as_str() {
        out.push(exact.to_owned());
    }
    if let Some(prefix) = value["prefix"].as_str() {
        out.push(format!("{prefix}x"));
        out.push(format!("{prefix}ns/a/sa/b"));
    }
    if let Some(suffix) = value["suffix"].as_str() {
        out.push(format!("x{suffix}"));
    }
    if let Some(regex) = value["safeRegex"]["regex"].as_str() {
        let simple = regex
            .replace("(.+/|)", "")
            .replace("(/.+)?", "")
            .replace("[^/]*", "x");
        out.push(simple.replace(".+", "x").replace(".*", "y"));
        out.push(simple.replace(".+", "").replace(".*", ""));
    }
    out
}

impl Material {
    fn collect(&mut self, value: &Value) {
        match value {
            Value::Object(map) => {
                for (key, inner) in map {
                    match key.as_str() {
                        "urlPath" => {
                            self.paths
                                .extend(examples(&inner["path"]).into_iter().map(|path| {
                                    if path.starts_with('/') {
                                        path
                                    } else {
                                        format!("/{path}")
                                    }
                                }));
                        }
                        "pathTemplate" => {
                            let template = inner.as_str().unwrap();
                            self.paths.insert(template.replace("**", "a/b").replace('*', "c"));
                        }
                        "header" => {
                            let name = text(inner, "name");
                            let values = examples(&inner["stringMatch"]);
                            match name.as_str() {
                                ":authority" => self.hosts.extend(values),
                                name if name.starts_with(':') => {}
                                name => self
                                    .headers
                                    .extend(values.into_iter().map(|value| (name.to_owned(), value))),
                            }
                        }
                        "principalName" => self.identities.extend(
                            examples(inner)
                                .into_iter()
                                .map(|id| match id.split_once("://") {
                                    Some((_, rest)) => format!("spiffe://{rest}"),
                                    None => format!("spiffe://{}", id.trim_start_matches('/')),
                                })
                                .filter(|id| id.len() > "spiffe://".len()),
                        ),
                        "remoteIp" => drop(self.addresses.insert(text(inner, "addressPrefix"))),
                        "requestedServerName" => self.names.extend(examples(inner)),
                        _ => {}
                    }
                    self.collect(inner);
                }
            }
            Value::Array(items) => {
                for item in items {
                    self.collect(item);
                }
            }
            _ => {}
        }
    }
}

/// A client and what it asks.
#[derive(Clone, Debug)]
struct Question {
    identity: Option<String>,
    server_name: String,
    method: &'static str,
    host: String,
    path: String,
    fields: Vec<(String, String)>,
}

fn questions(material: &Material, seed: u64) -> Vec<Question> {
    let mut random = Random::new(seed);
    let mut pick = |from: Vec<String>| from[random.below(from.len())].clone();
    let with = |more: &BTreeSet<String>, base: &[&str]| -> Vec<String> {
        base.iter()
            .map(|text| (*text).to_owned())
            .chain(more.iter().cloned())
            .collect()
    };
    let paths = with(&material.paths, &["/", "/other", "/exact/more"]);
    let hosts: Vec<String> = with(&material.hosts, &["a.example"])
        .into_iter()
        .filter(|host| {
            !host.is_empty()
                && host
                    .bytes()
                    .all(|byte| byte.is_ascii_alphanumeric() || b".-:".contains(&byte))
        })
        .collect();
    let names: Vec<String> = with(&material.names, &["a.example"])
        .into_iter()
        .filter(|name| rustls::pki_types::ServerName::try_from(name.clone()).is_ok())
        .collect();
    let identities = with(
        &material.identities,
        &["", "spiffe://cluster.local/ns/other/sa/other"],
    );
    let headers: Vec<String> = material
        .headers
        .iter()
        .map(|(name, value)| format!("{name}\n{value}"))
        .chain(["x-none\n1".to_owned()])
        .collect();
    let addresses = with(&material.addresses, &["", "8.8.8.8"]);
    let methods = ["GET", "POST", "PUT", "DELETE", "HEAD"]
        .map(str::to_owned)
        .to_vec();
    (0..REQUESTS)
        .map(|_| {
            let identity = Some(pick(identities.clone())).filter(|id| !id.is_empty());
            let mut fields = Vec::new();
            for _ in 0..2 {
                let (name, value) = pick(headers.clone())
                    .split_once('\n')
                    .map(|(a, b)| (a.to_owned(), b.to_owned()))
                    .unwrap();
                if fields.iter().all(|(known, _)| *known != name) {
                    fields.push((name, value));
                }
            }
            let address = pick(addresses.clone());
            if !address.is_empty() {
                fields.push(("x-forwarded-for".into(), address));
            }
            let method = pick(methods.clone());
            Question {
                identity,
                server_name: pick(names.clone()),
                method: ["GET", "POST", "PUT", "DELETE", "HEAD"]
                    .into_iter()
                    .find(|known| *known == method)
                    .unwrap(),
                host: pick(hosts.clone()),
                path: pick(paths.clone()),
                fields,
            }
        })
        .collect()
}

/// The status, or nothing if the connection was refused.
async fn answer(at: SocketAddr, client: &Arc<rustls::ClientConfig>, question: &Question) -> Option<u16> {
    let mut stream = handshake(at, client, &question.server_name).await.ok()?;
    let mut fields = String::new();
    for (name, value) in &question.fields {
        fields.push_str(&format!("{name}: {value}\r\n"));
    }
    let bytes = format!(
        "{} {} HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n{fields}\r\n",
        question.method, question.path, question.host
    );
    let _ = stream.write_all(bytes.as_bytes()).await;
    // Not to the end of the connection: Envoy leaves it open for a second.
    let mut answer = [0; 12];
    soon("an answer", stream.read_exact(&mut answer)).await.ok()?;
    std::str::from_utf8(answer.get(9..)?).ok()?.parse().ok()
}

/// Whether bytes pass.
async fn passes(at: SocketAddr, client: &Arc<rustls::ClientConfig>, server_name: &str) -> bool {
    let Ok(mut stream) = handshake(at, client, server_name).await else {
        return false;
    };
    let _ = stream.write_all(b"ping").await;
    let mut answer = [0; 4];
    let read = soon("an answer or the end", stream.read_exact(&mut answer)).await;
    read.is_ok() && &answer == b"ping"
}

/// A case: its name, and filters in their order, as JSON.
fn cases(folder: &Path, kind: &str) -> Vec<(String, Vec<Value>)> {
    let table = std::fs::read_to_string(folder.join("cases.tsv")).unwrap();
    let mut out = Vec::new();
    for line in table.lines().skip(1) {
        let columns: Vec<&str> = line.split('\t').collect();
        if columns[1] != kind {
            continue;
        }
        // What a service decides is tested elsewhere; here it is the rules around it.
        let filters: Vec<Value> = columns[3]
            .split(',')
            .map(|file| serde_yaml::from_str(&std::fs::read_to_string(folder.join(file)).unwrap()).unwrap())
            .filter(|filter: &Value| text(filter, "name").ends_with(".rbac"))
            .collect();
        if !filters.is_empty() {
            out.push((columns[0].to_owned(), filters));
        }
    }
    out
}

#[tokio::test]
async fn istios_http_authorization_is_judged_alike_by_envoy_and_serin_proxy() {
    let Some(folder) = data() else { return };
    let cases = cases(&folder, "http");
    assert!(cases.len() >= 12, "{}", cases.len());
    let authority = Authority::new("mesh");
    let server = authority.issue(&["a.example", "spiffe://cluster.local/ns/foo/sa/httpbin"]);
    let backend = Backend::named("ok").await;
    let mut resources = Vec::new();
    let mut cluster = eds_cluster("c");
    cluster.eds_cluster_config = Some(
        serin_xds::pb::envoy::config::cluster::v3::cluster::EdsClusterConfig {
            eds_config: crate::interop_ads::ads_source(),
            ..Default::default()
        },
    );
    resources.push(resource(ResourceType::Cluster, "c", &cluster));
    resources.push(resource(
        ResourceType::Endpoints,
        "c",
        &assignment("c", &[(backend.address, "")]),
    ));
    for (name, filters) in &cases {
        let mut manager = manager("none");
        manager.http_filters = filters
            .iter()
            .map(|filter| {
                let config = &filter["typedConfig"];
                let message = http_rbac::Rbac {
                    rules: rules(&config["rules"]),
                    rules_stat_prefix: text(config, "rulesStatPrefix"),
                    shadow_rules: rules(&config["shadowRules"]),
                    shadow_rules_stat_prefix: text(config, "shadowRulesStatPrefix"),
                    ..Default::default()
                };
                http_filter("envoy.filters.http.rbac", Some(any(&message)))
            })
            .chain([router()])
            .collect();
        manager.route_specifier = Some(hcm::http_connection_manager::RouteSpecifier::RouteConfig(
            route::RouteConfiguration {
                name: "inline".into(),
                virtual_hosts: vec![host("all", "*", vec![prefix_route("/", to_cluster("c"))])],
                ..Default::default()
            },
        ));
        let mut chain = http_chain(&manager);
        // A certificate is verified where there is one.
        chain.transport_socket = server_socket(
            common(Some(&server), Some(authority.context()), &["http/1.1"]),
            false,
        );
        let mut message = listener_of(name, core::TrafficDirection::Inbound, vec![chain]);
        message.listener_filters = vec![tls_inspector()];
        resources.push(resource(ResourceType::Listener, name, &message));
    }
    let Some(mut pair) = Pair::start(resources).await else {
        return;
    };
    let (mut allowed, mut denied, mut differences) = (0, 0, Vec::new());
    for (seed, (name, filters)) in cases.iter().enumerate() {
        let at = pair.listener(name).await;
        let mut material = Material::default();
        for filter in filters {
            material.collect(filter);
        }
        let clients: std::collections::BTreeMap<_, _> = material
            .identities
            .iter()
            .map(String::as_str)
            .chain(["spiffe://cluster.local/ns/other/sa/other"])
            .map(|id| {
                (
                    id.to_owned(),
                    believing(&authority)
                        .identity(&authority.issue(&[id]))
                        .build_unverified(),
                )
            })
            .collect();
        let nobody = believing(&authority).build_unverified();
        let questions = questions(&material, seed as u64);
        let answers: Vec<_> = stream::iter(&questions)
            .map(|question| {
                let client = question.identity.as_ref().map_or(&nobody, |id| &clients[id]);
                async move {
                    (
                        answer(at[0], client, question).await,
                        answer(at[1], client, question).await,
                    )
                }
            })
            .buffered(8)
            .collect()
            .await;
        for (question, (ours, theirs)) in questions.iter().zip(answers) {
            match theirs {
                Some(200) => allowed += 1,
                _ => denied += 1,
            }
            if ours != theirs {
                differences.push(format!("{name}: {question:?}: ours {ours:?}, theirs {theirs:?}"));
            }
        }
    }
    pair.no_refusals();
    assert!(
        differences.is_empty(),
        "{} of {} differ:\n{}",
        differences.len(),
        allowed + denied,
        differences.join("\n")
    );
    assert!(allowed > 50 && denied > 50, "{allowed} allowed, {denied} denied");
    pair.stop().await;
}

fn tls_inspector() -> serin_xds::pb::envoy::config::listener::v3::ListenerFilter {
    use serin_xds::pb::envoy::config::listener::v3 as listener;
    use serin_xds::pb::envoy::extensions::filters::listener::tls_inspector::v3::TlsInspector;
    listener::ListenerFilter {
        name: "envoy.filters.listener.tls_inspector".into(),
        config_type: Some(listener::listener_filter::ConfigType::TypedConfig(any(
            &TlsInspector::default(),
        ))),
        ..Default::default()
    }
}

fn believing(authority: &Authority) -> crate::certificates::ClientBuilder {
    authority.client().alpn(&["http/1.1"])
}

#[tokio::test]
async fn istios_tcp_authorization_is_judged_alike_by_envoy_and_serin_proxy() {
    let Some(folder) = data() else { return };
    let cases = cases(&folder, "tcp");
    assert!(cases.len() >= 4, "{}", cases.len());
    let authority = Authority::new("mesh");
    let server = authority.issue(&["a.example", "spiffe://cluster.local/ns/foo/sa/httpbin"]);
    let socket = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let echo_at = socket.local_addr().unwrap();
    let echo = tokio::spawn(async move {
        let mut open = tokio::task::JoinSet::new();
        while let Ok((mut stream, _)) = socket.accept().await {
            open.spawn(async move {
                let (mut from, mut to) = stream.split();
                let _ = tokio::io::copy(&mut from, &mut to).await;
            });
        }
    });
    let mut cluster = eds_cluster("c");
    cluster.eds_cluster_config = Some(
        serin_xds::pb::envoy::config::cluster::v3::cluster::EdsClusterConfig {
            eds_config: crate::interop_ads::ads_source(),
            ..Default::default()
        },
    );
    let mut resources = vec![
        resource(ResourceType::Cluster, "c", &cluster),
        resource(ResourceType::Endpoints, "c", &assignment("c", &[(echo_at, "")])),
    ];
    let proxy = tcp_proxy::TcpProxy {
        stat_prefix: "t".into(),
        cluster_specifier: Some(tcp_proxy::tcp_proxy::ClusterSpecifier::Cluster("c".into())),
        ..Default::default()
    };
    for (name, filters) in &cases {
        let mut chain = http_chain(&manager("none"));
        chain.filters = filters
            .iter()
            .map(|filter| {
                let config = &filter["typedConfig"];
                let message = network_rbac::Rbac {
                    rules: rules(&config["rules"]),
                    shadow_rules: rules(&config["shadowRules"]),
                    shadow_rules_stat_prefix: text(config, "shadowRulesStatPrefix"),
                    stat_prefix: "tcp.".into(),
                    ..Default::default()
                };
                network_filter("envoy.filters.network.rbac", Some(any(&message)))
            })
            .chain([network_filter(
                "envoy.filters.network.tcp_proxy",
                Some(any(&proxy)),
            )])
            .collect();
        chain.transport_socket = server_socket(common(Some(&server), Some(authority.context()), &[]), false);
        let mut message = listener_of(name, core::TrafficDirection::Inbound, vec![chain]);
        message.listener_filters = vec![tls_inspector()];
        resources.push(resource(ResourceType::Listener, name, &message));
    }
    let Some(mut pair) = Pair::start(resources).await else {
        return;
    };
    let (mut passed, mut refused) = (0, 0);
    for (name, filters) in &cases {
        let at = pair.listener(name).await;
        let mut material = Material::default();
        for filter in filters {
            material.collect(filter);
        }
        material
            .identities
            .insert("spiffe://cluster.local/ns/other/sa/other".into());
        let clients = material
            .identities
            .iter()
            .map(|id| {
                (
                    id.clone(),
                    authority
                        .client()
                        .identity(&authority.issue(&[id]))
                        .build_unverified(),
                )
            })
            .chain([("nobody".to_owned(), authority.client().build_unverified())]);
        for (id, client) in clients {
            let (ours, theirs) = (
                passes(at[0], &client, "a.example").await,
                passes(at[1], &client, "a.example").await,
            );
            assert_eq!(ours, theirs, "{name}: {id}");
            passed += usize::from(theirs);
            refused += usize::from(!theirs);
        }
    }
    pair.no_refusals();
    assert!(passed > 2 && refused > 2, "{passed} passed, {refused} refused");
    pair.stop().await;
    echo.abort();
}
