//! Filters whose configuration is a resource of its own (ECDS), and runtime values (RTDS, the admin port).

use http::Request;
use http_body_util::Full;
use serin_proxy::bootstrap::file;
use serin_proxy::config::store::Update;
use serin_proxy::control::admin::{AdminPort, Port};
use serin_proxy::control::xds::follow;
use serin_proxy::control::{Options, Proxy};
use serin_xds::ResourceType;
use serin_xds::client::Endpoint;
use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::envoy::config::route::v3 as route;
use serin_xds::pb::envoy::extensions::filters::http::fault::v3 as fault;
use serin_xds::pb::envoy::extensions::filters::http::header_mutation::v3 as header_mutation;
use serin_xds::pb::envoy::extensions::filters::network::http_connection_manager::v3 as hcm;
use serin_xds::pb::envoy::service::runtime::v3 as runtime;
use serin_xds::pb::envoy::r#type::v3 as envoy_type;
use serin_xds::pb::google::protobuf as google;
use tokio_util::sync::CancellationToken;

use crate::fixture::*;
use crate::scripted::{Scripted, resource};

const FAULT: &str = "type.googleapis.com/envoy.extensions.filters.http.fault.v3.HTTPFault";

fn aggregated() -> Option<core::ConfigSource> {
    Some(core::ConfigSource {
        config_source_specifier: Some(core::config_source::ConfigSourceSpecifier::Ads(
            core::AggregatedConfigSource {},
        )),
        ..Default::default()
    })
}

/// A fault filter that answers every request with that status.
fn aborting(status: u32) -> google::Any {
    any(&fault::HttpFault {
        abort: Some(fault::FaultAbort {
            percentage: Some(envoy_type::FractionalPercent {
                numerator: 100,
                denominator: 0,
            }),
            error_type: Some(fault::fault_abort::ErrorType::HttpStatus(status)),
            ..Default::default()
        }),
        ..Default::default()
    })
}

fn discovery(default: Option<google::Any>, without_warming: bool) -> core::ExtensionConfigSource {
    core::ExtensionConfigSource {
        config_source: aggregated(),
        default_config: default,
        apply_default_config_without_warming: without_warming,
        type_urls: vec![FAULT.into()],
    }
}

/// A manager with the filter `injected` before all others.
fn discovering(source: core::ExtensionConfigSource) -> hcm::HttpConnectionManager {
    let mut manager = manager("80");
    let filter = hcm::HttpFilter {
        name: "injected".into(),
        config_type: Some(hcm::http_filter::ConfigType::ConfigDiscovery(source)),
        ..Default::default()
    };
    manager.http_filters.insert(0, filter);
    manager
}

fn extension(config: google::Any) -> core::TypedExtensionConfig {
    core::TypedExtensionConfig {
        name: "injected".into(),
        typed_config: Some(config),
    }
}

async fn routes(harness: &Harness, backend: &Backend) {
    harness.cluster("c", &[backend.address]).await;
    harness.route_all_to("c").await;
}

async fn listen(harness: &Harness, name: &str, manager: &hcm::HttpConnectionManager) -> Option<String> {
    let listener = listener_of(name, core::TrafficDirection::Outbound, vec![http_chain(manager)]);
    harness.try_put(ResourceType::Listener, name, &listener).await
}

#[tokio::test]
async fn a_listener_waits_for_the_configuration_of_its_filter_and_an_update_swaps_only_that() {
    let harness = Harness::start();
    let backend = Backend::named("b").await;
    routes(&harness, &backend).await;
    assert_eq!(
        listen(&harness, "l", &discovering(discovery(None, false))).await,
        None
    );
    assert_eq!(harness.proxy.listener_address("l"), None, "it waits");
    assert!(
        harness
            .proxy
            .store(|store| store.extension_names())
            .contains("injected")
    );
    harness
        .put(ResourceType::Extension, "injected", &extension(aborting(418)))
        .await;
    let at = harness.proxy.listener_address("l").unwrap();
    // One connection sees both: the listener is not replaced.
    let mut client = h2_client(at).await;
    let mut ask = async || {
        let request = Request::get("http://reviews/").body(Full::default()).unwrap();
        client.send_request(request).await.unwrap().status().as_u16()
    };
    assert_eq!(ask().await, 418);
    harness
        .put(ResourceType::Extension, "injected", &extension(aborting(429)))
        .await;
    assert_eq!(ask().await, 429);
    // One that cannot be used is refused with the reason, and the last good one stays.
    let mut broken = extension(aborting(99));
    let refused = harness
        .try_put(ResourceType::Extension, "injected", &broken)
        .await;
    assert!(refused.unwrap().contains("abort.http_status"));
    broken.typed_config = Some(any(&header_mutation::HeaderMutation::default()));
    let refused = harness
        .try_put(ResourceType::Extension, "injected", &broken)
        .await
        .unwrap();
    assert!(refused.contains("type_urls"), "{refused}");
    broken.typed_config = None;
    let refused = harness
        .try_put(ResourceType::Extension, "injected", &broken)
        .await
        .unwrap();
    assert!(refused.contains("typed_config: is missing"), "{refused}");
    assert_eq!(ask().await, 429);
    // A second listener takes what is held, at once.
    assert_eq!(
        listen(&harness, "m", &discovering(discovery(None, false))).await,
        None
    );
    assert_eq!(
        get(harness.proxy.listener_address("m").unwrap(), "/").await.0,
        429
    );
}

#[tokio::test]
async fn defaults_are_used_at_once_or_when_nothing_comes_and_without_one_requests_get_500_nfcf() {
    let mut harness = Harness::start();
    let backend = Backend::named("b").await;
    routes(&harness, &backend).await;
    let with_default = discovering(discovery(Some(aborting(418)), true));
    assert_eq!(listen(&harness, "at-once", &with_default).await, None);
    let at_once = harness.proxy.listener_address("at-once").unwrap();
    assert_eq!(get(at_once, "/").await.0, 418);
    // These wait, and then take what there is.
    let waiting = discovering(discovery(Some(aborting(419)), false));
    assert_eq!(listen(&harness, "later", &waiting).await, None);
    assert_eq!(
        listen(&harness, "never", &discovering(discovery(None, false))).await,
        None
    );
    assert_eq!(harness.proxy.listener_address("later"), None);
    harness.proxy.tend_secrets(1_000_000).await;
    let later = harness.proxy.listener_address("later").unwrap();
    let never = harness.proxy.listener_address("never").unwrap();
    assert_eq!(get(later, "/").await.0, 419);
    while harness.log.try_recv().is_ok() {}
    assert_eq!(get(never, "/").await.0, 500);
    let line = harness.line().await;
    assert_eq!(line["response_flags"], "NFCF");
    assert_eq!(line["response_code_details"], "no_filter_config_found");
    // What comes late is used all the same, and its end leaves the defaults.
    harness
        .put(ResourceType::Extension, "injected", &extension(aborting(420)))
        .await;
    for at in [at_once, later, never] {
        assert_eq!(get(at, "/").await.0, 420);
    }
    harness.remove(ResourceType::Extension, "injected").await;
    assert_eq!(get(at_once, "/").await.0, 418);
    assert_eq!(get(never, "/").await.0, 500);
}

#[tokio::test]
async fn discovery_that_cannot_be_honoured_is_refused_with_its_path() {
    let harness = Harness::start();
    let backend = Backend::named("b").await;
    routes(&harness, &backend).await;
    let good = || discovery(None, false);
    let file = core::config_source::ConfigSourceSpecifier::Path("/a".into());
    let cases = [
        (
            core::ExtensionConfigSource {
                config_source: Some(core::ConfigSource {
                    config_source_specifier: Some(file),
                    ..Default::default()
                }),
                ..good()
            },
            "config_discovery.config_source: only ads: {} is supported",
        ),
        (
            core::ExtensionConfigSource {
                type_urls: Vec::new(),
                ..good()
            },
            "config_discovery.type_urls: is missing",
        ),
        (
            discovery(Some(any(&header_mutation::HeaderMutation::default())), true),
            "config_discovery.default_config.typed_config",
        ),
    ];
    for (source, expected) in cases {
        let refused = listen(&harness, "l", &discovering(source)).await.unwrap();
        assert!(refused.contains(expected), "{refused}");
    }
    let mut manager = discovering(good());
    manager.http_filters[0].name = "envoy.filters.http.router".into();
    let refused = listen(&harness, "l", &manager).await.unwrap();
    assert!(
        refused.contains("cannot be configured by extension discovery"),
        "{refused}"
    );
}

fn of_runtime(key: &str, percent: u32) -> Option<core::RuntimeFractionalPercent> {
    Some(core::RuntimeFractionalPercent {
        default_value: Some(envoy_type::FractionalPercent {
            numerator: percent,
            denominator: 0,
        }),
        runtime_key: key.into(),
    })
}

/// Routes of which the first is for the share of requests that the runtime says under `routes.new`.
fn shared_routes() -> route::RouteConfiguration {
    let mut new = prefix_route("/", to_cluster("none"));
    if let Some(matches) = &mut new.r#match {
        matches.runtime_fraction = of_runtime("routes.new", 0);
    }
    route::RouteConfiguration {
        name: "80".into(),
        virtual_hosts: vec![host("all", "*", vec![new, prefix_route("/", to_cluster("c"))])],
        ..Default::default()
    }
}

fn layer(key: &str, value: f64) -> google::Struct {
    google::Struct {
        fields: [(
            key.to_owned(),
            google::Value {
                kind: Some(google::value::Kind::NumberValue(value)),
            },
        )]
        .into(),
    }
}

#[tokio::test]
async fn extensions_and_runtime_layers_come_over_the_aggregated_stream() {
    let directory = tempfile::tempdir().unwrap();
    let mut control = Scripted::start(directory.path());
    let plan = file::parse(
        "layered_runtime: {layers: [
            {name: fixed, static_layer: {other: {key: 7}}},
            {name: live, rtds_layer: {name: mesh, rtds_config: {ads: {}, resource_api_version: V3}}},
            {name: admin, admin_layer: {}}]}",
        1,
    )
    .unwrap();
    let (proxy, _log) = Proxy::start(Options {
        concurrency: 1,
        ..plan.options
    })
    .unwrap();
    let cancel = CancellationToken::new();
    let following = tokio::spawn(follow(
        proxy.clone(),
        Endpoint::Unix(control.socket.clone()),
        cancel.clone(),
    ));
    let mut link = control.link().await;
    link.subscribed(ResourceType::Runtime, "mesh").await;
    let values = |values| runtime::Runtime {
        name: "mesh".into(),
        layer: Some(values),
    };
    let message = values(google::Struct::default());
    link.put(
        ResourceType::Runtime,
        vec![resource(ResourceType::Runtime, "mesh", "0", &message)],
    )
    .await;
    let backend = Backend::named("b").await;
    let mut cluster = eds_cluster("c");
    cluster.cluster_discovery_type = None;
    cluster.load_assignment = Some(assignment("c", &[(backend.address, "")]));
    link.put(
        ResourceType::Cluster,
        vec![resource(ResourceType::Cluster, "c", "1", &cluster)],
    )
    .await;
    let listener = listener_of(
        "l",
        core::TrafficDirection::Outbound,
        vec![http_chain(&discovering(discovery(None, false)))],
    );
    link.put(
        ResourceType::Listener,
        vec![resource(ResourceType::Listener, "l", "1", &listener)],
    )
    .await;
    link.subscribed(ResourceType::Route, "80").await;
    link.put(
        ResourceType::Route,
        vec![resource(ResourceType::Route, "80", "1", &shared_routes())],
    )
    .await;
    // Not ready before the filter's configuration is there.
    assert!(!proxy.is_ready());
    link.subscribed(ResourceType::Extension, "injected").await;
    let nothing = extension(any(&fault::HttpFault::default()));
    link.put(
        ResourceType::Extension,
        vec![resource(ResourceType::Extension, "injected", "1", &nothing)],
    )
    .await;
    assert!(proxy.is_ready());
    let at = proxy.listener_address("l").unwrap();
    assert_eq!(get(at, "/").await.2, "b");
    let message = values(layer("routes.new", 100.0));
    link.put(
        ResourceType::Runtime,
        vec![resource(ResourceType::Runtime, "mesh", "1", &message)],
    )
    .await;
    assert_eq!(get(at, "/").await.0, 503, "everything goes the new way");
    // A layer that would change what this proxy does not have is refused, and the last good one stays.
    let message = values(layer("upstream.healthy_panic_threshold", 1.0));
    let nonce = link.send(
        ResourceType::Runtime,
        vec![resource(ResourceType::Runtime, "mesh", "2", &message)],
        &[],
    );
    let reason = link.answer(&nonce).await.unwrap();
    assert!(
        reason.contains("layer.upstream.healthy_panic_threshold"),
        "{reason}"
    );
    assert_eq!(get(at, "/").await.0, 503);
    // The admin port, in Envoy's shape.
    let port = AdminPort::bind(&proxy, "127.0.0.1:0".parse().unwrap(), Port::Admin).unwrap();
    let admin = port.address().unwrap();
    tokio::spawn(port.serve(proxy.clone(), CancellationToken::new(), cancel.clone()));
    let shown: serde_json::Value = serde_json::from_str(&get(admin, "/runtime").await.2).unwrap();
    assert_eq!(
        shown,
        serde_json::json!({
            "layers": ["fixed", "live", "admin"],
            "entries": {
                "other.key": { "final_value": "7", "layer_values": ["7", "", ""] },
                "routes.new": { "final_value": "100", "layer_values": ["", "100", ""] },
            },
        })
    );
    let post = async |path: &str| {
        let request = Request::post(path).header("host", "a").body(Full::default());
        let (status, _, body) = send(admin, request.unwrap()).await;
        (status, body)
    };
    assert_eq!(get(admin, "/runtime_modify?routes.new=0").await.0, 405);
    assert_eq!(post("/runtime_modify").await.0, 400);
    assert_eq!(post("/runtime_modify?upstream.x=1").await.0, 400);
    assert_eq!(
        post("/runtime_modify?routes.new=0").await,
        (200, "OK\n".to_owned())
    );
    assert_eq!(get(at, "/").await.2, "b");
    post("/runtime_modify?routes.new=").await;
    assert_eq!(get(at, "/").await.0, 503);
    // With the layer gone the default is the value.
    let nonce = link.send(ResourceType::Runtime, Vec::new(), &["mesh"]);
    assert_eq!(link.answer(&nonce).await, None);
    assert_eq!(get(at, "/").await.2, "b");
    cancel.cancel();
    soon("the end", following).await.unwrap();
}

#[tokio::test]
async fn without_an_admin_layer_the_runtime_is_not_changed() {
    let harness = Harness::start();
    let port = AdminPort::bind(&harness.proxy, "127.0.0.1:0".parse().unwrap(), Port::Admin).unwrap();
    let admin = port.address().unwrap();
    let cancel = CancellationToken::new();
    tokio::spawn(port.serve(harness.proxy.clone(), CancellationToken::new(), cancel.clone()));
    let request = Request::post("/runtime_modify?a=1")
        .header("host", "a")
        .body(Full::default());
    assert_eq!(send(admin, request.unwrap()).await.0, 503);
    assert_eq!(
        get(admin, "/runtime")
            .await
            .2
            .split_whitespace()
            .collect::<String>(),
        r#"{"entries":{},"layers":[]}"#
    );
    cancel.cancel();
}

#[tokio::test]
async fn filters_mirrors_and_cors_follow_their_runtime_keys() {
    let harness = Harness::start();
    let (mut backend, mut mirror) = (Backend::named("b").await, Backend::named("m").await);
    harness.cluster("c", &[backend.address]).await;
    harness.cluster("mirror", &[mirror.address]).await;
    let mut action = to_cluster("c");
    action.request_mirror_policies = vec![route::route_action::RequestMirrorPolicy {
        cluster: "mirror".into(),
        runtime_fraction: of_runtime("mirror", 0),
        ..Default::default()
    }];
    action.cors = Some(route::CorsPolicy {
        allow_origin_string_match: vec![serin_xds::pb::envoy::r#type::matcher::v3::StringMatcher {
            match_pattern: Some(
                serin_xds::pb::envoy::r#type::matcher::v3::string_matcher::MatchPattern::Prefix(
                    "http".into(),
                ),
            ),
            ..Default::default()
        }],
        enabled_specifier: Some(route::cors_policy::EnabledSpecifier::FilterEnabled(
            of_runtime("cors", 100).unwrap(),
        )),
        ..Default::default()
    });
    let at = harness.serve(vec![prefix_route("/", action)]).await;
    let ask = async || {
        let request = Request::get("/")
            .header("host", "a")
            .header("origin", "http://b")
            .body(Full::default());
        let (_, headers, _) = send(at, request.unwrap()).await;
        headers.contains_key("access-control-allow-origin")
    };
    assert!(ask().await);
    backend.next().await;
    assert_eq!(mirror.hits(), 0);
    let mut fields = layer("mirror", 100.0);
    fields.fields.extend(layer("cors", 0.0).fields);
    harness.proxy.store(|store| {
        let mut live =
            serin_proxy::config::runtime::Layer::empty("fixed", serin_proxy::config::runtime::Source::Static);
        live.fill(&fields).unwrap();
        store.runtime().set_layers(vec![live]);
    });
    assert!(!ask().await);
    mirror.next().await;
}

#[tokio::test]
async fn an_extension_is_asked_for_only_as_long_as_a_listener_has_it() {
    let harness = Harness::start();
    let backend = Backend::named("b").await;
    routes(&harness, &backend).await;
    assert_eq!(
        listen(&harness, "l", &discovering(discovery(None, false))).await,
        None
    );
    harness
        .put(ResourceType::Extension, "injected", &extension(aborting(418)))
        .await;
    assert_eq!(listen(&harness, "l", &manager("80")).await, None);
    assert!(harness.proxy.store(|store| store.extension_names()).is_empty());
    assert_eq!(
        get(harness.proxy.listener_address("l").unwrap(), "/").await.0,
        200
    );
    // Asked for again it is waited for again: what was held once may have changed meanwhile.
    assert_eq!(
        listen(&harness, "m", &discovering(discovery(None, false))).await,
        None
    );
    assert_eq!(harness.proxy.listener_address("m"), None);
    let body = prost::Message::encode_to_vec(&extension(aborting(421)));
    let update = Update {
        name: "injected",
        body: &body,
    };
    let refused = harness.proxy.apply(ResourceType::Extension, &[update], &[]).await;
    assert!(refused.is_empty());
    assert_eq!(
        get(harness.proxy.listener_address("m").unwrap(), "/").await.0,
        421
    );
}
