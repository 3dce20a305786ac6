//! Model → xDS resources, for each proxy what it needs, and after each change only what changed.
//!
//! Proxies that see the same share a *view* (side, namespace, scope, and labels or locality where these decide anything). A view is made
//! of *slots*, the units of translation: the clusters of a service, its endpoints, one virtual host, one listener. Each change of the model
//! names the elements it touched; the slots made from them are translated again, all others are left alone, and what comes out
//! equal to what was there is not reported. What a workload receives on (its inbound side) is a view of its own, shared by workloads behind
//! the same services.
//!
//! For proxies with [`Features::vhds`](crate::proxy_identity::Features) a route configuration names no hosts, and each virtual host is a
//! resource `<route configuration>/<virtual host>`; for others the hosts are inline, assembled from the same translated virtual hosts.
//!
//! Encodings are shared: equal resources of different views are one allocation.

mod cluster;
mod endpoint;
mod inbound;
mod listener;
mod outbound;
mod resolver;
mod route;
mod router;
#[cfg(test)]
mod tests;
mod view;
mod wire;

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Weak};

use serin_model::{Client, Locality, MeshConfig, Model, Provenance};
use serin_xds::resource::{Change, Resource, ResourceType};

use crate::proxy_identity::{Proxy, ProxyKind};
use view::{View, ViewKey};

/// How often elements were translated, since the beginning. For tests and metrics: the cost must be in what changed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Work {
    /// Cluster resources built.
    pub clusters: u64,
    /// Load assignments built.
    pub endpoints: u64,
    /// Virtual hosts built.
    pub virtual_hosts: u64,
    /// Route configurations built.
    pub routes: u64,
    /// Listeners built.
    pub listeners: u64,
}

/// What a change means for the proxies.
#[derive(Clone, Debug, Default)]
pub struct Touched {
    views: HashMap<ViewKey, Arc<Vec<Change>>>,
    proxies: HashMap<Arc<str>, Vec<Change>>,
    /// The object whose change it was, where it was one object.
    pub cause: Option<Provenance>,
}

impl Touched {
    /// No proxy needs to hear of it.
    pub fn is_empty(&self) -> bool {
        self.views.is_empty() && self.proxies.is_empty()
    }

    /// The resources that changed, each once however many proxies share it.
    pub fn changes(&self) -> impl Iterator<Item = &Change> {
        self.views
            .values()
            .flat_map(|changes| changes.iter())
            .chain(self.proxies.values().flatten())
    }
}

#[derive(Debug)]
struct Assigned {
    proxy: Proxy,
    keys: Vec<ViewKey>,
}

/// Translates the model for the proxies that are connected.
#[derive(Debug)]
pub struct Translator {
    model: Model,
    views: HashMap<ViewKey, View>,
    proxies: HashMap<Arc<str>, Assigned>,
    interned: Interner,
    work: Work,
}

/// The model while changes are taken in that are translated together.
#[derive(Debug)]
pub(crate) struct Intake<'a> {
    model: &'a mut Model,
    touched: serin_model::Touched,
    causes: usize,
}

impl Intake<'_> {
    /// The model with what was taken in so far.
    pub(crate) fn model(&self) -> &Model {
        self.model
    }

    /// See [`Model::bereaves`].
    pub(crate) fn bereaves(&mut self, change: &serin_model::Change) -> Vec<serin_model::Loss> {
        self.model.bereaves(change)
    }

    /// Takes in a change.
    pub(crate) fn take(&mut self, change: serin_model::Change) {
        let one = self.model.apply(change);
        self.causes += usize::from(one.cause.is_some());
        self.touched.merge(one);
    }
}

impl Translator {
    /// A translator of an empty model.
    pub fn new(config: MeshConfig) -> Self {
        Self {
            model: Model::new(config),
            views: HashMap::new(),
            proxies: HashMap::new(),
            interned: Interner::default(),
            work: Work::default(),
        }
    }

    /// The model as it stands.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// How much was translated so far.
    pub fn work(&self) -> Work {
        self.work
    }

    /// Takes in one change of the world.
    pub fn apply(&mut self, change: serin_model::Change) -> Touched {
        self.apply_all([change])
    }

    /// Takes in several changes at once: each resource is translated once, however many of them touched it.
    pub fn apply_all(&mut self, changes: impl IntoIterator<Item = serin_model::Change>) -> Touched {
        self.apply_with(|intake| changes.into_iter().for_each(|change| intake.take(change)))
    }

    /// As [`Translator::apply_all`], of the changes that `take_in` takes in: it sees the model with all changes before each.
    pub(crate) fn apply_with(&mut self, take_in: impl FnOnce(&mut Intake<'_>)) -> Touched {
        let mut intake = Intake {
            model: &mut self.model,
            touched: serin_model::Touched::default(),
            causes: 0,
        };
        take_in(&mut intake);
        let Intake { touched, causes, .. } = intake;
        let mut out = Touched {
            cause: touched.cause.clone().filter(|_| causes == 1),
            ..Touched::default()
        };
        if touched.is_empty() {
            return out;
        }
        let moved = self.moved(&touched);
        let before: Vec<(Arc<str>, Names)> =
            moved.iter().map(|(id, _)| (id.clone(), self.held(id))).collect();
        for (key, view) in &mut self.views {
            let changes = view.update(&self.model, &touched, &mut self.interned, &mut self.work);
            if !changes.is_empty() {
                out.views.insert(key.clone(), Arc::new(changes));
            }
        }
        for ((id, keys), (_, held)) in moved.into_iter().zip(before) {
            for key in &keys {
                self.ensure(key);
            }
            if let Some(assigned) = self.proxies.get_mut(&id) {
                assigned.keys = keys;
            }
            out.proxies.insert(id.clone(), self.difference(&id, held));
        }
        self.collect();
        out
    }

    /// Everything that a proxy needs. From now on the proxy is known, until [`Translator::forget`].
    pub fn resources_for(&mut self, proxy: &Proxy) -> Vec<Arc<Resource>> {
        let keys = self.keys(proxy);
        for key in &keys {
            self.ensure(key);
        }
        let id: Arc<str> = (*proxy.id).into();
        self.proxies.insert(
            id,
            Assigned {
                proxy: proxy.clone(),
                keys: keys.clone(),
            },
        );
        self.collect();
        let mut all: Vec<Arc<Resource>> = keys
            .iter()
            .filter_map(|key| self.views.get(key))
            .flat_map(View::resources)
            .cloned()
            .collect();
        all.sort_by(|a, b| (a.resource_type, &a.name).cmp(&(b.resource_type, &b.name)));
        all
    }

    /// What a proxy needs to hear of a change.
    pub fn changes_for(&self, proxy: &Proxy, touched: &Touched) -> Vec<Change> {
        if let Some(changes) = touched.proxies.get(&*proxy.id) {
            return changes.clone();
        }
        let Some(assigned) = self.proxies.get(&*proxy.id) else {
            return Vec::new();
        };
        assigned
            .keys
            .iter()
            .filter_map(|key| touched.views.get(key))
            .flat_map(|changes| changes.iter().cloned())
            .collect()
    }

    /// The proxy is gone; views that nobody needs any more go too.
    pub fn forget(&mut self, proxy: &str) {
        if self.proxies.remove(proxy).is_some() {
            self.collect();
        }
    }

    /// How many views are kept.
    pub fn views(&self) -> usize {
        self.views.len()
    }

    fn keys(&self, proxy: &Proxy) -> Vec<ViewKey> {
        let namespace: Arc<str> = (*proxy.namespace).into();
        let scope = match proxy.kind {
            ProxyKind::Sidecar => self.model.scope(&namespace, &proxy.labels),
            ProxyKind::Router => None,
        };
        // A gateway is found by its labels, so they always count there.
        let labels = if self.model.labels_matter() || proxy.kind == ProxyKind::Router {
            proxy.labels.clone()
        } else {
            BTreeMap::new()
        };
        let locality = self.model.locality_matters().then(|| Locality {
            region: (*proxy.locality.region).into(),
            zone: (*proxy.locality.zone).into(),
            sub_zone: (*proxy.locality.sub_zone).into(),
        });
        let outbound = ViewKey::Outbound {
            side: match proxy.kind {
                ProxyKind::Sidecar => cluster::Side::Sidecar,
                ProxyKind::Router => cluster::Side::Router,
            },
            client: Client {
                namespace: namespace.clone(),
                labels,
                scope,
            },
            locality,
            vhds: proxy.features.vhds,
        };
        match proxy.kind {
            ProxyKind::Router => vec![outbound],
            ProxyKind::Sidecar => {
                vec![outbound, ViewKey::Inbound(inbound::ports(&self.model, proxy))]
            }
        }
    }

    /// The proxies whose views are others after this change.
    fn moved(&self, touched: &serin_model::Touched) -> Vec<(Arc<str>, Vec<ViewKey>)> {
        if !touched.views && touched.inbound.is_empty() {
            return Vec::new();
        }
        self.proxies
            .iter()
            .filter(|(_, assigned)| touched.views || touched.inbound.contains(&*assigned.proxy.namespace))
            .filter_map(|(id, assigned)| {
                let keys = self.keys(&assigned.proxy);
                (keys != assigned.keys).then(|| (id.clone(), keys))
            })
            .collect()
    }

    fn ensure(&mut self, key: &ViewKey) {
        if !self.views.contains_key(key) {
            let view = View::build(key, &self.model, &mut self.interned, &mut self.work);
            self.views.insert(key.clone(), view);
        }
    }

    fn held(&self, id: &str) -> Names {
        let keys = self
            .proxies
            .get(id)
            .map(|assigned| assigned.keys.as_slice())
            .unwrap_or_default();
        keys.iter()
            .filter_map(|key| self.views.get(key))
            .flat_map(View::resources)
            .map(|resource| ((resource.resource_type, resource.name.clone()), resource.clone()))
            .collect()
    }

    fn difference(&self, id: &str, mut before: Names) -> Vec<Change> {
        let mut changes = Vec::new();
        for (name, resource) in self.held(id) {
            match before.remove(&name) {
                Some(old) if old.same_content(&resource) && old.origins == resource.origins => {}
                _ => changes.push(Change::Upsert(resource)),
            }
        }
        changes.extend(
            before
                .into_keys()
                .map(|(resource_type, name)| Change::Remove(resource_type, name)),
        );
        changes
    }

    fn collect(&mut self) {
        let used: std::collections::HashSet<&ViewKey> = self
            .proxies
            .values()
            .flat_map(|assigned| &assigned.keys)
            .collect();
        if used.len() < self.views.len() {
            let unused: Vec<ViewKey> = self
                .views
                .keys()
                .filter(|key| !used.contains(key))
                .cloned()
                .collect();
            for key in unused {
                self.views.remove(&key);
            }
            self.interned.sweep();
        }
    }
}

type Names = BTreeMap<(ResourceType, Arc<str>), Arc<Resource>>;

/// One allocation for equal resources.
#[derive(Debug, Default)]
pub(crate) struct Interner {
    known: HashMap<(ResourceType, Arc<str>, Arc<str>), Weak<Resource>>,
    inserted: usize,
}

/// After this many insertions, entries that nobody holds are dropped.
const SWEEP_EVERY: usize = 4096;

impl Interner {
    fn intern(&mut self, resource: Resource) -> Arc<Resource> {
        let key = (
            resource.resource_type,
            resource.name.clone(),
            resource.version.clone(),
        );
        if let Some(known) = self.known.get(&key).and_then(Weak::upgrade)
            && known.origins == resource.origins
        {
            return known;
        }
        self.inserted += 1;
        if self.inserted.is_multiple_of(SWEEP_EVERY) {
            self.sweep();
        }
        let resource = Arc::new(resource);
        self.known.insert(key, Arc::downgrade(&resource));
        resource
    }

    fn sweep(&mut self) {
        self.known.retain(|_, resource| resource.strong_count() > 0);
    }
}
