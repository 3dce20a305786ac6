//! Cluster IPs and node ports of Services.

use std::collections::HashSet;
use std::net::Ipv4Addr;

use serde_json::{Value, json};

use crate::error::FieldError;
use crate::meta;

/// 10.96.0.0/16, as kubeadm has it.
const NETWORK: [u8; 2] = [10, 96];
const NODE_PORTS: std::ops::RangeInclusive<u16> = 30000..=32767;
/// The first addresses are left for those who ask for one, as Kubernetes does.
const RESERVED_ADDRESSES: u16 = 256;

/// What is taken. Derived from the stored Services, never stored itself.
#[derive(Debug, Default)]
pub(crate) struct Allocator {
    addresses: HashSet<u16>,
    ports: HashSet<u16>,
    next_address: u16,
    next_port: u16,
}

fn host_part(address: &str) -> Option<u16> {
    let octets = address.parse::<Ipv4Addr>().ok()?.octets();
    (octets[..2] == NETWORK).then(|| u16::from_be_bytes([octets[2], octets[3]]))
}

fn address(host: u16) -> String {
    let [c, d] = host.to_be_bytes();
    Ipv4Addr::new(NETWORK[0], NETWORK[1], c, d).to_string()
}

impl Allocator {
    /// Take what a stored Service holds.
    pub(crate) fn restore(&mut self, service: &Value) {
        self.addresses
            .extend(host_part(meta::str_at(service, "spec.clusterIP")));
        self.ports.extend(ports_of(service));
    }

    pub(crate) fn release(&mut self, service: &Value) {
        if let Some(host) = host_part(meta::str_at(service, "spec.clusterIP")) {
            self.addresses.remove(&host);
        }
        for port in ports_of(service) {
            self.ports.remove(&port);
        }
    }

    /// A Service was written: what it holds is taken, what it held before is free.
    pub(crate) fn replace(&mut self, old: Option<&Value>, new: &Value) {
        if let Some(old) = old {
            self.release(old);
        }
        self.restore(new);
    }

    /// Complete a Service with addresses and ports. They are taken only when the Service is written ([`Self::replace`]);
    /// the cursors move on with every call, so that concurrent writers are not offered the same ones.
    pub(crate) fn assign(
        &mut self,
        service: &mut Value,
        live: Option<&Value>,
    ) -> Result<(), Vec<FieldError>> {
        let kind = meta::str_at(service, "spec.type").to_owned();
        let held_ports: HashSet<u16> = live.map(|l| ports_of(l).collect()).unwrap_or_default();
        let held_address = live
            .map(|l| meta::str_at(l, "spec.clusterIP").to_owned())
            .unwrap_or_default();
        let mut errors = Vec::new();
        let mut taken_ports = Vec::new();
        if kind == "ExternalName" {
            let spec = meta::member_object(service, "spec");
            for field in ["clusterIP", "clusterIPs", "ipFamilies", "ipFamilyPolicy"] {
                spec.remove(field);
            }
        } else {
            let spec = meta::member_object(service, "spec");
            let asked = match spec.get("clusterIP").and_then(Value::as_str).unwrap_or_default() {
                "" => held_address.clone(),
                text => text.to_owned(),
            };
            let given = if asked.is_empty() {
                address(self.free_address())
            } else if asked == "None" || asked == held_address {
                asked
            } else {
                match host_part(&asked) {
                    None => {
                        errors.push(FieldError::invalid(
                            "spec.clusterIPs",
                            &json!([asked]),
                            format!("failed to allocate IP {asked}: the provided IP ({asked}) is not in the valid range. The range of valid IPs is 10.96.0.0/16"),
                        ));
                    }
                    Some(host) if self.addresses.contains(&host) => {
                        errors.push(FieldError::invalid(
                            "spec.clusterIPs",
                            &json!([asked]),
                            format!("failed to allocate IP {asked}: provided IP is already allocated"),
                        ));
                    }
                    Some(_) => {}
                }
                asked
            };
            spec.insert("clusterIP".into(), json!(given));
            spec.insert("clusterIPs".into(), json!([given]));
            super::set(spec, "ipFamilies", json!(["IPv4"]));
            super::set(spec, "ipFamilyPolicy", json!("SingleStack"));
        }
        let wants_ports = kind == "NodePort"
            || (kind == "LoadBalancer"
                && meta::at(service, "spec.allocateLoadBalancerNodePorts") != Some(&json!(false)));
        let spec = meta::member_object(service, "spec");
        let old_ports = live
            .map(|l| meta::list_at(l, "spec.ports").to_vec())
            .unwrap_or_default();
        for (i, port) in spec
            .get_mut("ports")
            .and_then(Value::as_array_mut)
            .into_iter()
            .flatten()
            .enumerate()
        {
            let map = meta::as_object_mut(port);
            let asked = map
                .get("nodePort")
                .and_then(Value::as_u64)
                .and_then(|p| u16::try_from(p).ok())
                .unwrap_or(0);
            if !wants_ports && kind != "LoadBalancer" {
                map.remove("nodePort");
                continue;
            }
            if asked != 0 {
                if !held_ports.contains(&asked) && !taken_ports.contains(&asked) {
                    if !NODE_PORTS.contains(&asked) {
                        errors.push(FieldError::invalid(format!("spec.ports[{i}].nodePort"), &json!(asked), "provided port is not in the valid range. The range of valid ports is 30000-32767"));
                    } else if self.ports.contains(&asked) {
                        errors.push(FieldError::invalid(
                            format!("spec.ports[{i}].nodePort"),
                            &json!(asked),
                            "provided port is already allocated",
                        ));
                    } else {
                        taken_ports.push(asked);
                    }
                }
                continue;
            }
            if !wants_ports {
                continue;
            }
            // The same port of the live Service keeps its node port.
            let kept = old_ports
                .iter()
                .find(|o| o.get("port") == map.get("port") && o.get("protocol") == map.get("protocol"))
                .and_then(|o| o.get("nodePort").cloned());
            let number = match kept {
                Some(kept) => kept,
                None => {
                    let free = self.free_port(&taken_ports);
                    taken_ports.push(free);
                    json!(free)
                }
            };
            map.insert("nodePort".into(), number);
        }
        if kind == "LoadBalancer" && meta::str_at(service, "spec.externalTrafficPolicy") == "Local" {
            let spec = meta::member_object(service, "spec");
            if spec
                .get("healthCheckNodePort")
                .and_then(Value::as_u64)
                .unwrap_or(0)
                == 0
            {
                let free = self.free_port(&taken_ports);
                spec.insert("healthCheckNodePort".into(), json!(free));
            }
        }
        if !errors.is_empty() {
            return Err(errors);
        }
        Ok(())
    }

    fn free_address(&mut self) -> u16 {
        for _ in 0..=u16::MAX {
            self.next_address = self.next_address.wrapping_add(1).max(RESERVED_ADDRESSES);
            if self.next_address != u16::MAX && !self.addresses.contains(&self.next_address) {
                break;
            }
        }
        self.next_address
    }

    fn free_port(&mut self, taken: &[u16]) -> u16 {
        for _ in NODE_PORTS {
            self.next_port = if NODE_PORTS.contains(&(self.next_port + 1)) {
                self.next_port + 1
            } else {
                *NODE_PORTS.start()
            };
            if !self.ports.contains(&self.next_port) && !taken.contains(&self.next_port) {
                break;
            }
        }
        self.next_port
    }
}

fn ports_of(service: &Value) -> impl Iterator<Item = u16> {
    meta::list_at(service, "spec.ports")
        .iter()
        .filter_map(|p| p.get("nodePort"))
        .chain(meta::at(service, "spec.healthCheckNodePort"))
        .filter_map(Value::as_u64)
        .filter_map(|p| u16::try_from(p).ok())
        .filter(|p| *p != 0)
}
