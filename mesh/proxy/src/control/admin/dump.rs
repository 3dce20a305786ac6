//! `/config_dump`: Envoy's sections, with the resources as they were received.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::time::Duration;

use prost::Message as _;
use serde_json::{Map, Value, json};
use serin_xds::ResourceType;
use serin_xds::pb::envoy::config::cluster::v3 as pb_cluster;

use super::{Proxy, fixed};
use crate::bootstrap::Showing;
use crate::config::store::{Failure, Kept, Store};
use crate::observe::time::TimeFormat;

const CLUSTER: &str = "envoy.config.cluster.v3.Cluster";
const LISTENER: &str = "envoy.config.listener.v3.Listener";
const ROUTE: &str = "envoy.config.route.v3.RouteConfiguration";
const VIRTUAL_HOST: &str = "envoy.config.route.v3.VirtualHost";
const ENDPOINTS: &str = "envoy.config.endpoint.v3.ClusterLoadAssignment";
/// Paths of a mask.
const MAX_PATHS: usize = 64;

/// What of the configuration is wanted.
#[derive(Debug, Default)]
pub(super) struct Wanted<'a> {
    /// A field of a section instead of all sections.
    pub resource: Option<&'a str>,
    /// Resources whose name matches somewhere.
    pub named: Option<&'a regex::Regex>,
    /// Fields of sections, or of the resources where `resource` is given (`google.protobuf.FieldMask`).
    pub mask: Option<&'a str>,
    /// Endpoints as well.
    pub endpoints: bool,
}

/// Why there is no dump.
#[derive(Debug, thiserror::Error)]
pub(super) enum DumpError {
    /// No section has that field.
    #[error("{0} not found in config dump")]
    NoResource(String),
    /// The mask names nothing, or is none.
    #[error("FieldMask {0:?} could not be successfully applied to any configs.")]
    Mask(String),
}

/// A section: its message, and of each of its lists the entries as text. Entry by entry, because the tree of a value is many
/// times as large as its text, and a proxy with thousands of resources should not grow by being looked at.
struct Section {
    kind: &'static str,
    lists: Vec<(&'static str, Vec<String>)>,
    /// Fields that are no lists, as text.
    single: Vec<(&'static str, String)>,
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

    /// Entries of what is in use and was never refused, since it is of the bootstrap.
    fn in_use<'k>(
        &self,
        field: &str,
        message: &'static str,
        kept: impl Iterator<Item = (&'k str, &'k Kept)>,
        fits: impl Fn(&str) -> bool,
        mask: Option<&Mask>,
    ) -> Vec<String> {
        kept.filter(|(name, _)| fits(name))
            .map(|(_, kept)| {
                let entry: Value = self.state(field, message, kept).into();
                match mask {
                    Some(mask) => text(&mask.apply(&entry)),
                    None => text(&entry),
                }
            })
            .collect()
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

    /// Entries of a section: those in use, with what was refused since, and those of which nothing was ever taken.
    fn entries<'k>(
        &self,
        (resource_type, message): (ResourceType, &'static str),
        kept: impl Iterator<Item = (&'k str, &'k Kept)>,
        fits: impl Fn(&str) -> bool,
        mask: Option<&Mask>,
        mut entry: impl FnMut(&str, Option<&Kept>) -> Map<String, Value>,
    ) -> Vec<String> {
        let in_text = |entry: Map<String, Value>| match mask {
            Some(mask) => text(&mask.apply(&entry.into())),
            None => text(&entry.into()),
        };
        let mut out = Vec::new();
        let received = self.store.received();
        let mut shown = BTreeSet::new();
        for (name, kept) in kept.filter(|(name, _)| fits(name)) {
            let mut entry = entry(name, Some(kept));
            if let Some(failure) = received.failure(resource_type, name) {
                shown.insert(name);
                entry.insert("error_state".to_owned(), self.failure(message, failure));
            }
            out.push(in_text(entry));
        }
        let never = received
            .failures(resource_type)
            .filter(|(name, _)| fits(name) && !shown.contains(name));
        for (name, failure) in never {
            let mut entry = entry(name, None);
            entry.insert("error_state".to_owned(), self.failure(message, failure));
            out.push(in_text(entry));
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

fn sections(proxy: &Proxy, wanted: &Wanted<'_>, mask: Option<&Mask>) -> Vec<Section> {
    let fits = |name: &str| wanted.named.is_none_or(|named| named.is_match(name));
    // What of the entries of a field is wanted; nothing where the field is not.
    let asked = |field: &str| -> Option<Option<&Mask>> {
        match (wanted.resource, mask) {
            (Some(resource), mask) => (resource == field).then_some(mask),
            (None, None) => Some(None),
            (None, Some(mask)) => mask.0.get(field).map(Some),
        }
    };
    let masked = |value: Value, mask: Option<&Mask>| match mask {
        Some(mask) => text(&mask.apply(&value)),
        None => text(&value),
    };
    proxy.store(|store| {
        let (secrets_static, secrets_dynamic) = fixed::secrets(store.secrets());
        let provenance = Provenance {
            showing: Showing::new(),
            time: TimeFormat::rfc3339(),
            store,
        };
        let showing = &provenance.showing;
        let received = store.received();
        let mut out = Vec::new();
        let mut bootstrap = Section::new("BootstrapConfigDump");
        if let Some(mask) = asked("bootstrap").filter(|_| wanted.resource.is_none()) {
            let shown = fixed::bootstrap(proxy, showing);
            bootstrap.single.push(("bootstrap", masked(shown, mask)));
            let updated = provenance.time(proxy.bootstrap.updated);
            bootstrap.single.push(("last_updated", updated.to_string()));
        }
        out.push(bootstrap);
        let mut clusters = Section::new("ClustersConfigDump");
        let of = (ResourceType::Cluster, CLUSTER);
        if let Some(mask) = asked("static_clusters") {
            let kept = of_kind(received.clusters(), true);
            let entries = provenance.in_use("cluster", CLUSTER, kept, fits, mask);
            clusters.lists.push(("static_clusters", entries));
        }
        if let Some(mask) = asked("dynamic_active_clusters") {
            let kept = of_kind(received.clusters(), false);
            let entries = provenance.entries(of, kept, fits, mask, |_, kept| {
                kept.map_or_else(Map::new, |kept| provenance.state("cluster", CLUSTER, kept))
            });
            clusters.lists.push(("dynamic_active_clusters", entries));
        }
        out.push(clusters);
        let mut endpoints = Section::new("EndpointsConfigDump");
        if wanted.endpoints
            && let Some(mask) = asked("static_endpoint_configs")
        {
            let clusters = received.clusters().filter(|(name, _)| fits(name));
            let entries = clusters.filter_map(|(_, kept)| {
                let cluster = pb_cluster::Cluster::decode(&*kept.body).ok()?;
                let body = cluster.load_assignment?.encode_to_vec();
                let shown = showing.show(ENDPOINTS, &body);
                Some(masked(json!({ "endpoint_config": shown }), mask))
            });
            endpoints
                .lists
                .push(("static_endpoint_configs", entries.collect()));
        }
        if wanted.endpoints
            && let Some(mask) = asked("dynamic_endpoint_configs")
        {
            let of = (ResourceType::Endpoints, ENDPOINTS);
            let entries = provenance.entries(of, store.assignments(), fits, mask, |_, kept| {
                kept.map_or_else(Map::new, |kept| {
                    provenance.state("endpoint_config", ENDPOINTS, kept)
                })
            });
            endpoints.lists.push(("dynamic_endpoint_configs", entries));
        }
        out.push(endpoints);
        let mut listeners = Section::new("ListenersConfigDump");
        let of = (ResourceType::Listener, LISTENER);
        if let Some(mask) = asked("static_listeners") {
            let kept = of_kind(received.listeners(), true);
            let entries = provenance.in_use("listener", LISTENER, kept, fits, mask);
            listeners.lists.push(("static_listeners", entries));
        }
        if let Some(mask) = asked("dynamic_listeners") {
            let kept = of_kind(received.listeners(), false);
            let entries = provenance.entries(of, kept, fits, mask, |name, kept| {
                let mut entry = Map::new();
                entry.insert("name".to_owned(), name.into());
                if let Some(kept) = kept {
                    let state = provenance.state("listener", LISTENER, kept);
                    entry.insert("active_state".to_owned(), state.into());
                }
                entry
            });
            listeners.lists.push(("dynamic_listeners", entries));
        }
        out.push(listeners);
        let mut routes = Section::new("RoutesConfigDump");
        if let Some(mask) = asked("static_route_configs") {
            let inline = received.listeners().flat_map(|(_, kept)| {
                let configs = fixed::inline_routes(&kept.body).into_iter();
                configs.map(|(name, body)| (name, body, kept.updated))
            });
            let entries = inline.filter(|(name, ..)| fits(name)).map(|(_, body, updated)| {
                let shown = showing.show(ROUTE, &body);
                masked(
                    json!({ "route_config": shown, "last_updated": provenance.time(updated) }),
                    mask,
                )
            });
            routes.lists.push(("static_route_configs", entries.collect()));
        }
        if let Some(mask) = asked("dynamic_route_configs") {
            let of = (ResourceType::Route, ROUTE);
            let entries = provenance.entries(of, received.routes(), fits, mask, |name, kept| {
                kept.map_or_else(Map::new, |kept| provenance.route(name, kept))
            });
            routes.lists.push(("dynamic_route_configs", entries));
        }
        out.push(routes);
        let mut secrets = Section::new("SecretsConfigDump");
        for (field, all) in [
            ("static_secrets", secrets_static),
            ("dynamic_active_secrets", secrets_dynamic),
        ] {
            if let Some(mask) = asked(field) {
                let entries = all.into_iter().filter(|(name, _)| fits(name));
                let entries = entries.map(|(_, entry)| masked(entry, mask)).collect();
                secrets.lists.push((field, entries));
            }
        }
        out.push(secrets);
        out.retain(|section| !section.lists.is_empty() || !section.single.is_empty());
        out
    })
}

/// The dump, as text.
pub(super) fn config_dump(proxy: &Proxy, wanted: &Wanted<'_>) -> Result<String, DumpError> {
    let mask = wanted.mask.map(Mask::parse).transpose()?;
    let sections = sections(proxy, wanted, mask.as_ref());
    if sections.is_empty() {
        return Err(match wanted.resource {
            Some(resource) => DumpError::NoResource(resource.to_owned()),
            None => DumpError::Mask(wanted.mask.unwrap_or_default().to_owned()),
        });
    }
    let mut out = String::from("{\n  \"configs\": [");
    for (index, section) in sections.into_iter().enumerate() {
        let lists = section.lists.into_iter();
        if wanted.resource.is_some() {
            for (_, entries) in lists {
                let _ = write!(out, "\n        {}", entries.join(",\n        "));
            }
            continue;
        }
        let comma = if index == 0 { "" } else { "," };
        // Writing to a String cannot fail.
        let _ = write!(
            out,
            "{comma}\n    {{\n      \"@type\": \"type.googleapis.com/envoy.admin.v3.{}\"",
            section.kind
        );
        for (field, value) in section.single {
            let _ = write!(out, ",\n      \"{field}\": {value}");
        }
        for (field, entries) in lists.filter(|(_, entries)| !entries.is_empty()) {
            let entries = entries.join(",\n        ");
            let _ = write!(out, ",\n      \"{field}\": [\n        {entries}\n      ]");
        }
        out.push_str("\n    }");
    }
    out.push_str("\n  ]\n}\n");
    Ok(out)
}

/// A `FieldMask`: fields, and fields within them; a field without fields of its own is wanted whole.
#[derive(Debug, Default)]
struct Mask(std::collections::BTreeMap<String, Mask>);

impl Mask {
    fn parse(text: &str) -> Result<Self, DumpError> {
        let bad = || DumpError::Mask(text.to_owned());
        let mut out = Self::default();
        if text.split(',').count() > MAX_PATHS {
            return Err(bad());
        }
        for path in text.split(',') {
            let mut at = &mut out;
            for field in path.split('.') {
                let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
                if field.is_empty() || !field.bytes().all(plain) {
                    return Err(bad());
                }
                at = at.0.entry(field.to_owned()).or_default();
            }
        }
        Ok(out)
    }

    /// The wanted fields of a value; of a list, those of each of its values. A type is kept, so that it can be read.
    fn apply(&self, value: &Value) -> Value {
        if self.0.is_empty() {
            return value.clone();
        }
        match value {
            Value::Object(map) => {
                let mut out = Map::new();
                for (key, inner) in map {
                    if let Some(mask) = self.0.get(key) {
                        out.insert(key.clone(), mask.apply(inner));
                    } else if key == "@type" {
                        out.insert(key.clone(), inner.clone());
                    }
                }
                out.into()
            }
            Value::Array(list) => list.iter().map(|value| self.apply(value)).collect(),
            other => other.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mask_leaves_the_fields_that_it_names_and_what_is_within_them() {
        let value =
            json!({"a": {"b": 1, "c": {"d": 2, "e": 3}}, "f": [{"b": 1, "g": 2}], "@type": "t", "h": 1});
        for (mask, expected) in [
            ("a", json!({"a": {"b": 1, "c": {"d": 2, "e": 3}}, "@type": "t"})),
            ("a.c.d,h", json!({"a": {"c": {"d": 2}}, "h": 1, "@type": "t"})),
            ("f.g", json!({"f": [{"g": 2}], "@type": "t"})),
            ("nothing", json!({"@type": "t"})),
        ] {
            assert_eq!(Mask::parse(mask).unwrap().apply(&value), expected, "{mask}");
        }
        for bad in ["", "a..b", "a b", ",", "a,"] {
            assert!(Mask::parse(bad).is_err(), "{bad:?}");
        }
    }
}
