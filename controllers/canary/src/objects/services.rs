//! The Services: apex, `-primary`, `-canary`.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::Service;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use serde_json::{Map, Value, json};
use serin_crds::flagger::CustomMetadata;

use super::{Blueprint, OPT_OUT, ORIGINAL, Ownership, opt_out};

/// Containers of other systems, whose ports are not the application's.
const SIDECARS: [&str; 2] = ["istio-proxy", "envoy"];

impl Blueprint<'_> {
    /// The Services of canary and primary.
    pub fn services(&self) -> [Value; 2] {
        [
            self.one(
                &format!("{}-canary", self.apex),
                &self.label_value,
                self.service.canary.as_ref(),
            ),
            self.one(
                &format!("{}-primary", self.apex),
                &self.primary_label_value(),
                self.service.primary.as_ref(),
            ),
        ]
    }

    /// The apex Service. One that was there before keeps its metadata and other fields; see [`Blueprint::apex_takeover`].
    pub fn apex(&self) -> Value {
        self.one(
            &self.apex,
            &self.primary_label_value(),
            self.service.apex.as_ref(),
        )
    }

    /// The merge patch that takes over a Service which was there before: ports and selector are ours from now on, the rest
    /// stays; what they were is remembered.
    pub fn apex_takeover(&self, existing: &Service) -> Value {
        let whole = self.apex();
        let mut annotations = BTreeMap::new();
        opt_out(&mut annotations);
        let remembered = existing
            .metadata
            .annotations
            .as_ref()
            .is_some_and(|annotations| annotations.contains_key(ORIGINAL));
        if !remembered && let Some(spec) = &existing.spec {
            let original = json!({"ports": spec.ports, "selector": spec.selector});
            annotations.insert(ORIGINAL.to_owned(), original.to_string());
        }
        json!({
            "metadata": {"annotations": annotations},
            "spec": {"ports": whole["spec"]["ports"], "selector": whole["spec"]["selector"]},
        })
    }

    /// The merge patch that points a taken-over apex Service back to the target.
    pub fn apex_revert(&self, existing: &Service) -> Value {
        let original = existing
            .metadata
            .annotations
            .as_ref()
            .and_then(|annotations| annotations.get(ORIGINAL))
            .and_then(|text| serde_json::from_str::<Value>(text).ok());
        let mut spec = Map::new();
        match original {
            Some(original) => {
                spec.insert("ports".to_owned(), original["ports"].clone());
                // A merge patch keeps keys that it does not name: ours must be named to go.
                let mut selector = json!({ &self.label_key: null });
                if let (Some(selector), Some(map)) =
                    (selector.as_object_mut(), original["selector"].as_object())
                {
                    selector.extend(map.clone());
                }
                spec.insert("selector".to_owned(), selector);
            }
            None => {
                spec.insert(
                    "selector".to_owned(),
                    json!({ &self.label_key: self.label_value }),
                );
            }
        }
        json!({"metadata": {"annotations": without_takeover()}, "spec": spec})
    }

    fn one(&self, name: &str, selector: &str, extra: Option<&CustomMetadata>) -> Value {
        let extra = extra.cloned().unwrap_or_default();
        let mut labels = extra.labels;
        labels.insert(self.label_key.clone(), name.to_owned());
        let mut annotations = extra.annotations;
        opt_out(&mut annotations);
        let mut metadata = self.metadata(name, Ownership::Ours);
        metadata.insert("labels".to_owned(), json!(labels));
        metadata.insert("annotations".to_owned(), json!(annotations));
        let mut spec = Map::new();
        spec.insert("type".to_owned(), json!("ClusterIP"));
        if self.service.headless == Some(true) {
            spec.insert("clusterIP".to_owned(), json!("None"));
        }
        if let Some(distribution) = &self.service.traffic_distribution {
            spec.insert("trafficDistribution".to_owned(), json!(distribution));
        }
        spec.insert("selector".to_owned(), json!({ &self.label_key: selector }));
        spec.insert("ports".to_owned(), json!(self.ports()));
        json!({"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": spec})
    }

    fn ports(&self) -> Vec<Value> {
        let port = self.service.port;
        let target = self.service.target_port.clone().unwrap_or(IntOrString::Int(port));
        let mut main = json!({
            "name": self.service.port_name.as_deref().unwrap_or("http"),
            "protocol": "TCP",
            "port": port,
            "targetPort": target,
        });
        if let (Some(protocol), Some(main)) = (&self.service.app_protocol, main.as_object_mut()) {
            main.insert("appProtocol".to_owned(), json!(protocol));
        }
        let mut ports = vec![main];
        if self.service.port_discovery == Some(true) {
            // Sorted and unique by name, as a Service demands.
            let discovered: BTreeMap<String, i32> = self.discovered(&target).into_iter().collect();
            ports.extend(discovered.into_iter().map(
                |(name, port)| json!({"name": name, "protocol": "TCP", "port": port, "targetPort": port}),
            ));
        }
        ports
    }

    /// The other ports of the application's containers.
    fn discovered(&self, target: &IntOrString) -> Vec<(String, i32)> {
        let containers = self
            .target
            .spec
            .as_ref()
            .and_then(|spec| spec.template.spec.as_ref())
            .map(|pod| pod.containers.as_slice())
            .unwrap_or_default();
        let mut found = Vec::new();
        for container in containers
            .iter()
            .filter(|one| !SIDECARS.contains(&one.name.as_str()))
        {
            for (index, port) in container.ports.iter().flatten().enumerate() {
                let is_main = match target {
                    IntOrString::Int(number) => port.container_port == *number,
                    IntOrString::String(name) => port.name.as_ref() == Some(name),
                };
                if !is_main {
                    let unnamed = || format!("tcp-{}-{index}", container.name);
                    found.push((port.name.clone().unwrap_or_else(unnamed), port.container_port));
                }
            }
        }
        found
    }
}

/// The annotations of a takeover, set to `null` for a merge patch that removes them.
pub fn without_takeover() -> Value {
    let mut annotations: Map<String, Value> = OPT_OUT
        .iter()
        .map(|(key, _)| ((*key).to_owned(), Value::Null))
        .collect();
    annotations.insert(ORIGINAL.to_owned(), Value::Null);
    Value::Object(annotations)
}
