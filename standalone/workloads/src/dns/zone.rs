//! The cluster's names.
//!
//! ```text
//! svc.ns.svc.cluster.local                A     ClusterIP, or the ready endpoints of a headless Service
//! name.svc.ns.svc.cluster.local           A     the endpoint with that hostname, or with dashes for dots its address
//! _port._proto.svc.ns.svc.cluster.local   SRV   one per (headless: endpoint and) named port
//! 10-244-0-7.ns.pod.cluster.local         A     that address
//! ```
//! ExternalName is a CNAME. AAAA and other types of an existing name are an empty answer (NODATA), other names below
//! the cluster's domain do not exist (NXDOMAIN); both carry the SOA, so that resolvers may remember it.

use std::net::Ipv4Addr;

use hickory_proto::op::{Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::rdata::{A, CNAME, SOA, SRV};
use hickory_proto::rr::{DNSClass, Name, RData, Record, RecordType};
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointSlice};

use crate::mirror::Mirror;
use crate::services::slices_of;

/// Seconds that an answer may be remembered; CoreDNS's is 5, but here an old answer of a headless Service is a
/// connection to a pod that is gone.
const TTL: u32 = 2;
/// Most records in one answer; a headless Service may have thousands of endpoints.
const MAX_RECORDS: usize = 512;

/// What the DNS server knows.
#[derive(Clone)]
pub(crate) struct Zone {
    domain: Vec<String>,
    services: Mirror<Service>,
    slices: Mirror<EndpointSlice>,
}

/// What a name stands for.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
struct Found {
    addresses: Vec<Ipv4Addr>,
    /// Port and target's first label(s) below the Service's name.
    srv: Vec<(u16, Option<String>, Ipv4Addr)>,
    alias: Option<String>,
}

impl Zone {
    pub(crate) fn new(domain: &str, services: Mirror<Service>, slices: Mirror<EndpointSlice>) -> Self {
        Self {
            domain: domain
                .to_ascii_lowercase()
                .split('.')
                .map(str::to_owned)
                .collect(),
            services,
            slices,
        }
    }

    /// The answer to a query about the cluster; none if the name is somebody else's.
    pub(crate) fn answer(&self, request: &Message) -> Option<Message> {
        if request.metadata.op_code != OpCode::Query || request.metadata.message_type != MessageType::Query {
            return Some(Message::error_msg(
                request.metadata.id,
                request.metadata.op_code,
                ResponseCode::NotImp,
            ));
        }
        let [query] = request.queries.as_slice() else {
            return Some(Message::error_msg(
                request.metadata.id,
                OpCode::Query,
                ResponseCode::FormErr,
            ));
        };
        let labels: Vec<String> = query
            .name()
            .iter()
            .map(|label| String::from_utf8_lossy(label).to_ascii_lowercase())
            .collect();
        let below = labels.len().checked_sub(self.domain.len())?;
        if labels[below..] != self.domain[..] {
            return None;
        }
        let mut response = Message::response(request.metadata.id, OpCode::Query);
        response.metadata.recursion_desired = request.metadata.recursion_desired;
        response.metadata.recursion_available = true;
        response.metadata.authoritative = true;
        response.add_query(query.clone());
        if let Some(edns) = &request.edns {
            let mut own = hickory_proto::op::Edns::new();
            own.set_max_payload(edns.max_payload().max(512));
            response.edns = Some(own);
        }
        match self.find(&labels[..below]) {
            None => {
                response.metadata.response_code = ResponseCode::NXDomain;
                self.add_soa(&mut response);
            }
            Some(found) => {
                self.add_records(&mut response, query, &found);
                if response.answers.is_empty() {
                    self.add_soa(&mut response);
                }
            }
        }
        Some(response)
    }

    fn find(&self, labels: &[String]) -> Option<Found> {
        let labels: Vec<&str> = labels.iter().map(String::as_str).collect();
        match labels.as_slice() {
            // The domain itself and its branches exist, without records of their own.
            [] | ["svc" | "pod"] => Some(Found::default()),
            [namespace, "svc"] => (!self.services.in_namespace(namespace).is_empty()).then(Found::default),
            [service, namespace, "svc"] => self.service(namespace, service),
            [port, protocol, service, namespace, "svc"]
                if port.starts_with('_') && protocol.starts_with('_') =>
            {
                self.named_port(namespace, service, &port[1..], &protocol[1..])
            }
            [endpoint, service, namespace, "svc"] => self.endpoint(namespace, service, endpoint),
            [address, _, "pod"] => {
                let address = address.replace('-', ".").parse().ok()?;
                Some(Found {
                    addresses: vec![address],
                    ..Found::default()
                })
            }
            _ => None,
        }
    }

    fn service(&self, namespace: &str, name: &str) -> Option<Found> {
        let service = self.services.get(namespace, name)?;
        let spec = service.spec.as_ref()?;
        if spec.type_.as_deref() == Some("ExternalName") {
            return Some(Found {
                alias: spec.external_name.clone(),
                ..Found::default()
            });
        }
        let addresses = match cluster_address(&service) {
            Some(address) => vec![address],
            None => self
                .endpoints(&service, namespace, name)
                .into_iter()
                .map(|(_, address)| address)
                .collect(),
        };
        if addresses.is_empty() && cluster_address(&service).is_none() && self.no_slices(namespace, name) {
            // A headless Service that nobody answers for: CoreDNS says that it does not exist.
            return None;
        }
        Some(Found {
            addresses,
            srv: self.ports(&service, namespace, name, |_, _| true),
            ..Found::default()
        })
    }

    fn no_slices(&self, namespace: &str, name: &str) -> bool {
        slices_of(&self.slices, namespace, name)
            .iter()
            .all(|slice| slice.endpoints.is_empty())
    }

    fn named_port(&self, namespace: &str, name: &str, port: &str, protocol: &str) -> Option<Found> {
        let service = self.services.get(namespace, name)?;
        let srv = self.ports(&service, namespace, name, |candidate, of| {
            candidate == port && of.eq_ignore_ascii_case(protocol)
        });
        (!srv.is_empty()).then(|| Found {
            srv,
            ..Found::default()
        })
    }

    fn endpoint(&self, namespace: &str, name: &str, endpoint: &str) -> Option<Found> {
        let service = self.services.get(namespace, name)?;
        if cluster_address(&service).is_some() {
            return None;
        }
        let addresses: Vec<Ipv4Addr> = self
            .endpoints(&service, namespace, name)
            .into_iter()
            .filter(|(label, _)| label == endpoint)
            .map(|(_, address)| address)
            .collect();
        (!addresses.is_empty()).then(|| Found {
            addresses,
            ..Found::default()
        })
    }

    /// Ready endpoints (or all, if the Service publishes them) with the label they are found by.
    fn endpoints(&self, service: &Service, namespace: &str, name: &str) -> Vec<(String, Ipv4Addr)> {
        let unready = publishes_unready(service);
        let mut found: Vec<(String, Ipv4Addr)> = slices_of(&self.slices, namespace, name)
            .iter()
            .flat_map(|slice| slice.endpoints.iter())
            .filter(|endpoint| unready || is_ready(endpoint))
            .filter_map(|endpoint| {
                let address: Ipv4Addr = endpoint.addresses.first()?.parse().ok()?;
                Some((label_of(endpoint, address), address))
            })
            .collect();
        found.sort();
        found.dedup();
        found
    }

    fn ports(
        &self,
        service: &Service,
        namespace: &str,
        name: &str,
        wanted: impl Fn(&str, &str) -> bool,
    ) -> Vec<(u16, Option<String>, Ipv4Addr)> {
        if let Some(address) = cluster_address(service) {
            return service
                .spec
                .iter()
                .flat_map(|spec| spec.ports.iter().flatten())
                .filter(|port| {
                    wanted(
                        port.name.as_deref().unwrap_or_default(),
                        port.protocol.as_deref().unwrap_or("TCP"),
                    )
                })
                .filter_map(|port| Some((u16::try_from(port.port).ok()?, None, address)))
                .collect();
        }
        let unready = publishes_unready(service);
        let mut found = Vec::new();
        for slice in slices_of(&self.slices, namespace, name) {
            for port in slice.ports.iter().flatten() {
                let matches = wanted(
                    port.name.as_deref().unwrap_or_default(),
                    port.protocol.as_deref().unwrap_or("TCP"),
                );
                let (Some(number), true) = (port.port.and_then(|port| u16::try_from(port).ok()), matches)
                else {
                    continue;
                };
                for endpoint in slice
                    .endpoints
                    .iter()
                    .filter(|endpoint| unready || is_ready(endpoint))
                {
                    if let Some(address) = endpoint
                        .addresses
                        .first()
                        .and_then(|address| address.parse().ok())
                    {
                        found.push((number, Some(label_of(endpoint, address)), address));
                    }
                }
            }
        }
        found
    }

    fn add_records(&self, response: &mut Message, query: &Query, found: &Found) {
        let name = query.name().clone();
        let class = query.query_class();
        if class != DNSClass::IN && class != DNSClass::ANY {
            return;
        }
        if let Some(alias) = found
            .alias
            .as_deref()
            .and_then(|alias| Name::from_ascii(format!("{alias}.")).ok())
        {
            response.add_answer(Record::from_rdata(name, TTL, RData::CNAME(CNAME(alias))));
            return;
        }
        match query.query_type() {
            RecordType::A | RecordType::ANY => {
                for address in found.addresses.iter().take(MAX_RECORDS) {
                    response.add_answer(Record::from_rdata(name.clone(), TTL, RData::A(A(*address))));
                }
            }
            RecordType::SRV => {
                let weight = (100 / found.srv.len().max(1)).max(1) as u16;
                let service = service_name(&name);
                for (port, label, address) in found.srv.iter().take(MAX_RECORDS) {
                    let target = match label {
                        None => Some(service.clone()),
                        Some(label) => service.prepend_label(label.as_bytes()).ok(),
                    };
                    let Some(target) = target else { continue };
                    response.add_answer(Record::from_rdata(
                        name.clone(),
                        TTL,
                        RData::SRV(SRV::new(0, weight, *port, target.clone())),
                    ));
                    response.add_additional(Record::from_rdata(target, TTL, RData::A(A(*address))));
                }
            }
            _ => {}
        }
    }

    fn add_soa(&self, response: &mut Message) {
        let Ok(zone) = Name::from_ascii(format!("{}.", self.domain.join("."))) else {
            return;
        };
        let (Ok(server), Ok(contact)) = (
            zone.prepend_label("dns")
                .and_then(|name| name.prepend_label("ns")),
            zone.prepend_label("hostmaster"),
        ) else {
            return;
        };
        // Serial and timers as CoreDNS gives them; the last one bounds negative caching.
        let soa = SOA::new(server, contact, 1, 7200, 1800, 86400, TTL);
        response.add_authority(Record::from_rdata(zone, TTL, RData::SOA(soa)));
    }
}

/// `_http._tcp.svc.ns...` without the two leading labels.
fn service_name(name: &Name) -> Name {
    let underscored = name
        .iter()
        .take_while(|label| label.first() == Some(&b'_'))
        .count();
    let mut name = name.clone();
    for _ in 0..underscored {
        name = name.base_name();
    }
    name
}

fn cluster_address(service: &Service) -> Option<Ipv4Addr> {
    service.spec.as_ref()?.cluster_ip.as_deref()?.parse().ok()
}

fn publishes_unready(service: &Service) -> bool {
    service
        .spec
        .as_ref()
        .and_then(|spec| spec.publish_not_ready_addresses)
        .unwrap_or(false)
}

fn is_ready(endpoint: &Endpoint) -> bool {
    endpoint
        .conditions
        .as_ref()
        .and_then(|conditions| conditions.ready)
        .unwrap_or(true)
}

/// The endpoint's hostname, or its address with dashes.
fn label_of(endpoint: &Endpoint, address: Ipv4Addr) -> String {
    endpoint
        .hostname
        .clone()
        .unwrap_or_else(|| address.to_string().replace('.', "-"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn zone() -> Zone {
        let services = Mirror::empty();
        for (name, spec) in [
            (
                "reviews",
                json!({"clusterIP": "10.96.0.7", "ports": [{"name": "http", "port": 9080}]}),
            ),
            (
                "db",
                json!({"clusterIP": "None", "ports": [{"name": "sql", "port": 5432}]}),
            ),
            ("empty", json!({"clusterIP": "None"})),
            (
                "away",
                json!({"type": "ExternalName", "externalName": "example.org"}),
            ),
        ] {
            services.note(
                serde_json::from_value(
                    json!({"metadata": {"name": name, "namespace": "shop", "uid": name}, "spec": spec}),
                )
                .unwrap(),
            );
        }
        let slices = Mirror::empty();
        slices.note(
            serde_json::from_value(json!({
                "metadata": {"name": "db-1", "namespace": "shop", "uid": "s",
                             "labels": {"kubernetes.io/service-name": "db"}},
                "addressType": "IPv4", "ports": [{"name": "sql", "port": 5432, "protocol": "TCP"}],
                "endpoints": [
                    {"addresses": ["10.244.0.3"], "hostname": "db-0", "conditions": {"ready": true}},
                    {"addresses": ["10.244.0.4"], "conditions": {"ready": true}},
                    {"addresses": ["10.244.0.5"], "conditions": {"ready": false}},
                ],
            }))
            .unwrap(),
        );
        Zone::new("cluster.local", services, slices)
    }

    fn ask(name: &str, kind: RecordType) -> Option<(ResponseCode, Vec<String>)> {
        let mut request = Message::new(7, MessageType::Query, OpCode::Query);
        request.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
        // Over the wire and back, as a resolver sees it.
        let request = Message::from_vec(&request.to_vec().unwrap()).unwrap();
        let response = zone().answer(&request)?;
        let response = Message::from_vec(&response.to_vec().unwrap()).unwrap();
        assert_eq!(response.metadata.id, 7);
        if response.answers.is_empty() {
            assert_eq!(response.authorities.len(), 1, "a negative answer carries the SOA");
        }
        let answers = response
            .answers
            .iter()
            .map(|record| record.data.to_string())
            .collect();
        Some((response.metadata.response_code, answers))
    }

    fn answers(values: &[&str]) -> Option<(ResponseCode, Vec<String>)> {
        Some((
            ResponseCode::NoError,
            values.iter().map(|value| (*value).to_owned()).collect(),
        ))
    }

    #[test]
    fn services_headless_services_and_their_endpoints_have_addresses() {
        use RecordType::A;
        assert_eq!(ask("reviews.shop.svc.cluster.local.", A), answers(&["10.96.0.7"]));
        assert_eq!(ask("REVIEWS.Shop.svc.Cluster.Local.", A), answers(&["10.96.0.7"]));
        assert_eq!(
            ask("db.shop.svc.cluster.local.", A),
            answers(&["10.244.0.4", "10.244.0.3"])
        );
        assert_eq!(
            ask("db-0.db.shop.svc.cluster.local.", A),
            answers(&["10.244.0.3"])
        );
        assert_eq!(
            ask("10-244-0-4.db.shop.svc.cluster.local.", A),
            answers(&["10.244.0.4"])
        );
        assert_eq!(
            ask("10-244-0-9.shop.pod.cluster.local.", A),
            answers(&["10.244.0.9"])
        );
        assert_eq!(ask("away.shop.svc.cluster.local.", A), answers(&["example.org."]));
    }

    #[test]
    fn srv_records_name_port_and_target() {
        assert_eq!(
            ask("_http._tcp.reviews.shop.svc.cluster.local.", RecordType::SRV),
            answers(&["0 100 9080 reviews.shop.svc.cluster.local."])
        );
        assert_eq!(
            ask("_sql._tcp.db.shop.svc.cluster.local.", RecordType::SRV),
            answers(&[
                "0 50 5432 db-0.db.shop.svc.cluster.local.",
                "0 50 5432 10-244-0-4.db.shop.svc.cluster.local."
            ])
        );
    }

    #[test]
    fn what_exists_without_such_a_record_is_nodata_and_what_does_not_is_nxdomain() {
        for (name, kind) in [
            ("reviews.shop.svc.cluster.local.", RecordType::AAAA),
            ("db.shop.svc.cluster.local.", RecordType::AAAA),
            ("reviews.shop.svc.cluster.local.", RecordType::TXT),
            ("svc.cluster.local.", RecordType::A),
            ("shop.svc.cluster.local.", RecordType::A),
        ] {
            assert_eq!(ask(name, kind), answers(&[]), "{name} {kind}");
        }
        for name in [
            "other.shop.svc.cluster.local.",
            "reviews.nowhere.svc.cluster.local.",
            "x.reviews.shop.svc.cluster.local.",
            "empty.shop.svc.cluster.local.",
            "_grpc._tcp.reviews.shop.svc.cluster.local.",
            "example.org.cluster.local.",
        ] {
            assert_eq!(
                ask(name, RecordType::A),
                Some((ResponseCode::NXDomain, Vec::new())),
                "{name}"
            );
        }
    }

    #[test]
    fn other_domains_are_left_to_the_upstream_resolver() {
        assert_eq!(ask("example.org.", RecordType::A), None);
        assert_eq!(ask("local.", RecordType::A), None);
    }
}
