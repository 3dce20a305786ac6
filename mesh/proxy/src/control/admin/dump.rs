//! `/config_dump`: Envoy's sections, with the resources as they were received.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::time::Duration;

use serde_json::{Map, Value, json};
use serin_xds::ResourceType;

use super::Proxy;
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

/// A section: its message, its field, its entries as text. Entry by entry, because the tree of a value is many times as
/// large as its text, and a proxy with thousands of resources should not grow by being looked at.
struct Section {
    kind: &'static str,
    field: &'static str,
    entries: Vec<String>,
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
    proxy.store(|store| {
        let provenance = Provenance {
            showing: Showing::new(),
            time: TimeFormat::rfc3339(),
            store,
        };
        let received = store.received();
        let mut out = Vec::new();
        let mut add = |kind, field, entries| out.push(Section { kind, field, entries });
        if let Some(mask) = asked("dynamic_active_clusters") {
            let of = (ResourceType::Cluster, CLUSTER);
            let clusters = provenance.entries(of, received.clusters(), fits, mask, |_, kept| {
                kept.map_or_else(Map::new, |kept| provenance.state("cluster", CLUSTER, kept))
            });
            add("ClustersConfigDump", "dynamic_active_clusters", clusters);
        }
        if let Some(mask) = asked("dynamic_listeners") {
            let of = (ResourceType::Listener, LISTENER);
            let listeners = provenance.entries(of, received.listeners(), fits, mask, |name, kept| {
                let mut entry = Map::new();
                entry.insert("name".to_owned(), name.into());
                if let Some(kept) = kept {
                    let state = provenance.state("listener", LISTENER, kept);
                    entry.insert("active_state".to_owned(), state.into());
                }
                entry
            });
            add("ListenersConfigDump", "dynamic_listeners", listeners);
        }
        if let Some(mask) = asked("dynamic_route_configs") {
            let of = (ResourceType::Route, ROUTE);
            let routes = provenance.entries(of, received.routes(), fits, mask, |name, kept| {
                let Some(kept) = kept else { return Map::new() };
                let mut config = provenance.showing.show(ROUTE, &kept.body);
                let discovered = received
                    .virtual_hosts(name)
                    .map(|body| provenance.showing.show(VIRTUAL_HOST, body))
                    .map(|mut host| {
                        if let Some(host) = host.as_object_mut() {
                            host.remove("@type");
                        }
                        host
                    });
                let discovered: Vec<Value> = discovered.collect();
                if !discovered.is_empty()
                    && let Some(map) = config.as_object_mut()
                    && let Some(hosts) = map
                        .entry("virtual_hosts")
                        .or_insert_with(|| json!([]))
                        .as_array_mut()
                {
                    hosts.extend(discovered);
                }
                provenance.stated("route_config", config, kept)
            });
            add("RoutesConfigDump", "dynamic_route_configs", routes);
        }
        if wanted.endpoints
            && let Some(mask) = asked("dynamic_endpoint_configs")
        {
            let of = (ResourceType::Endpoints, ENDPOINTS);
            let endpoints = provenance.entries(of, store.assignments(), fits, mask, |_, kept| {
                kept.map_or_else(Map::new, |kept| {
                    provenance.state("endpoint_config", ENDPOINTS, kept)
                })
            });
            add("EndpointsConfigDump", "dynamic_endpoint_configs", endpoints);
        }
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
        let comma = if index == 0 { "" } else { "," };
        let entries = section.entries.join(",\n        ");
        // Writing to a String cannot fail.
        let _ = match wanted.resource {
            Some(_) => write!(out, "\n        {entries}"),
            None => write!(
                out,
                "{comma}\n    {{\n      \"@type\": \"type.googleapis.com/envoy.admin.v3.{}\",\n      \"{}\": [\n        \
                 {entries}\n      ]\n    }}",
                section.kind, section.field
            ),
        };
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
