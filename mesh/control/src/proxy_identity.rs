//! Who a proxy is, read from the node of its first xDS request.
//!
//! The node id has Istio's four parts, `type~ip~pod.namespace~domain`; the metadata has Istio's keys. Nothing here is
//! proof: proof comes with certificates.

use std::collections::BTreeMap;
use std::net::IpAddr;

use serin_xds::pb::envoy::config::core::v3::Node;
use serin_xds::pb::google::protobuf::value::Kind as ValueKind;
use serin_xds::pb::google::protobuf::{Struct, Value};

/// What a proxy is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ProxyKind {
    /// Beside one workload, for what goes in and out of it.
    Sidecar,
    /// A gateway.
    Router,
}

impl ProxyKind {
    /// The word in the node id.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Sidecar => "sidecar",
            Self::Router => "router",
        }
    }
}

/// What a proxy can do beyond the standard.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Features {
    /// It takes virtual hosts as resources of their own on the aggregated stream.
    pub vhds: bool,
}

/// Where a proxy runs, as its node states it.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Locality {
    /// For example `europe-west1`.
    pub region: String,
    /// For example `europe-west1-b`.
    pub zone: String,
    /// For example a rack.
    pub sub_zone: String,
}

/// A connected proxy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Proxy {
    /// The whole node id.
    pub id: String,
    /// What it is for.
    pub kind: ProxyKind,
    /// Name of its pod.
    pub name: String,
    /// Namespace of its pod.
    pub namespace: String,
    /// Labels of its pod.
    pub labels: BTreeMap<String, String>,
    /// Addresses of its pod, the one from the node id first.
    pub ips: Vec<IpAddr>,
    /// Service account of its pod; empty if not stated.
    pub service_account: String,
    /// Name of the workload (Deployment and the like); empty if not stated.
    pub workload: String,
    /// Where it runs; empty if not stated.
    pub locality: Locality,
    /// Suffix of service names, for example `prod.svc.cluster.local`.
    pub dns_domain: String,
    /// What it can do beyond the standard.
    pub features: Features,
}

/// A node that is no proxy of ours.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IdentityError {
    /// Not four parts.
    #[error("node id {0:?} does not have the four parts type~ip~pod.namespace~domain")]
    Parts(String),
    /// A type that is not served.
    #[error("node id {id:?}: proxies of type {kind:?} are not served, only sidecar and router")]
    Kind {
        /// The whole node id.
        id: String,
        /// Its first part.
        kind: String,
    },
    /// The second part is no address.
    #[error("node id {0:?}: its second part is no IP address")]
    Address(String),
    /// The third part is not `pod.namespace`.
    #[error("node id {0:?}: its third part is not pod.namespace")]
    Pod(String),
}

impl Proxy {
    /// Reads a node.
    pub fn from_node(node: &Node) -> Result<Self, IdentityError> {
        let id = || node.id.clone();
        let parts: Vec<&str> = node.id.split('~').collect();
        let [kind, ip, pod, domain] = parts.as_slice() else {
            return Err(IdentityError::Parts(id()));
        };
        let kind = match *kind {
            "sidecar" => ProxyKind::Sidecar,
            "router" => ProxyKind::Router,
            other => {
                return Err(IdentityError::Kind {
                    id: id(),
                    kind: other.to_owned(),
                });
            }
        };
        let ip: IpAddr = ip.parse().map_err(|_| IdentityError::Address(id()))?;
        let (pod, namespace) = pod
            .rsplit_once('.')
            .filter(|(pod, namespace)| !pod.is_empty() && !namespace.is_empty())
            .ok_or_else(|| IdentityError::Pod(id()))?;
        let empty = Struct::default();
        let metadata = node.metadata.as_ref().unwrap_or(&empty);
        let mut ips = vec![ip];
        let stated = text(metadata, "INSTANCE_IPS").unwrap_or_default();
        for other in stated.split(',').filter_map(|ip| ip.trim().parse().ok()) {
            if !ips.contains(&other) {
                ips.push(other);
            }
        }
        Ok(Self {
            id: node.id.clone(),
            kind,
            name: pod.into(),
            namespace: text(metadata, "NAMESPACE").unwrap_or(namespace).into(),
            labels: labels(metadata),
            ips,
            service_account: text(metadata, "SERVICE_ACCOUNT").unwrap_or_default().into(),
            workload: text(metadata, "WORKLOAD_NAME").unwrap_or_default().into(),
            locality: node
                .locality
                .clone()
                .map_or_else(Locality::default, |locality| Locality {
                    region: locality.region,
                    zone: locality.zone,
                    sub_zone: locality.sub_zone,
                }),
            dns_domain: (*domain).into(),
            features: Features {
                vhds: node
                    .client_features
                    .iter()
                    .any(|feature| feature == serin_xds::FEATURE_VHDS),
            },
        })
    }
}

fn text<'a>(metadata: &'a Struct, key: &str) -> Option<&'a str> {
    string(metadata.fields.get(key)?).filter(|text| !text.is_empty())
}

fn string(value: &Value) -> Option<&str> {
    match value.kind.as_ref()? {
        ValueKind::StringValue(text) => Some(text),
        ValueKind::NullValue(_)
        | ValueKind::NumberValue(_)
        | ValueKind::BoolValue(_)
        | ValueKind::StructValue(_)
        | ValueKind::ListValue(_) => None,
    }
}

fn labels(metadata: &Struct) -> BTreeMap<String, String> {
    match metadata
        .fields
        .get("LABELS")
        .and_then(|value| value.kind.as_ref())
    {
        Some(ValueKind::StructValue(labels)) => labels
            .fields
            .iter()
            .filter_map(|(name, value)| Some((name.clone(), string(value)?.to_owned())))
            .collect(),
        _ => BTreeMap::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(text: &str) -> Value {
        Value {
            kind: Some(ValueKind::StringValue(text.into())),
        }
    }

    #[test]
    fn a_sidecar_is_known_by_its_node_id_and_metadata() {
        let labels = Struct {
            fields: [("app".to_string(), value("reviews"))].into(),
        };
        let metadata = Struct {
            fields: [
                (
                    "LABELS".to_string(),
                    Value {
                        kind: Some(ValueKind::StructValue(labels)),
                    },
                ),
                ("INSTANCE_IPS".to_string(), value("10.1.0.7,fd00::7")),
                ("SERVICE_ACCOUNT".to_string(), value("reviews")),
            ]
            .into(),
        };
        let proxy = Proxy::from_node(&Node {
            id: "sidecar~10.1.0.7~reviews-v1-6d.prod~prod.svc.cluster.local".into(),
            metadata: Some(metadata),
            client_features: vec!["serin.vhds".into()],
            ..Node::default()
        })
        .unwrap();
        assert_eq!(
            (proxy.kind, proxy.name.as_str(), proxy.namespace.as_str()),
            (ProxyKind::Sidecar, "reviews-v1-6d", "prod")
        );
        assert_eq!(
            proxy.ips,
            ["10.1.0.7".parse::<IpAddr>().unwrap(), "fd00::7".parse().unwrap()]
        );
        assert_eq!(
            (proxy.labels["app"].as_str(), proxy.service_account.as_str()),
            ("reviews", "reviews")
        );
        assert!(proxy.features.vhds);
    }

    #[test]
    fn nodes_that_are_no_proxies_are_refused_with_the_part_that_is_wrong() {
        let read = |id: &str| {
            Proxy::from_node(&Node {
                id: id.into(),
                ..Node::default()
            })
            .unwrap_err()
        };
        assert_eq!(read("envoy"), IdentityError::Parts("envoy".into()));
        assert!(matches!(
            read("waypoint~10.0.0.1~a.b~c"),
            IdentityError::Kind { .. }
        ));
        assert!(matches!(read("sidecar~here~a.b~c"), IdentityError::Address(_)));
        assert!(matches!(read("sidecar~10.0.0.1~a~c"), IdentityError::Pod(_)));
        assert!(matches!(read("sidecar~10.0.0.1~.b~c"), IdentityError::Pod(_)));
    }
}
