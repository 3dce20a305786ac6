//! The VirtualService and the DestinationRules.
//!
//! Flagger writes `networking.istio.io/v1beta1`; ours is `v1`, the version that is stored. Both name the same object.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};
use serin_crds::istio::VirtualService;

use super::{Blueprint, ORIGINAL, Ownership, opt_out, or_none};
use crate::traffic::Split;

impl Blueprint<'_> {
    /// The DestinationRules of canary and primary.
    pub fn rules(&self) -> [Value; 2] {
        ["canary", "primary"].map(|arm| {
            let name = format!("{}-{arm}", self.apex);
            let mut spec = Map::new();
            spec.insert("host".to_owned(), json!(name));
            if let Some(policy) = self.service.traffic_policy.as_ref().and_then(or_none) {
                spec.insert("trafficPolicy".to_owned(), policy);
            }
            json!({
                "apiVersion": "networking.istio.io/v1",
                "kind": "DestinationRule",
                "metadata": self.metadata(&name, Ownership::Ours),
                "spec": spec,
            })
        })
    }

    /// The VirtualService with a split. One that was there before (`existing`, not ours) is taken over: its spec is
    /// replaced and remembered.
    pub fn route(&self, split: Split, existing: Option<&VirtualService>) -> Value {
        let ownership = self.ownership(existing.map(|existing| &existing.metadata));
        let mut annotations = BTreeMap::new();
        let mut metadata = self.metadata(&self.apex, ownership);
        if let Some(extra) = self.service.apex.clone() {
            annotations = extra.annotations;
            let mut labels = extra.labels;
            labels.insert(self.label_key.clone(), self.apex.clone());
            metadata.insert("labels".to_owned(), json!(labels));
        }
        opt_out(&mut annotations);
        if let (Ownership::Taken, Some(existing)) = (ownership, existing) {
            let original = existing
                .metadata
                .annotations
                .as_ref()
                .and_then(|annotations| annotations.get(ORIGINAL))
                .cloned()
                .or_else(|| serde_json::to_string(&existing.spec).ok());
            annotations.extend(original.map(|original| (ORIGINAL.to_owned(), original)));
        }
        metadata.insert("annotations".to_owned(), json!(annotations));
        json!({
            "apiVersion": "networking.istio.io/v1",
            "kind": "VirtualService",
            "metadata": metadata,
            "spec": self.route_spec(split),
        })
    }

    fn route_spec(&self, split: Split) -> Value {
        let service = &self.service;
        let mut spec = Map::new();
        if service.delegation == Some(true) {
            spec.insert("hosts".to_owned(), json!([]));
        } else {
            let mut hosts = service.hosts.clone();
            if !hosts.iter().any(|host| *host == self.apex || host == "*") {
                hosts.push(self.apex.clone());
            }
            let gateways = if service.gateways.is_empty() {
                vec!["mesh".to_owned()]
            } else {
                service.gateways.clone()
            };
            spec.insert("hosts".to_owned(), json!(hosts));
            spec.insert("gateways".to_owned(), json!(gateways));
        }
        let mut http = Map::new();
        let mut put = |name: &str, value: Option<Value>| {
            if let Some(value) = value {
                http.insert(name.to_owned(), value);
            }
        };
        put("match", or_none(&service.r#match));
        let rewrite = service.rewrite.as_ref().map(|rewrite| {
            let mut rewrite = rewrite.clone();
            // Only Gateway API knows it.
            rewrite.r#type = None;
            rewrite
        });
        put("rewrite", rewrite.as_ref().and_then(or_none));
        put("timeout", service.timeout.as_ref().and_then(or_none));
        put("retries", service.retries.as_ref().and_then(or_none));
        put("headers", service.headers.as_ref().and_then(or_none));
        put("corsPolicy", service.cors_policy.as_ref().and_then(or_none));
        put(
            "route",
            Some(json!([
                {"destination": self.destination("primary"), "weight": split.primary()},
                {"destination": self.destination("canary"), "weight": split.canary()},
            ])),
        );
        spec.insert("http".to_owned(), json!([http]));
        Value::Object(spec)
    }

    /// A port is named only where more than one could be meant: with discovered ports, off the mesh.
    fn destination(&self, arm: &str) -> Value {
        let service = &self.service;
        let off_mesh =
            service.delegation == Some(true) || service.gateways.iter().any(|gateway| gateway != "mesh");
        let mut destination = json!({"host": format!("{}-{arm}", self.apex)});
        if service.port_discovery == Some(true)
            && off_mesh
            && let Some(destination) = destination.as_object_mut()
        {
            destination.insert("port".to_owned(), json!({"number": service.port}));
        }
        destination
    }
}

/// The split that a route object carries between `<apex>-primary` and `<apex>-canary`; `None` when its first HTTP rule is
/// something else.
pub fn split_of(spec: &Value, apex: &str) -> Option<Split> {
    let route = spec.get("http")?.get(0)?.get("route")?.as_array()?;
    let weight = |arm: &str| {
        let host = format!("{apex}-{arm}");
        let mut found = route
            .iter()
            .filter(|one| one["destination"]["host"] == host.as_str());
        let one = found.next()?;
        found
            .next()
            .is_none()
            .then(|| one["weight"].as_i64().unwrap_or(0))
    };
    let (primary, canary) = (weight("primary")?, weight("canary")?);
    if route.len() != 2 || primary + canary != 100 {
        return None;
    }
    Some(Split::of_canary(i32::try_from(canary).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_split_is_read_only_from_a_rule_that_is_ours() {
        let rule = |primary: i64, canary: i64| {
            json!({"http": [{"route": [
                {"destination": {"host": "a-primary"}, "weight": primary},
                {"destination": {"host": "a-canary"}, "weight": canary}]}]})
        };
        assert_eq!(split_of(&rule(75, 25), "a"), Some(Split::of_canary(25)));
        assert_eq!(split_of(&rule(75, 5), "a"), None);
        assert_eq!(split_of(&rule(75, 25), "b"), None);
        assert_eq!(split_of(&json!({"tcp": []}), "a"), None);
    }
}
