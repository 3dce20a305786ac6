//! Services of the mesh, whichever registry they come from, and the endpoints behind them.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use k8s_openapi::api::core::v1::Service as KubeService;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use serin_crds::istio::{ServiceEntry, ServiceEntryLocation, ServiceEntryResolution};

use crate::host;
use crate::object::{Kind, ObjectKey, Provenance, Seniority};
use crate::protocol::Protocol;

/// How endpoints of a service are found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Resolution {
    /// The endpoints that the model knows (EDS).
    Endpoints,
    /// The address that the caller asked for.
    Passthrough,
    /// Every address that DNS gives for the endpoints' names.
    Dns,
    /// The first address that DNS gives.
    DnsRoundRobin,
    /// Another name for another host: no cluster of its own.
    Alias,
}

/// Which namespaces see something.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub enum Visibility {
    /// All.
    #[default]
    Everywhere,
    /// Only these.
    Namespaces(BTreeSet<Arc<str>>),
}

impl Visibility {
    /// From an `exportTo` list: `*` all, `.` the own namespace, `~` none.
    pub fn parse<'a>(items: impl IntoIterator<Item = &'a str>, own: &str) -> Self {
        let mut namespaces = BTreeSet::new();
        let mut any = false;
        for item in items {
            any = true;
            match item {
                "*" => return Self::Everywhere,
                "." => {
                    namespaces.insert(own.into());
                }
                "~" => {}
                other => {
                    namespaces.insert(other.into());
                }
            }
        }
        if any {
            Self::Namespaces(namespaces)
        } else {
            Self::Everywhere
        }
    }

    /// Whether proxies of this namespace see it.
    pub fn includes(&self, namespace: &str) -> bool {
        match self {
            Self::Everywhere => true,
            Self::Namespaces(namespaces) => namespaces.contains(namespace),
        }
    }
}

/// Port of the endpoints.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum TargetPort {
    /// By number.
    Number(u16),
    /// By the name of a container's port.
    Name(Arc<str>),
}

/// A port of a service.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Port {
    /// Number that callers use.
    pub number: u16,
    /// Name; endpoints are joined by it.
    pub name: Arc<str>,
    /// What it speaks.
    pub protocol: Protocol,
    /// Port of the endpoints.
    pub target: TargetPort,
}

/// A service that proxies know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    /// Its full name, for example `reviews.default.svc.cluster.local`.
    pub host: Arc<str>,
    /// The object's name, for telemetry.
    pub name: Arc<str>,
    /// Its namespace.
    pub namespace: Arc<str>,
    /// Ports in the order of the object.
    pub ports: Vec<Port>,
    /// Virtual addresses; empty for headless services.
    pub addresses: Vec<IpAddr>,
    /// Virtual networks (CIDR) of a ServiceEntry.
    pub subnets: Vec<String>,
    /// Kubernetes `clusterIP: None`.
    pub headless: bool,
    /// How endpoints are found.
    pub resolution: Resolution,
    /// For [`Resolution::Alias`]: the host that it stands for.
    pub alias_of: Option<Arc<str>>,
    /// Labels of the Pods behind it; empty if it selects none.
    pub selector: BTreeMap<String, String>,
    /// Who sees it.
    pub visibility: Visibility,
    /// Endpoints that are not ready are used too.
    pub publish_not_ready: bool,
    /// Outside the mesh (ServiceEntry MESH_EXTERNAL).
    pub external: bool,
    /// Traffic stays in the caller's zone while it can (`trafficDistribution: PreferClose`).
    pub prefer_close: bool,
    /// As much traffic stays in the caller's zone as its endpoints there can carry
    /// (`service.kubernetes.io/topology-mode: Auto`).
    pub topology_aware: bool,
    /// Kubernetes registry (as opposed to a ServiceEntry).
    pub kubernetes: bool,
    /// The object.
    pub provenance: Provenance,
    /// Decides between services that lead to one port of a workload.
    pub seniority: Seniority,
}

impl Service {
    /// The port with this number.
    pub fn port(&self, number: u16) -> Option<&Port> {
        self.ports.iter().find(|port| port.number == number)
    }

    /// Whether the service's Pods are those with these labels.
    pub fn selects(&self, labels: &BTreeMap<String, String>) -> bool {
        !self.selector.is_empty()
            && self
                .selector
                .iter()
                .all(|(key, value)| labels.get(key) == Some(value))
    }

    /// From a Kubernetes Service.
    pub fn from_kubernetes(object: &KubeService, domain: &str) -> Option<Self> {
        let name = object.metadata.name.as_deref()?;
        let namespace = object.metadata.namespace.as_deref().unwrap_or("default");
        let spec = object.spec.as_ref()?;
        let external_name = (spec.type_.as_deref() == Some("ExternalName"))
            .then_some(spec.external_name.as_deref())
            .flatten();
        let headless = spec.cluster_ip.as_deref() == Some("None");
        let mut addresses: Vec<IpAddr> = Vec::new();
        for text in spec.cluster_ip.iter().chain(spec.cluster_ips.iter().flatten()) {
            if let Ok(address) = text.parse()
                && !addresses.contains(&address)
            {
                addresses.push(address);
            }
        }
        let ports = spec
            .ports
            .iter()
            .flatten()
            .filter_map(|port| {
                let number = u16::try_from(port.port).ok()?;
                let name = port.name.as_deref().unwrap_or("");
                Some(Port {
                    number,
                    name: name.into(),
                    protocol: Protocol::of_port(
                        number,
                        name,
                        port.app_protocol.as_deref(),
                        port.protocol.as_deref().unwrap_or("TCP"),
                    ),
                    target: match &port.target_port {
                        Some(IntOrString::Int(target)) => TargetPort::Number(u16::try_from(*target).ok()?),
                        Some(IntOrString::String(target)) => TargetPort::Name(target.as_str().into()),
                        None => TargetPort::Number(number),
                    },
                })
            })
            .collect();
        let annotations = object.metadata.annotations.as_ref();
        let export = annotations.and_then(|map| map.get("networking.istio.io/exportTo"));
        Some(Self {
            host: format!("{name}.{namespace}.svc.{domain}").into(),
            name: name.into(),
            namespace: namespace.into(),
            ports,
            addresses,
            subnets: Vec::new(),
            headless,
            resolution: match (external_name, headless) {
                (Some(_), _) => Resolution::Alias,
                (None, true) => Resolution::Passthrough,
                (None, false) => Resolution::Endpoints,
            },
            alias_of: external_name.map(Into::into),
            selector: spec.selector.clone().unwrap_or_default(),
            visibility: export.map_or(Visibility::Everywhere, |text| {
                Visibility::parse(text.split(',').map(str::trim), namespace)
            }),
            publish_not_ready: spec.publish_not_ready_addresses.unwrap_or(false),
            external: false,
            prefer_close: matches!(
                spec.traffic_distribution.as_deref(),
                Some("PreferClose" | "PreferSameZone")
            ),
            topology_aware: annotations
                .and_then(|map| map.get("service.kubernetes.io/topology-mode"))
                .is_some_and(|mode| mode.eq_ignore_ascii_case("auto")),
            kubernetes: true,
            provenance: Provenance {
                object: ObjectKey::new(Kind::Service, namespace, name),
                generation: object.metadata.generation.unwrap_or(0),
                rule: None,
            },
            seniority: Seniority::of(&object.metadata, namespace),
        })
    }

    /// From a ServiceEntry: one service for each host.
    pub fn from_entry(object: &ServiceEntry) -> Vec<Self> {
        let name = object.metadata.name.as_deref().unwrap_or("");
        let namespace = object.metadata.namespace.as_deref().unwrap_or("default");
        let spec = &object.spec;
        let ports: Vec<Port> = spec
            .ports
            .iter()
            .filter_map(|port| {
                let number = u16::try_from(port.number).ok()?;
                let protocol = port.protocol.as_deref().unwrap_or("");
                Some(Port {
                    number,
                    name: port.name.as_str().into(),
                    protocol: Protocol::parse(protocol)
                        .unwrap_or_else(|| Protocol::of_port(number, &port.name, None, "TCP")),
                    target: TargetPort::Number(u16::try_from(port.target_port.unwrap_or(port.number)).ok()?),
                })
            })
            .collect();
        let addresses: Vec<IpAddr> = spec
            .addresses
            .iter()
            .filter_map(|text| text.parse().ok())
            .collect();
        let subnets: Vec<String> = spec
            .addresses
            .iter()
            .filter(|text| text.contains('/'))
            .cloned()
            .collect();
        spec.hosts
            .iter()
            .map(|host| Self {
                host: host.as_str().into(),
                // Telemetry names a service of an entry by its host, as Istio does.
                name: host.as_str().into(),
                namespace: namespace.into(),
                ports: ports.clone(),
                addresses: addresses.clone(),
                subnets: subnets.clone(),
                headless: false,
                resolution: match spec.resolution.unwrap_or(ServiceEntryResolution::None) {
                    ServiceEntryResolution::None | ServiceEntryResolution::DynamicDns => {
                        Resolution::Passthrough
                    }
                    ServiceEntryResolution::Static => Resolution::Endpoints,
                    ServiceEntryResolution::Dns => Resolution::Dns,
                    ServiceEntryResolution::DnsRoundRobin => Resolution::DnsRoundRobin,
                },
                alias_of: None,
                selector: BTreeMap::new(),
                visibility: Visibility::parse(spec.export_to.iter().map(String::as_str), namespace),
                publish_not_ready: false,
                external: spec.location.unwrap_or(ServiceEntryLocation::MeshExternal)
                    == ServiceEntryLocation::MeshExternal,
                prefer_close: false,
                topology_aware: false,
                kubernetes: false,
                provenance: Provenance {
                    object: ObjectKey::new(Kind::ServiceEntry, namespace, name),
                    generation: object.metadata.generation.unwrap_or(0),
                    rule: None,
                },
                seniority: Seniority::of(&object.metadata, namespace),
            })
            .collect()
    }

    /// The names under which callers of `namespace` may write the host, most complete first.
    pub fn domains(&self, caller_namespace: &str, domain: &str) -> Vec<String> {
        let mut domains = vec![self.host.to_string()];
        if host::is_wildcard(&self.host) {
            return domains;
        }
        domains.push(format!("{}.", self.host));
        if !self.kubernetes || *self.host != *format!("{}.{}.svc.{domain}", self.name, self.namespace) {
            return domains;
        }
        if &*self.namespace == caller_namespace {
            domains.push(self.name.to_string());
        }
        domains.push(format!("{}.{}", self.name, self.namespace));
        domains.push(format!("{}.{}.svc", self.name, self.namespace));
        domains
    }
}

/// Region, zone and sub-zone.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Locality {
    /// Region.
    pub region: Arc<str>,
    /// Zone.
    pub zone: Arc<str>,
    /// Sub-zone.
    pub sub_zone: Arc<str>,
}

impl Locality {
    /// From `region/zone/subzone`.
    pub fn parse(text: &str) -> Self {
        let mut parts = text.splitn(3, '/').map(Arc::<str>::from);
        let mut next = || parts.next().unwrap_or_default();
        Self {
            region: next(),
            zone: next(),
            sub_zone: next(),
        }
    }

    /// Whether nothing is known.
    pub fn is_empty(&self) -> bool {
        self.region.is_empty() && self.zone.is_empty() && self.sub_zone.is_empty()
    }
}

/// A workload: a Pod or a WorkloadEntry.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Workload {
    /// Name of the workload (the Deployment's, not the Pod's).
    pub name: Arc<str>,
    /// Namespace.
    pub namespace: Arc<str>,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Node that it runs on.
    pub node: Arc<str>,
    /// Service account.
    pub service_account: Arc<str>,
    /// Addresses.
    pub addresses: Vec<Arc<str>>,
    /// Container ports by name.
    pub named_ports: BTreeMap<String, u16>,
}

impl Workload {
    /// The `istio.workload` metadata of its endpoints: `name;namespace;canonical name;canonical revision;cluster`. The revision
    /// `latest`, which is also that of workloads without a label, is left empty.
    pub fn telemetry(&self, cluster_id: &str) -> String {
        let canonical = ["service.istio.io/canonical-name", "app.kubernetes.io/name", "app"]
            .iter()
            .find_map(|label| self.labels.get(*label))
            .map_or(&*self.name, String::as_str);
        let revision = [
            "service.istio.io/canonical-revision",
            "app.kubernetes.io/version",
            "version",
        ]
        .iter()
        .find_map(|label| self.labels.get(*label))
        .filter(|revision| *revision != "latest")
        .map_or("", String::as_str);
        format!(
            "{};{};{canonical};{revision};{cluster_id}",
            self.name, self.namespace
        )
    }
}

/// One endpoint of a service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// IP address, host name (DNS resolution) or `unix:///path`.
    pub address: Arc<str>,
    /// Port by the name of the service's port.
    pub ports: Arc<BTreeMap<Arc<str>, u16>>,
    /// The workload behind it, if known.
    pub workload: Option<Arc<Workload>>,
    /// Where it is.
    pub locality: Locality,
    /// Share among the endpoints of its locality; 1 if unset.
    pub weight: u32,
}

impl Endpoint {
    /// Whether it belongs to a subset with these labels.
    pub fn has_labels(&self, labels: &BTreeMap<String, String>) -> bool {
        labels.is_empty()
            || self.workload.as_ref().is_some_and(|workload| {
                labels
                    .iter()
                    .all(|(key, value)| workload.labels.get(key) == Some(value))
            })
    }
}
