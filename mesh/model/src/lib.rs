//! One routing model for the mesh: services, endpoints, ordered routes with weighted backends, policies, gateways and scopes.
//!
//! Objects go in as [`Change`]s; each answers with what it [`Touched`], so that whoever derives something from the model (the xDS
//! translation) recomputes only that. Lookups are made for a [`Client`]: what a proxy of some namespace and labels sees. Every element
//! carries the object, generation and rule it came from ([`Provenance`]).
//!
//! Front ends: Services + EndpointSlices + Pods + Nodes ([`service`]), VirtualService → [`route`],
//! DestinationRule ([`policy`]), Gateway ([`gateway`]), ServiceEntry ([`service`]), Sidecar ([`scope`]). Merge order and conflict rules
//! are Istio's.
//!
//! An object that breaks a rule of [`serin_crds::istio::validate`] is refused: it is not taken into the model, the last valid version of
//! it stays in effect, and [`Model::problems`] names the rule.
//!
//! Pure: no clock, network, file system or async. Not here: xDS (crate `serin-control`), Gateway API (later), security kinds (later).
//! Limits: one cluster, one network. Fields that are not honoured are named by [`unhonoured()`]; where going on without one would do
//! something else than what was asked, the object is refused.

mod delegate;
pub mod gateway;
pub mod host;
pub mod object;
pub mod policy;
mod problems;
pub mod protocol;
mod registry;
mod removal;
pub mod route;
mod rules;
pub mod scope;
pub mod service;
#[cfg(test)]
mod tests;
mod unhonoured;
mod virtual_service;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

pub use gateway::{Gateway, Server};
pub use object::{Change, Kind, Object, ObjectKey, Provenance, Seniority};
pub use policy::HostPolicy;
pub use problems::{Problem, Severity};
pub use protocol::Protocol;
pub use removal::Loss;
pub use route::{Route, RuleSet};
pub use scope::Scope;
pub use service::{Endpoint, Locality, Port, Resolution, Service, TargetPort, Visibility, Workload};
pub use unhonoured::{Unhonoured, unhonoured};

/// What holds for the whole mesh.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MeshConfig {
    /// DNS domain of services; `cluster.local` by default, as in Kubernetes.
    pub domain: Arc<str>,
    /// Namespace of mesh-wide objects; `istio-system` by default, as in Istio.
    pub root_namespace: Arc<str>,
    /// Name of this cluster in telemetry; `Kubernetes` by default, as in Istio.
    pub cluster_id: Arc<str>,
    /// Unknown destinations are refused instead of passed on; off by default, as in Istio (`ALLOW_ANY`).
    pub registry_only: bool,
}

impl Default for MeshConfig {
    fn default() -> Self {
        Self {
            domain: "cluster.local".into(),
            root_namespace: "istio-system".into(),
            cluster_id: "Kubernetes".into(),
            registry_only: false,
        }
    }
}

/// What a change touched, as elements that can be looked up again.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Touched {
    /// Hosts whose service (ports, addresses, visibility) changed, appeared or went.
    pub services: BTreeSet<Arc<str>>,
    /// Hosts whose endpoints changed.
    pub endpoints: BTreeSet<Arc<str>>,
    /// Hosts (or wildcards) whose routes changed.
    pub rules: BTreeSet<Arc<str>>,
    /// Gateways (`namespace/name`) whose set of routes changed.
    pub gateway_rules: BTreeSet<Arc<str>>,
    /// Hosts (or wildcards) whose policy changed.
    pub policies: BTreeSet<Arc<str>>,
    /// Gateways that changed, appeared or went.
    pub gateways: BTreeSet<Arc<str>>,
    /// Namespaces in which the inbound side of workloads may have changed.
    pub inbound: BTreeSet<Arc<str>>,
    /// Which workloads share one view may have changed (scopes, selective rules).
    pub views: bool,
    /// The object whose change this was, for the ledger.
    pub cause: Option<Provenance>,
}

impl Touched {
    /// Nothing that proxies could see.
    pub fn is_empty(&self) -> bool {
        self.services.is_empty()
            && self.endpoints.is_empty()
            && self.rules.is_empty()
            && self.gateway_rules.is_empty()
            && self.policies.is_empty()
            && self.gateways.is_empty()
            && self.inbound.is_empty()
            && !self.views
    }

    /// Adds what another change touched.
    pub fn merge(&mut self, other: Touched) {
        self.services.extend(other.services);
        self.endpoints.extend(other.endpoints);
        self.rules.extend(other.rules);
        self.gateway_rules.extend(other.gateway_rules);
        self.policies.extend(other.policies);
        self.gateways.extend(other.gateways);
        self.inbound.extend(other.inbound);
        self.views |= other.views;
        self.cause = other.cause.or(self.cause.take());
    }
}

/// For whom something is looked up.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Client {
    /// Namespace of the workload.
    pub namespace: Arc<str>,
    /// Labels of the workload; empty where none matter.
    pub labels: BTreeMap<String, String>,
    /// Its scope.
    pub scope: Option<Arc<Scope>>,
}

/// The model.
#[derive(Debug, Default)]
pub struct Model {
    config: MeshConfig,
    registry: registry::Registry,
    rules: rules::RuleIndex,
    policies: policy::PolicyIndex,
    gateways: BTreeMap<Arc<str>, Arc<Gateway>>,
    scopes: scope::ScopeIndex,
    problems: problems::ProblemIndex,
}

impl Model {
    /// An empty model.
    pub fn new(config: MeshConfig) -> Self {
        Self {
            config,
            ..Self::default()
        }
    }

    /// What holds for the whole mesh.
    pub fn config(&self) -> &MeshConfig {
        &self.config
    }

    /// Takes in a change and says what it touched.
    pub fn apply(&mut self, change: Change) -> Touched {
        let before = (self.labels_matter(), self.locality_matters());
        let (key, object) = match change {
            Change::Apply(object) => (object.key(), Some(object)),
            Change::Delete(key) => (key, None),
        };
        let mut touched = Touched::default();
        if self.problems.refuses(&key, object.as_ref()) {
            return touched;
        }
        let domain = self.config.domain.clone();
        match (key.kind, object) {
            (_, Some(Object::VirtualService(object))) => {
                touched.cause = Some(provenance(&key, object.metadata.generation));
                touched.rules(self.rules.set(&key, Some(object), &domain));
            }
            (Kind::VirtualService, _) => touched.rules(self.rules.set(&key, None, &domain)),
            (_, Some(Object::DestinationRule(object))) => {
                touched.cause = Some(provenance(&key, object.metadata.generation));
                touched
                    .policies
                    .extend(self.policies.set(&key, Some(object), &domain));
            }
            (Kind::DestinationRule, _) => touched.policies.extend(self.policies.set(&key, None, &domain)),
            (Kind::Gateway, object) => {
                let name: Arc<str> = format!("{}/{}", key.namespace, key.name).into();
                let new = match object {
                    Some(Object::Gateway(object)) => {
                        touched.cause = Some(provenance(&key, object.metadata.generation));
                        Some(Arc::new(Gateway::compile(&object)))
                    }
                    _ => None,
                };
                if self.gateways.get(&name) != new.as_ref() {
                    touched.gateways.insert(name.clone());
                }
                match new {
                    Some(gateway) => self.gateways.insert(name, gateway),
                    None => self.gateways.remove(&name),
                };
            }
            (Kind::Sidecar, object) => {
                match &object {
                    Some(Object::Sidecar(object)) => {
                        touched.cause = Some(provenance(&key, object.metadata.generation));
                        self.scopes.set(&key, Some(object));
                    }
                    _ => self.scopes.set(&key, None),
                }
                touched.views = true;
            }
            (Kind::Service, object) => {
                let object = match &object {
                    Some(Object::Service(object)) => Some(&**object),
                    _ => None,
                };
                touched.registry(self.registry.set_service(&key, object, &domain));
            }
            (Kind::EndpointSlice, object) => {
                let object = match &object {
                    Some(Object::EndpointSlice(object)) => Some(&**object),
                    _ => None,
                };
                touched.registry(self.registry.set_slice(&key, object));
            }
            (Kind::Pod, object) => {
                let object = match &object {
                    Some(Object::Pod(object)) => Some(&**object),
                    _ => None,
                };
                touched.registry(self.registry.set_pod(&key, object));
            }
            (Kind::Node, object) => {
                let object = match &object {
                    Some(Object::Node(object)) => Some(&**object),
                    _ => None,
                };
                touched.registry(self.registry.set_node(&key, object));
            }
            (Kind::ServiceEntry, object) => {
                let object = match object {
                    Some(Object::ServiceEntry(object)) => Some(object),
                    _ => None,
                };
                touched.registry(self.registry.set_entry(&key, object));
            }
        }
        touched.views |= before != (self.labels_matter(), self.locality_matters());
        touched
    }

    /// Whether the labels of client workloads decide anything; while they do not, all workloads of a namespace see the same.
    pub fn labels_matter(&self) -> bool {
        self.rules.selective + self.policies.selective > 0
    }

    /// Whether the locality of clients decides anything; while it does not, all workloads of a namespace see the same.
    pub fn locality_matters(&self) -> bool {
        self.policies.local + self.registry.prefer_close > 0
    }

    /// ExternalName Services that stand for this host.
    pub fn aliases_of<'a>(&'a self, host: &str) -> impl Iterator<Item = &'a Arc<Service>> + 'a {
        self.registry.aliases_of(host)
    }

    /// The scope of a workload.
    pub fn scope(&self, namespace: &str, labels: &BTreeMap<String, String>) -> Option<Arc<Scope>> {
        self.scopes.of(namespace, labels, &self.config.root_namespace)
    }

    /// The service with this host, whoever sees it.
    pub fn service(&self, host: &str) -> Option<&Arc<Service>> {
        self.registry.service(host)
    }

    /// The service with this host, if the client sees it.
    pub fn visible_service(&self, host: &str, client: &Client) -> Option<&Arc<Service>> {
        self.registry
            .service(host)
            .filter(|service| sees(client, service))
    }

    /// All services that the client sees, by host.
    pub fn visible_services<'a>(&'a self, client: &'a Client) -> impl Iterator<Item = &'a Arc<Service>> + 'a {
        self.registry.services().filter(|service| sees(client, service))
    }

    /// Kubernetes Services whose Pods are those with these labels.
    pub fn services_selecting<'a>(
        &'a self,
        namespace: &'a str,
        labels: &'a BTreeMap<String, String>,
    ) -> impl Iterator<Item = &'a Arc<Service>> + 'a {
        self.registry
            .services_of(namespace)
            .filter(|service| service.selects(labels))
    }

    /// The Service that an EndpointSlice belongs to.
    pub fn service_of_slice(&self, slice: &ObjectKey) -> Option<ObjectKey> {
        self.registry.service_of_slice(slice)
    }

    /// Endpoints of a host.
    pub fn endpoints(&self, host: &str) -> Arc<Vec<Endpoint>> {
        self.registry.endpoints(host)
    }

    /// The workload of a Pod.
    pub fn workload(&self, namespace: &str, pod: &str) -> Option<&Arc<Workload>> {
        self.registry.workload(namespace, pod)
    }

    /// The container port of this name on the Pods of a namespace that have all of these labels; looks at all Pods.
    pub fn named_port(&self, namespace: &str, labels: &BTreeMap<String, String>, name: &str) -> Option<u16> {
        self.registry.named_port(namespace, labels, name)
    }

    /// Region and zone of a node.
    pub fn locality_of_node(&self, node: &str) -> Option<&Locality> {
        self.registry.locality_of_node(node)
    }

    /// The rules that a sidecar applies to a host: of the most specific host that is named, the senior object.
    pub fn rules(&self, host: &str, client: &Client) -> Option<&Arc<RuleSet>> {
        self.rules.for_host(host, &client.namespace)
    }

    /// The rules that sidecars of the client's namespace have for exactly this host or wildcard.
    pub fn rules_named(&self, host: &str, client: &Client) -> Option<&Arc<RuleSet>> {
        self.rules.exact(host, &client.namespace)
    }

    /// The hosts and wildcards that some VirtualService for sidecars names.
    pub fn rule_hosts(&self) -> impl Iterator<Item = &Arc<str>> {
        self.rules.mesh_hosts()
    }

    /// Hosts that are named by the same rules for sidecars as this one; their virtual hosts depend on each other.
    pub fn rules_beside(&self, host: &str) -> BTreeSet<Arc<str>> {
        self.rules.beside(host)
    }

    /// Hosts and wildcards that rules for sidecars name and that a service of this host matters to.
    pub fn rules_around(&self, host: &str) -> BTreeSet<Arc<str>> {
        self.rules.around(host)
    }

    /// The compiled rules of one VirtualService.
    pub fn rules_of(&self, key: &ObjectKey) -> Option<&Arc<RuleSet>> {
        self.rules.get(key)
    }

    /// Rules bound to a gateway (`namespace/name`), senior first.
    pub fn gateway_rules(&self, gateway: &str) -> impl Iterator<Item = &Arc<RuleSet>> {
        self.rules.of_gateway(gateway)
    }

    /// Gateways that a proxy with these labels serves, senior first.
    pub fn gateways(&self, labels: &BTreeMap<String, String>) -> Vec<Arc<Gateway>> {
        let mut found: Vec<_> = self
            .gateways
            .values()
            .filter(|gateway| gateway.selects(labels))
            .cloned()
            .collect();
        found.sort_by(|a, b| a.seniority.cmp(&b.seniority));
        found
    }

    /// The policy that a client applies to a host; `service_namespace` is where the service lives.
    pub fn policy(&self, host: &str, service_namespace: &str, client: &Client) -> Option<HostPolicy> {
        self.policies.lookup(
            host,
            &client.namespace,
            &client.labels,
            service_namespace,
            &self.config.root_namespace,
        )
    }

    /// Whether a gateway of this name (`namespace/name`) exists.
    pub fn has_gateway(&self, name: &str) -> bool {
        self.gateways.contains_key(name)
    }
}

fn provenance(key: &ObjectKey, generation: Option<i64>) -> Provenance {
    Provenance {
        object: key.clone(),
        generation: generation.unwrap_or(0),
        rule: None,
    }
}

fn sees(client: &Client, service: &Service) -> bool {
    service.visibility.includes(&client.namespace)
        && client
            .scope
            .as_ref()
            .is_none_or(|scope| scope.includes(service, &client.namespace))
}

impl Touched {
    fn rules(&mut self, touched: rules::TouchedRules) {
        self.rules.extend(touched.hosts);
        self.gateway_rules.extend(touched.gateways);
    }

    fn registry(&mut self, touched: registry::TouchedRegistry) {
        self.services.extend(touched.services);
        self.endpoints.extend(touched.endpoints);
        self.inbound.extend(touched.inbound);
    }
}
