//! Services and their endpoints.

use serde_json::{Value, json};

use super::set;
use crate::meta;

pub(crate) fn apply(service: &mut Value) {
    let spec = meta::member_object(service, "spec");
    set(spec, "type", json!("ClusterIP"));
    set(spec, "sessionAffinity", json!("None"));
    if spec.get("sessionAffinity") == Some(&json!("ClientIP")) {
        let config = meta::as_object_mut(spec.entry("sessionAffinityConfig").or_insert_with(|| json!({})));
        let client = meta::as_object_mut(config.entry("clientIP").or_insert_with(|| json!({})));
        set(client, "timeoutSeconds", json!(10800));
    } else {
        spec.remove("sessionAffinityConfig");
    }
    let kind = spec
        .get("type")
        .and_then(Value::as_str)
        .unwrap_or_default()
        .to_owned();
    let external = matches!(kind.as_str(), "NodePort" | "LoadBalancer");
    if external {
        set(spec, "externalTrafficPolicy", json!("Cluster"));
    }
    if matches!(kind.as_str(), "ClusterIP" | "NodePort" | "LoadBalancer") {
        set(spec, "internalTrafficPolicy", json!("Cluster"));
    }
    if kind == "LoadBalancer" {
        set(spec, "allocateLoadBalancerNodePorts", json!(true));
    }
    for port in spec
        .get_mut("ports")
        .and_then(Value::as_array_mut)
        .into_iter()
        .flatten()
    {
        let port = meta::as_object_mut(port);
        set(port, "protocol", json!("TCP"));
        if port
            .get("targetPort")
            .is_none_or(|t| t.is_null() || t == &json!(0) || t == &json!(""))
            && let Some(number) = port.get("port").cloned()
        {
            port.insert("targetPort".into(), number);
        }
    }
}

pub(crate) fn endpoint_slice(object: &mut Value) {
    let map = meta::as_object_mut(object);
    for port in map
        .get_mut("ports")
        .and_then(Value::as_array_mut)
        .into_iter()
        .flatten()
    {
        let port = meta::as_object_mut(port);
        set(port, "name", json!(""));
        set(port, "protocol", json!("TCP"));
    }
}

pub(crate) fn endpoints(object: &mut Value) {
    let map = meta::as_object_mut(object);
    for subset in map
        .get_mut("subsets")
        .and_then(Value::as_array_mut)
        .into_iter()
        .flatten()
    {
        for port in subset
            .get_mut("ports")
            .and_then(Value::as_array_mut)
            .into_iter()
            .flatten()
        {
            set(meta::as_object_mut(port), "protocol", json!("TCP"));
        }
    }
}
