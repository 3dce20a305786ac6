//! Services and the endpoints behind them, joined from Services, EndpointSlices, Pods, Nodes and ServiceEntries.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Node, Pod, Service as KubeService};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use serin_crds::istio::{ServiceEntry, ServiceEntryResolution};

use crate::object::{Kind, ObjectKey};
use crate::service::{Endpoint, Locality, Service, TargetPort, Workload};

/// `(namespace, name)`.
type Name = (Arc<str>, Arc<str>);

#[derive(Debug)]
struct SliceEndpoint {
    address: Arc<str>,
    ready: bool,
    pod: Option<Name>,
    node: Arc<str>,
    zone: Arc<str>,
}

#[derive(Debug)]
struct Slice {
    service: Arc<str>,
    ports: Arc<BTreeMap<Arc<str>, u16>>,
    endpoints: Vec<SliceEndpoint>,
}

/// What a change of the registry touched.
#[derive(Debug, Default)]
pub(crate) struct TouchedRegistry {
    pub(crate) services: BTreeSet<Arc<str>>,
    pub(crate) endpoints: BTreeSet<Arc<str>>,
    /// Namespaces whose services, selectors or Pods changed: inbound sides may differ.
    pub(crate) inbound: BTreeSet<Arc<str>>,
}

/// The registry.
#[derive(Debug, Default)]
pub(crate) struct Registry {
    /// Host → services by provenance (several ServiceEntries may name one host); the first is used.
    services: BTreeMap<Arc<str>, BTreeMap<ObjectKey, Arc<Service>>>,
    by_object: HashMap<ObjectKey, Vec<Arc<str>>>,
    by_namespace: BTreeMap<Arc<str>, BTreeSet<Arc<str>>>,
    entries: HashMap<ObjectKey, Arc<ServiceEntry>>,
    slices: HashMap<Name, Slice>,
    slices_of: HashMap<Name, BTreeSet<Arc<str>>>,
    pods: HashMap<Name, Arc<Workload>>,
    hosts_of_pod: HashMap<Name, BTreeSet<Name>>,
    pods_on: HashMap<Arc<str>, BTreeSet<Name>>,
    nodes: HashMap<Arc<str>, Locality>,
    endpoints: HashMap<Arc<str>, Arc<Vec<Endpoint>>>,
    /// Host → ExternalName Services that stand for it.
    aliases: HashMap<Arc<str>, BTreeSet<Arc<str>>>,
    /// How many services prefer near endpoints.
    pub(crate) prefer_close: usize,
}

impl Registry {
    pub(crate) fn service(&self, host: &str) -> Option<&Arc<Service>> {
        // A Kubernetes Service goes before ServiceEntries of the same host (Kind orders that way).
        self.services
            .get(host)
            .and_then(|services| services.values().next())
    }

    /// The services that an object makes and that are the ones in use for their hosts, each with whether another object makes one too.
    pub(crate) fn made_by(&self, key: &ObjectKey) -> impl Iterator<Item = (&Arc<Service>, bool)> {
        let hosts = self.by_object.get(key).into_iter().flatten();
        hosts.filter_map(move |host| {
            let services = self.services.get(host)?;
            let (first, service) = services.iter().next()?;
            (first == key).then_some((service, services.len() > 1))
        })
    }

    pub(crate) fn services(&self) -> impl Iterator<Item = &Arc<Service>> {
        self.services
            .values()
            .filter_map(|services| services.values().next())
    }

    pub(crate) fn services_of(&self, namespace: &str) -> impl Iterator<Item = &Arc<Service>> {
        self.by_namespace
            .get(namespace)
            .into_iter()
            .flatten()
            .filter_map(|host| self.service(host))
    }

    pub(crate) fn service_of_slice(&self, slice: &ObjectKey) -> Option<ObjectKey> {
        let slice = self
            .slices
            .get(&(slice.namespace.clone(), slice.name.clone()))
            .map(|known| (slice, known));
        slice.map(|(key, known)| ObjectKey::new(Kind::Service, &key.namespace, &known.service))
    }

    pub(crate) fn endpoints(&self, host: &str) -> Arc<Vec<Endpoint>> {
        self.endpoints.get(host).cloned().unwrap_or_default()
    }

    pub(crate) fn workload(&self, namespace: &str, name: &str) -> Option<&Arc<Workload>> {
        self.pods.get(&(namespace.into(), name.into()))
    }

    pub(crate) fn named_port(
        &self,
        namespace: &str,
        labels: &BTreeMap<String, String>,
        name: &str,
    ) -> Option<u16> {
        self.pods
            .values()
            .filter(|pod| &*pod.namespace == namespace)
            .filter(|pod| {
                labels
                    .iter()
                    .all(|(key, value)| pod.labels.get(key) == Some(value))
            })
            .filter_map(|pod| pod.named_ports.get(name).copied())
            .min()
    }

    pub(crate) fn locality_of_node(&self, node: &str) -> Option<&Locality> {
        self.nodes.get(node)
    }

    pub(crate) fn aliases_of<'a>(&'a self, host: &str) -> impl Iterator<Item = &'a Arc<Service>> + 'a {
        self.aliases
            .get(host)
            .into_iter()
            .flatten()
            .filter_map(|alias| self.service(alias))
    }

    fn put_services(&mut self, key: &ObjectKey, services: Vec<Service>, touched: &mut TouchedRegistry) {
        let old_hosts = self.by_object.remove(key).unwrap_or_default();
        let old: BTreeMap<Arc<str>, Arc<Service>> = old_hosts
            .iter()
            .filter_map(|host| Some((host.clone(), self.services.get(host)?.get(key)?.clone())))
            .collect();
        for service in old.values() {
            self.prefer_close -= usize::from(service.prefer_close);
            if let Some(target) = &service.alias_of {
                // The host that it stood for loses names.
                touched.services.insert(target.clone());
                if let Some(aliases) = self.aliases.get_mut(target) {
                    aliases.remove(&service.host);
                }
            }
        }
        for host in &old_hosts {
            if let Some(services) = self.services.get_mut(host) {
                services.remove(key);
                if services.is_empty() {
                    self.services.remove(host);
                }
            }
            if let Some(hosts) = self.by_namespace.get_mut(&key.namespace) {
                hosts.remove(host);
            }
        }
        let mut hosts = Vec::new();
        for service in services {
            let host = service.host.clone();
            let service = Arc::new(service);
            // Of a Service nothing but its content counts; a ServiceEntry's generation is what somebody waits to see live.
            let same = old.get(&host).is_some_and(|old| {
                let mut old = (**old).clone();
                if service.kubernetes {
                    old.provenance = service.provenance.clone();
                }
                old == *service
            });
            if !same {
                touched.services.insert(host.clone());
                touched.inbound.insert(key.namespace.clone());
            }
            self.prefer_close += usize::from(service.prefer_close);
            if let Some(target) = &service.alias_of {
                touched.services.insert(target.clone());
                self.aliases
                    .entry(target.clone())
                    .or_default()
                    .insert(host.clone());
            }
            self.services
                .entry(host.clone())
                .or_default()
                .insert(key.clone(), service);
            self.by_namespace
                .entry(key.namespace.clone())
                .or_default()
                .insert(host.clone());
            hosts.push(host);
        }
        for host in old.keys() {
            if !hosts.contains(host) {
                touched.services.insert(host.clone());
                touched.inbound.insert(key.namespace.clone());
            }
        }
        if !hosts.is_empty() {
            self.by_object.insert(key.clone(), hosts);
        }
        for host in touched.services.clone() {
            self.join(&host, touched);
        }
    }

    pub(crate) fn set_service(
        &mut self,
        key: &ObjectKey,
        object: Option<&KubeService>,
        domain: &str,
    ) -> TouchedRegistry {
        let mut touched = TouchedRegistry::default();
        let services = object
            .and_then(|object| Service::from_kubernetes(object, domain))
            .into_iter()
            .collect();
        self.put_services(key, services, &mut touched);
        touched
    }

    pub(crate) fn set_entry(
        &mut self,
        key: &ObjectKey,
        object: Option<Arc<ServiceEntry>>,
    ) -> TouchedRegistry {
        let mut touched = TouchedRegistry::default();
        let services = object.as_deref().map(Service::from_entry).unwrap_or_default();
        let mut hosts: BTreeSet<Arc<str>> = services.iter().map(|service| service.host.clone()).collect();
        hosts.extend(self.by_object.get(key).into_iter().flatten().cloned());
        match object {
            Some(object) => {
                self.entries.insert(key.clone(), object);
            }
            None => {
                self.entries.remove(key);
            }
        }
        self.put_services(key, services, &mut touched);
        for host in hosts {
            self.join(&host, &mut touched);
        }
        touched
    }

    pub(crate) fn set_slice(&mut self, key: &ObjectKey, object: Option<&EndpointSlice>) -> TouchedRegistry {
        let mut touched = TouchedRegistry::default();
        let name: Name = (key.namespace.clone(), key.name.clone());
        let mut services: BTreeSet<Arc<str>> = BTreeSet::new();
        if let Some(old) = self.slices.remove(&name) {
            self.forget_slice(&name, &old);
            services.insert(old.service);
        }
        if let Some(slice) = object.and_then(read_slice) {
            for pod in slice
                .endpoints
                .iter()
                .filter_map(|endpoint| endpoint.pod.as_ref())
            {
                self.hosts_of_pod
                    .entry(pod.clone())
                    .or_default()
                    .insert((key.namespace.clone(), slice.service.clone()));
            }
            self.slices_of
                .entry((key.namespace.clone(), slice.service.clone()))
                .or_default()
                .insert(key.name.clone());
            services.insert(slice.service.clone());
            self.slices.insert(name, slice);
        }
        for service in services {
            self.join_kubernetes(&(key.namespace.clone(), service), &mut touched);
        }
        touched
    }

    fn forget_slice(&mut self, name: &Name, slice: &Slice) {
        let service: Name = (name.0.clone(), slice.service.clone());
        if let Some(slices) = self.slices_of.get_mut(&service) {
            slices.remove(&name.1);
            if slices.is_empty() {
                self.slices_of.remove(&service);
            }
        }
        for pod in slice
            .endpoints
            .iter()
            .filter_map(|endpoint| endpoint.pod.as_ref())
        {
            if let Some(services) = self.hosts_of_pod.get_mut(pod) {
                services.remove(&service);
                if services.is_empty() {
                    self.hosts_of_pod.remove(pod);
                }
            }
        }
    }

    pub(crate) fn set_pod(&mut self, key: &ObjectKey, object: Option<&Pod>) -> TouchedRegistry {
        let mut touched = TouchedRegistry::default();
        let name: Name = (key.namespace.clone(), key.name.clone());
        let workload = object.map(|pod| Arc::new(read_pod(pod)));
        if self.pods.get(&name) == workload.as_ref() {
            return touched;
        }
        if let Some(old) = self.pods.remove(&name)
            && let Some(pods) = self.pods_on.get_mut(&old.node)
        {
            pods.remove(&name);
        }
        if let Some(workload) = workload {
            self.pods_on
                .entry(workload.node.clone())
                .or_default()
                .insert(name.clone());
            self.pods.insert(name.clone(), workload);
        }
        touched.inbound.insert(key.namespace.clone());
        for service in self.hosts_of_pod.get(&name).cloned().unwrap_or_default() {
            self.join_kubernetes(&service, &mut touched);
        }
        touched
    }

    pub(crate) fn set_node(&mut self, key: &ObjectKey, object: Option<&Node>) -> TouchedRegistry {
        let mut touched = TouchedRegistry::default();
        let locality = object.map(|node| {
            let label = |name: &str, old: &str| -> Arc<str> {
                let labels = node.metadata.labels.as_ref();
                labels
                    .and_then(|labels| labels.get(name).or_else(|| labels.get(old)))
                    .map_or("", String::as_str)
                    .into()
            };
            Locality {
                region: label(
                    "topology.kubernetes.io/region",
                    "failure-domain.beta.kubernetes.io/region",
                ),
                zone: label(
                    "topology.kubernetes.io/zone",
                    "failure-domain.beta.kubernetes.io/zone",
                ),
                sub_zone: label("topology.istio.io/subzone", "topology.istio.io/subzone"),
            }
        });
        if self.nodes.get(&key.name) == locality.as_ref() {
            return touched;
        }
        match locality {
            Some(locality) => self.nodes.insert(key.name.clone(), locality),
            None => self.nodes.remove(&key.name),
        };
        let mut services: BTreeSet<Name> = BTreeSet::new();
        for ((namespace, _), slice) in &self.slices {
            if slice.endpoints.iter().any(|endpoint| endpoint.node == key.name) {
                services.insert((namespace.clone(), slice.service.clone()));
            }
        }
        for pod in self.pods_on.get(&key.name).into_iter().flatten() {
            services.extend(self.hosts_of_pod.get(pod).into_iter().flatten().cloned());
        }
        for service in services {
            self.join_kubernetes(&service, &mut touched);
        }
        touched
    }

    /// The host of a Kubernetes Service: its key's, since the domain is the same for all.
    fn host_of(&self, service: &Name) -> Option<Arc<str>> {
        self.by_object
            .get(&ObjectKey::new(
                crate::object::Kind::Service,
                &service.0,
                &service.1,
            ))?
            .first()
            .cloned()
    }

    fn join_kubernetes(&mut self, service: &Name, touched: &mut TouchedRegistry) {
        if let Some(host) = self.host_of(service) {
            self.join(&host, touched);
        }
    }

    /// Puts together the endpoints of a host and notes whether they changed.
    fn join(&mut self, host: &Arc<str>, touched: &mut TouchedRegistry) {
        let mut endpoints = Vec::new();
        for service in self.services.get(host).into_iter().flat_map(BTreeMap::values) {
            if service.kubernetes {
                self.slice_endpoints(service, &mut endpoints);
            } else if let Some(entry) = self.entries.get(&service.provenance.object) {
                self.entry_endpoints(service, entry, &mut endpoints);
            }
        }
        let gone = !self.services.contains_key(host);
        let old = self.endpoints.get(host);
        if old.is_some_and(|old| **old == endpoints && !gone) || (old.is_none() && gone) {
            return;
        }
        touched.endpoints.insert(host.clone());
        if gone {
            self.endpoints.remove(host);
        } else {
            self.endpoints.insert(host.clone(), Arc::new(endpoints));
        }
    }

    fn slice_endpoints(&self, service: &Service, out: &mut Vec<Endpoint>) {
        let name: Name = (service.namespace.clone(), service.name.clone());
        for slice in self.slices_of.get(&name).into_iter().flatten() {
            let Some(slice) = self.slices.get(&(service.namespace.clone(), slice.clone())) else {
                continue;
            };
            for endpoint in &slice.endpoints {
                if !endpoint.ready && !service.publish_not_ready {
                    continue;
                }
                let workload = endpoint.pod.as_ref().and_then(|pod| self.pods.get(pod)).cloned();
                let node = if endpoint.node.is_empty() {
                    workload.as_ref().map(|w| w.node.clone())
                } else {
                    Some(endpoint.node.clone())
                };
                let locality = node
                    .and_then(|node| self.nodes.get(&node))
                    .cloned()
                    .unwrap_or_else(|| Locality {
                        zone: endpoint.zone.clone(),
                        ..Locality::default()
                    });
                out.push(Endpoint {
                    address: endpoint.address.clone(),
                    ports: slice.ports.clone(),
                    workload,
                    locality,
                    weight: 1,
                });
            }
        }
    }

    fn entry_endpoints(&self, service: &Service, object: &ServiceEntry, out: &mut Vec<Endpoint>) {
        let by_name = |ports: &BTreeMap<String, u32>| {
            Arc::new(
                service
                    .ports
                    .iter()
                    .map(|port| {
                        let target = match port.target {
                            TargetPort::Number(number) => number,
                            TargetPort::Name(_) => port.number,
                        };
                        let number = ports
                            .get(&*port.name)
                            .and_then(|port| u16::try_from(*port).ok())
                            .unwrap_or(target);
                        (port.name.clone(), number)
                    })
                    .collect::<BTreeMap<_, _>>(),
            )
        };
        for (index, entry) in object.spec.endpoints.iter().enumerate() {
            out.push(Endpoint {
                address: entry.address.as_deref().unwrap_or("").into(),
                ports: by_name(&entry.ports),
                workload: Some(Arc::new(Workload {
                    name: format!("{}-{index}", object.metadata.name.as_deref().unwrap_or("")).into(),
                    namespace: service.namespace.clone(),
                    labels: entry.labels.clone(),
                    service_account: entry.service_account.as_deref().unwrap_or("").into(),
                    ..Workload::default()
                })),
                locality: Locality::parse(entry.locality.as_deref().unwrap_or("")),
                weight: entry.weight.filter(|weight| *weight > 0).unwrap_or(1),
            });
        }
        let dns = matches!(
            object.spec.resolution,
            Some(ServiceEntryResolution::Dns | ServiceEntryResolution::DnsRoundRobin)
        );
        if object.spec.endpoints.is_empty() && dns {
            out.push(Endpoint {
                address: service.host.clone(),
                ports: by_name(&BTreeMap::new()),
                workload: None,
                locality: Locality::default(),
                weight: 1,
            });
        }
    }
}

fn read_slice(object: &EndpointSlice) -> Option<Slice> {
    let service = object
        .metadata
        .labels
        .as_ref()?
        .get("kubernetes.io/service-name")?;
    if object.address_type == "FQDN" {
        return None;
    }
    let namespace: Arc<str> = object.metadata.namespace.as_deref().unwrap_or("default").into();
    let ports = object
        .ports
        .iter()
        .flatten()
        .filter_map(|port| {
            Some((
                port.name.as_deref().unwrap_or("").into(),
                u16::try_from(port.port?).ok()?,
            ))
        })
        .collect();
    Some(Slice {
        service: service.as_str().into(),
        ports: Arc::new(ports),
        endpoints: object
            .endpoints
            .iter()
            .flat_map(|endpoint| {
                let conditions = endpoint.conditions.as_ref();
                // An unknown `ready` means ready (EndpointConditions); a terminating endpoint is never ready.
                let ready = conditions.is_none_or(|conditions| {
                    conditions.ready.unwrap_or(true) && !conditions.terminating.unwrap_or(false)
                });
                let pod = endpoint
                    .target_ref
                    .as_ref()
                    .filter(|target| target.kind.as_deref() == Some("Pod"))
                    .and_then(|target| target.name.as_deref())
                    .map(|name| (namespace.clone(), Arc::from(name)));
                endpoint.addresses.iter().map(move |address| SliceEndpoint {
                    address: address.as_str().into(),
                    ready,
                    pod: pod.clone(),
                    node: endpoint.node_name.as_deref().unwrap_or("").into(),
                    zone: endpoint.zone.as_deref().unwrap_or("").into(),
                })
            })
            .collect(),
    })
}

fn read_pod(pod: &Pod) -> Workload {
    let name = pod.metadata.name.as_deref().unwrap_or("");
    let labels = pod.metadata.labels.clone().unwrap_or_default();
    let owner = pod
        .metadata
        .owner_references
        .iter()
        .flatten()
        .find(|owner| owner.controller == Some(true));
    let workload = match owner {
        // A ReplicaSet is named after its Deployment and the template's hash.
        Some(owner) if owner.kind == "ReplicaSet" => labels
            .get("pod-template-hash")
            .and_then(|hash| owner.name.strip_suffix(hash.as_str())?.strip_suffix('-'))
            .unwrap_or(&owner.name)
            .to_owned(),
        Some(owner) => owner.name.clone(),
        None => name.to_owned(),
    };
    let spec = pod.spec.as_ref();
    let status = pod.status.as_ref();
    let mut addresses: Vec<Arc<str>> = status
        .and_then(|status| status.pod_ips.as_ref())
        .into_iter()
        .flatten()
        .map(|ip| ip.ip.as_str().into())
        .collect();
    if let Some(ip) = status.and_then(|status| status.pod_ip.as_deref())
        && !addresses.iter().any(|known| &**known == ip)
    {
        addresses.push(ip.into());
    }
    Workload {
        name: workload.into(),
        namespace: pod.metadata.namespace.as_deref().unwrap_or("default").into(),
        labels,
        node: spec
            .and_then(|spec| spec.node_name.as_deref())
            .unwrap_or("")
            .into(),
        service_account: spec
            .and_then(|spec| spec.service_account_name.as_deref())
            .unwrap_or("default")
            .into(),
        addresses,
        named_ports: spec
            .into_iter()
            .flat_map(|spec| &spec.containers)
            .flat_map(|container| container.ports.iter().flatten())
            .filter_map(|port| Some((port.name.clone()?, u16::try_from(port.container_port).ok()?)))
            .collect(),
    }
}
