//! The containers that injection adds or fills in.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{
    Capabilities, Container, ContainerPort, EnvVar, EnvVarSource, HTTPGetAction, ObjectFieldSelector, Pod,
    PodSpec, Probe, ResourceRequirements, SecurityContext,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use serde_json::json;

use super::annotations::{Annotations, Resources};
use super::{INIT_CONTAINER, InjectConfig, PROXY_CONTAINER};

/// User and group of the proxy: what they send is not intercepted again. Istio's number.
const PROXY_UID: i64 = 1337;
/// Where outbound connections are redirected to.
const OUTBOUND_PORT: u16 = 15001;
/// Where inbound connections are redirected to.
const INBOUND_PORT: u16 = 15006;
/// Readiness of the proxy.
const STATUS_PORT: i32 = 15021;
/// Metrics of the proxy.
const METRICS_PORT: i32 = 15090;
/// Ports of the proxy itself, never intercepted.
const OWN_PORTS: &str = "15090,15021,15020";

/// What the proxy is told about its pod.
#[derive(Debug)]
pub(super) struct Identity {
    labels: String,
    app_containers: String,
    ports: String,
    owner: String,
    workload: String,
    dns_domain: String,
}

impl Identity {
    pub(super) fn of(pod: &Pod, namespace: &str, spec: &PodSpec, domain: &str) -> Self {
        let (kind, workload) = workload(&pod.metadata);
        let (group, plural) = match kind.as_str() {
            "Deployment" => ("apps/v1", "deployments"),
            "ReplicaSet" => ("apps/v1", "replicasets"),
            "StatefulSet" => ("apps/v1", "statefulsets"),
            "DaemonSet" => ("apps/v1", "daemonsets"),
            "Job" => ("batch/v1", "jobs"),
            _ => ("v1", "pods"),
        };
        let apps = spec
            .containers
            .iter()
            .filter(|container| container.name != PROXY_CONTAINER);
        let ports: Vec<_> = apps
            .clone()
            .flat_map(|container| container.ports.iter().flatten())
            .collect();
        Self {
            labels: json!(pod.metadata.labels.clone().unwrap_or_default()).to_string(),
            app_containers: apps
                .map(|container| container.name.as_str())
                .collect::<Vec<_>>()
                .join(","),
            ports: json!(ports).to_string(),
            owner: format!("kubernetes://apis/{group}/namespaces/{namespace}/{plural}/{workload}"),
            workload,
            dns_domain: format!("{namespace}.svc.{domain}"),
        }
    }
}

/// Kind and name of what runs the pod. A ReplicaSet of a Deployment is named after it and the template's hash.
pub(super) fn workload(metadata: &ObjectMeta) -> (String, String) {
    let own = || {
        let generated = metadata
            .generate_name
            .as_deref()
            .map(|name| name.trim_end_matches('-'));
        metadata
            .name
            .as_deref()
            .or(generated)
            .unwrap_or_default()
            .to_owned()
    };
    let owners = metadata.owner_references.iter().flatten();
    let Some(owner) = owners.into_iter().find(|owner| owner.controller == Some(true)) else {
        return ("Pod".to_owned(), own());
    };
    let hash = metadata
        .labels
        .as_ref()
        .and_then(|labels| labels.get("pod-template-hash"));
    let deployment = hash
        .filter(|_| owner.kind == "ReplicaSet")
        .and_then(|hash| owner.name.strip_suffix(hash.as_str()))
        .and_then(|name| name.strip_suffix('-'));
    match deployment {
        Some(name) => ("Deployment".to_owned(), name.to_owned()),
        None => (owner.kind.clone(), owner.name.clone()),
    }
}

/// The init container that programs the interception.
pub(super) fn init(config: &InjectConfig, annotations: &Annotations) -> Container {
    let excluded_inbound = match annotations.exclude_inbound_ports.as_str() {
        "" => OWN_PORTS.to_owned(),
        ports => format!("{OWN_PORTS},{ports}"),
    };
    let mut args: Vec<String> = vec!["intercept".into()];
    for (name, value) in [
        ("outbound-port", OUTBOUND_PORT.to_string().as_str()),
        ("inbound-port", INBOUND_PORT.to_string().as_str()),
        ("include-inbound-ports", &annotations.include_inbound_ports),
        ("exclude-inbound-ports", &excluded_inbound),
        ("exclude-outbound-ports", &annotations.exclude_outbound_ports),
        ("include-outbound-ranges", &annotations.include_outbound_ranges),
        ("exclude-outbound-ranges", &annotations.exclude_outbound_ranges),
    ] {
        // Everything is what happens without the option.
        if !matches!(value, "" | "*") {
            args.push(format!("--{name}={value}"));
        }
    }
    Container {
        name: INIT_CONTAINER.into(),
        image: Some(image(config, annotations)),
        args: Some(args),
        resources: Some(resources(&annotations.resources)),
        security_context: Some(SecurityContext {
            allow_privilege_escalation: Some(false),
            capabilities: Some(Capabilities {
                add: Some(vec!["NET_ADMIN".into(), "NET_RAW".into()]),
                drop: Some(vec!["ALL".into()]),
            }),
            privileged: Some(false),
            read_only_root_filesystem: Some(false),
            run_as_group: Some(0),
            run_as_non_root: Some(false),
            run_as_user: Some(0),
            ..SecurityContext::default()
        }),
        ..Container::default()
    }
}

/// The native sidecar.
pub(super) fn sidecar(config: &InjectConfig, annotations: &Annotations, identity: &Identity) -> Container {
    Container {
        name: PROXY_CONTAINER.into(),
        image: Some(image(config, annotations)),
        args: Some(args("sidecar")),
        env: Some(env(config, annotations, identity)),
        ports: Some(vec![metrics_port()]),
        readiness_probe: Some(probe(15, 4, Some(3))),
        // A second between attempts, ten minutes in all: the application starts once the proxy can serve it.
        startup_probe: Some(probe(1, 600, Some(3))),
        resources: Some(resources(&annotations.resources)),
        restart_policy: Some("Always".into()),
        security_context: Some(security_context()),
        ..Container::default()
    }
}

/// Fills in the container of a gateway; what the user set stays.
pub(super) fn gateway(
    container: &mut Container,
    config: &InjectConfig,
    annotations: &Annotations,
    identity: &Identity,
) {
    if container
        .image
        .as_deref()
        .is_none_or(|image| matches!(image, "" | "auto"))
    {
        container.image = Some(image(config, annotations));
    }
    container.args.get_or_insert_with(|| args("router"));
    let own: Vec<EnvVar> = container.env.take().unwrap_or_default();
    let mut env = env(config, annotations, identity);
    env.retain(|variable| !own.iter().any(|other| other.name == variable.name));
    env.extend(own);
    container.env = Some(env);
    let ports = container.ports.get_or_insert_default();
    if !ports.iter().any(|port| port.container_port == METRICS_PORT) {
        ports.push(metrics_port());
    }
    container
        .readiness_probe
        .get_or_insert_with(|| probe(15, 4, Some(3)));
    container
        .startup_probe
        .get_or_insert_with(|| probe(1, 30, Some(3)));
    container
        .resources
        .get_or_insert_with(|| resources(&annotations.resources));
    container.security_context.get_or_insert_with(security_context);
}

fn image(config: &InjectConfig, annotations: &Annotations) -> String {
    annotations.image.clone().unwrap_or_else(|| config.image.clone())
}

fn args(kind: &str) -> Vec<String> {
    vec!["proxy".to_owned(), kind.to_owned()]
}

fn env(config: &InjectConfig, annotations: &Annotations, identity: &Identity) -> Vec<EnvVar> {
    let field = |name: &str, path: &str| EnvVar {
        name: name.into(),
        value_from: Some(EnvVarSource {
            field_ref: Some(ObjectFieldSelector {
                field_path: path.into(),
                ..ObjectFieldSelector::default()
            }),
            ..EnvVarSource::default()
        }),
        ..EnvVar::default()
    };
    let value = |name: &str, value: &str| EnvVar {
        name: name.into(),
        value: Some(value.into()),
        ..EnvVar::default()
    };
    let mut env = vec![
        field("POD_NAME", "metadata.name"),
        field("POD_NAMESPACE", "metadata.namespace"),
        field("INSTANCE_IP", "status.podIP"),
        field("SERVICE_ACCOUNT", "spec.serviceAccountName"),
        field("HOST_IP", "status.hostIP"),
        field("ISTIO_META_NODE_NAME", "spec.nodeName"),
        value("SERIN_DISCOVERY_ADDRESS", &config.discovery_address),
        value("TRUST_DOMAIN", &config.trust_domain),
        value("ISTIO_META_CLUSTER_ID", &config.cluster_id),
        value("ISTIO_META_MESH_ID", &config.trust_domain),
        value(
            "ISTIO_META_INTERCEPTION_MODE",
            if annotations.intercepts {
                "REDIRECT"
            } else {
                "NONE"
            },
        ),
        value("ISTIO_META_APP_CONTAINERS", &identity.app_containers),
        value("ISTIO_META_POD_PORTS", &identity.ports),
        value("ISTIO_META_WORKLOAD_NAME", &identity.workload),
        value("ISTIO_META_OWNER", &identity.owner),
        value("ISTIO_METAJSON_LABELS", &identity.labels),
        value("DNS_DOMAIN", &identity.dns_domain),
    ];
    env.extend(
        annotations
            .log_level
            .as_deref()
            .map(|level| value("RUST_LOG", level)),
    );
    env
}

fn metrics_port() -> ContainerPort {
    ContainerPort {
        container_port: METRICS_PORT,
        name: Some("http-envoy-prom".into()),
        protocol: Some("TCP".into()),
        ..ContainerPort::default()
    }
}

fn probe(period_seconds: i32, failure_threshold: i32, timeout_seconds: Option<i32>) -> Probe {
    Probe {
        http_get: Some(HTTPGetAction {
            path: Some("/healthz/ready".into()),
            port: IntOrString::Int(STATUS_PORT),
            ..HTTPGetAction::default()
        }),
        period_seconds: Some(period_seconds),
        failure_threshold: Some(failure_threshold),
        timeout_seconds,
        ..Probe::default()
    }
}

fn security_context() -> SecurityContext {
    SecurityContext {
        allow_privilege_escalation: Some(false),
        capabilities: Some(Capabilities {
            add: None,
            drop: Some(vec!["ALL".into()]),
        }),
        privileged: Some(false),
        read_only_root_filesystem: Some(true),
        run_as_group: Some(PROXY_UID),
        run_as_non_root: Some(true),
        run_as_user: Some(PROXY_UID),
        ..SecurityContext::default()
    }
}

/// As in Istio: one annotation of a group replaces the defaults of both groups.
fn resources(wanted: &Resources) -> ResourceRequirements {
    let map = |entries: [(&str, Option<&str>); 2]| -> Option<BTreeMap<String, Quantity>> {
        let map: BTreeMap<_, _> = entries
            .into_iter()
            .filter_map(|(name, value)| Some((name.to_owned(), Quantity(value?.to_owned()))))
            .collect();
        (!map.is_empty()).then_some(map)
    };
    if *wanted == Resources::default() {
        return ResourceRequirements {
            requests: map([("cpu", Some("100m")), ("memory", Some("128Mi"))]),
            limits: map([("cpu", Some("2000m")), ("memory", Some("1024Mi"))]),
            ..ResourceRequirements::default()
        };
    }
    ResourceRequirements {
        requests: map([
            ("cpu", wanted.cpu.as_deref()),
            ("memory", wanted.memory.as_deref()),
        ]),
        limits: map([
            ("cpu", wanted.cpu_limit.as_deref()),
            ("memory", wanted.memory_limit.as_deref()),
        ]),
        ..ResourceRequirements::default()
    }
}
