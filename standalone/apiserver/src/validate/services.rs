//! Services.

use serde_json::{Value, json};

use crate::error::FieldError;
use crate::{meta, names};

const TYPES: [&str; 4] = ["ClusterIP", "ExternalName", "LoadBalancer", "NodePort"];

pub(crate) fn check(service: &Value, live: Option<&Value>, errors: &mut Vec<FieldError>) {
    let kind = meta::str_at(service, "spec.type");
    let ports = meta::list_at(service, "spec.ports");
    let headless = meta::str_at(service, "spec.clusterIP") == "None";
    if ports.is_empty() && kind != "ExternalName" && !headless {
        errors.push(FieldError::required("spec.ports", ""));
    }
    if !TYPES.contains(&kind) {
        errors.push(FieldError::not_supported("spec.type", &json!(kind), &TYPES));
    }
    let mut seen_names: Vec<&str> = Vec::new();
    let mut seen_ports: Vec<(i64, &str)> = Vec::new();
    for (i, port) in ports.iter().enumerate() {
        let at = format!("spec.ports[{i}]");
        let name = meta::str_at(port, "name");
        if name.is_empty() {
            if ports.len() > 1 {
                errors.push(FieldError::required(format!("{at}.name"), ""));
            }
        } else {
            for e in names::label_errors(name) {
                errors.push(FieldError::invalid(format!("{at}.name"), &json!(name), e));
            }
            if seen_names.contains(&name) {
                errors.push(FieldError::duplicate(format!("{at}.name"), &json!(name)));
            }
            seen_names.push(name);
        }
        let number = meta::int_at(port, "port").unwrap_or(0);
        if !(1..=65535).contains(&number) {
            errors.push(FieldError::invalid(
                format!("{at}.port"),
                &json!(number),
                "must be between 1 and 65535, inclusive",
            ));
        }
        let protocol = meta::str_at(port, "protocol");
        if !matches!(protocol, "TCP" | "UDP" | "SCTP") {
            errors.push(FieldError::not_supported(
                format!("{at}.protocol"),
                &json!(protocol),
                &["SCTP", "TCP", "UDP"],
            ));
        }
        match port.get("targetPort") {
            Some(Value::Number(n)) if !n.as_i64().is_some_and(|n| (1..=65535).contains(&n)) => {
                errors.push(FieldError::invalid(
                    format!("{at}.targetPort"),
                    &json!(n),
                    "must be between 1 and 65535, inclusive",
                ));
            }
            Some(Value::String(s)) => {
                for e in names::port_name_errors(s) {
                    errors.push(FieldError::invalid(format!("{at}.targetPort"), &json!(s), e));
                }
            }
            _ => {}
        }
        if seen_ports.contains(&(number, protocol)) {
            let mut key = json!({"protocol": protocol, "port": number});
            if let Some(map) = key.as_object_mut() {
                map.remove("");
            }
            errors.push(FieldError::duplicate(at, &key));
        }
        seen_ports.push((number, protocol));
    }
    let affinity = meta::str_at(service, "spec.sessionAffinity");
    if !matches!(affinity, "ClientIP" | "None" | "") {
        errors.push(FieldError::not_supported(
            "spec.sessionAffinity",
            &json!(affinity),
            &["ClientIP", "None"],
        ));
    }
    if kind == "ExternalName" {
        let name = meta::str_at(service, "spec.externalName");
        if name.is_empty() {
            errors.push(FieldError::required("spec.externalName", ""));
        }
    }
    if let Some(live) = live {
        let (old, new) = (
            meta::str_at(live, "spec.clusterIP"),
            meta::str_at(service, "spec.clusterIP"),
        );
        if !old.is_empty()
            && old != new
            && meta::str_at(live, "spec.type") != "ExternalName"
            && kind != "ExternalName"
        {
            errors.push(FieldError::invalid(
                "spec.clusterIPs[0]",
                &json!([new]),
                "may not change once set",
            ));
        }
    }
}
