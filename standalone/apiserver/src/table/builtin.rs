//! Columns of the built-in kinds, as Kubernetes prints them. The headings come from `columns.tsv`; the cells are made here.

use std::collections::HashMap;
use std::sync::LazyLock;

use jiff::Timestamp;
use serde_json::{Value, json};

use super::pods;
use crate::http::subresources::selector_text;
use crate::kinds::Kind;
use crate::{meta, time};

static TABLE: &str = include_str!("columns.tsv");

struct Heading {
    name: &'static str,
    kind: &'static str,
    format: &'static str,
    priority: i64,
    description: String,
}

static HEADINGS: LazyLock<HashMap<(&'static str, &'static str), Vec<Heading>>> = LazyLock::new(|| {
    let mut out: HashMap<_, Vec<Heading>> = HashMap::new();
    let mut at = ("", "");
    for line in TABLE.lines() {
        let mut columns = line.split('\t');
        let mut next = || columns.next().unwrap_or_default();
        let first = next();
        if first == "K" {
            at = (next(), next());
            continue;
        }
        out.entry(at).or_default().push(Heading {
            name: first,
            kind: next(),
            format: next(),
            priority: next().parse().unwrap_or(0),
            description: next().replace("\\n", "\n"),
        });
    }
    out
});

fn of(kind: &Kind) -> Option<&'static Vec<Heading>> {
    let row = kind.row()?;
    // events.k8s.io Events are printed as core ones.
    let group = if row.kind == "Event" { "" } else { row.group };
    HEADINGS.get(&(group, row.plural))
}

/// Kinds without columns of their own show their name and creation time.
pub(crate) fn definitions(kind: &Kind) -> Vec<Value> {
    let headings = of(kind).or_else(|| HEADINGS.get(&("", "limitranges")));
    headings
        .into_iter()
        .flatten()
        .map(|h| super::definition(h.name, h.kind, h.format, &h.description, h.priority))
        .collect()
}

fn age_of(text: &str, now: Timestamp) -> String {
    match time::parse(text) {
        Some(at) => time::human((now.as_second() - at.as_second()).max(0)),
        None => "<unknown>".to_owned(),
    }
}

fn age(object: &Value, now: Timestamp) -> Value {
    json!(age_of(meta::text(object, "creationTimestamp"), now))
}

fn int(object: &Value, path: &str) -> i64 {
    meta::int_at(object, path).unwrap_or(0)
}

fn or_none(text: &str) -> &str {
    if text.is_empty() { "<none>" } else { text }
}

fn labels_text(map: Option<&Value>) -> String {
    let mut parts: Vec<String> = map
        .and_then(Value::as_object)
        .into_iter()
        .flatten()
        .map(|(k, v)| format!("{k}={}", v.as_str().unwrap_or_default()))
        .collect();
    parts.sort();
    if parts.is_empty() {
        "<none>".to_owned()
    } else {
        parts.join(",")
    }
}

fn containers(object: &Value, spec: &str) -> (String, String) {
    let list = meta::list_at(object, &format!("{spec}.containers"));
    let join = |field: &str| {
        list.iter()
            .map(|c| meta::str_at(c, field))
            .collect::<Vec<_>>()
            .join(",")
    };
    (join("name"), join("image"))
}

fn selector(object: &Value) -> String {
    match meta::at(object, "spec.selector") {
        None | Some(Value::Null) => "<none>".to_owned(),
        Some(selector) => or_none(&selector_text(selector)).to_owned(),
    }
}

pub(crate) fn cells(kind: &Kind, o: &Value, now: Timestamp) -> Vec<Value> {
    let name = json!(meta::name(o));
    let text = |path: &str| meta::str_at(o, path);
    let (names, images) = containers(o, "spec.template.spec");
    let Some(row) = kind.row() else { return vec![name] };
    match (row.group, row.plural) {
        ("", "pods") => pods::cells(o, now),
        ("", "configmaps") => {
            let count = |f: &str| {
                o.get(f)
                    .and_then(Value::as_object)
                    .map_or(0, serde_json::Map::len)
            };
            vec![name, json!(count("data") + count("binaryData")), age(o, now)]
        }
        ("", "secrets") => vec![
            name,
            json!(text("type")),
            json!(
                o.get("data")
                    .and_then(Value::as_object)
                    .map_or(0, serde_json::Map::len)
            ),
            age(o, now),
        ],
        ("", "namespaces") => vec![name, json!(text("status.phase")), age(o, now)],
        ("", "serviceaccounts") => vec![name, age(o, now)],
        ("", "nodes") => node(o, now),
        ("", "services") => service(o, now),
        ("", "endpoints") => vec![name, json!(endpoints(o)), age(o, now)],
        (_, "events") => event(o, now),
        ("", "persistentvolumes") => {
            let claim = meta::at(o, "spec.claimRef").map_or_else(String::new, |c| {
                format!("{}/{}", meta::str_at(c, "namespace"), meta::str_at(c, "name"))
            });
            vec![
                name,
                json!(text("spec.capacity.storage")),
                json!(access_modes(meta::list_at(o, "spec.accessModes"))),
                json!(text("spec.persistentVolumeReclaimPolicy")),
                json!(text("status.phase")),
                json!(claim),
                json!(text("spec.storageClassName")),
                json!(if text("spec.volumeAttributesClassName").is_empty() {
                    "<unset>"
                } else {
                    text("spec.volumeAttributesClassName")
                }),
                json!(text("status.reason")),
                age(o, now),
                json!(or_unset(text("spec.volumeMode"))),
            ]
        }
        ("", "persistentvolumeclaims") => vec![
            name,
            json!(text("status.phase")),
            json!(text("spec.volumeName")),
            json!(text("status.capacity.storage")),
            json!(access_modes(meta::list_at(o, "status.accessModes"))),
            json!(text("spec.storageClassName")),
            json!(or_unset(text("spec.volumeAttributesClassName"))),
            age(o, now),
            json!(or_unset(text("spec.volumeMode"))),
        ],
        ("", "podtemplates") => {
            let (names, images) = containers(o, "template.spec");
            vec![
                name,
                json!(names),
                json!(images),
                json!(labels_text(meta::at(o, "template.metadata.labels"))),
            ]
        }
        ("", "resourcequotas") => vec![name, json!(""), json!(""), age(o, now)],
        ("apps", "replicasets") | ("", "replicationcontrollers") => vec![
            name,
            json!(int(o, "spec.replicas")),
            json!(int(o, "status.replicas")),
            json!(int(o, "status.readyReplicas")),
            age(o, now),
            json!(names),
            json!(images),
            json!(selector(o)),
        ],
        ("apps", "deployments") => vec![
            name,
            json!(format!(
                "{}/{}",
                int(o, "status.readyReplicas"),
                int(o, "spec.replicas")
            )),
            json!(int(o, "status.updatedReplicas")),
            json!(int(o, "status.availableReplicas")),
            age(o, now),
            json!(names),
            json!(images),
            json!(selector(o)),
        ],
        ("apps", "statefulsets") => vec![
            name,
            json!(format!(
                "{}/{}",
                int(o, "status.readyReplicas"),
                int(o, "spec.replicas")
            )),
            age(o, now),
            json!(names),
            json!(images),
        ],
        ("apps", "daemonsets") => vec![
            name,
            json!(int(o, "status.desiredNumberScheduled")),
            json!(int(o, "status.currentNumberScheduled")),
            json!(int(o, "status.numberReady")),
            json!(int(o, "status.updatedNumberScheduled")),
            json!(int(o, "status.numberAvailable")),
            json!(labels_text(meta::at(o, "spec.template.spec.nodeSelector"))),
            age(o, now),
            json!(names),
            json!(images),
            json!(selector(o)),
        ],
        ("apps", "controllerrevisions") => {
            let controller = meta::list_at(o, "metadata.ownerReferences")
                .iter()
                .find(|r| r.get("controller") == Some(&Value::Bool(true)))
                .map_or_else(
                    || "<none>".to_owned(),
                    |r| {
                        format!(
                            "{}/{}",
                            meta::str_at(r, "kind").to_lowercase(),
                            meta::str_at(r, "name")
                        )
                    },
                );
            vec![name, json!(controller), json!(int(o, "revision")), age(o, now)]
        }
        ("batch", "jobs") => job(o, now, names, images),
        ("batch", "cronjobs") => {
            let (names, images) = containers(o, "spec.jobTemplate.spec.template.spec");
            let last = match text("status.lastScheduleTime") {
                "" => "<none>".to_owned(),
                at => age_of(at, now),
            };
            vec![
                name,
                json!(text("spec.schedule")),
                json!(or_none(text("spec.timeZone"))),
                json!(if meta::at(o, "spec.suspend") == Some(&Value::Bool(true)) {
                    "True"
                } else {
                    "False"
                }),
                json!(meta::list_at(o, "status.active").len()),
                json!(last),
                age(o, now),
                json!(names),
                json!(images),
                json!(
                    meta::at(o, "spec.jobTemplate.spec.selector")
                        .map_or_else(|| "<none>".to_owned(), selector_text)
                ),
            ]
        }
        ("coordination.k8s.io", _) => vec![name, json!(text("spec.holderIdentity")), age(o, now)],
        ("discovery.k8s.io", _) => endpoint_slice(o, now),
        ("networking.k8s.io", "ingressclasses") => {
            let parameters = meta::at(o, "spec.parameters").map_or_else(
                || "<none>".to_owned(),
                |p| {
                    let kind = meta::str_at(p, "kind");
                    let group = meta::str_at(p, "apiGroup");
                    let full = if group.is_empty() {
                        kind.to_owned()
                    } else {
                        format!("{kind}.{group}")
                    };
                    format!("{full}/{}", meta::str_at(p, "name"))
                },
            );
            vec![
                name,
                json!(text("spec.controller")),
                json!(parameters),
                age(o, now),
            ]
        }
        ("networking.k8s.io", "networkpolicies") => {
            let shown = meta::at(o, "spec.podSelector").map_or_else(String::new, selector_text);
            vec![name, json!(or_none(&shown)), age(o, now)]
        }
        ("networking.k8s.io", "ingresses") => ingress(o, now),
        ("rbac.authorization.k8s.io", "rolebindings" | "clusterrolebindings") => binding(o, now),
        ("scheduling.k8s.io", _) => vec![
            name,
            json!(int(o, "value")),
            json!(o.get("globalDefault") == Some(&Value::Bool(true))),
            age(o, now),
            json!(text("preemptionPolicy")),
        ],
        ("storage.k8s.io", "storageclasses") => {
            let default = meta::annotation(o, "storageclass.kubernetes.io/is-default-class") == Some("true");
            let shown = if default {
                format!("{} (default)", meta::name(o))
            } else {
                meta::name(o).to_owned()
            };
            vec![
                json!(shown),
                json!(text("provisioner")),
                json!(text("reclaimPolicy")),
                json!(text("volumeBindingMode")),
                json!(o.get("allowVolumeExpansion") == Some(&Value::Bool(true))),
                age(o, now),
            ]
        }
        ("autoscaling", _) => vec![
            name,
            json!(format!(
                "{}/{}",
                text("spec.scaleTargetRef.kind"),
                text("spec.scaleTargetRef.name")
            )),
            json!("<unknown>"),
            json!(int(o, "spec.minReplicas").to_string()),
            json!(int(o, "spec.maxReplicas")),
            json!(int(o, "status.currentReplicas")),
            age(o, now),
        ],
        _ => vec![name, json!(meta::text(o, "creationTimestamp"))],
    }
}

fn or_unset(text: &str) -> &str {
    if text.is_empty() { "<unset>" } else { text }
}

fn access_modes(modes: &[Value]) -> String {
    modes
        .iter()
        .filter_map(Value::as_str)
        .map(|m| match m {
            "ReadWriteOnce" => "RWO",
            "ReadOnlyMany" => "ROX",
            "ReadWriteMany" => "RWX",
            "ReadWriteOncePod" => "RWOP",
            other => other,
        })
        .collect::<Vec<_>>()
        .join(",")
}

fn node(o: &Value, now: Timestamp) -> Vec<Value> {
    let ready = meta::list_at(o, "status.conditions")
        .iter()
        .find(|c| meta::str_at(c, "type") == "Ready");
    let mut status = match ready.map(|c| meta::str_at(c, "status")) {
        Some("True") => "Ready",
        Some(_) => "NotReady",
        None => "Unknown",
    }
    .to_owned();
    if meta::at(o, "spec.unschedulable") == Some(&Value::Bool(true)) {
        status.push_str(",SchedulingDisabled");
    }
    let mut roles: Vec<&str> = meta::metadata(o)
        .get("labels")
        .and_then(Value::as_object)
        .into_iter()
        .flatten()
        .filter_map(|(k, v)| match k.strip_prefix("node-role.kubernetes.io/") {
            Some(role) if !role.is_empty() => Some(role),
            _ if k == "kubernetes.io/role" => v.as_str(),
            _ => None,
        })
        .collect();
    roles.sort_unstable();
    let address = |kind: &str| {
        meta::list_at(o, "status.addresses")
            .iter()
            .find(|a| meta::str_at(a, "type") == kind)
            .map_or("<none>", |a| meta::str_at(a, "address"))
    };
    let info = |f: &str| match meta::str_at(o, &format!("status.nodeInfo.{f}")) {
        "" => "<unknown>",
        text => text,
    };
    vec![
        json!(meta::name(o)),
        json!(status),
        json!(or_none(&roles.join(","))),
        age(o, now),
        json!(meta::str_at(o, "status.nodeInfo.kubeletVersion")),
        json!(address("InternalIP")),
        json!(address("ExternalIP")),
        json!(info("osImage")),
        json!(info("kernelVersion")),
        json!(info("containerRuntimeVersion")),
    ]
}

fn service(o: &Value, now: Timestamp) -> Vec<Value> {
    let kind = meta::str_at(o, "spec.type");
    let ports: Vec<String> = meta::list_at(o, "spec.ports")
        .iter()
        .map(|p| {
            let (port, node) = (int(p, "port"), int(p, "nodePort"));
            let protocol = meta::str_at(p, "protocol");
            if node > 0 {
                format!("{port}:{node}/{protocol}")
            } else {
                format!("{port}/{protocol}")
            }
        })
        .collect();
    let listed: Vec<&str> = meta::list_at(o, "spec.externalIPs")
        .iter()
        .filter_map(Value::as_str)
        .collect();
    let external = match kind {
        "ExternalName" => meta::str_at(o, "spec.externalName").to_owned(),
        "LoadBalancer" => {
            let mut all: Vec<&str> = meta::list_at(o, "status.loadBalancer.ingress")
                .iter()
                .map(|i| match meta::str_at(i, "ip") {
                    "" => meta::str_at(i, "hostname"),
                    ip => ip,
                })
                .collect();
            all.extend(listed);
            if all.is_empty() {
                "<pending>".to_owned()
            } else {
                all.join(",")
            }
        }
        _ => or_none(&listed.join(",")).to_owned(),
    };
    vec![
        json!(meta::name(o)),
        json!(kind),
        json!(or_none(meta::str_at(o, "spec.clusterIP"))),
        json!(external),
        json!(or_none(&ports.join(","))),
        age(o, now),
        json!(labels_text(meta::at(o, "spec.selector"))),
    ]
}

fn endpoints(o: &Value) -> String {
    let mut all = Vec::new();
    for subset in meta::list_at(o, "subsets") {
        for address in meta::list_at(subset, "addresses") {
            for port in meta::list_at(subset, "ports") {
                all.push(format!("{}:{}", meta::str_at(address, "ip"), int(port, "port")));
            }
        }
    }
    more(&all)
}

fn more(all: &[String]) -> String {
    const SHOWN: usize = 3;
    match all.len() {
        0 => "<none>".to_owned(),
        n if n > SHOWN => format!(
            "{} + {} more...",
            all.get(..SHOWN).unwrap_or_default().join(","),
            n - SHOWN
        ),
        _ => all.join(","),
    }
}

fn endpoint_slice(o: &Value, now: Timestamp) -> Vec<Value> {
    let ports: Vec<String> = meta::list_at(o, "ports")
        .iter()
        .map(|p| meta::int_at(p, "port").map_or_else(|| "*".to_owned(), |n| n.to_string()))
        .collect();
    let addresses: Vec<String> = meta::list_at(o, "endpoints")
        .iter()
        .flat_map(|e| meta::list_at(e, "addresses"))
        .filter_map(Value::as_str)
        .map(str::to_owned)
        .collect();
    let unset = |text: String| {
        if text == "<none>" {
            "<unset>".to_owned()
        } else {
            text
        }
    };
    vec![
        json!(meta::name(o)),
        json!(meta::str_at(o, "addressType")),
        json!(unset(more(&ports))),
        json!(unset(more(&addresses))),
        age(o, now),
    ]
}

fn event(o: &Value, now: Timestamp) -> Vec<Value> {
    let first_of = |paths: &[&str]| {
        paths
            .iter()
            .map(|p| meta::str_at(o, p))
            .find(|t| !t.is_empty())
            .unwrap_or_default()
            .to_owned()
    };
    let core_or_new = |core: &str, new: &str| match meta::at(o, core) {
        Some(v) => v.clone(),
        None => meta::at(o, new).cloned().unwrap_or_default(),
    };
    let first = first_of(&["firstTimestamp", "deprecatedFirstTimestamp", "eventTime"]);
    let last = first_of(&[
        "series.lastObservedTime",
        "lastTimestamp",
        "deprecatedLastTimestamp",
    ]);
    let last = if last.is_empty() { first.clone() } else { last };
    let object = core_or_new("involvedObject", "regarding");
    let source = core_or_new("source", "deprecatedSource");
    let component = match meta::str_at(&source, "component") {
        "" => first_of(&["reportingComponent", "reportingController"]),
        c => c.to_owned(),
    };
    let host = match meta::str_at(&source, "host") {
        "" => meta::str_at(o, "reportingInstance").to_owned(),
        h => h.to_owned(),
    };
    let count = meta::int_at(o, "series.count")
        .or(meta::int_at(o, "count"))
        .or(meta::int_at(o, "deprecatedCount"))
        .unwrap_or(1)
        .max(1);
    vec![
        json!(age_of(&last, now)),
        json!(meta::str_at(o, "type")),
        json!(meta::str_at(o, "reason")),
        json!(format!(
            "{}/{}",
            meta::str_at(&object, "kind").to_lowercase(),
            meta::str_at(&object, "name")
        )),
        json!(meta::str_at(&object, "fieldPath")),
        json!(if host.is_empty() {
            component
        } else {
            format!("{component}, {host}")
        }),
        json!(first_of(&["message", "note"]).trim()),
        json!(age_of(&first, now)),
        json!(count),
        json!(meta::name(o)),
    ]
}

fn job(o: &Value, now: Timestamp, names: String, images: String) -> Vec<Value> {
    let condition = |kind: &str| {
        meta::list_at(o, "status.conditions")
            .iter()
            .any(|c| meta::str_at(c, "type") == kind && meta::str_at(c, "status") == "True")
    };
    let status = if condition("Complete") {
        "Complete"
    } else if condition("Failed") {
        "Failed"
    } else if meta::is_terminating(o) {
        "Terminating"
    } else if condition("Suspended") {
        "Suspended"
    } else if condition("FailureTarget") {
        "FailureTarget"
    } else if condition("SuccessCriteriaMet") {
        "SuccessCriteriaMet"
    } else {
        "Running"
    };
    let succeeded = int(o, "status.succeeded");
    let completions = match (meta::int_at(o, "spec.completions"), int(o, "spec.parallelism")) {
        (Some(n), _) => format!("{succeeded}/{n}"),
        (None, p) if p > 1 => format!("{succeeded}/1 of {p}"),
        (None, _) => format!("{succeeded}/1"),
    };
    let start = time::parse(meta::str_at(o, "status.startTime"));
    let end = time::parse(meta::str_at(o, "status.completionTime")).unwrap_or(now);
    let duration = start.map_or_else(String::new, |s| {
        time::human((end.as_second() - s.as_second()).max(0))
    });
    vec![
        json!(meta::name(o)),
        json!(status),
        json!(completions),
        json!(duration),
        age(o, now),
        json!(names),
        json!(images),
        json!(selector(o)),
    ]
}

fn ingress(o: &Value, now: Timestamp) -> Vec<Value> {
    let hosts: Vec<&str> = meta::list_at(o, "spec.rules")
        .iter()
        .map(|r| meta::str_at(r, "host"))
        .filter(|h| !h.is_empty())
        .collect();
    let addresses: Vec<&str> = meta::list_at(o, "status.loadBalancer.ingress")
        .iter()
        .map(|i| match meta::str_at(i, "ip") {
            "" => meta::str_at(i, "hostname"),
            ip => ip,
        })
        .collect();
    let ports = if meta::list_at(o, "spec.tls").is_empty() {
        "80"
    } else {
        "80, 443"
    };
    vec![
        json!(meta::name(o)),
        json!(or_none(meta::str_at(o, "spec.ingressClassName"))),
        json!(if hosts.is_empty() {
            "*".to_owned()
        } else {
            hosts.join(",")
        }),
        json!(addresses.join(",")),
        json!(ports),
        age(o, now),
    ]
}

fn binding(o: &Value, now: Timestamp) -> Vec<Value> {
    let subjects = |kind: &str| {
        meta::list_at(o, "subjects")
            .iter()
            .filter(|s| meta::str_at(s, "kind") == kind)
            .map(|s| {
                if kind == "ServiceAccount" {
                    format!("{}/{}", meta::str_at(s, "namespace"), meta::str_at(s, "name"))
                } else {
                    meta::str_at(s, "name").to_owned()
                }
            })
            .collect::<Vec<_>>()
            .join(", ")
    };
    vec![
        json!(meta::name(o)),
        json!(format!(
            "{}/{}",
            meta::str_at(o, "roleRef.kind"),
            meta::str_at(o, "roleRef.name")
        )),
        age(o, now),
        json!(subjects("User")),
        json!(subjects("Group")),
        json!(subjects("ServiceAccount")),
    ]
}
