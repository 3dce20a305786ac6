//! Warnings about what is allowed but hardly meant, with the wording of Kubernetes.

use std::collections::BTreeMap;

use serde_json::Value;

use super::pods;
use crate::kinds::Kind;
use crate::meta;

/// What a client should be told of an object that is stored all the same. Of an update only when the specification changed.
pub(crate) fn of(kind: &Kind, object: &Value, live: Option<&Value>) -> Vec<String> {
    let mut out = Vec::new();
    if live.is_some_and(|live| live.get("spec") == object.get("spec")) {
        return out;
    }
    match kind.row().map(|row| (row.group, row.plural)) {
        Some(("", "pods")) => {
            if live.is_none() {
                pods::name_warning(object, &mut out);
            }
            pod(object, "", &mut out);
        }
        Some(("apps", "deployments" | "replicasets" | "statefulsets" | "daemonsets") | ("batch", "jobs")) => {
            template(object, "spec.template", &mut out);
        }
        Some(("batch", "cronjobs")) => template(object, "spec.jobTemplate.spec.template", &mut out),
        Some(("networking.k8s.io", "ingresses")) => ingress_class(object, &mut out),
        Some(("apiextensions.k8s.io", "customresourcedefinitions")) => {
            for version in meta::list_at(object, "spec.versions") {
                if let Some(schema) = meta::at(version, "schema.openAPIV3Schema") {
                    unknown_formats(schema, &mut out);
                }
            }
        }
        _ => {}
    }
    out
}

fn template(object: &Value, path: &str, out: &mut Vec<String>) {
    if let Some(template) = meta::at(object, path) {
        pod(template, &format!("{path}."), out);
    }
}

/// Labels of nodes that got other names.
const NODE_LABELS: [(&str, &str, &str); 5] = [
    ("beta.kubernetes.io/arch", "v1.14", "kubernetes.io/arch"),
    ("beta.kubernetes.io/os", "v1.14", "kubernetes.io/os"),
    (
        "failure-domain.beta.kubernetes.io/region",
        "v1.17",
        "topology.kubernetes.io/region",
    ),
    (
        "failure-domain.beta.kubernetes.io/zone",
        "v1.17",
        "topology.kubernetes.io/zone",
    ),
    (
        "beta.kubernetes.io/instance-type",
        "v1.17",
        "node.kubernetes.io/instance-type",
    ),
];
/// The annotation of a container's AppArmor profile, before its name.
const APPARMOR: &str = "container.apparmor.security.beta.kubernetes.io/";

/// A pod or a template of one; `base` ends in a dot or is empty.
fn pod(pod: &Value, base: &str, out: &mut Vec<String>) {
    let spec = format!("{base}spec");
    let selector = meta::at(pod, "spec.nodeSelector").and_then(Value::as_object);
    for (label, since, instead) in NODE_LABELS {
        if selector.is_some_and(|selector| selector.contains_key(label)) {
            out.push(format!(
                "{spec}.nodeSelector[{label}]: deprecated since {since}; use \"{instead}\" instead"
            ));
        }
    }
    for (i, constraint) in meta::list_at(pod, "spec.topologySpreadConstraints")
        .iter()
        .enumerate()
    {
        if constraint.get("labelSelector").is_none_or(Value::is_null) {
            out.push(format!(
                "{spec}.topologySpreadConstraints[{i}].labelSelector: a null labelSelector results in matching no pod"
            ));
        }
    }
    let annotations = meta::at(pod, "metadata.annotations").and_then(Value::as_object);
    for name in annotations.into_iter().flat_map(|annotations| annotations.keys()) {
        if name.starts_with(APPARMOR) {
            out.push(format!(
                "{base}metadata.annotations[{name}]: deprecated since v1.30; use the \"appArmorProfile\" field instead"
            ));
        }
    }
    let mut addresses: Vec<&str> = Vec::new();
    for (i, alias) in meta::list_at(pod, "spec.hostAliases").iter().enumerate() {
        let ip = meta::str_at(alias, "ip");
        if addresses.contains(&ip) {
            out.push(format!("{spec}.hostAliases[{i}].ip: duplicate ip {ip:?}"));
        }
        addresses.push(ip);
    }
    for (i, volume) in meta::list_at(pod, "spec.volumes").iter().enumerate() {
        if volume.get("gitRepo").is_some() {
            out.push(format!(
                "{spec}.volumes[{i}].gitRepo: deprecated in v1.11, and disabled by default in v1.33+"
            ));
        }
    }
    for list in ["initContainers", "containers"] {
        for (i, container) in meta::list_at(pod, &format!("spec.{list}")).iter().enumerate() {
            one_container(container, &format!("{spec}.{list}[{i}]"), out);
        }
    }
}

fn one_container(container: &Value, path: &str, out: &mut Vec<String>) {
    let mut names: Vec<&str> = Vec::new();
    for (i, variable) in meta::list_at(container, "env").iter().enumerate() {
        let name = meta::str_at(variable, "name");
        // One that builds on the former is meant.
        let extends = meta::str_at(variable, "value").contains(&format!("$({name})"));
        if names.contains(&name) && !extends {
            out.push(format!(
                "{path}.env[{i}]: hides previous definition of {name:?}, which may be dropped when using apply"
            ));
        }
        names.push(name);
    }
    let mut ports: BTreeMap<(i64, &str, i64, &str), usize> = BTreeMap::new();
    for (i, port) in meta::list_at(container, "ports").iter().enumerate() {
        let key = (
            meta::int_at(port, "containerPort").unwrap_or(0),
            meta::str_at(port, "protocol"),
            meta::int_at(port, "hostPort").unwrap_or(0),
            meta::str_at(port, "hostIP"),
        );
        match ports.get(&key) {
            Some(first) => out.push(format!(
                "{path}.ports[{i}]: duplicate port definition with {path}.ports[{first}]"
            )),
            None => {
                ports.insert(key, i);
            }
        }
    }
}

fn ingress_class(ingress: &Value, out: &mut Vec<String>) {
    let annotations = meta::at(ingress, "metadata.annotations").and_then(Value::as_object);
    if annotations.is_some_and(|annotations| annotations.contains_key("kubernetes.io/ingress.class")) {
        out.push(
            "annotation \"kubernetes.io/ingress.class\" is deprecated, please use 'spec.ingressClassName' instead".into(),
        );
    }
}

/// Formats of strings that Kubernetes checks; dashes do not count (`date-time`).
const FORMATS: [&str; 26] = [
    "bsonobjectid",
    "byte",
    "cidr",
    "creditcard",
    "date",
    "datetime",
    "duration",
    "email",
    "hexcolor",
    "hostname",
    "ipv4",
    "ipv6",
    "isbn",
    "isbn10",
    "isbn13",
    "k8slongname",
    "k8sshortname",
    "mac",
    "password",
    "rgbcolor",
    "ssn",
    "uri",
    "uuid",
    "uuid3",
    "uuid4",
    "uuid5",
];

fn unknown_formats(schema: &Value, out: &mut Vec<String>) {
    if meta::str_at(schema, "type") == "string" {
        let format = meta::str_at(schema, "format");
        if !format.is_empty() && !FORMATS.contains(&format.replace('-', "").as_str()) {
            let text = format!("unrecognized format {format:?}");
            if !out.contains(&text) {
                out.push(text);
            }
        }
    }
    for members in ["properties", "patternProperties"] {
        let members = schema.get(members).and_then(Value::as_object);
        members
            .into_iter()
            .flat_map(|members| members.values())
            .for_each(|one| unknown_formats(one, out));
    }
    for one in ["items", "additionalProperties"] {
        if let Some(one) = schema.get(one) {
            unknown_formats(one, out);
        }
    }
}
