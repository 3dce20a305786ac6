//! Sidecar injection: a pod as the user wrote it in, the pod with its proxy out. Pure.
//!
//! The switches are Istio's: the namespace label `istio-injection` (or `istio.io/rev`), the pod label
//! `sidecar.istio.io/inject`, and the annotation of the same name; the label beats the annotation beats the namespace.
//! What is added has Istio's names: the init container `istio-init`, which programs the interception, and the native
//! sidecar `istio-proxy`, an init container that keeps running, so that the application starts once its proxy is ready
//! and ends before it. Gateways (`inject.istio.io/templates: gateway`) have their container filled in instead.
//!
//! An annotation that asks for something that is not there refuses the pod with the reason ([`InjectError`]); one that
//! merely tunes what is not there is listed in the annotation `serin.dev/unhonoured` of the pod.
//!
//! Limits: always a native sidecar; no probe rewriting (probes reach the application through the proxy, which needs no
//! rewriting until mTLS is strict); no volumes (certificates come with the security issue).

mod annotations;
mod containers;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Container, HostPathVolumeSource, Pod, PodSpec, Volume, VolumeMount};

pub use annotations::InjectError;
use annotations::{Annotations, Template};

/// Name of the proxy's container, as in Istio.
pub const PROXY_CONTAINER: &str = "istio-proxy";
/// Name of the init container that programs the interception, as in Istio.
pub const INIT_CONTAINER: &str = "istio-init";
/// What was injected, as in Istio; its presence makes injection idempotent.
pub const STATUS_ANNOTATION: &str = "sidecar.istio.io/status";
/// Annotations that were read and not honoured.
pub const UNHONOURED_ANNOTATION: &str = "serin.dev/unhonoured";

/// Where [`InjectConfig::discovery_directory`] appears in the proxy's container.
pub const DISCOVERY_MOUNT: &str = "/var/run/serin";
const DISCOVERY_VOLUME: &str = "serin-discovery";

/// Namespaces that are never injected, as in Istio.
const EXCLUDED_NAMESPACES: [&str; 4] = [
    "kube-system",
    "kube-public",
    "kube-node-lease",
    "local-path-storage",
];

/// What injected containers look like.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InjectConfig {
    /// Image of proxy and init container; its program is `serin-proxy`.
    pub image: String,
    /// Where the proxy finds the control plane, for example `unix:/var/run/serin/xds.sock`.
    pub discovery_address: String,
    /// Directory of the host that is mounted at [`DISCOVERY_MOUNT`] in the proxy's container, for a control plane that
    /// is reached over a Unix socket. A directory, not the socket: a control plane that starts again makes a new one.
    pub discovery_directory: Option<String>,
    /// Name of the cluster in telemetry.
    pub cluster_id: String,
    /// DNS domain of services.
    pub domain: String,
    /// SPIFFE trust domain.
    pub trust_domain: String,
    /// The revision that this control plane answers to in `istio.io/rev`.
    pub revision: String,
}

impl InjectConfig {
    /// The defaults, with a control plane at `discovery_address`.
    pub fn new(discovery_address: impl Into<String>) -> Self {
        Self {
            image: "serin.dev/proxy".into(),
            discovery_address: discovery_address.into(),
            discovery_directory: None,
            cluster_id: "Kubernetes".into(),
            domain: "cluster.local".into(),
            trust_domain: "cluster.local".into(),
            revision: "default".into(),
        }
    }
}

/// The pod with its proxy, or `None` if it is to stay as it is.
///
/// `namespace` is where it is created, in case its own metadata does not say.
pub fn admit(
    config: &InjectConfig,
    namespace: &str,
    namespace_labels: &BTreeMap<String, String>,
    pod: &Pod,
) -> Result<Option<Pod>, InjectError> {
    if !is_wanted(config, namespace, namespace_labels, pod) {
        return Ok(None);
    }
    let annotations = Annotations::read(pod.metadata.annotations.as_ref())?;
    let mut pod = pod.clone();
    let namespace = pod
        .metadata
        .namespace
        .clone()
        .unwrap_or_else(|| namespace.to_owned());
    let mut spec = pod.spec.take().unwrap_or_default();
    let names: Vec<String> = spec
        .containers
        .iter()
        .map(|container| container.name.clone())
        .collect();
    label(&mut pod);
    let identity = containers::Identity::of(&pod, &namespace, &spec, &config.domain);
    let injected = match annotations.template {
        Template::Gateway => gateway(&mut spec, config, &annotations, &identity)?,
        Template::Sidecar => sidecar(&mut spec, config, &annotations, &identity),
    };
    if let Some(directory) = &config.discovery_directory {
        mount_discovery(&mut spec, directory);
    }
    pod.spec = Some(spec);
    annotate(&mut pod, config, &annotations, &names, &injected);
    Ok(Some(pod))
}

/// Mounts the directory of the control plane's socket into the proxy's container.
fn mount_discovery(spec: &mut PodSpec, directory: &str) {
    spec.volumes.get_or_insert_default().push(Volume {
        name: DISCOVERY_VOLUME.into(),
        host_path: Some(HostPathVolumeSource {
            path: directory.to_owned(),
            type_: Some("Directory".into()),
        }),
        ..Volume::default()
    });
    let containers = spec
        .init_containers
        .iter_mut()
        .flatten()
        .chain(&mut spec.containers);
    for proxy in containers.filter(|container| container.name == PROXY_CONTAINER) {
        proxy.volume_mounts.get_or_insert_default().push(VolumeMount {
            name: DISCOVERY_VOLUME.into(),
            mount_path: DISCOVERY_MOUNT.into(),
            read_only: Some(true),
            ..VolumeMount::default()
        });
    }
}

fn is_wanted(
    config: &InjectConfig,
    namespace: &str,
    namespace_labels: &BTreeMap<String, String>,
    pod: &Pod,
) -> bool {
    let on_host = pod
        .spec
        .as_ref()
        .is_some_and(|spec| spec.host_network == Some(true));
    let done = annotation(pod, STATUS_ANNOTATION).is_some();
    if on_host || done || EXCLUDED_NAMESPACES.contains(&namespace) {
        return false;
    }
    let by_namespace = match namespace_labels.get("istio-injection").map(String::as_str) {
        Some("enabled") => true,
        // Whatever the pod says: Istio's webhook is not even asked for such namespaces.
        Some("disabled") => return false,
        Some(_) | None => namespace_labels
            .get("istio.io/rev")
            .is_some_and(|revision| *revision == config.revision),
    };
    let labels = pod.metadata.labels.as_ref();
    let label = labels
        .and_then(|labels| labels.get("sidecar.istio.io/inject"))
        .map(String::as_str);
    let by_revision = labels.and_then(|labels| labels.get("istio.io/rev")) == Some(&config.revision);
    match label.or_else(|| annotation(pod, "sidecar.istio.io/inject")) {
        Some(word) if matches!(word.to_ascii_lowercase().as_str(), "y" | "yes" | "true" | "on") => {
            // An annotation alone does not reach Istio's webhook in a namespace that is not enabled.
            label.is_some() || by_namespace || by_revision
        }
        Some("") | None => by_namespace || by_revision,
        Some(_) => false,
    }
}

fn annotation<'a>(pod: &'a Pod, name: &str) -> Option<&'a str> {
    pod.metadata.annotations.as_ref()?.get(name).map(String::as_str)
}

/// The names of what was added, for the status annotation.
#[derive(Debug, Default)]
struct Injected {
    init_containers: Vec<&'static str>,
    containers: Vec<&'static str>,
}

fn sidecar(
    spec: &mut PodSpec,
    config: &InjectConfig,
    annotations: &Annotations,
    identity: &containers::Identity,
) -> Injected {
    let mut first = Vec::new();
    let mut injected = Injected::default();
    if annotations.intercepts {
        first.push(containers::init(config, annotations));
        injected.init_containers.push(INIT_CONTAINER);
    }
    first.push(containers::sidecar(config, annotations, identity));
    injected.init_containers.push(PROXY_CONTAINER);
    // Interception, proxy, then the user's own: their traffic goes through the proxy too.
    first.extend(spec.init_containers.take().unwrap_or_default());
    spec.init_containers = Some(first);
    injected
}

fn gateway(
    spec: &mut PodSpec,
    config: &InjectConfig,
    annotations: &Annotations,
    identity: &containers::Identity,
) -> Result<Injected, InjectError> {
    let is_gateway = |container: &&mut Container| container.name == PROXY_CONTAINER;
    let container = spec
        .containers
        .iter_mut()
        .find(is_gateway)
        .ok_or(InjectError::NoGatewayContainer)?;
    containers::gateway(container, config, annotations, identity);
    Ok(Injected {
        containers: vec![PROXY_CONTAINER],
        ..Injected::default()
    })
}

/// The labels by which telemetry knows the workload.
fn label(pod: &mut Pod) {
    let workload = containers::workload(&pod.metadata).1;
    let labels = pod.metadata.labels.get_or_insert_default();
    let first_of = |labels: &BTreeMap<String, String>, names: [&str; 2]| {
        names.into_iter().find_map(|name| labels.get(name)).cloned()
    };
    let name = first_of(labels, ["app.kubernetes.io/name", "app"]).unwrap_or(workload);
    let revision =
        first_of(labels, ["app.kubernetes.io/version", "version"]).unwrap_or_else(|| "latest".to_owned());
    labels
        .entry("service.istio.io/canonical-name".into())
        .or_insert(name);
    labels
        .entry("service.istio.io/canonical-revision".into())
        .or_insert(revision);
}

fn annotate(pod: &mut Pod, config: &InjectConfig, read: &Annotations, names: &[String], injected: &Injected) {
    let status = serde_json::json!({
        "initContainers": injected.init_containers,
        "containers": injected.containers,
        "volumes": [],
        "imagePullSecrets": [],
        "revision": config.revision,
    });
    let annotations = pod.metadata.annotations.get_or_insert_default();
    annotations.insert(STATUS_ANNOTATION.into(), status.to_string());
    annotations.insert("istio.io/rev".into(), config.revision.clone());
    if let Some(first) = names.iter().find(|name| *name != PROXY_CONTAINER) {
        for key in [
            "kubectl.kubernetes.io/default-container",
            "kubectl.kubernetes.io/default-logs-container",
        ] {
            annotations.entry(key.into()).or_insert_with(|| first.clone());
        }
    }
    // A pod that is scraped already stays as it is: merging the application's metrics is not there.
    if !annotations.contains_key("prometheus.io/scrape") {
        for (key, value) in [
            ("scrape", "true"),
            ("port", "15090"),
            ("path", "/stats/prometheus"),
        ] {
            annotations.insert(format!("prometheus.io/{key}"), value.to_owned());
        }
    }
    if !read.unhonoured.is_empty() {
        annotations.insert(UNHONOURED_ANNOTATION.into(), read.unhonoured.join(","));
    }
}
