//! `/config_dump`: Envoy's sections, with the resources as they were received.

use std::fmt::Write as _;

use serde_json::{Map, Value, json};

use super::Proxy;
use crate::bootstrap::Showing;

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

fn sections(proxy: &Proxy, wanted: &Wanted<'_>, mask: Option<&Mask>) -> Vec<Section> {
    let showing = Showing::new();
    let fits = |name: &str| wanted.named.is_none_or(|named| named.is_match(name));
    // What of the entries of a field is wanted; nothing where the field is not.
    let asked = |field: &str| -> Option<Option<&Mask>> {
        match (wanted.resource, mask) {
            (Some(resource), mask) => (resource == field).then_some(mask),
            (None, None) => Some(None),
            (None, Some(mask)) => mask.0.get(field).map(Some),
        }
    };
    let shown = |mask: Option<&Mask>, entry: Value| match mask {
        Some(mask) => text(&mask.apply(&entry)),
        None => text(&entry),
    };
    proxy.store(|store| {
        let received = store.received();
        let mut out = Vec::new();
        let mut add = |kind, field, entries| out.push(Section { kind, field, entries });
        if let Some(mask) = asked("dynamic_active_clusters") {
            let clusters = received
                .clusters()
                .filter(|(name, _)| fits(name))
                .map(|(_, body)| shown(mask, json!({ "cluster": showing.show(CLUSTER, body) })));
            add(
                "ClustersConfigDump",
                "dynamic_active_clusters",
                clusters.collect(),
            );
        }
        if let Some(mask) = asked("dynamic_listeners") {
            let listeners = received
                .listeners()
                .filter(|(name, _)| fits(name))
                .map(|(name, body)| {
                    let listener = showing.show(LISTENER, body);
                    shown(
                        mask,
                        json!({ "name": name, "active_state": { "listener": listener } }),
                    )
                });
            add("ListenersConfigDump", "dynamic_listeners", listeners.collect());
        }
        if let Some(mask) = asked("dynamic_route_configs") {
            let routes = received
                .routes()
                .filter(|(name, _)| fits(name))
                .map(|(name, body)| {
                    let mut config = showing.show(ROUTE, body);
                    let discovered = received
                        .virtual_hosts(name)
                        .map(|body| showing.show(VIRTUAL_HOST, body))
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
                    shown(mask, json!({ "route_config": config }))
                });
            add("RoutesConfigDump", "dynamic_route_configs", routes.collect());
        }
        if wanted.endpoints
            && let Some(mask) = asked("dynamic_endpoint_configs")
        {
            let endpoints = store
                .assignments()
                .filter(|(name, _)| fits(name))
                .map(|(_, body)| shown(mask, json!({ "endpoint_config": showing.show(ENDPOINTS, body) })));
            add(
                "EndpointsConfigDump",
                "dynamic_endpoint_configs",
                endpoints.collect(),
            );
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
