//! Pods and pod templates.

use serde_json::{Map, Value, json};

use super::set;
use crate::error::{ApiError, ApiResult};
use crate::hub::Hub;
use crate::meta;

/// Defaults of a pod template (`metadata` is left alone).
pub(crate) fn template(template: &mut Map<String, Value>) {
    spec(meta::as_object_mut(
        template.entry("spec").or_insert_with(|| json!({})),
    ));
}

/// Defaults of a pod specification.
pub(crate) fn spec(spec: &mut Map<String, Value>) {
    set(spec, "dnsPolicy", json!("ClusterFirst"));
    set(spec, "restartPolicy", json!("Always"));
    set(spec, "securityContext", json!({}));
    set(spec, "terminationGracePeriodSeconds", json!(30));
    set(spec, "schedulerName", json!("default-scheduler"));
    let account = spec
        .get("serviceAccountName")
        .or_else(|| spec.get("serviceAccount"))
        .and_then(Value::as_str)
        .unwrap_or_default()
        .to_owned();
    if !account.is_empty() {
        spec.insert("serviceAccountName".into(), json!(account));
        spec.insert("serviceAccount".into(), json!(account));
    }
    for list in ["containers", "initContainers", "ephemeralContainers"] {
        for c in spec
            .get_mut(list)
            .and_then(Value::as_array_mut)
            .into_iter()
            .flatten()
        {
            container(meta::as_object_mut(c));
        }
    }
    for v in spec
        .get_mut("volumes")
        .and_then(Value::as_array_mut)
        .into_iter()
        .flatten()
    {
        volume(meta::as_object_mut(v));
    }
}

fn container(c: &mut Map<String, Value>) {
    set(c, "resources", json!({}));
    set(c, "terminationMessagePath", json!("/dev/termination-log"));
    set(c, "terminationMessagePolicy", json!("File"));
    let image = c.get("image").and_then(Value::as_str).unwrap_or_default();
    let by_digest = image.contains('@');
    let tag = image
        .rsplit('/')
        .next()
        .and_then(|last| last.split_once(':'))
        .map(|(_, t)| t);
    let policy = if !by_digest && (tag.is_none() || tag == Some("latest")) {
        "Always"
    } else {
        "IfNotPresent"
    };
    set(c, "imagePullPolicy", json!(policy));
    for port in c
        .get_mut("ports")
        .and_then(Value::as_array_mut)
        .into_iter()
        .flatten()
    {
        let port = meta::as_object_mut(port);
        set(port, "protocol", json!("TCP"));
    }
    for name in ["livenessProbe", "readinessProbe", "startupProbe"] {
        if let Some(probe) = c.get_mut(name).and_then(Value::as_object_mut) {
            set(probe, "timeoutSeconds", json!(1));
            set(probe, "periodSeconds", json!(10));
            set(probe, "successThreshold", json!(1));
            set(probe, "failureThreshold", json!(3));
            handler(probe);
            if let Some(grpc) = probe.get_mut("grpc").and_then(Value::as_object_mut) {
                set(grpc, "service", json!(""));
            }
        }
    }
    for hook in ["postStart", "preStop"] {
        if let Some(hook) = c
            .get_mut("lifecycle")
            .and_then(|l| l.get_mut(hook))
            .and_then(Value::as_object_mut)
        {
            handler(hook);
        }
    }
    for env in c
        .get_mut("env")
        .and_then(Value::as_array_mut)
        .into_iter()
        .flatten()
    {
        if let Some(from) = env.get_mut("valueFrom").and_then(Value::as_object_mut) {
            if let Some(field) = from.get_mut("fieldRef").and_then(Value::as_object_mut) {
                set(field, "apiVersion", json!("v1"));
            }
            if let Some(field) = from.get_mut("resourceFieldRef").and_then(Value::as_object_mut) {
                set(field, "divisor", json!("0"));
            }
        }
    }
}

fn handler(probe: &mut Map<String, Value>) {
    if let Some(http) = probe.get_mut("httpGet").and_then(Value::as_object_mut) {
        set(http, "path", json!("/"));
        set(http, "scheme", json!("HTTP"));
    }
}

fn volume(v: &mut Map<String, Value>) {
    for (source, key) in [
        ("secret", "defaultMode"),
        ("configMap", "defaultMode"),
        ("downwardAPI", "defaultMode"),
        ("projected", "defaultMode"),
    ] {
        if let Some(source) = v.get_mut(source).and_then(Value::as_object_mut) {
            set(source, key, json!(0o644));
        }
    }
    if let Some(host) = v.get_mut("hostPath").and_then(Value::as_object_mut) {
        set(host, "type", json!(""));
    }
    for item in v
        .get_mut("downwardAPI")
        .and_then(|d| d.get_mut("items"))
        .and_then(Value::as_array_mut)
        .into_iter()
        .flatten()
    {
        field_source(item);
    }
    for source in v
        .get_mut("projected")
        .and_then(|d| d.get_mut("sources"))
        .and_then(Value::as_array_mut)
        .into_iter()
        .flatten()
    {
        if let Some(token) = source
            .get_mut("serviceAccountToken")
            .and_then(Value::as_object_mut)
        {
            set(token, "expirationSeconds", json!(3600));
        }
        for item in source
            .get_mut("downwardAPI")
            .and_then(|d| d.get_mut("items"))
            .and_then(Value::as_array_mut)
            .into_iter()
            .flatten()
        {
            field_source(item);
        }
    }
    // A volume without a source is an emptyDir.
    if v.len() == 1 && v.contains_key("name") {
        v.insert("emptyDir".into(), json!({}));
    }
}

fn field_source(item: &mut Value) {
    if let Some(field) = item.get_mut("fieldRef").and_then(Value::as_object_mut) {
        set(field, "apiVersion", json!("v1"));
    }
    if let Some(field) = item.get_mut("resourceFieldRef").and_then(Value::as_object_mut) {
        set(field, "divisor", json!("0"));
    }
}

/// `podIP` and the first of `podIPs` are one value.
fn addresses(pod: &mut Value) {
    let first = meta::list_at(pod, "status.podIPs")
        .first()
        .map(|i| meta::str_at(i, "ip").to_owned());
    let single = meta::str_at(pod, "status.podIP").to_owned();
    let status = meta::member_object(pod, "status");
    match first {
        Some(first) if single.is_empty() && !first.is_empty() => {
            status.insert("podIP".into(), json!(first));
        }
        None if !single.is_empty() => {
            status.insert("podIPs".into(), json!([{"ip": single}]));
        }
        _ => {}
    }
}

/// Defaults that a pod has and a template has not.
pub(crate) fn scheme(pod: &mut Value, _live: Option<&Value>) {
    addresses(pod);
    let spec = meta::member_object(pod, "spec");
    set(spec, "enableServiceLinks", json!(true));
    let host_network = spec.get("hostNetwork") == Some(&Value::Bool(true));
    for list in ["containers", "initContainers"] {
        for c in spec
            .get_mut(list)
            .and_then(Value::as_array_mut)
            .into_iter()
            .flatten()
        {
            let c = meta::as_object_mut(c);
            if host_network {
                for port in c
                    .get_mut("ports")
                    .and_then(Value::as_array_mut)
                    .into_iter()
                    .flatten()
                {
                    let port = meta::as_object_mut(port);
                    if let Some(number) = port.get("containerPort").cloned() {
                        set(port, "hostPort", number);
                    }
                }
            }
            // A limit without a request is the request.
            if let Some(resources) = c.get_mut("resources").and_then(Value::as_object_mut)
                && let Some(limits) = resources.get("limits").and_then(Value::as_object).cloned()
            {
                let requests = meta::as_object_mut(resources.entry("requests").or_insert_with(|| json!({})));
                for (name, value) in limits {
                    requests.entry(name).or_insert(value);
                }
            }
        }
    }
}

/// What admission and the strategy give a pod itself.
pub(crate) fn created(pod: &mut Value, live: Option<&Value>) {
    if live.is_some() {
        return;
    }
    let spec = meta::member_object(pod, "spec");
    if !spec.contains_key("serviceAccountName") {
        spec.insert("serviceAccountName".into(), json!("default"));
        spec.insert("serviceAccount".into(), json!("default"));
    }
    let tolerations = spec.entry("tolerations").or_insert_with(|| json!([]));
    if let Value::Array(list) = tolerations {
        for key in ["node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable"] {
            if !list
                .iter()
                .any(|t| t.get("key").and_then(Value::as_str) == Some(key))
            {
                list.push(json!({"key": key, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 300}));
            }
        }
    }
    let class = quality(pod.get("spec").unwrap_or(&Value::Null));
    meta::as_object_mut(pod).insert("status".into(), json!({"phase": "Pending", "qosClass": class}));
    if !meta::list_at(pod, "spec.schedulingGates").is_empty() {
        meta::member_object(pod, "status").insert(
            "conditions".into(),
            json!([{"type": "PodScheduled", "status": "False", "lastProbeTime": null, "lastTransitionTime": null,
                "reason": "SchedulingGated", "message": "Scheduling is blocked due to non-empty scheduling gates"}]),
        );
    }
}

/// The classes that every cluster has.
const SYSTEM_CLASSES: [(&str, i64); 2] = [
    ("system-node-critical", 2_000_001_000),
    ("system-cluster-critical", 2_000_000_000),
];

/// Resolve the priority class of a new pod.
pub(crate) fn priority(hub: &Hub, name: &str, pod: &mut Value) -> ApiResult<()> {
    let class = meta::str_at(pod, "spec.priorityClassName").to_owned();
    let (value, policy) = if class.is_empty() {
        (0, "PreemptLowerPriority".to_owned())
    } else if let Some((_, value)) = SYSTEM_CLASSES.iter().find(|(n, _)| *n == class) {
        (*value, "PreemptLowerPriority".to_owned())
    } else {
        let found = hub
            .get_at("scheduling.k8s.io/priorityclasses", &class)
            .ok_or_else(|| {
                ApiError::forbidden(
                    "",
                    "pods",
                    name,
                    &format!("no PriorityClass with name {class} was found"),
                )
            })?;
        (
            meta::int_at(&found.value, "value").unwrap_or(0),
            meta::str_at(&found.value, "preemptionPolicy").to_owned(),
        )
    };
    let spec = meta::member_object(pod, "spec");
    spec.insert("priority".into(), json!(value));
    set(spec, "preemptionPolicy", json!(policy));
    Ok(())
}

const TOKEN_PATH: &str = "/var/run/secrets/kubernetes.io/serviceaccount";

/// The volume through which a container reaches the API.
pub(crate) fn token_volume(suffix: &str, pod: &mut Value) {
    if meta::at(pod, "spec.automountServiceAccountToken") == Some(&Value::Bool(false)) {
        return;
    }
    let name = format!("kube-api-access-{suffix}");
    let spec = meta::member_object(pod, "spec");
    let mut mounted = false;
    for list in ["initContainers", "containers"] {
        for c in spec
            .get_mut(list)
            .and_then(Value::as_array_mut)
            .into_iter()
            .flatten()
        {
            let mounts = meta::as_object_mut(c)
                .entry("volumeMounts")
                .or_insert_with(|| json!([]));
            let Value::Array(mounts) = mounts else { continue };
            if mounts.iter().any(|m| meta::str_at(m, "mountPath") == TOKEN_PATH) {
                continue;
            }
            mounts.push(json!({"name": name, "readOnly": true, "mountPath": TOKEN_PATH}));
            mounted = true;
        }
    }
    if mounted {
        let volumes = spec.entry("volumes").or_insert_with(|| json!([]));
        if let Value::Array(volumes) = volumes {
            volumes.push(json!({"name": name, "projected": {"defaultMode": 420, "sources": [
                {"serviceAccountToken": {"expirationSeconds": 3607, "path": "token"}},
                {"configMap": {"name": "kube-root-ca.crt", "items": [{"key": "ca.crt", "path": "ca.crt"}]}},
                {"downwardAPI": {"items": [{"path": "namespace", "fieldRef": {"apiVersion": "v1", "fieldPath": "metadata.namespace"}}]}},
            ]}}));
        }
    }
}

/// The quality-of-service class from requests and limits.
fn quality(spec: &Value) -> &'static str {
    let mut any = false;
    let mut guaranteed = true;
    for container in meta::list_at(spec, "containers")
        .iter()
        .chain(meta::list_at(spec, "initContainers"))
    {
        let amount = |section: &str, name: &str| {
            meta::at(container, "resources")
                .and_then(|r| r.get(section))
                .and_then(|s| s.get(name))
                .and_then(Value::as_str)
                .filter(|q| crate::quantity::nanos(q).is_some_and(|n| n > 0))
        };
        for name in ["cpu", "memory"] {
            let (request, limit) = (amount("requests", name), amount("limits", name));
            any |= request.is_some() || limit.is_some();
            guaranteed &= limit.is_some() && request == limit;
        }
    }
    match (any, guaranteed) {
        (false, _) => "BestEffort",
        (true, true) => "Guaranteed",
        (true, false) => "Burstable",
    }
}
