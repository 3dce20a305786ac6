//! Objects from YAML files as changes of the model.

use std::path::PathBuf;
use std::sync::Arc;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use serin_model::{Change, Object};

fn object(value: Value) -> Option<Object> {
    fn read<K: DeserializeOwned>(value: Value) -> Arc<K> {
        let text = value.to_string();
        Arc::new(serde_json::from_value(value).unwrap_or_else(|error| panic!("{error}: {text}")))
    }
    let group = value["apiVersion"].as_str().unwrap_or_default().to_owned();
    Some(match (group.as_str(), value["kind"].as_str()?) {
        ("v1", "Service") => Object::Service(read(value)),
        ("discovery.k8s.io/v1", "EndpointSlice") => Object::EndpointSlice(read(value)),
        ("v1", "Pod") => Object::Pod(read(value)),
        ("v1", "Node") => Object::Node(read(value)),
        (group, kind) if group.starts_with("networking.istio.io/") => match kind {
            "VirtualService" => Object::VirtualService(read(value)),
            "DestinationRule" => Object::DestinationRule(read(value)),
            "Gateway" => Object::Gateway(read(value)),
            "ServiceEntry" => Object::ServiceEntry(read(value)),
            "Sidecar" => Object::Sidecar(read(value)),
            _ => return None,
        },
        _ => return None,
    })
}

/// The objects of a YAML text.
pub(super) fn objects(text: &str) -> Vec<Object> {
    documents(text, None)
}

fn documents(text: &str, created: Option<&str>) -> Vec<Object> {
    serde_yaml::Deserializer::from_str(text)
        .map(|document| Value::deserialize(document).expect("YAML"))
        .filter_map(|mut value| {
            if let (Some(created), Some(metadata)) = (created, value["metadata"].as_object_mut()) {
                metadata.insert("creationTimestamp".to_owned(), created.into());
            }
            object(value)
        })
        .collect()
}

/// The objects of files, in order; those of later files were created later.
pub(super) fn changes(files: &[PathBuf]) -> Vec<Change> {
    files
        .iter()
        .enumerate()
        .flat_map(|(second, file)| {
            let created = format!("2026-01-01T00:00:{second:02}Z");
            documents(&std::fs::read_to_string(file).unwrap(), Some(&created))
        })
        .map(Change::Apply)
        .collect()
}

/// The API server's own Service, which every cluster has.
pub(super) fn kubernetes_service() -> Option<Change> {
    let text = "apiVersion: v1
kind: Service
metadata: {name: kubernetes, namespace: default}
spec: {clusterIP: 10.96.0.1, ports: [{name: https, port: 443, targetPort: 6443}]}
";
    objects(text).pop().map(Change::Apply)
}
