//! What a workload receives on: the ports of the services that select it.

use std::collections::BTreeMap;
use std::sync::Arc;

use serin_model::{Model, Protocol, Service, TargetPort};

use super::listener::InboundPort;
use crate::proxy_identity::Proxy;

/// The ports of a workload. Where two services lead to one port, the senior one decides what
/// it speaks, and those that agree with it are named too.
///
/// Readiness plays no part: the sidecar must be configured before its Pod can become ready.
pub(super) fn ports(model: &Model, proxy: &Proxy) -> Vec<InboundPort> {
    let pod = model.workload(&proxy.namespace, &proxy.name);
    let labels = pod.map_or(&proxy.labels, |pod| &pod.labels);
    let mut by_target: BTreeMap<u16, InboundPort> = BTreeMap::new();
    let mut services: Vec<&Arc<Service>> = model.services_selecting(&proxy.namespace, labels).collect();
    services.sort_by(|a, b| a.seniority.cmp(&b.seniority));
    for service in services {
        for port in service.ports.iter().filter(|port| port.protocol != Protocol::Udp) {
            let target = match &port.target {
                TargetPort::Number(number) => Some(*number),
                TargetPort::Name(name) => pod.and_then(|pod| pod.named_ports.get(&**name)).copied(),
            };
            let Some(target) = target else { continue };
            let entry = by_target.entry(target).or_insert_with(|| InboundPort {
                target,
                protocol: port.protocol,
                service_port: port.number,
                hosts: Vec::new(),
            });
            if entry.service_port == port.number && entry.protocol == port.protocol {
                entry.hosts.push(service.host.clone());
            }
        }
    }
    by_target.into_values().collect()
}
