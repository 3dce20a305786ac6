//! One view: the slots that a group of proxies needs, what they were made from, and how they follow a change.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use serin_model::{Client, Locality, Model, Provenance, Touched, host};
use serin_xds::pb::envoy::config::route::v3 as route_pb;
use serin_xds::resource::{Change, Origin, Resource, ResourceType};

use super::cluster::{self, Side};
use super::listener::{self, InboundPort};
use super::{Interner, Work, outbound, router, wire};

/// What proxies must have in common to share a view.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum ViewKey {
    /// What proxies send to.
    Outbound {
        side: Side,
        client: Client,
        locality: Option<Locality>,
        vhds: bool,
    },
    /// What workloads receive on.
    Inbound(Vec<InboundPort>),
}

/// The units of translation.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Slot {
    /// What every proxy of a side has.
    Builtin,
    /// All clusters of a host.
    Clusters(Arc<str>),
    /// All load assignments of a host.
    Endpoints(Arc<str>),
    /// A listener by name.
    Listener(Arc<str>),
    /// A route configuration.
    Route(Arc<str>),
    /// A virtual host of a route configuration: `(route, host)`.
    VirtualHost(Arc<str>, Arc<str>),
}

/// What translating a slot gave.
#[derive(Default)]
pub(super) struct Built {
    pub(super) resources: Vec<Resource>,
    pub(super) virtual_host: Option<route_pb::VirtualHost>,
    /// Hosts whose service or policy went into it, beside the slot's own.
    pub(super) hosts: BTreeSet<Arc<str>>,
    pub(super) origins: BTreeSet<Origin>,
}

#[derive(Debug)]
struct Filled {
    resources: Vec<Arc<Resource>>,
    hosts: BTreeSet<Arc<str>>,
    virtual_host: Option<Arc<route_pb::VirtualHost>>,
    origins: BTreeSet<Origin>,
}

/// A view.
#[derive(Debug)]
pub(super) struct View {
    pub(super) key: ViewKey,
    slots: BTreeMap<Slot, Filled>,
    resources: BTreeMap<(ResourceType, Arc<str>), Arc<Resource>>,
    /// Which slots a host's service asks for.
    wanted: HashMap<Arc<str>, BTreeSet<Slot>>,
    /// By whom a slot is asked for.
    wanted_by: BTreeMap<Slot, BTreeSet<Arc<str>>>,
    /// Virtual hosts and listeners that a host went into.
    made_from: HashMap<Arc<str>, BTreeSet<Slot>>,
    /// Slots that nobody asks for any more and that are still filled.
    released: Vec<Slot>,
    /// For gateways: what is opened.
    pub(super) router: router::Structure,
}

/// Who asks for slots that no service asks for.
const NOBODY: &str = "";

impl View {
    pub(super) fn build(key: &ViewKey, model: &Model, interner: &mut Interner, work: &mut Work) -> Self {
        let mut view = Self {
            key: key.clone(),
            slots: BTreeMap::new(),
            resources: BTreeMap::new(),
            wanted: HashMap::new(),
            wanted_by: BTreeMap::new(),
            made_from: HashMap::new(),
            released: Vec::new(),
            router: router::Structure::default(),
        };
        let mut dirty = BTreeSet::new();
        view.want(NOBODY.into(), BTreeSet::from([Slot::Builtin]), &mut dirty);
        if let ViewKey::Outbound { side, client, .. } = key {
            for service in model.visible_services(client) {
                view.want(
                    service.host.clone(),
                    outbound::slots(service, model, client, *side),
                    &mut dirty,
                );
            }
            match side {
                Side::Sidecar => {
                    let hosts: Vec<Arc<str>> = model.rule_hosts().cloned().collect();
                    for host in hosts {
                        view.want_named(&host, model, &mut dirty);
                    }
                }
                Side::Router => view.restructure(model, &mut dirty),
            }
        }
        view.fill(dirty, model, interner, work);
        view
    }

    pub(super) fn resources(&self) -> impl Iterator<Item = &Arc<Resource>> {
        self.resources.values()
    }

    pub(super) fn client(&self) -> Option<&Client> {
        match &self.key {
            ViewKey::Outbound { client, .. } => Some(client),
            ViewKey::Inbound(_) => None,
        }
    }

    /// Follows a change of the model; returns what differs for the proxies.
    pub(super) fn update(
        &mut self,
        model: &Model,
        touched: &Touched,
        interner: &mut Interner,
        work: &mut Work,
    ) -> Vec<Change> {
        let (side, client) = match self.key.clone() {
            ViewKey::Outbound { side, client, .. } => (side, client),
            ViewKey::Inbound(ports) => {
                let concerned = |pattern: &Arc<str>| {
                    ports
                        .iter()
                        .any(|port| port.hosts.first().is_some_and(|host| host::covers(pattern, host)))
                };
                let dirty = if touched.policies.iter().any(concerned) {
                    BTreeSet::from([Slot::Builtin])
                } else {
                    BTreeSet::new()
                };
                return self.fill(dirty, model, interner, work);
            }
        };
        let mut dirty = BTreeSet::new();
        for host in &touched.services {
            let slots = model
                .visible_service(host, &client)
                .map(|service| outbound::slots(service, model, &client, side))
                .unwrap_or_default();
            dirty.extend(slots.iter().cloned());
            dirty.extend(self.wanted.get(host).into_iter().flatten().cloned());
            dirty.extend(self.made_from.get(host).into_iter().flatten().cloned());
            self.want(host.clone(), slots, &mut dirty);
            if side == Side::Sidecar {
                // Whether a host that rules name is a service decides who has its virtual host, and on which ports.
                for name in model.rules_around(host) {
                    self.name_changed(&name, model, &client, &mut dirty);
                }
            }
        }
        for host in &touched.endpoints {
            dirty.insert(Slot::Endpoints(host.clone()));
            if let Some(service) = model.visible_service(host, &client)
                && (service.headless || service.addresses.is_empty())
            {
                // Listeners of a headless Service are one per Pod; DNS endpoints are inside the cluster.
                let slots = outbound::slots(service, model, &client, side);
                dirty.insert(Slot::Clusters(host.clone()));
                self.want(host.clone(), slots, &mut dirty);
            }
        }
        for pattern in &touched.policies {
            for host in self.services_under(pattern, model, &client) {
                dirty.insert(Slot::Clusters(host.clone()));
                dirty.insert(Slot::Endpoints(host.clone()));
                dirty.extend(self.made_from.get(&host).into_iter().flatten().cloned());
                dirty.extend(
                    self.wanted
                        .get(&host)
                        .into_iter()
                        .flatten()
                        .filter(|slot| !matches!(slot, Slot::Route(_)))
                        .cloned(),
                );
            }
        }
        match side {
            Side::Sidecar => {
                for pattern in &touched.rules {
                    self.rules_changed(pattern, model, &client, &mut dirty);
                }
            }
            Side::Router => {
                if !touched.gateways.is_empty()
                    || !touched.gateway_rules.is_empty()
                    || !touched.inbound.is_empty()
                {
                    self.restructure(model, &mut dirty);
                }
                for pattern in &touched.rules {
                    dirty.extend(self.router.slots_under(pattern));
                }
            }
        }
        self.fill(dirty, model, interner, work)
    }

    /// The hosts of services that a host or wildcard includes.
    fn services_under(&self, pattern: &Arc<str>, model: &Model, client: &Client) -> Vec<Arc<str>> {
        if !host::is_wildcard(pattern) {
            return vec![pattern.clone()];
        }
        model
            .visible_services(client)
            .filter(|service| host::covers(pattern, &service.host))
            .map(|service| service.host.clone())
            .collect()
    }

    fn rules_changed(
        &mut self,
        pattern: &Arc<str>,
        model: &Model,
        client: &Client,
        dirty: &mut BTreeSet<Slot>,
    ) {
        for host in self.services_under(pattern, model, client) {
            self.virtual_hosts_of(&host, dirty);
            // Listeners of connections that rules may direct; those of HTTP ports are not made from rules.
            let made = self.made_from.get(&host).into_iter().flatten();
            dirty.extend(made.filter(|slot| matches!(slot, Slot::Listener(_))).cloned());
            if let Some(service) = model.visible_service(&host, client)
                && let Some(target) = &service.alias_of
            {
                // An alias has a virtual host of its own only with rules, and else is a name of its target.
                let slots = outbound::slots(service, model, client, Side::Sidecar);
                self.want(host.clone(), slots, dirty);
                self.virtual_hosts_of(target, dirty);
            }
        }
        self.name_changed(pattern, model, client, dirty);
        // Names without a service are served on the ports of the services that the same rules name.
        for other in model.rules_beside(pattern) {
            self.name_changed(&other, model, client, dirty);
        }
    }

    fn virtual_hosts_of(&self, host: &Arc<str>, dirty: &mut BTreeSet<Slot>) {
        let wanted = self.wanted.get(host).into_iter().flatten();
        dirty.extend(
            wanted
                .filter(|slot| matches!(slot, Slot::VirtualHost(_, host) if &**host != outbound::ALLOW_ANY))
                .cloned(),
        );
    }

    /// What rules or services mean for a host that rules name.
    fn name_changed(&mut self, name: &Arc<str>, model: &Model, client: &Client, dirty: &mut BTreeSet<Slot>) {
        self.want_named(name, model, dirty);
        let named = self.wanted.get(&rule_owner(name)).into_iter().flatten();
        dirty.extend(named.cloned());
        // Rules for `web.b` take that name away from the service `web.b.svc.cluster.local`.
        if let Some(owner) = outbound::owner_of_short_name(name, client, model) {
            self.virtual_hosts_of(&owner, dirty);
        }
    }

    /// The virtual host of a host that rules name and no service has.
    fn want_named(&mut self, host: &Arc<str>, model: &Model, dirty: &mut BTreeSet<Slot>) {
        let slots = self
            .client()
            .map(|client| outbound::named_slots(host, model, client))
            .unwrap_or_default();
        self.want(rule_owner(host), slots, dirty);
    }

    /// What a gateway opens, anew; only what differs gets dirty.
    fn restructure(&mut self, model: &Model, dirty: &mut BTreeSet<Slot>) {
        let Some(client) = self.client().cloned() else {
            return;
        };
        let structure = router::Structure::of(model, &client);
        dirty.extend(structure.differing(&self.router));
        let slots = structure.slots();
        self.router = structure;
        self.want("gateways".into(), slots, dirty);
    }

    /// `owner` asks for these slots from now on; what nobody asks for any more is emptied, what is new gets dirty.
    fn want(&mut self, owner: Arc<str>, slots: BTreeSet<Slot>, dirty: &mut BTreeSet<Slot>) {
        let old = self.wanted.remove(&owner).unwrap_or_default();
        for slot in old.difference(&slots) {
            if let Some(owners) = self.wanted_by.get_mut(slot) {
                owners.remove(&owner);
                if owners.is_empty() {
                    self.wanted_by.remove(slot);
                    self.released.push(slot.clone());
                }
            }
            // Gone or shared with others, it is another now.
            self.mark(slot, dirty);
        }
        for slot in slots.difference(&old) {
            self.wanted_by
                .entry(slot.clone())
                .or_default()
                .insert(owner.clone());
            self.mark(slot, dirty);
        }
        if !slots.is_empty() {
            self.wanted.insert(owner, slots);
        }
    }

    fn mark(&self, slot: &Slot, dirty: &mut BTreeSet<Slot>) {
        dirty.insert(slot.clone());
        if let Slot::VirtualHost(route, _) = slot {
            dirty.insert(Slot::Route(route.clone()));
        }
    }

    /// Translates the dirty slots and says what came out different. Route configurations with hosts inline follow their hosts.
    fn fill(
        &mut self,
        mut dirty: BTreeSet<Slot>,
        model: &Model,
        interner: &mut Interner,
        work: &mut Work,
    ) -> Vec<Change> {
        let inline = matches!(self.key, ViewKey::Outbound { vhds: false, .. });
        let mut before = Before::new();
        for slot in std::mem::take(&mut self.released) {
            if !self.wanted_by.contains_key(&slot) {
                self.empty(&slot, &mut before);
            }
        }
        if inline {
            let routes: Vec<Slot> = dirty
                .iter()
                .filter_map(|slot| match slot {
                    Slot::VirtualHost(route, _) => Some(Slot::Route(route.clone())),
                    _ => None,
                })
                .collect();
            dirty.extend(routes);
        }
        // Virtual hosts first: route configurations are assembled from them.
        let (routes, others): (Vec<Slot>, Vec<Slot>) = dirty
            .into_iter()
            .filter(|slot| self.wanted_by.contains_key(slot))
            .partition(|slot| matches!(slot, Slot::Route(_)));
        for slot in others.into_iter().chain(routes) {
            let built = self.translate(&slot, model, inline, work);
            self.empty(&slot, &mut before);
            self.put(slot, built, interner, &mut before);
        }
        self.changes(before)
    }

    fn translate(&self, slot: &Slot, model: &Model, inline: bool, work: &mut Work) -> Built {
        let (side, client, locality) = match &self.key {
            ViewKey::Inbound(ports) => return inbound(slot, ports, model, work),
            ViewKey::Outbound {
                side,
                client,
                locality,
                ..
            } => (*side, client, locality),
        };
        let ctx = outbound::Context {
            model,
            client,
            side,
            locality: locality.as_ref(),
        };
        match slot {
            Slot::Builtin => {
                let mut built = Built::default();
                for cluster in cluster::builtin(side) {
                    work.clusters += 1;
                    built.push(ResourceType::Cluster, &cluster.name.clone(), &cluster);
                }
                if side == Side::Sidecar {
                    work.listeners += 1;
                    let listener = listener::virtual_outbound(ctx.registry_only());
                    built.push(ResourceType::Listener, &listener.name.clone(), &listener);
                }
                built
            }
            Slot::Clusters(host) => {
                let built = ctx.clusters(host);
                work.clusters += built.resources.len() as u64;
                built
            }
            Slot::Endpoints(host) => {
                let built = ctx.endpoints(host);
                work.endpoints += built.resources.len() as u64;
                built
            }
            Slot::Listener(name) => {
                work.listeners += 1;
                match side {
                    Side::Sidecar => ctx.listener(name, self.wanted_by.get(slot)),
                    Side::Router => self.router.listener(&ctx, name),
                }
            }
            Slot::VirtualHost(route, host) => {
                work.virtual_hosts += 1;
                let (made, hosts) = match side {
                    Side::Sidecar => ctx.virtual_host(route, host),
                    Side::Router => self.router.virtual_host(&ctx, route, host),
                };
                let mut built = Built {
                    hosts,
                    ..Built::default()
                };
                if let Some((virtual_host, origins)) = made {
                    built.origins = origins;
                    if !inline {
                        let name = format!("{route}/{}", virtual_host.name);
                        built.push(ResourceType::VirtualHost, &name, &virtual_host);
                    }
                    built.virtual_host = Some(virtual_host);
                }
                built
            }
            Slot::Route(route) => {
                work.routes += 1;
                let mut built = Built::default();
                let first = Slot::VirtualHost(route.clone(), "".into());
                let mut virtual_hosts = Vec::new();
                if inline {
                    for (slot, filled) in self.slots.range(first..) {
                        let Slot::VirtualHost(of, _) = slot else { break };
                        if of != route {
                            break;
                        }
                        virtual_hosts.extend(filled.virtual_host.as_deref().cloned());
                        built.origins.extend(filled.origins.iter().cloned());
                    }
                }
                let message = outbound::route_configuration(route, virtual_hosts, !inline);
                built.push(ResourceType::Route, route, &message);
                built
            }
        }
    }

    fn empty(&mut self, slot: &Slot, before: &mut Before) {
        let Some(filled) = self.slots.remove(slot) else {
            return;
        };
        for resource in filled.resources {
            let name = (resource.resource_type, resource.name.clone());
            self.resources.remove(&name);
            before.entry(name).or_insert(Some(resource));
        }
        for host in filled.hosts {
            if let Some(slots) = self.made_from.get_mut(&host) {
                slots.remove(slot);
                if slots.is_empty() {
                    self.made_from.remove(&host);
                }
            }
        }
    }

    fn put(&mut self, slot: Slot, built: Built, interner: &mut Interner, before: &mut Before) {
        let origins: Arc<[Origin]> = built.origins.iter().cloned().collect();
        let mut resources = Vec::with_capacity(built.resources.len());
        for mut resource in built.resources {
            resource.origins = origins.clone();
            let resource = interner.intern(resource);
            let name = (resource.resource_type, resource.name.clone());
            before.entry(name.clone()).or_insert(None);
            self.resources.insert(name, resource.clone());
            resources.push(resource);
        }
        for host in &built.hosts {
            self.made_from
                .entry(host.clone())
                .or_default()
                .insert(slot.clone());
        }
        let filled = Filled {
            resources,
            hosts: built.hosts,
            virtual_host: built.virtual_host.map(Arc::new),
            origins: built.origins,
        };
        self.slots.insert(slot, filled);
    }

    /// What differs from before, among what was looked at.
    fn changes(&self, before: Before) -> Vec<Change> {
        before
            .into_iter()
            .filter_map(|(name, old)| match (old, self.resources.get(&name)) {
                (Some(old), Some(new)) if old.same_content(new) && old.origins == new.origins => None,
                (_, Some(new)) => Some(Change::Upsert(new.clone())),
                (Some(_), None) => Some(Change::Remove(name.0, name.1)),
                (None, None) => None,
            })
            .collect()
    }
}

/// The resources that were looked at, as they were.
type Before = BTreeMap<(ResourceType, Arc<str>), Option<Arc<Resource>>>;

impl Built {
    pub(super) fn push(&mut self, resource_type: ResourceType, name: &str, message: &impl prost::Message) {
        self.resources
            .push(Resource::new(resource_type, name, message, Vec::new()));
    }

    pub(super) fn origin(&mut self, provenance: &Provenance) {
        self.origins.insert(wire::origin(provenance));
    }
}

/// The inbound side is made from its key alone.
fn inbound(slot: &Slot, ports: &[InboundPort], model: &Model, work: &mut Work) -> Built {
    let mut built = Built::default();
    if *slot != Slot::Builtin {
        return built;
    }
    for port in ports {
        let services: Vec<&serin_model::Service> = port
            .hosts
            .iter()
            .filter_map(|host| model.service(host))
            .map(|service| &**service)
            .collect();
        let service = services.first().copied();
        // The workload is its own client here: rules of its namespace and of the root hold.
        let policy = service.and_then(|service| {
            let client = Client {
                namespace: service.namespace.clone(),
                labels: BTreeMap::new(),
                scope: None,
            };
            model.policy(&service.host, &service.namespace, &client)
        });
        for origin in policy.iter().flat_map(|policy| &policy.provenance) {
            built.origin(origin);
        }
        let cluster = cluster::inbound(
            port.target,
            port.protocol,
            &services,
            policy.as_ref(),
            port.service_port,
        );
        work.clusters += 1;
        built.push(ResourceType::Cluster, &cluster.name.clone(), &cluster);
    }
    work.listeners += 1;
    let listener = listener::virtual_inbound(ports);
    built.push(ResourceType::Listener, &listener.name.clone(), &listener);
    built
}

fn rule_owner(host: &str) -> Arc<str> {
    format!("rules for {host}").into()
}
