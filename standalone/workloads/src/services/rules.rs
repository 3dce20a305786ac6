//! The nftables ruleset for ClusterIP Services: pure.
//!
//! One verdict map from address, protocol and port to a chain; a chain per Service port that translates to one of its
//! endpoints at random. The first packet of a connection decides; connection tracking keeps it there, so that an
//! endpoint's removal does not cut what is open. A change of one Service is a script of a few lines whatever the
//! number of Services.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::net::Ipv4Addr;

use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::EndpointSlice;

/// The label that ties a slice to its Service.
pub(crate) const SERVICE_NAME_LABEL: &str = "kubernetes.io/service-name";
const TABLE: &str = "ip serin";

/// Where a Service port is reached.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Frontend {
    pub(crate) address: Ipv4Addr,
    /// `tcp`, `udp` or `sctp`.
    pub(crate) protocol: &'static str,
    pub(crate) port: u16,
}

/// A Service port with its endpoints.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Target {
    /// `namespace/name`.
    service: String,
    endpoints: BTreeSet<(Ipv4Addr, u16)>,
}

/// What should be (or is) in the kernel.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Ruleset {
    targets: BTreeMap<Frontend, Target>,
}

fn protocol(name: Option<&str>) -> &'static str {
    match name {
        Some("UDP") => "udp",
        Some("SCTP") => "sctp",
        _ => "tcp",
    }
}

/// Endpoints of a Service port that may get traffic: the ready ones; if there are none, those that are terminating
/// but still serve, as kube-proxy does.
pub(crate) fn endpoints<S: AsRef<EndpointSlice>>(
    slices: &[S],
    port_name: &str,
    wanted: &str,
) -> BTreeSet<(Ipv4Addr, u16)> {
    let (mut ready, mut draining) = (BTreeSet::new(), BTreeSet::new());
    for slice in slices {
        let slice = slice.as_ref();
        let port = slice.ports.iter().flatten().find(|port| {
            port.name.as_deref().unwrap_or_default() == port_name
                && protocol(port.protocol.as_deref()) == wanted
        });
        let Some(port) = port.and_then(|port| u16::try_from(port.port?).ok()) else {
            continue;
        };
        for endpoint in &slice.endpoints {
            let Some(address) = endpoint
                .addresses
                .first()
                .and_then(|address| address.parse().ok())
            else {
                continue;
            };
            let conditions = endpoint.conditions.clone().unwrap_or_default();
            if conditions.ready.unwrap_or(true) {
                ready.insert((address, port));
            } else if conditions.serving.unwrap_or(false) && conditions.terminating.unwrap_or(false) {
                draining.insert((address, port));
            }
        }
    }
    if ready.is_empty() { draining } else { ready }
}

impl Ruleset {
    /// Takes in the state of one Service; none removes it.
    pub(crate) fn set<S: AsRef<EndpointSlice>>(
        &mut self,
        namespace: &str,
        name: &str,
        service: Option<&Service>,
        slices: &[S],
        dns: Ipv4Addr,
    ) {
        let id = format!("{namespace}/{name}");
        self.targets.retain(|_, target| target.service != id);
        let Some(spec) = service.and_then(|service| service.spec.as_ref()) else {
            return;
        };
        let Some(address) = spec
            .cluster_ip
            .as_deref()
            .and_then(|ip| ip.parse::<Ipv4Addr>().ok())
        else {
            return;
        };
        // The DNS server listens there itself.
        if address == dns {
            return;
        }
        for port in spec.ports.iter().flatten() {
            let Ok(number) = u16::try_from(port.port) else {
                continue;
            };
            let protocol = protocol(port.protocol.as_deref());
            let frontend = Frontend {
                address,
                protocol,
                port: number,
            };
            let target = Target {
                service: id.clone(),
                endpoints: endpoints(slices, port.name.as_deref().unwrap_or_default(), protocol),
            };
            self.targets.insert(frontend, target);
        }
    }

    fn pod_addresses(&self) -> BTreeSet<Ipv4Addr> {
        self.targets
            .values()
            .flat_map(|target| target.endpoints.iter().map(|(address, _)| *address))
            .collect()
    }
}

fn chain(frontend: &Frontend) -> String {
    format!(
        "svc_{}_{}_{}",
        frontend.address.to_string().replace('.', "_"),
        frontend.protocol,
        frontend.port
    )
}

/// nft takes one statement per line. A nat chain cannot reject, so a port without endpoints is refused in the filter
/// hooks: at once, as kube-proxy does, instead of timing out.
fn fill_chain(script: &mut String, frontend: &Frontend, target: &Target) {
    if target.endpoints.is_empty() {
        let _ = writeln!(script, "add element {TABLE} refused {{ {} }}", key(frontend));
        return;
    }
    let endpoints: Vec<String> = target
        .endpoints
        .iter()
        .enumerate()
        .map(|(position, (address, port))| format!("{position} : {address} . {port}"))
        .collect();
    let _ = writeln!(
        script,
        "add rule {TABLE} {} meta l4proto {} dnat ip to numgen random mod {} map {{ {} }}",
        chain(frontend),
        frontend.protocol,
        endpoints.len(),
        endpoints.join(", ")
    );
}

fn key(frontend: &Frontend) -> String {
    format!("{} . {} . {}", frontend.address, frontend.protocol, frontend.port)
}

/// The script that turns `from` (nothing known if none) into `to`, atomically.
pub(crate) fn script(from: Option<&Ruleset>, to: &Ruleset) -> String {
    let mut script = String::new();
    let empty = Ruleset::default();
    let from = match from {
        Some(from) => from,
        None => {
            // The first line makes the second one possible when there is no table yet.
            let _ = write!(
                script,
                "add table {TABLE}\ndelete table {TABLE}\nadd table {TABLE}\n\
                 add map {TABLE} services {{ type ipv4_addr . inet_proto . inet_service : verdict ; }}\n\
                 add set {TABLE} refused {{ type ipv4_addr . inet_proto . inet_service ; }}\n\
                 add set {TABLE} hairpin {{ type ipv4_addr . ipv4_addr ; }}\n\
                 add chain {TABLE} prerouting {{ type nat hook prerouting priority -100 ; }}\n\
                 add chain {TABLE} output {{ type nat hook output priority -100 ; }}\n\
                 add chain {TABLE} postrouting {{ type nat hook postrouting priority 100 ; }}\n\
                 add chain {TABLE} refuse_forward {{ type filter hook forward priority 0 ; }}\n\
                 add chain {TABLE} refuse_output {{ type filter hook output priority 0 ; }}\n\
                 add rule {TABLE} prerouting ip daddr . meta l4proto . th dport vmap @services\n\
                 add rule {TABLE} output ip daddr . meta l4proto . th dport vmap @services\n\
                 add rule {TABLE} postrouting ct status dnat ip saddr . ip daddr @hairpin masquerade\n\
                 add rule {TABLE} refuse_forward ip daddr . meta l4proto . th dport @refused reject\n\
                 add rule {TABLE} refuse_output ip daddr . meta l4proto . th dport @refused reject\n"
            );
            &empty
        }
    };
    for (frontend, target) in &from.targets {
        match to.targets.get(frontend) {
            Some(same) if same == target => {}
            Some(_) => {
                let _ = writeln!(script, "flush chain {TABLE} {}", chain(frontend));
                if target.endpoints.is_empty() {
                    let _ = writeln!(script, "delete element {TABLE} refused {{ {} }}", key(frontend));
                }
            }
            None => {
                let _ = writeln!(script, "delete element {TABLE} services {{ {} }}", key(frontend));
                if target.endpoints.is_empty() {
                    let _ = writeln!(script, "delete element {TABLE} refused {{ {} }}", key(frontend));
                }
                let _ = writeln!(
                    script,
                    "flush chain {TABLE} {0}\ndelete chain {TABLE} {0}",
                    chain(frontend)
                );
            }
        }
    }
    for (frontend, target) in &to.targets {
        match from.targets.get(frontend) {
            Some(same) if same == target => {}
            Some(_) => fill_chain(&mut script, frontend, target),
            None => {
                let name = chain(frontend);
                let _ = writeln!(script, "add chain {TABLE} {name}");
                fill_chain(&mut script, frontend, target);
                let _ = writeln!(
                    script,
                    "add element {TABLE} services {{ {} : jump {name} }}",
                    key(frontend)
                );
            }
        }
    }
    // A pod that reaches itself through a Service must see another source, or its answer never leaves it.
    let (before, after) = (from.pod_addresses(), to.pod_addresses());
    for (verb, addresses) in [
        ("delete", before.difference(&after)),
        ("add", after.difference(&before)),
    ] {
        for address in addresses {
            let _ = writeln!(
                script,
                "{verb} element {TABLE} hairpin {{ {address} . {address} }}"
            );
        }
    }
    script
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use serde_json::json;

    use super::*;

    const DNS: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 10);

    fn service(ip: &str, port: u16) -> Service {
        serde_json::from_value(json!({"spec": {"clusterIP": ip, "ports": [{"name": "http", "port": port}]}}))
            .unwrap()
    }

    fn slice(endpoints: &[(&str, bool, bool)]) -> Arc<EndpointSlice> {
        let endpoints: Vec<_> = endpoints
            .iter()
            .map(|(address, ready, terminating)| {
                json!({"addresses": [address],
                       "conditions": {"ready": ready, "serving": true, "terminating": terminating}})
            })
            .collect();
        Arc::new(
            serde_json::from_value(json!({"metadata": {}, "addressType": "IPv4",
                "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}], "endpoints": endpoints}))
            .unwrap(),
        )
    }

    fn ruleset(services: &[(&str, &str, &[(&str, bool, bool)])]) -> Ruleset {
        let mut ruleset = Ruleset::default();
        for (name, ip, endpoints) in services {
            ruleset.set("n", name, Some(&service(ip, 80)), &[slice(endpoints)], DNS);
        }
        ruleset
    }

    #[test]
    fn a_change_of_one_service_is_a_script_about_that_service_alone() {
        let before = ruleset(&[
            ("a", "10.96.0.1", &[("10.244.0.2", true, false)]),
            ("b", "10.96.0.2", &[("10.244.0.3", true, false)]),
        ]);
        let after = ruleset(&[
            ("a", "10.96.0.1", &[("10.244.0.2", true, false)]),
            (
                "b",
                "10.96.0.2",
                &[("10.244.0.3", true, false), ("10.244.0.4", true, false)],
            ),
        ]);
        let script = script(Some(&before), &after);
        assert!(
            !script.contains("10.96.0.1 ") && !script.contains("10_96_0_1_"),
            "{script}"
        );
        assert_eq!(
            script,
            "flush chain ip serin svc_10_96_0_2_tcp_80\n\
             add rule ip serin svc_10_96_0_2_tcp_80 meta l4proto tcp dnat ip to numgen random mod 2 map { 0 : 10.244.0.3 . 8080, 1 : 10.244.0.4 . 8080 }\n\
             add element ip serin hairpin { 10.244.0.4 . 10.244.0.4 }\n"
        );
        assert_eq!(super::script(Some(&after), &after), "");
    }

    #[test]
    fn a_service_without_endpoints_refuses_and_terminating_endpoints_serve_only_if_no_other_is_left() {
        let none = ruleset(&[("a", "10.96.0.1", &[("10.244.0.2", false, false)])]);
        assert!(script(None, &none).contains("add element ip serin refused { 10.96.0.1 . tcp . 80 }"));
        let slices = [slice(&[("10.244.0.2", false, true), ("10.244.0.3", true, false)])];
        let ready: Vec<_> = endpoints(&slices, "http", "tcp").into_iter().collect();
        assert_eq!(ready, [(Ipv4Addr::new(10, 244, 0, 3), 8080)]);
        let slices = [slice(&[("10.244.0.2", false, true)])];
        assert_eq!(endpoints(&slices, "http", "tcp").len(), 1);
    }

    #[test]
    fn headless_services_and_the_dns_address_get_no_rules() {
        assert_eq!(ruleset(&[("a", "None", &[])]), Ruleset::default());
        assert_eq!(ruleset(&[("kube-dns", "10.96.0.10", &[])]), Ruleset::default());
    }

    #[test]
    fn what_is_removed_leaves_no_chain_element_or_address_behind() {
        let before = ruleset(&[("a", "10.96.0.1", &[("10.244.0.2", true, false)])]);
        assert_eq!(
            script(Some(&before), &Ruleset::default()),
            "delete element ip serin services { 10.96.0.1 . tcp . 80 }\n\
             flush chain ip serin svc_10_96_0_1_tcp_80\n\
             delete chain ip serin svc_10_96_0_1_tcp_80\n\
             delete element ip serin hairpin { 10.244.0.2 . 10.244.0.2 }\n"
        );
    }
}
