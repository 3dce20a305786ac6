//! `serin-proxy proxy sidecar|router`: the environment that injection gives a proxy's container, read as Istio's agent
//! reads it, turned into a node and a plan.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::time::Duration;

use serin_xds::FEATURE_VHDS;
use serin_xds::client::Endpoint;
use serin_xds::pb::envoy::config::core::v3::{Locality, Node, node::UserAgentVersionType};
use serin_xds::pb::google::protobuf as google;

use super::inherited;
use crate::control::Options;
use crate::control::run::{ControlPlane, DEFAULT_DRAIN, Plan};
use crate::error::Error;
use crate::metrics::select;

/// Which kind of proxy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Beside an application.
    Sidecar,
    /// On its own: a gateway.
    Router,
}

/// Environment variables by name.
pub type Environment = HashMap<String, String>;

/// The node that announces itself: `type~ip~pod.namespace~domain` and metadata from `ISTIO_META_*`.
pub fn node(role: Role, domain: &str, environment: &Environment) -> Result<Node, Error> {
    let required = |name: &'static str| {
        environment
            .get(name)
            .filter(|value| !value.is_empty())
            .ok_or_else(|| Error::Environment {
                name,
                reason: "is not set".to_owned(),
            })
    };
    let pod = required("POD_NAME")?;
    let namespace = required("POD_NAMESPACE")?;
    let ip = required("INSTANCE_IP")?;
    let mut metadata = google::Struct::default();
    let mut put = |key: &str, value: google::value::Kind| {
        metadata
            .fields
            .insert(key.to_owned(), google::Value { kind: Some(value) });
    };
    let text = |value: &str| google::value::Kind::StringValue(value.to_owned());
    for (name, value) in environment {
        if let Some(key) = name.strip_prefix("ISTIO_META_") {
            put(key, text(value));
        }
    }
    put("NAME", text(pod));
    put("NAMESPACE", text(namespace));
    put("INSTANCE_IPS", text(ip));
    if let Some(account) = environment.get("SERVICE_ACCOUNT") {
        put("SERVICE_ACCOUNT", text(account));
    }
    for (variable, key) in [
        ("ISTIO_METAJSON_LABELS", "LABELS"),
        ("ISTIO_METAJSON_ANNOTATIONS", "ANNOTATIONS"),
    ] {
        if let Some(json) = environment.get(variable) {
            put(
                key,
                string_map(json).map_err(|reason| Error::Environment {
                    name: "ISTIO_METAJSON_LABELS",
                    reason,
                })?,
            );
        }
    }
    let kind = match role {
        Role::Sidecar => "sidecar",
        Role::Router => "router",
    };
    Ok(Node {
        id: format!("{kind}~{ip}~{pod}.{namespace}~{domain}"),
        cluster: format!(
            "{}.{namespace}",
            environment.get("ISTIO_META_WORKLOAD_NAME").unwrap_or(pod)
        ),
        metadata: Some(metadata),
        locality: environment.get("ISTIO_META_LOCALITY").map(|text| {
            let mut parts = text.split('/').map(str::to_owned);
            let mut next = || parts.next().unwrap_or_default();
            Locality {
                region: next(),
                zone: next(),
                sub_zone: next(),
            }
        }),
        user_agent_name: "serin-proxy".to_owned(),
        user_agent_version_type: Some(UserAgentVersionType::UserAgentVersion(
            env!("CARGO_PKG_VERSION").to_owned(),
        )),
        client_features: vec![FEATURE_VHDS.to_owned()],
        ..Default::default()
    })
}

fn string_map(json: &str) -> Result<google::value::Kind, String> {
    let map: HashMap<String, String> =
        serde_json::from_str(json).map_err(|error| format!("not a JSON map: {error}"))?;
    let fields = map
        .into_iter()
        .map(|(key, value)| {
            (
                key,
                google::Value {
                    kind: Some(google::value::Kind::StringValue(value)),
                },
            )
        })
        .collect();
    Ok(google::value::Kind::StructValue(google::Struct { fields }))
}

/// The plan of a pod's proxy: control plane at `SERIN_DISCOVERY_ADDRESS`, Istio's ports.
pub fn plan(role: Role, domain: &str, concurrency: usize, environment: &Environment) -> Result<Plan, Error> {
    const DISCOVERY: &str = "SERIN_DISCOVERY_ADDRESS";
    let address = environment.get(DISCOVERY).ok_or_else(|| Error::Environment {
        name: DISCOVERY,
        reason: "is not set; give unix:/path/to/xds.sock or host:port".to_owned(),
    })?;
    let endpoint: Endpoint = address.parse().map_err(|error| Error::ControlPlane {
        address: address.clone(),
        reason: format!("{error}"),
    })?;
    let drain = match environment.get("TERMINATION_DRAIN_DURATION_SECONDS") {
        None => DEFAULT_DRAIN,
        Some(text) => Duration::from_secs(text.parse().map_err(|_| Error::Environment {
            name: "TERMINATION_DRAIN_DURATION_SECONDS",
            reason: format!("{text:?} is not a number of seconds"),
        })?),
    };
    let any = |port| SocketAddr::from(([0, 0, 0, 0], port));
    Ok(Plan {
        options: Options {
            node: node(role, domain, environment)?,
            concurrency,
            overload: Default::default(),
            stats: select::Rules {
                deferred: select::Deferred::Hidden,
                ..Default::default()
            },
            own_address: environment.get("INSTANCE_IP").and_then(|text| text.parse().ok()),
            local_cluster: environment.get("SERIN_LOCAL_CLUSTER").cloned(),
            inherited: environment
                .get(inherited::VARIABLE)
                .map(|text| inherited::adopt(text))
                .transpose()?
                .unwrap_or_default(),
            ..Default::default()
        },
        control_plane: Some(ControlPlane::At(endpoint)),
        push_metrics: true,
        static_resources: Vec::new(),
        admin: Some(SocketAddr::from(([127, 0, 0, 1], 15000))),
        admin_socket: None,
        prometheus: Some(any(15090)),
        ready: Some(any(15021)),
        drain,
        restart: None,
        application: None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::peer::Workload;

    fn environment() -> Environment {
        [
            ("POD_NAME", "reviews-v1-0"),
            ("POD_NAMESPACE", "prod"),
            ("INSTANCE_IP", "10.0.0.7"),
            ("SERVICE_ACCOUNT", "reviews"),
            ("ISTIO_META_WORKLOAD_NAME", "reviews-v1"),
            ("ISTIO_META_CLUSTER_ID", "Kubernetes"),
            ("ISTIO_METAJSON_LABELS", r#"{"app":"reviews","version":"v1"}"#),
            ("SERIN_DISCOVERY_ADDRESS", "unix:/run/xds.sock"),
        ]
        .into_iter()
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect()
    }

    #[test]
    fn the_node_is_named_after_the_pod_and_carries_its_labels() {
        let node = node(Role::Sidecar, "prod.svc.cluster.local", &environment()).unwrap();
        assert_eq!(
            node.id,
            "sidecar~10.0.0.7~reviews-v1-0.prod~prod.svc.cluster.local"
        );
        assert_eq!(node.client_features, ["serin.vhds"]);
        let own = Workload::of_node(node.metadata.as_ref().unwrap());
        assert_eq!(
            (&*own.name, &*own.namespace, &*own.app, &*own.version),
            ("reviews-v1", "prod", "reviews", "v1")
        );
    }

    #[test]
    fn a_missing_variable_is_named() {
        let mut environment = environment();
        environment.remove("INSTANCE_IP");
        let error = node(Role::Router, "d", &environment).unwrap_err();
        assert!(error.to_string().contains("INSTANCE_IP"), "{error}");
        environment.insert("INSTANCE_IP".into(), "1.2.3.4".into());
        environment.remove("SERIN_DISCOVERY_ADDRESS");
        let error = plan(Role::Router, "d", 1, &environment).unwrap_err();
        assert!(error.to_string().contains("SERIN_DISCOVERY_ADDRESS"), "{error}");
    }

    #[test]
    fn the_plan_has_istios_ports() {
        let plan = plan(Role::Sidecar, "d", 1, &environment()).unwrap();
        assert_eq!(plan.prometheus.unwrap().port(), 15090);
        assert_eq!(plan.ready.unwrap().port(), 15021);
        assert_eq!(plan.admin.unwrap(), "127.0.0.1:15000".parse().unwrap());
        assert_eq!(plan.drain, DEFAULT_DRAIN);
    }
}
