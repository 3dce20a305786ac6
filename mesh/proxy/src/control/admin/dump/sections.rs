//! Section by section: what is asked for of it, as text.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use prost::Message as _;
use serde_json::{Map, Value, json};
use serin_xds::ResourceType;
use serin_xds::pb::envoy::config::cluster::v3 as pb_cluster;

use super::{Mask, Wanted};
use crate::bootstrap::Showing;
use crate::config::store::{Failure, Kept, Store};
use crate::control::Proxy;
use crate::control::admin::fixed;
use crate::observe::time::TimeFormat;

const CLUSTER: &str = "envoy.config.cluster.v3.Cluster";
const LISTENER: &str = "envoy.config.listener.v3.Listener";
const ROUTE: &str = "envoy.config.route.v3.RouteConfiguration";
const VIRTUAL_HOST: &str = "envoy.config.route.v3.VirtualHost";
const ENDPOINTS: &str = "envoy.config.endpoint.v3.ClusterLoadAssignment";

/// A section: its message, and of each of its lists the entries as text. Entry by entry, because the tree of a value is many
/// times as large as its text, and a proxy with thousands of resources should not grow by being looked at.
pub(super) struct Section {
    pub(super) kind: &'static str,
    pub(super) lists: Vec<(&'static str, Vec<String>)>,
    /// Fields that are no lists, as text.
    pub(super) single: Vec<(&'static str, String)>,
}

impl Section {
    fn new(kind: &'static str) -> Self {
        Self {
            kind,
            lists: Vec::new(),
            single: Vec::new(),
        }
    }
}

/// Lines of text, two levels further in.
fn text(entry: &Value) -> String {
    format!("{entry:#}").replace('\n', "\n        ")
}

/// Adds to what is shown of a resource which version it is and when it came, and what of its name was refused since.
struct Provenance<'a> {
    showing: Showing,
    time: TimeFormat,
    store: &'a Store,
}

impl Provenance<'_> {
    fn time(&self, since_1970: u64) -> Value {
        let mut out = String::new();
        self.time.write(Duration::from_millis(since_1970), &mut out);
        out.into()
    }

    /// `version_info` and `last_updated` beside a field with the resource.
    fn state(&self, field: &str, message: &'static str, kept: &Kept) -> Map<String, Value> {
        self.stated(field, self.showing.show(message, &kept.body), kept)
    }

    fn stated(&self, field: &str, shown: Value, kept: &Kept) -> Map<String, Value> {
        let mut out = Map::new();
        if let Some(version) = &kept.version {
            out.insert("version_info".to_owned(), (**version).into());
        }
        out.insert(field.to_owned(), shown);
        out.insert("last_updated".to_owned(), self.time(kept.updated));
        out
    }

    /// A route configuration with the virtual hosts that came by themselves.
    fn route(&self, name: &str, kept: &Kept) -> Map<String, Value> {
        let mut config = self.showing.show(ROUTE, &kept.body);
        let received = self.store.received();
        let discovered: Vec<Value> = received
            .virtual_hosts(name)
            .map(|body| self.showing.show(VIRTUAL_HOST, body))
            .map(|mut host| {
                if let Some(host) = host.as_object_mut() {
                    host.remove("@type");
                }
                host
            })
            .collect();
        if !discovered.is_empty()
            && let Some(map) = config.as_object_mut()
            && let Some(hosts) = map
                .entry("virtual_hosts")
                .or_insert_with(|| json!([]))
                .as_array_mut()
        {
            hosts.extend(discovered);
        }
        self.stated("route_config", config, kept)
    }

    /// An `UpdateFailureState`.
    fn failure(&self, message: &'static str, failure: &Failure) -> Value {
        let mut out = json!({
            "last_update_attempt": self.time(failure.at),
            "details": &*failure.details,
        });
        if !failure.body.is_empty() {
            out["failed_configuration"] = self.showing.show(message, &failure.body);
        }
        if let Some(version) = &failure.version {
            out["version_info"] = (**version).into();
        }
        out
    }
}

/// Of a list of encoded messages in use: those of the bootstrap, or those that came later.
fn of_kind<'k>(
    kept: impl Iterator<Item = (&'k str, &'k Kept)>,
    is_static: bool,
) -> impl Iterator<Item = (&'k str, &'k Kept)> {
    kept.filter(move |(_, kept)| kept.is_static == is_static)
}

/// Asks for everything.
static WHOLE: Mask = Mask(BTreeMap::new());

/// The sections of which something is asked for.
pub(super) fn sections(proxy: &Proxy, wanted: &Wanted<'_>, mask: Option<&Mask>) -> Vec<Section> {
    proxy.store(|store| {
        let secrets = fixed::secrets(store.secrets());
        let dump = Dump {
            wanted,
            mask,
            provenance: Provenance {
                showing: Showing::new(),
                time: TimeFormat::rfc3339(),
                store,
            },
        };
        let mut sections = vec![
            dump.bootstrap(proxy),
            dump.clusters(),
            dump.endpoints(),
            dump.listeners(),
            dump.routes(),
            dump.secrets(secrets),
        ];
        sections.retain(|section| !section.lists.is_empty() || !section.single.is_empty());
        sections
    })
}

/// A look at the store.
struct Dump<'a> {
    wanted: &'a Wanted<'a>,
    mask: Option<&'a Mask>,
    provenance: Provenance<'a>,
}

impl Dump<'_> {
    fn fits(&self, name: &str) -> bool {
        self.wanted.named.is_none_or(|named| named.is_match(name))
    }

    /// What of the entries of a field is wanted; nothing where the field is not.
    fn asked(&self, field: &str) -> Option<&Mask> {
        match (self.wanted.resource, self.mask) {
            (Some(resource), mask) => (resource == field).then_some(mask.unwrap_or(&WHOLE)),
            (None, None) => Some(&WHOLE),
            (None, Some(mask)) => mask.0.get(field),
        }
    }

    fn bootstrap(&self, proxy: &Proxy) -> Section {
        let mut section = Section::new("BootstrapConfigDump");
        if let Some(mask) = self.asked("bootstrap").filter(|_| self.wanted.resource.is_none()) {
            let shown = fixed::bootstrap(proxy, &self.provenance.showing);
            section.single.push(("bootstrap", masked(&shown, mask)));
            let updated = self.provenance.time(proxy.bootstrap.updated);
            section.single.push(("last_updated", updated.to_string()));
        }
        section
    }

    fn clusters(&self) -> Section {
        let mut section = Section::new("ClustersConfigDump");
        let received = self.provenance.store.received();
        let state = |kept: &Kept| self.provenance.state("cluster", CLUSTER, kept);
        if let Some(mask) = self.asked("static_clusters") {
            let kept = of_kind(received.clusters(), true);
            let entries = self.in_use(kept, mask, state);
            section.lists.push(("static_clusters", entries));
        }
        if let Some(mask) = self.asked("dynamic_active_clusters") {
            let of = (ResourceType::Cluster, CLUSTER);
            let kept = of_kind(received.clusters(), false);
            let entries = self.entries(of, kept, mask, |_, kept| kept.map_or_else(Map::new, state));
            section.lists.push(("dynamic_active_clusters", entries));
        }
        section
    }

    fn endpoints(&self) -> Section {
        let mut section = Section::new("EndpointsConfigDump");
        if !self.wanted.endpoints {
            return section;
        }
        let store = self.provenance.store;
        if let Some(mask) = self.asked("static_endpoint_configs") {
            let clusters = store.received().clusters().filter(|(name, _)| self.fits(name));
            let entries = clusters.filter_map(|(_, kept)| {
                let cluster = pb_cluster::Cluster::decode(&*kept.body).ok()?;
                let body = cluster.load_assignment?.encode_to_vec();
                let shown = self.provenance.showing.show(ENDPOINTS, &body);
                Some(masked(&json!({ "endpoint_config": shown }), mask))
            });
            section.lists.push(("static_endpoint_configs", entries.collect()));
        }
        if let Some(mask) = self.asked("dynamic_endpoint_configs") {
            let of = (ResourceType::Endpoints, ENDPOINTS);
            let state = |kept: &Kept| self.provenance.state("endpoint_config", ENDPOINTS, kept);
            let entries = self.entries(of, store.assignments(), mask, |_, kept| {
                kept.map_or_else(Map::new, state)
            });
            section.lists.push(("dynamic_endpoint_configs", entries));
        }
        section
    }

    fn listeners(&self) -> Section {
        let mut section = Section::new("ListenersConfigDump");
        let received = self.provenance.store.received();
        let state = |kept: &Kept| self.provenance.state("listener", LISTENER, kept);
        if let Some(mask) = self.asked("static_listeners") {
            let kept = of_kind(received.listeners(), true);
            let entries = self.in_use(kept, mask, state);
            section.lists.push(("static_listeners", entries));
        }
        if let Some(mask) = self.asked("dynamic_listeners") {
            let of = (ResourceType::Listener, LISTENER);
            let kept = of_kind(received.listeners(), false);
            let entries = self.entries(of, kept, mask, |name, kept| {
                let mut entry = Map::new();
                entry.insert("name".to_owned(), name.into());
                if let Some(kept) = kept {
                    entry.insert("active_state".to_owned(), state(kept).into());
                }
                entry
            });
            section.lists.push(("dynamic_listeners", entries));
        }
        section
    }

    fn routes(&self) -> Section {
        let mut section = Section::new("RoutesConfigDump");
        let provenance = &self.provenance;
        let received = provenance.store.received();
        if let Some(mask) = self.asked("static_route_configs") {
            let inline = received.listeners().flat_map(|(_, kept)| {
                let configs = fixed::inline_routes(&kept.body).into_iter();
                configs.map(|(name, body)| (name, body, kept.updated))
            });
            let entries = inline
                .filter(|(name, ..)| self.fits(name))
                .map(|(_, body, updated)| {
                    let shown = provenance.showing.show(ROUTE, &body);
                    let updated = provenance.time(updated);
                    masked(&json!({ "route_config": shown, "last_updated": updated }), mask)
                });
            section.lists.push(("static_route_configs", entries.collect()));
        }
        if let Some(mask) = self.asked("dynamic_route_configs") {
            let of = (ResourceType::Route, ROUTE);
            let entries = self.entries(of, received.routes(), mask, |name, kept| {
                kept.map_or_else(Map::new, |kept| provenance.route(name, kept))
            });
            section.lists.push(("dynamic_route_configs", entries));
        }
        section
    }

    /// Those of the bootstrap, and the others.
    fn secrets(&self, (of_bootstrap, others): (fixed::Entries, fixed::Entries)) -> Section {
        let mut section = Section::new("SecretsConfigDump");
        for (field, all) in [
            ("static_secrets", of_bootstrap),
            ("dynamic_active_secrets", others),
        ] {
            if let Some(mask) = self.asked(field) {
                let entries = all.into_iter().filter(|(name, _)| self.fits(name));
                let entries = entries.map(|(_, entry)| masked(&entry, mask)).collect();
                section.lists.push((field, entries));
            }
        }
        section
    }

    /// Entries of what is in use and was never refused, since it is of the bootstrap.
    fn in_use<'k>(
        &self,
        kept: impl Iterator<Item = (&'k str, &'k Kept)>,
        mask: &Mask,
        entry: impl Fn(&Kept) -> Map<String, Value>,
    ) -> Vec<String> {
        kept.filter(|(name, _)| self.fits(name))
            .map(|(_, kept)| masked(&entry(kept).into(), mask))
            .collect()
    }

    /// Entries of a section: those in use, with what was refused since, and those of which nothing was ever taken.
    fn entries<'k>(
        &self,
        (resource_type, message): (ResourceType, &'static str),
        kept: impl Iterator<Item = (&'k str, &'k Kept)>,
        mask: &Mask,
        entry: impl Fn(&str, Option<&Kept>) -> Map<String, Value>,
    ) -> Vec<String> {
        let mut out = Vec::new();
        let received = self.provenance.store.received();
        let mut shown = BTreeSet::new();
        let failed = |mut entry: Map<String, Value>, failure: &Failure| {
            let failure = self.provenance.failure(message, failure);
            entry.insert("error_state".to_owned(), failure);
            entry
        };
        for (name, kept) in kept.filter(|(name, _)| self.fits(name)) {
            let mut entry = entry(name, Some(kept));
            if let Some(failure) = received.failure(resource_type, name) {
                shown.insert(name);
                entry = failed(entry, failure);
            }
            out.push(masked(&entry.into(), mask));
        }
        let never = received
            .failures(resource_type)
            .filter(|(name, _)| self.fits(name) && !shown.contains(name));
        for (name, failure) in never {
            let entry = failed(entry(name, None), failure);
            out.push(masked(&entry.into(), mask));
        }
        out
    }
}

fn masked(value: &Value, mask: &Mask) -> String {
    if mask.is_whole() {
        return text(value);
    }
    text(&mask.apply(value))
}
