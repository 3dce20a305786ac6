//! Pods and pod templates.

use serde_json::{Value, json};

use crate::error::{FieldError, FieldErrorKind};
use crate::{meta, names};

pub(crate) fn check(pod: &Value, live: Option<&Value>, errors: &mut Vec<FieldError>) {
    let spec = pod.get("spec").unwrap_or(&Value::Null);
    pod_spec(spec, "spec", errors);
    if let Some(live) = live {
        update(pod, live, errors);
    }
}

/// A dotted pod name is allowed, but such a pod has no usable host name.
pub(crate) fn name_warning(pod: &Value, out: &mut Vec<String>) {
    let name = meta::name(pod);
    if name.contains('.') {
        out.push(format!(
            "metadata.name: this is used in the Pod's hostname, which can result in surprising behavior; a DNS label is recommended: [{}]",
            names::label_errors(name).join(", ")
        ));
    }
}

/// The specification of a pod or template below `path`.
pub(crate) fn pod_spec(spec: &Value, path: &str, errors: &mut Vec<FieldError>) {
    let mut volumes: Vec<&str> = Vec::new();
    for (i, volume) in meta::list_at(spec, "volumes").iter().enumerate() {
        let name = meta::str_at(volume, "name");
        if name.is_empty() {
            errors.push(FieldError::required(format!("{path}.volumes[{i}].name"), ""));
        } else {
            for e in names::label_errors(name) {
                errors.push(FieldError::invalid(
                    format!("{path}.volumes[{i}].name"),
                    &json!(name),
                    e,
                ));
            }
        }
        if volumes.contains(&name) {
            errors.push(FieldError::duplicate(
                format!("{path}.volumes[{i}].name"),
                &json!(name),
            ));
        }
        let sources: Vec<&String> = volume
            .as_object()
            .into_iter()
            .flatten()
            .map(|(k, _)| k)
            .filter(|k| *k != "name")
            .collect();
        for extra in sources.iter().skip(1) {
            errors.push(FieldError::forbidden(
                format!("{path}.volumes[{i}].{extra}"),
                "may not specify more than 1 volume type",
            ));
        }
        // A volume that is wrong cannot be mounted.
        if sources.len() <= 1 {
            volumes.push(name);
        }
    }
    let containers = meta::list_at(spec, "containers");
    if containers.is_empty() {
        errors.push(FieldError::required(format!("{path}.containers"), ""));
    }
    let mut seen: Vec<&str> = Vec::new();
    for (list, items) in [
        ("containers", containers),
        ("initContainers", meta::list_at(spec, "initContainers")),
    ] {
        for (i, container) in items.iter().enumerate() {
            let at = format!("{path}.{list}[{i}]");
            check_container(container, &at, &volumes, errors);
            let name = meta::str_at(container, "name");
            if !name.is_empty() && seen.contains(&name) {
                errors.push(FieldError::duplicate(format!("{at}.name"), &json!(name)));
            }
            seen.push(name);
        }
    }
    let policy = meta::str_at(spec, "restartPolicy");
    if !matches!(policy, "Always" | "OnFailure" | "Never" | "") {
        errors.push(FieldError::not_supported(
            format!("{path}.restartPolicy"),
            &json!(policy),
            &["Always", "OnFailure", "Never"],
        ));
    }
}

fn check_container(container: &Value, at: &str, volumes: &[&str], errors: &mut Vec<FieldError>) {
    let name = meta::str_at(container, "name");
    if name.is_empty() {
        errors.push(FieldError::required(format!("{at}.name"), ""));
    } else {
        for e in names::label_errors(name) {
            errors.push(FieldError::invalid(format!("{at}.name"), &json!(name), e));
        }
    }
    if meta::str_at(container, "image").is_empty() {
        errors.push(FieldError::required(format!("{at}.image"), ""));
    }
    let mut port_names: Vec<&str> = Vec::new();
    for (i, port) in meta::list_at(container, "ports").iter().enumerate() {
        let at = format!("{at}.ports[{i}]");
        let port_name = meta::str_at(port, "name");
        if !port_name.is_empty() {
            let found = names::port_name_errors(port_name);
            for e in &found {
                errors.push(FieldError::invalid(
                    format!("{at}.name"),
                    &json!(port_name),
                    e.clone(),
                ));
            }
            if found.is_empty() && port_names.contains(&port_name) {
                errors.push(FieldError::duplicate(format!("{at}.name"), &json!(port_name)));
            }
            port_names.push(port_name);
        }
        let number = meta::int_at(port, "containerPort").unwrap_or(0);
        if number == 0 {
            errors.push(FieldError::required(format!("{at}.containerPort"), ""));
        } else if !(1..=65535).contains(&number) {
            errors.push(FieldError::invalid(
                format!("{at}.containerPort"),
                &json!(number),
                "must be between 1 and 65535, inclusive",
            ));
        }
        let host = meta::int_at(port, "hostPort").unwrap_or(0);
        if host != 0 && !(1..=65535).contains(&host) {
            errors.push(FieldError::invalid(
                format!("{at}.hostPort"),
                &json!(host),
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
    }
    for (i, mount) in meta::list_at(container, "volumeMounts").iter().enumerate() {
        let at = format!("{at}.volumeMounts[{i}]");
        let name = meta::str_at(mount, "name");
        if name.is_empty() {
            errors.push(FieldError::required(format!("{at}.name"), ""));
        } else if !volumes.contains(&name) {
            errors.push(FieldError::plain(FieldErrorKind::Invalid, format!("{at}.name"), "").not_found(name));
        }
        if meta::str_at(mount, "mountPath").is_empty() {
            errors.push(FieldError::required(format!("{at}.mountPath"), ""));
        }
    }
    for (i, env) in meta::list_at(container, "env").iter().enumerate() {
        if meta::str_at(env, "name").is_empty() {
            errors.push(FieldError::required(format!("{at}.env[{i}].name"), ""));
        }
    }
}

/// Of a pod that exists only a few fields may change.
fn update(pod: &Value, live: &Value, errors: &mut Vec<FieldError>) {
    let neutral = |v: &Value| {
        let mut spec = v.get("spec").cloned().unwrap_or_default();
        let map = meta::as_object_mut(&mut spec);
        for field in [
            "activeDeadlineSeconds",
            "tolerations",
            "schedulingGates",
            "terminationGracePeriodSeconds",
        ] {
            map.remove(field);
        }
        // Binding is an update of nodeName from nothing.
        if meta::str_at(live, "spec.nodeName").is_empty() {
            map.remove("nodeName");
        }
        for list in ["containers", "initContainers"] {
            for container in map
                .get_mut(list)
                .and_then(Value::as_array_mut)
                .into_iter()
                .flatten()
            {
                if let Some(container) = container.as_object_mut() {
                    container.remove("image");
                }
            }
        }
        spec
    };
    if neutral(pod) != neutral(live) {
        errors.push(FieldError::forbidden(
            "spec",
            "pod updates may not change fields other than `spec.containers[*].image`,`spec.initContainers[*].image`,`spec.activeDeadlineSeconds`,`spec.tolerations` (only additions to existing tolerations),`spec.terminationGracePeriodSeconds` (allow it to be set to 1 if it was previously negative)",
        ));
    }
}
