//! A bootstrap file in Envoy's shape, as YAML or JSON: the same file starts Envoy.
//!
//! The document becomes Envoy's `Bootstrap` message through `super::json`, which knows every field of it and of the
//! extensions within; so static listeners, clusters and secrets may hold whatever the same resources may hold when they
//! come from a control plane, and are refused for the same reasons. Of the bootstrap itself the parts that this proxy has
//! no use for are refused by name unless they change nothing.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use prost::Message;
use serde_json::Value;
use serin_xds::client::Endpoint;
use serin_xds::pb::envoy::config::bootstrap::v3 as bootstrap;
use serin_xds::pb::envoy::config::cluster::v3 as cluster;
use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::envoy::config::endpoint::v3::lb_endpoint::HostIdentifier;
use serin_xds::{FEATURE_VHDS, ResourceType};

use super::schema::Schema;
use super::{json, place};
use crate::config::convert::{self, Address};
use crate::config::runtime::{Layer, Source};
use crate::control::Options;
use crate::control::run::{ControlPlane, DEFAULT_DRAIN, Plan, StaticResource};
use crate::error::{Error, Misplaced, Refusal, Within};
use crate::metrics::buckets::Settings;
use crate::metrics::select;
use crate::metrics::tags::Tags;
use crate::overload;
use crate::policy::on_demand::aggregated;

/// Parts of the bootstrap that are honoured.
const HONOURED: [&str; 9] = [
    "node",
    "admin",
    "static_resources",
    "dynamic_resources",
    "cluster_manager",
    "overload_manager",
    "layered_runtime",
    "stats_config",
    "deferred_stat_options",
];
/// Parts that only concern how Envoy itself is watched, counted and named.
const WITHOUT_EFFECT: [&str; 10] = [
    "default_regex_engine",
    "enable_dispatcher_stats",
    "flags_path",
    "memory_allocator_manager",
    "node_context_params",
    "stats_flush_interval",
    "stats_flush_on_admin",
    "use_tcp_for_dns_lookups",
    "watchdog",
    "watchdogs",
];

/// Reads the file at `path`.
///
/// A thread of its own does that, since the trees that a document becomes are many times as large as what is kept of it: of
/// memory that one thread has both in, little could be given back afterwards.
pub fn read(path: &Path, concurrency: usize) -> Result<Plan, Error> {
    let reader = std::thread::Builder::new().name("reader".to_owned());
    let read = std::thread::scope(|scope| {
        let reader = reader.spawn_scoped(scope, || read_here(path, concurrency));
        reader.map(std::thread::ScopedJoinHandle::join)
    });
    match read {
        Ok(Ok(read)) => read,
        Ok(Err(panic)) => std::panic::resume_unwind(panic),
        // Without threads nothing will start, but whoever reads should say that.
        Err(_) => read_here(path, concurrency),
    }
}

fn read_here(path: &Path, concurrency: usize) -> Result<Plan, Error> {
    let text = std::fs::read_to_string(path).map_err(|source| Error::BootstrapRead {
        path: path.to_owned(),
        source,
    })?;
    parse(&text, concurrency).map_err(|error| within(path, &text, error))
}

/// Says on which lines of the file is what an error is about that came up when its contents were used.
pub fn placed(path: &Path, error: Error) -> Error {
    match std::fs::read_to_string(path) {
        Ok(text) => within(path, &text, error),
        Err(_) => error,
    }
}

fn within(path: &Path, text: &str, error: Error) -> Error {
    match error {
        Error::Bootstrap(refusals) => Error::BootstrapFile {
            fields: refusals
                .into_iter()
                .map(|refusal| Misplaced {
                    file: path.to_owned(),
                    line: place::line(text, &refusal.path),
                    refusal,
                })
                .collect(),
        },
        other => other,
    }
}

/// Reads the document.
pub fn parse(text: &str, concurrency: usize) -> Result<Plan, Error> {
    let value = document(text)?;
    refuse_unknown_parts(&value)?;
    let bytes = json::encode(&Schema::load(), "envoy.config.bootstrap.v3.Bootstrap", &value)?;
    let message = bootstrap::Bootstrap::decode(bytes.as_slice())
        .map_err(|error| Refusal::new("", format!("is no bootstrap: {error}")))?;
    let mut plan = plan(message, concurrency)?;
    plan.options.bootstrap = bytes.into();
    Ok(plan)
}

/// YAML, of which JSON is a part, with its anchors and merges resolved.
pub(crate) fn document(text: &str) -> Result<Value, Refusal> {
    let wrong = |error: serde_yaml::Error| Refusal::new("", error.to_string());
    let mut yaml: serde_yaml::Value = serde_yaml::from_str(text).map_err(wrong)?;
    yaml.apply_merge().map_err(wrong)?;
    serde_yaml::from_value(yaml).map_err(wrong)
}

fn refuse_unknown_parts(value: &Value) -> Result<(), Refusal> {
    let Value::Object(parts) = value else {
        return Err(Refusal::new("", "is not an object"));
    };
    let snake = |key: &str| {
        let mut out = String::with_capacity(key.len() + 4);
        for char in key.chars() {
            if char.is_ascii_uppercase() {
                out.push('_');
            }
            out.push(char.to_ascii_lowercase());
        }
        out
    };
    for key in parts.keys() {
        let name = snake(key);
        if !HONOURED.contains(&name.as_str()) && !WITHOUT_EFFECT.contains(&name.as_str()) {
            return Err(Refusal::new(key.as_str(), "is not supported by this proxy"));
        }
    }
    Ok(())
}

fn plan(from: bootstrap::Bootstrap, concurrency: usize) -> Result<Plan, Refusal> {
    let mut node = from.node.unwrap_or_default();
    node.user_agent_name = "serin-proxy".to_owned();
    node.client_features = vec![FEATURE_VHDS.to_owned()];
    // Without an address there is no admin port, as in Envoy.
    let admin = from
        .admin
        .as_ref()
        .and_then(|admin| admin.address.as_ref())
        .map(admin_place)
        .transpose()
        .within("admin.address")?;
    let (admin, admin_socket) = match admin {
        None => (None, None),
        Some(AdminAddress::Tcp(address)) => (Some(address), None),
        Some(AdminAddress::Unix(path, mode)) => (None, Some((path, mode))),
    };
    let resources = from.static_resources.unwrap_or_default();
    let mut overload = from
        .overload_manager
        .as_ref()
        .map(overload::Rules::compile)
        .transpose()
        .within("overload_manager")?
        .unwrap_or_default();
    let runtime = match &from.layered_runtime {
        None => Vec::new(),
        Some(runtime) => layered_runtime(runtime, &mut overload).within("layered_runtime")?,
    };
    let control_plane = match &from.dynamic_resources {
        None => None,
        Some(dynamic_resources) => {
            dynamic(dynamic_resources, &resources.clusters).within("dynamic_resources")?
        }
    };
    let local_cluster = match &from.cluster_manager {
        None => None,
        Some(manager) => cluster_manager(manager).within("cluster_manager")?,
    };
    let stats = select::Rules {
        tags: match &from.stats_config {
            None => Tags::default(),
            Some(config) => Tags::compile(config).within("stats_config")?,
        },
        buckets: match &from.stats_config {
            None => Settings::default(),
            Some(config) => Settings::compile(&config.histogram_bucket_settings).within("stats_config")?,
        },
        matcher: select::Matcher::compile(
            from.stats_config
                .as_ref()
                .and_then(|config| config.stats_matcher.as_ref()),
        )
        .within("stats_config.stats_matcher")?,
        deferred: match &from.deferred_stat_options {
            Some(options) if options.enable_deferred_creation_stats => select::Deferred::Yes,
            _ => select::Deferred::No,
        },
    };
    Ok(Plan {
        options: Options {
            node,
            concurrency,
            local_cluster,
            overload,
            runtime,
            stats,
            ..Default::default()
        },
        push_metrics: false,
        control_plane,
        static_resources: static_resources(&resources)?,
        admin,
        admin_socket,
        prometheus: None,
        ready: None,
        drain: DEFAULT_DRAIN,
        restart: None,
        application: None,
    })
}

/// Permissions of the admin socket unless the file says otherwise: whoever may use it may end the process.
pub const ADMIN_SOCKET_MODE: u32 = 0o600;

/// Where the admin port is. Who asked for it is not logged.
enum AdminAddress {
    Tcp(SocketAddr),
    Unix(PathBuf, u32),
}

fn admin_place(from: &core::Address) -> Result<AdminAddress, Refusal> {
    if let Some(core::address::Address::Pipe(pipe)) = &from.address {
        if pipe.path.is_empty() || pipe.path.starts_with('@') {
            // A name without a file has no permissions either: everybody within the network namespace could use it.
            return Err(Refusal::new("pipe.path", "must be the path of a file"));
        }
        if pipe.mode > 0o777 {
            return Err(Refusal::new(
                "pipe.mode",
                format!("{} is more than 511 (0o777)", pipe.mode),
            ));
        }
        let mode = if pipe.mode == 0 {
            ADMIN_SOCKET_MODE
        } else {
            pipe.mode
        };
        return Ok(AdminAddress::Unix(pipe.path.as_str().into(), mode));
    }
    match convert::address(Some(from))? {
        Address::Tcp(address) => Ok(AdminAddress::Tcp(address)),
        other => Err(Refusal::new("", format!("cannot listen on {other}"))),
    }
}

/// The name of the cluster that the proxy is a member of.
fn cluster_manager(from: &bootstrap::ClusterManager) -> Result<Option<String>, Refusal> {
    let unsupported = [
        ("outlier_detection", from.outlier_detection.is_some()),
        ("upstream_bind_config", from.upstream_bind_config.is_some()),
        ("load_stats_config", from.load_stats_config.is_some()),
    ];
    match unsupported.iter().find(|(_, present)| *present) {
        Some((field, _)) => Err(Refusal::new(*field, "not supported")),
        None => Ok(Some(from.local_cluster_name.clone()).filter(|name| !name.is_empty())),
    }
}

/// The layers of the runtime. One key of static layers is a limit of the proxy itself.
fn layered_runtime(
    from: &bootstrap::LayeredRuntime,
    overload: &mut overload::Rules,
) -> Result<Vec<Layer>, Refusal> {
    use bootstrap::runtime_layer::LayerSpecifier;
    use serin_xds::pb::google::protobuf::value::Kind;
    const CONNECTIONS: &str = "overload.global_downstream_max_connections";
    let mut out: Vec<Layer> = Vec::with_capacity(from.layers.len());
    for (index, layer) in from.layers.iter().enumerate() {
        let path = format!("layers[{index}]");
        if out.iter().any(|other| *other.name == *layer.name) {
            return Err(Refusal::new(
                format!("{path}.name"),
                format!("{:?} is there twice", layer.name),
            ));
        }
        out.push(match &layer.layer_specifier {
            Some(LayerSpecifier::StaticLayer(values)) => {
                let mut values = values.clone();
                match values.fields.remove(CONNECTIONS).and_then(|value| value.kind) {
                    None => {}
                    Some(Kind::NumberValue(limit)) if limit >= 1.0 => {
                        overload.limit_connections(limit as u64)
                    }
                    Some(_) => {
                        return Err(Refusal::new(
                            format!("{path}.static_layer.{CONNECTIONS}"),
                            "is not a number of connections",
                        ));
                    }
                }
                let mut out = Layer::empty(&layer.name, Source::Static);
                out.fill(&values).within(format!("{path}.static_layer"))?;
                out
            }
            Some(LayerSpecifier::AdminLayer(_)) if out.iter().any(|other| other.source == Source::Admin) => {
                return Err(Refusal::new(path, "there is an admin layer already"));
            }
            Some(LayerSpecifier::AdminLayer(_)) => Layer::empty(&layer.name, Source::Admin),
            Some(LayerSpecifier::RtdsLayer(rtds)) => {
                aggregated(rtds.rtds_config.as_ref()).within(format!("{path}.rtds_layer.rtds_config"))?;
                let mut out = Layer::empty(&layer.name, Source::Rtds);
                let source = rtds.rtds_config.as_ref();
                if let Some(limit) = source.and_then(|source| source.initial_fetch_timeout.as_ref()) {
                    out.patience = convert::timeout(Some(limit))
                        .within(format!("{path}.rtds_layer.rtds_config.initial_fetch_timeout"))?;
                }
                if !rtds.name.is_empty() {
                    out.resource = rtds.name.as_str().into();
                }
                out
            }
            Some(LayerSpecifier::DiskLayer(_)) => {
                return Err(Refusal::new(
                    format!("{path}.disk_layer"),
                    "not supported: use a static layer, RTDS or the admin port",
                ));
            }
            None => return Err(Refusal::new(path, "says not where its values come from")),
        });
    }
    Ok(out)
}

fn static_resources(from: &bootstrap::bootstrap::StaticResources) -> Result<Vec<StaticResource>, Refusal> {
    let resource = |resource_type, field: &str, index: usize, name: &str, body| StaticResource {
        resource_type,
        name: name.to_owned(),
        body,
        at: format!("static_resources.{field}[{index}]"),
    };
    // In the order in which they are needed: secrets by clusters and listeners, clusters by listeners.
    let mut out: Vec<_> = from
        .secrets
        .iter()
        .enumerate()
        .map(|(index, secret)| {
            let body = secret.encode_to_vec();
            resource(ResourceType::Secret, "secrets", index, &secret.name, body)
        })
        .collect();
    out.extend(from.clusters.iter().enumerate().map(|(index, cluster)| {
        let body = cluster.encode_to_vec();
        resource(ResourceType::Cluster, "clusters", index, &cluster.name, body)
    }));
    for (index, listener) in from.listeners.iter().enumerate() {
        // Envoy makes a name up as well.
        let name = if listener.name.is_empty() {
            convert::address(listener.address.as_ref())
                .within(format!("static_resources.listeners[{index}]"))?
                .to_string()
        } else {
            listener.name.clone()
        };
        let body = listener.encode_to_vec();
        out.push(resource(ResourceType::Listener, "listeners", index, &name, body));
    }
    let names = |wanted| {
        let mut names: Vec<&str> = out
            .iter()
            .filter(|resource| resource.resource_type == wanted)
            .map(|resource| resource.name.as_str())
            .collect();
        names.sort_unstable();
        names
            .windows(2)
            .find(|pair| pair[0] == pair[1])
            .map(|pair| pair[0].to_owned())
    };
    for (kind, field) in [
        (ResourceType::Secret, "secrets"),
        (ResourceType::Cluster, "clusters"),
        (ResourceType::Listener, "listeners"),
    ] {
        if let Some(name) = names(kind) {
            return Err(Refusal::new(
                format!("static_resources.{field}"),
                format!("{name:?} is there twice"),
            ));
        }
    }
    Ok(out)
}

/// The control plane: the static cluster that `ads_config` names. The address itself where the cluster says nothing else.
fn dynamic(
    from: &bootstrap::bootstrap::DynamicResources,
    clusters: &[cluster::Cluster],
) -> Result<Option<ControlPlane>, Refusal> {
    use core::config_source::ConfigSourceSpecifier;
    for (field, source) in [
        ("lds_config", from.lds_config.as_ref()),
        ("cds_config", from.cds_config.as_ref()),
    ] {
        if let Some(source) = source
            && !matches!(
                source.config_source_specifier,
                Some(ConfigSourceSpecifier::Ads(_))
            )
        {
            return Err(Refusal::new(field, "only ads: {} is supported"));
        }
    }
    if !from.lds_resources_locator.is_empty() || !from.cds_resources_locator.is_empty() {
        return Err(Refusal::new("lds_resources_locator", "not supported"));
    }
    let Some(ads) = &from.ads_config else {
        return Ok(None);
    };
    let name = ads.grpc_services.iter().find_map(|service| {
        use core::grpc_service::TargetSpecifier;
        match &service.target_specifier {
            Some(TargetSpecifier::EnvoyGrpc(envoy)) => Some(&envoy.cluster_name),
            _ => None,
        }
    });
    let name = name.ok_or_else(|| {
        Refusal::new(
            "ads_config.grpc_services",
            "envoy_grpc with the name of a static cluster is missing",
        )
    })?;
    let cluster = clusters.iter().find(|cluster| cluster.name == *name);
    let address = cluster
        .and_then(|cluster| cluster.load_assignment.as_ref())
        .and_then(|assignment| assignment.endpoints.first()?.lb_endpoints.first())
        .and_then(|endpoint| match &endpoint.host_identifier {
            Some(HostIdentifier::Endpoint(inner)) => inner.address.as_ref(),
            _ => None,
        });
    let address = convert::address(address).map_err(|_| {
        Refusal::new(
            "ads_config",
            format!("no static cluster {name:?} with an endpoint"),
        )
    })?;
    let more = cluster.is_some_and(|cluster| {
        let endpoints = cluster.load_assignment.iter().flat_map(|all| &all.endpoints);
        cluster.transport_socket.is_some()
            || endpoints.map(|group| group.lb_endpoints.len()).sum::<usize>() > 1
    });
    Ok(Some(match address {
        _ if more => ControlPlane::Cluster(name.clone()),
        Address::Pipe(path) => ControlPlane::At(Endpoint::Unix(path.to_string().into())),
        other => ControlPlane::At(Endpoint::Tcp(other.to_string())),
    }))
}

/// The address of a plan's admin port, for tools.
pub fn admin_address(plan: &Plan) -> Option<SocketAddr> {
    plan.admin
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXAMPLE: &str = include_str!("../../example/bootstrap.yaml");
    const EXAMPLE_WITH_CONTROL_PLANE: &str = include_str!("../../example/xds.yaml");

    #[test]
    fn the_example_starts_a_proxy_with_its_listener_and_clusters() {
        let plan = parse(EXAMPLE, 1).unwrap();
        let names: Vec<_> = plan
            .static_resources
            .iter()
            .map(|resource| resource.name.as_str())
            .collect();
        assert_eq!(names, ["v1", "v2", "http"]);
        assert_eq!(plan.options.node.id, "edge-1");
        assert_eq!(admin_address(&plan), Some("127.0.0.1:15000".parse().unwrap()));
        assert_eq!(plan.control_plane, None, "it runs alone");
        let with = parse(EXAMPLE_WITH_CONTROL_PLANE, 1).unwrap();
        assert_eq!(
            with.control_plane,
            Some(ControlPlane::At(Endpoint::Tcp("127.0.0.1:15010".into())))
        );
        let address = "{ socket_address: { address: 127.0.0.1, port_value: 15010 } }";
        assert!(EXAMPLE_WITH_CONTROL_PLANE.contains(address));
        let pipe = EXAMPLE_WITH_CONTROL_PLANE.replace(address, "{ pipe: { path: /run/serin/xds.sock } }");
        assert_eq!(
            parse(&pipe, 1).unwrap().control_plane,
            Some(ControlPlane::At(Endpoint::Unix("/run/serin/xds.sock".into())))
        );
        let mut store = crate::config::store::Store::new(1);
        for resource in &plan.static_resources {
            let update = crate::config::store::Update {
                name: &resource.name,
                body: &resource.body,
            };
            assert!(
                store.apply(resource.resource_type, &[update], &[]).is_empty(),
                "{}",
                resource.name
            );
        }
    }

    #[test]
    fn unknown_fields_and_wrong_values_are_refused_with_their_path() {
        let cases = [
            (
                "static_resources: {clusters: [{name: a, foo: 1}]}",
                "static_resources.clusters[0].foo",
            ),
            (
                "static_resources: {clusters: [{name: a, connect_timeout: 5}]}",
                "static_resources.clusters[0].connect_timeout",
            ),
            (
                "static_resources: {clusters: [{name: a, lb_policy: BEST}]}",
                "static_resources.clusters[0].lb_policy",
            ),
            (
                "static_resources: {clusters: [{name: a}, {name: a}]}",
                "static_resources.clusters",
            ),
            (
                "static_resources: {listeners: [{filter_chains: [{filters: [{typed_config: {'@type': x/y.Z}}]}]}]}",
                "static_resources.listeners[0].filter_chains[0].filters[0].typed_config.@type",
            ),
            ("stats_sinks: []", "stats_sinks"),
            (
                "stats_config: {histogram_bucket_settings: [{match: {prefix: istiocustom}, buckets: [1]}, {match: {prefix: cluster}, buckets: [1, 1]}]}",
                "stats_config.histogram_bucket_settings[1].buckets",
            ),
            (
                "stats_config: {stats_tags: [{tag_name: a, regex: '('}]}",
                "stats_config.stats_tags[0].regex",
            ),
            (
                "stats_config: {stats_matcher: {inclusion_list: {patterns: [{safe_regex: {regex: '('}}]}}}",
                "stats_config.stats_matcher.inclusion_list.patterns[0].safe_regex.regex",
            ),
            ("hdsConfig: {}", "hdsConfig"),
            (
                "dynamic_resources: {lds_config: {path_config_source: {path: /a}}}",
                "dynamic_resources.lds_config",
            ),
            (
                "layered_runtime: {layers: [{name: a, static_layer: {health_check: {x: 1}}}]}",
                "layered_runtime.layers[0].static_layer.health_check.x",
            ),
            (
                "layered_runtime: {layers: [{name: a, disk_layer: {symlink_root: /a}}]}",
                "layered_runtime.layers[0].disk_layer",
            ),
            (
                "layered_runtime: {layers: [{name: a, rtds_layer: {rtds_config: {path_config_source: {path: /a}}}}]}",
                "layered_runtime.layers[0].rtds_layer.rtds_config",
            ),
        ];
        for (text, path) in cases {
            match parse(text, 1) {
                Err(Error::Bootstrap(refusals)) => assert_eq!(refusals[0].path, path, "{text}"),
                other => panic!("{text}: {:?}", other.map(|plan| plan.static_resources.len())),
            }
        }
    }

    #[test]
    fn anchors_merges_and_both_spellings_of_names_are_understood() {
        let plan = parse(
            "static_resources:\n  clusters:\n  - &one {name: a, connectTimeout: 1.5s, type: STATIC}\n  - {<<: *one, name: b}\n",
            1,
        )
        .unwrap();
        for (resource, name) in plan.static_resources.iter().zip(["a", "b"]) {
            let cluster = cluster::Cluster::decode(resource.body.as_slice()).unwrap();
            assert_eq!(cluster.name, name);
            let timeout = cluster.connect_timeout.unwrap();
            assert_eq!((timeout.seconds, timeout.nanos), (1, 500_000_000));
        }
    }

    #[test]
    fn the_overload_manager_and_the_local_cluster_are_part_of_the_plan() {
        let plan = parse(
            r#"
cluster_manager: {local_cluster_name: mine}
layered_runtime: {layers: [{name: s, static_layer: {overload.global_downstream_max_connections: 100}}]}
overload_manager:
  refresh_interval: 0.25s
  resource_monitors:
  - name: heap
    typed_config:
      "@type": type.googleapis.com/envoy.extensions.resource_monitors.fixed_heap.v3.FixedHeapConfig
      max_heap_size_bytes: "1073741824"
  actions:
  - name: envoy.overload_actions.shrink_heap
    triggers: [{name: heap, threshold: {value: 0.95}}]
"#,
            1,
        )
        .unwrap();
        assert_eq!(plan.options.local_cluster.as_deref(), Some("mine"));
        assert_ne!(plan.options.overload, overload::Rules::default());
    }
}
