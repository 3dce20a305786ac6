//! Front end: DestinationRule → the policy of a host as one client sees it.

use std::collections::BTreeMap;
use std::sync::Arc;

use serin_crds::istio::{DestinationRule, Subset, TrafficPolicy};

use crate::host;
use crate::object::{Kind, ObjectKey, Provenance, Seniority};
use crate::service::Visibility;

/// The rules of one namespace for one host (and one audience), merged: the senior policy wins, subsets add up.
#[derive(Clone, Debug, PartialEq)]
pub struct HostPolicy {
    /// Host or wildcard, resolved.
    pub host: Arc<str>,
    /// Policy of the host.
    pub policy: Option<TrafficPolicy>,
    /// Subsets by order of appearance; names are unique.
    pub subsets: Vec<Subset>,
    /// Labels that a client workload of the rule's namespace must have; empty means all clients.
    pub clients: BTreeMap<String, String>,
    /// Who sees it.
    pub visibility: Visibility,
    /// The objects, senior first.
    pub provenance: Vec<Provenance>,
}

impl HostPolicy {
    /// The policy for a port of the host, or of one of its subsets.
    ///
    /// A subset's parts replace the host's part by part; an entry for the port replaces all four parts together, an empty one included.
    pub fn for_port(&self, subset: Option<&str>, port: u16) -> TrafficPolicy {
        let mut merged = TrafficPolicy::default();
        if let Some(policy) = &self.policy {
            overlay(&mut merged, policy, port);
        }
        if let Some(policy) = subset
            .and_then(|name| self.subsets.iter().find(|subset| subset.name == name))
            .and_then(|subset| subset.traffic_policy.as_ref())
        {
            overlay(&mut merged, policy, port);
        }
        merged
    }
}

fn overlay(merged: &mut TrafficPolicy, policy: &TrafficPolicy, port: u16) {
    macro_rules! replace {
        ($($field:ident),*) => { $( if policy.$field.is_some() { merged.$field = policy.$field.clone(); } )* };
    }
    replace!(
        connection_pool,
        outlier_detection,
        load_balancer,
        tls,
        tunnel,
        proxy_protocol,
        retry_budget
    );
    let number = Some(u32::from(port));
    if let Some(entry) = policy
        .port_level_settings
        .iter()
        .find(|entry| entry.port.as_ref().and_then(|p| p.number) == number)
    {
        merged.connection_pool = entry.connection_pool.clone();
        merged.outlier_detection = entry.outlier_detection.clone();
        merged.load_balancer = entry.load_balancer.clone();
        merged.tls = entry.tls.clone();
    }
}

/// All DestinationRules, by namespace and host.
#[derive(Debug, Default)]
pub(crate) struct PolicyIndex {
    objects: BTreeMap<(Arc<str>, Arc<str>), BTreeMap<Seniority, Arc<DestinationRule>>>,
    merged: BTreeMap<Arc<str>, BTreeMap<Arc<str>, Arc<Vec<HostPolicy>>>>,
    hosts: BTreeMap<ObjectKey, (Arc<str>, Seniority)>,
    /// How many rules are for some clients only: as long as there are none, labels of clients do not matter.
    pub(crate) selective: usize,
    /// How many rules look at localities.
    pub(crate) local: usize,
}

/// Whether the labels of clients decide about a rule or in it.
fn is_selective(object: &DestinationRule) -> bool {
    let by_labels = |balancer: Option<&serin_crds::istio::LoadBalancerSettings>| {
        balancer
            .and_then(|balancer| balancer.locality_lb_setting.as_ref())
            .is_some_and(|setting| !setting.failover_priority.is_empty())
    };
    let policy = |policy: &TrafficPolicy| {
        by_labels(policy.load_balancer.as_ref())
            || policy
                .port_level_settings
                .iter()
                .any(|entry| by_labels(entry.load_balancer.as_ref()))
    };
    let subsets = object
        .spec
        .subsets
        .iter()
        .filter_map(|subset| subset.traffic_policy.as_ref());
    object.spec.workload_selector.is_some() || object.spec.traffic_policy.iter().chain(subsets).any(policy)
}

/// Whether a rule orders endpoints by locality for some port or subset.
fn is_local(object: &DestinationRule) -> bool {
    let parts = |outlier: bool, balancer: Option<&serin_crds::istio::LoadBalancerSettings>| {
        outlier || balancer.is_some_and(|balancer| balancer.locality_lb_setting.is_some())
    };
    let local = |policy: &TrafficPolicy| {
        parts(policy.outlier_detection.is_some(), policy.load_balancer.as_ref())
            || policy
                .port_level_settings
                .iter()
                .any(|entry| parts(entry.outlier_detection.is_some(), entry.load_balancer.as_ref()))
    };
    let subsets = object
        .spec
        .subsets
        .iter()
        .filter_map(|subset| subset.traffic_policy.as_ref());
    object.spec.traffic_policy.iter().chain(subsets).any(local)
}

impl PolicyIndex {
    /// Puts or takes away an object; returns the hosts whose policy may have changed.
    pub(crate) fn set(
        &mut self,
        key: &ObjectKey,
        object: Option<Arc<DestinationRule>>,
        domain: &str,
    ) -> Vec<Arc<str>> {
        let mut touched = Vec::new();
        if let Some((host, seniority)) = self.hosts.remove(key) {
            let slot = (key.namespace.clone(), host.clone());
            if let Some(old) = self
                .objects
                .get_mut(&slot)
                .and_then(|objects| objects.remove(&seniority))
            {
                self.selective -= usize::from(is_selective(&old));
                self.local -= usize::from(is_local(&old));
            }
            self.merge(&slot);
            touched.push(host);
        }
        if let Some(object) = object {
            let host = host::resolve(&object.spec.host, &key.namespace, domain);
            let seniority = Seniority::of(&object.metadata, &key.namespace);
            self.selective += usize::from(is_selective(&object));
            self.local += usize::from(is_local(&object));
            let slot = (key.namespace.clone(), host.clone());
            self.objects
                .entry(slot.clone())
                .or_default()
                .insert(seniority.clone(), object);
            self.hosts.insert(key.clone(), (host.clone(), seniority));
            self.merge(&slot);
            if !touched.contains(&host) {
                touched.push(host);
            }
        }
        touched
    }

    /// The object of a key, with the host that it is for.
    pub(crate) fn get(&self, key: &ObjectKey) -> Option<(&Arc<str>, &Arc<DestinationRule>)> {
        let (host, seniority) = self.hosts.get(key)?;
        let slot = (key.namespace.clone(), host.clone());
        Some((host, self.objects.get(&slot)?.get(seniority)?))
    }

    fn merge(&mut self, slot: &(Arc<str>, Arc<str>)) {
        let mut merged: Vec<HostPolicy> = Vec::new();
        for object in self.objects.get(slot).into_iter().flat_map(BTreeMap::values) {
            let provenance = Provenance {
                object: ObjectKey::new(
                    Kind::DestinationRule,
                    &slot.0,
                    object.metadata.name.as_deref().unwrap_or(""),
                ),
                generation: object.metadata.generation.unwrap_or(0),
                rule: None,
            };
            let clients = object
                .spec
                .workload_selector
                .as_ref()
                .map(|s| s.match_labels.clone())
                .unwrap_or_default();
            let visibility = Visibility::parse(object.spec.export_to.iter().map(String::as_str), &slot.0);
            let position = merged
                .iter()
                .position(|existing| existing.clients == clients && existing.visibility == visibility)
                .unwrap_or_else(|| {
                    merged.push(HostPolicy {
                        host: slot.1.clone(),
                        policy: None,
                        subsets: Vec::new(),
                        clients,
                        visibility,
                        provenance: Vec::new(),
                    });
                    merged.len() - 1
                });
            let existing = &mut merged[position];
            if existing.policy.is_none() {
                existing.policy.clone_from(&object.spec.traffic_policy);
            }
            existing.provenance.push(provenance);
            for subset in &object.spec.subsets {
                if !existing.subsets.iter().any(|known| known.name == subset.name) {
                    existing.subsets.push(subset.clone());
                }
            }
        }
        let hosts = self.merged.entry(slot.0.clone()).or_default();
        if merged.is_empty() {
            hosts.remove(&slot.1);
            self.objects.remove(slot);
        } else {
            hosts.insert(slot.1.clone(), Arc::new(merged));
        }
    }

    /// The one policy that a client applies to a host: that of its own namespace, else the service's, else the root namespace;
    /// within a namespace the most specific host. Nothing is merged across these.
    pub(crate) fn lookup(
        &self,
        host: &str,
        client_namespace: &str,
        client_labels: &BTreeMap<String, String>,
        service_namespace: &str,
        root_namespace: &str,
    ) -> Option<HostPolicy> {
        let own = (client_namespace != root_namespace).then_some(client_namespace);
        let mut tried: Vec<&str> = Vec::new();
        for namespace in own.into_iter().chain([service_namespace, root_namespace]) {
            if tried.contains(&namespace) {
                continue;
            }
            tried.push(namespace);
            let Some(hosts) = self.merged.get(namespace) else {
                continue;
            };
            for pattern in host::patterns(host) {
                let Some(candidates) = hosts.get(pattern.as_str()) else {
                    continue;
                };
                let visible = |policy: &&HostPolicy| {
                    (namespace == client_namespace || policy.visibility.includes(client_namespace))
                        && (policy.clients.is_empty()
                            || (namespace == client_namespace
                                && policy
                                    .clients
                                    .iter()
                                    .all(|(key, value)| client_labels.get(key) == Some(value))))
                };
                // A rule for these very clients goes before the one for all.
                let chosen = candidates
                    .iter()
                    .filter(visible)
                    .find(|policy| !policy.clients.is_empty())
                    .or_else(|| candidates.iter().find(visible));
                if let Some(chosen) = chosen {
                    return Some(chosen.clone());
                }
            }
        }
        None
    }
}
