//! A bootstrap file in Envoy's shape: `node`, `admin`, `static_resources`, `dynamic_resources.ads_config`.
//!
//! The same file starts Envoy. Fields that this proxy does not know are refused by name, never passed over.

use std::net::SocketAddr;
use std::path::Path;

use prost::Message;
use serde_json::Value;
use serin_xds::client::Endpoint;
use serin_xds::pb::envoy::config::cluster::v3 as cluster;
use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::google::protobuf as google;
use serin_xds::{FEATURE_VHDS, ResourceType};

use super::fields::{Fields, object};
use super::messages;
use crate::config::convert::{self, Address};
use crate::control::Options;
use crate::control::run::{DEFAULT_DRAIN, Plan, StaticResource};
use crate::error::{Error, Refusal};

/// Reads the file at `path`.
pub fn read(path: &Path, concurrency: usize) -> Result<Plan, Error> {
    let text = std::fs::read_to_string(path).map_err(|source| Error::BootstrapRead {
        path: path.to_owned(),
        source,
    })?;
    parse(&text, concurrency)
}

/// Reads the document.
pub fn parse(text: &str, concurrency: usize) -> Result<Plan, Error> {
    let value: Value = serde_yaml::from_str(text).map_err(|error| Refusal::new("", error.to_string()))?;
    Ok(object(&value, |fields| plan(fields, concurrency))?)
}

fn plan(fields: &Fields<'_>, concurrency: usize) -> Result<Plan, Refusal> {
    let mut node = fields.message("node", node)?.unwrap_or_default();
    node.user_agent_name = "serin-proxy".to_owned();
    node.client_features = vec![FEATURE_VHDS.to_owned()];
    let admin = fields.message("admin", |fields| {
        // Who asked for the admin port is not logged.
        fields.get("access_log_path");
        let address = fields.message("address", messages::address)?;
        match convert::address(address.as_ref())? {
            Address::Tcp(address) => Ok(address),
            other => Err(Refusal::new("address", format!("cannot listen on {other}"))),
        }
    })?;
    let (static_resources, clusters) = fields
        .message("static_resources", static_resources)?
        .unwrap_or_default();
    let control_plane = fields.message("dynamic_resources", |fields| dynamic(fields, &clusters))?;
    Ok(Plan {
        options: Options {
            node,
            concurrency,
            ..Default::default()
        },
        push_metrics: false,
        control_plane: control_plane.flatten(),
        static_resources,
        admin,
        prometheus: None,
        ready: None,
        drain: DEFAULT_DRAIN,
        restart: None,
    })
}

fn node(fields: &Fields<'_>) -> Result<core::Node, Refusal> {
    Ok(core::Node {
        id: fields.text("id")?,
        cluster: fields.text("cluster")?,
        metadata: fields
            .get("metadata")
            .and_then(|value| match convert_value(value).kind {
                Some(google::value::Kind::StructValue(metadata)) => Some(metadata),
                _ => None,
            }),
        locality: fields.message("locality", |fields| {
            Ok(core::Locality {
                region: fields.text("region")?,
                zone: fields.text("zone")?,
                sub_zone: fields.text("sub_zone")?,
            })
        })?,
        ..Default::default()
    })
}

fn convert_value(from: &Value) -> google::Value {
    use google::value::Kind;
    let kind = match from {
        Value::Null => Kind::NullValue(0),
        Value::Bool(value) => Kind::BoolValue(*value),
        Value::Number(number) => Kind::NumberValue(number.as_f64().unwrap_or_default()),
        Value::String(text) => Kind::StringValue(text.clone()),
        Value::Array(items) => Kind::ListValue(google::ListValue {
            values: items.iter().map(convert_value).collect(),
        }),
        Value::Object(map) => {
            let fields = map
                .iter()
                .map(|(key, value)| (key.clone(), convert_value(value)))
                .collect();
            Kind::StructValue(google::Struct { fields })
        }
    };
    google::Value { kind: Some(kind) }
}

fn static_resources(fields: &Fields<'_>) -> Result<(Vec<StaticResource>, Vec<cluster::Cluster>), Refusal> {
    let clusters = fields.list("clusters", messages::cluster)?;
    let listeners = fields.list("listeners", messages::listener)?;
    let resource = |resource_type, name: &str, body| StaticResource {
        resource_type,
        name: name.to_owned(),
        body,
    };
    let mut out: Vec<_> = clusters
        .iter()
        .map(|cluster| resource(ResourceType::Cluster, &cluster.name, cluster.encode_to_vec()))
        .collect();
    out.extend(
        listeners
            .iter()
            .map(|listener| resource(ResourceType::Listener, &listener.name, listener.encode_to_vec())),
    );
    Ok((out, clusters))
}

/// The control plane: the first endpoint of the static cluster that `ads_config` names.
fn dynamic(fields: &Fields<'_>, clusters: &[cluster::Cluster]) -> Result<Option<Endpoint>, Refusal> {
    for source in ["cds_config", "lds_config"] {
        fields.message(source, |fields| {
            fields.get("resource_api_version");
            fields
                .get("ads")
                .map(drop)
                .ok_or_else(|| Refusal::new("", "only ads: {} is supported"))
        })?;
    }
    let names = fields.message("ads_config", |fields| {
        fields.choice("api_type", &[("GRPC", 2), ("DELTA_GRPC", 3)])?;
        for ignored in ["transport_api_version", "set_node_on_first_message_only"] {
            fields.get(ignored);
        }
        fields.list("grpc_services", |fields| {
            fields
                .message("envoy_grpc", |fields| fields.text("cluster_name"))?
                .ok_or_else(|| Refusal::new("envoy_grpc", "is missing"))
        })
    })?;
    let Some(name) = names.into_iter().flatten().next() else {
        return Ok(None);
    };
    let address = clusters
        .iter()
        .find(|cluster| cluster.name == name)
        .and_then(|cluster| cluster.load_assignment.as_ref())
        .and_then(|assignment| assignment.endpoints.first()?.lb_endpoints.first())
        .and_then(|endpoint| match &endpoint.host_identifier {
            Some(serin_xds::pb::envoy::config::endpoint::v3::lb_endpoint::HostIdentifier::Endpoint(
                inner,
            )) => inner.address.as_ref(),
            _ => None,
        });
    let address = convert::address(address).map_err(|_| {
        Refusal::new(
            "ads_config",
            format!("no static cluster {name:?} with an endpoint"),
        )
    })?;
    Ok(Some(match address {
        Address::Pipe(path) => Endpoint::Unix(path.to_string().into()),
        other => Endpoint::Tcp(other.to_string()),
    }))
}

/// The address of a plan's admin port, for tools.
pub fn admin_address(plan: &Plan) -> Option<SocketAddr> {
    plan.admin
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXAMPLE: &str = include_str!("../../example/bootstrap.yaml");

    #[test]
    fn the_example_starts_a_proxy_with_its_listener_and_clusters() {
        let plan = parse(EXAMPLE, 1).unwrap();
        let names: Vec<_> = plan
            .static_resources
            .iter()
            .map(|resource| resource.name.as_str())
            .collect();
        assert_eq!(names, ["v1", "v2", "control-plane", "http"]);
        assert_eq!(plan.options.node.id, "edge-1");
        assert_eq!(admin_address(&plan), Some("127.0.0.1:15000".parse().unwrap()));
        assert_eq!(
            plan.control_plane,
            Some(Endpoint::Unix("/run/serin/xds.sock".into()))
        );
        let mut store = crate::config::store::Store::new(1);
        for resource in &plan.static_resources {
            let update = crate::config::store::Update {
                name: &resource.name,
                body: &resource.body,
            };
            assert!(
                store.apply(resource.resource_type, &[update], &[]).is_empty(),
                "{}",
                resource.name
            );
        }
    }

    #[test]
    fn unknown_fields_and_wrong_values_are_refused_with_their_path() {
        let cases = [
            (
                "static_resources: {clusters: [{name: a, foo: 1}]}",
                "static_resources.clusters[0].foo",
            ),
            (
                "static_resources: {clusters: [{name: a, connect_timeout: 5}]}",
                "static_resources.clusters[0].connect_timeout",
            ),
            (
                "static_resources: {clusters: [{name: a, lb_policy: BEST}]}",
                "static_resources.clusters[0].lb_policy",
            ),
            ("stats_sinks: []", "stats_sinks"),
        ];
        for (text, path) in cases {
            let Err(Error::Bootstrap(refusal)) = parse(text, 1) else {
                panic!("{text} was taken")
            };
            assert_eq!(refusal.path, path);
        }
    }
}
