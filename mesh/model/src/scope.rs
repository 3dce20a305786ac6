//! Front end: Sidecar → which services a client workload knows, and what happens to unknown destinations.

use std::collections::BTreeMap;
use std::sync::Arc;

use serin_crds::istio::{OutboundTrafficPolicyMode, Sidecar};

use crate::host;
use crate::object::{Kind, ObjectKey, Provenance, Seniority};
use crate::service::Service;

/// What the sidecars of some workloads know.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Scope {
    /// The object.
    pub provenance: Provenance,
    /// Labels of the workloads; empty means all of the namespace.
    pub workloads: BTreeMap<String, String>,
    /// Namespace of the object.
    pub namespace: Arc<str>,
    /// Hosts that may be reached; empty means all.
    pub hosts: Vec<ScopeHost>,
    /// Unknown destinations are refused (true) or passed on (false); none leaves it to the mesh.
    pub registry_only: Option<bool>,
}

/// `namespace/host` of an egress listener.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ScopeHost {
    /// Namespace of services; none means any.
    pub namespace: Option<Arc<str>>,
    /// Host or wildcard.
    pub host: Arc<str>,
}

impl Scope {
    fn compile(object: &Sidecar) -> Self {
        let namespace = object.metadata.namespace.as_deref().unwrap_or("default");
        let name = object.metadata.name.as_deref().unwrap_or("");
        Self {
            provenance: Provenance {
                object: ObjectKey::new(Kind::Sidecar, namespace, name),
                generation: object.metadata.generation.unwrap_or(0),
                rule: None,
            },
            workloads: object
                .spec
                .workload_selector
                .as_ref()
                .map(|selector| selector.labels.clone())
                .unwrap_or_default(),
            namespace: namespace.into(),
            hosts: object
                .spec
                .egress
                .iter()
                .flat_map(|listener| &listener.hosts)
                .filter_map(|text| {
                    let (space, name) = text.split_once('/')?;
                    Some(ScopeHost {
                        namespace: match space {
                            "*" => None,
                            // `.` depends on the client when the Sidecar is in the root namespace; kept as it is.
                            other => Some(other.into()),
                        },
                        host: name.into(),
                    })
                })
                .collect(),
            registry_only: object
                .spec
                .outbound_traffic_policy
                .as_ref()
                .and_then(|policy| policy.mode)
                .map(|mode| mode == OutboundTrafficPolicyMode::RegistryOnly),
        }
    }

    /// Whether clients of `namespace` in this scope know the service.
    pub fn includes(&self, service: &Service, client_namespace: &str) -> bool {
        self.hosts.is_empty()
            || self.hosts.iter().any(|entry| {
                entry.namespace.as_deref().is_none_or(|space| match space {
                    "." => &*service.namespace == client_namespace,
                    "~" => false,
                    space => &*service.namespace == space,
                }) && host::covers(&entry.host, &service.host)
            })
    }
}

/// All Sidecars.
#[derive(Debug, Default)]
pub(crate) struct ScopeIndex {
    scopes: BTreeMap<Arc<str>, BTreeMap<Seniority, Arc<Scope>>>,
    /// How many select workloads by labels.
    pub(crate) selective: usize,
}

impl ScopeIndex {
    pub(crate) fn set(&mut self, key: &ObjectKey, object: Option<&Sidecar>) {
        if let Some(scopes) = self.scopes.get_mut(&key.namespace) {
            let selective = &mut self.selective;
            scopes.retain(|seniority, scope| {
                let keep = seniority.name != key.name;
                *selective -= usize::from(!keep && !scope.workloads.is_empty());
                keep
            });
            if scopes.is_empty() {
                self.scopes.remove(&key.namespace);
            }
        }
        if let Some(object) = object {
            let scope = Scope::compile(object);
            self.selective += usize::from(!scope.workloads.is_empty());
            let seniority = Seniority::of(&object.metadata, &key.namespace);
            self.scopes
                .entry(key.namespace.clone())
                .or_default()
                .insert(seniority, Arc::new(scope));
        }
    }

    /// The scope of a workload: one that selects it, else its namespace's own, else the root namespace's.
    pub(crate) fn of(
        &self,
        namespace: &str,
        labels: &BTreeMap<String, String>,
        root_namespace: &str,
    ) -> Option<Arc<Scope>> {
        let here = self.scopes.get(namespace);
        let selecting = here.into_iter().flat_map(BTreeMap::values).find(|scope| {
            !scope.workloads.is_empty()
                && scope
                    .workloads
                    .iter()
                    .all(|(key, value)| labels.get(key) == Some(value))
        });
        let plain = |scopes: Option<&BTreeMap<Seniority, Arc<Scope>>>| {
            scopes
                .into_iter()
                .flat_map(BTreeMap::values)
                .find(|scope| scope.workloads.is_empty())
                .cloned()
        };
        selecting
            .cloned()
            .or_else(|| plain(here))
            .or_else(|| plain(self.scopes.get(root_namespace)))
    }
}
