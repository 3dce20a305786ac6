//! All VirtualServices, compiled, and found by host.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;
use std::sync::Arc;

use serin_crds::istio::VirtualService;

use crate::host;
use crate::object::{ObjectKey, Seniority};
use crate::route::RuleSet;
use crate::service::Visibility;
use crate::virtual_service::{compile, delegations};

#[derive(Debug)]
struct Entry {
    object: Arc<VirtualService>,
    seniority: Seniority,
    rules: Arc<RuleSet>,
    targets: Vec<ObjectKey>,
}

impl Entry {
    /// The gateways that apply it.
    fn gateways(&self) -> impl Iterator<Item = &Arc<str>> {
        let all = self.rules.gateways.iter();
        all.filter(|gateway| &***gateway != crate::route::MESH)
    }
}

/// What decides which virtual hosts a gateway has, as opposed to what is in them.
fn shape(entry: &Entry) -> impl PartialEq + use<'_> {
    (
        &entry.rules.hosts,
        &entry.rules.gateways,
        entry.rules.http.is_empty(),
        &entry.rules.visibility,
        &entry.seniority,
    )
}

/// VirtualServices by key, host and delegate.
#[derive(Debug, Default)]
pub(crate) struct RuleIndex {
    entries: BTreeMap<ObjectKey, Entry>,
    /// Host or wildcard → rule sets for sidecars, senior first.
    mesh: BTreeMap<Arc<str>, BTreeMap<Seniority, Arc<RuleSet>>>,
    /// Gateway (`namespace/name`) → rule sets bound to it, senior first.
    gateways: BTreeMap<Arc<str>, BTreeMap<Seniority, Arc<RuleSet>>>,
    /// Delegate → roots that name it.
    roots: BTreeMap<ObjectKey, BTreeSet<ObjectKey>>,
    /// Host → objects whose rules send requests or connections to it.
    named: BTreeMap<Arc<str>, BTreeSet<ObjectKey>>,
    /// Rules that are for some client workloads only.
    pub(crate) selective: usize,
}

/// What a change of one VirtualService touched.
#[derive(Debug, Default)]
pub(crate) struct TouchedRules {
    /// Hosts of rule sets that changed, before and after.
    pub(crate) hosts: BTreeSet<Arc<str>>,
    /// Gateways whose set of rule sets or hosts changed (not merely the content of rules).
    pub(crate) gateways: BTreeSet<Arc<str>>,
}

fn is_selective(rules: &RuleSet) -> bool {
    let connection = |routes: &[crate::route::ConnectionRoute]| {
        routes
            .iter()
            .flat_map(|route| &route.matches)
            .any(|m| !m.audience.labels.is_empty())
    };
    rules.http.iter().any(|route| !route.audience.labels.is_empty())
        || connection(&rules.tls)
        || connection(&rules.tcp)
}

impl RuleIndex {
    pub(crate) fn set(
        &mut self,
        key: &ObjectKey,
        object: Option<Arc<VirtualService>>,
        domain: &str,
    ) -> TouchedRules {
        let mut touched = TouchedRules::default();
        self.replace(key, object, domain, &mut touched);
        let roots: Vec<ObjectKey> = self
            .roots
            .get(key)
            .into_iter()
            .flatten()
            .filter(|root| *root != key)
            .cloned()
            .collect();
        for root in roots {
            if let Some(object) = self.entries.get(&root).map(|entry| entry.object.clone()) {
                self.replace(&root, Some(object), domain, &mut touched);
            }
        }
        touched
    }

    fn replace(
        &mut self,
        key: &ObjectKey,
        object: Option<Arc<VirtualService>>,
        domain: &str,
        touched: &mut TouchedRules,
    ) {
        let old = self.entries.remove(key);
        if let Some(old) = &old {
            self.leave(key, old);
            touched.hosts.extend(old.rules.hosts.iter().cloned());
        }
        if let Some(object) = object {
            let new = self.compiled(key, object, domain);
            self.enter(key, &new);
            touched.hosts.extend(new.rules.hosts.iter().cloned());
            self.entries.insert(key.clone(), new);
        }
        let new = self.entries.get(key);
        if old.as_ref().map(shape) != new.map(shape) {
            for entry in old.iter().chain(new) {
                touched.gateways.extend(entry.gateways().cloned());
            }
        }
    }

    /// Compiles an object with those that it delegates to, as far as they are here and let it.
    fn compiled(&self, key: &ObjectKey, object: Arc<VirtualService>, domain: &str) -> Entry {
        let rules = compile(&object, domain, |target| {
            let child = &self.entries.get(target)?.object;
            let namespace = child.metadata.namespace.as_deref().unwrap_or("default");
            Visibility::parse(child.spec.export_to.iter().map(String::as_str), namespace)
                .includes(&key.namespace)
                .then_some(&**child)
        });
        let targets = delegations(&object)
            .into_iter()
            .map(|delegation| delegation.target)
            .collect();
        Entry {
            seniority: Seniority::of(&object.metadata, &key.namespace),
            object,
            rules: Arc::new(rules),
            targets,
        }
    }

    /// Takes an entry out of everything that leads to it.
    fn leave(&mut self, key: &ObjectKey, old: &Entry) {
        self.selective -= usize::from(is_selective(&old.rules));
        for host in &old.rules.hosts {
            take(&mut self.mesh, host, &old.seniority);
        }
        for gateway in &old.rules.gateways {
            take(&mut self.gateways, gateway, &old.seniority);
        }
        for target in &old.targets {
            if let Some(roots) = self.roots.get_mut(target) {
                roots.remove(key);
                if roots.is_empty() {
                    self.roots.remove(target);
                }
            }
        }
        for host in old.rules.destinations().map(|backend| &backend.host) {
            if let Some(keys) = self.named.get_mut(host) {
                keys.remove(key);
                if keys.is_empty() {
                    self.named.remove(host);
                }
            }
        }
    }

    /// Lets everything that leads to an entry lead to it.
    fn enter(&mut self, key: &ObjectKey, new: &Entry) {
        self.selective += usize::from(is_selective(&new.rules));
        if new.rules.in_mesh() {
            for host in &new.rules.hosts {
                self.mesh
                    .entry(host.clone())
                    .or_default()
                    .insert(new.seniority.clone(), new.rules.clone());
            }
        }
        for gateway in new.gateways() {
            self.gateways
                .entry(gateway.clone())
                .or_default()
                .insert(new.seniority.clone(), new.rules.clone());
        }
        for target in &new.targets {
            self.roots.entry(target.clone()).or_default().insert(key.clone());
        }
        for backend in new.rules.destinations() {
            let keys = self.named.entry(backend.host.clone()).or_default();
            keys.insert(key.clone());
        }
    }

    /// The compiled rules of an object.
    pub(crate) fn get(&self, key: &ObjectKey) -> Option<&Arc<RuleSet>> {
        self.entries.get(key).map(|entry| &entry.rules)
    }

    /// Rules that send requests or connections to a host, or to any host that a wildcard covers.
    pub(crate) fn naming(&self, pattern: &str) -> Vec<(ObjectKey, Arc<RuleSet>)> {
        let exact = self.named.get(pattern).filter(|_| !host::is_wildcard(pattern));
        let covered = self
            .named
            .iter()
            .filter(|(host, _)| host::is_wildcard(pattern) && host::covers(pattern, host))
            .map(|(_, keys)| keys);
        let keys: BTreeSet<&ObjectKey> = exact.into_iter().chain(covered).flatten().collect();
        keys.into_iter()
            .filter_map(|key| Some((key.clone(), self.entries.get(key)?.rules.clone())))
            .collect()
    }

    /// The senior visible rule set for exactly this host or wildcard.
    pub(crate) fn exact(&self, pattern: &str, namespace: &str) -> Option<&Arc<RuleSet>> {
        self.mesh
            .get(pattern)?
            .values()
            .find(|rules| rules.visibility.includes(namespace))
    }

    /// The rule set that sidecars of `namespace` use for a host: that of the most specific host, the senior of equals.
    pub(crate) fn for_host(&self, host: &str, namespace: &str) -> Option<&Arc<RuleSet>> {
        // Looking up every suffix is only worth while there are wildcards.
        if self.wildcards().next().is_none() {
            return self.exact(host, namespace);
        }
        host::patterns(host).find_map(|pattern| self.exact(&pattern, namespace))
    }

    /// Hosts and wildcards that some rule set for sidecars names.
    pub(crate) fn mesh_hosts(&self) -> impl Iterator<Item = &Arc<str>> {
        self.mesh.keys()
    }

    fn wildcards(&self) -> impl Iterator<Item = &Arc<str>> {
        self.mesh
            .range::<str, _>((Bound::Included("*"), Bound::Unbounded))
            .map(|(pattern, _)| pattern)
            .take_while(|pattern| host::is_wildcard(pattern))
    }

    /// Hosts named together with this one.
    pub(crate) fn beside(&self, host: &str) -> BTreeSet<Arc<str>> {
        self.mesh
            .get(host)
            .into_iter()
            .flat_map(BTreeMap::values)
            .flat_map(|rules| rules.hosts.iter().cloned())
            .collect()
    }

    /// The host itself, hosts named together with it, and wildcards that include it.
    pub(crate) fn around(&self, host: &str) -> BTreeSet<Arc<str>> {
        let mut found: BTreeSet<Arc<str>> = self
            .wildcards()
            .filter(|pattern| host::covers(pattern, host))
            .cloned()
            .collect();
        found.extend(self.beside(host));
        found.insert(host.into());
        found
    }

    /// Rule sets bound to a gateway, senior first.
    pub(crate) fn of_gateway(&self, gateway: &str) -> impl Iterator<Item = &Arc<RuleSet>> {
        self.gateways.get(gateway).into_iter().flat_map(BTreeMap::values)
    }
}

fn take(
    index: &mut BTreeMap<Arc<str>, BTreeMap<Seniority, Arc<RuleSet>>>,
    name: &Arc<str>,
    seniority: &Seniority,
) {
    if let Some(sets) = index.get_mut(name) {
        sets.remove(seniority);
        if sets.is_empty() {
            index.remove(name);
        }
    }
}
