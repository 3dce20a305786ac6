//! The EndpointSlices that a Service should have: pure.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{ObjectReference, Pod, Service};
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointConditions, EndpointPort, EndpointSlice};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::{Resource, ResourceExt};

use super::template::ready_since;
use crate::services::listeners::target_port;
use crate::services::rules::SERVICE_NAME_LABEL;

/// Who manages a slice; others are left alone.
pub(crate) const MANAGED_BY_LABEL: &str = "endpointslice.kubernetes.io/managed-by";
/// Our name, Kubernetes' own: tools filter by it.
pub(crate) const MANAGER: &str = "endpointslice-controller.k8s.io";
const HEADLESS_LABEL: &str = "service.kubernetes.io/headless";
/// Most endpoints in a slice; Kubernetes' default.
const MAX_ENDPOINTS: usize = 100;

/// What to do with a Service's slices.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Plan {
    pub(crate) create: Vec<EndpointSlice>,
    pub(crate) update: Vec<EndpointSlice>,
    pub(crate) delete: Vec<String>,
}

/// Ports that pods share, in the Service's order.
type Ports = Vec<(Option<String>, i32, String, Option<String>)>;

/// Whether a Service has endpoints from pods.
pub(crate) fn has_endpoints(service: &Service) -> bool {
    let Some(spec) = &service.spec else { return false };
    spec.type_.as_deref() != Some("ExternalName")
        && spec
            .selector
            .as_ref()
            .is_some_and(|selector| !selector.is_empty())
}

pub(crate) fn selects(service: &Service, pod: &Pod) -> bool {
    let selector = service.spec.as_ref().and_then(|spec| spec.selector.as_ref());
    selector.is_some_and(|selector| {
        !selector.is_empty()
            && selector
                .iter()
                .all(|(key, value)| pod.labels().get(key) == Some(value))
    })
}

/// The difference between what is and what should be. `slices` are those of the Service that we manage.
pub(crate) fn plan<S: AsRef<EndpointSlice>, P: AsRef<Pod>>(
    service: &Service,
    pods: &[P],
    slices: &[S],
) -> Plan {
    let mut plan = Plan::default();
    let mut by_ports: BTreeMap<Ports, Vec<Endpoint>> = BTreeMap::new();
    if has_endpoints(service) {
        for pod in pods.iter().map(AsRef::as_ref).filter(|pod| selects(service, pod)) {
            if let Some(endpoint) = endpoint(service, pod) {
                by_ports.entry(ports_of(service, pod)).or_default().push(endpoint);
            }
        }
        if by_ports.is_empty() {
            // One slice without endpoints, so that "none" can be told from "not looked at yet".
            by_ports.insert(Vec::new(), Vec::new());
        }
    }
    let mut unused: Vec<&EndpointSlice> = slices.iter().map(AsRef::as_ref).collect();
    unused.sort_by_key(|slice| slice.name_any());
    for (ports, mut endpoints) in by_ports {
        endpoints.sort_by(|a, b| a.addresses.cmp(&b.addresses));
        let mut chunks: Vec<Vec<Endpoint>> = endpoints
            .chunks(MAX_ENDPOINTS)
            .map(<[Endpoint]>::to_vec)
            .collect();
        if chunks.is_empty() {
            chunks.push(Vec::new());
        }
        for chunk in chunks {
            let wanted = slice(service, &ports, chunk);
            // The one with the same ports and the most endpoints in common, so that little is rewritten.
            let best = unused
                .iter()
                .enumerate()
                .filter(|(_, known)| {
                    known.ports.clone().unwrap_or_default() == wanted.ports.clone().unwrap_or_default()
                })
                .max_by_key(|(_, known)| {
                    known
                        .endpoints
                        .iter()
                        .filter(|old| wanted.endpoints.iter().any(|new| new.addresses == old.addresses))
                        .count()
                })
                .map(|(position, _)| position)
                // An empty slice takes the ports of the first pods.
                .or_else(|| unused.iter().position(|known| known.endpoints.is_empty()));
            match best {
                None => plan.create.push(wanted),
                Some(position) => {
                    let known = unused.remove(position);
                    let same_labels = wanted
                        .labels()
                        .iter()
                        .all(|(key, value)| known.labels().get(key) == Some(value))
                        && known.labels().len() == wanted.labels().len();
                    let same_ports =
                        known.ports.clone().unwrap_or_default() == wanted.ports.clone().unwrap_or_default();
                    if !same_labels || !same_ports || known.endpoints != wanted.endpoints {
                        let mut updated = known.clone();
                        updated.metadata.labels = wanted.metadata.labels;
                        updated.ports = wanted.ports;
                        updated.endpoints = wanted.endpoints;
                        plan.update.push(updated);
                    }
                }
            }
        }
    }
    plan.delete = unused.iter().map(|slice| slice.name_any()).collect();
    plan
}

fn ports_of(service: &Service, pod: &Pod) -> Ports {
    let spec = service.spec.as_ref();
    spec.iter()
        .flat_map(|spec| spec.ports.iter().flatten())
        .filter_map(|port| {
            let number = i32::from(target_port(port, pod)?);
            let protocol = port.protocol.clone().unwrap_or_else(|| "TCP".to_owned());
            Some((port.name.clone(), number, protocol, port.app_protocol.clone()))
        })
        .collect()
}

fn endpoint(service: &Service, pod: &Pod) -> Option<Endpoint> {
    let status = pod.status.as_ref()?;
    if matches!(status.phase.as_deref(), Some("Succeeded" | "Failed")) {
        return None;
    }
    let address = status.pod_ip.clone().filter(|address| !address.is_empty())?;
    let serving = ready_since(pod).is_some();
    let terminating = pod.metadata.deletion_timestamp.is_some();
    let publish = service
        .spec
        .as_ref()
        .and_then(|spec| spec.publish_not_ready_addresses)
        .unwrap_or(false);
    let spec = pod.spec.as_ref();
    let subdomain = spec.and_then(|spec| spec.subdomain.clone());
    let hostname = spec
        .and_then(|spec| spec.hostname.clone())
        .filter(|hostname| !hostname.is_empty() && subdomain.as_deref() == service.metadata.name.as_deref());
    Some(Endpoint {
        addresses: vec![address],
        conditions: Some(EndpointConditions {
            ready: Some(publish || (serving && !terminating)),
            serving: Some(serving),
            terminating: Some(terminating),
        }),
        hostname,
        node_name: spec.and_then(|spec| spec.node_name.clone()),
        target_ref: Some(ObjectReference {
            kind: Some("Pod".to_owned()),
            name: pod.metadata.name.clone(),
            namespace: pod.metadata.namespace.clone(),
            uid: pod.metadata.uid.clone(),
            ..ObjectReference::default()
        }),
        ..Endpoint::default()
    })
}

fn slice(service: &Service, ports: &Ports, endpoints: Vec<Endpoint>) -> EndpointSlice {
    let mut labels: BTreeMap<String, String> = service.labels().clone();
    labels.insert(SERVICE_NAME_LABEL.to_owned(), service.name_any());
    labels.insert(MANAGED_BY_LABEL.to_owned(), MANAGER.to_owned());
    if service.spec.as_ref().and_then(|spec| spec.cluster_ip.as_deref()) == Some("None") {
        labels.insert(HEADLESS_LABEL.to_owned(), String::new());
    } else {
        labels.remove(HEADLESS_LABEL);
    }
    let ports: Vec<EndpointPort> = ports
        .iter()
        .map(|(name, port, protocol, app_protocol)| EndpointPort {
            name: Some(name.clone().unwrap_or_default()),
            port: Some(*port),
            protocol: Some(protocol.clone()),
            app_protocol: app_protocol.clone(),
        })
        .collect();
    EndpointSlice {
        metadata: ObjectMeta {
            generate_name: Some(format!("{}-", service.name_any())),
            namespace: service.namespace(),
            labels: Some(labels),
            owner_references: service.controller_owner_ref(&()).map(|mut owner| {
                owner.block_owner_deletion = Some(true);
                vec![owner]
            }),
            ..ObjectMeta::default()
        },
        address_type: "IPv4".to_owned(),
        endpoints,
        ports: (!ports.is_empty()).then_some(ports),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use serde_json::json;

    use super::*;

    fn service(ports: serde_json::Value) -> Service {
        serde_json::from_value(
            json!({"metadata": {"name": "s", "namespace": "n", "uid": "u", "labels": {"team": "a"}},
            "spec": {"clusterIP": "10.96.0.5", "selector": {"app": "x"}, "ports": ports}}),
        )
        .unwrap()
    }

    fn pod(name: &str, ip: &str, ready: bool, terminating: bool, port: i32) -> Arc<Pod> {
        let mut object = json!({"metadata": {"name": name, "namespace": "n", "uid": name, "labels": {"app": "x"}},
            "spec": {"nodeName": "node", "containers": [{"name": "c", "ports": [{"name": "http", "containerPort": port}]}]},
            "status": {"phase": "Running", "podIP": ip,
                       "conditions": [{"type": "Ready", "status": if ready { "True" } else { "False" }}]}});
        if terminating {
            object["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
        }
        Arc::new(serde_json::from_value(object).unwrap())
    }

    fn named(mut slice: EndpointSlice, name: &str) -> Arc<EndpointSlice> {
        slice.metadata.name = Some(name.to_owned());
        Arc::new(slice)
    }

    const NONE: [Arc<EndpointSlice>; 0] = [];

    #[test]
    fn conditions_tell_ready_serving_and_terminating_apart() {
        let pods = [
            pod("ready", "10.244.0.2", true, false, 80),
            pod("starting", "10.244.0.3", false, false, 80),
            pod("draining", "10.244.0.4", true, true, 80),
            pod("gone", "", true, false, 80),
        ];
        let plan = plan(
            &service(json!([{"port": 80, "targetPort": "http"}])),
            &pods,
            &NONE,
        );
        let slice = &plan.create[0];
        let found: Vec<_> = slice
            .endpoints
            .iter()
            .map(|endpoint| {
                let c = endpoint.conditions.as_ref().unwrap();
                (
                    endpoint.addresses[0].as_str(),
                    c.ready.unwrap(),
                    c.serving.unwrap(),
                    c.terminating.unwrap(),
                )
            })
            .collect();
        assert_eq!(
            found,
            [
                ("10.244.0.2", true, true, false),
                ("10.244.0.3", false, false, false),
                ("10.244.0.4", false, true, true)
            ]
        );
        assert_eq!(slice.labels()[SERVICE_NAME_LABEL], "s");
        assert_eq!(slice.labels()["team"], "a");
        assert_eq!(
            slice.metadata.owner_references.as_ref().unwrap()[0].kind,
            "Service"
        );
    }

    #[test]
    fn pods_whose_named_port_has_another_number_are_in_another_slice() {
        let pods = [
            pod("a", "10.244.0.2", true, false, 80),
            pod("b", "10.244.0.3", true, false, 8080),
        ];
        let plan = plan(
            &service(json!([{"name": "web", "port": 80, "targetPort": "http"}])),
            &pods,
            &NONE,
        );
        let mut ports: Vec<_> = plan
            .create
            .iter()
            .map(|slice| slice.ports.as_ref().unwrap()[0].port.unwrap())
            .collect();
        ports.sort_unstable();
        assert_eq!(ports, [80, 8080]);
    }

    #[test]
    fn a_change_updates_the_slice_that_is_there_and_no_change_writes_nothing() {
        let service = service(json!([{"port": 80, "targetPort": "http"}]));
        let empty = plan(&service, &[] as &[Arc<Pod>], &NONE);
        let known = named(empty.create[0].clone(), "s-1");
        let pods = [pod("a", "10.244.0.2", true, false, 80)];
        let filled = plan(&service, &pods, &[known]);
        assert_eq!(
            (filled.create.len(), filled.update.len(), filled.delete.len()),
            (0, 1, 0)
        );
        let known = named(filled.update[0].clone(), "s-1");
        assert_eq!(
            plan(&service, &pods, std::slice::from_ref(&known)),
            Plan::default()
        );
        let no_selector: Service =
            serde_json::from_value(json!({"metadata": {"name": "s"}, "spec": {"ports": []}})).unwrap();
        assert_eq!(plan(&no_selector, &pods, &[known]).delete, ["s-1"]);
    }

    #[test]
    fn many_endpoints_are_spread_over_slices_of_a_hundred() {
        let pods: Vec<_> = (0..250)
            .map(|i| pod(&format!("p{i}"), &format!("10.244.1.{i}"), true, false, 80))
            .collect();
        let plan = plan(&service(json!([{"port": 80}])), &pods, &NONE);
        let sizes: Vec<usize> = plan.create.iter().map(|slice| slice.endpoints.len()).collect();
        assert_eq!(sizes, [100, 100, 50]);
    }
}
